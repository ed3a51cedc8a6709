package interceptors_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/interceptors"
)

// BenchmarkStack/throughput+dispatch+failuredetector measures a message through
// the three layers of the default stack, with everything Channel itself does to it and
// without a network. "async" goes through the queue of the dispatch layer.
func BenchmarkStack(b *testing.B) {
	var layers []channel.Interceptor
	for _, f := range interceptors.Builtin() {
		if f.Name != "throughput" && f.Name != "dispatch" && f.Name != "failuredetector" {
			continue
		}
		l, err := f.New(channel.NoConfig, channel.Settings{Name: f.Name, Net: noNet{}})
		if err != nil {
			b.Fatal(err)
		}
		layers = append(layers, l)
	}
	e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: layers, Discard: true})
	to := []channel.Member{channeltest.Member(1)}
	ctx := context.Background()
	for _, size := range []int{128, 1024, 10240} {
		body := make([]byte, size)
		send := func(o channel.Options) func(*testing.B) {
			return func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := e.Send(ctx, to, body, o); err != nil {
						b.Fatal(err)
					}
				}
			}
		}
		b.Run(fmt.Sprintf("throughput+dispatch+failuredetector/send/%d", size), send(channel.SendAck))
		b.Run(fmt.Sprintf("throughput+dispatch+failuredetector/async/%d", size), send(channel.SendAsync))
		b.Run(fmt.Sprintf("throughput+dispatch+failuredetector/receive/%d", size), func(b *testing.B) {
			b.ReportAllocs()
			m := channel.Message{From: to[0], Options: channel.SendNone, Body: body}
			for b.Loop() {
				if err := e.Receive(ctx, &m); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("throughput+dispatch+failuredetector/receive-sync/%d", size), func(b *testing.B) {
			b.ReportAllocs()
			m := channel.Message{From: to[0], Options: channel.SendSyncAck, Body: body}
			for b.Loop() {
				m.ID = channel.NewUniqueID()
				if err := e.Receive(ctx, &m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
