package peer_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/staticservice"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// roster is a list of configured members with free ports and fixed ids.
func roster(t *testing.T, n int) []peer.Static {
	var l []peer.Static
	for range n {
		l = append(l, peer.Static{Host: "127.0.0.1", Port: channeltest.FreePort(t, "tcp"), ID: channel.NewUniqueID()})
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

// Static members by Tomcat's StaticMembershipService and our counterpart: all
// in one list, started one after the other, stopped, killed and started again.
func testStaticService(t *testing.T) {
	j := startJVM(t)
	g := newGroup(t, j)
	l := roster(t, 3)
	ours := func(i int) *longhouse {
		return g.longhouse(func(c *nodeConfig) {
			c.port = l[i].Port
			c.local.ID = l[i].ID
			c.membership = func(s channel.Settings) (channel.Membership, error) {
				m := staticservice.Default()
				m.Channel, m.PingInterval, m.Timeout, m.Expiration = "static-Channel", 200*time.Millisecond, patience, 10*time.Second
				for _, o := range l {
					m.Members = append(m.Members, staticservice.Member{Host: o.Host, Port: o.Port})
				}
				return staticservice.New(m, s)
			}
		})
	}
	theirs := func(j *peer.JVM, i int) *peer.Node {
		return g.tribesIn(j, func(c *peer.Config) {
			c.Membership, c.Channel, c.Port, c.Members = "static", "static-Channel", l[i].Port, l
			c.DropTime = patience
			c.Stack = []string{"dispatch", "detector"}
		})
	}
	b := theirs(j, 1)
	a := ours(0) // it is there when we start
	together(t, []*longhouse{a}, []*peer.Node{b})
	c := ours(2)
	all := func() { together(t, []*longhouse{a, c}, []*peer.Node{b}) }
	all()
	for _, o := range tcpOptions[:4] {
		exchangeSizes(t, a, b, o, 20, []int{10_000})
	}
	// Who leaves is gone at once, and said so.
	a.stop()
	seen(t, b, c.id())
	c.sees(b.ID())
	if err := b.Wait(within(t), "gone", func(gone []peer.Event) bool { return len(gone) > 0 }); err != nil {
		t.Fatal(err)
	}
	if gone := b.Events("gone")[0].Values.Get("member"); !strings.Contains(gone, a.id()) || !strings.Contains(gone, channel.ShutdownCommand) {
		t.Errorf("the Tribes node was not told that we left, but %v", gone)
	}
	if err := b.Close(within(t)); err != nil {
		t.Fatal(err)
	}
	c.sees()
	if i := slices.IndexFunc(c.watched.Views(), func(v viewChange) bool {
		return v.Event.Member.ID.String() == b.ID() && v.Event.Kind == channel.MemberLeft
	}); i < 0 {
		t.Errorf("we were not told that the Tribes node left, but %v", c.watched.Views())
	}
	l[0].ID = channel.NewUniqueID() // ours comes back as another one
	a = ours(0)
	b = theirs(j, 1) // we are there when it starts
	all()
	// Killed, it is found out by the next ping.
	j.Kill()
	a.sees(c.id())
	c.sees(a.id())
	b = theirs(startJVM(t), 1)
	all()
	exchangeSizes(t, a, b, optionCase{"sync-ack", channel.SendSyncAck}, 20, nil)
	exchangeSizes(t, c, b, optionCase{"sync-ack", channel.SendSyncAck}, 20, nil)
	for _, n := range []*longhouse{a, c} {
		for _, m := range n.got.Messages() {
			if strings.Contains(string(m.Body), "StaticMembership") {
				t.Errorf("a message of the membership came up: %q", m.Body)
			}
		}
		for _, counter := range []string{"staticservice_refused_total", "staticservice_malformed_total"} {
			if k := n.counter(counter); k != 0 {
				t.Errorf("%s is %v", counter, k)
			}
		}
	}
}
