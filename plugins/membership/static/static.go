// Package static is the membership for networks without multicast: every node
// sends its heartbeats to a configured list of addresses. The heartbeats are
// those of the multicast membership, as unicast datagrams, with a seal if there
// is a secret.
//
// Every node must list the others; it may list itself, so that all nodes can
// share one list. Nodes that are not there, or cannot be resolved, are tried
// for ever.
//
// It imports channel and its sub-packages, and must not import core,
// interceptors, valves, fx, go-plugin or grpc.
package static

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/heartbeat"
	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

// Name is the name of the membership in configuration.
const Name = "static"

// Config is what a user says about the membership.
type Config struct {
	// Listen is the UDP address, host:port, that this node hears heartbeats on.
	// An empty host means all addresses; the host must be an IP address.
	Listen string `yaml:"listen"`
	// Members are the UDP addresses, host:port, of the nodes' Listen.
	Members []string `yaml:"members"`
	// Frequency is the time between heartbeats.
	Frequency time.Duration `yaml:"frequency"`
	// DropTime is the silence after which a member counts as lost.
	DropTime time.Duration `yaml:"drop_time"`
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
	// whose nodes may be members without a seal though there is a secret: those
	// of Tomcat nodes. Anybody can forge their heartbeats.
	Unauthenticated []string `yaml:"unauthenticated"`
}

const (
	// maxMembers bounds the list.
	maxMembers = 4096
	// refresh is how often names are resolved again, minRetry and maxRetry how
	// often those that failed.
	refresh            = 30 * time.Second
	minRetry, maxRetry = time.Second, 30 * time.Second
)

// Default returns the defaults; Members must be set by the user.
func Default() Config {
	return Config{
		Listen:    ":45565",
		Frequency: 500 * time.Millisecond,
		DropTime:  3 * time.Second,
	}
}

// Validate reports all problems at once.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, err := parseListen(c.Listen); err != nil {
		fail("listen: %w", err)
	}
	if len(c.Members) == 0 {
		fail("members: none are listed; write the host:port that every node listens on")
	}
	if len(c.Members) > maxMembers {
		fail("members: %d are listed, the most is %d", len(c.Members), maxMembers)
	}
	seen := map[string]bool{}
	for i, m := range c.Members {
		host, port, err := net.SplitHostPort(m)
		n, perr := strconv.ParseUint(port, 10, 16)
		switch {
		case err != nil || perr != nil || n == 0 || host == "":
			fail("members[%d]: %q is not host:port", i, m)
		case seen[m]:
			fail("members[%d]: %q is listed twice", i, m)
		}
		seen[m] = true
	}
	errs = append(errs, heartbeat.CheckTimes(c.Frequency, c.DropTime), c.security().Validate())
	return errors.Join(errs...)
}

func parseListen(s string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(s)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || n == 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is not host:port", s)
	}
	addr := netip.IPv4Unspecified()
	if host != "" {
		if addr, err = netip.ParseAddr(host); err != nil {
			return netip.AddrPort{}, fmt.Errorf("%q: the host must be an IP address of this machine", s)
		}
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// membership adds the resolving of names to what heartbeat does.
type membership struct {
	*heartbeat.Membership
	resolver *resolver
}

func (c *Config) security() heartbeat.Security {
	return heartbeat.Security{Secret: c.Secret, File: c.SecretFile, Old: c.OldSecrets, Unauthenticated: c.Unauthenticated}
}

// New returns a membership that has not started.
func New(c Config, s channel.Settings) (channel.Membership, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("static: %w", err)
	}
	listen, err := parseListen(c.Listen)
	if err != nil {
		return nil, fmt.Errorf("static: listen: %w", err)
	}
	r := newResolver(c.Members, s)
	return &membership{
		Membership: heartbeat.New(heartbeat.Config{
			Frequency: c.Frequency,
			DropTime:  c.DropTime,
			Open:      func() (transport.UDPConn, error) { return channel.ListenUDP(s.Net, listen) },
			Targets:   r.targets,
			Security:  c.security(),
		}, s),
		resolver: r,
	}, nil
}

// Start implements channel.Membership.
func (m *membership) Start(ctx context.Context, local channel.Member, known []channel.Member, sink channel.MemberSink) error {
	if err := m.Membership.Start(ctx, local, known, sink); err != nil {
		return err
	}
	m.resolver.start()
	return nil
}

// Stop implements channel.Membership.
func (m *membership) Stop(ctx context.Context) error {
	return errors.Join(m.Membership.Stop(ctx), m.resolver.end(ctx))
}

// resolver keeps the addresses of names. Literal addresses need no resolving.
type resolver struct {
	net    transport.Net
	log    *zap.Logger
	failed *channel.Counter
	names  []string // to be resolved
	stop   chan struct{}
	work   sync.WaitGroup // resolve

	mu       sync.Mutex // guards what follows; never held while blocking
	literals []net.Addr
	known    map[string]net.Addr // the last answer for each name
	all      []net.Addr          // literals and known; replaced, never changed
	stopped  bool
}

func newResolver(members []string, s channel.Settings) *resolver {
	r := &resolver{
		net:    s.Net,
		log:    s.Logger,
		failed: s.Metrics.Counter("membership_resolve_errors_total", "Names of configured members that could not be resolved."),
		stop:   make(chan struct{}),
		known:  map[string]net.Addr{},
	}
	if r.log == nil {
		r.log = zap.NewNop()
	}
	for _, m := range members {
		if a, err := netip.ParseAddrPort(m); err == nil {
			r.literals = append(r.literals, net.UDPAddrFromAddrPort(a))
		} else {
			r.names = append(r.names, m)
		}
	}
	r.all = r.literals
	return r
}

func (r *resolver) targets() []net.Addr {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all
}

func (r *resolver) start() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stopped && len(r.names) > 0 {
		r.work.Go(r.resolve)
	}
}

// end stops resolving. A look-up that is under way cannot be cancelled: end
// waits for it as long as ctx allows.
func (r *resolver) end(ctx context.Context) error {
	r.mu.Lock()
	first := !r.stopped
	r.stopped = true
	r.mu.Unlock()
	if first {
		close(r.stop)
	}
	done := make(chan struct{})
	go func() { // ends with resolve
		r.work.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("static: stop: waiting for a look-up: %w", ctx.Err())
	}
}

// resolve looks up all names again and again. A name that fails keeps its last
// address.
func (r *resolver) resolve() {
	retry := minRetry
	silent := map[string]bool{} // failures that have been logged
	for {
		failed := false
		for _, name := range r.names {
			addr, err := r.net.ResolveUDPAddr("udp", name)
			if err != nil {
				failed = true
				r.failed.Inc()
				if !silent[name] {
					r.log.Warn("a configured member cannot be resolved; trying again", zap.String("member", name), zap.Error(err))
				}
				silent[name] = true
				continue
			}
			delete(silent, name)
			r.learn(name, addr)
			select {
			case <-r.stop:
				return
			default:
			}
		}
		wait := refresh
		if failed {
			wait, retry = retry, min(2*retry, maxRetry)
		} else {
			retry = minRetry
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-r.stop:
			t.Stop()
			return
		}
	}
}

func (r *resolver) learn(name string, addr *net.UDPAddr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.known[name]; old != nil && old.String() == addr.String() {
		return
	}
	r.known[name] = addr
	all := slices.Clone(r.literals)
	for _, n := range r.names {
		a := r.known[n]
		if a != nil && !slices.ContainsFunc(all, func(o net.Addr) bool { return o.String() == a.String() }) {
			all = append(all, a)
		}
	}
	r.all = all
}

// Factory makes memberships from configuration.
var Factory = channel.FactoryOf(Name, Default(), New)
