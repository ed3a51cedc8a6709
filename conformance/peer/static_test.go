package peer_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// roster is a list of configured members with free ports and fixed ids.
func roster(t *testing.T, n int) []peer.Static {
	var l []peer.Static
	for range n {
		l = append(l, peer.Static{Host: "127.0.0.1", Port: freePort(t, "tcp"), ID: channel.NewUniqueID()})
	}
	return l
}

func others(l []peer.Static, own int) (o []peer.Static) {
	for i, s := range l {
		if i != own {
			o = append(o, s)
		}
	}
	return o
}

// Static members by the interceptor: all in one list, started one after the
// other, with and without the others being there, stopped and started again.
func testStaticInterceptor(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	l := roster(t, 3)
	ours := func(i int) *longhouse {
		var members []string
		for _, m := range l {
			members = append(members, fmt.Sprintf("{host: %s, port: %d, unique_id: %x}", m.Host, m.Port, m.ID))
		}
		return g.longhouse(func(c *nodeConfig) {
			c.port, c.membership = l[i].Port, nil
			c.stack = []string{"dispatch", "ping {timeout: 20s}", ourDetector, fmt.Sprintf(
				"staticmember {members: [%s], local: {host: 127.0.0.1, port: %d}, timeout: 20s, min_retry: 100ms, max_retry: 500ms}",
				strings.Join(members, ", "), l[i].Port)}
		})
	}
	theirs := func(i int) *peer.Node {
		return g.tribes(func(c *peer.Config) {
			c.Membership, c.Level = "none", peer.LevelReceiver|peer.LevelSender
			c.Port, c.Members, c.Local = l[i].Port, others(l, i), &l[i]
			c.Stack = []string{"dispatch", "ping", "detector", "staticmember"}
		})
	}
	a := ours(0)
	b := theirs(1) // we are there when it starts
	together(t, []*longhouse{a}, []*peer.Node{b})
	c := ours(2) // it is there when we start
	all := func() { together(t, []*longhouse{a, c}, []*peer.Node{b}) }
	all()
	if a.id() != fmt.Sprintf("%x", l[0].ID) || b.ID() != fmt.Sprintf("%x", l[1].ID) {
		t.Errorf("ids: %s, %s, want those of %v", a.id(), b.ID(), l)
	}
	for _, o := range tcpOptions[:4] {
		exchangeSizes(t, a, b, o, 20, []int{10_000})
	}
	if err := b.Close(within(t)); err != nil {
		t.Fatal(err)
	}
	a.sees(c.id())
	c.sees(a.id())
	b = theirs(1)
	all()
	a.stop()
	seen(t, b, c.id())
	if gone := b.Events("gone"); len(gone) == 0 || !strings.Contains(gone[0].Values.Get("member"), a.id()) || !strings.Contains(gone[0].Values.Get("member"), channel.ShutdownCommand) {
		t.Errorf("the Tribes node was not told that we left, but %v", gone)
	}
	a = ours(0)
	all()
	exchangeSizes(t, a, b, optionCase{"sync-ack", channel.SendSyncAck}, 20, nil)
	exchangeSizes(t, c, b, optionCase{"sync-ack", channel.SendSyncAck}, 20, nil)
}
