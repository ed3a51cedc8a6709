package udp_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pion/transport/v2"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/udp"
	"github.com/longhouse-go/longhouse/channel/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is a channel with datagrams.
type node struct {
	*channel.Channel
	metrics *channel.Metrics
}

// members is a membership that is told who is there.
type members struct{ sink channel.MemberSink }

func (m *members) Start(_ context.Context, _ channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	m.sink = sink
	return nil
}
func (m *members) Update(context.Context, channel.Member) error { return nil }
func (m *members) Stop(context.Context) error                   { return nil }

type handler func(ctx context.Context, m *channel.Message) error

func start(t testing.TB, n transport.Net, host string, group netip.AddrPort, h handler, change ...func(*udp.Config)) *node {
	t.Helper()
	met := channel.NewMetrics()
	s := channel.Settings{Name: host, Net: n, Metrics: met}
	c := udp.DefaultConfig()
	c.Port, c.AutoBind = 20000, 20000
	c.Multicast = channel.MulticastConfig{Group: group, Bind: netip.MustParseAddr(host)}
	for _, f := range change {
		f(&c)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	d := udp.New(c, s)
	rc := tcp.DefaultReceiverConfig()
	rc.Address, rc.Port = host, 0
	ch, err := channel.New(channel.Config{
		Announcement: channel.Announcement{Name: host, Pipelined: true},
		Sender:       d.Sender(tcp.NewSender(tcp.DefaultSenderConfig(), s)),
		Receiver:     d.Receiver(tcp.NewReceiver(rc, s)),
		Membership:   &members{},
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	ch.Listen(channel.ListenerFunc(func(ctx context.Context, m *channel.Message) (bool, error) { return true, h(ctx, m) }))
	if err := ch.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := ch.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	return &node{ch, met}
}

func nothing(context.Context, *channel.Message) error { return nil }

func (n *node) value(name string, labels ...string) int {
	for _, s := range n.metrics.Samples() {
		if s.Name == name && slices.Equal(s.Labels, labels) {
			return int(s.Value)
		}
	}
	return -1
}

func realNet(t testing.TB) transport.Net {
	t.Helper()
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// groupFor returns a group with a port that is free just now.
func groupFor(t *testing.T) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return netip.AddrPortFrom(netip.MustParseAddr("228.0.0.77"), c.LocalAddr().(*net.UDPAddr).AddrPort().Port())
}

func both(t *testing.T, f func(t *testing.T, a, b transport.Net, hostA, hostB string, group netip.AddrPort)) {
	t.Run("loopback", func(t *testing.T) {
		n := realNet(t)
		f(t, n, n, "127.0.0.1", "127.0.0.1", groupFor(t))
	})
	t.Run("sim", func(t *testing.T) {
		channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
			n := nw.Nodes(2)
			f(t, n[0], n[1], n[0].IP(), n[1].IP(), netip.MustParseAddrPort("228.0.0.4:45564"))
		})
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 6000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never happened: %s", what)
}

// sealed is a body with a checksum.
func sealed(n, size int) []byte {
	b := make([]byte, max(size, 8))
	for i := range b {
		b[i] = byte(n + i)
	}
	binary.BigEndian.PutUint32(b, uint32(n))
	binary.BigEndian.PutUint32(b[4:], crc32.ChecksumIEEE(b[8:]))
	return b
}

func unsealed(b []byte) (n int, ok bool) {
	return int(binary.BigEndian.Uint32(b)), crc32.ChecksumIEEE(b[8:]) == binary.BigEndian.Uint32(b[4:])
}

// All messages arrive once and uncorrupted, from many goroutines, over each
// transport and with each option.
func TestDataIntegrity(t *testing.T) {
	const senders, each = 5, 40
	for way, bit := range map[string]channel.Options{"tcp": 0, "udp": channel.UDP, "multicast": channel.Multicast} {
		for option, o := range map[string]channel.Options{"none": channel.SendNone, "async": channel.SendAsync, "ack": channel.SendAck, "sync-ack": channel.SendSyncAck} {
			t.Run(way+"/"+option, func(t *testing.T) {
				both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string, group netip.AddrPort) {
					var mu sync.Mutex
					seen := map[int]int{}
					b := start(t, bn, hostB, group, func(_ context.Context, m *channel.Message) error {
						n, ok := unsealed(m.Body)
						mu.Lock()
						defer mu.Unlock()
						if seen[n]++; !ok {
							t.Errorf("message %d is corrupt", n)
						}
						return nil
					})
					a := start(t, an, hostA, group, func(context.Context, *channel.Message) error {
						t.Error("the sender received its own message")
						return nil
					})
					var wg sync.WaitGroup
					for s := range senders {
						wg.Go(func() {
							for i := range each {
								n := s*each + i
								err := a.Send(t.Context(), []channel.Member{b.Local()}, sealed(n, 100+n*10), o|bit)
								if err != nil {
									t.Errorf("message %d: %v", n, err)
								}
							}
						})
					}
					wg.Wait()
					eventually(t, "all arrived", func() bool {
						mu.Lock()
						defer mu.Unlock()
						return len(seen) == senders*each
					})
					for n, times := range seen {
						if times != 1 {
							t.Errorf("message %d arrived %d times", n, times)
						}
					}
				})
			})
		}
	}
}

// A failing listener is an error of exactly the failing messages, and they are
// delivered once.
func TestRemoteProcessException(t *testing.T) {
	for way, bit := range map[string]channel.Options{"tcp": 0, "udp": channel.UDP} {
		t.Run(way, func(t *testing.T) {
			both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string, group netip.AddrPort) {
				var calls atomic.Int64
				b := start(t, bn, hostB, group, func(_ context.Context, m *channel.Message) error {
					calls.Add(1)
					if n, _ := unsealed(m.Body); n%3 == 0 {
						return errors.New("no")
					}
					return nil
				})
				a := start(t, an, hostA, group, nothing)
				for n := range 60 {
					err := a.Send(t.Context(), []channel.Member{b.Local()}, sealed(n, 50), channel.SendSyncAck|bit)
					if (n%3 == 0) != errors.Is(err, channel.ErrNegativeAck) || n%3 != 0 && err != nil {
						t.Errorf("message %d: %v", n, err)
					}
				}
				if calls.Load() != 60 {
					t.Errorf("%d deliveries of 60 messages", calls.Load())
				}
			})
		})
	}
}

// Whatever comes as a datagram is counted under its reason and ends nothing.
func TestHostileDatagrams(t *testing.T) {
	good := func() []byte {
		return wire.AppendFrame(nil, &channel.Message{
			ID: channel.NewUniqueID(), Options: channel.SendNone, Body: []byte("good"),
			From: channel.Member{ID: channel.NewUniqueID(), Host: netip.MustParseAddr("192.0.2.1"), Port: 1, SecurePort: -1, UDPPort: -1},
		})
	}
	f := good()
	with := func(at int, v uint32) []byte {
		b := slices.Clone(f)
		binary.BigEndian.PutUint32(b[at:], v)
		return b
	}
	for _, c := range []struct {
		name, reason string
		in           []byte
		delivered    int
	}{
		{"empty", "empty", []byte{}, 0},
		{"noise", "frame_marker", []byte("\x16\x03\x01 hello"), 0},
		{"half a frame", "truncated", f[:len(f)/2], 0},
		{"one byte", "truncated", f[:1], 0},
		{"length 0", "frame_length", with(7, 0), 0},
		{"length -1", "frame_length", with(7, 1<<32-1), 0},
		{"length 2 GiB", "truncated", with(7, 1<<31-1), 0},
		{"wrong trailer", "frame_end", append(f[:len(f)-1:len(f)-1], 'x'), 0},
		{"id length", "message_id", with(23, 1<<31-1), 0},
		{"an acknowledgement", "unexpected_ack", []byte(wire.Ack), 0},
		{"a frame and noise", "frame_marker", append(good(), "x"...), 1},
		{"a frame and half of another", "truncated", append(good(), f[:20]...), 1},
		{"two frames", "", append(good(), good()...), 2},
		{"the whole 64 KiB", "frame_marker", make([]byte, udp.MaxFrame), 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string, group netip.AddrPort) {
				var got atomic.Int64
				b := start(t, bn, hostB, group, func(context.Context, *channel.Message) error { got.Add(1); return nil })
				s, err := channel.ListenUDP(an, netip.MustParseAddrPort(netip.AddrPortFrom(netip.MustParseAddr(hostA), 0).String()))
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				to := &net.UDPAddr{IP: net.ParseIP(hostB), Port: b.Local().UDPPort}
				for range 3 {
					if _, err := s.WriteTo(c.in, to); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := s.WriteTo(good(), to); err != nil {
					t.Fatal(err)
				}
				want := int64(3*c.delivered + 1)
				eventually(t, "the good one arrived", func() bool { return got.Load() >= want })
				if got.Load() != want {
					t.Errorf("%d messages, want %d", got.Load(), want)
				}
				for _, x := range b.metrics.Samples() {
					if x.Name == "channel_udp_refused_total" && (x.Value == 3) != (x.Labels[1] == c.reason) || x.Value != 0 && x.Value != 3 && x.Name == "channel_udp_refused_total" {
						t.Errorf("%v: %v", x.Labels, x.Value)
					}
				}
			})
		})
	}
}

// Datagrams to the group that are no messages are the membership's.
func TestGroupNoise(t *testing.T) {
	both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string, group netip.AddrPort) {
		var got atomic.Int64
		b := start(t, bn, hostB, group, func(context.Context, *channel.Message) error { got.Add(1); return nil })
		a := start(t, an, hostA, group, nothing)
		s, err := channel.ListenMulticast(an, channel.MulticastConfig{Group: group, Bind: netip.MustParseAddr(hostA)})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for _, in := range [][]byte{wire.AppendMember(nil, a.Local()), []byte("x"), []byte("FLT2002\x00\x00\x00\x00"), []byte("FLT2002"), []byte("LH something")} {
			if _, err := s.WriteTo(in, net.UDPAddrFromAddrPort(group)); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.Send(t.Context(), []channel.Member{b.Local()}, []byte("x"), channel.SendNone|channel.Multicast); err != nil {
			t.Fatal(err)
		}
		eventually(t, "arrival", func() bool { return got.Load() == 1 })
		if n, m := b.value("channel_udp_refused_total", "reason", "frame_length"), b.value("channel_udp_refused_total", "reason", "truncated"); n != 1 || m != 1 {
			t.Errorf("refused %d and %d, want one each", n, m)
		}
		if n := b.value("channel_udp_refused_total", "reason", "frame_marker"); n != 0 {
			t.Errorf("%d heartbeats counted as malformed", n)
		}
	})
}

// Loss, doubling and overtaking: what is acknowledged has arrived, and once.
func TestLossyDatagrams(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 7, Link: channeltest.LinkPolicy{Latency: time.Millisecond, Jitter: 20 * time.Millisecond, Loss: 0.3}}, func(t *testing.T, nw *channeltest.SimNet) {
		n := nw.Nodes(2)
		var mu sync.Mutex
		seen := map[string]int{}
		group := netip.AddrPort{}
		b := start(t, n[1], n[1].IP(), group, func(_ context.Context, m *channel.Message) error {
			mu.Lock()
			defer mu.Unlock()
			seen[string(m.Body)]++
			return nil
		})
		a := start(t, n[0], n[0].IP(), group, nothing)
		ok := 0
		for i := range 300 {
			body := fmt.Sprint(i)
			err := a.Send(t.Context(), []channel.Member{b.Local()}, []byte(body), channel.SendSyncAck|channel.UDP)
			mu.Lock()
			times := seen[body]
			mu.Unlock()
			if err == nil {
				ok++
			}
			if err == nil && times != 1 || times > 1 {
				t.Errorf("message %d: %v, delivered %d times", i, err, times)
			}
		}
		if ok < 295 {
			t.Errorf("only %d of 300 came through a loss of 30 %%", ok)
		}
		if a.value("channel_udp_resends_total") == 0 {
			t.Error("nothing was sent again")
		}
	})
}

// Nobody answers, the wrong one answers, the answer comes late: one error, in
// time, and never that of another message.
func TestAnswers(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		n := nw.Nodes(3)
		a := start(t, n[0], n[0].IP(), netip.AddrPort{}, nothing)
		peer, err := channel.ListenUDP(n[1], netip.AddrPortFrom(netip.MustParseAddr(n[1].IP()), 7000))
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		stranger, err := channel.ListenUDP(n[2], netip.AddrPortFrom(netip.MustParseAddr(n[2].IP()), 7000))
		if err != nil {
			t.Fatal(err)
		}
		defer stranger.Close()
		to := channel.Member{ID: channel.NewUniqueID(), Host: netip.MustParseAddr(n[1].IP()), Port: 1, SecurePort: -1, UDPPort: 7000}
		mode := make(chan string, 1)
		go func() { // ends when the socket is closed
			var b [2048]byte
			for what := ""; ; {
				k, from, err := peer.ReadFrom(b[:])
				if err != nil {
					return
				}
				select {
				case what = <-mode:
				default:
				}
				switch what {
				case "silence":
				case "stranger":
					_, _ = stranger.WriteTo([]byte(wire.Ack), from)
				case "late":
					time.AfterFunc(4*time.Second, func() { _, _ = peer.WriteTo([]byte(wire.Ack), from) })
				case "noise":
					_, _ = peer.WriteTo(b[:k], from)
				case "twice":
					_, _ = peer.WriteTo([]byte(wire.Ack), from)
					_, _ = peer.WriteTo([]byte(wire.Ack), from)
				case "negative":
					_, _ = peer.WriteTo([]byte(wire.NegativeAck), from)
				}
			}
		}()
		for _, c := range []struct {
			mode string
			want error
		}{
			{"silence", channel.ErrAckTimeout}, {"stranger", channel.ErrAckTimeout}, {"late", channel.ErrAckTimeout}, {"noise", channel.ErrAckTimeout},
			{"twice", nil}, {"silence", channel.ErrAckTimeout}, {"negative", channel.ErrNegativeAck},
		} {
			mode <- c.mode
			begin := time.Now()
			err := a.Send(t.Context(), []channel.Member{to}, []byte("x"), channel.SendAck|channel.UDP)
			if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Errorf("%s: got %v", c.mode, err)
			}
			if d := time.Since(begin); d > 3500*time.Millisecond {
				t.Errorf("%s: it took %v", c.mode, d)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		mode <- "silence"
		if err := a.Send(ctx, []channel.Member{to}, []byte("x"), channel.SendAck|channel.UDP); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with a context: %v", err)
		}
		if a.value("channel_udp_unexpected_total") < 4 {
			t.Error("answers of others were not counted")
		}
		time.Sleep(10 * time.Second) // what is late
	})
}

// Many at once: every member is waited for at the same time, faults are named.
func TestSeveralMembers(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		n := nw.Nodes(4)
		a := start(t, n[0], n[0].IP(), netip.AddrPort{}, nothing)
		b := start(t, n[1], n[1].IP(), netip.AddrPort{}, nothing)
		none := start(t, n[2], n[2].IP(), netip.AddrPort{}, nothing, func(c *udp.Config) { c.Port = 0 })
		c := start(t, n[3], n[3].IP(), netip.AddrPort{}, nothing)
		gone := c.Local()
		gone.UDPPort++
		begin := time.Now()
		err := a.Send(t.Context(), []channel.Member{b.Local(), none.Local(), gone, c.Local()}, []byte("x"), channel.SendSyncAck|channel.UDP)
		var se *channel.SendError
		if !errors.As(err, &se) || len(se.Faults) != 2 || !errors.Is(err, channel.ErrNotMember) || !errors.Is(err, channel.ErrAckTimeout) {
			t.Errorf("got %v", err)
		}
		if d := time.Since(begin); d > 3500*time.Millisecond {
			t.Errorf("it took %v", d)
		}
	})
}

func TestTooLarge(t *testing.T) {
	both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string, group netip.AddrPort) {
		size := make(chan int, 10)
		b := start(t, bn, hostB, group, func(_ context.Context, m *channel.Message) error { size <- len(m.Body); return nil })
		a := start(t, an, hostA, group, nothing)
		largest := udp.MaxFrame - wire.FrameSize(&channel.Message{From: a.Local()})
		for _, o := range []channel.Options{channel.UDP, channel.UDP | channel.SendSyncAck, channel.Multicast} {
			if err := a.Send(t.Context(), []channel.Member{b.Local()}, make([]byte, largest+1), o); !errors.Is(err, channel.ErrTooLarge) {
				t.Errorf("%v: got %v", o, err)
			}
			if err := a.Send(t.Context(), []channel.Member{b.Local()}, make([]byte, largest), o); err != nil {
				t.Errorf("%v: the largest: %v", o, err)
			}
			if n := <-size; n != largest {
				t.Errorf("%d bytes arrived", n)
			}
		}
	})
}

// A message to a group that is not configured, or after the end, fails in words.
func TestNotConfigured(t *testing.T) {
	n := realNet(t)
	a := start(t, n, "127.0.0.1", netip.AddrPort{}, nothing)
	to := []channel.Member{a.Local()}
	if err := a.Send(t.Context(), to, nil, channel.Multicast); !errors.Is(err, channel.ErrNotConfigured) {
		t.Errorf("got %v", err)
	}
	if err := a.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Send(t.Context(), to, nil, channel.UDP); !errors.Is(err, channel.ErrClosed) {
		t.Errorf("got %v", err)
	}
	bad := udp.Config{Port: -1, Multicast: channel.MulticastConfig{Group: netip.MustParseAddrPort("10.0.0.1:1")}}
	for _, want := range []string{"port", "auto_bind", "multicast", "max_waiting", "ack_timeout"} {
		if err := bad.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}

// A deferred message is acknowledged by its end; the completion is told once.
func TestDeferredDatagrams(t *testing.T) {
	both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string, group netip.AddrPort) {
		b := start(t, bn, hostB, group, func(_ context.Context, m *channel.Message) error {
			end := m.Defer()
			var err error
			if m.Body[0] == 'n' {
				err = errors.New("no")
			}
			time.AfterFunc(20*time.Millisecond, func() { end(err) })
			return nil
		})
		a := start(t, an, hostA, group, nothing)
		told := make(chan error, 10)
		for _, body := range []string{"yes", "no"} {
			err := a.SendDone(t.Context(), []channel.Member{b.Local()}, []byte(body), channel.SendSyncAck|channel.UDP, done(told))
			if err != nil {
				t.Fatal(err)
			}
			if err := <-told; (body == "no") != errors.Is(err, channel.ErrNegativeAck) || body == "yes" && err != nil {
				t.Errorf("%s: %v", body, err)
			}
		}
	})
}

type done chan error

func (d done) Complete(_ *channel.Message, err error) { d <- err }

func BenchmarkDatagrams(b *testing.B) {
	for name, o := range map[string]channel.Options{"none": channel.UDP, "ack": channel.UDP | channel.SendAck} {
		b.Run(name, func(b *testing.B) {
			n := realNet(b)
			to := start(b, n, "127.0.0.1", netip.AddrPort{}, nothing)
			from := start(b, n, "127.0.0.1", netip.AddrPort{}, nothing)
			body, members := make([]byte, 1024), []channel.Member{to.Local()}
			b.ReportAllocs()
			for b.Loop() {
				if err := from.Send(context.Background(), members, body, o); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
