package totalorder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// group is a set of embedded channels whose bottoms are connected: what one
// sends arrives at the others, as a function decides.
type group struct {
	t     *testing.T
	nodes []*groupNode
	// fate, if set, is asked for every message on its way; it may sleep. An
	// error is the sender's, and the message does not arrive.
	fate func(from, to int, m *channel.Message) error
}

type groupNode struct {
	*channeltest.Embedded
	layer   *Interceptor
	metrics *channel.Metrics
}

func member(i int) channel.Member { return channeltest.Member(i + 1) }

func newGroup(t *testing.T, size int, change func(*Config)) *group {
	t.Helper()
	g := &group{t: t}
	c := Defaults
	if change != nil {
		change(&c)
	}
	for i := range size {
		m := channel.NewMetrics()
		o, err := New(c, channel.Settings{Metrics: m})
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{
			Layers: []channel.Interceptor{o}, Tick: 250 * time.Millisecond, Local: channel.Member{ID: member(i).ID},
		})
		g.nodes = append(g.nodes, &groupNode{e, o, m})
	}
	for i, n := range g.nodes {
		n.OnSend(func(ctx context.Context, m *channel.Message) error { return g.carry(ctx, i, m) })
		for j := range g.nodes {
			if i != j {
				n.Observe(channel.MemberAdded, member(j))
			}
		}
	}
	synctest.Wait()
	return g
}

type waiter chan error

func (w waiter) Defer() func(error) { return func(err error) { w <- err } }

// carry brings a message to its destinations, all at once.
func (g *group) carry(ctx context.Context, from int, m *channel.Message) error {
	var mu sync.Mutex
	var faults []channel.Fault
	var wg sync.WaitGroup
	for _, to := range m.To {
		j := slices.IndexFunc(g.nodes, func(n *groupNode) bool { return n.Local().ID == to.ID })
		x := channeltest.Clone(m)
		x.To, x.From = nil, member(from)
		wg.Go(func() {
			err := channel.ErrDisconnected
			if j >= 0 {
				err = nil
				if g.fate != nil {
					err = g.fate(from, j, &x)
				}
			}
			if err == nil {
				w := make(waiter, 1)
				deferred := &deferral{w: w}
				x.Later = deferred
				err = g.nodes[j].Receive(ctx, &x)
				if deferred.used && m.Options.Has(channel.SyncAck) {
					select {
					case err = <-w:
					case <-ctx.Done():
						err = ctx.Err()
					}
				}
				if err != nil && m.Options.Has(channel.SyncAck) {
					err = fmt.Errorf("%w: %w", channel.ErrNegativeAck, err)
				} else {
					err = nil
				}
			}
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				faults = append(faults, channel.Fault{Member: to, Err: err})
			}
		})
	}
	wg.Wait()
	if len(faults) > 0 {
		return &channel.SendError{Faults: faults}
	}
	return nil
}

// deferral notices that the end is taken over.
type deferral struct {
	w    waiter
	used bool
}

func (d *deferral) Defer() func(error) {
	d.used = true
	return d.w.Defer()
}

func (n *groupNode) value(name string) float64 { return channeltest.Sum(n.metrics, name) }

func (g *group) members(indexes ...int) (list []channel.Member) {
	for _, i := range indexes {
		list = append(list, g.nodes[i].Local())
	}
	return list
}

// verify checks what the nodes have delivered: nothing twice, nothing that was
// not sent to them, common messages in the same order, and those of one sender
// in the order in which they were sent. Bodies are "sender number ...".
func verify(t interface {
	Helper()
	Errorf(string, ...any)
}, logs [][]string, sent map[string][]int) {
	t.Helper()
	place := make([]map[string]int, len(logs))
	for i, log := range logs {
		place[i] = map[string]int{}
		last := map[string]int{}
		for at, body := range log {
			if _, twice := place[i][body]; twice {
				t.Errorf("node %d delivered %q twice", i, body)
			}
			place[i][body] = at
			if to, ok := sent[body]; !ok || !slices.Contains(to, i) {
				t.Errorf("node %d delivered %q, which nobody sent to it", i, body)
			}
			var from string
			var number int
			if _, err := fmt.Sscan(body, &from, &number); err != nil {
				t.Errorf("node %d delivered %q", i, body)
				continue
			}
			if number <= last[from] {
				t.Errorf("node %d delivered message %d of %s after %d", i, number, from, last[from])
			}
			last[from] = number
		}
	}
	for i := range logs {
		for j := range i {
			at := -1
			for _, body := range logs[i] {
				p, common := place[j][body]
				if !common {
					continue
				}
				if p < at {
					t.Errorf("nodes %d and %d delivered %q in different order", i, j, body)
				}
				at = max(at, p)
			}
		}
	}
}

// faults counts what verify finds.
type faults int

func (*faults) Helper()                 {}
func (f *faults) Errorf(string, ...any) { *f++ }

// The check itself finds what it is there for.
func TestVerifyFinds(t *testing.T) {
	sent := map[string][]int{"0 1": {0, 1}, "0 2": {0, 1}, "1 1": {0, 1}, "1 2": {0}}
	for name, x := range map[string]struct {
		logs [][]string
		want bool
	}{
		"nothing wrong":     {[][]string{{"0 1", "1 1", "0 2", "1 2"}, {"0 1", "0 2"}}, false},
		"different order":   {[][]string{{"0 1", "1 1"}, {"1 1", "0 1"}}, true},
		"twice":             {[][]string{{"0 1", "0 1"}, nil}, true},
		"invented":          {[][]string{{"0 3"}, nil}, true},
		"not a destination": {[][]string{nil, {"1 2"}}, true},
		"sender's order":    {[][]string{{"0 2", "0 1"}, nil}, true},
	} {
		f := new(faults)
		verify(f, x.logs, sent)
		if (*f > 0) != x.want {
			t.Errorf("%s: %d found", name, *f)
		}
	}
}

func (g *group) logs() (all [][]string) {
	for _, n := range g.nodes {
		all = append(all, n.Top.Bodies())
	}
	return all
}

// Everybody sends to everybody, himself included, with delays that differ for
// every message: everybody sees the same.
func TestEverybodySeesTheSame(t *testing.T) {
	for _, o := range []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck, channel.SendAsync, channel.SendAsync | channel.SendSyncAck} {
		synctest.Test(t, func(t *testing.T) {
			const size, each = 4, 50
			g := newGroup(t, size, nil)
			var mu sync.Mutex
			n := 0
			g.fate = func(int, int, *channel.Message) error {
				mu.Lock()
				n++
				d := time.Duration(n*7919%23) * time.Millisecond
				mu.Unlock()
				time.Sleep(d)
				return nil
			}
			sent := map[string][]int{}
			var wg sync.WaitGroup
			for i, node := range g.nodes {
				wg.Go(func() {
					for k := range each {
						body := fmt.Sprint(i, " ", k+1)
						mu.Lock()
						sent[body] = []int{0, 1, 2, 3}
						mu.Unlock()
						if err := node.Send(t.Context(), g.members(0, 1, 2, 3), []byte(body), o); err != nil {
							t.Errorf("options %v: %v", o, err)
						}
					}
				})
			}
			wg.Wait()
			time.Sleep(5 * time.Second)
			logs := g.logs()
			verify(t, logs, sent)
			for i, log := range logs {
				if len(log) != size*each || !slices.Equal(log, logs[0]) {
					t.Errorf("options %v: node %d delivered %d of %d", o, i, len(log), size*each)
				}
			}
			for _, m := range g.nodes[1].Top.Messages() {
				if m.Options != o|channel.ByteMessage || m.From.ID.IsZero() {
					t.Fatalf("sent with options %v, delivered with %v from %v", o, m.Options, m.From)
				}
			}
			for i, node := range g.nodes {
				if a, b, c := node.value("totalorder_waiting_bytes"), node.value("totalorder_undecided_messages"), node.value("totalorder_waiting_messages"); a != 0 || b != 0 || c != 0 {
					t.Errorf("node %d: left over %v %v %v", i, a, b, c)
				}
			}
		})
	}
}

// Whatever is lost, delayed or refused, to whatever destinations: order holds.
func TestOrderHoldsProperty(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		size := rapid.IntRange(2, 5).Draw(r, "nodes")
		each := rapid.IntRange(1, 25).Draw(r, "messages")
		loss := rapid.IntRange(0, 30).Draw(r, "loss in percent")
		spread := rapid.IntRange(0, 400).Draw(r, "spread in ms")
		seed := rapid.Uint64().Draw(r, "seed")
		synctest.Test(t, func(t *testing.T) {
			g := newGroup(t, size, nil)
			var mu sync.Mutex
			random := func(n int) int {
				mu.Lock()
				defer mu.Unlock()
				seed = seed*6364136223846793005 + 1442695040888963407
				return int(seed>>33) % max(n, 1)
			}
			g.fate = func(int, int, *channel.Message) error {
				time.Sleep(time.Duration(random(spread)) * time.Millisecond)
				switch d := random(100); {
				case d < loss/2:
					return channel.ErrAckTimeout
				case d < loss && random(2) == 0:
					time.Sleep(time.Duration(random(5000)) * time.Millisecond) // very late
				}
				return nil
			}
			sent := map[string][]int{}
			var wg sync.WaitGroup
			for i, node := range g.nodes {
				wg.Go(func() {
					for k := range each {
						var to []int
						for j := range size {
							if random(3) > 0 {
								to = append(to, j)
							}
						}
						if len(to) == 0 {
							continue
						}
						body := fmt.Sprint(i, " ", k+1)
						mu.Lock()
						sent[body] = to
						mu.Unlock()
						o := []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck, channel.SendAsync}[random(4)]
						_ = node.Send(t.Context(), g.members(to...), []byte(body), o)
						if random(20) == 0 {
							x := member(random(size))
							node.Observe(channel.MemberLost, x)
							node.Observe(channel.MemberAdded, x)
						}
					}
				})
			}
			wg.Wait()
			time.Sleep(30 * time.Second)
			verify(r, g.logs(), sent)
			for i, node := range g.nodes {
				if a, b := node.value("totalorder_waiting_bytes"), node.value("totalorder_undecided_messages"); a != 0 || b != 0 {
					r.Errorf("node %d: left over %v %v", i, a, b)
				}
			}
		})
	})
}

// A member that does not answer is waited for once; later messages go on
// without it, until it is heard of again.
func TestSilentMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		deaf := make(chan struct{})
		g.fate = func(from, to int, _ *channel.Message) error {
			if from == 2 || to == 2 {
				<-deaf
			}
			return nil
		}
		send := func(k int) {
			t.Helper()
			if err := g.nodes[0].SendDone(t.Context(), g.members(1, 2), fmt.Append(nil, "0 ", k), channel.SendAck, new(channeltest.Recorder)); err != nil {
				t.Fatal(err)
			}
		}
		g.nodes[0].OnSend(func(_ context.Context, m *channel.Message) error {
			x := channeltest.Clone(m)
			go func() { _ = g.carry(context.WithoutCancel(t.Context()), 0, &x) }()
			return nil
		})
		send(1)
		time.Sleep(900 * time.Millisecond)
		if n := len(g.nodes[1].Top.Messages()); n != 0 {
			t.Error("delivered before the place was decided")
		}
		time.Sleep(400 * time.Millisecond)
		send(2)
		synctest.Wait()
		if got := g.nodes[1].Top.Bodies(); !slices.Equal(got, []string{"0 1", "0 2"}) {
			t.Errorf("delivered %q", got)
		}
		if n := g.nodes[0].value("totalorder_slow_members_total"); n != 1 {
			t.Errorf("%v slow members", n)
		}
		close(deaf)
		time.Sleep(5 * time.Second)
		// Here the two may overtake each other; then the first one is lost.
		if got := g.nodes[2].Top.Bodies(); len(got) == 0 || got[len(got)-1] != "0 2" || !slices.IsSorted(got) {
			t.Errorf("after its silence it delivered %q", got)
		}
	})
}

// The sender dies after some have its decision: the others go on without the
// message, and nothing else is lost.
func TestSenderDies(t *testing.T) {
	for _, left := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g := newGroup(t, 3, nil)
			var dead atomic.Bool
			g.fate = func(from, to int, m *channel.Message) error {
				if from == 0 && to == 2 && kindOf(m.Body) == kindControl {
					dead.Store(true)
				}
				if dead.Load() && (from == 0 || to == 0) {
					return channel.ErrDisconnected
				}
				return nil
			}
			if err := g.nodes[0].Send(t.Context(), g.members(1, 2), []byte("0 1"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if a, b := len(g.nodes[1].Top.Messages()), len(g.nodes[2].Top.Messages()); a+b > 1 {
				t.Fatalf("%d and %d delivered", a, b)
			}
			if err := g.nodes[1].Send(t.Context(), g.members(1, 2), []byte("1 1"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
			kind := channel.MemberLost
			if left {
				kind = channel.MemberLeft
			}
			g.nodes[1].Observe(kind, member(0))
			g.nodes[2].Observe(kind, member(0))
			time.Sleep(3 * time.Second)
			for _, i := range []int{1, 2} {
				got := g.nodes[i].Top.Bodies()
				if len(got) == 0 || got[len(got)-1] != "1 1" {
					t.Errorf("node %d delivered %q", i, got)
				}
			}
			if n := g.nodes[2].value("totalorder_dropped_total"); n != 1 {
				t.Errorf("%v dropped", n)
			}
		})
	}
}

// A lost decision is asked for again, and a sender that knows nothing of a
// message says so.
func TestLostDecisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		var lose atomic.Bool
		lose.Store(true)
		g.fate = func(_, _ int, m *channel.Message) error {
			if lose.Load() && kindOf(m.Body) == kindControl {
				return channel.ErrDisconnected
			}
			return nil
		}
		if err := g.nodes[0].Send(t.Context(), g.members(1, 2), []byte("0 1"), channel.SendAck); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		lose.Store(false)
		time.Sleep(2 * time.Second)
		for _, i := range []int{1, 2} {
			if got := g.nodes[i].Top.Bodies(); !slices.Equal(got, []string{"0 1"}) {
				t.Errorf("node %d delivered %q", i, got)
			}
		}
		invented := &channel.Message{From: member(0), Options: channel.SendAck | channel.TotalOrder,
			Body: appendRequest([]byte("0 2"), request{epoch: 5, ordinal: 9, before: 9, many: true})}
		if err := g.nodes[1].Receive(t.Context(), invented); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := g.nodes[1].value("totalorder_dropped_total"); n != 1 || len(g.nodes[1].Top.Messages()) != 1 {
			t.Errorf("%v dropped", n)
		}
	})
}

func TestSyncMeansProcessed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		gate := make(chan struct{})
		g.nodes[1].Top.Reply = func(*channel.Message) (bool, error) { <-gate; return true, nil }
		g.nodes[2].Top.Reply = func(*channel.Message) (bool, error) { return false, channel.ErrNotMember }
		result := make(chan error, 1)
		go func() {
			result <- g.nodes[0].Send(t.Context(), g.members(0, 1, 2), []byte("0 1"), channel.SendSyncAck)
		}()
		synctest.Wait()
		select {
		case err := <-result:
			t.Fatalf("ended before everybody had processed it: %v", err)
		default:
		}
		close(gate)
		err := <-result
		var se *channel.SendError
		if !errors.As(err, &se) || len(se.Faults) != 1 || se.Faults[0].Member.ID != member(2).ID || !errors.Is(err, channel.ErrNegativeAck) {
			t.Errorf("ended with %v", err)
		}
		r := new(channeltest.Recorder)
		if err := g.nodes[0].SendDone(t.Context(), g.members(0, 1), []byte("0 2"), channel.SendSyncAck, r); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if res := r.Results(); len(res) != 1 || res[0].Err != nil {
			t.Errorf("results %+v", res)
		}
		if err := g.nodes[0].Send(t.Context(), g.members(0), []byte("0 3"), channel.SendSyncAck); err != nil {
			t.Error(err)
		}
		if got := g.nodes[0].Top.Bodies(); !slices.Equal(got, []string{"0 1", "0 2", "0 3"}) {
			t.Errorf("the sender delivered %q", got)
		}
	})
}

// Somebody who joins sees what is sent to him from then on, in the same order.
func TestJoiner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		sent := map[string][]int{}
		for k := range 40 {
			to := []int{0, 1}
			if k >= 20 {
				to = append(to, 2)
			}
			for i := range 2 {
				body := fmt.Sprint(i, " ", k+1)
				sent[body] = to
				if err := g.nodes[i].SendDone(t.Context(), g.members(to...), []byte(body), channel.SendAck, new(channeltest.Recorder)); err != nil {
					t.Fatal(err)
				}
			}
		}
		synctest.Wait()
		logs := g.logs()
		verify(t, logs, sent)
		if len(logs[0]) != 80 || len(logs[2]) != 40 || !slices.Equal(logs[2], logs[0][40:]) {
			t.Errorf("delivered %d, %d and %d", len(logs[0]), len(logs[1]), len(logs[2]))
		}
	})
}

func TestHostileInput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, nil)
		n := g.nodes[0]
		good := request{epoch: 1, ordinal: 1, before: 1}
		future := good
		future.clock = uint64(time.Now().Add(25 * time.Hour).UnixMicro())
		endless := good
		endless.clock = 1<<64 - 1
		zero, odd := request{}, good
		odd.before = 2
		bits := good
		bits.options = channel.UseAck
		for name, x := range map[string]struct {
			body   []byte
			reason error
		}{
			"empty":          {nil, channel.ErrBadMessage},
			"text":           {[]byte("just some text"), channel.ErrBadMessage},
			"mark only":      {[]byte("xLHT"), channel.ErrBadMessage},
			"short":          {append(bytes.Repeat([]byte{0}, 20), "\x01LHT"...), channel.ErrBadMessage},
			"unknown kind":   {append(bytes.Repeat([]byte{0}, 60), "\x09LHT"...), channel.ErrBadMessage},
			"ordinal 0":      {appendRequest(nil, zero), channel.ErrBadMessage},
			"before itself":  {appendRequest(nil, odd), channel.ErrBadMessage},
			"foreign option": {appendRequest(nil, bits), channel.ErrBadMessage},
			"far future":     {appendRequest(nil, future), channel.ErrBadMessage},
			"end of time":    {appendRequest(nil, endless), channel.ErrBadMessage},
			"control future": {appendControl(nil, []entry{{propose, 1, 1, 1<<64 - 1}}, 0), channel.ErrBadMessage},
			"control kind":   {appendControl(nil, []entry{{7, 1, 1, 1}}, 0), channel.ErrBadMessage},
			"control length": {append([]byte("x"), appendControl(nil, nil, 0)...), channel.ErrBadMessage},
		} {
			before := n.value("totalorder_refused_total")
			err := n.Receive(t.Context(), &channel.Message{From: member(1), Options: channel.SendNone | channel.TotalOrder, Body: x.body})
			if !errors.Is(err, x.reason) {
				t.Errorf("%s: %v", name, err)
			}
			if got := n.value("totalorder_refused_total"); got != before+1 {
				t.Errorf("%s: counted %v times", name, got-before)
			}
		}
		// Repeated, and sent before one that has been delivered.
		receive := func(r request) error {
			return n.Receive(t.Context(), &channel.Message{From: member(1), Options: channel.SendNone | channel.TotalOrder, Body: appendRequest(nil, r)})
		}
		for _, r := range []request{{epoch: 1, ordinal: 5, before: 5}, {epoch: 1, ordinal: 5, before: 5}} {
			if err := receive(r); err != nil {
				t.Error(err)
			}
			synctest.Wait()
		}
		if err := receive(request{epoch: 1, ordinal: 4, before: 4}); !errors.Is(err, errLate) {
			t.Errorf("an earlier one after a later one: %v", err)
		}
		if n := len(n.Top.Messages()); n != 1 {
			t.Errorf("%d delivered", n)
		}
	})
}

// A message that overtakes the one before it waits for that, for a while.
func TestOvertaking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newGroup(t, 1, nil).nodes[0]
		receive := func(ordinal, previous uint64) {
			t.Helper()
			r := request{epoch: 1, ordinal: ordinal, before: ordinal, previous: previous}
			if err := n.Receive(t.Context(), &channel.Message{From: member(1), Options: channel.SendNone | channel.TotalOrder, Body: appendRequest(fmt.Append(nil, ordinal), r)}); err != nil {
				t.Error(err)
			}
			synctest.Wait()
		}
		want := func(bodies ...string) {
			t.Helper()
			if got := n.Top.Bodies(); !slices.Equal(got, bodies) {
				t.Errorf("delivered %q, want %q", got, bodies)
			}
		}
		receive(3, 2)
		receive(2, 1)
		want()
		receive(1, 0)
		want("1", "2", "3")
		receive(9, 7) // 7 is lost
		want("1", "2", "3")
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		want("1", "2", "3", "9")
		receive(12, 9)
		want("1", "2", "3", "9", "12")
	})
}

// What nobody decides is bounded, and goes away.
func TestFloodOfUndecided(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 1, func(c *Config) { c.QueueMessages, c.QueueSize, c.SenderSize = 1000, 1<<20, 1<<19 })
		n, full := g.nodes[0], 0
		for i := range 10_000 {
			r := request{epoch: 1, ordinal: uint64(i + 1), before: 1, many: true}
			err := n.Receive(t.Context(), &channel.Message{From: member(i%7 + 1), Options: channel.SendNone | channel.TotalOrder, Body: appendRequest(make([]byte, 500), r)})
			if errors.Is(err, channel.ErrQueueFull) {
				full++
			}
		}
		if kept := n.value("totalorder_waiting_messages"); kept > 1000 || kept < 900 || n.value("totalorder_waiting_bytes") > 1<<20 || full+int(kept) != 10_000 {
			t.Errorf("%v messages of %v bytes are kept, %d refused", kept, n.value("totalorder_waiting_bytes"), full)
		}
		time.Sleep(11 * time.Second)
		if n := n.value("totalorder_waiting_bytes"); n != 0 {
			t.Errorf("%v bytes are left", n)
		}
		if err := n.Send(t.Context(), g.members(0), []byte("0 1"), channel.SendSyncAck); err != nil {
			t.Error(err)
		}
		for i := range maxSenders + 10 {
			_ = n.Receive(t.Context(), &channel.Message{From: member(i + 1), Options: channel.SendNone | channel.TotalOrder, Body: appendRequest(nil, request{epoch: 1, ordinal: 20_000, before: 1})})
			if i%100 == 0 {
				synctest.Wait()
			}
		}
		n.layer.core.mu.Lock()
		senders := len(n.layer.core.senders)
		n.layer.core.mu.Unlock()
		if senders > maxSenders {
			t.Errorf("%d senders", senders)
		}
	})
}

// A slow application holds up who sends to it, and then messages are refused;
// nothing is out of order.
func TestSlowListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 2, func(c *Config) { c.QueueMessages = 3 })
		gate := make(chan struct{})
		g.nodes[1].Top.Reply = func(*channel.Message) (bool, error) { <-gate; return true, nil }
		send := func(k int) error {
			return g.nodes[0].Send(t.Context(), g.members(1), fmt.Append(nil, "0 ", k), channel.SendNone)
		}
		for k := 1; k <= 4; k++ { // one at the listener, three wait
			go func() {
				if err := send(k); err != nil {
					t.Error(err)
				}
			}()
			synctest.Wait()
		}
		begin := time.Now()
		_ = send(5)
		if d := time.Since(begin); d != time.Second || g.nodes[1].value("totalorder_refused_total") != 1 {
			t.Errorf("waited %v", d)
		}
		go func() { _ = send(6) }()
		synctest.Wait()
		close(gate)
		synctest.Wait()
		if got := g.nodes[1].Top.Bodies(); !slices.Equal(got, []string{"0 1", "0 2", "0 3", "0 4", "0 6"}) {
			t.Errorf("delivered %q", got)
		}
	})
}

func TestTooManyUndecided(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, func(c *Config) { c.MaxUndecided = 2 })
		g.nodes[0].OnSend(func(context.Context, *channel.Message) error { return nil }) // into the void
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		for k := range 3 {
			err := g.nodes[0].Send(ctx, g.members(1, 2), []byte("x"), channel.SendNone)
			if (err == nil) != (k < 2) || err != nil && !errors.Is(err, channel.ErrQueueFull) {
				t.Errorf("%d: %v", k, err)
			}
		}
		if err := g.nodes[0].Send(t.Context(), g.members(1, 2), []byte("x"), channel.SendNone); err != nil { // after the timeout
			t.Error(err)
		}
	})
}

func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 2, nil)
		n := g.nodes[0]
		g.fate = func(int, int, *channel.Message) error { return channel.ErrDisconnected } // nobody decides
		gate := make(chan struct{})
		n.Top.Reply = func(*channel.Message) (bool, error) { <-gate; return true, nil }
		receive := func(ordinal uint64, many bool) {
			t.Helper()
			r := request{epoch: 1, ordinal: ordinal, before: 1, many: many, clock: uint64(time.Now().UnixMicro())}
			if err := n.Receive(t.Context(), &channel.Message{From: member(1), Options: channel.SendNone | channel.TotalOrder, Body: appendRequest(fmt.Append(nil, "1 ", ordinal), r)}); err != nil {
				t.Error(err)
			}
		}
		go receive(1, false)
		synctest.Wait()
		receive(2, false)
		receive(3, true)
		receive(4, false)
		flushed := make(chan error)
		go func() { flushed <- n.layer.Flush(t.Context()) }()
		synctest.Wait()
		select {
		case <-flushed:
			t.Error("flushed while a message is being delivered")
		default:
		}
		close(gate)
		if err := <-flushed; err != nil {
			t.Error(err)
		}
		if got := n.Top.Bodies(); !slices.Equal(got, []string{"1 1", "1 2"}) { // 3 is undecided
			t.Errorf("delivered %q", got)
		}
	})
}

// Who stops decides what he has sent: the others deliver it.
func TestStopDecides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 3, nil)
		g.fate = func(from, to int, m *channel.Message) error {
			if from == 2 && kindOf(m.Body) == kindControl {
				return channel.ErrDisconnected // its proposal does not come
			}
			return nil
		}
		if err := g.nodes[0].Send(t.Context(), g.members(1, 2), []byte("0 1"), channel.SendAck); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := g.nodes[0].Stop(t.Context()); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		for _, i := range []int{1, 2} {
			if got := g.nodes[i].Top.Bodies(); !slices.Equal(got, []string{"0 1"}) {
				t.Errorf("node %d delivered %q", i, got)
			}
		}
	})
}

// The recommended neighbours are accepted, those that would break the promise
// are not.
func TestPlacement(t *testing.T) {
	o, err := New(Defaults, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"dispatch", "order"} {
		other := channel.Transform(channel.Descriptor{Name: name}, func(*channel.Message) error { return nil }, nil)
		if _, err := channel.NewStack(channel.Layer{Interceptor: other}, channel.Layer{Interceptor: o}); err == nil || !strings.Contains(err.Error(), "totalorder") {
			t.Errorf("%s above: %v", name, err)
		}
		if _, err := channel.NewStack(channel.Layer{Interceptor: o}, channel.Layer{Interceptor: other}); err != nil {
			t.Errorf("%s below: %v", name, err)
		}
	}
}

func TestConfig(t *testing.T) {
	for word, change := range map[string]func(*Config){
		"decide_timeout is 0s": func(c *Config) { c.DecideTimeout = 0 },
		"block_timeout is 0s":  func(c *Config) { c.BlockTimeout = 0 },
		"expire is 1s":         func(c *Config) { c.Expire = time.Second },
		"max_undecided is 0":   func(c *Config) { c.MaxUndecided = 0 },
		"queue_messages is 0":  func(c *Config) { c.QueueMessages = 0 },
		"sender_size is 0":     func(c *Config) { c.SenderSize = 0 },
		"queue_size is 1":      func(c *Config) { c.QueueSize = 1 },
	} {
		c := Defaults
		change(&c)
		if _, err := New(c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
}

func FuzzWire(f *testing.F) {
	f.Add(appendRequest([]byte("body"), request{epoch: 1, ordinal: 3, before: 2, clock: 4, options: channel.Async, many: true}))
	f.Add(appendControl(nil, []entry{{propose, 1, 2, 3}, {decide, 4, 5, 6}, {forget, 7, 8, 9}}, 10))
	f.Fuzz(func(t *testing.T, b []byte) {
		switch kindOf(b) {
		case kindOne, kindMany:
			if body, r, err := parseRequest(bytes.Clone(b)); err == nil && !bytes.Equal(appendRequest(body, r), b) {
				t.Fatalf("%x became %x", b, appendRequest(body, r))
			}
		case kindControl:
			if list, clock, err := parseControl(nil, b); err == nil && !bytes.Equal(appendControl(nil, list, clock), b) {
				t.Fatalf("%x became %x", b, appendControl(nil, list, clock))
			}
		}
	})
}

func BenchmarkTotalOrder(b *testing.B) {
	for _, size := range []int{128, 1024} {
		body := make([]byte, size)
		o, err := New(Defaults, channel.Settings{})
		if err != nil {
			b.Fatal(err)
		}
		e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{o}, Discard: true})
		b.Run(fmt.Sprintf("send/%d", size), func(b *testing.B) {
			b.ReportAllocs()
			to := []channel.Member{member(1)}
			for b.Loop() {
				if err := e.Send(context.Background(), to, body, channel.SendAck); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("receive/%d", size), func(b *testing.B) {
			b.ReportAllocs()
			m := channel.Message{From: member(1)}
			var wire []byte
			n := uint64(0)
			for b.Loop() {
				n++
				wire = appendRequest(append(wire[:0], body...), request{epoch: uint64(size), ordinal: n, before: n})
				m.Options, m.Body = channel.SendNone|channel.TotalOrder, wire
				if err := e.Receive(context.Background(), &m); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("self/%d", size), func(b *testing.B) { // send, order and deliver
			b.ReportAllocs()
			to := []channel.Member{e.Local()}
			for b.Loop() {
				if err := e.Send(context.Background(), to, body, channel.SendSyncAck); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
