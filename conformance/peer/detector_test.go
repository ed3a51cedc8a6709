package peer_test

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// A Tribes node whose heartbeats stop is kept while it answers our check, and
// removed when it does not.
func testWeCheck(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	g.drop = time.Second
	a := g.longhouse(func(c *nodeConfig) {
		c.stack = []string{"failuredetector {connect_timeout: 10s, read_timeout: 10s, read_test: always}"}
	})
	b := g.tribes(func(c *peer.Config) { c.Stack = []string{"detector"}; c.DropTime = patience })
	together(t, []*longhouse{a}, []*peer.Node{b})
	if _, err := b.Call(within(t), "stop", "level", fmt.Sprint(peer.LevelMembershipSend)); err != nil {
		t.Fatal(err)
	}
	poll(t, j, "the removal is refused twice", func() bool {
		return a.counter("failuredetector_vetoed_total") >= 1 && a.counter("failuredetector_answered_total") >= 3
	})
	a.sees(b.ID())
	if err := a.Send(within(t), a.View().Members, []byte("still there"), channel.SendSyncAck); err != nil {
		t.Error(err)
	}
	once(t, b, "still there")
	if n := len(b.Events("message")); n != 1 {
		t.Errorf("the Tribes node's application got %d messages, our checks among them", n)
	}
	if _, err := b.Call(within(t), "stop", "level", fmt.Sprint(peer.LevelReceiver)); err != nil {
		t.Fatal(err)
	}
	a.sees()
}

// The same the other way round.
func testTheyCheck(t *testing.T, j *peer.JVM) {
	for _, read := range []bool{false, true} {
		t.Run(fmt.Sprintf("read=%v", read), func(t *testing.T) {
			g := newGroup(t, j)
			var pulse *beacon
			a := g.longhouse(func(c *nodeConfig) {
				c.membership = func(channel.Settings) (channel.Membership, error) {
					pulse = &beacon{group: fmt.Sprintf("%s:%d", g.address, g.port)}
					return pulse, nil
				}
			})
			b := g.tribes(func(c *peer.Config) {
				c.Stack = []string{fmt.Sprintf("detector:read=%v", read)}
				c.DropTime = time.Second
			})
			seen(t, b, a.id())
			pulse.mute.Store(true)
			asked := a.counter("failuredetector_probes_received_total")
			poll(t, j, "a check by the Tribes node", func() bool { return a.counter("failuredetector_probes_received_total") > asked })
			told := func(text string) func() bool {
				return func() bool {
					return slices.ContainsFunc(j.Events(), func(e peer.Event) bool {
						return strings.Contains(e.Values.Get("text"), text) && strings.Contains(e.Values.Get("text"), fmt.Sprintf(":%d,", a.Local().Port)) ||
							strings.Contains(e.Values.Get("text"), text) && strings.Contains(e.Values.Get("text"), fmt.Sprintf(":%d]", a.Local().Port))
					})
				}
			}
			poll(t, j, "the Tribes node finds us alive", told("still alive"))
			seen(t, b, a.id())
			if n := len(a.got.Messages()); n != 0 {
				t.Errorf("our application got %d messages, their checks among them", n)
			}
			a.stop()
			seen(t, b)
		})
	}
}

// beacon is a membership that only says where we are, until it is mute, and
// says no goodbye.
type beacon struct {
	group string
	mute  atomic.Bool
	end   context.CancelFunc
	work  sync.WaitGroup
}

func (b *beacon) Start(_ context.Context, local channel.Member, _ []channel.Member, _ channel.MemberSink) error {
	to, err := net.ResolveUDPAddr("udp4", b.group)
	if err != nil {
		return err
	}
	conn, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}, to)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	b.end = cancel
	began := time.Now()
	b.work.Go(func() {
		defer conn.Close()
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			local.Alive = time.Since(began)
			if !b.mute.Load() {
				_, _ = conn.Write(wire.AppendMember(nil, local))
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
	return nil
}

func (b *beacon) Update(context.Context, channel.Member) error { return nil }

func (b *beacon) Stop(context.Context) error {
	if b.end != nil {
		b.end()
	}
	b.work.Wait()
	return nil
}
