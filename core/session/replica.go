package session

import (
	"bytes"
	"encoding/binary"
	"iter"
	"slices"
	"strings"
	"time"
	"unique"
)

// Replica is a living session in little memory, for those who keep many: 64
// bytes, and 72 for each attribute, over the bytes of the values. It follows the
// same rules as Record. It is not safe for concurrent use.
type Replica struct {
	created, lastAccess int64
	maxInactive         time.Duration
	maxInactiveVersion  Version
	attrs               []replicaAttr // by name
}

type replicaAttr struct {
	name string // shared by all replicas
	Entry
}

// MakeReplica returns what a living record says. The values are shared.
func MakeReplica(r *Record) Replica {
	p := Replica{
		created: r.Created, lastAccess: r.LastAccess,
		maxInactive: r.MaxInactive, maxInactiveVersion: r.MaxInactiveVersion,
	}
	if len(r.Attrs) > 0 {
		p.attrs = make([]replicaAttr, 0, len(r.Attrs))
		for name, e := range r.Attrs {
			p.Put(name, e)
		}
	}
	return p
}

// Get returns an attribute; its value is nil if it is not set.
func (p *Replica) Get(name string) (e Entry, there bool) {
	i, there := p.find(name)
	if there {
		e = p.attrs[i].Entry
	}
	return e, there
}

// Put replaces an attribute, whatever the versions say.
func (p *Replica) Put(name string, e Entry) {
	if i, there := p.find(name); there {
		p.attrs[i].Entry = e
	} else {
		p.insert(i, name, e)
	}
}

// insert makes room for exactly one attribute more: most sessions have few, and
// get them once.
func (p *Replica) insert(i int, name string, e Entry) {
	if len(p.attrs) == cap(p.attrs) {
		p.attrs = append(make([]replicaAttr, 0, len(p.attrs)+1+len(p.attrs)/8), p.attrs...)
	}
	p.attrs = slices.Insert(p.attrs, i, replicaAttr{unique.Make(name).Value(), e})
}

// All yields the attributes, deleted ones included, by name.
func (p *Replica) All() iter.Seq2[string, Entry] {
	return func(yield func(string, Entry) bool) {
		for i := range p.attrs {
			if !yield(p.attrs[i].name, p.attrs[i].Entry) {
				return
			}
		}
	}
}

// Len returns the number of attributes, deleted ones included.
func (p *Replica) Len() int { return len(p.attrs) }

// DropDeleted forgets which attributes were deleted.
func (p *Replica) DropDeleted() {
	p.attrs = slices.DeleteFunc(p.attrs, func(a replicaAttr) bool { return a.Deleted })
}

// Touch notes an access, in milliseconds since 1970.
func (p *Replica) Touch(at int64) { p.lastAccess = max(p.lastAccess, at) }

// SetMaxInactive replaces the time to live, whatever the versions say.
func (p *Replica) SetMaxInactive(d time.Duration, v Version) {
	p.maxInactive, p.maxInactiveVersion = d, v
}

// Merge takes over what r knows, see [Record.Merge], and returns the number of
// conflicts. It copies what it keeps. r must be living.
func (p *Replica) Merge(r *Record) (conflicts int) { return p.MergeEach(r, nil) }

// MergeEach is Merge; it calls each as [Record.MergeEach] does.
func (p *Replica) MergeEach(r *Record, each func(name string, kept, lost Entry)) (conflicts int) {
	if p.created == 0 || r.Created != 0 && r.Created < p.created {
		p.created = r.Created
	}
	p.lastAccess = max(p.lastAccess, r.LastAccess)
	p.maxInactive, p.maxInactiveVersion = mergeInactive(
		p.maxInactive, p.maxInactiveVersion, r.MaxInactive, r.MaxInactiveVersion)
	if len(p.attrs) == 0 && len(r.Attrs) > 0 {
		p.attrs = make([]replicaAttr, 0, len(r.Attrs))
	}
	for name, theirs := range r.Attrs {
		i, both := p.find(name)
		if !both {
			theirs.Value = bytes.Clone(theirs.Value)
			p.insert(i, name, theirs)
			continue
		}
		e, taken, conflict := mergeEntry(p.attrs[i].Entry, theirs)
		if conflict {
			conflicts++
			if each != nil {
				kept, lost := p.attrs[i].Entry, theirs
				if taken {
					kept, lost = theirs, kept
				}
				each(name, kept, lost)
			}
		}
		if taken {
			e.Value = bytes.Clone(e.Value)
		}
		p.attrs[i].Entry = e
	}
	return conflicts
}

func (p *Replica) find(name string) (int, bool) {
	return slices.BinarySearchFunc(p.attrs, name, func(a replicaAttr, n string) int {
		return strings.Compare(a.name, n)
	})
}

// Created is when the session was made, in milliseconds since 1970; 0 is
// unknown.
func (p *Replica) Created() int64 { return p.created }

// Whole reports whether the replica is a whole session and not only changes of
// one.
func (p *Replica) Whole() bool { return p.created != 0 }

// LastAccess is the latest known access, in milliseconds since 1970.
func (p *Replica) LastAccess() int64 { return p.lastAccess }

// MaxInactive is the time to live without access; 0 or less means for ever.
func (p *Replica) MaxInactive() time.Duration { return p.maxInactive }

// Size returns the bytes that the attributes count for, as [Record.Size].
func (p *Replica) Size() int {
	n := 0
	for i := range p.attrs {
		n += len(p.attrs[i].name) + len(p.attrs[i].Value)
	}
	return n
}

// Record returns the record. The values are shared with the replica.
func (p *Replica) Record(key Key) *Record {
	r := &Record{
		Key: key, Created: p.created, LastAccess: p.lastAccess,
		MaxInactive: p.maxInactive, MaxInactiveVersion: p.maxInactiveVersion,
	}
	if len(p.attrs) > 0 {
		r.Attrs = make(map[string]Entry, len(p.attrs))
		for i := range p.attrs {
			r.Attrs[p.attrs[i].name] = p.attrs[i].Entry
		}
	}
	return r
}

// AppendTo appends the encoded record to dst, as [AppendBatch].
func (p *Replica) AppendTo(dst []byte, key Key) []byte {
	dst = appendFields(dst, &Record{
		Key: key, Created: p.created, LastAccess: p.lastAccess,
		MaxInactive: p.maxInactive, MaxInactiveVersion: p.maxInactiveVersion,
	})
	dst = appendHead(dst, majorArray, uint64(len(p.attrs)))
	for i := range p.attrs {
		dst = appendEntry(dst, p.attrs[i].name, p.attrs[i].Entry)
	}
	return dst
}

// Counter returns the same as [Record.Counter].
func (p *Replica) Counter() uint64 {
	n := p.maxInactiveVersion.Counter
	for i := range p.attrs {
		n = max(n, p.attrs[i].Version.Counter)
	}
	return n
}

// Versions returns the same as [Record.Versions].
func (p *Replica) Versions() uint64 {
	sum := uint64(fnvStart.version(p.maxInactiveVersion).uint(uint64(Living)))
	for i := range p.attrs {
		sum += versionsOf(p.attrs[i].name, p.attrs[i].Entry)
	}
	return sum
}

// digestAccess is how exactly a digest tells access times apart, in
// milliseconds.
const digestAccess = 60_000

// Digest returns a hash of the versions that the replica has. It is the same on
// all nodes for equal replicas. Values are not hashed, because their versions
// stand for them, but those with a rule are: what two nodes have joined has the
// version of one of the parts. Access times count in minutes.
func (p *Replica) Digest() uint64 {
	h := fnvStart
	h = h.uint(uint64(p.created))
	h = h.uint(uint64(p.lastAccess / digestAccess))
	h = h.version(p.maxInactiveVersion)
	for i := range p.attrs {
		h = h.text(p.attrs[i].name).version(p.attrs[i].Version)
		if isRuled(p.attrs[i].Value) {
			h = h.text(string(p.attrs[i].Value))
		}
	}
	return uint64(h)
}

// Digest returns a hash of the key, the same on all nodes. All of its bits are
// equally good.
func (k Key) Digest() uint64 {
	h := uint64(fnvStart.text(k.Context).text(k.ID))
	h = (h ^ h>>33) * 0xff51afd7ed558ccd // the finisher of MurmurHash3
	return h ^ h>>33
}

// DigestEnd returns the digest of a session that has ended.
func DigestEnd(end EndKind, renewedTo string) uint64 {
	return uint64(fnvStart.uint(uint64(end)).text(renewedTo))
}

// fnv is the 64-bit FNV-1a hash.
type fnv uint64

const (
	fnvStart fnv = 14695981039346656037
	fnvPrime fnv = 1099511628211
)

func (h fnv) text(s string) fnv {
	for i := range len(s) {
		h = (h ^ fnv(s[i])) * fnvPrime
	}
	return (h ^ 0xff) * fnvPrime // no UTF-8 text has 0xff: ends are marked
}

func (h fnv) uint(v uint64) fnv {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	for _, c := range b {
		h = (h ^ fnv(c)) * fnvPrime
	}
	return h
}

func (h fnv) version(v Version) fnv { return h.uint(v.Counter).uint(v.Node) }
