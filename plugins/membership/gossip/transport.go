package gossip

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/longhouse-go/longhouse/channel"
	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

const (
	// maxPacket is the largest datagram that is looked at, in bytes; what
	// memberlist sends is smaller.
	maxPacket = 4096
	// maxStreams bounds the connections of others that are open at once.
	maxStreams = 64
	// minReopen and maxReopen bound the pause before a socket that failed is
	// opened again.
	minReopen, maxReopen = 100 * time.Millisecond, 10 * time.Second
)

// carrier carries memberlist's packets and streams over a transport.Net. No lock
// is held across I/O.
type carrier struct {
	net       transport.Net
	log       *zap.Logger
	listen    netip.AddrPort // an invalid address means all of both families
	advertise netip.AddrPort
	counters  *counters

	packets chan *memberlist.Packet
	streams chan net.Conn
	ctx     context.Context // ends with Shutdown; the life of the component
	cancel  context.CancelFunc
	work    sync.WaitGroup // receive, accept

	mu       sync.Mutex // guards what follows; never held while blocking
	socket   transport.UDPConn
	listener transport.TCPListener
	open     map[*stream]struct{}
	inbound  int
	silent   bool // nothing is sent any more
}

var _ memberlist.NodeAwareTransport = (*carrier)(nil)

// newCarrier opens both sockets.
func newCarrier(n transport.Net, log *zap.Logger, listen, advertise netip.AddrPort, c *counters) (*carrier, error) {
	t := &carrier{
		net: n, log: log, listen: listen, advertise: advertise, counters: c,
		packets: make(chan *memberlist.Packet),
		streams: make(chan net.Conn),
		open:    map[*stream]struct{}{},
	}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	socket, err := t.listenUDP()
	if err != nil {
		t.cancel()
		return nil, err
	}
	listener, err := t.listenTCP()
	if err != nil {
		t.cancel()
		socket.Close()
		return nil, err
	}
	t.socket, t.listener = socket, listener
	t.work.Go(func() { t.receive(socket) })
	t.work.Go(func() { t.accept(listener) })
	return t, nil
}

// listenBoth listens on one address, or on all of both families; of IPv4 alone
// where there is no IPv6.
func listenBoth[T any](addr netip.AddrPort, listen func(netip.AddrPort) (T, error)) (T, error) {
	if addr.Addr().IsValid() {
		return listen(addr)
	}
	l, err := listen(netip.AddrPortFrom(netip.IPv6Unspecified(), addr.Port()))
	if err != nil && !channel.IsAddrInUse(err) {
		return listen(netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port()))
	}
	return l, err
}

func (t *carrier) listenUDP() (transport.UDPConn, error) {
	return listenBoth(t.listen, func(a netip.AddrPort) (transport.UDPConn, error) { return channel.ListenUDP(t.net, a) })
}

func (t *carrier) listenTCP() (transport.TCPListener, error) {
	return listenBoth(t.listen, func(a netip.AddrPort) (transport.TCPListener, error) { return channel.ListenTCP(t.net, a) })
}

// FinalAdvertiseAddr implements memberlist.Transport.
func (t *carrier) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.advertise.Addr().AsSlice(), int(t.advertise.Port()), nil
}

// PacketCh implements memberlist.Transport.
func (t *carrier) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh implements memberlist.Transport.
func (t *carrier) StreamCh() <-chan net.Conn { return t.streams }

// WriteTo implements memberlist.Transport.
func (t *carrier) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, fmt.Errorf("send to %q: %w", addr, err)
	}
	t.mu.Lock()
	socket, silent := t.socket, t.silent
	t.mu.Unlock()
	if socket == nil || silent {
		return time.Time{}, channel.ErrClosed
	}
	_, err = socket.WriteTo(b, net.UDPAddrFromAddrPort(to))
	if err != nil {
		t.counters.sendFailed.Inc()
		return time.Time{}, err
	}
	t.counters.packetsSent.Inc()
	t.counters.bytesSent.Add(int64(len(b)))
	return time.Now(), nil
}

// silence ends sending; what others answer is still received.
func (t *carrier) silence() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.silent = true
}

// WriteToAddress implements memberlist.NodeAwareTransport.
func (t *carrier) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

// DialTimeout implements memberlist.Transport.
func (t *carrier) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("connect to %q: %w", addr, err)
	}
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	conn, err := channel.Dial(ctx, t.net, to)
	if err != nil {
		return nil, err
	}
	if s := t.track(conn, false); s != nil {
		return s, nil
	}
	conn.Close()
	return nil, channel.ErrClosed
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *carrier) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

// stream is an open connection.
type stream struct {
	net.Conn
	carrier *carrier
	inbound bool
}

// track remembers a connection, so that Shutdown ends its use. It returns nil if
// the carrier has been shut down, or if there are too many.
func (t *carrier) track(conn net.Conn, inbound bool) *stream {
	s := &stream{conn, t, inbound}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx.Err() != nil || inbound && t.inbound >= maxStreams {
		return nil
	}
	t.open[s] = struct{}{}
	if inbound {
		t.inbound++
	}
	return s
}

// Close implements net.Conn. It works twice.
func (s *stream) Close() error {
	s.carrier.mu.Lock()
	_, open := s.carrier.open[s]
	delete(s.carrier.open, s)
	if open && s.inbound {
		s.carrier.inbound--
	}
	s.carrier.mu.Unlock()
	if !open {
		return nil
	}
	return s.Conn.Close()
}

// Write implements net.Conn.
func (s *stream) Write(b []byte) (int, error) {
	n, err := s.Conn.Write(b)
	s.carrier.counters.bytesSent.Add(int64(n))
	return n, err
}

// Shutdown implements memberlist.Transport: it ends all I/O and waits for it.
func (t *carrier) Shutdown() error {
	t.cancel()
	t.mu.Lock()
	socket, listener := t.socket, t.listener
	t.socket, t.listener = nil, nil
	open := slices.Collect(maps.Keys(t.open))
	t.mu.Unlock()
	if socket != nil {
		socket.Close()
	}
	if listener != nil {
		listener.Close()
	}
	for _, s := range open {
		s.Close()
	}
	t.work.Wait()
	return nil
}

// receive reads datagrams. A socket that fails is opened again.
func (t *carrier) receive(socket transport.UDPConn) {
	buf := make([]byte, maxPacket+1)
	pause := minReopen
	for {
		n, from, err := socket.ReadFrom(buf)
		if err == nil {
			pause = minReopen
			t.counters.packetsReceived.Inc()
			if n == 0 || n > maxPacket {
				t.counters.refused["size"].Inc()
				continue
			}
			select {
			case t.packets <- &memberlist.Packet{Buf: slices.Clone(buf[:n]), From: from, Timestamp: time.Now()}:
			case <-t.ctx.Done():
				return
			}
			continue
		}
		socket.Close() // a second time does no harm
		for {
			if t.ctx.Err() != nil || !channel.Pause(t.ctx, pause) {
				return
			}
			t.log.Warn("the socket of the gossip failed; opening it again", zap.Error(err))
			t.counters.reopened.Inc()
			pause = min(2*pause, maxReopen)
			if socket, err = t.listenUDP(); err == nil {
				break
			}
		}
		t.mu.Lock()
		closed := t.ctx.Err() != nil
		if !closed {
			t.socket = socket
		}
		t.mu.Unlock()
		if closed {
			socket.Close()
			return
		}
	}
}

// accept takes connections. A listener that fails is opened again.
func (t *carrier) accept(listener transport.TCPListener) {
	pause := minReopen
	for {
		conn, err := listener.Accept()
		if err == nil {
			pause = minReopen
			s := t.track(conn, true)
			if s == nil {
				conn.Close()
				t.counters.refused["streams"].Inc()
				continue
			}
			select {
			case t.streams <- s:
			case <-t.ctx.Done():
				s.Close()
				return
			}
			continue
		}
		if t.ctx.Err() != nil || !channel.Pause(t.ctx, pause) {
			return
		}
		pause = min(2*pause, maxReopen)
		if channel.IsTemporary(err) {
			continue
		}
		t.log.Warn("the listener of the gossip failed; opening it again", zap.Error(err))
		t.counters.reopened.Inc()
		listener.Close()
		next, err := t.listenTCP()
		if err != nil {
			continue
		}
		t.mu.Lock()
		closed := t.ctx.Err() != nil
		if !closed {
			listener, t.listener = next, next
		}
		t.mu.Unlock()
		if closed {
			next.Close()
			return
		}
	}
}

var errNoAddress = errors.New("the local member has no address that others could reach; set the receiver's address")
