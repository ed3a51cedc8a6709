package events

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// Config is the configuration of a relay. Zero values are the defaults.
type Config struct {
	// Queue bounds the events that wait for one member. While so many wait, what
	// would make another one waits for up to a second; twice as many are never
	// kept (session_events_unsent_total): the member is told then which sessions
	// there are. Default 65,536.
	Queue int
	// MaxSessions bounds the sessions that are noted per context; those beyond
	// are told, but their end perhaps twice or not at all. Default 2,000,000.
	MaxSessions int
}

const (
	// sendTimeout bounds one attempt to send.
	sendTimeout = 10 * time.Second
	// retryMin and retryMax bound the pause after a failed attempt.
	retryMin = 50 * time.Millisecond
	retryMax = 2 * time.Second
	// patience is how long Room waits.
	patience = time.Second
	// keepEnded is how long a relay remembers at least that a session has ended,
	// and maxEnded how many per context.
	keepEnded = time.Hour
	maxEnded  = 65_536
	// grace is how long a session whose node has died is left to those who use
	// it, before somebody looks for it; turn is how long others then wait for
	// the one whose turn it is; and pace how many are looked for in a second.
	grace = 5 * time.Second
	turn  = 15 * time.Second
	pace  = 500
	// overtaking is by how much the manager's changes may be faster than events.
	overtaking = 4 * time.Second
)

// Relay implements table.Relay for all tables of a node.
type Relay struct {
	cfg     Config
	cluster *core.Cluster
	tables  func(contextName string) *table.Table
	log     *zap.Logger
	m       metrics

	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup
	undo []func()

	// mu guards all below. It may be taken when locks of a table are held.
	mu       sync.Mutex
	local    channel.Member
	topics   map[string]*topic
	peers    map[channel.UniqueID]*peer
	asks     uint64 // number of the latest ask
	freed    chan struct{}
	hurried  bool
	stopping bool
	holding  bool // a timer runs for what is held
}

type metrics struct{ sent, received, repeated, unsent, failed, bad, waits *channel.Counter }

// topic is what the relay knows of one context.
type topic struct {
	wants core.SessionEventKind // of the listeners here
	asked core.SessionEventKind // of all other nodes
	// known are the living sessions by id, ended those that ended lately. Both
	// are kept only if anything is wanted.
	known        map[string]entry
	ended, older map[string]ending
	turned       time.Time
	// held are ends and renewals that came with the manager's changes, by the id
	// that is over: the node that made them tells it, too, after what it did
	// before. Those that it does not tell in time are told then.
	held map[string]held
}

type held struct {
	core.SessionEvent
	life  time.Duration
	until time.Time
}

// ending is what became of an id: next is the id that follows it, or empty.
type ending struct {
	next   string
	reason session.EndKind
}

// entry is where a living session is.
type entry struct {
	owner *peer // nil is this node
	due   int64 // when it would expire if nobody had used it since, ms; 0 is never
	round uint64
}

// nobody owns the sessions that a member does not have any more.
var nobody = &peer{left: true}

// peer is another member of the view.
type peer struct {
	member channel.Member
	wake   chan struct{}
	gone   chan struct{} // closed when it has left

	// asked is what it wants, by context, and number that of its ask; first is
	// how many events it has been sent for that.
	asked  map[string]core.SessionEventKind
	number uint64
	first  uint64
	list   bool     // the list of living sessions is due
	living []queued // what is left of it; goes before the queue
	queue  []queued
	// dropped are events that did not find room, since the last list.
	dropped int

	// asking is the number of the ask that it has been sent, told whether it has
	// it; next is how many events have come for that; round counts the lists.
	asking uint64
	told   bool
	next   uint64
	round  uint64

	left bool // the view; nobody owns its sessions
}

type queued struct {
	context string
	event
}

// lasting are the kinds without which nobody can know which sessions there are.
const lasting = core.SessionCreated | core.SessionDestroyed | core.SessionRenewed

// New makes a relay for the nodes of cluster. tables finds the table of a
// context; it is not called before Start.
func New(c Config, cluster *core.Cluster, tables func(string) *table.Table, s channel.Settings) *Relay {
	c.Queue = cmp.Or(c.Queue, 65_536)
	c.MaxSessions = cmp.Or(c.MaxSessions, 2_000_000)
	counter := func(name, help string) *channel.Counter {
		return s.Metrics.Counter("session_events_"+name+"_total", help)
	}
	r := &Relay{
		cfg: c, cluster: cluster, tables: tables, log: s.Logger,
		topics: map[string]*topic{}, peers: map[channel.UniqueID]*peer{},
		m: metrics{
			sent:     counter("sent", "Session events sent to other nodes; one event to two nodes is two."),
			received: counter("received", "Session events received from other nodes."),
			repeated: counter("repeated", "Session events received that had been told already."),
			unsent:   counter("unsent", "Session events not sent to a member, because too many waited for it."),
			failed:   counter("send_failures", "Messages with session events that have to be sent again."),
			bad:      counter("bad_messages", "Messages about session events that cannot be read."),
			waits:    counter("send_waits", "Times that something waited for room in the queue to a member."),
		},
	}
	if r.log == nil {
		r.log = zap.NewNop()
	}
	s.Metrics.Gauge("session_events_known", "Living sessions of other nodes and this one that are noted for listeners.", func() (n float64) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, t := range r.topics {
			n += float64(len(t.known))
		}
		return n
	})
	r.life, r.end = context.WithCancel(context.Background())
	return r
}

// Start begins to talk to the other nodes, once the channel has been started or
// before.
func (r *Relay) Start(context.Context) error {
	unbind, err := r.cluster.Bind(Subject, r.handle)
	if err != nil {
		return err
	}
	unwatch := r.cluster.Channel().Watch(func(v channel.View, _ channel.MemberEvent) { r.setView(v) })
	r.undo = append(r.undo, unwatch, unbind)
	return nil
}

// Stop sends what is waiting, as far as ctx allows, and ends. It works twice and
// without Start.
func (r *Relay) Stop(ctx context.Context) error {
	r.mu.Lock()
	r.stopping = true
	for _, p := range r.peers {
		p.poke()
	}
	r.mu.Unlock()
	done := make(chan struct{})
	go func() { r.wg.Wait(); close(done) }() // ends with the peers' goroutines, at the latest after r.end
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		err = fmt.Errorf("events: not all session events have been sent: %w", context.Cause(ctx))
	}
	r.end()
	<-done
	for _, undo := range r.undo {
		undo()
	}
	r.undo = nil
	return err
}

func (p *peer) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (r *Relay) topic(contextName string) *topic {
	t := r.topics[contextName]
	if t == nil {
		t = &topic{}
		r.topics[contextName] = t
	}
	return t
}

// Wants implements table.Relay. The table's lock is held that Living needs, so
// the sessions that are there are noted later.
func (r *Relay) Wants(contextName string, kinds core.SessionEventKind) {
	if kinds != 0 {
		kinds |= lasting
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.topic(contextName)
	before := t.wants
	if before == kinds || r.stopping {
		return
	}
	t.wants = kinds
	switch {
	case kinds == 0:
		t.known, t.ended, t.older, t.held = nil, nil, nil, nil
	case before == 0:
		t.known, t.ended, t.turned = map[string]entry{}, map[string]ending{}, time.Now()
		t.held = map[string]held{}
		r.wg.Go(func() { r.noteLiving(contextName) })
	}
	r.asks++
	for _, p := range r.peers {
		p.told = false
		p.poke()
	}
}

// noteLiving tells of the sessions that were in the table before anybody
// listened.
func (r *Relay) noteLiving(contextName string) {
	tab := r.tables(contextName)
	for _, a := range tab.Living(contextName) {
		e := core.SessionEvent{Kind: core.SessionCreated, Key: a.Key, Existing: true, Time: time.Now()}
		tab.Deliver(contextName, func(tell func(core.SessionEvent, bool)) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if t := r.topic(contextName); t.wants != 0 && r.note(t, &e, nil, a.Life) {
				tell(e, false)
			}
		})
	}
}

// Asked implements table.Relay.
func (r *Relay) Asked(contextName string) core.SessionEventKind {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.topic(contextName).asked
}

// Tell implements table.Relay.
func (r *Relay) Tell(e core.SessionEvent, life time.Duration, deliver func(core.SessionEvent)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.topic(e.Key.Context)
	if t.wants != 0 && !e.Local && !r.stopping {
		r.hold(t, e, life)
		return
	}
	if t.wants != 0 && !r.note(t, &e, nil, life) {
		return
	}
	deliver(e)
	if e.Local && t.asked&e.Kind != 0 {
		r.pass(e.Key.Context, toWire(&e, life))
	}
}

// hold keeps an event until the node that made it tells it, for overtaking at
// most.
func (r *Relay) hold(t *topic, e core.SessionEvent, life time.Duration) {
	id := over(&e)
	if _, ended := t.latest(id); ended {
		return
	}
	t.held[id] = held{e, life, time.Now().Add(overtaking)}
	if !r.holding {
		r.holding = true
		r.wg.Go(r.letGo)
	}
}

// over returns the id that is over with an event that ends one, or empty.
func over(e *core.SessionEvent) string {
	switch e.Kind {
	case core.SessionDestroyed:
		return e.Key.ID
	case core.SessionRenewed:
		return e.Previous.ID
	}
	return ""
}

// letGo tells what was held for long enough, until nothing is held. It is passed
// on, too: the node that made it may have gone before it told anybody.
func (r *Relay) letGo() {
	for {
		timer := time.NewTimer(overtaking / 4)
		select {
		case <-timer.C:
		case <-r.life.Done():
			timer.Stop()
			return
		}
		now := time.Now()
		var due []held
		left := 0
		r.mu.Lock()
		for _, t := range r.topics {
			for id, h := range t.held {
				if h.until.After(now) && !r.stopping {
					left++
					continue
				}
				delete(t.held, id)
				due = append(due, h)
			}
		}
		r.holding = left > 0
		more, sharing := r.holding, r.sharing()
		r.mu.Unlock()
		var renewed []lost
		for _, h := range due {
			name := h.Key.Context
			r.tables(name).Deliver(name, func(tell func(core.SessionEvent, bool)) {
				r.mu.Lock()
				defer r.mu.Unlock()
				t, id := r.topic(name), over(&h.SessionEvent)
				if t.wants == 0 || !r.note(t, &h.SessionEvent, nil, h.life) {
					return
				}
				tell(h.SessionEvent, true)
				w := event{Kind: wireEnded, ID: id, Reason: uint8(h.Reason), At: h.Time.UnixMilli()}
				if h.Kind == core.SessionRenewed { // whoever did it may be dead
					renewed = append(renewed, t.lose(h.Key))
					w.Previous = h.Key.ID
				}
				if h.Kind == core.SessionRenewed || h.Kind == core.SessionDestroyed {
					r.pass(name, w)
				}
			})
		}
		r.lookFor(renewed, sharing)
		if !more {
			return
		}
	}
}

// Claim implements table.Relay.
func (r *Relay) Claim(key session.Key, life time.Duration, deliver func(core.SessionEvent)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.topic(key.Context)
	e := core.SessionEvent{Kind: core.SessionCreated, Key: key, Existing: true, Time: time.Now()}
	if t.wants != 0 && r.note(t, &e, nil, life) {
		deliver(e)
	}
	if t.asked != 0 {
		w := toWire(&e, life)
		w.Kind = wireExisting
		r.pass(key.Context, w)
	}
}

// Open implements table.Relay.
func (r *Relay) Open(key session.Key, released bool) (open, ours bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.topic(key.Context)
	if t.wants == 0 {
		return released, true // others find it out for their own listeners
	}
	e, known := t.known[key.ID]
	// Each of two nodes may take the other for the owner of a session that both
	// had in their tables: so who has released it looks in any case.
	return known && (released || e.owner == nil || e.owner.left), released
}

// Room implements table.Relay.
func (r *Relay) Room(string) {
	full := func() bool {
		for _, p := range r.peers {
			if len(p.queue) >= r.cfg.Queue {
				return true
			}
		}
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hurried || !full() || r.stopping {
		return
	}
	if r.freed == nil {
		r.freed = make(chan struct{})
	}
	freed := r.freed
	r.mu.Unlock()
	r.m.waits.Inc()
	timer := time.NewTimer(patience)
	select {
	case <-freed:
	case <-timer.C:
	}
	timer.Stop()
	r.mu.Lock()
	r.hurried = full()
}

// note takes over what has happened to a session, by p or, if that is nil, on
// this node. It is false if that had been noted before, or comes too late. What
// comes after the session has got another id is changed to be about that.
func (r *Relay) note(t *topic, e *core.SessionEvent, p *peer, life time.Duration) (fresh bool) {
	id := e.Key.ID
	if end, ended := t.latest(id); ended {
		return t.noteLate(e, end)
	}
	now := entry{owner: p}
	if p != nil {
		now.round = p.round
	}
	if life > 0 {
		now.due = time.Now().Add(life).UnixMilli()
	}
	k, known := t.known[id]
	switch e.Kind {
	case core.SessionCreated:
		if known && !e.Existing && k.owner != p {
			return false // a repetition is no news of the owner
		}
		t.keep(id, now, r.cfg.MaxSessions)
		return !known
	case core.SessionDestroyed:
		t.over(id, ending{reason: e.Reason})
		return known || p == nil // nobody here has heard of it
	case core.SessionRenewed:
		old := e.Previous.ID
		end, again := t.latest(old)
		if before, ok := t.known[old]; ok && life <= 0 {
			now.due = before.due
		}
		if !again || !known {
			t.keep(id, now, r.cfg.MaxSessions)
		}
		if again {
			// The same again; or it was ended, or renewed, by two at once, and
			// this is what goes on beside.
			if known || end.next == id {
				return false
			}
			*e = core.SessionEvent{Kind: core.SessionCreated, Key: e.Key, Existing: true, Local: e.Local, Time: e.Time}
			return true
		}
		t.over(old, ending{next: id})
	}
	return true
}

// noteLate is note for an id of which it is known what became of it.
func (t *topic) noteLate(e *core.SessionEvent, end ending) (fresh bool) {
	_, living := t.known[end.next]
	switch {
	case e.Kind&core.AttributeEvents != 0 && living:
		e.Key.ID = end.next
		return true
	case e.Kind == core.SessionRenewed:
		if _, known := t.known[e.Previous.ID]; !known {
			return false
		}
		t.over(e.Previous.ID, end)
		if living {
			e.Key.ID = end.next
		} else {
			*e = core.SessionEvent{Kind: core.SessionDestroyed, Key: e.Previous, Reason: cmp.Or(end.reason, session.Expired), Local: e.Local, Time: e.Time}
		}
		return true
	}
	return false
}

func (t *topic) keep(id string, e entry, most int) {
	if _, known := t.known[id]; known || len(t.known) < most {
		t.known[id] = e
	}
}

// maxHops bounds how many renewals are followed.
const maxHops = 16

// latest returns what became of an id at last: it has ended, or its session goes
// on as next.
func (t *topic) latest(id string) (end ending, ended bool) {
	for range maxHops {
		e, there := t.ended[id]
		if !there {
			e, there = t.older[id]
		}
		if !there {
			break
		}
		end, ended, id = e, true, e.next
	}
	return end, ended
}

func (t *topic) over(id string, end ending) {
	delete(t.known, id)
	if len(t.ended) >= maxEnded || time.Since(t.turned) > keepEnded {
		t.older, t.ended, t.turned = t.ended, map[string]ending{}, time.Now()
	}
	t.ended[id] = end
}

// pass queues an event for those who want it.
func (r *Relay) pass(contextName string, w event) {
	kind := core.SessionEventKind(w.Kind)
	if w.Kind >= wireExisting {
		kind = lasting
	}
	for _, p := range r.peers {
		if p.asked[contextName]&kind == 0 {
			continue
		}
		if len(p.queue) >= 2*r.cfg.Queue {
			r.m.unsent.Add(int64(len(p.queue)) + 1)
			p.dropped += len(p.queue) + 1
			p.queue, p.living, p.list = nil, nil, true
		} else {
			p.queue = append(p.queue, queued{contextName, w})
		}
		p.poke()
	}
}

// setView notes who is there.
func (r *Relay) setView(v channel.View) {
	if v.Local.ID.IsZero() {
		return
	}
	r.mu.Lock()
	r.local = v.Local
	var left []lost
	for id, p := range r.peers {
		if _, there := v.Get(id); !there {
			delete(r.peers, id)
			close(p.gone)
			p.left = true
			left = r.orphans(left, func(e entry) bool { return e.owner == p })
		}
	}
	for _, m := range v.Members {
		if _, ours := m.Announcement(); ours && r.peers[m.ID] == nil && !r.stopping {
			p := &peer{member: m, wake: make(chan struct{}, 1), gone: make(chan struct{}), told: r.asks == 0}
			r.peers[m.ID] = p
			r.wg.Go(func() { r.serve(p) }) // ends when the member goes, or with Stop
		}
	}
	changed := r.countAsked()
	sharing := r.sharing()
	r.mu.Unlock()
	r.reask(changed)
	r.lookFor(left, sharing)
}

// countAsked returns the contexts of which other nodes want something else than
// before.
func (r *Relay) countAsked() (changed []string) {
	now := map[string]core.SessionEventKind{}
	for _, p := range r.peers {
		for name, kinds := range p.asked {
			now[name] |= kinds
		}
	}
	for name := range now {
		r.topic(name)
	}
	for name, t := range r.topics {
		if t.asked != now[name] {
			t.asked = now[name]
			changed = append(changed, name)
		}
	}
	return changed
}

// reask tells the tables.
func (r *Relay) reask(changed []string) {
	for _, name := range changed {
		r.tables(name).Asked(name)
	}
}

// lost is a session that nobody has; due is when it would expire if nobody had
// used it, in milliseconds.
type lost struct {
	key session.Key
	due int64
}

// lose notes that nobody has a session.
func (t *topic) lose(key session.Key) lost {
	e, known := t.known[key.ID]
	if known {
		e.owner = nobody
		t.known[key.ID] = e
	}
	return lost{key, e.due}
}

// orphans adds sessions that have lost their owner.
func (r *Relay) orphans(list []lost, which func(entry) bool) []lost {
	for name, t := range r.topics {
		for id, e := range t.known {
			if which(e) {
				list = append(list, lost{session.Key{Context: name, ID: id}, e.due})
			}
		}
	}
	return list
}

// sharing returns the members that look for lost sessions, by context, this one
// first.
func (r *Relay) sharing() map[string][]channel.UniqueID {
	m := map[string][]channel.UniqueID{}
	for name, t := range r.topics {
		if t.wants == 0 {
			continue
		}
		list := []channel.UniqueID{r.local.ID}
		for id, p := range r.peers {
			if p.asked[name] != 0 {
				list = append(list, id)
			}
		}
		m[name] = list
	}
	return m
}

// lookFor has the tables look for lost sessions: at their end, and if other nodes
// note them too, each in its turn.
func (r *Relay) lookFor(list []lost, sharing map[string][]channel.UniqueID) {
	soon := time.Now().Add(grace)
	late := 0
	for _, l := range list {
		at := time.UnixMilli(l.due)
		if at.Before(soon) {
			at = soon.Add(time.Duration(late) * time.Second / pace)
			late++
		}
		r.tables(l.key.Context).Expect(l.key, at.Add(time.Duration(rank(sharing[l.key.Context], l.key.ID))*turn))
	}
}

// rank is how many members come before the first of the list for a session.
func rank(members []channel.UniqueID, id string) (n int) {
	weight := func(m channel.UniqueID) uint64 {
		h := fnv.New64a()
		_, _ = h.Write(m[:])
		_, _ = h.Write([]byte(id))
		return h.Sum64()
	}
	for i, m := range members {
		if i > 0 && weight(m) > weight(members[0]) {
			n++
		}
	}
	return n
}

// errStranger: a message came before the member is in the view, or after it has
// left; it is to be sent again.
var errStranger = errors.New("events: the sender is not in the view")

// handle takes a message of another relay.
func (r *Relay) handle(_ context.Context, msg *channel.Message, body []byte) error {
	m, err := decode(body)
	if err != nil {
		r.m.bad.Inc()
		return err
	}
	r.mu.Lock()
	p := r.peers[msg.From.ID]
	if p == nil {
		r.mu.Unlock()
		return errStranger
	}
	if m.Kind == kindAsk {
		p.asked = make(map[string]core.SessionEventKind, len(m.Contexts))
		for i, name := range m.Contexts {
			p.asked[name] = core.SessionEventKind(m.Wants[i])
		}
		p.number, p.first, p.queue, p.living, p.list = m.Number, 0, nil, nil, true
		changed := r.countAsked()
		r.mu.Unlock()
		r.reask(changed)
		p.poke() // not before: the list must be no older than what is told from now on
		return nil
	}
	skip, ok := r.expected(p, &m)
	r.mu.Unlock()
	if ok {
		r.m.received.Add(int64(len(m.Events) - skip))
		for i := skip; i < len(m.Events); i++ {
			r.take(p, &m, &m.Events[i])
		}
	}
	return nil
}

// expected reports whether the message answers the latest ask, and how many of
// its events have come before.
func (r *Relay) expected(p *peer, m *message) (skip int, ok bool) {
	if m.Number != p.asking {
		return 0, false
	}
	end := m.First + uint64(len(m.Events))
	if m.First < p.next {
		skip = int(min(p.next-m.First, uint64(len(m.Events))))
	}
	p.next = max(p.next, end)
	return skip, true
}

// take takes one event of a member.
func (r *Relay) take(p *peer, m *message, w *event) {
	switch {
	case w.Kind == wireStart:
		r.mu.Lock()
		p.round++
		r.mu.Unlock()
		return
	case w.Kind == wireEnd:
		r.mu.Lock()
		missing := r.orphans(nil, func(e entry) bool { return e.owner == p && e.round < p.round })
		for _, l := range missing {
			r.topic(l.key.Context).lose(l.key)
		}
		sharing := r.sharing()
		r.mu.Unlock()
		r.lookFor(missing, sharing)
		return
	case w.Kind > wireEnded || w.Kind < wireExisting && core.SessionEventKind(w.Kind)&core.AllSessionEvents == 0:
		return // of a newer version
	}
	name := m.Contexts[w.Context]
	e := fromWire(w, name)
	r.mu.Lock()
	wants := r.topic(name).wants
	r.mu.Unlock()
	if wants == 0 {
		return
	}
	ends, here := over(&e), false
	if e.Kind == core.SessionDestroyed {
		e.Attrs, here = r.tables(name).Attributes(e.Key)
	}
	var missing []lost
	r.tables(name).Deliver(name, func(tell func(core.SessionEvent, bool)) {
		r.mu.Lock()
		defer r.mu.Unlock()
		t := r.topic(name)
		if t.wants == 0 || r.peers[p.member.ID] != p {
			return
		}
		switch _, known := t.known[w.ID]; {
		case w.Kind == wireLost && known:
			return
		case w.Kind == wireEnded && !known:
			if _, ended := t.latest(w.ID); !ended {
				t.over(w.ID, ending{next: w.Previous, reason: session.EndKind(w.Reason)})
			}
			return
		}
		if !r.note(t, &e, p, time.Duration(w.Life)*time.Millisecond) {
			if w.Kind < wireExisting {
				r.m.repeated.Inc()
			}
			return
		}
		if h, there := t.held[ends]; there {
			delete(t.held, ends)
			e.Attrs, here = h.Attrs, true
		}
		if w.Kind == wireLost || w.Kind == wireEnded && e.Kind != core.SessionDestroyed {
			missing = append(missing, t.lose(e.Key))
		}
		tell(e, here)
	})
	if missing != nil {
		r.mu.Lock()
		sharing := r.sharing()
		r.mu.Unlock()
		r.lookFor(missing, sharing)
	}
}
