package session

import (
	"bytes"
	"cmp"
	"slices"
)

// maxPast bounds the nodes of a Past.
const maxPast = 16

// Past is what an entry's node had seen of its attribute when it made the
// change, and what has been merged into the entry since: for each node that
// wrote the attribute, the latest of its changes. Of two changes of which neither
// is in the other's past, each was made without seeing the other: that is a
// conflict. A Past is never changed, so entries share it; nil is an empty one.
//
// It lists up to 16 nodes. Of more, those with the lowest counters are left out,
// and everything up to their counters passes for seen: beyond that number
// conflicts may go unnoticed, but none is made up.
type Past struct {
	// seen is sorted by node, each once, without what the entry's own version
	// says. Node 0 stands for all nodes: every change up to that counter is
	// known, and no other node is listed with a lower or equal one.
	seen []Version
	// rest are the fields of the attribute that a later version of the encoding
	// has added, as they came, and fields is their number. They belong to the
	// value.
	rest   []byte
	fields int
}

var nothing Past // what nil stands for

// Equal reports whether p and q say the same.
func (p *Past) Equal(q *Past) bool { return p.is(q.list(), q) }

// is reports whether p has that list, and the fields of rest.
func (p *Past) is(seen []Version, rest *Past) bool {
	return slices.Equal(p.list(), seen) && bytes.Equal(p.more(), rest.more())
}

func (p *Past) list() []Version { return cmp.Or(p, &nothing).seen }

func (p *Past) more() []byte { return cmp.Or(p, &nothing).rest }

// On returns e, which has its version already, as a change by one who has seen
// old: the attribute's entry before, or the zero Entry if there was none.
func (e Entry) On(old Entry) Entry {
	if old.Version.Node == e.Version.Node && old.Past.more() == nil {
		e.Past = old.Past // the usual case: the same node writes again
	} else {
		e.Past = nil
		e.Past = makePast(e.Version, e, old, nil)
	}
	return e
}

// saw reports whether the change of that version is e or in its past.
func (e Entry) saw(v Version) bool {
	if e.Version.Node == v.Node && v.Counter <= e.Version.Counter {
		return true
	}
	for _, s := range e.Past.list() {
		if (s.Node == v.Node || s.Node == 0) && v.Counter <= s.Counter {
			return true
		}
	}
	return false
}

// overrides reports whether e, if it is kept, loses a change that its writer had
// not seen. Of lost, which has not seen e, only the last change counts, unless it
// has a rule: then it is made of many.
func (e Entry) overrides(lost Entry) bool {
	switch {
	case e.Version == lost.Version:
		return e.Deleted != lost.Deleted || !bytes.Equal(e.Value, lost.Value)
	case lost.saw(e.Version):
		return false
	case !e.saw(lost.Version):
		return true
	}
	return isRuled(lost.Value) && slices.ContainsFunc(lost.Past.list(), func(v Version) bool { return !e.saw(v) })
}

// mergePast returns the past of what becomes of two entries, which has kept's
// version: all that either has seen, with the later fields of kept. If the two
// are equal but for those, it takes the greater ones.
func mergePast(kept, other Entry, equal bool) *Past {
	if kept.Past == other.Past && kept.Version.Node == other.Version.Node && kept.Version.Counter >= other.Version.Counter {
		return kept.Past // the usual case: one node writes
	}
	rest := kept.Past
	if equal && bytes.Compare(rest.more(), other.Past.more()) < 0 {
		rest = other.Past
	}
	return makePast(kept.Version, kept, other, rest)
}

// makePast returns the past of an entry of that version that has seen what a and
// b have, with the fields of rest. It is that of a or b, if they have it already.
func makePast(v Version, a, b Entry, rest *Past) *Past {
	var few [2*maxPast + 4]Version
	all := append(append(few[:0], a.Past.list()...), b.Past.list()...)
	all = normal(append(all, a.Version, b.Version))
	if i := slices.Index(all, v); i >= 0 {
		all = slices.Delete(all, i, i+1)
	}
	switch {
	case len(all) == 0 && rest.more() == nil:
		return nil
	case a.Past.is(all, rest):
		return a.Past
	case b.Past.is(all, rest):
		return b.Past
	}
	p := &Past{seen: slices.Clone(all)}
	if rest != nil {
		p.rest, p.fields = rest.rest, rest.fields
	}
	return p
}

// normal brings a list into the form of Past.seen, in place. Lists may be joined
// in any order and as often as one likes: a version that is left out because
// maxPast others are higher would also be left out beside more of them.
func normal(all []Version) []Version {
	slices.SortFunc(all, func(a, b Version) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(b.Counter, a.Counter))
	})
	all = slices.CompactFunc(all, func(a, b Version) bool { return a.Node == b.Node })
	var floor uint64
	if len(all) > 0 && all[0].Node == 0 {
		floor, all = all[0].Counter, all[1:]
	}
	if len(all) > maxPast {
		var few [2*maxPast + 4]uint64
		counters := few[:0]
		for _, v := range all {
			counters = append(counters, v.Counter)
		}
		slices.Sort(counters)
		floor = max(floor, counters[len(counters)-maxPast-1])
	}
	all = slices.DeleteFunc(all, func(v Version) bool { return v.Counter <= floor })
	if floor > 0 {
		all = slices.Insert(all, 0, Version{Counter: floor})
	}
	return all
}
