package attributes

import (
	"bytes"
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

	"github.com/fxamacker/cbor/v2"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
)

const shop = "localhost/shop"

// node is a member of the group with a store.
type node struct {
	*grouptest.Node
	store *Store
	shop  *Attributes
	dead  bool
}

type world struct {
	t     *testing.T
	nw    *channeltest.SimNet
	book  *grouptest.Book
	cfg   Config
	nodes []*node
}

func run(t *testing.T, c Config, n int, f func(t *testing.T, w *world)) {
	t.Helper()
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		w := &world{t: t, nw: nw, book: new(grouptest.Book), cfg: c}
		for range n {
			w.join()
		}
		w.ready()
		f(t, w)
		for _, n := range w.nodes {
			n.stop(t)
		}
	})
}

func (w *world) join() *node {
	i := len(w.nodes) + 1
	g := w.book.Join(w.t, fmt.Sprint("n", i), w.nw.Node(fmt.Sprint("10.0.0.", i)))
	s, err := New(w.cfg, g.Channel, channel.Settings{Name: "n", Metrics: g.Metrics})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := s.Start(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	n := &node{Node: g, store: s, shop: s.Context(shop, true, Limits{})}
	w.nodes = append(w.nodes, n)
	return n
}

func (w *world) ready() {
	for _, n := range w.nodes {
		if !n.dead {
			<-n.store.Ready()
		}
	}
}

func (n *node) stop(t *testing.T) {
	if n.dead {
		return
	}
	n.dead = true
	if err := n.store.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	n.StopNode(t)
}

func (w *world) kill(n *node) {
	n.dead = true
	n.Sim.Crash()
	w.book.Crash(w.t, n.Node)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = n.store.Stop(ctx)
}

func (w *world) split(groups ...[]*node) {
	grouptest.Partition(w.nw, w.book, groups...)
	synctest.Wait()
}

func (w *world) heal() {
	w.nw.Heal()
	w.book.Heal()
	time.Sleep(3 * time.Minute)
}

func set(t testing.TB, a *Attributes, name string, value any) {
	t.Helper()
	if err := a.Set(context.Background(), name, value); err != nil {
		t.Fatal(err)
	}
}

// content is all attributes for comparing.
func content(t testing.TB, a *Attributes) string {
	t.Helper()
	var out []string
	for _, name := range a.Names() {
		var v any
		if ok, err := a.Get(name, &v); err != nil || !ok {
			t.Fatalf("%q: %v %v", name, ok, err)
		}
		out = append(out, fmt.Sprintf("%s=%v", name, v))
	}
	return strings.Join(out, " ")
}

func same(t testing.TB, want string, all ...*Attributes) {
	t.Helper()
	for i, a := range all {
		if got := content(t, a); got != want {
			t.Errorf("node %d has %q, want %q", i+1, got, want)
		}
	}
}

type price struct{ Euro int }

func TestAllNodesHaveWhatIsSet(t *testing.T) {
	run(t, Config{}, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0].shop, w.nodes[1].shop, w.nodes[2].shop
		set(t, a, "motd", "hello")
		same(t, "motd=hello", a, b, c) // at once
		if err := Attr[price]("price").Set(t.Context(), b, price{3}); err != nil {
			t.Fatal(err)
		}
		if p, ok, err := Attr[price]("price").Get(c); p.Euro != 3 || !ok || err != nil {
			t.Errorf("got %v %v %v", p, ok, err)
		}
		set(t, c, "motd", "closed")
		if err := Attr[price]("price").Delete(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		same(t, "motd=closed", a, b, c)
		// Tomcat's bug 57425: setting nil removes, and removes nothing twice.
		for range 2 {
			set(t, b, "motd", nil)
			same(t, "", a, b, c)
		}
		if ok, err := a.Get("motd", new(string)); ok || err != nil {
			t.Errorf("got %v %v", ok, err)
		}
	})
}

// Contexts do not see each other, and one that is not distributable keeps to
// its node.
func TestContextsAreApart(t *testing.T) {
	run(t, Config{}, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		otherA, otherB := a.store.Context("localhost/", true, Limits{}), b.store.Context("localhost/", true, Limits{})
		loneA, loneB := a.store.Context(shop, false, Limits{}), b.store.Context(shop, false, Limits{})
		set(t, a.shop, "x", 1)
		set(t, otherA, "x", 2)
		set(t, loneA, "x", 3)
		same(t, "x=1", a.shop, b.shop)
		same(t, "x=2", otherA, otherB)
		same(t, "x=3", loneA)
		same(t, "", loneB)
		list, total := a.store.List(100)
		want := []Info{{"localhost/", "x", 1, true}, {shop, "x", 1, true}, {shop, "x", 1, false}}
		if slices.SortFunc(list, func(x, y Info) int { return strings.Compare(fmt.Sprint(x), fmt.Sprint(y)) }); total != 3 || len(list) != 3 {
			t.Errorf("list: %v of %d", list, total)
		}
		for _, i := range want {
			if !slices.Contains(list, i) {
				t.Errorf("list: %v, want %v", list, want)
			}
		}
		if list, total := a.store.List(1); len(list) != 1 || total != 3 {
			t.Errorf("list: %v of %d", list, total)
		}
	})
}

// What one node set is there when that node has died, for those who were there
// and for those who come later, before they are ready.
func TestDeathAndJoin(t *testing.T) {
	run(t, Config{}, 3, func(t *testing.T, w *world) {
		for i := range 300 {
			set(t, w.nodes[0].shop, fmt.Sprintf("a%03d", i), i)
		}
		want := content(t, w.nodes[0].shop)
		w.kill(w.nodes[0])
		same(t, want, w.nodes[1].shop, w.nodes[2].shop)
		late := w.join()
		<-late.store.Ready()
		same(t, want, late.shop)
		w.kill(w.nodes[1])
		w.kill(w.nodes[2])
		same(t, want, late.shop)
		set(t, late.shop, "a000", nil)
	})
}

// A node may set attributes while it is starting: it finds the group first, so
// what it sets is later than what was there.
func TestSetWhileStarting(t *testing.T) {
	run(t, Config{}, 1, func(t *testing.T, w *world) {
		set(t, w.nodes[0].shop, "x", "old")
		late := w.join()
		set(t, late.shop, "x", "new")
		w.ready()
		same(t, "x=new", w.nodes[0].shop, late.shop)

		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := w.join().shop.Set(ctx, "x", 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// On both sides of a split attributes go on; afterwards the later change of each
// stays, deletions included.
func TestSplitAndHeal(t *testing.T) {
	run(t, Config{}, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		for _, name := range []string{"both", "deleted", "revived", "left", "right"} {
			set(t, a.shop, name, "before")
		}
		w.split([]*node{a}, []*node{b, c})
		set(t, a.shop, "both", "first")
		set(t, a.shop, "left", "a")
		set(t, a.shop, "revived", nil)
		time.Sleep(time.Second)
		set(t, b.shop, "both", "second")
		set(t, c.shop, "right", "c")
		set(t, c.shop, "revived", "again")
		set(t, b.shop, "deleted", nil)
		w.heal()
		same(t, "both=second left=a revived=again right=c", a.shop, b.shop, c.shop)
	})
}

// A value of a type that only a newer version knows is kept and passed on by
// nodes that do not.
func TestUnknownTypes(t *testing.T) {
	run(t, Config{}, 2, func(t *testing.T, w *world) {
		type future struct {
			Grid  [2][2]float64
			Extra cbor.Tag
		}
		v := future{Extra: cbor.Tag{Number: 4711, Content: "?"}}
		v.Grid[1][0] = 0.5
		set(t, w.nodes[0].shop, "x", v)
		if ok, err := w.nodes[1].shop.Get("x", new(int)); !ok || err == nil || !strings.Contains(err.Error(), `"x"`) {
			t.Errorf("got %v %v", ok, err)
		}
		w.kill(w.nodes[0])
		late := w.join()
		<-late.store.Ready()
		got, ok, err := Attr[future]("x").Get(late.shop)
		if !ok || err != nil || got.Grid != v.Grid || got.Extra.Number != 4711 {
			t.Errorf("got %v %v %v", got, ok, err)
		}
	})
}

// A new version of the application has what the old one set, the watchers of
// the old one hear nothing any more.
func TestNextVersion(t *testing.T) {
	run(t, Config{}, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0].shop, w.nodes[1].shop
		old := 0
		a.Watch(func(Change) { old++ })
		set(t, b, "x", 1)
		synctest.Wait()
		next := a.Again()
		a.Close()
		same(t, "x=1", next)
		heard := 0
		next.Watch(func(Change) { heard++ })
		set(t, b, "x", 2)
		synctest.Wait()
		if old != 1 || heard != 1 {
			t.Errorf("the old version heard %d changes, the new one %d", old, heard)
		}
	})
}

func TestWatch(t *testing.T) {
	run(t, Config{}, 2, func(t *testing.T, w *world) {
		lone := w.nodes[0].store.Context("lone", false, Limits{})
		for _, c := range []struct{ set, watched *Attributes }{{w.nodes[0].shop, w.nodes[0].shop}, {w.nodes[0].shop, w.nodes[1].shop}, {lone, lone}} {
			var mu sync.Mutex
			var heard []string
			cancel := c.watched.Watch(func(ch Change) {
				var v any
				_, _ = c.watched.Get(ch.Name, &v)
				mu.Lock()
				defer mu.Unlock()
				heard = append(heard, fmt.Sprintf("%s %v", ch.Name, ch.Deleted))
				if ch.Name == "x" && len(heard) == 1 {
					go func() { _ = c.watched.Set(context.Background(), "nested", true) }()
				}
			})
			set(t, c.set, "x", 1)
			synctest.Wait()
			set(t, c.set, "x", 1) // the same
			set(t, c.set, "x", 2)
			set(t, c.set, "x", nil)
			synctest.Wait()
			cancel()
			set(t, c.set, "x", 3)
			synctest.Wait()
			mu.Lock()
			if got := strings.Join(heard, ", "); got != "x false, nested false, x false, x true" {
				t.Errorf("heard %s", got)
			}
			mu.Unlock()
			set(t, c.set, "x", nil)
			set(t, c.set, "nested", nil)
		}
	})
}

// A watcher of local attributes may set some itself, and may panic.
func TestWatcherSets(t *testing.T) {
	a := Local("x")
	var heard []string
	a.Watch(func(c Change) {
		heard = append(heard, c.Name)
		if c.Name == "one" {
			set(t, a, "two", 2)
		}
		if c.Name == "bad" {
			panic("bad")
		}
	})
	set(t, a, "one", 1)
	func() {
		defer func() { _ = recover() }()
		set(t, a, "bad", 1)
	}()
	set(t, a, "three", 3)
	if got := strings.Join(heard, " "); got != "one two bad three" {
		t.Errorf("heard %s", got)
	}
}

// Each refusal has an error and a counter.
func TestBounds(t *testing.T) {
	run(t, Config{MaxCount: 20, MaxSize: 10_000}, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		for _, replicated := range []bool{true, false} {
			few := a.store.Context(fmt.Sprint("few", replicated), replicated, Limits{MaxCount: 2, MaxSize: 5_000})
			set(t, few, "x", 1)
			set(t, few, "y", 1)
			set(t, few, "y", 2) // one that is there
			big := few.Set(t.Context(), "x", make([]byte, 5_000))
			for what, err := range map[string]error{
				"no name":    few.Set(t.Context(), "", 1),
				"long name":  few.Set(t.Context(), strings.Repeat("x", 1025), 1),
				"not a name": few.Set(t.Context(), "\xff", 1),
				"too many":   few.Set(t.Context(), "z", 1),
				"too big":    big,
			} {
				if !errors.Is(err, ErrTooLarge) {
					t.Errorf("%s: %v", what, err)
				}
			}
			many := a.store.Context(fmt.Sprint("many", replicated), replicated, Limits{})
			set(t, many, "first", make([]byte, 8_000))
			if err := many.Set(t.Context(), "second", make([]byte, 2_000)); !errors.Is(err, ErrFull) {
				t.Errorf("full: %v", err)
			}
			set(t, many, "first", nil)
			for i := range 18 {
				set(t, many, fmt.Sprint(i), i)
			}
			if err := many.Set(t.Context(), "more", 1); !errors.Is(err, ErrFull) {
				t.Errorf("full: %v", err)
			}
			for _, name := range many.Names() {
				set(t, many, name, nil)
			}
			set(t, many, "more", 1)
		}
		for reason, want := range map[string]float64{"name": 6, "count": 2, "size": 2, "full": 4} {
			if got := a.Count("context_attributes_refused_total", "reason="+reason); got != want {
				t.Errorf("%s: %v refused, want %v", reason, got, want)
			}
		}
		// What others hold is bounded as well.
		if _, total := b.store.List(0); total != 3 {
			t.Errorf("the other node has %d", total)
		}
	})
}

// A node that does not answer holds up a change for a second, and has it later.
func TestSilentNode(t *testing.T) {
	run(t, Config{}, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		w.nw.Partition([]string{a.Sim.IP()}, []string{b.Sim.IP()}) // the views stay
		start := time.Now()
		set(t, a.shop, "x", 1)
		if took := time.Since(start); took > 1500*time.Millisecond {
			t.Errorf("took %v", took)
		}
		if n := a.Count("context_attributes_unconfirmed_total"); n != 1 {
			t.Errorf("%v unconfirmed", n)
		}
		same(t, "", b.shop)
		w.nw.Heal()
		time.Sleep(time.Minute)
		same(t, "x=1", b.shop)
	})
}

// A node whose only peer is silent is ready after a minute, and has what the
// peer has when it answers.
func TestSilentPeerAtTheStart(t *testing.T) {
	run(t, Config{}, 1, func(t *testing.T, w *world) {
		set(t, w.nodes[0].shop, "x", 1)
		w.nw.Isolate(w.nodes[0].Sim.IP())
		start := time.Now()
		late := w.join()
		<-late.store.Ready()
		if took := time.Since(start); took < transferTime || took > 2*transferTime {
			t.Errorf("ready after %v", took)
		}
		same(t, "", late.shop)
		set(t, late.shop, "y", 2)
		w.nw.Heal()
		time.Sleep(time.Minute)
		same(t, "x=1 y=2", late.shop, w.nodes[0].shop)
	})
}

func TestStopped(t *testing.T) {
	run(t, Config{}, 1, func(t *testing.T, w *world) {
		n := w.nodes[0]
		set(t, n.shop, "x", 1)
		for range 2 {
			if err := n.store.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if err := n.shop.Set(t.Context(), "x", 2); !errors.Is(err, ErrStopped) {
			t.Errorf("got %v", err)
		}
		if err := n.shop.Delete(t.Context(), "x"); !errors.Is(err, ErrStopped) {
			t.Errorf("got %v", err)
		}
		unstarted, err := New(Config{}, n.Channel, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		if err := unstarted.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Whatever nodes do, and whatever happens to them, in the end all have the same.
func TestConverge(t *testing.T) {
	seeds := 20
	if testing.Short() {
		seeds = 4
	}
	for seed := range seeds {
		run(t, Config{}, 3, func(t *testing.T, w *world) {
			rnd := rand.New(rand.NewPCG(uint64(seed), 0))
			for range 60 {
				n := w.nodes[rnd.IntN(len(w.nodes))]
				name := fmt.Sprint("a", rnd.IntN(4))
				switch k := rnd.IntN(20); {
				case n.dead:
				case k == 0 && len(w.nodes) < 6:
					w.join()
				case k == 1 && !w.nodes[2].dead && n != w.nodes[0]:
					w.kill(n)
				case k == 2:
					var left, right []*node
					for i, x := range w.nodes {
						if x.dead {
							continue
						}
						if i%2 == 0 {
							left = append(left, x)
						} else {
							right = append(right, x)
						}
					}
					w.split(left, right)
				case k == 3:
					w.nw.Heal()
					w.book.Heal()
				default:
					// A node that has joined in a split may reach nobody yet.
					ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
					var v any
					if k > 8 {
						v = rnd.IntN(1000)
					}
					if err := n.shop.Set(ctx, name, v); err != nil && !errors.Is(err, context.DeadlineExceeded) {
						t.Error(err)
					}
					cancel()
				}
				time.Sleep(time.Duration(rnd.IntN(2000)) * time.Millisecond)
			}
			w.heal()
			w.ready()
			want := content(t, w.nodes[0].shop)
			for i, n := range w.nodes {
				if !n.dead && content(t, n.shop) != want {
					t.Errorf("seed %d: node %d has %q, node 1 %q", seed, i+1, content(t, n.shop), want)
				}
			}
		})
	}
}

// Many set the same attributes at the same time; all agree afterwards, and each
// value is one that somebody has set.
func TestParallel(t *testing.T) {
	run(t, Config{}, 3, func(t *testing.T, w *world) {
		var wg sync.WaitGroup
		for i, n := range w.nodes {
			for j := range 4 {
				wg.Go(func() {
					for k := range 20 {
						set(t, n.shop, fmt.Sprint("a", k%5), fmt.Sprint(i, j, k))
						_ = n.shop.Names()
					}
				})
			}
		}
		wg.Wait()
		time.Sleep(time.Minute)
		want := content(t, w.nodes[0].shop)
		same(t, want, w.nodes[1].shop, w.nodes[2].shop)
		if len(w.nodes[0].shop.Names()) != 5 {
			t.Errorf("%s", want)
		}
	})
}

// Local attributes are a map.
func TestLocalModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, model := Local("x"), map[string]string{}
		heard := map[string]bool{}
		a.Watch(func(c Change) { heard[c.Name] = true })
		for range rapid.IntRange(1, 50).Draw(t, "steps") {
			name := rapid.StringMatching(`[a-d]`).Draw(t, "name")
			if rapid.Bool().Draw(t, "delete") {
				_ = a.Set(context.Background(), name, nil)
				delete(model, name)
			} else {
				v := rapid.String().Draw(t, "value")
				if err := a.Set(context.Background(), name, v); err != nil {
					t.Fatal(err)
				}
				model[name] = v
			}
		}
		if len(a.Names()) != len(model) {
			t.Fatalf("names %v, want %v", a.Names(), model)
		}
		for name, want := range model {
			if got, ok, err := Attr[string](name).Get(a); got != want || !ok || err != nil || !heard[name] {
				t.Fatalf("%s: %q %v %v", name, got, ok, err)
			}
		}
	})
}

// Keys come from other nodes.
func FuzzDecodeKey(f *testing.F) {
	f.Add([]byte("localhost/shop\x00name"))
	f.Add([]byte("localhost/shop\x00"))
	f.Add([]byte("\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := decodeKey(b)
		if err != nil {
			return
		}
		if again, _ := keyCodec.Encode(k); !bytes.Equal(again, b) {
			t.Errorf("%q became %q", b, again)
		}
	})
}

func ExampleAttr() {
	ctx := context.Background()
	a := Local("localhost/shop") // in a handler: core.FromContext(r.Context()).Context().Attributes()
	const motd = Attr[string]("motd")
	if err := motd.Set(ctx, a, "closed on Monday"); err != nil {
		fmt.Println(err)
	}
	text, ok, err := motd.Get(a)
	fmt.Println(text, ok, err)
	// Output: closed on Monday true <nil>
}
