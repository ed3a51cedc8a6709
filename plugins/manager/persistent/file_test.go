package persistent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testKey(n string) session.Key {
	return session.Key{Context: "localhost/shop", ID: strings.Repeat(n, 32)}
}

// files returns the session files of a folder.
func files(t *testing.T, dir string) (all []string) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if strings.HasSuffix(p, fileSuffix) || strings.Contains(p, tempPrefix) {
			all = append(all, p)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestHostileKeysStayInTheFolder(t *testing.T) {
	dir := t.TempDir()
	s := NewFileStore(filepath.Join(dir, "in"), nil, false)
	for _, k := range []session.Key{
		{Context: "../../up", ID: "../../../etc/passwd"}, {Context: "a\x00b", ID: "c"}, {Context: "a", ID: "\x00bc"},
		{Context: strings.Repeat("x", session.MaxContext), ID: strings.Repeat("y", session.MaxID)}, {Context: "A", ID: "AB"}, {Context: "A", ID: "ab"},
	} {
		if _, err := s.Save(t.Context(), k, core.StoreItem{Data: []byte(k.ID)}, ""); err != nil {
			t.Errorf("%q: %v", k, err)
		}
		it, ok, err := s.Load(t.Context(), k)
		if err != nil || !ok || string(it.Data) != k.ID {
			t.Errorf("%q: loaded %q, %v, %v", k, it.Data, ok, err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("outside of the folder: %v, %v", entries, err)
	}
	if n := len(files(t, dir)); n != 6 {
		t.Errorf("%d files for 6 keys", n)
	}
	if _, err := s.Save(t.Context(), session.Key{Context: "a", ID: strings.Repeat("y", 10<<10)}, core.StoreItem{}, ""); err == nil {
		t.Error("an id of 10 KiB was taken")
	}
}

func TestDamageIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := NewFileStore(dir, nil, false)
	k := testKey("A")
	if _, err := s.Save(t.Context(), k, core.StoreItem{Data: []byte("twenty-four bytes of data"), Expires: time.Now().Add(time.Hour)}, ""); err != nil {
		t.Fatal(err)
	}
	path := files(t, dir)[0]
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	put := func(b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x40
		put(bad)
		if _, _, err := s.Load(t.Context(), k); !errors.Is(err, core.ErrStoreCorrupt) {
			t.Fatalf("byte %d of %d changed: %v", i, len(good), err)
		}
		put(good[:i])
		if _, _, err := s.Load(t.Context(), k); !errors.Is(err, core.ErrStoreCorrupt) {
			t.Fatalf("cut after %d of %d bytes: %v", i, len(good), err)
		}
	}
	put(append(bytes.Clone(good), 0))
	if _, _, err := s.Load(t.Context(), k); !errors.Is(err, core.ErrStoreCorrupt) {
		t.Errorf("one byte more: %v", err)
	}
	// A good file in another one's place.
	put(good)
	other := testKey("B")
	if err := os.MkdirAll(filepath.Dir(s.path(other)), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, s.path(other)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Load(t.Context(), other); !errors.Is(err, core.ErrStoreCorrupt) {
		t.Errorf("a moved file: %v", err)
	}
	// Another node with another secret.
	if _, _, err := NewFileStore(dir, []byte("another secret"), false).Load(t.Context(), other); !errors.Is(err, core.ErrStoreCorrupt) {
		t.Errorf("another secret: %v", err)
	}
	// It can be replaced: nobody is stuck with a damaged file.
	if _, err := s.Save(t.Context(), other, core.StoreItem{Data: []byte("new")}, ""); err != nil {
		t.Errorf("save over a damaged file: %v", err)
	}
}

// Two stores on one folder are two nodes.
func TestWritersTakeTurns(t *testing.T) {
	dir := t.TempDir()
	k := testKey("A")
	const writers, each = 4, 25
	var wg sync.WaitGroup
	for range writers {
		s := NewFileStore(dir, nil, false)
		wg.Go(func() {
			for range each {
				for {
					it, _, err := s.Load(t.Context(), k)
					if err != nil {
						t.Error(err)
						return
					}
					_, err = s.Save(t.Context(), k, core.StoreItem{Data: append(it.Data, 'x')}, it.Version)
					if err == nil {
						break
					}
					if !errors.Is(err, core.ErrStoreConflict) {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	it, ok, err := NewFileStore(dir, nil, false).Load(t.Context(), k)
	if err != nil || !ok || len(it.Data) != writers*each {
		t.Errorf("%d of %d changes are stored: %v", len(it.Data), writers*each, err)
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	s := NewFileStore(dir, nil, false)
	now := time.Now()
	for i, in := range []time.Duration{-time.Hour, time.Hour, 0} {
		it := core.StoreItem{Data: []byte("x")}
		if in != 0 {
			it.Expires = now.Add(in)
		}
		if _, err := s.Save(t.Context(), testKey(string(rune('A'+i))), it, ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok, err := s.Load(t.Context(), testKey("A")); ok || err != nil {
		t.Errorf("an expired item was loaded: %v", err)
	}
	// Half a file that a node left which died.
	left := filepath.Join(filepath.Dir(s.path(testKey("B"))), tempPrefix+"left")
	if err := os.WriteFile(left, []byte("LHS1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(left, now, now.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Sweep(t.Context(), now, 100); n != 1 || err != nil {
		t.Errorf("swept %d, %v", n, err)
	}
	if left := files(t, dir); len(left) != 2 {
		t.Errorf("left: %v", left)
	}
	var keys []session.Key
	if err := s.List(t.Context(), 1, func(k session.Key) { keys = append(keys, k) }); err != nil || len(keys) != 1 {
		t.Errorf("listed %v, %v", keys, err)
	}
}

func TestFullOrReadOnlyFolder(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := NewFileStore(filepath.Join(dir, "in"), nil, false) // a file is in its place
	if _, _, err := s.Load(t.Context(), testKey("A")); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "in")) {
		t.Errorf("no folder: %v", err)
	}
	// When the folder can be made, it goes on.
	if err := os.Remove(filepath.Join(dir, "in")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Save(t.Context(), testKey("A"), core.StoreItem{Data: []byte("x")}, ""); err != nil {
		t.Errorf("after the folder can be made: %v", err)
	}
}

func FuzzDecodeFile(f *testing.F) {
	mac := make([]byte, macSize)
	f.Add((&fileItem{key: testKey("A"), version: 1, data: []byte("x")}).encode(mac)[4:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, in []byte) {
		// With a right MAC, so that what is behind it is reached.
		h := append([]byte(fileMagic), in...)
		s, err := decodeFile(sign(h, mac), mac)
		if err != nil {
			if !errors.Is(err, core.ErrStoreCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if got := s.encode(mac); !bytes.Equal(got, sign(h, mac)) {
			t.Fatalf("encoded again as %x", got)
		}
	})
}

func BenchmarkFileSave(b *testing.B) {
	for _, sync := range []bool{false, true} {
		name := "unsynced"
		if sync {
			name = "synced"
		}
		b.Run(name, func(b *testing.B) {
			s := NewFileStore(b.TempDir(), nil, sync)
			it := core.StoreItem{Data: make([]byte, 1024)}
			var v core.StoreVersion
			b.ReportAllocs()
			for b.Loop() {
				var err error
				if v, err = s.Save(b.Context(), testKey("A"), it, v); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A node dies at any step of a write: whoever opens the folder then has what was
// stored before, or all of the new, and can go on.
func TestCrashAtEveryStep(t *testing.T) {
	dir := t.TempDir()
	s := NewFileStore(dir, nil, false)
	k := testKey("A")
	version, err := s.Save(t.Context(), k, core.StoreItem{Data: []byte("before")}, "")
	if err != nil {
		t.Fatal(err)
	}
	path := s.path(k)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	later, err := s.Save(t.Context(), k, core.StoreItem{Data: []byte("after")}, version)
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(filepath.Dir(path), tempPrefix+strings.TrimSuffix(filepath.Base(path), fileSuffix))
	write := func(path string, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	look := func(step, want string, version core.StoreVersion) {
		t.Helper()
		next := NewFileStore(dir, nil, false)
		it, ok, err := next.Load(t.Context(), k)
		if err != nil || !ok || string(it.Data) != want || it.Version != version {
			t.Fatalf("%s: %q %v %v", step, it.Data, ok, err)
		}
		n := 0
		if err := next.List(t.Context(), 10, func(session.Key) { n++ }); err != nil || n != 1 {
			t.Fatalf("%s: %d sessions, %v", step, n, err)
		}
		if _, err := next.Save(t.Context(), k, core.StoreItem{Data: []byte("next")}, version); err != nil {
			t.Fatalf("%s: %v", step, err)
		}
	}
	for n := range len(after) + 1 {
		write(path, before)
		write(temp, after[:n])
		look(fmt.Sprintf("%d of %d bytes written", n, len(after)), "before", version)
	}
	write(path, after)
	look("moved", "after", later)

	// What is left is removed when it is old.
	write(temp, after)
	old := time.Now().Add(-2 * tempAge)
	if err := os.Chtimes(temp, old, old); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sweep(t.Context(), time.Now(), 10); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(temp); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}

// A disk that cannot be read is no damage and no missing session: what is there is
// neither replaced nor made anew.
func TestReadError(t *testing.T) {
	s := NewFileStore(t.TempDir(), nil, false)
	k := testKey("A")
	version, err := s.Save(t.Context(), k, core.StoreItem{Data: []byte("x")}, "")
	if err != nil {
		t.Fatal(err)
	}
	path := s.path(k)
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil { // opens, and fails to be read
		t.Fatal(err)
	}
	if _, ok, err := s.Load(t.Context(), k); ok || err == nil || errors.Is(err, core.ErrStoreCorrupt) {
		t.Errorf("load: %v, %v", ok, err)
	}
	for _, prev := range []core.StoreVersion{"", version} {
		if _, err := s.Save(t.Context(), k, core.StoreItem{Data: []byte("y")}, prev); err == nil || errors.Is(err, core.ErrStoreConflict) {
			t.Errorf("save: %v", err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".away", path); err != nil {
		t.Fatal(err)
	}
	if it, ok, err := s.Load(t.Context(), k); !ok || err != nil || it.Version != version {
		t.Errorf("later: %v, %v", ok, err)
	}
}
