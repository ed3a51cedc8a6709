package cmd

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/conformance/server"
)

// storeUnderTest is a place for sessions and how to stop it.
type storeUnderTest struct {
	options string           // of the manager, YAML in flow style without braces
	servers []*server.Server // none if it is a file
	durable bool             // it has what it had when all servers were killed
}

var storesUnderTest = []struct {
	name  string
	start func(t *testing.T) storeUnderTest
}{
	{"file", func(t *testing.T) storeUnderTest {
		return storeUnderTest{fmt.Sprintf("use: persistent, store: file, directory: %q", filepath.Join(t.TempDir(), "sessions")), nil, true}
	}},
	{"sqlite", func(t *testing.T) storeUnderTest {
		return storeUnderTest{fmt.Sprintf("use: persistent, store: sqlite, file: %q", filepath.Join(t.TempDir(), "sessions.db")), nil, true}
	}},
	{"postgres", func(t *testing.T) storeUnderTest {
		s := server.Postgres(t)
		return storeUnderTest{fmt.Sprintf("use: persistent, store: postgres, dsn: %q, parallel: 4", s.DSN()), []*server.Server{s}, true}
	}},
	{"redis", func(t *testing.T) storeUnderTest {
		s := server.Redis(t)
		return storeUnderTest{fmt.Sprintf("use: redis, addresses: [%q]", s.Addr), []*server.Server{s}, false}
	}},
	{"memcached", func(t *testing.T) storeUnderTest {
		a, b := server.Memcached(t), server.Memcached(t)
		return storeUnderTest{fmt.Sprintf("use: memcached, nodes: [%q, %q]", "n1:"+a.Addr, "n2:"+b.Addr), []*server.Server{a, b}, false}
	}},
}

// args are those of a node whose manager keeps sessions in the store.
func (s storeUnderTest) args(t *testing.T, send, more string) []string {
	file := filepath.Join(t.TempDir(), "node.yaml")
	text := "engine: {hosts: [{name: localhost, contexts: [{path: '', app: demo}]}]}\n" +
		fmt.Sprintf("cluster:\n  send: %s\n  manager: {%s, %s}\n", send, s.options, more)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"-c", file}
}

// write increments the user's counter on a node; ok is false if the request
// failed.
func (c *client) write(n *node) (v int64, ok bool) {
	code, body, err := c.do("GET", n, "/write")
	if err != nil || code != http.StatusOK {
		return 0, false
	}
	v, err = strconv.ParseInt(strings.TrimSpace(body), 10, 64)
	return v, err == nil
}

// readAs reads the counter of a user's session, as somebody who does not keep a
// cookie.
func readAs(t *testing.T, cookie string, n *node) string {
	c := newClient(t)
	c.cookie = cookie
	_, body, err := c.do("GET", n, "/read")
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(body)
}

// Users write to any node, without stickiness, while nodes are killed: what was
// acknowledged is on every other node. In the end all nodes are killed, and new
// ones have everything.
func TestStoresNodeKilled(t *testing.T) {
	for _, s := range storesUnderTest {
		t.Run(s.name, func(t *testing.T) {
			g := newGroup(t)
			st := s.start(t)
			// A request that could not be stored is to fail here, so that every
			// acknowledged one counts, on a busy machine too.
			args := st.args(t, "sync", "on_failure: fail, grace: 20s, timeout: 20s")
			nodes := []*node{g.start("a", args...), g.start("b", args...), g.start("c", args...)}
			awaitMembers(3, nodes...)
			r := rand.New(rand.NewPCG(1, 2))
			users := make([]*client, 3)
			last := make([]int64, len(users))
			for i := range users {
				users[i] = newClient(t)
			}
			// The last request of user 0 to a node that was killed has not been
			// answered: it may have been stored, and known to some nodes only
			// until all have seen the view change.
			acked, maybe := 0, int64(0)
			// turn lets user i write to node k; it may have been killed meanwhile.
			turn := func(i, k int, dying bool) bool {
				v, ok := users[i].write(nodes[k])
				switch {
				case ok && (v == last[i]+1 || i == 0 && v == last[i]+1+maybe):
					last[i] = v
					acked++
					if i == 0 {
						maybe = 0
					}
				case ok:
					t.Errorf("user %d: node %d answers %d after %d was acknowledged", i, k, v, last[i])
					last[i] = v
				case !dying:
					t.Errorf("user %d: a request to node %d failed, which was not killed", i, k)
				}
				return ok
			}
			for run := range max(1, *runs/5) {
				for range 20 {
					for i := range users {
						turn(i, r.IntN(len(nodes)), false)
					}
				}
				dead := r.IntN(len(nodes))
				ended := make(chan struct{})
				var writes atomic.Int64
				go func() {
					defer close(ended)
					for turn(0, dead, true) {
						writes.Add(1)
					}
				}()
				eventually(t, 30*time.Second, "writes to the node that is killed", func() bool { return writes.Load() > 5 })
				time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond) // somewhere among the writes
				nodes[dead].kill()
				<-ended
				maybe = 1
				other := (dead + 1) % len(nodes)
				for i := range users {
					got, err := strconv.ParseInt(readAs(t, users[i].cookie, nodes[other]), 10, 64)
					if err != nil || got != last[i] && (i > 0 || got != last[i]+maybe) {
						t.Errorf("run %d: user %d: acknowledged %d, another node has %d (%v)", run, i, last[i], got, err)
						last[i] = got
					}
				}
				nodes[dead] = g.start(string(rune('a'+dead)), args...)
				awaitMembers(len(nodes), nodes...)
			}
			for _, n := range nodes {
				n.kill()
			}
			fresh := g.start("d", args...)
			fresh.awaitReady()
			for i, c := range users {
				if got := readAs(t, c.cookie, fresh); got != fmt.Sprint(last[i]) && (i > 0 || got != fmt.Sprint(last[i]+maybe)) {
					t.Errorf("after a restart of all nodes user %d has %s, want %d", i, got, last[i])
				}
			}
			t.Logf("%d acknowledged writes", acked)
		})
	}
}

// The servers of a store are killed under load and started again: the node that
// has the sessions goes on, and when the servers are back everything is there,
// also what nobody has touched meanwhile and they have forgotten.
func TestStoresServerKilled(t *testing.T) {
	const grace = time.Second
	limit := 4 * time.Second // a busy machine
	if *strict {
		limit = grace + 500*time.Millisecond
	}
	for _, s := range storesUnderTest {
		t.Run(s.name, func(t *testing.T) {
			g := newGroup(t)
			st := s.start(t)
			if len(st.servers) == 0 {
				t.Skip("it has no server")
			}
			args := st.args(t, "sync", fmt.Sprintf("grace: %v", grace))
			a, b := g.start("a", args...), g.start("b", args...)
			awaitMembers(2, a, b)
			idle := newClient(t)
			idle.must(t, "GET", a, "/write")
			l := startWriters(t, a, 4)
			answered := func(n int) {
				t.Helper()
				var sum int64
				eventually(t, 30*time.Second, fmt.Sprint(n, " requests"), func() bool {
					sum = l.answered.Load()
					return sum >= int64(n)
				})
			}
			answered(100)
			killed := time.Now()
			for _, srv := range st.servers {
				srv.Kill()
			}
			eventually(t, 30*time.Second, "the node knows that the store fails", func() bool { return strings.Contains(state(a), "has failed") })
			time.Sleep(2 * grace) // a while without the store
			answered(int(l.answered.Load()) + 100)
			back := time.Now()
			for _, srv := range st.servers {
				srv.Restart()
			}
			took := eventually(t, 60*time.Second, "the store works and has everything", func() bool {
				return strings.HasPrefix(state(a), "the store works") && readAs(t, idle.cookie, b) == "1"
			})
			answered(int(l.answered.Load()) + 100)
			l.end()
			eventually(t, 30*time.Second, "nothing waits", func() bool { return strings.HasPrefix(state(a), "the store works; 0 sessions") })
			_, longest := l.rate(killed, time.Now())
			_, without := l.rate(killed, back)
			if l.fails.Load() > 0 {
				t.Errorf("%d requests failed", l.fails.Load())
			}
			if longest > limit {
				t.Errorf("a request took %v, want at most %v", longest, limit)
			}
			t.Logf("%d requests; the longest took %v (%v without the store); everything was stored %v after the start", l.answered.Load(),
				longest.Round(time.Millisecond), without.Round(time.Millisecond), took.Round(time.Millisecond))
			a.kill()
			for i, c := range l.users {
				want := fmt.Sprint(l.last[i])
				if got := readAs(t, c.cookie, b); got != want {
					t.Errorf("user %d: %s was acknowledged, the store has %s", i, want, got)
				}
			}
		})
	}
}

// state is what the node's manager says of itself.
func state(n *node) string {
	var r struct {
		Tables []struct {
			Status struct {
				State string `json:"state"`
			} `json:"status"`
		} `json:"tables"`
	}
	n.admin("/v1/sessions", &r)
	if len(r.Tables) == 0 {
		return ""
	}
	return r.Tables[0].Status.State
}

// A user's memcached-session-manager, as it is but for the port of memcached, on
// two nodes.
func TestTomcatMemcachedSeed(t *testing.T) {
	g := newGroup(t)
	s := server.Memcached(t)
	args := []string{"-c", seed(t, "14-s000-context-msm.xml"),
		"--set", "engine.hosts[0].contexts[0].manager.nodes[0]=n1:" + s.Addr}
	a, b := g.start("a", args...), g.start("b", args...)
	awaitMembers(2, a, b)
	c := newClient(t)
	c.must(t, "POST", a, "/set?dataName=colour&dataValue=green")
	for i := range 6 { // sticky="false"
		n := []*node{a, b}[i%2]
		if got := strings.TrimSpace(c.must(t, "GET", n, "/write")); got != fmt.Sprint(i+1) {
			t.Errorf("request %d is answered %s", i+1, got)
		}
	}
	a.kill()
	if i := info(t, c.must(t, "GET", b, "/info")); i.Attributes["colour"] != "green" || i.IsNew {
		t.Errorf("the other node answers %+v", i)
	}
}
