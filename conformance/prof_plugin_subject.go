package conformance

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins"
)

// PluginProgram says which plugin of which program is tested.
type PluginProgram struct {
	// Path is the program. It is copied, and the copy is run.
	Path string
	// Kind and Name choose the plugin.
	Kind, Name string
	// Args replace the arguments "plugin", "serve", "<kind>/<name>".
	Args []string
	// Options are its configuration as YAML; "{{dir}}" becomes the name of an
	// empty directory, or of the one that a deployer is to watch.
	Options string
	// Version, API and Features are what the program says of itself.
	Version  string
	API      []int
	Features []string

	// Describe is the program's own description; an interceptor needs it.
	Describe plugins.Description

	digest string // SHA-256 of the file, hexadecimal
}

// PluginSubject is a plugin program together with what hosts it.
type PluginSubject interface {
	Subject
	Plugin() (PluginProgram, error)
	// PluginHost makes the plugin host of a check.
	PluginHost(c plugins.Config, s channel.Settings) (core.PluginHost, error)
}

// process is a subject that is a program.
type process struct {
	describe func() (PluginProgram, json.RawMessage, error)
	newHost  func(plugins.Config, channel.Settings) (core.PluginHost, error)

	once    sync.Once
	program PluginProgram   // set by once
	details json.RawMessage // set by once
	err     error           // set by once
}

func goodHost(c plugins.Config, s channel.Settings) (core.PluginHost, error) {
	return plugins.NewHost(c, s)
}

// Plugin is the subject of one plugin of a program, which is not asked what it
// is.
func Plugin(p PluginProgram) Subject {
	return &process{newHost: goodHost, describe: func() (PluginProgram, json.RawMessage, error) { return p, nil, nil }}
}

func (p *process) init() error {
	p.once.Do(func() {
		if p.program, p.details, p.err = p.describe(); p.err != nil {
			return
		}
		if len(p.program.API) == 0 {
			p.program.API = []int{1}
		}
		p.program.digest, p.err = fileDigest(p.program.Path)
	})
	return p.err
}

func fileDigest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Describe implements Subject.
func (p *process) Describe() (Description, error) {
	if err := p.init(); err != nil {
		return Description{}, err
	}
	d := Description{
		Kind: p.program.Kind, Name: p.program.Name, Version: p.program.Version, API: p.program.API, SHA256: p.program.digest,
		Profiles: pluginProfiles(p.program.Kind, p.program.Options), Modes: []core.PluginMode{core.Process}, Features: p.program.Features, Details: p.details,
	}
	return d, nil
}

// Plugin implements PluginSubject.
func (p *process) Plugin() (PluginProgram, error) {
	err := p.init()
	return p.program, err
}

// PluginHost implements PluginSubject.
func (p *process) PluginHost(c plugins.Config, s channel.Settings) (core.PluginHost, error) {
	return p.newHost(c, s)
}

// Plugin implements PluginSubject.
func (p *Program) Plugin() (PluginProgram, error) {
	d, sum, err := p.describe()
	return PluginProgram{
		Path: p.path, Args: p.args, Options: p.options, Kind: d.Kind, Name: d.Name,
		Version: d.Version, API: d.API, Features: d.Features, Describe: d, digest: sum,
	}, err
}

// PluginHost implements PluginSubject.
func (p *Program) PluginHost(c plugins.Config, s channel.Settings) (core.PluginHost, error) {
	return plugins.NewHost(c, s)
}

// Manager implements ManagerSubject.
func (p *Program) Manager(t *T, instance string, s channel.Settings) (core.Manager, error) {
	st := t.stage(p, nil)
	return st.host.Manager(st.spec(instance, t.TempDir()), s)
}

// Deployer implements DeployerSubject. In the options "{{dir}}" stands for the
// folder to watch.
func (p *Program) Deployer(t *T, dir string, s channel.Settings) (core.Deployer, error) {
	st := t.stage(p, nil)
	return st.host.Deployer(st.spec("", dir), s)
}

// pluginProfiles are those of a program, given the kind of its component and its
// options.
func pluginProfiles(kind, options string) []string {
	switch {
	case kind == plugins.KindManager, kind == plugins.KindInterceptor,
		kind == plugins.KindDeployer && strings.Contains(options, dirMark):
		return []string{ProfilePlugin, kind}
	}
	return []string{ProfilePlugin}
}

// Manager implements ManagerSubject.
func (p *process) Manager(t *T, instance string, s channel.Settings) (core.Manager, error) {
	st := t.stage(p, nil)
	return st.host.Manager(st.spec(instance, t.TempDir()), s)
}

// Deployer implements DeployerSubject.
func (p *process) Deployer(t *T, dir string, s channel.Settings) (core.Deployer, error) {
	st := t.stage(p, nil)
	return st.host.Deployer(st.spec("", dir), s)
}

// dirMark stands for a directory in options.
const dirMark = "{{dir}}"

// stage is a plugin host with the subject's program.
type stage struct {
	t       *T
	program PluginProgram
	host    core.PluginHost
	metrics *channel.Metrics
	window  int // of interceptors; 0 is the default
}

// storeDir keeps the copy of a program for all checks of this process: to copy
// it takes longer than to run it. Its name is that of the digest.
func storeDir(t *T, digest string) string {
	stores.Lock()
	defer stores.Unlock()
	if dir := stores.dirs[digest]; dir != "" {
		if _, err := os.Stat(dir); err == nil {
			return dir
		}
	}
	// The first check's directory goes away with it; the next makes a new one.
	dir := t.TempDir()
	if stores.dirs == nil {
		stores.dirs = map[string]string{}
	}
	stores.dirs[digest] = dir
	return dir
}

var stores struct {
	sync.Mutex
	dirs map[string]string // guarded by the mutex
}

// stage makes a plugin host; change may change its configuration. It is stopped
// at the end of the check.
func (t *T) stage(subject Subject, change func(*plugins.Config)) *stage {
	t.Helper()
	s, ok := subject.(PluginSubject)
	if !ok {
		t.Fatalf("a %T is no plugin program", subject)
	}
	p, err := s.Plugin()
	if err != nil {
		t.Fatalf("the subject: %v", err)
	}
	c := plugins.Config{
		External:     []plugins.External{{Kind: p.Kind, Name: p.Name, Path: p.Path, SHA256: p.digest, Args: p.Args, Describe: p.Describe}},
		StoreDir:     storeDir(t, p.digest),
		StartTimeout: t.Timeouts.Start, StopTimeout: t.Timeouts.Stop,
	}
	if change != nil {
		change(&c)
	}
	st := &stage{t: t, program: p, metrics: channel.NewMetrics()}
	if st.host, err = s.PluginHost(c, channel.Settings{Logger: zap.NewNop(), Metrics: st.metrics}); err != nil {
		t.Fatalf("plugin host: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), t.Timeouts.Stop)
		defer cancel()
		if err := st.host.Stop(ctx); err != nil {
			t.Logf("stop of the plugin host: %v", err)
		}
	})
	return st
}

func (st *stage) spec(instance, dir string) core.PluginSpec {
	return core.PluginSpec{
		Name: st.program.Name, Instance: instance, Mode: core.Process, Origin: "options", Window: st.window,
		Options: []byte(strings.ReplaceAll(st.program.Options, dirMark, strconv.Quote(dir))),
	}
}

// puppet is an instance of the subject, whatever its kind is.
type puppet struct {
	start func(ctx context.Context) error
	// call asks for something harmless that the process has to answer.
	call func(ctx context.Context) error
	stop func(ctx context.Context) error
	// manager and embedded are set if it is a manager or an interceptor.
	manager  core.Manager
	embedded *channeltest.Embedded
	host     *puppetHost
}

// puppet makes an instance of the subject; it is not started. log may be nil.
func (st *stage) puppet(log *zap.Logger) *puppet {
	st.t.Helper()
	if log == nil {
		log = zap.NewNop()
	}
	s := channel.Settings{Name: "subject", Logger: log, Metrics: st.metrics, WorkDir: st.t.TempDir()}
	a, err := st.make(st.spec("", st.t.TempDir()), s)
	if err != nil {
		st.t.Fatalf("make the subject: %v", err)
	}
	return a
}

func (st *stage) make(spec core.PluginSpec, s channel.Settings) (*puppet, error) {
	a := &puppet{host: &puppetHost{}}
	switch st.program.Kind {
	case plugins.KindManager:
		m, err := st.host.Manager(spec, s)
		if err != nil {
			return nil, err
		}
		a.manager, a.stop = m, m.Stop
		a.start = func(ctx context.Context) error { return m.Start(ctx, a.host) }
		a.call = func(ctx context.Context) error { _, err := m.Status(ctx); return err }
	case plugins.KindMembership:
		m, err := st.host.Membership(spec, s)
		if err != nil {
			return nil, err
		}
		local := channeltest.Member(1)
		a.stop = m.Stop
		a.start = func(ctx context.Context) error { return m.Start(ctx, local, nil, a.host) }
		a.call = func(ctx context.Context) error { return m.Update(ctx, local) }
	case plugins.KindDeployer:
		d, err := st.host.Deployer(spec, s)
		if err != nil {
			return nil, err
		}
		a.stop = d.Stop
		a.start = func(ctx context.Context) error { return d.Start(ctx, a.host) }
		a.call = func(ctx context.Context) error { _, err := d.Status(ctx); return err }
	case plugins.KindInterceptor:
		return a, st.makeLayer(a, spec, s)
	default:
		return nil, fmt.Errorf("the suite cannot run a %s as a process yet", st.program.Kind)
	}
	return a, nil
}

// makeLayer makes an interceptor in an embedded channel with one other member.
func (st *stage) makeLayer(a *puppet, spec core.PluginSpec, s channel.Settings) error {
	layer, err := st.host.Interceptor(spec, s)
	if err != nil {
		return err
	}
	below := &probe{desc: channel.Descriptor{Name: "probe-below", Provides: layer.Descriptor().Requires}}
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{Layers: []channel.Interceptor{layer, below}, Settings: s})
	if err != nil {
		return err
	}
	peer := channeltest.Member(2)
	a.embedded, a.stop = e, e.Stop
	a.start = func(ctx context.Context) error {
		if err := e.Start(ctx); err != nil {
			return err
		}
		st.t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), st.t.Timeouts.Stop)
			defer cancel()
			_ = e.Stop(ctx) // what it says was looked at if it matters
		})
		e.Observe(channel.MemberAdded, peer)
		for !e.View().Has(peer) {
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
				return fmt.Errorf("the member is kept from the view: %w", ctx.Err())
			}
		}
		return nil
	}
	a.call = func(ctx context.Context) error {
		return e.Send(ctx, []channel.Member{peer}, []byte("conformance"), channel.SendAck)
	}
	return nil
}

// run starts an instance and stops it at the end of the check.
func (st *stage) run(log *zap.Logger) *puppet {
	st.t.Helper()
	a := st.puppet(log)
	ctx, cancel := context.WithTimeout(context.Background(), st.t.Timeouts.Start)
	defer cancel()
	if err := a.start(ctx); err != nil {
		st.t.Fatalf("start of the subject: %v", err)
	}
	return a
}

// ask makes a call and fails the check if it fails or does not return in time.
func (st *stage) ask(a *puppet) {
	st.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), st.t.Timeouts.Call)
	defer cancel()
	if err := a.call(ctx); err != nil {
		st.t.Fatalf("a call is not answered: %v", err)
	}
}

// status is that of the one instance.
func (st *stage) status() core.PluginStatus {
	list := st.host.Status()
	if len(list) == 0 {
		return core.PluginStatus{}
	}
	return list[0]
}

// puppetHost is the node, as a plugin of any kind sees it.
type puppetHost struct {
	mu   sync.Mutex
	send func(to []channel.Member) error // guarded by mu; for messages that are acknowledged
}

func (h *puppetHost) Send(_ context.Context, to []channel.Member, o channel.Options, _ []byte) error {
	h.mu.Lock()
	send := h.send
	h.mu.Unlock()
	if send == nil || !o.Has(channel.UseAck) {
		return nil
	}
	return send(to)
}

func (*puppetHost) Update([]byte)                                {}
func (*puppetHost) Resync(context.Context) error                 { return nil }
func (*puppetHost) Observe(channel.MemberEvent)                  {}
func (*puppetHost) Apply(context.Context, core.Bundle) error     { return nil }
func (*puppetHost) Remove(context.Context, string, string) error { return nil }

// arguments are those with which a node starts the program.
func (p PluginProgram) arguments() []string {
	if p.Args != nil {
		return p.Args
	}
	return []string{"plugin", "serve", p.Kind + "/" + p.Name}
}

// absolute is the program's path for another working directory.
func (p PluginProgram) absolute() string {
	path, err := filepath.Abs(p.Path)
	if err != nil {
		return p.Path
	}
	return path
}
