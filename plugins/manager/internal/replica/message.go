package replica

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Every message starts with the version of the protocol and its kind. All
// numbers are big endian. A list of items is, without placement, a batch of
// session.AppendBatch; with it, every record has a placement before it.
const (
	protocolVersion = 1
	headerSize      = 2
)

type kind byte

const (
	// kindDelta: items that have changed; with placement, flags before them.
	kindDelta kind = 1
	// kindDigest: exchange id, first shard, shard after the last, flags, and
	// pairs of key digest and version digest.
	kindDigest kind = 2
	// kindRecords: exchange id, items: what the initiator lacks; or 0 and items:
	// what the other side lacks.
	kindRecords kind = 3
	// kindAnswer ends one kindDigest: exchange id, first shard, shard after the
	// last, flags, and the key digests that the sender wants.
	kindAnswer kind = 4
	// kindFetch: fetch id, flags, a batch of records of which only the keys
	// count.
	kindFetch kind = 5
	// kindFound answers it: fetch id, flags, items.
	kindFound kind = 6
	// kindPing asks for a sign of life: its number, flags. kindPong answers it
	// with the same number.
	kindPing kind = 7
	kindPong kind = 8
	// kindPlace: 0, items of which only the placement and the key count.
	kindPlace kind = 9
	// kindDrop: 0, and for each session that the receiver need not keep the
	// version digest of the sender and a record of which only the key counts.
	kindDrop kind = 10
	// kindGone: 0, a batch of records of which only the keys count: the sender
	// does not have them any more.
	kindGone kind = 11
	// kindProve: proof id, a batch of records of which only the keys count: does
	// the receiver have them? kindProof answers it: proof id, pairs of key digest
	// and content of those that it has.
	kindProve kind = 12
	kindProof kind = 13

	lastKind = kindProof
)

// Flags of a message.
const (
	// flagJoining: the initiator has no complete state yet.
	flagJoining byte = 1 << iota
	// flagReady: the sender has a complete state.
	flagReady
	// flagRefused: the responder has not done what was asked; try again later.
	flagRefused
	// flagStrict: refuse the changes of sessions that the receiver does not have
	// as a whole; somebody waits for a copy.
	flagStrict
	// flagSpread: the changes go to all nodes that their placements list.
	flagSpread
	// flagTake: the sender is going to use the session.
	flagTake
)

var errMalformed = errors.New("malformed message")

func appendHeader(dst []byte, k kind, id uint64) []byte {
	dst = append(dst, protocolVersion, byte(k))
	if k == kindDelta {
		return dst
	}
	return binary.BigEndian.AppendUint64(dst, id)
}

// parseHeader checks the version and splits a message; id is 0 for kindDelta.
func parseHeader(b []byte) (k kind, id uint64, rest []byte, err error) {
	if len(b) < headerSize {
		return 0, 0, nil, fmt.Errorf("%w: %d bytes", errMalformed, len(b))
	}
	if b[0] != protocolVersion {
		return 0, 0, nil, fmt.Errorf("%w: protocol version %d, this node speaks %d", errMalformed, b[0], protocolVersion)
	}
	k, rest = kind(b[1]), b[headerSize:]
	switch {
	case k == kindDelta:
		return k, 0, rest, nil
	case k < kindDelta || k > lastKind:
		return 0, 0, nil, fmt.Errorf("%w: unknown kind %d", errMalformed, b[1])
	case len(rest) < 8:
		return 0, 0, nil, fmt.Errorf("%w: cut off", errMalformed)
	}
	return k, binary.BigEndian.Uint64(rest), rest[8:], nil
}

// parseFlags splits the flags off.
func parseFlags(b []byte) (flags byte, rest []byte, err error) {
	if len(b) == 0 {
		return 0, nil, fmt.Errorf("%w: cut off", errMalformed)
	}
	return b[0], b[1:], nil
}

// span is a range of shards with flags, at the start of kindDigest and
// kindAnswer.
type span struct {
	from, to int // shards from to to-1
	flags    byte
}

const spanSize = 4

func (s span) append(dst []byte) []byte {
	dst = append(dst, byte(s.from))
	dst = binary.BigEndian.AppendUint16(dst, uint16(s.to))
	return append(dst, s.flags)
}

// parseSpan reads a span and checks that records of size bytes follow.
func parseSpan(b []byte, size int) (s span, rest []byte, err error) {
	if len(b) < spanSize {
		return s, nil, fmt.Errorf("%w: cut off", errMalformed)
	}
	s = span{int(b[0]), int(binary.BigEndian.Uint16(b[1:])), b[3]}
	rest = b[spanSize:]
	if s.from >= s.to || s.to > shardCount || len(rest)%size != 0 {
		return s, nil, fmt.Errorf("%w: shards %d to %d with %d bytes", errMalformed, s.from, s.to, len(rest))
	}
	return s, rest, nil
}

// pairSize is a key digest and a version digest.
const pairSize = 16

func parsePairs(b []byte) map[uint64]uint64 {
	m := make(map[uint64]uint64, len(b)/pairSize)
	for ; len(b) >= pairSize; b = b[pairSize:] {
		m[binary.BigEndian.Uint64(b)] = binary.BigEndian.Uint64(b[8:])
	}
	return m
}

func appendPair(dst []byte, key, versions uint64) []byte {
	dst = binary.BigEndian.AppendUint64(dst, key)
	return binary.BigEndian.AppendUint64(dst, versions)
}

func parseDigests(b []byte) map[uint64]bool {
	m := make(map[uint64]bool, len(b)/8)
	for ; len(b) >= 8; b = b[8:] {
		m[binary.BigEndian.Uint64(b)] = true
	}
	return m
}
