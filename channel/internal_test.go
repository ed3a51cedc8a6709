package channel

import (
	"context"
	"math"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestDedupeIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDedupe()
		for i := range 10_000 {
			s := d.sender(UniqueID{byte(i >> 8), byte(i), 1})
			for j := range 3 {
				k := d.key(&Message{ID: UniqueID{byte(j)}})
				if v, _ := s.begin(k); v != fresh {
					t.Fatalf("sender %d, message %d: verdict %d", i, j, v)
				}
				s.finish(k, nil)
			}
		}
		if n := len(d.senders); n != dedupeSenders {
			t.Errorf("%d senders are remembered", n)
		}
		s := d.sender(UniqueID{2})
		for i := range 3 * dedupeWindow {
			k := d.key(&Message{ID: UniqueID{byte(i >> 8), byte(i)}})
			s.begin(k)
			s.finish(k, &listenerError{ErrTooLarge})
		}
		if n := len(s.young) + len(s.old); n > 2*dedupeWindow || n < dedupeWindow {
			t.Errorf("%d messages are remembered", n)
		}
		if n := len(s.youngFailed) + len(s.oldFailed); n > 2*dedupeWindow {
			t.Errorf("%d failures are remembered", n)
		}
		for i := range dedupePending {
			s.begin(d.key(&Message{ID: UniqueID{byte(i >> 16), byte(i >> 8), byte(i), 1}}))
		}
		if v, _ := s.begin(d.key(&Message{ID: UniqueID{9, 9, 9, 9}})); v != untracked {
			t.Errorf("with too much pending the verdict is %d", v)
		}
		d.expire(time.Now())
		time.Sleep(dedupeIdle + time.Second)
		d.expire(time.Now())
		if n := len(d.senders); n != 1 {
			t.Errorf("%d senders are left, want the one with pending messages", n)
		}
	})
}

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		if g.enter() {
			t.Error("entered before open")
		}
		g.open()
		for range 2 {
			if !g.enter() {
				t.Fatal("refused")
			}
		}
		g.close()
		g.close()
		if g.enter() {
			t.Error("entered after close")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if g.wait(ctx) {
			t.Error("waited for nobody although two are inside")
		}
		go func() { time.Sleep(time.Second); g.leave(); g.leave() }()
		if !g.wait(t.Context()) {
			t.Error("did not wait to the end")
		}
	})
}

func TestIDsAreDistinct(t *testing.T) { // also where one random id ends and the next begins
	var g outgoing
	seen := map[UniqueID]bool{}
	for i := range 100_000 {
		if i == 50_000 {
			g.following = math.MaxUint32
		}
		var id UniqueID
		g.nextID(&id)
		if seen[id] {
			t.Fatalf("id %d appears twice", i)
		}
		seen[id] = true
		if id[6]>>4 != 4 || id[8]>>6 != 2 {
			t.Fatalf("id %v has wrong version bits", id)
		}
	}
	if g.following > 50_000 {
		t.Error("no new random id was taken")
	}
}

// A change that the first view already contains is not told again.
func TestWatcherSkipsWhatItHasSeen(t *testing.T) {
	var ws watchers
	var versions []uint64
	w := &watcher{call: func(v View, _ MemberEvent) { versions = append(versions, v.Version) }}
	ws.add(w, func() View { return View{Version: 5} })
	for _, v := range []uint64{4, 5, 6} {
		ws.notify(change{v: View{Version: v}})
	}
	if !slices.Equal(versions, []uint64{5, 6}) {
		t.Errorf("told versions %v", versions)
	}
}

type quiet struct{}

func (quiet) Start(context.Context) error                    { return nil }
func (quiet) Send(context.Context, *Message) error           { return nil }
func (quiet) Forget(Member)                                  {}
func (quiet) Stop(context.Context) error                     { return nil }
func (quiet) Listen(context.Context) (netip.AddrPort, error) { return netip.AddrPort{}, nil }

type quietReceiver struct{ quiet }

func (quietReceiver) Start(context.Context, func(context.Context, *Message) error) error { return nil }

func TestMembersAreBounded(t *testing.T) { // HB-18
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics()
		c, err := New(Config{Sender: quiet{}, Receiver: quietReceiver{}}, Settings{Metrics: m})
		if err != nil {
			t.Fatal(err)
		}
		if c.coord.limit != 4096 {
			t.Errorf("the limit is %d", c.coord.limit)
		}
		c.coord.limit = 100
		if err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		member := func(i int) Member {
			return Member{ID: UniqueID{byte(i >> 8), byte(i), 1}, Host: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), Port: 4000}
		}
		for i := range 10_000 {
			c.coord.Observe(MemberEvent{Kind: MemberAdded, Member: member(i)})
		}
		synctest.Wait()
		if n := len(c.View().Members); n != 100 {
			t.Errorf("%d members", n)
		}
		if n := c.coord.refusedFull.Value(); n != 9900 {
			t.Errorf("%d refused", n)
		}
		c.coord.Observe(MemberEvent{Kind: MemberLost, Member: member(1)})
		c.coord.Observe(MemberEvent{Kind: MemberAdded, Member: member(5000)})
		synctest.Wait()
		if v := c.View(); len(v.Members) != 100 || !v.Has(member(5000)) {
			t.Error("the room of a lost member was not given to another")
		}
		if err := c.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
