package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// What a node says of itself travels as memberlist's meta data: a version, when
// the node came up by its own clock (milliseconds since 1970, big endian), and
// its member record as in heartbeats. Receivers count the time alive from there,
// so that all see the same order of age.
const (
	metaVersion = 1
	metaHeader  = 1 + 8
	// maxMeta is what memberlist carries, in bytes.
	maxMeta = 512
)

// info is what is known of a node.
type info struct {
	rec    channel.Member
	start  time.Time
	gossip netip.AddrPort // where it gossips
}

// aged returns the record with its time alive.
func (i info) aged(now time.Time) channel.Member {
	m := i.rec
	m.Alive = max(0, now.Sub(i.start)).Truncate(time.Millisecond)
	return m
}

func appendMeta(b []byte, m channel.Member, start time.Time) []byte {
	b = append(b, metaVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(start.UnixMilli()))
	m.Alive = 0
	return wire.AppendMember(b, m)
}

var errMeta = errors.New("it says nothing of itself that can be read")

// decodeMeta reads meta data. Nothing of it is trusted.
func decodeMeta(b []byte) (i info, err error) {
	if len(b) < metaHeader || b[0] != metaVersion {
		return i, errMeta
	}
	ms := int64(binary.BigEndian.Uint64(b[1:]))
	if ms < 0 || ms > 1<<46 { // the year 4200
		return i, errMeta
	}
	rec, n, err := wire.DecodeMember(b[metaHeader:])
	if err != nil {
		return i, err
	}
	rec.Host, rec.Alive, rec.Command = rec.Host.Unmap(), 0, ""
	switch {
	case n != len(b)-metaHeader:
		return i, errMeta
	case rec.ID.IsZero():
		return i, errors.New("its id is zero")
	case !rec.Host.IsValid() || rec.Host.IsUnspecified() || rec.Host.IsMulticast():
		return i, errors.New("its address cannot be connected to")
	case rec.Port < 1 || rec.Port > 65535 || rec.SecurePort < -1 || rec.SecurePort > 65535 || rec.UDPPort < -1 || rec.UDPPort > 65535:
		return i, errors.New("its port is outside 1..65535")
	}
	return info{rec: rec, start: time.UnixMilli(ms)}, nil
}

// roster is who is in the group: it makes member events of what memberlist and
// farewells tell. It is pure: time is an argument.
type roster struct {
	local   channel.Member
	max     int
	nodes   map[channel.UniqueID]*entry
	byAddr  map[netip.AddrPort]*entry // those that are shown
	refused func(reason string, i info)
}

// entry is a node.
type entry struct {
	info
	shown bool
	left  bool      // it said so; memberlist may still hold it
	until time.Time // for one that an earlier instance knew: when it is lost if not heard of
}

// Reasons why a node is not shown, for a metric's label.
const (
	reasonFull    = "full"
	reasonAddress = "address_taken"
	reasonOwn     = "own_address"
)

func newRoster(local channel.Member, limit int, refused func(string, info)) *roster {
	return &roster{local: local, max: limit, nodes: map[channel.UniqueID]*entry{}, byAddr: map[netip.AddrPort]*entry{}, refused: refused}
}

// seed takes a member that an earlier instance knew; it is lost at until if it
// is not heard of.
func (r *roster) seed(m channel.Member, now, until time.Time) {
	m.Host = m.Host.Unmap()
	if len(r.nodes) >= r.max || r.nodes[m.ID] != nil || r.byAddr[m.Addr()] != nil || m.ID == r.local.ID || m.Addr() == r.local.Addr() {
		return
	}
	e := &entry{info: info{rec: m, start: now.Add(-m.Alive)}, shown: true, until: until}
	e.rec.Alive = 0
	r.nodes[m.ID], r.byAddr[m.Addr()] = e, e
}

// alive takes over what memberlist says of a node that is there.
func (r *roster) alive(events []channel.MemberEvent, i info, now time.Time) []channel.MemberEvent {
	e := r.nodes[i.rec.ID]
	switch {
	case i.rec.ID == r.local.ID:
		return events
	case e == nil && len(r.nodes) >= r.max:
		r.refused(reasonFull, i)
		return events
	case e == nil:
		e = &entry{}
		r.nodes[i.rec.ID] = e
	case e.left && !i.start.After(e.start):
		return events // it has left, and what is heard of it is older
	}
	e.left, e.until = false, time.Time{}
	return r.place(events, e, i, now)
}

// place shows a node, unless its address is that of another one that is there.
func (r *roster) place(events []channel.MemberEvent, e *entry, i info, now time.Time) []channel.MemberEvent {
	addr := i.rec.Addr()
	if addr == r.local.Addr() {
		r.refused(reasonOwn, i) // usually this node's own earlier incarnation
		events = r.hide(events, e, channel.MemberLost, channel.ErrReplaced, now)
		e.info = i
		return events
	}
	if holder := r.byAddr[addr]; holder != nil && holder != e {
		// Two nodes cannot have one socket: the older is an earlier incarnation.
		earlier := holder.gossip == i.gossip && i.start.After(holder.start)
		if !earlier && holder.until.IsZero() {
			r.refused(reasonAddress, i)
			if !e.shown {
				e.info = i // it waits
			}
			return events
		}
		events = r.hide(events, holder, channel.MemberLost, channel.ErrReplaced, now)
	}
	old := e.info
	e.info = i
	if !e.shown {
		e.shown, r.byAddr[addr] = true, e
		return append(events, channel.MemberEvent{Kind: channel.MemberAdded, Member: i.aged(now)})
	}
	if old.rec.Addr() != addr {
		delete(r.byAddr, old.rec.Addr())
		r.byAddr[addr] = e
	}
	if old.rec != i.rec || !old.start.Equal(i.start) {
		events = append(events, channel.MemberEvent{Kind: channel.MemberUpdated, Member: i.aged(now)})
	}
	if old.rec.Addr() != addr {
		events = r.successor(events, old.rec.Addr(), now)
	}
	return events
}

// hide reports that a node that is shown is gone.
func (r *roster) hide(events []channel.MemberEvent, e *entry, kind channel.MemberEventKind, err error, now time.Time) []channel.MemberEvent {
	if !e.shown {
		return events
	}
	e.shown = false
	delete(r.byAddr, e.rec.Addr())
	return append(events, channel.MemberEvent{Kind: kind, Member: e.aged(now), Err: err})
}

// dead takes over that memberlist holds a node for dead.
func (r *roster) dead(events []channel.MemberEvent, id channel.UniqueID, now time.Time) []channel.MemberEvent {
	e := r.nodes[id]
	if e == nil || !e.until.IsZero() {
		return events
	}
	delete(r.nodes, id)
	shown := e.shown
	events = r.hide(events, e, channel.MemberLost, nil, now)
	if shown {
		events = r.successor(events, e.rec.Addr(), now)
	}
	return events
}

// farewell takes over that a node has said that it leaves; it reports whether
// that is news.
func (r *roster) farewell(events []channel.MemberEvent, id channel.UniqueID, start, now time.Time) ([]channel.MemberEvent, bool) {
	e := r.nodes[id]
	if e == nil || e.left || start.Before(e.start.Truncate(time.Millisecond)) {
		return events, false
	}
	e.left, e.until = true, time.Time{}
	shown := e.shown
	events = r.hide(events, e, channel.MemberLeft, nil, now)
	if shown {
		events = r.successor(events, e.rec.Addr(), now)
	}
	return events, true
}

// successor shows the youngest of the nodes that wait for an address that has
// become free.
func (r *roster) successor(events []channel.MemberEvent, addr netip.AddrPort, now time.Time) []channel.MemberEvent {
	if r.byAddr[addr] != nil {
		return events
	}
	var next *entry
	for _, e := range r.nodes {
		if !e.shown && !e.left && e.rec.Addr() == addr && (next == nil || e.start.After(next.start) || e.start.Equal(next.start) && slices.Compare(e.rec.ID[:], next.rec.ID[:]) > 0) {
			next = e
		}
	}
	if next == nil {
		return events
	}
	return r.place(events, next, next.info, now)
}

// expire loses the nodes that an earlier instance knew and that have not been
// heard of.
func (r *roster) expire(events []channel.MemberEvent, now time.Time) []channel.MemberEvent {
	for id, e := range r.nodes {
		if !e.until.IsZero() && !now.Before(e.until) {
			delete(r.nodes, id)
			events = r.hide(events, e, channel.MemberLost, nil, now)
			events = r.successor(events, e.rec.Addr(), now)
		}
	}
	return events
}

// refresh brings the times alive of all members up to date, so that all nodes
// order them by their age.
func (r *roster) refresh(events []channel.MemberEvent, now time.Time) []channel.MemberEvent {
	for _, e := range r.byAddr {
		if e.until.IsZero() {
			events = append(events, channel.MemberEvent{Kind: channel.MemberUpdated, Member: e.aged(now)})
		}
	}
	return events
}

// A farewell is a message of its own, because memberlist does not tell one that
// leaves from one that is dead.
const (
	farewellKind = 'F'
	farewellSize = 1 + 16 + 8
)

func appendFarewell(b []byte, id channel.UniqueID, start time.Time) []byte {
	b = append(append(b, farewellKind), id[:]...)
	return binary.BigEndian.AppendUint64(b, uint64(start.UnixMilli()))
}

func decodeFarewell(b []byte) (id channel.UniqueID, start time.Time, err error) {
	if len(b) != farewellSize || b[0] != farewellKind {
		return id, start, fmt.Errorf("a message of %d bytes that is none of ours", len(b))
	}
	copy(id[:], b[1:])
	return id, time.UnixMilli(int64(binary.BigEndian.Uint64(b[17:]))), nil
}
