package wire

import (
	"encoding/binary"
	"errors"
	"math"
	"testing"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
)

func TestCreditRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		processed, limit := rapid.Uint64().Draw(t, "processed"), rapid.Uint64().Draw(t, "limit")
		b := AppendCredit(nil, processed, limit)
		var m channel.Message
		for n := range b { // whatever has come so far
			if k, size, err := DecodeFrame(b[:n], 64, &m); n > 0 && (k != Incomplete || size != 0 || err != nil) {
				t.Fatalf("%d bytes: %v, %d, %v", n, k, size, err)
			}
		}
		k, n, err := DecodeFrame(append(b, Ack...), 64, &m)
		if k != CreditFrame || n != len(b) || err != nil {
			t.Fatalf("got %v, %d, %v", k, n, err)
		}
		if p, l := ParseCredit(&m); p != processed || l != limit {
			t.Fatalf("got %d and %d, want %d and %d", p, l, processed, limit)
		}
	})
}

// A frame of the size of a credit frame is nothing else, and no other size is
// one.
func TestCreditRefuses(t *testing.T) {
	good := AppendCredit(nil, 1, math.MaxUint64)
	var m channel.Message
	for i := range good {
		b := append([]byte(nil), good...)
		b[i] ^= 0xff
		k, _, err := DecodeFrame(b, 64, &m)
		switch at := i - frameHead; {
		case i < frameHead || at < len(creditMark) || i >= frameHead+creditSize:
			if k != Incomplete || !errors.Is(err, channel.ErrBadMessage) && !errors.Is(err, channel.ErrTooLarge) {
				t.Errorf("byte %d: %v, %v", i, k, err)
			}
		case k != CreditFrame || err != nil:
			t.Errorf("byte %d: %v, %v", i, k, err)
		}
	}
	for n := range uint32(minPack) {
		b := append([]byte(nil), good...)
		binary.BigEndian.PutUint32(b[len(frameBegin):], n)
		if k, _, _ := DecodeFrame(b, 64, &m); k == CreditFrame && n != uint32(creditSize) {
			t.Errorf("length %d is taken for credit", n)
		}
	}
}

func BenchmarkCredit(b *testing.B) {
	var m channel.Message
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = AppendCredit(buf[:0], 1, 2)
		if k, _, err := DecodeFrame(buf, 64, &m); k != CreditFrame || err != nil {
			b.Fatal(k, err)
		}
	}
}
