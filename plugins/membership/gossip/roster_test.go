package gossip

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"pgregory.net/rapid"
)

var begin = time.UnixMilli(1_000_000_000_000)

// node is a node with an id of one byte, at an address of another.
func node(id, host byte, start time.Duration) info {
	return info{
		rec:    channel.Member{ID: channel.UniqueID{id}, Host: netip.AddrFrom4([4]byte{10, 0, 0, host}), Port: 4000, SecurePort: -1, UDPPort: -1},
		start:  begin.Add(start),
		gossip: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, host}), 45566),
	}
}

// script drives a roster and compares what it tells.
type script struct {
	t       *testing.T
	r       *roster
	now     time.Time
	refused []string
}

func newScript(t *testing.T, limit int) *script {
	s := &script{t: t, now: begin.Add(time.Hour)}
	s.r = newRoster(node(99, 99, 0).rec, limit, func(reason string, _ info) { s.refused = append(s.refused, reason) })
	return s
}

func (s *script) expect(events []channel.MemberEvent, want ...string) {
	s.t.Helper()
	var got []string
	for _, ev := range events {
		text := fmt.Sprintf("%s %d", ev.Kind, ev.Member.ID[0])
		if ev.Err == channel.ErrReplaced {
			text += " replaced"
		}
		got = append(got, text)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		s.t.Errorf("%v, want %v", got, want)
	}
}

func TestRoster(t *testing.T) {
	s := newScript(t, 10)
	r := s.r
	events := r.alive(nil, node(1, 1, 0), s.now)
	s.expect(events, "added 1")
	if events[0].Member.Alive != time.Hour {
		t.Errorf("alive for %v", events[0].Member.Alive)
	}
	s.expect(r.alive(nil, node(1, 1, 0), s.now))
	changed := node(1, 1, 0)
	changed.rec.Payload = "new"
	s.expect(r.alive(nil, changed, s.now), "updated 1")
	s.expect(r.dead(nil, channel.UniqueID{1}, s.now), "lost 1")
	s.expect(r.dead(nil, channel.UniqueID{1}, s.now))

	// A farewell is final: older words about the node do not bring it back.
	s.expect(r.alive(nil, node(2, 2, 0), s.now), "added 2")
	events, news := r.farewell(nil, channel.UniqueID{2}, begin, s.now)
	s.expect(events, "left 2")
	if _, again := r.farewell(nil, channel.UniqueID{2}, begin, s.now); !news || again {
		t.Errorf("news %v, again %v", news, again)
	}
	s.expect(r.alive(nil, node(2, 2, 0), s.now))
	s.expect(r.alive(nil, node(2, 2, time.Minute), s.now), "added 2") // the same id, started again
	if _, news := r.farewell(nil, channel.UniqueID{2}, begin, s.now); news {
		t.Error("an old farewell was believed")
	}
	events, _ = r.farewell(nil, channel.UniqueID{2}, begin.Add(time.Minute), s.now)
	s.expect(events, "left 2")
	s.expect(r.dead(nil, channel.UniqueID{2}, s.now))
	if _, news := r.farewell(nil, channel.UniqueID{7}, begin, s.now); news {
		t.Error("the farewell of a stranger is news")
	}

	// Another incarnation at the same place, at once; the old one is not heard of
	// any more.
	s.expect(r.alive(nil, node(3, 3, 0), s.now), "added 3")
	s.expect(r.alive(nil, node(4, 3, time.Minute), s.now), "lost 3 replaced", "added 4")
	s.expect(r.alive(nil, node(3, 3, 0), s.now))
	s.expect(r.dead(nil, channel.UniqueID{3}, s.now))

	// The same address, but not the same place: it waits until the holder is gone.
	elsewhere := node(5, 3, 2*time.Minute)
	elsewhere.gossip = netip.MustParseAddrPort("10.0.0.3:1")
	s.refused = nil
	s.expect(r.alive(nil, elsewhere, s.now))
	if fmt.Sprint(s.refused) != "[address_taken]" {
		t.Errorf("refused: %v", s.refused)
	}
	s.expect(r.dead(nil, channel.UniqueID{4}, s.now), "lost 4", "added 5")

	// This node's own address and id are never anybody else's.
	s.refused = nil
	s.expect(r.alive(nil, node(6, 99, 0), s.now))
	s.expect(r.alive(nil, node(99, 1, 0), s.now))
	if fmt.Sprint(s.refused) != "[own_address]" {
		t.Errorf("refused: %v", s.refused)
	}

	// A member that moves gives its old address free.
	s.expect(r.alive(nil, node(7, 7, 0), s.now), "added 7")
	waiting := node(8, 7, time.Minute)
	waiting.gossip = elsewhere.gossip
	s.expect(r.alive(nil, waiting, s.now))
	s.expect(r.alive(nil, node(7, 8, 0), s.now), "updated 7", "added 8")
}

func TestRosterBound(t *testing.T) {
	s := newScript(t, 2)
	for i := range byte(5) {
		s.r.alive(nil, node(i+1, i+1, 0), s.now)
	}
	if len(s.r.nodes) != 2 || len(s.refused) != 3 {
		t.Errorf("%d nodes, refused %v", len(s.r.nodes), s.refused)
	}
}

func TestRosterSeed(t *testing.T) {
	s := newScript(t, 10)
	until := s.now.Add(10 * time.Second)
	for i := range byte(3) {
		s.r.seed(node(i+1, i+1, 0).rec, s.now, until)
	}
	s.r.seed(node(1, 9, 0).rec, s.now, until)
	s.expect(s.r.alive(nil, node(1, 1, 0), s.now), "updated 1")
	s.expect(s.r.alive(nil, node(4, 2, time.Minute), s.now), "lost 2 replaced", "added 4") // its successor
	s.expect(s.r.dead(nil, channel.UniqueID{3}, s.now))                                    // not heard of yet
	s.expect(s.r.expire(nil, until.Add(-1)))
	events := s.r.expire(nil, until)
	s.expect(events, "lost 3")
}

// Whatever is told in whatever order: being added and removed alternate, no two
// members have one address, and nobody has this node's.
func TestRosterProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRoster(node(99, 9, 0).rec, 8, func(string, info) {})
		now := begin.Add(time.Hour)
		in := map[channel.UniqueID]netip.AddrPort{}
		if rapid.Bool().Draw(t, "seeded") {
			for i := range byte(3) {
				m := node(i+1, i+1, 0).rec
				r.seed(m, now, now.Add(5*time.Second))
				in[m.ID] = m.Addr()
			}
		}
		small := func(name string, most int) byte { return byte(rapid.IntRange(1, most).Draw(t, name)) }
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			now = now.Add(time.Second)
			id := channel.UniqueID{small("id", 10)}
			start := time.Duration(small("start", 3)) * time.Minute
			var events []channel.MemberEvent
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0, 1:
				i := node(id[0], small("host", 9), start)
				if rapid.IntRange(0, 4).Draw(t, "elsewhere") == 0 {
					i.gossip = netip.MustParseAddrPort("10.9.9.9:1")
				}
				events = r.alive(nil, i, now)
			case 2:
				events = r.dead(nil, id, now)
			case 3:
				events, _ = r.farewell(nil, id, begin.Add(start), now)
			}
			events = r.refresh(r.expire(events, now), now)
			for _, ev := range events {
				_, known := in[ev.Member.ID]
				switch ev.Kind {
				case channel.MemberAdded:
					if known {
						t.Fatalf("%v was added twice", ev.Member.ID)
					}
					in[ev.Member.ID] = ev.Member.Addr()
				case channel.MemberUpdated:
					if !known {
						t.Fatalf("%v was updated without having been added", ev.Member.ID)
					}
					in[ev.Member.ID] = ev.Member.Addr()
				default:
					if !known {
						t.Fatalf("%v was removed without having been added", ev.Member.ID)
					}
					delete(in, ev.Member.ID)
				}
			}
			taken := map[netip.AddrPort]bool{}
			for id, a := range in {
				if taken[a] || a == r.local.Addr() || id == r.local.ID {
					t.Fatalf("%v has the address %v of another one", id, a)
				}
				taken[a] = true
			}
			if len(r.nodes) > 8 || len(r.byAddr) != len(in) {
				t.Fatalf("%d nodes, %d shown, %d told", len(r.nodes), len(r.byAddr), len(in))
			}
		}
	})
}

func FuzzMeta(f *testing.F) {
	i := node(1, 1, 0)
	i.rec.Payload, i.rec.Domain = channel.Announcement{Name: "node1"}.Encode(), "shop"
	f.Add(appendMeta(nil, i.rec, begin))
	f.Add(appendFarewell(nil, i.rec.ID, begin))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if id, start, err := decodeFarewell(b); err == nil && start.UnixMilli() >= 0 && !bytes.Equal(appendFarewell(nil, id, start), b) {
			t.Fatal("a farewell is not encoded as it was")
		}
		i, err := decodeMeta(b)
		if err != nil {
			return
		}
		if i.rec.ID.IsZero() || i.rec.Port < 1 || !i.rec.Host.IsValid() {
			t.Fatalf("%+v", i)
		}
		again, err := decodeMeta(appendMeta(nil, i.rec, i.start))
		if err != nil || again != i {
			t.Fatalf("%+v became %+v, %v", i, again, err)
		}
	})
}
