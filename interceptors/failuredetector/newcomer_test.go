package failuredetector

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
)

func checkNew(c *Config) { c.CheckNew = true }

// A member that heartbeats but accepts no connections is never shown.
func TestUnreachableNewcomerIsNeverShown(t *testing.T) {
	run(t, checkNew, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		m := channeltest.Member(9) // nobody listens there
		nw.Node("10.0.0.9")
		f.Observe(channel.MemberAdded, m)
		for range 600 { // its heartbeats go on for five minutes
			time.Sleep(500 * time.Millisecond)
			m.Alive += 500 * time.Millisecond
			f.Observe(channel.MemberUpdated, m)
		}
		f.expect(t, "it accepts no connections")
		if n := f.value("failuredetector_held_back_total"); n != 1 {
			t.Errorf("held back %v times", n)
		}
		if n := f.value("failuredetector_checks_total"); n < 5 || n > 20 {
			t.Errorf("%v checks in five minutes, want some, with growing pauses", n)
		}
		if f.logs.FilterMessageSnippet("member not shown").Len() != 1 {
			t.Error("not logged once")
		}
		f.Observe(channel.MemberLost, m)
		settle()
		if n := f.value("failuredetector_suspects"); n != 0 {
			t.Errorf("%v suspects are left", n)
		}
	})
}

func TestNewcomerIsShownAfterItsCheck(t *testing.T) {
	run(t, checkNew, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		nw.Isolate("10.0.0.2")
		f.Observe(channel.MemberAdded, p.Member)
		time.Sleep(5 * time.Second)
		f.expect(t, "cut off")
		changed := p.Member
		changed.Domain = "d"
		f.Observe(channel.MemberUpdated, changed)
		nw.Heal()
		time.Sleep(maxBackoff)
		f.expect(t, "reachable", "added peer")
		if v := f.View(); len(v.Members) != 1 || v.Members[0].Domain != "d" {
			t.Errorf("view is %+v", v)
		}
		if n := f.value("failuredetector_restored_total"); n != 0 {
			t.Errorf("restored %v times, but it had not been removed", n)
		}
		time.Sleep(time.Minute)
		if n := f.value("failuredetector_suspects"); n != 0 {
			t.Errorf("%v suspects", n)
		}
	})
}

// A newcomer that is lost or leaves before its check has ended.
func TestNewcomerThatGoes(t *testing.T) {
	run(t, checkNew, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		f.Observe(channel.MemberAdded, p.Member)
		f.Observe(channel.MemberLeft, p.Member)
		time.Sleep(time.Minute)
		f.expect(t, "left")
		// Lost, but it answers: kept, as the other way round.
		f.Observe(channel.MemberAdded, p.Member)
		f.Observe(channel.MemberLost, p.Member)
		time.Sleep(10 * time.Second)
		f.expect(t, "silent, but it answers", "added peer")
		p.node.Kill()
		time.Sleep(3 * time.Second)
		f.expect(t, "dead", "added peer", "lost peer")
		f.Observe(channel.MemberAdded, channeltest.Member(9))
		f.Observe(channel.MemberLost, channeltest.Member(9))
		time.Sleep(10 * time.Second)
		f.expect(t, "lost, and it does not answer", "added peer", "lost peer")
		if n := f.value("failuredetector_suspects"); n != 0 {
			t.Errorf("%v suspects", n)
		}
	})
}

// A member that stops heartbeating but accepts TCP stays, and sends succeed.
func TestSilentMemberStaysAndReceives(t *testing.T) {
	run(t, checkNew, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		f.Observe(channel.MemberAdded, p.Member)
		settle()
		f.Observe(channel.MemberLost, p.Member)
		time.Sleep(time.Minute)
		f.expect(t, "silent", "added peer")
		if err := f.Send(t.Context(), f.View().Members, []byte("x"), channel.SendSyncAck); err != nil {
			t.Error(err)
		}
	})
}

// Thirty-two members fail at once: nobody waits for the check of another.
func TestManyFailuresAtOnce(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, f *fixture, p *peer) {
		const lost = 32
		f.Observe(channel.MemberAdded, p.Member)
		for i := range lost {
			f.Observe(channel.MemberAdded, channeltest.Member(i+10)) // nodes that do not exist
		}
		settle()
		for i := range lost {
			f.Observe(channel.MemberLost, channeltest.Member(i+10))
		}
		time.Sleep(Defaults.ConnectTimeout + 100*time.Millisecond)
		if v := f.View(); len(v.Members) != 1 || !v.Has(p.Member) {
			t.Errorf("after one check's time %d members are left", len(v.Members))
		}
		if n := f.value("failuredetector_delayed_total"); n != 0 {
			t.Errorf("%v checks were delayed", n)
		}
		f.Observe(channel.MemberAdded, channeltest.Member(9))
		for i := range lost + 1 {
			f.Observe(channel.MemberAdded, channeltest.Member(i+100))
		}
		settle()
		for i := range lost + 1 {
			f.Observe(channel.MemberLost, channeltest.Member(i+100))
		}
		time.Sleep(100 * time.Millisecond)
		if n := f.value("failuredetector_delayed_total"); n != 1 || f.value("failuredetector_waiting") != 1 {
			t.Errorf("%v checks were delayed, want the one beyond the bound", n)
		}
		time.Sleep(3 * time.Second)
	})
}

// Members that accept connections and never read. A Longhouse node is removed;
// a Tomcat node, whose receiver may be busy, only when it is silent too.
func TestAcceptsAndNeverReads(t *testing.T) {
	for _, c := range []struct {
		name, readTest string
		tomcat, silent bool
		kept           bool
	}{
		{"Longhouse, suspected", Auto, false, false, false},
		{"Longhouse, silent", Auto, false, true, false},
		{"Tomcat, suspected", Auto, true, false, true},
		{"Tomcat, silent", Auto, true, true, false},
		{"Tomcat, suspected, always", Always, true, false, false},
		{"Longhouse, silent, never", Never, false, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
				l, err := channel.ListenTCP(nw.Node("10.0.0.2"), netip.MustParseAddrPort("10.0.0.2:4000"))
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					var conns []net.Conn
					for {
						conn, err := l.Accept()
						if err != nil {
							break
						}
						conns = append(conns, conn)
					}
					for _, conn := range conns {
						conn.Close()
					}
				}()
				f := newFixture(t, nw.Node("10.0.0.1"), func(cfg *Config) { cfg.ReadTest = c.readTest })
				m := channeltest.Member(2)
				if c.tomcat {
					m.Payload = ""
				}
				f.Observe(channel.MemberAdded, m)
				kind := channel.MemberSuspected
				if c.silent {
					kind = channel.MemberLost
				}
				f.Observe(kind, m)
				time.Sleep(10 * time.Second)
				if kept := f.View().Has(m); kept != c.kept {
					t.Errorf("kept is %v", kept)
				}
				f.stop(t)
				l.Close()
				<-done
				synctest.Wait()
			})
		})
	}
}

// Layers that change every message must stand above: checks do not pass them.
func TestEncryptionBelowIsRefused(t *testing.T) {
	d, err := New(Defaults, channel.Settings{Net: &channeltest.SimNode{}})
	if err != nil {
		t.Fatal(err)
	}
	same := func(*channel.Message) error { return nil }
	encrypt := channel.Transform(channel.Descriptor{Name: "encrypt", Mutates: true, Provides: []string{channel.PropEncryption}}, same, same)
	_, err = channel.NewStack(channel.Layer{Interceptor: d, Origin: "node.yaml:3"}, channel.Layer{Interceptor: encrypt, Origin: "node.yaml:4"})
	if err == nil || !strings.Contains(err.Error(), `"failuredetector" (node.yaml:3) must stand below "encrypt" (node.yaml:4)`) {
		t.Errorf("encryption below: %v", err)
	}
	if _, err := channel.NewStack(channel.Layer{Interceptor: encrypt}, channel.Layer{Interceptor: d}); err != nil {
		t.Errorf("encryption above: %v", err)
	}
}

// byHand is a membership that the test speaks for.
type byHand struct{ sink channel.MemberSink }

func (b *byHand) Start(_ context.Context, _ channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	b.sink = sink
	return nil
}
func (*byHand) Update(context.Context, channel.Member) error { return nil }
func (*byHand) Stop(context.Context) error                   { return nil }

// The receiver of a member stops, and its heartbeats go on: a send fails, and
// the member is dropped.
func TestSendFailureDropsMember(t *testing.T) {
	run(t, nil, func(t *testing.T, nw *channeltest.SimNet, _ *fixture, p *peer) {
		node := nw.Node("10.0.0.3")
		s := channel.Settings{Net: node, Logger: zap.NewNop()}
		d, err := New(Defaults, s)
		if err != nil {
			t.Fatal(err)
		}
		stack, err := channel.NewStack(channel.Layer{Interceptor: d})
		if err != nil {
			t.Fatal(err)
		}
		rc := tcp.DefaultReceiverConfig()
		rc.Address = node.IP()
		hand := new(byHand)
		ch, err := channel.New(channel.Config{Stack: stack, Membership: hand, Sender: tcp.NewSender(tcp.DefaultSenderConfig(), s), Receiver: tcp.NewReceiver(rc, s)}, s)
		if err != nil {
			t.Fatal(err)
		}
		if err := ch.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		hand.sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: p.Member})
		settle()
		to := ch.View().Members
		if len(to) != 1 {
			t.Fatalf("the view is %v", to)
		}
		if err := ch.Send(t.Context(), to, []byte("x"), channel.SendAck); err != nil {
			t.Fatal(err)
		}
		p.stop(t)
		time.Sleep(time.Minute)
		if !ch.View().Has(p.Member) {
			t.Fatal("dropped without a reason")
		}
		if err := ch.Send(t.Context(), to, []byte("x"), channel.SendAck); err == nil {
			t.Error("a send to a member without a receiver succeeded")
		}
		for start := time.Now(); ch.View().Has(p.Member); time.Sleep(100 * time.Millisecond) {
			if time.Since(start) > 30*time.Second {
				t.Fatal("the member was not dropped")
			}
		}
		if err := ch.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
}
