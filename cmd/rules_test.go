package cmd_test

import (
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/longhouse-go/longhouse/"

type pkg struct {
	ImportPath, Dir                          string
	GoFiles, TestGoFiles                     []string
	Imports, TestImports, XTestImports, Deps []string
}

// rel returns the path inside the module.
func (p pkg) rel() string { return strings.TrimPrefix(p.ImportPath, module) }

// under reports whether path is dir or inside it.
func under(path string, dirs ...string) bool {
	for _, d := range dirs {
		if path == d || strings.HasPrefix(path, d+"/") {
			return true
		}
	}
	return false
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,TestGoFiles,Imports,TestImports,XTestImports,Deps", "./...")
	cmd.Dir = ".."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// The floors: a package may import from our own module only what stands here.
// The first rule whose folder holds the package counts.
var mayImport = []struct {
	dir    string
	allow  []string
	reason string
}{
	{"channel", []string{"channel"}, "a stranger can embed the channel alone"},
	{"interceptors", []string{"channel", "interceptors"}, "an interceptor author needs one import"},
	{"core/container", []string{"channel", "core"}, "it is handed factories and knows only interfaces"},
	{"core/session", nil, "it is pure"},
	{"core", []string{"channel", "core"}, "core stands above channel and below everything else"},
	{"valves", []string{"channel", "core", "valves"}, "a valve is plain middleware"},
	{"plugins", []string{"channel", "core", "plugins"}, "plugins stand beside valves"},
	{"conformance", []string{"channel", "core", "plugins", "conformance"}, "suites test contracts, not implementations"},
	{"cmd", []string{"channel", "core", "interceptors", "valves", "plugins", "conformance", "cmd"}, "cmd assembles everything"},
}

// Modules that only some folders may use directly.
var fenced = []struct {
	module, reason string
	only           []string
}{
	{"go.uber.org/fx", "components are plain constructors; only the container is wired", []string{"core/container", "cmd"}},
	{"github.com/hashicorp/go-plugin", "its traps stay in one place", []string{"plugins"}},
	{"google.golang.org/grpc", "the plugin protocol stays in one place", []string{"plugins"}},
	{"github.com/pion/transport/v2/vnet", "the simulation is for tests", []string{"channel/channeltest"}},
	{module + "plugins/proto", "generated types are nobody's API", []string{"plugins/proto", "plugins/internal", "plugins/sdk", "plugins"}},
	{module + "core/container", "it is the top of core", []string{"core/container", "cmd"}},
	{"github.com/prometheus", "metrics are exported in one place", []string{"core/admin"}},
}

func TestImportRules(t *testing.T) {
	for _, p := range packages(t) {
		rel := p.rel()
		i := slices.IndexFunc(mayImport, func(r struct {
			dir    string
			allow  []string
			reason string
		}) bool {
			return under(rel, r.dir)
		})
		if i < 0 {
			t.Errorf("%s: in none of the known top folders", rel)
			continue
		}
		rule := mayImport[i]
		for _, imp := range p.Imports {
			if own, ok := strings.CutPrefix(imp, module); ok && !under(own, rule.allow...) {
				t.Errorf("%s imports %s: packages in %s may import only %v, because %s", rel, own, rule.dir, rule.allow, rule.reason)
			}
			for _, f := range fenced {
				if under(imp, f.module) && !under(rel, f.only...) {
					t.Errorf("%s imports %s: only %v may, because %s", rel, imp, f.only, f.reason)
				}
			}
			if imp == "testing" && !under(rel, "channel/channeltest", "conformance") {
				t.Errorf("%s imports testing outside of a test", rel)
			}
		}
	}
}

// The channel package stays light: whoever embeds it gets nothing but these.
func TestChannelClosure(t *testing.T) {
	allowed := []string{"go.uber.org/zap", "go.uber.org/multierr", "github.com/pion/transport/v2",
		"github.com/fxamacker/cbor/v2", "github.com/x448/float16", "golang.org/x/net", "golang.org/x/sys",
		strings.TrimSuffix(module, "/")}
	for _, p := range packages(t) {
		if p.rel() != "channel" {
			continue
		}
		for _, d := range p.Deps {
			if strings.Contains(strings.Split(d, "/")[0], ".") && !under(d, allowed...) {
				t.Errorf("channel depends on %s", d)
			}
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range packages(t) {
		var found []string
		for _, f := range p.GoFiles {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if file.Doc != nil {
				found = append(found, f)
			}
		}
		if len(p.GoFiles) > 0 && len(found) != 1 {
			t.Errorf("%s has %d package comments (%v), want exactly one", p.rel(), len(found), found)
		}
	}
}

// Each interceptor and valve is a folder that third parties can copy: with a
// README of fixed headings, and listed in Builtin.
func TestComponentFolders(t *testing.T) {
	headings := map[string][]string{
		"interceptors": {"Name", "Description", "Options", "Flags", "Placement", "Metrics", "Examples"},
		"valves":       {"Name", "Description", "Options", "Placement", "Metrics", "Examples"},
	}
	for parent, want := range headings {
		builtin, err := os.ReadFile(filepath.Join("..", parent, "builtin.go"))
		if err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(filepath.Join("..", parent))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !e.IsDir() || e.Name() == "internal" || e.Name() == "testdata" {
				continue
			}
			dir := filepath.Join("..", parent, e.Name())
			if !strings.Contains(string(builtin), `/`+parent+`/`+e.Name()+`"`) {
				t.Errorf("%s is not in %s/builtin.go", dir, parent)
			}
			readme, err := os.ReadFile(filepath.Join(dir, "README.md"))
			if err != nil {
				t.Errorf("%s has no README.md", dir)
				continue
			}
			for _, h := range want {
				if !strings.Contains(string(readme), "\n## "+h+"\n") {
					t.Errorf("%s/README.md lacks the heading %q", dir, "## "+h)
				}
			}
		}
	}
}

// The top of the repository is fixed.
func TestTopFolder(t *testing.T) {
	want := []string{"LICENSE", "Makefile", "README.md", "channel", "cmd", "conformance", "core", "go.mod", "go.sum", "interceptors", "plugins", "valves"}
	tracked, err := exec.Command("git", "-C", "..", "ls-files").Output()
	if err != nil {
		t.Skip("not a git checkout; clone the repository to check its top folder")
	}
	for line := range strings.Lines(string(tracked)) {
		top, _, _ := strings.Cut(strings.TrimSpace(line), "/")
		if !strings.HasPrefix(top, ".") && !slices.Contains(want, top) {
			t.Errorf("%s does not belong at the top of the repository", top)
		}
	}
	for _, w := range want {
		if _, err := os.Stat(filepath.Join("..", w)); errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is missing", w)
		}
	}
}
