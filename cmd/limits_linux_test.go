package cmd

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// setLimit changes the soft limit of a process.
func setLimit(t *testing.T, pid, what int, value uint64) {
	t.Helper()
	var old unix.Rlimit
	err := unix.Prlimit(pid, what, nil, &old)
	if err == nil {
		err = unix.Prlimit(pid, what, &unix.Rlimit{Cur: value, Max: old.Max}, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A node runs out of file handles: users with a connection are served and what
// they do is replicated; when handles are free again, everybody is served.
func TestOutOfHandles(t *testing.T) {
	g := newGroup(t)
	a, b := g.start("a", "--set", "cluster.send=sync"), g.start("b", "--set", "cluster.send=sync")
	awaitMembers(2, a, b)
	c := newClient(t)
	c.must(t, "GET", a, "/write")
	pid := a.cmd.Process.Pid
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	// The limit is about the number of a handle, not about how many are open.
	highest := 0
	for _, e := range open {
		n, _ := strconv.Atoi(e.Name())
		highest = max(highest, n)
	}
	setLimit(t, pid, unix.RLIMIT_NOFILE, uint64(highest+8))
	var greedy []net.Conn
	for range 100 {
		conn, err := net.Dial("tcp", a.HTTP[0])
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		greedy = append(greedy, conn)
	}
	for range 50 {
		c.must(t, "GET", a, "/write")
	}
	for _, conn := range greedy {
		conn.Close()
	}
	eventually(t, 30*time.Second, "somebody new is served", func() bool {
		code, _, err := newClient(t).do("GET", a, "/write")
		return err == nil && code == 200
	})
	if got := readAs(t, c.cookie, b); got != "51" {
		t.Errorf("the other node has %s", got)
	}
	eventually(t, 30*time.Second, "ready", func() bool { return a.admin("/readyz", nil) == 200 })
}

// The process of the manager gets no more memory: it ends, and comes back with
// what it had; no request fails.
func TestOutOfMemory(t *testing.T) {
	g := newGroup(t)
	a, b := g.start("a", "--set", "cluster.send=sync"), g.start("b", "--set", "cluster.send=sync")
	awaitMembers(2, a, b)
	l := startWriters(t, a, 4)
	before := plugin(a, "manager")
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", before.PID))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseUint(strings.Fields(string(statm))[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	setLimit(t, before.PID, unix.RLIMIT_AS, pages*uint64(os.Getpagesize()))
	for range 200 { // each is a megabyte that it needs
		c := newClient(t)
		c.must(t, "GET", a, "/write?size=1000000")
		if plugin(a, "manager").Generation > before.Generation {
			break
		}
	}
	eventually(t, 30*time.Second, "the manager is back", func() bool {
		p := plugin(a, "manager")
		return p.State == "ready" && p.Generation > before.Generation
	})
	from := l.answered.Load()
	eventually(t, 30*time.Second, "requests after it", func() bool { return l.answered.Load() > from+50 })
	l.end()
	if l.fails.Load() > 0 {
		t.Errorf("%d requests failed", l.fails.Load())
	}
	l.caughtUp(t, b)
	eventually(t, 30*time.Second, "the same replicas on both nodes", func() bool { return known(a) == known(b) && known(a) > 4 })
}
