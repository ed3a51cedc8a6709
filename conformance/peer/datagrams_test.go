package peer_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// datagrams gives a node of ours a port for datagrams.
func datagrams(c *nodeConfig) { c.datagrams = true }

// datagramOptions are the ways to send datagrams.
var datagramOptions = []optionCase{
	{"udp", channel.SendNone | channel.UDP},
	{"udp-ack", channel.SendAck | channel.UDP},
	{"udp-sync-ack", channel.SendSyncAck | channel.UDP},
	{"udp-async", channel.SendAsync | channel.UDP},
	{"multicast", channel.SendNone | channel.Multicast},
	{"multicast-ack", channel.SendAck | channel.Multicast}, // the ack means nothing there
}

// Messages as datagrams and to the group, both ways.
func testDatagrams(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	a, c := g.longhouse(datagrams), g.longhouse(datagrams)
	b := g.tribes(func(c *peer.Config) {
		c.Stack = []string{"dispatch", "detector"}
		c.UDP = channeltest.FreePort(t, "udp")
	})
	together(t, []*longhouse{a, c}, []*peer.Node{b})
	if m := a.member(b.ID()); m.UDPPort != b.Local.UDP || m.UDPPort < 1 {
		t.Errorf("the Tribes node's UDP port: %d here, %d there", m.UDPPort, b.Local.UDP)
	}
	members, err := b.Members(within(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range members {
		if m.ID == a.id() && (m.UDP != a.Local().UDPPort || m.UDP < 1) {
			t.Errorf("our UDP port: %d here, %d there", a.Local().UDPPort, m.UDP)
		}
	}
	for _, o := range datagramOptions {
		t.Run(o.name, func(t *testing.T) {
			exchangeDatagrams(t, a, b, o, []int{0, 1, 1000, 9000, 60_000})
			// To several at once, or to the group: our other node gets it, too.
			ours, theirs := []byte("from us to all with "+o.name), []byte("from them to all with "+o.name)
			if err := a.Send(within(t), a.View().Members, ours, o.options); err != nil {
				t.Error(err)
			}
			if err := b.Send(within(t), peer.Send{Value: peer.Bytes(theirs), Options: uint32(o.options)}); err != nil {
				t.Error(err)
			}
			c.once(string(ours), string(theirs))
			a.once(string(theirs))
			once(t, b, string(ours))
		})
	}
	t.Run("too-large", func(t *testing.T) {
		for _, o := range []channel.Options{channel.UDP, channel.Multicast} {
			if err := a.Send(within(t), a.View().Members, make([]byte, 66_000), channel.SendAck|o); err == nil {
				t.Errorf("%v: 66,000 bytes were sent", o)
			}
		}
	})
	t.Run("failing-listener", func(t *testing.T) {
		if _, err := b.Call(within(t), "failOn", "prefix", "fail"); err != nil {
			t.Fatal(err)
		}
		if err := a.Send(within(t), []channel.Member{a.member(b.ID())}, []byte("fail by datagram"), channel.SendSyncAck|channel.UDP); err == nil {
			t.Error("no negative acknowledgement")
		}
	})
}

// exchangeDatagrams is exchangeSizes for messages of which a burst may be lost.
func exchangeDatagrams(t *testing.T, a *longhouse, b *peer.Node, o optionCase, sizes []int) {
	t.Helper()
	n := exchanges.Add(1)
	to := []channel.Member{a.member(b.ID())}
	for i := range 20 {
		size := 0
		if i < len(sizes) {
			size = sizes[i]
		}
		head := fmt.Sprintf("%s/%d/%d", o.name, n, i)
		ours, theirs := peer.Fill([]byte("ours/"+head), size), peer.Fill([]byte("theirs/"+head), size)
		if err := a.Send(within(t), to, ours, o.options); err != nil {
			t.Fatalf("our %d bytes: %v", len(ours), err)
		}
		if err := b.Send(within(t), peer.Send{To: []string{a.id()}, Value: peer.Bytes("theirs/" + head), Size: size, Options: uint32(o.options)}); err != nil {
			t.Fatalf("their %d bytes: %v", len(theirs), err)
		}
		poll(t, b.JVM(), fmt.Sprintf("our %d bytes at the Tribes node", len(ours)), func() bool {
			return slices.ContainsFunc(b.Events("message"), func(e peer.Event) bool { return holds(e, ours) })
		})
		a.wait(a.got, fmt.Sprintf("their %d bytes", len(theirs)), func() bool {
			return slices.ContainsFunc(a.got.Messages(), func(m channel.Message) bool { return bytes.Equal(m.Body, theirs) })
		})
	}
}
