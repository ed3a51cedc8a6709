package staticservice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// Membership finds the configured members. It implements channel.Membership,
// channel.Attacher and channel.Listener.
type Membership struct {
	cfg Config
	id  []byte // of the membership, in every message
	net transport.Net
	log *zap.Logger

	requests, failures, heardOf, refused, dropped, malformed, lost *channel.Counter

	ch      *channel.Channel
	replies chan struct{} // a slot for each reply that is being sent

	ctx    context.Context // of all goroutines; set by Start
	cancel context.CancelFunc
	wg     sync.WaitGroup // added to with mu held, not after stopped

	// telling is held by who tells the sink, a slot of one.
	telling chan struct{}

	mu      sync.Mutex // never held while blocking
	sink    channel.MemberSink
	stopped bool
	known   map[channel.UniqueID]*life
	pending map[channel.UniqueID]chan channel.Member // requests by uuid
	news    []channel.MemberEvent                    // not yet told to the sink
	contact []*contact
}

// life is what is known of a member.
type life struct {
	m     channel.Member
	heard time.Time
}

// contact is one configured member.
type contact struct {
	cfg  Member
	temp channel.UniqueID // stands for an id that is not known yet
	wake chan struct{}    // capacity 1: somebody at its address was heard
	addr netip.AddrPort   // guarded by Membership.mu; what the name stood for last
}

// New returns a membership that has not started. Counters:
// staticservice_requests_total, staticservice_failures_total,
// staticservice_heard_total, staticservice_refused_total,
// staticservice_replies_dropped_total, staticservice_malformed_total and
// staticservice_lost_total.
func New(c Config, s channel.Settings) (*Membership, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Net == nil {
		return nil, fmt.Errorf("staticservice: network: %w", channel.ErrNotConfigured)
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	count := s.Metrics.Counter
	x := &Membership{
		cfg: c, id: []byte(c.Channel + "-StaticMembership"), net: s.Net, log: s.Logger,
		requests:  count("staticservice_requests_total", "Starts and pings sent."),
		failures:  count("staticservice_failures_total", "Starts and pings without a reply."),
		heardOf:   count("staticservice_heard_total", "Messages in which a member said that it is there."),
		refused:   count("staticservice_refused_total", "Messages that name another member than the one that sent them, or one too many."),
		dropped:   count("staticservice_replies_dropped_total", "Requests that were not answered, because too many came at once or sending failed."),
		malformed: count("staticservice_malformed_total", "Messages that are none of this protocol, although they hold its id."),
		lost:      count("staticservice_lost_total", "Members that were silent for too long or could not be reached."),
		replies:   make(chan struct{}, maxReplies),
		telling:   make(chan struct{}, 1),
		known:     map[channel.UniqueID]*life{},
		pending:   map[channel.UniqueID]chan channel.Member{},
	}
	for _, m := range c.Members {
		x.contact = append(x.contact, &contact{cfg: m, temp: channel.NewUniqueID(), wake: make(chan struct{}, 1)})
	}
	return x, nil
}

// Attach implements channel.Attacher.
func (x *Membership) Attach(ch *channel.Channel) {
	x.ch = ch
	ch.Listen(x)
}

// Start implements channel.Membership. It does not wait for the others.
func (x *Membership) Start(_ context.Context, _ channel.Member, known []channel.Member, sink channel.MemberSink) error {
	if x.ch == nil {
		return errors.New("staticservice: start: not attached to a channel: it works only in the process of its node, given to channel.Config")
	}
	x.ctx, x.cancel = context.WithCancel(context.Background())
	now := time.Now()
	x.mu.Lock()
	x.sink, x.stopped = sink, false
	clear(x.known)
	for _, m := range known {
		x.known[m.ID] = &life{m, now}
	}
	x.mu.Unlock()
	for _, c := range x.contact {
		x.wg.Go(func() { x.watch(c) })
	}
	x.wg.Go(x.expire)
	return nil
}

// Update implements channel.Membership: the others learn of the new record by
// the next ping.
func (x *Membership) Update(context.Context, channel.Member) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, c := range x.contact {
		c.awake()
	}
	return nil
}

// Stop implements channel.Membership: it says goodbye to the members that are
// there.
func (x *Membership) Stop(ctx context.Context) error {
	x.mu.Lock()
	if x.sink == nil || x.stopped {
		x.mu.Unlock()
		return nil
	}
	x.stopped = true
	var to []channel.Member
	for _, l := range x.known {
		to = append(to, l.m)
	}
	x.mu.Unlock()
	x.cancel()
	x.wg.Wait()
	if len(to) == 0 {
		return nil
	}
	local := x.ch.Local()
	local.Command = channel.ShutdownCommand
	body, err := jser.Encode(x.message(jser.MemberStop, local))
	if err != nil {
		return fmt.Errorf("staticservice: stop: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, x.cfg.Timeout)
	defer cancel()
	_ = x.ch.Send(ctx, to, body, channel.ObjectStream|channel.UseAck) // who is gone need not know
	return nil
}

func (x *Membership) message(kind int32, m channel.Member) *jser.MemberMessage {
	return &jser.MemberMessage{Type: kind, MembershipID: x.id, Member: &jser.Member{Member: m, Static: true}}
}

// watch is the goroutine that asks one configured member again and again.
func (x *Membership) watch(c *contact) {
	pause := x.cfg.PingInterval
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-c.wake:
		case <-x.ctx.Done():
			return
		}
		switch there, self := x.ask(c); {
		case self:
			return
		case there:
			pause = x.cfg.PingInterval
			timer.Reset(pause)
		default:
			timer.Reset(pause)
			pause = min(2*pause, max(x.cfg.MaxRetry, x.cfg.PingInterval))
		}
	}
}

// ask sends one request and waits for the reply. It reports whether one has
// come, and whether the member is this node.
func (x *Membership) ask(c *contact) (there, self bool) {
	ctx, cancel := context.WithTimeout(x.ctx, x.cfg.Timeout)
	defer cancel()
	addr, err := x.resolve(ctx, c.cfg)
	if err != nil {
		x.failures.Inc()
		return false, false
	}
	local := x.ch.Local()
	if addr == local.Addr() {
		return true, true
	}
	to, kind := channel.Member{ID: c.temp, Host: addr.Addr(), Port: int(addr.Port()), SecurePort: -1, UDPPort: -1}, jser.MemberStart
	x.mu.Lock()
	c.addr = addr
	for _, l := range x.known {
		if l.m.Addr() == addr {
			to, kind = l.m, jser.MemberPing
		}
	}
	x.mu.Unlock()
	uuid, reply := channel.NewUniqueID(), make(chan channel.Member, 1)
	body, err := jser.Encode(&jser.RPCMessage{UUID: uuid[:], RPCID: x.id, Message: x.message(kind, local)})
	if err != nil {
		x.log.Error("a request of the static membership cannot be written", zap.Error(err))
		return false, false
	}
	x.mu.Lock()
	x.pending[uuid] = reply
	x.mu.Unlock()
	defer func() {
		x.mu.Lock()
		delete(x.pending, uuid)
		x.mu.Unlock()
	}()
	x.requests.Inc()
	if err = x.ch.Send(ctx, []channel.Member{to}, body, channel.ObjectStream|channel.UseAck); err == nil {
		select {
		case <-reply:
			return true, false
		case <-ctx.Done():
			err = errors.New("staticservice: no reply in time")
		}
	} else if x.ctx.Err() == nil {
		// It cannot be reached: no need to wait until it expires.
		x.gone(to.ID, channel.MemberEvent{Kind: channel.MemberLost, Err: err})
	}
	if x.ctx.Err() == nil {
		x.failures.Inc()
		x.log.Debug("a configured member does not answer", zap.Stringer("address", addr), zap.Error(err))
	}
	return false, false
}

// resolve returns the address of a member. A look-up cannot be cancelled: what
// takes longer than ctx goes on in a goroutine that ends with it.
func (x *Membership) resolve(ctx context.Context, m Member) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(m.Host); err == nil {
		return netip.AddrPortFrom(a.Unmap(), uint16(m.Port)), nil
	}
	type answer struct {
		addr netip.AddrPort
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		a, err := x.net.ResolveUDPAddr("udp", m.Host+":"+strconv.Itoa(m.Port))
		if err != nil {
			got <- answer{err: err}
			return
		}
		p := a.AddrPort()
		got <- answer{addr: netip.AddrPortFrom(p.Addr().Unmap(), p.Port())}
	}()
	select {
	case a := <-got:
		return a.addr, a.err
	case <-ctx.Done():
		return netip.AddrPort{}, ctx.Err()
	}
}

// expire is the goroutine that loses silent members.
func (x *Membership) expire() {
	tick := time.NewTicker(x.cfg.PingInterval)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-tick.C:
		case <-x.ctx.Done():
			return
		}
		now := time.Now()
		x.mu.Lock()
		if now.Sub(last) > x.cfg.Expiration/2 {
			for _, l := range x.known {
				l.heard = now // this node was not listening itself
			}
		}
		var silent []channel.UniqueID
		for id, l := range x.known {
			if now.Sub(l.heard) > x.cfg.Expiration {
				silent = append(silent, id)
			}
		}
		x.mu.Unlock()
		last = now
		for _, id := range silent {
			x.gone(id, channel.MemberEvent{Kind: channel.MemberLost})
		}
		x.tell()
	}
}

// gone takes a member out.
func (x *Membership) gone(id channel.UniqueID, ev channel.MemberEvent) {
	x.mu.Lock()
	l := x.known[id]
	if l != nil {
		delete(x.known, id)
		ev.Member = l.m
		x.news = append(x.news, ev)
		if ev.Kind == channel.MemberLost {
			x.lost.Inc()
		}
	}
	x.mu.Unlock()
	x.tell()
}

// heard takes a member that said that it is there.
func (x *Membership) heard(m channel.Member) {
	m.Command = ""
	x.mu.Lock()
	l := x.known[m.ID]
	if m.ID.IsZero() || m.ID == x.ch.Local().ID || l == nil && len(x.known) >= maxMembers {
		x.mu.Unlock()
		x.refused.Inc()
		return
	}
	x.heardOf.Inc()
	now := time.Now()
	if l == nil {
		for id, other := range x.known { // a new incarnation takes the place of the old one
			if other.m.Addr() == m.Addr() {
				delete(x.known, id)
			}
		}
		l = &life{}
		x.known[m.ID] = l
		for _, c := range x.contact {
			if c.addr == m.Addr() {
				c.awake() // it may not know this node yet
			}
		}
	}
	l.m, l.heard = m, now
	x.news = append(x.news, channel.MemberEvent{Kind: channel.MemberAdded, Member: m})
	x.mu.Unlock()
	x.tell()
}

func (c *contact) awake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// tell hands the news to the sink, one after the other and in order, without a
// lock: the sink may block for a moment.
func (x *Membership) tell() {
	for {
		select {
		case x.telling <- struct{}{}:
		default:
			return // whoever tells looks again when it has finished
		}
		for {
			x.mu.Lock()
			news := x.news
			x.news = nil
			x.mu.Unlock()
			if len(news) == 0 {
				break
			}
			for _, ev := range news {
				x.sink.Observe(ev)
			}
		}
		<-x.telling
		x.mu.Lock()
		more := len(x.news) > 0
		x.mu.Unlock()
		if !more {
			return
		}
	}
}

// Handle implements channel.Listener: it takes the messages of this membership
// and no others.
func (x *Membership) Handle(_ context.Context, m *channel.Message) (bool, error) {
	if m.Options.Has(channel.ByteMessage) || len(m.Body) > maxBody || !bytes.Contains(m.Body, x.id) {
		return false, nil
	}
	v, err := jser.Decode(m.Body, jser.Limits{Size: maxBody, KeepUnlisted: true})
	if err != nil {
		return false, nil // perhaps somebody else can read it
	}
	switch v := v.(type) {
	case *jser.RPCMessage:
		if !bytes.Equal(v.RPCID, x.id) {
			return false, nil
		}
		x.called(m.From, v)
		return true, nil
	case *jser.MemberMessage:
		if !bytes.Equal(v.MembershipID, x.id) {
			return false, nil
		}
		if !x.about(m.From, v) {
			return true, nil
		}
		if v.Type == jser.MemberStop {
			from := m.From
			x.gone(from.ID, channel.MemberEvent{Kind: channel.MemberLeft})
		}
		return true, nil
	}
	return false, nil
}

// about reports whether a message speaks of the member that has sent it.
func (x *Membership) about(from channel.Member, v *jser.MemberMessage) bool {
	ok := v.Member != nil && v.Member.ID == from.ID && v.Member.Addr() == from.Addr()
	if !ok {
		x.refused.Inc()
	}
	return ok
}

// called takes an RPC message: a request, or the reply to one.
func (x *Membership) called(from channel.Member, v *jser.RPCMessage) {
	x.mu.Lock()
	stopped := x.sink == nil || x.stopped
	x.mu.Unlock()
	if stopped || v.NoChannel {
		return
	}
	mm, ok := v.Message.(*jser.MemberMessage)
	if !ok || !bytes.Equal(mm.MembershipID, x.id) || mm.Type != jser.MemberStart && mm.Type != jser.MemberPing {
		x.malformed.Inc()
		return
	}
	if !x.about(from, mm) {
		return
	}
	x.heard(from)
	if !v.Reply {
		x.answer(from, v.UUID, mm.Type)
		return
	}
	var uuid channel.UniqueID
	if copy(uuid[:], v.UUID); len(v.UUID) != len(uuid) {
		return
	}
	x.mu.Lock()
	waiting := x.pending[uuid]
	delete(x.pending, uuid)
	x.mu.Unlock()
	if waiting != nil {
		waiting <- from
	}
}

// answer replies to a request, in a goroutine: sending may block.
func (x *Membership) answer(to channel.Member, uuid []byte, kind int32) {
	select {
	case x.replies <- struct{}{}:
	default:
		x.dropped.Inc()
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.stopped {
		<-x.replies
		return
	}
	x.wg.Go(func() {
		defer func() { <-x.replies }()
		body, err := jser.Encode(&jser.RPCMessage{Reply: true, UUID: uuid, RPCID: x.id, Message: x.message(kind, x.ch.Local())})
		if err == nil {
			ctx, cancel := context.WithTimeout(x.ctx, x.cfg.Timeout)
			defer cancel()
			err = x.ch.Send(ctx, []channel.Member{to}, body, channel.ObjectStream)
		}
		if err != nil && x.ctx.Err() == nil {
			x.dropped.Inc()
		}
	})
}
