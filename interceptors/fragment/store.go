package fragment

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/internal/pool"
)

const (
	// setOverhead and pieceOverhead are what is charged for a message and for
	// a piece beside their bytes, so that empty pieces are not free.
	setOverhead, pieceOverhead = 256, 64
	// maxSenders bounds the senders that something is remembered of.
	maxSenders = 4096
	// sampleSenders is how many of them are looked at when one has to go.
	sampleSenders = 16
	// recent is how many ended messages of a sender are remembered, so that
	// stray pieces of them do not begin a new one.
	recent = 64
	// leaveGrace is how long the pieces of a member that has left are kept: its
	// goodbye may overtake them.
	leaveGrace = 2 * time.Second
)

// store keeps the pieces of unfinished messages. It is a pure core: time comes
// from the caller.
type store struct {
	cfg Config

	refusedMalformed, refusedTooMany, refusedTooLarge, refusedFull *channel.Counter
	refusedMismatch, refusedStray, duplicates, expired             *channel.Counter

	mu      sync.Mutex
	senders map[channel.UniqueID]*sender
	bytes   int64
	count   int
	// All unfinished messages by age.
	oldest, newest *set
}

// sender is what is remembered of one sender.
type sender struct {
	id       channel.UniqueID
	sets     map[channel.UniqueID]*set
	bytes    int64
	used     time.Time
	deadline time.Time // of what is kept; zero for none
	ended    [recent]channel.UniqueID
	next     int
}

// set is an unfinished message.
type set struct {
	id         channel.UniqueID
	s          *sender
	born       time.Time
	count      int
	size       int64 // of the bodies
	charged    int64
	have       []uint64 // bits
	pieces     []stored
	prev, next *set
}

type stored struct {
	number int
	buf    *[]byte
}

// message is a finished body.
type message struct {
	body []byte
	buf  *[]byte
}

func (m *message) release() { pool.Put(m.buf) }

func newStore(c Config, m *channel.Metrics) *store {
	refused := func(reason string) *channel.Counter {
		return m.Counter("fragment_refused_total", "Received pieces that were refused.", "reason", reason)
	}
	st := &store{
		cfg:              c,
		senders:          map[channel.UniqueID]*sender{},
		refusedMalformed: refused("malformed"),
		refusedTooMany:   refused("too_many"),
		refusedTooLarge:  refused("too_large"),
		refusedFull:      refused("full"),
		refusedMismatch:  refused("mismatch"),
		refusedStray:     refused("ended"),
		duplicates:       refused("duplicate"),
		expired:          m.Counter("fragment_expired_total", "Unfinished messages that were given up, because they took too long or their sender has gone."),
	}
	gauge := func(name, help string, read func() float64) {
		m.Gauge(name, help, func() float64 {
			st.mu.Lock()
			defer st.mu.Unlock()
			return read()
		})
	}
	gauge("fragment_unfinished_messages", "Messages of which some pieces are kept.", func() float64 { return float64(st.count) })
	gauge("fragment_unfinished_bytes", "Bytes kept of unfinished messages, with overhead.", func() float64 { return float64(st.bytes) })
	return st
}

// Reasons why a piece is refused.
var (
	errMismatch = fmt.Errorf("fragment: %w: the pieces of a message say different counts", channel.ErrBadMessage)
	errStray    = fmt.Errorf("fragment: %w: a piece of a message that has ended", channel.ErrBadMessage)
)

// add stores a piece of m. It returns the whole message if that completes it.
// A piece that has been stored before is ignored.
func (st *store) add(m *channel.Message, pc fragment, now time.Time) (*message, error) {
	buf := pool.Get(len(pc.body))
	*buf = append(*buf, pc.body...)
	st.mu.Lock()
	s, err := st.keep(m, pc, buf, now)
	if err != nil || s == nil {
		st.mu.Unlock()
		pool.Put(buf)
		return nil, err
	}
	if len(s.pieces) < s.count {
		st.mu.Unlock()
		return nil, nil
	}
	st.end(s)
	st.mu.Unlock()
	return s.join(), nil
}

// keep stores a piece and returns its set; st.mu is held. It returns nil, and
// does not keep the buffer, on an error and if the piece has been stored before.
func (st *store) keep(m *channel.Message, pc fragment, buf *[]byte, now time.Time) (*set, error) {
	if pc.count > st.cfg.MaxFragments {
		st.refusedTooMany.Inc()
		return nil, fmt.Errorf("fragment: %w: %d pieces, max_fragments is %d", channel.ErrTooLarge, pc.count, st.cfg.MaxFragments)
	}
	snd := st.senders[m.From.ID]
	if snd == nil {
		if len(st.senders) >= maxSenders && !st.dropIdle() {
			st.refusedFull.Inc()
			return nil, fmt.Errorf("fragment: %w: pieces of %d senders are kept", channel.ErrQueueFull, len(st.senders))
		}
		snd = &sender{id: m.From.ID, sets: map[channel.UniqueID]*set{}}
		st.senders[snd.id] = snd
	}
	snd.used = now
	s := snd.sets[m.ID]
	cost := int64(cap(*buf) + pieceOverhead)
	fresh := s == nil
	switch {
	case fresh && slices.Contains(snd.ended[:], m.ID):
		st.refusedStray.Inc()
		return nil, errStray
	case fresh:
		words := (pc.count + 63) / 64
		s = &set{id: m.ID, s: snd, born: now, count: pc.count, have: make([]uint64, words)}
		cost += int64(setOverhead + 8*words)
	case s.count != pc.count:
		st.refusedMismatch.Inc()
		return nil, errMismatch
	case s.have[pc.number/64]&(1<<(pc.number%64)) != 0:
		st.duplicates.Inc()
		return nil, nil
	}
	if err := st.room(snd, s, fresh, cost, int64(len(pc.body))); err != nil {
		if fresh {
			snd.remember(m.ID)
		} else {
			st.drop(s) // it cannot be completed any more
		}
		return nil, err
	}
	if fresh {
		st.link(s)
	}
	s.charged += cost
	s.size += int64(len(pc.body))
	s.have[pc.number/64] |= 1 << (pc.number % 64)
	s.pieces = append(s.pieces, stored{pc.number, buf})
	snd.bytes += cost
	st.bytes += cost
	return s, nil
}

// room checks the bounds; st.mu is held.
func (st *store) room(snd *sender, s *set, fresh bool, cost, size int64) error {
	switch {
	case s.size+size > st.cfg.MaxMessageSize:
		st.refusedTooLarge.Inc()
		return fmt.Errorf("fragment: %w: the pieces of a message have more than %d bytes (max_message_size)", channel.ErrTooLarge, st.cfg.MaxMessageSize)
	case snd.bytes+cost > st.cfg.SenderSize, fresh && len(snd.sets) >= st.cfg.SenderMessages:
		st.refusedFull.Inc()
		return fmt.Errorf("fragment: %w: %d unfinished messages of %d bytes of this sender are kept", channel.ErrQueueFull, len(snd.sets), snd.bytes)
	case st.bytes+cost > st.cfg.TotalSize, fresh && st.count >= st.cfg.TotalMessages:
		st.refusedFull.Inc()
		return fmt.Errorf("fragment: %w: %d unfinished messages of %d bytes are kept", channel.ErrQueueFull, st.count, st.bytes)
	}
	return nil
}

// remember notes that a message has ended; st.mu is held.
func (snd *sender) remember(id channel.UniqueID) {
	snd.ended[snd.next] = id
	snd.next = (snd.next + 1) % recent
}

// link adds a new set; st.mu is held.
func (st *store) link(s *set) {
	s.s.sets[s.id] = s
	st.count++
	s.prev = st.newest
	if st.newest != nil {
		st.newest.next = s
	} else {
		st.oldest = s
	}
	st.newest = s
}

// unlink takes a set out; st.mu is held.
func (st *store) unlink(s *set) {
	delete(s.s.sets, s.id)
	s.s.bytes -= s.charged
	st.bytes -= s.charged
	st.count--
	if s.prev != nil {
		s.prev.next = s.next
	} else {
		st.oldest = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	} else {
		st.newest = s.prev
	}
	s.prev, s.next = nil, nil
}

// end takes a complete set out; st.mu is held.
func (st *store) end(s *set) {
	st.unlink(s)
	s.s.remember(s.id)
}

// drop throws an unfinished set away; st.mu is held.
func (st *store) drop(s *set) {
	st.end(s)
	for _, p := range s.pieces {
		pool.Put(p.buf)
	}
	s.pieces = nil
}

// join puts the pieces together.
func (s *set) join() *message {
	slices.SortFunc(s.pieces, func(a, b stored) int { return cmp.Compare(a.number, b.number) })
	buf := pool.Get(int(s.size))
	for _, p := range s.pieces {
		*buf = append(*buf, *p.buf...)
		pool.Put(p.buf)
	}
	s.pieces = nil
	return &message{body: *buf, buf: buf}
}

// dropIdle forgets one of a few random senders that have nothing unfinished;
// st.mu is held.
func (st *store) dropIdle() bool {
	n := 0
	for id, snd := range st.senders {
		if len(snd.sets) == 0 {
			delete(st.senders, id)
			return true
		}
		if n++; n == sampleSenders {
			break
		}
	}
	return false
}

// forget frees what is kept of a sender.
func (st *store) forget(id channel.UniqueID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if snd := st.senders[id]; snd != nil {
		st.free(snd)
	}
}

// free frees what is kept of a sender; st.mu is held.
func (st *store) free(snd *sender) {
	for _, s := range snd.sets {
		st.expired.Inc()
		st.drop(s)
	}
	delete(st.senders, snd.id)
}

// leaving frees what is kept of a sender soon.
func (st *store) leaving(id channel.UniqueID, now time.Time) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if snd := st.senders[id]; snd != nil {
		snd.deadline = now.Add(leaveGrace)
	}
}

// back takes leaving back: the member is there again.
func (st *store) back(id channel.UniqueID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if snd := st.senders[id]; snd != nil {
		snd.deadline = time.Time{}
	}
}

// expire gives up what has taken too long.
func (st *store) expire(now time.Time) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for st.oldest != nil && now.Sub(st.oldest.born) >= st.cfg.Expire {
		st.expired.Inc()
		st.drop(st.oldest)
	}
	for _, snd := range st.senders {
		if !snd.deadline.IsZero() && !now.Before(snd.deadline) || len(snd.sets) == 0 && now.Sub(snd.used) >= 2*st.cfg.Expire {
			st.free(snd)
		}
	}
}
