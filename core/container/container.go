// Package container puts a node together: from a configuration and the parts
// that exist (interceptors, valves, plugins, applications) it builds the channel
// with its stack, the session tables with their managers, the engine with its
// valves, the connectors and the admin API, and starts and stops them in order.
//
// It is wired with fx, which holds the singletons of the process. Chains and
// pipelines are ordered by the configuration's lists alone. The package knows
// only interfaces and factories: it must not import interceptors, valves or
// plugins.
package container

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/pion/transport/v2"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/dig"
	"go.uber.org/fx"
	"go.uber.org/fx/fxevent"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/attributes"
	"github.com/longhouse-go/longhouse/core/config"
)

// DemoApp is the name of the application that is served by a host for which
// nothing else is configured, if it is among the parts.
const DemoApp = "demo"

// Parts is what a node can be composed of. The zero value composes a node
// without interceptors, valves, plugins and applications.
type Parts struct {
	Interceptors []core.InterceptorFactory
	Valves       []core.ValveFactory
	Apps         []App
	// Plugins makes the plugin host; nil for a node without a cluster.
	Plugins func(channel.Settings) (core.PluginHost, error)
	// Version is announced to the other nodes, for people.
	Version string
	// Logger replaces the one made from the configuration.
	Logger *zap.Logger
	// Net replaces the machine's network; simulations do.
	Net transport.Net
}

// App is an application that is compiled in.
type App struct {
	// Name is what a configured context says in app.
	Name string
	// Path, if set, serves the application under this context path of the
	// default host although no context is configured there.
	Path *string
	// New makes the application's handler for one context.
	New func(AppInfo) http.Handler
	// Listeners, if set, makes the listeners to the sessions of one context. A
	// reload of the configuration calls it again, after New.
	Listeners func(AppInfo) []core.SessionListening
}

// AppInfo tells an application where it runs.
type AppInfo struct {
	// Node is the node's name.
	Node string
	// Context is the context's name: host and path.
	Context string
	// Attributes are the context's, for watching them; see there. They can be set
	// once the node has started: from a request, or another goroutine.
	Attributes *attributes.Attributes
}

// Module wires a node into an fx application: it provides *Node, which starts
// and stops with the application. Supply a *config.Config and Parts; further
// factories may be added with [ProvideInterceptor] and [ProvideValve].
func Module() fx.Option {
	return fx.Module("longhouse",
		fx.Provide(newLogger, newNet, channel.NewMetrics, newInterceptors, newValves, newNode),
		fx.Invoke(func(lc fx.Lifecycle, n *Node) {
			// One hook for the node: fx would skip the remaining hooks if one
			// overran its time, and the channel's leave message with them.
			lc.Append(fx.Hook{OnStart: n.start, OnStop: n.stop})
		}),
	)
}

// ProvideInterceptor adds an interceptor to the node of an fx application.
func ProvideInterceptor(f core.InterceptorFactory) fx.Option {
	return fx.Supply(fx.Annotate(f, fx.ResultTags(`group:"interceptors"`)))
}

// ProvideValve adds a valve to the node of an fx application.
func ProvideValve(f core.ValveFactory) fx.Option {
	return fx.Supply(fx.Annotate(f, fx.ResultTags(`group:"valves"`)))
}

// startTimeout bounds the start of a node: plugins, binding, state is not
// waited for.
const startTimeout = 60 * time.Second

// New composes a node. Nothing is started, but everything that can be checked
// without starting is: the error names all that is wrong.
func New(cfg *config.Config, parts Parts, more ...fx.Option) (*Node, error) {
	var n *Node
	app := fx.New(
		fx.Supply(cfg, parts),
		Module(),
		fx.Options(more...),
		fx.Populate(&n),
		fx.WithLogger(func() fxevent.Logger { return fxevent.NopLogger }),
		fx.StartTimeout(startTimeout),
		fx.StopTimeout(cfg.Node.ShutdownTimeout),
	)
	if err := app.Err(); err != nil {
		return nil, dig.RootCause(err)
	}
	n.app = app
	return n, nil
}

// Start starts the node: channel, managers, connectors, in this order. If it
// fails, what had been started is stopped again.
func (n *Node) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return n.app.Start(ctx)
}

// Stop stops the node in the reverse order of its start: no new requests, those
// that run are waited for, sessions are handed to the manager, the group is
// left. Every stage has its share of the time, so that a slow one cannot keep
// the others from their turn.
func (n *Node) Stop(ctx context.Context) error { return n.app.Stop(ctx) }

// Run starts the node, waits for ctx or until it is told to drain, drains it and
// stops it.
func (n *Node) Run(ctx context.Context) error {
	if err := n.Start(ctx); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-n.DrainAsked():
	}
	n.Drain(context.Background())
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.cfg.Node.ShutdownTimeout)
	defer cancel()
	return n.Stop(stop)
}

func newNet(p Parts) (transport.Net, error) {
	if p.Net != nil {
		return p.Net, nil
	}
	return stdnet.NewNet()
}

type interceptorsIn struct {
	fx.In
	Parts Parts
	More  []core.InterceptorFactory `group:"interceptors"`
}

func newInterceptors(in interceptorsIn) (*channel.Registry[channel.Interceptor], error) {
	return channel.NewRegistry("interceptor", append(in.Parts.Interceptors[:len(in.Parts.Interceptors):len(in.Parts.Interceptors)], in.More...)...)
}

type valvesIn struct {
	fx.In
	Parts Parts
	More  []core.ValveFactory `group:"valves"`
}

func newValves(in valvesIn) (*channel.Registry[core.Valve], error) {
	return channel.NewRegistry("valve", append(in.Parts.Valves[:len(in.Parts.Valves):len(in.Parts.Valves)], in.More...)...)
}

var errNoPlugins = errors.New("container: the configuration has a cluster, but Parts.Plugins is not set")
