package secret

import (
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
)

// KeyID names a derived key on the wire. It says nothing of the secret.
type KeyID [4]byte

// KeySize is the size of derived keys, in bytes.
const KeySize = 32

// Key is a key for one purpose, derived from a secret.
type Key struct {
	ID   KeyID
	pseu []byte // the pseudorandom key of HKDF
	use  string
}

// Derive returns the key of t for the given purpose: different purposes have
// unrelated keys, by HKDF with SHA-256 (RFC 5869).
func Derive(t Text, purpose string) (Key, error) {
	prk, err := hkdf.Extract(sha256.New, []byte(t.value), []byte("longhouse "+purpose))
	if err != nil {
		return Key{}, fmt.Errorf("channel/secret: derive: %w", err)
	}
	k := Key{pseu: prk, use: purpose}
	id, err := k.Expand("id", nil, len(k.ID))
	if err != nil {
		return Key{}, err
	}
	copy(k.ID[:], id)
	return k, nil
}

// DeriveAll is Derive for several secrets, in their order.
func DeriveAll(all []Text, purpose string) ([]Key, error) {
	keys := make([]Key, 0, len(all))
	for _, t := range all {
		k, err := Derive(t, purpose)
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// Expand returns size bytes of key for one use of k and one context, a random
// salt for example.
func (k Key) Expand(use string, context []byte, size int) ([]byte, error) {
	out, err := hkdf.Expand(sha256.New, k.pseu, k.use+"\x00"+use+"\x00"+string(context), size)
	if err != nil {
		return nil, fmt.Errorf("channel/secret: expand: %w", err)
	}
	return out, nil
}

// String names the key without showing it.
func (k Key) String() string { return fmt.Sprintf("key %x", k.ID[:]) }

// GoString returns what String returns.
func (k Key) GoString() string { return k.String() }

// Format prints what String returns, whatever the verb.
func (k Key) Format(f fmt.State, _ rune) { _, _ = fmt.Fprintf(f, "key %x", k.ID[:]) }
