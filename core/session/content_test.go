package session

import "testing"

// A record and the replica that has taken it over have the same content, and
// every difference that an application could see changes it.
func TestContent(t *testing.T) {
	v := Version{Counter: 3, Node: 7}
	make := func(change func(*Record)) *Record {
		r := &Record{Key: Key{"localhost/", "A"}, Created: 5, LastAccess: 9, MaxInactive: 60, MaxInactiveVersion: Version{1, 7},
			Attrs: map[string]Entry{"a": {Value: []byte("x"), Version: v}, "b": {Value: []byte("y"), Version: v}, "c": {Deleted: true, Version: v}}}
		change(r)
		return r
	}
	base := make(func(*Record) {})
	var p Replica
	p.Merge(base)
	if base.Content() != p.Content() || base.Content() == 0 {
		t.Errorf("record %x, replica %x", base.Content(), p.Content())
	}
	same := map[string]func(*Record){
		"access":  func(r *Record) { r.LastAccess = 99 },
		"deleted": func(r *Record) { delete(r.Attrs, "c") },
	}
	for name, change := range same {
		if make(change).Content() != base.Content() {
			t.Errorf("%s changes the content", name)
		}
	}
	other := map[string]func(*Record){
		"value":   func(r *Record) { r.Attrs["a"] = Entry{Value: []byte("z"), Version: v} },
		"version": func(r *Record) { r.Attrs["a"] = Entry{Value: []byte("x"), Version: Version{4, 7}} },
		"swapped": func(r *Record) { r.Attrs["a"], r.Attrs["b"] = r.Attrs["b"], r.Attrs["a"] },
		"missing": func(r *Record) { delete(r.Attrs, "b") },
		"empty":   func(r *Record) { r.Attrs = nil },
		"life":    func(r *Record) { r.MaxInactive = 61 },
		"created": func(r *Record) { r.Created = 6 },
	}
	seen := map[uint64]string{base.Content(): "base"}
	for name, change := range other {
		c := make(change).Content()
		if was, there := seen[c]; there {
			t.Errorf("%s has the content of %s", name, was)
		}
		seen[c] = name
	}
}
