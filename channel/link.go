package channel

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// ErrPanic is inside the error of a message that made a layer panic.
var ErrPanic = errors.New("channel: a layer panicked")

// seat is a layer's place in whatever stack it is in: the Link that Start is
// given. Unlike a link it outlives the stack, if the layer is in the next one
// too.
type seat struct {
	now atomic.Pointer[link]
	// stale are the layer's links of earlier stacks, guarded by Channel.life.
	stale []*link
	// started: to be stopped; guarded by Channel.life.
	started bool
	// own are the members that a layer without MemberHandler has announced:
	// nobody else knows them. Event goroutine only.
	own map[UniqueID]Member
}

// enter enters the layer's chain. The gate is nil when the chain is not open:
// while the layer starts, and when the layer has been removed and hands on what
// it still holds.
func (s *seat) enter(down bool) (*link, *gate) {
	for {
		l := s.now.Load()
		g := l.ch.delivering
		if down {
			g = l.ch.passing
		}
		if g.enter() {
			return l, g
		}
		if s.now.Load() == l {
			return l, nil
		}
	}
}

// Send implements Link.
func (s *seat) Send(ctx context.Context, m *Message) error {
	l, g := s.enter(true)
	if g != nil {
		defer g.leave()
	}
	return l.Send(ctx, m)
}

// TrySend implements TrySender.
func (s *seat) TrySend(m *Message) bool {
	l, g := s.enter(true)
	if g != nil {
		defer g.leave()
	}
	return l.TrySend(m)
}

// Deliver implements Link.
func (s *seat) Deliver(ctx context.Context, m *Message) error {
	l, g := s.enter(false)
	if g != nil {
		defer g.leave()
	}
	return l.Deliver(ctx, m)
}

// Announce implements Link.
func (s *seat) Announce(ctx context.Context, ev MemberEvent) error {
	return s.now.Load().Announce(ctx, ev)
}

// View implements Link.
func (s *seat) View() View { return s.now.Load().View() }

// Local implements Link.
func (s *seat) Local() Member { return s.now.Load().Local() }

// link is one layer in one generation of the stack. All fields but down and up
// are constant.
type link struct {
	layer
	c    *Channel
	ch   *chain
	seat *seat

	// down is the next layer below that handles sending, nil for the
	// coordinator; up the next above that handles receiving, nil for the
	// application. Layers between are skipped.
	down, up atomic.Pointer[link]

	// stage is the boundary whose view the layer sees; announce is the one
	// that its own events pass next, see events.go.
	stage, announce int

	panics       *Counter
	encodeErrors *Counter
	decodeErrors *Counter
}

// Send implements Link.
func (l *link) Send(ctx context.Context, m *Message) error {
	switch d := l.down.Load(); { // the usual cases without the loop
	case d == nil:
		return l.c.bottom(ctx, m)
	case d.send != nil:
		return d.handleSend(ctx, m)
	default:
		return l.c.down(ctx, d, m)
	}
}

// TrySend implements TrySender.
func (l *link) TrySend(m *Message) bool {
	return l.c.trySender != nil && l.down.Load() == nil && l.c.trySender.TrySend(m)
}

// Deliver implements Link.
func (l *link) Deliver(ctx context.Context, m *Message) error {
	switch u := l.up.Load(); {
	case u == nil:
		return l.c.top(ctx, m)
	case u.receive != nil:
		return u.handleReceive(ctx, m)
	default:
		return l.c.up(ctx, u, m)
	}
}

// Announce implements Link. It never blocks: the event is queued.
func (l *link) Announce(_ context.Context, ev MemberEvent) error {
	return l.c.events.put(queuedEvent{seat: l.seat, ev: ev})
}

// View implements Link.
func (l *link) View() View {
	now := l.seat.now.Load()
	return now.ch.route.view(now.stage)
}

// Local implements Link.
func (l *link) Local() Member { return l.c.Local() }

// down runs a message through l and the layers below it.
func (c *Channel) down(ctx context.Context, l *link, m *Message) error {
	for ; l != nil; l = l.down.Load() {
		if l.send != nil {
			return l.handleSend(ctx, m)
		}
		if err := l.doEncode(m); err != nil {
			l.encodeErrors.Inc()
			return Failed(m.To, fmt.Errorf("%s: encode: %w", l.desc.Name, err))
		}
	}
	return c.bottom(ctx, m)
}

// up runs a message through l and the layers above it. What fails goes no
// higher.
func (c *Channel) up(ctx context.Context, l *link, m *Message) error {
	for ; l != nil; l = l.up.Load() {
		if l.receive != nil {
			return l.handleReceive(ctx, m)
		}
		if err := l.doDecode(m); err != nil {
			l.decodeErrors.Inc()
			return fmt.Errorf("channel: %s: decode: %w", l.desc.Name, err)
		}
	}
	return c.top(ctx, m)
}

// The functions below are the border of a layer: they turn a panic into an
// error of the call. The flag is there because recover costs more than the
// rest when nothing has happened.

func (l *link) handleSend(ctx context.Context, m *Message) (err error) {
	ok := false
	defer func() {
		if !ok {
			err = l.recovered(recover(), "send")
		}
	}()
	err = l.send.HandleSend(ctx, l, m)
	ok = true
	return err
}

func (l *link) handleReceive(ctx context.Context, m *Message) (err error) {
	ok := false
	defer func() {
		if !ok {
			err = l.recovered(recover(), "receive")
		}
	}()
	err = l.receive.HandleReceive(ctx, l, m)
	ok = true
	return err
}

func (l *link) doEncode(m *Message) (err error) {
	ok := false
	defer func() {
		if !ok {
			err = l.recovered(recover(), "encode")
		}
	}()
	err = l.encode.Encode(m)
	ok = true
	return err
}

func (l *link) doDecode(m *Message) (err error) {
	ok := false
	defer func() {
		if !ok {
			err = l.recovered(recover(), "decode")
		}
	}()
	err = l.decode.Decode(m)
	ok = true
	return err
}

// guarded is the border for calls that are not made per message.
func (l *link) guarded(what string, f func() error) (err error) {
	ok := false
	defer func() {
		if !ok {
			err = l.recovered(recover(), what)
		}
	}()
	err = f()
	ok = true
	return err
}

func (l *link) handleMember(ctx context.Context, ev MemberEvent) error {
	return l.guarded("member event", func() error { return l.member.HandleMember(ctx, l, ev) })
}

func (l *link) handleTick(ctx context.Context, now time.Time) error {
	return l.guarded("tick", func() error { return l.tick.HandleTick(ctx, l, now) })
}

func (l *link) filterView(v View) (out View, err error) {
	err = l.guarded("view filter", func() error { out = l.filter.FilterView(v); return nil })
	return out, err
}

func (l *link) doStart(ctx context.Context) error {
	return l.guarded("start", func() error { return l.start.Start(ctx, l.seat) })
}

func (l *link) doStop(ctx context.Context) error {
	return l.guarded("stop", func() error { return l.stop.Stop(ctx) })
}

func (l *link) recovered(p any, what string) error {
	return l.c.recovered(p, l.desc.Name, what, l.panics)
}

// recovered logs and counts a panic and returns the error for it. Without a
// panic the goroutine is about to exit, and nobody will see the error.
func (c *Channel) recovered(p any, who, what string, count *Counter) error {
	if p == nil {
		return ErrPanic
	}
	count.Inc()
	c.log.Error("a layer panicked; what it was doing has failed, the node goes on",
		zap.String("layer", who), zap.String("in", what), zap.Any("panic", p), zap.Stack("stack"))
	return fmt.Errorf("%s: %s: %w: %v", who, what, ErrPanic, p)
}
