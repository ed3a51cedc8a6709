package rpc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// Mode says which replies a call waits for.
type Mode uint8

const (
	// First waits for one good reply.
	First Mode = iota + 1
	// Majority waits for good replies of at least half of the members that have
	// such an RPC and stay in the group, as Tribes does.
	Majority
	// All waits until every member has replied, failed, left or said that it
	// has no such RPC; each failure makes the call fail.
	All
	// None waits for no reply: only until the request has been sent.
	None
)

// String returns the mode in one word.
func (m Mode) String() string {
	if m < First || m > None {
		return "unknown"
	}
	return [...]string{"first", "majority", "all", "none"}[m-First]
}

// Errors of calls and replies that a caller may branch on.
var (
	// ErrAbsent: the member has no RPC of that name.
	ErrAbsent = errors.New("rpc: no RPC of that name there")
	// ErrGone: the member has left the group, or is not in it.
	ErrGone = errors.New("rpc: the member is not in the group")
	// ErrBusy: the member, or this node, has too many calls at a time.
	ErrBusy = errors.New("rpc: too many calls at a time")
	// ErrReplyTooLarge: the reply is beyond Config.MaxReply.
	ErrReplyTooLarge = fmt.Errorf("rpc: reply is larger than max_reply: %w", channel.ErrTooLarge)
	// ErrIncomplete: the call has ended without the replies it wanted.
	ErrIncomplete = errors.New("rpc: not all replies that were wanted have come")
	// ErrNameTaken: the channel has an RPC of that name already.
	ErrNameTaken = errors.New("rpc: the channel has an RPC of that name already")
)

// RemoteError is the error that a handler on another member has returned.
type RemoteError struct{ Text string }

// Error returns the text.
func (e *RemoteError) Error() string { return "rpc: the handler failed: " + e.Text }

// Reply is how a call ended for one member.
type Reply struct {
	Member channel.Member
	Body   Body
	// Err is why there is no body: [ErrAbsent], [ErrGone], a [RemoteError], or
	// what sending has failed with.
	Err error
}

// Handler answers requests. It runs in a goroutine of its own, many at a time,
// and may block and make calls itself, also to who has asked (unless
// Config.Quick is set). ctx ends when the
// caller does not wait any longer, and when the RPC is closed. The body belongs
// to the handler. An error is told to a Longhouse caller as text; to a Tribes
// caller it is a reply of null.
type Handler func(ctx context.Context, from channel.Member, body Body) (Body, error)

// Config bounds an RPC. Every bound has a counter, see [New].
type Config struct {
	// MaxReply bounds the body of one reply, and of a request, in bytes.
	MaxReply int `yaml:"max_reply"`
	// MaxServing bounds the requests that are served at a time; further ones
	// are answered by [ErrBusy].
	MaxServing int `yaml:"max_serving"`
	// MaxCalls bounds the calls that wait at a time.
	MaxCalls int `yaml:"max_calls"`
	// ServeTimeout bounds a handler whose caller does not say how long it waits.
	ServeTimeout time.Duration `yaml:"serve_timeout"`
	// ReplyOptions is what replies to Longhouse nodes are sent with; those to
	// Tribes' nodes have its bits without SyncAck.
	ReplyOptions channel.Options `yaml:"reply_options"`
	// Quick says that the handler never blocks and makes no calls. It then runs
	// where the request was received, which saves waking another thread, and
	// holds up the connection while it does.
	Quick bool `yaml:"quick"`
	// Depth bounds how deep Java values may be nested.
	Depth int `yaml:"depth"`
	// LeftOver is told of good replies that came after their call had ended. It
	// must not block. It may be nil.
	LeftOver func(Reply) `yaml:"-"`
	// Dialect says which class versions are written for Tribes' nodes; nil for
	// those of Tomcat 10.1.
	Dialect *jser.Dialect `yaml:"-"`
}

// DefaultConfig returns the defaults: replies of 16 MiB, 4096 requests and
// 65,536 calls at a time, 30 s for a handler, unacknowledged replies.
func DefaultConfig() Config {
	return Config{MaxReply: 16 << 20, MaxServing: 4096, MaxCalls: 65536, ServeTimeout: 30 * time.Second,
		ReplyOptions: channel.SendNone, Depth: jser.DefaultDepth}
}

// Validate returns all problems, joined.
func (c Config) Validate() error {
	var errs []error
	atLeast := func(name string, n, low int) {
		if n < low || n > math.MaxInt32 {
			errs = append(errs, fmt.Errorf("rpc: %s is %d, must be %d to %d", name, n, low, math.MaxInt32))
		}
	}
	atLeast("max_reply", c.MaxReply, 1)
	atLeast("max_serving", c.MaxServing, 1)
	atLeast("max_calls", c.MaxCalls, 1)
	atLeast("depth", c.Depth, 1)
	if c.ServeTimeout <= 0 {
		errs = append(errs, fmt.Errorf("rpc: serve_timeout is %v, must be positive", c.ServeTimeout))
	}
	return errors.Join(errs...)
}

// RPC is one named service of a channel. All methods may be called from any
// goroutine.
type RPC struct {
	hub     *hub
	name    []byte
	handler Handler
	cfg     Config
	log     *zap.Logger
	limits  jser.Limits

	ctx    context.Context // ends when the RPC is closed
	cancel context.CancelFunc
	// Guarded by hub.mu.
	serving, calling int
	closed           bool
	wg               sync.WaitGroup // handlers; added to with hub.mu held

	sent, served, replied, late, duplicate, strange, unanswered *channel.Counter
	refused                                                     map[string]*channel.Counter
	failed                                                      *channel.Counter
}

// New adds an RPC of that name, 1 to 255 bytes, to a channel that may be
// running. With a nil handler it only calls: requests for it are answered as if
// it were absent. Two of one name on a channel are refused with [ErrNameTaken].
//
// Counters: rpc_calls_total, rpc_served_total, rpc_replies_total,
// rpc_late_replies_total, rpc_duplicate_replies_total,
// rpc_foreign_replies_total, rpc_absent_total, rpc_handler_errors_total and
// rpc_refused_total by reason.
func New(ch *channel.Channel, name string, h Handler, c Config, s channel.Settings) (*RPC, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if len(name) < 1 || len(name) > maxName {
		return nil, fmt.Errorf("rpc: the name has %d bytes, must have 1 to %d", len(name), maxName)
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	r := &RPC{name: []byte(name), handler: h, cfg: c, log: s.Logger,
		limits: jser.Limits{Size: c.MaxReply + 1<<16, Depth: c.Depth, KeepUnlisted: true}}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	count := func(n, help string) *channel.Counter { return s.Metrics.Counter(n, help, "rpc", name) }
	r.sent = count("rpc_calls_total", "Calls made.")
	r.served = count("rpc_served_total", "Requests served.")
	r.failed = count("rpc_handler_errors_total", "Requests whose handler failed or panicked.")
	r.replied = count("rpc_replies_total", "Replies that a call has waited for.")
	r.late = count("rpc_late_replies_total", "Replies that came after their call had ended.")
	r.duplicate = count("rpc_duplicate_replies_total", "Second replies of one member.")
	r.strange = count("rpc_foreign_replies_total", "Replies of members that were not asked.")
	r.unanswered = count("rpc_unsent_replies_total", "Replies that could not be sent.")
	r.refused = map[string]*channel.Counter{}
	for _, why := range []string{"too_large", "busy", "malformed", "calls"} {
		r.refused[why] = s.Metrics.Counter("rpc_refused_total", "Requests, replies and calls that were refused.", "rpc", name, "reason", why)
	}
	if err := attach(ch, s, r); err != nil {
		return nil, err
	}
	return r, nil
}

// Name returns the name.
func (r *RPC) Name() string { return string(r.name) }

// Close ends the RPC: calls fail with [channel.ErrClosed], handlers see their
// context end, and Close waits for them as long as ctx allows. Close it before
// the channel is stopped. It works twice; do not call it from a handler.
func (r *RPC) Close(ctx context.Context) error {
	r.hub.detach(r)
	r.cancel()
	done := make(chan struct{})
	go func() {
		r.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("rpc: close: handlers of %q are still running: %w", r.name, ctx.Err())
	}
}

// dest is one member of a call, as far as it has come.
type dest struct {
	id    channel.UniqueID
	ended bool
}

// call is one call that waits. It is guarded by hub.mu.
type call struct {
	rpc     *RPC
	number  uint64
	mode    Mode
	to      []channel.Member
	dests   []dest
	replies []Reply
	ended   int // dests that have ended
	good    int
	missing int           // absent or gone
	done    chan struct{} // capacity 1
	over    bool

	// Room for a call to one member.
	oneDest  [1]dest
	oneReply [1]Reply
}

// Call asks the members and waits as the mode says. o says how requests are
// sent, SyncAck and Async apart, which have no meaning here; 0 is SendNone. The
// local member may be among to.
//
// The replies are those that have come, in their order, and for each member
// that has ended without one the reason. The error is nil if the mode has what
// it wants. It is [channel.ErrNoMembers] for an empty to; else it is an
// [ErrIncomplete] with the reasons inside: those of the members, and that of ctx
// if it has ended. Members that have left or have no such RPC are no failure as
// long as others have replied.
func (r *RPC) Call(ctx context.Context, to []channel.Member, body Body, m Mode, o channel.Options) ([]Reply, error) {
	if m < First || m > None {
		return nil, fmt.Errorf("rpc: call: mode %d: %w", m, channel.ErrNotConfigured)
	}
	if len(to) == 0 {
		return nil, fmt.Errorf("rpc: call %q: %w", r.name, channel.ErrNoMembers)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("rpc: call %q: %w", r.name, err)
	}
	r.sent.Inc()
	c := &call{rpc: r, mode: m, to: to, done: make(chan struct{}, 1)}
	if len(to) == 1 {
		c.dests, c.replies = c.oneDest[:], c.oneReply[:0]
	} else {
		c.dests = make([]dest, len(to))
	}
	for i := range to {
		c.dests[i].id = to[i].ID
	}
	if err := r.hub.begin(c); err != nil {
		return nil, err
	}
	r.hub.checkView(c)
	r.hub.ask(ctx, c, body, o)
	if m == None {
		r.hub.finish(c)
	}
	select {
	case <-c.done:
	default:
		select {
		case <-c.done:
		case <-ctx.Done():
			r.hub.finish(c)
		}
	}
	return r.hub.result(ctx, c)
}

// satisfied reports whether the call has what it wants, or cannot get it any
// more.
func (c *call) satisfied() bool {
	if c.ended == len(c.dests) {
		return true
	}
	switch c.mode {
	case First:
		return c.good > 0
	case Majority:
		return c.good > 0 && 2*c.good >= len(c.dests)-c.missing
	}
	return false
}

// err returns nil if the call has what it wants.
func (c *call) err() error {
	ok := false
	switch c.mode {
	case First:
		ok = c.good > 0
	case Majority:
		ok = c.good > 0 && 2*c.good >= len(c.dests)-c.missing
	case All:
		ok = c.good > 0 && c.good+c.missing == len(c.dests)
	}
	if ok {
		return nil
	}
	errs := []error{ErrIncomplete}
	for _, p := range c.replies {
		if p.Err != nil {
			errs = append(errs, fmt.Errorf("%v: %w", p.Member, p.Err))
		}
	}
	return errors.Join(errs...)
}
