package channel

import (
	"net"
	"net/netip"
	"syscall"
)

// ipMulticastAll is IP_MULTICAST_ALL of linux/in.h, which package syscall does
// not name.
const ipMulticastAll = 49

// tuneGroupSocket sets what x/net/ipv4 cannot.
//
// Linux delivers to a socket also the groups that other sockets of the machine
// have joined; two clusters with different groups on one port would become one.
// And it takes the source address of datagrams from another interface, if the
// one they are sent on has only a loopback address.
func tuneGroupSocket(conn any, ifi *net.Interface, source netip.Addr) error {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) {
		serr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, ipMulticastAll, 0)
		if serr == nil && ifi != nil && source.Is4() {
			mreq := &syscall.IPMreqn{Address: source.As4(), Ifindex: int32(ifi.Index)}
			serr = syscall.SetsockoptIPMreqn(int(fd), syscall.IPPROTO_IP, syscall.IP_MULTICAST_IF, mreq)
		}
	}); err != nil {
		return err
	}
	return serr
}
