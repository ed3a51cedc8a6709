package lock_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/lock"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// What clients of a context with a lock see, whatever its application does.
func TestRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := table.New(table.Config{}, channel.Settings{})
		l := lock.New(lock.Config{}, nil, channel.Settings{})
		n := session.Attr[int]("n")
		app := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s, err := session.From(r)
			if err != nil {
				_, _ = w.Write([]byte("the application does not care"))
				return
			}
			v, _, _ := n.Get(s)
			think, _ := time.ParseDuration(r.URL.Query().Get("think"))
			time.Sleep(think)
			_ = n.Set(s, v+1)
			switch r.URL.Path {
			case "/panic":
				panic("as asked for")
			case "/renew":
				_ = s.Renew()
			case "/stream":
				_ = http.NewResponseController(w).Flush()
				time.Sleep(think)
				_ = n.Set(s, v+10)
			}
		})
		e, err := core.NewEngine(core.EngineOptions{Name: "e", Hosts: []core.HostOptions{{Name: "localhost", Contexts: []core.ContextOptions{{
			Handler: app, Sessions: tab, MaxInactive: time.Hour, Locker: l.With(10 * time.Second), LockTimeout: 3 * time.Second,
		}}}}}, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Stop(context.Background()) }()
		cookie := ""
		do := func(target string) *httptest.ResponseRecorder {
			r := httptest.NewRequest(http.MethodGet, "http://localhost"+target, nil)
			if cookie != "" {
				r.AddCookie(&http.Cookie{Name: core.DefaultCookie, Value: cookie})
			}
			w := httptest.NewRecorder()
			e.ServeHTTP(w, r)
			return w
		}
		value := func(raw string) (v int) {
			id, _, _ := session.ParseID(raw)
			h, err := tab.Find(t.Context(), session.Key{Context: "localhost/", ID: id})
			if err != nil || h == nil {
				t.Fatal("no session", err)
			}
			defer h.Release()
			v, _, _ = n.Get(h)
			return v
		}
		cookie = do("/").Result().Cookies()[0].Value

		// Two at a time count both, and so do those that fail.
		var wg sync.WaitGroup
		wg.Go(func() { do("/?think=1s") })
		wg.Go(func() { do("/?think=1s") })
		wg.Wait()
		if w := do("/panic"); w.Code != http.StatusInternalServerError {
			t.Error(w.Code)
		}
		wg.Go(func() { do("/stream?think=1s") })
		synctest.Wait()
		do("/")
		wg.Wait()
		if v := value(cookie); v != 15 { // 1, 2, 3, 4, then 14 and 15
			t.Error(v)
		}

		// Whoever does not get the session in time is told so in words.
		wg.Go(func() { do("/?think=5s") })
		synctest.Wait()
		start := time.Now()
		w := do("/")
		if w.Code != http.StatusServiceUnavailable || time.Since(start) != 3*time.Second ||
			!strings.Contains(w.Body.String(), "in use by another request") || w.Header().Get("Retry-After") == "" {
			t.Error(w.Code, time.Since(start), w.Body, w.Header())
		}
		wg.Wait()

		// Whoever has it for too long loses it, and is told so.
		wg.Go(func() {
			if w := do("/?think=11s"); w.Code != http.StatusServiceUnavailable {
				t.Error(w.Code, w.Body)
			}
		})
		time.Sleep(9 * time.Second)
		if w := do("/"); w.Code != http.StatusOK {
			t.Error(w.Code, w.Body)
		}
		wg.Wait()

		// A request with the id from before a renewal waits for the one that
		// renews, and finds the session under its new id.
		wg.Go(func() {
			if w := do("/renew?think=1s"); len(w.Result().Cookies()) != 1 {
				t.Error("no new id")
			}
		})
		synctest.Wait()
		before := value(cookie)
		do("/?think=1s")
		wg.Wait()
		if v := value(cookie); v != before+2 {
			t.Errorf("%d, not %d", v, before+2)
		}
	})
}
