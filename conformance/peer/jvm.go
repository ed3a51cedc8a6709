package peer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// maxLine bounds a line from the driver, in bytes.
	maxLine = 64 << 20
	// maxErrors bounds what is kept of the driver's standard error, in bytes.
	maxErrors = 64 << 10
	// stopTime is how long a JVM may take to end by itself.
	stopTime = 10 * time.Second
)

// JVMConfig says how to start a virtual machine.
type JVMConfig struct {
	// Main is the class to run; empty means Peer.
	Main string
	// HeapMiB bounds the heap; 0 means 256.
	HeapMiB int
	// Flags are further flags of the virtual machine.
	Flags []string
}

// JVM is a running virtual machine with the driver in it. All methods may be
// called from any goroutine.
type JVM struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	done chan struct{} // closed when the process has ended and all is read

	// Version is that of the Tribes jars, Java that of the machine.
	Version, Java string

	mu      sync.Mutex
	number  int
	waiting map[int]chan answer
	events  []Event
	changed chan struct{} // closed and replaced at every event
	stderr  bytes.Buffer
	ended   error
}

type answer struct {
	values url.Values
	err    error
}

// Event is something the driver told on its own.
type Event struct {
	// Kind is "message", "added", "gone", "log"…
	Kind string
	// Node is the name of the node it happened at; empty for logs.
	Node   string
	Values url.Values
}

// Value returns the Java value of the event.
func (e Event) Value() any {
	v, err := Decode(e.Values.Get("value"))
	if err != nil {
		return err
	}
	return v
}

// Error is a failure inside the virtual machine.
type Error struct {
	// Text is the exception.
	Text string
	// Faults are the members that a send failed for, by id in hexadecimal, and
	// the class of the exception that says why.
	Faults map[string]string
}

func (e *Error) Error() string {
	if len(e.Faults) == 0 {
		return "peer: " + e.Text
	}
	return fmt.Sprintf("peer: %s, faults %v", e.Text, e.Faults)
}

// ErrEnded is the error of everything that is asked of a JVM that is no more.
var ErrEnded = errors.New("peer: the virtual machine has ended")

// Start starts a virtual machine and waits until it answers; ctx bounds that.
func (p *Program) Start(ctx context.Context, c JVMConfig) (*JVM, error) {
	if c.Main == "" {
		c.Main = "Peer"
	}
	if c.HeapMiB == 0 {
		c.HeapMiB = 256
	}
	jars := p.tools.Tribes
	if len(p.tools.Tomcat) > 0 {
		jars = p.tools.Tomcat
	}
	args := []string{"-Xmx" + strconv.Itoa(c.HeapMiB) + "m", "-Xshare:auto", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
		// Without it a group cannot be joined on the loopback interface.
		"-Djava.net.preferIPv4Stack=true", "-Djava.awt.headless=true", "-Duser.language=en",
		"-Djava.security.egd=file:/dev/urandom", "-Dfile.encoding=UTF-8"}
	args = append(args, c.Flags...)
	args = append(args, "-cp", strings.Join(append([]string{p.dir}, jars...), string(os.PathListSeparator)), c.Main)
	j := &JVM{
		cmd:     exec.Command(p.tools.Java, args...),
		done:    make(chan struct{}),
		waiting: map[int]chan answer{},
		changed: make(chan struct{}),
	}
	j.cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "JAVA_TOOL_OPTIONS=")
	j.cmd.Stderr = (*errorLog)(j)
	out, err := j.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if j.in, err = j.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := j.cmd.Start(); err != nil {
		return nil, fmt.Errorf("peer: %w", err)
	}
	go j.read(out)
	if err := j.Wait(ctx, func(evs []Event) bool {
		return slices.ContainsFunc(evs, func(e Event) bool { return e.Kind == "ready" })
	}); err != nil {
		j.Kill()
		return nil, fmt.Errorf("peer: the driver does not start: %w\n%s", err, j.Stderr())
	}
	for _, e := range j.Events() {
		if e.Kind == "ready" {
			j.Version, j.Java = e.Values.Get("version"), e.Values.Get("java")
		}
	}
	return j, nil
}

// errorLog keeps the beginning of what a JVM writes to its standard error.
type errorLog JVM

func (l *errorLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stderr.Write(p[:min(len(p), maxErrors-l.stderr.Len())])
	return len(p), nil
}

func (j *JVM) read(out io.Reader) {
	in := bufio.NewScanner(out)
	in.Buffer(make([]byte, 64<<10), maxLine)
	for in.Scan() {
		j.line(in.Text())
	}
	_, _ = io.Copy(io.Discard, out)
	err := errors.Join(in.Err(), j.cmd.Wait())
	j.mu.Lock()
	j.ended = ErrEnded
	if err != nil {
		j.ended = fmt.Errorf("%w: %w", ErrEnded, err)
	}
	for _, w := range j.waiting {
		w <- answer{err: j.ended}
	}
	j.waiting = nil
	close(j.changed)
	j.mu.Unlock()
	close(j.done)
}

// line handles one line of the driver. Lines of others, such as the machine's
// own warnings, are kept with the errors.
func (j *JVM) line(s string) {
	kind, rest, _ := strings.Cut(s, " ")
	switch kind {
	case "!":
		v, err := url.ParseQuery(rest)
		if err != nil {
			break
		}
		j.mu.Lock()
		defer j.mu.Unlock()
		j.events = append(j.events, Event{Kind: v.Get("event"), Node: v.Get("node"), Values: v})
		close(j.changed)
		j.changed = make(chan struct{})
		return
	case "=", "-":
		number, rest, _ := strings.Cut(rest, " ")
		n, err := strconv.Atoi(number)
		if err != nil {
			break
		}
		v, err := url.ParseQuery(rest)
		a := answer{values: v, err: err}
		if kind == "-" && err == nil {
			e := &Error{Text: v.Get("error"), Faults: map[string]string{}}
			for f := range strings.SplitSeq(v.Get("faults"), ",") {
				if id, why, ok := strings.Cut(f, "/"); ok {
					e.Faults[id] = why
				}
			}
			a.err = e
		}
		j.mu.Lock()
		defer j.mu.Unlock()
		if w := j.waiting[n]; w != nil {
			delete(j.waiting, n)
			w <- a
		}
		return
	}
	_, _ = (*errorLog)(j).Write([]byte(s + "\n"))
}

// Stderr returns the beginning of what the machine wrote to its standard error.
func (j *JVM) Stderr() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.stderr.String()
}

// Events returns what the driver has told so far, in order.
func (j *JVM) Events() []Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.events[:len(j.events):len(j.events)]
}

// Wait blocks until cond holds for the events so far, looking again after each
// new one, or until ctx or the machine ends. cond must not change the events.
func (j *JVM) Wait(ctx context.Context, cond func([]Event) bool) error {
	for {
		j.mu.Lock()
		changed, evs, ended := j.changed, j.events[:len(j.events):len(j.events)], j.ended
		j.mu.Unlock()
		if cond(evs) {
			return nil
		}
		if ended != nil {
			return ended
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Call asks the driver for something and waits for its answer.
func (j *JVM) Call(ctx context.Context, verb string, args url.Values) (url.Values, error) {
	got := make(chan answer, 1)
	j.mu.Lock()
	if j.ended != nil {
		defer j.mu.Unlock()
		return nil, j.ended
	}
	j.number++
	n := j.number
	j.waiting[n] = got
	j.mu.Unlock()
	// One write for each line: an os.File puts writes in a row.
	if _, err := io.WriteString(j.in, fmt.Sprintf("%d %s %s\n", n, verb, args.Encode())); err != nil {
		return nil, fmt.Errorf("peer: %s: %w", verb, err)
	}
	select {
	case a := <-got:
		if a.err != nil {
			return a.values, fmt.Errorf("%s: %w", verb, a.err)
		}
		return a.values, nil
	case <-ctx.Done():
		j.mu.Lock()
		delete(j.waiting, n)
		j.mu.Unlock()
		return nil, fmt.Errorf("peer: %s: no answer: %w", verb, ctx.Err())
	}
}

// Stop ends the machine by closing its standard input, or by force if that
// takes longer than ten seconds. Nodes that are open do not say goodbye.
func (j *JVM) Stop() {
	_ = j.in.Close()
	select {
	case <-j.done:
	case <-time.After(stopTime):
		j.Kill()
	}
}

// Kill ends the machine at once, as kill -9 does.
func (j *JVM) Kill() {
	_ = j.cmd.Process.Kill()
	_ = j.in.Close()
	<-j.done
}

// Pause stops the machine where it stands (SIGSTOP), Resume lets it go on.
func (j *JVM) Pause() error { return j.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume is the end of a Pause.
func (j *JVM) Resume() error { return j.cmd.Process.Signal(syscall.SIGCONT) }
