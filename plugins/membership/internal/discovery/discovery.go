// Package discovery runs a membership whose nodes are found by asking somebody:
// a name server, the API of Kubernetes, a file. A Provider yields addresses; who
// is a member, and with which record, comes from talking to them.
//
// Every node sends its heartbeats, those of the multicast membership as unicast
// datagrams, to the addresses that were found; so ids, payload and domain are
// known, and liveness is measured:
//
//   - A look-up that fails changes nothing. An answer adds and removes addresses.
//   - An address that answers do not name any more is kept while a member lives
//     there, and after that is tried for a bounded time.
//   - A node that is heard without having been found is answered.
//   - The number of addresses is bounded.
//
// Apache Tomcat's CloudMembershipService sends no heartbeats: its nodes take for
// members what their look-ups name. With the option tomcat such nodes are
// members here too, with the id that Tomcat gives them (the MD5 of the pod's uid
// or of the address), while they are named and their receiver takes connections.
//
// It imports channel, its sub-packages and the heartbeats of the plugins next to
// it, and must not import core, interceptors, valves, fx, go-plugin or grpc.
package discovery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/heartbeat"
	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

// Peer is an address that was found.
type Peer struct {
	// Addr is where heartbeats go. Port 0 means that of the options.
	Addr netip.AddrPort
	// Identity is what a Tomcat node's id is made from, the uid of its pod.
	// Empty means the text of the address.
	Identity string
	// Since is when the node was started; zero if nobody knows.
	Since time.Time
}

// Provider finds addresses.
type Provider interface {
	// Run tells found, each time, all addresses there are, until ctx ends or it
	// fails. An error is a failed look-up: what was found stands, and Run is
	// called again after a pause. found does not block for long, and keeps
	// nothing of its argument.
	Run(ctx context.Context, found func([]Peer)) error
}

// Options are what all memberships of this kind have in common.
type Options struct {
	// Listen is the UDP address, host:port, that this node hears heartbeats on.
	// An empty host means all addresses; the host must be an IP address.
	Listen string `yaml:"listen"`
	// Port is the UDP port that the other nodes listen on, where a look-up does
	// not say it; 0 means the port of Listen.
	Port int `yaml:"port"`
	// Frequency is the time between heartbeats.
	Frequency time.Duration `yaml:"frequency"`
	// DropTime is the silence after which a member counts as lost.
	DropTime time.Duration `yaml:"drop_time"`
	// MaxAddresses bounds the addresses that heartbeats go to.
	MaxAddresses int `yaml:"max_addresses"`
	// RetryTime is how long heartbeats go on to an address that nobody names
	// any more and where no member lives.
	RetryTime time.Duration `yaml:"retry_time"`
	// Tomcat takes Tomcat nodes, which send no heartbeats, for members while
	// look-ups name them and their receiver can be connected to. Their TCP port
	// must be that of this node.
	Tomcat bool `yaml:"tomcat"`
	// Secret is at least 16 bytes of text that all nodes share. It seals
	// heartbeats and farewells, and those without a seal are refused.
	Secret secret.Text `yaml:"secret"`
	// SecretFile is a file of secrets, one per line, that must not be readable by
	// everybody: the first one seals, all are valid. It takes the place of Secret.
	SecretFile string `yaml:"secret_file"`
	// OldSecrets are valid, too. List the next secret here on all nodes before one
	// of them uses it, and the last one until none does any more.
	OldSecrets []secret.Text `yaml:"old_secrets"`
	// Unauthenticated are the addresses or networks, as 10.0.0.7 or 10.0.0.0/24,
	// whose nodes may be members without a seal though there is a secret.
	Unauthenticated []string `yaml:"unauthenticated"`
}

func (o *Options) security() heartbeat.Security {
	return heartbeat.Security{Secret: o.Secret, File: o.SecretFile, Old: o.OldSecrets, Unauthenticated: o.Unauthenticated}
}

// DefaultOptions returns the defaults.
func DefaultOptions() Options {
	return Options{
		Listen:       ":45565",
		Frequency:    500 * time.Millisecond,
		DropTime:     3 * time.Second,
		MaxAddresses: 256,
		RetryTime:    5 * time.Minute,
	}
}

const (
	// maxAddresses bounds MaxAddresses, as the channel bounds members.
	maxAddresses = 4096
	// minPause and maxPause bound the pause after a look-up that failed.
	minPause, maxPause = time.Second, 30 * time.Second
	// checks bounds the checks of Tomcat nodes that run at once, checkTimeout
	// each of them.
	checks       = 32
	checkTimeout = time.Second
	// queued is how many member events wait for the sink.
	queued = 64
)

// Validate reports all problems at once.
func (o *Options) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, err := parseListen(o.Listen); err != nil {
		fail("listen: %w", err)
	}
	if o.Port < 0 || o.Port > 65535 {
		fail("port: %d is outside 0..65535", o.Port)
	}
	if o.MaxAddresses < 1 || o.MaxAddresses > maxAddresses {
		fail("max_addresses: %d is outside 1..%d", o.MaxAddresses, maxAddresses)
	}
	if o.RetryTime < 0 || o.RetryTime > 24*time.Hour {
		fail("retry_time: %v is outside 0..24h", o.RetryTime)
	}
	errs = append(errs, heartbeat.CheckTimes(o.Frequency, o.DropTime), o.security().Validate())
	return errors.Join(errs...)
}

// parseListen reads host:port. The address is not valid if the host is empty.
func parseListen(s string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(s)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || n == 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is not host:port", s)
	}
	var addr netip.Addr
	if host != "" {
		if addr, err = netip.ParseAddr(host); err != nil {
			return netip.AddrPort{}, fmt.Errorf("%q: the host must be an IP address of this machine", s)
		}
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// listen opens the socket, for both families if no address is set.
func listen(n transport.Net, addr netip.AddrPort) (transport.UDPConn, error) {
	if addr.Addr().IsValid() {
		return channel.ListenUDP(n, addr)
	}
	conn, err := channel.ListenUDP(n, netip.AddrPortFrom(netip.IPv6Unspecified(), addr.Port()))
	if err != nil && !channel.IsAddrInUse(err) { // a machine without IPv6
		return channel.ListenUDP(n, netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port()))
	}
	return conn, err
}

// Membership implements channel.Membership.
type Membership struct {
	opts     Options
	provider Provider
	net      transport.Net
	log      *zap.Logger
	port     uint16
	beats    *heartbeat.Membership
	counters counters

	targets atomic.Pointer[[]net.Addr]
	sources *sources

	events  chan channel.MemberEvent // from the heartbeats
	answers chan []Peer              // from the provider
	results chan result              // of checks
	quit    chan struct{}            // ends run
	cancel  context.CancelFunc       // ends search and checks; set by New
	ctx     context.Context          // of search and checks: the life of the component
	work    sync.WaitGroup           // search, run and checks

	mu       sync.Mutex // guards what follows; never held while blocking
	launched bool
	stopped  bool
}

type counters struct {
	answers, failed, invalid, beyond, checksFailed *channel.Counter
}

// result is the result of a check.
type result struct {
	host netip.Addr
	err  error
}

// New returns a membership that has not started. p must not have begun to work.
func New(o Options, p Provider, s channel.Settings) (*Membership, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	addr, err := parseListen(o.Listen)
	if err != nil {
		return nil, err
	}
	m := &Membership{
		opts: o, provider: p, net: s.Net, log: s.Logger,
		port:    uint16(o.Port),
		sources: newSources(maxAddresses),
		events:  make(chan channel.MemberEvent, queued),
		answers: make(chan []Peer),
		results: make(chan result),
		quit:    make(chan struct{}),
	}
	if m.log == nil {
		m.log = zap.NewNop()
	}
	if m.port == 0 {
		m.port = addr.Port()
	}
	m.targets.Store(&[]net.Addr{})
	m.ctx, m.cancel = context.WithCancel(context.Background())
	const refused = "Addresses that look-ups named and that are not used, by reason."
	m.counters = counters{
		answers:      s.Metrics.Counter("membership_lookups_total", "Answers to look-ups of members."),
		failed:       s.Metrics.Counter("membership_lookup_errors_total", "Look-ups of members that failed; what was known stands."),
		invalid:      s.Metrics.Counter("membership_addresses_refused_total", refused, "reason", "invalid"),
		beyond:       s.Metrics.Counter("membership_addresses_refused_total", refused, "reason", "too_many"),
		checksFailed: s.Metrics.Counter("membership_check_errors_total", "Checks of Tomcat nodes that failed."),
	}
	s.Metrics.Gauge("membership_addresses", "Addresses that heartbeats go to.", func() float64 { return float64(len(*m.targets.Load())) })
	m.beats = heartbeat.New(heartbeat.Config{
		Frequency: o.Frequency,
		DropTime:  o.DropTime,
		Open: func() (transport.UDPConn, error) {
			conn, err := listen(s.Net, addr)
			if err != nil {
				return nil, err
			}
			return &noting{UDPConn: conn, sources: m.sources}, nil
		},
		Targets:  func() []net.Addr { return *m.targets.Load() },
		Security: o.security(),
	}, s)
	return m, nil
}

// Start implements channel.Membership. It does not wait for a look-up.
func (m *Membership) Start(ctx context.Context, local channel.Member, known []channel.Member, sink channel.MemberSink) error {
	b := newBook(m.opts.MaxAddresses, m.opts.RetryTime)
	g := newGuests(m.opts.DropTime, local.Port)
	now := time.Now()
	var talking []channel.Member
	for _, k := range known {
		if m.opts.Tomcat && k.Payload == "" {
			g.seed(k, now)
			continue
		}
		talking = append(talking, k)
		b.lives(k.Host, 1, now)
		b.hear(netip.AddrPortFrom(k.Host.Unmap(), m.port), now)
	}
	own := netip.AddrPortFrom(local.Host.Unmap(), m.port)
	m.publish(b, own)
	if err := m.beats.Start(ctx, local, talking, observer{m}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped {
		return fmt.Errorf("membership: start: %w", channel.ErrClosed)
	}
	m.launched = true
	m.work.Go(func() { m.run(b, g, own, talking, sink) })
	m.work.Go(m.search)
	return nil
}

// Update implements channel.Membership.
func (m *Membership) Update(ctx context.Context, local channel.Member) error {
	return m.beats.Update(ctx, local)
}

// Stop implements channel.Membership. It works twice and without Start.
func (m *Membership) Stop(ctx context.Context) error {
	m.cancel()
	err := m.beats.Stop(ctx) // run must go on meanwhile: it takes the last events
	m.mu.Lock()
	first := !m.stopped
	m.stopped = true
	m.mu.Unlock()
	if first {
		close(m.quit)
	}
	done := make(chan struct{})
	go func() { // ends with run, search and the checks
		m.work.Wait()
		close(done)
	}()
	select {
	case <-done:
		return err
	case <-ctx.Done():
		return errors.Join(err, fmt.Errorf("membership: stop: waiting for a look-up: %w", ctx.Err()))
	}
}

// observer hands the events of the heartbeats to run, which is the only one to
// call the sink.
type observer struct{ m *Membership }

// Observe implements channel.MemberSink.
func (o observer) Observe(ev channel.MemberEvent) {
	select {
	case o.m.events <- ev:
	case <-o.m.quit:
	}
}

// publish makes the addresses of b the targets of heartbeats.
func (m *Membership) publish(b *book, own netip.AddrPort) {
	targets := make([]net.Addr, 0, len(b.known))
	for _, a := range b.addresses() {
		if a != own {
			targets = append(targets, net.UDPAddrFromAddrPort(a))
		}
	}
	m.targets.Store(&targets)
}

// run owns the addresses and the Tomcat nodes, and is the only caller of sink.
func (m *Membership) run(b *book, g *guests, own netip.AddrPort, known []channel.Member, sink channel.MemberSink) {
	hosts := map[channel.UniqueID]netip.Addr{} // of the members that live
	for _, k := range known {
		hosts[k.ID] = k.Host.Unmap()
	}
	tick := time.NewTicker(max(10*time.Millisecond, m.opts.DropTime/6))
	defer tick.Stop()
	var events []channel.MemberEvent
	for {
		events = events[:0]
		var now time.Time
		select {
		case <-m.quit:
			return
		case ev := <-m.events:
			now = time.Now()
			if m.follow(b, hosts, ev, now) {
				m.publish(b, own)
			}
			if ev.Kind == channel.MemberAdded || ev.Kind == channel.MemberUpdated {
				events = g.replaced(events, ev.Member)
			}
			events = append(events, ev)
		case peers := <-m.answers:
			now = time.Now()
			invalid, beyond := b.answer(peers, now)
			m.counters.invalid.Add(int64(invalid))
			m.counters.beyond.Add(int64(beyond))
			m.publish(b, own)
			if m.opts.Tomcat {
				events = g.answer(events, named(b), own.Addr(), b.live, now)
			}
		case r := <-m.results:
			now = time.Now()
			if r.err != nil {
				m.counters.checksFailed.Inc()
			}
			events = g.checked(events, r.host, r.err, now)
		case <-tick.C:
			now = time.Now()
			if b.expire(now) {
				m.publish(b, own)
			}
			events = g.expire(events, now)
		}
		for _, ev := range events {
			sink.Observe(ev)
		}
		m.check(g, now)
	}
}

// named returns the addresses that the last answer named.
func named(b *book) (peers []Peer) {
	for _, e := range b.known {
		if e.missing.IsZero() {
			peers = append(peers, e.peer)
		}
	}
	return peers
}

// follow keeps book of where members live; it reports whether the addresses have
// changed.
func (m *Membership) follow(b *book, hosts map[channel.UniqueID]netip.Addr, ev channel.MemberEvent, now time.Time) bool {
	host, old := ev.Member.Host.Unmap(), hosts[ev.Member.ID]
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		if old != host {
			if old.IsValid() {
				b.lives(old, -1, now)
			}
			hosts[ev.Member.ID] = host
			b.lives(host, 1, now)
		}
		if b.hasHost(host) {
			return false
		}
		if from, ok := m.sources.of(host); ok {
			b.hear(from, now)
			return true
		}
	default:
		if old.IsValid() {
			delete(hosts, ev.Member.ID)
			b.lives(old, -1, now)
		}
	}
	return false
}

// check begins the checks of Tomcat nodes that are due.
func (m *Membership) check(g *guests, now time.Time) {
	if !m.opts.Tomcat || len(g.hosts) == 0 {
		return
	}
	running := 0
	for _, e := range g.hosts {
		if e.checking {
			running++
		}
	}
	for _, host := range g.due(now) {
		if running >= checks {
			return
		}
		running++
		g.hosts[host].checking = true
		addr := netip.AddrPortFrom(host, uint16(g.port))
		m.work.Go(func() { m.dial(addr) })
	}
}

// dial checks whether the receiver at addr takes connections.
func (m *Membership) dial(addr netip.AddrPort) {
	ctx, cancel := context.WithTimeout(m.ctx, checkTimeout)
	defer cancel()
	conn, err := channel.Dial(ctx, m.net, addr)
	if err == nil {
		conn.Close()
	}
	select {
	case m.results <- result{addr.Addr(), err}:
	case <-m.quit:
	}
}

// search runs the provider, again and again. The pauses grow until it has worked
// for a while.
func (m *Membership) search() {
	pause := minPause
	failed, well := false, false // what the log has been told since it has
	found := func(peers []Peer) {
		m.counters.answers.Inc()
		if failed && !well {
			m.log.Info("the look-up of members works again", zap.Int("addresses", len(peers)))
			well = true
		}
		filled := make([]Peer, len(peers))
		for i, p := range peers {
			if p.Addr.Port() == 0 {
				p.Addr = netip.AddrPortFrom(p.Addr.Addr(), m.port)
			}
			filled[i] = p
		}
		select {
		case m.answers <- filled:
		case <-m.ctx.Done():
		}
	}
	for {
		begin := time.Now()
		err := m.provider.Run(m.ctx, found)
		if m.ctx.Err() != nil {
			return
		}
		if time.Since(begin) >= maxPause {
			pause, failed, well = minPause, false, false
		}
		if err != nil {
			m.counters.failed.Inc()
			if !failed {
				m.log.Warn("the look-up of members failed; what is known stands, and it is tried again", zap.Error(err))
			}
			failed = true
		}
		if !channel.Pause(m.ctx, jitter(pause)) {
			return
		}
		pause = min(2*pause, maxPause)
	}
}

// jitter changes d by up to a fifth, so that nodes that failed together do not
// ask together.
func jitter(d time.Duration) time.Duration {
	return d - d/5 + rand.N(2*d/5+1)
}

// sources remembers, within bounds, the addresses that datagrams came from, by
// host.
type sources struct {
	max int

	mu     sync.Mutex // guards what follows; never held while blocking
	byHost map[netip.Addr]uint16
}

func newSources(limit int) *sources { return &sources{max: limit, byHost: map[netip.Addr]uint16{}} }

func (s *sources) note(a netip.AddrPort) {
	host := a.Addr().Unmap().WithZone("")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byHost[host] == a.Port() {
		return
	}
	if _, ok := s.byHost[host]; !ok && len(s.byHost) >= s.max {
		clear(s.byHost) // those that go on are back with their next heartbeat
	}
	s.byHost[host] = a.Port()
}

func (s *sources) of(host netip.Addr) (netip.AddrPort, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	port, ok := s.byHost[host]
	return netip.AddrPortFrom(host, port), ok
}

// noting is a socket that notes where datagrams come from.
type noting struct {
	transport.UDPConn
	sources *sources
}

// ReadFrom implements net.PacketConn.
func (c *noting) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.UDPConn.ReadFrom(b)
	if a, ok := from.(*net.UDPAddr); ok && err == nil && n > 0 {
		c.sources.note(a.AddrPort())
	}
	return n, from, err
}
