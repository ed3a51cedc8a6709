package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
)

// OnReload sets how the configuration is read again. Call it before Start.
func (n *Node) OnReload(read func() (*config.Config, error)) { n.read = read }

// Reload reads the configuration again and switches to it: hosts, contexts,
// valves and their options are built beside the running ones, then take over;
// requests that are inside the old ones end there. The channel's interceptors
// are replaced while messages go on, see [channel.Channel.Swap]; those whose
// entry has not changed go on with their state. If anything is wrong, or
// something has changed that needs a restart, nothing changes and the error
// says why.
func (n *Node) Reload(ctx context.Context) error {
	err := n.reload(ctx)
	if err != nil {
		n.log.Error("the configuration was not reloaded; the node goes on as before", zap.Error(err))
		return err
	}
	n.log.Info("the configuration was reloaded")
	return nil
}

func (n *Node) reload(ctx context.Context) error {
	if n.read == nil {
		return errors.New("reload: the node was not started from a file")
	}
	select {
	case n.reloading <- struct{}{}:
		defer func() { <-n.reloading }()
	default:
		return errors.New("reload: the node is stopping, or another reload is running")
	}
	cfg, err := n.read()
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	cfg.Normalize()
	if err := fixed(n.cfg, cfg); err != nil {
		return err
	}
	layers, stack, err := n.nextStack(ctx, cfg)
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	done := false
	defer func() {
		if !done {
			n.discard(ctx, layers)
		}
	}()
	engine, err := n.newEngine(cfg)
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	if err := engine.Start(ctx); err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	var errs []error
	n.deployed.Range(func(_, v any) bool {
		if err := (deployHost{n}).apply(ctx, engine, v.(core.Bundle)); err != nil {
			errs = append(errs, err)
		}
		return true
	})
	if err := errors.Join(errs...); err != nil {
		return errors.Join(fmt.Errorf("reload: a deployed application does not fit: %w", err), engine.Stop(ctx))
	}
	// The last thing that can fail, and then it changes nothing.
	if stack != nil {
		if err := n.cluster.channel.Swap(ctx, stack); err != nil {
			return errors.Join(fmt.Errorf("reload: cluster.channel.interceptors: %w", err), engine.Stop(ctx))
		}
		n.cluster.layers = layers
	}
	done = true
	old := n.current.Swap(engine)
	old.Supersede(engine) // for requests that hold the old one already
	n.shown.Store(cfg)
	n.background.Go(func() {
		stop, cancel := context.WithTimeout(context.Background(), cfg.Node.ShutdownTimeout)
		defer cancel()
		if err := old.Stop(stop); err != nil {
			n.log.Warn("requests of the configuration before the reload did not end", zap.Error(err))
		}
	})
	return nil
}

// nextStack makes the layers that cfg describes. The stack is nil if they are
// those that run.
func (n *Node) nextStack(ctx context.Context, cfg *config.Config) ([]layer, *channel.Stack, error) {
	if n.cluster == nil {
		return nil, nil, nil
	}
	if v, ok := n.plugins.(versioner); ok {
		if err := v.Refresh(ctx); err != nil {
			return nil, nil, err
		}
	}
	settings, err := n.channelSettings()
	if err != nil {
		return nil, nil, err
	}
	layers, err := buildLayers(cfg.Cluster.Channel.Interceptors, n.cluster.layers, n.interceptors, n.plugins, settings)
	if err != nil {
		n.discard(ctx, layers)
		return nil, nil, err
	}
	same := func(a, b layer) bool { return a.key == b.key }
	if slices.EqualFunc(layers, n.cluster.layers, same) {
		return layers, nil, nil
	}
	stack, err := stackOf(layers)
	if err != nil {
		n.discard(ctx, layers)
		return nil, nil, err
	}
	return layers, stack, nil
}

// discard stops layers that were made in vain: not those that run.
func (n *Node) discard(ctx context.Context, layers []layer) {
	for _, l := range layers {
		if s, ok := l.Interceptor.(channel.Stopper); ok && l.made {
			if err := s.Stop(ctx); err != nil {
				n.log.Warn("a layer that is not needed did not stop", zap.String("layer", l.Origin), zap.Error(err))
			}
		}
	}
}

// fixed reports what differs between two configurations that a running node
// cannot change.
func fixed(old, new *config.Config) error {
	var errs []error
	same := func(name string, a, b any) {
		x, errX := config.Marshal(part(a))
		y, errY := config.Marshal(part(b))
		if errX != nil || errY != nil || !bytes.Equal(x, y) {
			errs = append(errs, fmt.Errorf("reload: %s has changed: restart the node for that", name))
		}
	}
	same("node", old.Node, new.Node)
	same("admin", old.Admin, new.Admin)
	same("log", old.Log, new.Log)
	same("connectors", old.Connectors, new.Connectors)
	same("cluster (other than cluster.channel.interceptors)", fixedCluster(old), fixedCluster(new))
	if old.Engine.Route != new.Engine.Route {
		errs = append(errs, errors.New("reload: engine.route has changed: restart the node for that"))
	}
	return errors.Join(errs...)
}

// fixedCluster is the part of the cluster's section that a running node cannot
// change.
func fixedCluster(c *config.Config) *config.Cluster {
	if c.Cluster == nil {
		return nil
	}
	fixed := *c.Cluster
	fixed.Channel.Interceptors = nil
	return &fixed
}

// part puts one section into an otherwise empty configuration, to compare it.
func part(section any) *config.Config {
	c := &config.Config{}
	switch s := section.(type) {
	case config.Node:
		c.Node = s
	case config.Admin:
		c.Admin = s
	case config.Log:
		c.Log = s
	case []config.Connector:
		c.Connectors = s
	case *config.Cluster:
		c.Cluster = s
	}
	return c
}
