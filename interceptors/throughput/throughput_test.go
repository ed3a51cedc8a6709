package throughput

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

func TestCountsRatesAndSummaries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.DebugLevel)
		metrics := channel.NewMetrics()
		s := channel.Settings{Metrics: metrics, Logger: zap.New(core)}
		x, err := New(Config{Interval: 100, Every: 1}, s)
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Settings: s, Tick: time.Second})
		values := func() map[string]float64 {
			out := map[string]float64{}
			for _, s := range metrics.Samples() {
				if strings.HasPrefix(s.Name, "throughput_") && s.Histogram == nil && s.Labels[0] == "direction" {
					out[strings.TrimPrefix(s.Name, "throughput_")+" "+s.Labels[1]] = s.Value
				}
			}
			return out
		}
		to := []channel.Member{channeltest.Member(1), channeltest.Member(2)}
		time.Sleep(1500 * time.Millisecond) // one tick: the rates have a beginning
		for range 60 {
			if err := e.Send(t.Context(), to, []byte("12345"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
			if err := e.ReceiveBody(to[0], channel.SendAck, "123"); err != nil {
				t.Fatal(err)
			}
		}
		e.OnSend(func(_ context.Context, m *channel.Message) error { return channel.Failed(m.To, channel.ErrAckTimeout) })
		if e.Send(t.Context(), to[:1], nil, channel.SendAck) == nil {
			t.Error("the layer swallowed an error")
		}
		time.Sleep(time.Second)
		want := map[string]float64{
			"messages_total sent": 121, "bytes_total sent": 600, "failures_total sent": 1,
			"messages_total received": 60, "bytes_total received": 180, "failures_total received": 0,
			"messages_per_second sent": 121, "bytes_per_second sent": 600,
			"messages_per_second received": 60, "bytes_per_second received": 180,
		}
		got := values()
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s is %v, want %v", k, got[k], v)
			}
		}
		time.Sleep(time.Second)
		if got := values(); got["messages_per_second sent"] != 0 || got["messages_total sent"] != 121 {
			t.Errorf("after a quiet second: %v", got)
		}
		if n := logs.FilterMessage("throughput").Len(); n != 1 {
			t.Errorf("%d summaries for 181 messages at an interval of 100", n)
		}
	})
}

// samples returns the values of one metric by the rest of its labels.
func samples(m *channel.Metrics, name string) map[string]channel.Sample {
	out := map[string]channel.Sample{}
	for _, s := range m.Samples() {
		if s.Name == name {
			var values []string
			for i := 1; i < len(s.Labels); i += 2 {
				values = append(values, s.Labels[i])
			}
			out[strings.Join(values, " ")] = s
		}
	}
	return out
}

func TestHistograms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := channel.Settings{Metrics: channel.NewMetrics()}
		x, err := New(Config{Every: 4}, s)
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Settings: s})
		to := []channel.Member{channeltest.Member(1)}
		e.OnSend(func(context.Context, *channel.Message) error { time.Sleep(30 * time.Millisecond); return nil })
		for _, o := range []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck, channel.SendAsync} {
			for range 8 {
				if err := e.Send(t.Context(), to, make([]byte, 1000), o); err != nil {
					t.Fatal(err)
				}
			}
		}
		// A completion that comes later counts with the time until it comes.
		e.OnSend(nil)
		e.Hold()
		done := new(channeltest.Recorder)
		for range 8 {
			if err := e.SendDone(t.Context(), to, nil, channel.SendAck, done); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(3 * time.Second)
		e.Finish(nil)
		synctest.Wait()
		if n := len(done.Results()); n != 8 {
			t.Errorf("%d completions", n)
		}
		bucket := func(h *channel.HistogramSample, v float64) uint64 {
			for i, b := range h.Bounds {
				if b > v*0.999 && b < v*1.001 {
					return h.Counts[i]
				}
			}
			t.Fatalf("no bucket %v in %v", v, h.Bounds)
			return 0
		}
		got := samples(s.Metrics, "throughput_send_seconds")
		for name, n := range map[string]float64{"none": 2, "ack": 4, "sync": 2, "async": 2} {
			if got[name].Value != n || bucket(got[name].Histogram, 0.05) != 2 {
				t.Errorf("%s: %v of 8 measured, %+v", name, got[name].Value, got[name].Histogram)
			}
		}
		if h := got["ack"].Histogram; bucket(h, 5) != 2 || h.Sum < 6.05 || h.Sum > 6.07 {
			t.Errorf("late completions: %+v", h)
		}
		if h := samples(s.Metrics, "throughput_size_bytes")["sent"].Histogram; bucket(h, 1024) != 32 || bucket(h, 64) != 8 || h.Sum != 32000 {
			t.Errorf("sizes: %+v", h)
		}
	})
}

func TestMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := channel.Settings{Metrics: channel.NewMetrics()}
		x, err := New(Config{Every: 1, MaxMembers: 3}, s)
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Settings: s})
		count := func(ms ...channel.Member) {
			t.Helper()
			if err := e.Send(t.Context(), ms, []byte("1234"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
			for _, m := range ms {
				if err := e.ReceiveBody(m, channel.SendNone, "12"); err != nil {
					t.Fatal(err)
				}
			}
		}
		expect := func(what string, want map[string]float64) {
			t.Helper()
			got, bytes := samples(s.Metrics, "throughput_member_messages_total"), samples(s.Metrics, "throughput_member_bytes_total")
			if len(got) != 2*len(want) {
				t.Errorf("%s: %d series", what, len(got))
			}
			for name, n := range want {
				if got[name+" sent"].Value != n || got[name+" received"].Value != n || bytes[name+" sent"].Value != 4*n || bytes[name+" received"].Value != 2*n {
					t.Errorf("%s: %s: %v sent, %v received, want %v", what, name, got[name+" sent"].Value, got[name+" received"].Value, n)
				}
			}
		}
		var ms []channel.Member
		for i := range 5 {
			ms = append(ms, channeltest.Member(i+1))
			if i < 4 {
				e.Observe(channel.MemberAdded, ms[i])
			}
		}
		synctest.Wait()
		count(ms...) // three have their own, one is too many, one is no member
		expect("five", map[string]float64{"10.0.0.1:4000": 1, "10.0.0.2:4000": 1, "10.0.0.3:4000": 1, "other": 2})
		// A restarted member goes on with its counters.
		again := ms[0]
		again.ID[5]++
		again.Alive = 0
		e.Observe(channel.MemberAdded, again)
		synctest.Wait()
		count(again)
		expect("restarted", map[string]float64{"10.0.0.1:4000": 2, "10.0.0.2:4000": 1, "10.0.0.3:4000": 1, "other": 2})
		// Those of a member that has gone make room.
		e.Observe(channel.MemberLeft, ms[1])
		synctest.Wait()
		expect("gone", map[string]float64{"10.0.0.1:4000": 2, "10.0.0.2:4000": 1, "10.0.0.3:4000": 1, "other": 2})
		e.Observe(channel.MemberAdded, ms[4])
		synctest.Wait()
		count(ms[4])
		expect("replaced", map[string]float64{"10.0.0.1:4000": 2, "10.0.0.5:4000": 1, "10.0.0.3:4000": 1, "other": 2})
		for i := range 1000 {
			m := channeltest.Member(100 + i)
			e.Observe(channel.MemberAdded, m)
			e.Observe(channel.MemberLost, m)
		}
		synctest.Wait()
		if n := len(samples(s.Metrics, "throughput_member_messages_total")); n != 2*4 {
			t.Errorf("%d series after many members", n)
		}
		e.OnSend(func(_ context.Context, m *channel.Message) error {
			return channel.Failed(m.To[:1], channel.ErrAckTimeout)
		})
		_ = e.Send(t.Context(), []channel.Member{again, ms[2]}, nil, channel.SendAck)
		failures := samples(s.Metrics, "throughput_member_failures_total")
		if failures["10.0.0.1:4000 sent"].Value != 1 || failures["10.0.0.3:4000 sent"].Value != 0 {
			t.Errorf("failures: %v", failures)
		}
	})
}

func TestNoSummaries(t *testing.T) {
	core, logs := observer.New(zap.DebugLevel)
	x, err := New(Config{Every: 1}, channel.Settings{Logger: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	e := channeltest.Embed(t, x)
	for range 100 {
		if err := e.Send(t.Context(), []channel.Member{channeltest.Member(1)}, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	if logs.Len() != 0 {
		t.Errorf("%d lines logged", logs.Len())
	}
}

func TestConfig(t *testing.T) {
	for want, c := range map[string]Config{
		"interval is -1":      {Interval: -1, Every: 1},
		"every is 0":          {},
		"max_members is 5000": {Every: 1, MaxMembers: 5000},
	} {
		if _, err := New(c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func BenchmarkThroughput(b *testing.B) {
	x, err := New(Defaults, channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Discard: true})
	to, body := []channel.Member{channeltest.Member(1)}, make([]byte, 1024)
	b.Run("send", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := e.Send(context.Background(), to, body, channel.SendAck); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("receive", func(b *testing.B) {
		b.ReportAllocs()
		m := channel.Message{From: to[0], Options: channel.SendNone, Body: body}
		for b.Loop() {
			if err := e.Receive(context.Background(), &m); err != nil {
				b.Fatal(err)
			}
		}
	})
}
