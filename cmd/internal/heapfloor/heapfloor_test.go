package heapfloor

import (
	"runtime"
	"runtime/debug"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPercent(t *testing.T) {
	const mb = 1 << 20
	for _, tc := range []struct {
		floor, live float64
		want        int
	}{
		{64 * mb, 0, 1600},
		{64 * mb, 4 * mb, 1500},
		{64 * mb, 1 * mb, 1600},
		{64 * mb, 31 * mb, 107},
		{64 * mb, 32 * mb, 100},
		{64 * mb, 4096 * mb, 100},
		{0, 4 * mb, 100},
	} {
		if got := percent(tc.floor, tc.live); got != tc.want {
			t.Errorf("floor %v, live %v: %d percent, want %d", tc.floor, tc.live, got, tc.want)
		}
	}
}

// The setting follows what is live, in both directions.
func TestFollows(t *testing.T) {
	before := debug.SetGCPercent(usual)
	defer debug.SetGCPercent(before)
	f := &tuner{floor: 64 << 20, now: usual}
	f.tune()
	current := func() int {
		p := debug.SetGCPercent(usual)
		debug.SetGCPercent(p)
		return p
	}
	if p := current(); p < 200 {
		t.Fatalf("with a small heap a collection starts after %d percent", p)
	}
	held := make([]byte, 128<<20)
	await := func(what string, ok func(int) bool) {
		for i := 0; !ok(current()); i++ {
			if i == 10_000 {
				t.Fatalf("%s: still %d percent", what, current())
			}
			runtime.GC()
			runtime.Gosched()
		}
	}
	await("with 128 MiB live", func(p int) bool { return p == usual })
	runtime.KeepAlive(held)
	held = nil
	await("without them", func(p int) bool { return p > 200 })
}
