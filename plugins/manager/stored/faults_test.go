package stored_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

// fickle is a shelf whose calls go wrong as its functions say; nil for never.
type fickle struct {
	*shelf
	mu       sync.Mutex
	onLoad   func(it *core.StoreItem, ok *bool) error
	onSave   func(done bool) error // called before and after it is done
	touches  int
	attempts int
}

// damaged is the version of an item that the store takes for damaged.
const damaged core.StoreVersion = "damaged"

func (f *fickle) set(load func(*core.StoreItem, *bool) error, save func(bool) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onLoad, f.onSave = load, save
}

func (f *fickle) Load(ctx context.Context, key session.Key) (core.StoreItem, bool, error) {
	it, ok, err := f.shelf.Load(ctx, key)
	f.mu.Lock()
	defer f.mu.Unlock()
	if it.Version == damaged {
		return core.StoreItem{}, false, core.ErrStoreCorrupt
	}
	if err == nil && f.onLoad != nil {
		err = f.onLoad(&it, &ok)
	}
	return it, ok, err
}

func (f *fickle) ask(done bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.attempts++; f.onSave == nil {
		return nil
	}
	return f.onSave(done)
}

func (f *fickle) Save(ctx context.Context, key session.Key, item core.StoreItem, prev core.StoreVersion) (core.StoreVersion, error) {
	if err := f.ask(false); err != nil {
		return "", err
	}
	f.shelf.mu.Lock()
	if prev == "" && f.items[key].Version == damaged {
		delete(f.items, key)
	}
	f.shelf.mu.Unlock()
	v, err := f.shelf.Save(ctx, key, item, prev)
	if err == nil {
		err = f.ask(true)
	}
	return v, err
}

func (f *fickle) Touch(ctx context.Context, key session.Key, expires time.Time) error {
	f.mu.Lock()
	f.touches++
	f.mu.Unlock()
	if err := f.ask(false); err != nil {
		return err
	}
	return f.shelf.Touch(ctx, key, expires)
}

// What a store can do wrong: the node that has the session goes on, no request
// waits for long, and when the store works again it has everything.
func TestStoreMisbehaves(t *testing.T) {
	for _, c := range []struct {
		name   string
		break_ func(s *fickle, k session.Key)
	}{
		{"it fails", func(s *fickle, _ session.Key) { s.break_(errors.New("refused")) }},
		{"it loads but does not save", func(s *fickle, _ session.Key) {
			s.set(nil, func(done bool) error { return errors.New("disk full") })
		}},
		{"it saves but does not load", func(s *fickle, _ session.Key) {
			s.set(func(*core.StoreItem, *bool) error { return errors.New("input/output error") }, nil)
		}},
		{"it saves and says that it has failed", func(s *fickle, _ session.Key) {
			n := 0
			s.set(nil, func(done bool) error {
				if n++; done && n%4 != 0 {
					return errors.New("connection reset")
				}
				return nil
			})
		}},
		{"it does not answer", func(s *fickle, _ session.Key) {
			s.shelf.mu.Lock()
			defer s.shelf.mu.Unlock()
			s.delay = time.Hour
		}},
		{"a second for each answer", func(s *fickle, _ session.Key) {
			s.shelf.mu.Lock()
			defer s.shelf.mu.Unlock()
			s.delay = time.Second
		}},
		{"half a record", func(s *fickle, k session.Key) {
			s.shelf.mu.Lock()
			defer s.shelf.mu.Unlock()
			it := s.items[k]
			s.n++
			it.Data, it.Version = it.Data[:len(it.Data)/2], core.StoreVersion(fmt.Sprint(s.n))
			s.items[k] = it
		}},
		{"another session's record", func(s *fickle, k session.Key) {
			s.shelf.mu.Lock()
			defer s.shelf.mu.Unlock()
			s.n++
			s.items[k] = core.StoreItem{Data: session.AppendBatch(nil, &session.Record{Key: session.Key{Context: "x", ID: k.ID}, Created: 1}), Version: core.StoreVersion(fmt.Sprint(s.n))}
		}},
		{"damaged", func(s *fickle, k session.Key) {
			s.shelf.mu.Lock()
			defer s.shelf.mu.Unlock()
			s.n++
			s.items[k] = core.StoreItem{Data: []byte("x"), Version: damaged}
		}},
		{"damaged as one of the nodes sees it", func(s *fickle, _ session.Key) {
			n := 0
			s.set(func(*core.StoreItem, *bool) error {
				if n++; n%2 == 0 {
					return core.ErrStoreCorrupt
				}
				return nil
			}, nil)
		}},
		{"an older version", func(s *fickle, k session.Key) {
			s.shelf.mu.Lock()
			old := s.items[k]
			s.shelf.mu.Unlock()
			s.set(func(it *core.StoreItem, ok *bool) error {
				if *ok {
					*it = old
				}
				return nil
			}, nil)
		}},
		{"it has forgotten everything", func(s *fickle, _ session.Key) {
			s.shelf.mu.Lock()
			defer s.shelf.mu.Unlock()
			clear(s.items)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &fickle{shelf: newShelf()}
				a, b := newNode(t, s, stored.Defaults(), 1), newNode(t, s, stored.Defaults(), 2)
				meet(a, b)
				k := a.create("A")
				for i := range 3 {
					a.commit(a.change(k, fmt.Sprint("before", i), "x"), core.Synced)
				}
				c.break_(s, k)
				var longest time.Duration
				for i := range 20 {
					start := time.Now()
					a.commit(a.change(k, "n", fmt.Sprint(i)), core.Synced)
					longest = max(longest, time.Since(start))
					time.Sleep(100 * time.Millisecond)
					_, _ = b.m.Load(t.Context(), k) // must not make a's life worse, whatever it gets
					go func() { _, _ = a.m.Load(t.Context(), session.Key{Context: "localhost/", ID: "another"}) }()
				}
				if longest > 1500*time.Millisecond {
					t.Errorf("a request took %v", longest)
				}
				s.set(nil, nil)
				s.break_(nil)
				s.shelf.mu.Lock()
				s.delay = 0
				s.shelf.mu.Unlock()
				time.Sleep(time.Minute)
				r := s.record(t, k)
				if text(r, "n") != "19" || text(r, "before0") != "x" || text(r, "before2") != "x" {
					t.Errorf("in the end n=%s, before0=%s is stored", text(r, "n"), text(r, "before0"))
				}
				if st, _ := a.m.Status(t.Context()); !strings.HasPrefix(st.State, "the store works; 0 ") {
					t.Errorf("state: %s", st.State)
				}
			})
		})
	}
}

// A request that only reads moves the expiry of what is stored.
func TestTouch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &fickle{shelf: newShelf()}
		a, b := newNode(t, s, stored.Defaults(), 1), newNode(t, s, stored.Defaults(), 2)
		k := a.create("A") // lives for an hour
		saves := s.saves
		for range 5 {
			time.Sleep(50 * time.Minute)
			a.commit(&session.Record{Key: k, LastAccess: time.Now().UnixMilli()}, core.Acked)
		}
		if s.saves != saves || s.touches != 5 {
			t.Errorf("%d saves and %d touches for 5 accesses", s.saves-saves, s.touches)
		}
		r := b.open(k)
		if r == nil || r.LastAccess != time.Now().UnixMilli() {
			t.Errorf("another node loads %+v", r)
		}
		time.Sleep(62 * time.Minute)
		if r, err := b.m.Load(t.Context(), k); r != nil || err != nil {
			t.Errorf("after its time another node loads %+v, %v", r, err)
		}
		// One that lives for ever has no expiry to be moved.
		for_ := session.Key{Context: "localhost/", ID: strings.Repeat("F", 32)}
		a.commit(&session.Record{Key: for_, Created: 1, LastAccess: 1}, core.Acked)
		touches := s.touches
		a.commit(&session.Record{Key: for_, LastAccess: time.Now().UnixMilli()}, core.Acked)
		if s.touches != touches {
			t.Error("a session without expiry was touched in the store")
		}
	})
}

// Many sessions that the store has lost are given again at once, not once each.
func TestOneResyncForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf()
		a := newNode(t, s, stored.Defaults(), 1)
		var keys []session.Key
		for i := range 26 {
			keys = append(keys, a.create(string(rune('A'+i))))
		}
		s.mu.Lock()
		clear(s.items)
		s.mu.Unlock()
		for _, k := range keys {
			a.commit(a.change(k, "n", "1"), core.Async)
		}
		time.Sleep(time.Minute)
		for _, k := range keys {
			if r := s.record(t, k); text(r, "n") != "1" || r.Created == 0 {
				t.Errorf("stored: %v", r)
			}
		}
		if a.asked > 3 {
			t.Errorf("the host was asked %d times for all its sessions", a.asked)
		}
	})
}

// A change of a session that nobody has is no success.
func TestChangeOfNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newNode(t, newShelf(), stored.Defaults(), 1)
		k := session.Key{Context: "localhost/", ID: strings.Repeat("A", 32)}
		err := a.m.Commit(t.Context(), session.AppendBatch(nil, &session.Record{Key: k, Attrs: map[string]session.Entry{"x": {Value: []byte{1}, Version: session.Version{Counter: 1}}}}), core.Acked)
		if err == nil || errors.Is(err, channel.ErrClosed) {
			t.Errorf("commit: %v", err)
		}
		if st, _ := a.m.Status(t.Context()); st.Sessions != 0 {
			t.Errorf("status %+v", st)
		}
	})
}

// Stop while the store is down waits as long as it may, says what it leaves, and
// lets nobody wait for ever.
func TestStopWithoutStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := newShelf(), stored.Defaults()
		c.Grace = time.Hour
		a := newNode(t, s, c, 1)
		k := a.create("A")
		s.break_(errors.New("refused"))
		done := make(chan error, 1)
		go func() {
			done <- a.m.Commit(context.Background(), session.AppendBatch(nil, a.change(k, "n", "1")), core.Acked)
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		start := time.Now()
		if err := a.m.Stop(ctx); err == nil || !strings.Contains(err.Error(), "1 sessions") || time.Since(start) != 5*time.Second {
			t.Errorf("stop after %v: %v", time.Since(start), err)
		}
		if err := <-done; !errors.Is(err, channel.ErrClosed) {
			t.Errorf("the request that waited: %v", err)
		}
	})
}

// A node that stops, or dies, leaves no other with an old copy.
func TestOthersHearOfTheLastChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf()
		a, b := newNode(t, s, stored.Defaults(), 1), newNode(t, s, stored.Defaults(), 2)
		meet(a, b)
		k := a.create("A")
		b.open(k)
		a.commit(a.change(k, "n", "1"), core.Async)
		if err := a.m.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := b.sees(k, "n"); got != "1" {
			t.Errorf("after a stop the other node sees n=%s", got)
		}
		// c saves, and dies before it tells.
		c := newNode(t, s, stored.Defaults(), 3)
		c.open(k)
		c.commit(c.change(k, "n", "2"), core.Acked)
		if got := b.sees(k, "n"); got != "1" {
			t.Fatalf("c is not known to b, which sees n=%s", got)
		}
		b.m.HandleView(t.Context(), channel.View{})
		time.Sleep(time.Second)
		if got := b.sees(k, "n"); got != "2" {
			t.Errorf("after the view change the other node sees n=%s", got)
		}
	})
}

// A notice that comes while the session is being loaded is not lost.
func TestNoticeDuringLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &fickle{shelf: newShelf()}
		a, b := newNode(t, s, stored.Defaults(), 1), newNode(t, s, stored.Defaults(), 2)
		meet(a, b)
		k := a.create("A")
		old, _, _ := s.shelf.Load(t.Context(), k)
		first := true
		s.set(func(it *core.StoreItem, _ *bool) error {
			if first { // this answer is on its way while the other node writes
				first = false
				s.mu.Unlock()
				a.commit(a.change(k, "n", "1"), core.Synced)
				s.mu.Lock()
				*it = old
			}
			return nil
		}, nil)
		b.open(k)
		if got := b.sees(k, "n"); got != "1" {
			t.Errorf("it loads n=%s after n=1 was acknowledged", got)
		}
	})
}

// history runs random operations of three nodes over one store that fails now
// and then, while nodes die and are replaced. What was acknowledged must be
// there in the end, and what has ended must stay so.
func history(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	s := &fickle{shelf: newShelf()}
	c := stored.Defaults()
	c.OnFailure = stored.Fail // what is acknowledged is stored
	c.Parallel = 1 + r.IntN(4)
	c.NoticeBytes = []int{0, 4096}[r.IntN(2)]
	if r.IntN(2) == 0 {
		c.Delay = time.Duration(r.IntN(50)) * time.Millisecond
	}
	const nodes = 3
	var mu sync.Mutex // guards what follows
	next := byte(nodes)
	all := make([]*node, nodes)
	var keys []session.Key
	type place struct {
		key  session.Key
		attr string
	}
	acked := map[place]int{}
	ending, ended := map[session.Key]bool{}, map[session.Key]bool{}
	for i := range all {
		all[i] = newNode(t, s, c, byte(i+1))
	}
	meet(all...)
	for i := range 4 {
		keys = append(keys, all[0].create(string(rune('A'+i))))
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for i := range all {
		r := rand.New(rand.NewPCG(seed, uint64(i)+2))
		wg.Go(func() {
			for n := 1; ; n++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(r.IntN(20)) * time.Millisecond):
				}
				mu.Lock()
				nd := all[i]
				mu.Unlock()
				k := keys[r.IntN(len(keys))]
				nd.mu.Lock()
				live := nd.live[k]
				if live != nil && live.End != session.Living {
					live = nil
				}
				nd.mu.Unlock()
				if live == nil {
					_, _ = nd.load(k)
					continue
				}
				switch p := r.IntN(100); {
				case p < 70:
					at := place{k, fmt.Sprint("of", nd.self.ID[0])}
					ch := nd.change(k, at.attr, fmt.Sprint(n))
					level := core.Acked + core.Level(r.IntN(2))
					if nd.m.Commit(t.Context(), session.AppendBatch(nil, ch), level) == nil {
						mu.Lock()
						acked[at] = n
						mu.Unlock()
					}
				case p < 85:
					_ = nd.m.Commit(t.Context(), session.AppendBatch(nil, &session.Record{Key: k, LastAccess: time.Now().UnixMilli()}), core.Async)
				case p < 98:
					if nd.m.Release(t.Context(), []session.Key{k}) == nil {
						nd.mu.Lock()
						delete(nd.live, k)
						nd.mu.Unlock()
					}
				default:
					mu.Lock()
					ending[k] = true
					mu.Unlock()
					tomb := &session.Record{Key: k, End: session.Invalidated, EndTime: time.Now().UnixMilli()}
					nd.mu.Lock()
					nd.live[k].Merge(tomb.Clone())
					nd.mu.Unlock()
					if nd.m.Commit(t.Context(), session.AppendBatch(nil, tomb), core.Synced) == nil {
						mu.Lock()
						ended[k] = true
						mu.Unlock()
					}
				}
			}
		})
	}
	for range 20 {
		time.Sleep(time.Duration(r.IntN(400)) * time.Millisecond)
		switch r.IntN(5) {
		case 0: // the store is down
			s.break_(errors.New("refused"))
			time.Sleep(time.Duration(r.IntN(3000)) * time.Millisecond)
			s.break_(nil)
		case 1: // it fails sometimes, also after it has done what was asked
			fr := rand.New(rand.NewPCG(seed, r.Uint64()))
			s.set(nil, func(bool) error {
				if fr.IntN(3) == 0 {
					return errors.New("connection reset")
				}
				return nil
			})
			time.Sleep(time.Duration(r.IntN(1000)) * time.Millisecond)
			s.set(nil, nil)
		case 2: // it is slow
			s.shelf.mu.Lock()
			s.delay = time.Duration(r.IntN(50)) * time.Millisecond
			s.shelf.mu.Unlock()
		case 3: // a node dies
			i := r.IntN(nodes)
			mu.Lock()
			dead := all[i]
			mu.Unlock()
			dead.mu.Lock()
			dead.dead = true
			dead.mu.Unlock()
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			_ = dead.m.Stop(gone)
			next++
			mu.Lock()
			all[i] = newNode(t, s, c, next)
			now := slices.Clone(all)
			mu.Unlock()
			meet(now...)
		case 4: // a node hears nothing for a while
			mu.Lock()
			nd := all[r.IntN(nodes)]
			mu.Unlock()
			freeze := func(b bool) { nd.mu.Lock(); nd.frozen = b; nd.mu.Unlock() }
			freeze(true)
			time.Sleep(time.Duration(r.IntN(2500)) * time.Millisecond)
			freeze(false)
		}
	}
	s.shelf.mu.Lock()
	s.delay = 0
	s.shelf.mu.Unlock()
	close(stop)
	wg.Wait()
	time.Sleep(time.Minute)
	for at, want := range acked {
		rec := s.record(t, at.key)
		switch {
		case ending[at.key] && (rec == nil || rec.End != session.Living):
		case rec == nil:
			t.Errorf("a session is not stored at all")
		default:
			var got int
			if _, err := fmt.Sscan(text(rec, at.attr), &got); err != nil || got < want {
				t.Errorf("%s %s: %d was acknowledged, %s is stored", at.key.ID[:1], at.attr, want, text(rec, at.attr))
			}
		}
	}
	for _, k := range keys {
		rec := s.record(t, k)
		if ended[k] && (rec == nil || rec.End == session.Living) {
			t.Errorf("%s has ended and is stored as %v", k.ID[:1], rec)
		}
		for i, nd := range all {
			nd.mu.Lock()
			live := nd.live[k]
			if live != nil && ended[k] && live.End == session.Living {
				t.Errorf("%s has ended and lives on node %d", k.ID[:1], i)
			}
			if live != nil && live.End == session.Living && rec != nil {
				for name := range rec.Attrs {
					if text(live, name) != text(rec, name) {
						t.Errorf("%s %s: node %d sees %s, stored is %s", k.ID[:1], name, i, text(live, name), text(rec, name))
					}
				}
			}
			nd.mu.Unlock()
		}
	}
	for i, nd := range all {
		if st, _ := nd.m.Status(t.Context()); !strings.HasPrefix(st.State, "the store works; 0 ") {
			t.Errorf("node %d: %s", i, st.State)
		}
	}
}

func TestHistories(t *testing.T) {
	seeds := 100
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { history(t, uint64(seed)) })
		})
		if t.Failed() {
			return
		}
	}
}
