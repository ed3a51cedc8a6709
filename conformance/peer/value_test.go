package peer_test

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/conformance/peer"
)

// values draws Java values, nested up to depth.
func values(depth int) *rapid.Generator[any] {
	kinds := []*rapid.Generator[any]{
		rapid.Just[any](nil),
		rapid.Bool().AsAny(),
		rapid.Int32().AsAny(),
		rapid.Int64().AsAny(),
		rapid.Float64().Filter(func(f float64) bool { return !math.IsNaN(f) }).AsAny(),
		rapid.String().AsAny(),
		rapid.Just[any]("an astral \U0001F600 and a ; : N0"),
		rapid.SliceOf(rapid.Byte()).AsAny(),
		rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) peer.Bytes { return b }).AsAny(),
		rapid.Map(rapid.Int64Range(-1<<40, 1<<40), func(ms int64) time.Time { return time.UnixMilli(ms).UTC() }).AsAny(),
	}
	if depth > 0 {
		kinds = append(kinds,
			rapid.SliceOfN(values(depth-1), 0, 4).AsAny(),
			rapid.Custom(func(t *rapid.T) peer.Pairs {
				p := peer.Pairs{}
				for range rapid.IntRange(0, 3).Draw(t, "pairs") {
					p = append(p, values(0).Draw(t, "key"), values(depth-1).Draw(t, "value"))
				}
				return p
			}).AsAny())
	}
	return rapid.OneOf(kinds...)
}

func TestValuesRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := values(3).Draw(t, "value")
		s, err := peer.Encode(v)
		if err != nil {
			t.Fatal(err)
		}
		back, err := peer.Decode(s)
		if err != nil || !reflect.DeepEqual(v, back) {
			t.Fatalf("%#v is %q, which is read as %#v, %v", v, s, back, err)
		}
	})
}

func FuzzDecode(f *testing.F) {
	for _, s := range []string{"N", "I5;", "L2;S2:ab", "H1;NZ1;", "S-1:", "B3:00f", "M9:00", "L-1;", "L99999999999;N", "O3:a b", "T1;", "D1;x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, err := peer.Decode(s)
		if err != nil {
			return
		}
		if _, ok := v.(peer.Other); !ok && !strings.Contains(s, "O") {
			if _, err := peer.Encode(v); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// Without tools the error says what to install.
func TestFindNothing(t *testing.T) {
	empty := t.TempDir()
	t.Setenv("PATH", empty)
	if _, err := peer.Find(); !errors.Is(err, peer.ErrMissing) || !strings.Contains(err.Error(), peer.Packages) {
		t.Errorf("without java: %v", err)
	}
	for _, command := range []string{"java", "javac"} {
		if err := os.WriteFile(filepath.Join(empty, command), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	jars := t.TempDir()
	t.Setenv(peer.JarsVariable, jars)
	if _, err := peer.Find(); !errors.Is(err, peer.ErrMissing) || !strings.Contains(err.Error(), "catalina-tribes.jar") {
		t.Errorf("without jars: %v", err)
	}
	// An installation has its jars in two folders.
	for _, jar := range []string{"lib/catalina-tribes.jar", "bin/tomcat-juli.jar"} {
		path := filepath.Join(jars, jar)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	tools, err := peer.Find()
	if err != nil || len(tools.Tribes) != 2 || tools.Tomcat != nil {
		t.Errorf("with the jars of an installation: %+v, %v", tools, err)
	}
}
