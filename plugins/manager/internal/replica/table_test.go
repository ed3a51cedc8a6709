package replica

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// withTables gives every node a session table; the nodes see each other.
func withTables(t *testing.T, s *sim, n int, tc table.Config) {
	for range n {
		s.add(s.cfg)
	}
	pause(0)
	for _, x := range s.nodes {
		x.attach(t, tc)
	}
	s.views(s.nodes...)
	pause(5 * time.Second)
}

func (n *node) attach(t *testing.T, tc table.Config) {
	tc.Manager = core.Forwarding(plug{n: n}, n.Send)
	n.table = table.New(tc, channel.Settings{})
	ok(t, n.table.Start(t.Context(), uint64(n.index+1)))
}

func (s *sim) stopTables() {
	for _, n := range s.nodes {
		if n.table != nil {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			_ = n.table.Stop(ctx)
			cancel()
		}
	}
}

// attrs reads a session on a node as a request does; nil if there is none.
func (n *node) attrs(t *testing.T, k session.Key) map[string]int {
	t.Helper()
	h, err := n.table.Find(t.Context(), k)
	ok(t, err)
	if h == nil {
		return nil
	}
	defer h.Release()
	m := map[string]int{}
	for _, name := range h.Names() {
		m[name], _, err = session.Attr[int](name).Get(h)
		ok(t, err)
	}
	return m
}

// placement checks that every session has exactly one owner, that all agree who
// it is, and that it has its copies and no more, apart from nodes that use it.
func (s *sim) placement(t *testing.T) {
	t.Helper()
	if s.cfg.Copies == 0 {
		return
	}
	type found struct {
		owners []uint64
		by     map[int]owner
		held   map[int]bool
	}
	all := map[session.Key]*found{}
	for _, n := range s.nodes {
		owned := 0
		for i := range n.m.store.shards {
			sh := &n.m.store.shards[i]
			sh.mu.Lock()
			for k, p := range sh.replicas {
				f := all[k]
				if f == nil {
					f = &found{by: map[int]owner{}, held: map[int]bool{}}
					all[k] = f
				}
				f.by[n.index], f.held[n.index] = p.place.owner, p.held
				if p.place.owner.node == nodeOf(n.member) {
					f.owners = append(f.owners, nodeOf(n.member))
					owned++
				}
			}
			sh.mu.Unlock()
		}
		if got := n.status().Owned; got != owned {
			t.Errorf("node %d says that it owns %d sessions, and owns %d", n.index, got, owned)
		}
	}
	for k, f := range all {
		if len(f.owners) != 1 {
			t.Errorf("session %s has the owners %v: %v", session.Prefix(k.ID), f.owners, f.by)
			continue
		}
		group := s.nodes[0].m.group.Load()
		want := group.copies(k.Digest(), f.owners[0], s.cfg.Copies, nil)
		for _, n := range s.nodes {
			node := nodeOf(n.member)
			o, has := f.by[n.index]
			switch {
			case has && o.node != f.owners[0]:
				t.Errorf("session %s: node %d takes %x for the owner: %v", session.Prefix(k.ID), n.index, o.node, f.by)
			case !has && slices.Contains(want, node):
				t.Errorf("session %s: node %d lacks its copy", session.Prefix(k.ID), n.index)
			case has && node != f.owners[0] && !slices.Contains(want, node) && !f.held[n.index]:
				t.Errorf("session %s: node %d has a copy for nothing", session.Prefix(k.ID), n.index)
			}
		}
	}
}

// With synchronous commits no acknowledged change is lost when the node dies.
func TestNoAcknowledgedChangeIsLost(t *testing.T) {
	for copies := range 3 {
		t.Run(fmt.Sprint(copies), func(t *testing.T) { noAcknowledgedChangeIsLost(t, copies) })
	}
}

func noAcknowledgedChangeIsLost(t *testing.T, copies int) {
	for seed := range uint64(20) {
		bubble(t, func(t *testing.T, s *sim) {
			s.cfg.Copies = copies
			r := rand.New(rand.NewPCG(seed, 1))
			defer s.stopTables()
			withTables(t, s, 3, table.Config{})
			a, b := s.nodes[0], s.nodes[1]
			h, err := a.table.Create(t.Context(), "ctx", session.NewOptions{MaxInactive: time.Hour})
			ok(t, err)
			k := h.Key()
			var acked [4]int
			var dead atomic.Bool
			var wg sync.WaitGroup
			for w := range acked { // parallel requests of one session
				wg.Go(func() {
					for i := 1; ; i++ {
						g, err := a.table.Find(context.Background(), k)
						if err != nil || g == nil {
							return
						}
						err = errors.Join(g.Set(fmt.Sprint("n", w), i), g.Commit(context.Background(), core.Synced))
						g.Release()
						if err != nil || dead.Load() { // a dead node acknowledges nothing
							return
						}
						acked[w] = i
					}
				})
			}
			time.Sleep(time.Duration(r.IntN(200_000)) * time.Microsecond)
			dead.Store(true)
			s.setCut(func(x, y int) bool { return x == 0 || y == 0 })
			wg.Wait()
			s.views(b, s.nodes[2])
			for _, n := range s.nodes[1:] {
				got := n.attrs(t, k)
				for w, i := range acked {
					if got[fmt.Sprint("n", w)] < i {
						t.Errorf("seed %d, node %d: %d acknowledged, found %v", seed, n.index, acked, got)
					}
				}
			}
		})
	}
}

var seeds = flag.Int("seeds", 2, "how many histories TestRandomWork plays for each number of copies")

// TestRandomWork lets users come to any node, with splits and killed managers in
// between, and proves in the end that all nodes agree, that what was not in
// conflict is there, and that nothing that was ended lives.
func TestRandomWork(t *testing.T) {
	for copies := range 3 {
		for seed := range uint64(*seeds) {
			t.Run(fmt.Sprintf("copies %d seed %d", copies, seed), func(t *testing.T) {
				bubble(t, func(t *testing.T, s *sim) {
					if s.cfg.Copies = copies; copies > 0 {
						s.cfg.SyncInterval = 20 * time.Second
					}
					randomWork(t, s, seed)
				})
			})
		}
	}
}

func randomWork(t *testing.T, s *sim, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 7))
	defer s.stopTables()
	withTables(t, s, 5, table.Config{IdleRelease: 20 * time.Second})
	var keys []session.Key
	ended := map[session.Key]bool{}
	// written is the last value of attributes that only one node writes. In a
	// split a node may find an older copy of the session, and write with a lower
	// version than before: one of both values stays then.
	written := map[session.Key]map[string][]int{}
	for step := range 600 {
		n := s.nodes[r.IntN(5)]
		switch what := r.IntN(100); {
		case what < 10 || len(keys) == 0:
			h, err := n.table.Create(t.Context(), "ctx", session.NewOptions{MaxInactive: time.Hour})
			ok(t, err)
			keys = append(keys, h.Key())
			written[h.Key()] = map[string][]int{}
			h.Release()
		case what < 80:
			k := keys[r.IntN(len(keys))]
			h, err := n.table.Find(t.Context(), k)
			if errors.Is(err, errUnsure) {
				continue // nobody can be asked just now: better than to say that there is none
			}
			ok(t, err)
			if h == nil {
				continue
			}
			name := fmt.Sprint("from", n.index)
			before, _, err := session.Attr[int](name).Get(h)
			ok(t, err)
			if last := written[k][name]; len(last) == 0 || last[len(last)-1] == before {
				written[k][name] = []int{step}
			} else {
				written[k][name] = append(last, step)
			}
			ok(t, h.Set(name, step))
			ok(t, h.Set("common", step))
			if r.IntN(2) == 0 {
				_ = h.Commit(t.Context(), core.Level(r.IntN(3))) // may fail in a split: it is kept
			}
			h.Release()
		case what < 84:
			k := keys[r.IntN(len(keys))]
			if h, _ := n.table.Find(t.Context(), k); h != nil {
				ok(t, h.Invalidate())
				ended[k] = true
				h.Release()
			}
		case what < 86: // the group splits, or comes together
			at := r.IntN(5)
			s.setCut(func(a, b int) bool { return (a < at) != (b < at) })
			s.views(s.nodes...)
		case what < 88: // a manager's process dies
			// One fault at a time: after another one, or during a change of
			// the group, it may have the only copy that can be reached.
			pause(10 * time.Second)
			ok(t, n.m.Stop(t.Context()))
			n.start(s.cfg)
			s.views(s.nodes...)
			pause(10 * time.Second)
		default:
			pause(time.Duration(r.IntN(5000)) * time.Millisecond)
		}
	}
	s.setCut(func(int, int) bool { return false })
	s.views(s.nodes...)
	pause(4 * time.Minute)
	s.placement(t)
	for i, k := range keys {
		first := s.nodes[0].attrs(t, k)
		for _, n := range s.nodes[1:] {
			if got := n.attrs(t, k); !maps.Equal(got, first) || (got == nil) != (first == nil) {
				t.Errorf("session %d: node %d has %v, node 0 has %v", i, n.index, got, first)
			}
		}
		if ended[k] {
			if first != nil {
				t.Errorf("session %d came back: %v", i, first)
			}
			continue
		}
		for name, v := range written[k] {
			if !slices.Contains(v, first[name]) {
				t.Errorf("session %d: %s is %d, want one of %d (has %v)", i, name, first[name], v, slices.Sorted(maps.Keys(first)))
			}
		}
	}
	pause(time.Minute)
	s.placement(t)
	if len(ended) == 0 || len(ended) == len(keys) {
		t.Error("the test has no force:", len(keys), "sessions,", len(ended), "ended")
	}
}

// plug is the manager that a table keeps while processes come and go.
type plug struct {
	core.Manager
	n *node
}

func (p plug) get() *Manager {
	p.n.sim.mu.Lock()
	defer p.n.sim.mu.Unlock()
	return p.n.m
}

func (p plug) Commit(ctx context.Context, b []byte, l core.Level) error {
	return p.get().Commit(ctx, b, l)
}

func (p plug) Forward(ctx context.Context, b []byte, l core.Level) (core.Forward, error) {
	return p.get().Forward(ctx, b, l)
}

func (p plug) Load(ctx context.Context, k session.Key) (*session.Record, error) {
	for {
		r, err := p.get().Load(ctx, k)
		if !errors.Is(err, errStopped) {
			return r, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (p plug) Release(ctx context.Context, keys []session.Key) error {
	return p.get().Release(ctx, keys)
}
