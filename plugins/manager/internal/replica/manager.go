package replica

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
	// workers serve each of two queues of requests of other members, jobQueue
	// bounds how many wait in one; more are refused, and asked again later.
	workers  = 4
	jobQueue = 256
	// sendTimeout bounds one message of an exchange.
	sendTimeout = 30 * time.Second
	// sweepEvery and sweepShards make a full round in 64 s.
	sweepEvery  = time.Second
	sweepShards = 4
)

var (
	errStopped = errors.New("manager: not running")
	errAlone   = errors.New("manager: no other member is known to have a copy")
	errBusy    = errors.New("manager: too many requests of other members are waiting")
)

var (
	decoders = sync.Pool{New: func() any { return new(session.Decoder) }}
	itemPool = sync.Pool{New: func() any { return new(items) }}
)

// Manager implements core.Manager.
type Manager struct {
	name    string
	cfg     Config
	log     *zap.Logger
	store   *store
	m       metrics
	buffers sync.Pool     // of *bytes.Buffer
	jobs    chan func()   // short ones
	bulk    chan func()   // those that move sessions
	kick    chan struct{} // wakes run; capacity 1
	probes  chan struct{} // wakes watch; capacity 1
	pings   atomic.Uint64 // the number of the last ping
	group   atomic.Pointer[group]
	loading sync.Map // session.Key: the host waits for it

	// What placer has to do.
	placeKick chan struct{} // capacity 1
	placing   sync.Mutex
	unsettled map[session.Key]struct{} // guarded by placing, as the next two
	scanAt    time.Time                // when to look at all sessions, or zero
	promote   bool                     // look for owners that are gone at once

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
	silent    map[channel.UniqueID]bool // left the view while they were aside
	exchanges map[uint64]*exchange
	fetches   map[uint64]*fetch
	proofs    map[uint64]*proof
	ready     bool
	state     string
	transfer  time.Duration
}

type metrics struct {
	malformed, faults, failures, exchanges, repairs, busy, aside *channel.Counter
	merged, promoted, moved, copied, dropped                     *channel.Counter
}

// New makes a manager; it has no side effect but registering metrics. name is
// that of the kind of manager, for errors and metrics.
func New(name string, c Config, s channel.Settings) (*Manager, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	m := &Manager{
		name: name, cfg: c, log: s.Logger,
		jobs: make(chan func(), jobQueue), bulk: make(chan func(), jobQueue), kick: make(chan struct{}, 1),
		readyCh: make(chan struct{}), changed: make(chan struct{}),
		peers: map[channel.UniqueID]*peer{}, silent: map[channel.UniqueID]bool{}, exchanges: map[uint64]*exchange{}, fetches: map[uint64]*fetch{}, proofs: map[uint64]*proof{},
		probes: make(chan struct{}, 1), placeKick: make(chan struct{}, 1), unsettled: map[session.Key]struct{}{},
		state: "not started",
	}
	m.store = newStore(c, func() uint64 { return m.group.Load().self })
	m.group.Store(m.newGroup())
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
		return s.Metrics.Counter(m.name+"_"+name+"_total", help, "manager", s.Name)
	}
	m.m = metrics{
		malformed: counter("malformed", "messages and batches that could not be read"),
		faults:    counter("faults", "members that a change could not be sent to"),
		failures:  counter("exchange_failures", "exchanges with another member that failed"),
		exchanges: counter("exchanges", "complete exchanges with another member"),
		repairs:   counter("repairs", "sessions asked for because only a change of them was known"),
		busy:      counter("busy", "requests of other members refused because too many were waiting"),
		aside:     counter("aside", "members put aside because they did not answer"),
	}
	if m.placed() {
		m.m.merged = counter("owners_merged", "sessions of which this node was the owner, and found that another one is")
		m.m.promoted = counter("promoted", "sessions whose owner had gone, and that this node took over")
		m.m.moved = counter("moved", "sessions that this node took over because of a request")
		m.m.copied = counter("copies_made", "copies of sessions made on another node because one was missing")
		m.m.dropped = counter("copies_dropped", "copies of sessions dropped because they are kept elsewhere")
	}
	for _, g := range []struct {
		name, help string
		v          *atomic.Int64
	}{
		{"sessions", "sessions held for all nodes", &m.store.sessions},
		{"owned", "sessions that this node is responsible for", &m.store.owned},
		{"tombstones", "ended sessions remembered", &m.store.tombstones},
		{"bytes", "names and values of all attributes", &m.store.bytes},
		{"conflicts", "attributes changed on two nodes independently, since start", &m.store.conflicts},
		{"replicas_expired", "replicas dropped because nobody used them, since start", &m.store.expired},
		{"tombstones_early", "tombstones forgotten early because of max_tombstones, since start", &m.store.early},
		{"sessions_refused", "changes refused because of max_sessions, since start", &m.store.refused},
		{"access_in_future", "access times ahead of the clock, since start", &m.store.future},
	} {
		s.Metrics.Gauge(m.name+"_"+g.name, g.help, func() float64 { return float64(g.v.Load()) }, "manager", s.Name)
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
	m.wg.Go(m.watch)
	if m.placed() {
		m.wg.Go(m.placer)
	}
	m.wg.Go(m.sweep)
	for range workers {
		m.wg.Go(func() { m.work(m.jobs) })
		m.wg.Go(func() { m.work(m.bulk) })
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
	host, _, err := m.running()
	if err != nil {
		return err
	}
	if m.placed() {
		w, err := m.takePlaced(host, batch, level)
		if err != nil {
			return err
		}
		return m.distribute(ctx, w, level)
	}
	if _, err := m.applyBatch(batch, nil); err != nil {
		return err
	}
	to := m.targets()
	if len(to) == 0 {
		return nil
	}
	buf := m.buffers.Get().(*bytes.Buffer)
	defer m.recycle(buf)
	buf.Write(appendHeader(buf.AvailableBuffer(), kindDelta, 0))
	buf.Write(batch)
	if level == core.Async {
		return m.commitAsync(ctx, host, to, buf.Bytes())
	}
	deadline := time.Now().Add(m.cfg.FaultGrace)
	ps := make([]parcel, len(to))
	for i, member := range to {
		ps[i] = parcel{member, buf.Bytes()}
	}
	faults := m.deliver(ctx, ps, level)
	if len(faults) == 0 {
		return nil
	}
	m.note(faults)
	return m.resolve(ctx, faults, level, deadline)
}

// forwardWait is the part of FaultGrace for which the node waits for members by
// itself: a member that is silent is found by the probes meanwhile, and Commit,
// which comes then, waits no longer than until it has been put aside.
const forwardWait = 4

// Forward implements core.Forwarder.
func (m *Manager) Forward(_ context.Context, batch []byte, level core.Level) (core.Forward, error) {
	fw := core.Forward{Wait: m.cfg.FaultGrace / forwardWait}
	host, _, err := m.running()
	if err != nil {
		return fw, err
	}
	if m.placed() {
		w, err := m.takePlaced(host, batch, level)
		if err != nil {
			return fw, err
		}
		for _, p := range w.parcels() {
			fw.Parcels = append(fw.Parcels, core.Parcel{To: []channel.Member{p.to}, Body: p.body})
		}
		return fw, nil
	}
	if _, err := m.applyBatch(batch, nil); err != nil {
		return fw, err
	}
	if to := m.targets(); len(to) > 0 {
		fw.Parcels = []core.Parcel{{To: to, Body: appendHeader(nil, kindDelta, 0), Batch: true}}
	}
	return fw, nil
}

// commitAsync sends the same to all. Members that it does not reach get it by an
// exchange.
func (m *Manager) commitAsync(ctx context.Context, host core.ManagerHost, to []channel.Member, body []byte) error {
	err := host.Send(ctx, to, channel.SendAsync, body)
	if err == nil {
		return nil
	}
	se, ok := errors.AsType[*channel.SendError](err)
	if !ok || errors.Is(err, channel.ErrQueueFull) {
		// Nothing is wrong with the members: the host keeps the changes, merges
		// them with later ones, and tries again after a pause.
		return fmt.Errorf("%s: commit at level %s: %w", m.name, core.Async, err)
	}
	m.note(se.Faults)
	return nil
}

// recycle keeps a buffer for later, unless it is very large.
func (m *Manager) recycle(buf *bytes.Buffer) {
	if buf.Cap() <= 4<<20 {
		buf.Reset()
		m.buffers.Put(buf)
	}
}

// apply merges items of another member. added is how many sessions were not known
// before.
func (m *Manager) apply(b []byte, from *channel.Member) (added int, err error) {
	if !m.placed() {
		return m.applyBatch(b, from)
	}
	w, err := m.applyPlaced(b, *from, 0)
	m.sendChanges(w)
	return w.added, err
}

// applyBatch merges a batch; from is the member that sent it, nil for the host.
func (m *Manager) applyBatch(batch []byte, from *channel.Member) (added int, err error) {
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
		e := m.store.put(r, local, now)
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
			e = m.store.put(next, false, now)
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
		return added, fmt.Errorf("%s: batch of %d bytes: %w", m.name, len(batch), err)
	}
	if refused > 0 {
		return added, fmt.Errorf("%s: %d new sessions refused, %d are held already: %w", m.name, refused, m.store.sessions.Load(), session.ErrFull)
	}
	return added, nil
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
	if m.placed() {
		return m.releasePlaced(keys)
	}
	m.store.release(keys)
	return nil
}

// copied reports whether some other member has everything that this one has.
func (m *Manager) copied() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.peers {
		if p.hello && !p.aside && !p.wanted && !p.running {
			return true
		}
	}
	return false
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
	st := core.ManagerStatus{Ready: m.ready, State: m.state + m.silence(), Transfer: m.transfer}
	m.mu.Unlock()
	st.Owned = int(m.store.owned.Load())
	st.Sessions = int(m.store.sessions.Load())
	st.Tombstones = int(m.store.tombstones.Load())
	st.Bytes = m.store.bytes.Load()
	st.Received = int(m.received.Load())
	st.Conflicts, st.LatestConflicts = m.store.conflicts.Load(), m.store.disputes.List(listedConflicts)
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
func (m *Manager) work(queue <-chan func()) {
	for {
		select {
		case job := <-queue:
			job()
		case <-m.ctx.Done():
			return
		}
	}
}

// HandleMessage implements core.Manager.
func (m *Manager) HandleMessage(_ context.Context, from channel.Member, body []byte, done func(error)) {
	if later, err := m.handle(from, body, done); !later {
		done(err)
	}
}

// handle takes a message; later says that it will call done itself.
func (m *Manager) handle(from channel.Member, body []byte, done func(error)) (later bool, err error) {
	if err := m.enter(from); err != nil {
		return false, err
	}
	k, id, rest, err := parseHeader(body)
	switch {
	case err != nil:
	case k == kindDelta && m.placed():
		later, err = m.gotChanges(from, rest, done)
	default:
		err = m.dispatch(from, k, id, rest)
	}
	if errors.Is(err, errMalformed) {
		m.m.malformed.Inc()
		err = fmt.Errorf("%s: message from %s: %w", m.name, from, err)
	}
	return later, err
}

// enter notes a sign of life of the member that a message came from.
func (m *Manager) enter(from channel.Member) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.host == nil || m.stopped {
		return errStopped
	}
	if p := m.peers[from.ID]; p != nil {
		p.heard = time.Now()
	}
	return nil
}

// gotChanges takes changes of sessions that have a place. What has to be passed
// on first is acknowledged later.
func (m *Manager) gotChanges(from channel.Member, b []byte, done func(error)) (later bool, err error) {
	flags, rest, err := parseFlags(b)
	if err != nil {
		return false, err
	}
	w, err := m.applyPlaced(rest, from, flags)
	if err == nil && flags&flagStrict != 0 && len(w.changes) > 0 {
		m.passOn(w, done)
		return true, nil
	}
	m.sendChanges(w)
	return false, err
}

func (m *Manager) dispatch(from channel.Member, k kind, id uint64, b []byte) error {
	switch k {
	case kindDelta:
		_, err := m.applyBatch(b, &from)
		return err
	case kindRecords:
		return m.gotRecords(from, id, b)
	case kindAnswer:
		return m.gotAnswer(from, id, b)
	case kindFound:
		return m.gotFound(from, id, b)
	case kindPing:
		return m.gotPing(from, id, b)
	case kindPong:
		return m.gotPong(from, id, b)
	case kindProve:
		return m.gotProve(from, id, b)
	case kindProof:
		return m.gotProof(from, id, b)
	case kindDigest:
		s, rest, err := parseSpan(b, pairSize)
		if err != nil {
			return err
		}
		theirs := parsePairs(rest)
		return m.enqueueTo(m.bulk, func() { m.serveDigest(from, id, s, theirs) })
	case kindFetch:
		flags, rest, err := parseFlags(b)
		if err != nil {
			return err
		}
		var keys []session.Key
		err = session.DecodeBatch(rest, func(r *session.Record) error {
			if len(keys) == maxFetch {
				return fmt.Errorf("%w: more than %d keys", errMalformed, maxFetch)
			}
			keys = append(keys, r.Key)
			return nil
		})
		if err != nil {
			return fmt.Errorf("%w: %w", errMalformed, err)
		}
		return m.enqueue(func() { m.serveFetch(from, id, flags, keys) })
	}
	if !m.placed() {
		return fmt.Errorf("%w: kind %d, but every node has every session here", errMalformed, k)
	}
	switch k {
	case kindPlace:
		return m.gotPlaces(from, b)
	case kindDrop:
		return m.gotDrop(from, b)
	default: // parseHeader has checked: kindGone
		return m.gotGone(from, b)
	}
}

func (m *Manager) enqueue(job func()) error { return m.enqueueTo(m.jobs, job) }

func (m *Manager) enqueueTo(queue chan<- func(), job func()) error {
	select {
	case queue <- job:
		return nil
	default:
		m.m.busy.Inc()
		return errBusy
	}
}
