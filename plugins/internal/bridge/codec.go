package bridge

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/longhouse-go/longhouse/channel"
)

// Bounds of what is decoded.
const (
	// maxString bounds one string of a member, in bytes.
	maxString = 64 << 10
	// maxMembers bounds the members of one view or destination list.
	maxMembers = 4096
	// maxInterned bounds the strings that are kept for reuse.
	maxInterned = 4096
)

var (
	encMode = must(cbor.EncOptions{Time: cbor.TimeRFC3339Nano}.EncMode())
	decMode = must(cbor.DecOptions{MaxArrayElements: 1 << 21, MaxMapPairs: 1 << 21}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil { // constant options
		panic("bridge: " + err.Error())
	}
	return v
}

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendMember(b []byte, m channel.Member) []byte {
	b = append(b, m.ID[:]...)
	// Addresses are 0, 4 or 16 bytes, and a zone in the odd link-local one.
	start := len(b)
	b = append(b, 0)
	b, err := m.Host.AppendBinary(b)
	if err != nil || len(b)-start-1 > 255 {
		b = b[:start+1] // an address nobody can dial; as good as none
	}
	b[start] = byte(len(b) - start - 1)
	b = binary.AppendVarint(b, int64(m.Port))
	b = binary.AppendVarint(b, int64(m.SecurePort))
	b = binary.AppendVarint(b, int64(m.UDPPort))
	b = binary.AppendVarint(b, int64(m.Alive))
	b = appendString(b, m.Domain)
	b = appendString(b, m.Command)
	return appendString(b, m.Payload)
}

func appendMembers(b []byte, ms []channel.Member) []byte {
	b = binary.AppendUvarint(b, uint64(len(ms)))
	for _, m := range ms {
		b = appendMember(b, m)
	}
	return b
}

func appendView(b []byte, v channel.View) []byte {
	b = binary.AppendUvarint(b, v.Version)
	b = appendMember(b, v.Local)
	return appendMembers(b, v.Members)
}

// decoder reads the packed forms. After the first mistake it returns zero
// values, and err says what was wrong.
type decoder struct {
	b   []byte
	err error
	in  *interner
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: bad %s in a plugin frame", channel.ErrBadMessage, what)
	}
	d.b = nil
}

func (d *decoder) take(n int, what string) []byte {
	if n > len(d.b) {
		d.fail(what)
		return nil
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) uvarint(what string) uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail(what)
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) varint(what string) int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail(what)
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) byte(what string) byte {
	if b := d.take(1, what); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) string(what string) string {
	n := d.uvarint(what)
	if n > maxString {
		d.fail(what)
		return ""
	}
	return d.in.get(d.take(int(n), what))
}

func (d *decoder) member() (m channel.Member) {
	copy(m.ID[:], d.take(len(m.ID), "member id"))
	n := int(d.byte("address"))
	if b := d.take(n, "address"); n > 0 && b != nil {
		if err := m.Host.UnmarshalBinary(b); err != nil {
			m.Host = netip.Addr{}
			d.fail("address")
		}
	}
	m.Port = int(d.varint("port"))
	m.SecurePort = int(d.varint("secure port"))
	m.UDPPort = int(d.varint("UDP port"))
	m.Alive = time.Duration(d.varint("alive time"))
	m.Domain = d.string("domain")
	m.Command = d.string("command")
	m.Payload = d.string("payload")
	return m
}

// minMember is the least number of bytes a member takes.
const minMember = 16 + 1 + 4 + 3

func (d *decoder) members() []channel.Member {
	n := d.uvarint("member count")
	if n > maxMembers || n > uint64(len(d.b)/minMember) {
		d.fail("member count")
		return nil
	}
	ms := make([]channel.Member, 0, n)
	for range n {
		ms = append(ms, d.member())
	}
	return ms
}

func (d *decoder) view() channel.View {
	version := d.uvarint("view version")
	local := d.member()
	// The order is the sender's: it has sorted them.
	return channel.View{Version: version, Local: local, Members: d.members()}
}

// interner keeps the strings that come with every message, so that they are
// not allocated each time. A nil interner keeps nothing.
type interner struct {
	mu      sync.Mutex
	strings map[string]string // guarded by mu
}

func newInterner() *interner { return &interner{strings: map[string]string{}} }

func (in *interner) get(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	if in == nil {
		return string(b)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	s, ok := in.strings[string(b)]
	if !ok {
		if len(in.strings) >= maxInterned {
			clear(in.strings)
		}
		s = string(b)
		in.strings[s] = s
	}
	return s
}
