package discovery

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"pgregory.net/rapid"
)

func addr(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 45565)
}

func peersOf(ns ...int) (out []Peer) {
	for _, n := range ns {
		out = append(out, Peer{Addr: addr(n)})
	}
	return out
}

func TestAnswersAddAndRemove(t *testing.T) {
	now := time.Unix(1000, 0)
	b := newBook(10, time.Minute)
	b.answer(peersOf(1, 2, 3), now)
	b.lives(addr(2).Addr(), 1, now)
	b.answer(peersOf(3, 4), now)
	now = now.Add(59 * time.Second)
	if b.expire(now) || len(b.known) != 4 {
		t.Fatalf("before the time of retrying is over: %v", b.addresses())
	}
	now = now.Add(time.Second)
	if !b.expire(now) || fmt.Sprint(b.addresses()) != fmt.Sprint([]netip.AddrPort{addr(2), addr(3), addr(4)}) {
		t.Fatalf("afterwards: %v; the member that lives must stay", b.addresses())
	}
	b.lives(addr(2).Addr(), -1, now)
	now = now.Add(30 * time.Second)
	b.answer(peersOf(3, 4), now)
	if b.expire(now) {
		t.Fatal("the time of retrying does not begin with the member's death")
	}
	now = now.Add(30 * time.Second)
	if !b.expire(now) || len(b.known) != 2 {
		t.Fatalf("at the end: %v", b.addresses())
	}
}

func TestTooManyAddresses(t *testing.T) {
	now := time.Unix(1000, 0)
	b := newBook(5, time.Minute)
	b.answer(peersOf(500, 600), now)
	b.lives(addr(600).Addr(), 1, now)
	var flood []int
	for i := range 1000 {
		flood = append(flood, i+1)
	}
	invalid, beyond := b.answer(append(peersOf(flood...), Peer{}, Peer{Addr: netip.MustParseAddrPort("224.0.0.1:1")}, Peer{Addr: netip.MustParseAddrPort("10.9.9.9:0")}), now)
	if invalid != 3 || beyond != 995 {
		t.Errorf("%d invalid and %d beyond the bound", invalid, beyond)
	}
	want := []netip.AddrPort{addr(1), addr(2), addr(3), addr(500), addr(600)}
	if got := b.addresses(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("kept %v, want %v", got, want)
	}
}

// Whatever comes, the bound holds, members that live and have been named stay,
// and what nobody names and where nobody lives goes.
func TestBookProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const bound = 6
		now := time.Unix(1000, 0)
		b := newBook(bound, time.Minute)
		live := map[int]bool{}
		ids := rapid.SliceOfN(rapid.IntRange(1, 20), 0, 15)
		var last []int
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				last = ids.Draw(t, "answer")
				b.answer(peersOf(last...), now)
			case 1:
				n := rapid.IntRange(1, 20).Draw(t, "host")
				if live[n] {
					b.lives(addr(n).Addr(), -1, now)
					delete(live, n)
				} else if len(live) < bound {
					b.lives(addr(n).Addr(), 1, now)
					b.hear(addr(n), now)
					live[n] = true
				}
			case 2:
				now = now.Add(time.Duration(rapid.IntRange(0, 50).Draw(t, "seconds")) * time.Second)
				b.expire(now)
			case 3:
				now = now.Add(2 * time.Minute)
				b.expire(now)
				named := map[netip.AddrPort]bool{}
				for _, n := range last {
					named[addr(n)] = true
				}
				for _, a := range b.addresses() {
					if !named[a] && b.live[a.Addr()] == 0 {
						t.Fatalf("%s is kept for ever", a)
					}
				}
			}
			if len(b.known) > bound {
				t.Fatalf("%d addresses", len(b.known))
			}
			if len(b.live) != len(live) {
				t.Fatalf("%d hosts live, want %d", len(b.live), len(live))
			}
		}
	})
}

func TestGuests(t *testing.T) {
	now := time.Unix(1000, 0)
	g := newGuests(3*time.Second, 4000)
	own := netip.MustParseAddr("10.0.0.9")
	host := addr(1).Addr()
	pod := Peer{Addr: addr(1), Identity: "a6c4bc1d-6a8c-11e6-a2b5-0242ac110003", Since: now.Add(-time.Hour)}
	step := func(d time.Duration) { now = now.Add(d) }
	expect := func(events []channel.MemberEvent, want ...string) {
		t.Helper()
		var got []string
		for _, ev := range events {
			got = append(got, fmt.Sprintf("%s %s", ev.Kind, ev.Member.Host))
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("%v, want %v", got, want)
		}
	}
	expect(g.answer(nil, []Peer{pod, {Addr: netip.AddrPortFrom(own, 1)}}, own, nil, now))
	if len(g.due(now)) != 0 {
		t.Fatal("a node that may yet send heartbeats is checked at once")
	}
	step(3 * time.Second)
	if d := g.due(now); len(d) != 1 || d[0] != host {
		t.Fatalf("due: %v", d)
	}
	events := g.checked(nil, host, nil, now)
	expect(events, "added 10.0.0.1")
	m := events[0].Member
	if m.ID.String() != fmt.Sprintf("%x", [16]byte(tomcatID(pod))) || m.Port != 4000 || m.Alive != time.Hour+3*time.Second {
		t.Errorf("member %+v", m)
	}
	// One failed check is not enough.
	step(3 * time.Second)
	expect(g.checked(nil, host, channel.ErrDisconnected, now))
	expect(g.checked(nil, host, nil, now))
	expect(g.checked(nil, host, channel.ErrDisconnected, now))
	expect(g.checked(nil, host, channel.ErrDisconnected, now), "lost 10.0.0.1")
	expect(g.checked(nil, host, channel.ErrDisconnected, now))
	expect(g.checked(nil, host, nil, now), "added 10.0.0.1")
	// Another pod at the same address is another member.
	pod.Identity = "b"
	expect(g.answer(nil, []Peer{pod}, own, nil, now), "lost 10.0.0.1")
	expect(g.checked(nil, host, nil, now), "added 10.0.0.1")
	// No look-up names it any more.
	expect(g.answer(nil, nil, own, nil, now))
	step(2 * time.Second)
	expect(g.expire(nil, now))
	expect(g.answer(nil, []Peer{pod}, own, nil, now))
	step(2 * time.Second)
	expect(g.expire(nil, now))
	expect(g.answer(nil, nil, own, nil, now))
	step(3 * time.Second)
	expect(g.expire(nil, now), "lost 10.0.0.1")
	// One that an earlier instance knew, and one that turns out to send heartbeats.
	g.seed(m, now)
	step(3 * time.Second)
	expect(g.expire(nil, now), "lost 10.0.0.1")
	g.seed(m, now)
	expect(g.replaced(nil, channel.Member{Host: host}), "lost 10.0.0.1")
	if len(g.hosts) != 0 {
		t.Error("guests are left")
	}
}

// The ids are those that Tomcat gives: the MD5 of the text.
func TestTomcatID(t *testing.T) {
	for _, c := range []struct {
		p    Peer
		want string
	}{
		{Peer{Addr: addr(1)}, "190dafab69706a67221c1226360de7dc"},
		{Peer{Addr: addr(1), Identity: "a6c4bc1d"}, ""},
	} {
		got := tomcatID(c.p).String()
		if c.want == "" {
			if got == tomcatID(peersOf(1)[0]).String() {
				t.Error("the uid of the pod is not used")
			}
			continue
		}
		if got != c.want {
			t.Errorf("%v: %s, want %s", c.p, got, c.want)
		}
	}
}
