package conformance_test

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/manager/backup"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/manager/persistent"
)

const listened = "localhost/shop"

// told is what the listeners of one node hear.
type told struct {
	mu   sync.Mutex
	list []core.SessionEvent
}

func (h *told) SessionEvent(e core.SessionEvent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = append(h.list, e)
}

// listen has the listener hear everything of all nodes.
func (h *told) listen(n *conformance.Node) {
	n.Table.Watch(listened, core.SessionWatch{
		Kinds: core.AllSessionEvents, Cluster: core.AllSessionEvents,
		Tell: func(e core.SessionEvent, _ bool) { h.SessionEvent(e) }, Room: func() {},
	})
}

// of returns in a few words what was heard of a session, under all its ids.
func (h *told) of(keys ...session.Key) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var words []string
	for _, e := range h.list {
		if !slices.Contains(keys, e.Key) {
			continue
		}
		word := e.Kind.String()
		if e.Kind == core.SessionDestroyed {
			word = map[session.EndKind]string{session.Expired: "expired", session.Invalidated: "invalidated"}[e.Reason]
		}
		if e.Local {
			word += " here"
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

// managersUnderTest makes the managers of a cluster.
func managersUnderTest(t *testing.T) map[string]func(channel.Settings) (core.Manager, error) {
	options := fmt.Sprintf("store: file\ndirectory: %q\nsync: false\n", filepath.Join(t.TempDir(), "sessions"))
	return map[string]func(channel.Settings) (core.Manager, error){
		"delta":  func(s channel.Settings) (core.Manager, error) { return delta.Factory.New(channel.NoConfig, s) },
		"backup": func(s channel.Settings) (core.Manager, error) { return backup.Factory.New(channel.NoConfig, s) },
		"file": func(s channel.Settings) (core.Manager, error) {
			return persistent.Factory.New(func(into any) error { return config.Decode([]byte(options), "test", into) }, s)
		},
	}
}

// do changes a session and waits until the change is stored.
func do(t *testing.T, n *conformance.Node, key session.Key, f func(core.Handle) error) session.Key {
	t.Helper()
	h := find(t, n, key)
	if h == nil {
		t.Fatalf("%s has no session %s", n.Name, session.Prefix(key.ID))
	}
	defer h.Release()
	if err := f(h); err != nil {
		t.Fatal(err)
	}
	if err := h.Commit(t.Context(), core.Synced); err != nil {
		t.Fatal(err)
	}
	return h.Key()
}

func born(t *testing.T, n *conformance.Node, life time.Duration) session.Key {
	t.Helper()
	h, err := n.Table.Create(t.Context(), listened, session.NewOptions{MaxInactive: life})
	if err != nil {
		t.Fatal(err)
	}
	key := h.Key()
	if err := h.Commit(t.Context(), core.Synced); err != nil {
		t.Fatal(err)
	}
	h.Release()
	return key
}

func same(n core.Handle) error { return nil }

// Listeners of all nodes hear each thing once, with every manager: whoever does
// it, if the node of a session dies, and in a split.
func TestListenersWithManagers(t *testing.T) {
	for name, manager := range managersUnderTest(t) {
		t.Run(name, func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{Seed: 5}, func(t *testing.T, nw *channeltest.SimNet) {
				p := parts()
				p.Manager = manager
				c := conformance.NewCluster(t, nw, 4, p)
				c.Await(30*time.Second, conformance.ViewsEqual(c.Nodes...))
				c.Await(30*time.Second, conformance.Ready(c.Nodes...))
				heard := make([]told, len(c.Nodes))
				for i, n := range c.Nodes {
					heard[i].listen(n)
				}
				settle := func() { time.Sleep(2 * time.Second); synctest.Wait() }
				expect := func(words func(node int) string, keys ...session.Key) {
					t.Helper()
					for i, n := range c.Nodes {
						if got, want := heard[i].of(keys...), words(i); got != want {
							t.Errorf("%s heard %q, want %q", n.Name, got, want)
						}
					}
				}
				at := func(list ...any) func(int) string { // pairs of what and by which node
					return func(node int) string {
						var words []string
						for i := 0; i < len(list); i += 2 {
							word := list[i].(string)
							if list[i+1] == node {
								word += " here"
							}
							words = append(words, word)
						}
						return strings.Join(words, ", ")
					}
				}
				settle()

				// Three nodes, one after the other, each does something.
				key := born(t, c.Nodes[0], time.Hour)
				settle()
				next := do(t, c.Nodes[1], key, func(h core.Handle) error {
					if err := h.Set("x", 1); err != nil {
						return err
					}
					return h.Renew()
				})
				settle()
				do(t, c.Nodes[2], next, core.Handle.Invalidate)
				settle()
				expect(at("created", 0, "attribute added", 1, "renewed", 1, "invalidated", 2), key, next)

				// One expires where it was used last, though it is in two tables.
				key = born(t, c.Nodes[0], 2*time.Minute)
				settle()
				do(t, c.Nodes[1], key, func(h core.Handle) error { return h.Set("x", 1) })
				time.Sleep(4 * time.Minute)
				synctest.Wait()
				expect(at("created", 0, "attribute added", 1, "expired", 1), key)

				// One that is not used for a while leaves the table; its end is told.
				key = born(t, c.Nodes[3], 7*time.Minute)
				do(t, c.Nodes[3], key, func(h core.Handle) error { return h.Set("x", 1) })
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				expect(at("created", 3, "attribute added", 3, "expired", 3), key)
				last := heard[3].list[len(heard[3].list)-1]
				var x int
				if ok, err := last.Get("x", &x); last.Kind != core.SessionDestroyed || !ok || err != nil || x != 1 {
					t.Errorf("the end of an idle session: %+v", last)
				}

				// A split: what one side does the other hears when it heals.
				kept := born(t, c.Nodes[0], 2*time.Hour)
				ended := born(t, c.Nodes[0], 5*time.Minute)
				settle()
				left, right := []string{c.Nodes[0].IP, c.Nodes[1].IP}, []string{c.Nodes[2].IP, c.Nodes[3].IP}
				nw.Partition(left, right)
				c.Await(3*time.Minute, conformance.ViewsEqual(c.Nodes[:2]...))
				c.Await(3*time.Minute, conformance.ViewsEqual(c.Nodes[2:]...))
				made := born(t, c.Nodes[2], 2*time.Hour)
				do(t, c.Nodes[0], ended, core.Handle.Invalidate)
				settle()
				nw.Heal()
				c.Await(5*time.Minute, conformance.ViewsEqual(c.Nodes...))
				time.Sleep(8 * time.Minute) // also those who were cut off have found out
				synctest.Wait()
				for i := range heard {
					if got := heard[i].of(ended); strings.Count(got, "invalidated")+strings.Count(got, "expired") != 1 || strings.Count(got, "created") != 1 {
						t.Errorf("%s heard of the session that ended in the split: %q", c.Nodes[i].Name, got)
					}
				}
				expect(at("created", 0), kept)
				expect(at("created", 2), made)

				// A node dies. Nobody uses its sessions, except one.
				var keys []session.Key
				for range 10 {
					keys = append(keys, born(t, c.Nodes[0], 4*time.Minute))
				}
				settle()
				nw.Node(c.Nodes[0].IP).Kill()
				dead := c.Nodes[0]
				c.Nodes = c.Nodes[1:]
				heard = heard[1:]
				c.Await(3*time.Minute, conformance.ViewsEqual(c.Nodes...))
				do(t, c.Nodes[0], keys[0], same)
				time.Sleep(3 * time.Minute)
				synctest.Wait()
				expect(at("created", -1), keys[0])
				time.Sleep(5 * time.Minute)
				synctest.Wait()
				for _, key := range keys {
					n := 0
					for i := range heard {
						got := heard[i].of(key)
						if got != "created, expired" && got != "created, expired here" {
							t.Errorf("%s heard of a session of a dead node: %q", c.Nodes[i].Name, got)
						}
						n += strings.Count(got, "here")
					}
					if n != 1 {
						t.Errorf("%d nodes have found out the end of a session", n)
					}
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				_ = dead.Stop(ctx)
				c.Stop()
			})
		})
	}
}
