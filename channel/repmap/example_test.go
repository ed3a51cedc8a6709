package repmap_test

import (
	"context"
	"fmt"
	"log"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/repmap"
)

// README: repmap

// Cart is a value that the members share.
type Cart struct{ Books, Total int }

// order writes and reads a cart in a map that every member has under that name.
func order(ctx context.Context, ch *channel.Channel) error {
	c := repmap.DefaultConfig()
	c.Lazy = true // two copies; the others know where they are
	carts, err := repmap.New[string, Cart](ch, "carts", c, channel.Settings{})
	if err != nil {
		return err
	}
	defer carts.Close(context.WithoutCancel(ctx))
	defer carts.Watch(func(c repmap.Change[string, Cart]) { /* any member's changes, in order */ })()
	if err := carts.Start(ctx); err != nil {
		return err
	}
	<-carts.Ready() // the entries of the others have come
	if err := carts.Put(ctx, "1234", Cart{Books: 2, Total: 40}); err != nil {
		return err
	}
	cart, found, err := carts.Get(ctx, "1234")
	fmt.Println(cart, found)
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
	if err := order(ctx, e.Channel); err != nil {
		log.Fatal(err)
	}
	// Output: {2 40} true
}
