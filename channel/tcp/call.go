package tcp

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/longhouse-go/longhouse/channel"
)

// call is one message on its way to one member. Its end is told either to a
// goroutine in wait, or to a group.
//
// Calls are pooled per Sender: channels must not wander between the bubbles of
// testing/synctest.
type call struct {
	pool  *sync.Pool
	size  int
	tries int

	reply chan error // capacity 1
	// refs counts those who hold the call while a goroutine waits for it: that
	// one, which may give up, and the connection.
	refs atomic.Int32

	group *group // or nil
	to    channel.Member

	// In the queue for a window, guarded by pipe.mu.
	next    *call
	granted bool
	grant   chan struct{} // capacity 1
}

func (s *Sender) newCall() *call {
	c, ok := s.calls.Get().(*call)
	if !ok {
		c = &call{pool: &s.calls, reply: make(chan error, 1), grant: make(chan struct{}, 1)}
	}
	c.refs.Store(2)
	return c
}

// free returns a call that nobody else holds to the pool.
func (c *call) free() {
	select {
	case <-c.reply: // of one that was given up
	default:
	}
	c.size, c.tries, c.group, c.to, c.next, c.granted = 0, 0, nil, channel.Member{}, nil, false
	c.pool.Put(c)
}

// finish tells the end. It is called exactly once for an accepted call, without
// a lock held.
func (c *call) finish(err error) {
	if g := c.group; g != nil {
		to := c.to
		c.free()
		if err != nil {
			g.fail(to, err)
		} else {
			g.done()
		}
		return
	}
	c.reply <- err
	c.unref()
}

// wait returns the end of an accepted call, or the error of ctx if that comes
// first.
func (c *call) wait(ctx context.Context) error {
	defer c.unref()
	select {
	case err := <-c.reply:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// open reports whether the end has not been told yet. Only the goroutine that
// will call wait may ask.
func (c *call) open() bool { return len(c.reply) == 0 }

func (c *call) unref() {
	if c.refs.Add(-1) == 0 {
		c.free()
	}
}

// group collects the ends of a message with Done, one per member.
type group struct {
	m *channel.Message

	mu       sync.Mutex
	left     int // guarded by mu, as all below; members, and Send itself
	accepted bool
	faults   []channel.Fault
}

var groups = sync.Pool{New: func() any { return new(group) }}

func (g *group) accept() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.accepted = true
}

func (g *group) fail(to channel.Member, err error) {
	g.mu.Lock()
	g.faults = append(g.faults, channel.Fault{Member: to, Err: err})
	g.mu.Unlock()
	g.done()
}

// done says that one member is done with.
func (g *group) done() {
	g.mu.Lock()
	g.left--
	last := g.left == 0
	g.mu.Unlock()
	if last {
		g.complete()
	}
}

// complete tells Done. Nobody else holds g any more.
func (g *group) complete() {
	m, err := g.m, g.result()
	g.recycle()
	m.Done.Complete(m, err)
}

func (g *group) result() error {
	if len(g.faults) == 0 {
		return nil
	}
	return &channel.SendError{Faults: g.faults}
}

func (g *group) recycle() {
	g.m, g.faults = nil, nil
	groups.Put(g)
}

// end is Send's own done. If no member has accepted the message, it returns
// what Send shall return, and Done is not told.
func (g *group) end() error {
	g.mu.Lock()
	accepted := g.accepted
	g.mu.Unlock()
	if accepted {
		g.done()
		return nil
	}
	err := g.result()
	g.recycle()
	return err
}

// ring is a queue of calls.
type ring struct {
	slots   []*call // power of two
	head, n int
}

func (r *ring) push(c *call) {
	if r.n == len(r.slots) {
		grown := make([]*call, max(64, 2*r.n))
		for i := range r.n {
			grown[i] = r.slots[(r.head+i)&(len(r.slots)-1)]
		}
		r.slots, r.head = grown, 0
	}
	r.slots[(r.head+r.n)&(len(r.slots)-1)] = c
	r.n++
}

// pop returns nil if the queue is empty.
func (r *ring) pop() *call {
	if r.n == 0 {
		return nil
	}
	c := r.slots[r.head]
	r.slots[r.head] = nil
	r.head = (r.head + 1) & (len(r.slots) - 1)
	r.n--
	return c
}

// waitlist is a queue of calls that wait for room in a window, linked by next.
type waitlist struct{ head, tail *call }

func (w *waitlist) push(c *call) {
	if w.tail == nil {
		w.head = c
	} else {
		w.tail.next = c
	}
	w.tail = c
}

func (w *waitlist) pop() *call {
	c := w.head
	if w.head = c.next; w.head == nil {
		w.tail = nil
	}
	c.next = nil
	return c
}

func (w *waitlist) remove(c *call) {
	var before *call
	for at := w.head; at != nil; before, at = at, at.next {
		if at != c {
			continue
		}
		if before == nil {
			w.head = c.next
		} else {
			before.next = c.next
		}
		if w.tail == c {
			w.tail = before
		}
		c.next = nil
		return
	}
}

// signal lets the calls of a list that was granted go on. The lock that the
// list was made under must not be held.
func (w waitlist) signal() {
	for w.head != nil {
		w.pop().grant <- struct{}{}
	}
}

// drained lets goroutines wait until something has become empty. The lock that
// guards that something guards it too.
type drained struct{ c chan struct{} }

// wait returns a channel that the next signal closes.
func (d *drained) wait() <-chan struct{} {
	if d.c == nil {
		d.c = make(chan struct{})
	}
	return d.c
}

// signal says that it is empty.
func (d *drained) signal() {
	if d.c != nil {
		close(d.c)
		d.c = nil
	}
}
