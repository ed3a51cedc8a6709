package coordinator

import (
	"bytes"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// election is the protocol of one node, without I/O, goroutines or clock: what
// happens is told to its methods, and they return what is to be sent. It is not
// safe for concurrent use.
//
// The node that is first in the absolute order starts an election when its
// agreed view is not its membership. The request goes round as a token, each
// node adding the members it knows; when it is back, its source sends the
// confirmed view to everybody. Requests of others make the first node confirm
// its view again.
type election struct {
	cfg  Config
	note func(refusal string) // counts a refused message

	local channel.Member
	// members is the present membership with the local member, in order.
	members []channel.Member
	changed time.Time // when it changed last
	unrest  time.Time // when it changed first since the last agreement

	// counter is the largest that was seen in an id.
	counter uint64
	// view is the agreed view, empty before the first.
	view   []channel.Member
	viewID channel.UniqueID
	agreed time.Time
	// past are ids of earlier views, a ring.
	past   []channel.UniqueID
	pastAt int

	run     *run      // of an election of this node
	restart time.Time // of one that was put off
	rounds  int       // of elections since the membership changed
	nagAt   time.Time // when the first node is reminded
	nagIn   time.Duration
	// protest is when the first node is told that its view has come with an id
	// that is older than that of the agreed one.
	protest time.Time

	// forwards counts how often a token was passed on, by the tail of its id.
	forwards map[[10]byte]int
	order    [][10]byte // the keys of forwards, oldest first
	// parked are messages of nodes that are not members yet.
	parked []parked
	// held is a view of a Tribes node that may be older than the agreed one.
	held *message
	// unconfirmed are members that a confirmation did not reach, and the
	// attempts left.
	unconfirmed map[channel.UniqueID]int
	resend      time.Time

	elections, restarts, views int64
}

type run struct {
	id       channel.UniqueID
	deadline time.Time
}

type parked struct {
	from channel.Member
	m    message
	at   time.Time
}

// out is something to be sent: to everybody listed, or to the first one that can
// be reached.
type out struct {
	to  []channel.Member
	all bool
	m   message
}

const (
	maxPast     = 1024
	maxForwards = 8 // of one token
	maxTokens   = 256
	maxParked   = 16
	maxRounds   = 3
	maxResends  = 5
)

// Why messages are refused; labels of a metric.
const (
	refusedMalformed = "malformed"
	refusedStale     = "stale"
	refusedWithout   = "without_this_node"
	refusedLeader    = "not_from_leader"
	refusedLowest    = "not_lowest"
	refusedUnknown   = "unknown_sender"
	refusedLoop      = "forwarded_too_often"
	refusedDead      = "nobody_to_forward_to"
	refusedFull      = "queue_full"
)

func refusals() []string {
	return []string{refusedMalformed, refusedStale, refusedWithout, refusedLeader, refusedLowest, refusedUnknown, refusedLoop, refusedDead, refusedFull}
}

func newElection(c Config, note func(string)) *election {
	return &election{cfg: c, note: note, forwards: map[[10]byte]int{}, unconfirmed: map[channel.UniqueID]int{}}
}

func find(ms []channel.Member, id channel.UniqueID) (channel.Member, bool) {
	i := slices.IndexFunc(ms, func(m channel.Member) bool { return m.ID == id })
	if i < 0 {
		return channel.Member{}, false
	}
	return ms[i], true
}

func same(a, b []channel.Member) bool {
	return slices.EqualFunc(a, b, func(x, y channel.Member) bool { return x.ID == y.ID })
}

// settled reports whether the agreed view is the membership.
func (e *election) settled() bool { return len(e.view) > 0 && same(e.view, e.members) }

func (e *election) first() bool { return e.members[0].ID == e.local.ID }

// coordinator returns the first member of the agreed view, if it is still there.
func (e *election) coordinator() (channel.Member, bool) {
	if len(e.view) == 0 {
		return channel.Member{}, false
	}
	return find(e.members, e.view[0].ID)
}

// setMembers takes the present membership.
func (e *election) setMembers(local channel.Member, others []channel.Member, now time.Time) (outs []out) {
	all := make([]channel.Member, 0, len(others)+1)
	all = append(append(all, others...), local)
	all, _ = ordered(all)
	news := !same(all, e.members)
	e.local, e.members = local, all
	if !news {
		return nil
	}
	e.changed = now
	if e.unrest.IsZero() {
		e.unrest = now
	}
	e.run, e.restart, e.rounds = nil, time.Time{}, 0
	e.nagAt, e.nagIn = now.Add(e.cfg.Timeout), e.cfg.Timeout
	for id := range e.unconfirmed {
		if _, there := find(all, id); !there {
			delete(e.unconfirmed, id)
		}
	}
	if len(all) == 1 {
		e.apply(all, newID(e.counter+1), now)
		return nil
	}
	if e.held != nil {
		if v, _ := ordered(e.held.view); same(v, all) {
			e.apply(v, e.held.id, now)
		}
	}
	waiting := e.parked
	e.parked = nil
	for _, p := range waiting {
		if now.Sub(p.at) < e.cfg.Timeout {
			outs = append(outs, e.receive(p.from, p.m, now)...)
		}
	}
	return outs
}

// apply makes v the agreed view.
func (e *election) apply(v []channel.Member, id channel.UniqueID, now time.Time) {
	if len(e.view) > 0 {
		if len(e.past) < maxPast {
			e.past = append(e.past, e.viewID)
		} else {
			e.past[e.pastAt] = e.viewID
			e.pastAt = (e.pastAt + 1) % maxPast
		}
	}
	e.view, e.viewID, e.agreed = v, id, now
	e.saw(id)
	e.views++
	e.run, e.held, e.restart, e.rounds, e.protest = nil, nil, time.Time{}, 0, time.Time{}
	clear(e.unconfirmed)
	if e.settled() {
		e.unrest = time.Time{}
		e.nagIn = e.cfg.Timeout
	}
	e.nagAt = now.Add(e.nagIn)
}

// saw takes over a larger counter.
func (e *election) saw(id channel.UniqueID) {
	if c, ok := counterOf(id); ok && c > e.counter && c-e.counter <= maxJump {
		e.counter = c
	}
}

// due returns when tick has something to do; zero for never.
func (e *election) due() (at time.Time) {
	earliest := func(t time.Time) {
		if !t.IsZero() && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	if len(e.unconfirmed) > 0 {
		earliest(e.resend)
	}
	earliest(e.protest)
	switch {
	case len(e.members) == 0 || e.settled():
	case !e.first():
		earliest(e.nagAt)
	case e.run != nil:
		earliest(e.run.deadline)
	default:
		earliest(e.startAt())
	}
	return at
}

// startAt is when this node may start an election: when the membership has been
// quiet for a moment, but not too late.
func (e *election) startAt() time.Time {
	at := e.changed.Add(e.cfg.Settle)
	if late := e.unrest.Add(4 * e.cfg.Settle); !e.unrest.IsZero() && late.Before(at) {
		at = late
	}
	if e.restart.After(at) {
		at = e.restart
	}
	return at
}

// tick does what is due.
func (e *election) tick(now time.Time) (outs []out) {
	if len(e.unconfirmed) > 0 && !now.Before(e.resend) {
		outs = append(outs, e.confirmAgain(now)...)
	}
	if !e.protest.IsZero() && !now.Before(e.protest) {
		e.protest = time.Time{}
		if !e.first() {
			outs = append(outs, e.remind(e.counter+1)...)
		}
	}
	switch {
	case len(e.members) == 0 || e.settled():
		return outs
	case !e.first():
		if now.Before(e.nagAt) {
			return outs
		}
		e.nagIn = min(2*e.nagIn, e.cfg.MaxTimeout)
		e.nagAt = now.Add(e.nagIn)
		return append(outs, e.remind(e.counter)...)
	case e.run != nil && now.Before(e.run.deadline):
		return outs
	case e.run != nil:
		e.restarts++
		return append(outs, e.start(now)...)
	case !now.Before(e.startAt()):
		return append(outs, e.start(now)...)
	}
	return outs
}

// remind asks the first node for an election.
func (e *election) remind(counter uint64) []out {
	return []out{{to: e.members[:1], m: message{leader: e.members[0], source: e.local, view: e.members, id: newID(counter)}}}
}

// start sends a token round. The time that it has grows with every attempt.
func (e *election) start(now time.Time) []out {
	e.elections++
	wait := e.cfg.Timeout << min(e.rounds, 5)
	e.rounds++
	e.run = &run{id: newID(e.counter + 1), deadline: now.Add(min(wait, e.cfg.MaxTimeout))}
	e.restart = time.Time{}
	return e.pass(message{leader: e.local, source: e.local, view: e.members, id: e.run.id})
}

// pass sends a token to the next member after this node in the order that can be
// reached, but not beyond its source.
func (e *election) pass(m message) []out {
	var to []channel.Member
	at := slices.IndexFunc(m.view, e.local.Is)
	for i := 1; i < len(m.view); i++ {
		next := m.view[(at+i)%len(m.view)]
		if known, ok := find(e.members, next.ID); ok {
			to = append(to, known)
		}
		if next.ID == m.source.ID {
			break
		}
	}
	if len(to) == 0 {
		e.note(refusedDead)
		return nil
	}
	return []out{{to: to, m: m}}
}

// receive takes a message of another node.
func (e *election) receive(from channel.Member, m message, now time.Time) []out {
	v, once := ordered(m.view)
	if !once || m.source.ID.IsZero() {
		e.note(refusedMalformed)
		return nil
	}
	if len(e.members) == 0 {
		e.note(refusedUnknown)
		return nil
	}
	m.view = v
	_, knowsFrom := find(e.members, from.ID)
	_, knowsSource := find(e.members, m.source.ID)
	if !knowsFrom || !knowsSource {
		if len(e.parked) == maxParked {
			e.parked = e.parked[1:]
			e.note(refusedUnknown)
		}
		e.parked = append(e.parked, parked{from, m, now})
		return nil
	}
	if m.confirmed {
		e.confirmed(from, m, now)
		return nil
	}
	known := e.counter
	e.saw(m.id)
	if m.source.ID == e.local.ID {
		return e.returned(m, now)
	}
	return e.requested(m, known, now)
}

// returned takes this node's own token, back from its round.
func (e *election) returned(m message, now time.Time) []out {
	if e.run == nil || tail(m.id) != tail(e.run.id) {
		e.note(refusedStale)
		return nil
	}
	if !same(m.view, e.members) && e.rounds < maxRounds {
		// Somebody knows a member that this node does not, or has missed one.
		// Soon both may know the same.
		e.run, e.restart = nil, now.Add(2*e.cfg.Settle)
		return nil
	}
	id := m.id
	if id != e.run.id { // somebody has seen a larger counter
		id = newID(e.counter + 1)
	}
	e.apply(e.members, id, now)
	return e.confirm()
}

// confirm sends the agreed view to everybody.
func (e *election) confirm() []out {
	var others []channel.Member
	for _, m := range e.view {
		if m.ID != e.local.ID {
			others = append(others, m)
		}
	}
	if len(others) == 0 {
		return nil
	}
	return []out{{to: others, all: true, m: e.confirmation()}}
}

func (e *election) confirmation() message {
	return message{leader: e.local, source: e.local, view: e.view, id: e.viewID, confirmed: true}
}

// missed notes members that the confirmation of a view did not reach.
func (e *election) missed(id channel.UniqueID, who []channel.UniqueID, now time.Time) {
	if id != e.viewID {
		return
	}
	for _, m := range who {
		left, again := e.unconfirmed[m]
		switch {
		case !again:
			e.unconfirmed[m] = maxResends
		case left <= 1:
			delete(e.unconfirmed, m) // it will ask
		default:
			e.unconfirmed[m] = left - 1
		}
	}
	e.resend = now.Add(e.cfg.Timeout)
}

// reached notes members that a confirmation has reached.
func (e *election) reached(who []channel.UniqueID) {
	for _, m := range who {
		delete(e.unconfirmed, m)
	}
}

func (e *election) confirmAgain(now time.Time) []out {
	var to []channel.Member
	for _, m := range e.members {
		if _, missing := e.unconfirmed[m.ID]; missing {
			to = append(to, m)
		}
	}
	e.resend = now.Add(e.cfg.Timeout)
	if len(to) == 0 || !e.leads() {
		clear(e.unconfirmed)
		return nil
	}
	return []out{{to: to, all: true, m: e.confirmation()}}
}

// leads reports whether the agreed view is this node's own.
func (e *election) leads() bool { return len(e.view) > 0 && e.view[0].ID == e.local.ID }

// requested takes the token of another node; known is the counter that was known
// before.
func (e *election) requested(m message, known uint64, now time.Time) []out {
	if e.first() {
		return e.asked(m, now)
	}
	key := tail(m.id)
	if e.forwards[key] >= maxForwards {
		e.note(refusedLoop)
		return nil
	}
	if e.forwards[key]++; e.forwards[key] == 1 {
		if e.order = append(e.order, key); len(e.order) > maxTokens {
			delete(e.forwards, e.order[0])
			e.order = e.order[1:]
		}
	}
	merged := slices.Clone(m.view)
	for _, x := range e.members {
		if _, there := find(merged, x.ID); !there {
			merged = append(merged, x)
		}
	}
	m.view, _ = ordered(merged)
	m.leader = m.view[0]
	if c, has := counterOf(m.id); has && c <= known {
		m.id = withCounter(m.id, known+1) // so that the view to come is the newest
		e.saw(m.id)
	}
	return e.pass(m)
}

// asked answers a request for an election that this node is to lead.
func (e *election) asked(m message, now time.Time) []out {
	if !e.settled() || !e.leads() {
		return nil // an election is under way, or will be in a moment
	}
	own, _ := counterOf(e.viewID)
	if c, has := counterOf(m.id); has && c > own {
		e.apply(e.view, newID(e.counter+1), now) // the one who asks knows a newer view
		return e.confirm()
	}
	to, _ := find(e.members, m.source.ID)
	return []out{{to: []channel.Member{to}, all: true, m: e.confirmation()}}
}

// confirmed takes a view.
func (e *election) confirmed(from channel.Member, m message, now time.Time) {
	if _, in := find(m.view, e.local.ID); !in {
		e.note(refusedWithout)
		return
	}
	if m.view[0].ID != m.source.ID || m.source.ID != from.ID {
		e.note(refusedLeader)
		return
	}
	if compare(e.members[0], m.view[0]) < 0 {
		e.note(refusedLowest) // that one's election is still to come
		return
	}
	if m.id == e.viewID && len(e.view) > 0 {
		return // again
	}
	if slices.Contains(e.past, m.id) {
		e.note(refusedStale)
		return
	}
	c, has := counterOf(m.id)
	has = has && (c <= e.counter || c-e.counter <= maxJump)
	own, ownHas := counterOf(e.viewID)
	ownHas = ownHas && own <= e.counter
	switch {
	case has && ownHas && len(e.view) > 0 && (c < own || c == own && bytes.Compare(m.id[6:], e.viewID[6:]) < 0):
		e.note(refusedStale)
		e.protest = now.Add(e.cfg.Timeout / 4) // a newer one may be on its way
		return
	case !has && e.settled() && !same(m.view, e.view):
		e.held = &m // older than the agreed view, or ahead of the membership
		e.note(refusedStale)
		return
	}
	e.apply(m.view, m.id, now)
}
