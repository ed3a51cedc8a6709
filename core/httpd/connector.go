package httpd

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

// closeGrace is how long handlers get to close their connections after their
// requests have been cancelled at the end of Stop.
const closeGrace = time.Second

// Connector accepts connections and serves their requests.
type Connector struct {
	cfg     Config
	handler http.Handler
	set     channel.Settings

	accepted, full, errors *channel.Counter

	// life is a lock (one token) over Start and Stop, which take time.
	life     chan struct{}
	started  bool // guarded by life
	stopped  bool // guarded by life
	server   *http.Server
	listener *listener
	addr     atomic.Pointer[string]
	cancel   context.CancelFunc // ends the requests
	served   chan struct{}      // closed when Serve has returned
}

// New returns a connector that will serve h. It needs Net of the settings.
func New(c Config, h http.Handler, s channel.Settings) (*Connector, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if h == nil {
		return nil, errors.New("httpd: no handler")
	}
	if s.Net == nil {
		return nil, errors.New("httpd: no network: set Settings.Net")
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	c = c.withDefaults()
	labels := []string{"connector", s.Name}
	k := &Connector{
		cfg: c, handler: h, set: s, life: make(chan struct{}, 1), served: make(chan struct{}),
		accepted: s.Metrics.Counter("httpd_connections_total", "Connections accepted.", labels...),
		full:     s.Metrics.Counter("httpd_connections_full_total", "Times a connection had to wait because max_connections was reached.", labels...),
		errors:   s.Metrics.Counter("httpd_connection_errors_total", "Connections that failed before or outside a request: TLS handshakes, malformed HTTP.", labels...),
	}
	s.Metrics.Gauge("httpd_connections", "Open connections.", func() float64 { return float64(k.Connections()) }, labels...)
	return k, nil
}

// Addr returns the address the connector listens on, host:port, once started;
// before that what is configured.
func (k *Connector) Addr() string {
	if a := k.addr.Load(); a != nil {
		return *a
	}
	return k.cfg.Address
}

// Scheme returns "https" or "http".
func (k *Connector) Scheme() string {
	if k.cfg.TLS != nil {
		return "https"
	}
	return "http"
}

// Connections returns the number of open connections.
func (k *Connector) Connections() int {
	if k.addr.Load() == nil {
		return 0
	}
	return len(k.listener.slots)
}

// Start binds and begins to serve. ctx is only for starting.
func (k *Connector) Start(ctx context.Context) error {
	select {
	case k.life <- struct{}{}:
		defer func() { <-k.life }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if k.started || k.stopped {
		return errors.New("httpd: a connector can be started once")
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(k.cfg.TLS != nil)
	protocols.SetUnencryptedHTTP2(k.cfg.Protocol == H2C)
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	k.server = &http.Server{
		Handler:           k.handler,
		Protocols:         protocols,
		ReadHeaderTimeout: k.cfg.HeaderTimeout,
		IdleTimeout:       k.cfg.IdleTimeout,
		MaxHeaderBytes:    k.cfg.MaxHeaderBytes,
		ErrorLog:          log.New(errorLog{k}, "", 0),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnState:         connState,
	}
	if k.cfg.TLS != nil {
		var err error
		if k.server.TLSConfig, err = k.cfg.TLS.load(); err != nil {
			cancel()
			return err
		}
	}
	l, err := k.bind()
	if err != nil {
		cancel()
		return err
	}
	k.listener = newListener(l, k.cfg.MaxConnections, k.accepted, k.full)
	addr := l.Addr().String()
	k.addr.Store(&addr)
	k.cancel, k.started = cancel, true
	go k.listener.janitor(k.served)
	go k.serve() // ends when Stop closes the server; Stop waits for it
	k.set.Logger.Info("listening", zap.String("address", addr), zap.String("protocol", k.cfg.Protocol), zap.Bool("tls", k.cfg.TLS != nil))
	return nil
}

func (k *Connector) serve() {
	defer close(k.served)
	var err error
	if k.cfg.TLS != nil {
		err = k.server.ServeTLS(k.listener, "", "")
	} else {
		err = k.server.Serve(k.listener)
	}
	if !errors.Is(err, http.ErrServerClosed) {
		k.set.Logger.Error("connector stopped accepting", zap.String("address", k.Addr()), zap.Error(err))
	}
}

// bind listens on the configured port or, if the user allows, one of the next.
func (k *Connector) bind() (transport.TCPListener, error) {
	host, port, err := net.SplitHostPort(k.cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("httpd: address %q: %w", k.cfg.Address, err)
	}
	if host == "*" { // as in Tomcat and others
		host = ""
	}
	first, err := k.set.Net.ResolveTCPAddr("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("httpd: address %q: %w", k.cfg.Address, err)
	}
	addr := first.AddrPort()
	for try := 0; ; try++ {
		at := first.Port + try
		l, err := k.listen(addr.Addr().IsValid(), first, at)
		if err == nil {
			if try > 0 {
				k.set.Logger.Warn("port is taken, using the next free one", zap.String("configured", k.cfg.Address), zap.Stringer("address", l.Addr()))
			}
			return l, nil
		}
		if !channel.IsAddrInUse(err) {
			return nil, fmt.Errorf("httpd: cannot listen on %s (%w): choose an address of this machine and a port you may use", k.cfg.Address, err)
		}
		if first.Port == 0 || try >= k.cfg.NextFree || at >= 65535 {
			return nil, k.taken(first.Port, at, err)
		}
	}
}

func (k *Connector) listen(valid bool, a *net.TCPAddr, port int) (transport.TCPListener, error) {
	next := *a
	next.Port = port
	if !valid { // all addresses of both families
		return k.set.Net.ListenTCP("tcp", &next)
	}
	return channel.ListenTCP(k.set.Net, next.AddrPort())
}

// taken says which ports are taken, by whom if that can be found out, and what
// to do.
func (k *Connector) taken(first, last int, err error) error {
	which := "port " + strconv.Itoa(first)
	if last > first {
		which = fmt.Sprintf("ports %d to %d", first, last)
	}
	return fmt.Errorf("httpd: cannot listen on %s: %s taken by %s: stop it, configure another address, or set next_free: %w",
		k.cfg.Address, which+map[bool]string{true: " are", false: " is"}[last > first], owner(first), err)
}

// Stop lets running requests end as long as ctx allows, then cancels and closes
// what is left, WebSockets included. A handler that ignores all that may still
// run when Stop returns; core.Engine's Stop waits for it. Stop works twice and
// without Start.
func (k *Connector) Stop(ctx context.Context) error {
	k.life <- struct{}{} // Start is short
	defer func() { <-k.life }()
	if !k.started || k.stopped {
		k.stopped = true
		return nil
	}
	k.stopped = true
	// Connections that never sent a byte would hold Shutdown up for seconds.
	k.listener.closeNew()
	err := k.server.Shutdown(ctx)
	// What is left now are requests that overran ctx and hijacked connections,
	// which Shutdown does not know. They get a signal and a moment.
	k.cancel()
	if !k.listener.drained(closeGrace) {
		k.listener.closeAll()
	}
	_ = k.server.Close()
	<-k.served
	if err != nil {
		return fmt.Errorf("httpd: %s: requests were cut off because the time to stop was over: %w", k.Addr(), err)
	}
	return nil
}

// errorLog receives net/http's complaints about connections. They can be caused
// by anybody, so they are counted and shown at debug level only.
type errorLog struct{ k *Connector }

func (e errorLog) Write(p []byte) (int, error) {
	e.k.errors.Inc()
	e.k.set.Logger.Debug("connection failed", zap.String("problem", strings.TrimSpace(string(p))))
	return len(p), nil
}
