package tcp

import (
	"context"
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

// Receiver accepts connections and delivers the messages that come on them, one
// goroutine and one order per connection. It implements channel.Receiver.
//
// Acknowledgements: a message with UseAck alone is acknowledged before it is
// delivered, one with UseAck and SyncAck after deliver returned or, if
// channel.Message.Defer was called, after the deferred end. They are sent in
// the order of the messages.
//
// The first breach of the format closes the connection it came on and no other.
type Receiver struct {
	cfg ReceiverConfig
	net transport.Net
	log *zap.Logger
	met receiverMetrics

	held                  atomic.Int64 // bytes of read buffers, all connections
	credits               atomic.Bool  // senders are told of credit, see Describe
	refuseGate, panicGate gate
	deliver               func(context.Context, *channel.Message) error
	ctx                   context.Context // of deliver; ends when Stop is out of patience
	cancel                context.CancelFunc
	wg                    sync.WaitGroup // accept loop and connections
	mu                    sync.Mutex
	listener              transport.TCPListener // guarded by mu, as all below
	inbounds              map[*inbound]struct{}
	started               bool
	stopped               bool
	progress, progressed  chan struct{} // end tellProgress; its end
}

type receiverMetrics struct {
	messages, bytes, negative, panics, accepted, lateDefer, grants, stalls *channel.Counter
	refused                                                                map[string]*channel.Counter
}

// Why a connection was closed by us, besides the reasons of package wire; these
// are values of the label reason of channel_receive_refused_total.
const (
	refusedConnections = "max_connections"
	refusedSilent      = "silent"       // nothing came at first
	refusedStalled     = "stalled"      // the rest of a frame did not come
	refusedIdle        = "idle"         // nothing came for long
	refusedMidFrame    = "mid_frame"    // the connection ended inside a frame
	refusedMemory      = "max_buffered" // see ReceiverConfig.MaxBuffered
	refusedOutstanding = "max_outstanding"
	refusedAcks        = "acks_not_taken"
	refusedUnwanted    = "unexpected_ack" // an acknowledgement, which only senders get
	refusedSender      = "sender_changed" // messages of two nodes on one connection
)

const (
	// logEvery is the least time between two log entries about the same kind
	// of misbehaviour.
	logEvery = 10 * time.Second
	// stopGrace is how long Stop waits for deliver after its context ended
	// and that of deliver was cancelled.
	stopGrace = time.Second
)

// NewReceiver returns a Receiver that does nothing before Listen. s.Net must be
// set.
func NewReceiver(c ReceiverConfig, s channel.Settings) *Receiver {
	r := &Receiver{cfg: c, net: s.Net, log: logger(s), inbounds: map[*inbound]struct{}{}}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	m := s.Metrics
	r.met = receiverMetrics{
		messages:  m.Counter("channel_receive_messages_total", "Messages received."),
		bytes:     m.Counter("channel_receive_bytes_total", "Bytes received."),
		negative:  m.Counter("channel_receive_negative_total", "Messages acknowledged negatively."),
		panics:    m.Counter("channel_receive_panics_total", "Messages whose handler panicked."),
		accepted:  m.Counter("channel_receive_connections_total", "Connections accepted."),
		lateDefer: m.Counter("channel_receive_late_defer_total", "Calls of Defer after the message had ended."),
		grants:    m.Counter("channel_receive_grants_total", "Times that a sender was given credit for more bytes, or told of progress."),
		stalls:    m.Counter("channel_receive_stalls_total", "Times that a connection was not read because too many of its messages had not ended."),
		refused:   map[string]*channel.Counter{},
	}
	reasons := []string{
		refusedConnections, refusedSilent, refusedStalled, refusedIdle, refusedMidFrame,
		refusedMemory, refusedOutstanding, refusedAcks, refusedUnwanted, refusedSender,
	}
	for _, e := range wire.Errors() {
		reasons = append(reasons, e.Reason)
	}
	for _, reason := range reasons {
		r.met.refused[reason] = m.Counter("channel_receive_refused_total", "Connections closed by the receiver, by reason.", "reason", reason)
	}
	m.Gauge("channel_receive_connections", "Open connections.", func() float64 { return float64(r.connections()) })
	m.Gauge("channel_receive_buffered_bytes", "Memory of the read buffers.", func() float64 { return float64(r.held.Load()) })
	return r
}

func logger(s channel.Settings) *zap.Logger {
	if s.Logger == nil {
		return zap.NewNop()
	}
	return s.Logger
}

func (r *Receiver) connections() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.inbounds)
}

// Listen binds the first free port and returns the address to announce. It does
// not accept yet.
func (r *Receiver) Listen(context.Context) (netip.AddrPort, error) {
	bind, announce, err := r.addresses()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("tcp: listen: %w", err)
	}
	r.mu.Lock()
	busy := r.listener != nil || r.stopped
	r.mu.Unlock()
	if busy {
		return netip.AddrPort{}, errors.New("tcp: listen: the receiver listens already or has been stopped")
	}
	l, err := r.bind(bind)
	if err != nil {
		return netip.AddrPort{}, err
	}
	a, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		l.Close()
		return netip.AddrPort{}, fmt.Errorf("tcp: listen: the network returned the address %v, which is not a TCP one", l.Addr())
	}
	r.mu.Lock()
	r.listener = l
	r.mu.Unlock()
	return netip.AddrPortFrom(announce, uint16(a.Port)), nil
}

// bind tries the configured ports in turn.
func (r *Receiver) bind(host netip.Addr) (transport.TCPListener, error) {
	last := min(r.cfg.Port+r.cfg.AutoBind-1, 65535)
	if r.cfg.Port == 0 {
		last = 0
	}
	var err error
	for port := r.cfg.Port; port <= last; port++ {
		var l transport.TCPListener
		if l, err = channel.ListenTCP(r.net, netip.AddrPortFrom(host, uint16(port))); err == nil {
			return l, nil
		}
		if !channel.IsAddrInUse(err) {
			return nil, fmt.Errorf("tcp: listen: %w", err)
		}
	}
	return nil, fmt.Errorf("tcp: listen: no free port in %d..%d on %s (raise auto_bind or choose another port): %w", r.cfg.Port, last, host, err)
}

// addresses returns the address to bind and the one to announce.
func (r *Receiver) addresses() (bind, announce netip.Addr, err error) {
	if r.cfg.Address == AutoAddress {
		bind, err = firstAddress(r.net)
		return bind, bind, err
	}
	if bind, err = netip.ParseAddr(r.cfg.Address); err != nil {
		return bind, bind, fmt.Errorf("address %q: %w", r.cfg.Address, err)
	}
	announce = bind
	if bind.IsUnspecified() {
		announce, err = firstAddress(r.net)
	}
	return bind, announce, err
}

// firstAddress returns the first IPv4 address that is not a loopback one, of an
// interface that is up; 127.0.0.1 if there is none.
func firstAddress(n transport.Net) (netip.Addr, error) {
	all, err := n.Interfaces()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list the network interfaces: %w", err)
	}
	for _, ifi := range all {
		if ifi.Flags&net.FlagUp == 0 || ifi.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := ifi.Addrs()
		if err != nil {
			continue // an interface without addresses
		}
		for _, a := range addrs {
			ipnet, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			if ip, ok := netip.AddrFromSlice(ipnet.IP.To4()); ok && !ip.IsLoopback() {
				return ip, nil
			}
		}
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1}), nil
}

// Start accepts connections. deliver is called in order per connection; its
// error, or a panic, becomes a negative acknowledgement where one is wanted.
// The context that it is given ends when Stop runs out of time.
func (r *Receiver) Start(_ context.Context, deliver func(context.Context, *channel.Message) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.stopped:
		return fmt.Errorf("tcp: start receiver: %w", channel.ErrClosed)
	case r.listener == nil:
		return errors.New("tcp: start receiver: Listen was not called or failed")
	case r.started:
		return errors.New("tcp: start receiver: started already")
	}
	r.started, r.deliver = true, deliver
	r.wg.Add(1)
	go r.accept(r.listener)
	if r.cfg.WindowBytes > 0 {
		r.progress, r.progressed = make(chan struct{}), make(chan struct{})
		go r.tellProgress(r.progress)
	}
	return nil
}

// Describe implements channel.Describer.
func (r *Receiver) Describe(m *channel.Member, a *channel.Announcement) {
	a.TLS = channel.IsSecured(r.net)
	if a.Pipelined { // else connections have one message in flight, and nobody reads anything but its acknowledgement
		a.Credit = int64(r.cfg.WindowBytes)
	}
	r.credits.Store(a.Pipelined)
	if a.TLS {
		m.SecurePort = m.Port
	}
}

// progressEvery is how often the senders of messages that take long are told
// that they go on: half of the least ack timeout that makes sense.
const progressEvery = 500 * time.Millisecond

// tellProgress is the goroutine that tells senders of messages that have ended,
// so that a slow node does not look like a dead one.
func (r *Receiver) tellProgress(end <-chan struct{}) {
	defer close(r.progressed)
	t := time.NewTicker(progressEvery)
	defer t.Stop()
	var open []*inbound
	for {
		select {
		case <-t.C:
		case <-end:
			return
		}
		r.mu.Lock()
		for c := range r.inbounds {
			open = append(open, c)
		}
		r.mu.Unlock()
		for _, c := range open {
			c.progress()
		}
		clear(open)
		open = open[:0]
	}
}

// accept is the goroutine that owns the listener's Accept.
func (r *Receiver) accept(l transport.TCPListener) {
	defer r.wg.Done()
	pause := 5 * time.Millisecond
	for {
		c, err := l.Accept()
		if err == nil {
			pause = 5 * time.Millisecond
			r.admit(c)
			continue
		}
		if r.isStopped() || channel.IsClosed(err) {
			return
		}
		// Out of file handles, or the like: existing connections go on.
		r.log.Warn("accepting a connection failed, trying again", zap.Error(err), zap.Duration("in", pause))
		if !channel.Pause(r.ctx, pause) {
			return
		}
		pause = min(2*pause, time.Second)
	}
}

func (r *Receiver) isStopped() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stopped
}

// admit starts the goroutine of a new connection, or closes it.
func (r *Receiver) admit(nc net.Conn) {
	c := newInbound(r, nc)
	r.mu.Lock()
	full := len(r.inbounds) >= r.cfg.MaxConnections
	ok := !full && !r.stopped
	if ok {
		r.inbounds[c] = struct{}{}
		r.wg.Add(1)
	}
	r.mu.Unlock()
	if !ok {
		nc.Close()
		if full {
			r.refuse(nc, refusedConnections, nil)
		}
		return
	}
	r.met.accepted.Inc()
	go func() {
		defer r.wg.Done()
		c.run()
		r.mu.Lock()
		delete(r.inbounds, c)
		r.mu.Unlock()
	}()
}

// refuse counts a connection that was closed for a reason, and logs it unless
// that was done a short while ago.
func (r *Receiver) refuse(nc net.Conn, reason string, err error) {
	r.met.refused[reason].Inc()
	if reason == refusedIdle {
		return // ordinary
	}
	if unlogged, ok := r.refuseGate.open(); ok {
		r.log.Warn("closed a connection to the channel port", zap.Stringer("remote", nc.RemoteAddr()),
			zap.String("reason", reason), zap.Error(err), zap.Int64("unlogged", unlogged))
	}
}

// gate bounds how often something is logged.
type gate struct{ last, missed atomic.Int64 }

// open reports whether it may be logged now, and how often it could not be since
// the last time.
func (g *gate) open() (missed int64, ok bool) {
	now, last := time.Now().UnixNano(), g.last.Load()
	if last != 0 && now-last < int64(logEvery) || !g.last.CompareAndSwap(last, now) {
		g.missed.Add(1)
		return 0, false
	}
	return g.missed.Swap(0), true
}

// Stop closes the listener, lets every connection finish the messages it has
// read, sends what acknowledgements are due and closes the connections. When
// ctx ends first, the context of deliver is cancelled and connections are
// closed at once; an error then says that deliver did not return.
func (r *Receiver) Stop(ctx context.Context) error {
	r.mu.Lock()
	r.stopped = true
	progress := r.progress
	r.progress = nil
	l := r.listener
	r.listener = nil
	open := make([]*inbound, 0, len(r.inbounds))
	for c := range r.inbounds {
		open = append(open, c)
	}
	r.mu.Unlock()
	var err error
	if l != nil {
		if err = l.Close(); channel.IsClosed(err) {
			err = nil // the network was faster
		}
	}
	for _, c := range open {
		c.finish()
	}
	done := make(chan struct{})
	go func() {
		r.wg.Wait()
		close(done)
	}()
	defer r.cancel()
	if progress != nil { // after the others: messages that are being processed go on
		defer func() {
			close(progress)
			<-r.progressed
		}()
	}
	select {
	case <-done:
		return err
	case <-ctx.Done():
	}
	r.cancel()
	for _, c := range open {
		c.nc.Close()
	}
	t := time.NewTimer(stopGrace)
	defer t.Stop()
	select {
	case <-done:
		return err
	case <-t.C:
		return errors.Join(err, fmt.Errorf("tcp: stop receiver: a message handler ignores its context: %w", ctx.Err()))
	}
}
