// Package persistent is a valve for nodes that share a store of sessions and
// hear nothing else of each other: a request works on what the store has, and
// what it changes is in the store before its response goes out. It imports core,
// core/session and channel only.
package persistent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"regexp/syntax"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Config is what users write.
type Config struct {
	// Filter is a regular expression. A request whose whole decoded path
	// (context path included, path parameters and query not) matches it is left
	// alone: its session is neither read nor written. Empty is none.
	Filter string `yaml:"filter"`
	// Wait bounds how long a request waits while another one of the same session
	// is at work on this node; 0 does not wait. It is answered with 429 then.
	Wait time.Duration `yaml:"wait"`
	// MaxWaiting bounds the requests of one session that wait; one more is
	// answered with 429.
	MaxWaiting int `yaml:"max_waiting"`
	// ReadTimeout bounds the time for which a request waits for the store before
	// it goes on with what the node has.
	ReadTimeout time.Duration `yaml:"read_timeout"`
}

// maxFilter bounds the filter, in bytes.
const maxFilter = 16 << 10

// Default returns the defaults.
func Default() Config {
	return Config{Wait: 10 * time.Second, MaxWaiting: 100, ReadTimeout: 3 * time.Second}
}

// Validate checks the configuration.
func (c *Config) Validate() error {
	var errs []error
	if len(c.Filter) > maxFilter {
		errs = append(errs, fmt.Errorf("persistent: filter of %d bytes: at most %d", len(c.Filter), maxFilter))
	} else if _, err := syntax.Parse(c.Filter, syntax.Perl); err != nil {
		errs = append(errs, fmt.Errorf("persistent: filter %q: %w", c.Filter, err))
	}
	if c.Wait < 0 || c.MaxWaiting < 0 {
		errs = append(errs, errors.New("persistent: wait and max_waiting must not be negative"))
	}
	if c.ReadTimeout <= 0 {
		errs = append(errs, errors.New("persistent: read_timeout must be greater than 0"))
	}
	return errors.Join(errs...)
}

// Factory makes the valve from configuration.
var Factory = channel.FactoryOf("persistent", Default(), func(c Config, s channel.Settings) (core.Valve, error) {
	return New(c, s)
})

// Valve lets requests work on what the store has.
type Valve struct {
	cfg                          Config
	filter                       *regexp.Regexp // nil without one
	log                          *zap.Logger
	reads, unread, busy, waiting *channel.Counter

	mu    sync.Mutex
	turns map[session.Key]*turn // guarded by mu: of the sessions in use
}

// turn is the right to work on a session; it holds a token while nobody does.
type turn struct {
	token  chan struct{}
	wanted int // requests that have it or wait for it; guarded by Valve.mu
}

// New returns the valve.
func New(c Config, s channel.Settings) (*Valve, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	v := &Valve{
		cfg: c, log: s.Logger, turns: map[session.Key]*turn{},
		reads:   s.Metrics.Counter("persistent_reads_total", "Sessions read from the store before a request used them."),
		unread:  s.Metrics.Counter("persistent_read_failures_total", "Requests that worked on what the node had, because the store did not answer."),
		waiting: s.Metrics.Counter("persistent_waits_total", "Requests that waited because another one of their session was at work."),
		busy:    s.Metrics.Counter("persistent_refused_total", "Requests answered with 429, because others of their session were at work for too long."),
	}
	if v.log == nil {
		v.log = zap.NewNop()
	}
	if c.Filter != "" {
		re, err := regexp.Compile("^(?:" + c.Filter + ")$")
		if err != nil {
			return nil, fmt.Errorf("persistent: filter %q: %w", c.Filter, err)
		}
		v.filter = re
	}
	return v, nil
}

// Wrap makes the request wait for its turn, and its session for the store.
func (v *Valve) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := core.FromContext(r.Context())
		switch {
		case x == nil || x.Context() == nil:
		case v.filter != nil && v.filter.MatchString(x.Path()):
			x.SkipReplication()
		default:
			if !v.enter(x, r.Context()) {
				v.busy.Inc()
				w.Header().Set("Retry-After", "1")
				x.Refuse(http.StatusTooManyRequests, "other requests of your session are at work; please try again")
				return
			}
			x.SetLevel(max(x.Level(), core.Acked))
			x.Guard(v)
		}
		next.ServeHTTP(w, r)
	})
}

// enter waits until no other request of the session is at work on this node; the
// end of the exchange gives the turn on.
func (v *Valve) enter(x *core.Exchange, ctx context.Context) bool {
	raw, _, _ := x.Requested()
	id, _, ok := session.ParseID(raw)
	if !ok {
		return true
	}
	key := session.Key{Context: x.Context().Name(), ID: id}
	v.mu.Lock()
	t := v.turns[key]
	if t == nil {
		t = &turn{token: make(chan struct{}, 1)}
		t.token <- struct{}{}
		v.turns[key] = t
	}
	if t.wanted > v.cfg.MaxWaiting {
		v.mu.Unlock()
		return false
	}
	t.wanted++
	v.mu.Unlock()
	if !v.wait(ctx, t) {
		v.leave(key, t)
		return false
	}
	x.OnEnd(func(*core.Exchange) {
		t.token <- struct{}{}
		v.leave(key, t)
	})
	return true
}

func (v *Valve) wait(ctx context.Context, t *turn) bool {
	select {
	case <-t.token:
		return true
	default:
	}
	v.waiting.Inc()
	timer := time.NewTimer(v.cfg.Wait)
	defer timer.Stop()
	select {
	case <-t.token:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

func (v *Valve) leave(key session.Key, t *turn) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if t.wanted--; t.wanted == 0 {
		delete(v.turns, key)
	}
}

// Admit implements core.SessionGuard: the session becomes what the store has. A
// store that does not answer keeps nobody from working.
func (v *Valve) Admit(x *core.Exchange, h core.Handle) {
	state, ok := h.(core.Versioned)
	if !ok || h.IsNew() {
		return
	}
	ctx, cancel := context.WithTimeout(x.Request().Context(), v.cfg.ReadTimeout)
	defer cancel()
	v.reads.Inc()
	if err := state.Refresh(ctx, core.SessionState{}); err != nil {
		v.unread.Inc()
		v.log.Warn("a request works on what the node has of its session", zap.String("session", x.SessionPrefix()), zap.Error(err))
	}
}

// Invalidated implements core.SessionGuard.
func (v *Valve) Invalidated(*core.Exchange, core.Handle) {}
