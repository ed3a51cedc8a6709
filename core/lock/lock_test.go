package lock

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

var key = session.Key{Context: "localhost/", ID: "ABCDEF0123456789ABCDEF0123456789"}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// One at a time, in the order of asking; the next one knows who was before.
func TestOneAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil, channel.Settings{})
		defer func() { _ = l.Stop(context.Background()) }()
		s := l.With(0)
		first := must(s.Lock(t.Context(), key))
		if _, fresh := first.Last(); fresh {
			t.Error("nobody was before")
		}
		var mu sync.Mutex
		var order []int
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				h := must(s.Lock(t.Context(), key))
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				if state, fresh := h.Last(); state.Counter != 7 || !fresh || h.Broken() != 0 {
					t.Error(state, fresh, h.Broken())
				}
				h.Unlock(core.SessionState{Counter: 7})
			})
			synctest.Wait()
		}
		if len(order) != 0 {
			t.Error("got it while it was held")
		}
		other := must(s.Lock(t.Context(), session.Key{Context: key.Context, ID: "OTHER"}))
		other.Unlock(core.SessionState{Counter: 1})
		first.Unlock(core.SessionState{Counter: 7})
		first.Unlock(core.SessionState{Counter: 9}) // does nothing
		wg.Wait()
		if !slices.IsSorted(order) || len(order) != 10 {
			t.Error(order)
		}
	})
}

// A lease ends: the next one gets the session, knows it, and the one before
// knows that it is too late. Whoever does not get it in time is told so.
func TestLeaseAndTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := channel.NewMetrics()
		l := New(Config{Queue: 1}, nil, channel.Settings{Metrics: m})
		defer func() { _ = l.Stop(context.Background()) }()
		s := l.With(10 * time.Second)
		first := must(s.Lock(t.Context(), key))
		start := time.Now()
		_, err := s.Lock(within(t, 3*time.Second), key)
		if !errors.Is(err, core.ErrLocked) || time.Since(start) != 3*time.Second {
			t.Error(err, time.Since(start))
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			h := must(s.Lock(within(t, time.Minute), key))
			if took := time.Since(start); took != 10*time.Second || h.Broken() != 1 {
				t.Error(took, h.Broken())
			}
			if first.Held(t.Context()) {
				t.Error("two have it")
			}
			if !h.Held(t.Context()) {
				t.Error("the lease of a waiting request began too early")
			}
			first.Unlock(core.SessionState{Counter: 5}) // too late to count
			h.Unlock(core.SessionState{Counter: 6})
		})
		synctest.Wait()
		if _, err := s.Lock(within(t, time.Minute), key); !errors.Is(err, core.ErrLocked) {
			t.Error("the queue is full, but:", err)
		}
		wg.Wait()
		h := must(s.Lock(t.Context(), key))
		if state, fresh := h.Last(); state.Counter != 6 || !fresh || h.Broken() != 0 {
			t.Error(state, fresh, h.Broken())
		}
		h.Unlock(core.SessionState{Counter: 6})
	})
}

// What is remembered of sessions is bounded.
func TestSessionsAreBounded(t *testing.T) {
	l := New(Config{MaxSessions: 10}, nil, channel.Settings{})
	defer func() { _ = l.Stop(context.Background()) }()
	s := l.With(0)
	var have []core.SessionLock
	for i := range 10 {
		must(s.Lock(t.Context(), session.Key{ID: fmt.Sprint("idle", i)})).Unlock(core.SessionState{Counter: 1})
	}
	for i := range 10 {
		have = append(have, must(s.Lock(t.Context(), session.Key{ID: fmt.Sprint(i)})))
	}
	if _, err := s.Lock(t.Context(), key); !errors.Is(err, core.ErrLocked) {
		t.Error(err)
	}
	if len(l.entries) != 10 {
		t.Error(len(l.entries))
	}
	for _, h := range have {
		h.Unlock(core.SessionState{Counter: 1})
	}
	must(s.Lock(t.Context(), key)).Unlock(core.SessionState{Counter: 1})
}

// The voters are spread evenly, keep their order, and few change with the view.
func TestVoters(t *testing.T) {
	local := channeltest.Member(1)
	var members []channel.Member
	for i := 2; i <= 5; i++ {
		members = append(members, channeltest.Member(i))
	}
	all := channel.NewView(1, local, members)
	fewer := channel.NewView(2, local, members[:3])
	other := channel.NewView(3, members[0], append([]channel.Member{local}, members[1:]...))
	count := map[channel.UniqueID]int{}
	for i := range 5000 {
		k := session.Key{Context: "localhost/", ID: fmt.Sprintf("%032X", i)}
		two := voters(all, k)
		if two[0].Is(two[1]) || voters(other, k) != two {
			t.Fatal("nodes do not agree")
		}
		count[two[0].ID]++
		count[two[1].ID]++
		now := voters(fewer, k)
		if gone := members[3]; !two[0].Is(gone) && !two[1].Is(gone) && now != two {
			t.Fatal("the voters changed, though both are there")
		}
		if !now[0].Is(two[0]) && !now[0].Is(two[1]) {
			t.Fatal("no voter is left")
		}
	}
	for id, n := range count {
		if n < 1700 || n > 2300 {
			t.Errorf("%v decides about %d sessions", id, n)
		}
	}
	alone := channel.NewView(1, local, nil)
	if two := voters(alone, key); !two[0].Is(local) || !two[1].Is(local) {
		t.Error(two)
	}
}

// A voter frees what a node had that has come back under its address, at once,
// and drops the requests of members that have gone.
func TestViewChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil, channel.Settings{})
		defer func() { _ = l.Stop(context.Background()) }()
		local, a, b := channeltest.Member(1), channeltest.Member(2), channeltest.Member(3)
		l.view = channel.NewView(1, local, []channel.Member{a, b})
		ask := func(m channel.Member, n uint64) waiter {
			l.heard(m)
			return waiter{grantee: grantee{m.ID, n}, member: m, lease: time.Minute, deadline: time.Now().Add(time.Hour)}
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.acquire(nil, key, ask(a, 1))
		l.acquire(nil, key, ask(b, 2))
		l.changeView(nil, channel.NewView(2, local, []channel.Member{a}))
		e := l.entries[key]
		if len(e.queue) != 0 || !e.held {
			t.Fatalf("%+v", e)
		}
		l.changeView(nil, channel.NewView(3, local, []channel.Member{b})) // a may be frozen
		out := l.acquire(nil, key, ask(b, 3))
		if len(out) != 0 || len(e.queue) != 1 {
			t.Fatal("a session was given away while it was held")
		}
		l.mu.Unlock()
		time.Sleep(term - time.Millisecond)
		l.mu.Lock()
		if l.acquire(nil, key, ask(b, 4)); !e.held || e.holder.node != a.ID {
			t.Fatal("a session was given away while its holder could still have it")
		}
		l.heard(a)
		again := a
		again.ID = channeltest.Member(4).ID
		out = l.changeView(nil, channel.NewView(4, local, []channel.Member{b, again}))
		if !slices.ContainsFunc(out, func(o answer) bool { return o.to.Is(b) && o.m.Kind == kindAnswer && o.m.Broken == 1 }) {
			t.Errorf("%+v", out)
		}
		if e.timer != nil {
			e.timer.Stop()
		}
	})
}

// A node that says nothing any more loses what it has, and its place in the
// queue; one that goes on to say that it is alive keeps both.
func TestSilentNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil, channel.Settings{})
		defer func() { _ = l.Stop(context.Background()) }()
		local, a, b := channeltest.Member(1), channeltest.Member(2), channeltest.Member(3)
		l.view = channel.NewView(1, local, []channel.Member{a, b})
		say := func(from channel.Member, m message) {
			m.Context, m.ID = key.Context, key.ID
			if err := l.handle(t.Context(), &channel.Message{From: from}, encode(&m)); err != nil {
				t.Error(err)
			}
		}
		holder := func() channel.UniqueID {
			l.mu.Lock()
			defer l.mu.Unlock()
			if e := l.entries[key]; e.held {
				return e.holder.node
			}
			return channel.UniqueID{}
		}
		ask := message{Kind: kindAcquire, Number: 1, Lease: 30_000, Wait: 60_000}
		say(a, ask)
		say(b, ask) // it waits
		for range 20 {
			time.Sleep(keepEvery)
			say(a, message{Kind: kindKeep})
			say(b, message{Kind: kindKeep})
			if holder() != a.ID {
				t.Fatal("a node that is alive lost its session")
			}
		}
		time.Sleep(term - time.Millisecond)
		if holder() != a.ID {
			t.Error("the node lost its session too early")
		}
		say(b, message{Kind: kindKeep})
		time.Sleep(2 * time.Millisecond)
		if e := l.entries[key]; holder() != b.ID || e.broken != 1 {
			t.Error("the session of a silent node is not free")
		}
		say(a, message{Kind: kindAcquire, Number: 2, Lease: 30_000, Wait: 60_000}) // it waits, and says nothing then
		for range 5 {
			time.Sleep(keepEvery)
			say(b, message{Kind: kindKeep})
		}
		say(b, message{Kind: kindRelease, Number: 1, Status: statusBroken})
		if e := l.entries[key]; holder() != (channel.UniqueID{}) || e.broken != 2 {
			t.Errorf("the session was given to a silent node, or its state is not told: %+v", e)
		}
	})
}

// A holder trusts a voter that it has heard of lately, asks again otherwise, and
// has lost its session after a silence in which the voter may have given it away,
// also if the voter is heard of again.
func TestHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil, channel.Settings{})
		defer func() { _ = l.Stop(context.Background()) }()
		local, voter := channeltest.Member(1), channeltest.Member(2)
		l.view = channel.NewView(1, local, []channel.Member{voter})
		hold := func(number uint64) *held {
			h := &held{l: l, key: key, until: time.Now().Add(time.Hour)}
			h.grant(voter, time.Now(), h.until, &message{}, number)
			return h
		}
		heard := func() {
			m := message{Kind: kindKept, Number: uint64(time.Since(l.born))}
			if err := l.handle(t.Context(), &channel.Message{From: voter}, encode(&m)); err != nil {
				t.Error(err)
			}
		}
		h := hold(1)
		if start := time.Now(); !h.Held(t.Context()) || time.Since(start) > 0 {
			t.Error("the voter has just granted it")
		}
		time.Sleep(fresh)
		time.AfterFunc(100*time.Millisecond, heard)
		if start := time.Now(); !h.Held(t.Context()) || time.Since(start) != 100*time.Millisecond {
			t.Errorf("reported after %v", time.Since(start))
		}
		time.Sleep(fresh)
		if h.Held(within(t, time.Millisecond)) {
			t.Error("nobody has confirmed it")
		}
		if start := time.Now(); h.Held(t.Context()) || time.Since(start) > term {
			t.Errorf("the voter is silent, reported after %v", time.Since(start))
		}
		heard()
		if h.Held(t.Context()) {
			t.Error("it may be another's")
		}
		if h = hold(2); !h.Held(t.Context()) {
			t.Error("granted anew")
		}
		h.Break()
	})
}

// A new voter believes what an old one says, and tells the holder.
func TestHolds(t *testing.T) {
	l := New(Config{}, nil, channel.Settings{})
	defer func() { _ = l.Stop(context.Background()) }()
	holder := channeltest.Member(2)
	m := message{Kind: kindHolds, Number: 9, Context: key.Context, ID: key.ID, Lease: 60_000, Counter: 4, Last: make([]byte, 16), Holder: holder.ID[:]}
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.holds(nil, &m, holder)
	if len(out) != 1 || out[0].m.Number != 9 || !out[0].to.Is(holder) {
		t.Errorf("%+v", out)
	}
	if e := l.entries[key]; !e.held || e.state.Counter != 4 {
		t.Errorf("%+v", e)
	}
}

func FuzzMessage(f *testing.F) {
	f.Add(encode(&message{Kind: kindAcquire, Number: 1, Context: "localhost/", ID: key.ID, Lease: 30000, Wait: 5000}))
	f.Add(encode(&message{Kind: kindAnswer, Number: 1, Status: statusGranted, Counter: 7, Last: make([]byte, 16)}))
	f.Add(encode(&message{Kind: kindHolds, Number: 1, ID: key.ID, Lease: 1, Holder: make([]byte, 16)}))
	f.Add(encode(&message{Kind: kindKeep, Number: 1 << 63}))
	f.Add(encode(&message{Kind: kindKept, Number: 1 << 63}))
	f.Add([]byte{0xa1, 1, 1})
	l := New(Config{MaxSessions: 100}, nil, channel.Settings{})
	f.Cleanup(func() { _ = l.Stop(context.Background()) })
	from := channel.Member{ID: channel.NewUniqueID(), Host: netip.MustParseAddr("10.0.0.9")}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		if n, err := decode(encode(&m)); err != nil || n.Kind != m.Kind || n.key() != m.key() {
			t.Fatal(n, err)
		}
		if err := l.handle(t.Context(), &channel.Message{From: from}, b); err != nil {
			t.Fatal(err)
		}
	})
}
