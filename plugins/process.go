package plugins

import (
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

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// maxControl bounds a message of the control plane and a chunk of the portable
// data plane, in bytes.
const maxControl = frame.DefaultMaxFrame + 64<<10

// How long parts of an end may take.
const (
	// killWait bounds the wait for a process that has got SIGKILL.
	killWait = 5 * time.Second
	// outputWait is how long the last words of a process are waited for.
	outputWait = 100 * time.Millisecond
	// exitNotice is how long the end of a process may be known before its
	// connection is closed from this side: something that it started may
	// still hold the other end.
	exitNotice = 100 * time.Millisecond
	// handlerWait bounds the wait for callbacks of the plugin that are still
	// running in the node.
	handlerWait = 5 * time.Second
)

// program launches generations of one plugin as processes.
type program struct {
	host       *Host
	super      *supervisor
	external   External
	isExternal bool
	workDir    string
	log        *zap.Logger
	output     *output
}

// command returns a new command for the next start.
func (p *program) command() (*exec.Cmd, error) {
	args := []string{"plugin", "serve", p.super.id}
	if p.isExternal {
		path, err := p.host.store.executable(p.external.Path, p.external.SHA256)
		if err != nil {
			return nil, err
		}
		if p.external.Args != nil {
			args = p.external.Args
		}
		return exec.Command(path, args...), nil
	}
	if p.host.cfg.Executable != "" {
		return exec.Command(p.host.cfg.Executable, args...), nil
	}
	path, err := self()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, args...)
	cmd.Args[0] = filepath.Base(os.Args[0]) // for process lists
	return cmd, nil
}

// environment is all that a plugin process gets to see of the node's.
func (p *program) environment(dir string) []string {
	env := []string{"TMPDIR=" + dir, bridge.EnvPrivateDir + "=" + dir}
	if base, err := os.Getwd(); err == nil {
		env = append(env, bridge.EnvBaseDir+"="+base)
	}
	// The processes of a node serve the same requests one after the other: with
	// fewer threads they wake each other less often. Config.Env can say otherwise.
	env = append(env, "GOMAXPROCS="+strconv.Itoa(max(1, runtime.GOMAXPROCS(0)/2)))
	for _, name := range append([]string{"TZ", "LANG"}, p.host.cfg.Env...) {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// launch implements launcher.
func (p *program) launch(ctx context.Context, n int, h frame.Handler) (*generation, error) {
	cmd, err := p.command()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(socketRoot(), bridge.PrivateDirPrefix)
	if err != nil {
		return nil, fmt.Errorf("private directory: %w", err)
	}
	run := &process{cmd: cmd, dir: dir, ctx: ctx, log: p.log, output: p.output, killGrace: p.host.cfg.KillGrace, exited: make(chan struct{})}
	g, err := p.connect(ctx, n, h, run)
	if err != nil {
		how := run.end()
		var bad *handshakeError
		switch {
		case !run.started:
		case !errors.As(err, &bad):
			err = fmt.Errorf("%w (%s)", err, how)
		case bad.ended:
			err = fmt.Errorf("%w: %s", err, how)
		}
		return nil, err
	}
	return g, nil
}

// connect starts the process and connects both planes.
func (p *program) connect(ctx context.Context, n int, h frame.Handler, run *process) (*generation, error) {
	if p.isExternal {
		// What comes with the node stays where the node is: relative paths of its
		// options mean the same in every mode.
		run.cmd.Dir = run.dir
	}
	run.cmd.Env = p.environment(run.dir)
	data, err := run.inherit(!p.host.cfg.Stream)
	if err != nil {
		return nil, err
	}
	run.client = plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  bridge.Handshake,
		VersionedPlugins: map[int]plugin.PluginSet{bridge.APIVersion: {bridge.ControlName: &bridge.ControlPlugin{}}},
		RunnerFunc: func(_ hclog.Logger, spec *exec.Cmd, _ string) (runner.Runner, error) {
			run.cmd.Env = append(run.cmd.Env, spec.Env...)
			return run, nil
		},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		StartTimeout:     p.host.cfg.StartTimeout,
		Logger:           hclog.NewNullLogger(),
		SyncStdout:       p.output.writer(),
		SyncStderr:       p.output.writer(),
		UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: run.dir},
		GRPCDialOptions:  []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxControl))},
	})
	control, err := run.dispense()
	if err != nil {
		return nil, closeWith(err, data)
	}
	stream, err := control.Configure(ctx, bridge.Setup{
		Kind: p.super.kind, Name: p.super.spec.Name, Instance: p.super.spec.Instance,
		Options: p.super.spec.Options, Origin: p.super.spec.Origin,
		WorkDir: p.workDir, LogLevel: p.log.Level().String(), Descriptor: data != nil, Generation: n,
	})
	if err != nil {
		return nil, closeWith(err, data)
	}
	if stream {
		if data != nil {
			// It is not used; the process does not watch it either.
			_ = data.Close()
		}
		// The stream has to live as long as the generation, not as the start.
		if data, err = control.Data(context.Background()); err != nil {
			return nil, fmt.Errorf("data plane: %w", err)
		}
	}
	if data == nil {
		return nil, errors.New("data plane: the plugin wants the inherited descriptor, but there is none")
	}
	conn := frame.NewConn(data, p.super.calls, h, p.host.cfg.connConfig())
	run.tasks.Go(func() { run.watch(conn) })
	return &generation{
		conn: conn, pid: run.cmd.Process.Pid, control: control,
		drain: func(ctx context.Context) { run.drain(ctx, control, p.host.cfg.DrainGrace) },
		kill: func() string {
			killTree(run.cmd.Process.Pid, run.exited)
			how := run.end()
			conn.Close(frame.ErrClosed)
			conn.Wait()
			ctx, cancel := context.WithTimeout(context.Background(), handlerWait)
			defer cancel()
			if err := conn.WaitHandlers(ctx); err != nil {
				p.log.Warn("a call by the ended plugin is still running in the node", zap.Error(err))
			}
			return how
		},
	}, nil
}

func closeWith(err error, c io.Closer) error {
	if c != nil {
		_ = c.Close()
	}
	return err
}

// process is one process. It implements runner.Runner, so that go-plugin gets
// nothing to see of it but the handshake line that was found to be good.
type process struct {
	cmd       *exec.Cmd
	dir       string
	ctx       context.Context // of the start
	log       *zap.Logger
	output    *output
	killGrace time.Duration
	client    *plugin.Client

	started   bool
	child     *os.File // the child's end of the data plane, until it is started
	handshake string
	stdout    *os.File
	stderr    *os.File
	tasks     sync.WaitGroup // output, waiting

	exited chan struct{} // closed when the process has ended
	how    string        // set before exited is closed
}

// inherit makes the data plane that the process is to inherit, and returns the
// node's end; nil if there is none.
func (r *process) inherit(wanted bool) (io.ReadWriteCloser, error) {
	if !wanted {
		return nil, nil
	}
	near, child, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("data plane: %w", err)
	}
	if near == nil {
		return nil, nil
	}
	r.child = child
	r.cmd.ExtraFiles = []*os.File{child} // descriptor 3
	return near, nil
}

// dispense starts the process through go-plugin and returns its control plane.
func (r *process) dispense() (*bridge.ControlClient, error) {
	rpc, err := r.client.Client()
	if err != nil {
		return nil, err
	}
	raw, err := rpc.Dispense(bridge.ControlName)
	if err != nil {
		return nil, err
	}
	return raw.(*bridge.ControlClient), nil
}

// Start implements runner.Runner: it starts the process and reads its
// handshake.
func (r *process) Start(context.Context) error {
	stdout, err := r.pipe(&r.cmd.Stdout)
	if err != nil {
		return err
	}
	stderr, err := r.pipe(&r.cmd.Stderr)
	if err != nil {
		return errors.Join(err, stdout.Close(), r.stdout.Close())
	}
	separate(r.cmd)
	err = r.cmd.Start()
	// The pipes must end with the process.
	_, _ = stdout.Close(), stderr.Close()
	if r.child != nil {
		_ = r.child.Close()
		r.child = nil
	}
	if err != nil {
		return errors.Join(fmt.Errorf("start %s: %w", r.cmd.Path, err), r.stdout.Close(), r.stderr.Close())
	}
	r.started = true
	r.tasks.Go(r.reap)
	r.tasks.Go(func() { r.output.pump(r.stderr, true) })
	err = r.shake()
	r.tasks.Go(func() { r.output.pump(r.stdout, false) })
	return err
}

// pipe makes a pipe from the process; it returns the process's end.
func (r *process) pipe(to *io.Writer) (*os.File, error) {
	near, far, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	*to = far
	if to == &r.cmd.Stdout {
		r.stdout = near
	} else {
		r.stderr = near
	}
	return far, nil
}

// shake reads and checks the handshake line.
func (r *process) shake() error {
	deadline, ok := r.ctx.Deadline()
	if ok {
		// Pipes of the os package support deadlines.
		_ = r.stdout.SetReadDeadline(deadline)
	}
	defer context.AfterFunc(r.ctx, func() { _ = r.stdout.SetReadDeadline(time.Now()) })()
	gone := make(chan struct{})
	defer close(gone)
	go func() { // ends with shake: a child may hold the pipe of a dead process
		select {
		case <-r.exited:
			_ = r.stdout.SetReadDeadline(time.Now().Add(outputWait))
		case <-gone:
		}
	}()
	line, err := readHandshake(r.stdout)
	if err == nil {
		err = checkHandshake(line, r.dir)
	}
	if err == nil {
		r.handshake = line
		_ = r.stdout.SetReadDeadline(time.Time{})
		return nil
	}
	if errors.As(err, new(*handshakeError)) {
		return err
	}
	select {
	case <-r.exited:
		return &handshakeError{"ended before it was made", true}
	case <-time.After(outputWait):
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &handshakeError{what: "none within the time for starting: the program printed no line to its standard output; is it a longhouse plugin?"}
	}
	return fmt.Errorf("read the handshake: %w", err)
}

// reap waits for the end of the process and ends what it has left.
func (r *process) reap() {
	pid := r.cmd.Process.Pid
	if waitExit(pid) {
		// The process is not reaped yet, so its group cannot be another's.
		killGroup(pid)
	}
	err := r.cmd.Wait()
	killLeftGroup(pid)
	switch {
	case err == nil:
		r.how = "the process ended by itself"
	case r.cmd.ProcessState != nil:
		r.how = "the process ended: " + r.cmd.ProcessState.String()
	default:
		r.how = "the process ended: " + err.Error()
	}
	// What it said last is still in the pipes, maybe behind a flood, and maybe
	// somebody else holds them.
	until := time.Now().Add(outputWait)
	_ = r.stderr.SetReadDeadline(until)
	_ = r.stdout.SetReadDeadline(until)
	close(r.exited)
}

// watch ends the connection of a process that has ended, if it does not end by
// itself.
func (r *process) watch(conn *frame.Conn) {
	select {
	case <-conn.Done():
		return
	case <-r.exited:
	}
	select {
	case <-conn.Done():
	case <-time.After(exitNotice):
		conn.Close(fmt.Errorf("%s, but something that it started holds its connection", r.how))
	}
}

// drain asks for the end and waits for it: politely, then with SIGTERM.
func (r *process) drain(ctx context.Context, c bridge.Control, grace time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if err := c.Shutdown(ctx); err == nil {
		select {
		case <-r.exited:
			return
		case <-ctx.Done():
		}
	}
	select {
	case <-r.exited:
		return
	default:
	}
	r.log.Warn("plugin did not end when it was asked to", zap.Int("pid", r.cmd.Process.Pid))
	terminateGroup(r.cmd.Process.Pid)
	select {
	case <-r.exited:
	case <-time.After(r.killGrace):
	}
}

// end ends the process and returns when nothing of it is left; it says how the
// process ended.
func (r *process) end() string {
	if r.child != nil { // it was never started
		_ = r.child.Close()
	}
	if r.started {
		killTree(r.cmd.Process.Pid, r.exited)
		<-r.exited
	}
	if r.client != nil && r.started {
		// Only after the process has ended: go-plugin asks it politely and
		// waits for ever.
		r.client.Kill()
	}
	r.tasks.Wait()
	if r.started {
		_, _ = r.stdout.Close(), r.stderr.Close()
	}
	if err := os.RemoveAll(r.dir); err != nil {
		r.log.Warn("the private directory of a plugin could not be removed", zap.Error(err))
	}
	if words := r.output.lastWords(); words != "" && r.how != "" {
		return r.how + "; its last words: " + words
	}
	return r.how
}

// killTree kills a process and its group until it is known to have ended.
func killTree(pid int, exited <-chan struct{}) {
	select {
	case <-exited:
		return // the group was ended by reap
	default:
	}
	killGroup(pid)
	select {
	case <-exited:
	case <-time.After(killWait): // uninterruptible in the kernel; wait on
	}
}

// Stdout implements runner.Runner: go-plugin gets the line that was checked.
func (r *process) Stdout() io.ReadCloser {
	return io.NopCloser(strings.NewReader(r.handshake + "\n"))
}

// Stderr implements runner.Runner: go-plugin gets nothing to parse.
func (r *process) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }

// Name implements runner.Runner.
func (r *process) Name() string { return r.cmd.Path }

// Diagnose implements runner.Runner.
func (r *process) Diagnose(context.Context) string { return "" }

// Wait implements runner.Runner.
func (r *process) Wait(context.Context) error {
	<-r.exited
	return nil
}

// Kill implements runner.Runner.
func (r *process) Kill(context.Context) error {
	if r.started {
		killTree(r.cmd.Process.Pid, r.exited)
	}
	return nil
}

// ID implements runner.Runner.
func (r *process) ID() string {
	if !r.started {
		return ""
	}
	return strconv.Itoa(r.cmd.Process.Pid)
}

// PluginToHost implements runner.Runner.
func (r *process) PluginToHost(network, addr string) (string, string, error) {
	return network, addr, nil
}

// HostToPlugin implements runner.Runner.
func (r *process) HostToPlugin(network, addr string) (string, string, error) {
	return network, addr, nil
}
