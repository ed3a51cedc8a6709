package lock

import (
	"maps"
	"net/netip"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// grantee is one request of one node.
type grantee struct {
	node   channel.UniqueID
	number uint64
}

// waiter is a request in the queue of a session.
type waiter struct {
	grantee
	member   channel.Member
	lease    time.Duration
	since    time.Time
	deadline time.Time
}

// entry is what a voter knows of a session.
type entry struct {
	holder waiter // valid if held
	held   bool
	until  time.Time
	waited time.Duration // the holder, in the queue
	queue  []waiter
	timer  *time.Timer // looks again when the lease is over; or nil

	state  core.SessionState
	last   channel.UniqueID // who gave it back last; zero if not known
	at     time.Time        // of that
	broken uint64           // holders since then that did not give it back
}

// answer is what is sent to a request.
type answer struct {
	to channel.Member
	m  message
}

// acquire takes a request; all below is called with l.mu held and appends what
// is to be sent.
func (l *Locker) acquire(out []answer, key session.Key, w waiter) []answer {
	e := l.entries[key]
	if e == nil {
		if !l.room() {
			return l.refuse(out, w)
		}
		e = &entry{}
		l.entries[key] = e
	}
	now := time.Now()
	if e.held && e.holder.grantee == w.grantee { // asked again: the answer was lost
		return append(out, e.answer(key))
	}
	for _, q := range e.queue {
		if q.grantee == w.grantee {
			return out
		}
	}
	if len(e.queue) >= l.cfg.Queue {
		return l.refuse(out, w)
	}
	w.since = now
	e.queue = append(e.queue, w)
	return l.advance(out, key, e, now)
}

func (l *Locker) refuse(out []answer, w waiter) []answer {
	l.m.full.Inc()
	return append(out, answer{w.member, message{Kind: kindAnswer, Number: w.number, Status: statusFull}})
}

// room makes room for one more session, forgetting what nobody uses.
func (l *Locker) room() bool {
	if len(l.entries) < l.cfg.MaxSessions {
		return true
	}
	tries := 0
	for key, e := range l.entries {
		if !e.held && len(e.queue) == 0 {
			delete(l.entries, key)
			return true
		}
		if tries++; tries == 1000 {
			break
		}
	}
	return false
}

// advance gives the session to the next one, if it is free.
func (l *Locker) advance(out []answer, key session.Key, e *entry, now time.Time) []answer {
	if e.held && !now.Before(l.ends(e)) {
		l.m.expired.Inc()
		e.held = false
		e.broken++
	}
	for !e.held && len(e.queue) > 0 {
		w := e.queue[0]
		e.queue = e.queue[1:]
		if !now.Before(w.deadline) || w.node != l.view.Local.ID && !now.Before(l.alive[w.node]) {
			continue // if it is only late it asks again
		}
		e.held, e.holder, e.until, e.waited = true, w, now.Add(w.lease), now.Sub(w.since)
		l.m.granted.Inc()
		out = append(out, e.answer(key))
	}
	if e.timer != nil {
		e.timer.Stop()
		e.timer = nil
	}
	if e.held && len(e.queue) > 0 && !l.stopped {
		holder := e.holder.grantee
		e.timer = time.AfterFunc(min(l.ends(e).Sub(now), keepEvery), func() {
			l.vote(func(out []answer) []answer {
				if l.entries[key] != e || l.stopped {
					return out
				}
				if e.held && e.holder.grantee == holder {
					// If its request has ended, which could not be told, it is given
					// back now.
					out = append(out, e.answer(key))
				}
				return l.advance(out, key, e, time.Now())
			})
		})
	}
	return out
}

// ends is when the session is free, unless its holder gives it back or is heard of
// before.
func (l *Locker) ends(e *entry) time.Time {
	if e.holder.node == l.view.Local.ID {
		return e.until
	}
	if t := l.alive[e.holder.node]; t.Before(e.until) {
		return t
	}
	return e.until
}

func (e *entry) answer(key session.Key) answer {
	m := message{
		Kind: kindAnswer, Number: e.holder.number, Context: key.Context, ID: key.ID, Status: statusGranted, Wait: e.waited.Milliseconds(),
		Counter: e.state.Counter, Versions: e.state.Versions, Broken: e.broken,
	}
	if time.Since(e.at) > maxStateAge {
		m.Counter, m.Versions = 0, 0 // all that the others may have missed has been mended
	} else if !e.last.IsZero() {
		m.Last = e.last[:]
	}
	return answer{e.holder.member, m}
}

// release takes the session back, or the request out of the queue.
func (l *Locker) release(out []answer, key session.Key, g grantee, how status, state core.SessionState) []answer {
	e := l.entries[key]
	if e == nil {
		return out
	}
	if !e.held || e.holder.grantee != g {
		for i, q := range e.queue {
			if q.grantee == g {
				e.queue = append(e.queue[:i:i], e.queue[i+1:]...)
				break
			}
		}
		return l.advance(out, key, e, time.Now())
	}
	e.held = false
	switch how {
	case statusGranted:
		e.state, e.last, e.broken, e.at = state, g.node, 0, time.Now()
	case statusBroken:
		e.broken++
	}
	return l.advance(out, key, e, time.Now())
}

// holds takes the word of another voter for who has the session.
func (l *Locker) holds(out []answer, m *message, member channel.Member) []answer {
	e := l.entries[m.key()]
	if e == nil {
		if !l.room() {
			return out
		}
		e = &entry{}
		l.entries[m.key()] = e
	}
	if e.held {
		return out
	}
	now := time.Now()
	e.held, e.until = true, now.Add(time.Duration(m.Lease)*time.Millisecond)
	e.holder = waiter{grantee: grantee{uniqueID(m.Holder), m.Number}, member: member}
	if !now.Before(l.alive[e.holder.node]) {
		l.heard(member) // by the other voter
	}
	e.broken = max(e.broken, m.Broken)
	if e.state.Counter < m.Counter {
		e.state, e.last, e.at = m.state(), uniqueID(m.Last), time.Now()
	}
	// The holder gives it back here too.
	return append(out, e.answer(m.key()))
}

// changeView forgets the requests of members that have gone, frees what nodes
// had that surely have ended, and tells new voters who holds what.
func (l *Locker) changeView(out []answer, v channel.View) []answer {
	present := map[channel.UniqueID]channel.Member{v.Local.ID: v.Local}
	address := map[netip.AddrPort]channel.UniqueID{v.Local.Addr(): v.Local.ID}
	for _, m := range v.Members {
		present[m.ID] = m
		address[m.Addr()] = m.ID
	}
	before := l.view
	l.view = v
	now := time.Now()
	for _, m := range []map[channel.UniqueID]time.Time{l.alive, l.kept} {
		maps.DeleteFunc(m, func(id channel.UniqueID, t time.Time) bool {
			_, there := present[id]
			return !there && now.After(t)
		})
	}
	for key, e := range l.entries {
		queue := e.queue[:0]
		for _, w := range e.queue {
			if _, there := present[w.node]; there {
				queue = append(queue, w)
			}
		}
		e.queue = queue
		if e.held {
			if m, there := present[e.holder.node]; there {
				e.holder.member = m
			} else {
				if id, again := address[e.holder.member.Addr()]; again && id != e.holder.node && e.holder.member.Port != 0 {
					e.until = now
				}
			}
		}
		out = l.advance(out, key, e, now)
		if !e.held {
			continue
		}
		old := voters(before, key)
		for _, m := range voters(v, key) {
			if m.Is(v.Local) || m.Is(old[0]) || m.Is(old[1]) {
				continue
			}
			out = append(out, answer{m, message{
				Kind: kindHolds, Context: key.Context, ID: key.ID, Number: e.holder.number, Holder: e.holder.node[:],
				Lease: max(e.until.Sub(now).Milliseconds(), 1), Counter: e.state.Counter, Versions: e.state.Versions, Broken: e.broken, Last: e.last[:],
			}})
		}
	}
	return out
}

// voters are the two members that decide about a session, in order; both are the
// same if there is one member only.
func voters(v channel.View, key session.Key) (two [2]channel.Member) {
	digest := key.Digest()
	var best [2]uint64
	put := func(m channel.Member) {
		s := score(m.ID, digest)
		switch {
		case s > best[0]:
			best[1], two[1] = best[0], two[0]
			best[0], two[0] = s, m
		case s > best[1]:
			best[1], two[1] = s, m
		}
	}
	put(v.Local)
	for _, m := range v.Members {
		put(m)
	}
	if best[1] == 0 {
		two[1] = two[0]
	}
	return two
}

// score orders the members for a session, the same on all nodes. It is not 0.
func score(id channel.UniqueID, digest uint64) uint64 {
	h := digest
	for _, c := range id {
		h = (h ^ uint64(c)) * 1099511628211 // FNV-1a, and the finisher of MurmurHash3
	}
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return (h ^ h>>33) | 1
}
