package channel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// maxPooledBody bounds the body buffers that are kept for reuse, in bytes.
const maxPooledBody = 1 << 20

// outgoing is a message of the application on its way down. It is pooled.
type outgoing struct {
	m    Message
	c    *Channel
	done Completion // of the application; nil if it does not ask
	to   []Member   // backs m.To
	body []byte     // backs m.Body if the body was copied

	// The id of the last message, as two numbers.
	idFirst, idLast uint64
	following       uint32

	// With done set, two parties hold the message: the call of SendDone and
	// the completion. The later one puts it back.
	holders  atomic.Int32
	reported atomic.Bool
}

var outgoingPool = sync.Pool{New: func() any { return new(outgoing) }}

func (c *Channel) newOutgoing(to []Member, body []byte, o Options, copyBody bool) *outgoing {
	g := outgoingPool.Get().(*outgoing)
	g.c = c
	if len(to) == 1 {
		g.to = append(g.to[:0], to[0]) // faster than a block of one
	} else {
		g.to = append(g.to[:0], to...)
	}
	if copyBody {
		g.body = append(g.body[:0], body...)
		body = g.body
	}
	// Field by field, because making a Message and copying it takes longer.
	m := &g.m
	g.nextID(&m.ID)
	m.From = *c.local.Load()
	m.To = g.to
	m.Options = o | ByteMessage
	if o.Has(ObjectStream) {
		m.Options = o &^ (ObjectStream | ByteMessage)
	}
	m.Time = c.clock.now()
	m.Body = body
	return g
}

// nextID sets the id of the next message: a random one at first, and then the
// numbers that follow it. The version and variant bits stay as they are.
func (g *outgoing) nextID(id *UniqueID) {
	if g.following == 0 {
		u := NewUniqueID()
		g.idFirst, g.idLast = binary.LittleEndian.Uint64(u[:8]), binary.LittleEndian.Uint64(u[8:])
	}
	g.following++ // 2³² ids follow a random one
	g.idLast += 1 << 32
	binary.LittleEndian.PutUint64(id[:8], g.idFirst)
	binary.LittleEndian.PutUint64(id[8:], g.idLast)
}

// release puts g back for reuse. What is left in it is overwritten by the next
// use.
func (g *outgoing) release() {
	if cap(g.body) > maxPooledBody {
		g.body = nil
	}
	g.m.Body, g.m.Done, g.m.Later, g.c, g.done = nil, nil, nil, nil, nil
	outgoingPool.Put(g)
}

// Send sends body to the given members and waits as long as the options say:
// SendNone until it is written, SendAck until it has been received, SendSyncAck
// until it has been processed, SendAsync only until it is queued. The error is
// or wraps a *SendError that names the members that failed; all others have
// the message. ctx bounds the wait. The caller may reuse to and body when Send
// has returned. A member should be listed only once.
func (c *Channel) Send(ctx context.Context, to []Member, body []byte, o Options) error {
	if len(to) == 0 {
		return ErrNoMembers
	}
	ch, in := c.enterSend(o.Has(Async))
	if in == nil {
		return Failed(to, ErrClosed)
	}
	defer in.leave()
	g := c.newOutgoing(to, body, o, ch.stack.mutates)
	err := c.down(ctx, ch.sendTo.Load(), &g.m)
	if err == nil {
		g.release()
		return nil
	}
	if !errors.Is(err, ErrPanic) { // whatever panicked may still hold the message
		g.release()
	}
	return err
}

// SendDone is Send without waiting: it returns nil as soon as the message has
// been accepted, and the result is told to done, exactly once. If it returns an
// error, done is not called. Many messages may be on their way at once;
// messages to one member are sent in the order of the calls, as far as the
// stack keeps order. The caller may reuse to and body when SendDone has
// returned. SendDone blocks while the window of a destination is full, as long
// as ctx allows; done must not block.
func (c *Channel) SendDone(ctx context.Context, to []Member, body []byte, o Options, done Completion) error {
	if done == nil {
		return fmt.Errorf("channel: send: no completion given: %w", ErrNotConfigured)
	}
	if len(to) == 0 {
		return ErrNoMembers
	}
	ch, in := c.enterSend(true)
	if in == nil {
		return Failed(to, ErrClosed)
	}
	defer in.leave()
	g := c.newOutgoing(to, body, o, true)
	g.done = done
	g.holders.Store(2)
	g.reported.Store(false)
	g.m.Done = g
	err := c.down(ctx, ch.sendTo.Load(), &g.m)
	if err == nil {
		g.drop()
		return nil
	}
	if g.reported.Swap(true) {
		g.drop()
		return nil // a layer completed the message and failed then: told already
	}
	if !errors.Is(err, ErrPanic) {
		g.release()
	}
	return err
}

// Complete implements Completion for the layers below.
func (g *outgoing) Complete(_ *Message, err error) {
	if g.reported.Swap(true) {
		return
	}
	g.tell(err)
	g.drop()
}

func (g *outgoing) tell(err error) {
	defer g.c.guard("completion")
	g.done.Complete(&g.m, err)
}

func (g *outgoing) drop() {
	if g.holders.Add(-1) == 0 {
		g.release()
	}
}

// bottomDone stands between the sender and the Done of a message, to learn of
// faults. It is pooled.
type bottomDone struct {
	c    *Channel
	done Completion
}

var bottomDonePool = sync.Pool{New: func() any { return new(bottomDone) }}

// Complete implements Completion for the sender.
func (b *bottomDone) Complete(m *Message, err error) {
	c, done := b.c, b.done
	*b = bottomDone{}
	bottomDonePool.Put(b)
	m.Done = done
	if err != nil {
		c.faults(err)
	}
	done.Complete(m, err)
}

// bottom hands a message to the sender.
func (c *Channel) bottom(ctx context.Context, m *Message) (err error) {
	if len(m.To) == 0 {
		return ErrNoMembers
	}
	var b *bottomDone
	if m.Done != nil {
		b = bottomDonePool.Get().(*bottomDone)
		b.c, b.done = c, m.Done
		m.Done = b
	}
	ok := false
	defer func() {
		if !ok { // whatever panicked may still hold b
			err = Failed(m.To, c.recovered(recover(), "sender", "send", c.panics))
		}
	}()
	err = c.cfg.Sender.Send(ctx, m)
	ok = true
	if err != nil {
		c.sendFailedNow(m, b, err)
	}
	return err
}

// sendFailedNow handles a message that the sender has refused: Done will not be
// called.
func (c *Channel) sendFailedNow(m *Message, b *bottomDone, err error) {
	if b != nil {
		m.Done = b.done
		*b = bottomDone{}
		bottomDonePool.Put(b)
	}
	c.faults(err)
}

// faults counts the destinations that failed and has them checked.
func (c *Channel) faults(err error) {
	var se *SendError
	if !errors.As(err, &se) {
		c.sendFailed.Inc()
		return
	}
	c.sendFailed.Add(int64(len(se.Faults)))
	for _, f := range se.Faults {
		if suspicious(f.Err) {
			c.coord.suspect(f.Member, f.Err)
		}
	}
}
