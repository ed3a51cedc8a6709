package wire

import (
	"encoding/binary"
	"math"

	"github.com/longhouse-go/longhouse/channel"
)

const (
	frameBegin = "FLT2002"
	frameEnd   = "TLF2003"

	frameHead  = FrameHead
	frameExtra = frameHead + len(frameEnd) // 18: all that is not payload
	idSize     = len(channel.UniqueID{})
	packHead   = 4 + 8 + 4 + idSize // options, time, counted id
	packExtra  = packHead + 4 + 4   // and the lengths of sender and body
	minPack    = packExtra + minRecord

	ackSize    = 3
	okPayload  = "\x06\x02\x03"
	badPayload = "\x0b\x00\x05"

	// Ack and NegativeAck are whole acknowledgement frames. They carry no id:
	// they are matched by order.
	Ack         = frameBegin + "\x00\x00\x00\x03" + okPayload + frameEnd
	NegativeAck = frameBegin + "\x00\x00\x00\x03" + badPayload + frameEnd

	// A credit frame is ours: Tribes has none, and no Tribes node is sent one.
	creditMark = "LHC1"
	creditSize = len(creditMark) + 8 + 8

	// FrameHead is how many bytes of a frame come before its payload, and tell
	// that it is a frame and how large it is.
	FrameHead = len(frameBegin) + 4

	// DefaultMaxFrame is the default bound of a whole frame, in bytes.
	DefaultMaxFrame = 64 << 20
)

// FrameSize returns how many bytes a frame of m takes. It may be more than an
// i32 length can say: check it against a bound before AppendFrame.
func FrameSize(m *channel.Message) int {
	return frameExtra + packExtra + MemberSize(m.From) + len(m.Body)
}

// AppendFrame appends the frame of m with m.From as sender and returns the
// extended slice. m.To is not part of a frame.
func AppendFrame(dst []byte, m *channel.Message) []byte {
	size := MemberSize(m.From)
	dst = appendPackHead(dst, m, size)
	dst = AppendMember(dst, m.From)
	return appendPackTail(dst, m)
}

// AppendFrameRecord is AppendFrame with the sender's record as bytes that
// AppendMember made before.
func AppendFrameRecord(dst, record []byte, m *channel.Message) []byte {
	dst = appendPackHead(dst, m, len(record))
	dst = append(dst, record...)
	return appendPackTail(dst, m)
}

// appendPackHead appends everything before the sender's record of size bytes.
func appendPackHead(dst []byte, m *channel.Message, size int) []byte {
	dst = append(dst, frameBegin...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(packExtra+size+len(m.Body)))
	dst = binary.BigEndian.AppendUint32(dst, uint32(m.Options))
	dst = binary.BigEndian.AppendUint64(dst, uint64(m.Time))
	dst = appendCounted(dst, m.ID[:])
	return binary.BigEndian.AppendUint32(dst, uint32(size))
}

func appendPackTail(dst []byte, m *channel.Message) []byte {
	dst = appendCounted(dst, m.Body)
	return append(dst, frameEnd...)
}

// Kind says what a frame is.
type Kind uint8

const (
	// Incomplete: there is no whole frame yet.
	Incomplete Kind = iota
	// MessageFrame: a channel package.
	MessageFrame
	// AckFrame and NegativeAckFrame: an acknowledgement.
	AckFrame
	NegativeAckFrame
	// CreditFrame: how far the receiver of a connection has come. The numbers
	// are in the Body of the message: see ParseCredit.
	CreditFrame
)

// AppendCredit appends the frame by which the receiver of a connection tells its
// sender how many messages it has processed since the connection began, and up
// to how many bytes may be sent on it in all. Only senders whose announcement
// has a Credit understand it.
func AppendCredit(dst []byte, processed, limit uint64) []byte {
	dst = append(dst, frameBegin...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(creditSize))
	dst = append(dst, creditMark...)
	dst = binary.BigEndian.AppendUint64(dst, processed)
	dst = binary.BigEndian.AppendUint64(dst, limit)
	return append(dst, frameEnd...)
}

// ParseCredit returns the numbers of a credit frame.
func ParseCredit(m *channel.Message) (processed, limit uint64) {
	return binary.BigEndian.Uint64(m.Body), binary.BigEndian.Uint64(m.Body[8:])
}

// DecodeFrame reads the frame at the start of b, a datagram for example, and
// returns what it is and how many bytes it takes. A message is stored in *m with
// Body inside b. Without a whole frame in b the kind is Incomplete, n is 0 and
// err is nil; bytes that can never become a frame of at most max bytes are an
// error at once, however few they are.
func DecodeFrame(b []byte, max int, m *channel.Message) (k Kind, n int, err error) {
	var s sender
	return decodeFrame(b, max, m, &s)
}

// FrameReader reads frames as DecodeFrame does, datagrams for example, and does
// not allocate as long as they come from the same sender. It may be used by one
// goroutine at a time.
type FrameReader struct{ s sender }

// Decode is DecodeFrame.
func (r *FrameReader) Decode(b []byte, max int, m *channel.Message) (k Kind, n int, err error) {
	return decodeFrame(b, max, m, &r.s)
}

func decodeFrame(b []byte, max int, m *channel.Message, s *sender) (Kind, int, error) {
	size, err := frameSize(b, max)
	if err != nil || size == 0 || len(b) < size {
		return Incomplete, 0, err
	}
	if string(b[size-len(frameEnd):size]) != frameEnd {
		return Incomplete, 0, ErrFrameEnd
	}
	payload := b[frameHead : size-len(frameEnd)]
	switch string(payload[:ackSize]) {
	case okPayload:
		if len(payload) == ackSize {
			return AckFrame, size, nil
		}
	case badPayload:
		if len(payload) == ackSize {
			return NegativeAckFrame, size, nil
		}
	}
	if len(payload) == creditSize && string(payload[:len(creditMark)]) == creditMark {
		*m = channel.Message{Body: payload[len(creditMark):]}
		return CreditFrame, size, nil
	}
	if err := decodePack(payload, m, s); err != nil {
		return Incomplete, 0, err
	}
	return MessageFrame, size, nil
}

// frameSize returns the size of the whole frame at the start of b, or 0 if b
// ends before its length.
func frameSize(b []byte, limit int) (int, error) {
	if !hasPart(b, frameBegin) {
		return 0, ErrFrameMarker
	}
	if len(b) < frameHead {
		return 0, nil
	}
	n := binary.BigEndian.Uint32(b[len(frameBegin):])
	switch {
	case n > math.MaxInt32, n < uint32(minPack) && n != ackSize && n != uint32(creditSize):
		return 0, ErrFrameLength
	case int(n) > limit-frameExtra:
		return 0, ErrFrameTooLarge
	}
	return int(n) + frameExtra, nil
}

// decodePack reads a channel package into *m.
func decodePack(b []byte, m *channel.Message, s *sender) error {
	if len(b) < minPack {
		return ErrFrameLength
	}
	if binary.BigEndian.Uint32(b[12:]) != uint32(idSize) {
		return ErrMessageID
	}
	record, rest, ok := counted(b[packHead:])
	if !ok || len(record) > MaxMember {
		return ErrSender
	}
	body, rest, ok := counted(rest)
	if !ok || len(rest) != 0 {
		return ErrBody
	}
	if err := s.decode(record); err != nil {
		return err
	}
	*m = channel.Message{
		ID:      channel.UniqueID(b[16:]),
		From:    s.member,
		Options: channel.Options(binary.BigEndian.Uint32(b)),
		Time:    int64(binary.BigEndian.Uint64(b[4:])),
		Body:    body,
	}
	return nil
}

// sender remembers the sender's record of the last message: all messages of a
// connection usually carry the same bytes.
type sender struct {
	record []byte
	member channel.Member
}

func (s *sender) decode(record []byte) error {
	if len(s.record) > 0 && string(s.record) == string(record) {
		return nil
	}
	m, n, err := DecodeMember(record)
	switch {
	case err == ErrTruncated:
		return ErrSender
	case err != nil:
		return err
	case n != len(record):
		return ErrSender
	}
	s.record, s.member = append(s.record[:0], record...), m
	return nil
}
