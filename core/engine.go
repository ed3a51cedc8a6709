package core

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
	"go.uber.org/zap"
)

// EngineOptions describe the outermost container.
type EngineOptions struct {
	Name string
	// Route (Tomcat: jvmRoute) is appended to the session ids that clients see,
	// so that a balancer finds this node again; letters, digits, dot, dash and
	// underscore. Empty for none.
	Route string
	// DefaultHost serves requests for unknown host names; default is the first
	// host.
	DefaultHost string
	Valves      []Valve
	Hosts       []HostOptions
	// Listeners hear of the sessions of all contexts; see also ListeningValve.
	Listeners []SessionListening
	// Shared is the table in which valves keep what belongs to a user and not to
	// one application, as sessions of contexts whose names are no paths; nil for
	// none.
	Shared Sessions
	// Ready says why the node should get no requests yet, or nil. It is asked
	// per health check and must not block. nil means always ready.
	Ready func() error
	// Draining says that the node takes no new sessions, or is nil. While it
	// does, responses wait for level Synced. It is asked by every request.
	Draining func() bool
}

// DrainingHeader is set in a response that says so because the node is draining,
// and another node would have answered otherwise. Its value is DrainingRefused
// or DrainingNoSession.
const DrainingHeader = "Longhouse-Draining"

const (
	// DrainingRefused: no application has seen the request; a balancer may send
	// it to another node whatever its method.
	DrainingRefused = "refused"
	// DrainingNoSession: the application wanted a new session and got none. If
	// the response is a 503, a balancer may repeat an idempotent request on
	// another node.
	DrainingNoSession = "no-session"
)

// Engine is the outermost container: an http.Handler that finds host and
// context of a request and passes it through their pipelines. All methods may
// be called concurrently.
type Engine struct {
	name, route string
	shared      Sessions
	ready       func() error
	draining    func() bool
	pipe        *pipeline
	hosts       map[string]*Host // by name and alias, lower case
	all         []*Host
	def         *Host
	log         *zap.Logger
	metrics     engineMetrics
	listening   listenerMetrics
	subs        []*subscription // of Listeners and the engine's valves

	next atomic.Pointer[Engine] // see Supersede

	// life is a lock (one token) over what takes time: starting and stopping
	// pipelines and switching contexts. A mutex must not be held that long.
	life    chan struct{}
	state   engineState    // guarded by life
	retired sync.WaitGroup // goroutines that stop the valves of replaced contexts
}

type engineState uint8

const (
	engineNew engineState = iota
	engineStarted
	engineStopped
)

type engineMetrics struct {
	requests, badPaths, unrouted, panics, commitFailures, lostCommits, badIDs, manyIDs, aborted, drained *channel.Counter
}

// ErrStopped is returned by methods of an engine that has been stopped.
var ErrStopped = errors.New("core: engine stopped")

// ErrNoContext is returned when there is no such host or context.
var ErrNoContext = errors.New("core: no such context")

// NewEngine builds the containers and wraps their pipelines. It needs Logger
// and Metrics of the settings; both may be nil.
func NewEngine(o EngineOptions, s channel.Settings) (*Engine, error) {
	log := s.Logger
	if log == nil {
		log = zap.NewNop()
	}
	if o.Route != "" {
		if _, _, ok := session.ParseID(strings.Repeat("0", session.MinID) + "." + o.Route); !ok {
			return nil, fmt.Errorf("core: engine %s: route %q cannot stand in a session id: use at most %d letters, digits, dots, dashes and underscores", o.Name, o.Route, session.MaxRoute)
		}
	}
	m := s.Metrics
	e := &Engine{
		name: o.Name, route: o.Route, shared: o.Shared, ready: o.Ready, draining: o.Draining, log: log,
		hosts:     map[string]*Host{},
		life:      make(chan struct{}, 1),
		listening: newListenerMetrics(m),
		metrics: engineMetrics{
			requests:       m.Counter("http_requests_total", "Requests that reached the engine."),
			badPaths:       m.Counter("http_bad_paths_total", "Requests refused because of their path."),
			unrouted:       m.Counter("http_unrouted_total", "Requests for which there was no context."),
			panics:         m.Counter("http_panics_total", "Requests whose handler panicked."),
			commitFailures: m.Counter("http_commit_failures_total", "Responses replaced by 503 because a hook before the header failed, such as synchronous replication."),
			lostCommits:    m.Counter("http_async_commit_failures_total", "Session changes that the manager did not take at the end of a request."),
			drained:        m.Counter("http_refused_draining_total", "Requests that were refused before an application saw them, because the node is draining."),
			badIDs:         m.Counter("http_bad_session_ids_total", "Presented session ids that do not have the form of one."),
			manyIDs:        m.Counter("http_many_session_ids_total", "Requests that presented more session ids than are tried."),
			aborted:        m.Counter("http_aborted_total", "Responses cut off after the header, because the handler panicked or late session changes could not be replicated."),
		},
	}
	var errs []error
	for _, ho := range o.Hosts {
		if err := e.addHost(ho); err != nil {
			errs = append(errs, err)
		}
	}
	if len(e.all) > 0 {
		e.def = e.all[0]
	}
	if o.DefaultHost != "" {
		if h := e.hosts[hostName(o.DefaultHost)]; h != nil {
			e.def = h
		} else {
			errs = append(errs, fmt.Errorf("core: engine %s: default host %q is none of its hosts", o.Name, o.DefaultHost))
		}
	}
	var err error
	if e.pipe, err = newPipeline("engine "+o.Name, o.Valves, http.HandlerFunc(engineEnd)); err != nil {
		errs = append(errs, err)
	}
	if e.subs, err = subscriptions("engine "+o.Name, o.Listeners, o.Valves, log, e.listening); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return e, nil
}

func (e *Engine) addHost(o HostOptions) error {
	h := &Host{name: o.Name, key: hostName(o.Name)}
	if h.key == "" {
		return fmt.Errorf("core: engine %s: host %q has no name", e.name, o.Name)
	}
	var errs []error
	for _, name := range append([]string{o.Name}, o.Aliases...) {
		key := hostName(name)
		if other := e.hosts[key]; other != nil && other != h {
			errs = append(errs, fmt.Errorf("core: engine %s: hosts %s and %s both have the name %q", e.name, other.name, h.name, name))
			continue
		}
		e.hosts[key] = h
	}
	contexts := new(contextMap).with("", nil)
	for _, co := range o.Contexts {
		c, err := e.newContext(h, co)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if contexts.byPath[c.path] != nil {
			errs = append(errs, fmt.Errorf("core: host %s has two contexts at %q", h.name, c.path))
			continue
		}
		contexts = contexts.with(c.path, c)
	}
	h.contexts.Store(contexts)
	var err error
	if h.pipe, err = newPipeline("host "+h.name, o.Valves, http.HandlerFunc(hostEnd)); err != nil {
		errs = append(errs, err)
	}
	if h.subs, err = subscriptions("host "+h.name, nil, o.Valves, e.log, e.listening); err != nil {
		errs = append(errs, err)
	}
	e.all = append(e.all, h)
	return errors.Join(errs...)
}

// Name returns the engine's name.
func (e *Engine) Name() string { return e.name }

// Route returns what is appended to session ids, or empty.
func (e *Engine) Route() string { return e.route }

// Shared returns the table for what belongs to a user and not to one
// application, or nil.
func (e *Engine) Shared() Sessions { return e.shared }

// Ready says why the node should get no requests, or nil.
func (e *Engine) Ready() error {
	if e.ready == nil {
		return nil
	}
	return e.ready()
}

// Hosts returns the hosts in their configured order.
func (e *Engine) Hosts() []*Host { return e.all }

// DefaultHost returns the host of requests for unknown names, or nil.
func (e *Engine) DefaultHost() *Host { return e.def }

// pipelines returns all current pipelines, outermost first.
func (e *Engine) pipelines() []*pipeline {
	ps := []*pipeline{e.pipe}
	for _, h := range e.all {
		ps = append(ps, h.pipe)
		for _, c := range h.Contexts() {
			ps = append(ps, c.pipe)
		}
	}
	return ps
}

// lock takes the life token.
func (e *Engine) lock(ctx context.Context) error {
	select {
	case e.life <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("core: engine %s: busy starting, stopping or switching a context: %w", e.name, context.Cause(ctx))
	}
}

func (e *Engine) unlock() { <-e.life }

// Start starts all valves, outermost first. If one fails, the others are
// stopped again.
func (e *Engine) Start(ctx context.Context) error {
	if err := e.lock(ctx); err != nil {
		return err
	}
	defer e.unlock()
	switch e.state {
	case engineStarted:
		return nil
	case engineStopped:
		return ErrStopped
	}
	ps := e.pipelines()
	for i, p := range ps {
		if err := p.start(ctx); err != nil {
			for ; i > 0; i-- {
				err = errors.Join(err, ps[i-1].stop(ctx))
			}
			return err
		}
	}
	for _, h := range e.all {
		for _, c := range h.Contexts() {
			e.attach(c)
		}
	}
	e.state = engineStarted
	return nil
}

// Stop stops all valves, innermost first, after the requests of replaced
// contexts have ended or ctx is over. Requests should have ended before: stop
// the connectors first. It works twice and without Start.
func (e *Engine) Stop(ctx context.Context) error {
	if err := e.lock(ctx); err != nil {
		return err
	}
	defer e.unlock()
	e.state = engineStopped
	var errs []error
	done := make(chan struct{})
	go func() { e.retired.Wait(); close(done) }()
	for _, h := range e.all {
		for _, c := range h.Contexts() {
			c.retire()
			select {
			case <-c.idle:
			case <-ctx.Done():
				errs = append(errs, fmt.Errorf("core: context %s: %d requests are still running: %w", c.name, c.Running(), context.Cause(ctx)))
			}
			errs = append(errs, c.detach(ctx))
		}
	}
	select {
	case <-done:
	case <-ctx.Done():
		errs = append(errs, fmt.Errorf("core: engine %s: replaced contexts still have requests: %w", e.name, context.Cause(ctx)))
	}
	for _, h := range e.all {
		errs = append(errs, stopAll(ctx, h.subs))
	}
	errs = append(errs, stopAll(ctx, e.subs))
	ps := e.pipelines()
	for i := len(ps) - 1; i >= 0; i-- {
		errs = append(errs, ps[i].stop(ctx))
	}
	return errors.Join(errs...)
}

// findHost returns the host of that name or alias; an empty name means the
// default host.
func (e *Engine) findHost(name string) *Host {
	if name == "" {
		return e.def
	}
	return e.hosts[hostName(name)]
}

// SetContext puts an application into service, in place of an earlier one at
// the same path of that host (empty: the default host). It returns when the new
// one serves; on an error the earlier one goes on. Requests that are inside the
// earlier one end there, then its valves are stopped.
func (e *Engine) SetContext(ctx context.Context, host string, o ContextOptions) (*Context, error) {
	h := e.findHost(host)
	if h == nil {
		return nil, fmt.Errorf("%w: host %q is not configured; add it as a host or an alias", ErrNoContext, host)
	}
	if err := e.lock(ctx); err != nil {
		return nil, err
	}
	defer e.unlock()
	if old := h.contexts.Load().byPath[strings.TrimSuffix(o.Path, "/")]; old != nil && o.Attributes == nil {
		o.Attributes = old.attributes.Again()
	}
	done := false
	defer func() {
		if o.Attributes != nil && !done {
			o.Attributes.Close()
		}
	}()
	c, err := e.newContext(h, o)
	if err != nil {
		return nil, err
	}
	switch e.state {
	case engineStopped:
		return nil, ErrStopped
	case engineStarted:
		if err := c.pipe.start(ctx); err != nil {
			return nil, err
		}
		e.attach(c)
	}
	e.swap(h, c.path, c)
	done = true
	return c, nil
}

// RemoveContext takes a context out of service; its running requests end.
func (e *Engine) RemoveContext(ctx context.Context, host, path string) error {
	h := e.findHost(host)
	path = strings.TrimSuffix(path, "/")
	if err := e.lock(ctx); err != nil {
		return err
	}
	defer e.unlock()
	if h == nil || h.contexts.Load().byPath[path] == nil {
		return fmt.Errorf("%w: host %q, path %q", ErrNoContext, host, path)
	}
	e.swap(h, path, nil)
	return nil
}

// Supersede has next serve the requests that still reach e once e is stopping.
// Call it before Stop when next takes the place of e: a request that was about
// to enter e is not refused then.
func (e *Engine) Supersede(next *Engine) { e.next.Store(next) }

// retireTimeout bounds the stop of a replaced context's valves.
const retireTimeout = 10 * time.Second

// swap replaces the context at path and retires the old one. The life lock is
// held.
func (e *Engine) swap(h *Host, path string, c *Context) {
	m := h.contexts.Load()
	old := m.byPath[path]
	h.contexts.Store(m.with(path, c))
	if old == nil {
		return
	}
	old.retire()
	if e.state != engineStarted {
		old.attributes.Close()
		return
	}
	e.retired.Go(func() { // ends with the last request of old; joined by Stop
		<-old.idle
		ctx, cancel := context.WithTimeout(context.Background(), retireTimeout)
		defer cancel()
		if err := errors.Join(old.detach(ctx), old.pipe.stop(ctx)); err != nil {
			e.log.Warn("valves or session listeners of a replaced context did not stop", zap.String("context", old.name), zap.Error(err))
		}
	})
}

// ServeHTTP serves one request.
func (e *Engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := &Exchange{engine: e, parent: r.Context(), start: time.Now()}
	x.out.init(x, w, r)
	x.original = r.URL
	x.remote = r.RemoteAddr
	x.secure = r.TLS != nil
	x.locate(r)
	if x.stopping {
		if next := e.next.Load(); next != nil {
			next.ServeHTTP(w, r)
			return
		}
	}
	e.metrics.requests.Inc()
	r = r.WithContext((*exchangeContext)(x))
	x.request = r
	defer x.end()
	e.pipe.handler.ServeHTTP(x.out.writer(), r)
}

// engineEnd is the last handler of the engine's pipeline.
func engineEnd(w http.ResponseWriter, r *http.Request) {
	x := FromContext(r.Context())
	switch {
	case x == nil:
		http.Error(w, "a valve has replaced the request's context", http.StatusInternalServerError)
	case x.badPath:
		x.Refuse(http.StatusBadRequest, "the path of the request is malformed")
	case x.stopping:
		x.out.w.Header().Set("Retry-After", "1")
		x.Refuse(http.StatusServiceUnavailable, "the node is stopping")
	case x.host == nil:
		x.Refuse(http.StatusNotFound, "no host is configured")
	case x.refusedByDrain(r.Method):
		x.engine.metrics.drained.Inc()
		x.sayDraining(DrainingRefused)
		x.Refuse(http.StatusServiceUnavailable, "the node takes no new users, because it is going to stop")
	default:
		x.host.pipe.handler.ServeHTTP(w, r)
	}
}

// refusedByDrain reports whether the request might begin a session and could not
// be repeated elsewhere once an application has seen it.
func (x *Exchange) refusedByDrain(method string) bool {
	if x.requested.raw != "" || x.engine.draining == nil || !x.engine.draining() || x.context == nil || x.context.sessions == nil {
		return false
	}
	return !Idempotent(method)
}

// Idempotent reports whether repeating a request does no more than the request
// itself (RFC 9110, section 9.2.2).
func Idempotent(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// sayDraining tells balancers why the response is what it is.
func (x *Exchange) sayDraining(how string) {
	if x.Committed() {
		return
	}
	h := x.out.w.Header()
	h.Set("Retry-After", "1")
	h.Set(DrainingHeader, how)
}

// hostEnd is the last handler of a host's pipeline.
func hostEnd(w http.ResponseWriter, r *http.Request) {
	x := FromContext(r.Context())
	if x == nil || x.context == nil {
		if x != nil {
			x.engine.metrics.unrouted.Inc()
			x.Refuse(http.StatusNotFound, "no application is deployed here")
			return
		}
		http.Error(w, "a valve has replaced the request's context", http.StatusInternalServerError)
		return
	}
	if x.rebased {
		r = x.rebase(r)
	}
	x.context.pipe.handler.ServeHTTP(w, r)
}

// contextEnd is the last handler of a context's pipeline.
type contextEnd struct{ app http.Handler }

func (c contextEnd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := FromContext(r.Context())
	if x != nil && x.bare && (r.Method == http.MethodGet || r.Method == http.MethodHead) {
		// Relative links of the page only work below "/shop/".
		target := x.context.escapedPath + "/"
		if x.pathParam != "" && !x.context.tracking.NoURLs {
			target += ";" + x.context.param + "=" + x.pathParam
		}
		if r.URL.RawQuery != "" {
			target += "?" + r.URL.RawQuery
		}
		w.Header().Set("Location", target)
		w.WriteHeader(http.StatusFound)
		return
	}
	c.app.ServeHTTP(w, r)
}
