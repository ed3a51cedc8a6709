package scaffold_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/cmd/internal/scaffold"
)

const top = "../../.."

// Every template compiles, is clean, and its tests pass, without a network and
// without "go mod tidy".
func TestTemplates(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles a module for each template")
	}
	for _, o := range []scaffold.Options{
		{Kind: "interceptor", Name: "acme/zip"},
		{Kind: "interceptor", Name: "acme/slow-log", Style: scaffold.Handlers},
		{Kind: "membership", Name: "acme/roster"},
		{Kind: "manager", Name: "acme/mirror"},
		{Kind: "manager-store", Name: "acme/shelf"},
		{Kind: "deployer", Name: "acme/drop"},
		{Kind: "valve", Name: "acme/load-limit", Module: "example.com/valves/loadlimit"},
	} {
		t.Run(o.Kind+o.Style, func(t *testing.T) {
			o.Dir, o.Source = filepath.Join(t.TempDir(), "new"), top
			files, err := scaffold.Write(o)
			if err != nil {
				t.Fatal(err)
			}
			if len(files) != 6 {
				t.Errorf("wrote %v", files)
			}
			for _, args := range [][]string{{"build", "-o", os.DevNull, "./cmd/..."}, {"vet", "./..."}, {"test", "./..."}} {
				cmd := exec.Command("go", args...)
				cmd.Dir, cmd.Env = o.Dir, append(os.Environ(), "GOPROXY=off", "GOFLAGS=-mod=readonly")
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
				}
			}
			if out, err := exec.Command("gofmt", "-l", o.Dir).CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("gofmt: %v: %s", err, out)
			}
			checkReadme(t, filepath.Join(o.Dir, "README.md"))
		})
	}
}

func checkReadme(t *testing.T, path string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(text)) {
		if h, ok := strings.CutPrefix(line, "## "); ok {
			got = append(got, strings.TrimSpace(h))
		}
	}
	want := []string{"Name", "Description", "Options", "Flags", "Placement", "Metrics", "Examples"}
	if !slices.Equal(got, want) {
		t.Errorf("headings %v, want %v", got, want)
	}
	if strings.Contains(string(text), "{{") || strings.Contains(string(text), "NAME") {
		t.Errorf("not filled in:\n%s", text)
	}
}

func TestRefused(t *testing.T) {
	occupied := t.TempDir()
	if err := os.WriteFile(filepath.Join(occupied, "mine.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module example.com/other\n", "go.sum": ""} {
		if err := os.WriteFile(filepath.Join(other, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for what, test := range map[string]struct {
		o    scaffold.Options
		want string
	}{
		"kind":         {scaffold.Options{Kind: "widget", Name: "acme/x"}, "no kind"},
		"name":         {scaffold.Options{Kind: "valve", Name: "x"}, "vendor/name"},
		"upper":        {scaffold.Options{Kind: "valve", Name: "Acme/X"}, "vendor/name"},
		"path":         {scaffold.Options{Kind: "valve", Name: "../x"}, "vendor/name"},
		"keyword":      {scaffold.Options{Kind: "valve", Name: "acme/func"}, "Go package"},
		"style":        {scaffold.Options{Kind: "interceptor", Name: "acme/x", Style: "other"}, "no style"},
		"valve style":  {scaffold.Options{Kind: "valve", Name: "acme/x", Style: "handlers"}, "only interceptors"},
		"no source":    {scaffold.Options{Kind: "valve", Name: "acme/x"}, "neither a source"},
		"wrong source": {scaffold.Options{Kind: "valve", Name: "acme/x", Source: other}, "not the source"},
		"occupied":     {scaffold.Options{Kind: "valve", Name: "acme/x", Source: top, Dir: occupied}, "not empty"},
	} {
		if test.o.Dir == "" {
			test.o.Dir = filepath.Join(t.TempDir(), "new")
		}
		if _, err := scaffold.Write(test.o); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", what, err, test.want)
		}
		if test.o.Dir != occupied {
			if _, err := os.Stat(test.o.Dir); err == nil {
				t.Errorf("%s: a folder was made", what)
			}
		}
	}
	if entries, _ := os.ReadDir(occupied); len(entries) != 1 {
		t.Errorf("the occupied folder has %v", entries)
	}
}

func TestPublishedVersion(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	if _, err := scaffold.Write(scaffold.Options{Kind: "valve", Name: "acme/x", Version: "v1.2.3", Dir: dir}); err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil || !strings.Contains(string(mod), scaffold.Longhouse+" v1.2.3") || strings.Contains(string(mod), "replace") {
		t.Errorf("%v\n%s", err, mod)
	}
}

func TestFindSource(t *testing.T) {
	abs, err := filepath.Abs("scaffold.go")
	if err != nil {
		t.Fatal(err)
	}
	want, _ := filepath.Abs(top)
	if dir, ok := scaffold.FindSource(abs); !ok || dir != want {
		t.Errorf("%q, %v", dir, ok)
	}
	for _, file := range []string{"github.com/longhouse-go/longhouse/cmd/plugin.go", "/nowhere/cmd/plugin.go", ""} {
		if dir, ok := scaffold.FindSource(file); ok {
			t.Errorf("%q: found %s", file, dir)
		}
	}
}
