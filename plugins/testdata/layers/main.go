// Command layers is a program with interceptors for tests: a good one, and some
// that misbehave once a message tells them to.
package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/sdk"
)

// Flag marks reversed bodies.
const Flag channel.Options = 0x20000

// Config is the configuration of all.
type Config struct {
	Min int `yaml:"min" default:"3" validate:"min=1" doc:"shorter bodies are left alone"`
}

func reverse(c Config, _ channel.Settings) (channel.Interceptor, error) {
	return channel.Transform(channel.Descriptor{Name: "acme/reverse", Flag: Flag, Mutates: true, Wants: []string{"dispatch"}, Promise: "turns bodies round"},
		func(m *channel.Message) error {
			if len(m.Body) >= c.Min {
				slices.Reverse(m.Body)
				m.Options |= Flag
			}
			return nil
		},
		func(m *channel.Message) error {
			if m.Options.Has(Flag) {
				slices.Reverse(m.Body)
				m.Options &^= Flag
			}
			return nil
		}), nil
}

// hostile misbehaves when a message says "now".
type hostile struct {
	name string
	act  func(ctx context.Context, l channel.Link, m *channel.Message) error
}

func (h *hostile) Descriptor() channel.Descriptor {
	d := channel.Descriptor{Name: h.name}
	if h.name == "acme/liar" && os.Args[1] != "describe" {
		d.Mutates, d.Flag = true, Flag
	}
	return d
}

func (h *hostile) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if string(m.Body) == "now" {
		return h.act(ctx, l, m)
	}
	return l.Send(ctx, m)
}

func (h *hostile) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	return l.Deliver(ctx, m)
}

func bad(name string, act func(ctx context.Context, l channel.Link, m *channel.Message) error) sdk.Component {
	return sdk.Interceptor(name, "1.0.0", func(Config, channel.Settings) (channel.Interceptor, error) { return &hostile{name, act}, nil })
}

// hog keeps what it allocates.
var hog [][]byte

func main() {
	sdk.Main(
		sdk.Interceptor("acme/reverse", "1.2.3", reverse),
		bad("acme/liar", func(ctx context.Context, l channel.Link, m *channel.Message) error { return l.Send(ctx, m) }),
		bad("acme/crasher", func(context.Context, channel.Link, *channel.Message) error { panic("crasher: by design") }),
		bad("acme/exiter", func(context.Context, channel.Link, *channel.Message) error { os.Exit(3); return nil }),
		bad("acme/sleeper", func(context.Context, channel.Link, *channel.Message) error { time.Sleep(time.Hour); return nil }),
		bad("acme/hog", func(ctx context.Context, l channel.Link, m *channel.Message) error {
			for range 256 { // 256 MiB, touched
				b := make([]byte, 1<<20)
				for n := 0; n < len(b); n += 4096 {
					b[n] = 1
				}
				hog = append(hog, b)
			}
			return l.Send(ctx, m)
		}),
		bad("acme/members", func(ctx context.Context, l channel.Link, _ *channel.Message) error {
			for n := 0; ; n++ { // an endless stream of members
				member := channel.Member{ID: channel.NewUniqueID(), Host: netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), Port: 1}
				if err := l.Announce(ctx, channel.MemberEvent{Kind: channel.MemberAdded, Member: member}); err != nil {
					return err
				}
			}
		}),
		bad("acme/repeater", func(_ context.Context, l channel.Link, m *channel.Message) error {
			for n := 0; ; n++ { // an endless stream of messages, not waited for
				c := *m
				c.To, c.Body, c.Done = slices.Clone(m.To), fmt.Append(nil, n), nobody{}
				if err := l.Send(context.Background(), &c); err != nil {
					return err
				}
			}
		}),
	)
}

type nobody struct{}

func (nobody) Complete(*channel.Message, error) {}
