package session

import (
	"testing"
	"time"
)

// What several places have met is listed once, the latest first.
func TestJoinConflicts(t *testing.T) {
	var table, manager Conflicts
	entry := func(counter, node uint64) Entry { return Entry{Version: Version{counter, node}} }
	table.Add(testKey, "a", entry(5, 1), entry(4, 2), 2000)
	manager.Add(testKey, "a", entry(5, 1), entry(4, 2), 1000)
	manager.Add(testKey, "a", entry(6, 1), entry(4, 2), 3000)
	manager.Add(testKey, "b", entry(5, 0xabc), entry(4, 2), 1500)
	all := JoinConflicts(10, table.List(10), manager.List(10))
	if len(all) != 3 || all[0].Kept.Counter != 6 || all[2].Attribute != "a" || !all[2].Time.Equal(time.UnixMilli(1000)) {
		t.Errorf("%+v", all)
	}
	want := Conflict{time.UnixMilli(1500), "localhost/shop", Prefix(testKey.ID), "b", Change{5, "0000000000000abc"}, Change{4, "0000000000000002"}}
	if all[1] != want {
		t.Errorf("%+v", all[1])
	}
	if n := len(JoinConflicts(2, manager.List(1), table.List(10))); n != 2 {
		t.Error(n)
	}
}
