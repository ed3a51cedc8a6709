package gossip

import (
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/longhouse-go/longhouse/channel"
	"go.uber.org/zap"
)

const (
	// maxLost bounds the addresses of lost members that are tried.
	maxLost = 256
	// minSeek and maxSeek bound the pause between two rounds of looking for
	// seeds and lost members, perRound how many are tried in one.
	minSeek, maxSeek = time.Second, 15 * time.Second
	perRound         = 3
	// refreshRate bounds the updates of members whose time alive has gone on, by
	// second.
	refreshRate = 128
	// complaintInterval is the least time between two log lines of one kind.
	complaintInterval = time.Minute
)

// delegate is called by memberlist, mostly while that holds its lock: nothing in
// it blocks.
type delegate struct{ m *membership }

// NodeMeta implements memberlist.Delegate.
func (d delegate) NodeMeta(int) []byte {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return d.m.meta
}

// NotifyMsg implements memberlist.Delegate.
func (d delegate) NotifyMsg(b []byte) {
	id, start, err := decodeFarewell(b)
	if err != nil {
		d.m.counters.refused["message"].Inc()
		return
	}
	d.m.push(change{name: id.String(), info: info{rec: channel.Member{ID: id}}, left: start})
}

// GetBroadcasts implements memberlist.Delegate.
func (d delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.m.news.GetBroadcasts(overhead, limit)
}

// LocalState implements memberlist.Delegate.
func (d delegate) LocalState(bool) []byte { return nil }

// MergeRemoteState implements memberlist.Delegate.
func (d delegate) MergeRemoteState([]byte, bool) {}

// infoOf reads what a node says of itself.
func infoOf(n *memberlist.Node) (info, error) {
	i, err := decodeMeta(n.Meta)
	if err != nil {
		return i, err
	}
	if i.rec.ID.String() != n.Name {
		return i, errors.New("it is not who it says")
	}
	ip, ok := netip.AddrFromSlice(n.Addr)
	if !ok || n.Port == 0 {
		return i, errors.New("it has no address to gossip with")
	}
	i.gossip = netip.AddrPortFrom(ip.Unmap(), n.Port)
	return i, nil
}

// NotifyAlive implements memberlist.AliveDelegate: a node that cannot be used,
// or is beyond the bound, does not become one.
func (d delegate) NotifyAlive(n *memberlist.Node) error {
	if _, err := infoOf(n); err != nil {
		d.m.counters.refused["record"].Inc()
		return err
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if _, ok := d.m.known[n.Name]; !ok && n.Name != d.m.name && len(d.m.known) >= d.m.cfg.MaxMembers {
		d.m.counters.refused[reasonFull].Inc()
		return errors.New("the group is full")
	}
	return nil
}

// NotifyConflict implements memberlist.ConflictDelegate.
func (d delegate) NotifyConflict(have, other *memberlist.Node) {
	d.m.counters.refused["conflict"].Inc()
}

// NotifyJoin implements memberlist.EventDelegate.
func (d delegate) NotifyJoin(n *memberlist.Node) { d.alive(n) }

// NotifyUpdate implements memberlist.EventDelegate.
func (d delegate) NotifyUpdate(n *memberlist.Node) { d.alive(n) }

func (d delegate) alive(n *memberlist.Node) {
	if n.Name == d.m.name {
		return
	}
	i, err := infoOf(n)
	if err != nil {
		return // refused by NotifyAlive before
	}
	d.m.push(change{name: n.Name, alive: true, info: i})
}

// NotifyLeave implements memberlist.EventDelegate.
func (d delegate) NotifyLeave(n *memberlist.Node) {
	if i, err := infoOf(n); err == nil && n.Name != d.m.name {
		d.m.push(change{name: n.Name, info: i})
	}
}

// push queues a change for run. The last word on a node replaces the one before
// it if it is of the same kind, so the queue is bounded by the members, whose
// number NotifyAlive bounds; farewells of nodes that are not known do not enter.
func (m *membership) push(c change) {
	m.mu.Lock()
	_, known := m.known[c.name]
	switch {
	case c.alive:
		m.known[c.name] = struct{}{}
	case !known:
		m.mu.Unlock()
		return
	case c.left.IsZero():
		delete(m.known, c.name)
	}
	at, ok := m.queued[c.name]
	if ok && m.inbox[at].alive == c.alive && m.inbox[at].left.IsZero() == c.left.IsZero() {
		m.inbox[at] = c
	} else if len(m.inbox) < 4*m.cfg.MaxMembers {
		m.queued[c.name] = len(m.inbox)
		m.inbox = append(m.inbox, c)
	} else { // run has not kept up for long; its last word is what counts
		m.counters.dropped.Inc()
		if ok {
			m.inbox[at] = c
		}
	}
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// take empties the queue.
func (m *membership) take() []change {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := m.inbox
	m.inbox = nil
	clear(m.queued)
	return list
}

// run owns the roster and is the only caller of sink.
func (m *membership) run(r *roster, sink channel.MemberSink) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var events []channel.MemberEvent
	var refreshed time.Time
	for {
		events = events[:0]
		select {
		case <-m.quit:
			return
		case <-tick.C:
			now := time.Now()
			events = r.expire(events, now)
			if now.Sub(refreshed) >= time.Duration(len(r.byAddr))*time.Second/refreshRate {
				events, refreshed = r.refresh(events, now), now
			}
		case <-m.wake:
			for _, c := range m.take() {
				events = m.apply(events, r, c, time.Now())
			}
			m.meet(r)
		}
		for _, ev := range events {
			sink.Observe(ev)
		}
	}
}

func (m *membership) apply(events []channel.MemberEvent, r *roster, c change, now time.Time) []channel.MemberEvent {
	switch {
	case c.alive:
		return r.alive(events, c.info, now)
	case !c.left.IsZero():
		events, news := r.farewell(events, c.info.rec.ID, c.left, now)
		if news {
			m.news.QueueBroadcast(&farewell{name: c.name, b: appendFarewell(nil, c.info.rec.ID, c.left)})
		}
		return events
	}
	if e := r.nodes[c.info.rec.ID]; e != nil && !e.left {
		m.lose(c.info.gossip)
	}
	return r.dead(events, c.info.rec.ID, now)
}

// meet remembers where the members that live gossip.
func (m *membership) meet(r *roster) {
	present := make(map[netip.AddrPort]bool, len(r.nodes))
	for _, e := range r.nodes {
		if !e.left && e.gossip.IsValid() {
			present[e.gossip] = true
		}
	}
	m.mu.Lock()
	m.present = present
	m.mu.Unlock()
}

// lose remembers where a lost member may be found again.
func (m *membership) lose(a netip.AddrPort) {
	m.mu.Lock()
	m.lost = slices.DeleteFunc(m.lost, func(o netip.AddrPort) bool { return o == a })
	if len(m.lost) >= maxLost {
		m.lost = slices.Delete(m.lost, 0, 1)
	}
	m.lost = append(m.lost, a)
	m.mu.Unlock()
	select {
	case m.hurry <- struct{}{}:
	default:
	}
}

// seek looks for the seeds and the members that were lost, and exchanges with
// them all that is known: so a node finds the group, and splits heal.
func (m *membership) seek(list *memberlist.Memberlist) {
	pause := minSeek
	seeds := map[string]netip.AddrPort{} // the last address of each
	silent := map[string]bool{}          // failures that have been logged
	for {
		if m.join(list, m.missing(seeds, silent)) {
			pause = minSeek
			select {
			case m.fresh <- struct{}{}:
			default:
			}
		}
		t := time.NewTimer(pause - pause/5 + rand.N(2*pause/5+1))
		pause = min(2*pause, maxSeek)
		select {
		case <-t.C:
		case <-m.hurry:
			t.Stop()
			pause = minSeek
			if !channel.Pause(m.ctx, minSeek) {
				return
			}
		case <-m.quit:
			t.Stop()
			return
		}
	}
}

// freshSyncs are the pauses between the exchanges of a node that has just found
// others.
var freshSyncs = []time.Duration{3 * time.Second, 7 * time.Second, 20 * time.Second}

// catchUp exchanges all that is known with some other node, a few times after
// others have been found: news spreads while many come at once, but not to
// everybody, and the regular exchanges are seldom in a large group.
func (m *membership) catchUp(list *memberlist.Memberlist) {
	for {
		select {
		case <-m.fresh:
		case <-m.quit:
			return
		}
		for _, pause := range freshSyncs {
			if !channel.Pause(m.ctx, pause-pause/5+rand.N(2*pause/5+1)) {
				return
			}
			if a, ok := m.anyone(); ok {
				m.join(list, []netip.AddrPort{a})
			}
		}
	}
}

// anyone returns where some member gossips.
func (m *membership) anyone() (netip.AddrPort, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := slices.Collect(maps.Keys(m.present))
	if len(all) == 0 {
		return netip.AddrPort{}, false
	}
	return all[rand.IntN(len(all))], true
}

// join exchanges with all the given at once; it reports whether one was reached.
func (m *membership) join(list *memberlist.Memberlist, addrs []netip.AddrPort) bool {
	var reached atomic.Bool
	var work sync.WaitGroup
	for _, a := range addrs {
		work.Go(func() {
			if n, err := list.Join([]string{a.String()}); err != nil || n == 0 {
				m.counters.joinsFailed.Inc()
				return
			}
			m.counters.joins.Inc()
			reached.Store(true)
		})
	}
	work.Wait()
	return reached.Load()
}

// missing returns some of the addresses where no member that lives gossips.
func (m *membership) missing(seeds map[string]netip.AddrPort, silent map[string]bool) []netip.AddrPort {
	for _, s := range m.cfg.Seeds {
		a, err := netip.ParseAddrPort(s)
		if err != nil {
			if m.ctx.Err() != nil {
				return nil
			}
			ua, rerr := m.net.ResolveUDPAddr("udp", s)
			if rerr != nil {
				if !silent[s] {
					m.log.Warn("a seed cannot be resolved; trying again", zap.String("seed", s), zap.Error(rerr))
				}
				silent[s] = true
				continue // the last address stands
			}
			delete(silent, s)
			a = ua.AddrPort()
		}
		seeds[s] = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []netip.AddrPort
	add := func(a netip.AddrPort) {
		if a != m.own && !m.present[a] && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, s := range m.cfg.Seeds {
		if a, ok := seeds[s]; ok {
			add(a)
		}
	}
	m.lost = slices.DeleteFunc(m.lost, func(a netip.AddrPort) bool { return m.present[a] })
	for _, a := range m.lost {
		add(a)
	}
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out[:min(len(out), perRound)]
}

// farewell is one in the queue of news.
type farewell struct {
	name string
	b    []byte
}

// Invalidates implements memberlist.Broadcast.
func (f *farewell) Invalidates(o memberlist.Broadcast) bool {
	other, ok := o.(*farewell)
	return ok && other.name == f.name
}

// Name implements memberlist.NamedBroadcast.
func (f *farewell) Name() string { return f.name }

// Message implements memberlist.Broadcast.
func (f *farewell) Message() []byte { return f.b }

// Finished implements memberlist.Broadcast.
func (f *farewell) Finished() {}

// logs turns the lines of memberlist's log into those of the node, counts what
// was refused, and bounds the lines of each kind.
type logs struct {
	log      *zap.Logger
	counters *counters

	mu   sync.Mutex // guards what follows; never held while blocking
	last map[string]time.Time
}

func newLogs(l *zap.Logger, c *counters) *logs {
	return &logs{log: l, counters: c, last: map[string]time.Time{}}
}

// maxKinds bounds the kinds of lines that are told apart.
const maxKinds = 256

// refusals are the lines that tell of something received that was not used.
var refusals = []struct{ begin, reason string }{
	{"Decrypt packet failed", "packet"},
	{"Got invalid checksum", "packet"},
	{"discarding packet", "packet"},
	{"unexpected double packet", "packet"},
	{"msg type", "packet"},
	{"missing message type", "packet"},
	{"Failed to decode", "packet"},
	{"Failed to decompress", "packet"},
	{"cannot decode label", "packet"},
	{"label header cannot be empty", "packet"},
	{"failed to receive", "stream"},
	{"discarding stream", "stream"},
	{"unexpected double stream", "stream"},
	{"Failed to read remote state", "stream"},
	{"Received invalid msgType", "stream"},
	{"Failed push/pull merge", "stream"},
	{"Failed to receive user message", "stream"},
}

// Write implements io.Writer; it is given one line at a time.
func (l *logs) Write(b []byte) (int, error) {
	level, text := "", strings.TrimSpace(string(b))
	if rest, ok := strings.CutPrefix(text, "["); ok {
		if before, after, ok := strings.Cut(rest, "] "); ok {
			level, text = before, after
		}
	}
	text = strings.TrimPrefix(text, "memberlist: ")
	for _, r := range refusals {
		if strings.HasPrefix(text, r.begin) {
			l.counters.refused[r.reason].Inc()
			break
		}
	}
	if strings.HasPrefix(text, "handler queue full") {
		l.counters.dropped.Inc()
	}
	field := zap.String("memberlist", text)
	switch level {
	case "DEBUG":
		l.log.Debug("gossip", field)
	case "INFO":
		if l.due(text) {
			l.log.Info("gossip", field)
		}
	default: // an error there is seldom one of this node
		if l.due(text) {
			l.log.Warn("gossip", field)
		}
	}
	return len(b), nil
}

// due reports whether a line of that kind may be logged now.
func (l *logs) due(text string) bool {
	kind, _, _ := strings.Cut(text, ":")
	kind = kind[:min(len(kind), 24)]
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if last, ok := l.last[kind]; ok && now.Sub(last) < complaintInterval {
		return false
	}
	if len(l.last) >= maxKinds {
		clear(l.last)
	}
	l.last[kind] = now
	return true
}
