package session

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// knower is a node with one attribute, and the truth about what it has seen.
type knower struct {
	rulings
	seen map[Version]bool
}

func (k *knower) entry() Entry { return k.rec.Attrs["a"] }

// meet merges what another node has, over the wire, and compares the conflicts
// with the truth.
func (k *knower) meet(t *rapid.T, other *knower, lost map[Version]bool) {
	ours, theirs := k.entry().Version, other.entry().Version
	other.rec.Key = testKey
	rs, err := decodeAll(AppendBatch(nil, &other.rec))
	if err != nil {
		t.Fatal(err)
	}
	n := k.rec.MergeEach(rs[0], func(name string, kept, gone Entry) {
		if name != "a" || kept.Version != k.entry().Version && kept.Version != later(ours, theirs) {
			t.Fatalf("%s: kept %v of %v and %v", name, kept.Version, ours, theirs)
		}
		lost[gone.Version] = true
	})
	independent := ours.Counter > 0 && theirs.Counter > 0 && !k.seen[theirs] && !other.seen[ours]
	if (n == 1) != independent || n > 1 {
		t.Fatalf("%d conflicts between %v %+v and %v %+v", n, ours, k.entry().Past, theirs, rs[0].Attrs["a"].Past)
	}
	maps.Copy(k.seen, other.seen)
}

func later(a, b Version) Version {
	if a.Less(b) {
		return b
	}
	return a
}

// As many nodes as a past has room for write one attribute and hear of each other
// in any order: a conflict is noticed exactly when two changes meet of which
// neither had been seen by the writer of the other. In the end, each change that
// nobody has built on, but the one that is kept, has been called lost.
func TestConflictsAreExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := make([]*knower, rapid.SampledFrom([]int{2, 3, 5, maxPast}).Draw(t, "nodes"))
		for i := range nodes {
			nodes[i] = &knower{rulings{node: uint64(i + 1)}, map[Version]bool{}}
		}
		lost, tips := map[Version]bool{}, map[Version]bool{}
		for i := range rapid.IntRange(1, 60).Draw(t, "steps") {
			k := rapid.SampledFrom(nodes).Draw(t, "node")
			if rapid.Bool().Draw(t, "writes") {
				k.put("a", Entry{Value: []byte{byte(i)}})
				maps.DeleteFunc(tips, func(v Version, _ bool) bool { return k.seen[v] })
				tips[k.entry().Version], k.seen[k.entry().Version] = true, true
			} else if other := rapid.SampledFrom(nodes).Draw(t, "other"); other != k {
				k.meet(t, other, lost)
			}
		}
		for range 2 { // all of them, from the last to the first and back
			for i := range nodes[1:] {
				nodes[i+1].meet(t, nodes[i], lost)
			}
			slices.Reverse(nodes)
		}
		for v := range tips {
			if v != nodes[0].entry().Version && !lost[v] {
				t.Fatalf("nobody noticed that %v is lost", v)
			}
		}
	})
}

// However many nodes write one attribute, with and without rules: if each has
// seen what was there before, there is no conflict.
func TestNoConflictInTurn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := make([]*rulings, rapid.IntRange(1, 3*maxPast).Draw(t, "nodes"))
		for i := range nodes {
			nodes[i] = &rulings{node: uint64(i + 1)}
		}
		for i := range rapid.IntRange(1, 4*maxPast).Draw(t, "steps") {
			n := rapid.SampledFrom(nodes).Draw(t, "node")
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				n.put("a", Entry{Deleted: true})
			case 1:
				n.put("a", Entry{Value: []byte{byte(i)}})
			case 2:
				_ = Counter("a").Add(n, 1) // refused if there is another value
			case 3:
				_ = Union("a").Add(n, fmt.Sprint(i))
			}
			for _, to := range nodes {
				if c := to.rec.Merge(&n.rec); c > 0 {
					t.Fatalf("step %d: %d conflicts", i, c)
				}
			}
			if n := len(n.rec.Attrs["a"].Past.list()); n > maxPast+1 {
				t.Fatalf("a past of %d nodes", n)
			}
		}
	})
}

// What was added to a counter on one node, and not seen by the one that deletes
// it, is lost: also if the last change was.
func TestConflictOfJoined(t *testing.T) {
	a, b, c := &rulings{node: 1}, &rulings{node: 2}, &rulings{node: 3}
	add := func(r *rulings) {
		if err := Counter("n").Add(r, 1); err != nil {
			t.Fatal(err)
		}
	}
	add(a)
	add(b)
	add(b)
	c.rec.Merge(&b.rec)
	c.put("n", Entry{Deleted: true})
	b.rec.Merge(&a.rec) // has the version of b's change, which c has seen
	if n := b.rec.Merge(&c.rec); n != 1 || !b.rec.Attrs["n"].Deleted {
		t.Errorf("%d conflicts, %+v", n, b.rec.Attrs["n"])
	}
}

// The usual case, one node that writes, costs no memory.
func TestPastOfOneNode(t *testing.T) {
	r := &rulings{node: 1}
	for range 10 {
		r.put("a", Entry{Value: []byte{1}})
	}
	other := Record{}
	other.Merge(&r.rec)
	if r.rec.Attrs["a"].Past != nil || other.Attrs["a"].Past != nil {
		t.Error("a past of a single node")
	}
}

// Records of the first version of the encoding are read: their attributes have
// no past. All with a lower counter passes for seen, as it did then.
func TestReadsFirstEncoding(t *testing.T) {
	text, err := os.ReadFile("testdata/records-4.hex")
	if err != nil {
		t.Fatal(err)
	}
	b, err := hex.DecodeString(string(bytes.TrimSpace(text)))
	if err != nil {
		t.Fatal(err)
	}
	rs, err := decodeAll(b)
	if err != nil || len(rs) != 2 || rs[1].End != Renewed {
		t.Fatal(rs, err)
	}
	old := sample()
	old.Attrs["sum"] = Entry{Value: (&ruled{rule: ruleSum, parts: []part{{4, 5, 6}, {77, 2, 3}}}).append(nil), Version: Version{4, 77}}
	old.Attrs["max"] = Entry{Value: (&ruled{rule: ruleMax, max: -7, epoch: Version{3, 4}}).append(nil), Version: Version{5, 4}}
	old.Attrs["union"] = Entry{Value: (&ruled{rule: ruleUnion, members: []string{"a", "b"}}).append(nil), Version: Version{6, 1 << 63}}
	for name, e := range old.Attrs {
		e.Past = &Past{seen: []Version{{Counter: e.Version.Counter - 1}}}
		old.Attrs[name] = e
	}
	equal(t, "first encoding", old, rs[0])
	for _, c := range []struct {
		version   Version
		conflicts int
	}{{Version{1, 9}, 0}, {Version{2, 9}, 1}, {Version{3, 9}, 1}} {
		now := &Record{Attrs: map[string]Entry{"cart": {Value: []byte{1}, Version: c.version}}}
		if n := rs[0].Clone().Merge(now); n != c.conflicts {
			t.Errorf("%v: %d conflicts", c.version, n)
		}
	}
	e := Entry{Value: []byte{1}, Version: Version{3, 9}}.On(rs[0].Attrs["cart"])
	now := &Record{Attrs: map[string]Entry{"cart": e}}
	if n := rs[0].Merge(now); n != 0 {
		t.Errorf("%d conflicts with what has been seen", n)
	}
}

// The encoding, byte by byte, of an attribute with a past, and with fields that a
// later version has added: these are kept with the value, and go when it is
// changed.
func TestPastEncoding(t *testing.T) {
	e := Entry{Value: []byte{0x42}, Version: Version{9, 7}, Past: &Past{seen: []Version{{3, 0}, {4, 5}, {8, 1 << 40}}}}
	const want = "85" + "6161" + "4142" + "09" + "07" + "86" + "0300" + "0405" + "081b0000010000000000"
	b := appendEntry(nil, "a", e)
	if hex.EncodeToString(b) != want {
		t.Fatalf("%x", b)
	}
	later := append([]byte{0x87}, b[1:]...)
	later = append(later, 0x61, 'x', 0x81, 0x00) // "x", [0]
	batch := AppendBatch(nil, &Record{Key: testKey})
	batch = append(append(batch[:len(batch)-1], 0x81), later...)
	rs, err := decodeAll(batch)
	if err != nil {
		t.Fatal(err)
	}
	if got := AppendBatch(nil, rs[0]); !bytes.Equal(got, batch) {
		t.Errorf("kept as %x", got)
	}
	plain := &Record{Key: testKey, Attrs: map[string]Entry{"a": e}}
	for _, m := range []*Record{merged(rs[0], plain), merged(plain, rs[0])} {
		equal(t, "beside the same without them", rs[0], m)
	}
	if next := (Entry{Value: []byte{2}, Version: Version{10, 7}}).On(rs[0].Attrs["a"]); next.Past.more() != nil || len(next.Past.list()) != 3 {
		t.Errorf("after a change: %+v", next.Past)
	}
}
