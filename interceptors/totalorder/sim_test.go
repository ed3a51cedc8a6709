package totalorder

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
)

// simNode is a whole channel on a simulated node. Its index in the logs stays
// when it is restarted: an incarnation is another index.
type simNode struct {
	*grouptest.Stacked
	index int
	sent  int
}

func startSim(t *testing.T, index int, sim *channeltest.SimNode) *simNode {
	t.Helper()
	return &simNode{index: index, Stacked: grouptest.Stack(t, fmt.Sprint("n", index), sim, func(s channel.Settings) ([]channel.Interceptor, error) {
		o, err := New(Defaults, s)
		return []channel.Interceptor{o}, err
	})}
}

// Four nodes over simulated streams with loss and jitter, through splits, lost
// connections, the death of nodes in the middle of their messages, and their
// return: what any two of them have delivered is in the same order.
func TestSimulatedFaults(t *testing.T) {
	for seed := range uint64(3) {
		cfg := channeltest.SimConfig{Seed: seed, UserTimeout: 5 * time.Second,
			Link: channeltest.LinkPolicy{Latency: time.Millisecond, Jitter: 20 * time.Millisecond, Loss: 0.02}}
		channeltest.Run(t, cfg, func(t *testing.T, nw *channeltest.SimNet) {
			sims := nw.Nodes(4)
			var all, nodes []*simNode
			var ips []string
			join := func(sim *channeltest.SimNode) *simNode {
				n := startSim(t, len(all), sim)
				all = append(all, n)
				time.Sleep(7 * time.Millisecond)
				return n
			}
			for _, s := range sims {
				ips = append(ips, s.IP())
				nodes = append(nodes, join(s))
			}
			time.Sleep(3 * time.Second)

			sent := map[string][]int{}
			results := new(channeltest.Recorder)
			byID := func(id channel.UniqueID) int {
				for _, n := range all {
					if n.Local().ID == id {
						return n.index
					}
				}
				return -1
			}
			chatter := func(rounds int) {
				for r := range rounds {
					for i, n := range nodes {
						to := n.View().Members
						switch (r + i) % 4 {
						case 0:
							to = append([]channel.Member{n.Local()}, to...)
						case 1:
							to = to[min(1, len(to)):]
						}
						if len(to) == 0 {
							continue
						}
						n.sent++
						body := fmt.Sprint(n.index, " ", n.sent)
						for _, m := range to {
							sent[body] = append(sent[body], byID(m.ID))
						}
						o := []channel.Options{channel.SendAck, channel.SendSyncAck, channel.SendNone, channel.SendAsync}[(r+2*i)%4]
						ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
						_ = n.SendDone(ctx, to, []byte(body), o, results)
						cancel()
					}
					time.Sleep(10 * time.Millisecond)
				}
			}
			chatter(200)
			nw.Partition(ips[:2], ips[2:])
			chatter(200)
			time.Sleep(20 * time.Second)
			chatter(50)
			nw.Heal()
			chatter(300)
			time.Sleep(5 * time.Second)
			nw.Isolate(ips[1]) // shorter than anybody notices: connections break, views stay
			chatter(50)
			nw.Heal()
			chatter(100)
			time.Sleep(5 * time.Second)

			// The oldest dies with messages on their way, and comes back.
			chatter(20)
			nodes[0].Sim.Kill()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_ = nodes[0].Stop(ctx) // its network is gone
			cancel()
			alive := nodes[1:]
			nodes = alive
			chatter(100)
			time.Sleep(10 * time.Second)
			nodes = append(alive, join(nw.Node(ips[0])))
			time.Sleep(3 * time.Second)
			chatter(100)
			time.Sleep(15 * time.Second) // longer than anything waits

			// In the end everybody gets everything again.
			before := len(nodes[0].Got.Messages())
			for i := range 20 {
				n := nodes[i%4]
				n.sent++
				body := fmt.Sprint(n.index, " ", n.sent)
				to := append([]channel.Member{n.Local()}, n.View().Members...)
				for _, m := range to {
					sent[body] = append(sent[body], byID(m.ID))
				}
				if err := n.Send(t.Context(), to, []byte(body), channel.SendSyncAck); err != nil || len(to) != 4 {
					t.Errorf("to %d members: %v", len(to), err)
				}
			}
			if n := len(nodes[0].Got.Messages()) - before; n != 20 {
				t.Errorf("%d of 20 delivered after all faults", n)
			}
			var logs [][]string
			for _, n := range all {
				logs = append(logs, n.Got.Bodies())
			}
			verify(t, logs, sent)
			for _, n := range nodes {
				t.Logf("node %d sent %d messages and delivered %d", n.index, n.sent, len(n.Got.Messages()))
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				if err := n.Stop(ctx); err != nil {
					t.Errorf("stop: %v", err)
				}
				cancel()
			}
		})
	}
}
