package jser

import (
	"bytes"
	"net/netip"
	"testing"
)

var channelHost = netip.MustParseAddr("127.0.0.1")

func seeds(f *testing.F) {
	for _, file := range append(files, "extra.json") {
		for _, v := range load(f, file) {
			if b := unhex(f, v.Hex); len(b) < 4000 {
				f.Add(b)
			}
		}
	}
	f.Add(nest(50))
}

// FuzzParse: whatever is accepted is written to a stream that reads and writes
// as the same.
func FuzzParse(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, keep := range []bool{false, true} {
			l := Limits{Size: 1 << 16, Expanded: 1 << 20, KeepUnlisted: keep}
			items, err := Parse(b, l)
			if err != nil {
				if Reason(err) == "other" {
					t.Fatalf("%v", err)
				}
				continue
			}
			once, err := (*Dialect)(nil).Format(items...)
			if err != nil {
				if Reason(err) == "other" {
					t.Fatal(err)
				}
				continue
			}
			items, err = Parse(once, Limits{KeepUnlisted: keep})
			if err != nil {
				t.Fatalf("%v\nin  %x\nout %x", err, b, once)
			}
			twice, err := (*Dialect)(nil).Format(items...)
			if err != nil || !bytes.Equal(once, twice) {
				t.Fatalf("%v\nin    %x\nonce  %x\ntwice %x", err, b, once, twice)
			}
		}
	})
}

// FuzzSession: the payloads of session messages.
func FuzzSession(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		d := (*Dialect)(nil)
		if q, err := DecodeDelta(b, Limits{}); err == nil {
			if out, err := d.EncodeDelta(q); err == nil {
				if _, err := DecodeDelta(out, Limits{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if s, err := DecodeSession(b, Limits{}); err == nil {
			if out, err := d.EncodeSession(s); err == nil {
				if _, err := DecodeSession(out, Limits{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if s, err := DecodeSessions(b, Limits{}); err == nil {
			if out, err := d.EncodeSessions(s); err == nil {
				if _, err := DecodeSessions(out, Limits{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if s, err := DecodeUTF(b, Limits{}); err == nil {
			if _, err := EncodeUTF(s); err != nil {
				t.Fatal(err)
			}
		}
	})
}
