package tcp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// ErrLocal is the fault of a destination that is this node itself.
var ErrLocal = errors.New("tcp: the destination is this node")

// Sender sends messages to other nodes. It implements channel.Sender.
//
// Results. A message without UseAck is sent when it stands in the buffer of an
// open connection; what is lost after that is counted in
// channel_send_lost_total. If there is no connection, Send waits until it has
// been written. A message with UseAck is sent when its acknowledgement has
// come. If the context ends before, Send returns its error and the message may
// still arrive.
//
// Retries. When a connection is lost, messages with UseAck are sent once more
// (SenderConfig.Retries) on a new one, byte for byte the same: a receiver may
// see them twice, with the same id. A negative acknowledgement or a time-out is
// final.
//
// With Message.Done set, the message and its body belong to the Sender until
// Done is called, since they may have to be sent again. Done may be called
// before Send has returned, and must not call Send: it runs in the goroutine
// that reads the acknowledgements which Send may wait for.
//
// A caller that waits may be the one that writes, and the one that reads its
// acknowledgement. It writes when little is in flight, so that the write does not
// block; if it does anyway, because the peer has stopped reading, Send overruns
// its context by the ack timeout at most. While it reads, the deadline of its
// context is kept, and a cancellation is noticed within a twentieth of the ack
// timeout.
//
// A Longhouse peer grants credit: no more is written than it has said it will
// take, and one that is slow but goes on does not run into the ack timeout.
//
// The options UDP and Multicast are carried and not acted on, see channel/udp:
// everything goes over TCP. Forget the members that have gone, each keeps a goroutine.
//
// Sending allocates nothing per message in the steady state, except toward
// members that are not pipelined when Done is set or there are several
// destinations: those take a goroutine each.
type Sender struct {
	cfg SenderConfig
	net transport.Net
	log *zap.Logger
	met senderMetrics

	ctx    context.Context // ends in Stop
	cancel context.CancelFunc
	wg     sync.WaitGroup // the clock and all goroutines of outlets
	clock  atomic.Int64   // time since begin in nanoseconds, renewed by tick
	begin  time.Time
	record atomic.Pointer[record]

	gate gate

	calls, flights sync.Pool // of *call, *flight

	mu      sync.RWMutex
	peers   map[peerKey]*peer // guarded by mu, as all below
	started bool
	stopped bool
}

// record is a member and its bytes on the wire.
type record struct {
	member channel.Member
	bytes  []byte
}

// peerKey identifies a connection's other end: a node that comes back has
// another id, a member without one is told by its address.
type peerKey struct {
	id   channel.UniqueID
	addr netip.AddrPort
}

// peer is what is kept for one member.
type peer struct {
	payload   string // that pipelined was read from
	pipelined bool
	out       outlet
}

// outlet is the way to one member: a pipe or a pool.
type outlet interface {
	// roundTrip sends m once and waits for its end.
	roundTrip(ctx context.Context, m *channel.Message) error
	// post accepts m and returns; c is told the end if post returned nil.
	// With wait it blocks for room, else it returns errFull.
	post(ctx context.Context, c *call, m *channel.Message, wait bool) error
	// drop accepts m, which nobody waits for, if that takes no waiting. With
	// inline the caller may write it, which can take long.
	drop(m *channel.Message, inline bool) bool
	// tick is called regularly.
	tick(now int64)
	// drain returns when nothing is in flight, or ctx ends.
	drain(ctx context.Context)
	// close ends everything in flight with err. It does not wait for
	// goroutines, they are in Sender.wg.
	close(err error)
	connections() int
}

// errFull says that something would have to be waited for.
var errFull = errors.New("tcp: the window is full")

type senderMetrics struct {
	messages, bytes, retries, lost, stalls, starved, refused, timeouts, negative, unexpected, connects, connectFailures *channel.Counter
}

const (
	// idleClose is after how long without traffic a connection is closed, well
	// before the receivers' own limit: a message must not meet their closing.
	idleClose = 4 * time.Minute
	// ticksPerTimeout is how finely the ack timeout is measured.
	ticksPerTimeout = 20
)

// NewSender returns a Sender that does nothing before Start. s.Net must be set.
func NewSender(c SenderConfig, s channel.Settings) *Sender {
	m := s.Metrics
	snd := &Sender{
		cfg: c, net: s.Net, log: logger(s), peers: map[peerKey]*peer{},
		met: senderMetrics{
			messages:        m.Counter("channel_send_messages_total", "Messages to be sent, one per destination."),
			bytes:           m.Counter("channel_send_bytes_total", "Bytes written."),
			retries:         m.Counter("channel_send_retries_total", "Messages sent again after their connection was lost."),
			lost:            m.Counter("channel_send_lost_total", "Messages that nobody waited for and that were lost with their connection."),
			stalls:          m.Counter("channel_send_stalls_total", "Messages that had to wait because the window of their destination was full."),
			starved:         m.Counter("channel_send_credit_stalls_total", "Times that messages had to wait until their destination had processed earlier ones."),
			refused:         m.Counter("channel_send_insecure_total", "Attempts to reach a member that were refused because one side speaks TLS and the other does not."),
			timeouts:        m.Counter("channel_send_timeouts_total", "Connections closed because the peer did not acknowledge or read in time."),
			negative:        m.Counter("channel_send_negative_total", "Negative acknowledgements received."),
			unexpected:      m.Counter("channel_send_unexpected_total", "Connections closed because the peer sent something else than the acknowledgement of a message."),
			connects:        m.Counter("channel_send_connections_total", "Connections opened."),
			connectFailures: m.Counter("channel_send_connect_failures_total", "Connections that could not be opened."),
		},
	}
	snd.ctx, snd.cancel = context.WithCancel(context.Background())
	m.Gauge("channel_send_connections", "Open connections to other nodes.", func() float64 { return float64(snd.connections()) })
	return snd
}

func (s *Sender) connections() int {
	n := 0
	for _, o := range s.outlets(nil) {
		n += o.connections()
	}
	return n
}

// Start prepares for sending. It does not connect.
func (s *Sender) Start(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopped:
		return fmt.Errorf("tcp: start sender: %w", channel.ErrClosed)
	case s.started:
		return errors.New("tcp: start sender: started already")
	}
	s.started, s.begin = true, time.Now()
	s.wg.Add(1)
	go s.tick()
	return nil
}

// tick is the goroutine that keeps the coarse clock and enforces time-outs.
func (s *Sender) tick() {
	defer s.wg.Done()
	every := max(s.cfg.AckTimeout/ticksPerTimeout, time.Millisecond)
	t := time.NewTicker(every)
	defer t.Stop()
	var outs []outlet
	for {
		select {
		case <-t.C:
		case <-s.ctx.Done():
			return
		}
		now := int64(time.Since(s.begin))
		s.clock.Store(now)
		outs = s.outlets(outs[:0])
		for _, o := range outs {
			o.tick(now)
		}
		clear(outs)
	}
}

func (s *Sender) outlets(dst []outlet) []outlet {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, p := range s.peers {
		dst = append(dst, p.out)
	}
	return dst
}

// Send implements channel.Sender.
func (s *Sender) Send(ctx context.Context, m *channel.Message) error {
	if len(m.To) == 0 {
		return fmt.Errorf("tcp: send: %w", channel.ErrNoMembers)
	}
	if size := wire.FrameSize(m); size > s.cfg.MaxFrame {
		return channel.Failed(m.To, fmt.Errorf("tcp: frame of %d bytes, max_frame is %d: %w", size, s.cfg.MaxFrame, channel.ErrTooLarge))
	}
	if !m.From.Host.IsValid() || wire.MemberSize(m.From) > wire.MaxMember {
		return channel.Failed(m.To, fmt.Errorf("tcp: the sender's member record has no host or more than %d bytes: %w", wire.MaxMember, channel.ErrBadMessage))
	}
	if err := ctx.Err(); err != nil {
		return channel.Failed(m.To, err)
	}
	switch {
	case m.Done != nil:
		return s.postAll(ctx, m)
	case len(m.To) == 1:
		if err := s.sendTo(ctx, m, m.To[0], 0); err != nil {
			return channel.Failed(m.To, err)
		}
		return nil
	}
	return s.sendAll(ctx, m)
}

// TrySend implements channel.TrySender.
func (s *Sender) TrySend(m *channel.Message) bool {
	if len(m.To) != 1 || m.Done != nil || m.Options.Has(channel.UseAck) || wire.FrameSize(m) > s.cfg.MaxFrame {
		return false
	}
	to := &m.To[0]
	s.mu.RLock()
	p := s.peers[peerKey{to.ID, to.Addr()}]
	running := s.started && !s.stopped
	s.mu.RUnlock()
	if p == nil || !running || p.payload != to.Payload || wire.MemberSize(m.From) > wire.MaxMember || !m.From.Host.IsValid() {
		return false
	}
	if !p.out.drop(m, false) {
		return false
	}
	s.met.messages.Inc()
	return true
}

// sendTo sends m to one member and waits, sending again as often as allowed;
// tries is how often that has been done.
func (s *Sender) sendTo(ctx context.Context, m *channel.Message, to channel.Member, tries int) error {
	s.met.messages.Inc()
	for {
		o, err := s.outlet(m, to)
		if err != nil {
			return err
		}
		err = o.roundTrip(ctx, m)
		if err == nil || !s.retryable(m, err, tries) {
			return err
		}
		tries++
		s.met.retries.Inc()
	}
}

func (s *Sender) retryable(m *channel.Message, err error, tries int) bool {
	return m.Options.Has(channel.UseAck) && tries < s.cfg.Retries && errors.Is(err, errLost)
}

// errLost marks errors after which a message may be sent again.
var errLost = fmt.Errorf("tcp: %w", channel.ErrDisconnected)

// sendAll sends m to several members at the same time and waits for all.
func (s *Sender) sendAll(ctx context.Context, m *channel.Message) error {
	f, ok := s.flights.Get().(*flight)
	if !ok {
		f = new(flight)
	}
	defer s.flights.Put(f)
	f.reset(len(m.To))
	for i, to := range m.To {
		o, err := s.outlet(m, to)
		if err != nil {
			f.errs[i] = err
			continue
		}
		if !m.Options.Has(channel.UseAck) && o.drop(m, false) {
			s.met.messages.Inc()
			continue
		}
		c := s.newCall()
		if err := o.post(ctx, c, m, false); err != nil { // it would block
			c.free()
			s.sendAside(ctx, f, i, m, 0)
			continue
		}
		s.met.messages.Inc()
		f.calls[i] = c
	}
	for i, c := range f.calls {
		if c == nil {
			continue
		}
		f.calls[i] = nil
		err := c.wait(ctx)
		if f.errs[i] = err; err != nil && s.retryable(m, err, 0) {
			s.met.retries.Inc()
			s.sendAside(ctx, f, i, m, 1)
		}
	}
	f.wg.Wait()
	return faults(m.To, f.errs)
}

func (s *Sender) sendAside(ctx context.Context, f *flight, i int, m *channel.Message, tries int) {
	f.wg.Add(1)
	go func() {
		defer f.wg.Done()
		f.errs[i] = s.sendTo(ctx, m, m.To[i], tries)
	}()
}

// faults returns nil or a SendError of the members with an error.
func faults(to []channel.Member, errs []error) error {
	var fs []channel.Fault
	for i, err := range errs {
		if err != nil {
			fs = append(fs, channel.Fault{Member: to[i], Err: err})
		}
	}
	if fs == nil {
		return nil
	}
	return &channel.SendError{Faults: fs}
}

// flight is the state of a Send to several members.
type flight struct {
	wg    sync.WaitGroup
	calls []*call
	errs  []error
}

func (f *flight) reset(n int) {
	if cap(f.calls) < n {
		f.calls, f.errs = make([]*call, n), make([]error, n)
	}
	f.calls, f.errs = f.calls[:n], f.errs[:n]
	clear(f.calls)
	clear(f.errs)
}

// postAll accepts a message whose end is told to m.Done.
func (s *Sender) postAll(ctx context.Context, m *channel.Message) error {
	g := groups.Get().(*group)
	g.m, g.left, g.accepted = m, len(m.To)+1, false
	// m and m.To belong to the group as soon as one member has accepted, and
	// may be gone once all are done: the one extra in left keeps them.
	var blocked []int
	for i, to := range m.To {
		if err := s.postTo(ctx, g, to, false); errors.Is(err, errFull) {
			blocked = append(blocked, i)
		} else if err != nil {
			g.fail(to, err)
		}
	}
	switch len(blocked) {
	case 0:
	case 1:
		s.postBlocked(ctx, g, m.To[blocked[0]])
	default:
		var wg sync.WaitGroup
		for _, i := range blocked {
			wg.Go(func() { s.postBlocked(ctx, g, m.To[i]) })
		}
		wg.Wait()
	}
	return g.end()
}

func (s *Sender) postBlocked(ctx context.Context, g *group, to channel.Member) {
	if err := s.postTo(ctx, g, to, true); err != nil {
		g.fail(to, err)
	}
}

func (s *Sender) postTo(ctx context.Context, g *group, to channel.Member, wait bool) error {
	o, err := s.outlet(g.m, to)
	if err != nil {
		return err
	}
	c := s.newCall()
	c.group, c.to = g, to
	if err := o.post(ctx, c, g.m, wait); err != nil {
		c.free()
		return err
	}
	s.met.messages.Inc()
	g.accept()
	return nil
}

// outlet returns the way to a member, making it if there is none.
func (s *Sender) outlet(m *channel.Message, to channel.Member) (outlet, error) {
	if to.Is(m.From) && to.Addr() == m.From.Addr() {
		return nil, ErrLocal
	}
	key := peerKey{to.ID, to.Addr()}
	s.mu.RLock()
	p, ok := s.peers[key]
	running := s.started && !s.stopped
	s.mu.RUnlock()
	switch {
	case !running:
		return nil, fmt.Errorf("tcp: the sender is not running: %w", channel.ErrClosed)
	case ok && p.payload == to.Payload:
		return p.out, nil
	case !to.Host.IsValid() || to.Port <= 0 || to.Port > 65535:
		return nil, fmt.Errorf("tcp: %s has no address to connect to: %w", to, channel.ErrNotMember)
	}
	return s.makeOutlet(m, key, to)
}

func (s *Sender) makeOutlet(m *channel.Message, key peerKey, to channel.Member) (outlet, error) {
	a, ours := to.Announcement()
	var credit int64
	if own, _ := m.From.Announcement(); own.Credited { // else the peer does not know that we understand
		credit = max(a.Credit, 0)
	}
	if err := s.security(to, a, ours); err != nil {
		return nil, err
	}
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return nil, fmt.Errorf("tcp: the sender is not running: %w", channel.ErrClosed)
	}
	old := s.peers[key]
	if old != nil && old.pipelined == a.Pipelined { // the payload says the same, or somebody was faster
		s.peers[key] = &peer{to.Payload, a.Pipelined, old.out}
		s.mu.Unlock()
		return old.out, nil
	}
	p := &peer{payload: to.Payload, pipelined: a.Pipelined}
	if a.Pipelined {
		p.out = newPipe(s, to, credit)
	} else {
		p.out = newPool(s, to)
	}
	s.peers[key] = p
	if old != nil {
		s.wg.Add(1)
	}
	s.mu.Unlock()
	if old != nil {
		go func() { // what it has accepted is still sent
			defer s.wg.Done()
			old.out.drain(s.ctx)
			old.out.close(errForgotten)
		}()
	}
	return p.out, nil
}

// ErrSecurity is the fault of a destination that speaks TLS while this node does
// not, or the reverse.
var ErrSecurity = errors.New("tcp: one side speaks TLS and the other does not")

// security refuses a Longhouse member that does not speak what we speak. Of
// others nothing is known: with TLS they will fail in the handshake, and never
// get anything in clear.
func (s *Sender) security(to channel.Member, a channel.Announcement, known bool) error {
	secured := channel.IsSecured(s.net)
	if !known || a.TLS == secured {
		return nil
	}
	s.met.refused.Inc()
	hint := "it has TLS, this node has none: set channel.tls here"
	if secured {
		hint = "it has no TLS: set channel.tls there"
	}
	if unlogged, ok := s.gate.open(); ok {
		s.log.Warn("a member cannot be reached", zap.Stringer("member", to), zap.String("reason", hint), zap.Int64("unlogged", unlogged))
	}
	return fmt.Errorf("%w: %s (%s)", ErrSecurity, to, hint)
}

var errForgotten = fmt.Errorf("tcp: the member has gone: %w", channel.ErrDisconnected)

// Describe implements channel.Describer.
func (s *Sender) Describe(_ *channel.Member, a *channel.Announcement) { a.Credited = true }

// recordOf returns the bytes of a sender's record. They are the same from one
// message to the next, mostly.
func (s *Sender) recordOf(m channel.Member) []byte {
	r := s.record.Load()
	if r == nil || r.member != m {
		r = &record{m, wire.AppendMember(nil, m)}
		s.record.Store(r)
	}
	return r.bytes
}

// Forget implements channel.Sender: it closes all connections to m. What is in
// flight to it fails.
func (s *Sender) Forget(m channel.Member) {
	key := peerKey{m.ID, m.Addr()}
	s.mu.Lock()
	p := s.peers[key]
	delete(s.peers, key)
	s.mu.Unlock()
	if p != nil {
		p.out.close(errForgotten)
	}
}

// Stop refuses new messages, waits within ctx until those accepted have ended,
// and closes all connections.
func (s *Sender) Stop(ctx context.Context) error {
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return nil
	}
	s.stopped = true
	s.mu.Unlock()
	outs := s.outlets(nil)
	for _, o := range outs {
		o.drain(ctx)
	}
	for _, o := range outs {
		o.close(channel.ErrClosed)
	}
	s.cancel()
	s.wg.Wait()
	return nil
}
