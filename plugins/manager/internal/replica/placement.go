package replica

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
)

// owner is who is responsible for a session. Each move takes a higher epoch.
type owner struct{ epoch, node uint64 }

// less reports whether o gives way to x.
func (o owner) less(x owner) bool {
	if o.epoch != x.epoch {
		return o.epoch < x.epoch
	}
	return o.node < x.node
}

// holder is another node that has a session; live says that its host uses it,
// stale that it may lack something that this node knows.
type holder struct {
	node  uint64
	live  bool
	stale bool
}

// place is where a session is. where does not list this node.
type place struct {
	owner owner
	where []holder
}

func (p *place) find(node uint64) int {
	return slices.IndexFunc(p.where, func(h holder) bool { return h.node == node })
}

func (p *place) has(node uint64) bool { return p != nil && p.find(node) >= 0 }

// add notes a holder, and leaves one that is known alone.
func (p *place) add(h holder) {
	if p.find(h.node) < 0 && len(p.where) < maxWhere {
		p.where = append(p.where, h)
	}
}

// set notes a holder with what it says of itself.
func (p *place) set(h holder) {
	if i := p.find(h.node); i >= 0 {
		p.where[i].live = h.live
		return
	}
	p.add(h)
}

// fresh notes a node that has everything that this one knows.
func (p *place) fresh(node uint64) {
	if i := p.find(node); i >= 0 {
		p.where[i].stale = false
		return
	}
	p.add(holder{node: node})
}

func (p *place) remove(node uint64) {
	if i := p.find(node); i >= 0 {
		p.where = slices.Delete(p.where, i, i+1)
	}
}

// maxWhere bounds the nodes that a placement lists; it is the bound of members.
const maxWhere = 4096

// holderSize is a node and its flag.
const holderSize = 9

// appendPlace appends the placement as this node, self, knows it: epoch (a
// varint), owner, number of nodes (a varint), and for each node whether it uses
// the session. self itself is listed if it is not 0.
func appendPlace(dst []byte, p *place, self uint64, live bool) []byte {
	dst = binary.AppendUvarint(dst, p.owner.epoch)
	dst = binary.BigEndian.AppendUint64(dst, p.owner.node)
	n := len(p.where)
	if self != 0 {
		n++
	}
	dst = binary.AppendUvarint(dst, uint64(n))
	if self != 0 {
		dst = appendHolder(dst, holder{node: self, live: live})
	}
	for _, h := range p.where {
		dst = appendHolder(dst, h)
	}
	return dst
}

func appendHolder(dst []byte, h holder) []byte {
	dst = binary.BigEndian.AppendUint64(dst, h.node)
	if h.live {
		return append(dst, 1)
	}
	return append(dst, 0)
}

// parsePlace reads a placement into p, whose list it uses again.
func parsePlace(b []byte, p *place) (rest []byte, err error) {
	cut := func() ([]byte, error) { return nil, fmt.Errorf("%w: placement cut off", errMalformed) }
	p.where = p.where[:0]
	epoch, n := binary.Uvarint(b)
	if n <= 0 || len(b) < n+8 {
		return cut()
	}
	p.owner = owner{epoch, binary.BigEndian.Uint64(b[n:])}
	b = b[n+8:]
	count, n := binary.Uvarint(b)
	if n <= 0 || count > maxWhere+1 || uint64(len(b)-n) < count*holderSize {
		return cut()
	}
	b = b[n:]
	for range count {
		p.where = append(p.where, holder{node: binary.BigEndian.Uint64(b), live: b[8] != 0})
		b = b[holderSize:]
	}
	return b, nil
}

// items reads a list of records with their placements.
type items struct {
	b     []byte
	d     session.Decoder
	place place
	err   error
}

// next reads the next record; false at the end or after an error.
func (it *items) next() bool {
	if it.err != nil || len(it.b) == 0 {
		return false
	}
	rest, err := parsePlace(it.b, &it.place)
	if err == nil && len(rest) == 0 {
		err = fmt.Errorf("%w: placement without a record", errMalformed)
	}
	if err != nil {
		it.err = err
		return false
	}
	it.d.Reset(rest)
	if !it.d.Next() {
		it.err = it.d.Err()
		return false
	}
	it.b = rest[len(it.d.Raw()):]
	return true
}

// group is what the managers of the group are at one time. It is immutable.
type group struct {
	self uint64
	// members are those that changes are sent to: all but those aside.
	members []channel.Member
	// index are all members of the view, aside are those that do not answer.
	index map[uint64]channel.Member
	aside map[uint64]bool
	// ranked are this node and the members that run this manager and answer.
	ranked  []rankedNode
	domains int
	made    time.Time
	// unknown: some member has not answered yet, so it may have sessions.
	unknown bool
}

type rankedNode struct {
	node, hash uint64
	domain     int
}

// newGroup describes the present view. m.mu is held.
func (m *Manager) newGroup() *group {
	g := &group{made: time.Now(), self: nodeOf(m.view.Local), index: make(map[uint64]channel.Member, len(m.view.Members))}
	domains := map[string]int{}
	rank := func(member channel.Member) {
		i, known := domains[member.Domain]
		if !known {
			i = len(domains)
			domains[member.Domain] = i
		}
		g.ranked = append(g.ranked, rankedNode{nodeOf(member), mix(nodeOf(member)), i})
	}
	rank(m.view.Local)
	for _, member := range m.view.Members {
		g.index[nodeOf(member)] = member
		p := m.peers[member.ID]
		if p != nil && p.aside {
			if g.aside == nil {
				g.aside = map[uint64]bool{}
			}
			g.aside[p.node] = true
			g.unknown = true
			continue
		}
		g.members = append(g.members, member)
		if p != nil && p.hello {
			rank(member)
		} else {
			g.unknown = true
		}
	}
	g.domains = len(domains)
	if old := m.group.Load(); old != nil && old.self == g.self && slices.Equal(old.ranked, g.ranked) && old.unknown == g.unknown {
		g.made = old.made
	}
	return g
}

// has reports whether a node is in the view.
func (g *group) has(node uint64) bool {
	_, there := g.index[node]
	return there
}

// reach returns a member that answers.
func (g *group) reach(node uint64) (channel.Member, bool) {
	member, there := g.index[node]
	return member, there && !g.aside[node]
}

// mix spreads all bits over all bits: the finisher of SplitMix64.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// ring appends the first n nodes of a session's ranking to out. Every node has
// its own score for each session, so a node that comes or goes changes nothing
// between the others. Of several domains, each has one node before any has two.
func (g *group) ring(digest uint64, n int, out []uint64) []uint64 {
	var few [8]bool
	used := few[:]
	if g.domains > len(few) {
		used = make([]bool, g.domains)
	}
	inCycle := 0
	for n = min(n, len(g.ranked)); len(out) < n; {
		best, bestScore, found := rankedNode{}, uint64(0), false
		for _, r := range g.ranked {
			if used[r.domain] || slices.Contains(out, r.node) {
				continue
			}
			if score := mix(digest ^ r.hash); !found || score > bestScore {
				best, bestScore, found = r, score, true
			}
		}
		if !found { // the next node of each domain
			clear(used)
			inCycle = 0
			continue
		}
		out = append(out, best.node)
		used[best.domain] = true
		if inCycle++; inCycle == g.domains {
			clear(used)
			inCycle = 0
		}
	}
	return out
}

// copies appends to out the nodes that have to have a copy of a session beside
// its owner: the first of its ranking, those of other domains than the owner's
// first.
func (g *group) copies(digest, owner uint64, n int, out []uint64) []uint64 {
	var few [maxCopies + 1]uint64
	ring := g.ring(digest, n+1, few[:0])
	if i := slices.Index(ring, owner); i >= 0 {
		return append(out, slices.Delete(ring, i, i+1)...)
	}
	domain := g.domain(owner)
	for _, same := range []bool{false, true} {
		for _, node := range ring {
			if len(out) < n && (g.domain(node) == domain) == same {
				out = append(out, node)
			}
		}
	}
	return out
}

func (g *group) domain(node uint64) int {
	for _, r := range g.ranked {
		if r.node == node {
			return r.domain
		}
	}
	return -1
}

// placed reports whether sessions are on some nodes only.
func (m *Manager) placed() bool { return m.cfg.Copies > 0 }

// shared reports whether this node and another should both have a session, as
// far as this node knows; p is nil for a tombstone.
func (m *Manager) shared(g *group, peer uint64, k session.Key, p *replica) bool {
	if !m.placed() {
		return true
	}
	var few [maxCopies + 1]uint64
	switch {
	case p == nil, !g.has(p.place.owner.node) && p.place.owner.node != g.self:
		return slices.Contains(g.ring(k.Digest(), m.cfg.Copies+1, few[:0]), peer)
	case p.place.owner.node == peer:
		return true
	case p.place.owner.node == g.self:
		return p.place.has(peer) || slices.Contains(g.copies(k.Digest(), g.self, m.cfg.Copies, few[:0]), peer)
	}
	return false
}
