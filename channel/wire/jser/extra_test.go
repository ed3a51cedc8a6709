package jser

import (
	"bytes"
	"testing"
)

// TestExtraVectors reads what OpenJDK writes of more classes, and writes it again
// to the same bytes.
func TestExtraVectors(t *testing.T) {
	for _, v := range load(t, "extra.json") {
		t.Run(v.Name, func(t *testing.T) {
			raw := unhex(t, v.Hex)
			x, err := Decode(raw, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if out, err := Encode(x); err != nil || !bytes.Equal(out, raw) {
				t.Errorf("encoded again (%v)\ngot  %x\nwant %x", err, out, raw)
			}
		})
	}
}
