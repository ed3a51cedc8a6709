package httpd

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
)

// pipe returns a tracked server connection and the client's end of it.
func pipe(t *testing.T) (*tcpConn, net.Conn) {
	t.Helper()
	inner, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	l := newListener(tcpListener{inner}, 8, new(channel.Counter), new(channel.Counter))
	defer l.Close()
	client, err := net.Dial("tcp4", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); c.Close() })
	return c.(*tcpConn), client
}

// tcpListener makes a transport.TCPListener of the standard one.
type tcpListener struct{ *net.TCPListener }

func (l tcpListener) AcceptTCP() (transport.TCPConn, error) { return l.TCPListener.AcceptTCP() }

// read starts a read and returns its outcome.
func read(c net.Conn) <-chan error {
	got := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 1)); got <- err }()
	return got
}

func set(t *testing.T, c net.Conn, d time.Time) {
	t.Helper()
	if err := c.SetReadDeadline(d); err != nil {
		t.Fatal(err)
	}
}

func TestFarDeadlines(t *testing.T) {
	now := time.Now()
	ahead := now.Add(time.Hour)

	t.Run("ends the read when it is due", func(t *testing.T) {
		c, _ := pipe(t)
		set(t, c, ahead)
		if c.armed {
			t.Error("a timer was set for a deadline an hour ahead")
		}
		got := read(c)
		if c.isDue(now) {
			t.Error("due an hour too early")
		}
		c.expire(now) // must not do anything yet
		later := ahead.Add(time.Second)
		if !c.isDue(later) {
			t.Error("not due after the deadline")
		}
		c.expire(later)
		set(t, c, time.Now().Add(-time.Second)) // the janitor's clock is ahead of the real one in this test
		if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
		set(t, c, ahead) // clears what has passed
		if c.armed {
			t.Error("the passed deadline is still set")
		}
	})
	t.Run("a newer one counts", func(t *testing.T) {
		c, client := pipe(t)
		set(t, c, ahead)
		set(t, c, ahead.Add(time.Hour))
		c.expire(ahead.Add(time.Minute))
		got := read(c)
		if _, err := client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := <-got; err != nil {
			t.Errorf("read: %v", err)
		}
	})
	t.Run("none means none", func(t *testing.T) {
		c, _ := pipe(t)
		set(t, c, ahead)
		set(t, c, time.Time{})
		if c.isDue(ahead.Add(time.Hour)) {
			t.Error("a deadline that was taken back is due")
		}
	})
	t.Run("near and past ones are set at once", func(t *testing.T) {
		c, _ := pipe(t)
		set(t, c, time.Unix(1, 0))
		if err := <-read(c); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
		set(t, c, time.Now().Add(far/4))
		if !c.armed {
			t.Error("a near deadline was left to the janitor")
		}
	})
	t.Run("exact after it was taken over", func(t *testing.T) {
		c, _ := pipe(t)
		c.setExact()
		set(t, c, ahead)
		if !c.armed || c.isDue(ahead.Add(time.Hour)) {
			t.Error("the deadline was left to the janitor")
		}
	})
}

// The janitor itself finds and ends what is due.
func TestJanitor(t *testing.T) {
	c, _ := pipe(t)
	c.l.now.Store(time.Now().Add(-time.Hour).UnixNano()) // so that a near deadline looks far
	set(t, c, time.Now().Add(time.Millisecond))
	if c.armed {
		t.Fatal("the deadline was not left to the janitor")
	}
	got, stop, done := read(c), make(chan struct{}), make(chan struct{})
	go func() { defer close(done); c.l.janitor(stop) }()
	if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	close(stop)
	<-done
}
