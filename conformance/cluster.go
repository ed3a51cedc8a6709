package conformance

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/events"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// Parts says what the nodes of a simulated cluster are made of. Each function is
// called once per node.
type Parts struct {
	Layers     func(channel.Settings) ([]channel.Layer, error)
	Membership func(channel.Settings) (channel.Membership, error)
	Manager    func(channel.Settings) (core.Manager, error)
	// Stagger delays the start of each node after the one before, so that
	// traces repeat. Default 7 ms.
	Stagger time.Duration
}

// nodeID returns the id of a node: it follows from the network's seed, if that is
// not 0.
func nodeID(nw *channeltest.SimNet, number int) (id channel.UniqueID) {
	if nw.Seed() == 0 {
		return channel.NewUniqueID()
	}
	rnd := rand.New(rand.NewPCG(nw.Seed(), uint64(number)))
	binary.BigEndian.PutUint64(id[:8], rnd.Uint64())
	binary.BigEndian.PutUint64(id[8:], rnd.Uint64())
	return id
}

// Cluster is a group of simulated nodes. Make and use it inside the bubble of
// [channeltest.Run].
type Cluster struct {
	tb    testing.TB
	Net   *channeltest.SimNet
	Nodes []*Node
}

// Node is one simulated node, with everything below HTTP.
type Node struct {
	Name    string
	IP      string
	Channel *channel.Channel
	Manager core.Manager
	Table   *table.Table
	Metrics *channel.Metrics
	// Shared is the channel, shared by subject.
	Shared *core.Cluster
	// Events carries what happens in the table to listeners on other nodes.
	Events *events.Relay

	undo []func()
}

const subject = "manager/default"

// NewCluster starts size nodes at 10.0.0.1 and up. They are stopped at the end
// of the test.
func NewCluster(tb testing.TB, nw *channeltest.SimNet, size int, p Parts) *Cluster {
	tb.Helper()
	if p.Stagger == 0 {
		p.Stagger = 7 * time.Millisecond
	}
	c := &Cluster{tb: tb, Net: nw}
	for i := range size {
		n, err := newNode(tb, nw, i+1, p)
		if err == nil {
			err = n.start(tb.Context())
		}
		if err != nil {
			tb.Fatalf("node %d: %v", i+1, err)
		}
		c.Nodes = append(c.Nodes, n)
		time.Sleep(p.Stagger)
	}
	return c
}

func newNode(tb testing.TB, nw *channeltest.SimNet, number int, p Parts) (*Node, error) {
	name, ip := "n"+strconv.Itoa(number), "10.0.0."+strconv.Itoa(number)
	n := &Node{Name: name, IP: ip, Metrics: channel.NewMetrics()}
	s := channel.Settings{
		Name: name, Net: nw.Node(ip), Metrics: n.Metrics,
		Logger: zaptest.NewLogger(tb, zaptest.Level(zap.WarnLevel)).Named(name),
	}
	layers, err := p.Layers(s)
	if err != nil {
		return nil, err
	}
	stack, err := channel.NewStack(layers...)
	if err != nil {
		return nil, err
	}
	membership, err := p.Membership(s)
	if err != nil {
		return nil, err
	}
	if n.Manager, err = p.Manager(s); err != nil {
		return nil, err
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = ip
	n.Channel, err = channel.New(channel.Config{
		Local:        channel.Member{ID: nodeID(nw, number)},
		Announcement: channel.Announcement{Name: name, Pipelined: true},
		Stack:        stack,
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(rc, s),
		Membership:   membership,
	}, s)
	if err != nil {
		return nil, err
	}
	n.Shared = core.NewCluster(n.Channel, channel.Settings{Metrics: n.Metrics})
	n.Events = events.New(events.Config{}, n.Shared, func(string) *table.Table { return n.Table }, s)
	n.Table = table.New(table.Config{Manager: core.Forwarding(n.Manager, simHost{n: n}.Send), Relay: n.Events}, s)
	return n, nil
}

// simHost is the node as its manager sees it.
type simHost struct {
	*table.Table
	n *Node
}

func (h simHost) Send(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error {
	return h.n.Shared.Send(ctx, subject, to, o, body)
}

func (n *Node) start(ctx context.Context) error {
	unbind, err := n.Shared.Bind(subject, func(ctx context.Context, m *channel.Message, body []byte) error {
		n.Manager.HandleMessage(ctx, m.From, body, m.Defer())
		return nil
	})
	if err != nil {
		return err
	}
	n.undo = append(n.undo, unbind, n.Shared.Close)
	if err := n.Events.Start(ctx); err != nil {
		return err
	}
	if err := n.Channel.Start(ctx); err != nil {
		return err
	}
	if err := n.Manager.Start(ctx, simHost{n.Table, n}); err != nil {
		return errors.Join(err, n.Channel.Stop(ctx))
	}
	n.undo = append(n.undo, n.Channel.Watch(func(v channel.View, _ channel.MemberEvent) {
		n.Manager.HandleView(context.Background(), v)
	}))
	local := n.Channel.Local()
	return n.Table.Start(ctx, binary.BigEndian.Uint64(local.ID[:8]))
}

// Stop stops all nodes in an orderly way. Call it before the bubble ends.
func (c *Cluster) Stop() {
	c.tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, n := range c.Nodes {
		if err := n.Stop(ctx); err != nil {
			c.tb.Errorf("stop %s: %v", n.Name, err)
		}
	}
}

// Stop stops one node: in an orderly way, unless its network is gone.
func (n *Node) Stop(ctx context.Context) error {
	err := errors.Join(n.Table.Stop(ctx), n.Manager.Stop(ctx), n.Events.Stop(ctx), n.Channel.Stop(ctx))
	for _, undo := range n.undo {
		undo()
	}
	return err
}

// Await waits in virtual time until check returns nil, and fails the test with
// its last error after the time. It returns how long it took.
func (c *Cluster) Await(within time.Duration, check func() error) time.Duration {
	c.tb.Helper()
	start := time.Now()
	for {
		err := check()
		if err == nil {
			return time.Since(start)
		}
		if time.Since(start) > within {
			c.tb.Fatalf("not within %v: %v", within, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// ViewsEqual is the invariant that every one of the nodes sees all others of
// them, and nobody else.
func ViewsEqual(nodes ...*Node) func() error {
	return func() error {
		var want []string
		for _, n := range nodes {
			want = append(want, n.Channel.Local().ID.String())
		}
		slices.Sort(want)
		for _, n := range nodes {
			v := n.Channel.View()
			got := []string{v.Local.ID.String()}
			for _, m := range v.Members {
				got = append(got, m.ID.String())
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				return fmt.Errorf("%s sees %d nodes, want %d: %v", n.Name, len(got), len(want), v.Members)
			}
		}
		return nil
	}
}

// Ready is the invariant that all managers have had the state of the others.
func Ready(nodes ...*Node) func() error {
	return func() error {
		for _, n := range nodes {
			st, err := n.Manager.Status(context.Background())
			if err != nil || !st.Ready {
				return fmt.Errorf("%s is not ready: %s %v", n.Name, st.State, err)
			}
		}
		return nil
	}
}

// SameSessions is the invariant that all managers hold the same living sessions
// with the same attributes, for the given keys.
func SameSessions(keys []session.Key, nodes ...*Node) func() error {
	return func() error {
		for _, k := range keys {
			var first string
			for i, n := range nodes {
				r, err := n.Manager.Load(context.Background(), k)
				if err != nil {
					return fmt.Errorf("%s: load %s: %w", n.Name, k.ID, err)
				}
				d := describe(r)
				if i == 0 {
					first = d
				} else if d != first {
					return fmt.Errorf("session %s: %s has %s, %s has %s", k.ID, nodes[0].Name, first, n.Name, d)
				}
			}
		}
		return nil
	}
}

// describe writes down what a record means, without access times: these may lag.
func describe(r *session.Record) string {
	if r == nil || r.End != session.Living {
		return "nothing"
	}
	names := make([]string, 0, len(r.Attrs))
	for name, a := range r.Attrs {
		if !a.Deleted {
			names = append(names, fmt.Sprintf("%s=%x@%d/%x", name, a.Value, a.Version.Counter, a.Version.Node))
		}
	}
	slices.Sort(names)
	return fmt.Sprint(names)
}
