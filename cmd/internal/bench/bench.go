package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Cell is what is measured.
type Cell struct {
	Option  string `json:"option"`
	Size    int    `json:"size"`
	Senders int    `json:"senders"`
	Members int    `json:"members"` // the sending one included
}

// requests reports whether only one member is asked.
func (c Cell) requests() bool { return c.Option == "rpc" || c.Option == "echo" }

// Cells returns all combinations.
func Cells(options []string, sizes, senders, members []int) []Cell {
	var out []Cell
	for _, o := range options {
		for _, size := range sizes {
			for _, s := range senders {
				for _, m := range members {
					out = append(out, Cell{o, size, s, m})
				}
			}
		}
	}
	return out
}

// Run is one measurement. Latencies are those of the calls that send: with
// none and async, handing the message over; with ack and sync-ack, until the
// acknowledgement has come; of requests, until the reply has come.
type Run struct {
	Sent      int64         `json:"sent"`
	Failed    int64         `json:"failed"`
	Delivered int64         `json:"delivered"` // at all receivers
	Seconds   float64       `json:"seconds"`   // from the first call to the last delivery
	PerSecond float64       `json:"deliveredPerSecond"`
	CPU       time.Duration `json:"cpuPerDelivered"` // of all processes, in nanoseconds; 0 if unknown
	P50       time.Duration `json:"p50"`
	P90       time.Duration `json:"p90"`
	P99       time.Duration `json:"p99"`
	P999      time.Duration `json:"p999"`
	Max       time.Duration `json:"max"`
}

// Result holds the runs of one system for one cell.
type Result struct {
	Cell
	System string `json:"system"`
	Runs   []Run  `json:"runs,omitempty"`
	Median Run    `json:"median"`
	Error  string `json:"error,omitempty"`
}

// Plan is a series of measurements.
type Plan struct {
	Systems  []System
	Cells    []Cell
	Duration time.Duration // of a run
	Runs     int
	// Progress is told what is being done; nil for nobody.
	Progress func(format string, args ...any)
}

// Do makes all measurements, those of one cell of all systems in turn, so that
// a disturbance of the machine meets all of them.
func (p Plan) Do(ctx context.Context) ([]Result, error) {
	if p.Progress == nil {
		p.Progress = func(string, ...any) {}
	}
	var groups []*group
	defer func() {
		for _, g := range groups {
			g.close()
		}
	}()
	for _, s := range p.Systems {
		g := &group{system: s}
		groups = append(groups, g)
		if err := g.grow(2); err != nil {
			return nil, err
		}
	}
	var all []Result
	for i, c := range p.Cells {
		rs := make([]Result, len(groups))
		for n := range p.Runs {
			for k, g := range groups {
				if err := ctx.Err(); err != nil {
					return all, err
				}
				r := &rs[k]
				r.Cell, r.System = c, g.system.Name
				if r.Error != "" {
					continue
				}
				run, err := g.measure(c, p.Duration, n == 0)
				if err != nil {
					r.Error = err.Error()
					continue
				}
				r.Runs = append(r.Runs, run)
			}
		}
		for k := range rs {
			rs[k].Median = median(rs[k].Runs)
		}
		all = append(all, rs...)
		p.Progress("%d of %d: %s, %d bytes, %d senders, %d members", i+1, len(p.Cells), c.Option, c.Size, c.Senders, c.Members)
	}
	return all, nil
}

// measure warms up, if it is the first run of a cell, and makes one.
func (g *group) measure(c Cell, d time.Duration, first bool) (Run, error) {
	if c.Members < 2 {
		return Run{}, fmt.Errorf("%d members: the sender needs a receiver", c.Members)
	}
	if len(g.agents) > c.Members && !c.requests() { // every member that has joined is a destination
		g.close()
		g.agents = nil
	}
	fresh := g.agents == nil
	if err := g.grow(c.Members); err != nil {
		return Run{}, err
	}
	if first || fresh {
		warm := d / 4
		if fresh || g.started == 0 {
			warm = max(warm, g.system.Warm)
		}
		g.started++
		if _, err := g.run(c, warm); err != nil {
			return Run{}, err
		}
	}
	return g.run(c, d)
}

// median returns the median of every number.
func median(runs []Run) Run {
	if len(runs) == 0 {
		return Run{}
	}
	return Run{
		Sent: mid(runs, func(r Run) int64 { return r.Sent }), Failed: mid(runs, func(r Run) int64 { return r.Failed }),
		Delivered: mid(runs, func(r Run) int64 { return r.Delivered }), Seconds: mid(runs, func(r Run) float64 { return r.Seconds }),
		PerSecond: mid(runs, func(r Run) float64 { return r.PerSecond }), CPU: mid(runs, func(r Run) time.Duration { return r.CPU }),
		P50: mid(runs, func(r Run) time.Duration { return r.P50 }), P90: mid(runs, func(r Run) time.Duration { return r.P90 }),
		P99: mid(runs, func(r Run) time.Duration { return r.P99 }), P999: mid(runs, func(r Run) time.Duration { return r.P999 }),
		Max: mid(runs, func(r Run) time.Duration { return r.Max }),
	}
}

func mid[T int64 | float64 | time.Duration](runs []Run, of func(Run) T) T {
	var v []T
	for _, r := range runs {
		v = append(v, of(r))
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// JSON writes the results as one document.
func JSON(w io.Writer, rs []Result) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(rs)
}

// Text writes one line for every cell and system. Systems after the first are
// what that one is compared with: "x tribes" is how many times as fast it is as
// Tribes, "p99 / tribes" its 99th percentile divided by that of Tribes.
func Text(w io.Writer, rs []Result) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "option\tbytes\tsenders\tmembers\tsystem\tmsg/s\tMB/s\tp50 µs\tp99 µs\tcpu µs\tlost\tx\tp99 /\t")
	for len(rs) > 0 {
		n := 1
		for n < len(rs) && rs[n].Cell == rs[0].Cell {
			n++
		}
		for i, r := range rs[:n] {
			m := r.Median
			cell := fmt.Sprintf("%s\t%d\t%d\t%d\t%s", r.Option, r.Size, r.Senders, r.Members, r.System)
			if r.Error != "" {
				fmt.Fprintf(t, "%s\t%s\t\t\t\t\t\t\t\t\n", cell, shorten(r.Error))
				continue
			}
			receivers := int64(r.Members - 1)
			if r.requests() {
				receivers = 1
			}
			fmt.Fprintf(t, "%s\t%.0f\t%.0f\t%s\t%s\t%s\t%d", cell, m.PerSecond, m.PerSecond*float64(r.Size)/1e6,
				micros(m.P50), micros(m.P99), micros(m.CPU), m.Failed+max(m.Sent*receivers-m.Delivered, 0))
			if i == 0 || rs[0].Error != "" {
				fmt.Fprintln(t, "\t\t\t")
				continue
			}
			fmt.Fprintf(t, "\t%.2f\t%.2f\t\n", ratio(rs[0].Median.PerSecond, m.PerSecond), ratio(float64(rs[0].Median.P99), float64(m.P99)))
		}
		rs = rs[n:]
	}
	return t.Flush()
}

func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

func micros(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/1e3) }

func shorten(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s[:min(len(s), 60)]
}
