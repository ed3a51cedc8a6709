package twophase

import (
	"context"
	"fmt"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
)

// byHand is a membership that the test speaks for.
type byHand struct{ sink channel.MemberSink }

func (b *byHand) Start(_ context.Context, _ channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	b.sink = sink
	return nil
}
func (*byHand) Update(context.Context, channel.Member) error { return nil }
func (*byHand) Stop(context.Context) error                   { return nil }

// killer kills its node when the confirmation has gone to some of its
// destinations.
type killer struct {
	node    *channeltest.SimNode
	reached int
}

func (*killer) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "killer"} }

func (k *killer) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if !isConfirm(m) {
		return l.Send(ctx, m)
	}
	if k.reached > 0 {
		c := *m
		c.To, c.Options, c.Done = m.To[:k.reached], channel.SendSyncAck|channel.TwoPhase, nil
		if err := l.Send(ctx, &c); err != nil {
			return err
		}
	}
	k.node.Kill()
	return channel.Failed(m.To[k.reached:], channel.ErrDisconnected)
}

// The process of a sender is killed between its confirmations, over real
// connections: the others find out what has become of the message.
func TestKilledSender(t *testing.T) {
	for _, reached := range []int{0, 1, 2} {
		t.Run(fmt.Sprint(reached), func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{Seed: 4, Link: channeltest.LinkPolicy{Loss: 0.02}}, func(t *testing.T, nw *channeltest.SimNet) {
				var chs []*channel.Channel
				var hands []*byHand
				var got []*channeltest.Recorder
				for i, sim := range nw.Nodes(4) {
					s := channel.Settings{Net: sim, Logger: zap.NewNop()}
					x, err := New(Defaults, s)
					if err != nil {
						t.Fatal(err)
					}
					d, err := failuredetector.New(failuredetector.Defaults, s)
					if err != nil {
						t.Fatal(err)
					}
					layers := []channel.Layer{{Interceptor: x}, {Interceptor: d}}
					if i == 0 {
						layers = []channel.Layer{{Interceptor: x}, {Interceptor: &killer{sim, reached}}, {Interceptor: d}}
					}
					stack, err := channel.NewStack(layers...)
					if err != nil {
						t.Fatal(err)
					}
					rc := tcp.DefaultReceiverConfig()
					rc.Address = sim.IP()
					hand, rec := new(byHand), new(channeltest.Recorder)
					ch, err := channel.New(channel.Config{
						Announcement: channel.Announcement{Name: sim.IP(), Pipelined: true}, Stack: stack, Membership: hand,
						Sender: tcp.NewSender(tcp.DefaultSenderConfig(), s), Receiver: tcp.NewReceiver(rc, s),
					}, s)
					if err != nil {
						t.Fatal(err)
					}
					ch.Listen(rec)
					if err := ch.Start(t.Context()); err != nil {
						t.Fatal(err)
					}
					chs, hands, got = append(chs, ch), append(hands, hand), append(got, rec)
				}
				for i, h := range hands {
					for j, ch := range chs {
						if i != j {
							h.sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: ch.Local()})
						}
					}
				}
				for start := time.Now(); len(chs[0].View().Members) < 3 || len(chs[3].View().Members) < 3; time.Sleep(50 * time.Millisecond) {
					if time.Since(start) > time.Minute {
						t.Fatal("the members do not see each other")
					}
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				if err := chs[0].Send(ctx, chs[0].View().Members, []byte("x"), channel.SendSyncAck|channel.TwoPhase); err == nil {
					t.Error("the send of a dead node succeeded")
				}
				cancel()
				for i, h := range hands[1:] { // each notices at another time
					time.Sleep(time.Duration(i) * time.Second)
					h.sink.Observe(channel.MemberEvent{Kind: channel.MemberLost, Member: chs[0].Local()})
				}
				time.Sleep(40 * time.Second) // less than the time it would be held
				for i, r := range got[1:] {
					if n := len(r.Messages()); n != min(reached, 1) {
						t.Errorf("%d were confirmed: node %d delivered %d times", reached, i+1, n)
					}
				}
				for i, ch := range chs {
					ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 10*time.Second)
					if err := ch.Stop(ctx); err != nil && i > 0 {
						t.Error(err)
					}
					cancel()
				}
			})
		})
	}
}
