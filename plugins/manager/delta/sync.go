package delta

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// digestBytes is about how much of its digests a node sends at once.
	digestBytes = 512 << 10
	// chunksInFlight bounds the unacknowledged messages of one exchange.
	chunksInFlight = 4
	// retryMin and retryMax bound the pause before a failed exchange is tried
	// again.
	retryMin = 500 * time.Millisecond
	retryMax = 30 * time.Second
	// faultPause is the least time between two exchanges because of changes
	// that did not reach the member.
	faultPause = 5 * time.Second
	// Both sides of a new pair want an exchange: the one with the smaller id
	// begins after firstPatience, the other one after secondPatience if nothing
	// has happened until then.
	firstPatience  = 500 * time.Millisecond
	secondPatience = 3 * time.Second
	// maxFetch bounds the keys of one kindFetch.
	maxFetch = 4096
)

var (
	errStalled = errors.New("the member has stopped answering")
	errLeft    = errors.New("the member has left")
	errRefused = errors.New("the member is not ready")
)

// peer is what is planned with another member. Manager.mu guards it.
type peer struct {
	member channel.Member
	// wanted: an exchange is due at due; failed counts failures in a row.
	wanted bool
	due    time.Time
	failed int
	// running: this node has begun one; last is when it began the last one.
	running bool
	last    time.Time
	// serving is the exchange that the member has begun with us since we want
	// one.
	serving uint64
}

// want asks for an exchange, not later than at due.
func (p *peer) want(due time.Time) {
	if !p.wanted || due.Before(p.due) {
		p.due = due
	}
	p.wanted = true
	p.serving = 0 // one that is going on may be past what there is to compare
}

// patience is how long to wait for the other side to begin.
func (m *Manager) patience(local, member channel.Member) time.Duration {
	if string(local.ID[:]) < string(member.ID[:]) {
		return firstPatience
	}
	return secondPatience
}

// run is the goroutine that begins exchanges: first to join, then whenever one
// is due.
func (m *Manager) run() {
	m.join()
	check := time.NewTicker(max(m.cfg.SyncInterval, time.Second))
	defer check.Stop()
	if m.cfg.SyncInterval == 0 {
		check.Stop()
	}
	for m.ctx.Err() == nil {
		p, wait := m.nextDue()
		if p != nil {
			m.attempt(p)
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-m.kick:
		case <-check.C:
			m.wantAny()
		case <-m.ctx.Done():
		}
		timer.Stop()
	}
}

// wantAny asks for an exchange with one member, whichever.
func (m *Manager) wantAny() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(m.view.Members); n > 0 {
		if p := m.peers[m.view.Members[rand.IntN(n)].ID]; p != nil && !p.wanted {
			p.want(time.Now())
		}
	}
}

// nextDue returns a peer with which an exchange is due, or how long to wait.
func (m *Manager) nextDue() (*peer, time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	wait := time.Hour
	var best *peer
	for _, p := range m.peers {
		if !p.wanted {
			continue
		}
		if best == nil || p.due.Before(best.due) {
			best = p
		}
		wait = min(wait, p.due.Sub(now))
	}
	if best != nil && !best.due.After(now) {
		return best, 0
	}
	return nil, wait
}

// attempt does the exchange that is due with p, or plans the next attempt.
func (m *Manager) attempt(p *peer) {
	m.mu.Lock()
	member := p.member
	p.wanted, p.running, p.last = false, true, time.Now()
	m.mu.Unlock()
	_, err := m.exchange(m.ctx, member, false)
	m.mu.Lock()
	p.running = false
	if err == nil {
		p.failed = 0
	} else if m.ctx.Err() == nil {
		p.want(time.Now().Add(min(retryMin<<min(p.failed, 10), retryMax)))
		if !errors.Is(err, errRefused) {
			p.failed++
		}
	}
	failed := p.failed
	m.mu.Unlock()
	if err != nil && failed == 1 && m.ctx.Err() == nil {
		m.log.Warn("could not compare sessions with a member; trying again", zap.Stringer("member", member), zap.Error(err))
	}
}

// join brings the state of the other members and then makes the manager ready.
func (m *Manager) join() {
	began := time.Now()
	ctx, cancel := m.ctx, context.CancelFunc(func() {})
	switch limit := m.cfg.StateTransferTimeout; {
	case limit == 0:
		m.setReady(0, "did not wait for the sessions of other members (state_transfer_timeout is 0)")
		return
	case limit > 0:
		ctx, cancel = context.WithTimeout(m.ctx, limit)
	}
	defer cancel()
	if !m.awaitMember(ctx) {
		m.setReady(0, "nobody to ask for sessions")
		return
	}
	asked, err := m.collect(ctx)
	switch took := time.Since(began); {
	case m.ctx.Err() != nil:
	case err == nil:
		m.setReady(took, fmt.Sprintf("received %d sessions from %d members in %v", m.received.Load(), asked, took.Round(time.Millisecond)))
	default:
		state := fmt.Sprintf("the state transfer was not complete after %v (%v); going on with the %d sessions received, the rest is fetched in the background",
			took.Round(time.Millisecond), err, m.received.Load())
		m.log.Error(state)
		m.setReady(took, state)
	}
}

func (m *Manager) setReady(took time.Duration, state string) {
	m.mu.Lock()
	m.ready, m.state, m.transfer = true, state, took
	m.mu.Unlock()
	close(m.readyCh)
}

// awaitMember waits for a view with a member in it.
func (m *Manager) awaitMember(ctx context.Context) bool {
	timer := time.NewTimer(m.cfg.SettleTime)
	defer timer.Stop()
	for {
		m.mu.Lock()
		n, changed := len(m.view.Members), m.changed
		m.mu.Unlock()
		if n > 0 {
			return true
		}
		select {
		case <-changed:
		case <-timer.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// collect exchanges with every member, the oldest first. It is complete when one
// that was ready has answered and every other one has been tried, or when there
// is nobody left who has not answered.
func (m *Manager) collect(ctx context.Context) (asked int, err error) {
	answered, tried := map[channel.UniqueID]bool{}, map[channel.UniqueID]bool{}
	complete := false
	var last error
	for pause := retryMin; ; {
		member, missing := m.nextToAsk(answered, tried)
		if member.IsZero() {
			if complete || missing == 0 {
				return len(answered), nil
			}
			// Nobody had everything, and some have not answered: again.
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return len(answered), fmt.Errorf("%d members have not answered: %w", missing, last)
			}
			clear(tried)
			pause = min(2*pause, retryMax)
			continue
		}
		m.setState("receiving sessions from " + member.String())
		tried[member.ID] = true
		ready, err := m.exchange(ctx, member, true)
		if err != nil {
			last = fmt.Errorf("%s: %w", member, err)
			if ctx.Err() != nil {
				return len(answered), last
			}
			m.log.Warn("a member did not give its sessions; asking the next one", zap.Stringer("member", member), zap.Error(err))
			continue
		}
		answered[member.ID] = true
		complete = complete || ready
		m.mu.Lock()
		if p := m.peers[member.ID]; p != nil {
			p.wanted = false
		}
		m.mu.Unlock()
	}
}

func (m *Manager) setState(s string) {
	m.mu.Lock()
	m.state = s
	m.mu.Unlock()
}

// nextToAsk returns the oldest member that has not been tried, and how many have
// not answered.
func (m *Manager) nextToAsk(answered, tried map[channel.UniqueID]bool) (next channel.Member, missing int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, member := range m.view.Members {
		if answered[member.ID] {
			continue
		}
		missing++
		if next.IsZero() && !tried[member.ID] {
			next = member
		}
	}
	return next, missing
}

// exchange is one that this node has begun.
type exchange struct {
	peer     channel.UniqueID
	answers  chan answer   // capacity 1: one span is asked about at a time
	progress chan struct{} // capacity 1
}

type answer struct {
	span
	wanted map[uint64]bool
}

// exchange compares all sessions with a member: each side gets what it lacks.
// ready says that the member had complete state.
func (m *Manager) exchange(ctx context.Context, member channel.Member, joining bool) (ready bool, err error) {
	x := &exchange{peer: member.ID, answers: make(chan answer, 1), progress: make(chan struct{}, 1)}
	id := rand.Uint64()
	m.mu.Lock()
	m.exchanges[id] = x
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.exchanges, id)
		m.mu.Unlock()
		if err != nil {
			m.m.failures.Inc()
		} else {
			m.m.exchanges.Inc()
		}
	}()
	ready = true
	for from := 0; from < shardCount; {
		s := span{from: from}
		if joining {
			s.flags = flagJoining
		}
		var body []byte
		body, s.to = m.digest(id, s)
		if err := m.sendTo(ctx, member, channel.SendAck, body); err != nil {
			return false, err
		}
		a, err := m.await(ctx, x, s)
		if err != nil {
			return false, err
		}
		ready = ready && a.flags&flagReady != 0
		if err := m.push(ctx, member, s, a.wanted); err != nil {
			return false, err
		}
		from = s.to
	}
	return ready, nil
}

// digest makes the message with the digests of some shards from s.from on.
func (m *Manager) digest(id uint64, s span) (body []byte, to int) {
	head := len(s.append(appendHeader(nil, kindDigest, id)))
	body, s.to = m.store.appendDigests(make([]byte, head), s.from, digestBytes, time.Now().UnixMilli())
	s.append(appendHeader(body[:0], kindDigest, id)) // over the space left for it
	return body, s.to
}

// await waits for the answer about a span. Every message of the member gives it
// more time.
func (m *Manager) await(ctx context.Context, x *exchange, s span) (answer, error) {
	stall := time.NewTimer(m.cfg.StallTimeout)
	defer stall.Stop()
	for {
		m.mu.Lock()
		_, there := m.peers[x.peer]
		changed := m.changed
		m.mu.Unlock()
		if !there {
			return answer{}, errLeft
		}
		select {
		case a := <-x.answers:
			if a.from != s.from || a.to != s.to {
				continue
			}
			if a.flags&flagRefused != 0 {
				return a, errRefused
			}
			return a, nil
		case <-x.progress:
			stall.Reset(m.cfg.StallTimeout)
		case <-changed:
		case <-stall.C:
			return answer{}, errStalled
		case <-ctx.Done():
			return answer{}, ctx.Err()
		}
	}
}

// push sends the records that the member wants.
func (m *Manager) push(ctx context.Context, member channel.Member, s span, wanted map[uint64]bool) error {
	if len(wanted) == 0 {
		return nil
	}
	w := m.newWindow(ctx, member)
	for i := s.from; i < s.to; i++ {
		w.records(m.store.keys(i, wanted, time.Now().UnixMilli()), kindRecords, 0)
	}
	return w.end()
}

// serveDigest answers a part of a member's exchange.
func (m *Manager) serveDigest(from channel.Member, id uint64, s span, theirs map[uint64]uint64) {
	m.mu.Lock()
	ready := m.ready
	p := m.peers[from.ID]
	if p != nil && p.wanted && s.from == 0 {
		p.serving = id // it began after we wanted one: it will do
	}
	m.mu.Unlock()
	reply := span{from: s.from, to: s.to}
	if ready {
		reply.flags |= flagReady
	}
	joining := s.flags&flagJoining != 0
	if !ready && !joining {
		reply.flags |= flagRefused // we get all of it by joining
		m.reply(from, reply.append(appendHeader(nil, kindAnswer, id)))
		return
	}
	if err := m.serve(from, id, s, theirs); err != nil {
		// The member notices by the missing answer, and tries again.
		m.log.Debug("could not send sessions to a member", zap.Stringer("member", from), zap.Error(err))
		return
	}
	body := reply.append(appendHeader(make([]byte, 0, 16+8*len(theirs)), kindAnswer, id))
	for digest := range theirs { // what is left: lacking or different here
		body = binary.BigEndian.AppendUint64(body, digest)
	}
	if !m.reply(from, body) || s.to != shardCount {
		return
	}
	m.mu.Lock()
	if p := m.peers[from.ID]; p != nil && p.serving == id {
		p.wanted, p.failed = false, 0
	}
	m.mu.Unlock()
}

// serve sends what the member lacks of a span, and removes from theirs what is
// equal here.
func (m *Manager) serve(from channel.Member, id uint64, s span, theirs map[uint64]uint64) error {
	w := m.newWindow(m.ctx, from)
	for i := s.from; i < s.to && !w.failed(); i++ {
		w.records(m.store.compare(i, theirs, time.Now().UnixMilli()), kindRecords, id)
	}
	return w.end()
}

func (m *Manager) reply(to channel.Member, body []byte) bool {
	if err := m.sendTo(m.ctx, to, channel.SendAck, body); err != nil {
		m.log.Debug("could not answer a member", zap.Stringer("member", to), zap.Error(err))
		return false
	}
	return true
}

func (m *Manager) sendTo(ctx context.Context, to channel.Member, o channel.Options, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	return m.host.Send(ctx, []channel.Member{to}, o, body)
}

// window sends chunks of records, a few at a time. It belongs to one goroutine.
type window struct {
	m     *Manager
	ctx   context.Context
	to    channel.Member
	slots chan struct{}
	wg    sync.WaitGroup
	buf   []byte // the chunk that is being filled
	head  int    // length of its header

	mu  sync.Mutex
	err error
}

func (m *Manager) newWindow(ctx context.Context, to channel.Member) *window {
	return &window{m: m, ctx: ctx, to: to, slots: make(chan struct{}, chunksInFlight)}
}

// records adds the records of the keys, and sends what makes a chunk.
func (w *window) records(keys []session.Key, k kind, id uint64) {
	for len(keys) > 0 && !w.failed() {
		if w.buf == nil {
			w.buf = appendHeader(make([]byte, 0, w.m.cfg.ChunkBytes+4096), k, id)
			w.head = len(w.buf)
		}
		w.buf, keys = w.m.store.appendRecords(w.buf, keys, w.m.cfg.ChunkBytes)
		if len(w.buf) >= w.m.cfg.ChunkBytes {
			w.flush()
		}
	}
}

func (w *window) flush() {
	body := w.buf
	w.buf = nil
	if len(body) <= w.head {
		return
	}
	select {
	case w.slots <- struct{}{}:
	case <-w.ctx.Done():
		w.fail(w.ctx.Err())
		return
	}
	w.wg.Go(func() {
		if err := w.m.sendTo(w.ctx, w.to, channel.SendSyncAck, body); err != nil {
			w.fail(err)
		}
		<-w.slots
	})
}

func (w *window) fail(err error) {
	w.mu.Lock()
	w.err = errors.Join(w.err, err)
	w.mu.Unlock()
}

func (w *window) failed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err != nil
}

// end sends the rest and waits until everything is acknowledged.
func (w *window) end() error {
	if w.buf != nil && !w.failed() {
		w.flush()
	}
	w.wg.Wait()
	return w.err
}

// gotRecords takes what a member sent in an exchange; id is 0 if the member has
// begun it.
func (m *Manager) gotRecords(from channel.Member, id uint64, b []byte) error {
	m.mu.Lock()
	x, ready := m.exchanges[id], m.ready
	m.mu.Unlock()
	added, err := m.apply(b, &from)
	if err != nil {
		return err
	}
	if !ready {
		m.received.Add(int64(added))
	}
	if x == nil || x.peer != from.ID {
		return nil // pushed by the initiator, or too late for the exchange
	}
	select {
	case x.progress <- struct{}{}:
	default:
	}
	return nil
}

func (m *Manager) gotAnswer(from channel.Member, id uint64, b []byte) error {
	s, rest, err := parseSpan(b, 8)
	if err != nil {
		return err
	}
	m.mu.Lock()
	x := m.exchanges[id]
	m.mu.Unlock()
	if x == nil || x.peer != from.ID {
		return nil
	}
	select {
	case x.answers <- answer{s, parseDigests(rest)}:
	default: // twice
	}
	return nil
}

// fetch asks other members for single sessions.
type fetch struct {
	answers chan bool // one for each member that answered: whether it was ready
}

// fetch asks all members for one session, and merges what they have. complete
// says that no member has it, or that the first that has it has answered.
func (m *Manager) fetch(ctx context.Context, key session.Key) (complete bool, err error) {
	_, view, err := m.running()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, m.cfg.FetchTimeout)
	defer cancel()
	to := view.Members
	f := &fetch{answers: make(chan bool, len(to))}
	id := rand.Uint64()
	m.mu.Lock()
	m.fetches[id] = f
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.fetches, id)
		m.mu.Unlock()
	}()
	body := session.AppendBatch(appendHeader(nil, kindFetch, id), &session.Record{Key: key})
	failed := make(chan int, 1)
	if len(to) == 0 || !m.spawn(func() {
		n := 0
		if se, ok := errors.AsType[*channel.SendError](m.host.Send(ctx, to, channel.SendAck, body)); ok {
			n = len(se.Faults)
		}
		failed <- n
	}) {
		return false, nil
	}
	someReady := false
	for waiting := len(to); waiting > 0; {
		select {
		case ready := <-f.answers:
			waiting--
			someReady = someReady || ready
			if m.store.has(key) {
				return true, nil
			}
		case n := <-failed:
			waiting -= n
			if n > 0 {
				return false, nil
			}
		case <-ctx.Done():
			return false, nil
		case <-m.ctx.Done():
			return false, errStopped
		}
	}
	return someReady, nil
}

// has reports whether a load would find something to say about the key.
func (s *store) has(k session.Key) bool {
	sh := s.shard(k)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	p := sh.replicas[k]
	_, over := sh.tombs[k]
	return over || p != nil && p.Whole()
}

// serveFetch answers with what is known of the keys.
func (m *Manager) serveFetch(from channel.Member, id uint64, keys []session.Key) {
	flags := byte(0)
	if m.isReady() {
		flags = flagReady
	}
	body := append(appendHeader(nil, kindFound, id), flags)
	body, keys = m.store.appendRecords(body, keys, m.cfg.ChunkBytes)
	if !m.reply(from, body) || len(keys) == 0 {
		return
	}
	w := m.newWindow(m.ctx, from)
	w.records(keys, kindDelta, 0)
	if err := w.end(); err != nil {
		m.log.Debug("could not send sessions that a member asked for", zap.Stringer("member", from), zap.Error(err))
	}
}

func (m *Manager) gotFound(from channel.Member, id uint64, b []byte) error {
	if len(b) == 0 {
		return fmt.Errorf("%w: cut off", errMalformed)
	}
	if _, err := m.apply(b[1:], &from); err != nil {
		return err
	}
	m.mu.Lock()
	f := m.fetches[id]
	m.mu.Unlock()
	if f != nil {
		select {
		case f.answers <- b[0]&flagReady != 0:
		default:
		}
	}
	return nil
}

// askForRest asks a member for sessions of which it sent only changes. While
// the state transfer is going on they come with it.
func (m *Manager) askForRest(from channel.Member, keys []session.Key) {
	if !m.isReady() {
		return
	}
	keys = keys[:min(len(keys), maxFetch)]
	body := appendHeader(nil, kindFetch, 0)
	for _, k := range keys {
		body = session.AppendBatch(body, &session.Record{Key: k})
	}
	m.m.repairs.Add(int64(len(keys)))
	_ = m.enqueue(func() { m.reply(from, body) }) // if too busy: with the next change
}

var _ core.Manager = (*Manager)(nil)
