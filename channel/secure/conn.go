package secure

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

func isEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// handshakeTimeout bounds a handshake whose caller gives no other bound.
const handshakeTimeout = 10 * time.Second

// Dial implements transport.Net.
func (n *Net) Dial(network, address string) (net.Conn, error) {
	return n.CreateDialer(&net.Dialer{}).Dial(network, address)
}

// DialTCP implements transport.Net.
func (n *Net) DialTCP(network string, laddr, raddr *net.TCPAddr) (transport.TCPConn, error) {
	c, err := n.Net.DialTCP(network, laddr, raddr)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	s, err := n.connect(ctx, c, raddr.String())
	if err != nil {
		return nil, err
	}
	return &tcpStream{c, s}, nil
}

// CreateDialer implements transport.Net. The dialer is a channel.ContextDialer.
func (n *Net) CreateDialer(d *net.Dialer) transport.Dialer {
	return &dialer{n, n.Net.CreateDialer(d), d}
}

type dialer struct {
	n     *Net
	inner transport.Dialer
	cfg   *net.Dialer
}

func (d *dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

// DialContext implements channel.ContextDialer. The handshake is done when it
// returns.
func (d *dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if !strings.HasPrefix(network, "tcp") {
		return d.inner.Dial(network, address)
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		a, rerr := d.n.ResolveTCPAddr(network, address)
		if rerr != nil {
			return nil, rerr
		}
		to = a.AddrPort()
	}
	if d.cfg.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.cfg.Timeout)
		defer cancel()
	}
	c, err := channel.Dial(ctx, d.n.Net, to)
	if err != nil {
		return nil, err
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, handshakeTimeout)
		defer cancel()
	}
	return d.n.connect(ctx, c, address)
}

// connect makes the handshake of a connection that we have opened.
func (n *Net) connect(ctx context.Context, c net.Conn, address string) (*stream, error) {
	t := tls.Client(c, n.identity().client)
	err := t.HandshakeContext(ctx)
	if err == nil {
		s := &stream{Conn: c, tls: t, n: n}
		s.done.Store(true)
		return s, nil
	}
	c.Close()
	r := reason(err)
	n.dialed[r].Inc()
	hint := ""
	if r == refusedPlain || r == refusedClosed {
		hint = " (does the peer have channel.tls? Apache Tribes has no TLS)"
	}
	if ctx.Err() != nil { // it has closed the connection
		err = fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	return nil, fmt.Errorf("secure: TLS with %s%s: %w", address, hint, err)
}

// ListenTCP implements transport.Net.
func (n *Net) ListenTCP(network string, laddr *net.TCPAddr) (transport.TCPListener, error) {
	l, err := n.Net.ListenTCP(network, laddr)
	if err != nil {
		return nil, err
	}
	return &listener{l, n}, nil
}

type listener struct {
	transport.TCPListener
	n *Net
}

// Accept does not make the handshake: the first Read of the connection does, in
// its own goroutine and under its own deadline.
func (l *listener) Accept() (net.Conn, error) {
	c, err := l.TCPListener.Accept()
	if err != nil {
		return nil, err
	}
	return l.n.accept(c), nil
}

func (l *listener) AcceptTCP() (transport.TCPConn, error) {
	c, err := l.TCPListener.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return &tcpStream{c, l.n.accept(c)}, nil
}

func (n *Net) accept(c net.Conn) *stream {
	return &stream{Conn: c, tls: tls.Server(c, n.identity().server), n: n}
}

// stream is one connection.
type stream struct {
	net.Conn // below TLS; deadlines, addresses
	tls      *tls.Conn
	n        *Net
	done     atomic.Bool // the handshake
}

// Read reads, after the handshake if that has not been made: one goroutine at a
// time, and nobody may write before the first Read of an accepted connection has
// returned.
func (s *stream) Read(b []byte) (int, error) {
	if !s.done.Load() {
		if err := s.handshake(); err != nil {
			return 0, err
		}
	}
	return s.tls.Read(b)
}

func (s *stream) handshake() error {
	err := s.tls.Handshake()
	if err == nil {
		s.done.Store(true)
		return nil
	}
	r := reason(err)
	s.n.accepted[r].Inc()
	if r != refusedClosed && s.n.mayLog() {
		s.n.log.Warn("refused a connection", zap.Stringer("remote", s.RemoteAddr()), zap.String("reason", r), zap.Error(err))
	}
	return fmt.Errorf("secure: TLS with %s: %w", s.RemoteAddr(), err)
}

func (s *stream) Write(b []byte) (int, error) { return s.tls.Write(b) }

// Close closes at once: saying good-bye could block on a peer that does not
// read, and frames tell where they end.
func (s *stream) Close() error { return s.Conn.Close() }

// tcpStream is a stream with the methods of a TCP connection.
type tcpStream struct {
	transport.TCPConn
	s *stream
}

func (t *tcpStream) Read(b []byte) (int, error)          { return t.s.Read(b) }
func (t *tcpStream) Write(b []byte) (int, error)         { return t.s.Write(b) }
func (t *tcpStream) Close() error                        { return t.s.Close() }
func (t *tcpStream) CloseWrite() error                   { return t.s.tls.CloseWrite() }
func (t *tcpStream) ReadFrom(r io.Reader) (int64, error) { return io.Copy(struct{ io.Writer }{t.s}, r) }
