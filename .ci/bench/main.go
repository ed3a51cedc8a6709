// Command bench runs a bare net/http server and Longhouse nodes side by side
// under wrk and prints the ratios. All processes share this machine: compare
// ratios, not absolute numbers.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/cmd/demo"
)

var (
	duration = flag.Duration("duration", 4*time.Second, "length of one measurement")
	rounds   = flag.Int("rounds", 5, "measurements of each kind; the median counts")
	bare     = flag.String("bare", "", "serve the bare handler on this address (the program starts itself so)")
	cookies  = 64
)

// wrkScript gives every request one of the cookies, so that each connection's
// requests meet many sessions and all sessions are busy.
const wrkScript = `
local cookies, i = {}, 0
function init(args)
  for line in io.lines(args[1]) do cookies[#cookies + 1] = line end
  i = math.random(#cookies)
end
function request()
  if #cookies == 0 then return wrk.format("GET") end
  i = i % #cookies + 1
  return wrk.format("GET", nil, { ["Cookie"] = "JSESSIONID=" .. cookies[i] })
end
`

func main() {
	flag.Parse()
	if *bare != "" {
		http.Handle("/", demo.Handler("bare"))
		fail(http.ListenAndServe(*bare, nil))
	}
	if _, err := exec.LookPath("wrk"); err != nil {
		fail(errors.New("wrk is missing: apt-get install wrk"))
	}
	dir, err := os.MkdirTemp("", "longhouse-bench-")
	check(err)
	defer os.RemoveAll(dir)
	script := filepath.Join(dir, "cookies.lua")
	check(os.WriteFile(script, []byte(wrkScript), 0o600))
	binary := filepath.Join(dir, "longhouse")
	build := exec.Command("go", "build", "-o", binary, "./cmd/longhouse")
	build.Stderr = os.Stderr
	check(build.Run())

	self, err := os.Executable()
	check(err)
	bareAddr := freeAddr()
	stopBare := start(exec.Command(self, "-bare", bareAddr), nil)
	defer stopBare()
	awaitHTTP(bareAddr)

	type result struct{ rate, p99 float64 }
	measure := func(addr, path, jar string) result {
		rate, p99 := wrk(script, addr, path, jar)
		return result{rate, p99}
	}
	empty := filepath.Join(dir, "none")
	check(os.WriteFile(empty, nil, 0o600))

	compare := func(name, addr, path, jar string, want float64) {
		var ratios, rates, bares, p99s []float64
		for range *rounds {
			b := measure(bareAddr, "/plain", empty)
			l := measure(addr, path, jar)
			ratios = append(ratios, l.rate/b.rate)
			rates, bares, p99s = append(rates, l.rate), append(bares, b.rate), append(p99s, l.p99)
		}
		mark := "ok"
		if median(ratios) < want {
			mark = "BELOW"
		}
		fmt.Printf("%-28s %8.0f req/s   bare %8.0f req/s   ratio %.2f (wanted %.2f) %-5s  p99 %.1f ms\n",
			name, median(rates), median(bares), median(ratios), want, mark, median(p99s))
	}
	for _, send := range []string{"async", "sync"} {
		a, stopA, b, stopB := cluster(binary, send)
		_ = b
		jar := filepath.Join(dir, send)
		writeJar(a, jar)
		if send == "async" {
			compare("/plain, full pipeline", a, "/plain", empty, 0.9)
			compare("/read, two nodes", a, "/read", jar, 0)
			compare("/write, two nodes, async", a, "/write", jar, 0.6)
		} else {
			compare("/write, two nodes, sync", a, "/write", jar, 0.4)
		}
		stopA()
		stopB()
	}
}

// cluster starts two nodes that know each other.
func cluster(binary, send string) (a string, stopA func(), b string, stopB func()) {
	_, port, _ := net.SplitHostPort(freeAddr())
	args := []string{"run", "--announce", "--set", "admin.address=127.0.0.1:0", "--set", "connectors[0].address=127.0.0.1:0",
		"--set", "log.level=warn", "--set", "cluster.send=" + send, "--set", "cluster.channel.membership.port=" + port}
	var said [2]struct {
		HTTP  []string
		Admin string
	}
	stops := [2]func(){}
	for i, route := range []string{"a", "b"} {
		stops[i] = start(exec.Command(binary, append(slices.Clone(args), "--set", "engine.route="+route)...), &said[i])
	}
	for i := range said {
		for deadline := time.Now().Add(20 * time.Second); ; {
			var members []any
			resp, err := http.Get("http://" + said[i].Admin + "/v1/members")
			if err == nil {
				err = json.NewDecoder(resp.Body).Decode(&members)
				resp.Body.Close()
			}
			if err == nil && len(members) == 2 {
				break
			}
			if time.Now().After(deadline) {
				fail(fmt.Errorf("the nodes do not find each other: %d members, %v", len(members), err))
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return said[0].HTTP[0], stops[0], said[1].HTTP[0], stops[1]
}

// writeJar makes one session per connection.
func writeJar(addr, file string) {
	var b strings.Builder
	for range cookies {
		resp, err := http.Get("http://" + addr + "/write")
		check(err)
		resp.Body.Close()
		for _, c := range resp.Cookies() {
			if c.Name == "JSESSIONID" {
				b.WriteString(c.Value + "\n")
			}
		}
	}
	check(os.WriteFile(file, []byte(b.String()), 0o600))
}

var (
	rateLine = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	p99Line  = regexp.MustCompile(`99%\s+([0-9.]+)(us|ms|s)`)
	badLine  = regexp.MustCompile(`(?m)^\s*(Non-2xx.*|Socket errors.*)$`)
)

func wrk(script, addr, path, jar string) (rate, p99ms float64) {
	out, err := exec.Command("wrk", "-t", "2", "-c", "64", "-d", strconv.Itoa(int(duration.Seconds())), "--latency",
		"-s", script, "http://"+addr+path, "--", jar).CombinedOutput()
	if err != nil {
		fail(fmt.Errorf("wrk: %w\n%s", err, out))
	}
	if bad := badLine.Find(out); bad != nil {
		fail(fmt.Errorf("wrk %s: %s", path, bad))
	}
	m := rateLine.FindSubmatch(out)
	if m == nil {
		fail(fmt.Errorf("wrk says nothing about its rate:\n%s", out))
	}
	rate, _ = strconv.ParseFloat(string(m[1]), 64)
	if l := p99Line.FindSubmatch(out); l != nil {
		p99ms, _ = strconv.ParseFloat(string(l[1]), 64)
		p99ms *= map[string]float64{"us": 0.001, "ms": 1, "s": 1000}[string(l[2])]
	}
	return rate, p99ms
}

// start runs a command until the returned function is called; if said is set,
// the first line of its output is decoded into it.
func start(c *exec.Cmd, said any) (stop func()) {
	c.Stderr = os.Stderr
	stdin, err := c.StdinPipe()
	check(err)
	out, err := c.StdoutPipe()
	check(err)
	check(c.Start())
	lines := bufio.NewReader(out)
	if said != nil {
		check(json.NewDecoder(lines).Decode(said))
	}
	go io.Copy(io.Discard, lines) //nolint:errcheck // ends with the process
	return func() {
		stdin.Close()
		if said == nil {
			_ = c.Process.Kill()
		}
		_ = c.Wait()
	}
}

func awaitHTTP(addr string) {
	for range 200 {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	fail(fmt.Errorf("nothing listens on %s", addr))
}

func freeAddr() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	defer ln.Close()
	return ln.Addr().String()
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
	os.Exit(1)
}
