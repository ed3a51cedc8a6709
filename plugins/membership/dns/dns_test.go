package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/goleak"
	"golang.org/x/net/dns/dnsmessage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serverIP is where the name server of simulated networks is.
const serverIP = "10.0.250.1"

type node struct {
	channel.Membership
	metrics *channel.Metrics

	mu     sync.Mutex
	view   map[channel.UniqueID]channel.Member
	losses int
}

func (n *node) Observe(ev channel.MemberEvent) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		n.view[ev.Member.ID] = ev.Member
	default:
		delete(n.view, ev.Member.ID)
		n.losses++
	}
}

func (n *node) sees() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, m := range n.view {
		out = append(out, m.Host.String())
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func start(t *testing.T, nw *channeltest.SimNet, ip string, change func(*Config)) *node {
	t.Helper()
	sn := nw.Node(ip)
	n := &node{metrics: channel.NewMetrics(), view: map[channel.UniqueID]channel.Member{}}
	c := Default()
	c.Name, c.Server = "shop.example.com", serverIP
	if change != nil {
		change(&c)
	}
	m, err := New(c, channel.Settings{Net: sn, Metrics: n.metrics})
	if err != nil {
		t.Fatal(err)
	}
	n.Membership = m
	local := channel.Member{ID: channel.NewUniqueID(), Host: sn.Addr(), Port: 4000, SecurePort: -1, UDPPort: -1}
	if err := m.Start(t.Context(), local, nil, n); err != nil {
		t.Fatal(err)
	}
	return n
}

func stop(t *testing.T, nodes ...*node) {
	t.Helper()
	for _, n := range nodes {
		if err := n.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}
}

func simServer(t *testing.T, nw *channeltest.SimNet) *server {
	s, _ := newServer(t, nw.Node(serverIP), netip.MustParseAddrPort(serverIP+":53"))
	return s
}

func TestConformance(t *testing.T) {
	c := Default()
	s := conformance.Membership(Name, func(c Config, s channel.Settings) (channel.Membership, error) {
		// Each node has its own name server, on its own loopback.
		srv, at := newServer(t, s.Net, netip.MustParseAddrPort("127.0.0.1:53"))
		var rs []record
		for _, ip := range strings.Fields(c.Name) {
			rs = append(rs, record{a: ip, ttl: 5})
		}
		srv.set("shop.example.com.", rs...)
		c.Name, c.Server = "shop.example.com", at.String()
		m, err := New(c, s)
		return &withServer{m, srv}, err
	}, func(_ string, peers []string) Config {
		c := Default()
		c.Name = strings.Join(peers, " ")
		return c
	}, conformance.MembershipTimes{Interval: c.Frequency, Drop: c.DropTime}, conformance.FeaturePayload)
	for _, p := range conformance.Run(t, s, conformance.Strict()).Profiles {
		if p.Result != conformance.Conformant {
			t.Errorf("%s is %s: core skipped %v", p.Name, p.Result, p.Core.Skipped)
		}
	}
}

type withServer struct {
	channel.Membership
	srv *server
}

func (w *withServer) Stop(ctx context.Context) error {
	err := w.Membership.Stop(ctx)
	w.srv.stop()
	return err
}

// The name server goes away, comes back with other answers, answers a thousand
// addresses, knows the name no more, and fails.
func TestTheNameServerInTrouble(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		const name = "shop.example.com."
		srv := simServer(t, nw)
		srv.set(name, hosts(5, "10.0.0.1", "10.0.0.2")...)
		a := start(t, nw, "10.0.0.1", nil)
		b := start(t, nw, "10.0.0.2", nil)
		time.Sleep(2 * time.Second)
		check := func(when, wantA, wantB string) {
			t.Helper()
			if a.sees() != wantA || b.sees() != wantB {
				t.Errorf("%s: %q and %q", when, a.sees(), b.sees())
			}
		}
		check("at first", "10.0.0.2", "10.0.0.1")
		failed := func() int64 { return a.metrics.Counter("membership_lookup_errors_total", "").Value() }
		for _, trouble := range []struct {
			name string
			do   func()
		}{
			{"silent", func() { srv.mute = true }},
			{"gone", func() { nw.Isolate(serverIP) }},
			{"failing", func() { srv.rcode = dnsmessage.RCodeServerFailure }},
			{"refusing", func() { srv.rcode = dnsmessage.RCodeRefused }},
			{"without the name", func() { delete(srv.zone, name) }},
			{"without addresses", func() { srv.zone[name] = nil }},
		} {
			before := failed()
			srv.with(trouble.do)
			time.Sleep(20 * time.Minute)
			check(trouble.name, "10.0.0.2", "10.0.0.1")
			if failed() == before {
				t.Errorf("%s: no look-up has failed", trouble.name)
			}
			srv.with(func() { srv.mute, srv.rcode, srv.zone[name] = false, 0, hosts(5, "10.0.0.1", "10.0.0.2") })
			nw.Heal()
			time.Sleep(40 * time.Second) // the longest pause after a failure
		}
		// Another answer, then a thousand addresses.
		c := start(t, nw, "10.0.0.3", func(c *Config) { c.Name = "shop.example.com" })
		srv.set(name, hosts(5, "10.0.0.1", "10.0.0.2", "10.0.0.3")...)
		time.Sleep(7 * time.Second)
		check("after another answer", "10.0.0.2 10.0.0.3", "10.0.0.1 10.0.0.3")
		var many []string
		for i := range 1000 {
			many = append(many, fmt.Sprintf("10.1.%d.%d", i/250, i%250+1))
		}
		srv.set(name, hosts(5, append(many, "10.0.0.1", "10.0.0.2", "10.0.0.3")...)...)
		time.Sleep(30 * time.Second)
		check("a thousand addresses", "10.0.0.2 10.0.0.3", "10.0.0.1 10.0.0.3")
		srv.with(func() {
			if srv.streams == 0 {
				t.Error("the long answer did not come by TCP")
			}
		})
		if n := a.metrics.Counter("membership_addresses_refused_total", "", "reason", "too_many").Value(); n < 747 {
			t.Errorf("%d addresses were counted as too many", n)
		}
		if a.losses+b.losses > 0 {
			t.Errorf("%d members were lost", a.losses+b.losses)
		}
		stop(t, a, b, c)
		srv.stop()
	})
}

func TestServicesAndTTL(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		srv := simServer(t, nw)
		const name = "_longhouse._udp.shop.example.com."
		srv.set(name, record{target: "One.example.com.", port: 5001, ttl: 2}, record{target: "two.example.com.", port: 5002, ttl: 60})
		srv.set("two.example.com.", hosts(60, "10.0.0.2")...)
		srv.with(func() { srv.extra = []record{{name: "one.example.com.", a: "10.0.0.1", ttl: 60}} })
		services := func(port string) func(c *Config) {
			return func(c *Config) {
				c.Name, c.Records, c.Listen, c.Interval = strings.TrimSuffix(name, "."), Services, port, time.Minute
			}
		}
		a := start(t, nw, "10.0.0.1", services(":5001"))
		b := start(t, nw, "10.0.0.2", services(":5002"))
		time.Sleep(2500 * time.Millisecond)
		if a.sees() != "10.0.0.2" || b.sees() != "10.0.0.1" {
			t.Errorf("%q and %q", a.sees(), b.sees())
		}
		time.Sleep(60 * time.Second)
		srv.with(func() {
			if n := srv.asked["TypeSRV "+name]; n < 40 || n > 80 {
				t.Errorf("two nodes asked %d times in a minute; an answer is valid for 2 s", n)
			}
			if srv.asked["TypeA one.example.com."] > 0 {
				t.Error("asked for an address that was in the answer")
			}
			delete(srv.zone, "two.example.com.") // its last addresses stand
		})
		time.Sleep(10 * time.Minute)
		if a.sees() != "10.0.0.2" || a.losses > 0 {
			t.Errorf("without the target's addresses: %q", a.sees())
		}
		stop(t, a, b)
		srv.stop()
	})
}

func TestResolver(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		srv := simServer(t, nw)
		other, _ := newServer(t, nw.Node("10.0.250.2"), netip.MustParseAddrPort("10.0.250.2:53"))
		srv.set("direct.example.com.", hosts(7, "10.0.0.1", "2001:db8::1")...)
		srv.set("alias.example.com.", record{cname: "direct.example.com.", ttl: 3}, record{name: "direct.example.com.", a: "10.0.0.9", ttl: 9})
		srv.set("far.example.com.", record{cname: "direct.example.com.", ttl: 3})
		srv.set("circle.example.com.", record{cname: "ring.example.com.", ttl: 3})
		srv.set("ring.example.com.", record{cname: "circle.example.com.", ttl: 3})
		srv.set("self.example.com.", record{cname: "self.example.com.", ttl: 3})
		r := &resolver{net: nw.Node("10.0.0.1"), timeout: time.Second, fixed: []netip.AddrPort{netip.MustParseAddrPort(serverIP + ":53")}}
		look := func(name, want string) {
			t.Helper()
			a, err := r.addresses(t.Context(), name)
			got := fmt.Sprint(a.addrs)
			if err != nil {
				got = "error"
				if !strings.Contains(err.Error(), name) {
					t.Errorf("%s: the error does not name it: %v", name, err)
				}
			}
			if got != want {
				t.Errorf("%s: %s (%v), want %s", name, got, err, want)
			}
		}
		look("direct.example.com", "[10.0.0.1 2001:db8::1]")
		look("DIRECT.example.com", "[10.0.0.1 2001:db8::1]")
		look("alias.example.com", "[10.0.0.9 2001:db8::1]")
		look("far.example.com", "[10.0.0.1 2001:db8::1]")
		look("circle.example.com", "error")
		look("self.example.com", "error")
		look("none.example.com", "error")
		if a, err := r.addresses(t.Context(), "far.example.com"); err != nil || a.ttl != 3*time.Second {
			t.Errorf("ttl %v, %v", a.ttl, err)
		}
		srv.with(func() { srv.noEDNS = true })
		look("direct.example.com", "[10.0.0.1 2001:db8::1]")
		srv.with(func() { srv.noEDNS, srv.stray = false, true })
		look("direct.example.com", "[10.0.0.1 2001:db8::1]")
		srv.with(func() { srv.stray = false })
		// The next server is asked when one fails, not when it knows no such name.
		other.set("direct.example.com.", hosts(7, "10.0.0.7")...)
		other.set("none.example.com.", hosts(7, "10.0.0.7")...)
		r.fixed = append(r.fixed, netip.MustParseAddrPort("10.0.250.2:53"))
		look("none.example.com", "error")
		srv.with(func() { srv.mute = true })
		begin := time.Now()
		look("direct.example.com", "[10.0.0.7]")
		if d := time.Since(begin); d < 2*time.Second || d > 3*time.Second {
			t.Errorf("two questions to a silent server and a living one took %v", d)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := r.addresses(ctx, "direct.example.com"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after the context: %v", err)
		}
		srv.stop()
		other.stop()
	})
}

func TestResolvConf(t *testing.T) {
	c, err := parseConf(strings.NewReader(`# of a pod
nameserver 10.96.0.10
nameserver fe80::1%eth0 ; with a zone
nameserver not-an-address
search shop.svc.cluster.local svc.cluster.local. bad..name
options timeout:2 ndots:5
`))
	if err != nil || fmt.Sprint(c.servers) != "[10.96.0.10:53 [fe80::1%eth0]:53]" || c.ndots != 5 ||
		fmt.Sprint(c.search) != "[shop.svc.cluster.local. svc.cluster.local.]" {
		t.Errorf("%+v, %v", c, err)
	}
	for name, want := range map[string]string{
		"peers":         "[peers.shop.svc.cluster.local. peers.svc.cluster.local. peers.]",
		"peers.":        "[peers.]",
		"a.b.c.d.e.f":   "[a.b.c.d.e.f. a.b.c.d.e.f.shop.svc.cluster.local. a.b.c.d.e.f.svc.cluster.local.]",
		"peers.shop":    "[peers.shop.shop.svc.cluster.local. peers.shop.svc.cluster.local. peers.shop.]",
		"peers.shop.x.": "[peers.shop.x.]",
	} {
		if got := fmt.Sprint(candidates(name, c)); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	if c, err := parseConf(strings.NewReader("")); err != nil || len(c.servers) != 2 {
		t.Errorf("without anything: %+v, %v", c, err)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		change func(*Config)
		want   string
	}{
		{func(*Config) {}, ""},
		{func(c *Config) { c.Name = "a.b." }, ""},
		{func(c *Config) { c.Name = "_longhouse._udp.shop" }, ""},
		{func(c *Config) { c.Name = "a..b" }, "name: "},
		{func(c *Config) { c.Name = "a b" }, "name: "},
		{func(c *Config) { c.Name = "." }, "name: "},
		{func(c *Config) { c.Name = strings.Repeat("a", 64) }, "name: "},
		{func(c *Config) { c.Name = strings.Repeat("a.", 127) }, ""},
		{func(c *Config) { c.Name = strings.Repeat("a.", 128) }, "name: "},
		{func(c *Config) { c.Records = "mx" }, "records: "},
		{func(c *Config) { c.Server = "10.0.0.1" }, ""},
		{func(c *Config) { c.Server = "[::1]:5353" }, ""},
		{func(c *Config) { c.Server = "::1" }, ""},
		{func(c *Config) { c.Server = "dns.example.com" }, "server: "},
		{func(c *Config) { c.Server = "10.0.0.1:0" }, "server: "},
		{func(c *Config) { c.Interval = 0 }, "interval: "},
		{func(c *Config) { c.Timeout = 0 }, "timeout: "},
		{func(c *Config) { c.MaxAddresses = 0 }, "max_addresses: "},
	} {
		cfg := Default()
		c.change(&cfg)
		err := cfg.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", cfg, err, c.want)
		}
	}
}

func TestNameFromTheEnvironment(t *testing.T) {
	for _, v := range Environment() {
		t.Setenv(v, "")
	}
	s := channel.Settings{}
	if _, err := New(Default(), s); err == nil || !strings.Contains(err.Error(), "DNS_MEMBERSHIP_SERVICE_NAME") {
		t.Errorf("without a name: %v", err)
	}
	t.Setenv("KUBERNETES_NAMESPACE", "tomcat")
	if _, err := New(Default(), s); err != nil {
		t.Errorf("the namespace: %v", err)
	}
	t.Setenv("DNS_MEMBERSHIP_SERVICE_NAME", "not a name")
	if _, err := New(Default(), s); err == nil {
		t.Error("a name with blanks was taken")
	}
}

// On a real network, with the machine's sockets.
func TestRealSockets(t *testing.T) {
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	srv, at := newServer(t, n, netip.MustParseAddrPort("127.0.0.1:0"))
	defer srv.stop()
	var many []string
	for i := range 1000 {
		many = append(many, fmt.Sprintf("10.1.%d.%d", i/250, i%250+1))
	}
	srv.set("many.example.com.", hosts(1, many...)...)
	r := &resolver{net: n, timeout: 30 * time.Second, fixed: []netip.AddrPort{at}}
	a, err := r.addresses(t.Context(), "many.example.com")
	if err != nil || len(a.addrs) != 1000 || a.ttl != time.Second {
		t.Errorf("%d addresses, %v, %v", len(a.addrs), a.ttl, err)
	}
}

func FuzzParse(f *testing.F) {
	srv := &server{zone: map[string][]record{
		"a.": append(hosts(5, "10.0.0.1", "::1"), record{cname: "b.", ttl: 1}),
		"s.": {{target: "a.", port: 7, ttl: 3}},
	}, extra: hosts(1, "10.0.0.2"), asked: map[string]int{}}
	for _, q := range []struct {
		name string
		t    dnsmessage.Type
	}{{"a.", dnsmessage.TypeA}, {"a.", dnsmessage.TypeAAAA}, {"s.", dnsmessage.TypeSRV}, {"none.", dnsmessage.TypeA}} {
		query, _, _, err := question(q.name, q.t, true)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(srv.answer(query, 65535))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p dnsmessage.Parser
		h, err := p.Start(b)
		if err != nil {
			return
		}
		q, err := p.Question()
		if err != nil {
			return
		}
		a, err := parse(b, q, h.ID)
		if err != nil {
			return
		}
		if a.ttl < 0 || len(a.addrs)+len(a.services) > maxRecords {
			t.Fatalf("%+v", a)
		}
		for _, ip := range a.addrs {
			if !ip.IsValid() {
				t.Fatal("an address that is none")
			}
		}
	})
}
