package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// What is wanted of a node that joins.
const (
	wantedTransfer = 1500 * time.Millisecond
	wantedDelay    = 50 * time.Millisecond
)

const (
	// before and after are how long the load runs without a node that joins.
	before = 5 * time.Second
	after  = 2 * time.Second
	// loadedUsers are the sessions that the load uses.
	loadedUsers = 5000
)

// transferParts lets a node join another one that serves at a fixed rate.
func transferParts() {
	fmt.Printf("transfer: %d sessions of %d bytes to a node that joins one that serves %d requests per second\n", *sessions, *size, *rate)
	fmt.Println("  delay: from when a request was due until its answer was there; the part in brackets was lost in the program that asks")
	for _, manager := range list(*managers) {
		for range *rounds {
			joinUnderLoad(manager)
			if *smoke {
				break
			}
		}
	}
}

func joinUnderLoad(manager string) {
	c := newCluster("cluster.manager.use=" + manager)
	defer c.stop()
	a := c.start()
	c.together()
	write := fmt.Sprintf("/write?size=%d", *size)
	cookies := fill(a.http, "GET", write, *sessions)
	a.holds(*sessions)
	alone := before
	if *smoke {
		alone = time.Second
	}

	var samples []sample
	var load sync.WaitGroup
	began, stop := time.Now(), make(chan struct{})
	load.Go(func() {
		path := func(i int) string {
			if i%2 == 0 {
				return write
			}
			return "/read"
		}
		samples = steady(a.http, *rate, cookies[:min(loadedUsers, len(cookies))], path, began, stop)
	})
	time.Sleep(alone)
	profiled := profiles(a, manager+"-first")
	already := a.spent()
	joined := time.Now()
	b := c.start()
	started := time.Now()
	also := profiles(b, manager+"-joining")
	b.ready()
	ready := time.Now()
	first, second := a.spent(), b.spent()
	time.Sleep(after)
	close(stop)
	load.Wait()
	profiled()
	also()

	st := b.manager()
	fmt.Printf("  %-6s transfer %v (wanted %v) %s: %d sessions, ready %v after its start, %v after it listened\n", manager,
		st.Transfer.Round(time.Millisecond), wantedTransfer, wanted(st.Transfer.Seconds(), wantedTransfer.Seconds(), false),
		st.Received, ready.Sub(joined).Round(time.Millisecond), ready.Sub(started).Round(time.Millisecond))
	fmt.Printf("         processor time: first node %v, its manager %v; joining node %v, its manager %v\n",
		first[0]-already[0], first[1]-already[1], second[0], second[1])
	if manager == "delta" && st.Sessions < *sessions {
		fail(fmt.Errorf("the node that joined is ready with %d of %d sessions", st.Sessions, *sessions))
	}
	b.holds(*sessions)
	probe, same := connect(b.http), connect(a.http)
	for i := 0; i < len(cookies); i += max(len(cookies)/100, 1) {
		got, _, err := probe.get("/read", cookies[i])
		check(err)
		want, _, err := same.get("/read", cookies[i])
		check(err)
		if got != want || got == "0" {
			fail(fmt.Errorf("session %d is %q on the node that joined, and %q on the other one", i, got, want))
		}
	}
	probe.close()
	same.close()

	at := func(t time.Time) time.Duration { return t.Sub(began) }
	delays("alone", samples, 0, alone, 0)
	delays("joining", samples, at(joined), at(ready), wantedDelay)
	delays("after it", samples, at(ready), at(ready)+after, 0)
}

// delays prints the distribution of what was due between two moments.
func delays(name string, samples []sample, from, to, want time.Duration) {
	var part []sample
	for _, s := range samples {
		if s.due >= from && s.due < to {
			part = append(part, s)
		}
	}
	if len(part) == 0 {
		return
	}
	slices.SortFunc(part, func(a, b sample) int { return int(a.delay - b.delay) })
	ms := func(d time.Duration) float64 { return float64(d) / 1e6 }
	quantile := func(q float64) time.Duration { return part[int(q*float64(len(part)-1))].delay }
	worst := part[len(part)-1]
	verdict := ""
	if want > 0 {
		verdict = fmt.Sprintf(" (wanted %.0f) %s", ms(want), wanted(ms(worst.delay), ms(want), false))
	}
	fmt.Printf("         %-8s %6d requests, delay in ms: 50%% %.2f, 99%% %.2f, 99.9%% %.2f, greatest %.2f (%.2f)%s\n",
		name, len(part), ms(quantile(.5)), ms(quantile(.99)), ms(quantile(.999)), ms(worst.delay), ms(worst.own), verdict)
}

// profiles records what the processor does in a node for some seconds.
func profiles(n *node, name string) (wait func()) {
	if *profile == "" {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		resp, err := http.Get("http://" + n.admin + "/debug/pprof/profile?seconds=3")
		check(err)
		defer resp.Body.Close()
		f, err := os.Create(filepath.Join(*profile, name+".pprof"))
		check(err)
		defer f.Close()
		_, err = io.Copy(f, resp.Body)
		check(err)
	}()
	return func() { <-done }
}
