package channel

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync/atomic"
)

// chain is one generation of the channel's layers. A swap puts another chain
// in its place; who is inside the old one ends there.
type chain struct {
	c     *Channel
	stack *Stack
	links []*link // bottom first
	route *route

	sendTo atomic.Pointer[link] // first layer for sending, nil for the coordinator
	recvTo atomic.Pointer[link] // first layer for receiving, nil for the application

	// The calls from outside that are inside. Posting ones return as soon as
	// the message has been accepted; those in waiting wait for its end, or are
	// ticks.
	posting, waiting, receiving *gate
	// The calls that layers make by themselves, with the Link of Start.
	passing, delivering *gate
}

// newChain connects the layers of a stack. Layers that are in old too keep
// their seat.
func newChain(c *Channel, s *Stack, old *chain) *chain {
	ch := &chain{c: c, stack: s, posting: newGate(), waiting: newGate(), receiving: newGate(), passing: newGate(), delivering: newGate()}
	ch.links = make([]*link, len(s.layers))
	taken := map[*link]bool{}
	for i := range ch.links {
		l := newLink(ch, s.layers[len(s.layers)-1-i])
		if prev := old.find(l.Interceptor, taken); prev != nil {
			taken[prev] = true
			l.seat = prev.seat
		} else {
			l.seat = new(seat)
			l.seat.now.Store(l)
		}
		ch.links[i] = l
	}
	var below, above *link
	for _, l := range ch.links {
		l.down.Store(below)
		if l.sends() {
			below = l
		}
	}
	for i := len(ch.links) - 1; i >= 0; i-- {
		l := ch.links[i]
		l.up.Store(above)
		if l.receives() {
			above = l
		}
	}
	ch.sendTo.Store(below)
	ch.recvTo.Store(above)
	ch.route = newRoute(c, ch.links)
	return ch
}

func newLink(ch *chain, x layer) *link {
	l := &link{layer: x, c: ch.c, ch: ch}
	m, name := ch.c.metrics, x.desc.Name
	l.panics = m.Counter("channel_layer_panics_total", "Panics recovered at the border of a layer.", "layer", name)
	if l.encode != nil {
		l.encodeErrors = m.Counter("channel_encode_errors_total", "Messages that a layer failed to encode; they were not sent.", "layer", name)
	}
	if l.decode != nil {
		l.decodeErrors = m.Counter("channel_decode_errors_total", "Messages that a layer failed to decode; they were not delivered.", "layer", name)
	}
	return l
}

func (l *link) sends() bool    { return l.send != nil || l.encode != nil }
func (l *link) receives() bool { return l.receive != nil || l.decode != nil }

// find returns the link of the same interceptor value that is not taken yet.
func (ch *chain) find(i Interceptor, taken map[*link]bool) *link {
	if ch == nil || !reflect.ValueOf(i).Comparable() {
		return nil
	}
	for _, l := range ch.links {
		if !taken[l] && reflect.ValueOf(l.Interceptor).Comparable() && l.Interceptor == i {
			return l
		}
	}
	return nil
}

// of returns the index of a seat's link, or -1.
func (ch *chain) of(s *seat) int {
	for i, l := range ch.links {
		if l.seat == s {
			return i
		}
	}
	return -1
}

// gates returns all gates, those for calls from outside first.
func (ch *chain) gates() [5]*gate {
	return [5]*gate{ch.posting, ch.waiting, ch.receiving, ch.passing, ch.delivering}
}

// outer are the gates for calls from outside.
const outer = 3

func (ch *chain) open() {
	for _, g := range ch.gates() {
		g.open()
	}
}

func (ch *chain) close() {
	for _, g := range ch.gates() {
		g.close()
	}
}

// wait returns when nobody is inside the closed chain, or false when ctx ends
// first.
func (ch *chain) wait(ctx context.Context) bool {
	for _, g := range ch.gates() {
		if !g.wait(ctx) {
			return false
		}
	}
	return true
}

// waitOutside is wait for the calls from outside only. Layers may have messages
// of their own on their way; their Stop ends those.
func (ch *chain) waitOutside(ctx context.Context) bool {
	gates := ch.gates()
	for _, g := range gates[:outer] {
		if !g.wait(ctx) {
			return false
		}
	}
	return true
}

// enterSend enters the present chain for sending, and returns it with the gate
// to leave; posting says that the call returns before the message has ended.
// It returns nil when the channel does not run. It waits while a swap has
// paused the channel.
func (c *Channel) enterSend(posting bool) (*chain, *gate) {
	for {
		ch := c.chain.Load()
		g := ch.waiting
		if posting {
			g = ch.posting
		}
		if g.enter() {
			return ch, g
		}
		if !c.retry(ch) {
			return nil, nil
		}
	}
}

// enterReceive is enterSend for a received message; leave receiving.
func (c *Channel) enterReceive() *chain {
	for {
		ch := c.chain.Load()
		if ch.receiving.enter() {
			return ch
		}
		if !c.retry(ch) {
			return nil
		}
	}
}

// retry is called by who was not let into ch. It reports whether it is worth
// trying again.
func (c *Channel) retry(ch *chain) bool {
	if p := c.paused.Load(); p != nil {
		<-*p // closed by the swap, soon
		return true
	}
	// The gates may have been opened again between the attempt and the look at
	// paused.
	return c.chain.Load() != ch || !ch.passing.closed()
}

// startLayers starts those layers that are not running, bottom first.
func startLayers(ctx context.Context, links []*link) error {
	for _, l := range links {
		if l.seat.started {
			continue
		}
		if l.start != nil {
			if err := l.doStart(ctx); err != nil {
				return fmt.Errorf("%s%s: %w", l.desc.Name, at(l.origin), err)
			}
		}
		l.seat.started = true
	}
	return nil
}

// stopLayers stops the present layers, top first. What they hold on its way up
// goes up before.
func (c *Channel) stopLayers(ctx context.Context) error {
	links := c.chain.Load().links
	var errs []error
	for _, l := range links {
		if l.receive != nil && l.seat.started {
			errs = append(errs, l.doFlush(ctx))
		}
	}
	return errors.Join(append(errs, stopLinks(ctx, links))...)
}

// doFlush flushes a layer if it is a Flusher.
func (l *link) doFlush(ctx context.Context) error {
	f, ok := l.Interceptor.(Flusher)
	if !ok {
		return nil
	}
	return l.guarded("flush", func() error { return f.Flush(ctx) })
}

// stopLinks stops those of the links that run, top first.
func stopLinks(ctx context.Context, links []*link) error {
	var errs []error
	for i := len(links) - 1; i >= 0; i-- {
		l := links[i]
		if !l.seat.started {
			continue
		}
		l.seat.started = false
		if l.stop != nil {
			errs = append(errs, l.doStop(ctx))
		}
	}
	return errors.Join(errs...)
}
