package valves_test

import (
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/table"
	"github.com/longhouse-go/longhouse/valves"
	"github.com/longhouse-go/longhouse/valves/accesslog"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestFolders: each folder is listed and explained under the same headings.
func TestFolders(t *testing.T) {
	listed := map[string]bool{}
	for _, f := range valves.Builtin() {
		if listed[f.Name] {
			t.Errorf("%s is listed twice", f.Name)
		}
		listed[f.Name] = true
		if err := f.Check(channel.NoConfig); err != nil {
			t.Errorf("%s: the defaults are refused: %v", f.Name, err)
		}
	}
	dirs, err := fs.ReadDir(os.DirFS("."), ".")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, d := range dirs {
		if !d.IsDir() {
			continue
		}
		n++
		if !listed[d.Name()] {
			t.Errorf("folder %s is not in Builtin", d.Name())
		}
		b, err := os.ReadFile(filepath.Join(d.Name(), "README.md"))
		if err != nil {
			t.Error(err)
			continue
		}
		rest := string(b)
		for _, h := range []string{"Name", "Description", "Options", "Placement", "Metrics", "Examples"} {
			_, after, ok := strings.Cut(rest, "\n## "+h+"\n")
			if !ok {
				t.Errorf("%s/README.md: heading %q is missing or out of order", d.Name(), h)
				break
			}
			rest = after
		}
	}
	if n != len(listed) {
		t.Errorf("%d folders, %d factories", n, len(listed))
	}
}

// pipeline is all built-in valves with their defaults, as a composer gets them.
func pipeline(tb testing.TB, but ...string) []core.Valve {
	tb.Helper()
	var list []core.Valve
	for _, f := range valves.Builtin() {
		if slices.Contains(but, f.Name) {
			continue
		}
		v, err := f.New(channel.NoConfig, channel.Settings{Name: f.Name, Metrics: channel.NewMetrics()})
		if err != nil {
			tb.Fatal(err)
		}
		list = append(list, v)
	}
	return list
}

var body = []byte("ok")

func plain(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) }

func serve(tb testing.TB, h http.Handler, list []core.Valve) http.Handler {
	tb.Helper()
	tab := table.New(table.Config{}, channel.Settings{})
	tb.Cleanup(func() { _ = tab.Stop(tb.Context()) })
	e, err := core.NewEngine(core.EngineOptions{
		Route: "n1", Valves: list, Shared: tab,
		Hosts: []core.HostOptions{{Name: "localhost", Contexts: []core.ContextOptions{{Handler: h, Sessions: tab, Distributable: true}}}},
	}, channel.Settings{})
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

// TestAllTogether: the whole pipeline passes a request, a check and an error.
func TestAllTogether(t *testing.T) {
	h := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/plain" {
			w.WriteHeader(404)
			return
		}
		plain(w, r)
	}), pipeline(t, "accesslog"))
	for target, want := range map[string]string{"/plain": "200 ok", "/health": "200 ok\n", "/x": "404 404 Not Found\n"} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", target, nil))
		if got := strconv.Itoa(w.Code) + " " + w.Body.String(); got != want {
			t.Errorf("%s: %q, want %q", target, got, want)
		}
	}
}

// BenchmarkPlain is GET /plain through the whole pipeline over a real
// connection, against the bare handler: compare the times. The cost of the
// client is in both.
func BenchmarkPlain(b *testing.B) {
	c := accesslog.Default()
	c.File = filepath.Join(b.TempDir(), "access.log")
	access, err := accesslog.New(c, channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	if err := access.Start(b.Context()); err != nil {
		b.Fatal(err)
	}
	defer access.Stop(b.Context())
	rest := pipeline(b, "accesslog")
	for name, h := range map[string]http.Handler{
		"bare":           http.HandlerFunc(plain),
		"pipeline":       serve(b, http.HandlerFunc(plain), rest),
		"with accesslog": serve(b, http.HandlerFunc(plain), append([]core.Valve{access}, rest...)),
	} {
		b.Run(name, func(b *testing.B) {
			srv := httptest.NewServer(h)
			defer srv.Close()
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				tr := &http.Transport{}
				defer tr.CloseIdleConnections()
				c := &http.Client{Transport: tr}
				for pb.Next() {
					resp, err := c.Get(srv.URL + "/plain")
					if err != nil {
						b.Error(err)
						return
					}
					resp.Body.Close()
				}
			})
		})
	}
}
