package cmd

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/conformance/server"
)

// tellRedis sends a command and returns the first line of the answer.
func tellRedis(t *testing.T, s *server.Server, command string) string {
	t.Helper()
	conn, err := net.Dial("tcp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := fmt.Fprintf(conn, "%s\r\n", command); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(conn)
	line, err := lines.ReadString('\n')
	if err == nil && strings.HasPrefix(line, "$") { // a bulk string: its length comes first
		size := 0
		_, _ = fmt.Sscanf(line, "$%d", &size)
		text := make([]byte, size)
		_, err = readFull(lines, text)
		line = string(text)
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

func readFull(r *bufio.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

// working waits until the node says that its store works and that nothing waits.
func working(t *testing.T, n *node) {
	t.Helper()
	eventually(t, time.Minute, "the store works, and nothing waits", func() bool { return strings.HasPrefix(state(n), "the store works; 0 sessions") })
}

// The primary of a Redis is killed under load and its replica becomes the primary,
// then the other way round: the nodes follow, no request fails and nothing is lost.
func TestRedisFailover(t *testing.T) {
	primary, replica := server.Redis(t), server.Redis(t)
	follow := func(replica, primary *server.Server) {
		t.Helper()
		host, port, _ := net.SplitHostPort(primary.Addr)
		tellRedis(t, replica, "REPLICAOF "+host+" "+port)
		eventually(t, time.Minute, "the replica has everything", func() bool {
			return strings.Contains(tellRedis(t, replica, "INFO replication"), "master_link_status:up")
		})
	}
	follow(replica, primary)
	g := newGroup(t)
	st := storeUnderTest{options: fmt.Sprintf("use: redis, addresses: [%q, %q]", primary.Addr, replica.Addr)}
	args := st.args(t, "sync", "grace: 1s")
	a, b := g.start("a", args...), g.start("b", args...)
	awaitMembers(2, a, b)
	l := startWriters(t, a, 4)
	more := func() {
		t.Helper()
		from := l.answered.Load()
		eventually(t, time.Minute, "requests", func() bool { return l.answered.Load() > from+100 })
	}
	for range 2 {
		more()
		working(t, a)
		primary.Kill()
		more() // without a primary
		tellRedis(t, replica, "REPLICAOF NO ONE")
		eventually(t, time.Minute, "the store works", func() bool { return strings.HasPrefix(state(a), "the store works") })
		more()
		primary.Restart()
		follow(primary, replica)
		more()
		primary, replica = replica, primary
	}
	l.end()
	if l.fails.Load() > 0 {
		t.Errorf("%d requests failed", l.fails.Load())
	}
	working(t, a)
	l.caughtUp(t, b)
	a.kill()
	for i, c := range l.users {
		if got := readAs(t, c.cookie, b); got != fmt.Sprint(l.last[i]) {
			t.Errorf("user %d: the other node has %s, want %d", i, got, l.last[i])
		}
	}
}

// Servers of memcached are killed one after the other: the copy on the next one is
// used, then the failover server; they come back empty, and get everything again.
func TestMemcachedFailover(t *testing.T) {
	n1, n2, n3 := server.Memcached(t), server.Memcached(t), server.Memcached(t)
	g := newGroup(t)
	st := storeUnderTest{options: fmt.Sprintf("use: memcached, failover: [n3], nodes: [%q, %q, %q]", "n1:"+n1.Addr, "n2:"+n2.Addr, "n3:"+n3.Addr)}
	// On a busy machine a node that is told of a change may be slow to answer.
	args := st.args(t, "sync", "grace: 20s")
	a, b := g.start("a", args...), g.start("b", args...)
	awaitMembers(2, a, b)
	users := make([]*client, 6)
	for i := range users {
		users[i] = newClient(t)
	}
	count := 0
	// Everybody counts on each node in turn, as without stickiness.
	round := func(nodes ...*node) {
		t.Helper()
		for _, n := range nodes {
			count++
			for i, c := range users {
				if got := strings.TrimSpace(c.must(t, "GET", n, "/write")); got != fmt.Sprint(count) {
					t.Fatalf("user %d: %s, want %d; %s", i, got, count, state(n))
				}
			}
		}
	}
	round(a, b)
	n1.Kill()
	round(a, b, a, b)
	c := g.start("c", args...) // knows nothing but what is stored
	awaitMembers(3, a, b, c)
	round(c)
	n2.Kill() // only the failover server is left
	round(a, b, c)
	working(t, a)
	n1.Restart()
	n2.Restart()
	round(a, b, c)
	for _, n := range []*node{a, b, c} {
		working(t, n)
	}
	n3.Kill() // what it had is on the others again
	round(a, b, c)
	for _, n := range []*node{a, b, c} {
		working(t, n)
		n.kill()
	}
	d := g.start("d", args...)
	d.awaitReady()
	round(d)
}
