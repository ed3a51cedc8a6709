package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/discovery"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// oracle is what look-ups answer, for all nodes.
type oracle struct {
	mu    sync.Mutex
	peers []discovery.Peer
	err   error
	asked []time.Time
}

func (o *oracle) set(err error, hosts ...string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.err, o.peers = err, nil
	for _, h := range hosts {
		o.peers = append(o.peers, discovery.Peer{Addr: netip.AddrPortFrom(netip.MustParseAddr(h), 0)})
	}
}

// Run implements discovery.Provider: it asks every second.
func (o *oracle) Run(ctx context.Context, found func([]discovery.Peer)) error {
	for {
		o.mu.Lock()
		peers, err := slices.Clone(o.peers), o.err
		o.asked = append(o.asked, time.Now())
		o.mu.Unlock()
		if err != nil {
			return err
		}
		found(peers)
		if !channel.Pause(ctx, time.Second) {
			return ctx.Err()
		}
	}
}

type node struct {
	channel.Membership
	metrics *channel.Metrics
	logs    *observer.ObservedLogs
	local   channel.Member

	mu     sync.Mutex
	view   map[channel.UniqueID]channel.Member
	events []string
}

func (n *node) Observe(ev channel.MemberEvent) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		n.view[ev.Member.ID] = ev.Member
	default:
		delete(n.view, ev.Member.ID)
	}
	if ev.Kind != channel.MemberUpdated {
		n.events = append(n.events, fmt.Sprintf("%s %s", ev.Kind, ev.Member.Host))
	}
}

func (n *node) sees() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, m := range n.view {
		out = append(out, m.Host.String())
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (n *node) take() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := n.events
	n.events = nil
	return out
}

func (n *node) count(name string, labels ...string) int64 {
	return n.metrics.Counter(name, "", labels...).Value()
}

func start(t *testing.T, nw *channeltest.SimNet, ip string, p discovery.Provider, change func(*discovery.Options), known ...channel.Member) *node {
	t.Helper()
	sn := nw.Node(ip)
	core, logs := observer.New(zap.InfoLevel)
	n := &node{
		metrics: channel.NewMetrics(), logs: logs, view: map[channel.UniqueID]channel.Member{},
		local: channel.Member{
			ID: channel.NewUniqueID(), Host: sn.Addr(), Port: 4000, SecurePort: -1, UDPPort: -1,
			Payload: channel.Announcement{Name: ip}.Encode(),
		},
	}
	o := discovery.DefaultOptions()
	if change != nil {
		change(&o)
	}
	m, err := discovery.New(o, p, channel.Settings{Net: sn, Metrics: n.metrics, Logger: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	n.Membership = m
	for _, k := range known {
		n.view[k.ID] = k
	}
	if err := n.Start(t.Context(), n.local, known, n); err != nil {
		t.Fatal(err)
	}
	return n
}

func stop(t *testing.T, nodes ...*node) {
	t.Helper()
	for _, n := range nodes {
		if err := n.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}
}

func TestFailedLookupsChangeNothing(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		o := &oracle{}
		o.set(nil, "10.0.0.1", "10.0.0.2", "10.0.0.3")
		a := start(t, nw, "10.0.0.1", o, nil)
		b := start(t, nw, "10.0.0.2", o, nil)
		c := start(t, nw, "10.0.0.3", o, nil)
		time.Sleep(2 * time.Second)
		if a.sees() != "10.0.0.2 10.0.0.3" || b.sees() != "10.0.0.1 10.0.0.3" || c.sees() != "10.0.0.1 10.0.0.2" {
			t.Fatalf("%q %q %q", a.sees(), b.sees(), c.sees())
		}
		o.set(errors.New("no answer"))
		time.Sleep(time.Hour)
		if got := a.take(); len(got) != 2 || a.sees() != "10.0.0.2 10.0.0.3" {
			t.Errorf("an hour without look-ups: %v, sees %q", got, a.sees())
		}
		// Asked again with growing pauses, up to half a minute.
		if n := a.count("membership_lookup_errors_total"); n < 100 || n > 180 {
			t.Errorf("%d look-ups failed in an hour", n)
		}
		if n := a.logs.FilterMessageSnippet("look-up of members failed").Len(); n != 1 {
			t.Errorf("%d lines in the log of one failure", n)
		}
		o.set(nil, "10.0.0.1", "10.0.0.2", "10.0.0.3")
		time.Sleep(time.Minute)
		if n := a.logs.FilterMessageSnippet("works again").Len(); n != 1 {
			t.Errorf("%d lines in the log of the recovery", n)
		}
		// Back-off is not in step on the nodes.
		o.mu.Lock()
		asked := map[time.Time]int{}
		for _, at := range o.asked[len(o.asked)/4 : len(o.asked)/2] {
			asked[at]++
		}
		o.mu.Unlock()
		for at, n := range asked {
			if n > 1 {
				t.Errorf("%d nodes ask at the same time, %v", n, at)
			}
		}
		stop(t, a, b, c)
	})
}

func TestChangedAnswers(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		o := &oracle{}
		o.set(nil, "10.0.0.1", "10.0.0.2")
		a := start(t, nw, "10.0.0.1", o, nil)
		b := start(t, nw, "10.0.0.2", o, nil)
		time.Sleep(2 * time.Second)
		o.set(nil, "10.0.0.1", "10.0.0.3") // not named any more, and alive
		c := start(t, nw, "10.0.0.3", o, nil)
		time.Sleep(time.Hour)
		if a.sees() != "10.0.0.2 10.0.0.3" || b.sees() != "10.0.0.1 10.0.0.3" || c.sees() != "10.0.0.1 10.0.0.2" {
			t.Fatalf("%q %q %q", a.sees(), b.sees(), c.sees())
		}
		// It dies, and nobody names it: it is tried for a bounded time.
		nw.Node("10.0.0.2").Crash()
		stop(t, b)
		var mu sync.Mutex
		var last time.Time
		nw.Tap(func(p channeltest.Packet) {
			if p.To.Addr().String() == "10.0.0.2" {
				mu.Lock()
				last = p.Sent
				mu.Unlock()
			}
		})
		died := time.Now()
		time.Sleep(time.Hour)
		nw.Tap(func(channeltest.Packet) {})
		mu.Lock()
		if tried := last.Sub(died); tried < 5*time.Minute || tried > 5*time.Minute+5*time.Second {
			t.Errorf("tried for %v after its death", tried)
		}
		mu.Unlock()
		if a.sees() != "10.0.0.3" {
			t.Errorf("sees %q", a.sees())
		}
		stop(t, a, c)
	})
}

// A thousand addresses, only two of which are nodes: the bound holds, the nodes
// that live stay, and what is left out is counted.
func TestFloodOfAddresses(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		o := &oracle{}
		o.set(nil, "10.200.0.1", "10.200.0.2")
		small := func(o *discovery.Options) { o.MaxAddresses = 20 }
		a := start(t, nw, "10.200.0.1", o, small)
		b := start(t, nw, "10.200.0.2", o, small)
		time.Sleep(3 * time.Second)
		hosts := []string{"10.200.0.1", "10.200.0.2"}
		for i := range 1000 {
			hosts = append(hosts, fmt.Sprintf("10.1.%d.%d", i/250, i%250+1))
		}
		o.set(nil, hosts...)
		sent := a.count("membership_heartbeats_sent_total")
		time.Sleep(10 * time.Second)
		if a.sees() != "10.200.0.2" || b.sees() != "10.200.0.1" || len(a.take()) != 1 {
			t.Errorf("%q %q", a.sees(), b.sees())
		}
		if n := a.count("membership_heartbeats_sent_total") - sent; n > 21*20 {
			t.Errorf("%d heartbeats in 10 s", n)
		}
		if n := a.count("membership_addresses_refused_total", "reason", "too_many"); n < 982*8 {
			t.Errorf("%d addresses were counted as left out", n)
		}
		stop(t, a, b)
	})
}

// Only one of two nodes finds the other: that one answers.
func TestWhoIsHeardIsAnswered(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		all, none := &oracle{}, &oracle{}
		all.set(nil, "10.0.0.1", "10.0.0.2")
		none.set(errors.New("down"))
		a := start(t, nw, "10.0.0.1", none, nil)
		time.Sleep(time.Second)
		b := start(t, nw, "10.0.0.2", all, nil)
		time.Sleep(time.Second)
		if a.sees() != "10.0.0.2" || b.sees() != "10.0.0.1" {
			t.Errorf("%q %q", a.sees(), b.sees())
		}
		stop(t, b)
		time.Sleep(100 * time.Millisecond)
		if got := a.take(); fmt.Sprint(got) != "[added 10.0.0.2 left 10.0.0.2]" {
			t.Errorf("%v", got)
		}
		stop(t, a)
	})
}

// After a restart of the membership alone the members are there, and those that
// are gone meanwhile are lost.
func TestKnownMembers(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		o := &oracle{}
		o.set(nil, "10.0.0.1", "10.0.0.2")
		b := start(t, nw, "10.0.0.2", o, nil)
		time.Sleep(time.Second)
		o.set(errors.New("down"))
		gone := channeltest.Member(7)
		a := start(t, nw, "10.0.0.1", o, nil, b.local, gone)
		time.Sleep(5 * time.Second)
		if got := a.take(); fmt.Sprint(got) != fmt.Sprintf("[lost %s]", gone.Host) || a.sees() != "10.0.0.2" || b.sees() != "10.0.0.1" {
			t.Errorf("%v; %q %q", got, a.sees(), b.sees())
		}
		stop(t, a, b)
	})
}

// A Tomcat node sends no heartbeats; it is there while look-ups name it and its
// receiver takes connections.
func TestTomcatNodes(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{UserTimeout: time.Second}, func(t *testing.T, nw *channeltest.SimNet) {
		o := &oracle{}
		o.set(nil, "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
		tomcat := func(o *discovery.Options) { o.Tomcat = true }
		listener, err := channel.ListenTCP(nw.Node("10.0.0.3"), netip.MustParseAddrPort("10.0.0.3:4000"))
		if err != nil {
			t.Fatal(err)
		}
		var accepting sync.WaitGroup
		accepting.Go(func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		})
		a := start(t, nw, "10.0.0.1", o, tomcat)
		b := start(t, nw, "10.0.0.2", o, tomcat)
		time.Sleep(10 * time.Second)
		// 10.0.0.4 is named, and nothing listens there.
		if a.sees() != "10.0.0.2 10.0.0.3" || b.sees() != "10.0.0.1 10.0.0.3" {
			t.Fatalf("%q %q", a.sees(), b.sees())
		}
		if a.count("membership_check_errors_total") == 0 {
			t.Error("the failed checks of the absent node are not counted")
		}
		o.set(errors.New("down"))
		time.Sleep(time.Minute)
		if a.sees() != "10.0.0.2 10.0.0.3" {
			t.Errorf("after failed look-ups: %q", a.sees())
		}
		o.set(nil, "10.0.0.1", "10.0.0.2", "10.0.0.3")
		time.Sleep(time.Minute)
		a.take()
		listener.Close() // it has died, and is still named
		accepting.Wait()
		time.Sleep(10 * time.Second)
		if got := a.take(); fmt.Sprint(got) != "[lost 10.0.0.3]" {
			t.Errorf("after its death: %v", got)
		}
		// A node with heartbeats takes its place.
		c := start(t, nw, "10.0.0.3", o, tomcat)
		time.Sleep(2 * time.Second)
		if got := a.take(); fmt.Sprint(got) != "[added 10.0.0.3]" || a.sees() != "10.0.0.2 10.0.0.3" {
			t.Errorf("%v; %q", got, a.sees())
		}
		stop(t, a, b, c)
	})
}

// With a secret only those who know it are members.
func TestSecret(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		o := &oracle{}
		o.set(nil, "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
		with := func(text string) func(o *discovery.Options) {
			return func(o *discovery.Options) { o.Secret = secret.New(text) }
		}
		a := start(t, nw, "10.0.0.1", o, with("the secret of this cluster"))
		b := start(t, nw, "10.0.0.2", o, with("the secret of this cluster"))
		c := start(t, nw, "10.0.0.3", o, with("the secret of another one"))
		d := start(t, nw, "10.0.0.4", o, nil)
		time.Sleep(10 * time.Second)
		if a.sees() != "10.0.0.2" || b.sees() != "10.0.0.1" || c.sees() != "" {
			t.Errorf("%q, %q, %q", a.sees(), b.sees(), c.sees())
		}
		if a.count("membership_refused_total", "reason", "unauthenticated") == 0 || a.count("membership_refused_total", "reason", "unknown_key") == 0 {
			t.Error("what was refused is not counted")
		}
		stop(t, a, b, c, d)
	})
}

func TestStopAndStart(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		m, err := discovery.New(discovery.DefaultOptions(), &oracle{}, channel.Settings{Net: nw.Node("10.0.0.1")})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Update(t.Context(), channeltest.Member(1)); !errors.Is(err, channel.ErrClosed) {
			t.Errorf("update without start: %v", err)
		}
		for range 2 {
			if err := m.Stop(t.Context()); err != nil {
				t.Errorf("stop without start: %v", err)
			}
		}
		if err := m.Start(t.Context(), channeltest.Member(1), nil, &channeltest.Recorder{}); err == nil {
			t.Error("started after a stop")
		}
	})
}

func TestValidation(t *testing.T) {
	for _, c := range []struct {
		change func(*discovery.Options)
		want   string
	}{
		{func(*discovery.Options) {}, ""},
		{func(o *discovery.Options) { o.Listen = "[::1]:5" }, ""},
		{func(o *discovery.Options) { o.Listen = "node1:5" }, "listen: "},
		{func(o *discovery.Options) { o.Listen = "" }, "listen: "},
		{func(o *discovery.Options) { o.Port = -1 }, "port: "},
		{func(o *discovery.Options) { o.Port = 65536 }, "port: "},
		{func(o *discovery.Options) { o.MaxAddresses = 0 }, "max_addresses: "},
		{func(o *discovery.Options) { o.MaxAddresses = 4097 }, "max_addresses: "},
		{func(o *discovery.Options) { o.RetryTime = -1 }, "retry_time: "},
		{func(o *discovery.Options) { o.Secret = secret.New("short") }, "secret: "},
		{func(o *discovery.Options) { o.Unauthenticated = []string{"x"} }, "unauthenticated[0]: "},
		{func(o *discovery.Options) { o.Frequency = 0 }, "frequency: "},
		{func(o *discovery.Options) { o.DropTime = 0 }, "drop_time: "},
	} {
		o := discovery.DefaultOptions()
		c.change(&o)
		err := o.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", o, err, c.want)
		}
	}
}
