package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
	"golang.org/x/net/netutil"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
)

// Bounds of the interface.
const (
	maxConnections = 256
	maxConcurrent  = 32
	maxHeader      = 64 << 10
	nextFree       = 100
	defaultLimit   = 100
	maxLimit       = 10_000
	headerTimeout  = 10 * time.Second
	idleTimeout    = time.Minute
	// writeTimeout bounds every answer, profiles included.
	writeTimeout  = 2 * time.Minute
	reloadTimeout = time.Minute
)

// Off is the address of an interface that is not wanted.
const Off = "off"

// Config is what users write.
type Config struct {
	// Address is host:port, or Off. Empty or config.DefaultAdmin takes the next
	// free port if that one is taken.
	Address string
}

// Sources is where the answers come from. Functions that are nil answer 501.
// They are called concurrently and should answer within seconds.
type Sources struct {
	// Ready reports whether the node serves, or the reasons why not.
	Ready func() (bool, []string)
	// Members is the group; a zero Local is left out.
	Members func() channel.View
	// Stack and Sessions are written as JSON. Sessions show no more than a
	// prefix of their ids.
	Stack    func() any
	Plugins  func() []core.PluginStatus
	Sessions func(limit int) any
	// Attributes are those of the contexts: names and sizes, no values.
	Attributes func(limit int) any
	// Config is YAML without secrets.
	Config  func() []byte
	Metrics func() []channel.Sample
	Reload  func(ctx context.Context) error
	// Drain begins to drain the node, or joins that, and returns when it is done
	// or ctx ends. Drained returns the report as it is now, with up to limit
	// sessions.
	Drain   func(ctx context.Context)
	Drained func(limit int) any
}

// Member is an element of /v1/members.
type Member struct {
	// Name is the name the member announced, or its address.
	Name string `json:"name"`
	// Address is the member's receiver, host:port.
	Address string `json:"address"`
	ID      string `json:"id"`
	Domain  string `json:"domain,omitempty"`
	// AliveSeconds is how long the member had been up when it was last heard.
	AliveSeconds float64 `json:"aliveSeconds"`
	// Local is true of the node that answers.
	Local bool `json:"local"`
}

// Server serves the interface.
type Server struct {
	cfg     Config
	src     Sources
	set     channel.Settings
	handler http.Handler
	names   []string // host names that a request may have, lower case
	slots   chan struct{}

	refusedHost, refusedOrigin, refusedBusy *channel.Counter

	mu     sync.Mutex // guards what follows; not held while waiting
	addr   string
	srv    *http.Server
	cancel context.CancelFunc // ends running requests
	done   chan struct{}      // closed when Serve has returned
}

// New returns a server. Nothing is opened before Start.
func New(c Config, src Sources, s channel.Settings) (*Server, error) {
	if c.Address == "" {
		c.Address = config.DefaultAdmin
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	a := &Server{cfg: c, src: src, set: s, slots: make(chan struct{}, maxConcurrent), names: []string{"localhost"}}
	if c.Address != Off {
		host, port, err := net.SplitHostPort(c.Address)
		if err != nil {
			return nil, fmt.Errorf("admin: address %q: %w; write host:port or off", c.Address, err)
		}
		if n, err := strconv.Atoi(port); err != nil || n < 0 || n > math.MaxUint16 {
			return nil, fmt.Errorf("admin: address %q: %q is not a port", c.Address, port)
		}
		if s.Net == nil {
			return nil, errors.New("admin: no network in the settings")
		}
		a.names = append(a.names, strings.ToLower(host))
	}
	if name, err := os.Hostname(); err == nil {
		a.names = append(a.names, strings.ToLower(name))
	}
	counter := func(reason string) *channel.Counter {
		return s.Metrics.Counter("admin_refused_total", "Requests to the admin API that were refused.", "reason", reason)
	}
	a.refusedHost, a.refusedOrigin, a.refusedBusy = counter("host"), counter("origin"), counter("busy")
	a.handler = a.guard(a.routes())
	return a, nil
}

// Start listens and serves.
func (a *Server) Start(context.Context) error {
	if a.cfg.Address == Off {
		return nil
	}
	l, err := a.listen()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	errorLog, err := zap.NewStdLogAt(a.set.Logger, zap.WarnLevel)
	if err != nil {
		cancel()
		_ = l.Close()
		return fmt.Errorf("admin: %w", err)
	}
	srv := &http.Server{
		Handler: a.handler, ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout, IdleTimeout: idleTimeout, WriteTimeout: writeTimeout,
		MaxHeaderBytes: maxHeader, ErrorLog: errorLog, BaseContext: func(net.Listener) context.Context { return ctx },
	}
	done := make(chan struct{})
	a.mu.Lock()
	if a.srv != nil {
		a.mu.Unlock()
		cancel()
		_ = l.Close()
		return errors.New("admin: started twice")
	}
	a.addr, a.srv, a.cancel, a.done = l.Addr().String(), srv, cancel, done
	a.mu.Unlock()
	go func() { // joined by Stop
		defer close(done)
		if err := srv.Serve(netutil.LimitListener(l, maxConnections)); !errors.Is(err, http.ErrServerClosed) {
			a.set.Logger.Error("the admin API ended", zap.Error(err))
		}
	}()
	return nil
}

// listen opens the listener, on one of the next ports if the default one is
// taken.
func (a *Server) listen() (net.Listener, error) {
	first, err := a.set.Net.ResolveTCPAddr("tcp", a.cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("admin: address %q: %w", a.cfg.Address, err)
	}
	addr := first.AddrPort()
	if !addr.Addr().IsValid() { // ":8077"
		addr = netip.AddrPortFrom(netip.IPv6Unspecified(), addr.Port())
	}
	tries := 1
	if a.cfg.Address == config.DefaultAdmin {
		tries = nextFree
	}
	for {
		l, err := channel.ListenTCP(a.set.Net, addr)
		if err == nil {
			return l, nil
		}
		if tries--; tries <= 0 || !channel.IsAddrInUse(err) {
			return nil, fmt.Errorf("admin: %w", err)
		}
		addr = netip.AddrPortFrom(addr.Addr(), addr.Port()+1)
	}
}

// Addr returns the address that is listened on, host:port, or "" before Start
// and if the interface is off.
func (a *Server) Addr() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.addr
}

// Stop ends running requests and closes the listener. It works twice and without
// Start.
func (a *Server) Stop(ctx context.Context) error {
	a.mu.Lock()
	srv, cancel, done := a.srv, a.cancel, a.done
	a.mu.Unlock()
	if srv == nil {
		return nil
	}
	cancel()
	err := srv.Shutdown(ctx)
	if err != nil { // out of time: what still runs is cut off
		err = fmt.Errorf("admin: stop: %w", errors.Join(err, srv.Close()))
	}
	<-done
	return err
}

// guard refuses what a browser was tricked into, and what is too much.
func (a *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		switch {
		case !a.knownHost(r.Host):
			a.refusedHost.Inc()
			http.Error(w, "this host name is not one of this node: use its address or localhost", http.StatusForbidden)
			return
		case foreign(r):
			a.refusedOrigin.Inc()
			http.Error(w, "requests of other sites are refused", http.StatusForbidden)
			return
		}
		select {
		case a.slots <- struct{}{}:
			defer func() { <-a.slots }()
		default:
			a.refusedBusy.Inc()
			http.Error(w, "too many requests at once", http.StatusServiceUnavailable)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// knownHost reports whether a Host header is an address or one of this node's
// names. A page that has rebound its own name to this machine has another one.
func (a *Server) knownHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	for _, n := range a.names {
		if host == n && n != "" {
			return true
		}
	}
	return false
}

// foreign reports whether a browser sent the request for another site.
func foreign(r *http.Request) bool {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
		return true
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return false
	}
	u, err := url.Parse(origin)
	return err != nil || !strings.EqualFold(u.Host, r.Host)
}

func (a *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", a.index)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", a.ready)
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.registry(), promhttp.HandlerOpts{
		ErrorLog: promLog{a.set.Logger}, ErrorHandling: promhttp.ContinueOnError,
	}))
	mux.HandleFunc("GET /v1/members", source(a.src.Members != nil, func(w http.ResponseWriter, _ *http.Request) {
		a.json(w, http.StatusOK, members(a.src.Members()))
	}))
	mux.HandleFunc("GET /v1/stack", source(a.src.Stack != nil, func(w http.ResponseWriter, _ *http.Request) {
		a.json(w, http.StatusOK, a.src.Stack())
	}))
	mux.HandleFunc("GET /v1/plugins", source(a.src.Plugins != nil, func(w http.ResponseWriter, _ *http.Request) {
		list := a.src.Plugins()
		if list == nil {
			list = []core.PluginStatus{}
		}
		a.json(w, http.StatusOK, list)
	}))
	mux.HandleFunc("GET /v1/sessions", source(a.src.Sessions != nil, a.list(a.src.Sessions)))
	mux.HandleFunc("GET /v1/attributes", source(a.src.Attributes != nil, a.list(a.src.Attributes)))
	mux.HandleFunc("GET /v1/config", source(a.src.Config != nil, a.config))
	mux.HandleFunc("POST /v1/reload", source(a.src.Reload != nil, a.reload))
	mux.HandleFunc("POST /v1/drain", source(a.src.Drain != nil, a.drain))
	mux.HandleFunc("POST /drain", source(a.src.Drain != nil, a.drain))
	mux.HandleFunc("GET /v1/drain", source(a.src.Drained != nil, a.drained))
	profiles(mux)
	return mux
}

// source answers 501 if there is nothing to answer from.
func source(ok bool, h http.HandlerFunc) http.HandlerFunc {
	if ok {
		return h
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "this node has no answer to that", http.StatusNotImplemented)
	}
}

func (a *Server) index(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte("/healthz\n/readyz\n/metrics\n/v1/members\n/v1/stack\n/v1/plugins\n/v1/sessions\n/v1/attributes\n/v1/config\n/v1/reload (POST)\n/v1/drain (POST, GET)\n/debug/pprof/\n"))
}

func (a *Server) ready(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if a.src.Ready == nil {
		http.Error(w, "not known", http.StatusServiceUnavailable)
		return
	}
	ok, reasons := a.src.Ready()
	if ok {
		_, _ = w.Write([]byte("ready\n"))
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = w.Write([]byte("not ready\n"))
	for _, reason := range reasons {
		_, _ = w.Write([]byte(strings.ReplaceAll(reason, "\n", " ") + "\n"))
	}
}

// members lists a view, this node first.
func members(v channel.View) []Member {
	list := make([]Member, 0, len(v.Members)+1)
	if !v.Local.IsZero() {
		list = append(list, member(v.Local, true))
	}
	for _, m := range v.Members {
		list = append(list, member(m, false))
	}
	return list
}

func member(m channel.Member, local bool) Member {
	address := ""
	if m.Host.IsValid() {
		address = m.Addr().String()
	}
	return Member{Name: m.Name(), Address: address, ID: m.ID.String(), Domain: m.Domain, AliveSeconds: m.Alive.Seconds(), Local: local}
}

// list answers with as many as the request asks for.
func (a *Server) list(of func(limit int) any) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if limit, ok := limitOf(w, r); ok {
			a.json(w, http.StatusOK, of(limit))
		}
	}
}

// limitOf reads the parameter limit; it has answered if it is not ok.
func limitOf(w http.ResponseWriter, r *http.Request) (limit int, ok bool) {
	limit = defaultLimit
	if text := r.URL.Query().Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 || n > maxLimit {
			http.Error(w, fmt.Sprintf("limit must be a number from 0 to %d", maxLimit), http.StatusBadRequest)
			return 0, false
		}
		limit = n
	}
	return limit, true
}

func (a *Server) config(w http.ResponseWriter, r *http.Request) {
	text := a.src.Config()
	if !strings.Contains(r.Header.Get("Accept"), "application/json") && r.URL.Query().Get("format") != "json" {
		w.Header().Set("Content-Type", "application/yaml; charset=utf-8")
		_, _ = w.Write(text)
		return
	}
	var v any
	if err := config.Decode(text, "the configuration", &v); err != nil {
		a.json(w, http.StatusInternalServerError, failure{err.Error()})
		return
	}
	a.json(w, http.StatusOK, v)
}

// failure is the answer to what did not work.
type failure struct {
	Error string `json:"error"`
}

func (a *Server) reload(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), reloadTimeout)
	defer cancel()
	if err := a.src.Reload(ctx); err != nil {
		a.json(w, http.StatusUnprocessableEntity, failure{err.Error()})
		return
	}
	a.json(w, http.StatusOK, struct {
		Reloaded bool `json:"reloaded"`
	}{true})
}

func (a *Server) drain(w http.ResponseWriter, r *http.Request) {
	limit, ok := limitOf(w, r)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), writeTimeout-5*time.Second)
	defer cancel()
	a.src.Drain(ctx)
	a.json(w, http.StatusOK, a.src.Drained(limit))
}

func (a *Server) drained(w http.ResponseWriter, r *http.Request) {
	if limit, ok := limitOf(w, r); ok {
		a.json(w, http.StatusOK, a.src.Drained(limit))
	}
}

func (a *Server) json(w http.ResponseWriter, status int, v any) {
	out, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		a.set.Logger.Warn("the admin API cannot write an answer", zap.Error(err))
		http.Error(w, "the answer cannot be written as JSON", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(append(out, '\n'))
}
