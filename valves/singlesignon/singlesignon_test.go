package singlesignon_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/lock"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
	"github.com/longhouse-go/longhouse/valves/routebinder"
	"github.com/longhouse-go/longhouse/valves/singlesignon"
)

// app is an application of a host with single sign-on. It has no passwords:
// /login believes what it is told.
func app(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	err := func() error {
		switch r.URL.Path {
		case "/login":
			return singlesignon.SignOn(r.Context(), singlesignon.Principal{Name: q.Get("user"), Roles: q["role"], AuthType: "form"})
		case "/who":
			p, ok, err := singlesignon.User(r.Context())
			if ok {
				_, _ = io.WriteString(w, p.Name+strings.Join(p.Roles, ","))
			}
			return err
		case "/logout":
			return singlesignon.SignOff(r.Context())
		}
		s, err := session.From(r)
		if err != nil {
			return err
		}
		switch r.URL.Path {
		case "/slow":
			time.Sleep(20 * time.Second)
			return s.Set("late", true)
		case "/use": // counts the requests of the session
			n := 0
			if _, err := s.Get("n", &n); err != nil {
				return err
			}
			_, _ = fmt.Fprint(w, n+1)
			return s.Set("n", n+1)
		case "/names":
			_, _ = io.WriteString(w, strings.Join(s.Names(), ","))
		case "/renew":
			return s.Renew()
		case "/invalidate":
			return s.Invalidate()
		case "/forge":
			return s.Set(core.ReservedAttribute+"signon", []string{q.Get("id"), "", ""})
		}
		return nil
	}()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// browser keeps cookies by name and path.
type browser struct {
	serve   func(*http.Request) *http.Response
	cookies map[string]*http.Cookie
	scheme  string
}

func newBrowser(h http.Handler) *browser {
	b := &browser{cookies: map[string]*http.Cookie{}, scheme: "http"}
	b.at(h)
	return b
}

// at sends the requests to another node from now on.
func (b *browser) at(h http.Handler) *browser {
	b.serve = func(r *http.Request) *http.Response {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Result()
	}
	return b
}

func (b *browser) get(path string) (int, string) {
	r := httptest.NewRequest(http.MethodGet, b.scheme+"://localhost"+path, nil)
	for _, c := range b.cookies {
		if strings.HasPrefix(path, c.Path) {
			r.AddCookie(c)
		}
	}
	resp := b.serve(r)
	for _, c := range resp.Cookies() {
		if c.MaxAge < 0 {
			delete(b.cookies, c.Name+c.Path)
		} else {
			b.cookies[c.Name+c.Path] = c
		}
	}
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(body))
}

func (b *browser) want(t testing.TB, path, want string) {
	t.Helper()
	if code, body := b.get(path); code != http.StatusOK || body != want {
		t.Errorf("%s: %d %q, want %q", path, code, body, want)
	}
}

// life is that of a session without requests, locker lets one request at a time
// use it.
var (
	life   = time.Hour
	locker core.SessionLocker
)

const cookie = "JSESSIONIDSSO"

func (b *browser) sso() string {
	if c := b.cookies[cookie+"/"]; c != nil {
		return c.Value
	}
	return ""
}

// world is one node with two applications.
type world struct {
	engine  *core.Engine
	table   *table.Table
	metrics *channel.Metrics
	logs    *observer.ObservedLogs
}

func newWorld(t testing.TB, c singlesignon.Config) *world {
	t.Helper()
	logger, logs := observer.New(zap.DebugLevel)
	w := &world{metrics: channel.NewMetrics(), logs: logs}
	s := channel.Settings{Logger: zap.New(logger), Metrics: w.metrics}
	w.table = table.New(table.Config{RenewGrace: -1}, s)
	if err := w.table.Start(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	w.engine = newEngine(t, c, s, w.table)
	t.Cleanup(func() { w.stop(t) })
	return w
}

func (w *world) stop(t testing.TB) {
	if err := errors.Join(w.engine.Stop(context.Background()), w.table.Stop(context.Background())); err != nil {
		t.Error(err)
	}
}

func newEngine(t testing.TB, c singlesignon.Config, s channel.Settings, tab *table.Table) *core.Engine {
	t.Helper()
	return newEngineWith(t, c, s, tab, tab)
}

func newEngineWith(t testing.TB, c singlesignon.Config, s channel.Settings, tab *table.Table, shared core.Sessions) *core.Engine {
	t.Helper()
	v, err := singlesignon.New(c, s)
	if err != nil {
		t.Fatal(err)
	}
	host := func(name string) core.HostOptions {
		o := core.HostOptions{Name: name, Valves: []core.Valve{v}}
		for _, path := range []string{"/a", "/b"} {
			o.Contexts = append(o.Contexts, core.ContextOptions{
				Path: path, Handler: http.HandlerFunc(app), Sessions: tab, MaxInactive: life, Distributable: true, Level: core.Synced, Locker: locker,
			})
		}
		return o
	}
	e, err := core.NewEngine(core.EngineOptions{Route: s.Name, Shared: shared, Valves: []core.Valve{routebinder.New(routebinder.Config{}, s)}, Hosts: []core.HostOptions{host("localhost"), host("other")}}, s)
	if err == nil {
		err = e.Start(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// sessions counts those of the applications.
func (w *world) sessions() (n int) {
	for _, s := range w.table.List(1000) {
		if !strings.HasSuffix(s.Context, "#signon") {
			n++
		}
	}
	return n
}

func (w *world) count(name string, labels ...string) (sum float64) {
	for _, s := range w.metrics.Samples() {
		if s.Name == "singlesignon_"+name && (len(labels) == 0 || strings.Contains(strings.Join(s.Labels, "="), labels[0])) {
			sum += s.Value
		}
	}
	return sum
}

// Who signs on in one application is known in the other, with a session of each
// and without any; who logs out of one, in whatever way, is out of both.
func TestOnceForAll(t *testing.T) {
	for _, way := range []string{"/a/logout", "/b/logout", "/a/invalidate", "/b/invalidate"} {
		w := newWorld(t, singlesignon.Default())
		b := newBrowser(w.engine)
		b.want(t, "/a/use", "1")
		b.want(t, "/a/who", "")
		b.want(t, "/b/use", "1")
		b.want(t, "/a/login?user=ada&role=+admin", "")
		b.want(t, "/a/who", "ada admin")
		b.want(t, "/b/who", "ada admin")
		b.want(t, "/a/use", "2")
		b.want(t, "/b/use", "2") // what was there before is still there
		b.want(t, "/a/names", "n")
		if n := w.table.Len(); n != 3 {
			t.Errorf("%d sessions, want two and the sign-on", n)
		}
		c := b.cookies[cookie+"/"]
		if c == nil || !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.Secure || c.Domain != "" || len(c.Value) != 64 {
			t.Errorf("cookie %v", c)
		}
		stolen := *b
		stolen.cookies = map[string]*http.Cookie{}
		for k, c := range b.cookies {
			stolen.cookies[k] = c
		}
		if code, _ := b.get(way); code != http.StatusOK {
			t.Errorf("%s: %d", way, code)
		}
		if b.sso() != "" {
			t.Errorf("%s: the cookie stays", way)
		}
		if n := w.sessions(); n != 0 {
			t.Errorf("%s: %d sessions are left", way, n)
		}
		for _, x := range []*browser{b, &stolen} {
			x.want(t, "/a/who", "")
			x.want(t, "/b/who", "")
			x.want(t, "/b/use", "1")
		}
	}
}

// Without sessions the cookie is enough, and a session that is made later
// belongs to the sign-on.
func TestSessionComesLater(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	b.want(t, "/b/who", "ada")
	if n := w.table.Len(); n != 1 {
		t.Errorf("%d sessions", n)
	}
	b.want(t, "/b/use", "1")
	b.want(t, "/b/use", "2")
	b.want(t, "/a/logout", "")
	b.want(t, "/b/use", "1")
}

// A session that somebody has planted in the victim's browser does not become
// one that knows the victim: it has another id from the sign-on on, in the
// application of the log-in and in the others.
func TestFixation(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	attacker := newBrowser(w.engine)
	attacker.want(t, "/a/use", "1")
	attacker.want(t, "/b/use", "1")
	victim := newBrowser(w.engine)
	for k, c := range attacker.cookies {
		victim.cookies[k] = c
	}
	victim.want(t, "/a/login?user=victim", "")
	victim.want(t, "/b/use", "2")
	victim.want(t, "/a/who", "victim")
	for _, path := range []string{"/a/who", "/b/who"} {
		attacker.want(t, path, "")
	}
	attacker.want(t, "/b/use", "1") // a new one
	victim.want(t, "/b/use", "3")
}

// A session may get a new id at any time.
func TestRenew(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	b.want(t, "/a/use", "1")
	b.want(t, "/b/use", "1")
	b.want(t, "/b/renew", "")
	delete(b.cookies, cookie+"/") // the session alone knows as well
	b.want(t, "/b/who", "ada")
	b.want(t, "/b/use", "2")
	b.want(t, "/a/invalidate", "")
	if n := w.sessions(); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
	b.want(t, "/b/use", "1")
}

// Signing on again as the same user keeps the sign-on; as another one ends the
// first, with all its sessions but that of the request.
func TestSignOnAgain(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	first := b.sso()
	b.want(t, "/b/use", "1")
	b.want(t, "/b/login?user=ada&role=+more", "")
	b.want(t, "/a/who", "ada more")
	if b.sso() != first {
		t.Error("the same user got another cookie")
	}
	delete(b.cookies, cookie+"/")
	b.want(t, "/b/login?user=ada", "")
	if s := b.sso(); s == "" || s == first || s[:32] != first[:32] {
		t.Errorf("a client that had lost its cookie has %q after %q", s, first)
	}
	b.want(t, "/a/use", "1")
	b.want(t, "/a/login?user=bob", "")
	b.want(t, "/a/who", "bob")
	b.want(t, "/b/who", "bob")
	b.want(t, "/a/use", "2")
	b.want(t, "/b/use", "1") // that of ada has ended
	if n := w.count("ended_total", "replaced"); n != 1 {
		t.Errorf("%v replaced", n)
	}
}

// With require_reauthentication each application signs on itself, and they sign
// off together.
func TestReauthentication(t *testing.T) {
	c := singlesignon.Default()
	c.RequireReauthentication = true
	w := newWorld(t, c)
	b := newBrowser(w.engine)
	b.want(t, "/a/use", "1")
	b.want(t, "/b/use", "1")
	b.want(t, "/a/login?user=ada", "")
	b.want(t, "/a/who", "ada")
	b.want(t, "/b/who", "")
	b.want(t, "/b/login?user=ada", "")
	b.want(t, "/b/who", "ada")
	b.want(t, "/a/logout", "")
	b.want(t, "/b/who", "")
	b.want(t, "/b/use", "1")
}

// One host knows nothing of the other's users.
func TestHostsAreApart(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	r := httptest.NewRequest(http.MethodGet, "http://other/a/who", nil)
	r.AddCookie(&http.Cookie{Name: cookie, Value: b.sso()})
	rec := httptest.NewRecorder()
	w.engine.ServeHTTP(rec, r)
	if rec.Body.String() != "" {
		t.Errorf("the other host knows %q", rec.Body)
	}
}

func TestSecureCookie(t *testing.T) {
	for _, c := range []singlesignon.Config{
		func() singlesignon.Config { c := singlesignon.Default(); c.SameSite = "none"; return c }(),
		func() singlesignon.Config {
			c := singlesignon.Default()
			c.Cookie, c.CookieDomain = "sso", "example.org"
			return c
		}(),
	} {
		b := newBrowser(newWorld(t, c).engine)
		b.scheme = "https"
		b.want(t, "/a/login?user=ada", "")
		got := b.cookies[c.Cookie+"/"]
		if got == nil || !got.Secure || !got.HttpOnly || got.Domain != c.CookieDomain {
			t.Errorf("cookie %v", got)
		}
	}
}

// One session of a sign-on that expires leaves it; with the last one it is gone.
func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, singlesignon.Default())
		defer w.stop(t)
		b := newBrowser(w.engine)
		b.want(t, "/a/login?user=ada", "")
		b.want(t, "/a/use", "1")
		b.want(t, "/b/use", "1")
		for range 4 { // one of them is used, longer than either lives
			time.Sleep(20 * time.Minute)
			b.want(t, "/b/who", "ada")
		}
		if n := w.table.Len(); n != 2 {
			t.Errorf("%d sessions, want one and the sign-on", n)
		}
		b.want(t, "/a/who", "ada")
		b.want(t, "/a/use", "1")
		time.Sleep(61 * time.Minute)
		if n := w.table.Len(); n != 0 {
			t.Errorf("%d sessions are left", n)
		}
		if n := w.count("ended_total", "expired"); n != 1 {
			t.Errorf("%v ended with their last session", n)
		}
		b.want(t, "/b/who", "")

		b.want(t, "/a/login?user=ada", "") // without any session
		time.Sleep(20 * time.Minute)
		b.want(t, "/a/who", "ada")
		time.Sleep(31 * time.Minute)
		b.want(t, "/a/who", "")
		if n := w.table.Len(); n != 0 {
			t.Errorf("%d sessions are left", n)
		}

		b.want(t, "/a/login?user=ada", "") // one that is over is remembered as long
		b.want(t, "/a/logout", "")
		if n := w.table.Len(); n != 1 {
			t.Errorf("%d sessions, want what is left of the sign-on", n)
		}
		time.Sleep(31 * time.Minute)
		if n := w.table.Len(); n != 0 {
			t.Errorf("%d sessions are left", n)
		}
	})
}

// A session that ends without a request, by the hand of an operator for
// example, ends the sign-on too.
func TestInvalidatedWithoutRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, singlesignon.Default())
		defer w.stop(t)
		b := newBrowser(w.engine)
		b.want(t, "/a/login?user=ada", "")
		b.want(t, "/a/use", "1")
		b.want(t, "/b/use", "1")
		id, _, _ := session.ParseID(b.cookies["JSESSIONID/a"].Value)
		h, err := w.table.Find(t.Context(), session.Key{Context: "localhost/a", ID: id})
		if err != nil || h == nil {
			t.Fatal(err)
		}
		if err := h.Invalidate(); err != nil {
			t.Fatal(err)
		}
		h.Release()
		synctest.Wait()
		b.want(t, "/b/who", "")
		if n := w.sessions(); n != 0 {
			t.Errorf("%d sessions are left", n)
		}
	})
}

// What a client makes up changes nothing, and is counted once.
func TestHostileCookies(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	real := b.sso()
	b.want(t, "/b/use", "1")
	other := b.cookies["JSESSIONID/b"].Value
	for value, metric := range map[string]string{
		strings.Repeat("A", 10_000):             "cookie",
		strings.ToLower(real):                   "cookie",
		real[:63]:                               "cookie",
		real + "0":                              "cookie",
		"../../etc/passwd":                      "cookie",
		real[:32] + strings.Repeat("0", 32):     "secret",
		strings.Repeat("0", 64):                 "", // no such sign-on
		strings.ToUpper(other[:32]) + real[32:]: "", // a session is no sign-on
		"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.node" + real[:27]: "cookie",
	} {
		before := w.count("refused_total")
		r := httptest.NewRequest(http.MethodGet, "http://localhost/a/who", nil)
		r.Header.Set("Cookie", cookie+"="+value)
		rec := httptest.NewRecorder()
		w.engine.ServeHTTP(rec, r)
		if rec.Code != http.StatusOK || rec.Body.String() != "" {
			t.Errorf("%.40q: %d %q", value, rec.Code, rec.Body)
		}
		cleared := strings.Contains(rec.Header().Get("Set-Cookie"), "Max-Age=0")
		if refused := w.count("refused_total") - before; metric != "" && (refused != 1 || w.count("refused_total", metric) == 0) || metric == "" && refused != 0 || cleared {
			t.Errorf("%.40q: %v refused, cookie %q", value, refused, rec.Header()["Set-Cookie"])
		}
	}
	b.want(t, "/a/who", "ada")

	// Many cookies: few are looked at.
	r := httptest.NewRequest(http.MethodGet, "http://localhost/a/who", nil)
	r.Header.Set("Cookie", strings.Repeat(cookie+"=x; ", 500)+cookie+"="+real)
	rec := httptest.NewRecorder()
	before := w.count("refused_total")
	w.engine.ServeHTTP(rec, r)
	if n := w.count("refused_total") - before; n != 4 || rec.Body.String() != "" {
		t.Errorf("%v looked at, %q", n, rec.Body)
	}

	// An application cannot be talked into joining a sign-on.
	f := newBrowser(w.engine)
	if code, _ := f.get("/a/forge?id=" + real[:32]); code != http.StatusInternalServerError {
		t.Errorf("forge: %d", code)
	}
	f.want(t, "/a/who", "")
}

// A sign-on that no node with the secret has made does not count: one that
// was made up, one that was changed and one that was copied.
func TestForgedSignOn(t *testing.T) {
	c := singlesignon.Default()
	c.Secret = secret.New("a secret that all nodes share")
	w := newWorld(t, c)
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada&role=+guest", "")
	b.want(t, "/b/use", "1")
	b.want(t, "/b/who", "ada guest")
	const name = "signon"
	find := func(id string) core.Handle {
		h, err := w.table.Find(t.Context(), session.Key{Context: "localhost#signon", ID: id})
		if err != nil || h == nil {
			t.Fatal(err)
		}
		return h
	}
	type entry struct {
		_                    struct{} `cbor:",toarray"`
		Principal, Hash, MAC []byte
	}
	var real entry
	h := find(b.sso()[:32])
	if ok, err := h.Get(name, &real); !ok || err != nil {
		t.Fatal(ok, err)
	}
	admin, err := session.Encode(singlesignon.Principal{Name: "admin"})
	if err != nil {
		t.Fatal(err)
	}
	forged, err := w.table.Create(t.Context(), "localhost#signon", session.NewOptions{MaxInactive: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	thief := newBrowser(w.engine)
	for what, e := range map[string]any{
		"made up":   entry{Principal: admin, Hash: real.Hash},
		"copied":    real,
		"no entry":  "text",
		"truncated": entry{Principal: real.Principal, Hash: real.Hash[:31], MAC: real.MAC},
	} {
		if err := forged.Set(name, e); err != nil {
			t.Fatal(err)
		}
		before := w.count("refused_total", "forged")
		thief.cookies[cookie+"/"] = &http.Cookie{Name: cookie, Path: "/", Value: forged.Key().ID + b.sso()[32:]}
		thief.want(t, "/a/who", "")
		if n := w.count("refused_total", "forged") - before; n != 1 {
			t.Errorf("%s: %v refused", what, n)
		}
	}
	if err := h.Set(name, entry{Principal: admin, Hash: real.Hash, MAC: real.MAC}); err != nil {
		t.Fatal(err)
	}
	b.want(t, "/b/who", "") // what is in the session is not lost
	b.want(t, "/b/use", "2")

	// The next secret is known before it is used.
	file := filepath.Join(t.TempDir(), "secrets")
	if err := os.WriteFile(file, []byte("the next secret of all nodes\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	next := singlesignon.Default()
	next.SecretFile, next.OldSecrets = file, []secret.Text{c.Secret}
	b.want(t, "/a/login?user=ada", "")
	e := newEngine(t, next, channel.Settings{}, w.table)
	defer e.Stop(context.Background())
	b.at(e).want(t, "/b/who", "ada")
}

// A session whose sign-on is not known any more becomes part of the next one of
// the same user, and not of somebody else's.
func TestStraySession(t *testing.T) {
	for user, want := range map[string]string{"ada": "ada", "bob": ""} {
		w := newWorld(t, singlesignon.Default())
		b := newBrowser(w.engine)
		b.want(t, "/a/login?user=ada", "")
		b.want(t, "/b/use", "1")
		h, err := w.table.Find(t.Context(), session.Key{Context: "localhost#signon", ID: b.sso()[:32]})
		if err != nil || h == nil {
			t.Fatal(err)
		}
		if err := h.Invalidate(); err != nil { // as if it had been lost
			t.Fatal(err)
		}
		h.Release()
		b.want(t, "/b/who", "")
		b.want(t, "/b/use", "2")
		if n := w.count("unknown_total"); n != 2 {
			t.Errorf("%v unknown", n)
		}
		b.want(t, "/a/login?user="+user, "")
		b.want(t, "/b/who", want)
		b.want(t, "/b/use", "3")
		b.want(t, "/b/login?user="+user, "")
		b.want(t, "/b/who", user)
		b.want(t, "/b/invalidate", "")
		b.want(t, "/a/who", "")
	}
}

func TestPrincipals(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	for _, query := range []string{"user=", "user=a%00b", "user=a%0Ab", "user=%FF", "user=" + strings.Repeat("x", 20_000), "user=a&role=" + strings.Repeat("x", 20_000)} {
		if code, body := b.get("/a/login?" + query); code != http.StatusInternalServerError || !strings.Contains(body, "not a principal") {
			t.Errorf("%.40s: %d %s", query, code, body)
		}
	}
	if n := w.count("refused_total", "principal"); n != 6 {
		t.Errorf("%v refused", n)
	}
	b.want(t, "/a/who", "")
	if b.sso() != "" || w.table.Len() != 0 {
		t.Error("something was left")
	}
}

// A sign-on remembers so many sessions; those that are gone make room, and the
// others end when they are used.
func TestManySessions(t *testing.T) {
	c := singlesignon.Default()
	c.MaxSessions = 2
	w := newWorld(t, c)
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	lost := []*http.Cookie{}
	for range 5 { // a client that loses its session cookies
		b.want(t, "/a/use", "1")
		lost = append(lost, b.cookies["JSESSIONID/a"])
		delete(b.cookies, "JSESSIONID/a")
	}
	if n := w.count("refused_total", "sessions"); n != 3 {
		t.Errorf("%v refused", n)
	}
	b.want(t, "/a/logout", "")
	for _, c := range lost {
		x := newBrowser(w.engine)
		x.cookies["JSESSIONID/a"] = c
		x.want(t, "/a/use", "1")
	}
}

// Requests of one client at the same time, some of them the first of their
// session, all know the user.
func TestParallel(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	b.want(t, "/a/use", "1")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			x := newBrowser(w.engine)
			for k, c := range b.cookies {
				x.cookies[k] = c
			}
			x.want(t, []string{"/a/who", "/b/who"}[i%2], "ada")
			_, _ = x.get("/b/use")
		})
	}
	wg.Wait()
	b.want(t, "/b/logout", "")
	if n := w.sessions(); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}

// Logs show no more than the beginning of an id, and no cookie.
func TestLogs(t *testing.T) {
	c := singlesignon.Default()
	c.MaxSessions = 1
	w := newWorld(t, c)
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	sso := b.sso()
	h, err := w.table.Find(t.Context(), session.Key{Context: "localhost#signon", ID: sso[:32]})
	if err != nil || h == nil {
		t.Fatal(err)
	}
	if err := h.Set("signon", "broken"); err != nil {
		t.Fatal(err)
	}
	b.want(t, "/a/who", "")
	if w.logs.Len() == 0 {
		t.Error("nothing was logged")
	}
	for _, e := range w.logs.All() {
		if text := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(text, sso[:16]) || strings.Contains(text, sso[32:]) {
			t.Errorf("logged: %s", text)
		}
	}
}

// Sessions that one request at a time may use sign on and off as others do.
func TestLockedSessions(t *testing.T) {
	l := lock.New(lock.Config{}, nil, channel.Settings{})
	defer l.Stop(context.Background())
	locker = l.With(lock.DefaultLease)
	defer func() { locker = nil }()
	for _, test := range []func(*testing.T){TestOnceForAll, TestSessionComesLater, TestFixation, TestRenew, TestSignOnAgain, TestReauthentication, TestParallel} {
		test(t)
	}
}

// A user of a node that is going to stop can still sign on: whoever else takes
// the user over knows.
func TestDraining(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(t, "/a/use", "1")
	w.table.Drain()
	b.want(t, "/a/login?user=ada", "")
	b.want(t, "/a/who", "ada")
	b.want(t, "/a/use", "2")
}

// Without the valve, or a table, the functions say so.
func TestWithoutValve(t *testing.T) {
	ctx := t.Context()
	_, _, err := singlesignon.User(ctx)
	for _, err := range []error{err, singlesignon.SignOn(ctx, singlesignon.Principal{Name: "ada"}), singlesignon.SignOff(ctx)} {
		if !errors.Is(err, singlesignon.ErrNoValve) {
			t.Errorf("got %v", err)
		}
	}
}

func TestConfig(t *testing.T) {
	for name, change := range map[string]func(*singlesignon.Config){
		"cookie":         func(c *singlesignon.Config) { c.Cookie = "a b" },
		"cookie_domain":  func(c *singlesignon.Config) { c.CookieDomain = "a;b" },
		"same_site":      func(c *singlesignon.Config) { c.SameSite = "some" },
		"max_idle":       func(c *singlesignon.Config) { c.MaxIdle = 0 },
		"max_sessions":   func(c *singlesignon.Config) { c.MaxSessions = 0 },
		"max_principal":  func(c *singlesignon.Config) { c.MaxPrincipal = -1 },
		"secret":         func(c *singlesignon.Config) { c.Secret = secret.New("short") },
		"no such secret": func(c *singlesignon.Config) { c.SecretFile = filepath.Join(t.TempDir(), "no such secret") },
	} {
		c := singlesignon.Default()
		change(&c)
		if _, err := singlesignon.New(c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What comes in a cookie or from a member is somebody else's.
func FuzzCookie(f *testing.F) {
	w := newWorld(f, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(f, "/a/login?user=ada", "")
	f.Add(b.sso())
	f.Add("x=" + cookie + "; " + cookie + "=\"")
	f.Fuzz(func(t *testing.T, value string) {
		r := httptest.NewRequest(http.MethodGet, "http://localhost/a/who", nil)
		r.Header.Set("Cookie", cookie+"="+value)
		rec := httptest.NewRecorder()
		w.engine.ServeHTTP(rec, r)
		if rec.Code != http.StatusOK || rec.Body.String() != "" && !strings.Contains(value, b.sso()) {
			t.Errorf("%q: %d %q", value, rec.Code, rec.Body)
		}
	})
}

// BenchmarkWho is a request that asks who has signed on, and one that does not.
func BenchmarkWho(b *testing.B) {
	w := newWorld(b, singlesignon.Default())
	br := newBrowser(w.engine)
	br.want(b, "/a/login?user=ada", "")
	br.want(b, "/a/use", "1")
	for _, path := range []string{"/a/who", "/a/other"} {
		b.Run(path[3:], func(b *testing.B) {
			r := httptest.NewRequest(http.MethodGet, "http://localhost"+path, nil)
			for _, c := range br.cookies {
				r.AddCookie(c)
			}
			b.ReportAllocs()
			for b.Loop() {
				w.engine.ServeHTTP(httptest.NewRecorder(), r)
			}
		})
	}
}
