package interceptors_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/membership"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/longhouse-go/longhouse/interceptors"
)

// pulse is a small multicast membership: a member record every half second.
type pulse struct {
	net   transport.Net
	local channel.Member
	conn  transport.UDPConn
	stop  context.CancelFunc
	wg    sync.WaitGroup
}

var pulseGroup = netip.MustParseAddrPort("228.0.0.4:45564")

func (p *pulse) Start(_ context.Context, local channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	conn, err := channel.ListenMulticast(p.net, channel.MulticastConfig{Group: pulseGroup})
	if err != nil {
		return err
	}
	p.conn, p.local = conn, local
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	table := membership.New(membership.Config{}, local)
	heard := make(chan channel.Member)
	p.wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if m, _, err := wire.DecodeMember(buf[:n]); err == nil {
				select {
				case heard <- m:
				case <-ctx.Done():
					return
				}
			}
		}
	})
	p.wg.Go(func() {
		began := time.Now()
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			var evs []channel.MemberEvent
			select {
			case m := <-heard:
				evs, _ = table.Heard(nil, m, time.Now())
			case now := <-tick.C:
				evs = table.Expire(nil, now)
				local.Alive = now.Sub(began)
				_, _ = conn.WriteTo(wire.AppendMember(nil, local), net.UDPAddrFromAddrPort(pulseGroup))
			case <-ctx.Done():
				return
			}
			for _, ev := range evs {
				sink.Observe(ev)
			}
		}
	})
	return nil
}

func (p *pulse) Update(context.Context, channel.Member) error { return nil }

func (p *pulse) Stop(context.Context) error {
	if p.conn == nil {
		return nil
	}
	last := p.local
	last.Command = channel.ShutdownCommand
	last.Alive = time.Hour
	_, _ = p.conn.WriteTo(wire.AppendMember(nil, last), net.UDPAddrFromAddrPort(pulseGroup))
	p.stop()
	err := p.conn.Close()
	p.conn = nil
	p.wg.Wait()
	return err
}

// node is a whole channel on a simulated node.
type node struct {
	*channel.Channel
	sim  *channeltest.SimNode
	got  *channeltest.Recorder
	logs *channel.Metrics
}

func startNode(t *testing.T, name string, sim *channeltest.SimNode) *node {
	t.Helper()
	n := &node{sim: sim, got: new(channeltest.Recorder), logs: channel.NewMetrics()}
	s := channel.Settings{Net: sim, Logger: zap.NewNop(), Metrics: n.logs}
	var layers []channel.Layer
	for _, f := range interceptors.Builtin() {
		l, err := f.New(options(f.Name), s)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, channel.Layer{Interceptor: l})
	}
	stack, err := channel.NewStack(layers...)
	if err != nil {
		t.Fatal(err)
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = sim.IP()
	n.Channel, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Name: name, Pipelined: true},
		Stack:        stack,
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(rc, s),
		Membership:   &pulse{net: sim},
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	n.Listen(n.got)
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) stop(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 10*time.Second)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
}

// see returns the ids that a node has in its view, with its own.
func (n *node) see() (ids []string) {
	for _, m := range n.View().Members {
		ids = append(ids, m.ID.String())
	}
	ids = append(ids, n.Local().ID.String())
	slices.Sort(ids)
	return ids
}

func converged(nodes ...*node) bool {
	for _, n := range nodes {
		if got := n.see(); len(got) != len(nodes) || !slices.Equal(got, nodes[0].see()) {
			return false
		}
	}
	return true
}

func within(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	start := time.Now()
	for !cond() {
		if time.Since(start) > limit {
			t.Fatalf("%s: not after %v", what, limit)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Five nodes with the whole built-in stack: splits heal, the dead go, the
// restarted come back under a new id, and no message is delivered twice.
func TestGroup(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 7, Link: channeltest.LinkPolicy{Loss: 0.01}}, func(t *testing.T, nw *channeltest.SimNet) {
		sims := nw.Nodes(5)
		var ips []string
		var nodes []*node
		for i, s := range sims {
			ips = append(ips, s.IP())
			nodes = append(nodes, startNode(t, fmt.Sprint("n", i+1), s))
			time.Sleep(7 * time.Millisecond) // nobody ticks in step
		}
		within(t, 5*time.Second, "start", func() bool { return converged(nodes...) })

		// Everybody sends to everybody, all the time.
		results := new(channeltest.Recorder)
		accepted := 0
		chatter := func(rounds int) {
			for r := range rounds {
				for i, n := range nodes {
					to := n.View().Members
					if len(to) == 0 {
						continue
					}
					o := channel.SendSyncAck
					if r%2 == 0 {
						o |= channel.Async
					}
					if n.SendDone(t.Context(), to, fmt.Appendf(nil, "%d/%d", i, r), o, results) == nil {
						accepted++
					}
				}
				time.Sleep(100 * time.Millisecond)
			}
		}
		chatter(20)
		left, right := ips[:3], ips[3:]
		nw.Partition(left, right)
		chatter(100)
		within(t, 10*time.Second, "split", func() bool { return converged(nodes[:3]...) && converged(nodes[3:]...) })
		time.Sleep(time.Minute)
		nw.Heal()
		within(t, 10*time.Second, "heal", func() bool { return converged(nodes...) })
		chatter(20)

		// One dies and comes back on the same address with a new id.
		old := nodes[4].Local()
		nodes[4].sim.Kill()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_ = nodes[4].Stop(ctx) // its network is gone
		cancel()
		gone := nodes[4]
		nodes[4] = startNode(t, "n5", nw.Node(ips[4]))
		within(t, 20*time.Second, "restart", func() bool { return converged(nodes...) })
		for _, n := range nodes {
			if n.View().Has(old) {
				t.Errorf("%s still sees the dead incarnation", n.Local())
			}
		}
		chatter(20)

		// One leaves in order: seen at once.
		nodes[0].stop(t)
		within(t, time.Second, "leave", func() bool { return converged(nodes[1:]...) })
		for _, n := range nodes[1:] {
			n.stop(t)
		}
		within(t, 10*time.Second, "reports", func() bool { return len(results.Results()) >= accepted })
		if n := len(results.Results()); n != accepted {
			t.Errorf("%d messages were accepted, %d reported", accepted, n)
		}
		for _, n := range append(nodes, gone) {
			seen := map[channel.UniqueID]bool{}
			for _, m := range n.got.Messages() {
				if seen[m.ID] {
					t.Errorf("%s got a message twice", n.Local())
				}
				seen[m.ID] = true
			}
			for _, s := range n.logs.Samples() {
				if (s.Name == "dispatch_queue_messages" || s.Name == "dispatch_queue_bytes") && s.Value != 0 {
					t.Errorf("%s: %s is %v at the end", n.Local(), s.Name, s.Value)
				}
			}
		}
	})
}
