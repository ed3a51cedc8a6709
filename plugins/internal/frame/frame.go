package frame

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// HeaderSize is the number of bytes before the payload, the length included.
const HeaderSize = 20

const (
	lengthSize = 4
	minLength  = HeaderSize - lengthSize
	// chunkSize is how much is read at once, and what the frames of one read
	// share.
	chunkSize = 64 << 10
)

// Flags of a frame.
const (
	// FlagReply marks the answer to the call of the same seq.
	FlagReply uint16 = 1 << iota
	// FlagEvent marks a frame that is not answered.
	FlagEvent
)

// Verdict says how a call ended.
type Verdict uint8

const (
	// Pass: done, nothing to say. It is also the verdict of a call itself.
	Pass Verdict = iota
	// Replace: done, the payload is the result.
	Replace
	// Drop and Inject are for messages that pass through a plugin.
	Drop
	Inject
	// Error: failed, the payload says why.
	Error
)

// Kinds of this package; all others are free.
const (
	kindPing   uint8 = 0xf0
	kindPong   uint8 = 0xf1
	kindCancel uint8 = 0xf2
)

// Errors of a connection.
var (
	// ErrProtocol: the other side broke the rules of this package.
	ErrProtocol = errors.New("frame: protocol violation")
	// ErrSilent: the other side stopped answering heartbeats.
	ErrSilent = errors.New("frame: no sign of life")
	// ErrClosed: this side closed the connection.
	ErrClosed = errors.New("frame: closed")
)

// Header is what stands before the payload.
type Header struct {
	Seq     uint64
	Kind    uint8
	Verdict Verdict
	Flags   uint16
	Options uint32
}

// Frame is one frame. The payload of a received frame is never written to
// again, but keeps its neighbours' memory alive: copy what is kept for long.
type Frame struct {
	Header
	Payload []byte
}

// Append appends the frame of that header with the concatenated parts as its
// payload. The caller checks the size.
func Append(dst []byte, h Header, parts ...[]byte) []byte {
	n := minLength
	for _, p := range parts {
		n += len(p)
	}
	dst = binary.BigEndian.AppendUint32(dst, uint32(n))
	dst = binary.BigEndian.AppendUint64(dst, h.Seq)
	dst = append(dst, h.Kind, byte(h.Verdict))
	dst = binary.BigEndian.AppendUint16(dst, h.Flags)
	dst = binary.BigEndian.AppendUint32(dst, h.Options)
	for _, p := range parts {
		dst = append(dst, p...)
	}
	return dst
}

// Reader reads frames of at most max bytes from a stream.
type Reader struct {
	r   io.Reader
	max int
	// buf[start:end] is read and not yet returned. A buffer is never reused:
	// frames that were returned point into it.
	buf        []byte
	start, end int
}

// NewReader returns a reader of frames whose length field is at most limit.
func NewReader(r io.Reader, limit int) *Reader { return &Reader{r: r, max: limit} }

// Next returns the next frame. The error is io.EOF at the end of the stream
// between two frames, and wraps ErrProtocol for a length that cannot be.
func (r *Reader) Next() (Frame, error) {
	if err := r.fill(lengthSize); err != nil {
		return Frame{}, err
	}
	n := int64(binary.BigEndian.Uint32(r.buf[r.start:]))
	if n < minLength || n > int64(r.max) {
		return Frame{}, fmt.Errorf("%w: frame length %d is not between %d and %d", ErrProtocol, n, minLength, r.max)
	}
	size := lengthSize + int(n)
	if err := r.fill(size); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, err
	}
	b := r.buf[r.start : r.start+size : r.start+size]
	r.start += size
	return Frame{
		Header: Header{
			Seq:     binary.BigEndian.Uint64(b[4:]),
			Kind:    b[12],
			Verdict: Verdict(b[13]),
			Flags:   binary.BigEndian.Uint16(b[14:]),
			Options: binary.BigEndian.Uint32(b[16:]),
		},
		Payload: b[HeaderSize:],
	}, nil
}

// fill makes sure that n unread bytes are in the buffer.
func (r *Reader) fill(n int) error {
	if r.end-r.start >= n {
		return nil
	}
	if len(r.buf)-r.start < n {
		// The memory is needed now: the other side has announced the frame.
		// It is bounded by max.
		next := make([]byte, max(chunkSize, n))
		r.end = copy(next, r.buf[r.start:r.end])
		r.buf, r.start = next, 0
	}
	for r.end-r.start < n {
		m, err := r.r.Read(r.buf[r.end:])
		r.end += m
		if err != nil && r.end-r.start < n {
			if err == io.EOF && r.end > r.start {
				return io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}
