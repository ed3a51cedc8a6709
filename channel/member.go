package channel

import (
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"time"
)

// UniqueID is the identity of one incarnation of a node, or of one message:
// 16 bytes, random, with the version and variant bits of an RFC 4122 UUID set
// as Tribes' UUIDGenerator does. No receiver checks the bits.
type UniqueID [16]byte

// NewUniqueID returns a random id. It does not allocate and may be called from
// any goroutine.
func NewUniqueID() UniqueID {
	var u UniqueID
	a, b := rand.Uint64(), rand.Uint64()
	for i := range 8 {
		u[i] = byte(a >> (8 * i))
		u[8+i] = byte(b >> (8 * i))
	}
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// String returns the id as 32 hexadecimal digits.
func (u UniqueID) String() string { return hex.EncodeToString(u[:]) }

// IsZero reports whether no id has been set.
func (u UniqueID) IsZero() bool { return u == UniqueID{} }

// ShutdownCommand is the command of a member record that announces a graceful
// leave (Tribes: Member.SHUTDOWN_PAYLOAD).
const ShutdownCommand = "BABY-ALEX"

// Member describes one node of the group. It is a comparable value: it may be
// copied, compared and used as a map key. Two values describe the same node
// exactly when their IDs are equal, see [Member.Is]; the other fields may
// change while the node lives.
type Member struct {
	ID UniqueID
	// Host is the address that the member's receiver is reached at.
	Host netip.Addr
	// Port is the TCP port of the receiver. SecurePort and UDPPort are -1 when
	// the member has none.
	Port, SecurePort, UDPPort int
	// Domain is the logical group the member belongs to; empty for none.
	Domain string
	// Command is empty, or ShutdownCommand in a member's last record.
	Command string
	// Payload is application data carried by the member record. Longhouse
	// nodes put an [Announcement] there.
	Payload string
	// Alive is how long the member had been up when it sent this record, in
	// whole milliseconds on the wire. Views are ordered by it.
	Alive time.Duration
}

// Is reports whether m and o are the same incarnation of the same node.
func (m Member) Is(o Member) bool { return m.ID == o.ID }

// IsZero reports whether m describes no node.
func (m Member) IsZero() bool { return m.ID.IsZero() && !m.Host.IsValid() }

// Addr returns the TCP address of the member's receiver.
func (m Member) Addr() netip.AddrPort { return netip.AddrPortFrom(m.Host, uint16(m.Port)) }

// Name returns the name the member announced for itself (its route), or its
// address when it announced none. It is for people: names are not unique.
func (m Member) Name() string {
	if a, ok := m.Announcement(); ok && a.Name != "" {
		return a.Name
	}
	return m.address()
}

// String returns name and address, for logs.
func (m Member) String() string {
	if a, ok := m.Announcement(); ok && a.Name != "" {
		return a.Name + " (" + m.address() + ")"
	}
	return m.address()
}

func (m Member) address() string {
	if !m.Host.IsValid() {
		return "tcp://?:" + strconv.Itoa(m.Port)
	}
	return "tcp://" + m.Addr().String()
}
