package repmap

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/longhouse-go/longhouse/channel"
)

// parts is how many parts digests are made of.
const parts = 256

// maxBackups bounds the backups that a record may name.
const maxBackups = 16

// stamp orders the records of one key.
type stamp struct {
	_       struct{}         `cbor:",toarray"`
	Counter uint64           // grows with every write
	Writer  channel.UniqueID // who wrote
	Epoch   uint64           // grows when the place changes
	Primary channel.UniqueID
}

func (a stamp) compare(b stamp) int {
	return cmp.Or(cmp.Compare(a.Counter, b.Counter), bytes.Compare(a.Writer[:], b.Writer[:]),
		cmp.Compare(a.Epoch, b.Epoch), bytes.Compare(a.Primary[:], b.Primary[:]))
}

// sameVersion reports whether both stand for the same value.
func (a stamp) sameVersion(b stamp) bool { return a.Counter == b.Counter && a.Writer == b.Writer }

// record is one entry as it is kept and as it travels.
type record struct {
	_       struct{} `cbor:",toarray"`
	Key     string
	Stamp   stamp
	Backups []channel.UniqueID
	Deleted bool
	// Age is how many milliseconds ago it was deleted, on the wire.
	Age uint64
	// Has says that Value is here.
	Has   bool
	Value []byte

	died time.Time // when it was deleted, here
}

// hash is the record's share in the digest of its part. Removals have none:
// they are forgotten at different times.
func (r *record) hash() uint64 {
	if r.Deleted {
		return 0
	}
	h := fnv.New64a()
	var b [8]byte
	_, _ = h.Write([]byte(r.Key))
	binary.BigEndian.PutUint64(b[:], r.Stamp.Counter)
	_, _ = h.Write(b[:])
	_, _ = h.Write(r.Stamp.Writer[:])
	binary.BigEndian.PutUint64(b[:], r.Stamp.Epoch)
	_, _ = h.Write(b[:])
	_, _ = h.Write(r.Stamp.Primary[:])
	return mix(h.Sum64())
}

// mix spreads the bits of x, so that sums of hashes are as good as hashes.
func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// partOf returns the part that a key belongs to.
func partOf(key string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(key))
	return int(mix(uint64(h.Sum32())) % parts)
}

// weight is that of a member for a key in rendezvous hashing.
func weight(key string, id channel.UniqueID) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(key))
	_, _ = h.Write(id[:])
	return mix(h.Sum64())
}

// rendezvous returns the member with the greatest weight for key.
func rendezvous(key string, among []channel.UniqueID) (best channel.UniqueID, ok bool) {
	var top uint64
	for _, id := range among {
		if w := weight(key, id); !ok || w > top || w == top && bytes.Compare(id[:], best[:]) > 0 {
			best, top, ok = id, w, true
		}
	}
	return best, ok
}

// op is what a message wants.
type op uint8

const (
	opPut    op = iota + 1 // records: take them
	opDigest               // answer the digests of all parts
	opList                 // answer the records of some parts, without values
	opGet                  // answer records with values
	opStop                 // the sender's map ends
	ops
)

// message is a request or an answer.
type message struct {
	_  struct{} `cbor:",toarray"`
	Op op
	// Lazy is the kind of the sender's map.
	Lazy    bool
	Records []record
	Keys    []string
	Parts   []int
	Digests []uint64
	// After is the last key of Parts[0] that was listed already.
	After string
	// Next says that the listing goes on at After of the part Part.
	Next bool
	Part int
}

var (
	encMode cbor.EncMode
	decMode cbor.DecMode
)

func init() {
	var err error
	if encMode, err = (cbor.EncOptions{ByteArray: cbor.ByteArrayToByteSlice}).EncMode(); err != nil {
		panic(err)
	}
	if decMode, err = (cbor.DecOptions{MaxArrayElements: 1 << 20, MaxMapPairs: 16, MaxNestedLevels: 8,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden, UTF8: cbor.UTF8DecodeInvalid}).DecMode(); err != nil {
		panic(err)
	}
}

var errMessage = fmt.Errorf("repmap: malformed message: %w", channel.ErrBadMessage)

func encode(m *message) ([]byte, error) { return encMode.Marshal(m) }

// decode reads a message and checks what every receiver relies on.
func decode(b []byte) (*message, error) {
	m := new(message)
	if err := decMode.Unmarshal(b, m); err != nil {
		return nil, errors.Join(errMessage, err)
	}
	if m.Op == 0 || m.Op >= ops || len(m.Digests) != 0 && len(m.Digests) != parts || m.Part < 0 || m.Part >= parts {
		return nil, errMessage
	}
	for _, p := range m.Parts {
		if p < 0 || p >= parts {
			return nil, errMessage
		}
	}
	for i := range m.Records {
		r := &m.Records[i]
		if len(r.Backups) > maxBackups || r.Has && r.Deleted || !r.Has && len(r.Value) > 0 || r.Stamp.Counter == 0 {
			return nil, errMessage
		}
	}
	return m, nil
}
