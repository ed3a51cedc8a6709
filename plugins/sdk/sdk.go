package sdk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// How long the end of the process may take.
const (
	// stopGrace is what the component has to stop in when the node is gone or
	// asks for the end.
	stopGrace = time.Second
	// exitGrace is when the process ends in any case, whatever still runs.
	exitGrace = 1500 * time.Millisecond
)

// Set is what a program can serve.
type Set struct {
	Managers     []core.ManagerFactory
	Memberships  []core.MembershipFactory
	Deployers    []core.DeployerFactory
	Interceptors []core.InterceptorFactory
}

// Serve serves the plugin id, "<kind>/<name>", to the node that started this
// process. It returns when the node has asked for the end or is gone; the
// process must end then. It takes over standard output and error.
func Serve(id string, set Set) error {
	if !startedByNode() {
		return errors.New("sdk: this program is a plugin, to be started by a longhouse node and not by hand")
	}
	kind, name, ok := strings.Cut(id, "/")
	if !ok {
		return fmt.Errorf("sdk: %q is not <kind>/<name>, such as manager/delta", id)
	}
	makeComponent, err := set.find(kind, name)
	if err != nil {
		return err
	}
	return serve(id, makeComponent)
}

// maker makes a component.
type maker func(channel.Decode, channel.Settings) (any, error)

func serve(id string, makeComponent maker) error {
	// go-plugin replaces os.Stdout and os.Stderr; the log goes to the original.
	level := zap.NewAtomicLevel()
	s := &service{
		id: id, make: makeComponent,
		log: newLogger(os.Stderr, level), level: level,
		ended: make(chan struct{}),
	}
	if s.data = inherited(); s.data != nil {
		go watch(s.data, s.end) // ends with the first byte
	}
	go plugin.Serve(&plugin.ServeConfig{ // ends with the process
		HandshakeConfig: bridge.Handshake,
		VersionedPlugins: map[int]plugin.PluginSet{
			bridge.APIVersion: {bridge.ControlName: &bridge.ControlPlugin{Impl: s}},
		},
		GRPCServer: plugin.DefaultGRPCServer,
		Logger:     hclog.NewNullLogger(),
	})
	<-s.ended
	return s.stop()
}

func startedByNode() bool {
	return os.Getenv(bridge.Handshake.MagicCookieKey) == bridge.Handshake.MagicCookieValue
}

// find returns what makes the component of that kind and name.
func (s Set) find(kind, name string) (maker, error) {
	switch kind {
	case "manager":
		return finder(kind, name, s.Managers)
	case "membership":
		return finder(kind, name, s.Memberships)
	case "deployer":
		return finder(kind, name, s.Deployers)
	case "interceptor":
		makeLayer, err := finder(kind, name, s.Interceptors)
		if err != nil {
			return nil, err
		}
		return described(name, "", makeLayer), nil
	}
	return nil, fmt.Errorf("sdk: unknown kind of plugin %q (known: manager, membership, deployer, interceptor)", kind)
}

// described makes a layer say what it is.
func described(name, version string, makeLayer maker) maker {
	return func(d channel.Decode, s channel.Settings) (any, error) {
		c, err := makeLayer(d, s)
		if err != nil {
			return nil, err
		}
		l := c.(channel.Interceptor)
		return bridge.ServedInterceptor{Interceptor: l, Description: bridge.DescribeInterceptor(name, version, l)}, nil
	}
}

func finder[T any](kind, name string, list []channel.Factory[T]) (maker, error) {
	r, err := channel.NewRegistry(kind, list...)
	if err != nil {
		return nil, fmt.Errorf("sdk: %w", err)
	}
	f, err := r.Get(name)
	if err != nil {
		return nil, fmt.Errorf("sdk: this program does not have what the node asks for: %w", err)
	}
	return func(d channel.Decode, s channel.Settings) (any, error) { return f.New(d, s) }, nil
}

// service is the bridge.Control of this process.
type service struct {
	id    string
	make  maker
	log   *zap.Logger
	level zap.AtomicLevel
	// data is the inherited data plane, or nil.
	data io.ReadWriteCloser

	endOnce sync.Once
	ended   chan struct{}

	mu        sync.Mutex
	component any              // guarded by mu
	metrics   *channel.Metrics // guarded by mu
	server    bridge.Server    // guarded by mu
}

// end begins the end of the process, which must not take longer than exitGrace.
func (s *service) end() {
	s.endOnce.Do(func() {
		time.AfterFunc(exitGrace, func() {
			s.log.Error("the plugin did not stop in time; its process ends anyway", zap.Duration("after", exitGrace))
			removePrivateDir()
			killGroup()
			os.Exit(1)
		})
		close(s.ended)
	})
}

func (s *service) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
	defer cancel()
	s.mu.Lock()
	server := s.server
	s.mu.Unlock()
	var err error
	if server != nil {
		err = server.Close(ctx)
	}
	removePrivateDir()
	return err
}

// Configure implements bridge.Control.
func (s *service) Configure(_ context.Context, setup bridge.Setup) (stream bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.component != nil {
		return false, errors.New("sdk: configured twice")
	}
	if id := setup.Kind + "/" + setup.Name; id != s.id {
		return false, fmt.Errorf("sdk: this process serves %s and cannot be configured as %s", s.id, id)
	}
	if l, err := zap.ParseAtomicLevel(setup.LogLevel); err == nil {
		s.level.SetLevel(l.Level())
	}
	network, err := stdnet.NewNet()
	if err != nil {
		return false, fmt.Errorf("sdk: network: %w", err)
	}
	s.metrics = channel.NewMetrics()
	c, err := s.make(bridge.Decoder(setup.Options, setup.Origin), channel.Settings{
		Name: setup.Instance, Logger: s.log.Named(setup.Name), Net: network,
		Metrics: s.metrics, WorkDir: setup.WorkDir, BaseDir: os.Getenv(bridge.EnvBaseDir),
	})
	if err != nil {
		return false, err
	}
	s.component = c
	if !setup.Descriptor || s.data == nil {
		return true, nil
	}
	return false, s.serveLocked(s.data)
}

func (s *service) serveLocked(rw io.ReadWriteCloser) error {
	if s.server != nil {
		return errors.New("sdk: the data plane is open already")
	}
	server, err := bridge.Serve(rw, s.component, frame.Config{}, s.log)
	if err != nil {
		return err
	}
	s.server = server
	go func() { // ends with the connection: the node is gone
		<-server.Done()
		s.end()
	}()
	return nil
}

// ServeData implements bridge.DataServer.
func (s *service) ServeData(rw io.ReadWriteCloser) error {
	s.mu.Lock()
	if s.component == nil {
		s.mu.Unlock()
		return errors.New("sdk: not configured yet")
	}
	err := s.serveLocked(rw)
	server := s.server
	s.mu.Unlock()
	if err != nil {
		return err
	}
	<-server.Done()
	return nil
}

// Health implements bridge.Control.
func (s *service) Health(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.component == nil {
		return errors.New("sdk: not configured yet")
	}
	return nil
}

// Stats implements bridge.Control.
func (s *service) Stats(context.Context) ([]channel.Sample, error) {
	s.mu.Lock()
	m := s.metrics
	s.mu.Unlock()
	return m.Samples(), nil // outside of the lock: gauges are the author's code
}

// Shutdown implements bridge.Control.
func (s *service) Shutdown(context.Context) error {
	// The answer has to get out first; the node waits for the end anyway.
	time.AfterFunc(10*time.Millisecond, s.end)
	return nil
}

// removePrivateDir removes the directory that the node made for this start: the
// node may be gone.
func removePrivateDir() {
	dir := os.Getenv(bridge.EnvPrivateDir)
	if strings.HasPrefix(filepath.Base(dir), bridge.PrivateDirPrefix) {
		// Nobody is left to be told of a failure.
		_ = os.RemoveAll(dir)
	}
}
