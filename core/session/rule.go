package session

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode/utf8"
)

// Counter is an attribute that counts: changes by several nodes add up, also
// those made at the same time or during a split of the group. Its value is the
// attribute's name, and Session.Get reads it as a number. Counter, Max and Union
// are all rules there are: an application cannot bring its own, because managers
// merge too, in processes that do not have its code.
//
//	const visits = session.Counter("visits")
//	err := visits.Add(s, 1)
//
// Deleting the attribute begins again at 0: what other nodes added and the
// deleting one had not seen is gone then. So does setting it to a plain value.
type Counter string

// Max is an attribute that keeps the greatest number that any node gave it. See
// Counter for reading and deleting it.
type Max string

// Union is an attribute that is a set of texts, to which every node may add:
// Session.Get reads it as a sorted list. See Counter for deleting it.
type Union string

// ErrRule: the attribute has a value of another kind than the one asked for.
var ErrRule = errors.New("session: the attribute is of another kind; delete it first")

// Ruled is implemented by sessions that can change attributes with a merge rule.
type Ruled interface {
	// UpdateRuled is Session.Update for such an attribute: change gets the
	// entry as it is (zero if there is none) and the number by which the
	// changes of this node are marked, and returns the new value.
	UpdateRuled(name string, change func(old Entry, node uint64) ([]byte, error)) error
}

// Add adds n, which may be negative. The sum of all that one node adds, and of
// all that it takes away, must fit into 63 bits.
func (c Counter) Add(s Session, n int64) error {
	return updateRuled(s, string(c), ruleSum, func(v *ruled, node uint64) error {
		i, there := slices.BinarySearchFunc(v.parts, node, func(p part, node uint64) int { return cmp.Compare(p.node, node) })
		p := part{node: node}
		if there {
			p = v.parts[i]
		}
		if n >= 0 {
			p.plus += uint64(n)
		} else {
			p.minus += -uint64(n)
		}
		if p.plus > math.MaxInt64 || p.minus > math.MaxInt64 {
			return fmt.Errorf("session: counter %q: more than 63 bits: %w", string(c), ErrTooLarge)
		}
		if there {
			v.parts[i] = p
		} else {
			v.parts = slices.Insert(v.parts, i, p)
		}
		return nil
	})
}

// Value returns the sum; 0 if the attribute is not set.
func (c Counter) Value(s Session) (n int64, err error) {
	_, err = s.Get(string(c), &n)
	return n, err
}

// Raise makes n the value, unless it is greater already.
func (m Max) Raise(s Session, n int64) error {
	return updateRuled(s, string(m), ruleMax, func(v *ruled, _ uint64) error {
		if !v.set || n > v.max {
			v.max, v.set = n, true
		}
		return nil
	})
}

// Value returns the greatest number; false if there is none.
func (m Max) Value(s Session) (n int64, ok bool, err error) {
	ok, err = s.Get(string(m), &n)
	return n, ok, err
}

// Add adds members. They are UTF-8 of at most MaxName bytes each.
func (u Union) Add(s Session, members ...string) error {
	for _, m := range members {
		if len(m) > MaxName || !utf8.ValidString(m) {
			return fmt.Errorf("session: union %q: a member must be at most %d bytes of UTF-8: %w", string(u), MaxName, ErrTooLarge)
		}
	}
	return updateRuled(s, string(u), ruleUnion, func(v *ruled, _ uint64) error {
		v.members = append(v.members, members...)
		slices.Sort(v.members)
		v.members = slices.Compact(v.members)
		return nil
	})
}

// Members returns the members, sorted.
func (u Union) Members(s Session) (members []string, err error) {
	_, err = s.Get(string(u), &members)
	return members, err
}

func updateRuled(s Session, name string, rule rule, change func(v *ruled, node uint64) error) error {
	r, ok := s.(Ruled)
	if !ok {
		return fmt.Errorf("session: attribute %q: a %T has no merge rules", name, s)
	}
	return r.UpdateRuled(name, func(old Entry, node uint64) ([]byte, error) {
		v := ruled{rule: rule}
		switch is, ok := parseRuled(old.Value); {
		case ok && is.rule == rule:
			v = is
		case old.Deleted:
			v.epoch = old.Version
		case old.Value != nil:
			return nil, fmt.Errorf("attribute %q: %w", name, ErrRule)
		}
		if err := change(&v, node); err != nil {
			return nil, err
		}
		return v.append(nil), nil
	})
}

// rule says how two histories of one attribute become one. The number is part of
// the encoding, and of two rules the higher wins.
type rule uint8

const (
	rulePlain rule = iota // the higher version wins
	ruleSum
	ruleMax
	ruleUnion
)

// ruled is the value of an attribute with a rule. epoch is the version of the
// deletion after which it began, zero for none: a value of a later epoch wins,
// and within one epoch values are joined. Without it, what was deleted could come
// back through a node that had not seen the deletion.
type ruled struct {
	rule  rule
	epoch Version
	// parts are what each node has added and taken away, by node: each node
	// writes its own part only, and both numbers only grow.
	parts   []part
	max     int64
	set     bool     // max is one
	members []string // sorted, each once
}

type part struct{ node, plus, minus uint64 }

// The encoding is CBOR: tag 0x4c484d52, then an array of the rule, the epoch's
// counter and node, and an array of the rule's own items: for sum node, plus and
// minus of each node; for max the number; for union the members. Only what is
// written exactly so is a value with a rule; all else is a plain value.
var ruleTag = []byte{majorTag | 26, 0x4c, 0x48, 0x4d, 0x52, majorArray | 4}

func (v *ruled) append(dst []byte) []byte {
	dst = append(dst, ruleTag...)
	dst = appendHead(dst, majorUint, uint64(v.rule))
	dst = appendHead(dst, majorUint, v.epoch.Counter)
	dst = appendHead(dst, majorUint, v.epoch.Node)
	switch v.rule {
	case ruleSum:
		dst = appendHead(dst, majorArray, uint64(3*len(v.parts)))
		for _, p := range v.parts {
			dst = appendHead(dst, majorUint, p.node)
			dst = appendHead(dst, majorUint, p.plus)
			dst = appendHead(dst, majorUint, p.minus)
		}
	case ruleMax:
		dst = appendInt(append(dst, majorArray|1), v.max)
	case ruleUnion:
		dst = appendHead(dst, majorArray, uint64(len(v.members)))
		for _, m := range v.members {
			dst = appendText(dst, m)
		}
	}
	return dst
}

// isRuled is a quick look whether b may be the value of an attribute with a
// rule.
func isRuled(b []byte) bool { return bytes.HasPrefix(b, ruleTag) }

// parseRuled decodes a value with a rule; false if b is a plain one.
func parseRuled(b []byte) (v ruled, ok bool) {
	if !isRuled(b) {
		return v, false
	}
	in := reader{b: b, off: len(ruleTag)}
	kind := in.head(majorUint)
	if kind == uint64(rulePlain) || kind > uint64(ruleUnion) {
		return v, false
	}
	v.rule = rule(kind)
	v.epoch = Version{in.head(majorUint), in.head(majorUint)}
	n := in.head(majorArray)
	if n > uint64(len(b)) {
		return v, false
	}
	switch v.rule {
	case ruleSum:
		for ; n >= 3 && in.err == nil; n -= 3 {
			v.parts = append(v.parts, part{in.head(majorUint), in.head(majorUint), in.head(majorUint)})
		}
		if !slices.IsSortedFunc(v.parts, func(a, b part) int { return cmp.Compare(a.node, b.node) }) ||
			len(slices.CompactFunc(slices.Clone(v.parts), func(a, b part) bool { return a.node == b.node })) != len(v.parts) {
			return v, false
		}
	case ruleMax:
		v.max, v.set = in.int(), true
	case ruleUnion:
		for ; n > 0 && in.err == nil; n-- {
			m := string(in.text(MaxName))
			if last := len(v.members) - 1; last >= 0 && v.members[last] >= m {
				return v, false
			}
			v.members = append(v.members, m)
		}
	}
	if in.err != nil || in.off != len(b) {
		return v, false
	}
	return v, bytes.Equal(v.append(make([]byte, 0, len(b))), b) // written exactly so
}

// join adds what other knows. Both have the same rule and epoch.
func (v *ruled) join(other *ruled) {
	switch v.rule {
	case ruleSum:
		all := append(slices.Clone(v.parts), other.parts...)
		slices.SortFunc(all, func(a, b part) int { return cmp.Compare(a.node, b.node) })
		v.parts = all[:0]
		for _, p := range all {
			if last := len(v.parts) - 1; last >= 0 && v.parts[last].node == p.node {
				v.parts[last].plus = max(v.parts[last].plus, p.plus)
				v.parts[last].minus = max(v.parts[last].minus, p.minus)
			} else {
				v.parts = append(v.parts, p)
			}
		}
	case ruleMax:
		v.max = max(v.max, other.max)
	case ruleUnion:
		all := append(slices.Clone(v.members), other.members...)
		slices.SortFunc(all, strings.Compare)
		v.members = slices.Compact(all)
	}
}

// plain returns what an application reads: a number, or a list of texts.
func (v *ruled) plain() any {
	switch v.rule {
	case ruleSum:
		var n uint64 // wraps as int64 does
		for _, p := range v.parts {
			n += p.plus - p.minus
		}
		return int64(n)
	case ruleUnion:
		return v.members
	}
	return v.max
}

// mergeEntry returns the union of two entries of one attribute, whether it has
// the value or version of theirs, and whether they conflict.
//
// Entries are ordered by epoch, which for a plain value or a deletion is its
// version, and then by rule; equals are joined. The order is total and the join
// of one epoch and rule is a union or a maximum, so the whole is commutative,
// associative and idempotent.
func mergeEntry(ours, theirs Entry) (e Entry, taken, conflict bool) {
	a, b := ruled{epoch: ours.Version}, ruled{epoch: theirs.Version}
	aRuled, bRuled := false, false
	if isRuled(ours.Value) || isRuled(theirs.Value) { // not the usual case
		if v, ok := parseRuled(ours.Value); ok {
			a, aRuled = v, true
		}
		if v, ok := parseRuled(theirs.Value); ok {
			b, bRuled = v, true
		}
	}
	e = ours
	switch {
	case !aRuled && !bRuled:
		taken = ours.yields(theirs)
	case a.epoch != b.epoch || a.rule != b.rule:
		taken = a.epoch.Less(b.epoch) || a.epoch == b.epoch && a.rule < b.rule
	default:
		taken = ours.Version.Less(theirs.Version)
		if taken {
			e.Version, e.Past = theirs.Version, mergePast(theirs, ours, false)
		} else {
			e.Past = mergePast(ours, theirs, ours.Version == theirs.Version)
		}
		if !bytes.Equal(ours.Value, theirs.Value) {
			a.join(&b)
			e.Value = a.append(make([]byte, 0, len(ours.Value)+len(theirs.Value)))
			taken = taken || !bytes.Equal(e.Value, ours.Value)
		}
		return e, taken, false
	}
	lost := theirs
	if taken {
		e, lost = theirs, ours
	}
	same := e.Version == lost.Version && e.Deleted == lost.Deleted && bytes.Equal(e.Value, lost.Value)
	conflict = e.overrides(lost)
	e.Past = mergePast(e, lost, same)
	return e, taken, conflict
}
