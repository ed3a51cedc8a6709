package tcp

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// pipe is one connection to a member with many messages in flight, and the
// queue that is kept while there is no connection. Frames are gathered in
// buffers; there is one writer at a time:
//
//   - a caller that waits for its own acknowledgement anyway and finds the
//     connection idle writes in its own goroutine, once; so does one that does
//     not wait, as long as such messages are rare;
//   - everything else is written by the goroutine of run, which also connects.
//
// There is one reader at a time, too: a goroutine of its own, because a writer
// that also read could block for ever against a peer that does the same. Only
// while messages come one at a time, each after the acknowledgement of the one
// before, it lets the callers read for themselves: waking another goroutine
// takes as long as the message's way through the network.
type pipe struct {
	s    *Sender
	addr netip.AddrPort
	kick chan struct{} // wakes run
	// credit is how many bytes may be sent on a new connection before the peer
	// has granted more; 0 if it grants none.
	credit int64

	ctx    context.Context // ends in close
	cancel context.CancelFunc

	mu      sync.Mutex
	err     error    // guarded by mu, as all below; set by close
	link    *link    // nil while there is no connection
	queue   batches  // frames that have not been written
	free    []*batch // buffers to use again
	fifo    ring     // messages that wait for an acknowledgement, in order
	msgs    int      // accepted and not ended
	bytes   int      // their frames
	waiting waitlist
	drained drained // when msgs becomes 0

	fails     int       // connections in a row that came to nothing
	notBefore time.Time // of the next attempt to connect
}

// batch is a buffer of frames that are written together.
type batch struct {
	next       *batch
	buf        []byte
	acks       int     // frames that will be acknowledged
	plain      int     // frames that will not
	plainBytes int     // their size
	told       []*call // of those, the ones somebody waits for
}

// batches is a queue of batches, linked by next.
type batches struct{ head, tail *batch }

func (q *batches) push(b *batch) {
	if q.tail == nil {
		q.head = b
	} else {
		q.tail.next = b
	}
	q.tail = b
}

// pop returns nil if the queue is empty.
func (q *batches) pop() *batch {
	b := q.head
	if b == nil {
		return nil
	}
	if q.head = b.next; q.head == nil {
		q.tail = nil
	}
	b.next = nil
	return b
}

// link is one connection of a pipe.
type link struct {
	conn net.Conn
	gone chan struct{} // closed by close
	turn chan struct{} // gives the reading to readAcks

	// Of who is the reader.
	dec  *wire.Decoder
	none channel.Message // nobody sends one here
	done []*call
	bad  []bool

	writing bool // guarded by pipe.mu, as all below
	due     int  // acknowledgements that may come: frames handed to conn
	early   int  // those of them from batches before the one being written
	acked   bool // at least one has come
	crowd   bool // the last read brought several

	sent      int64  // bytes handed to conn
	limit     int64  // up to which that may go, or 0 for no limit
	starved   bool   // something waits for a higher limit
	processed uint64 // messages that the peer says have ended

	reading bool            // somebody is the reader
	alone   bool            // the last read brought one, for a caller that waited
	self    context.Context // of the caller that is the reader, or nil
	inlined bool            // a caller has been the reader since the last tick

	sparse     bool          // messages that nobody waits for are rare
	lone       int           // batches of one such message, in a row
	rapid      int           // messages in a row that came too soon for sparse
	lastInline time.Duration // when one was last written by its caller

	// Times of Sender.clock.
	born    int64
	used    int64 // last write
	chunkAt int64 // when the present piece of a write began
	ackAt   int64 // when waiting for the next acknowledgement began
}

const (
	// batchBytes is how large a batch becomes, unless it is one larger frame.
	batchBytes = 64 << 10
	// keepBatches is how many buffers an idle connection keeps.
	keepBatches = 2
	// keepBuffer is the largest buffer that is kept, in bytes.
	keepBuffer = 8 * batchBytes
	// writeChunk is the most that is written at once, in bytes: a peer that
	// reads at least so much per ack timeout is alive.
	writeChunk = 64 << 10
	// inlineBytes is how much may be unacknowledged for a caller to write
	// itself. It fits in socket buffers, so that callers do not block.
	inlineBytes = 128 << 10
	// Messages that nobody waits for are rare after so many that had nothing
	// to be gathered with, and no longer rare after so many that came within
	// rareGap of the one before.
	loneForSparse, rapidForDense = 8, 4
	rareGap                      = 15 * time.Microsecond
	// stableAfter is how long a connection must have lived, or it must have
	// acknowledged something, to count as a success.
	stableAfter = time.Second
	// The pause before connecting again doubles with each failure.
	firstPause, lastPause = 20 * time.Millisecond, 500 * time.Millisecond
	// maxAckFrame bounds a frame that a peer may send back.
	maxAckFrame = 64
)

func newPipe(s *Sender, to channel.Member, credit int64) *pipe {
	p := &pipe{s: s, addr: to.Addr(), kick: make(chan struct{}, 1), credit: credit}
	p.ctx, p.cancel = context.WithCancel(s.ctx)
	s.wg.Add(1)
	go p.run()
	return p
}

// roundTrip implements outlet.
func (p *pipe) roundTrip(ctx context.Context, m *channel.Message) error {
	if !m.Options.Has(channel.UseAck) && p.drop(m, true) {
		return nil
	}
	c := p.s.newCall()
	l, reader, err := p.accept(ctx, c, m, true, true)
	if err != nil {
		c.free()
		return err
	}
	if l != nil {
		p.writeNext(l)
	}
	if reader {
		p.readOwn(ctx, c, l)
	}
	return c.wait(ctx)
}

// readOwn makes the caller, who is the reader, read until its own message has
// ended, and gives the reading up. That its context was cancelled is noticed by
// tick; watching for it here would cost allocations.
func (p *pipe) readOwn(ctx context.Context, c *call, l *link) {
	deadline, limited := ctx.Deadline()
	if limited {
		_ = l.conn.SetReadDeadline(deadline) // a closed connection needs none
	}
	for c.open() && ctx.Err() == nil && (!limited || time.Now().Before(deadline)) && p.readOnce(l) {
	}
	if limited {
		_ = l.conn.SetReadDeadline(time.Time{})
	}
	p.mu.Lock()
	l.self = nil
	l.reading = p.fifo.n > 0 // somebody waits: readAcks goes on
	handOn := l.reading
	p.mu.Unlock()
	if handOn {
		notify(l.turn)
	}
}

// post implements outlet.
func (p *pipe) post(ctx context.Context, c *call, m *channel.Message, wait bool) error {
	_, _, err := p.accept(ctx, c, m, wait, false)
	return err
}

// drop puts a message that nobody waits for into the buffer of an open
// connection; false if there is none, or no room.
func (p *pipe) drop(m *channel.Message, inline bool) bool {
	rec := p.s.recordOf(m.From)
	size := wire.FrameSize(m)
	p.mu.Lock()
	if p.err != nil || p.link == nil || p.waiting.head != nil || !p.fits(size) {
		p.mu.Unlock()
		return false
	}
	p.msgs++
	p.bytes += size
	b := p.last(size)
	b.buf = wire.AppendFrameRecord(b.buf, rec, m)
	b.plain++
	b.plainBytes += size
	l := p.link
	busy := l.writing
	inline = inline && !busy && l.sparse && p.bytes == size && l.allowed() && p.rare(l)
	if inline {
		p.reserve(l)
	}
	p.mu.Unlock()
	switch {
	case inline:
		p.writeNext(l)
	case !busy: // the writer looks again before it ends
		notify(p.kick)
	}
	return true
}

// rare reports whether messages that nobody waits for are still rare enough to
// be written by their callers. Call it with mu held.
func (p *pipe) rare(l *link) bool {
	now := time.Since(p.s.begin)
	if now-l.lastInline > rareGap {
		l.rapid = 0
	} else if l.rapid++; l.rapid >= rapidForDense {
		l.sparse, l.lone, l.rapid = false, 0, 0
	}
	l.lastInline = now
	return l.sparse
}

// gathered notes what a batch that run writes holds: with one message that
// nobody waits for, again and again, there is nothing to be gained by gathering.
// Call it with mu held.
func (l *link) gathered(b *batch) {
	if b.plain != 1 || b.acks != 0 {
		l.lone = 0
	} else if l.lone++; l.lone >= loneForSparse {
		l.sparse = true
	}
}

// fits reports whether a frame of size bytes has room in the window. Call it
// with mu held.
func (p *pipe) fits(size int) bool {
	return p.msgs < p.s.cfg.WindowMessages && (p.bytes+size <= p.s.cfg.WindowBytes || p.bytes == 0)
}

// accept puts m into the window and the buffer. With inline, and if the
// connection is idle and little is in flight, it makes the caller the writer: it
// must call writeNext. Otherwise run is told. If nothing else waits for an
// acknowledgement either, it may make it the reader as well. After an error
// nobody but the caller holds c.
func (p *pipe) accept(ctx context.Context, c *call, m *channel.Message, wait, inline bool) (write *link, reader bool, err error) {
	rec := p.s.recordOf(m.From)
	c.size = wire.FrameSize(m)
	p.mu.Lock()
	switch {
	case p.err != nil:
	case p.waiting.head == nil && p.fits(c.size):
		p.msgs++
		p.bytes += c.size
	case !wait:
		p.mu.Unlock()
		return nil, false, errFull
	default:
		p.s.met.stalls.Inc()
		p.waiting.push(c)
		p.mu.Unlock()
		if err := p.await(ctx, c); err != nil {
			return nil, false, err
		}
		p.mu.Lock()
		if p.err != nil {
			granted := p.release(1, c.size)
			p.mu.Unlock()
			granted.signal()
			return nil, false, p.err
		}
	}
	if p.err != nil {
		p.mu.Unlock()
		return nil, false, p.err
	}
	p.enqueue(c, m, rec)
	l := p.link
	if l == nil {
		p.mu.Unlock()
		notify(p.kick)
		return nil, false, nil
	}
	busy := l.writing
	inline = inline && !busy && p.bytes <= inlineBytes && l.allowed()
	if inline {
		p.reserve(l)
	}
	acks := m.Options.Has(channel.UseAck)
	turn := acks && !l.reading
	reader = turn && inline && p.fifo.n == 1
	if turn {
		l.reading = true
	}
	if reader {
		l.self, l.inlined = ctx, true
	}
	p.mu.Unlock()
	if turn && !reader {
		notify(l.turn)
	}
	switch {
	case inline:
		return l, reader, nil
	case !busy: // the writer looks again before it ends
		notify(p.kick)
	}
	return nil, false, nil
}

// await waits until c has been granted its room in the window.
func (p *pipe) await(ctx context.Context, c *call) error {
	select {
	case <-c.grant:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	if !c.granted {
		p.waiting.remove(c)
		granted := p.release(0, 0) // the next one may be smaller
		p.mu.Unlock()
		granted.signal()
		return ctx.Err()
	}
	granted := p.release(1, c.size)
	p.mu.Unlock()
	granted.signal()
	<-c.grant // is on its way
	return ctx.Err()
}

// last returns the batch that the next frame, of size bytes, goes to. Call it
// with mu held.
func (p *pipe) last(size int) *batch {
	if b := p.queue.tail; b != nil && len(b.buf)+size <= batchBytes {
		return b
	}
	var b *batch
	if n := len(p.free); n > 0 {
		b, p.free = p.free[n-1], p.free[:n-1]
	} else {
		b = new(batch)
	}
	p.queue.push(b)
	return b
}

// enqueue appends the frame of m. Call it with mu held and the room taken.
func (p *pipe) enqueue(c *call, m *channel.Message, rec []byte) {
	b := p.last(c.size)
	b.buf = wire.AppendFrameRecord(b.buf, rec, m)
	if !m.Options.Has(channel.UseAck) {
		b.plain++
		b.plainBytes += c.size
		if c.group == nil && p.link != nil { // it stands in the buffer of an open connection
			c.finish(nil)
		} else {
			b.told = append(b.told, c)
		}
		return
	}
	b.acks++
	if l := p.link; p.fifo.n == 0 && l != nil {
		l.ackAt = p.s.clock.Load()
	}
	p.fifo.push(c)
}

// release gives room in the window back and returns the calls that it was
// granted to: signal them after unlocking. Call it with mu held.
func (p *pipe) release(msgs, bytes int) waitlist {
	p.msgs -= msgs
	p.bytes -= bytes
	var granted waitlist
	for p.waiting.head != nil && (p.fits(p.waiting.head.size) || p.err != nil) {
		c := p.waiting.pop()
		c.granted = true
		p.msgs++
		p.bytes += c.size
		granted.push(c)
	}
	if p.msgs == 0 {
		p.drained.signal()
	}
	return granted
}

// reserve makes the caller the writer. Call it with mu held and no writer.
func (p *pipe) reserve(l *link) {
	l.writing, l.chunkAt = true, p.s.clock.Load()
}

// writeNext writes the first batch of the queue. The caller is the writer, and
// no longer when it returns.
func (p *pipe) writeNext(l *link) {
	p.mu.Lock()
	if l.crowd {
		// The last acknowledgements came for several callers at once. Those
		// are about to send again: let them put their frames into this batch.
		p.mu.Unlock()
		runtime.Gosched()
		p.mu.Lock()
	}
	if p.link != l { // it has failed, and the queue is its successor's
		p.mu.Unlock()
		return
	}
	b := p.queue.pop()
	l.early = l.due
	l.due += b.acks
	l.sent += int64(len(b.buf))
	l.used = p.s.clock.Load()
	l.chunkAt = l.used
	p.mu.Unlock()
	p.write(l, b)
}

// write writes a batch and ends the caller's being the writer.
func (p *pipe) write(l *link, b *batch) {
	err := p.writeAll(l, b.buf)
	p.s.met.bytes.Add(int64(len(b.buf)))
	told := b.told
	p.mu.Lock()
	l.writing = false
	if l.early == 0 { // the wait begins now: nothing else was due
		l.ackAt = p.s.clock.Load()
	}
	granted := p.release(b.plain, b.plainBytes)
	more := p.link == l && p.queue.head != nil
	p.mu.Unlock()
	granted.signal()
	switch {
	case err != nil:
		err = lost(err)
		p.s.met.lost.Add(int64(b.plain - len(told)))
		p.fail(l, err)
	case more:
		notify(p.kick)
	}
	for i, c := range told {
		c.finish(err)
		told[i] = nil
	}
	p.recycle(b)
}

func lost(err error) error { return fmt.Errorf("%w: %w", errLost, err) }

// recycle keeps a batch that is done with for the next take.
func (p *pipe) recycle(b *batch) {
	if cap(b.buf) > keepBuffer {
		b.buf = nil
	}
	*b = batch{buf: b.buf[:0], told: b.told[:0]}
	p.mu.Lock()
	p.free = append(p.free, b)
	p.mu.Unlock()
}

func (p *pipe) writeAll(l *link, b []byte) error {
	for {
		n := min(len(b), writeChunk)
		if _, err := l.conn.Write(b[:n]); err != nil {
			return err
		}
		if b = b[n:]; len(b) == 0 {
			return nil
		}
		p.mu.Lock()
		l.chunkAt = p.s.clock.Load()
		p.mu.Unlock()
	}
}

// allowed reports whether the peer has granted more than has been sent: a batch
// may then be written, so that a peer is ahead of its grant by less than one.
// Call it with pipe.mu held.
func (l *link) allowed() bool { return l.limit == 0 || l.sent < l.limit }

// starve notes that the queue waits for the peer, and sees to it that somebody
// reads. Call it with mu held; it unlocks.
func (p *pipe) starve(l *link) {
	if !l.starved {
		l.starved = true
		p.s.met.starved.Inc()
	}
	turn := !l.reading
	l.reading = true
	p.mu.Unlock()
	if turn {
		notify(l.turn)
	}
}

// granted takes over what the peer says in l.none. The caller is the reader.
func (p *pipe) granted(l *link) {
	processed, limit := wire.ParseCredit(&l.none)
	p.mu.Lock()
	if l.limit > 0 && limit <= math.MaxInt64 {
		l.limit = max(l.limit, int64(limit))
	}
	if processed > l.processed { // slow, and alive
		l.processed = processed
		l.chunkAt = p.s.clock.Load()
		l.ackAt = l.chunkAt
	}
	again := l.starved && l.allowed()
	if again {
		l.starved = false
	}
	p.mu.Unlock()
	if again {
		notify(p.kick)
	}
}

// run is the goroutine that connects and writes what callers left.
func (p *pipe) run() {
	defer p.s.wg.Done()
	for {
		select {
		case <-p.kick:
		case <-p.ctx.Done():
			return
		}
		for p.step() {
		}
	}
}

// step does one piece of work and reports whether there may be more.
func (p *pipe) step() bool {
	p.mu.Lock()
	l := p.link
	if p.err != nil || p.queue.head == nil || l != nil && l.writing {
		p.mu.Unlock()
		return false
	}
	if l == nil {
		pause := time.Until(p.notBefore)
		p.mu.Unlock()
		return p.connect(pause)
	}
	if !l.allowed() {
		p.starve(l)
		return false
	}
	p.reserve(l)
	l.gathered(p.queue.head)
	p.mu.Unlock()
	p.writeNext(l)
	return true
}

// connect opens the connection after a pause. If that fails, so does everything
// that waits for it.
func (p *pipe) connect(pause time.Duration) bool {
	if pause > 0 && !channel.Pause(p.ctx, pause) {
		return false
	}
	conn, err := p.s.dial(p.ctx, p.addr)
	now := p.s.clock.Load()
	p.mu.Lock()
	if err != nil {
		p.backOff()
		ended, told, granted := p.abandon()
		p.mu.Unlock()
		p.end(ended, told, granted, fmt.Errorf("tcp: connect to %s: %w: %w", p.addr, channel.ErrDisconnected, err))
		return true
	}
	if p.err != nil {
		p.mu.Unlock()
		conn.Close()
		return false
	}
	l := &link{
		conn: conn, gone: make(chan struct{}), turn: make(chan struct{}, 1), dec: wire.NewDecoder(maxAckFrame),
		limit: p.credit, reading: true, born: now, used: now, ackAt: now,
	}
	p.link = l
	p.s.wg.Add(1)
	p.mu.Unlock()
	go p.readAcks(l)
	return true
}

// backOff puts the next attempt to connect off. Call it with mu held.
func (p *pipe) backOff() {
	pause := min(firstPause<<min(p.fails, 10), lastPause)
	p.fails++
	p.notBefore = time.Now().Add(pause)
}

// abandon takes everything that has been accepted and is not being written.
// Call it with mu held, and end after unlocking.
func (p *pipe) abandon() (ended ring, told []*call, granted waitlist) {
	ended, p.fifo = p.fifo, ring{}
	told, msgs, bytes := p.unqueue()
	for i := range ended.n {
		msgs++
		bytes += ended.slots[(ended.head+i)&(len(ended.slots)-1)].size
	}
	return ended, told, p.release(msgs, bytes)
}

// unqueue throws away what has not been written, and returns the calls of its
// plain frames, their number and their size. Call it with mu held.
func (p *pipe) unqueue() (told []*call, msgs, bytes int) {
	for b := p.queue.pop(); b != nil; b = p.queue.pop() {
		told = append(told, b.told...)
		msgs += b.plain
		bytes += b.plainBytes
	}
	p.s.met.lost.Add(int64(msgs - len(told)))
	return told, msgs, bytes
}

// end tells the end of what abandon returned.
func (p *pipe) end(ended ring, told []*call, granted waitlist, err error) {
	granted.signal()
	for c := ended.pop(); c != nil; c = ended.pop() {
		c.finish(err)
	}
	for _, c := range told {
		c.finish(err)
	}
}

// fail ends a connection. What is in flight fails with err, or is sent again on
// the next connection: here if nobody waits for it, by the waiting goroutine
// else.
func (p *pipe) fail(l *link, err error) {
	p.mu.Lock()
	if p.link != l {
		p.mu.Unlock()
		return
	}
	p.link = nil
	if l.acked || time.Duration(p.s.clock.Load()-l.born) >= stableAfter {
		p.fails, p.notBefore = 0, time.Time{}
	} else {
		p.backOff()
	}
	if !errors.Is(err, errLost) {
		ended, told, granted := p.abandon()
		p.mu.Unlock()
		l.close()
		p.end(ended, told, granted, err)
		return
	}
	again := p.fifo
	p.fifo = ring{}
	told, msgs, bytes := p.unqueue()
	var ended ring
	for c := again.pop(); c != nil; c = again.pop() {
		if c.group == nil || c.tries >= p.s.cfg.Retries {
			ended.push(c)
			msgs++
			bytes += c.size
			continue
		}
		c.tries++
		p.s.met.retries.Inc()
		p.enqueue(c, c.group.m, p.s.recordOf(c.group.m.From))
	}
	granted := p.release(msgs, bytes)
	resend := p.fifo.n > 0
	p.mu.Unlock()
	l.close()
	if resend {
		notify(p.kick)
	}
	p.end(ended, told, granted, err)
}

// close closes the connection. It is called once, by who has taken the link
// from the pipe.
func (l *link) close() {
	l.conn.Close()
	close(l.gone)
}

// readAcks is the goroutine that reads what the peer sends back, as long as
// callers do not.
func (p *pipe) readAcks(l *link) {
	defer p.s.wg.Done()
	for p.readOnce(l) {
		p.mu.Lock()
		leave := l.alone && p.fifo.n == 0
		if leave {
			l.alone, l.reading, l.inlined = false, false, true // until a tick without a caller
		}
		p.mu.Unlock()
		if !leave {
			continue
		}
		select {
		case <-l.turn:
		case <-l.gone:
			return
		}
	}
}

// readOnce reads once and ends the messages whose acknowledgements have come.
// It returns false when the connection has come to its end. The caller is the
// reader.
func (p *pipe) readOnce(l *link) bool {
	n, err := l.conn.Read(l.dec.Space())
	l.dec.Wrote(n)
	l.bad = l.bad[:0]
	var ferr error
	for ferr == nil {
		var kind wire.Kind
		kind, ferr = l.dec.Next(&l.none)
		if kind == wire.Incomplete {
			break
		}
		if kind == wire.CreditFrame {
			p.granted(l)
			continue
		}
		if kind == wire.MessageFrame {
			ferr = errors.New("a message instead of an acknowledgement")
			break
		}
		l.bad = append(l.bad, kind == wire.NegativeAckFrame)
	}
	var ok bool
	if l.done, ok = p.acknowledged(l, l.done[:0], len(l.bad)); !ok && ferr == nil {
		ferr = errors.New("an acknowledgement of nothing")
	}
	for i, c := range l.done {
		p.settle(c, l.bad[i])
	}
	clear(l.done)
	switch {
	case ferr != nil:
		p.s.met.unexpected.Inc()
		if unlogged, ok := p.s.gate.open(); ok {
			p.s.log.Warn("closed a connection: the peer does not speak the protocol", zap.Stringer("peer", p.addr), zap.Error(ferr), zap.Int64("unlogged", unlogged))
		}
		p.fail(l, fmt.Errorf("tcp: %s sent %w: %w", p.addr, ferr, channel.ErrDisconnected))
		return false
	case err != nil && channel.IsTimeout(err): // that of a caller, or tick has interrupted one; it is of no use to anybody else
		err = l.conn.SetReadDeadline(time.Time{})
	}
	if err != nil {
		p.fail(l, lost(err))
		return false
	}
	return true
}

// acknowledged takes the calls that n acknowledgements end. It returns false if
// there are not so many.
func (p *pipe) acknowledged(l *link, done []*call, n int) ([]*call, bool) {
	if n == 0 {
		return done, true
	}
	p.mu.Lock()
	if p.link != l { // too late: they have ended otherwise
		p.mu.Unlock()
		return done, true
	}
	ok := n <= l.due
	n = min(n, l.due)
	l.due -= n
	l.early = max(l.early-n, 0)
	l.acked, l.crowd = true, n > 1
	l.ackAt = p.s.clock.Load()
	size := 0
	for range n {
		c := p.fifo.pop()
		size += c.size
		l.alone = n == 1 && c.group == nil
		done = append(done, c)
	}
	granted := p.release(n, size)
	p.mu.Unlock()
	granted.signal()
	return done, ok
}

func (p *pipe) settle(c *call, negative bool) {
	if !negative {
		c.finish(nil)
		return
	}
	p.s.met.negative.Inc()
	c.finish(channel.ErrNegativeAck)
}

// tick implements outlet: it ends a connection on which the peer does not read
// or acknowledge, or that is not used.
func (p *pipe) tick(now int64) {
	limit := int64(p.s.cfg.AckTimeout)
	p.mu.Lock()
	l := p.link
	quiet := p.msgs == 0 && (l == nil || !l.writing)
	if quiet && len(p.free) > keepBatches {
		p.free = slices.Delete(p.free, keepBatches, len(p.free))
	}
	if l == nil {
		p.mu.Unlock()
		return
	}
	stuck := l.writing && now-l.chunkAt > limit
	waiting := l.due
	if l.writing {
		waiting = l.early
	}
	late := waiting > 0 && now-l.ackAt > limit
	idle := quiet && now-l.used > int64(idleClose)
	if idle {
		p.link = nil
	}
	turn := !l.reading && !l.inlined
	if turn {
		l.reading = true
	}
	l.inlined = false
	interrupt := l.self != nil && l.self.Err() != nil
	p.mu.Unlock()
	if turn {
		notify(l.turn)
	}
	if interrupt {
		_ = l.conn.SetReadDeadline(time.Unix(1, 0)) // a closed connection needs none
	}
	switch {
	case idle:
		l.close()
	case stuck:
		p.s.met.timeouts.Inc()
		p.fail(l, fmt.Errorf("tcp: %s does not read: %w", p.addr, channel.ErrAckTimeout))
	case late:
		p.s.met.timeouts.Inc()
		p.fail(l, fmt.Errorf("tcp: %s: %w", p.addr, channel.ErrAckTimeout))
	}
}

// drain implements outlet.
func (p *pipe) drain(ctx context.Context) {
	p.mu.Lock()
	if p.msgs == 0 {
		p.mu.Unlock()
		return
	}
	empty := p.drained.wait()
	p.mu.Unlock()
	select {
	case <-empty:
	case <-ctx.Done():
	}
}

// close implements outlet.
func (p *pipe) close(err error) {
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return
	}
	p.err = err
	l := p.link
	p.link = nil
	ended, told, granted := p.abandon()
	p.mu.Unlock()
	p.cancel()
	if l != nil {
		l.close()
	}
	p.end(ended, told, granted, err)
}

func (p *pipe) connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.link == nil {
		return 0
	}
	return 1
}

// dial connects within the configured time.
func (s *Sender) dial(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.ConnectTimeout)
	defer cancel()
	conn, err := channel.Dial(ctx, s.net, addr)
	if err != nil {
		s.met.connectFailures.Inc()
		return nil, err
	}
	s.met.connects.Inc()
	return conn, nil
}
