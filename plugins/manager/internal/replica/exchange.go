package replica

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// digestBytes is about how much of its digests a node sends at once.
	digestBytes = 512 << 10
	// chunksInFlight bounds the unacknowledged messages of one exchange: enough
	// for both sides to have work, but changes have to wait behind them.
	chunksInFlight = 2
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
)

var (
	errStalled = errors.New("the member has stopped answering")
	errLeft    = errors.New("the member has left")
	errRefused = errors.New("the member is not ready")
)

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
	// The node's id decides the order, so that simulated nodes can be repeated.
	pick := rand.New(rand.NewPCG(m.store.self(), 0))
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
			m.wantAny(pick)
			m.replan(false)
		case <-m.ctx.Done():
		}
		timer.Stop()
	}
}

// wantAny asks for an exchange with one member, whichever.
func (m *Manager) wantAny(pick *rand.Rand) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(m.view.Members); n > 0 {
		if p := m.peers[m.view.Members[pick.IntN(n)].ID]; p != nil && !p.wanted {
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
		if !p.wanted || p.aside || m.stranger(p, now) {
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
	_, err := m.exchange(m.ctx, member, 0, shardCount, false)
	m.mu.Lock()
	p.running = false
	if err == nil {
		p.failed = 0
		if !p.wanted && !p.aside {
			p.catch = false
		}
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

// exchange compares the sessions of some shards with a member: each side gets
// what it lacks. ready says that the member had complete state.
func (m *Manager) exchange(ctx context.Context, member channel.Member, first, last int, joining bool) (ready bool, err error) {
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
	for from := first; from < last; {
		s := span{from: from}
		if joining {
			s.flags = flagJoining
		}
		var body, pairs []byte
		body, pairs, s.to = m.digest(id, s, last, nodeOf(member))
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
		m.noteShared(s, nodeOf(member), pairs)
		from = s.to
	}
	return ready, nil
}

// noteShared notes that a member has the sessions that were compared, those with
// the digests in pairs. One that is shared only since then was not.
func (m *Manager) noteShared(s span, peer uint64, pairs []byte) {
	if !m.placed() {
		return
	}
	g, compared := m.group.Load(), parsePairs(pairs)
	for i := s.from; i < s.to; i++ {
		m.store.each(i, time.Now().UnixMilli(), func(k session.Key, p *replica, _ tomb) {
			if p == nil || !m.shared(g, peer, k, p) {
				return
			}
			if _, was := compared[k.Digest()]; was {
				p.place.fresh(peer)
			}
		})
	}
}

// digest makes the message with the digests of some shards from s.from on; pairs
// is the part of it that has them.
func (m *Manager) digest(id uint64, s span, last int, peer uint64) (body, pairs []byte, to int) {
	head := len(s.append(appendHeader(nil, kindDigest, id)))
	body, s.to = m.appendDigests(make([]byte, head), s.from, last, digestBytes, peer)
	s.append(appendHeader(body[:0], kindDigest, id)) // over the space left for it
	return body, body[head:], s.to
}

// appendDigests appends the digests of what is shared with a member, in whole
// shards, beginning with from, until there are limit bytes, and returns the shard
// after the last.
func (m *Manager) appendDigests(dst []byte, from, last, limit int, peer uint64) ([]byte, int) {
	start, g, now := len(dst), m.group.Load(), time.Now().UnixMilli()
	for from < last {
		m.store.each(from, now, func(k session.Key, p *replica, t tomb) {
			if m.shared(g, peer, k, p) {
				dst = appendPair(dst, k.Digest(), versions(p, t))
			}
		})
		from++
		if len(dst)-start >= limit {
			break
		}
	}
	return dst, from
}

// compare returns the keys of a shard that the other side lacks or has
// otherwise, and removes from theirs what is equal.
func (m *Manager) compare(i int, theirs map[uint64]uint64, peer uint64) (send []session.Key) {
	g := m.group.Load()
	m.store.each(i, time.Now().UnixMilli(), func(k session.Key, p *replica, t tomb) {
		digest := k.Digest()
		v, has := theirs[digest]
		if has && v == versions(p, t) {
			delete(theirs, digest)
			if p != nil && p.place != nil {
				p.place.fresh(peer)
			}
			return
		}
		if has || m.shared(g, peer, k, p) {
			send = append(send, k)
		}
	})
	return send
}

// await waits for the answer about a span. Every message of the member gives it
// more time.
func (m *Manager) await(ctx context.Context, x *exchange, s span) (answer, error) {
	stall := time.NewTimer(m.cfg.StallTimeout)
	defer stall.Stop()
	for {
		m.mu.Lock()
		p := m.peers[x.peer]
		there, aside := p != nil, p != nil && p.aside
		changed := m.changed
		m.mu.Unlock()
		if !there {
			return answer{}, errLeft
		}
		if aside {
			return answer{}, errStalled
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
		w.records(m.compare(i, theirs, nodeOf(from)), kindRecords, id)
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
	err := m.host.Send(ctx, []channel.Member{to}, o, body)
	if err == nil && o.Has(channel.SyncAck) {
		m.heard(to)
	}
	return err
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

// records adds the records of the keys, and sends what makes a chunk. The
// receiver counts as one that has them from now on; if it does not get them, an
// exchange finds that.
func (w *window) records(keys []session.Key, k kind, id uint64) {
	for len(keys) > 0 && !w.failed() {
		if w.buf == nil {
			chunk := w.m.buffers.Get().(*bytes.Buffer)
			chunk.Grow(w.m.cfg.ChunkBytes + 4096)
			w.buf = appendHeader(chunk.AvailableBuffer(), k, id)
			if k == kindDelta && w.m.placed() {
				w.buf = append(w.buf, 0)
			}
			w.head = len(w.buf)
		}
		w.buf, keys = w.m.appendItems(w.buf, keys, w.m.cfg.ChunkBytes, nodeOf(w.to), false)
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
		w.m.recycle(bytes.NewBuffer(body))
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
