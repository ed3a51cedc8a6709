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
	// minBackoff and maxBackoff bound the time between two checks of a member
	// that is not shown although its heartbeats go on.
	minBackoff = time.Second
	maxBackoff = 30 * time.Second
	// maxMaxChecks bounds Config.MaxChecks.
	maxMaxChecks = 1024
)

// Who has to acknowledge the message of a check.
const (
	// Always: every member.
	Always = "always"
	// Auto: members that announce themselves as Longhouse nodes, and others
	// when their heartbeats are missing too. A Tomcat node acknowledges only
	// when one of its few receiver threads is free, so a busy one may not.
	Auto = "auto"
	// Never: it is enough that the message can be written.
	Never = "never"
)

// Config is what a user writes.
type Config struct {
	// ConnectTimeout bounds the connecting of a check.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	// ReadTimeout bounds the wait for the member's answer.
	ReadTimeout time.Duration `yaml:"read_timeout"`
	// Probe: a message is written to the member and acknowledged by it;
	// otherwise it is enough that it accepts the connection, which a stopped
	// process does too.
	Probe bool `yaml:"probe"`
	// ReadTest says who must acknowledge the message: Always, Auto or Never.
	ReadTest string `yaml:"read_test"`
	// CheckNew: a member is shown to the layers above only after it has passed
	// a check.
	CheckNew bool `yaml:"check_new"`
	// MaxChecks bounds the checks that run at once; the others wait.
	MaxChecks int `yaml:"max_checks"`
	// Attempts is how often a check is tried before the member counts as
	// failed. Each opens several connections, one after the other, as long as
	// there is no answer.
	Attempts int `yaml:"attempts"`
}

// Defaults asks for an answer three times, within three seconds if nobody is there.
var Defaults = Config{
	ConnectTimeout: time.Second, ReadTimeout: time.Second, Probe: true, ReadTest: Auto, CheckNew: true, MaxChecks: 32, Attempts: 3,
}

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
	if c.ReadTest != Always && c.ReadTest != Auto && c.ReadTest != Never {
		errs = append(errs, fmt.Errorf("failuredetector: read_test is %q, must be always, auto or never", c.ReadTest))
	}
	if c.MaxChecks < 1 || c.MaxChecks > maxMaxChecks {
		errs = append(errs, fmt.Errorf("failuredetector: max_checks is %d, must be 1 to %d", c.MaxChecks, maxMaxChecks))
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

	checks, answered, unanswered, vetoed, restored, held, delayed, swallowed *channel.Counter

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
	// removed: the layers above do not see it although it is not lost below.
	// It is checked again until it answers, is lost or leaves.
	removed bool
	// fresh: it is removed because it has not passed its first check.
	fresh bool
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
		held:       s.Metrics.Counter("failuredetector_held_back_total", "Newcomers that were not shown because they failed their first check."),
		delayed:    s.Metrics.Counter("failuredetector_delayed_total", "Checks that had to wait because max_checks others were running."),
		swallowed:  s.Metrics.Counter("failuredetector_probes_received_total", "Checks by other members."),
		suspects:   map[channel.UniqueID]*suspect{},
	}
	s.Metrics.Gauge("failuredetector_suspects", "Members in doubt.", func() float64 {
		f.mu.Lock()
		defer f.mu.Unlock()
		return float64(len(f.suspects))
	})
	s.Metrics.Gauge("failuredetector_waiting", "Checks that wait for others to end.", func() float64 {
		f.mu.Lock()
		defer f.mu.Unlock()
		return float64(len(f.waiting))
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
		if f.cfg.CheckNew && (s == nil || s.removed) && !f.stopped {
			s = &suspect{member: ev.Member, removed: true, fresh: true}
			f.suspects[ev.Member.ID] = s
			f.check(s)
			return nil // announced when it answers
		}
		delete(f.suspects, ev.Member.ID)
		return l.Announce(context.Background(), ev)
	case channel.MemberUpdated:
		if s != nil {
			moved := s.member.Addr() != ev.Member.Addr()
			s.member = ev.Member
			if s.removed {
				if moved {
					f.check(s)
				}
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
			if !s.fresh || !s.busy { // otherwise its first check decides
				delete(f.suspects, ev.Member.ID)
			}
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
	if f.running >= f.cfg.MaxChecks {
		f.delayed.Inc()
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
		m, silent, ctx := s.member, s.silent, f.ctx
		wanted := f.suspects[m.ID] == s
		f.mu.Unlock()
		var err error
		if wanted {
			f.checks.Inc()
			err = f.prober.check(ctx, f.link.Local(), m, f.mustAnswer(m, silent))
		}
		s = f.done(s, err)
	}
}

// mustAnswer reports whether m fails its check by not acknowledging it.
func (f *Interceptor) mustAnswer(m channel.Member, silent bool) bool {
	if f.cfg.ReadTest != Auto {
		return f.cfg.ReadTest == Always
	}
	_, longhouse := m.Announcement()
	return longhouse || silent
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
		if !s.fresh {
			f.restored.Inc()
		}
		s.removed, s.fresh = false, false
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
	if s.fresh && s.pause == 0 {
		f.held.Inc()
		f.log.Warn("member not shown: its heartbeats arrive, but it does not pass a check over TCP; it is checked again and again",
			zap.Stringer("member", s.member), zap.Error(err))
	}
	s.removed = true
	s.pause = min(max(2*s.pause, minBackoff), maxBackoff)
	s.next = time.Now().Add(s.pause)
}

// HandleTick implements channel.TickHandler: members that are kept although
// silent are checked at every tick, removed ones with back-off.
func (f *Interceptor) HandleTick(context.Context, channel.Link, time.Time) error {
	now := time.Now() // with its monotonic part
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.suspects {
		if s.silent || s.removed && !now.Before(s.next) {
			f.check(s)
		}
	}
	return nil
}
