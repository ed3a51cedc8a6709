package cmd

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// holdEnv names a file; nodes that have it have an application that answers when
// the file is there.
const holdEnv = "LONGHOUSE_TEST_HOLD"

// holdApp counts at /count what it has not answered yet: at any other path a
// request that waits for the file, or a WebSocket that waits for its end.
func holdApp(file string) http.Handler {
	var inside atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/hold")
		if path == "/count" {
			fmt.Fprint(w, inside.Load())
			return
		}
		inside.Add(1)
		defer inside.Add(-1)
		if path == "/ws" {
			c, err := websocket.Accept(w, r, nil)
			if err != nil {
				return
			}
			defer c.CloseNow()
			stop := context.AfterFunc(r.Context(), func() { _ = c.Close(websocket.StatusGoingAway, "the node stops") })
			defer stop()
			_, _, _ = c.Read(context.Background())
			return
		}
		for {
			if _, err := os.Stat(file); err == nil {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		fmt.Fprint(w, "done")
	})
}

// A node is told to stop while 1,000 requests and 100 WebSockets are open: each
// request is answered, the WebSockets get a signal, and the node ends.
func TestTerminatedWithOpenRequests(t *testing.T) {
	const requests, sockets = 1000, 100
	g := newGroup(t)
	file := filepath.Join(t.TempDir(), "go")
	t.Setenv(holdEnv, file)
	a := g.start("a", "--set", "node.drain_timeout="+drainLimit.String())
	a.awaitReady()
	base := "http://" + a.HTTP[0] + "/hold"
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	c := &http.Client{Transport: tr, Timeout: 2 * drainLimit}
	get := func(path string) (string, error) {
		resp, err := c.Get(base + path)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	}
	results := make(chan error, requests)
	for range requests {
		go func() {
			got, err := get("/")
			if err == nil && got != "done" {
				err = fmt.Errorf("answer %.100q", got)
			}
			results <- err
		}()
	}
	var ended sync.WaitGroup
	var told atomic.Int64
	for range sockets {
		ws, _, err := websocket.Dial(t.Context(), "ws"+strings.TrimPrefix(base, "http")+"/ws", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		ended.Go(func() {
			if _, _, err := ws.Read(t.Context()); websocket.CloseStatus(err) == websocket.StatusGoingAway {
				told.Add(1)
			}
		})
	}
	eventually(t, time.Minute, "all are inside", func() bool {
		n, err := get("/count")
		return err == nil && n == fmt.Sprint(requests+sockets)
	})
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "no new connections", func() bool {
		conn, err := net.Dial("tcp", a.HTTP[0])
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for range requests {
		if err := <-results; err != nil {
			if failed++; failed == 1 {
				t.Errorf("a running request was lost: %v", err)
			}
		}
	}
	ended.Wait()
	if told.Load() != sockets {
		t.Errorf("%d of %d WebSockets were told that the node stops", told.Load(), sockets)
	}
	a.awaitEnd()
	if failed > 0 {
		t.Errorf("%d of %d requests were lost", failed, requests)
	}
}

// thawAtEnd has stopped processes go on at the end of the test, for their end.
func thawAtEnd(t *testing.T, pids []int) {
	t.Cleanup(func() {
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGCONT)
		}
	})
}

// caughtUp waits until the other node has the last number of each user.
func (l *writers) caughtUp(t *testing.T, b *node) {
	t.Helper()
	for i, c := range l.users {
		eventually(t, 30*time.Second, fmt.Sprintf("user %d has %d on the other node", i, l.last[i]), func() bool {
			return readAs(t, c.cookie, b) == fmt.Sprint(l.last[i])
		})
	}
}

// A node is stopped for 4, 16 and 32 s: the other one's users do not notice, and
// then it knows what happened.
func TestFrozenForLong(t *testing.T) {
	g := newGroup(t)
	a, b := g.start("a"), g.start("b")
	awaitMembers(2, a, b)
	pids := b.processes()
	thawAtEnd(t, pids)
	l := startWriters(t, a, 4)
	for _, freeze := range []time.Duration{4 * time.Second, 16 * time.Second, 32 * time.Second} {
		if freeze > 20*time.Second && !*strict {
			break // -strict
		}
		signalAll(t, pids, syscall.SIGSTOP)
		time.Sleep(freeze)
		signalAll(t, pids, syscall.SIGCONT)
		awaitMembers(2, a, b)
		before := l.answered.Load()
		eventually(t, 30*time.Second, "requests after it", func() bool { return l.answered.Load() > before+50 })
	}
	l.end()
	if l.fails.Load() > 0 {
		t.Errorf("%d requests failed", l.fails.Load())
	}
	l.caughtUp(t, b)
	t.Logf("%d requests", l.answered.Load())
}

// A node gets a twentieth of the time that it needs: the users of the other one
// are served, and in the end both say the same.
func TestStarved(t *testing.T) {
	g := newGroup(t)
	a, b := g.start("a", "--set", "cluster.send=sync"), g.start("b", "--set", "cluster.send=sync")
	awaitMembers(2, a, b)
	pids := b.processes()
	thawAtEnd(t, pids)
	l := startWriters(t, a, 4)
	for begin := time.Now(); time.Since(begin) < 8*time.Second; {
		signalAll(t, pids, syscall.SIGSTOP)
		time.Sleep(95 * time.Millisecond)
		signalAll(t, pids, syscall.SIGCONT)
		time.Sleep(5 * time.Millisecond)
	}
	before := l.answered.Load()
	eventually(t, 30*time.Second, "requests after it", func() bool { return l.answered.Load() > before+50 })
	l.end()
	if l.fails.Load() > 0 {
		t.Errorf("%d requests failed", l.fails.Load())
	}
	awaitMembers(2, a, b)
	l.caughtUp(t, b)
	t.Logf("%d requests, %d of them while it was starved", l.answered.Load(), before)
}
