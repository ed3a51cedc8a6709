// Package routebinder is a valve that moves a session's route to this node
// after a failover: the client gets its session id again with the own route, so
// that the balancer sends it here from now on. It imports core and channel only.
package routebinder

import (
	"net/http"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"go.uber.org/zap"
)

// Config is what users write: nothing.
type Config struct{}

// Factory makes the valve from configuration.
var Factory = channel.FactoryOf("routebinder", Config{}, func(c Config, s channel.Settings) (core.Valve, error) {
	return New(c, s), nil
})

// Valve rebinds sessions that come with a foreign route.
type Valve struct {
	log           *zap.Logger
	bound, failed *channel.Counter
}

// New returns the valve.
func New(_ Config, s channel.Settings) *Valve {
	v := &Valve{
		log:    s.Logger,
		bound:  s.Metrics.Counter("routebinder_rebound_total", "Sessions that came with another node's route and got this node's."),
		failed: s.Metrics.Counter("routebinder_failed_total", "Requests with another node's route whose session could not be looked up."),
	}
	if v.log == nil {
		v.log = zap.NewNop()
	}
	return v
}

// Wrap looks up the session of requests with a foreign route before the handler
// does, and has the cookie rewritten.
func (v *Valve) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if x := core.FromContext(r.Context()); x != nil && x.ForeignRoute() {
			switch bound, err := x.Rebind(); {
			case err != nil: // the application meets the same error if it wants the session
				v.failed.Inc()
				v.log.Debug("session with a foreign route could not be looked up",
					zap.String("session", x.SessionPrefix()), zap.Error(err))
			case bound:
				v.bound.Inc()
			}
		}
		next.ServeHTTP(w, r)
	})
}
