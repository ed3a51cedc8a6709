//go:build unix

package plugins

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
)

// waitFor waits until ok; it polls because processes have no virtual time.
func waitFor(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("timed out: %s", what)
		}
	}
}

func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return syscall.Kill(pid, 0) == nil && !os.IsNotExist(err)
	}
	i := strings.LastIndexByte(string(b), ')')
	return !strings.HasPrefix(string(b[i+1:]), " Z") // a zombie is as good as gone
}

// freeze stops a process; it returns when the process does not run any more.
func freeze(tb testing.TB, pid int) {
	tb.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		tb.Fatal(err)
	}
	waitFor(tb, "freeze", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			tb.Fatal(err)
		}
		return strings.HasPrefix(string(b[strings.LastIndexByte(string(b), ')')+1:]), " T")
	})
}

// privateDirs lists the directories of plugin starts that are left in the
// test's own TMPDIR.
func privateDirs(tb testing.TB) []string {
	tb.Helper()
	list, err := filepath.Glob(filepath.Join(os.TempDir(), bridge.PrivateDirPrefix+"*"))
	if err != nil {
		tb.Fatal(err)
	}
	return list
}

// ownTemp gives the test a temporary directory with a short name, so that
// sockets fit and leftovers are seen.
func ownTemp(tb testing.TB) {
	tb.Helper()
	dir, err := os.MkdirTemp("", "lt")
	if err != nil {
		tb.Fatal(err)
	}
	switch tb := tb.(type) {
	case *testing.T:
		tb.Setenv("TMPDIR", dir)
	case *testing.B:
		tb.Setenv("TMPDIR", dir)
	}
	tb.Cleanup(func() {
		if left := privateDirs(tb); len(left) > 0 {
			tb.Errorf("left behind: %v", left)
		}
		os.RemoveAll(dir)
	})
}

func TestKilledUnderLoadLosesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	h, metrics := newTestHost(t, func(c *Config) {
		c.MaxDeaths, c.BackoffMin, c.BackoffMax = 1000, time.Millisecond, 5*time.Millisecond
	})
	host := newFakeHost()
	host.updates = make(chan string, 1<<20)
	mgr := startManager(t, h, metrics, core.Process, host)
	mgr.HandleView(t.Context(), channel.View{Version: 1, Local: member(9), Members: []channel.Member{member(1)}})
	receive(t, host.updates)

	var (
		stop    atomic.Bool
		load    sync.WaitGroup
		sent    int
		failed  atomic.Int64
		answers atomic.Int64
	)
	load.Go(func() { // messages of one sender, in order
		for ; !stop.Load(); sent++ {
			mgr.HandleMessage(t.Context(), member(1), strconv.AppendInt(nil, int64(sent), 10), func(err error) {
				if err != nil {
					failed.Add(1)
				}
				answers.Add(1)
			})
			if sent%200 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	})
	var commits atomic.Int64
	for range 8 {
		load.Go(func() {
			for !stop.Load() {
				if err := mgr.Commit(t.Context(), []byte("quiet"), core.Synced); err != nil {
					failed.Add(1)
				}
				commits.Add(1)
			}
		})
	}
	var worst time.Duration
	const kills = 10
	for i := range kills {
		waitFor(t, "ready", func() bool { return h.Status()[0].State == stateReady })
		before := commits.Load()
		waitFor(t, "commits", func() bool { return commits.Load() > before+100 })
		st := h.Status()[0]
		began := time.Now()
		if err := syscall.Kill(st.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "restart", func() bool { return h.Status()[0].Generation > st.Generation && h.Status()[0].State == stateReady })
		before = commits.Load()
		waitFor(t, "service", func() bool { return commits.Load() > before })
		took := time.Since(began)
		worst = max(worst, took)
		if i == 0 && !strings.Contains(h.Status()[0].LastError, "killed") {
			t.Errorf("last error is %q", h.Status()[0].LastError)
		}
	}
	stop.Store(true)
	load.Wait()
	waitFor(t, "all answers", func() bool { return answers.Load() == int64(sent) })
	if failed.Load() != 0 {
		t.Errorf("%d calls failed", failed.Load())
	}
	// A replay may repeat messages but never skip one.
	next, repeated := 0, 0
	for len(host.updates) > 0 {
		u := <-host.updates
		if strings.HasPrefix(u, "view") {
			continue
		}
		n, err := strconv.Atoi(strings.TrimPrefix(u, "message d1 "))
		switch {
		case err != nil:
			t.Fatalf("update %q", u)
		case n > next:
			t.Fatalf("message %d came after %d", n, next-1)
		case n == next:
			next++
		default:
			repeated++
		}
	}
	if next != sent {
		t.Errorf("%d messages arrived of %d", next, sent)
	}
	waitFor(t, "resyncs", func() bool { return len(host.resyncs) == kills })
	t.Logf("%d messages and %d commits over %d kills, %d repeated, back after at most %v", sent, commits.Load(), kills, repeated, worst)
	if err := mgr.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	if got := sample(metrics, "plugin_restarts_total"); got != kills {
		t.Errorf("restarts counted: %v", got)
	}
}

func sample(m *channel.Metrics, name string, labels ...string) (sum float64) {
	for _, s := range m.Samples() {
		if s.Name == name && (len(labels) == 0 || strings.Contains(strings.Join(s.Labels, "="), strings.Join(labels, "="))) {
			sum += s.Value
		}
	}
	return sum
}

func TestStoppedProcessIsNoticed(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	h, metrics := newTestHost(t, func(c *Config) { c.Heartbeat, c.HeartbeatTimeout = 50*time.Millisecond, 500*time.Millisecond })
	host := newFakeHost()
	mgr := startManager(t, h, metrics, core.Process, host)
	pid := h.Status()[0].PID
	freeze(t, pid)
	if err := mgr.Commit(t.Context(), []byte("x"), core.Async); err != nil {
		t.Errorf("the call was not made again: %v", err)
	}
	if st := h.Status()[0]; st.Generation != 2 || !strings.Contains(st.LastError, "no sign of life") {
		t.Errorf("status %+v", st)
	}
	if alive(pid) {
		t.Error("the stopped process lives on")
	}
}

func TestKilledWithTheStreamForm(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	h, metrics := newTestHost(t, func(c *Config) { c.Stream = true })
	mgr := startManager(t, h, metrics, core.Process, newFakeHost())
	if err := syscall.Kill(h.Status()[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := mgr.Commit(t.Context(), []byte("quiet"), core.Async); err != nil {
		t.Error(err)
	}
	waitFor(t, "restart", func() bool { st := h.Status()[0]; return st.State == stateReady && st.Generation == 2 })
}

func TestStopOfAStoppedProcessEnds(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	h, metrics := newTestHost(t, func(c *Config) { c.DrainGrace, c.KillGrace = 100*time.Millisecond, 100*time.Millisecond })
	mgr := startManager(t, h, metrics, core.Process, newFakeHost())
	pid := h.Status()[0].PID
	freeze(t, pid)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := mgr.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop: %v", err)
	}
	if alive(pid) {
		t.Error("the process lives on")
	}
}

// victimHost is a node that waits to be killed.
func victimHost() {
	set := fakeSet()
	h, err := NewHost(Config{Stream: os.Getenv("TEST_STREAM") != "", Managers: set.Managers, Memberships: set.Memberships, Deployers: set.Deployers}, channel.Settings{})
	if err != nil {
		panic(err)
	}
	mgr, _ := h.Manager(core.PluginSpec{Name: "fake"}, channel.Settings{})
	mem, _ := h.Membership(core.PluginSpec{Name: "fake"}, channel.Settings{})
	dep, _ := h.Deployer(core.PluginSpec{Name: "fake"}, channel.Settings{})
	ctx := context.Background()
	err = errors.Join(mgr.Start(ctx, newFakeHost()), mem.Start(ctx, member(1), nil, sinkFunc(func(channel.MemberEvent) {})), dep.Start(ctx, &fakeDeployerHost{}))
	if err != nil {
		panic(err)
	}
	for _, st := range h.Status() {
		fmt.Println(st.PID)
	}
	fmt.Println("ready")
	select {}
}

func TestNoOrphanOutlivesItsNode(t *testing.T) {
	t.Run("descriptor", testNoOrphan)
	t.Run("stream", func(t *testing.T) {
		t.Setenv("TEST_STREAM", "1")
		testNoOrphan(t)
	})
}

func testNoOrphan(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	cmd := exec.Command(os.Args[0], "victim-host")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pids [3]int
	if _, err := fmt.Fscan(out, &pids[0], &pids[1], &pids[2]); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if pid == 0 || !alive(pid) {
			t.Errorf("plugin %d does not run", pid)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	_ = cmd.Wait()
	for _, pid := range pids {
		waitFor(t, "end of the plugin", func() bool { return !alive(pid) })
	}
	took := time.Since(began)
	t.Logf("all plugins gone after %v", took)
	if took > 2*time.Second {
		t.Errorf("the orphans lived %v", took)
	}
}

func TestMembershipSuccessorKnowsTheView(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	h, metrics := newTestHost(t, nil)
	m, err := h.Membership(core.PluginSpec{Name: "fake"}, testSettings(t, metrics))
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan channel.MemberEvent, 100)
	local := member(9)
	if err := m.Start(t.Context(), local, []channel.Member{member(1)}, sinkFunc(func(ev channel.MemberEvent) { events <- ev })); err != nil {
		t.Fatal(err)
	}
	receive(t, events)
	for _, domain := range []string{"1 2", "1 3", "3 1"} { // 2 and 3 added, 1 lost
		local.Domain = domain
		if err := m.Update(t.Context(), local); err != nil {
			t.Fatal(err)
		}
		receive(t, events)
	}
	if err := syscall.Kill(h.Status()[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// 200 is the fake's own report, which counts as a member too.
	if ev := receive(t, events); ev.Member.Payload != "started local 3 1 known 3" {
		t.Errorf("the successor was told %q", ev.Member.Payload)
	}
}

func TestDeployerSuccessorStartsAgain(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	h, metrics := newTestHost(t, nil)
	d, err := h.Deployer(core.PluginSpec{Name: "fake"}, testSettings(t, metrics))
	if err != nil {
		t.Fatal(err)
	}
	host := &fakeDeployerHost{}
	if err := d.Start(t.Context(), host); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(h.Status()[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "second start", func() bool { return h.Status()[0].Generation == 2 && h.Status()[0].State == stateReady })
	host.mu.Lock()
	defer host.mu.Unlock()
	if len(host.calls) != 2 {
		t.Errorf("host saw %q", host.calls)
	}
}

func TestBrokenPluginSaysSo(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	h, metrics := newTestHost(t, func(c *Config) {
		c.MaxDeaths, c.BackoffMin, c.BackoffMax, c.BrokenRetry = 2, time.Millisecond, time.Millisecond, 300*time.Millisecond
	})
	mgr := startManager(t, h, metrics, core.Process, newFakeHost())
	// The call itself kills every generation.
	err := mgr.Commit(t.Context(), []byte("panic:poison"), core.Async)
	if !errors.Is(err, channel.ErrPluginDown) || !strings.Contains(err.Error(), "fake: poison") {
		t.Errorf("poison: %v", err)
	}
	if st := h.Status()[0]; st.State != stateBroken && st.State != stateStarting && st.State != stateReady {
		t.Errorf("status %+v", st)
	}
	waitFor(t, "recovery", func() bool { return mgr.Commit(t.Context(), []byte("quiet"), core.Async) == nil })
}

func TestPluginSeesNothingOfTheNode(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	t.Setenv("SECRET_TOKEN", "hunter2")
	t.Setenv("SHARED", "yes")
	h, metrics := newTestHost(t, func(c *Config) { c.Env = []string{"SHARED"} })
	host := newFakeHost()
	mgr := startManager(t, h, metrics, core.Process, host)
	if err := mgr.Commit(t.Context(), []byte("env:"), core.Async); err != nil {
		t.Fatal(err)
	}
	env := receive(t, host.updates)
	for _, bad := range []string{"SECRET", "hunter2", "HOME=", "PATH="} {
		if strings.Contains(env, bad) {
			t.Errorf("the plugin sees %s in %q", bad, env)
		}
	}
	if !strings.Contains(env, "SHARED=yes") || !strings.Contains(env, "TMPDIR="+os.TempDir()+"/"+bridge.PrivateDirPrefix) {
		t.Errorf("the plugin sees %q", env)
	}
}

func TestPluginLogsAndPrints(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	ownTemp(t)
	h, _ := newTestHost(t, nil)
	core_, logs := observer.New(zap.DebugLevel)
	metrics := channel.NewMetrics()
	mgr, err := h.Manager(core.PluginSpec{Name: "fake", Options: []byte("greeting: ahoy")}, channel.Settings{Logger: zap.New(core_), Metrics: metrics})
	if err != nil {
		t.Fatal(err)
	}
	if err := mgr.Start(t.Context(), newFakeHost()); err != nil {
		t.Fatal(err)
	}
	if err := mgr.Commit(t.Context(), []byte("print:"+strings.Repeat("y", 200_000)+"\nplain words"), core.Async); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "both lines", func() bool {
		return logs.FilterMessage("fake manager started").Len() == 1 && logs.FilterMessage("plain words").Len() == 2
	})
	e := logs.FilterMessage("fake manager started").All()[0]
	if m := e.ContextMap(); e.Level != zap.InfoLevel || m["greeting"] != "ahoy" || m["plugin"] != "manager/fake" || m["instance"] != "fake" {
		t.Errorf("log line arrived as %v %v", e.Level, m)
	}
	if got := sample(metrics, "plugin_output_refused_total", "reason", "length"); got != 2 {
		t.Errorf("cut lines: %v", got)
	}
	got := h.Samples(t.Context())
	if len(got) != 2 || got[1].Name != "fake_starts_total" || got[1].Value != 1 || !got[1].Counter {
		t.Fatalf("samples %+v", got)
	}
	want := &channel.HistogramSample{Bounds: []float64{0.001, 0.01}, Counts: []uint64{0, 1, 0}, Sum: 0.005}
	if s := got[0]; s.Name != "fake_seconds" || s.Value != 1 || !reflect.DeepEqual(s.Histogram, want) {
		t.Errorf("histogram %+v: %+v", s, s.Histogram)
	}
}
