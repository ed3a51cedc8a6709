package order

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

var a, b, c = channeltest.Member(1), channeltest.Member(2), channeltest.Member(3)

type fixture struct {
	*channeltest.Embedded
	layer   *Interceptor
	metrics *channel.Metrics
}

func start(t testing.TB, change func(*Config), below ...channel.Interceptor) *fixture {
	t.Helper()
	return startTick(t, 100*time.Millisecond, change, below...)
}

func startTick(t testing.TB, tick time.Duration, change func(*Config), below ...channel.Interceptor) *fixture {
	t.Helper()
	cfg, m := Defaults, channel.NewMetrics()
	if change != nil {
		change(&cfg)
	}
	o, err := New(cfg, channel.Settings{Metrics: m})
	if err != nil {
		t.Fatal(err)
	}
	layers := append([]channel.Interceptor{o}, below...)
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: layers, Tick: tick})
	return &fixture{e, o, m}
}

func (f *fixture) value(name string) float64 { return channeltest.Sum(f.metrics, name) }

func (f *fixture) want(t *testing.T, values map[string]float64) {
	t.Helper()
	for name, v := range values {
		if got := f.value(name); got != v {
			t.Errorf("%s is %v, want %v", name, got, v)
		}
	}
}

// receive hands message n of a member to the bottom; its body is its number.
func (f *fixture) receive(from channel.Member, n int32) error {
	return f.receiveBody(context.Background(), from, n, fmt.Sprint(n))
}

func (f *fixture) receiveBody(ctx context.Context, from channel.Member, n int32, body string) error {
	return f.Receive(ctx, &channel.Message{
		ID: channel.NewUniqueID(), From: from, Options: channel.SendNone,
		Body: binary.BigEndian.AppendUint32([]byte(body), uint32(n)),
	})
}

func (f *fixture) wantBodies(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	if got := f.Top.Bodies(); !slices.Equal(got, want) {
		t.Errorf("delivered %q, want %q", got, want)
	}
}

// ends notes how received messages end.
type ends struct {
	mu  sync.Mutex
	all map[int32]error
}

type later struct {
	e *ends
	n int32
}

func (l later) Defer() func(error) {
	return func(err error) {
		l.e.mu.Lock()
		defer l.e.mu.Unlock()
		if _, twice := l.e.all[l.n]; twice {
			panic("ended twice")
		}
		l.e.all[l.n] = err
	}
}

func (e *ends) snapshot() map[int32]error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.all)
}

// remembered returns how many members the layer keeps something of.
func (f *fixture) remembered() (numbers, senders int) {
	f.layer.mu.Lock()
	defer f.layer.mu.Unlock()
	f.layer.in.mu.Lock()
	defer f.layer.in.mu.Unlock()
	return len(f.layer.numbers), len(f.layer.in.senders)
}

func (e *ends) receive(f *fixture, n int32) error {
	return f.Receive(context.Background(), &channel.Message{
		ID: channel.NewUniqueID(), From: a, Options: channel.SendNone, Later: later{e, n},
		Body: binary.BigEndian.AppendUint32(fmt.Append(nil, n), uint32(n)),
	})
}

func TestVector(t *testing.T) {
	text, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []struct {
			Input  []struct{ BodyHex string }
			Output []struct {
				Destinations []string
				Options      channel.Options
				BodyHex      string
			}
		}
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	v := file.Vectors[0]
	f, r := start(t, nil), start(t, nil)
	ports := map[string]channel.Member{"tcp://{127, 0, 0, 1}:4002": a, "tcp://{127, 0, 0, 1}:4003": b}
	var inputs []string
	for _, in := range v.Input {
		body, err := hex.DecodeString(in.BodyHex)
		if err != nil {
			t.Fatal(err)
		}
		inputs = append(inputs, string(body))
		if err := f.Send(t.Context(), []channel.Member{a, b}, body, channel.ByteMessage); err != nil {
			t.Fatal(err)
		}
	}
	sent := f.Bottom.Messages()
	if len(sent) != len(v.Output) {
		t.Fatalf("%d messages sent, want %d", len(sent), len(v.Output))
	}
	for i, out := range v.Output {
		body, err := hex.DecodeString(out.BodyHex)
		if err != nil {
			t.Fatal(err)
		}
		m := sent[i]
		if len(m.To) != 1 || m.To[0] != ports[out.Destinations[0]] || !bytes.Equal(m.Body, body) || m.Options != out.Options {
			t.Errorf("message %d to %v is %x, want %x to %v", i, m.To, m.Body, body, out.Destinations)
		}
		if m.To[0] == a {
			m.To, m.From = nil, a
			if err := r.Receive(t.Context(), &m); err != nil {
				t.Error(err)
			}
		}
	}
	if got := r.Top.Bodies(); !slices.Equal(got, inputs) {
		t.Errorf("delivered %q", got)
	}
}

// In whatever order they come, the messages of each sender are delivered in
// order, once, without loss.
func TestAnyOrderProperty(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			f := start(t, nil)
			type piece struct {
				from channel.Member
				n    int32
			}
			var all []piece
			for i := range rapid.IntRange(1, 3).Draw(r, "senders") {
				for n := range rapid.IntRange(0, 40).Draw(r, "messages") {
					all = append(all, piece{channeltest.Member(i + 1), int32(n + 1)})
				}
			}
			for _, x := range rapid.Permutation(all).Draw(r, "order") {
				if err := f.receive(x.from, x.n); err != nil {
					r.Fatal(err)
				}
			}
			synctest.Wait()
			last := map[channel.Member]string{}
			for _, m := range f.Top.Messages() {
				var before int
				_, _ = fmt.Sscan(last[m.From], &before)
				if string(m.Body) != fmt.Sprint(before+1) {
					r.Fatalf("%s after %d", m.Body, before)
				}
				last[m.From] = string(m.Body)
			}
			if n := len(f.Top.Messages()); n != len(all) || f.value("order_waiting_bytes") != 0 {
				r.Fatalf("%d of %d delivered, %v bytes wait", n, len(all), f.value("order_waiting_bytes"))
			}
		})
	})
}

// swapper is a layer that swaps every pair of messages on their way up.
type swapper struct {
	mu   sync.Mutex
	kept map[channel.UniqueID]*channel.Message
}

func (s *swapper) Descriptor() channel.Descriptor {
	return channel.Descriptor{Name: "swapper", Stateful: true}
}

func (s *swapper) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	x := channeltest.Clone(m)
	s.mu.Lock()
	first := s.kept[m.From.ID]
	if first == nil {
		s.kept[m.From.ID] = &x
	} else {
		delete(s.kept, m.From.ID)
	}
	s.mu.Unlock()
	if first == nil {
		return nil
	}
	return errors.Join(l.Deliver(ctx, &x), l.Deliver(ctx, first))
}

// A stack that swaps every pair still delivers in order: 100 messages of one
// goroutine, and 500 of five whose own order the sending fixes.
func TestEveryPairSwapped(t *testing.T) {
	for _, senders := range []int{1, 5} {
		synctest.Test(t, func(t *testing.T) {
			r := start(t, nil, &swapper{kept: map[channel.UniqueID]*channel.Message{}})
			s := start(t, nil)
			s.OnSend(func(ctx context.Context, m *channel.Message) error {
				x := channeltest.Clone(m)
				x.From, x.To, x.Options = a, nil, channel.SendNone
				return r.Receive(ctx, &x)
			})
			var mu sync.Mutex
			var sent []string
			turn := make(chan struct{}, 1)
			var wg sync.WaitGroup
			for w := range senders {
				wg.Go(func() {
					for i := range 100 {
						turn <- struct{}{}
						body := fmt.Sprint(w, "/", i)
						mu.Lock()
						sent = append(sent, body)
						mu.Unlock()
						if err := s.Send(t.Context(), []channel.Member{b}, []byte(body), channel.SendAck); err != nil {
							t.Error(err)
						}
						<-turn
					}
				})
			}
			wg.Wait()
			r.wantBodies(t, sent...)
		})
	}
}

// Many goroutines send at once; what reaches the wire in some other order than
// its numbers is delivered by the numbers, each goroutine's in order.
func TestConcurrentSenders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := start(t, nil), start(t, nil)
		s.OnSend(func(ctx context.Context, m *channel.Message) error {
			x := channeltest.Clone(m)
			if n := x.Body[len(x.Body)-1]; n%3 == 0 {
				time.Sleep(time.Duration(n) * time.Millisecond)
			}
			x.From, x.To, x.Options = a, nil, channel.SendNone
			return r.Receive(ctx, &x)
		})
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for i := range 100 {
					if err := s.Send(t.Context(), []channel.Member{b}, fmt.Appendf(nil, "%d %d", w, i), channel.SendAck); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		var next [8]int
		for _, body := range r.Top.Bodies() {
			var w, i int
			if _, err := fmt.Sscan(body, &w, &i); err != nil || i != next[w] {
				t.Fatalf("%q, goroutine %d is at %d", body, w, next[w])
			}
			next[w]++
		}
		if n := len(r.Top.Messages()); n != 800 {
			t.Errorf("%d delivered", n)
		}
		r.want(t, map[string]float64{"order_late_total": 0, "order_expired_total": 0})
	})
}

// Every destination has numbers and a body of its own, whatever a layer below
// does to it.
func TestDestinationsAreApart(t *testing.T) {
	twist := channel.Transform(channel.Descriptor{Name: "twist", Flag: 0x1000, Mutates: true}, func(m *channel.Message) error {
		m.Body = append([]byte("twisted "), m.Body...)
		m.Options |= 0x1000
		return nil
	}, func(m *channel.Message) error {
		m.Body = bytes.TrimPrefix(m.Body, []byte("twisted "))
		return nil
	})
	f := start(t, nil, twist)
	for _, to := range [][]channel.Member{{a, b, c}, {b}, {a, c}} {
		if err := f.Send(t.Context(), to, []byte("body"), channel.SendAck); err != nil {
			t.Fatal(err)
		}
	}
	numbers := map[channel.Member]uint32{}
	for _, m := range f.Bottom.Messages() {
		numbers[m.To[0]]++
		want := binary.BigEndian.AppendUint32([]byte("twisted body"), numbers[m.To[0]])
		if len(m.To) != 1 || !bytes.Equal(m.Body, want) {
			t.Errorf("to %v: %q, want %q", m.To, m.Body, want)
		}
	}
	if len(f.Bottom.Messages()) != 6 {
		t.Errorf("%d messages sent", len(f.Bottom.Messages()))
	}
}

func TestGap(t *testing.T) {
	for _, forward := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			f, e := start(t, func(c *Config) { c.ForwardExpired = forward }), &ends{all: map[int32]error{}}
			f.Top.Reply = func(m *channel.Message) (bool, error) {
				if string(m.Body) == "5" {
					return false, channel.ErrNotMember
				}
				return true, nil
			}
			for _, n := range []int32{1, 3, 5, 4} { // 2 is missing
				if err := e.receive(f, n); err != nil {
					t.Error(err)
				}
			}
			f.wantBodies(t, "1")
			f.want(t, map[string]float64{"order_waiting_messages": 3, "order_early_total": 3})
			time.Sleep(2900 * time.Millisecond)
			f.wantBodies(t, "1")
			if ended := e.snapshot(); len(ended) != 0 {
				t.Errorf("ended before they were delivered: %v", ended)
			}
			time.Sleep(200 * time.Millisecond)
			if forward {
				f.wantBodies(t, "1", "3", "4", "5")
				if all := e.snapshot(); all[3] != nil || all[4] != nil || !errors.Is(all[5], channel.ErrNotMember) || len(all) != 3 {
					t.Errorf("ended with %v", all)
				}
			} else {
				f.wantBodies(t, "1", "4", "5")
				if all := e.snapshot(); !errors.Is(all[3], errGap) || all[4] != nil || f.value("order_dropped_total") != 1 {
					t.Errorf("ended with %v", all)
				}
			}
			f.want(t, map[string]float64{"order_waiting_messages": 0, "order_waiting_bytes": 0, "order_expired_total": 1})
			// The missing one comes after all.
			if err := f.receive(a, 2); err != nil {
				t.Error(err)
			}
			if got := f.Top.Bodies(); got[len(got)-1] != "2" || f.value("order_late_total") != 1 {
				t.Errorf("delivered %q", got)
			}
			if err := f.receive(a, 6); err != nil {
				t.Error(err)
			}
			if got := f.Top.Bodies(); got[len(got)-1] != "6" {
				t.Errorf("delivered %q", got)
			}
		})
	}
}

// Expiry is also noticed when the next message comes, without any tick.
func TestExpiryWithoutTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, err := New(Defaults, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		f := &fixture{channeltest.Embed(t, o), o, nil}
		_ = f.receive(a, 2)
		time.Sleep(3 * time.Second)
		_ = f.receive(a, 3)
		f.wantBodies(t, "2", "3")
	})
}

func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, func(c *Config) { c.MaxQueue, c.QueueSize, c.TotalSize = 5, 4000, 6000 })
		for n := int32(2); n <= 7; n++ { // 1 is missing; the sixth early one finds no room
			_ = f.receive(a, n)
		}
		f.wantBodies(t, "2", "3", "4", "5", "6", "7")
		f.want(t, map[string]float64{"order_overflow_total": 1, "order_waiting_bytes": 0})
		f = start(t, func(c *Config) { c.MaxQueue, c.QueueSize, c.TotalSize = 5, 4000, 6000 })
		big := strings.Repeat("x", 3000)
		_ = f.receiveBody(t.Context(), a, 2, big)
		_ = f.receiveBody(t.Context(), a, 3, big) // too large together: 2 waits no longer
		synctest.Wait()
		if n := len(f.Top.Messages()); n != 2 {
			t.Errorf("%d delivered", n)
		}
		_ = f.receiveBody(t.Context(), a, 9, big)
		_ = f.receiveBody(t.Context(), b, 2, big) // no room in total, and nothing of its own to give up
		synctest.Wait()
		if got := f.Top.Messages(); len(got) != 3 || got[2].From != b {
			t.Errorf("%d delivered", len(got))
		}
	})
}

// While a listener is slow, later messages wait, and when there is no more room
// their connection does.
func TestSlowListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, func(c *Config) { c.MaxQueue = 3 })
		gate := make(chan struct{})
		f.Top.Reply = func(*channel.Message) (bool, error) { <-gate; return true, nil }
		go func() { _ = f.receive(a, 1) }()
		synctest.Wait()
		for n := int32(2); n <= 4; n++ {
			_ = f.receive(a, n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := f.receiveBody(ctx, a, 5, "5"); !errors.Is(err, channel.ErrQueueFull) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("there was no room: %v", err)
		}
		go func() { _ = f.receive(a, 5) }()
		go func() { _ = f.receive(b, 1) }() // another sender waits for nobody
		synctest.Wait()
		if got := f.Top.Messages(); len(got) != 2 || got[1].From != b {
			t.Errorf("%d at the listener", len(got))
		}
		close(gate)
		synctest.Wait()
		var of []string
		for _, m := range f.Top.Messages() {
			if m.From == a {
				of = append(of, string(m.Body))
			}
		}
		if !slices.Equal(of, []string{"1", "2", "3", "4", "5"}) {
			t.Errorf("delivered %q", of)
		}
		f.want(t, map[string]float64{"order_expired_total": 0, "order_overflow_total": 0, "order_waiting_bytes": 0})
	})
}

func TestRestartOfASender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, nil)
		// A new incarnation has a new id, and a state of its own.
		for n := int32(1); n <= 3; n++ {
			_ = f.receive(a, n)
		}
		_ = f.receive(b, 1)
		f.wantBodies(t, "1", "2", "3", "1")
		// The same one counts anew, after it has lost us for a moment; what is
		// still waiting goes first.
		_ = f.receive(a, 5)
		_ = f.receive(a, 1)
		_ = f.receive(a, 3)
		_ = f.receive(a, 2)
		f.wantBodies(t, "1", "2", "3", "1", "5", "1", "2", "3")
		f.want(t, map[string]float64{"order_restarts_total": 1, "order_late_total": 0, "order_waiting_messages": 0})
		// The first message twice is no restart.
		m := &channel.Message{ID: channel.UniqueID{7}, From: c, Options: channel.SendNone}
		for range 2 {
			m.Body = binary.BigEndian.AppendUint32([]byte("c"), 1)
			_ = f.Receive(t.Context(), m)
		}
		_ = f.receive(c, 2)
		f.want(t, map[string]float64{"order_restarts_total": 1, "order_late_total": 1, "order_waiting_messages": 0})
		// Whoever starts in the middle is waited for once, and understood then.
		d := channeltest.Member(4)
		_ = f.receive(d, 100)
		time.Sleep(4 * time.Second)
		for n := int32(20); n < 60; n++ { // counts anew, and its first messages were lost
			_ = f.receive(d, n)
		}
		_ = f.receive(d, 61)
		_ = f.receive(d, 60)
		synctest.Wait()
		if got := f.Top.Bodies(); !slices.Equal(got[len(got)-3:], []string{"59", "60", "61"}) {
			t.Errorf("delivered %q", got)
		}
		f.want(t, map[string]float64{"order_restarts_total": 2, "order_late_total": 1 + resync - 1})
	})
}

func TestNumbersWrapAround(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, nil)
		_ = f.receive(a, math.MaxInt32-2)
		time.Sleep(4 * time.Second)
		for _, n := range []int32{math.MinInt32, math.MaxInt32, math.MinInt32 + 1, math.MaxInt32 - 1} {
			_ = f.receive(a, n)
		}
		f.wantBodies(t, "2147483645", "2147483646", "2147483647", "-2147483648", "-2147483647")
	})
}

// Numbers that somebody made up do no lasting harm.
func TestHostileNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, nil)
		for _, n := range []int32{0, -1, math.MinInt32, math.MaxInt32, 1 << 20} {
			_ = f.receive(a, n)
		}
		if err := f.ReceiveBody(a, channel.SendAck, "123"); !errors.Is(err, channel.ErrBadMessage) || f.value("order_refused_total") != 1 {
			t.Errorf("no number: %v", err)
		}
		time.Sleep(10 * time.Second)
		for n := int32(1); n <= 100; n++ {
			_ = f.receive(a, n)
		}
		synctest.Wait()
		if n := len(f.Top.Messages()); n != 105 {
			t.Errorf("%d delivered", n)
		}
		_ = f.receive(a, 102)
		_ = f.receive(a, 101)
		synctest.Wait()
		if got := f.Top.Bodies(); !slices.Equal(got[len(got)-2:], []string{"101", "102"}) {
			t.Errorf("in the end %q", got[len(got)-2:])
		}
	})
}

func TestMembersComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startTick(t, 10*time.Second, nil)
		last := func() int {
			m := f.Bottom.Messages()
			return int(binary.BigEndian.Uint32(m[len(m)-1].Body[1:]))
		}
		send := func(want int) {
			t.Helper()
			if err := f.Send(t.Context(), []channel.Member{a}, []byte("x"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
			if got := last(); got != want {
				t.Errorf("number %d, want %d", got, want)
			}
		}
		f.Observe(channel.MemberAdded, a)
		synctest.Wait()
		send(1)
		send(2)
		f.Observe(channel.MemberLost, a)
		synctest.Wait()
		send(1)
		for i := range maxPeers + 10 {
			m := channeltest.Member(i + 10)
			if err := f.Send(t.Context(), []channel.Member{m}, []byte("x"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
			_ = f.receive(m, 1)
		}
		if n, m := f.remembered(); n > maxPeers || m > maxPeers {
			t.Errorf("%d and %d members remembered", n, m)
		}
		time.Sleep(time.Hour)
		if n, m := f.remembered(); n != 0 || m != 0 {
			t.Errorf("after an hour, %d and %d members remembered", n, m)
		}
	})
}

// A sender with messages that wait is not forgotten for others; those are
// delivered as they come.
func TestTooManySendersWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, nil)
		for i := range maxPeers + 1 {
			_ = f.receive(channeltest.Member(i+1), 2)
		}
		f.want(t, map[string]float64{"order_untracked_total": 1, "order_waiting_messages": maxPeers})
		if n := len(f.Top.Messages()); n != 1 {
			t.Errorf("%d delivered", n)
		}
	})
}

// A number whose message never left is used again.
func TestWithdrawnNumbers(t *testing.T) {
	f := start(t, nil)
	for i, cause := range []error{channel.ErrQueueFull, channel.ErrTooLarge, channel.ErrDisconnected, channel.ErrQueueFull} {
		f.OnSend(func(_ context.Context, m *channel.Message) error { return channel.Failed(m.To, cause) })
		if err := f.Send(t.Context(), []channel.Member{a}, nil, channel.SendAck); !errors.Is(err, cause) {
			t.Errorf("%d: %v", i, err)
		}
	}
	f.OnSend(nil)
	if err := f.Send(t.Context(), []channel.Member{a}, nil, channel.SendAck); err != nil {
		t.Error(err)
	}
	m := f.Bottom.Messages()
	if n := binary.BigEndian.Uint32(m[len(m)-1].Body); n != 2 || f.value("order_withdrawn_total") != 3 {
		t.Errorf("the last number is %d; %v withdrawn", n, f.value("order_withdrawn_total"))
	}
}

func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, func(c *Config) { c.ForwardExpired = false })
		for _, n := range []int32{9, 3, 5} {
			_ = f.receive(a, n)
			_ = f.receive(b, n)
		}
		if err := f.layer.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if n := len(f.Top.Messages()); n != 6 {
			t.Errorf("%d of 6 delivered", n)
		}
		_ = f.receive(a, 11)
		synctest.Wait()
		if n := len(f.Top.Messages()); n != 6 {
			t.Error("after a flush nothing waits any more")
		}
	})
}

// What still waits when the channel stops is delivered before.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, err := New(Defaults, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{Layers: []channel.Interceptor{o}})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		f := &fixture{e, o, nil}
		_ = f.receive(a, 3)
		_ = f.receive(a, 2)
		if err := e.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		f.wantBodies(t, "2", "3")
	})
}

// With an option flag only the messages that have it are numbered.
func TestOptionFlag(t *testing.T) {
	const flag = 0x800
	f := start(t, func(c *Config) { c.OptionFlag = flag })
	for _, o := range []channel.Options{channel.SendAck, channel.SendAck | flag} {
		if err := f.Send(t.Context(), []channel.Member{a}, []byte("x"), o); err != nil {
			t.Fatal(err)
		}
		m := f.Bottom.Messages()[len(f.Bottom.Messages())-1]
		if want := map[bool]int{false: 1, true: 5}[o&flag != 0]; len(m.Body) != want {
			t.Errorf("options %v: %x", o, m.Body)
		}
		m.From, m.To, m.Options = a, nil, m.Options&^channel.UseAck
		if err := f.Receive(t.Context(), &m); err != nil {
			t.Error(err)
		}
	}
	if got := f.Top.Bodies(); !slices.Equal(got, []string{"x", "x"}) {
		t.Errorf("%q", got)
	}
	if d := f.layer.Descriptor(); d.Flag != flag || len(d.Provides) != 0 {
		t.Errorf("%+v", d)
	}
}

func TestConfig(t *testing.T) {
	for word, change := range map[string]func(*Config){
		"expire is 0s":       func(c *Config) { c.Expire = 0 },
		"option_flag is 0x3": func(c *Config) { c.OptionFlag = 3 },
		"max_queue is 0":     func(c *Config) { c.MaxQueue = 0 },
		"queue_size is 0":    func(c *Config) { c.QueueSize = 0 },
		"total_size is 1":    func(c *Config) { c.TotalSize = 1 },
	} {
		c := Defaults
		change(&c)
		if _, err := New(c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
}

// FuzzNumbers delivers messages with the numbers of the input. All are
// delivered once, and nothing is left.
func FuzzNumbers(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, 0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff})
	f.Add([]byte{0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, numbers []byte) {
		x := start(t, func(c *Config) { c.MaxQueue, c.QueueSize, c.TotalSize = 8, 4000, 4000 })
		count := 0
		for ; len(numbers) >= 4; numbers = numbers[4:] {
			if err := x.receiveBody(t.Context(), a, int32(binary.BigEndian.Uint32(numbers)), fmt.Sprint(count)); err != nil {
				t.Fatal(err)
			}
			count++
		}
		if err := x.layer.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, body := range x.Top.Bodies() {
			if seen[body] {
				t.Fatalf("message %s was delivered twice", body)
			}
			seen[body] = true
		}
		if len(seen) != count || x.value("order_waiting_bytes") != 0 || x.value("order_waiting_messages") != 0 {
			t.Fatalf("%d of %d delivered, %v bytes left", len(seen), count, x.value("order_waiting_bytes"))
		}
	})
}

func BenchmarkOrder(bm *testing.B) {
	for _, size := range []int{128, 1024, 10240} {
		o, err := New(Defaults, channel.Settings{})
		if err != nil {
			bm.Fatal(err)
		}
		e := channeltest.EmbedWith(bm, channeltest.EmbedConfig{Layers: []channel.Interceptor{o}, Discard: true})
		body := make([]byte, size)
		for _, to := range [][]channel.Member{{a}, {a, b, c}} {
			bm.Run(fmt.Sprintf("send/%d/%d", len(to), size), func(bm *testing.B) {
				bm.ReportAllocs()
				for bm.Loop() {
					if err := e.Send(context.Background(), to, body, channel.SendAck); err != nil {
						bm.Fatal(err)
					}
				}
			})
		}
		bm.Run(fmt.Sprintf("receive/%d", size), func(bm *testing.B) {
			m := channel.Message{From: a, Options: channel.SendNone}
			packed := append(bytes.Clone(body), 0, 0, 0, 0)
			var n uint32
			bm.ReportAllocs()
			for bm.Loop() {
				n++
				binary.BigEndian.PutUint32(packed[size:], n)
				m.Body = packed
				if err := e.Receive(context.Background(), &m); err != nil {
					bm.Fatal(err)
				}
			}
		})
	}
}
