package repmap

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/rpc"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// This file speaks with AbstractReplicatedMap of Apache Tribes. Its messages
// carry no versions: a value that comes from there counts as written, when it
// comes, by the member that it names as primary. Their objects are MapMessages,
// with keys and values as nested object streams, the very bytes that are kept
// here.

const tribesStop = jser.MapStop

func (e *engine) mapMessage(kind int32) *jser.MapMessage {
	return &jser.MapMessage{Type: kind, MapID: []byte(e.name)}
}

func (e *engine) localMember() *jser.Member { return jser.MemberOf(e.ch.Local()) }

// tribesMembers returns the Tribes' nodes that have the map.
func (e *engine) tribesMembers() (to []channel.Member) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, m := range e.tribes {
		to = append(to, m)
	}
	return to
}

// post sends a message that is no request.
func (e *engine) post(ctx context.Context, to []channel.Member, m *jser.MapMessage) error {
	if len(to) == 0 {
		return nil
	}
	b, err := e.cfg.Dialect.Encode(m)
	if err != nil {
		return err
	}
	return e.ch.Send(ctx, to, b, channel.ObjectStream|channel.UseAck|channel.SyncAck)
}

// tellTribes sends a message that only names this node.
func (e *engine) tellTribes(ctx context.Context, kind int32) {
	if to := e.tribesMembers(); len(to) > 0 {
		m := e.mapMessage(kind)
		m.Primary = e.localMember()
		_ = e.post(ctx, to, m)
	}
}

// request asks one Tribes' node.
func (e *engine) request(ctx context.Context, to channel.Member, q *jser.MapMessage) (*jser.MapMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.Timeout)
	defer cancel()
	replies, err := e.rpc.Call(ctx, []channel.Member{to}, rpc.Object(q), rpc.First, channel.UseAck)
	if err != nil {
		return nil, err
	}
	a, _ := replies[0].Body.Object.(*jser.MapMessage)
	return a, nil // nil for null
}

// meetTribes joins the map of a Tribes' node, as one of its own kind does: INIT,
// then the state, then START.
func (e *engine) meetTribes(m channel.Member) error {
	hello := e.mapMessage(jser.MapInit)
	hello.Primary = e.localMember()
	a, err := e.request(e.ctx, m, hello)
	if errors.Is(err, rpc.ErrAbsent) {
		e.absent(m.ID)
		return nil
	}
	if err != nil {
		return err
	}
	if a == nil {
		return errMessage
	}
	kind := jser.MapStateCopy
	if e.cfg.Lazy {
		kind = jser.MapState
	}
	state, err := e.request(e.ctx, m, e.mapMessage(kind))
	if err != nil {
		return err
	}
	e.addTribes(m)
	if state != nil && state.Value != nil {
		v, err := jser.Decode(state.Value, jser.Limits{KeepUnlisted: true})
		list, ok := v.(*jser.List)
		if err != nil || !ok {
			return errors.Join(errMessage, err)
		}
		for _, x := range list.Items {
			if mm, ok := x.(*jser.MapMessage); ok {
				e.takeTribes(m, mm)
			}
		}
	}
	hello.Type = jser.MapStart
	if _, err := e.request(e.ctx, m, hello); err != nil {
		return err
	}
	// What is here and not there.
	e.mu.Lock()
	var mine []*record
	for p := range e.recs {
		for _, r := range e.recs[p] {
			if !r.Deleted && r.Has && r.Stamp.Primary == e.self {
				mine = append(mine, r)
			}
		}
	}
	e.mu.Unlock()
	for _, r := range mine {
		if err := e.spreadTribes(e.ctx, r); err != nil {
			return err
		}
	}
	return nil
}

func (e *engine) addTribes(m channel.Member) {
	e.mu.Lock()
	if _, ok := e.members[m.ID]; ok {
		if !e.peers[m.ID] {
			e.review = true
		}
		e.peers[m.ID] = true
		e.tribes[m.ID] = m
	}
	e.mu.Unlock()
	e.wake()
}

func (e *engine) forgetTribes(id channel.UniqueID) {
	e.mu.Lock()
	delete(e.tribes, id)
	e.mu.Unlock()
	e.forget(id)
}

// nodesOf returns the members of the view with those ids.
func (e *engine) nodesOf(ids []channel.UniqueID) (nodes []*jser.Member) {
	local := e.ch.Local()
	e.mu.Lock()
	defer e.mu.Unlock()
	nodes = []*jser.Member{}
	for _, id := range ids {
		if m, ok := e.members[id]; ok {
			nodes = append(nodes, jser.MemberOf(m))
		} else if id == local.ID {
			nodes = append(nodes, jser.MemberOf(local))
		}
	}
	return nodes
}

// spreadTribes tells the Tribes' nodes of a record of this node. An error is one
// of a node that should have the value.
func (e *engine) spreadTribes(ctx context.Context, r *record) error {
	to := e.tribesMembers()
	if len(to) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, e.cfg.Timeout)
	defer cancel()
	m := e.mapMessage(jser.MapRemove)
	m.Key = []byte(r.Key)
	var failed, asked error
	switch {
	case r.Deleted:
		failed = e.post(ctx, to, m)
	case !e.cfg.Lazy:
		m.Type, m.Value, m.Primary = jser.MapCopy, r.Value, e.localMember()
		e.mu.Lock()
		ids := e.candidates()
		e.mu.Unlock()
		m.Nodes = e.nodesOf(ids)
		failed = e.post(ctx, to, m)
	default:
		m.Primary, m.Nodes = e.localMember(), e.nodesOf(r.Backups)
		for _, x := range to {
			m.Type, m.Value = jser.MapProxy, nil
			if slices.Contains(r.Backups, x.ID) {
				m.Type, m.Value = jser.MapBackup, r.Value
			}
			err := e.post(ctx, []channel.Member{x}, m)
			if m.Type == jser.MapBackup {
				failed = errors.Join(failed, err)
			}
			asked = errors.Join(asked, err)
		}
	}
	if err := errors.Join(failed, asked); err != nil {
		for _, x := range to {
			if se, ok := errors.AsType[*channel.SendError](err); !ok || slices.ContainsFunc(se.Faults, func(f channel.Fault) bool { return f.Member.ID == x.ID }) {
				e.later(x.ID)
			}
		}
	}
	if failed != nil {
		return errors.Join(ErrNotReplicated, failed)
	}
	return nil
}

// fetchTribes asks a Tribes' node for a value; nil if it has none.
func (e *engine) fetchTribes(ctx context.Context, m channel.Member, key string) ([]byte, error) {
	q := e.mapMessage(jser.MapRetrieveBackup)
	q.Key = []byte(key)
	a, err := e.request(ctx, m, q)
	if err != nil || a == nil {
		return nil, err
	}
	return a.Value, nil
}

// hear takes Tribes' messages that are no requests.
func (e *engine) hear(_ context.Context, m *channel.Message) (bool, error) {
	if m.Options.Has(channel.ByteMessage) || !jser.Stream(m.Body) || !jser.IsMapMessage(m.Body) {
		return false, nil
	}
	v, err := jser.Decode(m.Body, jser.Limits{Size: e.cfg.MaxValue + e.cfg.MaxKey + 1<<20})
	mm, ok := v.(*jser.MapMessage)
	if err != nil || !ok {
		e.refused["malformed"].Inc()
		return false, nil // perhaps another map has more luck
	}
	if string(mm.MapID) != e.name {
		return false, nil
	}
	e.foreign.Inc()
	e.takeTribes(m.From, mm)
	return true, nil
}

// stampTribes returns the stamp for a message that follows old. All who have
// the same record before it come to the same stamp, whatever their clocks say:
// one may be told of the value and the others only where it is.
func (e *engine) stampTribes(old *record, kind int32) stamp {
	switch {
	case old != nil:
		return stamp{Counter: old.Stamp.Counter + 1}
	case kind == jser.MapBackup || kind == jser.MapCopy:
		return e.stampNow(nil)
	}
	return stamp{Counter: 1} // less than that of whoever has the value
}

// takeTribes takes what a MapMessage says.
func (e *engine) takeTribes(from channel.Member, m *jser.MapMessage) {
	switch m.Type {
	case jser.MapStart, jser.MapInit, jser.MapPing:
		e.addTribes(from)
		return
	case jser.MapStop:
		e.forgetTribes(from.ID)
		return
	}
	if m.Key == nil {
		return
	}
	if len(m.Key) > e.cfg.MaxKey || len(m.Value) > e.cfg.MaxValue || len(m.Nodes) > maxBackups && e.cfg.Lazy {
		e.refused["too_large"].Inc()
		return
	}
	writer := from.ID
	if m.Primary != nil {
		writer = m.Primary.ID
	}
	key := string(m.Key)
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.get(key)
	in := &record{Key: key, Stamp: e.stampTribes(old, m.Type)}
	in.Stamp.Writer, in.Stamp.Primary = writer, writer
	if e.cfg.Lazy {
		for _, n := range m.Nodes {
			in.Backups = append(in.Backups, n.ID)
		}
	}
	switch m.Type {
	case jser.MapRemove:
		if old == nil || old.Deleted {
			return
		}
		in.Deleted = true
	case jser.MapBackup, jser.MapCopy:
		if m.Diff || m.Value == nil {
			// A diff means something to the value's class only: the whole value
			// is fetched when it is needed.
			e.refused["kind"].Inc()
			return
		}
		if old != nil && old.Has && string(old.Value) == string(m.Value) { // only the place is new
			in.Stamp.Counter, in.Stamp.Writer, in.Stamp.Epoch = old.Stamp.Counter, old.Stamp.Writer, old.Stamp.Epoch+1
			if old.Stamp.Primary == writer && slices.Equal(old.Backups, in.Backups) {
				return
			}
		}
		in.Has, in.Value = true, m.Value
	case jser.MapProxy, jser.MapNotifyMember:
		if old != nil && !old.Deleted {
			if old.Stamp.Primary == writer && slices.Equal(old.Backups, in.Backups) {
				return
			}
			// Tribes removes an entry before it writes it anew, so this is no
			// new value. It must not count as one: whoever has the value would
			// give it up for a record that has none.
			in.Stamp.Counter, in.Stamp.Writer, in.Stamp.Epoch = old.Stamp.Counter, old.Stamp.Writer, old.Stamp.Epoch+1
		}
	default:
		return
	}
	e.merge(in)
}

// serveTribes answers Tribes' requests.
func (e *engine) serveTribes(ctx context.Context, from channel.Member, b rpc.Body) (rpc.Body, error) {
	m, ok := b.Object.(*jser.MapMessage)
	if !ok || !e.cfg.Tribes {
		e.refused["malformed"].Inc()
		return rpc.Body{}, errMessage
	}
	e.foreign.Inc()
	switch m.Type {
	case jser.MapInit, jser.MapStart, jser.MapPing:
		// With INIT the other one asks who is there. It is no member yet: what
		// it were given now it would lose when it takes the state.
		if m.Type == jser.MapStart {
			e.addTribes(from)
			e.later(from.ID)
		}
		m.Primary = e.localMember()
		if m.Type == jser.MapPing {
			state, err := jser.Encode(jser.MapInitialized)
			if err != nil {
				return rpc.Body{}, err
			}
			m.Value = state
		}
		return rpc.Object(m), nil
	case jser.MapRetrieveBackup:
		e.mu.Lock()
		r := e.get(string(m.Key))
		e.mu.Unlock()
		if r == nil || !r.Has {
			return rpc.Body{}, nil
		}
		m.Value = r.Value
		return rpc.Object(m), nil
	case jser.MapState, jser.MapStateCopy:
		// A node that has just joined has no state to give yet. It waits only
		// for a moment: the other one may be what it waits for itself.
		moment := time.NewTimer(min(e.cfg.Timeout, 2*time.Second))
		defer moment.Stop()
		select {
		case <-e.ready:
		case <-moment.C:
		case <-ctx.Done():
		}
		return e.stateForTribes(m)
	}
	return rpc.Body{}, fmt.Errorf("repmap: request %d of a Tribes' map: %w", m.Type, channel.ErrBadMessage)
}

// stateForTribes answers with all entries, in one message, as Tribes wants it.
func (e *engine) stateForTribes(m *jser.MapMessage) (rpc.Body, error) {
	e.mu.Lock()
	var recs []*record
	size := 0
	for p := range e.recs {
		for _, r := range e.recs[p] {
			if !r.Deleted {
				recs = append(recs, r)
				size += 1000 + len(r.Key) + len(r.Value)
			}
		}
	}
	everybody := e.candidates()
	e.mu.Unlock()
	if size > jser.DefaultSize {
		return rpc.Body{}, fmt.Errorf("repmap: the state of %d entries is too large for one message of Tribes: %w", len(recs), channel.ErrTooLarge)
	}
	list := &jser.List{}
	for _, r := range recs {
		x := e.mapMessage(jser.MapProxy)
		x.Key = []byte(r.Key)
		if m.Type == jser.MapStateCopy {
			if !r.Has {
				continue
			}
			x.Type, x.Value = jser.MapCopy, r.Value
			x.Nodes = e.nodesOf(everybody)
		} else {
			x.Nodes = e.nodesOf(r.Backups)
		}
		if p := e.nodesOf([]channel.UniqueID{r.Stamp.Primary}); len(p) == 1 {
			x.Primary = p[0]
		}
		list.Items = append(list.Items, x)
	}
	v, err := e.cfg.Dialect.Encode(list)
	if err != nil {
		return rpc.Body{}, err
	}
	m.Value = v
	return rpc.Object(m), nil
}
