package container

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/rpc"
	"github.com/longhouse-go/longhouse/channel/secure"
	"github.com/longhouse-go/longhouse/channel/staticservice"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/udp"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/events"
	"github.com/longhouse-go/longhouse/core/lock"
	"github.com/longhouse-go/longhouse/core/table"
)

// cluster is what joins the node to others.
type cluster struct {
	channel  *channel.Channel
	layers   []layer // of the channel's present stack; changed by reload only
	shared   *core.Cluster
	locks    *lock.Locker // of the contexts whose sessions are replicated
	events   *events.Relay
	sessions []*sessions
	deployer core.Deployer
}

// sessions is one session table with the manager that replicates it.
type sessions struct {
	name    string
	table   *table.Table
	manager core.Manager // nil for sessions that live on this node only
	host    *managerHost
	undo    []func()
	// announced: the outcome of the state transfer has been logged.
	announced atomic.Bool
}

func parseLevel(s string) (core.Level, error) {
	for _, l := range []core.Level{core.Async, core.Acked, core.Synced} {
		if s == l.String() {
			return l, nil
		}
	}
	return core.Async, fmt.Errorf("cluster.send: %q is none of async, ack, sync", s)
}

func pluginSpec(c config.Component, instance string) core.PluginSpec {
	return core.PluginSpec{Name: c.Use, Instance: instance, Mode: core.PluginMode(c.Mode), Options: c.YAML(), Origin: c.Pos.String()}
}

// hosting are the options of an interceptor plugin that are the host's and not
// the plugin's.
type hosting struct {
	OnDown      core.OnDown   `yaml:"on_down" validate:"oneof=fail wait bypass"`
	Window      int           `yaml:"window" validate:"min=0"`
	WindowBytes config.Bytes  `yaml:"window_bytes" validate:"min=0"`
	Timeout     time.Duration `yaml:"timeout" validate:"min=0"`
}

// layerSpec is the choice of an interceptor plugin.
func layerSpec(c config.Component) (core.PluginSpec, error) {
	ours, theirs := c.Split("on_down", "window", "window_bytes", "timeout")
	h := hosting{OnDown: core.Fail}
	if err := ours.Decode(&h); err != nil {
		return core.PluginSpec{}, err
	}
	spec := pluginSpec(theirs, c.Use)
	spec.OnDown, spec.Window, spec.WindowBytes, spec.Timeout = h.OnDown, h.Window, int(h.WindowBytes), h.Timeout
	return spec, nil
}

// newInterceptor makes one layer: of a factory or, if none has the name, of a
// plugin. host may be nil.
func newInterceptor(c config.Component, known *channel.Registry[channel.Interceptor], host core.PluginHost, s channel.Settings) (channel.Interceptor, error) {
	s.Name = c.Use
	s.Logger = s.Logger.Named(c.Use)
	if host != nil && !slices.Contains(known.Names(), c.Use) && slices.Contains(host.Names("interceptor"), c.Use) {
		spec, err := layerSpec(c)
		if err != nil {
			return nil, err
		}
		return host.Interceptor(spec, s)
	}
	f, err := known.Get(c.Use)
	if err != nil {
		return nil, err
	}
	return f.New(c.Decode, s)
}

// layer is one entry of the list with what was made of it.
type layer struct {
	channel.Layer
	// key is equal for components that behave the same: name, mode, options,
	// and the program that a plugin runs.
	key string
	// made: not taken from an earlier list.
	made bool
}

// versioner is a plugin host whose programs may be replaced while the node
// runs: Refresh reads again which ones are to be run, Revision tells them apart.
type versioner interface {
	Refresh(ctx context.Context) error
	Revision(kind, name string) string
}

// componentKey returns the key of a component. Secrets count with their value.
func componentKey(c config.Component, host core.PluginHost) string {
	key := c.Use + "\n" + c.Mode + "\n" + strings.ReplaceAll(string(c.YAML()), "\n ", "")
	if v, ok := host.(versioner); ok {
		key += "\n" + v.Revision("interceptor", c.Use)
	}
	return key
}

// buildLayers makes the layers in the order of the list; those that are in old
// unchanged are taken from there. Errors that belong to one place of the
// configuration are config.Problems.
func buildLayers(list []config.Component, old []layer, known *channel.Registry[channel.Interceptor], host core.PluginHost, s channel.Settings) ([]layer, error) {
	old = slices.Clone(old)
	layers := make([]layer, 0, len(list))
	var errs []error
	for _, c := range list {
		l := layer{Layer: channel.Layer{Origin: c.Pos.String()}, key: componentKey(c, host)}
		if i := slices.IndexFunc(old, func(o layer) bool { return o.key == l.key }); i >= 0 {
			l.Interceptor = old[i].Interceptor
			old = slices.Delete(old, i, i+1)
		} else if made, err := newInterceptor(c, known, host, s); err == nil {
			l.Interceptor, l.made = made, true
		} else {
			errs = append(errs, config.Problem{Pos: c.Pos, Severity: config.Error, What: err.Error()})
			continue
		}
		layers = append(layers, l)
	}
	return layers, errors.Join(errs...)
}

func stackOf(layers []layer) (*channel.Stack, error) {
	list := make([]channel.Layer, len(layers))
	for i, l := range layers {
		list[i] = l.Layer
	}
	return channel.NewStack(list...)
}

// buildStack makes a stack of nothing but new layers.
func buildStack(list []config.Component, known *channel.Registry[channel.Interceptor], host core.PluginHost, s channel.Settings) (*channel.Stack, error) {
	layers, err := buildLayers(list, nil, known, host, s)
	if err != nil {
		return nil, err
	}
	return stackOf(layers)
}

// newCluster builds channel, managers and deployer; nothing is started.
func (n *Node) newCluster() (*cluster, error) {
	cfg := n.cfg.Cluster
	settings, err := n.channelSettings()
	if err != nil {
		return nil, err
	}
	layers, err := buildLayers(cfg.Channel.Interceptors, nil, n.interceptors, n.plugins, settings)
	if err != nil {
		return nil, err
	}
	stack, err := stackOf(layers)
	if err != nil {
		return nil, err
	}
	membership, err := newMembership(cfg.Channel.Membership, n.plugins, n.settings("membership"))
	if err != nil {
		return nil, err
	}
	r, s := cfg.Channel.Receiver, cfg.Channel.Sender
	sender, receiver := tcp.DefaultSenderConfig(), tcp.DefaultReceiverConfig()
	sender.AckTimeout, sender.ConnectTimeout, sender.Retries, sender.Pool = s.AckTimeout, s.ConnectTimeout, *s.Retries, s.Pool
	sender.WindowMessages, sender.WindowBytes, sender.MaxFrame = s.WindowMessages, s.WindowBytes, r.MaxFrame
	receiver.Address, receiver.Port, receiver.AutoBind = r.Address, r.Port, r.AutoBind
	receiver.MaxFrame, receiver.MaxConnections, receiver.IdleTimeout = r.MaxFrame, r.MaxConnections, r.IdleTimeout
	receiver.WindowBytes = r.WindowBytes
	datagrams := datagramConfig(cfg.Channel)
	if err := errors.Join(sender.Validate(), receiver.Validate(), datagrams.Validate()); err != nil {
		return nil, fmt.Errorf("%s: cluster.channel: %w", cfg.Pos, err)
	}
	packets := udp.New(datagrams, settings)
	ch, err := channel.New(channel.Config{
		Local:        channel.Member{Domain: cfg.Channel.Domain},
		Announcement: channel.Announcement{Name: n.name, Pipelined: true, Version: n.parts.Version},
		Stack:        stack,
		Sender:       packets.Sender(tcp.NewSender(sender, settings)),
		Receiver:     packets.Receiver(tcp.NewReceiver(receiver, settings)),
		Membership:   membership,
	}, settings)
	if err != nil {
		return nil, err
	}
	c := &cluster{channel: ch, layers: layers, shared: core.NewCluster(ch, settings)}
	c.locks = lock.New(lock.Config{}, c.shared, n.settings("locks"))
	c.events = events.New(events.Config{}, c.shared, c.tableFor, n.settings("session.events"))
	if err := c.add(n, "default", cfg.Manager); err != nil {
		return nil, err
	}
	for _, h := range n.cfg.Engine.Hosts {
		for _, x := range h.Contexts {
			if x.Manager == nil || x.Distributable != nil && !*x.Distributable {
				continue
			}
			if err := c.add(n, core.ContextName(h.Name, strings.TrimSuffix(x.Path, "/")), *x.Manager); err != nil {
				return nil, err
			}
		}
	}
	if cfg.Deployer != nil {
		if c.deployer, err = n.plugins.Deployer(pluginSpec(*cfg.Deployer, "cluster"), n.settings("deployer")); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// inChannel is the membership that speaks over the node's own channel, and so
// cannot be a process of its own.
var inChannel = channel.FactoryOf("staticservice", staticservice.Default(), func(c staticservice.Config, s channel.Settings) (channel.Membership, error) {
	return staticservice.New(c, s)
})

// newMembership makes the membership of a configuration.
func newMembership(comp config.Component, host core.PluginHost, s channel.Settings) (channel.Membership, error) {
	if comp.Use != inChannel.Name {
		return host.Membership(pluginSpec(comp, "cluster"), s)
	}
	m, err := inChannel.New(comp.Decode, s)
	if err != nil {
		return nil, fmt.Errorf("%s: cluster.channel.membership: %w", comp.Pos, err)
	}
	return m, nil
}

// checkMembership checks a choice without making anything.
func checkMembership(comp config.Component, host core.PluginHost) error {
	if comp.Use == inChannel.Name {
		return inChannel.Check(comp.Decode)
	}
	return host.Check("membership", pluginSpec(comp, ""))
}

// channelSettings are the settings of everything that talks to other nodes over
// TCP. The network is the same in all of them.
func (n *Node) channelSettings() (channel.Settings, error) {
	s := n.settings("channel")
	t := n.cfg.Cluster.Channel.TLS
	if t == nil {
		return s, nil
	}
	if n.secured == nil {
		secured, err := secure.New(secure.Config{CA: t.CA, Certificate: t.Certificate, Key: t.Key, Names: t.Names}, s)
		if err != nil {
			return s, fmt.Errorf("%s: cluster.channel.tls: %w", t.Pos, err)
		}
		n.secured = secured
	}
	s.Net = n.secured
	return s, nil
}

// datagramConfig says which messages travel as datagrams.
func datagramConfig(c config.Channel) udp.Config {
	out := udp.DefaultConfig()
	out.Port, out.AutoBind = c.Receiver.UDPPort, c.Receiver.AutoBind
	out.AckTimeout, out.Retries = c.Sender.AckTimeout, *c.Sender.Retries
	if m := c.Multicast; m != nil {
		// A wrong address is the zero one, which the validation has refused.
		group, _ := netip.ParseAddr(m.Address)
		bind, _ := netip.ParseAddr(m.Bind)
		out.Multicast = channel.MulticastConfig{Group: netip.AddrPortFrom(group, uint16(m.Port)), Bind: bind, TTL: m.TTL}
	}
	return out
}

// add makes a manager and its table. Managers of the same name on all nodes
// belong together.
func (c *cluster) add(n *Node, name string, comp config.Component) error {
	m, err := n.plugins.Manager(pluginSpec(comp, name), n.settings("manager."+name))
	if err != nil {
		return err
	}
	s := &sessions{name: name, manager: m}
	s.host = &managerHost{cluster: c.shared, subject: "manager/" + name}
	tc := n.tableConfig(core.Forwarding(m, s.host.Send))
	tc.Relay = c.events
	s.table = table.New(tc, n.settings("sessions."+name))
	s.host.table = s.table
	c.sessions = append(c.sessions, s)
	return nil
}

// tableFor returns the table of a context: that of its own manager, or the
// cluster's.
func (c *cluster) tableFor(context string) *table.Table {
	for _, s := range c.sessions {
		if s.name == context {
			return s.table
		}
	}
	return c.sessions[0].table
}

// managerHost is the node as its manager sees it.
type managerHost struct {
	cluster *core.Cluster
	subject string
	table   *table.Table
}

func (h *managerHost) Send(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error {
	return h.cluster.Send(ctx, h.subject, to, o, body)
}
func (h *managerHost) Update(batch []byte)              { h.table.Update(batch) }
func (h *managerHost) Resync(ctx context.Context) error { return h.table.Resync(ctx) }

// start joins the group and starts the managers. What has been started is put
// on the node's list of things to stop, also if start fails half way.
func (c *cluster) start(ctx context.Context, n *Node) error {
	// Handlers first: a message may arrive as soon as the channel is up.
	for _, s := range c.sessions {
		unbind, err := c.shared.Bind(s.host.subject, func(ctx context.Context, m *channel.Message, body []byte) error {
			s.manager.HandleMessage(ctx, m.From, body, m.Defer())
			return nil
		})
		if err != nil {
			return err
		}
		s.undo = append(s.undo, unbind)
	}
	if _, err := c.shared.Bind(drainSubject, n.heardDrain); err != nil {
		return err
	}
	if err := c.locks.Start(ctx); err != nil {
		return err
	}
	// Who calls for a reply that nobody here gives learns that at once.
	detachRPC := rpc.Attach(c.channel, n.settings("rpc"))
	detachTomcat := core.AnswerTomcat(c.channel, n.settings("tomcat"))
	detach := func() { detachRPC(); detachTomcat() }
	if err := c.channel.Start(ctx); err != nil {
		detach()
		return errors.Join(err, c.locks.Stop(ctx))
	}
	n.onStop("channel", 5*time.Second, func(ctx context.Context) error {
		detach()
		return c.channel.Stop(ctx)
	})
	n.onStop("locks", 5*time.Second, c.locks.Stop)
	if err := c.events.Start(ctx); err != nil {
		return err
	}
	n.onStop("session events", 2*time.Second, c.events.Stop)
	local := c.channel.Local()
	for _, s := range c.sessions {
		if err := s.start(ctx, c, local); err != nil {
			return err
		}
		n.onStop("manager "+s.name, 5*time.Second, s.stop)
	}
	return nil
}

func (s *sessions) start(ctx context.Context, c *cluster, local channel.Member) error {
	if err := s.manager.Start(ctx, s.host); err != nil {
		return fmt.Errorf("container: manager %s: %w", s.name, err)
	}
	s.undo = append(s.undo, c.channel.Watch(func(v channel.View, _ channel.MemberEvent) {
		s.manager.HandleView(context.Background(), v)
	}))
	return s.table.Start(ctx, binary.BigEndian.Uint64(local.ID[:8]))
}

// stop hands what is pending to the manager and stops it.
func (s *sessions) stop(ctx context.Context) error {
	err := s.table.Stop(ctx)
	if s.manager != nil {
		err = errors.Join(err, s.manager.Stop(ctx))
	}
	for _, undo := range s.undo {
		undo()
	}
	s.undo = nil
	return err
}

// awaitReady waits until all managers have the state of the other nodes, says
// so once, and marks the node ready.
func (n *Node) awaitReady(ctx context.Context, wg *sync.WaitGroup) {
	wg.Go(func() {
		tick := time.NewTicker(readyPoll)
		defer tick.Stop()
		for {
			waiting := n.notReady(ctx)
			if len(waiting) == 0 {
				n.ready.Store(true)
				n.log.Info("ready", zap.Duration("after", time.Since(n.started)), zap.Int("members", n.memberCount()))
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
}

// readyPoll is how often managers are asked whether they are ready.
const readyPoll = 50 * time.Millisecond

// notReady says in words what the node is still waiting for.
func (n *Node) notReady(ctx context.Context) []string {
	var waiting []string
	if n.cluster == nil {
		return nil
	}
	select {
	case <-n.attributes.Ready():
	default:
		waiting = append(waiting, "context attributes: waiting for those of the other nodes")
	}
	for _, s := range n.cluster.sessions {
		if s.manager == nil {
			continue
		}
		ask, cancel := context.WithTimeout(ctx, time.Second)
		st, err := s.manager.Status(ask)
		cancel()
		switch {
		case err != nil:
			waiting = append(waiting, fmt.Sprintf("manager %s does not answer: %v", s.name, err))
		case !st.Ready:
			waiting = append(waiting, fmt.Sprintf("manager %s: %s", s.name, st.State))
		default:
			if st.Received > 0 && s.announced.CompareAndSwap(false, true) {
				n.log.Info("sessions received from other nodes", zap.String("manager", s.name), zap.Int("sessions", st.Received), zap.Duration("took", st.Transfer))
			}
		}
	}
	return waiting
}

// tableConfig returns the bounds of a session table: the widest that a context
// asks for.
func (n *Node) tableConfig(m core.Manager) table.Config {
	// An old id ends with its renewal: an attacker may have planted it.
	c := table.Config{Manager: m, Route: n.cfg.Engine.Route, RenewGrace: -1}
	for _, h := range n.cfg.Engine.Hosts {
		for _, x := range h.Contexts {
			c.MaxSize = max(c.MaxSize, x.Session.MaxSize)
			c.WarnSize = max(c.WarnSize, x.Session.WarnSize)
		}
	}
	return c
}
