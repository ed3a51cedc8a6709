package container_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/fx"
	"go.uber.org/fx/fxtest"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/container"
	"github.com/longhouse-go/longhouse/interceptors"
	"github.com/longhouse-go/longhouse/plugins"
	"github.com/longhouse-go/longhouse/plugins/deployer/watch"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
	"github.com/longhouse-go/longhouse/valves"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"))
}

func answer(text string) func(container.AppInfo) http.Handler {
	return func(container.AppInfo) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) })
	}
}

func parts(t *testing.T) container.Parts {
	return container.Parts{
		Interceptors: interceptors.Builtin(),
		Valves:       valves.Builtin(),
		Apps:         []container.App{{Name: "one", New: answer("one")}, {Name: "two", New: answer("two")}},
		Logger:       zaptest.NewLogger(t),
		Plugins: func(s channel.Settings) (core.PluginHost, error) {
			return plugins.NewHost(plugins.Config{
				Managers:    []core.ManagerFactory{delta.Factory},
				Memberships: []core.MembershipFactory{multicast.Factory},
				Deployers:   []core.DeployerFactory{watch.Factory},
				DefaultMode: core.Direct,
			}, s)
		},
	}
}

func read(t *testing.T, text string) *config.Config {
	t.Helper()
	cfg, err := config.Read("test.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

const single = `
admin: {address: "off"}
connectors: [{address: "127.0.0.1:0"}]
engine:
  hosts:
    - name: localhost
      contexts: [{path: "", app: one}]
`

func start(t *testing.T, cfg *config.Config, p container.Parts) *container.Node {
	t.Helper()
	n, err := container.New(cfg, p)
	if err != nil {
		t.Fatal(err)
	}
	return run(t, n)
}

// reloading starts a node whose reload reads what text is then.
func reloading(t *testing.T, text *string, p container.Parts) *container.Node {
	t.Helper()
	n, err := container.New(read(t, *text), p)
	if err != nil {
		t.Fatal(err)
	}
	n.OnReload(func() (*config.Config, error) { return config.Read("test.yaml", []byte(*text)) })
	return run(t, n)
}

func run(t *testing.T, n *container.Node) *container.Node {
	t.Helper()
	if err := n.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(context.Background()); err != nil {
			t.Errorf("stop: %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return n
}

func get(t *testing.T, n *container.Node, path string) (int, string) {
	t.Helper()
	resp, err := http.Get("http://" + n.Addrs()[0] + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestSingleNode(t *testing.T) {
	n := start(t, read(t, single), parts(t))
	if code, body := get(t, n, "/"); code != http.StatusOK || body != "one" {
		t.Errorf("got %d %q", code, body)
	}
	if n.Channel() != nil {
		t.Error("a node without a cluster has a channel")
	}
}

// A reload switches to what the file says now; a file that is broken, or that
// wants what needs a restart, changes nothing.
func TestReload(t *testing.T) {
	next := single
	n := reloading(t, &next, parts(t))

	for _, c := range []struct{ name, text, want, err string }{
		{"broken", "engine: [", "one", "test.yaml:1"},
		{"unknown application", strings.Replace(single, "app: one", "app: nine", 1), "one", `"nine" is not compiled in`},
		{"unknown valve", strings.Replace(single, "engine:", "engine:\n  valves: [nonsense]", 1), "one", `unknown valve "nonsense"`},
		{"needs a restart", strings.Replace(single, "127.0.0.1:0", "127.0.0.1:1", 1), "one", "connectors has changed"},
		{"other application", strings.Replace(single, "app: one", "app: two", 1), "two", ""},
		{"more valves", strings.Replace(single, "engine:", "engine:\n  valves: [errorreport]", 1), "one", ""},
	} {
		next = c.text
		err := n.Reload(t.Context())
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.err)
		}
		if _, body := get(t, n, "/"); body != c.want {
			t.Errorf("%s: the node answers %q, want %q", c.name, body, c.want)
		}
	}
}

// What is wrong with a configuration is said all at once, each thing with its
// place.
func TestCheckSaysEverything(t *testing.T) {
	cfg := read(t, `
engine:
  valves: [replicaton]
  hosts:
    - name: localhost
      contexts: [{path: "", app: nine}]
cluster:
  manager: {use: delta, nonsense: 1}
  channel:
    membership: multicasd
    interceptors: [dispatch, dispatsh]
`)
	cfg.Normalize()
	var all []string
	for _, p := range container.Check(t.Context(), cfg, parts(t)) {
		all = append(all, p.Error())
	}
	text := strings.Join(all, "\n")
	for _, want := range []string{
		`test.yaml:3`, `did you mean "replication"`,
		`test.yaml:6`, `"nine" is not compiled in`,
		`test.yaml:8`, `nonsense`,
		`test.yaml:10`, `did you mean "multicast"`,
		`test.yaml:11`, `did you mean "dispatch"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in:\n%s", want, text)
		}
	}
}

func TestStartFailureLeavesNothing(t *testing.T) {
	cfg := read(t, strings.Replace(single, "127.0.0.1:0", "192.0.2.1:80", 1)) // an address no machine has
	dir := filepath.Join(t.TempDir(), "work")
	cfg.Node.WorkDir = dir
	n, err := container.New(cfg, parts(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(t.Context()); err == nil {
		t.Fatal("started on an address that is not ours")
	} else if !strings.Contains(err.Error(), "192.0.2.1:80") {
		t.Errorf("the error does not name the address: %v", err)
	}
	if err := n.Stop(context.Background()); err != nil {
		t.Errorf("stop after a failed start: %v", err)
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		t.Error("a work directory that the user chose was removed")
	}
}

// Applications that bring their own path are served without configuration.
func TestAppsWithPath(t *testing.T) {
	p := parts(t)
	path := "/shop"
	p.Apps = append(p.Apps, container.App{Name: "shop", Path: &path, New: answer("shop")})
	n := start(t, read(t, single), p)
	if _, body := get(t, n, "/shop/"); body != "shop" {
		t.Errorf("got %q", body)
	}
	if _, body := get(t, n, "/"); body != "one" {
		t.Errorf("got %q", body)
	}
}

// A node can be a part of an fx application, which adds to it.
func TestFxModule(t *testing.T) {
	tag := channel.FactoryOf("tag", struct{}{}, func(struct{}, channel.Settings) (core.Valve, error) {
		return core.ValveFunc(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("X-Tag", "set")
				next.ServeHTTP(w, r)
			})
		}), nil
	})
	var n *container.Node
	app := fxtest.New(t,
		fx.Supply(read(t, strings.Replace(single, "engine:", "engine:\n  valves: [tag]", 1)), parts(t)),
		container.Module(), container.ProvideValve(tag), fx.Populate(&n), fx.NopLogger)
	app.RequireStart()
	defer app.RequireStop()
	resp, err := http.Get("http://" + n.Addrs()[0] + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if resp.Header.Get("X-Tag") != "set" {
		t.Error("the valve was not in the pipeline")
	}
}
