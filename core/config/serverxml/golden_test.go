package serverxml

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/core/config"
)

var rewrite = flag.Bool("rewrite", false, "write what is read into the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// base does not exist, so that no finding depends on the machine.
const base = "/nonexistent/tomcat"

// archive is a txtar file: a comment and named texts.
type archive struct {
	comment string
	names   []string
	texts   map[string]string
}

var marker = regexp.MustCompile(`(?m)^-- (\S+) --\n`)

func readArchive(t testing.TB, file string) archive {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	a := archive{texts: map[string]string{}}
	at := marker.FindAllStringSubmatchIndex(string(data), -1)
	if len(at) == 0 {
		t.Fatalf("%s has no parts", file)
	}
	a.comment = string(data[:at[0][0]])
	for i, m := range at {
		end := len(data)
		if i+1 < len(at) {
			end = at[i+1][0]
		}
		name := string(data[m[2]:m[3]])
		a.names = append(a.names, name)
		a.texts[name] = string(data[m[1]:end])
	}
	return a
}

func (a archive) write(t *testing.T, file string) {
	t.Helper()
	var b bytes.Buffer
	b.WriteString(a.comment)
	for _, n := range a.names {
		fmt.Fprintf(&b, "-- %s --\n%s", n, a.texts[n])
	}
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestGolden reads the first part of every archive and compares the model, as
// YAML, and the findings.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) < 20 {
		t.Fatalf("%d archives, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a := readArchive(t, file)
			got := map[string]string{}
			cfg, err := Read(a.names[0], []byte(a.texts[a.names[0]]), Options{Base: base})
			if err != nil {
				got["want.error"] = err.Error() + "\n"
			} else {
				yaml, err := config.Marshal(cfg)
				if err != nil {
					t.Fatal(err)
				}
				got["want.yaml"], got["want.problems"] = string(yaml), describe(cfg.Warnings)
				if _, err := config.Read("golden.yaml", yaml); err != nil {
					t.Errorf("the YAML is not read back: %v", err)
				}
				said := map[string]bool{}
				for _, p := range cfg.Warnings {
					said[p.Path] = p.Path != ""
				}
				for _, p := range cfg.Validate() {
					if p.Severity == config.Error {
						t.Errorf("the model is not valid: %v", p)
					}
					if said[p.Path] {
						t.Errorf("said twice: %v", p)
					}
				}
			}
			if *rewrite {
				a.names = a.names[:1]
				for _, n := range []string{"want.yaml", "want.problems", "want.error"} {
					if text, ok := got[n]; ok {
						a.names = append(a.names, n)
						a.texts[n] = text
					}
				}
				a.write(t, file)
				return
			}
			want := map[string]string{}
			for _, n := range a.names[1:] {
				want[n] = a.texts[n]
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// describe prints findings, a line for each of their parts.
func describe(ps []config.Problem) string {
	var b strings.Builder
	for _, p := range ps {
		fmt.Fprintf(&b, "%s: %s: %s\n", p.Pos, p.Severity, p.What)
		if p.Why != "" {
			fmt.Fprintf(&b, "    why: %s\n", p.Why)
		}
		if p.Fix != "" {
			fmt.Fprintf(&b, "    do:  %s\n", p.Fix)
		}
	}
	return b.String()
}

// Every finding says where, and an Unavailable or Error one what to do or why.
func TestFindingsAreComplete(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.txtar")
	for _, file := range files {
		a := readArchive(t, file)
		cfg, err := Read(a.names[0], []byte(a.texts[a.names[0]]), Options{Base: base})
		if err != nil {
			var ps config.Problems
			if !errors.As(err, &ps) {
				t.Errorf("%s: %T", file, err)
			}
			continue
		}
		for _, p := range cfg.Warnings {
			if p.Pos.File == "" || p.Pos.Line == 0 || p.What == "" || p.Severity >= config.Unavailable && p.Why == "" && p.Fix == "" {
				t.Errorf("%s: %+v", file, p)
			}
		}
	}
}

func FuzzRead(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.txtar")
	for _, file := range files {
		a := readArchive(f, file)
		f.Add([]byte(a.texts[a.names[0]]))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := Read("fuzz.xml", data, Options{Base: base})
		if err != nil {
			return
		}
		cfg.Validate()
		yaml, err := config.Marshal(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := config.Read("fuzz.yaml", yaml); err != nil {
			t.Fatalf("%v\n%s", err, yaml)
		}
	})
}
