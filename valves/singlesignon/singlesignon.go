// Package singlesignon is a valve that lets a user sign on once for all
// applications of a host, on all nodes. An application, or a valve in front of
// it, finds out who the user is and says so:
//
//	err := singlesignon.SignOn(r.Context(), singlesignon.Principal{Name: "ada", Roles: []string{"admin"}})
//	user, ok, err := singlesignon.User(r.Context()) // in any application
//	err = singlesignon.SignOff(r.Context())
//
// What the valve keeps never contains a password: there is no place for one.
// It imports channel, channel/secret, core and core/session only.
package singlesignon

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Config is what users write.
type Config struct {
	// Cookie is the cookie's name.
	Cookie string `yaml:"cookie"`
	// CookieDomain is the cookie's domain; empty for the host alone.
	CookieDomain string `yaml:"cookie_domain"`
	// SameSite is lax, strict or none.
	SameSite string `yaml:"same_site"`
	// RequireReauthentication: being signed on in one application does not sign
	// on in another; each calls SignOn itself. They still sign off together.
	RequireReauthentication bool `yaml:"require_reauthentication"`
	// MaxIdle is how long a sign-on lives without a request. It is longer while
	// it has a session that lives longer.
	MaxIdle time.Duration `yaml:"max_idle"`
	// MaxSessions bounds the sessions of one sign-on that are remembered, so as to
	// end them at once when the user signs off. Further ones end when they are
	// used next.
	MaxSessions int `yaml:"max_sessions"`
	// MaxPrincipal bounds a principal, in bytes of its texts.
	MaxPrincipal int `yaml:"max_principal"`
	// Secret is text of at least 16 bytes that the nodes with this valve share.
	// With it, sign-ons that a member of the group, or a store, has made up are
	// refused. Without it whoever may send sessions may make sign-ons.
	Secret secret.Text `yaml:"secret"`
	// SecretFile is a file of secrets, one per line, that must not be readable by
	// everybody: the first one signs, all are valid. It takes the place of Secret.
	SecretFile string `yaml:"secret_file"`
	// OldSecrets are valid, too.
	OldSecrets []secret.Text `yaml:"old_secrets"`
}

// Default returns the defaults.
func Default() Config {
	return Config{Cookie: "JSESSIONIDSSO", SameSite: "lax", MaxIdle: 30 * time.Minute, MaxSessions: 100, MaxPrincipal: 16 << 10}
}

// Validate checks the configuration.
func (c *Config) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("singlesignon: "+format, args...))
	}
	if err := (&http.Cookie{Name: c.Cookie, Value: "x", Domain: c.CookieDomain}).Valid(); err != nil {
		wrong("cookie %q with cookie_domain %q: %w", c.Cookie, c.CookieDomain, err)
	}
	if _, ok := sameSites[c.SameSite]; !ok {
		wrong("same_site is %q: it must be lax, strict or none", c.SameSite)
	}
	if c.MaxIdle < time.Second || c.MaxIdle > 366*24*time.Hour {
		wrong("max_idle is %v: it must be from 1s to a year", c.MaxIdle)
	}
	if c.MaxSessions < 1 || c.MaxSessions > 1000 {
		wrong("max_sessions is %d: it must be from 1 to 1000", c.MaxSessions)
	}
	if c.MaxPrincipal < 1 || c.MaxPrincipal > 1<<20 {
		wrong("max_principal is %d: it must be from 1 to 1048576", c.MaxPrincipal)
	}
	return errors.Join(errs...)
}

var sameSites = map[string]http.SameSite{"lax": http.SameSiteLaxMode, "strict": http.SameSiteStrictMode, "none": http.SameSiteNoneMode}

// Factory makes the valve from configuration.
var Factory = channel.FactoryOf("singlesignon", Default(), func(c Config, s channel.Settings) (core.Valve, error) {
	return New(c, s)
})

// Principal is who has signed on. There is no place for a password.
type Principal struct {
	// Name is the user's name; it must not be empty.
	Name string `cbor:"1,keyasint"`
	// Roles are what the user may do, in the application's own words.
	Roles []string `cbor:"2,keyasint,omitempty"`
	// AuthType says how the user was authenticated, "form" for example.
	AuthType string `cbor:"3,keyasint,omitempty"`
}

// HasRole reports whether the user has that role.
func (p Principal) HasRole(role string) bool { return slices.Contains(p.Roles, role) }

// Errors that an application may branch on.
var (
	// ErrNoValve: the request does not pass the valve, or its node has no session
	// table.
	ErrNoValve = errors.New("singlesignon: the request does not pass the valve singlesignon")
	// ErrPrincipal: the principal has no name, is too large, or its texts are not
	// printable.
	ErrPrincipal = errors.New("singlesignon: not a principal")
)

// Valve keeps who has signed on.
type Valve struct {
	cfg  Config
	keys []secret.Key // the first one signs
	log  *zap.Logger
	// engine is that of the latest request, for what happens without one.
	engine atomic.Pointer[core.Engine]

	signedOn, associated, sessionsEnded, unknown, failed *channel.Counter
	ended, refused                                       map[string]*channel.Counter
}

// New returns the valve.
func New(c Config, s channel.Settings) (*Valve, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	all, err := secret.List("secret", c.Secret, c.SecretFile, c.OldSecrets)
	if err == nil {
		err = secret.CheckLength("secret", all)
	}
	if err != nil {
		return nil, fmt.Errorf("singlesignon: %w", err)
	}
	v := &Valve{cfg: c, log: s.Logger, ended: map[string]*channel.Counter{}, refused: map[string]*channel.Counter{}}
	if v.keys, err = secret.DeriveAll(all, "longhouse single sign-on"); err != nil {
		return nil, fmt.Errorf("singlesignon: %w", err)
	}
	if v.log == nil {
		v.log = zap.NewNop()
	}
	m := s.Metrics
	v.signedOn = m.Counter("singlesignon_signed_on_total", "Users that signed on.")
	v.associated = m.Counter("singlesignon_associated_total", "Sessions that became part of a sign-on.")
	v.sessionsEnded = m.Counter("singlesignon_sessions_ended_total", "Sessions that were ended because their sign-on was over.")
	v.unknown = m.Counter("singlesignon_unknown_total", "Sessions of sign-ons that this node did not know of.")
	v.failed = m.Counter("singlesignon_failed_total", "Sign-ons that could not be looked up or stored, because the session manager did not answer.")
	for _, why := range []string{"signoff", "logout", "expired", "replaced"} {
		v.ended[why] = m.Counter("singlesignon_ended_total", "Sign-ons that ended here: by SignOff, by the invalidation of a session, with their last session, or because another user signed on.", "reason", why)
	}
	for _, why := range []string{"cookie", "secret", "forged", "sessions", "principal"} {
		v.refused[why] = m.Counter("singlesignon_refused_total", "What was refused: cookies of another form, cookies with a wrong secret, sign-ons that no node with this valve has made, sessions over max_sessions, principals that are none.", "reason", why)
	}
	return v, nil
}

// entry is what a sign-on is: the attribute entryName of a session of the
// context "<host>#signon". The cookie is that session's id and a secret of
// which only the hash is kept, so that nobody who reads messages or a store can
// make the cookie.
type entry struct {
	_         struct{} `cbor:",toarray"`
	Principal []byte   // encoded
	Hash      []byte   // SHA-256 of the cookie's secret
	MAC       []byte   // of host, id and the two above; empty without a secret
}

// member is one session of a sign-on, in the attribute memberName plus a slot.
type member struct {
	_           struct{} `cbor:",toarray"`
	Context, ID string
}

// link is the attribute of a session that says which sign-on it belongs to, and
// whose it is.
type link struct {
	_              struct{} `cbor:",toarray"`
	ID, Slot, User string
}

// A sign-on that its user has ended stays for a while, with nothing but the
// attribute overName: that merges with whatever the other side of a split knows,
// and tells an end from a sign-on that is not known here.
const (
	entryName  = "signon"
	overName   = "over"
	memberName = "session/"
	linkName   = core.ReservedAttribute + "signon"

	// digits is how many hexadecimal digits an id and a secret have each.
	digits = 32
	// maxCookies bounds how many cookies of the name are tried: one per domain
	// and path that a client may have them of.
	maxCookies = 4
	// grace is how much longer than its sessions a sign-on lives: access times
	// may be known late.
	grace = 2 * time.Minute
	// timeout bounds what is done without a request, and the wait for the other
	// nodes to know that a user has signed on or off.
	timeout = core.DefaultCommitTimeout
)

// contextOf returns the name under which the sign-ons of a host are kept. No
// application has such a name.
func contextOf(host string) string { return strings.ToLower(host) + "#signon" }

// hostOf is the host part of a context's name.
func hostOf(contextName string) string {
	host, _, _ := strings.Cut(contextName, "/")
	return host
}

// mac authenticates a sign-on.
func mac(k secret.Key, key session.Key, e *entry) ([]byte, error) {
	h := sha256.New()
	for _, part := range [][]byte{[]byte(key.Context), []byte(key.ID), e.Principal, e.Hash} {
		fmt.Fprintf(h, "%d:", len(part))
		h.Write(part)
	}
	return k.Expand("sign-on", h.Sum(nil), sha256.Size)
}

// write stores who has signed on, and the hash of the cookie's secret.
func (v *Valve) write(h core.Handle, p Principal, hash []byte) error {
	b, err := session.Encode(p)
	if err != nil {
		return err
	}
	e := entry{Principal: b, Hash: hash}
	if len(v.keys) > 0 {
		if e.MAC, err = mac(v.keys[0], h.Key(), &e); err != nil {
			return err
		}
	}
	return h.Set(entryName, e)
}

// read returns who has signed on; false if no node with this valve has written
// it.
func (v *Valve) read(h core.Handle) (p Principal, hash []byte, ok bool) {
	var e entry
	if there, err := h.Get(entryName, &e); !there || err != nil || len(e.Hash) != sha256.Size {
		return p, nil, false
	}
	if len(v.keys) > 0 && !slices.ContainsFunc(v.keys, func(k secret.Key) bool {
		want, err := mac(k, h.Key(), &e)
		return err == nil && subtle.ConstantTimeCompare(want, e.MAC) == 1
	}) {
		return p, nil, false
	}
	if err := session.Decode(e.Principal, &p); err != nil || v.check(p) != nil {
		return p, nil, false
	}
	return p, e.Hash, true
}

// check refuses what is no principal.
func (v *Valve) check(p Principal) error {
	size := len(p.Name) + len(p.AuthType)
	for _, r := range p.Roles {
		size += len(r)
	}
	switch {
	case p.Name == "":
		return fmt.Errorf("%w: it has no name", ErrPrincipal)
	case size > v.cfg.MaxPrincipal:
		return fmt.Errorf("%w: %d bytes, at most %d are allowed (max_principal)", ErrPrincipal, size, v.cfg.MaxPrincipal)
	}
	for _, text := range append([]string{p.Name, p.AuthType}, p.Roles...) {
		if !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
			return fmt.Errorf("%w: it has characters that cannot be printed", ErrPrincipal)
		}
	}
	return nil
}

// parse splits the value of a cookie into id and secret.
func parse(value string) (id, secret string, ok bool) {
	if len(value) != 2*digits {
		return "", "", false
	}
	for i := range len(value) {
		if c := value[i]; (c < '0' || c > '9') && (c < 'A' || c > 'F') {
			return "", "", false
		}
	}
	return value[:digits], value[digits:], true
}

// hashOf is what is kept of a cookie's secret.
func hashOf(secret string) []byte {
	h := sha256.Sum256([]byte(secret))
	return h[:]
}

func newSlot() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// found is a sign-on that was looked up.
type found struct {
	on   core.Handle // nil if it is over or not known
	who  Principal
	hash []byte
	over bool // its user has ended it
}

// find looks for the sign-on of that id.
func (v *Valve) find(ctx context.Context, e *core.Engine, host, id string) (f found, err error) {
	on, err := e.Shared().Find(ctx, session.Key{Context: contextOf(host), ID: id})
	if err != nil {
		v.failed.Inc()
		v.log.Debug("a sign-on could not be looked up", zap.String("signOn", session.Prefix(id)), zap.Error(err))
		return f, err
	}
	if on == nil {
		return f, nil
	}
	if f.over = isOver(on); f.over {
		on.Release()
		return f, nil
	}
	var ok bool
	if f.who, f.hash, ok = v.read(on); !ok {
		on.Release()
		v.refused["forged"].Inc()
		v.log.Warn("a sign-on is refused: no node with this valve and secret has made it", zap.String("signOn", session.Prefix(id)), zap.String("host", host))
		return f, nil
	}
	f.on = on
	return f, nil
}

// isOver reports whether the sign-on has been ended, here or elsewhere.
func isOver(on core.Handle) bool {
	over := false
	ok, err := on.Get(overName, &over)
	return ok || err != nil
}

// end ends a sign-on and all its sessions but one. When it returns, the nodes
// that answer know; the error is that of telling them.
func (v *Valve) end(ctx context.Context, e *core.Engine, on core.Handle, why string, but session.Key) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	members := membersOf(on)
	id := on.Key().ID
	if isOver(on) {
		return nil // somebody was faster
	}
	if err := on.Set(overName, true); err != nil {
		return nil //nolint:nilerr // it has expired
	}
	_ = on.Delete(entryName) // neither fails if the one before did not
	for slot := range members {
		_ = on.Delete(memberName + slot)
	}
	v.ended[why].Inc()
	err := on.Commit(ctx, core.Synced)
	if err != nil {
		v.failed.Inc()
		v.log.Warn("the end of a sign-on has not reached all nodes yet", zap.String("signOn", session.Prefix(id)), zap.Error(err))
	}
	// The sessions end here for the sake of listeners and memory: without their
	// sign-on nobody can use them any more.
	for _, m := range members {
		if key := (session.Key{Context: m.Context, ID: m.ID}); key != but {
			v.endSession(ctx, e, key, id)
		}
	}
	return err
}

// endSession ends a session of a sign-on.
func (v *Valve) endSession(ctx context.Context, e *core.Engine, key session.Key, id string) {
	h, err := tableOf(e, key.Context).Find(ctx, key)
	if err != nil {
		v.failed.Inc()
		v.log.Debug("a session of a sign-on that is over ends when it is used next", zap.String("session", session.Prefix(key.ID)), zap.Error(err))
	}
	if h == nil {
		return
	}
	defer h.Release() // and commits
	var l link
	if ok, err := h.Get(linkName, &l); ok && err == nil && l.ID == id && h.Invalidate() == nil {
		v.sessionsEnded.Inc()
	}
}

// tableOf returns the table of a context, which need not be on this node.
func tableOf(e *core.Engine, name string) core.Sessions {
	for _, h := range e.Hosts() {
		if !strings.EqualFold(h.Name(), hostOf(name)) {
			continue
		}
		for _, c := range h.Contexts() {
			if c.Name() == name && c.Sessions() != nil {
				return c.Sessions()
			}
		}
	}
	return e.Shared()
}

// membersOf returns the sessions of a sign-on by slot.
func membersOf(on core.Handle) map[string]member {
	all := map[string]member{}
	for _, name := range on.Names() {
		slot, ok := strings.CutPrefix(name, memberName)
		if !ok {
			continue
		}
		var m member
		if there, err := on.Get(name, &m); there && err == nil {
			all[slot] = m
		}
	}
	return all
}

// SessionListening hears of sessions that end without a request: expired ones
// leave their sign-on, and take it with them if they are the last.
func (v *Valve) SessionListening() core.SessionListening {
	return core.SessionListening{Listener: core.SessionListenerFunc(v.heard), Kinds: core.SessionDestroyed}
}

func (v *Valve) heard(ev core.SessionEvent) {
	e := v.engine.Load()
	var l link
	if ok, err := ev.Get(linkName, &l); !ok || err != nil || !ev.Local || e == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	f, err := v.find(ctx, e, hostOf(ev.Key.Context), l.ID)
	on := f.on
	if on == nil || err != nil {
		return // it is over, or will be for want of requests
	}
	defer on.Release()
	if ev.Reason == session.Invalidated {
		_ = v.end(ctx, e, on, "logout", ev.Key) // logged
		return
	}
	if err := on.Delete(memberName + l.Slot); err == nil && len(membersOf(on)) == 0 && on.Invalidate() == nil {
		v.ended["expired"].Inc() // there is nothing left that could come back
	}
}
