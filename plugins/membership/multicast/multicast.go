// Package multicast is the membership that finds other nodes by multicast
// heartbeats, byte for byte those of Apache Tribes: Longhouse and Tomcat nodes
// with the same group and port see each other. With a secret, heartbeats carry a
// seal behind the record, which Tomcat does not look at, and only sealed ones
// are believed; see Config.Secret and Config.Unauthenticated.
//
// It imports channel and its sub-packages, and must not import core,
// interceptors, valves, fx, go-plugin or grpc.
package multicast

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/heartbeat"
	"github.com/pion/transport/v2"
)

// Name is the name of the membership in configuration.
const Name = "multicast"

// Config is what a user says about the membership.
type Config struct {
	// Group is the IPv4 multicast address that all nodes share.
	Group string `yaml:"group"`
	// Port is the UDP port of the group.
	Port int `yaml:"port"`
	// Bind is an address of the network interface to use, or a name for it;
	// 127.0.0.1 keeps the group on this machine. Empty leaves the choice to the
	// operating system.
	Bind string `yaml:"bind"`
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
	// TTL is how far a heartbeat may go: 0 means this machine, 1 the local
	// network, more that many networks. -1 means what the operating system has
	// set, which is usually 1.
	TTL int `yaml:"ttl"`
}

// Default returns the settings of Tribes.
func Default() Config {
	return Config{
		Group:     "228.0.0.4",
		Port:      45564,
		Frequency: 500 * time.Millisecond,
		DropTime:  3 * time.Second,
		TTL:       -1,
	}
}

// Validate reports all problems at once.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if a, err := netip.ParseAddr(c.Group); err != nil || !a.Is4() || !a.IsMulticast() {
		fail("group: %q is not an IPv4 multicast address (224.0.0.0 to 239.255.255.255)", c.Group)
	}
	if c.Port < 1 || c.Port > 65535 {
		fail("port: %d is outside 1..65535", c.Port)
	}
	if a, err := netip.ParseAddr(c.Bind); err == nil && !a.Is4() {
		fail("bind: %q is not an IPv4 address", c.Bind)
	}
	if strings.ContainsAny(c.Bind, " \t/:,") {
		fail("bind: %q is neither an IPv4 address nor a host name", c.Bind)
	}
	if c.TTL < -1 || c.TTL > 255 {
		fail("ttl: %d is outside -1..255", c.TTL)
	}
	errs = append(errs, heartbeat.CheckTimes(c.Frequency, c.DropTime), c.security().Validate())
	return errors.Join(errs...)
}

func (c *Config) security() heartbeat.Security {
	return heartbeat.Security{Secret: c.Secret, File: c.SecretFile, Old: c.OldSecrets, Unauthenticated: c.Unauthenticated}
}

// New returns a membership that has not started.
func New(c Config, s channel.Settings) (channel.Membership, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("multicast: %w", err)
	}
	group := netip.AddrPortFrom(netip.MustParseAddr(c.Group), uint16(c.Port))
	targets := []net.Addr{net.UDPAddrFromAddrPort(group)}
	return heartbeat.New(heartbeat.Config{
		Frequency:   c.Frequency,
		DropTime:    c.DropTime,
		Open:        func() (transport.UDPConn, error) { return open(c, group, s.Net) },
		Targets:     func() []net.Addr { return targets },
		HearsItself: true,
		Security:    c.security(),
	}, s), nil
}

// open joins the group.
func open(c Config, group netip.AddrPort, n transport.Net) (transport.UDPConn, error) {
	mc := channel.MulticastConfig{Group: group, TTL: max(0, c.TTL), HostOnly: c.TTL == 0}
	if c.Bind != "" {
		a, err := n.ResolveIPAddr("ip4", c.Bind)
		if err != nil {
			return nil, fmt.Errorf("multicast: bind: %w", err)
		}
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); !ok || !ip.Is4() {
			return nil, fmt.Errorf("multicast: bind: %s has no IPv4 address", c.Bind)
		}
		mc.Bind = ip
	}
	conn, err := channel.ListenMulticast(n, mc)
	if err != nil && c.Bind == "" {
		err = fmt.Errorf("%w (set bind to the address of the interface to use, 127.0.0.1 for this machine alone)", err)
	}
	return conn, err
}

// Factory makes memberships from configuration.
var Factory = channel.FactoryOf(Name, Default(), New)
