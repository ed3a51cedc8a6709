package udp

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// sender is a channel.Sender around another one.
type sender struct {
	channel.Sender
	try    channel.TrySender // the same, or nil
	t      *Transport
	ctx    context.Context // ends in Stop
	cancel context.CancelFunc
	slots  chan struct{} // a token per message that waits

	mu      sync.Mutex
	plain   *socket // guarded by mu, as all below; for datagrams without acknowledgement
	busy    sync.WaitGroup
	stopped bool
}

// Sender returns a sender that sends messages with the options UDP and Multicast
// as datagrams. Of such a message without UseAck, and of every message to the
// group, success means no more than that it has been handed to the network.
func (t *Transport) Sender(next channel.Sender) channel.Sender {
	s := &sender{Sender: next, t: t, slots: make(chan struct{}, t.cfg.MaxWaiting)}
	s.try, _ = next.(channel.TrySender)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Describe implements channel.Describer.
func (s *sender) Describe(m *channel.Member, a *channel.Announcement) {
	if d, ok := s.Sender.(channel.Describer); ok {
		d.Describe(m, a)
	}
}

var buffers = sync.Pool{New: func() any { return new([]byte) }}

// Send implements channel.Sender. Messages with the option Multicast go to
// everybody in the group, whatever m.To says.
func (s *sender) Send(ctx context.Context, m *channel.Message) error {
	if m.Options&(channel.UDP|channel.Multicast) == 0 {
		return s.Sender.Send(ctx, m)
	}
	if size := wire.FrameSize(m); size > MaxFrame {
		return channel.Failed(m.To, fmt.Errorf("udp: frame of %d bytes, a datagram carries %d: %w", size, MaxFrame, channel.ErrTooLarge))
	}
	if !m.From.Host.IsValid() {
		return channel.Failed(m.To, fmt.Errorf("udp: the sender's member record has no host: %w", channel.ErrBadMessage))
	}
	if err := ctx.Err(); err != nil {
		return channel.Failed(m.To, err)
	}
	if !s.enter() {
		return channel.Failed(m.To, fmt.Errorf("udp: the sender is not running: %w", channel.ErrClosed))
	}
	acks := m.Options.Has(channel.UseAck) && !m.Options.Has(channel.Multicast)
	if acks && m.Done != nil {
		go func() { // m is ours until Done is told
			defer s.busy.Done()
			m.Done.Complete(m, s.toMembers(s.ctx, m))
		}()
		return nil
	}
	defer s.busy.Done()
	var err error
	switch {
	case m.Options.Has(channel.Multicast):
		err = s.toGroup(m)
	case acks:
		return s.toMembers(ctx, m)
	default:
		err = s.toMembers(ctx, m)
	}
	if err == nil && m.Done != nil {
		m.Done.Complete(m, nil)
	}
	return err
}

// TrySend implements channel.TrySender.
func (s *sender) TrySend(m *channel.Message) bool {
	return m.Options&(channel.UDP|channel.Multicast) == 0 && s.try != nil && s.try.TrySend(m)
}

func (s *sender) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	s.busy.Add(1)
	return true
}

func (s *sender) toGroup(m *channel.Message) error {
	s.t.mu.Lock()
	group := s.t.group
	s.t.mu.Unlock()
	if group == nil {
		return channel.Failed(m.To, fmt.Errorf("udp: no group for messages with the option multicast: %w", channel.ErrNotConfigured))
	}
	frame := buffers.Get().(*[]byte)
	defer buffers.Put(frame)
	*frame = wire.AppendFrame((*frame)[:0], m)
	if err := group.write(*frame, s.t.cfg.Multicast.Group); err != nil {
		s.t.met.writeFailures.Inc()
		return channel.Failed(m.To, fmt.Errorf("udp: send to the group: %w", err))
	}
	s.t.met.multicastSent.Inc()
	return nil
}

// toMembers sends m to every member; all that ask for it are waited for at the
// same time.
func (s *sender) toMembers(ctx context.Context, m *channel.Message) error {
	frame := buffers.Get().(*[]byte)
	defer buffers.Put(frame)
	*frame = wire.AppendFrame((*frame)[:0], m)
	if len(m.To) == 1 {
		if err := s.toMember(ctx, m, *frame, m.To[0]); err != nil {
			return channel.Failed(m.To, err)
		}
		return nil
	}
	errs := make([]error, len(m.To))
	if !m.Options.Has(channel.UseAck) {
		for i, to := range m.To {
			errs[i] = s.toMember(ctx, m, *frame, to)
		}
	} else {
		var wg sync.WaitGroup
		for i, to := range m.To {
			wg.Go(func() { errs[i] = s.toMember(ctx, m, *frame, to) })
		}
		wg.Wait()
	}
	var faults []channel.Fault
	for i, err := range errs {
		if err != nil {
			faults = append(faults, channel.Fault{Member: m.To[i], Err: err})
		}
	}
	if faults == nil {
		return nil
	}
	return &channel.SendError{Faults: faults}
}

func (s *sender) toMember(ctx context.Context, m *channel.Message, frame []byte, to channel.Member) error {
	if to.UDPPort <= 0 || to.UDPPort > 65535 || !to.Host.IsValid() {
		return fmt.Errorf("udp: %s has no UDP port (set receiver.udp_port there): %w", to, channel.ErrNotMember)
	}
	s.t.met.sent.Inc()
	addr := netip.AddrPortFrom(to.Host, uint16(to.UDPPort))
	if m.Options.Has(channel.UseAck) {
		return s.exchange(ctx, m, frame, to, addr)
	}
	sock, err := s.plainSocket(m.From.Host)
	if err == nil {
		err = sock.write(frame, addr)
	}
	if err != nil {
		s.t.met.writeFailures.Inc()
		return fmt.Errorf("udp: send to %s: %w", addr, err)
	}
	return nil
}

// plainSocket returns the socket for datagrams that nobody answers.
func (s *sender) plainSocket(host netip.Addr) (*socket, error) {
	s.mu.Lock()
	sock := s.plain
	s.mu.Unlock()
	if sock != nil {
		return sock, nil
	}
	sock, err := s.open(host)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	if s.plain == nil && !s.stopped {
		s.plain = sock
		s.mu.Unlock()
		return sock, nil
	}
	other := s.plain // somebody was faster
	s.mu.Unlock()
	sock.conn.Close()
	if other == nil {
		return nil, channel.ErrClosed
	}
	return other, nil
}

func (s *sender) open(host netip.Addr) (*socket, error) {
	c, err := channel.ListenUDP(s.t.net, netip.AddrPortFrom(host, 0))
	if err != nil {
		return nil, err
	}
	return newSocket(c, 0), nil
}

// exchange sends a datagram until it is acknowledged.
func (s *sender) exchange(ctx context.Context, m *channel.Message, frame []byte, to channel.Member, addr netip.AddrPort) error {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return ctx.Err()
	case <-s.ctx.Done():
		return channel.ErrClosed
	}
	// A new one every time: an answer that the network doubles must not be taken
	// for that to the next message.
	sock, err := s.open(m.From.Host)
	if err != nil {
		return fmt.Errorf("udp: %w", err)
	}
	defer sock.conn.Close()
	until := func() { _ = sock.conn.SetReadDeadline(time.Unix(1, 0)) }
	defer context.AfterFunc(ctx, until)()
	defer context.AfterFunc(s.ctx, until)()
	answer, err := s.talk(ctx, sock, frame, to, addr)
	switch {
	case err == nil && answer == wire.NegativeAckFrame:
		s.t.met.negative.Inc()
		return channel.ErrNegativeAck
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case s.ctx.Err() != nil:
		return channel.ErrClosed
	case channel.IsTimeout(err):
		s.t.met.timeouts.Inc()
		return fmt.Errorf("udp: %s: %w", addr, channel.ErrAckTimeout)
	}
	return fmt.Errorf("udp: %s: %w: %w", addr, channel.ErrDisconnected, err)
}

// talk returns the answer to a datagram.
func (s *sender) talk(ctx context.Context, sock *socket, frame []byte, to channel.Member, addr netip.AddrPort) (wire.Kind, error) {
	every := s.t.cfg.AckTimeout / time.Duration(s.t.cfg.Retries+1)
	if a, ok := to.Announcement(); ok && a.Pipelined { // a Longhouse node: it delivers once
		every = min(s.t.cfg.ResendAfter, every)
	}
	end := time.Now().Add(s.t.cfg.AckTimeout)
	for {
		if err := sock.write(frame, addr); err != nil {
			s.t.met.writeFailures.Inc()
			return 0, err
		}
		next := time.Now().Add(every)
		if next.After(end) {
			next = end
		}
		if err := sock.conn.SetReadDeadline(next); err != nil {
			return 0, err
		}
		if ctx.Err() != nil || s.ctx.Err() != nil { // then that deadline may have replaced the one of the end
			return 0, context.Canceled
		}
		answer, err := s.await(sock, addr)
		if err == nil || !channel.IsTimeout(err) || ctx.Err() != nil || s.ctx.Err() != nil || !time.Now().Before(end) {
			return answer, err
		}
		s.t.met.resent.Inc()
	}
}

// await reads until an acknowledgement has come from addr, or the deadline.
func (s *sender) await(sock *socket, addr netip.AddrPort) (wire.Kind, error) {
	var b [256]byte
	var m channel.Message
	for {
		n, from, err := sock.read(b[:])
		if err != nil {
			return 0, err
		}
		kind, size, derr := wire.DecodeFrame(b[:n], len(b), &m)
		if from == unmap(addr) && derr == nil && size == n && (kind == wire.AckFrame || kind == wire.NegativeAckFrame) {
			return kind, nil
		}
		s.t.met.unexpected.Inc()
	}
}

// Stop implements channel.Sender.
func (s *sender) Stop(ctx context.Context) error {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.busy.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	s.cancel()
	<-done
	s.mu.Lock()
	plain := s.plain
	s.plain = nil
	s.mu.Unlock()
	if plain != nil {
		plain.conn.Close() // nothing is waiting in it
	}
	return s.Sender.Stop(ctx)
}
