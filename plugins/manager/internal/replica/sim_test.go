package replica

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// sim is a group of nodes in one process: managers with hosts that deliver
// messages in order per link, after a delay, unless the link is cut.
type sim struct {
	t     *testing.T
	cfg   Config // of nodes that withTables makes
	delay time.Duration
	mu    sync.Mutex
	nodes []*node
	cut   func(from, to int) bool
	full  bool                                 // every Send fails because a queue is full
	drop  func(from, to int, body []byte) bool // loses a message, and the sender never knows
	sent  map[kind]int
	// frozen nodes take messages and do nothing with them until they go on.
	frozen map[int]chan struct{}
	wg     sync.WaitGroup
}

var errCut = errors.New("link is cut")

// node is a node of a sim, and the host of its manager.
type node struct {
	sim     *sim
	index   int
	member  channel.Member
	m       *Manager
	links   map[int]chan shipment
	mu      sync.Mutex
	updates map[session.Key]*session.Record
	live    []*session.Record // what Resync commits
	resyncs int
	version uint64
	table   *table.Table // if set, it gets Update and Resync
}

type shipment struct {
	body []byte
	done func(error)
}

func newSim(t *testing.T) *sim {
	return &sim{t: t, cfg: testConfig(), delay: time.Millisecond, sent: map[kind]int{}, frozen: map[int]chan struct{}{}, cut: func(int, int) bool { return false }}
}

func testConfig() Config {
	c := Defaults()
	c.SyncInterval = 0 // tests that want it say so
	return c
}

// add makes and starts a node, not yet in anybody's view.
func (s *sim) add(c Config) *node {
	s.mu.Lock()
	i := len(s.nodes)
	n := &node{sim: s, index: i, updates: map[session.Key]*session.Record{}, links: map[int]chan shipment{}}
	n.member.ID[0], n.member.ID[15] = byte(i+1), 1
	n.member.Alive = time.Hour - time.Duration(i)*time.Minute
	s.nodes = append(s.nodes, n)
	s.mu.Unlock()
	n.start(c)
	return n
}

func (n *node) start(c Config) {
	m, err := New("delta", c, channel.Settings{Metrics: channel.NewMetrics()})
	if err != nil {
		n.sim.t.Fatal(err)
	}
	n.sim.mu.Lock()
	restarted := n.m != nil
	n.m = m
	n.sim.mu.Unlock()
	if err := m.Start(context.Background(), n); err != nil {
		n.sim.t.Fatal(err)
	}
	if restarted { // what the plugin host asks for after a restart
		if err := n.Resync(context.Background()); err != nil {
			n.sim.t.Error("resync:", err)
		}
	}
}

// views tells every node who it sees: the nodes that it can reach.
func (s *sim) views(alive ...*node) {
	for _, n := range alive {
		var members []channel.Member
		for _, o := range alive {
			if o != n && !s.isCut(n.index, o.index) {
				members = append(members, o.member)
			}
		}
		n.version++
		n.m.HandleView(context.Background(), channel.NewView(n.version, n.member, members))
	}
}

func (s *sim) isCut(a, b int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cut(a, b)
}

func (s *sim) setCut(f func(a, b int) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut = f
}

func (s *sim) node(m channel.Member) *node {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.nodes {
		if n.member.Is(m) {
			return n
		}
	}
	return nil
}

// stop ends all managers and links.
func (s *sim) stop() {
	for _, n := range s.nodes {
		for range 2 {
			if err := n.m.Stop(context.Background()); err != nil {
				s.t.Error(err)
			}
		}
	}
	s.mu.Lock()
	for _, n := range s.nodes {
		for _, l := range n.links {
			close(l)
		}
		n.links = nil
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// freeze stops a node, as far as others can tell: what it is sent waits, and what
// it sends waits too.
func (s *sim) freeze(i int, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.frozen[i]; c != nil {
		close(c)
		delete(s.frozen, i)
	}
	if on {
		s.frozen[i] = make(chan struct{})
	}
}

// await waits until a node is not frozen.
func (s *sim) await(i int) {
	s.mu.Lock()
	c := s.frozen[i]
	s.mu.Unlock()
	if c != nil {
		<-c
	}
}

// link returns the queue to another node.
func (n *node) link(to *node) chan shipment {
	s := n.sim
	s.mu.Lock()
	defer s.mu.Unlock()
	l := n.links[to.index]
	if l == nil && n.links != nil {
		l = make(chan shipment, 1024)
		n.links[to.index] = l
		s.wg.Go(func() {
			for p := range l {
				if s.delay > 0 {
					time.Sleep(s.delay)
				}
				s.await(n.index)
				s.await(to.index)
				s.mu.Lock()
				m, cut := to.m, s.cut(n.index, to.index)
				s.mu.Unlock()
				if cut {
					p.done(errCut)
					continue
				}
				m.HandleMessage(context.Background(), n.member, p.body, p.done)
				for i := range p.body {
					p.body[i] = 0xAA // it was only ours until now
				}
			}
		})
	}
	return l
}

// Send implements core.ManagerHost.
func (n *node) Send(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error {
	s := n.sim
	s.mu.Lock()
	full := s.full
	s.mu.Unlock()
	if full {
		return channel.Failed(to, channel.ErrQueueFull)
	}
	faults := make([]error, len(to))
	var wg sync.WaitGroup
	for i, member := range to {
		peer := s.node(member)
		s.mu.Lock()
		s.sent[kind(body[1])]++
		lost := s.drop != nil && s.drop(n.index, peer.index, body)
		s.mu.Unlock()
		if lost {
			continue
		}
		if s.isCut(n.index, peer.index) {
			faults[i] = errCut
			continue
		}
		answer := make(chan error, 1)
		p := shipment{bytes.Clone(body), func(err error) { answer <- err }}
		l := n.link(peer)
		if l == nil {
			faults[i] = channel.ErrClosed
			continue
		}
		select {
		case l <- p:
		case <-ctx.Done():
			faults[i] = ctx.Err()
			continue
		}
		if !o.Has(channel.UseAck) {
			continue
		}
		wg.Go(func() {
			select {
			case err := <-answer:
				if err != nil && (o.Has(channel.SyncAck) || errors.Is(err, errCut)) {
					faults[i] = fmt.Errorf("%w: %w", channel.ErrNegativeAck, err)
				}
			case <-ctx.Done():
				faults[i] = ctx.Err()
			}
		})
	}
	wg.Wait()
	e := &channel.SendError{}
	for i, err := range faults {
		if err != nil {
			e.Faults = append(e.Faults, channel.Fault{Member: to[i], Err: err})
		}
	}
	if len(e.Faults) > 0 {
		return e
	}
	return nil
}

// Update implements core.ManagerHost.
func (n *node) Update(batch []byte) {
	if n.table != nil {
		n.table.Update(batch)
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	err := session.DecodeBatch(batch, func(r *session.Record) error {
		if old := n.updates[r.Key]; old != nil {
			old.Merge(r.Clone())
		} else {
			n.updates[r.Key] = r.Clone()
		}
		return nil
	})
	if err != nil {
		n.sim.t.Error("update:", err)
	}
}

func (n *node) update(k session.Key) *session.Record {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.updates[k]
}

// Resync implements core.ManagerHost.
func (n *node) Resync(ctx context.Context) error {
	if n.table != nil {
		return n.table.Resync(ctx)
	}
	n.mu.Lock()
	n.resyncs++
	batch := session.AppendBatch(nil, n.live...)
	n.mu.Unlock()
	return n.m.Commit(ctx, batch, core.Async)
}

func (n *node) commit(level core.Level, rs ...*session.Record) error {
	return n.m.Commit(context.Background(), session.AppendBatch(nil, rs...), level)
}

func (n *node) load(k session.Key) *session.Record {
	n.sim.t.Helper()
	r, err := n.m.Load(context.Background(), k)
	if err != nil {
		n.sim.t.Error(err)
	}
	return r
}

func (n *node) status() core.ManagerStatus {
	st, err := n.m.Status(context.Background())
	if err != nil {
		n.sim.t.Error(err)
	}
	return st
}

// fingerprint is everything that the node knows.
func (n *node) fingerprint() string {
	b, _ := n.m.appendDigests(nil, 0, shardCount, 1<<30, 0)
	var pairs []string
	for ; len(b) > 0; b = b[pairSize:] {
		pairs = append(pairs, string(b[:pairSize]))
	}
	slices.Sort(pairs)
	return fmt.Sprintf("%x", pairs)
}

func key(i int) session.Key {
	return session.Key{Context: "localhost/shop", ID: fmt.Sprintf("%032X", i)}
}

// whole is a new session, change a change of one.
func whole(i int, size int) *session.Record {
	now := time.Now().UnixMilli()
	return &session.Record{
		Key: key(i), Created: now, LastAccess: now, MaxInactive: 30 * time.Minute, MaxInactiveVersion: session.Version{Counter: 1, Node: 1},
		Attrs: map[string]session.Entry{"blob": {Value: bytes.Repeat([]byte{1}, size), Version: session.Version{Counter: 1, Node: 1}}},
	}
}

func change(i int, name, value string, counter, by uint64) *session.Record {
	return &session.Record{Key: key(i), LastAccess: time.Now().UnixMilli(), Attrs: map[string]session.Entry{
		name: {Value: []byte(value), Version: session.Version{Counter: counter, Node: by}},
	}}
}

func end(i int, kind session.EndKind) *session.Record {
	return &session.Record{Key: key(i), End: kind, EndTime: time.Now().UnixMilli()}
}

func value(r *session.Record, name string) string {
	if r == nil {
		return "<no session>"
	}
	return cmp.Or(string(r.Attrs[name].Value), "<not set>")
}

// A node dies at each step of its writes, that is before any message that it sends
// or gets: what was acknowledged before is on the others, which say the same.
func TestCrashAtEveryStep(t *testing.T) {
	for copies := range 3 {
		crashed := true
		steps := 0
		for step := 1; crashed; step++ {
			bubble(t, func(t *testing.T, s *sim) {
				s.cfg.SyncInterval = 5 * time.Second // finds what only one of them got
				placedSim(t, s, 3, copies)
				var messages int
				dead := func() bool { return messages >= step }
				s.setCut(func(from, to int) bool {
					if from != 0 && to != 0 {
						return false
					}
					messages++
					return dead()
				})
				acked := 0
				for n := 1; n <= 4; n++ {
					r := change(1, "n", fmt.Sprint(n), uint64(n), 1)
					if n == 1 {
						r = whole(1, 5)
						r.Attrs["n"] = session.Entry{Value: []byte("1"), Version: session.Version{Counter: 1, Node: 1}}
					}
					err := s.nodes[0].commit(core.Synced, r)
					s.mu.Lock()
					if crashed = dead(); !crashed {
						ok(t, err)
						acked = n
					}
					s.mu.Unlock()
					if crashed {
						break
					}
				}
				s.setCut(func(from, to int) bool { return from == 0 || to == 0 })
				s.views(s.nodes[1:]...)
				pause(time.Minute)
				var seen []string
				for _, n := range s.nodes[1:] {
					r := n.load(key(1))
					seen = append(seen, value(r, "n"))
					if r == nil && acked == 0 {
						continue
					}
					if got, err := strconv.Atoi(value(r, "n")); err != nil || got < acked || got > acked+1 {
						t.Errorf("copies %d, crash at step %d: %d was acknowledged, node %d has %s", copies, step, acked, n.index, value(r, "n"))
					}
				}
				if seen[0] != seen[1] {
					t.Errorf("copies %d, crash at step %d: the others have %v", copies, step, seen)
				}
				steps++
			})
		}
		if steps < 5 {
			t.Errorf("copies %d: only %d steps", copies, steps)
		}
		t.Logf("copies %d: %d steps", copies, steps)
	}
}
