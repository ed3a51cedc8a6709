// Package staticmember is the interceptor that adds configured members to those
// that the membership finds. It imports package channel only; it must not import
// core, plugins or fx.
package staticmember

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// The bodies that Tribes' StaticMembershipInterceptor sends when it starts and
// stops.
const (
	startBody = "Local StaticMember Notification Data"
	stopBody  = "Local StaticMember Shutdown Data"
)

// leaveQuiet is how long a member that has said goodbye is left alone: it may
// still answer for a moment.
const leaveQuiet = 5 * time.Second

// Factory makes static member interceptors.
var Factory = channel.FactoryOf("staticmember", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// Interceptor announces configured members that can be reached.
type Interceptor struct {
	cfg Config
	net transport.Net
	log *zap.Logger

	contacts, failures, unresolved, started, stopped, unknown, conflicts *channel.Counter

	cancel context.CancelFunc // set by Start
	wg     sync.WaitGroup

	mu      sync.Mutex // held for announcing, so that the order is that of the decisions
	link    channel.Link
	entries []*entry
}

// entry is one configured member. Its fields are guarded by Interceptor.mu but
// for those that say otherwise.
type entry struct {
	cfg  Member           // constant
	wake chan struct{}    // capacity 1
	temp channel.UniqueID // constant; stands for an id that is not known yet

	// record is what is known of the member. Its host is invalid until the name
	// is resolved, its id zero until it is configured or learnt.
	record channel.Member
	// learns: the id is not configured.
	learns bool
	// announced: the layers above see it.
	announced bool
	// contact: it is to be contacted, not before after.
	contact bool
	after   time.Time
	// changes counts what was heard of the member, so that the result of a
	// contact that began before does not count.
	changes int
	// doubts counts the reasons to contact it, so that an answer from before
	// does not count. (A contact that fails is one itself.)
	doubts int
	// complained: a conflict has been logged.
	complained bool
}

// New makes a static member interceptor.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	if s.Net == nil && len(c.Members) > 0 {
		return nil, fmt.Errorf("staticmember: network: %w", channel.ErrNotConfigured)
	}
	x := &Interceptor{cfg: c, net: s.Net, log: s.Logger}
	m := s.Metrics
	x.contacts = m.Counter("staticmember_contacts_total", "Attempts to reach a configured member.")
	x.failures = m.Counter("staticmember_contact_failures_total", "Attempts that the member did not answer.")
	x.unresolved = m.Counter("staticmember_resolve_errors_total", "Attempts that failed because the host name could not be resolved.")
	x.started = m.Counter("staticmember_notifications_total", "Notifications of configured members.", "kind", "start")
	x.stopped = m.Counter("staticmember_notifications_total", "Notifications of configured members.", "kind", "stop")
	x.unknown = m.Counter("staticmember_unknown_total", "Notifications of nodes that are not configured, or under another id.")
	x.conflicts = m.Counter("staticmember_conflicts_total", "Attempts that were in vain because another node has the member's address.")
	for i := range c.Members {
		r := c.Members[i].record()
		x.entries = append(x.entries, &entry{
			cfg: c.Members[i], wake: make(chan struct{}, 1), temp: channel.NewUniqueID(), record: r, learns: r.ID.IsZero(), contact: true,
		})
	}
	m.Gauge("staticmember_configured", "Configured members.", func() float64 { return float64(len(x.entries)) })
	m.Gauge("staticmember_announced", "Configured members that are shown to the layers above.", func() float64 {
		x.mu.Lock()
		defer x.mu.Unlock()
		n := 0
		for _, e := range x.entries {
			if e.announced {
				n++
			}
		}
		return float64(n)
	})
	return x, nil
}

// Descriptor implements channel.Interceptor.
func (x *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:            "staticmember",
		Below:           []string{"failuredetector", "ping"},
		Wants:           []string{"failuredetector", "ping"},
		Promise:         "shows configured members that can be reached, and tries the others for ever",
		SendInterest:    &channel.Interest{MaxSize: -1},
		ReceiveInterest: &channel.Interest{MinSize: len(stopBody), MaxSize: len(startBody)},
	}
}

// LocalID implements channel.Identifier.
func (x *Interceptor) LocalID() channel.UniqueID { return x.cfg.localID() }

// Start implements channel.Starter.
func (x *Interceptor) Start(_ context.Context, l channel.Link) error {
	local := l.Local()
	if id := x.cfg.localID(); !id.IsZero() && id != local.ID {
		x.log.Warn("this node announces another unique id than its static member configuration says; nodes that list it will not know it",
			zap.Stringer("announced", local.ID), zap.Stringer("configured", id))
	}
	if a, err := netip.ParseAddr(x.cfg.Local.Host); err == nil && a.Unmap() != local.Host.Unmap() || x.cfg.Local.Port != 0 && x.cfg.Local.Port != local.Port {
		x.log.Warn("this node announces another address than its static member configuration says; nodes that list it will not know it",
			zap.Stringer("announced", local.Addr()), zap.String("configured", fmt.Sprintf("%s:%d", x.cfg.Local.Host, x.cfg.Local.Port)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	x.mu.Lock()
	x.link, x.cancel = l, cancel
	x.mu.Unlock()
	for _, e := range x.entries {
		x.wg.Go(func() { x.watch(ctx, l, e) })
	}
	return nil
}

// Stop implements channel.Stopper: it says goodbye to the members that are
// there.
func (x *Interceptor) Stop(ctx context.Context) error {
	if x.cancel == nil {
		return nil
	}
	x.cancel()
	x.wg.Wait()
	x.mu.Lock()
	l := x.link
	x.link = nil
	var to []channel.Member
	for _, e := range x.entries {
		if e.announced {
			to = append(to, e.record)
		}
	}
	x.mu.Unlock()
	if l == nil || len(to) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, x.cfg.Timeout)
	defer cancel()
	_ = l.Send(ctx, message(l, to, stopBody)) // who is gone need not know
	return nil
}

func message(l channel.Link, to []channel.Member, body string) *channel.Message {
	return &channel.Message{
		ID: channel.NewUniqueID(), From: l.Local(), To: to, Options: channel.SendAck, Time: time.Now().UnixMilli(), Body: []byte(body),
	}
}

// watch is the goroutine that contacts one member when that is due.
func (x *Interceptor) watch(ctx context.Context, l channel.Link, e *entry) {
	pause := x.cfg.MinRetry
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-e.wake:
			pause = x.cfg.MinRetry
		case <-ctx.Done():
			return
		}
		due, wait := x.due(e)
		switch {
		case !due:
			timer.Reset(time.Duration(1<<63 - 1)) // until it wakes
			continue
		case wait > 0:
			timer.Reset(wait)
			continue
		}
		switch done, self := x.contact(ctx, l, e); {
		case self:
			return
		case done:
			pause = x.cfg.MinRetry
			timer.Reset(0)
		default:
			timer.Reset(pause)
			pause = min(2*pause, x.cfg.MaxRetry)
		}
	}
}

// due reports whether a member is to be contacted, and how long to wait before.
func (x *Interceptor) due(e *entry) (bool, time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return e.contact, time.Until(e.after)
}

// contact tells a member that this node is there, and so finds out whether it
// is. It reports whether there is nothing more to do, and whether the member is
// this node.
func (x *Interceptor) contact(ctx context.Context, l channel.Link, e *entry) (done, self bool) {
	ctx, cancel := context.WithTimeout(ctx, x.cfg.Timeout)
	defer cancel()
	host, err := x.resolve(ctx, e)
	if err != nil {
		if ctx.Err() == nil {
			x.unresolved.Inc()
		}
		return false, false
	}
	x.mu.Lock()
	if e.record.Host != host && !e.announced {
		e.record.Host = host
	}
	to, before, doubts := e.record, e.changes, e.doubts
	x.mu.Unlock()
	if to.Addr() == l.Local().Addr() || to.ID == l.Local().ID {
		return true, true
	}
	if to.ID.IsZero() {
		to.ID = e.temp
	}
	x.contacts.Inc()
	err = l.Send(ctx, message(l, []channel.Member{to}, startBody))
	x.mu.Lock()
	defer x.mu.Unlock()
	if err != nil {
		x.failures.Inc()
		if e.announced && e.changes == before && !l.View().Has(e.record) {
			e.announced = false
			_ = l.Announce(ctx, channel.MemberEvent{Kind: channel.MemberLost, Member: e.record, Err: fmt.Errorf("staticmember: %w", err)})
			if e.learns {
				e.record.ID = channel.UniqueID{}
			}
		}
		return false, false
	}
	if e.changes != before || e.doubts != doubts {
		return !e.contact, false
	}
	if e.record.ID.IsZero() {
		return false, false // it has to say who it is
	}
	if other, taken := occupant(l.View(), e.record); taken {
		x.conflict(e, other)
		return false, false
	}
	e.contact = false
	x.announce(l, e)
	return true, false
}

// announce shows a member to the layers above; x.mu is held.
func (x *Interceptor) announce(l channel.Link, e *entry) {
	e.announced, e.complained = true, false
	_ = l.Announce(context.Background(), channel.MemberEvent{Kind: channel.MemberAdded, Member: e.record})
}

// conflict notes that another node has the address of a member; x.mu is held.
func (x *Interceptor) conflict(e *entry, other channel.Member) {
	x.conflicts.Inc()
	if !e.complained {
		e.complained = true
		x.log.Warn("a configured member is not shown: another node has its address; correct its unique_id in the configuration, or leave it out",
			zap.Stringer("address", e.record.Addr()), zap.Stringer("configured", e.record.ID), zap.Stringer("found", other.ID))
	}
}

// occupant returns the member of a view that has the address of m and is
// somebody else.
func occupant(v channel.View, m channel.Member) (channel.Member, bool) {
	for _, o := range v.Members {
		if !o.Is(m) && o.Addr() == m.Addr() {
			return o, true
		}
	}
	return channel.Member{}, false
}

// resolve returns the address of a member. A look-up cannot be cancelled: what
// takes longer than ctx goes on in a goroutine that ends with it.
func (x *Interceptor) resolve(ctx context.Context, e *entry) (netip.Addr, error) {
	if a, err := netip.ParseAddr(e.cfg.Host); err == nil {
		return a.Unmap(), nil
	}
	type answer struct {
		addr netip.Addr
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		a, err := x.net.ResolveUDPAddr("udp", e.cfg.Host+":"+strconv.Itoa(e.cfg.Port))
		if err != nil {
			got <- answer{err: err}
			return
		}
		got <- answer{addr: a.AddrPort().Addr().Unmap()}
	}()
	select {
	case a := <-got:
		return a.addr, a.err
	case <-ctx.Done():
		return netip.Addr{}, ctx.Err()
	}
}

// HandleReceive implements channel.ReceiveHandler: notifications end here.
func (x *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	switch {
	case len(m.Body) == len(startBody) && string(m.Body) == startBody:
		x.heard(m.From, true)
		return nil
	case len(m.Body) == len(stopBody) && string(m.Body) == stopBody:
		x.heard(m.From, false)
		return nil
	}
	return l.Deliver(ctx, m)
}

// heard takes a notification.
func (x *Interceptor) heard(from channel.Member, start bool) {
	from.Command = ""
	from.Host = from.Host.Unmap()
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.link
	if l == nil {
		return
	}
	e := x.sender(from)
	if e == nil || from.ID.IsZero() || from.ID == l.Local().ID {
		x.unknown.Inc()
		return
	}
	e.changes++
	if !start {
		x.stopped.Inc()
		x.left(l, e, from)
		return
	}
	x.started.Inc()
	fresh := !e.announced || e.record.ID != from.ID
	e.record = from
	x.announce(l, e)
	if fresh { // it may not know this node yet
		e.contact, e.after = true, time.Time{}
		e.awake()
	}
}

// left takes a goodbye; x.mu is held.
func (x *Interceptor) left(l channel.Link, e *entry, m channel.Member) {
	if e.announced || l.View().Has(m) {
		m.Command = channel.ShutdownCommand
		_ = l.Announce(context.Background(), channel.MemberEvent{Kind: channel.MemberLeft, Member: m})
	}
	e.gone()
}

// gone notes that the member is not there, and lets it be tried again later;
// Interceptor.mu is held.
func (e *entry) gone() {
	e.announced = false
	e.changes++
	if e.learns {
		e.record.ID = channel.UniqueID{}
	}
	e.contact, e.after = true, time.Now().Add(leaveQuiet)
	e.awake()
}

// check has the member contacted at once. A contact that has begun before does
// not count; Interceptor.mu is held.
func (e *entry) check() {
	e.doubts++
	e.contact, e.after = true, time.Time{}
	e.awake()
}

func (e *entry) awake() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// sender returns the configured member that a notification is from; x.mu is
// held. Host, port and, if it is configured, the id must be right.
func (x *Interceptor) sender(from channel.Member) *entry {
	for _, e := range x.entries {
		if e.record.Addr() == from.Addr() && (e.learns || e.record.ID == from.ID) {
			return e
		}
	}
	return nil
}

// HandleMember implements channel.MemberHandler: a configured member that the
// membership loses, or that a message does not reach, is contacted.
func (x *Interceptor) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, e := range x.entries {
		if !e.record.Is(ev.Member) {
			if ev.Kind == channel.MemberAdded && e.announced && e.record.Addr() == ev.Member.Addr() {
				e.gone() // another one answers there; the new one takes its place above
				if e.learns {
					e.record.ID = ev.Member.ID
					e.announced, e.contact = true, false
				}
			}
			continue
		}
		switch {
		case ev.Kind == channel.MemberAdded, ev.Kind == channel.MemberUpdated:
			e.record, e.announced = ev.Member, true
			e.changes++
		case ev.Final():
			e.gone()
		case ev.Kind == channel.MemberLost && e.announced:
			e.check()
			return nil // the contact decides
		case ev.Kind == channel.MemberSuspected:
			e.check()
		}
	}
	return l.Announce(ctx, ev)
}
