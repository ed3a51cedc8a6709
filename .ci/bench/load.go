package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// users is how many connections and sessions a measurement has.
const users = 64

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

// result is one measurement of wrk; times are milliseconds.
type result struct{ rate, p50, p99 float64 }

var (
	rateLine = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	timeLine = regexp.MustCompile(`(?m)^\s+(50|99)%\s+([0-9.]+)(us|ms|s)\s*$`)
	badLine  = regexp.MustCompile(`(?m)^\s*(Non-2xx.*|Socket errors.*)$`)
)

func needWrk() {
	if _, err := exec.LookPath("wrk"); err != nil {
		fail(errors.New("wrk is missing: apt-get install wrk"))
	}
}

// wrk loads a path with the cookies of a jar.
func wrk(addr, path, jar string, d time.Duration) (r result) {
	script := filepath.Join(work, "cookies.lua")
	check(os.WriteFile(script, []byte(wrkScript), 0o600))
	out, err := exec.Command("wrk", "-t", "2", "-c", strconv.Itoa(users), "-d", strconv.Itoa(max(int(d.Seconds()), 1)), "--latency", "--timeout", "60s",
		"-s", script, "http://"+addr+path, "--", jar).CombinedOutput()
	if err != nil {
		fail(fmt.Errorf("wrk: %w\n%s", err, out))
	}
	if bad := badLine.Find(out); bad != nil {
		fail(fmt.Errorf("wrk %s: %s", path, bad))
	}
	m := rateLine.FindSubmatch(out)
	times := timeLine.FindAllSubmatch(out, 2)
	if m == nil || len(times) != 2 {
		fail(fmt.Errorf("wrk does not say what is asked of it:\n%s", out))
	}
	r.rate, _ = strconv.ParseFloat(string(m[1]), 64)
	for _, l := range times {
		v, _ := strconv.ParseFloat(string(l[2]), 64)
		v *= map[string]float64{"us": 0.001, "ms": 1, "s": 1000}[string(l[3])]
		if string(l[1]) == "50" {
			r.p50 = v
		} else {
			r.p99 = v
		}
	}
	return r
}

// jar writes cookies to a file for wrk, and returns its name.
func jar(name string, cookies []string) string {
	file := filepath.Join(work, name)
	check(os.WriteFile(file, []byte(strings.Join(cookies, "\n")), 0o600))
	return file
}

// medians of each column.
func medians(rs []result) (m result) {
	column := func(f func(result) float64) float64 {
		var v []float64
		for _, r := range rs {
			v = append(v, f(r))
		}
		return median(v)
	}
	return result{
		column(func(r result) float64 { return r.rate }),
		column(func(r result) float64 { return r.p50 }),
		column(func(r result) float64 { return r.p99 }),
	}
}

// connection asks one thing after the other, with as little work as possible.
type connection struct {
	c   net.Conn
	r   *bufio.Reader
	out []byte
}

func connect(addr string) *connection {
	c, err := net.Dial("tcp", addr)
	check(err)
	return &connection{c: c, r: bufio.NewReader(c)}
}

func (c *connection) close() { c.c.Close() }

func (c *connection) get(path, cookie string) (body, set string, err error) {
	return c.ask("GET", path, cookie)
}

// ask returns the body and the session cookie that was set, if one was.
func (c *connection) ask(method, path, cookie string) (body, set string, err error) {
	c.out = append(append(append(c.out[:0], method...), ' '), path...)
	c.out = append(c.out, " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"...)
	if cookie != "" {
		c.out = append(append(append(c.out, "Cookie: JSESSIONID="...), cookie...), "\r\n"...)
	}
	c.out = append(c.out, "\r\n"...)
	if err := c.c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", "", err
	}
	if _, err := c.c.Write(c.out); err != nil {
		return "", "", err
	}
	status, length := "", -1
	for {
		b, err := c.r.ReadSlice('\n')
		if err != nil {
			return "", "", err
		}
		line := strings.TrimRight(string(b), "\r\n")
		if status == "" {
			status = line
			continue
		}
		if line == "" {
			break
		}
		name, value, _ := strings.Cut(line, ": ")
		switch strings.ToLower(name) {
		case "content-length":
			length, _ = strconv.Atoi(value)
		case "set-cookie":
			if rest, ok := strings.CutPrefix(value, "JSESSIONID="); ok {
				set, _, _ = strings.Cut(rest, ";")
			}
		}
	}
	if length < 0 {
		return "", "", fmt.Errorf("%s: an answer without length: %s", path, status)
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(c.r, b); err != nil {
		return "", "", err
	}
	if !strings.HasPrefix(status, "HTTP/1.1 200") && !strings.HasPrefix(status, "HTTP/1.1 303") {
		return "", "", fmt.Errorf("%s: %s: %.200s", path, status, b)
	}
	return string(b), set, nil
}

// fill makes count sessions by requests, and returns their cookies.
func fill(addr, method, path string, count int) []string {
	cookies := make([]string, count)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(users, count) {
		c := connect(addr)
		wg.Go(func() {
			defer c.close()
			for i := next.Add(1) - 1; i < int64(count); i = next.Add(1) - 1 {
				_, set, err := c.ask(method, path, "")
				if err == nil && set == "" {
					err = fmt.Errorf("%s: no session", path)
				}
				check(err)
				cookies[i] = set
			}
		})
	}
	wg.Wait()
	return cookies
}

// follows waits until new sessions of one node are served by another one, too:
// what is measured after that is replicated.
func follows(from, to, prefix string) {
	a, b := connect(from), connect(to)
	defer a.close()
	defer b.close()
	await("the other node does not get sessions", func() bool {
		_, cookie, err := a.get(prefix+"/write", "")
		check(err)
		for range 10 {
			time.Sleep(20 * time.Millisecond)
			got, _, err := b.get(prefix+"/read", cookie)
			check(err)
			if got == "1" {
				return true
			}
		}
		return false
	})
}

// sample is one request of a steady load: when it was due, since the start of
// the load, how long after that its answer was there, and how much of that the
// load itself has wasted.
type sample struct{ due, delay, own time.Duration }

// steady asks for things at fixed times until stop is closed, whatever the
// server does: what a request had to wait because of the one before it counts.
func steady(addr string, perSecond int, cookies []string, path func(i int) string, began time.Time, stop <-chan struct{}) []sample {
	var wg sync.WaitGroup
	parts := make([][]sample, users)
	for k := range users {
		c := connect(addr)
		wg.Go(func() {
			defer c.close()
			for i := k; ; i += users {
				due := time.Duration(i) * time.Second / time.Duration(perSecond)
				idle := time.Since(began) < due
				time.Sleep(due - time.Since(began))
				select {
				case <-stop:
					return
				default:
				}
				own := time.Duration(0)
				if idle {
					own = time.Since(began) - due
				}
				_, _, err := c.get(path(i), cookies[(i*7919)%len(cookies)])
				check(err)
				parts[k] = append(parts[k], sample{due, time.Since(began) - due, own})
			}
		})
	}
	wg.Wait()
	return slices.Concat(parts...)
}
