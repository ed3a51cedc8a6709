package staticmember

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/interceptors/ping"
)

func hexID(i int) string { return fmt.Sprintf("%031x%x", 0x4000, i) }

// list is the configuration that nodes 1 to n share; with ids or without.
func list(n, self int, ids bool) Config {
	c := Defaults
	for i := 1; i <= n; i++ {
		m := Member{Host: fmt.Sprintf("10.0.0.%d", i), Port: 4000}
		if ids {
			m.UniqueID = hexID(i)
		}
		c.Members = append(c.Members, m)
	}
	if ids {
		c.Local = Local{Host: fmt.Sprintf("10.0.0.%d", self), Port: 4000}
	}
	return c
}

type node struct {
	*channel.Channel
	sim     *channeltest.SimNode
	seen    *channeltest.Recorder
	metrics *channel.Metrics
}

func (n *node) value(name string) float64 { return channeltest.Sum(n.metrics, name) }

func (n *node) stop(t *testing.T) {
	t.Helper()
	if err := n.Stop(context.WithoutCancel(t.Context())); err != nil {
		t.Error(err)
	}
}

func (n *node) names() (out []string) {
	for _, m := range n.View().Members {
		out = append(out, m.Host.String())
	}
	slices.Sort(out)
	return out
}

// start starts a node that knows others only from its list; checked puts ping
// and failure detector above it.
func start(t *testing.T, sim *channeltest.SimNode, c Config, checked bool) *node {
	t.Helper()
	n := &node{sim: sim, seen: new(channeltest.Recorder), metrics: channel.NewMetrics()}
	s := channel.Settings{Net: sim, Logger: zap.NewNop(), Metrics: n.metrics}
	var layers []channel.Layer
	if checked {
		p, err := ping.New(ping.Defaults, s)
		if err != nil {
			t.Fatal(err)
		}
		d, err := failuredetector.New(failuredetector.Defaults, s)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, channel.Layer{Interceptor: p}, channel.Layer{Interceptor: d})
	}
	x, err := New(c, s)
	if err != nil {
		t.Fatal(err)
	}
	stack, err := channel.NewStack(append(layers, channel.Layer{Interceptor: x})...)
	if err != nil {
		t.Fatal(err)
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = sim.IP()
	n.Channel, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Name: sim.IP(), Pipelined: true}, Stack: stack,
		Sender: tcp.NewSender(tcp.DefaultSenderConfig(), s), Receiver: tcp.NewReceiver(rc, s),
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	n.Watch(n.seen.Watch)
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

func within(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	for begin := time.Now(); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > limit {
			t.Fatalf("%s: not after %v", what, limit)
		}
	}
}

func all(nodes ...*node) func() bool {
	return func() bool {
		for _, n := range nodes {
			if len(n.View().Members) != len(nodes)-1 {
				return false
			}
			for _, o := range nodes {
				if o != n && !n.View().Has(o.Local()) {
					return false
				}
			}
		}
		return true
	}
}

// Members of a list find each other whatever the order in which they start, say
// goodbye, come back, and are removed and come back when they die.
func TestGroup(t *testing.T) {
	for _, c := range []struct {
		name         string
		ids, checked bool
	}{{"ids, checked", true, true}, {"ids", true, false}, {"learnt, checked", false, true}, {"learnt", false, false}} {
		t.Run(c.name, func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{Seed: 3}, func(t *testing.T, nw *channeltest.SimNet) {
				begin := func(i int) *node {
					return start(t, nw.Node(fmt.Sprintf("10.0.0.%d", i)), list(4, i, c.ids), c.checked)
				}
				a := begin(1)
				if c.ids && a.Local().ID.String() != hexID(1) {
					t.Fatalf("the node's id is %v", a.Local().ID)
				}
				time.Sleep(20 * time.Second)
				if got := a.names(); len(got) != 0 || len(a.seen.Views()) != 1 {
					t.Fatalf("alone, it sees %v", got)
				}
				b := begin(2)
				within(t, 30*time.Second, "the second", all(a, b))
				d := begin(4)
				within(t, 30*time.Second, "the fourth", all(a, b, d))
				time.Sleep(time.Minute)
				if !all(a, b, d)() {
					t.Fatal("the views did not stay")
				}
				if n := a.value("staticmember_contacts_total"); n > 60 {
					t.Errorf("%v contacts in a quiet minute and a half", n)
				}
				// A goodbye is seen at once, and the member is not brought back.
				d.stop(t)
				within(t, 500*time.Millisecond, "goodbye", all(a, b))
				time.Sleep(time.Minute)
				if !all(a, b)() {
					t.Fatal("a member that has left came back")
				}
				d = begin(4)
				within(t, 30*time.Second, "return", all(a, b, d))
				// Death. Without ping and detector it takes a message to notice.
				d.sim.Kill()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				_ = d.Stop(ctx)
				cancel()
				if !c.checked {
					_ = a.Send(t.Context(), a.View().Members, []byte("x"), channel.SendAck)
					_ = b.Send(t.Context(), b.View().Members, []byte("x"), channel.SendAck)
				}
				within(t, time.Minute, "death", all(a, b))
				time.Sleep(time.Minute)
				if !all(a, b)() {
					t.Fatal("a dead member came back")
				}
				d = begin(4)
				within(t, time.Minute, "restart", all(a, b, d))
				// A split heals by itself.
				nw.Partition([]string{"10.0.0.1"}, []string{"10.0.0.2", "10.0.0.4"})
				if !c.checked {
					for _, n := range []*node{a, b, d} {
						_ = n.Send(t.Context(), n.View().Members, []byte("x"), channel.SendAck)
					}
				}
				within(t, time.Minute, "split", func() bool { return len(a.names()) == 0 && all(b, d)() })
				time.Sleep(10 * time.Minute)
				nw.Heal()
				within(t, time.Minute, "heal", all(a, b, d))
				for _, n := range []*node{a, b, d} {
					n.stop(t)
				}
			})
		})
	}
}

// Somebody who accepts connections and never answers is not shown.
func TestDeafMemberIsNotShown(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		l, err := channel.ListenTCP(nw.Node("10.0.0.2"), netip.MustParseAddrPort("10.0.0.2:4000"))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
			}
		}()
		a := start(t, nw.Node("10.0.0.1"), list(2, 1, true), false)
		time.Sleep(2 * time.Minute)
		if got := a.names(); len(got) != 0 || len(a.seen.Views()) != 1 {
			t.Errorf("it sees %v", got)
		}
		if n := a.value("staticmember_contact_failures_total"); n < 4 || n > 15 {
			t.Errorf("%v attempts in two minutes", n)
		}
		a.stop(t)
		l.Close()
		<-done
	})
}

// names is a network with a name service of its own.
type names struct {
	*channeltest.SimNode
	addr *atomic.Pointer[string] // of "node2"; nil while it is not known
}

func (n names) ResolveUDPAddr(network, address string) (*net.UDPAddr, error) {
	ip := n.addr.Load()
	if ip == nil || !strings.HasPrefix(address, "node2:") {
		return nil, fmt.Errorf("no such host: %s", address)
	}
	return n.SimNode.ResolveUDPAddr(network, strings.Replace(address, "node2", *ip, 1))
}

// A member by name: unknown at first, then somewhere, then somewhere else.
func TestNames(t *testing.T) {
	for _, ids := range []bool{true, false} {
		channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
			c := list(2, 1, ids)
			c.Members[1].Host = "node2"
			s := channel.Settings{Net: names{nw.Node("10.0.0.1"), new(atomic.Pointer[string])}, Metrics: channel.NewMetrics()}
			addr := s.Net.(names).addr
			x, err := New(c, s)
			if err != nil {
				t.Fatal(err)
			}
			stack, err := channel.NewStack(channel.Layer{Interceptor: x})
			if err != nil {
				t.Fatal(err)
			}
			rc := tcp.DefaultReceiverConfig()
			rc.Address = "10.0.0.1"
			a, err := channel.New(channel.Config{Stack: stack, Sender: tcp.NewSender(tcp.DefaultSenderConfig(), s), Receiver: tcp.NewReceiver(rc, s)}, s)
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(30 * time.Second)
			if n := count(s.Metrics, "staticmember_resolve_errors_total"); n < 3 || n > 20 || len(a.View().Members) != 0 {
				t.Errorf("%v look-ups in half a minute", n)
			}
			for _, ip := range []string{"10.0.0.2", "10.0.0.3"} {
				local := list(2, 2, ids)
				if ids {
					local.Local = Local{UniqueID: hexID(2)}
				}
				b := start(t, nw.Node(ip), local, false)
				addr.Store(&ip)
				within(t, time.Minute, ip, func() bool {
					return len(a.View().Members) == 1 && a.View().Has(b.Local()) && a.View().Members[0].Host.String() == ip
				})
				b.sim.Kill()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				_ = b.Stop(ctx)
				cancel()
				within(t, time.Minute, "death", func() bool {
					_ = a.Send(t.Context(), a.View().Members, []byte("x"), channel.SendAck)
					return len(a.View().Members) == 0
				})
			}
			if err := a.Stop(context.WithoutCancel(t.Context())); err != nil {
				t.Error(err)
			}
		})
	}
}

// embed is a static layer without a network.
func embed(t *testing.T, c Config) (*channeltest.Embedded, *channel.Metrics) {
	t.Helper()
	s := channel.Settings{Net: &channeltest.SimNode{}, Metrics: channel.NewMetrics()}
	x, err := New(c, s)
	if err != nil {
		t.Fatal(err)
	}
	return channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Settings: s}), s.Metrics
}

func count(m *channel.Metrics, name string) float64 { return channeltest.Sum(m, name) }

// What Tomcat nodes sent to each other is understood, and what this node sends
// are the same bodies.
func TestTribesBytes(t *testing.T) {
	text, err := os.ReadFile("testdata/static.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors  []struct{ Name, Hex string }
		Captured []struct {
			Port int
			Hex  string
		}
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"static-member-start": startBody, "static-member-stop": stopBody}
	for _, v := range file.Vectors {
		if v.Hex != hex.EncodeToString([]byte(want[v.Name])) {
			t.Errorf("%s differs", v.Name)
		}
	}
	if len(file.Vectors) != 2 || len(file.Captured) != 2 {
		t.Fatalf("%d vectors, %d captured frames", len(file.Vectors), len(file.Captured))
	}
	synctest.Test(t, func(t *testing.T) {
		c := Defaults
		c.Members = []Member{{Host: "127.0.0.1", Port: 4002, UniqueID: "{2,19,36,53,70,87,104,121,-118,-101,-84,-67,-50,-33,-16,1}"}}
		e, metrics := embed(t, c)
		for i, f := range file.Captured {
			b, err := hex.DecodeString(f.Hex)
			if err != nil {
				t.Fatal(err)
			}
			var m channel.Message
			if _, _, err := wire.DecodeFrame(b, wire.DefaultMaxFrame, &m); err != nil {
				t.Fatal(err)
			}
			if err := e.Receive(t.Context(), &m); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if shown := len(e.View().Members) == 1; shown != (i == 0) {
				t.Errorf("after frame %d: shown is %v", i, shown)
			}
		}
		changes := e.Top.Views()
		if last := changes[len(changes)-1].Event; last.Kind != channel.MemberLeft {
			t.Errorf("the last change is %v", last.Kind)
		}
		if n := len(e.Top.Messages()); n != 0 || count(metrics, "staticmember_notifications_total") != 2 {
			t.Errorf("%d notifications reached the application", n)
		}
	})
}

// Notifications of nodes that are not configured, or have another id, do
// nothing.
func TestStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, metrics := embed(t, list(2, 1, true))
		e.OnSend(func(_ context.Context, m *channel.Message) error {
			return channel.Failed(m.To, channel.ErrDisconnected)
		})
		right := channel.Member{ID: channel.UniqueID(must(hex.DecodeString(hexID(2)))), Host: netip.MustParseAddr("10.0.0.2"), Port: 4000}
		other, port, host := right, right, right
		other.ID[0]++
		port.Port++
		host.Host = netip.MustParseAddr("10.0.0.3")
		for _, m := range []channel.Member{other, port, host, {}, e.Local()} {
			for _, body := range []string{startBody, stopBody} {
				if err := e.ReceiveBody(m, 0, body); err != nil {
					t.Error(err)
				}
			}
		}
		synctest.Wait()
		if n := len(e.View().Members); n != 0 || count(metrics, "staticmember_unknown_total") != 10 {
			t.Errorf("%d members are shown", n)
		}
		for _, body := range []string{"", startBody[1:], startBody + " ", "x" + stopBody[1:]} {
			if err := e.ReceiveBody(right, 0, body); err != nil {
				t.Error(err)
			}
		}
		if n := len(e.Top.Messages()); n != 4 {
			t.Errorf("%d messages reached the application, want 4", n)
		}
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A member that heartbeats too is one member; it goes when both say so.
func TestHeartbeatsBeside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := embed(t, list(2, 1, true))
		var down atomic.Bool
		e.OnSend(func(_ context.Context, m *channel.Message) error {
			if !down.Load() {
				return nil
			}
			return channel.Failed(m.To, channel.ErrDisconnected)
		})
		m := channel.Member{ID: channel.UniqueID(must(hex.DecodeString(hexID(2)))), Host: netip.MustParseAddr("10.0.0.2"), Port: 4000, SecurePort: -1, UDPPort: -1}
		step := func(what string, members int, f func()) {
			t.Helper()
			f()
			time.Sleep(time.Second)
			if n := len(e.View().Members); n != members {
				t.Errorf("%s: %d members", what, n)
			}
		}
		step("answers", 1, func() {})
		step("heartbeats", 1, func() { e.Observe(channel.MemberAdded, m) })
		step("silent, but answers", 1, func() { e.Observe(channel.MemberLost, m) })
		step("heartbeats again", 1, func() { e.Observe(channel.MemberAdded, m) })
		down.Store(true)
		step("suspected, but heartbeats", 1, func() { e.Observe(channel.MemberSuspected, m) })
		step("gone", 0, func() { e.Observe(channel.MemberLost, m) })
		down.Store(false)
		step("after a while", 1, func() { time.Sleep(time.Minute) })
		step("left", 0, func() { e.Observe(channel.MemberLeft, m) })
		// Another node has the address now: it, not the list, is believed.
		other := m
		other.ID[0] = 9
		step("another incarnation", 1, func() { e.Observe(channel.MemberAdded, other) })
		step("for good", 1, func() { time.Sleep(5 * time.Minute) })
		if !e.View().Has(other) {
			t.Error("the list has displaced a living member")
		}
	})
}

func TestConfig(t *testing.T) {
	ok := list(3, 1, true)
	ok.Members[1].UniqueID = "{0, -1 ,127,-128,255,5,6,7,8,9,10,11,12,13,14,15}"
	ok.Members[2].Domain = "{97,-28}"
	if err := ok.Validate(); err != nil {
		t.Fatal(err)
	}
	if r := ok.Members[1].record(); r.ID != (channel.UniqueID{0, 255, 127, 128, 255, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) || r.SecurePort != -1 {
		t.Errorf("record %+v", r)
	}
	if r := ok.Members[2].record(); r.Domain != "a\xe4" {
		t.Errorf("domain %q", r.Domain)
	}
	for want, change := range map[string]func(c *Config){
		"members[2] (10.0.0.3:4000) has the same unique_id as members[0] (10.0.0.1:4000)": func(c *Config) { c.Members[2].UniqueID = "{0,0,0,0,0,0,0,0,0,0,0,0,0,4,0,1}" },
		"members[1] (10.0.0.1:4000) is listed twice: it is members[0] too":                func(c *Config) { c.Members[1].Host = "10.0.0.1" },
		"members[0] (:4000): host is missing":                                             func(c *Config) { c.Members[0].Host = "" },
		"port is 65536":                                                                   func(c *Config) { c.Members[0].Port = 65536 },
		"udp_port is -2":                                                                  func(c *Config) { c.Members[0].UDPPort = -2 },
		"it has 2 bytes":                                                                  func(c *Config) { c.Members[0].UniqueID = "{1,2}" },
		"as 32 hexadecimal digits":                                                        func(c *Config) { c.Members[0].UniqueID = "node1" },
		`byte 2 of the list is "256"`:                                                     func(c *Config) { c.Members[0].UniqueID = "{1,256}" },
		"no closing brace":                                                                func(c *Config) { c.Members[0].Domain = "{1" },
		"local: unique_id must be 16 bytes":                                               func(c *Config) { c.Local.UniqueID = "x" },
		"timeout is 0s":                                                                   func(c *Config) { c.Timeout = 0 },
		"min_retry is 0s":                                                                 func(c *Config) { c.MinRetry = 0 },
		"max_retry is 1ms":                                                                func(c *Config) { c.MaxRetry = time.Millisecond },
		"1025 are listed": func(c *Config) {
			c.Members = nil
			for i := range 1025 {
				c.Members = append(c.Members, Member{Host: fmt.Sprint("h", i), Port: 1})
			}
		},
	} {
		c := list(3, 1, true)
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if err := Factory.Check(channel.NoConfig); err != nil {
		t.Error(err)
	}
}

// Every id can be written in both ways.
func TestIDs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id")
		var signed []string
		for _, x := range b {
			signed = append(signed, fmt.Sprint(int8(x)))
		}
		for _, text := range []string{hex.EncodeToString(b), "{" + strings.Join(signed, ",") + "}", "{" + strings.Join(signed, ", ") + "}"} {
			if id, err := parseID(text); err != nil || id != channel.UniqueID(b) {
				t.Fatalf("%s: %v, %v", text, id, err)
			}
		}
	})
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"", "{}", "{1,-1}", hexID(1), "{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := parseID(s)
		if err == nil && !id.IsZero() {
			if again, err := parseID(id.String()); err != nil || again != id {
				t.Errorf("%q is %v, which reads as %v (%v)", s, id, again, err)
			}
		}
	})
}

func TestPlace(t *testing.T) {
	x, err := New(Defaults, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := failuredetector.New(failuredetector.Defaults, channel.Settings{Net: &channeltest.SimNode{}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := channel.NewStack(channel.Layer{Interceptor: x}, channel.Layer{Interceptor: d}); err == nil || !strings.Contains(err.Error(), `"staticmember" must stand below "failuredetector"`) {
		t.Errorf("above the failure detector: %v", err)
	}
	s, err := channel.NewStack(channel.Layer{Interceptor: x})
	if err != nil || len(s.Warnings()) != 2 {
		t.Errorf("without failure detector and ping: %v, %q", err, s.Warnings())
	}
}

func BenchmarkReceive(b *testing.B) {
	x, err := New(Defaults, channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Discard: true})
	for _, size := range []int{36, 1024} { // 36 is the size of a notification
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.ReportAllocs()
			m := channel.Message{From: channeltest.Member(1), Options: channel.SendNone, Body: make([]byte, size)}
			for b.Loop() {
				if err := e.Receive(context.Background(), &m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
