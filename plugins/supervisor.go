package plugins

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// The states of core.PluginStatus.
const (
	stateStarting = "starting" // or not started yet
	stateReady    = "ready"
	stateDown     = "down"
	stateBackoff  = "backoff"
	stateBroken   = "broken"
	stateStopped  = "stopped"
)

// generation is one life of a plugin: a process, or a component behind a pipe.
type generation struct {
	conn *frame.Conn
	pid  int
	// control is nil where there is no process.
	control bridge.Control
	// drain asks for the end and waits for it within ctx; it may be nil.
	drain func(ctx context.Context)
	// kill ends it in any case and returns when nothing of it is left. It says
	// how it ended, as far as that is known.
	kill func() string
}

// launcher brings up generation n; h serves its calls.
type launcher func(ctx context.Context, n int, h frame.Handler) (*generation, error)

// supervisor runs the generations of one plugin instance, one after the other.
// It implements bridge.Lifecycle.
type supervisor struct {
	cfg    *Config
	id     string // kind/name
	kind   string
	spec   core.PluginSpec
	log    *zap.Logger
	calls  *frame.Calls
	launch launcher

	events                      atomic.Int64
	total, restarts, deathCount *channel.Counter

	startOnce, stopOnce sync.Once
	ctx                 context.Context // ends with Stop; for restarts
	cancel              context.CancelFunc
	running             sync.WaitGroup // the watching goroutine
	stopped             chan struct{}  // closed when Stop is through
	stopErr             error          // set before stopped is closed
	client              bridge.Client  // set by Start

	mu         sync.Mutex
	state      string      // guarded by mu
	gen        *generation // guarded by mu: the one that is up, or nil
	generation int         // guarded by mu
	since      time.Time   // guarded by mu: when gen became ready
	lastErr    string      // guarded by mu
	stopping   bool        // guarded by mu
}

func newSupervisor(cfg *Config, kind string, spec core.PluginSpec, log *zap.Logger, m *channel.Metrics) *supervisor {
	labels := []string{"kind", kind, "name", spec.Name, "instance", spec.Instance}
	s := &supervisor{
		cfg: cfg, id: kind + "/" + spec.Name, kind: kind, spec: spec, log: log,
		stopped:    make(chan struct{}),
		state:      stateStarting,
		total:      m.Counter("plugin_calls_total", "Calls to the plugin.", labels...),
		restarts:   m.Counter("plugin_restarts_total", "Restarts of the plugin.", labels...),
		deathCount: m.Counter("plugin_deaths_total", "Unwanted ends of the plugin.", labels...),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.calls = frame.NewCalls(frame.CallsConfig{
		Window: cfg.Window, WindowBytes: cfg.WindowBytes,
		Total:   s.total,
		Replays: m.Counter("plugin_replayed_calls_total", "Calls that were made again because a plugin ended without answering.", labels...),
		Full:    m.Counter("plugin_window_full_total", "Calls that had to wait because the window of the plugin was full.", labels...),
	})
	m.Gauge("plugin_calls_in_flight", "Calls that the plugin has not answered yet.", func() float64 { return float64(s.calls.InFlight()) }, labels...)
	m.Gauge("plugin_up", "1 while the plugin is ready.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.state == stateReady {
			return 1
		}
		return 0
	}, labels...)
	return s
}

// Calls implements bridge.Lifecycle.
func (s *supervisor) Calls() *frame.Calls { return s.calls }

// Count implements bridge.Lifecycle.
func (s *supervisor) Count() { s.events.Add(1) }

func (s *supervisor) status(st *core.PluginStatus) {
	st.Calls, st.Events, st.InFlight = s.total.Value(), s.events.Load(), s.calls.InFlight()
	s.mu.Lock()
	defer s.mu.Unlock()
	st.State, st.Generation, st.LastError = s.state, s.generation, s.lastErr
	if s.gen != nil {
		st.PID, st.Started = s.gen.pid, s.since
	}
}

func (s *supervisor) control() bridge.Control {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gen == nil {
		return nil
	}
	return s.gen.control
}

func (s *supervisor) setState(state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = state
}

// Start implements bridge.Lifecycle. The first start is tried once: what cannot
// start at all is a mistake that the operator should hear of.
func (s *supervisor) Start(ctx context.Context, c bridge.Client) error {
	err := fmt.Errorf("plugins: %s: started twice", s.id)
	s.startOnce.Do(func() {
		s.mu.Lock()
		stopping := s.stopping
		if !stopping {
			s.running.Add(1) // Stop waits for this start
		}
		s.mu.Unlock()
		if stopping {
			err = fmt.Errorf("plugins: %s: %w", s.id, channel.ErrClosed)
			return
		}
		defer s.running.Done()
		s.client = c
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(s.ctx, cancel)()
		if err = s.up(ctx); err != nil {
			s.setState(stateDown)
			err = fmt.Errorf("plugins: start %s: %w", s.id, err)
			return
		}
		s.running.Go(s.watch)
	})
	return err
}

// up brings up the next generation, ready for calls.
func (s *supervisor) up(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.StartTimeout)
	defer cancel()
	s.mu.Lock()
	s.state = stateStarting
	s.generation++
	n := s.generation
	s.mu.Unlock()

	began := time.Now()
	g, err := s.launch(ctx, n, s.client)
	if err != nil {
		s.noteError(err)
		return err
	}
	if g.control != nil {
		err = g.control.Health(ctx)
	}
	if err == nil {
		// Last, because it lets waiting calls through.
		err = s.client.Begin(ctx, g.conn, n)
	}
	if err != nil {
		if frame.IsDisconnect(s.connErr(g)) {
			err = fmt.Errorf("%w (%s)", err, g.kill())
		} else {
			g.kill()
		}
		s.noteError(err)
		return err
	}
	s.mu.Lock()
	s.gen, s.state, s.since = g, stateReady, time.Now()
	s.mu.Unlock()
	s.log.Info("plugin is ready", zap.Int("pid", g.pid), zap.Int("generation", n), zap.Duration("after", time.Since(began)))
	return nil
}

// connErr returns why a generation's connection ended, or nil if it has not.
func (s *supervisor) connErr(g *generation) error {
	select {
	case <-g.conn.Done():
		return g.conn.Err()
	default:
		return nil
	}
}

func (s *supervisor) noteError(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastErr = err.Error()
}

// watch restarts the plugin whenever it ends, until Stop.
func (s *supervisor) watch() {
	h := history{cfg: s.cfg}
	for {
		s.mu.Lock()
		g, since := s.gen, s.since
		s.mu.Unlock()
		select {
		case <-s.ctx.Done():
			return // Stop ends the generation
		case <-g.conn.Done():
		}
		s.bury(g)
		h.died(time.Now(), since)
		if !s.revive(&h) {
			return
		}
	}
}

// bury ends what is left of a generation and says so.
func (s *supervisor) bury(g *generation) {
	s.mu.Lock()
	s.gen, s.state = nil, stateDown
	n := s.generation
	s.mu.Unlock()
	cause := g.conn.Err()
	how := g.kill()
	if !frame.IsDisconnect(cause) {
		// It was alive and has been killed; how it ended says nothing.
		how = cause.Error()
	}
	s.noteError(errors.New(how))
	s.deathCount.Inc()
	s.log.Warn("plugin has ended and is started again", zap.Int("pid", g.pid), zap.Int("generation", n), zap.String("reason", how))
}

// revive starts generations until one is ready; false means that Stop came
// first.
func (s *supervisor) revive(h *history) bool {
	for {
		delay, broken := h.delay(time.Now())
		if broken {
			s.declareBroken(h)
		} else if delay > 0 {
			s.setState(stateBackoff)
		}
		if !s.sleep(delay) {
			return false
		}
		s.restarts.Inc()
		err := s.up(s.ctx)
		if err == nil {
			return true
		}
		if s.ctx.Err() != nil {
			return false
		}
		s.deathCount.Inc()
		s.log.Warn("plugin did not start; it is tried again", zap.Error(err))
		h.died(time.Now(), time.Now())
	}
}

func (s *supervisor) declareBroken(h *history) {
	s.mu.Lock()
	s.state = stateBroken
	last := s.lastErr
	s.mu.Unlock()
	err := fmt.Errorf("%w: %s ended more than %d times within %v, last because: %s; it is tried again every %v",
		channel.ErrPluginDown, s.id, s.cfg.MaxDeaths, s.cfg.Within, last, s.cfg.BrokenRetry)
	s.fail(err)
	if !h.told {
		h.told = true
		s.log.Error("plugin is broken: it keeps ending", zap.Error(err))
	}
}

// sleep waits; false means that Stop came first.
func (s *supervisor) sleep(d time.Duration) bool {
	if d <= 0 {
		return s.ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// Stop implements bridge.Lifecycle.
func (s *supervisor) Stop(ctx context.Context) error {
	first := false
	s.stopOnce.Do(func() { first = true })
	if !first {
		select {
		case <-s.stopped:
			return nil // the first caller has the error
		case <-ctx.Done():
			return fmt.Errorf("plugins: stop %s: %w", s.id, ctx.Err())
		}
	}
	defer close(s.stopped)
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	s.cancel()
	s.running.Wait()
	s.mu.Lock()
	g := s.gen
	s.gen, s.state = nil, stateStopped
	s.mu.Unlock()
	if g != nil {
		s.stopErr = s.end(ctx, g)
	}
	s.fail(fmt.Errorf("plugin %s: %w", s.id, channel.ErrClosed))
	return s.stopErr
}

// fail lets everything fail that waits for a generation.
func (s *supervisor) fail(err error) {
	s.calls.Fail(err)
	if c, ok := s.client.(interface{ Fail(error) }); ok {
		c.Fail(err)
	}
}

// end stops a generation that is up.
func (s *supervisor) end(ctx context.Context, g *generation) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.StopTimeout)
	defer cancel()
	err := s.client.End(ctx, g.conn)
	if cause := s.connErr(g); cause != nil {
		// It died on the way; there is nothing left to be stopped.
		s.log.Debug("plugin ended while it was stopped", zap.Error(err), zap.NamedError("cause", cause))
		err = nil
	}
	if g.drain != nil {
		g.drain(ctx)
	}
	g.kill()
	return err
}

// history decides when the next generation may start. It is pure.
type history struct {
	cfg    *Config
	deaths []time.Time // within the window, oldest first
	row    int         // deaths in a row without a stable life between
	told   bool        // that it is broken
}

// died notes the end of a generation that had been ready since.
func (h *history) died(now, since time.Time) {
	if now.Sub(since) >= h.cfg.StableAfter {
		h.row, h.told = 0, false
	}
	h.row++
	h.deaths = append(h.deaths, now)
	for len(h.deaths) > 0 && now.Sub(h.deaths[0]) > h.cfg.Within {
		h.deaths = h.deaths[1:]
	}
}

// delay returns how long to wait before the next start.
func (h *history) delay(now time.Time) (d time.Duration, broken bool) {
	if len(h.deaths) > h.cfg.MaxDeaths {
		return h.cfg.BrokenRetry, true
	}
	if h.row <= 1 {
		return 0, false
	}
	d = h.cfg.BackoffMin
	for range min(h.row-2, 30) {
		if d = 2 * d; d >= h.cfg.BackoffMax {
			break
		}
	}
	d = min(d, h.cfg.BackoffMax)
	return d - d/5 + rand.N(2*d/5+1), false
}

// bridgedEnd bounds the end of a component behind a pipe.
const bridgedEnd = 5 * time.Second

// bridgedLauncher brings up components in this process, behind a pipe.
func bridgedLauncher(s *supervisor, make func() (any, error), log *zap.Logger) launcher {
	return func(_ context.Context, _ int, h frame.Handler) (*generation, error) {
		c, err := make()
		if err != nil {
			return nil, err
		}
		near, far := net.Pipe()
		server, err := bridge.Serve(far, c, frame.Config{}, log)
		if err != nil {
			return nil, errors.Join(err, near.Close(), far.Close())
		}
		conn := frame.NewConn(near, s.calls, h, s.cfg.connConfig())
		return &generation{conn: conn, kill: func() string {
			conn.Close(frame.ErrClosed)
			conn.Wait()
			ctx, cancel := context.WithTimeout(context.Background(), bridgedEnd)
			defer cancel()
			if err := errors.Join(conn.WaitHandlers(ctx), server.Close(ctx)); err != nil {
				return "ended with: " + err.Error()
			}
			return "ended"
		}}, nil
	}
}
