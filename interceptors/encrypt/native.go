package encrypt

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
)

// An encrypted body of the dialect longhouse, all numbers big endian:
//
//	magic         4  "LHE1"
//	key           4  the id of the key
//	epoch        16  random; one per sender's layer and start
//	counter       8  1, 2, 3, … within the epoch
//	count         2  number of receivers
//	receivers   8·n  the first bytes of the receivers' member ids
//	ciphertext       of the options (4) and the body
//	tag          16
//
// The cipher is AES-256-GCM with a key derived from the secret and the epoch,
// and the counter as nonce, so that no nonce occurs twice. The associated data
// are everything before the ciphertext, the sender's member id, the message's id
// and its time.
const (
	magic       = "LHE1"
	epochSize   = 16
	counterAt   = len(magic) + len(secret.KeyID{}) + epochSize
	countAt     = counterAt + 8
	headSize    = countAt + 2
	receiver    = 8
	tagSize     = 16
	optionsSize = 4
	purpose     = "encrypt v1"

	// maxPerEpoch is how many messages are sent in one epoch; then another
	// begins, so that no key encrypts too much.
	maxPerEpoch = 1 << 32
)

// native is the dialect longhouse.
type native struct {
	keys   []secret.Key // the first one encrypts
	window int

	current atomic.Pointer[sendEpoch]
	turning sync.Mutex // held to begin another epoch

	seen *memory // from start to stop
}

// sendEpoch is what this node encrypts with.
type sendEpoch struct {
	head    [counterAt]byte // the head of all bodies, up to the counter
	aead    cipher.AEAD
	counter atomic.Uint64
}

func newNative(keys []secret.Text, window int) (*native, error) {
	derived, err := secret.DeriveAll(keys, purpose)
	if err != nil {
		return nil, err
	}
	return &native{keys: derived, window: window}, nil
}

func (d *native) start(local channel.Member) error {
	e, err := d.newEpoch()
	if err != nil {
		return err
	}
	d.current.Store(e)
	d.seen = acquire(local.ID)
	return nil
}

func (d *native) stop() {
	if d.seen != nil {
		d.seen.release()
		d.seen = nil
	}
}

// silent: refusals say nothing, since a forger cannot make a message that
// differs in anything from noise.
func (d *native) silent() bool { return false }

func (d *native) newEpoch() (*sendEpoch, error) {
	e := new(sendEpoch)
	k := d.keys[0]
	copy(e.head[:], magic)
	copy(e.head[len(magic):], k.ID[:])
	salt := e.head[len(magic)+len(k.ID):]
	if _, err := rand.Read(salt); err != nil {
		return nil, fmt.Errorf("randomness: %w", err)
	}
	var err error
	e.aead, err = newAEAD(k, salt)
	return e, err
}

// newAEAD returns the cipher of an epoch.
func newAEAD(k secret.Key, salt []byte) (cipher.AEAD, error) {
	raw, err := k.Expand("epoch", salt, secret.KeySize)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(raw)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// take returns the epoch to encrypt with and the next counter of it.
func (d *native) take() (*sendEpoch, uint64, error) {
	for {
		e := d.current.Load()
		if e == nil {
			return nil, 0, channel.ErrClosed
		}
		if n := e.counter.Add(1); n <= maxPerEpoch {
			return e, n, nil
		}
		d.turning.Lock()
		if d.current.Load() == e {
			next, err := d.newEpoch()
			if err != nil {
				d.turning.Unlock()
				return nil, 0, err
			}
			d.current.Store(next)
		}
		d.turning.Unlock()
	}
}

func (d *native) seal(dst []byte, s *sealed, l channel.Link, m *channel.Message) ([]byte, error) {
	e, n, err := d.take()
	if err != nil {
		return dst, err
	}
	dst = append(dst, e.head[:]...)
	dst = binary.BigEndian.AppendUint64(dst, n)
	dst = append(dst, 0, 0)
	count := 0
	for i := range m.To {
		dst = append(dst, m.To[i].ID[:receiver]...)
		count++
	}
	if m.Options.Has(channel.Multicast) { // everybody will get it
		for _, o := range l.View().Members {
			dst = append(dst, o.ID[:receiver]...)
			count++
		}
	}
	if count > math.MaxUint16 {
		return dst, fmt.Errorf("%d destinations, the most is %d: %w", count, math.MaxUint16, channel.ErrTooLarge)
	}
	binary.BigEndian.PutUint16(dst[countAt:], uint16(count))
	head := len(dst)
	s.ad = associated(s.ad[:0], dst[:head], m)
	need := head + optionsSize + len(m.Body) + tagSize
	if cap(dst) < need {
		dst = append(make([]byte, 0, need+need/4), dst...)
	}
	dst = binary.BigEndian.AppendUint32(dst, uint32(m.Options))
	dst = append(dst, m.Body...)
	nonce := nonceOf(s.nonce(), n)
	return e.aead.Seal(dst[:head], nonce, dst[head:], s.ad), nil
}

// nonce returns room for a nonce at the end of the associated data.
func (s *sealed) nonce() []byte {
	n := len(s.ad)
	s.ad = append(s.ad, make([]byte, 12)...)
	nonce := s.ad[n:]
	s.ad = s.ad[:n]
	return nonce
}

func nonceOf(room []byte, counter uint64) []byte {
	clear(room[:4])
	binary.BigEndian.PutUint64(room[4:], counter)
	return room
}

// associated appends what is authenticated without being encrypted.
func associated(dst, head []byte, m *channel.Message) []byte {
	dst = append(dst, head...)
	dst = append(dst, m.From.ID[:]...)
	dst = append(dst, m.ID[:]...)
	return binary.BigEndian.AppendUint64(dst, uint64(m.Time))
}

func (d *native) open(l channel.Link, m *channel.Message) reason {
	b := m.Body
	if len(b) < len(magic) || string(b[:len(magic)]) != magic {
		return plain
	}
	if len(b) < headSize {
		return truncated
	}
	count := int(binary.BigEndian.Uint16(b[countAt:]))
	head := headSize + count*receiver
	if len(b) < head+optionsSize+tagSize {
		return truncated
	}
	var id epochID
	copy(id[:], b[len(magic):counterAt])
	counter := binary.BigEndian.Uint64(b[counterAt:])
	e := d.seen.get(id)
	aead := e.cipher()
	if aead == nil {
		k := d.key(id)
		if k == nil {
			return unknownKey
		}
		var err error
		if aead, err = newAEAD(*k, id[len(secret.KeyID{}):]); err != nil {
			return unknownKey
		}
	} else if d.key(id) == nil { // of an earlier configuration
		return unknownKey
	}
	s := sealedPool.Get().(*sealed)
	s.ad = associated(s.ad[:0], b[:head], m)
	plaintext, err := aead.Open(b[head:head], nonceOf(s.nonce(), counter), b[head:], s.ad)
	s.release()
	if err != nil {
		return forged
	}
	local := l.Local().ID
	if !addressed(b[headSize:head], local[:receiver]) {
		return elsewhere
	}
	if r := d.seen.mark(e, id, aead, counter, d.window); r != "" {
		return r
	}
	// The options of the package are nobody's word; these are the sender's.
	m.Options = channel.Options(binary.BigEndian.Uint32(plaintext))
	m.Body = plaintext[optionsSize:]
	return ""
}

func (d *native) key(id epochID) *secret.Key {
	for i := range d.keys {
		if string(d.keys[i].ID[:]) == string(id[:len(secret.KeyID{})]) {
			return &d.keys[i]
		}
	}
	return nil
}

func addressed(receivers, own []byte) bool {
	for len(receivers) > 0 {
		if bytes.Equal(receivers[:receiver], own) {
			return true
		}
		receivers = receivers[receiver:]
	}
	return false
}
