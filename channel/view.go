package channel

import (
	"errors"
	"sort"
)

// View is who is in the group, as seen by one node at one time. A View is
// immutable: share it freely, never change Members.
type View struct {
	// Version grows with every change at this node; it has no meaning on
	// another one.
	Version uint64
	// Local is this node. It is not in Members.
	Local Member
	// Members are the other nodes, longest alive first, ties by id.
	Members []Member
}

// NewView returns a view of the given members, in the order of the protocol.
// It takes ownership of members.
func NewView(version uint64, local Member, members []Member) View {
	sort.SliceStable(members, func(i, j int) bool { return Older(members[i], members[j]) })
	return View{Version: version, Local: local, Members: members}
}

// Older reports whether a comes before b in a view: longest alive first, then
// by id.
func Older(a, b Member) bool {
	if a.Alive != b.Alive {
		return a.Alive > b.Alive
	}
	return string(a.ID[:]) < string(b.ID[:])
}

// Get returns the current record of the member with that id.
func (v View) Get(id UniqueID) (Member, bool) {
	for _, m := range v.Members {
		if m.ID == id {
			return m, true
		}
	}
	return Member{}, false
}

// Has reports whether m is in the view; the local member is not.
func (v View) Has(m Member) bool { _, ok := v.Get(m.ID); return ok }

// MemberEventKind says what happened to a member.
type MemberEventKind uint8

const (
	// MemberAdded: the member is new, or back.
	MemberAdded MemberEventKind = iota + 1
	// MemberUpdated: payload, domain or alive time changed.
	MemberUpdated
	// MemberLost: the membership has not heard from it for too long, or a
	// lower layer gave it up. A failure detector may veto it by not passing
	// the event on.
	MemberLost
	// MemberLeft: it said that it leaves. Final.
	MemberLeft
	// MemberSuspected: a message to it failed. It stays in the view until a
	// layer that checks it turns the suspicion into MemberLost.
	MemberSuspected
)

// String returns the kind in one word.
func (k MemberEventKind) String() string {
	switch k {
	case MemberAdded:
		return "added"
	case MemberUpdated:
		return "updated"
	case MemberLost:
		return "lost"
	case MemberLeft:
		return "left"
	case MemberSuspected:
		return "suspected"
	}
	return "unknown"
}

// MemberEvent is one change in the group, on its way up the stack.
type MemberEvent struct {
	Kind   MemberEventKind
	Member Member
	// Err is why the member is suspected or lost, or nil.
	Err error
}

// Final reports whether the member is gone for good: it said so, or a newer
// incarnation has taken its address. There is nothing left to check.
func (ev MemberEvent) Final() bool {
	return ev.Kind == MemberLeft || ev.Kind == MemberLost && errors.Is(ev.Err, ErrReplaced)
}
