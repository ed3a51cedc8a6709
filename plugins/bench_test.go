package plugins

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

func benchManager(b *testing.B, mode core.PluginMode, stream bool) core.Manager {
	h, _ := newTestHost(b, func(c *Config) { c.Stream = stream })
	mgr, err := h.Manager(core.PluginSpec{Name: "fake", Mode: mode}, channel.Settings{Logger: zap.NewNop()})
	if err != nil {
		b.Fatal(err)
	}
	if err := mgr.Start(context.Background(), newFakeHost()); err != nil {
		b.Fatal(err)
	}
	return mgr
}

func inModes(b *testing.B, f func(b *testing.B, mgr core.Manager, body []byte)) {
	for _, mode := range []string{"direct", "bridged", "process", "stream"} {
		for _, size := range []int{128, 1024} {
			b.Run(fmt.Sprintf("%s/%d", mode, size), func(b *testing.B) {
				m := core.PluginMode(mode)
				if mode == "stream" {
					m = core.Process
				}
				mgr := benchManager(b, m, mode == "stream")
				body := append(make([]byte, 0, size), "quiet:"...)
				f(b, mgr, body[:size])
			})
		}
	}
}

// BenchmarkMessages is the rate of HandleMessage with as many in flight as the
// window allows, the other direction idle.
func BenchmarkMessages(b *testing.B) {
	inModes(b, func(b *testing.B, mgr core.Manager, body []byte) {
		b.ReportAllocs()
		b.SetBytes(int64(len(body)))
		var wg sync.WaitGroup
		done := func(err error) {
			if err != nil {
				b.Error(err)
			}
			wg.Done()
		}
		from := member(1)
		for b.Loop() {
			wg.Add(1)
			mgr.HandleMessage(b.Context(), from, body, done)
		}
		wg.Wait()
	})
}

// BenchmarkCommit is the rate of Commit by 8 callers.
func BenchmarkCommit(b *testing.B) {
	inModes(b, func(b *testing.B, mgr core.Manager, body []byte) {
		b.ReportAllocs()
		b.SetBytes(int64(len(body)))
		b.SetParallelism(4)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := mgr.Commit(b.Context(), body, core.Async); err != nil {
					b.Error(err)
				}
			}
		})
	})
}

// BenchmarkLatency is the time of one Commit at a time.
func BenchmarkLatency(b *testing.B) {
	inModes(b, func(b *testing.B, mgr core.Manager, body []byte) {
		b.ReportAllocs()
		for b.Loop() {
			if err := mgr.Commit(b.Context(), body, core.Async); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkStart is the time from nothing to the first answer, and to the end.
func BenchmarkStart(b *testing.B) {
	for _, mode := range []core.PluginMode{core.Bridged, core.Process} {
		b.Run(string(mode), func(b *testing.B) {
			h, _ := newTestHost(b, nil)
			for b.Loop() {
				mgr, err := h.Manager(core.PluginSpec{Name: "fake", Mode: mode}, channel.Settings{Logger: zap.NewNop()})
				if err != nil {
					b.Fatal(err)
				}
				if err := mgr.Start(b.Context(), newFakeHost()); err != nil {
					b.Fatal(err)
				}
				if _, err := mgr.Status(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := mgr.Stop(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
