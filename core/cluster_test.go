package core

import (
	"bytes"
	"strings"
	"testing"
)

func TestSubjectRoundTrip(t *testing.T) {
	for _, n := range []int{1, 23, 24, 255} {
		subject, body := strings.Repeat("s", n), []byte{0, 1, 2}
		got, rest, ok := splitSubject(append(appendSubject(nil, subject), body...))
		if !ok || string(got) != subject || !bytes.Equal(rest, body) {
			t.Errorf("subject of %d bytes: got %q, %v, %v", n, got, rest, ok)
		}
	}
}

func FuzzSubject(f *testing.F) {
	for _, s := range []string{"", "\x60", "\x61a", "\x78\x01a", "\x78\xffa", "\x7f", "\x79\x00\x01a"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		subject, body, ok := splitSubject(b)
		if ok && (len(subject) == 0 || len(subject) > MaxSubject || len(subject)+len(body) >= len(b)) {
			t.Errorf("%q split into %q and %q", b, subject, body)
		}
	})
}
