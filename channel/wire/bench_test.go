package wire

import (
	"fmt"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
)

var sizes = []int{128, 1 << 10, 10 << 10}

// BenchmarkCopy is the yardstick: the same number of bytes, copied.
func BenchmarkCopy(b *testing.B) {
	for _, size := range sizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			src := AppendFrame(nil, testMessage(size))
			dst := make([]byte, len(src))
			b.SetBytes(int64(len(src)))
			b.ReportAllocs()
			for b.Loop() {
				copy(dst, src)
			}
		})
	}
}

func BenchmarkAppendFrame(b *testing.B) {
	for _, size := range sizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			m := testMessage(size)
			buf := AppendFrame(nil, m)
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				buf = AppendFrame(buf[:0], m)
			}
		})
	}
}

func BenchmarkAppendFrameRecord(b *testing.B) {
	for _, size := range sizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			m := testMessage(size)
			record := AppendMember(nil, m.From)
			buf := AppendFrame(nil, m)
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				buf = AppendFrameRecord(buf[:0], record, m)
			}
		})
	}
}

// BenchmarkDecoder includes copying the bytes into the decoder, as a read does.
func BenchmarkDecoder(b *testing.B) {
	for _, size := range sizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			raw := AppendFrame(nil, testMessage(size))
			d := NewDecoder(0)
			d.resize(readBuffer)
			var m channel.Message
			b.SetBytes(int64(len(raw)))
			b.ReportAllocs()
			for b.Loop() {
				d.Wrote(copy(d.Space(), raw))
				if k, err := d.Next(&m); k != MessageFrame || err != nil {
					b.Fatal(k, err)
				}
			}
		})
	}
}

func BenchmarkDecodeMember(b *testing.B) {
	raw := AppendMember(nil, testMember())
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := DecodeMember(raw); err != nil {
			b.Fatal(err)
		}
	}
}
