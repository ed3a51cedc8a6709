package peer_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// A Tribes node in a machine of its own and two of ours: all see each other and
// send with every option; the machine is killed in the middle of sending, and
// started again at the same port. Nothing reaches us twice.
func testKill(t *testing.T) {
	g := newGroup(t, startJVM(t))
	g.frequency, g.drop = 500*time.Millisecond, 3*time.Second // those of Tribes
	a, c := g.longhouse(datagrams), g.longhouse(datagrams)
	port := channeltest.FreePort(t, "tcp")
	open := func() *peer.Node {
		return g.tribes(func(c *peer.Config) {
			c.Stack = []string{"dispatch", "detector"}
			c.Port, c.UDP, c.Reconnect = port, channeltest.FreePort(t, "udp"), true
		})
	}
	life := func(name string, b *peer.Node) {
		t.Run(name, func(t *testing.T) {
			together(t, []*longhouse{a, c}, []*peer.Node{b})
			for _, o := range slices.Concat(tcpOptions, datagramOptions) {
				t.Run(o.name, func(t *testing.T) {
					for _, n := range []*longhouse{a, c} {
						n.t = t
						if o.options&(channel.UDP|channel.Multicast) != 0 {
							exchangeDatagrams(t, n, b, o, []int{10_000})
						} else {
							exchangeSizes(t, n, b, o, 50, []int{10_000})
						}
					}
				})
			}
			a.t, c.t = t, t
			// Between our own two, with the Tribes node among the receivers.
			for i := range 50 {
				if err := a.Send(within(t), a.View().Members, fmt.Appendf(nil, "%s to all %d", name, i), channel.SendSyncAck); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 50 {
				c.once(fmt.Sprintf("%s to all %d", name, i))
				once(t, b, fmt.Sprintf("%s to all %d", name, i))
			}
		})
		a.t, c.t = t, t
	}
	b := open()
	life("first", b)

	// Killed while it sends.
	ended := make(chan error, 1)
	go func() {
		ended <- b.Send(within(t), peer.Send{Value: peer.Bytes("stream "), Options: uint32(channel.SendSyncAck), Count: 1 << 30, Threads: 4})
	}()
	a.wait(a.got, "a stream of messages", func() bool { return len(a.got.Messages()) > 2000 })
	killed := time.Now()
	g.jvm.Kill()
	if err := <-ended; !errors.Is(err, peer.ErrEnded) {
		t.Errorf("the sender in the killed machine: %v", err)
	}
	a.sees(c.id())
	first := time.Since(killed)
	c.sees(a.id())
	t.Logf("killed: removed after %.1f s at one node, %.1f s at the other", first.Seconds(), time.Since(killed).Seconds())
	for _, n := range []*longhouse{a, c} {
		if n.counter("failuredetector_unanswered_total") == 0 {
			t.Error("the killed node was removed without a failed check")
		}
		if i := slices.IndexFunc(n.watched.Views(), func(v viewChange) bool {
			return v.Event.Member.ID.String() == b.ID() && v.Event.Kind == channel.MemberLost
		}); i < 0 {
			t.Errorf("the killed node was not reported lost, but %v", n.watched.Views())
		}
	}
	if err := a.Send(within(t), a.View().Members, []byte("without it"), channel.SendSyncAck); err != nil {
		t.Error(err)
	}
	c.once("without it")

	g.jvm = startJVM(t)
	restarted := time.Now()
	b = open()
	together(t, []*longhouse{a, c}, []*peer.Node{b})
	t.Logf("restarted at the same port: in both views after %.1f s", time.Since(restarted).Seconds())
	life("second", b)

	for name, n := range map[string]*longhouse{"first": a, "second": c} {
		times := map[string]int{}
		for _, m := range n.got.Messages() {
			times[m.From.ID.String()+" "+string(m.Body)]++
		}
		for body, k := range times {
			if k > 1 {
				t.Errorf("the %s of our nodes got %.100q %d times", name, body, k)
			}
		}
		t.Logf("the %s of our nodes got %d messages, each once", name, len(times))
	}
}
