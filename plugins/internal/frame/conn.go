package frame

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Config bounds a connection. A zero field means its default.
type Config struct {
	// MaxFrame is the largest frame in bytes that is accepted, 16 MiB and
	// 64 KiB by default.
	MaxFrame int
	// MaxInbound and MaxInboundBytes bound the other side's unanswered calls;
	// it is cut off when it goes beyond. By default 1040 calls and 32 MiB:
	// the default window of [CallsConfig] and some more.
	MaxInbound, MaxInboundBytes int
	// MaxOutbound bounds the bytes that wait to be written, 64 MiB by default.
	MaxOutbound int
	// Heartbeat is the time between two signs of life that this side asks for,
	// and HeartbeatTimeout how long it waits for any frame at all. 0 asks for
	// none.
	Heartbeat, HeartbeatTimeout time.Duration
}

// Bounds that apply when a Config does not say otherwise.
const (
	// 16 MiB for what is carried, and some more for what is said of it.
	DefaultMaxFrame        = 16<<20 + 64<<10
	DefaultMaxInbound      = DefaultWindow + 16
	DefaultMaxInboundBytes = 32 << 20
	DefaultMaxOutbound     = 64 << 20
)

// writeSize bounds one write: 64 KiB. There is no bound in messages and no
// timer: what has been queued while the last write ran goes out with the next.
const writeSize = 64 << 10

// eventRoom is how many bytes may be queued before events wait.
const eventRoom = 4 << 20

// keepBuffer is the largest write buffer that is kept for reuse.
const keepBuffer = 2 << 20

// Handler serves what the other side sends. Both methods are called by the
// reading goroutine, in the order of arrival, and must not wait for anything
// that arrives on the same connection.
type Handler interface {
	// HandleCall serves a call: r is answered exactly once, now or later, from
	// any goroutine.
	HandleCall(r *Request)
	// HandleEvent serves a one-way frame; f is valid for ever. An error ends
	// the connection.
	HandleEvent(f Frame) error
}

// Conn is one connection. It owns a reading, a writing and possibly a
// heartbeat goroutine from NewConn until it is closed.
type Conn struct {
	rw    io.ReadWriteCloser
	calls *Calls
	cfg   Config

	outMu   sync.Mutex
	out     []byte        // guarded by outMu: queued frames
	outDead bool          // guarded by outMu: closed
	drained *sync.Cond    // on outMu: out has been taken, or closed
	wake    chan struct{} // holds one token when out is not empty

	inMu    sync.Mutex
	inbound map[uint64]*Request // guarded by inMu: unanswered
	inBytes int                 // guarded by inMu
	inDead  bool                // guarded by inMu: closed

	// received counts frames; the heartbeat watches it move.
	received atomic.Uint64

	closeOnce sync.Once
	closed    chan struct{}
	cause     error // set before closed is closed
	ctx       context.Context
	cancelCtx context.CancelFunc
	io        sync.WaitGroup // reader, writer, heartbeat
	handlers  sync.WaitGroup // goroutines of Request.Go
}

// NewConn starts a connection on rw. Calls of this side go through calls, which
// may outlive the connection; h serves the other side's.
func NewConn(rw io.ReadWriteCloser, calls *Calls, h Handler, cfg Config) *Conn {
	cfg.MaxFrame = orDefault(cfg.MaxFrame, DefaultMaxFrame)
	cfg.MaxInbound = orDefault(cfg.MaxInbound, DefaultMaxInbound)
	cfg.MaxInboundBytes = orDefault(cfg.MaxInboundBytes, DefaultMaxInboundBytes)
	cfg.MaxOutbound = orDefault(cfg.MaxOutbound, DefaultMaxOutbound)
	c := &Conn{
		rw: rw, calls: calls, cfg: cfg,
		wake:    make(chan struct{}, 1),
		inbound: map[uint64]*Request{},
		closed:  make(chan struct{}),
	}
	c.drained = sync.NewCond(&c.outMu)
	c.ctx, c.cancelCtx = context.WithCancel(context.Background())
	c.io.Go(func() { c.read(h) })
	c.io.Go(c.write)
	if cfg.Heartbeat > 0 {
		c.io.Go(c.heartbeat)
	}
	return c
}

func orDefault(v, d int) int {
	if v <= 0 {
		return d
	}
	return v
}

// Done is closed when the connection has ended, for whatever reason.
func (c *Conn) Done() <-chan struct{} { return c.closed }

// Err says why the connection ended; valid when Done is closed. io.EOF means
// that the other side closed it.
func (c *Conn) Err() error {
	<-c.closed
	return c.cause
}

// Close ends the connection; cause is what Err and unanswered calls report. It
// does not wait; a second Close does nothing.
func (c *Conn) Close(cause error) {
	c.closeOnce.Do(func() {
		c.cause = cause
		close(c.closed)
		// The error of closing says nothing that the cause does not.
		_ = c.rw.Close()
		c.cancelCtx()
		c.cancelInbound()
		c.outMu.Lock()
		c.outDead = true
		c.outMu.Unlock()
		c.drained.Broadcast()
	})
}

// Context ends with the connection.
func (c *Conn) Context() context.Context { return c.ctx }

// Go runs f in a goroutine that WaitHandlers waits for. It must not be called
// at the same time as WaitHandlers.
func (c *Conn) Go(f func()) { c.handlers.Go(f) }

// Wait returns when the connection's own goroutines have ended and no handler
// is called any more; goroutines of Request.Go may still run.
func (c *Conn) Wait() { c.io.Wait() }

// WaitHandlers waits after Wait for the goroutines of Request.Go, as long as
// ctx allows.
func (c *Conn) WaitHandlers(ctx context.Context) error {
	ended := make(chan struct{})
	go func() { // ends when the handlers do
		c.handlers.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("frame: handlers still running: %w", ctx.Err())
	}
}

// Notify sends an event. It waits while the other side does not read and much
// is queued, so it must not be called from a Handler.
func (c *Conn) Notify(kind uint8, options uint32, parts ...[]byte) error {
	c.outMu.Lock()
	for len(c.out) > eventRoom && !c.outDead {
		c.drained.Wait()
	}
	dead := c.outDead
	c.outMu.Unlock()
	if dead {
		return ErrClosed
	}
	return c.push(Header{Kind: kind, Flags: FlagEvent, Options: options}, parts...)
}

// Push queues one event with a seq of its own. Unlike Notify it never waits, so
// it may be called from a Handler; who calls it bounds what is unanswered.
func (c *Conn) Push(h Header, parts ...[]byte) error {
	h.Flags |= FlagEvent
	return c.push(h, parts...)
}

// PushEncoded queues a frame that was made with Append.
func (c *Conn) PushEncoded(frame []byte) error { return c.pushEncoded(frame) }

// MaxFrame returns the largest length of a frame, see Config.
func (c *Conn) MaxFrame() int { return c.cfg.MaxFrame }

// push queues one frame.
func (c *Conn) push(h Header, parts ...[]byte) error {
	n := minLength
	for _, p := range parts {
		n += len(p)
	}
	if n > c.cfg.MaxFrame {
		return tooLarge(n, c.cfg.MaxFrame)
	}
	c.outMu.Lock()
	full := len(c.out)+n > c.cfg.MaxOutbound
	if !full {
		c.out = Append(c.out, h, parts...)
	}
	c.outMu.Unlock()
	return c.pushed(full)
}

// pushEncoded queues a frame that is encoded already.
func (c *Conn) pushEncoded(frame []byte) error {
	c.outMu.Lock()
	full := len(c.out)+len(frame) > c.cfg.MaxOutbound
	if !full {
		c.out = append(c.out, frame...)
	}
	c.outMu.Unlock()
	return c.pushed(full)
}

func (c *Conn) pushed(full bool) error {
	if full {
		// Calls are bounded by their window, so only events and replies that
		// the other side does not read can get here.
		err := fmt.Errorf("%w: more than %d bytes wait to be read", ErrSilent, c.cfg.MaxOutbound)
		c.Close(err)
		return err
	}
	select {
	case c.wake <- struct{}{}:
	default: // the token is there
	}
	return nil
}

func (c *Conn) write() {
	var spare []byte
	for {
		select {
		case <-c.wake:
		case <-c.closed:
			return
		}
		c.outMu.Lock()
		batch := c.out
		c.out = spare[:0]
		c.outMu.Unlock()
		c.drained.Broadcast()
		for rest := batch; len(rest) > 0; {
			n := min(len(rest), writeSize)
			if _, err := c.rw.Write(rest[:n]); err != nil {
				c.Close(fmt.Errorf("frame: write: %w", err))
				return
			}
			rest = rest[n:]
		}
		spare = batch
		if cap(spare) > keepBuffer {
			spare = nil
		}
	}
}

func (c *Conn) read(h Handler) {
	// Calls learn of the end only here, after the last reply was seen.
	defer func() { c.calls.detach(c, c.Err()) }()
	r := NewReader(c.rw, c.cfg.MaxFrame)
	for {
		f, err := r.Next()
		if err == nil {
			c.received.Add(1)
			err = c.dispatch(h, f)
		}
		if err != nil {
			c.Close(err)
			return
		}
		select {
		case <-c.closed: // frames that are in the buffer are not served any more
			return
		default:
		}
	}
}

func (c *Conn) dispatch(h Handler, f Frame) error {
	switch {
	case f.Flags&FlagReply != 0:
		return c.calls.complete(c, f)
	case f.Kind == kindPing:
		return c.push(Header{Kind: kindPong, Flags: FlagEvent})
	case f.Kind == kindPong:
		return nil
	case f.Kind == kindCancel:
		c.cancel(f.Seq)
		return nil
	case f.Flags&FlagEvent != 0:
		return h.HandleEvent(f)
	}
	r, err := c.admit(f)
	if err != nil {
		return err
	}
	h.HandleCall(r)
	return nil
}

// admit enters a call into the table of unanswered ones.
func (c *Conn) admit(f Frame) (*Request, error) {
	r := &Request{Frame: f, conn: c}
	c.inMu.Lock()
	defer c.inMu.Unlock()
	switch {
	case c.inDead:
		return nil, ErrClosed
	case c.inbound[f.Seq] != nil:
		return nil, fmt.Errorf("%w: call %d is already running", ErrProtocol, f.Seq)
	case len(c.inbound) >= c.cfg.MaxInbound:
		return nil, fmt.Errorf("%w: more than %d unanswered calls", ErrProtocol, c.cfg.MaxInbound)
	case c.inBytes+len(f.Payload) > c.cfg.MaxInboundBytes && len(c.inbound) > 0:
		return nil, fmt.Errorf("%w: more than %d bytes of unanswered calls", ErrProtocol, c.cfg.MaxInboundBytes)
	}
	c.inbound[f.Seq] = r
	c.inBytes += len(f.Payload)
	return r, nil
}

func (c *Conn) cancel(seq uint64) {
	c.inMu.Lock()
	r := c.inbound[seq]
	c.inMu.Unlock()
	if r != nil {
		r.end()
	}
}

func (c *Conn) cancelInbound() {
	c.inMu.Lock()
	c.inDead = true
	running := make([]*Request, 0, len(c.inbound))
	for _, r := range c.inbound {
		running = append(running, r)
	}
	clear(c.inbound)
	c.inMu.Unlock()
	for _, r := range running {
		r.end()
	}
}

// heartbeat asks for a sign of life and counts the rounds without one, rather
// than the time: a host that was itself asleep does not blame the other side.
func (c *Conn) heartbeat() {
	tick := time.NewTicker(c.cfg.Heartbeat)
	defer tick.Stop()
	allowed := max(1, int(c.cfg.HeartbeatTimeout/c.cfg.Heartbeat))
	seen, silent := c.received.Load(), 0
	for {
		// An overfull queue closes the connection by itself.
		_ = c.push(Header{Kind: kindPing, Flags: FlagEvent})
		select {
		case <-c.closed:
			return
		case <-tick.C:
		}
		if now := c.received.Load(); now != seen {
			seen, silent = now, 0
		} else if silent++; silent >= allowed {
			c.Close(fmt.Errorf("%w for %v", ErrSilent, c.cfg.HeartbeatTimeout))
			return
		}
	}
}

// Request is a call of the other side.
type Request struct {
	Frame
	conn *Conn

	mu     sync.Mutex
	ended  bool // guarded by mu: cancelled or answered
	ctx    context.Context
	cancel context.CancelFunc
}

// Context returns a context that ends when the caller gives up, the request has
// been answered or the connection ends.
func (r *Request) Context() context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctx == nil {
		r.ctx, r.cancel = context.WithCancel(context.Background())
		if r.ended {
			r.cancel()
		}
	}
	return r.ctx
}

func (r *Request) end() {
	r.mu.Lock()
	r.ended = true
	cancel := r.cancel
	r.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}

// Go runs f in a goroutine of the connection, see Conn.WaitHandlers. Call it in
// HandleCall only.
func (r *Request) Go(f func(r *Request)) {
	r.conn.Go(func() { f(r) })
}

// Reply answers the call. Only the first answer counts. An answer that is too
// large for a frame returns an error and has not been sent.
func (r *Request) Reply(v Verdict, options uint32, parts ...[]byte) error {
	c := r.conn
	n := minLength
	for _, p := range parts {
		n += len(p)
	}
	if n > c.cfg.MaxFrame {
		return tooLarge(n, c.cfg.MaxFrame)
	}
	c.inMu.Lock()
	open := c.inbound[r.Seq] == r
	if open {
		delete(c.inbound, r.Seq)
		c.inBytes -= len(r.Payload)
	}
	c.inMu.Unlock()
	if !open {
		return nil // answered already, or nobody is there to hear it
	}
	err := c.push(Header{Seq: r.Seq, Kind: r.Kind, Verdict: v, Flags: FlagReply, Options: options}, parts...)
	r.end()
	return err
}

// IsDisconnect reports whether a connection's error means that the other side
// ended or was cut off, rather than that it broke the protocol.
func IsDisconnect(err error) bool {
	return err != nil && !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrSilent) && !errors.Is(err, ErrClosed)
}
