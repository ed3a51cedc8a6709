package channel

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"
)

// Member events climb the stack through boundaries. Boundary 0 lies above the
// coordinator, and one more above every layer that handles events or filters
// views; the last one is what the application sees. Every boundary keeps the
// members that have passed it, so that each layer sees a consistent stream
// (nobody is added twice, or lost without having been added) whatever the
// layers below it announce, and has a view of its own.
//
// One goroutine moves all events, first come, first served. Queueing never
// blocks, so that layers may announce from anywhere; only the membership is
// slowed down when it reports more than maxQueuedEvents changes ahead.
const maxQueuedEvents = 16384

// ErrReplaced is the reason of a MemberLost for a member whose address now
// belongs to a newer incarnation. No check can bring it back.
var ErrReplaced = errors.New("channel: replaced by a newer incarnation at the same address")

type queuedEvent struct {
	// seat is the layer that announces the event; nil for the coordinator.
	seat *seat
	// route, if set, is the only one that the event concerns, and boundary
	// where it passes next.
	route    *route
	boundary int
	ev       MemberEvent
	slot     bool                  // holds one of events.slots
	refresh  bool                  // no event: take over the alive times
	do       func(context.Context) // no event: to be run between events
	retried  bool
}

type events struct {
	c     *Channel
	slots chan struct{}
	wake  chan struct{}

	current atomic.Pointer[route] // changed by the event goroutine
	// pending is the route that a swap prepares: it takes part in everything,
	// but nothing it does is seen by the application, nor by layers that are
	// in the current route too. Event goroutine only.
	pending *route

	mu      sync.Mutex
	queue   []queuedEvent
	retries []queuedEvent // for the next tick
	closed  bool
}

// route is the way of events through one generation of the stack.
type route struct {
	c *Channel
	// stages[i] lies between boundary i and i+1.
	stages     []stage
	boundaries []*boundary // one more than stages
	// exits are the boundaries that the layers' own events pass next.
	exits map[*seat]int
	// dropped: it was pending, and the swap has failed.
	dropped atomic.Bool
}

// stage is one layer's part in the way of events: it either handles them or
// filters the view.
type stage struct {
	l      *link
	filter bool
}

// boundary keeps the members that have passed. Only the event goroutine
// changes it.
type boundary struct {
	current atomic.Pointer[View]
}

func newEvents(c *Channel, r *route) *events {
	e := &events{c: c, slots: make(chan struct{}, maxQueuedEvents), wake: make(chan struct{}, 1)}
	e.current.Store(r)
	return e
}

func newRoute(c *Channel, links []*link) *route {
	r := &route{c: c, exits: map[*seat]int{}}
	for _, l := range links {
		l.stage = len(r.stages)
		if l.member != nil {
			r.stages = append(r.stages, stage{l: l})
		}
		l.announce = len(r.stages)
		r.exits[l.seat] = l.announce
		if l.filter != nil {
			r.stages = append(r.stages, stage{l: l, filter: true})
		}
	}
	for range len(r.stages) + 1 {
		b := new(boundary)
		b.current.Store(&View{})
		r.boundaries = append(r.boundaries, b)
	}
	return r
}

func (r *route) view(boundary int) View {
	v := *r.boundaries[boundary].current.Load()
	v.Local = r.c.Local()
	return v
}

func (e *events) top() View {
	r := e.current.Load()
	return r.view(len(r.stages))
}

func (e *events) put(q queuedEvent) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return ErrClosed
	}
	e.queue = append(e.queue, q)
	e.mu.Unlock()
	select {
	case e.wake <- struct{}{}:
	default:
	}
	return nil
}

// run is the event goroutine; it ends with ctx.
func (e *events) run(ctx context.Context) {
	var batch []queuedEvent
	for {
		e.mu.Lock()
		batch, e.queue = e.queue, batch[:0]
		e.mu.Unlock()
		for i, q := range batch {
			if ctx.Err() != nil {
				return
			}
			e.handle(ctx, q)
			if q.slot {
				<-e.slots
			}
			batch[i] = queuedEvent{}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-e.wake:
		case <-ctx.Done():
			return
		}
	}
}

// close refuses further events.
func (e *events) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed, e.queue, e.retries = true, nil, nil
}

func (e *events) handle(ctx context.Context, q queuedEvent) {
	now := e.current.Load()
	if e.pending != nil && e.pending.dropped.Load() {
		e.pending = nil
	}
	switch {
	case q.do != nil:
		q.do(ctx)
	case q.refresh:
		now.refreshAlive()
		if e.pending != nil {
			e.pending.refreshAlive()
		}
	case q.route != nil:
		if q.route == now || q.route == e.pending {
			q.route.handle(ctx, q)
		}
	default:
		q.seat.note(q.ev)
		for _, r := range []*route{now, e.pending} {
			if r == nil {
				continue
			}
			exit, has := r.exits[q.seat]
			if q.seat == nil || has { // a layer that has gone has no say
				own := q
				own.route, own.boundary = r, exit
				r.handle(ctx, own)
			}
		}
	}
}

// note keeps what a layer without MemberHandler has announced.
func (s *seat) note(ev MemberEvent) {
	if s == nil || s.now.Load().member != nil {
		return
	}
	switch ev.Kind {
	case MemberAdded, MemberUpdated:
		if s.own == nil {
			s.own = map[UniqueID]Member{}
		}
		if _, known := s.own[ev.Member.ID]; known || len(s.own) < maxMembers {
			s.own[ev.Member.ID] = ev.Member
		}
	case MemberLost, MemberLeft:
		delete(s.own, ev.Member.ID)
	}
}

func (r *route) live() bool { return r.c.events.current.Load() == r }

func (r *route) handle(ctx context.Context, q queuedEvent) {
	if q.retried {
		if r.current(q) {
			r.forward(ctx, q)
		}
		return
	}
	b, top := r.boundaries[q.boundary], q.boundary == len(r.stages)
	if q.ev.Kind == MemberAdded || q.ev.Kind == MemberUpdated {
		for _, old := range b.displacedBy(q.ev.Member) {
			gone, _ := b.apply(MemberEvent{Kind: MemberLost, Member: old, Err: ErrReplaced}, top)
			r.forward(ctx, queuedEvent{boundary: q.boundary, ev: gone})
		}
	}
	var pass bool
	if q.ev, pass = b.apply(q.ev, top); pass {
		r.forward(ctx, q)
	}
}

// forward hands an event that has passed a boundary to who stands above it.
func (r *route) forward(ctx context.Context, q queuedEvent) {
	ev := q.ev
	if q.boundary == len(r.stages) {
		if !r.live() {
			return
		}
		r.c.switched(r.view(q.boundary), ev)
		if next := r.c.events.pending; next != nil && ev.Final() && !r.boundaries[0].current.Load().Has(ev.Member) {
			// It may have left below before the swap began, and be kept there.
			next.handle(ctx, queuedEvent{ev: ev})
		}
		return
	}
	s := r.stages[q.boundary]
	if s.filter {
		r.filter(ctx, q.boundary, s.l, ev)
		return
	}
	if s.l.seat.now.Load() != s.l {
		return // it still works in the current route
	}
	err := s.l.handleMember(ctx, ev)
	switch {
	case err == nil:
	case errors.Is(err, ErrPanic) && !q.retried:
		// The layer has not finished its work: it gets one more chance, so that
		// one bad moment does not leave the views different for ever.
		r.c.events.retry(queuedEvent{route: r, boundary: q.boundary, ev: ev, retried: true})
	default:
		r.c.log.Warn("a layer failed to handle a member event",
			zap.String("layer", s.l.desc.Name), zap.Stringer("event", ev.Kind), zap.Stringer("member", ev.Member), zap.Error(err))
	}
}

func (e *events) retry(q queuedEvent) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retries = append(e.retries, q)
}

// current reports whether a postponed event still says what the boundary
// knows.
func (r *route) current(q queuedEvent) bool {
	has := r.boundaries[q.boundary].current.Load().Has(q.ev.Member)
	switch q.ev.Kind {
	case MemberLost, MemberLeft:
		return !has
	}
	return has
}

// filter brings the boundary above a ViewFilter in line with the filtered view.
func (r *route) filter(ctx context.Context, n int, l *link, ev MemberEvent) {
	below, above := r.view(n), r.boundaries[n+1].current.Load()
	shown, err := l.filterView(below)
	if err != nil {
		return // logged; the layers above keep what they have
	}
	// At once and not through the queue: the next event must find what this one
	// has changed.
	push := func(ev MemberEvent) { r.handle(ctx, queuedEvent{boundary: n + 1, ev: ev}) }
	if ev.Kind == MemberSuspected {
		if shown.Has(ev.Member) {
			push(ev)
		}
		return
	}
	for _, m := range above.Members {
		if !shown.Has(m) {
			gone := MemberEvent{Kind: MemberLost, Member: m}
			if m.Is(ev.Member) {
				gone = ev
				if ev.Kind != MemberLeft {
					gone.Kind = MemberLost
				}
			}
			push(gone)
		}
	}
	for _, m := range shown.Members {
		if old, ok := above.Get(m.ID); !ok {
			push(MemberEvent{Kind: MemberAdded, Member: m})
		} else if !sameRecord(old, m) {
			push(MemberEvent{Kind: MemberUpdated, Member: m})
		}
	}
}

// tick queues what waits for a tick; aliveChanged says that alive times did.
func (e *events) tick(aliveChanged bool) {
	e.mu.Lock()
	again := e.retries
	e.retries = nil
	e.mu.Unlock()
	for _, q := range again {
		e.put(q)
	}
	if aliveChanged {
		e.put(queuedEvent{refresh: true})
	}
}

// refreshAlive takes over the latest alive times and sorts anew. The versions
// stay: who is there has not changed.
func (r *route) refreshAlive() {
	alive := r.c.coord.aliveTimes()
	for _, b := range r.boundaries {
		old := b.current.Load()
		if len(old.Members) == 0 {
			continue
		}
		members := slices.Clone(old.Members)
		for i := range members {
			if a, ok := alive[members[i].ID]; ok {
				members[i].Alive = a
			}
		}
		v := NewView(old.Version, old.Local, members)
		b.current.Store(&v)
	}
}

// sameRecord reports whether two records differ in nothing but the alive time.
func sameRecord(a, b Member) bool {
	a.Alive, b.Alive = 0, 0
	return a == b
}

// displacedBy returns the members that cannot be there any more when m is:
// those with its address.
func (b *boundary) displacedBy(m Member) (old []Member) {
	for _, o := range b.current.Load().Members {
		if !o.Is(m) && o.Port == m.Port && o.Host == m.Host {
			old = append(old, o)
		}
	}
	return old
}

// apply changes the boundary's members by an event. It returns the event as
// those above should see it, and whether they should. Suspicions and final
// departures also pass where the member is unknown, unless this is the top:
// a layer above may hold a member that is gone here.
func (b *boundary) apply(ev MemberEvent, top bool) (MemberEvent, bool) {
	v := b.current.Load()
	i := slices.IndexFunc(v.Members, ev.Member.Is)
	switch ev.Kind {
	case MemberAdded, MemberUpdated:
		switch {
		case i < 0:
			ev.Kind = MemberAdded
		case sameRecord(v.Members[i], ev.Member):
			return ev, false
		default:
			ev.Kind = MemberUpdated
		}
	case MemberLost, MemberLeft:
		if i < 0 {
			return ev, !top && ev.Final()
		}
	case MemberSuspected:
		return ev, i >= 0 || !top
	default:
		return ev, false
	}
	members := make([]Member, 0, len(v.Members)+1)
	members = append(members, v.Members...)
	if i >= 0 {
		members = slices.Delete(members, i, i+1)
	}
	if ev.Kind == MemberAdded || ev.Kind == MemberUpdated {
		at, _ := slices.BinarySearchFunc(members, ev.Member, func(a, b Member) int {
			if Older(a, b) {
				return -1
			}
			return 1
		})
		members = slices.Insert(members, at, ev.Member)
	}
	next := View{Version: v.Version + 1, Local: v.Local, Members: members}
	b.current.Store(&next)
	return ev, true
}

// watchers tell the application of view changes.
type watchers struct {
	mu   sync.Mutex
	list []*watcher
}

// watcher calls one function, one change at a time and in order, from whatever
// goroutine finds nobody else at it.
type watcher struct {
	call func(View, MemberEvent)

	mu      sync.Mutex
	since   uint64 // the version of the first view: older changes are in it
	queue   []change
	busy    bool
	removed bool
}

type change struct {
	v  View
	ev MemberEvent
}

// add registers w with the current view as its first change.
func (ws *watchers) add(w *watcher, current func() View) {
	ws.mu.Lock()
	v := current()
	w.since = v.Version
	w.queue = append(w.queue, change{v: v})
	ws.list = append(slices.Clone(ws.list), w)
	ws.mu.Unlock()
	w.drain()
}

func (ws *watchers) remove(w *watcher) {
	w.mu.Lock()
	w.removed, w.queue = true, nil
	w.mu.Unlock()
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.list = slices.DeleteFunc(slices.Clone(ws.list), func(x *watcher) bool { return x == w })
}

// notify queues a change for all watchers and runs them.
func (ws *watchers) notify(ch change) {
	ws.mu.Lock()
	list := ws.list
	for _, w := range list {
		w.mu.Lock()
		if !w.removed && ch.v.Version > w.since {
			w.queue = append(w.queue, ch)
		}
		w.mu.Unlock()
	}
	ws.mu.Unlock()
	for _, w := range list {
		w.drain()
	}
}

func (w *watcher) drain() {
	for {
		w.mu.Lock()
		if w.busy || len(w.queue) == 0 {
			w.mu.Unlock()
			return
		}
		next := w.queue[0]
		w.queue = w.queue[1:]
		w.busy = true
		w.mu.Unlock()
		w.call(next.v, next.ev)
		w.mu.Lock()
		w.busy = false
		w.mu.Unlock()
	}
}
