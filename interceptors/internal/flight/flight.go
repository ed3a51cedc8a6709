// Package flight sends one message as one or several others, whose bodies it
// owns, and joins their results. It imports package channel and
// interceptors/internal/pool only; it must not import core, plugins or fx.
package flight

import (
	"context"
	"errors"
	"sync"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/internal/pool"
)

// Pool keeps what flights are made of for reuse. Its zero value is ready. Every
// layer has its own, because a channel must not wander between the bubbles of
// testing/synctest.
type Pool struct {
	flights sync.Pool // of *Flight
	parts   sync.Pool // of *Part
}

// Flight is one message of the layers above on its way in parts. Get one from
// Pool.New, make and send its parts, and call End once, all in one goroutine. It is
// reused when the last part has ended: do not touch it after End.
type Flight struct {
	pool     *Pool
	orig     *channel.Message
	done     channel.Completion // of orig; nil if End waits
	parallel bool               // parts are told their end
	parts    []*Part

	mu       sync.Mutex
	pending  int // parts that have not ended, and the owner until End
	accepted int // parts that the layer below has accepted
	faults   []channel.Fault
	tainted  bool          // a layer panicked: it may still hold something
	ended    chan struct{} // capacity 1; told when pending falls to 0 and End waits
	gone     bool          // nobody waits any more
}

// Part is one message that travels in the place of the original.
type Part struct {
	// Message is to be filled in: its body has no bytes, and room for as many
	// as were asked for.
	Message channel.Message

	f    *Flight
	buf  *[]byte
	to   []channel.Member
	over bool // guarded by f.mu
}

// New begins a flight for m. With parallel, Send does not wait for the end of a
// part, but End does for all of them, unless m.Done is set.
func (o *Pool) New(m *channel.Message, parallel bool) *Flight {
	f, ok := o.flights.Get().(*Flight)
	if !ok {
		f = &Flight{pool: o, ended: make(chan struct{}, 1)}
	}
	f.orig, f.done, f.parallel = m, m.Done, parallel || m.Done != nil
	f.pending, f.accepted, f.tainted, f.gone = 1, 0, false, false
	return f
}

// Part returns a further message like the original, to the given members, with
// room for a body of size bytes.
func (f *Flight) Part(to []channel.Member, size int) *Part {
	p, ok := f.pool.parts.Get().(*Part)
	if !ok {
		p = new(Part)
	}
	p.f, p.over = f, false
	p.buf = pool.Get(size)
	p.to = append(p.to[:0], to...)
	m := &p.Message
	*m = *f.orig
	m.To, m.Body, m.Done, m.Later = p.to, (*p.buf)[:0:size], nil, nil
	if f.parallel {
		m.Done = p
	}
	f.parts = append(f.parts, p)
	return p
}

// Send sends a part. It returns the error if the layer below refuses it; End
// has it too.
func (f *Flight) Send(ctx context.Context, l channel.Link, p *Part) error {
	if f.parallel {
		f.mu.Lock()
		f.pending++
		f.mu.Unlock()
	}
	err := l.Send(ctx, &p.Message)
	if err == nil && f.parallel {
		f.mu.Lock()
		f.accepted++
		f.mu.Unlock()
		return nil
	}
	f.mu.Lock()
	p.over = true
	if f.parallel {
		f.pending--
	} else if err == nil {
		f.accepted++
	}
	if err != nil {
		f.fail(p, err)
	}
	f.mu.Unlock()
	return err
}

// Begin notes that a part is on another way than down: whoever has it calls its
// Complete once. The flight must be parallel.
func (f *Flight) Begin(*Part) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pending++
	f.accepted++
}

// fail notes what a part failed for; f.mu is held.
func (f *Flight) fail(p *Part, err error) {
	f.tainted = f.tainted || errors.Is(err, channel.ErrPanic)
	var se *channel.SendError
	if !errors.As(err, &se) {
		se = channel.Failed(p.to, err)
	}
	for _, x := range se.Faults {
		if !f.has(x.Member) {
			f.faults = append(f.faults, x)
		}
	}
}

// has reports whether a member is among the faults; f.mu is held.
func (f *Flight) has(m channel.Member) bool {
	for i := range f.faults {
		if f.faults[i].Member.ID == m.ID {
			return true
		}
	}
	return false
}

// Fail notes that the message does not reach some members, without a part
// having been sent to them.
func (f *Flight) Fail(to []channel.Member, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range to {
		if !f.has(m) {
			f.faults = append(f.faults, channel.Fault{Member: m, Err: err})
		}
	}
}

// Failed reports whether the message is known not to reach a member.
func (f *Flight) Failed(m channel.Member) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.faults) > 0 && f.has(m)
}

// Complete implements channel.Completion for the layers below.
func (p *Part) Complete(_ *channel.Message, err error) {
	f := p.f
	f.mu.Lock()
	p.over = true
	if err != nil {
		f.fail(p, err)
	}
	f.pending--
	last, gone := f.pending == 0, f.gone
	f.mu.Unlock()
	switch {
	case !last:
	case gone:
		f.finish()
	default:
		f.ended <- struct{}{}
	}
}

// finish reports the result, if somebody is to be told, and ends the flight.
func (f *Flight) finish() {
	done, orig, err := f.done, f.orig, f.result()
	f.release()
	if done != nil {
		done.Complete(orig, err)
	}
}

// result is the error of all parts together; nothing is pending, or f.mu is
// held.
func (f *Flight) result() error {
	if len(f.faults) == 0 {
		return nil
	}
	return &channel.SendError{Faults: append([]channel.Fault(nil), f.faults...)}
}

// End ends the making of parts. It returns what HandleSend has to return: with
// Done set on the original, an error only if no part was accepted; otherwise it
// waits for the result, as long as ctx allows.
func (f *Flight) End(ctx context.Context) error {
	f.mu.Lock()
	f.pending--
	over := f.pending == 0
	if f.done != nil && f.accepted > 0 {
		f.gone = true
		f.mu.Unlock()
		if over {
			f.finish()
		}
		return nil
	}
	f.mu.Unlock()
	if !over {
		select {
		case <-f.ended:
		case <-ctx.Done():
			return f.leave(ctx.Err())
		}
	}
	err := f.result()
	f.release()
	return err
}

// leave gives up waiting: the members whose parts have not ended failed for the
// given reason. The last part ends the flight.
func (f *Flight) leave(cause error) error {
	f.mu.Lock()
	if f.pending == 0 {
		f.mu.Unlock()
		<-f.ended // at once
		err := f.result()
		f.release()
		return err
	}
	for _, p := range f.parts {
		if !p.over {
			for _, m := range p.to {
				if !f.has(m) {
					f.faults = append(f.faults, channel.Fault{Member: m, Err: cause})
				}
			}
		}
	}
	f.gone = true
	err := f.result()
	f.mu.Unlock()
	return err
}

// release puts everything back for reuse.
func (f *Flight) release() {
	if f.tainted {
		return
	}
	for i, p := range f.parts {
		pool.Put(p.buf)
		clear(p.to)
		p.Message.Body, p.Message.Done, p.f, p.buf = nil, nil, nil, nil
		f.pool.parts.Put(p)
		f.parts[i] = nil
	}
	clear(f.faults)
	f.orig, f.done, f.parts, f.faults = nil, nil, f.parts[:0], f.faults[:0]
	f.pool.flights.Put(f)
}
