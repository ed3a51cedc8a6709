package core_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// watchedMemory is a memory with watches, whose events the test makes.
type watchedMemory struct {
	*memory
	mu      sync.Mutex
	watches map[string][]*core.SessionWatch
}

func newWatched() *watchedMemory {
	return &watchedMemory{memory: newMemory(), watches: map[string][]*core.SessionWatch{}}
}

func (m *watchedMemory) Watch(name string, w core.SessionWatch) func() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watches[name] = append(m.watches[name], &w)
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.watches[name] = slices.DeleteFunc(m.watches[name], func(o *core.SessionWatch) bool { return o == &w })
	}
}

func (m *watchedMemory) latest(name string) *core.SessionWatch {
	m.mu.Lock()
	defer m.mu.Unlock()
	if list := m.watches[name]; len(list) > 0 {
		return list[len(list)-1]
	}
	return nil
}

// tell makes an event, as a table does.
func (m *watchedMemory) tell(name string, kind core.SessionEventKind, id string, here bool) {
	if w := m.latest(name); w != nil {
		w.Room()
		w.Tell(core.SessionEvent{Kind: kind, Key: session.Key{Context: name, ID: id}, Local: here}, here)
	}
}

// ears note what they hear.
type ears struct {
	mu   sync.Mutex
	ids  []string
	last core.SessionEvent
}

func (h *ears) SessionEvent(e core.SessionEvent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ids = append(h.ids, e.Key.ID)
	h.last = e
}

func (h *ears) heard() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := strings.Join(h.ids, " ")
	h.ids = nil
	return s
}

// listeningValve is a valve with ears that are only open between Start and Stop.
type listeningValve struct {
	t    *testing.T
	l    core.SessionListening
	mu   sync.Mutex
	open bool
}

func (v *listeningValve) Wrap(next http.Handler) http.Handler { return next }
func (v *listeningValve) Start(context.Context) error         { v.set(true); return nil }
func (v *listeningValve) Stop(context.Context) error          { v.set(false); return nil }

func (v *listeningValve) set(open bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.open = open
}

func (v *listeningValve) SessionListening() core.SessionListening {
	l := v.l
	l.Listener = core.SessionListenerFunc(func(e core.SessionEvent) {
		v.mu.Lock()
		open := v.open
		v.mu.Unlock()
		if !open {
			v.t.Error("a valve that is not started hears", e)
		}
		v.l.Listener.SessionEvent(e)
	})
	return l
}

// Listeners of the engine and of valves at each level hear of the contexts below
// them, each what it wants; and the latest context at a path is told, while the
// one before gets what it had.
func TestListenersOfEngine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newWatched()
		var all, engine, host, own, second ears
		valve := func(l *ears, kinds core.SessionEventKind) core.Valve {
			return &listeningValve{t: t, l: core.SessionListening{Listener: l, Kinds: kinds}}
		}
		context := func(path string, l *ears, cluster core.SessionEventKind) core.ContextOptions {
			return core.ContextOptions{Path: path, Handler: http.HandlerFunc(plain), Sessions: table, ClusterEvents: cluster,
				Listeners: []core.SessionListening{{Listener: l, Kinds: core.AllSessionEvents &^ core.SessionRenewed}}}
		}
		e := newEngine(t, core.EngineOptions{
			Listeners: []core.SessionListening{{Listener: &all, Cluster: core.SessionDestroyed}},
			Valves:    []core.Valve{valve(&engine, core.SessionDestroyed)},
			Hosts: []core.HostOptions{
				{Name: "h", Valves: []core.Valve{valve(&host, 0)}, Contexts: []core.ContextOptions{context("/a", &own, core.AllSessionEvents), {Path: "/b", Handler: http.HandlerFunc(plain), Sessions: table}}},
				{Name: "g", Contexts: []core.ContextOptions{{Path: "/a", Handler: http.HandlerFunc(plain), Sessions: table}, {Path: "/none", Handler: http.HandlerFunc(plain)}}},
			},
		})
		if table.latest("h/a") != nil {
			t.Error("events before the start")
		}
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		w := table.latest("h/a")
		if w.Kinds != core.AllSessionEvents || w.Cluster != core.AllSessionEvents&^core.SessionRenewed {
			t.Error(w.Kinds, w.Cluster)
		}
		if w := table.latest("g/a"); w.Kinds != core.AllSessionEvents || w.Cluster != core.SessionDestroyed {
			t.Error(w.Kinds, w.Cluster)
		}
		expect := func(l *ears, want string) {
			t.Helper()
			synctest.Wait()
			if got := l.heard(); got != want {
				t.Errorf("heard %q, want %q", got, want)
			}
		}
		table.tell("h/a", core.SessionCreated, "1", true)
		table.tell("h/a", core.SessionRenewed, "2", true)
		table.tell("h/a", core.SessionDestroyed, "3", true)
		table.tell("h/a", core.SessionCreated, "4", false)
		table.tell("h/a", core.SessionDestroyed, "5", false)
		table.tell("h/b", core.SessionCreated, "6", true)
		table.tell("g/a", core.SessionDestroyed, "7", true)
		expect(&all, "1 2 3 5 6 7")
		expect(&engine, "3 7")
		expect(&host, "1 2 3 6")
		expect(&own, "1 3 4 5")

		if _, err := e.SetContext(t.Context(), "h", context("/a", &second, 0)); err != nil {
			t.Fatal(err)
		}
		table.tell("h/a", core.SessionCreated, "8", true)
		expect(&second, "8")
		expect(&own, "")
		expect(&host, "8")
		if err := e.RemoveContext(t.Context(), "h", "/a"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if table.latest("h/a") != nil {
			t.Error("a context that was removed is told events")
		}
		if err := e.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if table.latest("g/a") != nil {
			t.Error("events after the stop")
		}
	})
}

// Two engines on one table, as in a reload: the later one is told, and when it
// ends before the other, that one is told again.
func TestListenersOverReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newWatched()
		var one, two ears
		engine := func(l *ears) *core.Engine {
			e := newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
				{Handler: http.HandlerFunc(plain), Sessions: table, Listeners: []core.SessionListening{{Listener: l}}}}}}})
			if err := e.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			return e
		}
		a := engine(&one)
		b := engine(&two)
		table.tell("h/", core.SessionCreated, "1", true)
		if err := b.Stop(t.Context()); err != nil { // the reload has failed
			t.Fatal(err)
		}
		table.tell("h/", core.SessionCreated, "2", true)
		if err := a.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if x, y := one.heard(), two.heard(); x != "2" || y != "1" {
			t.Errorf("%q, %q", x, y)
		}
	})
}

// A listener that panics or blocks harms nobody but itself: its queue is bounded,
// what makes events waits for it, but not for ever, and it learns what it missed.
func TestListenerMisbehaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newWatched()
		m := channel.NewMetrics()
		var good, slow ears
		gate := make(chan struct{})
		e, err := core.NewEngine(core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
			{Handler: http.HandlerFunc(plain), Sessions: table, Listeners: []core.SessionListening{
				{Listener: core.SessionListenerFunc(func(core.SessionEvent) { panic("it does not like events") })},
				{Listener: core.SessionListenerFunc(func(e core.SessionEvent) { <-gate; slow.SessionEvent(e) }), Queue: 5},
				{Listener: &good},
			}}}}}}, channel.Settings{Metrics: m})
		if err == nil {
			err = e.Start(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		count := func(name string) (n float64) {
			for _, s := range m.Samples() {
				if s.Name == name {
					n += s.Value
				}
			}
			return n
		}
		var want []string
		start := time.Now()
		tell := func() {
			want = append(want, fmt.Sprint(len(want)))
			table.tell("h/", core.SessionCreated, want[len(want)-1], true)
			synctest.Wait()
		}
		for range 6 { // one is in the listener's hands
			tell()
		}
		if took := time.Since(start); took != 0 {
			t.Error("waited for room that there was:", took)
		}
		tell()
		if took := time.Since(start); took != time.Second {
			t.Error("waited for", took)
		}
		for range 5 + 1024 + 1 + 6 - 7 { // until 5 and 1024 wait, besides the one in its hands; then 6 are missed
			tell()
		}
		if took := time.Since(start); took != time.Second {
			t.Error("waited again for a listener that does not go on:", took)
		}
		synctest.Wait()
		if got := good.heard(); got != strings.Join(want, " ") {
			t.Errorf("the good listener heard %s, want %s", got, want)
		}
		all := float64(len(want))
		if count("session_events_missed_total") != 6 || count("session_listener_panics_total") != all || count("session_listener_waits_total") != 1 {
			t.Error(count("session_events_missed_total"), count("session_listener_panics_total"), count("session_listener_waits_total"))
		}
		close(gate)
		synctest.Wait()
		if got := slow.heard(); got != strings.Join(want[:len(want)-6], " ") || slow.last.Missed != 0 {
			t.Error(got, slow.last.Missed)
		}
		tell()
		if slow.heard() != want[len(want)-1] || slow.last.Missed != 6 {
			t.Errorf("%+v", slow.last)
		}
		if took := time.Since(start); took != time.Second {
			t.Error(took)
		}
		if err := e.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if count("session_events_total") != 3*(all+1)-6 {
			t.Error(count("session_events_total"))
		}
	})
}

// Stop tells what is waiting, but waits for a listener that does not end only as
// long as it may.
func TestListenerStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newWatched()
		var heard ears
		gate := make(chan struct{})
		e := newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
			{Handler: http.HandlerFunc(plain), Sessions: table, Listeners: []core.SessionListening{
				{Listener: core.SessionListenerFunc(func(e core.SessionEvent) {
					if e.Key.ID == "3" {
						<-gate
					}
					heard.SessionEvent(e)
				})},
			}}}}}})
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i := range 5 {
			table.tell("h/", core.SessionCreated, fmt.Sprint(i), true)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := e.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "the session listener") {
			t.Error(err)
		}
		close(gate)
		synctest.Wait()
		if got := heard.heard(); got != "0 1 2 3" {
			t.Error(got)
		}
	})
}

func TestListenerErrors(t *testing.T) {
	for want, o := range map[string]core.EngineOptions{
		"a session table (*core_test.memory) that does not tell": {Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
			{Handler: http.HandlerFunc(plain), Sessions: newMemory(), Listeners: []core.SessionListening{{Listener: &ears{}}}}}}}},
		"session listener 1 is nil": {Listeners: []core.SessionListening{{Listener: &ears{}}, {}}},
	} {
		if _, err := core.NewEngine(o, channel.Settings{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
