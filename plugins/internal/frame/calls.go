package frame

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"github.com/longhouse-go/longhouse/channel"
)

// Defaults of CallsConfig.
const (
	DefaultWindow      = 1024
	DefaultWindowBytes = 8 << 20
	DefaultMaxReplays  = 5
)

// CallsConfig bounds the calls of one side. A zero field means its default.
type CallsConfig struct {
	// Window and WindowBytes bound the unanswered calls: 1024 and 8 MiB.
	// Further ones wait. A call larger than WindowBytes goes alone. Calls that
	// are waited for and those of Go have a window each: if two nodes wait for
	// each other, neither kind may keep the other from going on.
	Window, WindowBytes int
	// MaxFrame is the largest frame in bytes, 16 MiB and 64 KiB by default.
	MaxFrame int
	// MaxReplays is how many connections may die over one call, 5 by default,
	// before it fails: it may be the reason.
	MaxReplays int
	// Total counts the calls, Replays those that were sent again, and Full
	// those that had to wait for the window; nil counts nothing.
	Total, Replays, Full *channel.Counter
}

// Calls are the calls of one side. They outlive connections: a call that was
// unanswered when its connection ended is sent again, in order, on the next
// one, as long as its context allows. So only idempotent calls may be made,
// except with [Calls.CallOn], which is bound to one connection.
type Calls struct {
	cfg      CallsConfig
	waited   window // of Call
	unwaited window // of Go

	inFlight atomic.Int64

	mu      sync.Mutex
	seq     uint64           // guarded by mu
	pending map[uint64]*call // guarded by mu
	conn    *Conn            // guarded by mu: open for calls, or nil
	err     error            // guarded by mu: why no call is possible, or nil
	free    []*call          // guarded by mu: for reuse
}

// window bounds calls in number and bytes.
type window struct{ msgs, bytes *semaphore.Weighted }

func newWindow(cfg CallsConfig) window {
	return window{semaphore.NewWeighted(int64(cfg.Window)), semaphore.NewWeighted(int64(cfg.WindowBytes))}
}

type result struct {
	frame Frame
	err   error
}

// call is one call between begin and its answer. Its fields are guarded by
// Calls.mu, except ch.
type call struct {
	seq   uint64
	frame []byte // encoded, for replay
	cost  int64  // bytes in the window, 0 if outside of it
	ctx   context.Context
	// bound is the only connection the call may be sent on, or nil.
	bound *Conn
	// on is the connection it was sent on last, sent on how many.
	on   *Conn
	sent int
	// abandoned: nobody waits for the answer any more. The call keeps its
	// place in the window until the other side has answered.
	abandoned bool
	// done takes the answer of an asynchronous call, ch that of a waiting one.
	done func(Frame, error)
	ch   chan result
	// unwatch ends the watch over ctx while there is no connection.
	unwatch func() bool
}

const (
	// keepFrame is the largest encoded call whose memory is kept for the next.
	keepFrame = 4 << 10
	// keepCalls is how many calls are kept for reuse. They are kept here and
	// not in a sync.Pool, whose channels would be shared with other bubbles of
	// virtual time.
	keepCalls = DefaultWindow
)

// NewCalls returns calls without a connection: they wait for Attach.
func NewCalls(cfg CallsConfig) *Calls {
	cfg.Window = orDefault(cfg.Window, DefaultWindow)
	cfg.WindowBytes = orDefault(cfg.WindowBytes, DefaultWindowBytes)
	cfg.MaxFrame = orDefault(cfg.MaxFrame, DefaultMaxFrame)
	cfg.MaxReplays = orDefault(cfg.MaxReplays, DefaultMaxReplays)
	for _, c := range []**channel.Counter{&cfg.Total, &cfg.Replays, &cfg.Full} {
		if *c == nil {
			*c = new(channel.Counter)
		}
	}
	return &Calls{
		cfg: cfg, waited: newWindow(cfg), unwaited: newWindow(cfg),
		pending: map[uint64]*call{},
	}
}

// InFlight returns the number of calls inside the window.
func (t *Calls) InFlight() int64 { return t.inFlight.Load() }

// Call makes a call and waits for the answer: a frame whose verdict may be
// Error. It returns an error if there is no answer: that of ctx, together with
// channel.ErrPluginDown if there was no connection, or what Fail said. The
// parts are not used after it returns.
func (t *Calls) Call(ctx context.Context, kind uint8, options uint32, parts ...[]byte) (Frame, error) {
	c, err := t.begin(ctx, nil, nil, kind, options, parts...)
	if err != nil {
		return Frame{}, err
	}
	return t.wait(ctx, c)
}

// CallOn makes a call that fails when conn ends, even if conn is not attached.
// It does not count against the window: it is for starting and stopping.
func (t *Calls) CallOn(ctx context.Context, conn *Conn, kind uint8, options uint32, parts ...[]byte) (Frame, error) {
	c, err := t.begin(ctx, conn, nil, kind, options, parts...)
	if err != nil {
		return Frame{}, err
	}
	return t.wait(ctx, c)
}

// Go makes a call and returns when it is queued, having waited for room in the
// window if need be. If it returns nil, done is called exactly once, from
// another goroutine that must not be held up; else never.
func (t *Calls) Go(ctx context.Context, done func(Frame, error), kind uint8, options uint32, parts ...[]byte) error {
	_, err := t.begin(ctx, nil, done, kind, options, parts...)
	return err
}

func (t *Calls) begin(ctx context.Context, bound *Conn, done func(Frame, error), kind uint8, options uint32, parts ...[]byte) (*call, error) {
	size := minLength
	for _, p := range parts {
		size += len(p)
	}
	if size > t.cfg.MaxFrame {
		return nil, tooLarge(size, t.cfg.MaxFrame)
	}
	var cost int64
	if bound == nil {
		cost = int64(min(size, t.cfg.WindowBytes))
		if err := t.acquire(ctx, t.windowOf(done), cost); err != nil {
			return nil, err
		}
	}
	t.cfg.Total.Inc()
	t.mu.Lock()
	c := t.takeLocked()
	c.cost, c.ctx, c.bound, c.done = cost, ctx, bound, done
	if t.err != nil && bound == nil {
		err := t.err
		t.mu.Unlock()
		t.release(c)
		t.recycle(c)
		return nil, err
	}
	t.seq++
	c.seq = t.seq
	c.frame = Append(c.frame[:0], Header{Seq: c.seq, Kind: kind, Options: options}, parts...)
	t.pending[c.seq] = c
	conn := bound
	if conn == nil {
		conn = t.conn
	}
	switch {
	case conn != nil && !t.sendLocked(c, conn):
		// bound to a connection that has ended
		delete(t.pending, c.seq)
		t.mu.Unlock()
		t.recycle(c)
		return nil, fmt.Errorf("%w: %w", channel.ErrPluginDown, conn.Err())
	case conn == nil:
		t.watchLocked(c)
	}
	t.mu.Unlock()
	return c, nil
}

// sendLocked queues a call on a connection. It reports false if the call is
// bound to it and it has ended: nobody would notice, because the end may have
// been dealt with already.
func (t *Calls) sendLocked(c *call, conn *Conn) bool {
	c.on = conn
	c.sent++
	if err := conn.pushEncoded(c.frame); err != nil && c.bound != nil {
		return false
	}
	if c.bound != nil {
		select {
		case <-conn.closed:
			return false
		default:
		}
	}
	return true
}

// watchLocked makes an asynchronous call that has no connection end with its
// context. With a connection the answer comes, or the connection ends.
func (t *Calls) watchLocked(c *call) {
	if c.done == nil || c.unwatch != nil {
		return
	}
	seq := c.seq
	c.unwatch = context.AfterFunc(c.ctx, func() { t.expire(seq) })
}

func (t *Calls) expire(seq uint64) {
	t.mu.Lock()
	c := t.pending[seq]
	if c == nil || c.abandoned {
		t.mu.Unlock()
		return
	}
	err := c.ctx.Err()
	if c.on == nil || c.on != t.conn {
		err = fmt.Errorf("%w: %w", channel.ErrPluginDown, err)
	}
	done := c.done
	remove := t.abandonLocked(c)
	t.mu.Unlock()
	done(Frame{}, err)
	if remove {
		t.release(c)
	}
}

// abandonLocked gives a call up. It reports true if nothing keeps the call's
// place in the window any more.
func (t *Calls) abandonLocked(c *call) bool {
	if c.on == nil || (c.bound == nil && c.on != t.conn) {
		delete(t.pending, c.seq)
		return true
	}
	c.abandoned = true
	// If the connection cannot take it, it has ended, and the call with it.
	_ = c.on.push(Header{Seq: c.seq, Kind: kindCancel, Flags: FlagEvent})
	return false
}

func (t *Calls) wait(ctx context.Context, c *call) (Frame, error) {
	select {
	case r := <-c.ch:
		t.recycle(c)
		return r.frame, r.err
	case <-ctx.Done():
	}
	t.mu.Lock()
	if t.pending[c.seq] != c { // the answer came at the same time
		t.mu.Unlock()
		r := <-c.ch
		t.recycle(c)
		return r.frame, r.err
	}
	err := ctx.Err()
	if c.bound == nil && t.conn == nil {
		err = fmt.Errorf("%w: %w", channel.ErrPluginDown, err)
	}
	remove := t.abandonLocked(c)
	t.mu.Unlock()
	if remove {
		t.release(c)
	}
	return Frame{}, err
}

func (t *Calls) windowOf(done func(Frame, error)) *window {
	if done != nil {
		return &t.unwaited
	}
	return &t.waited
}

func (t *Calls) acquire(ctx context.Context, w *window, cost int64) error {
	if !w.msgs.TryAcquire(1) {
		t.cfg.Full.Inc()
		if err := w.msgs.Acquire(ctx, 1); err != nil {
			return fmt.Errorf("%w: window of %d calls: %w", channel.ErrQueueFull, t.cfg.Window, err)
		}
	}
	if !w.bytes.TryAcquire(cost) {
		t.cfg.Full.Inc()
		if err := w.bytes.Acquire(ctx, cost); err != nil {
			w.msgs.Release(1)
			return fmt.Errorf("%w: window of %d bytes: %w", channel.ErrQueueFull, t.cfg.WindowBytes, err)
		}
	}
	t.inFlight.Add(1)
	return nil
}

// release gives back the place of a call in the window.
func (t *Calls) release(c *call) {
	if c.cost == 0 {
		return
	}
	w := t.windowOf(c.done)
	w.bytes.Release(c.cost)
	w.msgs.Release(1)
	t.inFlight.Add(-1)
}

func (t *Calls) takeLocked() *call {
	n := len(t.free)
	if n == 0 {
		return &call{ch: make(chan result, 1)}
	}
	c := t.free[n-1]
	t.free = t.free[:n-1]
	return c
}

// recycle keeps a call's memory for the next one. Nobody may know it any more.
func (t *Calls) recycle(c *call) {
	b := c.frame
	if cap(b) > keepFrame {
		b = nil
	}
	*c = call{frame: b[:0], ch: c.ch}
	t.mu.Lock()
	if len(t.free) < keepCalls {
		t.free = append(t.free, c)
	}
	t.mu.Unlock()
}

// finish hands over the answer of a call that has been taken out of pending.
func (t *Calls) finish(c *call, r result) {
	if c.unwatch != nil {
		c.unwatch()
	}
	t.release(c)
	switch {
	case c.abandoned:
	case c.done != nil:
		c.done(r.frame, r.err)
		t.recycle(c)
	default:
		c.ch <- r // has room for one; the waiter recycles
	}
}

// complete takes a reply that arrived on conn.
func (t *Calls) complete(conn *Conn, f Frame) error {
	t.mu.Lock()
	c := t.pending[f.Seq]
	if c == nil || c.on != conn {
		t.mu.Unlock()
		return fmt.Errorf("%w: reply to call %d, which was not made", ErrProtocol, f.Seq)
	}
	delete(t.pending, f.Seq)
	t.mu.Unlock()
	t.finish(c, result{frame: f})
	return nil
}

// Attach opens conn for calls: those that wait are sent, in order, and new ones
// go there until it ends. It also ends what Fail began. It does not wait.
func (t *Calls) Attach(conn *Conn) {
	t.mu.Lock()
	t.conn, t.err = conn, nil
	waiting := t.sortedLocked(func(c *call) bool { return c.bound == nil && !c.abandoned })
	var poison []*call
	replays := 0
	for _, c := range waiting {
		if c.sent > t.cfg.MaxReplays {
			delete(t.pending, c.seq)
			poison = append(poison, c)
			continue
		}
		if c.sent > 0 {
			replays++
		}
		t.sendLocked(c, conn)
	}
	var lost []*call
	if ended(conn) {
		// Its end may have been dealt with before: nobody would detach it.
		lost = t.detachLocked(conn)
	}
	t.mu.Unlock()
	t.failAll(lost, channel.ErrPluginDown)
	t.cfg.Replays.Add(int64(replays))
	for _, c := range poison {
		t.finish(c, result{err: fmt.Errorf("%w: %d processes ended with this call unanswered; it is not tried again", channel.ErrPluginDown, c.sent)})
	}
}

func ended(c *Conn) bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// detach forgets a connection that has ended: calls bound to it fail, all
// others wait for the next one.
func (t *Calls) detach(conn *Conn, cause error) {
	if errors.Is(cause, ErrClosed) || cause == nil {
		cause = channel.ErrClosed
	}
	t.mu.Lock()
	lost := t.detachLocked(conn)
	err := t.err
	t.mu.Unlock()
	if err == nil {
		err = fmt.Errorf("%w: %w", channel.ErrPluginDown, cause)
	}
	t.failAll(lost, err)
}

func (t *Calls) failAll(list []*call, err error) {
	for _, c := range list {
		t.finish(c, result{err: err})
	}
}

func (t *Calls) detachLocked(conn *Conn) (lost []*call) {
	if t.conn == conn {
		t.conn = nil
	}
	for seq, c := range t.pending {
		if c.on != conn && c.bound != conn {
			continue
		}
		if c.bound == nil && !c.abandoned && t.err == nil {
			t.watchLocked(c)
			continue
		}
		delete(t.pending, seq)
		lost = append(lost, c)
	}
	return lost
}

// Fail ends all calls that wait for a connection and lets new ones fail with
// err, until the next Attach. Calls that are on a living connection, and those
// bound to one, end with it at the latest.
func (t *Calls) Fail(err error) {
	t.mu.Lock()
	t.err = err
	waiting := t.sortedLocked(func(c *call) bool {
		return c.bound == nil && (t.conn == nil || c.on != t.conn)
	})
	for _, c := range waiting {
		delete(t.pending, c.seq)
	}
	t.mu.Unlock()
	t.failAll(waiting, err)
}

func (t *Calls) sortedLocked(keep func(*call) bool) []*call {
	var list []*call
	for _, c := range t.pending {
		if keep(c) {
			list = append(list, c)
		}
	}
	slices.SortFunc(list, func(a, b *call) int { return cmp.Compare(a.seq, b.seq) })
	return list
}

func tooLarge(n, limit int) error {
	return fmt.Errorf("%w: a frame of %d bytes is over the bound of %d", channel.ErrTooLarge, n, limit)
}
