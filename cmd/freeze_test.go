package cmd

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/core"
)

// processes are the node and its plugins.
func (n *node) processes() []int {
	pids := []int{n.cmd.Process.Pid}
	var all []core.PluginStatus
	n.admin("/v1/plugins", &all)
	for _, p := range all {
		if p.PID != 0 {
			pids = append(pids, p.PID)
		}
	}
	return pids
}

func signalAll(t *testing.T, pids []int, s syscall.Signal) {
	t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, s); err != nil {
			t.Fatalf("signal %v to process %d: %v", s, pid, err)
		}
	}
}

// served is one answered request of a load.
type served struct {
	at   time.Time // when it was answered
	took time.Duration
}

// writers write to a node with some users until it is stopped. Each user counts in
// its own session.
type writers struct {
	stop  atomic.Bool
	users []*client
	last  []int64 // the number that each user's last write got
	log   [][]served
	fails atomic.Int64
	// answered counts the requests that succeeded.
	answered atomic.Int64
	wg       sync.WaitGroup
}

func startWriters(t *testing.T, n *node, users int) *writers {
	l := &writers{last: make([]int64, users), log: make([][]served, users)}
	for i := range users {
		c := newClient(t)
		l.users = append(l.users, c)
		l.wg.Go(func() {
			for !l.stop.Load() {
				start := time.Now()
				code, body, err := c.do("GET", n, "/write")
				now := time.Now()
				l.log[i] = append(l.log[i], served{now, now.Sub(start)})
				v, bad := strconv.ParseInt(strings.TrimSpace(body), 10, 64)
				if err != nil || code != http.StatusOK || bad != nil {
					if l.fails.Add(1) == 1 {
						t.Errorf("a request failed: %d %v %s", code, err, body)
					}
					continue
				}
				if v != l.last[i]+1 {
					t.Errorf("user %d: the counter went from %d to %d", i, l.last[i], v)
				}
				l.last[i] = v
				l.answered.Add(1)
			}
		})
	}
	return l
}

func (l *writers) end() {
	l.stop.Store(true)
	l.wg.Wait()
}

// rate is how many requests per second were answered between two times, and
// longest how long the longest took that was answered after the first.
func (l *writers) rate(from, to time.Time) (perSecond float64, longest time.Duration) {
	n := 0
	for _, log := range l.log {
		for _, s := range log {
			if s.at.After(from) && s.at.Before(to) {
				n++
				longest = max(longest, s.took)
			}
		}
	}
	return float64(n) / to.Sub(from).Seconds(), longest
}

// A node is stopped by SIGSTOP under load: its kernel still accepts connections,
// so only the missing answer shows it. The other node's users must hardly notice,
// and when the node goes on it must catch up, with nothing lost or doubled.
func TestNodeFrozen(t *testing.T) {
	const calm = 3 * time.Second
	for _, manager := range managersUnderTest() {
		for _, send := range []string{"sync", "async"} {
			for _, what := range []string{"node and plugins", "node"} {
				if what == "node" && !*strict {
					continue // the plugins go on: the same, a little milder
				}
				t.Run(manager+"/"+send+"/"+what, func(t *testing.T) {
					g := newGroup(t)
					args := []string{"--set", "cluster.send=" + send, "--set", "cluster.manager.use=" + manager}
					a, b := g.start("a", args...), g.start("b", args...)
					awaitMembers(2, a, b)
					pids := b.processes()
					if what == "node" {
						pids = pids[:1]
					}
					// Whatever happens, the node has to go on for its end.
					t.Cleanup(func() {
						for _, pid := range pids {
							_ = syscall.Kill(pid, syscall.SIGCONT)
						}
					})
					l := startWriters(t, a, 8)
					time.Sleep(calm) // what the load does undisturbed
					frozen := time.Now()
					signalAll(t, pids, syscall.SIGSTOP)
					time.Sleep(2*time.Second + calm)
					thawed := time.Now()
					signalAll(t, pids, syscall.SIGCONT)
					time.Sleep(time.Second)
					l.end()

					before, _ := l.rate(frozen.Add(-calm+time.Second), frozen)
					during, _ := l.rate(frozen.Add(2*time.Second), thawed)
					_, longest := l.rate(frozen, thawed.Add(time.Second))
					t.Logf("%.0f requests/s before, %.0f from 2 s after the freeze on (%.2f), the longest request took %v",
						before, during, during/before, longest.Round(time.Millisecond))
					if l.fails.Load() > 0 {
						t.Errorf("%d requests failed", l.fails.Load())
					}
					// The numbers are those of a machine that has nothing else to
					// do; elsewhere it is enough that nobody waits for the channel's
					// or the freeze's end.
					wait, share := 4*time.Second, 0.05
					if *strict {
						wait, share = 1500*time.Millisecond, 0.9
					}
					if longest > wait {
						t.Errorf("a request took %v, want at most %v", longest, wait)
					}
					if during < share*before {
						t.Errorf("%.2f of the requests per second 2 s after the freeze, want %.2f", during/before, share)
					}
					for i, c := range l.users {
						want := fmt.Sprint(l.last[i])
						took := eventually(t, 30*time.Second, "user "+strconv.Itoa(i)+" has "+want+" on the other node", func() bool {
							code, body, err := c.do("GET", b, "/read")
							return err == nil && code == http.StatusOK && strings.TrimSpace(body) == want
						})
						if i == 0 {
							t.Logf("the node had caught up %v after it was asked", took.Round(time.Millisecond))
						}
					}
				})
			}
		}
	}
}
