package table

import (
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// live is one session of the table. mu guards everything that can change, and is
// held for a few map operations only. There are many of them: what only those
// need that are being changed is in busy.
type live struct {
	t     *Table
	mu    sync.Mutex
	key   session.Key
	route *string         // nil is that of the table
	rec   session.Replica // the whole session; empty when it has ended
	end   *session.Record // its tombstone; nil while it lives
	*busy                 // see use and rest; may be nil

	counter uint64 // highest of any version seen
	shared  int64  // the access time that the manager knows, ms
	checkAt int64  // the second in which the expirer looks again
	keep    int64  // not to be left to the manager before, ms
	size    int
	users   int32 // handles
	foreign bool  // the last access was on another node
	dropped bool  // no longer in the table
	warned  bool  // its size has been logged
}

// busy is what only a session has that is being changed, or left to the manager.
type busy struct {
	// pending is what no batch has taken yet, or nil; extra are records of other
	// keys that go with it: tombstones of ids before a Renew.
	pending *session.Record
	extra   []*session.Record
	// queued is the batch, by level, that will take the pending change; inflight
	// are those that are carrying earlier ones.
	queued   [3]*batch
	inflight []*batch
	// seq counts the changes made here, as long as there are handles; weak is the
	// seq at which a batch of the levels below Synced last took the pending change.
	seq  uint64
	weak [core.Synced]uint64
	// gate lets one Update work at a time; made when first needed. updates are
	// those that work or wait.
	gate    chan struct{}
	updates int
	// leaving is the call that is just leaving it to the manager, or nil.
	leaving *flight
}

// use returns what is needed to change the session.
func (s *live) use() *busy {
	if s.busy == nil {
		s.busy = s.t.busy.Get().(*busy)
	}
	return s.busy
}

// rest gives back what use returned, if nothing is going on.
func (s *live) rest() {
	b := s.busy
	if b == nil || s.users > 0 || b.updates > 0 || b.leaving != nil || b.queued != [3]*batch{} || !s.clean() {
		return
	}
	s.busy = nil
	*b = busy{inflight: b.inflight[:0], gate: b.gate}
	s.t.busy.Put(b)
}

// landed is a flight that is over.
var landed = func() *flight {
	f := &flight{done: make(chan struct{})}
	close(f.done)
	return f
}()

// acquire begins a request's use. Without a handle, the session has ended, or
// the caller waits for leaving and looks into the table again.
func (s *live) acquire() (h *handle, leaving *flight) {
	now := time.Now().UnixMilli()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dropped {
		return nil, landed
	}
	if s.busy != nil && s.leaving != nil && s.living() {
		return nil, s.leaving
	}
	if s.living() && s.due(now) {
		s.finish(session.Expired, now)
		s.t.m.expired.Inc()
		s.t.flushers[core.Async].enqueue(s)
		s.schedule(now)
	}
	if !s.living() {
		return nil, nil
	}
	h = &handle{t: s.t, s: s, prev: s.rec.LastAccess()}
	s.users++
	s.rec.Touch(now)
	s.foreign = false
	return h, nil
}

// expiry is when the session expires, in milliseconds; 0 is never. The last
// access on another node may be later than we know.
func (s *live) expiry() int64 {
	if s.rec.MaxInactive() <= 0 {
		return 0
	}
	life := s.rec.MaxInactive()
	if s.foreign {
		life += 2 * s.touchInterval()
	}
	return s.rec.LastAccess() + max(life.Milliseconds(), 1)
}

// due reports whether the session's time is over.
func (s *live) due(now int64) bool {
	at := s.expiry()
	return at != 0 && now >= at && s.users == 0
}

// touchInterval is how much the access time that other nodes know may lag.
func (s *live) touchInterval() time.Duration {
	if s.rec.MaxInactive() > 0 {
		return min(s.rec.MaxInactive()/4, s.t.cfg.TouchInterval)
	}
	return s.t.cfg.TouchInterval
}

// dirty reports whether there is something that no batch has taken.
func (s *live) dirty() bool { return s.busy != nil && (s.pending != nil || len(s.extra) > 0) }

// clean reports whether the manager has everything.
func (s *live) clean() bool { return s.busy == nil || !s.dirty() && len(s.inflight) == 0 }

// living reports whether the session has not ended.
func (s *live) living() bool { return s.end == nil }

// removable reports whether the session has ended and there is no manager that
// would have to know.
func (s *live) removable() bool { return !s.living() && s.t.cfg.Manager == nil }

// over notes that the session, living until now, has ended.
func (s *live) over(now int64) {
	s.t.count.Add(-1)
	s.keep = now
	if s.t.ended.Add(1) <= int64(s.t.cfg.MaxSessions/8) {
		s.keep += keepEnded.Milliseconds()
	}
	s.schedule(now)
}

// delta returns the record that collects changes, making it if needed.
func (s *live) delta() *session.Record {
	b := s.use()
	if b.pending == nil {
		b.pending = &session.Record{Key: s.key}
	}
	return b.pending
}

// next returns the version of a change that is being made.
func (s *live) next() session.Version {
	s.counter++
	return session.Version{Counter: s.counter, Node: s.t.node.Load()}
}

// put stores an attribute, and collects the change.
func (s *live) put(name string, e session.Entry) error {
	old, there := s.rec.Get(name)
	size := s.size + len(e.Value) - len(old.Value)
	if !there {
		size += len(name)
	}
	if !e.Deleted && size > s.t.cfg.MaxSize || !there && s.rec.Len() >= session.MaxAttrs {
		s.t.m.tooLarge.Inc()
		return session.ErrTooLarge
	}
	e.Version = s.next()
	e = e.On(old)
	s.rec.Put(name, e)
	s.tellAttribute(name, old, e)
	s.size = size
	s.use().seq++
	if s.t.cfg.Manager != nil {
		d := s.delta()
		if d.Attrs == nil {
			d.Attrs = make(map[string]session.Entry, 1)
		}
		d.Attrs[name] = e
	}
	if size > s.t.cfg.WarnSize && !s.warned {
		s.warned = true
		s.t.log.Warn("a session is getting large: every change of it travels to other nodes, and so does all of it when a node joins",
			zap.String("session", session.Prefix(s.key.ID)), zap.String("context", s.key.Context),
			zap.Int("bytes", size), zap.Int("refusedAbove", s.t.cfg.MaxSize))
	}
	return nil
}

// finish ends the session, and collects the tombstone.
func (s *live) finish(kind session.EndKind, now int64) {
	s.tellEnd(kind, true)
	end := session.Record{Key: s.key, End: kind, EndTime: now}
	s.rec, s.end = session.Replica{}, &end
	s.size = 0
	s.use().seq++
	if s.t.cfg.Manager != nil {
		same := end
		s.use().pending = &same
	}
	s.over(now)
}

// merge takes over what another node did. moved says that the session has been
// renewed there and must be replaced by a pointer to its new id.
func (s *live) merge(r *session.Record, now int64) (moved bool) {
	if s.dropped {
		return false
	}
	if r.End != session.Living {
		return s.mergeEnd(r, now)
	}
	if !s.living() {
		return false
	}
	before := s.rec.LastAccess()
	c := *r
	c.LastAccess = s.t.notAhead(c.LastAccess, now)
	conflicts := s.rec.MergeEach(&c, func(name string, kept, lost session.Entry) {
		s.t.disputes.Add(s.key, name, kept, lost, now)
	})
	s.t.m.conflicts.Add(int64(conflicts))
	if s.rec.LastAccess() > before {
		s.foreign = s.users == 0
		s.shared = s.rec.LastAccess()
	}
	s.counter = max(s.counter, c.Counter())
	s.size = s.rec.Size()
	s.schedule(now)
	return false
}

func (s *live) mergeEnd(r *session.Record, now int64) (moved bool) {
	if !s.living() {
		s.end.Merge(r)
		return false
	}
	moved = r.End == session.Renewed && r.RenewedTo != ""
	if !moved {
		s.tellEnd(r.End, false)
	}
	var changes *session.Record
	if s.busy != nil {
		changes, s.pending = s.pending, nil
	}
	end := r.Tombstone()
	end.Key = s.key
	s.rec, s.end = session.Replica{}, &end
	s.size = 0
	s.over(now)
	defer s.rest()
	if !moved {
		return false
	}
	s.t.tellRenewed(s.key, session.Key{Context: s.key.Context, ID: r.RenewedTo}, 0, false)
	if changes != nil && len(changes.Attrs) > 0 {
		// What was changed here goes on under the new id.
		changes.Key.ID, changes.Created = r.RenewedTo, 0
		s.extra = append(s.extra, changes)
		s.t.flushers[core.Async].enqueue(s)
	}
	return true
}

// commitAgain adds a change of another node to the pending one.
func (s *live) commitAgain(r *session.Record) {
	if s.dropped || s.t.cfg.Manager == nil || !s.living() && r.End == session.Living {
		return
	}
	s.delta().Merge(r)
	s.t.flushers[core.Async].enqueue(s)
}

// commitWhole makes the whole session pending.
func (s *live) commitWhole() {
	if s.dropped || s.t.cfg.Manager == nil {
		return
	}
	if !s.living() {
		end := *s.end
		s.use().pending = &end
		return
	}
	s.use().pending = s.rec.Record(s.key)
}

// take hands the pending change to a batch; main is nil if there is none.
func (s *live) take(b *batch) (main *session.Record, extra []*session.Record) {
	main, extra = s.pending, s.extra
	if main == nil && extra == nil {
		return nil, nil
	}
	s.pending, s.extra = nil, nil
	if main != nil && main.End == session.Living {
		main.LastAccess = s.rec.LastAccess()
		s.shared = max(s.shared, main.LastAccess)
	}
	if b.level < core.Synced {
		s.weak[b.level] = s.seq
	}
	s.inflight = append(s.inflight, b)
	return main, extra
}

// giveBack makes pending again what a batch could not commit.
func (s *live) giveBack(main *session.Record, extra []*session.Record) {
	s.extra = append(s.extra, extra...)
	switch {
	case main == nil, main.Key != s.key:
		// Nothing, or changes before a Renew: the record under the new id,
		// which is pending or committed, has them.
	case main.End == session.Living && !s.living():
		// The tombstone is pending or committed, or came from elsewhere.
	case s.pending == nil:
		s.pending = main
	default:
		s.pending.Merge(main)
	}
}

// taken reports whether a change of that seq may have been taken by a batch of a
// level below level.
func (s *live) taken(seq uint64, level core.Level) bool {
	if s.busy == nil {
		return false
	}
	for _, at := range s.weak[:level] {
		if seq <= at {
			return true
		}
	}
	return false
}
