//go:build !linux

package channel

import (
	"net"
	"net/netip"
)

// tuneGroupSocket has nothing to do: other systems deliver only the groups that
// a socket has joined.
func tuneGroupSocket(any, *net.Interface, netip.Addr) error { return nil }
