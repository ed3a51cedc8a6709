package channel_test

import (
	"context"
	"fmt"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// A layer that changes bodies is two functions. The stack alone passes messages
// on, so what cannot be decoded is not delivered.
func ExampleTransform() {
	const flag = channel.ThirdPartyMin
	reverse := func(b []byte) {
		for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
			b[i], b[j] = b[j], b[i]
		}
	}
	layer := channel.Transform(
		channel.Descriptor{Name: "acme/mirror", Flag: flag, Mutates: true, Promise: "writes bodies backwards"},
		func(m *channel.Message) error {
			reverse(m.Body)
			m.Options |= flag
			return nil
		},
		func(m *channel.Message) error {
			if !m.Options.Has(flag) {
				return fmt.Errorf("acme/mirror: %w: not marked", channel.ErrBadMessage)
			}
			reverse(m.Body)
			return nil
		})

	// Try it without a network.
	ctx := context.Background()
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{Layers: []channel.Interceptor{layer}})
	if err != nil {
		panic(err)
	}
	if err := e.Start(ctx); err != nil {
		panic(err)
	}
	defer e.Stop(ctx)
	peer := channeltest.Member(1)
	fmt.Println("send:", e.Send(ctx, []channel.Member{peer}, []byte("hello"), channel.SendAck))
	fmt.Println("on the wire:", e.Bottom.Bodies())
	fmt.Println("receive:", e.ReceiveBody(peer, flag, "dlrow"))
	fmt.Println("receive:", e.ReceiveBody(peer, 0, "plain"))
	fmt.Println("delivered:", e.Top.Bodies())
	// Output:
	// send: <nil>
	// on the wire: [olleh]
	// receive: <nil>
	// receive: channel: acme/mirror: decode: acme/mirror: channel: malformed message: not marked
	// delivered: [world]
}
