package tcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// batchSize is how many messages of one read are taken out before the first is
// delivered, so that their acknowledgements go out in one write.
const batchSize = 64

// inbound is one accepted connection. The goroutine of run reads, delivers and
// usually writes the acknowledgements; the ends of deferred messages are
// acknowledged by a second goroutine, which exists from the first of them on.
type inbound struct {
	r    *Receiver
	nc   net.Conn
	dec  *wire.Decoder
	acks ackQueue

	stopping atomic.Bool

	// Credit, in bytes of frames and numbers of messages since the connection
	// began. window is 0 if the sender does not understand credit.
	window               atomic.Int64
	doneBytes, doneCount atomic.Int64
	granted              atomic.Int64
	told                 int64 // doneCount as told last; of tellProgress alone

	// Of the reading goroutine alone.
	batch   []arrival        // batchSize of them, from the first bytes on
	spare   []pending        // not used yet
	held    int              // of dec, as counted in r.held
	limit   time.Duration    // the read deadline's
	renewed time.Time        // when it was set
	begun   bool             // a frame's head has come
	known   bool             // sender is set
	sender  channel.UniqueID // of all messages of this connection
}

// arrival is one message of a batch.
type arrival struct {
	channel.Message
	size int      // of its frame
	end  *pending // or nil: nobody waits for it
}

func newInbound(r *Receiver, nc net.Conn) *inbound {
	c := &inbound{r: r, nc: nc, dec: wire.NewDecoder(r.cfg.MaxFrame)}
	c.acks.init(nc, r.cfg.StallTimeout, r.cfg.MaxOutstanding)
	return c
}

// finish makes run return after the messages that have been read.
func (c *inbound) finish() {
	c.stopping.Store(true)
	_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // wakes the reader; a closed connection needs none
	notify(c.acks.freed)
}

func (c *inbound) run() {
	reason, err := c.read()
	c.acks.flush() // a failure has no one left to be told
	c.nc.Close()
	c.acks.close()
	c.r.held.Add(-int64(c.held))
	if reason != "" {
		c.r.refuse(c.nc, reason, err)
	}
}

// read serves the connection to its end and returns why we close it, or "" if
// the peer did or the receiver stops.
func (c *inbound) read() (reason string, err error) {
	for {
		if err := c.renewDeadline(); err != nil {
			return "", err
		}
		if c.stopping.Load() {
			return "", nil
		}
		space := c.dec.Space()
		if !c.account() {
			return refusedMemory, nil
		}
		n, err := c.nc.Read(space)
		c.dec.Wrote(n)
		c.r.met.bytes.Add(int64(n))
		if n > 0 {
			if reason, err := c.process(); reason != "" || err != nil {
				return reason, err
			}
		}
		if err != nil {
			return c.ended(err)
		}
	}
}

// ended says what the error of a read means.
func (c *inbound) ended(err error) (string, error) {
	if aerr := c.acks.failure(); aerr != nil { // then the goroutine of the queue has closed the connection
		return ackFailure(aerr)
	}
	switch {
	case c.stopping.Load() || channel.IsClosed(err):
		return "", nil
	case channel.IsTimeout(err) && !c.begun:
		return refusedSilent, err
	case channel.IsTimeout(err) && c.dec.Buffered() > 0:
		return refusedStalled, err
	case channel.IsTimeout(err):
		return refusedIdle, err
	case c.dec.Buffered() > 0:
		return refusedMidFrame, err
	case !errors.Is(err, io.EOF):
		c.r.log.Debug("connection lost", zap.Stringer("remote", c.nc.RemoteAddr()), zap.Error(err))
	}
	return "", nil
}

// renewDeadline sets the read deadline. That costs a system timer, so it is
// only done when a quarter of the time has gone or another limit applies.
func (c *inbound) renewDeadline() error {
	limit := c.r.cfg.StallTimeout
	if c.begun && c.dec.Buffered() == 0 {
		limit = c.r.cfg.IdleTimeout
	}
	now := time.Now()
	if !c.renewed.IsZero() && (!c.begun || limit == c.limit && now.Sub(c.renewed) < limit/4) {
		return nil // bytes that are no frame's head do not buy time
	}
	c.limit, c.renewed = limit, now
	return c.nc.SetReadDeadline(now.Add(limit))
}

// account adds the growth of the read buffer to the receiver's sum, and reports
// whether that is within its bound.
func (c *inbound) account() bool {
	grown := c.dec.Held() - c.held
	if grown == 0 {
		return true
	}
	c.held += grown
	return c.r.held.Add(int64(grown)) <= int64(c.r.cfg.MaxBuffered) || grown < 0
}

// process delivers all whole messages that have been read.
func (c *inbound) process() (string, error) {
	if c.batch == nil {
		c.batch = make([]arrival, batchSize)
	}
	for {
		room, err := c.acks.room(c.r.ctx, &c.stopping, c.r.met.stalls)
		switch {
		case err == nil:
		case c.stopping.Load():
			return "", nil
		case errors.Is(err, errOutstanding):
			return refusedOutstanding, err
		default:
			return ackFailure(err)
		}
		n, reason, err := c.take(min(room, batchSize))
		if ferr := c.acks.flush(); ferr != nil {
			return ackFailure(ferr)
		}
		for i := range n {
			c.deliver(i, i < n-1)
		}
		clear(c.batch[:n]) // keep no buffer alive
		c.acks.calm()
		c.grant()
		if ferr := c.acks.flush(); ferr != nil {
			return ackFailure(ferr)
		}
		if reason != "" || err != nil {
			return reason, err
		}
		if n == 0 {
			return "", nil
		}
	}
}

func ackFailure(err error) (string, error) {
	if channel.IsTimeout(err) {
		return refusedAcks, err
	}
	return "", err
}

// take decodes up to limit messages into c.batch and queues their
// acknowledgements.
func (c *inbound) take(limit int) (n int, reason string, err error) {
	for n < limit {
		a := &c.batch[n]
		before := c.dec.Buffered()
		kind, err := c.dec.Next(&a.Message)
		a.size = before - c.dec.Buffered()
		switch {
		case err != nil:
			return n, wire.Reason(err), err
		case kind == wire.Incomplete:
			c.begun = c.begun || c.dec.Buffered() >= wire.FrameHead
			return n, "", nil
		case kind != wire.MessageFrame:
			return n, refusedUnwanted, nil
		case !c.known:
			c.known, c.sender = true, a.From.ID
			c.openWindow(a.From)
		case c.sender != a.From.ID:
			return n, refusedSender, nil
		}
		c.begun = true
		a.end = nil
		switch o := a.Options; {
		case o.Has(channel.UseAck | channel.SyncAck):
			a.end = c.newPending(c.acks.push(ackPending), a.size)
			a.Later = a.end
		case o.Has(channel.UseAck):
			c.acks.push(ackPositive)
		}
		n++
	}
	return n, "", nil
}

// newPending returns a pending of its own for every message: a layer may keep
// it longer than it should. They are made in groups.
func (c *inbound) newPending(seq uint64, size int) *pending {
	if len(c.spare) == 0 {
		c.spare = make([]pending, batchSize)
	}
	p := &c.spare[0]
	c.spare = c.spare[1:]
	p.c, p.seq, p.size = c, seq, size
	return p
}

// deliver hands message i of the batch up. more says that another one follows
// at once: acknowledgements that are due must not wait long for its handler.
func (c *inbound) deliver(i int, more bool) {
	m, p := &c.batch[i].Message, c.batch[i].end
	c.r.met.messages.Inc()
	from := m.From
	panicked, err := c.call(m)
	if err != nil {
		c.r.log.Debug("message not processed", zap.Stringer("from", from), zap.Error(err))
	}
	if p == nil {
		c.processed(c.batch[i].size)
		return
	}
	ended := p.state.CompareAndSwap(pendingRunning, pendingEnded)
	if !ended && panicked { // nobody may be left who would end it
		ended = p.state.CompareAndSwap(pendingDeferred, pendingEnded)
	}
	if ended {
		c.end(p, err)
		if more {
			c.acks.wakeSoon()
		}
	}
}

// call runs the handler and turns a panic into an error.
func (c *inbound) call(m *channel.Message) (panicked bool, err error) {
	defer func() {
		if v := recover(); v != nil {
			c.r.met.panics.Inc()
			if unlogged, ok := c.r.panicGate.open(); ok {
				c.r.log.Error("a message handler panicked", zap.Any("panic", v), zap.Stack("stack"), zap.Int64("unlogged", unlogged))
			}
			panicked, err = true, fmt.Errorf("tcp: the handler panicked: %v", v)
		}
	}()
	return false, c.r.deliver(c.r.ctx, m)
}

// openWindow begins to grant credit, if the sender understands it and has been
// told that it will get some.
func (c *inbound) openWindow(from channel.Member) {
	w := int64(c.r.cfg.WindowBytes)
	if a, ok := from.Announcement(); ok && a.Credited && w > 0 && c.r.credits.Load() {
		c.granted.Store(w)
		c.window.Store(w)
	}
}

// processed counts a message that has ended.
func (c *inbound) processed(size int) {
	if c.window.Load() > 0 {
		c.doneBytes.Add(int64(size))
		c.doneCount.Add(1)
	}
}

// grant gives the sender more credit when half of the window has been used up
// and become free again. The frame is written by the next flush; it reports
// whether there is one.
func (c *inbound) grant() bool {
	w := c.window.Load()
	next, last := c.doneBytes.Load()+w, c.granted.Load()
	if w == 0 || next-last < max(w/2, 1) || !c.granted.CompareAndSwap(last, next) {
		return false
	}
	c.tell(next)
	return true
}

// progress tells the sender that messages have ended, if they have.
func (c *inbound) progress() {
	n := c.doneCount.Load()
	if c.window.Load() == 0 || n == c.told {
		return
	}
	c.told = n
	c.tell(c.granted.Load())
	c.acks.wake()
}

func (c *inbound) tell(limit int64) {
	c.r.met.grants.Inc()
	c.acks.credit(uint64(c.doneCount.Load()), uint64(limit))
}

// end decides the acknowledgement of a message.
func (c *inbound) end(p *pending, err error) {
	state := ackPositive
	if err != nil {
		state = ackNegative
		c.r.met.negative.Inc()
	}
	c.acks.set(p.seq, state)
	c.processed(p.size)
}

// pending is the end of one message that its sender waits for. It implements
// channel.Deferrer.
type pending struct {
	c     *inbound
	seq   uint64
	size  int // of the frame
	state atomic.Uint32
}

const (
	pendingRunning  = iota // the handler runs and has not deferred
	pendingDeferred        // the function returned by Defer ends it
	pendingEnded
)

// Defer implements channel.Deferrer. After the handler has returned, or a
// second time, it is too late: the result does nothing.
func (p *pending) Defer() func(error) {
	if !p.state.CompareAndSwap(pendingRunning, pendingDeferred) {
		p.c.r.met.lateDefer.Inc()
		return func(error) {}
	}
	return p.finish
}

func (p *pending) finish(err error) {
	if p.state.CompareAndSwap(pendingDeferred, pendingEnded) {
		p.c.end(p, err)
		p.c.grant()
		p.c.acks.wake()
	}
}

type ackState uint8

const (
	ackPending ackState = iota
	ackPositive
	ackNegative
)

// ackQueue holds the acknowledgements of a connection in the order of their
// messages and writes those that are decided, many in one write. Who finds
// nobody writing writes, for all; nobody writes under the lock.
type ackQueue struct {
	nc      net.Conn
	timeout time.Duration // of a write
	bound   int

	work   chan struct{} // wakes the goroutine
	freed  chan struct{} // tells room that the queue has become shorter
	gone   chan struct{} // closed by close
	joined sync.WaitGroup

	soon  *time.Timer // clears armed and calls wake; of the reading goroutine alone
	armed atomic.Bool // soon is pending

	mu         sync.Mutex
	ring       []ackState // guarded by mu, as all below; power of two
	head, tail uint64     // sequence numbers: oldest not written, next
	writing    bool
	helping    bool // the goroutine exists
	closed     bool
	err        error // of a write
	out        []byte
	tell       bool // a credit frame is due
	processed  uint64
	limit      uint64
}

func (q *ackQueue) init(nc net.Conn, timeout time.Duration, bound int) {
	q.nc, q.timeout, q.bound = nc, timeout, bound
	q.work, q.freed, q.gone = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})
}

// push appends an acknowledgement and returns its sequence number.
func (q *ackQueue) push(s ackState) uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := uint64(len(q.ring)); q.tail-q.head == n {
		grown := make([]ackState, max(batchSize, 2*n))
		for i := q.head; i < q.tail; i++ {
			grown[i%uint64(len(grown))] = q.ring[i%n]
		}
		q.ring = grown
	}
	seq := q.tail
	q.ring[seq%uint64(len(q.ring))] = s
	q.tail++
	return seq
}

// set decides a pending acknowledgement.
func (q *ackQueue) set(seq uint64, s ackState) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ring[seq%uint64(len(q.ring))] = s
}

// credit has the next flush tell the sender how far we have come. Numbers never
// go back.
func (q *ackQueue) credit(processed, limit uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.tell, q.processed, q.limit = true, max(q.processed, processed), max(q.limit, limit)
}

// errOutstanding says that too many messages have not ended.
var errOutstanding = errors.New("tcp: too many deferred messages")

// room returns how many acknowledgements may be pushed, at least one. If there
// is no room for the time-out it fails with errOutstanding; also if writing has
// failed, ctx has ended, or stop is set and freed is told.
func (q *ackQueue) room(ctx context.Context, stop *atomic.Bool, stalls *channel.Counter) (int, error) {
	n, err := q.unused()
	if n > 0 || err != nil {
		return n, err
	}
	stalls.Inc()
	t := time.NewTimer(q.timeout)
	defer t.Stop()
	for {
		select {
		case <-q.freed:
			n, err = q.unused()
			if n > 0 || err != nil {
				return n, err
			}
			if stop.Load() {
				return 0, errOutstanding
			}
		case <-t.C:
			return 0, q.blocked()
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// blocked says why there is no room: the peer does not read what is being
// written, or messages do not end.
func (q *ackQueue) blocked() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.writing {
		return fmt.Errorf("tcp: acknowledgements are not taken: %w", os.ErrDeadlineExceeded)
	}
	return errOutstanding
}

func (q *ackQueue) unused() (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bound - int(q.tail-q.head), q.err
}

// failure returns the error that has ended writing, or nil.
func (q *ackQueue) failure() error {
	_, err := q.unused()
	return err
}

// flush writes the acknowledgements that are decided, up to the first that is
// not. If somebody else is writing, that one takes them along. It returns the
// error that has ended writing.
func (q *ackQueue) flush() error {
	q.mu.Lock()
	if q.writing {
		err := q.err
		q.mu.Unlock()
		return err
	}
	q.writing = true
	for q.err == nil {
		out := q.decided()
		if len(out) == 0 {
			break
		}
		q.mu.Unlock()
		err := q.write(out)
		q.mu.Lock()
		q.err = err
	}
	q.writing = false
	err := q.err
	q.mu.Unlock()
	notify(q.freed)
	return err
}

// decided takes the decided acknowledgements off the queue and returns their
// bytes. Call it with mu held and writing set, which guards out.
func (q *ackQueue) decided() []byte {
	q.out = q.out[:0]
	if q.tell {
		q.tell = false
		q.out = wire.AppendCredit(q.out, q.processed, q.limit)
	}
	for ; q.head < q.tail; q.head++ {
		switch q.ring[q.head%uint64(len(q.ring))] {
		case ackPositive:
			q.out = append(q.out, wire.Ack...)
		case ackNegative:
			q.out = append(q.out, wire.NegativeAck...)
		default:
			return q.out
		}
	}
	return q.out
}

func (q *ackQueue) write(b []byte) error {
	if err := q.nc.SetWriteDeadline(time.Now().Add(q.timeout)); err != nil {
		return err
	}
	_, err := q.nc.Write(b)
	return err
}

// wake has the goroutine of the queue flush. It does not block.
func (q *ackQueue) wake() {
	q.mu.Lock()
	start := !q.helping && !q.closed
	if start {
		q.helping = true
		q.joined.Add(1)
	}
	q.mu.Unlock()
	if start {
		go q.help()
	}
	notify(q.work)
}

// soonDelay is how long acknowledgements that are due may wait for the end of
// the batch, to go out in one write.
const soonDelay = 200 * time.Microsecond

// wakeSoon calls wake after soonDelay unless calm comes first. Only the reading
// goroutine may call these two.
func (q *ackQueue) wakeSoon() {
	if q.armed.Swap(true) {
		return
	}
	if q.soon != nil {
		q.soon.Reset(soonDelay)
		return
	}
	q.soon = time.AfterFunc(soonDelay, func() {
		q.armed.Store(false)
		q.wake()
	})
}

// calm says that flush comes next.
func (q *ackQueue) calm() {
	if q.armed.Load() {
		q.soon.Stop()
		q.armed.Store(false)
	}
}

// help is the goroutine that writes what others have decided.
func (q *ackQueue) help() {
	defer q.joined.Done()
	for {
		select {
		case <-q.work:
			if q.flush() != nil {
				q.nc.Close() // ends the reader too
				return
			}
		case <-q.gone:
			return
		}
	}
}

// close ends the goroutine. The connection must be closed.
func (q *ackQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	close(q.gone)
	q.joined.Wait()
}

// notify puts a token into c if there is none.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
