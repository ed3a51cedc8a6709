package channel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

const (
	// swapReplay bounds the wait for new layers to pass on the members they
	// were told of.
	swapReplay = 250 * time.Millisecond
	// swapPoll is how often it is looked whether they have.
	swapPoll = time.Millisecond
	// swapHold bounds how long messages of the new layers wait for earlier
	// ones that the old layers still hold.
	swapHold = time.Second
	// swapDrain bounds the wait for messages inside the old layers.
	swapDrain = 30 * time.Second
	// swapLeave is how long it goes on when the channel is to stop.
	swapLeave = swapHold / 4
	// staleLinks bounds the earlier positions of a layer that are kept in
	// working order.
	staleLinks = 4
)

// Flusher is implemented by layers that go on with messages after their
// handler has returned: queues, windows. A layer that is taken out of a running
// stack is flushed before it is stopped, so that what it holds keeps its place
// before the messages that take the new way. Flush returns when everything that
// the layer held when Flush was called has been passed on or has failed, or
// when ctx ends. Handlers may be called at the same time.
type Flusher interface {
	Flush(ctx context.Context) error
}

// Swap replaces the channel's layers while messages go on: layers may be
// added, removed, put into another order, or replaced by another version. An
// error means that nothing has changed.
//
// A layer whose Interceptor value is in both stacks is carried over: it is not
// stopped, keeps its state, and from then on works at its new place. All others
// of next are started first, bottom first, and told of the present members by
// MemberAdded. Then the channel switches: messages that begin from then on take
// the new way; those that are inside the old layers go on there. No message is
// lost, none is delivered twice, and nobody waits for calls inside the old
// layers: nothing is paused. Only messages that could overtake earlier ones in a layer that is
// removed and is a [Flusher] wait for its Flush, for a second at most; if the
// layer provides PropAsync, only those with the option Async.
//
// Where a Flusher is carried over and others change places with it, so that the
// messages it holds would pass a layer twice or not at all, new messages wait
// until all layers have been flushed, again for a second at most; if that is
// not enough, Swap fails.
//
// At last the layers that are not in next are stopped, top first, when nobody
// is inside them any more; Swap returns when that is done. What is still inside
// after 30 seconds is left to their Stop. The application sees a change of the
// view only where the new layers show other members than the old ones.
//
// If the layers that change bodies differ, the announcement of this node is
// updated, and members with another fingerprint are warned of in the log. Such
// a change needs the same one on the other nodes: until they have made it, this
// node and they cannot read each other, and messages that have passed the old
// layers on one side arrive at the new ones on the other. To change a cluster
// without that gap, first add a layer that only decodes, everywhere, then let it
// encode.
//
// ctx bounds everything up to the switch. Swap must not be called from a
// listener, watcher or layer.
func (c *Channel) Swap(ctx context.Context, next *Stack) error {
	if err := c.lock(ctx); err != nil {
		return fmt.Errorf("channel: swap: %w", err)
	}
	defer c.unlock()
	if c.state != running {
		return fmt.Errorf("channel: swap: the channel does not run: %w", ErrClosed)
	}
	if next == nil {
		next = new(Stack)
	}
	if next.used.Swap(true) {
		return errors.New("channel: swap: the stack belongs to a channel already: build a new one, of the same layers if need be")
	}
	s := &swap{c: c, old: c.chain.Load()}
	s.next = newChain(c, next, s.old)
	for _, l := range s.next.links {
		if !l.seat.started {
			s.added = append(s.added, l)
		}
	}
	for _, l := range s.old.links {
		if s.next.of(l.seat) < 0 {
			s.removed = append(s.removed, l)
		}
	}
	if err := s.prepare(ctx); err != nil {
		err = fmt.Errorf("channel: swap: nothing has changed: %w", err)
		return errors.Join(err, s.abandon(ctx))
	}
	s.finish(ctx)
	next.warn(c.log)
	return nil
}

// errHidden is the reason of a MemberLost that comes from a swap.
var errHidden = errors.New("channel: swap: the new layers do not show the member")

// swap is the work of one Swap. Channel.life is held all the time.
type swap struct {
	c              *Channel
	old, next      *chain
	added, removed []*link // bottom first
	holds          []*hold
}

// prepare starts the new layers, tells them the members, and switches.
func (s *swap) prepare(ctx context.Context) error {
	if err := startLayers(ctx, s.added); err != nil {
		return fmt.Errorf("start %w", err)
	}
	if err := s.c.events.do(ctx, s.replay); err != nil {
		return fmt.Errorf("tell the new layers the members: %w", err)
	}
	deadline := time.Now().Add(swapReplay)
	for {
		var missing bool
		if err := s.c.events.do(ctx, func(context.Context) { missing = s.missing() }); err != nil {
			return fmt.Errorf("wait for the new layers to know the members: %w", err)
		}
		if !missing || !time.Now().Before(deadline) {
			break
		}
		t := time.NewTimer(swapPoll)
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
	s.placeHolds()
	if q := s.mixed(); q != nil {
		resume, err := s.pause(ctx)
		defer resume()
		if err != nil {
			return fmt.Errorf("other layers change places with %s, which holds messages: %w", q.desc.Name, err)
		}
		// A watcher may wait for a call that waits for the end of the pause.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, swapHold)
		defer cancel()
	}
	s.next.open()
	if err := s.c.events.do(ctx, s.switchOver); err != nil {
		return fmt.Errorf("switch: %w", err)
	}
	return nil
}

// mixed returns a layer that is carried over with messages inside for which the
// old and the new way do not fit together: they would pass a layer twice, or
// none of those that change bodies.
func (s *swap) mixed() *link {
	for i, q := range s.next.links {
		was := s.old.of(q.seat)
		if _, flushes := q.Interceptor.(Flusher); !flushes || was < 0 {
			continue
		}
		for j, x := range s.next.links {
			if at := s.old.of(x.seat); at >= 0 && (j < i) != (at < was) {
				return q
			}
		}
		way := func(below, above []*link) string { return marks(below) + "|" + marks(above) }
		old, next := marks(s.old.links), marks(s.next.links)
		for _, w := range []string{
			way(s.next.links[:i], s.old.links[was:]), // on the way down
			way(s.old.links[:was], s.next.links[i:]), // on the way up
		} {
			if w = strings.Trim(strings.ReplaceAll(w, "||", "|"), "|"); w != old && w != next {
				return q
			}
		}
	}
	return nil
}

// marks lists the layers that change bodies.
func marks(links []*link) string {
	var names []string
	for _, l := range links {
		if l.desc.Mutates {
			names = append(names, fmt.Sprintf("%s:%x", l.desc.Name, uint32(l.desc.Flag)))
		}
	}
	return strings.Join(names, "|")
}

// pause keeps calls from outside waiting and empties the layers that hold
// messages. Receiving stops first, because a listener may send.
func (s *swap) pause(ctx context.Context) (resume func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, swapHold)
	defer cancel()
	old, wait := s.old, make(chan struct{})
	s.c.paused.Store(&wait)
	var closed []*gate
	shut := func(gates ...*gate) {
		for _, g := range gates {
			g.close()
			closed = append(closed, g)
		}
	}
	resume = func() {
		if s.c.chain.Load() == old {
			for _, g := range closed {
				g.open()
			}
		}
		s.c.paused.Store(nil)
		close(wait)
	}
	stuck := func() error { return fmt.Errorf("messages do not come to their end: %w", ctx.Err()) }
	shut(old.receiving)
	if !old.receiving.wait(ctx) {
		return resume, stuck()
	}
	up, cancelUp := context.WithTimeout(ctx, swapHold/4)
	defer cancelUp()
	for _, l := range old.links {
		_ = l.doFlush(up) // what is still sent may keep it from becoming empty
	}
	shut(old.posting, old.waiting)
	if !old.posting.wait(ctx) {
		return resume, stuck()
	}
	for i := len(old.links) - 1; i >= 0; i-- {
		err = errors.Join(err, old.links[i].doFlush(ctx))
	}
	for _, l := range old.links {
		err = errors.Join(err, l.doFlush(ctx))
	}
	return resume, err
}

// abandon undoes prepare.
func (s *swap) abandon(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), swapHold)
	defer cancel()
	s.next.route.dropped.Store(true)
	s.next.close()
	return stopLinks(ctx, s.added)
}

// do runs f on the event goroutine, between events. If it returns an error, f
// has not run and will not.
func (e *events) do(ctx context.Context, f func(context.Context)) error {
	var taken atomic.Bool
	ran := make(chan struct{})
	err := e.put(queuedEvent{do: func(run context.Context) {
		if !taken.Swap(true) {
			f(run)
			close(ran)
		}
	}})
	if err != nil {
		return err
	}
	select {
	case <-ran:
		return nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-e.c.leave:
		err = ErrClosed
	}
	if taken.Swap(true) {
		<-ran
		return nil
	}
	return err
}

// replay makes the next route the pending one and fills it. It runs on the
// event goroutine.
func (s *swap) replay(ctx context.Context) {
	now, r := s.c.events.current.Load(), s.next.route
	s.c.events.pending = r
	gone := s.gone()
	add := func(boundary int, members []Member) {
		for _, m := range members {
			if gone[m.ID] {
				continue
			}
			r.handle(ctx, queuedEvent{boundary: boundary, ev: MemberEvent{Kind: MemberAdded, Member: m}})
		}
	}
	known := now.boundaries[0].current.Load()
	add(0, known.Members)
	for _, l := range s.next.links {
		exit, carried := now.exits[l.seat]
		switch {
		case !carried:
		case l.member != nil:
			add(l.announce, now.boundaries[exit].current.Load().Members)
		default:
			for _, m := range l.seat.own {
				add(l.announce, []Member{m})
			}
		}
	}
	// A layer that goes may hold members whose loss it was told of: a new one
	// that does the same hears of both.
	for _, m := range s.shown(now).Members {
		if !known.Has(m) && !gone[m.ID] && !s.carries(now, m) {
			add(0, []Member{m})
			r.handle(ctx, queuedEvent{ev: MemberEvent{Kind: MemberLost, Member: m}})
		}
	}
}

// gone returns the members that nobody but a removed layer has announced.
func (s *swap) gone() map[UniqueID]bool {
	gone := map[UniqueID]bool{}
	for _, l := range s.removed {
		for id := range l.seat.own {
			gone[id] = true
		}
	}
	for id := range s.c.coord.aliveTimes() {
		delete(gone, id)
	}
	for _, l := range s.next.links {
		for id := range l.seat.own {
			delete(gone, id)
		}
	}
	return gone
}

// carries reports whether a layer that is carried over has announced m.
func (s *swap) carries(now *route, m Member) bool {
	return slices.ContainsFunc(s.next.links, func(l *link) bool {
		exit, carried := now.exits[l.seat]
		_, own := l.seat.own[m.ID]
		return own || carried && l.member != nil && now.boundaries[exit].current.Load().Has(m)
	})
}

func (s *swap) shown(r *route) *View { return r.boundaries[len(r.stages)].current.Load() }

// missing reports whether the application sees a member that the pending route
// does not show yet.
func (s *swap) missing() bool {
	next := s.shown(s.next.route)
	return slices.ContainsFunc(s.shown(s.old.route).Members, func(m Member) bool { return !next.Has(m) })
}

// switchOver makes the next chain the present one. It runs on the event
// goroutine.
func (s *swap) switchOver(ctx context.Context) {
	c, old, next := s.c, s.old.route, s.next.route
	carried := map[*link]*View{} // what they have been told
	for _, l := range s.next.links {
		if i := s.old.of(l.seat); i >= 0 {
			carried[l] = old.boundaries[s.old.links[i].stage].current.Load()
			l.seat.stale = append(l.seat.stale, s.old.links[i])
			l.seat.now.Store(l)
		}
	}
	c.chain.Store(s.next)
	s.old.close()
	c.events.pending = nil
	c.events.current.Store(next)
	for i, stage := range next.stages {
		if told, ok := carried[stage.l]; ok && !stage.filter {
			next.bring(ctx, i, told)
		}
	}
	next.bring(ctx, len(next.stages), s.shown(old))
	for _, m := range c.View().Members {
		c.checkFingerprint(m)
	}
}

// bring tells who stands above a boundary, and knows the members of told, what
// is different at the boundary.
func (r *route) bring(ctx context.Context, boundary int, told *View) {
	b := r.boundaries[boundary]
	want := b.current.Load()
	b.current.Store(told)
	for _, m := range told.Members {
		if !want.Has(m) {
			r.handle(ctx, queuedEvent{boundary: boundary, ev: MemberEvent{Kind: MemberLost, Member: m, Err: errHidden}})
		}
	}
	for _, m := range want.Members {
		r.handle(ctx, queuedEvent{boundary: boundary, ev: MemberEvent{Kind: MemberAdded, Member: m}})
	}
}

// finish empties and stops the old layers.
func (s *swap) finish(ctx context.Context) {
	c := s.c
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), swapDrain)
	defer cancel()
	stopWatching := make(chan struct{})
	defer close(stopWatching)
	go func() { // ends with this function
		select {
		case <-c.leave:
			t := time.NewTimer(swapLeave)
			defer t.Stop()
			select {
			case <-t.C:
				cancel()
			case <-stopWatching:
			}
		case <-stopWatching:
		}
	}()
	s.flush(ctx)
	if s.old.stack.Fingerprint() != s.next.stack.Fingerprint() {
		s.announce(ctx)
	}
	if !s.old.wait(ctx) {
		c.log.Warn("messages are still inside layers that are being removed; they end with them", zap.Error(context.Cause(ctx)))
	}
	// A layer that was carried over may go on with a message at its old place.
	for _, l := range s.next.links {
		l.seat.stale = l.seat.stale[max(0, len(l.seat.stale)-staleLinks):]
		for _, earlier := range l.seat.stale {
			earlier.down.Store(l.down.Load())
			earlier.up.Store(l.up.Load())
		}
	}
	if err := stopLinks(ctx, s.removed); err != nil {
		c.log.Warn("layers that were removed did not stop well", zap.Error(err))
	}
	c.log.Info("the layers were replaced", zap.Int("started", len(s.added)), zap.Int("stopped", len(s.removed)), zap.Int("layers", len(s.next.links)))
}

// announce tells the other nodes the new fingerprint.
func (s *swap) announce(ctx context.Context) {
	c := s.c
	local := c.updateLocal(func(m *Member) {
		c.announcement.Fingerprint = s.next.stack.Fingerprint()
		m.Payload = c.announcement.Encode()
	})
	if c.cfg.Membership == nil {
		return
	}
	if err := c.cfg.Membership.Update(ctx, local); err != nil {
		c.log.Warn("the other nodes could not be told that this node changes messages differently now", zap.Error(err))
	}
}

// hold is a place in the new chain where messages wait until those that a
// removed layer still holds have gone before.
type hold struct {
	c         *Channel
	layer     *link // whose messages go first
	up        bool
	asyncOnly bool
	link      *link // the place
	released  chan struct{}
}

// HandleSend implements SendHandler.
func (h *hold) HandleSend(ctx context.Context, l Link, m *Message) error {
	if !h.asyncOnly || m.Options.Has(Async) {
		select {
		case <-h.released:
		case <-ctx.Done(): // those below know what to do with that
		}
	}
	return l.Send(ctx, m)
}

// HandleReceive implements ReceiveHandler.
func (h *hold) HandleReceive(ctx context.Context, l Link, m *Message) error {
	if !h.asyncOnly || m.Options.Has(Async) {
		select {
		case <-h.released:
		case <-ctx.Done():
		}
	}
	return l.Deliver(ctx, m)
}

// placeHolds puts the holds where the new way meets the old one: before the
// first layer that the messages of the removed layer pass too, or at the end.
func (s *swap) placeHolds() {
	for i, l := range s.old.links {
		if _, flushes := l.Interceptor.(Flusher); !flushes || s.next.of(l.seat) >= 0 {
			continue
		}
		asyncOnly := slices.Contains(l.desc.Provides, PropAsync)
		place := func(up bool) {
			h := &hold{c: s.c, layer: l, up: up, asyncOnly: asyncOnly, released: make(chan struct{})}
			h.link = &link{layer: layer{desc: Descriptor{Name: "swap"}, send: h, receive: h}, c: s.c, ch: s.next, panics: s.c.panics}
			s.holds = append(s.holds, h)
		}
		if l.send != nil {
			place(false)
			s.insert(s.holds[len(s.holds)-1].link, &s.next.sendTo, (*link).below, func(x *link) bool { return s.old.of(x.seat) < i && s.old.of(x.seat) >= 0 })
		}
		if l.receive != nil {
			place(true)
			s.insert(s.holds[len(s.holds)-1].link, &s.next.recvTo, (*link).above, func(x *link) bool { return s.old.of(x.seat) > i })
		}
	}
}

func (l *link) below() *atomic.Pointer[link] { return &l.down }
func (l *link) above() *atomic.Pointer[link] { return &l.up }

// insert puts x before the first layer of the list that stop finds, or at the
// end.
func (s *swap) insert(x *link, at *atomic.Pointer[link], next func(*link) *atomic.Pointer[link], stop func(*link) bool) {
	for l := at.Load(); l != nil && (l.seat == nil || !stop(l)); l = at.Load() {
		at = next(l)
	}
	next(x).Store(at.Load())
	at.Store(x)
}

// release lets messages pass a hold and takes it out.
func (s *swap) release(h *hold) {
	close(h.released)
	at, next := &s.next.sendTo, (*link).below
	if h.up {
		at, next = &s.next.recvTo, (*link).above
	}
	for l := at.Load(); l != h.link; l = at.Load() {
		at = next(l)
	}
	at.Store(next(h.link).Load())
}

// flush empties the removed layers that hold messages, in the direction of the
// messages, and releases the holds.
func (s *swap) flush(ctx context.Context) {
	if len(s.holds) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, swapHold)
	defer cancel()
	// Who is on the way into a queue.
	s.old.posting.wait(ctx)
	s.old.passing.wait(ctx)
	for i := len(s.holds) - 1; i >= 0; i-- {
		if h := s.holds[i]; !h.up {
			s.flushOne(ctx, h)
		}
	}
	for _, h := range s.holds {
		if h.up {
			s.old.receiving.wait(ctx)
			s.old.delivering.wait(ctx)
			s.flushOne(ctx, h)
		}
	}
}

func (s *swap) flushOne(ctx context.Context, h *hold) {
	defer s.release(h)
	err := h.layer.doFlush(ctx)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		s.c.overtaken.Inc()
		s.c.log.Warn("a layer that is being removed still holds messages; later ones may overtake them",
			zap.String("layer", h.layer.desc.Name), zap.Error(err))
	}
}
