// Package dispatch is the interceptor that queues asynchronous messages. It
// imports package channel only; it must not import core, plugins or fx.
package dispatch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// What happens to a message that finds the queue full.
const (
	// Block: the caller waits, at most Config.BlockTimeout, and then fails.
	Block = "block"
	// Fail: the caller fails at once.
	Fail = "fail"
	// Drop: the message is counted and forgotten; the caller goes on.
	Drop = "drop"
)

// Config is what a user writes.
type Config struct {
	// QueueBytes bounds the bodies that are queued or on their way, in bytes.
	QueueBytes int64 `yaml:"queue_bytes"`
	// QueueMessages bounds their number; a message to several destinations
	// counts once for each.
	QueueMessages int `yaml:"queue_messages"`
	// OnFull is Block, Fail or Drop.
	OnFull string `yaml:"on_full"`
	// BlockTimeout bounds the wait of a caller when OnFull is Block.
	BlockTimeout time.Duration `yaml:"block_timeout"`
}

// Defaults holds 64 MiB or 100,000 messages and waits a second.
var Defaults = Config{QueueBytes: 64 << 20, QueueMessages: 100_000, OnFull: Block, BlockTimeout: time.Second}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.QueueBytes < 1 {
		errs = append(errs, fmt.Errorf("dispatch: queue_bytes is %d, must be at least 1", c.QueueBytes))
	}
	if c.QueueMessages < 1 {
		errs = append(errs, fmt.Errorf("dispatch: queue_messages is %d, must be at least 1", c.QueueMessages))
	}
	if c.OnFull != Block && c.OnFull != Fail && c.OnFull != Drop {
		errs = append(errs, fmt.Errorf("dispatch: on_full is %q, must be block, fail or drop", c.OnFull))
	}
	if c.BlockTimeout < 0 || c.BlockTimeout == 0 && c.OnFull == Block {
		errs = append(errs, fmt.Errorf("dispatch: block_timeout is %v, must be positive", c.BlockTimeout))
	}
	return errors.Join(errs...)
}

// Factory makes dispatch interceptors.
var Factory = channel.FactoryOf("dispatch", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// logInterval is the least time between two log lines about failures that
// nobody asked for.
const logInterval = 10 * time.Second

// Interceptor queues messages with the option Async, one queue and one
// goroutine per destination.
type Interceptor struct {
	cfg Config
	log *zap.Logger

	queued, sent, failed, refusedFull, dropped, unreported *channel.Counter

	mu       sync.Mutex
	budget   budget
	lanes    map[channel.UniqueID]*lane
	busy     atomic.Int64 // their number; one more from Stop on
	link     channel.Link // set by Start
	ctx      context.Context
	cancel   context.CancelFunc
	closing  bool
	drained  chan struct{}   // closed when closing and nothing is left
	working  int             // active lanes
	idle     []chan struct{} // to be closed when there is none
	lastLine time.Time
	silent   int64 // failures since lastLine

	workers sync.WaitGroup
}

// New makes a dispatch interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	d := &Interceptor{
		cfg:         c,
		log:         s.Logger,
		queued:      s.Metrics.Counter("dispatch_queued_total", "Messages queued, once per destination."),
		sent:        s.Metrics.Counter("dispatch_sent_total", "Queued messages that were sent."),
		failed:      s.Metrics.Counter("dispatch_failed_total", "Queued messages that failed."),
		refusedFull: s.Metrics.Counter("dispatch_refused_total", "Messages refused because the queue was full."),
		dropped:     s.Metrics.Counter("dispatch_dropped_total", "Messages dropped because the queue was full."),
		unreported:  s.Metrics.Counter("dispatch_unreported_failures_total", "Failed messages whose sender did not ask for the result."),
		budget:      budget{maxBytes: c.QueueBytes, maxMessages: c.QueueMessages},
		lanes:       map[channel.UniqueID]*lane{},
	}
	gauge := func(name, help string, read func(*budget) float64) {
		s.Metrics.Gauge(name, help, func() float64 {
			d.mu.Lock()
			defer d.mu.Unlock()
			return read(&d.budget)
		})
	}
	gauge("dispatch_queue_messages", "Messages queued or on their way.", func(b *budget) float64 { return float64(b.messages) })
	gauge("dispatch_queue_bytes", "Bytes queued or on their way.", func(b *budget) float64 { return float64(b.bytes) })
	return d, nil
}

// Descriptor implements channel.Interceptor.
func (d *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:     "dispatch",
		Flag:     channel.Async,
		Stateful: true,
		Provides: []string{channel.PropAsync},
		Promise:  "queues asynchronous messages, in order per destination; the result is reported once",
	}
}

// Start implements channel.Starter.
func (d *Interceptor) Start(_ context.Context, l channel.Link) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.link = l
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.drained = make(chan struct{})
	return nil
}

// Stop implements channel.Stopper: it sends what is queued as far as ctx
// allows; the rest fails.
func (d *Interceptor) Stop(ctx context.Context) error {
	d.mu.Lock()
	if d.link == nil || d.closing {
		d.mu.Unlock()
		return nil
	}
	d.closing = true
	d.busy.Add(1)
	if d.budget.messages == 0 {
		close(d.drained)
	}
	waiting := d.budget.stopWaiting()
	d.mu.Unlock()
	for _, w := range waiting {
		close(w.ready)
	}
	select {
	case <-d.drained:
	case <-ctx.Done():
	}
	d.cancel() // ends the sends that still wait; the workers fail the rest
	d.workers.Wait()
	d.mu.Lock()
	left := d.budget.messages
	d.mu.Unlock()
	if left > 0 {
		return fmt.Errorf("dispatch: stop: %d messages were still on their way: %w", left, ctx.Err())
	}
	return nil
}

// Flush implements channel.Flusher: it returns when the queue has been handed to
// the layer below. It does not wait for acknowledgements.
func (d *Interceptor) Flush(ctx context.Context) error {
	d.mu.Lock()
	if d.working == 0 {
		d.mu.Unlock()
		return nil
	}
	empty := make(chan struct{})
	d.idle = append(d.idle, empty)
	d.mu.Unlock()
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("dispatch: flush: %w", ctx.Err())
	}
}

// rest notes that a lane has nothing to do; d.mu is held.
func (d *Interceptor) rest(la *lane) {
	la.active = false
	if d.working--; d.working > 0 {
		return
	}
	for _, empty := range d.idle {
		close(empty)
	}
	d.idle = nil
}

// HandleSend implements channel.SendHandler.
func (d *Interceptor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if !m.Options.Has(channel.Async) {
		return l.Send(ctx, m)
	}
	if len(m.To) == 1 {
		if d.past(l, m) {
			return nil
		}
		return d.enqueueOne(ctx, m)
	}
	return d.enqueueMany(ctx, m)
}

// past sends m without the queue, if nothing is in it for the destination and
// the layer below takes the message without waiting.
func (d *Interceptor) past(l channel.Link, m *channel.Message) bool {
	below, ok := l.(channel.TrySender)
	if !ok || m.Done != nil || m.Options.Has(channel.UseAck) || d.busy.Load() > 0 && !d.free(m.To[0].ID) || !below.TrySend(m) {
		return false
	}
	d.queued.Inc()
	d.sent.Inc()
	return true
}

// free reports whether nothing is queued or on its way for a destination.
func (d *Interceptor) free(id channel.UniqueID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.closing && d.lanes[id] == nil
}

// enqueueOne is the usual case: one destination, no allocation.
func (d *Interceptor) enqueueOne(ctx context.Context, m *channel.Message) error {
	it := newItem(d, m, m.To[0])
	if m.Done != nil {
		it.done, it.orig = m.Done, m
	}
	err := d.enqueue(ctx, it, true)
	if err == nil {
		return nil // it may be sent already
	}
	it.release()
	if !d.refuse(err) {
		return channel.Failed(m.To, err)
	}
	if m.Done != nil {
		m.Done.Complete(m, channel.Failed(m.To, err))
	}
	return nil
}

// enqueueMany gives every destination a message of its own. It first serves
// all that have room, so that one full destination does not delay the others.
func (d *Interceptor) enqueueMany(ctx context.Context, m *channel.Message) error {
	if len(m.To) == 0 {
		return channel.ErrNoMembers
	}
	g := &group{pending: len(m.To) + 1}
	if m.Done != nil {
		g.orig, g.done = m, m.Done
	}
	var full []*item
	var refused, dropped []channel.Fault
	refuse := func(it *item, err error) {
		f := channel.Fault{Member: it.to[0], Err: err}
		it.release()
		if d.refuse(err) {
			dropped = append(dropped, f)
		} else {
			refused = append(refused, f)
		}
	}
	for _, to := range m.To {
		it := newItem(d, m, to)
		if m.Done != nil {
			it.group = g
		}
		switch err := d.enqueue(ctx, it, false); {
		case errors.Is(err, channel.ErrQueueFull) && d.cfg.OnFull == Block:
			full = append(full, it)
		case err != nil:
			refuse(it, err)
		}
	}
	if len(full) > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.cfg.BlockTimeout)
		defer cancel()
	}
	for _, it := range full {
		if err := d.enqueue(ctx, it, true); err != nil {
			refuse(it, err)
		}
	}
	switch {
	case len(refused) == len(m.To), m.Done == nil && len(refused) > 0:
		return &channel.SendError{Faults: refused}
	case m.Done != nil:
		refused = append(refused, dropped...)
		g.end(1+len(refused), refused)
	}
	return nil
}

// refuse counts a message that was not queued for one destination. It reports
// whether it is to be dropped silently.
func (d *Interceptor) refuse(err error) (drop bool) {
	switch {
	case !errors.Is(err, channel.ErrQueueFull):
		return false
	case d.cfg.OnFull == Drop:
		d.dropped.Inc()
		return true
	}
	d.refusedFull.Inc()
	return false
}

// enqueue puts it into the queue of its destination. When there is no room it
// returns ErrQueueFull, at once or, if it may wait and the policy says so, after
// the timeout. On an error the caller keeps it.
func (d *Interceptor) enqueue(ctx context.Context, it *item, mayWait bool) error {
	d.mu.Lock()
	if d.closing || d.link == nil {
		d.mu.Unlock()
		return channel.ErrClosed
	}
	la := d.lane(it.to[0])
	if !d.budget.take(la, it.size) {
		if d.cfg.OnFull != Block || !mayWait || it.size > d.cfg.QueueBytes {
			d.forgetIdle(la)
			d.mu.Unlock()
			if it.size > d.cfg.QueueBytes {
				return fmt.Errorf("%w: the message has %d bytes, the whole queue %d", channel.ErrQueueFull, it.size, d.cfg.QueueBytes)
			}
			return channel.ErrQueueFull
		}
		w := &waiter{lane: la, item: it, ready: make(chan struct{})}
		d.budget.wait(w)
		d.mu.Unlock()
		return d.await(ctx, w)
	}
	d.admit(la, it)
	d.mu.Unlock()
	return nil
}

// admit queues a message that has got its room; d.mu is held.
func (d *Interceptor) admit(la *lane, it *item) {
	d.queued.Inc()
	la.push(it)
	if !la.active {
		la.active = true
		d.working++
		d.workers.Add(1)
		go la.work()
	}
}

// await waits until the message of w has been queued.
func (d *Interceptor) await(ctx context.Context, w *waiter) error {
	t := time.NewTimer(d.cfg.BlockTimeout)
	defer t.Stop()
	var err error
	select {
	case <-w.ready:
	case <-t.C:
		err = fmt.Errorf("%w for %v", channel.ErrQueueFull, d.cfg.BlockTimeout)
	case <-ctx.Done():
		err = fmt.Errorf("%w: %w", channel.ErrQueueFull, ctx.Err())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.granted {
		return nil // maybe a moment after the timeout
	}
	if err == nil {
		return channel.ErrClosed // stopping
	}
	d.budget.leave(w)
	d.wake(d.budget.grant()) // it may have held up a smaller message
	d.forgetIdle(w.lane)
	return err
}

// wake queues the messages of waiters that have got room; d.mu is held. They do
// not do it themselves, so that the order stays.
func (d *Interceptor) wake(granted []*waiter) {
	for _, w := range granted {
		d.admit(w.lane, w.item)
		close(w.ready)
	}
}

// giveBack returns the room of messages and wakes those who wait for it; d.mu is held.
func (d *Interceptor) giveBack(la *lane, messages int, size int64) {
	d.wake(d.budget.give(la, messages, size))
	d.forgetIdle(la)
	if d.closing && d.budget.messages == 0 {
		select {
		case <-d.drained:
		default:
			close(d.drained)
		}
	}
}

// HandleMember implements channel.MemberHandler: nothing more can reach a
// member that has left, and a member that is lost below gets no second chance
// after a message to it has failed.
func (d *Interceptor) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	var gone *item
	d.mu.Lock()
	if la := d.lanes[ev.Member.ID]; la != nil {
		switch {
		case ev.Final():
			gone = la.takeAll()
		case ev.Kind == channel.MemberLost:
			la.doubtful = true
		case ev.Kind == channel.MemberAdded:
			la.doubtful = false
		}
	}
	d.mu.Unlock()
	failAll(gone, channel.ErrNotMember)
	return l.Announce(ctx, ev)
}

// lane returns the queue of a destination; d.mu is held.
func (d *Interceptor) lane(m channel.Member) *lane {
	la := d.lanes[m.ID]
	if la == nil {
		la = newLane(d, m.ID)
		d.lanes[m.ID] = la
		d.busy.Add(1)
	}
	return la
}

// forgetIdle drops a queue that nobody uses; d.mu is held.
func (d *Interceptor) forgetIdle(la *lane) {
	if !la.active && la.messages == 0 && la.waiting == 0 {
		if d.lanes[la.id] == la {
			delete(d.lanes, la.id)
			d.busy.Add(-1)
		}
	}
}

// nobodyAsked reports a failure to the log, as there is nobody else.
func (d *Interceptor) nobodyAsked(to channel.Member, err error) {
	d.unreported.Inc()
	now := time.Now()
	d.mu.Lock()
	d.silent++
	if now.Sub(d.lastLine) < logInterval {
		d.mu.Unlock()
		return
	}
	n := d.silent
	d.silent, d.lastLine = 0, now
	d.mu.Unlock()
	d.log.Warn("asynchronous messages failed", zap.Int64("messages", n), zap.Stringer("last_member", to), zap.NamedError("last_error", err))
}
