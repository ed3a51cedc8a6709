package encrypt

import (
	"crypto/cipher"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
)

const (
	// maxEpochs bounds the senders whose messages may come in any order.
	maxEpochs = 4096
	// maxFloors bounds the senders of which anything is remembered.
	maxFloors = 65536
	// maxIdle bounds the memories that are kept although no layer uses them.
	maxIdle = 16
)

// memory is what one node has received: the counters of every epoch. It
// outlives the layer: one that takes its place in a running channel goes on
// with it, so that a change of the stack makes no message welcome again. The
// messages to an earlier incarnation of the node are addressed to another
// member id and need no remembering.
type memory struct {
	owner channel.UniqueID
	users int // guarded by memories.mu

	clock atomic.Int64 // counts new epochs

	mu     sync.RWMutex
	epochs map[epochID]*epoch
}

// epochID is the id of the key and the random number of an epoch.
type epochID [len(secret.KeyID{}) + epochSize]byte

// memories are all of this process.
var memories struct {
	mu   sync.Mutex
	all  map[channel.UniqueID]*memory
	idle []*memory // in the order in which they became so
}

// acquire returns the memory of a node, an empty one if there is none.
func acquire(id channel.UniqueID) *memory {
	memories.mu.Lock()
	defer memories.mu.Unlock()
	m := memories.all[id]
	if m == nil {
		if memories.all == nil {
			memories.all = map[channel.UniqueID]*memory{}
		}
		m = &memory{owner: id, epochs: map[epochID]*epoch{}}
		memories.all[id] = m
	}
	if m.users++; m.users == 1 {
		if i := slices.Index(memories.idle, m); i >= 0 {
			memories.idle = slices.Delete(memories.idle, i, i+1)
		}
	}
	return m
}

func (m *memory) release() {
	memories.mu.Lock()
	defer memories.mu.Unlock()
	if m.users--; m.users > 0 {
		return
	}
	memories.idle = append(memories.idle, m)
	if len(memories.idle) > maxIdle {
		delete(memories.all, memories.idle[0].owner)
		memories.idle = slices.Delete(memories.idle, 0, 1)
	}
}

// epoch is what has been received of one epoch of a sender.
type epoch struct {
	mu   sync.Mutex
	aead cipher.AEAD // nil when only the floor is kept
	used int64       // memory.clock when a message last came
	top  uint64      // the highest counter received
	// floor is the counter up to which nothing is taken: 0, or the highest one
	// from when nothing else was kept.
	floor uint64
	// bits has one bit for each of the last counters, of which top is the
	// newest: counter c stands at c modulo its size.
	bits []uint64
}

func (m *memory) get(id epochID) *epoch {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.epochs[id]
}

// cipher returns the cipher of e, or nil.
func (e *epoch) cipher() cipher.AEAD {
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.aead
}

// mark notes that the message with that counter has come, or says why it must
// not be taken. It is called for authentic messages only. e may be nil.
func (m *memory) mark(e *epoch, id epochID, aead cipher.AEAD, counter uint64, window int) reason {
	if e == nil {
		e = m.add(id)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.used = m.clock.Load()
	if counter <= e.floor {
		return tooOld
	}
	if e.aead == nil {
		e.aead, e.bits = aead, make([]uint64, window/64)
	}
	return e.mark(counter)
}

// mark is that of memory, for what is within bits; e.mu is held.
func (e *epoch) mark(counter uint64) reason {
	words := uint64(len(e.bits))
	word, bit := counter/64, uint64(1)<<(counter%64)
	switch top := e.top / 64; {
	case word+words <= top:
		return tooOld
	case word > top:
		for w := top + 1; w <= word && w <= top+words; w++ {
			e.bits[w%words] = 0
		}
	}
	if e.bits[word%words]&bit != 0 {
		return replayed
	}
	e.bits[word%words] |= bit
	e.top = max(e.top, counter)
	return ""
}

// add returns the epoch of that id, a new one if there is none.
func (m *memory) add(id epochID) *epoch {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.epochs[id]; e != nil {
		return e
	}
	e := &epoch{used: m.clock.Add(1)}
	m.epochs[id] = e
	if len(m.epochs) > maxEpochs {
		m.shrink(e)
	}
	return e
}

// shrink reduces the epoch that has been silent for longest to its floor, and
// forgets one if there are too many floors; m.mu is held.
func (m *memory) shrink(fresh *epoch) {
	var oldest *epoch
	var stalest epochID
	full, when, floor := 0, int64(0), int64(0)
	for id, e := range m.epochs {
		if e == fresh {
			continue
		}
		e.mu.Lock()
		used, complete := e.used, e.aead != nil
		e.mu.Unlock()
		if complete {
			if full++; oldest == nil || used < when {
				oldest, when = e, used
			}
		} else if floor == 0 || used < floor {
			stalest, floor = id, used
		}
	}
	if full >= maxEpochs {
		oldest.mu.Lock()
		oldest.aead, oldest.bits, oldest.floor = nil, nil, oldest.top
		oldest.mu.Unlock()
	}
	if len(m.epochs) > maxFloors && floor > 0 {
		delete(m.epochs, stalest)
	}
}
