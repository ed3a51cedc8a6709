package channel

import (
	"sync/atomic"
	"time"
)

// clockStep is how old the time of a message may be.
const clockStep = 5 * time.Millisecond

// clock tells the time in milliseconds for message headers. Asking the system
// takes longer than everything else a message needs, so the answer is kept for
// clockStep.
type clock struct {
	ms    atomic.Int64 // 0 when it has to be asked for
	stale *time.Timer  // clears ms
}

func (c *clock) start() {
	c.stale = time.AfterFunc(time.Hour, func() { c.ms.Store(0) })
}

func (c *clock) stop() { c.stale.Stop() }

func (c *clock) now() int64 {
	if ms := c.ms.Load(); ms != 0 {
		return ms
	}
	ms := time.Now().UnixMilli()
	if c.ms.CompareAndSwap(0, ms) {
		c.stale.Reset(clockStep)
	}
	return ms
}
