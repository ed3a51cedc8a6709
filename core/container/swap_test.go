package container_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/container"
)

// diary notes the lives of the layers that a node makes.
type diary struct {
	mu       sync.Mutex
	lines    []string
	messages int
}

func (d *diary) add(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, fmt.Sprintf(format, args...))
}

// take returns and forgets the lines.
func (d *diary) take() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := strings.Join(d.lines, ", ")
	d.lines = nil
	return s
}

type diarist struct {
	d    *diary
	name string
	fail bool
}

func (x *diarist) Descriptor() channel.Descriptor { return channel.Descriptor{Name: x.name} }
func (x *diarist) Start(context.Context, channel.Link) error {
	if x.fail {
		return errors.New("cannot start, as told")
	}
	x.d.add("start %s", x.name)
	return nil
}
func (x *diarist) Stop(context.Context) error { x.d.add("stop %s", x.name); return nil }
func (x *diarist) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	x.d.mu.Lock()
	x.d.messages++
	x.d.mu.Unlock()
	return l.Send(ctx, m)
}

type diaristConfig struct {
	Tag  string `yaml:"tag"`
	Fail bool   `yaml:"fail"`
}

func (d *diary) factory() core.InterceptorFactory {
	return channel.FactoryOf("diarist", diaristConfig{}, func(c diaristConfig, _ channel.Settings) (channel.Interceptor, error) {
		return &diarist{d, "diarist-" + c.Tag, c.Fail}, nil
	})
}

const clustered = `
admin: {address: "127.0.0.1:0"}
connectors: [{address: "127.0.0.1:0"}]
engine:
  hosts:
    - name: localhost
      contexts: [{path: "", app: one}]
cluster:
  channel:
    membership: {use: multicast, port: 45999, ttl: 0}
    interceptors: [dispatch, {use: diarist, tag: a}, failuredetector]
`

func layers(t *testing.T, n *container.Node) string {
	t.Helper()
	resp, err := http.Get("http://" + n.Admin() + "/v1/stack")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var report container.StackReport
	if err := json.NewDecoder(resp.Body).Decode(&report); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range report.Layers {
		names = append(names, l.Name)
		if !strings.Contains(report.Explanation, l.Name) {
			t.Errorf("%s is not explained", l.Name)
		}
	}
	return strings.Join(names, " ")
}

// A reload replaces the channel's layers while the node runs. What has not
// changed keeps its instance; what fails changes nothing, in the channel or in
// the engine.
func TestReloadSwapsInterceptors(t *testing.T) {
	d := new(diary)
	p := parts(t)
	p.Interceptors = append(p.Interceptors, d.factory())
	next := clustered
	n := reloading(t, &next, p)
	if got := d.take(); got != "start diarist-a" {
		t.Fatalf("at the start: %s", got)
	}
	stack := func(list string) string {
		return strings.Replace(clustered, "[dispatch, {use: diarist, tag: a}, failuredetector]", list, 1)
	}
	app := func(text string) string { return strings.Replace(text, "app: one", "app: two", 1) }
	first := "dispatch diarist-a failuredetector"
	for _, c := range []struct{ name, text, err, layers, diary, answer string }{
		{"nothing new", clustered, "", first, "", "one"},
		{"other lines", "\n\n\n" + stack("\n    - dispatch\n\n    - use: diarist\n\n      tag: a\n    - failuredetector"), "", first, "", "one"},
		{"the rest of the cluster", strings.Replace(clustered, "ttl: 0", "ttl: 1", 1), "restart the node", first, "", "one"},
		{"unknown layer", app(stack("[dispatsh]")), `did you mean "dispatch"`, first, "", "one"},
		{"one more that does not start", app(stack("[{use: diarist, tag: b}, {use: diarist, tag: bad, fail: true}, {use: diarist, tag: a}, dispatch]")), "diarist-bad", first, "stop diarist-b, stop diarist-bad", "one"},
		{"unknown valve", strings.Replace(stack("[{use: diarist, tag: b}]"), "engine:", "engine:\n  valves: [nonsense]", 1), `unknown valve "nonsense"`, first, "stop diarist-b", "one"},
		{"more and in another order", app(stack("[{use: diarist, tag: b}, {use: diarist, tag: a}, dispatch, failuredetector]")), "", "diarist-b diarist-a dispatch failuredetector", "start diarist-b", "two"},
		{"other options", stack("[{use: diarist, tag: c}, {use: diarist, tag: b}, dispatch]"), "", "diarist-c diarist-b dispatch", "start diarist-c, stop diarist-a", "one"},
		{"twice the same", stack("[{use: diarist, tag: b}, {use: diarist, tag: b}]"), "", "diarist-b diarist-b", "start diarist-b, stop diarist-c", "one"},
		{"none", stack("[]"), "", "", "stop diarist-b, stop diarist-b", "one"},
		{"back", clustered, "", first, "start diarist-a", "one"},
	} {
		next = c.text
		err := n.Reload(t.Context())
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.err)
		}
		if got := layers(t, n); got != c.layers {
			t.Errorf("%s: layers %q, want %q", c.name, got, c.layers)
		}
		if got := d.take(); got != c.diary {
			t.Errorf("%s: diary %q, want %q", c.name, got, c.diary)
		}
		if _, body := get(t, n, "/"); body != c.answer {
			t.Errorf("%s: the node answers %q", c.name, body)
		}
	}
}

// An upgraded program behind an unchanged entry is a new instance.
func TestReloadSwapsUpgradedPlugins(t *testing.T) {
	d := new(diary)
	host := &upgradable{d: d, version: "1"}
	p := parts(t)
	inner := p.Plugins
	p.Plugins = func(s channel.Settings) (core.PluginHost, error) {
		var err error
		host.PluginHost, err = inner(s)
		return host, err
	}
	text := strings.Replace(clustered, "{use: diarist, tag: a}", "acme/zstd", 1)
	n := reloading(t, &text, p)
	for _, c := range []struct{ pinned, diary string }{
		{"1", "start acme/zstd 1"},
		{"2", "start acme/zstd 2, stop acme/zstd 1"},
		{"2", ""},
	} {
		host.pinned = c.pinned
		if err := n.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := d.take(); got != c.diary {
			t.Errorf("version %s: diary %q, want %q", c.pinned, got, c.diary)
		}
	}
	host.pinned = "unreadable"
	if err := n.Reload(t.Context()); err == nil || d.take() != "" {
		t.Errorf("an unreadable list of programs: %v", err)
	}
}

// upgradable is a plugin host with one interceptor whose program changes.
type upgradable struct {
	core.PluginHost
	d               *diary
	version, pinned string
}

func (h *upgradable) Names(kind string) []string {
	if kind == "interceptor" {
		return []string{"acme/zstd"}
	}
	return h.PluginHost.Names(kind)
}

func (h *upgradable) Interceptor(spec core.PluginSpec, _ channel.Settings) (channel.Interceptor, error) {
	return &diarist{h.d, spec.Name + " " + h.version, false}, nil
}

func (h *upgradable) Refresh(context.Context) error {
	if h.pinned == "unreadable" {
		return errors.New("plugins.lock: broken")
	}
	h.version = h.pinned
	return nil
}

func (h *upgradable) Revision(kind, name string) string { return h.version }

// The access log goes on in one file through reloads, with every request once.
func TestReloadKeepsTheAccessLog(t *testing.T) {
	file := filepath.Join(t.TempDir(), "access.log")
	text := strings.Replace(single, "engine:", "engine:\n  valves: [{use: accesslog, format: common, file: "+file+"}]", 1)
	n := reloading(t, &text, parts(t))
	const each, clients = 50, 3
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := range each {
				if code, _ := get(t, n, fmt.Sprintf("/?c=%d&i=%d", c, i)); code != http.StatusOK {
					t.Errorf("status %d", code)
				}
			}
		})
	}
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	reloads := 0
	for running := true; running; {
		if err := n.Reload(t.Context()); err != nil {
			t.Error(err)
		}
		reloads++
		select {
		case <-ended:
			running = false
		case <-time.After(2 * time.Millisecond):
		}
	}
	if err := n.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for c := range clients {
		for i := range each {
			if n := strings.Count(string(b), fmt.Sprintf(`"GET /?c=%d&i=%d HTTP/1.1" 200`, c, i)); n != 1 {
				t.Errorf("request %d of client %d was logged %d times", i, c, n)
			}
		}
	}
	t.Logf("%d reloads", reloads)
}
