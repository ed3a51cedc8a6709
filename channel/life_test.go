package channel_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// A sender and a receiver without effect.
type (
	noSender   struct{}
	noReceiver struct{}
)

func (noSender) Start(context.Context) error                  { return nil }
func (noSender) Send(context.Context, *channel.Message) error { return nil }
func (noSender) Forget(channel.Member)                        {}
func (noSender) Stop(context.Context) error                   { return nil }

func (noReceiver) Listen(context.Context) (netip.AddrPort, error) { return netip.AddrPort{}, nil }
func (noReceiver) Start(context.Context, func(context.Context, *channel.Message) error) error {
	return nil
}
func (noReceiver) Stop(context.Context) error { return nil }

// part notes the calls of a sender, receiver or membership and can fail them.
type part struct {
	name string
	log  *[]string
	fail string
}

func (p part) call(what string) error {
	*p.log = append(*p.log, p.name+" "+what)
	if p.fail == p.name+" "+what {
		return errors.New("as told")
	}
	return nil
}

type (
	fakeSender     struct{ part }
	fakeReceiver   struct{ part }
	fakeMembership struct{ part }
	fakeLayer      struct{ part }
)

func (s fakeSender) Start(context.Context) error                  { return s.call("start") }
func (s fakeSender) Send(context.Context, *channel.Message) error { return nil }
func (s fakeSender) Forget(channel.Member)                        {}
func (s fakeSender) Stop(context.Context) error                   { return s.call("stop") }

func (r fakeReceiver) Listen(context.Context) (netip.AddrPort, error) {
	return netip.MustParseAddrPort("10.0.0.9:4009"), r.call("listen")
}
func (r fakeReceiver) Start(context.Context, func(context.Context, *channel.Message) error) error {
	return r.call("start")
}
func (r fakeReceiver) Stop(context.Context) error { return r.call("stop") }

func (s fakeMembership) Start(_ context.Context, local channel.Member, _ []channel.Member, _ channel.MemberSink) error {
	a, _ := local.Announcement()
	return s.call(fmt.Sprint("start ", local, " ", a.Fingerprint, " ", local.Domain, " ", local.SecurePort, " ", local.UDPPort))
}
func (s fakeMembership) Update(_ context.Context, local channel.Member) error {
	return s.call("update " + local.Name())
}
func (s fakeMembership) Stop(context.Context) error { return s.call("stop") }

func (l fakeLayer) Descriptor() channel.Descriptor                { return channel.Descriptor{Name: l.name} }
func (l fakeLayer) Start(_ context.Context, k channel.Link) error { return l.call("start") }
func (l fakeLayer) Stop(context.Context) error                    { return l.call("stop") }

const joined = "membership start me (tcp://10.0.0.9:4009) gzip:100 d -1 4010"

func TestStartAndStopOrder(t *testing.T) {
	all := []string{"receiver listen", "sender start", "low start", "high start", "receiver start", joined,
		"membership stop", "receiver stop", "high stop", "low stop", "sender stop"}
	for _, c := range []struct {
		fail string
		want []string
	}{
		{"", all},
		{"receiver listen", []string{"receiver listen", "receiver stop"}},
		{"sender start", []string{"receiver listen", "sender start", "receiver stop", "sender stop"}},
		{"low start", []string{"receiver listen", "sender start", "low start", "receiver stop", "sender stop"}},
		{"high start", []string{"receiver listen", "sender start", "low start", "high start", "receiver stop", "low stop", "sender stop"}},
		{"receiver start", []string{"receiver listen", "sender start", "low start", "high start", "receiver start", "receiver stop", "high stop", "low stop", "sender stop"}},
		{joined, all},
		{"membership stop", all},
	} {
		var log []string
		p := func(name string) part { return part{name, &log, c.fail} }
		ch, err := channel.New(channel.Config{
			Local:        channel.Member{Domain: "d", UDPPort: 4010},
			Announcement: channel.Announcement{Name: "me", Fingerprint: "to be overwritten"},
			Stack:        stackOf(t, fakeLayer{p("high")}, gzip(), fakeLayer{p("low")}),
			Sender:       fakeSender{p("sender")},
			Receiver:     fakeReceiver{p("receiver")},
			Membership:   fakeMembership{p("membership")},
		}, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		startErr := ch.Start(t.Context())
		wantFail := c.fail != "" && c.fail != "membership stop"
		if (startErr != nil) != wantFail {
			t.Errorf("%q fails: start returned %v", c.fail, startErr)
		}
		stopErr := ch.Stop(t.Context())
		if (stopErr != nil) != (c.fail == "membership stop") {
			t.Errorf("%q fails: stop returned %v", c.fail, stopErr)
		}
		if err := ch.Stop(t.Context()); err != nil {
			t.Errorf("second stop: %v", err)
		}
		if !slices.Equal(log, c.want) {
			t.Errorf("%q fails:\n got %q\nwant %q", c.fail, log, c.want)
		}
	}
}

func TestNewChecksItsParts(t *testing.T) {
	if _, err := channel.New(channel.Config{Tick: -1}, channel.Settings{}); !errors.Is(err, channel.ErrNotConfigured) {
		t.Errorf("got %v", err)
	}
}

func TestAnnounceUpdatesTheRecord(t *testing.T) {
	var log []string
	p := func(name string) part { return part{name, &log, ""} }
	ch, err := channel.New(channel.Config{
		Announcement: channel.Announcement{Name: "before"},
		Stack:        stackOf(t, gzip()),
		Sender:       fakeSender{p("sender")}, Receiver: fakeReceiver{p("receiver")}, Membership: fakeMembership{p("membership")},
	}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.Announce(t.Context(), channel.Announcement{Name: "early"}); !errors.Is(err, channel.ErrClosed) {
		t.Errorf("before start: %v", err)
	}
	if err := ch.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer ch.Stop(t.Context())
	if err := ch.Start(t.Context()); err == nil {
		t.Error("started twice")
	}
	if err := ch.Announce(t.Context(), channel.Announcement{Name: "after"}); err != nil {
		t.Fatal(err)
	}
	if a := ch.Announcement(); a.Name != "after" || a.Fingerprint != "gzip:100" || ch.Local().Name() != "after" {
		t.Errorf("announcement is %+v", a)
	}
	if log[len(log)-1] != "membership update after" {
		t.Errorf("log is %q", log)
	}
}

// A send that is on its way when Stop comes is waited for, as long as the
// context allows, and the layers are not stopped under it.
func TestStopWaitsForSends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		e.OnSend(func(context.Context, *channel.Message) error {
			time.Sleep(2 * time.Second)
			return nil
		})
		sent := make(chan error, 1)
		go func() { sent <- e.Send(t.Context(), peers, nil, channel.SendAck) }()
		synctest.Wait()
		start := time.Now()
		if err := e.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("stop took %v", d)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
	})
}

func TestStopGivesUpWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		release := make(chan struct{})
		e.Watch(func(_ channel.View, ev channel.MemberEvent) {
			if ev.Kind != 0 {
				<-release
			}
		})
		e.Observe(channel.MemberAdded, peers[0])
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := e.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("stop with a stuck watcher: %v", err)
		}
		close(release)
		synctest.Wait()
	})
}

func TestStopWithAnEndedContextStillStops(t *testing.T) {
	for range 20 {
		e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_ = e.Stop(ctx) // may complain
		if err := e.Send(t.Context(), peers, nil, 0); !errors.Is(err, channel.ErrClosed) {
			t.Fatalf("still running: %v", err)
		}
	}
}
