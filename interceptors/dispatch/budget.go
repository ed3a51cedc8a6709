package dispatch

import "slices"

// share bounds one destination: it may hold at most share times what is still
// free. So a slow destination alone can fill four fifths of the queue, two can
// fill four ninths each, and there is always something left for the others.
const share = 4

// budget is the accounting of the queue. All methods need Interceptor.mu.
type budget struct {
	maxBytes    int64
	maxMessages int

	bytes    int64
	messages int
	waiters  []*waiter // first come, first served per lane
}

// waiter waits for room for one message.
type waiter struct {
	lane    *lane
	item    *item // not to be touched by who waits once it has been granted
	granted bool
	ready   chan struct{} // closed when granted, or when stopping
}

// fits reports whether there is room. A destination without any message gets
// in as long as there is room at all.
func (b *budget) fits(la *lane, size int64) bool {
	freeBytes, freeMessages := b.maxBytes-b.bytes-size, b.maxMessages-b.messages-1
	if freeBytes < 0 || freeMessages < 0 {
		return false
	}
	return la.messages == 0 || la.bytes+size <= share*freeBytes && la.messages+1 <= share*freeMessages
}

// take reserves room, unless others of the same lane have waited longer.
func (b *budget) take(la *lane, size int64) bool {
	if la.waiting > 0 || !b.fits(la, size) {
		return false
	}
	b.add(la, size)
	return true
}

func (b *budget) add(la *lane, size int64) {
	b.bytes += size
	b.messages++
	la.bytes += size
	la.messages++
}

// give returns room and hands it on. The caller queues the messages of the
// waiters and closes ready.
func (b *budget) give(la *lane, messages int, size int64) (granted []*waiter) {
	b.bytes -= size
	b.messages -= messages
	la.bytes -= size
	la.messages -= messages
	return b.grant()
}

// grant gives room to those that fit now; of each lane, only to the first that
// waits and then the next.
func (b *budget) grant() (granted []*waiter) {
	if len(b.waiters) == 0 {
		return nil
	}
	var stuck []*lane
	b.waiters = slices.DeleteFunc(b.waiters, func(w *waiter) bool {
		if slices.Contains(stuck, w.lane) || !b.fits(w.lane, w.item.size) {
			stuck = append(stuck, w.lane)
			return false
		}
		b.add(w.lane, w.item.size)
		w.lane.waiting--
		w.granted = true
		granted = append(granted, w)
		return true
	})
	return granted
}

func (b *budget) wait(w *waiter) {
	w.lane.waiting++
	b.waiters = append(b.waiters, w)
}

// leave ends a wait without success. It is harmless for those that do not wait.
func (b *budget) leave(w *waiter) {
	if i := slices.Index(b.waiters, w); i >= 0 {
		b.waiters = slices.Delete(b.waiters, i, i+1)
		w.lane.waiting--
	}
}

// stopWaiting ends all waits without success.
func (b *budget) stopWaiting() []*waiter {
	ws := b.waiters
	b.waiters = nil
	for _, w := range ws {
		w.lane.waiting--
	}
	return ws
}
