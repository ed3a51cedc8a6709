// Package grouptest is whole channels on a simulated network: those whose
// membership is a book that the test keeps, so that who sees whom changes when
// the test says so, and those that find each other on the network.
//
// It imports channel, channel/channeltest, channel/membership, channel/tcp,
// channel/wire and testing; only tests import it.
package grouptest

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/pion/transport/v2"
	"github.com/pion/transport/v2/stdnet"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
)

// Book knows the nodes and who sees whom.
type Book struct {
	mu    sync.Mutex
	nodes []*Node
}

// Node is a channel in a Book.
type Node struct {
	*channel.Channel
	Metrics *channel.Metrics
	// Sim is its place on the simulated network; nil on the real one.
	Sim  *channeltest.SimNode
	book *Book
	// foreign shows no announcement to the others.
	foreign bool

	// Guarded by book.mu.
	sink  channel.MemberSink
	local channel.Member
	sees  map[channel.UniqueID]*Node
}

// Join starts a node on sim, which is seen by, and sees, all others at once.
func (b *Book) Join(t testing.TB, name string, sim *channeltest.SimNode) *Node {
	t.Helper()
	return b.join(t, channel.Announcement{Name: name, Pipelined: true}, sim, sim, sim.IP())
}

// JoinForeign is Join of a node that is not known as a Longhouse node.
func (b *Book) JoinForeign(t testing.TB, sim *channeltest.SimNode) *Node {
	t.Helper()
	return b.join(t, channel.Announcement{}, sim, sim, sim.IP())
}

// JoinReal starts a node on the loopback interface of this machine.
func (b *Book) JoinReal(t testing.TB, name string) *Node {
	t.Helper()
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	return b.join(t, channel.Announcement{Name: name, Pipelined: true}, n, nil, "127.0.0.1")
}

func (b *Book) join(t testing.TB, a channel.Announcement, net transport.Net, sim *channeltest.SimNode, address string) *Node {
	t.Helper()
	n := &Node{Metrics: channel.NewMetrics(), Sim: sim, foreign: a == (channel.Announcement{}), book: b, sees: map[channel.UniqueID]*Node{}}
	s := channel.Settings{Name: a.Name, Net: net, Metrics: n.Metrics}
	rc := tcp.DefaultReceiverConfig()
	rc.Address, rc.Port = address, 0
	if sim != nil {
		rc.Port = 4000
	}
	if n.foreign {
		rc.WindowBytes = 0 // it gives no credit, which a Tribes' node does not know
	}
	var err error
	n.Channel, err = channel.New(channel.Config{
		Announcement: a,
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(rc, s),
		Membership:   (*bookMembership)(n),
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	return n
}

// StopNode leaves the group and stops the channel.
func (n *Node) StopNode(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
}

// bookMembership is a Node as a channel.Membership.
type bookMembership Node

// Start implements channel.Membership.
func (m *bookMembership) Start(_ context.Context, local channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	n := (*Node)(m)
	b := n.book
	b.mu.Lock()
	if n.foreign {
		local.Payload = ""
	}
	n.local, n.sink = local, sink
	b.nodes = append(b.nodes, n)
	others := append([]*Node(nil), b.nodes...)
	b.mu.Unlock()
	for _, o := range others {
		if o != n {
			b.Show(n, o)
			b.Show(o, n)
		}
	}
	return nil
}

// Update implements channel.Membership.
func (m *bookMembership) Update(_ context.Context, local channel.Member) error {
	n := (*Node)(m)
	n.book.mu.Lock()
	if n.foreign {
		local.Payload = ""
	}
	n.local = local
	n.book.mu.Unlock()
	return nil
}

// Stop implements channel.Membership.
func (m *bookMembership) Stop(context.Context) error {
	n := (*Node)(m)
	n.book.remove(n, channel.MemberLeft)
	return nil
}

// remove takes n out and tells everybody.
func (b *Book) remove(n *Node, kind channel.MemberEventKind) {
	b.mu.Lock()
	for i, o := range b.nodes {
		if o == n {
			b.nodes = append(b.nodes[:i:i], b.nodes[i+1:]...)
			break
		}
	}
	var sinks []channel.MemberSink
	for _, o := range b.nodes {
		if o.sees[n.local.ID] != nil {
			delete(o.sees, n.local.ID)
			sinks = append(sinks, o.sink)
		}
	}
	b.mu.Unlock()
	for _, s := range sinks {
		s.Observe(channel.MemberEvent{Kind: kind, Member: n.local})
	}
}

// Crash kills the machine of n; the others notice at once.
func (b *Book) Crash(t testing.TB, n *Node) {
	t.Helper()
	n.Sim.Crash()
	b.remove(n, channel.MemberLost)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_ = n.Stop(ctx)
}

// Show lets n see o.
func (b *Book) Show(n, o *Node) { b.see(n, o, true) }

// Hide lets n lose o.
func (b *Book) Hide(n, o *Node) { b.see(n, o, false) }

func (b *Book) see(n, o *Node, show bool) {
	b.mu.Lock()
	ev := channel.MemberEvent{Kind: channel.MemberAdded, Member: o.local}
	has := n.sees[o.local.ID] != nil
	if show {
		n.sees[o.local.ID] = o
	} else {
		delete(n.sees, o.local.ID)
		ev.Kind = channel.MemberLost
	}
	sink := n.sink
	b.mu.Unlock()
	if sink != nil && has != show {
		sink.Observe(ev)
	}
}

// See lets n see a member that is in no Book: one of another process.
func (n *Node) See(m channel.Member) {
	n.book.mu.Lock()
	sink := n.sink
	n.book.mu.Unlock()
	sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: m})
}

// Split lets each group see only its own; nodes in no group see nobody.
func (b *Book) Split(groups ...[]*Node) {
	of := map[*Node]int{}
	for i, g := range groups {
		for _, n := range g {
			of[n] = i + 1
		}
	}
	b.mu.Lock()
	all := append([]*Node(nil), b.nodes...)
	b.mu.Unlock()
	for _, n := range all {
		for _, o := range all {
			if n != o {
				b.see(n, o, of[n] != 0 && of[n] == of[o])
			}
		}
	}
}

// Self returns n, for Partition.
func (n *Node) Self() *Node { return n }

// Partition splits the network and the views alike. The groups are of nodes, or of
// what a test makes of them by embedding.
func Partition[N interface{ Self() *Node }](nw *channeltest.SimNet, b *Book, groups ...[]N) {
	var ips [][]string
	var nodes [][]*Node
	for _, g := range groups {
		var at []string
		var in []*Node
		for _, n := range g {
			at, in = append(at, n.Self().Sim.IP()), append(in, n.Self())
		}
		ips, nodes = append(ips, at), append(nodes, in)
	}
	nw.Partition(ips...)
	b.Split(nodes...)
}

// Heal lets everybody see everybody.
func (b *Book) Heal() {
	b.mu.Lock()
	all := append([]*Node(nil), b.nodes...)
	b.mu.Unlock()
	b.Split(all)
}

// Nodes starts count nodes on a simulated network, named a, b, c and so on.
func Nodes(t testing.TB, nw *channeltest.SimNet, b *Book, count int) []*Node {
	t.Helper()
	var nodes []*Node
	for i, s := range nw.Nodes(count) {
		nodes = append(nodes, b.Join(t, fmt.Sprint(string(rune('a'+i))), s))
	}
	return nodes
}

// Count returns the sum of a counter over its labels, each "name=value" of want
// among them.
func (n *Node) Count(name string, want ...string) (sum float64) {
next:
	for _, s := range n.Metrics.Samples() {
		if s.Name != name {
			continue
		}
		for _, w := range want {
			found := false
			for i := 0; i+1 < len(s.Labels); i += 2 {
				found = found || s.Labels[i]+"="+s.Labels[i+1] == w
			}
			if !found {
				continue next
			}
		}
		sum += s.Value
	}
	return sum
}
