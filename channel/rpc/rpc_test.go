package rpc

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// open opens an RPC on n and closes it at the end of the test.
func open(t testing.TB, n *grouptest.Node, name string, h Handler, change ...func(*Config)) *RPC {
	t.Helper()
	c := DefaultConfig()
	for _, f := range change {
		f(&c)
	}
	r, err := New(n.Channel, name, h, c, channel.Settings{Metrics: n.Metrics})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func shut(t testing.TB, rs ...*RPC) {
	t.Helper()
	for _, r := range rs {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if err := r.Close(ctx); err != nil {
			t.Error(err)
		}
		cancel()
	}
}

// echo answers with its name and what it was asked.
func echo(name string) Handler {
	return func(_ context.Context, _ channel.Member, b Body) (Body, error) {
		return Bytes(append([]byte(name+":"), b.Bytes...)), nil
	}
}

// group runs f with n nodes; f closes what it opens.
func group(t *testing.T, n int, f func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node)) {
	t.Helper()
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		b := new(grouptest.Book)
		nodes := grouptest.Nodes(t, nw, b, n)
		synctest.Wait()
		f(t, nw, b, nodes)
		for _, n := range nodes {
			n.StopNode(t)
		}
	})
}

func texts(replies []Reply) (s []string) {
	for _, p := range replies {
		if p.Err != nil {
			s = append(s, p.Member.Name()+" "+p.Err.Error())
		} else {
			s = append(s, string(p.Body.Bytes))
		}
	}
	slices.Sort(s)
	return s
}

func want(t testing.TB, replies []Reply, err error, w ...string) {
	t.Helper()
	if got := texts(replies); err != nil || !slices.Equal(got, w) {
		t.Errorf("got %q, %v; want %q", got, err, w)
	}
}

func TestModes(t *testing.T) {
	group(t, 4, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		a := open(t, nodes[0], "x", nil)
		var rs []*RPC
		slow := make(chan struct{})
		for i, n := range nodes[1:] {
			h := echo(string(rune('b' + i)))
			if i == 2 { // d is slow
				h = func(ctx context.Context, m channel.Member, b Body) (Body, error) {
					select {
					case <-slow:
					case <-ctx.Done():
					}
					return echo("d")(ctx, m, b)
				}
			}
			rs = append(rs, open(t, n, "x", h))
		}
		ctx := t.Context()
		all := nodes[0].View().Members
		r, err := a.Call(ctx, all, Bytes([]byte("q")), First, 0)
		if err != nil || len(r) != 1 {
			t.Errorf("first: %q %v", texts(r), err)
		}
		r, err = a.Call(ctx, all, Bytes([]byte("q")), Majority, 0)
		want(t, r, err, "b:q", "c:q")
		r, err = a.Call(ctx, all, Bytes([]byte("q")), None, channel.SendAck)
		want(t, r, err)
		short, cancel := context.WithTimeout(ctx, time.Second)
		r, err = a.Call(short, all, Bytes([]byte("q")), All, 0)
		cancel()
		if !errors.Is(err, ErrIncomplete) || !errors.Is(err, context.DeadlineExceeded) || !slices.Equal(texts(r), []string{"b:q", "c:q"}) {
			t.Errorf("all, slow: %q %v", texts(r), err)
		}
		close(slow)
		synctest.Wait()
		r, err = a.Call(ctx, all, Bytes([]byte("q")), All, 0)
		want(t, r, err, "b:q", "c:q", "d:q")
		// Late: one of First (b or c), three of Majority, of None and of the slow All.
		time.Sleep(time.Second)
		if n := nodes[0].Count("rpc_late_replies_total"); n != 2+1+3+1 {
			t.Errorf("%v late replies, want 7", n)
		}
		shut(t, append(rs, a)...)
	})
}

func TestAbsentIsKnownAtOnce(t *testing.T) {
	group(t, 4, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		// b has another RPC, c the one without a handler, d one that answers.
		a, other, deaf := open(t, nodes[0], "x", nil), open(t, nodes[1], "y", echo("b")), open(t, nodes[2], "x", nil)
		start := time.Now()
		r, err := a.Call(t.Context(), []channel.Member{nodes[1].Local(), nodes[2].Local()}, Bytes(nil), All, 0)
		if time.Since(start) > time.Second {
			t.Errorf("it took %v", time.Since(start))
		}
		if !errors.Is(err, ErrIncomplete) || !errors.Is(err, ErrAbsent) || len(r) != 2 {
			t.Errorf("got %q %v", texts(r), err)
		}
		d := open(t, nodes[3], "x", echo("d"))
		r, err = a.Call(t.Context(), nodes[0].View().Members, Bytes(nil), Majority, 0)
		if err != nil {
			t.Errorf("got %q %v", texts(r), err)
		}
		shut(t, a, other, deaf, d)
		// Attach answers for a node that has no RPC at all.
		a = open(t, nodes[0], "x", nil)
		var detach []func()
		for _, n := range nodes[1:] {
			detach = append(detach, Attach(n.Channel, channel.Settings{Metrics: n.Metrics}))
		}
		start = time.Now()
		if _, err = a.Call(t.Context(), nodes[0].View().Members, Bytes(nil), First, 0); !errors.Is(err, ErrAbsent) || time.Since(start) > time.Second {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
		for _, f := range detach {
			f()
			f()
		}
		shut(t, a)
	})
}

func TestLeavingEndsTheWait(t *testing.T) {
	group(t, 3, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		hang := func(ctx context.Context, _ channel.Member, _ Body) (Body, error) {
			<-ctx.Done()
			return Body{}, ctx.Err()
		}
		a, x, y := open(t, nodes[0], "x", nil), open(t, nodes[1], "x", hang), open(t, nodes[2], "x", echo("c"))
		members := nodes[0].View().Members
		time.AfterFunc(2*time.Second, func() { b.Hide(nodes[0], nodes[1]) })
		start := time.Now()
		r, err := a.Call(t.Context(), members, Bytes([]byte("q")), All, 0)
		if took := time.Since(start); took > 3*time.Second || took < 2*time.Second {
			t.Errorf("it took %v", took)
		}
		if err != nil || len(r) != 2 || !slices.ContainsFunc(r, func(p Reply) bool { return errors.Is(p.Err, ErrGone) }) {
			t.Errorf("got %q %v", texts(r), err)
		}
		// Who is gone already is not waited for either.
		start = time.Now()
		r, err = a.Call(t.Context(), members, Bytes([]byte("q")), All, 0)
		if err != nil || len(r) != 2 || time.Since(start) > time.Second {
			t.Errorf("got %q %v", texts(r), err)
		}
		shut(t, a, x, y)
	})
}

// An unreachable member ends with the reason; the others are not disturbed.
func TestSendFailure(t *testing.T) {
	group(t, 3, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		a, x, y := open(t, nodes[0], "x", nil), open(t, nodes[1], "x", echo("b")), open(t, nodes[2], "x", echo("c"))
		nw.SetLink(nodes[0].Sim.IP(), nodes[2].Sim.IP(), channeltest.LinkPolicy{Cut: true})
		start := time.Now()
		r, err := a.Call(t.Context(), nodes[0].View().Members, Bytes([]byte("q")), All, 0)
		if !errors.Is(err, ErrIncomplete) || len(r) != 2 || time.Since(start) > 10*time.Second {
			t.Errorf("got %q %v after %v", texts(r), err, time.Since(start))
		}
		nw.ResetLinks()
		shut(t, a, x, y)
	})
}

// A quick handler answers as any other does.
func TestQuick(t *testing.T) {
	group(t, 3, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		quick := func(c *Config) { c.Quick = true }
		a, x, y := open(t, nodes[0], "x", nil), open(t, nodes[1], "x", echo("b"), quick), open(t, nodes[2], "x", echo("c"), quick)
		for range 20 {
			r, err := a.Call(t.Context(), nodes[0].View().Members, Bytes([]byte("q")), All, 0)
			want(t, r, err, "b:q", "c:q")
		}
		shut(t, a, x, y)
	})
}

func TestZeroMembersAndNames(t *testing.T) { // AR-13, AR-14
	group(t, 1, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		a := open(t, nodes[0], "x", nil)
		if _, err := a.Call(t.Context(), nil, Bytes(nil), All, 0); !errors.Is(err, channel.ErrNoMembers) {
			t.Errorf("got %v", err)
		}
		if _, err := New(nodes[0].Channel, "x", nil, DefaultConfig(), channel.Settings{}); !errors.Is(err, ErrNameTaken) {
			t.Errorf("got %v", err)
		}
		for _, name := range []string{"", strings.Repeat("x", 256)} {
			if _, err := New(nodes[0].Channel, name, nil, DefaultConfig(), channel.Settings{}); err == nil {
				t.Errorf("the name %q was accepted", name)
			}
		}
		if _, err := New(nodes[0].Channel, "z", nil, Config{}, channel.Settings{}); err == nil || strings.Count(err.Error(), "\n") < 4 {
			t.Errorf("got %v", err)
		}
		shut(t, a, a)
		if _, err := a.Call(t.Context(), []channel.Member{channeltest.Member(1)}, Bytes(nil), First, 0); !errors.Is(err, channel.ErrClosed) {
			t.Errorf("got %v", err)
		}
		a = open(t, nodes[0], "x", nil) // the name is free again
		shut(t, a)
	})
}

// A handler that calls who has asked, ten levels deep, on one connection each
// way (AR-11).
func TestHandlersMayCall(t *testing.T) {
	group(t, 2, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		rs := make([]*RPC, 2)
		for i, n := range nodes {
			rs[i] = open(t, n, "x", func(ctx context.Context, from channel.Member, b Body) (Body, error) {
				if b.Bytes[0] == 0 {
					return Bytes([]byte("end")), nil
				}
				r, err := rs[i].Call(ctx, []channel.Member{from}, Bytes([]byte{b.Bytes[0] - 1}), First, 0)
				if err != nil {
					return Body{}, err
				}
				return r[0].Body, nil
			})
		}
		r, err := rs[0].Call(t.Context(), nodes[0].View().Members, Bytes([]byte{10}), First, 0)
		want(t, r, err, "end")
		shut(t, rs...)
	})
}

func TestHandlerErrorsAndPanics(t *testing.T) {
	group(t, 2, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		a := open(t, nodes[0], "x", func(context.Context, channel.Member, Body) (Body, error) { return Body{}, errors.New("not mine") })
		x := open(t, nodes[1], "x", func(_ context.Context, _ channel.Member, b Body) (Body, error) {
			if string(b.Bytes) == "panic" {
				panic("ouch")
			}
			return Body{}, errors.New(strings.Repeat("no", 2000))
		})
		for _, q := range []string{"panic", "fail"} {
			r, err := a.Call(t.Context(), nodes[0].View().Members, Bytes([]byte(q)), First, 0)
			var re *RemoteError
			if !errors.Is(err, ErrIncomplete) || !errors.As(err, &re) || len(r) != 1 || len(re.Text) > maxErrorText {
				t.Errorf("%s: got %q %v", q, texts(r), err)
			}
		}
		if n := nodes[1].Count("rpc_handler_errors_total"); n != 2 {
			t.Errorf("%v errors counted", n)
		}
		// The local member may be asked too.
		_, err := a.Call(t.Context(), []channel.Member{nodes[0].Local()}, Bytes(nil), First, 0)
		if err == nil || !strings.Contains(err.Error(), "not mine") {
			t.Errorf("got %v", err)
		}
		shut(t, a, x)
	})
}

func TestBounds(t *testing.T) { // AR-10
	group(t, 2, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		a := open(t, nodes[0], "x", nil, func(c *Config) { c.MaxReply = 1000; c.MaxCalls = 3 })
		release := make(chan struct{})
		x := open(t, nodes[1], "x", func(ctx context.Context, _ channel.Member, b Body) (Body, error) {
			if len(b.Bytes) > 0 {
				return Bytes(make([]byte, 1001)), nil
			}
			select {
			case <-release:
			case <-ctx.Done():
			}
			return Body{}, nil
		}, func(c *Config) { c.MaxServing = 2 })
		to := nodes[0].View().Members
		if _, err := a.Call(t.Context(), to, Bytes([]byte{1}), First, 0); !errors.Is(err, ErrReplyTooLarge) {
			t.Errorf("got %v", err)
		}
		results := make(chan error, 3)
		for range 2 {
			go func() { _, err := a.Call(t.Context(), to, Bytes(nil), First, 0); results <- err }()
		}
		synctest.Wait()
		time.Sleep(time.Second)
		if _, err := a.Call(t.Context(), to, Bytes(nil), First, 0); !errors.Is(err, ErrBusy) {
			t.Errorf("third served: %v", err)
		}
		y := open(t, nodes[1], "y", func(ctx context.Context, _ channel.Member, _ Body) (Body, error) { <-ctx.Done(); return Body{}, nil })
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, err := a.Call(ctx, to, Bytes(nil), First, 0)
			results <- err
		}()
		synctest.Wait()
		close(release)
		for range 3 {
			<-results
		}
		if n := nodes[1].Count("rpc_refused_total", "reason=busy"); n < 1 {
			t.Errorf("%v refused", n)
		}
		// MaxCalls.
		hang := open(t, nodes[0], "y", nil, func(c *Config) { c.MaxCalls = 2 })
		ctx, cancel := context.WithCancel(t.Context())
		for range 2 {
			go func() { _, err := hang.Call(ctx, to, Bytes(nil), First, 0); results <- err }()
		}
		synctest.Wait()
		if _, err := hang.Call(ctx, to, Bytes(nil), First, 0); !errors.Is(err, ErrBusy) {
			t.Errorf("third call: %v", err)
		}
		cancel()
		<-results
		<-results
		shut(t, a, x, y, hang)
	})
}

// Close ends calls and handlers.
func TestClose(t *testing.T) {
	group(t, 2, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		a := open(t, nodes[0], "x", nil)
		x := open(t, nodes[1], "x", func(ctx context.Context, _ channel.Member, _ Body) (Body, error) {
			<-ctx.Done()
			return Body{}, ctx.Err()
		})
		result := make(chan error, 1)
		go func() {
			_, err := a.Call(t.Context(), nodes[0].View().Members, Bytes(nil), First, 0)
			result <- err
		}()
		time.Sleep(time.Second)
		shut(t, a)
		if err := <-result; !errors.Is(err, channel.ErrClosed) {
			t.Errorf("got %v", err)
		}
		shut(t, x)
	})
}

// Replies that nobody has asked for are counted, and change nothing.
func TestStrangeReplies(t *testing.T) {
	group(t, 3, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		var seen callID
		hold := make(chan struct{})
		var late atomic.Int32
		a := open(t, nodes[0], "x", nil, func(c *Config) { c.LeftOver = func(Reply) { late.Add(1) } })
		x := open(t, nodes[1], "x", func(ctx context.Context, _ channel.Member, _ Body) (Body, error) {
			<-hold
			return Bytes([]byte("good")), nil
		})
		// c forges answers to the call of a to b.
		spy := nodes[1].Listen(channel.ListenerFunc(func(_ context.Context, m *channel.Message) (bool, error) { return false, nil }))
		defer spy()
		result := make(chan []Reply, 1)
		go func() {
			r, _ := a.Call(t.Context(), []channel.Member{nodes[1].Local()}, Bytes(nil), All, 0)
			result <- r
		}()
		time.Sleep(time.Second)
		a.hub.mu.Lock()
		for n := range a.hub.calls {
			seen = a.hub.callID(n)
		}
		a.hub.mu.Unlock()
		forge := func(n *grouptest.Node, f frame) {
			f.name = []byte("x")
			if err := n.Send(t.Context(), []channel.Member{nodes[0].Local()}, appendFrame(nil, &f), channel.SendSyncAck); err != nil {
				t.Error(err)
			}
		}
		forge(nodes[2], frame{kind: reply, id: seen, body: []byte("bad")})               // not asked
		forge(nodes[2], frame{kind: reply, id: callID{1}, body: []byte("bad")})          // another caller's
		forge(nodes[1], frame{kind: reply, id: a.hub.callID(999), body: []byte("over")}) // over, or never
		if n := nodes[0].Count("rpc_foreign_replies_total"); n != 2 {
			t.Errorf("%v foreign", n)
		}
		if late.Load() != 1 {
			t.Errorf("%d left over", late.Load())
		}
		close(hold)
		r := <-result
		want(t, r, nil, "good")
		// A second answer comes late, too.
		forge(nodes[1], frame{kind: reply, id: seen})
		if n := nodes[0].Count("rpc_late_replies_total"); n != 2 {
			t.Errorf("%v late", n)
		}
		// Malformed ones are refused.
		for _, body := range []string{magic, magic + "\x02\x01", magic + "\x09\x01" + strings.Repeat("x", 30)} {
			err := nodes[1].Send(t.Context(), []channel.Member{nodes[0].Local()}, []byte(body), channel.SendSyncAck)
			if !errors.Is(err, channel.ErrNegativeAck) {
				t.Errorf("%q: %v", body, err)
			}
		}
		if n := nodes[0].Count("rpc_malformed_total"); n != 3 {
			t.Errorf("%v malformed", n)
		}
		shut(t, a, x)
	})
}

// While one call to two members waits, a second reply of the first is counted.
func TestDuplicateReplies(t *testing.T) {
	group(t, 3, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		hold := make(chan struct{})
		a, x := open(t, nodes[0], "x", nil), open(t, nodes[1], "x", echo("b"))
		y := open(t, nodes[2], "x", func(context.Context, channel.Member, Body) (Body, error) { <-hold; return Bytes([]byte("c")), nil })
		result := make(chan []Reply, 1)
		go func() {
			r, _ := a.Call(t.Context(), nodes[0].View().Members, Bytes(nil), All, 0)
			result <- r
		}()
		time.Sleep(time.Second)
		a.hub.mu.Lock()
		f := frame{kind: reply, name: []byte("x"), id: a.hub.callID(a.hub.next), body: []byte("again")}
		a.hub.mu.Unlock()
		for range 3 {
			if err := nodes[1].Send(t.Context(), []channel.Member{nodes[0].Local()}, appendFrame(nil, &f), channel.SendSyncAck); err != nil {
				t.Error(err)
			}
		}
		close(hold)
		want(t, <-result, nil, "b:", "c")
		if n := nodes[0].Count("rpc_duplicate_replies_total"); n != 3 {
			t.Errorf("%v duplicates", n)
		}
		shut(t, a, x, y)
	})
}

// Toward a node that is no Longhouse node both sides speak as Tribes does, byte
// for byte.
func TestTribesForm(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		b := new(grouptest.Book)
		n := b.Join(t, "a", nw.Node("10.0.0.1"))
		peer := b.JoinForeign(t, nw.Node("10.0.0.2"))
		got := make(chan channel.Message, 10)
		peer.Listen(channel.ListenerFunc(func(_ context.Context, m *channel.Message) (bool, error) {
			got <- channeltest.Clone(m)
			return true, nil
		}))
		synctest.Wait()
		a := open(t, n, "my-rpc-channel", func(_ context.Context, _ channel.Member, b Body) (Body, error) {
			if b.Object == "ping" {
				return Object("pong"), nil
			}
			if string(b.Bytes) == "raw" {
				return Bytes([]byte("war")), nil
			}
			if b.Object == "fail" {
				return Body{}, errors.New("no")
			}
			return Body{}, fmt.Errorf("got %#v", b)
		})
		// Requests in Tribes' form, answered in it.
		send := func(v *jser.RPCMessage) *jser.RPCMessage {
			t.Helper()
			raw, err := jser.Encode(v)
			if err != nil {
				t.Fatal(err)
			}
			if err := peer.Send(t.Context(), []channel.Member{n.Local()}, raw, channel.ObjectStream|channel.UseAck); err != nil {
				t.Fatal(err)
			}
			m := <-got
			if m.Options.Has(channel.ByteMessage) {
				t.Errorf("options %v", m.Options)
			}
			x, err := jser.Decode(m.Body, jser.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			return x.(*jser.RPCMessage)
		}
		uuid, id := bytes.Repeat([]byte{7}, 16), []byte("my-rpc-channel")
		for _, tt := range []struct{ q, want jser.Value }{
			{"ping", "pong"}, {&jser.ByteMessage{Data: []byte("raw")}, "war"}, {"fail", nil},
		} {
			r := send(&jser.RPCMessage{UUID: uuid, RPCID: id, Message: tt.q})
			have := r.Message
			if bm, ok := have.(*jser.ByteMessage); ok {
				have = string(bm.Data)
			}
			if !r.Reply || r.NoChannel || !bytes.Equal(r.UUID, uuid) || !bytes.Equal(r.RPCID, id) || have != tt.want {
				t.Errorf("%v: got %+v", tt.q, r)
			}
		}
		if r := send(&jser.RPCMessage{UUID: uuid, RPCID: []byte("nobody"), Message: "x"}); !r.NoChannel {
			t.Errorf("got %+v", r)
		}
		// A call of ours arrives as an RpcMessage, and its reply is understood.
		result := make(chan []Reply, 1)
		call := func(body Body, answer func(*jser.RPCMessage)) []Reply {
			t.Helper()
			go func() {
				r, _ := a.Call(t.Context(), n.View().Members, body, All, 0)
				result <- r
			}()
			m := <-got
			v, err := jser.Decode(m.Body, jser.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			q := v.(*jser.RPCMessage)
			answer(q)
			raw, err := jser.Encode(q)
			if err != nil {
				t.Fatal(err)
			}
			if err := peer.Send(t.Context(), []channel.Member{n.Local()}, raw, channel.ObjectStream); err != nil {
				t.Fatal(err)
			}
			return <-result
		}
		r := call(Object(int32(42)), func(q *jser.RPCMessage) {
			if q.Message != int32(42) || q.Reply {
				t.Errorf("got %+v", q)
			}
			q.Reply, q.Message = true, "fine"
		})
		if len(r) != 1 || r[0].Body.Object != "fine" {
			t.Errorf("got %+v", r)
		}
		r = call(Bytes([]byte("raw")), func(q *jser.RPCMessage) {
			if bm, ok := q.Message.(*jser.ByteMessage); !ok || string(bm.Data) != "raw" {
				t.Errorf("got %+v", q)
			}
			*q = jser.RPCMessage{NoChannel: true, UUID: q.UUID, RPCID: q.RPCID}
		})
		if len(r) != 1 || !errors.Is(r[0].Err, ErrAbsent) {
			t.Errorf("got %+v", r)
		}
		shut(t, a)
		n.StopNode(t)
		peer.StopNode(t)
	})
}

// An object reaches Longhouse nodes too.
func TestObjectsBetweenLonghouseNodes(t *testing.T) {
	group(t, 2, func(t *testing.T, nw *channeltest.SimNet, b *grouptest.Book, nodes []*grouptest.Node) {
		a := open(t, nodes[0], "x", nil)
		x := open(t, nodes[1], "x", func(_ context.Context, _ channel.Member, b Body) (Body, error) {
			return Object(b.Object.(int64) + 1), nil
		})
		r, err := a.Call(t.Context(), nodes[0].View().Members, Object(int64(41)), First, 0)
		if err != nil || r[0].Body.Object != int64(42) {
			t.Errorf("got %+v %v", r, err)
		}
		shut(t, a, x)
	})
}

type vector struct {
	Name, Kind, Hex string
	Fields          struct {
		Reply             bool
		UUIDHex, RPCIDHex string
	}
}

func vectors(t testing.TB) []vector {
	raw, err := os.ReadFile("testdata/rpc.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct{ Vectors []vector }
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	return f.Vectors
}

func TestVectors(t *testing.T) {
	n := 0
	for _, v := range vectors(t) {
		raw, err := hex.DecodeString(v.Hex)
		if err != nil {
			t.Fatal(err)
		}
		if is := v.Kind == "rpc" || v.Kind == "norpc"; foreign(raw) != is {
			t.Errorf("%s: foreign is %v", v.Name, !is)
		} else if !is {
			continue
		}
		n++
		f, err := decodeTribes(raw, jser.Limits{})
		if err != nil || hex.EncodeToString(f.id[:]) != v.Fields.UUIDHex || hex.EncodeToString(f.name) != v.Fields.RPCIDHex {
			t.Errorf("%s: %+v %v", v.Name, f, err)
		}
		if wantKind := map[bool]kind{true: reply, false: request}[v.Fields.Reply]; v.Kind == "rpc" && f.kind != wantKind || v.Kind == "norpc" && f.kind != absent {
			t.Errorf("%s: kind %d", v.Name, f.kind)
		}
		if out, err := encodeTribes(nil, &f); err != nil || !bytes.Equal(out, raw) {
			t.Errorf("%s: %v\ngot  %x\nwant %x", v.Name, err, out, raw)
		}
	}
	if n < 8 {
		t.Errorf("only %d vectors", n)
	}
}

func FuzzFrame(f *testing.F) {
	for _, k := range []kind{request, reply, failure, absent, busy, request | object} {
		f.Add(appendFrame(nil, &frame{kind: k, name: []byte("x"), wait: time.Second, body: []byte("body")}))
	}
	for _, v := range vectors(f) {
		raw, _ := hex.DecodeString(v.Hex)
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if fr, ok := decodeFrame(b); ok {
			if again := appendFrame(nil, &fr); !bytes.Equal(again, b) {
				t.Fatalf("in  %x\nout %x", b, again)
			}
			_, _ = bodyOf(&fr, jser.Limits{})
		}
		if foreign(b) {
			if fr, err := decodeTribes(b, jser.Limits{KeepUnlisted: true}); err == nil {
				_, _ = bodyOf(&fr, jser.Limits{})
				_, _ = encodeTribes(nil, &fr)
			}
		}
	})
}
