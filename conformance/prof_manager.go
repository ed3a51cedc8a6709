package conformance

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

func managerReplicates(t *T) {
	t.inGroup(3, func(t *T, g *group) {
		a, b, c := g.nodes[0], g.nodes[1], g.nodes[2]
		k := a.create(time.Hour)
		a.set(k, "cart", "1")
		b.expect(k, "after the first change", "cart=1 ")
		a.set(k, "cart", "2")
		a.set(k, "user", "eve")
		b.expect(k, "after a change of what it holds live", "cart=2 user=eve ")
		c.expect(k, "after three changes", "cart=2 user=eve ")
		b.set(k, "cart", "3")
		a.expect(k, "after a change elsewhere", "cart=3 user=eve ")
		a.with(k, core.Synced, func(h core.Handle) error { return h.Delete("user") })
		b.expect(k, "after a removal", "cart=3 ")
		c.expect(k, "after a removal", "cart=3 ")
		a.with(k, core.Synced, func(h core.Handle) error { return h.Invalidate() })
		for _, n := range g.nodes {
			n.expect(k, "after the end", "none")
		}
	})
}

// deltaRounds is how many requests each node serves at the same time.
const deltaRounds = 20

func managerConcurrentDeltas(t *T) {
	t.inGroup(3, func(t *T, g *group) {
		k := g.nodes[0].create(time.Hour)
		var load sync.WaitGroup
		for i, n := range g.nodes {
			load.Go(func() {
				for r := range deltaRounds {
					n.set(k, fmt.Sprintf("own%d", i), fmt.Sprint(r))
					n.set(k, "shared", fmt.Sprintf("%d/%d", i, r))
				}
			})
		}
		load.Wait()
		g.same([]session.Key{k})
		g.agree(k)
		for _, n := range g.nodes {
			n.with(k, core.Async, func(h core.Handle) error {
				for i := range g.nodes {
					var v string
					if ok, err := h.Get(fmt.Sprintf("own%d", i), &v); !ok || err != nil || v != fmt.Sprint(deltaRounds-1) {
						t.Errorf("%s: the attribute that only n%d changes is %q (%v)", n.name, i+1, v, err)
					}
				}
				return nil
			})
		}
	})
}

// same waits until all living nodes know the same of the sessions.
func (g *group) same(keys []session.Key) {
	g.t.Helper()
	nodes := g.alive()
	g.t.Eventually(g.t.span(5*time.Minute, 4*g.t.Timeouts.Event), func() error {
		for _, k := range keys {
			want := nodes[0].content(k)
			for _, n := range nodes[1:] {
				if got := n.content(k); got != want {
					return fmt.Errorf("%s has %q, %s has %q", nodes[0].name, want, n.name, got)
				}
			}
		}
		return nil
	})
}

// agree waits until all living managers hold the same of a session, whatever
// their nodes hold.
func (g *group) agree(k session.Key) {
	g.t.Helper()
	g.t.Eventually(g.t.span(5*time.Minute, 4*g.t.Timeouts.Event), func() error {
		first := ""
		for i, n := range g.alive() {
			r, err := n.manager.Load(g.t.Context(), k)
			if err != nil {
				return fmt.Errorf("%s: load: %w", n.name, err)
			}
			if got := describe(r); i == 0 {
				first = got
			} else if got != first {
				return fmt.Errorf("the manager of %s has %s, that of %s %s", g.alive()[0].name, first, n.name, got)
			}
		}
		return nil
	})
}

func managerFailover(t *T) {
	t.inGroup(3, func(t *T, g *group) {
		a, b, c := g.nodes[0], g.nodes[1], g.nodes[2]
		var keys []session.Key
		for i := range 10 {
			k := a.create(time.Hour)
			a.set(k, "n", "0")
			a.set(k, "n", fmt.Sprint(i))
			keys = append(keys, k)
		}
		g.kill(a)
		for i, k := range keys {
			heir := []*member{b, c}[i%2]
			heir.expect(k, "after the death of n1", fmt.Sprintf("n=%d ", i))
			heir.set(k, "went", "on")
			for _, n := range []*member{b, c} {
				n.expect(k, "after a change by the heir", fmt.Sprintf("n=%d went=on ", i))
			}
		}
	})
}

// transferSessions is what a joining node has to be given.
const transferSessions = 100

func managerJoinTransfer(t *T) {
	t.inGroup(2, func(t *T, g *group) {
		a, b := g.nodes[0], g.nodes[1]
		var keys []session.Key
		for i := range transferSessions {
			k := g.nodes[i%2].create(time.Hour)
			g.nodes[i%2].set(k, "n", fmt.Sprint(i))
			keys = append(keys, k)
		}
		stop := make(chan struct{})
		var load sync.WaitGroup
		last := make([]string, len(keys))
		load.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(hop):
				}
				v := fmt.Sprint("new", i)
				a.set(keys[i%len(keys)], "n", v)
				last[i%len(keys)] = v
			}
		})
		var c *member
		func() {
			defer load.Wait()
			defer close(stop)
			c = g.add()
			g.views(g.nodes)
			g.ready(c)
		}()
		for i, k := range keys {
			want := last[i]
			if want == "" {
				want = fmt.Sprint(i)
			}
			for _, n := range []*member{c, b} {
				n.expect(k, fmt.Sprintf("after the transfer, session %d", i), "n="+want+" ")
			}
		}
	})
}

func managerExpireOnce(t *T) {
	t.inGroup(3, func(t *T, g *group) {
		a, b, c := g.nodes[0], g.nodes[1], g.nodes[2]
		life := t.span(time.Minute, 2*time.Second)
		short := a.create(life)
		a.set(short, "n", "short")
		ended := a.create(time.Hour)
		a.set(ended, "n", "long")
		for _, n := range g.nodes {
			n.expect(ended, "at the beginning", "n=long ")
		}
		t.Eventually(life+t.span(time.Minute, 2*t.Timeouts.Event), func() error {
			if a.expired() == 0 {
				return errors.New("the session does not expire")
			}
			return nil
		})
		time.Sleep(t.span(5*time.Second, time.Second)) // the others are told
		for _, n := range g.nodes {
			n.expect(short, "after its time to live", "none")
		}
		if n := a.expired() + b.expired() + c.expired(); n != 1 {
			t.Errorf("the expiry was announced %d times in the group", n)
		}

		// A session ends on one side of a split and is used on the other.
		g.split([]*member{a}, []*member{b, c})
		a.with(ended, core.Synced, func(h core.Handle) error { return h.Invalidate() })
		// A manager with a place outside of the nodes may know of the end.
		b.with(ended, core.Synced, func(h core.Handle) error {
			if err := h.Set("n", "used after the end"); !errors.Is(err, session.ErrInvalid) {
				return err
			}
			return nil
		})
		if got := c.content(ended); got != "n=used after the end " && got != "n=long " && got != "none" {
			t.Errorf("on the other side of the split: %s has %q", c.name, got)
		}
		g.split(g.nodes)
		t.Eventually(t.span(5*time.Minute, 4*t.Timeouts.Event), func() error {
			for _, n := range g.nodes {
				if got := n.content(ended); got != "none" {
					return fmt.Errorf("%s still has the session that has ended: %q", n.name, got)
				}
				if r, err := n.manager.Load(t.Context(), ended); err != nil || describe(r) != "nothing" {
					return fmt.Errorf("the manager of %s still has the session that has ended: %s, %v", n.name, describe(r), err)
				}
			}
			return nil
		})
		for _, n := range g.nodes {
			n.expect(short, "after the split", "none")
		}
	})
}

// expired is how many sessions this node's table has declared expired.
func (n *member) expired() int64 { return n.table.Status().Expired }

func managerIDChange(t *T) {
	t.inGroup(3, func(t *T, g *group) {
		a, b, c := g.nodes[0], g.nodes[1], g.nodes[2]
		old := a.create(time.Hour)
		a.set(old, "user", "eve")
		b.expect(old, "before the change", "user=eve ") // holds it live
		var renewed session.Key
		a.with(old, core.Synced, func(h core.Handle) error {
			err := h.Renew()
			renewed = h.Key()
			return err
		})
		if renewed == old || renewed.ID == "" {
			t.Fatalf("the id has not changed")
		}
		for _, n := range g.nodes {
			n.expect(renewed, "under the new id", "user=eve ")
		}
		b.set(renewed, "user", "eve, logged in")
		for _, n := range []*member{a, c} {
			n.expect(renewed, "after a change under the new id", "user=eve, logged in ")
		}
		// The old id leads to the new one for a while, then nowhere.
		time.Sleep(t.span(5*time.Minute, 0))
		g.kill(a)
		for _, n := range []*member{b, c} {
			if t.Mode != core.Process {
				n.expect(old, "long after the change", "none")
			}
			n.expect(renewed, "after the death of n1", "user=eve, logged in ")
		}
	})
}

func managerChecks() []Check {
	return []Check{
		{
			ID: "manager/replicates", Profile: ProfileManager, Level: Must,
			Requirement: "An attribute that is set, replaced or removed on one node is seen on the others when the commit at level sync has returned.",
			Source:      "core.Manager: Commit, core.Synced; DESIGN §10.5",
			Run:         managerReplicates,
			Saboteurs:   managerSaboteurs(mistakeEarly, mistakeMute, mistakeFirst, mistakeKeepDeleted, mistakeNoTombstones),
		}, {
			ID: "manager/concurrent-deltas", Profile: ProfileManager, Level: Must, Features: []string{FeatureDelta},
			Requirement: "Requests that change one session on several nodes at the same time end in one state on all of them, and no attribute that only one node changes is lost.",
			Source:      "core/session: Record.Merge; DESIGN §5",
			Run:         managerConcurrentDeltas,
			Saboteurs:   managerSaboteurs(mistakeMute, mistakeLoses),
		}, {
			ID: "manager/failover", Profile: ProfileManager, Level: Must,
			Requirement: "After a node has died its sessions go on elsewhere with the state that was committed last.",
			Source:      "DESIGN §10.5",
			Run:         managerFailover,
			Saboteurs:   managerSaboteurs(mistakeAlone, mistakeFirst, mistakeForgetsDead),
		}, {
			ID: "manager/join-transfer", Profile: ProfileManager, Level: Must, Features: []string{FeatureStateTransfer},
			Requirement: "A node that joins gets all sessions before it says that it is ready, while writes continue, and none is stale.",
			Source:      "core.Manager: Start, Load; core.ManagerStatus.Ready",
			Run:         managerJoinTransfer,
			Saboteurs:   managerSaboteurs(mistakeNoTransfer, mistakeHalfTransfer, mistakeStaleTransfer),
		}, {
			ID: "manager/expire-once", Profile: ProfileManager, Level: Must,
			Requirement: "An expiry is announced once in the group, and a session that has ended never comes back after a split.",
			Source:      "DESIGN §10.6",
			Run:         managerExpireOnce,
			Saboteurs:   managerSaboteurs(mistakeNoTombstones, mistakeRevives),
		}, {
			ID: "manager/id-change", Profile: ProfileManager, Level: Must, Features: []string{FeatureIDChange},
			Requirement: "A session whose id was changed goes on under the new id on every node, and not under the old one.",
			Source:      "session.Session: Renew; core.Manager: Load",
			Run:         managerIDChange,
			Saboteurs:   managerSaboteurs(mistakeNoTombstones, mistakeAlone),
		},
	}
}
