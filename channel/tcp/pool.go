package tcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// pool is the way to a member that is not pipelined: connections with one
// unacknowledged message each, used by one goroutine at a time, and a pipe for
// the messages that nobody acknowledges, so that those keep their order.
type pool struct {
	s       *Sender
	addr    netip.AddrPort
	ordered *pipe
	slots   chan struct{}   // a token per connection in use or idle; bounds them
	ctx     context.Context // ends in close
	cancel  context.CancelFunc

	mu        sync.Mutex
	err       error // guarded by mu, as all below; set by close
	idle      []*lane
	lanes     map[*lane]struct{} // all open ones
	busy      int                // messages that have a slot
	drained   drained            // when busy becomes 0
	fails     int
	notBefore time.Time
}

// lane is one connection of a pool.
type lane struct {
	conn net.Conn
	dec  *wire.Decoder
	buf  []byte
	used int64 // of Sender.clock
	good bool  // it has brought an acknowledgement
}

func newPool(s *Sender, to channel.Member) *pool {
	p := &pool{
		s: s, addr: to.Addr(), ordered: newPipe(s, to, 0),
		slots: make(chan struct{}, s.cfg.Pool), lanes: map[*lane]struct{}{},
	}
	p.ctx, p.cancel = context.WithCancel(s.ctx)
	return p
}

// roundTrip implements outlet.
func (p *pool) roundTrip(ctx context.Context, m *channel.Message) error {
	if !m.Options.Has(channel.UseAck) {
		return p.ordered.roundTrip(ctx, m)
	}
	if err := p.enter(ctx, true); err != nil {
		return err
	}
	defer p.leave()
	return p.exchange(ctx, m)
}

// post implements outlet.
func (p *pool) post(ctx context.Context, c *call, m *channel.Message, wait bool) error {
	if !m.Options.Has(channel.UseAck) {
		return p.ordered.post(ctx, c, m, wait)
	}
	if c.group == nil {
		return errFull // Send to several waits in goroutines of its own
	}
	if err := p.enter(ctx, wait); err != nil {
		return err
	}
	p.mu.Lock()
	if err := p.err; err != nil {
		p.mu.Unlock()
		p.leave()
		return err
	}
	p.s.wg.Add(1) // before close, so before Stop waits
	p.mu.Unlock()
	go func() {
		defer p.s.wg.Done()
		err := p.exchange(p.ctx, m)
		for tries := 0; err != nil && p.s.retryable(m, err, tries); tries++ {
			p.s.met.retries.Inc()
			err = p.exchange(p.ctx, m)
		}
		p.leave()
		c.finish(err)
	}()
	return nil
}

// drop implements outlet.
func (p *pool) drop(m *channel.Message, inline bool) bool { return p.ordered.drop(m, inline) }

// enter takes a slot.
func (p *pool) enter(ctx context.Context, wait bool) error {
	select {
	case p.slots <- struct{}{}:
	default:
		if !wait {
			return errFull
		}
		select {
		case p.slots <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		case <-p.ctx.Done():
			return p.closed()
		}
	}
	p.mu.Lock()
	p.busy++
	p.mu.Unlock()
	return nil
}

func (p *pool) leave() {
	p.mu.Lock()
	p.busy--
	if p.busy == 0 {
		p.drained.signal()
	}
	p.mu.Unlock()
	<-p.slots
}

func (p *pool) closed() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// exchange sends m once and reads the acknowledgement.
func (p *pool) exchange(ctx context.Context, m *channel.Message) error {
	l, err := p.lane(ctx)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = l.conn.SetDeadline(time.Unix(1, 0)) })
	negative, err := p.talk(l, m)
	cancelled := !stop() // then the deadline may be set at any time
	switch {
	case err != nil:
		p.discard(l)
		if !cancelled && !l.good {
			p.backOff() // a peer that accepts and closes is as bad as one that refuses
		}
		if cancelled && p.closed() == nil {
			return ctx.Err()
		}
		return p.explain(err)
	case cancelled:
		p.discard(l)
	default:
		p.putBack(l)
	}
	if negative {
		p.s.met.negative.Inc()
		return channel.ErrNegativeAck
	}
	return nil
}

// explain turns the error of a connection into that of a message.
func (p *pool) explain(err error) error {
	var bad *wire.Error
	switch closed := p.closed(); {
	case closed != nil:
		return closed
	case errors.As(err, &bad):
		p.s.met.unexpected.Inc()
		return fmt.Errorf("tcp: %s sent no acknowledgement: %w: %w", p.addr, err, channel.ErrDisconnected)
	case channel.IsTimeout(err):
		p.s.met.timeouts.Inc()
		return fmt.Errorf("tcp: %s: %w", p.addr, channel.ErrAckTimeout)
	}
	p.discardIdle() // most likely lost as well: the next attempt shall not meet them
	return lost(err)
}

// talk writes one frame and reads its acknowledgement.
func (p *pool) talk(l *lane, m *channel.Message) (negative bool, err error) {
	l.buf = wire.AppendFrameRecord(l.buf[:0], p.s.recordOf(m.From), m)
	for b := l.buf; len(b) > 0; {
		n := min(len(b), writeChunk)
		if err := l.conn.SetDeadline(time.Now().Add(p.s.cfg.AckTimeout)); err != nil {
			return false, err
		}
		if _, err := l.conn.Write(b[:n]); err != nil {
			return false, err
		}
		b = b[n:]
	}
	p.s.met.bytes.Add(int64(len(l.buf)))
	var back channel.Message
	for {
		n, err := l.conn.Read(l.dec.Space())
		l.dec.Wrote(n)
		kind, ferr := l.dec.Next(&back)
		switch {
		case ferr != nil:
			return false, ferr
		case kind != wire.Incomplete && (l.dec.Buffered() > 0 || kind != wire.AckFrame && kind != wire.NegativeAckFrame):
			return false, wire.ErrFrameLength // a second answer to one message, or something else than an answer
		case kind != wire.Incomplete:
			return kind == wire.NegativeAckFrame, nil
		case err != nil:
			return false, err
		}
	}
}

// lane returns a connection for one message.
func (p *pool) lane(ctx context.Context) (*lane, error) {
	p.mu.Lock()
	if err := p.err; err != nil {
		p.mu.Unlock()
		return nil, err
	}
	if n := len(p.idle); n > 0 {
		l := p.idle[n-1]
		p.idle = p.idle[:n-1]
		p.mu.Unlock()
		return l, nil
	}
	pause := time.Until(p.notBefore)
	p.mu.Unlock()
	if pause > 0 && !channel.Pause(ctx, pause) {
		return nil, ctx.Err()
	}
	dial, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.ctx, cancel)()
	conn, err := p.s.dial(dial, p.addr)
	if err != nil {
		p.backOff()
		return nil, p.refused(err)
	}
	l := &lane{conn: conn, dec: wire.NewDecoder(maxAckFrame)}
	p.mu.Lock()
	closed := p.err
	if closed == nil {
		p.lanes[l] = struct{}{}
	}
	p.mu.Unlock()
	if closed != nil {
		conn.Close()
		return nil, closed
	}
	return l, nil
}

// backOff puts the next attempt to connect off.
func (p *pool) backOff() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.notBefore = time.Now().Add(min(firstPause<<min(p.fails, 10), lastPause))
	p.fails++
}

// refused returns what a failure to connect means for a message.
func (p *pool) refused(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return p.err
	}
	return fmt.Errorf("tcp: connect to %s: %w: %w", p.addr, channel.ErrDisconnected, err)
}

func (p *pool) putBack(l *lane) {
	if cap(l.buf) > keepBuffer {
		l.buf = nil
	}
	l.used, l.good = p.s.clock.Load(), true
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fails, p.notBefore = 0, time.Time{}
	if p.err == nil { // else close has closed it
		p.idle = append(p.idle, l)
	}
}

func (p *pool) discard(l *lane) {
	l.conn.Close()
	p.mu.Lock()
	delete(p.lanes, l)
	p.mu.Unlock()
}

func (p *pool) discardIdle() {
	p.mu.Lock()
	idle := p.idle
	p.idle = nil
	for _, l := range idle {
		delete(p.lanes, l)
	}
	p.mu.Unlock()
	for _, l := range idle {
		l.conn.Close()
	}
}

// tick implements outlet: it closes connections that are not used. Deadlines of
// those in use are the connections' own.
func (p *pool) tick(now int64) {
	p.ordered.tick(now)
	var old []*lane
	p.mu.Lock()
	for len(p.idle) > 0 && now-p.idle[0].used > int64(idleClose) { // longest unused first
		old = append(old, p.idle[0])
		delete(p.lanes, p.idle[0])
		p.idle = p.idle[1:]
	}
	p.mu.Unlock()
	for _, l := range old {
		l.conn.Close()
	}
}

// drain implements outlet.
func (p *pool) drain(ctx context.Context) {
	p.ordered.drain(ctx)
	p.mu.Lock()
	if p.busy == 0 {
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
func (p *pool) close(err error) {
	p.ordered.close(err)
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return
	}
	p.err = err
	lanes := p.lanes
	p.lanes, p.idle = map[*lane]struct{}{}, nil
	p.mu.Unlock()
	p.cancel()
	for l := range lanes {
		l.conn.Close()
	}
}

func (p *pool) connections() int {
	n := p.ordered.connections()
	p.mu.Lock()
	defer p.mu.Unlock()
	return n + len(p.lanes)
}
