package cmd

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/conformance/history"
)

// locked is the configuration of nodes that give a session to one request at a
// time.
var locked = []string{"--set", "engine.hosts[0].contexts[0].session.lock=session"}

// lockLoad is some clients of one session, who count in it on any node.
type lockLoad struct {
	t        *testing.T
	nodes    []atomic.Pointer[node]
	rec      history.Recorder
	began    time.Time
	stop     atomic.Bool
	wg       sync.WaitGroup
	answered atomic.Int64
	refused  atomic.Int64 // with an answer
	longest  atomic.Int64 // ns, of the requests that were answered well
}

// startLockLoad starts clients; prefer says which node gets most requests.
func startLockLoad(t *testing.T, nodes []*node, seed uint64, clients, prefer int) *lockLoad {
	l := &lockLoad{t: t, nodes: make([]atomic.Pointer[node], len(nodes)), began: time.Now()}
	for i, n := range nodes {
		l.nodes[i].Store(n)
	}
	c := newClient(t)
	if got := strings.TrimSpace(c.must(t, "GET", nodes[0], "/read")); got != "0" {
		t.Fatalf("a new session has %q", got)
	}
	for i := range clients {
		own := newClient(t)
		own.http.Timeout = 12 * time.Second
		l.wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(i)))
			for !l.stop.Load() {
				k := rnd.IntN(len(nodes) + 1)
				if k == len(nodes) {
					k = prefer
				}
				n := l.nodes[k].Load()
				if n == nil { // out of the balancer
					continue
				}
				own.cookie = c.cookie
				o := history.Op{Client: i, Kind: history.Add, Register: "n"}
				path := "/write"
				if rnd.IntN(4) == 0 {
					o.Kind, path = history.Read, "/read"
				}
				l.one(own, n, o, path)
			}
		})
	}
	return l
}

func (l *lockLoad) one(c *client, n *node, o history.Op, path string) {
	o.Call = time.Since(l.began)
	code, body, err := c.do("GET", n, path)
	o.Return = time.Since(l.began)
	body = strings.TrimSpace(body)
	switch {
	case err != nil || code != http.StatusOK:
		o.Unknown = true
		if err == nil {
			l.refused.Add(1)
			l.t.Logf("%.3fs to %.3fs: %s answers %d: %s", o.Call.Seconds(), o.Return.Seconds(), n.HTTP[0], code, body)
		}
		if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
			time.Sleep(10 * time.Millisecond)
			return // it was never sent
		}
	case o.Kind == history.Add:
		o.New = body
	case body != "0":
		o.Old = body
	}
	if !o.Unknown {
		l.answered.Add(1)
		for d := int64(o.Return - o.Call); ; {
			old := l.longest.Load()
			if d <= old || l.longest.CompareAndSwap(old, d) {
				break
			}
		}
	}
	l.rec.Add(o)
}

func (l *lockLoad) await(more int64) {
	l.t.Helper()
	start := l.answered.Load()
	eventually(l.t, time.Minute, fmt.Sprint(more, " more requests"), func() bool { return l.answered.Load() >= start+more })
}

// end stops the clients and checks what they have seen. At most so many requests
// were at a node that was frozen.
func (l *lockLoad) end(frozen int64) {
	l.t.Helper()
	l.stop.Store(true)
	l.wg.Wait()
	ops := l.rec.Ops()
	l.t.Logf("%d requests, %d answered, %d refused; the longest took %v", len(ops), l.answered.Load(), l.refused.Load(),
		time.Duration(l.longest.Load()).Round(time.Millisecond))
	if *strict && l.refused.Load() > frozen {
		l.t.Errorf("%d requests were refused, %d of them by a node that was frozen at most", l.refused.Load(), frozen)
	}
	if err := history.Check(ops, time.Minute); err != nil {
		l.t.Errorf("%.20000v", err)
	}
}

// lockNodes are three nodes.
func lockNodes(t *testing.T, manager string) (*group, []*node, func(i int) *node) {
	g := newGroup(t)
	args := append([]string{"--set", "cluster.manager.use=" + manager}, locked...)
	start := func(i int) *node { return g.start(string(rune('a'+i)), args...) }
	nodes := []*node{start(0), start(1), start(2)}
	awaitMembers(3, nodes...)
	return g, nodes, start
}

// Requests of one session on three nodes, of which a random one is killed again
// and again: what the clients see is what one node would have answered, and who
// asks a living node waits instead of being refused.
func TestLockNodeKilled(t *testing.T) {
	for _, manager := range managersUnderTest() {
		t.Run(manager, func(t *testing.T) {
			_, nodes, start := lockNodes(t, manager)
			rnd := rand.New(rand.NewPCG(*dice, 1))
			t.Logf("repeat the faults with -args -seed %d", *dice)
			l := startLockLoad(t, nodes, *dice, 6, rnd.IntN(3))
			for range *runs {
				l.await(150)
				i := rnd.IntN(len(nodes))
				time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
				t.Logf("%.3fs: kill %s", time.Since(l.began).Seconds(), nodes[i].HTTP[0])
				nodes[i].kill()
				l.await(150)
				nodes[i] = start(i)
				awaitMembers(3, nodes...)
				l.nodes[i].Store(nodes[i])
			}
			l.await(150)
			l.end(0)
		})
	}
}

// The node that has the session is frozen, and goes on later.
func TestLockOwnerFrozen(t *testing.T) {
	for _, manager := range managersUnderTest() {
		t.Run(manager, func(t *testing.T) {
			_, nodes, _ := lockNodes(t, manager)
			rnd := rand.New(rand.NewPCG(*dice, 2))
			t.Logf("repeat the faults with -args -seed %d", *dice)
			prefer := rnd.IntN(3)
			l := startLockLoad(t, nodes, *dice, 6, prefer)
			for range max(1, *runs/3) { // ten seconds each
				l.await(150)
				pids := nodes[prefer].processes()
				thaw := func() {
					for _, pid := range pids {
						_ = syscall.Kill(pid, syscall.SIGCONT)
					}
				}
				t.Cleanup(thaw)
				time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
				t.Logf("%.3fs: freeze %s", time.Since(l.began).Seconds(), nodes[prefer].HTTP[0])
				signalAll(t, pids, syscall.SIGSTOP)
				time.Sleep(500 * time.Millisecond) // until the balancer knows
				l.nodes[prefer].Store(nil)
				l.await(150)
				time.Sleep(time.Duration(rnd.IntN(6000)) * time.Millisecond)
				t.Logf("%.3fs: thaw", time.Since(l.began).Seconds())
				thaw()
				l.nodes[prefer].Store(nodes[prefer])
				l.await(150)
				awaitMembers(3, nodes...)
			}
			l.end(int64(6 * max(1, *runs/3)))
		})
	}
}
