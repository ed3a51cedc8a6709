package cmd

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/core"
)

func info(t *testing.T, body string) (i struct {
	Node       string         `json:"node"`
	ID         string         `json:"id"`
	IsNew      bool           `json:"isNew"`
	Attributes map[string]any `json:"attributes"`
}) {
	t.Helper()
	if err := json.Unmarshal([]byte(body), &i); err != nil {
		t.Fatalf("%v in %q", err, body)
	}
	return i
}

// Two nodes that run a Tomcat 5.5 how-to's configuration, as it is but for the
// addresses, share a session.
func TestTomcatSeedsShareASession(t *testing.T) {
	g := newGroup(t)
	a := g.start("", "-c", seed(t, "18-s002-server-node1.xml"), "--lenient")
	b := g.start("", "-c", seed(t, "19-s002-server-node2.xml"), "--lenient")
	awaitMembers(2, a, b)

	c := newClient(t)
	c.must(t, "POST", a, "/set?dataName=colour&dataValue=green")
	if !strings.HasSuffix(c.cookie, ".node1") {
		t.Errorf("cookie %q, want the route node1", c.cookie)
	}
	i := info(t, c.must(t, "GET", b, "/info"))
	if i.Attributes["colour"] != "green" || i.Node != "node2" {
		t.Errorf("node 2 answers %+v", i)
	}
	if !strings.HasSuffix(c.cookie, ".node1") { // the file has no JvmRouteBinderValve: check warns of it
		t.Errorf("cookie %q after the failover, want the old route", c.cookie)
	}
}

// Two nodes with a user's BackupManager, as it is but for the addresses: the
// session of one goes on on the other when the first is killed.
func TestTomcatBackupManagerSeed(t *testing.T) {
	g := newGroup(t)
	file := seed(t, "10-s000-cluster-backupmanager.xml")
	a, b := g.start("a", "-c", file), g.start("b", "-c", file)
	awaitMembers(2, a, b)
	c := newClient(t)
	c.must(t, "POST", a, "/set?dataName=colour&dataValue=green")
	a.kill()
	if i := info(t, c.must(t, "GET", b, "/info")); i.Attributes["colour"] != "green" || i.IsNew {
		t.Errorf("the other node answers %+v", i)
	}
}

// managersUnderTest are those of the flag -manager.
func managersUnderTest() []string { return strings.Split(*managers, ",") }

// With the manager backup each session is on two of three nodes. When one is
// killed the missing copies are made on the others, so that a second one may be
// killed too.
func TestCopiesAreMadeAgain(t *testing.T) {
	const users = 60
	g := newGroup(t)
	args := []string{"--set", "cluster.send=sync", "--set", "cluster.manager.use=backup"}
	a, b, c := g.start("a", args...), g.start("b", args...), g.start("c", args...)
	awaitMembers(3, a, b, c)
	var all []*client
	for i := range users {
		u := newClient(t)
		for range i + 1 {
			u.must(t, "GET", []*node{a, b, c}[i%3], "/write")
		}
		all = append(all, u)
	}
	eventually(t, 30*time.Second, "two copies of each session", func() bool { return known(a)+known(b)+known(c) == 2*users })
	t.Logf("%d sessions: %d, %d and %d are kept on the three nodes", users, known(a), known(b), known(c))
	a.kill()
	took := eventually(t, 30*time.Second, "all sessions on both of the others", func() bool { return known(b) == users && known(c) == users })
	t.Logf("all copies were there again %v after the kill", took.Round(time.Millisecond))
	b.kill()
	for i, u := range all {
		if got := strings.TrimSpace(u.must(t, "GET", c, "/read")); got != strconv.Itoa(i+1) {
			t.Errorf("user %d: the last node has %s, want %d", i, got, i+1)
		}
	}
}

// Killing a plugin is an event, not an outage: no request fails, no member is
// removed, the plugin is back at once and knows what it knew.
func TestPluginsKilled(t *testing.T) {
	for _, manager := range managersUnderTest() {
		t.Run(manager, func(t *testing.T) { pluginsKilled(t, manager) })
	}
}

func pluginsKilled(t *testing.T, manager string) {
	g := newGroup(t)
	args := []string{"--set", "cluster.send=sync", "--set", "cluster.manager.use=" + manager}
	a := g.start("a", append(args, "--set", "cluster.deployer.use=watch", "--set", "cluster.deployer.dir="+t.TempDir())...)
	b := g.start("b", args...)
	awaitMembers(2, a, b)

	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	var served, failed atomic.Int64
	var firstFailure sync.Once
	for range 8 {
		c := newClient(t)
		load.Go(func() {
			for ctx.Err() == nil {
				code, body, err := c.do("GET", a, "/write")
				if err != nil || code != http.StatusOK {
					failed.Add(1)
					firstFailure.Do(func() { t.Errorf("a request failed: %d %v %s", code, err, body) })
				}
				served.Add(1)
			}
		})
	}
	for _, kind := range []string{"manager", "membership", "deployer"} {
		before := plugin(a, kind)
		if before.PID == 0 || before.State != "ready" {
			t.Fatalf("%s before the kill: %+v", kind, before)
		}
		start := served.Load()
		eventually(t, 10*time.Second, "load", func() bool { return served.Load() > start+100 })
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		took := eventually(t, 5*time.Second, kind+" is back", func() bool {
			p := plugin(a, kind)
			return p.State == "ready" && p.Generation > before.Generation
		})
		t.Logf("%s: killed pid %d, back after %v", kind, before.PID, took.Round(time.Millisecond))
		start = served.Load()
		eventually(t, 10*time.Second, "load after the kill", func() bool { return served.Load() > start+100 })
		var ms []json.RawMessage
		if a.admin("/v1/members", &ms); len(ms) != 2 {
			t.Errorf("after the kill of %s there are %d members, want 2", kind, len(ms))
		}
	}
	stop()
	load.Wait()
	eventually(t, 10*time.Second, "the same replicas on both nodes", func() bool {
		x, y := known(a), known(b)
		return x == y && x > 0
	})
	t.Logf("%d requests, %d failed, %d sessions on each node", served.Load(), failed.Load(), known(a))
}

func plugin(n *node, kind string) core.PluginStatus {
	var all []core.PluginStatus
	n.admin("/v1/plugins", &all)
	for _, p := range all {
		if p.Kind == kind {
			return p
		}
	}
	n.t.Fatalf("no %s among %+v", kind, all)
	return core.PluginStatus{}
}

// known returns how many sessions the node's manager holds.
func known(n *node) int {
	var r struct {
		Tables []struct {
			Status core.ManagerStatus `json:"status"`
		} `json:"tables"`
	}
	n.admin("/v1/sessions", &r)
	sum := 0
	for _, t := range r.Tables {
		sum += t.Status.Sessions
	}
	return sum
}

// When a node is killed, none of its plugin processes outlives it by 2 s.
func TestNoOrphans(t *testing.T) {
	g := newGroup(t)
	a := g.start("a", "--set", "cluster.deployer.use=watch", "--set", "cluster.deployer.dir="+t.TempDir())
	a.awaitReady()
	var all []core.PluginStatus
	a.admin("/v1/plugins", &all)
	if len(all) != 3 {
		t.Fatalf("%d plugins, want 3: %+v", len(all), all)
	}
	a.kill()
	took := eventually(t, 2*time.Second, "all plugin processes are gone", func() bool {
		for _, p := range all {
			if running(p.PID) {
				return false
			}
		}
		return true
	})
	t.Logf("%d processes gone after %v", len(all), took.Round(time.Millisecond))
}

// running reports whether a process runs; one that has ended and was not waited
// for by its new parent does not.
func running(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(state, "Z")
}

// A joining node has all sessions before it says that it is ready.
func TestJoinReceivesEverything(t *testing.T) {
	g := newGroup(t)
	a, b := g.start("a"), g.start("b")
	awaitMembers(2, a, b)
	var wg sync.WaitGroup
	var next atomic.Int64
	var failed atomic.Int64
	start := time.Now()
	for range 16 {
		c := newClient(t)
		wg.Go(func() {
			for next.Add(1) <= int64(*sessions) {
				c.cookie = ""
				if code, _, err := c.do("GET", a, "/write?size=1024"); err != nil || code != http.StatusOK {
					failed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if failed.Load() > 0 {
		t.Fatalf("%d requests failed", failed.Load())
	}
	t.Logf("%d sessions of 1 KiB made in %v", *sessions, time.Since(start).Round(time.Millisecond))
	eventually(t, 30*time.Second, "all sessions on both nodes", func() bool { return known(a) == *sessions && known(b) == *sessions })

	start = time.Now()
	joined := g.start("c")
	joined.awaitReady()
	if got := known(joined); got != *sessions {
		t.Errorf("ready with %d sessions, want %d", got, *sessions)
	}
	var r struct {
		Tables []struct {
			Status core.ManagerStatus `json:"status"`
		} `json:"tables"`
	}
	joined.admin("/v1/sessions", &r)
	t.Logf("joined and ready with %d sessions %v after its start, transfer took %v",
		known(joined), time.Since(start).Round(time.Millisecond), r.Tables[0].Status.Transfer.Round(time.Millisecond))
}
