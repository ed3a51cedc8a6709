package conformance

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// The mistakes that a plainManager can make.
const (
	mistakeEarly         = "returns before the others have the change"
	mistakeMute          = "does not tell its node what others have changed"
	mistakeFirst         = "keeps the first version of a session"
	mistakeKeepDeleted   = "does not replicate removals of attributes"
	mistakeNoTombstones  = "does not replicate the end of sessions"
	mistakeLoses         = "replaces records instead of merging them"
	mistakeAlone         = "keeps all changes for itself"
	mistakeForgetsDead   = "forgets the sessions of a member that has left"
	mistakeNoTransfer    = "says it is ready without having been given anything"
	mistakeHalfTransfer  = "gives a joining node only half of the sessions"
	mistakeStaleTransfer = "does not send changes to a joining node"
	mistakeRevives       = "takes a change of an ended session for a new one"
)

func managerSaboteurs(mistakes ...string) []Saboteur {
	var list []Saboteur
	for _, m := range mistakes {
		list = append(list, Saboteur{Name: m, New: func() Subject {
			s := Manager("wrong", func(c plainConfig, _ channel.Settings) (core.Manager, error) { return newPlainManager(c), nil }, plainConfig{m}).(*manager)
			s.desc.Modes = []core.PluginMode{core.Direct}
			return s
		}})
	}
	return list
}

type plainConfig struct {
	Mistake string `yaml:"mistake"`
}

// plainManager is the simplest manager that passes its profile, if it makes no
// mistake: every node has every session, and both sides of a new pair send all
// they have.
type plainManager struct {
	mistake string
	ctx     context.Context
	cancel  context.CancelFunc
	tasks   sync.WaitGroup

	mu      sync.Mutex
	host    core.ManagerHost                 // guarded by mu
	stopped bool                             // guarded by mu
	view    channel.View                     // guarded by mu
	records map[session.Key]*session.Record  // guarded by mu
	owners  map[session.Key]channel.UniqueID // guarded by mu
	waiting map[channel.UniqueID]bool        // guarded by mu: whose state has not come
	seen    bool                             // guarded by mu: there was a view
	ready   chan struct{}                    // closed when nothing is waited for
	once    sync.Once
}

func newPlainManager(c plainConfig) *plainManager {
	m := &plainManager{
		mistake: c.Mistake, records: map[session.Key]*session.Record{}, owners: map[session.Key]channel.UniqueID{},
		waiting: map[channel.UniqueID]bool{}, ready: make(chan struct{}),
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

var errPlainStopped = errors.New("plain manager: not running")

// What a message is, its first byte.
const (
	plainDelta = 'd'
	plainState = 's'
)

func (m *plainManager) Start(_ context.Context, host core.ManagerHost) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped {
		return errPlainStopped
	}
	m.host = host
	return nil
}

func (m *plainManager) Stop(context.Context) error {
	m.mu.Lock()
	m.stopped = true
	m.mu.Unlock()
	m.cancel()
	m.tasks.Wait()
	return nil
}

func (m *plainManager) Commit(ctx context.Context, batch []byte, level core.Level) error {
	m.mu.Lock()
	host, v := m.host, m.view
	err := m.merge(batch, v.Local.ID, false)
	m.mu.Unlock()
	if err != nil || host == nil || len(v.Members) == 0 || m.mistake == mistakeAlone {
		return err
	}
	to := v.Members
	if m.mistake == mistakeStaleTransfer {
		to = to[:1]
	}
	options := map[core.Level]channel.Options{core.Async: channel.SendNone, core.Acked: channel.SendAck, core.Synced: channel.SendSyncAck}[level]
	if m.mistake == mistakeEarly {
		options = channel.SendNone
	}
	err = host.Send(ctx, to, options, append([]byte{plainDelta}, m.outgoing(batch)...))
	if se, ok := errors.AsType[*channel.SendError](err); ok {
		m.mu.Lock()
		defer m.mu.Unlock()
		if !slices.ContainsFunc(se.Faults, func(f channel.Fault) bool { return m.view.Has(f.Member) }) {
			return nil
		}
	}
	return err
}

// outgoing is a batch as this manager passes it on.
func (m *plainManager) outgoing(batch []byte) []byte {
	var out []byte
	err := session.DecodeBatch(batch, func(r *session.Record) error {
		c := r.Clone()
		if m.mistake == mistakeKeepDeleted {
			for name, e := range c.Attrs {
				if e.Deleted {
					delete(c.Attrs, name)
				}
			}
		}
		if c.End == session.Living || m.mistake != mistakeNoTombstones {
			out = session.AppendBatch(out, c)
		}
		return nil
	})
	if err != nil {
		return batch
	}
	return out
}

// merge takes a batch; m.mu is held.
func (m *plainManager) merge(batch []byte, from channel.UniqueID, remote bool) error {
	return session.DecodeBatch(batch, func(r *session.Record) error {
		old := m.records[r.Key]
		switch {
		case old == nil || remote && m.mistake == mistakeLoses,
			m.mistake == mistakeRevives && old.End != session.Living && r.End == session.Living:
			m.records[r.Key] = r.Clone()
		case remote && m.mistake == mistakeFirst:
		default:
			old.Merge(r.Clone())
		}
		m.owners[r.Key] = from
		return nil
	})
}

func (m *plainManager) HandleMessage(_ context.Context, from channel.Member, body []byte, done func(error)) {
	if len(body) == 0 || body[0] != plainDelta && body[0] != plainState {
		done(errors.New("plain manager: unknown message"))
		return
	}
	batch := slices.Clone(body[1:])
	m.mu.Lock()
	host := m.host
	err := m.merge(batch, from.ID, true)
	if body[0] == plainState {
		delete(m.waiting, from.ID)
		m.lookReady()
	}
	m.mu.Unlock()
	if host != nil && m.mistake != mistakeMute && len(batch) > 0 {
		host.Update(batch)
	}
	done(err)
}

// lookReady closes ready if nothing is waited for; m.mu is held.
func (m *plainManager) lookReady() {
	if m.seen && len(m.waiting) == 0 || m.mistake == mistakeNoTransfer {
		m.once.Do(func() { close(m.ready) })
	}
}

func (m *plainManager) HandleView(_ context.Context, v channel.View) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped {
		return
	}
	for _, other := range v.Members {
		if !m.view.Has(other) {
			m.waiting[other.ID] = true
			m.tasks.Go(func() { m.give(other) })
		}
	}
	for _, other := range m.view.Members {
		if v.Has(other) {
			continue
		}
		delete(m.waiting, other.ID)
		for k, owner := range m.owners {
			if owner == other.ID && m.mistake == mistakeForgetsDead {
				delete(m.records, k)
			}
		}
	}
	m.view, m.seen = v, true
	m.lookReady()
}

// give sends all there is to a new member.
func (m *plainManager) give(to channel.Member) {
	m.mu.Lock()
	state := []byte{plainState}
	for k, r := range m.records {
		switch {
		case m.mistake == mistakeNoTransfer:
		case m.mistake == mistakeHalfTransfer && k.ID[0]%2 == 0:
		case m.mistake == mistakeNoTombstones && r.End != session.Living:
		default:
			state = session.AppendBatch(state, r)
		}
	}
	host := m.host
	m.mu.Unlock()
	if host != nil {
		// The member asks again by coming back, if it goes.
		_ = host.Send(m.ctx, []channel.Member{to}, channel.SendSyncAck, state)
	}
}

func (m *plainManager) Load(ctx context.Context, key session.Key) (*session.Record, error) {
	select {
	case <-m.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-m.ctx.Done():
		return nil, errPlainStopped
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.records[key]
	if r == nil || r.End != session.Living && r.End != session.Renewed {
		return nil, nil
	}
	return r.Clone(), nil
}

func (m *plainManager) Release(context.Context, []session.Key) error { return nil }

func (m *plainManager) Status(context.Context) (core.ManagerStatus, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := core.ManagerStatus{State: "plain", Sessions: len(m.records)}
	select {
	case <-m.ready:
		st.Ready = true
	default:
	}
	return st, nil
}

func (m *plainManager) Keys(_ context.Context, limit int) ([]session.Summary, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []session.Summary
	for _, r := range m.records {
		if r.End == session.Living && len(list) < limit {
			list = append(list, r.Summary())
		}
	}
	return list, nil
}
