package stored

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Kinds of messages between managers, the first byte.
const (
	// noticeChanges: a batch of changes that are in the store. A record with
	// nothing but a key is a change that is too large to be sent.
	noticeChanges = 'C'
	// noticeRefresh: look at all live sessions again, because some notices did
	// not reach you.
	noticeRefresh = 'R'
)

// notices are changes that other nodes have not been told yet.
type notices struct {
	buf   []byte
	calls []*commit
}

// announce puts a change that is in the store into the next notice, and ends
// the commits that wait for no more; mu is held.
func (m *Manager) announce(change *session.Record, calls []*commit) {
	if len(m.members) == 0 {
		for _, c := range calls {
			c.settle(nil)
		}
		return
	}
	if len(m.notice.buf) == 0 {
		m.notice.buf = append(m.notice.buf, noticeChanges)
	}
	before := len(m.notice.buf)
	m.notice.buf = session.AppendBatch(m.notice.buf, change)
	if len(m.notice.buf)-before > m.cfg.NoticeBytes {
		m.notice.buf = session.AppendBatch(m.notice.buf[:before], &session.Record{Key: change.Key})
	}
	for _, c := range calls {
		if c.level < core.Synced {
			c.settle(nil)
		} else {
			m.notice.calls = append(m.notice.calls, c)
		}
	}
	m.tell.Signal()
}

// notifier tells the other nodes what has changed, until Stop.
func (m *Manager) notifier() {
	var spare []byte
	for {
		m.mu.Lock()
		for len(m.notice.buf) == 0 && !m.closed {
			m.tell.Wait()
		}
		if m.closed {
			calls := m.notice.calls
			m.notice.calls = nil
			for _, c := range calls {
				c.settle(channel.ErrClosed)
			}
			m.mu.Unlock()
			return
		}
		batch, calls := m.notice.buf, m.notice.calls
		m.notice = notices{buf: spare[:0]}
		m.telling = true
		if len(batch) >= m.cfg.NoticeBuffer {
			m.todo.Broadcast()
		}
		to := slices.DeleteFunc(slices.Clone(m.members), func(a channel.Member) bool { return m.aside[a.ID] })
		m.mu.Unlock()
		err := m.send(to, batch, len(calls) > 0)
		spare = batch
		m.mu.Lock()
		m.telling = false
		for _, c := range calls {
			c.settle(err)
		}
		m.changed.Broadcast()
		m.mu.Unlock()
	}
}

// send tells members something. A member that does not take it although it is
// in the view is put aside. The error names those that have refused it; those
// that are silent will read the store when they answer again.
func (m *Manager) send(to []channel.Member, body []byte, wait bool) error {
	if len(to) == 0 {
		return nil
	}
	o := channel.SendAck
	if wait {
		o = channel.SendSyncAck
	}
	ctx, cancel := context.WithTimeout(m.ctx, m.cfg.Grace)
	defer cancel()
	err := m.host.Send(ctx, to, o, body)
	if err == nil || m.ctx.Err() != nil {
		return nil
	}
	var se *channel.SendError
	if !errors.As(err, &se) {
		m.log.Warn("the other nodes could not be told of changes", zap.Error(err))
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var refused []channel.Fault
	for _, f := range se.Faults {
		if errors.Is(f.Err, channel.ErrNegativeAck) {
			refused = append(refused, f)
		}
		if !m.closed && !m.aside[f.Member.ID] && slices.ContainsFunc(m.members, f.Member.Is) {
			m.aside[f.Member.ID] = true
			m.log.Warn("a member does not take notices of changes; its live sessions may be old until it answers", zap.Stringer("member", f.Member), zap.Error(f.Err))
			m.work.Go(func() { m.bringBack(f.Member) })
		}
	}
	if len(refused) > 0 {
		return fmt.Errorf("stored: tell the other nodes: %w", &channel.SendError{Faults: refused})
	}
	return nil
}

// bringBack tries to reach a member that was put aside until it answers, or
// leaves.
func (m *Manager) bringBack(member channel.Member) {
	pause := m.cfg.RetryMin
	for m.sleep(pause) {
		m.mu.Lock()
		gone := !m.aside[member.ID]
		m.mu.Unlock()
		if gone {
			return
		}
		ctx, cancel := context.WithTimeout(m.ctx, m.cfg.Grace)
		err := m.host.Send(ctx, []channel.Member{member}, channel.SendSyncAck, []byte{noticeRefresh})
		cancel()
		if err == nil {
			m.mu.Lock()
			delete(m.aside, member.ID)
			m.mu.Unlock()
			// What was sent to the others meanwhile has not been in that refresh.
			ctx, cancel := context.WithTimeout(m.ctx, m.cfg.Grace)
			err = m.host.Send(ctx, []channel.Member{member}, channel.SendSyncAck, []byte{noticeRefresh})
			cancel()
			if err == nil {
				return
			}
			m.mu.Lock()
			gone := m.aside[member.ID] || !slices.ContainsFunc(m.members, member.Is)
			if !gone {
				m.aside[member.ID] = true
			}
			m.mu.Unlock()
			if gone { // or somebody else brings it back
				return
			}
		}
		pause = min(2*pause, m.cfg.RetryMax)
	}
}

// HandleMessage implements core.Manager.
func (m *Manager) HandleMessage(_ context.Context, from channel.Member, body []byte, done func(error)) {
	if len(body) == 1 && body[0] == noticeRefresh {
		m.refreshAll()
		done(nil)
		return
	}
	if len(body) == 0 || body[0] != noticeChanges {
		m.strays.Inc()
		done(channel.ErrBadMessage)
		return
	}
	var reload, ended []session.Key
	update := false
	err := session.DecodeBatch(body[1:], func(r *session.Record) error {
		m.mu.Lock()
		defer m.mu.Unlock()
		e := m.live[r.Key]
		if m.happened(r.Key); e == nil {
			return nil
		}
		if !touchOnly(r) {
			e.known = false
		}
		if r.Created == 0 && r.LastAccess == 0 && r.End == session.Living && len(r.Attrs) == 0 && r.MaxInactiveVersion == (session.Version{}) {
			reload = append(reload, r.Key)
		} else {
			update = true
			if r.End == session.Living && e.ended == nil && e.rep != nil {
				m.bytes -= int64(e.rep.Size())
				e.rep.Merge(r)
				m.bytes += int64(e.rep.Size())
			}
			if r.End != session.Living {
				ended = append(ended, r.Key)
			}
		}
		return nil
	})
	if err != nil {
		m.strays.Inc()
		m.log.Warn("a notice of changes cannot be read", zap.Stringer("from", from), zap.Error(err))
		done(err)
		return
	}
	if update {
		m.host.Update(body[1:])
	}
	m.gone(ended)
	if len(reload) == 0 {
		done(nil)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		done(channel.ErrClosed)
		return
	}
	m.work.Go(func() { done(m.reload(reload)) })
}

// gone forgets sessions that have ended elsewhere, if there is nothing to be
// stored of them. The host knows already.
func (m *Manager) gone(keys []session.Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range keys {
		if e := m.live[k]; e != nil && e.change == nil && e.writing == nil {
			m.forget(e)
		}
	}
}

// refreshAll looks at all live sessions again, in the background.
func (m *Manager) refreshAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.started {
		return
	}
	if m.refresh {
		m.again = true
		return
	}
	m.refresh = true
	m.work.Go(func() {
		for {
			m.mu.Lock()
			m.again = false
			keys := make([]session.Key, 0, len(m.live))
			for k, e := range m.live {
				if e.held {
					keys = append(keys, k)
				}
			}
			m.mu.Unlock()
			err := m.reload(keys)
			m.mu.Lock()
			if err != nil {
				m.again = true
			}
			if !m.again || m.closed {
				m.refresh = false
				m.mu.Unlock()
				return
			}
			m.mu.Unlock()
			if err != nil && !m.sleep(m.cfg.RetryMax) {
				return
			}
		}
	})
}

// reload reads sessions from the store and tells the host what they are now. It
// returns the first error.
func (m *Manager) reload(keys []session.Key) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var first error
	for part := range slices.Chunk(keys, max(1, (len(keys)+m.cfg.Parallel-1)/m.cfg.Parallel)) {
		wg.Go(func() {
			for _, k := range part {
				if err := m.reloadOne(k); err != nil {
					mu.Lock()
					defer mu.Unlock()
					if first == nil {
						first = err
					}
					return
				}
			}
		})
	}
	wg.Wait()
	return first
}

func (m *Manager) reloadOne(key session.Key) error {
	ctx, cancel := m.call()
	defer cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	rec, version, err := m.fresh(ctx, key)
	if err != nil {
		m.failed(err, false)
		return err
	}
	m.works(false)
	e := m.live[key]
	if e == nil || rec == nil {
		return nil
	}
	if e.writing == nil { // a writer learns by itself
		m.learn(e, rec, version)
	}
	if e.held {
		m.host.Update(session.AppendBatch(nil, rec)) // it does not wait
	}
	if rec.End != session.Living && e.change == nil && e.writing == nil {
		m.forget(e)
	}
	return nil
}
