package lock

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Config bounds a locker. Zero values are the defaults.
type Config struct {
	// Queue bounds the requests that wait for one session. Default 256.
	Queue int
	// MaxSessions bounds the sessions that this node decides about, those in
	// use and those it remembers. Default 65,536.
	MaxSessions int
}

// DefaultLease is how long a request may have a session.
const DefaultLease = 30 * time.Second

const (
	// term is how long a node may be silent before a voter takes for free what
	// the node holds, and keepEvery how often a node that holds something, or
	// waits for it, tells the voters that it is alive.
	term      = 2 * time.Second
	keepEvery = term / 4
	// fresh is how old the last sign of the voters may be when a request reports
	// success: less than a manager waits for silent members. Else a node that is
	// cut off could have stored its changes nowhere, and the next one get the
	// session without them.
	fresh = keepEvery + 100*time.Millisecond
	// askAgain is the pause before a voter is asked again.
	askAgain = time.Second
	// sendTimeout bounds the sending of one message.
	sendTimeout = 5 * time.Second
	// maxSends bounds the messages that are being sent; more are dropped, and
	// asked for again.
	maxSends = 8192
	// maxStateAge is how long the next holder has to wait for the state that the
	// last one left.
	maxStateAge = 30 * time.Second
	// maxNodes bounds the nodes that are noted as alive.
	maxNodes = 4096
	// maxTries is how often it is tried to give a session back.
	maxTries = 3
)

// Errors of Lock, for the client of the request.
var (
	errFull    = fmt.Errorf("%w, and too many are waiting for it", core.ErrLocked)
	errStopped = errors.New("lock: the node is stopping")
)

// Locker decides, with those of the other nodes, who may use a session. All
// methods may be called concurrently.
type Locker struct {
	cfg     Config
	cluster *core.Cluster // nil for a single node
	log     *zap.Logger
	m       metrics
	undo    []func()
	life    context.Context
	end     context.CancelFunc
	wg      sync.WaitGroup

	mu      sync.Mutex // guards all below
	view    channel.View
	changed chan struct{} // closed when the view changes
	entries map[session.Key]*entry
	asked   map[uint64]*asking
	active  map[uint64]*held // sessions that requests have, by number; several of one request
	number  uint64
	sends   int
	stopped bool
	// alive is when what a node holds is free, unless it is heard of before.
	alive map[channel.UniqueID]time.Time
	// kept is until when a voter, as it has confirmed, takes this node for alive.
	kept map[channel.UniqueID]time.Time
	// told is closed when a voter has confirmed that; nil if nobody waits.
	told chan struct{}
	// keeper runs while this node holds something or waits for it, else nil.
	keeper *time.Timer
	born   time.Time // the times of kindKeep count from here
}

// asking is a request that waits for a voter.
type asking struct {
	voter channel.Member
	got   chan message // one
}

type metrics struct {
	granted, expired, timeouts, full, lost, bad, dropped *channel.Counter
}

// New makes a locker for the nodes of cluster; nil for a node without others.
func New(c Config, cluster *core.Cluster, s channel.Settings) *Locker {
	c.Queue = cmp.Or(c.Queue, 256)
	c.MaxSessions = cmp.Or(c.MaxSessions, 65_536)
	counter := func(name, help string) *channel.Counter {
		return s.Metrics.Counter("session_locks_"+name+"_total", help)
	}
	l := &Locker{
		cfg: c, cluster: cluster, log: s.Logger, changed: make(chan struct{}),
		entries: map[session.Key]*entry{}, asked: map[uint64]*asking{}, active: map[uint64]*held{},
		alive: map[channel.UniqueID]time.Time{}, kept: map[channel.UniqueID]time.Time{}, born: time.Now(),
		m: metrics{
			granted:  counter("granted", "grants by this node as a voter; a lock needs two"),
			expired:  counter("expired", "leases that ended before the session was given back"),
			timeouts: counter("timeouts", "requests that did not get their session in time"),
			full:     counter("refused_full", "requests refused because too many wait for a session, or too many sessions are locked"),
			lost:     counter("lost", "requests that had their session for longer than its lease"),
			bad:      counter("bad_messages", "messages that cannot be read"),
			dropped:  counter("dropped_messages", "messages not sent because too many are on their way"),
		},
	}
	if l.log == nil {
		l.log = zap.NewNop()
	}
	l.life, l.end = context.WithCancel(context.Background())
	l.view.Local.ID = channel.NewUniqueID()
	return l
}

// Start takes part in the decisions of the group, once the channel has been
// started or before.
func (l *Locker) Start(context.Context) error {
	if l.cluster == nil {
		return nil
	}
	unbind, err := l.cluster.Bind(Subject, l.handle)
	if err != nil {
		return err
	}
	unwatch := l.cluster.Channel().Watch(func(v channel.View, _ channel.MemberEvent) { l.setView(v) })
	l.undo = append(l.undo, unwatch, unbind)
	return nil
}

func (l *Locker) setView(v channel.View) {
	if v.Local.ID.IsZero() {
		return
	}
	l.vote(func(out []answer) []answer {
		out = l.changeView(out, v)
		close(l.changed)
		l.changed = make(chan struct{})
		return out
	})
}

// Stop ends all waiting. Sessions that are still held stay so on the other
// nodes until their leases are over.
func (l *Locker) Stop(ctx context.Context) error {
	l.mu.Lock()
	l.stopped = true
	if l.keeper != nil {
		l.keeper.Stop()
	}
	for _, e := range l.entries {
		if e.timer != nil {
			e.timer.Stop()
		}
	}
	l.mu.Unlock()
	for _, undo := range l.undo {
		undo()
	}
	l.undo = nil
	done := make(chan struct{})
	go func() { l.wg.Wait(); close(done) }() // ends with the last message, within sendTimeout
	select {
	case <-done:
	case <-ctx.Done():
	}
	l.end()
	<-done
	return nil
}

// vote runs f under the lock and sends what it says.
func (l *Locker) vote(f func([]answer) []answer) {
	var few [4]answer
	l.mu.Lock()
	out := f(few[:0])
	local := l.view.Local.ID
	l.mu.Unlock()
	for i := range out {
		if out[i].to.ID == local {
			l.take(out[i].to, &out[i].m)
		} else {
			l.send(out[i].to, &out[i].m)
		}
	}
}

// send sends in the background.
func (l *Locker) send(to channel.Member, m *message) {
	l.mu.Lock()
	if l.stopped || l.sends >= maxSends || l.cluster == nil {
		l.mu.Unlock()
		l.m.dropped.Inc()
		return
	}
	l.sends++
	l.wg.Add(1)
	l.mu.Unlock()
	body := encode(m)
	go func() {
		defer l.wg.Done()
		ctx, cancel := context.WithTimeout(l.life, sendTimeout)
		defer cancel()
		for try := 1; ; try++ {
			err := l.cluster.Send(ctx, Subject, []channel.Member{to}, channel.SendAck, body)
			if err == nil {
				break
			}
			if m.Kind == kindRelease && try < maxTries && ctx.Err() == nil {
				continue // nobody asks for it again
			}
			l.log.Debug("message about a session's lock not sent", zap.Stringer("to", to), zap.Error(err))
			break
		}
		l.mu.Lock()
		l.sends--
		l.mu.Unlock()
	}()
}

// handle takes a message of another locker.
func (l *Locker) handle(_ context.Context, msg *channel.Message, body []byte) error {
	m, err := decode(body)
	if err != nil {
		l.m.bad.Inc()
		return err
	}
	from := msg.From
	switch m.Kind {
	case kindAcquire:
		w := waiter{
			grantee: grantee{from.ID, m.Number}, member: from, lease: time.Duration(m.Lease) * time.Millisecond,
			deadline: time.Now().Add(time.Duration(m.Wait) * time.Millisecond),
		}
		l.vote(func(out []answer) []answer {
			l.heard(from)
			return l.acquire(out, m.key(), w)
		})
	case kindKeep:
		l.vote(func(out []answer) []answer {
			l.heard(from)
			return append(out, answer{from, message{Kind: kindKept, Number: m.Number}})
		})
	case kindKept:
		l.mu.Lock()
		l.keptUntil(from, l.born.Add(time.Duration(min(m.Number, uint64(time.Since(l.born))))+term))
		if l.told != nil {
			close(l.told)
			l.told = nil
		}
		l.mu.Unlock()
	case kindRelease:
		l.vote(func(out []answer) []answer {
			return l.release(out, m.key(), grantee{from.ID, m.Number}, m.Status, m.state())
		})
	case kindHolds:
		l.vote(func(out []answer) []answer {
			holder, there := l.view.Get(uniqueID(m.Holder))
			if !there {
				holder = l.view.Local
				holder.ID = uniqueID(m.Holder)
				if holder.ID != l.view.Local.ID {
					holder = channel.Member{ID: holder.ID} // gone, or not here yet
				}
			}
			return l.holds(out, &m, holder)
		})
	case kindAnswer:
		l.take(from, &m)
	}
	return nil
}

// take hands an answer to the request that waits for it. A grant that nobody
// waits for any more is given back; one by a new voter, who was told by another
// one, is noted.
func (l *Locker) take(from channel.Member, m *message) {
	l.mu.Lock()
	a, h := l.asked[m.Number], l.active[m.Number]
	late := false
	switch {
	case a != nil && a.voter.Is(from):
		select {
		case a.got <- *m:
		default: // it has an answer already
		}
	case m.Status != statusGranted:
	case h != nil:
		if !slices.ContainsFunc(h.by, func(g grantBy) bool { return g.voter.Is(from) }) {
			h.by = append(h.by, grantBy{from, m.Number})
			if time.Now().After(l.kept[from.ID]) {
				delete(l.kept, from.ID) // of another time
			}
		}
	default:
		late = m.ID != ""
	}
	l.mu.Unlock()
	if late {
		l.ask(from, &message{Kind: kindRelease, Number: m.Number, Context: m.Context, ID: m.ID})
	}
}

// ask sends a message to a voter, which may be this node.
func (l *Locker) ask(voter channel.Member, m *message) {
	l.mu.Lock()
	local := l.view.Local
	l.mu.Unlock()
	if !voter.Is(local) {
		l.send(voter, m)
		return
	}
	l.vote(func(out []answer) []answer {
		if m.Kind == kindRelease {
			return l.release(out, m.key(), grantee{local.ID, m.Number}, m.Status, m.state())
		}
		return l.acquire(out, m.key(), waiter{
			grantee: grantee{local.ID, m.Number}, member: local, lease: time.Duration(m.Lease) * time.Millisecond,
			deadline: time.Now().Add(time.Duration(m.Wait) * time.Millisecond),
		})
	})
}

// heard notes that a node is alive. l.mu is held.
func (l *Locker) heard(from channel.Member) {
	if _, known := l.alive[from.ID]; !known && len(l.alive) >= maxNodes {
		return // what it gets is free at once
	}
	l.alive[from.ID] = time.Now().Add(term)
}

// keptUntil notes what a voter has confirmed. If that came too late, the voter
// may have taken for free what this node had. l.mu is held.
func (l *Locker) keptUntil(voter channel.Member, t time.Time) {
	old, known := l.kept[voter.ID]
	if known && time.Now().After(old) {
		for _, h := range l.active {
			h.gone = h.gone || slices.ContainsFunc(h.by, func(g grantBy) bool { return g.voter.Is(voter) })
		}
	}
	if t.After(old) && (known || len(l.kept) < maxNodes) {
		l.kept[voter.ID] = t
	}
}

// keep tells the voters of what this node has, or waits for, that it is alive.
func (l *Locker) keep() {
	voters := map[channel.UniqueID]channel.Member{}
	l.mu.Lock()
	for _, a := range l.asked {
		voters[a.voter.ID] = a.voter
	}
	for _, h := range l.active {
		for _, g := range h.by {
			voters[g.voter.ID] = g.voter
		}
	}
	delete(voters, l.view.Local.ID)
	if len(voters) == 0 || l.stopped {
		l.keeper = nil
	} else if l.keeper == nil {
		l.keeper = time.AfterFunc(keepEvery, l.keep)
	} else {
		l.keeper.Reset(keepEvery)
	}
	l.mu.Unlock()
	now := uint64(time.Since(l.born))
	for _, v := range voters {
		l.send(v, &message{Kind: kindKeep, Number: now})
	}
}

// With returns the locker for contexts with that lease; 0 is DefaultLease.
func (l *Locker) With(lease time.Duration) core.SessionLocker {
	return leaser{l, min(cmp.Or(lease, DefaultLease), maxLease*time.Millisecond)}
}

type leaser struct {
	l     *Locker
	lease time.Duration
}

// held is a session in the hands of a request.
type held struct {
	l      *Locker
	key    session.Key
	by     []grantBy // guarded by l.mu
	until  time.Time
	state  core.SessionState
	fresh  bool
	broken uint64
	gone   bool // a voter may have given it to another; guarded by l.mu
	done   sync.Once
}

// grantBy is the grant of one voter. Each question has a number of its own, so
// that one which is taken back cannot meet a later one.
type grantBy struct {
	voter  channel.Member
	number uint64
}

// Lock implements core.SessionLocker. It waits as long as ctx allows, at most an
// hour.
func (a leaser) Lock(ctx context.Context, key session.Key) (core.SessionLock, error) {
	l := a.l
	h := &held{l: l, key: key, until: time.Now().Add(time.Hour), fresh: true}
	for {
		l.mu.Lock()
		voter, ok := h.next(voters(l.view, key))
		stopped := l.stopped
		var early []grantBy
		if ok {
			early = h.takeEarly(voter)
		}
		l.mu.Unlock()
		h.giveBack(early, statusUnused, core.SessionState{})
		if stopped {
			h.free(statusUnused, core.SessionState{})
			return nil, errStopped
		}
		if !ok {
			return h, nil
		}
		if err := h.acquire(ctx, voter, a.lease); err != nil {
			h.free(statusUnused, core.SessionState{})
			if ctx.Err() != nil {
				l.m.timeouts.Inc()
			}
			return nil, err
		}
	}
}

// next is the first voter that has not granted yet. l.mu is held.
func (h *held) next(two [2]channel.Member) (channel.Member, bool) {
	for _, v := range two {
		if !slices.ContainsFunc(h.by, func(g grantBy) bool { return g.voter.Is(v) }) {
			return v, true
		}
	}
	return channel.Member{}, false
}

// takeEarly takes the grants out of h that come after the voter's in the order of
// asking: the view has changed, and who waits for this voter with those of later
// ones in its hands could wait for somebody who waits for it. l.mu is held.
func (h *held) takeEarly(voter channel.Member) (early []grantBy) {
	digest := h.key.Digest()
	h.by = slices.DeleteFunc(h.by, func(g grantBy) bool {
		if score(g.voter.ID, digest) > score(voter.ID, digest) {
			return false
		}
		early = append(early, g)
		return true
	})
	for _, g := range early { // a new voter has the number of the old one's
		if !slices.ContainsFunc(h.by, func(o grantBy) bool { return o.number == g.number }) {
			delete(h.l.active, g.number)
		}
	}
	return early
}

// acquire waits for one voter. It returns without its grant if the view changes
// so that it is none any more.
func (h *held) acquire(ctx context.Context, voter channel.Member, lease time.Duration) error {
	l := h.l
	a := &asking{voter: voter, got: make(chan message, 1)}
	l.mu.Lock()
	l.number++
	number := l.number
	l.asked[number] = a
	if l.keeper == nil && !l.stopped && !voter.Is(l.view.Local) {
		l.keeper = time.AfterFunc(keepEvery, l.keep)
	}
	changed := l.changed
	l.mu.Unlock()
	wait := time.Duration(maxLease) * time.Millisecond
	if d, ok := ctx.Deadline(); ok {
		wait = min(wait, max(time.Until(d), time.Millisecond))
	}
	m := message{Kind: kindAcquire, Number: number, Context: h.key.Context, ID: h.key.ID, Lease: lease.Milliseconds(), Wait: wait.Milliseconds() + 1}
	start := time.Now()
	again := time.NewTicker(askAgain)
	defer again.Stop()
	l.ask(voter, &m)
	for {
		select {
		case got := <-a.got:
			if got.Status != statusGranted {
				h.forget(voter, number)
				return errFull
			}
			// The voter counts from when it granted, which is later.
			h.grant(voter, start, start.Add(time.Duration(got.Wait)*time.Millisecond+lease), &got, number)
			return nil
		case <-changed:
			l.mu.Lock()
			changed = l.changed
			two := voters(l.view, h.key)
			l.mu.Unlock()
			if !voter.Is(two[0]) && !voter.Is(two[1]) {
				h.forget(voter, number)
				return nil
			}
		case <-again.C:
			l.ask(voter, &m)
		case <-ctx.Done():
			h.forget(voter, number)
			return fmt.Errorf("%w and was not free in time (session.lock_timeout): %w", core.ErrLocked, context.Cause(ctx))
		case <-l.life.Done():
			h.forget(voter, number)
			return errStopped
		}
	}
}

func (h *held) grant(voter channel.Member, asked, until time.Time, m *message, number uint64) {
	if until.Before(h.until) {
		h.until = until
	}
	l := h.l
	l.mu.Lock()
	l.keptUntil(voter, asked.Add(term))
	h.by = append(h.by, grantBy{voter, number})
	l.active[number] = h
	delete(l.asked, number)
	mine := l.view.Local.ID
	l.mu.Unlock()
	// Both voters have to know that it was this node.
	h.fresh = h.fresh && uniqueID(m.Last) == mine && m.Broken == 0
	if s := m.state(); s.Counter > h.state.Counter {
		h.state = s
	}
	h.broken = max(h.broken, m.Broken)
}

// forget takes back what was asked of a voter.
func (h *held) forget(voter channel.Member, number uint64) {
	h.l.mu.Lock()
	delete(h.l.asked, number)
	h.l.mu.Unlock()
	h.l.ask(voter, &message{Kind: kindRelease, Number: number, Context: h.key.Context, ID: h.key.ID})
}

// Held implements core.SessionLock.
func (h *held) Held(ctx context.Context) bool {
	l := h.l
	for {
		now := time.Now()
		l.mu.Lock()
		kept, recent := h.kept(now)
		if kept && !recent && l.told == nil {
			l.told = make(chan struct{})
		}
		told := l.told
		l.mu.Unlock()
		if !kept || !now.Before(h.until) {
			break
		}
		if recent {
			return true
		}
		l.keep()
		again := time.NewTimer(keepEvery / 2)
		select {
		case <-told:
		case <-again.C:
		case <-ctx.Done():
		}
		again.Stop()
		if ctx.Err() != nil {
			break
		}
	}
	l.m.lost.Inc()
	return false
}

// kept reports whether the voters take this node for alive: all that are in the
// view, and one at least; if one is silent, another node at least. Those that are
// not in the view do not decide any more. recent says that all have confirmed it
// lately. l.mu is held.
func (h *held) kept(now time.Time) (kept, recent bool) {
	l := h.l
	if h.gone {
		return false, false
	}
	confirmed, other, silent := false, false, false
	recent = true
	for _, g := range h.by {
		until, known := l.kept[g.voter.ID]
		_, there := l.view.Get(g.voter.ID)
		switch {
		case g.voter.Is(l.view.Local):
			confirmed = true
		case !there || !known: // or it has just become a voter
		case now.Before(until):
			confirmed, other = true, true
			recent = recent && now.Before(until.Add(fresh-term))
		default:
			silent = true
		}
	}
	if silent {
		// Either it leaves the view, and the other voter has kept the session all
		// the time; or it is heard again, and the session is gone.
		return other, false
	}
	return confirmed, recent
}

// Last implements core.SessionLock.
func (h *held) Last() (core.SessionState, bool) { return h.state, h.fresh }

// Broken implements core.SessionLock.
func (h *held) Broken() uint64 { return h.broken }

// Unlock implements core.SessionLock.
func (h *held) Unlock(state core.SessionState) {
	if state == (core.SessionState{}) {
		h.free(statusUnused, state)
	} else {
		h.free(statusGranted, state)
	}
}

// Break implements core.SessionLock.
func (h *held) Break() { h.free(statusBroken, core.SessionState{}) }

// free tells the voters, the last one first: whoever comes next asks the first
// one first.
func (h *held) free(how status, state core.SessionState) {
	h.done.Do(func() {
		l := h.l
		l.mu.Lock()
		by := h.by
		for _, g := range by {
			delete(l.active, g.number)
		}
		l.mu.Unlock()
		h.giveBack(by, how, state)
	})
}

func (h *held) giveBack(by []grantBy, how status, state core.SessionState) {
	for _, g := range slices.Backward(by) {
		h.l.ask(g.voter, &message{
			Kind: kindRelease, Number: g.number, Context: h.key.Context, ID: h.key.ID, Status: how, Counter: state.Counter, Versions: state.Versions,
		})
	}
}
