package cmd

import (
	"bufio"
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	runs     = flag.Int("runs", 2, "how often a node is killed in the failover tests")
	managers = flag.String("manager", "delta,backup", "which managers the failover tests run with, separated by commas")
	strict   = flag.Bool("strict", false, "hold the failover tests to the times of an idle machine")
	dice     = flag.Uint64("seed", 1, "decides which node is killed when")
	sessions = flag.Int("sessions", 3000, "how many sessions a joining node receives, and how many users a rolling restart has if it is given")
)

// The test binary is also the program under test: nodes are started by running
// it with a sub-command, and nodes start their plugins by running themselves.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{"run", "demo", "plugin", "bench"}, os.Args[1]) {
		var apps []Option // without any, hosts serve the demo
		if os.Getenv(testAppEnv) != "" {
			apps = append(apps, App(testPath, http.HandlerFunc(testApp)))
		}
		if file := os.Getenv(holdEnv); file != "" {
			apps = append(apps, App("/hold", holdApp(file)))
		}
		Main(apps...)
		return
	}
	os.Exit(m.Run())
}

// node is a real node in its own process.
type node struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.Closer
	announcement
	log  *tail
	dead chan struct{}
}

// tail keeps the last lines of a node's log for a failing test.
type tail struct {
	mu    sync.Mutex
	lines []string
}

func (l *tail) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, strings.TrimRight(string(p), "\n"))
	if len(l.lines) > 200 {
		l.lines = slices.Delete(l.lines, 0, 100)
	}
	return len(p), nil
}

func (l *tail) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

// group is a set of nodes that can find each other and nobody else.
type group struct {
	t    *testing.T
	port string
	exe  string // the program; default the test binary
	// place, if set, says where a node runs: the command before the program,
	// its address for clients and the one for other nodes.
	place func(route string) (command []string, clients, members string)
}

func newGroup(t *testing.T) *group {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes; run without -short")
	}
	p, err := freeUDPPort()
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort((&net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: p}).String())
	return &group{t: t, port: port}
}

// start starts a node and waits until it serves. args are further arguments of
// "longhouse run".
func (g *group) start(route string, args ...string) *node {
	g.t.Helper()
	clients, members := "127.0.0.1", "127.0.0.1"
	var command []string
	if g.place != nil {
		command, clients, members = g.place(route)
	}
	all := []string{"run", "--announce",
		"--set", "admin.address=" + clients + ":0",
		"--set", "connectors[0].address=" + clients + ":0",
		"--set", "cluster.channel.membership.port=" + g.port,
		"--set", "cluster.channel.membership.bind=" + members,
		"--set", "cluster.channel.receiver.address=" + members,
		"--set", "log.format=json",
	}
	if route != "" {
		all = append(all, "--set", "engine.route="+route)
	}
	exe, err := g.exe, error(nil)
	if exe == "" {
		exe, err = os.Executable()
	}
	if err != nil {
		g.t.Fatal(err)
	}
	command = slices.Concat(command, []string{exe}, all, args)
	n := &node{t: g.t, cmd: exec.Command(command[0], command[1:]...), log: &tail{}, dead: make(chan struct{})}
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	n.cmd.Stderr = n.log
	if n.stdin, err = n.cmd.StdinPipe(); err != nil {
		g.t.Fatal(err)
	}
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		g.t.Fatal(err)
	}
	if err := n.cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		n.stdin.Close()
		select {
		case <-n.dead:
		case <-time.After(20 * time.Second):
			g.t.Errorf("node %s does not stop; its log:\n%s", route, n.log)
			n.kill()
		}
		if g.t.Failed() {
			g.t.Logf("log of %s:\n%s", route, n.log)
		}
	})
	first := make(chan error, 1)
	go func() {
		defer close(n.dead)
		lines := bufio.NewReader(out)
		first <- json.NewDecoder(lines).Decode(&n.announcement)
		_, _ = io.Copy(io.Discard, lines)
		_ = n.cmd.Wait()
	}()
	select {
	case err = <-first:
	case <-time.After(30 * time.Second):
		err = os.ErrDeadlineExceeded
	}
	if err != nil {
		n.kill()
		g.t.Fatalf("node %s did not start: %v; its log:\n%s", route, err, n.log)
	}
	return n
}

// kill is kill -9.
func (n *node) kill() {
	_ = n.cmd.Process.Kill()
	<-n.dead
}

// get asks the admin API.
func (n *node) admin(path string, into any) int {
	n.t.Helper()
	resp, err := http.Get("http://" + n.Admin + path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	if into != nil {
		if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
			n.t.Fatalf("%s: %v", path, err)
		}
	}
	return resp.StatusCode
}

// eventually waits until ok, and fails with what was awaited after the time.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Since(start) > within {
			t.Fatalf("not within %v: %s", within, what)
		}
		<-tick.C
	}
	return time.Since(start)
}

func (n *node) awaitReady() {
	n.t.Helper()
	eventually(n.t, 30*time.Second, "ready", func() bool { return n.admin("/readyz", nil) == http.StatusOK })
}

func awaitMembers(count int, nodes ...*node) {
	for _, n := range nodes {
		n.t.Helper()
		eventually(n.t, 30*time.Second, "all members in the view", func() bool {
			var ms []json.RawMessage
			n.admin("/v1/members", &ms)
			return len(ms) == count
		})
		n.awaitReady()
	}
}

// client is one user with a cookie.
type client struct {
	http   *http.Client
	cookie string
}

func newClient(t *testing.T) *client {
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return &client{http: &http.Client{Transport: tr, Timeout: 10 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
}

// do sends a request to a node and keeps the cookie.
func (c *client) do(method string, n *node, path string) (int, string, error) {
	req, err := http.NewRequest(method, "http://"+n.HTTP[0]+path, nil)
	if err != nil {
		return 0, "", err
	}
	return c.send(req)
}

func (c *client) send(req *http.Request) (int, string, error) {
	if c.cookie != "" {
		req.Header.Set("Cookie", "JSESSIONID="+c.cookie)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	for _, k := range resp.Cookies() {
		if k.Name == "JSESSIONID" {
			c.cookie = k.Value
		}
	}
	return resp.StatusCode, string(body), err
}

// must is do that expects success.
func (c *client) must(t *testing.T, method string, n *node, path string) string {
	t.Helper()
	code, body, err := c.do(method, n, path)
	if err != nil || code != http.StatusOK && code != http.StatusSeeOther {
		t.Fatalf("%s %s: %d %v\n%s\nlog of the node:\n%s", method, path, code, err, body, n.log)
	}
	return body
}

// seed writes a configuration that a user had, kept by the importer's tests, to
// a file and returns its path.
func seed(t *testing.T, name string) string {
	t.Helper()
	archive, err := os.ReadFile(filepath.Join("..", "core", "config", "serverxml", "testdata", "seed-"+strings.TrimSuffix(name, ".xml")+".txtar"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(archive), "-- "+name+" --\n")
	text, _, ok2 := strings.Cut(rest, "\n-- ")
	if !ok || !ok2 {
		t.Fatalf("the archive of %s has another form than expected", name)
	}
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
