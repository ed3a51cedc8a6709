package replica

import (
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// everywhere asks a node for the whereabouts of all that it holds.
func everywhere(t *testing.T, n *node, copying bool) map[session.Key]core.Whereabouts {
	t.Helper()
	all := map[session.Key]core.Whereabouts{}
	for page, pages := 0, 1; page < pages; page++ {
		a, err := n.m.Where(t.Context(), core.WhereQuery{Page: page, Copy: copying})
		ok(t, err)
		pages = a.Pages
		for _, w := range a.Sessions {
			all[w.Key] = w
		}
	}
	return all
}

// Only the answer of a holder counts: what a cut link keeps from another member
// is nowhere else, whatever was sent; copies are made on request.
func TestWhere(t *testing.T) {
	for _, copies := range []int{0, 1} {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 3, copies)
			const n = 60
			for i := range n {
				ok(t, s.nodes[0].commit(core.Synced, whole(i, 20)))
			}
			holders := map[int]int{0: 2, 1: 1}[copies]
			for k, w := range everywhere(t, s.nodes[0], false) {
				if len(w.Holders) != holders || w.Content == 0 || w.Content == contentEnded {
					t.Errorf("copies %d: %v is said to be %+v", copies, k, w)
				}
			}
			// A change that reaches nobody.
			s.setCut(func(int, int) bool { return true })
			changed := whole(1, 20)
			changed.Created = 0
			for name, e := range changed.Attrs {
				e.Version.Counter += 5
				changed.Attrs[name] = e
			}
			ok(t, s.nodes[0].commit(core.Async, changed))
			if w := everywhere(t, s.nodes[0], false); len(w) != n || len(w[key(2)].Holders) != 0 {
				t.Errorf("copies %d: %d sessions, cut off, %+v", copies, len(w), w[key(2)])
			}
			s.setCut(func(int, int) bool { return false })
			a, err := s.nodes[0].m.Where(t.Context(), core.WhereQuery{Keys: []session.Key{key(1), key(2), key(n)}})
			ok(t, err)
			if w := a.Sessions; len(w) != 3 || len(w[0].Holders) != 0 || len(w[1].Holders) != holders || w[2].Content != 0 || len(w[2].Holders) != 0 {
				t.Errorf("copies %d: after the link is back: %+v", copies, w)
			}
			a, err = s.nodes[0].m.Where(t.Context(), core.WhereQuery{Keys: []session.Key{key(1)}, Copy: true})
			ok(t, err)
			if w := a.Sessions[0]; len(w.Holders) == 0 {
				t.Errorf("copies %d: after copying: %+v", copies, w)
			}
		})
	}
}

// Members that are going, too, are no holders: who is left gets the sessions that
// only they have.
func TestWhereGoing(t *testing.T) {
	for _, copies := range []int{0, 1} {
		bubble(t, func(t *testing.T, s *sim) {
			placedSim(t, s, 3, copies)
			const n = 40
			var keys []session.Key
			for i := range n {
				ok(t, s.nodes[0].commit(core.Synced, whole(i, 20)))
				keys = append(keys, key(i))
			}
			q := core.WhereQuery{Keys: keys, Going: []channel.UniqueID{s.nodes[1].member.ID}}
			for range 2 {
				a, err := s.nodes[0].m.Where(t.Context(), q)
				ok(t, err)
				left := 0
				for _, w := range a.Sessions {
					switch {
					case len(w.Holders) == 0:
						left++
					case len(w.Holders) != 1 || w.Holders[0] != s.nodes[2].member.Name():
						t.Errorf("copies %d: %+v", copies, w)
					}
				}
				if want := !q.Copy && copies == 1; (left > 0) != want {
					t.Errorf("copies %d, copy %t: %d sessions are left", copies, q.Copy, left)
				}
				q.Copy = true
			}
			q.Going = append(q.Going, s.nodes[2].member.ID)
			a, err := s.nodes[0].m.Where(t.Context(), q)
			ok(t, err)
			for _, w := range a.Sessions {
				if len(w.Holders) != 0 {
					t.Errorf("copies %d: nobody stays, but: %+v", copies, w)
				}
			}
		})
	}
}

// A member that is frozen is no holder, and is not waited for for ever.
func TestWhereFrozen(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		placedSim(t, s, 2, 0)
		ok(t, s.nodes[0].commit(core.Synced, whole(1, 20)))
		s.freeze(1, true)
		start := time.Now()
		if w := everywhere(t, s.nodes[0], false)[key(1)]; len(w.Holders) != 0 {
			t.Errorf("%+v", w)
		}
		if took := time.Since(start); took > 2*s.cfg.FetchTimeout {
			t.Errorf("it took %v", took)
		}
		s.freeze(1, false)
	})
}
