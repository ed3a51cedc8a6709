package cmd

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/core/session"
)

// testPath is where nodes serve testApp.
const testPath = "/t"

// testAppEnv lets nodes serve testApp.
const testAppEnv = "LONGHOUSE_TEST_APP"

// testApp is an application whose sessions clients of all nodes change at once.
//
//	/new               makes a session
//	/write?a=A&v=V     sets attribute A to V
//	/read?a=A          answers it
//	/add               adds 1 to the attribute sum, which has that rule
//	/count             adds 1 to the attribute count, with Update
//	/number?a=A        answers a number
//	/slow?a=A&v=V&call=URL  reads A, gets URL, and sets A when that answers
//	/logout            ends the session
func testApp(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	path := strings.TrimPrefix(r.URL.Path, testPath)
	s, err := session.Existing(r)
	if path == "/new" {
		s, err = session.From(r)
	}
	if err == nil && s == nil {
		w.WriteHeader(http.StatusGone)
		return
	}
	answer := ""
	if err == nil {
		switch path {
		case "/new":
			err = s.Set("born", true)
		case "/write":
			err = s.Set(q.Get("a"), q.Get("v"))
		case "/read":
			_, err = s.Get(q.Get("a"), &answer)
		case "/add":
			err = session.Counter("sum").Add(s, 1)
		case "/count":
			err = session.Attr[int]("count").Update(s, func(n *int) error { *n++; return nil })
		case "/number":
			var n int
			_, err = s.Get(q.Get("a"), &n)
			answer = strconv.Itoa(n)
		case "/slow":
			if _, err = s.Get(q.Get("a"), &answer); err == nil {
				var resp *http.Response
				if resp, err = http.Get(q.Get("call")); err == nil {
					resp.Body.Close()
					err = s.Set(q.Get("a"), q.Get("v"))
				}
			}
		case "/logout":
			err = s.Invalidate()
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_, _ = io.WriteString(w, answer)
}

// concurrent calls f for three nodes of each manager, with and without a lock.
func concurrent(t *testing.T, f func(t *testing.T, nodes []*node, locked bool)) {
	for _, manager := range append(managersUnderTest(), "file") {
		for _, locked := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/lock=%t", manager, locked), func(t *testing.T) {
				t.Setenv(testAppEnv, "1")
				g := newGroup(t)
				args := []string{"--set", "cluster.send=sync", "--set", "cluster.manager.use=" + manager}
				where := "engine.hosts[0].contexts[1]" // after the demo's
				if manager == "file" {
					args = storeUnderTest{options: fmt.Sprintf("use: persistent, store: file, directory: %q", filepath.Join(t.TempDir(), "sessions"))}.
						args(t, "sync", "on_failure: fail, grace: 20s, timeout: 20s")
				}
				if locked {
					args = append(args, "--set", where+".path="+testPath, "--set", where+".session.lock=session")
				}
				nodes := []*node{g.start("a", args...), g.start("b", args...), g.start("c", args...)}
				awaitMembers(3, nodes...)
				f(t, nodes, locked)
			})
		}
	}
}

// 25 clients write at once to 25 attributes of one session, each through three
// nodes in turn: nothing is lost. And to one: the rule sum is exact, and with the
// lock so is Update.
func TestParallelWriters(t *testing.T) {
	concurrent(t, func(t *testing.T, nodes []*node, locked bool) {
		const clients, rounds = 25, 4
		first := newClient(t)
		first.must(t, "GET", nodes[0], testPath+"/new")
		var wg sync.WaitGroup
		for i := range clients {
			c := newClient(t)
			c.http.Timeout, c.cookie = time.Minute, first.cookie
			wg.Go(func() {
				for round := range rounds {
					n := nodes[(i+round)%len(nodes)]
					paths := []string{fmt.Sprintf("/write?a=w%d&v=%d", i, round), "/add", "/count"}
					for _, p := range paths {
						if code, body, err := c.do("GET", n, testPath+p); err != nil || code != http.StatusOK {
							t.Errorf("%s: %d %v %s", p, code, err, body)
						}
					}
				}
			})
		}
		wg.Wait()
		for k, n := range nodes {
			want := func(path string, value int) {
				t.Helper()
				last := ""
				for from := time.Now(); last != strconv.Itoa(value); time.Sleep(10 * time.Millisecond) {
					if time.Since(from) > 30*time.Second {
						t.Fatalf("node %d, %s: %s, not %d", k+1, path, last, value)
					}
					_, last, _ = first.do("GET", n, testPath+path)
				}
			}
			for i := range clients {
				want(fmt.Sprintf("/read?a=w%d", i), rounds-1)
			}
			want("/number?a=sum", clients*rounds)
			if locked {
				want("/number?a=count", clients*rounds)
			}
		}
	})
}

// A user logs out on one node, while slow requests of the same session run on the
// others: the session never comes back, anywhere.
func TestLogoutIsForGood(t *testing.T) {
	concurrent(t, func(t *testing.T, nodes []*node, locked bool) {
		first := newClient(t)
		first.must(t, "GET", nodes[0], testPath+"/new")
		for _, n := range nodes {
			first.must(t, "GET", n, testPath+"/read?a=slow")
		}
		// The slow requests call here and wait for an answer.
		called := make(chan struct{}, len(nodes))
		release, done := context.WithCancel(t.Context())
		gate := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			called <- struct{}{}
			<-release.Done()
		}))
		defer gate.Close()
		defer done()
		slow := nodes[1:]
		if locked {
			slow = nodes[1:2] // the others would wait for it
		}
		var wg sync.WaitGroup
		for _, n := range slow {
			c := newClient(t)
			c.http.Timeout, c.cookie = time.Minute, first.cookie
			wg.Go(func() {
				code, body, err := c.do("GET", n, testPath+"/slow?a=slow&v=x&call="+url.QueryEscape(gate.URL))
				t.Logf("a slow request was answered with %d %s %v", code, strings.TrimSpace(body), err)
			})
		}
		for range slow {
			select {
			case <-called:
			case <-time.After(30 * time.Second):
				t.Fatal("the slow requests have not begun")
			}
		}
		logout := newClient(t)
		logout.http.Timeout, logout.cookie = time.Minute, first.cookie
		if locked {
			// It waits for the slow request.
			wg.Go(func() { logout.must(t, "GET", nodes[0], testPath+"/logout") })
		} else {
			logout.must(t, "GET", nodes[0], testPath+"/logout")
		}
		done()
		wg.Wait()
		for range 40 {
			for k, n := range nodes {
				c := newClient(t)
				c.cookie = first.cookie
				if code, body, err := c.do("GET", n, testPath+"/read?a=slow"); err != nil || code != http.StatusGone {
					t.Fatalf("node %d still has the session: %d %s %v", k+1, code, body, err)
				}
			}
			time.Sleep(50 * time.Millisecond) // what could bring it back may take time
		}
	})
}
