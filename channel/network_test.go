package channel

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/pion/transport/v2"
	"github.com/pion/transport/v2/stdnet"
)

func realNet(t *testing.T) transport.Net {
	t.Helper()
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

var loopback = netip.MustParseAddr("127.0.0.1")

func TestDialAndListen(t *testing.T) {
	n := realNet(t)
	l, err := ListenTCP(n, netip.AddrPortFrom(loopback, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	if _, err := ListenTCP(n, addr); !IsAddrInUse(err) {
		t.Errorf("second listener: got %v, want address in use", err)
	}
	c, err := Dial(t.Context(), n, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !IsTimeout(err) || IsClosed(err) {
		t.Errorf("read past the deadline: %v", err)
	}
	c.Close()
	if _, err := c.Read(make([]byte, 1)); !IsClosed(err) || IsTimeout(err) {
		t.Errorf("read after close: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if c, err := Dial(ctx, n, addr); !errors.Is(err, context.Canceled) || c != nil {
		t.Errorf("dial with an ended context: %v, %v", c, err)
	}
}

func TestErrorClasses(t *testing.T) {
	for _, c := range []struct {
		name            string
		err             error
		timeout, closed bool
	}{
		{"nil", nil, false, false},
		{"deadline", &net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, true, false},
		{"context", context.DeadlineExceeded, true, false},
		{"closed", &net.OpError{Op: "read", Err: net.ErrClosed}, false, true},
		{"virtual net's closed", &net.OpError{Op: "read", Err: errors.New("use of closed network connection")}, false, true},
		{"pipe", io.ErrClosedPipe, false, true},
		{"eof", io.EOF, false, false},
	} {
		if IsTimeout(c.err) != c.timeout || IsClosed(c.err) != c.closed {
			t.Errorf("%s: timeout %v, closed %v", c.name, IsTimeout(c.err), IsClosed(c.err))
		}
	}
}

// freeUDPPort returns a port that nobody uses at the moment.
func freeUDPPort(t *testing.T, n transport.Net) uint16 {
	t.Helper()
	c, err := ListenUDP(n, netip.AddrPortFrom(loopback, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func TestMulticastOnLoopback(t *testing.T) {
	n := realNet(t)
	port := freeUDPPort(t, n)
	open := func(group string) transport.UDPConn {
		c, err := ListenMulticast(n, MulticastConfig{Group: netip.AddrPortFrom(netip.MustParseAddr(group), port), Bind: loopback})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	a, b, other := open("239.77.1.1"), open("239.77.1.1"), open("239.77.1.2")
	group := &net.UDPAddr{IP: net.IPv4(239, 77, 1, 1), Port: int(port)}
	if _, err := a.WriteTo([]byte("hello"), group); err != nil {
		t.Fatal(err)
	}
	for _, c := range []transport.UDPConn{a, b} {
		buf := make([]byte, 64)
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		k, from, err := c.ReadFrom(buf)
		if err != nil || string(buf[:k]) != "hello" {
			t.Fatalf("got %q from %v, %v", buf[:k], from, err)
		}
		if !from.(*net.UDPAddr).IP.IsLoopback() {
			t.Errorf("came from %v, not from loopback", from)
		}
	}
	other.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if k, _, err := other.ReadFrom(make([]byte, 64)); !IsTimeout(err) {
		t.Errorf("another group on the same port received %d bytes, %v", k, err)
	}
}

func TestMulticastRefuses(t *testing.T) {
	n := realNet(t)
	for _, c := range []MulticastConfig{
		{Group: netip.MustParseAddrPort("10.0.0.1:4000")},
		{Group: netip.MustParseAddrPort("[ff02::1]:4000")},
		{},
		{Group: netip.MustParseAddrPort("228.0.0.4:4000"), Bind: netip.MustParseAddr("203.0.113.77")},
	} {
		if conn, err := ListenMulticast(n, c); err == nil {
			conn.Close()
			t.Errorf("%+v: no error", c)
		}
	}
}
