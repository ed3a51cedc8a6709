package config

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/longhouse-go/longhouse/channel/secret"
)

type tagged struct {
	MinSize int           `yaml:"min_size" default:"1KiB" validate:"min=1,max=64KiB" doc:"bodies smaller than this are left alone"`
	Level   string        `yaml:"level" default:"fast" validate:"oneof=fast best"`
	Wait    time.Duration `yaml:"wait" default:"500ms" validate:"min=1ms,max=1h"`
	Frame   Bytes         `yaml:"frame" default:"64MiB" validate:"min=1KiB"`
	On      bool          `yaml:"on" default:"true"`
	Ratio   float64       `yaml:"ratio" default:"0.5" validate:"min=0,max=1"`
	Ports   []int         `yaml:"ports" default:"[80, 443]" validate:"min=1,max=3"`
	Words   []string      `yaml:"words" default:"a b" validate:"oneof=a b c"`
	Small   int8          `yaml:"small"`
	Count   uint16        `yaml:"count"`
	Nested  struct {
		Depth int `yaml:"depth" default:"3"`
	} `yaml:"nested"`
	Peers []peer            `yaml:"peers"`
	Key   secret.Text       `yaml:"key" validate:"min=8" doc:"encrypts"`
	Tags  map[string]string `yaml:"tags"`
	Extra any               `yaml:"extra"`
}

type peer struct {
	Host string `yaml:"host" validate:"required"`
	Port int    `yaml:"port" default:"4000"`
}

func TestTagDefaults(t *testing.T) {
	var c tagged
	c.Ratio = 0.25 // kept
	if err := Defaults(&c); err != nil {
		t.Fatal(err)
	}
	want := tagged{MinSize: 1024, Level: "fast", Wait: 500 * time.Millisecond, Frame: 64 << 20, On: true, Ratio: 0.25,
		Ports: []int{80, 443}, Words: []string{"a", "b"}}
	want.Nested.Depth = 3
	if d := cmp.Diff(want, c, cmp.AllowUnexported(secret.Text{})); d != "" {
		t.Error(d)
	}
	if err := Decode([]byte("peers: [{host: x}, {host: y, port: 1}]"), "f", &c); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]peer{{"x", 4000}, {"y", 1}}, c.Peers); d != "" {
		t.Error(d)
	}
}

func TestWrongTags(t *testing.T) {
	for _, test := range []struct {
		into any
		want string
	}{
		{tagged{}, "not a pointer to a struct"},
		{&struct {
			A int `default:"many"`
		}{}, "whole number"},
		{&struct {
			A int `default:"0" validate:"min=1"`
		}{}, "is 0, must be at least 1"},
		{&struct {
			A int `default:"2" validate:"least=1"`
		}{}, `unknown rule "least"`},
		{&struct {
			A bool `default:"true" validate:"min=1"`
		}{}, "has no bounds"},
		{&struct {
			A secret.Text `default:"hunter22"`
		}{}, "a secret has no default"},
	} {
		if err := Defaults(test.into); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%T: %v, want %q", test.into, err, test.want)
		}
	}
}

// texts are options, and whether the configuration takes them.
var texts = []struct {
	text string
	want string // part of the error; empty if all is well
}{
	{"", ""},
	{"min_size: 1", ""},
	{"min_size: 64KiB", ""},
	{"min_size: 0", "must be at least 1"},
	{"min_size: 65KiB", "must be at most 64KiB"},
	{"min_size: -1", ""}, // refused by both, in other words
	{"min_size: lots", "lots"},
	{"level: best", ""},
	{"level: worst", `"worst" is none of fast, best`},
	{"wait: 1s", ""},
	{"wait: 5", "unit"},
	{"wait: 2h", "must be at most 1h"},
	{"wait: soon", "soon"},
	{"frame: 2048", ""},
	{"frame: 12", "must be at least 1KiB"},
	{"frame: x", "x"},
	{"on: yes", "true or false"},
	{"on: false", ""},
	{"ratio: 1", ""},
	{"ratio: 1.5", "1"},
	{"ports: []", "length 0"},
	{"ports: [1, 2, 3, 4]", "length 4"},
	{"ports: [x]", "whole number"},
	{"ports: 80", "a list"},
	{"words: [a, c]", ""},
	{"words: [a, d]", `"d" is none of`},
	{"small: 127", ""},
	{"small: 128", "out of range"},
	{"count: -1", "out of range"},
	{"count: 65536", "out of range"},
	{"nested: {depth: 2}", ""},
	{"nested: {dept: 2}", `did you mean "depth"`},
	{"nested: 3", "a mapping"},
	{"peers: [{port: 1}]", "host: is missing"},
	{"peers: [{host: x}]", ""},
	{"key: short", "length 5"},
	{"key: long enough", ""},
	{"tags: {a: b}", ""},
	{"tags: [a]", "a mapping"},
	{"extra: [1, {a: b}]", ""},
	{"unknown: 1", `unknown key "unknown"`},
	{"level: ${env:HOME}", "does not take a reference"},
}

// The schema of a configuration accepts what the decoder accepts, and nothing
// else; both say where a mistake stands.
func TestSchemaAgreesWithDecode(t *testing.T) {
	schema := SchemaOf(&tagged{})
	if err := CheckSchema(schema); err != nil {
		t.Fatal(err)
	}
	for _, test := range texts {
		var c tagged
		if err := Defaults(&c); err != nil {
			t.Fatal(err)
		}
		decode := Decode([]byte(test.text), "node.yaml:7", &c)
		check := CheckOptions([]byte(test.text), "node.yaml:7", schema)
		if (decode == nil) != (check == nil) {
			t.Errorf("%q: decode says %v, the schema %v", test.text, decode, check)
		}
		if test.want == "" {
			if decode != nil && !strings.HasPrefix(test.text, "min_size: -1") {
				t.Errorf("%q: %v", test.text, decode)
			}
			continue
		}
		for who, err := range map[string]error{"decode": decode, "schema": check} {
			if err == nil || !strings.Contains(err.Error(), "node.yaml:7:") {
				t.Errorf("%q: %s says %v, want the place", test.text, who, err)
			}
		}
		if decode != nil && !strings.Contains(decode.Error(), test.want) {
			t.Errorf("%q: decode says %v, want %q", test.text, decode, test.want)
		}
	}
}

func TestRequiredWithoutOptions(t *testing.T) {
	pos := Pos{File: "node.yaml", Line: 3, Col: 5}
	for name, err := range map[string]error{
		"component": NewComponent("x", nil, pos).Decode(&peer{}),
		"text":      Decode(nil, "node.yaml:3", &peer{}),
		"schema":    CheckOptions(nil, "node.yaml:3", SchemaOf(peer{})),
	} {
		if err == nil || !strings.Contains(err.Error(), "host: is missing") {
			t.Errorf("%s: %v, want that host is missing", name, err)
		}
	}
}

func TestSchemaOf(t *testing.T) {
	var got struct {
		Properties map[string]map[string]any
	}
	if err := json.Unmarshal(SchemaOf(tagged{}), &got); err != nil {
		t.Fatal(err)
	}
	p := got.Properties
	if p["key"]["writeOnly"] != true || p["key"]["description"] != "encrypts" {
		t.Errorf("key: %v", p["key"])
	}
	if p["min_size"]["default"] != "1KiB" || p["wait"]["default"] != "500ms" || p["on"]["default"] != true {
		t.Errorf("defaults: %v, %v, %v", p["min_size"], p["wait"], p["on"])
	}
	if d := cmp.Diff([]any{"fast", "best"}, p["level"]["enum"]); d != "" {
		t.Error(d)
	}
	var none struct{ Properties map[string]any }
	if err := json.Unmarshal(SchemaOf(nil), &none); err != nil || len(none.Properties) != 0 {
		t.Errorf("no configuration: %v, %v", none, err)
	}
}

// A secret is never part of a message.
func TestSecretsInMessages(t *testing.T) {
	schema := SchemaOf(tagged{})
	for _, text := range []string{"key: hunter2", "key: !secret hunter2"} {
		for _, err := range []error{Decode([]byte(text), "f", &tagged{}), CheckOptions([]byte(text), "f", schema)} {
			if err == nil {
				t.Errorf("%q was accepted", text)
				continue
			}
			if strings.HasPrefix(text, "key: !secret") && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%q: the message shows the secret: %v", text, err)
			}
		}
	}
}

func FuzzCheckOptions(f *testing.F) {
	schema := string(SchemaOf(tagged{}))
	for _, t := range texts {
		f.Add(t.text, schema)
	}
	f.Add("a: 1", `{"type":"object","additionalProperties":{"enum":[1,null]}}`)
	f.Add("a: 1", `{"type":["object"],"properties":{"a":null},"items":false}`)
	f.Fuzz(func(t *testing.T, text, schema string) {
		_ = CheckOptions([]byte(text), "f:1", []byte(schema))
	})
}

func TestComponentSplit(t *testing.T) {
	var c struct{ List []Component }
	if err := Decode([]byte("list:\n  - use: x\n    on_down: wait\n    level: 3\n  - y\n"), "f", &c); err != nil {
		t.Fatal(err)
	}
	with, without := c.List[0].Split("on_down", "window")
	if d := cmp.Diff(map[string]any{"on_down": "wait"}, with.Options()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(map[string]any{"level": int64(3)}, without.Options()); d != "" || without.Use != "x" || without.Pos != c.List[0].Pos {
		t.Error(d, without)
	}
	var wrong struct{ Level bool }
	if err := without.Decode(&wrong); err == nil || !strings.Contains(err.Error(), "f:4:12") {
		t.Errorf("%v, want the place", err)
	}
	if with, without := c.List[1].Split("a"); with.Options() != nil || without.Options() != nil {
		t.Error("options from nowhere")
	}
}
