package table

import (
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
)

// listed is how many conflicts are listed at most.
const listed = 1000

// Conflicts are listed, the latest first, with what is kept and what is lost,
// and the list is bounded.
func TestConflictsAreListed(t *testing.T) {
	tab := New(Config{Node: 1, Manager: newMemory()}, channel.Settings{})
	h, err := tab.Create(t.Context(), "localhost/", session.NewOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for range listed + 5 {
		if err := h.Set("a", "ours"); err != nil {
			t.Fatal(err)
		}
		e, _ := h.(*handle).s.rec.Get("a")
		e.Value, e.Version.Node = []byte{1}, 0xabc
		tab.Update(session.AppendBatch(nil, &session.Record{Key: h.Key(), Attrs: map[string]session.Entry{"a": e}}))
	}
	list := tab.Conflicts(2 * listed)
	if len(list) != listed || tab.Status().Conflicts != listed+5 {
		t.Fatalf("%d listed, %d counted", len(list), tab.Status().Conflicts)
	}
	want := session.Change{Counter: uint64(listed + 6), Node: "0000000000000abc"}
	if c := list[0]; c.Kept != want || c.Lost.Node != "0000000000000001" || c.Attribute != "a" || c.ID != session.Prefix(h.Key().ID) || c.Time.IsZero() {
		t.Errorf("%+v", c)
	}
	if list[1].Kept.Counter != want.Counter-1 {
		t.Error("not the latest first")
	}
	if n := len(tab.Conflicts(3)); n != 3 {
		t.Error(n)
	}
	if n := len(tab.Conflicts(-1)); n != 0 {
		t.Error(n)
	}
	h.Release()
}
