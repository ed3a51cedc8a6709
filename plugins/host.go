package plugins

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// The kinds of plugins.
const (
	KindManager    = "manager"
	KindMembership = "membership"
	KindDeployer   = "deployer"
	// KindInterceptor is the kind of layers of the channel's stack.
	KindInterceptor = "interceptor"
)

// Config says which plugins there are and how they are hosted. Zero fields mean
// their defaults.
type Config struct {
	// Managers, Memberships and Deployers are the plugins that are compiled
	// into this program.
	Managers    []core.ManagerFactory
	Memberships []core.MembershipFactory
	Deployers   []core.DeployerFactory
	// Interceptors are compiled in too. A node runs its built-in ones directly
	// and without a host.
	Interceptors []core.InterceptorFactory
	// External are plugins that are programs of their own. Reread, if set,
	// returns them again for Refresh.
	External []External
	Reread   func(context.Context) ([]External, error)
	// Idle says that the host is only asked and will not start anything: the
	// programs of External need not be there.
	Idle bool

	// Executable is the program that serves the compiled-in plugins when it is
	// started as "<program> plugin serve <kind>/<name>". Empty is this program
	// itself, even if its file has been replaced meanwhile.
	Executable string
	// DefaultMode is used where a choice names no mode; process by default.
	DefaultMode core.PluginMode
	// StoreDir keeps the private copies of external programs; empty is a
	// temporary directory that Stop removes.
	StoreDir string
	// Env names variables of the node's environment that plugins get to see,
	// besides TZ and LANG.
	Env []string
	// Stream makes the data plane a gRPC stream, the form for systems and
	// languages that cannot inherit a descriptor. It is much slower.
	Stream bool

	// StartTimeout bounds one start, from the process to the started
	// component; 10 s by default.
	StartTimeout time.Duration
	// Heartbeat is asked for on the data plane, every second by default; a
	// process that shows no sign of life for HeartbeatTimeout, 5 s by default,
	// is killed.
	Heartbeat, HeartbeatTimeout time.Duration
	// StopTimeout bounds the stop of a component, 30 s by default, even if the
	// caller's context does not.
	StopTimeout time.Duration
	// DrainGrace is how long a process may take to end when asked, 2 s by
	// default; KillGrace how long after SIGTERM, 1 s by default.
	DrainGrace, KillGrace time.Duration
	// The first restart is immediate, the next waits BackoffMin (50 ms by
	// default) and every further one twice as long, up to BackoffMax (5 s by
	// default), give or take a fifth. A process that lived for StableAfter,
	// 10 s by default, starts over.
	BackoffMin, BackoffMax, StableAfter time.Duration
	// More than MaxDeaths within Within make a plugin broken: 10 in a minute by
	// default. It is then tried every BrokenRetry, 30 s by default.
	MaxDeaths   int
	Within      time.Duration
	BrokenRetry time.Duration
	// Window and WindowBytes bound the unanswered calls to one plugin, those
	// that are waited for and those that are not (messages) each: 1024
	// and 8 MiB by default.
	Window, WindowBytes int
}

// External is a plugin that is a program of its own.
type External struct {
	Kind, Name string
	// Path is the program. It is copied, and only the copy is ever run.
	Path string
	// SHA256 is the hexadecimal digest that the program must have.
	SHA256 string
	// Args replace the arguments "plugin", "serve", "<kind>/<name>".
	Args []string
	// Describe is what the program said of itself when it was pinned; an
	// interceptor needs it. A process that says something else is refused.
	Describe Description
	// Unpinned says that nobody has pinned the program: it is being developed.
	// It is warned of when it is chosen.
	Unpinned bool
}

func (c *Config) setDefaults() {
	defaults := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	defaults(&c.StartTimeout, 10*time.Second)
	defaults(&c.Heartbeat, time.Second)
	defaults(&c.HeartbeatTimeout, 5*time.Second)
	defaults(&c.StopTimeout, 30*time.Second)
	defaults(&c.DrainGrace, 2*time.Second)
	defaults(&c.KillGrace, time.Second)
	defaults(&c.BackoffMin, 50*time.Millisecond)
	defaults(&c.BackoffMax, 5*time.Second)
	defaults(&c.StableAfter, 10*time.Second)
	defaults(&c.Within, time.Minute)
	defaults(&c.BrokenRetry, 30*time.Second)
	if c.MaxDeaths <= 0 {
		c.MaxDeaths = 10
	}
	if c.DefaultMode == "" {
		c.DefaultMode = core.Process
	}
}

// Host makes plugin instances and watches over them. It implements
// core.PluginHost; its methods may be called from any goroutine.
type Host struct {
	cfg         Config
	log         *zap.Logger
	metrics     *channel.Metrics
	managers    *channel.Registry[core.Manager]
	memberships *channel.Registry[channel.Membership]
	deployers   *channel.Registry[core.Deployer]
	layers      *channel.Registry[channel.Interceptor]
	store       *store

	mu        sync.Mutex
	external  map[string]External // by kind/name; replaced, never changed; guarded by mu
	instances []*instance         // guarded by mu
	stopped   bool                // guarded by mu
}

// instance is one plugin instance: supervised, or direct.
type instance struct {
	kind  string
	spec  core.PluginSpec
	mode  core.PluginMode
	super *supervisor         // nil for direct
	layer *bridge.Interceptor // of an interceptor that is not direct
	// unpinned as in External.
	unpinned bool
	direct   func(context.Context) error
}

var _ core.PluginHost = (*Host)(nil)

// NewHost returns a host. It starts nothing. Two plugins of one kind and name
// are an error, and so is an external one without a digest.
func NewHost(cfg Config, s channel.Settings) (*Host, error) {
	cfg.setDefaults()
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	h := &Host{cfg: cfg, log: s.Logger, metrics: s.Metrics, store: &store{dir: cfg.StoreDir}}
	var errs [5]error
	h.managers, errs[0] = channel.NewRegistry(KindManager, cfg.Managers...)
	h.memberships, errs[1] = channel.NewRegistry(KindMembership, cfg.Memberships...)
	h.deployers, errs[2] = channel.NewRegistry(KindDeployer, cfg.Deployers...)
	h.layers, errs[3] = channel.NewRegistry(KindInterceptor, cfg.Interceptors...)
	h.external, errs[4] = h.index(cfg.External)
	if _, err := h.mode(cfg.DefaultMode, false); err != nil {
		return nil, err
	}
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("plugins: %w", err)
	}
	return h, nil
}

func (h *Host) compiledIn(kind string) ([]string, error) {
	switch kind {
	case KindManager:
		return h.managers.Names(), nil
	case KindMembership:
		return h.memberships.Names(), nil
	case KindDeployer:
		return h.deployers.Names(), nil
	case KindInterceptor:
		return h.layers.Names(), nil
	}
	return nil, fmt.Errorf("unknown kind of plugin %q (known: %s, %s, %s, %s)", kind, KindManager, KindMembership, KindDeployer, KindInterceptor)
}

// Names implements core.PluginHost; an unknown kind has none.
func (h *Host) Names(kind string) []string {
	names, err := h.compiledIn(kind)
	if err != nil {
		return nil
	}
	for _, e := range h.externals() {
		if e.Kind == kind {
			names = append(names, e.Name)
		}
	}
	slices.Sort(names)
	return names
}

// Check implements core.PluginHost. The options of an external program are
// checked against the schema in its description; it checks them itself, too,
// when it starts.
func (h *Host) Check(kind string, spec core.PluginSpec) error {
	id := kind + "/" + spec.Name
	e, external := h.externals()[id]
	if _, err := h.mode(spec.Mode, external); err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	if err := checkOnDown(kind, spec); err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	if external {
		return h.checkExternal(e, spec)
	}
	d := bridge.Decoder(spec.Options, spec.Origin)
	switch kind {
	case KindManager:
		return check(h, h.managers, kind, spec.Name, d)
	case KindMembership:
		return check(h, h.memberships, kind, spec.Name, d)
	case KindDeployer:
		return check(h, h.deployers, kind, spec.Name, d)
	case KindInterceptor:
		return check(h, h.layers, kind, spec.Name, d)
	}
	_, err := h.compiledIn(kind)
	return err
}

func check[T any](h *Host, r *channel.Registry[T], kind, name string, d channel.Decode) error {
	f, err := r.Get(name)
	if err != nil {
		return h.unknown(kind, name, err)
	}
	return f.Check(d)
}

// unknown names the external plugins too.
func (h *Host) unknown(kind, name string, err error) error {
	all := h.Names(kind)
	if len(h.externals()) == 0 || len(all) == 0 {
		return err
	}
	msg := fmt.Sprintf("unknown %s %q (known: %s)", kind, name, strings.Join(all, ", "))
	if near := channel.Nearest(name, all); near != "" {
		msg += fmt.Sprintf("; did you mean %q?", near)
	}
	return errors.New(msg)
}

// mode resolves the mode of a choice.
func (h *Host) mode(m core.PluginMode, external bool) (core.PluginMode, error) {
	if m == "" {
		m = h.cfg.DefaultMode
		if external {
			m = core.Process
		}
	}
	switch m {
	case core.Process:
		return m, nil
	case core.Direct, core.Bridged:
		if external {
			return "", fmt.Errorf("plugins: an external program cannot run in mode %q, only in %q", m, core.Process)
		}
		return m, nil
	}
	return "", fmt.Errorf("plugins: unknown mode %q (known: %s, %s, %s)", m, core.Direct, core.Bridged, core.Process)
}

// Manager implements core.PluginHost.
func (h *Host) Manager(spec core.PluginSpec, s channel.Settings) (core.Manager, error) {
	return create(h, KindManager, h.managers, spec, s,
		func(l bridge.Lifecycle, log *zap.Logger) core.Manager { return bridge.NewManager(spec.Name, l, log) })
}

// Membership implements core.PluginHost.
func (h *Host) Membership(spec core.PluginSpec, s channel.Settings) (channel.Membership, error) {
	return create(h, KindMembership, h.memberships, spec, s,
		func(l bridge.Lifecycle, log *zap.Logger) channel.Membership {
			return bridge.NewMembership(spec.Name, l, log)
		})
}

// Deployer implements core.PluginHost.
func (h *Host) Deployer(spec core.PluginSpec, s channel.Settings) (core.Deployer, error) {
	return create(h, KindDeployer, h.deployers, spec, s,
		func(l bridge.Lifecycle, log *zap.Logger) core.Deployer { return bridge.NewDeployer(spec.Name, l, log) })
}

// stopper is what all kinds have in common.
type stopper interface {
	Stop(ctx context.Context) error
}

// prepare checks a choice and returns the instance to be, with what is missing
// in spec and s filled in.
func (h *Host) prepare(kind string, spec core.PluginSpec, s *channel.Settings) (*instance, error) {
	if err := h.Check(kind, spec); err != nil {
		return nil, err
	}
	e, external := h.externals()[kind+"/"+spec.Name]
	mode, err := h.mode(spec.Mode, external)
	if err != nil {
		return nil, err
	}
	if spec.Instance == "" {
		spec.Instance = spec.Name
	}
	if s.Name == "" {
		s.Name = spec.Instance
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	in := &instance{kind: kind, spec: spec, mode: mode, unpinned: e.Unpinned}
	if mode != core.Direct {
		log := s.Logger.With(zap.String("plugin", kind+"/"+spec.Name), zap.String("instance", spec.Instance))
		in.super = newSupervisor(&h.cfg, kind, spec, log, s.Metrics)
	}
	if e.Unpinned {
		s.Logger.Warn("this plugin is not pinned: whatever the file contains is run; use \"longhouse plugin add\" when it is done",
			zap.String("plugin", kind+"/"+spec.Name), zap.String("program", e.Path))
	}
	return in, nil
}

// supervise has the instance launched in its mode; make makes the component in
// this process.
func (h *Host) supervise(in *instance, s channel.Settings, make func() (any, error)) error {
	e, external := h.externals()[in.super.id]
	if in.mode == core.Bridged {
		in.super.launch = bridgedLauncher(in.super, make, in.super.log)
	} else {
		in.super.launch = (&program{host: h, super: in.super, external: e, isExternal: external, workDir: s.WorkDir, log: in.super.log,
			output: newOutput(in.super.log, s.Metrics, in.kind, in.spec.Name)}).launch
	}
	return h.add(in)
}

func create[T stopper](h *Host, kind string, r *channel.Registry[T], spec core.PluginSpec, s channel.Settings, client func(bridge.Lifecycle, *zap.Logger) T) (T, error) {
	var none T
	in, err := h.prepare(kind, spec, &s)
	if err != nil {
		return none, err
	}
	make := func() (T, error) {
		f, err := r.Get(spec.Name)
		if err != nil {
			return none, err
		}
		return f.New(bridge.Decoder(spec.Options, spec.Origin), s)
	}
	if in.mode == core.Direct {
		c, err := make()
		if err != nil {
			return none, err
		}
		in.direct = c.Stop
		return c, h.add(in)
	}
	if err := h.supervise(in, s, func() (any, error) { return make() }); err != nil {
		return none, err
	}
	return client(in.super, in.super.log), nil
}

func (h *Host) add(in *instance) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopped {
		return fmt.Errorf("plugins: %w", channel.ErrClosed)
	}
	// What has been stopped and has a successor is of no interest any more.
	h.instances = slices.DeleteFunc(h.instances, func(o *instance) bool {
		return o.kind == in.kind && o.spec.Name == in.spec.Name && o.spec.Instance == in.spec.Instance && o.ended()
	})
	h.instances = append(h.instances, in)
	return nil
}

func (h *Host) all() []*instance {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.instances)
}

// Status implements core.PluginHost. A direct plugin is always ready: nobody
// watches it.
func (h *Host) Status() []core.PluginStatus {
	var list []core.PluginStatus
	for _, in := range h.all() {
		st := core.PluginStatus{Kind: in.kind, Name: in.spec.Name, Instance: in.spec.Instance, Mode: in.mode, State: stateReady, Generation: 1}
		if in.super != nil {
			in.super.status(&st)
		}
		if in.layer != nil {
			var inFlight int64
			st.Messages, st.Refused, inFlight = in.layer.Traffic()
			st.InFlight += inFlight
		}
		if st.PID > 0 {
			st.Memory = residentMemory(st.PID)
		}
		st.Unpinned = in.unpinned
		list = append(list, st)
	}
	return list
}

// statsTimeout bounds the time that Samples waits for one process.
const statsTimeout = time.Second

// Samples asks all plugin processes for their own counters, gauges and
// histograms and returns them with the labels plugin and instance added.
// Plugins that do not answer within a second are left out. Plugins in the
// node's own process count in the Settings.Metrics they were given.
func (h *Host) Samples(ctx context.Context) []channel.Sample {
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	var (
		wg  sync.WaitGroup
		mu  sync.Mutex
		out []channel.Sample
	)
	for _, in := range h.all() {
		if in.super == nil {
			continue
		}
		control := in.super.control()
		if control == nil {
			continue
		}
		wg.Go(func() {
			samples, err := control.Stats(ctx)
			if err != nil {
				in.super.log.Debug("no statistics of the plugin", zap.Error(err))
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, s := range samples {
				s.Labels = append(slices.Clip(s.Labels), "plugin", in.kind+"/"+in.spec.Name, "instance", in.spec.Instance)
				out = append(out, s)
			}
		})
	}
	wg.Wait()
	return out
}

// Stop implements core.PluginHost: it stops all instances that are still there.
func (h *Host) Stop(ctx context.Context) error {
	h.mu.Lock()
	h.stopped = true
	h.mu.Unlock()
	all := h.all()
	errs := make([]error, len(all), len(all)+1)
	var wg sync.WaitGroup
	for i, in := range all {
		wg.Go(func() {
			if in.super != nil {
				errs[i] = in.super.Stop(ctx)
			} else if in.direct != nil {
				errs[i] = in.direct(ctx)
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, h.store.close())...)
}

// connConfig is the configuration of a connection to a plugin.
func (c *Config) connConfig() frame.Config {
	return frame.Config{Heartbeat: c.Heartbeat, HeartbeatTimeout: c.HeartbeatTimeout}
}
