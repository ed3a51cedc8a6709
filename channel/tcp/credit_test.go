package tcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// credited makes both ends of a connection understand credit.
func credited(from *source, to *node) {
	var a channel.Announcement
	a.Pipelined = true
	from.Describe(&from.member, &a)
	from.member.Payload = a.Encode()
	b := channel.Announcement{Pipelined: true}
	to.Describe(&to.member, &b)
	to.member.Payload = b.Encode()
}

// A receiver that needs much longer than the ack timeout for what is on its way
// gets no more than its window, and nothing fails: it goes on, after all.
func TestSlowReceiverIsNotOverrun(t *testing.T) {
	const window, size, count = 32 << 10, 1000, 300
	for name, o := range map[string]channel.Options{"none": channel.SendNone, "ack": channel.SendAck, "sync-ack": channel.SendSyncAck} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
				var handled, most atomic.Int64
				var from *source
				to := receive(t, b, b.IP(), true, func(context.Context, *channel.Message) error {
					onWay := int64(value(from.metrics, "channel_send_bytes_total")) - handled.Load()*size
					most.Store(max(most.Load(), onWay))
					time.Sleep(100 * time.Millisecond)
					handled.Add(1)
					return nil
				}, func(c *ReceiverConfig) { c.WindowBytes = window })
				from = send(t, a, func(c *SenderConfig) { c.AckTimeout = time.Second })
				credited(from, to)
				var wg sync.WaitGroup
				errs := make([]error, count)
				for i := range count { // as many as the window of the sender allows
					wg.Go(func() {
						errs[i] = from.Send(context.Background(), from.message(o, string(make([]byte, size-200)), to.member))
					})
				}
				wg.Wait()
				if err := errors.Join(errs...); err != nil {
					t.Errorf("sending: %v", err)
				}
				eventually(t, "all handled", func() bool { return handled.Load() == count })
				// A batch may be written as long as there is any credit, and
				// the overhead of frames was not counted here.
				if m := most.Load(); m > window+batchBytes+size*count/5 {
					t.Errorf("%d bytes were on their way, the window is %d", m, window)
				}
				if n := value(from.metrics, "channel_send_credit_stalls_total"); n == 0 {
					t.Error("the sender never waited for credit")
				}
				if n := value(from.metrics, "channel_send_timeouts_total"); n != 0 {
					t.Errorf("%d time-outs", n)
				}
			})
		})
	}
}

// What a listener has put off counts until it has ended.
func TestDeferredMessagesKeepTheirCredit(t *testing.T) {
	const window, size, count = 64 << 10, 1000, 1000
	sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
		var mu sync.Mutex
		var ends []func(error)
		to := receive(t, b, b.IP(), true, func(_ context.Context, m *channel.Message) error {
			mu.Lock()
			defer mu.Unlock()
			ends = append(ends, m.Defer())
			return nil
		}, func(c *ReceiverConfig) { c.WindowBytes = window })
		from := send(t, a, func(c *SenderConfig) { c.AckTimeout = time.Minute })
		credited(from, to)
		done := newResults()
		go func() {
			for i := range count {
				m := from.message(channel.SendSyncAck, fmt.Sprintf("%*d", size-200, i), to.member)
				m.Done = done
				if err := from.Send(context.Background(), m); err != nil {
					t.Errorf("message %d: %v", i, err)
				}
			}
		}()
		time.Sleep(10 * time.Second)
		mu.Lock()
		put := len(ends)
		mu.Unlock()
		if put < window/size || put > (window+batchBytes)/(size-200) {
			t.Errorf("%d messages of %d bytes were put off, the window is %d bytes", put, size, window)
		}
		for ended := 0; ended < count; {
			mu.Lock()
			now := ends
			ends = nil
			mu.Unlock()
			for _, end := range now {
				end(nil)
			}
			ended += len(now)
			time.Sleep(10 * time.Millisecond)
		}
		for body, err := range done.wait(t, count) {
			if err != nil {
				t.Fatalf("%s: %v", body, err)
			}
		}
	})
}

// A node that processes nothing any more is not taken for a slow one.
func TestStuckReceiverTimesOut(t *testing.T) {
	sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
		release := make(chan struct{})
		to := receive(t, b, b.IP(), true, func(context.Context, *channel.Message) error {
			<-release
			return nil
		}, func(c *ReceiverConfig) { c.WindowBytes = 4 << 10 })
		defer close(release)
		from := send(t, a)
		credited(from, to)
		begin := time.Now()
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				err := from.Send(context.Background(), from.message(channel.SendSyncAck, string(make([]byte, 1000)), to.member))
				if !errors.Is(err, channel.ErrAckTimeout) && !errors.Is(err, channel.ErrDisconnected) {
					t.Errorf("got %v", err)
				}
			})
		}
		wg.Wait()
		if d := time.Since(begin); d > 20*time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

// Connections are dealt with separately: while one peer accepts and never reads,
// messages to another are as fast as ever, with every option.
func TestStalledPeerDelaysNobody(t *testing.T) {
	for name, o := range map[string]channel.Options{"none": channel.SendNone, "ack": channel.SendAck, "sync-ack": channel.SendSyncAck} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
				var got atomic.Int64
				good := receive(t, b, b.IP(), true, func(context.Context, *channel.Message) error { got.Add(1); return nil })
				stop := make(chan struct{})
				defer close(stop)
				deaf := memberAt(handMade(t, b, b.IP(), func(c net.Conn) { <-stop }), true)
				from := send(t, a)
				ctx, cancel := context.WithCancel(context.Background())
				var wg sync.WaitGroup
				for range 64 { // everything that fits, and then callers that wait
					wg.Go(func() {
						for ctx.Err() == nil {
							_ = from.Send(ctx, from.message(o, string(make([]byte, 64<<10)), deaf)) // fails
							time.Sleep(time.Millisecond)
						}
					})
				}
				time.Sleep(time.Second) // everything is full
				var worst time.Duration
				for range 1000 {
					begin := time.Now()
					if err := from.Send(context.Background(), from.message(o, "x", good.member)); err != nil {
						t.Fatal(err)
					}
					worst = max(worst, time.Since(begin))
					time.Sleep(5 * time.Millisecond)
				}
				eventually(t, "all delivered", func() bool { return got.Load() == 1000 })
				if worst > 50*time.Millisecond {
					t.Errorf("a message to the healthy peer took %v", worst)
				}
				cancel()
				wg.Wait()
			})
		})
	}
}

// On real sockets, too: a peer that accepts and never reads holds up nobody, what
// is kept for it is bounded, and everything fails in the end.
func TestDeafPeerOnRealSockets(t *testing.T) {
	n := realNet(t)
	var got atomic.Int64
	good := receive(t, n, "127.0.0.1", true, func(context.Context, *channel.Message) error { got.Add(1); return nil })
	stop := make(chan struct{})
	defer close(stop)
	deaf := memberAt(handMade(t, n, "127.0.0.1", func(c net.Conn) { <-stop }), true)
	from := send(t, n, func(c *SenderConfig) { c.AckTimeout = 20 * time.Second })
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range 200 { // more than the window and the buffers of the system take
		wg.Go(func() { _ = from.Send(ctx, from.message(channel.SendSyncAck, string(make([]byte, 256<<10)), deaf)) })
	}
	for range 300 {
		if err := from.Send(context.Background(), from.message(channel.SendSyncAck, "x", good.member)); err != nil {
			t.Fatal(err)
		}
	}
	if got.Load() != 300 {
		t.Errorf("%d messages", got.Load())
	}
	if timeouts := value(from.metrics, "channel_send_timeouts_total"); timeouts != 0 {
		t.Skip("the machine was too slow to tell: the deaf peer was given up meanwhile")
	}
	from.mu.RLock()
	out := from.peers[peerKey{deaf.ID, deaf.Addr()}].out.(*pipe)
	from.mu.RUnlock()
	eventually(t, "callers wait for room", func() bool { return value(from.metrics, "channel_send_stalls_total") > 0 })
	out.mu.Lock()
	kept := out.bytes
	out.mu.Unlock()
	if kept > from.cfg.WindowBytes {
		t.Errorf("%d bytes are kept for the deaf peer, the window is %d", kept, from.cfg.WindowBytes)
	}
	cancel()
	wg.Wait()
}

// One direction of a link is cut: what is sent into it fails in time, the other
// direction, another peer, and everything after the cut is as ever; nothing
// comes twice.
func TestOneWayPartition(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 3}, func(t *testing.T, nw *channeltest.SimNet) {
		nodes := nw.Nodes(3)
		var boxes [3]inbox
		var ends [3]*node
		var sources [3]*source
		for i, n := range nodes {
			ends[i] = receive(t, n, n.IP(), true, boxes[i].add)
			sources[i] = send(t, n)
			credited(sources[i], ends[i])
		}
		say := func(from, to int, body string) error {
			return sources[from].Send(context.Background(), sources[from].message(channel.SendSyncAck, body, ends[to].member))
		}
		for _, c := range [][2]int{{0, 1}, {1, 0}, {0, 2}, {2, 1}} {
			if err := say(c[0], c[1], "before"); err != nil {
				t.Fatal(err)
			}
		}
		nw.SetLink(nodes[0].IP(), nodes[1].IP(), channeltest.LinkPolicy{Cut: true})
		begin := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := say(0, 1, "lost"); err == nil {
				t.Error("a message through the cut was acknowledged")
			}
			if d := time.Since(begin); d > 10*time.Second {
				t.Errorf("it failed after %v", d)
			}
		})
		for i := range 20 {
			at := time.Now()
			if err := say(0, 2, fmt.Sprint("other ", i)); err != nil || time.Since(at) > 100*time.Millisecond {
				t.Errorf("another peer: %v after %v", err, time.Since(at))
			}
		}
		// Acknowledgements of the other direction are lost: that fails as well.
		if err := say(1, 0, "unanswered"); err == nil {
			t.Error("acknowledged through the cut")
		}
		wg.Wait()
		nw.ResetLinks()
		eventually(t, "both directions again", func() bool { return say(0, 1, "again") == nil })
		eventually(t, "both directions again", func() bool { return say(1, 0, "back") == nil })
		count := map[string]int{}
		for _, b := range boxes[2].all() {
			count[b]++
		}
		for body, n := range count {
			if n != 1 {
				t.Errorf("%q came %d times", body, n)
			}
		}
	})
}

// Messages arrive whatever happened to the connection before: it was idle for
// long, every message had one of its own, or the peer has reset it in the middle
// of a frame.
func TestConnectionsComeAndGo(t *testing.T) {
	for name, pause := range map[string]time.Duration{"at once": 0, "after a second": time.Second, "after it was closed": idleClose + time.Minute, "after the peer closed it": 15 * time.Minute} {
		t.Run(name, func(t *testing.T) {
			kinds(t, func(t *testing.T, pipelined bool) {
				sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
					var in inbox
					to := receive(t, b, b.IP(), pipelined, in.add)
					from := send(t, a)
					for i := range 3 {
						for _, o := range []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck} {
							if err := from.Send(t.Context(), from.message(o, fmt.Sprint(i, o), to.member)); err != nil {
								t.Errorf("message %d, %v: %v", i, o, err)
							}
						}
						time.Sleep(pause)
					}
					eventually(t, "all arrived", func() bool { return len(in.all()) == 9 })
				})
			})
		})
	}
	t.Run("reset within an answer", func(t *testing.T) {
		sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
			var calls atomic.Int64
			to := memberAt(handMade(t, b, b.IP(), func(c net.Conn) {
				readMessages(c, func(*channel.Message) bool {
					if calls.Add(1)%2 == 1 {
						_, _ = c.Write([]byte(wire.Ack[:7])) // and then the end
						return false
					}
					_, _ = c.Write([]byte(wire.Ack))
					return true
				})
			}), true)
			from := send(t, a)
			for i := range 10 {
				if err := from.Send(t.Context(), from.message(channel.SendAck, fmt.Sprint(i), to)); err != nil {
					t.Errorf("message %d: %v", i, err)
				}
			}
		})
	})
}

// A caller that reads its own acknowledgement gives up when its context is
// cancelled, and leaves the connection to the next.
func TestCancelWhileReading(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		to := receive(t, b, b.IP(), true, func(_ context.Context, m *channel.Message) error {
			if string(m.Body) == "slow" {
				time.Sleep(time.Second)
			}
			return nil
		})
		s := send(t, a)
		say := func(ctx context.Context, body string) error {
			return s.Send(ctx, s.message(channel.SendSyncAck, body, to.member))
		}
		for range 20 {
			for range 3 { // one at a time: callers read
				if err := say(t.Context(), "good"); err != nil {
					t.Error(err)
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(10*time.Millisecond, cancel)
			begin := time.Now()
			if err := say(ctx, "slow"); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if d := time.Since(begin); d > 10*time.Millisecond+s.cfg.AckTimeout/ticksPerTimeout+time.Millisecond {
				t.Errorf("noticed after %v", d)
			}
		}
		if n := value(to.metrics, "channel_receive_connections_total"); n != 1 {
			t.Errorf("%d connections", n)
		}
	})
}

// Callers of all kinds at once, with contexts of all kinds: everybody gets his
// own answer.
func TestMixedCallers(t *testing.T) {
	n := realNet(t)
	to := receive(t, n, "127.0.0.1", true, func(_ context.Context, m *channel.Message) error {
		if m.Body[0] == 'n' {
			return errors.New("no")
		}
		return nil
	})
	s := send(t, n, func(c *SenderConfig) { c.AckTimeout = 30 * time.Second })
	credited(s, to)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for k := range 200 {
				ctx, cancel := context.Background(), func() {}
				if k%3 == 1 {
					ctx, cancel = context.WithTimeout(ctx, time.Minute)
				}
				body := "yes"
				if (i+k)%5 == 0 {
					body = "no"
				}
				o := channel.SendSyncAck
				if k%7 == 0 {
					o = channel.SendNone
				}
				err := s.Send(ctx, s.message(o, body, to.member))
				if refused := body == "no" && o == channel.SendSyncAck; refused != errors.Is(err, channel.ErrNegativeAck) || !refused && err != nil {
					t.Errorf("%s: %v", body, err)
				}
				cancel()
			}
		})
	}
	wg.Wait()
}

// What a peer answers instead of one acknowledgement in time: the message fails or
// succeeds once, under a counter of its own, and the next one is not touched by it.
func TestAnswersToOneMessage(t *testing.T) {
	nonsense := wire.AppendCredit(wire.AppendCredit(nil, 1<<63, 1<<64-1), 0, 0)
	for _, c := range []struct {
		name    string
		early   string // before any message
		answer  string // to every message
		after   time.Duration
		counter string
		want    error // of the first message; nil: it succeeds
	}{
		{"for no message", wire.Ack, wire.Ack, 0, "channel_send_unexpected_total", nil},
		{"twice", "", wire.Ack + wire.Ack, 0, "channel_send_unexpected_total", nil},
		{"negative, and no reason", "", wire.NegativeAck, 0, "channel_send_negative_total", channel.ErrNegativeAck},
		{"negative and positive", "", wire.NegativeAck + wire.Ack, 0, "channel_send_unexpected_total", channel.ErrNegativeAck},
		{"never", "", "", 0, "channel_send_timeouts_total", channel.ErrAckTimeout},
		{"after the timeout", "", wire.Ack, 5 * time.Second, "channel_send_timeouts_total", channel.ErrAckTimeout},
		{"half", "", wire.Ack[:10], 0, "channel_send_timeouts_total", channel.ErrAckTimeout},
		{"other payload of that length", "", "FLT2002\x00\x00\x00\x03abcTLF2003", 0, "channel_send_unexpected_total", channel.ErrDisconnected},
		{"frame of 2 GiB", "", "FLT2002\x7f\xff\xff\xff", 0, "channel_send_unexpected_total", channel.ErrDisconnected},
		{"credit that was not asked for", string(nonsense), wire.Ack, 0, "", nil},
		{"credit for ever, and no answer", "", string(nonsense), 0, "channel_send_timeouts_total", channel.ErrAckTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
				addr := handMade(t, b, b.IP(), func(conn net.Conn) {
					_, _ = conn.Write([]byte(c.early))
					readMessages(conn, func(*channel.Message) bool {
						time.Sleep(c.after)
						_, _ = conn.Write([]byte(c.answer))
						return true
					})
				})
				good := receive(t, b, b.IP(), true, func(context.Context, *channel.Message) error { return nil })
				s := send(t, a)
				to := memberAt(addr, true)
				begin := time.Now()
				err := s.Send(t.Context(), s.message(channel.SendAck, "x", to))
				early := c.early != "" && c.counter != "" // then the connection may be lost before or after
				if !errors.Is(err, c.want) && !early || err != nil && c.want == nil && !early {
					t.Errorf("ended with %v, want %v", err, c.want)
				}
				if d := time.Since(begin); d > 8*time.Second {
					t.Errorf("it took %v", d)
				}
				if c.counter != "" {
					eventually(t, "it is counted", func() bool { return value(s.metrics, c.counter) >= 1 })
				}
				if err := s.Send(t.Context(), s.message(channel.SendSyncAck, "x", good.member)); err != nil {
					t.Errorf("to another member: %v", err)
				}
				time.Sleep(10 * time.Second) // what is late comes to nobody
				if n := value(s.metrics, "channel_send_messages_total"); n != 2 {
					t.Errorf("%d messages counted", n)
				}
			})
		})
	}
}
