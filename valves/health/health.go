// Package health is a valve that answers health checks of balancers: 200 if the
// node is ready, 503 if not, without touching a session. It imports core and
// channel only.
package health

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// Config is what users write.
type Config struct {
	// Path is the path that is answered, seen from where the valve stands.
	Path string `yaml:"path"`
}

// Default returns the defaults.
func Default() Config { return Config{Path: "/health"} }

// Validate checks the configuration.
func (c *Config) Validate() error {
	if !strings.HasPrefix(c.Path, "/") {
		return fmt.Errorf("health: path %q: must start with a slash", c.Path)
	}
	return nil
}

// Factory makes the valve from configuration.
var Factory = channel.FactoryOf("health", Default(), func(c Config, s channel.Settings) (core.Valve, error) {
	return New(c, s)
})

// Valve answers health checks.
type Valve struct {
	path             string
	checks, notReady *channel.Counter
}

// New returns the valve.
func New(c Config, s channel.Settings) (*Valve, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &Valve{
		path:     c.Path,
		checks:   s.Metrics.Counter("health_checks_total", "Health checks answered."),
		notReady: s.Metrics.Counter("health_not_ready_total", "Health checks answered with 503."),
	}, nil
}

// Wrap answers the path and passes on everything else.
func (v *Valve) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != v.path {
			next.ServeHTTP(w, r)
			return
		}
		v.answer(w, r)
	})
}

func (v *Valve) answer(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	v.checks.Inc()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	var err error
	if x := core.FromContext(r.Context()); x != nil {
		err = x.Engine().Ready()
	}
	if err != nil {
		// The reason may name peers and addresses: it is for the admin API.
		v.notReady.Inc()
		h.Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = w.Write([]byte("not ready\n"))
		return
	}
	_, _ = w.Write([]byte("ok\n"))
}
