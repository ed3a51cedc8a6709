package channeltest

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/pion/transport/v2"
)

// simUDP is a datagram socket. It wraps vnet's to send through the links of the
// simulated network, to join groups, and to behave as a real one at deadlines
// and after Close.
type simUDP struct {
	inner transport.UDPConn
	node  *SimNode
	local *net.UDPAddr // inner's, or the group's port on the node's address
	peer  *net.UDPAddr // of a connected socket, or nil

	mu        sync.Mutex // guards what follows; never held while blocking
	deadline  time.Time
	group     netip.AddrPort // the group it was opened for; invalid for none
	joined    []groupKey
	localOnly bool // sends to groups on the loopback interface
	closed    bool
}

func (n *SimNode) openUDP(network string, laddr, raddr *net.UDPAddr) (transport.UDPConn, error) {
	if laddr == nil {
		laddr = &net.UDPAddr{}
	}
	ip, port := toAddr(laddr.IP), uint16(laddr.Port)
	c := &simUDP{node: n, peer: raddr}
	if ip.IsMulticast() {
		// Several sockets of one machine may share the port of a group, which
		// vnet cannot do: each gets a port of its own, and the members of the
		// group are known by name.
		c.group = netip.AddrPortFrom(ip, port)
		ip, port = n.addr, 0
	}
	if !n.owns(ip) {
		return nil, opError("listen", network, laddr, os.NewSyscallError("bind", syscall.EADDRNOTAVAIL))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.down {
		return nil, opError("listen", network, laddr, errDown)
	}
	bind := func(p uint16) bool {
		inner, err := n.Net.ListenUDP("udp4", &net.UDPAddr{IP: ip.AsSlice(), Port: int(p)})
		if err != nil {
			return false
		}
		c.inner = inner
		return true
	}
	ok := true
	if port == 0 {
		port, ok = n.takePort(bind)
	} else {
		ok = bind(port)
	}
	if !ok {
		return nil, opError("listen", network, laddr, os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	c.local = &net.UDPAddr{IP: ip.AsSlice(), Port: int(port)}
	if c.group.IsValid() {
		c.local.Port = int(c.group.Port())
	}
	n.datagrams[c] = struct{}{}
	return c, nil
}

// JoinGroup implements channel.GroupJoiner.
func (c *simUDP) JoinGroup(ifi *net.Interface, group net.Addr) error {
	g, ok := group.(*net.UDPAddr)
	if !ok || !g.IP.IsMulticast() {
		return opError("join", "udp4", group, syscall.EINVAL)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return opError("join", "udp4", group, net.ErrClosed)
	}
	if !c.group.IsValid() {
		return opError("join", "udp4", group, errors.New("the socket was not opened on a multicast address"))
	}
	key := groupKey{group: netip.AddrPortFrom(toAddr(g.IP), c.group.Port())}
	if ifi != nil && ifi.Flags&net.FlagLoopback != 0 {
		key.node, c.localOnly = c.node.addr, true
	}
	c.joined = append(c.joined, key)
	nw := c.node.nw
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.groups[key] = append(nw.groups[key], c)
	return nil
}

// Close closes the socket; a second time it returns net.ErrClosed.
func (c *simUDP) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return opError("close", "udp", c.local, net.ErrClosed)
	}
	c.closed = true
	joined := c.joined
	c.mu.Unlock()
	nw := c.node.nw
	nw.mu.Lock()
	for _, key := range joined {
		nw.groups[key] = slices.DeleteFunc(nw.groups[key], func(o *simUDP) bool { return o == c })
		if len(nw.groups[key]) == 0 {
			delete(nw.groups, key)
		}
	}
	nw.mu.Unlock()
	c.node.mu.Lock()
	delete(c.node.datagrams, c)
	c.node.mu.Unlock()
	return c.inner.Close()
}

func (c *simUDP) LocalAddr() net.Addr { return c.local }

func (c *simUDP) RemoteAddr() net.Addr {
	if c.peer == nil {
		return nil
	}
	return c.peer
}

func (c *simUDP) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

func (c *simUDP) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return opError("set", "udp", c.local, net.ErrClosed)
	}
	c.deadline = t
	return c.inner.SetReadDeadline(t)
}

func (c *simUDP) SetWriteDeadline(time.Time) error { return nil } // writes do not block
func (c *simUDP) SetReadBuffer(int) error          { return nil }
func (c *simUDP) SetWriteBuffer(int) error         { return nil }

func (c *simUDP) Read(b []byte) (int, error) {
	n, _, err := c.ReadFrom(b)
	return n, err
}

// ReadFrom returns the next datagram, cut off if p is too short.
func (c *simUDP) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		if err := c.readable(); err != nil {
			return 0, nil, opError("read", "udp", c.local, err)
		}
		n, from, err := c.inner.ReadFrom(p)
		switch {
		case from != nil:
			// vnet reports a datagram that does not fit as an error; a real
			// socket cuts it off in silence.
			if c.peer != nil && from.String() != c.peer.String() {
				continue
			}
			return n, from, nil
		case err != nil && c.readable() == nil:
			// A stale wake-up: the deadline has been moved.
			continue
		}
	}
}

// readable returns nil, or why a read must fail now.
func (c *simUDP) readable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	if !c.deadline.IsZero() && !time.Now().Before(c.deadline) {
		// vnet's deadline wakes one reader once: wake the next one too.
		_ = c.inner.SetReadDeadline(c.deadline)
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (c *simUDP) ReadFromUDP(b []byte) (int, *net.UDPAddr, error) {
	n, from, err := c.ReadFrom(b)
	if err != nil {
		return n, nil, err
	}
	return n, from.(*net.UDPAddr), nil
}

func (c *simUDP) ReadMsgUDP(b, _ []byte) (n, oobn, flags int, addr *net.UDPAddr, err error) {
	n, addr, err = c.ReadFromUDP(b)
	return n, 0, 0, addr, err
}

func (c *simUDP) Write(b []byte) (int, error) {
	if c.peer == nil {
		return 0, opError("write", "udp", c.local, syscall.EDESTADDRREQ)
	}
	return c.WriteTo(b, c.peer)
}

func (c *simUDP) WriteToUDP(b []byte, addr *net.UDPAddr) (int, error) { return c.WriteTo(b, addr) }

func (c *simUDP) WriteMsgUDP(b, _ []byte, addr *net.UDPAddr) (int, int, error) {
	if addr == nil {
		n, err := c.Write(b)
		return n, 0, err
	}
	n, err := c.WriteTo(b, addr)
	return n, 0, err
}

// maxDatagram is the largest payload of a UDP datagram over IPv4, in bytes.
const maxDatagram = 65507

// WriteTo sends a datagram, to a group as one copy per member.
func (c *simUDP) WriteTo(p []byte, addr net.Addr) (int, error) {
	to, ok := addr.(*net.UDPAddr)
	if !ok || to == nil {
		return 0, opError("write", "udp", addr, syscall.EINVAL)
	}
	if len(p) > maxDatagram {
		return 0, opError("write", "udp", addr, os.NewSyscallError("sendto", syscall.EMSGSIZE))
	}
	c.mu.Lock()
	closed, localOnly := c.closed, c.localOnly
	c.mu.Unlock()
	if closed {
		return 0, opError("write", "udp", addr, net.ErrClosed)
	}
	dst := netip.AddrPortFrom(toAddr(to.IP), uint16(to.Port))
	data := slices.Clone(p)
	if !dst.Addr().IsMulticast() {
		c.send(Datagram, data, dst, to)
		return len(p), nil
	}
	key := groupKey{group: dst}
	if localOnly {
		key.node = c.node.addr
	}
	for _, m := range c.node.nw.members(key) {
		c.send(GroupDatagram, data, netip.AddrPortFrom(m.node.addr, dst.Port()), m.inner.LocalAddr().(*net.UDPAddr))
	}
	return len(p), nil
}

// send transmits data to a vnet address; dst is what a tap sees.
func (c *simUDP) send(kind PacketKind, data []byte, dst netip.AddrPort, to *net.UDPAddr) {
	l := link{c.node.addr, toAddr(to.IP)}
	if l.to.IsLoopback() {
		l.to = c.node.addr
	}
	packet := Packet{
		Kind:    kind,
		From:    netip.AddrPortFrom(c.node.addr, uint16(c.local.Port)),
		To:      dst,
		Length:  len(data),
		Payload: data,
	}
	c.node.nw.transmit(packet, l, uint64(to.Port), func() { _, _ = c.inner.WriteTo(data, to) })
}

// members returns the sockets that have joined a group, in the order of their
// nodes' addresses.
func (nw *SimNet) members(key groupKey) []*simUDP {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	out := slices.Clone(nw.groups[key])
	slices.SortStableFunc(out, func(a, b *simUDP) int { return a.node.addr.Compare(b.node.addr) })
	return out
}
