package core_test

import (
	"net/http"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/longhouse-go/longhouse/core"
)

// A draining engine refuses what might begin a session before the application
// has seen it, unless it could be repeated; known users are served, and their
// changes wait for level sync.
func TestDraining(t *testing.T) {
	table := newMemory()
	var draining atomic.Bool
	ran := 0
	e := newEngine(t, core.EngineOptions{Name: "e", Route: "n1", Draining: draining.Load,
		Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
			{Path: "/shop", Sessions: table, Distributable: true, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { ran++; touch(w, r) })},
			{Path: "/plain", Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { ran++ })},
		}}}})
	id := cookieOf(t, do(e, "POST", "h", "/shop/")).Value
	draining.Store(true)
	ran = 0
	if w := do(e, "POST", "h", "/shop/"); w.Code != 503 || w.Header().Get(core.DrainingHeader) != core.DrainingRefused || w.Header().Get("Retry-After") == "" || ran != 0 {
		t.Errorf("a POST of a stranger: %d %v, the application ran %d times", w.Code, w.Header(), ran)
	}
	if w := do(e, "POST", "h", "/plain/"); w.Code != 200 || ran != 1 {
		t.Errorf("a POST to an application without sessions: %d", w.Code)
	}
	if w := do(e, "GET", "h", "/shop/"); ran != 2 || w.Header().Get(core.DrainingHeader) != "" {
		t.Errorf("a GET of a stranger: %d %v", w.Code, w.Header())
	}
	if w := do(e, "POST", "h", "/shop/", "Cookie", "JSESSIONID="+id); w.Code != 200 || ran != 3 {
		t.Errorf("a POST of a known user: %d", w.Code)
	}
	if commits, _, _ := table.state(); !slices.Contains(commits, core.Synced) {
		t.Errorf("commits at %v", commits)
	}
}
