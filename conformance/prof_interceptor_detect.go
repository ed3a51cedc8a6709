package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
)

// byHand is a membership whose reports the check makes up.
type byHand struct{ sink channel.MemberSink }

func (b *byHand) Start(_ context.Context, _ channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	b.sink = sink
	return nil
}
func (b *byHand) Update(context.Context, channel.Member) error { return nil }
func (b *byHand) Stop(context.Context) error                   { return nil }

// station is a node of a simulated network: the subject over real senders and
// receivers.
type station struct {
	*channel.Channel
	hand  byHand
	node  *channeltest.SimNode
	seen  channeltest.Recorder
	reply atomic.Pointer[func() error]
}

// Handle implements channel.Listener.
func (s *station) Handle(context.Context, *channel.Message) (bool, error) {
	if f := s.reply.Load(); f != nil {
		return true, (*f)()
	}
	return true, nil
}

func (t *T) station(nw *channeltest.SimNet, ip string, layer channel.Interceptor, n *channeltest.SimNode) *station {
	t.Helper()
	st := &station{node: n}
	settings := withLogger(channel.Settings{Name: ip, Net: n, Metrics: channel.NewMetrics()})
	provider := channel.Transform(channel.Descriptor{Name: "probe", Provides: layer.Descriptor().Requires}, func(*channel.Message) error { return nil }, nil)
	stack, err := channel.NewStack(channel.Layer{Interceptor: layer}, channel.Layer{Interceptor: provider})
	if err != nil {
		t.Fatalf("stack: %v", err)
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = ip
	st.Channel, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Name: ip, Pipelined: true}, Stack: stack,
		Sender: tcp.NewSender(tcp.DefaultSenderConfig(), settings), Receiver: tcp.NewReceiver(rc, settings), Membership: &st.hand,
	}, settings)
	if err == nil {
		st.Listen(st)
		st.Watch(st.seen.Watch)
		err = st.Start(t.Context())
	}
	if err != nil {
		t.Fatalf("node %s: %v", ip, err)
	}
	return st
}

// lost counts the removals of a member that the node's application saw.
func (s *station) lost(m channel.Member) (n int) {
	for _, v := range s.seen.Views() {
		if v.Event.Member.ID == m.ID && (v.Event.Kind == channel.MemberLost || v.Event.Kind == channel.MemberLeft) {
			n++
		}
	}
	return n
}

func checkFailureDetect(t *T) {
	if !t.Virtual() {
		t.Skip("needs the simulated network")
	}
	t.Sim(channeltest.SimConfig{}, func(t *T, nw *channeltest.SimNet) {
		var all []*station
		for i := range 4 {
			ip := fmt.Sprintf("10.0.0.%d", i+1)
			n := nw.Node(ip)
			layer, err := t.interceptor().Interceptor(t, withLogger(channel.Settings{Name: "subject", Net: n, Metrics: channel.NewMetrics()}))
			if err != nil {
				t.Fatalf("make: %v", err)
			}
			all = append(all, t.station(nw, ip, layer, n))
		}
		defer func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			for _, s := range all {
				_ = s.Stop(ctx) // those that were killed may complain
			}
		}()
		for _, s := range all {
			for _, o := range all {
				if o != s {
					s.hand.sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: o.Local()})
				}
			}
		}
		a, b, c, d := all[0], all[1], all[2], all[3]
		mb, mc, md := b.Local(), c.Local(), d.Local()
		t.Eventually(time.Minute, func() error {
			if len(a.View().Members) != 3 {
				return fmt.Errorf("three members were reported, the layers above see %d", len(a.View().Members))
			}
			return nil
		})
		kept := func(after string) {
			t.Helper()
			time.Sleep(30 * time.Second)
			if a.lost(mb) > 0 || !a.View().Has(mb) {
				t.Fatalf("a living member was removed after %s", after)
			}
		}
		send := func(m channel.Member) error {
			return a.Send(t.Context(), []channel.Member{m}, []byte("x"), channel.SendSyncAck)
		}
		refuse := func() error { return errRefused }
		b.reply.Store(&refuse)
		for range 5 {
			if err := send(mb); !errors.Is(err, channel.ErrNegativeAck) {
				t.Fatalf("a refused message failed with %v", err)
			}
		}
		kept("it had refused messages")
		slow := func() error { time.Sleep(5 * time.Second); return nil }
		b.reply.Store(&slow)
		if err := send(mb); err == nil {
			t.Error("a member that takes 5 s to acknowledge was waited for; the limit is 3 s")
		}
		b.reply.Store(nil)
		kept("it had been slow")
		a.hand.sink.Observe(channel.MemberEvent{Kind: channel.MemberLost, Member: mb})
		kept("its heartbeats had been lost")
		a.hand.sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: mb})

		removed := func(m channel.Member, after string) {
			t.Helper()
			t.Eventually(time.Minute, func() error {
				if a.View().Has(m) {
					return fmt.Errorf("a dead member is still in the view after %s", after)
				}
				return nil
			})
			time.Sleep(time.Minute)
			if n := a.lost(m); n != 1 {
				t.Errorf("a dead member was removed %d times after %s", n, after)
			}
		}
		c.node.Crash()
		if err := send(mc); err == nil {
			t.Fatal("a message to a dead member succeeded")
		}
		removed(mc, "a message to it had failed")
		d.node.Kill()
		a.hand.sink.Observe(channel.MemberEvent{Kind: channel.MemberLost, Member: md})
		removed(md, "its heartbeats had been lost")
		if a.lost(mb) > 0 {
			t.Error("a living member was removed together with dead ones")
		}
	})
}

var errRefused = errors.New("conformance: the application refuses")
