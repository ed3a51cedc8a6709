package bridge

import (
	"encoding/binary"
	"fmt"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// A message travels as
//
//	u32 length of the head
//	    u8 flags, 16 id, u64 time, the sender, the destinations (down only)
//	body
//
// with its options in the header of the frame.

// Flags of a message.
const (
	// messageTold: somebody is told when the message has ended (Done, Later).
	messageTold byte = 1
)

const (
	messageFixed = 1 + 16 + 8
	// messageFlow is where the id of the sender begins, which tells the flows
	// of received messages apart.
	messageFlow = 4 + messageFixed
	// maxHead bounds the length of a head: destinations are long.
	maxHead = 1 << 20
)

// appendHead packs all of m but options and body.
func appendHead(b []byte, m *channel.Message, flags byte, down bool) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0, flags)
	b = append(b, m.ID[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(m.Time))
	b = appendMember(b, m.From)
	if down {
		b = appendMembers(b, m.To)
	}
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	return b
}

// message unpacks a message; the body aliases the payload.
func (d *decoder) message(m *channel.Message, down bool) (flags byte) {
	head := d.head()
	body := d.b
	d.b = head
	flags = d.byte("message")
	copy(m.ID[:], d.take(len(m.ID), "message id"))
	if b := d.take(8, "message time"); b != nil {
		m.Time = int64(binary.BigEndian.Uint64(b))
	}
	m.From = d.member()
	if down {
		m.To = d.members()
	}
	if d.err == nil {
		m.Body = body[:len(body):len(body)]
	}
	return flags
}

func (d *decoder) head() []byte {
	b := d.take(4, "message")
	if b == nil {
		return nil
	}
	n := binary.BigEndian.Uint32(b)
	if n > maxHead {
		d.fail("message head")
		return nil
	}
	return d.take(int(n), "message head")
}

// What a verdict of frame.Replace carries, in this order, after one byte that
// says so; the new options are in the header of the frame.
const (
	replaceID byte = 1 << iota
	replaceTime
	replaceFrom
	replaceTo
	replaceBody
	// verdictOpen: an end follows, see kindEnd. It is also what a verdict of
	// frame.Drop says: the plugin keeps the message.
	verdictOpen
	// verdictReport: the plugin wants to be told what became of the message,
	// see kindResult.
	verdictReport
)

// How a kindEnd ends a message, in the options of the frame.
const (
	// endHandler: the handler has returned. With an error that is the result,
	// else it is what became of the message.
	endHandler uint32 = 0
	// endFinal: the result is the one that is given.
	endFinal uint32 = 1
)

// verdict is what the plugin has decided about one message.
type verdict struct {
	kind    frame.Verdict
	options channel.Options
	fields  byte
	id      channel.UniqueID
	time    int64
	from    channel.Member
	to      []channel.Member
	body    []byte
	err     error
}

func (v *verdict) open() bool { return v.fields&verdictOpen != 0 }

// decodeVerdict unpacks a verdict.
func decodeVerdict(v *verdict, f frame.Frame, in *interner) error {
	*v = verdict{kind: f.Verdict, options: channel.Options(f.Options)}
	d := decoder{b: f.Payload, in: in}
	switch f.Verdict {
	case frame.Pass, frame.Drop:
		if len(d.b) > 0 {
			v.fields = d.byte("verdict") & (verdictOpen | verdictReport)
		}
		return nil
	case frame.Error:
		v.err = decodeError(f.Payload, in)
		return nil
	case frame.Replace:
	default:
		return fmt.Errorf("%w: verdict %d is unknown", frame.ErrProtocol, f.Verdict)
	}
	v.fields = d.byte("verdict")
	if v.fields&replaceID != 0 {
		copy(v.id[:], d.take(len(v.id), "message id"))
	}
	if v.fields&replaceTime != 0 {
		if b := d.take(8, "message time"); b != nil {
			v.time = int64(binary.BigEndian.Uint64(b))
		}
	}
	if v.fields&replaceFrom != 0 {
		v.from = d.member()
	}
	if v.fields&replaceTo != 0 {
		v.to = d.members()
	}
	if v.fields&replaceBody != 0 {
		v.body = d.b[:len(d.b):len(d.b)]
	}
	if d.err != nil {
		return fmt.Errorf("%w: %w", frame.ErrProtocol, d.err)
	}
	return nil
}

// apply changes m as the plugin has; body is the body as it was sent.
func (v *verdict) apply(m *channel.Message, body []byte) {
	m.Body = body
	if v.kind != frame.Replace {
		return
	}
	m.Options = v.options
	if v.fields&replaceID != 0 {
		m.ID = v.id
	}
	if v.fields&replaceTime != 0 {
		m.Time = v.time
	}
	if v.fields&replaceFrom != 0 {
		m.From = v.from
	}
	if v.fields&replaceTo != 0 {
		m.To = v.to
	}
	if v.fields&replaceBody != 0 {
		m.Body = v.body
	}
}
