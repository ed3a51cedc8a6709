package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// The optional interfaces of an interceptor, one type for each, so that a layer
// can be put together that has no more than the plugin handles.
type (
	sendPart    struct{ i *Interceptor }
	receivePart struct{ i *Interceptor }
	memberPart  struct{ i *Interceptor }
	viewPart    struct{ i *Interceptor }
	tickPart    struct{ i *Interceptor }
)

// HandleSend implements channel.SendHandler.
func (h sendPart) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	return h.i.handleSend(ctx, l, m)
}

// HandleReceive implements channel.ReceiveHandler.
func (h receivePart) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	return h.i.handleReceive(ctx, l, m)
}

// HandleMember implements channel.MemberHandler.
func (h memberPart) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	return h.i.handleMember(ctx, l, ev)
}

// FilterView implements channel.ViewFilter.
func (h viewPart) FilterView(below channel.View) channel.View { return h.i.filterView(below) }

// HandleTick implements channel.TickHandler.
func (h tickPart) HandleTick(ctx context.Context, l channel.Link, now time.Time) error {
	return h.i.handleTick(ctx, l, now)
}

// Layer returns the channel.Interceptor of the plugin: it implements the
// handlers that the plugin's description names, and no other.
func (i *Interceptor) Layer() channel.Interceptor {
	bits := 0
	for n, h := range allHandles {
		if slices.Contains(i.cfg.Description.Handles, h) {
			bits |= 1 << n
		}
	}
	type (
		s = sendPart
		r = receivePart
		m = memberPart
		v = viewPart
		t = tickPart
	)
	S, R, M, V, T := s{i}, r{i}, m{i}, v{i}, t{i}
	switch bits {
	case 1:
		return struct {
			*Interceptor
			s
		}{i, S}
	case 2:
		return struct {
			*Interceptor
			r
		}{i, R}
	case 3:
		return struct {
			*Interceptor
			s
			r
		}{i, S, R}
	case 4:
		return struct {
			*Interceptor
			m
		}{i, M}
	case 5:
		return struct {
			*Interceptor
			s
			m
		}{i, S, M}
	case 6:
		return struct {
			*Interceptor
			r
			m
		}{i, R, M}
	case 7:
		return struct {
			*Interceptor
			s
			r
			m
		}{i, S, R, M}
	case 8:
		return struct {
			*Interceptor
			v
		}{i, V}
	case 9:
		return struct {
			*Interceptor
			s
			v
		}{i, S, V}
	case 10:
		return struct {
			*Interceptor
			r
			v
		}{i, R, V}
	case 11:
		return struct {
			*Interceptor
			s
			r
			v
		}{i, S, R, V}
	case 12:
		return struct {
			*Interceptor
			m
			v
		}{i, M, V}
	case 13:
		return struct {
			*Interceptor
			s
			m
			v
		}{i, S, M, V}
	case 14:
		return struct {
			*Interceptor
			r
			m
			v
		}{i, R, M, V}
	case 15:
		return struct {
			*Interceptor
			s
			r
			m
			v
		}{i, S, R, M, V}
	case 16:
		return struct {
			*Interceptor
			t
		}{i, T}
	case 17:
		return struct {
			*Interceptor
			s
			t
		}{i, S, T}
	case 18:
		return struct {
			*Interceptor
			r
			t
		}{i, R, T}
	case 19:
		return struct {
			*Interceptor
			s
			r
			t
		}{i, S, R, T}
	case 20:
		return struct {
			*Interceptor
			m
			t
		}{i, M, T}
	case 21:
		return struct {
			*Interceptor
			s
			m
			t
		}{i, S, M, T}
	case 22:
		return struct {
			*Interceptor
			r
			m
			t
		}{i, R, M, T}
	case 23:
		return struct {
			*Interceptor
			s
			r
			m
			t
		}{i, S, R, M, T}
	case 24:
		return struct {
			*Interceptor
			v
			t
		}{i, V, T}
	case 25:
		return struct {
			*Interceptor
			s
			v
			t
		}{i, S, V, T}
	case 26:
		return struct {
			*Interceptor
			r
			v
			t
		}{i, R, V, T}
	case 27:
		return struct {
			*Interceptor
			s
			r
			v
			t
		}{i, S, R, V, T}
	case 28:
		return struct {
			*Interceptor
			m
			v
			t
		}{i, M, V, T}
	case 29:
		return struct {
			*Interceptor
			s
			m
			v
			t
		}{i, S, M, V, T}
	case 30:
		return struct {
			*Interceptor
			r
			m
			v
			t
		}{i, R, M, V, T}
	case 31:
		return struct {
			*Interceptor
			s
			r
			m
			v
			t
		}{i, S, R, M, V, T}
	}
	return i // it only starts and stops
}

// wants reports whether a message has to pass the plugin.
func (i *Interceptor) wants(dir int, m *channel.Message) bool {
	return i.want.Load()[dir].Match(m.Options, len(m.Body))
}

// observe feeds a copy to an observer, if there is room.
func (i *Interceptor) observe(l channel.Link, m *channel.Message, dir uint8) {
	w := &i.windows[1+dir]
	cost := min(int64(len(m.Body)), w.cap)
	if !w.try(cost) {
		i.missed.Inc()
		return
	}
	i.tellView(l)
	it := i.take(l, m, dir, false)
	it.window, it.cost, it.observed = w, cost, true
	if _, err := i.enter(it, nil); err != nil {
		i.missed.Inc()
	}
}

// tellView tells the plugin the view if it has changed, before the message that
// comes next.
func (i *Interceptor) tellView(l channel.Link) {
	v := l.View()
	i.mu.Lock()
	conn, known := i.conn, i.viewed && i.view == v.Version
	if conn != nil && !known {
		i.view, i.viewed = v.Version, true
	}
	i.mu.Unlock()
	if conn == nil || known {
		return
	}
	// It cannot be told only if it has ended; its successor begins with the view.
	_ = conn.Push(frame.Header{Kind: kindNewView}, appendView(appendMember(nil, l.Local()), v))
}

// behind queues a message that does not go through the plugin behind those of
// its flow that do; false if there are none.
func (i *Interceptor) behind(l channel.Link, m *channel.Message, k flowKey, set func(*item)) bool {
	i.mu.Lock()
	busy := i.flows[k] != nil
	i.mu.Unlock()
	if !busy {
		return false
	}
	it := i.take(l, m, k.dir, false)
	set(it)
	i.mu.Lock()
	defer i.mu.Unlock()
	it.answered = true
	i.joinLocked(it, k)
	return true
}

func (i *Interceptor) handleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	switch {
	case len(m.To) == 0 || i.cfg.Description.Observer && !i.wants(down, m):
		return l.Send(ctx, m)
	case i.cfg.Description.Observer:
		i.observe(l, m, down)
		return l.Send(ctx, m)
	case !i.wants(down, m):
		if m.Done == nil || !i.behind(l, m, flowKey{dir: down}, func(it *item) { it.m = m }) {
			return l.Send(ctx, m)
		}
		return nil
	}
	i.tellView(l)
	w := &i.windows[0]
	if m.Done != nil {
		w = &i.windows[1]
	}
	cost := min(int64(len(m.Body)), w.cap)
	if err := w.acquire(ctx, cost); err != nil {
		return i.sendErr(m.To, err)
	}
	it := i.take(l, m, down, m.Done != nil)
	it.window, it.cost, it.m = w, cost, m
	if m.Done == nil {
		return i.sendAndWait(ctx, l, m, it)
	}
	passed, err := i.enter(it, &flowKey{dir: down})
	switch {
	case err != nil:
		return i.sendErr(m.To, err)
	case passed:
		return l.Send(ctx, m)
	}
	return nil
}

// sendAndWait waits for the verdict and does what it says.
func (i *Interceptor) sendAndWait(ctx context.Context, l channel.Link, m *channel.Message, it *item) error {
	passed, err := i.enter(it, nil)
	switch {
	case err != nil:
		return i.sendErr(m.To, err)
	case passed:
		return l.Send(ctx, m)
	}
	select {
	case <-it.ch:
	case <-ctx.Done():
		i.giveUp(it, ctx.Err())
		<-it.ch
	}
	v, o := it.verdict, it.open
	i.drop(it)
	switch v.kind {
	case frame.Error:
		return i.sendErr(m.To, v.err)
	case frame.Drop:
		return i.waitEnd(ctx, m, o)
	}
	v.apply(m, m.Body)
	err = l.Send(ctx, m)
	if o != nil {
		o.above(err)
		err = i.waitEnd(ctx, m, o)
	}
	return err
}

// waitEnd waits until the plugin is through with a message; o may be nil.
func (i *Interceptor) waitEnd(ctx context.Context, m *channel.Message, o *open) error {
	if o == nil {
		return nil
	}
	ch := make(chan error, 1)
	o.told(nil, nil, func(err error) { ch <- err })
	select {
	case err := <-ch:
		if err != nil {
			err = i.asSendErr(m.To, err)
		}
		return err
	case <-ctx.Done():
		return i.sendErr(m.To, ctx.Err())
	}
}

// giveUp ends a message that nobody waits for any more.
func (i *Interceptor) giveUp(it *item, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if it.answered {
		return
	}
	if i.conn == nil {
		err = fmt.Errorf("%w: %w", channel.ErrPluginDown, err)
	} else {
		_ = i.conn.Push(frame.Header{Seq: it.seq, Kind: kindSkip}) // it has ended otherwise
	}
	i.failLocked(it, err)
}

func (i *Interceptor) handleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if i.cfg.Description.Observer {
		if i.wants(up, m) {
			i.observe(l, m, up)
		}
		return l.Deliver(ctx, m)
	}
	key := flowKey{up, m.From.ID}
	var wait chan error
	var end func(error) // of a message whose end has been taken over
	set := func(it *item) {
		it.msg = *m
		switch {
		case m.Later != nil:
			end = m.Later.Defer()
			it.end = end
		case m.Options.Has(channel.UseAck | channel.SyncAck):
			// Somebody waits for the return of this call.
			wait = make(chan error, 1)
			it.end = func(err error) {
				select {
				case wait <- err:
				default: // told already
				}
			}
		default:
			it.end = i.unheard
		}
	}
	if !i.wants(up, m) {
		if !i.behind(l, m, key, set) {
			return l.Deliver(ctx, m)
		}
		return waitFor(ctx, wait)
	}
	i.tellView(l)
	w := &i.windows[2]
	cost := min(int64(len(m.Body)), w.cap)
	if err := w.acquire(ctx, cost); err != nil {
		return i.wrapErr(err)
	}
	it := i.take(l, m, up, m.Later != nil)
	it.window, it.cost = w, cost
	set(it)
	passed, err := i.enter(it, &key)
	switch {
	case err != nil:
		err = i.wrapErr(err)
		if end != nil {
			end(err)
		}
		return err
	case passed && end != nil:
		return i.deliver(ctx, l, m, end)
	case passed:
		return l.Deliver(ctx, m)
	}
	return waitFor(ctx, wait)
}

// deliver passes a message on whose end has been taken over.
func (i *Interceptor) deliver(ctx context.Context, l channel.Link, m *channel.Message, end func(error)) error {
	later := &takeover{end: end}
	m.Later = later
	err := l.Deliver(ctx, m)
	if !later.taken {
		end(err)
	}
	return err
}

// unheard is the end of a message that nobody waits for.
func (i *Interceptor) unheard(err error) {
	if err != nil {
		i.log.Debug("a received message was not processed", zap.Error(err))
	}
}

func waitFor(ctx context.Context, wait chan error) error {
	if wait == nil {
		return nil
	}
	select {
	case err := <-wait:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (i *Interceptor) handleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	i.mu.Lock()
	around := i.conn == nil && i.started && i.cfg.OnDown == core.Bypass
	i.mu.Unlock()
	if around || i.cfg.Description.Observer {
		if err := l.Announce(ctx, ev); err != nil {
			return err
		}
	}
	if around {
		return nil // the successor is told who is there
	}
	i.tellView(l)
	b := appendMember(nil, ev.Member)
	if ev.Err != nil {
		b = appendError(b, ev.Err, 0)
	}
	err := i.calls.Go(ctx, func(f frame.Frame, err error) {
		if _, err = i.outcome(f, err); err != nil && !errors.Is(err, channel.ErrClosed) && i.run.Err() == nil {
			i.log.Warn("a member event was not handled", zap.Stringer("member", ev.Member), zap.Stringer("event", ev.Kind), zap.Error(err))
		}
	}, kindMember, uint32(ev.Kind), b)
	if err != nil {
		return i.wrapErr(err)
	}
	return nil
}

// handleTick does not wait, and leaves a tick out if the one before it still
// runs.
func (i *Interceptor) handleTick(ctx context.Context, l channel.Link, now time.Time) error {
	i.mu.Lock()
	up := i.conn != nil
	i.mu.Unlock()
	if !up || i.ticking.Swap(true) {
		return nil
	}
	i.tellView(l)
	err := i.calls.Go(ctx, func(f frame.Frame, err error) {
		i.ticking.Store(false)
		if _, err = i.outcome(f, err); err != nil && i.run.Err() == nil {
			i.log.Warn("periodic work of the plugin failed", zap.Error(err))
		}
	}, kindTick, 0, appendTime(nil, now))
	if err != nil {
		i.ticking.Store(false)
		return i.wrapErr(err)
	}
	return nil
}

// filterView asks the plugin. While it cannot answer, memberPart that it has not
// shown before stay hidden, unless it may be bypassed.
func (i *Interceptor) filterView(below channel.View) channel.View {
	if len(below.Members) == 0 {
		return below
	}
	i.mu.Lock()
	around := i.conn == nil && i.cfg.OnDown == core.Bypass
	i.mu.Unlock()
	if around {
		return below
	}
	ctx, cancel := context.WithTimeout(i.run, i.cfg.Timeout)
	defer cancel()
	b, err := i.outcome(i.calls.Call(ctx, kindFilter, 0, appendView(nil, below)))
	if err == nil {
		if b == nil {
			return below
		}
		d := decoder{b: b, in: i.in}
		v := channel.View{Version: below.Version, Local: below.Local, Members: d.members()}
		if err = d.err; err == nil {
			i.mu.Lock()
			i.shown = v
			i.mu.Unlock()
			return v
		}
	}
	i.log.Warn("the plugin did not filter the view; no further members are shown", zap.Error(err))
	i.mu.Lock()
	defer i.mu.Unlock()
	v := below
	v.Members = slices.DeleteFunc(slices.Clone(below.Members), func(m channel.Member) bool { return !i.shown.Has(m) })
	return v
}

// HandleCall implements frame.Handler: messages that the plugin sends or
// delivers by itself.
func (i *Interceptor) HandleCall(r *frame.Request) {
	i.life.Count()
	if r.Kind != kindForward && r.Kind != kindDeliver {
		refuse(r)
		return
	}
	var m channel.Message
	d := decoder{b: r.Payload, in: i.in}
	flags := d.message(&m, r.Kind == kindForward)
	if d.err != nil {
		answer(r, d.err)
		return
	}
	m.Options = channel.Options(r.Options)
	i.verdicts[frame.Inject].Inc()
	switch {
	case r.Kind == kindDeliver:
		r.Go(func(r *frame.Request) { answer(r, i.link.Deliver(r.Context(), &m)) })
	case flags&messageTold == 0:
		r.Go(func(r *frame.Request) { answer(r, i.link.Send(r.Context(), &m)) })
	default:
		m.Done = completeRequest{r}
		i.inject(func() {
			if err := i.link.Send(i.run, &m); err != nil {
				answer(r, err)
			}
		})
	}
}

// completeRequest answers a request with the result of sending.
type completeRequest struct{ r *frame.Request }

// Complete implements channel.Completion.
func (c completeRequest) Complete(_ *channel.Message, err error) { answer(c.r, err) }

// inject sendPart a message of the plugin that is not waited for, before those
// that the plugin has not answered yet.
func (i *Interceptor) inject(send func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f := i.flowLocked(flowKey{dir: down})
	it := &item{dir: down, answered: true, inject: send, flow: f, ch: make(chan error, 1)}
	at := slices.IndexFunc(f.queue, func(o *item) bool { return !o.answered })
	if at < 0 {
		at = len(f.queue)
	}
	f.queue = slices.Insert(f.queue, at, it)
	i.drainLocked(f)
}

// HandleEvent implements frame.Handler.
func (i *Interceptor) HandleEvent(f frame.Frame) error {
	switch f.Kind {
	case kindVerdict:
		return i.answer(f)
	case kindEnd:
		i.ended(f)
	case kindAnnounce:
		return i.announce(f)
	}
	return nil
}

func (i *Interceptor) announce(f frame.Frame) error {
	d := decoder{b: f.Payload, in: i.in}
	ev := channel.MemberEvent{Kind: channel.MemberEventKind(f.Options), Member: d.member()}
	if len(d.b) > 0 {
		ev.Err = d.error(0)
	}
	if d.err != nil {
		return d.err
	}
	i.life.Count()
	if i.cfg.Description.Observer {
		return nil // it was passed on already
	}
	i.mu.Lock()
	if now := time.Now(); now.Sub(i.floodAt) > time.Second {
		i.flood, i.floodAt = 0, now
	}
	if i.flood++; i.flood > maxAnnounced {
		i.mu.Unlock()
		return fmt.Errorf("%w: more than %d member events in a second", frame.ErrProtocol, maxAnnounced)
	}
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		i.held[ev.Member.ID] = ev.Member
	case channel.MemberLost, channel.MemberLeft:
		delete(i.held, ev.Member.ID)
	}
	tooMany := len(i.held) > maxMembers
	if tooMany {
		delete(i.held, ev.Member.ID)
	}
	i.mu.Unlock()
	if tooMany {
		return fmt.Errorf("%w: it announces more than %d members", frame.ErrProtocol, maxMembers)
	}
	if err := i.link.Announce(i.run, ev); err != nil {
		i.log.Debug("a member event of the plugin was not taken", zap.Error(err))
	}
	return nil
}
