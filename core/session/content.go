package session

import "time"

// Content returns a hash of what the session is for its application: its
// attributes with their versions and values, when it was made and how long it
// lives. It is the same on all nodes that have the same, and never 0. Access
// times and deleted attributes do not count. It reads all values.
func (r *Record) Content() uint64 {
	h := contentStart(r.Created, r.MaxInactive, r.MaxInactiveVersion)
	for name, e := range r.Attrs {
		h += contentOf(name, e)
	}
	return contentEnd(h)
}

// Content returns the same as [Record.Content].
func (p *Replica) Content() uint64 {
	h := contentStart(p.created, p.maxInactive, p.maxInactiveVersion)
	for i := range p.attrs {
		h += contentOf(p.attrs[i].name, p.attrs[i].Entry)
	}
	return contentEnd(h)
}

func contentStart(created int64, life time.Duration, v Version) uint64 {
	return uint64(fnvStart.uint(uint64(created)).uint(uint64(life)).version(v))
}

// contentOf is the part of one attribute. The parts are added, so their order
// does not matter; the finisher sees to it that equal sums are no likelier than
// equal hashes.
func contentOf(name string, e Entry) uint64 {
	if e.Deleted {
		return 0
	}
	h := fnvStart.text(name).version(e.Version)
	for _, c := range e.Value {
		h = (h ^ fnv(c)) * fnvPrime
	}
	return finish(uint64(h))
}

func contentEnd(h uint64) uint64 {
	if h = finish(h); h == 0 {
		return 1
	}
	return h
}

// finish is the finisher of SplitMix64.
func finish(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}
