package stored_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shelf is a store in memory that can be made to fail.
type shelf struct {
	mu    sync.Mutex
	items map[session.Key]core.StoreItem
	n     int
	fail  error
	delay time.Duration
	saves int
}

func newShelf() *shelf { return &shelf{items: map[session.Key]core.StoreItem{}} }

func (s *shelf) enter(ctx context.Context) (func(), error) {
	s.mu.Lock()
	d, err := s.delay, s.fail
	s.mu.Unlock()
	if d > 0 && !channel.Pause(ctx, d) {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	return s.mu.Unlock, nil
}

func (s *shelf) break_(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *shelf) Load(ctx context.Context, key session.Key) (core.StoreItem, bool, error) {
	out, err := s.enter(ctx)
	if err != nil {
		return core.StoreItem{}, false, err
	}
	defer out()
	it, ok := s.items[key]
	if ok && !it.Expires.IsZero() && !it.Expires.After(time.Now()) {
		return core.StoreItem{}, false, nil
	}
	it.Data = slices.Clone(it.Data)
	return it, ok, nil
}

func (s *shelf) Save(ctx context.Context, key session.Key, item core.StoreItem, prev core.StoreVersion) (core.StoreVersion, error) {
	out, err := s.enter(ctx)
	if err != nil {
		return "", err
	}
	defer out()
	if s.items[key].Version != prev {
		return "", core.ErrStoreConflict
	}
	s.n++
	s.saves++
	item.Version, item.Data = core.StoreVersion(fmt.Sprint(s.n)), slices.Clone(item.Data)
	s.items[key] = item
	return item.Version, nil
}

func (s *shelf) Touch(ctx context.Context, key session.Key, expires time.Time) error {
	out, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer out()
	if it, ok := s.items[key]; ok {
		it.Expires = expires
		s.items[key] = it
	}
	return nil
}

func (s *shelf) Delete(ctx context.Context, key session.Key) error {
	out, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer out()
	delete(s.items, key)
	return nil
}

func (s *shelf) List(ctx context.Context, limit int, each func(session.Key)) error {
	out, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer out()
	for k := range s.items {
		if limit--; limit < 0 {
			break
		}
		each(k)
	}
	return nil
}

func (s *shelf) Close() error { return nil }

func (s *shelf) record(t *testing.T, key session.Key) *session.Record {
	t.Helper()
	it, ok, err := s.Load(t.Context(), key)
	if err != nil || !ok {
		return nil
	}
	var r *session.Record
	if err := session.DecodeBatch(it.Data, func(x *session.Record) error { r = x.Clone(); return nil }); err != nil {
		t.Fatal(err)
	}
	return r
}

// node is the host of one manager, with the live sessions of its table.
type node struct {
	t     *testing.T
	m     *stored.Manager
	self  channel.Member
	peers map[channel.UniqueID]*node

	mu      sync.Mutex
	live    map[session.Key]*session.Record
	counter uint64
	opening map[session.Key][]*session.Record // what came while it was loaded
	asked   int
	frozen  bool
	dead    bool
}

func member(n byte) channel.Member {
	return channel.Member{ID: channel.UniqueID{n}, Port: 4000 + int(n)}
}

func newNode(t *testing.T, s core.Store, c stored.Config, n byte) *node {
	m, err := stored.New(c, s, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	nd := &node{t: t, m: m, self: member(n), peers: map[channel.UniqueID]*node{}, live: map[session.Key]*session.Record{}, opening: map[session.Key][]*session.Record{}}
	if err := m.Start(t.Context(), nd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_ = m.Stop(ctx)
	})
	return nd
}

// meet makes nodes members of one group.
func meet(nodes ...*node) {
	for _, n := range nodes {
		var v channel.View
		for _, o := range nodes {
			if o != n {
				n.mu.Lock()
				n.peers[o.self.ID] = o
				n.mu.Unlock()
				v.Members = append(v.Members, o.self)
			}
		}
		n.m.HandleView(context.Background(), v)
	}
}

func (n *node) Send(ctx context.Context, to []channel.Member, _ channel.Options, body []byte) error {
	var faults []channel.Fault
	for _, a := range to {
		n.mu.Lock()
		p := n.peers[a.ID]
		n.mu.Unlock()
		p.mu.Lock()
		frozen, dead := p.frozen, p.dead
		p.mu.Unlock()
		if dead {
			faults = append(faults, channel.Fault{Member: a, Err: errors.New("refused")})
			continue
		}
		if frozen {
			<-ctx.Done()
			faults = append(faults, channel.Fault{Member: a, Err: ctx.Err()})
			continue
		}
		done := make(chan error, 1)
		p.m.HandleMessage(ctx, n.self, slices.Clone(body), func(err error) { done <- err })
		if err := <-done; err != nil {
			faults = append(faults, channel.Fault{Member: a, Err: err})
		}
	}
	if len(faults) > 0 {
		return &channel.SendError{Faults: faults}
	}
	return nil
}

func (n *node) Update(batch []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := session.DecodeBatch(batch, func(r *session.Record) error {
		if have := n.live[r.Key]; have != nil {
			have.Merge(r.Clone())
		} else if part, ok := n.opening[r.Key]; ok {
			n.opening[r.Key] = append(part, r.Clone())
		}
		return nil
	}); err != nil {
		n.t.Error(err)
	}
}

func (n *node) Resync(ctx context.Context) error {
	n.mu.Lock()
	n.asked++
	var batch []byte
	for _, r := range n.live {
		batch = session.AppendBatch(batch, r)
	}
	n.mu.Unlock()
	return n.m.Commit(ctx, batch, core.Async)
}

func (n *node) create(id string) session.Key {
	k := session.Key{Context: "localhost/", ID: strings.Repeat(id, 32)}
	n.mu.Lock()
	n.counter++
	r := &session.Record{Key: k, Created: time.Now().UnixMilli(), LastAccess: time.Now().UnixMilli(), MaxInactive: time.Hour,
		MaxInactiveVersion: session.Version{Counter: n.counter, Node: uint64(n.self.ID[0])}}
	n.live[k] = r.Clone()
	n.mu.Unlock()
	n.commit(r, core.Synced)
	return k
}

func (n *node) commit(r *session.Record, level core.Level) {
	n.t.Helper()
	if err := n.m.Commit(n.t.Context(), session.AppendBatch(nil, r), level); err != nil {
		n.t.Errorf("commit: %v", err)
	}
}

// change returns a change of one attribute, already made in the table.
func (n *node) change(k session.Key, name, value string) *session.Record {
	b, err := session.Encode(value)
	if err != nil {
		n.t.Fatal(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.counter = max(n.counter, n.live[k].Counter()) + 1
	r := &session.Record{Key: k, Attrs: map[string]session.Entry{name: {Value: b, Version: session.Version{Counter: n.counter, Node: uint64(n.self.ID[0])}}}}
	n.live[k].Merge(r.Clone())
	return r
}

func (n *node) open(k session.Key) *session.Record {
	n.t.Helper()
	r, err := n.load(k)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

// load makes a session live, as a table does.
func (n *node) load(k session.Key) (*session.Record, error) {
	n.mu.Lock()
	n.opening[k] = []*session.Record{}
	n.mu.Unlock()
	r, err := n.m.Load(n.t.Context(), k)
	n.mu.Lock()
	defer n.mu.Unlock()
	meanwhile := n.opening[k]
	delete(n.opening, k)
	if err == nil && r != nil && r.End == session.Living {
		live := r.Clone()
		for _, part := range meanwhile {
			live.Merge(part)
		}
		n.live[k] = live
	}
	return r, err
}

func text(r *session.Record, name string) string {
	if r == nil {
		return "no session"
	}
	e, ok := r.Attrs[name]
	if !ok || e.Deleted {
		return "not set"
	}
	var s string
	if err := session.Decode(e.Value, &s); err != nil {
		return err.Error()
	}
	return s
}

func (n *node) sees(k session.Key, name string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return text(n.live[k], name)
}

func TestChangesMeet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf()
		a, b := newNode(t, s, stored.Defaults(), 1), newNode(t, s, stored.Defaults(), 2)
		meet(a, b)
		k := a.create("A")
		a.commit(a.change(k, "x", "1"), core.Synced)
		if got := text(b.open(k), "x"); got != "1" {
			t.Fatalf("loaded %q", got)
		}
		// Both know the session at the same state and change it.
		for i := range 50 {
			ra, rb := a.change(k, "a", fmt.Sprint(i)), b.change(k, "b", fmt.Sprint(i))
			var wg sync.WaitGroup
			wg.Go(func() { a.commit(ra, core.Synced) })
			wg.Go(func() { b.commit(rb, core.Synced) })
			wg.Wait()
			for _, n := range []*node{a, b} {
				if n.sees(k, "a") != fmt.Sprint(i) || n.sees(k, "b") != fmt.Sprint(i) {
					t.Fatalf("round %d: node %d sees a=%s b=%s", i, n.self.ID[0], n.sees(k, "a"), n.sees(k, "b"))
				}
			}
		}
		r := s.record(t, k)
		if text(r, "a") != "49" || text(r, "b") != "49" || text(r, "x") != "1" {
			t.Errorf("stored: %v", r)
		}
		// The end wins over a change that comes late.
		late := b.change(k, "b", "late")
		a.commit(&session.Record{Key: k, End: session.Invalidated, EndTime: time.Now().UnixMilli()}, core.Synced)
		b.commit(late, core.Synced)
		if r := s.record(t, k); r == nil || r.End != session.Invalidated {
			t.Errorf("stored after the end: %v", r)
		}
		b.mu.Lock()
		if b.live[k].End != session.Invalidated {
			t.Error("the other node's table has not been told of the end")
		}
		b.mu.Unlock()
	})
}

func TestLargeChangesAreFetched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf()
		a, b := newNode(t, s, stored.Defaults(), 1), newNode(t, s, stored.Defaults(), 2)
		meet(a, b)
		k := a.create("A")
		b.open(k)
		big := strings.Repeat("x", 100_000)
		a.commit(a.change(k, "big", big), core.Synced)
		if got := b.sees(k, "big"); got != big {
			t.Errorf("the other node sees %d bytes", len(got))
		}
	})
}

func TestStoreDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf()
		a := newNode(t, s, stored.Defaults(), 1)
		k := a.create("A")
		s.break_(errors.New("refused"))
		start := time.Now()
		for i := range 100 {
			a.commit(a.change(k, "n", fmt.Sprint(i)), core.Synced)
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("100 requests took %v while the store was down", took)
		}
		st, _ := a.m.Status(t.Context())
		if !st.Ready || !strings.Contains(st.State, "refused") {
			t.Errorf("status %+v", st)
		}
		if r := a.open(k); text(r, "n") != "99" {
			t.Errorf("the node that has the session loads n=%s", text(r, "n"))
		}
		if err := a.m.Release(t.Context(), []session.Key{k}); err == nil {
			t.Error("a session that is not stored is released")
		}
		// It comes back empty.
		s.mu.Lock()
		clear(s.items)
		s.mu.Unlock()
		s.break_(nil)
		time.Sleep(10 * time.Second)
		if r := s.record(t, k); text(r, "n") != "99" || r.Created == 0 {
			t.Errorf("after recovery: %v", r)
		}
	})
}

func TestStoreDownAndFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := newShelf(), stored.Defaults()
		c.OnFailure = stored.Fail
		a := newNode(t, s, c, 1)
		k := a.create("A")
		s.break_(errors.New("refused"))
		if err := a.m.Commit(t.Context(), session.AppendBatch(nil, a.change(k, "n", "1")), core.Acked); err == nil {
			t.Error("a commit succeeded without the store")
		}
		if err := a.m.Commit(t.Context(), session.AppendBatch(nil, a.change(k, "n", "2")), core.Async); err != nil {
			t.Errorf("an asynchronous commit: %v", err)
		}
		s.break_(nil)
		time.Sleep(10 * time.Second)
		if got := text(s.record(t, k), "n"); got != "2" {
			t.Errorf("stored n=%s", got)
		}
	})
}

func TestWriteBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := newShelf(), stored.Defaults()
		c.Delay = time.Second
		a := newNode(t, s, c, 1)
		k := a.create("A")
		before := s.saves
		for i := range 100 {
			a.commit(a.change(k, "n", fmt.Sprint(i)), core.Async)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(5 * time.Second)
		if got := text(s.record(t, k), "n"); got != "99" {
			t.Errorf("stored n=%s", got)
		}
		if n := s.saves - before; n != 1 {
			t.Errorf("%d writes of 100 changes in a tenth of a second", n)
		}
		// A request that waits is not held up by the delay.
		a.commit(a.change(k, "n", "x"), core.Async)
		start := time.Now()
		a.commit(a.change(k, "n", "y"), core.Acked)
		if took := time.Since(start); took > 100*time.Millisecond || text(s.record(t, k), "n") != "y" {
			t.Errorf("waited %v, stored n=%s", took, text(s.record(t, k), "n"))
		}
	})
}

func TestFrozenMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf()
		a, b := newNode(t, s, stored.Defaults(), 1), newNode(t, s, stored.Defaults(), 2)
		meet(a, b)
		k := a.create("A")
		b.open(k)
		b.mu.Lock()
		b.frozen = true
		b.mu.Unlock()
		start := time.Now()
		for i := range 100 {
			a.commit(a.change(k, "n", fmt.Sprint(i)), core.Synced)
		}
		if took := time.Since(start); took > 1500*time.Millisecond {
			t.Errorf("100 requests took %v while a member was frozen", took)
		}
		b.mu.Lock()
		b.frozen = false
		b.mu.Unlock()
		time.Sleep(10 * time.Second)
		if got := b.sees(k, "n"); got != "99" {
			t.Errorf("after it woke up it sees n=%s", got)
		}
	})
}

func TestPendingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := newShelf(), stored.Defaults()
		c.MaxPending = 10
		a := newNode(t, s, c, 1)
		a.create("A")
		s.break_(errors.New("refused"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var err error
		n := 0
		for ; n < 100 && err == nil; n++ {
			err = a.m.Commit(ctx, session.AppendBatch(nil, &session.Record{
				Key: session.Key{Context: "localhost/", ID: fmt.Sprintf("%032X", n)}, Created: 1, LastAccess: time.Now().UnixMilli()}), core.Async)
		}
		if !errors.Is(err, channel.ErrQueueFull) || n != 11 {
			t.Errorf("commit %d: %v", n, err)
		}
	})
}

func TestDamagedItem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf()
		a := newNode(t, s, stored.Defaults(), 1)
		k := a.create("A")
		if err := a.m.Release(t.Context(), []session.Key{k}); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		it := s.items[k]
		it.Data = it.Data[:len(it.Data)/2]
		s.items[k] = it
		s.mu.Unlock()
		if r := a.open(k); r != nil {
			t.Errorf("half a record was loaded as %v", r)
		}
	})
}
