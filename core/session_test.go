package core_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// shop is an engine with one context /shop that runs f.
func shop(t *testing.T, table *memory, f http.HandlerFunc, edit func(*core.ContextOptions), valves ...core.Valve) *core.Engine {
	t.Helper()
	o := core.ContextOptions{Path: "/shop", Handler: f, Sessions: table, Distributable: true}
	if edit != nil {
		edit(&o)
	}
	return newEngine(t, core.EngineOptions{Name: "e", Route: "n1", Valves: valves,
		Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{o}}}})
}

// touch makes a session and answers its id.
func touch(w http.ResponseWriter, r *http.Request) {
	s, err := session.From(r)
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	io.WriteString(w, s.ID())
}

// peek answers the id of an existing session, or none.
func peek(w http.ResponseWriter, r *http.Request) {
	s, err := session.Existing(r)
	switch {
	case err != nil:
		http.Error(w, err.Error(), 500)
	case s == nil:
		io.WriteString(w, "none")
	default:
		io.WriteString(w, s.ID())
	}
}

func cookieOf(t *testing.T, w *httptest.ResponseRecorder) *http.Cookie {
	t.Helper()
	cookies := w.Result().Cookies()
	if len(cookies) != 1 {
		t.Fatalf("%d cookies in %v", len(cookies), w.Header())
	}
	return cookies[0]
}

func TestSessionCookie(t *testing.T) {
	for name, tc := range map[string]struct {
		edit   func(*core.ContextOptions)
		secure bool
		want   string // behind the id
	}{
		"default": {nil, false, "; Path=/shop; HttpOnly; SameSite=Lax"},
		"tls":     {nil, true, "; Path=/shop; Secure; HttpOnly; SameSite=Lax"},
		"root":    {func(o *core.ContextOptions) { o.Path = "" }, false, "; Path=/; HttpOnly; SameSite=Lax"},
		"strict":  {func(o *core.ContextOptions) { o.Tracking.SameSite = http.SameSiteStrictMode }, false, "; Path=/shop; HttpOnly; SameSite=Strict"},
		"none":    {func(o *core.ContextOptions) { o.Tracking.SameSite = http.SameSiteNoneMode }, false, "; Path=/shop; Secure; HttpOnly; SameSite=None"},
		"all else": {func(o *core.ContextOptions) {
			o.Tracking = core.Tracking{Cookie: "SID", CookiePath: "/a", CookieDomain: "x.example"}
		}, false, "; Path=/a; Domain=x.example; HttpOnly; SameSite=Lax"},
	} {
		secure := core.ValveFunc(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				core.FromContext(r.Context()).SetSecure(tc.secure)
				next.ServeHTTP(w, r)
			})
		})
		e := shop(t, newMemory(), touch, tc.edit, secure)
		target := "/shop/"
		w := do(e, "GET", "h", target)
		id := w.Body.String()
		if _, route, ok := session.ParseID(id); !ok || route != "n1" {
			t.Errorf("%s: id %q", name, id)
		}
		cookieName := "JSESSIONID"
		if name == "all else" {
			cookieName = "SID"
		}
		if got, want := w.Header().Get("Set-Cookie"), cookieName+"="+id+tc.want; got != want {
			t.Errorf("%s:\n got %s\nwant %s", name, got, want)
		}
		again := do(e, "GET", "h", target, "Cookie", cookieName+"="+id)
		if again.Body.String() != id || again.Header().Get("Set-Cookie") != "" {
			t.Errorf("%s: with the cookie: %q, cookies %v", name, again.Body, again.Header()["Set-Cookie"])
		}
	}
}

// TestRequestedIDs: CK-03, CK-08 and relatives.
func TestRequestedIDs(t *testing.T) {
	table := newMemory()
	e := shop(t, table, touch, nil)
	a, b := do(e, "GET", "h", "/shop/").Body.String(), do(e, "GET", "h", "/shop/").Body.String()
	dead := strings.Repeat("0", 32) + ".n1"
	many := strings.Repeat("JSESSIONID="+dead+"; ", 3)
	distinct := func(n int) string {
		var s strings.Builder
		for i := range n {
			s.WriteString("JSESSIONID=" + strings.Repeat(string(rune('A'+i%6)), 32+i) + "; ")
		}
		return s.String()
	}
	e = shop(t, table, peek, nil)
	for name, tc := range map[string]struct{ target, cookie, want string }{
		"nothing":               {"/shop/", "", "none"},
		"cookie":                {"/shop/", "JSESSIONID=" + a, a},
		"path":                  {"/shop/;jsessionid=" + a, "", a},
		"path, upper case name": {"/shop/x;JSESSIONID=" + a, "", a},
		"cookie name has case":  {"/shop/", "jsessionid=" + a, "none"},
		"cookie before path":    {"/shop/;jsessionid=" + b, "JSESSIONID=" + a, a},
		"dead cookie, path":     {"/shop/;jsessionid=" + b, "JSESSIONID=" + dead, b},
		"two, second lives":     {"/shop/", "JSESSIONID=" + dead + "; JSESSIONID=" + b, b},
		"two, first wins":       {"/shop/", "JSESSIONID=" + b + "; JSESSIONID=" + a, b},
		"repeated dead, living": {"/shop/", many + "JSESSIONID=" + a, a},
		"seven dead, living":    {"/shop/", distinct(7) + "JSESSIONID=" + a, a},
		"too many":              {"/shop/", distinct(8) + "JSESSIONID=" + a, "none"},
		"quoted":                {"/shop/", `x=1; JSESSIONID="` + a + `"; y=2`, a},
		"other route":           {"/shop/", "JSESSIONID=" + strings.TrimSuffix(a, "n1") + "n7", strings.TrimSuffix(a, "n1") + "n7"},
		"no route":              {"/shop/", "JSESSIONID=" + strings.TrimSuffix(a, ".n1"), strings.TrimSuffix(a, ".n1")},
		"never adopted":         {"/shop/", "JSESSIONID=" + dead, "none"},
		"lower case digits":     {"/shop/", "JSESSIONID=" + strings.ToLower(a), "none"},
		"64 KB":                 {"/shop/", strings.Repeat("a=b; ", 13000) + "JSESSIONID=" + a, a},
		"64 KB value":           {"/shop/", "JSESSIONID=" + strings.Repeat("A", 64<<10) + "; JSESSIONID=" + a, a},
		"dots and slashes":      {"/shop/", "JSESSIONID=../../etc", "none"},
		"name as a part":        {"/shop/", "XJSESSIONID=" + a + "; JSESSIONIDX=" + a, "none"},
	} {
		var header []string
		if tc.cookie != "" {
			header = []string{"Cookie", tc.cookie}
		}
		if got := do(e, "GET", "h", tc.target, header...).Body.String(); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
	if got := do(shop(t, table, touch, nil), "GET", "h", "/shop/", "Cookie", "JSESSIONID="+dead).Body.String(); strings.HasPrefix(got, dead[:32]) {
		t.Error("a client's own id was adopted")
	}
	noCookies := shop(t, table, peek, func(o *core.ContextOptions) { o.Tracking.NoCookies = true })
	if got := do(noCookies, "GET", "h", "/shop/", "Cookie", "JSESSIONID="+a).Body.String(); got != "none" {
		t.Errorf("cookies are off: %q", got)
	}
	noURLs := shop(t, table, peek, func(o *core.ContextOptions) { o.Tracking.NoURLs = true })
	if got := do(noURLs, "GET", "h", "/shop/;jsessionid="+a).Body.String(); got != "none" {
		t.Errorf("path parameters are off: %q", got)
	}
	if _, _, held := table.state(); held != 0 {
		t.Errorf("%d handles were not released", held)
	}
}

func TestRebind(t *testing.T) {
	table := newMemory()
	id := do(shop(t, table, touch, nil), "GET", "h", "/shop/").Body.String()
	foreign := strings.TrimSuffix(id, "n1") + "n2"
	binder := core.ValveFunc(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if x := core.FromContext(r.Context()); x.ForeignRoute() {
				if _, err := x.Rebind(); err != nil {
					t.Error(err)
				}
			}
			next.ServeHTTP(w, r)
		})
	})
	e := shop(t, table, func(w http.ResponseWriter, r *http.Request) {}, nil, binder)
	for _, tc := range []struct {
		sent  string
		bound bool
	}{{foreign, true}, {id, false}, {strings.TrimSuffix(id, ".n1"), true}, {strings.Repeat("0", 32) + ".n2", false}} {
		w := do(e, "GET", "h", "/shop/pic.gif", "Cookie", "JSESSIONID="+tc.sent)
		if tc.bound {
			if c := cookieOf(t, w); c.Value != id {
				t.Errorf("%s: rebound to %s, want %s", tc.sent, c.Value, id)
			}
		} else if w.Header().Get("Set-Cookie") != "" {
			t.Errorf("%s: cookie %q, want none", tc.sent, w.Header().Get("Set-Cookie"))
		}
	}
	if got := do(shop(t, table, touch, nil, binder), "GET", "h", "/shop/", "Cookie", "JSESSIONID="+foreign).Body.String(); got != id {
		t.Errorf("the application sees %q, want %q", got, id)
	}
}

func TestEncodeURL(t *testing.T) {
	table := newMemory()
	var refs []string
	e := shop(t, table, func(w http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err != nil {
			t.Error(err)
			return
		}
		for _, ref := range refs {
			got := core.FromContext(r.Context()).EncodeURL(ref)
			io.WriteString(w, strings.ReplaceAll(got, s.ID(), "ID")+"\n")
		}
	}, nil)
	cases := [][2]string{
		{"page", "page;jsessionid=ID"},
		{"./", "./;jsessionid=ID"},
		{"page?a=b#c", "page;jsessionid=ID?a=b#c"},
		{"page#c", "page;jsessionid=ID#c"},
		{"/shop", "/shop;jsessionid=ID"},
		{"/shop/x?q", "/shop/x;jsessionid=ID?q"},
		{"?q=1", "/shop/here;jsessionid=ID?q=1"},
		{"http://h/shop/x", "http://h/shop/x;jsessionid=ID"},
		{"//h/shop/x", "//h/shop/x;jsessionid=ID"},
		{"/other/x", "/other/x"},
		{"/shopping", "/shopping"},
		{"http://elsewhere/shop/x", "http://elsewhere/shop/x"},
		{"https://h/shop/x", "https://h/shop/x"},
		{"//elsewhere/shop/x", "//elsewhere/shop/x"},
		{"mailto:a@b", "mailto:a@b"},
		{"javascript:x", "javascript:x"},
		{"#top", "#top"},
		{"page;jsessionid=x", "page;jsessionid=x"},
		{"%zz", "%zz"},
	}
	for _, c := range cases {
		refs = append(refs, c[0])
	}
	lines := strings.Split(do(e, "GET", "h", "/shop/here").Body.String(), "\n")
	for i, c := range cases {
		if lines[i] != c[1] {
			t.Errorf("%s: %s, want %s", c[0], lines[i], c[1])
		}
	}
	// A client that has sent the cookie needs nothing.
	id := cookieOf(t, do(shop(t, table, touch, nil), "GET", "h", "/shop/")).Value
	if got := do(e, "GET", "h", "/shop/here", "Cookie", "JSESSIONID="+id).Body.String(); strings.Contains(got, "jsessionid=ID") {
		t.Errorf("encoded although the client keeps cookies: %s", got)
	}
	// A client that came by path goes on by path.
	if got := do(e, "GET", "h", "/shop/here;jsessionid="+id).Body.String(); !strings.HasPrefix(got, "page;jsessionid=ID\n") {
		t.Errorf("came by path: %s", got)
	}
}

func TestCommitPolicy(t *testing.T) {
	change := func(w http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err == nil {
			err = s.Set("a", 1)
		}
		if err != nil {
			http.Error(w, err.Error(), 500)
		}
	}
	policy := func(f func(*core.Exchange)) core.Valve {
		return core.ValveFunc(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				f(core.FromContext(r.Context()))
				next.ServeHTTP(w, r)
			})
		})
	}
	level := func(l core.Level) func(*core.ContextOptions) {
		return func(o *core.ContextOptions) { o.Level = l }
	}
	nothing := policy(func(*core.Exchange) {})
	for name, tc := range map[string]struct {
		edit  func(*core.ContextOptions)
		valve core.Valve
		want  []core.Level
	}{
		"async":             {nil, nothing, []core.Level{core.Async}},
		"sync":              {level(core.Synced), nothing, []core.Level{core.Synced}},
		"ack by the valve":  {nil, policy(func(x *core.Exchange) { x.SetLevel(core.Acked) }), []core.Level{core.Acked}},
		"async by valve":    {level(core.Synced), policy(func(x *core.Exchange) { x.SetLevel(core.Async) }), []core.Level{core.Async}},
		"filtered":          {level(core.Synced), policy(func(x *core.Exchange) { x.SkipReplication() }), nil},
		"not distributable": {func(o *core.ContextOptions) { o.Distributable = false }, nothing, nil},
	} {
		table := newMemory()
		w := do(shop(t, table, change, tc.edit, tc.valve), "GET", "h", "/shop/")
		commits, _, held := table.state()
		if w.Code != 200 || !slices.Equal(commits, tc.want) || held != 0 {
			t.Errorf("%s: status %d, commits %v, want %v; %d handles held", name, w.Code, commits, tc.want, held)
		}
	}
}

func TestFailedReplicationIs503(t *testing.T) {
	table := newMemory()
	table.setFail(errReplication)
	var hook error
	e := shop(t, table, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App", "1")
		w.Header().Set("Content-Type", "text/html")
		touch(w, r)
		_, hook = w.Write(make([]byte, 10_000)) // overflows the buffer
		w.Header().Set("X-App", "2")            // it does not know yet
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(200)
	}, func(o *core.ContextOptions) { o.Level = core.Synced })
	w := do(e, "GET", "h", "/shop/")
	if w.Code != 503 || w.Header().Get("Retry-After") == "" || w.Header().Get("Set-Cookie") != "" || w.Header().Get("X-App") != "" {
		t.Errorf("%d %v", w.Code, w.Header())
	}
	if !strings.HasPrefix(w.Body.String(), "503 Service Unavailable: ") || !errors.Is(hook, errReplication) {
		t.Errorf("body %q, error of Write %v", w.Body, hook)
	}
	// The change is live here, so it must not be forgotten.
	if commits, _, held := table.state(); !slices.Equal(commits, []core.Level{core.Async}) || held != 0 {
		t.Errorf("commits %v, held %d", commits, held)
	}
}

func TestRenewAndInvalidate(t *testing.T) {
	table := newMemory()
	id := cookieOf(t, do(shop(t, table, touch, nil), "GET", "h", "/shop/")).Value
	e := shop(t, table, func(w http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Renew(); err != nil {
			t.Error(err)
		}
		io.WriteString(w, s.ID())
	}, nil)
	w := do(e, "GET", "h", "/shop/", "Cookie", "JSESSIONID="+id)
	renewed := cookieOf(t, w).Value
	if renewed == id || renewed != w.Body.String() {
		t.Errorf("renewed %s to %s, application sees %s", id, renewed, w.Body)
	}
	var first, second session.Session
	e = shop(t, table, func(w http.ResponseWriter, r *http.Request) {
		first, _ = session.From(r)
		if err := first.Invalidate(); err != nil {
			t.Error(err)
		}
		if s, err := session.Existing(r); s != nil || err != nil {
			t.Errorf("after Invalidate there is %v, %v", s, err)
		}
		second, _ = session.From(r)
		if err := first.Set("a", 1); !errors.Is(err, session.ErrInvalid) {
			t.Errorf("the ended session takes changes: %v", err)
		}
		if err := second.Set("a", 1); err != nil {
			t.Error(err)
		}
		io.WriteString(w, second.ID())
	}, nil)
	w = do(e, "GET", "h", "/shop/", "Cookie", "JSESSIONID="+renewed)
	if c := cookieOf(t, w).Value; c == renewed || c != w.Body.String() {
		t.Errorf("after invalidating %s the cookie is %s, the application sees %s", renewed, c, w.Body)
	}
	if commits, _, held := table.state(); held != 0 || len(commits) < 3 {
		t.Errorf("held %d, commits %v", held, commits)
	}
}

func TestNoSessionAfterCommit(t *testing.T) {
	e := shop(t, newMemory(), func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		if _, err := session.From(r); !errors.Is(err, session.ErrCommitted) {
			t.Errorf("after Flush: %v", err)
		}
	}, nil)
	do(e, "GET", "h", "/shop/")
	none := newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := session.From(r); !errors.Is(err, session.ErrNone) {
			t.Errorf("without a table: %v", err)
		}
	})}}}}})
	do(none, "GET", "h", "/")
}

// TestOneSessionForAllGoroutines: parallel first uses of one request make one.
func TestOneSessionForAllGoroutines(t *testing.T) {
	table := newMemory()
	e := shop(t, table, func(w http.ResponseWriter, r *http.Request) {
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				if _, err := session.From(r); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}, nil)
	do(e, "GET", "h", "/shop/")
	if len(table.sessions) != 1 {
		t.Errorf("%d sessions", len(table.sessions))
	}
	if _, _, held := table.state(); held != 0 {
		t.Errorf("%d handles held", held)
	}
}
