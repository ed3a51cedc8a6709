package channeltest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// Chaos returns the factories of layers that do harm on purpose, to be put into
// any stack: chaos/drop, chaos/delay, chaos/dup, chaos/shuffle, chaos/corrupt
// and chaos/hold. What they do to the messages of one peer depends only on the
// seed and on the number of the message. They are for tests: a node that has
// one in its stack says so in the log at its start.
func Chaos() []channel.Factory[channel.Interceptor] {
	fs := []channel.Factory[channel.Interceptor]{
		channel.FactoryOf("chaos/drop", DefaultDrop, NewDrop),
		channel.FactoryOf("chaos/delay", DefaultDelay, NewDelay),
		channel.FactoryOf("chaos/dup", DefaultDup, NewDup),
		channel.FactoryOf("chaos/shuffle", DefaultShuffle, NewShuffle),
		channel.FactoryOf("chaos/corrupt", DefaultCorrupt, NewCorrupt),
		channel.FactoryOf("chaos/hold", DefaultHold, NewHold),
	}
	for i := range fs {
		fs[i].Source = "channel/channeltest"
	}
	return fs
}

// Directions of a chaos layer.
const (
	Both        = "both"
	SendOnly    = "send"
	ReceiveOnly = "receive"
)

// Hits says which messages a chaos layer harms.
type Hits struct {
	// Rate is the part of the messages that is hit, 0 to 1.
	Rate float64 `yaml:"rate"`
	// Direction is both, send or receive.
	Direction string `yaml:"direction"`
	// From and To name the senders and the receivers of the messages that may
	// be hit, by announced name, address or address:port; empty means all.
	From []string `yaml:"from"`
	To   []string `yaml:"to"`
	// Seed decides which of them are hit.
	Seed uint64 `yaml:"seed"`
}

func (h *Hits) validate(who string) error {
	var errs []error
	if !(h.Rate >= 0 && h.Rate <= 1) {
		errs = append(errs, fmt.Errorf("%s: rate is %v, must be 0 to 1", who, h.Rate))
	}
	if !slices.Contains([]string{Both, SendOnly, ReceiveOnly}, h.Direction) {
		errs = append(errs, fmt.Errorf("%s: direction is %q, must be both, send or receive", who, h.Direction))
	}
	return errors.Join(errs...)
}

// maxChaosPeers bounds the peers whose messages are numbered apart.
const maxChaosPeers = 4096

// chaos is what all chaos layers have in common.
type chaos struct {
	log  *zap.Logger
	name string
	what string // the promise
	hits Hits
	hit  *channel.Counter

	mu      sync.Mutex
	numbers map[uint64]uint64
}

func newChaos(name, what string, h Hits, s channel.Settings) *chaos {
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	return &chaos{
		log: s.Logger, name: name, what: what, hits: h, numbers: map[uint64]uint64{},
		hit: s.Metrics.Counter("chaos_hits_total", "Messages that were harmed on purpose.", "layer", name),
	}
}

// Descriptor implements channel.Interceptor.
func (c *chaos) Descriptor() channel.Descriptor {
	return channel.Descriptor{Name: c.name, Stateful: true, Promise: c.what}
}

// Start implements channel.Starter.
func (c *chaos) Start(context.Context, channel.Link) error {
	c.log.Warn("a layer that harms messages on purpose is in the stack; it is for tests", zap.String("layer", c.name))
	return nil
}

// roll decides about the next message between two members, and returns a
// random number for what to do to it.
func (c *chaos) roll(send bool, from, to channel.Member) (uint64, bool) {
	peer, direction := from, ReceiveOnly
	if send {
		peer, direction = to, SendOnly
	}
	if c.hits.Rate == 0 || c.hits.Direction != Both && c.hits.Direction != direction || !named(c.hits.From, from) || !named(c.hits.To, to) {
		return 0, false
	}
	key := mix(uint64(len(direction)), hostBits(peer), uint64(peer.Port))
	c.mu.Lock()
	n, known := c.numbers[key]
	if known || len(c.numbers) < maxChaosPeers {
		c.numbers[key] = n + 1
	}
	c.mu.Unlock()
	r := mix(c.hits.Seed, key, n)
	if float64(r>>11)/(1<<53) >= c.hits.Rate {
		return 0, false
	}
	c.hit.Inc()
	return mix(r, 1), true
}

func hostBits(m channel.Member) uint64 {
	if !m.Host.IsValid() {
		return 0
	}
	b := m.Host.As16()
	var h uint64
	for _, x := range b {
		h = h<<8 ^ h>>56 ^ uint64(x)
	}
	return h
}

func named(names []string, m channel.Member) bool {
	if len(names) == 0 {
		return true
	}
	host := m.Host.String()
	return slices.Contains(names, host) || slices.Contains(names, netip.AddrPortFrom(m.Host, uint16(m.Port)).String()) || slices.Contains(names, m.Name())
}

// split rolls for every destination and returns those that are hit and those
// that are not.
func (c *chaos) split(local channel.Member, to []channel.Member) (hit, rest []channel.Member, random uint64) {
	for _, m := range to {
		if r, ok := c.roll(true, local, m); ok {
			hit, random = append(hit, m), r
		} else {
			rest = append(rest, m)
		}
	}
	return hit, rest, random
}

// Drop loses messages.
type Drop struct {
	*chaos
	silent bool
}

// DropConfig configures [Drop].
type DropConfig struct {
	Hits `yaml:",inline"`
	// Silent: a sender that asked for an acknowledgement is told that the
	// message has arrived. Otherwise it is told what a loss on the network
	// would come to: that no acknowledgement came, or a negative one.
	Silent bool `yaml:"silent"`
}

// DefaultDrop loses a tenth.
var DefaultDrop = DropConfig{Hits: Hits{Rate: 0.1, Direction: Both}}

// Validate implements channel.Validator.
func (c *DropConfig) Validate() error { return c.Hits.validate("chaos/drop") }

// ErrDropped is what a message that was dropped fails with.
var ErrDropped = fmt.Errorf("chaos/drop: dropped on purpose: %w", channel.ErrAckTimeout)

// NewDrop makes a layer that loses messages, separately for each destination.
func NewDrop(c DropConfig, s channel.Settings) (channel.Interceptor, error) {
	return &Drop{newChaos("chaos/drop", "loses messages on purpose", c.Hits, s), c.Silent}, c.Validate()
}

// HandleSend implements channel.SendHandler.
func (d *Drop) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	hit, rest, _ := d.split(l.Local(), m.To)
	if len(hit) == 0 {
		return l.Send(ctx, m)
	}
	var fault *channel.SendError
	if m.Options.Has(channel.UseAck) && !d.silent {
		fault = channel.Failed(hit, ErrDropped)
	}
	if len(rest) == 0 {
		return finish(m, fault)
	}
	m.To = rest
	if m.Done != nil {
		m.Done = &alsoFailed{m.Done, fault}
		done := m.Done
		err := l.Send(ctx, m)
		if err != nil {
			m.Done = done.(*alsoFailed).done
		}
		return err
	}
	return merge(l.Send(ctx, m), fault)
}

// finish ends a message that goes no further.
func finish(m *channel.Message, fault *channel.SendError) error {
	var err error
	if fault != nil {
		err = fault
	}
	if m.Done == nil {
		return err
	}
	m.Done.Complete(m, err)
	return nil
}

func merge(err error, fault *channel.SendError) error {
	var below *channel.SendError
	switch {
	case fault == nil:
		return err
	case err == nil:
		return fault
	case errors.As(err, &below):
		return &channel.SendError{Faults: slices.Concat(below.Faults, fault.Faults)}
	}
	return errors.Join(err, fault)
}

// alsoFailed adds faults to the result of a message.
type alsoFailed struct {
	done  channel.Completion
	fault *channel.SendError
}

// Complete implements channel.Completion.
func (a *alsoFailed) Complete(m *channel.Message, err error) {
	m.Done = a.done
	a.done.Complete(m, merge(err, a.fault))
}

// HandleReceive implements channel.ReceiveHandler.
func (d *Drop) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if _, hit := d.roll(false, m.From, l.Local()); !hit {
		return l.Deliver(ctx, m)
	}
	if d.silent {
		return nil
	}
	return ErrDropped
}

// Delay makes messages slow. It holds up who sends, or the connection that the
// message came from, and so keeps their order.
type Delay struct {
	*chaos
	min, max time.Duration
}

// DelayConfig configures [Delay].
type DelayConfig struct {
	Hits `yaml:",inline"`
	// Min and Max bound the delay.
	Min time.Duration `yaml:"min"`
	Max time.Duration `yaml:"max"`
}

// DefaultDelay delays a tenth by up to 50 ms.
var DefaultDelay = DelayConfig{Hits: Hits{Rate: 0.1, Direction: Both}, Max: 50 * time.Millisecond}

// maxChaosTime bounds what a chaos layer may be told to wait.
const maxChaosTime = time.Hour

// Validate implements channel.Validator.
func (c *DelayConfig) Validate() error {
	err := c.Hits.validate("chaos/delay")
	if c.Min < 0 || c.Max < c.Min || c.Max > maxChaosTime {
		err = errors.Join(err, fmt.Errorf("chaos/delay: min is %v and max %v: must be 0 to 1h, min not above max", c.Min, c.Max))
	}
	return err
}

// NewDelay makes a layer that makes messages slow.
func NewDelay(c DelayConfig, s channel.Settings) (channel.Interceptor, error) {
	return &Delay{newChaos("chaos/delay", "delays messages on purpose", c.Hits, s), c.Min, c.Max}, c.Validate()
}

func (d *Delay) wait(ctx context.Context, r uint64) {
	pause(ctx, d.min+time.Duration(r%uint64(d.max-d.min+1)))
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// HandleSend implements channel.SendHandler.
func (d *Delay) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if hit, _, r := d.split(l.Local(), m.To); len(hit) > 0 {
		d.wait(ctx, r)
	}
	return l.Send(ctx, m)
}

// HandleReceive implements channel.ReceiveHandler.
func (d *Delay) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if r, hit := d.roll(false, m.From, l.Local()); hit {
		d.wait(ctx, r)
	}
	return l.Deliver(ctx, m)
}

// Dup passes messages on twice, under the same id.
type Dup struct{ *chaos }

// DupConfig configures [Dup].
type DupConfig struct {
	Hits `yaml:",inline"`
}

// DefaultDup repeats a tenth.
var DefaultDup = DupConfig{Hits: Hits{Rate: 0.1, Direction: Both}}

// Validate implements channel.Validator.
func (c *DupConfig) Validate() error { return c.Hits.validate("chaos/dup") }

// NewDup makes a layer that repeats messages. What it repeats on the way down a
// receiver may recognise by the id; what it repeats on the way up nobody does.
func NewDup(c DupConfig, s channel.Settings) (channel.Interceptor, error) {
	return &Dup{newChaos("chaos/dup", "repeats messages on purpose", c.Hits, s)}, c.Validate()
}

// HandleSend implements channel.SendHandler.
func (d *Dup) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	hit, _, _ := d.split(l.Local(), m.To)
	if len(hit) == 0 {
		return l.Send(ctx, m)
	}
	again := Clone(m)
	again.To = hit
	if err := l.Send(ctx, m); err != nil {
		return err
	}
	_ = l.Send(ctx, &again) // nobody asked for it
	return nil
}

// HandleReceive implements channel.ReceiveHandler.
func (d *Dup) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if _, hit := d.roll(false, m.From, l.Local()); !hit {
		return l.Deliver(ctx, m)
	}
	again := Clone(m)
	if err := l.Deliver(ctx, m); err != nil {
		return err
	}
	_ = l.Deliver(ctx, &again) // nobody asked for it
	return nil
}

// Corrupt flips bits of bodies.
type Corrupt struct {
	*chaos
	bits int
}

// CorruptConfig configures [Corrupt].
type CorruptConfig struct {
	Hits `yaml:",inline"`
	// Bits is how many bits of a body are flipped.
	Bits int `yaml:"bits"`
}

// DefaultCorrupt flips one bit of a tenth.
var DefaultCorrupt = CorruptConfig{Hits: Hits{Rate: 0.1, Direction: Both}, Bits: 1}

// maxFlips bounds CorruptConfig.Bits.
const maxFlips = 1024

// Validate implements channel.Validator.
func (c *CorruptConfig) Validate() error {
	err := c.Hits.validate("chaos/corrupt")
	if c.Bits < 1 || c.Bits > maxFlips {
		err = errors.Join(err, fmt.Errorf("chaos/corrupt: bits is %d, must be 1 to %d", c.Bits, maxFlips))
	}
	return err
}

// NewCorrupt makes a layer that damages bodies. Put it below what is to notice.
// Empty bodies stay as they are. A message to several members is damaged for
// all, if for one.
func NewCorrupt(c CorruptConfig, s channel.Settings) (channel.Interceptor, error) {
	return &Corrupt{newChaos("chaos/corrupt", "damages messages on purpose", c.Hits, s), c.Bits}, c.Validate()
}

func (c *Corrupt) damage(m *channel.Message, r uint64) {
	if len(m.Body) == 0 {
		return
	}
	m.Body = bytes.Clone(m.Body) // it may be the caller's own
	for range c.bits {
		r = mix(r)
		at := r % uint64(8*len(m.Body))
		m.Body[at/8] ^= 1 << (at % 8)
	}
}

// HandleSend implements channel.SendHandler.
func (c *Corrupt) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if hit, _, r := c.split(l.Local(), m.To); len(hit) > 0 {
		c.damage(m, r)
	}
	return l.Send(ctx, m)
}

// HandleReceive implements channel.ReceiveHandler.
func (c *Corrupt) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if r, hit := c.roll(false, m.From, l.Local()); hit {
		c.damage(m, r)
	}
	return l.Deliver(ctx, m)
}

// Hold stands still now and then: a message that is hit begins a pause for its
// direction, in which nothing goes on; then everything does at once. So does a
// node whose process has been stopped for a while.
type Hold struct {
	*chaos
	time     time.Duration
	mu       sync.Mutex
	down, up time.Time // no message before
}

// HoldConfig configures [Hold].
type HoldConfig struct {
	Hits `yaml:",inline"`
	// Time is how long a pause lasts.
	Time time.Duration `yaml:"time"`
}

// DefaultHold pauses for 200 ms at every hundredth message.
var DefaultHold = HoldConfig{Hits: Hits{Rate: 0.01, Direction: Both}, Time: 200 * time.Millisecond}

// Validate implements channel.Validator.
func (c *HoldConfig) Validate() error {
	err := c.Hits.validate("chaos/hold")
	if c.Time <= 0 || c.Time > maxChaosTime {
		err = errors.Join(err, fmt.Errorf("chaos/hold: time is %v, must be above 0 and at most 1h", c.Time))
	}
	return err
}

// NewHold makes a layer that stands still now and then.
func NewHold(c HoldConfig, s channel.Settings) (channel.Interceptor, error) {
	return &Hold{chaos: newChaos("chaos/hold", "stands still on purpose", c.Hits, s), time: c.Time}, c.Validate()
}

// wait waits for the end of a pause, beginning one if begin is set.
func (h *Hold) wait(ctx context.Context, until *time.Time, begin bool) {
	now := time.Now()
	h.mu.Lock()
	if begin && until.Before(now) {
		*until = now.Add(h.time)
	}
	d := until.Sub(now)
	h.mu.Unlock()
	if d > 0 {
		pause(ctx, d)
	}
}

// HandleSend implements channel.SendHandler.
func (h *Hold) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	hit, _, _ := h.split(l.Local(), m.To)
	h.wait(ctx, &h.down, len(hit) > 0)
	return l.Send(ctx, m)
}

// HandleReceive implements channel.ReceiveHandler.
func (h *Hold) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	_, hit := h.roll(false, m.From, l.Local())
	h.wait(ctx, &h.up, hit)
	return l.Deliver(ctx, m)
}
