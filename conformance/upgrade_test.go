package conformance_test

import (
	"bytes"
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// In a rolling upgrade a session goes from a newer node to older ones and back.
// An attribute of a type that only the newer version knows, encoded with a field
// that only it writes, comes back byte for byte: after other attributes were
// changed, the id was renewed and the nodes before were stopped; with every
// manager.
func TestRollingUpgradeKeepsAttributes(t *testing.T) {
	key := session.Key{Context: listened, ID: session.NewID()}
	value := []byte{0xd9, 0xff, 0x01, 0x82, 0x01, 0xf9, 0x3c, 0x00} // tag 65281, [1, 1.0]
	now := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMilli()  // of the simulation
	rec := session.Record{Key: key, Created: now, LastAccess: now, MaxInactive: 24 * time.Hour, MaxInactiveVersion: session.Version{Counter: 1, Node: 1}}
	before := len(session.AppendBatch(nil, &rec))
	rec.Attrs = map[string]session.Entry{"cart": {Value: value, Version: session.Version{Counter: 2, Node: 1}}}
	batch := session.AppendBatch(nil, &rec)
	batch[before]++                            // the attribute's array is longer
	batch = append(batch, 0x63, 'n', 'e', 'w') // by a text
	entry := batch[before:]

	for name, manager := range managersUnderTest(t) {
		t.Run(name, func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{Seed: 3}, func(t *testing.T, nw *channeltest.SimNet) {
				p := parts()
				p.Manager = manager
				c := conformance.NewCluster(t, nw, 3, p)
				c.Await(30*time.Second, conformance.ViewsEqual(c.Nodes...))
				c.Await(30*time.Second, conformance.Ready(c.Nodes...))
				newer, older, last := c.Nodes[0], c.Nodes[1], c.Nodes[2]
				if err := newer.Manager.Commit(t.Context(), slices.Clone(batch), core.Synced); err != nil {
					t.Fatal(err)
				}
				stop := func(n *conformance.Node) {
					t.Helper()
					c.Nodes = slices.DeleteFunc(c.Nodes, func(o *conformance.Node) bool { return o == n })
					if err := n.Stop(context.Background()); err != nil {
						t.Error(err)
					}
					c.Await(time.Minute, conformance.ViewsEqual(c.Nodes...))
					time.Sleep(30 * time.Second) // copies are made again
					synctest.Wait()
				}
				current := do(t, older, key, func(h core.Handle) error { return h.Set("seen", "by an older version") })
				stop(newer)
				current = do(t, older, current, core.Handle.Renew)
				do(t, last, current, func(h core.Handle) error { return h.Set("again", 1) })
				stop(older)
				h := find(t, last, current)
				if h == nil {
					t.Fatal("the session is lost")
				}
				h.Release()
				rec, err := last.Manager.Load(t.Context(), current)
				if err != nil || rec == nil || len(rec.Attrs) != 3 {
					t.Fatalf("%+v, %v", rec, err)
				}
				if !bytes.Contains(session.AppendBatch(nil, rec), entry) {
					t.Errorf("%x is not in %x", entry, session.AppendBatch(nil, rec))
				}
				c.Stop()
			})
		})
	}
}
