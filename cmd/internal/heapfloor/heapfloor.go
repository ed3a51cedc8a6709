// Package heapfloor lets a process with little live memory collect garbage less
// often. Go starts a collection when the heap has doubled: a server that keeps
// 4 MiB and serves tens of thousands of requests a second collects fifty times a
// second, for an eighth of its processor time. Here a collection starts when the
// heap has doubled or has reached the floor, whichever is later.
//
// It changes a property of the whole process, so only main programs use it. It
// imports the standard library only.
package heapfloor

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// Default is the floor of a node in bytes: 64 MiB, or a quarter of the memory
// limit (GOMEMLIMIT) if that is less.
const Default = 64 << 20

// usual is Go's own setting in percent.
const usual = 100

// steady is by how many percent points the setting has to change before it is
// changed: doing so stops all goroutines for a moment.
const steady = 10

// Set sets the floor in bytes, for ever. It does nothing if the environment says
// how often to collect (GOGC).
func Set(floor int64) {
	if _, set := os.LookupEnv("GOGC"); set {
		return
	}
	floor = min(floor, debug.SetMemoryLimit(-1)/4)
	f := &tuner{floor: float64(floor), now: usual}
	f.tune()
}

type tuner struct {
	floor float64
	now   int
}

// tune chooses the setting for the next collection and comes back after it: the
// cleanup runs when a collection has found its object dead.
func (t *tuner) tune() {
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	if next := percent(t.floor, float64(sample[0].Value.Uint64())); next-t.now > steady || t.now-next > steady {
		t.now = next
		debug.SetGCPercent(next)
	}
	runtime.AddCleanup(new(*tuner), func(t *tuner) { t.tune() }, t)
}

// leastHeap is the heap at which Go starts the first collection with its own
// setting, in bytes; it grows with the setting (see runtime/debug.SetGCPercent).
const leastHeap = 4 << 20

// percent returns by how much the heap may grow beyond what is live.
func percent(floor, live float64) int {
	grow := min(floor/leastHeap, floor/max(live, 1)-1)
	return max(usual, int(math.Ceil(100*grow)))
}
