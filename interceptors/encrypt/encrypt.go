// Package encrypt is the interceptor that encrypts the bodies of messages and
// proves who sent them. It imports channel and channel/secret only; it must not
// import core, plugins or fx.
package encrypt

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
)

// The dialects: what encrypted bodies look like.
const (
	// DialectLonghouse is authenticated encryption among Longhouse nodes.
	DialectLonghouse = "longhouse"
	// DialectTomcat58 is that of Tomcat from 10.1.58 on: AES/GCM/NoPadding
	// unless another algorithm is set.
	DialectTomcat58 = "tomcat-10.1.58"
	// DialectTomcat56 is that of Tomcat 10.1.56 and 10.1.57: the same, with
	// AES/CBC/PKCS5Padding unless another algorithm is set.
	DialectTomcat56 = "tomcat-10.1.56"
	// DialectTomcat55 is that of Tomcat up to 10.1.55, which does not recognise
	// replays: AES/CBC/PKCS5Padding unless another algorithm is set.
	DialectTomcat55 = "tomcat-10.1.55"
)

// dialects lists them, for errors.
var dialects = []string{DialectLonghouse, DialectTomcat58, DialectTomcat56, DialectTomcat55}

const (
	// complaintInterval is the least time between two log lines about messages
	// that were refused for one reason.
	complaintInterval = time.Minute
	// maxPooled bounds the buffers that are kept for reuse, in bytes.
	maxPooled = 1 << 20
)

// Config is what a user writes.
type Config struct {
	// Dialect is the format of encrypted bodies: longhouse, or that of a
	// Tomcat release in groups with Tomcat nodes.
	Dialect string `yaml:"dialect"`
	// Key is the secret that all nodes share: at least 16 bytes of text; for
	// the dialects of Tomcat 32, 48 or 64 hexadecimal digits.
	Key secret.Text `yaml:"key"`
	// KeyFile is a file of secrets, one per line, that must not be readable by
	// everybody: the first one encrypts, all decrypt. It takes the place of Key.
	KeyFile string `yaml:"key_file"`
	// OldKeys decrypt, too. List the next key here on all nodes before one of
	// them encrypts with it, and the last one until none does any more.
	OldKeys []secret.Text `yaml:"old_keys"`
	// Algorithm is the cipher of the dialects of Tomcat, as Tomcat names it;
	// empty for the dialect's default.
	Algorithm string `yaml:"algorithm"`
	// ReplayWindow is how many messages of a sender may come in any order: one
	// that is older is refused. A power of two, 8192 to 16777216; an eighth of
	// a byte per sender each. For the dialect longhouse.
	ReplayWindow int `yaml:"replay_window"`
	// ReplayTime is how far the clock of a sender and the way of a message may
	// differ from this node's clock. For the dialects of Tomcat.
	ReplayTime time.Duration `yaml:"replay_time"`
	// ReplayMessages is how many messages are remembered at most. For the
	// dialects of Tomcat.
	ReplayMessages int `yaml:"replay_messages"`
}

// Defaults need a key.
var Defaults = Config{Dialect: DialectLonghouse, ReplayWindow: 1 << 17, ReplayTime: 10 * time.Second, ReplayMessages: 1 << 18}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf("encrypt: "+format, args...)) }
	known := false
	for _, d := range dialects {
		known = known || d == c.Dialect
	}
	if !known {
		fail("dialect: %q is none of %s", c.Dialect, strings.Join(dialects, ", "))
	}
	if n := c.ReplayWindow; n < 8192 || n > 1<<24 || bits.OnesCount(uint(n)) != 1 {
		fail("replay_window is %d, must be a power of two from 8192 to 16777216", n)
	}
	if c.ReplayTime < time.Millisecond || c.ReplayTime > 24*time.Hour {
		fail("replay_time is %v, must be 1ms to 24h", c.ReplayTime)
	}
	if c.ReplayMessages < 1 || c.ReplayMessages > 1<<24 {
		fail("replay_messages is %d, must be 1 to 16777216", c.ReplayMessages)
	}
	if known && c.Dialect == DialectLonghouse && c.Algorithm != "" {
		fail("algorithm: %q is set, but the dialect longhouse has only its own (AES-256-GCM): leave it out, or set the dialect of a Tomcat release", c.Algorithm)
	}
	if known && c.Dialect != DialectLonghouse {
		if _, err := parseAlgorithm(c.algorithm()); err != nil {
			fail("algorithm: %w", err)
		}
	}
	switch keys, err := c.keys(); {
	case err != nil:
		fail("%w", err)
	case len(keys) == 0:
		fail("there is no key: set key_file to a file with the secret that all nodes share (make one with \"openssl rand -hex 32\"), or key")
	case known && c.Dialect == DialectLonghouse:
		if err := secret.CheckLength("key", keys); err != nil {
			fail("%w", err)
		}
	case known:
		if _, err := rawKeys(keys); err != nil {
			fail("%w", err)
		}
		if alg, err := parseAlgorithm(c.algorithm()); c.Dialect == DialectTomcat55 && err == nil && !alg.aead() && len(keys) > 1 {
			fail("old_keys: with %s in the dialect %s nothing tells which key a message has: only one can be used", alg, c.Dialect)
		}
	}
	return errors.Join(errs...)
}

// keys returns the secrets, that which encrypts first.
func (c *Config) keys() ([]secret.Text, error) {
	return secret.List("key", c.Key, c.KeyFile, c.OldKeys)
}

func (c *Config) algorithm() string {
	switch {
	case c.Algorithm != "":
		return c.Algorithm
	case c.Dialect == DialectTomcat58:
		return "AES/GCM/NoPadding"
	}
	return "AES/CBC/PKCS5Padding"
}

// Factory makes encrypting interceptors.
var Factory = channel.FactoryOf("encrypt", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// reason says why a received message was refused, for a metric's label; empty
// for one that was not.
type reason string

const (
	// plain: not of this dialect, probably not encrypted at all.
	plain reason = "plain"
	// truncated: too short for what it says it is.
	truncated reason = "truncated"
	// unknownKey: encrypted with a key that this node does not have.
	unknownKey reason = "unknown_key"
	// forged: changed on the way, or encrypted with another key.
	forged reason = "forged"
	// elsewhere: encrypted for other nodes, or for an earlier incarnation.
	elsewhere reason = "not_addressed"
	// replayed: received before.
	replayed reason = "replayed"
	// tooOld: so old that nobody remembers whether it was received before.
	tooOld reason = "too_old"
	// wrongTime: the clock of its sender is too far away.
	wrongTime reason = "clock"
)

// explain says what an operator should know.
var explain = map[reason]string{
	plain:      "a message that is not encrypted was refused: the sender's stack lacks the encrypting layer, or has another dialect",
	truncated:  "a message that was cut off was refused",
	unknownKey: "a message was refused that is encrypted with a key that this node does not have: give all nodes the same key, list it under old_keys first when it is to change",
	forged:     "a message was refused that was changed on the way or encrypted with another key: give all nodes the same key",
	elsewhere:  "a message was refused that was encrypted for another node or for an earlier incarnation of this one",
	replayed:   "a message was refused because it has been received before",
	tooOld:     "a message was refused because it is too old to tell whether it has been received before",
	wrongTime:  "a message was refused because of its time: it was held up, or is a repetition, or the sender's clock is wrong; make the clocks agree or raise replay_time",
}

// errRefused is the error of a refused message. It tells the sender nothing that
// would help a forger.
var errRefused = fmt.Errorf("encrypt: the message could not be decrypted: %w", channel.ErrBadMessage)

// dialect turns bodies into encrypted ones and back.
type dialect interface {
	// start prepares for messages of and to the local node.
	start(local channel.Member) error
	// seal appends the encrypted body of m to dst, which may be s.buf.
	seal(dst []byte, s *sealed, l channel.Link, m *channel.Message) ([]byte, error)
	// open restores m in place, or says why not.
	open(l channel.Link, m *channel.Message) reason
	// silent says that refusals must not be told to the sender, because they
	// would help a forger.
	silent() bool
	stop()
}

// Interceptor encrypts and decrypts.
type Interceptor struct {
	log *zap.Logger
	d   dialect

	encrypted, decrypted, failed *channel.Counter
	refused                      map[reason]*channel.Counter

	mu         sync.Mutex
	complained map[reason]time.Time
}

// New makes an encrypting interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	x := &Interceptor{
		log:        s.Logger,
		encrypted:  s.Metrics.Counter("encrypt_encrypted_total", "Messages encrypted."),
		decrypted:  s.Metrics.Counter("encrypt_decrypted_total", "Messages decrypted."),
		failed:     s.Metrics.Counter("encrypt_failed_total", "Messages that could not be encrypted."),
		refused:    map[reason]*channel.Counter{},
		complained: map[reason]time.Time{},
	}
	for r := range explain {
		x.refused[r] = s.Metrics.Counter("encrypt_refused_total", "Received messages that were refused, by reason.", "reason", string(r))
	}
	keys, err := c.keys()
	if err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	if c.Dialect == DialectLonghouse {
		x.d, err = newNative(keys, c.ReplayWindow)
	} else {
		x.d, err = newTomcat(c, keys)
	}
	if err != nil {
		return nil, fmt.Errorf("encrypt: %w", err)
	}
	return x, nil
}

// Descriptor implements channel.Interceptor.
func (x *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:     "encrypt",
		Mutates:  true,
		Stateful: true,
		Provides: []string{channel.PropEncryption},
		Promise:  "encrypts bodies; lets nothing up that it cannot decrypt or has seen before",
	}
}

// Start implements channel.Starter.
func (x *Interceptor) Start(_ context.Context, l channel.Link) error {
	if err := x.d.start(l.Local()); err != nil {
		return fmt.Errorf("encrypt: start: %w", err)
	}
	return nil
}

// Stop implements channel.Stopper.
func (x *Interceptor) Stop(context.Context) error {
	x.d.stop()
	return nil
}

// sealed is an encrypted message on its way down. It is pooled.
type sealed struct {
	buf []byte // the body
	ad  []byte // scratch: associated data

	// With a completion: the message that goes down instead of the original.
	m    channel.Message
	orig *channel.Message
	done channel.Completion
}

var sealedPool = sync.Pool{New: func() any { return new(sealed) }}

func (s *sealed) release() {
	if cap(s.buf) > maxPooled {
		s.buf = nil
	}
	s.m.Body, s.m.To, s.m.Done, s.orig, s.done = nil, nil, nil, nil, nil
	sealedPool.Put(s)
}

// Complete implements channel.Completion for the layers below.
func (s *sealed) Complete(_ *channel.Message, err error) {
	orig, done := s.orig, s.done
	s.release()
	done.Complete(orig, err)
}

// HandleSend implements channel.SendHandler.
func (x *Interceptor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	s := sealedPool.Get().(*sealed)
	var err error
	if s.buf, err = x.d.seal(s.buf[:0], s, l, m); err != nil {
		s.release()
		x.failed.Inc()
		return channel.Failed(m.To, fmt.Errorf("encrypt: %w", err))
	}
	x.encrypted.Inc()
	if m.Done == nil {
		m.Body = s.buf
		err = l.Send(ctx, m)
	} else {
		s.m, s.orig, s.done = *m, m, m.Done
		s.m.Body, s.m.Done = s.buf, s
		if err = l.Send(ctx, &s.m); err == nil {
			return nil // s is released by Complete
		}
	}
	if err == nil || !errors.Is(err, channel.ErrPanic) { // whatever panicked may still hold the message
		s.release()
	}
	return err
}

// HandleReceive implements channel.ReceiveHandler: what cannot be decrypted
// ends here.
func (x *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if r := x.d.open(l, m); r != "" {
		x.refuse(r, m)
		if x.d.silent() {
			return nil
		}
		return errRefused
	}
	x.decrypted.Inc()
	return l.Deliver(ctx, m)
}

// refuse counts a refused message, and logs it unless one of its kind has been
// logged just now.
func (x *Interceptor) refuse(r reason, m *channel.Message) {
	x.refused[r].Inc()
	now := time.Now()
	x.mu.Lock()
	last, seen := x.complained[r]
	due := !seen || now.Sub(last) >= complaintInterval
	if due {
		x.complained[r] = now
	}
	x.mu.Unlock()
	if due {
		x.log.Warn(explain[r], zap.String("reason", string(r)), zap.Stringer("member", m.From), zap.Stringer("id", m.From.ID), zap.Int("bytes", len(m.Body)))
	}
}
