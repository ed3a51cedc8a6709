package static_test

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/plugins/membership/static"
	"go.uber.org/goleak"
)

// How it behaves in a cluster is tested together with the multicast membership,
// in that package.

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConfigValidation(t *testing.T) {
	for _, c := range []struct {
		change func(*static.Config)
		want   string
	}{
		{func(*static.Config) {}, ""},
		{func(c *static.Config) { c.Listen = "127.0.0.1:1" }, ""},
		{func(c *static.Config) { c.Listen = "[::]:1" }, ""},
		{func(c *static.Config) { c.Listen = "node1:4000" }, "listen: "},
		{func(c *static.Config) { c.Listen = "127.0.0.1" }, "listen: "},
		{func(c *static.Config) { c.Listen = ":0" }, "listen: "},
		{func(c *static.Config) { c.Members = nil }, "members: "},
		{func(c *static.Config) { c.Members = []string{"a:1", "a:1"} }, "members[1]: "},
		{func(c *static.Config) { c.Members = []string{"a"} }, "members[0]: "},
		{func(c *static.Config) { c.Members = []string{":1"} }, "members[0]: "},
		{func(c *static.Config) { c.Members = []string{"a:http"} }, "members[0]: "},
		{func(c *static.Config) { c.Members = []string{"a:0"} }, "members[0]: "},
		{func(c *static.Config) { c.Frequency = time.Hour }, "frequency: "},
		{func(c *static.Config) { c.DropTime = 0 }, "drop_time: "},
	} {
		cfg := static.Default()
		cfg.Members = []string{"10.0.0.1:45565", "node2:45565"}
		c.change(&cfg)
		err := cfg.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", cfg, err, c.want)
		}
	}
	if err := static.Factory.Check(channel.NoConfig); err == nil {
		t.Error("a list without members was accepted")
	}
}

type sink struct {
	mu   sync.Mutex
	view map[netip.AddrPort]bool
}

func (s *sink) Observe(ev channel.MemberEvent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		s.view[ev.Member.Addr()] = true
	default:
		delete(s.view, ev.Member.Addr())
	}
}

func (s *sink) sees(addr string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.view[netip.MustParseAddrPort(addr)]
}

func TestNamesAreResolvedAgainAndAgain(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		start := func(ip string, members ...string) (*sink, channel.Membership, *channel.Metrics) {
			n := nw.Node(ip)
			cfg := static.Default()
			cfg.Members = members
			metrics := channel.NewMetrics()
			m, err := static.New(cfg, channel.Settings{Net: n, Metrics: metrics})
			if err != nil {
				t.Fatal(err)
			}
			s := &sink{view: map[netip.AddrPort]bool{}}
			local := channel.Member{ID: channel.NewUniqueID(), Host: n.Addr(), Port: 4000, SecurePort: -1, UDPPort: -1}
			if err := m.Start(t.Context(), local, nil, s); err != nil {
				t.Fatal(err)
			}
			return s, m, metrics
		}
		_, a, metrics := start("10.0.0.1", "two:45565")
		b, m, _ := start("10.0.0.2", "10.0.0.1:45565")
		time.Sleep(10 * time.Second)
		if b.sees("10.0.0.1:4000") {
			t.Fatal("a name that does not resolve was reached")
		}
		if n := metrics.Counter("membership_resolve_errors_total", "").Value(); n < 3 || n > 6 {
			t.Errorf("%d look-ups failed in 10 s", n)
		}
		nw.SetHost("two", "10.0.0.2")
		time.Sleep(20 * time.Second)
		if !b.sees("10.0.0.1:4000") {
			t.Error("the name resolves, and the node is not reached")
		}
		nw.SetHost("two") // the resolver is gone: the last answer stays
		time.Sleep(2 * time.Minute)
		if !b.sees("10.0.0.1:4000") {
			t.Error("without the resolver the node is not reached any more")
		}
		c, moved, _ := start("10.0.0.3", "10.0.0.1:45565")
		nw.SetHost("two", "10.0.0.3") // moved
		time.Sleep(31 * time.Second)
		if !c.sees("10.0.0.1:4000") || b.sees("10.0.0.1:4000") {
			t.Error("the new address is not used")
		}
		for _, m := range []channel.Membership{a, m, moved} {
			if err := m.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
}
