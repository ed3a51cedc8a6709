package channel

import (
	"encoding/binary"
	"errors"
	"hash/maphash"
	"sync"
	"time"
)

const (
	// dedupeWindow is how many messages per sender are remembered at least. It
	// is twice the default send window, so that a whole window may be repeated.
	dedupeWindow = 2048
	// dedupeSenders bounds the senders that are remembered.
	dedupeSenders = 4096
	// dedupeSample is how many of them are compared when one has to go.
	dedupeSample = 16
	// dedupePending bounds the unfinished messages per sender.
	dedupePending = 65536
	// dedupeWaiters bounds the repetitions that wait for one message.
	dedupeWaiters = 16
	// dedupeIdle is how long a silent sender is remembered.
	dedupeIdle = 5 * time.Minute
	// dedupeTail is how many last bytes of the body tell fragments apart.
	dedupeTail = 16
)

// dedupe remembers which acknowledged messages have arrived, so that one that
// is sent again is not delivered again. A repetition gets the answer of the
// first one: at once if that is finished, else together with it.
//
// A message that failed before it reached a listener is forgotten: it has not
// been delivered, so a repetition may try again.
type dedupe struct {
	seed maphash.Seed

	mu      sync.RWMutex
	senders map[UniqueID]*dedupeSender
}

// dedupeKey is the message id, changed by length and end of the body: the
// fragments of a message share its id.
type dedupeKey [16]byte

type dedupeSender struct {
	mu      sync.Mutex
	touched bool      // since the last call of expire
	used    time.Time // when expire last found it touched
	pending map[dedupeKey][]func(error)
	// young and old hold the finished messages; when young is full it becomes
	// old. failed holds the outcome of those that did not end well.
	young, old             map[dedupeKey]struct{}
	youngFailed, oldFailed map[dedupeKey]error
}

func newDedupe() *dedupe {
	return &dedupe{seed: maphash.MakeSeed(), senders: map[UniqueID]*dedupeSender{}}
}

func (d *dedupe) key(m *Message) dedupeKey {
	k := dedupeKey(m.ID)
	tail := m.Body
	if len(tail) > dedupeTail {
		tail = tail[len(tail)-dedupeTail:]
	}
	h := maphash.Bytes(d.seed, tail) + uint64(len(m.Body))*0x9e3779b97f4a7c15
	binary.LittleEndian.PutUint64(k[:8], binary.LittleEndian.Uint64(k[:8])^h)
	return k
}

func (d *dedupe) sender(id UniqueID) *dedupeSender {
	d.mu.RLock()
	s := d.senders[id]
	d.mu.RUnlock()
	if s != nil {
		return s
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if s = d.senders[id]; s != nil {
		return s
	}
	if len(d.senders) >= dedupeSenders {
		d.dropOne()
	}
	s = &dedupeSender{used: time.Now(), pending: map[dedupeKey][]func(error){}, young: map[dedupeKey]struct{}{}}
	d.senders[id] = s
	return s
}

// dropOne forgets the one of a few random senders that has been silent
// longest: looking at all would make a flood of invented senders expensive.
// d.mu is held.
func (d *dedupe) dropOne() {
	var oldest UniqueID
	var when time.Time
	n := 0
	for id, s := range d.senders {
		s.mu.Lock()
		used := s.used
		if s.touched {
			used = time.Now()
		}
		s.mu.Unlock()
		if n == 0 || used.Before(when) {
			oldest, when = id, used
		}
		if n++; n == dedupeSample {
			break
		}
	}
	delete(d.senders, oldest)
}

// expire forgets senders that have been silent for long.
func (d *dedupe) expire(now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, s := range d.senders {
		s.mu.Lock()
		if s.touched {
			s.touched, s.used = false, now
		}
		idle := len(s.pending) == 0 && now.Sub(s.used) > dedupeIdle
		s.mu.Unlock()
		if idle {
			delete(d.senders, id)
		}
	}
}

// verdict is what begin found.
type verdict uint8

const (
	fresh      verdict = iota // process it, then call finish
	untracked                 // process it; too much is pending to remember it
	repeated                  // finished before, with the returned error
	unfinished                // being processed: wait with attach
)

// begin looks a message up and marks it as being processed.
func (s *dedupeSender) begin(k dedupeKey) (verdict, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.touched = true
	if _, ok := s.pending[k]; ok {
		return unfinished, nil
	}
	if _, ok := s.young[k]; ok {
		return repeated, s.youngFailed[k]
	}
	if _, ok := s.old[k]; ok {
		return repeated, s.oldFailed[k]
	}
	if len(s.pending) >= dedupePending {
		return untracked, nil
	}
	s.pending[k] = nil
	return fresh, nil
}

// attach makes end be called with the outcome of the message being processed.
// It reports false when too many wait already. When the message has finished
// meanwhile, end is called at once.
func (s *dedupeSender) attach(k dedupeKey, end func(error)) bool {
	s.mu.Lock()
	waiting, ok := s.pending[k]
	if ok && len(waiting) >= dedupeWaiters {
		s.mu.Unlock()
		return false
	}
	if ok {
		s.pending[k] = append(waiting, end)
		s.mu.Unlock()
		return true
	}
	err := s.youngFailed[k]
	if err == nil {
		err = s.oldFailed[k]
	}
	if _, young := s.young[k]; !young {
		if _, old := s.old[k]; !old {
			err = ErrBadMessage // it failed and was forgotten: let the sender try again
		}
	}
	s.mu.Unlock()
	end(err)
	return true
}

// finish records the outcome and tells the repetitions that wait for it.
func (s *dedupeSender) finish(k dedupeKey, err error) {
	s.mu.Lock()
	waiting := s.pending[k]
	delete(s.pending, k)
	if err == nil || delivered(err) {
		s.remember(k, err)
	}
	s.mu.Unlock()
	for _, end := range waiting {
		end(err)
	}
}

func (s *dedupeSender) remember(k dedupeKey, err error) {
	if len(s.young) >= dedupeWindow {
		s.young, s.old = s.old, s.young
		if s.young == nil {
			s.young = make(map[dedupeKey]struct{}, dedupeWindow)
		}
		clear(s.young)
		s.oldFailed, s.youngFailed = s.youngFailed, nil
	}
	s.young[k] = struct{}{}
	if err != nil {
		if s.youngFailed == nil {
			s.youngFailed = map[dedupeKey]error{}
		}
		s.youngFailed[k] = err
	}
}

// listenerError marks an error that comes from a listener: the message has
// been delivered.
type listenerError struct{ err error }

func delivered(err error) bool {
	var l *listenerError
	return errors.As(err, &l)
}

func (e *listenerError) Error() string { return e.err.Error() }
func (e *listenerError) Unwrap() error { return e.err }
