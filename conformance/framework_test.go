package conformance_test

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
)

var rewrite = flag.Bool("rewrite", false, "write goldens and generated text anew")

// toy is a subject of a kind of its own, for tests of the framework.
type toy struct{ desc conformance.Description }

func (s toy) Describe() (conformance.Description, error) { return s.desc, nil }

func toySubject(features ...string) toy {
	return toy{conformance.Description{
		Kind: "toy", Name: "bear", Version: "1.0.0", Modes: []core.PluginMode{core.Direct, core.Bridged}, Features: features,
		Details: json.RawMessage(`{"size":3,"auth":{"password":"hunter2","user":"me"},"token":"abc"}`),
	}}
}

// toyCheck is a check that does what it is told.
func toyCheck(name string, level conformance.Level, run func(t *conformance.T), features ...string) conformance.Check {
	return conformance.Check{
		ID: "toy/" + name, Profile: "toy", Level: level, Features: features, Requirement: "A toy must " + name + ".", Source: "this test", Run: run,
		Saboteurs: []conformance.Saboteur{{Name: "is a toy", New: func() conformance.Subject { return toySubject() }}},
	}
}

func toyRegistry(t *testing.T, checks ...conformance.Check) conformance.Option {
	t.Helper()
	r, err := conformance.NewRegistry(checks...)
	if err != nil {
		t.Fatal(err)
	}
	return conformance.From(r)
}

// leak is a goroutine that never ends.
func leak() { select {} }

func good(*conformance.T)  {}
func bad(t *conformance.T) { t.Errorf("it is bad <in mode %s>", t.Mode) }

func result(t *testing.T, r *conformance.Report, id string) conformance.Result {
	t.Helper()
	i := slices.IndexFunc(r.Checks, func(c conformance.Result) bool { return c.ID == id })
	if i < 0 {
		t.Fatalf("no result of %s in %+v", id, r.Checks)
	}
	return r.Checks[i]
}

func TestVerdicts(t *testing.T) {
	must, should := conformance.Must, conformance.Should
	flakes := 0
	for _, test := range []struct {
		name    string
		checks  []conformance.Check
		opts    []conformance.Option
		code    int
		profile conformance.Conformance
		first   conformance.Verdict
	}{
		{"good", []conformance.Check{toyCheck("a", must, good)}, nil, 0, conformance.Conformant, conformance.Pass},
		{"bad", []conformance.Check{toyCheck("a", must, bad)}, nil, 1, conformance.NonConformant, conformance.Fail},
		{"leaves a goroutine", []conformance.Check{toyCheck("a", must, func(t *conformance.T) { t.Bubble(func(*conformance.T) { go leak() }) })}, nil, 1, conformance.NonConformant, conformance.Fail},
		{"only in one mode", []conformance.Check{toyCheck("a", must, func(t *conformance.T) {
			if t.Mode == core.Bridged {
				t.Fatal("bad")
			}
		})}, nil, 1, conformance.NonConformant, conformance.Pass},
		{"core skipped", []conformance.Check{toyCheck("a", must, func(t *conformance.T) { t.Skip("no time") }), toyCheck("b", must, good)}, nil, 0, conformance.Partial, conformance.Skip},
		{"taken out", []conformance.Check{toyCheck("a", must, bad), toyCheck("b", must, good)}, []conformance.Option{conformance.Without("toy/a", "broken on purpose")}, 0, conformance.Partial, conformance.Skip},
		{"not declared", []conformance.Check{toyCheck("a", must, bad, "flying"), toyCheck("b", must, good)}, nil, 0, conformance.Conformant, conformance.Skip},
		{"declared and wrong", []conformance.Check{toyCheck("a", must, bad, "fluffy")}, nil, 1, conformance.NonConformant, conformance.Fail},
		{"declared, wrong, withdrawn", []conformance.Check{toyCheck("a", must, bad, "fluffy")}, []conformance.Option{conformance.Features()}, 0, conformance.Conformant, conformance.Skip},
		{"strict", []conformance.Check{toyCheck("a", should, bad)}, []conformance.Option{conformance.Strict()}, 1, conformance.NonConformant, conformance.Fail},
		{"added feature", []conformance.Check{toyCheck("a", must, good, "flying")}, []conformance.Option{conformance.Features("flying")}, 2, "", ""},
		{"unknown mode", []conformance.Check{toyCheck("a", must, good)}, []conformance.Option{conformance.Modes(core.Process)}, 2, "", ""},
		{"unknown profile", []conformance.Check{toyCheck("a", must, good)}, []conformance.Option{conformance.Profile("bear")}, 2, "", ""},
		{"unknown check", []conformance.Check{toyCheck("a", must, good)}, []conformance.Option{conformance.Without("toy/z", "x")}, 2, "", ""},
		{"flaky", []conformance.Check{toyCheck("a", must, func(t *conformance.T) {
			if flakes++; flakes == 2 {
				t.Error("sometimes")
			}
		})}, []conformance.Option{conformance.Repeat(3), conformance.Modes(core.Direct)}, 1, conformance.NonConformant, conformance.Flaky},
	} {
		t.Run(test.name, func(t *testing.T) {
			var log bytes.Buffer
			r, code := conformance.Main(toySubject("fluffy"), append(test.opts, toyRegistry(t, test.checks...), conformance.LogTo(&log), conformance.Seed(7))...)
			if code != test.code || code != r.Code() {
				t.Fatalf("code %d, want %d: %s", code, test.code, log.String())
			}
			if code == 2 {
				if r.Error == "" {
					t.Error("the report does not say why")
				}
				return
			}
			if r.Profiles[0].Result != test.profile {
				t.Errorf("%s, want %s", r.Profiles[0].Result, test.profile)
			}
			if got := result(t, r, "toy/a"); got.Result != test.first {
				t.Errorf("first result %+v, want %s", got, test.first)
			}
			if !strings.Contains(log.String(), "seed 7") {
				t.Errorf("the seed is not printed: %s", log.String())
			}
		})
	}
}

// A check of level Should is left alone unless strict.
func TestShouldIsLeftOut(t *testing.T) {
	r, code := conformance.Main(toySubject(), toyRegistry(t, toyCheck("a", conformance.Should, bad), toyCheck("b", conformance.Must, good)))
	if code != 0 || len(r.Checks) != 2 {
		t.Errorf("code %d, %+v", code, r.Checks)
	}
}

func TestKnownFailing(t *testing.T) {
	tomorrow := time.Now().AddDate(0, 0, 1).Format(time.DateOnly)
	for _, test := range []struct {
		name, file string
		run        func(t *conformance.T)
		code       int
		want       conformance.Verdict
		says       string
	}{
		{"as expected", "# list\ntoy/a " + tomorrow + " not written yet # really\n", bad, 0, conformance.XFail, ""},
		{"passes now", "toy/a " + tomorrow + " not written yet\n", good, 1, conformance.XPass, ""},
		{"too old", "toy/a 2020-01-01 not written yet\n", bad, 2, "", "the date of toy/a has passed"},
		{"no reason", "toy/a " + tomorrow + "\n", bad, 2, "", ":1: want the id"},
		{"no such check", "toy/b " + tomorrow + " x\n", bad, 2, "", `no check "toy/b"`},
		{"no date", "toy/a soon x\n", bad, 2, "", "2006-01-02"},
	} {
		t.Run(test.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "known")
			if err := os.WriteFile(file, []byte(test.file), 0o600); err != nil {
				t.Fatal(err)
			}
			r, code := conformance.Main(toySubject(), toyRegistry(t, toyCheck("a", conformance.Must, test.run)), conformance.KnownFailing(file))
			if code != test.code || !strings.Contains(r.Error, test.says) {
				t.Fatalf("code %d, error %q", code, r.Error)
			}
			if test.want != "" && result(t, r, "toy/a").Result != test.want {
				t.Errorf("%+v", result(t, r, "toy/a"))
			}
		})
	}
}

// The same seed gives the same randomness, another one another.
func TestSeedRepeats(t *testing.T) {
	draw := func(seed uint64) (s string) {
		conformance.Main(toySubject(), conformance.Seed(seed), toyRegistry(t, toyCheck("a", conformance.Must, func(t *conformance.T) {
			s += fmt.Sprint(t.Rand("x").Uint64(), t.Rand("y").Uint64())
		})))
		return s
	}
	if a, b := draw(1), draw(1); a != b || a == draw(2) {
		t.Errorf("%s, %s", a, b)
	}
}

// A check that hangs is given up, and the report is written all the same.
func TestStuck(t *testing.T) {
	never := make(chan struct{})
	defer close(never)
	times := conformance.DefaultTimeouts()
	times.Check = 50 * time.Millisecond
	var tested []string
	r, code := conformance.Main(toySubject(), conformance.WithTimeouts(times), conformance.ArtefactsTo(t.TempDir()),
		conformance.Progress(func(r conformance.Result) { tested = append(tested, r.ID) }),
		conformance.Modes(core.Direct),
		toyRegistry(t, toyCheck("before", conformance.Must, good), toyCheck("a", conformance.Must, func(*conformance.T) { <-never }), toyCheck("after", conformance.Must, good)))
	got := result(t, r, "toy/a")
	if code != 1 || got.Result != conformance.Fail || !strings.Contains(got.Message, "stuck") || len(got.Artefact) != 1 || !slices.Equal(tested, []string{"toy/before", "toy/a"}) {
		t.Errorf("code %d, %+v, tested %v", code, got, tested)
	}
}

func TestRegistryRefuses(t *testing.T) {
	ok := toyCheck("a", conformance.Must, good)
	unsabotaged, nameless, foreign := ok, ok, ok
	unsabotaged.Saboteurs = nil
	nameless.Requirement = ""
	foreign.Profile = "other"
	for _, checks := range [][]conformance.Check{{ok, ok}, {unsabotaged}, {nameless}, {foreign}} {
		if _, err := conformance.NewRegistry(checks...); err == nil {
			t.Errorf("accepted: %+v", checks)
		}
	}
}

// golden compares text with a file, or writes the file.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s (go test -rewrite writes it):\ngot  %s\nwant %s", path, got, want)
	}
}

func TestReportFormats(t *testing.T) {
	r, _ := conformance.Main(toySubject("fluffy", "soft"), conformance.Seed(99), conformance.Without("toy/left-out", "no reason"), toyRegistry(t,
		toyCheck("good", conformance.Must, good), toyCheck("bad", conformance.Must, bad), toyCheck("left-out", conformance.Must, good),
		toyCheck("fluffy", conformance.Must, good, "fluffy"), toyCheck("flies", conformance.Must, good, "flying")))
	// What changes from run to run.
	r.Date, r.Suite.Commit = time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC), ""
	r.Host = conformance.HostInfo{Go: "go1.26", OS: "linux", Arch: "amd64"}
	for i := range r.Checks {
		r.Checks[i].Seconds = 0.25
	}
	for name, write := range map[string]func(io.Writer) error{"report.json": r.WriteJSON, "report.xml": r.WriteJUnit} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Fatal(err)
		}
		for _, secret := range []string{"hunter2", "abc"} {
			if strings.Contains(b.String(), secret) {
				t.Errorf("%s holds a secret", name)
			}
		}
		golden(t, name, b.Bytes())
	}
	var b bytes.Buffer
	_ = r.WriteJSON(&b)
	again, err := conformance.ReadReport(&b)
	if err != nil || again.Summary() != r.Summary() {
		t.Errorf("read back: %v\n%s\n%s", err, again.Summary(), r.Summary())
	}
	if _, err := conformance.ReadReport(strings.NewReader(`{"version": 2}`)); err == nil {
		t.Error("a report of another version is read")
	}
	b.Reset()
	_ = r.WriteJUnit(&b)
	if err := xml.Unmarshal(b.Bytes(), new(struct{ XMLName xml.Name })); err != nil {
		t.Error(err)
	}
}

const (
	tableBegin = "<!-- checks: written by go test -run Readme -rewrite -->\n"
	tableEnd   = "<!-- end of checks -->\n"
)

// The table of checks in the README is that of the registry.
func TestReadmeTable(t *testing.T) {
	raw, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		t.Fatal("README.md has no place for the table")
	}
	var b strings.Builder
	reg := conformance.Builtin()
	for _, p := range reg.Profiles() {
		fmt.Fprintf(&b, "\n### %s\n\n| Check | Level | If declared | Requirement | Saboteurs |\n| --- | --- | --- | --- | --- |\n", p)
		for _, c := range reg.Profile(p) {
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %d |\n", c.ID, c.Level, strings.Join(c.Features, ", "), c.Requirement, len(c.Saboteurs))
		}
	}
	fmt.Fprintf(&b, "\n%d checks.\n\n", len(reg.Checks()))
	want := before + tableBegin + b.String() + tableEnd + after
	if *rewrite {
		if err := os.WriteFile("README.md", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if want != string(raw) {
		t.Error("the table of checks is not up to date: go test ./conformance -run Readme -rewrite")
	}
}
