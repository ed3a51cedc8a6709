package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/pion/transport/v2"
	"golang.org/x/net/ipv4"
)

// The helpers of this file supply what transport.Net lacks: a context for
// dialling, joining a group, and telling errors apart. They work on any
// transport.Net, the real one (stdnet) and simulated ones alike.

// MulticastConfig says which group to join and where.
type MulticastConfig struct {
	// Group is the IPv4 group address and its port.
	Group netip.AddrPort
	// Bind is an address of the interface that the group is joined and sent
	// on; 127.0.0.1 keeps the group on this machine. The zero value leaves the
	// choice to the operating system's routes.
	Bind netip.Addr
	// TTL is how many routers a datagram may pass; 0 keeps the operating
	// system's default, which is 1.
	TTL int
	// HostOnly keeps datagrams on this machine, whatever the interface.
	HostOnly bool
}

// GroupJoiner is implemented by packet connections that can join a multicast
// group themselves, as those of a simulated network do. ifi is nil for the
// default interface; group is a *net.UDPAddr.
type GroupJoiner interface {
	JoinGroup(ifi *net.Interface, group net.Addr) error
}

// ContextDialer is implemented by the dialers of a transport.Net that honour a
// context, as net.Dialer does.
type ContextDialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// SecuredNet is implemented by a transport.Net whose TCP connections are
// protected by TLS.
type SecuredNet interface {
	Secured() bool
}

// IsSecured reports whether the TCP connections of n are protected by TLS.
func IsSecured(n transport.Net) bool {
	s, ok := n.(SecuredNet)
	return ok && s.Secured()
}

// Dial opens a TCP connection to addr. It blocks until the connection stands,
// fails, or ctx ends. A net whose dialer is no [ContextDialer] is given the
// deadline and the cancellation of ctx through net.Dialer.
func Dial(ctx context.Context, n transport.Net, addr netip.AddrPort) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("channel: dial %s: %w", addr, err)
	}
	d := &net.Dialer{}
	dialer := n.CreateDialer(d)
	if cd, ok := dialer.(ContextDialer); ok {
		return dialed(cd.DialContext(ctx, "tcp", addr.String()))
	}
	d.Deadline, _ = ctx.Deadline()
	//lint:ignore SA1019 a dialer without DialContext cannot be cancelled in another way
	d.Cancel = ctx.Done()
	return dialed(dialer.Dial("tcp", addr.String()))
}

func dialed(c net.Conn, err error) (net.Conn, error) {
	if err != nil { // never return a typed nil
		return nil, fmt.Errorf("channel: %w", err)
	}
	return c, nil
}

// ListenTCP listens on addr; port 0 lets the net choose one. An address that
// is in use fails with an error that [IsAddrInUse] recognises.
func ListenTCP(n transport.Net, addr netip.AddrPort) (transport.TCPListener, error) {
	l, err := n.ListenTCP(family("tcp", addr.Addr()), net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return nil, fmt.Errorf("channel: listen on tcp %s: %w", addr, err)
	}
	return l, nil
}

// ListenUDP opens a datagram socket on addr; port 0 lets the net choose one.
func ListenUDP(n transport.Net, addr netip.AddrPort) (transport.UDPConn, error) {
	c, err := n.ListenUDP(family("udp", addr.Addr()), net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return nil, fmt.Errorf("channel: listen on udp %s: %w", addr, err)
	}
	return c, nil
}

// family restricts network to the family of a, except that the unspecified
// IPv6 address means both families, as in package net.
func family(network string, a netip.Addr) string {
	switch {
	case a.Unmap().Is4():
		return network + "4"
	case a.IsValid() && !a.IsUnspecified():
		return network + "6"
	}
	return network
}

// ListenMulticast opens a datagram socket on the port of the group and joins
// the group. Several sockets of one machine may do so; each receives every
// datagram, its own included. Datagrams of other groups on the same port are
// not received (on Linux). Write to the group with WriteTo and the group's
// address.
func ListenMulticast(n transport.Net, c MulticastConfig) (transport.UDPConn, error) {
	group := netip.AddrPortFrom(c.Group.Addr().Unmap(), c.Group.Port())
	if !group.Addr().Is4() || !group.Addr().IsMulticast() {
		return nil, fmt.Errorf("channel: join group %s: not an IPv4 multicast address (224.0.0.0 to 239.255.255.255)", c.Group)
	}
	ifi, err := interfaceOf(n, c.Bind)
	if err != nil {
		return nil, fmt.Errorf("channel: join group %s: %w", group, err)
	}
	conn, err := n.ListenUDP("udp4", net.UDPAddrFromAddrPort(group))
	if err != nil {
		return nil, fmt.Errorf("channel: join group %s: listen: %w", group, err)
	}
	if err := join(conn, ifi, net.UDPAddrFromAddrPort(group), c); err != nil {
		conn.Close()
		where := "the default interface"
		if ifi != nil {
			where = ifi.Name
		}
		return nil, fmt.Errorf("channel: join group %s on %s: %w", group, where, err)
	}
	return conn, nil
}

func join(conn transport.UDPConn, ifi *net.Interface, group *net.UDPAddr, c MulticastConfig) error {
	if j, ok := conn.(GroupJoiner); ok {
		return j.JoinGroup(ifi, group)
	}
	pc, ok := conn.(net.PacketConn)
	if !ok {
		return fmt.Errorf("%T cannot join a group: %w", conn, errors.ErrUnsupported)
	}
	p := ipv4.NewPacketConn(pc)
	if err := p.JoinGroup(ifi, &net.UDPAddr{IP: group.IP}); err != nil {
		return err
	}
	if ifi != nil {
		if err := p.SetMulticastInterface(ifi); err != nil {
			return fmt.Errorf("set the interface to send on: %w", err)
		}
	}
	if err := tuneGroupSocket(conn, ifi, c.Bind.Unmap()); err != nil {
		return fmt.Errorf("set the options of the socket: %w", err)
	}
	if err := p.SetMulticastLoopback(true); err != nil {
		return fmt.Errorf("let nodes of this machine hear each other: %w", err)
	}
	if c.TTL > 0 || c.HostOnly {
		ttl := c.TTL
		if c.HostOnly {
			ttl = 0
		}
		if err := p.SetMulticastTTL(ttl); err != nil {
			return fmt.Errorf("set ttl %d: %w", ttl, err)
		}
	}
	return nil
}

// interfaceOf returns the interface that has addr, nil if addr is not set.
func interfaceOf(n transport.Net, addr netip.Addr) (*net.Interface, error) {
	addr = addr.Unmap()
	if !addr.IsValid() || addr.IsUnspecified() {
		return nil, nil
	}
	all, err := n.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list the interfaces: %w", err)
	}
	var have []string
	for _, ifi := range all {
		addrs, err := ifi.Addrs()
		if err != nil {
			continue // an interface without addresses
		}
		for _, a := range addrs {
			p, ok := prefixOf(a)
			if !ok {
				continue
			}
			// Every address of 127.0.0.0/8 is this machine's, the others only
			// if they are assigned.
			if p.Addr() == addr || addr.IsLoopback() && p.Contains(addr) {
				return &ifi.Interface, nil
			}
			have = append(have, p.Addr().String())
		}
	}
	return nil, fmt.Errorf("no interface has the address %s (this machine has %s)", addr, strings.Join(have, ", "))
}

func prefixOf(a net.Addr) (netip.Prefix, bool) {
	switch a := a.(type) {
	case *net.IPNet:
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			return netip.Prefix{}, false
		}
		ip = ip.Unmap()
		bits, size := a.Mask.Size()
		if size != ip.BitLen() { // vnet pairs a 16-byte address with a 4-byte mask and the reverse
			bits = min(bits, ip.BitLen())
		}
		return netip.PrefixFrom(ip, bits), true
	case *net.IPAddr:
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		return netip.PrefixFrom(ip, ip.BitLen()), ok
	}
	return netip.Prefix{}, false
}

// IsTimeout reports whether err says that a deadline passed, of a connection or
// of a context.
func IsTimeout(err error) bool {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// IsClosed reports whether err says that this side has closed the connection or
// listener: the usual end of a reading goroutine.
func IsClosed(err error) bool {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) {
		return true
	}
	// pion's virtual net has an error of its own with the same text.
	var oe *net.OpError
	return errors.As(err, &oe) && oe.Err != nil && oe.Err.Error() == net.ErrClosed.Error()
}

// IsAddrInUse reports whether err says that somebody else has the port.
func IsAddrInUse(err error) bool {
	return errors.Is(err, syscall.EADDRINUSE) || err != nil && strings.Contains(err.Error(), "address already in use")
}

// IsTemporary reports whether err is worth another try of the same call soon:
// a time-out, or a shortage such as too many open files.
func IsTemporary(err error) bool {
	return IsTimeout(err) || errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.EAGAIN) ||
		errors.Is(err, syscall.EINTR) || errors.Is(err, syscall.ECONNABORTED)
}

// Pause waits for d or until ctx ends; it reports whether d has passed.
func Pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
