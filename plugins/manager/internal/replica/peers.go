package replica

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

const (
	// probesPerGrace is how often a silent member is asked for a sign of life
	// before it is put aside.
	probesPerGrace = 4
	// strangerProbes: a member that has not answered for StallTimeout is asked
	// every that many turns only.
	strangerProbes = 16
)

// peer is another member of the view, what is known of it and what is planned
// with it. Manager.mu guards it.
type peer struct {
	member channel.Member
	node   uint64
	since  time.Time // when it came
	// hello: it has answered, so it runs this manager; ready: it has said that
	// it has complete state; heard is when there was the last sign of life.
	hello, ready bool
	heard        time.Time
	// aside: it does not answer. Only an answer to a ping from sinceping on ends
	// that.
	aside     bool
	sincePing uint64
	probing   bool // a ping is being sent
	answering bool // a pong is being sent; pong is the number of the last ping
	pong      uint64
	turns     int // since the last ping to a stranger

	// wanted: an exchange is due at due; failed counts failures in a row.
	wanted bool
	due    time.Time
	failed int
	// catch: that exchange brings what was missed while it was put aside.
	catch bool
	// running: this node has begun one; last is when it began the last one.
	running bool
	last    time.Time
	// serving is the exchange that the member has begun with us since we want
	// one.
	serving uint64
}

// nodeOf is what stands for a member in versions and placements: the first half
// of its id.
func nodeOf(m channel.Member) uint64 { return binary.BigEndian.Uint64(m.ID[:8]) }

// want asks for an exchange, not later than at due.
func (p *peer) want(due time.Time) {
	if !p.wanted || due.Before(p.due) {
		p.due = due
	}
	p.wanted = true
	p.serving = 0 // one that is going on may be past what there is to compare
}

// stranger reports whether the member seems not to run this manager.
func (m *Manager) stranger(p *peer, now time.Time) bool {
	return !p.hello && now.Sub(p.since) > m.cfg.StallTimeout
}

// HandleView implements core.Manager.
func (m *Manager) HandleView(_ context.Context, v channel.View) {
	if m.cfg.DomainOnly {
		mine := make([]channel.Member, 0, len(v.Members))
		for _, member := range v.Members {
			if member.Domain == v.Local.Domain {
				mine = append(mine, member)
			}
		}
		v.Members = mine
	}
	m.mu.Lock()
	now := time.Now()
	came, left := false, false
	for _, member := range v.Members {
		if p := m.peers[member.ID]; p != nil {
			p.member = member
			continue
		}
		came = true
		p := &peer{member: member, node: nodeOf(member), since: now, heard: now}
		p.want(now.Add(m.patience(v.Local, member)))
		m.peers[member.ID] = p
		if m.silent[member.ID] { // in the view again, but it has not answered yet
			p.aside, p.catch, p.sincePing = true, true, m.pings.Load()+1
		}
	}
	for id, p := range m.peers {
		if _, there := v.Get(id); !there {
			delete(m.peers, id)
			left = true
			if p.aside {
				m.remember(id)
			}
		}
	}
	m.view = v
	m.regroup()
	m.mu.Unlock()
	if !came && !left {
		return
	}
	m.wake()
	m.probeNow()
	m.replan(left)
}

// maxSilent bounds the members that are remembered as silent.
const maxSilent = 4096

// remember notes that a member left the view without an answer, so that nobody
// waits for it again if it comes back as it was. m.mu is held.
func (m *Manager) remember(id channel.UniqueID) {
	if len(m.silent) >= maxSilent {
		clear(m.silent)
	}
	m.silent[id] = true
}

// regroup tells everybody who waits for a member that something has changed.
// m.mu is held.
func (m *Manager) regroup() {
	m.group.Store(m.newGroup())
	changed := m.changed
	m.changed = make(chan struct{})
	close(changed)
}

// targets returns the members that changes are sent to.
func (m *Manager) targets() []channel.Member {
	return m.group.Load().members
}

// probeNow asks new members for a sign of life at once.
func (m *Manager) probeNow() {
	select {
	case m.probes <- struct{}{}:
	default:
	}
}

// watch asks silent members for a sign of life, and puts those aside that do not
// answer.
func (m *Manager) watch() {
	every := max(m.cfg.FaultGrace/probesPerGrace, 10*time.Millisecond)
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	last := time.Now()
	for {
		select {
		case <-ticker.C:
			now := time.Now()
			if now.Sub(last) > m.cfg.FaultGrace {
				m.slept(now)
			}
			last = now
		case <-m.probes:
		case <-m.ctx.Done():
			return
		}
		m.probe(every)
	}
}

// slept: this process has been stopped for a while. Nobody can be blamed for its
// own silence, and much may have been missed.
func (m *Manager) slept(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.peers {
		p.heard = now
		p.want(now)
		p.catch = true
	}
}

// probe is one turn of watch.
func (m *Manager) probe(every time.Duration) {
	m.mu.Lock()
	now := time.Now()
	var ask []*peer
	var silent []channel.Member
	for _, p := range m.peers {
		quiet := now.Sub(p.heard)
		if p.hello && !p.aside && quiet > m.cfg.FaultGrace {
			m.putAside(p)
			silent = append(silent, p.member)
		}
		if p.probing || p.hello && !p.aside && quiet < every {
			continue
		}
		if p.turns++; m.stranger(p, now) && p.turns%strangerProbes != 0 {
			continue
		}
		p.probing = true
		ask = append(ask, p)
	}
	if len(silent) > 0 {
		m.regroup()
	}
	ready := m.ready
	m.mu.Unlock()
	for _, s := range silent {
		m.tellAside(s)
	}
	for _, p := range ask {
		if !m.spawn(func() { m.ping(p, ready) }) {
			return
		}
	}
}

// putAside notes that a member does not answer. m.mu is held; the caller calls
// regroup and tellAside after it.
func (m *Manager) putAside(p *peer) {
	p.aside, p.catch = true, true
	p.sincePing = m.pings.Load() + 1
	m.m.aside.Inc()
}

func (m *Manager) tellAside(member channel.Member) {
	m.log.Warn("a member does not answer; sessions go on without it until it does", zap.Stringer("member", member), zap.Duration("after", m.cfg.FaultGrace))
	m.replan(true)
}

// setAside puts members aside that have not acknowledged a change.
func (m *Manager) setAside(members []channel.Member) {
	m.mu.Lock()
	var done []channel.Member
	for _, member := range members {
		if p := m.peers[member.ID]; p != nil && !p.aside {
			m.putAside(p)
			done = append(done, member)
		}
	}
	if len(done) > 0 {
		m.regroup()
	}
	m.mu.Unlock()
	for _, member := range done {
		m.tellAside(member)
	}
}

func (m *Manager) ping(p *peer, ready bool) {
	m.mu.Lock()
	member := p.member
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(m.ctx, m.cfg.FaultGrace)
	defer cancel()
	_ = m.host.Send(ctx, []channel.Member{member}, channel.SendNone, append(appendHeader(nil, kindPing, m.pings.Add(1)), m.readyFlag(ready)))
	m.mu.Lock()
	p.probing = false
	m.mu.Unlock()
}

func (m *Manager) readyFlag(ready bool) byte {
	if ready {
		return flagReady
	}
	return 0
}

// gotPing answers a ping. One answer to a member is on its way at a time; the
// last number is what counts.
func (m *Manager) gotPing(from channel.Member, number uint64, b []byte) error {
	flags, _, err := parseFlags(b)
	if err != nil {
		return err
	}
	m.mu.Lock()
	p := m.peers[from.ID]
	if p == nil { // it asks again when it is in the view
		m.mu.Unlock()
		return nil
	}
	p.ready = flags&flagReady != 0
	if !p.hello {
		m.greet(p)
	}
	p.pong = number
	busy := p.answering
	p.answering = true
	m.mu.Unlock()
	if !busy && !m.spawn(func() { m.answer(p) }) {
		return errStopped
	}
	return nil
}

// answer sends pongs until the last ping has been answered.
func (m *Manager) answer(p *peer) {
	for number := uint64(0); ; {
		m.mu.Lock()
		if p.pong == number || m.ctx.Err() != nil {
			p.answering = false
			m.mu.Unlock()
			return
		}
		number = p.pong
		member, ready := p.member, m.ready
		m.mu.Unlock()
		ctx, cancel := context.WithTimeout(m.ctx, m.cfg.FaultGrace)
		_ = m.host.Send(ctx, []channel.Member{member}, channel.SendNone, append(appendHeader(nil, kindPong, number), m.readyFlag(ready)))
		cancel()
	}
}

// greet notes that a member runs this manager. m.mu is held.
func (m *Manager) greet(p *peer) {
	p.hello = true
	m.regroup()
	m.replan(false)
	m.wake()
}

func (m *Manager) gotPong(from channel.Member, number uint64, b []byte) error {
	flags, _, err := parseFlags(b)
	if err != nil {
		return err
	}
	back := false
	m.mu.Lock()
	if p := m.peers[from.ID]; p != nil {
		p.ready = flags&flagReady != 0
		if !p.hello {
			m.greet(p)
		}
		if p.aside && number >= p.sincePing {
			p.aside, p.heard, back = false, time.Now(), true
			delete(m.silent, from.ID)
			p.failed = 0
			p.want(p.heard)
			m.regroup()
		}
	}
	m.mu.Unlock()
	if back {
		m.log.Info("a member answers again", zap.Stringer("member", from))
		m.wake()
		m.replan(false)
	}
	return nil
}

// heard notes a sign of life of members.
func (m *Manager) heard(members ...channel.Member) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, member := range members {
		if p := m.peers[member.ID]; p != nil {
			p.heard = now
		}
	}
}

// behind reports whether something may have been missed that is not here yet.
func (m *Manager) behind() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.peers {
		if p.catch && !p.aside {
			return true
		}
	}
	return false
}

// silence describes the members that do not answer, for Status. m.mu is held.
func (m *Manager) silence() string {
	n := 0
	for _, p := range m.peers {
		if p.aside {
			n++
		}
	}
	switch n {
	case 0:
		return ""
	case 1:
		return "; one member does not answer"
	}
	return fmt.Sprintf("; %d members do not answer", n)
}
