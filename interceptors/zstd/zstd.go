// Package zstd is the interceptor that compresses bodies with Zstandard, for
// groups without Tomcat nodes. It imports package channel and a compression
// library only; it must not import core, plugins or fx.
package zstd

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/longhouse-go/longhouse/channel"
)

// Config is what a user writes.
type Config struct {
	// MinSize is the largest body, in bytes, that is sent as it is.
	MinSize int `yaml:"min_size"`
	// Level is the effort of compression: fastest, default, better or best.
	Level string `yaml:"level"`
	// MaxSize bounds a body before compression and after decompression, in
	// bytes.
	MaxSize int `yaml:"max_size"`
	// MaxRatio bounds how many times larger than its compressed form a body of
	// more than 1 MiB may be; 0 for no bound but MaxSize.
	MaxRatio int `yaml:"max_ratio"`
}

// Defaults leaves small bodies alone.
var Defaults = Config{MinSize: 256, Level: "fastest", MaxSize: 64 << 20, MaxRatio: 200}

const (
	// freeRatio is the size in bytes up to which the ratio does not matter.
	freeRatio = 1 << 20
	// maxPooled bounds the buffers that are kept for reuse, in bytes.
	maxPooled = 1 << 20
)

var levels = []string{"fastest", "default", "better", "best"}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.MinSize < 0 {
		errs = append(errs, fmt.Errorf("zstd: min_size is %d, must not be negative", c.MinSize))
	}
	if !slices.Contains(levels, c.Level) {
		errs = append(errs, fmt.Errorf("zstd: level is %q, must be one of %s", c.Level, strings.Join(levels, ", ")))
	}
	if c.MaxSize < 1 {
		errs = append(errs, fmt.Errorf("zstd: max_size is %d, must be at least 1", c.MaxSize))
	}
	if c.MaxRatio < 0 {
		errs = append(errs, fmt.Errorf("zstd: max_ratio is %d, must not be negative", c.MaxRatio))
	}
	return errors.Join(errs...)
}

// Factory makes zstd interceptors.
var Factory = channel.FactoryOf("zstd", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// Interceptor compresses bodies on their way down and restores them on their
// way up.
type Interceptor struct {
	cfg     Config
	enc     *zstd.Encoder
	dec     *zstd.Decoder
	buffers sync.Pool // of *[]byte

	compressed, plain, bytesIn, bytesOut                   *channel.Counter
	decompressed, receivedIn, receivedOut                  *channel.Counter
	refusedSent, refusedCorrupt, refusedLarge, refusedKind *channel.Counter
}

// New makes a zstd interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	_, level := zstd.EncoderLevelFromString(c.Level)
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithLowerEncoderMem(true), zstd.WithSingleSegment(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(uint64(c.MaxSize)), zstd.WithDecoderConcurrency(0))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	count := s.Metrics.Counter
	refused := func(reason string) *channel.Counter {
		return count("zstd_refused_total", "Received messages that were refused.", "reason", reason)
	}
	return &Interceptor{
		cfg: c, enc: enc, dec: dec,
		buffers:        sync.Pool{New: func() any { return new([]byte) }},
		compressed:     count("zstd_compressed_total", "Messages sent compressed."),
		plain:          count("zstd_plain_total", "Messages sent as they are, because they are small, do not become smaller, or compress so well that a receiver would refuse them."),
		bytesIn:        count("zstd_compressed_bytes_in_total", "Bytes of bodies before compression."),
		bytesOut:       count("zstd_compressed_bytes_out_total", "Bytes of bodies after compression."),
		decompressed:   count("zstd_decompressed_total", "Messages received compressed."),
		receivedIn:     count("zstd_decompressed_bytes_in_total", "Bytes of bodies before decompression."),
		receivedOut:    count("zstd_decompressed_bytes_out_total", "Bytes of bodies after decompression."),
		refusedSent:    count("zstd_send_refused_total", "Messages that were not sent because their body exceeds max_size."),
		refusedCorrupt: refused("corrupt"),
		refusedLarge:   refused("too_large"),
		refusedKind:    refused("foreign"),
	}, nil
}

// Descriptor implements channel.Interceptor.
func (z *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:            "zstd",
		Flag:            channel.Zstd,
		Mutates:         true,
		ReceiveInterest: &channel.Interest{Any: channel.Zstd},
		Promise:         fmt.Sprintf("compresses bodies of more than %d bytes; accepts none of more than %d", z.cfg.MinSize, z.cfg.MaxSize),
	}
}

// Encode implements channel.Encoder. The flag is this layer's alone.
func (z *Interceptor) Encode(m *channel.Message) error {
	m.Options &^= channel.Zstd
	size := len(m.Body)
	switch {
	case size > z.cfg.MaxSize:
		z.refusedSent.Inc()
		return fmt.Errorf("%w: the body has %d bytes, max_size is %d", channel.ErrTooLarge, size, z.cfg.MaxSize)
	case size <= z.cfg.MinSize:
		z.plain.Inc()
		return nil
	}
	buf := z.buffers.Get().(*[]byte)
	*buf = z.enc.EncodeAll(m.Body, (*buf)[:0])
	if n := len(*buf); n < size && size <= z.limit(n) {
		m.Body = m.Body[:copy(m.Body, *buf)] // the body is ours while we have the message
		m.Options |= channel.Zstd
		z.compressed.Inc()
		z.bytesIn.Add(int64(size))
		z.bytesOut.Add(int64(n))
	} else {
		z.plain.Inc()
	}
	if cap(*buf) <= maxPooled {
		z.buffers.Put(buf)
	}
	return nil
}

// limit is the largest body that a compressed one of n bytes may become.
func (z *Interceptor) limit(n int) int {
	if z.cfg.MaxRatio == 0 || n > z.cfg.MaxSize/z.cfg.MaxRatio {
		return z.cfg.MaxSize
	}
	return min(z.cfg.MaxSize, max(freeRatio, n*z.cfg.MaxRatio))
}

// Decode implements channel.Decoder.
func (z *Interceptor) Decode(m *channel.Message) error {
	if m.Options&channel.Zstd == 0 {
		return nil
	}
	// A frame says how large its content is (RFC 8878, 3.1.1.1.4), the encoder
	// always writes it: room is made for that and no more.
	var h zstd.Header
	if err := h.Decode(m.Body); err != nil {
		z.refusedCorrupt.Inc()
		return fmt.Errorf("%w: no Zstandard frame: %w", channel.ErrBadMessage, err)
	}
	if h.Skippable || !h.HasFCS || h.DictionaryID != 0 {
		z.refusedKind.Inc()
		return fmt.Errorf("%w: the Zstandard frame is of a kind that this layer does not write", channel.ErrBadMessage)
	}
	if limit := z.limit(len(m.Body)); h.FrameContentSize > uint64(limit) {
		z.refusedLarge.Inc()
		return fmt.Errorf("%w: %d compressed bytes become %d, %d are allowed", channel.ErrTooLarge, len(m.Body), h.FrameContentSize, limit)
	}
	body, err := z.dec.DecodeAll(m.Body, make([]byte, 0, h.FrameContentSize))
	if err == nil && uint64(len(body)) != h.FrameContentSize {
		err = errors.New("more than one frame")
	}
	if err != nil {
		z.refusedCorrupt.Inc()
		return fmt.Errorf("%w: corrupt Zstandard frame: %w", channel.ErrBadMessage, err)
	}
	z.decompressed.Inc()
	z.receivedIn.Add(int64(len(m.Body)))
	z.receivedOut.Add(int64(len(body)))
	m.Body = body
	m.Options &^= channel.Zstd
	return nil
}
