package session

import (
	"bytes"
	"errors"
	"math"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// anyRuled is the value of an attribute with a rule, in one of few epochs.
func anyRuled(t *rapid.T, label string) []byte {
	v := ruled{rule: rule(rapid.IntRange(1, 3).Draw(t, label+"rule"))}
	if rapid.Bool().Draw(t, label+"again") {
		v.epoch = anyVersion(t, label+"epoch")
	}
	switch v.rule {
	case ruleSum:
		for node := range uint64(3) {
			if rapid.Bool().Draw(t, label+"part") {
				v.parts = append(v.parts, part{node + 1, rapid.Uint64Range(0, 3).Draw(t, label+"plus"), rapid.Uint64Range(0, 3).Draw(t, label+"minus")})
			}
		}
	case ruleMax:
		v.max = rapid.Int64().Draw(t, label+"max")
	case ruleUnion:
		v.members = rapid.SliceOfDistinct(rapid.SampledFrom([]string{"", "x", "y", "z"}), rapid.ID[string]).Draw(t, label+"members")
		slices.Sort(v.members)
	}
	return v.append(nil)
}

// rulings is a session of nothing but entries, on one node.
type rulings struct {
	Session
	node  uint64
	clock uint64
	rec   Record
}

func (r *rulings) next() Version {
	r.clock = max(r.clock, r.rec.Counter()) + 1
	return Version{r.clock, r.node}
}

func (r *rulings) UpdateRuled(name string, change func(Entry, uint64) ([]byte, error)) error {
	b, err := change(r.rec.Attrs[name], r.node)
	if err == nil {
		r.put(name, Entry{Value: b})
	}
	return err
}

func (r *rulings) put(name string, e Entry) {
	if r.rec.Attrs == nil {
		r.rec.Attrs = map[string]Entry{}
	}
	e.Version = r.next()
	r.rec.Attrs[name] = e.On(r.rec.Attrs[name])
}

func (r *rulings) Get(name string, into any) (bool, error) {
	e := r.rec.Attrs[name]
	if e.Value == nil {
		return false, nil
	}
	return true, Decode(e.Value, into)
}

// Three nodes add, raise and join, and hear of each other in any order and as
// often as they like: in the end all have the same, and it is exact.
func TestRulesAreExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := []*rulings{{node: 1}, {node: 2}, {node: 3}}
		var sum, greatest int64 = 0, math.MinInt64
		raised, all := false, map[string]bool{}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			n := rapid.SampledFrom(nodes).Draw(t, "node")
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				by := rapid.Int64Range(-100, 100).Draw(t, "by")
				sum += by
				if err := Counter("n").Add(n, by); err != nil {
					t.Fatal(err)
				}
			case 1:
				v := rapid.Int64().Draw(t, "v")
				greatest, raised = max(greatest, v), true
				if err := Max("m").Raise(n, v); err != nil {
					t.Fatal(err)
				}
			case 2:
				m := rapid.String().Draw(t, "member")
				all[m] = true
				if err := Union("u").Add(n, m); err != nil {
					t.Fatal(err)
				}
			case 3:
				if n.rec.Merge(rapid.SampledFrom(nodes).Draw(t, "from").rec.Clone()) != 0 {
					t.Fatal("what is joined by a rule is no conflict")
				}
			}
		}
		for range 2 {
			for i, n := range nodes {
				n.rec.Merge(nodes[(i+1)%3].rec.Clone())
				n.rec.Merge(nodes[(i+2)%3].rec.Clone())
			}
		}
		for _, n := range nodes {
			got, err := Counter("n").Value(n)
			if err != nil || got != sum {
				t.Fatalf("node %d counts %d, not %d: %v", n.node, got, sum, err)
			}
			if v, ok, err := Max("m").Value(n); err != nil || ok != raised || ok && v != greatest {
				t.Fatalf("node %d has the maximum %d, %t, not %d: %v", n.node, v, ok, greatest, err)
			}
			members, err := Union("u").Members(n)
			if err != nil || len(members) != len(all) {
				t.Fatalf("node %d has the members %q of %d: %v", n.node, members, len(all), err)
			}
			if !reflect.DeepEqual(n.rec.Attrs, nodes[0].rec.Attrs) {
				t.Fatal("nodes that know the same differ")
			}
		}
	})
}

// What was deleted does not come back through a node that had not seen it, and
// what is added after the deletion counts from 0.
func TestRuleBeginsAgain(t *testing.T) {
	a, b := &rulings{node: 1}, &rulings{node: 2}
	n := Counter("n")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(n.Add(a, 5))
	b.rec.Merge(a.rec.Clone())
	for range 5 {
		check(n.Add(b, 1)) // has more changes than a, and does not know of the deletion
	}
	a.put("n", Entry{Deleted: true})
	check(n.Add(a, 2))
	a.rec.Merge(b.rec.Clone())
	b.rec.Merge(a.rec.Clone())
	for _, r := range []*rulings{a, b} {
		if got, err := n.Value(r); got != 2 || err != nil {
			t.Errorf("node %d: %d, %v", r.node, got, err)
		}
	}
	check(n.Add(b, -4))
	a.rec.Merge(b.rec.Clone())
	if got, _ := n.Value(a); got != -2 {
		t.Error(got)
	}
}

func TestRuleRefuses(t *testing.T) {
	s := &rulings{node: 1}
	if err := Counter("n").Add(s, math.MinInt64); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	if err := Counter("n").Add(s, math.MaxInt64); err != nil {
		t.Error(err)
	}
	if err := Counter("n").Add(s, 1); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	if err := Union("n").Add(s, "a"); !errors.Is(err, ErrRule) {
		t.Error(err)
	}
	if err := Union("u").Add(s, "\xff"); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	plain, err := Encode(7)
	if err != nil {
		t.Fatal(err)
	}
	s.put("p", Entry{Value: plain})
	if err := Max("p").Raise(s, 1); !errors.Is(err, ErrRule) {
		t.Error(err)
	}
	if err := Counter("n").Add(struct{ Session }{s}, 1); err == nil {
		t.Error("a session without rules took a change by one")
	}
}

// Replicas that joined the same have equal digests, and others have not.
func TestDigestOfJoined(t *testing.T) {
	a, b := &rulings{node: 1}, &rulings{node: 2}
	if err := errors.Join(Counter("n").Add(a, 1), Counter("n").Add(b, 1)); err != nil {
		t.Fatal(err)
	}
	var one, both, other Replica
	one.Merge(&b.rec)
	both.Merge(&a.rec)
	both.Merge(&b.rec)
	other.Merge(&b.rec)
	other.Merge(&a.rec)
	if one.Digest() == both.Digest() || both.Digest() != other.Digest() {
		t.Error("the digest does not tell what was joined from its later part")
	}
}

func FuzzRuled(f *testing.F) {
	f.Add((&ruled{rule: ruleSum, parts: []part{{1, 2, 3}, {4, 5, 6}}}).append(nil))
	f.Add((&ruled{rule: ruleMax, max: -7, epoch: Version{3, 4}}).append(nil))
	f.Add((&ruled{rule: ruleUnion, members: []string{"a", "b"}}).append(nil))
	f.Add(ruleTag)
	f.Fuzz(func(t *testing.T, b []byte) {
		v, ok := parseRuled(b)
		if !ok {
			return
		}
		if !bytes.Equal(v.append(nil), b) {
			t.Fatal("not as it was")
		}
		if e, changed, _ := mergeEntry(Entry{Value: b}, Entry{Value: b}); changed || !bytes.Equal(e.Value, b) {
			t.Fatal("merging with itself changes it")
		}
		w := v
		w.join(&v)
		if !bytes.Equal(w.append(nil), b) {
			t.Fatal("joining with itself changes it")
		}
		var any any
		if err := Decode(b, &any); err != nil {
			t.Fatal(err)
		}
	})
}
