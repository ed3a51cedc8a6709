package history_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/cryptotest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/conformance/history"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/lock"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/interceptors/dispatch"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/interceptors/throughput"
	"github.com/longhouse-go/longhouse/plugins/manager/backup"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
)

var (
	// A seed decides the network, what the clients do, and the ids of nodes and
	// sessions. What is left is the order in which Go ranges over a map, chooses
	// among cases of a select, and lets timers of one instant go off: what
	// happened once may need several runs to happen again.
	seeds = flag.Int("history.seeds", 6, "seeds of each scenario")
	from  = flag.Uint64("history.from", 1, "the first of them")
	name  = flag.String("history.name", "", "repeat one: scenario/seed")
)

func parts(manager core.ManagerFactory) conformance.Parts {
	return conformance.Parts{
		Layers: func(s channel.Settings) ([]channel.Layer, error) {
			var layers []channel.Layer
			for _, f := range []core.InterceptorFactory{throughput.Factory, dispatch.Factory, failuredetector.Factory} {
				i, err := f.New(channel.NoConfig, s)
				if err != nil {
					return nil, err
				}
				layers = append(layers, channel.Layer{Interceptor: i})
			}
			return layers, nil
		},
		Membership: func(s channel.Settings) (channel.Membership, error) {
			return multicast.Factory.New(channel.NoConfig, s)
		},
		Manager: func(s channel.Settings) (core.Manager, error) { return manager.New(channel.NoConfig, s) },
	}
}

// app is an application with a session per user; ?think is how long a request
// takes between reading and writing.
func app(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	err := func() error {
		s, err := session.Existing(r)
		if r.URL.Path == "/new" {
			s, err = session.From(r)
		}
		if err != nil {
			return err
		}
		if s == nil {
			w.WriteHeader(http.StatusGone)
			return nil
		}
		var old string
		think := func() {
			ms, _ := strconv.Atoi(q.Get("think"))
			time.Sleep(time.Duration(ms) * time.Millisecond)
		}
		attr := q.Get("a")
		switch r.URL.Path {
		case "/new":
			return s.Set("born", "yes")
		case "/read":
			_, err = s.Get(attr, &old)
		case "/swap":
			if _, err = s.Get(attr, &old); err == nil {
				think()
				err = s.Set(attr, q.Get("v"))
			}
		case "/write":
			think()
			err = s.Set(attr, q.Get("v"))
		case "/add":
			think()
			err = session.Counter("sum").Add(s, 1)
		case "/tag":
			err = session.Union("tags").Add(s, q.Get("v"))
		case "/tags":
			var tags []string
			tags, err = session.Union("tags").Members(s)
			old = strings.Join(tags, " ")
		case "/raise":
			var n int64
			if n, err = strconv.ParseInt(q.Get("v"), 10, 64); err == nil {
				err = session.Max("best").Raise(s, n)
			}
		case "/count":
			err = session.Attr[int]("count").Update(s, func(n *int) error { *n++; return nil })
		case "/value":
			var n int
			_, err = s.Get(attr, &n)
			old = strconv.Itoa(n)
		case "/logout":
			return s.Invalidate()
		}
		if err != nil {
			return err
		}
		_, err = io.WriteString(w, old)
		return err
	}()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// cluster is a group of nodes with an engine each.
type cluster struct {
	t *testing.T
	*conformance.Cluster
	engines []*core.Engine
	lockers []*lock.Locker
	dead    []atomic.Bool
	start   time.Time
	rec     history.Recorder
	cookie  string
}

type options struct {
	nodes int
	lock  bool
	level core.Level
	// timeout is how long a request waits for its session; 0 is the default.
	timeout time.Duration
	// manager is delta if it is not set.
	manager core.ManagerFactory
}

func newCluster(t *testing.T, nw *channeltest.SimNet, o options) *cluster {
	if o.manager.New == nil {
		o.manager = delta.Factory
	}
	c := &cluster{t: t, Cluster: conformance.NewCluster(t, nw, o.nodes, parts(o.manager)), dead: make([]atomic.Bool, o.nodes), start: time.Now()}
	c.Await(20*time.Second, conformance.ViewsEqual(c.Nodes...))
	c.Await(20*time.Second, conformance.Ready(c.Nodes...))
	for _, n := range c.Nodes {
		co := core.ContextOptions{Handler: http.HandlerFunc(app), Sessions: n.Table, MaxInactive: time.Hour, Distributable: true, Level: o.level}
		if o.lock {
			l := lock.New(lock.Config{}, n.Shared, channel.Settings{Metrics: n.Metrics})
			if err := l.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.lockers = append(c.lockers, l)
			co.Locker, co.LockTimeout = l.With(0), o.timeout
		}
		e, err := core.NewEngine(core.EngineOptions{
			Name: n.Name, Hosts: []core.HostOptions{{Name: "localhost", Contexts: []core.ContextOptions{co}}},
		}, channel.Settings{Metrics: n.Metrics})
		if err == nil {
			err = e.Start(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		c.engines = append(c.engines, e)
	}
	w := c.do(0, "/new")
	if w.Code != http.StatusOK || len(w.Result().Cookies()) != 1 {
		t.Fatalf("no session: %d %s", w.Code, w.Body)
	}
	c.cookie = w.Result().Cookies()[0].Value
	return c
}

func (c *cluster) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, e := range c.engines {
		if err := e.Stop(ctx); err != nil {
			c.t.Error(err)
		}
	}
	for _, l := range c.lockers {
		if err := l.Stop(ctx); err != nil {
			c.t.Error(err)
		}
	}
	c.Nodes = slices.DeleteFunc(c.Nodes, func(n *conformance.Node) bool {
		i, _ := strconv.Atoi(n.Name[1:])
		if !c.dead[i-1].Load() {
			return false
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_ = n.Stop(short) // its network is gone
		return true
	})
	c.Stop()
}

func (c *cluster) do(node int, target string) *httptest.ResponseRecorder {
	return c.request(node, c.cookie, target)
}

func (c *cluster) request(node int, cookie, target string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, "http://localhost"+target, nil)
	if cookie != "" {
		r.AddCookie(&http.Cookie{Name: core.DefaultCookie, Value: cookie})
	}
	w := httptest.NewRecorder()
	c.engines[node].ServeHTTP(w, r)
	return w
}

// op does a request and records it.
func (c *cluster) op(client, node int, o history.Op, think int) {
	o.Client, o.Call = client, time.Since(c.start)
	path := map[history.Kind]string{history.Read: "/read", history.Swap: "/swap", history.Write: "/write"}[o.Kind]
	w := c.do(node, fmt.Sprintf("%s?a=%s&v=%s&think=%d", path, o.Register, o.New, think))
	o.Return = time.Since(c.start)
	o.Old = w.Body.String()
	o.Unknown = w.Code != http.StatusOK || c.dead[node].Load()
	c.rec.Add(o)
}

// kill ends a node's network for ever: from then on no client hears of it.
func (c *cluster) kill(node int) {
	c.dead[node].Store(true)
	c.Net.Node(c.Nodes[node].IP).Kill()
}

// crash is kill without anybody being told by the kernel.
func (c *cluster) crash(node int) {
	c.dead[node].Store(true)
	c.Net.Node(c.Nodes[node].IP).Crash()
}

// node returns a node that lives.
func (c *cluster) node(rnd *rand.Rand) int {
	for {
		if i := rnd.IntN(len(c.engines)); !c.dead[i].Load() {
			return i
		}
	}
}

// clients runs clients that read and write two attributes of the session.
func (c *cluster) clients(seed uint64, clients, requests, think int) {
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(client)))
			for i := range requests {
				time.Sleep(time.Duration(rnd.IntN(300)) * time.Millisecond)
				o := history.Op{Kind: history.Swap, Register: []string{"a", "b"}[rnd.IntN(2)], New: fmt.Sprintf("%d.%d", client, i)}
				if rnd.IntN(3) == 0 {
					o.Kind, o.New = history.Read, ""
				}
				c.op(client, c.node(rnd), o, rnd.IntN(think))
			}
		})
	}
	wg.Wait()
}

func (c *cluster) linearizable() {
	ops := c.rec.Ops()
	known := 0
	for _, o := range ops {
		if !o.Unknown {
			known++
		}
	}
	if err := history.Check(ops, time.Minute); err != nil {
		c.t.Error(err)
	}
	if known < len(ops)/10 {
		c.t.Errorf("of %d requests only %d were answered", len(ops), known)
	}
	c.t.Logf("%d requests, %d answered", len(ops), known)
}

// scenario is a cluster, what clients do and what befalls it, decided by a seed.
type scenario struct {
	name string
	link channeltest.LinkPolicy
	run  func(t *testing.T, nw *channeltest.SimNet, seed uint64)
}

var scenarios = []scenario{
	{"lock-loss", channeltest.LinkPolicy{Latency: 2 * time.Millisecond, Jitter: 20 * time.Millisecond, Loss: 0.02}, func(t *testing.T, nw *channeltest.SimNet, seed uint64) {
		c := newCluster(t, nw, options{nodes: 3, lock: true})
		defer c.stop()
		c.clients(seed, 4, 12, 30)
		c.linearizable()
	}},
	{"lock-kill", channeltest.LinkPolicy{Jitter: 3 * time.Millisecond}, func(t *testing.T, nw *channeltest.SimNet, seed uint64) {
		c := newCluster(t, nw, options{nodes: 4, lock: true})
		defer c.stop()
		rnd := rand.New(rand.NewPCG(seed, 99))
		time.AfterFunc(time.Duration(200+rnd.IntN(1500))*time.Millisecond, func() { c.kill(rnd.IntN(4)) })
		c.clients(seed, 4, 15, 30)
		c.linearizable()
	}},
	{"lock-slow", channeltest.LinkPolicy{Jitter: 3 * time.Millisecond}, func(t *testing.T, nw *channeltest.SimNet, seed uint64) {
		c := newCluster(t, nw, options{nodes: 4, lock: true, timeout: 20 * time.Second})
		defer c.stop()
		rnd := rand.New(rand.NewPCG(seed, 95))
		time.AfterFunc(time.Duration(rnd.IntN(15000))*time.Millisecond, func() { c.crash(rnd.IntN(4)) })
		c.clients(seed, 4, 6, 4000) // longer than a node may be silent
		c.linearizable()
	}},
	{"lock-cut", channeltest.LinkPolicy{Jitter: 3 * time.Millisecond}, func(t *testing.T, nw *channeltest.SimNet, seed uint64) {
		c := newCluster(t, nw, options{nodes: 4, lock: true})
		defer c.stop()
		rnd := rand.New(rand.NewPCG(seed, 97))
		ip := c.Nodes[rnd.IntN(4)].IP // for too short a time to be taken for dead
		time.AfterFunc(time.Duration(200+rnd.IntN(1000))*time.Millisecond, func() { nw.Isolate(ip) })
		time.AfterFunc(time.Duration(1300+rnd.IntN(800))*time.Millisecond, nw.Heal)
		c.clients(seed, 4, 15, 30)
		c.linearizable()
	}},
	{"lock-crash", channeltest.LinkPolicy{Jitter: 3 * time.Millisecond}, func(t *testing.T, nw *channeltest.SimNet, seed uint64) {
		c := newCluster(t, nw, options{nodes: 5, lock: true})
		defer c.stop()
		rnd := rand.New(rand.NewPCG(seed, 96))
		time.AfterFunc(time.Duration(200+rnd.IntN(1000))*time.Millisecond, func() { c.crash(rnd.IntN(2)) })
		time.AfterFunc(time.Duration(9000+rnd.IntN(1000))*time.Millisecond, func() { c.kill(2 + rnd.IntN(2)) })
		c.clients(seed, 4, 30, 30)
		c.linearizable()
	}},
	{"split-delta", channeltest.LinkPolicy{Jitter: 3 * time.Millisecond}, split(delta.Factory)},
	{"split-backup", channeltest.LinkPolicy{Jitter: 3 * time.Millisecond}, split(backup.Factory)},
}

func run(t *testing.T, s scenario, seed uint64) {
	start := time.Now()
	cryptotest.SetGlobalRandom(t, seed)
	channeltest.Run(t, channeltest.SimConfig{Seed: seed, Link: s.link}, func(t *testing.T, nw *channeltest.SimNet) { s.run(t, nw, seed) })
	if t.Failed() {
		t.Logf("repeat it: make reproduce NAME=%s/%d; and add that name to conformance/history/testdata/regressions.txt", s.name, seed)
	}
	t.Logf("took %v", time.Since(start).Round(time.Millisecond))
}

func find(full string) (s scenario, seed uint64, err error) {
	before, after, _ := strings.Cut(full, "/")
	if seed, err = strconv.ParseUint(after, 10, 64); err != nil {
		return s, 0, fmt.Errorf("%q is not scenario/seed: %w", full, err)
	}
	i := slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == before })
	if i < 0 {
		return s, 0, errors.New("there is no scenario " + before)
	}
	return scenarios[i], seed, nil
}

// Histories of clients, with many seeds.
func TestHistories(t *testing.T) {
	if *name != "" {
		s, seed, err := find(*name)
		if err != nil {
			t.Fatal(err)
		}
		run(t, s, seed)
		return
	}
	n := *seeds
	if testing.Short() {
		n = 1
	}
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			for seed := *from; seed < *from+uint64(n); seed++ {
				t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) { run(t, s, seed) })
			}
		})
	}
}

// Seeds that once failed.
func TestRegressions(t *testing.T) {
	text, err := os.ReadFile("testdata/regressions.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		full := strings.TrimSpace(line)
		if full == "" || full[0] == '#' {
			continue
		}
		s, seed, err := find(full)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(full, func(t *testing.T) { run(t, s, seed) })
	}
}

// 25 writers to 25 attributes of one session, through three nodes and without
// stickiness: nothing is lost. And to one attribute: the rule sum, and Update
// under a lock, count exactly.
func TestParallelWriters(t *testing.T) {
	for _, locked := range []bool{false, true} {
		t.Run(fmt.Sprintf("lock=%t", locked), func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{Seed: 5, Link: channeltest.LinkPolicy{Jitter: 5 * time.Millisecond}}, func(t *testing.T, nw *channeltest.SimNet) {
				c := newCluster(t, nw, options{nodes: 3, lock: locked, level: core.Synced})
				defer c.stop()
				const writers, rounds = 25, 4
				var wg sync.WaitGroup
				for i := range writers {
					wg.Go(func() {
						for round := range rounds {
							node := (i + round) % 3
							paths := []string{fmt.Sprintf("/write?a=w%d&v=%d&think=%d", i, round, i%7), "/add?think=3"}
							if locked {
								paths = append(paths, "/count")
							}
							for _, p := range paths {
								if w := c.do(node, p); w.Code != http.StatusOK {
									t.Errorf("%s: %d %s", p, w.Code, w.Body)
								}
							}
						}
					})
				}
				wg.Wait()
				time.Sleep(5 * time.Second)
				for node := range 3 {
					for i := range writers {
						if v := c.do(node, fmt.Sprintf("/read?a=w%d", i)).Body.String(); v != strconv.Itoa(rounds-1) {
							t.Errorf("node %d has %q for writer %d", node+1, v, i)
						}
					}
					want := strconv.Itoa(writers * rounds)
					if v := c.do(node, "/value?a=sum").Body.String(); v != want {
						t.Errorf("node %d: the sum is %s, not %s", node+1, v, want)
					}
					if v := c.do(node, "/value?a=count").Body.String(); locked && v != want {
						t.Errorf("node %d: the count is %s, not %s", node+1, v, want)
					}
				}
				t.Logf("%d writers to as many attributes and one counter: none of %d changes lost", writers, 2*writers*rounds)
			})
		})
	}
}

// A user logs out on one node, while a slow request of the same session runs on
// another: the session never comes back, anywhere.
func TestLogoutIsForGood(t *testing.T) {
	for _, o := range []options{{nodes: 3}, {nodes: 3, level: core.Synced}, {nodes: 3, lock: true}} {
		t.Run(fmt.Sprintf("lock=%t,send=%s", o.lock, o.level), func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{Seed: 6}, func(t *testing.T, nw *channeltest.SimNet) {
				c := newCluster(t, nw, o)
				defer c.stop()
				time.Sleep(time.Second)
				var wg sync.WaitGroup
				for node := 1; node < 3; node++ {
					wg.Go(func() {
						w := c.do(node, "/swap?a=slow&v=x&think=2000")
						t.Logf("the slow request on node %d was answered with %d", node+1, w.Code)
					})
				}
				time.Sleep(500 * time.Millisecond)
				if w := c.do(0, "/logout"); w.Code != http.StatusOK {
					t.Errorf("logout: %d %s", w.Code, w.Body)
				}
				for range 20 {
					wg.Wait()
					time.Sleep(10 * time.Second)
					for node := range 3 {
						if w := c.do(node, "/read?a=slow"); w.Code != http.StatusGone {
							t.Fatalf("node %d still has the session: %d %s", node+1, w.Code, w.Body)
						}
					}
				}
			})
		})
	}
}

// The checker can fail: without the lock, requests that read and then write
// lose each other's changes.
func TestWithoutLock(t *testing.T) {
	wrong := 0
	for seed := range uint64(3) {
		channeltest.Run(t, channeltest.SimConfig{Seed: seed + 1}, func(t *testing.T, nw *channeltest.SimNet) {
			c := newCluster(t, nw, options{nodes: 3, level: core.Synced})
			defer c.stop()
			c.clients(seed+1, 4, 12, 30)
			if err := history.Check(c.rec.Ops(), time.Minute); err != nil {
				wrong++
			}
		})
	}
	if wrong == 0 {
		t.Error("nobody noticed that there is no lock")
	}
}
