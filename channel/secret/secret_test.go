package secret

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestTextNeverPrints(t *testing.T) {
	s := struct {
		A Text
		B *Text
		C []Text
	}{New("hunter2"), new(New("hunter2")), []Text{New("hunter2")}}
	k, err := Derive(s.A, "test")
	if err != nil {
		t.Fatal(err)
	}
	j, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	all := fmt.Sprintf("%v %+v %#v %s %q %x %d %v %+v %#v %s", s, s, s, s.A, s.A, s.A, s.A, k, k, k, j)
	if strings.Contains(all, "hunter") || strings.Contains(all, fmt.Sprintf("%x", "hunter")) || strings.Contains(all, fmt.Sprint(k.pseu)) || strings.Contains(all, fmt.Sprintf("%x", k.pseu)) {
		t.Errorf("shown: %s", all)
	}
	if s.A.Reveal() != "hunter2" || (Text{}).String() != "" || !strings.Contains(all, "***") {
		t.Errorf("got %s", all)
	}
}

func TestReferences(t *testing.T) {
	dir := t.TempDir()
	good, open := filepath.Join(dir, "good"), filepath.Join(dir, "open")
	for _, f := range []string{good, open} {
		if err := os.WriteFile(f, []byte("from a file\nthe old one\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(open, 0o604); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SECRET_OF_A_TEST", "from the environment")
	for _, c := range []struct{ in, want, err string }{
		{"plain", "plain", ""},
		{"", "", ""},
		{"${env:SECRET_OF_A_TEST}", "from the environment", ""},
		{"${env:SECRET_THAT_IS_NOT_SET}", "", "SECRET_THAT_IS_NOT_SET is not set"},
		{"${file:" + good + "}", "from a file", ""},
		{"${file:" + open + "}", "", "can be read by everybody on this machine (mode 0604)"},
		{"${file:/does/not/exist}", "", "no such file"},
		{"${other:x}", "${other:x}", ""},
		{"***", "", "stands for a secret that was not shown"},
	} {
		var s Text
		err := s.UnmarshalText([]byte(c.in))
		if s.Reveal() != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q: %q, %v", c.in, s.Reveal(), err)
		}
	}
	all, err := List("secret", Text{}, good, []Text{New("older")})
	if err != nil || len(all) != 3 || all[0].Reveal() != "from a file" || all[2].Reveal() != "older" {
		t.Errorf("%d, %v", len(all), err)
	}
	var many []Text
	for i := range MaxKeys {
		many = append(many, New(fmt.Sprint(i)))
	}
	if _, err := List("secret", New("x"), "", many); err == nil || !strings.Contains(err.Error(), "17 are valid at a time, the most is 16") {
		t.Errorf("too many: %v", err)
	}
	if all, err := List("secret", Text{}, "", nil); len(all) != 0 || err != nil {
		t.Errorf("none: %v, %v", all, err)
	}
}

func TestKeysDiffer(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range []string{"one", "two"} {
		for _, purpose := range []string{"a", "b"} {
			k, err := Derive(New(s), purpose)
			if err != nil {
				t.Fatal(err)
			}
			for _, use := range []string{"x", "y"} {
				for _, context := range []string{"1", "2"} {
					key, err := k.Expand(use, []byte(context), KeySize)
					if err != nil {
						t.Fatal(err)
					}
					seen[string(key)] = true
				}
			}
			seen[string(k.ID[:])] = true
		}
	}
	if len(seen) != 2*2*(2*2+1) {
		t.Errorf("%d different ones", len(seen))
	}
	a, _ := Derive(New("one"), "a")
	b, _ := Derive(New("one"), "a")
	x, _ := a.Expand("x", nil, KeySize)
	y, _ := b.Expand("x", nil, KeySize)
	if string(x) != string(y) || a.ID != b.ID {
		t.Error("one secret has two keys")
	}
}
