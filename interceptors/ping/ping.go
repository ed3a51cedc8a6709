// Package ping is the interceptor that sends every member a small message now
// and then, so that one that has died is noticed before it is needed. It imports
// package channel only; it must not import core, plugins or fx.
package ping

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// body is the body of a ping: what Tribes' TcpPingInterceptor sends and
// swallows.
const body = "\x4f\xa7\x73\x48\x79\xdf\x43\xc9\x9f\x6f\x89\x80\xa1\x5b\x07\x14" +
	"\x7d\xd9\x52\x5b\xeb\xdf\x43\x9a\xb7\x7e\xbe\x8f\x81\x67\x1e\xb6" +
	"\x37\x15\xbe\x87\x45\x21\x4c\xa8\xbf\x0a\x4d\x13\x53\x38\x15\x32" +
	"\x55\xf6\x94\xb7\x3a\xdf\x21\x78\x91\x04\x7d\xd7\x72\x84\xc0\xd5"

// silentAfter is how many intervals the alive time of a member must have stood
// still before it counts as one without heartbeats, and silentAtLeast the least
// time.
const (
	silentAfter   = 3
	silentAtLeast = 3 * time.Second
)

// Config is what a user writes.
type Config struct {
	// Interval is the time between two pings of a member.
	Interval time.Duration `yaml:"interval"`
	// Timeout bounds a ping, from sending to its acknowledgement.
	Timeout time.Duration `yaml:"timeout"`
	// StaticOnly: only members that no heartbeats are heard of, such as those of
	// the static member layer.
	StaticOnly bool `yaml:"static_only"`
	// MaxPings bounds the pings that are on their way at once.
	MaxPings int `yaml:"max_pings"`
}

// Defaults ping everybody every second, as Tomcat's thread does.
var Defaults = Config{Interval: time.Second, Timeout: 3 * time.Second, MaxPings: 64}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.Interval < 10*time.Millisecond {
		errs = append(errs, fmt.Errorf("ping: interval is %v, must be at least 10ms", c.Interval))
	}
	if c.Timeout <= 0 {
		errs = append(errs, fmt.Errorf("ping: timeout is %v, must be positive", c.Timeout))
	}
	if c.MaxPings < 1 || c.MaxPings > 4096 {
		errs = append(errs, fmt.Errorf("ping: max_pings is %d, must be 1 to 4096", c.MaxPings))
	}
	return errors.Join(errs...)
}

// Factory makes ping interceptors.
var Factory = channel.FactoryOf("ping", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// Interceptor pings members.
type Interceptor struct {
	cfg Config
	log *zap.Logger

	sent, answered, failed, skipped, received *channel.Counter

	cancel context.CancelFunc // set by Start
	wg     sync.WaitGroup

	mu     sync.Mutex
	flight map[channel.UniqueID]bool // the members that a ping is on its way to
}

// New makes a ping interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	return &Interceptor{
		cfg:      c,
		log:      s.Logger,
		sent:     s.Metrics.Counter("ping_sent_total", "Pings sent."),
		answered: s.Metrics.Counter("ping_answered_total", "Pings that were acknowledged."),
		failed:   s.Metrics.Counter("ping_failed_total", "Pings that were not acknowledged in time."),
		skipped:  s.Metrics.Counter("ping_skipped_total", "Pings that were left out because the last one to the member, or max_pings others, were still on their way."),
		received: s.Metrics.Counter("ping_received_total", "Pings by other members."),
		flight:   map[channel.UniqueID]bool{},
	}, nil
}

// Descriptor implements channel.Interceptor.
func (p *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:            "ping",
		Stateful:        true,
		Above:           []string{"failuredetector", "staticmember"},
		Wants:           []string{"failuredetector"},
		Promise:         "pings every member, so that a dead one is checked before somebody needs it",
		SendInterest:    &channel.Interest{MaxSize: -1},
		ReceiveInterest: &channel.Interest{MinSize: len(body), MaxSize: len(body)},
	}
}

// Start implements channel.Starter.
func (p *Interceptor) Start(_ context.Context, l channel.Link) error {
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	p.wg.Go(func() { p.run(ctx, l) })
	return nil
}

// Stop implements channel.Stopper. Pings that are on their way are broken off.
func (p *Interceptor) Stop(context.Context) error {
	if p.cancel != nil {
		p.cancel()
	}
	p.wg.Wait()
	return nil
}

// HandleReceive implements channel.ReceiveHandler: pings by others end here;
// that they are acknowledged is the receiver's part.
func (p *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if len(m.Body) == len(body) && string(m.Body) == body {
		p.received.Inc()
		return nil
	}
	return l.Deliver(ctx, m)
}

// pulse is what is known of the heartbeats of a member.
type pulse struct {
	alive time.Duration
	since time.Time // when alive was first seen
}

// run is the goroutine that sends pings.
func (p *Interceptor) run(ctx context.Context, l channel.Link) {
	tick := time.NewTicker(p.cfg.Interval)
	defer tick.Stop()
	pulses := map[channel.UniqueID]pulse{}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		members, now := l.View().Members, time.Now()
		if p.cfg.StaticOnly {
			members = silent(pulses, members, now, max(silentAfter*p.cfg.Interval, silentAtLeast))
		}
		for _, m := range members {
			p.ping(ctx, l, m)
		}
	}
}

// silent returns the members whose alive time has not changed for some time. It
// brings pulses up to date.
func silent(pulses map[channel.UniqueID]pulse, members []channel.Member, now time.Time, after time.Duration) (list []channel.Member) {
	there := make(map[channel.UniqueID]bool, len(members))
	for _, m := range members {
		there[m.ID] = true
		last, known := pulses[m.ID]
		switch {
		case !known || last.alive != m.Alive:
			pulses[m.ID] = pulse{m.Alive, now}
		case now.Sub(last.since) >= after:
			list = append(list, m)
		}
	}
	for id := range pulses {
		if !there[id] {
			delete(pulses, id)
		}
	}
	return list
}

// ping sends one ping in a goroutine of its own: a member that accepts messages
// and never answers delays nobody else.
func (p *Interceptor) ping(ctx context.Context, l channel.Link, m channel.Member) {
	if !p.begin(m.ID) {
		p.skipped.Inc()
		return
	}
	p.wg.Go(func() {
		defer p.end(m.ID)
		ctx, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
		defer cancel()
		p.sent.Inc()
		err := l.Send(ctx, &channel.Message{
			ID: channel.NewUniqueID(), From: l.Local(), To: []channel.Member{m},
			Options: channel.SendAck, Time: time.Now().UnixMilli(), Body: []byte(body),
		})
		switch {
		case err == nil:
			p.answered.Inc()
		case !errors.Is(ctx.Err(), context.Canceled):
			// The channel suspects the member by itself, and the failure
			// detector checks it.
			p.failed.Inc()
			p.log.Debug("a member did not acknowledge a ping", zap.Stringer("member", m), zap.Error(err))
		}
	})
}

func (p *Interceptor) begin(id channel.UniqueID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.flight[id] || len(p.flight) >= p.cfg.MaxPings {
		return false
	}
	p.flight[id] = true
	return true
}

func (p *Interceptor) end(id channel.UniqueID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.flight, id)
}
