package channeltest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

var port4000 = netip.MustParseAddrPort("0.0.0.0:4000")

func at(n *SimNode, port uint16) netip.AddrPort { return netip.AddrPortFrom(n.Addr(), port) }

// echo accepts streams on port 4000 and sends back what it reads, until the
// test ends.
func echo(t *testing.T, wg *sync.WaitGroup, n *SimNode) {
	l, err := channel.ListenTCP(n, port4000)
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				io.Copy(c, c)
				c.Close()
			})
		}
	})
}

func dial(t *testing.T, from, to *SimNode) net.Conn {
	t.Helper()
	c, err := channel.Dial(t.Context(), from, at(to, 4000))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestStreamsCarryEverythingOverALossyNetwork(t *testing.T) {
	for _, loss := range []float64{0, 0.05, 0.2} {
		t.Run(fmt.Sprint(loss), func(t *testing.T) {
			Run(t, SimConfig{Seed: 7, Link: LinkPolicy{Loss: loss, Jitter: 3 * time.Millisecond}}, func(t *testing.T, nw *SimNet) {
				var wg sync.WaitGroup
				nodes := nw.Nodes(2)
				echo(t, &wg, nodes[1])
				c := dial(t, nodes[0], nodes[1])
				data := bytes.Repeat([]byte("0123456789abcdef!"), 120_000) // 2 MB
				wg.Go(func() {
					if n, err := c.Write(data); n != len(data) || err != nil {
						t.Errorf("wrote %d of %d: %v", n, len(data), err)
					}
					c.(interface{ CloseWrite() error }).CloseWrite()
				})
				back, err := io.ReadAll(c)
				if err != nil || sha256.Sum256(back) != sha256.Sum256(data) {
					t.Errorf("got %d of %d bytes back, %v", len(back), len(data), err)
				}
				c.Close()
				nw.Close()
				wg.Wait()
			})
		})
	}
}

func TestDialRefusedTimedOutAndCancelled(t *testing.T) {
	Run(t, SimConfig{}, func(t *testing.T, nw *SimNet) {
		nodes := nw.Nodes(2)
		if _, err := channel.Dial(t.Context(), nodes[0], at(nodes[1], 4000)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		nw.Isolate(nodes[1].IP())
		began := time.Now()
		if _, err := channel.Dial(t.Context(), nodes[0], at(nodes[1], 4000)); !channel.IsTimeout(err) {
			t.Errorf("cut off: %v", err)
		}
		if d := time.Since(began); d < 20*time.Second || d > 25*time.Second {
			t.Errorf("gave up after %v", d)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		began = time.Now()
		_, err := channel.Dial(ctx, nodes[0], at(nodes[1], 4000))
		if !errors.Is(err, context.DeadlineExceeded) || !channel.IsTimeout(err) || time.Since(began) != 3*time.Second {
			t.Errorf("deadline: %v after %v", err, time.Since(began))
		}
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := channel.Dial(ctx, nodes[0], at(nodes[1], 4000)); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	})
}

func TestListenErrors(t *testing.T) {
	Run(t, SimConfig{}, func(t *testing.T, nw *SimNet) {
		n := nw.Nodes(1)[0]
		l, err := channel.ListenTCP(n, port4000)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := channel.ListenTCP(n, at(n, 4000)); !channel.IsAddrInUse(err) {
			t.Errorf("second listener: %v", err)
		}
		if _, err := channel.ListenTCP(n, netip.MustParseAddrPort("10.9.9.9:1")); err == nil {
			t.Error("listened on an address of nobody")
		}
		l.SetDeadline(time.Now().Add(time.Second))
		if _, err := l.Accept(); !channel.IsTimeout(err) {
			t.Errorf("accept past the deadline: %v", err)
		}
		l.Close()
		if _, err := l.Accept(); !channel.IsClosed(err) {
			t.Errorf("accept after close: %v", err)
		}
		if l, err = channel.ListenTCP(n, port4000); err != nil {
			t.Errorf("listen again: %v", err)
		}
		l.Close()
	})
}

func TestStreamSurvivesAShortCutAndFailsInALongOne(t *testing.T) {
	Run(t, SimConfig{}, func(t *testing.T, nw *SimNet) {
		var wg sync.WaitGroup
		nodes := nw.Nodes(2)
		echo(t, &wg, nodes[1])
		c := dial(t, nodes[0], nodes[1])
		buf := make([]byte, 16)

		nw.Isolate(nodes[1].IP())
		time.AfterFunc(10*time.Second, nw.Heal)
		c.Write([]byte("short"))
		if n, err := c.Read(buf); string(buf[:n]) != "short" {
			t.Fatalf("after a cut of 10 s: %q, %v", buf[:n], err)
		}

		nw.Isolate(nodes[1].IP())
		began := time.Now()
		c.Write([]byte("long"))
		if _, err := c.Read(buf); !errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("after a long cut: %v", err)
		}
		if d := time.Since(began); d < 20*time.Second || d > 25*time.Second {
			t.Errorf("failed after %v", d)
		}
		if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("write on a dead stream: %v", err)
		}
		nw.Close()
		wg.Wait()
	})
}

func TestOneWayCut(t *testing.T) {
	Run(t, SimConfig{}, func(t *testing.T, nw *SimNet) {
		nodes := nw.Nodes(2)
		a, err := channel.ListenUDP(nodes[0], port4000)
		if err != nil {
			t.Fatal(err)
		}
		b, err := channel.ListenUDP(nodes[1], port4000)
		if err != nil {
			t.Fatal(err)
		}
		nw.SetLink(nodes[0].IP(), nodes[1].IP(), LinkPolicy{Cut: true})
		a.WriteTo([]byte("lost"), net.UDPAddrFromAddrPort(at(nodes[1], 4000)))
		b.WriteTo([]byte("arrives"), net.UDPAddrFromAddrPort(at(nodes[0], 4000)))
		buf := make([]byte, 16)
		n, from, err := a.ReadFrom(buf)
		if err != nil || string(buf[:n]) != "arrives" || from.String() != "10.0.0.2:4000" {
			t.Errorf("got %q from %v, %v", buf[:n], from, err)
		}
		b.SetReadDeadline(time.Now().Add(time.Minute))
		for range 2 { // deadlines stick
			if n, _, err := b.ReadFrom(buf); !channel.IsTimeout(err) {
				t.Errorf("one way cut: got %q, %v", buf[:n], err)
			}
		}
		if s := nw.Stats(); s.Sent != 2 || s.Lost != 1 {
			t.Errorf("stats %+v", s)
		}
	})
}

func TestDatagramDeadlinesAndClose(t *testing.T) {
	Run(t, SimConfig{}, func(t *testing.T, nw *SimNet) {
		n := nw.Nodes(1)[0]
		c, err := channel.ListenUDP(n, at(n, 0))
		if err != nil {
			t.Fatal(err)
		}
		// A deadline that moves while readers wait counts; it ends all of them.
		c.SetReadDeadline(time.Now().Add(time.Second))
		began := time.Now()
		time.AfterFunc(500*time.Millisecond, func() { c.SetReadDeadline(began.Add(3 * time.Second)) })
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, _, err := c.ReadFromUDP(make([]byte, 8)); !channel.IsTimeout(err) || time.Since(began) != 3*time.Second {
					t.Errorf("%v after %v", err, time.Since(began))
				}
			})
		}
		wg.Wait()
		c.SetReadDeadline(time.Time{})
		time.AfterFunc(time.Second, func() { c.Close() })
		if _, _, err := c.ReadFrom(make([]byte, 8)); !channel.IsClosed(err) {
			t.Errorf("read during close: %v", err)
		}
		if _, err := c.WriteTo([]byte("x"), c.LocalAddr()); !channel.IsClosed(err) {
			t.Errorf("write after close: %v", err)
		}
		if err := c.Close(); !channel.IsClosed(err) {
			t.Errorf("second close: %v", err)
		}
	})
}

func TestReaderThatNeverReadsStopsTheWriter(t *testing.T) {
	Run(t, SimConfig{}, func(t *testing.T, nw *SimNet) {
		nodes := nw.Nodes(2)
		l, err := channel.ListenTCP(nodes[1], port4000)
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, nodes[0], nodes[1])
		peer, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.SetWriteDeadline(time.Now().Add(5 * time.Minute))
		n, err := c.Write(make([]byte, 4<<20))
		if !channel.IsTimeout(err) || n > 2*streamBuffer {
			t.Fatalf("wrote %d bytes nobody reads, %v", n, err)
		}
		// It goes on as soon as somebody reads.
		c.SetWriteDeadline(time.Time{})
		var wg sync.WaitGroup
		wg.Go(func() {
			k, err := io.Copy(io.Discard, peer)
			if want := int64(n + 1<<20); k != want || err != nil {
				t.Errorf("read %d of %d, %v", k, want, err)
			}
		})
		if _, err := c.Write(make([]byte, 1<<20)); err != nil {
			t.Error(err)
		}
		c.Close()
		wg.Wait()
		peer.Close()
	})
}

func TestCrashIsSilentAndKillResets(t *testing.T) {
	Run(t, SimConfig{}, func(t *testing.T, nw *SimNet) {
		var wg sync.WaitGroup
		nodes := nw.Nodes(3)
		for _, n := range nodes[1:] {
			echo(t, &wg, n)
		}
		crashed, killed := dial(t, nodes[0], nodes[1]), dial(t, nodes[0], nodes[2])
		nodes[1].Crash()
		nodes[2].Kill()
		began := time.Now()
		if _, err := killed.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) || time.Since(began) > time.Second {
			t.Errorf("killed: %v after %v", err, time.Since(began))
		}
		if _, err := crashed.Read(make([]byte, 1)); !errors.Is(err, syscall.ETIMEDOUT) || time.Since(began) < time.Minute {
			t.Errorf("crashed: %v after %v (keep-alive must find out)", err, time.Since(began))
		}
		if _, err := channel.ListenTCP(nodes[1], port4000); !channel.IsClosed(err) {
			t.Errorf("listen on a crashed node: %v", err)
		}
		// A node that comes back with the address does not know old streams.
		again := nw.Node(nodes[2].IP())
		if again == nodes[2] {
			t.Fatal("the same node")
		}
		echo(t, &wg, again)
		c := dial(t, nodes[0], again)
		again.Crash()
		third := nw.Node(again.IP())
		echo(t, &wg, third)
		c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("restarted: %v", err)
		}
		nw.Close()
		wg.Wait()
	})
}

func TestMulticastReachesMembersPerLink(t *testing.T) {
	Run(t, SimConfig{}, func(t *testing.T, nw *SimNet) {
		nodes := nw.Nodes(3)
		group := netip.MustParseAddrPort("228.0.0.4:45564")
		join := func(n *SimNode, bind string) net.PacketConn {
			c := channel.MulticastConfig{Group: group}
			if bind != "" {
				c.Bind = netip.MustParseAddr(bind)
			}
			conn, err := channel.ListenMulticast(n, c)
			if err != nil {
				t.Fatal(err)
			}
			return conn.(net.PacketConn)
		}
		a, b, c := join(nodes[0], ""), join(nodes[1], nodes[1].IP()), join(nodes[2], "")
		a2 := join(nodes[0], "")
		lo := join(nodes[0], "127.0.0.1")
		lo2 := join(nodes[0], "127.0.0.1")
		nw.SetLink(nodes[0].IP(), nodes[2].IP(), LinkPolicy{Cut: true})
		to := net.UDPAddrFromAddrPort(group)
		a.WriteTo([]byte("all"), to)
		lo.WriteTo([]byte("machine"), to)
		time.Sleep(time.Second)
		for i, want := range []struct {
			conn net.PacketConn
			data string
		}{{a, "all"}, {b, "all"}, {c, ""}, {a2, "all"}, {lo, "machine"}, {lo2, "machine"}} {
			var got []string
			buf := make([]byte, 32)
			want.conn.SetReadDeadline(time.Now().Add(time.Second))
			for {
				n, _, err := want.conn.ReadFrom(buf)
				if err != nil {
					break
				}
				got = append(got, string(buf[:n]))
			}
			if strings.Join(got, ",") != want.data {
				t.Errorf("socket %d received %q, want %q", i, got, want.data)
			}
		}
	})
}

func TestHTTPOverTheSimulatedNetwork(t *testing.T) {
	Run(t, SimConfig{Seed: 3, Link: LinkPolicy{Loss: 0.02, Latency: 5 * time.Millisecond}}, func(t *testing.T, nw *SimNet) {
		nodes := nw.Nodes(2)
		nw.SetHost("shop.example", nodes[1].IP())
		l, err := channel.ListenTCP(nodes[1], port4000)
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Second)
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			w.Write(body)
		})}
		var wg sync.WaitGroup
		wg.Go(func() { srv.Serve(l) })
		dialer := nodes[0].CreateDialer(&net.Dialer{}).(channel.ContextDialer)
		client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext}}
		body := bytes.Repeat([]byte("x"), 100_000)
		for range 50 {
			resp, err := client.Post("http://shop.example:4000/", "text/plain", bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || len(got) != len(body) {
				t.Fatalf("got %d bytes, %v", len(got), err)
			}
		}
		client.CloseIdleConnections()
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		wg.Wait()
	})
}

func TestBoundsPacketsInFlight(t *testing.T) {
	Run(t, SimConfig{MaxInFlight: 100}, func(t *testing.T, nw *SimNet) {
		nodes := nw.Nodes(2)
		c, err := channel.ListenUDP(nodes[0], at(nodes[0], 0))
		if err != nil {
			t.Fatal(err)
		}
		for range 1000 {
			c.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(at(nodes[1], 1)))
		}
		if s := nw.Stats(); s.Overflow != 900 {
			t.Errorf("stats %+v", s)
		}
	})
}

// scenario runs the traffic of a small cluster: multicast heartbeats, and
// acknowledged messages over streams that are dialled again when they fail.
// Once a minute a node is cut off for half a minute. It returns all packets,
// sorted, if tap is set.
func scenario(t *testing.T, seed uint64, loss float64, splits int, tap bool) (trace []string, acknowledged int) {
	Run(t, SimConfig{Seed: seed, Link: LinkPolicy{Loss: loss, Jitter: time.Millisecond}}, func(t *testing.T, nw *SimNet) {
		const count = 3
		var mu sync.Mutex
		if tap {
			nw.Tap(func(p Packet) { trace = append(trace, p.String()) })
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(splits)*time.Minute)
		defer cancel()
		nodes := nw.Nodes(count)
		group := netip.MustParseAddrPort("228.0.0.4:45564")
		var wg sync.WaitGroup
		for i, n := range nodes {
			phase := time.Duration(i*7+3) * time.Millisecond
			echo(t, &wg, n)
			conn, err := channel.ListenMulticast(n, channel.MulticastConfig{Group: group})
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				buf := make([]byte, 100)
				for {
					if _, _, err := conn.ReadFrom(buf); err != nil {
						return
					}
				}
			})
			wg.Go(func() {
				for channel.Pause(ctx, phase); channel.Pause(ctx, 500*time.Millisecond); {
					conn.WriteTo(make([]byte, 60), net.UDPAddrFromAddrPort(group))
				}
			})
			wg.Go(func() {
				var c net.Conn
				buf := make([]byte, 64)
				for channel.Pause(ctx, phase); channel.Pause(ctx, 100*time.Millisecond); {
					if c == nil {
						fresh, err := channel.Dial(ctx, n, at(nodes[(i+1)%count], 4000))
						if err != nil {
							continue
						}
						c = fresh
					}
					c.SetDeadline(time.Now().Add(5 * time.Second))
					_, err := c.Write(buf)
					if err == nil {
						_, err = io.ReadFull(c, buf)
					}
					if err != nil {
						c.Close()
						c = nil
						continue
					}
					mu.Lock()
					acknowledged++
					mu.Unlock()
				}
			})
		}
		for i := range splits {
			nw.Isolate(nodes[i%count].IP())
			time.Sleep(30 * time.Second)
			nw.Heal()
			time.Sleep(29 * time.Second)
		}
		<-ctx.Done()
		nw.Close()
		wg.Wait()
	})
	slices.Sort(trace)
	return trace, acknowledged
}

func TestTenMinutesWithTenSplits(t *testing.T) {
	began := time.Now()
	_, acknowledged := scenario(t, 1, 0, 10, false)
	t.Logf("%d acknowledged, %v", acknowledged, time.Since(began))
	if acknowledged < 10_000 {
		t.Errorf("only %d acknowledged", acknowledged)
	}
}

func TestRunsRepeatBySeed(t *testing.T) {
	first, acknowledged := scenario(t, 42, 0.05, 3, true)
	for range 4 {
		again, _ := scenario(t, 42, 0.05, 3, true)
		if !slices.Equal(first, again) {
			i := 0
			for i < min(len(first), len(again)) && first[i] == again[i] {
				i++
			}
			t.Fatalf("runs differ after %d of %d and %d packets:\n%s\n\n%s", i, len(first), len(again),
				strings.Join(first[max(0, i-8):min(i+8, len(first))], "\n"),
				strings.Join(again[max(0, i-8):min(i+8, len(again))], "\n"))
		}
	}
	other, _ := scenario(t, 43, 0.05, 3, true)
	if slices.Equal(first, other) {
		t.Error("another seed gave the same run")
	}
	t.Logf("%d packets, %d acknowledged", len(first), acknowledged)
}

func TestRunEndsWhenNothingIsLeft(t *testing.T) {
	// The clock must not have been moved by timers that stand for "never".
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		nw, err := NewSimNet(SimConfig{})
		if err != nil {
			t.Fatal(err)
		}
		nw.Nodes(3)
		synctest.Wait()
		nw.Close()
		nw.Close()
		if d := time.Since(began); d != 0 {
			t.Errorf("took %v", d)
		}
	})
}

func BenchmarkStreamThroughput(b *testing.B) {
	const size = 64 << 20
	b.SetBytes(size)
	for b.Loop() {
		runBubble(b, func(nw *SimNet) {
			nodes := nw.Nodes(2)
			l, err := channel.ListenTCP(nodes[1], port4000)
			if err != nil {
				b.Fatal(err)
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.Copy(io.Discard, c)
				c.Close()
			})
			c, err := channel.Dial(context.Background(), nodes[0], at(nodes[1], 4000))
			if err != nil {
				b.Fatal(err)
			}
			io.Copy(c, io.LimitReader(zeros{}, size))
			c.Close()
			wg.Wait()
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// runBubble runs f in real time: synctest has no bubbles for benchmarks.
func runBubble(b *testing.B, f func(nw *SimNet)) {
	b.Helper()
	nw, err := NewSimNet(SimConfig{Link: LinkPolicy{Latency: time.Microsecond}})
	if err != nil {
		b.Fatal(err)
	}
	defer nw.Close()
	f(nw)
}
