package replica

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// shardCount is fixed by the protocol: a key's shard is the first byte of
	// its digest.
	shardCount = 256
	// heldSlack is how much longer a replica is kept that the host is supposed
	// to hold live.
	heldSlack = time.Hour
	// partialTTL is how long changes are kept whose session never came.
	partialTTL = 10 * time.Minute
	// repairAfter is how often a session is asked for of which only changes are
	// known.
	repairAfter = time.Second
	// foreverTTL is how long the tombstone of a session without a time to live
	// is kept.
	foreverTTL = 24 * time.Hour
	// listedConflicts bounds the conflicts that Status lists.
	listedConflicts = 100
	// maxClockSkew is how far ahead of our clock an access time may be.
	maxClockSkew = time.Minute
)

// store keeps all sessions and tombstones. Its methods do not block and may be
// called concurrently.
type store struct {
	cfg        Config
	self       func() uint64 // this node
	shards     [shardCount]shard
	sessions   atomic.Int64
	owned      atomic.Int64 // sessions that this node is responsible for
	tombstones atomic.Int64
	bytes      atomic.Int64
	conflicts  atomic.Int64
	disputes   session.Conflicts
	expired    atomic.Int64
	early      atomic.Int64 // tombstones forgotten because there were too many
	refused    atomic.Int64 // sessions refused because there are too many
	future     atomic.Int64 // access times ahead of the clock
}

type shard struct {
	mu       sync.Mutex
	replicas map[session.Key]*replica
	tombs    map[session.Key]tomb
}

type replica struct {
	session.Replica
	size int32
	held bool // the host has it live
	// asked is when somebody was last asked for the rest of the session, ms;
	// only used until the replica is whole.
	asked int64
	// place is where the session is, if not everywhere; then it is set as soon
	// as the session is known.
	place *place
}

type tomb struct {
	end       session.EndKind
	endTime   int64
	renewedTo string
	dropAt    int64 // ms
}

func (t tomb) record(k session.Key) *session.Record {
	return &session.Record{Key: k, End: t.end, EndTime: t.endTime, RenewedTo: t.renewedTo}
}

func newStore(c Config, self func() uint64) *store {
	s := &store{cfg: c, self: self}
	for i := range s.shards {
		s.shards[i] = shard{replicas: map[session.Key]*replica{}, tombs: map[session.Key]tomb{}}
	}
	return s
}

func shardOf(digest uint64) int { return int(digest >> 56) }

func (s *store) shard(k session.Key) *shard { return &s.shards[shardOf(k.Digest())] }

// effect says what came of a record that was merged.
type effect struct {
	// report: the host holds the session live and does not know this change.
	report bool
	// tell, if not nil, is something else that the host does not know.
	tell *session.Record
	// ask: only changes of the session are known; the sender has the rest.
	ask bool
	// added: the session was not known before.
	added bool
	// refused: there is no room.
	refused bool
	// cascade, if not nil, is a tombstone that follows from this record.
	cascade *session.Record
}

// merge takes over what r says; it copies what it keeps. local says that the
// host committed it, so the host has it live. The shard is locked.
func (s *store) merge(sh *shard, r *session.Record, local bool, now int64) (e effect) {
	if r.End != session.Living {
		return s.mergeEnd(sh, r, local, now)
	}
	if t, over := sh.tombs[r.Key]; over {
		if local { // the host has not heard of it, or is just about to
			e.tell = t.record(r.Key)
		}
		return e
	}
	p := sh.replicas[r.Key]
	known := p != nil
	if !known {
		if s.sessions.Load() >= int64(s.cfg.MaxSessions) {
			s.refused.Add(1)
			e.refused = true
			return e
		}
		key := session.Key{Context: unique.Make(r.Key.Context).Value(), ID: r.Key.ID}
		p = &replica{}
		sh.replicas[key] = p
		s.sessions.Add(1)
		e.added = true
	}
	if r.LastAccess > now+maxClockSkew.Milliseconds() {
		s.future.Add(1)
		cut := *r
		cut.LastAccess = now
		r = &cut
	}
	s.conflicts.Add(int64(p.MergeEach(r, func(name string, kept, lost session.Entry) {
		s.disputes.Add(r.Key, name, kept, lost, now)
	})))
	s.bytes.Add(int64(p.Size()) - int64(p.size))
	p.size = int32(p.Size())
	if local {
		if known && !p.held {
			e.tell = p.Record(r.Key) // others may know more than the host
		}
		p.held = true
		return e
	}
	e.report = p.held
	if !p.Whole() && now-p.asked >= repairAfter.Milliseconds() {
		p.asked = now
		e.ask = true
	}
	return e
}

// put is merge for who has not locked the shard.
func (s *store) put(r *session.Record, local bool, now int64) effect {
	sh := s.shard(r.Key)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return s.merge(sh, r, local, now)
}

func (s *store) mergeEnd(sh *shard, r *session.Record, local bool, now int64) (e effect) {
	t, known := sh.tombs[r.Key]
	end := t.record(r.Key)
	end.Merge(r)
	keep := s.cfg.TombstoneTTL
	if p := sh.replicas[r.Key]; p != nil {
		e.report = p.held && !local
		switch life := p.MaxInactive(); {
		case life > 0:
			keep = max(keep, life+s.cfg.ExpireSlack)
		case p.Whole():
			keep = max(keep, foreverTTL)
		}
		s.remove(sh, r.Key, p)
	}
	dropAt := max(t.dropAt, now+keep.Milliseconds())
	if known {
		dropAt = t.dropAt // hearing of it again does not make it younger
	} else {
		s.tombstones.Add(1)
	}
	key := session.Key{Context: unique.Make(r.Key.Context).Value(), ID: r.Key.ID}
	sh.tombs[key] = tomb{end: end.End, endTime: end.EndTime, renewedTo: end.RenewedTo, dropAt: dropAt}
	news := !known || t.end != end.End || t.renewedTo != end.RenewedTo // else a ring of renewals would never end
	if news && end.End == session.Invalidated && end.RenewedTo != "" {
		// Logged out under the old id while it was renewed elsewhere.
		e.cascade = &session.Record{
			Key: session.Key{Context: r.Key.Context, ID: end.RenewedTo},
			End: session.Invalidated, EndTime: end.EndTime,
		}
	}
	s.boundTombs(sh)
	return e
}

func (s *store) remove(sh *shard, k session.Key, p *replica) {
	delete(sh.replicas, k)
	s.sessions.Add(-1)
	s.bytes.Add(-int64(p.size))
	if p.place != nil && p.place.owner.epoch > 0 && p.place.owner.node == s.self() {
		s.owned.Add(-1)
	}
}

// boundTombs forgets the oldest eighth of a shard's tombstones when there are
// too many.
func (s *store) boundTombs(sh *shard) {
	limit := max(s.cfg.MaxTombstones/shardCount, 16)
	if len(sh.tombs) <= limit {
		return
	}
	type old struct {
		key    session.Key
		dropAt int64
	}
	list := make([]old, 0, len(sh.tombs))
	for k, t := range sh.tombs {
		list = append(list, old{k, t.dropAt})
	}
	slices.SortFunc(list, func(a, b old) int { return cmp.Compare(a.dropAt, b.dropAt) })
	n := max(limit/8, 1)
	for _, o := range list[:n] {
		delete(sh.tombs, o.key)
	}
	s.tombstones.Add(-int64(n))
	s.early.Add(int64(n))
}

// over reports whether the replica is to be dropped.
func (s *store) over(p *replica, now int64) bool {
	if !p.Whole() {
		return now-max(p.LastAccess(), p.asked) > partialTTL.Milliseconds()
	}
	if p.MaxInactive() <= 0 {
		return false
	}
	life := p.MaxInactive() + s.cfg.ExpireSlack
	if p.held {
		life += heldSlack
	}
	return now-p.LastAccess() > life.Milliseconds()
}

// sweep drops what is over in one shard.
func (s *store) sweep(i int, now int64) {
	sh := &s.shards[i]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for k, p := range sh.replicas {
		if s.over(p, now) {
			s.remove(sh, k, p)
			s.expired.Add(1)
		}
	}
	for k, t := range sh.tombs {
		if now >= t.dropAt {
			delete(sh.tombs, k)
			s.tombstones.Add(-1)
		}
	}
}

// load returns the session, or its tombstone if it was renewed, and marks it
// held; known says that there is nothing to ask others for.
func (s *store) load(k session.Key, now int64) (r *session.Record, known bool) {
	sh := s.shard(k)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if t, over := sh.tombs[k]; over {
		if t.end == session.Renewed {
			return t.record(k), true
		}
		return nil, true
	}
	p := sh.replicas[k]
	if p == nil || !p.Whole() {
		return nil, false
	}
	if s.over(p, now) {
		return nil, true
	}
	p.held = true
	return p.Record(k), true
}

func (s *store) release(keys []session.Key) {
	for _, k := range keys {
		sh := s.shard(k)
		sh.mu.Lock()
		if p := sh.replicas[k]; p != nil {
			p.held = false
		}
		sh.mu.Unlock()
	}
}

// each calls f for every session and tombstone of a shard with the shard's lock
// held; p is nil for a tombstone.
func (s *store) each(i int, now int64, f func(k session.Key, p *replica, t tomb)) {
	sh := &s.shards[i]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for k, p := range sh.replicas {
		if !s.over(p, now) {
			f(k, p, tomb{})
		}
	}
	for k, t := range sh.tombs {
		f(k, nil, t)
	}
}

// versions returns the version digest.
func versions(p *replica, t tomb) uint64 {
	if p != nil && p.place != nil {
		return p.Digest() ^ mix(p.place.owner.epoch<<32^p.place.owner.node)
	}
	if p != nil {
		return p.Digest()
	}
	return session.DigestEnd(t.end, t.renewedTo)
}

// keys returns the keys of a shard that have one of the digests.
func (s *store) keys(i int, wanted map[uint64]bool, now int64) (send []session.Key) {
	s.each(i, now, func(k session.Key, _ *replica, _ tomb) {
		if wanted[k.Digest()] {
			send = append(send, k)
		}
	})
	return send
}

// summaries describes up to limit sessions.
func (s *store) summaries(limit int) []session.Summary {
	var out []session.Summary
	now := time.Now().UnixMilli()
	for i := range s.shards {
		if len(out) >= limit {
			break
		}
		s.each(i, now, func(k session.Key, p *replica, _ tomb) {
			if p != nil && p.Whole() && len(out) < limit {
				out = append(out, p.Record(k).Summary())
			}
		})
	}
	return out
}
