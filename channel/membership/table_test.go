package membership

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

func member(i int, port int) channel.Member {
	m := channel.Member{
		Host: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}),
		Port: port, SecurePort: -1, UDPPort: -1,
	}
	m.ID = channel.UniqueID{1, byte(i >> 24), byte(i >> 16), byte(i >> 8), byte(i), byte(port >> 8), byte(port)}
	return m
}

var local = member(0, 4000)

// script runs a table through timed records and renders what comes of them.
type script struct {
	t     *testing.T
	table *Table
	now   time.Duration // since start
}

func newScript(t *testing.T, c Config) *script { return &script{t: t, table: New(c, local)} }

func render(events []channel.MemberEvent, r Refusal) string {
	var out []string
	for _, ev := range events {
		s := fmt.Sprintf("%s %d", ev.Kind, ev.Member.ID[4])
		if ev.Err != nil {
			s += " replaced"
			if !errors.Is(ev.Err, channel.ErrReplaced) {
				s += "?"
			}
		}
		out = append(out, s)
	}
	if r != "" {
		out = append(out, "("+string(r)+")")
	}
	return strings.Join(out, ", ")
}

// at moves the time, calling Expire every 100 ms as an owner does.
func (s *script) at(ms int) []channel.MemberEvent {
	var events []channel.MemberEvent
	for target := time.Duration(ms) * time.Millisecond; ; {
		events = s.table.Expire(events, start.Add(s.now))
		if s.now >= target {
			return events
		}
		s.now = min(s.now+100*time.Millisecond, target)
	}
}

func (s *script) heard(m channel.Member, aliveMillis int) string {
	m.Alive = time.Duration(aliveMillis) * time.Millisecond
	return render(s.table.Heard(nil, m, start.Add(s.now)))
}

func (s *script) want(got, want string) {
	s.t.Helper()
	if got != want {
		s.t.Errorf("at %v: got %q, want %q", s.now, got, want)
	}
}

func TestAddUpdateLose(t *testing.T) {
	s := newScript(t, Config{})
	a := member(1, 4000)
	s.want(s.heard(a, 100), "added 1")
	s.at(500)
	a.Payload = "new"
	s.want(s.heard(a, 600), "updated 1")
	if got := s.table.Members()[0]; got.Payload != "new" || got.Alive != 600*time.Millisecond {
		t.Errorf("member %+v", got)
	}
	s.want(render(s.at(3500), ""), "") // exactly the drop time is not more
	s.want(render(s.at(3600), ""), "lost 1")
	s.want(s.heard(a, 3700), "added 1")
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name string
		m    func(m *channel.Member)
		want string
	}{
		{"own record", func(m *channel.Member) { *m = local }, "(own)"},
		{"own farewell", func(m *channel.Member) { *m = local; m.Command = channel.ShutdownCommand }, "(own)"},
		{"our id elsewhere", func(m *channel.Member) { m.ID = local.ID }, "(own_id)"},
		{"our address", func(m *channel.Member) { m.Host, m.Port = local.Host, local.Port }, "(own_address)"},
		{"no id", func(m *channel.Member) { m.ID = channel.UniqueID{} }, "(id)"},
		{"no host", func(m *channel.Member) { m.Host = netip.Addr{} }, "(host)"},
		{"wildcard", func(m *channel.Member) { m.Host = netip.IPv4Unspecified() }, "(host)"},
		{"group as host", func(m *channel.Member) { m.Host = netip.MustParseAddr("228.0.0.4") }, "(host)"},
		{"port 0", func(m *channel.Member) { m.Port = 0 }, "(port)"},
		{"port -1", func(m *channel.Member) { m.Port = -1 }, "(port)"},
		{"port 65536", func(m *channel.Member) { m.Port = 65536 }, "(port)"},
		{"secure port", func(m *channel.Member) { m.SecurePort = 70000 }, "(port)"},
		{"udp port", func(m *channel.Member) { m.UDPPort = -2 }, "(port)"},
		{"farewell of nobody", func(m *channel.Member) { m.Command = channel.ShutdownCommand }, "(unknown_leave)"},
		{"mapped IPv4", func(m *channel.Member) { m.Host = netip.MustParseAddr("::ffff:10.0.0.1") }, "added 1"},
		{"IPv6", func(m *channel.Member) { m.Host = netip.MustParseAddr("fd00::1") }, "added 1"},
	} {
		s := newScript(t, Config{})
		m := member(1, 4000)
		c.m(&m)
		if got := s.heard(m, 1); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestDuplicatesAndReplaysKeepNobodyAlive(t *testing.T) {
	s := newScript(t, Config{})
	a := member(1, 4000)
	s.heard(a, 1000)
	s.at(500)
	s.heard(a, 1500)
	for range 1000 {
		s.want(s.heard(a, 1500), "(stale)")
	}
	for ms := 600; ms <= 3400; ms += 100 {
		s.at(ms)
		s.want(s.heard(a, 1500), "(stale)")
		s.want(s.heard(a, 1000), "(stale)")
	}
	s.want(render(s.at(3600), ""), "lost 1")
	// Neither do they bring it back, an hour later.
	s.at(3_600_000)
	s.want(s.heard(a, 1500), "(stale)")
	s.want(s.heard(a, 1000), "(stale)")
	s.want(s.heard(a, 3_600_500), "added 1")
}

func TestReplayAfterLeave(t *testing.T) {
	s := newScript(t, Config{})
	a := member(1, 4000)
	s.heard(a, 1000)
	s.at(500)
	bye := a
	bye.Command = channel.ShutdownCommand
	s.want(s.heard(bye, 900), "(stale)") // that of an earlier leave
	s.want(s.heard(bye, 1500), "left 1")
	s.want(s.heard(bye, 1500), "(stale)")
	s.want(s.heard(a, 1000), "(stale)") // overtaken on the way
	s.at(60_000)
	s.want(s.heard(a, 1499), "(stale)")
	// A Tribes node that restarts its membership keeps its id and starts to
	// count from nought: it is believed when its records go on with the time.
	s.want(s.heard(a, 100), "(stale)")
	s.at(60_500)
	s.want(s.heard(a, 600), "(stale)")
	s.want(s.heard(a, 700), "(stale)") // a burst is no life
	s.at(61_000)
	s.want(s.heard(a, 1200), "(stale)")
	s.at(61_500)
	s.want(s.heard(a, 1700), "added 1")
}

func TestFarewellOfALostMember(t *testing.T) {
	s := newScript(t, Config{})
	a := member(1, 4000)
	s.heard(a, 1000)
	s.at(500)
	s.heard(a, 1500)
	s.want(render(s.at(4000), ""), "lost 1")
	a.Command = channel.ShutdownCommand
	s.want(s.heard(a, 1400), "(stale)")
	s.want(s.heard(a, 4500), "left 1")
	s.want(s.heard(a, 4500), "(stale)")
}

// What a member has proved nobody without proof changes, whatever he says.
func TestSealedMembers(t *testing.T) {
	s := newScript(t, Config{})
	sealed := func(m channel.Member, alive int) string {
		m.Alive = time.Duration(alive) * time.Millisecond
		return render(s.table.HeardSealed(nil, m, start.Add(s.now)))
	}
	a := member(1, 4000)
	s.want(sealed(a, 1000), "added 1")
	bye, moved, double := a, a, a
	bye.Command = channel.ShutdownCommand
	moved.Port = 4001
	double.ID[4] = 2
	for _, m := range []channel.Member{a, bye, moved, double} {
		s.want(s.heard(m, 5000), "(unauthenticated)")
	}
	s.at(500)
	s.want(sealed(a, 1500), "updated 1")
	s.want(sealed(a, 1500), "(stale)")
	for alive := 0; alive < 1400; alive += 100 { // in step: no life of a clock that was set back
		s.at(500 + alive)
		s.want(sealed(a, alive), "(stale)")
	}
	s.want(sealed(moved, 2900), "updated 1")
	s.want(sealed(bye, 1400), "(stale)")
	s.at(3000)
	s.want(s.heard(double, 1), "added 2") // at the address that a has left
	s.want(sealed(a, 3400), "(address_taken)")
	real := a
	real.ID[4] = 3
	s.want(sealed(real, 1), "lost 2 replaced, added 3") // what has proof wins
	s.want(sealed(bye, 3500), "left 1")
	s.want(sealed(bye, 3500), "(stale)")
	s.want(s.heard(moved, 9000), "(unauthenticated)")
	s.want(sealed(moved, 3500), "(stale)")
	s.want(sealed(moved, 3600), "added 1")
	if !s.table.Has(a.ID) || s.table.Has(double.ID) {
		t.Error("Has")
	}
}

func TestClockSetBack(t *testing.T) {
	s := newScript(t, Config{})
	a := member(1, 4000)
	var lost []channel.MemberEvent
	for i, alive := 0, 7_200_000; i < 40; i++ {
		lost = append(lost, s.at(i*500)...)
		if alive += 500; i == 20 {
			alive -= 3_600_000
		}
		got := s.heard(a, alive)
		switch {
		case i == 20 || i == 21:
			s.want(got, "(stale)")
		case i > 0:
			s.want(got, "updated 1")
		}
	}
	if len(lost) > 0 {
		t.Errorf("the member was lost: %s", render(lost, ""))
	}
}

func TestForgedFarFutureDoesNotSilenceTheMember(t *testing.T) {
	s := newScript(t, Config{})
	a := member(1, 4000)
	var lost []channel.MemberEvent
	for i := range 20 {
		lost = append(lost, s.at(i*500)...)
		s.heard(a, 1000+i*500)
		if i == 5 {
			s.heard(a, 1<<40)
		}
	}
	if len(lost) > 0 || s.table.Members()[0].Alive != 10500*time.Millisecond {
		t.Errorf("%s, %+v", render(lost, ""), s.table.Members())
	}
}

func TestRestartAtTheSameAddress(t *testing.T) {
	s := newScript(t, Config{})
	old, fresh := member(1, 4000), member(1, 4000)
	fresh.ID[4] = 2
	s.heard(old, 1000)
	s.at(500)
	s.heard(old, 1500)
	s.at(700) // killed and started again
	s.want(s.heard(fresh, 0), "(address_taken)")
	s.at(1200)
	s.want(s.heard(fresh, 500), "(address_taken)")
	s.at(1700)
	s.want(s.heard(fresh, 1000), "lost 1 replaced, added 2")
	s.want(s.heard(old, 1500), "(stale)")
}

func TestRestartAfterFarewell(t *testing.T) {
	s := newScript(t, Config{})
	old, fresh := member(1, 4000), member(1, 4000)
	fresh.ID[4] = 2
	s.heard(old, 1000)
	old.Command = channel.ShutdownCommand
	s.want(s.heard(old, 1200), "left 1")
	s.want(s.heard(fresh, 0), "added 2")
}

func TestTwoNodesWithOneAddress(t *testing.T) {
	s := newScript(t, Config{})
	real, double := member(1, 4000), member(1, 4000)
	double.ID[4] = 2
	s.want(s.heard(real, 1000), "added 1")
	for i := range 50 {
		if events := s.at(i * 500); len(events) > 0 {
			t.Fatal(render(events, ""))
		}
		if i > 0 {
			s.want(s.heard(real, 1000+i*500), "updated 1")
		}
		s.want(s.heard(double, 90_000+i*500), "(address_taken)")
	}
}

func TestMemberThatMoves(t *testing.T) {
	s := newScript(t, Config{})
	a, b := member(1, 4000), member(2, 4000)
	s.heard(a, 1)
	s.heard(b, 1)
	moved := a
	moved.Port = 4001
	s.want(s.heard(moved, 2), "updated 1")
	moved.Host = b.Host
	moved.Port = b.Port
	s.want(s.heard(moved, 3), "(address_taken)")
	c := member(1, 4000) // the address that a has left
	c.ID[4] = 3
	s.want(s.heard(c, 1), "added 3")
}

func TestFloodOfFakes(t *testing.T) {
	c := Config{}
	s := newScript(t, c)
	for i := 1; i <= 10; i++ {
		s.heard(member(i, 4000), 1000)
	}
	late := member(11, 4000)
	fakes, most := 1000, 0
	var late1, late2 string
	for ms := 0; ms < 10_000; ms += 100 { // 10,000 a second
		for _, ev := range s.at(ms) {
			if ev.Member.ID[4] <= 10 && ev.Member.ID[3] == 0 {
				t.Fatalf("at %d ms: %s", ms, render([]channel.MemberEvent{ev}, ""))
			}
		}
		for range 1000 {
			fakes++
			s.heard(member(fakes, 4000), fakes)
		}
		if ms%500 == 0 {
			for i := 1; i <= 10; i++ {
				s.heard(member(i, 4000), 1000+ms)
			}
			switch ms {
			case 5000:
				late1 = s.heard(late, 0)
			case 5500:
				late2 = s.heard(late, 500)
			}
		}
		most = max(most, s.table.Len())
	}
	if most > 11+DefaultNewPerSecond*6 {
		t.Errorf("the table grew to %d members", most)
	}
	// A real newcomer gets through at its second heartbeat.
	if late1 != "(deferred)" || late2 != "added 11" {
		t.Errorf("a real newcomer during the flood: %q, %q", late1, late2)
	}
	if n := len(s.table.candidates.values); n > maxCandidates || n > len(s.table.candidates.ring) {
		t.Errorf("%d candidates", n)
	}
}

func TestFullTable(t *testing.T) {
	s := newScript(t, Config{MaxMembers: 8, NewPerSecond: 1000})
	var got []string
	for i := 1; i <= 10; i++ {
		got = append(got, s.heard(member(i, 4000), 0))
	}
	// A quarter may be newcomers heard once; the others must prove themselves.
	if want := []string{"added 1", "added 2", "(deferred)"}; !slices.Equal(got[:3], want) {
		t.Errorf("got %q", got)
	}
	s.at(100)
	got = got[:0]
	for i := 1; i <= 10; i++ {
		got = append(got, s.heard(member(i, 4000), 100))
	}
	if got[9] != "(full)" || got[8] != "(full)" || s.table.Len() != 8 {
		t.Errorf("got %q, %d members", got, s.table.Len())
	}
}

func TestSeed(t *testing.T) {
	s := newScript(t, Config{MaxMembers: 3})
	a, b := member(1, 4000), member(2, 4000)
	s.table.Seed([]channel.Member{a, b, local, {}, a, member(3, 4000), member(4, 4000)}, start, nil)
	if s.table.Len() != 3 {
		t.Fatalf("%d members", s.table.Len())
	}
	s.at(1000)
	s.want(s.heard(a, 1000), "updated 1")
	s.want(render(s.at(3100), ""), "lost 2, lost 3")
}

func TestOwnPauseIsNotTheOthersSilence(t *testing.T) {
	s := newScript(t, Config{})
	a := member(1, 4000)
	s.heard(a, 0)
	s.at(500)
	s.heard(a, 500)
	s.now += 16 * time.Second // stopped
	s.want(render(s.table.Expire(nil, start.Add(s.now)), ""), "")
	s.want(s.heard(a, 16_500), "updated 1")
	s.now += 16 * time.Second
	s.want(render(s.at(int(s.now.Milliseconds())), ""), "")
	s.want(render(s.at(int(s.now.Milliseconds())+2900), ""), "")
	s.want(render(s.at(int(s.now.Milliseconds())+200), ""), "lost 1")
}

// TestTableIsConsistent feeds arbitrary records and checks what must hold
// whatever comes.
func TestTableIsConsistent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Config{MaxMembers: rapid.IntRange(1, 6).Draw(t, "max"), NewPerSecond: rapid.IntRange(1, 4).Draw(t, "rate")}
		table := New(c, local)
		now := start
		view := map[channel.UniqueID]channel.Member{}
		follow := func(events []channel.MemberEvent) {
			for _, ev := range events {
				_, have := view[ev.Member.ID]
				switch ev.Kind {
				case channel.MemberAdded:
					if have {
						t.Fatalf("added twice: %v", ev.Member.ID)
					}
					view[ev.Member.ID] = ev.Member
				case channel.MemberUpdated:
					if !have {
						t.Fatalf("updated without being there")
					}
					view[ev.Member.ID] = ev.Member
				case channel.MemberLost:
					if !have {
						t.Fatalf("lost without being there")
					}
					delete(view, ev.Member.ID)
				case channel.MemberLeft:
					delete(view, ev.Member.ID) // may follow a loss
				}
			}
		}
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				now = now.Add(time.Duration(rapid.IntRange(0, 1400).Draw(t, "ms")) * time.Millisecond)
				follow(table.Expire(nil, now))
			default:
				i := rapid.IntRange(0, 9).Draw(t, "member")
				m := member(i, 4000+rapid.IntRange(0, 1).Draw(t, "port"))
				m.ID[4] = byte(i)
				m.Alive = time.Duration(rapid.IntRange(-5, 20).Draw(t, "alive")) * 500 * time.Millisecond
				if rapid.IntRange(0, 9).Draw(t, "leaves") == 0 {
					m.Command = channel.ShutdownCommand
				}
				before := table.Len()
				events, refusal := table.Heard(nil, m, now)
				if refusal != "" && (len(events) > 0 || table.Len() != before) {
					t.Fatalf("refused as %s with consequences", refusal)
				}
				follow(events)
			}
			if table.Len() > c.MaxMembers || table.Len() != len(view) || len(table.byAddr) != len(view) {
				t.Fatalf("%d members, %d addresses, %d in the view", table.Len(), len(table.byAddr), len(view))
			}
			unproven := 0
			for id, e := range table.members {
				if view[id] != e.m || table.byAddr[e.m.Addr()] != id || e.heard.After(now) {
					t.Fatalf("member %v is inconsistent", e.m)
				}
				if !e.proven {
					unproven++
				}
			}
			if unproven != table.unproven || unproven > max(1, c.MaxMembers/4) {
				t.Fatalf("%d unproven, counted %d", unproven, table.unproven)
			}
		}
	})
}

func TestMemoryForgetsTheOldest(t *testing.T) {
	m := newMemory[int](3)
	id := func(i int) channel.UniqueID { return channel.UniqueID{byte(i)} }
	for i := range 5 {
		m.put(id(i), i)
	}
	for i := range 5 {
		if got := m.get(id(i)) != nil; got != (i >= 2) {
			t.Errorf("%d: %v", i, got)
		}
	}
	m.remove(id(3))
	m.put(id(3), 33) // in a new place; the old one must not end it
	m.put(id(6), 6)
	m.put(id(7), 7)
	if v := m.get(id(3)); v == nil || *v != 33 || len(m.values) != 3 {
		t.Errorf("3: %v, %d values", v, len(m.values))
	}
}

func BenchmarkHeard(b *testing.B) {
	b.ReportAllocs()
	table := New(Config{NewPerSecond: 1 << 20}, local)
	now := start
	var members []channel.Member
	for i := 1; i <= 100; i++ {
		members = append(members, member(i, 4000))
	}
	var events []channel.MemberEvent
	i := 0
	for b.Loop() {
		m := &members[i%len(members)]
		m.Alive += time.Millisecond
		events, _ = table.Heard(events[:0], *m, now)
		i++
	}
}
