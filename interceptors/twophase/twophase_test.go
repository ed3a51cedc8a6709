package twophase

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

const flagged = channel.SendSyncAck | channel.TwoPhase

// node is a channel with the layer, connected with others by group.
type node struct {
	*channeltest.Embedded
	x       *Interceptor
	m       channel.Member
	metrics *channel.Metrics
	dead    bool
}

func (n *node) value(name string) float64 { return channeltest.Sum(n.metrics, name) }

func (n *node) bodies() []string { return n.Top.Bodies() }

// group connects nodes without a network. lose decides what gets lost: the
// message does not arrive, and its sender is told.
type group struct {
	t     testing.TB
	nodes []*node

	mu   sync.Mutex // held for calling lose, and for the nodes' dead
	lose func(from, to int, m *channel.Message) bool
}

// lost reports whether a message gets lost.
func (g *group) lost(from, to int, m *channel.Message) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.nodes[from].dead || to < 0 || g.nodes[to].dead || g.lose != nil && g.lose(from, to, m)
}

func (g *group) dead(i int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nodes[i].dead = true
}

// change sets what gets lost from now on.
func (g *group) change(lose func(from, to int, m *channel.Message) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lose = lose
}

func newGroup(t testing.TB, n int, change func(i int, c *Config)) *group {
	g := &group{t: t}
	for i := range n {
		cfg := Defaults
		if change != nil {
			change(i, &cfg)
		}
		s := channel.Settings{Metrics: channel.NewMetrics()}
		x, err := New(cfg, s)
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Settings: s, Tick: 500 * time.Millisecond})
		m := e.Local()
		m.Host, m.Port = netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}), 4000
		nd := &node{Embedded: e, x: x, m: m, metrics: s.Metrics}
		g.nodes = append(g.nodes, nd)
		e.OnSend(func(ctx context.Context, m *channel.Message) error { return g.route(ctx, i, m) })
	}
	for _, a := range g.nodes {
		for _, b := range g.nodes {
			if a != b {
				a.Observe(channel.MemberAdded, b.m)
			}
		}
	}
	synctest.Wait()
	return g
}

func (g *group) route(ctx context.Context, from int, m *channel.Message) error {
	var faults []channel.Fault
	for _, to := range m.To {
		j := slices.IndexFunc(g.nodes, func(n *node) bool { return n.m.ID == to.ID })
		if g.lost(from, j, m) {
			faults = append(faults, channel.Fault{Member: to, Err: channel.ErrDisconnected})
			continue
		}
		c := channeltest.Clone(m)
		c.To, c.Done, c.From = nil, nil, g.nodes[from].m
		if err := g.nodes[j].Receive(context.Background(), &c); err != nil && m.Options.Has(channel.UseAck|channel.SyncAck) {
			faults = append(faults, channel.Fault{Member: to, Err: channel.ErrNegativeAck})
		}
	}
	if len(faults) > 0 {
		return &channel.SendError{Faults: faults}
	}
	return nil
}

// kill lets a node die, and the others notice.
func (g *group) kill(i int) {
	g.dead(i)
	for j, n := range g.nodes {
		if j != i {
			n.Observe(channel.MemberLost, g.nodes[i].m)
		}
	}
}

func (g *group) members(except int) (ms []channel.Member) {
	for i, n := range g.nodes {
		if i != except {
			ms = append(ms, n.m)
		}
	}
	return ms
}

// quiet checks that nothing is left anywhere.
func (g *group) quiet() {
	g.t.Helper()
	time.Sleep(5 * time.Minute)
	for i, n := range g.nodes {
		n.x.mu.Lock()
		held, bytes, per, fates, own, again := len(n.x.table.held), n.x.table.bytes, len(n.x.table.per), len(n.x.table.fates), len(n.x.own.fates), len(n.x.again)
		n.x.mu.Unlock()
		if !n.dead && (held != 0 || bytes != 0 || per != 0 || fates != 0 || own != 0 || again != 0 || len(n.x.slots) != 0) {
			g.t.Errorf("node %d: after five minutes %d held, %d bytes, %d senders, %d + %d fates, %d to repeat, %d slots", i, held, bytes, per, fates, own, again, len(n.x.slots))
		}
	}
}

func isConfirm(m *channel.Message) bool { _, ok := confirmed(m.Body); return ok }

// The bytes are those that a Tomcat node sends and understands.
func TestVector(t *testing.T) {
	text, err := os.ReadFile("testdata/twophase.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []struct {
			Name, Hex string
			Input     struct{ BodyHex, UniqueIDHex string }
			Output    []struct{ BodyHex, UniqueIDHex string }
		}
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	synctest.Test(t, func(t *testing.T) {
		found := 0
		for _, v := range file.Vectors {
			switch v.Name {
			case "two-phase-start", "two-phase-end":
				found++
				if want := map[string]string{"two-phase-start": start, "two-phase-end": end}[v.Name]; want != string(unhex(v.Hex)) {
					t.Errorf("%s differs", v.Name)
				}
			case "two-phase-commit":
				found++
				x, err := New(Config{Expire: time.Minute, AskAfter: time.Second, MaxMessages: 1, MaxBytes: 1 << 20, MaxInFlight: 1, Remember: 10}, channel.Settings{})
				if err != nil {
					t.Fatal(err)
				}
				e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}})
				for _, o := range v.Output { // as received
					m := channel.Message{ID: channel.UniqueID(unhex(o.UniqueIDHex)), From: channeltest.Member(1), Options: channel.SendNone, Body: unhex(o.BodyHex)}
					if err := e.Receive(t.Context(), &m); err != nil {
						t.Fatal(err)
					}
				}
				got := e.Top.Messages()
				if len(got) != 1 || string(got[0].Body) != string(unhex(v.Input.BodyHex)) || got[0].ID.String() != v.Input.UniqueIDHex || got[0].Options != channel.SendNone {
					t.Errorf("delivered %+v", got)
				}
				if err := e.Send(t.Context(), []channel.Member{channeltest.Member(1)}, unhex(v.Input.BodyHex), channel.SendNone); err != nil {
					t.Fatal(err)
				}
				sent := e.Bottom.Messages()
				if len(sent) != 2 || string(sent[0].Body) != string(unhex(v.Input.BodyHex)) || sent[1].ID == sent[0].ID || sent[1].Time != sent[0].Time ||
					hex.EncodeToString(sent[1].Body) != strings.Replace(v.Output[1].BodyHex, v.Input.UniqueIDHex, sent[0].ID.String(), 1) {
					t.Errorf("sent %+v", sent)
				}
			}
		}
		if found != 3 {
			t.Errorf("%d vectors found", found)
		}
	})
}

func run(t *testing.T, n int, change func(i int, c *Config), f func(t *testing.T, g *group)) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, n, change)
		f(t, g)
		g.quiet()
	})
}

func TestAllDeliver(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, g *group) {
		for i, o := range []channel.Options{flagged, channel.SendAck | channel.TwoPhase, channel.SendNone | channel.TwoPhase, channel.SendAck} {
			if err := g.nodes[0].Send(t.Context(), g.members(0), fmt.Append(nil, i), o); err != nil {
				t.Error(err)
			}
			done := new(channeltest.Recorder)
			if err := g.nodes[0].SendDone(t.Context(), g.members(0), fmt.Append(nil, i, " later"), o, done); err != nil {
				t.Error(err)
			}
			synctest.Wait()
			if r := done.Results(); len(r) != 1 || r[0].Err != nil {
				t.Errorf("completions %v", r)
			}
			for _, n := range g.nodes[1:] {
				got := n.Top.Messages()
				if len(got) != 2*i+2 || got[2*i].Options != o || string(got[2*i].Body) != fmt.Sprint(i) {
					t.Errorf("options %v: delivered %+v", o, got)
				}
			}
		}
	})
}

// A member that does not get the message: nobody delivers it.
func TestFirstPhaseFails(t *testing.T) {
	run(t, 4, nil, func(t *testing.T, g *group) {
		g.change(func(_, to int, m *channel.Message) bool { return to == 2 && string(m.Body) == "x" })
		for range 2 {
			err := g.nodes[0].Send(t.Context(), g.members(0), []byte("x"), flagged)
			var se *channel.SendError
			if !errors.As(err, &se) || len(se.Faults) != 3 || !errors.Is(err, channel.ErrDisconnected) || !errors.Is(err, ErrAborted) {
				t.Errorf("error %v", err)
			}
		}
		done := new(channeltest.Recorder)
		if err := g.nodes[0].SendDone(t.Context(), g.members(0), []byte("x"), flagged, done); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if r := done.Results(); len(r) != 1 || !errors.Is(r[0].Err, ErrAborted) || !errors.Is(r[0].Err, channel.ErrDisconnected) {
			t.Errorf("completions %v", r)
		}
		for i, n := range g.nodes[1:] {
			if len(n.bodies()) != 0 || n.value("twophase_held_messages") != 0 {
				t.Errorf("node %d: delivered %q, holds %v", i+1, n.bodies(), n.value("twophase_held_messages"))
			}
		}
	})
}

// The coordinator dies after it has confirmed to one of three: all deliver.
// After it has confirmed to nobody: none does.
func TestCoordinatorDies(t *testing.T) {
	for _, reached := range []int{0, 1, 2} {
		t.Run(fmt.Sprint(reached), func(t *testing.T) {
			run(t, 4, nil, func(t *testing.T, g *group) {
				g.change(func(_, to int, m *channel.Message) bool {
					if !isConfirm(m) {
						return false
					}
					if to > reached { // it dies while it confirms
						g.nodes[0].dead = true
						return true
					}
					return false
				})
				_ = g.nodes[0].Send(t.Context(), g.members(0), []byte("x"), flagged)
				g.kill(0)
				time.Sleep(30 * time.Second) // less than the time it would be held
				for i, n := range g.nodes[1:] {
					if got := len(n.bodies()); got != min(reached, 1) || n.value("twophase_held_messages") != 0 {
						t.Errorf("node %d delivered %d times, holds %v", i+1, got, n.value("twophase_held_messages"))
					}
				}
			})
		})
	}
}

// The only one that was told dies too, after it has told another one, which had
// answered before that it did not know.
func TestSecondDeath(t *testing.T) {
	run(t, 4, nil, func(t *testing.T, g *group) {
		lose := func(late bool) func(from, to int, m *channel.Message) bool {
			return func(from, to int, m *channel.Message) bool {
				if isConfirm(m) {
					return to != 1
				}
				return isTalk(m.Body) && from == 1 && (to == 2 || !late)
			}
		}
		g.change(lose(false))
		_ = g.nodes[0].Send(t.Context(), g.members(0), []byte("x"), flagged)
		g.kill(0)
		time.Sleep(8 * time.Second)
		g.change(lose(true))
		time.Sleep(8 * time.Second)
		g.kill(1)
		time.Sleep(30 * time.Second)
		for i, n := range g.nodes[2:] {
			if len(n.bodies()) != 1 {
				t.Errorf("node %d delivered %q", i+2, n.bodies())
			}
		}
	})
}

// A confirmation that comes after a node has said that it knows of none.
func TestConfirmationAfterTheVerdict(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, g *group) {
		g.change(func(_, to int, m *channel.Message) bool { return isConfirm(m) })
		_ = g.nodes[0].Send(t.Context(), g.members(0), []byte("x"), flagged)
		id := g.nodes[0].Bottom.Messages()[0].ID
		g.kill(0)
		time.Sleep(30 * time.Second)
		for _, n := range g.nodes[1:] {
			m := channel.Message{ID: channel.NewUniqueID(), From: g.nodes[0].m, Options: flagged, Body: appendConfirm(nil, id)}
			if err := n.Receive(t.Context(), &m); err == nil {
				t.Error("a confirmation that is too late is acknowledged")
			}
			if len(n.bodies()) != 0 || n.value("twophase_late_rejected_total") != 1 {
				t.Errorf("delivered %q", n.bodies())
			}
		}
	})
}

// A confirmation gets lost, and the coordinator lives.
func TestLostConfirmation(t *testing.T) {
	for _, tomcat := range []bool{false, true} {
		run(t, 3, nil, func(t *testing.T, g *group) {
			if tomcat { // nobody says that he is a Longhouse node
				for _, a := range g.nodes {
					for _, b := range g.nodes {
						if a != b {
							m := b.m
							m.Payload = ""
							a.Observe(channel.MemberUpdated, m)
						}
					}
				}
				synctest.Wait()
			}
			lost := 0
			g.change(func(_, to int, m *channel.Message) bool {
				if isConfirm(m) && to == 2 && lost == 0 {
					lost++
					return true
				}
				return false
			})
			err := g.nodes[0].Send(t.Context(), g.members(0), []byte("x"), flagged)
			var se *channel.SendError
			if !errors.As(err, &se) || len(se.Faults) != 1 || !se.Faults[0].Member.Is(g.nodes[2].m) {
				t.Errorf("error %v", err)
			}
			time.Sleep(20 * time.Second)
			for i, n := range g.nodes[1:] {
				if len(n.bodies()) != 1 {
					t.Errorf("Tomcat %v: node %d delivered %q", tomcat, i+1, n.bodies())
				}
			}
		})
	}
}

// Confirmations and messages that come alone, twice, in the wrong order, or from
// somebody else.
func TestOddConfirmations(t *testing.T) {
	run(t, 2, nil, func(t *testing.T, g *group) {
		n, from := g.nodes[1], g.nodes[0].m
		receive := func(m channel.Member, id channel.UniqueID, body string) error {
			return n.Receive(t.Context(), &channel.Message{ID: id, From: m, Options: channel.SendNone | channel.TwoPhase, Body: []byte(body)})
		}
		confirm := func(m channel.Member, id channel.UniqueID) error {
			return receive(m, channel.NewUniqueID(), string(appendConfirm(nil, id)))
		}
		expect := func(what string, delivered int, metric string, value float64) {
			t.Helper()
			if got := len(n.bodies()); got != delivered || n.value(metric) != value {
				t.Errorf("%s: delivered %d, %s %v", what, got, metric, n.value(metric))
			}
		}
		a, b, c := channel.NewUniqueID(), channel.NewUniqueID(), channel.NewUniqueID()
		_ = receive(from, a, "a")
		_ = confirm(channeltest.Member(77), a)
		expect("confirmed by somebody else", 0, "twophase_early_confirmations_total", 1)
		_ = confirm(from, a)
		expect("confirmed", 1, "twophase_delivered_total", 1)
		_ = confirm(from, a)
		expect("confirmed twice", 1, "twophase_duplicates_total", 1)
		_ = receive(from, a, "a")
		expect("sent again", 1, "twophase_duplicates_total", 2)
		_ = confirm(from, b)
		_ = confirm(from, b)
		expect("without a message", 1, "twophase_duplicates_total", 3)
		_ = receive(from, b, "b")
		expect("which comes after all", 2, "twophase_delivered_total", 2)
		_ = receive(from, c, "c")
		_ = receive(from, c, "c")
		expect("not confirmed", 2, "twophase_held_messages", 1)
		time.Sleep(Defaults.Expire + time.Second)
		expect("expired", 2, "twophase_expired_total", 1)
		if err := confirm(from, c); err == nil {
			t.Error("confirmed too late, and acknowledged")
		}
		expect("too late", 2, "twophase_late_rejected_total", 1)
		// What its sender has left behind.
		_ = receive(from, channel.NewUniqueID(), "d")
		n.Observe(channel.MemberLeft, from)
		time.Sleep(Defaults.Expire + time.Second)
		expect("its sender has left", 2, "twophase_held_messages", 0)
	})
}

func TestBounds(t *testing.T) {
	run(t, 3, func(_ int, c *Config) { c.MaxMessages, c.MaxBytes, c.Remember = 100, 10_000, 50 }, func(t *testing.T, g *group) {
		n := g.nodes[2]
		flood := func(from channel.Member, size int) (refused int) {
			for range 1000 {
				err := n.Receive(t.Context(), &channel.Message{ID: channel.NewUniqueID(), From: from, Options: flagged, Body: make([]byte, size)})
				if errors.Is(err, channel.ErrQueueFull) {
					refused++
				}
			}
			return refused
		}
		if r := flood(g.nodes[0].m, 10); r != 950 {
			t.Errorf("%d of 1000 messages refused, want all but half of the room", r)
		}
		if err := g.nodes[1].Send(t.Context(), []channel.Member{n.m}, []byte("y"), flagged); err != nil {
			t.Errorf("another sender: %v", err)
		}
		time.Sleep(Defaults.Expire + time.Second)
		if flood(g.nodes[0].m, 1000); n.value("twophase_held_bytes") != 5000 {
			t.Errorf("%v bytes are held", n.value("twophase_held_bytes"))
		}
		if v := n.value("twophase_refused_total"); v != 950+995 {
			t.Errorf("%v refusals are counted", v)
		}
		for range 1000 {
			_ = n.Receive(t.Context(), &channel.Message{ID: channel.NewUniqueID(), From: g.nodes[0].m, Options: flagged, Body: appendConfirm(nil, channel.NewUniqueID())})
		}
		time.Sleep(time.Second)
		if len(n.x.table.fates) != 50 || n.value("twophase_forgotten_total") != 1000+1+50-50 {
			t.Errorf("%d fates are remembered, %v forgotten", len(n.x.table.fates), n.value("twophase_forgotten_total"))
		}
	})
}

func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, 2, func(_ int, c *Config) { c.MaxInFlight = 2 })
		a := g.nodes[0]
		a.Hold()
		done := new(channeltest.Recorder)
		for range 2 {
			if err := a.SendDone(t.Context(), g.members(0), []byte("x"), flagged, done); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := a.SendDone(ctx, g.members(0), []byte("x"), flagged, done); !errors.Is(err, channel.ErrQueueFull) {
			t.Errorf("the third: %v", err)
		}
		if n := a.value("twophase_waited_total"); n != 1 {
			t.Errorf("%v waits are counted", n)
		}
		a.Finish(nil)
		synctest.Wait()
		if n := len(done.Results()); n != 2 {
			t.Errorf("%d completions", n)
		}
		// The channel stops while messages are between the phases.
		a.Hold()
		for range 2 {
			if err := a.SendDone(t.Context(), g.members(0), []byte("x"), flagged, done); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		r := done.Results()
		if len(r) != 4 || !errors.Is(r[2].Err, channel.ErrClosed) || !errors.Is(r[3].Err, channel.ErrClosed) {
			t.Errorf("completions %v", r)
		}
	})
}

// Whoever dies and whatever gets lost on the way of the confirmations: those
// that live and see each other decide alike, before the message would expire. Of
// the questions from one node to another, and of the answers, at most three get
// lost: against more luck than that, the time that is left is no promise.
func TestUniformity(t *testing.T) {
	const most = 3
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(3, 6).Draw(rt, "nodes")
		missP1 := rapid.SliceOfN(rapid.IntRange(0, 9), n, n).Draw(rt, "first")  // 0: lost
		missP2 := rapid.SliceOfN(rapid.IntRange(0, 1), n, n).Draw(rt, "second") // 0: lost
		dies, noticed := rapid.Bool().Draw(rt, "dies"), rapid.SliceOfN(rapid.IntRange(0, 5000), n, n).Draw(rt, "noticed")
		second := rapid.IntRange(0, n-1).Draw(rt, "second death") // 0: none
		when := time.Duration(rapid.IntRange(0, 40).Draw(rt, "second death at"))*500*time.Millisecond + 250*time.Millisecond
		patterns := rapid.SliceOfN(rapid.Uint16(), n*n, n*n).Draw(rt, "talk") // bit i: message i is lost
		type way struct {
			from, to int
			kind     byte
		}
		sent, lost := map[way]int{}, map[way]int{}
		synctest.Test(t, func(t *testing.T) {
			g := newGroup(t, n, nil)
			g.change(func(from, to int, m *channel.Message) bool {
				switch {
				case isTalk(m.Body):
					kind, _, err := decodeTalk(m.Body)
					if err != nil {
						rt.Error(err)
					}
					w := way{from, to, kind}
					miss := patterns[from*n+to]>>min(sent[w], 15)&1 == 1 && lost[w] < most
					sent[w]++
					if miss {
						lost[w]++
					}
					return miss
				case isConfirm(m):
					return missP2[to] == 0
				}
				return missP1[to] == 0
			})
			err := g.nodes[0].Send(t.Context(), g.members(0), []byte("x"), channel.SendNone|channel.TwoPhase)
			if dies {
				g.dead(0)
				for i := range n - 1 {
					go func() {
						time.Sleep(time.Duration(noticed[i+1]) * time.Millisecond)
						g.nodes[i+1].Observe(channel.MemberLost, g.nodes[0].m)
					}()
				}
			}
			time.Sleep(when)
			if second > 0 {
				g.kill(second)
			}
			time.Sleep(55*time.Second - when)
			delivered, live := 0, 0
			for i, nd := range g.nodes[1:] {
				if nd.dead {
					continue
				}
				live++
				if c := len(nd.bodies()); c > 1 {
					rt.Errorf("node %d delivered %d times", i+1, c)
				} else {
					delivered += c
				}
			}
			if delivered != 0 && delivered != live {
				rt.Errorf("%d of %d delivered", delivered, live)
			}
			if err == nil && delivered != live {
				rt.Errorf("success, but %d of %d delivered", delivered, live)
			}
			if slices.Contains(missP1[1:], 0) && delivered > 0 {
				rt.Errorf("%d delivered what one has not received", delivered)
			}
			g.quiet()
		})
	})
}

func TestForeignTalk(t *testing.T) {
	run(t, 2, nil, func(t *testing.T, g *group) {
		n, from := g.nodes[1], g.nodes[0].m
		k := key{from.ID, channel.NewUniqueID()}
		good := appendTalk(nil, ask, []word{{k, asked}})
		for i, c := range []struct {
			m    channel.Member
			body []byte
		}{
			{channeltest.Member(9), good}, {from, good[:len(good)-1]}, {from, append(slices.Clone(good), 0)}, {from, []byte(talk + "\x03\x00\x00")},
			{from, []byte(talk + "\x01\xff\xff")}, {from, appendTalk(nil, tell, []word{{k, asked}})}, {from, appendTalk(nil, ask, []word{{k, committed}})},
			{from, appendTalk(nil, tell, []word{{k, 200}})},
		} {
			if err := n.ReceiveBody(c.m, channel.SendAck, string(c.body)); err != nil {
				t.Error(err)
			}
			if v := n.value("twophase_malformed_discarded_total"); v != float64(i+1) {
				t.Errorf("message %d: %v are counted", i, v)
			}
		}
		// An answer that nobody asked for.
		_ = n.Receive(t.Context(), &channel.Message{ID: k.id, From: from, Options: flagged, Body: []byte("x")})
		other := channeltest.Member(9)
		n.Observe(channel.MemberAdded, other)
		synctest.Wait()
		for _, f := range []fate{committed, aborted, undecided, unknown} {
			_ = n.ReceiveBody(other, channel.SendAck, string(appendTalk(nil, tell, []word{{k, f}})))
		}
		if len(n.Top.Messages()) != 0 || n.value("twophase_held_messages") != 1 {
			t.Error("an answer that nobody asked for is believed")
		}
	})
}

func TestConfig(t *testing.T) {
	var errs interface{ Unwrap() []error }
	if err := (&Config{OptionFlag: 3, AskAfter: -1, MaxBytes: -1}).Validate(); !errors.As(err, &errs) || len(errs.Unwrap()) != 7 {
		t.Errorf("all problems at once: %v", err)
	}
	x, err := New(Defaults, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := x.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func FuzzTalk(f *testing.F) {
	f.Add(appendTalk(nil, ask, []word{{key{}, asked}}))
	f.Add(appendTalk(nil, tell, []word{{key{}, committed}, {key{}, unknown}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, words, err := decodeTalk(b)
		if err == nil && string(appendTalk(nil, kind, words)) != string(b) {
			t.Errorf("%x is not written as it was read", b)
		}
		if id, ok := confirmed(b); ok && string(appendConfirm(nil, id)) != string(b) {
			t.Errorf("%x is not written as it was read", b)
		}
	})
}

func BenchmarkSend(b *testing.B) {
	for name, o := range map[string]channel.Options{"marked": flagged, "unmarked": channel.SendSyncAck} {
		b.Run(name, func(b *testing.B) {
			x, err := New(Defaults, channel.Settings{})
			if err != nil {
				b.Fatal(err)
			}
			e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Discard: true})
			to, body := []channel.Member{channeltest.Member(1)}, make([]byte, 1024)
			b.ReportAllocs()
			for b.Loop() {
				if err := e.Send(context.Background(), to, body, o); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
