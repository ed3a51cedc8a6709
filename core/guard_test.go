package core_test

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// guard refuses sessions in its list and notes what it is told.
type guard struct {
	refuse []string
	told   []string
}

func (g *guard) Admit(_ *core.Exchange, h core.Handle) {
	what := "found"
	if h.IsNew() {
		what = "made"
	}
	g.told = append(g.told, what)
	_ = h.Set(core.ReservedAttribute+"guard", "secret")
	if slices.Contains(g.refuse, h.Key().ID) {
		_ = h.Invalidate()
	}
}

func (g *guard) Invalidated(*core.Exchange, core.Handle) { g.told = append(g.told, "invalidated") }

type guardKey struct{}

// A valve is told of the sessions of a request before the application gets them,
// may end them, and keeps attributes that the application does not see.
func TestSessionGuard(t *testing.T) {
	g := &guard{}
	tab := table.New(table.Config{RenewGrace: -1}, channel.Settings{})
	var app http.HandlerFunc
	valve := core.ValveFunc(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			x := core.FromContext(r.Context())
			x.Guard(g)
			x.SetValue(guardKey{}, "value")
			next.ServeHTTP(w, r)
		})
	})
	e := newEngine(t, core.EngineOptions{Shared: tab, Valves: []core.Valve{valve}, Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { app(w, r) }), Sessions: tab, MaxInactive: time.Hour,
	}}}}})
	if e.Shared() != core.Sessions(tab) || e.Hosts()[0].Contexts()[0].Sessions() != core.Sessions(tab) {
		t.Error("the tables are others")
	}
	cookie := ""
	do := func(want string, h http.HandlerFunc) {
		t.Helper()
		g.told, app = nil, h
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		if cookie != "" {
			r.AddCookie(&http.Cookie{Name: core.DefaultCookie, Value: cookie})
		}
		w := httptest.NewRecorder()
		e.ServeHTTP(w, r)
		for _, c := range w.Result().Cookies() {
			cookie = c.Value
		}
		if got := strings.Join(g.told, " "); got != want {
			t.Errorf("the guard was told %q, want %q", got, want)
		}
	}
	do("", func(_ http.ResponseWriter, r *http.Request) {
		if s, err := session.Existing(r); s != nil || err != nil {
			t.Errorf("got %v %v", s, err)
		}
		if r.Context().Value(guardKey{}) != "value" {
			t.Error("the context has no value")
		}
	})
	do("made", func(_ http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err != nil {
			t.Fatal(err)
		}
		const hidden = core.ReservedAttribute + "guard"
		for what, err := range map[string]error{
			"set": s.Set(hidden, 1), "delete": s.Delete(hidden), "count": session.Counter(hidden).Add(s, 1),
			"update": s.Update(hidden, func([]byte) ([]byte, error) { return nil, nil }),
		} {
			if err == nil {
				t.Errorf("%s: a reserved name was taken", what)
			}
		}
		if ok, err := s.Get(hidden, new(any)); ok || err != nil {
			t.Errorf("get: %v %v", ok, err)
		}
		if err := s.Set("mine", 1); err != nil || !slices.Equal(s.Names(), []string{"mine"}) {
			t.Errorf("names %q, %v", s.Names(), err)
		}
	})
	first := cookie
	do("found invalidated made", func(_ http.ResponseWriter, r *http.Request) {
		s, err := session.Existing(r)
		if err != nil || s == nil || s.Invalidate() != nil {
			t.Fatal(err)
		}
		if _, err := session.From(r); err != nil {
			t.Error(err)
		}
	})
	if cookie == first || tab.Len() != 1 {
		t.Errorf("%d sessions", tab.Len())
	}
	g.refuse = []string{cookie}
	do("found made", func(_ http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err != nil || !s.IsNew() {
			t.Errorf("the refused session was given out: %v", err)
		}
	})
	if tab.Len() != 1 {
		t.Errorf("%d sessions", tab.Len())
	}
}

func TestCookieValues(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header["Cookie"] = []string{`a=1; sso="2"; b=3;sso=4`, "xsso=5; sso=; sso=6"}
	if got := core.CookieValues(r, "sso", 10); !slices.Equal(got, []string{"2", "4", "", "6"}) {
		t.Errorf("got %q", got)
	}
	if got := core.CookieValues(r, "sso", 2); !slices.Equal(got, []string{"2", "4"}) {
		t.Errorf("got %q", got)
	}
}
