package replica

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// maxFetch bounds the keys of one kindFetch.
	maxFetch = 4096
	// shakyFor is how long after a change of the group a session may be
	// elsewhere than its ranking says.
	shakyFor = 30 * time.Second
)

// errUnsure: nobody who answered has the session, but not everybody answered.
var errUnsure = errors.New("a member that may have the session did not answer")

// fetch is a question to other members about a session.
type fetch struct {
	answers chan bool // one for each member that answered: whether it was ready
}

// Load implements core.Manager.
func (m *Manager) Load(ctx context.Context, key session.Key) (*session.Record, error) {
	if _, _, err := m.running(); err != nil {
		return nil, err
	}
	ready, behind := m.isReady(), m.behind()
	r, known := m.store.load(key, time.Now().UnixMilli())
	switch {
	case known && !behind, !known && !m.placed() && ready && !behind:
		return m.taken(key, r), nil
	}
	m.loading.Store(key, struct{}{})
	complete, err := m.search(ctx, key, ready)
	if err != nil {
		m.loading.Delete(key)
		return nil, err
	}
	r, found := m.store.load(key, time.Now().UnixMilli())
	m.loading.Delete(key)
	switch {
	case found || complete || known:
		return m.taken(key, r), nil
	case ready:
		return nil, fmt.Errorf("%s: load session %s: %w", m.name, session.Prefix(key.ID), errUnsure)
	}
	// Somebody has it that cannot be asked: it comes with the state transfer.
	select {
	case <-m.readyCh:
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: load session %s while the state transfer is going on: %w", m.name, session.Prefix(key.ID), ctx.Err())
	case <-m.ctx.Done():
		return nil, errStopped
	}
	r, _ = m.store.load(key, time.Now().UnixMilli())
	return m.taken(key, r), nil
}

// taken notes that the host uses the session from now on.
func (m *Manager) taken(key session.Key, r *session.Record) *session.Record {
	if r != nil && r.End == session.Living && m.placed() {
		m.take(key)
	}
	return r
}

// search asks the members that may have a session for it. complete says that it
// has been found, or that nobody has it.
func (m *Manager) search(ctx context.Context, key session.Key, ready bool) (complete bool, err error) {
	limit := m.cfg.FetchTimeout
	if ready {
		limit = min(limit, m.cfg.FaultGrace)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	g := m.group.Load()
	if !m.placed() {
		complete, err = m.fetch(ctx, g.members, key, ready)
		return complete || ready && len(g.members) == 0, err
	}
	var few [maxCopies + 1]uint64
	var first []channel.Member
	asked := map[uint64]bool{g.self: true}
	for _, node := range g.ring(key.Digest(), m.cfg.Copies+1, few[:0]) {
		if member, ok := g.reach(node); ok {
			first = append(first, member)
			asked[node] = true
		}
	}
	complete, err = m.fetch(ctx, first, key, ready)
	if err != nil || m.store.has(key) {
		return complete, err
	}
	if ready && !g.unknown && time.Since(g.made) > shakyFor {
		return complete || len(first) == 0, nil
	}
	var rest []channel.Member
	for _, member := range g.members {
		if !asked[nodeOf(member)] {
			rest = append(rest, member)
		}
	}
	if len(rest) == 0 {
		return complete || ready && len(first) == 0, nil
	}
	others, err := m.fetch(ctx, rest, key, ready)
	return others && (complete || len(first) == 0), err
}

// fetch asks members for one session, and merges what they have. complete says
// that a member has it, or that all have answered and one of them, or this node,
// has complete state.
func (m *Manager) fetch(ctx context.Context, to []channel.Member, key session.Key, ready bool) (complete bool, err error) {
	f := &fetch{answers: make(chan bool, len(to))}
	id := rand.Uint64()
	m.mu.Lock()
	m.fetches[id] = f
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.fetches, id)
		m.mu.Unlock()
	}()
	body := append(appendHeader(nil, kindFetch, id), flagTake)
	body = session.AppendBatch(body, &session.Record{Key: key})
	failed := make(chan int, 1)
	if len(to) == 0 || !m.spawn(func() {
		n := 0
		if se, ok := errors.AsType[*channel.SendError](m.host.Send(ctx, to, channel.SendAck, body)); ok {
			n = len(se.Faults)
		}
		failed <- n
	}) {
		return false, nil
	}
	for waiting := len(to); waiting > 0; {
		select {
		case theirs := <-f.answers:
			waiting--
			ready = ready || theirs
			if !m.placed() && m.store.has(key) {
				return true, nil
			}
		case n := <-failed:
			if n > 0 {
				return m.store.has(key), nil
			}
		case <-ctx.Done():
			return m.store.has(key), nil
		case <-m.ctx.Done():
			return false, errStopped
		}
	}
	return ready || m.store.has(key), nil
}

// has reports whether a load would find something to say about the key.
func (s *store) has(k session.Key) bool {
	sh := s.shard(k)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	p := sh.replicas[k]
	_, over := sh.tombs[k]
	return over || p != nil && p.Whole()
}

// serveFetch answers with what is known of the keys.
func (m *Manager) serveFetch(from channel.Member, id uint64, flags byte, keys []session.Key) {
	body := append(appendHeader(nil, kindFound, id), m.readyFlag(m.isReady()))
	body, keys = m.appendItems(body, keys, m.cfg.ChunkBytes, nodeOf(from), flags&flagTake != 0)
	if !m.reply(from, body) || len(keys) == 0 {
		return
	}
	w := m.newWindow(m.ctx, from)
	w.records(keys, kindDelta, 0)
	if err := w.end(); err != nil {
		m.log.Debug("could not send sessions that a member asked for", zap.Stringer("member", from), zap.Error(err))
	}
}

func (m *Manager) gotFound(from channel.Member, id uint64, b []byte) error {
	flags, rest, err := parseFlags(b)
	if err != nil {
		return err
	}
	if _, err := m.apply(rest, &from); err != nil {
		return err
	}
	m.mu.Lock()
	f := m.fetches[id]
	m.mu.Unlock()
	if f != nil {
		select {
		case f.answers <- flags&flagReady != 0:
		default:
		}
	}
	return nil
}

// askForRest asks a member for sessions of which it sent only changes. While
// the state transfer is going on they come with it.
func (m *Manager) askForRest(from channel.Member, keys []session.Key) {
	if !m.isReady() {
		return
	}
	keys = keys[:min(len(keys), maxFetch)]
	body := append(appendHeader(nil, kindFetch, 0), 0)
	for _, k := range keys {
		body = session.AppendBatch(body, &session.Record{Key: k})
	}
	m.m.repairs.Add(int64(len(keys)))
	_ = m.enqueue(func() { m.reply(from, body) }) // if too busy: with the next change
}

// appendItems appends what is known of the first keys to dst until it has limit
// bytes, and returns the keys that are left. The node to is noted as one that has
// the sessions, and uses them if it takes them.
func (m *Manager) appendItems(dst []byte, keys []session.Key, limit int, to uint64, take bool) ([]byte, []session.Key) {
	g := m.group.Load()
	for len(keys) > 0 && len(dst) < limit {
		k := keys[0]
		keys = keys[1:]
		sh := m.store.shard(k)
		sh.mu.Lock()
		p := sh.replicas[k]
		t, over := sh.tombs[k]
		switch {
		case over:
			if m.placed() {
				dst = appendPlace(dst, &place{}, g.self, false)
			}
			dst = session.AppendBatch(dst, t.record(k))
		case p != nil:
			if m.placed() {
				if p.place == nil {
					p.place = &place{}
				}
				p.place.fresh(to)
				if take {
					p.place.set(holder{node: to, live: true})
				}
				dst = appendPlace(dst, p.place, g.self, p.held)
			}
			dst = p.AppendTo(dst, k)
		}
		sh.mu.Unlock()
	}
	return dst, keys
}
