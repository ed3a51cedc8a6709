package sdk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type paintConfig struct {
	Color string `yaml:"color"`
}

type deployer struct{ cfg paintConfig }

func (*deployer) Start(context.Context, core.DeployerHost) error    { return nil }
func (*deployer) Status(context.Context) ([]core.Deployment, error) { return nil, nil }
func (*deployer) Stop(context.Context) error                        { return nil }

var set = Set{Deployers: []core.DeployerFactory{channel.FactoryOf("acme/paint", paintConfig{Color: "red"},
	func(c paintConfig, s channel.Settings) (core.Deployer, error) {
		if s.Net == nil || s.Logger == nil || s.Metrics == nil {
			return nil, errors.New("incomplete settings")
		}
		return &deployer{c}, nil
	})}}

func TestServeRefusesPeopleAndUnknownNames(t *testing.T) {
	if err := Serve("deployer/acme/paint", set); err == nil || !strings.Contains(err.Error(), "not by hand") {
		t.Errorf("by hand: %v", err)
	}
	t.Setenv(bridge.Handshake.MagicCookieKey, bridge.Handshake.MagicCookieValue)
	for id, want := range map[string]string{
		"deployer":           "is not <kind>/<name>",
		"painter/acme/paint": "unknown kind",
		"deployer/acme/pain": `did you mean "acme/paint"`,
		"manager/delta":      "does not have what the node asks for",
	} {
		if err := Serve(id, set); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", id, err)
		}
	}
	twice := Set{Deployers: append(set.Deployers, set.Deployers...)}
	if _, err := twice.find("deployer", "acme/paint"); err == nil || !strings.Contains(err.Error(), "registered twice") {
		t.Errorf("twice: %v", err)
	}
}

func TestConfigure(t *testing.T) {
	mk, err := set.find("deployer", "acme/paint")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{id: "deployer/acme/paint", make: mk, log: zap.NewNop(), level: zap.NewAtomicLevel(), ended: make(chan struct{})}
	if err := s.Health(t.Context()); err == nil {
		t.Error("healthy before it is configured")
	}
	if err := s.ServeData(nil); err == nil {
		t.Error("data before configuration")
	}
	setup := bridge.Setup{Kind: "deployer", Name: "acme/paint", LogLevel: "warn"}
	wrong := setup
	wrong.Name = "other"
	if _, err := s.Configure(t.Context(), wrong); err == nil || !strings.Contains(err.Error(), "cannot be configured as deployer/other") {
		t.Errorf("wrong name: %v", err)
	}
	bad := setup
	bad.Options, bad.Origin = []byte("colour: blue"), "server.yaml:7"
	if _, err := s.Configure(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "server.yaml:7") {
		t.Errorf("bad options: %v", err)
	}
	setup.Options = []byte("color: blue")
	stream, err := s.Configure(t.Context(), setup)
	if err != nil || !stream {
		t.Fatalf("configure: %v, %v", stream, err)
	}
	if d := s.component.(*deployer); d.cfg.Color != "blue" || s.level.Level() != zap.WarnLevel {
		t.Errorf("component %+v, level %v", d, s.level)
	}
	if _, err := s.Configure(t.Context(), setup); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("again: %v", err)
	}
	s.metrics.Counter("x_total", "").Add(3)
	if list, err := s.Stats(t.Context()); err != nil || len(list) != 1 || list[0].Value != 3 {
		t.Errorf("stats %v, %v", list, err)
	}
}

func TestLogLines(t *testing.T) {
	var b bytes.Buffer
	newLogger(&b, zap.InfoLevel).Named("paint").With(zap.Int("n", 1)).Warn("wet\npaint", zap.Duration("for", time.Second), zap.Error(errors.New("odd")))
	newLogger(&b, zap.InfoLevel).Debug("not written")
	if n := strings.Count(b.String(), "\n"); n != 1 {
		t.Errorf("%d lines: %s", n, b.String())
	}
	var m map[string]any
	if err := json.Unmarshal(b.Bytes(), &m); err != nil {
		t.Fatal(err)
	}
	if m["@level"] != "warn" || m["@message"] != "wet\npaint" || m["@module"] != "paint" || m["n"] != 1.0 || m["for"] != "1s" || m["error"] != "odd" {
		t.Errorf("%v", m)
	}
}

func TestOnlyPrivateDirectoriesAreRemoved(t *testing.T) {
	for name, gone := range map[string]bool{bridge.PrivateDirPrefix + "123": true, "home": false} {
		dir := filepath.Join(t.TempDir(), name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Setenv(bridge.EnvPrivateDir, dir)
		removePrivateDir()
		if _, err := os.Stat(dir); os.IsNotExist(err) != gone {
			t.Errorf("%s: gone is not %v", name, gone)
		}
	}
	t.Setenv(bridge.EnvPrivateDir, "")
	removePrivateDir()
}
