// Command bench-peers runs "longhouse bench channel" beside Apache Tribes and
// plain TCP connections and holds the medians against what is wanted. It
// installs nothing: it says what is missing.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

var (
	duration = flag.Duration("duration", time.Second, "length of one measurement")
	runs     = flag.Int("runs", 5, "measurements of each kind; the median counts")
	jars     = flag.String("jars", "/usr/share/java", "folder of the jars of Tomcat")
	binary   = flag.String("longhouse", "", "the program to measure; built if empty")
	only     = flag.String("only", "", "comma list of parts: oneway, acks, rpc, members")
)

// result is what we read of a result of package cmd/internal/bench.
type result struct {
	Option  string `json:"option"`
	Size    int    `json:"size"`
	Senders int    `json:"senders"`
	Members int    `json:"members"`
	System  string `json:"system"`
	Error   string `json:"error"`
	Median  struct {
		Sent, Failed, Delivered int64
		PerSecond               float64       `json:"deliveredPerSecond"`
		CPU                     time.Duration `json:"cpuPerDelivered"`
		P50, P99                time.Duration
	} `json:"median"`
}

func main() {
	flag.Parse()
	if missing := missing(); len(missing) > 0 {
		fail(errors.New("missing:\n  " + strings.Join(missing, "\n  ")))
	}
	if *binary == "" {
		dir, err := os.MkdirTemp("", "longhouse-bench-peers-")
		check(err)
		defer os.RemoveAll(dir)
		*binary = filepath.Join(dir, "longhouse")
		build := exec.Command("go", "build", "-o", *binary, "./cmd/longhouse")
		build.Stderr = os.Stderr
		check(build.Run())
	}
	fmt.Printf("%d processors, medians of %d runs of %v. Each node is a process; all share the processors, also with what else runs here.\n", runtime.NumCPU(), *runs, *duration)
	fmt.Println("x: how many times as fast as the peer, by messages and by processor time; p99/: our 99th percentile by theirs. A wanted value that is missed is marked.")

	below := 0
	part := func(name, title string, f func() int) {
		if *only == "" || slices.Contains(strings.Split(*only, ","), name) {
			fmt.Printf("\n%s\n", title)
			below += f()
		}
	}
	part("oneway", "One way: nobody waits", func() int {
		return table(measure("none,async", "128,1024,10240,102400", "1,8", "2"), func(c result, r ratios) []goal {
			var out []goal
			switch {
			case c.Size <= 1024:
				out = append(out, goal{"x tribes", r.tribes, 5, true})
			case c.Size <= 10240:
				out = append(out, goal{"x tribes", r.tribes, 2, true})
			default:
				out = append(out, goal{"x tribes", r.tribes, 1, true})
			}
			if c.Size >= 1024 {
				out = append(out, goal{"x raw", r.raw, 0.6, true})
			}
			return append(out, goal{"p99/tribes", r.p99, 1, false})
		})
	})
	part("acks", "Acknowledged: every sender waits", func() int {
		return table(measure("ack,sync-ack", "128,1024", "1,8,64", "2"), func(c result, r ratios) []goal {
			out := []goal{{"p99/tribes", r.p99, 1, false}}
			switch c.Senders {
			case 1:
				return append(out, goal{"x raw", r.raw, 0.8, true})
			case 8:
				return append(out, goal{"x tribes", r.tribes, 3, true})
			}
			return append(out, goal{"x tribes", r.tribes, 8, true})
		})
	})
	part("rpc", "Request and reply", func() int {
		return table(measure("rpc", "128", "1", "2"), func(c result, r ratios) []goal {
			return []goal{{"p50/raw", r.p50raw, 1.5, false}, {"p99/tribes", r.p99, 1, false}}
		})
	})
	part("members", "From 2 to 5 members: cost of a delivered message", func() int {
		rs := measure("none,sync-ack", "1024", "8", "2,5")
		n := table(rs, func(result, ratios) []goal { return nil })
		for _, o := range []string{"none", "sync-ack"} {
			for _, system := range []string{"longhouse", "tribes"} {
				two, five := find(rs, o, 2, system), find(rs, o, 5, system)
				if two == nil || five == nil || five.Median.PerSecond == 0 || two.Median.CPU == 0 {
					continue
				}
				time, cpu := two.Median.PerSecond/five.Median.PerSecond, float64(five.Median.CPU)/float64(two.Median.CPU)
				mark := ""
				if system == "longhouse" && min(time, cpu) > 1.2 {
					mark, n = "  BELOW (wanted at most 1.20)", n+1
				}
				fmt.Printf("  %-9s %-9s by time %.2f, by processor time %.2f%s\n", o, system, time, cpu, mark)
			}
		}
		return n
	})
	if below > 0 {
		fmt.Printf("\n%d values are not what is wanted.\n", below)
		os.Exit(2)
	}
}

func missing() []string {
	var out []string
	for _, p := range []string{"java", "javac"} {
		if _, err := exec.LookPath(p); err != nil {
			out = append(out, p+"  (Debian: apt-get install default-jdk-headless)")
		}
	}
	for _, j := range []string{"*tribes.jar", "*juli.jar"} {
		if found, _ := filepath.Glob(filepath.Join(*jars, j)); len(found) == 0 {
			out = append(out, filepath.Join(*jars, j)+"  (Debian: apt-get install libtomcat10-java, or -jars FOLDER)")
		}
	}
	return out
}

func measure(options, sizes, senders, members string) []result {
	cmd := exec.Command(*binary, "bench", "channel", "--json", "--raw", "--tribes-jars", *jars,
		"--option", options, "--size", sizes, "--senders", senders, "--members", members,
		"--duration", duration.String(), "--runs", fmt.Sprint(*runs))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	check(cmd.Run())
	var rs []result
	check(json.Unmarshal(out.Bytes(), &rs))
	return rs
}

// ratios hold us against the others; 0 if they were not measured.
type ratios struct{ tribes, raw, p99, p50raw, cpu float64 }

// goal is a wanted ratio.
type goal struct {
	what      string
	got, want float64
	atLeast   bool
}

func find(rs []result, option string, members int, system string) *result {
	for i, r := range rs {
		if r.Option == option && r.Members == members && r.System == system && r.Error == "" {
			return &rs[i]
		}
	}
	return nil
}

// table prints a line for each cell and returns how many goals are missed.
func table(rs []result, goals func(result, ratios) []goal) (below int) {
	fmt.Printf("  %-9s %7s %3s %2s  %10s %10s %10s  %8s %8s  %8s %8s %8s  %s\n", "option", "bytes", "snd", "n",
		"longhouse", "tribes", "raw", "x tribes", "x raw", "p99 µs", "tribes", "p99/", "cpu x tribes")
	for i := 0; i < len(rs); {
		var us, tribes, raw result
		first := rs[i]
		for ; i < len(rs) && rs[i].Option == first.Option && rs[i].Size == first.Size && rs[i].Senders == first.Senders && rs[i].Members == first.Members; i++ {
			switch rs[i].System {
			case "longhouse":
				us = rs[i]
			case "tribes":
				tribes = rs[i]
			case "raw":
				raw = rs[i]
			}
			if rs[i].Error != "" {
				fmt.Printf("  %s, %d bytes: %s: %s\n", first.Option, first.Size, rs[i].System, rs[i].Error)
			}
		}
		r := ratios{
			tribes: over(us.Median.PerSecond, tribes.Median.PerSecond), raw: over(us.Median.PerSecond, raw.Median.PerSecond),
			p99: over(float64(us.Median.P99), float64(tribes.Median.P99)), p50raw: over(float64(us.Median.P50), float64(raw.Median.P50)),
			cpu: over(float64(tribes.Median.CPU), float64(us.Median.CPU)),
		}
		fmt.Printf("  %-9s %7d %3d %2d  %10.0f %10.0f %10.0f  %8.2f %8.2f  %8.1f %8.1f %8.2f  %.1f", first.Option, first.Size, first.Senders, first.Members,
			us.Median.PerSecond, tribes.Median.PerSecond, raw.Median.PerSecond, r.tribes, r.raw,
			float64(us.Median.P99)/1e3, float64(tribes.Median.P99)/1e3, r.p99, r.cpu)
		for _, g := range goals(first, r) {
			if g.got == 0 || g.atLeast == (g.got < g.want) && g.got != g.want {
				below++
				fmt.Printf("  BELOW: %s %.2f, wanted %.2f", g.what, g.got, g.want)
			}
		}
		if lost := us.Median.Failed; lost > 0 {
			fmt.Printf("  %d FAILED", lost)
		}
		fmt.Println()
	}
	return below
}

func over(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

func check(err error) {
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench-peers:", err)
	os.Exit(1)
}
