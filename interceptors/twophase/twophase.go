// Package twophase is the interceptor that lets all destinations deliver a
// message or none: it is sent, held by the receivers, and delivered when its
// confirmation comes. It imports package channel only; it must not import core,
// plugins or fx.
package twophase

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

const (
	// couriers is how many goroutines send what this layer has to say.
	couriers = 4
	// maxOutbox bounds what waits for them; more is asked again later.
	maxOutbox = 256
	// maxQuestions bounds the questions of one tick.
	maxQuestions = 4096
	// maxAgain bounds the confirmations that are repeated, and again how often.
	maxAgain   = 1024
	againTimes = 5
	// courierTimeout bounds the sending of one message by a courier.
	courierTimeout = 3 * time.Second
)

// ErrAborted is the reason for the members that have a message and will not
// deliver it, because another one has not got it.
var ErrAborted = errors.New("twophase: not delivered, because not all members received the message")

// Config is what a user writes.
type Config struct {
	// OptionFlag is the option bit that marks the messages of this layer; 0
	// means all messages, as Tomcat's default. All nodes need the same.
	OptionFlag channel.Options `yaml:"option_flag"`
	// Expire is how long a message is held without being confirmed.
	Expire time.Duration `yaml:"expire"`
	// MaxMessages and MaxBytes bound what is held. A single sender may use half
	// of it.
	MaxMessages int   `yaml:"max_messages"`
	MaxBytes    int64 `yaml:"max_bytes"`
	// AskAfter is how long a confirmation may take before other nodes are
	// asked.
	AskAfter time.Duration `yaml:"ask_after"`
	// MaxInFlight bounds the messages that are being sent.
	MaxInFlight int `yaml:"max_in_flight"`
	// Remember bounds the messages whose fate is remembered, for twice Expire.
	Remember int `yaml:"remember"`
}

// Defaults hold 10,000 messages or 64 MiB for a minute.
var Defaults = Config{
	OptionFlag: channel.TwoPhase, Expire: time.Minute, MaxMessages: 10_000, MaxBytes: 64 << 20, AskAfter: 2 * time.Second,
	MaxInFlight: 1024, Remember: 65536,
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf("twophase: "+format, args...)) }
	if c.OptionFlag != 0 && (c.OptionFlag < 0x10 || bits.OnesCount32(uint32(c.OptionFlag)) != 1) {
		fail("option_flag is 0x%x, must be one bit from 0x10 up, or 0 for all messages", uint32(c.OptionFlag))
	}
	if c.Expire < time.Second {
		fail("expire is %v, must be at least 1s", c.Expire)
	}
	if c.MaxMessages < 1 {
		fail("max_messages is %d, must be at least 1", c.MaxMessages)
	}
	if c.MaxBytes < 1 {
		fail("max_bytes is %d, must be at least 1", c.MaxBytes)
	}
	if c.AskAfter < 10*time.Millisecond || c.AskAfter > c.Expire {
		fail("ask_after is %v, must be at least 10ms and at most expire (%v)", c.AskAfter, c.Expire)
	}
	if c.MaxInFlight < 1 || c.MaxInFlight > 1<<20 {
		fail("max_in_flight is %d, must be 1 to %d", c.MaxInFlight, 1<<20)
	}
	if c.Remember < 1 {
		fail("remember is %d, must be at least 1", c.Remember)
	}
	return errors.Join(errs...)
}

// Factory makes two-phase interceptors.
var Factory = channel.FactoryOf("twophase", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// Interceptor sends and holds messages in two phases.
type Interceptor struct {
	cfg Config
	log *zap.Logger

	sent, cancelled, repeated                          *channel.Counter // as sender
	delivered, recovered, dropped, expired             *channel.Counter // as receiver
	full, twice, early, late, malformed, asks, overrun *channel.Counter
	forgotten, waited                                  *channel.Counter

	slots    chan struct{}  // one for every message that is being sent
	confirms chan *transfer // whose messages all have; as many as slots
	outbox   chan letter
	cancel   context.CancelFunc // set by Start
	ctx      context.Context
	wg       sync.WaitGroup

	mu      sync.Mutex
	link    channel.Link
	stopped bool
	table   *table // of other nodes' messages
	own     *table // fates of this node's messages
	again   []again
}

// letter is something for a courier.
type letter struct {
	to      []channel.Member
	options channel.Options
	body    []byte
}

// again is a confirmation that has not reached a member.
type again struct {
	to      channel.Member
	id      channel.UniqueID
	options channel.Options
	next    time.Time
	left    int
}

// New makes a two-phase interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	m := s.Metrics
	x := &Interceptor{
		cfg: c, log: s.Logger,
		sent:      m.Counter("twophase_sent_total", "Messages that were confirmed by this node."),
		cancelled: m.Counter("twophase_cancelled_total", "Messages of this node that were not confirmed, because a member did not receive them."),
		repeated:  m.Counter("twophase_confirmations_repeated_total", "Confirmations that were sent again."),
		delivered: m.Counter("twophase_delivered_total", "Messages delivered on their confirmation."),
		recovered: m.Counter("twophase_recovered_total", "Messages delivered because another node has said that they are confirmed."),
		dropped:   m.Counter("twophase_dropped_total", "Held messages dropped because they will not be confirmed."),
		expired:   m.Counter("twophase_expired_total", "Held messages dropped because nothing was heard of them in time."),
		full:      m.Counter("twophase_refused_total", "Messages refused because there was no room to hold them."),
		twice:     m.Counter("twophase_duplicates_total", "Messages and confirmations that came twice, ignored."),
		early:     m.Counter("twophase_early_confirmations_total", "Confirmations without a message; it may still come."),
		late:      m.Counter("twophase_late_rejected_total", "Messages and confirmations that came after the message had been given up."),
		malformed: m.Counter("twophase_malformed_discarded_total", "Malformed or unwanted messages of other nodes about the fate of messages."),
		asks:      m.Counter("twophase_questions_total", "Questions about the fate of a message that were sent."),
		overrun:   m.Counter("twophase_outbox_dropped_total", "Questions, answers and repeated confirmations that were not sent because too many were waiting."),
		forgotten: m.Counter("twophase_forgotten_total", "Fates of messages that were forgotten before their time because there were too many."),
		waited:    m.Counter("twophase_waited_total", "Sends that had to wait because max_in_flight others were under way."),
		slots:     make(chan struct{}, c.MaxInFlight),
		confirms:  make(chan *transfer, c.MaxInFlight),
		outbox:    make(chan letter, maxOutbox),
		table:     newTable(c),
		own:       newTable(c),
	}
	gauge := func(name, help string, read func() float64) {
		m.Gauge(name, help, func() float64 {
			x.mu.Lock()
			defer x.mu.Unlock()
			return read()
		})
	}
	gauge("twophase_held_messages", "Messages that wait for their confirmation.", func() float64 { return float64(len(x.table.held)) })
	gauge("twophase_held_bytes", "Bytes of messages that wait for their confirmation.", func() float64 { return float64(x.table.bytes) })
	return x, nil
}

// Descriptor implements channel.Interceptor. Mutates stands for: all nodes need
// the layer.
func (x *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:     "twophase",
		Flag:     x.cfg.OptionFlag,
		Mutates:  true,
		Stateful: true,
		Above:    []string{"dispatch", "failuredetector"},
		Promise:  "a marked message is delivered by all its destinations or by none, as far as the network allows",
	}
}

func (x *Interceptor) handles(o channel.Options) bool { return o.Has(x.cfg.OptionFlag) }

// acks are the options that say how a message is sent. The message itself is
// always acknowledged when it is held; its confirmation is sent as the
// application wants it.
const acks = channel.UseAck | channel.SyncAck | channel.Async

// Start implements channel.Starter.
func (x *Interceptor) Start(_ context.Context, l channel.Link) error {
	ctx, cancel := context.WithCancel(context.Background())
	x.mu.Lock()
	x.link, x.ctx, x.cancel = l, ctx, cancel
	x.mu.Unlock()
	for range couriers {
		x.wg.Go(func() { x.courier(ctx, l) })
		x.wg.Go(func() { x.confirmer(ctx, l) })
	}
	return nil
}

// Stop implements channel.Stopper. Messages that all members have are confirmed
// first, as far as ctx allows.
func (x *Interceptor) Stop(ctx context.Context) error {
	x.mu.Lock()
	first := !x.stopped
	x.stopped = true
	cancel := x.cancel
	x.mu.Unlock()
	if cancel == nil || !first {
		return nil
	}
	close(x.confirms) // nobody sends to it any more
	confirmed := make(chan struct{})
	go func() { // ends with the goroutines it waits for
		x.wg.Wait()
		close(confirmed)
	}()
	close(x.outbox)
	select {
	case <-confirmed:
	case <-ctx.Done():
	}
	cancel()
	x.wg.Wait()
	return nil
}

// courier sends what is in the outbox.
func (x *Interceptor) courier(ctx context.Context, l channel.Link) {
	for c := range x.outbox {
		ctx, cancel := context.WithTimeout(ctx, courierTimeout)
		_ = l.Send(ctx, &channel.Message{
			ID: channel.NewUniqueID(), From: l.Local(), To: c.to, Options: c.options, Time: time.Now().UnixMilli(), Body: c.body,
		}) // what does not arrive is asked or told again
		cancel()
	}
}

// post hands a letter to the couriers; x.mu is held.
func (x *Interceptor) post(c letter) bool {
	if x.stopped || x.link == nil {
		return false
	}
	select {
	case x.outbox <- c:
		return true
	default:
		x.overrun.Inc()
		return false
	}
}

// HandleTick implements channel.TickHandler.
func (x *Interceptor) HandleTick(_ context.Context, l channel.Link, _ time.Time) error {
	v, now := l.View(), time.Now()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.own.expire(now)
	x.forgotten.Add(x.own.pushed + x.table.pushed)
	x.own.pushed, x.table.pushed = 0, 0
	if n := x.table.expire(now); n > 0 {
		x.expired.Add(int64(n))
		x.log.Warn("messages were not confirmed in time and are dropped", zap.Int("messages", n))
	}
	if len(x.table.held) > 0 {
		x.askAround(l, v, now)
	}
	x.repeat(v, now)
	return nil
}

// askAround asks for the fate of held messages; x.mu is held.
func (x *Interceptor) askAround(l channel.Link, v channel.View, now time.Time) {
	present := make(map[channel.UniqueID]bool, len(v.Members))
	var longhouse []channel.UniqueID
	for _, m := range v.Members {
		present[m.ID] = true
		if _, ok := m.Announcement(); ok {
			longhouse = append(longhouse, m.ID)
		}
	}
	for id, words := range x.table.questions(l.Local().ID, present, longhouse, now, maxQuestions) {
		m, _ := v.Get(id)
		x.talk(m, ask, words)
		x.asks.Add(int64(len(words)))
	}
}

// talk sends words to a member; x.mu is held.
func (x *Interceptor) talk(to channel.Member, kind byte, words []word) {
	for part := range slices.Chunk(words, maxEntries) {
		x.post(letter{to: []channel.Member{to}, options: channel.SendAck, body: appendTalk(nil, kind, part)})
	}
}

// repeat sends confirmations again that have not arrived; x.mu is held.
func (x *Interceptor) repeat(v channel.View, now time.Time) {
	x.again = slices.DeleteFunc(x.again, func(a again) bool { return a.left == 0 || !v.Has(a.to) })
	for i := range x.again {
		a := &x.again[i]
		if now.Before(a.next) {
			continue
		}
		a.left--
		a.next = now.Add(x.cfg.AskAfter << (againTimes - a.left))
		x.repeated.Inc()
		x.post(letter{to: []channel.Member{a.to}, options: a.options&^channel.Async | channel.UseAck, body: appendConfirm(nil, a.id)})
	}
}
