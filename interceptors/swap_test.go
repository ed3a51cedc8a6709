package interceptors_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pion/transport/v2/stdnet"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/interceptors"
)

// loopback is a channel over real TCP on this machine. It has no membership:
// it sends to whom it is told.
func loopback(t testing.TB, l channel.Listener) (*channel.Channel, func(names ...string) *channel.Stack) {
	t.Helper()
	net, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	s := channel.Settings{Net: net}
	known, err := channel.NewRegistry("interceptor", interceptors.Builtin()...)
	if err != nil {
		t.Fatal(err)
	}
	stack := func(names ...string) *channel.Stack {
		var layers []channel.Layer
		for _, name := range names {
			f, err := known.Get(name)
			if err != nil {
				t.Fatal(err)
			}
			i, err := f.New(options(f.Name), s)
			if err != nil {
				t.Fatal(err)
			}
			layers = append(layers, channel.Layer{Interceptor: i})
		}
		st, err := channel.NewStack(layers...)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address, rc.Port, rc.AutoBind = "127.0.0.1", 0, 0
	c, err := channel.New(channel.Config{
		Announcement: channel.Announcement{Name: "loop", Pipelined: true},
		Stack:        stack("throughput", "dispatch", "failuredetector"),
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(rc, s),
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	c.Listen(l)
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c, stack
}

var swapStacks = [][]string{
	{"dispatch", "failuredetector"},
	{"failuredetector", "throughput", "dispatch"},
	{"dispatch"},
	{"throughput", "dispatch", "failuredetector"},
	{"failuredetector", "dispatch"},
}

// Two nodes send to each other over real connections, in every way, while the
// layers of both are replaced again and again.
func TestSwapOverLoopback(t *testing.T) {
	const each, ways = 3000, 3
	var got [2]channeltest.Recorder
	var nodes [2]*channel.Channel
	var stacks [2]func(...string) *channel.Stack
	for i := range nodes {
		nodes[i], stacks[i] = loopback(t, &got[i])
	}
	var results [2]channeltest.Recorder
	var wg sync.WaitGroup
	for i, c := range nodes {
		to := []channel.Member{nodes[1-i].Local()}
		send := func(who string, f func(b []byte) error) {
			wg.Go(func() {
				for n := range each {
					if err := f(fmt.Appendf(nil, "%s %d", who, n)); err != nil {
						t.Errorf("node %d, %s %d: %v", i, who, n, err)
						return
					}
					if n%20 == 0 {
						time.Sleep(time.Millisecond) // leave some for the swaps
					}
				}
			})
		}
		send("ack", func(b []byte) error { return c.Send(t.Context(), to, b, channel.SendSyncAck) })
		send("async", func(b []byte) error { return c.Send(t.Context(), to, b, channel.SendAsync|channel.UseAck) })
		send("done", func(b []byte) error { return c.SendDone(t.Context(), to, b, channel.SendAck, &results[i]) })
	}
	sent := make(chan struct{})
	go func() { wg.Wait(); close(sent) }()
	swaps := 0
	for done := false; !done; {
		for i, c := range nodes {
			if err := c.Swap(t.Context(), stacks[i](swapStacks[swaps%len(swapStacks)]...)); err != nil {
				t.Fatal(err)
			}
			swaps++
		}
		select {
		case <-sent:
			done = true
		case <-time.After(time.Millisecond):
		}
	}
	t.Logf("%d swaps while %d messages were sent", swaps, 2*ways*each)
	if swaps < 20 {
		t.Errorf("only %d swaps: the test has tested little", swaps)
	}
	for _, c := range nodes {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		for i := range results {
			if !results[i].WaitFor(ctx, func() bool { return len(results[i].Results()) >= each && len(got[i].Messages()) >= ways*each }) {
				t.Errorf("node %d: %d results, %d messages", i, len(results[i].Results()), len(got[i].Messages()))
			}
		}
		cancel()
		defer func() {
			if err := c.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		}()
	}
	for i := range got {
		next := map[string]int{}
		for _, b := range got[i].Bodies() {
			who, number, _ := strings.Cut(b, " ")
			if number != fmt.Sprint(next[who]) {
				t.Fatalf("node %d, %s: number %s came where %d was due", i, who, number, next[who])
			}
			next[who]++
		}
		for _, who := range []string{"ack", "async", "done"} {
			if next[who] != each {
				t.Errorf("node %d: %d of %d %s arrived", i, next[who], each, who)
			}
		}
		if slices.ContainsFunc(results[i].Results(), func(r channeltest.Result) bool { return r.Err != nil }) {
			t.Errorf("node %d: a message failed", i)
		}
	}
}

// BenchmarkSwapPause measures, while four goroutines send acknowledged messages
// over loopback, how long the slowest one takes with a swap of all layers every
// 20 ms and without. The difference is the pause.
func BenchmarkSwapPause(b *testing.B) {
	a, stack := loopback(b, new(nothing))
	c, _ := loopback(b, new(nothing))
	defer a.Stop(context.Background())
	defer c.Stop(context.Background())
	to := []channel.Member{c.Local()}
	for _, swapping := range []bool{false, true} {
		b.Run(fmt.Sprintf("swap=%v", swapping), func(b *testing.B) {
			var slowest, swaps atomic.Int64
			var took time.Duration
			var lists [4][]time.Duration
			end := make(chan struct{})
			var wg sync.WaitGroup
			if swapping {
				wg.Go(func() {
					for i := 0; ; i++ {
						select {
						case <-end:
							return
						case <-time.After(20 * time.Millisecond):
						}
						next := stack(swapStacks[i%len(swapStacks)]...)
						start := time.Now()
						if err := a.Swap(context.Background(), next); err != nil {
							b.Error(err)
							return
						}
						took += time.Since(start)
						swaps.Add(1)
					}
				})
			}
			var senders sync.WaitGroup
			var left atomic.Int64
			body := make([]byte, 1024)
			left.Store(int64(b.N))
			b.ResetTimer()
			for g := range lists {
				senders.Go(func() {
					for left.Add(-1) >= 0 {
						start := time.Now()
						if err := a.Send(context.Background(), to, body, channel.SendAck); err != nil {
							b.Error(err)
							return
						}
						d := time.Since(start)
						lists[g] = append(lists[g], d)
						for was := slowest.Load(); int64(d) > was && !slowest.CompareAndSwap(was, int64(d)); was = slowest.Load() {
						}
					}
				})
			}
			senders.Wait()
			b.StopTimer()
			close(end)
			wg.Wait()
			all := slices.Concat(lists[:]...)
			slices.Sort(all)
			b.ReportMetric(float64(slowest.Load())/1e6, "max-ms")
			b.ReportMetric(float64(all[len(all)*999/1000].Microseconds())/1e3, "p99.9-ms")
			if n := swaps.Load(); n > 0 {
				b.ReportMetric(float64(n), "swaps")
				b.ReportMetric(took.Seconds()*1e3/float64(n), "ms/swap")
			}
		})
	}
}

// nothing takes every message.
type nothing struct{}

func (*nothing) Handle(context.Context, *channel.Message) (bool, error) { return true, nil }
