package core

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/core/session"
	"go.uber.org/zap"
)

// Exchange is one request and its response, as the container sees it. Valves
// and applications reach it by FromContext. It lives until the request ends;
// unless said otherwise its methods are for the goroutine that handles the
// request.
type Exchange struct {
	engine  *Engine
	host    *Host
	context *Context

	parent  context.Context // the server's; see exchangeContext
	request *http.Request   // as the engine's pipeline got it
	start   time.Time
	remote  string
	secure  bool

	// What routing found out; unchanged after it.
	original  *url.URL // the client's
	rebased   bool     // the application's path differs:
	belowPath string   // its path, decoded
	belowRaw  string   // and encoded, if that is not the usual encoding
	badPath   bool
	bare      bool // the path is the context path without a slash behind it
	stopping  bool // the context was retired and nothing has taken its place
	pathParam string
	path      string

	// requested is the first session id the client presented (raw is empty if
	// there was none), alsoRequested are the others. Unchanged after routing.
	requested     requestedID
	alsoRequested []requestedID

	sess exchangeSessions
	// guards are told of the session; values are what the context of the request
	// returns. Both are fixed before the application runs.
	guards []SessionGuard
	values []exchangeValue
	out    response
	// locks are what this request has, until unlocked; lockErr is why it did not
	// get one. All are under sess.mu.
	locks    []keyLock
	lockErr  error
	unlocked bool

	onCommit  []func(*Exchange) error
	onEnd     []func(*Exchange)
	endInline [2]func(*Exchange) // the array behind onEnd, to save an allocation
	errorPage ErrorPage
	message   string // for the error page
}

// ErrorPage writes the body of an error response: it sets Content-Type and
// writes to w, nothing else. message is safe to show to clients and may be
// empty.
type ErrorPage func(w http.ResponseWriter, x *Exchange, status int, message string)

// exchangeContext is the context of a request inside the engine: the server's
// context with two values. A type of its own saves the allocations of
// context.WithValue.
type exchangeContext Exchange

type exchangeKey struct{}

func (c *exchangeContext) Deadline() (time.Time, bool) { return c.parent.Deadline() }
func (c *exchangeContext) Done() <-chan struct{}       { return c.parent.Done() }
func (c *exchangeContext) Err() error                  { return c.parent.Err() }

func (c *exchangeContext) Value(key any) any {
	if _, ok := key.(exchangeKey); ok || session.IsSourceKey(key) {
		return (*Exchange)(c)
	}
	for _, v := range c.values {
		if v.key == key {
			return v.value
		}
	}
	return c.parent.Value(key)
}

func (c *exchangeContext) String() string { return "core.Exchange" }

type exchangeValue struct{ key, value any }

// SetValue makes the contexts of the request return value for key, which must be
// of a type of its own, as for context.WithValue. It is for valves, before the
// handler.
func (x *Exchange) SetValue(key, value any) { x.values = append(x.values, exchangeValue{key, value}) }

// FromContext returns the exchange of the request with that context, or nil if
// the request does not pass an engine.
func FromContext(ctx context.Context) *Exchange {
	if c, ok := ctx.(*exchangeContext); ok {
		return (*Exchange)(c)
	}
	x, _ := ctx.Value(exchangeKey{}).(*Exchange)
	return x
}

// locate finds host, context and requested session ids, and enters the context.
func (x *Exchange) locate(r *http.Request) {
	e := x.engine
	x.host = e.def
	if len(e.hosts) > 1 {
		if h := e.hosts[hostName(r.Host)]; h != nil {
			x.host = h
		}
	}
	plain := r.URL.RawPath == "" && plainPath(r.URL.Path)
	match, segs, dir := r.URL.Path, []segment(nil), false
	if !plain {
		var ok bool
		if segs, dir, ok = splitPath(r.URL.EscapedPath()); !ok || r.URL.Opaque != "" {
			x.badPath = true
			e.metrics.badPaths.Inc()
			return
		}
		match = plainSegments(segs)
	}
	x.path = match
	if !plain {
		x.path = strings.ReplaceAll(match, "\x00", "/")
		if dir || match == "" {
			x.path += "/"
		}
	}
	if x.host == nil {
		return
	}
	for x.context == nil {
		c := x.host.contexts.Load().find(match)
		if c == nil {
			return
		}
		if c.enter() {
			x.context = c
		} else if x.host.contexts.Load().find(match) == c {
			x.stopping = true // retired without a successor: the node stops
			return
		}
	}
	c := x.context
	if plain {
		x.bare = c.path != "" && len(match) == len(c.path)
		if c.path != "" {
			x.rebased, x.belowPath = true, match[len(c.path):]
			if x.bare {
				x.belowPath = "/"
			}
		}
	} else {
		x.locateBelow(segs, dir)
	}
	if c.sessions == nil {
		return
	}
	if !c.tracking.NoCookies {
		if lines := r.Header["Cookie"]; lines != nil {
			x.presentCookies(lines)
		}
	}
	if x.pathParam != "" && !c.tracking.NoURLs {
		x.present(x.pathParam, false)
	}
}

// locateBelow makes the application's path of one that was taken apart.
func (x *Exchange) locateBelow(segs []segment, dir bool) {
	c := x.context
	if ids := takeParam(segs, c.param); len(ids) > 0 {
		x.pathParam = ids[0]
		if _, _, ok := session.ParseID(x.pathParam); !ok {
			x.pathParam = "" // redirects echo it
			x.engine.metrics.badIDs.Inc()
		}
	}
	// Parameters of the context path's own segments belong to nobody below it.
	if depth := strings.Count(c.path, "/"); depth > 0 {
		for i := 0; depth > 0; i++ {
			if segs[i].plain != "" {
				depth--
			}
			if depth == 0 {
				segs = segs[i+1:]
			}
		}
	}
	path := joinPath(segs, dir)
	x.bare = c.path != "" && !dir && path == "/"
	x.rebased = true
	x.belowPath, _ = url.PathUnescape(path) // every segment has been unescaped before
	if path != (&url.URL{Path: x.belowPath}).EscapedPath() {
		x.belowRaw = path
	}
}

// rebase returns r as the application sees it: with the path below its context.
func (x *Exchange) rebase(r *http.Request) *http.Request {
	both := new(struct {
		url url.URL
		req http.Request
	})
	both.req, both.url = *r, *r.URL
	both.url.Path, both.url.RawPath = x.belowPath, x.belowRaw
	both.req.URL = &both.url
	return &both.req
}

// Engine returns the engine that serves the request.
func (x *Exchange) Engine() *Engine { return x.engine }

// Host returns the request's virtual host, or nil.
func (x *Exchange) Host() *Host { return x.host }

// Context returns the request's context, or nil if no application is deployed
// at the path.
func (x *Exchange) Context() *Context { return x.context }

// Request returns the request as it entered the engine's pipeline: with the
// client's URL, and without what valves have changed in copies of it.
func (x *Exchange) Request() *http.Request { return x.request }

// URL returns the client's URL, before the context path was taken off. It must
// not be changed.
func (x *Exchange) URL() *url.URL { return x.original }

// Path returns the decoded path of the request, context path included, cleaned
// and without parameters; empty if it is malformed.
func (x *Exchange) Path() string { return x.path }

// Start returns when the request entered the engine.
func (x *Exchange) Start() time.Time { return x.start }

// RemoteAddr returns the client's address, with port if it is known: that of
// the connection or what a trusted proxy said.
func (x *Exchange) RemoteAddr() string { return x.remote }

// SetRemoteAddr replaces the client's address. It is for valves that know which
// proxies to trust.
func (x *Exchange) SetRemoteAddr(addr string) { x.remote = addr }

// Secure reports whether the client uses TLS, as far as is known.
func (x *Exchange) Secure() bool { return x.secure }

// SetSecure replaces what Secure reports. It is for valves that know which
// proxies to trust.
func (x *Exchange) SetSecure(secure bool) { x.secure = secure }

// Scheme returns "https" or "http".
func (x *Exchange) Scheme() string {
	if x.secure {
		return "https"
	}
	return "http"
}

// Status returns the status of the response, or what it would be if the handler
// returned now.
func (x *Exchange) Status() int {
	if x.out.status == 0 {
		return http.StatusOK
	}
	return x.out.status
}

// Written returns how many bytes of body the handler has written.
func (x *Exchange) Written() int64 { return x.out.size }

// Committed reports whether the header has gone out: it is too late for
// cookies, a new session or another status.
func (x *Exchange) Committed() bool { return x.out.committed || x.out.hijacked }

// Hijacked reports whether the handler has taken over the connection.
func (x *Exchange) Hijacked() bool { return x.out.hijacked }

// OnCommit registers a hook that runs just before the header goes out, the
// latest first. It may change the header and the session, not write the body.
// If it fails, the response becomes a 503 with Retry-After. A hook registered
// after the commit never runs.
func (x *Exchange) OnCommit(hook func(*Exchange) error) { x.onCommit = append(x.onCommit, hook) }

// OnEnd registers a hook that runs when the response is complete, the latest
// first, whatever happened to it.
func (x *Exchange) OnEnd(hook func(*Exchange)) {
	if x.onEnd == nil {
		x.onEnd = x.endInline[:0]
	}
	x.onEnd = append(x.onEnd, hook)
}

// SetErrorPage makes page write the body of this request's error responses
// that have none: those of the container and those of the application. The
// latest one counts; nil is plain text, for the container's only.
func (x *Exchange) SetErrorPage(page ErrorPage) { x.errorPage = page }

// Refuse answers with an error of the container, unless the handler has
// answered already. message is shown to the client.
func (x *Exchange) Refuse(status int, message string) {
	if x.out.status == 0 && !x.Committed() {
		x.message = message
		x.out.writeHeader(status)
	}
}

// commitFailed replaces the response because a hook failed with err.
func (x *Exchange) commitFailed(err error) {
	x.engine.metrics.commitFailures.Inc()
	x.engine.log.Warn("response replaced by 503: a commit hook failed",
		zap.String("context", x.contextName()), zap.String("session", x.sessionPrefix()), zap.Error(err))
	x.out.reset(http.StatusServiceUnavailable, fmt.Errorf("core: commit hook: %w", err))
	x.message = "your changes could not be stored safely; please try again"
	if errors.Is(err, ErrLocked) {
		x.message = ErrLocked.Error() + "; please try again"
	}
}

func (x *Exchange) contextName() string {
	if x.context == nil {
		return ""
	}
	return x.context.name
}

// beforeCommit runs the hooks, then settles the sessions, in whose changes the
// hooks may have had a part.
func (x *Exchange) beforeCommit() error {
	for i := len(x.onCommit) - 1; i >= 0; i-- {
		if err := x.onCommit[i](x); err != nil {
			return err
		}
	}
	return x.settleSessions()
}

// end completes the exchange. It is deferred around the pipeline.
func (x *Exchange) end() {
	p := recover()
	abort := p != nil
	if p != nil && p != http.ErrAbortHandler { //nolint:errorlint // the sentinel itself is thrown
		abort = !x.panicked(p)
	}
	defer x.close() // whatever the hooks do
	if !abort && !x.complete() {
		abort = true
	}
	x.handOver()
	for i := len(x.onEnd) - 1; i >= 0; i-- {
		x.onEnd[i](x)
	}
	if abort {
		x.engine.metrics.aborted.Inc()
		panic(http.ErrAbortHandler)
	}
}

// panicked handles a panic of the handler. It is true if the client gets an
// error page, false if the response has to be cut off.
func (x *Exchange) panicked(p any) bool {
	x.engine.metrics.panics.Inc()
	x.engine.log.Error("handler panicked", zap.String("context", x.contextName()),
		zap.String("method", x.request.Method), zap.String("session", x.sessionPrefix()),
		zap.String("panic", fmt.Sprint(p)), zap.ByteString("stack", debug.Stack()))
	if x.Committed() {
		return false
	}
	x.out.committing = false // the panic may have come from a hook
	x.out.reset(http.StatusInternalServerError, errors.New("core: the handler has panicked"))
	x.message = "the application failed on this request"
	return true
}

// complete sends what is left of the response. It is false if the response has
// to be cut off, because it promises what is not so.
func (x *Exchange) complete() bool {
	r := &x.out
	if r.hijacked || r.committed {
		if err := x.settleLate(); err != nil {
			x.engine.log.Warn("late session changes could not be stored", zap.String("context", x.contextName()),
				zap.String("session", x.sessionPrefix()), zap.Error(err))
			x.engine.metrics.commitFailures.Inc()
			return r.hijacked
		}
	} else {
		if r.status == 0 {
			r.writeHeader(http.StatusOK)
		}
		if r.failed != nil {
			x.replace()
		} else {
			if r.runHooks() != nil { // the response has become a 503
				x.replace()
			}
		}
		x.writeErrorPage()
	}
	if !r.hijacked {
		r.finish()
	}
	return true
}

// replace makes the header of a response that was replaced by an error page:
// the handler may have gone on changing it. After a panic the session's cookie is
// still due, so the hooks run, although they can no longer fail.
func (x *Exchange) replace() {
	r := &x.out
	clear(r.w.Header())
	if r.status == http.StatusServiceUnavailable {
		r.w.Header().Set("Retry-After", "1")
	}
	if r.hooked {
		return
	}
	r.hooked = true
	if err := x.beforeCommit(); err != nil {
		x.engine.log.Warn("commit hook failed after a panic", zap.String("context", x.contextName()), zap.Error(err))
	}
}

// writeErrorPage gives an error response a body, if it has none.
func (x *Exchange) writeErrorPage() {
	r := &x.out
	if r.status < 400 || r.size > 0 {
		return
	}
	h := r.w.Header()
	if h["Content-Length"] != nil || h["Content-Type"] != nil {
		return // an empty body is meant
	}
	r.failed = nil
	switch {
	case x.errorPage != nil:
		x.errorPage(r.writer(), x, r.status, x.message)
	case x.message != "":
		h["Content-Type"] = []string{"text/plain; charset=utf-8"}
		h["X-Content-Type-Options"] = []string{"nosniff"}
		_, _ = put(r, fmt.Sprintf("%d %s: %s\n", r.status, http.StatusText(r.status), x.message))
	}
}

// close gives back what the exchange holds.
func (x *Exchange) close() {
	x.releaseLocks()
	x.releaseSessions()
	x.out.release()
	if x.context != nil {
		x.context.leave()
	}
}
