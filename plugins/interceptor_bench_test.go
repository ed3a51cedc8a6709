package plugins

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	pluginv1 "github.com/longhouse-go/longhouse/plugins/proto/v1"
)

// benchBody is what the benchmarks send: 1 KiB.
const benchBody = 1 << 10

// embedBench returns a channel with one layer of the test program.
func embedBench(tb testing.TB, mode core.PluginMode, name string, window int) *channeltest.Embedded {
	tb.Helper()
	s := channel.Settings{Logger: zap.NewNop()}
	h, _ := newTestHost(tb, nil)
	l, err := h.Interceptor(core.PluginSpec{Name: name, Mode: mode, OnDown: core.Wait, Window: window}, s)
	if err != nil {
		tb.Fatal(err)
	}
	return channeltest.EmbedWith(tb, channeltest.EmbedConfig{Layers: []channel.Interceptor{l}, Discard: true})
}

// flood sends n messages with as many on their way as the window allows and
// returns how long it took.
func flood(tb testing.TB, e *channeltest.Embedded, n int) time.Duration {
	var left sync.WaitGroup
	left.Add(n)
	done := completion(func(_ *channel.Message, err error) {
		if err != nil {
			tb.Error(err)
		}
		left.Done()
	})
	body := make([]byte, benchBody)
	begun := time.Now()
	for range n {
		if err := e.SendDone(context.Background(), to[:1], body, channel.SendAck, done); err != nil {
			tb.Fatal(err)
		}
	}
	left.Wait()
	return time.Since(begun)
}

// BenchmarkInterceptor is the rate of 1 KiB messages through one layer that
// changes them (flip) or passes them on in a handler (actor), window filled.
func BenchmarkInterceptor(b *testing.B) {
	for _, name := range []string{"acme/flip", "acme/actor"} {
		for _, mode := range modes {
			b.Run(name+"/"+string(mode), func(b *testing.B) {
				e := embedBench(b, mode, name, 0)
				flood(b, e, 1000)
				b.ReportAllocs()
				b.SetBytes(benchBody)
				b.ResetTimer()
				flood(b, e, b.N)
			})
		}
	}
}

// BenchmarkInterceptorWaiting is the time of one Send at a time.
func BenchmarkInterceptorWaiting(b *testing.B) {
	for _, mode := range modes {
		b.Run(string(mode), func(b *testing.B) {
			e := embedBench(b, mode, "acme/flip", 1)
			body := make([]byte, benchBody)
			b.ReportAllocs()
			for b.Loop() {
				if err := e.Send(b.Context(), to[:1], body, channel.SendAck); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// bareServer is a process of its own that answers bare gRPC: the comparison.
// Health is the unary call, Data the stream.
type bareServer struct {
	pluginv1.UnimplementedControlServer
}

func (bareServer) Configure(_ context.Context, r *pluginv1.ConfigureRequest) (*pluginv1.ConfigureReply, error) {
	slices.Reverse(r.Options)
	return &pluginv1.ConfigureReply{}, nil
}

func (bareServer) Data(s grpc.BidiStreamingServer[pluginv1.Chunk, pluginv1.Chunk]) error {
	for {
		c, err := s.Recv()
		if err != nil {
			return nil
		}
		slices.Reverse(c.Data)
		if err := s.Send(c); err != nil {
			return err
		}
	}
}

// serveBare serves bare gRPC on a unix socket until the process is killed.
func serveBare(path string) {
	l, err := net.Listen("unix", path)
	if err != nil {
		panic(err)
	}
	s := grpc.NewServer()
	pluginv1.RegisterControlServer(s, bareServer{})
	panic(s.Serve(l))
}

// startSelf starts this test program again, until the end of the test.
func startSelf(tb testing.TB, args ...string) {
	tb.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
}

// bareClient starts a process that serves bare gRPC.
func bareClient(tb testing.TB) pluginv1.ControlClient {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "sock")
	startSelf(tb, "bare-grpc", path)
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
	c := pluginv1.NewControlClient(conn)
	ctx, cancel := context.WithTimeout(tb.Context(), 10*time.Second)
	defer cancel()
	for { // the socket appears with the server
		if _, err := c.Configure(ctx, &pluginv1.ConfigureRequest{}); err == nil {
			return c
		} else if ctx.Err() != nil {
			tb.Fatal(err)
		}
	}
}

// BenchmarkBareGRPC is what a message would cost as a call of its own, made by
// as many callers as is best for it, and as one on a stream.
func BenchmarkBareGRPC(b *testing.B) {
	c := bareClient(b)
	body := make([]byte, benchBody)
	for _, callers := range []int{1, 64} {
		b.Run("unary/"+map[int]string{1: "one", 64: "many"}[callers], func(b *testing.B) {
			b.SetBytes(benchBody)
			unary(b, c, body, callers, b.N)
		})
	}
	b.Run("stream", func(b *testing.B) {
		s, err := c.Data(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if err := roundTrip(s, body); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func unary(tb testing.TB, c pluginv1.ControlClient, body []byte, callers, n int) time.Duration {
	var all sync.WaitGroup
	begun := time.Now()
	for k := range callers {
		all.Go(func() {
			for range (n + k) / callers {
				if _, err := c.Configure(context.Background(), &pluginv1.ConfigureRequest{Options: body}); err != nil {
					tb.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	return time.Since(begun)
}

func roundTrip(s grpc.BidiStreamingClient[pluginv1.Chunk, pluginv1.Chunk], body []byte) error {
	if err := s.Send(&pluginv1.Chunk{Data: body}); err != nil {
		return err
	}
	_, err := s.Recv()
	return err
}

func median(n int, f func()) time.Duration {
	all := make([]time.Duration, n)
	for i := range all {
		begun := time.Now()
		f()
		all[i] = time.Since(begun)
	}
	slices.Sort(all)
	return all[n/2]
}

// BenchmarkRatios prints what matters about processes as ratios, measured side
// by side:
//
//	go test ./plugins -run xxx -bench Ratios -benchtime 1x
func BenchmarkRatios(b *testing.B) {
	c := bareClient(b)
	body := make([]byte, benchBody)
	stream, err := c.Data(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	process, one := embedBench(b, core.Process, "acme/flip", 0), embedBench(b, core.Process, "acme/flip", 1)
	direct, builtIn := embedBench(b, core.Direct, "acme/flip", 0), embedBuiltIn(b)
	flood(b, process, 2000)
	unary(b, c, body, 64, 2000)
	for b.Loop() {
		const rounds, calls, messages = 5, 4_000, 40_000
		rate := func(n int, d time.Duration) float64 { return float64(n) / d.Seconds() }
		var p, u1, u64, d, in []float64
		for range rounds {
			p = append(p, rate(messages, flood(b, process, messages)))
			u1 = append(u1, rate(calls, unary(b, c, body, 1, calls)))
			u64 = append(u64, rate(calls, unary(b, c, body, 64, calls)))
			d = append(d, rate(10*messages, flood(b, direct, 10*messages)))
			in = append(in, rate(10*messages, flood(b, builtIn, 10*messages)))
		}
		middle := func(v []float64) float64 { slices.Sort(v); return v[len(v)/2] }
		b.ReportMetric(middle(p), "process-msg/s")
		b.ReportMetric(middle(u1), "unary-calls/s")
		b.ReportMetric(middle(u64), "unary64-calls/s")
		b.ReportMetric(middle(p)/middle(u1), "process/unary")
		b.ReportMetric(middle(p)/middle(u64), "process/unary64")
		b.ReportMetric(middle(d)/middle(in), "direct/builtin")

		rtt := median(4000, func() {
			if err := roundTrip(stream, body); err != nil {
				b.Fatal(err)
			}
		})
		lat := median(4000, func() {
			if err := one.Send(b.Context(), to[:1], body, channel.SendAck); err != nil {
				b.Fatal(err)
			}
		})
		b.ReportMetric(float64(rtt.Nanoseconds())/1e3, "stream-p50-µs")
		b.ReportMetric(float64(lat.Nanoseconds())/1e3, "window1-p50-µs")
		b.ReportMetric(float64(lat)/float64(rtt), "window1/stream")

		var memory int64
		h := layersHost(b, channel.Settings{}, nil)
		start := median(9, func() {
			l, err := h.Interceptor(core.PluginSpec{Name: "acme/reverse"}, channel.Settings{Logger: zap.NewNop()})
			if err != nil {
				b.Fatal(err)
			}
			e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{l}, Discard: true})
			if err := e.Send(b.Context(), to[:1], body, channel.SendAck); err != nil {
				b.Fatal(err)
			}
			memory = h.Status()[0].Memory // of the first
		})
		b.ReportMetric(float64(start.Microseconds())/1e3, "start-ms")
		b.ReportMetric(float64(memory)/(1<<20), "idle-MiB")
	}
}

// embedBuiltIn is the layer of newFlip without any host.
func embedBuiltIn(tb testing.TB) *channeltest.Embedded {
	l, err := newFlip(layerConfig{}, channel.Settings{})
	if err != nil {
		tb.Fatal(err)
	}
	return channeltest.EmbedWith(tb, channeltest.EmbedConfig{Layers: []channel.Interceptor{l}, Discard: true})
}
