package bridge

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// memberRoom is enough for most packed members, so that packing needs no heap.
const memberRoom = 256

// Manager is the client of a manager plugin; it implements core.Manager.
type Manager struct {
	client
	host core.ManagerHost // set by Start

	mu   sync.Mutex
	view *channel.View // guarded by mu: the current one, nil before the first
	conn *frame.Conn   // guarded by mu: started, for views
}

// NewManager returns the client of the plugin behind life.
func NewManager(name string, life Lifecycle, log *zap.Logger) *Manager {
	return &Manager{client: newClient("manager/"+name, life, log)}
}

// Start implements core.Manager.
func (m *Manager) Start(ctx context.Context, host core.ManagerHost) error {
	m.host = host
	return m.life.Start(ctx, m)
}

// Begin implements Client. The new generation is told the view before it sees
// any call, and the host is then asked for its live sessions: this one knows
// nothing of what the last one knew.
func (m *Manager) Begin(ctx context.Context, conn *frame.Conn, generation int) error {
	if err := m.start(ctx, conn); err != nil {
		return err
	}
	m.mu.Lock()
	m.conn = conn
	view := m.view
	m.mu.Unlock()
	if view != nil {
		if err := m.tellView(ctx, conn, *view); err != nil {
			return err
		}
	}
	m.calls.Attach(conn)
	if generation > 1 {
		conn.Go(func() {
			if err := m.host.Resync(conn.Context()); err != nil {
				m.log.Warn("live sessions were not committed again after the restart of the manager", zap.Error(err))
			}
		})
	}
	return nil
}

// Commit implements core.Manager.
func (m *Manager) Commit(ctx context.Context, batch []byte, level core.Level) error {
	_, err := m.outcome(m.calls.Call(ctx, kindCommit, uint32(level), batch))
	return err
}

// Forward implements core.Forwarder. A manager that does not implement it
// answers with an error.
func (m *Manager) Forward(ctx context.Context, batch []byte, level core.Level) (fw core.Forward, err error) {
	b, err := m.outcome(m.calls.Call(ctx, kindPrepare, uint32(level), batch))
	if err != nil {
		return fw, err
	}
	d := decoder{b: b, in: m.in}
	fw = d.forward()
	if d.err != nil {
		return fw, fmt.Errorf("plugin %s: decode its answer: %w", m.name, d.err)
	}
	return fw, nil
}

// Load implements core.Manager.
func (m *Manager) Load(ctx context.Context, key session.Key) (*session.Record, error) {
	var head [memberRoom]byte
	b, err := m.outcome(m.calls.Call(ctx, kindLoad, 0, appendKey(head[:0], key)))
	if err != nil || b == nil {
		return nil, err
	}
	r := new(session.Record)
	return r, m.decode(b, r)
}

// Release implements core.Manager.
func (m *Manager) Release(ctx context.Context, keys []session.Key) error {
	var b []byte
	for _, k := range keys {
		b = appendKey(b, k)
	}
	_, err := m.outcome(m.calls.Call(ctx, kindRelease, 0, b))
	return err
}

// HandleMessage implements core.Manager. It returns when the message is on its
// way; done is called by the goroutine that reads the answers.
func (m *Manager) HandleMessage(ctx context.Context, from channel.Member, body []byte, done func(error)) {
	var head [memberRoom]byte
	err := m.calls.Go(ctx, func(f frame.Frame, err error) {
		_, err = m.outcome(f, err)
		done(err)
	}, kindMessage, 0, appendMember(head[:0], from), body)
	if err != nil {
		done(fmt.Errorf("plugin %s: %w", m.name, err))
	}
}

// HandleView implements core.Manager. If the plugin is down, its successor is
// told.
func (m *Manager) HandleView(ctx context.Context, v channel.View) {
	m.mu.Lock()
	m.view = &v
	conn := m.conn
	m.mu.Unlock()
	if conn == nil {
		return
	}
	if err := m.tellView(ctx, conn, v); err != nil {
		m.log.Debug("the plugin was not told a view; its successor will be", zap.Error(err))
	}
}

// tellView returns when the plugin has handled the view. Views that overtake
// each other on their way are put right by their version.
func (m *Manager) tellView(ctx context.Context, conn *frame.Conn, v channel.View) error {
	_, err := m.outcome(m.calls.CallOn(ctx, conn, kindView, 0, appendView(nil, v)))
	return err
}

// Status implements core.Manager.
func (m *Manager) Status(ctx context.Context) (s core.ManagerStatus, err error) {
	b, err := m.outcome(m.calls.Call(ctx, kindStatus, 0))
	if err == nil {
		err = m.decode(b, &s)
	}
	return s, err
}

// Keys implements core.Manager.
func (m *Manager) Keys(ctx context.Context, limit int) (list []session.Summary, err error) {
	b, err := m.outcome(m.calls.Call(ctx, kindKeys, uint32(max(0, limit))))
	if err == nil {
		err = m.decode(b, &list)
	}
	return list, err
}

// Where implements core.Handover. A manager that does not implement it answers
// with an error.
func (m *Manager) Where(ctx context.Context, q core.WhereQuery) (a core.WhereAnswer, err error) {
	b, err := encMode.Marshal(q)
	if err != nil {
		return a, fmt.Errorf("plugin %s: encode a question: %w", m.name, err)
	}
	if b, err = m.outcome(m.calls.Call(ctx, kindWhere, 0, b)); err == nil {
		err = m.decode(b, &a)
	}
	return a, err
}

// HandleCall implements frame.Handler.
func (m *Manager) HandleCall(r *frame.Request) {
	m.life.Count()
	switch r.Kind {
	case kindSend:
		r.Go(m.send)
	case kindResync:
		r.Go(func(r *frame.Request) { answer(r, m.host.Resync(r.Context())) })
	default:
		refuse(r)
	}
}

func (m *Manager) send(r *frame.Request) {
	d := decoder{b: r.Payload, in: m.in}
	to := d.members()
	if d.err != nil {
		answer(r, d.err)
		return
	}
	answer(r, m.host.Send(r.Context(), to, channel.Options(r.Options), d.b))
}

// HandleEvent implements frame.Handler. It runs before any later answer of the
// plugin is looked at: that is the order that ManagerHost.Update promises.
func (m *Manager) HandleEvent(f frame.Frame) error {
	if f.Kind == kindUpdate {
		m.life.Count()
		// The host may keep parts of the batch for as long as a session lives:
		// they must not keep the neighbours of the frame too.
		m.host.Update(bytes.Clone(f.Payload))
	}
	return nil
}

func appendForward(b []byte, fw core.Forward) []byte {
	b = binary.AppendVarint(b, int64(fw.Wait))
	for _, p := range fw.Parcels {
		b = appendMembers(b, p.To)
		batch := byte(0)
		if p.Batch {
			batch = 1
		}
		b = append(b, batch)
		b = binary.AppendUvarint(b, uint64(len(p.Body)))
		b = append(b, p.Body...)
	}
	return b
}

func (d *decoder) forward() core.Forward {
	fw := core.Forward{Wait: time.Duration(d.varint("time to wait"))}
	for len(d.b) > 0 {
		p := core.Parcel{To: d.members(), Batch: d.byte("flag") != 0}
		n := d.uvarint("length of a message")
		if n > uint64(len(d.b)) {
			d.fail("length of a message")
			break
		}
		p.Body = d.take(int(n), "message")
		fw.Parcels = append(fw.Parcels, p)
	}
	return fw
}

func appendKey(b []byte, k session.Key) []byte {
	return appendString(appendString(b, k.Context), k.ID)
}

func (d *decoder) key() session.Key {
	return session.Key{Context: d.string("context name"), ID: d.string("session id")}
}

// managerServer serves a core.Manager to a node.
type managerServer struct {
	server
	impl core.Manager
	// lastView is the version of the newest view; only the lane touches it.
	lastView uint64
}

// HandleCall implements frame.Handler: messages and views go through one lane
// that keeps their order, everything else gets a goroutine of its own, because
// it may wait for other nodes.
func (s *managerServer) HandleCall(r *frame.Request) {
	switch r.Kind {
	case kindMessage, kindView:
		s.lane.put(r)
	case kindStart:
		r.Go(func(r *frame.Request) { answer(r, s.impl.Start(r.Context(), s)) })
	case kindStop:
		r.Go(s.stop)
	case kindCommit:
		r.Go(func(r *frame.Request) { answer(r, s.impl.Commit(r.Context(), r.Payload, core.Level(r.Options))) })
	case kindPrepare:
		r.Go(s.prepare)
	case kindLoad:
		r.Go(s.load)
	case kindRelease:
		r.Go(s.releaseKeys)
	case kindStatus:
		r.Go(func(r *frame.Request) {
			v, err := s.impl.Status(r.Context())
			answerWith(r, v, err)
		})
	case kindKeys:
		r.Go(func(r *frame.Request) {
			v, err := s.impl.Keys(r.Context(), int(r.Options))
			answerWith(r, v, err)
		})
	case kindWhere:
		r.Go(s.where)
	default:
		refuse(r)
	}
}

// serve handles what came through the lane.
func (s *managerServer) serve(ctx context.Context, r *frame.Request) {
	d := decoder{b: r.Payload, in: s.in}
	if r.Kind == kindMessage {
		from := d.member()
		if d.err != nil {
			answer(r, d.err)
			return
		}
		s.impl.HandleMessage(ctx, from, d.b, func(err error) { answer(r, err) })
		return
	}
	v := d.view()
	if d.err == nil && v.Version >= s.lastView {
		s.lastView = v.Version
		s.impl.HandleView(ctx, v)
	}
	answer(r, d.err)
}

func (s *managerServer) prepare(r *frame.Request) {
	f, ok := s.impl.(core.Forwarder)
	if !ok {
		answer(r, core.ErrNoForward)
		return
	}
	fw, err := f.Forward(r.Context(), r.Payload, core.Level(r.Options))
	if err == nil {
		err = r.Reply(frame.Replace, 0, appendForward(nil, fw))
	}
	if err != nil {
		answer(r, err)
	}
}

func (s *managerServer) load(r *frame.Request) {
	d := decoder{b: r.Payload}
	key := d.key()
	if d.err != nil {
		answer(r, d.err)
		return
	}
	rec, err := s.impl.Load(r.Context(), key)
	if rec == nil {
		answer(r, err)
		return
	}
	answerWith(r, rec, err)
}

func (s *managerServer) where(r *frame.Request) {
	h, ok := s.impl.(core.Handover)
	if !ok {
		answer(r, core.ErrNoHandover)
		return
	}
	var q core.WhereQuery
	if err := decMode.Unmarshal(r.Payload, &q); err != nil {
		answer(r, fmt.Errorf("decode a question: %w", err))
		return
	}
	if len(q.Keys) > core.MaxWhere || q.Page < 0 {
		answer(r, fmt.Errorf("a question about %d sessions, page %d: at most %d are allowed", len(q.Keys), q.Page, core.MaxWhere))
		return
	}
	a, err := h.Where(r.Context(), q)
	answerWith(r, a, err)
}

func (s *managerServer) releaseKeys(r *frame.Request) {
	d := decoder{b: r.Payload}
	var keys []session.Key
	for len(d.b) > 0 {
		keys = append(keys, d.key())
	}
	if d.err != nil {
		answer(r, d.err)
		return
	}
	answer(r, s.impl.Release(r.Context(), keys))
}

// Send implements core.ManagerHost.
func (s *managerServer) Send(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error {
	var head [4 * memberRoom]byte
	f, err := s.calls.Call(ctx, kindSend, uint32(o), appendMembers(head[:0], to), body)
	if err != nil {
		return channel.Failed(to, err)
	}
	if f.Verdict == frame.Error {
		return decodeError(f.Payload, s.in)
	}
	return nil
}

// Update implements core.ManagerHost.
func (s *managerServer) Update(batch []byte) {
	if err := s.conn().Notify(kindUpdate, 0, batch); err != nil {
		s.log.Warn("a change of live sessions did not reach the node", zap.Int("bytes", len(batch)), zap.Error(err))
	}
}

// Resync implements core.ManagerHost.
func (s *managerServer) Resync(ctx context.Context) error { return s.call(ctx, kindResync, 0) }
