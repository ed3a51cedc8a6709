// Package coordinator is the interceptor that makes the members of a group agree
// on one of them, the coordinator, as Tribes' NonBlockingCoordinator does. It
// imports channel and channel/wire only; it must not import core, plugins or fx.
package coordinator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

const (
	// maxInbox bounds the election messages that wait to be handled, maxOutbox
	// those that wait to be sent.
	maxInbox  = 1024
	maxOutbox = 256
)

// Config is what a user writes.
type Config struct {
	// Settle is how long the membership must have been quiet before an election
	// starts; after four times as long it starts in any case.
	Settle time.Duration `yaml:"settle"`
	// Timeout bounds an election, and the wait for that of another node, before
	// it is begun anew. It doubles up to MaxTimeout.
	Timeout    time.Duration `yaml:"timeout"`
	MaxTimeout time.Duration `yaml:"max_timeout"`
	// SendTimeout bounds the sending of one message.
	SendTimeout time.Duration `yaml:"send_timeout"`
}

// Defaults elect within a second, usually.
var Defaults = Config{Settle: 200 * time.Millisecond, Timeout: 3 * time.Second, MaxTimeout: 15 * time.Second, SendTimeout: 3 * time.Second}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.Settle < time.Millisecond {
		errs = append(errs, fmt.Errorf("coordinator: settle is %v, must be at least 1ms", c.Settle))
	}
	if c.Timeout < 10*time.Millisecond {
		errs = append(errs, fmt.Errorf("coordinator: timeout is %v, must be at least 10ms", c.Timeout))
	}
	if c.MaxTimeout < c.Timeout {
		errs = append(errs, fmt.Errorf("coordinator: max_timeout is %v, must not be less than timeout (%v)", c.MaxTimeout, c.Timeout))
	}
	if c.SendTimeout <= 0 {
		errs = append(errs, fmt.Errorf("coordinator: send_timeout is %v, must be positive", c.SendTimeout))
	}
	return errors.Join(errs...)
}

// Factory makes coordinator interceptors.
var Factory = channel.FactoryOf("coordinator", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// State is what a node knows of the election.
type State struct {
	// Coordinator is the elected member; the zero Member while there is none:
	// before the first election, and when it has left or failed.
	Coordinator channel.Member
	// Local: it is this node.
	Local bool
	// View are the members that agree, in the order of succession, this node
	// included; empty before the first election. Do not change it.
	View []channel.Member
	// ViewID names the view; all its members know it by the same id.
	ViewID channel.UniqueID
	// Settled: the view is what this node's membership says too. Otherwise an
	// election is under way.
	Settled bool
}

func (s State) equal(o State) bool {
	return s.Coordinator.ID == o.Coordinator.ID && s.Local == o.Local && s.ViewID == o.ViewID && s.Settled == o.Settled && same(s.View, o.View)
}

// Interceptor takes part in elections.
type Interceptor struct {
	cfg Config
	log *zap.Logger

	refused               map[string]*channel.Counter
	sent, failed, dropped *channel.Counter
	elections, restarts   *channel.Counter
	views, changes        *channel.Counter

	cancel context.CancelFunc // set by Start
	wg     sync.WaitGroup
	wake   chan struct{} // capacity 1: there is something for run
	outbox chan out

	mu    sync.Mutex
	inbox []event
	seen  uint64 // the version of the view that run has last looked at
	state State
	dirty bool // the membership may have changed

	watchers watchers
}

// event is something for the election to handle.
type event struct {
	from channel.Member
	m    message
	// result: of sending a confirmation.
	result          bool
	reached, missed []channel.UniqueID
}

// New makes a coordinator interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	m := s.Metrics
	x := &Interceptor{
		cfg: c, log: s.Logger,
		sent:      m.Counter("coordinator_messages_total", "Election messages sent."),
		failed:    m.Counter("coordinator_send_failures_total", "Election messages that did not reach a member."),
		dropped:   m.Counter("coordinator_dropped_total", "Election messages that were not sent because too many were waiting."),
		elections: m.Counter("coordinator_elections_total", "Elections that this node has started."),
		restarts:  m.Counter("coordinator_restarts_total", "Elections that were started anew because they did not end in time."),
		views:     m.Counter("coordinator_views_total", "Views that were agreed."),
		changes:   m.Counter("coordinator_changes_total", "Changes of the coordinator."),
		refused:   map[string]*channel.Counter{},
		wake:      make(chan struct{}, 1),
		outbox:    make(chan out, maxOutbox),
	}
	panics := m.Counter("coordinator_watcher_panics_total", "Panics of functions that watch the coordinator.")
	x.watchers.panicked = func(p any) {
		panics.Inc()
		x.log.Error("a function that watches the coordinator panicked", zap.Any("panic", p), zap.Stack("stack"))
	}
	for _, r := range refusals() {
		x.refused[r] = m.Counter("coordinator_refused_total", "Election messages that were refused.", "reason", r)
	}
	gauge := func(name, help string, read func(State) float64) {
		m.Gauge(name, help, func() float64 { return read(x.State()) })
	}
	yes := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge("coordinator_is_local", "1 while this node is the coordinator.", func(s State) float64 { return yes(s.Local) })
	gauge("coordinator_known", "1 while there is a coordinator.", func(s State) float64 { return yes(!s.Coordinator.IsZero()) })
	gauge("coordinator_settled", "1 while the agreed view is the membership.", func(s State) float64 { return yes(s.Settled) })
	gauge("coordinator_view_members", "Members of the agreed view, this node included.", func(s State) float64 { return float64(len(s.View)) })
	return x, nil
}

// Descriptor implements channel.Interceptor.
func (x *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:            "coordinator",
		Stateful:        true,
		Above:           []string{"failuredetector", "staticmember", "domain"},
		Wants:           []string{"failuredetector"},
		Promise:         "elects one member of a connected group as its coordinator",
		SendInterest:    &channel.Interest{MaxSize: -1},
		ReceiveInterest: &channel.Interest{MinSize: len(alive)},
	}
}

// State returns what is known now.
func (x *Interceptor) State() State {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.state
}

// Coordinator returns the coordinator of the group; ok is false while there is
// none.
func (x *Interceptor) Coordinator() (m channel.Member, ok bool) {
	s := x.State()
	return s.Coordinator, !s.Coordinator.IsZero()
}

// IsCoordinator reports whether this node is the coordinator.
func (x *Interceptor) IsCoordinator() bool { return x.State().Local }

// Watch calls f soon with the present state, and then after every change, one
// call at a time and in order, from one goroutine for all watchers. A slow f
// holds up the other watchers but no election; it misses states in between and
// is always told the last one. f must return when the node stops. After cancel
// has returned no further call begins; one that runs may still be running.
// Before Start nothing is called.
func (x *Interceptor) Watch(f func(State)) (cancel func()) { return x.watchers.add(f) }

// Start implements channel.Starter.
func (x *Interceptor) Start(_ context.Context, l channel.Link) error {
	ctx, cancel := context.WithCancel(context.Background())
	x.cancel = cancel
	x.watchers.open()
	x.wg.Go(func() { x.run(ctx, l) })
	x.wg.Go(func() { x.send(ctx, l) })
	x.wg.Go(func() { x.watchers.run(ctx) })
	x.look()
	return nil
}

// Stop implements channel.Stopper. Elections are broken off.
func (x *Interceptor) Stop(ctx context.Context) error {
	if x.cancel == nil {
		return nil
	}
	x.cancel()
	ended := make(chan struct{})
	go func() { // ends with the goroutines it waits for
		x.wg.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("coordinator: stop: a watcher has not returned: %w", ctx.Err())
	}
}

// HandleReceive implements channel.ReceiveHandler: election messages end here.
func (x *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if !isMessage(m.Body) {
		return l.Deliver(ctx, m)
	}
	if len(m.Body) == len(alive) && string(m.Body) == alive {
		return nil
	}
	d, err := decode(m.Body)
	if err != nil {
		x.refuse(refusedMalformed)
		x.log.Debug("malformed election message", zap.Stringer("member", m.From), zap.Error(err))
		return nil
	}
	x.put(event{from: m.From, m: d})
	return nil
}

func (x *Interceptor) refuse(reason string) { x.refused[reason].Inc() }

// put queues an event for run.
func (x *Interceptor) put(ev event) {
	x.mu.Lock()
	full := len(x.inbox) >= maxInbox
	if !full {
		x.inbox = append(x.inbox, ev)
	}
	x.mu.Unlock()
	if full {
		x.refuse(refusedFull)
		return
	}
	x.stir()
}

func (x *Interceptor) stir() {
	select {
	case x.wake <- struct{}{}:
	default:
	}
}

// look makes run look at the membership.
func (x *Interceptor) look() {
	x.mu.Lock()
	x.dirty = true
	x.mu.Unlock()
	x.stir()
}

// HandleMember implements channel.MemberHandler.
func (x *Interceptor) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	x.look()
	return l.Announce(ctx, ev)
}

// HandleTick implements channel.TickHandler: where this layer is a process of
// its own, its view may change a moment after the event.
func (x *Interceptor) HandleTick(_ context.Context, l channel.Link, _ time.Time) error {
	version := l.View().Version
	x.mu.Lock()
	news := version != x.seen
	x.mu.Unlock()
	if news {
		x.look()
	}
	return nil
}

// run is the goroutine that owns the election.
func (x *Interceptor) run(ctx context.Context, l channel.Link) {
	e := newElection(x.cfg, x.refuse)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-x.wake:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		x.mu.Lock()
		events, dirty := x.inbox, x.dirty
		x.inbox, x.dirty = nil, false
		x.mu.Unlock()
		now := time.Now()
		var outs []out
		if dirty {
			v := l.View()
			x.mu.Lock()
			x.seen = v.Version
			x.mu.Unlock()
			outs = append(outs, e.setMembers(l.Local(), v.Members, now)...)
		}
		for _, ev := range events {
			if ev.result {
				e.reached(ev.reached)
				e.missed(ev.m.id, ev.missed, now)
				continue
			}
			outs = append(outs, e.receive(ev.from, ev.m, now)...)
		}
		outs = append(outs, e.tick(now)...)
		x.publish(e)
		for _, o := range outs {
			select {
			case x.outbox <- o:
			default:
				x.dropped.Inc() // what is lost is sent again in time
			}
		}
		wait := time.Duration(1<<63 - 1)
		if at := e.due(); !at.IsZero() {
			wait = max(time.Until(at), time.Millisecond)
		}
		timer.Reset(wait)
	}
}

// publish makes the state of the election known.
func (x *Interceptor) publish(e *election) {
	s := State{View: e.view, ViewID: e.viewID, Settled: len(e.members) > 0 && e.settled()}
	s.Coordinator, _ = e.coordinator()
	s.Local = !s.Coordinator.IsZero() && s.Coordinator.ID == e.local.ID
	x.elections.Add(e.elections)
	x.restarts.Add(e.restarts)
	x.views.Add(e.views)
	e.elections, e.restarts, e.views = 0, 0, 0
	x.mu.Lock()
	old := x.state
	x.state = s
	x.mu.Unlock()
	if old.equal(s) {
		return
	}
	if old.Coordinator.ID != s.Coordinator.ID {
		x.changes.Inc()
		if s.Coordinator.IsZero() {
			x.log.Info("the coordinator is gone", zap.Stringer("member", old.Coordinator))
		} else {
			x.log.Info("coordinator elected", zap.Stringer("member", s.Coordinator), zap.Int("members", len(s.View)), zap.Stringer("view", s.ViewID))
		}
	}
	x.watchers.notify(s)
}

// send is the goroutine that sends election messages, one after the other.
func (x *Interceptor) send(ctx context.Context, l channel.Link) {
	for {
		select {
		case o := <-x.outbox:
			if o.all {
				x.sendAll(ctx, l, o)
			} else {
				x.sendFirst(ctx, l, o)
			}
		case <-ctx.Done():
			return
		}
	}
}

func (x *Interceptor) post(ctx context.Context, l channel.Link, to []channel.Member, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, x.cfg.SendTimeout)
	defer cancel()
	x.sent.Inc()
	err := l.Send(ctx, &channel.Message{
		ID: channel.NewUniqueID(), From: l.Local(), To: slices.Clone(to), Options: channel.UseAck,
		Time: time.Now().UnixMilli(), Body: slices.Clone(body),
	})
	if err != nil {
		x.failed.Inc()
	}
	return err
}

// sendFirst sends to the first member that can be reached.
func (x *Interceptor) sendFirst(ctx context.Context, l channel.Link, o out) {
	body := o.m.encode()
	for i := range o.to {
		if x.post(ctx, l, o.to[i:i+1], body) == nil || ctx.Err() != nil {
			return
		}
	}
}

// sendAll sends a confirmation and reports whom it has reached.
func (x *Interceptor) sendAll(ctx context.Context, l channel.Link, o out) {
	ev := event{result: true, m: message{id: o.m.id}}
	err := x.post(ctx, l, o.to, o.m.encode())
	var se *channel.SendError
	for _, m := range o.to {
		missed := err != nil
		if errors.As(err, &se) {
			missed = slices.ContainsFunc(se.Faults, func(f channel.Fault) bool { return f.Member.ID == m.ID })
		}
		if missed {
			ev.missed = append(ev.missed, m.ID)
		} else {
			ev.reached = append(ev.reached, m.ID)
		}
	}
	if ctx.Err() == nil {
		x.put(ev)
	}
}

// watchers are told of states by one goroutine.
type watchers struct {
	mu    sync.Mutex
	wake  chan struct{} // capacity 1; nil before Start
	list  []*watcher
	state State
	told  int // how many states there were

	panicked func(any) // constant
}

type watcher struct {
	f    func(State)
	told int
	gone bool
}

func (w *watchers) open() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wake = make(chan struct{}, 1)
	w.told++
}

func (w *watchers) stir() {
	if w.wake == nil {
		return
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watchers) add(f func(State)) (cancel func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	x := &watcher{f: f}
	w.list = append(w.list, x)
	w.stir()
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		x.gone = true
		w.list = slices.DeleteFunc(slices.Clone(w.list), func(y *watcher) bool { return y == x })
	}
}

func (w *watchers) notify(s State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state = s
	w.told++
	w.stir()
}

// next returns a watcher that does not know the present state.
func (w *watchers) next() (x *watcher, s State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range w.list {
		if !x.gone && x.told != w.told {
			x.told = w.told
			return x, w.state
		}
	}
	return nil, State{}
}

// call calls f; a panic there must not end the node.
func (w *watchers) call(f func(State), s State) {
	defer func() {
		if p := recover(); p != nil {
			w.panicked(p)
		}
	}()
	f(s)
}

func (w *watchers) run(ctx context.Context) {
	w.mu.Lock()
	wake := w.wake
	w.mu.Unlock()
	for {
		for ctx.Err() == nil {
			x, s := w.next()
			if x == nil {
				break
			}
			w.call(x.f, s)
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return
		}
	}
}
