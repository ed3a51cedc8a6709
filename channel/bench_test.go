package channel_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// pass is a layer that only forwards, in both directions.
type pass struct{}

func (pass) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "pass"} }
func (pass) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	return l.Send(ctx, m)
}
func (pass) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	return l.Deliver(ctx, m)
}

// BenchmarkStack measures a message through a stack of forwarding layers, with
// all that Channel itself does to it and without a network.
func BenchmarkStack(b *testing.B) {
	for _, depth := range []int{0, 1, 3, 10} {
		var layers []channel.Interceptor
		for range depth {
			layers = append(layers, pass{})
		}
		e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: layers, Discard: true})
		body := make([]byte, 1024)
		to := []channel.Member{channeltest.Member(1)}
		ctx := context.Background()
		b.Run(fmt.Sprintf("send/%d", depth), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := e.Send(ctx, to, body, channel.SendAck); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("receive/%d", depth), func(b *testing.B) {
			b.ReportAllocs()
			m := channel.Message{From: to[0], Options: channel.SendNone, Body: body}
			for b.Loop() {
				if err := e.Receive(ctx, &m); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("receive-ack/%d", depth), func(b *testing.B) {
			b.ReportAllocs()
			m := channel.Message{From: to[0], Options: channel.SendSyncAck, Body: body, Later: later{}}
			for b.Loop() {
				m.ID = channel.NewUniqueID()
				m.Later = later{}
				if err := e.Receive(ctx, &m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// later is a receiver's Deferrer that is not used.
type later struct{}

func (later) Defer() func(error) { return func(error) {} }
