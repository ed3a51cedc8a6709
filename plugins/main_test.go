package plugins

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/sdk"
)

// TestMain makes the test binary serve the fakes when a host starts it as a
// plugin, and be a host when a test wants to kill one.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "plugin" && os.Args[2] == "serve" {
		if err := sdk.Serve(os.Args[3], fakeSet()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == "bare-grpc" {
		serveBare(os.Args[2])
	}
	if len(os.Args) > 1 && os.Args[1] == "victim-host" {
		victimHost()
		return
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if programDir != "" {
			_ = os.RemoveAll(programDir)
		}
		os.Exit(code)
	}))
}

// programDir keeps programs that are built once for all tests.
var programDir string

func fakeSet() sdk.Set {
	return sdk.Set{
		Managers: []core.ManagerFactory{fakeManagerFactory}, Memberships: []core.MembershipFactory{fakeMembershipFactory},
		Deployers: []core.DeployerFactory{fakeDeployerFactory}, Interceptors: fakeLayers,
	}
}

type fakeConfig struct {
	Greeting string `yaml:"greeting"`
	Fail     bool   `yaml:"fail"`
}

func (c *fakeConfig) Validate() error {
	if c.Greeting == "bad" {
		return errors.New("fake: greeting must not be bad")
	}
	return nil
}

var (
	fakeManagerFactory = channel.FactoryOf("fake", fakeConfig{Greeting: "hello"},
		func(c fakeConfig, s channel.Settings) (core.Manager, error) { return &fakeManager{cfg: c, s: s}, nil })
	fakeMembershipFactory = channel.FactoryOf("fake", fakeConfig{},
		func(c fakeConfig, s channel.Settings) (channel.Membership, error) {
			return &fakeMembership{cfg: c, s: s}, nil
		})
	fakeDeployerFactory = channel.FactoryOf("fake", fakeConfig{},
		func(c fakeConfig, s channel.Settings) (core.Deployer, error) { return &fakeDeployer{cfg: c, s: s}, nil })
)

// fakeManager does what its input says and reports everything by Update.
type fakeManager struct {
	cfg  fakeConfig
	s    channel.Settings
	host core.ManagerHost

	mu       sync.Mutex
	view     channel.View
	commits  int
	released []session.Key
}

func (m *fakeManager) Start(_ context.Context, host core.ManagerHost) error {
	if m.cfg.Fail {
		return fmt.Errorf("fake: told to fail: %w", channel.ErrNotConfigured)
	}
	m.host = host
	m.s.Logger.Info("fake manager started", zap.String("greeting", m.cfg.Greeting))
	m.s.Metrics.Counter("fake_starts_total", "Starts.").Inc()
	m.s.Metrics.Histogram("fake_seconds", "Durations.", 1e-3, []int64{1, 10}).Observe(5)
	return nil
}

func (m *fakeManager) Commit(ctx context.Context, batch []byte, level core.Level) error {
	switch cmd, arg, _ := strings.Cut(string(batch), ":"); cmd {
	case "exit":
		os.Exit(3)
	case "panic":
		panic("fake: " + arg)
	case "print":
		fmt.Println(arg)
		fmt.Fprintln(os.Stderr, arg)
	case "hang":
		<-ctx.Done()
		return ctx.Err()
	case "error":
		return fmt.Errorf("fake: %s: %w", arg, session.ErrTooLarge)
	case "resync":
		return m.host.Resync(ctx)
	case "env":
		m.host.Update([]byte(strings.Join(os.Environ(), "\n")))
		return nil
	case "send":
		m.mu.Lock()
		to := m.view.Members
		m.mu.Unlock()
		return m.host.Send(ctx, to, channel.SendSyncAck, []byte(arg))
	case "quiet":
		return nil
	}
	m.mu.Lock()
	m.commits++
	m.mu.Unlock()
	m.host.Update(fmt.Appendf(nil, "commit %s %s", level, batch))
	return nil
}

func (m *fakeManager) Load(_ context.Context, key session.Key) (*session.Record, error) {
	if key.ID == "none" {
		return nil, nil
	}
	return &session.Record{Key: key, Created: 1, LastAccess: 2, MaxInactive: time.Hour, RenewedTo: "x"}, nil
}

func (m *fakeManager) Release(_ context.Context, keys []session.Key) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.released = append(m.released, keys...)
	return nil
}

func (m *fakeManager) HandleMessage(_ context.Context, from channel.Member, body []byte, done func(error)) {
	if string(body) == "fail" {
		done(session.ErrInvalid)
		return
	}
	if strings.HasPrefix(string(body), "quiet") {
		done(nil)
		return
	}
	text := fmt.Sprintf("message %s %s", from.Domain, body)
	m.host.Update([]byte(text))
	done(nil)
}

func (m *fakeManager) HandleView(_ context.Context, v channel.View) {
	m.mu.Lock()
	m.view = v
	m.mu.Unlock()
	m.host.Update(fmt.Appendf(nil, "view %d %d", v.Version, len(v.Members)))
}

func (m *fakeManager) Status(context.Context) (core.ManagerStatus, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return core.ManagerStatus{Ready: true, State: m.cfg.Greeting, Sessions: m.commits, Tombstones: len(m.released), Transfer: time.Second}, nil
}

func (m *fakeManager) Keys(_ context.Context, limit int) ([]session.Summary, error) {
	return []session.Summary{{Context: "c", ID: "id", Attributes: limit, Created: time.UnixMilli(1234)}}, nil
}

func (m *fakeManager) Stop(ctx context.Context) error {
	if m.host == nil {
		return nil
	}
	m.mu.Lock()
	to := m.view.Members
	m.mu.Unlock()
	if len(to) > 0 {
		return m.host.Send(ctx, to, channel.SendNone, []byte("bye"))
	}
	return nil
}

// fakeManagerHost records what a manager does.
type fakeManagerHost struct {
	updates chan string
	resyncs chan struct{}
	send    func(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error
}

func newFakeHost() *fakeManagerHost {
	return &fakeManagerHost{updates: make(chan string, 100_000), resyncs: make(chan struct{}, 1000)}
}

func (h *fakeManagerHost) Send(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error {
	if h.send == nil {
		return nil
	}
	return h.send(ctx, to, o, body)
}
func (h *fakeManagerHost) Update(batch []byte) { h.updates <- string(batch) }
func (h *fakeManagerHost) Resync(context.Context) error {
	h.resyncs <- struct{}{}
	return nil
}

func member(n byte) channel.Member {
	return channel.Member{
		ID: channel.UniqueID{15: n, 0: 1}, Host: netip.AddrFrom4([4]byte{127, 0, 0, n}), Port: 4000 + int(n),
		SecurePort: -1, UDPPort: -1, Domain: fmt.Sprintf("d%d", n), Payload: channel.Announcement{Name: fmt.Sprintf("n%d", n)}.Encode(), Alive: time.Duration(n) * time.Second,
	}
}

// fakeMembership reports what it is told by Update: the domain of the local
// record says which event about which member.
type fakeMembership struct {
	cfg  fakeConfig
	s    channel.Settings
	sink channel.MemberSink
}

func (m *fakeMembership) Start(_ context.Context, local channel.Member, known []channel.Member, sink channel.MemberSink) error {
	m.sink = sink
	ev := member(200)
	ev.Payload = fmt.Sprintf("started local %s known %d", local.Domain, len(known))
	sink.Observe(channel.MemberEvent{Kind: channel.MemberUpdated, Member: ev})
	return nil
}

func (m *fakeMembership) Update(_ context.Context, local channel.Member) error {
	var kind, n int
	if _, err := fmt.Sscanf(local.Domain, "%d %d", &kind, &n); err != nil {
		return err
	}
	ev := channel.MemberEvent{Kind: channel.MemberEventKind(kind), Member: member(byte(n))}
	if ev.Kind == channel.MemberLost {
		ev.Err = channel.ErrAckTimeout
	}
	m.sink.Observe(ev)
	return nil
}

func (m *fakeMembership) Stop(context.Context) error { return nil }

type sinkFunc func(channel.MemberEvent)

func (f sinkFunc) Observe(ev channel.MemberEvent) { f(ev) }

// fakeDeployer applies one bundle when it starts, and removes it when it stops.
type fakeDeployer struct {
	cfg  fakeConfig
	s    channel.Settings
	host core.DeployerHost
	err  error
}

func (d *fakeDeployer) Start(ctx context.Context, host core.DeployerHost) error {
	d.host = host
	d.err = host.Apply(ctx, core.Bundle{Path: "/shop", Version: "2", Digest: "abc", Dir: d.s.WorkDir})
	return nil
}

func (d *fakeDeployer) Status(context.Context) ([]core.Deployment, error) {
	st := core.Deployment{Bundle: core.Bundle{Path: "/shop"}, State: "serving"}
	if d.err != nil {
		st.State, st.Error = "failed", d.err.Error()
		if !errors.Is(d.err, channel.ErrTooLarge) {
			st.Error = "the identity is lost: " + st.Error
		}
	}
	return []core.Deployment{st}, nil
}

func (d *fakeDeployer) Stop(ctx context.Context) error {
	if d.host == nil {
		return nil
	}
	return d.host.Remove(ctx, "", "/shop")
}

// fakeDeployerHost records calls, and fails if two run at once.
type fakeDeployerHost struct {
	mu    sync.Mutex
	calls []string
	err   error
}

func (h *fakeDeployerHost) note(s string) error {
	if !h.mu.TryLock() {
		panic("two calls at once")
	}
	defer h.mu.Unlock()
	h.calls = append(h.calls, s)
	return h.err
}
func (h *fakeDeployerHost) Apply(_ context.Context, b core.Bundle) error {
	return h.note("apply " + b.Path + " " + b.Version + " " + b.Digest + " " + b.Dir)
}
func (h *fakeDeployerHost) Remove(_ context.Context, host, path string) error {
	return h.note("remove " + host + path)
}

// newTestHost returns a host of the fakes that the test stops.
func newTestHost(tb testing.TB, change func(*Config)) (*Host, *channel.Metrics) {
	tb.Helper()
	set := fakeSet()
	cfg := Config{Managers: set.Managers, Memberships: set.Memberships, Deployers: set.Deployers, Interceptors: set.Interceptors}
	if change != nil {
		change(&cfg)
	}
	metrics := channel.NewMetrics()
	h, err := NewHost(cfg, channel.Settings{Logger: zap.NewNop(), Metrics: metrics})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := h.Stop(context.Background()); err != nil {
			tb.Errorf("stop of the host: %v", err)
		}
	})
	return h, metrics
}

func testSettings(tb testing.TB, m *channel.Metrics) channel.Settings {
	return channel.Settings{Logger: zaptest.NewLogger(tb, zaptest.Level(zap.InfoLevel)), Metrics: m, WorkDir: "/work-dir"}
}

// startManager starts the fake manager.
func startManager(tb testing.TB, h *Host, m *channel.Metrics, mode core.PluginMode, mh core.ManagerHost) core.Manager {
	tb.Helper()
	mgr, err := h.Manager(core.PluginSpec{Name: "fake", Mode: mode}, testSettings(tb, m))
	if err != nil {
		tb.Fatal(err)
	}
	if err := mgr.Start(tb.Context(), mh); err != nil {
		tb.Fatal(err)
	}
	return mgr
}

func receive[T any](tb testing.TB, ch <-chan T) T {
	tb.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(20 * time.Second):
		tb.Fatal("nothing came in time")
		panic("unreachable")
	}
}
