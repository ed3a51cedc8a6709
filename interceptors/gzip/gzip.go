// Package gzip is the interceptor that compresses bodies as Apache Tribes does.
// It imports package channel and a compression library only; it must not import
// core, plugins or fx.
package gzip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// Config is what a user writes.
type Config struct {
	// OptionFlag is the option bit that marks compressed messages. All nodes
	// need the same.
	OptionFlag channel.Options `yaml:"option_flag"`
	// MinSize is the largest body, in bytes, that is sent as it is.
	MinSize int `yaml:"min_size"`
	// Level is the effort of compression, 1 (fast) to 9 (small).
	Level int `yaml:"level"`
	// MaxSize bounds a body before compression and after decompression, in
	// bytes.
	MaxSize int `yaml:"max_size"`
	// MaxRatio bounds how many times larger than its compressed form a body of
	// more than 1 MiB may be; 0 for no bound but MaxSize.
	MaxRatio int `yaml:"max_ratio"`
	// StatsInterval is the number of messages, of both directions together,
	// between two summaries in the log; 0 for none.
	StatsInterval int64 `yaml:"stats_interval"`
}

// Defaults are those of Tomcat, with bounds.
var Defaults = Config{OptionFlag: channel.Gzip, Level: 6, MaxSize: 64 << 20, MaxRatio: 200}

const (
	// freeRatio is the size in bytes up to which the ratio does not matter.
	freeRatio = 1 << 20
	// maxPooled bounds the buffers that are kept for reuse, in bytes.
	maxPooled = 1 << 20
	// minStream is the length of the shortest gzip stream: a header of 10 bytes,
	// an empty block of 2, and a trailer of 8 (RFC 1952).
	minStream = 20
	// A trailer that promises more than trustedRatio times the compressed size
	// and trustedSize bytes is not believed: room is made as it is needed.
	trustedRatio, trustedSize = 32, 64 << 10
)

// noTime is what a stream's header says when it has no time: 0, as in Java.
var noTime = time.Unix(0, 0)

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.OptionFlag < 0x10 || bits.OnesCount32(uint32(c.OptionFlag)) != 1 {
		errs = append(errs, fmt.Errorf("gzip: option_flag is 0x%x, must be one bit from 0x10 up; Tribes uses 0x100", uint32(c.OptionFlag)))
	}
	if c.MinSize < 0 {
		errs = append(errs, fmt.Errorf("gzip: min_size is %d, must not be negative", c.MinSize))
	}
	if c.Level < gzip.BestSpeed || c.Level > gzip.BestCompression {
		errs = append(errs, fmt.Errorf("gzip: level is %d, must be 1 to 9", c.Level))
	}
	if c.MaxSize < 1 {
		errs = append(errs, fmt.Errorf("gzip: max_size is %d, must be at least 1", c.MaxSize))
	}
	if c.MaxRatio < 0 {
		errs = append(errs, fmt.Errorf("gzip: max_ratio is %d, must not be negative", c.MaxRatio))
	}
	if c.StatsInterval < 0 {
		errs = append(errs, fmt.Errorf("gzip: stats_interval is %d, must not be negative", c.StatsInterval))
	}
	return errors.Join(errs...)
}

// Factory makes gzip interceptors.
var Factory = channel.FactoryOf("gzip", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// Interceptor compresses bodies on their way down and restores them on their
// way up.
type Interceptor struct {
	cfg Config
	log *zap.Logger

	encoders, decoders sync.Pool // of *encoder, *decoder

	compressed, plain, bytesIn, bytesOut      *channel.Counter
	decompressed, receivedIn, receivedOut     *channel.Counter
	refusedSent, refusedCorrupt, refusedLarge *channel.Counter
	messages                                  atomic.Int64
}

// New makes a gzip interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	count := s.Metrics.Counter
	refused := func(reason string) *channel.Counter {
		return count("gzip_refused_total", "Received messages that were refused.", "reason", reason)
	}
	g := &Interceptor{
		cfg: c, log: s.Logger,
		compressed:     count("gzip_compressed_total", "Messages sent compressed."),
		plain:          count("gzip_plain_total", "Messages sent as they are, because they are small or compress so well that a receiver would refuse them."),
		bytesIn:        count("gzip_compressed_bytes_in_total", "Bytes of bodies before compression."),
		bytesOut:       count("gzip_compressed_bytes_out_total", "Bytes of bodies after compression."),
		decompressed:   count("gzip_decompressed_total", "Messages received compressed."),
		receivedIn:     count("gzip_decompressed_bytes_in_total", "Bytes of bodies before decompression."),
		receivedOut:    count("gzip_decompressed_bytes_out_total", "Bytes of bodies after decompression."),
		refusedSent:    count("gzip_send_refused_total", "Messages that were not sent because their body exceeds max_size."),
		refusedCorrupt: refused("corrupt"),
		refusedLarge:   refused("too_large"),
	}
	g.encoders.New = func() any {
		e := new(encoder)
		e.w, _ = gzip.NewWriterLevel(e, c.Level) // the level has been validated
		return e
	}
	g.decoders.New = func() any { return new(decoder) }
	return g, nil
}

// Descriptor implements channel.Interceptor.
func (g *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:            "gzip",
		Flag:            g.cfg.OptionFlag,
		Mutates:         true,
		ReceiveInterest: &channel.Interest{Any: g.cfg.OptionFlag},
		Promise:         fmt.Sprintf("compresses bodies of more than %d bytes; accepts none of more than %d", g.cfg.MinSize, g.cfg.MaxSize),
	}
}

// encoder compresses one body at a time into buf.
type encoder struct {
	w   *gzip.Writer
	buf []byte
}

// Write implements io.Writer for w.
func (e *encoder) Write(p []byte) (int, error) {
	e.buf = append(e.buf, p...)
	return len(p), nil
}

// Encode implements channel.Encoder. The flag is this layer's alone: one that
// the application has set is cleared, since the receiver would take it for the
// mark of a compressed body.
func (g *Interceptor) Encode(m *channel.Message) error {
	m.Options &^= g.cfg.OptionFlag
	size := len(m.Body)
	switch {
	case size > g.cfg.MaxSize:
		g.refusedSent.Inc()
		return fmt.Errorf("%w: the body has %d bytes, max_size is %d", channel.ErrTooLarge, size, g.cfg.MaxSize)
	case size <= g.cfg.MinSize:
		g.plain.Inc()
		g.summary()
		return nil
	}
	e := g.encoders.Get().(*encoder)
	e.buf = e.buf[:0]
	e.w.Reset(e)
	e.w.ModTime = noTime
	if _, err := e.w.Write(m.Body); err != nil {
		return err
	}
	if err := e.w.Close(); err != nil {
		return err
	}
	if size > g.limit(len(e.buf)) {
		g.plain.Inc()
	} else {
		m.Body = replace(m.Body, e.buf)
		m.Options |= g.cfg.OptionFlag
		g.compressed.Inc()
		g.bytesIn.Add(int64(size))
		g.bytesOut.Add(int64(len(e.buf)))
	}
	if cap(e.buf) <= maxPooled {
		g.encoders.Put(e)
	}
	g.summary()
	return nil
}

// replace returns a copy of with, in the place of body if it fits: the body is
// ours while we have the message.
func replace(body, with []byte) []byte {
	if len(with) > len(body) {
		return bytes.Clone(with)
	}
	return body[:copy(body, with)]
}

// limit is the largest body that a compressed one of n bytes may become.
func (g *Interceptor) limit(n int) int {
	if g.cfg.MaxRatio == 0 || n > g.cfg.MaxSize/g.cfg.MaxRatio {
		return g.cfg.MaxSize
	}
	return min(g.cfg.MaxSize, max(freeRatio, n*g.cfg.MaxRatio))
}

// decoder restores one body at a time.
type decoder struct {
	r   gzip.Reader
	in  bytes.Reader
	one [1]byte
}

// Decode implements channel.Decoder.
func (g *Interceptor) Decode(m *channel.Message) error {
	if m.Options&g.cfg.OptionFlag == 0 {
		return nil
	}
	d := g.decoders.Get().(*decoder)
	body, err := d.decode(m.Body, g.limit(len(m.Body)))
	d.in.Reset(nil)
	g.decoders.Put(d)
	switch {
	case errors.Is(err, channel.ErrTooLarge):
		g.refusedLarge.Inc()
		return err
	case err != nil:
		g.refusedCorrupt.Inc()
		return err
	}
	g.decompressed.Inc()
	g.receivedIn.Add(int64(len(m.Body)))
	g.receivedOut.Add(int64(len(body)))
	m.Body = body
	m.Options &^= g.cfg.OptionFlag
	g.summary()
	return nil
}

// decode returns the whole of a gzip stream (RFC 1952; several members in a row
// are allowed, as in Java), checked by its checksums. It allocates the result
// and little else, and that only as data comes out.
func (d *decoder) decode(in []byte, limit int) ([]byte, error) {
	if len(in) < minStream {
		return nil, fmt.Errorf("%w: %d bytes are too short for a gzip stream", channel.ErrBadMessage, len(in))
	}
	d.in.Reset(in)
	if err := d.r.Reset(&d.in); err != nil {
		return nil, fmt.Errorf("%w: no gzip stream: %w", channel.ErrBadMessage, err)
	}
	// The trailer's size is right for a stream of one member; foreign bytes may
	// say anything.
	promised := int64(binary.LittleEndian.Uint32(in[len(in)-4:]))
	out := make([]byte, 0, min(promised, int64(limit), int64(max(trustedSize, trustedRatio*len(in)))))
	for {
		if len(out) == cap(out) {
			n, err := d.r.Read(d.one[:])
			if n == 0 && err == nil {
				continue
			}
			if n == 0 && err == io.EOF {
				return out, nil
			}
			if n == 0 {
				return nil, fmt.Errorf("%w: corrupt gzip stream: %w", channel.ErrBadMessage, err)
			}
			if len(out) >= limit {
				return nil, fmt.Errorf("%w: %d compressed bytes become more than %d", channel.ErrTooLarge, len(in), limit)
			}
			grown := make([]byte, len(out), min(max(2*len(out), 512), limit))
			copy(grown, out)
			out = append(grown, d.one[0])
			continue
		}
		n, err := d.r.Read(out[len(out):cap(out)])
		out = out[:len(out)+n]
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: corrupt gzip stream: %w", channel.ErrBadMessage, err)
		}
	}
}

// summary logs when another interval is full.
func (g *Interceptor) summary() {
	if g.cfg.StatsInterval == 0 || g.messages.Add(1)%g.cfg.StatsInterval != 0 {
		return
	}
	g.log.Debug("gzip",
		zap.Int64("compressed", g.compressed.Value()), zap.Int64("plain", g.plain.Value()),
		zap.Int64("bytes", g.bytesIn.Value()), zap.Int64("compressed_bytes", g.bytesOut.Value()),
		zap.Int64("decompressed", g.decompressed.Value()),
		zap.Int64("refused", g.refusedCorrupt.Value()+g.refusedLarge.Value()))
}
