package repmap

import (
	"context"
	"slices"
	"sync"

	"github.com/longhouse-go/longhouse/channel"
)

// changes tells listeners what has changed, one change at a time and in order.
type changes struct {
	mu     sync.Mutex
	max    int
	queue  []change
	missed bool
	subs   []*subscriber
	wake   chan struct{} // capacity 1
	drops  *channel.Counter
}

type subscriber struct{ f func(change) }

func (c *changes) init(most int, drops *channel.Counter) {
	c.max, c.drops, c.wake = most, drops, make(chan struct{}, 1)
}

// add notes the change from one record to another; nil stands for none.
func (c *changes) add(old, now *record) {
	ch, ok := changeOf(old, now)
	if !ok {
		return
	}
	c.mu.Lock()
	switch {
	case len(c.subs) == 0:
	case len(c.queue) >= c.max:
		c.missed = true
		c.drops.Inc()
	default:
		c.queue = append(c.queue, ch)
	}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *changes) subscribe(f func(change)) (cancel func()) {
	s := &subscriber{f}
	c.mu.Lock()
	c.subs = append(slices.Clone(c.subs), s)
	c.mu.Unlock()
	return func() {
		c.mu.Lock()
		c.subs = slices.DeleteFunc(slices.Clone(c.subs), func(x *subscriber) bool { return x == s })
		c.mu.Unlock()
	}
}

func (c *changes) run(ctx context.Context) {
	for {
		c.mu.Lock()
		queue, subs, missed := c.queue, c.subs, c.missed
		c.queue, c.missed = nil, false
		c.mu.Unlock()
		if missed {
			queue = append(queue, change{kind: Missed})
		}
		for _, ch := range queue {
			for _, s := range subs {
				s.f(ch)
			}
		}
		if len(queue) > 0 {
			continue
		}
		select {
		case <-c.wake:
		case <-ctx.Done():
			return
		}
	}
}
