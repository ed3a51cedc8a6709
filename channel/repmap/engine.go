package repmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/rpc"
)

// maxCounter bounds the counters that are believed.
const maxCounter = 1 << 62

// engine is the map of encoded keys and values.
type engine struct {
	cfg  Config
	name string
	ch   *channel.Channel
	set  channel.Settings
	log  *zap.Logger
	rpc  *rpc.RPC

	// Fixed by start.
	self   channel.UniqueID
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	undo   []func()

	mu      sync.Mutex
	state   int // 0 new, 1 running, 2 closed
	recs    [parts]map[string]*record
	digest  [parts]uint64
	live    int   // entries that are not removals
	bytes   int64 // of the values that are here
	dead    []grave
	deadAt  int // the oldest one of dead that may still be there
	tombs   int
	members map[channel.UniqueID]channel.Member // the view
	peers   map[channel.UniqueID]bool           // of them, those with this map
	tribes  map[channel.UniqueID]channel.Member // of them, Tribes' maps
	pulls   map[channel.UniqueID]bool           // to be compared with; true if asked before in vain
	review  bool
	ready   chan struct{}
	isReady bool

	kick    chan struct{} // capacity 1
	changes changes

	puts, unchanged, fetches, conflicts, promotions, chunks, transferred, lost, droppedTombs, foreign *channel.Counter
	refused                                                                                           map[string]*channel.Counter
}

// grave is a removal, in the order in which they are forgotten.
type grave struct {
	key   string
	stamp stamp
}

func newEngine(ch *channel.Channel, name string, c Config, s channel.Settings) (*engine, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	e := &engine{cfg: c, name: name, ch: ch, set: s, log: s.Logger, kick: make(chan struct{}, 1), ready: make(chan struct{}),
		members: map[channel.UniqueID]channel.Member{}, peers: map[channel.UniqueID]bool{},
		tribes: map[channel.UniqueID]channel.Member{}, pulls: map[channel.UniqueID]bool{}}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	for i := range e.recs {
		e.recs[i] = map[string]*record{}
	}
	count := func(n, help string) *channel.Counter { return s.Metrics.Counter(n, help, "map", name) }
	e.puts = count("repmap_writes_total", "Entries written or removed here.")
	e.unchanged = count("repmap_unchanged_total", "Writes of what was there already, which were not sent.")
	e.fetches = count("repmap_fetches_total", "Values fetched from another member for a reader.")
	e.conflicts = count("repmap_conflicts_total", "Records written here that a write elsewhere at the same time has replaced.")
	e.promotions = count("repmap_promotions_total", "Entries of a member that has gone that were taken over.")
	e.chunks = count("repmap_transfer_chunks_total", "Messages of state transfers received.")
	e.transferred = count("repmap_transferred_values_total", "Values received by state transfers.")
	e.lost = count("repmap_lost_total", "Entries forgotten because all members that had the value are gone.")
	e.droppedTombs = count("repmap_tombstones_dropped_total", "Removals forgotten early because there were too many.")
	e.foreign = count("repmap_tribes_messages_total", "Messages of Tribes' maps received.")
	e.refused = map[string]*channel.Counter{}
	for _, why := range []string{"malformed", "too_large", "full", "kind"} {
		e.refused[why] = s.Metrics.Counter("repmap_refused_total", "Messages and records that were refused.", "map", name, "reason", why)
	}
	e.changes.init(c.MaxChanges, count("repmap_changes_missed_total", "Changes that listeners were not told, because they were too slow."))
	if s.Metrics != nil {
		s.Metrics.Gauge("repmap_entries", "Entries known.", func() float64 { n, _ := e.size(); return float64(n) }, "map", name)
		s.Metrics.Gauge("repmap_tombstones", "Removals remembered.", func() float64 { _, n := e.size(); return float64(n) }, "map", name)
	}
	return e, nil
}

func (e *engine) size() (live, tombs int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.live, e.tombs
}

func (e *engine) start(ctx context.Context) error {
	e.mu.Lock()
	was := e.state
	if was == 0 {
		e.state = 1
	}
	e.mu.Unlock()
	if was != 0 {
		return fmt.Errorf("repmap: start %q: %w", e.name, channel.ErrClosed)
	}
	e.self = e.ch.Local().ID
	rc := rpc.DefaultConfig()
	rc.MaxReply = e.cfg.MaxValue + e.cfg.MaxKey + e.cfg.ChunkBytes + 1<<20
	rc.Dialect = e.cfg.Dialect
	r, err := rpc.New(e.ch, e.name, e.serve, rc, e.set)
	if err != nil {
		e.mu.Lock()
		e.state = 2
		e.mu.Unlock()
		return fmt.Errorf("repmap: start %q: %w", e.name, err)
	}
	e.rpc = r
	e.wg.Go(func() { e.changes.run(e.ctx) })
	if e.cfg.Tribes {
		e.undo = append(e.undo, e.ch.Listen(channel.ListenerFunc(e.hear)))
	}
	e.undo = append(e.undo, e.ch.Watch(e.watch))
	e.wg.Go(e.keep)
	return nil
}

// close tells the others, and ends everything.
func (e *engine) close(ctx context.Context) error {
	e.mu.Lock()
	was := e.state
	e.state = 2
	e.mu.Unlock()
	if was == 1 {
		b, err := encode(&message{Op: opStop, Lazy: e.cfg.Lazy})
		if to := e.natives(); err == nil && len(to) > 0 {
			_, _ = e.rpc.Call(ctx, to, rpc.Bytes(b), rpc.None, channel.SendAck)
		}
		e.tellTribes(ctx, tribesStop)
	}
	e.cancel()
	for _, f := range e.undo {
		f()
	}
	e.undo = nil
	e.wg.Wait()
	if was == 1 {
		return e.rpc.Close(ctx)
	}
	return nil
}

// watch notes who is in the group.
func (e *engine) watch(v channel.View, _ channel.MemberEvent) {
	e.mu.Lock()
	for id := range e.members {
		if _, ok := v.Get(id); !ok {
			delete(e.members, id)
			delete(e.peers, id)
			delete(e.tribes, id)
			delete(e.pulls, id)
			e.review = true
		}
	}
	for _, m := range v.Members {
		if _, known := e.members[m.ID]; !known {
			e.pulls[m.ID] = false
		}
		e.members[m.ID] = m
	}
	e.mu.Unlock()
	e.wake()
}

func (e *engine) wake() {
	select {
	case e.kick <- struct{}{}:
	default:
	}
}

// natives returns the other Longhouse nodes that have the map.
func (e *engine) natives() (to []channel.Member) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for id := range e.peers {
		if _, java := e.tribes[id]; !java {
			to = append(to, e.members[id])
		}
	}
	return to
}

// Of all that follows until the next such line, e.mu is held.

func (e *engine) get(key string) *record { return e.recs[partOf(key)][key] }

// put replaces the record of its key. Records are never changed once they are
// in the map.
func (e *engine) put(r *record) {
	p := partOf(r.Key)
	old := e.recs[p][r.Key]
	if old != nil {
		e.digest[p] -= old.hash()
		e.count(old, -1)
	}
	e.recs[p][r.Key] = r
	e.digest[p] += r.hash()
	e.count(r, 1)
	if r.Deleted {
		e.dead = append(e.dead, grave{r.Key, r.Stamp})
		e.bury(time.Now())
	}
	e.changes.add(old, r)
}

func (e *engine) count(r *record, n int) {
	if r.Deleted {
		e.tombs += n
	} else {
		e.live += n
		e.bytes += int64(n * len(r.Value))
	}
}

// fits reports whether there is room for a value in place of old, or nil.
func (e *engine) fits(old *record, value []byte) bool {
	if e.cfg.MaxBytes == 0 {
		return true
	}
	grow := len(value)
	if old != nil {
		grow -= len(old.Value)
	}
	return grow <= 0 || e.bytes+int64(grow) <= e.cfg.MaxBytes
}

// drop forgets a record.
func (e *engine) drop(r *record) {
	p := partOf(r.Key)
	e.digest[p] -= r.hash()
	e.count(r, -1)
	delete(e.recs[p], r.Key)
	if !r.Deleted {
		e.changes.add(r, nil)
	}
}

// bury forgets removals that are old, or too many.
func (e *engine) bury(now time.Time) {
	for e.deadAt < len(e.dead) {
		g := e.dead[e.deadAt]
		if r := e.get(g.key); r != nil && r.Deleted && r.Stamp == g.stamp {
			old := now.Sub(r.died) >= e.cfg.TombstoneTTL
			if !old && e.tombs <= e.cfg.MaxTombstones {
				break
			}
			if !old {
				e.droppedTombs.Inc()
			}
			e.drop(r)
		}
		e.dead[e.deadAt] = grave{}
		e.deadAt++
	}
	if e.deadAt > 1024 && e.deadAt > len(e.dead)/2 {
		e.dead, e.deadAt = append([]grave(nil), e.dead[e.deadAt:]...), 0
	}
}

// holds reports whether this node should have the value of r.
func (e *engine) holds(r *record) bool {
	return !e.cfg.Lazy || r.Stamp.Primary == e.self || slices.Contains(r.Backups, e.self)
}

// gone reports whether nobody here can reach the map of that member.
func (e *engine) gone(id channel.UniqueID) bool {
	if id == e.self {
		return false
	}
	_, ok := e.members[id]
	_, asked := e.pulls[id]
	return !ok || !asked && !e.peers[id]
}

// candidates returns the peers that may hold a value, but for except.
func (e *engine) candidates(except ...channel.UniqueID) (ids []channel.UniqueID) {
	for id := range e.peers {
		if !slices.Contains(except, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// stampNow returns the stamp of a write that follows old.
func (e *engine) stampNow(old *record) stamp {
	s := stamp{Counter: uint64(max(1, time.Now().UnixMicro())), Writer: e.self, Primary: e.self}
	if old != nil {
		s.Counter = max(s.Counter, old.Stamp.Counter+1)
	}
	return s
}

// backups chooses who backs up a record of key whose primary is this node.
func (e *engine) backups(key string, except ...channel.UniqueID) []channel.UniqueID {
	if !e.cfg.Lazy {
		return nil
	}
	if id, ok := rendezvous(key, e.candidates(except...)); ok {
		return []channel.UniqueID{id}
	}
	return nil
}

// verdict is what became of a record that was offered.
type verdict uint8

const (
	taken  verdict = iota + 1
	wanted         // taken, but its value is needed
	known
	stale
	refusedRecord
)

// merge takes a record of another member if it is newer.
func (e *engine) merge(in *record) verdict {
	if len(in.Key) > e.cfg.MaxKey || len(in.Value) > e.cfg.MaxValue || in.Stamp.Counter > maxCounter {
		e.refused["too_large"].Inc()
		return refusedRecord
	}
	cur := e.get(in.Key)
	if cur == nil {
		if in.Deleted && time.Duration(in.Age)*time.Millisecond >= e.cfg.TombstoneTTL {
			return known
		}
		if !in.Deleted && e.live >= e.cfg.MaxEntries {
			e.refused["full"].Inc()
			return refusedRecord
		}
	} else {
		switch c := in.Stamp.compare(cur.Stamp); {
		case c < 0:
			return stale
		case c == 0 && (cur.Deleted || cur.Has || !e.holds(cur)):
			return known
		case c == 0 && !in.Has:
			return wanted
		}
	}
	if in.Has && !in.Deleted && !e.fits(cur, in.Value) {
		e.refused["full"].Inc()
		return refusedRecord
	}
	r := &record{Key: in.Key, Stamp: in.Stamp, Backups: slices.Clone(in.Backups), Deleted: in.Deleted}
	switch {
	case in.Deleted:
		r.died = time.Now().Add(-time.Duration(min(in.Age, uint64(e.cfg.TombstoneTTL/time.Millisecond))) * time.Millisecond)
	case !e.holds(r):
	case in.Has:
		r.Has, r.Value = true, bytes.Clone(in.Value)
	case cur != nil && cur.Has && cur.Stamp.sameVersion(r.Stamp):
		r.Has, r.Value = true, cur.Value
	}
	if cur != nil && cur.Stamp.Writer == e.self && in.Stamp.Writer != e.self && cur.Stamp.Primary == e.self && !cur.Deleted {
		e.conflicts.Inc()
	}
	e.put(r)
	if gone := e.gone(r.Stamp.Primary); gone && !r.Deleted {
		e.review = true
	}
	if !r.Deleted && !r.Has && e.holds(r) {
		return wanted
	}
	return taken
}

// outward returns a copy of r for the wire.
func outward(r *record, value bool) record {
	out := record{Key: r.Key, Stamp: r.Stamp, Backups: r.Backups, Deleted: r.Deleted}
	if r.Deleted {
		out.Age = uint64(max(0, time.Since(r.died)/time.Millisecond))
	}
	if value && r.Has {
		out.Has, out.Value = true, r.Value
	}
	return out
}

// Of all that follows, e.mu is not held.

// checked returns an error for a key or a value that is too large.
func (e *engine) checked(key string, value []byte) error {
	switch {
	case len(key) > e.cfg.MaxKey:
		return fmt.Errorf("repmap: a key of %d bytes, see max_key: %w", len(key), channel.ErrTooLarge)
	case len(value) > e.cfg.MaxValue:
		return fmt.Errorf("repmap: a value of %d bytes, see max_value: %w", len(value), channel.ErrTooLarge)
	}
	return nil
}

// write puts a value, which it keeps.
func (e *engine) write(ctx context.Context, key string, value []byte) error {
	if err := e.checked(key, value); err != nil {
		return err
	}
	e.mu.Lock()
	if e.state != 1 {
		e.mu.Unlock()
		return fmt.Errorf("repmap: put: %w", channel.ErrClosed)
	}
	old := e.get(key)
	if old != nil && old.Has && bytes.Equal(old.Value, value) {
		e.mu.Unlock()
		e.unchanged.Inc()
		return nil
	}
	if (old == nil || old.Deleted) && e.live >= e.cfg.MaxEntries || !e.fits(old, value) {
		e.mu.Unlock()
		return ErrFull
	}
	r := &record{Key: key, Stamp: e.stampNow(old), Backups: e.backups(key), Has: true, Value: value}
	e.put(r)
	e.mu.Unlock()
	e.puts.Inc()
	return e.spread(ctx, r, true)
}

// remove writes a tombstone; it reports whether there was an entry.
func (e *engine) remove(ctx context.Context, key string) (bool, error) {
	e.mu.Lock()
	if e.state != 1 {
		e.mu.Unlock()
		return false, fmt.Errorf("repmap: delete: %w", channel.ErrClosed)
	}
	old := e.get(key)
	if old == nil || old.Deleted {
		e.mu.Unlock()
		return false, nil
	}
	r := &record{Key: key, Stamp: e.stampNow(old), Deleted: true, died: time.Now()}
	e.put(r)
	e.mu.Unlock()
	e.puts.Inc()
	return true, e.spread(ctx, r, true)
}

// spread brings a record of which this node is the primary to the others: with
// its value to those that should have it, and the place to the rest. It returns
// when the former have confirmed it. value says that they have no such value
// yet.
func (e *engine) spread(ctx context.Context, r *record, value bool) error {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.Timeout)
	defer cancel()
	return errors.Join(e.spreadTribes(ctx, r), e.spreadNative(ctx, r, value))
}

func (e *engine) spreadNative(ctx context.Context, r *record, value bool) error {
	all := e.natives()
	if !e.cfg.Lazy || r.Deleted {
		return e.confirm(ctx, all, r, value)
	}
	var tried []channel.UniqueID
	var failed error
	for {
		var rest []channel.Member
		var backup []channel.Member
		for _, m := range all {
			if slices.Contains(r.Backups, m.ID) {
				backup = append(backup, m)
			} else {
				rest = append(rest, m)
			}
		}
		if len(rest) > 0 {
			e.announce(ctx, rest, r)
		}
		if len(backup) == 0 {
			break // alone, or with Tribes' nodes that have it
		}
		err := e.confirm(ctx, backup, r, value)
		if err == nil {
			return nil
		}
		failed = errors.Join(failed, err)
		// The next one, if the record is still ours to place.
		tried = append(tried, r.Backups...)
		value = true
		e.mu.Lock()
		next := e.backups(r.Key, tried...)
		cur := e.get(r.Key)
		if cur != r || ctx.Err() != nil || len(next) == 0 {
			e.review = e.review || cur == r
			e.mu.Unlock()
			e.wake()
			return errors.Join(ErrNotReplicated, failed)
		}
		moved := *r
		moved.Stamp.Epoch++
		moved.Backups = next
		r = &moved
		e.put(r)
		e.mu.Unlock()
	}
	if failed != nil {
		return errors.Join(ErrNotReplicated, failed)
	}
	return nil
}

// announce tells the place of a record, without waiting for an answer.
func (e *engine) announce(ctx context.Context, to []channel.Member, r *record) {
	b, err := encode(&message{Op: opPut, Lazy: e.cfg.Lazy, Records: []record{outward(r, false)}})
	if err != nil {
		return
	}
	replies, err := e.rpc.Call(ctx, to, rpc.Bytes(b), rpc.None, channel.SendNone)
	if err != nil {
		e.mu.Lock()
		for _, p := range replies {
			if e.peers[p.Member.ID] {
				e.pulls[p.Member.ID] = true
			}
		}
		e.mu.Unlock()
		e.wake()
	}
}

// confirm sends a record and waits until all have taken it.
func (e *engine) confirm(ctx context.Context, to []channel.Member, r *record, value bool) error {
	if len(to) == 0 {
		return nil
	}
	return e.offer(ctx, to, []*record{r}, value)
}

// offer sends records and waits until all have taken them; who says that it
// needs values gets them.
func (e *engine) offer(ctx context.Context, to []channel.Member, recs []*record, value bool) error {
	q := &message{Op: opPut, Lazy: e.cfg.Lazy}
	for _, r := range recs {
		q.Records = append(q.Records, outward(r, value))
	}
	b, err := encode(q)
	if err != nil {
		return err
	}
	replies, _ := e.rpc.Call(ctx, to, rpc.Bytes(b), rpc.All, channel.SendAck)
	answered := map[channel.UniqueID]bool{}
	var errs []error
	for _, p := range replies {
		answered[p.Member.ID] = true
		if errors.Is(p.Err, rpc.ErrAbsent) || errors.Is(p.Err, rpc.ErrGone) {
			e.forget(p.Member.ID)
			if e.cfg.Lazy && !recs[0].Deleted {
				errs = append(errs, fmt.Errorf("%v: %w", p.Member, p.Err))
			}
			continue
		}
		if p.Err != nil {
			errs = append(errs, fmt.Errorf("%v: %w", p.Member, p.Err))
			e.later(p.Member.ID)
			continue
		}
		m, err := decode(p.Body.Bytes)
		if err != nil {
			errs = append(errs, fmt.Errorf("%v: %w", p.Member, err))
			continue
		}
		e.take(m.Records) // what is newer there
		if len(m.Keys) > 0 && !value {
			var need []*record
			for _, r := range recs {
				if slices.Contains(m.Keys, r.Key) && r.Has {
					need = append(need, r)
				}
			}
			if len(need) > 0 {
				if err := e.offer(ctx, []channel.Member{p.Member}, need, true); err != nil {
					errs = append(errs, err)
				}
			}
		}
	}
	for _, m := range to {
		if !answered[m.ID] {
			errs = append(errs, fmt.Errorf("%v: %w", m, context.DeadlineExceeded))
			e.later(m.ID)
		}
	}
	if len(errs) > 0 {
		return errors.Join(append([]error{ErrNotReplicated}, errs...)...)
	}
	return nil
}

// take merges records.
func (e *engine) take(recs []record) {
	e.mu.Lock()
	for i := range recs {
		e.merge(&recs[i])
	}
	review := e.review
	e.mu.Unlock()
	if review {
		e.wake()
	}
}

// forget notes that a member has no such map any more.
func (e *engine) forget(id channel.UniqueID) {
	e.mu.Lock()
	if e.peers[id] {
		delete(e.peers, id)
		e.review = true
	}
	delete(e.pulls, id)
	e.mu.Unlock()
	e.wake()
}

// absent takes the word of a member, asked by compare, that it has no such map.
// One that has said otherwise meanwhile is noted for another comparison, and
// not forgotten: the two messages may have overtaken each other.
func (e *engine) absent(id channel.UniqueID) {
	e.mu.Lock()
	_, again := e.pulls[id]
	if !again {
		delete(e.tribes, id)
	}
	e.mu.Unlock()
	if !again {
		e.forget(id)
	}
}

// later notes that the map should be compared with that of a member.
func (e *engine) later(id channel.UniqueID) {
	e.mu.Lock()
	if _, ok := e.members[id]; ok {
		e.pulls[id] = true
	}
	e.mu.Unlock()
	e.wake()
}

// read returns the value of a key, from another member if it is not here.
func (e *engine) read(ctx context.Context, key string) (value []byte, ok bool, err error) {
	e.mu.Lock()
	r := e.get(key)
	e.mu.Unlock()
	if r == nil || r.Deleted {
		return nil, false, nil
	}
	if r.Has {
		return r.Value, true, nil
	}
	e.fetches.Inc()
	ctx, cancel := context.WithTimeout(ctx, e.cfg.Timeout)
	defer cancel()
	got, err := e.fetch(ctx, r)
	if err != nil || got == nil || got.Deleted {
		return nil, false, err
	}
	return got.Value, true, nil
}

// fetch asks those who have the value of r, one after the other.
func (e *engine) fetch(ctx context.Context, r *record) (*record, error) {
	q, err := encode(&message{Op: opGet, Lazy: e.cfg.Lazy, Keys: []string{r.Key}})
	if err != nil {
		return nil, err
	}
	holders := append([]channel.UniqueID{r.Stamp.Primary}, r.Backups...)
	if !e.cfg.Lazy {
		e.mu.Lock()
		holders = append(holders, e.candidates(holders...)...)
		e.mu.Unlock()
	}
	var errs []error
	for _, id := range holders {
		e.mu.Lock()
		m, ok := e.members[id]
		_, java := e.tribes[id]
		e.mu.Unlock()
		if !ok {
			continue
		}
		if java {
			if v, err := e.fetchTribes(ctx, m, r.Key); err != nil {
				errs = append(errs, err)
			} else if v != nil {
				return &record{Key: r.Key, Stamp: r.Stamp, Backups: r.Backups, Has: true, Value: v}, nil
			}
			continue
		}
		replies, err := e.rpc.Call(ctx, []channel.Member{m}, rpc.Bytes(q), rpc.First, channel.SendNone)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		answer, err := decode(replies[0].Body.Bytes)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for i := range answer.Records {
			if x := &answer.Records[i]; x.Key == r.Key && (x.Has || x.Deleted) {
				return x, nil
			}
		}
	}
	return nil, errors.Join(append([]error{ErrUnavailable}, errs...)...)
}

// claim makes this node the primary of a key, and returns its value.
func (e *engine) claim(ctx context.Context, key string) ([]byte, bool, error) {
	for range 3 {
		e.mu.Lock()
		r := e.get(key)
		e.mu.Unlock()
		if r == nil || r.Deleted {
			return nil, false, nil
		}
		if r.Stamp.Primary == e.self && r.Has {
			return r.Value, true, nil
		}
		from := r
		if !r.Has {
			e.fetches.Inc()
			fctx, cancel := context.WithTimeout(ctx, e.cfg.Timeout)
			got, err := e.fetch(fctx, r)
			cancel()
			if err != nil {
				return nil, false, err
			}
			from = got
		}
		e.mu.Lock()
		if cur := e.get(key); cur != r || from.Deleted || !from.Stamp.sameVersion(r.Stamp) {
			e.mu.Unlock() // it has changed meanwhile
			e.take([]record{*from})
			continue
		}
		s := r.Stamp
		s.Epoch++
		s.Primary = e.self
		next := &record{Key: key, Stamp: s, Has: true, Value: bytes.Clone(from.Value)}
		for _, id := range r.Backups {
			if id != e.self && e.peers[id] {
				next.Backups = append(next.Backups, id)
			}
		}
		if len(next.Backups) == 0 {
			next.Backups = e.backups(key)
		}
		e.put(next)
		e.mu.Unlock()
		return next.Value, true, e.spread(ctx, next, false)
	}
	return nil, false, fmt.Errorf("repmap: claim: the entry keeps moving: %w", ErrUnavailable)
}
