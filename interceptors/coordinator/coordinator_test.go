package coordinator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
)

type node struct {
	*grouptest.Stacked
	x *Interceptor

	mu     sync.Mutex
	states []State
}

func (n *node) value(name string) float64 { return channeltest.Sum(n.Metrics, name) }

func begin(t *testing.T, sim *channeltest.SimNode) *node {
	t.Helper()
	n := new(node)
	n.Stacked = grouptest.Stack(t, sim.IP(), sim, func(s channel.Settings) (_ []channel.Interceptor, err error) {
		if n.x, err = New(Defaults, s); err != nil {
			return nil, err
		}
		n.x.Watch(func(s State) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.states = append(n.states, s)
		})
		d, err := failuredetector.New(failuredetector.Defaults, s)
		return []channel.Interceptor{n.x, d}, err
	})
	return n
}

func (n *node) stop(t *testing.T) {
	t.Helper()
	if err := n.Stop(context.WithoutCancel(t.Context())); err != nil {
		t.Error(err)
	}
}

// agreed reports whether the nodes, and only they, agree on the first of them.
func agreed(nodes ...*node) func() bool {
	return func() bool {
		want := nodes[0].x.State()
		for _, n := range nodes {
			s := n.x.State()
			if !s.Settled || s.ViewID != want.ViewID || len(s.View) != len(nodes) || s.Coordinator.ID != nodes[0].Local().ID || s.Local != (n == nodes[0]) {
				return false
			}
		}
		return true
	}
}

// Ten nodes agree on one coordinator; after it has stopped, the rest agree on
// another; and so on.
func TestTenNodes(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 5}, func(t *testing.T, nw *channeltest.SimNet) {
		var nodes []*node
		for _, s := range nw.Nodes(10) {
			nodes = append(nodes, begin(t, s))
			time.Sleep(11 * time.Millisecond)
		}
		grouptest.Within(t, 10*time.Second, "ten", agreed(nodes...))
		sent := func() (v float64) {
			for _, n := range nodes {
				v += n.value("coordinator_messages_total")
			}
			return v
		}
		if n := sent(); n > 400 {
			t.Errorf("it took %v messages", n)
		}
		before := sent()
		time.Sleep(10 * time.Minute)
		if n := sent(); n != before {
			t.Errorf("%v messages in ten quiet minutes", n-before)
		}
		for len(nodes) > 7 {
			first := nodes[0]
			if !first.x.IsCoordinator() || first.value("coordinator_is_local") != 1 {
				t.Error("the first node is not the coordinator")
			}
			if len(nodes)%2 == 0 {
				first.stop(t)
			} else {
				first.Sim.Kill()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				_ = first.Stop(ctx)
				cancel()
			}
			nodes = nodes[1:]
			grouptest.Within(t, 30*time.Second, fmt.Sprint(len(nodes)), agreed(nodes...))
		}
		last := nodes[len(nodes)-1]
		last.mu.Lock()
		for i := 1; i < len(last.states); i++ {
			if last.states[i].equal(last.states[i-1]) {
				t.Errorf("the watcher was told the same state twice: %+v", last.states[i])
			}
		}
		if end := last.states[len(last.states)-1]; !end.equal(last.x.State()) {
			t.Errorf("the watcher was last told %+v", end)
		}
		last.mu.Unlock()
		for _, n := range nodes {
			if len(n.Got.Messages()) > 0 {
				t.Error("an election message reached the application")
			}
			n.stop(t)
		}
	})
}

// Splits, with lost packets: each side has one coordinator, and after the merge
// there is one again.
func TestSplitAndHeal(t *testing.T) {
	for _, length := range []time.Duration{time.Second, 10 * time.Second, 10 * time.Minute} {
		t.Run(length.String(), func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{Seed: 9, Link: channeltest.LinkPolicy{Loss: 0.05}}, func(t *testing.T, nw *channeltest.SimNet) {
				var nodes []*node
				var ips []string
				for _, s := range nw.Nodes(5) {
					nodes, ips = append(nodes, begin(t, s)), append(ips, s.IP())
					time.Sleep(13 * time.Millisecond)
				}
				grouptest.Within(t, 30*time.Second, "start", agreed(nodes...))
				nw.Partition([]string{ips[0], ips[3]}, []string{ips[1], ips[2], ips[4]})
				time.Sleep(length)
				if length > 5*time.Second {
					grouptest.Within(t, 30*time.Second, "one side", agreed(nodes[0], nodes[3]))
					grouptest.Within(t, 30*time.Second, "other side", agreed(nodes[1], nodes[2], nodes[4]))
				}
				nw.Heal()
				grouptest.Within(t, 40*time.Second, "heal", agreed(nodes...))
				time.Sleep(time.Minute)
				if !agreed(nodes...)() {
					t.Error("it did not stay so")
				}
				for _, n := range nodes {
					n.stop(t)
				}
			})
		})
	}
}

func TestAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := channel.Settings{Metrics: channel.NewMetrics()}
		x, err := New(Defaults, s)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := x.Coordinator(); ok {
			t.Error("a coordinator before the start")
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Settings: s, Tick: time.Second})
		synctest.Wait()
		if m, ok := x.Coordinator(); !ok || m.ID != e.Local().ID || !x.IsCoordinator() || !x.State().Settled {
			t.Errorf("alone: %+v", x.State())
		}
		var told []State
		cancel := x.Watch(func(s State) { told = append(told, s) })
		synctest.Wait()
		if len(told) != 1 || !told[0].Local {
			t.Errorf("a new watcher is told %+v", told)
		}
		// Somebody who is first but takes no part.
		e.Observe(channel.MemberAdded, channeltest.Member(1))
		time.Sleep(time.Minute)
		st := x.State()
		if st.Settled || !st.Local {
			t.Errorf("the view that was agreed holds until there is another: %+v", st)
		}
		n := len(e.Bottom.Messages())
		if n < 3 || n > 10 {
			t.Errorf("%d requests in a minute, want some, with growing pauses", n)
		}
		e.Observe(channel.MemberLeft, channeltest.Member(1))
		synctest.Wait()
		if !x.State().Settled {
			t.Error("alone again, but not settled")
		}
		count := len(told)
		cancel()
		x.Watch(func(State) { panic("boom") })
		synctest.Wait()
		if v := (&node{Stacked: &grouptest.Stacked{Metrics: s.Metrics}}).value("coordinator_watcher_panics_total"); v != 1 {
			t.Errorf("%v panics of watchers counted", v)
		}
		e.Observe(channel.MemberAdded, channeltest.Member(1))
		synctest.Wait()
		if len(told) != count {
			t.Error("told after cancel")
		}
	})
}

// What is malformed goes no higher, and is counted; the rest passes.
func TestForeignBodies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := channel.Settings{Metrics: channel.NewMetrics()}
		x, err := New(Defaults, s)
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Settings: s})
		for _, b := range []string{header, header + alive, header + strings.Repeat("\xff", 200), alive} {
			if err := e.ReceiveBody(channeltest.Member(1), channel.SendAck, b); err != nil {
				t.Error(err)
			}
		}
		for _, b := range []string{"", header[:15], "x" + header, alive[1:]} {
			if err := e.ReceiveBody(channeltest.Member(1), channel.SendAck, b); err != nil {
				t.Error(err)
			}
		}
		n := &node{Stacked: &grouptest.Stacked{Metrics: s.Metrics}}
		if n.value("coordinator_refused_total") != 3 || len(e.Top.Messages()) != 4 {
			t.Errorf("%v refused, %d passed on", n.value("coordinator_refused_total"), len(e.Top.Messages()))
		}
		// A flood is bounded.
		m := message{leader: nth(1), source: nth(1), view: []channel.Member{nth(1)}}
		for range 10 * maxInbox {
			m.id = channel.NewUniqueID()
			if err := e.ReceiveBody(nth(1), channel.SendAck, string(m.encode())); err != nil {
				t.Fatal(err)
			}
		}
		x.mu.Lock()
		waiting := len(x.inbox)
		x.mu.Unlock()
		if waiting > maxInbox {
			t.Errorf("%d messages wait", waiting)
		}
	})
}

func TestConfig(t *testing.T) {
	var errs interface{ Unwrap() []error }
	if err := (&Config{Timeout: -1, MaxTimeout: -2}).Validate(); !errors.As(err, &errs) || len(errs.Unwrap()) != 4 {
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
	if d := x.Descriptor(); !slices.Contains(d.Above, "failuredetector") {
		t.Error("it has to stand above the failure detector")
	}
}

func BenchmarkReceive(b *testing.B) {
	x, err := New(Defaults, channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Discard: true})
	b.ReportAllocs()
	m := channel.Message{From: channeltest.Member(1), Options: channel.SendNone, Body: make([]byte, 1024)}
	for b.Loop() {
		if err := e.Receive(context.Background(), &m); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkElection(b *testing.B) {
	others := make([]channel.Member, 9)
	for i := range others {
		others[i] = nth(i + 2)
	}
	now := time.Unix(1e9, 0)
	b.ReportAllocs()
	for b.Loop() {
		e := newElection(Defaults, func(string) {})
		e.setMembers(nth(1), others, now)
		outs := e.start(now)
		m, err := decode(outs[0].m.encode())
		if err != nil {
			b.Fatal(err)
		}
		if e.receive(nth(10), m, now); !e.settled() {
			b.Fatal("no view")
		}
	}
}
