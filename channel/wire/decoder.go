package wire

import "github.com/longhouse-go/longhouse/channel"

const (
	// firstBuffer is what a silent connection costs, in bytes.
	firstBuffer = 4 << 10
	// readBuffer is what a busy connection reads at most at once, and keeps.
	readBuffer = 128 << 10
)

// Decoder takes frames out of a stream of bytes, one connection's. Use it like
// this, in one goroutine:
//
//	n, err := conn.Read(d.Space())
//	d.Wrote(n)
//	for { kind, err := d.Next(&m) … until Incomplete }
//
// Its buffer grows with the bytes that have come, never with a length that a
// peer declares: it holds at most about twice what has been received of the
// frame in progress. It does not allocate per message.
type Decoder struct {
	max    int
	buf    []byte
	r, w   int // buf[r:w] has come and is not taken out
	filled bool
	err    error
	sender sender
}

// NewDecoder returns a Decoder of frames of at most max bytes;
// [DefaultMaxFrame] if max is not positive.
func NewDecoder(max int) *Decoder {
	if max <= 0 {
		max = DefaultMaxFrame
	}
	return &Decoder{max: max}
}

// Space returns room for the next bytes of the stream, never empty. It
// invalidates the bodies of all messages that Next returned.
func (d *Decoder) Space() []byte {
	have := d.w - d.r
	switch {
	case have == len(d.buf): // full of one unfinished frame, or new
		d.resize(d.grown())
	case have == 0 && len(d.buf) > readBuffer: // a large frame is done
		d.resize(readBuffer)
	case d.filled && len(d.buf) < readBuffer: // more comes than fits
		d.resize(2 * len(d.buf))
	case d.r > 0:
		copy(d.buf, d.buf[d.r:d.w])
	}
	d.r, d.w = 0, have
	return d.buf[have:]
}

// grown returns the next size of a buffer that is full: twice as much, but not
// more than the frame in it needs.
func (d *Decoder) grown() int {
	n := max(firstBuffer, 2*len(d.buf))
	if size, err := frameSize(d.buf[d.r:d.w], d.max); err == nil && size > readBuffer {
		n = min(n, max(size, len(d.buf)+1))
	}
	return n
}

func (d *Decoder) resize(n int) {
	b := make([]byte, n)
	copy(b, d.buf[d.r:d.w])
	d.buf = b
}

// Wrote says that the first n bytes of the last Space are the next ones of the
// stream.
func (d *Decoder) Wrote(n int) {
	d.w += n
	d.filled = d.w == len(d.buf)
}

// Next takes the next frame out. A message is stored in *m; its Body is valid
// until the next call of Space. Incomplete means that more bytes are needed.
// After an error, which is an [*Error], the stream is lost: Next returns the
// same error for ever.
func (d *Decoder) Next(m *channel.Message) (Kind, error) {
	if d.err != nil || d.r == d.w {
		return Incomplete, d.err
	}
	k, n, err := decodeFrame(d.buf[d.r:d.w], d.max, m, &d.sender)
	d.r += n
	d.err = err
	return k, err
}

// Buffered returns how many bytes have come that Next has not taken out.
func (d *Decoder) Buffered() int { return d.w - d.r }

// Held returns how many bytes of memory the buffer takes.
func (d *Decoder) Held() int { return len(d.buf) }
