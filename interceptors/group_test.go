package interceptors_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
	"github.com/longhouse-go/longhouse/interceptors"
)

// node is a whole channel on a simulated node.
type node struct{ *grouptest.Stacked }

func startNode(t *testing.T, name string, sim *channeltest.SimNode) *node {
	t.Helper()
	return &node{grouptest.Stack(t, name, sim, func(s channel.Settings) (layers []channel.Interceptor, err error) {
		for _, f := range interceptors.Builtin() {
			l, err := f.New(options(f.Name), s)
			if err != nil {
				return nil, err
			}
			layers = append(layers, l)
		}
		return layers, nil
	})}
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
		grouptest.Within(t, 5*time.Second, "start", func() bool { return converged(nodes...) })

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
		grouptest.Within(t, 10*time.Second, "split", func() bool { return converged(nodes[:3]...) && converged(nodes[3:]...) })
		time.Sleep(time.Minute)
		nw.Heal()
		grouptest.Within(t, 10*time.Second, "heal", func() bool { return converged(nodes...) })
		chatter(20)

		// One dies and comes back on the same address with a new id.
		old := nodes[4].Local()
		nodes[4].Sim.Kill()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_ = nodes[4].Stop(ctx) // its network is gone
		cancel()
		gone := nodes[4]
		nodes[4] = startNode(t, "n5", nw.Node(ips[4]))
		grouptest.Within(t, 20*time.Second, "restart", func() bool { return converged(nodes...) })
		for _, n := range nodes {
			if n.View().Has(old) {
				t.Errorf("%s still sees the dead incarnation", n.Local())
			}
		}
		chatter(20)

		// One leaves in order: seen at once.
		nodes[0].stop(t)
		grouptest.Within(t, time.Second, "leave", func() bool { return converged(nodes[1:]...) })
		for _, n := range nodes[1:] {
			n.stop(t)
		}
		grouptest.Within(t, 10*time.Second, "reports", func() bool { return len(results.Results()) >= accepted })
		if n := len(results.Results()); n != accepted {
			t.Errorf("%d messages were accepted, %d reported", accepted, n)
		}
		for _, n := range append(nodes, gone) {
			seen := map[channel.UniqueID]bool{}
			for _, m := range n.Got.Messages() {
				if seen[m.ID] {
					t.Errorf("%s got a message twice", n.Local())
				}
				seen[m.ID] = true
			}
			for _, s := range n.Metrics.Samples() {
				if (s.Name == "dispatch_queue_messages" || s.Name == "dispatch_queue_bytes") && s.Value != 0 {
					t.Errorf("%s: %s is %v at the end", n.Local(), s.Name, s.Value)
				}
			}
		}
	})
}
