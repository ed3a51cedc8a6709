package table

import (
	"maps"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// watches are those of all contexts, the latest of each last. The map and its
// lists are never changed.
type watches map[string][]*core.SessionWatch

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

func (t *Table) rewatch(contextName string, change func([]*core.SessionWatch) []*core.SessionWatch) {
	t.telling.Lock() // waits for those who tell
	defer t.telling.Unlock()
	next := watches{}
	if old := t.watches.Load(); old != nil {
		maps.Copy(next, *old)
	}
	if next[contextName] = change(next[contextName]); len(next[contextName]) == 0 {
		delete(next, contextName)
	}
	if len(next) == 0 {
		t.watches.Store(nil)
		return
	}
	t.watches.Store(&next)
}

// watched returns who wants to hear of a context, or nil.
func (t *Table) watched(contextName string) *core.SessionWatch {
	all := t.watches.Load()
	if all == nil {
		return nil
	}
	if list := (*all)[contextName]; len(list) > 0 {
		return list[len(list)-1]
	}
	return nil
}

// room waits until listeners have room for what is going to be done to a
// session. No lock is held.
func (s *live) room() {
	if s.t.watches.Load() == nil {
		return
	}
	s.mu.Lock()
	name := s.key.Context
	s.mu.Unlock()
	s.t.roomFor(name)
}

func (t *Table) roomFor(contextName string) {
	if w := t.watched(contextName); w != nil {
		w.Room()
	}
}

// tell tells an event of a session in the table. Its lock is held, so that the
// order of events is that of what happened.
func (t *Table) tell(e core.SessionEvent) {
	t.telling.RLock()
	defer t.telling.RUnlock()
	if w := t.watched(e.Key.Context); w != nil && w.Kinds&e.Kind != 0 {
		e.Time = time.Now()
		w.Tell(e, true)
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
	s.t.tell(core.SessionEvent{Kind: kind, Key: s.key, Local: true, Name: name, Value: now.Value, Old: old.Value, Version: now.Version})
}

// tellEnd tells that the session is ending. Its attributes are still there.
func (s *live) tellEnd(kind session.EndKind, local bool) {
	if s.t.watches.Load() == nil {
		return
	}
	s.t.tell(core.SessionEvent{Kind: core.SessionDestroyed, Key: s.key, Reason: kind, Local: local, Attrs: maps.Collect(s.rec.All())})
}

// tellRenewed tells that the session of the key old has another now.
func (t *Table) tellRenewed(old, now session.Key, local bool) {
	if t.watches.Load() == nil {
		return
	}
	t.tell(core.SessionEvent{Kind: core.SessionRenewed, Key: now, Previous: old, Local: local})
}
