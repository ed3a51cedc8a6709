package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"strconv"
	"time"

	"github.com/longhouse-go/longhouse/conformance/peer"
)

// The ratios of requests per second that are wanted, and the channel's send
// options that Tomcat is given for them: asynchronous is 8; synchronous is 6, an
// acknowledgement that the other side has processed the message.
var matching = map[string]struct {
	options string
	write   float64
}{"async": {"8", 1.6}, "sync": {"6", 2}}

const wantedRead = 2

// tomcatParts compares with two Tomcats.
func tomcatParts() {
	needWrk()
	tools, err := peer.Find()
	check(err)
	if len(tools.Tomcat) == 0 {
		fail(fmt.Errorf("the jars of a whole Tomcat are missing: apt-get install --no-install-recommends %s", peer.Packages))
	}
	ctx := context.Background()
	program, err := peer.Build(ctx, tools, work)
	check(err)
	fmt.Printf("tomcat: two nodes each, all running at once, asked in turn; %d connections, %d sessions; warmed up for %v\n", users, users, *warm)
	fmt.Printf("  %-6s %-5s %-7s  %-36s  %-36s  %s\n", "", "", "", "longhouse", "tomcat", "ratios")
	fmt.Printf("  %-6s %-5s %-7s  %12s %11s %11s  %12s %11s %11s\n", "", "", "", "req/s", "p50 ms", "p99 ms", "req/s", "p50 ms", "p99 ms")
	for _, manager := range list(*managers) {
		for _, send := range list(*sends) {
			if *smoke && (manager == "delta") != (send == "async") {
				continue
			}
			besideTomcat(ctx, program, manager, send)
		}
	}
}

// tomcats starts two nodes, each in a virtual machine of its own with the
// defaults of one, and returns their addresses.
func tomcats(ctx context.Context, p *peer.Program, manager, options string) (addrs [2]string, version string, stop func()) {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	args := url.Values{
		"group": {fmt.Sprintf("239.255.%d.%d", rand.IntN(256), 1+rand.IntN(254))}, "groupPort": {freePort("udp")},
		"manager": {manager}, "options": {options}, "mapOptions": {options},
		"dropTime": {"20000"}, // a busy machine must not lose members by itself
	}
	var machines [2]*peer.JVM
	for i := range machines {
		j, err := p.Start(ctx, peer.JVMConfig{HeapMiB: 1024, Flags: []string{"-XX:-UseSerialGC", "-XX:+UseG1GC", "-XX:TieredStopAtLevel=4"}})
		check(err)
		machines[i], version = j, j.Version
		bye = append(bye, j.Kill)
		name := fmt.Sprintf("tomcat%d", i)
		args.Set("node", name)
		args.Set("route", name)
		args.Set("port", freePort("tcp"))
		args.Set("dir", filepath.Join(work, name+options+manager))
		r, err := j.Call(ctx, "webOpen", args)
		check(err)
		addrs[i] = "127.0.0.1:" + r.Get("http")
	}
	return addrs, version, func() {
		for _, j := range machines {
			j.Kill()
		}
	}
}

func besideTomcat(ctx context.Context, p *peer.Program, manager, send string) {
	match, ok := matching[send]
	if !ok {
		fail(fmt.Errorf("-sends: %q is neither async nor sync", send))
	}
	theirs, version, stop := tomcats(ctx, p, manager, match.options)
	defer stop()
	c := newCluster("cluster.manager.use="+manager, "cluster.send="+send)
	defer c.stop()
	ours := [2]string{c.start().http, c.start().http}
	c.together()

	const prefix = "/app" // the context of Tomcat's application
	follows(ours[0], ours[1], "")
	follows(theirs[0], theirs[1], prefix)
	ourJar := jar("ours", fill(ours[0], "GET", "/write", users))
	theirJar := jar("theirs", fill(theirs[0], "GET", prefix+"/write", users))
	for _, path := range list(*paths) {
		wrk(theirs[0], prefix+path, theirJar, *warm)
		wrk(ours[0], path, ourJar, *warm/5)
		var l, t []result
		var ratios, p99s []float64
		for range *rounds {
			r, s := wrk(ours[0], path, ourJar, *duration), wrk(theirs[0], prefix+path, theirJar, *duration)
			l, t = append(l, r), append(t, s)
			ratios, p99s = append(ratios, r.rate/s.rate), append(p99s, r.p99/s.p99)
		}
		us, them := medians(l), medians(t)
		fmt.Printf("  %-6s %-5s %-7s  %12.0f %11.2f %11.2f  %12.0f %11.2f %11.2f  ", manager, send, path,
			us.rate, us.p50, us.p99, them.rate, them.p50, them.p99)
		want := 0.0
		switch path {
		case "/read":
			want = wantedRead
		case "/write":
			want = match.write
		}
		ratio, p99 := median(ratios), median(p99s)
		if want == 0 {
			fmt.Printf("x %.2f  p99/ %.2f\n", ratio, p99)
			continue
		}
		fmt.Printf("x %.2f (wanted %s) %s  p99/ %.2f (below 1) %s\n", ratio, strconv.FormatFloat(want, 'g', 3, 64), wanted(ratio, want, true), p99, wanted(p99, 1, false))
	}
	fmt.Printf("  %26s Tomcat %s, %s manager, send options %s (%s)\n", "", version, manager, match.options, time.Now().Format(time.TimeOnly))
}
