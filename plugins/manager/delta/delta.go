package delta

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// workers serve the requests of other members, jobQueue bounds how many of
	// them wait; more are refused, and asked again later.
	workers  = 4
	jobQueue = 256
	// sendTimeout bounds one message of an exchange.
	sendTimeout = 30 * time.Second
	// sweepEvery and sweepShards make a full round in 64 s.
	sweepEvery  = time.Second
	sweepShards = 4
)

var (
	errStopped = errors.New("delta: not running")
	errAlone   = errors.New("delta: no other member is known to have a copy")
	errBusy    = errors.New("delta: too many requests of other members are waiting")
)

var decoders = sync.Pool{New: func() any { return new(session.Decoder) }}

// Manager implements core.Manager.
type Manager struct {
	cfg     Config
	log     *zap.Logger
	store   *store
	m       metrics
	buffers sync.Pool // of *bytes.Buffer
	jobs    chan func()
	kick    chan struct{} // wakes run; capacity 1

	ctx    context.Context // ends with Stop
	cancel context.CancelFunc
	wg     sync.WaitGroup

	received atomic.Int64 // sessions that came by the first state transfer
	readyCh  chan struct{}

	mu        sync.Mutex
	host      core.ManagerHost // nil until Start
	stopped   bool
	view      channel.View
	changed   chan struct{} // closed and replaced with every view
	peers     map[channel.UniqueID]*peer
	exchanges map[uint64]*exchange
	fetches   map[uint64]*fetch
	ready     bool
	state     string
	transfer  time.Duration
}

type metrics struct {
	malformed, faults, failures, exchanges, repairs, busy *channel.Counter
}

// New makes a manager; it has no side effect but registering metrics.
func New(c Config, s channel.Settings) (*Manager, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("delta: %w", err)
	}
	m := &Manager{
		cfg: c, log: s.Logger, store: newStore(c),
		jobs: make(chan func(), jobQueue), kick: make(chan struct{}, 1),
		readyCh: make(chan struct{}), changed: make(chan struct{}),
		peers: map[channel.UniqueID]*peer{}, exchanges: map[uint64]*exchange{}, fetches: map[uint64]*fetch{},
		state: "not started",
	}
	m.buffers.New = func() any { return new(bytes.Buffer) }
	if m.log == nil {
		m.log = zap.NewNop()
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.register(s)
	return m, nil
}

func (m *Manager) register(s channel.Settings) {
	counter := func(name, help string) *channel.Counter {
		return s.Metrics.Counter("delta_"+name+"_total", help, "manager", s.Name)
	}
	m.m = metrics{
		malformed: counter("malformed", "messages and batches that could not be read"),
		faults:    counter("faults", "members that a change could not be sent to"),
		failures:  counter("exchange_failures", "exchanges with another member that failed"),
		exchanges: counter("exchanges", "complete exchanges with another member"),
		repairs:   counter("repairs", "sessions asked for because only a change of them was known"),
		busy:      counter("busy", "requests of other members refused because too many were waiting"),
	}
	for _, g := range []struct {
		name, help string
		v          *atomic.Int64
	}{
		{"sessions", "sessions held for all nodes", &m.store.sessions},
		{"tombstones", "ended sessions remembered", &m.store.tombstones},
		{"bytes", "names and values of all attributes", &m.store.bytes},
		{"conflicts", "attributes changed on two nodes independently, since start", &m.store.conflicts},
		{"replicas_expired", "replicas dropped because nobody used them, since start", &m.store.expired},
		{"tombstones_early", "tombstones forgotten early because of max_tombstones, since start", &m.store.early},
		{"sessions_refused", "changes refused because of max_sessions, since start", &m.store.refused},
		{"access_in_future", "access times ahead of the clock, since start", &m.store.future},
	} {
		s.Metrics.Gauge("delta_"+g.name, g.help, func() float64 { return float64(g.v.Load()) }, "manager", s.Name)
	}
}

// Start implements core.Manager.
func (m *Manager) Start(_ context.Context, host core.ManagerHost) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped {
		return errStopped
	}
	if m.host != nil {
		return nil
	}
	m.host = host
	m.state = "looking for other members"
	m.wg.Go(m.run)
	m.wg.Go(m.sweep)
	for range workers {
		m.wg.Go(m.work)
	}
	return nil
}

// Stop implements core.Manager. Every member has every session: there is
// nothing to hand over.
func (m *Manager) Stop(context.Context) error {
	m.mu.Lock()
	m.stopped = true
	m.mu.Unlock()
	m.cancel()
	m.wg.Wait()
	return nil
}

// spawn runs f in a goroutine that Stop waits for; false before Start and after
// Stop.
func (m *Manager) spawn(f func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped || m.host == nil {
		return false
	}
	m.wg.Go(f)
	return true
}

// running returns the host and the current members.
func (m *Manager) running() (core.ManagerHost, channel.View, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.host == nil || m.stopped {
		return nil, channel.View{}, errStopped
	}
	return m.host, m.view, nil
}

// Commit implements core.Manager.
func (m *Manager) Commit(ctx context.Context, batch []byte, level core.Level) error {
	host, view, err := m.running()
	if err != nil {
		return err
	}
	if _, err := m.apply(batch, nil); err != nil {
		return err
	}
	if len(view.Members) == 0 {
		return nil
	}
	buf := m.buffers.Get().(*bytes.Buffer)
	defer m.recycle(buf)
	buf.Write(appendHeader(buf.AvailableBuffer(), kindDelta, 0))
	buf.Write(batch)
	options := [...]channel.Options{core.Async: channel.SendAsync, core.Acked: channel.SendAck, core.Synced: channel.SendSyncAck}
	if err = host.Send(ctx, view.Members, options[min(level, core.Synced)], buf.Bytes()); err == nil {
		return nil
	}
	return m.faulty(ctx, view.Members, level, err)
}

// recycle keeps a buffer for later, unless it is very large.
func (m *Manager) recycle(buf *bytes.Buffer) {
	if buf.Cap() <= 4<<20 {
		buf.Reset()
		m.buffers.Put(buf)
	}
}

// faulty deals with members that a change did not reach. They get it by an
// exchange if they stay or come back. Who waits for more than Async succeeds if
// they leave the view soon.
func (m *Manager) faulty(ctx context.Context, to []channel.Member, level core.Level, cause error) error {
	se, ok := errors.AsType[*channel.SendError](cause)
	if !ok || level == core.Async && errors.Is(cause, channel.ErrQueueFull) {
		// Nothing is wrong with the members: the host keeps the changes, merges
		// them with later ones, and tries again after a pause.
		return fmt.Errorf("delta: commit at level %s: %w", level, cause)
	}
	faults := make([]channel.Member, 0, len(se.Faults))
	for _, f := range se.Faults {
		faults = append(faults, f.Member)
	}
	m.m.faults.Add(int64(len(faults)))
	m.mu.Lock()
	for _, f := range faults {
		if p := m.peers[f.ID]; p != nil {
			p.want(latest(time.Now().Add(retryMin), p.last.Add(faultPause)))
		}
	}
	m.mu.Unlock()
	m.wake()
	if level == core.Async {
		return nil
	}
	timer := time.NewTimer(m.cfg.FaultGrace)
	defer timer.Stop()
	for {
		m.mu.Lock()
		still, changed := 0, m.changed
		for _, f := range faults {
			if m.view.Has(f) {
				still++
			}
		}
		m.mu.Unlock()
		if still == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return fmt.Errorf("delta: commit at level %s: %d of %d members do not have the change: %w", level, still, len(to), cause)
		case <-ctx.Done():
			return fmt.Errorf("delta: commit at level %s: %w (%w)", level, ctx.Err(), cause)
		}
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// apply merges a batch; from is the member that sent it, nil for the host. added
// is how many sessions were not known before.
func (m *Manager) apply(batch []byte, from *channel.Member) (added int, err error) {
	now := time.Now().UnixMilli()
	local := from == nil
	var report []byte
	var ask []session.Key
	refused := 0
	d := decoders.Get().(*session.Decoder)
	defer decoders.Put(d)
	d.Reset(batch)
	defer d.Reset(nil)
	for d.Next() {
		r := d.Record()
		e := m.store.merge(r, local, now)
		if e.report {
			report = append(report, d.Raw()...)
		}
		if e.tell != nil {
			report = session.AppendBatch(report, e.tell)
		}
		if e.ask {
			ask = append(ask, r.Key)
		}
		if e.refused {
			refused++
		}
		if e.added {
			added++
		}
		for e.cascade != nil {
			next := e.cascade
			e = m.store.merge(next, false, now)
			if e.report {
				report = session.AppendBatch(report, next)
			}
		}
	}
	if len(report) > 0 {
		m.host.Update(report)
	}
	if from != nil && len(ask) > 0 {
		m.askForRest(*from, ask)
	}
	if err := d.Err(); err != nil {
		m.m.malformed.Inc()
		return added, fmt.Errorf("delta: batch of %d bytes: %w", len(batch), err)
	}
	if refused > 0 {
		return added, fmt.Errorf("delta: %d new sessions refused, %d are held already: %w", refused, m.store.sessions.Load(), session.ErrFull)
	}
	return added, nil
}

// Load implements core.Manager.
func (m *Manager) Load(ctx context.Context, key session.Key) (*session.Record, error) {
	if _, _, err := m.running(); err != nil {
		return nil, err
	}
	r, known := m.store.load(key, time.Now().UnixMilli())
	if known || m.isReady() {
		return r, nil
	}
	// The state transfer is going on: ask all members for this one session, and
	// wait for the transfer if not all of them answer.
	complete, err := m.fetch(ctx, key)
	if err != nil {
		return nil, err
	}
	if r, known = m.store.load(key, time.Now().UnixMilli()); known || complete {
		return r, nil
	}
	select {
	case <-m.readyCh:
	case <-ctx.Done():
		return nil, fmt.Errorf("delta: load session %s while the state transfer is going on: %w", session.Prefix(key.ID), ctx.Err())
	case <-m.ctx.Done():
		return nil, errStopped
	}
	r, _ = m.store.load(key, time.Now().UnixMilli())
	return r, nil
}

// Release implements core.Manager. It refuses while this may be the only manager
// that has the latest changes.
func (m *Manager) Release(_ context.Context, keys []session.Key) error {
	if _, _, err := m.running(); err != nil {
		return err
	}
	if !m.copied() {
		return errAlone
	}
	m.store.release(keys)
	return nil
}

// copied reports whether some other member has everything that this one has.
func (m *Manager) copied() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.peers {
		if !p.wanted && !p.running {
			return true
		}
	}
	return false
}

// HandleView implements core.Manager.
func (m *Manager) HandleView(_ context.Context, v channel.View) {
	m.mu.Lock()
	now := time.Now()
	for _, member := range v.Members {
		if p := m.peers[member.ID]; p != nil {
			p.member = member
			continue
		}
		p := &peer{member: member}
		p.want(now.Add(m.patience(v.Local, member)))
		m.peers[member.ID] = p
	}
	for id := range m.peers {
		if _, there := v.Get(id); !there {
			delete(m.peers, id)
		}
	}
	m.view = v
	changed := m.changed
	m.changed = make(chan struct{})
	m.mu.Unlock()
	close(changed)
	m.wake()
}

// wake makes run look at what is due.
func (m *Manager) wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

func (m *Manager) isReady() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ready
}

// Status implements core.Manager.
func (m *Manager) Status(context.Context) (core.ManagerStatus, error) {
	m.mu.Lock()
	st := core.ManagerStatus{Ready: m.ready, State: m.state, Transfer: m.transfer}
	m.mu.Unlock()
	st.Sessions = int(m.store.sessions.Load())
	st.Tombstones = int(m.store.tombstones.Load())
	st.Bytes = m.store.bytes.Load()
	st.Received = int(m.received.Load())
	st.Conflicts = m.store.conflicts.Load()
	return st, nil
}

// Keys implements core.Manager.
func (m *Manager) Keys(_ context.Context, limit int) ([]session.Summary, error) {
	return m.store.summaries(limit), nil
}

// sweep drops what is over, a few shards at a time.
func (m *Manager) sweep() {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for next := 0; ; {
		select {
		case now := <-ticker.C:
			for range sweepShards {
				m.store.sweep(next, now.UnixMilli())
				next = (next + 1) % shardCount
			}
		case <-m.ctx.Done():
			return
		}
	}
}

// work serves requests of other members.
func (m *Manager) work() {
	for {
		select {
		case job := <-m.jobs:
			job()
		case <-m.ctx.Done():
			return
		}
	}
}

// HandleMessage implements core.Manager.
func (m *Manager) HandleMessage(_ context.Context, from channel.Member, body []byte, done func(error)) {
	done(m.handle(from, body))
}

func (m *Manager) handle(from channel.Member, body []byte) error {
	if _, _, err := m.running(); err != nil {
		return err
	}
	k, id, rest, err := parseHeader(body)
	if err == nil {
		err = m.dispatch(from, k, id, rest)
	}
	if errors.Is(err, errMalformed) {
		m.m.malformed.Inc()
		err = fmt.Errorf("delta: message from %s: %w", from, err)
	}
	return err
}

func (m *Manager) dispatch(from channel.Member, k kind, id uint64, b []byte) error {
	switch k {
	case kindDelta:
		_, err := m.apply(b, &from)
		return err
	case kindRecords:
		return m.gotRecords(from, id, b)
	case kindAnswer:
		return m.gotAnswer(from, id, b)
	case kindFound:
		return m.gotFound(from, id, b)
	case kindDigest:
		s, rest, err := parseSpan(b, pairSize)
		if err != nil {
			return err
		}
		theirs := parsePairs(rest)
		return m.enqueue(func() { m.serveDigest(from, id, s, theirs) })
	default: // parseHeader has checked: kindFetch
		var keys []session.Key
		err := session.DecodeBatch(b, func(r *session.Record) error {
			if len(keys) == maxFetch {
				return fmt.Errorf("%w: more than %d keys", errMalformed, maxFetch)
			}
			keys = append(keys, r.Key)
			return nil
		})
		if err != nil {
			return fmt.Errorf("%w: %w", errMalformed, err)
		}
		return m.enqueue(func() { m.serveFetch(from, id, keys) })
	}
}

func (m *Manager) enqueue(job func()) error {
	select {
	case m.jobs <- job:
		return nil
	default:
		m.m.busy.Inc()
		return errBusy
	}
}
