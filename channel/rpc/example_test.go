package rpc_test

import (
	"context"
	"fmt"
	"log"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/rpc"
)

// README: rpc

// ask asks all members for something, and itself answers the others.
func ask(ctx context.Context, ch *channel.Channel, question string) error {
	answer := func(_ context.Context, from channel.Member, b rpc.Body) (rpc.Body, error) {
		return rpc.Bytes([]byte(strings.ToUpper(string(b.Bytes)))), nil
	}
	r, err := rpc.New(ch, "shout", answer, rpc.DefaultConfig(), channel.Settings{})
	if err != nil {
		return err
	}
	defer r.Close(context.WithoutCancel(ctx))
	everybody := append([]channel.Member{ch.Local()}, ch.View().Members...)
	replies, err := r.Call(ctx, everybody, rpc.Bytes([]byte(question)), rpc.All, channel.SendNone)
	for _, p := range replies {
		if p.Err == nil {
			fmt.Printf("%s\n", p.Body.Bytes)
		}
	}
	return err
}

// README: end

func Example() {
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{})
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	if err := e.Start(ctx); err != nil {
		log.Fatal(err)
	}
	defer e.Stop(ctx)
	if err := ask(ctx, e.Channel, "hello"); err != nil {
		log.Fatal(err)
	}
	// Output: HELLO
}
