package conformance

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins"
)

// Level says how binding a requirement is.
type Level uint8

const (
	// Must: who fails it is not conformant.
	Must Level = iota + 1
	// Should: only counts with [Strict].
	Should
)

// String returns the level in one word.
func (l Level) String() string {
	if l == Should {
		return "should"
	}
	return "must"
}

// MarshalText implements encoding.TextMarshaler.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *Level) UnmarshalText(b []byte) error {
	switch string(b) {
	case "must":
		*l = Must
	case "should":
		*l = Should
	default:
		return fmt.Errorf("conformance: unknown level %q (known: must, should)", b)
	}
	return nil
}

// Check is one requirement and the code that tries it.
type Check struct {
	// ID is "<profile>/<name>". It never changes its meaning.
	ID      string
	Profile string
	Level   Level
	// Features that the subject must declare for the check to apply; a check
	// without features belongs to the core of its profile.
	Features []string
	// Requirement is one sentence; Source says where it is promised.
	Requirement, Source string
	// Once says that the check is run once, after all others and with their
	// results, and not once in every mode.
	Once bool
	// Run tries a subject. It fails T if, and only if, the subject breaks the
	// requirement.
	Run func(t *T)
	// Saboteurs are wrong subjects; Run must fail every one of them.
	Saboteurs []Saboteur
}

// Saboteur is a subject with one deliberate mistake.
type Saboteur struct {
	// Name says what is wrong: "forwards twice".
	Name string
	New  func() Subject
}

// Timeouts is the table of all real times that checks wait for. Virtual times
// are not in it.
type Timeouts struct {
	// Check is how long one check may take at all.
	Check time.Duration
	// Start and Stop are for starting and stopping a subject, Call for one
	// call, Event for something that must happen by itself.
	Start, Stop, Call, Event time.Duration
	// Quiet is how long nothing may happen where nothing must.
	Quiet time.Duration
}

// DefaultTimeouts is the table for an ordinary machine, ten times as busy as it
// should be: what works does not need them.
func DefaultTimeouts() Timeouts {
	return Timeouts{
		Check: 5 * time.Minute,
		Start: 30 * time.Second,
		Stop:  30 * time.Second,
		Call:  5 * time.Second,
		Event: 15 * time.Second,
		Quiet: 100 * time.Millisecond,
	}
}

// Scale returns the table with all times multiplied.
func (o Timeouts) Scale(factor float64) Timeouts {
	for _, d := range []*time.Duration{&o.Check, &o.Start, &o.Stop, &o.Call, &o.Event, &o.Quiet} {
		*d = time.Duration(float64(*d) * factor)
	}
	return o
}

// T is what a check runs on: a testing.T that knows the subject and notes what
// went wrong for the report. Give T itself to code that takes a testing.TB.
type T struct {
	*testing.T
	Subject Subject
	// Mode is where the subject's code is to run.
	Mode core.PluginMode
	// Stream makes a process be talked to over a gRPC stream.
	Stream bool
	// Seed is what all randomness comes from; see [T.Rand].
	Seed uint64
	// Timeouts are the real times to wait for, already scaled.
	Timeouts Timeouts
	// Features are the declared features of the subject.
	Features []string
	// Results are those of all checks so far; only for checks that are run
	// Once.
	Results []Result

	note *notes
}

// notes is what a T and its copies inside bubbles collect. Its lock is never
// held across anything that blocks.
type notes struct {
	mu        sync.Mutex
	failures  []string        // guarded by mu
	skipped   string          // guarded by mu
	virtual   time.Duration   // guarded by mu
	events    []string        // guarded by mu
	artefacts []string        // guarded by mu
	hosts     []*plugins.Host // guarded by mu
	dir       string          // for artefacts, "" for none
	id        string
}

func (n *notes) fail(msg string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.failures) < maxFailures {
		n.failures = append(n.failures, strings.TrimSpace(msg))
	}
}

// maxFailures bounds the messages of one check in a report.
const maxFailures = 8

// Rand returns a generator that depends on the seed and the word alone.
func (t *T) Rand(word string) *rand.Rand {
	h := uint64(14695981039346656037)
	for _, b := range []byte(word) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return rand.New(rand.NewPCG(t.Seed, h))
}

// Error is testing.T's, noted for the report.
func (t *T) Error(args ...any) {
	t.Helper()
	t.note.fail(fmt.Sprintln(args...))
	t.T.Error(args...)
}

// Errorf is testing.T's, noted for the report.
func (t *T) Errorf(format string, args ...any) {
	t.Helper()
	t.note.fail(fmt.Sprintf(format, args...))
	t.T.Errorf(format, args...)
}

// Fatal is testing.T's, noted for the report.
func (t *T) Fatal(args ...any) {
	t.Helper()
	t.note.fail(fmt.Sprintln(args...))
	t.T.Fatal(args...)
}

// Fatalf is testing.T's, noted for the report.
func (t *T) Fatalf(format string, args ...any) {
	t.Helper()
	t.note.fail(fmt.Sprintf(format, args...))
	t.T.Fatalf(format, args...)
}

// Skip is testing.T's, noted for the report.
func (t *T) Skip(args ...any) {
	t.Helper()
	t.skip(fmt.Sprintln(args...))
	t.T.Skip(args...)
}

// Skipf is testing.T's, noted for the report.
func (t *T) Skipf(format string, args ...any) {
	t.Helper()
	t.skip(fmt.Sprintf(format, args...))
	t.T.Skipf(format, args...)
}

func (t *T) skip(why string) {
	t.note.mu.Lock()
	t.note.skipped = strings.TrimSpace(why)
	t.note.mu.Unlock()
}

// Event adds a line to the check's event log. The log must depend on the seed
// and the subject only: it is compared between the modes.
func (t *T) Event(format string, args ...any) {
	t.note.mu.Lock()
	defer t.note.mu.Unlock()
	t.note.events = append(t.note.events, fmt.Sprintf(format, args...))
}

// Artefact keeps data for the diagnosis of a failure, if the run has a
// directory for it. name is a file name.
func (t *T) Artefact(name string, data []byte) {
	if t.note.dir == "" {
		return
	}
	path := filepath.Join(t.note.dir, strings.ReplaceAll(t.note.id, "/", "_")+"-"+string(t.Mode)+"-"+filepath.Base(name))
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Logf("artefact %s: %v", name, err)
		return
	}
	t.note.mu.Lock()
	t.note.artefacts = append(t.note.artefacts, path)
	t.note.mu.Unlock()
}

// Bubble runs f in virtual time. A goroutine that outlives it is a failure.
func (t *T) Bubble(f func(t *T)) {
	t.Helper()
	defer t.catch()
	synctest.Test(t.T, func(inner *testing.T) { t.inside(inner, f) })
}

// Sim runs f in virtual time on a simulated network. The network's seed is the
// run's unless c has one.
func (t *T) Sim(c channeltest.SimConfig, f func(t *T, nw *channeltest.SimNet)) {
	t.Helper()
	defer t.catch()
	if c.Seed == 0 {
		c.Seed = t.Seed
	}
	channeltest.Run(t.T, c, func(inner *testing.T, nw *channeltest.SimNet) {
		t.inside(inner, func(t *T) { f(t, nw) })
	})
}

func (t *T) inside(inner *testing.T, f func(t *T)) {
	start := time.Now()
	defer func() {
		t.note.mu.Lock()
		t.note.virtual += time.Since(start)
		t.note.mu.Unlock()
	}()
	c := *t
	c.T = inner
	f(&c)
}

// catch makes a failure of a bubble's deadlock and of a panic in a check.
func (t *T) catch() {
	if r := recover(); r != nil {
		t.Errorf("%v (a goroutine has not ended, or a call never returned)", r)
	}
}

// Eventually waits until cond returns nil, looking every few milliseconds, and
// fails the check with cond's last error after the time. Inside a bubble the
// time is virtual.
func (t *T) Eventually(within time.Duration, cond func() error) {
	t.Helper()
	for start := time.Now(); ; {
		err := cond()
		if err == nil {
			return
		}
		if time.Since(start) >= within {
			t.Fatalf("not within %v: %v", within, err)
		}
		time.Sleep(min(5*time.Millisecond, within))
	}
}
