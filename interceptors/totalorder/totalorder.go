// Package totalorder is the interceptor that lets all members see all messages
// in one order, for groups without Tomcat nodes. It imports package channel and
// interceptors/internal only; it must not import core, plugins or fx.
package totalorder

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/internal/flight"
)

// Config is what a user writes.
type Config struct {
	// DecideTimeout is how long a message waits for the proposal of a member
	// that is silent.
	DecideTimeout time.Duration `yaml:"decide_timeout"`
	// Expire is how long a received message waits for its sender's decision.
	Expire time.Duration `yaml:"expire"`
	// MaxUndecided bounds the own messages that wait for a decision.
	MaxUndecided int `yaml:"max_undecided"`
	// QueueMessages and QueueSize bound the received messages that wait for
	// their turn: number, and bytes. SenderSize bounds those of one sender.
	QueueMessages int   `yaml:"queue_messages"`
	QueueSize     int64 `yaml:"queue_size"`
	SenderSize    int64 `yaml:"sender_size"`
	// BlockTimeout is how long a received message waits for room in the queue
	// before it is refused.
	BlockTimeout time.Duration `yaml:"block_timeout"`
}

// Defaults holds 64 MiB or 100,000 messages.
var Defaults = Config{
	DecideTimeout: time.Second, Expire: 10 * time.Second, MaxUndecided: 10_000,
	QueueMessages: 100_000, QueueSize: 128 << 20, SenderSize: 64 << 20, BlockTimeout: time.Second,
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	positive := func(name string, d time.Duration) {
		if d <= 0 {
			errs = append(errs, fmt.Errorf("totalorder: %s is %v, must be positive", name, d))
		}
	}
	least := func(name string, v, least int64) {
		if v < least {
			errs = append(errs, fmt.Errorf("totalorder: %s is %d, must be at least %d", name, v, least))
		}
	}
	positive("decide_timeout", c.DecideTimeout)
	positive("block_timeout", c.BlockTimeout)
	if c.Expire < 2*c.DecideTimeout {
		errs = append(errs, fmt.Errorf("totalorder: expire is %v, must be at least twice decide_timeout, %v", c.Expire, c.DecideTimeout))
	}
	least("max_undecided", int64(c.MaxUndecided), 1)
	least("queue_messages", int64(c.QueueMessages), 1)
	least("sender_size", c.SenderSize, 1)
	least("queue_size", c.QueueSize, c.SenderSize)
	return errors.Join(errs...)
}

// Factory makes totalorder interceptors.
var Factory = channel.FactoryOf("totalorder", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// restored are the options that are taken off a message for its way and put on
// again by the receiver: a queue below would let messages overtake each other.
const restored = channel.Async

// Interceptor agrees with the other members on the place of every message.
type Interceptor struct {
	cfg     Config
	flights flight.Pool
	core    *core
}

// New makes a totalorder interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &Interceptor{cfg: c, core: newCore(c, s)}, nil
}

// Descriptor implements channel.Interceptor. A layer above that sends to each
// destination by itself would leave nothing to be agreed on.
func (o *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:            "totalorder",
		Flag:            channel.TotalOrder,
		Mutates:         true,
		Stateful:        true,
		Above:           []string{"dispatch", "order"},
		Provides:        []string{channel.PropTotalOrder, channel.PropOrder},
		ReceiveInterest: &channel.Interest{Any: channel.TotalOrder},
		Promise:         "delivers all messages in the same order at all members; in doubt a message is lost rather than out of order",
	}
}

// Start implements channel.Starter.
func (o *Interceptor) Start(_ context.Context, l channel.Link) error {
	o.core.start(l)
	return nil
}

// Stop implements channel.Stopper. Nothing can be received any more, so own
// messages are decided without the proposals that are missing; what still waits
// for others fails.
func (o *Interceptor) Stop(ctx context.Context) error { return o.core.stop(ctx) }

// Flush implements channel.Flusher: it waits until all received messages that
// have their place have been delivered.
func (o *Interceptor) Flush(ctx context.Context) error { return o.core.flush(ctx) }

// HandleSend implements channel.SendHandler.
func (o *Interceptor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if len(m.To) == 0 {
		return channel.ErrNoMembers
	}
	to, self := m.To, false
	local := l.Local().ID
	for i := range m.To {
		if m.To[i].ID == local {
			self = true
			to = append(append([]channel.Member(nil), m.To[:i]...), m.To[i+1:]...)
			break
		}
	}
	r, out, err := o.core.begin(ctx, m, to, self)
	if err != nil {
		return channel.Failed(m.To, err)
	}
	defer func() { o.core.sent(r.ordinal, to, err) }()
	// The result passes by the core: who has failed proposes nothing.
	orig, quiet := m, m.Done == nil && m.Options.Has(restored)
	switch {
	case out != nil && (m.Done != nil || quiet):
		watched := *m
		out.done, out.orig, out.quiet, watched.Done = m.Done, m, quiet, out
		orig = &watched
	case quiet: // nobody waits for it, as with a queue
		watched := *m
		watched.Done = (*quietEnd)(o.core)
		orig = &watched
	}
	f := o.flights.New(orig, self)
	if self {
		p := f.Part([]channel.Member{l.Local()}, len(m.Body))
		p.Message.Body = append(p.Message.Body, m.Body...)
		f.Begin(p)
		o.core.own(r, out, p, m.Options)
	}
	if len(to) > 0 {
		p := f.Part(to, len(m.Body)+requestTrailer)
		p.Message.Options = m.Options&^restored | channel.TotalOrder
		p.Message.Body = appendRequest(append(p.Message.Body, m.Body...), r)
		_ = f.Send(ctx, l, p)
	}
	err = f.End(ctx)
	if err != nil && out != nil {
		out.failed(err)
	}
	return err
}

// HandleReceive implements channel.ReceiveHandler. What is not marked does not
// take part.
func (o *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if m.Options&channel.TotalOrder == 0 {
		return l.Deliver(ctx, m)
	}
	switch kindOf(m.Body) {
	case kindOne, kindMany:
		body, r, err := parseRequest(m.Body)
		if err != nil {
			o.core.refusedMalformed.Inc()
			return err
		}
		m.Body = body
		m.Options = m.Options&^channel.TotalOrder | r.options
		return o.core.request(ctx, l, m, r)
	case kindControl:
		entries, clock, err := parseControl(nil, m.Body)
		if err != nil {
			o.core.refusedMalformed.Inc()
			return err
		}
		return o.core.control(m.From, entries, clock)
	}
	o.core.refusedMalformed.Inc()
	return errMalformed
}

// HandleMember implements channel.MemberHandler.
func (o *Interceptor) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	switch ev.Kind {
	case channel.MemberLost:
		o.core.gone(ev.Member.ID, true)
	case channel.MemberLeft:
		o.core.gone(ev.Member.ID, false)
	}
	return l.Announce(ctx, ev)
}

// HandleTick implements channel.TickHandler.
func (o *Interceptor) HandleTick(_ context.Context, _ channel.Link, now time.Time) error {
	o.core.tick(now)
	return nil
}
