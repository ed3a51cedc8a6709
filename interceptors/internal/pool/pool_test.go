package pool

import (
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRoom(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		size := rapid.IntRange(0, 3<<20).Draw(r, "size")
		b := Get(size)
		if len(*b) != 0 || cap(*b) < size || cap(*b) >= max(2*size, 257) {
			r.Fatalf("for %d bytes: length %d, room for %d", size, len(*b), cap(*b))
		}
		*b = append(*b, make([]byte, size)...)
		Put(b)
	})
}

func TestForeignBuffersAreNotKept(t *testing.T) {
	b := make([]byte, 0, 300)
	Put(&b)
	if got := Get(300); cap(*got) != 512 {
		t.Errorf("got room for %d", cap(*got))
	}
}

func BenchmarkPool(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		Put(Get(1000))
	}
}
