package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// errPartial refuses a change of a session that this node does not have as a
// whole, when somebody waits for a copy.
var errPartial = errors.New("only changes of the session are known")

// commitRounds bounds how often the nodes of a batch are chosen anew because
// members have gone meanwhile.
const commitRounds = 4

// work collects what follows from a batch.
type work struct {
	m       *Manager
	g       *group
	now     int64
	report  []byte        // for the host
	ask     []session.Key // the sender has the rest of them
	gone    []session.Key // the sender believes that they are here
	changes map[uint64][]byte
	places  map[uint64][]byte
	settle  []session.Key
	routes  []route // of a commit
	flags   byte    // of the changes
	added   int
	refused int
	partial int
}

// route says to which nodes a record of a commit went.
type route struct {
	key   session.Key
	nodes []uint64
}

func (m *Manager) newWork(flags byte) *work {
	return &work{m: m, g: m.group.Load(), now: time.Now().UnixMilli(), flags: flags}
}

// change begins or goes on with the changes for a node.
func (w *work) change(node uint64) []byte {
	if w.changes == nil {
		w.changes = map[uint64][]byte{}
	}
	b := w.changes[node]
	if b == nil {
		b = append(appendHeader(make([]byte, 0, 1024), kindDelta, 0), w.flags)
	}
	return b
}

// tell says to a node where a session is. The shard is locked.
func (w *work) tell(node uint64, k session.Key, p *replica) {
	if node == w.g.self || !w.g.has(node) {
		return
	}
	if w.places == nil {
		w.places = map[uint64][]byte{}
	}
	b := w.places[node]
	if b == nil {
		b = appendHeader(make([]byte, 0, 256), kindPlace, 0)
	}
	b = appendPlace(b, p.place, w.g.self, p.held)
	w.places[node] = session.AppendBatch(b, &session.Record{Key: k})
}

// whole sends all of a session to a node. The shard is locked.
func (w *work) whole(node uint64, k session.Key, p *replica) {
	b := p.AppendTo(appendPlace(w.change(node), p.place, w.g.self, p.held), k)
	w.changes[node] = b
}

// raw passes a record on to a node as it came. The shard is locked.
func (w *work) raw(node uint64, pl *place, live bool, raw []byte) {
	b := append(appendPlace(w.change(node), pl, w.g.self, live), raw...)
	w.changes[node] = b
}

// end passes a tombstone on to all of where.
func (w *work) end(where []holder, raw []byte) (nodes []uint64) {
	pl := place{where: where}
	for _, h := range where {
		if _, ok := w.g.reach(h.node); ok {
			w.raw(h.node, &pl, false, raw)
			nodes = append(nodes, h.node)
		}
	}
	return nodes
}

func (w *work) parcels() (ps []parcel) {
	for node, b := range w.changes {
		if to, ok := w.g.reach(node); ok {
			ps = append(ps, parcel{to, b})
		}
	}
	return ps
}

// claim makes this node the owner of a session. The shard is locked.
func (m *Manager) claim(p *replica, self uint64) (before owner, moved bool) {
	before = p.place.owner
	if before.node == self {
		return before, false
	}
	m.own(p, owner{before.epoch + 1, self}, self)
	return before, before != owner{}
}

// own sets the owner of a session. The shard is locked.
func (m *Manager) own(p *replica, o owner, self uint64) {
	if p.place.owner.node == self && p.place.owner.epoch > 0 {
		m.store.owned.Add(-1)
	}
	p.place.owner = o
	if o.node == self {
		m.store.owned.Add(1)
	}
}

// takePlaced takes a batch of the host, if sessions have a place; the returned
// work says what has to be sent.
func (m *Manager) takePlaced(host core.ManagerHost, batch []byte, level core.Level) (*work, error) {
	flags := flagSpread
	if level == core.Synced {
		flags |= flagStrict
	}
	w := m.newWork(flags)
	d := decoders.Get().(*session.Decoder)
	defer decoders.Put(d)
	d.Reset(batch)
	defer d.Reset(nil)
	for d.Next() {
		m.commitOne(w, d.Record(), d.Raw())
	}
	if len(w.report) > 0 {
		host.Update(w.report)
	}
	m.sendPlaces(w.places)
	m.settle(w.settle)
	if err := d.Err(); err != nil {
		m.m.malformed.Inc()
		return nil, fmt.Errorf("%s: batch of %d bytes: %w", m.name, len(batch), err)
	}
	if w.refused > 0 {
		return nil, fmt.Errorf("%s: %d new sessions refused, %d are held already: %w", m.name, w.refused, m.store.sessions.Load(), session.ErrFull)
	}
	return w, nil
}

// commitOne merges a record of the host and chooses where it goes.
func (m *Manager) commitOne(w *work, r *session.Record, raw []byte) {
	digest := r.Key.Digest()
	sh := &m.store.shards[shardOf(digest)]
	sh.mu.Lock()
	old := sh.replicas[r.Key]
	if r.End != session.Living {
		where := m.endWhere(w.g, digest, old)
		e := m.store.mergeEnd(sh, r, true, w.now)
		sh.mu.Unlock()
		w.routes = append(w.routes, route{r.Key, w.end(where, raw)})
		if e.cascade != nil {
			m.commitCascade(w, e.cascade)
		}
		return
	}
	defer sh.mu.Unlock()
	e := m.store.merge(sh, r, true, w.now)
	switch {
	case e.refused:
		w.refused++
		return
	case e.tell != nil:
		w.report = session.AppendBatch(w.report, e.tell)
	}
	p := sh.replicas[r.Key]
	if p == nil {
		return // it has ended
	}
	if p.place == nil {
		p.place = &place{}
	}
	if before, moved := m.claim(p, w.g.self); moved {
		w.tell(before.node, r.Key, p)
		w.settle = append(w.settle, r.Key)
	}
	w.routes = append(w.routes, route{r.Key, w.spread(digest, r.Key, p, raw, nil)})
}

// commitCascade ends what a session that has ended was renewed to.
func (m *Manager) commitCascade(w *work, next *session.Record) {
	raw := session.AppendBatch(nil, next)
	m.commitOne(w, next, raw)
	w.report = append(w.report, raw...)
}

// spread sends a change to all that have the session or should have it, except
// those in without, and returns them. The shard is locked.
func (w *work) spread(digest uint64, k session.Key, p *replica, raw []byte, without []uint64) (nodes []uint64) {
	var few [maxCopies + 1]uint64
	for _, node := range w.g.copies(digest, w.g.self, w.m.cfg.Copies, few[:0]) {
		if node == w.g.self || p.place.has(node) {
			continue
		}
		p.place.add(holder{node: node, stale: true})
	}
	for i := range p.place.where {
		h := &p.place.where[i]
		if slices.Contains(without, h.node) {
			continue
		}
		if _, ok := w.g.reach(h.node); !ok {
			continue
		}
		if raw == nil || h.stale {
			h.stale = false
			w.whole(h.node, k, p)
		} else {
			w.raw(h.node, p.place, p.held, raw)
		}
		nodes = append(nodes, h.node)
	}
	return nodes
}

// endWhere is where a tombstone goes: to all that have the session, and to all
// that somebody would ask for it. The shard is locked.
func (m *Manager) endWhere(g *group, digest uint64, p *replica) []holder {
	var pl place
	if p != nil && p.place != nil {
		pl.where = slices.Clone(p.place.where)
	}
	var few [maxCopies + 1]uint64
	for _, node := range g.ring(digest, m.cfg.Copies+1, few[:0]) {
		if node != g.self {
			pl.add(holder{node: node})
		}
	}
	return pl.where
}

// distribute sends the changes of a commit. If members go meanwhile, others are
// chosen in their place before a synchronous commit returns.
func (m *Manager) distribute(ctx context.Context, w *work, level core.Level) error {
	deadline := time.Now().Add(m.cfg.FaultGrace)
	for round := 0; ; round++ {
		ps := w.parcels()
		faults := m.deliver(ctx, ps, level)
		if len(faults) == 0 {
			return nil
		}
		if level == core.Async {
			if full := faults[0].Err; errors.Is(full, channel.ErrQueueFull) {
				return fmt.Errorf("%s: commit at level %s: %w", m.name, level, full)
			}
			m.note(faults)
			return nil
		}
		var missing []channel.Fault // they answer, but lack the rest of a session
		var others []channel.Fault
		bad := map[uint64]bool{}
		for _, f := range faults {
			bad[nodeOf(f.Member)] = true
			if errors.Is(f.Err, channel.ErrNegativeAck) && round == 0 {
				missing = append(missing, f)
			} else {
				others = append(others, f)
			}
		}
		if len(others) > 0 || len(missing) == 0 {
			m.note(others)
			if err := m.resolve(ctx, others, level, deadline); err != nil {
				return err
			}
		}
		if round == commitRounds {
			return fmt.Errorf("%s: commit at level %s: the members change too fast: %w", m.name, level, &channel.SendError{Faults: faults})
		}
		if w = m.again(w, bad); len(w.changes) == 0 {
			return nil
		}
	}
}

// again routes the sessions of a commit once more, as a whole, to the nodes that
// have not got them.
func (m *Manager) again(old *work, bad map[uint64]bool) *work {
	w := m.newWork(old.flags)
	for _, r := range old.routes {
		got := slices.DeleteFunc(slices.Clone(r.nodes), func(n uint64) bool { return bad[n] })
		digest := r.key.Digest()
		sh := &m.store.shards[shardOf(digest)]
		sh.mu.Lock()
		p := sh.replicas[r.key]
		t, over := sh.tombs[r.key]
		switch {
		case over:
			where := slices.DeleteFunc(m.endWhere(w.g, digest, nil), func(h holder) bool { return slices.Contains(got, h.node) })
			got = append(got, w.end(where, session.AppendBatch(nil, t.record(r.key)))...)
		case p != nil && p.place != nil:
			got = append(got, w.spread(digest, r.key, p, nil, got)...)
		}
		sh.mu.Unlock()
		w.routes = append(w.routes, route{r.key, got})
	}
	return w
}

// applyPlaced merges items of another member; see apply. strict refuses changes
// of sessions that are not here as a whole.
func (m *Manager) applyPlaced(b []byte, from channel.Member, flags byte) (*work, error) {
	w := m.newWork(flags & flagStrict)
	it := itemPool.Get().(*items)
	defer itemPool.Put(it)
	it.b, it.err = b, nil
	sender := nodeOf(from)
	for it.next() {
		m.applyOne(w, it.d.Record(), it.d.Raw(), &it.place, sender, flags&flagSpread != 0)
	}
	err := it.err
	it.b = nil
	it.d.Reset(nil)
	if len(w.report) > 0 {
		m.host.Update(w.report)
	}
	if len(w.ask) > 0 {
		m.askForRest(from, w.ask)
	}
	if len(w.gone) > 0 {
		m.sendGone(sender, w.gone)
	}
	m.sendPlaces(w.places)
	m.settle(w.settle)
	switch {
	case err != nil:
		if !errors.Is(err, errMalformed) { // which handle counts
			m.m.malformed.Inc()
		}
		return w, fmt.Errorf("%s: items of %d bytes: %w", m.name, len(b), err)
	case w.refused > 0:
		return w, fmt.Errorf("%s: %d new sessions refused, %d are held already: %w", m.name, w.refused, m.store.sessions.Load(), session.ErrFull)
	case w.partial > 0 && flags&flagStrict != 0:
		return w, fmt.Errorf("%s: %w", m.name, errPartial)
	}
	return w, nil
}

// applyOne merges one item of another member; spread says that all nodes that it
// lists get it too.
func (m *Manager) applyOne(w *work, r *session.Record, raw []byte, in *place, from uint64, spread bool) {
	digest := r.Key.Digest()
	sh := &m.store.shards[shardOf(digest)]
	sh.mu.Lock()
	old := sh.replicas[r.Key]
	t, over := sh.tombs[r.Key]
	if r.End != session.Living {
		where := m.endWhere(w.g, digest, old)
		e := m.store.mergeEnd(sh, r, false, w.now)
		sh.mu.Unlock()
		if e.report {
			w.report = append(w.report, raw...)
		}
		if !over && old != nil { // news: others may not know
			w.end(slices.DeleteFunc(where, func(h holder) bool { return h.node == from || in.has(h.node) }), raw)
		}
		if e.cascade != nil {
			m.commitCascade(w, e.cascade)
		}
		return
	}
	defer sh.mu.Unlock()
	if over {
		pl := place{}
		if w.g.has(from) {
			w.raw(from, &pl, false, session.AppendBatch(nil, t.record(r.Key)))
		}
		return
	}
	if old == nil && r.Created == 0 && !m.expects(w.g, digest, r.Key, in.owner.node) {
		w.gone = append(w.gone, r.Key)
		return
	}
	var pass []uint64
	var before uint64
	if old != nil && old.place != nil {
		pass = w.pass(old.place, in, from, spread)
		if len(pass) > 0 {
			before = old.Digest()
		}
	}
	e := m.store.merge(sh, r, false, w.now)
	if e.refused {
		w.refused++
		return
	}
	if e.added {
		w.added++
	}
	if e.report {
		w.report = append(w.report, raw...)
	}
	p := sh.replicas[r.Key]
	if !p.Whole() {
		w.partial++
	}
	if e.ask {
		w.ask = append(w.ask, r.Key)
	}
	m.mergePlace(w, r.Key, p, in, from)
	if len(pass) > 0 && spread {
		w.tell(from, r.Key, p) // who did not know them
	}
	if len(pass) > 0 && p.Digest() != before {
		for _, node := range pass {
			w.raw(node, p.place, p.held, raw)
		}
	}
}

// pass returns the nodes that a change has to be passed on to: those that have
// the session and do not get it from the sender.
func (w *work) pass(pl, in *place, from uint64, spread bool) (nodes []uint64) {
	for _, h := range pl.where {
		if h.node != from && !(spread && in.has(h.node)) {
			if _, ok := w.g.reach(h.node); ok {
				nodes = append(nodes, h.node)
			}
		}
	}
	return nodes
}

// expects reports whether changes of an unknown session concern this node. The
// shard is locked.
func (m *Manager) expects(g *group, digest uint64, k session.Key, owner uint64) bool {
	if _, loading := m.loading.Load(k); loading {
		return true
	}
	var few [maxCopies + 1]uint64
	return owner == g.self || slices.Contains(g.copies(digest, owner, m.cfg.Copies, few[:0]), g.self)
}

// mergePlace takes over what a member says of a session's place. The shard is
// locked.
func (m *Manager) mergePlace(w *work, k session.Key, p *replica, in *place, from uint64) {
	self := w.g.self
	if p.place == nil {
		p.place = &place{}
	}
	before, knowsMe := p.place.owner, false
	known := before != owner{} // else there is nothing that others could lack
	for _, h := range in.where {
		switch {
		case h.node == self:
			knowsMe = true
		case h.node == from && w.g.has(from):
			p.place.set(holder{node: from, live: h.live, stale: known})
		case w.g.has(h.node):
			p.place.add(holder{node: h.node, live: h.live, stale: known})
		}
	}
	if known && before.node == self && slices.ContainsFunc(p.place.where, func(h holder) bool { return h.stale }) {
		w.settle = append(w.settle, k)
	}
	if now := in.owner; !in.owner.less(before) && now.node != self && (now.node != from || !knowsMe) {
		w.tell(now.node, k, p) // it may not know that this node has the session
	}
	switch {
	case before.less(in.owner):
		m.own(p, in.owner, self)
		if before == (owner{}) {
			break
		}
		w.settle = append(w.settle, k)
		if before.node != from && before.node != in.owner.node {
			w.tell(before.node, k, p)
		}
		if before.node == self && !knowsMe {
			// Two owners that did not know each other, after a split.
			m.m.merged.Inc()
			for _, node := range []uint64{from, in.owner.node} {
				if _, ok := w.g.reach(node); ok && node != self {
					w.whole(node, k, p)
				}
				if from == in.owner.node {
					break
				}
			}
		}
	case in.owner.less(before):
		w.tell(from, k, p)
	}
}

// gotPlaces takes what a member says of places.
func (m *Manager) gotPlaces(from channel.Member, b []byte) error {
	w := m.newWork(0)
	it := itemPool.Get().(*items)
	defer itemPool.Put(it)
	it.b, it.err = b, nil
	sender := nodeOf(from)
	for it.next() {
		k := it.d.Record().Key
		sh := m.store.shard(k)
		sh.mu.Lock()
		p := sh.replicas[k]
		t, over := sh.tombs[k]
		switch {
		case p != nil:
			m.mergePlace(w, k, p, &it.place, sender)
			if p.place.owner.node == w.g.self {
				w.settle = append(w.settle, k)
			}
		case over:
			if w.g.has(sender) {
				w.raw(sender, &place{}, false, session.AppendBatch(nil, t.record(k)))
			}
		case it.place.has(w.g.self):
			w.gone = append(w.gone, k)
		}
		sh.mu.Unlock()
	}
	err := it.err
	it.b = nil
	it.d.Reset(nil)
	if len(w.gone) > 0 {
		m.sendGone(sender, w.gone)
	}
	m.sendPlaces(w.places)
	m.sendChanges(w)
	m.settle(w.settle)
	if err != nil {
		return fmt.Errorf("%w: %w", errMalformed, err)
	}
	return nil
}

// sendPlaces sends announcements, without waiting. What gets lost is found by an
// exchange.
func (m *Manager) sendPlaces(places map[uint64][]byte) {
	g := m.group.Load()
	for node, b := range places {
		if to, ok := g.reach(node); ok {
			_ = m.enqueue(func() { m.reply(to, b) })
		}
	}
}

// sendChanges passes changes on, without waiting.
func (m *Manager) sendChanges(w *work) {
	ps := w.parcels()
	if len(ps) == 0 {
		return
	}
	_ = m.enqueue(func() {
		if faults := m.deliver(m.ctx, ps, core.Acked); len(faults) > 0 {
			m.note(faults)
		}
	})
}

// passOn passes changes on and calls done when they have arrived, or when those
// that they did not reach have been noted.
func (m *Manager) passOn(w *work, done func(error)) {
	ps := w.parcels()
	if !m.spawn(func() {
		faults := m.deliver(m.ctx, ps, core.Synced)
		if len(faults) > 0 {
			m.log.Debug("a change was not passed on to all that use the session", zap.Int("members", len(faults)))
			m.note(faults)
		}
		done(nil)
	}) {
		done(errStopped)
	}
}

// sendGone says to a node, and to those in the list, that sessions are not here.
func (m *Manager) sendGone(node uint64, keys []session.Key) {
	to, ok := m.group.Load().reach(node)
	if !ok {
		return
	}
	b := appendHeader(nil, kindGone, 0)
	for _, k := range keys {
		b = session.AppendBatch(b, &session.Record{Key: k})
	}
	_ = m.enqueue(func() { m.reply(to, b) })
}

// gotGone notes that a member does not have sessions any more.
func (m *Manager) gotGone(from channel.Member, b []byte) error {
	node, self := nodeOf(from), m.group.Load().self
	var settle []session.Key
	err := session.DecodeBatch(b, func(r *session.Record) error {
		sh := m.store.shard(r.Key)
		sh.mu.Lock()
		defer sh.mu.Unlock()
		if p := sh.replicas[r.Key]; p != nil && p.place != nil {
			p.place.remove(node)
			if p.place.owner.node == self {
				settle = append(settle, r.Key)
			}
		}
		return nil
	})
	m.settle(settle)
	if err != nil {
		return fmt.Errorf("%w: %w", errMalformed, err)
	}
	return nil
}
