package coordinator

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
)

func nth(i int) channel.Member {
	return channel.Member{ID: channel.UniqueID{byte(i), 6: 0x40, 15: 7}, Host: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), Port: 4000, SecurePort: -1, UDPPort: -1}
}

// group runs elections of several nodes without channel and network.
type group struct {
	t     *rapid.T
	nodes map[int]*election
	refs  map[int]map[string]int
	cut   map[[2]int]bool // links that lose everything
	loss  func() bool
	now   time.Time
	mail  []letter
	sent  int
}

type letter struct {
	from, to int
	m        message
	at       time.Time
}

func newGroup(t *rapid.T, n int) *group {
	g := &group{t: t, nodes: map[int]*election{}, refs: map[int]map[string]int{}, cut: map[[2]int]bool{}, loss: func() bool { return false }, now: time.Unix(1e9, 0)}
	for i := 1; i <= n; i++ {
		g.restart(i)
	}
	return g
}

func (g *group) restart(i int) {
	refs := map[string]int{}
	g.refs[i] = refs
	g.nodes[i] = newElection(Defaults, func(r string) { refs[r]++ })
}

func (g *group) connected(a, b int) bool {
	return g.nodes[a] != nil && g.nodes[b] != nil && !g.cut[[2]int{a, b}] && !g.cut[[2]int{b, a}]
}

func (g *group) see(i int) {
	var others []channel.Member
	for j := range g.nodes {
		if j != i && g.connected(i, j) {
			others = append(others, nth(j))
		}
	}
	g.dispatch(i, g.nodes[i].setMembers(nth(i), others, g.now))
}

func (g *group) dispatch(from int, outs []out) {
	for _, o := range outs {
		var missed, reached []channel.UniqueID
		for _, m := range o.to {
			to := int(m.ID[0])
			if !g.connected(from, to) || g.loss() {
				missed = append(missed, m.ID)
				continue
			}
			reached = append(reached, m.ID)
			g.sent++
			g.mail = append(g.mail, letter{from, to, o.m, g.now.Add(time.Duration(g.sent%7) * time.Millisecond)})
			if !o.all {
				break
			}
		}
		if o.all {
			g.nodes[from].reached(reached)
			g.nodes[from].missed(o.m.id, missed, g.now)
		}
	}
}

// pass lets time go on, from one moment at which something happens to the next.
func (g *group) pass(d time.Duration) {
	for end := g.now.Add(d); g.now.Before(end); {
		mail := g.mail
		g.mail = nil
		next := end
		for _, l := range mail {
			if l.at.After(g.now) {
				g.mail = append(g.mail, l)
				continue
			}
			if e := g.nodes[l.to]; e != nil {
				m, err := decode(l.m.encode())
				if err != nil {
					g.t.Fatal(err)
				}
				g.dispatch(l.to, e.receive(nth(l.from), m, g.now))
			}
		}
		for i := range 20 {
			if e := g.nodes[i]; e != nil {
				g.dispatch(i, e.tick(g.now))
			}
		}
		for i := range 20 {
			if e := g.nodes[i]; e != nil {
				if at := e.due(); !at.IsZero() && at.Before(next) {
					next = at
				}
			}
		}
		for _, l := range g.mail {
			if l.at.Before(next) {
				next = l.at
			}
		}
		if least := g.now.Add(time.Millisecond); next.Before(least) {
			next = least
		}
		g.now = next
	}
}

// parts are the connected groups.
func (g *group) parts() (all [][]int) {
	done := map[int]bool{}
	for i := range 20 {
		if g.nodes[i] == nil || done[i] {
			continue
		}
		var part []int
		for j := range 20 {
			if g.nodes[j] != nil && (i == j || g.connected(i, j)) {
				part, done[j] = append(part, j), true
			}
		}
		all = append(all, part)
	}
	return all
}

// agree checks that every connected group has one view, one coordinator and
// nothing more to say.
func (g *group) agree(when string) {
	for _, part := range g.parts() {
		first := g.nodes[part[0]]
		for _, i := range part {
			e := g.nodes[i]
			c, ok := e.coordinator()
			if !ok || c.ID != nth(part[0]).ID || e.viewID != first.viewID || !e.settled() || len(e.view) != len(part) {
				g.t.Fatalf("%s: node %d of %v: coordinator %v (%v), view %v of %d, settled %v, refused %v", when, i, part, c, ok, e.viewID, len(e.view), e.settled(), g.refs[i])
			}
			if at := e.due(); !at.IsZero() {
				g.t.Fatalf("%s: node %d of %v has something to do at %v", when, i, part, at)
			}
		}
	}
	before := g.sent
	g.pass(time.Minute)
	if g.sent != before {
		g.t.Fatalf("%s: %d messages in a quiet minute", when, g.sent-before)
	}
}

// Whatever happens (splits, deaths, restarts, lost messages, views that change at
// different times): once it is quiet, each connected group has one coordinator.
func TestElections(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 7).Draw(t, "nodes")
		g := newGroup(t, n)
		for step := range rapid.IntRange(1, 6).Draw(t, "steps") {
			g.cut = map[[2]int]bool{}
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0: // split
				side := map[int]bool{}
				for i := range g.nodes {
					side[i] = (uint(rapid.Uint8().Draw(t, "sides"))>>i)&1 == 1
				}
				for i := range g.nodes {
					for j := range g.nodes {
						if side[i] != side[j] {
							g.cut[[2]int{i, j}] = true
						}
					}
				}
			case 1: // death
				if len(g.nodes) > 1 {
					delete(g.nodes, rapid.IntRange(1, n).Draw(t, "dead"))
				}
			case 2: // (re)start
				g.restart(rapid.IntRange(1, n).Draw(t, "started"))
			}
			percent := rapid.IntRange(0, 60).Draw(t, "loss")
			k := rapid.IntRange(0, 1<<20).Draw(t, "seed")
			g.loss = func() bool { k = (k*1103515245 + 12345) & 0x7fffffff; return k>>8%100 < percent }
			order := rapid.Permutation([]int{1, 2, 3, 4, 5, 6, 7}).Draw(t, "order")
			for _, i := range order {
				if g.nodes[i] != nil {
					g.see(i)
					g.pass(time.Duration(rapid.IntRange(0, 400).Draw(t, "pause")) * time.Millisecond)
				}
			}
			g.pass(time.Duration(rapid.IntRange(0, 5000).Draw(t, "lossy")) * time.Millisecond)
			g.loss = func() bool { return false }
			for _, i := range order { // those that were started last saw the others first
				if g.nodes[i] != nil {
					g.see(i)
				}
			}
			g.pass(2 * time.Minute)
			g.agree(fmt.Sprint("step ", step))
		}
	})
}

// run3 is node 3 of three, which has agreed to two views.
func run3(t *testing.T) (e *election, first, second message, refused map[string]int, now time.Time) {
	t.Helper()
	refused = map[string]int{}
	now = time.Unix(1e9, 0)
	e = newElection(Defaults, func(r string) { refused[r]++ })
	e.setMembers(nth(3), []channel.Member{nth(1)}, now)
	first = message{leader: nth(1), source: nth(1), view: []channel.Member{nth(1), nth(3)}, id: newID(10), confirmed: true}
	second = message{leader: nth(1), source: nth(1), view: []channel.Member{nth(1), nth(2), nth(3)}, id: newID(11), confirmed: true}
	e.receive(nth(1), first, now)
	e.setMembers(nth(3), []channel.Member{nth(1), nth(2)}, now)
	e.receive(nth(1), second, now)
	if e.viewID != second.id || !e.settled() || len(refused) != 0 {
		t.Fatalf("view %v, refused %v", e.viewID, refused)
	}
	return e, first, second, refused, now
}

// A stale view after a newer one is refused.
func TestStaleViews(t *testing.T) {
	e, first, second, refused, now := run3(t)
	never := first // one that never came
	never.id = newID(9)
	tomcat := first
	tomcat.id = channel.NewUniqueID()
	for i, m := range []message{first, never, tomcat} {
		e.receive(nth(1), m, now)
		if e.viewID != second.id || refused[refusedStale] != i+1 {
			t.Errorf("message %d: view %v, refused %v", i, e.viewID, refused)
		}
	}
	e.receive(nth(1), second, now) // again: harmless
	// The view of a Tomcat node that was ahead of the membership holds when the
	// membership follows.
	e.setMembers(nth(3), []channel.Member{nth(1)}, now)
	if e.viewID != tomcat.id || !e.settled() {
		t.Errorf("view %v", e.viewID)
	}
	e.setMembers(nth(3), []channel.Member{nth(1), nth(2)}, now)
	e.receive(nth(1), first, now)
	if e.viewID != tomcat.id {
		t.Error("an old view came back")
	}
}

func TestViewsThatAreNotBelieved(t *testing.T) {
	e, first, second, refused, now := run3(t)
	with := func(f func(m *message)) message {
		m := second
		m.view = slices.Clone(m.view)
		m.id = newID(12)
		f(&m)
		return m
	}
	for _, c := range []struct {
		reason string
		from   channel.Member
		m      message
	}{
		{refusedWithout, nth(1), with(func(m *message) { m.view = m.view[:2] })},
		{refusedLeader, nth(2), with(func(*message) {})},
		{refusedLeader, nth(1), with(func(m *message) { m.source = nth(2) })},
		{refusedLowest, nth(2), with(func(m *message) { m.view, m.source = m.view[1:], nth(2) })},
		{refusedMalformed, nth(1), with(func(m *message) { m.view[1] = m.view[0] })},
		{refusedStale, nth(1), with(func(m *message) { m.confirmed, m.source = false, nth(3) })},
	} {
		before := refused[c.reason]
		e.receive(c.from, c.m, now)
		if refused[c.reason] != before+1 || e.viewID != second.id {
			t.Errorf("%s: refused %v, view %v", c.reason, refused, e.viewID)
		}
	}
	// A counter from nowhere does not block the views to come.
	e.receive(nth(1), with(func(m *message) { m.id = newID(1 << 47) }), now)
	next := with(func(m *message) { m.id = newID(13) })
	e.receive(nth(1), next, now)
	if e.viewID != next.id {
		t.Errorf("after a huge counter: %v", e.viewID)
	}
	// Strangers cannot fill the memory, nor keep a token going round for ever.
	for range 1000 {
		e.receive(nth(9), first, now)
	}
	if len(e.parked) > maxParked {
		t.Errorf("%d messages are kept", len(e.parked))
	}
	token := message{leader: nth(2), source: nth(2), view: []channel.Member{nth(2), nth(3)}, id: newID(5)}
	passed := 0
	for range 100 {
		passed += len(e.receive(nth(2), token, now))
	}
	if passed != maxForwards || refused[refusedLoop] != 100-maxForwards {
		t.Errorf("a token was passed on %d times", passed)
	}
	for i := range 10_000 {
		token.id = newID(uint64(i))
		e.receive(nth(2), token, now)
	}
	if len(e.forwards) > maxTokens+1 || len(e.order) > maxTokens {
		t.Errorf("%d tokens are remembered", len(e.forwards))
	}
}

// What Tomcat nodes said to each other: the messages of node A as it takes part
// in their election give the same steps.
func TestTribesElection(t *testing.T) {
	// A < B < C. This node is B; A and C are Tomcat nodes.
	now := time.Unix(1e9, 0)
	e := newElection(Defaults, func(r string) { t.Errorf("refused: %s", r) })
	a, b, c := nth(1), nth(2), nth(3)
	e.setMembers(b, []channel.Member{a, c}, now)
	token := message{leader: a, source: a, view: []channel.Member{a, b, c}, id: channel.NewUniqueID()}
	outs := e.receive(a, token, now)
	if len(outs) != 1 || outs[0].all || outs[0].to[0].ID != c.ID || outs[0].m.id != token.id || outs[0].m.confirmed || outs[0].m.source.ID != a.ID {
		t.Fatalf("the token goes on as %+v", outs)
	}
	// C is not there: back to A.
	if len(outs[0].to) != 2 || outs[0].to[1].ID != a.ID {
		t.Errorf("the others to try are %v", outs[0].to)
	}
	token.confirmed = true
	if outs := e.receive(a, token, now); len(outs) != 0 || e.viewID != token.id || !e.settled() {
		t.Errorf("the view is %v, sent %v", e.viewID, outs)
	}
	if m, ok := e.coordinator(); !ok || m.ID != a.ID {
		t.Errorf("the coordinator is %v", m)
	}
	// A dies: B leads.
	e.setMembers(b, []channel.Member{c}, now)
	if _, ok := e.coordinator(); ok {
		t.Error("the dead coordinator is still one")
	}
	now = now.Add(Defaults.Settle)
	outs = e.tick(now)
	if len(outs) != 1 || outs[0].to[0].ID != c.ID || outs[0].m.leader.ID != b.ID || len(outs[0].m.view) != 2 {
		t.Fatalf("the election begins with %+v", outs)
	}
	outs = e.receive(c, outs[0].m, now) // C sends it back as it is
	if len(outs) != 1 || !outs[0].all || !outs[0].m.confirmed || len(outs[0].to) != 1 || outs[0].to[0].ID != c.ID {
		t.Fatalf("the view is confirmed with %+v", outs)
	}
	if m, ok := e.coordinator(); !ok || m.ID != b.ID {
		t.Errorf("the coordinator is %v", m)
	}
}
