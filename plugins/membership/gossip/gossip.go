// Package gossip is the membership for large groups, on hashicorp/memberlist:
// every node probes one other at a time, suspicions are checked through third
// nodes, and news spreads with the probes. The traffic of a node does not grow
// with the group, where heartbeats to everybody do.
//
// Everything is encrypted and authenticated with a key derived from the cluster's
// secret, which is required.
//
// It imports channel, its sub-packages and memberlist, and must not import core,
// interceptors, valves, fx, go-plugin or grpc.
package gossip

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

// Name is the name of the membership in configuration.
const Name = "gossip"

// Config is what a user says about the membership.
type Config struct {
	// Listen is the address, host:port, that this node gossips on, by UDP and
	// TCP. An empty host means all addresses; the host must be an IP address.
	Listen string `yaml:"listen"`
	// Advertise is the address, host or host:port, that others reach it at.
	// Empty means the address of this node's receiver and the port of Listen.
	Advertise string `yaml:"advertise"`
	// Seeds are host:port of some nodes, by which this one finds the group. A
	// node may list itself. They are tried for ever.
	Seeds []string `yaml:"seeds"`
	// Secret is at least 16 bytes of text that all nodes share, better a
	// reference like ${file:/path}. All traffic is encrypted with a key that is
	// derived from it.
	Secret secret.Text `yaml:"secret"`
	// SecretFile is a file of secrets, one per line, that must not be readable by
	// everybody: the first one encrypts, all are valid. It takes the place of Secret.
	SecretFile string `yaml:"secret_file"`
	// OldSecrets are valid, too. List the next secret here on all nodes before one
	// of them uses it, and the last one until none does any more.
	OldSecrets []secret.Text `yaml:"old_secrets"`
	// ProbeInterval is the time between two probes by a node, ProbeTimeout the
	// wait for a direct answer.
	ProbeInterval time.Duration `yaml:"probe_interval"`
	ProbeTimeout  time.Duration `yaml:"probe_timeout"`
	// Suspicion says how long a node that does not answer is suspected before
	// it is lost: Suspicion × log10(nodes) × ProbeInterval, and at least
	// Suspicion × ProbeInterval; up to twice that while nobody confirms it.
	Suspicion int `yaml:"suspicion"`
	// GossipInterval is the time between two rounds of spreading news.
	GossipInterval time.Duration `yaml:"gossip_interval"`
	// SyncInterval is the time between two exchanges of all that is known, with
	// one other node; more in groups beyond 32.
	SyncInterval time.Duration `yaml:"sync_interval"`
	// MaxMembers bounds the group.
	MaxMembers int `yaml:"max_members"`
}

const (
	maxSeeds = 256
	// streamTimeout bounds connecting and each exchange over a connection.
	streamTimeout = 3 * time.Second
	// leaveTimeout bounds the spreading of a farewell.
	leaveTimeout = 2 * time.Second
	// suspicionMax is how much longer a suspicion lasts that nobody confirms.
	suspicionMax = 2
	// deadTime is how long a dead node is still told what is said of it, so that
	// it can object.
	deadTime = 30 * time.Second
)

// Default returns the defaults; Secret must be set by the user, and Seeds on all
// nodes but one.
func Default() Config {
	return Config{
		Listen:         ":45566",
		ProbeInterval:  time.Second,
		ProbeTimeout:   500 * time.Millisecond,
		Suspicion:      4,
		GossipInterval: 200 * time.Millisecond,
		SyncInterval:   30 * time.Second,
		MaxMembers:     4096,
	}
}

// Validate reports all problems at once.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, err := parseListen(c.Listen); err != nil {
		fail("listen: %w", err)
	}
	if c.Advertise != "" {
		if _, err := parseAdvertise(c.Advertise, 1); err != nil {
			fail("advertise: %w", err)
		}
	}
	if len(c.Seeds) > maxSeeds {
		fail("seeds: %d are listed, the most is %d; a few are enough", len(c.Seeds), maxSeeds)
	}
	for i, s := range c.Seeds {
		host, port, err := net.SplitHostPort(s)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
			fail("seeds[%d]: %q is not host:port", i, s)
		}
	}
	if _, err := c.secrets(); err != nil {
		errs = append(errs, err)
	}
	for _, d := range []struct {
		key      string
		value    time.Duration
		min, max time.Duration
	}{
		{"probe_interval", c.ProbeInterval, 50 * time.Millisecond, time.Minute},
		{"probe_timeout", c.ProbeTimeout, 10 * time.Millisecond, time.Minute},
		{"gossip_interval", c.GossipInterval, 10 * time.Millisecond, 10 * time.Second},
		{"sync_interval", c.SyncInterval, time.Second, time.Hour},
	} {
		if d.value < d.min || d.value > d.max {
			fail("%s: %v is outside %v..%v", d.key, d.value, d.min, d.max)
		}
	}
	if c.ProbeTimeout >= c.ProbeInterval {
		fail("probe_timeout: %v is not below the probe_interval, %v: no time is left to ask others", c.ProbeTimeout, c.ProbeInterval)
	}
	if c.Suspicion < 1 || c.Suspicion > 100 {
		fail("suspicion: %d is outside 1..100", c.Suspicion)
	}
	if c.MaxMembers < 1 || c.MaxMembers > 65536 {
		fail("max_members: %d is outside 1..65536", c.MaxMembers)
	}
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
		if addr.IsUnspecified() {
			addr = netip.Addr{}
		}
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// parseAdvertise reads an IP address with or without port.
func parseAdvertise(s string, port uint16) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		var ip netip.Addr
		if ip, err = netip.ParseAddr(s); err == nil {
			a = netip.AddrPortFrom(ip, port)
		}
	}
	if err != nil || a.Port() == 0 || a.Addr().IsUnspecified() || a.Addr().IsMulticast() {
		return netip.AddrPort{}, fmt.Errorf("%q is not the IP address that others reach this node at, with or without :port", s)
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}

// secrets returns the secrets, the present one first.
func (c *Config) secrets() ([]secret.Text, error) {
	all, err := secret.List("secret", c.Secret, c.SecretFile, c.OldSecrets)
	switch {
	case err != nil:
		return nil, err
	case len(all) == 0:
		return nil, errors.New("secret: it is not set; give all nodes the same one, for example ${file:/etc/longhouse/secret}")
	}
	return all, secret.CheckLength("secret", all)
}

// keys derives the encryption keys, the present one first.
func (c *Config) keys() (*memberlist.Keyring, error) {
	all, err := c.secrets()
	if err != nil {
		return nil, err
	}
	derived, err := secret.DeriveAll(all, "gossip")
	if err != nil {
		return nil, err
	}
	var ring [][]byte
	for _, k := range derived {
		b, err := k.Expand("encryption", nil, secret.KeySize)
		if err != nil {
			return nil, err
		}
		ring = append(ring, b)
	}
	return memberlist.NewKeyring(ring, ring[0])
}

// counters are the membership's.
type counters struct {
	packetsSent, packetsReceived, bytesSent, sendFailed, reopened *channel.Counter
	joins, joinsFailed, dropped                                   *channel.Counter
	refused                                                       map[string]*channel.Counter
}

func newCounters(m *channel.Metrics) *counters {
	c := &counters{
		packetsSent:     m.Counter("gossip_packets_sent_total", "Datagrams sent."),
		packetsReceived: m.Counter("gossip_packets_received_total", "Datagrams received."),
		bytesSent:       m.Counter("gossip_bytes_sent_total", "Bytes sent in datagrams and over connections."),
		sendFailed:      m.Counter("gossip_send_errors_total", "Datagrams that could not be sent."),
		reopened:        m.Counter("gossip_socket_reopened_total", "How often a socket had to be opened again."),
		joins:           m.Counter("gossip_joins_total", "Exchanges with seeds and lost members that succeeded."),
		joinsFailed:     m.Counter("gossip_join_errors_total", "Exchanges with seeds and lost members that failed."),
		dropped:         m.Counter("gossip_queue_dropped_total", "Messages that the queue had no room for."),
		refused:         map[string]*channel.Counter{},
	}
	for _, r := range []string{reasonFull, reasonAddress, reasonOwn, "size", "streams", "record", "message", "conflict", "packet", "stream"} {
		c.refused[r] = m.Counter("gossip_refused_total", "What was received and not used, by reason.", "reason", r)
	}
	return c
}

// membership implements channel.Membership.
type membership struct {
	cfg      Config
	net      transport.Net
	log      *zap.Logger
	counters *counters
	listen   netip.AddrPort

	start  time.Time // when this node came up, by its own clock; set by Start
	own    netip.AddrPort
	name   string
	hurry  chan struct{}      // capacity 1: members were lost, so look for them soon
	fresh  chan struct{}      // capacity 1: others were found
	wake   chan struct{}      // capacity 1: inbox is not empty
	quit   chan struct{}      // ends them all
	ctx    context.Context    // ends with quit
	cancel context.CancelFunc // closes quit's twin, ctx
	work   sync.WaitGroup     // run, seek, catchUp
	news   memberlist.TransmitLimitedQueue

	mu      sync.Mutex // guards what follows; never held while blocking
	began   bool
	stopped bool
	list    *memberlist.Memberlist
	meta    []byte
	local   channel.Member
	carrier *carrier
	inbox   []change
	queued  map[string]int // the place in inbox of the last word on a node
	known   map[string]struct{}
	present map[netip.AddrPort]bool // where members that live gossip; replaced, never changed
	lost    []netip.AddrPort        // where members that were lost did, oldest first
}

// change is something that memberlist has told.
type change struct {
	name  string
	alive bool
	info  info
	left  time.Time // of a farewell: the start of the one that leaves
}

// New returns a membership that has not started.
func New(c Config, s channel.Settings) (channel.Membership, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	listen, err := parseListen(c.Listen)
	if err != nil {
		return nil, fmt.Errorf("gossip: listen: %w", err)
	}
	m := &membership{
		cfg: c, net: s.Net, log: s.Logger, counters: newCounters(s.Metrics), listen: listen,
		hurry:  make(chan struct{}, 1),
		fresh:  make(chan struct{}, 1),
		wake:   make(chan struct{}, 1),
		quit:   make(chan struct{}),
		queued: map[string]int{},
		known:  map[string]struct{}{},
	}
	if m.log == nil {
		m.log = zap.NewNop()
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.news = memberlist.TransmitLimitedQueue{RetransmitMult: 4, NumNodes: m.size}
	return m, nil
}

// size is an estimate of the group's size.
func (m *membership) size() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.known) + 1
}

// record makes the meta data of a local record.
func (m *membership) record(local channel.Member) ([]byte, error) {
	switch {
	case local.ID.IsZero():
		return nil, errors.New("gossip: the local member has no id")
	case !local.Host.IsValid() || local.Host.IsUnspecified():
		return nil, fmt.Errorf("gossip: %w", errNoAddress)
	case local.Port < 1 || local.Port > 65535:
		return nil, fmt.Errorf("gossip: the local member's port %d is outside 1..65535", local.Port)
	case metaHeader+wire.MemberSize(local) > maxMeta:
		return nil, fmt.Errorf("gossip: the local member's record has %d bytes, gossip carries %d: shorten payload or domain: %w",
			wire.MemberSize(local), maxMeta-metaHeader, channel.ErrTooLarge)
	}
	return appendMeta(nil, local, m.start), nil
}

// Start implements channel.Membership. It does not wait for other nodes.
func (m *membership) Start(ctx context.Context, local channel.Member, known []channel.Member, sink channel.MemberSink) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("gossip: start: %w", err)
	}
	now := time.Now()
	m.mu.Lock()
	again := m.began || m.stopped
	m.began = true
	m.mu.Unlock()
	if again {
		return errors.New("gossip: start: it was started or stopped before; make a new one")
	}
	m.start = now.Add(-local.Alive)
	meta, err := m.record(local)
	if err != nil {
		return err
	}
	m.own = netip.AddrPortFrom(local.Host.Unmap(), m.listen.Port())
	if m.cfg.Advertise != "" {
		if m.own, err = parseAdvertise(m.cfg.Advertise, m.listen.Port()); err != nil {
			return fmt.Errorf("gossip: advertise: %w", err)
		}
	}
	m.name = local.ID.String()
	m.mu.Lock()
	m.meta, m.local = meta, local
	m.mu.Unlock()
	list, err := m.create()
	if err != nil {
		return fmt.Errorf("gossip: start: %w", err)
	}
	r := newRoster(local, m.cfg.MaxMembers, m.refuse)
	deadline := now.Add(m.knownTime())
	var hosts []netip.AddrPort
	for _, k := range known {
		r.seed(k, now, deadline)
		hosts = append(hosts, netip.AddrPortFrom(k.Host.Unmap(), m.own.Port()))
	}
	m.mu.Lock()
	stopped := m.stopped
	if !stopped {
		m.list, m.lost = list, hosts[:min(len(hosts), maxLost)]
		m.work.Go(func() { m.run(r, sink) })
		m.work.Go(func() { m.seek(list) })
		m.work.Go(func() { m.catchUp(list) })
	}
	m.mu.Unlock()
	if stopped {
		_ = list.Shutdown() // it only ever returns nil
		return fmt.Errorf("gossip: start: %w", channel.ErrClosed)
	}
	return nil
}

// knownTime is how long members that an earlier instance knew may stay silent:
// as long as it takes to find a dead one.
func (m *membership) knownTime() time.Duration {
	return max(10*time.Second, time.Duration(suspicionMax*m.cfg.Suspicion+4)*m.cfg.ProbeInterval)
}

// create starts memberlist.
func (m *membership) create() (*memberlist.Memberlist, error) {
	keyring, err := m.cfg.keys()
	if err != nil {
		return nil, err
	}
	t, err := newCarrier(m.net, m.log, m.listen, m.own, m.counters)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.carrier = t
	m.mu.Unlock()
	c := memberlist.DefaultLANConfig()
	c.Name = m.name
	c.Transport = t
	c.BindPort, c.AdvertisePort = int(m.listen.Port()), int(m.own.Port())
	c.AdvertiseAddr = m.own.Addr().String()
	c.TCPTimeout = streamTimeout
	c.ProbeInterval, c.ProbeTimeout = m.cfg.ProbeInterval, m.cfg.ProbeTimeout
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = m.cfg.Suspicion, suspicionMax
	c.GossipInterval, c.GossipToTheDeadTime = m.cfg.GossipInterval, deadTime
	c.PushPullInterval = m.cfg.SyncInterval
	c.DeadNodeReclaimTime = deadTime / 3 // a node with a fixed id that moves
	c.Keyring = keyring
	c.GossipVerifyIncoming, c.GossipVerifyOutgoing = true, true
	c.EnableCompression = false // what is sent is short, and encrypted anyway
	d := delegate{m}
	c.Delegate, c.Events, c.Alive, c.Conflict = d, d, d, d
	c.LogOutput, c.Logger = nil, log.New(newLogs(m.log, m.counters), "", 0)
	list, err := memberlist.Create(c)
	if err != nil {
		return nil, errors.Join(err, t.Shutdown())
	}
	return list, nil
}

// Update implements channel.Membership.
func (m *membership) Update(ctx context.Context, local channel.Member) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("gossip: update: %w", err)
	}
	m.mu.Lock()
	list, stopped := m.list, m.stopped
	m.mu.Unlock()
	if list == nil || stopped {
		return fmt.Errorf("gossip: update: %w", channel.ErrClosed)
	}
	meta, err := m.record(local)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.meta, m.local = meta, local
	m.mu.Unlock()
	// It is queued at once; the error only says that it has not been sent within
	// that time.
	_ = list.UpdateNode(time.Millisecond)
	return nil
}

// Stop leaves the group, telling the others, and ends everything. It works twice
// and without Start. It takes as long as a farewell takes to spread and a probe
// to end, about a second and a half with the default settings.
func (m *membership) Stop(ctx context.Context) error {
	m.mu.Lock()
	list, first := m.list, !m.stopped
	m.stopped = true
	m.mu.Unlock()
	var err error
	if first && list != nil {
		err = m.leave(ctx, list)
	}
	if first {
		m.cancel()
		close(m.quit)
	}
	done := make(chan struct{})
	go func() { // ends with run and seek
		m.work.Wait()
		close(done)
	}()
	select {
	case <-done:
		return err
	case <-ctx.Done():
		return errors.Join(err, fmt.Errorf("gossip: stop: waiting for its goroutines: %w", ctx.Err()))
	}
}

// leave says farewell and ends memberlist.
func (m *membership) leave(ctx context.Context, list *memberlist.Memberlist) error {
	timeout := leaveTimeout
	if d, ok := ctx.Deadline(); ok {
		timeout = min(timeout, max(time.Millisecond, time.Until(d)))
	}
	m.mu.Lock()
	id, carrier := m.local.ID, m.carrier
	m.mu.Unlock()
	b := appendFarewell(nil, id, m.start)
	m.news.QueueBroadcast(&farewell{name: m.name, b: b})
	told := 0
	for _, n := range list.Members() { // the first hear it at once, and tell the others
		if n.Name != m.name && told < directFarewells {
			told++
			_ = list.SendBestEffort(n, b) // the queue has it too
		}
	}
	if err := list.Leave(timeout); err != nil {
		m.log.Info("not all nodes may have heard that this one leaves", zap.Error(err))
	}
	// memberlist does not wait for its probes. From here on none begins, because
	// nothing can be sent; one that waits for an answer does so no longer than
	// this.
	carrier.silence()
	drained := channel.Pause(ctx, m.cfg.ProbeInterval*time.Duration(list.GetHealthScore()+1))
	_ = list.Shutdown() // it only ever returns nil
	if !drained {
		return fmt.Errorf("gossip: stop: waiting for a probe to end: %w", ctx.Err())
	}
	return nil
}

// directFarewells is how many nodes are told of a farewell without waiting for
// the next round.
const directFarewells = 32

// refuse counts a node that is not shown.
func (m *membership) refuse(reason string, i info) {
	m.counters.refused[reason].Inc()
	m.log.Debug("a node is not taken in", zap.String("reason", reason), zap.Stringer("member", i.rec), zap.Stringer("id", i.rec.ID))
}

// Factory makes memberships from configuration.
var Factory = channel.FactoryOf(Name, Default(), New)
