package channeltest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// Shuffle changes the order of messages: those that are hit wait in a bag until
// it is full or the first has waited long enough, and then go on in another
// order. On the way down only messages that nobody waits for are held: those of
// SendDone and those with the option Async.
type Shuffle struct {
	*chaos
	cfg      ShuffleConfig
	down, up bag
}

// ShuffleConfig configures [Shuffle].
type ShuffleConfig struct {
	Hits `yaml:",inline"`
	// Window is how many messages a bag holds.
	Window int `yaml:"window"`
	// After is how long a message waits at most.
	After time.Duration `yaml:"after"`
}

// DefaultShuffle mixes every message with its three neighbours.
var DefaultShuffle = ShuffleConfig{Hits: Hits{Rate: 1, Direction: Both}, Window: 4, After: 20 * time.Millisecond}

// maxShuffle bounds ShuffleConfig.Window.
const maxShuffle = 1024

// Validate implements channel.Validator.
func (c *ShuffleConfig) Validate() error {
	err := c.Hits.validate("chaos/shuffle")
	if c.Window < 2 || c.Window > maxShuffle {
		err = errors.Join(err, fmt.Errorf("chaos/shuffle: window is %d, must be 2 to %d", c.Window, maxShuffle))
	}
	if c.After <= 0 || c.After > maxChaosTime {
		err = errors.Join(err, fmt.Errorf("chaos/shuffle: after is %v, must be above 0 and at most 1h", c.After))
	}
	return err
}

// NewShuffle makes a layer that changes the order of messages.
func NewShuffle(c ShuffleConfig, s channel.Settings) (channel.Interceptor, error) {
	return &Shuffle{chaos: newChaos("chaos/shuffle", "changes the order of messages on purpose", c.Hits, s), cfg: c}, c.Validate()
}

// Start implements channel.Starter.
func (s *Shuffle) Start(ctx context.Context, l channel.Link) error {
	s.down.start(s.cfg, func(ctx context.Context, h held) {
		if err := l.Send(ctx, &h.m); err != nil && h.done != nil {
			h.done.Complete(h.orig, err)
		}
	})
	s.up.start(s.cfg, func(ctx context.Context, h held) { h.end(l.Deliver(ctx, &h.m)) })
	return s.chaos.Start(ctx, l)
}

// Stop implements channel.Stopper: what is held goes on.
func (s *Shuffle) Stop(context.Context) error {
	s.down.stop()
	s.up.stop()
	return nil
}

// Flush implements channel.Flusher.
func (s *Shuffle) Flush(ctx context.Context) error {
	return errors.Join(s.down.flush(ctx), s.up.flush(ctx))
}

// HandleSend implements channel.SendHandler.
func (s *Shuffle) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	hit, _, r := s.split(l.Local(), m.To)
	if len(hit) == 0 || m.Done == nil && !m.Options.Has(channel.Async) {
		return l.Send(ctx, m)
	}
	h := held{m: Clone(m), random: r, orig: m, done: m.Done}
	h.m.Done = m.Done
	return s.down.put(ctx, h)
}

// HandleReceive implements channel.ReceiveHandler.
func (s *Shuffle) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	r, hit := s.roll(false, m.From, l.Local())
	if !hit {
		return l.Deliver(ctx, m)
	}
	end := m.Defer()
	if err := s.up.put(ctx, held{m: Clone(m), random: r, end: end}); err != nil {
		end(err)
	}
	return nil
}

// held is a message in a bag.
type held struct {
	m      channel.Message
	random uint64
	orig   *channel.Message
	done   channel.Completion
	end    func(error)
}

// bag holds messages, and passes them on in another order from a goroutine of
// its own.
type bag struct {
	in      chan held
	flushes chan chan struct{}
	quit    chan struct{}
	once    sync.Once
	ended   sync.WaitGroup
}

func (b *bag) start(c ShuffleConfig, pass func(context.Context, held)) {
	b.in, b.flushes, b.quit = make(chan held), make(chan chan struct{}), make(chan struct{})
	b.ended.Go(func() { b.run(c, pass) })
}

// put adds a message. It waits while a bag is being emptied.
func (b *bag) put(ctx context.Context, h held) error {
	select {
	case b.in <- h:
		return nil
	case <-b.quit:
		return channel.Failed(h.m.To, channel.ErrClosed)
	case <-ctx.Done():
		return channel.Failed(h.m.To, ctx.Err())
	}
}

func (b *bag) run(c ShuffleConfig, pass func(context.Context, held)) {
	timer := time.NewTimer(c.After)
	timer.Stop()
	defer timer.Stop()
	var list []held
	empty := func() {
		timer.Stop()
		for i := len(list) - 1; i >= 0; i-- { // Fisher and Yates
			j := int(list[i].random % uint64(i+1))
			list[i], list[j] = list[j], list[i]
			pass(context.Background(), list[i])
			list[i] = held{}
		}
		list = list[:0]
	}
	for {
		select {
		case h := <-b.in:
			if list = append(list, h); len(list) == 1 {
				timer.Reset(c.After)
			}
			if len(list) >= c.Window {
				empty()
			}
		case <-timer.C:
			empty()
		case done := <-b.flushes:
			empty()
			close(done)
		case <-b.quit:
			empty()
			return
		}
	}
}

func (b *bag) flush(ctx context.Context) error {
	done := make(chan struct{})
	for request := b.flushes; ; request = nil {
		select {
		case request <- done:
		case <-done:
			return nil
		case <-b.quit:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (b *bag) stop() {
	if b.quit == nil {
		return
	}
	b.once.Do(func() { close(b.quit) })
	b.ended.Wait()
}
