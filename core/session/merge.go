package session

import (
	"bytes"
	"maps"
	"strings"
	"time"
)

// Merge makes r the union of what r and other know of one session, and returns
// how many conflicts it met: attributes of which a change is lost that the writer
// of the one that is kept had not seen (see [Past]). It is commutative,
// associative and idempotent, so changes may arrive in any order and more than
// once:
//
//   - a tombstone wins over everything; of two, the kind that comes later in
//     [EndKind], the later time and the greater RenewedTo are kept;
//   - Created is the earliest known, LastAccess the latest;
//   - MaxInactive is that of the higher version;
//   - an attribute is that of the higher version. Two different values of one
//     version cannot come from correct nodes; a deletion wins then, otherwise
//     the greater bytes;
//   - attributes with a rule ([Counter], [Max], [Union]) are joined by it: nothing
//     is lost then, so that is no conflict.
//
// r takes over the values of other without copying them. The keys must be equal;
// Merge does not look at them.
func (r *Record) Merge(other *Record) (conflicts int) { return r.MergeEach(other, nil) }

// MergeEach is Merge; it calls each, unless it is nil, for every conflict, with
// the entry that is kept and the one that is lost.
func (r *Record) MergeEach(other *Record, each func(name string, kept, lost Entry)) (conflicts int) {
	if r.End != Living || other.End != Living {
		r.mergeEnd(other)
		return 0
	}
	if r.Created == 0 || other.Created != 0 && other.Created < r.Created {
		r.Created = other.Created
	}
	r.LastAccess = max(r.LastAccess, other.LastAccess)
	r.MaxInactive, r.MaxInactiveVersion = mergeInactive(
		r.MaxInactive, r.MaxInactiveVersion, other.MaxInactive, other.MaxInactiveVersion)
	if len(other.Attrs) > 0 && r.Attrs == nil {
		r.Attrs = make(map[string]Entry, len(other.Attrs))
	}
	for name, theirs := range other.Attrs {
		ours, both := r.Attrs[name]
		if !both {
			r.Attrs[name] = theirs
			continue
		}
		e, taken, conflict := mergeEntry(ours, theirs)
		if conflict {
			conflicts++
			if each != nil {
				kept, lost := ours, theirs
				if taken {
					kept, lost = theirs, ours
				}
				each(name, kept, lost)
			}
		}
		if taken || e.Past != ours.Past {
			r.Attrs[name] = e
		}
	}
	return conflicts
}

// mergeInactive returns the time to live of the higher version, the longer one
// of equal versions.
func mergeInactive(a time.Duration, av Version, b time.Duration, bv Version) (time.Duration, Version) {
	if av.Less(bv) || av == bv && a < b {
		return b, bv
	}
	return a, av
}

// mergeEnd merges two records of which at least one has ended.
func (r *Record) mergeEnd(other *Record) {
	r.End = max(r.End, other.End)
	r.EndTime = max(r.EndTime, other.EndTime)
	r.RenewedTo = max(r.RenewedTo, other.RenewedTo)
	*r = r.Tombstone()
}

// Tombstone returns the record without anything that a record which has ended
// does not need.
func (r *Record) Tombstone() Record {
	return Record{Key: r.Key, End: r.End, EndTime: r.EndTime, RenewedTo: r.RenewedTo}
}

// yields reports whether e gives way to other, for the same attribute.
func (e Entry) yields(other Entry) bool {
	if e.Version != other.Version {
		return e.Version.Less(other.Version)
	}
	if e.Deleted != other.Deleted {
		return other.Deleted
	}
	return bytes.Compare(e.Value, other.Value) < 0
}

// Clone returns a copy that shares nothing with r but strings: it may be kept
// when r came from [DecodeBatch].
func (r *Record) Clone() *Record {
	c := *r
	if r.Attrs == nil {
		return &c
	}
	c.Attrs = make(map[string]Entry, len(r.Attrs))
	for name, e := range r.Attrs {
		e.Value = bytes.Clone(e.Value)
		c.Attrs[name] = e
	}
	return &c
}

// Share returns a copy that shares the values, which nobody changes, but not the
// map.
func (r *Record) Share() *Record {
	c := *r
	c.Attrs = maps.Clone(r.Attrs)
	return &c
}

// Size returns the bytes that the session's attributes count for: names and
// values, deleted ones by their names.
func (r *Record) Size() int {
	n := 0
	for name, e := range r.Attrs {
		n += len(name) + len(e.Value)
	}
	return n
}

// Counter returns the highest counter of any version in the record.
func (r *Record) Counter() uint64 {
	n := r.MaxInactiveVersion.Counter
	for _, e := range r.Attrs {
		n = max(n, e.Version.Counter)
	}
	return n
}

// Versions returns a hash of what the record has of the session, the same on all
// nodes that have the same: all attributes' names and versions, and the values
// of those with a rule.
func (r *Record) Versions() uint64 {
	sum := uint64(fnvStart.version(r.MaxInactiveVersion).uint(uint64(r.End)))
	for name, e := range r.Attrs {
		sum += versionsOf(name, e) // in any order
	}
	return sum
}

func versionsOf(name string, e Entry) uint64 {
	h := fnvStart.text(name).version(e.Version)
	if isRuled(e.Value) {
		h = h.text(string(e.Value))
	}
	return uint64(h)
}

// Summary describes the record for operators.
func (r *Record) Summary() Summary {
	s := Summary{
		Context:    r.Key.Context,
		ID:         Prefix(r.Key.ID),
		Bytes:      r.Size(),
		Created:    fromMillis(r.Created),
		LastAccess: fromMillis(r.LastAccess),
	}
	for _, e := range r.Attrs {
		if !e.Deleted {
			s.Attributes++
		}
	}
	return s
}

// Compare orders keys, by context and then by id.
func (k Key) Compare(o Key) int {
	if c := strings.Compare(k.Context, o.Context); c != 0 {
		return c
	}
	return strings.Compare(k.ID, o.ID)
}
