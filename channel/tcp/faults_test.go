package tcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// swallow reads for ever and answers nothing.
func swallow(c net.Conn) { io.Copy(io.Discard, c) }

// stubborn never reads.
func stubborn(done <-chan struct{}) func(net.Conn) {
	return func(net.Conn) { <-done }
}

// kinds runs a test toward a pipelined peer and toward another one.
func kinds(t *testing.T, f func(t *testing.T, pipelined bool)) {
	t.Run("pipe", func(t *testing.T) { f(t, true) })
	t.Run("pool", func(t *testing.T) { f(t, false) })
}

// The window takes as many messages as configured; then Send blocks as long as
// its context allows. Without acknowledgement all end once, with a time-out.
func TestWindowAndAckTimeout(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*SenderConfig)
		size   int
	}{
		"messages":                           {func(c *SenderConfig) { c.WindowMessages = 10 }, 10},
		"bytes":                              {func(c *SenderConfig) { c.WindowBytes = 105_000 }, 10_000},
		"one message larger than the window": {func(c *SenderConfig) { c.WindowBytes = 1000 }, 10_000},
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
				late := make(chan net.Conn, 1)
				to := memberAt(handMade(t, b, b.IP(), func(c net.Conn) { late <- c; swallow(c) }), true)
				s := send(t, a, c.change)
				r := newResults()
				start := time.Now()
				accepted := 0
				for {
					m := s.message(channel.SendAck, number(accepted)+strings.Repeat("x", c.size), to)
					m.Done = r
					ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
					err := s.Send(ctx, m)
					cancel()
					if err != nil {
						if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) < 100*time.Millisecond {
							t.Errorf("the full window: %v after %v", err, time.Since(start))
						}
						break
					}
					accepted++
				}
				if want := map[bool]int{true: 10, false: 1}[name[0] != 'o']; accepted != want {
					t.Errorf("%d messages accepted, want %d", accepted, want)
				}
				for _, err := range r.wait(t, accepted) {
					if !errors.Is(err, channel.ErrAckTimeout) {
						t.Errorf("ended with %v", err)
					}
				}
				if d := time.Since(start); d < 3*time.Second || d > 3500*time.Millisecond {
					t.Errorf("timed out after %v", d)
				}
				// An acknowledgement that comes now must not count.
				(<-late).Write([]byte(wire.Ack))
				time.Sleep(time.Second)
				r.wait(t, accepted)
			})
		})
	}
}

// Who waits for room in the window goes first, and makes way when he gives up.
func TestWindowQueue(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		to := memberAt(handMade(t, b, b.IP(), swallow), true)
		s := send(t, a, func(c *SenderConfig) { c.WindowBytes = 10_000 })
		r := newResults()
		post := func(size int, patience time.Duration) (time.Duration, error) {
			m := s.message(channel.SendAck, fmt.Sprintf("%0*d", size, size), to)
			m.Done = r
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			start := time.Now()
			err := s.Send(ctx, m)
			return time.Since(start), err
		}
		if _, err := post(5000, time.Second); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if d, err := post(8000, time.Second); !errors.Is(err, context.DeadlineExceeded) || d != time.Second {
				t.Errorf("too large: %v after %v", err, d)
			}
		})
		time.Sleep(100 * time.Millisecond)
		if d, err := post(1000, 2*time.Second); err != nil || d != 900*time.Millisecond {
			t.Errorf("the small one behind it: %v after %v", err, d)
		}
		wg.Wait()
		r.wait(t, 2)
	})
}

// A peer that accepts and never reads delays nobody else, and is given up.
func TestPeerThatNeverReads(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
			done := make(chan struct{})
			defer close(done)
			dead := memberAt(handMade(t, b, b.IP(), stubborn(done)), pipelined)
			var in inbox
			alive := receive(t, nw.Node("10.0.0.3"), "10.0.0.3", pipelined, in.add)
			s := send(t, a)
			big := strings.Repeat("x", 1<<20)
			r := newResults()
			for i := range 7 { // fills all buffers on the way
				m := s.message(channel.SendAck, number(i)+big, dead)
				m.Done = r
				if err := s.Send(t.Context(), m); err != nil {
					t.Fatal(err)
				}
			}
			for range 20 {
				start := time.Now()
				if err := s.Send(t.Context(), s.message(channel.SendSyncAck, "x", alive.member)); err != nil || time.Since(start) > 100*time.Millisecond {
					t.Errorf("to the other peer: %v after %v", err, time.Since(start))
				}
			}
			// To both at once: the live one has it at once, the dead one fails.
			start := time.Now()
			var arrived time.Duration
			var wg sync.WaitGroup
			wg.Go(func() {
				eventually(t, "arrival at the live peer", func() bool { return slices.Contains(in.all(), "both") })
				arrived = time.Since(start)
			})
			err := s.Send(t.Context(), s.message(channel.SendSyncAck, "both", dead, alive.member))
			wg.Wait()
			var se *channel.SendError
			if !errors.As(err, &se) || len(se.Faults) != 1 || se.Faults[0].Member != dead || !errors.Is(err, channel.ErrAckTimeout) {
				t.Errorf("to both: %v", err)
			}
			if arrived > 100*time.Millisecond || time.Since(start) > 4*time.Second {
				t.Errorf("to both: arrived after %v, failed after %v", arrived, time.Since(start))
			}
			for body, err := range r.wait(t, 7) {
				if !errors.Is(err, channel.ErrAckTimeout) {
					t.Errorf("%s: %v", body[:6], err)
				}
			}
		})
	})
}

// Messages without acknowledgement toward a peer that never reads block only
// their own senders, and only for the time-out.
func TestPeerThatNeverReadsPlain(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		done := make(chan struct{})
		defer close(done)
		dead := memberAt(handMade(t, b, b.IP(), stubborn(done)), true)
		s := send(t, a)
		start := time.Now()
		sent := 0
		for time.Since(start) < 20*time.Second {
			if s.Send(t.Context(), s.message(channel.SendNone, strings.Repeat("x", 100_000), dead)) == nil {
				sent++
			}
		}
		lost := value(s.metrics, "channel_send_lost_total")
		if timeouts := value(s.metrics, "channel_send_timeouts_total"); timeouts < 4 || timeouts > 7 || lost == 0 || lost > sent {
			t.Errorf("%d time-outs in 20s, %d messages sent, %d lost", timeouts, sent, lost)
		}
	})
}

// A negative acknowledgement is an error and is not sent again.
func TestNegativeAck(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		both(t, func(t *testing.T, a, b transport.Net, host string) {
			var in inbox
			to := receive(t, b, host, pipelined, func(ctx context.Context, m *channel.Message) error {
				in.add(ctx, m)
				if string(m.Body) == "bad" {
					return errors.New("no")
				}
				return nil
			})
			s := send(t, a)
			if err := s.Send(t.Context(), s.message(channel.SendSyncAck, "bad", to.member)); !errors.Is(err, channel.ErrNegativeAck) {
				t.Errorf("got %v", err)
			}
			m := s.message(channel.SendSyncAck, "bad", to.member)
			r := newResults()
			m.Done = r
			if err := s.Send(t.Context(), m); err != nil {
				t.Error(err)
			}
			if err := r.wait(t, 1)["bad"]; !errors.Is(err, channel.ErrNegativeAck) {
				t.Errorf("Done was told %v", err)
			}
			if err := s.Send(t.Context(), s.message(channel.SendSyncAck, "good", to.member)); err != nil {
				t.Error(err)
			}
			if got := in.all(); !slices.Equal(got, []string{"bad", "bad", "good"}) {
				t.Errorf("delivered %q", got)
			}
			if n := value(to.metrics, "channel_receive_connections_total"); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	})
}

// A peer that closes the connection without an answer is sent the same bytes
// again, on a new connection, as often as configured.
func TestRetry(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		for _, done := range []bool{false, true} {
			for retries := range 3 {
				t.Run(fmt.Sprintf("done=%v/retries=%d", done, retries), func(t *testing.T) {
					both(t, func(t *testing.T, a, b transport.Net, host string) {
						var mu sync.Mutex
						var frames [][]byte
						addr := handMade(t, b, host, func(c net.Conn) {
							f := make([]byte, 135+5+len(channel.Announcement{Name: "peer", Pipelined: true}.Encode()))
							if _, err := io.ReadFull(c, f); err != nil {
								return
							}
							mu.Lock()
							frames = append(frames, f)
							n := len(frames)
							mu.Unlock()
							if n == 3 {
								c.Write([]byte(wire.Ack))
								swallow(c)
							}
						})
						s := send(t, a, func(c *SenderConfig) { c.Retries = retries })
						m := s.message(channel.SendAck, "hello", memberAt(addr, pipelined))
						var err error
						if done {
							r := newResults()
							m.Done = r
							if err := s.Send(t.Context(), m); err != nil {
								t.Fatal(err)
							}
							err = r.wait(t, 1)["hello"]
						} else {
							err = s.Send(t.Context(), m)
						}
						if retries == 2 && err != nil || retries < 2 && !errors.Is(err, channel.ErrDisconnected) {
							t.Errorf("ended with %v", err)
						}
						mu.Lock()
						defer mu.Unlock()
						if len(frames) != retries+1 || value(s.metrics, "channel_send_retries_total") != retries {
							t.Errorf("sent %d times, %d retries counted", len(frames), value(s.metrics, "channel_send_retries_total"))
						}
						for _, f := range frames {
							if !bytes.Equal(f, frames[0]) || !bytes.Equal(f, wire.AppendFrame(nil, m)) {
								t.Errorf("frames differ:\n%x\n%x", frames[0], f)
							}
						}
					})
				})
			}
		}
	})
}

// What is in flight when a connection breaks is sent again in its order, before
// anything newer; messages without acknowledgement are not.
func TestRetryKeepsOrder(t *testing.T) {
	both(t, func(t *testing.T, a, b transport.Net, host string) {
		var mu sync.Mutex
		var bodies []string
		conns := 0
		addr := handMade(t, b, host, func(c net.Conn) {
			mu.Lock()
			conns++
			first := conns == 1
			mu.Unlock()
			seen := 0
			readMessages(c, func(m *channel.Message) bool {
				if seen++; first && seen == 20 {
					return false // breaks off with ten acknowledged
				}
				mu.Lock()
				defer mu.Unlock()
				if !first {
					bodies = append(bodies, string(m.Body))
				}
				if m.Options.Has(channel.UseAck) && (!first || seen <= 10) {
					c.Write([]byte(wire.Ack))
				}
				return true
			})
		})
		to := memberAt(addr, true)
		s := send(t, a)
		r := newResults()
		for i := range 100 {
			m := s.message(channel.SendAck, number(i), to)
			m.Done = r
			if err := s.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		for body, err := range r.wait(t, 100) {
			if err != nil {
				t.Errorf("%s: %v", body, err)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		if len(bodies) != 90 || !slices.IsSorted(bodies) || bodies[0] != number(10) {
			t.Errorf("the second connection carried %d messages, first %q, in order %v", len(bodies), bodies[0], slices.IsSorted(bodies))
		}
	})
}

// Answers that are none close the connection.
func TestWrongAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"two acknowledgements of one message": wire.Ack + wire.Ack,
		"HTTP":                                "HTTP/1.1 400 Bad Request\r\n\r\n",
		"a message":                           string(wire.AppendFrame(nil, &channel.Message{From: memberAt(netip.MustParseAddrPort("192.0.2.1:1"), true)})),
	} {
		kinds(t, func(t *testing.T, pipelined bool) {
			t.Run(name, func(t *testing.T) {
				both(t, func(t *testing.T, a, b transport.Net, host string) {
					closed := make(chan struct{}, 10)
					addr := handMade(t, b, host, func(c net.Conn) {
						readMessages(c, func(*channel.Message) bool {
							c.Write([]byte(answer))
							return true
						})
						closed <- struct{}{}
					})
					s := send(t, a)
					err := s.Send(t.Context(), s.message(channel.SendAck, "x", memberAt(addr, pipelined)))
					if err != nil && !errors.Is(err, channel.ErrDisconnected) || err == nil && name[0] != 't' {
						t.Errorf("ended with %v", err)
					}
					<-closed
					eventually(t, "it is counted", func() bool { return value(s.metrics, "channel_send_unexpected_total") == 1 })
				})
			})
		})
	}
}

// A caller that gives up leaves its connection in order.
func TestCancel(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
			var in inbox
			to := receive(t, b, b.IP(), pipelined, func(ctx context.Context, m *channel.Message) error {
				if string(m.Body) == "slow" {
					time.Sleep(time.Second)
					return errors.New("an answer that nobody must take for his own")
				}
				return in.add(ctx, m)
			})
			s := send(t, a)
			for range 50 {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
				start := time.Now()
				if err := s.Send(ctx, s.message(channel.SendSyncAck, "slow", to.member)); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 20*time.Millisecond {
					t.Errorf("ended with %v after %v", err, time.Since(start))
				}
				cancel()
				if err := s.Send(t.Context(), s.message(channel.SendSyncAck, "good", to.member)); err != nil {
					t.Errorf("the next message: %v", err)
				}
			}
			if n := value(to.metrics, "channel_receive_connections_total"); pipelined && n != 1 {
				t.Errorf("%d connections were opened", n)
			}
		})
	})
}

// Nobody listens: each Send fails with the reason, and looping callers do not
// make a storm of connections.
func TestRefusedConnections(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
			gone := receive(t, b, b.IP(), pipelined, new(inbox).add)
			stop(t, gone)
			s := send(t, a)
			start := time.Now()
			var failed atomic.Int64
			var wg sync.WaitGroup
			for i := range 5 {
				wg.Go(func() {
					o := []channel.Options{channel.SendAck, channel.SendNone}[i%2]
					for time.Since(start) < time.Minute {
						err := s.Send(t.Context(), s.message(o, "x", gone.member))
						if !errors.Is(err, channel.ErrDisconnected) {
							t.Errorf("ended with %v", err)
							return
						}
						failed.Add(1)
					}
				})
			}
			wg.Wait()
			if n := value(s.metrics, "channel_send_connect_failures_total"); n < 100 || n > 1000 {
				t.Errorf("%d attempts to connect in a minute, for %d messages", n, failed.Load())
			}
			// It comes back: the next message arrives.
			c := DefaultReceiverConfig()
			c.Address, c.Port = b.IP(), gone.member.Port
			again := NewReceiver(c, channel.Settings{Net: b})
			if _, err := again.Listen(t.Context()); err != nil {
				t.Fatal(err)
			}
			defer stop(t, again)
			if err := again.Start(t.Context(), new(inbox).add); err != nil {
				t.Fatal(err)
			}
			start = time.Now()
			if err := s.Send(t.Context(), s.message(channel.SendAck, "x", gone.member)); err != nil || time.Since(start) > lastPause+100*time.Millisecond {
				t.Errorf("after it is back: %v after %v", err, time.Since(start))
			}
		})
	})
}

// A peer that accepts and closes at once is not a storm either.
func TestFlappingPeer(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
			var accepted atomic.Int64
			to := memberAt(handMade(t, b, b.IP(), func(net.Conn) { accepted.Add(1) }), pipelined)
			s := send(t, a)
			start := time.Now()
			for time.Since(start) < time.Minute {
				if err := s.Send(t.Context(), s.message(channel.SendAck, "x", to)); !errors.Is(err, channel.ErrDisconnected) {
					t.Fatalf("ended with %v", err)
				}
			}
			if n := accepted.Load(); n < 50 || n > 300 {
				t.Errorf("%d connections in a minute", n)
			}
		})
	})
}

// A node that hangs in connecting delays nobody else.
func TestBlackHole(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
			to := receive(t, b, b.IP(), pipelined, new(inbox).add)
			alive := receive(t, nw.Node("10.0.0.3"), "10.0.0.3", pipelined, new(inbox).add)
			nw.Isolate(b.IP())
			s := send(t, a)
			start := time.Now()
			m := s.message(channel.SendAck, "x", to.member, alive.member)
			r := newResults()
			m.Done = r
			if err := s.Send(t.Context(), m); err != nil || time.Since(start) > 0 {
				t.Errorf("Send with Done: %v after %v", err, time.Since(start))
			}
			if err := s.Send(t.Context(), s.message(channel.SendAck, "y", alive.member)); err != nil || time.Since(start) > 100*time.Millisecond {
				t.Errorf("to the live one: %v after %v", err, time.Since(start))
			}
			var se *channel.SendError
			if err := r.wait(t, 1)["x"]; !errors.As(err, &se) || len(se.Faults) != 1 || !se.Faults[0].Member.Is(to.member) {
				t.Errorf("ended with %v", err)
			}
			if d := time.Since(start); d < 3*time.Second || d > 3100*time.Millisecond {
				t.Errorf("connecting was given up after %v", d)
			}
			nw.Heal()
			if err := s.Send(t.Context(), s.message(channel.SendAck, "z", to.member)); err != nil {
				t.Errorf("after the split: %v", err)
			}
		})
	})
}

// A cut of a second is survived by the connection; messages wait.
func TestShortCut(t *testing.T) {
	sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
		var in inbox
		to := receive(t, b, b.IP(), true, in.add)
		s := send(t, a)
		r := newResults()
		for i := range 300 {
			switch i {
			case 100:
				nw.Isolate(b.IP())
			case 200:
				time.Sleep(time.Second)
				nw.Heal()
			}
			m := s.message(channel.SendSyncAck, number(i), to.member)
			m.Done = r
			if err := s.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		for body, err := range r.wait(t, 300) {
			if err != nil {
				t.Errorf("%s: %v", body, err)
			}
		}
		if got := in.all(); len(got) != 300 || !slices.IsSorted(got) {
			t.Errorf("%d delivered, in order %v", len(got), slices.IsSorted(got))
		}
	})
}

// Acknowledgements may take longer than the time-out in sum, as long as each
// follows the one before in time.
func TestSlowHandler(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		to := receive(t, b, b.IP(), true, func(context.Context, *channel.Message) error {
			time.Sleep(time.Second)
			return nil
		})
		s := send(t, a)
		r := newResults()
		for i := range 10 {
			m := s.message(channel.SendSyncAck, number(i), to.member)
			m.Done = r
			if err := s.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		for body, err := range r.wait(t, 10) {
			if err != nil {
				t.Errorf("%s: %v", body, err)
			}
		}
	})
}

// slowConn reads 500 kB a second.
type slowConn struct{ net.Conn }

func (c slowConn) Read(b []byte) (int, error) {
	time.Sleep(100 * time.Millisecond)
	return c.Conn.Read(b[:min(len(b), 50_000)])
}

// A large message over a slow line may take longer than the time-out: as long as
// the peer reads, it lives. (After the write only what is in the buffers of the
// system is left, which is not seen from here.) What was due before must come in time all the same.
func TestLargeMessageSlowPeer(t *testing.T) {
	for _, pipelined := range []bool{true, false} {
		for _, fair := range []bool{true, false} {
			sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
				addr := handMade(t, b, b.IP(), func(c net.Conn) {
					readMessages(slowConn{c}, func(m *channel.Message) bool {
						if fair || len(m.Body) > 10 {
							c.Write([]byte(wire.Ack))
						}
						return true
					})
				})
				s := send(t, a)
				r := newResults()
				for i, size := range []int{6, 4_000_000, 6} {
					m := s.message(channel.SendAck, number(i)+strings.Repeat("x", size-6), memberAt(addr, pipelined))
					m.To[0].ID = channel.UniqueID{1}
					m.Done = r
					if err := s.Send(t.Context(), m); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Second)
				}
				for body, err := range r.wait(t, 3) {
					if want := fair || !pipelined && len(body) > 10; want && err != nil || !want && !errors.Is(err, channel.ErrAckTimeout) {
						t.Errorf("pipelined %v, fair %v: %s ended with %v", pipelined, fair, body[:6], err)
					}
				}
			})
		}
	}
}

func TestForget(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
			to := memberAt(handMade(t, b, b.IP(), swallow), pipelined)
			s := send(t, a)
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := s.Send(t.Context(), s.message(channel.SendAck, "x", to)); !errors.Is(err, channel.ErrDisconnected) {
					t.Errorf("ended with %v", err)
				}
			})
			time.Sleep(time.Second)
			if s.connections() != 1 {
				t.Errorf("%d connections", s.connections())
			}
			s.Forget(to)
			wg.Wait()
			s.Forget(to)
			if s.connections() != 0 {
				t.Errorf("%d connections are left", s.connections())
			}
		})
	})
}

// Stop waits for what has been accepted.
func TestSenderStopFlushes(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
			var in inbox
			to := receive(t, b, b.IP(), pipelined, func(ctx context.Context, m *channel.Message) error {
				time.Sleep(10 * time.Millisecond)
				return in.add(ctx, m)
			})
			s := send(t, a)
			r := newResults()
			for i := range 25 {
				m := s.message(channel.SendSyncAck, number(i), to.member)
				m.Done = r
				if err := s.Send(t.Context(), m); err != nil {
					t.Fatal(err)
				}
				if err := s.Send(t.Context(), s.message(channel.SendNone, "plain", to.member)); err != nil {
					t.Fatal(err)
				}
			}
			stop(t, s)
			for body, err := range r.wait(t, 25) {
				if err != nil {
					t.Errorf("%s: %v", body, err)
				}
			}
			eventually(t, "the plain ones arrive as well", func() bool { return len(in.all()) == 50 })
		})
	})
}

// Stop does not wait longer than its context.
func TestSenderStopGivesUp(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
			to := memberAt(handMade(t, b, b.IP(), swallow), pipelined)
			s := send(t, a)
			m := s.message(channel.SendAck, "x", to)
			r := newResults()
			m.Done = r
			if err := s.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			if err := s.Stop(ctx); err != nil || time.Since(start) != time.Second {
				t.Errorf("Stop returned %v after %v", err, time.Since(start))
			}
			if err := r.wait(t, 1)["x"]; !errors.Is(err, channel.ErrClosed) {
				t.Errorf("ended with %v", err)
			}
		})
	})
}

// Unused connections are closed by the sender, and opened again without loss.
func TestIdleConnections(t *testing.T) {
	kinds(t, func(t *testing.T, pipelined bool) {
		sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
			var in inbox
			to := receive(t, b, b.IP(), pipelined, in.add)
			s := send(t, a)
			for i := range 3 {
				for _, o := range []channel.Options{channel.SendNone, channel.SendAck} {
					if err := s.Send(t.Context(), s.message(o, number(i), to.member)); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(5 * time.Minute)
				if s.connections() != 0 {
					t.Errorf("%d connections are open after five minutes", s.connections())
				}
			}
			if len(in.all()) != 6 || value(s.metrics, "channel_send_lost_total") != 0 || refusals(to, "idle") != 0 {
				t.Errorf("delivered %q, lost %d", in.all(), value(s.metrics, "channel_send_lost_total"))
			}
		})
	})
}

// A peer that is no pipelined one never has two unacknowledged messages on one
// connection, nor more connections than allowed.
func TestPoolBounds(t *testing.T) {
	both(t, func(t *testing.T, a, b transport.Net, host string) {
		var open, most atomic.Int64
		addr := handMade(t, b, host, func(c net.Conn) {
			if n := open.Add(1); n > most.Load() {
				most.Store(n)
			}
			defer open.Add(-1)
			buf := make([]byte, 1<<16)
			for {
				n, err := c.Read(buf)
				if err != nil {
					return
				}
				if got := bytes.Count(buf[:n], []byte("FLT2002")); got > 1 {
					t.Errorf("%d messages in one read", got)
				}
				time.Sleep(time.Millisecond)
				if !bytes.HasSuffix(buf[:n], []byte("TLF2003")) {
					continue
				}
				c.Write([]byte(wire.Ack))
			}
		})
		to := memberAt(addr, false)
		s := send(t, a, func(c *SenderConfig) { c.Pool = 5 })
		r := newResults()
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				for j := range 10 {
					m := s.message(channel.SendAck, fmt.Sprint(i, j), to)
					if i%2 == 0 {
						m.Done = r
					}
					if err := s.Send(t.Context(), m); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		for body, err := range r.wait(t, 100) {
			if err != nil {
				t.Errorf("%s: %v", body, err)
			}
		}
		if n := most.Load(); n != 5 {
			t.Errorf("%d connections at most, want 5", n)
		}
	})
}

// Connections that died while idle do not fail messages.
func TestPoolStaleConnections(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		to := receive(t, b, b.IP(), false, func(context.Context, *channel.Message) error {
			time.Sleep(10 * time.Millisecond)
			return nil
		}, func(c *ReceiverConfig) { c.IdleTimeout = 10 * time.Second })
		s := send(t, a)
		for range 5 {
			var wg sync.WaitGroup
			for range 10 { // several connections
				wg.Go(func() {
					if err := s.Send(t.Context(), s.message(channel.SendSyncAck, "x", to.member)); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			time.Sleep(20 * time.Second)
		}
	})
}

// A member whose record changes to say that it is pipelined is treated so from
// then on; what was on its way still arrives.
func TestMemberBecomesPipelined(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		var in inbox
		to := receive(t, b, b.IP(), true, in.add)
		plain := to.member
		plain.Payload = "something else"
		s := send(t, a)
		r := newResults()
		for i := range 10 {
			m := s.message(channel.SendSyncAck, number(i), []channel.Member{plain, to.member}[i/5])
			m.Done = r
			if err := s.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		for body, err := range r.wait(t, 10) {
			if err != nil {
				t.Errorf("%s: %v", body, err)
			}
		}
		time.Sleep(time.Second)
		if len(in.all()) != 10 || s.connections() != 1 {
			t.Errorf("delivered %d messages, %d connections are open", len(in.all()), s.connections())
		}
	})
}

// Sender and receiver together, over a network that loses packets, with nodes
// that crash: everything that was acknowledged has been delivered, nothing twice
// on one connection's attempt, and all calls end.
func TestLossyNetwork(t *testing.T) {
	for seed := range uint64(5) {
		channeltest.Run(t, channeltest.SimConfig{Seed: seed, Link: channeltest.LinkPolicy{Loss: 0.05, Latency: 2 * time.Millisecond}}, func(t *testing.T, nw *channeltest.SimNet) {
			n := nw.Nodes(3)
			var ins [2]inbox
			var to [2]*node
			for i := range to {
				to[i] = receive(t, n[i+1], n[i+1].IP(), i == 0, ins[i].add)
			}
			s := send(t, n[0])
			var mu sync.Mutex
			acked := map[string]bool{}
			var wg sync.WaitGroup
			for g := range 8 {
				wg.Go(func() {
					for i := range 100 {
						body := fmt.Sprintf("%d/%d", g, i)
						err := s.Send(t.Context(), s.message(channel.SendSyncAck, body, to[0].member, to[1].member))
						mu.Lock()
						acked[body] = err == nil
						mu.Unlock()
						time.Sleep(time.Duration(g+1) * 10 * time.Millisecond)
					}
				})
			}
			time.Sleep(time.Second)
			nw.Isolate(n[1].IP())
			time.Sleep(5 * time.Second)
			nw.Heal()
			wg.Wait()
			good := 0
			for i := range ins {
				got := map[string]int{}
				for _, b := range ins[i].all() {
					got[b]++
				}
				good = 0
				for body, ok := range acked {
					if ok {
						good++
						if got[body] == 0 {
							t.Errorf("seed %d: %s was acknowledged and is missing at %d", seed, body, i)
						}
					}
					if got[body] > 2 {
						t.Errorf("seed %d: %s was delivered %d times", seed, body, got[body])
					}
				}
			}
			if len(acked) != 800 || good < 400 {
				t.Errorf("seed %d: %d of %d messages acknowledged", seed, good, len(acked))
			}
		})
	}
}

// Allocations per message of a caller that waits, in the steady state, both
// ends included.
func TestSendAllocations(t *testing.T) {
	if raceDetector {
		t.Skip("allocations differ under the race detector")
	}
	n := realNet(t)
	to := receive(t, n, "127.0.0.1", true, func(context.Context, *channel.Message) error { return nil })
	two := receive(t, n, "127.0.0.1", true, func(context.Context, *channel.Message) error { return nil })
	s := send(t, n)
	for name, m := range map[string]*channel.Message{
		"none": s.message(channel.SendNone, "x", to.member),
		"ack":  s.message(channel.SendAck, "x", to.member),
		"two":  s.message(channel.SendAck, "x", to.member, two.member),
	} {
		f := func() {
			if err := s.Send(context.Background(), m); err != nil {
				t.Fatal(err)
			}
		}
		for range 1000 {
			f()
		}
		if a := testing.AllocsPerRun(2000, f); a > 0.1 {
			t.Errorf("%s: %v allocations per message", name, a)
		}
	}
}
