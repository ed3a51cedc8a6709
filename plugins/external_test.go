package plugins

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// A host that is refreshed makes new instances of the new programs, and a list
// with a mistake changes nothing.
func TestRefresh(t *testing.T) {
	dir := t.TempDir()
	store := StoreOf(filepath.Join(dir, LockName))
	pin := func(text string) External {
		program := filepath.Join(dir, "program")
		if err := os.WriteFile(program, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
		p := lockedPlugin(KindInterceptor, "acme/zip")
		var err error
		if p.SHA256, p.Size, err = Keep(store, program); err != nil {
			t.Fatal(err)
		}
		return (&Lock{Plugins: []Locked{p}}).External(store)[0]
	}
	one, two := pin("one"), pin("two")
	next, fail := []External{two}, error(nil)
	h, err := NewHost(Config{External: []External{one}, Reread: func(context.Context) ([]External, error) { return next, fail }}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	revision := func(want External, when string) {
		t.Helper()
		if got := h.Revision(KindInterceptor, "acme/zip"); got != want.SHA256 {
			t.Errorf("%s: revision %s, want %s", when, got, want.SHA256)
		}
	}
	revision(one, "at first")
	next = []External{two, two}
	if err := h.Refresh(t.Context()); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("two of one name: %v", err)
	}
	fail = errors.New("unreadable")
	if err := h.Refresh(t.Context()); !errors.Is(err, fail) {
		t.Errorf("%v", err)
	}
	revision(one, "after mistakes")
	next, fail = []External{two}, nil
	if err := h.Refresh(t.Context()); err != nil {
		t.Error(err)
	}
	revision(two, "after a new pin")
	next = nil
	if err := h.Refresh(t.Context()); err != nil || len(h.Names(KindInterceptor)) != 0 {
		t.Errorf("after the removal: %v, %v", h.Names(KindInterceptor), err)
	}
}

// The options of a program are checked without running it.
func TestOptionsOfProgramsAreChecked(t *testing.T) {
	p := lockedPlugin(KindInterceptor, "acme/zip")
	list := (&Lock{Plugins: []Locked{p}}).External(filepath.Join(t.TempDir(), "not there"))
	for idle, want := range map[bool]string{true: "", false: "no such file"} {
		h, err := NewHost(Config{External: list, Idle: idle}, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		err = h.Check(KindInterceptor, core.PluginSpec{Name: "acme/zip", Options: []byte("min_size: 5"), Origin: "node.yaml:7"})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("idle %v: %v, want %q", idle, err, want)
		}
		if !idle {
			continue
		}
		for options, want := range map[string]string{
			"min_size: 0": "must be at least 1", "min_size: some": "64MiB", "min_siz: 3": `did you mean "min_size"`, "ratio: 2": "out of range",
		} {
			err := h.Check(KindInterceptor, core.PluginSpec{Name: "acme/zip", Options: []byte(options), Origin: "node.yaml:7"})
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "node.yaml:7") {
				t.Errorf("%s: %v, want %q and the place", options, err, want)
			}
		}
	}
}
