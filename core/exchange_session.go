package core

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/longhouse-go/longhouse/core/session"
	"go.uber.org/zap"
)

// exchangeSessions is what an exchange knows of the sessions it uses. There is
// one at most, unless the application invalidates it and makes another.
type exchangeSessions struct {
	used atomic.Bool // somebody has asked for a session
	mu   sync.Mutex
	// All below is guarded by mu. busy is set while one goroutine asks the
	// table, without the lock; waiting is closed when it is done, and nil when
	// nobody waits.
	busy    bool
	waiting chan struct{}
	// current is the session in use, or nil. It points to inline or, for a
	// second session of the exchange, to memory of its own.
	current *heldSession
	inline  heldSession
	// ended are sessions that were invalidated by this request.
	ended []*heldSession
	// searched: the presented ids have been looked up.
	searched, released bool
	rebind             bool

	// policy of the commit, for the request's goroutine.
	level Level
	set   bool // level was chosen by a valve
	skip  bool
}

// heldSession is a session in the hands of an exchange.
type heldSession struct {
	Handle
	x *Exchange
	// presented is how the client called it; raw is empty for a new one.
	presented requestedID
	// announced is the id that the client has or will have got.
	announced string
}

// ID returns the id as the client knows it, with this node's route, unless the
// client presented it with another one and nobody asked for rebinding.
func (h *heldSession) ID() string {
	id := h.Key().ID
	route := h.x.engine.route
	if h.presented.id == id && !h.x.sess.rebind {
		return h.presented.raw
	}
	if route == "" {
		return id
	}
	return id + "." + route
}

// SessionGuard is a valve's part in what a request does with its session.
type SessionGuard interface {
	// Admit is told of every session that the request finds or makes, before
	// anybody else gets it. It may change and renew the session; if it
	// invalidates it, the request goes on as if there were none. It is not called
	// for two sessions of a request at a time, and must not ask the exchange for
	// its session.
	Admit(x *Exchange, h Handle)
	// Invalidated is called when the application has invalidated the session,
	// before Invalidate returns to it.
	Invalidated(x *Exchange, h Handle)
}

// Guard has g told of the request's sessions. It is for valves, before the
// handler.
func (x *Exchange) Guard(g SessionGuard) { x.guards = append(x.guards, g) }

// ReservedAttribute is how the names of attributes begin that valves keep in a
// session. The application does not see them.
const ReservedAttribute = "\x00"

// Names implements session.Session without the reserved names.
func (h *heldSession) Names() []string {
	names := h.Handle.Names()
	n := 0
	for n < len(names) && strings.HasPrefix(names[n], ReservedAttribute) { // they are sorted
		n++
	}
	return names[n:]
}

// Set implements session.Session.
func (h *heldSession) Set(name string, value any) error {
	if err := reserved(name); err != nil {
		return err
	}
	return h.Handle.Set(name, value)
}

// Get implements session.Session.
func (h *heldSession) Get(name string, into any) (bool, error) {
	if reserved(name) != nil {
		return false, nil
	}
	return h.Handle.Get(name, into)
}

// Delete implements session.Session.
func (h *heldSession) Delete(name string) error {
	if err := reserved(name); err != nil {
		return err
	}
	return h.Handle.Delete(name)
}

// Update implements session.Session.
func (h *heldSession) Update(name string, change func([]byte) ([]byte, error)) error {
	if err := reserved(name); err != nil {
		return err
	}
	return h.Handle.Update(name, change)
}

func reserved(name string) error {
	if strings.HasPrefix(name, ReservedAttribute) {
		return errors.New("core: the names of attributes must not begin with a NUL byte")
	}
	return nil
}

// Invalidate implements session.Session.
func (h *heldSession) Invalidate() error {
	err := h.Handle.Invalidate()
	if err == nil {
		for _, g := range h.x.guards {
			g.Invalidated(h.x, h.Handle)
		}
	}
	return err
}

// admit asks the guards; it is false if they have ended the session.
func (x *Exchange) admit(h *heldSession) bool {
	for _, g := range x.guards {
		if g.Admit(x, h.Handle); !h.Valid() {
			ended := *h
			x.sess.mu.Lock()
			x.sess.ended = append(x.sess.ended, &ended)
			x.sess.mu.Unlock()
			return false
		}
	}
	return true
}

// Session returns the request's session. If there is none it makes one, or
// returns nil if create is false. It may be called from several goroutines of
// the request; it waits for the manager if the table does not have the session.
// After the commit no session can be made (session.ErrCommitted).
func (x *Exchange) Session(create bool) (session.Session, error) {
	h, err := x.hold(create)
	if h == nil || err != nil {
		return nil, err // not a nil *heldSession in an interface
	}
	return h, nil
}

func (x *Exchange) hold(create bool) (*heldSession, error) {
	if x.context == nil || x.context.sessions == nil {
		return nil, session.ErrNone
	}
	s := &x.sess
	s.used.Store(true)
	for {
		s.mu.Lock()
		if s.released {
			s.mu.Unlock()
			return nil, session.ErrNone
		}
		if !s.busy {
			break
		}
		if s.waiting == nil {
			s.waiting = make(chan struct{})
		}
		wait := s.waiting
		s.mu.Unlock()
		select {
		case <-wait:
		case <-x.parent.Done():
			return nil, context.Cause(x.parent)
		}
	}
	if h := s.current; h != nil {
		if h.Valid() {
			s.mu.Unlock()
			return h, nil
		}
		s.ended = append(s.ended, h)
		s.current = nil
	}
	if s.searched && !create {
		s.mu.Unlock()
		return nil, nil
	}
	search := !s.searched
	s.busy = true
	s.mu.Unlock()

	h, err := x.findOrCreate(search, create)

	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy = false
	if s.waiting != nil {
		close(s.waiting)
		s.waiting = nil
	}
	if err != nil {
		return nil, err
	}
	s.searched = true
	if h.Handle == nil {
		return nil, nil
	}
	if s.released { // the request ended meanwhile
		h.Release()
		return nil, session.ErrNone
	}
	if s.inline.Handle == nil {
		s.inline = h
		s.current = &s.inline
	} else {
		second := h // only this copy is allocated
		s.current = &second
	}
	return s.current, nil
}

// findOrCreate asks the table. A heldSession without handle means that there is
// none and none was wanted.
func (x *Exchange) findOrCreate(search, create bool) (heldSession, error) {
	c := x.context
	if search && x.requested.raw != "" {
		for i := -1; i < len(x.alsoRequested); i++ {
			q := x.requested
			if i >= 0 {
				q = x.alsoRequested[i]
			}
			find := c.sessions.Find
			if c.locker != nil {
				find = x.findLocked
			}
			h, err := find(x.parent, session.Key{Context: c.name, ID: q.id})
			if err != nil {
				return heldSession{}, fmt.Errorf("core: find session %s: %w", session.Prefix(q.id), err)
			}
			if h == nil {
				continue
			}
			if held := (heldSession{Handle: h, x: x, presented: q, announced: q.raw}); x.admit(&held) {
				return held, nil
			}
		}
	}
	if !create {
		return heldSession{}, nil
	}
	if x.Committed() && !c.tracking.NoCookies {
		return heldSession{}, session.ErrCommitted
	}
	h, err := c.sessions.Create(x.parent, c.name, session.NewOptions{MaxInactive: c.maxInactive, Route: x.engine.route})
	if errors.Is(err, session.ErrDraining) {
		x.sayDraining(DrainingNoSession)
	}
	if err != nil {
		return heldSession{}, fmt.Errorf("core: create session: %w", err)
	}
	if c.locker != nil {
		if err := x.lockCreated(h); err != nil {
			h.Release()
			return heldSession{}, err
		}
	}
	held := heldSession{Handle: h, x: x}
	if !x.admit(&held) {
		return heldSession{}, session.ErrInvalid
	}
	return held, nil
}

// Requested returns the first session id that the client presented, with its
// route, and whether it came in a cookie; raw is empty if there was none. The
// session need not exist: see Session.
func (x *Exchange) Requested() (raw, route string, cookie bool) {
	return x.requested.raw, x.requested.route, x.requested.cookie
}

// ForeignRoute reports whether the client presented a session id that does not
// carry this node's route. It costs nothing and does not look for the session.
func (x *Exchange) ForeignRoute() bool {
	if x.requested.raw == "" || x.engine.route == "" {
		return false
	}
	if x.requested.route != x.engine.route {
		return true
	}
	for _, q := range x.alsoRequested {
		if q.route != x.engine.route {
			return true
		}
	}
	return false
}

// Rebind gives the client its session id again with this node's route, if the
// session exists and was presented with another one. It reports whether it did.
// It is for use before the handler; from then on Session's ID has the new
// route.
func (x *Exchange) Rebind() (bool, error) {
	h, err := x.hold(false)
	if err != nil || h == nil {
		return false, err
	}
	if h.presented.raw == "" || h.presented.route == x.engine.route || x.Committed() {
		return false, nil
	}
	x.sess.mu.Lock()
	defer x.sess.mu.Unlock()
	x.sess.rebind = true
	return true, nil
}

// SetLevel decides what this request waits for before its response goes out.
func (x *Exchange) SetLevel(l Level) { x.sess.level, x.sess.set = l, true }

// Level returns what this request waits for.
func (x *Exchange) Level() Level {
	if x.engine.draining != nil && x.engine.draining() {
		return Synced // the next request goes to another node
	}
	if x.sess.set || x.context == nil {
		return x.sess.level
	}
	return x.context.level
}

// SkipReplication leaves the session changes of this request to a later
// request's commit.
func (x *Exchange) SkipReplication() { x.sess.skip = true }

// Replicates reports whether this request hands session changes to the manager.
func (x *Exchange) Replicates() bool {
	return !x.sess.skip && x.context != nil && x.context.distributable && x.context.sessions != nil
}

// waits reports whether the response has to wait for replication.
func (x *Exchange) waits() bool { return x.Level() > Async && x.Replicates() }

// held returns the sessions that the exchange uses, the current one last.
func (x *Exchange) held() (ended []*heldSession, current *heldSession) {
	s := &x.sess
	if !s.used.Load() {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended, s.current
}

// settleSessions announces the session's id if the client does not know it and
// waits for replication if that is the policy. It is the last hook before the
// header.
func (x *Exchange) settleSessions() error {
	_, current := x.held()
	if current != nil && current.Valid() {
		if id := current.ID(); id != current.announced {
			current.announced = id
			if !x.context.tracking.NoCookies {
				x.setCookie(id)
			}
		}
	}
	if x.context != nil && x.context.locker != nil {
		return x.settleLocked()
	}
	if !x.waits() {
		return nil
	}
	return x.commitSessions(x.Level())
}

// settleLate is settleSessions for a header that has gone out already.
func (x *Exchange) settleLate() error {
	if x.context != nil && x.context.locker != nil {
		return x.settleLocked()
	}
	if !x.waits() {
		return nil
	}
	return x.commitSessions(x.Level())
}

// commitSessions commits all held sessions at a level that is waited for. It
// goes on when the client has gone: its changes are in the table already.
func (x *Exchange) commitSessions(l Level) error {
	ended, current := x.held()
	if current == nil && len(ended) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(x.parent), x.context.commitTimeout)
	defer cancel()
	var errs []error
	for _, h := range ended {
		errs = append(errs, h.Commit(ctx, l))
	}
	if current != nil {
		errs = append(errs, current.Commit(ctx, l))
	}
	return errors.Join(errs...)
}

// handOver gives the manager what has changed, without waiting: at the end of
// every request, also of one that failed, since the changes are live here.
func (x *Exchange) handOver() {
	if !x.Replicates() || x.context.locker != nil { // then releaseLocks does
		return
	}
	ended, current := x.held()
	for _, h := range ended {
		x.handOverOne(h)
	}
	if current != nil {
		x.handOverOne(current)
	}
}

func (x *Exchange) handOverOne(h *heldSession) {
	if !h.Dirty() {
		return
	}
	if err := h.Commit(context.Background(), Async); err != nil {
		x.engine.metrics.lostCommits.Inc()
		x.engine.log.Debug("session change not handed over", zap.String("context", x.context.name),
			zap.String("session", session.Prefix(h.Key().ID)), zap.Error(err))
	}
}

// releaseSessions ends the exchange's use of its sessions.
func (x *Exchange) releaseSessions() {
	s := &x.sess
	s.mu.Lock()
	ended, current := s.ended, s.current
	s.ended, s.current, s.released = nil, nil, true
	s.mu.Unlock()
	for _, h := range ended {
		h.Release()
	}
	if current != nil {
		current.Release()
	}
}

// SessionPrefix returns the beginning of the id of the session that the request
// uses, or that the client presented; empty if there is none. It is all that
// may be logged.
func (x *Exchange) SessionPrefix() string { return x.sessionPrefix() }

func (x *Exchange) sessionPrefix() string {
	if _, h := x.held(); h != nil {
		return session.Prefix(h.Key().ID)
	}
	if x.requested.id != "" {
		return session.Prefix(x.requested.id)
	}
	return ""
}

// EncodeURL returns ref with ";jsessionid=" and the id of the request's session
// behind its path, if ref leads to a page of this context and the client has not
// proved yet that it keeps cookies. Other references come back as they are.
// Applications use it for links and redirects if they serve clients without
// cookies.
func (x *Exchange) EncodeURL(ref string) string {
	_, h := x.held()
	if h == nil || !h.Valid() || h.presented.cookie || x.context.tracking.NoURLs {
		return ref
	}
	return x.encodeURL(ref, h.ID())
}
