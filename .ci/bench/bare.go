package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"

	"github.com/longhouse-go/longhouse/cmd/demo"
)

func serveBare(addr string) error {
	http.Handle("/", demo.Handler("bare"))
	return http.ListenAndServe(addr, nil)
}

// bareParts compares with a net/http server that has no sessions.
func bareParts() {
	needWrk()
	fmt.Println("bare: beside a net/http server without sessions, which gets the same requests, cookies included, in turn")
	self, err := os.Executable()
	check(err)
	bare := freeAddr()
	defer start(exec.Command(self, "-serve", bare), nil)()
	await("the bare server does not listen", func() bool {
		c, err := net.Dial("tcp", bare)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	none := jar("none", nil)
	compare := func(name, addr, path, jar string, want float64) {
		var ours, theirs []result
		var ratios []float64
		for range *rounds {
			b := wrk(bare, "/plain", jar, *duration)
			l := wrk(addr, path, jar, *duration)
			ours, theirs, ratios = append(ours, l), append(theirs, b), append(ratios, l.rate/b.rate)
		}
		l, b := medians(ours), medians(theirs)
		fmt.Printf("  %-28s %8.0f req/s   bare %8.0f req/s   ratio %.2f (wanted %.2f) %-6s  p50 %.2f ms, p99 %.1f ms; bare %.2f, %.1f\n",
			name, l.rate, b.rate, median(ratios), want, wanted(median(ratios), want, true), l.p50, l.p99, b.p50, b.p99)
	}
	for _, send := range list(*sends) {
		c := newCluster("cluster.send=" + send)
		a, b := c.start(), c.start()
		c.together()
		follows(a.http, b.http, "")
		jar := jar("bare-"+send, fill(a.http, "GET", "/write", users))
		if send == "async" {
			compare("/plain, full pipeline", a.http, "/plain", none, 0.9)
			compare("/read, two nodes", a.http, "/read", jar, 0.9)
			compare("/write, two nodes, async", a.http, "/write", jar, 0.75)
		} else {
			compare("/write, two nodes, sync", a.http, "/write", jar, 0.5)
		}
		c.stop()
	}
}
