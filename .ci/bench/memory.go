package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
)

// bound is what a session may cost, in bytes, where it is held.
func bound(payload int) int { return payload*3/2 + 400 }

// memoryParts measures what sessions cost. The heap of a process is what is left
// after a collection, without what it had before there were sessions.
//
// Two groups of two nodes get the same sessions, all made on the first node. In
// one the managers are processes of their own, as usual; in the other they are
// a part of their nodes: the heap of the second node there is that of its
// manager, which has only replicas, and what the first node has more there than
// in the other group is that of its manager, which has the sessions of its own
// node.
func memoryParts() {
	fmt.Println("memory: bytes per session on the node that uses it (table and manager) and on the one that has a replica")
	fmt.Println("  live: heap after a collection, without what was there before; rss: resident memory of the processes, in MiB")
	fmt.Printf("  %-10s %8s %5s %6s  %6s %8s %8s %7s  %7s %7s %7s %7s\n", "", "", "", "", "live", "live", "live", "", "rss", "rss", "rss", "rss")
	fmt.Printf("  %-10s %8s %5s %6s  %6s %8s %8s %7s  %7s %7s %7s %7s\n", "manager", "sessions", "bytes", "bound", "table", "manager", "replica", "both", "node", "manager", "node 2", "manager")
	for _, manager := range list(*managers) {
		for _, n := range numbers(*counts) {
			for _, s := range numbers(*sizes) {
				replicated(manager, n, s)
			}
		}
	}
	if *stored {
		tables()
	}
}

func replicated(manager string, n, size int) {
	apart := held(2, n, size, "cluster.manager.use="+manager)
	within := held(2, n, size, "cluster.manager.use="+manager, "cluster.manager.mode=direct")
	table := apart[0].heap / n
	owner := (within[0].heap - apart[0].heap) / n
	replica := within[1].heap / n
	verdict := func(got int) string { return wanted(float64(got), float64(bound(size)), false) }
	fmt.Printf("  %-10s %8d %5d %6d  %6d %8d %8d %7d  %7d %7d %7d %7d  table %s, manager %s, replica %s\n", manager, n, size, bound(size),
		table, owner, replica, table+owner,
		apart[0].node>>20, apart[0].manager>>20, apart[1].node>>20, apart[1].manager>>20,
		verdict(table), verdict(owner), verdict(replica))
}

// tables measures a manager that keeps sessions in a store: the node has those
// that are used in its table, and the manager what the store has of them.
func tables() {
	const manager = "redis"
	if _, err := exec.LookPath("redis-server"); err != nil {
		fmt.Println("  redis-server is missing: no figures for managers with a store")
		return
	}
	n := numbers(*counts)[0]
	for _, s := range numbers(*sizes) {
		port := freePort("tcp")
		stop := start(exec.Command("redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", work), nil)
		args := []string{"cluster.manager.use=" + manager, "cluster.manager.addresses[0]=127.0.0.1:" + port}
		apart := held(1, n, s, args...)
		within := held(1, n, s, append(args, "cluster.manager.mode=direct")...)
		stop()
		table, owner := apart[0].heap/n, (within[0].heap-apart[0].heap)/n
		fmt.Printf("  %-10s %8d %5d %6d  %6d %8d %8s %7d  %7d %7d %7s %7s  table %s, manager %s\n", manager, n, s, bound(s),
			table, owner, "-", table+owner, apart[0].node>>20, apart[0].manager>>20, "-", "-",
			wanted(float64(table), float64(bound(s)), false), wanted(float64(owner), float64(bound(s)), false))
	}
}

// portion is how many sessions are made at once.
const portion = 20_000

// usage is the memory of a node's processes in bytes.
type usage struct{ heap, node, manager int }

// held starts nodes, makes sessions on the first one and returns what the nodes
// need for them.
func held(nodes, n, size int, args ...string) []usage {
	c := newCluster(args...)
	defer c.stop()
	for range nodes {
		c.start()
	}
	c.together()
	out := make([]usage, nodes)
	for i, node := range c.nodes {
		out[i].heap = -node.heap()
	}
	// The demo shares the bytes that /write stores among all sessions. Nobody is
	// made to fall behind: that would be another measurement.
	path := "/set?dataName=blob&dataValue=" + strings.Repeat("x", size)
	for made := 0; made < n; {
		next := min(made+portion, n)
		fill(c.nodes[0].http, "POST", path, next-made)
		for _, node := range c.nodes {
			if nodes > 1 { // else the store has them
				node.holds(next)
			}
		}
		made = next
	}
	c.nodes[0].committed()
	for i, node := range c.nodes {
		node.heap()
		out[i].heap += node.heap() // what has a finalizer goes with the second collection
		out[i].node, out[i].manager = resident(node.cmd.Process.Pid), resident(node.plugin().PID)
	}
	return out
}

// committed waits until no change is on its way to the manager or to a store.
func (n *node) committed() {
	await("changes are not committed", func() bool {
		sum, found := 0.0, false
		for line := range bytes.Lines(n.fetch("/metrics")) {
			if bytes.HasPrefix(line, []byte("longhouse_sessions_uncommitted{")) || bytes.HasPrefix(line, []byte("longhouse_store_pending")) {
				var v float64
				_, _ = fmt.Sscan(string(line[bytes.LastIndexByte(line, ' ')+1:]), &v)
				sum, found = sum+v, true
			}
		}
		return found && sum == 0
	})
}

// heap returns the size of the heap after a collection.
func (n *node) heap() (size int) {
	text := n.fetch("/debug/pprof/heap?gc=1&debug=1")
	_, rest, ok := bytes.Cut(text, []byte("\n# HeapAlloc = "))
	if _, err := fmt.Sscan(string(rest[:min(len(rest), 32)]), &size); !ok || err != nil {
		fail(fmt.Errorf("%s does not tell its heap", n.admin))
	}
	return size
}

func (n *node) fetch(path string) []byte {
	c := http.Client{Timeout: patience}
	resp, err := c.Get("http://" + n.admin + path)
	check(err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	check(err)
	return b
}
