package conformance_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/interceptors"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
)

func scenarioParts() conformance.ScenarioParts {
	return conformance.ScenarioParts{
		Interceptors: append(interceptors.Builtin(), channeltest.Chaos()...),
		Memberships:  []channel.Factory[channel.Membership]{multicast.Factory},
	}
}

// Every example scenario passes, and the same seed gives the same events.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/scenarios/*.yaml")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d scenarios, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			first := conformance.RunScenarioFile(t, file, scenarioParts())
			t.Logf("%.0f s of virtual time in %.2f s, %d events", first.Virtual, first.Real, len(first.Events))
			again := conformance.RunScenarioFile(t, file, scenarioParts())
			if !slices.Equal(first.Events, again.Events) {
				t.Errorf("the second run differs:\n%s\n--- second\n%s", strings.Join(first.Events, "\n"), strings.Join(again.Events, "\n"))
			}
		})
	}
}

const wrongScenario = `
name: expects what does not happen
nodes: 2
timeline:
  - {at: 2s, partition: [[1], [2]]}
  - {at: 2s, expect: {views: [[1, 2]], within: 1s}}
  - {at: 20s, expect: {views: [[1, 2]], within: 1s}}
  - {at: 25s, send: {from: 1, to: [2], count: 3}}
finally:
  confirmed: true
  views: [[1, 2]]
`

// Outside of go test too: a scenario whose expectations do not hold fails and
// says which.
func TestMainScenario(t *testing.T) {
	s, err := conformance.ReadScenario("wrong.yaml", []byte(wrongScenario))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	report, code := conformance.MainScenario(s, scenarioParts(), &out)
	if code != 1 || report.Passed || len(report.Failures) != 3 {
		t.Fatalf("code %d, %+v", code, report)
	}
	for _, want := range []string{"wrong.yaml:7", "n1 sees [n1]", "row 0: 3 messages failed", "finally: views", "n1: n2 lost", "failed (3)"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in:\n%s", want, &out)
		}
	}
	s.Timeline, s.Finally = nil, conformance.Finally{}
	if report, code := conformance.MainScenario(s, scenarioParts(), &out); code != 0 || !report.Passed {
		t.Errorf("an empty timeline: code %d, %+v", code, report)
	}
	if report, code := conformance.MainScenario(s, conformance.ScenarioParts{}, &out); code != 2 || report == nil {
		t.Errorf("without components: code %d", code)
	}
}

// The checks can fail: a layer that does harm on the way up is caught.
func TestScenarioNoticesHarm(t *testing.T) {
	for _, c := range []struct{ layer, finally, want string }{
		{"{use: chaos/dup, rate: 0.5, direction: receive}", "delivered: exactly-once", "more than once"},
		{"{use: chaos/drop, rate: 0.5, direction: receive, silent: true}", "delivered: exactly-once", "were not delivered"},
		{"{use: chaos/drop, rate: 0.5, direction: send}", "confirmed: true", "messages failed"},
		{"{use: chaos/shuffle, window: 4}", "ordered: true", "in another order"},
		{"{use: chaos/corrupt, rate: 0.5, bits: 9}", "delivered: at-most-once", "nobody sent"},
	} {
		text := "nodes: 2\nstack: [" + c.layer + "]\nquiet: 10s\ntimeline:\n  - {at: 2s, send: {from: 1, to: [2], count: 100, every: 1ms, size: 100}}\nfinally: {" + c.finally + "}\n"
		s, err := conformance.ReadScenario("harm.yaml", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if report, code := conformance.MainScenario(s, scenarioParts(), &out); code != 1 || !strings.Contains(strings.Join(report.Failures, "\n"), c.want) {
			t.Errorf("%s: code %d, failures %q", c.layer, code, report.Failures)
		}
	}
}

func TestReadScenarioSaysEverything(t *testing.T) {
	_, err := conformance.ReadScenario("bad.yaml", []byte(`
nodes: 3
link: {loss: 2}
timeline:
  - {at: 1s}
  - {at: 1s, crash: 4}
  - {at: 1s, heal: true, stop: 1}
  - {at: 1s, partition: [[1, 2], [2]]}
  - {at: 1s, send: {from: 9, count: -1, options: loud}}
  - {at: -1s, expect: {within: 1s}}
finally: {delivered: maybe}
`))
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{
		"loss is 2", "bad.yaml:5", "it has 0", "bad.yaml:6", "no node 4", "it has 2", "listed twice",
		"no node 9", "count is -1", `"loud"`, "at is -1s", "say views or removed", `"maybe"`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in:\n%v", want, err)
		}
	}
	if _, err := conformance.ReadScenario("bad.yaml", []byte("nodes: 3\ntimelin: []\n")); err == nil || !strings.Contains(err.Error(), "bad.yaml:2") {
		t.Errorf("unknown key: %v", err)
	}
}

// A scenario that somebody wrote is refused or runs to its end within its
// bounds.
func FuzzReadScenario(f *testing.F) {
	files, _ := filepath.Glob("testdata/scenarios/*.yaml")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(wrongScenario))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := conformance.ReadScenario("fuzz.yaml", text)
		if err != nil {
			return
		}
		if s.Nodes < 1 || s.Nodes > 64 || !slices.IsSortedFunc(s.Timeline, func(a, b conformance.Step) int { return int(a.At - b.At) }) {
			t.Errorf("accepted %+v", s)
		}
	})
}
