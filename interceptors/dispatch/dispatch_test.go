package dispatch

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

var a, b, c = channeltest.Member(1), channeltest.Member(2), channeltest.Member(3)

type fixture struct {
	*channeltest.Embedded
	d       *Interceptor
	metrics *channel.Metrics
	logs    *observer.ObservedLogs
}

// start makes an embedded channel with a dispatch layer; the caller stops it.
func start(t testing.TB, change func(*Config)) *fixture {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	f := &fixture{metrics: channel.NewMetrics(), logs: logs}
	cfg := Defaults
	if change != nil {
		change(&cfg)
	}
	s := channel.Settings{Metrics: f.metrics, Logger: zap.New(core)}
	var err error
	if f.d, err = New(cfg, s); err != nil {
		t.Fatal(err)
	}
	f.Embedded = channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{f.d}, Settings: s})
	return f
}

func (f *fixture) value(name string) float64 { return channeltest.Sum(f.metrics, name) }

func (f *fixture) send(to channel.Member, body string) error {
	return f.Send(context.Background(), []channel.Member{to}, []byte(body), channel.SendAsync)
}

// gate lets sends to chosen members wait.
type gate struct {
	mu     sync.Mutex
	closed map[channel.UniqueID]chan struct{}
}

func (g *gate) close(m channel.Member) (open func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed == nil {
		g.closed = map[channel.UniqueID]chan struct{}{}
	}
	ch := make(chan struct{})
	g.closed[m.ID] = ch
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.closed[m.ID] == ch {
			delete(g.closed, m.ID)
		}
		close(ch)
	}
}

func (g *gate) pass(ctx context.Context, m *channel.Message) error {
	g.mu.Lock()
	ch := g.closed[m.To[0].ID]
	g.mu.Unlock()
	if ch == nil {
		return nil
	}
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return channel.Failed(m.To, ctx.Err())
	}
}

func TestAsyncReturnsAtOnceAndKeepsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := start(t, nil), new(gate)
		f.OnSend(g.pass)
		open := g.close(a)
		body := []byte("?")
		var want []string
		for i := range 1000 {
			body[0] = byte(i)
			if err := f.Send(t.Context(), []channel.Member{a}, body, channel.SendAsync|channel.UseAck); err != nil {
				t.Fatal(err)
			}
			want = append(want, string(body))
		}
		synctest.Wait()
		if n := f.value("dispatch_queue_messages"); n != 1000 {
			t.Errorf("%v queued", n)
		}
		open()
		synctest.Wait()
		if got := f.Bottom.Bodies(); !slices.Equal(got, want) {
			t.Errorf("order or content changed")
		}
		for _, m := range f.Bottom.Messages() {
			if !m.Options.Has(channel.Async | channel.UseAck) {
				t.Fatalf("options are %v", m.Options)
			}
		}
		if f.value("dispatch_queue_messages")+f.value("dispatch_queue_bytes") != 0 || f.value("dispatch_sent_total") != 1000 {
			t.Errorf("left: %v messages, %v bytes; sent %v", f.value("dispatch_queue_messages"), f.value("dispatch_queue_bytes"), f.value("dispatch_sent_total"))
		}
		if len(f.d.lanes) != 0 {
			t.Errorf("%d idle lanes are kept", len(f.d.lanes))
		}
	})
}

func TestSlowDestinationDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := start(t, func(c *Config) { c.QueueMessages, c.OnFull = 100, Fail }), new(gate)
		f.OnSend(g.pass)
		open := g.close(a)
		accepted := 0
		for f.send(a, "slow") == nil {
			accepted++
		}
		if accepted != 80 {
			t.Errorf("one destination got %d of 100", accepted)
		}
		for i := range 1000 {
			if err := f.send(b, "fast"); err != nil {
				t.Fatalf("message %d to another destination: %v", i, err)
			}
			if i%10 == 9 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		if n := f.value("dispatch_sent_total"); n != 1000 {
			t.Errorf("%v sent", n)
		}
		// To both at once: only the slow one is refused.
		var se *channel.SendError
		err := f.Send(t.Context(), []channel.Member{a, b}, nil, channel.SendAsync)
		if !errors.As(err, &se) || len(se.Faults) != 1 || !se.Faults[0].Member.Is(a) || !errors.Is(err, channel.ErrQueueFull) {
			t.Errorf("to both: %v", err)
		}
		open()
	})
}

func TestPoliciesWhenFull(t *testing.T) {
	for _, policy := range []string{Block, Fail, Drop} {
		t.Run(policy, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, g := start(t, func(c *Config) { c.QueueBytes, c.OnFull = 100, policy }), new(gate)
				f.OnSend(g.pass)
				open := g.close(a)
				if err := f.send(a, strings.Repeat("x", 80)); err != nil {
					t.Fatal(err)
				}
				r := new(channeltest.Recorder)
				start := time.Now()
				err := f.send(a, "12345")
				elapsed := time.Since(start)
				errDone := f.SendDone(t.Context(), []channel.Member{a}, []byte("12345"), channel.SendAsync, r)
				tooBig := f.send(b, strings.Repeat("x", 101))
				var wait time.Duration
				reports := 0
				switch policy {
				case Drop:
					reports = 1
					if err != nil || errDone != nil || tooBig != nil {
						t.Errorf("dropped: %v, %v, %v", err, errDone, tooBig)
					}
					if n := f.value("dispatch_dropped_total"); n != 3 {
						t.Errorf("%v dropped", n)
					}
				case Block:
					wait = time.Second
					fallthrough
				case Fail:
					for _, err := range []error{err, errDone, tooBig} {
						var se *channel.SendError
						if !errors.Is(err, channel.ErrQueueFull) || !errors.As(err, &se) {
							t.Errorf("refused: %v", err)
						}
					}
					if n := f.value("dispatch_refused_total"); n != 3 {
						t.Errorf("%v refused", n)
					}
				}
				if elapsed != wait {
					t.Errorf("waited %v, want %v", elapsed, wait)
				}
				if res := r.Results(); len(res) != reports || reports == 1 && !errors.Is(res[0].Err, channel.ErrQueueFull) {
					t.Errorf("reported %v", res)
				}
				open()
			})
		})
	}
}

func TestBlockedSendersGoOnInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := start(t, func(c *Config) { c.QueueBytes, c.BlockTimeout = 100, time.Minute }), new(gate)
		f.OnSend(g.pass)
		open := g.close(a)
		if err := f.send(a, strings.Repeat("x", 80)); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				if err := f.send(a, fmt.Sprint(i, strings.Repeat("y", 70))); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := f.Send(ctx, []channel.Member{a}, []byte("12345678901"), channel.SendAsync); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with its own deadline: %v", err)
		}
		open()
		wg.Wait()
		synctest.Wait()
		var got []string
		for _, s := range f.Bottom.Bodies()[1:] {
			got = append(got, s[:1])
		}
		if !slices.Equal(got, []string{"0", "1", "2", "3", "4"}) {
			t.Errorf("order %q", got)
		}
	})
}

// A small message does not overtake a large one that waits for room, and a
// destination that waits does not hold up another.
func TestNobodyOvertakesWhoWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := start(t, func(c *Config) { c.QueueBytes, c.BlockTimeout = 100, time.Minute }), new(gate)
		f.OnSend(g.pass)
		open := g.close(a)
		var wg sync.WaitGroup
		for _, body := range []string{"first" + strings.Repeat("x", 45), "second" + strings.Repeat("x", 44), "third", "fourth"} {
			wg.Go(func() {
				if err := f.send(a, body); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		if n := f.value("dispatch_queue_messages"); n != 1 {
			t.Errorf("%v messages were let in", n)
		}
		if err := f.send(b, "other"); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if n := f.value("dispatch_sent_total"); n != 1 {
			t.Errorf("%v sent to the other destination", n)
		}
		open()
		wg.Wait()
		synctest.Wait()
		var got []string
		for _, s := range f.Bottom.Bodies() {
			got = append(got, strings.Trim(s, "x"))
		}
		if !slices.Equal(got, []string{"first", "other", "second", "third", "fourth"}) {
			t.Errorf("order %q", got)
		}
	})
}

func TestWhoGivesUpLetsTheNextIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := start(t, func(c *Config) { c.QueueBytes, c.BlockTimeout = 100, 10*time.Second }), new(gate)
		f.OnSend(g.pass)
		open := g.close(a)
		if err := f.send(a, strings.Repeat("x", 50)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		go func() { _ = f.Send(ctx, []channel.Member{a}, make([]byte, 90), channel.SendAsync) }()
		synctest.Wait()
		begin := time.Now()
		if err := f.send(a, "small"); err != nil || time.Since(begin) != time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		open()
	})
}

func TestManyDestinationsReportOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, nil)
		f.OnSend(func(_ context.Context, m *channel.Message) error {
			if !m.To[0].Is(a) {
				return channel.Failed(m.To, channel.ErrAckTimeout)
			}
			m.Body[0] = 'X' // a layer below may change the body: each destination has its own
			return nil
		})
		r := new(channeltest.Recorder)
		f.Hold()
		if err := f.SendDone(t.Context(), []channel.Member{a, b, c}, []byte("hello"), channel.SendAsync, r); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(r.Results()) != 0 {
			t.Fatal("reported while one destination is on its way")
		}
		f.Finish(nil)
		synctest.Wait()
		res := r.Results()
		var se *channel.SendError
		if len(res) != 1 || !errors.As(res[0].Err, &se) || len(se.Faults) != 2 || !errors.Is(res[0].Err, channel.ErrAckTimeout) {
			t.Fatalf("reported %+v", res)
		}
		if got := f.Bottom.Bodies(); !slices.Equal(got, []string{"hello", "hello", "hello"}) {
			t.Errorf("bodies %q", got)
		}
		for _, m := range f.Bottom.Messages() {
			if m.ID != res[0].ID || len(m.To) != 1 {
				t.Errorf("message %+v", m)
			}
		}
	})
}

func TestUnaskedFailuresAreCountedAndLoggedRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, nil)
		f.OnSend(func(_ context.Context, m *channel.Message) error {
			return channel.Failed(m.To, channel.ErrDisconnected)
		})
		for range 100 {
			if err := f.send(a, "x"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(150 * time.Millisecond)
		}
		if n := f.value("dispatch_unreported_failures_total"); n != 100 {
			t.Errorf("%v counted", n)
		}
		if n := f.logs.FilterMessage("asynchronous messages failed").Len(); n != 2 {
			t.Errorf("%d log lines in 15 seconds", n)
		}
	})
}

func TestMembersThatAreGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := start(t, nil), new(gate)
		f.OnSend(g.pass)
		for _, m := range []channel.Member{a, b, c} {
			f.Observe(channel.MemberAdded, m)
		}
		r := new(channeltest.Recorder)
		opens := []func(){g.close(a), g.close(b), g.close(c)}
		for range 10 {
			for _, m := range []channel.Member{a, b, c} {
				if err := f.SendDone(t.Context(), []channel.Member{m}, nil, channel.SendAsync, r); err != nil {
					t.Fatal(err)
				}
			}
		}
		synctest.Wait()
		f.Observe(channel.MemberLeft, a) // final
		f.Observe(channel.MemberLost, b) // maybe
		synctest.Wait()
		if res := r.Results(); len(res) != 9 || !errors.Is(res[0].Err, channel.ErrNotMember) {
			t.Errorf("after one left: %d reports", len(res))
		}
		// The first message to the lost one fails: so do those behind it.
		f.OnSend(func(ctx context.Context, m *channel.Message) error {
			if m.To[0].Is(b) {
				return channel.Failed(m.To, channel.ErrDisconnected)
			}
			return g.pass(ctx, m)
		})
		opens[1]()
		synctest.Wait()
		var left, down int
		for _, x := range r.Results() {
			if errors.Is(x.Err, channel.ErrNotMember) {
				left++
			}
			if errors.Is(x.Err, channel.ErrDisconnected) {
				down++
			}
		}
		if left != 9 || down != 9 {
			t.Errorf("%d failed because the member left, %d because it is down", left, down)
		}
		if n := len(f.Bottom.Messages()); n != 4 {
			t.Errorf("%d sends were tried, want one to each and a second to the lost one", n)
		}
		opens[0]()
		opens[2]()
		synctest.Wait()
		if n := len(r.Results()); n != 30 {
			t.Errorf("%d reports, want 30", n)
		}
	})
}

func TestStopDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := start(t, func(c *Config) { c.QueueMessages = 100 }), new(gate)
		f.OnSend(g.pass)
		openA, openB := g.close(a), g.close(b)
		defer openB()
		r := new(channeltest.Recorder)
		for range 10 {
			for _, m := range []channel.Member{a, b} {
				if err := f.SendDone(t.Context(), []channel.Member{m}, nil, channel.SendAsync, r); err != nil {
					t.Fatal(err)
				}
			}
		}
		go func() {
			time.Sleep(time.Second)
			openA()
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		begin := time.Now()
		if err := f.Stop(ctx); err != nil {
			t.Errorf("stop: %v", err)
		}
		if d := time.Since(begin); d != 5*time.Second {
			t.Errorf("stop took %v", d)
		}
		ok, failed := 0, 0
		for _, x := range r.Results() {
			if x.Err == nil {
				ok++
			} else {
				failed++
			}
		}
		if ok != 10 || failed != 10 {
			t.Errorf("%d sent and %d failed, want 10 and 10", ok, failed)
		}
		if err := f.d.Stop(t.Context()); err != nil {
			t.Errorf("second stop: %v", err)
		}
	})
}

func TestStopWithoutStart(t *testing.T) {
	d, err := New(Defaults, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestConfig(t *testing.T) {
	for want, cfg := range map[string]Config{
		"queue_bytes is 0":                 {QueueMessages: 1, OnFull: Fail},
		"queue_messages is -1":             {QueueBytes: 1, QueueMessages: -1, OnFull: Fail},
		`on_full is "maybe"`:               {QueueBytes: 1, QueueMessages: 1, OnFull: "maybe"},
		"block_timeout is 0s":              {QueueBytes: 1, QueueMessages: 1, OnFull: Block},
		"block_timeout is -1ns":            {QueueBytes: 1, QueueMessages: 1, OnFull: Drop, BlockTimeout: -1},
		"queue_messages is 0, must be at ": {},
	} {
		if _, err := New(cfg, channel.Settings{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", cfg, err, want)
		}
	}
}

// Whatever happens below: every message is reported exactly once, the messages
// to one destination keep their order, and the bounds hold.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			policy := rapid.SampledFrom([]string{Block, Fail, Drop}).Draw(rt, "policy")
			const maxBytes, maxMessages = 200, 12
			cfg := Config{QueueBytes: maxBytes, QueueMessages: maxMessages, OnFull: policy, BlockTimeout: time.Second}
			metrics := channel.NewMetrics()
			d, err := New(cfg, channel.Settings{Metrics: metrics})
			if err != nil {
				t.Fatal(err)
			}
			e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{Layers: []channel.Interceptor{d}})
			if err != nil {
				t.Fatal(err)
			}
			if err := e.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 2))
			var mu sync.Mutex
			e.OnSend(func(ctx context.Context, m *channel.Message) error {
				mu.Lock()
				fate := rng.IntN(10)
				mu.Unlock()
				switch {
				case fate == 0:
					return channel.Failed(m.To, channel.ErrAckTimeout)
				case fate < 4: // a full window
					if !channel.Pause(ctx, time.Duration(fate)*300*time.Millisecond) {
						return channel.Failed(m.To, ctx.Err())
					}
				}
				return nil
			})
			members := []channel.Member{a, b, c}
			asked, quiet := 0, 0 // messages with and without a completion that were accepted
			r := new(channeltest.Recorder)
			for i := range rapid.IntRange(1, 80).Draw(rt, "steps") {
				switch op := rapid.IntRange(0, 12).Draw(rt, "op"); op {
				case 0:
					time.Sleep(500 * time.Millisecond)
				case 1:
					e.Hold()
				case 2:
					e.Finish(rapid.SampledFrom([]error{nil, channel.ErrNegativeAck}).Draw(rt, "result"))
				case 3:
					m := rapid.SampledFrom(members).Draw(rt, "member")
					e.Observe(rapid.SampledFrom([]channel.MemberEventKind{channel.MemberAdded, channel.MemberLost, channel.MemberLeft}).Draw(rt, "kind"), m)
				default:
					to := slices.Clone(members[:rapid.IntRange(1, 3).Draw(rt, "destinations")])
					body := []byte(fmt.Sprintf("%04d%s", i, strings.Repeat("x", rapid.IntRange(0, 120).Draw(rt, "size"))))
					if rapid.Bool().Draw(rt, "asks") {
						if e.SendDone(t.Context(), to, body, channel.SendAsync, r) == nil {
							asked++
						}
					} else if e.Send(t.Context(), to, body, channel.SendAsync) == nil {
						quiet++
					}
				}
				d.mu.Lock()
				bytes, messages := d.budget.bytes, d.budget.messages
				d.mu.Unlock()
				if bytes < 0 || bytes > maxBytes || messages < 0 || messages > maxMessages {
					rt.Fatalf("%d bytes and %d messages queued", bytes, messages)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), rapid.SampledFrom([]time.Duration{0, time.Second, time.Hour}).Draw(rt, "stop"))
			_ = e.Stop(ctx) // may say that messages were given up
			cancel()
			synctest.Wait()
			if d.budget.bytes != 0 || d.budget.messages != 0 || len(d.lanes) != 0 || len(d.budget.waiters) != 0 {
				rt.Errorf("left after stop: %+v, %d lanes", d.budget, len(d.lanes))
			}
			if n := len(r.Results()); n != asked {
				rt.Errorf("%d reports for %d messages", n, asked)
			}
			seen := map[channel.UniqueID]bool{}
			for _, x := range r.Results() {
				if seen[x.ID] {
					rt.Errorf("message %v was reported twice", x.ID)
				}
				seen[x.ID] = true
			}
			last := map[channel.UniqueID]string{}
			for _, m := range e.Bottom.Messages() {
				to, n := m.To[0].ID, string(m.Body[:4])
				if n <= last[to] {
					rt.Errorf("to %s: message %s after %s", m.To[0], n, last[to])
				}
				last[to] = n
			}
			var queued, ended float64
			for _, s := range metrics.Samples() {
				switch s.Name {
				case "dispatch_queued_total":
					queued = s.Value
				case "dispatch_sent_total", "dispatch_failed_total":
					ended += s.Value
				}
			}
			if queued != ended {
				rt.Errorf("%v were queued, %v ended", queued, ended)
			}
		})
	})
}

func BenchmarkAsync(b *testing.B) {
	d, err := New(Defaults, channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{d}, Discard: true})
	to := []channel.Member{a}
	for _, size := range []int{128, 1024, 10240} {
		body := make([]byte, size)
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := e.Send(context.Background(), to, body, channel.SendAsync); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
