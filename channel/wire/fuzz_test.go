package wire

import (
	"bytes"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
)

func FuzzDecodeMember(f *testing.F) {
	for _, v := range load(f, "member.json") {
		f.Add(unhex(f, v.Hex))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, n, err := DecodeMember(b)
		if err != nil {
			if n != 0 || Reason(err) == "other" {
				t.Fatalf("n=%d err=%v", n, err)
			}
			return
		}
		again := AppendMember(nil, m)
		back, _, err := DecodeMember(again)
		if err != nil || back != m || n != len(again) {
			t.Fatalf("%x\ndecodes to %+v\nand then to %+v (%v)", b, m, back, err)
		}
	})
}

func FuzzDecodeFrame(f *testing.F) {
	for _, v := range load(f, "frame.json") {
		if v.Hex != "" {
			f.Add(unhex(f, v.Hex))
		}
	}
	for _, v := range load(f, "captured.json") {
		if v.Kind == "frame" {
			f.Add(unhex(f, v.Hex))
		}
	}
	f.Add(AppendCredit(nil, 7, 1<<40))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m channel.Message
		k, n, err := DecodeFrame(b, 1<<20, &m)
		if n > len(b) || (err != nil || k == Incomplete) != (n == 0) || err != nil && Reason(err) == "other" {
			t.Fatalf("kind=%d n=%d of %d err=%v", k, n, len(b), err)
		}
		if k != MessageFrame {
			return
		}
		// Alive times beyond a Duration are cut: compare what is behind them.
		again := AppendFrame(nil, &m)
		alive := frameHead + packHead + 4 + memberHead
		if !bytes.Equal(again[:alive], b[:alive]) || !bytes.Equal(again[alive+8:], b[alive+8:n]) {
			t.Fatalf("in  %x\nout %x", b[:n], again)
		}
	})
}

// FuzzDecoder compares the stream decoder, fed in pieces, with DecodeFrame on
// the whole.
func FuzzDecoder(f *testing.F) {
	for _, v := range load(f, "frame.json") {
		if v.Hex != "" {
			raw := unhex(f, v.Hex)
			f.Add(append(bytes.Clone(raw), raw...), uint16(len(raw)/3))
			f.Add(append(append([]byte(Ack), NegativeAck...), raw...), uint16(9))
		}
	}
	f.Add(append(AppendCredit([]byte(Ack), 7, 1<<40), Ack...), uint16(10))
	f.Fuzz(func(t *testing.T, b []byte, chunk uint16) {
		const limit = 1 << 16
		d := NewDecoder(limit)
		var got, want channel.Message
		at := 0
		for rest := b; len(rest) > 0; {
			n := copy(d.Space(), rest[:min(int(chunk)+1, len(rest))])
			d.Wrote(n)
			rest = rest[n:]
			for {
				got, want = channel.Message{}, channel.Message{} // acknowledgements leave them as they are
				k, err := d.Next(&got)
				if err != nil {
					if _, _, werr := DecodeFrame(b[at:], limit, &want); werr != err {
						t.Fatalf("at %d: stream says %v, whole says %v", at, err, werr)
					}
					return
				}
				if k == Incomplete {
					break
				}
				wk, wn, werr := DecodeFrame(b[at:], limit, &want)
				if wk != k || werr != nil || got.ID != want.ID || got.From != want.From || !bytes.Equal(got.Body, want.Body) {
					t.Fatalf("at %d: stream has %d %+v, whole has %d %+v (%v)", at, k, got, wk, want, werr)
				}
				at += wn
			}
			if d.Held() > max(2*firstBuffer, 2*readBuffer) {
				t.Fatalf("%d bytes held", d.Held())
			}
		}
		if k, _, err := DecodeFrame(b[at:], limit, &want); k != Incomplete || err != nil {
			t.Fatalf("the stream decoder left a frame or an error at %d: %d %v", at, k, err)
		}
	})
}
