package dispatch

import (
	"errors"
	"sync"

	"github.com/longhouse-go/longhouse/channel"
)

// maxPooledBody bounds the buffers that are kept for reuse, in bytes.
const maxPooledBody = 1 << 20

// item is one message to one destination, from the queue to its end.
type item struct {
	m    channel.Message
	to   [1]channel.Member // backs m.To
	buf  []byte            // backs m.Body
	size int64             // what it takes of the budget, in bytes
	d    *Interceptor
	lane *lane
	next *item // in the queue

	// Who wants to know the result: the Done of a message with one destination
	// and that message, or the group; else nobody.
	done  channel.Completion
	orig  *channel.Message
	group *group
}

var itemPool = sync.Pool{New: func() any { return new(item) }}

func newItem(d *Interceptor, m *channel.Message, to channel.Member) *item {
	it := itemPool.Get().(*item)
	it.d = d
	it.buf = append(it.buf[:0], m.Body...)
	it.to[0] = to
	it.size = int64(len(m.Body))
	it.m = *m
	it.m.Body, it.m.To, it.m.Done = it.buf, it.to[:], it
	return it
}

func (it *item) release() {
	buf := it.buf
	if cap(buf) > maxPooledBody {
		buf = nil
	}
	*it = item{buf: buf[:0]}
	itemPool.Put(it)
}

// Complete implements channel.Completion for the layers below.
func (it *item) Complete(_ *channel.Message, err error) {
	d, la := it.d, it.lane
	var hopeless *item
	d.mu.Lock()
	if err != nil && la.doubtful && !errors.Is(err, channel.ErrNegativeAck) {
		hopeless = la.takeAll()
	}
	d.giveBack(la, 1, it.size)
	d.mu.Unlock()
	it.report(err)
	failAll(hopeless, err)
}

// report tells the result and ends the item.
func (it *item) report(err error) {
	d := it.d
	if err == nil {
		d.sent.Inc()
	} else {
		d.failed.Inc()
	}
	switch {
	case it.group != nil:
		it.group.end(1, faultsOf(it.to[0], err))
	case it.done != nil:
		it.done.Complete(it.orig, err)
	case err != nil:
		d.nobodyAsked(it.to[0], err)
	}
	it.release()
}

func faultsOf(to channel.Member, err error) []channel.Fault {
	if err == nil {
		return nil
	}
	var se *channel.SendError
	if errors.As(err, &se) {
		return se.Faults
	}
	return []channel.Fault{{Member: to, Err: err}}
}

// failAll ends queued items that will not be sent; their lane must not be
// locked.
func failAll(it *item, err error) {
	for it != nil {
		next := it.next
		var se *channel.SendError
		cause := err
		if errors.As(err, &se) && len(se.Faults) > 0 {
			cause = se.Faults[0].Err
		}
		it.d.mu.Lock()
		it.d.giveBack(it.lane, 1, it.size)
		it.d.mu.Unlock()
		it.report(channel.Failed(it.to[:], cause))
		it = next
	}
}

// lane is the queue of one destination. All fields but work are guarded by
// Interceptor.mu.
type lane struct {
	d  *Interceptor
	id channel.UniqueID

	first, last *item // queued
	active      bool  // a goroutine works on it
	doubtful    bool  // the member is lost below
	waiting     int   // waiters for room

	// What the destination holds of the budget, queued or on the way.
	bytes    int64
	messages int

	work func() // run, made once so that starting it does not allocate
}

func newLane(d *Interceptor, id channel.UniqueID) *lane {
	la := &lane{d: d, id: id}
	la.work = la.run
	return la
}

func (la *lane) push(it *item) {
	it.lane = la
	if la.last == nil {
		la.first = it
	} else {
		la.last.next = it
	}
	la.last = it
}

func (la *lane) pop() *item {
	it := la.first
	if it == nil {
		return nil
	}
	la.first, it.next = it.next, nil
	if la.first == nil {
		la.last = nil
	}
	return it
}

// takeAll empties the queue and returns its items, linked by next.
func (la *lane) takeAll() *item {
	it := la.first
	la.first, la.last = nil, nil
	return it
}

// Messages that were sent are given back to the budget when they are so many, or
// such a part of it: callers that wait for room shall not be woken for every
// single one.
const (
	runBatch = 1024
	runPart  = 8
)

// run sends what is queued, in order, and ends when nothing is left.
func (la *lane) run() {
	d := la.d
	defer d.workers.Done()
	many, much := max(min(runBatch, d.cfg.QueueMessages/runPart), 1), d.cfg.QueueBytes/runPart
	sent, bytes := 0, int64(0) // whose room has not been given back
	for {
		d.mu.Lock()
		it := la.pop()
		if sent > 0 && (it == nil || sent >= many || bytes >= much) {
			d.giveBack(la, sent, bytes)
			sent, bytes = 0, 0
		}
		if it == nil {
			it = la.pop() // of somebody who has waited for the room
		}
		if it == nil {
			d.rest(la)
			d.forgetIdle(la)
			d.mu.Unlock()
			return
		}
		link, ctx := d.link, d.ctx
		d.mu.Unlock()
		if ctx.Err() != nil {
			it.Complete(&it.m, channel.Failed(it.to[:], channel.ErrClosed))
		} else if it.passes(link) {
			d.sent.Inc()
			sent++
			bytes += it.size
			it.release()
		} else if err := link.Send(ctx, &it.m); err != nil {
			it.Complete(&it.m, err)
		}
	}
}

// passes sends a message if nobody waits for its result, nor the receiver gives
// any, and it takes no waiting.
func (it *item) passes(link channel.Link) bool {
	below, ok := link.(channel.TrySender)
	if !ok || it.done != nil || it.group != nil || it.m.Options.Has(channel.UseAck) {
		return false
	}
	it.m.Done = nil
	if below.TrySend(&it.m) {
		return true
	}
	it.m.Done = it
	return false
}

// group collects the results of a message to several destinations.
type group struct {
	orig *channel.Message
	done channel.Completion

	mu      sync.Mutex
	pending int // destinations, and the call that queues them
	faults  []channel.Fault
}

// end notes the result of n parties; the last one reports.
func (g *group) end(n int, faults []channel.Fault) {
	g.mu.Lock()
	g.faults = append(g.faults, faults...)
	g.pending -= n
	last := g.pending == 0
	g.mu.Unlock()
	if !last {
		return
	}
	var err error
	if len(g.faults) > 0 {
		err = &channel.SendError{Faults: g.faults}
	}
	g.done.Complete(g.orig, err)
}
