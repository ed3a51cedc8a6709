package table

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// heard records events.
type heard struct {
	mu   sync.Mutex
	list []core.SessionEvent
}

func (h *heard) SessionEvent(e core.SessionEvent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = append(h.list, e)
}

// take returns what was heard since the last time, once nobody is working.
func (h *heard) take() []core.SessionEvent {
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	list := h.list
	h.list = nil
	return list
}

// brief is an event in a few words.
func brief(e core.SessionEvent) string {
	s := e.Kind.String()
	if !e.Local {
		s += " elsewhere"
	}
	text := func(b []byte) (v string) { _ = session.Decode(b, &v); return v }
	switch {
	case e.Kind&core.AttributeEvents != 0:
		s += fmt.Sprintf(" %s %s>%s", e.Name, text(e.Old), text(e.Value))
	case e.Reason == session.Expired:
		s += " expired"
	case e.Reason == session.Invalidated:
		s += " invalidated"
	}
	return s
}

func briefs(list []core.SessionEvent) (out []string) {
	for _, e := range list {
		out = append(out, brief(e))
	}
	return out
}

func expect(t *testing.T, h *heard, want ...string) []core.SessionEvent {
	t.Helper()
	list := h.take()
	if got := briefs(list); !slices.Equal(got, want) {
		t.Errorf("heard\n%q, want\n%q", got, want)
	}
	return list
}

// listenTo makes an engine with one context on the table that is listened to.
func listenTo(t *testing.T, tab *Table, list ...core.SessionListening) *core.Engine {
	t.Helper()
	e, err := core.NewEngine(core.EngineOptions{Name: "e", Hosts: []core.HostOptions{{Name: "localhost", Contexts: []core.ContextOptions{{
		Path: "/shop", Sessions: tab, MaxInactive: time.Minute, Listeners: list, Distributable: true,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s, err := session.From(r)
			if err == nil {
				err = s.Set("path", r.URL.Path)
			}
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
		}),
	}}}}}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return e
}

// Everything that is done to a session is told, once and in order, with what it
// was and what it is.
func TestListener(t *testing.T) {
	for _, manager := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := Config{}
			if manager {
				c.Manager = newMemory()
			}
			tab := New(c, channel.Settings{})
			_ = tab.Start(t.Context(), 7)
			h := &heard{}
			e := listenTo(t, tab, core.SessionListening{Listener: h})
			w := httptest.NewRecorder()
			e.ServeHTTP(w, httptest.NewRequest("GET", "http://localhost/shop/a", nil))
			list := expect(t, h, "created", "attribute added path >/a")
			key := list[0].Key
			if list[0].Time.IsZero() || list[1].Version.Counter == 0 || key != list[1].Key || key.Context != ctxName {
				t.Errorf("%+v", list)
			}
			s, err := tab.Find(t.Context(), key)
			if err != nil || s == nil {
				t.Fatal(s, err)
			}
			_ = s.Set("path", "/b")
			_ = s.Delete("none")
			_ = s.Update("n", func([]byte) ([]byte, error) { return session.Encode("1") })
			_ = s.Update("n", func([]byte) ([]byte, error) { return nil, nil })
			_ = s.Renew()
			list = expect(t, h, "attribute replaced path /a>/b", "attribute added n >1", "attribute removed n 1>", "renewed")
			if r := list[3]; r.Previous != key || r.Key != s.Key() {
				t.Errorf("%+v", r)
			}
			_ = s.Invalidate()
			_ = s.Invalidate()
			list = expect(t, h, "destroyed invalidated")
			var path string
			if ok, err := list[0].Get("path", &path); !ok || err != nil || path != "/b" || list[0].Key != s.Key() {
				t.Error(ok, err, path, list[0])
			}
			if ok, _ := list[0].Get("n", &path); ok {
				t.Error("a deleted attribute is there")
			}
			s.Release()

			e.ServeHTTP(w, httptest.NewRequest("GET", "http://localhost/shop/c", nil))
			expect(t, h, "created", "attribute added path >/c")
			time.Sleep(time.Minute - time.Second)
			expect(t, h)
			time.Sleep(3 * time.Second)
			expect(t, h, "destroyed expired")
			if err := e.Stop(t.Context()); err != nil {
				t.Error(err)
			}
			again, _ := tab.Create(t.Context(), ctxName, session.NewOptions{})
			again.Release()
			expect(t, h)
			_ = tab.Stop(context.Background())
		})
	}
}

// Without listeners a change costs no allocation more; nor do those of another
// context, and those that want other kinds.
func TestSilenceIsFree(t *testing.T) {
	tab := New(Config{Node: 1}, channel.Settings{})
	h, err := tab.Create(t.Context(), ctxName, session.NewOptions{})
	if err != nil {
		t.Fatal(err)
	}
	e := session.Entry{Value: encoded("x")}
	set := func() {
		if err := h.(*handle).put("a", e); err != nil {
			t.Fatal(err)
		}
	}
	allocs := testing.AllocsPerRun(100, set)
	nobody := core.SessionWatch{Kinds: core.SessionDestroyed, Tell: func(core.SessionEvent, bool) { t.Error("told") }, Room: func() {}}
	for _, name := range []string{"localhost/other", ctxName} {
		cancel := tab.Watch(name, nobody)
		if got := testing.AllocsPerRun(100, set); got != allocs {
			t.Errorf("%v allocations with a listener to %s, %v without", got, name, allocs)
		}
		cancel()
	}
}

// BenchmarkListen is the cost of a change with and without listeners.
func BenchmarkListen(b *testing.B) {
	told := 0
	for name, w := range map[string]*core.SessionWatch{
		"nobody":     nil,
		"ends":       {Kinds: core.SessionDestroyed, Tell: func(core.SessionEvent, bool) { told++ }, Room: func() {}},
		"attributes": {Kinds: core.AttributeEvents, Tell: func(core.SessionEvent, bool) { told++ }, Room: func() {}},
	} {
		b.Run(name, func(b *testing.B) {
			tab := New(Config{Node: 1}, channel.Settings{})
			if w != nil {
				defer tab.Watch(ctxName, *w)()
			}
			h, err := tab.Create(b.Context(), ctxName, session.NewOptions{})
			if err != nil {
				b.Fatal(err)
			}
			e := session.Entry{Value: encoded("x")}
			b.ReportAllocs()
			for b.Loop() {
				if err := h.(*handle).put("a", e); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A listener that uses sessions itself, with a queue that is always full: changes,
// expiry and its own work go on, and end.
func TestListenerUsesSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := New(Config{Manager: newMemory()}, channel.Settings{})
		_ = tab.Start(t.Context(), 7)
		var mu sync.Mutex
		ends := map[session.Key]int{}
		l := core.SessionListenerFunc(func(e core.SessionEvent) {
			switch e.Kind {
			case core.SessionDestroyed:
				mu.Lock()
				ends[e.Key]++
				mu.Unlock()
			case core.AttributeAdded:
				h, err := tab.Find(context.Background(), e.Key)
				if err != nil || h == nil {
					return
				}
				_ = h.Update("seen", func(old []byte) ([]byte, error) { return session.Encode(len(old)) })
				if e.Name == "last" {
					_ = h.Invalidate()
				}
				h.Release()
			}
		})
		e := listenTo(t, tab, core.SessionListening{Listener: l, Queue: 1})
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				h := create(t, tab, session.NewOptions{MaxInactive: time.Duration(1+i%3) * time.Second})
				key := h.Key()
				_ = h.Set("x", i)
				_ = h.Update("x", func([]byte) ([]byte, error) { return session.Encode(i) })
				h.Release()
				time.Sleep(time.Duration(i) * 200 * time.Millisecond)
				if h, _ := tab.Find(context.Background(), key); h != nil {
					_ = h.Set("last", i)
					h.Release()
				}
			})
		}
		wg.Wait()
		pause(2 * time.Minute)
		if err := e.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if len(ends) != 20 {
			t.Errorf("%d of 20 sessions have ended", len(ends))
		}
		for key, n := range ends {
			if n != 1 {
				t.Errorf("%s has ended %d times", key.ID[:4], n)
			}
		}
		_ = tab.Stop(context.Background())
	})
}
