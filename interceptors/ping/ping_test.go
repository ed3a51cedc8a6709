package ping

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
)

func value(m *channel.Metrics, name string) float64 { return channeltest.Sum(m, name) }

// embed runs f with a ping layer in a channel without a network.
func embed(t *testing.T, change func(*Config), f func(e *channeltest.Embedded, metrics *channel.Metrics)) {
	synctest.Test(t, func(t *testing.T) {
		cfg, metrics := Defaults, channel.NewMetrics()
		if change != nil {
			change(&cfg)
		}
		s := channel.Settings{Metrics: metrics}
		p, err := New(cfg, s)
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{p}, Settings: s, Tick: 500 * time.Millisecond})
		f(e, metrics)
	})
}

// The bytes are those that a Tomcat node sends and understands.
func TestBytes(t *testing.T) {
	text, err := os.ReadFile("testdata/ping.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Vectors []struct{ Name, Hex string } }
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Vectors) != 1 || file.Vectors[0].Hex != hex.EncodeToString([]byte(body)) {
		t.Errorf("the body is %x", body)
	}
}

func TestEverybodyIsPinged(t *testing.T) {
	embed(t, nil, func(e *channeltest.Embedded, metrics *channel.Metrics) {
		for i := range 3 {
			e.Observe(channel.MemberAdded, channeltest.Member(i+1))
		}
		time.Sleep(5*time.Second + 100*time.Millisecond)
		by := map[string]int{}
		for _, m := range e.Bottom.Messages() {
			if string(m.Body) != body || len(m.To) != 1 || m.Options != channel.SendAck || m.From.ID != e.Local().ID {
				t.Fatalf("sent %+v", m)
			}
			by[m.To[0].Name()]++
		}
		for i := range 3 {
			if n := by[fmt.Sprint("node", i+1)]; n != 5 {
				t.Errorf("node %d was pinged %d times in 5 s", i+1, n)
			}
		}
		if value(metrics, "ping_sent_total") != 15 || value(metrics, "ping_answered_total") != 15 {
			t.Error("the counters are wrong")
		}
	})
}

func TestPingsOfOthersAreSwallowed(t *testing.T) {
	embed(t, nil, func(e *channeltest.Embedded, metrics *channel.Metrics) {
		for _, o := range []channel.Options{0, channel.SendNone, channel.SendAck, channel.SendSyncAck} {
			if err := e.Receive(t.Context(), &channel.Message{ID: channel.NewUniqueID(), From: channeltest.Member(1), Options: o, Body: []byte(body)}); err != nil {
				t.Error(err)
			}
		}
		for _, b := range []string{"", body[:63], body + "x", body[:63] + "x"} {
			if err := e.ReceiveBody(channeltest.Member(1), channel.SendNone, b); err != nil {
				t.Error(err)
			}
		}
		if n := len(e.Top.Messages()); n != 4 {
			t.Errorf("%d messages reached the application, want 4", n)
		}
		if n := value(metrics, "ping_received_total"); n != 4 {
			t.Errorf("%v pings counted", n)
		}
	})
}

// Members that heartbeats are heard of are left alone.
func TestStaticOnly(t *testing.T) {
	embed(t, func(c *Config) { c.StaticOnly = true }, func(e *channeltest.Embedded, metrics *channel.Metrics) {
		static, heard := channeltest.Member(1), channeltest.Member(2)
		e.Observe(channel.MemberAdded, static)
		e.Observe(channel.MemberAdded, heard)
		beat := func(times int) {
			for range times {
				time.Sleep(500 * time.Millisecond)
				heard.Alive += 500 * time.Millisecond
				e.Observe(channel.MemberUpdated, heard)
			}
		}
		beat(40)
		for _, m := range e.Bottom.Messages() {
			if !m.To[0].Is(static) {
				t.Fatalf("%v was pinged", m.To[0])
			}
		}
		if n := len(e.Bottom.Messages()); n < 10 {
			t.Errorf("%d pings of the static member in 20 s", n)
		}
		e.Observe(channel.MemberLeft, static)
		beat(4)
		before := len(e.Bottom.Messages())
		beat(20)
		if n := len(e.Bottom.Messages()); n != before {
			t.Errorf("%d pings of a member that has left", n-before)
		}
	})
}

// A member that never acknowledges has one ping on its way, and delays nobody.
func TestBounds(t *testing.T) {
	embed(t, func(c *Config) { c.Timeout, c.MaxPings = 10*time.Second, 3 }, func(e *channeltest.Embedded, metrics *channel.Metrics) {
		stuck := channeltest.Member(1)
		e.OnSend(func(ctx context.Context, m *channel.Message) error {
			if !m.To[0].Is(stuck) {
				return nil
			}
			<-ctx.Done()
			return channel.Failed(m.To, channel.ErrAckTimeout)
		})
		e.Observe(channel.MemberAdded, stuck)
		e.Observe(channel.MemberAdded, channeltest.Member(2))
		time.Sleep(9*time.Second + 100*time.Millisecond)
		if sent, skipped := value(metrics, "ping_sent_total"), value(metrics, "ping_skipped_total"); sent != 1+9 || skipped != 8 {
			t.Errorf("%v pings sent and %v left out, want 10 and 8", sent, skipped)
		}
		time.Sleep(3 * time.Second)
		if n := value(metrics, "ping_failed_total"); n != 1 {
			t.Errorf("%v pings failed", n)
		}
		// All stuck: no more than the bound.
		e.OnSend(func(ctx context.Context, m *channel.Message) error {
			<-ctx.Done()
			return channel.Failed(m.To, channel.ErrAckTimeout)
		})
		for i := range 10 {
			e.Observe(channel.MemberAdded, channeltest.Member(10+i))
		}
		before := len(e.Bottom.Messages())
		time.Sleep(2 * time.Second)
		if n := len(e.Bottom.Messages()) - before; n > 3 {
			t.Errorf("%d pings at once", n)
		}
	})
}

// member is a node with a real receiver.
func member(t *testing.T, node *channeltest.SimNode) *channel.Channel {
	t.Helper()
	s := channel.Settings{Net: node, Logger: zap.NewNop()}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = node.IP()
	p, err := New(Defaults, s)
	if err != nil {
		t.Fatal(err)
	}
	d, err := failuredetector.New(failuredetector.Defaults, s)
	if err != nil {
		t.Fatal(err)
	}
	stack, err := channel.NewStack(channel.Layer{Interceptor: p}, channel.Layer{Interceptor: d})
	if err != nil {
		t.Fatal(err)
	}
	ch, err := channel.New(channel.Config{
		Announcement: channel.Announcement{Name: node.IP(), Pipelined: true}, Stack: stack, Membership: new(byHand),
		Sender: tcp.NewSender(tcp.DefaultSenderConfig(), s), Receiver: tcp.NewReceiver(rc, s),
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return ch
}

// byHand is a membership that the first member hears everybody with.
type byHand struct{ sink channel.MemberSink }

var hand *byHand

func (b *byHand) Start(_ context.Context, _ channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	b.sink = sink
	if hand == nil {
		hand = b
	}
	return nil
}
func (*byHand) Update(context.Context, channel.Member) error { return nil }
func (*byHand) Stop(context.Context) error                   { return nil }

// A member that dies is removed although nobody sends to it and nobody misses
// its heartbeats. The failure detector decides: a Tomcat node that only does not
// acknowledge stays.
func TestFailedPingRemoves(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		hand = nil
		a, b := member(t, nw.Node("10.0.0.1")), member(t, nw.Node("10.0.0.2"))
		l, err := channel.ListenTCP(nw.Node("10.0.0.3"), netip.MustParseAddrPort("10.0.0.3:4000"))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { // a node that is stopped in the middle of everything
			defer close(done)
			var conns []net.Conn
			for {
				c, err := l.Accept()
				if err != nil {
					break
				}
				conns = append(conns, c)
			}
			for _, c := range conns {
				c.Close()
			}
		}()
		deaf := channeltest.Member(3)
		deaf.Host, deaf.Payload = netip.MustParseAddr("10.0.0.3"), "a Tomcat node"
		seen := new(channeltest.Recorder)
		a.Watch(seen.Watch)
		hand.sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: b.Local()})
		hand.sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: deaf})
		time.Sleep(30 * time.Second)
		if !a.View().Has(b.Local()) || !a.View().Has(deaf) {
			t.Fatalf("the view is %v: a Tomcat node that takes connections and heartbeats stays", a.View().Members)
		}
		gone := b.Local()
		nw.Isolate("10.0.0.2")
		for start := time.Now(); a.View().Has(gone); time.Sleep(100 * time.Millisecond) {
			if time.Since(start) > 30*time.Second {
				t.Fatal("a member that does not answer was not removed")
			}
		}
		nw.Heal()
		time.Sleep(time.Minute)
		if !a.View().Has(gone) {
			t.Error("a member that answers again did not come back")
		}
		for _, c := range []*channel.Channel{a, b} {
			if err := c.Stop(context.WithoutCancel(t.Context())); err != nil {
				t.Error(err)
			}
		}
		l.Close()
		<-done
	})
}

func TestPlace(t *testing.T) {
	s := channel.Settings{Net: &channeltest.SimNode{}}
	p, err := New(Defaults, s)
	if err != nil {
		t.Fatal(err)
	}
	d, err := failuredetector.New(failuredetector.Defaults, s)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := channel.NewStack(channel.Layer{Interceptor: d}, channel.Layer{Interceptor: p}); err == nil || !strings.Contains(err.Error(), `"ping" must stand above "failuredetector"`) {
		t.Errorf("below the failure detector: %v", err)
	}
	alone, err := channel.NewStack(channel.Layer{Interceptor: p})
	if err != nil || len(alone.Warnings()) != 1 {
		t.Errorf("without a failure detector: %v, %q", err, alone.Warnings())
	}
}

func TestConfig(t *testing.T) {
	for want, cfg := range map[string]Config{
		"interval is 0s":    {Timeout: 1, MaxPings: 1},
		"timeout is -1ns":   {Interval: time.Second, Timeout: -1, MaxPings: 1},
		"max_pings is 5000": {Interval: time.Second, Timeout: 1, MaxPings: 5000},
	} {
		if _, err := New(cfg, channel.Settings{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", cfg, err, want)
		}
	}
	var errs interface{ Unwrap() []error }
	if err := (&Config{}).Validate(); !errors.As(err, &errs) || len(errs.Unwrap()) != 3 {
		t.Errorf("all problems at once: %v", err)
	}
}

func TestStopWithoutStart(t *testing.T) {
	p, err := New(Defaults, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func BenchmarkReceive(b *testing.B) {
	p, err := New(Defaults, channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{p}, Discard: true})
	for _, size := range []int{64, 1024} { // 64 is the size of a ping
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.ReportAllocs()
			m := channel.Message{From: channeltest.Member(1), Options: channel.SendNone, Body: make([]byte, size)}
			for b.Loop() {
				if err := e.Receive(context.Background(), &m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
