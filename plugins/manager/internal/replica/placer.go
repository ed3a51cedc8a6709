package replica

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// settlePause gathers sessions whose copies have to be looked at.
	settlePause = 200 * time.Millisecond
	// rescan is how soon all sessions are looked at again if something was left
	// to do.
	rescan = 5 * time.Second
	// promoteTurns is after how many looks a node makes itself the owner of an
	// orphan for which another node should have done so.
	promoteTurns = 2
	// maxSettle bounds the sessions that wait to be looked at one by one; if
	// there are more, all are.
	maxSettle = 100_000
)

// settle has the copies of sessions looked at soon.
func (m *Manager) settle(keys []session.Key) {
	if len(keys) == 0 || !m.placed() {
		return
	}
	m.placing.Lock()
	for _, k := range keys {
		if len(m.unsettled) >= maxSettle {
			m.scanAt = time.Now()
			break
		}
		m.unsettled[k] = struct{}{}
	}
	m.placing.Unlock()
	m.kickPlacer()
}

// replan has all sessions looked at: the owners at once if members have left, and
// the copies after RecreateAfter.
func (m *Manager) replan(left bool) {
	if !m.placed() {
		return
	}
	m.placing.Lock()
	if m.scanAt.IsZero() { // further changes do not put it off
		m.scanAt = time.Now().Add(m.cfg.RecreateAfter)
	}
	m.promote = m.promote || left
	m.placing.Unlock()
	m.kickPlacer()
}

func (m *Manager) kickPlacer() {
	select {
	case m.placeKick <- struct{}{}:
	default:
	}
}

// placer is the goroutine that sees to it that every session has an owner and its
// copies.
func (m *Manager) placer() {
	orphans := 0 // looks in a row that found some
	for {
		m.placing.Lock()
		now := time.Now()
		wait := time.Hour
		scan := !m.scanAt.IsZero() && !now.Before(m.scanAt)
		if !m.scanAt.IsZero() && !scan {
			wait = m.scanAt.Sub(now)
		}
		promote := m.promote
		m.promote = false
		var keys []session.Key
		if len(m.unsettled) > 0 {
			keys = make([]session.Key, 0, len(m.unsettled))
			for k := range m.unsettled {
				keys = append(keys, k)
			}
			clear(m.unsettled)
		}
		if scan {
			m.scanAt = time.Time{}
		}
		m.placing.Unlock()
		left := false
		switch {
		case scan:
			found := false
			if found, left = m.scan(orphans >= promoteTurns, true, keys); found {
				orphans++
			} else {
				orphans = 0
			}
			left = left || found
		case promote:
			if found, _ := m.scan(false, false, nil); found {
				orphans = max(orphans, 1)
			}
			left = !m.place(keys)
		case len(keys) > 0:
			left = !m.place(keys)
		}
		if left {
			m.placing.Lock()
			if next := time.Now().Add(rescan); m.scanAt.IsZero() || next.Before(m.scanAt) {
				m.scanAt = next
			}
			m.placing.Unlock()
			wait = min(wait, rescan)
		}
		if scan || promote || len(keys) > 0 {
			wait = min(wait, settlePause)
		}
		timer := time.NewTimer(wait)
		select {
		case <-m.placeKick:
			timer.Stop()
			timer = time.NewTimer(settlePause) // more may come
			select {
			case <-timer.C:
			case <-m.ctx.Done():
			}
		case <-timer.C:
		case <-m.ctx.Done():
		}
		timer.Stop()
		if m.ctx.Err() != nil {
			return
		}
	}
}

// plan collects what has to be sent so that sessions are where they should be.
type plan struct {
	copies map[uint64][]session.Key // nodes that lack a copy
	drops  map[uint64][]byte        // nodes that need not keep theirs
	w      *work                    // announcements
}

// scan looks at all sessions. orphans says that some owners are gone for whom
// another node should take over; force takes over from that one too. Without
// full only that is looked at.
func (m *Manager) scan(force, full bool, keys []session.Key) (orphans, left bool) {
	pl := m.newPlan()
	for i := range m.store.shards {
		sh := &m.store.shards[i]
		sh.mu.Lock()
		for k, p := range sh.replicas {
			if p.place == nil {
				p.place = &place{}
			}
			if m.look(pl, k, p, force, full) {
				orphans = true
			}
		}
		sh.mu.Unlock()
	}
	return orphans, !m.carryOut(pl)
}

// place looks at some sessions; false if something is left to do.
func (m *Manager) place(keys []session.Key) bool {
	if len(keys) == 0 {
		return true
	}
	pl := m.newPlan()
	for _, k := range keys {
		sh := m.store.shard(k)
		sh.mu.Lock()
		if p := sh.replicas[k]; p != nil && p.place != nil {
			m.look(pl, k, p, false, true)
		}
		sh.mu.Unlock()
	}
	return m.carryOut(pl)
}

func (m *Manager) newPlan() *plan {
	return &plan{copies: map[uint64][]session.Key{}, drops: map[uint64][]byte{}, w: m.newWork(0)}
}

// look decides what is to be done for a session. It reports whether its owner is
// gone and another node should take over. The shard is locked.
func (m *Manager) look(pl *plan, k session.Key, p *replica, force, full bool) (orphan bool) {
	g := pl.w.g
	p.place.where = slices.DeleteFunc(p.place.where, func(h holder) bool { return !g.has(h.node) })
	digest := k.Digest()
	now := p.place.owner.node
	if now != g.self && !g.has(now) {
		if !force && !p.held && m.heir(g, digest, p) != g.self {
			return true
		}
		m.claim(p, g.self)
		m.m.promoted.Inc()
		for _, h := range p.place.where {
			pl.w.tell(h.node, k, p)
		}
	}
	if !full {
		return false
	}
	var few [maxCopies + 1]uint64
	if p.place.owner.node != g.self {
		// The owner may not know that this is here, or not need it.
		if !slices.Contains(g.copies(digest, p.place.owner.node, m.cfg.Copies, few[:0]), g.self) {
			pl.w.tell(p.place.owner.node, k, p)
		}
		return false
	}
	want := g.copies(digest, g.self, m.cfg.Copies, few[:0])
	complete := true
	for _, node := range want {
		if !p.place.has(node) && p.Whole() {
			pl.copies[node] = append(pl.copies[node], k)
			complete = false
		}
	}
	for _, h := range p.place.where {
		if h.stale && p.Whole() && (h.live || slices.Contains(want, h.node)) {
			pl.copies[h.node] = append(pl.copies[h.node], k)
			complete = false
		}
	}
	if !complete {
		return false
	}
	for _, h := range p.place.where {
		if _, ok := g.reach(h.node); ok && !h.live && !slices.Contains(want, h.node) {
			b := pl.drops[h.node]
			if b == nil {
				b = appendHeader(nil, kindDrop, 0)
			}
			b = binary.BigEndian.AppendUint64(b, p.Digest())
			pl.drops[h.node] = session.AppendBatch(b, &session.Record{Key: k})
		}
	}
	return false
}

// heir is who takes over a session whose owner is gone: the first of its ranking
// that has it. The shard is locked.
func (m *Manager) heir(g *group, digest uint64, p *replica) uint64 {
	best, bestScore := uint64(0), uint64(0)
	for _, r := range g.ranked {
		if r.node != g.self && !p.place.has(r.node) {
			continue
		}
		if score := mix(digest ^ r.hash); best == 0 || score > bestScore {
			best, bestScore = r.node, score
		}
	}
	return best
}

// carryOut sends what a plan says; false if something did not arrive.
func (m *Manager) carryOut(pl *plan) bool {
	m.sendPlaces(pl.w.places)
	done := true
	g := pl.w.g
	for node, keys := range pl.copies {
		to, ok := g.reach(node)
		if !ok {
			done = false
			continue
		}
		w := m.newWindow(m.ctx, to)
		w.records(keys, kindRecords, 0)
		if err := w.end(); err != nil {
			m.log.Debug("could not make copies of sessions on a member", zap.Stringer("member", to), zap.Error(err))
			m.forgetCopies(node, keys)
			done = false
			continue
		}
		m.m.copied.Add(int64(len(keys)))
		m.settle(keys) // surplus copies may go now
	}
	for node, b := range pl.drops {
		if to, ok := g.reach(node); ok && !m.reply(to, b) {
			done = false
		}
	}
	return done
}

// forgetCopies notes that copies did not arrive.
func (m *Manager) forgetCopies(node uint64, keys []session.Key) {
	for _, k := range keys {
		sh := m.store.shard(k)
		sh.mu.Lock()
		if p := sh.replicas[k]; p != nil && p.place != nil {
			if i := p.place.find(node); i >= 0 && !p.place.where[i].live {
				p.place.remove(node)
			}
		}
		sh.mu.Unlock()
	}
}

// gotDrop forgets sessions that the owner says are kept elsewhere, if they are
// the same here and nobody uses them.
func (m *Manager) gotDrop(from channel.Member, b []byte) error {
	g := m.group.Load()
	node := nodeOf(from)
	w := m.newWork(0)
	gone := map[uint64][]session.Key{}
	var yield []yielded
	var d session.Decoder
	for len(b) > 0 {
		if len(b) < 9 {
			return fmt.Errorf("%w: cut off", errMalformed)
		}
		digest := binary.BigEndian.Uint64(b)
		d.Reset(b[8:])
		if !d.Next() {
			return fmt.Errorf("%w: %w", errMalformed, d.Err())
		}
		b = b[8+len(d.Raw()):]
		k := d.Record().Key
		sh := m.store.shard(k)
		sh.mu.Lock()
		switch p := sh.replicas[k]; {
		case p == nil || p.place == nil:
			gone[node] = append(gone[node], k)
		case m.inUse(k, p) || p.place.owner.node == g.self:
			w.tell(node, k, p)
		case p.Digest() != digest:
			if g.has(node) { // it may lack something
				w.whole(node, k, p)
				yield = append(yield, yielded{k, p.Digest()})
			}
		default:
			m.drop(sh, k, p, node, gone)
		}
		sh.mu.Unlock()
	}
	for to, keys := range gone {
		m.sendGone(to, keys)
	}
	m.sendPlaces(w.places)
	if len(yield) > 0 {
		_ = m.enqueue(func() { m.yield(node, w, yield) })
	}
	return nil
}

// inUse reports whether the host uses a session, or is just about to.
func (m *Manager) inUse(k session.Key, p *replica) bool {
	_, loading := m.loading.Load(k)
	return p.held || loading
}

// drop forgets a session and notes who is to be told. The shard is locked.
func (m *Manager) drop(sh *shard, k session.Key, p *replica, owner uint64, gone map[uint64][]session.Key) {
	for _, h := range p.place.where {
		gone[h.node] = append(gone[h.node], k)
	}
	if !p.place.has(owner) {
		gone[owner] = append(gone[owner], k)
	}
	m.store.remove(sh, k, p)
	m.m.dropped.Inc()
}

// yielded is a session whose owner may lack something that is known here.
type yielded struct {
	key    session.Key
	digest uint64
}

// yield gives an owner what it may lack, and forgets the sessions after that.
func (m *Manager) yield(node uint64, w *work, list []yielded) {
	ps := w.parcels()
	if _, ok := w.g.reach(node); !ok {
		return
	}
	if faults := m.deliver(m.ctx, ps, core.Synced); len(faults) > 0 {
		m.note(faults)
		return
	}
	gone := map[uint64][]session.Key{}
	for _, y := range list {
		sh := m.store.shard(y.key)
		sh.mu.Lock()
		if p := sh.replicas[y.key]; p != nil && p.place != nil && !m.inUse(y.key, p) && p.place.owner.node == node && p.Digest() == y.digest {
			m.drop(sh, y.key, p, node, gone)
		}
		sh.mu.Unlock()
	}
	for to, keys := range gone {
		m.sendGone(to, keys)
	}
}

// releasePlaced is Release if sessions have a place: it refuses if one has no
// copy.
func (m *Manager) releasePlaced(keys []session.Key) error {
	w := m.newWork(0)
	var lone []session.Key
	for _, k := range keys {
		sh := m.store.shard(k)
		sh.mu.Lock()
		if p := sh.replicas[k]; p != nil && !m.hasCopy(w.g, p) {
			lone = append(lone, k)
		}
		sh.mu.Unlock()
	}
	if len(lone) > 0 {
		m.settle(lone)
		return fmt.Errorf("%w: %d of %d sessions", errAlone, len(lone), len(keys))
	}
	for _, k := range keys {
		sh := m.store.shard(k)
		sh.mu.Lock()
		if p := sh.replicas[k]; p != nil && p.held {
			p.held = false
			if p.place != nil {
				for _, h := range p.place.where {
					w.tell(h.node, k, p)
				}
			}
		}
		sh.mu.Unlock()
	}
	m.sendPlaces(w.places)
	return nil
}

// hasCopy reports whether another member that answers has the session. The shard
// is locked.
func (m *Manager) hasCopy(g *group, p *replica) bool {
	if p.place == nil {
		return false
	}
	for _, h := range p.place.where {
		if _, ok := g.reach(h.node); ok {
			return true
		}
	}
	return false
}

// take makes this node the owner of a session that its host has loaded, and says
// so to the others that have it.
func (m *Manager) take(k session.Key) {
	w := m.newWork(0)
	sh := m.store.shard(k)
	sh.mu.Lock()
	if p := sh.replicas[k]; p != nil && p.held {
		if p.place == nil {
			p.place = &place{}
		}
		before, moved := m.claim(p, w.g.self)
		for _, h := range p.place.where {
			w.tell(h.node, k, p)
		}
		if moved {
			if !p.place.has(before.node) {
				w.tell(before.node, k, p)
			}
			m.m.moved.Inc()
		}
	}
	sh.mu.Unlock()
	m.sendPlaces(w.places)
	m.settle([]session.Key{k})
}
