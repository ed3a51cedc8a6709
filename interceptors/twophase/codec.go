package twophase

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/longhouse-go/longhouse/channel"
)

// A confirmation as Tribes' TwoPhaseCommitInterceptor sends it: start, the id of
// the message, end.
const (
	start       = "\x71\x01\xc6\x02\xde\xc4\x4b\xb2\x9b\xf4\x20\xe3\x20\x6f\xd8\x04"
	end         = "\x36\xf3\x5a\x6e\x2f\xe1\x4b\xe8\xaf\xe3\x24\x34\xc6\x4d\x92\x38"
	confirmSize = len(start) + 16 + len(end)
)

func appendConfirm(b []byte, id channel.UniqueID) []byte {
	b = append(b, start...)
	b = append(b, id[:]...)
	return append(b, end...)
}

// confirmed returns the id of the message that a body confirms.
func confirmed(b []byte) (id channel.UniqueID, ok bool) {
	if len(b) != confirmSize || string(b[:len(start)]) != start || string(b[confirmSize-len(end):]) != end {
		return id, false
	}
	copy(id[:], b[len(start):])
	return id, true
}

// Longhouse nodes ask each other about messages whose confirmation does not
// come. The body is
//
//	talk · u8 kind · u16 count · count × (u8 fate · 16 bytes sender · 16 bytes id)
const (
	talk      = "\xa9\x0c\x5e\x1f\x7d\x33\x48\xb2\xb6\xe4\xf0\x12\x9a\x6d\x57\xc3"
	talkHead  = len(talk) + 3
	talkEntry = 33
	// maxEntries bounds the entries of one body.
	maxEntries = 256
)

const (
	ask  byte = 1
	tell byte = 2
)

// fate is what a node knows of a message.
type fate byte

const (
	asked     fate = iota // a question
	committed             // delivered, or to be delivered
	aborted               // never to be delivered
	undecided             // held; a confirmation of its lost sender is refused from now on
	waiting               // held or not, but its sender is there
	unknown               // not held, and refused from now on
	fates
)

// key identifies a message.
type key struct{ from, id channel.UniqueID }

type word struct {
	key
	fate fate
}

func isTalk(b []byte) bool { return len(b) >= talkHead && string(b[:len(talk)]) == talk }

func appendTalk(b []byte, kind byte, words []word) []byte {
	b = append(b, talk...)
	b = append(b, kind)
	b = binary.BigEndian.AppendUint16(b, uint16(len(words)))
	for _, w := range words {
		b = append(b, byte(w.fate))
		b = append(b, w.from[:]...)
		b = append(b, w.id[:]...)
	}
	return b
}

var errTalk = errors.New("twophase: malformed message of a node")

func decodeTalk(b []byte) (kind byte, words []word, err error) {
	if !isTalk(b) {
		return 0, nil, fmt.Errorf("%w: no head", errTalk)
	}
	kind = b[len(talk)]
	n := int(binary.BigEndian.Uint16(b[len(talk)+1:]))
	b = b[talkHead:]
	if kind != ask && kind != tell || n > maxEntries || len(b) != n*talkEntry {
		return 0, nil, fmt.Errorf("%w: kind %d, %d entries, %d bytes", errTalk, kind, n, len(b))
	}
	words = make([]word, n)
	for i := range words {
		e := b[i*talkEntry:]
		w := &words[i]
		w.fate = fate(e[0])
		copy(w.from[:], e[1:])
		copy(w.id[:], e[17:])
		if w.fate >= fates || (w.fate == asked) != (kind == ask) {
			return 0, nil, fmt.Errorf("%w: fate %d", errTalk, w.fate)
		}
	}
	return kind, words, nil
}
