//go:build unix

package plugins

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// build builds a program of testdata, once.
func build(tb testing.TB, name string) string {
	tb.Helper()
	if testing.Short() {
		tb.Skip("real processes")
	}
	dir := tb.TempDir()
	path := filepath.Join(dir, name)
	out, err := exec.Command("go", "build", "-ldflags=-s -w", "-o", path, "./testdata/"+name).CombinedOutput()
	if err != nil {
		tb.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return path
}

var pins = map[string]string{}

func pinOf(tb testing.TB, path string) string {
	tb.Helper()
	if pins[path] == "" {
		pin, err := digest(path, io.Discard)
		if err != nil {
			tb.Fatal(err)
		}
		pins[path] = pin
	}
	return pins[path]
}

// hostExternal returns a host with one external manager.
func hostExternal(tb testing.TB, path string, args []string, change func(*Config)) *Host {
	tb.Helper()
	pin := pinOf(tb, path)
	h, _ := newTestHost(tb, func(c *Config) {
		c.StoreDir = filepath.Join(filepath.Dir(path), "store")
		c.External = []External{{Kind: KindManager, Name: "acme/x", Path: path, SHA256: pin, Args: args}}
		c.StartTimeout = 5 * time.Second
		if change != nil {
			change(c)
		}
	})
	return h
}

func TestHostileHandshakes(t *testing.T) {
	path := build(t, "hostile")
	ownTemp(t)
	for how, want := range map[string]string{
		"crash":       "exit status 7; its last words: no licence found",
		"panic":       "panic: hostile by design",
		"silent":      "none within the time",
		"chatter":     `must be the handshake, but is "Starting up, please wait..."`,
		"endlessline": "longer than 8192 bytes",
		"halfline":    `ended within the line "1|1|un"`,
		"core":        `go-plugin's protocol is "2"`,
		"oldapi":      "upgrade the plugin",
		"newapi":      "upgrade the node",
		"netrpc":      `protocol is "netrpc"`,
		"protocol":    `protocol is "carrier-pigeon"`,
		"otherhost":   "must be a unix socket",
		"loopback":    "must be a unix socket",
		"othersocket": "not in the plugin's private directory",
		"dotdot":      "not in the plugin's private directory",
		"symlink":     "leads out of the plugin's private directory",
		"nosocket":    "cannot be used",
		"nocert":      "no certificate",
		"garbagecert": "certificate cannot be read",
		"base64":      "certificate cannot be read",
		"control":     `\x1b[2J1|1|\x00`,
		"grandchild":  "exit status 9",
	} {
		t.Run(how, func(t *testing.T) {
			h := hostExternal(t, path, []string{how}, func(c *Config) {
				if c.StartTimeout = 5 * time.Minute; how == "silent" {
					c.StartTimeout = 300 * time.Millisecond
				}
			})
			mgr, err := h.Manager(core.PluginSpec{Name: "acme/x"}, testSettings(t, nil))
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			err = mgr.Start(t.Context(), newFakeHost())
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "manager/acme/x") {
				t.Errorf("start: %v\nwant: %s", err, want)
			}
			if took := time.Since(began); took > time.Minute {
				t.Errorf("it took %v, as if it had waited", took)
			}
			if left := children(t, path); left != "" {
				t.Errorf("processes are left: %s", left)
			}
		})
	}
}

// children lists living processes of copies of the program.
func children(tb testing.TB, path string) string {
	tb.Helper()
	pin := pinOf(tb, path)
	var left string
	list, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, l := range list {
		if to, err := os.Readlink(l); err == nil && strings.Contains(to, pin) {
			left += " " + l
		}
	}
	return left
}

func TestRoguesOnTheDataPlane(t *testing.T) {
	path := build(t, "rogue")
	ownTemp(t)
	for how, want := range map[string]string{
		"garbage":      "frame length",
		"hugelength":   "frame length 1073741824",
		"shortlength":  "frame length 3",
		"wrongreply":   "reply to call 424242",
		"samecall":     "already running",
		"endlesscalls": "unanswered calls",
		"deaf":         "no sign of life",
		"heirs":        "exit status 4",
	} {
		t.Run(how, func(t *testing.T) {
			h := hostExternal(t, path, []string{how}, func(c *Config) {
				c.Heartbeat, c.HeartbeatTimeout = 50*time.Millisecond, 500*time.Millisecond
			})
			mgr, err := h.Manager(core.PluginSpec{Name: "acme/x"}, testSettings(t, nil))
			if err != nil {
				t.Fatal(err)
			}
			host := &stuckHost{fakeManagerHost: newFakeHost()}
			if err := mgr.Start(t.Context(), host); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "the end of the rogue", func() bool { return strings.Contains(h.Status()[0].LastError, want) })
			if err := mgr.Stop(t.Context()); err != nil {
				t.Logf("stop: %v", err)
			}
			if left := children(t, path); left != "" {
				t.Errorf("processes are left: %s", left)
			}
		})
	}
	t.Run("endlessevents", func(t *testing.T) {
		h := hostExternal(t, path, []string{"endlessevents"}, nil)
		mgr, err := h.Manager(core.PluginSpec{Name: "acme/x"}, testSettings(t, nil))
		if err != nil {
			t.Fatal(err)
		}
		host := &countingHost{fakeManagerHost: newFakeHost()}
		if err := mgr.Start(t.Context(), host); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "events", func() bool { return h.Status()[0].Events >= 30 }) // 30 MiB pass, none stays
		stopSoon(t, mgr)
	})
	t.Run("forbidden", func(t *testing.T) {
		h := hostExternal(t, path, []string{"forbidden"}, nil)
		mgr, err := h.Manager(core.PluginSpec{Name: "acme/x"}, testSettings(t, nil))
		if err != nil {
			t.Fatal(err)
		}
		if err := mgr.Start(t.Context(), newFakeHost()); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the call", func() bool { return h.Status()[0].Events == 1 })
		if st := h.Status()[0]; st.State != stateReady || st.Generation != 1 {
			t.Errorf("status %+v", st)
		}
		stopSoon(t, mgr)
	})
	for how, want := range map[string]string{"refuse": "I do not like this node", "slow": "deadline"} {
		t.Run(how, func(t *testing.T) {
			h := hostExternal(t, path, []string{how}, func(c *Config) { c.StartTimeout = time.Second })
			mgr, err := h.Manager(core.PluginSpec{Name: "acme/x"}, testSettings(t, nil))
			if err != nil {
				t.Fatal(err)
			}
			if err := mgr.Start(t.Context(), newFakeHost()); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("start: %v", err)
			}
		})
	}
}

// stopSoon stops a rogue, which does not answer.
func stopSoon(tb testing.TB, m core.Manager) {
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := m.Stop(ctx); err == nil {
		tb.Error("a rogue has answered")
	}
}

// stuckHost never answers a plugin before it is cut off.
type stuckHost struct{ *fakeManagerHost }

func (h *stuckHost) Resync(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

type countingHost struct{ *fakeManagerHost }

func (countingHost) Update([]byte) {}

func TestSwappedAndUnpinnedPrograms(t *testing.T) {
	path := build(t, "hostile")
	ownTemp(t)
	for _, pin := range []string{"", "abc", strings.Repeat("z", 64)} {
		_, err := NewHost(Config{External: []External{{Kind: KindManager, Name: "x", Path: path, SHA256: pin}}}, channel.Settings{})
		if err == nil || !strings.Contains(err.Error(), "no valid SHA-256") {
			t.Errorf("pin %q: %v", pin, err)
		}
	}
	h := hostExternal(t, path, []string{"silent"}, func(c *Config) { c.StoreDir = t.TempDir() })
	pin := h.external["manager/acme/x"].SHA256
	first, err := h.store.executable(path, pin)
	if err != nil {
		t.Fatal(err)
	}
	// The original is swapped: the copy is what runs.
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	again, err := h.store.executable(path, pin)
	if err != nil || again != first {
		t.Errorf("second start: %q, %v", again, err)
	}
	// The copy is swapped too: nothing runs.
	if err := os.Chmod(first, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(first, []byte("#!/bin/sh\nexit 0\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if got, err := h.store.executable(path, pin); err == nil || !strings.Contains(err.Error(), "is not the program that was pinned") {
		t.Errorf("swapped copy: %q, %v", got, err)
	}
	if err := h.Check(KindManager, core.PluginSpec{Name: "acme/x"}); err == nil {
		t.Error("check accepts a swapped program")
	}
	// The original is back: so is the copy.
	if err := os.WriteFile(path, good, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := h.store.executable(path, pin); err != nil || got != first {
		t.Errorf("after the repair: %q, %v", got, err)
	}
	if b, err := os.ReadFile(first); err != nil || !bytes.Equal(b, good) {
		t.Errorf("the copy is not the original: %v", err)
	}
}

func TestOutputToleratesAnything(t *testing.T) {
	core_, logs := observer.New(zap.DebugLevel)
	m := channel.NewMetrics()
	o := newOutput(zap.New(core_), m, "manager", "x")
	lines := []string{
		`{"@level":7,"@message":["a"],"@timestamp":{}}`, // wrong types panic go-plugin
		`{"@level":"fatal","@message":"die"}`,
		`{"@level":"warn","@message":"fine","n":1.5,"o":{"a":[1]},"@timestamp":12}`,
		`{"@level":"info"`,
		"\x00\xff\x1b[31mred",
		"",
		strings.Repeat("x", 3*maxLine),
		"{" + strings.Repeat("[", maxLine),
		"after",
	}
	o.pump(strings.NewReader(strings.Join(lines, "\n")), true)
	var got []string
	for _, e := range logs.All() {
		got = append(got, fmt.Sprintf("%s %.12s", e.Level, e.Message))
	}
	want := []string{"debug [a]", "error die", "warn fine", `debug {"@level":"i`, "debug \\x00\uFFFD\\x1b[31", "debug xxxxxxxxxxxx", "debug {[[[[[[[[[[[", "debug after"}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("logged %q\nwant   %q", got, want)
	}
	if f := logs.FilterMessage("fine").All()[0].ContextMap(); f["n"] != "1.5" || f["o"] != `{"a":[1]}` {
		t.Errorf("fields %v", f)
	}
	if n := sample(m, "plugin_output_refused_total", "reason", "length"); n != 2 {
		t.Errorf("%v lines cut", n)
	}
	// A flood is cut off and said once.
	before := logs.Len()
	o.pump(strings.NewReader(strings.Repeat("spam\n", 20_000)), true)
	if n := logs.Len() - before; n > lineBurst+lineRate || n < lineBurst/2 {
		t.Errorf("%d lines of a flood were logged", n)
	}
	if sample(m, "plugin_output_refused_total", "reason", "flood") == 0 || logs.FilterMessageSnippet("logs too much").Len() != 1 {
		t.Error("the flood was not announced")
	}
}

func FuzzOutput(f *testing.F) {
	f.Add([]byte(`{"@level":7,"@message":["a"],"@timestamp":{}}` + "\n"))
	f.Add([]byte("panic: x\n\x00\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		o := newOutput(zap.NewNop(), nil, "k", "n")
		o.pump(bytes.NewReader(b), true)
		w := o.writer()
		if n, err := w.Write(b); n != len(b) || err != nil {
			t.Error(n, err)
		}
		if len(o.lastWords()) > 400 {
			t.Error("last words without end")
		}
	})
}

func FuzzHandshake(f *testing.F) {
	f.Add("1|1|unix|/tmp/x|grpc|AAAA")
	f.Add("1|1|tcp|127.0.0.1:80|grpc|")
	f.Fuzz(func(t *testing.T, line string) {
		if err := checkHandshake(line, "/nonexistent/dir"); err == nil {
			t.Error("accepted without a socket")
		}
	})
}
