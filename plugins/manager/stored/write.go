package stored

import (
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// maxConflicts is how often one change is put on top of another node's before
// its turn is over.
const maxConflicts = 16

// maxTurns is after how many such turns one after the other nobody waits for the
// change any more.
const maxTurns = 4

// writer writes changes to the store, one session at a time, until Stop.
func (m *Manager) writer() {
	for {
		e, calls, probe := m.next()
		if e == nil {
			return
		}
		m.write(e, calls)
		if probe { // whatever has come of it
			m.mu.Lock()
			m.down.probe = false
			m.todo.Broadcast()
			m.mu.Unlock()
		}
	}
}

// next waits for a session to be written; nil at the end. probe says that others
// wait for what comes of it, because the store fails.
func (m *Manager) next() (e *entry, calls []*commit, probe bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for !m.closed {
		now := m.now()
		for len(m.later) > 0 && !m.later[0].due.After(now) {
			e := m.later[0]
			m.later[0] = nil
			m.later = m.later[1:]
			if e.queued && !e.due.IsZero() {
				e.due = time.Time{}
				m.ready = append(m.ready, e)
			}
		}
		switch {
		case len(m.notice.buf) >= m.cfg.NoticeBuffer: // until the other nodes have been told
			m.todo.Wait()
		case len(m.ready) > 0 && m.down.since.IsZero(), len(m.ready) > 0 && !m.down.probe && !now.Before(m.down.retry):
			e := m.ready[0]
			m.ready[0] = nil
			m.ready = m.ready[1:]
			e.queued = false
			if e.change == nil {
				continue
			}
			probe = !m.down.since.IsZero()
			m.down.probe = probe
			e.writing, e.change = e.change, nil
			calls := e.waiting
			e.waiting = nil
			return e, calls, probe
		case len(m.ready) > 0 && !m.down.probe:
			m.waitUntil(m.down.retry)
		case len(m.later) > 0 && m.down.since.IsZero():
			m.waitUntil(m.later[0].due)
		default:
			m.todo.Wait()
		}
	}
	return nil, nil, false
}

// failed notes that the store has failed, to write or to read; mu is held.
func (m *Manager) failed(err error, write bool) {
	if m.closed || m.ctx.Err() != nil {
		return
	}
	m.retries.Inc()
	now := m.now()
	switch {
	case m.down.since.IsZero():
		m.log.Warn("the store fails; changes wait here until it is back", zap.Error(err))
		m.down = outage{since: now, pause: m.cfg.RetryMin, retry: now.Add(m.cfg.RetryMin)}
		if !m.quiet.IsZero() {
			m.down.since = m.quiet // those who wait have waited since then
		}
	case !now.Before(m.down.retry): // not one of many that failed together
		m.down.pause = min(2*m.down.pause, m.cfg.RetryMax)
		m.down.retry = now.Add(m.down.pause)
	}
	m.down.err, m.down.write = err, m.down.write || write
	m.todo.Broadcast()
}

// works notes that the store has answered, to a write or to a read; mu is held.
func (m *Manager) works(write bool) {
	first := !m.met
	m.met = true
	if m.down.since.IsZero() || m.down.write && !write {
		return
	}
	m.log.Info("the store is back", zap.Duration("after", m.now().Sub(m.down.since)), zap.Int("waiting", m.pending))
	m.down = outage{}
	m.todo.Broadcast()
	if !first {
		// It may have come back without what it had.
		m.resync()
	}
}

// resync asks the host for its sessions, one time for all who want it; mu is
// held.
func (m *Manager) resync() {
	if m.lost = true; !m.resyncs && !m.closed {
		m.resyncs = true
		m.work.Go(m.resyncer)
	}
}

// resyncer asks the host for its sessions as long as somebody wants that.
func (m *Manager) resyncer() {
	pause := m.cfg.RetryMin
	for {
		m.mu.Lock()
		if !m.lost || m.closed {
			m.resyncs = false
			m.mu.Unlock()
			return
		}
		orphans := m.orphans
		m.lost, m.orphans = false, nil
		m.mu.Unlock()
		err := m.host.Resync(m.ctx)
		if m.ctx.Err() != nil {
			return
		}
		m.mu.Lock()
		if err != nil {
			m.log.Warn("the node could not give its sessions again", zap.Error(err))
			m.lost, m.orphans = true, append(orphans, m.orphans...)
		} else {
			for _, e := range orphans {
				m.drop(e)
			}
		}
		m.mu.Unlock()
		// A store that comes and goes does not get everything each time.
		if !m.sleep(pause) {
			return
		}
		pause = min(2*pause, m.cfg.RetryMax)
	}
}

// errNoSession: a change of a session that nobody has.
var errNoSession = errors.New("stored: neither the store nor this node has the session that was changed")

// drop gives up the change of a session that neither the store nor the host has;
// mu is held.
func (m *Manager) drop(e *entry) {
	if !e.orphan {
		return
	}
	m.log.Warn("a change is dropped: neither the store nor this node has the session that it belongs to",
		zap.String("session", session.Prefix(e.key.ID)), zap.String("context", e.key.Context))
	for _, c := range e.waiting {
		c.settle(errNoSession)
	}
	e.waiting, e.change, e.orphan, e.held = nil, nil, false, false
	m.done(e)
}

// done ends what is to be done for an entry without a change; mu is held.
func (m *Manager) done(e *entry) {
	m.pending--
	if !e.held || e.ended != nil {
		m.forget(e)
	}
	if m.pending == 0 {
		m.down.write = false // there is nothing to try it with
	}
	m.changed.Broadcast()
}

// write brings one change into the store.
func (m *Manager) write(e *entry, calls []*commit) {
	foreign := false
	for range maxConflicts {
		m.mu.Lock()
		known := e.known
		m.mu.Unlock()
		if !known {
			ctx, cancel := m.call()
			m.mu.Lock()
			rec, version, err := m.fresh(ctx, e.key)
			cancel()
			if err != nil {
				m.putBack(e, calls, err, false)
				m.mu.Unlock()
				return
			}
			m.works(false)
			m.learn(e, rec, version)
			foreign = foreign || rec != nil
			m.mu.Unlock()
		}
		err := m.attempt(e, calls, foreign)
		if err == nil {
			return
		}
		m.mu.Lock()
		if !errors.Is(err, core.ErrStoreConflict) {
			m.putBack(e, calls, err, true)
			m.mu.Unlock()
			return
		}
		m.conflicts.Inc()
		m.works(false)
		e.known = false
		m.mu.Unlock()
	}
	// Others are faster all the time, or what this node reads is not what the
	// store has: let the rest of the queue go first.
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		m.putBack(e, calls, nil, false)
		return
	}
	if e.turns++; e.turns >= maxTurns {
		m.log.Warn("a session cannot be stored: what this node reads is not what the store has; have all nodes the same secret and version?",
			zap.String("session", session.Prefix(e.key.ID)), zap.String("context", e.key.Context))
		var err error
		if m.cfg.OnFailure == Fail {
			err = errUnsettled
		} else {
			m.unsaved.Add(int64(len(calls)))
		}
		for _, c := range calls {
			c.settle(err)
		}
		calls = nil
	}
	m.hold(e, calls)
	pause := min(m.cfg.RetryMin<<min(e.turns, 8), m.cfg.RetryMax)
	m.work.Go(func() {
		m.sleep(pause)
		m.mu.Lock()
		defer m.mu.Unlock()
		if e.change != nil {
			m.enqueue(e, true)
		}
	})
}

// errUnsettled: a session that is changed all the time.
var errUnsettled = errors.New("stored: the stored session is never the one that was read")

// hold makes what could not be written a waiting change again; mu is held.
func (m *Manager) hold(e *entry, calls []*commit) {
	if e.change != nil {
		m.note(e.writing, e.change)
	}
	e.change, e.writing = e.writing, nil
	e.waiting = append(e.waiting, calls...)
}

// putBack makes the change wait for another turn, because of err if that is not
// nil, which is that of a write or of a read; mu is held.
func (m *Manager) putBack(e *entry, calls []*commit, err error, write bool) {
	m.hold(e, calls)
	if err != nil {
		m.failed(err, write)
	}
	m.enqueue(e, true)
}

// attempt tries to write e.writing on top of what the store is known to have.
func (m *Manager) attempt(e *entry, calls []*commit, foreign bool) error {
	m.mu.Lock()
	base := &session.Record{Key: e.key}
	switch {
	case e.ended != nil:
		base.Merge(e.ended)
	case e.rep != nil:
		base = e.rep.Record(e.key)
	}
	version, had := e.version, e.rep != nil && !e.refused
	change := e.writing
	m.mu.Unlock()
	var met []conflict
	base.MergeEach(change.Share(), func(name string, kept, lost session.Entry) {
		met = append(met, conflict{name, kept, lost})
	})
	if base.Created == 0 && base.End == session.Living {
		m.mu.Lock()
		defer m.mu.Unlock()
		if e.change != nil { // the whole session may have come meanwhile
			m.putBack(e, calls, nil, false)
			return nil
		}
		e.change, e.writing, e.orphan = e.writing, nil, true
		e.waiting = append(e.waiting, calls...)
		m.orphans = append(m.orphans, e)
		m.resync()
		return nil
	}
	item := core.StoreItem{Expires: m.expiry(base)}
	ctx, cancel := m.call()
	defer cancel()
	if had && touchOnly(change) && base.End == session.Living {
		if !item.Expires.IsZero() { // it is stored for ever
			if err := m.store.Touch(ctx, e.key, item.Expires); err != nil {
				return fmt.Errorf("stored: touch: %w", err)
			}
		}
	} else {
		if base.End != session.Living {
			tomb := base.Tombstone()
			base = &tomb
		}
		item.Data = session.AppendBatch(nil, base)
		next, err := m.store.Save(ctx, e.key, item, version)
		switch {
		case errors.Is(err, core.ErrStoreRefused):
			m.refuse(e, base, calls, err)
			return nil
		case err != nil:
			return fmt.Errorf("stored: save: %w", err)
		}
		version = next
	}
	m.saved.Inc()
	var update []byte
	if foreign || base.End != change.End {
		update = session.AppendBatch(nil, base)
	}
	m.mu.Lock()
	m.works(true)
	for _, c := range met {
		m.dispute(e.key, c)
	}
	m.happened(e.key)
	m.learn(e, base, version)
	e.refused, e.turns = false, 0
	held := e.held
	m.mu.Unlock()
	if held && update != nil {
		m.host.Update(update) // before the commit ends: see core.ManagerHost
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.announce(change, calls)
	e.writing = nil
	if e.change != nil {
		m.enqueue(e, len(e.waiting) > 0 || m.cfg.Delay == 0)
	} else {
		m.done(e)
	}
	return nil
}

// refuse ends a change that the store does not take; the session goes on here,
// and the next change tries again with everything.
func (m *Manager) refuse(e *entry, base *session.Record, calls []*commit, err error) {
	m.refused.Inc()
	m.log.Warn("the store does not take a session; it stays on this node until it is smaller",
		zap.String("session", session.Prefix(e.key.ID)), zap.String("context", e.key.Context), zap.Int("bytes", base.Size()), zap.Error(err))
	if m.cfg.OnFailure == Continue {
		m.unsaved.Add(int64(len(calls)))
		err = nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.works(true)
	m.happened(e.key)
	m.learn(e, base, e.version)
	for _, c := range calls {
		c.settle(err)
	}
	e.writing = nil
	if e.change != nil {
		m.enqueue(e, true)
	} else {
		e.refused = base.End == session.Living
		m.done(e)
	}
}

// touchOnly reports whether a change is about nothing but the last access.
func touchOnly(r *session.Record) bool {
	return r.End == session.Living && r.Created == 0 && len(r.Attrs) == 0 && r.MaxInactiveVersion == session.Version{}
}

// expiry returns when the store may forget a record; zero for never.
func (m *Manager) expiry(r *session.Record) time.Time {
	if r.End != session.Living {
		return m.now().Add(max(m.cfg.TombstoneTTL, r.MaxInactive+m.cfg.ExpireSlack))
	}
	if r.MaxInactive <= 0 {
		return time.Time{}
	}
	return time.UnixMilli(r.LastAccess).Add(r.MaxInactive + m.cfg.ExpireSlack)
}

// sweepLimit bounds what one call removes from a store.
const sweepLimit = 1000

// keeper asks the store until it has answered for the first time; from then on
// it cleans it, and asks it whenever it fails.
func (m *Manager) keeper() {
	probe := session.Key{Context: "longhouse", ID: session.NewID()}
	pause := m.cfg.RetryMin
	for {
		ctx, cancel := m.call()
		_, _, err := m.store.Load(ctx, probe)
		cancel()
		m.mu.Lock()
		if err == nil {
			m.works(false)
			m.mu.Unlock()
			break
		}
		m.failed(fmt.Errorf("stored: load: %w", err), false)
		m.mu.Unlock()
		if !m.sleep(pause) {
			return
		}
		pause = min(2*pause, m.cfg.RetryMax)
	}
	swept := m.now()
	for m.sleep(min(m.cfg.RetryMax, m.cfg.SweepInterval)) {
		m.mu.Lock()
		down := !m.down.since.IsZero()
		m.mu.Unlock()
		if down { // there may be no request that finds out that it is back
			ctx, cancel := m.call()
			_, _, err := m.store.Load(ctx, probe)
			cancel()
			m.mu.Lock()
			if err == nil {
				m.works(false)
			} else {
				m.failed(fmt.Errorf("stored: load: %w", err), false)
			}
			m.mu.Unlock()
			continue
		}
		if m.sweeper != nil && m.now().Sub(swept) >= m.cfg.SweepInterval {
			m.sweep()
			swept = m.now()
		}
	}
}

// sweep removes what has expired.
func (m *Manager) sweep() {
	for m.ctx.Err() == nil {
		ctx, cancel := m.call()
		n, err := m.sweeper.Sweep(ctx, m.now(), sweepLimit)
		cancel()
		if err != nil && m.ctx.Err() == nil {
			m.log.Warn("the store could not be cleaned of expired sessions", zap.Error(err))
		}
		if err != nil || n < sweepLimit {
			return
		}
	}
}

// sleep waits, and reports whether the manager still runs.
func (m *Manager) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-m.ctx.Done():
		return false
	}
}
