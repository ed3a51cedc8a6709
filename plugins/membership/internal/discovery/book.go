package discovery

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// book holds the addresses that heartbeats go to: those of the last answer,
// those of members that live, and for a time those that were in earlier
// answers. It is pure: time is an argument.
type book struct {
	max   int           // bound of the addresses
	retry time.Duration // how long an address that nobody names any more is kept
	known map[netip.AddrPort]*entry
	live  map[netip.Addr]int // members that live, by host
}

// entry is an address.
type entry struct {
	peer    Peer
	missing time.Time // since when no answer names it; zero if the last one does
}

func newBook(limit int, retry time.Duration) *book {
	return &book{max: limit, retry: retry, known: map[netip.AddrPort]*entry{}, live: map[netip.Addr]int{}}
}

// usable reports whether datagrams can be sent to a.
func usable(a netip.AddrPort) bool {
	ip := a.Addr()
	return ip.IsValid() && !ip.IsUnspecified() && !ip.IsMulticast() && a.Port() != 0
}

// answer takes over what a look-up has found. Of more addresses than the bound
// those of members that live are kept first, then those that were known, then
// the lowest: so all nodes choose alike. It returns how many addresses cannot be
// used, and how many are beyond the bound.
func (b *book) answer(peers []Peer, now time.Time) (invalid, beyond int) {
	named := map[netip.AddrPort]bool{}
	var fresh []Peer
	for _, p := range peers {
		p.Addr = netip.AddrPortFrom(p.Addr.Addr().Unmap().WithZone(""), p.Addr.Port())
		if !usable(p.Addr) {
			invalid++
			continue
		}
		if named[p.Addr] {
			continue
		}
		named[p.Addr] = true
		fresh = append(fresh, p)
	}
	rank := func(a netip.AddrPort) int {
		switch {
		case b.live[a.Addr()] > 0:
			return 0
		case b.known[a] != nil:
			return 1
		}
		return 2
	}
	slices.SortFunc(fresh, func(x, y Peer) int {
		return cmp.Or(cmp.Compare(rank(x.Addr), rank(y.Addr)), x.Addr.Compare(y.Addr))
	})
	if len(fresh) > b.max {
		beyond = len(fresh) - b.max
		for _, p := range fresh[b.max:] {
			delete(named, p.Addr)
		}
		fresh = fresh[:b.max]
	}
	for a, e := range b.known {
		if !named[a] && e.missing.IsZero() {
			e.missing = now
		}
	}
	for _, p := range fresh {
		b.known[p.Addr] = &entry{peer: p}
	}
	b.trim()
	return invalid, beyond
}

// hear takes the address of a member that lives and that no answer may name:
// a node that found this one first.
func (b *book) hear(a netip.AddrPort, now time.Time) {
	if usable(a) && b.known[a] == nil && len(b.known) < b.max {
		b.known[a] = &entry{peer: Peer{Addr: a}, missing: now}
	}
}

// trim forgets addresses beyond the bound, first those that have been missing
// for the longest time.
func (b *book) trim() {
	if len(b.known) <= b.max {
		return
	}
	var spare []netip.AddrPort
	for a, e := range b.known {
		if !e.missing.IsZero() {
			spare = append(spare, a)
		}
	}
	slices.SortFunc(spare, func(x, y netip.AddrPort) int {
		alive := func(a netip.AddrPort) int { return min(1, b.live[a.Addr()]) }
		return cmp.Or(cmp.Compare(alive(x), alive(y)), b.known[x].missing.Compare(b.known[y].missing), x.Compare(y))
	})
	for _, a := range spare[:min(len(spare), len(b.known)-b.max)] {
		delete(b.known, a)
	}
}

// lives counts members that came (1) or went (-1) at a host.
func (b *book) lives(host netip.Addr, change int, now time.Time) {
	host = host.Unmap()
	if b.live[host] += change; b.live[host] > 0 {
		return
	}
	delete(b.live, host)
	for a, e := range b.known { // the time of retrying begins
		if a.Addr() == host && !e.missing.IsZero() {
			e.missing = now
		}
	}
}

// hasHost reports whether an address of that host is known.
func (b *book) hasHost(host netip.Addr) bool {
	for a := range b.known {
		if a.Addr() == host {
			return true
		}
	}
	return false
}

// expire forgets what has been missing for too long; it reports whether there
// was any.
func (b *book) expire(now time.Time) bool {
	before := len(b.known)
	for a, e := range b.known {
		if !e.missing.IsZero() && b.live[a.Addr()] == 0 && now.Sub(e.missing) >= b.retry {
			delete(b.known, a)
		}
	}
	return len(b.known) != before
}

// addresses returns all addresses, sorted.
func (b *book) addresses() []netip.AddrPort {
	all := make([]netip.AddrPort, 0, len(b.known))
	for a := range b.known {
		all = append(all, a)
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return all
}
