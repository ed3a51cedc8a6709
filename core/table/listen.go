package table

import (
	"maps"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Relay carries events between the tables of the nodes of a group. Its methods
// do not wait, unless they say so, and do not call the table.
type Relay interface {
	// Wants tells which kinds of what other nodes do are wanted in a context.
	Wants(contextName string, kinds core.SessionEventKind)
	// Asked returns which kinds other nodes want of a context.
	Asked(contextName string) core.SessionEventKind
	// Tell takes an event of a session in the table, whose lock is held, and calls
	// deliver with it unless it has been told before, or will be told with
	// Table.Deliver. life is the session's MaxInactive.
	Tell(e core.SessionEvent, life time.Duration, deliver func(core.SessionEvent))
	// Claim tells that the table has taken a session over from the manager; it
	// calls deliver if nobody here has heard of the session before.
	Claim(key session.Key, life time.Duration, deliver func(core.SessionEvent))
	// Open reports whether the session's end is still to be told, and it is for
	// this node to find out; released says that it was in the table here, here
	// that listeners to this node's sessions are to be told.
	Open(key session.Key, released bool) (open, here bool)
	// Room waits, for a bounded time, until there is room for events.
	Room(contextName string)
}

// Alive is a living session of the table.
type Alive struct {
	Key  session.Key
	Life time.Duration
}

// watching is who wants to hear of the sessions of a context. It is never
// changed.
type watching struct {
	list  []*core.SessionWatch // the latest last
	asked core.SessionEventKind
}

// latest returns the watch that is told, which may have no kinds.
func (c *watching) latest() *core.SessionWatch {
	if len(c.list) == 0 {
		return &noWatch
	}
	return c.list[len(c.list)-1]
}

var noWatch core.SessionWatch

// shared reports whether other nodes have a part in it.
func (c *watching) shared() bool { return c.asked|c.latest().Cluster != 0 }

// watches are all contexts. The map is never changed.
type watches map[string]*watching

// Watch implements core.WatchedSessions.
func (t *Table) Watch(contextName string, w core.SessionWatch) (cancel func()) {
	added := &w
	t.rewatch(contextName, func(list []*core.SessionWatch) []*core.SessionWatch { return append(slices.Clip(list), added) })
	return func() {
		t.rewatch(contextName, func(list []*core.SessionWatch) []*core.SessionWatch {
			return slices.DeleteFunc(slices.Clone(list), func(o *core.SessionWatch) bool { return o == added })
		})
	}
}

// Asked takes over what other nodes want to hear of a context.
func (t *Table) Asked(contextName string) {
	t.rewatch(contextName, func(list []*core.SessionWatch) []*core.SessionWatch { return list })
}

func (t *Table) rewatch(contextName string, change func([]*core.SessionWatch) []*core.SessionWatch) {
	t.telling.Lock() // waits for those who tell
	defer t.telling.Unlock()
	next := watches{}
	if old := t.watches.Load(); old != nil {
		maps.Copy(next, *old)
	}
	c := &watching{}
	if old := next[contextName]; old != nil {
		*c = *old
	}
	c.list = change(c.list)
	if t.cfg.Relay != nil {
		t.cfg.Relay.Wants(contextName, c.latest().Cluster)
		c.asked = t.cfg.Relay.Asked(contextName)
	}
	next[contextName] = c
	if len(c.list) == 0 && c.asked == 0 {
		delete(next, contextName)
	}
	if len(next) == 0 {
		t.watches.Store(nil)
		return
	}
	t.watches.Store(&next)
}

// watched returns who wants to hear of a context, or nil.
func (t *Table) watched(contextName string) *watching {
	all := t.watches.Load()
	if all == nil {
		return nil
	}
	return (*all)[contextName]
}

// room waits until listeners have room for events of these kinds, which are
// going to be made. No lock is held.
func (s *live) room(kinds core.SessionEventKind) {
	if s.t.watches.Load() == nil {
		return
	}
	s.mu.Lock()
	name := s.key.Context
	s.mu.Unlock()
	s.t.roomFor(name, kinds)
}

func (t *Table) roomFor(contextName string, kinds core.SessionEventKind) {
	c := t.watched(contextName)
	if c == nil {
		return
	}
	if w := c.latest(); w.Kinds&kinds != 0 {
		w.Room()
	}
	if c.asked&kinds != 0 {
		t.cfg.Relay.Room(contextName)
	}
}

// tell tells an event of a session in the table. Its lock is held, so that the
// order of events is that of what happened.
func (t *Table) tell(e core.SessionEvent, life time.Duration) {
	t.telling.RLock()
	defer t.telling.RUnlock()
	c := t.watched(e.Key.Context)
	if c == nil {
		return
	}
	w := c.latest()
	shared := c.shared()
	if (w.Kinds|c.asked)&e.Kind == 0 && !(shared && e.Kind&core.AttributeEvents == 0) {
		return
	}
	e.Time = time.Now()
	if !shared {
		w.Tell(e, true)
		return
	}
	t.cfg.Relay.Tell(e, life, func(e core.SessionEvent) {
		if w.Kinds&e.Kind != 0 {
			w.Tell(e, true)
		}
	})
}

// Deliver calls f with a function that tells the listeners of a context here what
// has happened elsewhere; here says that the session is in this table, or was.
func (t *Table) Deliver(contextName string, f func(tell func(e core.SessionEvent, here bool))) {
	t.telling.RLock()
	defer t.telling.RUnlock()
	c := t.watched(contextName)
	if c == nil {
		return
	}
	w := c.latest()
	f(func(e core.SessionEvent, here bool) {
		if (w.Kinds|w.Cluster)&e.Kind != 0 {
			w.Tell(e, here)
		}
	})
}

// Attributes returns what a session has, and whether it is living and in the
// table.
func (t *Table) Attributes(key session.Key) (attrs map[string]session.Entry, here bool) {
	s := t.get(key)
	if s == nil {
		return nil, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key != key || s.dropped || !s.living() {
		return nil, false
	}
	return s.attributes(), true
}

// attributes returns those that are set.
func (s *live) attributes() map[string]session.Entry {
	attrs := make(map[string]session.Entry, s.rec.Len())
	for name, e := range s.rec.All() {
		if !e.Deleted {
			attrs[name] = e
		}
	}
	return attrs
}

// Living lists the living sessions of a context. Of one that is being renewed it
// may list the old key, the new one, or both.
func (t *Table) Living(contextName string) []Alive {
	var out []Alive
	t.all(func(s *live) bool {
		s.mu.Lock()
		if s.key.Context == contextName && s.living() && !s.dropped {
			out = append(out, Alive{s.key, s.rec.MaxInactive()})
		}
		s.mu.Unlock()
		return true
	})
	return out
}

// tellCreated tells that the session was made.
func (s *live) tellCreated() {
	if s.t.watches.Load() != nil {
		s.t.tell(core.SessionEvent{Kind: core.SessionCreated, Key: s.key, Local: true}, s.rec.MaxInactive())
	}
}

// tellAttribute tells that the application has changed an attribute.
func (s *live) tellAttribute(name string, old, now session.Entry) {
	if s.t.watches.Load() == nil {
		return
	}
	kind := core.AttributeReplaced
	switch {
	case now.Deleted:
		kind = core.AttributeRemoved
	case old.Value == nil:
		kind = core.AttributeAdded
	}
	s.t.tell(core.SessionEvent{Kind: kind, Key: s.key, Local: true, Name: name, Value: now.Value, Old: old.Value, Version: now.Version}, 0)
}

// tellEnd tells that the session has ended. Its attributes are still there.
func (s *live) tellEnd(kind session.EndKind, local bool) {
	c := s.t.watched(s.key.Context)
	if c == nil {
		return
	}
	e := core.SessionEvent{Kind: core.SessionDestroyed, Key: s.key, Reason: kind, Local: local}
	if c.latest().Kinds&e.Kind != 0 {
		e.Attrs = s.attributes()
	}
	s.t.tell(e, 0)
}

// tellRenewed tells that the session of the key old has another now.
func (t *Table) tellRenewed(old, now session.Key, life time.Duration, local bool) {
	if t.watches.Load() != nil {
		t.tell(core.SessionEvent{Kind: core.SessionRenewed, Key: now, Previous: old, Local: local}, life)
	}
}

// claim tells that the session has come from the manager. Its shard is locked.
func (s *live) claim() {
	c := s.t.watched(s.key.Context)
	if c == nil || !c.shared() {
		return
	}
	s.t.telling.RLock()
	defer s.t.telling.RUnlock()
	w := c.latest()
	s.t.cfg.Relay.Claim(s.key, s.rec.MaxInactive(), func(e core.SessionEvent) {
		if w.Cluster&e.Kind != 0 {
			w.Tell(e, false)
		}
	})
}

// expectAgain is when a session is looked for again that the manager could not
// be asked for.
const expectAgain = 30 * time.Second

// Expect has the table find out, some time after at, whether a session still
// lives that is not in the table, and tell its end if it does not.
func (t *Table) Expect(key session.Key, at time.Time) { t.expect(expected{key, false}, at) }

// expected is the key of a session whose end is expected.
type expected struct {
	key      session.Key
	released bool // it was in the table
}

func (t *Table) expect(e expected, at time.Time) {
	t.wheel.add(seconds(at.UnixMilli())+1, check{old: e.key, expected: true, released: e.released})
}

// expectEnd is Expect for a session that is leaving the table: when its time is
// over, which others may know better, it comes back and ends here. Managers still
// have it then: they keep sessions for a while longer. s.mu is held.
func (s *live) expectEnd() {
	if s.rec.MaxInactive() > 0 && s.t.watched(s.key.Context) != nil {
		s.t.expect(expected{s.key, true}, time.UnixMilli(s.rec.LastAccess()).Add(s.rec.MaxInactive()))
	}
}

// lookFor finds out what has become of sessions that were expected to end: those
// that live come into the table, which will notice their end.
func (t *Table) lookFor(list []expected) {
	for _, e := range list {
		for hop := 0; hop < maxHops && t.lookForOne(&e); hop++ {
		}
	}
}

// lookForOne reports whether e, then with the session's new key, has to be
// looked for next.
func (t *Table) lookForOne(e *expected) (again bool) {
	c := t.watched(e.key.Context)
	if c == nil || t.get(e.key) != nil {
		return false
	}
	here := true
	if c.shared() {
		open := false
		if open, here = t.cfg.Relay.Open(e.key, e.released); !open {
			return false
		}
	}
	f := t.load(e.key)
	<-f.done
	switch {
	case f.err != nil:
		t.expect(*e, time.Now().Add(expectAgain))
	case f.renewed != "":
		old := e.key
		e.key.ID = f.renewed
		t.tellRenewed(old, e.key, 0, false)
		return true
	case f.none:
		t.tellGone(e.key, here)
	}
	return false
}

// tellGone tells that a session, which is not in the table, has expired.
func (t *Table) tellGone(key session.Key, here bool) {
	t.telling.RLock()
	defer t.telling.RUnlock()
	c := t.watched(key.Context)
	if c == nil {
		return
	}
	w := c.latest()
	tell := func(e core.SessionEvent) {
		if (w.Kinds|w.Cluster)&e.Kind != 0 {
			w.Tell(e, here)
		}
	}
	e := core.SessionEvent{Kind: core.SessionDestroyed, Key: key, Reason: session.Expired, Local: true, Time: time.Now()}
	if c.shared() {
		t.cfg.Relay.Tell(e, 0, tell)
		return
	}
	tell(e)
}
