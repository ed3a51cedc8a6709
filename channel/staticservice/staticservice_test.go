package staticservice_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/staticservice"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

const port = 4000

type node struct {
	*channel.Channel
	sim     *channeltest.SimNode
	seen    *channeltest.Recorder
	got     *channeltest.Recorder
	metrics *channel.Metrics
}

func config(hosts ...string) staticservice.Config {
	c := staticservice.Default()
	c.Channel = "test-Channel"
	for _, h := range hosts {
		c.Members = append(c.Members, staticservice.Member{Host: h, Port: port})
	}
	return c
}

func start(t *testing.T, sim *channeltest.SimNode, c staticservice.Config) *node {
	t.Helper()
	n := &node{sim: sim, seen: new(channeltest.Recorder), got: new(channeltest.Recorder), metrics: channel.NewMetrics()}
	s := channel.Settings{Net: sim, Logger: zap.NewNop(), Metrics: n.metrics}
	m, err := staticservice.New(c, s)
	if err != nil {
		t.Fatal(err)
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address, rc.Port, rc.AutoBind = sim.IP(), port, 1
	n.Channel, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Pipelined: true},
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s), Receiver: tcp.NewReceiver(rc, s), Membership: m,
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	n.Listen(n.got)
	n.Watch(n.seen.Watch)
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) stop(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func (n *node) counter(name string) float64 { return channeltest.Sum(n.metrics, name) }

// sees checks who is in the view, after everything has settled.
func (n *node) sees(t *testing.T, others ...*node) {
	t.Helper()
	synctest.Wait()
	var want, have []string
	for _, o := range others {
		want = append(want, o.Local().ID.String())
	}
	for _, m := range n.View().Members {
		have = append(have, m.ID.String())
	}
	slices.Sort(want)
	slices.Sort(have)
	if !slices.Equal(want, have) {
		t.Errorf("%s sees %v, want %v", n.sim.IP(), have, want)
	}
}

// last returns the last event about a node.
func (n *node) last(o *node) (ev channel.MemberEvent) {
	for _, v := range n.seen.Views() {
		if v.Event.Member.ID == o.Local().ID {
			ev = v.Event
		}
	}
	return ev
}

func TestLife(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		sims := nw.Nodes(3)
		c := config(sims[0].IP(), sims[1].IP(), sims[2].IP()) // one list for all
		a := start(t, sims[0], c)
		time.Sleep(time.Minute) // alone
		a.sees(t)
		b := start(t, sims[1], c)
		time.Sleep(time.Second) // it does not have to wait for a's pause
		a.sees(t, b)
		b.sees(t, a)
		d := start(t, sims[2], c)
		time.Sleep(time.Second)
		a.sees(t, b, d)
		b.sees(t, a, d)
		d.sees(t, a, b)
		if err := a.Send(t.Context(), a.View().Members, []byte("hello"), channel.SendSyncAck); err != nil {
			t.Error(err)
		}

		// A goodbye is seen at once.
		b.stop(t)
		a.sees(t, d)
		d.sees(t, a)
		if ev := a.last(b); ev.Kind != channel.MemberLeft {
			t.Errorf("a was told %v", ev)
		}
		// It comes back under another id, and no ghost stays.
		b = start(t, sims[1], c)
		time.Sleep(time.Second)
		a.sees(t, b, d)
		d.sees(t, a, b)

		// Cut off, it is lost; healed, it is back.
		nw.Partition([]string{sims[1].IP()}, []string{sims[0].IP(), sims[2].IP()})
		time.Sleep(10 * time.Second)
		a.sees(t, d)
		b.sees(t)
		if ev := a.last(b); ev.Kind != channel.MemberLost {
			t.Errorf("a was told %v", ev)
		}
		nw.Heal()
		time.Sleep(30 * time.Second)
		a.sees(t, b, d)
		b.sees(t, a, d)

		// Nothing of all that came up to the application.
		for _, n := range []*node{a, d} {
			for _, m := range n.got.Messages() {
				if string(m.Body) != "hello" {
					t.Errorf("a message of the membership came up: %q", m.Body)
				}
			}
			if n.counter("staticservice_malformed_total")+n.counter("staticservice_refused_total") != 0 {
				t.Error("messages of our own were refused")
			}
		}
		for _, n := range []*node{a, b, d} {
			n.stop(t)
		}
	})
}

// Other channels, forged members and noise change nothing.
func TestStrangers(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 2}, func(t *testing.T, nw *channeltest.SimNet) {
		sims := nw.Nodes(3)
		c := config(sims[0].IP(), sims[1].IP())
		a, b := start(t, sims[0], c), start(t, sims[1], c)
		other := config(sims[0].IP())
		other.Channel = "other-Channel"
		x := start(t, sims[2], other)
		time.Sleep(3 * time.Second)
		a.sees(t, b)
		x.sees(t)

		to := []channel.Member{a.Local()}
		id := []byte("test-Channel-StaticMembership")
		send := func(v jser.Value) {
			t.Helper()
			body, err := jser.Encode(v)
			if err != nil {
				t.Fatal(err)
			}
			if err := x.Send(t.Context(), to, body, channel.ObjectStream|channel.UseAck); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		// A stop and a start in the name of somebody else.
		victim := b.Local()
		victim.Command = channel.ShutdownCommand
		send(&jser.MemberMessage{Type: jser.MemberStop, MembershipID: id, Member: jser.MemberOf(victim)})
		ghost := channeltest.Member(7)
		send(&jser.RPCMessage{UUID: make([]byte, 16), RPCID: id, Message: &jser.MemberMessage{Type: jser.MemberStart, MembershipID: id, Member: jser.MemberOf(ghost)}})
		send(&jser.MemberMessage{Type: jser.MemberStop, MembershipID: id}) // nobody
		if n := a.counter("staticservice_refused_total"); n != 3 {
			t.Errorf("refused: %v", n)
		}
		// No request at all.
		send(&jser.RPCMessage{UUID: []byte{1}, RPCID: id, Message: "text"})
		send(&jser.RPCMessage{UUID: []byte{1}, RPCID: id, Message: &jser.MemberMessage{Type: 99, MembershipID: id, Member: jser.MemberOf(x.Local())}})
		if n := a.counter("staticservice_malformed_total"); n != 2 {
			t.Errorf("malformed: %v", n)
		}
		for _, noise := range []string{"", "\xac\xed\x00\x05", "\xac\xed\x00\x05sr" + string(id), strings.Repeat(string(id), 10_000)} {
			if err := x.Send(t.Context(), to, []byte(noise), channel.ObjectStream|channel.UseAck); err != nil {
				t.Fatal(err)
			}
		}
		// Messages of others go on to the application.
		send("an object of the application with " + string(id))
		synctest.Wait()
		a.sees(t, b)
		up := slices.DeleteFunc(a.got.Bodies(), func(b string) bool { return strings.Contains(b, "other-Channel") })
		if len(up) != 5 {
			t.Errorf("the application got %d messages, want the four of noise and the object", len(up))
		}
		for _, n := range []*node{x, a, b} {
			n.stop(t)
		}
	})
}

func TestNotAttached(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		m, err := staticservice.New(config("10.0.0.1"), channel.Settings{Net: nw.Nodes(1)[0]})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(t.Context(), channeltest.Member(1), nil, new(channeltest.Recorder)); err == nil || !strings.Contains(err.Error(), "attached") {
			t.Errorf("start without a channel: %v", err)
		}
		if err := m.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestConfig(t *testing.T) {
	for want, change := range map[string]func(c *staticservice.Config){
		"":                               func(*staticservice.Config) {},
		"channel: is empty":              func(c *staticservice.Config) { c.Channel = "" },
		"none are listed":                func(c *staticservice.Config) { c.Members = nil },
		"members[1]: port: 0 is outside": func(c *staticservice.Config) { c.Members[1].Port = 0 },
		"members[0]: host: is empty":     func(c *staticservice.Config) { c.Members[0].Host = "" },
		"listed twice":                   func(c *staticservice.Config) { c.Members[1] = c.Members[0] },
		"timeout: 0s":                    func(c *staticservice.Config) { c.Timeout = 0 },
		"two ping intervals":             func(c *staticservice.Config) { c.Expiration = c.PingInterval },
		"the most is 1024":               func(c *staticservice.Config) { c.Members = config(slices.Repeat([]string{"h"}, 1025)...).Members },
	} {
		c := config("10.0.0.1", "10.0.0.2")
		change(&c)
		switch err := c.Validate(); {
		case (err == nil) != (want == ""):
			t.Errorf("want %q, got %v", want, err)
		case err != nil && !strings.Contains(fmt.Sprint(err), want):
			t.Errorf("want %q, got %v", want, err)
		}
	}
}
