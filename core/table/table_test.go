package table

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// memory is a manager with no other nodes.
type memory struct {
	core.Manager
	mu       sync.Mutex
	records  map[session.Key]*session.Record
	held     map[session.Key]bool
	commits  []core.Level
	loads    int
	released int
	fail     error         // of Commit
	refuse   error         // of Release
	slow     time.Duration // of all calls
}

func newMemory() *memory {
	return &memory{records: map[session.Key]*session.Record{}, held: map[session.Key]bool{}}
}

func (m *memory) set(f func(*memory)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(m)
}

func (m *memory) Commit(ctx context.Context, batch []byte, level core.Level) error {
	m.mu.Lock()
	slow := m.slow
	m.mu.Unlock()
	if slow > 0 {
		select {
		case <-time.After(slow):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.commits = append(m.commits, level)
	if m.fail != nil {
		return m.fail
	}
	return session.DecodeBatch(batch, func(r *session.Record) error {
		m.held[r.Key] = r.End == session.Living
		if old := m.records[r.Key]; old != nil {
			old.Merge(r.Clone())
		} else {
			m.records[r.Key] = r.Clone()
		}
		return nil
	})
}

func (m *memory) Load(_ context.Context, key session.Key) (*session.Record, error) {
	m.mu.Lock()
	slow := m.slow
	m.loads++
	m.mu.Unlock()
	time.Sleep(slow)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held[key] = true
	if r := m.records[key]; r != nil && (r.End == session.Living || r.End == session.Renewed) {
		return r.Clone(), nil
	}
	return nil, nil
}

func (m *memory) Release(_ context.Context, keys []session.Key) error {
	m.mu.Lock()
	slow := m.slow
	m.mu.Unlock()
	time.Sleep(slow)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refuse != nil {
		return m.refuse
	}
	for _, k := range keys {
		delete(m.held, k)
		m.released++
	}
	return nil
}

func (m *memory) get(key session.Key) session.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.records[key]; r != nil {
		return *r.Clone()
	}
	return session.Record{}
}

const ctxName = "localhost/shop"

var half = session.NewOptions{MaxInactive: 30 * time.Minute, Route: "n1"}

// pause lets virtual time go by, and everything else come to rest.
func pause(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// bubble runs f with a started table in virtual time.
func bubble(t *testing.T, c Config, f func(t *testing.T, tb *Table)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		tb := New(c, channel.Settings{Name: "test", Metrics: channel.NewMetrics()})
		if err := tb.Start(t.Context(), 7); err != nil {
			t.Fatal(err)
		}
		defer func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := tb.Stop(ctx); err != nil {
				t.Error(err)
			}
			if err := tb.Stop(ctx); err != nil {
				t.Error("second stop:", err)
			}
		}()
		f(t, tb)
	})
}

func create(t *testing.T, tb *Table, o session.NewOptions) core.Handle {
	t.Helper()
	h, err := tb.Create(t.Context(), ctxName, o)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func find(t *testing.T, tb *Table, key session.Key) core.Handle {
	t.Helper()
	h, err := tb.Find(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func get(t *testing.T, h core.Handle, name string) string {
	t.Helper()
	var v string
	if _, err := h.Get(name, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func encoded(v any) []byte {
	b, err := session.Encode(v)
	if err != nil {
		panic(err)
	}
	return b
}

// remote is a change by another node.
func remote(key session.Key, name, value string, counter uint64) []byte {
	return session.AppendBatch(nil, &session.Record{Key: key, Attrs: map[string]session.Entry{
		name: {Value: encoded(value), Version: session.Version{Counter: counter, Node: 9}},
	}})
}

func TestLocalSession(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		if !h.IsNew() || h.ID() != h.Key().ID+".n1" {
			t.Error(h.ID(), h.IsNew())
		}
		ok(t, h.Set("b", "2"))
		ok(t, h.Set("a", "1"))
		ok(t, h.Set("gone", "x"))
		ok(t, h.Set("gone", nil))
		ok(t, h.Commit(t.Context(), core.Synced))
		if h.Dirty() {
			t.Error("dirty without a manager")
		}
		if n := h.Names(); fmt.Sprint(n) != "[a b]" {
			t.Error(n)
		}
		h.Release()
		h.Release()
		pause(time.Minute)
		g := find(t, tb, h.Key())
		if g == nil || g.IsNew() || get(t, g, "a") != "1" {
			t.Fatal("not found as it was")
		}
		if d := time.Since(g.LastAccess()); d != time.Minute {
			t.Error("last access", d, "ago")
		}
		if e := find(t, tb, session.Key{Context: "other", ID: h.Key().ID}); e != nil {
			t.Error("found in another context")
		}
		ok(t, g.Invalidate())
		if err := g.Set("a", "2"); !errors.Is(err, session.ErrInvalid) {
			t.Error(err)
		}
		if _, err := g.Get("a", new(string)); !errors.Is(err, session.ErrInvalid) {
			t.Error(err)
		}
		if g.Valid() || find(t, tb, h.Key()) != nil || tb.Len() != 0 {
			t.Error("still there")
		}
		g.Release()
	})
}

func TestExpiry(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m, IdleRelease: -1}, func(t *testing.T, tb *Table) {
		forever := create(t, tb, session.NewOptions{})
		a, b := create(t, tb, half), create(t, tb, half)
		ok(t, b.SetMaxInactive(2*time.Hour))
		used := create(t, tb, half)
		forever.Release()
		a.Release()
		b.Release()
		pause(29 * time.Minute)
		if tb.Len() != 4 {
			t.Error(tb.Len())
		}
		pause(time.Minute + 2*time.Second)
		if r := m.get(a.Key()); r.End != session.Expired || tb.Len() != 3 {
			t.Errorf("%+v, %d left", r, tb.Len())
		}
		if find(t, tb, a.Key()) != nil {
			t.Error("expired session found")
		}
		// A late change by another node does not bring it back.
		tb.Update(remote(a.Key(), "x", "late", 99))
		if find(t, tb, a.Key()) != nil {
			t.Error("resurrected")
		}
		pause(3 * time.Hour)
		if r := m.get(b.Key()); r.End != session.Expired {
			t.Errorf("%+v", r)
		}
		if !used.Valid() {
			t.Error("expired while in use")
		}
		if d := time.Now().UnixMilli() - m.get(used.Key()).LastAccess; d > (31 * time.Minute).Milliseconds() {
			t.Error("others think it unused since", d)
		}
		used.Release()
		if tb.Len() != 2 {
			t.Error(tb.Len())
		}
	})
}

func TestSyncCommitWaits(t *testing.T) {
	m := newMemory()
	m.slow = time.Second
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		defer h.Release()
		ok(t, h.Set("n", "1"))
		start := time.Now()
		ok(t, h.Commit(t.Context(), core.Async))
		if time.Since(start) != 0 {
			t.Error("async has waited")
		}
		ok(t, h.Set("n", "2"))
		ok(t, h.Commit(t.Context(), core.Synced))
		if time.Since(start) < time.Second {
			t.Error("sync has not waited")
		}
		if r := m.get(h.Key()); string(r.Attrs["n"].Value) != string(encoded("2")) {
			t.Errorf("%+v", r)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		ok(t, h.Set("n", "3"))
		if err := h.Commit(ctx, core.Synced); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		if h.Dirty() {
			t.Error("dirty after flush")
		}
	})
}

// A change that an asynchronous batch has already taken is not good enough for
// somebody who asks for a synchronous commit.
func TestSyncAfterAsyncTook(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		ok(t, h.Commit(t.Context(), core.Synced))
		other := find(t, tb, h.Key())
		ok(t, h.Set("n", "1"))
		other.Release() // commits what is pending, asynchronously
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		m.set(func(m *memory) { m.commits, m.records = nil, map[session.Key]*session.Record{} })
		ok(t, h.Commit(t.Context(), core.Synced))
		synctest.Wait()
		if fmt.Sprint(m.commits) != "[sync]" || m.get(h.Key()).Attrs["n"].Value == nil {
			t.Error(m.commits, m.get(h.Key()))
		}
		h.Release()
	})
}

func TestFailedCommits(t *testing.T) {
	m := newMemory()
	boom := errors.New("boom")
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		m.set(func(m *memory) { m.fail = boom })
		h := create(t, tb, half)
		for i := range 50 {
			ok(t, h.Set(fmt.Sprint(i%10), fmt.Sprint(i)))
			ok(t, h.Commit(t.Context(), core.Async))
			pause(time.Second)
		}
		if err := h.Commit(t.Context(), core.Synced); !errors.Is(err, boom) {
			t.Error(err)
		}
		if n := tb.m.retries.Value(); n < 10 || n > 120 {
			t.Error(n, "attempts in 50 s")
		}
		m.set(func(m *memory) { m.fail = nil })
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		if r := m.get(h.Key()); len(r.Attrs) != 10 || string(r.Attrs["9"].Value) != string(encoded("49")) || r.Created == 0 {
			t.Errorf("lost: %+v", r)
		}
		h.Release()
	})
}

func TestStopCountsWhatIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.fail = errors.New("gone")
		tb := New(Config{Manager: m}, channel.Settings{Metrics: channel.NewMetrics()})
		ok(t, tb.Start(t.Context(), 1))
		for range 3 {
			create(t, tb, half).Release()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if err := tb.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if n := tb.m.lost.Value(); n != 3 {
			t.Error(n, "lost")
		}
		h := create(t, tb, half)
		if err := h.Commit(t.Context(), core.Synced); !errors.Is(err, ErrStopped) {
			t.Error(err)
		}
		if _, err := tb.Find(t.Context(), session.Key{ID: "X"}); !errors.Is(err, ErrStopped) {
			t.Error(err)
		}
	})
}

func TestStopUnstarted(t *testing.T) {
	tb := New(Config{}, channel.Settings{})
	ok(t, tb.Stop(t.Context()))
	ok(t, tb.Stop(t.Context()))
	if err := tb.Start(t.Context(), 1); !errors.Is(err, ErrStopped) {
		t.Error(err)
	}
}

func TestFindLoadsOnce(t *testing.T) {
	m := newMemory()
	m.slow = time.Second
	key := session.Key{Context: ctxName, ID: session.NewID()}
	bubble(t, Config{Manager: m, Route: "n2"}, func(t *testing.T, tb *Table) {
		now := time.Now().UnixMilli()
		m.records[key] = &session.Record{Key: key, Created: now, LastAccess: now, MaxInactive: time.Hour, Attrs: map[string]session.Entry{
			"a": {Value: encoded("old"), Version: session.Version{Counter: 4, Node: 9}},
		}}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				h, err := tb.Find(t.Context(), key)
				if err != nil || h == nil {
					t.Error(h, err)
					return
				}
				if v := get(t, h, "a"); v != "new" {
					t.Error(v)
				}
				h.Release()
			})
		}
		pause(time.Second / 2)
		tb.Update(remote(key, "a", "new", 5)) // while it is being loaded
		wg.Wait()
		if m.loads != 1 {
			t.Error(m.loads, "loads")
		}
		h := find(t, tb, key)
		if h.ID() != key.ID+".n2" {
			t.Error(h.ID())
		}
		ok(t, h.Set("a", "mine"))
		if e, _ := h.(*handle).s.rec.Get("a"); e.Version != (session.Version{Counter: 6, Node: 7}) {
			t.Error("version", e.Version)
		}
		h.Release()
		// What nobody knows is asked for again each time.
		for range 2 {
			if find(t, tb, session.Key{Context: ctxName, ID: session.NewID()}) != nil {
				t.Error("found")
			}
		}
		if m.loads != 3 {
			t.Error(m.loads, "loads")
		}
	})
}

func TestLoadRefuses(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m, IdleRelease: -1}, func(t *testing.T, tb *Table) {
		pause(24 * time.Hour)
		now := time.Now().UnixMilli()
		key := func(r session.Record) session.Key {
			r.Key = session.Key{Context: ctxName, ID: session.NewID()}
			m.records[r.Key] = &r
			return r.Key
		}
		partial := key(session.Record{LastAccess: now, MaxInactive: time.Hour})
		old := key(session.Record{Created: 1, LastAccess: now - 2*time.Hour.Milliseconds(), MaxInactive: time.Hour})
		ended := key(session.Record{End: session.Invalidated, EndTime: 3})
		for _, k := range []session.Key{partial, old, ended} {
			if find(t, tb, k) != nil {
				t.Errorf("found %+v", m.records[k])
			}
		}
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		if r := m.get(old); r.End != session.Expired {
			t.Errorf("no tombstone: %+v", r)
		}
		future := key(session.Record{Created: 1, LastAccess: now + 1000*time.Hour.Milliseconds(), MaxInactive: time.Hour})
		h := find(t, tb, future)
		if h == nil || h.LastAccess().After(time.Now()) || tb.m.future.Value() != 1 {
			t.Error("access in the future is believed")
		}
		h.Release()
		pause(2 * time.Hour)
		if find(t, tb, future) != nil && tb.Len() != 0 {
			t.Error("lives longer than it should")
		}
	})
}

func TestUpdateWhileInUse(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		ok(t, h.Set("mine", "1"))
		tb.Update(remote(h.Key(), "theirs", "2", 50))
		if get(t, h, "theirs") != "2" || get(t, h, "mine") != "1" {
			t.Error("lost update")
		}
		ok(t, h.Set("theirs", "3")) // must win over what was seen
		tb.Update(remote(h.Key(), "theirs", "2", 50))
		if get(t, h, "theirs") != "3" {
			t.Error("an old change has won")
		}
		tb.Update([]byte("rubbish"))
		tb.Update(session.AppendBatch(nil, &session.Record{Key: h.Key(), End: session.Invalidated, EndTime: 1}))
		if err := h.Set("mine", "2"); !errors.Is(err, session.ErrInvalid) || h.Valid() {
			t.Error(err)
		}
		h.Release()
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		if find(t, tb, h.Key()) != nil {
			t.Error("found after remote end")
		}
	})
}

func TestRenew(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		old := h.Key()
		ok(t, h.Set("a", "1"))
		ok(t, h.Commit(t.Context(), core.Synced))
		parallel := find(t, tb, old)
		ok(t, h.Renew())
		fresh := h.Key()
		if fresh == old || parallel.Key() != fresh {
			t.Error("key has not changed everywhere")
		}
		ok(t, parallel.Set("b", "2"))
		parallel.Release()
		ok(t, h.Commit(t.Context(), core.Synced))
		if r := m.get(old); r.End != session.Renewed || r.RenewedTo != fresh.ID {
			t.Errorf("%+v", r)
		}
		if r := m.get(fresh); r.Created == 0 || len(r.Attrs) != 2 {
			t.Errorf("%+v", r)
		}
		// SP-17: another node changes it under the old id.
		tb.Update(remote(old, "late", "3", 60))
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		if get(t, h, "late") != "3" || m.get(fresh).Attrs["late"].Value == nil {
			t.Error("a change under the old id is lost")
		}
		h.Release()
		pause(29 * time.Second)
		g := find(t, tb, old)
		if g == nil || g.Key() != fresh {
			t.Fatal("no grace")
		}
		g.Release()
		pause(2 * time.Second)
		if find(t, tb, old) != nil {
			t.Error("grace without end")
		}
		if tb.Len() != 1 {
			t.Error(tb.Len())
		}
		pause(3 * time.Second)
		for i := range tb.shards {
			if len(tb.shards[i].renewed) != 0 {
				t.Error("renewal not forgotten")
			}
		}
		if find(t, tb, old) != nil {
			t.Error("the manager brought it back")
		}
	})
}

func TestRenewThenInvalidate(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		old := h.Key()
		ok(t, h.Renew())
		ok(t, h.Invalidate())
		if err := h.Renew(); !errors.Is(err, session.ErrInvalid) {
			t.Error(err)
		}
		h.Release()
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		if find(t, tb, old) != nil || find(t, tb, h.Key()) != nil {
			t.Error("found")
		}
		// The other way round: logged out under the old id on another node.
		h = create(t, tb, half)
		old = h.Key()
		ok(t, h.Renew())
		tb.Update(session.AppendBatch(nil, &session.Record{Key: old, End: session.Invalidated, EndTime: time.Now().UnixMilli()}))
		if h.Valid() {
			t.Error("logged out under the old id, alive under the new one")
		}
		h.Release()
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		if m.get(h.Key()).End != session.Invalidated {
			t.Error("and nobody was told")
		}
	})
}

func TestRenewedElsewhere(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		old := h.Key()
		ok(t, h.Commit(t.Context(), core.Synced))
		ok(t, h.Set("a", "1"))
		fresh := session.Key{Context: ctxName, ID: session.NewID()}
		now := time.Now().UnixMilli()
		m.set(func(m *memory) {
			m.records[fresh] = &session.Record{Key: fresh, Created: now, LastAccess: now, MaxInactive: time.Hour}
		})
		tb.Update(session.AppendBatch(nil, &session.Record{Key: old, End: session.Renewed, EndTime: now, RenewedTo: fresh.ID}))
		h.Release()
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		g := find(t, tb, old)
		if g == nil || g.Key() != fresh {
			t.Fatal("not found under the new id")
		}
		if get(t, g, "a") != "1" {
			t.Error("the change in progress is lost")
		}
		g.Release()
		if tb.Len() != 1 {
			t.Error(tb.Len())
		}
	})
}

func TestIdleRelease(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m, IdleRelease: time.Minute}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		ok(t, h.Set("a", "1"))
		h.Release()
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		m.set(func(m *memory) { m.fail = errors.New("down") })
		dirty := create(t, tb, half)
		dirty.Release()
		pause(2 * time.Minute)
		if tb.Len() != 1 || m.released != 1 || m.held[h.Key()] {
			t.Error(tb.Len(), m.released)
		}
		m.set(func(m *memory) { m.fail = nil })
		pause(2 * time.Minute)
		if tb.Len() != 0 {
			t.Error("not released after it was committed")
		}
		m.set(func(m *memory) { m.refuse = errors.New("alone") })
		g := find(t, tb, h.Key())
		if g == nil || get(t, g, "a") != "1" || !m.held[h.Key()] {
			t.Error("not loaded again")
		}
		g.Release()
		pause(5 * time.Minute)
		if tb.Len() != 1 {
			t.Error("dropped although the manager does not want it")
		}
		m.set(func(m *memory) { m.refuse, m.slow = nil, time.Second })
		s := h.(*handle).t.shard(h.Key()).live[h.Key()]
		leaving := func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.busy != nil && s.leaving != nil
		}
		for !leaving() {
			pause(100 * time.Millisecond)
		}
		tb.Update(remote(h.Key(), "a", "2", 9)) // while it is leaving
		m.set(func(m *memory) {
			m.records[h.Key()].Merge(&session.Record{Attrs: map[string]session.Entry{"a": {Value: encoded("2"), Version: session.Version{Counter: 9, Node: 9}}}})
		})
		loads := m.loads
		g = find(t, tb, h.Key())
		if g == nil || get(t, g, "a") != "2" || m.loads != loads+1 {
			t.Error("a request that came while the session was leaving")
		}
		g.Release()
	})
}

func TestManyIdle(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m, IdleRelease: time.Minute}, func(t *testing.T, tb *Table) {
		const n = 3*releaseKeys + 1
		for range n {
			create(t, tb, half).Release()
		}
		ok(t, tb.Flush(t.Context()))
		pause(62 * time.Second)
		if tb.Len() != 0 || m.released != n || tb.m.released.Value() != n {
			t.Error(tb.Len(), m.released)
		}
	})
}

func TestResync(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		const n = 3000
		for range n {
			h := create(t, tb, half)
			ok(t, h.Set("a", "1"))
			h.Release()
		}
		renewed, ended := create(t, tb, half), create(t, tb, half)
		old := renewed.Key()
		ok(t, renewed.Renew())
		renewed.Release()
		ok(t, ended.Invalidate())
		ended.Release()
		ok(t, tb.Flush(t.Context()))
		synctest.Wait()
		m.set(func(m *memory) { m.records = map[session.Key]*session.Record{} })
		ok(t, tb.Resync(t.Context()))
		if len(m.records) != n+3 || m.get(old).End != session.Renewed || m.get(ended.Key()).End != session.Invalidated {
			t.Error(len(m.records))
		}
		delete(m.records, old)
		delete(m.records, ended.Key())
		delete(m.records, renewed.Key())
		for k, r := range m.records {
			if r.Created == 0 || len(r.Attrs) != 1 {
				t.Fatalf("%v: %+v", k, r)
			}
		}
	})
}

func TestBounds(t *testing.T) {
	bubble(t, Config{MaxSessions: 2, MaxSize: 1000}, func(t *testing.T, tb *Table) {
		a, b := create(t, tb, half), create(t, tb, half)
		if _, err := tb.Create(t.Context(), ctxName, half); !errors.Is(err, session.ErrFull) {
			t.Error(err)
		}
		ok(t, b.Invalidate())
		create(t, tb, half).Release()
		ok(t, a.Set("x", make([]byte, 900)))
		if err := a.Set("y", make([]byte, 100)); !errors.Is(err, session.ErrTooLarge) {
			t.Error(err)
		}
		ok(t, a.Set("x", make([]byte, 10)))
		ok(t, a.Set("y", make([]byte, 900)))
		for _, name := range []string{"", string(make([]byte, session.MaxName+1)), "\xff"} {
			if err := a.Set(name, 1); !errors.Is(err, session.ErrTooLarge) {
				t.Errorf("%.10q: %v", name, err)
			}
		}
		if err := a.Set("f", func() {}); err == nil {
			t.Error("function stored")
		}
		if tb.m.full.Value() != 1 || tb.m.tooLarge.Value() != 4 {
			t.Error(tb.m.full.Value(), tb.m.tooLarge.Value())
		}
		if l := tb.List(1); len(l) != 1 || len(l[0].ID) > 12 {
			t.Errorf("%+v", l)
		}
	})
}

func TestUpdateIsAtomic(t *testing.T) {
	m := newMemory()
	bubble(t, Config{Manager: m}, func(t *testing.T, tb *Table) {
		h := create(t, tb, half)
		const n = session.Attr[int]("n")
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 100 {
					g := find(t, tb, h.Key())
					if err := n.Update(g, func(v *int) error { *v++; return nil }); err != nil {
						t.Error(err)
					}
					if err := g.Commit(t.Context(), core.Synced); err != nil {
						t.Error(err)
					}
					g.Release()
				}
			})
		}
		wg.Wait()
		if v, _, err := n.Get(h); v != 800 || err != nil {
			t.Error(v, err)
		}
		func() {
			defer func() { _ = recover() }()
			_ = n.Update(h, func(*int) error { panic("application") })
		}()
		ok(t, n.Update(h, func(v *int) error { *v = 0; return nil })) // not locked out
		h.Release()
	})
}

// null is a manager that forgets.
type null struct{ core.Manager }

func (null) Commit(context.Context, []byte, core.Level) error { return nil }

func benchTable(b *testing.B, m core.Manager) *Table {
	tb := New(Config{Manager: m}, channel.Settings{Metrics: channel.NewMetrics()})
	if err := tb.Start(b.Context(), 1); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = tb.Stop(context.Background()) })
	return tb
}

func BenchmarkHit(b *testing.B) {
	tb := benchTable(b, null{})
	h, _ := tb.Create(b.Context(), ctxName, half)
	key := h.Key()
	_ = h.Set("n", 1)
	h.Release()
	_ = tb.Flush(b.Context())
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			h, err := tb.Find(context.Background(), key)
			if err != nil || h == nil {
				b.Fatal(h, err)
			}
			var n int
			if ok, err := h.Get("n", &n); !ok || err != nil {
				b.Fatal(err)
			}
			h.Release()
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	for _, level := range []core.Level{core.Async, core.Synced} {
		b.Run(level.String(), func(b *testing.B) {
			tb := benchTable(b, null{})
			var keys []session.Key
			for range 1000 {
				h, _ := tb.Create(b.Context(), ctxName, half)
				keys = append(keys, h.Key())
				h.Release()
			}
			blob := make([]byte, 100)
			b.SetParallelism(16)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for i := 0; pb.Next(); i++ {
					h, err := tb.Find(context.Background(), keys[i%len(keys)])
					if err != nil || h == nil {
						b.Fatal(h, err)
					}
					_ = h.Set("blob", blob)
					if err := h.Commit(context.Background(), level); err != nil {
						b.Fatal(err)
					}
					h.Release()
				}
			})
		})
	}
}
