package membership

import "github.com/longhouse-go/longhouse/channel"

// memory keeps a bounded number of values by id, and forgets first what was put
// first.
type memory[T any] struct {
	size   int
	values map[channel.UniqueID]*remembered[T]
	ring   []channel.UniqueID // in the order of putting; may name forgotten ids
	next   int                // the oldest place of a full ring
}

type remembered[T any] struct {
	value T
	place int // in the ring
}

func newMemory[T any](size int) *memory[T] {
	return &memory[T]{size: size, values: map[channel.UniqueID]*remembered[T]{}}
}

// get returns the value of id, or nil. It is valid until the next put.
func (m *memory[T]) get(id channel.UniqueID) *T {
	if r := m.values[id]; r != nil {
		return &r.value
	}
	return nil
}

func (m *memory[T]) put(id channel.UniqueID, v T) {
	if r := m.values[id]; r != nil {
		r.value = v // it keeps its age
		return
	}
	if len(m.ring) < m.size {
		m.values[id] = &remembered[T]{v, len(m.ring)}
		m.ring = append(m.ring, id)
		return
	}
	if old := m.values[m.ring[m.next]]; old != nil && old.place == m.next {
		delete(m.values, m.ring[m.next])
	}
	m.values[id] = &remembered[T]{v, m.next}
	m.ring[m.next] = id
	m.next = (m.next + 1) % m.size
}

func (m *memory[T]) remove(id channel.UniqueID) { delete(m.values, id) }
