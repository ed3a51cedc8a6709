package core_test

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// memory is a session table without a cluster: sessions in a map. It records
// commits, and fails them if told to.
type memory struct {
	mu       sync.Mutex
	sessions map[session.Key]*memorySession
	commits  []core.Level // levels of commits that carried something
	waits    []core.Level // levels of all commits
	held     int          // handles not released
	fail     error        // of commits above Async
}

type memorySession struct {
	attrs    map[string][]byte
	key      session.Key
	route    string
	created  time.Time
	inactive time.Duration
	ended    bool
	dirty    bool
}

// memoryHandle is a handle on a session of memory.
type memoryHandle struct {
	m     *memory
	s     *memorySession
	isNew bool
}

func newMemory() *memory { return &memory{sessions: map[session.Key]*memorySession{}} }

func (m *memory) Find(_ context.Context, key session.Key) (core.Handle, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.sessions[key]
	if s == nil {
		return nil, nil
	}
	m.held++
	return &memoryHandle{m: m, s: s}, nil
}

func (m *memory) Create(_ context.Context, name string, o session.NewOptions) (core.Handle, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &memorySession{
		attrs: map[string][]byte{}, key: session.Key{Context: name, ID: session.NewID()},
		route: o.Route, created: time.Now(), inactive: o.MaxInactive, dirty: true,
	}
	m.sessions[s.key] = s
	m.held++
	return &memoryHandle{m: m, s: s, isNew: true}, nil
}

func (m *memory) setFail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

func (m *memory) state() (commits, waits []core.Level, held int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.commits), slices.Clone(m.waits), m.held
}

func (h *memoryHandle) lock() func() {
	h.m.mu.Lock()
	return h.m.mu.Unlock
}

func (h *memoryHandle) ID() string {
	defer h.lock()()
	return h.s.key.ID + "." + h.s.route
}

func (h *memoryHandle) IsNew() bool { return h.isNew }

func (h *memoryHandle) Get(name string, into any) (bool, error) {
	defer h.lock()()
	b, ok := h.s.attrs[name]
	if !ok {
		return false, nil
	}
	return true, session.Decode(b, into)
}

func (h *memoryHandle) Set(name string, value any) error {
	b, err := session.Encode(value)
	if err != nil {
		return err
	}
	return h.Update(name, func([]byte) ([]byte, error) { return b, nil })
}

func (h *memoryHandle) Delete(name string) error {
	return h.Update(name, func([]byte) ([]byte, error) { return nil, nil })
}

func (h *memoryHandle) Update(name string, change func([]byte) ([]byte, error)) error {
	defer h.lock()()
	if h.s.ended {
		return session.ErrInvalid
	}
	b, err := change(h.s.attrs[name])
	if err != nil {
		return err
	}
	if b == nil {
		delete(h.s.attrs, name)
	} else {
		h.s.attrs[name] = b
	}
	h.s.dirty = true
	return nil
}

func (h *memoryHandle) Names() []string {
	defer h.lock()()
	return slices.Sorted(maps.Keys(h.s.attrs))
}

func (h *memoryHandle) Created() time.Time         { return h.s.created }
func (h *memoryHandle) LastAccess() time.Time      { return h.s.created }
func (h *memoryHandle) MaxInactive() time.Duration { return h.s.inactive }

func (h *memoryHandle) SetMaxInactive(d time.Duration) error {
	defer h.lock()()
	h.s.inactive = d
	return nil
}

func (h *memoryHandle) Renew() error {
	defer h.lock()()
	if h.s.ended {
		return session.ErrInvalid
	}
	delete(h.m.sessions, h.s.key)
	h.s.key.ID = session.NewID()
	h.s.dirty = true
	h.m.sessions[h.s.key] = h.s
	return nil
}

func (h *memoryHandle) Invalidate() error {
	defer h.lock()()
	if h.s.ended {
		return session.ErrInvalid
	}
	delete(h.m.sessions, h.s.key)
	h.s.ended, h.s.dirty = true, true
	return nil
}

func (h *memoryHandle) Key() session.Key {
	defer h.lock()()
	return h.s.key
}

func (h *memoryHandle) Valid() bool {
	defer h.lock()()
	return !h.s.ended
}

func (h *memoryHandle) Dirty() bool {
	defer h.lock()()
	return h.s.dirty
}

var errReplication = errors.New("peer is gone")

func (h *memoryHandle) Commit(_ context.Context, level core.Level) error {
	defer h.lock()()
	h.m.waits = append(h.m.waits, level)
	if h.m.fail != nil && level > core.Async {
		return h.m.fail
	}
	if h.s.dirty {
		h.m.commits = append(h.m.commits, level)
	}
	h.s.dirty = false
	return nil
}

func (h *memoryHandle) Release() {
	defer h.lock()()
	h.m.held--
}
