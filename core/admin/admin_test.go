package admin

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

var rewrite = flag.Bool("rewrite", false, "write the answers into the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func settings(t *testing.T) channel.Settings {
	t.Helper()
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	return channel.Settings{Name: "admin", Net: n, Metrics: channel.NewMetrics()}
}

// sources are those of a node in a cluster of two.
func sources() Sources {
	when := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	member := func(last byte, alive time.Duration) channel.Member {
		m := channel.Member{Host: netip.MustParseAddr("10.0.0.1"), Port: 4000 + int(last), SecurePort: -1, UDPPort: -1, Domain: "d", Alive: alive}
		m.ID[15] = last
		return m
	}
	return Sources{
		Ready: func() (bool, []string) { return true, nil },
		Members: func() channel.View {
			return channel.NewView(3, member(1, 0), []channel.Member{member(2, 90*time.Second)})
		},
		Stack: func() any { return map[string]any{"layers": []string{"dispatch", "failuredetector"}} },
		Plugins: func() []core.PluginStatus {
			return []core.PluginStatus{{Kind: "manager", Name: "delta", Instance: "default", Mode: core.Process, State: "ready", PID: 42, Generation: 2,
				Started: when, LastError: "killed", Calls: 7, Events: 8, InFlight: 1}}
		},
		Sessions: func(limit int) any {
			list := []session.Summary{{Context: "localhost/", ID: "abcdef…", Attributes: 2, Bytes: 100, Created: when, LastAccess: when}}
			return map[string]any{"limit": limit, "sessions": list[:min(limit, 1)]}
		},
		Config: func() []byte {
			return []byte("engine:\n  route: node1\n  valves:\n    - use: x\n      secret: \"***\"\n")
		},
		Metrics: func() []channel.Sample {
			return []channel.Sample{
				{Name: "dispatch_dropped_total", Help: "Dropped.", Labels: []string{"reason", "full"}, Counter: true, Value: 3},
				{Name: "sessions", Help: "Live.", Value: 1.5},
			}
		},
		Reload: func(context.Context) error { return nil },
	}
}

// do sends a request to the handler.
func do(t *testing.T, s *Server, method, path string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:8077"+path, nil)
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			r.Host = header[i+1]
			continue
		}
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, r)
	return w
}

func mustNew(t *testing.T, c Config, src Sources) *Server {
	t.Helper()
	s, err := New(c, src, settings(t))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The answers are a contract: the golden files are its text.
func TestAnswers(t *testing.T) {
	s := mustNew(t, Config{}, sources())
	for name, path := range map[string]string{"members.json": "/v1/members", "stack.json": "/v1/stack", "plugins.json": "/v1/plugins",
		"sessions.json": "/v1/sessions?limit=5", "config.yaml": "/v1/config", "config.json": "/v1/config?format=json", "healthz.txt": "/healthz",
		"readyz.txt": "/readyz", "index.txt": "/"} {
		w := do(t, s, "GET", path)
		if w.Code != http.StatusOK || w.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %d, %v", path, w.Code, w.Header())
		}
		if strings.HasSuffix(name, ".json") && w.Header().Get("Content-Type") != "application/json; charset=utf-8" {
			t.Errorf("%s: %s", path, w.Header().Get("Content-Type"))
		}
		file := filepath.Join("testdata", name)
		if *rewrite {
			if err := os.WriteFile(file, w.Body.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), w.Body.String()); d != "" {
			t.Errorf("%s: %s", path, d)
		}
	}
	if w := do(t, s, "GET", "/v1/config", "Accept", "application/json"); !strings.HasPrefix(w.Body.String(), "{") {
		t.Errorf("config: %s", w.Body)
	}
}

func TestNotReady(t *testing.T) {
	src := sources()
	src.Ready = func() (bool, []string) { return false, []string{"manager default: waiting for sessions", "two\nlines"} }
	w := do(t, mustNew(t, Config{}, src), "GET", "/readyz")
	if w.Code != http.StatusServiceUnavailable || w.Body.String() != "not ready\nmanager default: waiting for sessions\ntwo lines\n" {
		t.Errorf("%d %q", w.Code, w.Body)
	}
}

func TestLimits(t *testing.T) {
	s := mustNew(t, Config{}, sources())
	for query, want := range map[string]int{"": 200, "?limit=0": 200, "?limit=10000": 200, "?limit=10001": 400, "?limit=-1": 400, "?limit=many": 400} {
		if w := do(t, s, "GET", "/v1/sessions"+query); w.Code != want {
			t.Errorf("%q: %d", query, w.Code)
		}
	}
	if w := do(t, s, "GET", "/v1/sessions"); !strings.Contains(w.Body.String(), `"limit": 100`) {
		t.Errorf("default limit: %s", w.Body)
	}
}

func TestReload(t *testing.T) {
	src := sources()
	s := mustNew(t, Config{}, src)
	if w := do(t, s, "POST", "/v1/reload"); w.Code != 200 || w.Body.String() != "{\n  \"reloaded\": true\n}\n" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if w := do(t, s, "GET", "/v1/reload"); w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: %d", w.Code)
	}
	src.Reload = func(context.Context) error { return errors.New("server.yaml:3: broken") }
	if w := do(t, mustNew(t, Config{}, src), "POST", "/v1/reload"); w.Code != 422 || !strings.Contains(w.Body.String(), "server.yaml:3: broken") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func TestNoSources(t *testing.T) {
	s := mustNew(t, Config{}, Sources{})
	for _, path := range []string{"/v1/members", "/v1/stack", "/v1/plugins", "/v1/sessions", "/v1/attributes", "/v1/config"} {
		if w := do(t, s, "GET", path); w.Code != http.StatusNotImplemented {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
	if w := do(t, s, "POST", "/v1/reload"); w.Code != http.StatusNotImplemented {
		t.Errorf("reload: %d", w.Code)
	}
	if w := do(t, s, "GET", "/readyz"); w.Code != http.StatusServiceUnavailable {
		t.Errorf("readyz: %d", w.Code)
	}
	for _, path := range []string{"/metrics", "/healthz"} {
		if w := do(t, s, "GET", path); w.Code != 200 {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
	empty := mustNew(t, Config{}, Sources{Members: func() channel.View { return channel.View{} }, Plugins: func() []core.PluginStatus { return nil }})
	for _, path := range []string{"/v1/members", "/v1/plugins"} {
		if w := do(t, empty, "GET", path); w.Body.String() != "[]\n" {
			t.Errorf("%s: %s", path, w.Body)
		}
	}
}

// No web page reaches the interface through a browser.
func TestForeignRequests(t *testing.T) {
	s := mustNew(t, Config{Address: "admin.internal:8077"}, sources())
	tests := []struct {
		name   string
		header []string
		want   int
	}{
		{"address", []string{"Host", "127.0.0.1:8077"}, 200},
		{"address without port", []string{"Host", "10.1.2.3"}, 200},
		{"IPv6", []string{"Host", "[::1]:8077"}, 200},
		{"localhost", []string{"Host", "LocalHost:9"}, 200},
		{"configured name", []string{"Host", "admin.internal:8077"}, 200},
		{"rebound name", []string{"Host", "attacker.example:8077"}, 403},
		{"name that begins like ours", []string{"Host", "localhost.attacker.example"}, 403},
		{"address as a part of a name", []string{"Host", "127.0.0.1.attacker.example"}, 403},
		{"no host", []string{"Host", ""}, 403},
		{"own origin", []string{"Origin", "http://127.0.0.1:8077"}, 200},
		{"other origin", []string{"Origin", "http://attacker.example"}, 403},
		{"other port", []string{"Origin", "http://127.0.0.1:9999"}, 403},
		{"null origin", []string{"Origin", "null"}, 403},
		{"typed by the user", []string{"Sec-Fetch-Site", "none"}, 200},
		{"same origin", []string{"Sec-Fetch-Site", "same-origin"}, 200},
		{"cross-site image", []string{"Sec-Fetch-Site", "cross-site"}, 403},
		{"sibling site", []string{"Sec-Fetch-Site", "same-site"}, 403},
	}
	refused := int64(0)
	for _, tt := range tests {
		if w := do(t, s, "GET", "/v1/members", tt.header...); w.Code != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, w.Code, tt.want)
		}
		if tt.want == 403 {
			refused++
		}
	}
	if got := s.refusedHost.Value() + s.refusedOrigin.Value(); got != refused {
		t.Errorf("%d counted, %d refused", got, refused)
	}
}

func TestTooManyAtOnce(t *testing.T) {
	src := sources()
	inside, leave := make(chan struct{}), make(chan struct{})
	src.Stack = func() any { inside <- struct{}{}; <-leave; return nil }
	s := mustNew(t, Config{}, src)
	done := make(chan struct{})
	for range maxConcurrent {
		go func() { do(t, s, "GET", "/v1/stack"); done <- struct{}{} }()
		<-inside
	}
	if w := do(t, s, "GET", "/healthz"); w.Code != http.StatusServiceUnavailable || s.refusedBusy.Value() != 1 {
		t.Errorf("%d, %d counted", w.Code, s.refusedBusy.Value())
	}
	close(leave)
	for range maxConcurrent {
		<-done
	}
	if w := do(t, s, "GET", "/healthz"); w.Code != 200 {
		t.Errorf("afterwards: %d", w.Code)
	}
}

func TestMetrics(t *testing.T) {
	src := sources()
	good := src.Metrics
	src.Metrics = func() []channel.Sample {
		return append(good(),
			channel.Sample{Name: "bad name", Value: 1},
			channel.Sample{Name: "odd", Labels: []string{"a"}},
			channel.Sample{Name: "reserved", Labels: []string{"__name__", "x"}},
			channel.Sample{Name: "twice", Labels: []string{"a", "1", "a", "2"}},
			channel.Sample{Name: "sessions", Help: "Another help.", Labels: []string{"b", "2", "a", "1"}, Value: 2},
			channel.Sample{Name: "sessions", Labels: []string{"a", "1", "b", "2"}, Value: 3},
			channel.Sample{Name: "bytes", Labels: []string{"v", "\xff\"\n"}, Value: 4},
			channel.Sample{Name: "wait_seconds", Counter: true, Value: 6, Histogram: &channel.HistogramSample{Bounds: []float64{0.1, 1}, Counts: []uint64{1, 2, 3}, Sum: 4.5}},
			channel.Sample{Name: "wait_seconds", Labels: []string{"a", "few"}, Histogram: &channel.HistogramSample{Bounds: []float64{0.1, 1}, Counts: []uint64{1}}},
			channel.Sample{Name: "wait_seconds", Labels: []string{"a", "descending"}, Histogram: &channel.HistogramSample{Bounds: []float64{1, 0}, Counts: []uint64{1, 2, 3}}},
			channel.Sample{Name: "wait_seconds", Labels: []string{"a", "none"}, Value: 1},
		)
	}
	s := mustNew(t, Config{}, src)
	w := do(t, s, "GET", "/metrics")
	text := w.Body.String()
	if w.Code != 200 {
		t.Fatalf("%d %s", w.Code, text)
	}
	for _, want := range []string{"# TYPE longhouse_dispatch_dropped_total counter\nlonghouse_dispatch_dropped_total{reason=\"full\"} 3\n",
		"# HELP longhouse_sessions Live.\n# TYPE longhouse_sessions gauge\nlonghouse_sessions 1.5\nlonghouse_sessions{a=\"1\",b=\"2\"} 2\n",
		"# TYPE longhouse_wait_seconds histogram\nlonghouse_wait_seconds_bucket{le=\"0.1\"} 1\nlonghouse_wait_seconds_bucket{le=\"1\"} 3\nlonghouse_wait_seconds_bucket{le=\"+Inf\"} 6\n" +
			"longhouse_wait_seconds_sum 4.5\nlonghouse_wait_seconds_count 6\n",
		`longhouse_bytes{v="?\"\n"} 4`, "go_goroutines ", "process_start_time_seconds "} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if got := s.set.Metrics.Counter("admin_bad_samples_total", "").Value(); got != 8 {
		t.Errorf("%d bad samples counted", got)
	}
}

func TestProfiles(t *testing.T) {
	s := mustNew(t, Config{}, sources())
	for path, want := range map[string]int{"/debug/pprof/": 200, "/debug/pprof/heap": 200, "/debug/pprof/goroutine?debug=1": 200, "/debug/pprof/nothing": 404,
		"/debug/pprof/profile?seconds=0.01": 200, "/debug/pprof/trace?seconds=0.01": 200, "/debug/pprof/profile?seconds=1e9": 400,
		"/debug/pprof/profile?seconds=NaN": 400, "/debug/pprof/profile?seconds=-1": 400} {
		if w := do(t, s, "GET", path); w.Code != want || w.Body.Len() == 0 {
			t.Errorf("%s: %d, %d bytes", path, w.Code, w.Body.Len())
		}
	}
	// Importing the package must not publish profiles elsewhere.
	w := httptest.NewRecorder()
	http.DefaultServeMux.ServeHTTP(w, httptest.NewRequest("GET", "/debug/pprof/", nil))
	if w.Code != http.StatusNotFound {
		t.Errorf("http.DefaultServeMux serves profiles: %d", w.Code)
	}
}

func get(t *testing.T, addr, path string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestLife(t *testing.T) {
	ctx := t.Context()
	s := mustNew(t, Config{Address: "127.0.0.1:0"}, sources())
	if err := s.Stop(ctx); err != nil || s.Addr() != "" {
		t.Errorf("stop before start: %v, %q", err, s.Addr())
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if got := get(t, s.Addr(), "/healthz"); got != "ok\n" {
		t.Errorf("got %q", got)
	}
	if err := s.Start(ctx); err == nil {
		t.Error("a second start must fail")
	}
	for range 2 {
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
	}
	off := mustNew(t, Config{Address: Off}, sources())
	if err := off.Start(ctx); err != nil || off.Addr() != "" {
		t.Errorf("off: %v, %q", err, off.Addr())
	}
	if err := off.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// Two nodes with the default address get two ports; a written address is not
// exchanged for another.
func TestNextFree(t *testing.T) {
	ctx := t.Context()
	a, b := mustNew(t, Config{}, sources()), mustNew(t, Config{}, sources())
	for _, s := range []*Server{a, b} {
		if err := s.Start(ctx); err != nil {
			t.Fatal(err)
		}
		defer s.Stop(ctx) //nolint:errcheck // tested above
	}
	if a.Addr() == b.Addr() || get(t, b.Addr(), "/healthz") != "ok\n" {
		t.Errorf("%s and %s", a.Addr(), b.Addr())
	}
	fixed := mustNew(t, Config{Address: "localhost:" + a.Addr()[strings.LastIndexByte(a.Addr(), ':')+1:]}, sources())
	if err := fixed.Start(ctx); err == nil || !channel.IsAddrInUse(err) {
		t.Errorf("got %v", err)
		_ = fixed.Stop(ctx)
	}
}

// A request that takes long does not hold up the stop.
func TestStopEndsRequests(t *testing.T) {
	src := sources()
	inside := make(chan struct{})
	src.Reload = func(ctx context.Context) error { close(inside); <-ctx.Done(); return ctx.Err() }
	s := mustNew(t, Config{Address: "127.0.0.1:0"}, src)
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		if resp, err := client.Post("http://"+s.Addr()+"/v1/reload", "", nil); err == nil {
			resp.Body.Close()
		}
	}()
	<-inside
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
	<-answered
}

func TestNewRefuses(t *testing.T) {
	for _, addr := range []string{"localhost", "127.0.0.1:99999", "127.0.0.1:http", ":-1"} {
		if _, err := New(Config{Address: addr}, Sources{}, settings(t)); err == nil || !strings.Contains(err.Error(), "admin: address") {
			t.Errorf("%s: %v", addr, err)
		}
	}
	if _, err := New(Config{}, Sources{}, channel.Settings{}); err == nil {
		t.Error("no network, no error")
	}
}

func TestUnwritableAnswer(t *testing.T) {
	src := sources()
	src.Stack = func() any { return func() {} }
	src.Config = func() []byte { return []byte("a: [") }
	s := mustNew(t, Config{}, src)
	for _, path := range []string{"/v1/stack", "/v1/config?format=json"} {
		if w := do(t, s, "GET", path); w.Code != 500 || !bytes.Contains(w.Body.Bytes(), []byte("configuration")) && path != "/v1/stack" {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
}
