package conformance_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
)

// Simulations of whole groups in virtual time: every node has a channel with
// multicast heartbeats, the failure detector and TCP. They print what they
// have taken in real time.

// simNode is one node of a simulated group.
type simNode struct {
	*channel.Channel
	node    *channeltest.SimNode
	metrics *channel.Metrics

	mu     sync.Mutex
	events []string // removals, with their times
	lost   int
}

// startSim starts a node, with these layers above the failure detector. A nil
// membership means multicast.
func startSim(t *testing.T, n *channeltest.SimNode, m func(channel.Settings) channel.Membership, above ...channel.Interceptor) *simNode {
	t.Helper()
	x := &simNode{node: n, metrics: channel.NewMetrics()}
	s := channel.Settings{Net: n, Metrics: x.metrics}
	d, err := failuredetector.New(failuredetector.Defaults, s)
	if err != nil {
		t.Fatal(err)
	}
	var layers []channel.Layer
	for _, l := range append(above, d) {
		layers = append(layers, channel.Layer{Interceptor: l})
	}
	stack, err := channel.NewStack(layers...)
	if err != nil {
		t.Fatal(err)
	}
	if m == nil {
		m = func(s channel.Settings) channel.Membership {
			c := multicast.Default()
			c.Secret = secret.New("the secret of the simulations")
			c.Unauthenticated = []string{"10.1.0.0/16"}
			m, err := multicast.New(c, s)
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = n.IP()
	x.Channel, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Name: n.IP(), Pipelined: true},
		Stack:        stack,
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(rc, s),
		Membership:   m(s),
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	x.Watch(func(_ channel.View, ev channel.MemberEvent) {
		if ev.Kind != channel.MemberLost && ev.Kind != channel.MemberLeft {
			return
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		x.lost++
		if len(x.events) < 10 {
			x.events = append(x.events, fmt.Sprintf("%v: %v %v", time.Since(began), ev.Kind, ev.Member.Addr()))
		}
	})
	if err := x.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return x
}

func startGroup(t *testing.T, nw *channeltest.SimNet, count int) []*simNode {
	var group []*simNode
	for _, n := range nw.Nodes(count) {
		group = append(group, startSim(t, n, nil))
		time.Sleep(13 * time.Millisecond)
	}
	return group
}

func stopGroup(t *testing.T, group []*simNode) {
	var wg sync.WaitGroup
	for _, n := range group {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := n.Stop(ctx); err != nil {
				t.Errorf("stop: %v", err)
			}
		})
	}
	wg.Wait()
}

// equalViews says which node does not see exactly the others of its group.
func equalViews(group []*simNode) error {
	for _, n := range group {
		var want, got []string
		for _, o := range group {
			if o != n {
				want = append(want, o.Local().ID.String())
			}
		}
		for _, m := range n.View().Members {
			got = append(got, m.ID.String())
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("%s sees %d members, want %d, or others", n.node.IP(), len(got), len(want))
		}
	}
	return nil
}

// converge waits until all views are equal, and returns how long that took.
func converge(t *testing.T, group []*simNode, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		err := equalViews(group)
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > limit {
			t.Errorf("the views are not equal after %v: %v", limit, err)
			return limit
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// removals returns how many removals the nodes have seen since the last call,
// and some of them.
func removals(group []*simNode) (n int, some string) {
	var lines []string
	for _, x := range group {
		x.mu.Lock()
		n += x.lost
		for _, e := range x.events {
			lines = append(lines, x.node.IP()+" at "+e)
		}
		x.lost, x.events = 0, nil
		x.mu.Unlock()
	}
	return n, strings.Join(lines[:min(len(lines), 5)], "; ")
}

// realTime reports at the end of a test how long it has taken. Call it outside
// of the bubble.
func realTime(t *testing.T) {
	began := time.Now()
	t.Cleanup(func() { t.Logf("took %.1f s of real time", time.Since(began).Seconds()) })
}

// Datagrams are lost, nobody is removed: a member that answers over TCP is
// alive.
func TestSimLoss(t *testing.T) {
	count, length := 32, 10*time.Minute
	levels := []float64{0.05, 0.2, 0.4}
	if testing.Short() {
		count, length, levels = 8, time.Minute, []float64{0.4}
	}
	for _, loss := range levels {
		t.Run(fmt.Sprintf("%.0f%%", 100*loss), func(t *testing.T) {
			realTime(t)
			channeltest.Run(t, channeltest.SimConfig{Seed: 4}, func(t *testing.T, nw *channeltest.SimNet) {
				group := startGroup(t, nw, count)
				converge(t, group, 5*time.Second)
				for _, a := range group {
					for _, b := range group {
						if a != b {
							nw.SetLink(a.node.IP(), b.node.IP(), channeltest.LinkPolicy{Loss: loss})
						}
					}
				}
				time.Sleep(length)
				if n, some := removals(group); n > 0 {
					t.Errorf("%d removals: %s", n, some)
				}
				checks, vetoed := int64(0), int64(0)
				for _, n := range group {
					checks += n.metrics.Counter("failuredetector_checks_total", "").Value()
					vetoed += n.metrics.Counter("failuredetector_vetoed_total", "").Value()
				}
				t.Logf("%d nodes, %v, %.0f %% lost: %d checks, %d members kept by them; %+v", count, length, 100*loss, checks, vetoed, nw.Stats())
				nw.ResetLinks()
				converge(t, group, 5*time.Second)
				stopGroup(t, group)
			})
		})
	}
}

// A split heals by itself, however long it lasts.
func TestSimSplit(t *testing.T) {
	for _, length := range []time.Duration{time.Second, 10 * time.Second, 10 * time.Minute} {
		t.Run(length.String(), func(t *testing.T) {
			realTime(t)
			channeltest.Run(t, channeltest.SimConfig{Seed: 5}, func(t *testing.T, nw *channeltest.SimNet) {
				group := startGroup(t, nw, 8)
				converge(t, group, 5*time.Second)
				nw.Partition([]string{"10.0.0.1", "10.0.0.2", "10.0.0.3"})
				time.Sleep(length)
				n, some := removals(group)
				switch {
				case length < 3*time.Second:
					if n > 0 {
						t.Errorf("a short split removes members: %s", some)
					}
				case n != 2*3*5:
					t.Errorf("%d removals, want 30: %s", n, some)
				default:
					for _, side := range [][]*simNode{group[:3], group[3:]} {
						if err := equalViews(side); err != nil {
							t.Errorf("during the split: %v", err)
						}
					}
				}
				nw.Heal()
				t.Logf("healed %v after the split of %v", converge(t, group, 10*time.Second), length)
				time.Sleep(time.Minute)
				if n, some := removals(group); n > 0 {
					t.Errorf("after it has healed: %s", some)
				}
				stopGroup(t, group)
			})
		})
	}
}

// FT-08: a member that is paused is removed if that takes long, and back at
// once. What was sent to it and by it meanwhile is lost or comes late.
func TestSimPause(t *testing.T) {
	for _, length := range []time.Duration{4 * time.Second, 16 * time.Second, 32 * time.Second} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v/late=%v", length, late), func(t *testing.T) {
				realTime(t)
				channeltest.Run(t, channeltest.SimConfig{Seed: 6}, func(t *testing.T, nw *channeltest.SimNet) {
					group := startGroup(t, nw, 5)
					converge(t, group, 5*time.Second)
					paused, others := group[4], group[:4]
					for _, o := range others {
						p := channeltest.LinkPolicy{Cut: !late, Latency: length}
						nw.SetLink(o.node.IP(), paused.node.IP(), p)
						nw.SetLink(paused.node.IP(), o.node.IP(), p)
					}
					time.Sleep(length)
					nw.ResetLinks()
					for _, o := range others {
						o.mu.Lock()
						if o.lost > 1 {
							t.Errorf("%s has seen %d removals: %q", o.node.IP(), o.lost, o.events)
						}
						o.mu.Unlock()
					}
					n, some := removals(others)
					if length < 5*time.Second && n > 0 {
						t.Errorf("a pause of %v removes members: %s", length, some)
					}
					if length > 10*time.Second && n != len(others) {
						t.Errorf("a pause of %v: %d of %d removals: %s", length, n, len(others), some)
					}
					t.Logf("the views are equal %v after the pause of %v", converge(t, group, 10*time.Second), length)
					time.Sleep(time.Minute)
					if err := equalViews(group); err != nil {
						t.Error(err)
					}
					stopGroup(t, group)
				})
			})
		}
	}
}

// tribes is a membership that sends heartbeats as a Tomcat node does, whose alive
// time comes from a clock that is set back and forth, and hears nobody.
type tribes struct {
	net  transport.Net
	stop chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex
	step time.Duration // of the clock
}

func (m *tribes) Start(_ context.Context, local channel.Member, _ []channel.Member, _ channel.MemberSink) error {
	conn, err := channel.ListenUDP(m.net, netip.AddrPortFrom(local.Host, 0))
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	m.stop = stop
	m.wg.Go(func() {
		defer conn.Close()
		began := time.Now()
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			m.mu.Lock()
			local.Alive = time.Since(began) + m.step
			m.mu.Unlock()
			_, _ = conn.WriteTo(wire.AppendMember(nil, local), &net.UDPAddr{IP: net.IPv4(228, 0, 0, 4), Port: 45564})
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	})
	return nil
}

func (m *tribes) Update(context.Context, channel.Member) error { return nil }

func (m *tribes) Stop(context.Context) error {
	if m.stop != nil {
		close(m.stop)
		m.stop = nil
	}
	m.wg.Wait()
	return nil
}

// FT-10: a node whose clock is set stays. (Our own nodes do not read that clock:
// their alive times are monotonic.)
func TestSimClockSteps(t *testing.T) {
	realTime(t)
	channeltest.Run(t, channeltest.SimConfig{Seed: 7}, func(t *testing.T, nw *channeltest.SimNet) {
		group := startGroup(t, nw, 4)
		clock := &tribes{net: nw.Node("10.1.0.1"), step: 2 * time.Hour}
		odd := startSim(t, nw.Node("10.1.0.1"), func(channel.Settings) channel.Membership { return clock })
		seen := func() error {
			for _, n := range group {
				if _, ok := n.View().Get(odd.Local().ID); !ok {
					return fmt.Errorf("%s does not see it", n.node.IP())
				}
			}
			return nil
		}
		time.Sleep(3 * time.Second)
		if err := seen(); err != nil {
			t.Fatal(err)
		}
		for _, step := range []time.Duration{time.Hour, -time.Hour, -time.Hour, time.Hour, time.Second, -time.Second} {
			clock.mu.Lock()
			clock.step += step
			clock.mu.Unlock()
			for range 100 {
				time.Sleep(100 * time.Millisecond)
				if err := seen(); err != nil {
					t.Fatalf("its clock was set by %v: %v", step, err)
				}
			}
		}
		if n, some := removals(group); n > 0 {
			t.Errorf("%d removals: %s", n, some)
		}
		stopGroup(t, append(group, odd))
	})
}

// FT-15 and the restart within a second: one member per address and id, and no
// ghost.
func TestSimRestarts(t *testing.T) {
	realTime(t)
	channeltest.Run(t, channeltest.SimConfig{Seed: 8}, func(t *testing.T, nw *channeltest.SimNet) {
		group := startGroup(t, nw, 4)
		converge(t, group, 5*time.Second)
		for _, off := range []time.Duration{10 * time.Millisecond, 300 * time.Millisecond, time.Second, 2900 * time.Millisecond, 10 * time.Second} {
			for _, crash := range []bool{true, false} {
				old := group[3]
				if crash {
					old.node.Crash()
				}
				stopGroup(t, group[3:])
				time.Sleep(off)
				group[3] = startSim(t, nw.Node(old.node.IP()), nil)
				took := converge(t, group, 10*time.Second)
				t.Logf("crash %v, %v off: the views are equal after %v", crash, off, took)
				time.Sleep(30 * time.Second)
				if err := equalViews(group); err != nil {
					t.Errorf("crash %v, %v off: later: %v", crash, off, err)
				}
			}
		}
		stopGroup(t, group)
	})
}
