package routebinder

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// node is an engine of that route on the given table.
func node(t *testing.T, route string, sessions core.Sessions, m *channel.Metrics) http.Handler {
	t.Helper()
	e, err := core.NewEngine(core.EngineOptions{
		Route: route, Valves: []core.Valve{New(Config{}, channel.Settings{Metrics: m})},
		Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Path: "/shop", Sessions: sessions,
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/pic.gif" {
					w.WriteHeader(404)
					return
				}
				s, err := session.From(r)
				if err != nil {
					t.Error(err)
					return
				}
				io.WriteString(w, s.ID())
			})}}}},
	}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func get(h http.Handler, path, id string) *http.Response {
	r := httptest.NewRequest("GET", path, nil)
	if id != "" {
		r.Header.Set("Cookie", "JSESSIONID="+id)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func body(t *testing.T, r *http.Response) string {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestFailover(t *testing.T) {
	tab := table.New(table.Config{}, channel.Settings{}) // as if both nodes had the session
	defer tab.Stop(t.Context())
	m1, m2 := channel.NewMetrics(), channel.NewMetrics()
	n1, n2 := node(t, "n1", tab, m1), node(t, "n2", tab, m2)
	first := body(t, get(n1, "/shop/", ""))
	base := strings.TrimSuffix(first, ".n1")
	if base == first {
		t.Fatalf("id %q has not the route of its node", first)
	}

	// A picture that is missing rebinds as well.
	for _, path := range []string{"/shop/", "/shop/pic.gif"} {
		r := get(n2, path, first)
		if c := r.Cookies(); len(c) != 1 || c[0].Value != base+".n2" || c[0].Path != "/shop" || !c[0].HttpOnly {
			t.Errorf("%s: cookies %v", path, c)
		}
		if path == "/shop/" && body(t, r) != base+".n2" {
			t.Errorf("%s: the application does not see the new route", path)
		}
	}
	if got := m2.Counter("routebinder_rebound_total", "").Value(); got != 2 {
		t.Errorf("rebound %d times", got)
	}
	if r := get(n2, "/shop/", base+".n2"); len(r.Cookies()) != 0 {
		t.Errorf("own route: cookies %v", r.Cookies())
	}
	// The old cookie at the old node keeps its session.
	if r := get(n1, "/shop/", first); len(r.Cookies()) != 0 || body(t, r) != first {
		t.Error("the old cookie at the old node lost the session")
	}
	// A session that nobody knows is not rebound, and its id not adopted.
	dead := strings.Repeat("0", 32)
	if r := get(n2, "/shop/pic.gif", dead+".n1"); len(r.Cookies()) != 0 {
		t.Errorf("unknown session: cookies %v", r.Cookies())
	}
	if r := get(n2, "/shop/", dead+".n1"); strings.HasPrefix(body(t, r), dead) {
		t.Error("the client's own id was adopted")
	}
	// By path parameter.
	if r := get(n2, "/shop/;jsessionid="+first, ""); body(t, r) != base+".n2" || len(r.Cookies()) != 1 {
		t.Errorf("by path: cookies %v", r.Cookies())
	}
}

type broken struct{ core.Sessions }

func (broken) Find(context.Context, session.Key) (core.Handle, error) {
	return nil, errors.New("manager is down")
}

func TestLookupFails(t *testing.T) {
	m := channel.NewMetrics()
	h := node(t, "n2", broken{}, m)
	if r := get(h, "/shop/pic.gif", strings.Repeat("0", 32)+".n1"); r.StatusCode != 404 {
		t.Errorf("status %d", r.StatusCode)
	}
	if got := m.Counter("routebinder_failed_total", "").Value(); got != 1 {
		t.Errorf("routebinder_failed_total %d", got)
	}
}

// BenchmarkOwnRoute is what every request pays.
func BenchmarkOwnRoute(b *testing.B) {
	v := New(Config{}, channel.Settings{})
	h := v.Wrap(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	var inner http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.ReportAllocs()
		for b.Loop() {
			h.ServeHTTP(w, r)
		}
	})
	e, err := core.NewEngine(core.EngineOptions{Route: "n1", Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: inner, Sessions: broken{}}}}}}, channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Cookie", "JSESSIONID="+strings.Repeat("0", 32)+".n1")
	e.ServeHTTP(httptest.NewRecorder(), r)
}
