package table

import (
	"context"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// tick is how often the expirer works; sessions expire at most that late.
	tick = time.Second
	// releaseKeys bounds the keys of one call of Manager.Release.
	releaseKeys = 4096
)

// wheel says what to look at in which second. Requests do not move their
// session in it: when its second comes, a session that has been used goes to a
// later one.
type wheel struct {
	mu    sync.Mutex
	slots map[int64]slot
}

// slot is what to look at in one second.
type slot struct {
	sessions []*live
	keys     []check
}

// check is the key of a renewed session, or that of one which is not in the
// table and whose end is expected.
type check struct {
	old      session.Key
	expected bool
	released bool // see expected
}

// seconds rounds milliseconds up.
func seconds(ms int64) int64 { return (ms + 999) / 1000 }

func (w *wheel) add(second int64, c check) {
	w.mu.Lock()
	s := w.slots[second]
	s.keys = append(s.keys, c)
	w.slots[second] = s
	w.mu.Unlock()
}

func (w *wheel) addSession(second int64, l *live) {
	w.mu.Lock()
	s := w.slots[second]
	s.sessions = append(s.sessions, l)
	w.slots[second] = s
	w.mu.Unlock()
}

// pop removes all slots up to second.
func (w *wheel) pop(second int64) (out map[int64]slot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for at, s := range w.slots { // as many as there are distinct seconds
		if at <= second {
			if out == nil {
				out = make(map[int64]slot)
			}
			out[at] = s
			delete(w.slots, at)
		}
	}
	return out
}

// schedule makes the expirer look at the session when it may be due for
// something. s.mu is held.
func (s *live) schedule(now int64) {
	at := s.expiry()
	if !s.living() {
		at = s.keep
	} else if s.t.cfg.Manager != nil && s.t.cfg.IdleRelease > 0 {
		release := max(s.rec.LastAccess()+s.t.cfg.IdleRelease.Milliseconds(), s.keep)
		if at == 0 || release < at {
			at = release
		}
	}
	if at == 0 {
		return
	}
	second := max(seconds(at), seconds(now)+1)
	if s.checkAt != 0 && s.checkAt <= second {
		return
	}
	s.checkAt = second
	s.t.wheel.addSession(second, s)
}

func (t *Table) expireLoop() {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		select {
		case now := <-ticker.C:
			t.expire(now.UnixMilli())
		case <-t.life.Done():
			return
		}
	}
}

// expire looks at everything whose second has come.
func (t *Table) expire(now int64) {
	var idle, over []*live
	var ends []expected
	for second, due := range t.wheel.pop(now / 1000) {
		for _, c := range due.keys {
			if c.expected {
				ends = append(ends, expected{c.old, c.released})
				continue
			}
			t.forgetRenewal(c.old, now)
		}
		for _, s := range due.sessions {
			s.room(core.SessionDestroyed)
			switch s.look(second, now) {
			case lookRelease:
				idle = append(idle, s)
			case lookRemove:
				over = append(over, s)
			}
		}
	}
	for _, s := range over {
		t.remove(s)
	}
	if len(idle) > 0 {
		t.release(idle)
	}
	if len(ends) > 0 {
		t.spawn(func() { t.lookFor(ends) })
	}
}

// What to do with a session.
const (
	lookKeep = iota
	lookRelease
	lookRemove
)

// look decides what a session is due for in the given second.
func (s *live) look(second, now int64) (verdict int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dropped || s.checkAt != second {
		return lookKeep // scheduled anew meanwhile
	}
	s.checkAt = 0
	if s.busy != nil && s.leaving != nil {
		return lookKeep // leave schedules it again if it stays
	}
	switch {
	case s.removable():
		return lookRemove
	case !s.living():
		if s.idle(now) && s.clean() {
			verdict = lookRelease
		}
	case s.users > 0:
		// Long requests keep their session alive.
		s.rec.Touch(now)
		s.touch(now)
	case s.due(now):
		s.finish(session.Expired, now)
		s.t.m.expired.Inc()
		if s.removable() {
			return lookRemove
		}
	case s.idle(now):
		if s.clean() {
			verdict = lookRelease
		}
	}
	if s.dirty() {
		s.t.flushers[core.Async].enqueue(s)
	}
	if verdict == lookKeep {
		s.schedule(now) // else release does
	}
	return verdict
}

// idle reports whether the session may be left to the manager.
func (s *live) idle(now int64) bool {
	c := &s.t.cfg
	if c.Manager == nil || now < s.keep {
		return false
	}
	return !s.living() ||
		c.IdleRelease > 0 && s.users == 0 && now-s.rec.LastAccess() >= c.IdleRelease.Milliseconds()
}

// forgetRenewal forgets where an old id leads, when its grace is over and its
// tombstone is committed: before that, the manager would still know it alive.
func (t *Table) forgetRenewal(old session.Key, now int64) {
	sh := t.shard(old)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	r, ok := sh.renewed[old]
	if !ok {
		return
	}
	if r.by != nil {
		r.by.mu.Lock()
		clean := r.by.clean()
		r.by.mu.Unlock()
		if !clean {
			t.wheel.add(now/1000+1, check{old: old})
			return
		}
	}
	delete(sh.renewed, old)
}

// release leaves idle sessions to the manager, in a goroutine, some at a time.
func (t *Table) release(idle []*live) {
	work := func() {
		defer t.releasing.Store(false)
		for part := range slices.Chunk(idle, releaseKeys) {
			t.releaseSome(part)
		}
	}
	if !t.releasing.Swap(true) && t.spawn(work) {
		return
	}
	now := time.Now().UnixMilli() // still busy with the last ones
	for _, s := range idle {
		s.mu.Lock()
		s.keep = max(s.keep, now+keepBusy.Milliseconds())
		s.schedule(now)
		s.mu.Unlock()
	}
}

// releaseSome is one call of the manager. Requests that come for one of the
// sessions meanwhile wait, so that they load it after it was released; changes
// by others are still merged.
func (t *Table) releaseSome(idle []*live) {
	now := time.Now().UnixMilli()
	f := &flight{done: make(chan struct{})}
	keys := make([]session.Key, 0, len(idle))
	leaving := make([]*live, 0, len(idle))
	for _, s := range idle {
		s.mu.Lock()
		if !s.dropped && (s.busy == nil || s.leaving == nil) && s.clean() && s.idle(now) {
			s.use().leaving = f
			keys, leaving = append(keys, s.key), append(leaving, s)
		} else {
			s.schedule(now)
		}
		s.mu.Unlock()
	}
	if len(keys) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(t.life, t.cfg.LoadTimeout)
	defer cancel()
	err := t.cfg.Manager.Release(ctx, keys)
	if err != nil {
		t.log.Debug("the manager does not take over unused sessions alone; they stay in the table", zap.Int("sessions", len(keys)), zap.Error(err))
	}
	for i, s := range leaving {
		t.leave(s, keys[i], err == nil)
	}
	close(f.done)
}

// leave takes a session that the manager has taken over out of the table; if it
// has not, or somebody has changed the session meanwhile, it stays.
func (t *Table) leave(s *live, key session.Key, taken bool) {
	now := time.Now().UnixMilli()
	sh := t.shard(key)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaving = nil
	defer s.rest()
	if !taken || s.key != key || !s.clean() || !s.idle(now) {
		s.keep = now + keepRefused.Milliseconds()
		s.schedule(now)
		return
	}
	if sh.live[key] != s {
		return
	}
	s.dropped = true
	delete(sh.live, key)
	if s.living() {
		s.expectEnd()
		t.count.Add(-1)
		t.m.released.Inc()
	} else {
		t.ended.Add(-1)
	}
}
