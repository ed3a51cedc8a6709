package channel

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Metrics is the set of counters, gauges and histograms of one node. It knows nothing of
// how they are exported. A nil *Metrics hands out counters that nobody reads,
// so components need not check.
type Metrics struct {
	mu     sync.Mutex
	series map[string]*series
}

// Counter is a number that only grows.
type Counter struct{ v atomic.Int64 }

// Add adds n, which must not be negative.
func (c *Counter) Add(n int64) { c.v.Add(n) }

// Inc adds one.
func (c *Counter) Inc() { c.v.Add(1) }

// Value returns the current number.
func (c *Counter) Value() int64 { return c.v.Load() }

// Sample is one exported number.
type Sample struct {
	// Name is a Prometheus metric name without prefix, "dispatch_dropped_total".
	Name, Help string
	// Labels are pairs of name and value.
	Labels []string
	// Counter says that the value only grows; otherwise it is a gauge.
	Counter bool
	Value   float64
	// Histogram is set for histograms; Value is the number of observations
	// then, and Counter is set.
	Histogram *HistogramSample
}

// HistogramSample is what a histogram holds.
type HistogramSample struct {
	// Bounds are the upper bounds of the buckets, included, ascending; the last
	// bucket has none. Counts are the observations in each, not cumulative.
	Bounds []float64
	Counts []uint64
	// Sum is the sum of all observed values.
	Sum float64
}

// Histogram counts observations by size. Its methods may be called from any
// goroutine; Observe neither allocates nor locks.
type Histogram struct {
	unit   float64
	bounds []int64
	counts []atomic.Int64 // one more than bounds
	sum    atomic.Int64
}

// Observe adds a value, in the units of the bounds.
func (h *Histogram) Observe(v int64) {
	i := 0
	for n := len(h.bounds); i < n; { // the first bound that is not below v
		if mid := int(uint(i+n) >> 1); h.bounds[mid] < v {
			i = mid + 1
		} else {
			n = mid
		}
	}
	h.counts[i].Add(1)
	h.sum.Add(v)
}

// Count returns the number of observations.
func (h *Histogram) Count() (n int64) {
	for i := range h.counts {
		n += h.counts[i].Load()
	}
	return n
}

// Quantile returns a bound that the part q (0 to 1) of the observations does not
// exceed: that of the bucket in which it lies, the largest bound for those
// beyond, and 0 without observations.
func (h *Histogram) Quantile(q float64) int64 {
	want := int64(q * float64(h.Count()))
	var n int64
	for i, b := range h.bounds {
		if n += h.counts[i].Load(); n > 0 && n >= want {
			return b
		}
	}
	if len(h.bounds) == 0 || h.Count() == 0 {
		return 0
	}
	return h.bounds[len(h.bounds)-1]
}

func (h *Histogram) sample() (s HistogramSample, count float64) {
	for _, b := range h.bounds {
		s.Bounds = append(s.Bounds, float64(b)*h.unit)
	}
	for i := range h.counts {
		n := h.counts[i].Load()
		s.Counts = append(s.Counts, uint64(n))
		count += float64(n)
	}
	s.Sum = float64(h.sum.Load()) * h.unit
	return s, count
}

type series struct {
	sample  Sample
	counter *Counter
	gauge   func() float64
	hist    *Histogram
}

// NewMetrics returns an empty set.
func NewMetrics() *Metrics { return &Metrics{series: map[string]*series{}} }

func (m *Metrics) slot(name, help string, labels []string) *series {
	key := name + "\x00" + strings.Join(labels, "\x00")
	s := m.series[key]
	if s == nil {
		s = &series{sample: Sample{Name: name, Help: help, Labels: slices.Clone(labels)}}
		m.series[key] = s
	}
	return s
}

// Counter returns the counter of that name and those labels (pairs of name and
// value), making it if needed. Names end in "_total". Keep the result: looking
// it up takes a lock.
func (m *Metrics) Counter(name, help string, labels ...string) *Counter {
	if m == nil {
		return new(Counter)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.slot(name, help, labels)
	if s.counter == nil {
		s.counter = new(Counter)
		s.sample.Counter = true
	}
	return s.counter
}

// Gauge registers read to be called whenever the metrics are exported; it
// replaces an earlier gauge of the same name and labels. read must not block.
func (m *Metrics) Gauge(name, help string, read func() float64, labels ...string) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.slot(name, help, labels).gauge = read
}

// Histogram returns the histogram of that name and those labels, making it if
// needed. bounds are the upper bounds of its buckets, ascending, in whole units
// (nanoseconds, bytes); unit is what one of them is when exported (1e-9 for
// nanoseconds, since times are exported in seconds). Keep the result: looking it
// up takes a lock.
func (m *Metrics) Histogram(name, help string, unit float64, bounds []int64, labels ...string) *Histogram {
	h := &Histogram{unit: unit, bounds: slices.Clone(bounds), counts: make([]atomic.Int64, len(bounds)+1)}
	if m == nil {
		return h
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.slot(name, help, labels)
	if s.hist == nil {
		s.hist = h
		s.sample.Counter = true
	}
	return s.hist
}

// Remove forgets the counter, gauge or histogram of that name and those labels.
// Who still holds it may go on using it, unseen.
func (m *Metrics) Remove(name string, labels ...string) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.series, name+"\x00"+strings.Join(labels, "\x00"))
}

// Samples returns all current values, sorted by name and labels.
func (m *Metrics) Samples() []Sample {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	all := make([]series, 0, len(m.series))
	for _, s := range m.series {
		all = append(all, *s)
	}
	m.mu.Unlock() // gauges are read without the lock: they may be slow or use m
	out := make([]Sample, 0, len(all))
	for _, s := range all {
		v := s.sample
		switch {
		case s.counter != nil:
			v.Value = float64(s.counter.Value())
		case s.hist != nil:
			var h HistogramSample
			h, v.Value = s.hist.sample()
			v.Histogram = &h
		case s.gauge != nil:
			v.Value = s.gauge()
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b Sample) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return slices.Compare(a.Labels, b.Labels)
	})
	return out
}
