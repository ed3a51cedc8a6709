package peer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/rpc"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// services lets the messages of services pass by the recorder of a node.
func services(c *nodeConfig) {
	c.reply = func(m *channel.Message) (bool, error) {
		return m.Options.Has(channel.ByteMessage) && !bytes.HasPrefix(m.Body, []byte("LHR")), nil
	}
}

// serve opens an RPC at a node of ours; it ends with the test.
func (n *longhouse) serve(name string, h rpc.Handler, change func(c *rpc.Config)) *rpc.RPC {
	n.t.Helper()
	c := rpc.DefaultConfig()
	c.ServeTimeout = patience
	if change != nil {
		change(&c)
	}
	r, err := rpc.New(n.Channel, name, h, c, channel.Settings{Metrics: n.metrics})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = r.Close(within(n.t)) })
	return r
}

// tagged answers as the driver does: a list of tag and request, "nothing" by
// null.
func tagged(tag string) rpc.Handler {
	return func(_ context.Context, _ channel.Member, b rpc.Body) (rpc.Body, error) {
		v := b.Object
		if v == nil && b.Bytes != nil {
			v = &jser.ByteMessage{Data: b.Bytes}
		}
		if v == "nothing" {
			return rpc.Body{}, nil
		}
		return rpc.Object(&jser.List{Items: []jser.Value{tag, v}}), nil
	}
}

// Requests and replies of every kind between one node of ours and one of
// Tribes, an RPC that is not there, and one that fails.
func testCalls(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	a := g.longhouse(services)
	b := g.tribes(func(c *peer.Config) { c.Stack = []string{"dispatch", "detector"} })
	together(t, []*longhouse{a}, []*peer.Node{b})
	ours := a.serve("echo", tagged("ours"), nil)
	a.serve("fails", func(context.Context, channel.Member, rpc.Body) (rpc.Body, error) {
		return rpc.Body{}, errors.New("the handler fails as the test wants it")
	}, nil)
	if err := b.Serve(within(t), "echo", "theirs", 0); err != nil {
		t.Fatal(err)
	}
	for _, v := range []struct {
		ours   rpc.Body
		theirs any
	}{
		{rpc.Object("text"), "text"},
		{rpc.Object(int32(5)), int32(5)},
		{rpc.Object(&jser.List{Items: []jser.Value{"a", nil, int64(7)}}), []any{"a", nil, int64(7)}},
		{rpc.Bytes([]byte("bytes")), peer.Bytes("bytes")},
		{rpc.Bytes(make([]byte, 100_000)), peer.Bytes(make([]byte, 100_000))},
		{rpc.Body{}, nil},
	} {
		for _, o := range []channel.Options{0, channel.SendAck} {
			replies, err := ours.Call(within(t), a.View().Members, v.ours, rpc.All, o)
			if err != nil || len(replies) != 1 {
				t.Fatalf("our call with %.60v: %d replies, %v", v.theirs, len(replies), err)
			}
			if got := java(replies[0].Body.Object); !reflect.DeepEqual(got, []any{"theirs", v.theirs}) {
				t.Errorf("our call with %.60v: %.100v", v.theirs, got)
			}
			back, err := b.RPC(within(t), "echo", "all", uint32(o), patience, v.theirs)
			if err != nil || len(back) != 1 {
				t.Fatalf("their call with %.60v: %v, %v", v.theirs, back, err)
			}
			if back[0].From != a.id() || !reflect.DeepEqual(back[0].Value, []any{"ours", v.theirs}) {
				t.Errorf("their call with %.60v: %.100v", v.theirs, back)
			}
		}
	}

	t.Run("null", func(t *testing.T) {
		replies, err := ours.Call(within(t), a.View().Members, rpc.Object("nothing"), rpc.All, 0)
		if err != nil || len(replies) != 1 || replies[0].Body.Object != nil || replies[0].Body.Bytes != nil {
			t.Errorf("our call: %v, %v", replies, err)
		}
		for _, name := range []string{"echo", "fails"} { // Tribes knows no error in a reply
			if err := b.Serve(within(t), name, "theirs", 0); err != nil {
				t.Fatal(err)
			}
			back, err := b.RPC(within(t), name, "all", 0, patience, "nothing")
			if err != nil || len(back) != 1 || back[0].Value != nil {
				t.Errorf("their call of %s: %v, %v", name, back, err)
			}
		}
	})

	// Without waiting until time is over.
	t.Run("absent", func(t *testing.T) {
		absent := a.serve("only-ours", tagged("ours"), nil)
		if replies, err := absent.Call(within(t), a.View().Members, rpc.Object("x"), rpc.All, 0); !errors.Is(err, rpc.ErrIncomplete) ||
			len(replies) != 1 || !errors.Is(replies[0].Err, rpc.ErrAbsent) {
			t.Errorf("our call: %v, %v", replies, err)
		}
		if err := b.Serve(within(t), "only-theirs", "theirs", 0); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		back, err := b.RPC(within(t), "only-theirs", "all", 0, patience, "x")
		if err != nil || len(back) != 0 || time.Since(began) > patience/2 {
			t.Errorf("their call: %v, %v after %v", back, err, time.Since(began))
		}
	})
}

// java turns a value of ours into what the driver would make of it.
func java(v jser.Value) any {
	switch v := v.(type) {
	case *jser.List:
		out := []any{}
		for _, i := range v.Items {
			out = append(out, java(i))
		}
		return out
	case *jser.ByteMessage:
		return peer.Bytes(v.Data)
	}
	return v
}

// The modes of collecting replies, in a group of two nodes of each kind.
func testModes(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	a, c := g.longhouse(services), g.longhouse(services)
	b, d := g.tribes(nil), g.tribes(nil)
	together(t, []*longhouse{a, c}, []*peer.Node{b, d})
	ours := a.serve("modes", tagged("a"), nil)
	c.serve("modes", tagged("c"), nil)
	for tag, n := range map[string]*peer.Node{"b": b, "d": d} {
		if err := n.Serve(within(t), "modes", tag, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range []struct {
		mode     rpc.Mode
		min, max int
	}{{rpc.First, 1, 3}, {rpc.Majority, 2, 3}, {rpc.All, 3, 3}, {rpc.None, 0, 0}} {
		replies, err := ours.Call(within(t), a.View().Members, rpc.Object("x"), m.mode, 0)
		if err != nil || len(replies) < m.min || len(replies) > m.max {
			t.Errorf("our %v: %d replies, %v", m.mode, len(replies), err)
		}
		back, err := b.RPC(within(t), "modes", m.mode.String(), 0, patience, "x")
		if err != nil || len(back) < m.min || len(back) > m.max {
			t.Errorf("their %v: %d replies, %v", m.mode, len(back), err)
		}
		if m.mode == rpc.All {
			var from []string
			for _, r := range replies {
				from = append(from, fmt.Sprint(java(r.Body.Object)))
			}
			slices.Sort(from)
			if !slices.Equal(from, []string{"[b x]", "[c x]", "[d x]"}) {
				t.Errorf("our all: %v", from)
			}
		}
	}
}

// Who answers late: the caller gets what has come in time, and the late reply
// is handed over as such.
func testLate(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	a, c := g.longhouse(services), g.longhouse(services)
	b := g.tribes(nil)
	together(t, []*longhouse{a, c}, []*peer.Node{b})
	left := make(chan rpc.Reply, 1)
	release := make(chan struct{})
	ours := a.serve("late", tagged("a"), func(c *rpc.Config) { c.LeftOver = func(r rpc.Reply) { left <- r } })
	c.serve("late", func(ctx context.Context, from channel.Member, b rpc.Body) (rpc.Body, error) {
		if b.Object == "late" {
			<-release
		}
		return tagged("c")(ctx, from, b)
	}, nil)
	if err := b.Serve(within(t), "late", "b", 2*time.Second); err != nil {
		t.Fatal(err)
	}
	// Theirs is late for us.
	ctx, cancel := context.WithTimeout(within(t), time.Second)
	defer cancel()
	to := []channel.Member{a.member(b.ID())}
	if replies, err := ours.Call(ctx, to, rpc.Object("late"), rpc.All, 0); !errors.Is(err, context.DeadlineExceeded) || len(replies) != 0 {
		t.Errorf("our call: %v, %v", replies, err)
	}
	select {
	case r := <-left:
		if r.Member.ID.String() != b.ID() || !reflect.DeepEqual(java(r.Body.Object), []any{"b", "late"}) {
			t.Errorf("our late reply: %v", r)
		}
	case <-within(t).Done():
		t.Error("the late reply was not handed over")
	}
	// Ours is late for them; the one that is in time counts.
	back, err := b.RPC(within(t), "late", "all", 0, time.Second, "late", c.id())
	if err != nil || len(back) != 0 {
		t.Errorf("their call: %v, %v", back, err)
	}
	close(release)
	if err := b.Wait(within(t), "leftover", func(evs []peer.Event) bool {
		return len(evs) == 1 && evs[0].Values.Get("from") == c.id()
	}); err != nil {
		t.Errorf("their late reply was not handed over: %v", b.Events("leftover"))
	}
}
