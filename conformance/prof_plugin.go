package conformance

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins"
)

// What a node tells a plugin in its environment; see plugins/README.md and
// go-plugin's protocol.
const (
	envCookie, cookie = "LONGHOUSE_PLUGIN", "longhouse-plugin-api"
	envVersions       = "PLUGIN_PROTOCOL_VERSIONS"
	envSocketDir      = "PLUGIN_UNIX_SOCKET_DIR"
)

func pluginDirectRun(t *T) {
	p := t.stage(t.Subject, nil).program
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), t.Timeouts.Call)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.absolute(), p.arguments()...)
	var said bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = dir, []string{"TMPDIR=" + dir}, &said, &said, time.Second
	ownGroup(cmd)
	defer killGroup(cmd)
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		t.Errorf("started by hand it does not end within %v", t.Timeouts.Call)
	case err == nil:
		t.Errorf("started by hand it ends with status 0")
	}
	if text := strings.ToLower(said.String()); !strings.Contains(text, "plugin") {
		t.Errorf("started by hand it does not say that it is a plugin; it says %.300q", said.String())
	}
}

// handshake starts the program as a node does that speaks the given versions,
// and returns the fields of what it prints first, and how it ended if it did.
func (t *T) handshake(p PluginProgram, versions []int) (fields []string, how string) {
	t.Helper()
	var offered []string
	for _, v := range versions {
		offered = append(offered, strconv.Itoa(v))
	}
	dir, err := os.MkdirTemp("", "lc")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(t.Context(), t.Timeouts.Start)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.absolute(), p.arguments()...)
	var said bytes.Buffer
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Dir, cmd.Stderr, cmd.WaitDelay = dir, &said, time.Second
	cmd.Env = []string{"TMPDIR=" + dir, envSocketDir + "=" + dir, envCookie + "=" + cookie, envVersions + "=" + strings.Join(offered, ",")}
	ownGroup(cmd)
	if err := cmd.Start(); err != nil {
		t.Fatalf("start the program: %v", err)
	}
	defer killGroup(cmd)
	line, _ := bufio.NewReader(io.LimitReader(out, 8<<10)).ReadString('\n')
	if line != "" {
		_ = cmd.Process.Kill()
	}
	err = cmd.Wait()
	if line == "" {
		how = strings.TrimSpace(fmt.Sprintf("%v %s", err, said.String()))
	}
	return strings.Split(strings.TrimSpace(line), "|"), how
}

// strangeAPI is a version of the plugin protocol that nobody speaks.
const strangeAPI = 9801

func pluginNegotiate(t *T) {
	st := t.stage(t.Subject, nil)
	own := slices.Max(st.program.API)
	offered := append(slices.Clone(st.program.API), strangeAPI)
	fields, how := t.handshake(st.program, offered)
	if len(fields) < 5 {
		t.Fatalf("asked for one of %v the program makes no handshake: %q %.200s", offered, strings.Join(fields, "|"), how)
	}
	if fields[0] != "1" || fields[1] != strconv.Itoa(own) {
		t.Errorf("asked for one of %v the program chooses %s.%s, want 1.%d", offered, fields[0], fields[1], own)
	}
	fields, how = t.handshake(st.program, []int{strangeAPI, strangeAPI + 1})
	switch {
	case len(fields) >= 5:
		// It says what it has, and the node names both.
		if v, err := strconv.Atoi(fields[1]); err != nil || !slices.Contains(st.program.API, v) {
			t.Errorf("asked for versions that it does not have, the program pretends to speak %q", fields[1])
		}
	case how == "":
		t.Errorf("asked for versions that it does not have, the program ends without a word")
	}
	st.ask(st.run(nil))
}

func pluginPin(t *T) {
	st := t.stage(t.Subject, nil)
	dir := t.TempDir()
	path, marker := filepath.Join(dir, "program"), filepath.Join(dir, "executed")
	good, err := os.ReadFile(st.program.Path)
	if err != nil {
		t.Fatal(err)
	}
	swap := func(data []byte) {
		// A new file: the old one may be in use.
		_ = os.Remove(path)
		if err := os.WriteFile(path, data, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	pinned := func() *stage {
		return t.stage(t.Subject, func(c *plugins.Config) {
			c.External[0].Path = path
			c.StoreDir = t.TempDir()
		})
	}
	script := []byte("#!/bin/sh\n: > " + marker + "\nexit 1\n")
	for what, changed := range map[string][]byte{
		"with one more byte": append(slices.Clone(good), 0),
		"that is another":    script,
	} {
		swap(changed)
		st := pinned()
		err := st.start("")
		if err == nil {
			t.Errorf("a program %s was started", what)
		} else if !strings.Contains(err.Error(), "pin") && !strings.Contains(strings.ToLower(err.Error()), "sha") {
			t.Errorf("a program %s is refused without saying why: %v", what, err)
		}
	}
	// It is changed while it runs.
	swap(good)
	st = pinned()
	a := st.run(nil)
	st.ask(a)
	swap(script)
	st.kill()
	t.Eventually(t.Timeouts.Event, func() error {
		if s := st.status(); s.Generation < 2 {
			return fmt.Errorf("it was not tried again: %+v", s)
		}
		return nil
	})
	if _, err := os.Stat(marker); err == nil {
		t.Errorf("a program that is not the pinned one was executed")
	}
}

// start makes and starts an instance, which must not have been checked before.
// more is added to its options.
func (st *stage) start(more string) error {
	spec := st.spec("", st.t.TempDir())
	spec.Options = append(spec.Options, "\n"+more+"\n"...)
	a, err := st.make(spec, channel.Settings{Name: "subject", Logger: zap.NewNop(), Metrics: st.metrics, WorkDir: st.t.TempDir()})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), st.t.Timeouts.Start)
	defer cancel()
	return a.start(ctx)
}

// kill ends the process at once.
func (st *stage) kill() {
	st.t.Helper()
	pid := st.status().PID
	if pid == 0 {
		st.t.Fatalf("no process runs: %+v", st.status())
	}
	if err := killProcess(pid); err != nil {
		st.t.Fatalf("kill: %v", err)
	}
}

// back waits for a generation after the given one that answers.
func (st *stage) back(a *puppet, generation int) {
	st.t.Helper()
	st.t.Eventually(2*st.t.Timeouts.Event, func() error {
		if s := st.status(); s.Generation <= generation || s.State != "ready" {
			return fmt.Errorf("the subject is not back: %s, generation %d: %s", s.State, s.Generation, s.LastError)
		}
		return nil
	})
	st.ask(a)
}

func pluginHostileOutput(t *T) {
	st := t.stage(t.Subject, nil)
	var junk atomic.Pointer[string]
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.AddSync(io.Discard), zapcore.DebugLevel),
		zap.Hooks(func(e zapcore.Entry) error {
			if strings.Contains(e.Message, `\x`) || strings.ContainsRune(e.Message, '\uFFFD') {
				junk.Store(&e.Message)
			}
			return nil
		}))
	a := st.run(log)
	for range 20 {
		st.ask(a)
	}
	time.Sleep(t.Timeouts.Quiet)
	st.ask(a)
	if s := st.status(); s.Generation != 1 || s.State != "ready" {
		t.Errorf("it does not live on: %s, generation %d: %s", s.State, s.Generation, s.LastError)
	}
	for _, s := range st.metrics.Samples() {
		if s.Name == "plugin_output_refused_total" && s.Value > 0 {
			t.Errorf("the node had to cut or drop %v lines of its output: %v", s.Value, s.Labels)
		}
	}
	if line := junk.Load(); line != nil {
		t.Errorf("it prints what is no text: %.100q", *line)
	}
}

// callers is how many calls are on their way when a process is killed or stops
// answering.
const callers = 32

func pluginCrash(t *T) {
	st := t.stage(t.Subject, func(c *plugins.Config) { c.BackoffMin, c.BackoffMax = time.Millisecond, 50*time.Millisecond })
	a := st.run(nil)
	st.ask(a)
	for range 2 {
		st.crashUnderLoad(a)
	}
}

func (st *stage) crashUnderLoad(a *puppet) {
	generation := st.status().Generation
	var calls sync.WaitGroup
	stop := make(chan struct{})
	defer calls.Wait()
	defer close(stop)
	for range callers {
		calls.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				st.bounded(a)
			}
		})
	}
	answers := st.messages(a)
	st.kill()
	st.back(a, generation)
	st.t.Eventually(st.t.Timeouts.Event, answers)
}

// bounded makes a call that may meet a dead plugin: it must return in time, and
// an error must say that.
func (st *stage) bounded(a *puppet) {
	ctx, cancel := context.WithTimeout(context.Background(), st.t.Timeouts.Call)
	defer cancel()
	began := time.Now()
	err := a.call(ctx)
	if took := time.Since(began); took > st.t.Timeouts.Call+st.t.Timeouts.Event {
		st.t.Errorf("a call with a deadline of %v returned after %v", st.t.Timeouts.Call, took)
	}
	if err != nil && !errors.Is(err, channel.ErrPluginDown) {
		st.t.Errorf("a call that meets a dead plugin fails with %v, which is not ErrPluginDown", err)
	}
}

// messages gives a manager messages; the answer reports whether each was
// finished exactly once.
func (st *stage) messages(a *puppet) func() error {
	if a.manager == nil {
		return func() error { return nil }
	}
	const n = 64
	var counts [n]atomic.Int32
	for i := range n {
		a.manager.HandleMessage(context.Background(), channeltest.Member(2), []byte("conformance"), func(error) { counts[i].Add(1) })
	}
	return func() error {
		for i := range counts {
			if c := counts[i].Load(); c != 1 {
				return fmt.Errorf("message %d was finished %d times", i, c)
			}
		}
		return nil
	}
}

func pluginBreaker(t *T) {
	const deaths = 2
	st := t.stage(t.Subject, func(c *plugins.Config) {
		c.MaxDeaths, c.BackoffMin, c.BackoffMax, c.BrokenRetry = deaths, time.Millisecond, time.Millisecond, 5*t.Timeouts.Quiet
	})
	a := st.run(nil)
	st.ask(a)
	last := 0
	t.Eventually(2*t.Timeouts.Event, func() error {
		s := st.status()
		if s.State == "broken" {
			if s.LastError == "" {
				return errors.New("it is broken, but nobody says why")
			}
			return nil
		}
		if s.PID != 0 && s.Generation > last && s.State == "ready" {
			last = s.Generation
			_ = killProcess(s.PID) // it may end by itself meanwhile
		}
		if s.Generation > 3*deaths+3 {
			t.Fatalf("it was started %d times in a row, and nothing calls it broken", s.Generation)
		}
		return fmt.Errorf("%d ends in a row do not make it broken: %s", last, s.State)
	})
	ctx, cancel := context.WithTimeout(context.Background(), t.Timeouts.Call)
	defer cancel()
	if err := a.call(ctx); err != nil && !errors.Is(err, channel.ErrPluginDown) {
		t.Errorf("a call to a broken plugin fails with %v, which is not ErrPluginDown", err)
	}
	st.back(a, last)
}

func pluginHang(t *T) {
	const window = 16
	st := t.stage(t.Subject, func(c *plugins.Config) {
		c.Heartbeat, c.HeartbeatTimeout, c.Window = 50*time.Millisecond, 400*time.Millisecond, window
	})
	st.window = window
	a := st.run(nil)
	st.ask(a)
	s := st.status()
	if err := freezeProcess(s.PID); err != nil {
		t.Skipf("cannot stop a process here: %v", err)
	}
	defer func() {
		if alive(s.PID) {
			_ = killProcess(s.PID) // nobody else does, and the end would wait for it
		}
	}()
	var calls sync.WaitGroup
	defer calls.Wait()
	for range 4 * window {
		calls.Go(func() { st.bounded(a) })
	}
	time.Sleep(t.Timeouts.Quiet)
	if n := st.status().InFlight; n > 2*window {
		t.Errorf("%d calls are on their way to a plugin that does not answer, the window is %d", n, window)
	}
	calls.Wait()
	st.back(a, s.Generation)
	if alive(s.PID) {
		t.Errorf("the process that stopped answering lives on")
	}
}

const secretName, secretValue = "LONGHOUSE_CONFORMANCE_SECRET", "hunter2"

func pluginCleanEnv(t *T) {
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		t.Skip("needs /proc")
	}
	t.Setenv(secretName, secretValue)
	open, err := os.Create(filepath.Join(t.TempDir(), "open"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	st := t.stage(t.Subject, nil)
	a := st.run(nil)
	st.ask(a)
	proc := fmt.Sprintf("/proc/%d", st.status().PID)
	environ, err := os.ReadFile(proc + "/environ")
	if err != nil {
		t.Fatal(err)
	}
	for v := range strings.SplitSeq(strings.TrimRight(string(environ), "\x00"), "\x00") {
		name, _, _ := strings.Cut(v, "=")
		allowed := slices.Contains([]string{"TMPDIR", "TZ", "LANG", "GOMAXPROCS"}, name) ||
			strings.HasPrefix(name, "PLUGIN_") || strings.HasPrefix(name, "LONGHOUSE_PLUGIN")
		if !allowed {
			t.Errorf("it sees the variable %s", name)
		}
	}
	if to, err := os.Readlink(proc + "/fd/0"); err == nil && to != os.DevNull {
		t.Errorf("its standard input is %s", to)
	}
	mine := map[string]bool{}
	for fd, to := range descriptors(t, "/proc/self") {
		// What whoever started this process has let through is not the node's.
		mine[to] = closedOnExec(fd)
	}
	for fd, to := range descriptors(t, proc) {
		// The runtime of every Go program opens files of the control group.
		own := strings.HasPrefix(to, "anon_inode") || strings.HasPrefix(to, "/dev/") || strings.HasPrefix(to, "/sys/")
		if n, _ := strconv.Atoi(fd); n > 2 && mine[to] && !own {
			t.Errorf("it has inherited descriptor %s, %s", fd, to)
		}
	}
}

// closedOnExec reports whether a descriptor of this process is not meant for
// those that it starts.
func closedOnExec(fd string) bool {
	const closeOnExec = 0o2000000 // O_CLOEXEC of Linux
	b, err := os.ReadFile("/proc/self/fdinfo/" + fd)
	if err != nil {
		return false // it is closed already
	}
	_, flags, _ := strings.Cut(string(b), "flags:")
	flags, _, _ = strings.Cut(flags, "\n")
	n, err := strconv.ParseInt(strings.TrimSpace(flags), 8, 64)
	return err == nil && n&closeOnExec != 0
}

// descriptors says what the open descriptors of a process are.
func descriptors(t *T, proc string) map[string]string {
	entries, err := os.ReadDir(proc + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	list := map[string]string{}
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(proc, "fd", e.Name())); err == nil {
			list[e.Name()] = to
		}
	}
	return list
}

func pluginErrorIdentity(t *T) {
	st := t.stage(t.Subject, nil)
	const unknown = "no_such_option"
	if err := st.start(unknown + ": 1"); err == nil {
		t.Errorf("an option that does not exist is accepted")
	} else if !strings.Contains(err.Error(), unknown) {
		t.Errorf("an option that does not exist is refused without naming it: %v", err)
	}

	st = t.stage(t.Subject, nil)
	a := st.run(nil)
	over, cancel := context.WithCancel(context.Background())
	cancel()
	if err := a.call(over); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("a call whose context has ended fails with %v, which is not its error", err)
	}
	if a.manager != nil {
		st.managerErrors(a)
	}
	if a.embedded != nil {
		a.embedded.OnSend(func(_ context.Context, m *channel.Message) error { return channel.Failed(m.To, channel.ErrAckTimeout) })
		ctx, cancel := context.WithTimeout(context.Background(), t.Timeouts.Call)
		defer cancel()
		err := a.call(ctx)
		se, ok := errors.AsType[*channel.SendError](err)
		if !ok || len(se.Faults) != 1 || se.Faults[0].Member.ID != channeltest.Member(2).ID || !errors.Is(err, channel.ErrAckTimeout) {
			t.Errorf("the error from below the layer has lost its member or its cause: %v", err)
		}
	}
}

func pluginNoBypass(t *T) {
	st := t.stage(t.Subject, func(c *plugins.Config) {
		c.BackoffMin, c.BackoffMax, c.MaxDeaths = 2*t.Timeouts.Check, 2*t.Timeouts.Check, 100
	})
	spec := st.spec("bypassed", t.TempDir())
	spec.OnDown = core.Bypass
	if _, err := st.host.Interceptor(spec, channel.Settings{Name: "bypassed", Logger: zap.NewNop(), WorkDir: t.TempDir()}); err == nil {
		t.Errorf("on_down: bypass is accepted for a layer that changes messages")
	}

	st = t.stage(t.Subject, func(c *plugins.Config) {
		c.BackoffMin, c.BackoffMax, c.MaxDeaths = 2*t.Timeouts.Check, 2*t.Timeouts.Check, 100
	})
	a := st.run(nil)
	st.ask(a)
	killed := 0
	t.Eventually(2*t.Timeouts.Event, func() error { // the first restart is at once
		s := st.status()
		if s.State == "backoff" {
			return nil
		}
		if s.State == "ready" && s.Generation > killed {
			killed = s.Generation
			_ = killProcess(s.PID) // it may end by itself meanwhile
		}
		return fmt.Errorf("the plugin is %s", s.State)
	})
	before := len(a.embedded.Bottom.Messages())
	ctx, cancel := context.WithTimeout(context.Background(), t.Timeouts.Call)
	defer cancel()
	if err := a.call(ctx); !errors.Is(err, channel.ErrPluginDown) {
		t.Errorf("a message is sent while the plugin is down: %v, want ErrPluginDown", err)
	}
	if n := len(a.embedded.Bottom.Messages()) - before; n > 0 {
		t.Errorf("%d messages went past a plugin that is down", n)
	}
}

// managerErrors is what a manager must not make unrecognisable.
func (st *stage) managerErrors(a *puppet) {
	t := st.t
	one, two := channeltest.Member(2), channeltest.Member(3)
	a.manager.HandleView(t.Context(), channel.View{Version: 1, Local: channeltest.Member(1), Members: []channel.Member{one, two}})
	var tried atomic.Bool // a manager may choose other members for the session
	a.host.mu.Lock()
	a.host.send = func(to []channel.Member) error {
		if !slices.ContainsFunc(to, func(m channel.Member) bool { return m.ID == two.ID }) {
			return nil
		}
		tried.Store(true)
		return &channel.SendError{Faults: []channel.Fault{{Member: two, Err: channel.ErrNegativeAck}}}
	}
	a.host.mu.Unlock()
	now := time.Now().UnixMilli()
	batch := session.AppendBatch(nil, &session.Record{
		Key: session.Key{Context: sessionContext, ID: strings.Repeat("c", session.MinID)}, Created: now, LastAccess: now, MaxInactive: time.Hour,
	})
	ctx, cancel := context.WithTimeout(context.Background(), 2*t.Timeouts.Call)
	defer cancel()
	err := a.manager.Commit(ctx, batch, core.Synced)
	se, ok := errors.AsType[*channel.SendError](err)
	switch {
	case err == nil && !tried.Load():
	case err == nil:
		t.Errorf("a synchronous commit that a member of the view has refused succeeds")
	case !ok || len(se.Faults) != 1 || se.Faults[0].Member.ID != two.ID:
		t.Errorf("the error of a commit does not name the member that failed: %v", err)
	case !errors.Is(err, channel.ErrNegativeAck):
		t.Errorf("the error of a commit has lost its cause: %v", err)
	}
	if err := a.manager.Commit(ctx, []byte("\xffgarbage"), core.Async); err == nil || errors.Is(err, channel.ErrPluginDown) {
		t.Errorf("a batch that cannot be read is answered with %v", err)
	}
}

func pluginGraceful(t *T) {
	const said = "plugin did not end when it was asked to"
	var complained atomic.Bool
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.AddSync(io.Discard), zapcore.DebugLevel),
		zap.Hooks(func(e zapcore.Entry) error {
			if e.Message == said {
				complained.Store(true)
			}
			return nil
		}))
	st := t.stage(t.Subject, func(c *plugins.Config) {
		c.StopTimeout, c.DrainGrace, c.KillGrace = 2*time.Second, 2*time.Second, 200*time.Millisecond
	})
	a := st.run(log)
	st.ask(a)
	pid := st.status().PID
	dir := environment(pid, "TMPDIR")
	ctx, cancel := context.WithTimeout(context.Background(), t.Timeouts.Stop)
	defer cancel()
	if err := a.stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
	if complained.Load() {
		t.Errorf("the process did not end when it was asked to")
	}
	if alive(pid) {
		t.Errorf("the process lives on after its stop")
	}
	if dir == "" {
		return // no /proc
	}
	t.Eventually(t.Timeouts.Event/2, func() error {
		left := offspring(dir)
		if len(left) > 0 {
			return fmt.Errorf("processes that it has started live on: %v", left)
		}
		return nil
	})
	if _, err := os.Stat(dir); err == nil {
		t.Errorf("its private directory %s is left", dir)
	}
}

func pluginChecks() []Check {
	check := func(id, requirement, source string, run func(*T), saboteurs ...Saboteur) Check {
		return Check{
			ID: "plugin/" + id, Profile: ProfilePlugin, Level: Must, Requirement: requirement, Source: source, Run: run, Saboteurs: saboteurs,
		}
	}
	return []Check{
		check("direct-run", "Started by hand the program says that it is a plugin and exits with a status other than 0.",
			"plugins/README.md", pluginDirectRun, programSaboteurs("exits-silently", "exits-fine", "waits-by-hand")...),
		check("negotiate", "The highest common version of the plugin protocol is used; without a common one the program says what it has.",
			"go-plugin: versioned plugins; plugins/README.md", pluginNegotiate, programSaboteurs("claims-any-version", "claims-version-0", "babbles-first")...),
		check("pin", "A program of which one byte has changed is never executed, neither at the first start nor at a restart.",
			"DESIGN §6: trust", pluginPin, hostSaboteur("pins what it finds", repinning)),
		check("hostile-output", "What the program prints are lines of text of a bounded length and number; calls go on meanwhile.",
			"plugins/README.md: output", pluginHostileOutput, programSaboteurs("prints-megabytes", "floods", "prints-binary", "dies-printing")...),
		check("crash-in-flight", "When the process is killed every call returns by its deadline, a message is finished once, and the next generation answers.",
			"core.PluginHost; DESIGN §6: a killed plugin is an event", pluginCrash, programSaboteurs("starts-once", "mute-after-restart")...),
		check("breaker", "A plugin that keeps ending becomes broken, which is seen and said by calls; it is tried again later.",
			"plugins.Config: MaxDeaths, BrokenRetry", pluginBreaker, hostSaboteur("restarts for ever", func(c *plugins.Config) { c.MaxDeaths = 1 << 20 })),
		check("hang", "A process that stops answering is replaced; calls return by their deadline and no more than the window are on their way.",
			"plugins.Config: HeartbeatTimeout, Window", pluginHang, append(programSaboteurs("never-answers"),
				hostSaboteur("waits for ever", func(c *plugins.Config) { c.HeartbeatTimeout = time.Hour }))...),
		{
			ID: "plugin/no-bypass", Profile: ProfilePlugin, Level: Must, Features: []string{FeatureTransforming},
			Requirement: "Bypass is refused for a layer that changes messages, and while it is down none passes as it is.",
			Source:      "core.PluginSpec: OnDown; DESIGN §6", Run: pluginNoBypass, Saboteurs: bypassSaboteurs(),
		},
		check("clean-env", "The process sees only the variables that are allowed, an empty standard input, and no descriptor of the node's.",
			"DESIGN §6: supervision", pluginCleanEnv, hostSaboteur("passes on a secret", func(c *plugins.Config) { c.Env = append(c.Env, secretName) })),
		check("error-identity", "Errors keep their identity and their list of members across the border, and unknown options are refused by name.",
			"DESIGN §6: trust; channel.SendError", pluginErrorIdentity, programSaboteurs("flattens-errors", "ignores-options", "hides-failures")...),
		check("graceful", "Asked to stop, the process ends by itself in time, and nothing that it has started or written outlives it.",
			"plugins.Config: DrainGrace, KillGrace", pluginGraceful, programSaboteurs("never-stops", "leaves-a-child")...),
	}
}
