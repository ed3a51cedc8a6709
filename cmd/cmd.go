package cmd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/cmd/demo"
	"github.com/longhouse-go/longhouse/cmd/internal/heapfloor"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/container"
	"github.com/longhouse-go/longhouse/interceptors"
	"github.com/longhouse-go/longhouse/plugins"
	"github.com/longhouse-go/longhouse/plugins/deployer/watch"
	"github.com/longhouse-go/longhouse/plugins/manager/backup"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/manager/memcached"
	"github.com/longhouse-go/longhouse/plugins/manager/persistent"
	"github.com/longhouse-go/longhouse/plugins/manager/redis"
	"github.com/longhouse-go/longhouse/plugins/membership/dns"
	"github.com/longhouse-go/longhouse/plugins/membership/file"
	"github.com/longhouse-go/longhouse/plugins/membership/gossip"
	"github.com/longhouse-go/longhouse/plugins/membership/kubernetes"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
	"github.com/longhouse-go/longhouse/plugins/membership/static"
	"github.com/longhouse-go/longhouse/valves"
)

// Option adds something to the binary that Main runs.
type Option func(*assembly)

// assembly is everything that is compiled into the binary.
type assembly struct {
	interceptors []core.InterceptorFactory
	valves       []core.ValveFactory
	managers     []core.ManagerFactory
	memberships  []core.MembershipFactory
	deployers    []core.DeployerFactory
	apps         []container.App

	// external are the plugins that are programs of their own, store keeps
	// their copies; see usePlugins.
	external []plugins.External
	store    string
	// idle: nothing is started, so their programs need not be there.
	idle bool
}

// Interceptor makes an interceptor available to configurations.
func Interceptor(f core.InterceptorFactory) Option {
	return func(a *assembly) { a.interceptors = append(a.interceptors, f) }
}

// InterceptorOf makes an interceptor available to configurations under a name,
// from the constructor that also makes it a plugin. The tags of C are its
// defaults; see config.Defaults.
func InterceptorOf[C any, I channel.Interceptor](name string, make func(C, channel.Settings) (I, error)) Option {
	var defaults C
	fault := config.Defaults(&defaults)
	f := channel.FactoryOf(name, defaults, func(c C, s channel.Settings) (channel.Interceptor, error) {
		if fault != nil {
			return nil, fault
		}
		return make(c, s)
	})
	f.Source = "compiled in"
	return Interceptor(f)
}

// Valve makes a valve available to configurations.
func Valve(f core.ValveFactory) Option {
	return func(a *assembly) { a.valves = append(a.valves, f) }
}

// Manager makes a session manager available to configurations.
func Manager(f core.ManagerFactory) Option {
	return func(a *assembly) { a.managers = append(a.managers, f) }
}

// App serves an application under a context path of the default host, "" for the
// root. A configured context of that path may say more about it. The listeners
// hear of its sessions.
func App(path string, h http.Handler, listeners ...core.SessionListening) Option {
	return func(a *assembly) {
		a.apps = append(a.apps, container.App{
			Name: path, Path: &path,
			New:       func(container.AppInfo) http.Handler { return h },
			Listeners: func(container.AppInfo) []core.SessionListening { return listeners },
		})
	}
}

func assemble(opts []Option) *assembly {
	a := &assembly{
		interceptors: append(interceptors.Builtin(), channeltest.Chaos()...),
		valves:       valves.Builtin(),
		managers:     []core.ManagerFactory{delta.Factory, backup.Factory, persistent.Factory, memcached.Factory, redis.Factory},
		memberships: []core.MembershipFactory{
			multicast.Factory, static.Factory, dns.Factory, kubernetes.Factory, file.Factory, gossip.Factory,
		},
		deployers: []core.DeployerFactory{watch.Factory},
		apps: []container.App{{
			Name: container.DemoApp,
			New:  func(i container.AppInfo) http.Handler { return demo.Handler(i.Node) },
		}},
	}
	for _, o := range opts {
		o(a)
	}
	return a
}

// parts returns what the container is composed from.
func (a *assembly) parts() container.Parts {
	return container.Parts{
		Interceptors: a.interceptors,
		Valves:       a.valves,
		Apps:         a.apps,
		Plugins: func(s channel.Settings) (core.PluginHost, error) {
			return plugins.NewHost(plugins.Config{
				Managers: a.managers, Memberships: a.memberships, Deployers: a.deployers, External: a.external, StoreDir: a.store,
				Reread: func(context.Context) ([]plugins.External, error) { return a.external, nil }, // a reload has set it
				Idle:   a.idle,
				// Names and addresses, no secrets.
				Env: append(dns.Environment(), kubernetes.Environment()...),
			}, s)
		},
		Version: Version(),
	}
}

// exitError ends the program with a code, without another message.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit %d", int(e)) }

// Main runs the command line of os.Args and exits.
func Main(opts ...Option) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	heapfloor.Set(heapfloor.Default)
	root := newRoot(assemble(opts))
	err := root.ExecuteContext(ctx)
	var code exitError
	switch {
	case errors.As(err, &code):
		os.Exit(int(code))
	case err != nil:
		fmt.Fprintln(os.Stderr, "longhouse:", err)
		os.Exit(1)
	}
}

func newRoot(a *assembly) *cobra.Command {
	root := &cobra.Command{
		Use:           "longhouse",
		Short:         "An HTTP server whose users' sessions survive the death of any node",
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       Version(),
	}
	root.AddCommand(newRun(a), newDemo(a), newCheck(a), newImport(a), newStack(a), newStatus(), newVersion(), newBench(a), newPlugin(a), newConform(a))
	return root
}
