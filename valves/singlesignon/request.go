package singlesignon

import (
	"bytes"
	"context"
	"crypto/subtle"
	"errors"
	"net/http"
	"sync"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// request is the valve's part in one request.
type request struct {
	v *Valve
	x *core.Exchange
	w http.ResponseWriter

	mu sync.Mutex // never held while something is looked up
	// on is the sign-on of this request, or nil; who and hash are what it says.
	on   core.Handle
	who  Principal
	hash []byte
	// looked is made when the cookie is looked at, and closed when that is done.
	// failed is why the sign-on is not known.
	looked chan struct{}
	failed error
	// sess is the request's session, and of the sign-on if linked.
	sess   core.Handle
	linked bool
	// stray says that the session belongs to a sign-on that this node does not
	// know of.
	stray bool
	slot  string
	kept  member // what the sign-on knows of it
	// cookie is what the client is to have; clear takes it away.
	cookie string
	clear  bool
}

type requestKey struct{}

var errOver = errors.New("singlesignon: the request is over")

// Wrap takes part in requests that belong to an application.
func (v *Valve) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if x := core.FromContext(r.Context()); x != nil && x.Context() != nil && x.Engine().Shared() != nil {
			if e := x.Engine(); v.engine.Load() != e {
				v.engine.Store(e)
			}
			q := &request{v: v, x: x, w: w}
			x.SetValue(requestKey{}, q)
			x.Guard(q)
			x.OnCommit(q.commit)
			x.OnEnd(q.end)
		}
		next.ServeHTTP(w, r)
	})
}

func of(ctx context.Context) *request {
	q, _ := ctx.Value(requestKey{}).(*request)
	return q
}

// User returns who has signed on; false if nobody has. It looks for the sign-on
// the first time that it is called in a request; an error says that this was
// not possible just now. ctx is that of the request.
func User(ctx context.Context) (Principal, bool, error) {
	q := of(ctx)
	if q == nil {
		return Principal{}, false, ErrNoValve
	}
	return q.user()
}

// SignOn notes that the application has found out who the user is. From now on
// User returns p, in all applications of the host unless
// require_reauthentication is set. The request's session, if there is one, gets
// a new id and belongs to the sign-on, as do those that other requests of the
// client use. If somebody else was signed on, that ends first. When SignOn
// returns, the nodes that answer know of it; after an error nobody has signed
// on. ctx is that of the request, whose header must not have been sent.
func SignOn(ctx context.Context, p Principal) error {
	q := of(ctx)
	if q == nil {
		return ErrNoValve
	}
	return q.signOn(ctx, p)
}

// SignOff ends the sign-on of the request, and all its sessions in all
// applications, on all nodes, that of the request included. The invalidation of
// one of these sessions does the same. It is no error if nobody has signed on;
// an error says that a node may learn of it late. ctx is that of the request.
func SignOff(ctx context.Context) error {
	q := of(ctx)
	if q == nil {
		return ErrNoValve
	}
	return q.signOff(ctx)
}

// Admit implements core.SessionGuard: a session of a sign-on that is over ends,
// and one without a sign-on joins that of the cookie. If it is not known what
// has become of the sign-on, the session lives, and nobody is signed on for this
// request.
func (q *request) Admit(x *core.Exchange, h core.Handle) {
	var l link
	if ok, err := h.Get(linkName, &l); ok && err == nil {
		f, err := q.v.find(x.Request().Context(), x.Engine(), x.Host().Name(), l.ID)
		if f.over {
			if h.Invalidate() == nil {
				q.v.sessionsEnded.Inc()
			}
			return
		}
		stray := f.on == nil && err == nil
		if stray {
			q.v.unknown.Inc()
		}
		q.mu.Lock()
		q.sess, q.linked, q.stray, q.slot = h, !stray, stray, l.Slot
		old := q.on
		if f.on != nil {
			q.on, q.who, q.hash = f.on, f.who, f.hash
		} else {
			q.on, q.failed = nil, err
		}
		q.mu.Unlock()
		if old != nil {
			old.Release()
		}
		q.keep()
		if stray && !q.v.cfg.RequireReauthentication {
			// The user may have signed on again meanwhile. What somebody else left
			// in a session is not for this user.
			if q.lookAtCookie(); q.signedOn() != nil && q.userName() == l.User {
				q.join(h)
			}
		}
		return
	}
	q.mu.Lock()
	q.sess, q.linked, q.stray, q.slot = h, false, false, ""
	q.mu.Unlock()
	if q.v.cfg.RequireReauthentication {
		return
	}
	if q.lookAtCookie(); q.signedOn() != nil {
		q.join(h)
	}
}

// signedOn returns the sign-on as far as it is known, or nil.
func (q *request) signedOn() core.Handle {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.on == nil || !q.on.Valid() || isOver(q.on) {
		return nil
	}
	return q.on
}

// userName returns who has signed on, or "".
func (q *request) userName() string {
	if q.signedOn() == nil {
		return ""
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.who.Name
}

// join makes a session part of the sign-on. One that the client had already
// gets a new id: whoever knew the old one has not signed on.
func (q *request) join(h core.Handle) {
	on := q.signedOn()
	if on == nil || !h.IsNew() && (q.x.Committed() || h.Renew() != nil) {
		return
	}
	l := link{ID: on.Key().ID, User: q.userName()}
	if q.room(on) {
		l.Slot = newSlot()
	} else {
		q.v.refused["sessions"].Inc()
	}
	if err := h.Set(linkName, l); err != nil {
		q.v.log.Warn("a session could not become part of a sign-on", zap.String("signOn", session.Prefix(l.ID)), zap.Error(err))
		return
	}
	q.v.associated.Inc()
	q.mu.Lock()
	q.sess, q.linked, q.stray, q.slot = h, true, false, l.Slot
	q.mu.Unlock()
	q.keep()
}

// room reports whether the sign-on may have one more session; those that are
// gone make room.
func (q *request) room(on core.Handle) bool {
	members := membersOf(on)
	if len(members) < q.v.cfg.MaxSessions {
		return true
	}
	for slot, m := range members {
		h, err := tableOf(q.x.Engine(), m.Context).Find(q.x.Request().Context(), session.Key{Context: m.Context, ID: m.ID})
		if h != nil {
			h.Release()
		} else if err == nil && on.Delete(memberName+slot) == nil {
			return true
		}
	}
	return false
}

// keep brings the sign-on up to date about the request's session: its id, and
// how long it lives.
func (q *request) keep() {
	q.mu.Lock()
	on, h, linked, slot, kept := q.on, q.sess, q.linked, q.slot, q.kept
	q.mu.Unlock()
	if on == nil || !linked || !h.Valid() || !on.Valid() || isOver(on) {
		return
	}
	now := member{Context: h.Key().Context, ID: h.Key().ID}
	if life := h.MaxInactive(); on.MaxInactive() > 0 && (life <= 0 || on.MaxInactive() < life+grace) {
		if life > 0 {
			life += grace
		}
		_ = on.SetMaxInactive(life) // it has just been valid
	}
	if slot == "" || now == kept {
		return
	}
	var was member
	if ok, err := on.Get(memberName+slot, &was); !ok || err != nil || was != now {
		_ = on.Set(memberName+slot, now)
	}
	q.mu.Lock()
	q.kept = now
	q.mu.Unlock()
}

// lookAtCookie finds the sign-on of the cookie, once, unless it is known.
func (q *request) lookAtCookie() {
	q.mu.Lock()
	if q.on != nil || q.failed != nil {
		q.mu.Unlock()
		return
	}
	if looked := q.looked; looked != nil {
		q.mu.Unlock()
		<-looked
		return
	}
	looked := make(chan struct{})
	q.looked = looked
	q.mu.Unlock()
	defer close(looked)
	r := q.x.Request()
	for _, value := range core.CookieValues(r, q.v.cfg.Cookie, maxCookies) {
		id, secret, ok := parse(value)
		if !ok { // perhaps somebody else's
			q.v.refused["cookie"].Inc()
			continue
		}
		f, err := q.v.find(r.Context(), q.x.Engine(), q.x.Host().Name(), id)
		if err != nil {
			q.mu.Lock()
			q.failed = err
			q.mu.Unlock()
			return
		}
		switch {
		case f.over:
			q.mu.Lock()
			q.clear = true
			q.mu.Unlock()
			continue
		case f.on == nil: // it may be known to others
			continue
		case subtle.ConstantTimeCompare(hashOf(secret), f.hash) != 1:
			f.on.Release()
			q.v.refused["secret"].Inc()
			continue
		}
		q.mu.Lock()
		if q.on == nil {
			q.on, q.who, q.hash, q.clear, f.on = f.on, f.who, f.hash, false, nil
		}
		q.mu.Unlock()
		if f.on != nil {
			f.on.Release()
		}
		return
	}
}

// settle has the session, if there is one, and the cookie looked at.
func (q *request) settle() error {
	if _, err := q.x.Session(false); err != nil && !errors.Is(err, session.ErrNone) {
		return err
	}
	q.lookAtCookie()
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.failed
}

func (q *request) user() (Principal, bool, error) {
	if err := q.settle(); err != nil {
		return Principal{}, false, err
	}
	on := q.signedOn()
	q.mu.Lock()
	defer q.mu.Unlock()
	if on == nil || q.stray || q.v.cfg.RequireReauthentication && !q.linked {
		return Principal{}, false, nil
	}
	return q.who, true, nil
}

func (q *request) signOn(ctx context.Context, p Principal) error {
	if err := q.v.check(p); err != nil {
		q.v.refused["principal"].Inc()
		return err
	}
	if err := q.settle(); err != nil {
		return err
	}
	if q.x.Committed() {
		return session.ErrCommitted
	}
	q.mu.Lock()
	h, linked := q.sess, q.linked
	q.mu.Unlock()
	if h != nil && !h.Valid() {
		h, linked = nil, false
	}
	on := q.signedOn()
	q.mu.Lock()
	hash := q.hash
	q.mu.Unlock()
	if on != nil && q.userName() != p.Name {
		var but session.Key
		if h != nil {
			but = h.Key()
		}
		_ = q.v.end(ctx, q.x.Engine(), on, "replaced", but) // logged; the new one is what matters
		on, linked = nil, false
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	fresh := on == nil
	if fresh {
		var err error
		if on, err = q.x.Engine().Shared().Create(ctx, contextOf(q.x.Host().Name()), session.NewOptions{MaxInactive: q.v.cfg.MaxIdle, WhileDraining: true}); err != nil {
			return err
		}
	}
	secret := ""
	if fresh || !q.presented(on, hash) {
		secret = session.NewID()
		hash = hashOf(secret)
	}
	err := q.v.write(on, p, hash)
	if err == nil {
		err = on.Commit(ctx, core.Synced)
	}
	if err != nil {
		q.v.failed.Inc()
		if fresh {
			_ = on.Invalidate() // nobody knows of it
			on.Release()
		}
		return err
	}
	q.mu.Lock()
	old := q.on
	q.on, q.who, q.hash = on, p, hash
	if secret != "" {
		q.cookie, q.clear = on.Key().ID+secret, false
	}
	q.mu.Unlock()
	if old != nil && old != on {
		old.Release()
	}
	q.v.signedOn.Inc()
	switch {
	case h == nil:
	case linked: // it is part of it already
		if err := h.Renew(); err != nil {
			return err
		}
		q.keep()
	default:
		q.join(h)
	}
	return nil
}

// presented reports whether the client has the cookie of the sign-on.
func (q *request) presented(on core.Handle, hash []byte) bool {
	for _, value := range core.CookieValues(q.x.Request(), q.v.cfg.Cookie, maxCookies) {
		if id, secret, ok := parse(value); ok && id == on.Key().ID && bytes.Equal(hashOf(secret), hash) {
			return true
		}
	}
	return false
}

func (q *request) signOff(ctx context.Context) error {
	if err := q.settle(); err != nil {
		return err
	}
	on := q.signedOn()
	if on == nil { // or it is not known here: at least the client forgets it
		q.mu.Lock()
		q.clear = q.clear || len(core.CookieValues(q.x.Request(), q.v.cfg.Cookie, 1)) > 0
		q.mu.Unlock()
		return nil
	}
	q.mu.Lock()
	h, linked := q.sess, q.linked
	q.mu.Unlock()
	err := q.over(ctx, on, "signoff")
	if h != nil && linked && h.Invalidate() == nil {
		q.v.sessionsEnded.Inc()
	}
	return err
}

// over ends the sign-on of this request.
func (q *request) over(ctx context.Context, on core.Handle, why string) error {
	err := q.v.end(ctx, q.x.Engine(), on, why, session.Key{})
	q.mu.Lock()
	q.clear, q.cookie = true, ""
	q.mu.Unlock()
	return err
}

// Invalidated implements core.SessionGuard: a user who logs out of one
// application logs out of all.
func (q *request) Invalidated(x *core.Exchange, h core.Handle) {
	q.mu.Lock()
	on, ours := q.on, q.linked && q.sess == h
	q.mu.Unlock()
	if !ours || on == nil {
		return
	}
	_ = q.over(x.Request().Context(), on, "logout") // logged
}

// commit gives the client its cookie, or takes it away.
func (q *request) commit(x *core.Exchange) error {
	q.keep() // the application may have renewed the session
	q.mu.Lock()
	value, clear := q.cookie, q.clear
	q.cookie, q.clear = "", false
	q.mu.Unlock()
	if value == "" && !clear {
		return nil
	}
	c := &http.Cookie{
		Name: q.v.cfg.Cookie, Value: value, Path: "/", Domain: q.v.cfg.CookieDomain, HttpOnly: true,
		SameSite: sameSites[q.v.cfg.SameSite], Secure: x.Secure() || q.v.cfg.SameSite == "none", // browsers refuse None without Secure
	}
	if value == "" {
		c.MaxAge = -1
	}
	http.SetCookie(q.w, c)
	return nil
}

// end gives the sign-on back.
func (q *request) end(*core.Exchange) {
	q.keep()
	q.mu.Lock()
	on := q.on
	q.on, q.failed = nil, errOver
	q.mu.Unlock()
	if on != nil {
		on.Release() // and commits
	}
}
