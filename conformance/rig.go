package conformance

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing/synctest"
	"time"

	"github.com/pion/transport/v2"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
)

// Virtual reports whether time is virtual here: in all modes but process.
func (t *T) Virtual() bool { return t.Mode != core.Process }

// Place runs f where the subject can run: in virtual time with a simulated
// network, or, for a process, in real time with the real one.
func (t *T) Place(f func(t *T, n transport.Net)) {
	t.Helper()
	if t.Virtual() {
		t.Sim(channeltest.SimConfig{}, func(t *T, nw *channeltest.SimNet) { f(t, nw.Node("10.0.255.1")) })
		return
	}
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatalf("network: %v", err)
	}
	f(t, n)
}

// Settle waits until what was begun has happened: exactly in virtual time, for
// Timeouts.Quiet in real time.
func (t *T) Settle() {
	if t.Virtual() {
		synctest.Wait()
		return
	}
	time.Sleep(t.Timeouts.Quiet)
}

// probe is a transparent layer above or below the subject.
type probe struct {
	desc            channel.Descriptor
	sends, receives atomic.Int64
	// onSend and onReceive, if set, take the place of passing on. Set them
	// before the traffic.
	onSend, onReceive func(ctx context.Context, l channel.Link, m *channel.Message) error
	// events counts member events.
	events atomic.Int64
}

func (p *probe) Descriptor() channel.Descriptor { return p.desc }

func (p *probe) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	p.sends.Add(1)
	if p.onSend != nil {
		return p.onSend(ctx, l, m)
	}
	return l.Send(ctx, m)
}

func (p *probe) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	p.receives.Add(1)
	if p.onReceive != nil {
		return p.onReceive(ctx, l, m)
	}
	return l.Deliver(ctx, m)
}

func (p *probe) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	p.events.Add(1)
	return l.Announce(ctx, ev)
}

func (p *probe) calls() int64 { return p.sends.Load() + p.receives.Load() + p.events.Load() }

// rig is one instance of the subject in an embedded channel, between two
// probes.
type rig struct {
	*channeltest.Embedded
	t            *T
	layer        channel.Interceptor
	desc         channel.Descriptor
	above, below *probe
	metrics      *channel.Metrics
	net          transport.Net
	self         channel.Member // what others address it as
	other        *rig           // sends for the check, see encoded
}

// rigConfig says what is special about a rig.
type rigConfig struct {
	discard bool
	tick    time.Duration
	// manual: the check starts and stops the channel itself.
	manual bool
	// local is the member whose id the channel has; its address does not
	// matter.
	local channel.Member
	// onSend of the probe below.
	onSend func(ctx context.Context, l channel.Link, m *channel.Message) error
}

func (t *T) interceptor() InterceptorSubject {
	s, ok := t.Subject.(InterceptorSubject)
	if !ok {
		t.Fatalf("a %T is no interceptor", t.Subject)
	}
	return s
}

// rig makes a channel with one instance of the subject.
func (t *T) rig(n transport.Net, c rigConfig) *rig {
	t.Helper()
	r := &rig{t: t, net: n, metrics: channel.NewMetrics(), above: &probe{}, below: &probe{onSend: c.onSend}}
	settings := channel.Settings{Name: "subject", Net: n, Metrics: r.metrics}
	var err error
	if r.layer, err = t.interceptor().Interceptor(t, withLogger(settings)); err != nil {
		t.Fatalf("make the subject: %v", err)
	}
	r.desc = r.layer.Descriptor()
	r.above.desc.Name = "probe-above"
	// Whatever the subject needs below it, the probe claims to provide.
	r.below.desc = channel.Descriptor{Name: "probe-below", Provides: r.desc.Requires}
	if c.tick == 0 {
		c.tick = time.Second
	}
	if r.self = c.local; r.self.ID.IsZero() {
		r.self = channeltest.Member(255)
	}
	r.Embedded, err = channeltest.NewEmbedded(channeltest.EmbedConfig{
		Layers: []channel.Interceptor{r.above, r.layer, r.below}, Settings: settings, Tick: c.tick, Discard: c.discard,
		Local: channel.Member{ID: r.self.ID},
	})
	if err == nil && !c.manual {
		err = r.Start(t.Context())
	}
	if err != nil {
		t.Fatalf("a stack with the subject: %v", err)
	}
	if !c.manual {
		t.Cleanup(func() {
			if err := r.stop(); err != nil {
				t.Errorf("stop: %v", err)
			}
		})
	}
	return r
}

func (r *rig) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), r.t.Timeouts.Stop)
	defer cancel()
	return r.Stop(ctx)
}

// join makes members known to the rig.
func (r *rig) join(ms ...channel.Member) {
	r.t.Helper()
	for _, m := range ms {
		r.Observe(channel.MemberAdded, m)
	}
	if slices.Contains(r.desc.Provides, channel.PropCheckedRemoval) {
		// It may show only members that pass its check, and there is nobody at
		// their addresses. That it shows those who are is a check of its own.
		r.t.Settle()
		return
	}
	r.t.Eventually(r.t.Timeouts.Event, func() error {
		for _, m := range ms {
			if !r.View().Has(m) {
				return fmt.Errorf("the subject keeps the member %v from the layers above", m)
			}
		}
		return nil
	})
}

// later is the end of a received message, as a receiver hands it over.
type later struct {
	deferred atomic.Bool
	end      chan error
}

// Defer implements channel.Deferrer.
func (l *later) Defer() func(error) {
	l.deferred.Store(true)
	return func(err error) {
		select {
		case l.end <- err:
		default: // told already
		}
	}
}

// deliver hands a message to the bottom of the stack and returns what an
// acknowledgement would say, also if that is decided later.
func (r *rig) deliver(ctx context.Context, m *channel.Message) error {
	end := &later{end: make(chan error, 1)}
	m.Later = end
	err := r.Embedded.Receive(ctx, m)
	if !end.deferred.Load() {
		return err
	}
	timer := time.NewTimer(r.t.patience())
	defer timer.Stop()
	select {
	case err := <-end.end:
		return err
	case <-timer.C:
		return errNeverEnded
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errNeverEnded = errors.New("conformance: the end of the message was deferred and never told")

// panics counts the panics of layers.
func (r *rig) panics() (n int) {
	for _, s := range r.metrics.Samples() {
		if s.Name == "channel_layer_panics_total" {
			n += int(s.Value)
		}
	}
	return n
}

// drops sums up the counters whose name says that something was thrown away.
func (r *rig) drops() (n int) {
	samples := r.metrics.Samples()
	r.t.note.mu.Lock()
	hosts := slices.Clone(r.t.note.hosts)
	r.t.note.mu.Unlock()
	if !r.t.Virtual() { // the counters of a process are its own
		for _, h := range hosts {
			samples = append(samples, h.Samples(context.Background())...)
		}
	}
	for _, s := range samples {
		for _, word := range []string{"drop", "refus", "reject", "discard", "error", "filter", "swallow", "expired"} {
			if s.Counter && strings.Contains(s.Name, word) {
				n += int(s.Value)
				break
			}
		}
	}
	return n
}

// received is what came out at the top, in order.
func (r *rig) received() []channel.Message { return r.Top.Messages() }

// sendOptions are the ways to send that a layer must cope with: flag is set on
// the way down only if that is the user's to set.
func (r *rig) sendOptions() []channel.Options {
	other := channel.ThirdPartyMax
	if r.desc.Flag == other {
		other >>= 1
	}
	list := []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck, channel.SendAck | other}
	if f := r.userFlag(); f != 0 {
		list = append(list, channel.ByteMessage|f)
	}
	return list
}

// userFlag is the layer's flag if the sender of a message sets it, as for
// asynchronous ones, and not the layer itself.
func (r *rig) userFlag() channel.Options {
	if r.desc.Mutates {
		return 0
	}
	return r.desc.Flag
}

// pair is two rigs of which the first sends to the second.
type pair struct {
	a, b *rig
	// peerA and peerB are the members that the rigs stand for.
	peerA, peerB channel.Member
	// fed, if set, is told every message that b is given.
	fed func(m *channel.Message, body []byte)
}

// pair makes two rigs and connects them: every message that reaches the bottom
// of a is received by b, as from peerA.
func (t *T) pair(n transport.Net, a, b rigConfig) *pair {
	t.Helper()
	p := &pair{peerA: channeltest.Member(1), peerB: channeltest.Member(2)}
	a.local, b.local = p.peerA, p.peerB
	p.a, p.b = t.rig(n, a), t.rig(n, b)
	p.a.join(p.peerB)
	p.b.join(p.peerA)
	p.a.OnSend(func(ctx context.Context, m *channel.Message) error {
		if err := p.b.deliver(ctx, p.incoming(m)); err != nil {
			return channel.Failed(m.To, channel.ErrNegativeAck)
		}
		return nil
	})
	return p
}

// incoming is a message as the other side's receiver hands it over.
func (p *pair) incoming(m *channel.Message) *channel.Message {
	c := channeltest.Clone(m)
	c.To, c.Done, c.From = nil, nil, p.peerA
	if p.fed != nil {
		p.fed(&c, c.Body)
	}
	return &c
}

// sum names a body in messages.
func sum(b []byte) string {
	h := sha256.Sum256(b)
	return fmt.Sprintf("%d bytes %x", len(b), h[:6])
}

func withLogger(s channel.Settings) channel.Settings {
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	return s
}
