// Package throughput is the interceptor that counts messages and bytes and
// measures how long sending takes. It imports package channel only; it must not import core, plugins or fx.
package throughput

import (
	"context"
	"errors"
	"fmt"
	"sync"
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
	// Every is how many sends there are for one whose duration is measured: the
	// clock costs more than the counting.
	Every int64 `yaml:"every"`
	// MaxMembers bounds the members that are counted each; the others are
	// counted together. 0 counts none.
	MaxMembers int `yaml:"max_members"`
}

// maxMaxMembers bounds Config.MaxMembers: a metric with more values is of no
// use.
const maxMaxMembers = 1024

// Defaults write summaries as Tomcat does.
var Defaults = Config{Interval: 10000, Every: 16, MaxMembers: 64}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.Interval < 0 {
		errs = append(errs, fmt.Errorf("throughput: interval is %d, must not be negative", c.Interval))
	}
	if c.Every < 1 {
		errs = append(errs, fmt.Errorf("throughput: every is %d, must be at least 1", c.Every))
	}
	if c.MaxMembers < 0 || c.MaxMembers > maxMaxMembers {
		errs = append(errs, fmt.Errorf("throughput: max_members is %d, must be 0 to %d", c.MaxMembers, maxMaxMembers))
	}
	return errors.Join(errs...)
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
	sends    atomic.Int64 // to find every n-th
	latency  [kinds]*channel.Histogram
	members  members
}

// direction counts one direction.
type direction struct {
	messages, bytes, failed *channel.Counter
	sizes                   *channel.Histogram

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
	t.members.init(c.MaxMembers, s.Metrics)
	for k, name := range kindNames {
		t.latency[k] = s.Metrics.Histogram("throughput_send_seconds", "How long sending took, until its result was known; of some messages.", 1e-9, latencyBounds, "option", name)
	}
	t.next.Store(c.Interval)
	for _, d := range []struct {
		name string
		*direction
	}{{"sent", &t.sent}, {"received", &t.received}} {
		d.messages = s.Metrics.Counter("throughput_messages_total", "Messages that passed; a sent message counts once per destination.", "direction", d.name)
		d.bytes = s.Metrics.Counter("throughput_bytes_total", "Bytes of bodies that passed; sent bodies count once per destination.", "direction", d.name)
		d.failed = s.Metrics.Counter("throughput_failures_total", "Messages that failed at once.", "direction", d.name)
		d.sizes = s.Metrics.Histogram("throughput_size_bytes", "Sizes of bodies; a sent message counts once.", 1, sizeBounds, "direction", d.name)
		s.Metrics.Gauge("throughput_messages_per_second", "Messages per second between the last two ticks.", func() float64 { return float64(d.messageRate.Load()) }, "direction", d.name)
		s.Metrics.Gauge("throughput_bytes_per_second", "Bytes per second between the last two ticks.", func() float64 { return float64(d.byteRate.Load()) }, "direction", d.name)
	}
	return t, nil
}

// Descriptor implements channel.Interceptor.
func (t *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{Name: "throughput", Promise: "counts messages and bytes in both directions and measures how long sending takes"}
}

// HandleSend implements channel.SendHandler.
func (t *Interceptor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	destinations, size := int64(len(m.To)), int64(len(m.Body))
	t.sent.sizes.Observe(size)
	t.members.sent(m.To, size)
	var err error
	if t.sends.Add(1)%t.cfg.Every == 1%t.cfg.Every {
		err = t.timed(ctx, l, m)
	} else {
		err = l.Send(ctx, m)
	}
	t.sent.count(destinations, size*destinations, err)
	if err != nil {
		t.members.failed(err)
	}
	t.summary()
	return err
}

// timed sends m and measures how long it takes.
func (t *Interceptor) timed(ctx context.Context, l channel.Link, m *channel.Message) error {
	hist, start := t.latency[kindOf(m.Options)], time.Now()
	if m.Done == nil {
		err := l.Send(ctx, m)
		hist.Observe(int64(time.Since(start)))
		return err
	}
	w := watchPool.Get().(*watch)
	w.done, w.start, w.hist = m.Done, start, hist
	m.Done = w
	return l.Send(ctx, m) // after an error w is not called; it is not used again
}

// watch is told the result of a message whose duration is measured. It is
// pooled.
type watch struct {
	done  channel.Completion
	start time.Time
	hist  *channel.Histogram
}

var watchPool = sync.Pool{New: func() any { return new(watch) }}

// Complete implements channel.Completion.
func (w *watch) Complete(m *channel.Message, err error) {
	w.hist.Observe(int64(time.Since(w.start)))
	done := w.done
	*w = watch{}
	watchPool.Put(w)
	done.Complete(m, err)
}

// kind says how a message is sent.
type kind int

const (
	none kind = iota
	ack
	syncAck
	async
	kinds
)

var kindNames = [kinds]string{"none", "ack", "sync", "async"}

func kindOf(o channel.Options) kind {
	switch {
	case o.Has(channel.Async):
		return async
	case o.Has(channel.UseAck | channel.SyncAck):
		return syncAck
	case o.Has(channel.UseAck):
		return ack
	}
	return none
}

var (
	// latencyBounds are 10 µs to 10 s, sizeBounds 64 B to 64 MiB.
	latencyBounds = steps(10*time.Microsecond, 10*time.Second)
	sizeBounds    = []int64{64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20}
)

// steps returns 1, 2, 5, 10, … times first, up to last.
func steps(first, last time.Duration) (list []int64) {
	for d := first; d <= last; d *= 10 {
		for _, f := range []time.Duration{1, 2, 5} {
			if d*f <= last {
				list = append(list, int64(d*f))
			}
		}
	}
	return list
}

// HandleReceive implements channel.ReceiveHandler.
func (t *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	size, from := int64(len(m.Body)), m.From.ID
	t.received.sizes.Observe(size)
	t.members.received(from, size)
	err := l.Deliver(ctx, m)
	t.received.count(1, size, err)
	t.summary()
	return err
}

// HandleMember implements channel.MemberHandler.
func (t *Interceptor) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		t.members.add(ev.Member)
	case channel.MemberLost, channel.MemberLeft:
		t.members.remove(ev.Member)
	}
	return l.Announce(ctx, ev)
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
		zap.Int64("received_per_second", t.received.messageRate.Load()), zap.Int64("receive_failures", t.received.failed.Value()),
		zap.Duration("p99_ack", time.Duration(t.latency[ack].Quantile(0.99))), zap.Duration("p99_sync", time.Duration(t.latency[syncAck].Quantile(0.99))))
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
