package conformance_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/longhouse-go/longhouse/interceptors/encrypt"
)

// wiretap is a layer that notes what goes by it on its way down, as frames.
type wiretap struct {
	mu     sync.Mutex
	frames [][]byte
}

func (w *wiretap) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "wiretap"} }

func (w *wiretap) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	w.mu.Lock()
	w.frames = append(w.frames, wire.AppendFrame(nil, m))
	w.mu.Unlock()
	return l.Send(ctx, m)
}

// TestSimEncryption runs an encrypted group over a network that loses packets,
// and repeats what was on the wire: IC-13 and IC-14 with whole nodes.
func TestSimEncryption(t *testing.T) {
	realTime(t)
	channeltest.Run(t, channeltest.SimConfig{Seed: 9}, func(t *testing.T, nw *channeltest.SimNet) {
		got := map[string]*channeltest.Recorder{}
		start := func(ip string, above ...channel.Interceptor) *simNode {
			c := encrypt.Defaults
			c.Key = secret.New("a key of the simulations")
			x, err := encrypt.New(c, channel.Settings{})
			if err != nil {
				t.Fatal(err)
			}
			n := startSim(t, nw.Node(ip), nil, append([]channel.Interceptor{x}, above...)...)
			got[ip] = new(channeltest.Recorder)
			n.Listen(got[ip])
			return n
		}
		tap := new(wiretap)
		group := []*simNode{start("10.0.0.1", tap), start("10.0.0.2"), start("10.0.0.3")}
		converge(t, group, 10*time.Second)
		for _, a := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"} {
			for _, b := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"} {
				nw.SetLink(a, b, channeltest.LinkPolicy{Loss: 0.1, Jitter: 5 * time.Millisecond})
			}
		}
		const each = 300
		var late atomic.Int64 // packets of one message were lost again and again
		var wg sync.WaitGroup
		for _, o := range []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck} {
			wg.Go(func() {
				for range each {
					if err := group[0].Send(t.Context(), group[0].View().Members, []byte("a clear text"), o); errors.Is(err, channel.ErrAckTimeout) {
						late.Add(1)
					} else if err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if late.Load() > each/20 {
			t.Errorf("%d messages were not acknowledged in time", late.Load())
		}
		time.Sleep(10 * time.Second)
		for _, ip := range []string{"10.0.0.2", "10.0.0.3"} {
			if n := len(got[ip].Messages()); n > 3*each || n < 3*each-int(late.Load()) {
				t.Errorf("%s got %d messages of %d, %d of them late", ip, n, 3*each, late.Load())
			}
		}
		nw.ResetLinks()
		tap.mu.Lock()
		frames := tap.frames
		tap.mu.Unlock()
		for _, f := range frames {
			if strings.Contains(string(f), "clear text") {
				t.Fatal("the clear text is on the wire")
			}
		}
		repeat := func(when string) {
			before := len(got["10.0.0.2"].Messages())
			to := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), uint16(group[1].Local().Port))
			var c net.Conn
			var err error
			if c, err = channel.Dial(t.Context(), nw.Node("10.0.0.66"), to); err != nil {
				t.Fatal(err)
			}
			for _, f := range frames {
				if _, err := c.Write(f); err != nil {
					t.Fatalf("%s: %v", when, err)
				}
			}
			time.Sleep(10 * time.Second)
			c.Close()
			if n := len(got["10.0.0.2"].Messages()) - before; n > 0 {
				t.Errorf("%s: %d messages were delivered again", when, n)
			}
		}
		repeat("to the running node")
		time.Sleep(time.Hour)
		repeat("an hour later")
		stopGroup(t, group[1:2])
		group[1] = start("10.0.0.2")
		converge(t, group, 10*time.Second)
		repeat("after a restart")
		if err := group[0].Send(t.Context(), group[0].View().Members, []byte("x"), channel.SendSyncAck); err != nil {
			t.Errorf("after all that: %v", err)
		}
		stopGroup(t, group)
	})
}
