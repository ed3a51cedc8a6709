package conformance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/wire"
)

const membershipSource = "channel: Membership, MemberSink"

func membershipChecks() []Check {
	check := func(name string, run func(t *T), requirement, source string, saboteurs ...Saboteur) Check {
		return Check{
			ID: "membership/" + name, Profile: ProfileMembership, Level: Must,
			Requirement: requirement, Source: source, Run: run, Saboteurs: saboteurs,
		}
	}
	extended := func(c Check, l Level, feature string) Check {
		c.Level, c.Features = l, []string{feature}
		return c
	}
	return []Check{
		check("converges", checkConverges, "Five members see the four others within three announce intervals.",
			membershipSource, tinyBug("announces itself too seldom", tinyBugs{seldom: 8}), tinyBug("is deaf to all but the first", tinyBugs{maxMembers: 1})),
		check("leave", checkLeave, "A graceful stop is seen within one interval.",
			"channel: Membership.Stop, MemberLeft", tinyBug("leaves in silence", tinyBugs{noFarewell: true})),
		check("crash", checkCrash, "Silence is detected after the drop time and not more than two intervals later.",
			"channel: MemberLost", tinyBug("waits three times as long", tinyBugs{patience: 3}), tinyBug("gives up after one interval", tinyBugs{patience: 0.3})),
		check("reincarnation", checkReincarnation, "A new id at a known address removes the old member and then adds the new one, each once.",
			"channel: ErrReplaced, MemberEvent.Final", tinyBug("adds the new one first", tinyBugs{newFirst: true}), tinyBug("takes the new one for the old", tinyBugs{byAddress: true})),
		check("never-self", checkNeverSelf, "The local member is in no event.",
			"channel: View.Members", tinyBug("hears itself", tinyBugs{self: true})),
		check("alternates", checkAlternates, "Per member, being added and removed strictly alternate, under any fault plan.",
			membershipSource, tinyBug("adds with every heartbeat", tinyBugs{addAlways: true}), tinyBug("removes twice", tinyBugs{removeTwice: true})),
		check("partition-heals", checkPartitionHeals, "Each side of a 3/2 split drops the other; after healing all see all again, once.",
			"design: splits heal without an operator", tinyBug("forgives nobody", tinyBugs{noReturn: true}), tinyBug("drops nobody", tinyBugs{patience: 1e6})),
		extended(check("loss-tolerant", checkLossTolerant, "With a fifth of all datagrams lost for ten minutes nobody is removed.",
			"conformance: feature loss-tolerant", tinyBug("has no patience", tinyBugs{patience: 0.4})), Should, FeatureLossTolerant),
		check("garbage", checkGarbage, "Random, truncated and foreign datagrams are counted and change nothing.",
			"design: every refused input increases exactly one counter", tinyBug("drops all members on garbage", tinyBugs{garbageDrops: true}),
			tinyBug("does not count garbage", tinyBugs{uncounted: true}), tinyBug("stops listening on garbage", tinyBugs{garbageDeafens: true})),
		check("monotonic", checkMonotonic, "A step of an hour, forth or back, in the clock that a member announces removes nobody.",
			"channel/membership: Table", tinyBug("compares alive times with its own clock", tinyBugs{byAlive: true})),
		extended(check("payload-change", checkPayloadChange, "A changed payload is an update, not a leave and a join.",
			"channel: Membership.Update, MemberUpdated", tinyBug("leaves and joins", tinyBugs{rejoin: true}), tinyBug("does not tell", tinyBugs{noUpdate: true})), Should, FeaturePayload),
	}
}

// flock is a set of nodes with nothing but the subject.
type flock struct {
	t     *T
	nw    *channeltest.SimNet
	times MembershipTimes
	ips   []string
	peers []*peer
	gone  []*peer
}

// peer is one of them; it notes what it is told.
type peer struct {
	ip      string
	node    *channeltest.SimNode
	net     *spyNet
	local   channel.Member
	m       channel.Membership
	metrics *channel.Metrics
	running bool

	mu     sync.Mutex
	events []timed
	view   map[channel.UniqueID]channel.Member
}

type timed struct {
	channel.MemberEvent
	at time.Time
}

// Observe implements channel.MemberSink.
func (p *peer) Observe(ev channel.MemberEvent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events = append(p.events, timed{ev, time.Now()})
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		p.view[ev.Member.ID] = ev.Member
	case channel.MemberLost, channel.MemberLeft:
		delete(p.view, ev.Member.ID)
	}
}

// about returns the events about a member so far.
func (p *peer) about(m channel.Member) (list []timed) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ev := range p.events {
		if ev.Member.ID == m.ID {
			list = append(list, ev)
		}
	}
	return list
}

func (p *peer) removals() (list []timed) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ev := range p.events {
		if ev.Kind == channel.MemberLost || ev.Kind == channel.MemberLeft {
			list = append(list, ev)
		}
	}
	return list
}

func (p *peer) sees(others ...*peer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range others {
		if _, ok := p.view[o.local.ID]; !ok && o != p {
			return fmt.Errorf("%s does not see %s", p.ip, o.ip)
		}
	}
	want := len(others)
	if slices.Contains(others, p) {
		want--
	}
	if len(p.view) != want {
		return fmt.Errorf("%s sees %d members, want %d", p.ip, len(p.view), want)
	}
	return nil
}

// withGroup runs f with count nodes that have started a few milliseconds apart.
func (t *T) withGroup(count int, c channeltest.SimConfig, f func(t *T, g *flock)) {
	t.Helper()
	if !t.Virtual() {
		t.Skip("needs the simulated network")
	}
	s, ok := t.Subject.(MembershipSubject)
	if !ok {
		t.Fatalf("a %T is no membership", t.Subject)
	}
	t.Sim(c, func(t *T, nw *channeltest.SimNet) {
		g := &flock{t: t, nw: nw, times: s.Times()}
		for i := range count {
			g.ips = append(g.ips, fmt.Sprintf("10.0.0.%d", i+1))
		}
		defer g.stopAll()
		for _, ip := range g.ips {
			g.peers = append(g.peers, g.start(ip))
			time.Sleep(3 * time.Millisecond)
		}
		f(t, g)
	})
}

func (g *flock) start(ip string) *peer {
	g.t.Helper()
	p := &peer{ip: ip, node: g.nw.Node(ip), metrics: channel.NewMetrics(), view: map[channel.UniqueID]channel.Member{}}
	p.net = &spyNet{SimNode: p.node}
	p.local = channel.Member{
		ID: channel.NewUniqueID(), Host: p.node.Addr(), Port: 4000, SecurePort: -1, UDPPort: -1,
		Payload: channel.Announcement{Name: ip}.Encode(),
	}
	var err error
	p.m, err = g.t.Subject.(MembershipSubject).Membership(g.t, withLogger(channel.Settings{Name: "membership", Net: p.net, Metrics: p.metrics}), ip, g.ips)
	if err == nil {
		err = p.m.Start(g.t.Context(), p.local, nil, p)
	}
	if err != nil {
		g.t.Fatalf("start at %s: %v", ip, err)
	}
	p.running = true
	return p
}

// background is a context for cleaning up.
func (t *T) background() context.Context { return context.Background() }

func (g *flock) stopAll() {
	for _, p := range slices.Concat(g.peers, g.gone) {
		if p.running {
			p.running = false
			_ = p.m.Stop(context.Background()) // the network may be cut
		}
	}
}

// crash cuts the power of a node.
func (g *flock) crash(p *peer) {
	p.node.Crash()
	p.running = false
	_ = p.m.Stop(context.Background()) // only to end its goroutines: nobody hears it
	g.gone = append(g.gone, p)
	g.peers = slices.DeleteFunc(slices.Clone(g.peers), func(o *peer) bool { return o == p })
}

// complete waits until all see all.
func (g *flock) complete(within time.Duration) {
	g.t.Helper()
	g.t.Eventually(within, func() error {
		var errs []error
		for _, p := range g.peers {
			errs = append(errs, p.sees(g.peers...))
		}
		return errors.Join(errs...)
	})
}

// margin is for latencies.
const margin = 50 * time.Millisecond

func checkConverges(t *T) {
	t.withGroup(5, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(3*g.times.Interval + margin)
		time.Sleep(10 * g.times.Drop)
		g.complete(0)
		for _, p := range g.peers {
			if r := p.removals(); len(r) > 0 {
				t.Errorf("%s removed %v although nothing had happened", p.ip, r[0].Member)
			}
		}
	})
}

func checkLeave(t *T) {
	t.withGroup(4, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(g.patience())
		leaver := g.peers[1]
		begin := time.Now()
		leaver.running = false
		t.within("Stop", func() error { return leaver.m.Stop(context.Background()) })
		time.Sleep(g.times.Interval + margin - time.Since(begin))
		for _, p := range g.peers {
			if p == leaver {
				continue
			}
			if err := p.sees(g.except(leaver)...); err != nil {
				t.Errorf("an interval after a member has stopped: %v", err)
			}
		}
		time.Sleep(2 * g.times.Drop)
		for _, p := range g.except(leaver) {
			if n := len(p.removals()); n != 1 {
				t.Errorf("%s removed the leaving member %d times", p.ip, n)
			}
		}
		t.within("Stop for the second time", func() error { return leaver.m.Stop(context.Background()) })
	})
}

func (g *flock) except(out *peer) []*peer {
	return slices.DeleteFunc(slices.Clone(g.peers), func(p *peer) bool { return p == out })
}

// patience is enough for a group to find itself.
func (g *flock) patience() time.Duration { return 10*g.times.Interval + 2*g.times.Drop }

func checkCrash(t *T) {
	t.withGroup(4, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(g.patience())
		time.Sleep(g.times.Drop)
		victim := g.peers[2]
		died := time.Now()
		g.crash(victim)
		latest := g.times.Drop + 2*g.times.Interval + margin
		time.Sleep(latest + 2*g.times.Drop)
		for _, p := range g.peers {
			r := p.removals()
			if len(r) != 1 || r[0].Member.ID != victim.local.ID {
				t.Errorf("%s reported %d removals after one member had crashed", p.ip, len(r))
				continue
			}
			// The last heartbeat was up to an interval before the crash.
			took := r[0].at.Sub(died)
			if took > latest || took < g.times.Drop-g.times.Interval-margin {
				t.Errorf("%s noticed the crash after %v; the drop time is %v, the interval %v", p.ip, took, g.times.Drop, g.times.Interval)
			}
		}
	})
}

func checkReincarnation(t *T) {
	t.withGroup(3, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(g.patience())
		old := g.peers[2]
		g.crash(old)
		time.Sleep(g.times.Interval / 2)
		reborn := g.start(old.ip)
		g.peers = append(g.peers, reborn)
		g.complete(2 * g.patience())
		time.Sleep(2 * g.times.Drop)
		for _, p := range g.peers[:2] {
			var log []string
			p.mu.Lock()
			for _, ev := range p.events {
				who := ""
				switch ev.Member.ID {
				case old.local.ID:
					who = "old"
				case reborn.local.ID:
					who = "new"
				}
				if who != "" && ev.Kind != channel.MemberUpdated {
					log = append(log, map[bool]string{true: "added ", false: "removed "}[ev.Kind == channel.MemberAdded]+who)
				}
			}
			p.mu.Unlock()
			if got := strings.Join(log, ", "); got != "added old, removed old, added new" {
				t.Errorf("%s: %s", p.ip, got)
			}
		}
	})
}

func checkNeverSelf(t *T) {
	t.withGroup(3, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(g.patience())
		time.Sleep(20 * g.times.Interval)
		for _, p := range g.peers {
			p.mu.Lock()
			for _, ev := range p.events {
				if ev.Member.ID == p.local.ID || ev.Member.Addr() == p.local.Addr() {
					t.Errorf("%s was told %v of itself", p.ip, ev.Kind)
					break
				}
			}
			p.mu.Unlock()
		}
	})
}

func checkAlternates(t *T) {
	t.withGroup(5, channeltest.SimConfig{}, func(t *T, g *flock) {
		rng := t.Rand("faults")
		all := slices.Clone(g.ips)
		for range 25 {
			switch rng.IntN(5) {
			case 0:
				rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
				cut := 1 + rng.IntN(3)
				g.nw.Partition(all[:cut], all[cut:])
			case 1:
				g.nw.SetLink(all[0], all[1], channeltest.LinkPolicy{Latency: time.Millisecond, Loss: 0.7})
			case 2:
				g.nw.SetLink(all[2], all[3], channeltest.LinkPolicy{Latency: 5 * time.Millisecond, Jitter: g.times.Interval})
			case 3:
				if len(g.peers) > 3 {
					p := g.peers[rng.IntN(len(g.peers))]
					g.crash(p)
					time.Sleep(time.Duration(rng.Int64N(int64(g.times.Drop))))
					g.peers = append(g.peers, g.start(p.ip))
				}
			case 4:
				g.nw.Heal()
				g.nw.ResetLinks()
			}
			time.Sleep(time.Duration(rng.Int64N(int64(2 * g.times.Drop))))
		}
		g.nw.Heal()
		g.nw.ResetLinks()
		g.complete(3 * g.patience())
		for _, p := range slices.Concat(g.peers, g.gone) {
			p.alternate(t)
		}
	})
}

// alternate checks the events of every member.
func (p *peer) alternate(t *T) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	in := map[channel.UniqueID]bool{}
	for _, ev := range p.events {
		switch ev.Kind {
		case channel.MemberAdded:
			if in[ev.Member.ID] {
				t.Errorf("%s: %v was added twice in a row", p.ip, ev.Member)
				return
			}
			in[ev.Member.ID] = true
		case channel.MemberUpdated:
			if !in[ev.Member.ID] {
				t.Errorf("%s: %v was updated without having been added", p.ip, ev.Member)
				return
			}
		default:
			if !in[ev.Member.ID] {
				t.Errorf("%s: %v was removed without having been added", p.ip, ev.Member)
				return
			}
			delete(in, ev.Member.ID)
		}
	}
}

func checkPartitionHeals(t *T) {
	t.withGroup(5, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(g.patience())
		left, right := g.peers[:3], g.peers[3:]
		g.nw.Partition(g.ips[:3], g.ips[3:])
		t.Eventually(3*g.times.Drop+4*g.times.Interval, func() error {
			var errs []error
			for _, p := range left {
				errs = append(errs, p.sees(left...))
			}
			for _, p := range right {
				errs = append(errs, p.sees(right...))
			}
			return errors.Join(errs...)
		})
		time.Sleep(time.Minute)
		g.nw.Heal()
		g.complete(g.patience())
		time.Sleep(2 * g.times.Drop)
		g.complete(0)
		for _, p := range g.peers {
			p.alternate(t)
			for _, o := range g.peers {
				if n := len(p.about(o.local)); o != p && (slices.Contains(left, p) != slices.Contains(left, o)) && countAdds(p.about(o.local)) != 2 {
					t.Errorf("%s was told %d times of %s, added %d times; want twice", p.ip, n, o.ip, countAdds(p.about(o.local)))
				}
			}
		}
	})
}

func countAdds(list []timed) (n int) {
	for _, ev := range list {
		if ev.Kind == channel.MemberAdded {
			n++
		}
	}
	return n
}

func checkLossTolerant(t *T) {
	t.withGroup(4, channeltest.SimConfig{Link: channeltest.LinkPolicy{Latency: time.Millisecond, Loss: 0.2}}, func(t *T, g *flock) {
		g.complete(2 * g.patience())
		time.Sleep(10 * time.Minute)
		for _, p := range g.peers {
			if r := p.removals(); len(r) > 0 {
				t.Errorf("%s removed %d living members", p.ip, len(r))
			}
		}
	})
}

// spyNet notes the multicast groups that are listened to.
type spyNet struct {
	*channeltest.SimNode
	mu     sync.Mutex
	groups []*net.UDPAddr // guarded by mu
}

// ListenUDP implements transport.Net.
func (s *spyNet) ListenUDP(network string, laddr *net.UDPAddr) (transport.UDPConn, error) {
	if laddr != nil && laddr.IP.IsMulticast() {
		s.mu.Lock()
		s.groups = append(s.groups, laddr)
		s.mu.Unlock()
	}
	return s.SimNode.ListenUDP(network, laddr)
}

// listeners learns where the nodes of a flock hear announcements, a group's
// address or their own, and takes a sample of what is said there.
func (g *flock) listeners() (map[string]*net.UDPAddr, []byte) {
	g.t.Helper()
	addrs := map[string]*net.UDPAddr{}
	var sample []byte
	var mu sync.Mutex
	g.nw.Tap(func(p channeltest.Packet) {
		if p.Kind == channeltest.Segment || p.Lost {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if p.Kind == channeltest.Datagram {
			addrs[p.To.Addr().String()] = net.UDPAddrFromAddrPort(p.To)
		}
		if sample == nil {
			sample = slices.Clone(p.Payload)
		}
	})
	time.Sleep(5 * g.times.Interval)
	g.nw.Tap(func(channeltest.Packet) {})
	mu.Lock()
	defer mu.Unlock()
	for _, p := range g.peers {
		p.net.mu.Lock()
		if len(p.net.groups) > 0 {
			addrs[p.ip] = p.net.groups[len(p.net.groups)-1]
		}
		p.net.mu.Unlock()
	}
	return maps.Clone(addrs), sample // the tap may still be running once more
}

func checkGarbage(t *T) {
	t.withGroup(3, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(g.patience())
		addrs, sample := g.listeners()
		if len(addrs) == 0 {
			t.Skip("the membership sends no datagrams")
		}
		before := make([]int64, len(g.peers))
		for i, p := range g.peers {
			before[i] = refusals(p.metrics)
		}
		stranger, err := g.nw.Node("10.0.9.9").ListenPacket("udp4", "10.0.9.9:5000")
		if err != nil {
			t.Fatalf("stranger: %v", err)
		}
		defer stranger.Close()
		const rounds = 40
		rng := t.Rand("garbage")
		for range rounds {
			for _, bad := range garbage(rng.IntN, sample) {
				for _, p := range g.peers {
					if a := addrs[p.ip]; a != nil {
						_, _ = stranger.WriteTo(bad, a)
					}
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
		time.Sleep(2 * g.times.Drop)
		g.complete(0)
		for i, p := range g.peers {
			if r := p.removals(); len(r) > 0 {
				t.Errorf("%s removed %v after garbage", p.ip, r[0].Member)
			}
			if t.Mode == "direct" && addrs[p.ip] != nil && refusals(p.metrics)-before[i] < rounds {
				t.Errorf("%s was sent garbage %d times and counted %d", p.ip, rounds, refusals(p.metrics)-before[i])
			}
		}
	})
}

// garbage is one datagram of each kind.
func garbage(intn func(int) int, sample []byte) [][]byte {
	random := make([]byte, 1+intn(300))
	for i := range random {
		random[i] = byte(intn(256))
	}
	long := append(slices.Clone(sample), 0, 0, 0)
	long[0] ^= 0xff
	return [][]byte{
		random, sample[:intn(len(sample))], []byte("GET / HTTP/1.1\r\n\r\n"), {},
		append([]byte("TRIBES-B\x01\x00\x7f\xff\xff\xff"), random...), append([]byte("TRIBES-B\x01\x00\xff\xff\xff\xff"), random...), long,
	}
}

// refusals sums up what a membership has counted as refused.
func refusals(m *channel.Metrics) (n int64) {
	for _, s := range m.Samples() {
		if !s.Counter {
			continue
		}
		for _, word := range []string{"refus", "reject", "bad", "garbage", "malformed", "invalid", "drop", "error", "ignored"} {
			if strings.Contains(s.Name, word) {
				n += int64(s.Value)
				break
			}
		}
	}
	return n
}

func checkMonotonic(t *T) {
	t.withGroup(3, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(g.patience())
		addrs, _ := g.listeners()
		actor := g.peers[2]
		var last []byte
		var mu sync.Mutex
		g.nw.Tap(func(p channeltest.Packet) {
			if p.From.Addr() == actor.node.Addr() && p.Kind != channeltest.Segment {
				mu.Lock()
				last = slices.Clone(p.Payload)
				mu.Unlock()
			}
		})
		time.Sleep(2 * g.times.Interval)
		g.nw.Tap(func(channeltest.Packet) {})
		mu.Lock()
		record, _, err := wire.DecodeMember(last)
		mu.Unlock()
		if err != nil {
			t.Skipf("the membership does not announce itself by Tribes member records: %v", err)
		}
		// From here on the check plays the third member, with a clock of its own.
		g.crash(actor)
		played, err := g.nw.Node(actor.ip).ListenPacket("udp4", actor.ip+":5000")
		if err != nil {
			t.Fatalf("play a member: %v", err)
		}
		defer played.Close()
		for _, step := range []time.Duration{0, time.Hour, -time.Hour, -time.Hour + time.Minute, 2 * time.Hour} {
			record.Alive += step
			for range int(2*g.times.Drop/g.times.Interval) + 4 {
				record.Alive += g.times.Interval
				for _, p := range g.peers {
					_, _ = played.WriteTo(wire.AppendMember(nil, record), addrs[p.ip])
				}
				time.Sleep(g.times.Interval)
			}
			for _, p := range g.peers {
				if r := p.removals(); len(r) > 0 {
					t.Fatalf("%s removed %v after its clock had stepped by %v", p.ip, r[0].Member, step)
				}
			}
		}
	})
}

func checkPayloadChange(t *T) {
	t.withGroup(3, channeltest.SimConfig{}, func(t *T, g *flock) {
		g.complete(g.patience())
		changed := g.peers[0]
		next := changed.local
		next.Payload = channel.Announcement{Name: "changed"}.Encode()
		t.within("Update", func() error { return changed.m.Update(t.Context(), next) })
		t.Eventually(g.patience(), func() error {
			for _, p := range g.peers[1:] {
				p.mu.Lock()
				got := p.view[changed.local.ID]
				p.mu.Unlock()
				if got.Payload != next.Payload {
					return fmt.Errorf("%s was not told the new payload", p.ip)
				}
			}
			return nil
		})
		for _, p := range g.peers[1:] {
			if r := p.removals(); len(r) > 0 {
				t.Errorf("%s was told that the member left, not that its payload changed", p.ip)
			}
		}
	})
}
