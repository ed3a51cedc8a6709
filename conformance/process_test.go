package conformance_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/sdk"
)

// flipConfig and newFlip are a third party's interceptor.
type flipConfig struct {
	Min      int    `yaml:"min" default:"4" validate:"min=1,max=1000" doc:"shorter bodies are left alone"`
	Password string `yaml:"password" secret:"true"`
}

const flipFlag = channel.ThirdPartyMin << 2

func newFlip(c flipConfig, _ channel.Settings) (channel.Interceptor, error) {
	flip := func(m *channel.Message) {
		for i := range m.Body {
			m.Body[i] ^= 0xff
		}
		m.Options ^= flipFlag
	}
	return channel.Transform(channel.Descriptor{Name: "acme/flip", Flag: flipFlag, Mutates: true},
		func(m *channel.Message) error {
			if m.Options &^= flipFlag; len(m.Body) >= c.Min {
				flip(m)
			}
			return nil
		}, func(m *channel.Message) error {
			if m.Options.Has(flipFlag) {
				flip(m)
			}
			return nil
		}), nil
}

// newWrong forwards messages with another body.
func newWrong(c flipConfig, s channel.Settings) (channel.Interceptor, error) {
	return channel.Transform(channel.Descriptor{Name: "acme/flip", Flag: flipFlag, Mutates: true},
		func(m *channel.Message) error { m.Body = append(m.Body, 'x'); return nil },
		func(*channel.Message) error { return nil }), nil
}

// served makes the test binary a plugin program.
func served() {
	if len(os.Args) < 2 || os.Args[1] != "describe" && os.Args[1] != "plugin" {
		return
	}
	sdk.Main(sdk.Interceptor("acme/flip", "1.2.3", newFlip), sdk.Interceptor("acme/wrong", "0.1.0", newWrong))
}

func flipSubject() conformance.Subject {
	return conformance.Interceptor(newFlip, flipConfig{Min: 2, Password: "hunter2"})
}

// The same source is conformant compiled in, bridged and as a process.
func TestThirdPartyInterceptor(t *testing.T) {
	conformant(t, flipSubject())
	r := conformance.Run(t, conformance.Process(os.Args[0]).Component("interceptor/acme/flip"))
	if len(r.Profiles) == 0 || r.Profiles[0].Result == conformance.NonConformant || r.Subject.SHA256 == "" || r.Subject.Version != "1.2.3" {
		t.Errorf("report: %+v %+v", r.Subject, r.Profiles)
	}
}

// Main is the same suite outside of go test, here in a program that is built
// for the purpose.
func TestMainInProgram(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "conform")
	build := exec.Command("go", "build", "-o", program, "./testdata/conform")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	run := func(what string, args ...string) (code int, output string, r *conformance.Report) {
		t.Helper()
		report := filepath.Join(dir, what+".json")
		cmd := exec.CommandContext(t.Context(), program, append([]string{what, report}, args...)...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		_ = cmd.Run() // the code says it
		f, err := os.Open(report)
		if err != nil {
			t.Fatalf("%s: %v\n%s", what, err, out.String())
		}
		defer f.Close()
		if r, err = conformance.ReadReport(f); err != nil {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), out.String(), r
	}
	code, out, r := run("good")
	if code != 0 || !strings.Contains(out, "seed 42") || r.Seed != 42 || r.Profiles[0].Result != conformance.Conformant {
		t.Errorf("good: code %d, %+v\n%s", code, r.Profiles, out)
	}
	code, out, r = run("wrong")
	i := slices.IndexFunc(r.Checks, func(c conformance.Result) bool { return c.ID == "interceptor/round-trip" && c.Mode == core.Direct })
	if code != 1 || r.Profiles[0].Result != conformance.NonConformant || i < 0 || r.Checks[i].Result != conformance.Fail || !strings.Contains(r.Checks[i].Message, "arrived as") {
		t.Errorf("wrong: code %d, %+v\n%s", code, r.Profiles, out)
	}
	if code, _, r = run("broken"); code != 2 || !strings.Contains(r.Error, "cannot be made") {
		t.Errorf("broken: code %d, %q", code, r.Error)
	}
}

// A process that is not conformant is found out, and the check is named.
func TestWrongProcess(t *testing.T) {
	var out bytes.Buffer
	r, code := conformance.Main(conformance.Process(os.Args[0]).Component("interceptor/acme/wrong"),
		conformance.Only("round-trip"), conformance.LogTo(&out))
	if code != 1 || len(r.Checks) != 1 || r.Checks[0].Result != conformance.Fail || r.Checks[0].Mode != core.Process {
		t.Errorf("code %d, checks %+v\n%s", code, r.Checks, out.String())
	}
	if _, code := conformance.Main(conformance.Process(os.Args[0])); code != 2 {
		t.Errorf("two components and no choice: code %d", code)
	}
	if _, code := conformance.Main(conformance.Process(filepath.Join(t.TempDir(), "none"))); code != 2 {
		t.Errorf("no program: code %d", code)
	}
}

// Secrets stay out of reports.
func TestRedaction(t *testing.T) {
	r, _ := conformance.Main(flipSubject(), conformance.Only("^$"))
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "hunter2") || !strings.Contains(string(b), `"password":"***"`) {
		t.Errorf("report: %s", b)
	}
}
