package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type inner struct {
	Depth int `yaml:"depth"`
}

type options struct {
	inner      `yaml:",inline"`
	Queue      Bytes             `yaml:"queue"`
	QueueBytes int               `yaml:"queue_bytes"`
	Frame      int               `yaml:"frame,bytes"`
	Wait       time.Duration     `yaml:"wait"`
	On         bool              `yaml:"on"`
	Port       uint16            `yaml:"port"`
	Ratio      float64           `yaml:"ratio"`
	Name       string            `yaml:"name"`
	Addr       netip.Addr        `yaml:"addr"`
	List       []string          `yaml:"list"`
	Labels     map[string]string `yaml:"labels"`
	Peers      []inner           `yaml:"peers"`
	Opt        *int              `yaml:"opt"`
	Key        secret.Text       `yaml:"key"`
	Any        any               `yaml:"any"`
	Layer      Component         `yaml:"layer"`
	Pos        Pos               `yaml:"-"`
	hidden     int
}

const everything = `# all kinds
queue: 64MiB
queue_bytes: 1kB
frame: 0x10
wait: 1m30s
on: true
port: 65535
ratio: 0.5
name: 007
addr: 10.0.0.1
list: [a, "b"]
labels: {x: y}
peers:
  - depth: 1
  - depth: 2
opt: 7
key: hunter2
any: {n: 1, l: [true, 1.5, text]}
depth: 3
layer:
  use: dispatch
  mode: direct
  queue: 1MiB
`

func TestDecode(t *testing.T) {
	var o options
	o.hidden = 1
	if err := Decode([]byte(everything), "f.yaml", &o); err != nil {
		t.Fatal(err)
	}
	seven := 7
	want := options{inner: inner{3}, Queue: 64 << 20, QueueBytes: 1000, Frame: 16, Wait: 90 * time.Second, On: true,
		Port: 65535, Ratio: .5, Name: "007", Addr: netip.MustParseAddr("10.0.0.1"), List: []string{"a", "b"},
		Labels: map[string]string{"x": "y"}, Peers: []inner{{1}, {2}}, Opt: &seven, Key: secret.New("hunter2"),
		Any: map[string]any{"n": int64(1), "l": []any{true, 1.5, "text"}}, Pos: Pos{"f.yaml", 2, 1}, hidden: 1,
		Layer: o.Layer}
	if d := cmp.Diff(want, o, cmp.AllowUnexported(options{}, secret.Text{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b Component) bool { return a == b })); d != "" {
		t.Error(d)
	}
	var l struct{ Queue Bytes }
	if err := o.Layer.Decode(&l); err != nil || l.Queue != 1<<20 || o.Layer.Use != "dispatch" || o.Layer.Mode != "direct" {
		t.Errorf("layer %+v: %v, %v", o.Layer, l, err)
	}
	if o.Layer.Pos.Line != 21 {
		t.Errorf("layer is at %v", o.Layer.Pos)
	}
}

func TestDecodeKeepsDefaults(t *testing.T) {
	o := options{Name: "keep", Wait: time.Second, Labels: map[string]string{"a": "1"}}
	if err := Decode([]byte("port: 1\nlabels: {b: '2'}"), "", &o); err != nil {
		t.Fatal(err)
	}
	if o.Name != "keep" || o.Wait != time.Second || o.Port != 1 || len(o.Labels) != 2 {
		t.Errorf("got %+v", o)
	}
	for _, empty := range []string{"", "# nothing", "---\n", "null"} {
		if err := Decode([]byte(empty), "", &o); err != nil || o.Name != "keep" {
			t.Errorf("%q: %v, %+v", empty, err, o)
		}
	}
}

// Each wrong line must be reported with its place, its text and a hint.
func TestDecodeErrors(t *testing.T) {
	tests := []struct{ in, want string }{
		{"nmae: x", `f.yaml:1:1: error: unknown key "nmae"; did you mean "name"?`},
		{"\n\nzzzzzz: x", `f.yaml:3:1: error: unknown key "zzzzzz"; known are depth, queue,`},
		{"peers: [{dept: 1}]", `f.yaml:1:10: error: peers[0]: unknown key "dept"; did you mean "depth"?`},
		{"on: yes", `on: must be true or false, not "yes"; write true or false`},
		{"on: 'true'", `on: must be true or false, not quoted text; remove the quotes`},
		{"port: 65536", `port: 65536 is out of range, 0 to 65535`},
		{"port: -1", `port: -1 is out of range, 0 to 65535`},
		{"depth: 99999999999999999999", `depth: `},
		{"port: '80'", `port: must be a whole number, not quoted text; remove the quotes`},
		{"port: 1.5", `port: must be a whole number, not "1.5"`},
		{"wait: 500", `wait: a duration needs a unit, but 500 has none; write 500ms or 500s`},
		{"wait: soon", `wait: "soon" is not a duration`},
		{"queue: 3 apples", `queue: "3 apples" is not a number of bytes`},
		{"frame: 99999999999GiB", `frame: "99999999999GiB" is too many bytes`},
		{"name: [a]", `name: must be text, not a list`},
		{"list: a", `list: must be a list, not "a"`},
		{"labels: [a]", `labels: must be a mapping, not a list`},
		{"peers: [3]", `peers[0]: must be a mapping, not "3"`},
		{"name:", `name: has no value; write one, or remove the key`},
		{"addr: nowhere", `addr: ParseAddr("nowhere")`},
		{"ratio: .inf", `not a finite number`},
		{"ratio: many", `ratio: must be a number, not "many"`},
		{"key: '***'", `key: *** stands for a secret that was not shown`},
		{"key: ${env:LONGHOUSE_TEST_UNSET}", `key: the environment variable LONGHOUSE_TEST_UNSET is not set`},
		{"key: ${file:/nonexistent/x}", `key: the secret's file: open /nonexistent/x: no such file`},
		{"name: ${env:HOME}", `name: does not take a reference`},
		{"layer: [x]", `layer: must be a component's name`},
		{"layer: {use: x, mode: fast}", `layer.mode: unknown mode "fast"`},
		{"name: a\nname: b", `f.yaml:2:1: error: key "name" is written twice; the first is in line 1`},
		{"name: *x", `unknown alias *x`},
		{"name: !!binary aGk=", `the tag !!binary is not supported`},
		{"a: 1\n---\nb: 2", `more than one YAML document`},
		{"- a", `must be a mapping, not a list`},
		{"name: \"open", `f.yaml:1:`},
		{"a:\n\t- b", `f.yaml:2:`},
	}
	for _, tt := range tests {
		var o options
		err := Decode([]byte(tt.in), "f.yaml", &o)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q:\n got %v\nwant %s", tt.in, err, tt.want)
		}
		var ps Problems
		if !errors.As(err, &ps) || len(ps) != 1 {
			t.Errorf("%q: want one problem, got %v", tt.in, err)
		}
	}
}

func TestDecodeAllAtOnce(t *testing.T) {
	var o options
	err := Decode([]byte("nmae: x\nport: 99999\nok: 1\non: maybe\n"), "f.yaml", &o)
	var ps Problems
	if !errors.As(err, &ps) || len(ps) != 4 {
		t.Fatalf("got %v", err)
	}
	want := "f.yaml:2:7: error: port: 99999 is out of range, 0 to 65535\n    | port: 99999\n    |       ^"
	if got := ps[1].Detail(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestDecodeReferences(t *testing.T) {
	t.Setenv("LONGHOUSE_TEST_SECRET", "s3cret")
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("from file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var o struct{ A, B, C secret.Text }
	in := fmt.Sprintf("a: ${env:LONGHOUSE_TEST_SECRET}\nb: ${file:%s}\nc: plain", file)
	if err := Decode([]byte(in), "", &o); err != nil {
		t.Fatal(err)
	}
	if o.A.Reveal() != "s3cret" || o.B.Reveal() != "from file" || o.C.Reveal() != "plain" {
		t.Errorf("got %q %q %q", o.A.Reveal(), o.B.Reveal(), o.C.Reveal())
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		if s := fmt.Sprintf(verb, o); strings.Contains(s, "s3cret") || strings.Contains(s, "file") || strings.Contains(s, "plain") {
			t.Errorf("%s prints %s", verb, s)
		}
	}
}

// The options of a component survive the way into another process, with their
// lines and with secrets resolved but not shown.
func TestComponentYAML(t *testing.T) {
	t.Setenv("LONGHOUSE_TEST_SECRET", `s3"cret`)
	in := `
layer:
  use: crypt

  key: ${env:LONGHOUSE_TEST_SECRET}
  text: "a\tb\nc\"d\\ é # : {"
  list:
    - 1
    - true
    - 1.5
    - x
  size: 64KiB
  port: 99999
`
	var o struct{ Layer Component }
	if err := Decode([]byte(in), "srv.yaml", &o); err != nil {
		t.Fatal(err)
	}
	data, origin := o.Layer.YAML(), o.Layer.Pos.Origin()
	if origin != "srv.yaml:3" {
		t.Errorf("origin %s", origin)
	}
	t.Setenv("LONGHOUSE_TEST_SECRET", "") // the other process does not have it
	type opts struct {
		Key  secret.Text
		Text string
		List []any
		Size Bytes
		Port int
	}
	var got opts
	if err := Decode(data, origin, &got); err != nil {
		t.Fatalf("%s\n%v", data, err)
	}
	if got.Key.Reveal() != `s3"cret` || got.Text != "a\tb\nc\"d\\ é # : {" || got.Size != 64<<10 || got.Port != 99999 || len(got.List) != 4 {
		t.Errorf("got %+v, key %q", got, got.Key.Reveal())
	}
	var bad struct {
		Key  int
		Text string
		List []any
		Size Bytes
		Port uint16
	}
	err := Decode(data, origin, &bad)
	if err == nil || !strings.Contains(err.Error(), "srv.yaml:13:") || !strings.Contains(err.Error(), "srv.yaml:5:") {
		t.Errorf("got %v", err)
	}
	if strings.Contains(fmt.Sprint(err), "s3") {
		t.Errorf("the error shows the secret: %v", err)
	}
}

func TestDecodeAnchors(t *testing.T) {
	in := "base: &b {depth: 1}\nx:\n  <<: *b\n  other: 2\ny: *b\n"
	got := map[string]map[string]int{}
	if err := Decode([]byte(in), "", &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]map[string]int{"base": {"depth": 1}, "x": {"depth": 1, "other": 2}, "y": {"depth": 1}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestDecodeBounds(t *testing.T) {
	bomb := "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'k'; c++ {
		p := c - 1
		bomb += fmt.Sprintf("%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", c, c, p, p, p, p, p, p, p, p, p, p)
	}
	tests := map[string]string{
		"size":       "a: " + strings.Repeat("x", MaxFile),
		"alias bomb": bomb,
		"flow depth": strings.Repeat("[", 100_000),
		"map depth":  strings.Repeat("{a: ", 100_000),
		"dashes":     strings.Repeat("- ", 100_000),
		"questions":  strings.Repeat("? ", 100_000),
		"tokens":     strings.Repeat("- a\n", 150_000),
		"indent": func() string {
			var b strings.Builder
			for i := range 1000 {
				b.WriteString(strings.Repeat(" ", i) + "a:\n")
			}
			return b.String()
		}(),
	}
	for name, in := range tests {
		t.Run(name, func(t *testing.T) {
			var v any
			start := time.Now()
			if err := Decode([]byte(in), "f", &v); err == nil {
				t.Error("accepted")
			}
			if d := time.Since(start); d > time.Minute { // not a second anywhere
				t.Errorf("took %v", d)
			}
		})
	}
}

func TestBytes(t *testing.T) {
	for in, want := range map[string]Bytes{"0": 0, "1": 1, "64KiB": 65536, "64 MiB": 64 << 20, "1GB": 1e9, "5B": 5, "7kB": 7000} {
		got, err := ParseBytes(in)
		if err != nil || got != want {
			t.Errorf("%s: %d, %v", in, got, err)
		}
		if again, err := ParseBytes(got.String()); err != nil || again != got {
			t.Errorf("%s prints as %s", in, got)
		}
	}
	for _, in := range []string{"", "KiB", "-1", "1.5MiB", "1TiB", "9223372036854775807KiB"} {
		if got, err := ParseBytes(in); err == nil {
			t.Errorf("%q is %d", in, got)
		}
	}
}
