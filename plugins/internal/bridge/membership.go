package bridge

import (
	"context"
	"maps"
	"slices"
	"sync"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// Membership is the client of a membership plugin; it implements
// channel.Membership.
type Membership struct {
	client
	sink channel.MemberSink // set by Start

	mu    sync.Mutex
	local channel.Member                      // guarded by mu
	known map[channel.UniqueID]channel.Member // guarded by mu: reported and not lost
}

// NewMembership returns the client of the plugin behind life.
func NewMembership(name string, life Lifecycle, log *zap.Logger) *Membership {
	return &Membership{
		client: newClient("membership/"+name, life, log),
		known:  map[channel.UniqueID]channel.Member{},
	}
}

// Start implements channel.Membership.
func (m *Membership) Start(ctx context.Context, local channel.Member, known []channel.Member, sink channel.MemberSink) error {
	m.mu.Lock()
	m.sink, m.local = sink, local
	clear(m.known)
	for _, k := range known {
		m.known[k.ID] = k
	}
	m.mu.Unlock()
	return m.life.Start(ctx, m)
}

// Begin implements Client. A successor knows the members that were there, so
// that it can miss them: the last view stands until it does.
func (m *Membership) Begin(ctx context.Context, conn *frame.Conn, _ int) error {
	m.mu.Lock()
	b := appendMember(nil, m.local)
	known := slices.Collect(maps.Values(m.known))
	m.mu.Unlock()
	slices.SortFunc(known, func(a, b channel.Member) int { return slices.Compare(a.ID[:], b.ID[:]) })
	if err := m.start(ctx, conn, appendMembers(b, known)); err != nil {
		return err
	}
	m.calls.Attach(conn)
	return nil
}

// Update implements channel.Membership.
func (m *Membership) Update(ctx context.Context, local channel.Member) error {
	m.mu.Lock()
	m.local = local
	m.mu.Unlock()
	_, err := m.outcome(m.calls.Call(ctx, kindLocal, 0, appendMember(nil, local)))
	return err
}

// HandleCall implements frame.Handler: a membership has nothing to ask for.
func (m *Membership) HandleCall(r *frame.Request) { refuse(r) }

// HandleEvent implements frame.Handler.
func (m *Membership) HandleEvent(f frame.Frame) error {
	if f.Kind != kindObserve {
		return nil
	}
	d := decoder{b: f.Payload, in: m.in}
	ev := channel.MemberEvent{Kind: channel.MemberEventKind(f.Options), Member: d.member()}
	if len(d.b) > 0 {
		ev.Err = d.error(0)
	}
	if d.err != nil {
		return d.err
	}
	m.mu.Lock()
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		m.known[ev.Member.ID] = ev.Member
	case channel.MemberLost, channel.MemberLeft:
		delete(m.known, ev.Member.ID)
	}
	tooMany := len(m.known) > maxMembers
	if tooMany {
		delete(m.known, ev.Member.ID)
	}
	m.mu.Unlock()
	if tooMany {
		m.log.Warn("the membership reports more members than a group may have; one is ignored",
			zap.Int("bound", maxMembers), zap.Stringer("member", ev.Member))
		return nil
	}
	m.life.Count()
	m.sink.Observe(ev)
	return nil
}

// membershipServer serves a channel.Membership to a node.
type membershipServer struct {
	server
	impl channel.Membership
}

// HandleCall implements frame.Handler.
func (s *membershipServer) HandleCall(r *frame.Request) {
	switch r.Kind {
	case kindLocal:
		s.lane.put(r) // the last record must win
	case kindStart:
		r.Go(s.start)
	case kindStop:
		r.Go(s.stop)
	default:
		refuse(r)
	}
}

func (s *membershipServer) start(r *frame.Request) {
	d := decoder{b: r.Payload, in: s.in}
	local, known := d.member(), d.members()
	if d.err != nil {
		answer(r, d.err)
		return
	}
	answer(r, s.impl.Start(r.Context(), local, known, s))
}

func (s *membershipServer) serve(_ context.Context, r *frame.Request) {
	d := decoder{b: r.Payload, in: s.in}
	local := d.member()
	if d.err != nil {
		answer(r, d.err)
		return
	}
	answer(r, s.impl.Update(r.Context(), local))
}

// Observe implements channel.MemberSink.
func (s *membershipServer) Observe(ev channel.MemberEvent) {
	b := appendMember(nil, ev.Member)
	if ev.Err != nil {
		b = appendError(b, ev.Err, 0)
	}
	if err := s.conn().Notify(kindObserve, uint32(ev.Kind), b); err != nil {
		s.log.Warn("a membership event did not reach the node",
			zap.Stringer("member", ev.Member), zap.Stringer("event", ev.Kind), zap.Error(err))
	}
}
