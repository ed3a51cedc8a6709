package stored

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Manager implements core.Manager around a store.
type Manager struct {
	cfg     Config
	store   core.Store
	sweeper core.StoreSweeper // nil if the store needs none
	log     *zap.Logger
	now     func() time.Time

	saved, conflicts, retries, damaged, unsaved, refused, strays *channel.Counter

	host core.ManagerHost
	ctx  context.Context // ends when Stop gives up
	end  context.CancelFunc
	work sync.WaitGroup

	mu      sync.Mutex
	changed sync.Cond // of mu: less is pending, or closed
	todo    sync.Cond // of mu: something for the writers, or closed
	tell    sync.Cond // of mu: something for the notifier, or closed
	live    map[session.Key]*entry
	ready   []*entry // to be written, in order
	later   []*entry // to be written when due; the delay is constant, so in order
	pending int      // entries that have a change that is not stored
	bytes   int64
	merged  int64 // attributes that two nodes had changed independently
	// disputes are the latest of them.
	disputes session.Conflicts
	members  []channel.Member
	notice   notices
	telling  bool // a notice is being sent
	loading  map[session.Key]*flight
	aside    map[channel.UniqueID]bool // members that did not answer
	down     outage
	calls    int       // calls of the store that run now
	quiet    time.Time // if calls > 0: since when none of them was answered
	met      bool      // the store has answered once
	started  bool
	closed   bool
	refresh  bool     // a refresh is running
	again    bool     // and is to be repeated
	lost     bool     // the host is to give its sessions again
	resyncs  bool     // a goroutine sees to that
	orphans  []*entry // those that wait for it
}

// flight is a session that is being read from the store.
type flight struct {
	readers int
	// changes counts what happened to the session meanwhile, so that what was
	// read may be old.
	changes int
}

// entry is one session that this node's table has live, or that has a change
// which is not stored yet. Its fields are guarded by Manager.mu.
type entry struct {
	key session.Key
	// rep is what the store had when it was last read or written.
	rep *session.Replica
	// ended is the tombstone of a session that the store knows to have ended.
	ended *session.Record
	// version is the state of the store's item, valid if known.
	version core.StoreVersion
	// change is what the store does not have yet, writing the part of it that a
	// worker writes at present.
	change, writing *session.Record
	due             time.Time
	waiting         []*commit
	turns           int // turns of a writer that ended with nothing but conflicts
	known           bool
	queued          bool
	held            bool // the table has the session, as far as we know
	orphan          bool // the store has no whole session to put the change on
	refused         bool // the store did not take the last change
}

// outage is what is known of a store that fails.
type outage struct {
	since time.Time // zero: it works
	err   error
	retry time.Time
	pause time.Duration
	probe bool // one attempt is running
	write bool // a write has failed, so that only a write shows that it works again
}

// commit is one call of Commit that waits.
type commit struct {
	left  int
	err   error
	done  chan struct{}
	level core.Level
}

// settle says that one of its sessions is done; Manager.mu is held.
func (c *commit) settle(err error) {
	if c.err == nil {
		c.err = err
	}
	if c.left--; c.left == 0 {
		close(c.done)
	}
}

// New makes a manager around a store, which it closes in the end. It has no
// side effect but registering metrics.
func New(c Config, store core.Store, s channel.Settings) (*Manager, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	log := s.Logger
	if log == nil {
		log = zap.NewNop()
	}
	m := &Manager{
		cfg: c, log: log, now: time.Now, live: map[session.Key]*entry{}, aside: map[channel.UniqueID]bool{}, loading: map[session.Key]*flight{},
		saved:     s.Metrics.Counter("store_saved_total", "Sessions written to the store."),
		conflicts: s.Metrics.Counter("store_conflicts_total", "Writes that met a change by another node and were merged."),
		retries:   s.Metrics.Counter("store_failures_total", "Calls of the store that failed and are repeated."),
		damaged:   s.Metrics.Counter("store_damaged_total", "Stored sessions that could not be trusted."),
		unsaved:   s.Metrics.Counter("store_unsaved_total", "Waiting requests that went on although the store had failed."),
		refused:   s.Metrics.Counter("store_refused_total", "Sessions that the store did not take, because they are too large for example."),
		strays:    s.Metrics.Counter("store_bad_messages_total", "Messages of other nodes that could not be read."),
	}
	m.store = &watched{store, m}
	m.sweeper, _ = store.(core.StoreSweeper)
	m.changed.L, m.todo.L, m.tell.L = &m.mu, &m.mu, &m.mu
	m.ctx, m.end = context.WithCancel(context.Background())
	s.Metrics.Gauge("store_pending", "Sessions with changes that are not stored yet.", func() float64 {
		m.mu.Lock()
		defer m.mu.Unlock()
		return float64(m.pending)
	})
	return m, nil
}

// Start implements core.Manager.
func (m *Manager) Start(_ context.Context, host core.ManagerHost) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.started || m.closed {
		return errors.New("stored: started twice")
	}
	m.host, m.started = host, true
	for range m.cfg.Parallel {
		m.work.Go(m.writer)
	}
	m.work.Go(m.notifier)
	m.work.Go(m.keeper)
	return nil
}

// Commit implements core.Manager.
func (m *Manager) Commit(ctx context.Context, batch []byte, level core.Level) error {
	var call *commit
	if level > core.Async {
		call = &commit{level: level, left: 1, done: make(chan struct{})}
	}
	var d session.Decoder
	for d.Reset(batch); d.Next(); {
		if err := m.take(ctx, d.Record().Clone(), call); err != nil {
			return err
		}
	}
	if err := d.Err(); err != nil {
		return err
	}
	if call == nil {
		return nil
	}
	m.mu.Lock()
	call.left-- // it was one more, so that it could not end while it was filled
	over := call.left == 0
	m.mu.Unlock()
	if over {
		return call.err
	}
	for {
		left, err := m.patience()
		if left <= 0 {
			return err
		}
		timer := time.NewTimer(left)
		select {
		case <-call.done:
			timer.Stop()
			return call.err
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("stored: waiting for the store: %w", ctx.Err())
		case <-m.ctx.Done():
			timer.Stop()
			select {
			case <-call.done:
				return call.err
			default:
				return channel.ErrClosed
			}
		}
	}
}

// patience returns how long a request may wait from now on before it has to look
// again. Nobody waits for a store that fails, or has not answered to anything,
// for longer than Grace; then the time is 0 or less, and the error is what the
// request gets.
func (m *Manager) patience() (time.Duration, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now, err := m.now(), error(nil)
	since := now // it works
	switch {
	case !m.down.since.IsZero():
		since, err = m.down.since, m.down.err
	case m.calls > 0:
		since, err = m.quiet, errSilent
	}
	left := since.Add(m.cfg.Grace).Sub(now)
	switch {
	case left > 0:
		return left, nil
	case m.cfg.OnFailure == Fail:
		return left, fmt.Errorf("stored: the store fails: %w", err)
	}
	m.unsaved.Inc()
	return left, nil
}

// errSilent: calls of the store run, and none is answered.
var errSilent = errors.New("it does not answer")

// watched is a store of which it is known when it has answered last.
type watched struct {
	core.Store
	m *Manager
}

func (w *watched) begin() {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	if w.m.calls == 0 {
		w.m.quiet = w.m.now()
	}
	w.m.calls++
}

func (w *watched) end(err error) {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	w.m.calls--
	if err == nil || errors.Is(err, core.ErrStoreConflict) || errors.Is(err, core.ErrStoreCorrupt) || errors.Is(err, core.ErrStoreRefused) {
		w.m.quiet = w.m.now()
	}
}

func (w *watched) Load(ctx context.Context, key session.Key) (it core.StoreItem, ok bool, err error) {
	w.begin()
	defer func() { w.end(err) }()
	return w.Store.Load(ctx, key)
}

func (w *watched) Save(ctx context.Context, key session.Key, it core.StoreItem, prev core.StoreVersion) (v core.StoreVersion, err error) {
	w.begin()
	defer func() { w.end(err) }()
	return w.Store.Save(ctx, key, it, prev)
}

func (w *watched) Touch(ctx context.Context, key session.Key, expires time.Time) (err error) {
	w.begin()
	defer func() { w.end(err) }()
	return w.Store.Touch(ctx, key, expires)
}

// take makes a change pending.
func (m *Manager) take(ctx context.Context, r *session.Record, call *commit) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.live[r.Key]
	for (e == nil || e.change == nil) && m.pending >= m.cfg.MaxPending && !m.closed {
		if err := m.wait(ctx); err != nil {
			return fmt.Errorf("stored: %w: %d sessions wait to be stored (%w)", channel.ErrQueueFull, m.cfg.MaxPending, err)
		}
		e = m.live[r.Key]
	}
	if m.closed {
		return channel.ErrClosed
	}
	if e == nil {
		// A session that begins here is in no store; if it is, that will be a conflict.
		e = &entry{key: r.Key, known: r.Created != 0}
		m.live[r.Key] = e
	}
	e.held = r.End == session.Living
	switch {
	case e.change != nil:
		m.note(e.change, r)
	default:
		e.change = r
		if e.writing == nil {
			m.pending++
		}
	}
	if r.Created != 0 {
		e.orphan = false
	}
	if call != nil {
		call.left++
		e.waiting = append(e.waiting, call)
	}
	m.enqueue(e, call != nil || m.cfg.Delay == 0 || r.End != session.Living)
	return nil
}

// enqueue puts e into the queue of those that are to be written; mu is held.
func (m *Manager) enqueue(e *entry, now bool) {
	switch {
	case e.writing != nil || e.orphan: // the worker, or the whole session, brings it back
	case now:
		if !e.queued || !e.due.IsZero() { // the queue of those that wait skips it then
			e.queued, e.due = true, time.Time{}
			m.ready = append(m.ready, e)
		}
	case !e.queued:
		e.queued, e.due = true, m.now().Add(m.cfg.Delay)
		m.later = append(m.later, e)
	}
	m.todo.Signal()
}

// wait waits for a change of the manager's state, or until ctx ends; mu is held.
func (m *Manager) wait(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.changed.Broadcast()
	})
	defer stop()
	if err := ctx.Err(); err != nil {
		return err
	}
	m.changed.Wait()
	return ctx.Err()
}

// waitUntil waits for something to do, or until t; mu is held.
func (m *Manager) waitUntil(t time.Time) {
	timer := time.AfterFunc(t.Sub(m.now()), func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.todo.Broadcast()
	})
	defer timer.Stop()
	m.todo.Wait()
}

// call bounds one call of the store.
func (m *Manager) call() (context.Context, context.CancelFunc) {
	return context.WithTimeout(m.ctx, m.cfg.Timeout)
}

// Load implements core.Manager.
func (m *Manager) Load(ctx context.Context, key session.Key) (*session.Record, error) {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	rec, version, err := m.fresh(ctx, key)
	if m.closed {
		return nil, channel.ErrClosed
	}
	e := m.live[key]
	if err != nil {
		m.failed(err, false)
		if whole := e.whole(); whole != nil {
			return visible(whole, m.now(), m.cfg.ExpireSlack), nil
		}
		return nil, err
	}
	m.works(false)
	switch {
	case e != nil:
		m.learn(e, rec, version)
	case rec == nil || rec.End != session.Living:
		return rec, nil
	default:
		e = &entry{key: key}
		m.live[key] = e
		m.learn(e, rec, version)
	}
	whole := visible(e.whole(), m.now(), m.cfg.ExpireSlack)
	switch {
	case whole != nil && whole.End == session.Living:
		e.held = true
	case e.change == nil && e.writing == nil:
		m.forget(e)
	}
	return whole, nil
}

// fresh reads a session from the store, and again if this node has written it
// or heard of a change meanwhile. Manager.mu is held, but not while it reads.
func (m *Manager) fresh(ctx context.Context, key session.Key) (rec *session.Record, version core.StoreVersion, err error) {
	f := m.loading[key]
	if f == nil {
		f = &flight{}
		m.loading[key] = f
	}
	f.readers++
	for {
		before := f.changes
		m.mu.Unlock()
		rec, version, err = m.read(ctx, key)
		m.mu.Lock()
		if err != nil || f.changes == before {
			break
		}
	}
	if f.readers--; f.readers == 0 {
		delete(m.loading, key)
	}
	return rec, version, err
}

// happened tells those who read the session that they may have read an old
// state, and reports whether there are any; mu is held.
func (m *Manager) happened(key session.Key) bool {
	f := m.loading[key]
	if f != nil {
		f.changes++
	}
	return f != nil
}

// whole returns everything that is known of the session, stored or not; nil if
// that is not a whole session.
func (e *entry) whole() *session.Record {
	if e == nil {
		return nil
	}
	r := &session.Record{Key: e.key}
	switch {
	case e.ended != nil:
		r.Merge(e.ended)
	case e.rep != nil:
		r = e.rep.Record(e.key)
	}
	for _, change := range []*session.Record{e.writing, e.change} {
		if change != nil {
			r.Merge(change.Share())
		}
	}
	if r.Created == 0 && r.End == session.Living {
		return nil
	}
	return r
}

// visible returns r if there is something to see for a node: a living session
// that has not expired, or one that goes on under another id.
func visible(r *session.Record, now time.Time, slack time.Duration) *session.Record {
	switch {
	case r == nil:
		return nil
	case r.End == session.Renewed:
		return r
	case r.End != session.Living:
		return nil
	case r.MaxInactive > 0 && now.Sub(time.UnixMilli(r.LastAccess)) > r.MaxInactive+slack:
		return nil
	}
	return r
}

// learn takes over what the store has: nil for nothing; mu is held.
func (m *Manager) learn(e *entry, r *session.Record, version core.StoreVersion) {
	e.version, e.known = version, true
	if e.rep != nil {
		m.bytes -= int64(e.rep.Size())
	}
	switch {
	case r == nil:
		// What it had before may come back with the next whole change only.
		e.rep, e.ended = nil, nil
	case r.End != session.Living:
		e.rep, e.ended = nil, r
	default:
		if e.rep == nil {
			e.rep = &session.Replica{}
		}
		e.rep.Merge(r)
	}
	if e.rep != nil {
		m.bytes += int64(e.rep.Size())
	}
}

// listedConflicts bounds the conflicts that Status lists.
const listedConflicts = 100

// conflict is what session.Record.MergeEach tells.
type conflict struct {
	attribute  string
	kept, lost session.Entry
}

// dispute counts and lists a conflict; mu is held.
func (m *Manager) dispute(key session.Key, c conflict) {
	m.merged++
	m.disputes.Add(key, c.attribute, c.kept, c.lost, m.now().UnixMilli())
}

// note merges other into r, a change of the same session; mu is held.
func (m *Manager) note(r, other *session.Record) {
	r.MergeEach(other, func(name string, kept, lost session.Entry) {
		m.dispute(r.Key, conflict{name, kept, lost})
	})
}

// forget removes an entry; mu is held.
func (m *Manager) forget(e *entry) {
	if e.rep != nil {
		m.bytes -= int64(e.rep.Size())
	}
	delete(m.live, e.key)
}

// read returns what the store has of a session, nil for nothing.
func (m *Manager) read(ctx context.Context, key session.Key) (*session.Record, core.StoreVersion, error) {
	item, ok, err := m.store.Load(ctx, key)
	if err == nil && !ok {
		return nil, "", nil
	}
	var rec *session.Record
	if err == nil {
		err = session.DecodeBatch(item.Data, func(r *session.Record) error {
			if r.Key != key || rec != nil {
				return session.ErrBadRecord
			}
			rec = r.Clone()
			return nil
		})
		if rec == nil && err == nil {
			err = session.ErrBadRecord
		}
	}
	if errors.Is(err, session.ErrBadRecord) || errors.Is(err, core.ErrStoreCorrupt) {
		m.damaged.Inc()
		m.log.Warn("stored session is damaged and taken for absent; the next whole change replaces it",
			zap.String("session", session.Prefix(key.ID)), zap.String("context", key.Context), zap.Error(err))
		// It is not removed: a node that has another secret, or an older
		// version of this program, would remove what is good.
		if errors.Is(err, session.ErrBadRecord) {
			return nil, item.Version, nil
		}
		return nil, "", nil
	}
	if err != nil {
		return nil, "", fmt.Errorf("stored: load: %w", err)
	}
	if rec.End == session.Living && rec.MaxInactive > 0 && !item.Expires.IsZero() {
		// A touch has moved the expiry only.
		last := min(item.Expires.Add(-rec.MaxInactive-m.cfg.ExpireSlack).UnixMilli(), m.now().UnixMilli())
		rec.LastAccess = max(rec.LastAccess, last)
	}
	return rec, item.Version, nil
}

// Release implements core.Manager.
func (m *Manager) Release(_ context.Context, keys []session.Key) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	waiting := 0
	for _, k := range keys {
		if e := m.live[k]; e != nil && (e.change != nil || e.writing != nil || e.refused) {
			waiting++
		}
	}
	if waiting > 0 {
		return fmt.Errorf("stored: %d of %d sessions are not in the store yet", waiting, len(keys))
	}
	for _, k := range keys {
		if e := m.live[k]; e != nil {
			m.forget(e)
		}
	}
	return nil
}

// HandleView implements core.Manager.
func (m *Manager) HandleView(_ context.Context, v channel.View) {
	m.mu.Lock()
	before := m.members
	m.members = slices.Clone(v.Members)
	joined := slices.ContainsFunc(m.members, func(a channel.Member) bool {
		return !slices.ContainsFunc(before, a.Is)
	})
	for id := range m.aside {
		if !slices.ContainsFunc(m.members, func(a channel.Member) bool { return a.ID == id }) {
			delete(m.aside, id)
		}
	}
	left := slices.ContainsFunc(before, func(a channel.Member) bool {
		return !slices.ContainsFunc(m.members, a.Is)
	})
	m.mu.Unlock()
	// Members that could not talk to each other have not told each other what
	// they changed, and one that has died may not have told its last changes.
	if joined || left {
		m.refreshAll()
	}
}

// Status implements core.Manager.
func (m *Manager) Status(context.Context) (core.ManagerStatus, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	// A node that has never reached the store cannot know whose sessions it
	// would refuse.
	st := core.ManagerStatus{
		Ready: m.met, Sessions: len(m.live), Bytes: m.bytes, Conflicts: m.merged,
		LatestConflicts: m.disputes.List(listedConflicts),
	}
	switch {
	case !m.down.since.IsZero():
		st.State = fmt.Sprintf("the store has failed since %s (%v); %d sessions wait to be stored",
			m.down.since.Format(time.TimeOnly), m.down.err, m.pending)
	case !m.met:
		st.State = "the store is asked for the first time"
	default:
		st.State = fmt.Sprintf("the store works; %d sessions wait to be stored", m.pending)
	}
	return st, nil
}

// Keys implements core.Manager.
func (m *Manager) Keys(ctx context.Context, limit int) ([]session.Summary, error) {
	m.mu.Lock()
	out := make([]session.Summary, 0, min(limit, len(m.live)))
	have := make(map[session.Key]bool, len(m.live))
	for k, e := range m.live {
		if len(out) >= limit {
			break
		}
		if r := visible(e.whole(), m.now(), m.cfg.ExpireSlack); r != nil && r.End == session.Living {
			have[k] = true
			out = append(out, r.Summary())
		}
	}
	m.mu.Unlock()
	if left := limit - len(out); left > 0 {
		ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
		defer cancel()
		var keys []session.Key
		err := m.store.List(ctx, limit, func(k session.Key) {
			if !have[k] && len(keys) < left {
				keys = append(keys, k)
			}
		})
		if err != nil && !errors.Is(err, core.ErrStoreCannotList) {
			return out, fmt.Errorf("stored: list: %w", err)
		}
		for _, k := range keys {
			rec, _, err := m.read(ctx, k)
			if err != nil {
				return out, err
			}
			if rec = visible(rec, m.now(), m.cfg.ExpireSlack); rec != nil && rec.End == session.Living {
				out = append(out, rec.Summary())
			}
		}
	}
	return out, nil
}

// Stop implements core.Manager.
func (m *Manager) Stop(ctx context.Context) error {
	m.mu.Lock()
	if !m.started {
		first := !m.closed
		m.closed = true
		m.mu.Unlock()
		m.end()
		if first {
			return m.store.Close()
		}
		return nil
	}
	var err error
	for !m.closed && (m.pending > 0 || len(m.notice.buf) > 0 || m.telling) && err == nil {
		err = m.wait(ctx)
	}
	first, left := !m.closed, m.pending
	m.closed = true
	m.changed.Broadcast()
	m.todo.Broadcast()
	m.tell.Broadcast()
	m.mu.Unlock()
	m.end()
	m.work.Wait()
	if !first {
		return nil
	}
	if err != nil && left > 0 {
		err = fmt.Errorf("stored: %d sessions could not be stored before the end: %w", left, err)
	}
	return errors.Join(err, m.store.Close())
}

var _ core.Manager = (*Manager)(nil)
