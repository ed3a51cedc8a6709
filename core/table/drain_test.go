package table

import (
	"errors"
	"slices"
	"testing"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// A draining table serves what it has, refuses what is new, and commits all that
// is pending at level sync.
func TestDrain(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		h, err := tb.Create(t.Context(), ctxName, half)
		if err != nil {
			t.Fatal(err)
		}
		key := h.Key()
		tb.Drain()
		if _, err := tb.Create(t.Context(), ctxName, half); !errors.Is(err, session.ErrDraining) || tb.Len() != 1 {
			t.Errorf("a new session: %v, %d in the table", err, tb.Len())
		}
		if err := h.Set("n", 1); err != nil {
			t.Fatal(err)
		}
		if err := tb.FlushSynced(t.Context()); err != nil {
			t.Error(err)
		}
		stored := m.get(key)
		if c, living := tb.Content(key); !living || c != stored.Content() {
			t.Errorf("the table has %x (%v), the manager %x", c, living, stored.Content())
		}
		m.set(func(m *memory) {
			if !slices.Equal(m.commits, []core.Level{core.Synced}) {
				t.Errorf("commits at %v", m.commits)
			}
			clear(m.records) // it has lost its memory
		})
		if err := tb.CommitAgain(t.Context(), append(tb.Keys(), session.Key{ID: "unknown"})); err != nil {
			t.Error(err)
		}
		again := m.get(key)
		if c, _ := tb.Content(key); c != again.Content() {
			t.Errorf("committed again: the table has %x, the manager %x", c, again.Content())
		}
		if err := h.Invalidate(); err != nil {
			t.Error(err)
		}
		if _, living := tb.Content(key); living || len(tb.Keys()) != 0 {
			t.Error("a session that has ended has content")
		}
		h.Release()
	})
}
