// Command bench runs Longhouse nodes under load, side by side with what people
// use today, and holds the figures against what is wanted. All processes share
// this machine: compare ratios, not absolute numbers.
//
//	bare      a bare net/http server: what sessions and replication cost
//	tomcat    two Tomcat 10.1 nodes with the matching manager and send option
//	transfer  a node joins while others serve: how long, and who waits for it
//	memory    what a session costs in the node and in its manager
//
// It installs nothing: it says what is missing. It ends with 2 if a wanted value
// is missed, unless -smoke is given.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

var (
	only     = flag.String("only", "bare", "comma list of parts: bare, tomcat, transfer, memory; or all")
	duration = flag.Duration("duration", 4*time.Second, "bare, tomcat: length of one measurement, in whole seconds")
	rounds   = flag.Int("rounds", 5, "bare, tomcat: measurements of each kind, in turn; the medians count")
	managers = flag.String("managers", "delta,backup", "tomcat, transfer, memory: managers to measure")
	sends    = flag.String("sends", "async,sync", "bare, tomcat: send options to measure")
	paths    = flag.String("paths", "/read,/write", "tomcat: what to ask for; /plain has no session")
	warm     = flag.Duration("warm", 15*time.Second, "tomcat: load before anything counts, for each path, in whole seconds; Longhouse gets a fifth")
	sessions = flag.Int("sessions", 100_000, "transfer: sessions that a joining node receives")
	size     = flag.Int("size", 1024, "transfer: bytes of each")
	rate     = flag.Int("rate", 1000, "transfer: requests per second meanwhile, half of them writes")
	counts   = flag.String("counts", "100000,1000000", "memory: sessions in the group")
	sizes    = flag.String("sizes", "100,1024", "memory: bytes of a session")
	stored   = flag.Bool("stored", true, "memory: measure the table of a manager with a store, too (needs redis-server)")
	profile  = flag.String("profile", "", "transfer: folder for processor profiles of the first node and of the joining one")
	sets     = flag.String("set", "", "further settings of our nodes, as of longhouse run --set, separated by commas")
	smoke    = flag.Bool("smoke", false, "everything once and shortly: to see that it works")
	binary   = flag.String("longhouse", "", "the program to measure; built if empty")
	serve    = flag.String("serve", "", "serve the bare handler on this address (the program starts itself so)")
)

// missed counts the wanted values that were not reached.
var missed int

// wanted returns what to print for a value and the bound it is held against.
func wanted(got, want float64, atLeast bool) string {
	if atLeast == (got >= want) || got == want {
		return "ok"
	}
	missed++
	return "MISSED"
}

// work is a folder for this run; bye ends what it has started.
var (
	work string
	bye  []func()
)

func main() {
	flag.Parse()
	if *serve != "" {
		fail(serveBare(*serve))
	}
	if *smoke {
		chosen := false
		flag.Visit(func(f *flag.Flag) { chosen = chosen || f.Name == "only" })
		if !chosen {
			*only = "all"
		}
		*duration, *rounds, *warm = time.Second, 1, time.Second
		*paths, *sessions, *counts, *sizes = "/write", 5000, "2000", "100"
	}
	all := []struct {
		name string
		run  func()
	}{{"bare", bareParts}, {"tomcat", tomcatParts}, {"transfer", transferParts}, {"memory", memoryParts}}
	for _, name := range list(*only) {
		known := name == "all"
		for _, p := range all {
			known = known || p.name == name
		}
		if !known {
			fail(fmt.Errorf("-only: there is no part %q", name))
		}
	}
	interrupted, _ := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(interrupted, func() { fail(errors.New("interrupted")) })
	var err error
	work, err = os.MkdirTemp("", "longhouse-bench-")
	check(err)
	bye = append(bye, func() { os.RemoveAll(work) })
	if *binary == "" {
		*binary = filepath.Join(work, "longhouse")
		build := exec.Command("go", "build", "-o", *binary, "./cmd/longhouse")
		build.Stderr = os.Stderr
		check(build.Run())
	}
	fmt.Printf("%d processors, shared by all processes and by what else runs here. Medians of %d rounds of %v.\n", runtime.NumCPU(), *rounds, *duration)
	for _, p := range all {
		if *only == "all" || slices.Contains(list(*only), p.name) {
			fmt.Println()
			p.run()
		}
	}
	finish()
	if missed > 0 {
		fmt.Printf("\n%d values are not what is wanted.\n", missed)
		if !*smoke {
			os.Exit(2)
		}
	}
}

func finish() {
	for _, f := range slices.Backward(bye) {
		f()
	}
	bye = nil
}

func list(s string) []string { return strings.Split(s, ",") }

func numbers(s string) []int {
	var out []int
	for _, text := range list(s) {
		n, err := strconv.Atoi(text)
		check(err)
		out = append(out, n)
	}
	return out
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

func check(err error) {
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	finish()
	os.Exit(1)
}
