package wire

import (
	"encoding/binary"
	"math"
	"net/netip"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

const (
	memberBegin = "TRIBES-B\x01\x00"
	memberEnd   = "TRIBES-E\x01\x00"

	memberHead  = len(memberBegin) + 4         // marker and length
	memberFrame = memberHead + len(memberEnd)  // all that is not body
	memberFixed = 8 + 3*4 + 1 + 4 + 4 + 16 + 4 // body without host, command, domain, payload
	minMember   = memberFrame + memberFixed    // 73: a record without host
	minRecord   = minMember + 4                // 77: plain IPv4

	// MaxMember is the largest member record, in bytes. Tribes refuses
	// payloads that would exceed it, since a record must fit in a datagram.
	MaxMember = 65535
)

// MemberSize returns how many bytes AppendMember appends for m.
func MemberSize(m channel.Member) int {
	return minMember + hostLen(m.Host) + len(m.Command) + len(m.Domain) + len(m.Payload)
}

func hostLen(a netip.Addr) int {
	switch {
	case a.Is4():
		return 4
	case a.Is6():
		return 16
	}
	return 0
}

// AppendMember appends the record of m, which is also the heartbeat datagram of
// m, and returns the extended slice. Text is written byte for byte (Tribes reads
// ISO-8859-1); an IPv6 zone is not written. A record that is larger than
// [MaxMember] or has no host is refused by readers: check before it is sent.
func AppendMember(dst []byte, m channel.Member) []byte {
	dst = append(dst, memberBegin...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(MemberSize(m)-memberFrame))
	dst = binary.BigEndian.AppendUint64(dst, uint64(m.Alive/time.Millisecond))
	dst = binary.BigEndian.AppendUint32(dst, uint32(m.Port))
	dst = binary.BigEndian.AppendUint32(dst, uint32(m.SecurePort))
	dst = binary.BigEndian.AppendUint32(dst, uint32(m.UDPPort))
	switch {
	case m.Host.Is4():
		a := m.Host.As4()
		dst = append(append(dst, 4), a[:]...)
	case m.Host.Is6():
		a := m.Host.As16()
		dst = append(append(dst, 16), a[:]...)
	default:
		dst = append(dst, 0)
	}
	dst = appendCounted(dst, m.Command)
	dst = appendCounted(dst, m.Domain)
	dst = append(dst, m.ID[:]...)
	dst = appendCounted(dst, m.Payload)
	return append(dst, memberEnd...)
}

func appendCounted[T string | []byte](dst []byte, s T) []byte {
	return append(binary.BigEndian.AppendUint32(dst, uint32(len(s))), s...)
}

// DecodeMember reads the member record at the start of b and returns how many
// bytes it takes. Bytes behind the record are left alone: callers that do not
// want any compare n with len(b). Alive times that a time.Duration cannot hold
// (292 years) are cut to the nearest one it can. The result shares no memory
// with b.
func DecodeMember(b []byte) (m channel.Member, n int, err error) {
	if !hasPart(b, memberBegin) {
		return m, 0, ErrMemberMarker
	}
	if len(b) < memberHead {
		return m, 0, ErrTruncated
	}
	size := binary.BigEndian.Uint32(b[len(memberBegin):])
	if size < uint32(memberFixed) || size > uint32(MaxMember-memberFrame) {
		return m, 0, ErrMemberLength
	}
	n = memberFrame + int(size)
	if len(b) < n {
		return m, 0, ErrTruncated
	}
	if string(b[n-len(memberEnd):n]) != memberEnd {
		return m, 0, ErrMemberEnd
	}
	if err := decodeBody(&m, b[memberHead:n-len(memberEnd)]); err != nil {
		return channel.Member{}, 0, err
	}
	return m, n, nil
}

// decodeBody reads what is between the length and the end marker of a record;
// b has at least memberFixed bytes.
func decodeBody(m *channel.Member, b []byte) error {
	m.Alive = millis(int64(binary.BigEndian.Uint64(b)))
	m.Port = int(int32(binary.BigEndian.Uint32(b[8:])))
	m.SecurePort = int(int32(binary.BigEndian.Uint32(b[12:])))
	m.UDPPort = int(int32(binary.BigEndian.Uint32(b[16:])))
	if !inRange(m.Port, 0) || !inRange(m.SecurePort, -1) || !inRange(m.UDPPort, -1) {
		return ErrMemberPort
	}
	h := int(b[20])
	if h != 4 && h != 16 {
		return ErrMemberHost
	}
	b = b[21:]
	if len(b) < h {
		return ErrMemberFields
	}
	m.Host, _ = netip.AddrFromSlice(b[:h])
	b = b[h:]
	command, b, ok1 := counted(b)
	domain, b, ok2 := counted(b)
	if !ok1 || !ok2 || len(b) < len(m.ID) {
		return ErrMemberFields
	}
	copy(m.ID[:], b)
	payload, b, ok := counted(b[len(m.ID):])
	if !ok || len(b) != 0 {
		return ErrMemberFields
	}
	m.Command, m.Domain, m.Payload = string(command), string(domain), string(payload)
	return nil
}

// counted cuts a counted byte string off b.
func counted(b []byte) (s, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	if uint64(n) > uint64(len(b)) { // negative lengths are above it too
		return nil, nil, false
	}
	return b[:n], b[n:], true
}

func inRange(port, low int) bool { return port >= low && port <= math.MaxUint16 }

func millis(ms int64) time.Duration {
	const limit = math.MaxInt64 / int64(time.Millisecond)
	return time.Duration(min(max(ms, -limit), limit)) * time.Millisecond
}

// hasPart reports whether b starts with marker, or with a part of it and ends
// there.
func hasPart(b []byte, marker string) bool {
	n := min(len(b), len(marker))
	return string(b[:n]) == marker[:n]
}
