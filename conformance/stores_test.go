package conformance_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins/manager/memcached"
	"github.com/longhouse-go/longhouse/plugins/manager/persistent"
	"github.com/longhouse-go/longhouse/plugins/manager/redis"
)

// server starts a server that listens on a free port of this machine, given to
// args, and returns its address. It ends with the test.
func server(t *testing.T, program, pack string, args func(port int) []string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		missing(t, program, pack)
	}
	return serve(t, func(port int) *exec.Cmd {
		cmd := exec.Command(path, args(port)...)
		cmd.Dir = t.TempDir()
		return cmd
	})
}

// missing skips a test that needs a program, or fails it where all programs
// should be.
func missing(t *testing.T, program, pack string) {
	t.Helper()
	if os.Getenv("LONGHOUSE_CI") != "" {
		t.Fatalf("%s is missing", program)
	}
	t.Skipf("needs %s: apt-get install %s", program, pack)
}

// serve starts a program that listens on the given port.
func serve(t *testing.T, command func(port int) *exec.Cmd) string {
	t.Helper()
	// Somebody else may take the port before the server does.
	for range 10 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		cmd := command(port)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { _ = cmd.Wait(); close(ended) }()
		t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
			if c, err := net.DialTimeout("tcp", addr, time.Second); err == nil {
				c.Close()
				return addr
			}
			select {
			case <-ended:
				deadline = time.Time{}
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	t.Fatal("the server does not start")
	return ""
}

func redisServer(t *testing.T) string {
	return server(t, "redis-server", "redis-server", func(port int) []string {
		return []string{"--port", fmt.Sprint(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"}
	})
}

func memcachedServer(t *testing.T) string {
	return server(t, "memcached", "memcached", func(port int) []string {
		return []string{"-l", "127.0.0.1", "-p", fmt.Sprint(port), "-U", "0", "-u", "root"}
	})
}

// postgresServer starts a database of its own, where everybody is trusted.
func postgresServer(t *testing.T) string {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		missing(t, "postgres", "postgresql")
	}
	bin := filepath.Dir(found[len(found)-1])
	dir, err := os.MkdirTemp("", "longhouse-postgres-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	attr := &syscall.SysProcAttr{}
	if os.Getuid() == 0 { // PostgreSQL does not run as root
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	data := filepath.Join(dir, "data")
	init := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "longhouse", "-A", "trust", "--no-sync")
	init.SysProcAttr, init.Dir = attr, dir
	if out, err := init.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	return serve(t, func(port int) *exec.Cmd {
		cmd := exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-h", "127.0.0.1", "-p", fmt.Sprint(port), "-k", dir, "-F")
		cmd.SysProcAttr, cmd.Dir = attr, dir
		return cmd
	})
}

// places are all places for sessions that come with Longhouse: how to make the
// options of their manager, and how to open the store.
var places = []struct {
	name     string
	manager  core.ManagerFactory
	features []string
	options  func(t *testing.T) string
	open     func(options string) (core.Store, error)
	virtual  bool
}{
	{
		"file", persistent.Factory, []string{conformance.FeatureListing, conformance.FeatureDurable},
		func(t *testing.T) string {
			return fmt.Sprintf("store: file\ndirectory: %q\nsync: false\n", filepath.Join(t.TempDir(), "sessions"))
		},
		openStore(persistent.Default(), persistent.Open),
		true,
	},
	{
		"sqlite", persistent.Factory, []string{conformance.FeatureListing, conformance.FeatureDurable},
		func(t *testing.T) string {
			return fmt.Sprintf("store: sqlite\nfile: %q\n", filepath.Join(t.TempDir(), "sessions.db"))
		},
		openStore(persistent.Default(), persistent.Open),
		false,
	},
	{
		"postgres", persistent.Factory, []string{conformance.FeatureListing, conformance.FeatureDurable},
		func(t *testing.T) string {
			return fmt.Sprintf("store: postgres\ndsn: %q\nparallel: 4\n", "postgres://longhouse@"+postgresServer(t)+"/postgres?sslmode=disable")
		},
		openStore(persistent.Default(), persistent.Open),
		false,
	},
	{
		"redis", redis.Factory, []string{conformance.FeatureListing, conformance.FeatureDurable},
		func(t *testing.T) string { return fmt.Sprintf("addresses: [%q]\n", redisServer(t)) },
		openStore(redis.Default(), func(c redis.Config, _ channel.Settings) (core.Store, error) { return redis.NewStore(c) }),
		false,
	},
	{
		"memcached", memcached.Factory, []string{conformance.FeatureDurable},
		func(t *testing.T) string { return fmt.Sprintf("nodes: [%q]\n", "n1:"+memcachedServer(t)) },
		openStore(memcached.Default(), func(c memcached.Config, s channel.Settings) (core.Store, error) { return memcached.NewStore(c, s) }),
		false,
	},
	{
		"memcached, three nodes", memcached.Factory, []string{conformance.FeatureDurable},
		func(t *testing.T) string {
			return fmt.Sprintf("nodes: [%q, %q, %q]\nfailover: [n3]\n", "n1:"+memcachedServer(t), "n2:"+memcachedServer(t), "n3:"+memcachedServer(t))
		},
		openStore(memcached.Default(), func(c memcached.Config, s channel.Settings) (core.Store, error) { return memcached.NewStore(c, s) }),
		false,
	},
}

// openStore returns a function that opens a store with options as YAML.
func openStore[C any](defaults C, open func(C, channel.Settings) (core.Store, error)) func(string) (core.Store, error) {
	f := channel.FactoryOf("store", defaults, open)
	return func(options string) (core.Store, error) {
		return f.New(func(into any) error { return config.Decode([]byte(options), "options", into) }, channel.Settings{})
	}
}

// The places pass the profile of stores.
func TestStores(t *testing.T) {
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) {
			options := p.options(t)
			conformance.Run(t, conformance.Store(p.name, func(*conformance.T) (core.Store, error) { return p.open(options) }, p.features...), conformance.Seed(1))
		})
	}
}

// The managers around those places that have no clock of their own, and so can
// live in virtual time, pass what every manager passes.
func TestStoreManagers(t *testing.T) {
	for _, p := range places {
		if p.virtual {
			t.Run(p.name, func(t *testing.T) {
				conformance.Run(t, conformance.ManagerOf(p.manager, p.options(t), deltaFeatures...), conformance.Seed(1))
			})
		}
	}
}
