package channeltest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/pion/transport/v2"
	"github.com/pion/transport/v2/vnet"
)

// segmentPort is the vnet port that carries the segments of all streams of a
// node, as IP protocol 6 would.
const segmentPort = 6

// Ports chosen for port 0, in order, so that runs repeat.
const (
	firstFreePort = 20000
	lastFreePort  = 59999
)

var errDown = fmt.Errorf("node is down: %w", net.ErrClosed)

// SimNode is one machine of a SimNet. It is a transport.Net with streams and
// multicast. It has the addresses 127.0.0.1 and its own.
type SimNode struct {
	*vnet.Net
	nw     *SimNet
	addr   netip.Addr
	birth  uint64
	proto  transport.UDPConn // carries segments
	reader sync.WaitGroup    // readSegments

	mu        sync.Mutex // guards what follows; never held while blocking
	down      bool
	nextPort  uint16
	nextID    uint64
	dials     map[netip.AddrPort]uint64 // how many streams to a remote there were
	listeners map[uint16][]*simListener
	streams   map[streamKey]*simStream
	datagrams map[*simUDP]struct{}
}

var _ transport.Net = (*SimNode)(nil)

// newSimNode makes a node. The caller holds nw.mu.
func newSimNode(nw *SimNet, addr netip.Addr, birth uint64) (*SimNode, error) {
	vnetGlobals.Lock()
	v, err := vnet.NewNet(&vnet.NetConfig{StaticIPs: []string{addr.String()}})
	vnetGlobals.Unlock()
	if err != nil {
		return nil, err
	}
	if err := nw.router.AddNet(v); err != nil {
		return nil, err
	}
	proto, err := v.ListenUDP("udp4", &net.UDPAddr{IP: addr.AsSlice(), Port: segmentPort})
	if err != nil {
		return nil, err
	}
	n := &SimNode{
		Net: v, nw: nw, addr: addr, birth: birth, proto: proto,
		nextPort:  firstFreePort,
		dials:     map[netip.AddrPort]uint64{},
		listeners: map[uint16][]*simListener{},
		streams:   map[streamKey]*simStream{},
		datagrams: map[*simUDP]struct{}{},
	}
	n.reader.Go(n.readSegments)
	return n, nil
}

// IP returns the address of the node on the network.
func (n *SimNode) IP() string { return n.addr.String() }

// Addr returns the address of the node on the network.
func (n *SimNode) Addr() netip.Addr { return n.addr }

// Crash is a power cut: the node falls silent. Its connections and listeners
// end with an error, so that the code that used them can end; nobody else is
// told. A new node may take the address: see [SimNet.Node].
func (n *SimNode) Crash() { n.end(false) }

// Kill is the end of a process: as Crash, but the kernel lives on and resets
// the streams, so that peers learn of it at once.
func (n *SimNode) Kill() { n.end(true) }

func (n *SimNode) end(reset bool) {
	n.mu.Lock()
	if n.down {
		n.mu.Unlock()
		return
	}
	n.down = true
	var streams []*simStream
	for _, s := range n.streams {
		streams = append(streams, s)
	}
	var listeners []*simListener
	for _, ls := range n.listeners {
		listeners = append(listeners, ls...)
	}
	var datagrams []*simUDP
	for c := range n.datagrams {
		datagrams = append(datagrams, c)
	}
	n.mu.Unlock()
	for _, s := range streams {
		s.abort(reset, errDown)
	}
	for _, l := range listeners {
		l.Close()
	}
	for _, c := range datagrams {
		c.Close()
	}
	n.proto.Close()
	n.reader.Wait()
}

func (n *SimNode) isDown() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.down
}

func opError(op, network string, addr net.Addr, err error) error {
	return &net.OpError{Op: op, Net: network, Addr: addr, Err: err}
}

// takePort returns the next port that free accepts. The caller holds mu.
func (n *SimNode) takePort(free func(uint16) bool) (uint16, bool) {
	for range lastFreePort - firstFreePort + 1 {
		p := n.nextPort
		if n.nextPort++; n.nextPort > lastFreePort {
			n.nextPort = firstFreePort
		}
		if free(p) {
			return p, true
		}
	}
	return 0, false
}

// dialPort returns a port for a new stream. It does not depend on streams to
// other remotes, because the fate of packets depends on it and streams that are
// opened at one instant have no order. The caller holds mu.
func (n *SimNode) dialPort(remote netip.AddrPort) (uint16, bool) {
	base := mix(addrBits(remote.Addr()), uint64(remote.Port()))
	const ports = lastFreePort - firstFreePort + 1
	for range ports {
		p := firstFreePort + uint16((base+n.dials[remote])%ports)
		n.dials[remote]++
		if len(n.listeners[p]) == 0 {
			return p, true
		}
	}
	return 0, false
}

// owns reports whether ip is an address of the node, or unspecified.
func (n *SimNode) owns(ip netip.Addr) bool {
	return ip.IsUnspecified() || ip.IsLoopback() || ip == n.addr
}

func toAddr(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip)
	if !ok || a.IsUnspecified() {
		return netip.IPv4Unspecified()
	}
	return a.Unmap()
}

// ListenTCP listens for streams. An address that is in use fails with
// EADDRINUSE.
func (n *SimNode) ListenTCP(network string, laddr *net.TCPAddr) (transport.TCPListener, error) {
	if !strings.HasPrefix(network, "tcp") {
		return nil, opError("listen", network, nil, net.UnknownNetworkError(network))
	}
	if laddr == nil {
		laddr = &net.TCPAddr{}
	}
	ip, port := toAddr(laddr.IP), uint16(laddr.Port)
	if !n.owns(ip) {
		return nil, opError("listen", network, laddr, os.NewSyscallError("bind", syscall.EADDRNOTAVAIL))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.down {
		return nil, opError("listen", network, laddr, errDown)
	}
	free := func(p uint16) bool {
		for _, l := range n.listeners[p] {
			if l.addr.Addr() == ip || l.addr.Addr().IsUnspecified() || ip.IsUnspecified() {
				return false
			}
		}
		return true
	}
	ok := true
	if port == 0 {
		port, ok = n.takePort(free)
	} else {
		ok = free(port)
	}
	if !ok {
		return nil, opError("listen", network, laddr, os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	l := newSimListener(n, netip.AddrPortFrom(ip, port))
	n.listeners[port] = append(n.listeners[port], l)
	return l, nil
}

// DialTCP opens a stream.
func (n *SimNode) DialTCP(network string, laddr, raddr *net.TCPAddr) (transport.TCPConn, error) {
	if raddr == nil {
		return nil, opError("dial", network, nil, errors.New("missing address"))
	}
	var local netip.AddrPort
	if laddr != nil {
		local = netip.AddrPortFrom(toAddr(laddr.IP), uint16(laddr.Port))
	}
	s, err := n.dialStream(context.Background(), local, netip.AddrPortFrom(toAddr(raddr.IP), uint16(raddr.Port)))
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Dial opens a stream or a connected datagram socket.
func (n *SimNode) Dial(network, address string) (net.Conn, error) {
	return n.dialContext(context.Background(), network, address)
}

func (n *SimNode) dialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if strings.HasPrefix(network, "udp") {
		raddr, err := n.ResolveUDPAddr(network, address)
		if err != nil {
			return nil, opError("dial", network, nil, err)
		}
		return n.DialUDP(network, nil, raddr)
	}
	raddr, err := n.ResolveTCPAddr(network, address)
	if err != nil {
		return nil, opError("dial", network, nil, err)
	}
	s, err := n.dialStream(ctx, netip.AddrPort{}, netip.AddrPortFrom(toAddr(raddr.IP), uint16(raddr.Port)))
	if err != nil {
		return nil, err
	}
	return s, nil
}

// CreateDialer returns a dialer that honours a context as well as the time-out
// and deadline of d.
func (n *SimNode) CreateDialer(d *net.Dialer) transport.Dialer { return simDialer{n, d} }

type simDialer struct {
	node *SimNode
	d    *net.Dialer
}

func (d simDialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

// DialContext implements channel.ContextDialer.
func (d simDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if d.d.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.d.Timeout)
		defer cancel()
	}
	if !d.d.Deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, d.d.Deadline)
		defer cancel()
	}
	return d.node.dialContext(ctx, network, address)
}

// ListenPacket opens a datagram socket.
func (n *SimNode) ListenPacket(network, address string) (net.PacketConn, error) {
	laddr, err := n.ResolveUDPAddr(network, address)
	if err != nil {
		return nil, opError("listen", network, nil, err)
	}
	c, err := n.ListenUDP(network, laddr)
	if err != nil {
		return nil, err
	}
	return c.(*simUDP), nil
}

// ListenUDP opens a datagram socket. With a multicast address it opens one that
// can join the group, as package net does.
func (n *SimNode) ListenUDP(network string, laddr *net.UDPAddr) (transport.UDPConn, error) {
	return n.openUDP(network, laddr, nil)
}

// DialUDP opens a datagram socket that is connected to raddr.
func (n *SimNode) DialUDP(network string, laddr, raddr *net.UDPAddr) (transport.UDPConn, error) {
	if raddr == nil {
		return nil, opError("dial", network, nil, errors.New("missing address"))
	}
	return n.openUDP(network, laddr, raddr)
}

// ResolveIPAddr resolves a literal, localhost, or a name of [SimNet.SetHost].
func (n *SimNode) ResolveIPAddr(_, address string) (*net.IPAddr, error) {
	if ip := net.ParseIP(address); ip != nil {
		return &net.IPAddr{IP: ip}, nil
	}
	if strings.EqualFold(address, "localhost") {
		return &net.IPAddr{IP: net.IPv4(127, 0, 0, 1)}, nil
	}
	ip, err := n.nw.resolve(address)
	if err != nil {
		return nil, err
	}
	return &net.IPAddr{IP: ip}, nil
}

func (n *SimNode) resolveHostPort(address string) (net.IP, int, error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return nil, 0, err
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return nil, 0, &net.AddrError{Err: "invalid port", Addr: address}
	}
	if host == "" {
		return net.IPv4zero, int(port), nil
	}
	a, err := n.ResolveIPAddr("ip", host)
	if err != nil {
		return nil, 0, err
	}
	return a.IP, int(port), nil
}

// ResolveTCPAddr resolves the address of a stream.
func (n *SimNode) ResolveTCPAddr(network, address string) (*net.TCPAddr, error) {
	if !strings.HasPrefix(network, "tcp") {
		return nil, net.UnknownNetworkError(network)
	}
	ip, port, err := n.resolveHostPort(address)
	if err != nil {
		return nil, err
	}
	return &net.TCPAddr{IP: ip, Port: port}, nil
}

// ResolveUDPAddr resolves the address of a datagram socket.
func (n *SimNode) ResolveUDPAddr(network, address string) (*net.UDPAddr, error) {
	if !strings.HasPrefix(network, "udp") {
		return nil, net.UnknownNetworkError(network)
	}
	ip, port, err := n.resolveHostPort(address)
	if err != nil {
		return nil, err
	}
	return &net.UDPAddr{IP: ip, Port: port}, nil
}
