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
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// bubble runs f with an empty sim in virtual time.
func bubble(t *testing.T, f func(t *testing.T, s *sim)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := newSim(t)
		defer s.stop()
		f(t, s)
	})
}

func pause(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAlone(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		n := s.add(testConfig())
		if n.status().Ready {
			t.Error("ready before it has looked around")
		}
		pause(1100 * time.Millisecond)
		if st := n.status(); !st.Ready || st.State != "nobody to ask for sessions" {
			t.Errorf("%+v", st)
		}
		ok(t, n.commit(core.Synced, whole(1, 10)))
		if r := n.load(key(1)); r == nil || len(r.Attrs) != 1 {
			t.Errorf("%+v", r)
		}
		if n.load(key(2)) != nil {
			t.Error("found what is not there")
		}
	})
}

func TestCommitReachesAll(t *testing.T) {
	for _, level := range []core.Level{core.Async, core.Acked, core.Synced} {
		t.Run(level.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, s *sim) {
				a, b, c := s.add(testConfig()), s.add(testConfig()), s.add(testConfig())
				s.views(a, b, c)
				pause(5 * time.Second)
				ok(t, a.commit(level, whole(1, 10), whole(2, 10)))
				if level == core.Synced {
					for _, n := range s.nodes {
						if n.status().Sessions != 2 {
							t.Error("synced, but not everywhere")
						}
					}
				}
				pause(time.Second)
				if v := value(b.load(key(1)), "blob"); len(v) != 10 {
					t.Error(v)
				}
				ok(t, b.commit(level, change(1, "x", "from b", 2, 2)))
				pause(time.Second)
				if v := value(a.update(key(1)), "x"); v != "from b" {
					t.Error("the host was not told:", v)
				}
				if c.update(key(1)) != nil {
					t.Error("a host was told of a session that it does not hold")
				}
				ok(t, a.m.Release(t.Context(), []session.Key{key(1)}))
				ok(t, b.commit(level, change(1, "y", "z", 3, 2)))
				pause(time.Second)
				if v := value(a.update(key(1)), "y"); v != "<not set>" {
					t.Error("told after release:", v)
				}
			})
		})
	}
}

func TestFaultyMembers(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b, c := s.add(testConfig()), s.add(testConfig()), s.add(testConfig())
		s.views(a, b, c)
		pause(5 * time.Second)
		s.setCut(func(x, y int) bool { return x == 2 || y == 2 })
		// The dead member leaves the view in time: success.
		done := make(chan error)
		go func() { done <- a.commit(core.Synced, whole(1, 1)) }()
		time.Sleep(time.Second)
		s.views(a, b)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if b.status().Sessions != 1 {
			t.Error("the others do not have it")
		}
		// It comes back, stays, and cannot be reached: it is put aside.
		a.m.HandleView(t.Context(), channel.NewView(99, a.member, []channel.Member{b.member, c.member}))
		start := time.Now()
		if err := a.commit(core.Synced, whole(2, 1)); err != nil || time.Since(start) > 1100*time.Millisecond {
			t.Error(err, "after", time.Since(start))
		}
		start = time.Now()
		if err := a.commit(core.Synced, whole(4, 1)); err != nil || time.Since(start) > 10*time.Millisecond {
			t.Error(err, "after", time.Since(start), "although it is aside")
		}
		if st := a.status(); !strings.HasSuffix(st.State, "; one member does not answer") {
			t.Error(st.State)
		}
		ok(t, a.commit(core.Async, whole(3, 1)))
		// And when the link is back, it gets what it has missed.
		s.setCut(func(int, int) bool { return false })
		pause(time.Minute)
		if c.fingerprint() != a.fingerprint() || c.status().Sessions != 4 {
			t.Error("not repaired:", c.status().Sessions)
		}
	})
}

// When the queues of the channel are full, the table has to slow down: it is
// told, and no exchange makes the load worse.
func TestQueueFull(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b := s.add(testConfig()), s.add(testConfig())
		s.views(a, b)
		pause(5 * time.Second)
		s.mu.Lock()
		s.full = true
		clear(s.sent)
		s.mu.Unlock()
		if err := a.commit(core.Async, whole(1, 1)); !errors.Is(err, channel.ErrQueueFull) {
			t.Error(err)
		}
		pause(time.Minute)
		if s.sent[kindDelta]+s.sent[kindDigest] != 0 {
			t.Error("sent meanwhile:", s.sent)
		}
		s.mu.Lock()
		s.full = false
		s.mu.Unlock()
		ok(t, a.commit(core.Async, whole(1, 1)))
		pause(time.Second)
		if b.status().Sessions != 1 {
			t.Error("not arrived")
		}
	})
}

func TestJoin(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b := s.add(testConfig()), s.add(testConfig())
		s.views(a, b)
		pause(5 * time.Second)
		const n = 5000
		for i := range n {
			ok(t, a.commit(core.Async, whole(i, 500)))
			if i%500 == 0 {
				pause(time.Second)
			}
		}
		ok(t, b.commit(core.Async, end(7, session.Invalidated)))
		pause(time.Minute)
		c := s.add(testConfig())
		s.views(a, b, c)
		if c.status().Ready {
			t.Error("ready at once")
		}
		// Changes go on meanwhile, and a session is asked for.
		ok(t, a.commit(core.Async, change(8, "late", "yes", 2, 1), whole(n, 1)))
		if v := value(c.load(key(9)), "blob"); len(v) != 500 {
			t.Error("load while joining:", v)
		}
		if c.load(key(7)) != nil || c.load(key(n+1)) != nil {
			t.Error("loaded what is not there")
		}
		pause(20 * time.Second)
		st := c.status()
		if !st.Ready || st.Sessions != n || st.Tombstones != 1 || st.Received < n-100 || st.Transfer <= 0 {
			t.Errorf("%+v", st)
		}
		if !strings.HasPrefix(st.State, "received ") {
			t.Error(st.State)
		}
		if a.fingerprint() != c.fingerprint() || a.fingerprint() != b.fingerprint() {
			t.Error("not equal")
		}
		if v := value(c.load(key(8)), "late"); v != "yes" {
			t.Error(v)
		}
	})
}

func TestJoinSurvivesDonor(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b := s.add(testConfig()), s.add(testConfig())
		s.views(a, b)
		pause(5 * time.Second)
		for i := range 3000 {
			ok(t, b.commit(core.Synced, whole(i, 1000)))
		}
		s.mu.Lock()
		s.delay = 100 * time.Millisecond
		s.mu.Unlock()
		c := s.add(testConfig())
		s.views(a, b, c)
		time.Sleep(350 * time.Millisecond) // in the middle
		if st := c.status(); st.Ready || st.Sessions == 3000 {
			t.Errorf("too fast for this test: %+v", st)
		}
		s.setCut(func(x, y int) bool { return x == 0 || y == 0 })
		s.views(a, b, c)
		pause(30 * time.Second)
		if st := c.status(); !st.Ready || st.Sessions != 3000 {
			t.Errorf("%+v", st)
		}
	})
}

func TestJoinTimeout(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		cfg := testConfig()
		cfg.StateTransferTimeout = 20 * time.Second
		a := s.add(cfg)
		pause(2 * time.Second)
		ok(t, a.commit(core.Async, whole(1, 1)))
		b := s.add(cfg)
		deaf := func(from, to int, body []byte) bool { return from == 0 && kind(body[1]) == kindAnswer }
		s.mu.Lock()
		s.drop = deaf
		s.mu.Unlock()
		s.views(a, b)
		pause(15 * time.Second)
		if b.status().Ready {
			t.Error("ready too early")
		}
		pause(10 * time.Second)
		if st := b.status(); !st.Ready || !strings.Contains(st.State, "not complete after 20s") {
			t.Errorf("%+v", st)
		}
		s.mu.Lock()
		s.drop = nil
		s.mu.Unlock()
		pause(time.Minute)
		if a.fingerprint() != b.fingerprint() {
			t.Error("not caught up in the background")
		}
		for _, c := range []struct {
			limit time.Duration
			ready bool
		}{{0, true}, {-1, false}} {
			cfg.StateTransferTimeout = c.limit
			n := s.add(cfg)
			pause(100 * time.Millisecond)
			if st := n.status(); st.Ready != c.ready {
				t.Errorf("timeout %v: %+v", c.limit, st)
			}
		}
	})
}

func TestColdStart(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		for range 5 {
			s.add(testConfig())
		}
		s.views(s.nodes...)
		pause(3 * time.Second)
		for _, n := range s.nodes {
			if !n.status().Ready {
				t.Errorf("node %d: %+v", n.index, n.status())
			}
		}
	})
}

// TestSplit is the promise of the package: two halves go on, and come together
// again without losing changes or bringing anything back.
func TestSplit(t *testing.T) {
	began := time.Now()
	bubble(t, func(t *testing.T, s *sim) {
		for range 5 {
			s.add(testConfig())
		}
		s.views(s.nodes...)
		pause(5 * time.Second)
		left, right := s.nodes[0], s.nodes[4]
		for i := range 100 {
			ok(t, left.commit(core.Synced, whole(i, 20)))
		}
		s.setCut(func(a, b int) bool { return (a < 3) != (b < 3) })
		s.views(s.nodes...)
		for i := range 30 { // a minute of independent work
			ok(t, left.commit(core.Synced, change(i, "left", fmt.Sprint(i), 2, 1), whole(1000+i, 5)))
			ok(t, right.commit(core.Synced, change(i, "right", fmt.Sprint(i), 2, 5), whole(2000+i, 5)))
			ok(t, left.commit(core.Synced, change(i, "both", "l", 3, 1)))
			ok(t, right.commit(core.Synced, change(i, "both", "r", 3, 5)))
			pause(2 * time.Second)
		}
		ok(t, left.commit(core.Synced, end(50, session.Invalidated)))
		ok(t, right.commit(core.Synced, change(50, "zombie", "!", 9, 5)))
		ok(t, right.commit(core.Synced, end(51, session.Expired)))
		if left.fingerprint() == right.fingerprint() {
			t.Error("the split had no effect")
		}
		pause(20 * time.Minute) // tombstones must last longer than tombstone_ttl
		ok(t, right.commit(core.Synced, change(50, "zombie", "!!", 10, 5)))
		s.setCut(func(int, int) bool { return false })
		s.views(s.nodes...)
		pause(10 * time.Second)
		for _, n := range s.nodes {
			if n.fingerprint() != left.fingerprint() {
				t.Errorf("node %d differs: %+v", n.index, n.status())
			}
			for i := range 30 {
				r := n.load(key(i))
				if value(r, "left") != fmt.Sprint(i) || value(r, "right") != fmt.Sprint(i) || value(r, "both") != "r" {
					t.Fatalf("node %d, session %d: %+v", n.index, i, r)
				}
			}
			if n.load(key(50)) != nil || n.load(key(51)) != nil {
				t.Error("resurrected")
			}
			if n.load(key(1001)) == nil || n.load(key(2001)) == nil {
				t.Error("lost")
			}
		}
		if c := left.status().Conflicts; c < 30 {
			t.Error(c, "conflicts counted")
		}
		if l := left.status().LatestConflicts; len(l) < 30 || l[0].Attribute != "both" || len(l[0].ID) > 12 {
			t.Errorf("%d conflicts listed: %+v", len(l), l)
		}
	})
	if d := time.Since(began); d > time.Minute { // a second, where nothing else runs
		t.Error("took", d)
	}
}

// A healed pair compares once, not once from each side.
func TestExchangeOnce(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b := s.add(testConfig()), s.add(testConfig())
		s.views(a, b)
		pause(10 * time.Second)
		s.setCut(func(int, int) bool { return true })
		s.views(a, b)
		ok(t, a.commit(core.Synced, whole(1, 1)))
		ok(t, b.commit(core.Synced, whole(2, 1)))
		s.setCut(func(int, int) bool { return false })
		s.mu.Lock()
		clear(s.sent)
		s.mu.Unlock()
		s.views(a, b)
		pause(10 * time.Second)
		if a.fingerprint() != b.fingerprint() || s.sent[kindDigest] != 1 {
			t.Error(s.sent)
		}
	})
}

// A change that was lost on the way is found by the regular comparison.
func TestLostChange(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		cfg := testConfig()
		cfg.SyncInterval = 30 * time.Second
		a, b := s.add(cfg), s.add(cfg)
		s.views(a, b)
		pause(5 * time.Second)
		s.mu.Lock()
		s.drop = func(_, _ int, body []byte) bool { return kind(body[1]) == kindDelta }
		s.mu.Unlock()
		ok(t, a.commit(core.Async, whole(1, 1), end(2, session.Invalidated)))
		pause(time.Second)
		s.mu.Lock()
		s.drop = nil
		s.mu.Unlock()
		if b.status().Sessions != 0 {
			t.Error("nothing was lost")
		}
		pause(time.Minute)
		if a.fingerprint() != b.fingerprint() || b.status().Sessions != 1 {
			t.Error("not found")
		}
	})
}

// A change of an unknown session makes the receiver ask for the rest.
func TestRepair(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b := s.add(testConfig()), s.add(testConfig())
		pause(2 * time.Second)
		ok(t, a.commit(core.Async, whole(1, 10)))
		a.m.HandleView(t.Context(), channel.NewView(1, a.member, []channel.Member{b.member}))
		ok(t, a.commit(core.Async, change(1, "x", "y", 2, 1)))
		pause(100 * time.Millisecond)
		if r := b.load(key(1)); value(r, "x") != "y" || len(value(r, "blob")) != 10 {
			t.Errorf("%+v", r)
		}
	})
}

// The manager's process dies and comes back: the node gives back its live
// sessions, the others the replicas, and neither knows less than before.
func TestRestart(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b := s.add(testConfig()), s.add(testConfig())
		s.views(a, b)
		pause(5 * time.Second)
		ok(t, a.commit(core.Synced, whole(1, 1), whole(2, 1), whole(3, 1)))
		ok(t, b.commit(core.Synced, whole(4, 1)))
		a.live = []*session.Record{whole(1, 1), whole(2, 1), whole(5, 1)}
		ok(t, a.m.Stop(t.Context()))
		ok(t, b.commit(core.Async, change(1, "x", "missed", 2, 2), end(2, session.Invalidated)))
		pause(time.Second)
		a.start(testConfig())
		s.views(a, b)
		pause(10 * time.Second)
		if st := a.status(); !st.Ready || st.Sessions != 4 || a.resyncs != 1 {
			t.Errorf("%+v, %d resyncs", st, a.resyncs)
		}
		if a.fingerprint() != b.fingerprint() {
			t.Error("not equal")
		}
		if v := value(a.update(key(1)), "x"); v != "missed" {
			t.Error("the host does not know what it missed:", v)
		}
		if u := a.update(key(2)); u == nil || u.End != session.Invalidated {
			t.Errorf("the host does not know that the session has ended: %+v", u)
		}
	})
}

func TestRenewedAndLoggedOut(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b := s.add(testConfig()), s.add(testConfig())
		s.views(a, b)
		pause(5 * time.Second)
		ok(t, a.commit(core.Synced, whole(1, 1)))
		renewed := end(1, session.Renewed)
		renewed.RenewedTo = key(2).ID
		ok(t, a.commit(core.Synced, renewed, whole(2, 1)))
		if r := b.load(key(1)); r == nil || r.End != session.Renewed || r.RenewedTo != key(2).ID {
			t.Errorf("%+v", r)
		}
		ok(t, b.commit(core.Synced, end(1, session.Invalidated)))
		if a.load(key(2)) != nil || b.load(key(2)) != nil {
			t.Error("logged out under the old id, alive under the new one")
		}
		if u := a.update(key(2)); u == nil || u.End != session.Invalidated {
			t.Errorf("the host was not told: %+v", u)
		}
		// A ring of renewals ends too.
		x, y := end(3, session.Invalidated), end(4, session.Invalidated)
		x.RenewedTo, y.RenewedTo = y.Key.ID, x.Key.ID
		ok(t, a.commit(core.Synced, x, y))
	})
}

func TestExpiry(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		a, b := s.add(testConfig()), s.add(testConfig())
		s.views(a, b)
		pause(5 * time.Second)
		ok(t, a.commit(core.Synced, whole(1, 100), change(2, "partial", "x", 1, 1)))
		forever := whole(3, 1)
		forever.MaxInactive = 0
		future := whole(4, 1)
		future.LastAccess += (1000 * time.Hour).Milliseconds()
		ok(t, a.commit(core.Synced, forever, future))
		pause(30 * time.Minute)
		if b.load(key(1)) == nil {
			t.Error("dropped before its slack is over")
		}
		ok(t, b.m.Release(t.Context(), []session.Key{key(1)}))
		pause(3 * time.Minute)
		if st := b.status(); st.Sessions != 1 || st.Bytes != int64(forever.Size()) || st.Tombstones != 0 {
			t.Errorf("%+v", st)
		}
		if st := a.status(); st.Sessions != 3 { // a's host holds 1 and 4, and would have ended them
			t.Errorf("%+v", st)
		}
		pause(2 * time.Hour)
		if st := a.status(); st.Sessions != 1 {
			t.Errorf("%+v", st)
		}
	})
}

func TestTombstones(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		cfg := testConfig()
		cfg.MaxTombstones = 256 * 20
		n := s.add(cfg)
		pause(2 * time.Second)
		ok(t, n.commit(core.Async, whole(1, 1)))
		ok(t, n.commit(core.Async, end(1, session.Invalidated), end(2, session.Invalidated)))
		pause(7 * time.Minute)
		if st := n.status(); st.Tombstones != 1 {
			t.Errorf("%+v", st)
		}
		ok(t, n.commit(core.Async, whole(1, 1)))
		if u := n.update(key(1)); u == nil || u.End != session.Invalidated || n.load(key(1)) != nil {
			t.Error("a late change has brought it back, or nobody was told")
		}
		pause(time.Hour)
		if st := n.status(); st.Tombstones != 0 {
			t.Errorf("%+v", st)
		}
		for i := range 10_000 {
			ok(t, n.commit(core.Async, end(i, session.Expired)))
		}
		if st := n.status(); st.Tombstones > cfg.MaxTombstones || n.m.store.early.Load() != int64(10_000-st.Tombstones) {
			t.Errorf("%+v, %d early", st, n.m.store.early.Load())
		}
	})
}

func TestBounds(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		cfg := testConfig()
		cfg.MaxSessions = 2
		n := s.add(cfg)
		pause(2 * time.Second)
		ok(t, n.commit(core.Async, whole(1, 1), whole(2, 1)))
		if err := n.commit(core.Async, whole(3, 1)); !errors.Is(err, session.ErrFull) {
			t.Error(err)
		}
		ok(t, n.commit(core.Async, change(1, "x", "y", 2, 1)))
		if err := n.m.Commit(t.Context(), []byte("rubbish"), core.Async); !errors.Is(err, session.ErrBadRecord) {
			t.Error(err)
		}
		bad := 1
		for name, b := range map[string][]byte{
			"empty":        {},
			"version":      {9, 1},
			"kind 0":       {1, 0},
			"kind 99":      {1, 99, 0, 0, 0, 0, 0, 0, 0, 0},
			"empty ping":   {1, 7, 0, 0, 0, 0, 0, 0, 0, 0},
			"empty pong":   {1, 8, 0, 0, 0, 0, 0, 0, 0, 0},
			"placement":    {1, 9, 0, 0, 0, 0, 0, 0, 0, 0},
			"empty fetch":  {1, 5, 0, 0, 0, 0, 0, 0, 0, 0},
			"cut":          {1, 2, 0},
			"no span":      {1, 2, 0, 0, 0, 0, 0, 0, 0, 0},
			"empty span":   {1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 5, 0},
			"large span":   {1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 5, 2, 5, 0},
			"half a pair":  {1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 2, 3},
			"bad delta":    {1, 1, 0xff},
			"bad fetch":    {1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff},
			"empty found":  {1, 6, 0, 0, 0, 0, 0, 0, 0, 0},
			"stray answer": {1, 4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 7},
		} {
			calls := 0
			n.m.HandleMessage(t.Context(), channel.Member{}, b, func(err error) {
				calls++
				if err == nil {
					t.Errorf("%s: accepted", name)
				}
			})
			if calls != 1 {
				t.Errorf("%s: done %d times", name, calls)
			}
			bad++
		}
		if got := n.m.m.malformed.Value(); got != int64(bad) {
			t.Errorf("%d of %d counted", got, bad)
		}
	})
}

func TestUnstarted(t *testing.T) {
	m, err := New("delta", testConfig(), channel.Settings{})
	ok(t, err)
	m.HandleMessage(t.Context(), channel.Member{}, []byte{1, 1}, func(err error) {
		if err == nil {
			t.Error("accepted before start")
		}
	})
	if _, err := m.Load(t.Context(), key(1)); err == nil {
		t.Error("loaded before start")
	}
	m.HandleView(t.Context(), channel.View{})
	ok(t, m.Stop(t.Context()))
	ok(t, m.Stop(t.Context()))
	if err := m.Start(t.Context(), nil); err == nil {
		t.Error("started after stop")
	}
	c := Config{Common: Common{ChunkBytes: 1, SettleTime: -1}}
	if _, err := New("delta", c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), "chunk_bytes") || !strings.Contains(err.Error(), "settle_time") {
		t.Error(err)
	}
}

func FuzzMessage(f *testing.F) {
	batch := session.AppendBatch(nil, whole(1, 3), end(2, session.Renewed))
	f.Add(append(appendHeader(nil, kindDelta, 0), batch...))
	f.Add(append(appendHeader(nil, kindRecords, 5), batch...))
	f.Add(append(span{0, 256, 1}.append(appendHeader(nil, kindDigest, 5)), make([]byte, 32)...))
	f.Add(append(span{0, 1, 2}.append(appendHeader(nil, kindAnswer, 5)), make([]byte, 16)...))
	f.Add(append(append(appendHeader(nil, kindFetch, 5), 0), batch...))
	f.Add(append(appendHeader(nil, kindPing, 5), flagReady))
	f.Add(append(appendHeader(nil, kindPong, 5), flagReady))
	f.Add(append(appendHeader(nil, kindFound, 5), append([]byte{2}, batch...)...))
	m, err := New("delta", testConfig(), channel.Settings{})
	if err != nil {
		f.Fatal(err)
	}
	m.host = discard{} // not started: nothing serves the queue
	f.Cleanup(func() { _ = m.Stop(context.Background()) })
	f.Fuzz(func(t *testing.T, b []byte) {
		calls := 0
		m.HandleMessage(t.Context(), channel.Member{}, b, func(error) { calls++ })
		if calls != 1 {
			t.Fatal(calls)
		}
		select {
		case job := <-m.jobs:
			job()
		case job := <-m.bulk:
			job()
		default:
		}
	})
}

// discard is a host without other members.
type discard struct{}

func (discard) Send(context.Context, []channel.Member, channel.Options, []byte) error { return nil }
func (discard) Update([]byte)                                                         {}
func (discard) Resync(context.Context) error                                          { return nil }

// TestTransfer100k measures the state transfer of 100,000 sessions of 1 KiB
// between two managers in real time, without the processes in between.
func TestTransfer100k(t *testing.T) {
	if testing.Short() {
		t.Skip("moves 100 MB")
	}
	s := newSim(t)
	s.delay = 0
	defer s.stop()
	a := s.add(testConfig())
	<-a.m.readyCh
	n := 100_000
	if raceEnabled {
		n = 5_000 // the race detector makes it thirty times slower
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range n / 100 {
		var batch []*session.Record
		for j := range 100 {
			batch = append(batch, whole(i*100+j, 1024))
		}
		ok(t, a.commit(core.Async, batch...))
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	per := (after.HeapAlloc - before.HeapAlloc) / uint64(n)
	if !raceEnabled && per > 1024*3/2+400 {
		t.Error(per, "bytes per session")
	}
	b := s.add(testConfig())
	s.views(a, b)
	select {
	case <-b.m.readyCh:
	case <-time.After(10 * time.Second):
	}
	st := b.status()
	if !st.Ready || st.Sessions != n || st.Received != n {
		t.Errorf("%+v", st)
	}
	t.Logf("%s; %d bytes of memory per session", st.State, per)
}

func BenchmarkApply(b *testing.B) {
	m, err := New("delta", testConfig(), channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = m.Stop(context.Background()) }()
	m.host = discard{}
	for i := range 1000 {
		if _, err := m.applyBatch(session.AppendBatch(nil, whole(i, 512)), nil); err != nil {
			b.Fatal(err)
		}
		m.store.release([]session.Key{key(i)})
	}
	var from channel.Member
	for _, size := range []int{100, 1024} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.ReportAllocs()
			// Two versions of every session, in turn: half of the changes win.
			batches := make([][]byte, 2000)
			for i := range batches {
				v := string(bytes.Repeat([]byte{7}, size))
				batches[i] = session.AppendBatch(nil, change(i%1000, "blob", v, uint64(2+i/1000), 2))
			}
			for i := 0; b.Loop(); i++ {
				if _, err := m.applyBatch(batches[i%len(batches)], &from); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestKeys(t *testing.T) {
	bubble(t, func(t *testing.T, s *sim) {
		n := s.add(testConfig())
		pause(2 * time.Second)
		for i := range 10 {
			ok(t, n.commit(core.Async, whole(i, 1)))
		}
		list, err := n.m.Keys(t.Context(), 5)
		if err != nil || len(list) != 5 || slices.ContainsFunc(list, func(s session.Summary) bool { return len(s.ID) > 12 }) {
			t.Errorf("%+v %v", list, err)
		}
	})
}
