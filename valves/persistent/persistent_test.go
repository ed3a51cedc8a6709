package persistent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// store is a manager of nodes that hear nothing of each other: all that they
// share is what it keeps.
type store struct {
	core.Manager
	mu   sync.Mutex
	recs map[session.Key]*session.Record
	down bool
}

func (s *store) Commit(_ context.Context, batch []byte, _ core.Level) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return session.DecodeBatch(batch, func(r *session.Record) error {
		if old := s.recs[r.Key]; old != nil {
			old.Merge(r.Clone())
			return nil
		}
		s.recs[r.Key] = r.Clone()
		return nil
	})
}

func (s *store) Load(_ context.Context, key session.Key) (*session.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, errors.New("the store is down")
	}
	if r := s.recs[key]; r != nil {
		return r.Clone(), nil
	}
	return nil, nil
}

func (s *store) Release(context.Context, []session.Key) error { return nil }

// node is one of several servers of the store.
type node struct {
	t       *testing.T
	engine  *core.Engine
	metrics *channel.Metrics
}

const visits = session.Attr[int]("visits")

// start starts a node whose application counts visits; valve says whether it has
// the valve.
func start(t *testing.T, s *store, id uint64, valve *Config, app http.HandlerFunc) *node {
	t.Helper()
	n := &node{t: t, metrics: channel.NewMetrics()}
	tab := table.New(table.Config{Manager: s}, channel.Settings{})
	if err := tab.Start(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tab.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	o := core.ContextOptions{Sessions: tab, Distributable: true, Handler: app, MaxInactive: time.Hour}
	if valve != nil {
		v, err := New(*valve, channel.Settings{Metrics: n.metrics})
		if err != nil {
			t.Fatal(err)
		}
		o.Valves = []core.Valve{v}
	}
	var err error
	n.engine, err = core.NewEngine(core.EngineOptions{
		Route: fmt.Sprint("n", id),
		Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{o}}},
	}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func count(w http.ResponseWriter, r *http.Request) {
	s, err := session.From(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if r.URL.Path == "/logout" {
		_ = s.Invalidate()
		return
	}
	_ = visits.Update(s, func(n *int) error { *n++; return nil })
	n, _, _ := visits.Get(s)
	fmt.Fprint(w, n)
}

// get makes a request with a cookie, and returns status, body and the cookie
// from then on.
func (n *node) get(path, cookie string) (status int, body, next string) {
	r := httptest.NewRequest("GET", path, nil)
	if cookie != "" {
		r.Header.Set("Cookie", "JSESSIONID="+cookie)
	}
	w := httptest.NewRecorder()
	n.engine.ServeHTTP(w, r)
	next = cookie
	for _, c := range w.Result().Cookies() {
		next = c.Value
	}
	return w.Code, strings.TrimSpace(w.Body.String()), next
}

// Requests of one session go to two nodes in turn, and each sees what the one
// before has done. Without the valve they do not.
func TestNodesWithAStoreOnly(t *testing.T) {
	for _, with := range []bool{true, false} {
		var c *Config
		if with {
			d := Default()
			c = &d
		}
		s := &store{recs: map[session.Key]*session.Record{}}
		nodes := []*node{start(t, s, 1, c, count), start(t, s, 2, c, count)}
		last, cookie := "", ""
		for i := range 10 {
			_, last, cookie = nodes[i%2].get("/", cookie)
		}
		if counted := last == "10"; counted != with {
			t.Errorf("valve %v: 10 visits count as %s", with, last)
		}
	}
}

// A session that was ended on one node does not go on on the other.
func TestLogoutElsewhere(t *testing.T) {
	d := Default()
	s := &store{recs: map[session.Key]*session.Record{}}
	a, b := start(t, s, 1, &d, count), start(t, s, 2, &d, count)
	_, _, cookie := a.get("/", "")
	if _, body, _ := b.get("/", cookie); body != "2" {
		t.Fatalf("on the other node: %q", body)
	}
	a.get("/logout", cookie)
	if _, body, next := b.get("/", cookie); body != "1" || next == cookie {
		t.Errorf("after the logout: %q visits, cookie changed: %v", body, next != cookie)
	}
}

// While the store does not answer, a node goes on with what it has.
func TestStoreDown(t *testing.T) {
	d := Default()
	s := &store{recs: map[session.Key]*session.Record{}}
	a := start(t, s, 1, &d, count)
	_, _, cookie := a.get("/", "")
	s.mu.Lock()
	s.down = true
	s.mu.Unlock()
	if status, body, _ := a.get("/", cookie); status != 200 || body != "2" {
		t.Errorf("%d %q", status, body)
	}
	if n := a.metrics.Counter("persistent_read_failures_total", "").Value(); n != 1 {
		t.Errorf("persistent_read_failures_total %d", n)
	}
}

// Filtered requests neither read nor write.
func TestFilter(t *testing.T) {
	c := Default()
	c.Filter = `.*\.gif`
	s := &store{recs: map[session.Key]*session.Record{}}
	a := start(t, s, 1, &c, count)
	_, _, cookie := a.get("/", "")
	before := a.metrics.Counter("persistent_reads_total", "").Value()
	a.get("/x.gif", cookie)
	if n := a.metrics.Counter("persistent_reads_total", "").Value(); n != before {
		t.Errorf("a filtered request has read the session")
	}
	a.get("/x.gifs", cookie)
	if n := a.metrics.Counter("persistent_reads_total", "").Value(); n != before+1 {
		t.Errorf("%d reads, want %d", n, before+1)
	}
}

// Requests of one session work one after the other; who waits for too long, or
// is one too many, gets a 429, and other sessions are not concerned.
func TestOneAtATime(t *testing.T) {
	for name, tc := range map[string]struct {
		wait     time.Duration
		max      int
		requests int
		ok       int // of them; each takes 4 s
	}{
		"all in time":   {time.Minute, 100, 5, 5},
		"too long":      {6 * time.Second, 100, 5, 2},
		"too many":      {time.Minute, 2, 5, 3},
		"nobody waits":  {0, 100, 5, 1},
		"nobody at all": {time.Minute, 0, 5, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := Default()
			c.Wait, c.MaxWaiting = tc.wait, tc.max
			s := &store{recs: map[session.Key]*session.Record{}}
			var mu sync.Mutex
			inside := map[string]int{}
			a := start(t, s, 1, &c, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/slow" {
					count(w, r)
					return
				}
				s, err := session.From(r)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if inside[s.ID()]++; inside[s.ID()] > 1 {
					t.Errorf("%s: two at a time", name)
				}
				mu.Unlock()
				time.Sleep(4 * time.Second)
				mu.Lock()
				inside[s.ID()]--
				mu.Unlock()
				if r.URL.Query().Has("panic") {
					panic(http.ErrAbortHandler)
				}
			})
			_, _, one := a.get("/", "")
			_, _, two := a.get("/", "")
			var wg sync.WaitGroup
			ok, refused := 0, 0
			for range tc.requests {
				wg.Go(func() {
					status, _, _ := a.get("/slow", one)
					mu.Lock()
					defer mu.Unlock()
					switch status {
					case http.StatusOK:
						ok++
					case http.StatusTooManyRequests:
						refused++
					}
				})
			}
			synctest.Wait()
			begin := time.Now()
			if status, _, _ := a.get("/slow", two); status != http.StatusOK || time.Since(begin) != 4*time.Second {
				t.Errorf("%s: another session: %d after %v", name, status, time.Since(begin))
			}
			wg.Wait()
			if ok != tc.ok || refused != tc.requests-tc.ok {
				t.Errorf("%s: %d served, %d refused; want %d served", name, ok, refused, tc.ok)
			}
			func() { // one that breaks off gives its turn on, too
				defer func() { _ = recover() }()
				a.get("/slow?panic", one)
			}()
			if status, _, _ := a.get("/slow", one); status != http.StatusOK {
				t.Errorf("%s: after a panic: %d", name, status)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"filter":       func(c *Config) { c.Filter = "(" },
		"long filter":  func(c *Config) { c.Filter = strings.Repeat("a", maxFilter+1) },
		"wait":         func(c *Config) { c.Wait = -1 },
		"max_waiting":  func(c *Config) { c.MaxWaiting = -1 },
		"read_timeout": func(c *Config) { c.ReadTimeout = 0 },
	} {
		c := Default()
		change(&c)
		if _, err := New(c, channel.Settings{}); err == nil {
			t.Errorf("%s is not refused", name)
		}
	}
}
