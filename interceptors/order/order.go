// Package order is the interceptor that keeps the order of the messages of one
// sender, in the format of Apache Tribes. It imports package channel and
// interceptors/internal only; it must not import core, plugins or fx.
package order

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/internal/flight"
)

// Config is what a user writes.
type Config struct {
	// Expire is how long an early message waits for those before it.
	Expire time.Duration `yaml:"expire"`
	// ForwardExpired delivers messages that have waited too long; otherwise
	// they are dropped.
	ForwardExpired bool `yaml:"forward_expired"`
	// OptionFlag restricts the layer to messages with this option bit; 0 for
	// all. All nodes need the same.
	OptionFlag channel.Options `yaml:"option_flag"`
	// MaxQueue and QueueSize bound the early messages of one sender: their
	// number, and their bytes. When they are exceeded the first of them wait no
	// longer.
	MaxQueue  int   `yaml:"max_queue"`
	QueueSize int64 `yaml:"queue_size"`
	// TotalSize bounds the early messages of all senders, in bytes.
	TotalSize int64 `yaml:"total_size"`
}

// Defaults are those of Tomcat, with bounds.
var Defaults = Config{
	Expire: 3 * time.Second, ForwardExpired: true,
	MaxQueue: 10000, QueueSize: 32 << 20, TotalSize: 128 << 20,
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.Expire <= 0 {
		errs = append(errs, fmt.Errorf("order: expire is %v, must be positive", c.Expire))
	}
	if c.OptionFlag != 0 && (c.OptionFlag < 0x10 || bits.OnesCount32(uint32(c.OptionFlag)) != 1) {
		errs = append(errs, fmt.Errorf("order: option_flag is 0x%x, must be 0 or one bit from 0x10 up", uint32(c.OptionFlag)))
	}
	if c.MaxQueue < 1 {
		errs = append(errs, fmt.Errorf("order: max_queue is %d, must be at least 1", c.MaxQueue))
	}
	if c.QueueSize < 1 {
		errs = append(errs, fmt.Errorf("order: queue_size is %d, must be at least 1", c.QueueSize))
	}
	if c.TotalSize < c.QueueSize {
		errs = append(errs, fmt.Errorf("order: total_size is %d, must be at least queue_size, %d", c.TotalSize, c.QueueSize))
	}
	return errors.Join(errs...)
}

// Factory makes order interceptors.
var Factory = channel.FactoryOf("order", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

const (
	// trailer is the length of the number at the end of every body.
	trailer = 4
	// maxPeers bounds the members that numbers are kept of, in each direction.
	maxPeers = 4096
)

// Interceptor numbers messages on their way down, each destination by itself,
// and delivers them by their numbers on their way up.
type Interceptor struct {
	cfg     Config
	flights flight.Pool
	in      *inbox

	numbered, withdrawn *channel.Counter

	mu      sync.Mutex
	numbers map[channel.UniqueID]*counter
}

// counter is the number of the last message to a member.
type counter struct {
	last int32
	used time.Time // guarded by Interceptor.mu: when a tick last saw it move
	seen int32
}

// New makes an order interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	m := s.Metrics
	return &Interceptor{
		cfg:       c,
		in:        newInbox(c, m),
		numbered:  m.Counter("order_numbered_total", "Messages sent with a number, once per destination."),
		withdrawn: m.Counter("order_withdrawn_total", "Numbers taken back because their message was never sent."),
		numbers:   map[channel.UniqueID]*counter{},
	}, nil
}

// Descriptor implements channel.Interceptor.
func (o *Interceptor) Descriptor() channel.Descriptor {
	d := channel.Descriptor{
		Name:     "order",
		Flag:     o.cfg.OptionFlag,
		Mutates:  true,
		Stateful: true,
		Provides: []string{channel.PropOrder},
		Promise:  fmt.Sprintf("delivers the messages of one sender in the order in which they were sent; waits %v for a missing one", o.cfg.Expire),
	}
	if o.cfg.OptionFlag != 0 { // only some messages are in order
		d.Provides = nil
		d.SendInterest, d.ReceiveInterest = &channel.Interest{Any: o.cfg.OptionFlag}, &channel.Interest{Any: o.cfg.OptionFlag}
	}
	return d
}

// Start implements channel.Starter.
func (o *Interceptor) Start(_ context.Context, l channel.Link) error {
	o.in.start(l)
	return nil
}

// Stop implements channel.Stopper.
func (o *Interceptor) Stop(ctx context.Context) error { return o.in.stop(ctx) }

// Flush implements channel.Flusher: early messages wait no longer.
func (o *Interceptor) Flush(ctx context.Context) error { return o.in.flush(ctx) }

// HandleSend implements channel.SendHandler. Every destination gets a message
// of its own, with a body of its own, because its number differs.
func (o *Interceptor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if !m.Options.Has(o.cfg.OptionFlag) {
		return l.Send(ctx, m)
	}
	if len(m.To) == 0 {
		return channel.ErrNoMembers
	}
	to, body := m.To, m.Body
	f := o.flights.New(m, len(to) > 1)
	for i := range to {
		p := f.Part(to[i:i+1], len(body)+trailer)
		n := o.take(to[i].ID)
		p.Message.Body = binary.BigEndian.AppendUint32(append(p.Message.Body, body...), uint32(n))
		if err := f.Send(ctx, l, p); err != nil && neverSent(err) {
			o.giveBack(to[i].ID, n)
		}
	}
	return f.End(ctx)
}

// take returns the next number for a member.
func (o *Interceptor) take(id channel.UniqueID) int32 {
	o.numbered.Inc()
	o.mu.Lock()
	defer o.mu.Unlock()
	c := o.numbers[id]
	if c == nil {
		if len(o.numbers) >= maxPeers {
			o.dropOne()
		}
		c = &counter{used: time.Now()}
		o.numbers[id] = c
	}
	c.last++
	return c.last
}

// dropOne forgets the longest unused of a few random counters; o.mu is held.
func (o *Interceptor) dropOne() {
	var oldest channel.UniqueID
	var when time.Time
	n := 0
	for id, c := range o.numbers {
		if n == 0 || c.used.Before(when) {
			oldest, when = id, c.used
		}
		if n++; n == 16 {
			break
		}
	}
	delete(o.numbers, oldest)
}

// giveBack takes a number back that nobody has seen, so that the receiver does
// not wait for it. That is too late if another message has the next one.
func (o *Interceptor) giveBack(id channel.UniqueID, n int32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if c := o.numbers[id]; c != nil && c.last == n {
		c.last--
		o.withdrawn.Inc()
	}
}

// neverSent reports whether an error says that the message has not left this
// node.
func neverSent(err error) bool {
	for _, e := range []error{channel.ErrTooLarge, channel.ErrQueueFull, channel.ErrClosed, channel.ErrBadMessage, channel.ErrNotConfigured} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// HandleReceive implements channel.ReceiveHandler.
func (o *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if !m.Options.Has(o.cfg.OptionFlag) {
		return l.Deliver(ctx, m)
	}
	n := len(m.Body) - trailer
	if n < 0 {
		o.in.refused.Inc()
		return errShort
	}
	number := int32(binary.BigEndian.Uint32(m.Body[n:]))
	m.Body = m.Body[:n:n]
	return o.in.receive(ctx, l, m, number)
}

var errShort = fmt.Errorf("order: %w: there is no number at its end", channel.ErrBadMessage)

// HandleMember implements channel.MemberHandler: as in Tribes, a member that has
// gone is sent numbers from 1 when it comes back. What it has sent itself may
// still be on its way.
func (o *Interceptor) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	if ev.Kind == channel.MemberLost || ev.Kind == channel.MemberLeft {
		o.mu.Lock()
		delete(o.numbers, ev.Member.ID)
		o.mu.Unlock()
	}
	return l.Announce(ctx, ev)
}

// idle is how long the number of a member that is not in the view is kept.
const idle = 10 * time.Minute // also of the state of a sender

// HandleTick implements channel.TickHandler.
func (o *Interceptor) HandleTick(_ context.Context, l channel.Link, now time.Time) error {
	v := l.View()
	o.in.tick(now, v)
	o.mu.Lock()
	defer o.mu.Unlock()
	for id, c := range o.numbers {
		if c.seen != c.last {
			c.seen, c.used = c.last, now
		} else if now.Sub(c.used) >= idle {
			if _, there := v.Get(id); !there {
				delete(o.numbers, id)
			}
		}
	}
	return nil
}
