package channel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// DefaultTick is the usual Config.Tick.
const DefaultTick = 500 * time.Millisecond

// Config is what a Channel is made of.
type Config struct {
	// Local is the template of this node's member record: domain, secure and
	// UDP port (0 means none). Host, Port and Payload are filled in by Start;
	// the ID too, unless one is set.
	Local Member
	// Announcement is told to the other nodes; Start adds the stack's
	// fingerprint.
	Announcement Announcement
	// Stack holds the interceptors to begin with, see [Channel.Swap]; nil for
	// none. It cannot be shared.
	Stack *Stack
	// Sender and Receiver are required.
	Sender   Sender
	Receiver Receiver
	// Membership finds the other members. Without one the node is alone until
	// a layer announces members.
	Membership Membership
	// Tick is the interval of TickHandlers; 0 means DefaultTick.
	Tick time.Duration
}

// Listener receives messages.
type Listener interface {
	// Handle processes m, or reports that the message is not for this
	// listener by returning false and nil. An error ends the search for a
	// listener and becomes a negative acknowledgement, if the sender waits for
	// one. Handle runs concurrently, also for messages of one sender; it holds
	// up the connection that the message came from, unless it calls
	// [Message.Defer] and goes on elsewhere. m and its body are only valid
	// until Handle returns.
	Handle(ctx context.Context, m *Message) (handled bool, err error)
}

// ListenerFunc is a function that is a Listener.
type ListenerFunc func(ctx context.Context, m *Message) (handled bool, err error)

// Handle calls f.
func (f ListenerFunc) Handle(ctx context.Context, m *Message) (bool, error) { return f(ctx, m) }

// Channel is one node's place in a group. All methods may be called from any
// goroutine. Do not call Stop from a listener, a watcher or a layer: it waits
// for them.
type Channel struct {
	cfg     Config
	log     *zap.Logger
	chain   atomic.Pointer[chain]         // changed with life held
	paused  atomic.Pointer[chan struct{}] // closed when calls may try again
	events  *events
	coord   *coordinator
	dedupe  *dedupe
	metrics *Metrics

	trySender TrySender // the sender, or nil

	listeners atomic.Pointer[[]*listening]
	regMu     sync.Mutex // guards changes of listeners
	watchers  watchers

	local   atomic.Pointer[Member]
	started time.Time // fixed before sending is possible
	clock   clock

	// Life cycle. life is a lock (a channel of one slot, because it is held
	// while components start and stop); state is guarded by it.
	life   chan struct{}
	state  state
	leave  chan struct{} // closed when Stop is called
	left   sync.Once     // closes leave
	done   chan struct{} // closed when stopping begins
	cancel context.CancelFunc
	joined sync.WaitGroup
	undo   []func(context.Context) error // what Stop has to do, last first

	annMu        sync.Mutex
	announcement Announcement
	warned       map[UniqueID]struct{} // other fingerprints, event goroutine only

	unhandled, duplicates, untracked, sendFailed, receiveFailed, panics, overtaken *Counter
}

type state uint8

const (
	idle state = iota
	running
	stopped
)

// listening is one registration of a listener.
type listening struct {
	l Listener
}

// New makes a channel. It has no effect before Start.
func New(cfg Config, s Settings) (*Channel, error) {
	var errs []error
	if cfg.Sender == nil {
		errs = append(errs, fmt.Errorf("channel: new: sender: %w", ErrNotConfigured))
	}
	if cfg.Receiver == nil {
		errs = append(errs, fmt.Errorf("channel: new: receiver: %w", ErrNotConfigured))
	}
	if cfg.Tick < 0 {
		errs = append(errs, fmt.Errorf("channel: new: tick is %v, must not be negative", cfg.Tick))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Stack == nil {
		cfg.Stack = new(Stack)
	}
	if cfg.Stack.used.Swap(true) {
		return nil, errors.New("channel: new: the stack already belongs to another channel: build one for each")
	}
	if cfg.Tick == 0 {
		cfg.Tick = DefaultTick
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	if s.Metrics == nil {
		s.Metrics = NewMetrics()
	}
	c := &Channel{
		cfg:          cfg,
		log:          s.Logger,
		dedupe:       newDedupe(),
		metrics:      s.Metrics,
		life:         make(chan struct{}, 1),
		leave:        make(chan struct{}),
		done:         make(chan struct{}),
		announcement: cfg.Announcement,
		warned:       map[UniqueID]struct{}{},
	}
	c.trySender, _ = cfg.Sender.(TrySender)
	m := s.Metrics
	first := newChain(c, cfg.Stack, nil)
	c.chain.Store(first)
	c.events = newEvents(c, first.route)
	c.coord = newCoordinator(c, m)
	c.local.Store(&cfg.Local)
	c.listeners.Store(new([]*listening))
	c.unhandled = m.Counter("channel_unhandled_total", "Messages that no listener took.")
	c.duplicates = m.Counter("channel_duplicates_total", "Repeated messages that were not delivered again.")
	c.untracked = m.Counter("channel_untracked_total", "Messages whose repetition could not be recognised, because too many were unfinished.")
	c.sendFailed = m.Counter("channel_send_failures_total", "Destinations that a message did not reach.")
	c.receiveFailed = m.Counter("channel_receive_failures_total", "Received messages that a layer or listener failed to process.")
	c.panics = m.Counter("channel_callback_panics_total", "Panics recovered from listeners, watchers and completions.")
	c.overtaken = m.Counter("channel_swap_overtaken_total", "Layers that were removed while they held messages longer than later ones could wait.")
	m.Gauge("channel_members", "Members in the view, without this node.", func() float64 { return float64(len(c.View().Members)) })
	if a, ok := cfg.Membership.(Attacher); ok {
		a.Attach(c)
	}
	return c, nil
}

// Start binds, starts the layers and joins the group. ctx is only for
// starting. When it fails, everything is undone, and the channel is stopped.
func (c *Channel) Start(ctx context.Context) error {
	if err := c.lock(ctx); err != nil {
		return fmt.Errorf("channel: start: %w", err)
	}
	defer c.unlock()
	switch c.state {
	case running:
		return errors.New("channel: start: already started")
	case stopped:
		return fmt.Errorf("channel: start: %w: make a new one", ErrClosed)
	}
	c.state = running
	if err := c.start(ctx); err != nil {
		c.state = stopped
		return errors.Join(err, c.stop(context.WithoutCancel(ctx)))
	}
	return nil
}

// start does the work of Start. What it adds to c.undo runs in reverse when
// the channel stops, also if a later step fails.
func (c *Channel) start(ctx context.Context) error {
	c.undo = append(c.undo, c.cfg.Receiver.Stop)
	addr, err := c.cfg.Receiver.Listen(ctx)
	if err != nil {
		return fmt.Errorf("channel: start: listen: %w", err)
	}
	c.started = time.Now()
	local := c.cfg.Local
	if local.ID.IsZero() {
		local.ID = c.chain.Load().stack.localID()
	}
	if local.ID.IsZero() {
		local.ID = NewUniqueID()
	}
	local.Host, local.Port, local.Alive = addr.Addr(), int(addr.Port()), 0
	if local.SecurePort == 0 {
		local.SecurePort = -1
	}
	if local.UDPPort == 0 {
		local.UDPPort = -1
	}
	c.annMu.Lock()
	c.announcement.Fingerprint = c.Stack().Fingerprint()
	c.describe(&local, &c.announcement)
	local.Payload = c.announcement.Encode()
	c.annMu.Unlock()
	c.local.Store(&local)

	c.clock.start()
	run, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	// The receiver is stopped before the layers: take its place in the list.
	c.undo = []func(context.Context) error{c.cfg.Sender.Stop}
	if err := c.cfg.Sender.Start(ctx); err != nil {
		c.undo = append(c.undo, c.cfg.Receiver.Stop)
		return fmt.Errorf("channel: start: sender: %w", err)
	}
	c.undo = append(c.undo, c.stopLayers)
	first := c.chain.Load()
	first.stack.warn(c.log)
	if err := startLayers(ctx, first.links); err != nil {
		c.undo = append(c.undo, c.cfg.Receiver.Stop)
		return fmt.Errorf("channel: start: %w", err)
	}
	c.joined.Go(func() { c.events.run(run) })
	c.joined.Go(func() { c.tick(run) })
	c.undo = append(c.undo, c.join)
	c.undo = append(c.undo, c.cfg.Receiver.Stop)
	first.open()
	if err := c.cfg.Receiver.Start(ctx, c.receive); err != nil {
		return fmt.Errorf("channel: start: receiver: %w", err)
	}
	if c.cfg.Membership == nil {
		return nil
	}
	c.undo = append(c.undo, c.cfg.Membership.Stop)
	if err := c.cfg.Membership.Start(ctx, c.Local(), nil, c.coord); err != nil {
		return fmt.Errorf("channel: start: membership: %w", err)
	}
	return nil
}

// describe lets sender and receiver complete what this node says about itself.
func (c *Channel) describe(m *Member, a *Announcement) {
	for _, part := range []any{c.cfg.Receiver, c.cfg.Sender} {
		if d, ok := part.(Describer); ok {
			d.Describe(m, a)
		}
	}
}

// Stop leaves the group, telling the others, and ends everything in reverse
// order of Start: messages that are queued are sent as far as ctx allows, the
// rest fails. It works twice and without Start.
func (c *Channel) Stop(ctx context.Context) error {
	c.left.Do(func() { close(c.leave) }) // a swap that waits gives up waiting
	if err := c.lock(ctx); err != nil {
		return fmt.Errorf("channel: stop: %w", err)
	}
	defer c.unlock()
	if c.state == stopped {
		return nil
	}
	c.state = stopped
	return c.stop(ctx)
}

func (c *Channel) stop(ctx context.Context) error {
	close(c.done)
	var errs []error
	for i := len(c.undo) - 1; i >= 0; i-- {
		if err := c.undo[i](ctx); err != nil {
			errs = append(errs, fmt.Errorf("channel: stop: %w", err))
		}
	}
	c.undo = nil
	c.chain.Load().close()
	c.events.close()
	if c.cancel != nil {
		c.cancel()
		c.clock.stop()
	}
	return errors.Join(errs...)
}

// join ends the channel's own goroutines, so that no layer is called from them
// while it stops, and waits for the senders that are on their way down.
func (c *Channel) join(ctx context.Context) error {
	c.cancel()
	c.chain.Load().close()
	ended := make(chan struct{})
	go func() { // ends with the goroutines it waits for
		c.joined.Wait()
		close(ended)
	}()
	var err error
	select {
	case <-ended:
	case <-ctx.Done():
		err = fmt.Errorf("a layer or watcher still holds up the member events: %w", ctx.Err())
	}
	c.events.close()
	if !c.chain.Load().waitOutside(ctx) {
		err = errors.Join(err, fmt.Errorf("messages are still being sent: %w", ctx.Err()))
	}
	return err
}

func (c *Channel) lock(ctx context.Context) error {
	select {
	case c.life <- struct{}{}: // also when ctx has ended
		return nil
	default:
	}
	select {
	case c.life <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *Channel) unlock() { <-c.life }

// Local returns this node's member record. Before Start it is the template.
// Its alive time is brought up to date at every tick.
func (c *Channel) Local() Member { return *c.local.Load() }

// View returns who is in the group now.
func (c *Channel) View() View { return c.events.top() }

// Stack returns the channel's present stack.
func (c *Channel) Stack() *Stack { return c.chain.Load().stack }

// Announcement returns what this node says about itself.
func (c *Channel) Announcement() Announcement {
	c.annMu.Lock()
	defer c.annMu.Unlock()
	return c.announcement
}

// Listen registers l; listeners are asked in the order of registration until
// one has handled the message. After cancel has returned, no further call
// begins; one that runs may still be running.
func (c *Channel) Listen(l Listener) (cancel func()) {
	e := &listening{l}
	c.changeListeners(func(ls []*listening) []*listening { return append(ls, e) })
	return func() {
		c.changeListeners(func(ls []*listening) []*listening {
			return slices.DeleteFunc(ls, func(x *listening) bool { return x == e })
		})
	}
}

func (c *Channel) changeListeners(f func([]*listening) []*listening) {
	c.regMu.Lock()
	defer c.regMu.Unlock()
	next := f(slices.Clone(*c.listeners.Load()))
	c.listeners.Store(&next)
}

// Watch calls w at once with the current view and a zero event, and then after
// every change of the view with the new view and what changed. Calls come one
// at a time and in order; a slow w delays the changes of everybody. After
// cancel has returned, no further call begins.
func (c *Channel) Watch(w func(View, MemberEvent)) (cancel func()) {
	x := &watcher{call: func(v View, ev MemberEvent) {
		defer c.guard("watcher")
		w(v, ev)
	}}
	c.watchers.add(x, c.View)
	return func() { c.watchers.remove(x) }
}

// guard is deferred around calls of the application's functions whose result
// nobody waits for.
func (c *Channel) guard(what string) {
	if p := recover(); p != nil {
		_ = c.recovered(p, "application", what, c.panics)
	}
}

// switched is called by the event goroutine after the view has changed.
func (c *Channel) switched(v View, ev MemberEvent) {
	switch ev.Kind {
	case MemberAdded:
		c.log.Info("member added", zap.Stringer("member", ev.Member), zap.Int("members", len(v.Members)))
		c.checkFingerprint(ev.Member)
	case MemberUpdated:
		c.log.Debug("member updated", zap.Stringer("member", ev.Member))
		c.checkFingerprint(ev.Member)
	case MemberLost, MemberLeft:
		fields := []zap.Field{zap.Stringer("member", ev.Member), zap.Stringer("reason", ev.Kind), zap.Int("members", len(v.Members))}
		if ev.Err != nil {
			fields = append(fields, zap.NamedError("cause", ev.Err))
		}
		c.log.Info("member removed", fields...)
		delete(c.warned, ev.Member.ID)
		c.forget(ev.Member)
	case MemberSuspected:
		c.log.Debug("member suspected", zap.Stringer("member", ev.Member), zap.Error(ev.Err))
		return
	}
	c.watchers.notify(change{v, ev})
}

func (c *Channel) forget(m Member) {
	defer c.guard("sender")
	c.cfg.Sender.Forget(m)
}

// checkFingerprint warns once about a member whose stack cannot understand
// this one.
func (c *Channel) checkFingerprint(m Member) {
	a, ok := m.Announcement()
	own := c.Stack().Fingerprint()
	if !ok || a.Fingerprint == own {
		delete(c.warned, m.ID)
		return
	}
	if _, done := c.warned[m.ID]; done {
		return
	}
	c.warned[m.ID] = struct{}{}
	c.log.Warn("a member changes messages differently: it and this node cannot read each other; give both the same interceptors in the same order",
		zap.Stringer("member", m), zap.String("theirs", a.Fingerprint), zap.String("ours", own))
}

// tick runs the periodic work until ctx ends.
func (c *Channel) tick(ctx context.Context) {
	t := time.NewTicker(c.cfg.Tick)
	defer t.Stop()
	for {
		select {
		case now := <-t.C:
			c.doTick(ctx, now)
		case <-ctx.Done():
			return
		}
	}
}

func (c *Channel) doTick(ctx context.Context, now time.Time) {
	c.updateLocal(func(m *Member) {})
	c.events.tick(c.coord.tick(now))
	c.dedupe.expire(now)
	ch, in := c.enterSend(false)
	if in == nil {
		return
	}
	defer in.leave()
	for _, l := range ch.links {
		if l.tick == nil || ctx.Err() != nil {
			continue
		}
		if err := l.handleTick(ctx, now); err != nil && ctx.Err() == nil {
			c.log.Warn("a layer's periodic work failed", zap.String("layer", l.desc.Name), zap.Error(err))
		}
	}
}

// updateLocal changes the local record and brings its alive time up to date.
func (c *Channel) updateLocal(f func(*Member)) Member {
	c.annMu.Lock()
	defer c.annMu.Unlock()
	m := *c.local.Load()
	f(&m)
	m.Alive = time.Since(c.started)
	c.local.Store(&m)
	return m
}

// Announce changes what this node says about itself; the other nodes see it as
// MemberUpdated. The fingerprint is kept.
func (c *Channel) Announce(ctx context.Context, a Announcement) error {
	if err := c.lock(ctx); err != nil {
		return fmt.Errorf("channel: announce: %w", err)
	}
	defer c.unlock()
	if c.state != running {
		return fmt.Errorf("channel: announce: %w", ErrClosed)
	}
	local := c.updateLocal(func(m *Member) {
		a.Fingerprint = c.announcement.Fingerprint
		c.describe(m, &a)
		c.announcement = a
		m.Payload = a.Encode()
	})
	if c.cfg.Membership == nil {
		return nil
	}
	if err := c.cfg.Membership.Update(ctx, local); err != nil {
		return fmt.Errorf("channel: announce: %w", err)
	}
	return nil
}
