package table

import (
	"runtime"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
)

// heap returns the size of the heap after a collection.
func heap() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // pools give up what they keep with the second one
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// A session costs at most half as much again as its attributes' values, and 400
// bytes: in a node, several hundred thousand of them wait for their users.
func TestMemoryOfSessions(t *testing.T) {
	const n = 20_000
	for _, size := range []int{100, 1024} {
		tab := New(Config{Manager: null{}, Route: half.Route}, channel.Settings{})
		if err := tab.Start(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		before := heap()
		for range n {
			h, err := tab.Create(t.Context(), ctxName, half)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.Set("blob", make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			h.Release()
		}
		if err := tab.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		per := (heap() - before) / n
		t.Logf("%d bytes per session of %d bytes", per, size)
		if per > size*3/2+400 {
			t.Errorf("%d bytes per session of %d bytes", per, size)
		}
		if tab.Len() != n {
			t.Error(tab.Len(), "sessions")
		}
		// All are at rest again after a request that has changed nothing.
		tab.all(func(s *live) bool {
			h, err := tab.Find(t.Context(), s.key)
			if err != nil || h == nil {
				t.Fatal(h, err)
			}
			var b []byte
			if _, err := h.Get("blob", &b); err != nil || len(b) != size {
				t.Fatal(len(b), err)
			}
			h.Release()
			if s.busy != nil {
				t.Fatal("a session that nobody uses is busy")
			}
			return true
		})
		if err := tab.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
