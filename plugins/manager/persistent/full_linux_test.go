package persistent

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/longhouse-go/longhouse/core"
)

// A disk that is full, or can only be read: saves fail, what is stored stays as
// it is and can be loaded, nothing half is left, and afterwards all goes on.
func TestDiskFullOrReadOnly(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("needs root and a file system of its own: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s := NewFileStore(filepath.Join(dir, "sessions"), nil, true)
	k, small := testKey("A"), core.StoreItem{Data: []byte("small")}
	version, err := s.Save(t.Context(), k, small, "")
	if err != nil {
		t.Fatal(err)
	}
	check := func(when string, want error) {
		t.Helper()
		if _, err := s.Save(t.Context(), k, core.StoreItem{Data: make([]byte, 1<<20)}, version); !errors.Is(err, want) || errors.Is(err, core.ErrStoreConflict) {
			t.Errorf("%s: save: %v", when, err)
		}
		it, ok, err := s.Load(t.Context(), k)
		if err != nil || !ok || string(it.Data) != "small" || it.Version != version {
			t.Errorf("%s: load: %q, %v, %v", when, it.Data, ok, err)
		}
		if left := files(t, dir); len(left) != 1 {
			t.Errorf("%s: left: %v", when, left)
		}
	}
	check("full", syscall.ENOSPC)
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	check("read-only", syscall.EROFS)
	if err := s.Delete(t.Context(), k); err == nil {
		t.Error("a delete of what cannot be deleted succeeded")
	}
	// Whoever comes new reads, too.
	if _, ok, err := NewFileStore(filepath.Join(dir, "sessions"), nil, true).Load(t.Context(), k); !ok || err != nil {
		t.Errorf("a node that starts now: %v, %v", ok, err)
	}
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=4m"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Save(t.Context(), k, core.StoreItem{Data: make([]byte, 1<<20)}, version); err != nil {
		t.Errorf("with room again: %v", err)
	}
	if _, err := os.Stat(s.path(k)); err != nil {
		t.Error(err)
	}
}
