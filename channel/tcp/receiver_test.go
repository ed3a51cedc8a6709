package tcp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// raw is a connection on which a test writes bytes of its own.
type raw struct {
	net.Conn
	t    testing.TB
	from channel.Member
}

func dialRaw(t testing.TB, n transport.Net, to *node) *raw {
	t.Helper()
	c, err := channel.Dial(t.Context(), n, to.member.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &raw{c, t, memberAt(netip.MustParseAddrPort("192.0.2.9:4000"), true)}
}

func (r *raw) frame(o channel.Options, body string) []byte {
	return wire.AppendFrame(nil, &channel.Message{ID: channel.NewUniqueID(), From: r.from, Options: o, Body: []byte(body)})
}

func (r *raw) write(bs ...[]byte) {
	r.t.Helper()
	if _, err := r.Write(bytes.Join(bs, nil)); err != nil {
		r.t.Fatal(err)
	}
}

// acks reads n acknowledgements and returns "+" and "-" for them.
func (r *raw) acks(n int) string {
	r.t.Helper()
	r.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, n*len(wire.Ack))
	if _, err := io.ReadFull(r, b); err != nil {
		r.t.Fatalf("reading %d acknowledgements: %v", n, err)
	}
	var s strings.Builder
	for len(b) > 0 {
		switch string(b[:len(wire.Ack)]) {
		case wire.Ack:
			s.WriteByte('+')
		case wire.NegativeAck:
			s.WriteByte('-')
		default:
			r.t.Fatalf("not an acknowledgement: %x", b)
		}
		b = b[len(wire.Ack):]
	}
	return s.String()
}

// silent checks that nothing comes for a while.
func (r *raw) silent(d time.Duration) {
	r.t.Helper()
	r.SetReadDeadline(time.Now().Add(d))
	if n, err := r.Read(make([]byte, 100)); n != 0 || !channel.IsTimeout(err) {
		r.t.Fatalf("read %d bytes, %v; want none", n, err)
	}
}

// closed waits until the peer has closed the connection.
func (r *raw) closed() {
	r.t.Helper()
	r.SetReadDeadline(time.Now().Add(time.Hour))
	if n, err := r.Read(make([]byte, 100)); err == nil || channel.IsTimeout(err) {
		r.t.Fatalf("read %d bytes, %v; want the end", n, err)
	}
}

func sim(t *testing.T, f func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode)) {
	channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
		n := nw.Nodes(2)
		f(t, nw, n[0], n[1])
	})
}

// Whatever a stranger sends closes its own connection, under one named counter,
// and nobody else's.
func TestHostileBytes(t *testing.T) {
	both(t, func(t *testing.T, a, b transport.Net, host string) {
		var in inbox
		to := receive(t, b, host, true, in.add, func(c *ReceiverConfig) { c.MaxFrame = 1 << 20 })
		good := dialRaw(t, a, to)
		other := memberAt(netip.MustParseAddrPort("192.0.2.10:4000"), true)
		put := func(b []byte, at int, v uint32) []byte {
			b = bytes.Clone(b)
			binary.BigEndian.PutUint32(b[at:], v)
			return b
		}
		f := good.frame(channel.SendNone, "no")
		wrongEnd := append(f[:len(f)-1:len(f)-1], 'x')
		twoSenders := wire.AppendFrame(good.frame(channel.SendNone, "first"), &channel.Message{From: other, Body: []byte("no")})
		tls := append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}, make([]byte, 100)...)
		for _, c := range []struct {
			name, reason string
			in           []byte
			delivered    int
		}{
			{"TLS", "frame_marker", tls, 0},
			{"HTTP", "frame_marker", []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), 0},
			{"SSH", "frame_marker", []byte("SSH-2.0-OpenSSH_9.9\r\n"), 0},
			{"length 0", "frame_length", put(f, 7, 0), 0},
			{"length -1", "frame_length", put(f, 7, 1<<32-1), 0},
			{"length of 2 GiB", "frame_too_large", put(f, 7, 1<<31-1), 0},
			{"over max_frame", "frame_too_large", put(f, 7, 1<<20), 0},
			{"negative length after a message", "frame_length", append(good.frame(channel.SendNone, "first"), put(f, 7, 1<<32-18)...), 1},
			{"wrong trailer", "frame_end", wrongEnd, 0},
			{"id length -1", "message_id", put(f, 23, 1<<32-1), 0},
			{"id length 0", "message_id", put(f, 23, 0), 0},
			{"id length of 2 GiB", "message_id", put(f, 23, 1<<31-1), 0},
			{"sender length -1", "sender", put(f, 43, 1<<32-1), 0},
			{"sender length 0", "body", put(f, 43, 0), 0},
			{"body length -1", "body", put(f, len(f)-7-2-4, 1<<32-1), 0},
			{"body length of 2 GiB", "body", put(f, len(f)-7-2-4, 1<<31-1), 0},
			{"credit", "unexpected_ack", wire.AppendCredit(nil, 1, 1<<62), 0},
			{"trailer of the frame before", "frame_marker", append(good.frame(channel.SendNone, "first"), "TLF2003"...), 1},
			{"half a byte mark", "frame_marker", []byte("FLT2001"), 0},
			{"noise", "frame_marker", bytes.Repeat([]byte{0}, 100_000), 0},
			{"host past the end", "member_fields", func() []byte {
				b := bytes.Clone(f)
				b[11+32+4+34] = 16
				return b
			}(), 0},
			{"acknowledgement", "unexpected_ack", []byte(wire.Ack), 0},
			{"another sender", "sender_changed", twoSenders, 1},
			{"half a frame, then the end", "mid_frame", f[:len(f)/2], 0},
		} {
			before, count := len(in.all()), refusals(to, c.reason)
			bad := dialRaw(t, a, to)
			bad.write(c.in)
			if c.reason == "mid_frame" {
				bad.Close()
			} else {
				bad.closed()
			}
			eventually(t, c.name+" is counted", func() bool { return refusals(to, c.reason) == count+1 })
			good.write(good.frame(channel.SendSyncAck, "good"))
			if got := good.acks(1); got != "+" {
				t.Errorf("%s: the other connection got %q", c.name, got)
			}
			if got := in.all()[before:]; len(got) != c.delivered+1 {
				t.Errorf("%s: delivered %q", c.name, got)
			}
		}
		if n := value(to.metrics, "channel_receive_connections"); n != 1 {
			t.Errorf("%d connections are open, want 1", n)
		}
		for _, s := range to.metrics.Samples() {
			if s.Name == "channel_receive_buffered_bytes" && s.Value > 256<<10 {
				t.Errorf("%v bytes of buffers are left", s.Value)
			}
		}
	})
}

// Unusual but legal: unknown option bits, any time, markers in the body.
func TestUnusualMessages(t *testing.T) {
	n := realNet(t)
	got := make(chan channel.Message, 10)
	to := receive(t, n, "127.0.0.1", true, func(_ context.Context, m *channel.Message) error {
		c := *m
		c.Body = bytes.Clone(m.Body)
		got <- c
		return nil
	})
	r := dialRaw(t, n, to)
	for _, m := range []channel.Message{
		{Options: 0x7fff_fe00},
		{Options: 1, Time: 0},
		{Options: 1, Time: 1<<63 - 1},
		{Options: 1, Time: -1 << 63},
		{Options: 1, Body: []byte("FLT2002TLF2003FLT2002")},
	} {
		m.ID, m.From = channel.NewUniqueID(), r.from
		r.write(wire.AppendFrame(nil, &m))
		g := <-got
		if g.ID != m.ID || g.Options != m.Options || g.Time != m.Time || !bytes.Equal(g.Body, m.Body) || g.From != m.From {
			t.Errorf("sent %+v\ngot  %+v", m, g)
		}
	}
}

func TestSilentConnections(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		var in inbox
		to := receive(t, b, b.IP(), true, in.add, func(c *ReceiverConfig) { c.MaxConnections = 300 })
		start := time.Now()
		for range 1000 {
			dialRaw(t, a, to)
		}
		eventually(t, "the surplus is refused", func() bool { return refusals(to, "max_connections") == 700 })
		if n := value(to.metrics, "channel_receive_buffered_bytes"); n > 300*4<<10 {
			t.Errorf("300 silent connections hold %d bytes", n)
		}
		eventually2(t, time.Minute, func() bool { return refusals(to, "silent") == 300 })
		if d := time.Since(start); d < 30*time.Second || d > 32*time.Second {
			t.Errorf("they were closed after %v, want 30s", d)
		}
		good := dialRaw(t, a, to)
		good.write(good.frame(channel.SendAck, "x"))
		good.acks(1)
		if n := value(to.metrics, "channel_receive_connections"); n != 1 {
			t.Errorf("%d connections are open", n)
		}
	})
}

// eventually2 waits at most d of virtual time.
func eventually2(t testing.TB, d time.Duration, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(d / 1000) {
		if time.Now().After(end) {
			t.Fatalf("not within %v", d)
		}
	}
}

func TestReceiveTimeouts(t *testing.T) {
	for name, c := range map[string]struct {
		reason   string
		min, max time.Duration
		send     func(*raw)
	}{
		"a byte now and then, no frame": {"silent", 30 * time.Second, 31 * time.Second, func(r *raw) {
			for i := range 6 {
				r.write([]byte("FLT200")[i : i+1])
				time.Sleep(4 * time.Second)
			}
		}},
		"stops within a frame": {"stalled", 22 * time.Second, 31 * time.Second, func(r *raw) { r.write(r.frame(0, "x")[:50]) }},
		"stops after a frame":  {"idle", 7 * time.Minute, 11 * time.Minute, func(r *raw) { r.write(r.frame(0, "x")) }},
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
				to := receive(t, b, b.IP(), true, new(inbox).add)
				r := dialRaw(t, a, to)
				start := time.Now()
				c.send(r)
				r.closed()
				if d := time.Since(start); d < c.min || d > c.max || refusals(to, c.reason) != 1 {
					t.Errorf("closed after %v, counted %d times as %s", d, refusals(to, c.reason), c.reason)
				}
			})
		})
	}
}

// A message that only wants to have been received is acknowledged before its
// handler runs.
func TestAckBeforeDeliver(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		gate := make(chan struct{})
		to := receive(t, b, b.IP(), true, func(context.Context, *channel.Message) error {
			<-gate
			return errors.New("is not told to anybody")
		})
		r := dialRaw(t, a, to)
		r.write(r.frame(channel.SendNone, "nothing comes for this"), r.frame(channel.SendAck, "1"), r.frame(channel.SendAck, "2"))
		if got := r.acks(2); got != "++" {
			t.Errorf("got %q", got)
		}
		r.silent(time.Second)
		close(gate)
		r.silent(time.Second)
	})
}

// A message that wants to be processed is acknowledged after its handler, also
// while the next one of the same read is still in its own.
func TestAckAfterDeliver(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		gate := make(chan struct{})
		to := receive(t, b, b.IP(), true, func(_ context.Context, m *channel.Message) error {
			switch string(m.Body) {
			case "fail":
				return errors.New("no")
			case "panic":
				panic("on purpose")
			case "wait":
				<-gate
			}
			return nil
		})
		r := dialRaw(t, a, to)
		sync := channel.SendSyncAck
		r.write(r.frame(sync, "ok"), r.frame(sync, "fail"), r.frame(channel.SendAck, "fail"), r.frame(sync, "panic"), r.frame(sync, "wait"), r.frame(sync, "ok"))
		if got := r.acks(4); got != "+-+-" {
			t.Errorf("got %q", got)
		}
		r.silent(5 * time.Second)
		close(gate)
		if got := r.acks(2); got != "++" {
			t.Errorf("got %q", got)
		}
		if n := value(to.metrics, "channel_receive_panics_total"); n != 1 {
			t.Errorf("%d panics counted", n)
		}
		if n := value(to.metrics, "channel_receive_negative_total"); n != 2 {
			t.Errorf("%d negative acknowledgements counted", n)
		}
	})
}

// Deferred messages end in any order; their acknowledgements keep the order of
// the messages.
func TestDeferredAcks(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		ends := map[string]func(error){}
		var kept channel.Deferrer
		to := receive(t, b, b.IP(), true, func(_ context.Context, m *channel.Message) error {
			if body := string(m.Body); body != "now" {
				ends[body] = m.Defer()
				if m.Later != nil {
					kept = m.Later
				}
			}
			return errors.New("is ignored for deferred ones")
		})
		r := dialRaw(t, a, to)
		sync := channel.SendSyncAck
		r.write(r.frame(sync, "a"), r.frame(sync, "b"), r.frame(channel.SendAck, "now"), r.frame(sync, "c"), r.frame(sync, "now"), r.frame(channel.SendNone, "d"))
		r.silent(time.Second)
		synctest.Wait()
		if len(ends) != 4 {
			t.Fatalf("the reader did not go on: %d messages deferred", len(ends))
		}
		ends["d"](errors.New("nobody waits for it"))
		ends["c"](nil)
		ends["b"](errors.New("no"))
		r.silent(time.Second)
		ends["a"](nil)
		if got := r.acks(5); got != "+-++-" {
			t.Errorf("got %q", got)
		}
		ends["a"](errors.New("twice"))
		kept.Defer()(errors.New("too late"))
		r.silent(time.Second)
		if n := value(to.metrics, "channel_receive_late_defer_total"); n != 1 {
			t.Errorf("%d late calls counted", n)
		}
	})
}

// Too many deferred messages stop the reading of their connection, and for too
// long close it.
func TestMaxOutstanding(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		ends := make(chan func(error), 1000)
		to := receive(t, b, b.IP(), true, func(_ context.Context, m *channel.Message) error {
			ends <- m.Defer()
			return nil
		}, func(c *ReceiverConfig) { c.MaxOutstanding = 100 })
		r := dialRaw(t, a, to)
		for range 300 {
			r.write(r.frame(channel.SendSyncAck, "x"))
		}
		time.Sleep(time.Second)
		if len(ends) != 100 {
			t.Fatalf("%d messages deferred at a bound of 100", len(ends))
		}
		for range 100 {
			(<-ends)(nil)
		}
		r.acks(100)
		time.Sleep(time.Second)
		if len(ends) != 100 {
			t.Fatalf("%d messages deferred after the first had ended", len(ends))
		}
		r.closed()
		if refusals(to, "max_outstanding") != 1 {
			t.Error("not counted")
		}
		(<-ends)(nil) // after the connection has gone
	})
}

// Who does not read acknowledgements is disconnected, whether they are written
// by the reader or, for deferred messages, by another goroutine.
func TestAcksNotTaken(t *testing.T) {
	for name, h := range map[string]handler{
		"at once":  new(inbox).add,
		"deferred": func(_ context.Context, m *channel.Message) error { go m.Defer()(nil); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
				to := receive(t, b, b.IP(), true, h, func(c *ReceiverConfig) { c.StallTimeout = 5 * time.Second })
				r := dialRaw(t, a, to)
				f := bytes.Repeat(r.frame(channel.SendSyncAck, "x"), 100)
				var err error
				for i := 0; i < 1e6 && err == nil; i += 100 {
					_, err = r.Write(f)
				}
				time.Sleep(10 * time.Second)
				if refusals(to, "acks_not_taken") != 1 {
					t.Errorf("not counted; writing ended with %v", err)
				}
				if err == nil {
					t.Error("all could be written")
				}
			})
		})
	}
}

// A node that dies in the middle of a message: nothing of it is delivered, and
// the others notice nothing.
func TestPeerDiesWithinFrame(t *testing.T) {
	sim(t, func(t *testing.T, nw *channeltest.SimNet, a, b *channeltest.SimNode) {
		var in inbox
		to := receive(t, b, b.IP(), true, in.add)
		victim := nw.Node("10.0.0.3")
		bad, good := dialRaw(t, victim, to), dialRaw(t, a, to)
		bad.write(bad.frame(channel.SendNone, "whole"), bad.frame(channel.SendNone, "half")[:80])
		time.Sleep(time.Second)
		victim.Kill()
		eventually(t, "it is counted", func() bool { return refusals(to, "mid_frame") == 1 })
		good.write(good.frame(channel.SendSyncAck, "good"))
		good.acks(1)
		if got := in.all(); len(got) != 2 || got[0] != "whole" || got[1] != "good" {
			t.Errorf("delivered %q", got)
		}
	})
}

// A handler that does not care for its context cannot hold Stop for ever.
func TestReceiverStopGivesUp(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		gate := make(chan struct{})
		to := receive(t, b, b.IP(), true, func(context.Context, *channel.Message) error {
			<-gate
			return nil
		})
		r := dialRaw(t, a, to)
		r.write(r.frame(channel.SendSyncAck, "x"))
		time.Sleep(10 * time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if err := to.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Second+stopGrace {
			t.Errorf("Stop returned %v after %v", err, time.Since(start))
		}
		close(gate)
	})
}

func TestAutoAddress(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		for _, address := range []string{AutoAddress, "0.0.0.0"} {
			to := receive(t, b, address, true, new(inbox).add)
			if to.member.Host != b.Addr() {
				t.Errorf("%s announces %v, want %v", address, to.member.Host, b.Addr())
			}
			r := dialRaw(t, a, to)
			r.write(r.frame(channel.SendAck, "x"))
			r.acks(1)
		}
	})
}

// Unfinished messages of all connections share one bound.
func TestMaxBuffered(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		to := receive(t, b, b.IP(), true, new(inbox).add, func(c *ReceiverConfig) {
			c.MaxFrame, c.MaxBuffered = 1<<20, 3<<20
		})
		for range 10 {
			r := dialRaw(t, a, to)
			f := r.frame(0, strings.Repeat("x", 900_000))
			r.Write(f[:len(f)-1]) // a refusal may come before its end
		}
		time.Sleep(time.Second)
		if n := refusals(to, "max_buffered"); n < 5 || n > 8 {
			t.Errorf("%d of 10 connections were refused", n)
		}
		if n := value(to.metrics, "channel_receive_buffered_bytes"); n > 3<<20 {
			t.Errorf("%d bytes are held", n)
		}
	})
}

func TestReceiverStop(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		ctxErr := make(chan error, 1)
		to := receive(t, b, b.IP(), true, func(ctx context.Context, m *channel.Message) error {
			if string(m.Body) == "stubborn" {
				<-ctx.Done()
				ctxErr <- ctx.Err()
				return nil
			}
			time.Sleep(time.Second)
			return nil
		})
		idle, busy := dialRaw(t, a, to), dialRaw(t, a, to)
		idle.write(idle.frame(channel.SendNone, "x"))
		busy.write(busy.frame(channel.SendSyncAck, "x"))
		time.Sleep(100 * time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		start := time.Now()
		if err := to.Stop(ctx); err != nil || time.Since(start) < 800*time.Millisecond || time.Since(start) > 2*time.Second {
			t.Errorf("Stop returned %v after %v; the handler takes a second", err, time.Since(start))
		}
		if got := busy.acks(1); got != "+" {
			t.Errorf("the message in progress got %q", got)
		}
		busy.closed()
		idle.closed()
		stop(t, to)
		if _, err := channel.Dial(t.Context(), a, to.member.Addr()); err == nil {
			t.Error("the port still accepts")
		}

		to = receive(t, b, b.IP(), true, to.deliver)
		r := dialRaw(t, a, to)
		r.write(r.frame(channel.SendNone, "stubborn"))
		synctest.Wait()
		time.Sleep(10 * time.Millisecond)
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start = time.Now()
		if err := to.Stop(short); err != nil || time.Since(start) != time.Second {
			t.Errorf("Stop returned %v after %v", err, time.Since(start))
		}
		if err := <-ctxErr; !errors.Is(err, context.Canceled) {
			t.Errorf("the handler's context ended with %v", err)
		}
	})
}

func TestListen(t *testing.T) {
	n := realNet(t)
	listen := func(address string, port, auto int) (*Receiver, netip.AddrPort, error) {
		c := DefaultReceiverConfig()
		c.Address, c.Port, c.AutoBind = address, port, auto
		r := NewReceiver(c, channel.Settings{Net: n})
		addr, err := r.Listen(t.Context())
		t.Cleanup(func() { stop(t, r) })
		return r, addr, err
	}
	_, first, err := listen("127.0.0.1", 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	_, second, err := listen("127.0.0.1", int(first.Port()), 50)
	if err != nil || second.Port() <= first.Port() || second.Addr() != first.Addr() {
		t.Errorf("next to %v: %v, %v", first, second, err)
	}
	if _, _, err := listen("127.0.0.1", int(first.Port()), 1); err == nil || !channel.IsAddrInUse(err) || !strings.Contains(err.Error(), "auto_bind") {
		t.Errorf("on a taken port: %v", err)
	}
	if _, addr, err := listen("auto", 0, 1); err != nil || !addr.Addr().Is4() || addr.Addr().IsUnspecified() {
		t.Errorf("auto: %v, %v", addr, err)
	}
	if _, addr, err := listen("0.0.0.0", 0, 1); err != nil || addr.Addr().IsUnspecified() {
		t.Errorf("all addresses: announces %v, %v", addr, err)
	}
	if _, _, err := listen("192.0.2.77", 0, 1); err == nil {
		t.Error("a foreign address was bound")
	}
	r := NewReceiver(DefaultReceiverConfig(), channel.Settings{Net: n})
	if err := r.Start(t.Context(), nil); err == nil {
		t.Error("Start worked without Listen")
	}
}

// A flood of refusals is counted in full and logged now and then.
func TestRefusalsAreLoggedSparingly(t *testing.T) {
	sim(t, func(t *testing.T, _ *channeltest.SimNet, a, b *channeltest.SimNode) {
		core, logs := observer.New(zap.WarnLevel)
		met := channel.NewMetrics()
		c := DefaultReceiverConfig()
		c.Address, c.Port = b.IP(), 0
		rec := NewReceiver(c, channel.Settings{Net: b, Metrics: met, Logger: zap.New(core)})
		addr, err := rec.Listen(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := rec.Start(t.Context(), new(inbox).add); err != nil {
			t.Fatal(err)
		}
		defer stop(t, rec)
		to := &node{rec, memberAt(addr, true), met}
		for i := range 100 {
			if i == 50 {
				time.Sleep(time.Minute)
			}
			r := dialRaw(t, a, to)
			r.write([]byte("GET / HTTP/1.1\r\nAuthorization: secret\r\n\r\n"))
			r.closed()
		}
		if n := refusals(to, "frame_marker"); n != 100 {
			t.Errorf("%d counted", n)
		}
		if logs.Len() != 2 || logs.All()[1].ContextMap()["unlogged"] != int64(49) {
			t.Errorf("%d entries, the second: %v", logs.Len(), logs.All()[logs.Len()-1].ContextMap())
		}
		for _, e := range logs.All() {
			if strings.Contains(fmt.Sprint(e.Message, e.ContextMap()), "secret") {
				t.Errorf("the log shows what was sent: %v", e.ContextMap())
			}
		}
	})
}

func TestValidate(t *testing.T) {
	r, s := DefaultReceiverConfig(), DefaultSenderConfig()
	if err := errors.Join(r.Validate(), s.Validate()); err != nil {
		t.Fatal(err)
	}
	r = ReceiverConfig{Address: "localhost", Port: 70000}
	s = SenderConfig{Retries: -1}
	for _, field := range []string{"address", "port", "auto_bind", "max_frame", "max_connections", "max_outstanding", "idle_timeout", "stall_timeout"} {
		if !strings.Contains(r.Validate().Error(), "tcp: "+field+":") {
			t.Errorf("%s is not named in %v", field, r.Validate())
		}
	}
	for _, field := range []string{"ack_timeout", "connect_timeout", "retries", "pool", "window_messages", "window_bytes", "max_frame"} {
		if !strings.Contains(s.Validate().Error(), "tcp: "+field+":") {
			t.Errorf("%s is not named in %v", field, s.Validate())
		}
	}
}
