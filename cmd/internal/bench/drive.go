package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	javasource "github.com/longhouse-go/longhouse/conformance/peer/java"
)

// System is a kind of node.
type System struct {
	// Name is longhouse, raw or tribes.
	Name string
	// Command starts an agent; n counts the agents of the system.
	Command func(n int) *exec.Cmd
	// Warm is how long the system is run before it is measured.
	Warm time.Duration
}

// Raw is the name of the system that is plain TCP.
const Raw = "raw"

// Tribes returns the system that is made of the jars of Apache Tribes in dir,
// after compiling its agent into work.
func Tribes(ctx context.Context, dir, work string) (System, error) {
	var jars []string
	for _, want := range []string{"*tribes.jar", "*juli.jar"} {
		found, err := filepath.Glob(filepath.Join(dir, want))
		if err != nil {
			return System{}, err
		}
		if len(found) == 0 {
			return System{}, fmt.Errorf("bench: %s holds no %s (Debian: apt-get install libtomcat10-java, then --tribes-jars /usr/share/java)", dir, want)
		}
		jars = append(jars, found[0])
	}
	for _, program := range []string{"javac", "java"} {
		if _, err := exec.LookPath(program); err != nil {
			return System{}, fmt.Errorf("bench: %w (Debian: apt-get install default-jdk-headless)", err)
		}
	}
	path := strings.Join(append(jars, work), string(os.PathListSeparator))
	source := filepath.Join(work, "Bench.java")
	if err := os.WriteFile(source, []byte(javasource.Bench), 0o600); err != nil {
		return System{}, err
	}
	if out, err := exec.CommandContext(ctx, "javac", "-d", work, "-cp", path, source).CombinedOutput(); err != nil {
		return System{}, fmt.Errorf("bench: compile the Tribes agent: %w: %s", err, out)
	}
	// The log goes to standard error: nobody looks at it unless a node fails.
	return System{Name: "tribes", Warm: 2 * time.Second, Command: func(n int) *exec.Cmd {
		return exec.Command("java", "-Djava.net.preferIPv4Stack=true", fmt.Sprintf("-Dport=%d", 4700+20*n), "-cp", path, "Bench")
	}}, nil
}

// agent is a running node.
type agent struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Scanner
	errors *tail
	record string
	cpu    time.Duration // used up to the beginning of a run
}

// tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailSize = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if n := len(t.b) - tailSize; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}

// patience is how long an agent may take for anything but a run.
const patience = 30 * time.Second

func startAgent(s System, n int) (*agent, error) {
	a := &agent{cmd: s.Command(n), errors: &tail{}}
	a.cmd.Stderr = a.errors
	var err error
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	a.out = bufio.NewScanner(out)
	a.out.Buffer(nil, 1<<20)
	if err := a.cmd.Start(); err != nil {
		return nil, fmt.Errorf("bench: start %s: %w", s.Name, err)
	}
	words, err := a.read("ready", patience)
	if err == nil && len(words) != 1 {
		err = errors.New("no record")
	}
	if err != nil {
		a.close()
		return nil, fmt.Errorf("bench: %s did not start: %w\n%s", s.Name, err, a.errors)
	}
	a.record = words[0]
	return a, nil
}

// read waits for a line that begins with word and returns the rest. An agent
// that takes too long is killed.
func (a *agent) read(word string, d time.Duration) ([]string, error) {
	late := time.AfterFunc(d, func() { _ = a.cmd.Process.Kill() })
	defer late.Stop()
	for a.out.Scan() {
		words := strings.Fields(a.out.Text())
		switch {
		case len(words) == 0:
		case words[0] == word:
			return words[1:], nil
		case words[0] == "error":
			return nil, errors.New(strings.Join(words[1:], " "))
		}
	}
	if err := a.out.Err(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("the node ended, or did not answer within %v", d)
}

func (a *agent) ask(d time.Duration, answer, format string, args ...any) ([]int64, error) {
	if _, err := fmt.Fprintf(a.in, format+"\n", args...); err != nil {
		return nil, err
	}
	words, err := a.read(answer, d)
	if err != nil {
		return nil, err
	}
	var out []int64
	for _, w := range words {
		n, err := strconv.ParseInt(w, 10, 64)
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, nil
}

func (a *agent) close() {
	a.in.Close()
	late := time.AfterFunc(patience, func() { _ = a.cmd.Process.Kill() })
	for a.out.Scan() {
	}
	_ = a.cmd.Wait() // it may have been killed, or have failed: reported already
	late.Stop()
}

// cpuTime returns the processor time that the agent has used, on Linux.
func (a *agent) cpuTime() time.Duration {
	if runtime.GOOS != "linux" {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	// Fields after the name in parentheses, in ticks of a hundredth second.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(f[11], 10, 64)
	system, _ := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// group is one sending node and its receivers.
type group struct {
	system  System
	agents  []*agent // the first one sends
	started int
}

// grow sees to it that there are n members.
func (g *group) grow(n int) error {
	for len(g.agents) < n {
		a, err := startAgent(g.system, len(g.agents))
		if err != nil {
			return err
		}
		g.agents = append(g.agents, a)
		if len(g.agents) == 1 {
			continue
		}
		first := g.agents[0]
		if _, err := first.ask(patience, "ok", "join %s", a.record); err != nil {
			return err
		}
		if _, err := a.ask(patience, "ok", "join %s", first.record); err != nil {
			return err
		}
	}
	return nil
}

func (g *group) close() {
	for _, a := range g.agents {
		a.close()
	}
}

// run makes one measurement.
func (g *group) run(c Cell, d time.Duration) (Run, error) {
	receivers := g.agents[1:]
	for _, a := range g.agents {
		if _, err := a.ask(patience, "ok", "reset"); err != nil {
			return Run{}, err
		}
		a.cpu = a.cpuTime()
	}
	n, err := g.agents[0].ask(d+patience, "ran", "run %s %d %d %d", c.Option, c.Size, c.Senders, d.Milliseconds())
	if err != nil {
		return Run{}, err
	}
	if len(n) != 9 {
		return Run{}, fmt.Errorf("%d numbers instead of 9", len(n))
	}
	r := Run{
		Sent: n[0], Failed: n[1],
		P50: time.Duration(n[4]), P90: time.Duration(n[5]), P99: time.Duration(n[6]), P999: time.Duration(n[7]), Max: time.Duration(n[8]),
	}
	start, end := n[2], n[3]
	for _, a := range receivers {
		got, last, err := a.drained(r.Sent)
		if err != nil {
			return Run{}, err
		}
		r.Delivered += got
		end = max(end, last)
		if c.requests() {
			break
		}
	}
	if r.Sent == 0 {
		return r, fmt.Errorf("all of %d messages failed", r.Failed)
	}
	r.Seconds = float64(end-start) / 1e9
	r.PerSecond = float64(r.Delivered) / r.Seconds
	if r.Delivered > 0 {
		var cpu time.Duration
		for _, a := range g.agents {
			cpu += a.cpuTime() - a.cpu
		}
		r.CPU = cpu / time.Duration(r.Delivered)
	}
	return r, nil
}

// drained waits until the agent has received as many messages as were sent, or
// nothing has come for a while.
func (a *agent) drained(sent int64) (got, last int64, err error) {
	quiet := time.Now()
	for before := int64(-1); time.Since(quiet) < 3*time.Second; before = got {
		n, err := a.ask(patience, "count", "count")
		if err != nil {
			return 0, 0, err
		}
		if len(n) != 2 {
			return 0, 0, errors.New("count: want two numbers")
		}
		if got, last = n[0], n[1]; got >= sent {
			break
		}
		if got != before {
			quiet = time.Now()
		}
		time.Sleep(time.Millisecond)
	}
	return got, last, nil
}
