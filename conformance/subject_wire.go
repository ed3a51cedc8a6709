package conformance

import (
	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// Codec is an implementation of the Tribes byte format. All functions must be
// given.
type Codec struct {
	// AppendMember and DecodeMember write and read a member record. Decoding
	// returns how many bytes the record takes.
	AppendMember func(dst []byte, m channel.Member) []byte
	DecodeMember func(b []byte) (m channel.Member, n int, err error)
	// AppendFrame writes the frame of a message. DecodeFrame reads one of at
	// most max bytes; an incomplete frame is wire.Incomplete without an error.
	AppendFrame func(dst []byte, m *channel.Message) []byte
	DecodeFrame func(b []byte, max int, m *channel.Message) (k wire.Kind, n int, err error)
	// NewStream takes frames of at most max bytes out of a stream.
	NewStream func(max int) Stream
	// Ack and NegativeAck are whole acknowledgements.
	Ack, NegativeAck []byte
}

// Stream takes frames out of a stream of bytes; see wire.Decoder, which is one.
type Stream interface {
	Space() []byte
	Wrote(n int)
	Next(m *channel.Message) (wire.Kind, error)
}

// WireSubject is a codec.
type WireSubject interface {
	Subject
	Codec() Codec
}

type wireSubject struct {
	name  string
	codec Codec
}

// Wire is the subject of a codec.
func Wire(name string, c Codec) Subject { return wireSubject{name, c} }

// OwnCodec is the codec of channel/wire.
func OwnCodec() Codec {
	return Codec{
		AppendMember: wire.AppendMember, DecodeMember: wire.DecodeMember,
		AppendFrame: wire.AppendFrame, DecodeFrame: wire.DecodeFrame,
		NewStream: func(max int) Stream { return wire.NewDecoder(max) },
		Ack:       []byte(wire.Ack), NegativeAck: []byte(wire.NegativeAck),
	}
}

// Describe implements Subject.
func (w wireSubject) Describe() (Description, error) {
	return Description{Kind: ProfileWire, Name: w.name}, nil
}

// Codec implements WireSubject.
func (w wireSubject) Codec() Codec { return w.codec }
