package httpd

import (
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/pion/transport/v2"
)

// listener bounds the open connections and knows them, so that also hijacked
// ones can be closed.
type listener struct {
	transport.TCPListener
	slots          chan struct{} // one token per open connection
	closed         chan struct{}
	closeOnce      sync.Once
	accepted, full *channel.Counter

	now atomic.Int64 // the janitor's clock, ns since 1970

	mu    sync.Mutex
	conns map[tracked]struct{} // guarded by mu
	empty chan struct{}        // closed when conns becomes empty; nil if nobody waits; guarded by mu
}

// tracked is a connection of a listener.
type tracked interface {
	net.Conn
	state() *connInfo
}

// connInfo is what a listener knows of a connection.
type connInfo struct {
	l      *listener
	once   sync.Once
	active atomic.Bool // has sent something
}

func newListener(l transport.TCPListener, limit int, accepted, full *channel.Counter) *listener {
	tracking := &listener{
		TCPListener: l, slots: make(chan struct{}, limit), closed: make(chan struct{}),
		accepted: accepted, full: full, conns: map[tracked]struct{}{},
	}
	tracking.now.Store(time.Now().UnixNano())
	return tracking
}

// Accept waits for a slot and a connection.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	default:
		l.full.Inc()
		select {
		case l.slots <- struct{}{}:
		case <-l.closed:
			return nil, net.ErrClosed
		}
	}
	c, err := l.TCPListener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	l.accepted.Inc()
	var t tracked
	if tcp, ok := c.(*net.TCPConn); ok {
		t = &tcpConn{TCPConn: tcp, connInfo: connInfo{l: l}}
	} else {
		t = &anyConn{Conn: c, connInfo: connInfo{l: l}}
	}
	l.mu.Lock()
	l.conns[t] = struct{}{}
	l.mu.Unlock()
	return t, nil
}

// Close ends accepting; the connections stay.
func (l *listener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.TCPListener.Close()
}

// drained waits until no connection is open; it is false if d has passed.
func (l *listener) drained(d time.Duration) bool {
	l.mu.Lock()
	if len(l.conns) == 0 {
		l.mu.Unlock()
		return true
	}
	empty := make(chan struct{})
	l.empty = empty
	l.mu.Unlock()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-empty:
		return true
	case <-t.C:
		return false
	}
}

// closeNew closes the connections that have sent nothing yet, closeAll all.
func (l *listener) closeNew() { l.closeIf(func(i *connInfo) bool { return !i.active.Load() }) }
func (l *listener) closeAll() { l.closeIf(func(*connInfo) bool { return true }) }

func (l *listener) closeIf(which func(*connInfo) bool) {
	l.mu.Lock()
	var list []tracked
	for c := range l.conns {
		if which(c.state()) {
			list = append(list, c)
		}
	}
	l.mu.Unlock()
	for _, c := range list {
		_ = c.Close()
	}
}

// forget frees the slot of a connection.
func (l *listener) forget(t tracked) {
	t.state().once.Do(func() {
		l.mu.Lock()
		delete(l.conns, t)
		if len(l.conns) == 0 && l.empty != nil {
			close(l.empty)
			l.empty = nil
		}
		l.mu.Unlock()
		<-l.slots
	})
}

// connState notes that a connection is in use, or has been taken over.
func connState(c net.Conn, s http.ConnState) {
	if s != http.StateActive && s != http.StateHijacked {
		return
	}
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if t, ok := c.(*tcpConn); ok && s == http.StateHijacked {
		t.setExact()
	}
	if t, ok := c.(tracked); ok && !t.state().active.Load() {
		t.state().active.Store(true)
	}
}

// A server sets a read deadline several times per request, nearly always to
// replace it before it is due. A timer for each costs more than the rest of the
// connector; so deadlines that are far ahead are only noted, and one goroutine,
// the janitor, looks for those that are due.
const (
	// janitorTick is how late a far deadline may come.
	janitorTick = 500 * time.Millisecond
	// far is how far ahead a deadline is left to the janitor.
	far = 4 * janitorTick
)

// janitor ends reads whose noted deadline has passed, until stop is closed.
func (l *listener) janitor(stop <-chan struct{}) {
	tick := time.NewTicker(janitorTick)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-tick.C:
			l.now.Store(now.UnixNano())
			l.mu.Lock()
			var due []*tcpConn
			for c := range l.conns {
				if t, ok := c.(*tcpConn); ok && t.isDue(now) {
					due = append(due, t)
				}
			}
			l.mu.Unlock()
			for _, c := range due {
				c.expire(now)
			}
		}
	}
}

// tcpConn keeps the methods of *net.TCPConn, which net/http uses to send files
// without copying them.
type tcpConn struct {
	*net.TCPConn
	connInfo

	mu    sync.Mutex // held while a deadline is set, which does not block
	due   int64      // noted read deadline, ns since 1970; 0 for none
	armed bool       // the connection itself has a read deadline
	exact bool       // no deadline is left to the janitor any more
}

// SetReadDeadline notes a deadline that is far ahead and sets any other.
func (c *tcpConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.due = 0
	if t.IsZero() && !c.armed {
		return nil
	}
	if !c.exact && !t.IsZero() && t.UnixNano() > c.l.now.Load()+int64(far) {
		c.due = t.UnixNano()
		t = time.Time{}
		if !c.armed {
			return nil
		}
	}
	c.armed = !t.IsZero()
	return c.TCPConn.SetReadDeadline(t)
}

// SetDeadline sets both deadlines.
func (c *tcpConn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.TCPConn.SetWriteDeadline(t)
}

func (c *tcpConn) isDue(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.due != 0 && c.due <= now.UnixNano()
}

// expire ends the read if the deadline has not been changed meanwhile.
func (c *tcpConn) expire(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.due != 0 && c.due <= now.UnixNano() {
		c.due, c.armed = 0, true
		_ = c.TCPConn.SetReadDeadline(now) // fails if the connection is closed: good
	}
}

// setExact leaves no deadline to the janitor any more: whoever took the
// connection over may need them to the millisecond.
func (c *tcpConn) setExact() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.exact = true
}

func (c *tcpConn) state() *connInfo { return &c.connInfo }

func (c *tcpConn) Close() error {
	c.l.forget(c)
	return c.TCPConn.Close()
}

// anyConn is a connection of another network than the real one.
type anyConn struct {
	net.Conn
	connInfo
}

func (c *anyConn) state() *connInfo { return &c.connInfo }

func (c *anyConn) Close() error {
	c.l.forget(c)
	return c.Conn.Close()
}
