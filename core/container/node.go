package container

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/fx"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/admin"
	"github.com/longhouse-go/longhouse/core/attributes"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/httpd"
	"github.com/longhouse-go/longhouse/core/lock"
	"github.com/longhouse-go/longhouse/core/table"
)

// Node is one running node.
type Node struct {
	app          *fx.App
	cfg          *config.Config // as at the start; a reload changes the engine only
	shown        atomic.Pointer[config.Config]
	parts        Parts
	name         string
	log          *zap.Logger
	net          transport.Net
	secured      transport.Net // net under TLS, once the cluster is built with it
	metrics      *channel.Metrics
	interceptors *channel.Registry[channel.Interceptor]
	valves       *channel.Registry[core.Valve]
	plugins      core.PluginHost
	cluster      *cluster // nil for a single node
	local        *sessions
	locks        *lock.Locker // of the contexts whose sessions are not replicated
	attributes   *attributes.Store

	current    atomic.Pointer[core.Engine]
	connectors []*httpd.Connector
	admin      *admin.Server
	workDir    string
	tempDir    bool

	started    time.Time
	ready      atomic.Bool
	stopping   atomic.Bool
	background sync.WaitGroup
	cancel     context.CancelFunc // of the background work
	stages     []stage            // what to stop, in the order of starting
	deployed   sync.Map           // deployKey → core.Bundle

	drain       *drain
	drainCancel context.CancelFunc // changed by drain.once only

	reloading chan struct{} // one token, kept by stop
	read      func() (*config.Config, error)
}

// stage is one thing to stop.
type stage struct {
	name string
	stop func(context.Context) error
	// budget is the longest it may take, so that the next stage has its turn.
	budget time.Duration
}

type nodeIn struct {
	fx.In
	Config       *config.Config
	Parts        Parts
	Log          *zap.Logger
	Net          transport.Net
	Metrics      *channel.Metrics
	Interceptors *channel.Registry[channel.Interceptor]
	Valves       *channel.Registry[core.Valve]
}

func newNode(in nodeIn) (*Node, error) {
	cfg := in.Config
	cfg.Normalize()
	n := &Node{
		cfg: cfg, parts: in.Parts, name: cfg.Node.Name, net: in.Net, metrics: in.Metrics,
		interceptors: in.Interceptors, valves: in.Valves,
		log:       in.Log.With(zap.String("node", cfg.Node.Name)),
		reloading: make(chan struct{}, 1), drain: newDrain(), drainCancel: func() {},
	}
	if err := n.makeWorkDir(); err != nil {
		return nil, err
	}
	n.shown.Store(cfg)
	ok := false
	defer func() {
		if !ok {
			n.removeWorkDir()
		}
	}()
	n.local = &sessions{name: "local", table: table.New(n.tableConfig(nil), n.settings("sessions.local"))}
	n.locks = lock.New(lock.Config{}, nil, n.settings("locks.local"))
	if cfg.Cluster != nil {
		if in.Parts.Plugins == nil {
			return nil, errNoPlugins
		}
		var err error
		if n.plugins, err = in.Parts.Plugins(n.settings("plugins")); err != nil {
			return nil, err
		}
		if n.cluster, err = n.newCluster(); err != nil {
			return nil, err
		}
	}
	var err error
	if n.attributes, err = attributes.New(attributes.Config{}, n.Channel(), n.settings("attributes")); err != nil {
		return nil, err
	}
	engine, err := n.newEngine(cfg)
	if err != nil {
		return nil, err
	}
	n.current.Store(engine)
	for i, c := range cfg.Connectors {
		conn, err := httpd.New(connectorConfig(c), http.HandlerFunc(n.serve), n.settings(fmt.Sprintf("connector.%d", i)))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.Pos, err)
		}
		n.connectors = append(n.connectors, conn)
	}
	n.admin, err = admin.New(admin.Config{Address: cfg.Admin.Address}, n.adminSources(), n.settings("admin"))
	if err != nil {
		return nil, err
	}
	ok = true
	return n, nil
}

func connectorConfig(c config.Connector) httpd.Config {
	h := httpd.Config{
		Protocol: c.Protocol, Address: c.Address, NextFree: c.NextFree, HeaderTimeout: c.HeaderTimeout,
		IdleTimeout: c.IdleTimeout, MaxHeaderBytes: c.MaxHeaderBytes, MaxConnections: c.MaxConnections,
	}
	if c.TLS != nil {
		h.TLS = &httpd.TLS{Cert: c.TLS.Cert, Key: c.TLS.Key, ClientCA: c.TLS.ClientCA}
	}
	return h
}

func (n *Node) makeWorkDir() (err error) {
	if n.workDir = n.cfg.Node.WorkDir; n.workDir == "" {
		n.tempDir = true
		n.workDir, err = os.MkdirTemp("", "longhouse-")
		return err
	}
	if n.workDir, err = filepath.Abs(n.workDir); err != nil {
		return err
	}
	if err := os.MkdirAll(n.workDir, 0o700); err != nil {
		return fmt.Errorf("node.work_dir: %w", err)
	}
	return nil
}

func (n *Node) removeWorkDir() {
	if n.tempDir {
		_ = os.RemoveAll(n.workDir) // a leftover in the temporary directory harms nobody
	}
}

// engine returns the current tree of containers.
func (n *Node) engine() *core.Engine { return n.current.Load() }

// serve passes a request to the current engine, so that a reload can switch it.
func (n *Node) serve(w http.ResponseWriter, r *http.Request) {
	if n.drain.is() && r.Header.Get("Upgrade") == "" {
		// The client, or the balancer, comes back on a new connection: perhaps to
		// another node. No connection that is kept is closed under a request.
		w.Header().Set("Connection", "close")
	}
	n.current.Load().ServeHTTP(w, r)
}

// onStop adds a stage to be stopped before all earlier ones.
func (n *Node) onStop(name string, budget time.Duration, stop func(context.Context) error) {
	n.stages = append(n.stages, stage{name, stop, budget})
}

// start starts everything, outermost last. If something fails, what has been
// started is stopped: fx does not do that for the hook that failed.
func (n *Node) start(ctx context.Context) (err error) {
	n.started = time.Now()
	background, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	n.onStop("work directory", time.Second, func(context.Context) error { n.removeWorkDir(); return nil })
	defer func() {
		if err != nil {
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.cfg.Node.ShutdownTimeout)
			defer cancel()
			err = errors.Join(err, n.stop(stop))
		}
	}()
	if n.plugins != nil {
		n.onStop("plugins", 5*time.Second, n.plugins.Stop)
	}
	if err := n.admin.Start(ctx); err != nil {
		return err
	}
	n.onStop("admin", time.Second, n.admin.Stop)
	if err := n.local.table.Start(ctx, 0); err != nil {
		return err
	}
	n.onStop("local sessions", time.Second, n.local.table.Stop)
	n.onStop("local locks", time.Second, n.locks.Stop)
	if n.cluster != nil {
		if err := n.cluster.start(ctx, n); err != nil {
			return err
		}
	}
	if err := n.attributes.Start(ctx); err != nil {
		return err
	}
	n.onStop("context attributes", 2*time.Second, n.attributes.Stop)
	if err := n.engine().Start(ctx); err != nil {
		return err
	}
	n.onStop("engine", 5*time.Second, func(ctx context.Context) error { return n.engine().Stop(ctx) })
	if n.cluster != nil && n.cluster.deployer != nil {
		if err := n.cluster.deployer.Start(ctx, deployHost{n}); err != nil {
			return err
		}
		n.onStop("deployer", 3*time.Second, n.cluster.deployer.Stop)
	}
	for _, c := range n.connectors {
		if err := c.Start(ctx); err != nil {
			return err
		}
		n.onStop("connector "+c.Addr(), n.cfg.Node.ShutdownTimeout/2, c.Stop)
	}
	n.awaitReady(background, &n.background)
	n.log.Info("node started", zap.Strings("http", n.Addrs()), zap.String("admin", n.Admin()), zap.Duration("took", time.Since(n.started)))
	return nil
}

// stop stops all stages, last started first, each within its budget and what is
// left of ctx.
func (n *Node) stop(ctx context.Context) error {
	n.stopping.Store(true)
	if n.cancel == nil {
		return nil // never started
	}
	n.drain.once.Do(func() { close(n.drain.done) }) // too late to begin one
	n.drainCancel()                                 // it is over, or there is no time for it
	<-n.drain.done
	select {
	case n.reloading <- struct{}{}: // wait for a running reload, let no other begin
	case <-ctx.Done():
	}
	n.cancel()
	n.background.Wait()
	var errs []error
	for _, s := range slices.Backward(n.stages) {
		stage, cancel := context.WithTimeout(ctx, s.budget)
		if err := s.stop(stage); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", s.name, err))
		}
		cancel()
	}
	n.stages = nil
	return errors.Join(errs...)
}

// Addrs returns the addresses of the connectors, host:port, once started.
func (n *Node) Addrs() []string {
	addrs := make([]string, len(n.connectors))
	for i, c := range n.connectors {
		addrs[i] = c.Addr()
	}
	return addrs
}

// Admin returns the address of the admin API, or "" if it is off.
func (n *Node) Admin() string { return n.admin.Addr() }

// Channel returns the node's channel, or nil for a single node.
func (n *Node) Channel() *channel.Channel {
	if n.cluster == nil {
		return nil
	}
	return n.cluster.channel
}

// Ready reports whether the node should get requests: it is not stopping, and
// it has had the sessions of the other nodes.
func (n *Node) Ready() bool { return n.readyError() == nil }

var (
	errStarting = errors.New("starting: waiting for the sessions of the other nodes")
	errStopping = errors.New("stopping")
)

func (n *Node) readyError() error {
	switch {
	case n.stopping.Load():
		return errStopping
	case n.drain.is():
		return errDraining
	case !n.ready.Load():
		return errStarting
	}
	return nil
}

func (n *Node) memberCount() int {
	if n.cluster == nil {
		return 1
	}
	return len(n.cluster.channel.View().Members) + 1
}
