package table

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// handle is one request's hold on a session.
type handle struct {
	t        *Table
	s        *live
	prev     int64  // the access before this request, ms
	own      uint64 // seq of this request's last uncommitted change, under s.mu; 0 is none
	fresh    bool
	released atomic.Bool
}

// ID implements session.Session.
func (h *handle) ID() string {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	route := h.t.cfg.Route
	if h.s.route != nil {
		route = *h.s.route
	}
	if route == "" {
		return h.s.key.ID
	}
	return h.s.key.ID + "." + route
}

// Key implements core.Handle.
func (h *handle) Key() session.Key {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.s.key
}

// IsNew implements session.Session.
func (h *handle) IsNew() bool { return h.fresh }

// Valid implements core.Handle.
func (h *handle) Valid() bool {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.s.living()
}

// Dirty implements core.Handle.
func (h *handle) Dirty() bool {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.s.dirty()
}

// entry returns the attribute; its value is nil if it is not set.
func (h *handle) entry(name string) (session.Entry, error) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if !h.s.living() {
		return session.Entry{}, session.ErrInvalid
	}
	e, _ := h.s.rec.Get(name)
	return e, nil
}

// Get implements session.Session.
func (h *handle) Get(name string, into any) (bool, error) {
	e, err := h.entry(name)
	if e.Value == nil || err != nil {
		return false, err
	}
	if err := session.Decode(e.Value, into); err != nil {
		return true, fmt.Errorf("attribute %q: %w", name, err)
	}
	return true, nil
}

// Set implements session.Session. The value is encoded at once.
func (h *handle) Set(name string, value any) error {
	if value == nil {
		return h.Delete(name)
	}
	b, err := session.Encode(value)
	if err != nil {
		return fmt.Errorf("attribute %q: %w", name, err)
	}
	return h.put(name, session.Entry{Value: b})
}

// Delete implements session.Session.
func (h *handle) Delete(name string) error {
	return h.put(name, session.Entry{Deleted: true})
}

func (h *handle) put(name string, e session.Entry) error {
	if err := h.checkName(name); err != nil {
		return err
	}
	h.s.room(core.AttributeEvents)
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.putLocked(name, e)
}

func (h *handle) putLocked(name string, e session.Entry) error {
	if !h.s.living() {
		return session.ErrInvalid
	}
	if e.Deleted {
		if old, there := h.s.rec.Get(name); !there || old.Deleted {
			return nil
		}
	}
	if err := h.s.put(name, e); err != nil {
		return fmt.Errorf("table: attribute %q of %d bytes: %w", name, len(e.Value), err)
	}
	h.own = h.s.seq
	return nil
}

func (h *handle) checkName(name string) error {
	if name == "" || len(name) > session.MaxName || !utf8.ValidString(name) {
		h.t.m.tooLarge.Inc()
		return fmt.Errorf("table: an attribute's name must be 1 to %d bytes of UTF-8, not %.40q: %w", session.MaxName, name, session.ErrTooLarge)
	}
	return nil
}

// Update implements session.Session.
func (h *handle) Update(name string, change func(old []byte) ([]byte, error)) error {
	if err := h.checkName(name); err != nil {
		return err
	}
	return h.update(name, func(old session.Entry) ([]byte, error) { return change(old.Value) })
}

// UpdateRuled implements session.Ruled.
func (h *handle) UpdateRuled(name string, change func(old session.Entry, node uint64) ([]byte, error)) error {
	if err := h.checkName(name); err != nil {
		return err
	}
	return h.update(name, func(old session.Entry) ([]byte, error) { return change(old, h.t.node.Load()) })
}

func (h *handle) update(name string, change func(old session.Entry) ([]byte, error)) error {
	h.s.room(core.AttributeEvents) // before the gate, which a listener may be waiting for
	h.s.mu.Lock()
	b := h.s.use() // until updates is 0 again
	if b.gate == nil {
		b.gate = make(chan struct{}, 1)
	}
	b.updates++
	h.s.mu.Unlock()
	b.gate <- struct{}{}
	defer func() {
		<-b.gate
		h.s.mu.Lock()
		b.updates--
		h.s.rest()
		h.s.mu.Unlock()
	}()
	for {
		old, err := h.entry(name)
		if err != nil {
			return err
		}
		b, err := change(old)
		if err != nil {
			return err
		}
		h.s.mu.Lock()
		// What was joined by a rule may have the version of one of its parts.
		now, _ := h.s.rec.Get(name)
		if (now.Version != old.Version || !bytes.Equal(now.Value, old.Value)) && h.s.living() {
			h.s.mu.Unlock()
			continue // Set, or another node, was faster
		}
		err = h.putLocked(name, session.Entry{Value: b, Deleted: b == nil})
		h.s.mu.Unlock()
		return err
	}
}

// Names implements session.Session.
func (h *handle) Names() []string {
	h.s.mu.Lock()
	names := make([]string, 0, h.s.rec.Len())
	for name, e := range h.s.rec.All() {
		if !e.Deleted {
			names = append(names, name)
		}
	}
	h.s.mu.Unlock()
	slices.Sort(names)
	return names
}

// Created implements session.Session.
func (h *handle) Created() time.Time {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return time.UnixMilli(h.s.rec.Created())
}

// LastAccess implements session.Session.
func (h *handle) LastAccess() time.Time { return time.UnixMilli(h.prev) }

// MaxInactive implements session.Session.
func (h *handle) MaxInactive() time.Duration {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.s.rec.MaxInactive()
}

// SetMaxInactive implements session.Session.
func (h *handle) SetMaxInactive(d time.Duration) error {
	s := h.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.living() {
		return session.ErrInvalid
	}
	d, v := max(d, 0), s.next()
	s.rec.SetMaxInactive(d, v)
	s.use().seq++
	if h.t.cfg.Manager != nil {
		p := s.delta()
		p.MaxInactive, p.MaxInactiveVersion = d, v
		h.own = s.seq
	}
	s.schedule(time.Now().UnixMilli())
	return nil
}

// Invalidate implements session.Session.
func (h *handle) Invalidate() error {
	s := h.s
	s.room(core.SessionDestroyed)
	now := time.Now().UnixMilli()
	s.mu.Lock()
	if !s.living() {
		s.mu.Unlock()
		return session.ErrInvalid
	}
	s.finish(session.Invalidated, now)
	h.own = s.seq
	gone := s.removable()
	s.mu.Unlock()
	h.t.m.invalidated.Inc()
	if gone {
		h.t.remove(s)
	}
	return nil
}

// Renew implements session.Session.
func (h *handle) Renew() error {
	s, t := h.s, h.t
	s.room(core.SessionRenewed)
	now := time.Now().UnixMilli()
	s.mu.Lock()
	old := s.key
	s.mu.Unlock()
	fresh := session.Key{Context: old.Context, ID: session.NewID()}
	// The new key is in the table before anybody can hear of it.
	to, from := t.shard(fresh), t.shard(old)
	to.mu.Lock()
	to.live[fresh] = s
	to.mu.Unlock()

	s.mu.Lock()
	living := s.living() && s.key == old
	if living {
		h.renew(fresh, now)
	}
	s.mu.Unlock()
	if !living {
		to.mu.Lock()
		delete(to.live, fresh)
		to.mu.Unlock()
		return session.ErrInvalid
	}
	from.mu.Lock()
	delete(from.live, old)
	from.renewed[old] = renewal{to: fresh, until: now + t.cfg.RenewGrace.Milliseconds(), by: s}
	from.mu.Unlock()
	t.wheel.add(seconds(now+max(t.cfg.RenewGrace.Milliseconds(), 0))+1, check{old: old})
	return nil
}

// renew gives the session its new key. s.mu is held.
func (h *handle) renew(fresh session.Key, now int64) {
	s := h.s
	end := &session.Record{Key: s.key, End: session.Renewed, EndTime: now, RenewedTo: fresh.ID}
	h.t.tellRenewed(s.key, fresh, s.rec.MaxInactive(), true)
	s.key = fresh
	s.rec.DropDeleted() // nobody knows the new id: no need to say what is not there
	s.size = s.rec.Size()
	s.use().seq++
	if h.t.cfg.Manager != nil {
		b := s.use()
		b.extra = append(b.extra, end)
		b.pending = s.rec.Record(s.key)
		h.own = s.seq
	}
}

// Commit implements core.Handle.
func (h *handle) Commit(ctx context.Context, level core.Level) error {
	s := h.s
	s.mu.Lock()
	if h.t.cfg.Manager == nil || s.clean() && h.own == 0 {
		s.mu.Unlock()
		return nil
	}
	var few [4]*batch
	wait := few[:0]
	if h.own != 0 && s.taken(h.own, level) {
		// A batch of a lower level was faster: that is not enough.
		s.commitWhole()
	}
	ok := true
	if s.dirty() {
		var b *batch
		if b, ok = h.t.flushers[level].enqueue(s); ok {
			wait = append(wait, b)
		}
	}
	if s.busy != nil {
		for _, b := range s.inflight {
			if b.level >= level {
				wait = append(wait, b)
			}
		}
	}
	mine := h.own
	s.mu.Unlock()
	if !ok {
		return ErrStopped
	}
	if level != core.Async {
		for _, b := range wait {
			if err := b.wait(ctx); err != nil {
				return fmt.Errorf("table: commit session %s at level %s: %w", session.Prefix(h.Key().ID), level, err)
			}
		}
	}
	s.mu.Lock()
	if h.own == mine {
		h.own = 0
	}
	s.mu.Unlock()
	return nil
}

// Release implements core.Handle. What the request has not committed is
// committed asynchronously.
func (h *handle) Release() {
	if h.released.Swap(true) {
		return
	}
	now := time.Now().UnixMilli()
	s := h.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users--
	if s.living() {
		s.rec.Touch(now)
		s.touch(now)
	}
	if s.dirty() {
		h.t.flushers[core.Async].enqueue(s)
	}
	s.rest()
}

// touch makes the access time pending if other nodes know too old a one.
func (s *live) touch(now int64) {
	if s.t.cfg.Manager != nil && now-s.shared > s.touchInterval().Milliseconds() {
		s.delta()
	}
}
