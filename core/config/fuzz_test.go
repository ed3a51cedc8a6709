package config

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Whatever is read is either refused with a place or can be written and read
// again.
func FuzzRead(f *testing.F) {
	f.Add([]byte(everything))
	f.Add([]byte("cluster: {send: sync}\nconnectors: [{address: ':80'}]"))
	f.Add([]byte("a: &x [*x]\n<<: *x"))
	f.Add([]byte(full))
	f.Add(defaultYAML)
	f.Add([]byte("? a\n: b\n--- |\n x\n..."))
	f.Fuzz(func(t *testing.T, data []byte) {
		var v any
		if err := Decode(data, "fuzz", &v); err != nil && err.Error() == "" {
			t.Fatal("an error without words")
		}
		c, err := Read("fuzz", data)
		if err != nil {
			return
		}
		c.Validate()
		out, err := Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Read("again", out)
		if err != nil {
			t.Fatalf("%s\n%v", out, err)
		}
		if d := cmp.Diff(c, again, same); d != "" && !bytes.Contains(out, []byte(redacted)) {
			t.Fatalf("%s\n%s", d, out)
		}
		for _, v := range c.Engine.Valves {
			var o, again map[string]any
			if err := v.Decode(&o); err != nil {
				continue
			}
			if err := Decode(v.YAML(), v.Pos.Origin(), &again); err != nil {
				t.Fatalf("%s\n%v", v.YAML(), err)
			}
			if d := cmp.Diff(o, again, cmpopts.EquateEmpty()); d != "" {
				t.Fatalf("%s\n%s", v.YAML(), d)
			}
		}
	})
}
