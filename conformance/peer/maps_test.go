package peer_test

import (
	"context"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/repmap"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// A holder is one node's end of a map.
type holder interface {
	put(t *testing.T, key string, value any)
	get(t *testing.T, key string) any
	remove(t *testing.T, key string)
}

type ourMap struct {
	*repmap.Map[string, jser.Value]
	node *longhouse
}

func (m ourMap) put(t *testing.T, key string, value any) {
	t.Helper()
	if err := m.Put(within(t), key, fromJava(value)); err != nil {
		t.Fatalf("our put of %s: %v", key, err)
	}
}

func (m ourMap) get(t *testing.T, key string) any {
	t.Helper()
	v, ok, err := m.Get(within(t), key)
	if err != nil {
		t.Logf("our get of %s: %v", key, err)
		return err
	}
	if !ok {
		return nil
	}
	return toJava(v)
}

func (m ourMap) remove(t *testing.T, key string) {
	t.Helper()
	if _, err := m.Delete(within(t), key); err != nil {
		t.Fatalf("our remove of %s: %v", key, err)
	}
}

type theirMap struct {
	*peer.Map
	node *peer.Node
}

func (m theirMap) put(t *testing.T, key string, value any) {
	t.Helper()
	if _, err := m.Put(within(t), key, value); err != nil {
		t.Fatalf("their put of %s: %v", key, err)
	}
}

func (m theirMap) get(t *testing.T, key string) any {
	t.Helper()
	v, err := m.Get(within(t), key)
	if err != nil {
		t.Fatalf("their get of %s: %v", key, err)
	}
	return v
}

func (m theirMap) remove(t *testing.T, key string) {
	t.Helper()
	if err := m.Remove(within(t), key); err != nil {
		t.Fatalf("their remove of %s: %v", key, err)
	}
}

// fromJava turns a value of the driver into one of package jser, toJava turns
// it back.
func fromJava(v any) jser.Value {
	switch v := v.(type) {
	case []any:
		l := &jser.List{}
		for _, e := range v {
			l.Items = append(l.Items, fromJava(e))
		}
		return l
	case peer.Pairs:
		m := &jser.Map{}
		for i := 0; i < len(v); i += 2 {
			m.Entries = append(m.Entries, jser.Entry{Key: fromJava(v[i]), Value: fromJava(v[i+1])})
		}
		return m
	case time.Time:
		return jser.Date(v.UnixMilli())
	}
	return v
}

func toJava(v jser.Value) any {
	switch v := v.(type) {
	case *jser.List:
		l := []any{}
		for _, e := range v.Items {
			l = append(l, toJava(e))
		}
		return l
	case *jser.Map:
		p := peer.Pairs{}
		for _, e := range v.Entries {
			p = append(p, toJava(e.Key), toJava(e.Value))
		}
		return p
	case jser.Date:
		return time.UnixMilli(int64(v)).UTC()
	}
	return v
}

// inMaps are values of the types that applications keep.
var inMaps = map[string]any{
	"string": "text \U0001F600", "int": int32(-5), "long": int64(1) << 40, "double": 2.5, "boolean": true, "bytes": []byte{0, 1, 0xff},
	"date": time.UnixMilli(1_600_000_000_123).UTC(), "list": []any{"a", int32(1), nil, []byte{2}}, "map": peer.Pairs{"k", []any{int64(2)}},
	"large": string(make([]byte, 100_000)),
}

// where tells what each holder knows of a key, for a test that has failed.
func where(t *testing.T, all map[string]holder, key string) {
	for name, h := range all {
		switch m := h.(type) {
		case ourMap:
			p, ok := m.Where(key)
			t.Logf("%s (%s): %v %+v", name, m.node.id(), ok, p)
		case theirMap:
			e, err := m.Entry(within(t), key)
			e.Value = nil
			t.Logf("%s (%s): %+v, %v", name, m.node.ID(), e, err)
		}
	}
}

// everywhere waits until every holder gives this value; nil stands for none.
func everywhere(t *testing.T, j *peer.JVM, all map[string]holder, key string, want any) {
	t.Helper()
	defer func() {
		if t.Failed() {
			where(t, all, key)
		}
	}()
	for name, h := range all {
		poll(t, j, fmt.Sprintf("%s = %.60v at %s", key, want, name), func() bool { return reflect.DeepEqual(h.get(t, key), want) })
	}
}

// Replicated maps, full and lazy, shared by two nodes of each kind: what one
// writes all read, whoever joins, leaves or takes over.
func testMap(t *testing.T, j *peer.JVM, lazy bool) {
	g := newGroup(t, j)
	kind := map[bool]string{false: "full", true: "lazy"}[lazy]
	pass := func(c *nodeConfig) {
		c.reply = func(*channel.Message) (bool, error) { return false, nil }
	}
	a, c := g.longhouse(pass), g.longhouse(pass)
	their := func(c *peer.Config) { c.Stack = []string{"dispatch", "detector"} }
	b, d := g.tribes(their), g.tribes(their)
	together(t, []*longhouse{a, c}, []*peer.Node{b, d})
	ours := func(n *longhouse) ourMap {
		t.Helper()
		mc := repmap.DefaultConfig()
		mc.Lazy, mc.Tribes, mc.Timeout = lazy, true, 20*time.Second
		m, err := repmap.New[string, jser.Value](n.Channel, "shared", mc, channel.Settings{Metrics: n.metrics})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(within(t)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			_ = m.Close(ctx)
		})
		select {
		case <-m.Ready():
		case <-within(t).Done():
			t.Fatal("our map is not ready")
		}
		return ourMap{m, n}
	}
	theirs := func(n *peer.Node) theirMap {
		t.Helper()
		m, err := n.OpenMap(within(t), kind, "shared")
		if err != nil {
			t.Fatal(err)
		}
		return theirMap{m, n}
	}
	all := map[string]holder{}
	step := func(name string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, f) {
			t.FailNow()
		}
	}
	step("theirs-joins-ours", func(t *testing.T) {
		all["a"] = ours(a)
		all["a"].put(t, "first", "of ours")
		all["b"] = theirs(b)
		everywhere(t, j, all, "first", "of ours")
		all["b"].put(t, "second", "of theirs")
		everywhere(t, j, all, "second", "of theirs")
	})
	step("others-join", func(t *testing.T) {
		all["c"] = ours(c)
		all["d"] = theirs(d)
		poll(t, j, "all Tribes nodes know all others", func() bool {
			for _, h := range []string{"b", "d"} {
				ids, err := all[h].(theirMap).Members(within(t))
				if err != nil || len(ids) != 3 {
					return false
				}
			}
			return true
		})
		everywhere(t, j, all, "first", "of ours")
		everywhere(t, j, all, "second", "of theirs")
	})
	step("values", func(t *testing.T) {
		for _, writer := range []string{"a", "b"} {
			for name, v := range inMaps {
				all[writer].put(t, writer+" "+name, v)
			}
			for name, v := range inMaps {
				everywhere(t, j, all, writer+" "+name, v)
			}
		}
	})
	step("overwrite", func(t *testing.T) {
		for i, writer := range []string{"a", "b", "c", "d", "a", "d"} {
			all[writer].put(t, "changing", fmt.Sprintf("%d by %s", i, writer))
			everywhere(t, j, all, "changing", fmt.Sprintf("%d by %s", i, writer))
		}
	})
	step("remove", func(t *testing.T) {
		for i, pair := range [][2]string{{"a", "b"}, {"b", "a"}, {"a", "a"}, {"b", "b"}} {
			key := fmt.Sprintf("short-lived %d", i)
			all[pair[0]].put(t, key, "x")
			everywhere(t, j, all, key, "x")
			all[pair[1]].remove(t, key)
			everywhere(t, j, all, key, nil)
		}
	})
	step("theirs-leaves", func(t *testing.T) {
		for i := range 10 {
			all["d"].put(t, fmt.Sprintf("of d %d", i), int32(i))
		}
		for i := range 10 {
			everywhere(t, j, map[string]holder{"a": all["a"], "b": all["b"], "c": all["c"]}, fmt.Sprintf("of d %d", i), int32(i))
		}
		if err := d.Close(within(t)); err != nil {
			t.Fatal(err)
		}
		delete(all, "d")
		a.sees(b.ID(), c.id())
		c.sees(b.ID(), a.id())
		for i := range 10 {
			everywhere(t, j, all, fmt.Sprintf("of d %d", i), int32(i))
		}
	})
	// A lazy map has one copy beside the primary: the next holder must not go
	// before the copies that went with the last one have been made again.
	if lazy {
		step("copied-again", func(t *testing.T) {
			poll(t, j, "c is nowhere the only holder", func() bool {
				mine := all["c"].(ourMap)
				for _, key := range mine.Keys() {
					if p, _ := mine.Where(key); !p.Here {
						continue
					}
					if p, _ := all["a"].(ourMap).Where(key); p.Here {
						continue
					}
					e, err := all["b"].(theirMap).Entry(within(t), key)
					if err != nil {
						t.Fatal(err)
					}
					if e.Kind != "primary" && e.Kind != "backup" {
						return false
					}
				}
				return true
			})
		})
	}
	step("ours-leaves", func(t *testing.T) {
		for i := range 10 {
			all["c"].put(t, fmt.Sprintf("of c %d", i), int32(i))
		}
		for i := range 10 {
			everywhere(t, j, all, fmt.Sprintf("of c %d", i), int32(i))
		}
		if err := all["c"].(ourMap).Close(within(t)); err != nil {
			t.Error(err)
		}
		c.stop()
		delete(all, "c")
		seen(t, b, a.id())
		for i := range 10 {
			everywhere(t, j, all, fmt.Sprintf("of c %d", i), int32(i))
		}
		for name, v := range inMaps {
			everywhere(t, j, all, "a "+name, v)
		}
	})
}
