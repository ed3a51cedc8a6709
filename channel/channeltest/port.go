package channeltest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
)

// The ports of FreePort. Operating systems give none of them to who asks for
// any port, or connects.
const (
	firstRealPort = 10_000
	lastRealPort  = 29_999
)

var realPorts sync.Map // those that FreePort has returned

// FreePort returns a port of the loopback interface, of network "tcp" or "udp",
// for what cannot be told to listen on port 0: another program, or a node that
// comes back at its old address. It was free a moment ago, and neither this
// process nor a connection of another one takes it by chance.
func FreePort(t testing.TB, network string) int {
	t.Helper()
	var err error
	for range 1000 {
		port := firstRealPort + rand.IntN(lastRealPort-firstRealPort+1)
		if _, taken := realPorts.LoadOrStore(port, true); taken {
			continue
		}
		if err = listens(network, fmt.Sprint("127.0.0.1:", port)); err == nil {
			return port
		}
	}
	t.Fatalf("no free port: %v", err)
	return 0
}

// listens reports whether an address can be listened on.
func listens(network, address string) error {
	if network == "udp" {
		c, err := net.ListenPacket("udp4", address)
		if err != nil {
			return err
		}
		return c.Close()
	}
	l, err := net.Listen("tcp4", address)
	if err != nil {
		return err
	}
	return l.Close()
}
