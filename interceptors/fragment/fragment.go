// Package fragment is the interceptor that cuts large messages into pieces, as
// Apache Tribes does. It imports package channel and interceptors/internal only;
// it must not import core, plugins or fx.
package fragment

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/internal/flight"
)

// Config is what a user writes.
type Config struct {
	// MaxSize is the largest piece of a body that is sent in one message, in
	// bytes.
	MaxSize int `yaml:"max_size"`
	// Expire is how long a message may take from its first fragment to its last.
	Expire time.Duration `yaml:"expire"`
	// OptionFlag restricts cutting to messages with this option bit; 0 cuts all
	// that are too large. Either way every message gets the layer's trailer.
	OptionFlag channel.Options `yaml:"option_flag"`
	// MaxMessageSize bounds the body of a whole message, in bytes.
	MaxMessageSize int64 `yaml:"max_message_size"`
	// MaxFragments bounds the pieces of one message.
	MaxFragments int `yaml:"max_fragments"`
	// SenderSize and SenderMessages bound what is kept of the unfinished
	// messages of one sender: bytes, and messages.
	SenderSize     int64 `yaml:"sender_size"`
	SenderMessages int   `yaml:"sender_messages"`
	// TotalSize and TotalMessages bound the same for all senders together.
	TotalSize     int64 `yaml:"total_size"`
	TotalMessages int   `yaml:"total_messages"`
}

// Defaults are those of Tomcat, with bounds.
var Defaults = Config{
	MaxSize: 102400, Expire: time.Minute,
	MaxMessageSize: 64 << 20, MaxFragments: 65536,
	SenderSize: 128 << 20, SenderMessages: 1024,
	TotalSize: 256 << 20, TotalMessages: 4096,
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	least := func(name string, v, least int64) {
		if v < least {
			errs = append(errs, fmt.Errorf("fragment: %s is %d, must be at least %d", name, v, least))
		}
	}
	least("max_size", int64(c.MaxSize), 1)
	least("max_message_size", c.MaxMessageSize, int64(c.MaxSize))
	least("max_fragments", int64(c.MaxFragments), 1)
	least("sender_size", c.SenderSize, 2*c.MaxMessageSize) // buffers are up to twice as large
	least("sender_messages", int64(c.SenderMessages), 1)
	least("total_size", c.TotalSize, c.SenderSize)
	least("total_messages", int64(c.TotalMessages), int64(c.SenderMessages))
	if c.Expire <= 0 {
		errs = append(errs, fmt.Errorf("fragment: expire is %v, must be positive", c.Expire))
	}
	if c.OptionFlag != 0 && (c.OptionFlag < 0x10 || bits.OnesCount32(uint32(c.OptionFlag)) != 1) {
		errs = append(errs, fmt.Errorf("fragment: option_flag is 0x%x, must be 0 or one bit from 0x10 up", uint32(c.OptionFlag)))
	}
	return errors.Join(errs...)
}

// Factory makes fragment interceptors.
var Factory = channel.FactoryOf("fragment", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// The trailers of Tribes' FragmentationInterceptor.
const (
	whole        = 0x00 // the body is a whole message
	piece        = 0x01 // before it stand number (from 0) and count, 4 bytes each
	pieceTrailer = 9
)

// Interceptor cuts messages on their way down, and joins them on their way up.
type Interceptor struct {
	cfg     Config
	store   *store
	flights flight.Pool

	cut, pieces, sendRefused, joined *channel.Counter
}

// New makes a fragment interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	m := s.Metrics
	f := &Interceptor{
		cfg:         c,
		store:       newStore(c, m),
		cut:         m.Counter("fragment_cut_total", "Messages sent in pieces."),
		pieces:      m.Counter("fragment_pieces_sent_total", "Pieces of messages sent."),
		sendRefused: m.Counter("fragment_send_refused_total", "Messages that were not sent because they exceed max_message_size or max_fragments."),
		joined:      m.Counter("fragment_joined_total", "Messages received in pieces and joined."),
	}
	return f, nil
}

// Descriptor implements channel.Interceptor. The flag is not named: it chooses
// the messages to cut and marks nothing.
func (f *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:     "fragment",
		Mutates:  true,
		Stateful: true,
		Promise:  fmt.Sprintf("sends bodies of more than %d bytes in pieces; forgets unfinished ones after %v", f.cfg.MaxSize, f.cfg.Expire),
	}
}

// HandleSend implements channel.SendHandler.
func (f *Interceptor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if len(m.To) == 0 {
		return channel.ErrNoMembers
	}
	size := len(m.Body)
	if size <= f.cfg.MaxSize || !m.Options.Has(f.cfg.OptionFlag) {
		fl := f.flights.New(m, false)
		p := fl.Part(m.To, size+1)
		p.Message.Body = append(append(p.Message.Body, m.Body...), whole)
		_ = fl.Send(ctx, l, p)
		return fl.End(ctx)
	}
	count := (size + f.cfg.MaxSize - 1) / f.cfg.MaxSize
	if int64(size) > f.cfg.MaxMessageSize || count > f.cfg.MaxFragments {
		f.sendRefused.Inc()
		return channel.Failed(m.To, fmt.Errorf("fragment: %w: %d bytes in %d pieces, max_message_size is %d and max_fragments %d",
			channel.ErrTooLarge, size, count, f.cfg.MaxMessageSize, f.cfg.MaxFragments))
	}
	return f.sendPieces(ctx, l, m, count)
}

// sendPieces sends a message in count pieces. Those that are acknowledged do
// not wait for each other. A member that one piece failed for gets no more.
func (f *Interceptor) sendPieces(ctx context.Context, l channel.Link, m *channel.Message, count int) error {
	f.cut.Inc()
	fl := f.flights.New(m, m.Options.Has(channel.UseAck))
	to, body := m.To, m.Body
	for i := range count {
		if i > 0 {
			if to = f.left(fl, to); len(to) == 0 {
				break
			}
		}
		slice := body[i*f.cfg.MaxSize : min((i+1)*f.cfg.MaxSize, len(body))]
		p := fl.Part(to, len(slice)+pieceTrailer)
		b := append(p.Message.Body, slice...)
		b = binary.BigEndian.AppendUint32(b, uint32(i))
		b = binary.BigEndian.AppendUint32(b, uint32(count))
		p.Message.Body = append(b, piece)
		f.pieces.Inc()
		_ = fl.Send(ctx, l, p)
	}
	return fl.End(ctx)
}

// left returns those of to that have not failed yet.
func (f *Interceptor) left(fl *flight.Flight, to []channel.Member) []channel.Member {
	for i := range to {
		if !fl.Failed(to[i]) {
			continue
		}
		rest := append([]channel.Member(nil), to[:i]...)
		for _, m := range to[i+1:] {
			if !fl.Failed(m) {
				rest = append(rest, m)
			}
		}
		return rest
	}
	return to
}

// HandleReceive implements channel.ReceiveHandler. A piece that completes its
// message ends with the message; the others end when they have been stored.
func (f *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	n := len(m.Body)
	if n > 0 && m.Body[n-1] == whole {
		m.Body = m.Body[: n-1 : n-1]
		return l.Deliver(ctx, m)
	}
	pc, err := parse(m.Body)
	if err != nil {
		f.store.refusedMalformed.Inc()
		return err
	}
	full, err := f.store.add(m, pc, time.Now())
	if full == nil {
		return err
	}
	f.joined.Inc()
	m.Body = full.body
	err = l.Deliver(ctx, m)
	full.release()
	return err
}

// fragment is one received piece.
type fragment struct {
	number, count int
	body          []byte
}

// parse reads the trailer of a piece.
func parse(body []byte) (fragment, error) {
	n := len(body)
	if n < pieceTrailer || body[n-1] != piece {
		return fragment{}, errTrailer
	}
	number := int32(binary.BigEndian.Uint32(body[n-9:]))
	count := int32(binary.BigEndian.Uint32(body[n-5:]))
	if count < 1 || number < 0 || number >= count {
		return fragment{}, errNumber
	}
	return fragment{int(number), int(count), body[:n-pieceTrailer]}, nil
}

var (
	errTrailer = fmt.Errorf("fragment: %w: it does not end as this layer lets messages end", channel.ErrBadMessage)
	errNumber  = fmt.Errorf("fragment: %w: number or count of the fragment is impossible", channel.ErrBadMessage)
)

// HandleMember implements channel.MemberHandler: what is kept of a lost member
// is freed; one that has left in order may still have some pieces on their way.
func (f *Interceptor) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	switch ev.Kind {
	case channel.MemberAdded:
		f.store.back(ev.Member.ID)
	case channel.MemberLost:
		f.store.forget(ev.Member.ID)
	case channel.MemberLeft:
		f.store.leaving(ev.Member.ID, time.Now())
	}
	return l.Announce(ctx, ev)
}

// HandleTick implements channel.TickHandler.
func (f *Interceptor) HandleTick(_ context.Context, _ channel.Link, now time.Time) error {
	f.store.expire(now)
	return nil
}
