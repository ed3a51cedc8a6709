package container

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
)

// Check finds what is wrong with a configuration that only the parts can tell:
// unknown components, wrong options, a stack whose order breaks a rule. It
// starts nothing. cfg must be normalized.
func Check(ctx context.Context, cfg *config.Config, parts Parts) []config.Problem {
	c := checker{parts: parts}
	var err error
	if c.settings, err = idleSettings(parts); err != nil {
		c.note(config.Pos{}, "", err)
		return c.problems
	}
	inter, err := channel.NewRegistry("interceptor", parts.Interceptors...)
	c.note(config.Pos{}, "", err)
	valves, err := channel.NewRegistry("valve", parts.Valves...)
	c.note(config.Pos{}, "", err)
	for place, list := range valveLists(cfg) {
		for i, v := range list {
			f, err := valves.Get(v.Use)
			if err == nil {
				err = f.Check(v.Decode)
			}
			c.note(v.Pos, fmt.Sprintf("%s[%d]", place, i), err)
		}
	}
	apps := make([]string, len(parts.Apps))
	for i, a := range parts.Apps {
		apps[i] = a.Name
	}
	for i, h := range cfg.Engine.Hosts {
		for _, x := range withApps(parts.Apps, h, isDefaultHost(cfg, i)) {
			switch {
			case x.App != "" && findApp(parts.Apps, x.App) == nil:
				c.note(x.Pos, "", fmt.Errorf("application %q is not compiled in (known: %s)", x.App, strings.Join(apps, ", ")))
			case x.App == "" && x.Dir == "":
				c.note(x.Pos, "", fmt.Errorf("context %q: %w", x.Path, errNoApp))
			}
		}
	}
	if cfg.Cluster != nil {
		c.cluster(ctx, cfg.Cluster, inter)
	}
	return c.problems
}

// idleSettings are for components that are made to be looked at, not started.
func idleSettings(parts Parts) (channel.Settings, error) {
	net, err := newNet(parts)
	return channel.Settings{Name: "check", Logger: zap.NewNop(), Net: net}, err
}

// idleHost makes a plugin host for plugins that are only looked at.
func idleHost(parts Parts, s channel.Settings) (core.PluginHost, error) {
	if parts.Plugins == nil {
		return nil, errNoPlugins
	}
	host, err := parts.Plugins(s)
	if err != nil {
		return nil, err // without the host, which may be a nil pointer
	}
	return host, nil
}

type checker struct {
	parts    Parts
	settings channel.Settings
	problems []config.Problem
}

func (c *checker) note(pos config.Pos, path string, err error) {
	if err == nil {
		return
	}
	var p config.Problem
	if errors.As(err, &p) {
		c.problems = append(c.problems, p)
		return
	}
	c.problems = append(c.problems, config.Problem{Pos: pos, Path: path, Severity: config.Error, What: err.Error()})
}

func (c *checker) cluster(ctx context.Context, cl *config.Cluster, inter *channel.Registry[channel.Interceptor]) {
	host, hostErr := idleHost(c.parts, c.settings)
	if host != nil {
		defer host.Stop(ctx) //nolint:errcheck // nothing was started
	}
	if _, err := buildStack(cl.Channel.Interceptors, inter, host, c.settings); err != nil {
		for _, e := range unjoin(err) {
			c.note(cl.Pos, "cluster.channel.interceptors", e)
		}
	}
	if hostErr != nil {
		c.note(cl.Pos, "cluster", hostErr)
		return
	}
	check := func(kind, path string, comp config.Component) {
		c.note(comp.Pos, path, host.Check(kind, pluginSpec(comp, "")))
	}
	c.note(cl.Channel.Membership.Pos, "cluster.channel.membership", checkMembership(cl.Channel.Membership, host))
	check("manager", "cluster.manager", cl.Manager)
	if cl.Deployer != nil {
		check("deployer", "cluster.deployer", *cl.Deployer)
	}
}

func unjoin(err error) []error {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		return joined.Unwrap()
	}
	return []error{err}
}

// valveLists returns the pipelines of a configuration by their place.
func valveLists(cfg *config.Config) map[string][]config.Component {
	lists := map[string][]config.Component{"engine.valves": cfg.Engine.Valves}
	for i, h := range cfg.Engine.Hosts {
		lists[fmt.Sprintf("engine.hosts[%d].valves", i)] = h.Valves
		for j, x := range h.Contexts {
			lists[fmt.Sprintf("engine.hosts[%d].contexts[%d].valves", i, j)] = x.Valves
		}
	}
	return lists
}

// Explain draws the configured stack and says what it promises. cfg must be
// normalized.
func Explain(cfg *config.Config, parts Parts) (string, error) {
	if cfg.Cluster == nil {
		return "no cluster: a single node\n\n" + Guarantees(cfg) + "\n", nil
	}
	inter, err := channel.NewRegistry("interceptor", parts.Interceptors...)
	if err != nil {
		return "", err
	}
	settings, err := idleSettings(parts)
	if err != nil {
		return "", err
	}
	var host core.PluginHost
	if parts.Plugins != nil {
		if host, err = parts.Plugins(settings); err != nil {
			return "", err
		}
		defer host.Stop(context.Background()) //nolint:errcheck // nothing was started
	}
	stack, err := buildStack(cfg.Cluster.Channel.Interceptors, inter, host, settings)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "manager      %s (send: %s)\n", cfg.Cluster.Manager.Use, cfg.Cluster.Send)
	for _, x := range ownWays(cfg) {
		fmt.Fprintf(&b, "  %s: %s (send: %s)\n", x.name, x.manager, x.send)
	}
	b.WriteString(stack.Explain())
	fmt.Fprintf(&b, "membership   %s\n", cfg.Cluster.Channel.Membership.Use)
	fmt.Fprintf(&b, "receiver     %s:%d, next free of %d ports\n", cfg.Cluster.Channel.Receiver.Address, cfg.Cluster.Channel.Receiver.Port, cfg.Cluster.Channel.Receiver.AutoBind)
	b.WriteString("\n" + Guarantees(cfg) + "\n")
	return b.String(), nil
}

// ownWay is a context whose sessions are not replicated as the cluster's are.
type ownWay struct{ name, manager, send string }

func ownWays(cfg *config.Config) (list []ownWay) {
	for _, h := range cfg.Engine.Hosts {
		for _, x := range h.Contexts {
			if x.Manager == nil && x.Send == "" || x.Distributable != nil && !*x.Distributable {
				continue
			}
			w := ownWay{core.ContextName(h.Name, strings.TrimSuffix(x.Path, "/")), cfg.Cluster.Manager.Use, cmp.Or(x.Send, cfg.Cluster.Send)}
			if x.Manager != nil {
				w.manager = x.Manager.Use
			}
			list = append(list, w)
		}
	}
	return list
}

// Guarantees says in words what happens to the users' sessions. cfg must be
// normalized.
func Guarantees(cfg *config.Config) string {
	if cfg.Cluster == nil {
		return "Sessions live on this node only: when it dies they are gone."
	}
	level, err := parseLevel(cfg.Cluster.Send)
	if err != nil {
		return err.Error()
	}
	promise := map[core.Level]string{
		core.Async:  "Sessions are replicated after the response (send: async). When a node dies, changes of its last moments that were still queued may be lost; everything older survives.",
		core.Acked:  "A response is sent when every other node has received the change (send: ack). When one node dies, no change that a user has seen confirmed is lost, unless the others fail to process it.",
		core.Synced: "A response is sent when every other node has stored the change (send: sync). When any one node dies, no change that a user has seen confirmed is lost.",
	}
	lines := []string{promise[level]}
	for _, x := range ownWays(cfg) {
		if l, err := parseLevel(x.send); err == nil && l != level {
			lines = append(lines, "In "+x.name+": "+promise[l])
		}
	}
	if cfg.Cluster.Manager.Use == "delta" {
		lines = append(lines, "Every node holds every session (delta): as long as one node lives, the sessions live; memory grows with the number of all sessions.")
	}
	lines = append(lines, "When the network splits, each part goes on serving with the sessions it has. When it heals, sessions are merged attribute by attribute, the newest change wins; sessions that ended on one side stay ended.")
	return strings.Join(lines, "\n")
}
