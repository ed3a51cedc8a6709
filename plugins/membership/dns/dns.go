// Package dns is the membership that finds other nodes by asking name servers
// for the addresses of a name, as those of a headless service in Kubernetes. The
// nodes send their heartbeats to the addresses that were found.
//
// It imports channel and the discovery that it shares with the memberships next
// to it, and must not import core, interceptors, valves, fx, go-plugin or grpc.
package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/discovery"
	"go.uber.org/zap"
)

// Name is the name of the membership in configuration.
const Name = "dns"

// What is asked for.
const (
	Addresses = "addresses" // A and AAAA records
	Services  = "srv"       // SRV records
)

// Config is what a user says about the membership.
type Config struct {
	// Name is the name whose addresses are the nodes. Empty means what the
	// environment says: DNS_MEMBERSHIP_SERVICE_NAME, or else the namespace in
	// OPENSHIFT_KUBE_PING_NAMESPACE or KUBERNETES_NAMESPACE.
	Name string `yaml:"name"`
	// Records says which records of the name are asked for: addresses (A and
	// AAAA), or srv, whose ports are the UDP ports of the nodes.
	Records string `yaml:"records"`
	// Server is the name server, an IP address with or without port. Empty means
	// those of /etc/resolv.conf, with its search list.
	Server string `yaml:"server"`
	// Interval is the longest time between two look-ups; an answer that is valid
	// for a shorter time is asked for again when that ends.
	Interval time.Duration `yaml:"interval"`
	// Timeout bounds the wait for the answer of one name server.
	Timeout time.Duration `yaml:"timeout"`

	discovery.Options `yaml:",inline"`
}

// minInterval is the shortest time between two look-ups.
const minInterval = time.Second

// Default returns the defaults.
func Default() Config {
	return Config{
		Records:  Addresses,
		Interval: 5 * time.Second,
		Timeout:  time.Second,
		Options:  discovery.DefaultOptions(),
	}
}

// Environment names the variables that are read.
func Environment() []string {
	return []string{"DNS_MEMBERSHIP_SERVICE_NAME", "OPENSHIFT_KUBE_PING_NAMESPACE", "KUBERNETES_NAMESPACE"}
}

// Validate reports all problems at once.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Name != "" {
		if err := checkName(c.Name); err != nil {
			fail("name: %w", err)
		}
	}
	if c.Records != Addresses && c.Records != Services {
		fail("records: %q is neither %s nor %s", c.Records, Addresses, Services)
	}
	if c.Server != "" {
		if _, err := parseServer(c.Server); err != nil {
			fail("server: %w", err)
		}
	}
	if c.Interval < minInterval || c.Interval > time.Hour {
		fail("interval: %v is outside %v..1h", c.Interval, minInterval)
	}
	if c.Timeout < 10*time.Millisecond || c.Timeout > time.Minute {
		fail("timeout: %v is outside 10ms..1m", c.Timeout)
	}
	errs = append(errs, c.Options.Validate())
	return errors.Join(errs...)
}

// checkName refuses what is no domain name.
func checkName(name string) error {
	bare := strings.TrimSuffix(name, ".")
	if bare == "" || len(bare) > 253 {
		return fmt.Errorf("%q is no domain name: it has %d characters", name, len(bare))
	}
	for label := range strings.SplitSeq(bare, ".") {
		if label == "" || len(label) > 63 || strings.ContainsAny(label, " \t\r\n/:") {
			return fmt.Errorf("%q is no domain name: %q is no part of one", name, label)
		}
	}
	return nil
}

// parseServer reads an address with or without port.
func parseServer(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddrPort(s); err == nil && a.Port() != 0 {
		return a, nil
	}
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	return netip.AddrPort{}, fmt.Errorf("%q is not the IP address of a name server, with or without :port", s)
}

// New returns a membership that has not started.
func New(c Config, s channel.Settings) (channel.Membership, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("dns: %w", err)
	}
	for _, v := range Environment() {
		c.Name = cmp.Or(c.Name, os.Getenv(v))
	}
	if c.Name == "" {
		return nil, fmt.Errorf("dns: no name to look up: set name, or %s in the environment", Environment()[0])
	}
	if err := checkName(c.Name); err != nil {
		return nil, fmt.Errorf("dns: name, from the environment: %w", err)
	}
	p := &provider{cfg: c, log: s.Logger, resolver: &resolver{net: s.Net, timeout: c.Timeout}, last: map[string][]netip.Addr{}}
	if p.log == nil {
		p.log = zap.NewNop()
	}
	if c.Server != "" {
		server, err := parseServer(c.Server)
		if err != nil {
			return nil, fmt.Errorf("dns: server: %w", err)
		}
		p.resolver.fixed = []netip.AddrPort{server}
	}
	m, err := discovery.New(c.Options, p, s)
	if err != nil {
		return nil, fmt.Errorf("dns: %w", err)
	}
	return m, nil
}

// provider asks again and again.
type provider struct {
	cfg      Config
	log      *zap.Logger
	resolver *resolver
	last     map[string][]netip.Addr // the last addresses of the targets of SRV records
}

// Run implements discovery.Provider.
func (p *provider) Run(ctx context.Context, found func([]discovery.Peer)) error {
	for {
		peers, ttl, err := p.lookup(ctx)
		if err != nil {
			return err
		}
		found(peers)
		if !channel.Pause(ctx, min(max(ttl, minInterval), p.cfg.Interval)) {
			return ctx.Err()
		}
	}
}

func (p *provider) lookup(ctx context.Context) ([]discovery.Peer, time.Duration, error) {
	if p.cfg.Records == Services {
		return p.services(ctx)
	}
	a, err := p.resolver.addresses(ctx, p.cfg.Name)
	if err != nil {
		return nil, 0, err
	}
	peers := make([]discovery.Peer, 0, len(a.addrs))
	for _, ip := range a.addrs {
		peers = append(peers, discovery.Peer{Addr: netip.AddrPortFrom(ip, 0)})
	}
	return peers, a.ttl, nil
}

// services asks for SRV records, and for the addresses of those targets that
// the answer has none for. A target whose addresses cannot be had keeps its last
// ones.
func (p *provider) services(ctx context.Context) ([]discovery.Peer, time.Duration, error) {
	a, err := p.resolver.services(ctx, p.cfg.Name)
	if err != nil {
		return nil, 0, err
	}
	if most := p.cfg.MaxAddresses; len(a.services) > most {
		p.log.Warn("the name has more SRV records than addresses are used; the rest is left out", zap.String("name", p.cfg.Name),
			zap.Int("records", len(a.services)), zap.Int("max_addresses", most))
		a.services = a.services[:most]
	}
	var peers []discovery.Peer
	var firstErr error
	last := map[string][]netip.Addr{}
	for _, s := range a.services {
		addrs, done := last[s.target]
		if !done {
			addrs = a.extra[s.target]
			if len(addrs) == 0 {
				t, err := p.resolver.addresses(ctx, s.target)
				if err != nil {
					firstErr = cmp.Or(firstErr, err)
					addrs = p.last[s.target]
				} else {
					addrs, a.ttl = t.addrs, min(a.ttl, t.ttl)
				}
			}
			last[s.target] = addrs
		}
		for _, ip := range addrs {
			peers = append(peers, discovery.Peer{Addr: netip.AddrPortFrom(ip, s.port)})
		}
	}
	p.last = last
	if len(peers) == 0 {
		return nil, 0, fmt.Errorf("none of the %d targets of %s has an address: %w", len(a.services), p.cfg.Name, firstErr)
	}
	return peers, a.ttl, nil
}

// Factory makes memberships from configuration.
var Factory = channel.FactoryOf(Name, Default(), New)
