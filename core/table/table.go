package table

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Config is the configuration of a table. Zero values are the defaults.
type Config struct {
	// Node marks the versions that this node writes: the first half of its
	// unique id. Start sets it too.
	Node uint64
	// Manager replicates the sessions; nil keeps them on this node only.
	Manager core.Manager
	// Route is appended to session ids that are not made with a route of their
	// own.
	Route string
	// MaxSessions bounds the table. Default 1,000,000.
	MaxSessions int
	// MaxSize refuses changes that make a session bigger, in bytes of names and
	// values. Default and maximum 16 MiB.
	MaxSize int
	// WarnSize logs sessions that grow over it, once each. Default 1 MiB.
	WarnSize int
	// TouchInterval is how old the access time that other nodes know may be, or
	// a quarter of the session's time to live if that is less. Default 30 s.
	TouchInterval time.Duration
	// IdleRelease is how long a session that the manager has too is kept here
	// without a request. Default 5 min; negative keeps them for ever.
	IdleRelease time.Duration
	// RenewGrace is how long requests with the id from before a Renew still
	// find the session. Default 30 s; negative refuses them at once. Whoever
	// knew the old id can use the session for that long.
	RenewGrace time.Duration
	// CommitTimeout bounds one call of Manager.Commit. Default 15 s.
	CommitTimeout time.Duration
	// LoadTimeout bounds one call of Manager.Load. Default 10 s.
	LoadTimeout time.Duration
	// Relay carries events of sessions between nodes, for listeners that want to
	// hear what other nodes do; nil for none.
	Relay Relay
}

// Bounds that need no configuration.
const (
	// shardCount spreads the lock of the map. It is a power of two.
	shardCount = 64
	// maxHops bounds how many renewals a request with an old id follows.
	maxHops = 4
	// keepEnded is how long the tombstone of a session stays in the table after
	// the manager has it, in case the manager dies before it is anywhere else.
	keepEnded = 30 * time.Second
	// keepRefused is the pause before the manager is asked again to take over a
	// session alone.
	keepRefused = time.Minute
	// keepBusy is that pause while the manager is still busy with others.
	keepBusy = 5 * time.Second
	// maxClockSkew is how far ahead of our clock an access time may be.
	maxClockSkew = time.Minute
)

func (c Config) withDefaults() Config {
	c.MaxSessions = cmp.Or(c.MaxSessions, 1_000_000)
	c.MaxSize = min(cmp.Or(c.MaxSize, session.MaxSize), session.MaxSize)
	c.WarnSize = cmp.Or(c.WarnSize, 1<<20)
	c.TouchInterval = cmp.Or(c.TouchInterval, 30*time.Second)
	c.IdleRelease = cmp.Or(c.IdleRelease, 5*time.Minute)
	c.RenewGrace = cmp.Or(c.RenewGrace, 30*time.Second)
	c.CommitTimeout = cmp.Or(c.CommitTimeout, 15*time.Second)
	c.LoadTimeout = cmp.Or(c.LoadTimeout, 10*time.Second)
	return c
}

// ErrStopped: the table takes no changes any more.
var ErrStopped = errors.New("table: stopped")

// Table implements core.Sessions, and the part of core.ManagerHost that is about
// sessions: Update and Resync. All methods may be called concurrently.
type Table struct {
	cfg   Config
	log   *zap.Logger
	node  atomic.Uint64
	seed  maphash.Seed
	count atomic.Int64 // living sessions
	ended atomic.Int64 // tombstones in the table
	m     metrics

	shards   [shardCount]shard
	flushers [3]*flusher // by level
	wheel    wheel
	busy     sync.Pool // of *busy
	disputes session.Conflicts

	// watches is nil when nobody listens. telling is held for reading while
	// somebody is told, so that a cancelled watch is told nothing.
	watches atomic.Pointer[watches]
	telling sync.RWMutex

	life      context.Context // ends when Stop is done
	end       context.CancelFunc
	wg        sync.WaitGroup // expirer, flusher workers, loads and releases
	mu        sync.Mutex     // guards the next two and adding to wg
	started   bool
	stopped   bool
	releasing atomic.Bool
	draining  atomic.Bool
}

type shard struct {
	mu sync.RWMutex
	// live holds every session of the table, and those that ended not long ago.
	live map[session.Key]*live
	// renewed says where sessions went that have a new id.
	renewed map[session.Key]renewal
	// flights are the sessions that the manager is being asked for.
	flights map[session.Key]*flight
}

type renewal struct {
	to    session.Key
	until int64 // end of the grace, ms
	by    *live // whose tombstone for the old key may not be committed yet; or nil
}

// flight is one call of the manager that others wait for.
type flight struct {
	done    chan struct{}
	err     error             // valid after done
	none    bool              // valid after done: there is no such session
	renewed string            // valid after done: the id that it has now, if none because of that
	updates []*session.Record // of a Load: changes by others that came meanwhile, under shard.mu
}

type metrics struct {
	created, expired, invalidated, loaded, released, conflicts *channel.Counter
	full, tooLarge, future, batches, records, retries, lost    *channel.Counter
	drained                                                    *channel.Counter
}

// New makes a table. It has no side effect but registering metrics.
func New(c Config, s channel.Settings) *Table {
	t := &Table{cfg: c.withDefaults(), log: s.Logger, seed: maphash.MakeSeed()}
	if t.log == nil {
		t.log = zap.NewNop()
	}
	t.node.Store(cmp.Or(c.Node, rand.Uint64()))
	for i := range t.shards {
		t.shards[i] = shard{live: map[session.Key]*live{}, renewed: map[session.Key]renewal{}, flights: map[session.Key]*flight{}}
	}
	for level := range t.flushers {
		t.flushers[level] = newFlusher(t, core.Level(level))
	}
	t.busy.New = func() any { return new(busy) }
	t.wheel.slots = map[int64]slot{}
	t.life, t.end = context.WithCancel(context.Background())
	t.register(s)
	return t
}

func (t *Table) register(s channel.Settings) {
	counter := func(name, help string) *channel.Counter {
		return s.Metrics.Counter("sessions_"+name+"_total", help, "table", s.Name)
	}
	t.m = metrics{
		created:     counter("created", "sessions made"),
		expired:     counter("expired", "sessions that nobody used for too long"),
		invalidated: counter("invalidated", "sessions that an application ended"),
		loaded:      counter("loaded", "sessions taken over from the manager"),
		released:    counter("released", "idle sessions left to the manager"),
		conflicts:   counter("conflicts", "attributes changed on two nodes independently"),
		full:        counter("refused_full", "sessions refused because the table is full"),
		drained:     counter("refused_draining", "sessions refused because the node is draining"),
		tooLarge:    counter("refused_too_large", "changes refused because the session or a name is too large"),
		future:      counter("access_in_future", "access times ahead of the clock, cut"),
		batches:     counter("commits", "batches committed"),
		records:     counter("committed_records", "changes committed; divided by commits it is the batch size"),
		retries:     counter("commit_failures", "batches that failed and will be sent again"),
		lost:        counter("async_lost", "sessions with changes that could not be committed when the node stopped"),
	}
	s.Metrics.Gauge("sessions_live", "sessions in the table", func() float64 { return float64(t.Len()) }, "table", s.Name)
	s.Metrics.Gauge("sessions_uncommitted", "sessions with changes on their way", func() float64 {
		n := 0
		for _, f := range t.flushers {
			n += f.load()
		}
		return float64(n)
	}, "table", s.Name)
}

// Start begins to hand changes to the manager and to expire sessions. node is
// the first half of the node's unique id.
func (t *Table) Start(_ context.Context, node uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return ErrStopped
	}
	if t.started {
		return nil
	}
	t.started = true
	if node != 0 {
		t.node.Store(node)
	}
	t.wg.Go(t.expireLoop)
	for _, f := range t.flushers {
		for range maxInFlight {
			t.wg.Go(f.work)
		}
	}
	return nil
}

// Stop hands all changes to the manager, as far as ctx allows, and ends. It
// works twice and without Start.
func (t *Table) Stop(ctx context.Context) error {
	t.mu.Lock()
	first, started := !t.stopped, t.started
	t.stopped = true
	t.mu.Unlock()
	var err error
	if first && started {
		t.flushDirty()
		err = t.Flush(ctx)
		if err != nil {
			t.m.lost.Add(t.uncommitted())
		}
	}
	for _, f := range t.flushers {
		f.close()
	}
	t.end()
	t.wg.Wait()
	return err
}

// spawn runs f in a goroutine that Stop waits for; false after Stop.
func (t *Table) spawn(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return false
	}
	t.wg.Go(f)
	return true
}

// Len returns how many sessions are in the table.
func (t *Table) Len() int { return int(t.count.Load()) }

func (t *Table) shard(k session.Key) *shard {
	return &t.shards[maphash.String(t.seed, k.ID)%shardCount]
}

// Create implements core.Sessions.
func (t *Table) Create(_ context.Context, contextName string, o session.NewOptions) (core.Handle, error) {
	if len(contextName) > session.MaxContext {
		return nil, fmt.Errorf("table: create: the context's name has %d bytes, at most %d are allowed", len(contextName), session.MaxContext)
	}
	if t.draining.Load() && !o.WhileDraining {
		t.m.drained.Inc()
		return nil, fmt.Errorf("table: create: %w", session.ErrDraining)
	}
	if err := t.reserve(); err != nil {
		return nil, err
	}
	t.roomFor(contextName, core.SessionCreated)
	now := time.Now().UnixMilli()
	s := &live{
		t: t, key: session.Key{Context: contextName, ID: session.NewID()},
		users: 1, counter: 1,
	}
	if o.Route != "" && o.Route != t.cfg.Route {
		route := o.Route
		s.route = &route
	}
	first := &session.Record{
		Key: s.key, Created: now, LastAccess: now,
		MaxInactive: max(o.MaxInactive, 0), MaxInactiveVersion: session.Version{Counter: 1, Node: t.node.Load()},
	}
	s.rec = session.MakeReplica(first)
	h := &handle{t: t, s: s, prev: now, fresh: true}
	if t.cfg.Manager != nil {
		b := s.use()
		b.pending, b.seq, h.own = first, 1, 1
	}
	sh := t.shard(s.key)
	sh.mu.Lock()
	sh.live[s.key] = s
	sh.mu.Unlock()
	s.mu.Lock()
	s.schedule(now)
	s.tellCreated()
	s.mu.Unlock()
	t.m.created.Inc()
	return h, nil
}

// reserve counts one more session, if there is room.
func (t *Table) reserve() error {
	if t.count.Add(1) > int64(t.cfg.MaxSessions) {
		t.count.Add(-1)
		t.m.full.Inc()
		return fmt.Errorf("table: %d sessions: %w", t.cfg.MaxSessions, session.ErrFull)
	}
	return nil
}

// Find implements core.Sessions. Parallel requests for a session that the table
// does not have wait for one answer of the manager.
func (t *Table) Find(ctx context.Context, key session.Key) (core.Handle, error) {
	for hops := 0; hops < maxHops; {
		sh := t.shard(key)
		sh.mu.RLock()
		s, r, moved := sh.live[key], renewal{}, false
		if s == nil && len(sh.renewed) > 0 {
			r, moved = sh.renewed[key]
		}
		sh.mu.RUnlock()
		switch {
		case s != nil:
			h, leaving := s.acquire()
			if h != nil {
				return h, nil
			}
			if leaving == nil {
				return nil, nil
			}
			// It is being left to the manager: look again after that.
			if err := leaving.wait(ctx, key); err != nil {
				return nil, err
			}
		case moved:
			if time.Now().UnixMilli() >= r.until {
				return nil, nil
			}
			key = r.to
			hops++
		case t.cfg.Manager == nil:
			return nil, nil
		default:
			f := t.load(key)
			if f == nil {
				return nil, ErrStopped
			}
			if err := f.wait(ctx, key); err != nil {
				return nil, err
			}
			if f.err != nil || f.none {
				return nil, f.err
			}
		}
	}
	return nil, nil
}

func (f *flight) wait(ctx context.Context, key session.Key) error {
	select {
	case <-f.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("table: find session %s: %w", session.Prefix(key.ID), ctx.Err())
	}
}

// load asks the manager for a session, or joins whoever does already. It returns
// a flight that is done if somebody else was faster, and nil after Stop.
func (t *Table) load(key session.Key) *flight {
	sh := t.shard(key)
	sh.mu.Lock()
	f := sh.flights[key]
	_, moved := sh.renewed[key]
	if f != nil || moved || sh.live[key] != nil {
		sh.mu.Unlock()
		if f == nil {
			f = &flight{done: make(chan struct{})}
			close(f.done)
		}
		return f
	}
	f = &flight{done: make(chan struct{})}
	sh.flights[key] = f
	sh.mu.Unlock()
	if !t.spawn(func() { t.runLoad(sh, key, f) }) {
		sh.mu.Lock()
		delete(sh.flights, key)
		sh.mu.Unlock()
		f.err = ErrStopped
		close(f.done)
	}
	return f
}

func (t *Table) runLoad(sh *shard, key session.Key, f *flight) {
	ctx, cancel := context.WithTimeout(t.life, t.cfg.LoadTimeout)
	defer cancel()
	rec, err := t.cfg.Manager.Load(ctx, key)
	if err == nil && rec != nil && rec.Key != key {
		err = errors.New("the manager answered with another session")
	}
	if err != nil {
		f.err = fmt.Errorf("table: load session %s: %w", session.Prefix(key.ID), err)
	}
	var s *live
	sh.mu.Lock()
	delete(sh.flights, key)
	if err == nil {
		if rec != nil {
			for _, u := range f.updates {
				rec.Merge(u)
			}
		}
		if rec != nil && rec.End == session.Renewed {
			f.renewed = rec.RenewedTo
		}
		s, f.none, f.err = t.adopt(sh, key, rec)
	}
	sh.mu.Unlock()
	if s != nil {
		t.settle(s)
	}
	close(f.done)
}

// adopt takes what the manager answered into the table. sh is locked.
func (t *Table) adopt(sh *shard, key session.Key, rec *session.Record) (s *live, none bool, err error) {
	now := time.Now().UnixMilli()
	switch {
	case rec == nil:
		return nil, true, nil
	case rec.End == session.Renewed && rec.RenewedTo != "":
		r := t.renewal(key, rec, now)
		if now >= r.until {
			return nil, true, nil
		}
		sh.renewed[key] = r
		t.wheel.add(seconds(r.until)+1, check{old: key})
		return nil, false, nil
	case rec.End != session.Living || rec.Created == 0:
		return nil, true, nil // ended, or only changes of a session that nobody knows
	}
	if err := t.reserve(); err != nil {
		return nil, false, err
	}
	rec.LastAccess = t.notAhead(rec.LastAccess, now)
	s = &live{t: t, key: key, rec: session.MakeReplica(rec), foreign: true, shared: rec.LastAccess}
	s.counter, s.size = rec.Counter(), rec.Size()
	sh.live[key] = s
	s.claim()
	t.m.loaded.Inc()
	return s, false, nil
}

// settle schedules a session that came from the manager, or ends it if its time
// is over.
func (t *Table) settle(s *live) {
	now := time.Now().UnixMilli()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.due(now) {
		s.finish(session.Expired, now)
		t.m.expired.Inc()
		t.flushers[core.Async].enqueue(s)
	}
	s.schedule(now)
}

// renewal is what a tombstone of a renewed session says.
func (t *Table) renewal(key session.Key, rec *session.Record, now int64) renewal {
	return renewal{
		to:    session.Key{Context: key.Context, ID: rec.RenewedTo},
		until: min(rec.EndTime, now) + t.cfg.RenewGrace.Milliseconds(),
	}
}

// notAhead cuts an access time that is ahead of our clock, so that nobody's
// wrong clock makes a session live for ever.
func (t *Table) notAhead(access, now int64) int64 {
	if access <= now+maxClockSkew.Milliseconds() {
		return access
	}
	t.m.future.Inc()
	return now
}

// Update merges changes that other nodes made into the sessions of the table.
// It does not wait, and copies what it keeps of batch.
func (t *Table) Update(batch []byte) {
	err := session.DecodeBatch(batch, func(r *session.Record) error {
		t.update(r)
		return nil
	})
	if err != nil {
		t.log.Error("the manager reported changes that cannot be read; sessions of this node may be behind until they are loaded again", zap.Error(err))
	}
}

func (t *Table) update(r *session.Record) {
	sh := t.shard(r.Key)
	sh.mu.RLock()
	s := sh.live[r.Key]
	sh.mu.RUnlock()
	if s == nil {
		s = t.updateAbsent(sh, r)
	}
	if s == nil {
		return
	}
	now := time.Now().UnixMilli()
	s.mu.Lock()
	moved := s.merge(r, now)
	gone := s.removable()
	s.mu.Unlock()
	if moved {
		sh.mu.Lock()
		sh.renewed[r.Key] = t.renewal(r.Key, r, now)
		if sh.live[r.Key] == s {
			delete(sh.live, r.Key)
			t.ended.Add(-1)
		}
		sh.mu.Unlock()
		t.wheel.add(seconds(now+t.cfg.RenewGrace.Milliseconds())+1, check{old: r.Key})
		return
	}
	if gone {
		t.remove(s)
	}
}

// updateAbsent deals with a change of a session that is not in the table: it is
// kept if the session is just being loaded, and goes to the successor if the
// session has been renewed here.
func (t *Table) updateAbsent(sh *shard, r *session.Record) *live {
	sh.mu.Lock()
	s, f := sh.live[r.Key], sh.flights[r.Key]
	moved, renewed := sh.renewed[r.Key]
	if s == nil && f != nil {
		f.updates = append(f.updates, r.Clone())
	}
	sh.mu.Unlock()
	if s != nil || f != nil || !renewed {
		return s
	}
	next := t.shard(moved.to)
	next.mu.RLock()
	s = next.live[moved.to]
	next.mu.RUnlock()
	if s == nil || r.End == session.Renewed || r.End == session.Expired {
		return nil // the old id is over; the new one is not
	}
	// A change under the old id: it is a change of the new one, and as other
	// nodes have refused it under the old id, it is committed again.
	c := r.Clone()
	c.Key = moved.to
	c.Created = 0
	s.mu.Lock()
	s.merge(c, time.Now().UnixMilli())
	s.commitAgain(c)
	s.mu.Unlock()
	return nil
}

// remove takes a session that has ended out of a table without a manager.
func (t *Table) remove(s *live) {
	s.mu.Lock()
	key := s.key
	s.mu.Unlock()
	sh := t.shard(key)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if sh.live[key] == s && s.removable() {
		s.dropped = true
		delete(sh.live, key)
		t.ended.Add(-1)
	}
}

// all calls each for every session, with no lock held.
func (t *Table) all(each func(*live) bool) {
	for i := range t.shards {
		sh := &t.shards[i]
		sh.mu.RLock()
		list := make([]*live, 0, len(sh.live))
		for _, s := range sh.live {
			list = append(list, s)
		}
		sh.mu.RUnlock()
		for _, s := range list {
			if !each(s) {
				return
			}
		}
	}
}

// Resync commits every session of the table as a whole, and the tombstones that
// it still has, because the manager has lost its memory, and waits until that is
// done.
func (t *Table) Resync(ctx context.Context) error {
	if t.cfg.Manager == nil {
		return nil
	}
	t.all(func(s *live) bool {
		s.mu.Lock()
		s.commitWhole()
		t.flushers[core.Async].enqueue(s)
		s.mu.Unlock()
		return ctx.Err() == nil
	})
	t.resyncRenewals()
	return t.Flush(ctx)
}

// resyncRenewals commits the tombstones of old ids again.
func (t *Table) resyncRenewals() {
	for i := range t.shards {
		sh := &t.shards[i]
		sh.mu.RLock()
		for old, r := range sh.renewed {
			if r.by == nil {
				continue // another node's, which has it too
			}
			r.by.mu.Lock()
			b := r.by.use()
			b.extra = append(b.extra, &session.Record{
				Key: old, End: session.Renewed, EndTime: r.until - t.cfg.RenewGrace.Milliseconds(), RenewedTo: r.to.ID,
			})
			t.flushers[core.Async].enqueue(r.by)
			r.by.mu.Unlock()
		}
		sh.mu.RUnlock()
	}
}

// flushDirty queues whatever requests have left uncommitted.
func (t *Table) flushDirty() {
	t.all(func(s *live) bool {
		s.mu.Lock()
		if s.dirty() {
			t.flushers[core.Async].enqueue(s)
		}
		s.mu.Unlock()
		return true
	})
}

func (t *Table) uncommitted() (n int64) {
	t.all(func(s *live) bool {
		s.mu.Lock()
		if !s.clean() {
			n++
		}
		s.mu.Unlock()
		return true
	})
	return n
}

// Flush waits until everything that is on its way has been committed at its
// level.
func (t *Table) Flush(ctx context.Context) error {
	for _, f := range t.flushers {
		if err := f.flush(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Conflicts lists up to limit of the latest conflicts that this node saw in
// sessions of its table, the latest first. Status counts all of them.
func (t *Table) Conflicts(limit int) []session.Conflict { return t.disputes.List(limit) }

// Status describes the table for operators.
type Status struct {
	Sessions    int   `json:"sessions"`
	Created     int64 `json:"created"`
	Expired     int64 `json:"expired"`
	Invalidated int64 `json:"invalidated"`
	Conflicts   int64 `json:"conflicts"`
	// Uncommitted is how many sessions have changes on their way.
	Uncommitted int `json:"uncommitted"`
	// Failures counts batches that the manager did not take at first.
	Failures int64 `json:"failures"`
}

// Status returns the current numbers.
func (t *Table) Status() Status {
	st := Status{
		Sessions: t.Len(), Created: t.m.created.Value(), Expired: t.m.expired.Value(),
		Invalidated: t.m.invalidated.Value(), Conflicts: t.m.conflicts.Value(), Failures: t.m.retries.Value(),
	}
	for _, f := range t.flushers {
		st.Uncommitted += f.load()
	}
	return st
}

// List describes up to limit living sessions, the last used first.
func (t *Table) List(limit int) []session.Summary {
	var out []session.Summary
	t.all(func(s *live) bool {
		s.mu.Lock()
		if s.living() {
			out = append(out, s.rec.Record(s.key).Summary())
		}
		s.mu.Unlock()
		return true
	})
	slices.SortFunc(out, func(a, b session.Summary) int {
		return cmp.Or(b.LastAccess.Compare(a.LastAccess), cmp.Compare(a.ID, b.ID))
	})
	return out[:min(len(out), max(limit, 0))]
}
