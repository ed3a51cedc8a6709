package coordinator

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// The body of an election message, as Tribes' NonBlockingCoordinator writes it:
//
//	header · counted leader record · counted source record ·
//	i32 number of members · counted records · 16 bytes view id · 16 bytes type
const (
	header       = "\xaa\x26\xde\xe3\x9e\x5a\x41\x3f\xaf\x86\xfa\x92\x63\xca\x0d\x3f"
	request      = "\x68\xa1\xa4\xd6\x72\xdc\x47\xed\xb1\x14\x7a\x65\xff\xd0\xcf\x1e"
	confirmation = "\x43\x58\x6b\xaa\x45\x17\x4c\xba\xa5\xe9\xa9\xe7\x83\x56\x4b\x14"
	// alive is recognised by Tribes and ignored; no version sends it.
	alive = "\x4f\x87\xe7\xf1\xc5\x05\x40\x5e\xb3\x71\x89\xa8\x34\x72\xc8\xd2" +
		"\xee\x66\x0a\x22\x81\xf7\x47\x73\xba\x48\x9b\x58\x48\x84\x7f\x6f" +
		"\x4a\x4c\x8c\x32\x6f\x67\x41\x03\xb3\x33\xdd\x00\x77\x75\x09\xe6" +
		"\x77\x32\xb5\x97\x9a\x24\x4f\x25\xbc\xac\x85\x0f\xea\x93\x6a\xc9"

	// maxView bounds the members of a view, as the channel's table does.
	maxView = 4097
	// minRecord is the size of the smallest counted member record: 4 bytes of
	// length, 73 of frame, 4 of host.
	minRecord = 4 + 73 + 4
)

// message is one election message.
type message struct {
	leader, source channel.Member
	view           []channel.Member
	id             channel.UniqueID
	confirmed      bool // type: confirmation, otherwise request
}

var errMessage = errors.New("coordinator: malformed election message")

// isMessage reports whether a body belongs to this layer.
func isMessage(b []byte) bool {
	return len(b) >= len(header) && string(b[:len(header)]) == header || len(b) == len(alive) && string(b) == alive
}

func appendMember(b []byte, m channel.Member) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0)
	b = wire.AppendMember(b, m)
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	return b
}

// encode returns the body of m.
func (m *message) encode() []byte {
	b := make([]byte, 0, len(header)+(len(m.view)+2)*128+36)
	b = append(b, header...)
	b = appendMember(b, m.leader)
	b = appendMember(b, m.source)
	b = binary.BigEndian.AppendUint32(b, uint32(len(m.view)))
	for _, v := range m.view {
		b = appendMember(b, v)
	}
	b = append(b, m.id[:]...)
	if m.confirmed {
		return append(b, confirmation...)
	}
	return append(b, request...)
}

// reader takes fields off a body.
type reader struct {
	b   []byte
	err error
}

func (r *reader) take(n int) []byte {
	if r.err != nil || n < 0 || n > len(r.b) {
		if r.err == nil {
			r.err = fmt.Errorf("%w: %d bytes are missing", errMessage, n-len(r.b))
		}
		return nil
	}
	taken := r.b[:n]
	r.b = r.b[n:]
	return taken
}

func (r *reader) number() int {
	b := r.take(4)
	if b == nil {
		return -1
	}
	return int(int32(binary.BigEndian.Uint32(b)))
}

func (r *reader) member() channel.Member {
	b := r.take(r.number())
	if r.err != nil {
		return channel.Member{}
	}
	m, n, err := wire.DecodeMember(b)
	switch {
	case err != nil:
		r.err = fmt.Errorf("%w: %w", errMessage, err)
	case n != len(b):
		r.err = fmt.Errorf("%w: %d bytes after a member record", errMessage, len(b)-n)
	}
	m.Host = m.Host.Unmap()
	return m
}

// decode reads a body. What it returns shares no memory with b.
func decode(b []byte) (m message, err error) {
	r := reader{b: b}
	if !bytes.Equal(r.take(len(header)), []byte(header)) {
		return m, fmt.Errorf("%w: no header", errMessage)
	}
	m.leader, m.source = r.member(), r.member()
	n := r.number()
	if r.err == nil && (n < 0 || n > maxView || n > len(r.b)/minRecord) {
		r.err = fmt.Errorf("%w: %d members are declared, %d bytes are there", errMessage, n, len(r.b))
	}
	for i := 0; i < n && r.err == nil; i++ {
		m.view = append(m.view, r.member())
	}
	copy(m.id[:], r.take(len(m.id)))
	kind := string(r.take(len(request)))
	switch {
	case r.err != nil:
		return message{}, r.err
	case kind != request && kind != confirmation:
		return message{}, fmt.Errorf("%w: type %x", errMessage, kind)
	case len(r.b) > 0:
		return message{}, fmt.Errorf("%w: %d bytes after the type", errMessage, len(r.b))
	}
	m.confirmed = kind == confirmation
	return m, nil
}

// compare is Tribes' absolute order of members: by host (a shorter address comes
// first), port and id, all unsigned.
func compare(a, b channel.Member) int {
	x, y := a.Host.Unmap().AsSlice(), b.Host.Unmap().AsSlice()
	if len(x) != len(y) {
		return len(x) - len(y)
	}
	if c := bytes.Compare(x, y); c != 0 {
		return c
	}
	if a.Port != b.Port {
		return a.Port - b.Port
	}
	return bytes.Compare(a.ID[:], b.ID[:])
}

// ordered sorts members and reports whether none is there twice.
func ordered(ms []channel.Member) ([]channel.Member, bool) {
	ms = slices.Clone(ms)
	slices.SortFunc(ms, compare)
	for i := 1; i < len(ms); i++ {
		if ms[i].ID == ms[i-1].ID {
			return ms, false
		}
	}
	return ms, true
}

// View ids of Longhouse nodes are UUIDs of version 8 that begin with a counter:
// later views have larger ids. Those of Tribes are random and have no order.
const (
	counterBits = 48
	// maxJump is the largest step of the counter that is believed.
	maxJump = 1 << 32
)

// newID returns an id with the given counter.
func newID(counter uint64) channel.UniqueID {
	id := channel.NewUniqueID()
	id[6] = id[6]&0x0f | 0x80
	return withCounter(id, counter)
}

func withCounter(id channel.UniqueID, counter uint64) channel.UniqueID {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], counter<<(64-counterBits))
	copy(id[:counterBits/8], b[:])
	return id
}

// counterOf returns the counter of an id; ok is false if it has none.
func counterOf(id channel.UniqueID) (counter uint64, ok bool) {
	var b [8]byte
	copy(b[:], id[:counterBits/8])
	return binary.BigEndian.Uint64(b[:]) >> (64 - counterBits), id[6]>>4 == 8
}

// tail is the part of an id that stays when its counter changes.
func tail(id channel.UniqueID) [10]byte { return [10]byte(id[6:]) }
