package plugins

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/zap/zaptest"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
)

// foreignProgram builds the example in JavaScript. Without Node.js the test is
// skipped, but not where CI is set.
func foreignProgram(t *testing.T) string {
	t.Helper()
	for _, tool := range []string{"node", "npm"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%s is needed: %v", tool, err)
			}
			t.Skipf("%s is needed: %v", tool, err)
		}
	}
	source := filepath.Join("testdata", "foreign")
	pkg, err := os.ReadFile(filepath.Join(source, "package.json"))
	if err != nil {
		t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	sum := sha256.Sum256(pkg)
	dir := filepath.Join(cache, "longhouse-foreign-"+hex.EncodeToString(sum[:8]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{
		filepath.Join(source, "package.json"):         "package.json",
		filepath.Join(source, "reverse.js"):           "reverse.js",
		filepath.Join("proto", "v1", "control.proto"): "control.proto",
	} {
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, to), b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	npm := func(args ...string) error {
		cmd := exec.Command("npm", args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Logf("npm %s: %s", strings.Join(args, " "), out)
		}
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "esbuild")); err != nil {
		if err := npm("install", "--no-audit", "--no-fund"); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal(err)
			}
			t.Skip("npm cannot install what the example needs")
		}
	}
	if err := npm("run", "build"); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "dist", "reverse")
}

// TestForeignInterceptor runs an interceptor that shares no code with this
// program.
func TestForeignInterceptor(t *testing.T) {
	external, err := Unpinned(t.Context(), foreignProgram(t))
	if err != nil {
		t.Fatal(err)
	}
	s := channel.Settings{Logger: zaptest.NewLogger(t), Metrics: channel.NewMetrics()}
	h, err := NewHost(Config{External: external}, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	l, err := h.Interceptor(core.PluginSpec{Name: "example/reverse", OnDown: core.Wait}, s)
	if err != nil {
		t.Fatal(err)
	}
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{l}})
	send := func(body string) {
		t.Helper()
		if err := e.Send(t.Context(), to, []byte(body), channel.SendAck); err != nil {
			t.Fatal(err)
		}
		all := e.Bottom.Messages()
		m := all[len(all)-1]
		slices.Reverse(m.Body)
		if string(m.Body) != body || m.Options != channel.SendAck|0x40000 {
			t.Errorf("sent %d bytes with %v", len(m.Body), m.Options)
		}
	}
	send("hello")
	send(strings.Repeat("large", 200_000))
	later := &laterRecorder{ch: make(chan error, 1)}
	m := channel.Message{ID: channel.NewUniqueID(), From: to[0], Options: channel.SendSyncAck | 0x40000, Body: []byte("olleh"), Later: later}
	if err := e.Receive(t.Context(), &m); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, later.ch); err != nil {
		t.Fatal(err)
	}
	if got := e.Top.Messages()[0]; string(got.Body) != "hello" || got.Options != channel.SendSyncAck {
		t.Errorf("received %q with %v", got.Body, got.Options)
	}
	before := h.Status()[0]
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	send("after a death")
	if st := h.Status()[0]; st.Generation != 2 || st.PID == before.PID {
		t.Errorf("status %+v", st)
	}
	_, err = h.Interceptor(core.PluginSpec{Name: "example/reverse", Instance: "bad", Options: []byte("color: red"), Origin: "server.yaml:12"}, s)
	if err == nil || !strings.Contains(err.Error(), "server.yaml:12") || !strings.Contains(err.Error(), "color") {
		t.Errorf("made with options that it does not have: %v", err)
	}
}
