package multicast_test

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
	"github.com/longhouse-go/longhouse/plugins/membership/static"
)

// eachSecret runs f with the kinds that have a secret.
func eachSecret(t *testing.T, c channeltest.SimConfig, f func(t *testing.T, nw *channeltest.SimNet, kind int)) {
	for i, k := range kinds {
		if k.secret != "" {
			t.Run(k.name, func(t *testing.T) {
				channeltest.Run(t, c, func(t *testing.T, nw *channeltest.SimNet) { f(t, nw, i) })
			})
		}
	}
}

// tape notes the datagrams that a node sends.
type tape struct {
	mu   sync.Mutex
	sent []taped
}

type taped struct {
	at   time.Time
	data []byte
}

func record(nw *channeltest.SimNet, ip string) *tape {
	tp := &tape{}
	from := netip.MustParseAddr(ip)
	nw.Tap(func(p channeltest.Packet) {
		tp.mu.Lock()
		defer tp.mu.Unlock()
		if p.From.Addr() != from || p.Kind == channeltest.Segment {
			return
		}
		if n := len(tp.sent); n > 0 && tp.sent[n-1].at.Equal(p.Sent) && slices.Equal(tp.sent[n-1].data, p.Payload) {
			return // the same to another one
		}
		tp.sent = append(tp.sent, taped{p.Sent, slices.Clone(p.Payload)})
	})
	return tp
}

func (tp *tape) all() []taped {
	tp.mu.Lock()
	defer tp.mu.Unlock()
	return slices.Clone(tp.sent)
}

func TestForgeriesEvictAndRedescribeNobody(t *testing.T) {
	eachSecret(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet, kind int) {
		tp := record(nw, "10.0.0.2")
		peers := cluster(t, nw, kind, 3)
		time.Sleep(3 * time.Second)
		for _, p := range peers {
			p.take()
		}
		victim := peers[1].local
		victim.Alive = time.Hour
		all := tp.all()
		genuine := all[len(all)-1].data
		_, n, err := wire.DecodeMember(genuine)
		if err != nil || n == len(genuine) {
			t.Fatalf("a heartbeat of %d bytes whose record has %d: %v", len(genuine), n, err)
		}
		seal := genuine[n:]
		bye, moved, told := victim, victim, victim
		bye.Command = channel.ShutdownCommand
		moved.Host = netip.MustParseAddr("10.0.0.66")
		told.Payload = "another"
		double := victim // another id at the victim's address
		double.ID = channel.NewUniqueID()
		send := sender(t, nw, "10.0.0.66")
		for what, m := range map[string]channel.Member{"farewell": bye, "address": moved, "payload": told, "double": double} {
			for reason, tail := range map[string][]byte{
				"unauthenticated": nil,
				"forged":          seal,
				"unknown_key":     slices.Concat([]byte("LHS1xxxx"), seal[8:]),
				"trailing":        seal[:len(seal)-1],
			} {
				before := peers[0].count("membership_refused_total", "reason", reason)
				send(append(wire.AppendMember(nil, m), tail...), kind, "10.0.0.1")
				time.Sleep(10 * time.Millisecond)
				if n := peers[0].count("membership_refused_total", "reason", reason) - before; n != 1 {
					t.Errorf("a forged %s: counted %d times as %s", what, n, reason)
				}
			}
		}
		for i := range genuine { // one bit of a genuine one
			x := slices.Clone(genuine)
			x[i] ^= 1 << (i % 8)
			send(x, kind, "10.0.0.1")
			time.Sleep(time.Millisecond)
		}
		time.Sleep(4 * time.Second)
		for i, p := range peers {
			if got := p.take(); len(got) != 0 {
				t.Errorf("node %d: %q", i+1, got)
			}
			p.mu.Lock()
			for _, m := range p.view {
				if m.Payload != "" || m.Alive > time.Minute {
					t.Errorf("node %d sees %+v", i+1, m)
				}
			}
			p.mu.Unlock()
		}
		if err := complete(peers); err != nil {
			t.Error(err)
		}
		peers[1].stop(t)
		time.Sleep(10 * time.Millisecond)
		if got := peers[0].take(); !slices.Equal(got, []string{"left 10.0.0.2:4000"}) {
			t.Errorf("a genuine farewell: %q", got)
		}
		stopAll(t, peers)
	})
}

// HB-21: whatever a node has sent is no sign of its life when it is repeated,
// at the same pace, an hour or a moment later, to nodes that knew it and to nodes
// that did not.
func TestRecordedHeartbeatsBringNobodyBack(t *testing.T) {
	eachSecret(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet, kind int) {
		tp := record(nw, "10.0.0.3")
		peers := cluster(t, nw, kind, 3)
		time.Sleep(20 * time.Second)
		nw.Node("10.0.0.3").Crash()
		peers[2].stop(t)
		all := tp.all()
		if len(all) < 40 {
			t.Fatalf("%d datagrams recorded", len(all))
		}
		send := sender(t, nw, "10.0.0.66")
		replay := func() {
			for i, d := range all {
				if i > 0 {
					time.Sleep(d.at.Sub(all[i-1].at))
				}
				for _, to := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.4"} {
					send(d.data, kind, to)
					if !kinds[kind].static {
						break
					}
				}
			}
			time.Sleep(time.Second)
		}
		time.Sleep(time.Second)
		replay()
		if got := peers[0].sees(); got != "10.0.0.2:4000" {
			t.Errorf("after a repetition at once: %q", got)
		}
		n := nw.Node("10.0.0.4")
		fresh, s := newPeer(n, netip.AddrPortFrom(n.Addr(), 4000))
		fresh.m = newMembership(t, kind, s, []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"})
		fresh.start(t)
		if kinds[kind].static { // the others list it, too
			for i := range 2 {
				peers[i].stop(t)
				p, s := newPeer(nw.Nodes(2)[i], peers[i].local.Addr())
				p.m = newMembership(t, kind, s, []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"})
				p.start(t)
				peers[i] = p
			}
		}
		time.Sleep(time.Hour)
		for _, p := range peers[:2] {
			p.take()
		}
		fresh.take()
		replay()
		for i, p := range []*peer{peers[0], peers[1], fresh} {
			if got := p.take(); len(got) != 0 {
				t.Errorf("node %d: %q", i+1, got)
			}
		}
		if fresh.count("membership_refused_total", "reason", "unproven") == 0 {
			t.Error("nothing was counted")
		}
		stopAll(t, append(peers[:2], fresh))
	})
}

// A farewell is believed once: the member may come back with the same id, and
// the old farewell does not send it away again.
func TestRecordedFarewell(t *testing.T) {
	eachSecret(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet, kind int) {
		tp := record(nw, "10.0.0.2")
		peers := cluster(t, nw, kind, 2)
		time.Sleep(2 * time.Second)
		began := time.Now().Add(-2 * time.Second)
		peers[1].stop(t)
		time.Sleep(2 * time.Second)
		all := tp.all()
		bye := all[len(all)-1].data
		again, s := newPeer(nw.Node("10.0.0.2"), peers[1].local.Addr())
		again.local = peers[1].local
		again.local.Alive = time.Since(began)
		again.m = newMembership(t, kind, s, []string{"10.0.0.1", "10.0.0.2"})
		again.start(t)
		peers[1] = again
		time.Sleep(time.Second)
		if err := complete(peers); err != nil {
			t.Fatal(err)
		}
		peers[0].take()
		send := sender(t, nw, "10.0.0.66")
		for range 10 {
			send(bye, kind, "10.0.0.1")
			time.Sleep(500 * time.Millisecond)
		}
		if got := peers[0].take(); len(got) != 0 {
			t.Errorf("got %q", got)
		}
		if n := peers[0].count("membership_refused_total", "reason", "stale"); n < 10 {
			t.Errorf("counted %d times", n)
		}
		stopAll(t, peers)
	})
}

// A Tomcat node understands sealed heartbeats, and is let in if its address is
// listed; nobody can pass for a sealed member that way.
func TestNodesWithoutASeal(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		start := func(ip string, change func(*multicast.Config)) *peer {
			n := nw.Node(ip)
			p, s := newPeer(n, netip.AddrPortFrom(n.Addr(), 4000))
			c := multicast.Default()
			change(&c)
			m, err := multicast.New(c, s)
			if err != nil {
				t.Fatal(err)
			}
			p.m = m
			p.start(t)
			return p
		}
		sealed := func(open ...string) func(*multicast.Config) {
			return func(c *multicast.Config) { c.Secret, c.Unauthenticated = secret.New(theSecret), open }
		}
		one, two := start("10.0.0.1", sealed("10.0.0.3", "10.0.1.0/24")), start("10.0.0.2", sealed())
		plain := start("10.0.0.3", func(*multicast.Config) {})
		other := start("10.0.0.4", func(*multicast.Config) {})
		time.Sleep(2 * time.Second)
		for i, c := range []struct {
			p    *peer
			want string
		}{
			{one, "10.0.0.2:4000 10.0.0.3:4000"},
			{two, "10.0.0.1:4000"},
			{plain, "10.0.0.1:4000 10.0.0.2:4000 10.0.0.4:4000"}, // seals are no hindrance
			{other, "10.0.0.1:4000 10.0.0.2:4000 10.0.0.3:4000"},
		} {
			if got := c.p.sees(); got != c.want {
				t.Errorf("node %d sees %q, want %q", i+1, got, c.want)
			}
		}
		if two.count("membership_refused_total", "reason", "unauthenticated") == 0 {
			t.Error("nothing was counted")
		}
		logged := false
		for _, l := range two.logs.All() {
			logged = logged || strings.Contains(l.Message, "without the seal") && l.ContextMap()["member"] != nil
		}
		if !logged {
			t.Error("nothing was logged")
		}
		// From an address that is let in, about a member that has a seal.
		send := sender(t, nw, "10.0.0.3")
		bye := two.local
		bye.Alive, bye.Command = time.Hour, channel.ShutdownCommand
		moved := two.local
		moved.Alive, moved.Host = time.Hour, plain.local.Host
		moved.Port = 4444
		one.take()
		for range 20 {
			send(wire.AppendMember(nil, bye), 0, "")
			send(wire.AppendMember(nil, moved), 0, "")
			time.Sleep(200 * time.Millisecond)
		}
		if got := one.take(); len(got) != 0 || one.sees() != "10.0.0.2:4000 10.0.0.3:4000" {
			t.Errorf("%q, sees %q", got, one.sees())
		}
		stopAll(t, []*peer{one, two, plain, other})
	})
}

// The secret is replaced node by node, and nobody is lost.
func TestSecretIsReplaced(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		const a, b = "the first secret of all", "the second secret of all"
		steps := [][]string{{a}, {a, b}, {b, a}, {b}}
		nodes := nw.Nodes(2)
		make := func(i int, secrets []string) *peer {
			p, s := newPeer(nodes[i], netip.AddrPortFrom(nodes[i].Addr(), 4000))
			c := multicast.Default()
			c.Secret = secret.New(secrets[0])
			for _, o := range secrets[1:] {
				c.OldSecrets = append(c.OldSecrets, secret.New(o))
			}
			m, err := multicast.New(c, s)
			if err != nil {
				t.Fatal(err)
			}
			p.m = m
			return p
		}
		peers := []*peer{make(0, steps[0]), make(1, steps[0])}
		stopAll(t, nil)
		for _, p := range peers {
			p.start(t)
		}
		for _, s := range steps[1:] {
			for i := range peers {
				time.Sleep(2 * time.Second)
				if err := complete(peers); err != nil {
					t.Error(err)
				}
				peers[i].stop(t)
				peers[i] = make(i, s)
				peers[i].start(t)
			}
		}
		time.Sleep(2 * time.Second)
		if err := complete(peers); err != nil {
			t.Error(err)
		}
		stopAll(t, peers)
	})
}

// A large group that starts at once has everybody proved soon.
func TestManyStartAtOnce(t *testing.T) {
	const count = 64
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		var peers []*peer
		for _, n := range nw.Nodes(count) {
			p, s := newPeer(n, netip.AddrPortFrom(n.Addr(), 4000))
			p.m = newMembership(t, 2, s, nil)
			p.start(t)
			peers = append(peers, p)
		}
		time.Sleep(2 * time.Second)
		if err := complete(peers); err != nil {
			t.Error(err)
		}
		stopAll(t, peers)
	})
}

func TestSecurityValidation(t *testing.T) {
	for _, c := range []struct {
		change func(*multicast.Config)
		want   string
	}{
		{func(c *multicast.Config) { c.Secret = secret.New("hunter2hunter2") }, "secret: number 1 has 14 bytes, at least 16"},
		{func(c *multicast.Config) { c.SecretFile = "/does/not/exist" }, "secret_file: "},
		{func(c *multicast.Config) { c.Unauthenticated = []string{"10.0.0.1"} }, "unauthenticated: without a secret"},
		{func(c *multicast.Config) {
			c.Secret, c.Unauthenticated = secret.New(theSecret), []string{"10.0.0.1", "tomcat"}
		}, "unauthenticated[1]: \"tomcat\""},
		{func(c *multicast.Config) { c.OldSecrets = []secret.Text{secret.New(theSecret)} }, "no secret to use"},
	} {
		m := multicast.Default()
		c.change(&m)
		s := static.Default()
		s.Members = []string{"10.0.0.1:1"}
		s.Secret, s.SecretFile, s.OldSecrets, s.Unauthenticated = m.Secret, m.SecretFile, m.OldSecrets, m.Unauthenticated
		for _, err := range []error{m.Validate(), s.Validate()} {
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("got %v, want %q", err, c.want)
			}
		}
	}
}
