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
		x, err := New(Config{Interval: 100}, s)
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}, Settings: s, Tick: time.Second})
		values := func() map[string]float64 {
			out := map[string]float64{}
			for _, s := range metrics.Samples() {
				if strings.HasPrefix(s.Name, "throughput_") {
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

func TestNoSummaries(t *testing.T) {
	core, logs := observer.New(zap.DebugLevel)
	x, err := New(Config{}, channel.Settings{Logger: zap.New(core)})
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
	if _, err := New(Config{Interval: -1}, channel.Settings{}); err == nil || !strings.Contains(err.Error(), "interval is -1") {
		t.Errorf("got %v", err)
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
