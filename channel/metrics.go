package channel

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Metrics is the set of counters and gauges of one node. It knows nothing of
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
}

type series struct {
	sample  Sample
	counter *Counter
	gauge   func() float64
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
