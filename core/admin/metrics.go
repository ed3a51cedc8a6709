package admin

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// prefix is what the names of all our metrics begin with.
const prefix = "longhouse_"

// maxSamples bounds one export: plugins add to it.
const maxSamples = 20_000

var (
	metricName = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)
	labelName  = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_]*$`)
)

// registry returns what /metrics exports: ours, the Go runtime's and the
// process's.
func (a *Server) registry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if a.src.Metrics != nil {
		r.MustRegister(collector{read: a.src.Metrics, bad: a.set.Metrics.Counter("admin_bad_samples_total",
			"Samples that could not be exported: malformed, repeated, or too many.")})
	}
	return r
}

// collector turns samples into metrics. Some samples come from plugins: what is
// malformed is left out and counted, so that it does not spoil the rest.
type collector struct {
	read func() []channel.Sample
	bad  *channel.Counter
}

// Describe tells nothing, because which metrics there are is known only when
// they are read.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect exports all samples.
func (c collector) Collect(out chan<- prometheus.Metric) {
	type family struct {
		help      string
		counter   bool
		histogram bool
	}
	families := map[string]family{}
	seen := map[string]bool{}
	for i, s := range c.read() {
		if i >= maxSamples || !wellFormed(s) {
			c.bad.Inc()
			continue
		}
		// One name has one help and one type: those of its first sample.
		f, known := families[s.Name]
		if !known {
			f = family{strings.ToValidUTF8(s.Help, "?"), s.Counter, s.Histogram != nil}
			families[s.Name] = f
		}
		names, values := make([]string, 0, len(s.Labels)/2), make([]string, 0, len(s.Labels)/2)
		for j := 0; j < len(s.Labels); j += 2 {
			names = append(names, s.Labels[j])
			values = append(values, strings.ToValidUTF8(s.Labels[j+1], "?"))
		}
		kind := prometheus.GaugeValue
		if f.counter {
			kind = prometheus.CounterValue
		}
		desc := prometheus.NewDesc(prefix+s.Name, f.help, names, nil)
		var m prometheus.Metric
		var err error
		switch {
		case f.histogram != (s.Histogram != nil):
			err = errKind
		case f.histogram:
			m, err = histogram(desc, s.Histogram, values)
		default:
			m, err = prometheus.NewConstMetric(desc, kind, s.Value, values...)
		}
		key := identity(s.Name, names, values)
		if err != nil || seen[key] {
			c.bad.Inc()
			continue
		}
		seen[key] = true
		out <- m
	}
}

var (
	errKind    = errors.New("admin: a histogram and something else have the same name")
	errBuckets = errors.New("admin: a histogram has not one bucket more than bounds, or bounds that do not ascend")
)

// histogram converts a histogram; Prometheus wants cumulative counts.
func histogram(desc *prometheus.Desc, h *channel.HistogramSample, labels []string) (prometheus.Metric, error) {
	if len(h.Counts) != len(h.Bounds)+1 || !slices.IsSorted(h.Bounds) || slices.ContainsFunc(h.Bounds, math.IsNaN) {
		return nil, errBuckets
	}
	buckets := make(map[float64]uint64, len(h.Bounds))
	var n uint64
	for i, b := range h.Bounds {
		n += h.Counts[i]
		buckets[b] = n
	}
	return prometheus.NewConstHistogram(desc, n+h.Counts[len(h.Bounds)], h.Sum, buckets, labels...)
}

// identity is the same for samples of one name and equal labels in any order.
func identity(name string, names, values []string) string {
	pairs := make([]string, len(names))
	for i := range names {
		pairs[i] = names[i] + "\x00" + values[i]
	}
	slices.Sort(pairs)
	return name + "\x01" + strings.Join(pairs, "\x01")
}

func wellFormed(s channel.Sample) bool {
	if !metricName.MatchString(s.Name) || len(s.Labels)%2 != 0 {
		return false
	}
	names := map[string]bool{}
	for i := 0; i < len(s.Labels); i += 2 {
		if !labelName.MatchString(s.Labels[i]) || names[s.Labels[i]] {
			return false
		}
		names[s.Labels[i]] = true
	}
	return true
}

// promLog takes the errors of the exporter.
type promLog struct{ log *zap.Logger }

func (p promLog) Println(v ...any) {
	p.log.Warn("metrics cannot be exported", zap.String("error", fmt.Sprint(v...)))
}
