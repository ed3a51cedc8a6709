package udp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// MaxFrame is the largest frame that fits into a datagram, in bytes.
const MaxFrame = 65507

// Config configures a [Transport].
type Config struct {
	// Port is the first port to try for receiving datagrams; 0 for none.
	Port int
	// AutoBind is how many ports are tried, Port being the first.
	AutoBind int
	// Multicast is the group for messages with the option Multicast, usually
	// that of the membership; without a Group there is none.
	Multicast channel.MulticastConfig
	// AckTimeout bounds the wait for an acknowledgement.
	AckTimeout time.Duration
	// Retries is how often a message without an answer is sent again. A member
	// that is known to recognise repetitions is sent one every ResendAfter
	// until AckTimeout instead.
	Retries     int
	ResendAfter time.Duration
	// MaxWaiting bounds the messages that wait for acknowledgements at a time;
	// further ones wait for them. Each has a socket of its own: acknowledgements
	// carry no id.
	MaxWaiting int
	// MaxOutstanding bounds the received messages whose processing was deferred
	// and has not ended; further ones that ask for it are dropped.
	MaxOutstanding int
	// ReadBuffer is what the system is asked to keep of datagrams that have not
	// been read, in bytes; it may give less.
	ReadBuffer int
}

// DefaultConfig returns a Config without port and group: 3 s for an
// acknowledgement, one repetition, or one every 200 ms; 64 messages that wait
// and 4096 that are deferred; 4 MiB of buffer.
func DefaultConfig() Config {
	return Config{
		AutoBind: 100, AckTimeout: 3 * time.Second, Retries: 1, ResendAfter: 200 * time.Millisecond,
		MaxWaiting: 64, MaxOutstanding: 4096, ReadBuffer: 4 << 20,
	}
}

// Validate returns all problems, joined.
func (c Config) Validate() error {
	var errs []error
	within := func(field string, v, low, high int) {
		if v < low || v > high {
			errs = append(errs, fmt.Errorf("udp: %s: %d is outside %d..%d", field, v, low, high))
		}
	}
	within("port", c.Port, 0, 65535)
	within("auto_bind", c.AutoBind, 1, 65536)
	within("retries", c.Retries, 0, 100)
	within("max_waiting", c.MaxWaiting, 1, 1<<16)
	within("max_outstanding", c.MaxOutstanding, 1, 1<<20)
	within("read_buffer", c.ReadBuffer, 64<<10, 1<<30)
	if c.AckTimeout < time.Millisecond || c.ResendAfter < time.Millisecond {
		errs = append(errs, errors.New("udp: ack_timeout and resend_after must be at least 1ms"))
	}
	if g := c.Multicast.Group; g.IsValid() && (!g.Addr().Unmap().Is4() || !g.Addr().IsMulticast() || g.Port() == 0) {
		errs = append(errs, fmt.Errorf("udp: multicast: %s is not an IPv4 multicast address with a port", g))
	}
	return errors.Join(errs...)
}

// Transport owns the sockets that a node sends and receives datagrams with. Use
// each of Sender and Receiver once.
type Transport struct {
	cfg Config
	net transport.Net
	log *zap.Logger
	met metrics

	self    atomic.Pointer[channel.UniqueID] // of this node, once it is known
	lastLog atomic.Int64

	mu    sync.Mutex
	port  *socket // guarded by mu, as all below; for datagrams to this node
	group *socket // for those to the group
}

type metrics struct {
	sent, received, multicastSent, multicastReceived *channel.Counter
	resent, timeouts, negative, unexpected, panics   *channel.Counter
	writeFailures                                    *channel.Counter
	refused                                          map[string]*channel.Counter
}

// Why a datagram was refused, besides the reasons of package wire; values of the
// label reason of channel_udp_refused_total.
const (
	refusedTruncated   = "truncated"       // it ends before its frame does
	refusedUnwanted    = "unexpected_ack"  // an acknowledgement, which only senders get
	refusedOutstanding = "max_outstanding" // see Config.MaxOutstanding
	refusedEmpty       = "empty"
)

// New returns a Transport without any effect before Start. s.Net must be set.
func New(c Config, s channel.Settings) *Transport {
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	m := s.Metrics
	t := &Transport{cfg: c, net: s.Net, log: s.Logger, met: metrics{
		sent:              m.Counter("channel_udp_send_messages_total", "Messages to be sent as datagrams, one per destination."),
		received:          m.Counter("channel_udp_receive_messages_total", "Messages received as datagrams."),
		multicastSent:     m.Counter("channel_multicast_send_messages_total", "Messages sent to the group."),
		multicastReceived: m.Counter("channel_multicast_receive_messages_total", "Messages received from the group."),
		resent:            m.Counter("channel_udp_resends_total", "Datagrams sent again because there was no answer."),
		timeouts:          m.Counter("channel_udp_timeouts_total", "Messages that were not acknowledged in time."),
		negative:          m.Counter("channel_udp_negative_total", "Negative acknowledgements received."),
		unexpected:        m.Counter("channel_udp_unexpected_total", "Datagrams from elsewhere, or with something else, where an acknowledgement was expected."),
		panics:            m.Counter("channel_udp_panics_total", "Messages whose handler panicked."),
		writeFailures:     m.Counter("channel_udp_write_failures_total", "Datagrams that could not be handed to the network."),
		refused:           map[string]*channel.Counter{},
	}}
	reasons := []string{refusedTruncated, refusedUnwanted, refusedOutstanding, refusedEmpty}
	for _, e := range wire.Errors() {
		if e.Reason != refusedTruncated {
			reasons = append(reasons, e.Reason)
		}
	}
	for _, r := range reasons {
		t.met.refused[r] = m.Counter("channel_udp_refused_total", "Datagrams refused, by reason.", "reason", r)
	}
	return t
}

// socket is a datagram socket. The real one can do without allocating addresses.
type socket struct {
	conn transport.UDPConn
	fast fastConn // or nil
}

type fastConn interface {
	ReadFromUDPAddrPort(b []byte) (n int, addr netip.AddrPort, err error)
	WriteToUDPAddrPort(b []byte, addr netip.AddrPort) (int, error)
}

func newSocket(c transport.UDPConn, buffer int) *socket {
	s := &socket{conn: c}
	s.fast, _ = c.(fastConn)
	if buffer > 0 {
		_ = c.SetReadBuffer(buffer) // as much as we may have
	}
	return s
}

func (s *socket) read(b []byte) (int, netip.AddrPort, error) {
	if s.fast != nil {
		n, from, err := s.fast.ReadFromUDPAddrPort(b)
		return n, unmap(from), err
	}
	n, from, err := s.conn.ReadFrom(b)
	if a, ok := from.(*net.UDPAddr); ok {
		return n, unmap(a.AddrPort()), err
	}
	return n, netip.AddrPort{}, err
}

func (s *socket) write(b []byte, to netip.AddrPort) error {
	if s.fast != nil {
		_, err := s.fast.WriteToUDPAddrPort(b, to)
		return err
	}
	_, err := s.conn.WriteTo(b, net.UDPAddrFromAddrPort(to))
	return err
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// logEvery is the least time between two log entries about misbehaviour.
const logEvery = 10 * time.Second

func (t *Transport) warn(what string, fields ...zap.Field) {
	now, last := time.Now().UnixNano(), t.lastLog.Load()
	if (last == 0 || now-last >= int64(logEvery)) && t.lastLog.CompareAndSwap(last, now) {
		t.log.Warn(what, fields...)
	}
}
