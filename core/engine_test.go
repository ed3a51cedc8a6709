package core_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/attributes"
)

// echo answers what the application sees.
func echo(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s path=%s escaped=%s", name, r.URL.Path, r.URL.EscapedPath())
	})
}

func newEngine(t *testing.T, o core.EngineOptions) *core.Engine {
	t.Helper()
	e, err := core.NewEngine(o, channel.Settings{Metrics: channel.NewMetrics()})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// do sends a request with a raw request target straight into the handler.
func do(h http.Handler, method, host, target string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "http://"+host+target, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestRouting(t *testing.T) {
	e := newEngine(t, core.EngineOptions{
		Name: "e", DefaultHost: "b.example",
		Hosts: []core.HostOptions{
			{Name: "A.example", Aliases: []string{"www.a.example", "::1"}, Contexts: []core.ContextOptions{
				{Path: "", Handler: echo("a-root")},
				{Path: "/shop", Handler: echo("a-shop")},
				{Path: "/shop/admin", Handler: echo("a-admin")},
				{Path: "/grün", Handler: echo("a-green")},
			}},
			{Name: "b.example", Contexts: []core.ContextOptions{{Path: "/only", Handler: echo("b-only")}}},
		},
	})
	for _, tc := range []struct {
		host, target string
		status       int
		want         string
	}{
		{"a.example", "/", 200, "a-root path=/ escaped=/"},
		{"a.EXAMPLE:8080", "/x", 200, "a-root path=/x escaped=/x"},
		{"a.example.", "/x", 200, "a-root path=/x escaped=/x"},
		{"WWW.a.example", "/x", 200, "a-root path=/x escaped=/x"},
		{"[::1]:8080", "/x", 200, "a-root path=/x escaped=/x"},
		{"a.example", "/shop/", 200, "a-shop path=/ escaped=/"},
		{"a.example", "/shop/cart/1", 200, "a-shop path=/cart/1 escaped=/cart/1"},
		{"a.example", "/shopping", 200, "a-root path=/shopping escaped=/shopping"},
		{"a.example", "/shop/admin/x/", 200, "a-admin path=/x/ escaped=/x/"},
		{"a.example", "/shop/administrator", 200, "a-shop path=/administrator escaped=/administrator"},
		{"a.example", "/gr%C3%BCn/x", 200, "a-green path=/x escaped=/x"},
		{"unknown.example", "/only/x", 200, "b-only path=/x escaped=/x"},
		{"b.example", "/", 404, "404 Not Found: no application is deployed here\n"},

		// Cleaning.
		{"a.example", "//shop//x", 200, "a-shop path=/x escaped=/x"},
		{"a.example", "/shop/./x", 200, "a-shop path=/x escaped=/x"},
		{"a.example", "/shop/a/../x", 200, "a-shop path=/x escaped=/x"},
		{"a.example", "/shop/../x", 200, "a-root path=/x escaped=/x"},
		{"a.example", "/shop/a/..", 200, "a-shop path=/ escaped=/"},
		{"a.example", "/shop/%2e%2e/shop/x", 200, "a-shop path=/x escaped=/x"},
		{"a.example", "/..", 400, ""},
		{"a.example", "/shop/../../x", 400, ""},
		{"a.example", "/shop/%2e%2e/%2e%2e/x", 400, ""},
		{"a.example", "/shop/..;a=b/x", 400, ""},
		{"a.example", "/shop/..%2fadmin", 400, ""},
		{"a.example", "/shop/a%2f..%2f..%2fadmin", 400, ""},
		{"a.example", "/shop/..%5cadmin", 400, ""},
		{"a.example", "/shop/a%00b", 400, ""},
		{"a.example", "/shop/.hidden", 200, "a-shop path=/.hidden escaped=/.hidden"},

		// An encoded slash is a part of its segment.
		{"a.example", "/shop%2fadmin/x", 200, "a-root path=/shop/admin/x escaped=/shop%2fadmin/x"},
		{"a.example", "/shop/a%2fb", 200, "a-shop path=/a/b escaped=/a%2fb"},

		// The id's parameter goes, others stay.
		{"a.example", "/shop/x;jsessionid=00112233445566778899AABBCCDDEEFF.n1", 200, "a-shop path=/x escaped=/x"},
		{"a.example", "/shop/x;JSessionID=00112233445566778899AABBCCDDEEFF;v=2", 200, "a-shop path=/x;v=2 escaped=/x;v=2"},
		{"a.example", "/shop;jsessionid=zzz/x", 200, "a-shop path=/x escaped=/x"},
		{"a.example", "/shop;v=1/x;jsessionid=1", 200, "a-shop path=/x escaped=/x"},
		{"a.example", "/shop/;jsessionid=1", 200, "a-shop path=/ escaped=/"},
		{"a.example", "/;jsessionid=1", 200, "a-root path=/ escaped=/"},
		{"a.example", "/shop/a/;v=1;jsessionid=2", 200, "a-shop path=/a/;v=1 escaped=/a/;v=1"},
		{"a.example", "/shop/a/;jsessionid=2", 200, "a-shop path=/a/ escaped=/a/"},
	} {
		w := do(e, "GET", tc.host, tc.target)
		if w.Code != tc.status || tc.want != "" && w.Body.String() != tc.want {
			t.Errorf("%s %s: %d %q, want %d %q", tc.host, tc.target, w.Code, w.Body, tc.status, tc.want)
		}
	}
}

func TestContextRootRedirect(t *testing.T) {
	e := newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
		{Path: "/shop", Handler: echo("shop"), Sessions: newMemory()},
	}}}})
	const id = "00112233445566778899AABBCCDDEEFF.n1"
	for _, tc := range []struct{ method, target, location string }{
		{"GET", "/shop", "/shop/"},
		{"HEAD", "/shop?a=b", "/shop/?a=b"},
		{"GET", "/shop;jsessionid=" + id + "?a=b", "/shop/;jsessionid=" + id + "?a=b"},
		{"GET", "/shop;jsessionid=%0d%0aX:y", "/shop/"},
		{"GET", "//shop", "/shop/"},
		{"POST", "/shop", ""},
		{"GET", "/shop/", ""},
	} {
		w := do(e, tc.method, "h", tc.target)
		if got := w.Header().Get("Location"); got != tc.location || (w.Code == 302) != (tc.location != "") {
			t.Errorf("%s %s: %d %q, want %q", tc.method, tc.target, w.Code, got, tc.location)
		}
	}
}

func TestEngineRefusesBadOptions(t *testing.T) {
	ok := echo("x")
	for name, o := range map[string]core.EngineOptions{
		"route":        {Route: "a;b"},
		"default host": {DefaultHost: "x", Hosts: []core.HostOptions{{Name: "h"}}},
		"two names":    {Hosts: []core.HostOptions{{Name: "h"}, {Name: "g", Aliases: []string{"H"}}}},
		"no name":      {Hosts: []core.HostOptions{{}}},
		"two contexts": {Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Path: "/", Handler: ok}, {Path: "", Handler: ok}}}}},
		"no slash":     {Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Path: "shop", Handler: ok}}}}},
		"dots":         {Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Path: "/a/../b", Handler: ok}}}}},
		"no handler":   {Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Path: "/a"}}}}},
		"cookie":       {Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: ok, Tracking: core.Tracking{Cookie: "a b"}}}}}},
		"cookie path":  {Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: ok, Tracking: core.Tracking{CookiePath: "/\r\nX: y"}}}}}},
		"nil valve":    {Valves: []core.Valve{nil}},
		"nil wrap":     {Valves: []core.Valve{core.ValveFunc(func(http.Handler) http.Handler { return nil })}},
	} {
		if _, err := core.NewEngine(o, channel.Settings{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// spy notes its life and marks requests.
type spy struct {
	name    string
	trace   *[]string
	mu      *sync.Mutex
	failing bool
}

func (s spy) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*s.trace = append(*s.trace, what+" "+s.name)
}

func (s spy) Start(context.Context) error {
	s.note("start")
	if s.failing {
		return errors.New("broken")
	}
	return nil
}

func (s spy) Stop(context.Context) error { s.note("stop"); return nil }

func (s spy) Wrap(next http.Handler) http.Handler {
	s.note("wrap")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.note("in")
		next.ServeHTTP(w, r)
		s.note("out")
	})
}

func TestPipelineOrderAndLife(t *testing.T) {
	var trace []string
	var mu sync.Mutex
	v := func(name string) core.Valve { return spy{name: name, trace: &trace, mu: &mu} }
	e := newEngine(t, core.EngineOptions{
		Valves: []core.Valve{v("e1"), v("e2")},
		Hosts: []core.HostOptions{{Name: "h", Valves: []core.Valve{v("h")}, Contexts: []core.ContextOptions{
			{Handler: echo("app"), Valves: []core.Valve{v("c")}},
		}}},
	})
	trace = nil
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	do(e, "GET", "h", "/")
	do(e, "GET", "h", "/")
	for range 2 {
		if err := e.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	round := []string{"in e1", "in e2", "in h", "in c", "out c", "out h", "out e2", "out e1"}
	want := slices.Concat([]string{"start e1", "start e2", "start h", "start c"}, round, round,
		[]string{"stop c", "stop h", "stop e2", "stop e1"})
	if !slices.Equal(trace, want) {
		t.Errorf("trace %v\nwant %v", trace, want)
	}
	if w := do(e, "GET", "h", "/"); w.Code != http.StatusServiceUnavailable {
		t.Errorf("after Stop: status %d, want 503", w.Code)
	}
	if err := e.Start(t.Context()); !errors.Is(err, core.ErrStopped) {
		t.Errorf("Start after Stop: %v", err)
	}
}

func TestFailedStartStopsWhatWasStarted(t *testing.T) {
	var trace []string
	var mu sync.Mutex
	e := newEngine(t, core.EngineOptions{
		Valves: []core.Valve{spy{name: "a", trace: &trace, mu: &mu}},
		Hosts: []core.HostOptions{{Name: "h", Valves: []core.Valve{
			spy{name: "b", trace: &trace, mu: &mu}, spy{name: "bad", trace: &trace, mu: &mu, failing: true}, spy{name: "never", trace: &trace, mu: &mu},
		}}},
	})
	trace = nil
	if err := e.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("Start: %v", err)
	}
	if want := []string{"start a", "start b", "start bad", "stop b", "stop a"}; !slices.Equal(trace, want) {
		t.Errorf("trace %v, want %v", trace, want)
	}
}

// TestSwitchContext replaces a context while requests run: the old one ends its
// own, the new one gets all others, and the old one's valves stop last.
func TestSwitchContext(t *testing.T) {
	inside, proceed := make(chan struct{}), make(chan struct{})
	stopped := make(chan string, 2)
	old := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(inside)
		<-proceed
		io.WriteString(w, "old")
	})
	e := newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
		{Path: "/app", Handler: old, Valves: []core.Valve{stopSpy{"old", stopped}}},
	}}}})
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	result := make(chan string)
	go func() { result <- do(e, "GET", "h", "/app/").Body.String() }()
	<-inside
	c, err := e.SetContext(t.Context(), "", core.ContextOptions{Path: "/app", Handler: echo("new"), Valves: []core.Valve{stopSpy{"new", stopped}}})
	if err != nil {
		t.Fatal(err)
	}
	if got := do(e, "GET", "h", "/app/").Body.String(); !strings.HasPrefix(got, "new") {
		t.Errorf("after the switch: %q", got)
	}
	select {
	case s := <-stopped:
		t.Errorf("valve of %s stopped while a request was inside", s)
	default:
	}
	close(proceed)
	if got := <-result; got != "old" {
		t.Errorf("request in the old context: %q", got)
	}
	if s := <-stopped; s != "old" {
		t.Errorf("valve of %s stopped, want that of old", s)
	}
	if c.Running() != 0 {
		t.Errorf("%d requests running", c.Running())
	}
	if err := e.RemoveContext(t.Context(), "h", "/app"); err != nil {
		t.Fatal(err)
	}
	if w := do(e, "GET", "h", "/app/"); w.Code != 404 {
		t.Errorf("after removing: %d", w.Code)
	}
	if err := e.RemoveContext(t.Context(), "h", "/app"); !errors.Is(err, core.ErrNoContext) {
		t.Errorf("removing twice: %v", err)
	}
	if _, err := e.SetContext(t.Context(), "nowhere", core.ContextOptions{Handler: echo("x")}); !errors.Is(err, core.ErrNoContext) {
		t.Errorf("unknown host: %v", err)
	}
	if err := e.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

type stopSpy struct {
	name    string
	stopped chan string
}

func (s stopSpy) Wrap(next http.Handler) http.Handler { return next }
func (s stopSpy) Stop(context.Context) error          { s.stopped <- s.name; return nil }

// TestSwitchUnderLoad replaces a context again and again; every request finds
// one.
func TestSwitchUnderLoad(t *testing.T) {
	e := newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Path: "/app", Handler: echo("0")}}}}})
	var wg sync.WaitGroup
	quit := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
				}
				if w := do(e, "GET", "h", "/app/x"); w.Code != 200 {
					t.Errorf("status %d: %s", w.Code, w.Body)
					return
				}
			}
		})
	}
	for i := range 300 {
		if _, err := e.SetContext(t.Context(), "h", core.ContextOptions{Path: "/app", Handler: echo(fmt.Sprint(i))}); err != nil {
			t.Error(err)
		}
	}
	close(quit)
	wg.Wait()
}

// TestSupersede: a whole engine is replaced under load, as at a reload; the
// requests that still hold the old one are served by the new one.
func TestSupersede(t *testing.T) {
	build := func(name string) *core.Engine {
		return newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: echo(name)}}}}})
	}
	var current atomic.Pointer[core.Engine]
	current.Store(build("0"))
	var wg sync.WaitGroup
	quit := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
				}
				e := current.Load()
				runtime.Gosched() // here it is replaced and stopped
				if w := do(e, "GET", "h", "/x"); w.Code != 200 {
					t.Errorf("status %d: %s", w.Code, w.Body)
					return
				}
			}
		})
	}
	for i := range 200 {
		next := build(fmt.Sprint(i + 1))
		old := current.Swap(next)
		old.Supersede(next)
		if err := old.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	close(quit)
	wg.Wait()
}

// A new version of an application finds the context's attributes, and what the
// old version watched ends with its last request.
func TestAttributesOutliveTheVersion(t *testing.T) {
	e := newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{
		Path: "/shop", Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			a := core.FromContext(r.Context()).Context().Attributes()
			a.Watch(func(c attributes.Change) { t.Errorf("the old version heard of %v", c) })
		}),
	}}}}})
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/shop/", nil))
	first := e.Hosts()[0].Contexts()[0].Attributes()
	second, err := e.SetContext(t.Context(), "", core.ContextOptions{Path: "/shop", Handler: http.NotFoundHandler()})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Stop(t.Context()); err != nil { // waits for the end of the old version
		t.Fatal(err)
	}
	heard := 0
	defer second.Attributes().Watch(func(attributes.Change) { heard++ })()
	if err := first.Set(t.Context(), "motd", "hello"); err != nil {
		t.Fatal(err)
	}
	if text, ok, err := attributes.Attr[string]("motd").Get(second.Attributes()); text != "hello" || !ok || err != nil {
		t.Errorf("got %q %v %v", text, ok, err)
	}
}
