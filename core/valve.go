package core

import (
	"context"
	"net/http"

	"github.com/longhouse-go/longhouse/channel"
)

// Valve is one step of a pipeline: any net/http middleware. Wrap is called once,
// when the pipeline is built, and must not have side effects. The handler it
// returns runs concurrently. It must not replace the ResponseWriter unless it
// changes the body; see [Exchange] for acting before the header goes out.
type Valve interface {
	Wrap(next http.Handler) http.Handler
}

// ValveFunc makes a valve of a middleware function.
type ValveFunc func(next http.Handler) http.Handler

// Wrap calls f.
func (f ValveFunc) Wrap(next http.Handler) http.Handler { return f(next) }

// ValveStarter and ValveStopper are implemented by valves with a life cycle.
// Stop works twice and without Start.
type (
	// ValveStarter starts a valve; ctx is only for starting.
	ValveStarter interface {
		Start(ctx context.Context) error
	}
	// ValveStopper stops a valve.
	ValveStopper interface {
		Stop(ctx context.Context) error
	}
)

// The kinds of factories that a node is composed from.
type (
	// InterceptorFactory makes a layer of the channel's stack.
	InterceptorFactory = channel.Factory[channel.Interceptor]
	// ValveFactory makes a valve.
	ValveFactory = channel.Factory[Valve]
	// MembershipFactory makes a membership.
	MembershipFactory = channel.Factory[channel.Membership]
	// ManagerFactory makes a session manager.
	ManagerFactory = channel.Factory[Manager]
	// DeployerFactory makes a deployer.
	DeployerFactory = channel.Factory[Deployer]
)
