// Package pool keeps byte buffers for reuse, in classes of size, so that a small
// message never holds on to a large buffer. It imports nothing of this module;
// it must not import core, plugins or fx.
package pool

import (
	"math/bits"
	"sync"
)

const (
	smallest = 8  // buffers have at least 256 bytes
	largest  = 20 // and are kept up to 1 MiB
)

var classes [largest + 1]sync.Pool // of *[]byte with 1<<i bytes of room

// Get returns an empty buffer with room for size bytes, and for less than twice
// as many if size is 256 or more.
func Get(size int) *[]byte {
	class := class(size)
	if class > largest {
		b := make([]byte, 0, size)
		return &b
	}
	if b, ok := classes[class].Get().(*[]byte); ok {
		*b = (*b)[:0]
		return b
	}
	b := make([]byte, 0, 1<<class)
	return &b
}

// Put gives a buffer of Get back. Nobody may use it any more.
func Put(b *[]byte) {
	if class := class(cap(*b)); class <= largest && cap(*b) == 1<<class {
		classes[class].Put(b)
	}
}

func class(size int) int { return max(smallest, bits.Len(uint(max(size, 1)-1))) }
