package order

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/internal/pool"
)

const (
	// heldOverhead is what an early message is charged beside its bytes.
	heldOverhead = 256
	// resync is after how many late messages in a row, each the next of the one
	// before, the sender is believed to count anew.
	resync = 16
)

// errGap is what the sender of a dropped message gets to hear.
var errGap = errors.New("order: the messages before it did not come in time")

// inbox brings the messages of each sender into order.
type inbox struct {
	cfg Config

	early, late, expired, dropped, overflow, restarts, untracked, refused *channel.Counter

	bytes    atomic.Int64 // of all early messages, with overhead
	messages atomic.Int64

	link    channel.Link // set by start
	ctx     context.Context
	cancel  context.CancelFunc
	workers sync.WaitGroup

	mu      sync.RWMutex
	senders map[channel.UniqueID]*sender
	stopped bool
}

// sender is the state of one sender. At any time at most one goroutine delivers
// its messages.
type sender struct {
	in   *inbox
	work func() // run, made once

	mu   sync.Mutex
	next int32 // the number that is due
	busy bool  // somebody delivers
	// ready are to be delivered at once, before all others; queue are those
	// that came too early, by number.
	ready, queue []*held
	bytes        int64
	flushing     bool          // nobody waits for missing messages
	changed      chan struct{} // or nil; closed when there is more room or nothing to do

	begun    time.Time        // when the present series began
	first    channel.UniqueID // the message with number 1 of it; zero if there was none
	lateNext int32
	lateRun  int
	used     time.Time // when a tick last found it moving
	moved    bool
}

// held is a message that waits.
type held struct {
	m      channel.Message
	buf    *[]byte
	size   int64
	number int32
	since  time.Time
	end    func(error) // never nil
}

func newInbox(c Config, m *channel.Metrics) *inbox {
	in := &inbox{
		cfg:       c,
		early:     m.Counter("order_early_total", "Messages that came before an earlier one, and waited."),
		late:      m.Counter("order_late_total", "Messages that came after their place had been given up; they were delivered at once."),
		expired:   m.Counter("order_expired_total", "Messages that waited in vain for those before them."),
		dropped:   m.Counter("order_dropped_total", "Messages that were dropped after waiting in vain."),
		overflow:  m.Counter("order_overflow_total", "Messages that waited no longer because a bound was reached."),
		restarts:  m.Counter("order_restarts_total", "Senders that began to count anew."),
		untracked: m.Counter("order_untracked_total", "Messages delivered as they came, because too many senders are known."),
		refused:   m.Counter("order_refused_total", "Received messages that were refused because they carry no number."),
		senders:   map[channel.UniqueID]*sender{},
	}
	m.Gauge("order_waiting_messages", "Messages that wait for earlier ones.", func() float64 { return float64(in.messages.Load()) })
	m.Gauge("order_waiting_bytes", "Bytes of those, with overhead.", func() float64 { return float64(in.bytes.Load()) })
	return in
}

func (in *inbox) start(l channel.Link) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.link = l
	in.ctx, in.cancel = context.WithCancel(context.Background())
}

// stop fails what still waits. It returns when no message is being delivered,
// or when ctx ends.
func (in *inbox) stop(ctx context.Context) error {
	in.mu.Lock()
	in.stopped = true
	if in.cancel != nil {
		in.cancel()
	}
	senders := in.all()
	in.mu.Unlock()
	for _, s := range senders {
		s.mu.Lock()
		var list []*held
		list, s.ready, s.queue = append(s.ready, s.queue...), nil, nil
		for _, h := range list {
			s.account(h, -1)
		}
		s.wake()
		s.mu.Unlock()
		for _, h := range list {
			h.finish(channel.ErrClosed)
		}
	}
	ended := make(chan struct{})
	go func() { // ends with the workers
		in.workers.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("order: stop: messages are still being delivered: %w", ctx.Err())
	}
}

// all lists the senders; in.mu is held.
func (in *inbox) all() []*sender {
	list := make([]*sender, 0, len(in.senders))
	for _, s := range in.senders {
		list = append(list, s)
	}
	return list
}

// sender returns the state of a sender, or nil if there are too many.
func (in *inbox) sender(id channel.UniqueID) *sender {
	in.mu.RLock()
	s := in.senders[id]
	in.mu.RUnlock()
	if s != nil {
		return s
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if s = in.senders[id]; s != nil {
		return s
	}
	if in.link == nil || in.stopped || len(in.senders) >= maxPeers && !in.dropIdle() {
		return nil
	}
	now := time.Now()
	s = &sender{in: in, next: 1, begun: now, used: now}
	s.work = s.run
	in.senders[id] = s
	return s
}

// dropIdle forgets the longest unused of a few random senders that nothing is
// kept of; in.mu is held.
func (in *inbox) dropIdle() bool {
	var oldest channel.UniqueID
	var when time.Time
	n, found := 0, false
	for id, s := range in.senders {
		s.mu.Lock()
		if s.idle() && (!found || s.used.Before(when)) {
			oldest, when, found = id, s.used, true
		}
		s.mu.Unlock()
		if n++; n == 16 {
			break
		}
	}
	delete(in.senders, oldest)
	return found
}

// idle reports whether nothing of the sender is kept or being delivered; s.mu is
// held.
func (s *sender) idle() bool { return !s.busy && len(s.ready) == 0 && len(s.queue) == 0 }

// receive delivers m if it is its turn, or keeps it.
func (in *inbox) receive(ctx context.Context, l channel.Link, m *channel.Message, number int32) error {
	s := in.sender(m.From.ID)
	if s == nil {
		in.untracked.Inc()
		return l.Deliver(ctx, m)
	}
	s.mu.Lock()
	for {
		s.moved = true
		if number-s.next < 0 && !s.restarted(m, number) {
			s.mu.Unlock()
			in.late.Inc()
			return l.Deliver(ctx, m)
		}
		s.lateRun = 0
		if number == s.next && !s.busy {
			break
		}
		size := int64(len(m.Body)) + heldOverhead
		if s.room(size) {
			s.keep(m, number, size)
			s.mu.Unlock()
			return nil
		}
		if !s.busy && len(s.queue) == 0 { // there is no room at all: it cannot wait
			in.overflow.Inc()
			s.next = number
			break
		}
		if !s.busy { // make room
			s.giveUp(s.queue[0])
			in.overflow.Inc()
			s.begin()
		}
		ch := s.signal()
		s.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			return fmt.Errorf("order: %w: the messages before it are still being delivered: %w", channel.ErrQueueFull, ctx.Err())
		}
		s.mu.Lock()
	}
	if number == 1 {
		s.first = m.ID
	}
	s.next++
	s.busy = true
	s.mu.Unlock()
	err := l.Deliver(ctx, m)
	s.done()
	return err
}

// done ends the delivery of a message in the goroutine that it came in; what has
// become due meanwhile is delivered by another one.
func (s *sender) done() {
	s.mu.Lock()
	s.busy = false
	if len(s.ready) > 0 || len(s.queue) > 0 {
		s.begin()
	}
	s.wake()
	s.mu.Unlock()
}

// begin starts a goroutine that delivers what is due, if there is something;
// s.mu is held and nobody delivers.
func (s *sender) begin() {
	if len(s.ready) == 0 && !s.due(time.Now()) {
		return
	}
	s.busy = true
	s.in.workers.Add(1)
	go s.work()
}

// due reports whether the first message of the queue has its turn; s.mu is held.
func (s *sender) due(now time.Time) bool {
	if len(s.queue) == 0 {
		return false
	}
	h := s.queue[0]
	return h.number-s.next <= 0 || s.flushing || now.Sub(h.since) >= s.in.cfg.Expire
}

// run delivers what is due, and ends when nothing is.
func (s *sender) run() {
	defer s.in.workers.Done()
	for {
		s.mu.Lock()
		h, deliver := s.take()
		if h == nil {
			s.busy = false
			if len(s.queue) == 0 {
				s.flushing = false
			}
			s.wake()
			s.mu.Unlock()
			return
		}
		s.wake()
		s.mu.Unlock()
		if !deliver {
			s.in.dropped.Inc()
			h.finish(errGap)
			continue
		}
		h.finish(s.in.link.Deliver(s.in.ctx, &h.m))
	}
}

// take returns the next message that is due and whether it is to be delivered;
// s.mu is held.
func (s *sender) take() (h *held, deliver bool) {
	if len(s.ready) > 0 {
		h, s.ready = s.ready[0], s.ready[1:]
		s.account(h, -1)
		return h, true
	}
	if !s.due(time.Now()) {
		return nil, false
	}
	h = s.queue[0]
	in := s.in
	deliver = true
	if h.number-s.next > 0 {
		in.expired.Inc()
		deliver = in.cfg.ForwardExpired || s.flushing
	}
	s.queue[0], s.queue = nil, s.queue[1:]
	if h.number-s.next >= 0 {
		s.next = h.number + 1
	}
	if h.number == 1 {
		s.first = h.m.ID
	}
	s.account(h, -1)
	return h, deliver
}

// giveUp stops waiting for what should have come before h, the first of the
// queue; s.mu is held.
func (s *sender) giveUp(h *held) { h.since = time.Time{} }

// restarted looks at a number that is not due any more. It reports whether the
// sender counts anew; then the number is due, or early, after all. s.mu is held.
func (s *sender) restarted(m *channel.Message, number int32) bool {
	switch {
	case number == 1 && s.first == m.ID: // the same message again
		return false
	case number == 1 && (!s.first.IsZero() || time.Since(s.begun) >= 2*s.in.cfg.Expire):
	default:
		if number != s.lateNext {
			s.lateRun = 0
		}
		s.lateNext = number + 1
		if s.lateRun++; s.lateRun < resync {
			return false
		}
	}
	s.in.restarts.Inc()
	s.ready, s.queue = append(s.ready, s.queue...), nil // of the old series
	s.next, s.first, s.begun, s.lateRun = number, channel.UniqueID{}, time.Now(), 0
	if !s.busy {
		s.begin()
	}
	return true
}

// room reports whether another message may wait; s.mu is held.
func (s *sender) room(size int64) bool {
	c := &s.in.cfg
	return len(s.queue)+len(s.ready) < c.MaxQueue && s.bytes+size <= c.QueueSize && s.in.bytes.Load()+size <= c.TotalSize
}

// keep puts a copy of m into the queue; s.mu is held.
func (s *sender) keep(m *channel.Message, number int32, size int64) {
	h := &held{m: *m, buf: pool.Get(len(m.Body)), size: size, number: number, since: time.Now(), end: m.Defer()}
	*h.buf = append(*h.buf, m.Body...)
	h.m.Body, h.m.Later = *h.buf, nil
	if number != s.next {
		s.in.early.Inc()
	}
	at := len(s.queue)
	if at > 0 && s.queue[at-1].number-number > 0 {
		at, _ = slices.BinarySearchFunc(s.queue, number, func(h *held, n int32) int { return int(h.number) - int(n) })
		// Numbers may wrap around: then the search has gone wrong.
		if at > 0 && s.queue[at-1].number-number > 0 || at < len(s.queue) && s.queue[at].number-number < 0 {
			at = slices.IndexFunc(s.queue, func(h *held) bool { return h.number-number > 0 })
		}
	}
	s.queue = slices.Insert(s.queue, at, h)
	s.account(h, 1)
	if !s.busy {
		s.begin() // an older one may have waited too long
	}
}

// account notes that a message waits or does not wait any more; s.mu is held.
func (s *sender) account(h *held, sign int64) {
	s.bytes += sign * h.size
	s.in.bytes.Add(sign * h.size)
	s.in.messages.Add(sign)
}

// finish ends a message that has waited.
func (h *held) finish(err error) {
	pool.Put(h.buf)
	h.buf, h.m.Body = nil, nil
	h.end(err)
}

// signal returns a channel that is closed at the next change; s.mu is held.
func (s *sender) signal() <-chan struct{} {
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

// wake tells those who wait; s.mu is held.
func (s *sender) wake() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// flush delivers everything that waits, without what is missing.
func (in *inbox) flush(ctx context.Context) error {
	in.mu.RLock()
	senders := in.all()
	in.mu.RUnlock()
	for _, s := range senders {
		s.mu.Lock()
		for !s.idle() {
			s.flushing = true
			if !s.busy {
				s.begin()
			}
			ch := s.signal()
			s.mu.Unlock()
			select {
			case <-ch:
			case <-ctx.Done():
				return fmt.Errorf("order: flush: %w", ctx.Err())
			}
			s.mu.Lock()
		}
		s.flushing = false
		s.mu.Unlock()
	}
	return nil
}

// tick gives up waiting where it has taken too long, and forgets senders that
// have been silent for long and are in no view.
func (in *inbox) tick(now time.Time, v channel.View) {
	in.mu.RLock()
	senders := in.all()
	in.mu.RUnlock()
	old := map[*sender]bool{}
	for _, s := range senders {
		s.mu.Lock()
		if !s.busy {
			s.begin()
		}
		if s.moved {
			s.moved, s.used = false, now
		}
		if s.idle() && now.Sub(s.used) >= idle {
			old[s] = true
		}
		s.mu.Unlock()
	}
	if len(old) == 0 {
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	for id, s := range in.senders {
		if !old[s] {
			continue
		}
		if _, there := v.Get(id); !there {
			delete(in.senders, id)
		}
	}
}
