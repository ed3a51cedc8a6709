// Package throughput is the interceptor that counts messages and bytes. It
// imports package channel only; it must not import core, plugins or fx.
package throughput

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// Config is what a user writes.
type Config struct {
	// Interval is the number of messages, of both directions together, between
	// two summaries in the log; 0 for none.
	Interval int64 `yaml:"interval"`
}

// Defaults are those of Tomcat.
var Defaults = Config{Interval: 10000}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	if c.Interval < 0 {
		return fmt.Errorf("throughput: interval is %d, must not be negative", c.Interval)
	}
	return nil
}

// Factory makes throughput interceptors.
var Factory = channel.FactoryOf("throughput", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// Interceptor counts what passes. Its handlers do not allocate.
type Interceptor struct {
	cfg      Config
	log      *zap.Logger
	sent     direction
	received direction
	next     atomic.Int64 // number of messages at which the next summary is due
	sampled  atomic.Int64 // time of the last rate sample, unix nanoseconds
}

// direction counts one direction.
type direction struct {
	messages, bytes, failed *channel.Counter

	// rates hold what passed per second in the last interval between ticks.
	messageRate, byteRate atomic.Int64
	// lastMessages and lastBytes are the counts at the last tick; ticks only.
	lastMessages, lastBytes int64
}

// New makes a throughput interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	t := &Interceptor{cfg: c, log: s.Logger}
	t.next.Store(c.Interval)
	for _, d := range []struct {
		name string
		*direction
	}{{"sent", &t.sent}, {"received", &t.received}} {
		d.messages = s.Metrics.Counter("throughput_messages_total", "Messages that passed; a sent message counts once per destination.", "direction", d.name)
		d.bytes = s.Metrics.Counter("throughput_bytes_total", "Bytes of bodies that passed; sent bodies count once per destination.", "direction", d.name)
		d.failed = s.Metrics.Counter("throughput_failures_total", "Messages that failed at once.", "direction", d.name)
		s.Metrics.Gauge("throughput_messages_per_second", "Messages per second between the last two ticks.", func() float64 { return float64(d.messageRate.Load()) }, "direction", d.name)
		s.Metrics.Gauge("throughput_bytes_per_second", "Bytes per second between the last two ticks.", func() float64 { return float64(d.byteRate.Load()) }, "direction", d.name)
	}
	return t, nil
}

// Descriptor implements channel.Interceptor.
func (t *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{Name: "throughput", Promise: "counts messages and bytes in both directions"}
}

// HandleSend implements channel.SendHandler.
func (t *Interceptor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	destinations, size := int64(len(m.To)), int64(len(m.Body))
	err := l.Send(ctx, m)
	t.sent.count(destinations, size*destinations, err)
	t.summary()
	return err
}

// HandleReceive implements channel.ReceiveHandler.
func (t *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	size := int64(len(m.Body))
	err := l.Deliver(ctx, m)
	t.received.count(1, size, err)
	t.summary()
	return err
}

func (d *direction) count(messages, bytes int64, err error) {
	d.messages.Add(messages)
	d.bytes.Add(bytes)
	if err != nil {
		d.failed.Inc()
	}
}

// summary logs when another interval is full.
func (t *Interceptor) summary() {
	next := t.next.Load()
	if next == 0 || t.sent.messages.Value()+t.received.messages.Value() < next || !t.next.CompareAndSwap(next, next+t.cfg.Interval) {
		return
	}
	t.log.Debug("throughput",
		zap.Int64("sent", t.sent.messages.Value()), zap.Int64("sent_bytes", t.sent.bytes.Value()),
		zap.Int64("sent_per_second", t.sent.messageRate.Load()), zap.Int64("send_failures", t.sent.failed.Value()),
		zap.Int64("received", t.received.messages.Value()), zap.Int64("received_bytes", t.received.bytes.Value()),
		zap.Int64("received_per_second", t.received.messageRate.Load()), zap.Int64("receive_failures", t.received.failed.Value()))
}

// HandleTick implements channel.TickHandler: it computes the rates.
func (t *Interceptor) HandleTick(_ context.Context, _ channel.Link, now time.Time) error {
	last := t.sampled.Swap(now.UnixNano())
	seconds := time.Duration(now.UnixNano() - last).Seconds()
	if last == 0 || seconds <= 0 {
		t.sent.mark()
		t.received.mark()
		return nil
	}
	t.sent.sample(seconds)
	t.received.sample(seconds)
	return nil
}

func (d *direction) mark() { d.lastMessages, d.lastBytes = d.messages.Value(), d.bytes.Value() }

func (d *direction) sample(seconds float64) {
	messages, bytes := d.lastMessages, d.lastBytes
	d.mark()
	d.messageRate.Store(int64(float64(d.lastMessages-messages) / seconds))
	d.byteRate.Store(int64(float64(d.lastBytes-bytes) / seconds))
}
