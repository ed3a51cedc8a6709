package channel_test

import (
	"slices"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
)

func TestHistogram(t *testing.T) {
	m := channel.NewMetrics()
	bounds := []int64{10, 100, 1000}
	h := m.Histogram("wait_seconds", "Waiting.", 1e-3, bounds, "kind", "a")
	if m.Histogram("wait_seconds", "Waiting.", 1e-3, bounds, "kind", "a") != h || m.Histogram("wait_seconds", "Waiting.", 1e-3, bounds, "kind", "b") == h {
		t.Error("one name and one set of labels is one histogram")
	}
	if h.Quantile(0.5) != 0 {
		t.Error("a quantile of nothing")
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for _, v := range []int64{-1, 10, 11, 100, 1000, 1001} {
				h.Observe(v)
			}
		})
	}
	wg.Wait()
	s := m.Samples()
	if len(s) != 2 || s[0].Histogram == nil || s[0].Value != 24 || !s[0].Counter {
		t.Fatalf("samples %+v", s)
	}
	got := s[0].Histogram
	if !slices.Equal(got.Bounds, []float64{0.01, 0.1, 1}) || !slices.Equal(got.Counts, []uint64{8, 8, 4, 4}) || got.Sum < 8.483 || got.Sum > 8.485 {
		t.Errorf("histogram %+v", got)
	}
	if h.Quantile(0.3) != 10 || h.Quantile(0.5) != 100 || h.Quantile(0.99) != 1000 {
		t.Errorf("quantiles %d %d %d", h.Quantile(0.3), h.Quantile(0.5), h.Quantile(0.99))
	}
	if n := testing.AllocsPerRun(100, func() { h.Observe(50) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	m.Remove("wait_seconds", "kind", "a")
	if s := m.Samples(); len(s) != 1 || s[0].Labels[1] != "b" {
		t.Errorf("after Remove: %+v", s)
	}
	h.Observe(1)
	var none *channel.Metrics
	none.Remove("x")
	none.Histogram("x", "", 1, nil).Observe(5)
}

// Every value is in the first bucket whose bound it does not exceed.
func TestHistogramBuckets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bounds := rapid.SliceOfNDistinct(rapid.Int64Range(-50, 50), 0, 9, rapid.ID[int64]).Draw(t, "bounds")
		slices.Sort(bounds)
		v := rapid.Int64Range(-60, 60).Draw(t, "value")
		m := channel.NewMetrics()
		m.Histogram("h", "", 1, bounds).Observe(v)
		counts := m.Samples()[0].Histogram.Counts
		want := slices.IndexFunc(bounds, func(b int64) bool { return v <= b })
		if want < 0 {
			want = len(bounds)
		}
		if len(counts) != len(bounds)+1 || counts[want] != 1 {
			t.Fatalf("%d among %v is in %v", v, bounds, counts)
		}
	})
}
