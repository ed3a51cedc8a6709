package core

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/core/attributes"
)

// DefaultCookie is the name of the session cookie; the path parameter has the
// same name in lower case.
const DefaultCookie = "JSESSIONID"

// DefaultCommitTimeout bounds how long a request waits for the replication of
// its session changes.
const DefaultCommitTimeout = 5 * time.Second

// Tracking says how a client is given its session id and how it brings it back.
type Tracking struct {
	// Cookie is the cookie's name; default DefaultCookie.
	Cookie string
	// CookiePath is the cookie's path; default the context path, or "/".
	CookiePath string
	// CookieDomain is the cookie's domain; empty for none.
	CookieDomain string
	// SameSite is lax unless set.
	SameSite http.SameSite
	// NoCookies tracks sessions by the path parameter only.
	NoCookies bool
	// NoURLs tracks sessions by cookies only: EncodeURL changes nothing and
	// path parameters are not looked at.
	NoURLs bool
}

// ContextOptions describe an application under a path.
type ContextOptions struct {
	// Path is "" (or "/") for the root, or "/shop". It is written decoded.
	Path string
	// Version is free text, for people.
	Version string
	// Handler is the application; it sees paths below the context path. As with
	// http.StripPrefix, absolute references that it writes itself need the
	// context path in front (Context.Path); relative ones work anywhere.
	Handler http.Handler
	// Valves is the context's pipeline, first listed first. They see paths
	// below the context path, as the application does.
	Valves []Valve
	// Sessions is the session table; nil for an application without sessions.
	Sessions Sessions
	// MaxInactive is the life of a session without requests; 0 or less is for
	// ever.
	MaxInactive time.Duration
	Tracking    Tracking
	// Distributable hands the changes of sessions to the manager.
	Distributable bool
	// Level is what a request waits for unless a valve says otherwise.
	Level Level
	// CommitTimeout bounds that wait; 0 is DefaultCommitTimeout.
	CommitTimeout time.Duration
	// Locker lets one request at a time use a session, on all nodes; nil lets
	// all at once. Its requests work on the newest state, wait for level Synced
	// and then give the session back. LockTimeout bounds how long they wait for
	// it, after which they are answered with 503; 0 is DefaultLockTimeout.
	Locker      SessionLocker
	LockTimeout time.Duration
	// Attributes are the values that all requests of the context share; nil keeps
	// them on this node.
	Attributes *attributes.Attributes
	// Listeners hear of the context's sessions, which must be WatchedSessions.
	// They begin before the first request of the context and end, having been
	// told everything, after its last one.
	Listeners []SessionListening
	// ClusterEvents are kinds that all Listeners are to be told also if another
	// node does it, as if each had them in its Cluster.
	ClusterEvents SessionEventKind
}

// Context is one application under a path of a host.
type Context struct {
	name, path, escapedPath, version string
	param                            string // path parameter of the session id, lower case
	host                             *Host
	tracking                         Tracking
	sessions                         Sessions
	maxInactive                      time.Duration
	distributable                    bool
	level                            Level
	commitTimeout                    time.Duration
	locker                           SessionLocker // or nil
	lockTimeout                      time.Duration
	attributes                       *attributes.Attributes
	pipe                             *pipeline
	subs                             []*subscription // of Listeners and the context's valves
	unwatch                          func()          // ends telling them; guarded by the engine's life until the context retires

	// running counts the requests inside; retiredBit is set once no more may
	// enter. idle is closed when the last one has left after that.
	running  atomic.Int64
	idleOnce sync.Once
	idle     chan struct{}
}

const retiredBit = 1 << 62

// ContextName returns the name by which sessions of a context are known on all
// nodes: "localhost/shop", and "localhost/" for the root.
func ContextName(host, path string) string {
	host = strings.ToLower(host)
	if path == "" {
		path = "/"
	}
	return host + path
}

func (e *Engine) newContext(h *Host, o ContextOptions) (*Context, error) {
	path := strings.TrimSuffix(o.Path, "/")
	fail := func(format string, args ...any) (*Context, error) {
		return nil, fmt.Errorf("core: host %s: context %q: %s", h.name, o.Path, fmt.Sprintf(format, args...))
	}
	if path != "" && !plainPath(path) {
		return fail("the path must start with a slash and have no empty or dot segments, parameters or backslashes, as in \"/shop\"")
	}
	if o.Handler == nil {
		return fail("it has no handler: give it an application or a directory")
	}
	t := o.Tracking
	if t.Cookie == "" {
		t.Cookie = DefaultCookie
	}
	if !isToken(t.Cookie) {
		return fail("the session cookie's name %q has characters that a cookie name may not have", t.Cookie)
	}
	c := &Context{
		name:          ContextName(h.name, path),
		path:          path,
		escapedPath:   (&url.URL{Path: path}).EscapedPath(),
		version:       o.Version,
		param:         strings.ToLower(t.Cookie),
		host:          h,
		sessions:      o.Sessions,
		maxInactive:   o.MaxInactive,
		distributable: o.Distributable,
		level:         o.Level,
		commitTimeout: o.CommitTimeout,
		locker:        o.Locker,
		lockTimeout:   o.LockTimeout,
		attributes:    o.Attributes,
		idle:          make(chan struct{}),
	}
	if c.attributes == nil {
		c.attributes = attributes.Local(c.name)
	}
	if t.CookiePath == "" {
		t.CookiePath = c.escapedPath
	}
	if t.CookiePath == "" {
		t.CookiePath = "/"
	}
	if strings.ContainsFunc(t.CookiePath+t.CookieDomain, func(r rune) bool { return r < ' ' || r > '~' || r == ';' }) {
		return fail("the session cookie's path or domain has characters that may not stand in a header")
	}
	c.tracking = t
	if c.locker != nil {
		c.level = Synced // whoever gets the session next has to see the changes
	}
	if c.lockTimeout <= 0 {
		c.lockTimeout = DefaultLockTimeout
	}
	if c.commitTimeout <= 0 {
		c.commitTimeout = DefaultCommitTimeout
	}
	if _, ok := o.Sessions.(WatchedSessions); !ok && len(o.Listeners) > 0 {
		return fail("it has session listeners, but a session table (%T) that does not tell them anything", o.Sessions)
	}
	var err error
	if c.pipe, err = newPipeline("context "+c.name, o.Valves, contextEnd{o.Handler}); err != nil {
		return c, err
	}
	listeners := slices.Clone(o.Listeners)
	for i := range listeners {
		listeners[i].Cluster |= o.ClusterEvents
	}
	c.subs, err = subscriptions("context "+c.name, listeners, o.Valves, e.log, e.listening)
	return c, err
}

// Name returns the name by which the context's sessions are known on all nodes.
func (c *Context) Name() string { return c.name }

// Path returns the context path: "" for the root, or "/shop".
func (c *Context) Path() string { return c.path }

// Version returns the version given in the options.
func (c *Context) Version() string { return c.version }

// Host returns the host that the context belongs to.
func (c *Context) Host() *Host { return c.host }

// Level returns what a request waits for unless a valve says otherwise.
func (c *Context) Level() Level { return c.level }

// Distributable reports whether changes of sessions go to the manager.
func (c *Context) Distributable() bool { return c.distributable }

// Attributes returns the values that all requests of the context share, if it is
// distributable on all nodes.
func (c *Context) Attributes() *attributes.Attributes { return c.attributes }

// Sessions returns the table of the context's sessions, or nil.
func (c *Context) Sessions() Sessions { return c.sessions }

// PathParam returns the name of the path parameter that carries the session id,
// in lower case.
func (c *Context) PathParam() string { return c.param }

// Running returns the number of requests inside.
func (c *Context) Running() int { return int(c.running.Load() &^ retiredBit) }

// enter counts a request in; it is false when the context has been replaced.
func (c *Context) enter() bool {
	if c.running.Add(1)&retiredBit != 0 {
		c.leave()
		return false
	}
	return true
}

func (c *Context) leave() {
	if c.running.Add(-1) == retiredBit {
		c.idleOnce.Do(func() { close(c.idle) })
	}
}

// retire lets no further request in.
func (c *Context) retire() {
	if c.running.Or(retiredBit) == 0 {
		c.idleOnce.Do(func() { close(c.idle) })
	}
}

// HostOptions describe a virtual host.
type HostOptions struct {
	// Name and Aliases are host names without port, in any case.
	Name     string
	Aliases  []string
	Valves   []Valve
	Contexts []ContextOptions
}

// Host is a virtual host with its applications.
type Host struct {
	name, key string
	pipe      *pipeline
	subs      []*subscription // of the host's valves
	contexts  atomic.Pointer[contextMap]
}

// contextMap is an immutable set of contexts by path.
type contextMap struct {
	byPath map[string]*Context
	root   *Context
	// longest is the length of the longest path, in bytes.
	longest int
}

// Name returns the host's name as configured.
func (h *Host) Name() string { return h.name }

// Contexts returns the contexts, sorted by path.
func (h *Host) Contexts() []*Context {
	return slices.SortedFunc(maps.Values(h.contexts.Load().byPath), func(a, b *Context) int {
		return strings.Compare(a.path, b.path)
	})
}

// find returns the context whose path is the longest prefix of path on a
// segment boundary, or nil.
func (m *contextMap) find(path string) *Context {
	if m.longest == 0 {
		return m.root
	}
	end := len(path)
	for end > 0 {
		if end <= m.longest {
			if c := m.byPath[path[:end]]; c != nil {
				return c
			}
		}
		end = strings.LastIndexByte(path[:end], '/')
	}
	return m.root
}

// with returns a copy in which c (or nothing, if nil) is at path.
func (m *contextMap) with(path string, c *Context) *contextMap {
	n := &contextMap{byPath: make(map[string]*Context, len(m.byPath)+1)}
	for p, old := range m.byPath {
		if p != path {
			n.byPath[p] = old
		}
	}
	if c != nil {
		n.byPath[path] = c
	}
	for p := range n.byPath {
		n.longest = max(n.longest, len(p))
	}
	n.root = n.byPath[""]
	return n
}

// isToken reports whether s may be a cookie's name.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune("()<>@,;:\\\"/[]?={}", r)
	})
}
