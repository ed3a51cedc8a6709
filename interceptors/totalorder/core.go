package totalorder

import (
	"bytes"
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/internal/flight"
	"github.com/longhouse-go/longhouse/interceptors/internal/pool"
)

const (
	// heldOverhead is what a waiting message is charged beside its bytes.
	heldOverhead = 512
	// maxSkew is how far ahead of this node's clock a stamp may be.
	maxSkew = 24 * time.Hour
	// maxSenders bounds the senders that something is remembered of.
	maxSenders = 4096
	// recent is how many delivered messages of a sender are remembered.
	recent = 64
	// maxMemory is how many decisions are remembered, for who asks again.
	maxMemory = 8192
	// maxOutbox bounds the entries that wait to be sent to one member.
	maxOutbox = 1 << 16
	// leaveGrace is how long the undecided messages of a member that has left
	// are kept: its goodbye may overtake its decisions.
	leaveGrace = 2 * time.Second
	// idle is how long a silent sender is remembered.
	idle = 10 * time.Minute
)

// Reasons why a message is refused, or dropped after it had been taken.
var (
	errClock     = fmt.Errorf("totalorder: %w: its stamp lies more than %v in the future; check the clocks of the nodes", channel.ErrBadMessage, maxSkew)
	errLate      = errors.New("totalorder: the message came after its place in the order had passed")
	errUndecided = errors.New("totalorder: the sender has not decided the place of the message")
)

// stamp is a place in the order. Stamps of different messages differ.
type stamp struct {
	time    uint64
	id      channel.UniqueID // of the sender
	epoch   uint64
	ordinal uint64
}

func (a stamp) compare(b stamp) int {
	if c := cmp.Compare(a.time, b.time); c != 0 {
		return c
	}
	if c := bytes.Compare(a.id[:], b.id[:]); c != 0 {
		return c
	}
	return cmp.Or(cmp.Compare(a.epoch, b.epoch), cmp.Compare(a.ordinal, b.ordinal))
}

// pending is a message that waits for its turn at a receiver.
type pending struct {
	stamp
	many, decided bool
	before        uint64
	previous      uint64 // the message to be waited for; 0 for none
	clock         uint64 // of the sender when it sent the message
	m             channel.Message
	buf           *[]byte // backs m.Body; nil if somebody else's does
	size          int64
	since, asked  time.Time
	end           func(error) // never nil
	s             *sender
	index         int // in the heap; -1 when it is not there any more
}

// sender is what a receiver remembers of one sender. A layer that was started
// anew is another one.
type sender struct {
	key     senderKey
	member  channel.Member
	waiting map[uint64]*pending // by ordinal
	// list holds, by ordinal, undecided messages and what has to wait for them.
	list     []*pending
	raise    uint64 // no later message of the list has a lower time
	floor    uint64 // all lower ordinals were sent before one that was delivered
	last     [recent]uint64
	lastAt   int
	bytes    int64
	used     time.Time
	deadline time.Time // of what is undecided; zero for none
}

type senderKey struct {
	id    channel.UniqueID
	epoch uint64
}

// outgoing is an own message with several destinations, until it is decided.
type outgoing struct {
	c       *core
	ordinal uint64
	to      []channel.Member // but the local one
	waiting []bool           // for the proposal of to[i]
	left    int              // how many of them
	max     uint64           // of the proposals
	born    time.Time
	final   uint64
	self    *pending // the local copy

	done  channel.Completion // of the application
	orig  *channel.Message
	quiet bool
}

// decision is remembered for who asks again.
type decision struct{ ordinal, time uint64 }

// outbox holds the entries for one member. A goroutine sends them.
type outbox struct {
	to      channel.Member
	entries []entry
}

// core is the protocol: Skeen's agreement, in which every destination proposes a
// time for a message and the sender takes the latest.
type core struct {
	cfg Config
	log *zap.Logger

	ordered, delivered, lost, late, duplicates, expired, without, unreported, resent *channel.Counter
	refusedMalformed, refusedClock, refusedFull, refusedSenders                      *channel.Counter

	epoch   uint64
	link    channel.Link // set by start
	ctx     context.Context
	cancel  context.CancelFunc
	workers sync.WaitGroup
	wake    chan struct{} // capacity 1: the deliverer may have work

	mu      sync.Mutex
	running bool
	clock   uint64 // the latest time given or seen

	// Sending.
	ordinal  uint64
	active   []bool // whether the sending of ordinal firstActive+i has ended
	first    uint64 // firstActive
	out      map[uint64]*outgoing
	queue    []*outgoing // by ordinal
	lastTime uint64      // of the last decision
	memory   []decision
	lastTo   map[channel.UniqueID]uint64 // the last ordinal sent to a member
	slow     map[channel.UniqueID]bool   // members that are not waited for
	outboxes map[channel.UniqueID]*outbox

	// Receiving.
	senders map[senderKey]*sender
	heap    pendingHeap
	last    stamp // of what was delivered last
	bytes   int64
	pool    sync.Pool     // of *pending
	busy    bool          // a message is being delivered
	changed chan struct{} // or nil; closed at the next change
}

func newCore(cfg Config, s channel.Settings) *core {
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	count := s.Metrics.Counter
	refused := func(reason string) *channel.Counter {
		return count("totalorder_refused_total", "Received messages that were refused.", "reason", reason)
	}
	c := &core{
		cfg: cfg, log: s.Logger,
		ordered:          count("totalorder_sent_total", "Messages sent with a place in the order."),
		delivered:        count("totalorder_delivered_total", "Messages delivered in order."),
		lost:             count("totalorder_dropped_total", "Received messages that were dropped, because their sender did not decide or had gone."),
		late:             refused("late"),
		duplicates:       refused("duplicate"),
		expired:          count("totalorder_expired_total", "Proposals that were not waited for any longer."),
		without:          count("totalorder_slow_members_total", "Times that a member was no longer waited for."),
		unreported:       count("totalorder_unreported_failures_total", "Failed asynchronous messages whose sender did not ask for the result."),
		resent:           count("totalorder_reminders_total", "Proposals sent again because no decision came."),
		refusedMalformed: refused("malformed"),
		refusedClock:     refused("clock"),
		refusedFull:      refused("full"),
		refusedSenders:   refused("senders"),
		wake:             make(chan struct{}, 1),
		first:            1,
		out:              map[uint64]*outgoing{},
		memory:           make([]decision, maxMemory),
		lastTo:           map[channel.UniqueID]uint64{},
		slow:             map[channel.UniqueID]bool{},
		outboxes:         map[channel.UniqueID]*outbox{},
		senders:          map[senderKey]*sender{},
	}
	gauge := func(name, help string, read func() float64) {
		s.Metrics.Gauge(name, help, func() float64 {
			c.mu.Lock()
			defer c.mu.Unlock()
			return read()
		})
	}
	gauge("totalorder_waiting_messages", "Received messages that wait for their turn.", func() float64 { return float64(len(c.heap)) })
	gauge("totalorder_waiting_bytes", "Bytes of those, with overhead.", func() float64 { return float64(c.bytes) })
	gauge("totalorder_undecided_messages", "Own messages that are not decided.", func() float64 { return float64(len(c.out)) })
	return c
}

func (c *core) start(l channel.Link) {
	id := channel.NewUniqueID()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range id[:8] {
		c.epoch = c.epoch<<8 | uint64(b)
	}
	c.link, c.running = l, true
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.workers.Add(1)
	go c.deliver()
}

// stop decides what is undecided, and fails what still waits. It returns when all
// goroutines have ended, or with ctx.
func (c *core) stop(ctx context.Context) error {
	c.settleAll(ctx)
	c.mu.Lock()
	if !c.running {
		c.mu.Unlock()
		return nil
	}
	c.running = false
	c.cancel()
	dropped := append(pendingHeap(nil), c.heap...)
	c.heap, c.bytes, c.senders, c.outboxes = nil, 0, map[senderKey]*sender{}, map[channel.UniqueID]*outbox{}
	c.out, c.queue = map[uint64]*outgoing{}, nil
	c.signal()
	c.mu.Unlock()
	for _, p := range dropped {
		p.finish(channel.ErrClosed)
	}
	ended := make(chan struct{})
	go func() { // ends with the workers
		c.workers.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("totalorder: stop: a message is still being delivered: %w", ctx.Err())
	}
}

// flush waits until all that has its place has been delivered. What is undecided
// stays: its decision cannot come while a swap holds up what is received.
func (c *core) flush(ctx context.Context) error {
	return c.until(ctx, func() bool { return !c.busy && (len(c.heap) == 0 || !c.heap[0].decided) })
}

// until waits until a condition holds, which is asked for with c.mu held, or the
// layer has stopped.
func (c *core) until(ctx context.Context, cond func() bool) error {
	c.mu.Lock()
	for c.running && !cond() {
		ch := c.changes()
		c.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			return fmt.Errorf("totalorder: flush: %w", ctx.Err())
		}
		c.mu.Lock()
	}
	c.mu.Unlock()
	return nil
}

// settleAll decides all own messages with the proposals that have come, and
// waits a while until the others have been told.
func (c *core) settleAll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.DecideTimeout)
	defer cancel()
	c.mu.Lock()
	for _, o := range c.queue {
		for i := range o.to {
			o.without(i)
		}
	}
	late := c.advance()
	c.mu.Unlock()
	finishAll(late, errLate)
	_ = c.until(ctx, func() bool { return len(c.outboxes) == 0 }) // else the others drop them in time
}

// changes returns a channel that is closed at the next change; c.mu is held.
func (c *core) changes() <-chan struct{} {
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return c.changed
}

// signal tells those who wait for a change, and the deliverer; c.mu is held.
func (c *core) signal() {
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// now returns a time later than all that were given or seen: microseconds since
// 1970, or more; c.mu is held.
func (c *core) now() uint64 {
	c.clock = max(c.clock+1, uint64(time.Now().UnixMicro()))
	return c.clock
}

// see takes note of somebody's time. It reports whether that can be true; c.mu
// is held.
func (c *core) see(t uint64) bool {
	if t > uint64(time.Now().Add(maxSkew).UnixMicro()) {
		return false
	}
	c.clock = max(c.clock, t)
	return true
}

// begin gives an own message its ordinal. For several destinations it notes
// whose proposals to wait for. It waits while too many are undecided.
func (c *core) begin(ctx context.Context, m *channel.Message, to []channel.Member, self bool) (request, *outgoing, error) {
	many := len(to) > 1 || self && len(to) > 0
	c.mu.Lock()
	for c.running && many && len(c.out) >= c.cfg.MaxUndecided {
		ch := c.changes()
		c.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			return request{}, nil, fmt.Errorf("totalorder: %w: %d own messages are undecided: %w", channel.ErrQueueFull, c.cfg.MaxUndecided, ctx.Err())
		}
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	if !c.running {
		return request{}, nil, channel.ErrClosed
	}
	c.ordered.Inc()
	c.ordinal++
	c.active = append(c.active, false)
	r := request{epoch: c.epoch, ordinal: c.ordinal, before: c.first, clock: c.clock, options: m.Options & restored, many: many}
	if !many && len(to) == 1 {
		r.previous = c.lastTo[to[0].ID]
	}
	for i := range to {
		if _, known := c.lastTo[to[i].ID]; !known && len(c.lastTo) >= maxSenders {
			clear(c.lastTo)
		}
		c.lastTo[to[i].ID] = r.ordinal
	}
	if !many {
		return r, nil, nil
	}
	o := &outgoing{c: c, ordinal: c.ordinal, to: slices.Clone(to), waiting: make([]bool, len(to)), born: time.Now()}
	for i := range to {
		if !c.slow[to[i].ID] {
			o.waiting[i] = true
			o.left++
		}
	}
	if o.left == 0 && !self { // somebody has to propose
		o.waiting[0], o.left = true, 1
	}
	c.out[o.ordinal] = o
	c.queue = append(c.queue, o)
	return r, o, nil
}

// sent notes that the call that sends an own message has ended. Nobody is to
// wait for one that failed.
func (c *core) sent(ordinal uint64, to []channel.Member, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range to {
		if err != nil && c.lastTo[to[i].ID] == ordinal {
			delete(c.lastTo, to[i].ID)
		}
	}
	c.active[ordinal-c.first] = true
	for len(c.active) > 0 && c.active[0] {
		c.active = c.active[1:]
		c.first++
	}
}

// failed notes that an own message did not reach some members: their proposals
// will not come.
func (o *outgoing) failed(err error) {
	var se *channel.SendError
	all := !errors.As(err, &se)
	c := o.c
	c.mu.Lock()
	for i := range o.to {
		if all || slices.ContainsFunc(se.Faults, func(f channel.Fault) bool { return f.Member.ID == o.to[i].ID }) {
			o.without(i)
		}
	}
	dropped := c.advance()
	c.mu.Unlock()
	finishAll(dropped, errLate)
}

// without stops waiting for the proposal of to[i]; c.mu is held.
func (o *outgoing) without(i int) {
	if o.waiting[i] {
		o.waiting[i] = false
		o.left--
	}
}

// Complete implements channel.Completion for the layers below.
func (o *outgoing) Complete(_ *channel.Message, err error) {
	if err != nil {
		o.failed(err)
	}
	switch {
	case o.done != nil:
		o.done.Complete(o.orig, err)
	case err != nil && o.quiet:
		o.c.unreported.Inc()
	}
}

// quietEnd counts the failures of messages that nobody asks for.
type quietEnd core

// Complete implements channel.Completion.
func (q *quietEnd) Complete(_ *channel.Message, err error) {
	if err != nil {
		q.unreported.Inc()
	}
}

// own puts the local copy of an own message into the queue. With SyncAck the
// message ends when that has been processed.
func (c *core) own(r request, o *outgoing, p *flight.Part, options channel.Options) {
	part := p
	h := &pending{many: r.many, before: r.before, m: part.Message}
	h.m.Options, h.m.To, h.m.Done, h.m.Later = options, nil, nil, nil
	complete := func(err error) {
		if err != nil {
			err = channel.Failed(part.Message.To, err)
		}
		part.Complete(&part.Message, err)
	}
	h.end = complete
	if !options.Has(channel.SyncAck) {
		h.buf = pool.Get(len(h.m.Body))
		*h.buf = append(*h.buf, h.m.Body...)
		h.m.Body, h.end = *h.buf, func(error) {}
	}
	c.mu.Lock()
	s, err := c.sender(part.Message.From, r.epoch)
	var dropped []*pending
	if err == nil {
		c.keep(s, h, r)
		switch {
		case o == nil:
		case o.final != 0:
			dropped = c.decide(h, o.final)
		default:
			o.self, o.max = h, max(o.max, h.time)
			dropped = c.advance()
		}
		c.signal()
	}
	c.mu.Unlock()
	finishAll(dropped, errLate)
	if err != nil {
		complete(err)
	} else if !options.Has(channel.SyncAck) {
		complete(nil)
	}
}

// advance decides own messages in the order in which they were sent, as far as
// all proposals have come. It returns what is too late at this node; c.mu is
// held.
func (c *core) advance() (dropped []*pending) {
	n := 0
	for ; n < len(c.queue) && c.queue[n].left == 0; n++ {
		o := c.queue[n]
		if o.max == 0 {
			o.max = c.now()
		}
		o.final = max(o.max, c.lastTime+1)
		c.lastTime = o.final
		c.clock = max(c.clock, o.final)
		c.memory[o.ordinal%maxMemory] = decision{o.ordinal, o.final}
		delete(c.out, o.ordinal)
		for i := range o.to {
			c.tell(o.to[i], entry{decide, c.epoch, o.ordinal, o.final})
		}
		if o.self != nil {
			dropped = append(dropped, c.decide(o.self, o.final)...)
		}
		c.queue[n] = nil
	}
	if n > 0 {
		c.queue = c.queue[n:]
		c.signal()
	}
	return dropped
}

// tell puts an entry into the outbox of a member; c.mu is held.
func (c *core) tell(to channel.Member, e entry) {
	if !c.running {
		return
	}
	b := c.outboxes[to.ID]
	if b == nil {
		b = &outbox{to: to}
		c.outboxes[to.ID] = b
		c.workers.Add(1)
		go c.post(b)
	}
	if len(b.entries) < maxOutbox { // else it will be asked for again
		b.entries = append(b.entries, e)
	}
}

// post sends what is in an outbox, as much at a time as there is, and ends when
// it is empty.
func (c *core) post(b *outbox) {
	defer c.workers.Done()
	var body []byte
	to := []channel.Member{b.to}
	for {
		c.mu.Lock()
		n := min(len(b.entries), maxEntries)
		if n == 0 || !c.running {
			if c.outboxes[b.to.ID] == b {
				delete(c.outboxes, b.to.ID)
			}
			c.signal()
			c.mu.Unlock()
			return
		}
		body = appendControl(body[:0], b.entries[:n], c.clock)
		b.entries = append(b.entries[:0], b.entries[n:]...)
		l, ctx := c.link, c.ctx
		c.mu.Unlock()
		// What fails is asked for again by the other side.
		_ = l.Send(ctx, &channel.Message{
			ID: channel.NewUniqueID(), From: l.Local(), To: to,
			Options: channel.SendAck | channel.TotalOrder, Time: time.Now().UnixMilli(), Body: body,
		})
	}
}

// sender returns what is remembered of a sender; c.mu is held.
func (c *core) sender(m channel.Member, epoch uint64) (*sender, error) {
	key := senderKey{m.ID, epoch}
	s := c.senders[key]
	if s == nil {
		if len(c.senders) >= maxSenders && !c.dropIdle() {
			c.refusedSenders.Inc()
			return nil, fmt.Errorf("totalorder: %w: messages of %d senders wait", channel.ErrQueueFull, len(c.senders))
		}
		s = &sender{key: key, waiting: map[uint64]*pending{}}
		c.senders[key] = s
	}
	s.member, s.used = m, time.Now()
	return s, nil
}

// dropIdle forgets one of a few random senders of which nothing waits; c.mu is
// held.
func (c *core) dropIdle() bool {
	n := 0
	for key, s := range c.senders {
		if len(s.waiting) == 0 {
			delete(c.senders, key)
			return true
		}
		if n++; n == 16 {
			break
		}
	}
	return false
}

// request takes a message of another node.
func (c *core) request(ctx context.Context, l channel.Link, m *channel.Message, r request) error {
	size := int64(len(m.Body)) + heldOverhead
	var timer *time.Timer
	c.mu.Lock()
	for {
		if !c.running {
			c.mu.Unlock()
			return channel.ErrClosed
		}
		if !c.see(r.clock) {
			c.mu.Unlock()
			c.refusedClock.Inc()
			return errClock
		}
		s, err := c.sender(m.From, r.epoch)
		if err == nil && s.had(r.ordinal) {
			c.mu.Unlock()
			c.duplicates.Inc()
			return nil
		}
		if err == nil && r.ordinal < s.floor {
			c.late.Inc()
			err = errLate
		}
		if err != nil {
			c.mu.Unlock()
			return err
		}
		if !r.many && len(c.heap) == 0 && !c.busy && len(s.list) == 0 && s.seen(r.previous) {
			return c.straight(ctx, l, s, m, r)
		}
		if len(c.heap) < c.cfg.QueueMessages && c.bytes+size <= c.cfg.QueueSize && s.bytes+size <= c.cfg.SenderSize {
			c.take(s, m, r)
			c.signal()
			c.mu.Unlock()
			return nil
		}
		// Room comes when the application goes on; a decision that is missing
		// may come on this very connection.
		wait := c.busy || len(c.heap) > 0 && c.heap[0].decided
		ch := c.changes()
		c.mu.Unlock()
		if timer == nil {
			timer = time.NewTimer(c.cfg.BlockTimeout)
			defer timer.Stop()
		}
		full := !wait
		if wait {
			select {
			case <-ch:
			case <-timer.C:
				full = true
			case <-ctx.Done():
				full = true
			}
		}
		if full {
			c.mu.Lock()
			s.remember(r.ordinal) // nobody waits for it
			c.mu.Unlock()
			c.refusedFull.Inc()
			return fmt.Errorf("totalorder: %w: received messages wait for their turn", channel.ErrQueueFull)
		}
		c.mu.Lock()
	}
}

// straight delivers a message that nobody else has to agree on, and that
// nothing waits before, in the goroutine that it came in. It is called with c.mu
// held, and releases it.
func (c *core) straight(ctx context.Context, l channel.Link, s *sender, m *channel.Message, r request) error {
	at := stamp{max(s.raise, r.clock+1, c.last.time), s.key.id, s.key.epoch, r.ordinal}
	if at.compare(c.last) <= 0 {
		at.time++
	}
	c.clock, c.last, c.busy = max(c.clock, at.time), at, true
	s.raise, s.floor = at.time, max(s.floor, r.before)
	s.remember(r.ordinal)
	c.mu.Unlock()
	c.delivered.Inc()
	err := l.Deliver(ctx, m)
	c.mu.Lock()
	c.busy = false
	if c.changed != nil || len(c.heap) > 0 {
		c.signal()
	}
	c.mu.Unlock()
	return err
}

// had reports whether a message has come before; c.mu is held.
func (s *sender) had(ordinal uint64) bool {
	return s.waiting[ordinal] != nil || slices.Contains(s.last[:], ordinal)
}

// seen reports whether a message has come, or cannot be waited for; c.mu is held.
func (s *sender) seen(ordinal uint64) bool {
	return ordinal == 0 || ordinal < s.floor || s.had(ordinal)
}

// take keeps a copy of a received message; c.mu is held.
func (c *core) take(s *sender, m *channel.Message, r request) {
	p, ok := c.pool.Get().(*pending)
	if !ok {
		p = new(pending)
	}
	p.many, p.before, p.m, p.buf, p.end = r.many, r.before, *m, pool.Get(len(m.Body)), m.Defer()
	*p.buf = append(*p.buf, m.Body...)
	p.m.Body, p.m.Later = *p.buf, nil
	c.keep(s, p, r)
	if p.many {
		c.tell(s.member, entry{propose, r.epoch, r.ordinal, p.time})
	}
}

// keep puts a message into the queue, with a stamp that is final if no other
// member has to agree; c.mu is held.
func (c *core) keep(s *sender, p *pending, r request) {
	p.stamp = stamp{c.now(), s.key.id, s.key.epoch, r.ordinal}
	p.s, p.since, p.clock, p.previous = s, time.Now(), r.clock, r.previous
	p.asked, p.size = p.since, int64(len(p.m.Body))+heldOverhead
	s.waiting[r.ordinal] = p
	s.bytes += p.size
	c.bytes += p.size
	heap.Push(&c.heap, p)
	at := len(s.list)
	for at > 0 && s.list[at-1].ordinal > r.ordinal {
		at--
	}
	s.list = slices.Insert(s.list, at, p)
	c.settle(s)
}

// settle makes messages final that waited for earlier ones of their sender;
// c.mu is held.
func (c *core) settle(s *sender) {
	n := 0
	for ; n < len(s.list); n++ {
		p := s.list[n]
		if !p.decided && (p.many || !s.seen(p.previous)) {
			break
		}
		if !p.decided {
			// Nobody else has to agree: the earliest place that is left after
			// all that the sender knew of.
			p.time, p.decided = max(s.raise, p.clock+1, c.last.time), true
			if p.stamp.compare(c.last) <= 0 {
				p.time++
			}
			heap.Fix(&c.heap, p.index)
		}
		s.raise = max(s.raise, p.time)
		s.list[n] = nil
	}
	s.list = s.list[n:]
}

// decide gives a message its final time. If that has passed here already the
// message is dropped: it is returned; c.mu is held.
func (c *core) decide(p *pending, t uint64) []*pending {
	if p.decided || p.index < 0 {
		return nil
	}
	final := p.stamp
	final.time = t
	if final.compare(c.last) <= 0 {
		c.late.Inc()
		c.remove(p)
		return []*pending{p}
	}
	p.stamp, p.decided = final, true
	heap.Fix(&c.heap, p.index)
	c.settle(p.s)
	return nil
}

// remove takes a message out of the queue; c.mu is held.
func (c *core) remove(p *pending) {
	heap.Remove(&c.heap, p.index)
	c.forget(p)
	if !p.decided {
		p.decided, p.time = true, 0
		c.settle(p.s)
	}
}

// forget takes a message that has left the heap off the books; c.mu is held.
func (c *core) forget(p *pending) {
	s := p.s
	delete(s.waiting, p.ordinal)
	s.bytes -= p.size
	c.bytes -= p.size
	s.remember(p.ordinal)
}

// remember notes that a message has ended; c.mu is held.
func (s *sender) remember(ordinal uint64) {
	s.last[s.lastAt] = ordinal
	s.lastAt = (s.lastAt + 1) % recent
}

// dropUndecided takes out what a sender has not decided; c.mu is held.
func (c *core) dropUndecided(s *sender) (dropped []*pending) {
	if s.key == c.ownKey() {
		return nil
	}
	for _, p := range s.waiting {
		if p.many && !p.decided {
			dropped = append(dropped, p)
		}
	}
	for _, p := range dropped {
		c.lost.Inc()
		c.remove(p)
	}
	if len(dropped) > 0 {
		c.signal()
	}
	return dropped
}

// ownKey is the key under which own messages wait; c.mu is held.
func (c *core) ownKey() senderKey { return senderKey{c.link.Local().ID, c.epoch} }

// control handles what another member says about requests.
func (c *core) control(from channel.Member, entries []entry, clock uint64) error {
	var late, forgotten []*pending
	bad := false
	c.mu.Lock()
	if !c.running {
		c.mu.Unlock()
		return channel.ErrClosed
	}
	bad = !c.see(clock)
	for _, e := range entries {
		if bad {
			break
		}
		if bad = !c.see(e.stamp); bad {
			break
		}
		switch e.what {
		case propose:
			delete(c.slow, from.ID)
			c.proposed(from, e)
		case decide:
			if s := c.senders[senderKey{from.ID, e.epoch}]; s != nil && s.waiting[e.ordinal] != nil {
				late = append(late, c.decide(s.waiting[e.ordinal], e.stamp)...)
			}
		case forget:
			if s := c.senders[senderKey{from.ID, e.epoch}]; s != nil {
				if p := s.waiting[e.ordinal]; p != nil && p.many && !p.decided {
					c.lost.Inc()
					c.remove(p)
					forgotten = append(forgotten, p)
				}
			}
		}
	}
	late = append(late, c.advance()...)
	c.signal()
	c.mu.Unlock()
	finishAll(late, errLate)
	finishAll(forgotten, errUndecided)
	if bad {
		c.refusedClock.Inc()
		return errClock
	}
	return nil
}

// proposed handles a proposal for an own message; c.mu is held.
func (c *core) proposed(from channel.Member, e entry) {
	o := c.out[e.ordinal]
	if e.epoch == c.epoch && o != nil {
		for i := range o.to {
			if o.to[i].ID == from.ID {
				o.max = max(o.max, e.stamp)
				o.without(i)
			}
		}
		return
	}
	answer := entry{forget, e.epoch, e.ordinal, 0}
	if d := c.memory[e.ordinal%maxMemory]; e.epoch == c.epoch && d.ordinal == e.ordinal {
		answer = entry{decide, e.epoch, e.ordinal, d.time}
	}
	c.tell(from, answer)
}

// gone handles the loss of a member, or its goodbye.
func (c *core) gone(id channel.UniqueID, lost bool) {
	var undecided []*pending
	c.mu.Lock()
	delete(c.slow, id)
	delete(c.lastTo, id)
	for _, o := range c.queue {
		for i := range o.to {
			if o.to[i].ID == id {
				o.without(i)
			}
		}
	}
	for key, s := range c.senders {
		switch {
		case key.id != id:
		case lost:
			undecided = append(undecided, c.dropUndecided(s)...)
		default:
			s.deadline = time.Now().Add(leaveGrace)
		}
	}
	late := c.advance()
	c.mu.Unlock()
	finishAll(undecided, errUndecided)
	finishAll(late, errLate)
}

// timeOut decides without those who have been silent for too long; c.mu is held.
func (c *core) timeOut(now time.Time) []*pending {
	for _, o := range c.queue {
		if now.Sub(o.born) < c.cfg.DecideTimeout {
			break
		}
		for i := range o.to {
			if !o.waiting[i] {
				continue
			}
			c.expired.Inc()
			o.without(i)
			if !c.slow[o.to[i].ID] && len(c.slow) < maxSenders {
				c.slow[o.to[i].ID] = true
				c.without.Inc()
			}
		}
	}
	return c.advance()
}

// tick gives up what has taken too long, and asks again for decisions.
func (c *core) tick(now time.Time) {
	var undecided []*pending
	c.mu.Lock()
	if !c.running {
		c.mu.Unlock()
		return
	}
	late, own := c.timeOut(now), c.ownKey()
	for key, s := range c.senders {
		if len(s.waiting) == 0 && now.Sub(s.used) >= idle {
			delete(c.senders, key)
			continue
		}
		leaving := !s.deadline.IsZero() && !now.Before(s.deadline)
		if leaving {
			s.deadline = time.Time{}
			undecided = append(undecided, c.dropUndecided(s)...)
			continue
		}
		if key == own {
			continue
		}
		for _, p := range slices.Clone(s.list) {
			switch {
			case p.decided:
			case !p.many:
				if p.previous != 0 && now.Sub(p.since) >= c.cfg.DecideTimeout { // it will not come
					p.previous = 0
					c.settle(s)
					c.signal()
				}
			case now.Sub(p.since) >= c.cfg.Expire:
				c.lost.Inc()
				c.remove(p)
				undecided = append(undecided, p)
			case now.Sub(p.asked) >= c.cfg.DecideTimeout:
				p.asked = now
				c.resent.Inc()
				c.tell(s.member, entry{propose, s.key.epoch, p.ordinal, p.time})
			}
		}
	}
	if len(undecided) > 0 {
		c.signal()
	}
	c.mu.Unlock()
	finishAll(undecided, errUndecided)
	finishAll(late, errLate)
}

// deliver is the goroutine that passes messages on, one at a time.
func (c *core) deliver() {
	defer c.workers.Done()
	for {
		c.mu.Lock()
		if !c.running {
			c.mu.Unlock()
			return
		}
		if c.busy || len(c.heap) == 0 || !c.heap[0].decided {
			c.mu.Unlock()
			select {
			case <-c.wake:
			case <-c.ctx.Done():
			}
			continue
		}
		p := heap.Pop(&c.heap).(*pending)
		c.forget(p)
		if p.ordinal < p.s.floor { // it came after one that was sent later
			c.signal()
			c.mu.Unlock()
			c.late.Inc()
			p.finish(errLate)
			continue
		}
		c.last = p.stamp
		p.s.floor = max(p.s.floor, p.before)
		c.busy = true
		l, ctx := c.link, c.ctx
		if c.changed != nil {
			close(c.changed)
			c.changed = nil
		}
		c.mu.Unlock()
		c.delivered.Inc()
		p.finish(l.Deliver(ctx, &p.m))
		*p = pending{index: -1}
		c.pool.Put(p) // whoever has been delivered is known to nobody any more
		c.mu.Lock()
		c.busy = false
		if c.changed != nil {
			close(c.changed)
			c.changed = nil
		}
		c.mu.Unlock()
	}
}

// finish ends a message that has waited.
func (p *pending) finish(err error) {
	if p.buf != nil {
		pool.Put(p.buf)
		p.buf = nil
	}
	p.m.Body = nil
	p.end(err)
}

func finishAll(list []*pending, err error) {
	for _, p := range list {
		p.finish(err)
	}
}

// pendingHeap orders waiting messages by their stamps.
type pendingHeap []*pending

func (h pendingHeap) Len() int           { return len(h) }
func (h pendingHeap) Less(i, j int) bool { return h[i].compare(h[j].stamp) < 0 }
func (h pendingHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *pendingHeap) Push(x any) {
	p := x.(*pending)
	p.index = len(*h)
	*h = append(*h, p)
}
func (h *pendingHeap) Pop() any {
	old := *h
	p := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	p.index = -1
	return p
}
