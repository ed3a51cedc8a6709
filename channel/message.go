package channel

import (
	"strconv"
	"strings"
	"time"
)

// Options is the option word of a message: Tribes' bits 0x0001 to 0x0100, ours
// from 0x0200 to 0x8000. Third-party interceptors use 0x0001_0000 to 0x4000_0000.
// Unknown bits are kept and carried.
type Options uint32

const (
	// ByteMessage: the body is raw bytes, not a Java object stream.
	ByteMessage Options = 0x0001
	// UseAck: the sender waits until the receiver has the message.
	UseAck Options = 0x0002
	// SyncAck: together with UseAck, the sender waits until the receiver has
	// processed the message.
	SyncAck Options = 0x0004
	// Async: the dispatch interceptor queues the message and the sender goes on.
	Async Options = 0x0008
	// Secure is carried for Tribes; nothing reads it.
	Secure Options = 0x0010
	// UDP: send as a datagram to the member's UDP port.
	UDP Options = 0x0020
	// Multicast: send as one datagram to the group.
	Multicast Options = 0x0040
	// Gzip marks a compressed body.
	Gzip Options = 0x0100
	// Zstd marks a body that is compressed with Zstandard (Longhouse only).
	Zstd Options = 0x0200
	// TotalOrder marks messages of the total order layer (Longhouse only).
	TotalOrder Options = 0x0400
	// TwoPhase marks messages that all destinations deliver or none.
	TwoPhase Options = 0x0800

	// ObjectStream: the body given to Send is a Java object stream, so that the
	// message goes out without ByteMessage. It is not on the wire itself.
	ObjectStream Options = 0x8000

	// ThirdPartyMin and ThirdPartyMax bound the bits that belong to
	// third-party interceptors.
	ThirdPartyMin Options = 0x0001_0000
	ThirdPartyMax Options = 0x4000_0000
)

// The usual combinations. Fire and forget is ByteMessage alone.
const (
	SendNone    = ByteMessage
	SendAck     = ByteMessage | UseAck
	SendSyncAck = ByteMessage | UseAck | SyncAck
	SendAsync   = ByteMessage | Async
)

// Has reports whether all bits of f are set.
func (o Options) Has(f Options) bool { return o&f == f }

var optionNames = []struct {
	bit  Options
	name string
}{
	{ObjectStream, "object_stream"},
	{TwoPhase, "two_phase"}, {TotalOrder, "total_order"}, {Zstd, "zstd"}, {Gzip, "gzip"}, {Multicast, "multicast"}, {UDP, "udp"}, {Secure, "secure"},
	{Async, "async"}, {SyncAck, "sync"}, {UseAck, "use_ack"}, {ByteMessage, "byte"},
}

// String lists the options from the highest bit down, unknown bits in
// hexadecimal; "none" when no bit is set.
func (o Options) String() string {
	var parts []string
	for _, n := range optionNames {
		if o.Has(n.bit) {
			parts = append(parts, n.name)
			o &^= n.bit
		}
	}
	if o != 0 {
		parts = append(parts, "0x"+strconv.FormatUint(uint64(o), 16))
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

// Message is one message on its way down or up the stack.
//
// Ownership: whoever is handed a *Message may change it until it passes it on
// or returns, and must not touch it afterwards. Body is only valid that long
// too: copy what you keep.
type Message struct {
	ID   UniqueID
	From Member
	// To are the destinations of a message on its way down; never shared
	// between messages that are sent at the same time. It is empty on the way
	// up.
	To      []Member
	Options Options
	// Time is the sender's clock when the message was made, in milliseconds
	// since 1970.
	Time int64
	Body []byte

	// Done, when set on the way down, is told the result, and Link.Send may
	// then return nil as soon as the message has been accepted. Done is called
	// exactly once if Send returned nil, and never if Send returned an error.
	Done Completion

	// Later, when set on the way up, lets a listener finish the message after
	// it has returned; see [Message.Defer].
	Later Deferrer
}

// Completion is told how the sending of a message ended: nil, or an error that
// is or wraps a *[SendError]. It may be called from any goroutine, must not
// block, and must not keep m or its body.
type Completion interface{ Complete(m *Message, err error) }

// Deferrer is implemented by the receiver.
type Deferrer interface {
	// Defer returns the function that ends the message. See [Message.Defer].
	Defer() func(error)
}

// Defer takes over the end of a received message: the acknowledgement that its
// sender waits for is given when the returned function is called (once, from
// any goroutine), not when the handler returns. The handler's own error is
// ignored then. The body is still valid only until the handler returns. Call
// Defer before the handler returns. It is cheap, and without effect, for
// messages that nobody waits for.
func (m *Message) Defer() func(error) {
	if m.Later == nil {
		return func(error) {}
	}
	return m.Later.Defer()
}

// When returns the time of the message.
func (m *Message) When() time.Time { return time.UnixMilli(m.Time) }

// ProbeBody is the body of the messages by which failure detectors check a
// member: what Tribes' TcpFailureDetector sends. Being acknowledged is all they
// are for: no listener sees them, whether the member has a failure detector or
// not.
const ProbeBody = "\x4f\xa7\x73\x48\x79\x82\x43\xc9\x9f\x6f\x89\x80\xa1\x5b\x07\x14" +
	"\x7d\xd9\x52\x5b\xeb\xf1\x43\x9a\xb7\x7e\xbe\x8f\x81\x67\x1e\xb6" +
	"\x37\x15\xbe\x87\x45\x7e\x4c\xa8\xbf\x0a\x4d\x13\x53\x38\x15\x32" +
	"\x55\xf6\x94\xb7\x3a\xfa\x40\x78\x91\x04\x7d\xd7\x72\x84\xc0\xd5"
