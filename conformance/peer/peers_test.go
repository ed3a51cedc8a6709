package peer_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// TestPeers puts Longhouse nodes into one group with Apache Tribes nodes, as
// the machine's Tomcat packages have them, and tries everything that both can
// do, in both directions.
func TestPeers(t *testing.T) {
	j := startJVM(t)
	t.Logf("Tribes %s on Java %s", j.Version, j.Java)
	t.Run("all", func(t *testing.T) {
		for _, c := range []struct {
			name string
			run  func(*testing.T, *peer.JVM)
		}{
			{"multicast/members", testMembers},
			{"multicast/payload", testPayload},
			{"send", testSends},
			{"acks/failing-listeners", testFailures},
			{"acks/deferred", testDeferred},
			{"detector/we-check", testWeCheck},
			{"detector/they-check", testTheyCheck},
			{"twophase/abort", testAbort},
			{"encrypt/wrong-key", testWrongKey},
			{"rpc/calls", testCalls},
			{"rpc/modes", testModes},
			{"rpc/late", testLate},
			{"map/full", func(t *testing.T, j *peer.JVM) { testMap(t, j, false) }},
			{"map/lazy", func(t *testing.T, j *peer.JVM) { testMap(t, j, true) }},
			{"objects", testObjects},
			{"election", testElection},
			{"datagrams", testDatagrams},
			{"static/interceptor", testStaticInterceptor},
			{"domain", testDomain},
			{"ping", testPing},
		} {
			t.Run(c.name, func(t *testing.T) { t.Parallel(); c.run(t, j) })
		}
		for _, p := range pairs(j.Version) {
			t.Run("stack/"+p.name, func(t *testing.T) { t.Parallel(); testStack(t, j, p) })
		}
		t.Run("acks/silent", func(t *testing.T) { t.Parallel(); testSilent(t) })
		t.Run("static/service", func(t *testing.T) { t.Parallel(); testStaticService(t) })
		t.Run("tomcat", func(t *testing.T) { t.Parallel(); testTomcat(t) })
		t.Run("tomcat-joins-ours", func(t *testing.T) { t.Parallel(); testTomcatJoinsOurs(t) })
		t.Run("kill", func(t *testing.T) { t.Parallel(); testKill(t) })
	})
	t.Run("log", func(t *testing.T) {
		for _, e := range j.Events() {
			if e.Kind == "log" && e.Values.Get("level") == "SEVERE" && !wanted(e) {
				t.Errorf("%s: %s\n%s", e.Values.Get("logger"), e.Values.Get("text"), e.Values.Get("trace"))
			}
		}
	})
}

// wanted says that a test has provoked an error in the JVM's log.
func wanted(e peer.Event) bool {
	text, trace := e.Values.Get("text"), e.Values.Get("trace")
	return strings.Contains(trace, "as the test wants it") || // listeners that throw
		strings.Contains(text, "decrypt") || // the wrong key
		strings.Contains(trace, "Queue is closed") || // a node that stops while it is asked something
		strings.Contains(trace, "AbstractReplicatedMap.heartbeat") && strings.Contains(trace, `"this.channel" is null`) // a map closed during its heartbeat
}

// Both find each other, see who leaves, and read each other's records.
func testMembers(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	a := g.longhouse(func(c *nodeConfig) { c.local.Domain = "west" })
	b := g.tribes(func(c *peer.Config) { c.Domain = "east"; c.Stack = []string{"dispatch", "detector"} })
	c := g.longhouse(nil)
	d := g.tribes(nil)
	together(t, []*longhouse{a, c}, []*peer.Node{b, d})

	m := c.member(b.ID())
	if m.Port != b.Local.Port || m.Host.String() != "127.0.0.1" || m.Domain != "east" || m.UDPPort != -1 {
		t.Errorf("our view of the Tribes node: %+v, its own: %+v", m, b.Local)
	}
	members, err := d.Members(within(t))
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(members, func(m peer.Member) bool { return m.ID == a.id() })
	if l := a.Local(); members[i].Port != l.Port || members[i].Host != "127.0.0.1" || members[i].Domain != "west" || string(members[i].Payload) != l.Payload {
		t.Errorf("the Tribes node's view of ours: %+v, want %+v", members[i], l)
	}

	// A goodbye is seen at once, long before the drop time, on both sides.
	if err := d.Close(within(t)); err != nil {
		t.Fatal(err)
	}
	a.sees(b.ID(), c.id())
	a.wait(a.watched, "we are told that the Tribes node left", func() bool {
		return slices.ContainsFunc(a.watched.Views(), func(v viewChange) bool {
			return v.Event.Member.ID.String() == d.ID() && v.Event.Kind == channel.MemberLeft
		})
	})
	c.stop()
	seen(t, b, a.id())
	if err := b.Wait(within(t), "gone", func(gone []peer.Event) bool {
		return slices.ContainsFunc(gone, func(e peer.Event) bool {
			return strings.Contains(e.Values.Get("member"), c.id()) && strings.Contains(e.Values.Get("member"), channel.ShutdownCommand)
		})
	}); err != nil {
		t.Errorf("the Tribes node was not told that we left, but %v", b.Events("gone"))
	}
}

// A changed payload is seen on the other side.
func testPayload(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	a, b := g.longhouse(nil), g.tribes(nil)
	together(t, []*longhouse{a}, []*peer.Node{b})
	if _, err := b.Call(within(t), "payload", "payload", "00ff10"); err != nil {
		t.Fatal(err)
	}
	a.wait(a.watched, "the new payload", func() bool { return a.member(b.ID()).Payload == "\x00\xff\x10" })
	if err := a.Announce(within(t), channel.Announcement{Name: "renamed", Pipelined: true}); err != nil {
		t.Fatal(err)
	}
	poll(t, j, "our new payload", func() bool {
		ms, err := b.Members(within(t))
		return err == nil && len(ms) == 1 && bytes.Contains(ms[0].Payload, []byte("renamed"))
	})
}

// An optionCase is one way to send.
type optionCase struct {
	name    string
	options channel.Options
}

var tcpOptions = []optionCase{
	{"none", channel.SendNone},
	{"ack", channel.SendAck},
	{"sync-ack", channel.SendSyncAck},
	{"async", channel.SendAsync},
	{"async-ack", channel.SendAsync | channel.UseAck},
	{"async-sync-ack", channel.SendAsync | channel.UseAck | channel.SyncAck},
	{"unknown-bits", channel.SendAck | channel.Secure | 0x0040_0000},
}

// Messages with every option in both directions, of one and several threads,
// small and large: all arrive, whole and once.
func testSends(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	a := g.longhouse(nil)
	b := g.tribes(func(c *peer.Config) { c.Stack = []string{"dispatch", "detector"} })
	together(t, []*longhouse{a}, []*peer.Node{b})
	for _, o := range tcpOptions {
		t.Run(o.name, func(t *testing.T) {
			exchange(t, a, b, o, 300)
		})
	}
}

// exchanges numbers the calls of exchange.
var exchanges atomic.Int64

// exchange sends messages both ways at once and checks that each arrives once.
func exchange(t *testing.T, a *longhouse, b *peer.Node, o optionCase, count int) {
	t.Helper()
	exchangeSizes(t, a, b, o, count, []int{0, 1, 2000, 70_000, 1 << 20})
}

func exchangeSizes(t *testing.T, a *longhouse, b *peer.Node, o optionCase, count int, sizes []int) {
	t.Helper()
	const threads = 4
	tag := fmt.Sprintf("%s/%s/%d/", t.Name(), o.name, exchanges.Add(1))
	to := []channel.Member{a.member(b.ID())}
	var wg sync.WaitGroup
	for th := range threads {
		wg.Go(func() {
			for i := range count {
				body := fmt.Appendf([]byte(tag+"out/"), "%d/%d", th, i)
				if err := a.Send(within(t), to, body, o.options); err != nil {
					t.Errorf("our message %d/%d: %v", th, i, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		err := b.Send(within(t), peer.Send{To: []string{a.id()}, Value: peer.Bytes(tag + "in/"), Options: uint32(o.options), Count: count, Threads: threads})
		if err != nil {
			t.Errorf("their messages: %v", err)
		}
	})
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	received(t, b, tag+"out/", threads, count)
	a.received(tag+"in/", threads, count)

	for _, size := range sizes {
		body := peer.Fill(fmt.Appendf([]byte(tag), "size %d", size), size)
		if size == 0 {
			body = nil
		}
		if err := a.Send(within(t), to, body, o.options); err != nil {
			t.Fatalf("our %d bytes: %v", size, err)
		}
		poll(t, b.JVM(), fmt.Sprintf("%d bytes at the Tribes node", size), func() bool {
			return slices.ContainsFunc(b.Events("message"), func(e peer.Event) bool { return holds(e, body) })
		})
		s := peer.Send{To: []string{a.id()}, Value: peer.Bytes(fmt.Sprintf("%ssize %d", tag, size)), Size: size, Options: uint32(o.options)}
		if size == 0 {
			s.Value = peer.Bytes("")
		}
		if err := b.Send(within(t), s); err != nil {
			t.Fatalf("their %d bytes: %v", size, err)
		}
		a.wait(a.got, fmt.Sprintf("%d bytes here", size), func() bool {
			return slices.ContainsFunc(a.got.Messages(), func(m channel.Message) bool {
				return bytes.Equal(m.Body, body) && m.Options.Has(channel.ByteMessage)
			})
		})
	}
}

// holds reports whether a message event has this body.
func holds(e peer.Event, body []byte) bool {
	if d := e.Values.Get("digest"); d != "" {
		return d == fmt.Sprintf("%x", sha256.Sum256(body))
	}
	b, ok := e.Value().(peer.Bytes)
	return ok && bytes.Equal(b, body)
}

// want lists the messages "thread/number" with a prefix, sorted.
func want(prefix string, threads, count int) []string {
	var out []string
	for th := range threads {
		for i := range count {
			out = append(out, fmt.Sprintf("%s%d/%d", prefix, th, i))
		}
	}
	slices.Sort(out)
	return out
}

// received waits for the messages of an exchange at a Tribes node. It must not
// have got one of them twice.
func received(t *testing.T, n *peer.Node, prefix string, threads, count int) {
	t.Helper()
	have := func(evs []peer.Event) (l []string) {
		for _, e := range evs {
			if b, ok := e.Value().(peer.Bytes); ok && strings.HasPrefix(string(b), prefix) {
				l = append(l, string(b))
			}
		}
		return l
	}
	if err := n.Wait(within(t), "message", func(evs []peer.Event) bool { return len(evs) >= threads*count && len(have(evs)) >= threads*count }); err != nil {
		t.Fatalf("the Tribes node has %d messages of %d: %v\n%s", len(have(n.Events("message"))), threads*count, err, complaints(n.JVM()))
	}
	got := have(n.Events("message"))
	slices.Sort(got)
	if !slices.Equal(got, want(prefix, threads, count)) {
		t.Errorf("the Tribes node has %d messages, not each of %d once", len(got), threads*count)
	}
}

// received waits for the messages of an exchange here.
func (n *longhouse) received(prefix string, threads, count int) {
	n.t.Helper()
	have := func() (l []string) {
		for _, b := range n.got.Bodies() {
			if strings.HasPrefix(b, prefix) {
				l = append(l, b)
			}
		}
		return l
	}
	n.wait(n.got, fmt.Sprintf("%d messages %s", threads*count, prefix), func() bool { return len(have()) >= threads*count })
	got := have()
	slices.Sort(got)
	if !slices.Equal(got, want(prefix, threads, count)) {
		n.t.Errorf("we have %d messages %s, not each of %d once", len(got), prefix, threads*count)
	}
}
