package events

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

const shop = "localhost/shop"

// store is a manager that all nodes share, as one with a database does. It tells
// the tables of changes, or nobody.
type store struct {
	core.Manager
	mu      sync.Mutex
	records map[session.Key]*session.Record
	down    bool
	tell    []*table.Table
}

func (m *store) set(f func(*store)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(m)
}

var errDown = errors.New("the store is down")

func (m *store) Commit(_ context.Context, batch []byte, _ core.Level) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down {
		return errDown
	}
	for _, t := range m.tell {
		t.Update(batch)
	}
	return session.DecodeBatch(batch, func(r *session.Record) error {
		if old := m.records[r.Key]; old != nil {
			old.Merge(r.Clone())
		} else {
			m.records[r.Key] = r.Clone()
		}
		return nil
	})
}

func (m *store) Load(_ context.Context, key session.Key) (*session.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down {
		return nil, errDown
	}
	if r := m.records[key]; r != nil && (r.End == session.Living || r.End == session.Renewed) {
		return r.Clone(), nil
	}
	return nil, nil
}

func (m *store) Release(context.Context, []session.Key) error { return nil }

// node is a member of the group with an engine that has one context.
type node struct {
	*grouptest.Node
	w      *world
	relay  *Relay
	table  *table.Table
	engine *core.Engine
	dead   bool

	mu    sync.Mutex
	heard []core.SessionEvent
}

func (n *node) SessionEvent(e core.SessionEvent) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.heard = append(n.heard, e)
}

// take returns what was heard since the last time.
func (n *node) take() []core.SessionEvent {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := n.heard
	n.heard = nil
	return list
}

type world struct {
	t     *testing.T
	nw    *channeltest.SimNet
	book  *grouptest.Book
	store *store
	cfg   Config
	table table.Config
	nodes []*node
}

// run runs f with as many nodes that listen to everything, everywhere.
func run(t *testing.T, c table.Config, n int, f func(t *testing.T, w *world)) {
	t.Helper()
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		w := newWorld(t, nw, c)
		for range n {
			w.join(core.AllSessionEvents)
		}
		w.settle()
		f(t, w)
		w.stop()
	})
}

func newWorld(t *testing.T, nw *channeltest.SimNet, c table.Config) *world {
	c.LoadTimeout = 5 * time.Second
	return &world{t: t, nw: nw, book: new(grouptest.Book), store: &store{records: map[session.Key]*session.Record{}}, table: c}
}

func (w *world) join(cluster core.SessionEventKind) *node {
	i := len(w.nodes) + 1
	n := &node{Node: w.book.Join(w.t, fmt.Sprint("n", i), w.nw.Node(fmt.Sprint("10.0.0.", i))), w: w}
	s := channel.Settings{Name: "n", Metrics: n.Metrics}
	n.relay = New(w.cfg, core.NewCluster(n.Channel, s), func(string) *table.Table { return n.table }, s)
	c := w.table
	c.Manager, c.Relay, c.RenewGrace = w.store, n.relay, -1
	n.table = table.New(c, s)
	var err error
	n.engine, err = core.NewEngine(core.EngineOptions{Name: "e", Hosts: []core.HostOptions{{Name: "localhost", Contexts: []core.ContextOptions{{
		Path: "/shop", Sessions: n.table, Handler: http.NotFoundHandler(), Distributable: true,
		Listeners: []core.SessionListening{{Listener: n}}, ClusterEvents: cluster,
	}}}}}, s)
	for _, start := range []func() error{
		func() error { return err },
		func() error { return n.relay.Start(w.t.Context()) },
		func() error { return n.table.Start(w.t.Context(), uint64(i)) },
		func() error { return n.engine.Start(w.t.Context()) },
	} {
		if err := start(); err != nil {
			w.t.Fatal(err)
		}
	}
	w.nodes = append(w.nodes, n)
	return n
}

// settle lets messages arrive.
func (w *world) settle() { w.pause(3 * time.Second) }

func (w *world) pause(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (w *world) stop() {
	for _, n := range w.nodes {
		n.stop()
	}
}

func (n *node) stop() {
	if n.dead {
		return
	}
	n.dead = true
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := errors.Join(n.engine.Stop(ctx), n.table.Stop(ctx), n.relay.Stop(ctx)); err != nil {
		n.w.t.Error(err)
	}
	n.StopNode(n.w.t)
}

// kill ends a node without a word; what it has not committed is lost.
func (n *node) kill() {
	n.dead = true
	n.w.book.Crash(n.w.t, n.Node)
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	_ = n.relay.Stop(ctx)
	_ = n.engine.Stop(context.Background())
	n.w.store.set(func(m *store) { m.down = true })
	_ = n.table.Stop(ctx)
	n.w.store.set(func(m *store) { m.down = false })
}

func (w *world) split(groups ...[]*node) {
	grouptest.Partition(w.nw, w.book, groups...)
}

func (w *world) heal() {
	w.nw.Heal()
	w.book.Heal()
}

func (n *node) create(life time.Duration) core.Handle {
	n.w.t.Helper()
	h, err := n.table.Create(n.w.t.Context(), shop, session.NewOptions{MaxInactive: life})
	if err != nil {
		n.w.t.Fatal(err)
	}
	return h
}

// use finds a session, does something to it and commits it.
func (n *node) use(key session.Key, f func(h core.Handle) error) {
	n.w.t.Helper()
	h, err := n.table.Find(n.w.t.Context(), key)
	if err != nil || h == nil {
		n.w.t.Fatal("no session", h, err)
	}
	n.finish(h, f)
}

func (n *node) finish(h core.Handle, f func(h core.Handle) error) {
	n.w.t.Helper()
	if err := f(h); err != nil {
		n.w.t.Fatal(err)
	}
	if err := h.Commit(n.w.t.Context(), core.Synced); err != nil {
		n.w.t.Fatal(err)
	}
	h.Release()
}

func nothing(core.Handle) error { return nil }

// brief is what was heard, in a few words.
func brief(list []core.SessionEvent) string {
	var out []string
	for _, e := range list {
		s := e.Kind.String()
		if e.Local {
			s += " here"
		}
		if e.Existing {
			s += " before"
		}
		if e.Kind&core.AttributeEvents != 0 {
			var v string
			_ = session.Decode(e.Value, &v)
			s += " " + e.Name + "=" + v
		}
		switch e.Reason {
		case session.Expired:
			s += " expired"
		case session.Invalidated:
			s += " invalidated"
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

func (n *node) expect(want string) []core.SessionEvent {
	n.w.t.Helper()
	list := n.take()
	if got := brief(list); got != want {
		n.w.t.Errorf("%s heard\n%s, want\n%s", n.Local().Name(), got, want)
	}
	return list
}

// Whatever one node does the others hear, once, if they have asked for it; also
// what became of sessions that are not in their tables. Who has not asked hears
// nothing, and gets no messages.
func TestEveryNodeHears(t *testing.T) {
	run(t, table.Config{}, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		deaf, ends := w.join(0), w.join(core.SessionDestroyed)
		w.settle()
		h := a.create(time.Hour)
		first := h.Key()
		a.finish(h, func(h core.Handle) error {
			return errors.Join(h.Set("x", "1"), h.Set("x", "2"), h.Renew(), h.Delete("x"), h.Set("y", "3"))
		})
		w.settle()
		a.expect("created here, attribute added here x=1, attribute replaced here x=2, renewed here, attribute removed here x=, attribute added here y=3")
		list := b.expect("created, attribute added x=1, attribute replaced x=2, renewed, attribute removed x=, attribute added y=3")
		now := h.Key()
		if list[0].Key != first || list[3].Previous != first || list[3].Key != now || list[5].Key != now || list[5].Version.Node != 1 || list[0].Time.IsZero() {
			t.Errorf("%+v", list)
		}
		a.use(now, core.Handle.Invalidate)
		w.settle()
		a.expect("destroyed here invalidated")
		b.expect("destroyed invalidated")
		ends.expect("destroyed invalidated")
		deaf.expect("")
		if got := deaf.Count("session_events_received_total"); got != 0 {
			t.Error(got, "events were sent to a node that does not listen")
		}
		if got := b.Count("session_events_repeated_total"); got != 0 {
			t.Error(got, "events came twice")
		}
		// What it does itself, it tells those who ask.
		h = deaf.create(time.Hour)
		deaf.finish(h, nothing)
		w.settle()
		deaf.expect("created here")
		a.expect("created")
		ends.expect("")
	})
}

// A session in the tables of several nodes that is invalidated on one of them,
// or expires, ends once on each.
func TestEndIsToldOnce(t *testing.T) {
	run(t, table.Config{TouchInterval: time.Second}, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		h := a.create(time.Minute)
		key := h.Key()
		a.finish(h, func(h core.Handle) error { return h.Set("x", "1") })
		w.settle()
		b.use(key, nothing)
		w.settle()
		a.expect("created here, attribute added here x=1")
		b.expect("created, attribute added x=1")
		c.take()
		b.use(key, core.Handle.Invalidate)
		w.settle()
		b.expect("destroyed here invalidated")
		list := a.expect("destroyed invalidated")
		var x string
		if ok, _ := list[0].Get("x", &x); !ok || x != "1" {
			t.Error("the attributes of a session in the table are not told", list[0])
		}
		c.expect("destroyed invalidated")
		// The manager tells it too: nobody hears it again.
		end := session.AppendBatch(nil, &session.Record{Key: key, End: session.Invalidated, EndTime: time.Now().UnixMilli()})
		a.table.Update(end)
		c.table.Update(end)
		w.pause(2 * time.Minute)
		a.expect("")
		b.expect("")
		c.expect("")

		h = a.create(time.Minute)
		key = h.Key()
		a.finish(h, nothing)
		b.use(key, nothing)
		w.settle()
		for _, n := range w.nodes {
			n.take()
		}
		w.pause(2 * time.Minute)
		a.expect("destroyed here expired") // in b it is the one of another node
		b.expect("destroyed expired")
		c.expect("destroyed expired")
	})
}

// The manager may be faster than the news: what a node did before the end is told
// before it all the same. If the node has died with its news, the end is told a
// little later, also to nodes that do not have the session.
func TestManagerIsFaster(t *testing.T) {
	run(t, table.Config{}, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		w.store.set(func(m *store) { m.tell = []*table.Table{a.table, b.table, c.table} })
		h := a.create(time.Hour)
		key := h.Key()
		a.finish(h, func(h core.Handle) error { return h.Set("x", "1") })
		w.settle()
		a.take()
		b.take()
		c.take()
		b.use(key, func(h core.Handle) error { return errors.Join(h.Set("x", "2"), h.Renew(), h.Set("y", "3")) })
		w.settle()
		a.expect("attribute replaced x=2, renewed, attribute added y=3")
		renewed := c.expect("attribute replaced x=2, renewed, attribute added y=3")
		key = renewed[1].Key
		a.use(key, nothing)
		w.settle()
		b.take()
		b.use(key, func(h core.Handle) error { return errors.Join(h.Delete("y"), h.Invalidate()) })
		w.settle()
		list := a.expect("attribute removed y=, destroyed invalidated")
		var x string
		if _, _ = list[1].Get("x", &x); x != "2" {
			t.Error("the last attributes:", list[1])
		}
		c.expect("attribute removed y=, destroyed invalidated")

		h = a.create(time.Hour)
		key = h.Key()
		a.finish(h, nothing)
		w.settle()
		b.use(key, nothing)
		w.settle()
		a.use(key, nothing)
		w.settle()
		a.take()
		c.take()
		w.nw.Isolate(b.Sim.IP())
		b.use(key, core.Handle.Invalidate)
		b.kill()
		w.pause(10 * time.Second)
		list = a.expect("destroyed invalidated")
		if list[0].Key != key {
			t.Error(list)
		}
		c.expect("destroyed invalidated")
		w.pause(2 * time.Hour)
		a.expect("")
		c.expect("")
	})
}

// Who joins hears of the sessions that are there, and of their end.
func TestJoin(t *testing.T) {
	run(t, table.Config{}, 1, func(t *testing.T, w *world) {
		a := w.nodes[0]
		var keys []session.Key
		for range 3000 {
			h := a.create(time.Hour)
			a.finish(h, nothing)
			keys = append(keys, h.Key())
		}
		b := w.join(core.AllSessionEvents)
		w.settle()
		list := b.take()
		seen := map[session.Key]bool{}
		for _, e := range list {
			if e.Kind != core.SessionCreated || !e.Existing || e.Local || seen[e.Key] {
				t.Fatalf("%+v", e)
			}
			seen[e.Key] = true
		}
		if len(seen) != len(keys) {
			t.Fatal(len(seen), "of", len(keys))
		}
		a.take()
		a.use(keys[0], core.Handle.Invalidate)
		w.settle()
		b.expect("destroyed invalidated")
	})
}

// The sessions of a node that has died end once on each living node: when they
// expire, whether the manager still has them or not. Those that somebody goes on
// using live on.
func TestOwnerDies(t *testing.T) {
	run(t, table.Config{TouchInterval: time.Second}, 4, func(t *testing.T, w *world) {
		a, rest := w.nodes[0], w.nodes[1:]
		var keys []session.Key
		for range 20 {
			h := a.create(10 * time.Minute)
			a.finish(h, nothing)
			keys = append(keys, h.Key())
		}
		forever := a.create(0)
		a.finish(forever, nothing)
		w.pause(5 * time.Minute)
		for _, key := range keys[10:] {
			a.use(key, nothing) // they end later than others know
		}
		w.settle()
		for _, n := range w.nodes {
			n.take()
		}
		a.kill()
		used, gone := keys[3], keys[5]
		w.store.set(func(m *store) { delete(m.records, gone) })
		w.pause(time.Minute)
		for _, n := range rest {
			n.expect("") // the time of none is over
		}
		rest[1].use(used, nothing)
		count := func() map[session.Key]int {
			ends := map[session.Key]int{}
			local := 0
			for _, n := range rest {
				for _, e := range n.take() {
					if e.Kind != core.SessionDestroyed || e.Reason != session.Expired {
						t.Errorf("%+v", e)
					}
					ends[e.Key]++
					if e.Local {
						local++
					}
				}
			}
			if local != len(ends) {
				t.Error(local, "ends were told as found out here, of", len(ends))
			}
			return ends
		}
		w.pause(5 * time.Minute) // 11 minutes after the first accesses
		early := count()
		w.pause(4*time.Minute + 50*time.Second)
		late := count()
		for i, key := range keys {
			e, l := 3, 0
			if key == used || i >= 10 {
				e, l = 0, 3
			}
			if key == used {
				l = 0
			}
			if early[key] != e || late[key] != l {
				t.Errorf("session %d: told %d times early and %d times late, want %d, %d", i, early[key], late[key], e, l)
			}
		}
		w.pause(5 * time.Minute)
		if ends := count(); len(ends) != 1 || ends[used] != 3 {
			t.Error("the session in use:", ends)
		}
		w.store.set(func(m *store) {
			if m.records[forever.Key()].End != session.Living {
				t.Error("a session that lives for ever has ended")
			}
		})
	})
}

// A session that has left the table because nobody uses it ends once, too, also
// for listeners that want to hear of this node only, and without a manager's
// answer nothing is told before there is one.
func TestReleased(t *testing.T) {
	for _, cluster := range []core.SessionEventKind{0, core.AllSessionEvents} {
		channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
			w := newWorld(t, nw, table.Config{IdleRelease: time.Minute, TouchInterval: time.Second})
			a, b := w.join(cluster), w.join(cluster)
			w.settle()
			expired, moved := a.create(10*time.Minute), a.create(10*time.Minute)
			a.finish(expired, nothing)
			a.finish(moved, nothing)
			w.pause(3 * time.Minute)
			if a.table.Len() != 0 {
				t.Fatal("sessions in use:", a.table.Len())
			}
			a.take()
			b.take()
			b.use(moved.Key(), nothing)
			w.pause(6 * time.Minute)
			w.store.set(func(m *store) { m.down = true })
			w.pause(2 * time.Minute)
			a.expect("")
			w.store.set(func(m *store) { m.down = false })
			w.pause(time.Minute)
			a.expect("destroyed here expired")
			if cluster != 0 {
				b.expect("destroyed expired")
			}
			w.pause(5 * time.Minute)
			for _, n := range w.nodes {
				list := n.take()
				if len(list) != 1 || list[0].Kind != core.SessionDestroyed || list[0].Key != moved.Key() {
					t.Errorf("%v: %s: %s", cluster, n.Local().Name(), brief(list))
				}
			}
			w.stop()
		})
	}
}

// Both sides of a split hear afterwards what there is, and of what ended on the
// other side, once.
func TestSplit(t *testing.T) {
	run(t, table.Config{TouchInterval: time.Second}, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		old := a.create(time.Hour)
		a.finish(old, nothing)
		ended := a.create(20 * time.Minute)
		a.finish(ended, nothing)
		w.settle()
		w.split([]*node{a, b}, []*node{c})
		w.settle()
		for _, n := range w.nodes {
			n.take()
		}
		h := c.create(time.Hour)
		c.finish(h, nothing)
		b.use(ended.Key(), core.Handle.Invalidate)
		w.settle()
		a.expect("destroyed invalidated")
		b.expect("destroyed here invalidated")
		c.expect("created here")
		w.heal()
		w.settle()
		a.expect("created before")
		b.expect("created before")
		c.expect("destroyed invalidated")
		w.pause(21 * time.Minute)
		c.expect("")
		a.expect("")
		a.use(old.Key(), core.Handle.Invalidate)
		w.settle()
		a.expect("destroyed here invalidated")
		c.expect("destroyed invalidated")
	})
}

// A queue to a member that does not answer is bounded; when it answers again it
// finds out what it has missed.
func TestOverflow(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		w := newWorld(t, nw, table.Config{TouchInterval: time.Second})
		w.cfg.Queue = 10
		a, b := w.join(core.AllSessionEvents), w.join(core.AllSessionEvents)
		w.settle()
		gone := a.create(10 * time.Minute)
		a.finish(gone, nothing)
		w.settle()
		b.take()
		nw.Partition([]string{a.Sim.IP()}, []string{b.Sim.IP()})
		a.use(gone.Key(), core.Handle.Invalidate)
		keys := map[session.Key]bool{}
		for range 100 {
			h := a.create(time.Hour)
			keys[h.Key()] = true
			a.finish(h, nothing)
		}
		if a.Count("session_events_unsent_total") == 0 || a.Count("session_events_send_waits_total") == 0 {
			t.Error("the queue has no bound")
		}
		nw.Heal()
		w.pause(time.Minute)
		for _, e := range b.take() {
			if e.Kind == core.SessionCreated {
				delete(keys, e.Key)
			}
		}
		if len(keys) != 0 {
			t.Error(len(keys), "sessions are not known")
		}
		w.pause(11 * time.Minute)
		if list := b.take(); len(list) != 0 {
			t.Error(brief(list)) // it was told as invalidated when b answered again, or is told now
		}
		w.stop()
	})
}

// replay is what a listener knows.
type replay struct {
	sessions map[session.Key]map[string]session.Entry
	broken   string
}

func (r *replay) take(list []core.SessionEvent) {
	for _, e := range list {
		attrs, there := r.sessions[e.Key]
		switch e.Kind {
		case core.SessionCreated:
			if there {
				r.broken = "created twice"
			}
			r.sessions[e.Key] = map[string]session.Entry{}
		case core.SessionDestroyed:
			if !there {
				r.broken = "destroyed twice, or unknown"
			}
			delete(r.sessions, e.Key)
		case core.SessionRenewed:
			old := r.sessions[e.Previous]
			delete(r.sessions, e.Previous)
			if there { // it was heard of under the new id before: the two are one
				for name, entry := range old {
					if attrs[name].Version.Less(entry.Version) {
						attrs[name] = entry
					}
				}
			} else {
				r.sessions[e.Key] = old
			}
		default:
			if !there {
				r.broken = "a change of an unknown session"
			} else if old := attrs[e.Name]; old.Version.Less(e.Version) {
				attrs[e.Name] = session.Entry{Value: e.Value, Version: e.Version}
			}
		}
	}
}

// Whatever is done on whichever node: what a listener has heard, played back, is
// what there is.
func TestReplay(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		nodes := rapid.IntRange(1, 3).Draw(rt, "nodes")
		type step struct{ node, what, session, attr int }
		steps := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) step {
			return step{rapid.IntRange(0, nodes-1).Draw(rt, "node"), rapid.IntRange(0, 9).Draw(rt, "what"),
				rapid.IntRange(0, 5).Draw(rt, "session"), rapid.IntRange(0, 2).Draw(rt, "attr")}
		}), 1, 40).Draw(rt, "steps")
		var failure string
		run(t, table.Config{TouchInterval: time.Second, IdleRelease: time.Minute}, nodes, func(t *testing.T, w *world) {
			w.store.set(func(m *store) {
				for _, n := range w.nodes {
					m.tell = append(m.tell, n.table)
				}
			})
			var keys []session.Key
			replays := make([]replay, nodes)
			for i := range replays {
				replays[i].sessions = map[session.Key]map[string]session.Entry{}
			}
			for i, s := range steps {
				n := w.nodes[s.node]
				attr := fmt.Sprint("a", s.attr)
				if s.what == 0 || len(keys) == 0 {
					h := n.create(10 * time.Minute)
					keys = append(keys, h.Key())
					n.finish(h, nothing)
					continue
				}
				at := s.session % len(keys)
				if s.what == 9 {
					w.pause(4 * time.Minute)
					continue
				}
				h, err := n.table.Find(t.Context(), keys[at])
				if err != nil || h == nil {
					continue // it has ended
				}
				n.finish(h, func(h core.Handle) error {
					switch s.what {
					case 1:
						return h.Invalidate()
					case 2:
						return h.Delete(attr)
					case 3:
						err := h.Renew()
						keys[at] = h.Key()
						return err
					case 4:
						return h.Update(attr, func(old []byte) ([]byte, error) { return session.Encode(fmt.Sprint(i, "+", len(old))) })
					}
					return h.Set(attr, fmt.Sprint(i))
				})
			}
			w.settle()
			// What there is, the store knows.
			want := map[session.Key]map[string]string{}
			w.store.set(func(m *store) {
				for key, r := range m.records {
					if r.End != session.Living {
						continue
					}
					want[key] = map[string]string{}
					for name, e := range r.Attrs {
						if !e.Deleted {
							want[key][name] = string(e.Value)
						}
					}
				}
			})
			for i, n := range w.nodes {
				r := &replays[i]
				r.take(n.take())
				got := map[session.Key]map[string]string{}
				for key, attrs := range r.sessions {
					got[key] = map[string]string{}
					for name, e := range attrs {
						if e.Value != nil {
							got[key][name] = string(e.Value)
						}
					}
				}
				if r.broken != "" || !maps.EqualFunc(got, want, maps.Equal) {
					failure = fmt.Sprintf("%s: %s\n got %v\nwant %v", n.Local().Name(), r.broken, got, want)
				}
			}
		})
		if failure != "" {
			rt.Fatal(failure)
		}
	})
}

var seeds = flag.Uint64("events.seeds", 15, "seeds of TestChaos")

// Whatever happens to nodes and network: in the end every node that lives has
// heard of each session once that it was made and once that it has ended, and
// nothing of it after that.
func TestChaos(t *testing.T) {
	n := *seeds
	if testing.Short() {
		n = 4
	}
	for seed := range n {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{Seed: seed + 1}, func(t *testing.T, nw *channeltest.SimNet) {
				rnd := rand.New(rand.NewPCG(seed, 1))
				w := newWorld(t, nw, table.Config{TouchInterval: time.Second, IdleRelease: time.Minute})
				w.cfg.Queue = 20
				for range 4 {
					w.join(core.AllSessionEvents)
				}
				w.settle()
				var keys []session.Key
				told := seed%2 == 0 // the manager tells of changes, or does not
				for range 120 {
					var living []*node
					for _, n := range w.nodes {
						if !n.dead {
							living = append(living, n)
						}
					}
					w.store.set(func(m *store) {
						m.tell = nil
						for _, n := range living {
							if told {
								m.tell = append(m.tell, n.table)
							}
						}
					})
					n := living[rnd.IntN(len(living))]
					switch what := rnd.IntN(30); {
					case what == 0 && len(living) > 2:
						n.kill()
					case what == 1 && len(w.nodes) < 7:
						w.join(core.AllSessionEvents)
					case what == 2:
						w.split(living[:len(living)/2], living[len(living)/2:])
						w.pause(time.Duration(rnd.IntN(200)) * time.Second)
					case what == 3:
						w.heal()
					case what < 6:
						w.pause(time.Duration(rnd.IntN(300)) * time.Second)
					case what < 12 || len(keys) == 0:
						h := n.create(10 * time.Minute)
						keys = append(keys, h.Key())
						n.finish(h, nothing)
					default:
						i := rnd.IntN(len(keys))
						h, err := n.table.Find(t.Context(), keys[i])
						if err != nil || h == nil {
							continue
						}
						n.finish(h, func(h core.Handle) error {
							var err error
							switch rnd.IntN(5) {
							case 0:
								err = h.Invalidate()
							case 1:
								err = h.Renew()
								keys[i] = h.Key()
							default:
								err = h.Set(fmt.Sprint(rnd.IntN(3)), rnd.IntN(100))
							}
							if errors.Is(err, session.ErrInvalid) {
								err = nil
							}
							return err
						})
					}
				}
				w.heal()
				w.pause(time.Hour)
				for _, n := range w.nodes {
					if n.dead {
						continue
					}
					open, ended := map[session.Key]bool{}, map[session.Key]bool{}
					for _, e := range n.take() {
						if ended[e.Key] {
							t.Errorf("%s: after the end: %s %s", n.Local().Name(), brief([]core.SessionEvent{e}), e.Key.ID[:4])
						}
						switch e.Kind {
						case core.SessionCreated:
							if open[e.Key] {
								t.Errorf("%s: made twice: %s", n.Local().Name(), e.Key.ID[:4])
							}
							open[e.Key] = true
						case core.SessionRenewed:
							delete(open, e.Previous)
							ended[e.Previous], open[e.Key] = true, true
						case core.SessionDestroyed:
							if !open[e.Key] {
								t.Errorf("%s: the end of an unknown session %s", n.Local().Name(), e.Key.ID[:4])
							}
							delete(open, e.Key)
							ended[e.Key] = true
						}
					}
					for key := range open {
						t.Errorf("%s: no end of %s", n.Local().Name(), key.ID[:4])
					}
				}
				w.stop()
			})
		})
	}
}

// Changes, expiry, renewals and listeners that use sessions themselves, all at
// once, get into nobody's way.
func TestParallel(t *testing.T) {
	run(t, table.Config{TouchInterval: time.Second}, 3, func(t *testing.T, w *world) {
		var wg sync.WaitGroup
		for i, n := range w.nodes {
			cancel := n.table.Watch("localhost/other", core.SessionWatch{Kinds: core.AllSessionEvents, Tell: func(core.SessionEvent, bool) {}, Room: func() {}})
			for j := range 8 {
				wg.Go(func() {
					for k := range 20 {
						h := n.create(time.Duration(1+k%3) * time.Second)
						key := h.Key()
						for range 5 {
							_ = h.Set("x", fmt.Sprint(i, j, k))
						}
						_ = h.Commit(t.Context(), core.Synced)
						h.Release()
						other := w.nodes[(i+1)%3]
						time.Sleep(time.Duration(k*100) * time.Millisecond)
						if h, _ := other.table.Find(t.Context(), key); h != nil {
							_ = h.Set("y", "1")
							if k%2 == 0 {
								_ = h.Invalidate()
							} else {
								_ = h.Renew()
							}
							_ = h.Commit(t.Context(), core.Async)
							h.Release()
						}
					}
				})
			}
			wg.Go(func() {
				for range 100 {
					time.Sleep(100 * time.Millisecond)
					cancel()
					cancel = n.table.Watch("localhost/other", core.SessionWatch{})
				}
				cancel()
			})
		}
		wg.Wait()
		w.pause(2 * time.Minute)
		for _, n := range w.nodes {
			r := replay{sessions: map[session.Key]map[string]session.Entry{}}
			r.take(n.take())
			if len(r.sessions) != 0 {
				t.Errorf("%s: %d sessions have not ended", n.Local().Name(), len(r.sessions))
			}
		}
	})
}

func FuzzMessage(f *testing.F) {
	e := core.SessionEvent{Kind: core.AttributeAdded, Key: session.Key{Context: shop, ID: "A"}, Name: "x", Value: []byte{1}, Time: time.UnixMilli(1)}
	f.Add(encode(&message{Kind: kindEvents, Number: 1, Contexts: []string{shop}, Events: []event{toWire(&e, time.Hour), {Kind: wireStart}, {Kind: wireEnd}}}))
	f.Add(encode(&message{Kind: kindAsk, Number: 2, Contexts: []string{shop}, Wants: []byte{63}}))
	f.Add([]byte{0xa1, 1, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		again, err := decode(encode(&m))
		if err != nil || again.Kind != m.Kind || again.Number != m.Number || !slices.Equal(again.Contexts, m.Contexts) || len(again.Events) != len(m.Events) {
			t.Fatal(again, err)
		}
		for i := range m.Events {
			if w := &m.Events[i]; w.Kind < wireStart {
				e := fromWire(w, m.Contexts[w.Context])
				if e.Key.ID == "" {
					t.Fatal(e)
				}
			}
		}
	})
}

// BenchmarkNoted is what a session of another node costs: time to note it, and
// memory for as long as it lives.
func BenchmarkNoted(b *testing.B) {
	r := New(Config{}, nil, func(string) *table.Table { return nil }, channel.Settings{})
	t := r.topic(shop)
	t.wants, t.known, t.ended = core.AllSessionEvents, map[string]entry{}, map[string]ending{}
	p := &peer{}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		e := core.SessionEvent{Kind: core.SessionCreated, Key: session.Key{Context: shop, ID: session.NewID()}}
		if !r.note(t, &e, p, time.Hour) {
			b.Fatal("known")
		}
		n++
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "B/session")
	runtime.KeepAlive(t)
}
