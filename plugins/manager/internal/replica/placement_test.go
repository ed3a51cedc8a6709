package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// groupOf makes a group of nodes 1 to n, in domains in turn.
func groupOf(n, domains int) *group {
	g := &group{self: 1, domains: domains}
	for i := range n {
		g.ranked = append(g.ranked, rankedNode{uint64(i + 1), mix(uint64(i + 1)), i % domains})
	}
	return g
}

func TestRingProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := rapid.IntRange(1, 12).Draw(t, "nodes")
		domains := rapid.IntRange(1, nodes).Draw(t, "domains")
		want := rapid.IntRange(1, maxCopies+1).Draw(t, "want")
		digest := rapid.Uint64().Draw(t, "digest")
		g := groupOf(nodes, domains)
		ring := g.ring(digest, want, nil)
		if len(ring) != min(want, nodes) {
			t.Fatalf("%d nodes, want %d of %d", len(ring), want, nodes)
		}
		seen := map[int]int{}
		for i, node := range ring {
			if slices.Contains(ring[:i], node) {
				t.Fatalf("node %d twice in %v", node, ring)
			}
			seen[g.domain(node)]++
		}
		if len(seen) != min(len(ring), domains) {
			t.Fatalf("%v is in %d domains of %d", ring, len(seen), domains)
		}
		copies := min(want, maxCopies)
		for _, r := range g.ranked {
			got := g.copies(digest, r.node, copies, nil)
			if len(got) != min(copies, nodes-1) || slices.Contains(got, r.node) {
				t.Fatalf("owner %d of %d nodes has the copies %v, want %d", r.node, nodes, got, copies)
			}
			if wide := g.ring(digest, copies+1, nil); !slices.Contains(wide, r.node) {
				for _, c := range got {
					if !slices.Contains(wide, c) {
						t.Fatalf("copy %d is not where others look, %v", c, wide)
					}
				}
				if nodes > domains && domains > 1 && g.domain(got[0]) == g.domain(r.node) {
					t.Fatalf("the first copy of %d is in its own domain", r.node)
				}
			}
		}
		// A node that goes changes nothing for sessions that it did not have.
		gone := g.ranked[rapid.IntRange(0, nodes-1).Draw(t, "gone")].node
		if domains == 1 && !slices.Contains(ring, gone) {
			h := groupOf(nodes, 1)
			h.ranked = slices.DeleteFunc(h.ranked, func(r rankedNode) bool { return r.node == gone })
			if after := h.ring(digest, want, nil); !slices.Equal(ring, after) {
				t.Fatalf("%v became %v without %d", ring, after, gone)
			}
		}
	})
}

// Sessions are spread evenly, and a member that comes takes its share only.
func TestRingIsEven(t *testing.T) {
	const keys = 20_000
	for _, nodes := range []int{2, 3, 5, 10} {
		before, after := groupOf(nodes, 1), groupOf(nodes+1, 1)
		load := map[uint64]int{}
		moved := 0
		for i := range keys {
			d := key(i).Digest()
			a, b := before.ring(d, 1, nil)[0], after.ring(d, 1, nil)[0]
			load[a]++
			if a != b {
				moved++
				if b != uint64(nodes+1) {
					t.Fatalf("a session moved from %d to %d, and neither is new", a, b)
				}
			}
		}
		for node, n := range load {
			if share := float64(n) * float64(nodes) / keys; share < 0.93 || share > 1.07 {
				t.Errorf("%d nodes: node %d has %.3f of its share", nodes, node, share)
			}
		}
		if share := float64(moved) * float64(nodes+1) / keys; share < 0.9 || share > 1.1 {
			t.Errorf("%d nodes: a new one took %.3f of its share", nodes, share)
		}
	}
}

func TestPlaceRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := place{owner: owner{rapid.Uint64().Draw(t, "epoch"), rapid.Uint64().Draw(t, "node")}}
		for range rapid.IntRange(0, 5).Draw(t, "n") {
			in.add(holder{node: rapid.Uint64Min(1).Draw(t, "holder"), live: rapid.Bool().Draw(t, "live")})
		}
		var out place
		rest, err := parsePlace(append(appendPlace(nil, &in, 0, false), 7), &out)
		if err != nil || !bytes.Equal(rest, []byte{7}) || out.owner != in.owner || !slices.Equal(out.where, in.where) {
			t.Fatalf("%v, %v: %v became %v", err, rest, in, out)
		}
		whole := appendPlace(nil, &in, 0, false)
		for i := range whole {
			if _, err := parsePlace(whole[:i], &out); !errors.Is(err, errMalformed) {
				t.Fatalf("cut at %d of %d: %v", i, len(whole), err)
			}
		}
	})
	for _, b := range [][]byte{
		append(make([]byte, 9), 0xff, 0xff, 0xff, 0xff, 0x0f),                                     // 2^32-1 holders
		append(make([]byte, 9), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f), // too long a varint
	} {
		var p place
		if _, err := parsePlace(b, &p); !errors.Is(err, errMalformed) {
			t.Errorf("%x: %v", b, err)
		}
	}
}

func FuzzPlacement(f *testing.F) {
	pl := place{owner: owner{3, 4}, where: []holder{{node: 5, live: true}, {node: 6}}}
	f.Add(session.AppendBatch(appendPlace(nil, &pl, 9, true), whole(1, 5)))
	f.Add(session.AppendBatch(appendPlace(nil, &place{}, 0, false), end(1, session.Invalidated)))
	f.Fuzz(func(t *testing.T, b []byte) {
		it := items{b: b}
		var again []byte
		for it.next() {
			again = session.AppendBatch(appendPlace(again, &it.place, 0, false), it.d.Record())
		}
		if it.err != nil && !errors.Is(it.err, errMalformed) && !errors.Is(it.err, session.ErrBadRecord) {
			t.Fatal(it.err)
		}
		for it = (items{b: again}); it.next(); {
		}
		if it.err != nil {
			t.Fatalf("what was read cannot be read again: %v", it.err)
		}
	})
}

// FuzzPlacedMessage gives messages of any kind to a manager with placement.
func FuzzPlacedMessage(f *testing.F) {
	pl := place{owner: owner{3, 4}, where: []holder{{node: 5, live: true}, {node: 1}}}
	item := session.AppendBatch(appendPlace(nil, &pl, 9, true), whole(1, 5))
	f.Add(append(append(appendHeader(nil, kindDelta, 0), flagStrict), item...))
	for _, k := range []kind{kindRecords, kindPlace} {
		f.Add(append(appendHeader(nil, k, 5), item...))
	}
	f.Add(append(append(appendHeader(nil, kindFound, 5), 2), item...))
	f.Add(session.AppendBatch(append(appendHeader(nil, kindDrop, 0), make([]byte, 8)...), whole(1, 1)))
	f.Add(session.AppendBatch(appendHeader(nil, kindGone, 0), whole(1, 1)))
	f.Add(session.AppendBatch(append(appendHeader(nil, kindFetch, 1), flagTake), whole(1, 1)))
	c := testConfig()
	c.Copies = 1
	m, err := New("backup", c, channel.Settings{})
	if err != nil {
		f.Fatal(err)
	}
	m.host = discard{}
	var local, other channel.Member
	local.ID[0], other.ID[0] = 1, 2
	m.HandleView(f.Context(), channel.NewView(1, local, []channel.Member{other}))
	f.Cleanup(func() { _ = m.Stop(context.Background()) })
	f.Fuzz(func(t *testing.T, b []byte) {
		done := make(chan error, 2)
		m.HandleMessage(t.Context(), other, b, func(err error) { done <- err })
		<-done
		for {
			select {
			case job := <-m.jobs:
				job()
				continue
			case job := <-m.bulk:
				job()
				continue
			case <-done:
				t.Fatal("done was called twice")
			default:
			}
			return
		}
	})
}

// placedSim starts nodes with that many copies that see each other.
func placedSim(t *testing.T, s *sim, nodes, copies int) {
	s.cfg.Copies = copies
	for range nodes {
		s.add(s.cfg)
	}
	s.views(s.nodes...)
	pause(5 * time.Second)
	for _, n := range s.nodes {
		if st := n.status(); !st.Ready {
			t.Fatalf("node %d: %+v", n.index, st)
		}
	}
}

// holders are the nodes that have a session.
func (s *sim) holders(k session.Key) (list []int) {
	for _, n := range s.nodes {
		if n.m.store.has(k) {
			list = append(list, n.index)
		}
	}
	return list
}

// owners are the living nodes that say they own a session.
func (s *sim) owners(k session.Key, among ...*node) (list []int) {
	for _, n := range among {
		sh := n.m.store.shard(k)
		sh.mu.Lock()
		if p := sh.replicas[k]; p != nil && p.place.owner.node == nodeOf(n.member) {
			list = append(list, n.index)
		}
		sh.mu.Unlock()
	}
	return list
}

func TestCopiesAreSpread(t *testing.T) {
	for _, copies := range []int{1, 2} {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 5, copies)
			const n = 1000
			for i := range n {
				ok(t, s.nodes[i%5].commit(core.Synced, whole(i, 20)))
			}
			pause(10 * time.Second)
			s.placement(t)
			sum := 0
			for _, x := range s.nodes {
				st := x.status()
				sum += st.Sessions
				if share := float64(st.Sessions) * 5 / float64(n*(copies+1)); share < 0.85 || share > 1.15 {
					t.Errorf("%d copies: node %d has %.2f of its share", copies, x.index, share)
				}
				if st.Owned != n/5 {
					t.Errorf("node %d owns %d sessions", x.index, st.Owned)
				}
			}
			if sum != n*(copies+1) {
				t.Errorf("%d copies: %d sessions are kept %d times", copies, n, sum)
			}
		})
	}
}

// When the owner dies somebody takes over, and the missing copies are made on
// other nodes within recreate_after and the time that takes.
func TestPromotion(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		placedSim(t, s, 4, 1)
		const n = 300
		for i := range n {
			ok(t, s.nodes[i%4].commit(core.Synced, whole(i, 20)))
		}
		dead, alive := s.nodes[1], s.nodes[:1:1]
		alive = append(alive, s.nodes[2:]...)
		s.setCut(func(a, b int) bool { return a == 1 || b == 1 })
		s.views(alive...)
		pause(s.cfg.RecreateAfter + 2*time.Second)
		sum := 0
		for _, x := range alive {
			sum += x.status().Sessions
		}
		if sum != 2*n {
			t.Errorf("%d of %d copies", sum, 2*n)
		}
		for i := range n {
			if o := s.owners(key(i), alive...); len(o) != 1 {
				t.Errorf("session %d has the owners %v", i, o)
			}
		}
		// And the second one dies: still nothing is lost.
		s.setCut(func(a, b int) bool { return a < 2 || b < 2 })
		s.views(alive[1:]...)
		for i := range n {
			if v := value(alive[1+i%2].load(key(i)), "blob"); len(v) != 20 {
				t.Errorf("session %d: %q", i, v)
			}
		}
		_ = dead
	})
}

// A request on another node moves the session there; that is told to all.
func TestOwnershipMoves(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		placedSim(t, s, 5, 1)
		for i := range 50 {
			a, b := s.nodes[i%5], s.nodes[(i+2)%5]
			ok(t, a.commit(core.Synced, whole(i, 5)))
			if v := value(b.load(key(i)), "blob"); len(v) != 5 {
				t.Fatalf("session %d: %q", i, v)
			}
			// The first one still uses it: both hear of each other's changes.
			ok(t, a.commit(core.Synced, change(i, "a", "1", 2, 1)))
			if v := value(b.update(key(i)), "a"); v != "1" {
				t.Fatalf("session %d: b was not told: %q", i, v)
			}
			ok(t, b.commit(core.Synced, change(i, "b", "1", 3, 2)))
			if v := value(a.update(key(i)), "b"); v != "1" {
				t.Fatalf("session %d: a was not told: %q", i, v)
			}
			pause(time.Second)
			if o := s.owners(key(i), s.nodes...); !slices.Equal(o, []int{b.index}) {
				t.Errorf("session %d is owned by %v, want %d", i, o, b.index)
			}
			ok(t, a.m.Release(t.Context(), []session.Key{key(i)}))
		}
		pause(20 * time.Second)
		s.placement(t)
	})
}

// SP-16: after a split two nodes own a session. The later move wins, or the
// greater node, and what both know is merged.
func TestTwoOwnersAfterASplit(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		placedSim(t, s, 4, 2)
		for i := range 40 {
			ok(t, s.nodes[0].commit(core.Synced, whole(i, 5)))
		}
		s.setCut(func(a, b int) bool { return (a < 2) != (b < 2) })
		s.views(s.nodes...)
		pause(10 * time.Second)
		both := 0
		for i := range 40 {
			left, right := s.nodes[i%2], s.nodes[2+i%2]
			if left.load(key(i)) == nil || right.load(key(i)) == nil {
				continue
			}
			both++
			ok(t, left.commit(core.Synced, change(i, "left", "l", 2, 1)))
			ok(t, right.commit(core.Synced, change(i, "right", "r", 2, 3)))
			ok(t, left.commit(core.Synced, change(i, "both", "l", 3, 1)))
			ok(t, right.commit(core.Synced, change(i, "both", "r", 3, 3)))
			if o := s.owners(key(i), s.nodes...); len(o) != 2 {
				t.Errorf("session %d is owned by %v in the split", i, o)
			}
		}
		if both < 20 {
			t.Fatal("only", both, "sessions on both sides: the test has no force")
		}
		s.setCut(func(int, int) bool { return false })
		s.views(s.nodes...)
		pause(30 * time.Second)
		s.placement(t)
		for i := range 40 {
			for _, n := range s.nodes {
				r := n.load(key(i))
				if r == nil {
					t.Fatalf("node %d has lost session %d", n.index, i)
				}
				if _, has := r.Attrs["left"]; has && (value(r, "right") != "r" || value(r, "left") != "l" || value(r, "both") != "r") {
					t.Errorf("node %d, session %d: %q %q %q", n.index, i, value(r, "left"), value(r, "right"), value(r, "both"))
				}
			}
		}
	})
}

// A session that ended on one side of a split does not come back, wherever its
// copies are.
func TestPlacedTombstones(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		placedSim(t, s, 4, 1)
		for i := range 40 {
			ok(t, s.nodes[i%4].commit(core.Synced, whole(i, 5)))
			if s.nodes[(i+1)%4].load(key(i)) == nil {
				t.Fatal("lost")
			}
		}
		s.setCut(func(a, b int) bool { return (a < 2) != (b < 2) })
		s.views(s.nodes...)
		pause(10 * time.Second)
		for i := range 40 {
			ok(t, s.nodes[i%4].commit(core.Synced, end(i, session.Invalidated)))
			ok(t, s.nodes[(i+1)%4].commit(core.Synced, change(i, "late", "x", 5, 2)))
		}
		s.setCut(func(int, int) bool { return false })
		s.views(s.nodes...)
		pause(2 * time.Minute)
		for i := range 40 {
			for _, n := range s.nodes {
				if r := n.load(key(i)); r != nil {
					t.Errorf("session %d is back on node %d", i, n.index)
				}
			}
		}
	})
}

// SP-17: a change under the old id races with the change of the id.
func TestRenewRacesWithChange(t *testing.T) {
	for copies := range 2 {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 3, copies)
			for i := range 20 {
				old, fresh := 2*i, 2*i+1
				ok(t, s.nodes[0].commit(core.Synced, whole(old, 5)))
				s.nodes[1].load(key(old))
				renewed := end(old, session.Renewed)
				renewed.RenewedTo = key(fresh).ID
				done := make(chan error)
				go func() { done <- s.nodes[1].commit(core.Synced, change(old, "late", "x", 7, 2)) }()
				ok(t, s.nodes[0].commit(core.Synced, renewed, whole(fresh, 5)))
				ok(t, <-done)
				pause(time.Second)
				for _, n := range s.nodes {
					if r := n.load(key(old)); r == nil || r.End != session.Renewed || r.RenewedTo != key(fresh).ID {
						t.Errorf("copies %d, node %d, under the old id: %+v", copies, n.index, r)
					}
					if r := n.load(key(fresh)); r == nil || r.End != session.Living {
						t.Errorf("copies %d, node %d, under the new id: %+v", copies, n.index, r)
					}
				}
			}
		})
	}
}

// SP-03, 04, 19: the same session is made twice, a change comes after the end, and
// a change and the end come at the same time.
func TestTwiceLateAndAtOnce(t *testing.T) {
	for copies := range 3 {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 3, copies)
			a, b := s.nodes[0], s.nodes[1]
			ok(t, a.commit(core.Synced, whole(1, 5)))
			ok(t, b.commit(core.Synced, whole(1, 5)))
			pause(10 * time.Second)
			s.placement(t)
			for _, n := range s.nodes {
				if r := n.load(key(1)); r == nil || len(r.Attrs) != 1 {
					t.Errorf("made twice: node %d has %+v", n.index, r)
				}
			}
			done := make(chan error)
			go func() { done <- b.commit(core.Synced, change(1, "x", "y", 9, 2)) }()
			ok(t, a.commit(core.Synced, end(1, session.Expired)))
			ok(t, <-done)
			pause(time.Second)
			for range 3 { // late ones
				ok(t, b.commit(core.Synced, change(1, "x", "z", 10, 2)))
				pause(time.Second)
			}
			for _, n := range s.nodes {
				if r := n.load(key(1)); r != nil {
					t.Errorf("copies %d: node %d brought it back: %+v", copies, n.index, r)
				}
			}
			if u := b.update(key(1)); u == nil || u.End != session.Expired {
				t.Errorf("copies %d: the host was not told of the end: %+v", copies, u)
			}
		})
	}
}

// SP-12: an access in the future makes no copy live for ever.
func TestFutureAccess(t *testing.T) {
	for copies := range 2 {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 2, copies)
			future := whole(1, 5)
			future.LastAccess += (1000 * time.Hour).Milliseconds()
			ok(t, s.nodes[0].commit(core.Synced, future))
			ok(t, s.nodes[0].m.Release(t.Context(), []session.Key{key(1)}))
			pause(35 * time.Minute)
			for _, n := range s.nodes {
				if st := n.status(); st.Sessions != 0 || st.Owned != 0 {
					t.Errorf("copies %d: node %d still has %d sessions", copies, n.index, st.Sessions)
				}
			}
		})
	}
}

// A node that asks for a session that is nowhere gets the answer soon, and one
// whose copies cannot be asked is not said to be gone.
func TestLoadOfNothing(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		placedSim(t, s, 3, 1)
		start := time.Now()
		if r := s.nodes[0].load(key(99)); r != nil {
			t.Error(r)
		}
		if d := time.Since(start); d > 100*time.Millisecond {
			t.Error("took", d)
		}
		// Nobody answers, and nobody knows yet that they do not.
		ok(t, s.nodes[0].commit(core.Synced, whole(1, 5)))
		s.mu.Lock()
		s.drop = func(int, int, []byte) bool { return true }
		s.mu.Unlock()
		for i := 100; i < 110; i++ {
			start = time.Now()
			_, err := s.nodes[2].m.Load(t.Context(), key(i))
			if d := time.Since(start); d > 1100*time.Millisecond {
				t.Error("took", d)
			}
			if i == 100 && !errors.Is(err, errUnsure) {
				t.Error(err)
			}
		}
	})
}

// Copies go to another domain first.
func TestDomains(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		s.cfg.Copies = 1
		for i := range 4 {
			n := s.add(s.cfg)
			n.member.Domain = []string{"north", "south"}[i%2]
		}
		s.views(s.nodes...)
		pause(5 * time.Second)
		for i := range 200 {
			ok(t, s.nodes[i%4].commit(core.Synced, whole(i, 1)))
			h := s.holders(key(i))
			if len(h) != 2 || h[0]%2 == h[1]%2 {
				t.Errorf("session %d is on %v", i, h)
			}
		}
	})
}

// With domain_only nothing leaves the domain.
func TestDomainOnly(t *testing.T) {
	for copies := range 2 {
		bubble(t, func(t *testing.T, s *sim) {
			s.cfg.Copies, s.cfg.DomainOnly = copies, true
			for i := range 4 {
				n := s.add(s.cfg)
				n.member.Domain = []string{"north", "south"}[i%2]
			}
			s.views(s.nodes...)
			pause(5 * time.Second)
			for i := range 20 {
				ok(t, s.nodes[0].commit(core.Synced, whole(i, 1)))
				if h := s.holders(key(i)); !slices.Equal(h, []int{0, 2}) {
					t.Errorf("copies %d: session %d is on %v", copies, i, h)
				}
			}
		})
	}
}

// A member that does not run this manager gets no copies, and nobody waits for it.
func TestStranger(t *testing.T) {
	for copies := range 2 {
		bubble(t, func(t *testing.T, s *sim) {
			s.cfg.Copies = copies
			mute := func(from, to int, _ []byte) bool { return from == 2 || to == 2 }
			s.drop = mute
			for range 3 {
				s.add(s.cfg)
			}
			s.views(s.nodes...)
			pause(2 * s.cfg.StallTimeout)
			for _, n := range s.nodes[:2] {
				if st := n.status(); !st.Ready || strings.Contains(st.State, "answer") {
					t.Errorf("copies %d: %+v", copies, st)
				}
			}
			for i := range 20 {
				start := time.Now()
				ok(t, s.nodes[0].commit(core.Synced, whole(i, 1)))
				if d := time.Since(start); d > time.Second/2 && i > 0 {
					t.Errorf("copies %d: a commit took %v", copies, d)
				}
				if h := s.holders(key(i)); !slices.Equal(h, []int{0, 1}) {
					t.Errorf("copies %d: session %d is on %v", copies, i, h)
				}
			}
		})
	}
}

// A frozen member is put aside; its copies are made elsewhere; when it goes on it
// catches up.
func TestFrozen(t *testing.T) {
	for copies := range 2 {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 3, copies)
			for i := range 50 {
				ok(t, s.nodes[0].commit(core.Synced, whole(i, 5)))
			}
			s.freeze(1, true)
			longest := time.Duration(0)
			for i := range 50 {
				start := time.Now()
				ok(t, s.nodes[0].commit(core.Synced, change(i, "x", "during", 2, 1)))
				longest = max(longest, time.Since(start))
			}
			if longest > 1100*time.Millisecond {
				t.Errorf("copies %d: a commit took %v", copies, longest)
			}
			pause(5 * time.Second)
			for i := range 50 {
				if h := slices.DeleteFunc(s.holders(key(i)), func(n int) bool { return n == 1 }); len(h) != 2 {
					t.Errorf("copies %d: session %d is on %v without the frozen node", copies, i, h)
				}
			}
			s.freeze(1, false)
			pause(20 * time.Second)
			s.placement(t)
			for i := range 50 {
				if v := value(s.nodes[1].load(key(i)), "x"); v != "during" {
					t.Errorf("copies %d: session %d on the node that was frozen: %q", copies, i, v)
				}
			}
			if st := s.nodes[0].status(); strings.Contains(st.State, "answer") {
				t.Error(st.State)
			}
		})
	}
}

// A frozen member that the membership takes out and in again costs nobody a wait
// each time.
func TestFrozenComesAndGoes(t *testing.T) {
	for copies := range 2 {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 2, copies)
			a, b := s.nodes[0], s.nodes[1]
			s.freeze(1, true)
			ok(t, a.commit(core.Synced, whole(1, 5)))
			start := time.Now()
			for range 5 {
				a.version++
				a.m.HandleView(t.Context(), channel.NewView(a.version, a.member, nil))
				ok(t, a.commit(core.Synced, change(1, "x", "y", 2, 1)))
				a.version++
				a.m.HandleView(t.Context(), channel.NewView(a.version, a.member, []channel.Member{b.member}))
				ok(t, a.commit(core.Synced, change(1, "x", "z", 3, 1)))
			}
			if d := time.Since(start); d > 100*time.Millisecond {
				t.Errorf("copies %d: %v of waiting", copies, d)
			}
			s.freeze(1, false)
			pause(20 * time.Second)
			if v := value(b.load(key(1)), "x"); v != "z" {
				t.Errorf("copies %d: the frozen node has %q", copies, v)
			}
		})
	}
}

// A state transfer that fails keeps a node unready if that is wanted.
func TestNeedStart(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		s.cfg.Copies, s.cfg.NeedStart, s.cfg.StateTransferTimeout = 1, true, 10*time.Second
		a := s.add(s.cfg)
		pause(2 * time.Second)
		ok(t, a.commit(core.Async, whole(1, 1)))
		b := s.add(s.cfg)
		s.mu.Lock()
		s.drop = func(from, _ int, body []byte) bool { return from == 0 && kind(body[1]) == kindAnswer }
		s.mu.Unlock()
		s.views(a, b)
		pause(30 * time.Second)
		if st := b.status(); st.Ready || !strings.Contains(st.State, "receiving") && !strings.Contains(st.State, "not started") {
			t.Errorf("%+v", st)
		}
		s.mu.Lock()
		s.drop = nil
		s.mu.Unlock()
		pause(time.Minute)
		if st := b.status(); !st.Ready || st.Sessions != 1 {
			t.Errorf("%+v", st)
		}
	})
}

// A joining node asks all members with complete state at once.
func TestParallelTransfer(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		for range 3 {
			s.add(testConfig())
		}
		s.views(s.nodes...)
		pause(5 * time.Second)
		for i := range 2000 {
			ok(t, s.nodes[0].commit(core.Synced, whole(i, 500)))
		}
		var from [3]int
		s.mu.Lock()
		s.drop = func(x, y int, body []byte) bool {
			if y == 3 && kind(body[1]) == kindRecords {
				from[x]++
			}
			return false
		}
		s.mu.Unlock()
		c := s.add(testConfig())
		s.views(s.nodes...)
		pause(20 * time.Second)
		if st := c.status(); !st.Ready || st.Sessions != 2000 || st.Received != 2000 || !strings.Contains(st.State, "from 3 members") {
			t.Errorf("%+v", st)
		}
		for i, n := range from {
			if n == 0 {
				t.Errorf("node %d gave nothing: %v", i, from)
			}
		}
	})
}

// The memory of a node grows with its share of the sessions.
func TestPlacedMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector has its own memory")
	}
	const n = 20_000
	c := testConfig()
	c.Copies = 1
	m, err := New("backup", c, channel.Settings{})
	ok(t, err)
	m.host = discard{}
	var local, other channel.Member
	local.ID[0], other.ID[0] = 1, 2
	m.HandleView(t.Context(), channel.NewView(1, local, []channel.Member{other}))
	defer func() { ok(t, m.Stop(context.Background())) }()
	for _, size := range []int{100, 1024} {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for i := range n {
			if err := m.Commit(t.Context(), session.AppendBatch(nil, whole(size*n+i, size)), core.Async); err != nil {
				t.Fatal(err)
			}
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		per := (int(after.HeapAlloc) - int(before.HeapAlloc)) / n
		t.Logf("%d bytes of memory per session of %d bytes", per, size)
		if per > size*3/2+400 {
			t.Errorf("%d bytes of memory per session of %d bytes", per, size)
		}
	}
}

func BenchmarkCommitPlaced(b *testing.B) {
	for _, batch := range []int{1, 40} {
		b.Run(fmt.Sprint(batch), func(b *testing.B) {
			c := testConfig()
			c.Copies = 1
			m, err := New("backup", c, channel.Settings{})
			if err != nil {
				b.Fatal(err)
			}
			m.host = discard{}
			var local, other channel.Member
			local.ID[0], other.ID[0] = 1, 2
			m.HandleView(b.Context(), channel.NewView(1, local, []channel.Member{other}))
			m.mu.Lock()
			m.peers[other.ID].hello = true
			m.regroup()
			m.mu.Unlock()
			defer func() { _ = m.Stop(context.Background()) }()
			var rs []*session.Record
			for i := range batch {
				if err := m.Commit(b.Context(), session.AppendBatch(nil, whole(i, 512)), core.Async); err != nil {
					b.Fatal(err)
				}
				rs = append(rs, change(i, "blob", strings.Repeat("x", 100), 2, 1))
			}
			body := session.AppendBatch(nil, rs...)
			b.ReportAllocs()
			for b.Loop() {
				if err := m.Commit(b.Context(), body, core.Async); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/record")
		})
	}
}

// After its process was stopped for a while a node asks before it answers, and
// then catches up.
func TestSlept(t *testing.T) {
	for copies := range 2 {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 2, copies)
			a, b := s.nodes[0], s.nodes[1]
			ok(t, a.commit(core.Synced, whole(1, 5), whole(2, 5)))
			s.mu.Lock()
			s.drop = func(_, _ int, body []byte) bool { return kind(body[1]) == kindDelta }
			s.mu.Unlock()
			ok(t, a.commit(core.Async, change(1, "x", "missed", 2, 1), end(2, session.Invalidated)))
			pause(time.Second)
			b.m.slept(time.Now())
			if v := value(b.load(key(1)), "x"); v != "missed" {
				t.Errorf("copies %d: just awake: %q", copies, v)
			}
			if r := b.load(key(2)); r != nil {
				t.Errorf("copies %d: just awake, and it has not heard of the end", copies)
			}
			b.m.wake()
			pause(10 * time.Second)
			if b.m.behind() {
				t.Errorf("copies %d: still behind", copies)
			}
		})
	}
}

// SP-05, 06, 07, 09, 10: messages that no node sends are refused, counted once
// each, and leave nothing behind.
func TestHostileMessages(t *testing.T) {
	item := func(record []byte) []byte {
		pl := place{owner: owner{1, 2}, where: []holder{{node: 2}}}
		return append(appendPlace(nil, &pl, 3, true), record...)
	}
	good := session.AppendBatch(nil, whole(1, 5))
	named := func(name string) []byte {
		r := whole(1, 1)
		r.Attrs[name] = session.Entry{Value: []byte{1}}
		return session.AppendBatch(nil, r)
	}
	huge := whole(1, 1)
	huge.Attrs["blob"] = session.Entry{Value: make([]byte, 100<<20)}
	many := session.AppendBatch(nil, &session.Record{Key: key(1)})
	many = many[: len(many)-1 : len(many)-1]
	deep := append(slices.Clone(good), bytes.Repeat([]byte{0x81}, 10_000)...)
	deep[0]++ // one field more, nested deep
	records := map[string][]byte{
		"empty name":       named(""),
		"name of 1 MB":     named(strings.Repeat("x", 1<<20)),
		"name not UTF-8":   named("\xff"),
		"nested deep":      deep,
		"-1 attributes":    append(many, 0x20),
		"2^31 attributes":  append(many, 0x9a, 0x7f, 0xff, 0xff, 0xff),
		"session of 100MB": session.AppendBatch(nil, huge),
		"cut off":          good[:len(good)-1],
	}
	for copies := range 2 {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 2, copies)
			a, b := s.nodes[0], s.nodes[1]
			sent := int64(0)
			send := func(name string, body []byte) {
				t.Helper()
				var got error
				calls := 0
				b.m.HandleMessage(t.Context(), a.member, body, func(err error) { got, calls = err, calls+1 })
				if sent++; calls != 1 || got == nil {
					t.Errorf("copies %d, %s: done %d times, %v", copies, name, calls, got)
				}
				if n := b.m.m.malformed.Value(); n != sent {
					t.Errorf("copies %d, %s: counted %d times", copies, name, n-sent+1)
					sent = n
				}
			}
			for name, r := range records {
				body := appendHeader(nil, kindDelta, 0)
				if copies > 0 {
					body = append(append(body, 0), item(r)...)
				} else {
					body = append(body, r...)
				}
				send(name, body)
				if err := b.m.Commit(t.Context(), r, core.Async); !errors.Is(err, session.ErrBadRecord) {
					t.Errorf("copies %d, %s: committed: %v", copies, name, err)
				}
				sent++
			}
			send("unknown kind", appendHeader(nil, lastKind+1, 0))
			send("kind 255", appendHeader(nil, 255, 0))
			send("bad prove", append(appendHeader(nil, kindProve, 1), 0xff))
			send("bad proof", append(appendHeader(nil, kindProof, 1), 1, 2, 3))
			if copies > 0 {
				header := func(k kind, more ...byte) []byte { return append(appendHeader(nil, k, 0), more...) }
				send("no flags", appendHeader(nil, kindDelta, 0))
				send("placement only", append(append(appendHeader(nil, kindDelta, 0), 0), item(nil)...))
				send("2^31-1 holders", append(append(appendHeader(nil, kindDelta, 0), 0), append(make([]byte, 9), 0xff, 0xff, 0xff, 0xff, 0x07)...))
				send("bad place", header(kindPlace, 0xff))
				send("bad drop", header(kindDrop, 1, 2, 3))
				send("drop of nothing", header(kindDrop, 1, 2, 3, 4, 5, 6, 7, 8, 0xff))
				send("bad gone", header(kindGone, 0xff))
			}
			if st := b.status(); st.Sessions != 0 || st.Bytes != 0 || st.Owned != 0 {
				t.Errorf("copies %d: %+v", copies, st)
			}
		})
	}
}
