package cmd

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/plugins"
)

// command runs a command line and returns what it printed.
func command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	root := newRoot(assemble(nil))
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

// describing writes a program that only describes itself.
func describing(t *testing.T, path, name, version string) {
	t.Helper()
	text := `#!/bin/sh
echo '{"kind":"interceptor","name":"` + name + `","version":"` + version + `","api":[1],"handles":["send"],"config_schema":{"type":"object","additionalProperties":false,"properties":{"level":{"type":"integer","minimum":1}}}}'
`
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
}

// The life of a pin: added, listed, verified, replaced, removed; and what is not
// as it was pinned is told.
func TestPluginCommands(t *testing.T) {
	t.Chdir(t.TempDir())
	want := func(text string, err error, parts ...string) {
		t.Helper()
		if err != nil {
			text += err.Error()
		}
		for _, p := range parts {
			if !strings.Contains(text, p) {
				t.Errorf("%q is missing in:\n%s", p, text)
			}
		}
	}
	out, err := command(t, "plugin", "list")
	want(out, err, "longhouse plugin add")

	describing(t, "zip", "acme/zip", "1.0.0")
	out, err = command(t, "plugin", "add", "zip", "--no-conform")
	if err != nil {
		t.Fatal(err)
	}
	want(out, err, "interceptor acme/zip 1.0.0", "skipped", "pinned", "use: acme/zip")
	out, err = command(t, "plugin", "list")
	want(out, err, "interceptor/acme/zip", "1.0.0", "not tried", "ok")
	if out, err = command(t, "plugin", "verify"); err != nil {
		t.Error(out, err)
	}

	describing(t, "zip", "acme/zip", "1.1.0")
	out, err = command(t, "plugin", "add", "zip", "--no-conform")
	want(out, err, "replaced", "was 1.0.0")
	lock, err := plugins.ReadLock(plugins.LockName)
	if err != nil || len(lock.Plugins) != 1 || lock.Plugins[0].Version != "1.1.0" || lock.Plugins[0].Conformance.Result != plugins.NotTried {
		t.Fatalf("%+v, %v", lock, err)
	}
	store := plugins.StoreOf(plugins.LockName)
	if entries, _ := os.ReadDir(store); len(entries) != 2 {
		t.Errorf("the store has %v, want what is pinned and what was until now: a node may still run it", entries)
	}
	if out, err = command(t, "plugin", "add", "zip", "--no-conform"); err != nil {
		t.Error(out, err)
	}
	if entries, _ := os.ReadDir(store); len(entries) != 1 {
		t.Errorf("the store has %v, want only what is pinned", entries)
	}

	kept := filepath.Join(store, lock.Plugins[0].SHA256)
	if err := os.Chmod(kept, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(kept, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err = command(t, "plugin", "verify"); err == nil {
		t.Error("a changed program was verified:", out)
	}
	want(out, err, "interceptor/acme/zip", "not the program that was pinned")
	out, err = command(t, "plugin", "list")
	want(out, err, "NOT VERIFIED")

	out, err = command(t, "plugin", "rm", "acme/zop")
	want(out, err, "none of the pinned")
	if out, err = command(t, "plugin", "rm", "acme/zip"); err != nil {
		t.Error(out, err)
	}
	if entries, _ := os.ReadDir(store); len(entries) != 0 {
		t.Errorf("the store still has %v", entries)
	}
}

// What cannot be a plugin is refused with the reason, and nothing is left.
func TestPluginAddRefuses(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{"silent": "#!/bin/sh\n", "loud": "#!/bin/sh\necho hello\n", "broken": "#!/bin/sh\nexit 7\n", "empty": ""} {
		if err := os.WriteFile(name, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"folder", "module", "module/cmd/zip"} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for file, text := range map[string]string{
		"module/go.mod": "module example.com/zip\n\ngo 1.26.0\n", "module/zip.go": "package zip\n", "module/cmd/zip/main.go": "package main\n\nfunc main() { wrong }\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for target, want := range map[string]string{
		"missing": "no such file", "silent": "empty", "loud": "hello", "broken": "exit status 7", "empty": "not a program",
		"folder": "neither a program nor a Go package", "module": "did you mean module/cmd/zip?", "module/cmd/zip": "undefined: wrong",
	} {
		out, err := command(t, "plugin", "add", target, "--no-conform")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q\n%s", target, err, want, out)
		}
	}
	if _, err := os.Stat(plugins.LockName); err == nil {
		t.Error("a lock file was written")
	}
	if entries, _ := os.ReadDir(plugins.StoreOf(plugins.LockName)); len(entries) != 0 {
		t.Errorf("the store has %v", entries)
	}
}

func TestPluginNew(t *testing.T) {
	t.Chdir(t.TempDir())
	out, err := command(t, "plugin", "new", "interceptor", "acme/zip")
	if err != nil || !strings.Contains(out, "wrote zip.go") || strings.Contains(out, "cd zip") {
		t.Fatalf("in an empty folder: %v\n%s", err, out)
	}
	out, err = command(t, "plugin", "new", "valve", "acme/limit")
	if err != nil || !strings.Contains(out, "wrote limit/limit.go") || !strings.Contains(out, "cd limit") {
		t.Errorf("in a folder with files: %v\n%s", err, out)
	}
	if _, err = command(t, "plugin", "new", "valve", "acme/limit"); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("again: %v", err)
	}
	mod, err := os.ReadFile("go.mod")
	if err != nil || !strings.Contains(string(mod), "replace github.com/longhouse-go/longhouse => /") {
		t.Errorf("%v\n%s", err, mod)
	}
}

func TestConformBuiltin(t *testing.T) {
	out, err := command(t, "conform", "interceptor/throughput", "--run", "describe", "--report", filepath.Join(t.TempDir(), "r.json"), "--verbose")
	if err != nil || !strings.Contains(out, "interceptor/describe-pure") {
		t.Errorf("%v\n%s", err, out)
	}
	out, err = command(t, "conform", "interceptor/none")
	if code, ok := err.(exitError); !ok || code != 2 || !strings.Contains(out, "interceptor/throughput") {
		t.Errorf("an unknown target: %v\n%s", err, out)
	}
	out, err = command(t, "conform", "--list", "--profile", "interceptor")
	if err != nil || !strings.Contains(out, "interceptor/round-trip (must)") {
		t.Errorf("list: %v\n%s", err, out)
	}
}

// Options of a pinned plugin are checked from the lock file alone: its program
// is not even there.
func TestCheckWithLock(t *testing.T) {
	t.Chdir(t.TempDir())
	describing(t, "zip", "acme/zip", "1.0.0")
	if out, err := command(t, "plugin", "add", "zip", "--no-conform"); err != nil {
		t.Fatal(out, err)
	}
	if err := os.RemoveAll(plugins.StoreOf(plugins.LockName)); err != nil {
		t.Fatal(err)
	}
	for options, want := range map[string]string{
		"level: 2":                   "0 errors",
		"level: 2, on_down: wait":    "0 errors",
		"level: 0":                   "level: 0 is out of range, at least 1",
		"levle: 2":                   `did you mean "level"?`,
		"level: 2, on_down: perhaps": "none of fail, wait, bypass",
		"level: 2, mode: direct":     "cannot run in mode",
	} {
		text := "engine: {valves: [routebinder, replication], route: n1}\ncluster:\n  channel:\n    interceptors:\n      - {use: acme/zip, " + options + "}\n      - dispatch\n      - failuredetector\n"
		if err := os.WriteFile("node.yaml", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := command(t, "check", "node.yaml")
		if (err == nil) != (want == "0 errors") || !strings.Contains(out, want) || !strings.Contains(out, "is not on this machine") {
			t.Errorf("%s: %v\n%s", options, err, out)
		}
		if err != nil && !strings.Contains(out, "node.yaml:5") {
			t.Errorf("%s: no place in\n%s", options, out)
		}
	}
	out, err := command(t, "stack", "-c", "node.yaml", "--plugins", "other.lock")
	if err == nil || !strings.Contains(err.Error(), "other.lock") {
		t.Errorf("a lock file that is not there: %v\n%s", err, out)
	}
}
