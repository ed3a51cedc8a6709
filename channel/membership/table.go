package membership

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// Config bounds a table. Zero fields take the defaults.
type Config struct {
	// DropTime is the silence after which a member is lost; 3 s.
	DropTime time.Duration
	// MaxMembers bounds the members; 4096. A quarter of them may be newcomers
	// that have been heard only once.
	MaxMembers int
	// NewPerSecond is how many newcomers a second are believed at first
	// hearing; 64. It is also how many may come at once.
	NewPerSecond int
}

const (
	// DefaultDropTime is that of Tribes.
	DefaultDropTime = 3 * time.Second
	// DefaultMaxMembers is the bound of the channel.
	DefaultMaxMembers = 4096
	// DefaultNewPerSecond lets a cluster of usual size start at once.
	DefaultNewPerSecond = 64
	// maxCandidates bounds the newcomers that are known by id only. At 10,000
	// fakes a second a real one stays for 1.6 s: three heartbeats.
	maxCandidates = 16384
	// departedPerMember sizes the memory of ids that have gone.
	departedPerMember = 2
	// stepsOfLife is how many records in step with the clock make a record with
	// an old alive time believable.
	stepsOfLife = 3
	// maxPause is the part of the drop time that the longest pause between calls
	// of Expire may take while this node counts as awake.
	maxPause = 2
)

// Refusal says why a record was not taken over; empty if it was. It is fit for
// a metric's label.
type Refusal string

const (
	// Own is the node's own record, heard back. Nothing is wrong.
	Own Refusal = "own"
	// Stale is a duplicate, or older than what is known of the member.
	Stale Refusal = "stale"
	// Deferred is a newcomer beyond the rate that must be heard again.
	Deferred Refusal = "deferred"
	// Full is a newcomer beyond the bound of the table.
	Full Refusal = "full"
	// AddressTaken is a newcomer at the address of a member that lives.
	AddressTaken Refusal = "address_taken"
	// OwnAddress is another member at this node's address.
	OwnAddress Refusal = "own_address"
	// OwnID is another node that uses this node's id.
	OwnID Refusal = "own_id"
	// BadID is a record with a zero id.
	BadID Refusal = "id"
	// BadHost is a record without an address that can be dialled.
	BadHost Refusal = "host"
	// BadPort is a record without a port that can be dialled.
	BadPort Refusal = "port"
	// Stranger is the farewell of a node that was no member.
	Stranger Refusal = "unknown_leave"
	// Unsealed is a record without proof of its sender about a member that has
	// given one, or at its address.
	Unsealed Refusal = "unauthenticated"
)

// Refusals returns all of them but Own, for making counters ahead.
func Refusals() []Refusal {
	return []Refusal{Stale, Deferred, Full, AddressTaken, OwnAddress, OwnID, BadID, BadHost, BadPort, Stranger, Unsealed}
}

// Table is who has been heard. It is not safe for concurrent use. now must not
// go backwards between calls.
type Table struct {
	cfg   Config
	local channel.Member

	members  map[channel.UniqueID]*entry
	byAddr   map[netip.AddrPort]channel.UniqueID
	unproven int

	candidates *memory[candidate]
	departed   *memory[departure]

	tokens   float64 // newcomers that may be believed now
	tokensAt time.Time
	expired  time.Time // the last call of Expire
}

// entry is a member.
type entry struct {
	m      channel.Member
	heard  time.Time
	proven bool // has been heard to go on
	sealed bool // its records are those of HeardSealed
	doubt  doubt
}

// candidate is a newcomer that has to be heard again.
type candidate struct {
	alive time.Duration
	first time.Time
}

// departure is a member that has gone.
type departure struct {
	alive  time.Duration // the last
	left   bool
	sealed bool
	doubt  doubt
}

// doubt follows records with an alive time that is older than a known one.
type doubt struct {
	alive time.Duration
	at    time.Time
	steps int
}

// New returns an empty table of the node with the given local record.
func New(c Config, local channel.Member) *Table {
	if c.DropTime <= 0 {
		c.DropTime = DefaultDropTime
	}
	if c.MaxMembers <= 0 {
		c.MaxMembers = DefaultMaxMembers
	}
	if c.NewPerSecond <= 0 {
		c.NewPerSecond = DefaultNewPerSecond
	}
	return &Table{
		cfg:        c,
		local:      local,
		members:    map[channel.UniqueID]*entry{},
		byAddr:     map[netip.AddrPort]channel.UniqueID{},
		candidates: newMemory[candidate](maxCandidates),
		departed:   newMemory[departure](departedPerMember * c.MaxMembers),
		tokens:     float64(c.NewPerSecond),
	}
}

// SetLocal replaces the local record.
func (t *Table) SetLocal(m channel.Member) { t.local = m }

// Len returns the number of members.
func (t *Table) Len() int { return len(t.members) }

// Members returns the members in the order of a view.
func (t *Table) Members() []channel.Member {
	out := make([]channel.Member, 0, len(t.members))
	for _, e := range t.members {
		out = append(out, e.m)
	}
	slices.SortFunc(out, func(a, b channel.Member) int {
		switch {
		case channel.Older(a, b):
			return -1
		case channel.Older(b, a):
			return 1
		}
		return 0
	})
	return out
}

// Seed takes members as heard just now, without an event: what an earlier
// instance knew. Records that could not have been members, and those beyond the
// bound, are left out. sealed, if not nil, says which of them must go on by
// HeardSealed.
func (t *Table) Seed(known []channel.Member, now time.Time, sealed func(channel.Member) bool) {
	for _, m := range known {
		if t.check(m) != "" || len(t.members) >= t.cfg.MaxMembers || t.members[m.ID] != nil {
			continue
		}
		if _, taken := t.byAddr[m.Addr()]; taken {
			continue
		}
		t.add(m, now, true, sealed != nil && sealed(m))
	}
}

// check returns why m cannot be a member of the group.
func (t *Table) check(m channel.Member) Refusal {
	switch {
	case m.ID.IsZero():
		return BadID
	case !m.Host.IsValid() || m.Host.IsUnspecified() || m.Host.IsMulticast():
		return BadHost
	case m.Port < 1 || m.Port > 65535 || m.SecurePort < -1 || m.SecurePort > 65535 || m.UDPPort < -1 || m.UDPPort > 65535:
		return BadPort
	case m.ID == t.local.ID && m.Addr() == t.local.Addr():
		return Own
	case m.ID == t.local.ID:
		return OwnID
	case m.Addr() == t.local.Addr():
		return OwnAddress
	}
	return ""
}

// Has reports whether the member with that id is in the table.
func (t *Table) Has(id channel.UniqueID) bool { return t.members[id] != nil }

// HeardSealed is Heard for a record that is proved to be made by its member,
// whose alive time never goes back, and, if it is not that of a member, to be
// made just now. Nothing but such records changes the member from then on.
func (t *Table) HeardSealed(events []channel.MemberEvent, m channel.Member, now time.Time) ([]channel.MemberEvent, Refusal) {
	m.Host = m.Host.Unmap()
	if r := t.check(m); r != "" {
		return events, r
	}
	if m.Command == channel.ShutdownCommand {
		return t.leave(events, m, true)
	}
	if e := t.members[m.ID]; e != nil {
		if m.Alive <= e.m.Alive && e.sealed {
			return events, Stale
		}
		e.sealed = true
		return t.heardMember(events, e, m, now)
	}
	if d := t.departed.get(m.ID); d != nil && m.Alive <= d.alive && d.sealed {
		return events, Stale
	}
	return t.admit(events, m, now, true, true)
}

// Heard takes a record that was received, without proof, and appends what
// follows from it to events. A record may have no consequence without being
// refused.
func (t *Table) Heard(events []channel.MemberEvent, m channel.Member, now time.Time) ([]channel.MemberEvent, Refusal) {
	m.Host = m.Host.Unmap()
	if r := t.check(m); r != "" {
		return events, r
	}
	if t.belongsToSealed(m) {
		return events, Unsealed
	}
	if m.Command == channel.ShutdownCommand {
		return t.leave(events, m, false)
	}
	if e := t.members[m.ID]; e != nil {
		return t.heardMember(events, e, m, now)
	}
	if d := t.departed.get(m.ID); d != nil {
		if m.Alive <= d.alive && !d.doubt.lives(m.Alive, now, t.cfg.DropTime) {
			return events, Stale
		}
		return t.admit(events, m, now, true, false)
	}
	c := t.candidates.get(m.ID)
	switch {
	case c == nil && t.mayEnter(m, now):
		return t.admit(events, m, now, false, false)
	case c == nil:
		t.candidates.put(m.ID, candidate{m.Alive, now})
		if _, taken := t.byAddr[m.Addr()]; taken {
			return events, AddressTaken
		}
		return events, Deferred
	case m.Alive <= c.alive:
		return events, Stale
	}
	return t.admit(events, m, now, true, false)
}

// belongsToSealed reports whether m, which has no proof, concerns a member that
// has given one.
func (t *Table) belongsToSealed(m channel.Member) bool {
	if e := t.members[m.ID]; e != nil && e.sealed {
		return true
	}
	if d := t.departed.get(m.ID); d != nil && d.sealed {
		return true
	}
	id, taken := t.byAddr[m.Addr()]
	return taken && t.members[id].sealed
}

// heardMember takes a record of a member.
func (t *Table) heardMember(events []channel.MemberEvent, e *entry, m channel.Member, now time.Time) ([]channel.MemberEvent, Refusal) {
	old := e.m
	switch {
	case m.Alive > old.Alive:
		e.doubt = doubt{}
	case m.Alive == old.Alive && m != old:
		// The record was changed and sent again within a millisecond.
	case e.doubt.lives(m.Alive, now, t.cfg.DropTime):
		e.doubt = doubt{}
	default:
		return events, Stale
	}
	if m.Addr() != old.Addr() {
		if _, taken := t.byAddr[m.Addr()]; taken {
			return events, AddressTaken
		}
		delete(t.byAddr, old.Addr())
		t.byAddr[m.Addr()] = m.ID
	}
	if m.Alive != old.Alive {
		e.heard = now
		if !e.proven {
			e.proven = true
			t.unproven--
		}
	}
	e.m = m
	return append(events, channel.MemberEvent{Kind: channel.MemberUpdated, Member: m}), ""
}

// mayEnter decides whether a newcomer is believed at first hearing.
func (t *Table) mayEnter(m channel.Member, now time.Time) bool {
	if _, taken := t.byAddr[m.Addr()]; taken {
		return false
	}
	if t.unproven >= max(1, t.cfg.MaxMembers/4) {
		return false
	}
	rate := float64(t.cfg.NewPerSecond)
	if !t.tokensAt.IsZero() {
		t.tokens = min(rate, t.tokens+now.Sub(t.tokensAt).Seconds()*rate)
	}
	t.tokensAt = now
	if t.tokens < 1 {
		return false
	}
	t.tokens--
	return true
}

// admit makes m a member, unless the table is full or somebody who lives has
// its address.
func (t *Table) admit(events []channel.MemberEvent, m channel.Member, now time.Time, proven, sealed bool) ([]channel.MemberEvent, Refusal) {
	if id, taken := t.byAddr[m.Addr()]; taken {
		// A holder that has fallen silent since the newcomer came is its earlier
		// incarnation. One that has not is somebody else with the same address.
		holder, c := t.members[id], t.candidates.get(m.ID)
		switch {
		case sealed && !holder.sealed:
			// What has proof wins at once.
		case c == nil || holder.heard.After(c.first):
			t.candidates.put(m.ID, candidate{m.Alive, now}) // wait (anew)
			return events, AddressTaken
		case now.Sub(c.first) < t.cfg.DropTime/3:
			return events, AddressTaken
		}
		t.remove(holder)
		t.depart(holder, false)
		events = append(events, channel.MemberEvent{Kind: channel.MemberLost, Member: holder.m, Err: channel.ErrReplaced})
	}
	if len(t.members) >= t.cfg.MaxMembers {
		return events, Full
	}
	t.add(m, now, proven, sealed)
	return append(events, channel.MemberEvent{Kind: channel.MemberAdded, Member: m}), ""
}

func (t *Table) add(m channel.Member, now time.Time, proven, sealed bool) {
	t.candidates.remove(m.ID)
	t.departed.remove(m.ID)
	t.members[m.ID] = &entry{m: m, heard: now, proven: proven, sealed: sealed}
	t.byAddr[m.Addr()] = m.ID
	if !proven {
		t.unproven++
	}
}

func (t *Table) remove(e *entry) {
	delete(t.members, e.m.ID)
	delete(t.byAddr, e.m.Addr())
	if !e.proven {
		t.unproven--
	}
}

// depart remembers a member that has gone. One that was heard only once is not
// worth it: a flood of those would push out the others.
func (t *Table) depart(e *entry, left bool) {
	if e.proven || left {
		t.departed.put(e.m.ID, departure{alive: e.m.Alive, left: left, sealed: e.sealed})
	}
}

// leave takes a farewell.
func (t *Table) leave(events []channel.MemberEvent, m channel.Member, sealed bool) ([]channel.MemberEvent, Refusal) {
	if e := t.members[m.ID]; e != nil {
		if m.Alive < e.m.Alive {
			return events, Stale // that of an earlier leave and return
		}
		e.m.Alive = m.Alive
		e.sealed = e.sealed || sealed
		t.remove(e)
		t.depart(e, true)
		return append(events, channel.MemberEvent{Kind: channel.MemberLeft, Member: m}), ""
	}
	if d := t.departed.get(m.ID); d != nil && !d.left && m.Alive >= d.alive {
		// A layer above may still hold a member that has only been lost.
		d.left, d.alive = true, m.Alive
		return append(events, channel.MemberEvent{Kind: channel.MemberLeft, Member: m}), ""
	} else if d != nil {
		return events, Stale
	}
	t.candidates.remove(m.ID)
	return events, Stranger
}

// Expire appends the members that have been silent for longer than the drop
// time to events. Call it several times per drop time: after a pause of half of
// it, in which this node itself cannot have been listening, silence is counted
// from anew.
func (t *Table) Expire(events []channel.MemberEvent, now time.Time) []channel.MemberEvent {
	if pause := now.Sub(t.expired); !t.expired.IsZero() && pause > t.cfg.DropTime/maxPause {
		for _, e := range t.members {
			e.heard = e.heard.Add(min(pause, now.Sub(e.heard)))
		}
	}
	t.expired = now
	first := len(events)
	for _, e := range t.members {
		if now.Sub(e.heard) > t.cfg.DropTime {
			t.remove(e)
			t.depart(e, false)
			events = append(events, channel.MemberEvent{Kind: channel.MemberLost, Member: e.m})
		}
	}
	slices.SortFunc(events[first:], func(a, b channel.MemberEvent) int { // maps have no order
		return cmp.Compare(string(a.Member.ID[:]), string(b.Member.ID[:]))
	})
	return events
}

// lives takes a record with an old alive time and reports whether it and those
// before it show life: alive times that went on as this node's clock did.
func (d *doubt) lives(alive time.Duration, now time.Time, window time.Duration) bool {
	passed, grown := now.Sub(d.at), alive-d.alive
	switch {
	case d.steps > 0 && grown == 0:
		return false // the same record again
	case d.steps > 0 && grown > 0 && grown <= 2*passed && passed <= 2*grown+window/12:
		d.steps++
	default:
		d.steps = 1
	}
	d.alive, d.at = alive, now
	return d.steps >= stepsOfLife
}
