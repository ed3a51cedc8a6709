// Package failuredetector is the interceptor that checks members over TCP
// before they are removed. It imports channel and channel/wire only; it must
// not import core, plugins or fx.
package failuredetector

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

const (
	// maxChecks bounds the checks that run at once.
	maxChecks = 32
	// maxBackoff bounds the time between two checks of a member that has been
	// removed although its heartbeats go on.
	maxBackoff = 30 * time.Second
)

// Config is what a user writes.
type Config struct {
	// ConnectTimeout bounds the connecting of a check.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	// ReadTimeout bounds the wait for the member's answer.
	ReadTimeout time.Duration `yaml:"read_timeout"`
	// Probe: a member must answer a message; otherwise it is enough that it
	// accepts the connection, which a stopped process does too.
	Probe bool `yaml:"probe"`
	// Attempts is how often a check is tried before the member counts as
	// failed.
	Attempts int `yaml:"attempts"`
}

// Defaults asks for an answer once, within two seconds in all.
var Defaults = Config{ConnectTimeout: time.Second, ReadTimeout: time.Second, Probe: true, Attempts: 1}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.ConnectTimeout <= 0 {
		errs = append(errs, fmt.Errorf("failuredetector: connect_timeout is %v, must be positive", c.ConnectTimeout))
	}
	if c.ReadTimeout <= 0 {
		errs = append(errs, fmt.Errorf("failuredetector: read_timeout is %v, must be positive", c.ReadTimeout))
	}
	if c.Attempts < 1 || c.Attempts > 10 {
		errs = append(errs, fmt.Errorf("failuredetector: attempts is %d, must be 1 to 10", c.Attempts))
	}
	return errors.Join(errs...)
}

// Factory makes failure detectors.
var Factory = channel.FactoryOf("failuredetector", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// Interceptor checks members that are lost or suspected below.
type Interceptor struct {
	cfg    Config
	log    *zap.Logger
	prober prober

	checks, answered, unanswered, vetoed, restored, swallowed *channel.Counter

	mu      sync.Mutex
	link    channel.Link // set by Start
	ctx     context.Context
	cancel  context.CancelFunc
	stopped bool
	// suspects are the members in doubt. It is bounded by the members that the
	// channel knows.
	suspects map[channel.UniqueID]*suspect
	running  int        // checks
	waiting  []*suspect // for a check

	workers sync.WaitGroup
}

// suspect is a member in doubt. Its fields are guarded by Interceptor.mu.
type suspect struct {
	member channel.Member
	// silent: lost below. Otherwise its heartbeats go on.
	silent bool
	// removed: it failed the check although it is not lost below. It is
	// checked again until it answers, is lost or leaves.
	removed bool
	// busy: a check runs or waits to run.
	busy  bool
	next  time.Time // of the next check, if removed
	pause time.Duration
	cause error
}

// New makes a failure detector.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Net == nil {
		return nil, fmt.Errorf("failuredetector: network: %w", channel.ErrNotConfigured)
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	f := &Interceptor{
		cfg:        c,
		log:        s.Logger,
		prober:     prober{net: s.Net, cfg: c},
		checks:     s.Metrics.Counter("failuredetector_checks_total", "Checks of members."),
		answered:   s.Metrics.Counter("failuredetector_answered_total", "Checks that the member answered."),
		unanswered: s.Metrics.Counter("failuredetector_unanswered_total", "Checks that the member did not answer."),
		vetoed:     s.Metrics.Counter("failuredetector_vetoed_total", "Members that were kept although their heartbeats were missing."),
		restored:   s.Metrics.Counter("failuredetector_restored_total", "Removed members that answered again."),
		swallowed:  s.Metrics.Counter("failuredetector_probes_received_total", "Checks by other members."),
		suspects:   map[channel.UniqueID]*suspect{},
	}
	s.Metrics.Gauge("failuredetector_suspects", "Members in doubt.", func() float64 {
		f.mu.Lock()
		defer f.mu.Unlock()
		return float64(len(f.suspects))
	})
	return f, nil
}

// Descriptor implements channel.Interceptor.
func (f *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:     "failuredetector",
		Stateful: true,
		Below:    []string{channel.UnmarkedTransforms},
		Provides: []string{channel.PropCheckedRemoval},
		Promise:  "removes a member only after it has failed a check over TCP",
	}
}

// Start implements channel.Starter.
func (f *Interceptor) Start(_ context.Context, l channel.Link) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.link = l
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return nil
}

// Stop implements channel.Stopper. Running checks are broken off.
func (f *Interceptor) Stop(context.Context) error {
	f.mu.Lock()
	f.stopped, f.waiting = true, nil
	if f.cancel != nil {
		f.cancel()
	}
	f.mu.Unlock()
	f.workers.Wait()
	return nil
}

// HandleReceive implements channel.ReceiveHandler: checks by other members end
// here; that they are acknowledged is the receiver's part.
func (f *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if len(m.Body) == len(probeBody) && string(m.Body) == probeBody {
		f.swallowed.Inc()
		return nil
	}
	return l.Deliver(ctx, m)
}

// HandleMember implements channel.MemberHandler.
func (f *Interceptor) HandleMember(_ context.Context, l channel.Link, ev channel.MemberEvent) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	// Events are announced with the lock held, so that their order is that of
	// the decisions; Link.Announce does not block.
	s := f.suspects[ev.Member.ID]
	switch ev.Kind {
	case channel.MemberAdded:
		f.replaceHeld(l, ev.Member)
		delete(f.suspects, ev.Member.ID)
		return l.Announce(context.Background(), ev)
	case channel.MemberUpdated:
		if s != nil {
			s.member = ev.Member
			if s.removed {
				return nil // announced when it answers
			}
		}
		return l.Announce(context.Background(), ev)
	case channel.MemberLost:
		if ev.Final() {
			break
		}
		if s == nil {
			s = f.doubt(ev)
		}
		s.silent, s.cause = true, ev.Err
		if s.removed { // it has been removed already, now for good
			delete(f.suspects, ev.Member.ID)
			return nil
		}
		f.check(s)
		return nil
	case channel.MemberSuspected:
		if s == nil {
			f.check(f.doubt(ev))
		} else if !s.removed {
			f.check(s)
		}
		return nil
	}
	delete(f.suspects, ev.Member.ID)
	return l.Announce(context.Background(), ev)
}

// replaceHeld removes members that are held here at the address of a new one:
// from now on that one answers their checks. f.mu is held.
func (f *Interceptor) replaceHeld(l channel.Link, added channel.Member) {
	for id, s := range f.suspects {
		if id != added.ID && s.member.Addr() == added.Addr() {
			delete(f.suspects, id)
			_ = l.Announce(context.Background(), channel.MemberEvent{Kind: channel.MemberLost, Member: s.member, Err: channel.ErrReplaced})
		}
	}
}

// doubt notes a new suspect; f.mu is held.
func (f *Interceptor) doubt(ev channel.MemberEvent) *suspect {
	s := &suspect{member: ev.Member, cause: ev.Err}
	f.suspects[ev.Member.ID] = s
	return s
}

// check has a suspect checked, now or when it is its turn; f.mu is held.
func (f *Interceptor) check(s *suspect) {
	if s.busy || f.stopped {
		return
	}
	s.busy = true
	if f.running >= maxChecks {
		f.waiting = append(f.waiting, s)
		return
	}
	f.running++
	f.workers.Add(1)
	go f.work(s)
}

// work checks s, and then whoever waits.
func (f *Interceptor) work(s *suspect) {
	defer f.workers.Done()
	for s != nil {
		f.mu.Lock()
		m, local, ctx := s.member, f.link.Local(), f.ctx
		wanted := f.suspects[m.ID] == s
		f.mu.Unlock()
		var err error
		if wanted {
			f.checks.Inc()
			err = f.prober.check(ctx, local, m)
		}
		s = f.done(s, err)
	}
}

// done draws the conclusion of a check and returns the next suspect to check.
func (f *Interceptor) done(s *suspect, err error) (next *suspect) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.busy = false
	if f.suspects[s.member.ID] == s && !f.stopped {
		if err == nil {
			f.alive(s)
		} else {
			f.dead(s, err)
		}
	}
	if len(f.waiting) == 0 {
		f.running--
		return nil
	}
	next = f.waiting[0]
	f.waiting = f.waiting[1:]
	return next
}

// alive keeps or brings back a member that has answered; f.mu is held.
func (f *Interceptor) alive(s *suspect) {
	f.answered.Inc()
	if s.removed {
		f.restored.Inc()
		_ = f.link.Announce(f.ctx, channel.MemberEvent{Kind: channel.MemberAdded, Member: s.member})
	}
	if !s.silent {
		delete(f.suspects, s.member.ID)
		return
	}
	if s.pause == 0 { // the first answer of this silence
		s.pause = 1
		f.vetoed.Inc()
		f.log.Info("member kept: its heartbeats are missing, but it answers over TCP", zap.Stringer("member", s.member))
	}
}

// dead removes a member that has not answered; f.mu is held.
func (f *Interceptor) dead(s *suspect, err error) {
	f.unanswered.Inc()
	if !s.removed {
		cause := fmt.Errorf("failuredetector: %w", err)
		if s.cause != nil {
			cause = fmt.Errorf("%w (after: %w)", cause, s.cause)
		}
		_ = f.link.Announce(f.ctx, channel.MemberEvent{Kind: channel.MemberLost, Member: s.member, Err: cause})
	}
	if s.silent {
		delete(f.suspects, s.member.ID)
		return
	}
	s.removed = true
	s.pause = min(max(2*s.pause, time.Second), maxBackoff)
	s.next = time.Now().Add(s.pause)
}

// HandleTick implements channel.TickHandler: members that are kept although
// silent are checked at every tick, removed ones with back-off.
func (f *Interceptor) HandleTick(_ context.Context, _ channel.Link, now time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.suspects {
		if s.silent || s.removed && !now.Before(s.next) {
			f.check(s)
		}
	}
	return nil
}
