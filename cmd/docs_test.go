package cmd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins"
)

var block = regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$")

// blocks returns the code blocks of that language in a document.
func blocks(t *testing.T, path, language string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, m := range block.FindAllStringSubmatch(string(text), -1) {
		if m[1] == language {
			out = append(out, m[2])
		}
	}
	return out
}

// Every YAML block of the guides is a configuration without errors.
func TestDocumentedYAML(t *testing.T) {
	n := 0
	for _, doc := range []string{"../README.md", "MOVING.md", "../core/container/README.md", "../channel/README.md", "../valves/singlesignon/README.md"} {
		for _, text := range blocks(t, doc, "yaml") {
			n++
			cfg, err := config.Read(doc, []byte(text))
			if err != nil {
				t.Errorf("%v", err)
				continue
			}
			for _, p := range assemble(nil).findings(t.Context(), cfg) {
				if p.Severity >= config.Warning {
					t.Errorf("%s: %v", doc, p)
				}
			}
		}
	}
	if n == 0 {
		t.Error("no YAML block was found")
	}
}

// The Go blocks of the guides are parts of examples that run.
func TestDocumentedGo(t *testing.T) {
	for doc, example := range map[string]struct {
		file     string
		maxLines int
	}{
		"../core/container/README.md": {"../core/container/example_test.go", 29},
		"../channel/README.md":        {"../channel/example_test.go", 100},
	} {
		src, err := os.ReadFile(example.file)
		if err != nil {
			t.Fatal(err)
		}
		_, rest, ok := strings.Cut(string(src), "// README: ")
		_, rest, ok2 := strings.Cut(rest, "\n")
		code, _, ok3 := strings.Cut(rest, "// README: end")
		if !ok || !ok2 || !ok3 {
			t.Fatalf("%s has lost its marks", example.file)
		}
		code = strings.TrimSpace(code)
		got := blocks(t, doc, "go")
		if len(got) == 0 || strings.TrimSpace(got[0]) != code {
			t.Errorf("%s does not show the example as it is:\n%s", doc, code)
		}
		if lines := strings.Count(code, "\n") + 1; lines > example.maxLines {
			t.Errorf("%s: the example takes %d lines", doc, lines)
		}
	}
}

// Every "longhouse …" line of the move guide works on a real server.xml.
func TestDocumentedCommands(t *testing.T) {
	xml, err := os.ReadFile(seed(t, "18-s002-server-node1.xml"))
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	if err := os.WriteFile("server.xml", xml, 0o600); err != nil {
		t.Fatal(err)
	}
	moving, err := filepath.Abs(filepath.Join(originalDir, "MOVING.md"))
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, b := range blocks(t, moving, "sh") {
		args := strings.Fields(strings.TrimSpace(b))
		if args[0] != "longhouse" {
			t.Errorf("%q is not a longhouse command", b)
			continue
		}
		ran++
		if args[1] == "run" { // it would not end: its configuration is what counts
			args = append([]string{"longhouse", "stack"}, without(args[2:], "--lenient")...)
		}
		root := newRoot(assemble(nil))
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&out)
		root.SetArgs(args[1:])
		err := root.ExecuteContext(t.Context())
		if args[1] == "check" {
			if code, ok := err.(exitError); !ok || code != 1 {
				t.Errorf("check: %v, want exit 1 because parts are not available", err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out.String())
		}
	}
	if ran < 3 {
		t.Errorf("only %d commands were found", ran)
	}
	if _, err := config.Load("node.yaml"); err != nil {
		t.Errorf("the imported configuration does not load: %v", err)
	}
}

// Every command of the guide for authors is run, in order, in an empty folder.
func TestAuthorsGuide(t *testing.T) {
	if testing.Short() {
		t.Skip("builds programs and runs a node")
	}
	guide, err := filepath.Abs(filepath.Join(originalDir, "..", "plugins", "AUTHORS.md"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	bin, work := filepath.Join(dir, "bin"), filepath.Join(dir, "work")
	build := exec.Command("go", "build", "-o", filepath.Join(bin, "longhouse"), "./longhouse")
	build.Dir = originalDir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Mkdir(work, 0o700); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	admin := ""
	ran := 0
	for _, script := range blocks(t, guide, "sh") {
		ran++
		if first, _, _ := strings.Cut(script, "\n"); strings.HasPrefix(first, "longhouse run ") {
			admin = runNode(t, work, env, strings.Fields(first)[1:])
			continue
		}
		if admin != "" {
			script = strings.ReplaceAll(script, "longhouse status", "longhouse status --admin "+admin)
		}
		cmd := exec.Command("bash", "-e", "-c", script)
		cmd.Dir, cmd.Env = work, env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s%v\n%s", script, err, out)
		}
		if strings.Contains(script, "longhouse status") && !strings.Contains(string(out), "interceptor/acme/zip") {
			t.Errorf("status does not show the plugin:\n%s", out)
		}
	}
	if ran < 6 || admin == "" {
		t.Errorf("only %d blocks were run, the node's admin API is %q", ran, admin)
	}
	lock, err := plugins.ReadLock(filepath.Join(work, plugins.LockName))
	if err != nil || len(lock.Plugins) != 0 {
		t.Errorf("at the end the lock holds %v, %v; want that it was removed", lock, err)
	}
}

// runNode starts what a guide starts, on free ports, and returns the address of
// its admin API when it is ready.
func runNode(t *testing.T, dir string, env, args []string) string {
	t.Helper()
	port, err := freeUDPPort()
	if err != nil {
		t.Fatal(err)
	}
	args = append(args, "--announce", "--set", "admin.address=127.0.0.1:0", "--set", "connectors[0].address=127.0.0.1:0",
		"--set", fmt.Sprintf("cluster.channel.membership.port=%d", port))
	log := &tail{}
	cmd := exec.Command(filepath.Join(filepath.Dir(dir), "bin", "longhouse"), args...)
	cmd.Dir, cmd.Env, cmd.Stderr = dir, env, log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close() // it stops by itself then
		if err := cmd.Wait(); err != nil {
			t.Errorf("the node: %v\n%s", err, log)
		}
	})
	var a announcement
	if err := json.NewDecoder(stdout).Decode(&a); err != nil {
		t.Fatalf("the node has not started: %v\n%s", err, log)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		resp, err := http.Get("http://" + a.Admin + "/readyz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return a.Admin
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the node is not ready\n%s", log)
		}
		time.Sleep(20 * time.Millisecond) // between two questions to another process
	}
}

func without(list []string, word string) []string {
	var out []string
	for _, s := range list {
		if s != word {
			out = append(out, s)
		}
	}
	return out
}

// originalDir is where the test started.
var originalDir = func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return dir
}()
