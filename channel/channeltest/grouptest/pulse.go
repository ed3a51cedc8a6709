package grouptest

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/membership"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// Stacked is a channel with layers on a simulated node. It finds the others by
// multicast on the simulated network: members come, are cut off and are lost as
// the network lets them.
type Stacked struct {
	*channel.Channel
	Sim     *channeltest.SimNode
	Got     *channeltest.Recorder
	Metrics *channel.Metrics
}

// Stack starts a channel with these layers, the nearest to the application
// first.
func Stack(t testing.TB, name string, sim *channeltest.SimNode, layers func(channel.Settings) ([]channel.Interceptor, error)) *Stacked {
	t.Helper()
	n := &Stacked{Sim: sim, Got: new(channeltest.Recorder), Metrics: channel.NewMetrics()}
	s := channel.Settings{Net: sim, Metrics: n.Metrics}
	list, err := layers(s)
	if err != nil {
		t.Fatal(err)
	}
	var all []channel.Layer
	for _, i := range list {
		all = append(all, channel.Layer{Interceptor: i})
	}
	stack, err := channel.NewStack(all...)
	if err != nil {
		t.Fatal(err)
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = sim.IP()
	n.Channel, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Name: name, Pipelined: true},
		Stack:        stack,
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(rc, s),
		Membership:   &pulse{net: sim},
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	n.Listen(n.Got)
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// Within waits until cond holds, and fails the test if it does not in time.
func Within(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	for start := time.Now(); !cond(); time.Sleep(50 * time.Millisecond) {
		if time.Since(start) > limit {
			t.Fatalf("%s: not after %v", what, limit)
		}
	}
}

// pulse is a small multicast membership: a member record every half second.
type pulse struct {
	net  transport.Net
	last func() channel.Member
	conn transport.UDPConn
	stop context.CancelFunc
	wg   sync.WaitGroup
}

var pulseGroup = netip.MustParseAddrPort("228.0.0.4:45564")

// Start implements channel.Membership.
func (p *pulse) Start(_ context.Context, local channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	conn, err := channel.ListenMulticast(p.net, channel.MulticastConfig{Group: pulseGroup})
	if err != nil {
		return err
	}
	p.conn = conn
	began := time.Now()
	p.last = func() channel.Member { local.Alive = time.Since(began); return local }
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	table := membership.New(membership.Config{}, local)
	heard := make(chan channel.Member)
	p.wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if m, _, err := wire.DecodeMember(buf[:n]); err == nil {
				select {
				case heard <- m:
				case <-ctx.Done():
					return
				}
			}
		}
	})
	p.wg.Go(func() {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			var evs []channel.MemberEvent
			select {
			case m := <-heard:
				evs, _ = table.Heard(nil, m, time.Now())
			case now := <-tick.C:
				evs = table.Expire(nil, now)
				_, _ = conn.WriteTo(wire.AppendMember(nil, p.last()), net.UDPAddrFromAddrPort(pulseGroup))
			case <-ctx.Done():
				return
			}
			for _, ev := range evs {
				sink.Observe(ev)
			}
		}
	})
	return nil
}

// Update implements channel.Membership.
func (p *pulse) Update(context.Context, channel.Member) error { return nil }

// Stop implements channel.Membership.
func (p *pulse) Stop(context.Context) error {
	if p.conn == nil {
		return nil
	}
	p.stop()
	m := p.last()
	m.Command = channel.ShutdownCommand
	_, _ = p.conn.WriteTo(wire.AppendMember(nil, m), net.UDPAddrFromAddrPort(pulseGroup))
	err := p.conn.Close()
	p.conn = nil
	p.wg.Wait()
	return err
}
