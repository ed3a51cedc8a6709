package frame

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestReaderRoundTrip(t *testing.T) {
	var stream []byte
	var want []Frame
	for i, n := range []int{0, 1, 100, chunkSize - HeaderSize, chunkSize, 3 * chunkSize, 5} {
		h := Header{Seq: uint64(i) << 40, Kind: uint8(i), Verdict: Replace, Flags: FlagReply, Options: 0xdeadbeef}
		p := bytes.Repeat([]byte{byte(i)}, n)
		stream = Append(stream, h, p[:n/2], p[n/2:])
		want = append(want, Frame{h, p})
	}
	for name, r := range map[string]io.Reader{"whole": bytes.NewReader(stream), "bytes": iotest.OneByteReader(bytes.NewReader(stream))} {
		fr := NewReader(r, DefaultMaxFrame)
		var got []Frame
		for {
			f, err := fr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(name, err)
			}
			got = append(got, f)
		}
		// Compared at the end: no frame may have been written over.
		if !slices.EqualFunc(got, want, func(a, b Frame) bool { return a.Header == b.Header && bytes.Equal(a.Payload, b.Payload) }) {
			t.Errorf("%s: frames differ", name)
		}
	}
}

func TestReaderRefusesLengths(t *testing.T) {
	for _, n := range []uint32{0, minLength - 1, 1001, 1 << 31, 1<<32 - 1} {
		_, err := NewReader(bytes.NewReader(binary.BigEndian.AppendUint32(nil, n)), 1000).Next()
		if !errors.Is(err, ErrProtocol) {
			t.Errorf("length %d: %v", n, err)
		}
	}
	whole := Append(nil, Header{}, make([]byte, 50))
	for cut := 1; cut < len(whole); cut++ {
		if _, err := NewReader(bytes.NewReader(whole[:cut]), 1000).Next(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add(Append(Append(nil, Header{Seq: 1, Kind: 2}, []byte("x")), Header{Flags: FlagEvent}))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := NewReader(bytes.NewReader(b), 4096)
		var again []byte
		for {
			fr, err := r.Next()
			if err != nil {
				break
			}
			if len(fr.Payload) > 4096 {
				t.Fatal("over the bound")
			}
			again = Append(again, fr.Header, fr.Payload)
		}
		if !bytes.HasPrefix(b, again) {
			t.Error("frames do not encode to what was read")
		}
	})
}

// handler serves with functions.
type handler struct {
	call  func(r *Request)
	event func(f Frame) error
}

func (h handler) HandleCall(r *Request) { h.call(r) }
func (h handler) HandleEvent(f Frame) error {
	if h.event == nil {
		return nil
	}
	return h.event(f)
}

// silent never answers.
var silent = handler{call: func(*Request) {}}

// echo answers with the payload.
var echo = handler{call: func(r *Request) { _ = r.Reply(Replace, r.Options, r.Payload) }}

// pair connects calls to a peer served by h, and returns the near connection
// and a function that ends both.
func pair(calls *Calls, h Handler, near, far Config) (*Conn, func()) {
	a, b := net.Pipe()
	peer := NewCalls(CallsConfig{})
	nc, fc := NewConn(a, calls, silent, near), NewConn(b, peer, h, far)
	return nc, func() {
		nc.Close(ErrClosed)
		fc.Close(ErrClosed)
		nc.Wait()
		fc.Wait()
	}
}

func TestCallsAndOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := NewCalls(CallsConfig{})
		c, end := pair(calls, echo, Config{}, Config{})
		defer end()
		calls.Attach(c)
		f, err := calls.Call(t.Context(), 9, 77, []byte("he"), []byte("llo"))
		if err != nil || string(f.Payload) != "hello" || f.Options != 77 || f.Kind != 9 {
			t.Fatalf("%+v, %v", f, err)
		}
		var got []string
		var mu sync.Mutex
		for i := range 3000 { // more than the window
			err := calls.Go(t.Context(), func(f Frame, err error) {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, string(f.Payload))
			}, 1, 0, fmt.Append(nil, i))
			if err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		for i, s := range got {
			if s != fmt.Sprint(i) {
				t.Fatalf("answer %d is %s", i, s)
			}
		}
		if len(got) != 3000 || calls.InFlight() != 0 {
			t.Errorf("%d answers, %d in flight", len(got), calls.InFlight())
		}
		if _, err := calls.Call(t.Context(), 1, 0, make([]byte, DefaultMaxFrame)); !errors.Is(err, channel.ErrTooLarge) {
			t.Errorf("too large: %v", err)
		}
	})
}

func TestReplayKeepsOrderAndContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		replays := new(channel.Counter)
		calls := NewCalls(CallsConfig{Replays: replays})
		c, end := pair(calls, silent, Config{}, Config{})
		calls.Attach(c)

		var got []string
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		note := func(name string) func(Frame, error) {
			return func(_ Frame, err error) {
				got = append(got, fmt.Sprint(name, " ", errors.Is(err, channel.ErrPluginDown), err == nil))
			}
		}
		for _, name := range []string{"a", "b"} {
			if err := calls.Go(t.Context(), note(name), 1, 0, []byte(name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := calls.Go(short, note("short"), 1, 0, []byte("short")); err != nil {
			t.Fatal(err)
		}
		bound := make(chan error, 1)
		go func() {
			_, err := calls.CallOn(t.Context(), c, 2, 0)
			bound <- err
		}()
		synctest.Wait()
		end()
		if err := <-bound; !errors.Is(err, channel.ErrPluginDown) {
			t.Errorf("a bound call ended with %v", err)
		}
		if _, err := calls.CallOn(t.Context(), c, 2, 0); !errors.Is(err, channel.ErrPluginDown) {
			t.Errorf("a call on a dead connection ended with %v", err)
		}
		if err := calls.Go(t.Context(), note("late"), 1, 0, []byte("late")); err != nil { // waits for a connection
			t.Fatal(err)
		}
		waiting, stop := context.WithTimeout(t.Context(), time.Millisecond)
		defer stop()
		if _, err := calls.Call(waiting, 1, 0); !errors.Is(err, channel.ErrPluginDown) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a call while down ended with %v", err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if fmt.Sprint(got) != "[short true false]" {
			t.Errorf("before the successor: %q", got)
		}

		var seen []string
		c, end = pair(calls, handler{call: func(r *Request) {
			seen = append(seen, string(r.Payload))
			_ = r.Reply(Pass, 0)
		}}, Config{}, Config{})
		defer end()
		calls.Attach(c)
		synctest.Wait()
		if fmt.Sprint(seen) != "[a b late]" || fmt.Sprint(got[1:]) != "[a false true b false true late false true]" {
			t.Errorf("the successor saw %q, callers %q", seen, got)
		}
		if replays.Value() != 2 || calls.InFlight() != 0 {
			t.Errorf("%d replays, %d in flight", replays.Value(), calls.InFlight())
		}
	})
}

func TestPoisonIsNotReplayedForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := NewCalls(CallsConfig{MaxReplays: 2})
		result := make(chan error, 1)
		go func() {
			_, err := calls.Call(t.Context(), 1, 0)
			result <- err
		}()
		for i := range 4 {
			c, end := pair(calls, silent, Config{}, Config{})
			calls.Attach(c)
			synctest.Wait()
			if ended := len(result) == 1; ended != (i == 3) {
				t.Errorf("connection %d: ended %v", i, ended)
			}
			end()
		}
		if err := <-result; !errors.Is(err, channel.ErrPluginDown) {
			t.Error(err)
		}
	})
}

func TestWindowHoldsCallersBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := new(channel.Counter)
		calls := NewCalls(CallsConfig{Window: 2, WindowBytes: 1000, Full: full})
		var open []*Request
		c, end := pair(calls, handler{call: func(r *Request) { open = append(open, r) }}, Config{}, Config{})
		defer end()
		calls.Attach(c)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		done := func(Frame, error) {}
		for range 2 {
			if err := calls.Go(ctx, done, 1, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := calls.Go(ctx, done, 1, 0); !errors.Is(err, channel.ErrQueueFull) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("third call: %v", err)
		}
		synctest.Wait()
		_ = open[0].Reply(Pass, 0)
		_ = open[0].Reply(Pass, 0) // the second answer does not count
		if err := calls.Go(t.Context(), done, 1, 0, make([]byte, 900)); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		_ = open[1].Reply(Pass, 0)
		synctest.Wait()
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := calls.Go(ctx, done, 1, 0, make([]byte, 900)); !errors.Is(err, channel.ErrQueueFull) {
			t.Errorf("too many bytes: %v", err)
		}
		// Calls that are waited for have a window of their own.
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := calls.Call(t.Context(), 1, 0, []byte("other")); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		_ = open[3].Reply(Pass, 0)
		wg.Wait()
		open = open[:3]
		if full.Value() != 3 {
			t.Errorf("counted %d", full.Value())
		}
		// A larger call than the window goes alone.
		synctest.Wait()
		_ = open[2].Reply(Pass, 0)
		if err := calls.Go(t.Context(), done, 1, 0, make([]byte, 5000)); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if len(open) != 4 || len(open[3].Payload) != 5000 {
			t.Errorf("%d calls arrived", len(open))
		}
	})
}

func TestCancelReachesTheHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := NewCalls(CallsConfig{})
		ended := 0
		c, end := pair(calls, handler{call: func(r *Request) {
			r.Go(func(r *Request) {
				<-r.Context().Done()
				ended++
				_ = r.Reply(Pass, 0)
			})
		}}, Config{}, Config{})
		defer end()
		calls.Attach(c)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := calls.Call(ctx, 1, 0); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, channel.ErrPluginDown) {
			t.Error(err)
		}
		synctest.Wait()
		if ended != 1 || calls.InFlight() != 0 {
			t.Errorf("handlers ended: %d, in flight %d", ended, calls.InFlight())
		}
	})
}

func TestHeartbeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := NewCalls(CallsConfig{})
		c, end := pair(calls, silent, Config{Heartbeat: time.Second, HeartbeatTimeout: 5 * time.Second}, Config{})
		time.Sleep(time.Hour)
		select {
		case <-c.Done():
			t.Fatal(c.Err())
		default:
		}
		end()

		a, b := net.Pipe()
		go func() { // reads and never answers
			_, _ = io.Copy(io.Discard, b)
		}()
		c = NewConn(a, calls, silent, Config{Heartbeat: time.Second, HeartbeatTimeout: 5 * time.Second})
		began := time.Now()
		<-c.Done()
		if took := time.Since(began); !errors.Is(c.Err(), ErrSilent) || took != 5*time.Second {
			t.Errorf("ended after %v with %v", took, c.Err())
		}
		c.Wait()
		_ = b.Close()
	})
}

func TestProtocolViolationsEndTheConnection(t *testing.T) {
	reply := Header{Seq: 5, Flags: FlagReply}
	call := func(seq uint64) []byte { return Append(nil, Header{Seq: seq, Kind: 1}, make([]byte, 100)) }
	for name, stream := range map[string][]byte{
		"reply to nothing": Append(nil, reply),
		"same call twice":  append(call(1), call(1)...),
		"too many calls":   slices.Concat(call(1), call(2), call(3), call(4), call(5)),
		"too many bytes":   slices.Concat(call(1), Append(nil, Header{Seq: 2, Kind: 1}, make([]byte, 2000))),
		"huge length":      {0xff, 0xff, 0xff, 0xff},
	} {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			c := NewConn(a, NewCalls(CallsConfig{}), silent, Config{MaxInbound: 4, MaxInboundBytes: 1000})
			go func() { _, _ = b.Write(stream) }()
			<-c.Done()
			if !errors.Is(c.Err(), ErrProtocol) {
				t.Errorf("%s: %v", name, c.Err())
			}
			c.Wait()
			_ = b.Close()
		})
	}
}

func TestEventsWaitForASlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := make(chan struct{})
		events := 0
		calls := NewCalls(CallsConfig{})
		c, end := pair(calls, handler{event: func(Frame) error {
			<-slow
			events++
			return nil
		}}, Config{}, Config{})
		queued, sent := 0, make(chan struct{})
		go func() {
			defer close(sent)
			for range 20 {
				if err := c.Notify(1, 0, make([]byte, 1<<20)); err != nil {
					t.Error(err)
				}
				queued++
			}
		}()
		synctest.Wait()
		if queued < 4 || queued > 8 {
			t.Errorf("%d MiB are queued", queued)
		}
		close(slow)
		<-sent
		synctest.Wait()
		if events != 20 {
			t.Errorf("%d events", events)
		}
		end()
		if err := c.Notify(1, 0); err == nil {
			t.Error("an event was sent on a closed connection")
		}
	})
}

func TestFailAndRecover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := NewCalls(CallsConfig{})
		broken := errors.New("broken")
		waiting := make(chan error, 1)
		go func() {
			_, err := calls.Call(t.Context(), 1, 0)
			waiting <- err
		}()
		synctest.Wait()
		calls.Fail(broken)
		if err := <-waiting; err != broken {
			t.Error(err)
		}
		if _, err := calls.Call(t.Context(), 1, 0); err != broken {
			t.Error(err)
		}
		c, end := pair(calls, echo, Config{}, Config{})
		defer end()
		if _, err := calls.CallOn(t.Context(), c, 1, 0); err != nil {
			t.Errorf("a bound call must work while broken: %v", err)
		}
		calls.Attach(c)
		if _, err := calls.Call(t.Context(), 1, 0); err != nil {
			t.Error(err)
		}
	})
}

func BenchmarkCall(b *testing.B) {
	for _, size := range []int{128, 1024} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			calls := NewCalls(CallsConfig{})
			c, end := pair(calls, handler{call: func(r *Request) { _ = r.Reply(Pass, 0) }}, Config{}, Config{})
			defer end()
			calls.Attach(c)
			body := make([]byte, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			var wg sync.WaitGroup
			done := func(Frame, error) { wg.Done() }
			for b.Loop() {
				wg.Add(1)
				if err := calls.Go(b.Context(), done, 1, 0, body); err != nil {
					b.Fatal(err)
				}
			}
			wg.Wait()
		})
	}
}
