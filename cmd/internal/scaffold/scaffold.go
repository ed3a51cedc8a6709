package scaffold

import (
	"bufio"
	"bytes"
	"embed"
	"errors"
	"fmt"
	"go/format"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/template"
)

//go:embed templates
var templates embed.FS

// Longhouse is the path of the module that plugins import.
const Longhouse = "github.com/longhouse-go/longhouse"

// The styles of an interceptor.
const (
	// Transform is two functions that change messages in place.
	Transform = "transform"
	// Handlers are methods that pass messages on themselves.
	Handlers = "handlers"
)

// Kinds lists what can be written.
func Kinds() []string {
	return []string{"interceptor", "valve", "membership", "manager", "manager-store", "deployer"}
}

// Options says what to write.
type Options struct {
	// Kind is one of Kinds; Name is vendor/name.
	Kind, Name string
	// Style is that of an interceptor; empty is Transform.
	Style string
	// Module is the path of the new module; empty is example.com/vendor/name.
	Module string
	// Dir is the folder to write to. It is made, or must be empty.
	Dir string
	// Source is a folder with the source of longhouse, which the new module's
	// go.mod refers to unless Version is set.
	Source string
	// Version is the published version of longhouse that the new module
	// requires.
	Version string
}

// values are what templates see.
type values struct {
	Name, Base, Package, Metric, Module, Longhouse string
}

var name = regexp.MustCompile(`^[a-z][a-z0-9-]{0,63}/[a-z][a-z0-9-]{0,63}$`)

// Write writes the folder and returns the names of its files.
func Write(o Options) ([]string, error) {
	v, folder, err := o.resolve()
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for from, to := range map[string]string{
		folder + "/NAME.go.tmpl":      v.Package + ".go",
		folder + "/NAME_test.go.tmpl": v.Package + "_test.go",
		folder + "/README.md.tmpl":    "README.md",
		o.Kind + ".main.tmpl":         filepath.Join("cmd", v.Base, "main.go"),
	} {
		text, err := expand(from, v)
		if err != nil {
			return nil, err
		}
		files[to] = text
	}
	if files["go.mod"], files["go.sum"], err = o.modules(v.Module); err != nil {
		return nil, err
	}
	if err := claim(o.Dir); err != nil {
		return nil, err
	}
	var names []string
	for file, text := range files {
		if len(text) == 0 {
			continue
		}
		path := filepath.Join(o.Dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, fmt.Errorf("scaffold: %w", err)
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return nil, fmt.Errorf("scaffold: %w", err)
		}
		names = append(names, file)
	}
	slices.Sort(names)
	return names, nil
}

// resolve fills in what the options leave open.
func (o *Options) resolve() (v values, folder string, err error) {
	if o.Kind == "store" {
		o.Kind = "manager-store"
	}
	if !slices.Contains(Kinds(), o.Kind) {
		return v, "", fmt.Errorf("scaffold: no kind %q (known: %s)", o.Kind, strings.Join(Kinds(), ", "))
	}
	if !name.MatchString(o.Name) {
		return v, "", fmt.Errorf("scaffold: %q is not vendor/name: lower-case letters, digits and dashes, as in acme/zstd", o.Name)
	}
	_, base, _ := strings.Cut(o.Name, "/")
	pkg := strings.ReplaceAll(base, "-", "")
	if token.IsKeyword(pkg) || pkg == "main" {
		return v, "", fmt.Errorf("scaffold: %q cannot be the name of a Go package; choose another", pkg)
	}
	if o.Module == "" {
		o.Module = "example.com/" + o.Name
	}
	folder = o.Kind
	if o.Kind == "interceptor" {
		switch o.Style {
		case "", Transform:
			o.Style = Transform
		case Handlers:
		default:
			return v, "", fmt.Errorf("scaffold: no style %q (known: %s, %s)", o.Style, Transform, Handlers)
		}
		folder += "-" + o.Style
	} else if o.Style != "" {
		return v, "", fmt.Errorf("scaffold: only interceptors have a style")
	}
	return values{
		Name: o.Name, Base: base, Package: pkg, Module: o.Module, Longhouse: Longhouse,
		Metric: strings.NewReplacer("/", "_", "-", "_").Replace(o.Name),
	}, folder, nil
}

func expand(file string, v values) ([]byte, error) {
	text, err := templates.ReadFile("templates/" + file)
	if err != nil {
		return nil, fmt.Errorf("scaffold: %w", err)
	}
	t, err := template.New(file).Option("missingkey=error").Parse(string(text))
	if err != nil {
		return nil, fmt.Errorf("scaffold: %w", err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, v); err != nil {
		return nil, fmt.Errorf("scaffold: %w", err)
	}
	if strings.HasSuffix(file, ".md.tmpl") {
		return b.Bytes(), nil
	}
	code, err := format.Source(b.Bytes())
	if err != nil {
		return nil, fmt.Errorf("scaffold: %s: %w", file, err)
	}
	return code, nil
}

// claim makes the folder, or makes sure that nothing of the user's is in it.
func claim(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return os.MkdirAll(dir, 0o755)
	case err != nil:
		return fmt.Errorf("scaffold: %w", err)
	case len(entries) > 0:
		return fmt.Errorf("scaffold: %s is not empty: choose another folder with --dir", dir)
	}
	return nil
}

// modules returns go.mod and go.sum. The requirements of longhouse are copied,
// so that neither a network nor "go mod tidy" is needed.
func (o *Options) modules(module string) (mod, sum []byte, err error) {
	if o.Source == "" {
		if o.Version == "" {
			return nil, nil, errors.New("scaffold: neither a source of longhouse nor a published version is known")
		}
		return fmt.Appendf(nil, "module %s\n\ngo 1.26.0\n\nrequire %s %s\n", module, Longhouse, o.Version), nil, nil
	}
	source, err := filepath.Abs(o.Source)
	if err != nil {
		return nil, nil, fmt.Errorf("scaffold: %w", err)
	}
	own, err := os.ReadFile(filepath.Join(source, "go.mod"))
	if err != nil {
		return nil, nil, fmt.Errorf("scaffold: the source of longhouse: %w", err)
	}
	if sum, err = os.ReadFile(filepath.Join(source, "go.sum")); err != nil {
		return nil, nil, fmt.Errorf("scaffold: the source of longhouse: %w", err)
	}
	goVersion, required, ok := requirements(own)
	if !ok {
		return nil, nil, fmt.Errorf("scaffold: %s is not the source of %s", source, Longhouse)
	}
	var b bytes.Buffer
	version := o.Version
	if version == "" {
		version = "v0.0.0"
	}
	fmt.Fprintf(&b, "module %s\n\ngo %s\n\nrequire %s %s\n\nrequire (\n", module, goVersion, Longhouse, version)
	for _, r := range required {
		fmt.Fprintf(&b, "\t%s // indirect\n", r)
	}
	b.WriteString(")\n")
	if o.Version == "" {
		fmt.Fprintf(&b, "\n// Until longhouse is published: the source that this was made from.\nreplace %s => %s\n", Longhouse, quoted(source))
	}
	return b.Bytes(), sum, nil
}

// quoted writes a path as go.mod wants it.
func quoted(path string) string {
	if strings.ContainsAny(path, " \t\"'`()[]{},") {
		return "\"" + path + "\""
	}
	return path
}

// requirements reads the parts of longhouse's go.mod that are needed; ok says
// that it is longhouse's.
func requirements(mod []byte) (goVersion string, required []string, ok bool) {
	inBlock := false
	for lines := bufio.NewScanner(bytes.NewReader(mod)); lines.Scan(); {
		line, _, _ := strings.Cut(lines.Text(), "//")
		words := strings.Fields(line)
		switch {
		case len(words) == 0:
		case words[0] == "module":
			ok = len(words) == 2 && words[1] == Longhouse
		case words[0] == "go":
			goVersion = words[1]
		case words[0] == ")":
			inBlock = false
		case words[0] == "require" && words[1] == "(":
			inBlock = true
		case words[0] == "require" && len(words) == 3:
			required = append(required, words[1]+" "+words[2])
		case inBlock && len(words) == 2:
			required = append(required, words[0]+" "+words[1])
		}
	}
	return goVersion, required, ok
}

// FindSource returns the folder with the source of longhouse that a file of it
// was compiled from, and whether there is one: it is gone on other machines, and
// unknown in programs built with -trimpath.
func FindSource(file string) (string, bool) {
	for dir := filepath.Dir(file); filepath.IsAbs(dir); dir = filepath.Dir(dir) {
		if mod, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil {
			_, _, ok := requirements(mod)
			return dir, ok
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	return "", false
}
