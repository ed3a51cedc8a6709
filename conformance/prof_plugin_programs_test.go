//go:build unix

package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/deployer/watch"
	"github.com/longhouse-go/longhouse/plugins/manager/backup"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/membership/dns"
	"github.com/longhouse-go/longhouse/plugins/membership/file"
	"github.com/longhouse-go/longhouse/plugins/membership/gossip"
	"github.com/longhouse-go/longhouse/plugins/membership/kubernetes"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
	"github.com/longhouse-go/longhouse/plugins/membership/static"
	"github.com/longhouse-go/longhouse/plugins/sdk"
)

// The test binary is also the program of the plugins under test: a host starts
// it as "<binary> plugin serve <kind>/<name>".
func init() {
	sabotageProgram = func(how string) (PluginProgram, error) {
		if how == "interceptor" {
			return Process(os.Args[0]).Component("interceptor/acme/flip").Plugin()
		}
		return PluginProgram{Path: os.Args[0], Kind: "manager", Name: how}, nil
	}
	if len(os.Args) != 4 || os.Args[1] != "plugin" || os.Args[2] != "serve" {
		return
	}
	kind, name, _ := strings.Cut(os.Args[3], "/")
	if kind == "interceptor" {
		return // TestMain serves those
	}
	set := sdk.Set{
		Managers: []core.ManagerFactory{delta.Factory, backup.Factory},
		Memberships: []core.MembershipFactory{
			multicast.Factory, static.Factory, file.Factory, dns.Factory, kubernetes.Factory, gossip.Factory,
		},
		Deployers: []core.DeployerFactory{watch.Factory},
	}
	if kind == "manager" && name != delta.Factory.Name && name != backup.Factory.Name {
		sabotage(name)
		set.Managers = []core.ManagerFactory{sabotagedManager(name)}
	}
	if err := sdk.Serve(os.Args[3], set); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// sabotage is what goes wrong before the program is a plugin.
func sabotage(how string) {
	versions := os.Getenv(envVersions)
	byHand := os.Getenv(envCookie) == ""
	shake := func(version string) {
		sock := filepath.Join(os.Getenv(envSocketDir), "sock")
		fmt.Printf("1|%s|unix|%s|grpc|%s\n", version, sock, strings.Repeat("QUJD", 200))
		time.Sleep(time.Minute)
	}
	switch {
	case how == "exits-silently" && byHand:
		os.Exit(1)
	case how == "exits-fine" && byHand:
		fmt.Println("I am a plugin.")
		os.Exit(0)
	case how == "waits-by-hand" && byHand:
		fmt.Println("I am a plugin.")
		time.Sleep(time.Minute)
	case how == "claims-any-version":
		shake(versions[strings.LastIndexByte(versions, ',')+1:])
	case how == "claims-version-0":
		shake("0")
	case how == "babbles-first":
		fmt.Println("Starting up, please wait...")
	}
}

func sabotagedManager(how string) core.ManagerFactory {
	f := channel.FactoryOf(how, struct{}{}, func(_ struct{}, s channel.Settings) (core.Manager, error) {
		return &saboteurManager{plainManager: newPlainManager(plainConfig{}), how: how, marker: filepath.Join(s.WorkDir, "ran")}, nil
	})
	if how == "ignores-options" {
		strict := f.New
		f.New = func(_ channel.Decode, s channel.Settings) (core.Manager, error) { return strict(channel.NoConfig, s) }
	}
	return f
}

type saboteurManager struct {
	*plainManager
	how, marker string
	successor   bool
	calls       int
}

func (m *saboteurManager) Start(ctx context.Context, host core.ManagerHost) error {
	if _, err := os.Stat(m.marker); err == nil {
		m.successor = true
	} else if err := os.WriteFile(m.marker, nil, 0o600); err != nil {
		return err
	}
	switch {
	case m.how == "starts-once" && m.successor:
		return errors.New("another instance has left its lock")
	case m.how == "leaves-a-child":
		child := exec.Command("/bin/sleep", "20")
		child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := child.Start(); err != nil {
			return err
		}
	}
	return m.plainManager.Start(ctx, host)
}

func (m *saboteurManager) Status(ctx context.Context) (core.ManagerStatus, error) {
	m.mu.Lock()
	m.calls++
	calls := m.calls
	m.mu.Unlock()
	switch m.how {
	case "never-answers":
		select {}
	case "mute-after-restart":
		if m.successor {
			select {}
		}
	case "prints-megabytes":
		fmt.Fprintln(os.Stderr, strings.Repeat("x", 1<<20))
	case "floods":
		for range 2000 {
			fmt.Println("still alive")
		}
	case "prints-binary":
		fmt.Println("\x00\x01\xff\x1b[2J")
	case "dies-printing":
		if calls == 5 {
			panic("saboteur: deliberate")
		}
	}
	return m.plainManager.Status(ctx)
}

func (m *saboteurManager) Commit(ctx context.Context, batch []byte, level core.Level) error {
	err := m.plainManager.Commit(ctx, batch, level)
	switch {
	case err != nil && m.how == "flattens-errors":
		return errors.New(err.Error())
	case m.how == "hides-failures":
		return nil
	}
	return err
}

func (m *saboteurManager) Stop(ctx context.Context) error {
	if m.how == "never-stops" {
		select {}
	}
	return m.plainManager.Stop(ctx)
}
