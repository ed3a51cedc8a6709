package conformance_test

import (
	"fmt"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/interceptors/dispatch"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/interceptors/throughput"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
)

// Some saboteurs leave goroutines behind: that is what is wrong with them.
func TestMain(m *testing.M) {
	served()
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/longhouse-go/longhouse/conformance.leak"),
		goleak.IgnoreAnyFunction("github.com/longhouse-go/longhouse/conformance_test.leak"))
}

// parts are those of a default node.
func parts() conformance.Parts {
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
		Manager: func(s channel.Settings) (core.Manager, error) { return delta.Factory.New(channel.NoConfig, s) },
	}
}

func find(t *testing.T, n *conformance.Node, k session.Key) core.Handle {
	t.Helper()
	h, err := n.Table.Find(t.Context(), k)
	if err != nil {
		t.Fatalf("%s: %v", n.Name, err)
	}
	return h
}

func set(t *testing.T, n *conformance.Node, k session.Key, name string, value any, level core.Level) {
	t.Helper()
	h := find(t, n, k)
	if h == nil {
		t.Fatalf("%s does not find session %s", n.Name, k.ID)
	}
	defer h.Release()
	if err := h.Set(name, value); err != nil {
		t.Fatal(err)
	}
	if err := h.Commit(t.Context(), level); err != nil {
		t.Fatalf("%s: commit: %v", n.Name, err)
	}
}

// Five nodes are split 3 to 2 for a minute, with writes on both sides, a session
// ended on one side and written on the other; then the network heals.
func TestSplitAndHeal(t *testing.T) {
	start := time.Now()
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		c := conformance.NewCluster(t, nw, 5, parts())
		defer c.Stop()
		t.Logf("views equal after %v", c.Await(10*time.Second, conformance.ViewsEqual(c.Nodes...)))
		c.Await(10*time.Second, conformance.Ready(c.Nodes...))

		var keys []session.Key
		for i := range 20 {
			n := c.Nodes[i%5]
			h, err := n.Table.Create(t.Context(), "localhost/", session.NewOptions{MaxInactive: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			if err := h.Set("born", n.Name); err != nil {
				t.Fatal(err)
			}
			if err := h.Commit(t.Context(), core.Synced); err != nil {
				t.Fatal(err)
			}
			keys = append(keys, h.Key())
			h.Release()
		}
		if err := conformance.SameSessions(keys, c.Nodes...)(); err != nil {
			t.Fatalf("after synchronous commits: %v", err)
		}

		nw.Partition([]string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, []string{"10.0.0.4", "10.0.0.5"})
		left, right := c.Nodes[:3], c.Nodes[3:]
		took := c.Await(30*time.Second, func() error {
			if err := conformance.ViewsEqual(left...)(); err != nil {
				return err
			}
			return conformance.ViewsEqual(right...)()
		})
		t.Logf("both sides agree on the split after %v", took)
		for i, k := range keys {
			set(t, left[i%3], k, "left", i, core.Synced)
			set(t, right[i%2], k, "right", i, core.Synced)
			set(t, left[i%3], k, "both", fmt.Sprint("left", i), core.Synced)
			set(t, right[i%2], k, "both", fmt.Sprint("right", i), core.Synced)
		}
		ended := keys[:5] // on the left; the right goes on writing
		for _, k := range ended {
			h := find(t, left[0], k)
			if err := h.Invalidate(); err != nil {
				t.Fatal(err)
			}
			if err := h.Commit(t.Context(), core.Synced); err != nil {
				t.Fatal(err)
			}
			h.Release()
			set(t, right[0], k, "right", "after the end", core.Synced)
		}
		time.Sleep(time.Minute)

		nw.Heal()
		t.Logf("views equal %v after the heal", c.Await(30*time.Second, conformance.ViewsEqual(c.Nodes...)))
		t.Logf("sessions equal %v after that", c.Await(30*time.Second, conformance.SameSessions(keys, c.Nodes...)))

		for i, k := range keys {
			for _, n := range c.Nodes {
				h := find(t, n, k)
				if i < len(ended) {
					if h != nil {
						t.Errorf("%s: session %d has come back", n.Name, i)
						h.Release()
					}
					continue
				}
				if h == nil {
					t.Errorf("%s: session %d is lost", n.Name, i)
					continue
				}
				for _, name := range []string{"born", "left", "right", "both"} {
					var v any
					if ok, err := h.Get(name, &v); !ok || err != nil {
						t.Errorf("%s: session %d lacks %q: %v", n.Name, i, name, err)
					}
				}
				h.Release()
			}
		}
	})
	t.Logf("real time: %v", time.Since(start))
}
