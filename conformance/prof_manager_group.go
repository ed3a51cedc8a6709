package conformance

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
	"github.com/longhouse-go/longhouse/plugins"
)

// ManagerSubject is a session manager in all its forms.
type ManagerSubject interface {
	Subject
	// Manager makes an instance that runs where t.Mode says; what it needs
	// beside the instance ends with t.
	Manager(t *T, instance string, s channel.Settings) (core.Manager, error)
}

// The features of managers.
const (
	// FeatureStateTransfer: a node that joins gets the sessions that exist.
	FeatureStateTransfer = "state-transfer"
	// FeatureDelta: changes of single attributes are merged.
	FeatureDelta = "delta"
	// FeatureIDChange: the id of a session can be changed.
	FeatureIDChange = "id-change"
)

type manager struct {
	factory core.ManagerFactory
	options string
	desc    Description
}

// Manager is the subject of a manager's constructor, with the configuration to
// try and the features it has.
func Manager[C any, M core.Manager](name string, newFn func(C, channel.Settings) (M, error), cfg C, features ...string) Subject {
	f := channel.FactoryOf(name, cfg, func(c C, s channel.Settings) (core.Manager, error) { return newFn(c, s) })
	return managerOf(f, "", configJSON(cfg), features)
}

// ManagerOf is the subject of a factory, with options as YAML.
func ManagerOf(f core.ManagerFactory, options string, features ...string) Subject {
	return managerOf(f, options, nil, features)
}

func managerOf(f core.ManagerFactory, options string, details json.RawMessage, features []string) Subject {
	return &manager{f, options, Description{
		Kind: ProfileManager, Name: f.Name, Modes: []core.PluginMode{core.Direct, core.Bridged}, Features: features, Details: details,
	}}
}

// Describe implements Subject.
func (m *manager) Describe() (Description, error) { return m.desc, nil }

// Manager implements ManagerSubject.
func (m *manager) Manager(t *T, instance string, s channel.Settings) (core.Manager, error) {
	h := t.pluginHost(plugins.Config{Managers: []core.ManagerFactory{m.factory}})
	return h.Manager(core.PluginSpec{Name: m.factory.Name, Instance: instance, Mode: t.Mode, Options: []byte(m.options), Origin: "options"}, s)
}

// pluginHost returns a host that ends with the check.
func (t *T) pluginHost(c plugins.Config) *plugins.Host {
	t.Helper()
	h, err := plugins.NewHost(c, channel.Settings{Logger: zap.NewNop()})
	if err != nil {
		t.Fatalf("plugin host: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), t.Timeouts.Stop)
		defer cancel()
		if err := h.Stop(ctx); err != nil {
			t.Errorf("stop of the plugin host: %v", err)
		}
	})
	return h
}

const (
	// hop is how long a message of a group is on its way; blind how long a
	// sender waits for a member it is cut off from.
	hop   = 2 * time.Millisecond
	blind = 20 * time.Millisecond
	// linkQueue bounds the messages on their way from one member to another.
	linkQueue = 4096
	// sessionContext is the context of all sessions of a group.
	sessionContext = "localhost/"
)

// group is several nodes with a session table and an instance of the subject
// each, joined by messages that keep the order of each sender. The views of the
// nodes are what the check says. It works in virtual and in real time.
type group struct {
	t     *T
	tasks sync.WaitGroup // links
	once  sync.Once      // stop

	mu    sync.Mutex
	nodes []*member                // written by the check's goroutine under mu
	cut   map[[2]*member]bool      // guarded by mu
	links map[[2]*member]chan post // guarded by mu
	end   chan struct{}
}

type member struct {
	g       *group
	name    string
	member  channel.Member
	manager core.Manager
	table   *table.Table
	metrics *channel.Metrics
	version uint64
	dead    bool // only the check's goroutine looks at it
}

// post is a message on its way.
type post struct {
	body  []byte
	taken chan struct{}
	done  func(error)
}

// group starts nodes that see each other.
func (t *T) group(size int) *group {
	t.Helper()
	g := &group{t: t, cut: map[[2]*member]bool{}, links: map[[2]*member]chan post{}, end: make(chan struct{})}
	for range size {
		g.add()
	}
	g.views(g.nodes)
	g.ready(g.nodes...)
	return g
}

// inGroup runs f in virtual time, or in real time for a process.
func (t *T) inGroup(size int, f func(t *T, g *group)) {
	t.Helper()
	if t.Mode == core.Process {
		f(t, t.group(size))
		return
	}
	t.Bubble(func(t *T) { f(t, t.group(size)) })
}

// span is a time that only real time makes expensive.
func (t *T) span(virtual, real time.Duration) time.Duration {
	if t.Mode == core.Process {
		return real
	}
	return virtual
}

// add starts another node, which sees nobody yet.
func (g *group) add() *member {
	g.t.Helper()
	subject, ok := g.t.Subject.(ManagerSubject)
	if !ok {
		g.t.Fatalf("a %T is no manager", g.t.Subject)
	}
	n := &member{g: g, name: fmt.Sprintf("n%d", len(g.nodes)+1), member: channeltest.Member(len(g.nodes) + 1), metrics: channel.NewMetrics()}
	s := channel.Settings{Name: n.name, Logger: zap.NewNop(), Metrics: n.metrics, WorkDir: g.t.TempDir()}
	var err error
	if n.manager, err = subject.Manager(g.t, n.name, s); err != nil {
		g.t.Fatalf("make the subject: %v", err)
	}
	// Before whatever the subject is made of ends.
	g.t.Cleanup(func() { g.once.Do(g.stop) })
	n.table = table.New(table.Config{Manager: core.Forwarding(n.manager, memberHost{n: n}.Send)}, s)
	g.mu.Lock()
	g.nodes = append(g.nodes, n)
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), g.t.Timeouts.Start)
	defer cancel()
	if err = n.manager.Start(ctx, memberHost{n.table, n}); err != nil {
		g.t.Fatalf("start of the subject: %v", err)
	}
	if err := n.table.Start(ctx, binary.BigEndian.Uint64(n.member.ID[:8])); err != nil {
		g.t.Fatalf("start of the session table: %v", err)
	}
	return n
}

// views tells the members of each part that they see each other, and nobody
// else.
func (g *group) views(parts ...[]*member) {
	for _, part := range parts {
		for _, n := range part {
			n.version++
			v := channel.View{Version: n.version, Local: n.member}
			for _, other := range part {
				if other != n {
					v.Members = append(v.Members, other.member)
				}
			}
			n.manager.HandleView(g.t.Context(), v)
		}
	}
}

// split cuts the group into parts and tells them.
func (g *group) split(parts ...[]*member) {
	g.mu.Lock()
	for i, a := range parts {
		for j, b := range parts {
			for _, from := range a {
				for _, to := range b {
					g.cut[[2]*member{from, to}] = i != j
				}
			}
		}
	}
	g.mu.Unlock()
	g.views(parts...)
}

// kill makes a node vanish without a word.
func (g *group) kill(n *member) {
	n.dead = true
	g.split([]*member{n}, g.alive())
}

func (g *group) alive() []*member {
	return slices.DeleteFunc(slices.Clone(g.nodes), func(n *member) bool { return n.dead })
}

// ready waits until the managers have the state of the others.
func (g *group) ready(nodes ...*member) {
	g.t.Helper()
	g.t.Eventually(g.t.span(2*time.Minute, 4*g.t.Timeouts.Event), func() error {
		for _, n := range nodes {
			st, err := n.manager.Status(g.t.Context())
			if err != nil || !st.Ready {
				return fmt.Errorf("%s is not ready: %s %v", n.name, st.State, err)
			}
		}
		return nil
	})
}

// stop takes the nodes out one after the other, as members that leave.
func (g *group) stop() {
	for _, n := range g.nodes {
		ctx, cancel := context.WithTimeout(context.Background(), g.t.Timeouts.Stop)
		flush := ctx
		if n.dead {
			var now context.CancelFunc
			flush, now = context.WithCancel(ctx)
			now()
		}
		if err := n.table.Stop(flush); err != nil && !n.dead {
			g.t.Errorf("stop of the session table of %s: %v", n.name, err)
		}
		if !n.dead {
			g.kill(n)
		}
		if err := n.manager.Stop(ctx); err != nil {
			g.t.Errorf("stop of the subject on %s: %v", n.name, err)
		}
		cancel()
	}
	close(g.end)
	g.tasks.Wait()
}

// memberHost is the node as its manager sees it.
type memberHost struct {
	*table.Table
	n *member
}

// Send implements core.ManagerHost.
func (h memberHost) Send(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error {
	var (
		all    sync.WaitGroup
		mu     sync.Mutex
		faults []channel.Fault
	)
	body = slices.Clone(body)
	for _, m := range to {
		all.Go(func() {
			if err := h.n.g.send(ctx, h.n, m, o, body); err != nil {
				mu.Lock()
				defer mu.Unlock()
				faults = append(faults, channel.Fault{Member: m, Err: err})
			}
		})
	}
	all.Wait()
	if len(faults) > 0 {
		return &channel.SendError{Faults: faults}
	}
	return nil
}

var errGroupEnd = errors.New("conformance: the group has ended")

func (g *group) send(ctx context.Context, from *member, m channel.Member, o channel.Options, body []byte) error {
	g.mu.Lock()
	i := slices.IndexFunc(g.nodes, func(n *member) bool { return n.member.ID == m.ID })
	if i < 0 {
		g.mu.Unlock()
		return channel.ErrNotConfigured
	}
	link := [2]*member{from, g.nodes[i]}
	cut, queue := g.cut[link], g.links[link]
	if queue == nil {
		queue = make(chan post, linkQueue)
		g.links[link] = queue
		g.tasks.Go(func() { g.carry(link, queue) })
	}
	g.mu.Unlock()
	if cut {
		if !o.Has(channel.UseAck) {
			return nil // it is lost on the way
		}
		select {
		case <-time.After(blind):
			return channel.ErrAckTimeout
		case <-ctx.Done():
			return ctx.Err()
		case <-g.end:
			return errGroupEnd
		}
	}
	done := make(chan error, 1)
	p := post{body: body, taken: make(chan struct{}), done: func(err error) {
		select {
		case done <- err:
		default:
			g.t.Errorf("the completion of a message was called twice")
		}
	}}
	select {
	case queue <- p:
	case <-ctx.Done():
		return ctx.Err()
	case <-g.end:
		return errGroupEnd
	}
	taken := p.taken
	switch {
	case !o.Has(channel.UseAck):
		return nil
	case o.Has(channel.SyncAck):
		taken = nil
	}
	select {
	case <-taken:
		return nil
	case err := <-done:
		if err != nil {
			return fmt.Errorf("%w: %w", channel.ErrNegativeAck, err)
		}
		return nil
	case <-time.After(g.t.Timeouts.Call):
		return channel.ErrAckTimeout
	case <-ctx.Done():
		return ctx.Err()
	case <-g.end:
		return errGroupEnd
	}
}

// carry delivers the messages of one link in order.
func (g *group) carry(link [2]*member, queue <-chan post) {
	for {
		select {
		case p := <-queue:
			time.Sleep(hop)
			g.mu.Lock()
			cut := g.cut[link]
			g.mu.Unlock()
			if cut {
				continue // the sender runs into its time-out
			}
			close(p.taken)
			link[1].manager.HandleMessage(context.Background(), link[0].member, p.body, p.done)
		case <-g.end:
			return
		}
	}
}

// create makes a session and returns its key.
func (n *member) create(maxInactive time.Duration) session.Key {
	n.g.t.Helper()
	h, err := n.table.Create(n.g.t.Context(), sessionContext, session.NewOptions{MaxInactive: maxInactive})
	if err != nil {
		n.g.t.Fatalf("%s: create: %v", n.name, err)
	}
	defer h.Release()
	if err := h.Commit(n.g.t.Context(), core.Synced); err != nil {
		n.g.t.Fatalf("%s: commit of a new session: %v", n.name, err)
	}
	return h.Key()
}

// with runs one request on a session; f is not called and false returned if
// there is no such session.
func (n *member) with(k session.Key, level core.Level, f func(h core.Handle) error) bool {
	n.g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), n.g.t.span(time.Minute, 2*n.g.t.Timeouts.Call))
	defer cancel()
	h, err := n.table.Find(ctx, k)
	if err != nil {
		n.g.t.Errorf("%s: find: %v", n.name, err)
		return false
	}
	if h == nil {
		return false
	}
	defer h.Release()
	if err := f(h); err != nil {
		n.g.t.Errorf("%s: %v", n.name, err)
		return true
	}
	if err := h.Commit(ctx, level); err != nil {
		n.g.t.Errorf("%s: commit: %v", n.name, err)
	}
	return true
}

// set changes an attribute, at level synced.
func (n *member) set(k session.Key, name, value string) {
	n.g.t.Helper()
	if !n.with(k, core.Synced, func(h core.Handle) error { return h.Set(name, value) }) {
		n.g.t.Errorf("%s has lost the session of %q", n.name, name)
	}
}

// content is what a node knows of a session: its attributes, or "none".
func (n *member) content(k session.Key) string {
	n.g.t.Helper()
	text := ""
	found := n.with(k, core.Async, func(h core.Handle) error {
		for _, name := range h.Names() {
			var v string
			if _, err := h.Get(name, &v); err != nil {
				return fmt.Errorf("get %s: %w", name, err)
			}
			text += fmt.Sprintf("%s=%s ", name, v)
		}
		return nil
	})
	if !found {
		return "none"
	}
	return text
}

// expect fails the check if a node knows something else.
func (n *member) expect(k session.Key, when, want string) {
	n.g.t.Helper()
	if got := n.content(k); got != want {
		n.g.t.Errorf("%s: %s has %q, want %q", when, n.name, got, want)
	}
}
