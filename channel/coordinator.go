package channel

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	// maxMembers bounds the members that are known at a time.
	maxMembers = 4096
	// suspectInterval is the least time between two suspicions of one member.
	suspectInterval = time.Second
	// complaintInterval is the least time between two log lines about refused
	// member records.
	complaintInterval = time.Minute
)

// coordinator is the lowest layer for member events: it keeps the table of what
// the membership reports and turns it into events.
type coordinator struct {
	c *Channel

	refusedFull, refusedStale, refusedClone, refusedSelf, refusedBad *Counter

	limit int // of known; maxMembers but in tests

	mu         sync.Mutex
	known      map[UniqueID]knownMember
	byAddr     map[netip.AddrPort]UniqueID
	suspected  map[UniqueID]time.Time
	aliveNew   bool // an alive time has changed since it was last asked for
	complained time.Time
}

type knownMember struct {
	m Member
	// start is about when the member started: it tells which of two
	// incarnations is the newer one.
	start time.Time
}

func newCoordinator(c *Channel, m *Metrics) *coordinator {
	refused := func(reason string) *Counter {
		return m.Counter("channel_members_refused_total", "Member records that were not taken over.", "reason", reason)
	}
	return &coordinator{
		c:           c,
		limit:       maxMembers,
		refusedFull: refused("full"), refusedStale: refused("stale"), refusedClone: refused("cloned_id"),
		refusedSelf: refused("own_address"), refusedBad: refused("invalid"),
		known:     map[UniqueID]knownMember{},
		byAddr:    map[netip.AddrPort]UniqueID{},
		suspected: map[UniqueID]time.Time{},
	}
}

// Observe implements MemberSink. It blocks while too many changes are queued.
func (co *coordinator) Observe(ev MemberEvent) {
	if (ev.Kind == MemberAdded || ev.Kind == MemberUpdated) && ev.Member.Command == ShutdownCommand {
		ev.Kind = MemberLeft
	}
	now := time.Now()
	local := co.c.Local()
	co.mu.Lock()
	nothing := co.refresh(ev, now)
	co.mu.Unlock()
	if nothing {
		return
	}
	select {
	case co.c.events.slots <- struct{}{}:
	case <-co.c.done:
		return
	}
	co.mu.Lock()
	queued, complaint := co.decide(ev, local, now)
	if complaint != "" && now.Sub(co.complained) < complaintInterval {
		complaint = ""
	} else if complaint != "" {
		co.complained = now
	}
	co.mu.Unlock()
	if !queued {
		<-co.c.events.slots
	}
	if complaint != "" {
		co.c.log.Warn(complaint, zap.Stringer("member", ev.Member), zap.Stringer("id", ev.Member.ID))
	}
}

// refresh takes over a record that says nothing new but the alive time. It
// reports whether that was all.
func (co *coordinator) refresh(ev MemberEvent, now time.Time) bool {
	old, ok := co.known[ev.Member.ID]
	if ev.Kind != MemberAdded && ev.Kind != MemberUpdated || !ok || !sameRecord(old.m, ev.Member) {
		return false
	}
	if old.m.Alive != ev.Member.Alive {
		co.aliveNew = true
	}
	co.known[ev.Member.ID] = knownMember{ev.Member, now.Add(-ev.Member.Alive)}
	return true
}

// decide updates the table and queues the events that follow; co.mu is held,
// so that they are queued in the order of the changes. It reports whether the
// caller's slot is used, and what there is to complain about.
func (co *coordinator) decide(ev MemberEvent, local Member, now time.Time) (queued bool, complaint string) {
	m := ev.Member
	switch ev.Kind {
	case MemberAdded, MemberUpdated:
	case MemberLost, MemberLeft:
		return co.remove(ev), ""
	case MemberSuspected:
		co.c.events.put(queuedEvent{ev: ev, slot: true})
		return true, ""
	default:
		return false, ""
	}
	switch {
	case m.ID == local.ID && m.Addr() == local.Addr():
		return false, "" // our own record, heard back
	case m.ID == local.ID:
		co.refusedClone.Inc()
		return false, "another node uses this node's id, maybe because a member was configured or copied twice; it is not taken into the view: give it an id of its own"
	case m.Addr() == local.Addr():
		co.refusedSelf.Inc()
		return false, "a member record names this node's own address under another id, maybe that of an earlier incarnation of this node; ignored"
	case m.ID.IsZero() || !m.Host.IsValid() || m.Host.IsUnspecified() || m.Port < 1 || m.Port > 65535:
		co.refusedBad.Inc()
		return false, "a member record without usable address or id was ignored"
	}
	old, have := co.known[m.ID]
	start := now.Add(-m.Alive)
	if other, taken := co.byAddr[m.Addr()]; taken && other != m.ID {
		previous := co.known[other]
		if start.Before(previous.start) {
			co.refusedStale.Inc()
			return false, "a member record of an earlier incarnation at the same address was ignored"
		}
		delete(co.known, other) // the boundaries announce its end
	} else if !have && len(co.known) >= co.limit {
		co.refusedFull.Inc()
		return false, "the member table is full; further members are ignored"
	}
	kind := MemberUpdated
	if !have {
		kind = MemberAdded
	} else if old.m.Addr() != m.Addr() {
		delete(co.byAddr, old.m.Addr())
	}
	co.known[m.ID] = knownMember{m, start}
	co.byAddr[m.Addr()] = m.ID
	co.c.events.put(queuedEvent{ev: MemberEvent{Kind: kind, Member: m, Err: ev.Err}, slot: true})
	return true, ""
}

// remove handles MemberLost and MemberLeft.
func (co *coordinator) remove(ev MemberEvent) (queued bool) {
	old, ok := co.known[ev.Member.ID]
	if !ok {
		// A layer above may still hold a member that was lost here: that it
		// said goodbye is news for that layer.
		if ev.Kind != MemberLeft {
			return false
		}
		old.m = ev.Member
	}
	delete(co.known, old.m.ID)
	if co.byAddr[old.m.Addr()] == old.m.ID {
		delete(co.byAddr, old.m.Addr())
	}
	ev.Member = old.m
	co.c.events.put(queuedEvent{ev: ev, slot: true})
	return true
}

// suspect reports that a send to m failed.
func (co *coordinator) suspect(m Member, cause error) {
	now := time.Now()
	co.mu.Lock()
	last, seen := co.suspected[m.ID]
	if seen && now.Sub(last) < suspectInterval || !seen && len(co.suspected) >= maxMembers {
		co.mu.Unlock()
		return
	}
	co.suspected[m.ID] = now
	co.mu.Unlock()
	if _, ok := co.c.events.top().Get(m.ID); !ok {
		return // nobody holds it as a member
	}
	select {
	case co.c.events.slots <- struct{}{}:
		co.c.events.put(queuedEvent{ev: MemberEvent{Kind: MemberSuspected, Member: m, Err: cause}, slot: true})
	default: // flooded with changes; the next failure suspects it again
	}
}

// suspicious reports whether a send error says something about the member
// rather than about the message or the caller.
func suspicious(err error) bool {
	for _, harmless := range []error{ErrNegativeAck, ErrTooLarge, ErrQueueFull, ErrClosed, ErrBadMessage, ErrPanic, ErrNotConfigured, ErrPluginDown, context.Canceled} {
		if errors.Is(err, harmless) {
			return false
		}
	}
	return true
}

// tick forgets old suspicions and reports whether alive times have changed.
func (co *coordinator) tick(now time.Time) bool {
	co.mu.Lock()
	defer co.mu.Unlock()
	for id, t := range co.suspected {
		if now.Sub(t) >= suspectInterval {
			delete(co.suspected, id)
		}
	}
	changed := co.aliveNew
	co.aliveNew = false
	return changed
}

func (co *coordinator) aliveTimes() map[UniqueID]time.Duration {
	co.mu.Lock()
	defer co.mu.Unlock()
	alive := make(map[UniqueID]time.Duration, len(co.known))
	for id, k := range co.known {
		alive[id] = k.m.Alive
	}
	return alive
}
