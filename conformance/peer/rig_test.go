package peer_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/rpc"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/udp"
	"github.com/longhouse-go/longhouse/conformance/peer"
	"github.com/longhouse-go/longhouse/interceptors"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
)

// patience bounds every wait for something that must come: a machine may be
// slow, and a JVM slower.
var patience = 60 * time.Second

func init() {
	flag.DurationVar(&patience, "patience", patience, "how long to wait for what must come")
}

func TestMain(m *testing.M) {
	code := m.Run()
	if programDir != "" {
		_ = os.RemoveAll(programDir)
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

var programDir string

var program = sync.OnceValues(func() (*peer.Program, error) {
	tools, err := peer.Find()
	if err != nil {
		return nil, err
	}
	if programDir, err = os.MkdirTemp("", "peer-"); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	return peer.Build(ctx, tools, programDir)
})

// compiled returns the compiled driver. Without Java the test is skipped,
// except where a run without peers must not pass for one.
func compiled(t *testing.T) *peer.Program {
	t.Helper()
	if testing.Short() {
		t.Skip("starts virtual machines: not with -short")
	}
	p, err := program()
	if errors.Is(err, peer.ErrMissing) && os.Getenv("LONGHOUSE_CI") == "" {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// within returns a context with the patience of these tests.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return ctx
}

func startJVM(t *testing.T, flags ...string) *peer.JVM {
	t.Helper()
	j, err := compiled(t).Start(within(t), peer.JVMConfig{Flags: flags})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.Stop)
	return j
}

// group is one group of nodes, on this machine only.
type group struct {
	t       *testing.T
	jvm     *peer.JVM
	address string
	port    int
	nodes   int
	// frequency and drop are those of the memberships.
	frequency, drop time.Duration
}

func newGroup(t *testing.T, j *peer.JVM) *group {
	t.Helper()
	return &group{
		t: t, jvm: j,
		address:   fmt.Sprintf("239.255.%d.%d", rand.IntN(256), 1+rand.IntN(254)),
		port:      channeltest.FreePort(t, "udp"),
		frequency: 100 * time.Millisecond,
		// A loaded machine must not lose members by itself.
		drop: 20 * time.Second,
	}
}

// tribes opens a Tribes node in the group. change may be nil.
func (g *group) tribes(change func(c *peer.Config)) *peer.Node {
	g.t.Helper()
	return g.tribesIn(g.jvm, change)
}

func (g *group) tribesIn(j *peer.JVM, change func(c *peer.Config)) *peer.Node {
	g.t.Helper()
	g.nodes++
	c := peer.Config{
		Name: fmt.Sprintf("%s-%d", g.t.Name(), g.nodes), Group: g.address, GroupPort: g.port,
		Frequency: g.frequency, DropTime: g.drop, Heartbeat: 300 * time.Millisecond,
	}
	if change != nil {
		change(&c)
	}
	given := c.Port
	for try := 0; ; try++ {
		if given == 0 {
			c.Port = channeltest.FreePort(g.t, "tcp")
		}
		n, err := j.Open(within(g.t), c)
		if err == nil {
			g.t.Cleanup(func() {
				// It may have been closed or killed by the test.
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				_ = n.Close(ctx)
			})
			return n
		}
		// Somebody else may have taken the port in between.
		if given != 0 || try == 3 || !strings.Contains(err.Error(), "in use") {
			g.t.Fatalf("open %v: %v", c.Stack, err)
		}
	}
}

// longhouse is one node of ours.
type longhouse struct {
	*channel.Channel
	t       *testing.T
	got     *channeltest.Recorder
	watched *channeltest.Recorder
	metrics *channel.Metrics
	logs    *observer.ObservedLogs
}

// nodeConfig is what may differ between our nodes.
type nodeConfig struct {
	name string
	// stack lists interceptors, top first: the name, and options as YAML
	// behind a space: "fragment {max_size: 1000}".
	stack []string
	// top stand above the stack, layers below it.
	top, layers []channel.Interceptor
	membership  func(s channel.Settings) (channel.Membership, error)
	local       channel.Member
	port        int
	reply       func(m *channel.Message) (bool, error)
	// listen registers listeners that are asked before the recorder.
	listen     func(ch *channel.Channel, s channel.Settings)
	ackTimeout time.Duration
	// datagrams: it has a port for datagrams, and sends to the group.
	datagrams bool
}

// longhouse starts one of our nodes in the group. change may be nil.
func (g *group) longhouse(change func(c *nodeConfig)) *longhouse {
	g.t.Helper()
	g.nodes++
	c := nodeConfig{
		name:  fmt.Sprintf("longhouse-%d", g.nodes),
		stack: []string{"dispatch", "failuredetector {connect_timeout: 10s, read_timeout: 10s}"},
		membership: func(s channel.Settings) (channel.Membership, error) {
			m := multicast.Default()
			m.Group, m.Port, m.Bind, m.Frequency, m.DropTime = g.address, g.port, "127.0.0.1", g.frequency, g.drop
			return multicast.New(m, s)
		},
	}
	if change != nil {
		change(&c)
	}
	network, err := stdnet.NewNet()
	if err != nil {
		g.t.Fatal(err)
	}
	core, logs := observer.New(zap.InfoLevel)
	n := &longhouse{
		t: g.t, got: &channeltest.Recorder{Reply: c.reply}, watched: new(channeltest.Recorder),
		metrics: channel.NewMetrics(), logs: logs,
	}
	s := channel.Settings{Name: c.name, Net: network, Logger: zap.New(core), Metrics: n.metrics}
	rc := tcp.DefaultReceiverConfig()
	rc.Port, rc.AutoBind = c.port, 1
	sc := tcp.DefaultSenderConfig()
	sc.AckTimeout, sc.ConnectTimeout = 20*time.Second, 20*time.Second
	if c.ackTimeout > 0 {
		sc.AckTimeout = c.ackTimeout
	}
	stack, err := channel.NewStack(layers(g.t, s, c)...)
	if err != nil {
		g.t.Fatal(err)
	}
	var membership channel.Membership
	if c.membership != nil {
		if membership, err = c.membership(s); err != nil {
			g.t.Fatal(err)
		}
	}
	var sender channel.Sender = tcp.NewSender(sc, s)
	var receiver channel.Receiver = tcp.NewReceiver(rc, s)
	if c.datagrams {
		uc := udp.DefaultConfig()
		uc.Port, uc.AutoBind, uc.AckTimeout = channeltest.FreePort(g.t, "udp"), 100, 20*time.Second
		uc.Multicast = channel.MulticastConfig{Group: netip.MustParseAddrPort(fmt.Sprintf("%s:%d", g.address, g.port)), Bind: netip.MustParseAddr("127.0.0.1")}
		around := udp.New(uc, s)
		sender, receiver = around.Sender(sender), around.Receiver(receiver)
	}
	n.Channel, err = channel.New(channel.Config{
		Local:        c.local,
		Announcement: channel.Announcement{Name: c.name, Pipelined: true},
		Stack:        stack,
		Sender:       sender,
		Receiver:     receiver,
		Membership:   membership,
		Tick:         100 * time.Millisecond,
	}, s)
	if err != nil {
		g.t.Fatal(err)
	}
	if c.listen != nil {
		c.listen(n.Channel, s)
	}
	n.Listen(n.got)
	n.Watch(n.watched.Watch)
	if err := n.Start(within(g.t)); err != nil {
		g.t.Fatal(err)
	}
	detach := rpc.Attach(n.Channel, s) // says at once which services it has not
	g.t.Cleanup(func() {
		detach()
		n.stop()
	})
	return n
}

// layers makes the interceptors of a node.
func layers(t *testing.T, s channel.Settings, c nodeConfig) []channel.Layer {
	t.Helper()
	known, err := channel.NewRegistry("interceptor", interceptors.Builtin()...)
	if err != nil {
		t.Fatal(err)
	}
	var out []channel.Layer
	for _, i := range c.top {
		out = append(out, channel.Layer{Interceptor: i})
	}
	for _, line := range c.stack {
		name, options, _ := strings.Cut(line, " ")
		f, err := known.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		i, err := f.New(func(into any) error {
			if options == "" {
				return nil
			}
			return yaml.UnmarshalWithOptions([]byte(options), into, yaml.Strict())
		}, s)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		out = append(out, channel.Layer{Interceptor: i})
	}
	for _, i := range c.layers {
		out = append(out, channel.Layer{Interceptor: i})
	}
	return out
}

func (n *longhouse) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		n.t.Errorf("stop: %v", err)
	}
}

func (n *longhouse) id() string { return n.Local().ID.String() }

// member returns the member of that id in our view.
func (n *longhouse) member(id string) channel.Member {
	n.t.Helper()
	for _, m := range n.View().Members {
		if m.ID.String() == id {
			return m
		}
	}
	n.t.Fatalf("%s is not in the view %v", id, n.View().Members)
	return channel.Member{}
}

// wait fails the test unless cond holds in time. It looks again whenever the
// recorder is told something.
func (n *longhouse) wait(r *channeltest.Recorder, what string, cond func() bool) {
	n.t.Helper()
	if !r.WaitFor(within(n.t), cond) {
		n.t.Fatalf("%s: not within %v; view %v, messages %d, log %v", what, patience, n.View().Members, len(n.got.Messages()), n.log())
	}
}

func (n *longhouse) log() []string {
	var out []string
	for _, e := range n.logs.All() {
		out = append(out, fmt.Sprint(e.Level, " ", e.Message, " ", e.ContextMap()))
	}
	return out
}

// sees waits until our view holds exactly these members.
func (n *longhouse) sees(ids ...string) {
	n.t.Helper()
	slices.Sort(ids)
	n.wait(n.watched, fmt.Sprintf("a view of %d members", len(ids)), func() bool {
		var have []string
		for _, m := range n.View().Members {
			have = append(have, m.ID.String())
		}
		slices.Sort(have)
		return slices.Equal(have, ids)
	})
}

// seen waits until a Tribes node's view holds exactly these members.
func seen(t *testing.T, n *peer.Node, ids ...string) {
	t.Helper()
	slices.Sort(ids)
	ctx := within(t)
	poll(t, n.JVM(), fmt.Sprintf("a view of %v at the Tribes node", ids), func() bool {
		members, err := n.Members(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var have []string
		for _, m := range members {
			have = append(have, m.ID)
		}
		slices.Sort(have)
		return slices.Equal(have, ids)
	})
}

// complaints returns what a JVM logged as warning or error.
func complaints(j *peer.JVM) string {
	var b strings.Builder
	for _, e := range j.Events() {
		if l := e.Values.Get("level"); e.Kind == "log" && (l == "WARNING" || l == "SEVERE") {
			trace, _, _ := strings.Cut(e.Values.Get("trace"), "\n\tat java")
			fmt.Fprintf(&b, "%s %s: %s %s\n", l, e.Values.Get("logger"), e.Values.Get("text"), trace)
		}
	}
	return b.String()
}

// together waits until all nodes see each other.
func together(t *testing.T, ours []*longhouse, theirs []*peer.Node) {
	t.Helper()
	var ids []string
	for _, n := range ours {
		ids = append(ids, n.id())
	}
	for _, n := range theirs {
		ids = append(ids, n.ID())
	}
	others := func(own string) []string {
		return slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return id == own })
	}
	for _, n := range ours {
		n.sees(others(n.id())...)
	}
	for _, n := range theirs {
		seen(t, n, others(n.ID())...)
	}
}

// viewChange is what a watcher was told.
type viewChange = channeltest.ViewChange

// poll waits until cond holds, looking again at every event of the JVM, and
// now and then.
func poll(t *testing.T, j *peer.JVM, what string, cond func() bool) {
	t.Helper()
	ctx := within(t)
	for !cond() {
		pause, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		had := len(j.Events())
		err := j.Wait(pause, func(evs []peer.Event) bool { return len(evs) != had })
		cancel()
		if ctx.Err() != nil || errors.Is(err, peer.ErrEnded) {
			t.Fatalf("%s: not within %v: %v; the log of the JVM:\n%s", what, patience, err, complaints(j))
		}
	}
}

// counter returns the sum of a metric over all labels.
func (n *longhouse) counter(name string) float64 { return channeltest.Sum(n.metrics, name) }
