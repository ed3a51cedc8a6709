package channel

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
)

// receive is what the receiver calls for every message.
func (c *Channel) receive(ctx context.Context, m *Message) error {
	ch := c.enterReceive()
	if ch == nil {
		return ErrClosed
	}
	defer ch.receiving.leave()
	if !m.Options.Has(UseAck) {
		return c.received(c.up(ctx, ch.recvTo.Load(), m))
	}
	s, k := c.dedupe.sender(m.From.ID), c.dedupe.key(m)
	verdict, err := s.begin(k)
	switch verdict {
	case untracked:
		c.untracked.Inc()
		return c.received(c.up(ctx, ch.recvTo.Load(), m))
	case repeated:
		c.duplicates.Inc()
		return err
	case unfinished:
		c.duplicates.Inc()
		if m.Later == nil {
			return nil // nobody waits for it
		}
		if end := m.Later.Defer(); !s.attach(k, end) {
			end(ErrQueueFull)
		}
		return nil
	}
	if m.Later == nil {
		err = c.up(ctx, ch.recvTo.Load(), m)
		s.finish(k, err)
		return c.received(err)
	}
	return c.receiveDeferrable(ctx, ch, m, s, k)
}

// receiveDeferrable processes a fresh message whose end a listener may take
// over.
func (c *Channel) receiveDeferrable(ctx context.Context, ch *chain, m *Message, s *dedupeSender, k dedupeKey) error {
	in := incomingPool.Get().(*incoming)
	in.c, in.later, in.s, in.k = c, m.Later, s, k
	m.Later = in
	err := c.up(ctx, ch.recvTo.Load(), m)
	if in.deferred.Load() {
		return err // ignored by the receiver; in belongs to who has deferred
	}
	in.c, in.later, in.s = nil, nil, nil
	incomingPool.Put(in)
	s.finish(k, err)
	return c.received(err)
}

var incomingPool = sync.Pool{New: func() any { return new(incoming) }}

func (c *Channel) received(err error) error {
	if err != nil {
		c.receiveFailed.Inc()
	}
	return err
}

// incoming notices when the end of a message is deferred.
type incoming struct {
	c        *Channel
	later    Deferrer
	s        *dedupeSender
	k        dedupeKey
	deferred atomic.Bool
	ended    atomic.Bool
}

// Defer implements Deferrer.
func (in *incoming) Defer() func(error) {
	in.deferred.Store(true)
	end := in.later.Defer()
	return func(err error) {
		if in.ended.Swap(true) {
			return
		}
		if err != nil {
			err = &listenerError{err}
		}
		in.s.finish(in.k, err)
		end(in.c.received(err))
	}
}

// top hands a message to the listeners.
func (c *Channel) top(ctx context.Context, m *Message) error {
	if len(m.Body) == len(ProbeBody) && string(m.Body) == ProbeBody {
		return nil
	}
	var panicked error
	for _, e := range *c.listeners.Load() {
		handled, err := c.ask(ctx, e.l, m)
		switch {
		case err != nil && errors.Is(err, ErrPanic):
			panicked = err // the message may be for one of the others
		case err != nil:
			return &listenerError{err}
		case handled:
			return nil
		}
	}
	if panicked != nil {
		return &listenerError{panicked}
	}
	c.unhandled.Inc()
	return nil
}

func (c *Channel) ask(ctx context.Context, l Listener, m *Message) (handled bool, err error) {
	ok := false
	defer func() {
		if !ok {
			handled, err = false, c.recovered(recover(), "application", "listener", c.panics)
		}
	}()
	handled, err = l.Handle(ctx, m)
	ok = true
	return handled, err
}
