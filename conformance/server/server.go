package server

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// startTimeout bounds the start of a server.
const startTimeout = 30 * time.Second

// Server is a running server. It ends with its test.
type Server struct {
	// Addr is where it listens, host:port.
	Addr    string
	t       testing.TB
	accepts func(port int) bool // nil: as soon as it listens
	command func(port int) *exec.Cmd
	port    int
	cmd     *exec.Cmd
	ended   chan struct{}
}

// Redis starts a Redis that keeps nothing on disk.
func Redis(t testing.TB) *Server {
	path := find(t, "redis-server", "redis-server")
	dir := t.TempDir()
	return start(t, nil, func(port int) *exec.Cmd {
		cmd := exec.Command(path, "--port", fmt.Sprint(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
		cmd.Dir = dir
		return cmd
	})
}

// Memcached starts a memcached.
func Memcached(t testing.TB) *Server {
	path := find(t, "memcached", "memcached")
	return start(t, nil, func(port int) *exec.Cmd {
		return exec.Command(path, "-l", "127.0.0.1", "-p", fmt.Sprint(port), "-U", "0", "-u", "root")
	})
}

// Postgres starts a PostgreSQL with a new database cluster, where everybody is
// trusted.
func Postgres(t testing.TB) *Server {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		missing(t, "postgres", "postgresql")
	}
	bin := filepath.Dir(found[len(found)-1])
	dir, err := os.MkdirTemp("", "longhouse-postgres-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	as := func(*exec.Cmd) {}
	if os.Getuid() == 0 { // PostgreSQL does not run as root
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		as = func(cmd *exec.Cmd) { runAs(cmd, uid, gid) }
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	data := filepath.Join(dir, "data")
	init := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "longhouse", "-A", "trust", "--no-sync")
	init.Dir = dir
	as(init)
	if out, err := init.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	accepts := func(port int) bool { // it listens before it does
		return exec.Command(filepath.Join(bin, "pg_isready"), "-h", "127.0.0.1", "-p", fmt.Sprint(port), "-q").Run() == nil
	}
	return start(t, accepts, func(port int) *exec.Cmd {
		cmd := exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-h", "127.0.0.1", "-p", fmt.Sprint(port), "-k", dir, "-F")
		cmd.Dir = dir
		as(cmd)
		return cmd
	})
}

// DSN is the URL of a PostgreSQL.
func (s *Server) DSN() string { return "postgres://longhouse@" + s.Addr + "/postgres?sslmode=disable" }

// find returns the path of a program.
func find(t testing.TB, program, pack string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		missing(t, program, pack)
	}
	return path
}

// missing skips a test that needs a program, or fails it where all programs
// should be.
func missing(t testing.TB, program, pack string) {
	t.Helper()
	if os.Getenv("LONGHOUSE_CI") != "" {
		t.Fatalf("%s is missing: apt-get install %s", program, pack)
	}
	t.Skipf("needs %s: apt-get install %s", program, pack)
}

// start starts a server on a free port.
func start(t testing.TB, accepts func(port int) bool, command func(port int) *exec.Cmd) *Server {
	t.Helper()
	s := &Server{t: t, accepts: accepts, command: command}
	t.Cleanup(s.Kill)
	// Somebody else may take the port before the server does.
	for range 10 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.port = l.Addr().(*net.TCPAddr).Port
		_ = l.Close()
		s.Addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port))
		if s.run() {
			return s
		}
	}
	t.Fatal("the server does not start")
	return nil
}

// run starts the process and reports whether it listens.
func (s *Server) run() bool {
	cmd := s.command(s.port)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	s.cmd, s.ended = cmd, ended
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); {
		if c, err := net.DialTimeout("tcp", s.Addr, time.Second); err == nil {
			_ = c.Close()
			if s.accepts == nil || s.accepts(s.port) {
				return true
			}
		}
		select {
		case <-ended:
			return false
		case <-time.After(10 * time.Millisecond):
		}
	}
	return false
}

// Kill ends the server at once. It does nothing if it does not run.
func (s *Server) Kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		<-s.ended
	}
}

// Restart starts a server again that was killed, on the same port and with what
// it has on disk.
func (s *Server) Restart() {
	s.t.Helper()
	// The helpers of a killed PostgreSQL take a moment to end, and one that is
	// started before does not run.
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); {
		if s.run() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.t.Fatalf("the server at %s does not start again", s.Addr)
}
