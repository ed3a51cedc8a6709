package failuredetector

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// peer is a member with a real receiver and a whole stack on a simulated node.
type peer struct {
	channel.Member
	ch      *channel.Channel
	node    *channeltest.SimNode
	got     *channeltest.Recorder
	metrics *channel.Metrics
}

func newPeer(t *testing.T, node *channeltest.SimNode) *peer {
	t.Helper()
	p := &peer{node: node, got: new(channeltest.Recorder), metrics: channel.NewMetrics()}
	s := channel.Settings{Net: node, Logger: zap.NewNop(), Metrics: p.metrics}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = node.IP()
	cfg := Defaults
	cfg.Attempts = 1
	d, err := New(cfg, s)
	if err != nil {
		t.Fatal(err)
	}
	stack, err := channel.NewStack(channel.Layer{Interceptor: d})
	if err != nil {
		t.Fatal(err)
	}
	p.ch, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Name: "peer"},
		Stack:        stack,
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(rc, s),
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	p.ch.Listen(p.got)
	if err := p.ch.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.Member = p.ch.Local()
	return p
}

func (p *peer) stop(t *testing.T) {
	if err := p.ch.Stop(context.WithoutCancel(t.Context())); err != nil {
		t.Error(err)
	}
}

type fixture struct {
	*channeltest.Embedded
	d       *Interceptor
	metrics *channel.Metrics
	logs    *observer.ObservedLogs
}

func newFixture(t *testing.T, node *channeltest.SimNode, change func(*Config)) *fixture {
	t.Helper()
	cfg := Defaults
	cfg.CheckNew = false // the tests of newcomers set it
	cfg.Attempts = 1
	if change != nil {
		change(&cfg)
	}
	core, logs := observer.New(zap.InfoLevel)
	f := &fixture{metrics: channel.NewMetrics(), logs: logs}
	s := channel.Settings{Net: node, Metrics: f.metrics, Logger: zap.New(core)}
	var err error
	if f.d, err = New(cfg, s); err != nil {
		t.Fatal(err)
	}
	f.Embedded, err = channeltest.NewEmbedded(channeltest.EmbedConfig{Layers: []channel.Interceptor{f.d}, Settings: s, Tick: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) stop(t *testing.T) {
	if err := f.Stop(context.WithoutCancel(t.Context())); err != nil {
		t.Error(err)
	}
}

func (f *fixture) value(name string) float64 { return channeltest.Sum(f.metrics, name) }

func (f *fixture) changes() (out []string) {
	for _, c := range f.Top.Views()[1:] {
		out = append(out, fmt.Sprintf("%v %s", c.Event.Kind, c.Event.Member.Name()))
	}
	return out
}

func (f *fixture) expect(t *testing.T, when string, want ...string) {
	t.Helper()
	if got := f.changes(); !slices.Equal(got, want) {
		t.Errorf("%s: changes are %q, want %q", when, got, want)
	}
}

// run runs f with node 1 for the detector and a living member on node 2.
func run(t *testing.T, change func(*Config), f func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer)) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		p := newPeer(t, nw.Node("10.0.0.2"))
		fx := newFixture(t, nw.Node("10.0.0.1"), change)
		f(t, nw, fx, p)
		fx.stop(t)
		p.stop(t)
	})
}

// settle lets everything happen that takes no more than a few round trips.
func settle() { time.Sleep(50 * time.Millisecond) }

func TestLivingMemberIsKept(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		f.Observe(channel.MemberAdded, p.Member)
		f.Observe(channel.MemberLost, p.Member)
		time.Sleep(10*time.Second + 100*time.Millisecond)
		f.expect(t, "while it answers", "added peer")
		if n := f.value("failuredetector_checks_total"); n != 21 {
			t.Errorf("%v checks in 10 s, want one at once and one per tick", n)
		}
		if f.value("failuredetector_vetoed_total") != 1 || f.logs.FilterMessageSnippet("member kept").Len() != 1 {
			t.Error("the veto is not counted and logged once")
		}
		f.Observe(channel.MemberAdded, p.Member) // heartbeats are back
		settle()
		before := f.value("failuredetector_checks_total")
		time.Sleep(5 * time.Second)
		if n := f.value("failuredetector_checks_total"); n != before {
			t.Errorf("%v more checks of a member that is heard again", n-before)
		}
		f.expect(t, "heard again", "added peer")
		// Its own detector has swallowed and its receiver acknowledged.
		if len(p.got.Messages()) != 0 {
			t.Error("a check reached the application of the member")
		}
		var swallowed float64
		for _, s := range p.metrics.Samples() {
			if s.Name == "failuredetector_probes_received_total" {
				swallowed = s.Value
			}
		}
		if swallowed != before {
			t.Errorf("the member saw %v checks of %v", swallowed, before)
		}
	})
}

func TestDeadMemberIsRemoved(t *testing.T) {
	for _, c := range []struct {
		name   string
		die    func(nw *channeltest.SimNet, p *peer)
		within time.Duration
	}{
		{"crashed", func(_ *channeltest.SimNet, p *peer) { p.node.Crash() }, time.Second},
		{"killed", func(_ *channeltest.SimNet, p *peer) { p.node.Kill() }, time.Second},
		{"unreachable", func(nw *channeltest.SimNet, p *peer) { nw.Isolate("10.0.0.2") }, time.Second},
		{"answers do not come back", func(nw *channeltest.SimNet, p *peer) {
			nw.SetLink("10.0.0.2", "10.0.0.1", channeltest.LinkPolicy{Cut: true})
		}, time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
				f.Observe(channel.MemberAdded, p.Member)
				settle()
				c.die(nw, p)
				start := time.Now()
				f.Observe(channel.MemberLost, p.Member)
				for len(f.changes()) < 2 && time.Since(start) < time.Minute {
					time.Sleep(10 * time.Millisecond)
				}
				f.expect(t, "dead", "added peer", "lost peer")
				if d := time.Since(start); d > c.within+50*time.Millisecond {
					t.Errorf("removed after %v", d)
				}
				if n := f.value("failuredetector_suspects"); n != 0 {
					t.Errorf("%v suspects are kept", n)
				}
			})
		})
	}
}

// A process that is stopped still has its connections accepted by the system.
func TestOnlyAnAnswerCounts(t *testing.T) {
	for _, c := range []struct {
		name, answer string
		probe, kept  bool
	}{
		{"silent", "", true, false},
		{"silent, but connecting is enough", "", false, true},
		{"half an answer", wire.Ack[:20], true, false},
		{"something else", "HTTP/1.1 400 Bad Request\r\n\r\n", true, false},
		{"positive", wire.Ack, true, true},
		{"negative: somebody must have said so", wire.NegativeAck, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
				node := nw.Node("10.0.0.2")
				l, err := channel.ListenTCP(node, netip.MustParseAddrPort("10.0.0.2:4000"))
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					for {
						conn, err := l.Accept()
						if err != nil {
							return
						}
						go func() {
							defer conn.Close()
							buf := make([]byte, 4096)
							if _, err := conn.Read(buf); err == nil {
								_, _ = conn.Write([]byte(c.answer))
								_, _ = conn.Read(buf) // until the other side closes
							}
						}()
					}
				}()
				f := newFixture(t, nw.Node("10.0.0.1"), func(cfg *Config) { cfg.Probe = c.probe })
				m := channeltest.Member(2)
				f.Observe(channel.MemberAdded, m)
				f.Observe(channel.MemberLost, m)
				time.Sleep(1200 * time.Millisecond)
				if kept := f.View().Has(m); kept != c.kept {
					t.Errorf("kept is %v", kept)
				}
				f.stop(t)
				l.Close()
				time.Sleep(time.Second)
			})
		})
	}
}

func TestSuspicion(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		f.Observe(channel.MemberAdded, p.Member)
		f.Observe(channel.MemberSuspected, p.Member)
		time.Sleep(3 * time.Second)
		f.expect(t, "suspected, but it answers", "added peer")
		if n := f.value("failuredetector_checks_total"); n != 1 {
			t.Errorf("%v checks", n)
		}
		// The heartbeats go on, but no connection comes through.
		nw.Isolate("10.0.0.2")
		f.Observe(channel.MemberSuspected, p.Member)
		time.Sleep(2 * time.Second)
		f.expect(t, "unreachable", "added peer", "lost peer")
		changed := p.Member
		changed.Domain = "d"
		f.Observe(channel.MemberUpdated, changed)
		time.Sleep(5 * time.Minute)
		f.expect(t, "still unreachable", "added peer", "lost peer")
		if n := f.value("failuredetector_checks_total"); n > 20 {
			t.Errorf("%v checks in five minutes: no back-off", n)
		}
		nw.Heal()
		time.Sleep(maxBackoff + 2*time.Second)
		f.expect(t, "reachable again", "added peer", "lost peer", "added peer")
		if v := f.View(); len(v.Members) != 1 || v.Members[0].Domain != "d" {
			t.Errorf("view is %+v", v)
		}
		if n := f.value("failuredetector_restored_total"); n != 1 {
			t.Errorf("restored %v times", n)
		}
	})
}

func TestSuspectThatIsLostForGood(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		f.Observe(channel.MemberAdded, p.Member)
		p.node.Kill()
		f.Observe(channel.MemberSuspected, p.Member)
		time.Sleep(1100 * time.Millisecond) // nobody is there to refuse the connection
		f.expect(t, "failed", "added peer", "lost peer")
		f.Observe(channel.MemberLost, p.Member)
		settle()
		before := f.value("failuredetector_checks_total")
		time.Sleep(time.Minute)
		if n := f.value("failuredetector_checks_total"); n != before || f.value("failuredetector_suspects") != 0 {
			t.Errorf("%v checks of a member that is gone", n-before)
		}
		f.expect(t, "gone", "added peer", "lost peer")
	})
}

func TestKeptMemberThatDies(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		f.Observe(channel.MemberAdded, p.Member)
		f.Observe(channel.MemberLost, p.Member)
		time.Sleep(3 * time.Second)
		f.expect(t, "silent", "added peer")
		p.node.Kill()
		time.Sleep(2 * time.Second)
		f.expect(t, "dead", "added peer", "lost peer")
	})
}

func TestFinalEventsAreNotChecked(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		f.Observe(channel.MemberAdded, p.Member)
		f.Observe(channel.MemberLeft, p.Member)
		synctest.Wait()
		f.expect(t, "left", "added peer", "left peer")
		// Lost and kept, and then it says goodbye.
		f.Observe(channel.MemberAdded, p.Member)
		f.Observe(channel.MemberLost, p.Member)
		time.Sleep(2 * time.Second)
		f.Observe(channel.MemberLeft, p.Member)
		synctest.Wait()
		f.expect(t, "left while kept", "added peer", "left peer", "added peer", "left peer")
		if n := f.value("failuredetector_suspects"); n != 0 {
			t.Errorf("%v suspects", n)
		}
	})
}

// A node that is restarted on the same port answers the checks of its former
// self; that one must go all the same.
func TestNoGhosts(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		old := p.Member
		old.ID = channel.NewUniqueID()
		old.Payload = channel.Announcement{Name: "old"}.Encode()
		f.Observe(channel.MemberAdded, old)
		f.Observe(channel.MemberLost, old)
		time.Sleep(2 * time.Second)
		f.expect(t, "the new process answers", "added old")
		f.Observe(channel.MemberAdded, p.Member)
		time.Sleep(2 * time.Second)
		f.expect(t, "it is heard", "added old", "lost old", "added peer")
		if n := f.value("failuredetector_suspects"); n != 0 {
			t.Errorf("%v suspects", n)
		}
	})
}

func TestHeartbeatsThatComeBackDuringACheck(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		f.Observe(channel.MemberAdded, p.Member)
		settle()
		nw.Isolate("10.0.0.2")
		f.Observe(channel.MemberLost, p.Member)
		time.Sleep(500 * time.Millisecond) // the check waits for the connection
		f.Observe(channel.MemberAdded, p.Member)
		time.Sleep(5 * time.Second)
		f.expect(t, "heard during the check", "added peer")
	})
}

func TestChecksAreBoundedAndDelayNobody(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		const lost = 100
		for i := range lost {
			f.Observe(channel.MemberAdded, channeltest.Member(i+10)) // nodes that do not exist
		}
		settle()
		for i := range lost {
			f.Observe(channel.MemberLost, channeltest.Member(i+10))
		}
		synctest.Wait()
		f.d.mu.Lock()
		running, waiting := f.d.running, len(f.d.waiting)
		f.d.mu.Unlock()
		if running != Defaults.MaxChecks || waiting != lost-Defaults.MaxChecks {
			t.Errorf("%d checks run and %d wait", running, waiting)
		}
		f.Observe(channel.MemberAdded, p.Member)
		synctest.Wait()
		if !f.View().Has(p.Member) || len(f.View().Members) != lost+1 {
			t.Errorf("events wait for checks: %d members", len(f.View().Members))
		}
		time.Sleep(5 * time.Second)
		if n := len(f.View().Members); n != 1 {
			t.Errorf("%d members are left", n)
		}
		if n := f.value("failuredetector_checks_total"); n != lost {
			t.Errorf("%v checks", n)
		}
	})
}

func TestStopBreaksChecksOff(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		for i := range 100 {
			f.Observe(channel.MemberAdded, channeltest.Member(i+10))
			f.Observe(channel.MemberLost, channeltest.Member(i+10))
		}
		synctest.Wait()
		start := time.Now()
		f.stop(t)
		if d := time.Since(start); d > 100*time.Millisecond {
			t.Errorf("stop took %v", d)
		}
	})
}

func TestStopBreaksOffTheWaitForAnAnswer(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		l, err := channel.ListenTCP(nw.Node("10.0.0.2"), netip.MustParseAddrPort("10.0.0.2:4000"))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f := newFixture(t, nw.Node("10.0.0.1"), nil)
		f.Observe(channel.MemberAdded, channeltest.Member(2))
		f.Observe(channel.MemberLost, channeltest.Member(2))
		time.Sleep(500 * time.Millisecond) // connected, no answer yet
		start := time.Now()
		f.stop(t)
		if d := time.Since(start); d > 100*time.Millisecond {
			t.Errorf("stop took %v", d)
		}
	})
}

func TestStopWithoutStart(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		d, err := New(Defaults, channel.Settings{Net: nw.Node("10.0.0.1")})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := d.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestChecksOfOthersAreSwallowed(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		for _, o := range []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck} {
			if err := f.ReceiveBody(p.Member, o, probeBody); err != nil {
				t.Errorf("%v: %v", o, err)
			}
		}
		near := probeBody[:63] + "\x00"
		for _, body := range []string{"", near, probeBody + "x", probeBody[:63]} {
			if err := f.ReceiveBody(p.Member, channel.SendNone, body); err != nil {
				t.Error(err)
			}
		}
		if n := len(f.Top.Messages()); n != 4 {
			t.Errorf("%d messages reached the application, want 4", n)
		}
		if n := f.value("failuredetector_probes_received_total"); n != 3 {
			t.Errorf("%v checks counted", n)
		}
	})
}

// The bytes are those that a Tomcat node sends and understands.
func TestProbeBytes(t *testing.T) {
	text, err := os.ReadFile("testdata/probe.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []struct{ Name, Hex string }
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, v := range file.Vectors {
		want, err := hex.DecodeString(v.Hex)
		if err != nil {
			t.Fatal(err)
		}
		switch v.Name {
		case "tcp-failure-detector-test":
			found++
			if probeBody != string(want) {
				t.Error("the body differs")
			}
		case "tcp-failure-detector-frame":
			found++
			var m channel.Message
			if _, _, err := wire.DecodeFrame(want, wire.DefaultMaxFrame, &m); err != nil {
				t.Fatal(err)
			}
			if string(m.Body) != probeBody {
				t.Error("the body in the frame differs")
			}
			if got := wire.AppendFrame(nil, &m); string(got) != string(want) {
				t.Errorf("the frame differs: %x", got)
			}
		}
	}
	if found != 2 {
		t.Errorf("%d vectors found", found)
	}
}

func TestConfig(t *testing.T) {
	for want, cfg := range map[string]Config{
		"connect_timeout is 0s": {ReadTimeout: 1, Attempts: 1},
		"read_timeout is -1ns":  {ConnectTimeout: 1, ReadTimeout: -1, Attempts: 1},
		"attempts is 11":        {ConnectTimeout: 1, ReadTimeout: 1, Attempts: 11},
		"read_test is \"no\"":   {ConnectTimeout: 1, ReadTimeout: 1, Attempts: 1, ReadTest: "no", MaxChecks: 1},
		"max_checks is 0":       {ConnectTimeout: 1, ReadTimeout: 1, Attempts: 1, ReadTest: Auto},
	} {
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", cfg, err, want)
		}
	}
	if _, err := New(Defaults, channel.Settings{}); !errors.Is(err, channel.ErrNotConfigured) {
		t.Errorf("without a network: %v", err)
	}
}

func BenchmarkReceive(b *testing.B) {
	d, err := New(Defaults, channel.Settings{Net: &channeltest.SimNode{}})
	if err != nil {
		b.Fatal(err)
	}
	e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{d}, Discard: true})
	for _, size := range []int{64, 1024} { // 64 is the size of a check
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

// A network that loses two of five packets, in both directions, hides nobody:
// the further connections of an attempt make up for what the first one waits
// for.
func TestLossyNetwork(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 3}, func(t *testing.T, nw *channeltest.SimNet) {
		l, err := channel.ListenTCP(nw.Node("10.0.0.2"), netip.MustParseAddrPort("10.0.0.2:4000"))
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() { // acknowledges everything
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					defer c.Close()
					_ = c.SetDeadline(time.Now().Add(10 * time.Second))
					if _, err := c.Read(make([]byte, 1024)); err == nil {
						_, _ = c.Write([]byte(wire.Ack))
						_, _ = c.Read(make([]byte, 1)) // until it is closed
					}
				})
			}
		})
		for _, ips := range [][2]string{{"10.0.0.1", "10.0.0.2"}, {"10.0.0.2", "10.0.0.1"}} {
			nw.SetLink(ips[0], ips[1], channeltest.LinkPolicy{Loss: 0.4})
		}
		p := prober{net: nw.Node("10.0.0.1"), cfg: Defaults}
		m := channeltest.Member(2)
		m.Host = netip.MustParseAddr("10.0.0.2")
		failed := 0
		for range 300 {
			if err := p.check(t.Context(), channeltest.Member(1), m, true); err != nil {
				failed++
			}
			time.Sleep(77 * time.Millisecond)
		}
		if failed > 2 {
			t.Errorf("%d of 300 checks failed", failed)
		}
		l.Close()
		wg.Wait()
	})
}
