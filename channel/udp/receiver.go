package udp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// receiver is a channel.Receiver around another one.
type receiver struct {
	channel.Receiver
	t *Transport

	deliver     func(context.Context, *channel.Message) error
	ctx         context.Context
	cancel      context.CancelFunc
	wg          sync.WaitGroup
	outstanding atomic.Int64
	udpPort     int // 0 for none; set by Listen
}

// Receiver returns a receiver that also receives datagrams. It delivers them in
// the order in which they come, one at a time from the port and one from the
// group. Whatever is wrong with a datagram is counted and ends nothing.
func (t *Transport) Receiver(next channel.Receiver) channel.Receiver {
	r := &receiver{Receiver: next, t: t}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Listen implements channel.Receiver.
func (r *receiver) Listen(ctx context.Context) (netip.AddrPort, error) {
	addr, err := r.Receiver.Listen(ctx)
	if err != nil {
		return addr, err
	}
	if r.t.cfg.Port > 0 {
		s, err := r.t.bind(addr.Addr())
		if err != nil {
			return addr, err
		}
		r.udpPort = s.conn.LocalAddr().(*net.UDPAddr).Port
		r.t.mu.Lock()
		r.t.port = s
		r.t.mu.Unlock()
	}
	if r.t.cfg.Multicast.Group.IsValid() {
		c, err := channel.ListenMulticast(r.t.net, r.t.cfg.Multicast)
		if err != nil {
			return addr, fmt.Errorf("udp: %w", err)
		}
		r.t.mu.Lock()
		r.t.group = newSocket(c, r.t.cfg.ReadBuffer)
		r.t.mu.Unlock()
	}
	return addr, nil
}

// bind opens the first port that is free.
func (t *Transport) bind(host netip.Addr) (*socket, error) {
	last := min(t.cfg.Port+t.cfg.AutoBind-1, 65535)
	var err error
	for port := t.cfg.Port; port <= last; port++ {
		c, e := channel.ListenUDP(t.net, netip.AddrPortFrom(host, uint16(port)))
		if e == nil {
			if _, ok := c.LocalAddr().(*net.UDPAddr); !ok {
				c.Close()
				return nil, fmt.Errorf("udp: listen: the network returned the address %v", c.LocalAddr())
			}
			return newSocket(c, t.cfg.ReadBuffer), nil
		}
		if !channel.IsAddrInUse(e) {
			return nil, fmt.Errorf("udp: %w", e)
		}
		err = e
	}
	return nil, fmt.Errorf("udp: no free port in %d..%d on %s (raise auto_bind or choose another port): %w", t.cfg.Port, last, host, err)
}

// Describe implements channel.Describer.
func (r *receiver) Describe(m *channel.Member, a *channel.Announcement) {
	if d, ok := r.Receiver.(channel.Describer); ok {
		d.Describe(m, a)
	}
	if r.udpPort > 0 {
		m.UDPPort = r.udpPort
	}
	id := m.ID
	r.t.self.Store(&id)
}

// Start implements channel.Receiver.
func (r *receiver) Start(ctx context.Context, deliver func(context.Context, *channel.Message) error) error {
	if err := r.Receiver.Start(ctx, deliver); err != nil {
		return err
	}
	r.deliver = deliver
	r.t.mu.Lock()
	port, group := r.t.port, r.t.group
	r.t.mu.Unlock()
	if port != nil {
		r.wg.Go(func() { r.read(port, false) })
	}
	if group != nil {
		r.wg.Go(func() { r.read(group, true) })
	}
	return nil
}

// stopGrace is how long Stop waits for deliver after its context was cancelled.
const stopGrace = time.Second

// Stop implements channel.Receiver.
func (r *receiver) Stop(ctx context.Context) error {
	r.t.mu.Lock()
	open := []*socket{r.t.port, r.t.group}
	r.t.port, r.t.group = nil, nil
	r.t.mu.Unlock()
	for _, s := range open {
		if s != nil {
			s.conn.Close()
		}
	}
	done := make(chan struct{})
	go func() { // ends with the handlers
		r.wg.Wait()
		close(done)
	}()
	err := r.Receiver.Stop(ctx)
	defer r.cancel()
	select {
	case <-done:
		return err
	case <-ctx.Done():
	}
	r.cancel()
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case <-done:
		return err
	case <-grace.C:
		return errors.Join(err, fmt.Errorf("udp: stop receiver: a message handler ignores its context: %w", ctx.Err()))
	}
}

// read is the goroutine that reads one socket until it is closed.
func (r *receiver) read(s *socket, group bool) {
	buf := make([]byte, 64<<10) // larger than any datagram
	var m channel.Message
	var frames wire.FrameReader
	pause := time.Millisecond
	for {
		n, from, err := s.read(buf)
		if err == nil {
			pause = time.Millisecond
			r.datagram(s, buf[:n], from, group, &frames, &m)
			continue
		}
		if r.closed(s) || channel.IsClosed(err) {
			return
		}
		// An ICMP message about an acknowledgement, a shortage of memory: what
		// comes next may be fine.
		if !channel.IsTemporary(err) {
			r.t.warn("reading datagrams failed, trying again", zap.Error(err), zap.Duration("in", pause))
		}
		if !channel.Pause(r.ctx, pause) {
			return
		}
		pause = min(2*pause, time.Second)
	}
}

func (r *receiver) closed(s *socket) bool {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	return s != r.t.port && s != r.t.group
}

// frameBegin is how frames begin; other datagrams to the group are the
// membership's.
const frameBegin = "FLT"

// datagram handles the frames of one datagram: one, but Tribes takes more.
func (r *receiver) datagram(s *socket, b []byte, from netip.AddrPort, group bool, frames *wire.FrameReader, m *channel.Message) {
	if group && (len(b) < len(frameBegin) || string(b[:len(frameBegin)]) != frameBegin) {
		return
	}
	if len(b) == 0 {
		r.refuse(from, refusedEmpty, nil)
	}
	for len(b) > 0 {
		kind, n, err := frames.Decode(b, len(b), m)
		switch {
		case errors.Is(err, wire.ErrFrameTooLarge), err == nil && kind == wire.Incomplete:
			r.refuse(from, refusedTruncated, err)
			return
		case err != nil:
			r.refuse(from, wire.Reason(err), err)
			return
		case kind != wire.MessageFrame:
			r.refuse(from, refusedUnwanted, nil)
		case group:
			if self := r.t.self.Load(); self == nil || m.From.ID != *self {
				r.t.met.multicastReceived.Inc()
				_ = r.call(m) // nobody is told
			}
		default:
			r.t.met.received.Inc()
			r.message(s, from, m)
		}
		b = b[n:]
	}
}

func (r *receiver) refuse(from netip.AddrPort, reason string, err error) {
	r.t.met.refused[reason].Inc()
	r.t.warn("refused a datagram", zap.Stringer("remote", from), zap.String("reason", reason), zap.Error(err))
}

// message delivers a message and acknowledges it, as channel/tcp does.
func (r *receiver) message(s *socket, from netip.AddrPort, m *channel.Message) {
	switch o := m.Options; {
	case o.Has(channel.UseAck | channel.SyncAck):
		if r.outstanding.Load() >= int64(r.t.cfg.MaxOutstanding) {
			r.refuse(from, refusedOutstanding, nil) // it will be sent again
			return
		}
		p := &pending{r: r, s: s, to: from}
		m.Later = p
		err := r.call(m)
		if p.state.CompareAndSwap(running, ended) {
			r.answer(s, from, err)
		} else if errors.Is(err, channel.ErrPanic) && p.state.CompareAndSwap(deferred, ended) {
			r.outstanding.Add(-1) // nobody may be left who would end it
			r.answer(s, from, err)
		}
	case o.Has(channel.UseAck):
		r.answer(s, from, nil)
		_ = r.call(m)
	default:
		_ = r.call(m)
	}
}

// call runs the handler and turns a panic into an error.
func (r *receiver) call(m *channel.Message) (err error) {
	defer func() {
		if v := recover(); v != nil {
			r.t.met.panics.Inc()
			r.t.log.Error("a message handler panicked", zap.Any("panic", v), zap.Stack("stack"))
			err = fmt.Errorf("udp: the handler panicked: %v: %w", v, channel.ErrPanic)
		}
	}()
	return r.deliver(r.ctx, m)
}

func (r *receiver) answer(s *socket, to netip.AddrPort, err error) {
	frame := ackFrame
	if err != nil {
		frame = negativeFrame
	}
	if err := s.write(frame, to); err != nil && !channel.IsClosed(err) {
		r.t.met.writeFailures.Inc()
	}
}

var ackFrame, negativeFrame = []byte(wire.Ack), []byte(wire.NegativeAck)

const (
	running = iota
	deferred
	ended
)

// pending is the end of one message. It implements channel.Deferrer.
type pending struct {
	r     *receiver
	s     *socket
	to    netip.AddrPort
	state atomic.Uint32
}

// Defer implements channel.Deferrer.
func (p *pending) Defer() func(error) {
	if !p.state.CompareAndSwap(running, deferred) {
		return func(error) {}
	}
	p.r.outstanding.Add(1)
	return func(err error) {
		if p.state.CompareAndSwap(deferred, ended) {
			p.r.outstanding.Add(-1)
			p.r.answer(p.s, p.to, err)
		}
	}
}
