package channel_test

import (
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
)

var rewrite = flag.Bool("rewrite", false, "write the expected output anew")

// golden compares got with a file of testdata.
func golden(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *rewrite {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (run with -rewrite to accept):\n%s", path, got)
	}
}

// fake is a layer with any descriptor that handles both directions.
type fake struct{ d channel.Descriptor }

func (f fake) Descriptor() channel.Descriptor { return f.d }
func (f fake) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	return l.Send(ctx, m)
}
func (f fake) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	return l.Deliver(ctx, m)
}

type mute struct{ d channel.Descriptor }

func (f mute) Descriptor() channel.Descriptor { return f.d }

type twice struct{ fake }

func (twice) Encode(*channel.Message) error { return nil }
func (twice) Decode(*channel.Message) error { return nil }

type member struct{ fake }

func (member) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	return l.Announce(ctx, ev)
}

func detector() channel.Interceptor {
	return member{fake{channel.Descriptor{Name: "failuredetector", Below: []string{channel.UnmarkedTransforms}, Provides: []string{channel.PropCheckedRemoval}, Promise: "checks members"}}}
}

func encrypt() channel.Interceptor {
	return channel.Transform(channel.Descriptor{Name: "encrypt", Mutates: true, Provides: []string{channel.PropEncryption}, Promise: "encrypts bodies"}, nop, nop)
}

func gzip() channel.Interceptor {
	return channel.Transform(channel.Descriptor{Name: "gzip", Mutates: true, Flag: channel.Gzip, Promise: "compresses bodies"}, nop, nop)
}

func queue() channel.Interceptor {
	return fake{channel.Descriptor{Name: "dispatch", Flag: channel.Async, Provides: []string{channel.PropAsync}, Promise: "queues"}}
}

func nop(*channel.Message) error { return nil }

func named(d channel.Descriptor) channel.Interceptor { return fake{d} }

func TestStackErrors(t *testing.T) {
	cases := []struct {
		name   string
		layers []channel.Interceptor
	}{
		{"no interceptor", []channel.Interceptor{nil}},
		{"no name", []channel.Interceptor{named(channel.Descriptor{})}},
		{"handles nothing", []channel.Interceptor{mute{channel.Descriptor{Name: "mute"}}}},
		{"transform without functions", []channel.Interceptor{channel.Transform(channel.Descriptor{Name: "empty"}, nil, nil)}},
		{"both kinds of handlers", []channel.Interceptor{twice{fake{channel.Descriptor{Name: "twice"}}}}},
		{"changes one direction", []channel.Interceptor{
			channel.Transform(channel.Descriptor{Name: "out", Mutates: true}, nop, nil),
			channel.Transform(channel.Descriptor{Name: "in", Mutates: true}, nil, nop),
		}},
		{"flag of the channel", []channel.Interceptor{named(channel.Descriptor{Name: "greedy", Flag: 6})}},
		{"third party flag", []channel.Interceptor{
			named(channel.Descriptor{Name: "acme/low", Flag: 0x200}),
			named(channel.Descriptor{Name: "acme/high", Flag: 0x8000_0000}),
		}},
		{"same flag (CO-06)", []channel.Interceptor{queue(), gzip(), queue(), named(channel.Descriptor{Name: "wide", Flag: 0x300})}},
		{"encryption below the failure detector (IC-17)", []channel.Interceptor{queue(), detector(), encrypt()}},
		{"must be below", []channel.Interceptor{named(channel.Descriptor{Name: "low", Below: []string{"dispatch"}}), queue()}},
		{"must be above", []channel.Interceptor{queue(), named(channel.Descriptor{Name: "top", Above: []string{"dispatch"}})}},
		{"requires what nobody has", []channel.Interceptor{named(channel.Descriptor{Name: "needy", Requires: []string{"order"}})}},
		{"requires what is above", []channel.Interceptor{
			named(channel.Descriptor{Name: "order", Provides: []string{"order"}}),
			named(channel.Descriptor{Name: "needy", Requires: []string{"order"}}),
		}},
		{"everything at once", []channel.Interceptor{detector(), named(channel.Descriptor{Name: "needy", Flag: 1, Requires: []string{"order"}}), encrypt()}},
	}
	var b strings.Builder
	for _, c := range cases {
		var layers []channel.Layer
		for i, l := range c.layers {
			origin := "server.yaml:" + string(rune('1'+i)) + "0"
			if i == 2 {
				origin = "" // from code
			}
			layers = append(layers, channel.Layer{Interceptor: l, Origin: origin})
		}
		_, err := channel.NewStack(layers...)
		if err == nil {
			t.Errorf("%s: accepted", c.name)
			continue
		}
		b.WriteString("# " + c.name + "\n" + err.Error() + "\n\n")
	}
	golden(t, "stack_errors.golden", b.String())
}

func TestStackAccepts(t *testing.T) {
	for name, layers := range map[string][]channel.Interceptor{
		"nothing":                          nil,
		"encryption above":                 {encrypt(), queue(), detector()},
		"marked transform below":           {detector(), gzip()},
		"the same layer twice, no flag":    {named(channel.Descriptor{Name: "x"}), named(channel.Descriptor{Name: "x"})},
		"absent neighbours do not matter":  {named(channel.Descriptor{Name: "x", Above: []string{"y"}, Below: []string{"z"}})},
		"requires what is below":           {named(channel.Descriptor{Name: "x", Requires: []string{channel.PropAsync}}), queue()},
		"third party flag in its range":    {named(channel.Descriptor{Name: "acme/x", Flag: channel.ThirdPartyMin | channel.ThirdPartyMax})},
		"one direction without changes":    {channel.Transform(channel.Descriptor{Name: "in"}, nil, nop)},
		"only started, with a lower layer": {detector(), queue()},
	} {
		var ls []channel.Layer
		for _, l := range layers {
			ls = append(ls, channel.Layer{Interceptor: l})
		}
		if _, err := channel.NewStack(ls...); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func stackOf(t *testing.T, layers ...channel.Interceptor) *channel.Stack {
	t.Helper()
	var ls []channel.Layer
	for i, l := range layers {
		ls = append(ls, channel.Layer{Interceptor: l, Origin: "server.yaml:" + string(rune('1'+i))})
	}
	s, err := channel.NewStack(ls...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStackExplain(t *testing.T) {
	full := stackOf(t, encrypt(), gzip(), named(channel.Descriptor{Name: "order", Mutates: true, Provides: []string{channel.PropOrder}, Promise: "keeps order"}), queue(), detector())
	golden(t, "explain_full.golden", full.Explain())
	golden(t, "explain_empty.golden", stackOf(t).Explain())
	j, err := json.MarshalIndent(full.Layers(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "layers.golden", string(j)+"\n")
}

func TestFingerprint(t *testing.T) {
	if f := stackOf(t, queue(), detector()).Fingerprint(); f != "" {
		t.Errorf("without transforms: %q", f)
	}
	a, b := stackOf(t, gzip(), queue(), encrypt()).Fingerprint(), stackOf(t, encrypt(), gzip()).Fingerprint()
	if a != "gzip:100,encrypt:0" || b != "encrypt:0,gzip:100" {
		t.Errorf("fingerprints are %q and %q", a, b)
	}
	var many []channel.Interceptor
	for range 10 {
		many = append(many, encrypt())
	}
	if f := stackOf(t, many...).Fingerprint(); len(f) > 64 || !strings.HasPrefix(f, "sha256:") || f == stackOf(t, many[1:]...).Fingerprint() {
		t.Errorf("a long fingerprint is %q", f)
	}
}

func TestStackServesOneChannel(t *testing.T) {
	s := stackOf(t, queue())
	c := channel.Config{Stack: s, Sender: noSender{}, Receiver: noReceiver{}}
	if _, err := channel.New(c, channel.Settings{}); err != nil {
		t.Fatal(err)
	}
	if _, err := channel.New(c, channel.Settings{}); err == nil {
		t.Error("a second channel got the same stack")
	}
}

func TestWarnings(t *testing.T) {
	layer := func(name string, wants ...string) channel.Layer {
		same := func(*channel.Message) error { return nil }
		return channel.Layer{Interceptor: channel.Transform(channel.Descriptor{Name: name, Wants: wants}, same, same), Origin: "node.yaml:3"}
	}
	s, err := channel.NewStack(layer("a", "b", "c"), layer("b"))
	if err != nil {
		t.Fatal(err)
	}
	w := s.Warnings()
	if len(w) != 1 || !strings.Contains(w[0], `"a" (node.yaml:3) should be used with "c"`) {
		t.Errorf("warnings: %q", w)
	}
	if !strings.Contains(s.Explain(), "Warning: "+w[0]) {
		t.Error("Explain does not warn")
	}
}
