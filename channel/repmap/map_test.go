package repmap

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
	"github.com/longhouse-go/longhouse/channel/rpc"
)

// one is a node with a map.
type one struct {
	*grouptest.Node
	m    *Map[string, string]
	dead bool
}

func mapOn(t testing.TB, n *grouptest.Node, c Config) *one {
	t.Helper()
	m, err := New[string, string](n.Channel, "m", c, channel.Settings{Metrics: n.Metrics})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	return &one{Node: n, m: m}
}

func (o *one) end(t testing.TB) {
	t.Helper()
	if o.dead {
		return
	}
	o.dead = true
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := o.m.Close(ctx); err != nil {
		t.Error(err)
	}
	o.StopNode(t)
}

// crash kills the node's machine, and then its map.
func (o *one) crash(t testing.TB, b *grouptest.Book) {
	o.dead = true
	o.Sim.Crash()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	b.Crash(t, o.Node)
	_ = o.m.Close(ctx)
}

type world struct {
	t     *testing.T
	nw    *channeltest.SimNet
	book  *grouptest.Book
	cfg   Config
	nodes []*one
	next  int
}

func (w *world) join() *one {
	w.next++
	n := w.book.Join(w.t, fmt.Sprint("n", w.next), w.nw.Node(fmt.Sprint("10.0.0.", w.next)))
	synctest.Wait() // until it sees the others
	o := mapOn(w.t, n, w.cfg)
	w.nodes = append(w.nodes, o)
	return o
}

func (w *world) alive() (all []*one) {
	for _, o := range w.nodes {
		if !o.dead {
			all = append(all, o)
		}
	}
	return all
}

// split cuts the network and the views.
func (w *world) split(groups ...[]*one) {
	grouptest.Partition(w.nw, w.book, groups...)
	synctest.Wait()
}

func (w *world) heal() {
	w.nw.Heal()
	w.book.Heal()
	synctest.Wait()
}

func (w *world) quiet() { time.Sleep(3 * time.Minute) }

// run runs f with n nodes that have a map.
func run(t *testing.T, c Config, n int, f func(t *testing.T, w *world)) {
	t.Helper()
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		w := &world{t: t, nw: nw, book: new(grouptest.Book), cfg: c}
		for range n {
			w.join()
		}
		time.Sleep(time.Second)
		f(t, w)
		for _, o := range w.nodes {
			o.end(t)
		}
	})
}

// verify is the invariant of every map after quiet: one record per key
// everywhere, one primary, which is there and has the value, and copies where
// they belong.
func (w *world) verify() {
	w.t.Helper()
	nodes := w.alive()
	if len(nodes) == 0 {
		return
	}
	here := map[channel.UniqueID]*one{}
	for _, o := range nodes {
		here[o.Local().ID] = o
	}
	first := nodes[0].m
	for _, o := range nodes[1:] {
		if got, want := o.m.Keys(), first.Keys(); !slices.Equal(got, want) {
			w.t.Errorf("%s has %q, %s has %q", o.Local().Name(), got, nodes[0].Local().Name(), want)
		}
	}
	for _, key := range first.Keys() {
		k, _ := first.k.Encode(key)
		want, _ := first.Where(key)
		prim := here[want.Primary]
		if prim == nil {
			w.t.Errorf("%q: the primary is not there", key)
			continue
		}
		text, ok, err := prim.m.Get(w.t.Context(), key)
		if !ok || err != nil {
			w.t.Errorf("%q: the primary has no value: %v", key, err)
		}
		holders := 0
		for _, o := range nodes {
			p, _ := o.m.Where(key)
			if p.Primary != want.Primary || p.Version != want.Version || p.Writer != want.Writer || !slices.Equal(p.Backups, want.Backups) {
				w.t.Errorf("%q: %s knows %+v, %s knows %+v", key, o.Local().Name(), p, nodes[0].Local().Name(), want)
			}
			if p.Here {
				holders++
				o.m.e.mu.Lock()
				r := o.m.e.get(string(k))
				o.m.e.mu.Unlock()
				if v, _ := o.m.v.Decode(r.Value); v != text {
					w.t.Errorf("%q: %s has %q, the primary %q", key, o.Local().Name(), v, text)
				}
			}
			if v, ok, err := o.m.Get(w.t.Context(), key); err != nil || !ok || v != text {
				w.t.Errorf("%q: %s reads %q %v %v, want %q", key, o.Local().Name(), v, ok, err, text)
			}
		}
		wantHolders := len(nodes)
		if w.cfg.Lazy {
			wantHolders = min(2, len(nodes))
		}
		if holders != wantHolders {
			w.t.Errorf("%q: %d nodes hold the value, want %d", key, holders, wantHolders)
		}
	}
}

func kinds(f func(t *testing.T, c Config), t *testing.T) {
	for _, lazy := range []bool{false, true} {
		t.Run(map[bool]string{false: "full", true: "lazy"}[lazy], func(t *testing.T) {
			c := DefaultConfig()
			c.Lazy = lazy
			f(t, c)
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPutGetDelete(t *testing.T) {
	kinds(func(t *testing.T, c Config) {
		run(t, c, 4, func(t *testing.T, w *world) {
			ctx := t.Context()
			for i := range 40 {
				must(t, w.nodes[i%4].m.Put(ctx, fmt.Sprint("k", i), fmt.Sprint("v", i)))
			}
			w.quiet()
			w.verify()
			if n := w.nodes[3].m.Len(); n != 40 {
				t.Errorf("%d entries", n)
			}
			// Overwritten elsewhere: the writer is the primary.
			must(t, w.nodes[2].m.Put(ctx, "k0", "new"))
			if v, ok, err := w.nodes[1].m.Get(ctx, "k0"); v != "new" || !ok || err != nil {
				t.Errorf("got %q %v %v", v, ok, err)
			}
			if p, _ := w.nodes[1].m.Where("k0"); p.Primary != w.nodes[2].Local().ID {
				t.Errorf("got %+v", p)
			}
			if had, err := w.nodes[3].m.Delete(ctx, "k0"); !had || err != nil {
				t.Errorf("got %v %v", had, err)
			}
			if had, err := w.nodes[0].m.Delete(ctx, "k0"); had || err != nil {
				t.Errorf("got %v %v", had, err)
			}
			for _, o := range w.nodes {
				if _, ok, err := o.m.Get(ctx, "k0"); ok || err != nil {
					t.Errorf("still there: %v %v", ok, err)
				}
			}
			w.verify()
		})
	}, t)
}

// What is there already is not sent again.
func TestUnchangedIsNotSent(t *testing.T) {
	kinds(func(t *testing.T, c Config) {
		run(t, c, 3, func(t *testing.T, w *world) {
			big := strings.Repeat("x", 200_000)
			must(t, w.nodes[0].m.Put(t.Context(), "k", big))
			w.quiet()
			var bytes atomic.Int64
			w.nw.Tap(func(p channeltest.Packet) { bytes.Add(int64(p.Length)) })
			for range 10 {
				must(t, w.nodes[0].m.Put(t.Context(), "k", big))
			}
			w.quiet()
			w.split(w.nodes[:2], w.nodes[2:])
			w.quiet()
			before := bytes.Load()
			w.heal()
			w.quiet()
			if !c.Lazy && bytes.Load()-before > 100_000 {
				t.Errorf("%d bytes after a split in which nothing was written", bytes.Load()-before)
			}
			if n := w.nodes[0].Count("repmap_unchanged_total"); n != 10 {
				t.Errorf("%v unchanged", n)
			}
			w.verify()
		})
	}, t)
}

func TestPrimaryDies(t *testing.T) {
	kinds(func(t *testing.T, c Config) {
		run(t, c, 4, func(t *testing.T, w *world) {
			for i := range 60 {
				must(t, w.nodes[i%4].m.Put(t.Context(), fmt.Sprint("k", i), fmt.Sprint("v", i)))
			}
			w.nodes[1].crash(t, w.book)
			w.quiet()
			if n := w.nodes[0].m.Len(); n != 60 {
				t.Errorf("%d entries are left", n)
			}
			w.verify()
			w.nodes[2].end(t) // leaves properly
			w.quiet()
			if n := w.nodes[0].m.Len(); n != 60 {
				t.Errorf("%d entries are left", n)
			}
			w.verify()
		})
	}, t)
}

func TestJoinDuringWrites(t *testing.T) {
	kinds(func(t *testing.T, c Config) {
		c.ChunkBytes = 2000
		run(t, c, 2, func(t *testing.T, w *world) {
			stop := make(chan struct{})
			done := make(chan int)
			writers := slices.Clone(w.nodes)
			go func() {
				i := 0
				for {
					select {
					case <-stop:
						done <- i
						return
					default:
					}
					if err := writers[i%2].m.Put(t.Context(), fmt.Sprint("k", i), strings.Repeat("v", 50)); err != nil {
						t.Error(err)
					}
					i++
					time.Sleep(3 * time.Millisecond)
				}
			}()
			time.Sleep(2 * time.Second)
			for range 2 {
				o := w.join()
				<-o.m.Ready()
				time.Sleep(time.Second)
			}
			close(stop)
			n := <-done
			w.quiet()
			if got := w.nodes[3].m.Len(); got != n {
				t.Errorf("%d entries, want %d", got, n)
			}
			if chunks := w.nodes[3].Count("repmap_transfer_chunks_total"); chunks < 20 {
				t.Errorf("only %v chunks", chunks)
			}
			w.verify()
		})
	}, t)
}

// The member that sends the state dies in the middle: another one goes on.
func TestTransferResumes(t *testing.T) {
	c := DefaultConfig()
	c.ChunkBytes = 1000
	run(t, c, 3, func(t *testing.T, w *world) {
		for i := range 500 {
			must(t, w.nodes[0].m.Put(t.Context(), fmt.Sprint("k", i), strings.Repeat("v", 100)))
		}
		w.quiet()
		var mu sync.Mutex
		sent := map[string]int{}
		w.nw.Tap(func(p channeltest.Packet) {
			mu.Lock()
			sent[p.From.Addr().String()] += p.Length
			mu.Unlock()
		})
		o := w.join()
		for o.m.Len() < 100 {
			time.Sleep(time.Millisecond)
		}
		// Who has sent most of it dies.
		asked := 0
		mu.Lock()
		for i, x := range w.nodes[:3] {
			if sent[x.Sim.IP()] > sent[w.nodes[asked].Sim.IP()] {
				asked = i
			}
		}
		mu.Unlock()
		w.nodes[asked].crash(t, w.book)
		<-o.m.Ready()
		if n := o.m.Len(); n != 500 {
			t.Errorf("ready with %d entries", n)
		}
		w.quiet()
		w.verify()
	})
}

func TestSplitAndHeal(t *testing.T) {
	kinds(func(t *testing.T, c Config) {
		run(t, c, 4, func(t *testing.T, w *world) {
			ctx := t.Context()
			for i := range 30 {
				must(t, w.nodes[i%4].m.Put(ctx, fmt.Sprint("k", i), "before"))
			}
			w.quiet()
			w.split(w.nodes[:2], w.nodes[2:])
			w.quiet()
			// Both sides write the same keys; one removes some.
			for i := range 10 {
				_ = w.nodes[0].m.Put(ctx, fmt.Sprint("k", i), "left")
			}
			time.Sleep(time.Second)
			for i := range 10 {
				_ = w.nodes[2].m.Put(ctx, fmt.Sprint("k", i+5), "right")
			}
			lazyLost := 0
			for i := 20; i < 25; i++ {
				had, _ := w.nodes[1].m.Delete(ctx, fmt.Sprint("k", i))
				if !had {
					lazyLost++
				}
			}
			w.quiet()
			w.heal()
			w.quiet()
			w.verify()
			for i, want := range map[int]string{0: "left", 4: "left", 5: "right", 9: "right", 14: "right", 15: "before"} {
				if v, _, err := w.nodes[3].m.Get(ctx, fmt.Sprint("k", i)); v != want {
					t.Errorf("k%d is %q (%v), want %q", i, v, err, want)
				}
			}
			if n := w.nodes[0].m.Len(); n != 25+lazyLost {
				t.Errorf("%d entries, want %d", n, 25+lazyLost)
			}
		})
	}, t)
}

func TestClaim(t *testing.T) {
	kinds(func(t *testing.T, c Config) {
		run(t, c, 4, func(t *testing.T, w *world) {
			must(t, w.nodes[0].m.Put(t.Context(), "k", "v"))
			for range 2 {
				for _, o := range w.nodes {
					v, ok, err := o.m.Claim(t.Context(), "k")
					if v != "v" || !ok || err != nil {
						t.Fatalf("got %q %v %v", v, ok, err)
					}
					if p, _ := o.m.Where("k"); p.Primary != o.Local().ID || !p.Here {
						t.Errorf("got %+v", p)
					}
					time.Sleep(time.Second)
					w.verify()
				}
			}
			if _, ok, err := w.nodes[0].m.Claim(t.Context(), "no"); ok || err != nil {
				t.Errorf("got %v %v", ok, err)
			}
		})
	}, t)
}

func TestChanges(t *testing.T) {
	c := DefaultConfig()
	run(t, c, 2, func(t *testing.T, w *world) {
		var got []string
		cancel := w.nodes[1].m.Watch(func(c Change[string, string]) { got = append(got, fmt.Sprint(c.Kind, " ", c.Key, " ", c.Value)) })
		must(t, w.nodes[0].m.Put(t.Context(), "a", "1"))
		must(t, w.nodes[1].m.Put(t.Context(), "a", "2"))
		_, _, err := w.nodes[0].m.Claim(t.Context(), "a")
		must(t, err)
		_, err = w.nodes[0].m.Delete(t.Context(), "a")
		must(t, err)
		synctest.Wait()
		cancel()
		must(t, w.nodes[0].m.Put(t.Context(), "b", "1"))
		if want := []string{"set a 1", "set a 2", "moved a 2", "removed a 2"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// Removals are forgotten after their time, and when there are too many.
func TestTombstones(t *testing.T) {
	c := DefaultConfig()
	c.TombstoneTTL, c.MaxTombstones = 10*time.Minute, 5
	run(t, c, 2, func(t *testing.T, w *world) {
		for i := range 10 {
			k := fmt.Sprint("k", i)
			must(t, w.nodes[0].m.Put(t.Context(), k, "v"))
			_, err := w.nodes[0].m.Delete(t.Context(), k)
			must(t, err)
		}
		for _, o := range w.nodes {
			if live, tombs := o.m.e.size(); live != 0 || tombs != 5 {
				t.Errorf("%d live, %d removals", live, tombs)
			}
			if n := o.Count("repmap_tombstones_dropped_total"); n != 5 {
				t.Errorf("%v dropped", n)
			}
		}
		time.Sleep(11 * time.Minute)
		for _, o := range w.nodes {
			if _, tombs := o.m.e.size(); tombs != 0 {
				t.Errorf("%d removals are left", tombs)
			}
		}
	})
}

func TestBounds(t *testing.T) {
	c := DefaultConfig()
	c.MaxEntries, c.MaxKey, c.MaxValue = 2, 10, 10
	run(t, c, 2, func(t *testing.T, w *world) {
		m := w.nodes[0].m
		if err := m.Put(t.Context(), strings.Repeat("k", 20), "v"); !errors.Is(err, channel.ErrTooLarge) {
			t.Errorf("got %v", err)
		}
		if err := m.Put(t.Context(), "k", strings.Repeat("v", 20)); !errors.Is(err, channel.ErrTooLarge) {
			t.Errorf("got %v", err)
		}
		must(t, m.Put(t.Context(), "a", "1"))
		must(t, m.Put(t.Context(), "b", "1"))
		if err := m.Put(t.Context(), "c", "1"); !errors.Is(err, ErrFull) {
			t.Errorf("got %v", err)
		}
		must(t, m.Put(t.Context(), "a", "2"))
		if _, err := New[string, string](w.nodes[0].Channel, "x", Config{}, channel.Settings{}); err == nil {
			t.Error("an empty configuration was accepted")
		}
	})
}

// Messages that are none, that come from another kind of map or that lie about
// sizes are refused and counted, and change nothing.
func TestHostileMessages(t *testing.T) {
	c := DefaultConfig()
	c.MaxKey, c.MaxValue = 100, 100
	run(t, c, 2, func(t *testing.T, w *world) {
		must(t, w.nodes[0].m.Put(t.Context(), "k", "v"))
		asker := w.nodes[0].m.e.rpc
		to := []channel.Member{w.nodes[1].Local()}
		id := channel.UniqueID{1}
		rec := func(key string, value []byte, counter uint64) record {
			return record{Key: key, Stamp: stamp{Counter: counter, Writer: id, Primary: id}, Has: true, Value: value}
		}
		send := func(m *message) error {
			b, err := encode(m)
			must(t, err)
			_, err = asker.Call(t.Context(), to, rpc.Bytes(b), rpc.First, 0)
			return err
		}
		for _, raw := range []string{"", "\xff", "\x80", strings.Repeat("\x81", 100), "\x9f\xff"} {
			if _, err := asker.Call(t.Context(), to, rpc.Bytes([]byte(raw)), rpc.First, 0); err == nil {
				t.Errorf("%q was accepted", raw)
			}
		}
		for _, m := range []*message{
			{}, {Op: ops}, {Op: opDigest, Digests: make([]uint64, 3)}, {Op: opList, Parts: []int{-1}}, {Op: opList, Parts: []int{parts}},
			{Op: opPut, Records: []record{{Key: "k", Stamp: stamp{Counter: 1}, Value: []byte("x")}}},
			{Op: opPut, Records: []record{{Key: "k", Stamp: stamp{Counter: 1}, Backups: make([]channel.UniqueID, 17)}}},
			{Op: opPut, Records: []record{{Key: "k"}}},
		} {
			if err := send(m); err == nil {
				t.Errorf("%+v was accepted", m)
			}
		}
		if n := w.nodes[1].Count("repmap_refused_total", "reason=malformed"); n != 13 {
			t.Errorf("%v malformed", n)
		}
		if err := send(&message{Op: opDigest, Lazy: true}); err == nil || w.nodes[1].Count("repmap_refused_total", "reason=kind") != 1 {
			t.Errorf("another kind of map: %v", err)
		}
		must(t, send(&message{Op: opPut, Records: []record{
			rec(strings.Repeat("k", 101), nil, 1), rec("a", make([]byte, 101), 1), rec("b", nil, 1<<63),
		}}))
		if n := w.nodes[1].Count("repmap_refused_total", "reason=too_large"); n != 3 {
			t.Errorf("%v too large", n)
		}
		w.verify()
		if n := w.nodes[1].m.Len(); n != 1 {
			t.Errorf("%d entries", n)
		}
	})
}

// The values that a member has are bounded in bytes, whoever has written them.
func TestMaxBytes(t *testing.T) {
	c := DefaultConfig()
	c.MaxBytes = 1000
	run(t, c, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		text := strings.Repeat("x", 400)
		for _, k := range []string{"a", "b"} {
			if err := a.m.Put(t.Context(), k, text); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.m.Put(t.Context(), "c", text); !errors.Is(err, ErrFull) {
			t.Errorf("got %v", err)
		}
		if err := a.m.Put(t.Context(), "a", text+text); !errors.Is(err, ErrFull) {
			t.Errorf("got %v", err)
		}
		if err := a.m.Put(t.Context(), "a", "small"); err != nil {
			t.Error(err)
		}
		if _, err := a.m.Delete(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		if err := b.m.Put(t.Context(), "c", text+text); err != nil {
			t.Errorf("there is room again: %v", err)
		}
		// What a member cannot keep is refused and counted there.
		b.m.e.mu.Lock()
		b.m.e.cfg.MaxBytes = 10_000
		b.m.e.mu.Unlock()
		_ = b.m.Put(t.Context(), "d", text)
		if n := a.Count("repmap_refused_total", "reason=full"); n == 0 {
			t.Error("nothing was refused")
		}
	})
}
