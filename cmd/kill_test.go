package cmd

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// lastMoments is what a node that is killed may lose of what it has acknowledged
// with send: async: what it did in its last second. It is stated in the
// documentation of cluster.send.
const lastMoments = time.Second

// killed is a load on a group behind the balancer: users who count in a session
// of their own.
type killed struct {
	t      *testing.T
	front  string
	client *http.Client
	stop   atomic.Bool
	wg     sync.WaitGroup
	acks   atomic.Int64
	failed atomic.Int64

	mu     sync.Mutex
	when   time.Time // of the last kill
	losses []loss
	run    int
}

// loss is what one user lost when a node was killed.
type loss struct {
	run, writes int
	age         time.Duration // of the oldest, when the node was killed
}

// user writes until the load is stopped; then everything acknowledged must be
// there.
func (k *killed) user() {
	var cookie string
	var at []time.Time // when each of the writes 1, 2, 3, … was acknowledged
	ask := func(path string) (int, bool) {
		req, err := http.NewRequest(http.MethodGet, k.front+path, nil)
		if err != nil {
			k.t.Error(err)
			return 0, false
		}
		c := &client{http: k.client, cookie: cookie}
		code, body, err := c.send(req)
		cookie = c.cookie
		n, bad := strconv.Atoi(strings.TrimSpace(body))
		if err != nil || code != http.StatusOK || bad != nil {
			if k.failed.Add(1) == 1 {
				k.t.Errorf("a request failed: %d %v %.200s", code, err, body)
			}
			return 0, false
		}
		return n, true
	}
	lost := func(have int) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.losses = append(k.losses, loss{k.run, len(at) - have, k.when.Sub(at[have])})
		at = at[:have]
	}
	for !k.stop.Load() {
		n, ok := ask("/write")
		if !ok {
			continue
		}
		if n-1 < len(at) {
			lost(max(n-1, 0))
		}
		for now := time.Now(); len(at) < n; { // a repeated request may have counted twice
			at = append(at, now)
		}
		k.acks.Add(1)
	}
	if n, ok := ask("/read"); ok && n < len(at) {
		lost(n)
	}
}

// A random one of three nodes is killed, again and again, under load behind the
// balancer. With send: sync nothing that was acknowledged is lost, whatever the
// manager; with async it is what the node did in its last moments at most. No
// request fails.
func TestNodeKilled(t *testing.T) {
	type kind struct {
		name   string
		stored bool
		args   func(t *testing.T, send string) []string
	}
	var kinds []kind
	for _, manager := range managersUnderTest() {
		kinds = append(kinds, kind{manager, false, func(_ *testing.T, send string) []string {
			return []string{"--set", "cluster.send=" + send, "--set", "cluster.manager.use=" + manager}
		}})
	}
	for _, s := range storesUnderTest {
		kinds = append(kinds, kind{s.name, true, func(t *testing.T, send string) []string {
			return s.start(t).args(t, send, "on_failure: fail, grace: 20s, timeout: 20s")
		}})
	}
	var mu sync.Mutex
	var table []string
	for _, k := range kinds {
		for _, send := range []string{"sync", "async"} {
			t.Run(k.name+"/"+send, func(t *testing.T) {
				if send == "async" && k.stored && !*strict {
					t.Skip("give -strict: they take their time")
				}
				line := nodeKilled(t, send, k.args(t, send))
				mu.Lock()
				table = append(table, fmt.Sprintf("%-10s %-6s %s", k.name, send, line))
				mu.Unlock()
			})
		}
	}
	t.Logf("%d kills each, -seed %d:\n%s", *runs, *dice, strings.Join(table, "\n"))
}

func nodeKilled(t *testing.T, send string, args []string) (summary string) {
	g := newGroup(t)
	routes := []string{"a", "b", "c"}
	b := newBalancer(routes)
	front := httptest.NewServer(b)
	defer front.Close()
	nodes := make([]*node, len(routes))
	start := func(i int) {
		nodes[i] = g.start(routes[i], args...)
		nodes[i].awaitReady()
		b.set(routes[i], nodes[i].HTTP[0])
	}
	for i := range nodes {
		start(i)
	}
	awaitMembers(len(nodes), nodes...)
	const users = 6
	tr := &http.Transport{MaxIdleConnsPerHost: users}
	defer tr.CloseIdleConnections()
	k := &killed{t: t, front: front.URL, client: &http.Client{Transport: tr, Timeout: time.Minute}}
	for range users {
		k.wg.Go(k.user)
	}
	served := func(n int64) {
		t.Helper()
		from := k.acks.Load()
		eventually(t, time.Minute, fmt.Sprint(n, " more writes"), func() bool { return k.acks.Load() >= from+n })
	}
	rnd := rand.New(rand.NewPCG(*dice, 3))
	deaths := make([]int, len(nodes))
	for run := range *runs {
		served(60)
		i := rnd.IntN(len(nodes))
		deaths[i]++
		time.Sleep(time.Duration(rnd.IntN(30)) * time.Millisecond) // somewhere among the writes
		k.mu.Lock()
		k.run, k.when = run, time.Now()
		k.mu.Unlock()
		nodes[i].kill()
		served(60)
		start(i)
		awaitMembers(len(nodes), nodes...)
	}
	served(60)
	k.stop.Store(true)
	k.wg.Wait()

	// The distribution: how many runs lost nothing, and how much the others.
	runsWith := map[int]int{}
	oldest, writes := time.Duration(0), 0
	for _, l := range k.losses {
		runsWith[l.run] += l.writes
		writes += l.writes
		oldest = max(oldest, l.age)
	}
	var each []int
	for _, n := range runsWith {
		each = append(each, n)
	}
	slices.Sort(each)
	summary = fmt.Sprintf("killed %v; %d acknowledged, %d requests failed, %d writes lost in %d runs %v, the oldest %v before the kill",
		deaths, k.acks.Load(), k.failed.Load(), writes, len(each), each, oldest.Round(time.Millisecond))
	limit := 5 * lastMoments // a busy machine
	if *strict {
		limit = lastMoments
	}
	switch {
	case send == "sync" && writes > 0:
		t.Errorf("acknowledged changes were lost: %s; repeat with -args -seed %d", summary, *dice)
	case oldest > limit:
		t.Errorf("changes older than %v were lost: %s; repeat with -args -seed %d", limit, summary, *dice)
	}
	t.Log(summary)
	return summary
}
