package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/core"
)

// patience bounds every wait for a process.
const patience = 2 * time.Minute

// node is a running Longhouse node.
type node struct {
	cmd   *exec.Cmd
	stop  func()
	http  string
	admin string
}

// cluster is a group of nodes that find each other and nobody else.
type cluster struct {
	args  []string
	nodes []*node
}

// newCluster prepares a group; args are further --set of all its nodes.
func newCluster(args ...string) *cluster {
	c := &cluster{args: []string{
		"run", "--announce", "--set", "admin.address=127.0.0.1:0", "--set", "connectors[0].address=127.0.0.1:0",
		"--set", "log.level=warn", "--set", "cluster.channel.membership.port=" + freePort("udp"),
	}}
	if *sets != "" {
		args = append(args, list(*sets)...)
	}
	for _, a := range args {
		c.args = append(c.args, "--set", a)
	}
	return c
}

// start starts a node, which need not be ready yet.
func (c *cluster) start(args ...string) *node {
	all := append([]string{}, c.args...)
	for _, a := range append(args, fmt.Sprintf("engine.route=n%d", len(c.nodes))) {
		all = append(all, "--set", a)
	}
	var said struct {
		HTTP  []string
		Admin string
	}
	n := &node{cmd: exec.Command(*binary, all...)}
	n.stop = start(n.cmd, &said)
	n.http, n.admin = said.HTTP[0], said.Admin
	c.nodes = append(c.nodes, n)
	return n
}

// together waits until all nodes are ready and know all.
func (c *cluster) together() {
	for _, n := range c.nodes {
		n.ready()
		await("the nodes do not find each other", func() bool {
			var members []any
			return n.ask("/v1/members", &members) && len(members) == len(c.nodes)
		})
	}
}

func (c *cluster) stop() {
	for _, n := range c.nodes {
		n.stop()
	}
	c.nodes = nil
}

// ready waits for the node to be ready.
func (n *node) ready() {
	await("a node does not become ready", func() bool { return n.ask("/readyz", nil) })
}

// ask asks the admin API; false if the answer is not OK.
func (n *node) ask(path string, into any) bool {
	resp, err := http.Get("http://" + n.admin + path)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	if into == nil {
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode == http.StatusOK
	}
	return json.NewDecoder(resp.Body).Decode(into) == nil && resp.StatusCode == http.StatusOK
}

// manager returns the status of the node's manager.
func (n *node) manager() core.ManagerStatus {
	var r struct {
		Tables []struct{ Status core.ManagerStatus }
	}
	if !n.ask("/v1/sessions?limit=0", &r) || len(r.Tables) == 0 {
		fail(fmt.Errorf("%s does not tell about its sessions", n.admin))
	}
	return r.Tables[0].Status
}

// holds waits until the node's manager has that many sessions.
func (n *node) holds(count int) {
	await(fmt.Sprintf("not all of %d sessions have come", count), func() bool { return n.manager().Sessions >= count })
}

// plugin returns the status of the manager's process.
func (n *node) plugin() (p core.PluginStatus) {
	var all []core.PluginStatus
	n.ask("/v1/plugins", &all)
	for _, one := range all {
		if one.Kind == "manager" {
			p = one
		}
	}
	return p
}

// await waits for something that takes a moment.
func await(otherwise string, ok func() bool) {
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			fail(fmt.Errorf("%s within %v", otherwise, patience))
		}
	}
}

// start runs a command until the returned function is called; if said is set,
// the first line of its output is decoded into it, and the command ends by
// itself when its standard input does.
func start(c *exec.Cmd, said any) (stop func()) {
	c.Stderr = os.Stderr
	stdin, err := c.StdinPipe()
	check(err)
	out, err := c.StdoutPipe()
	check(err)
	check(c.Start())
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		stdin.Close()
		if said == nil {
			_ = c.Process.Kill()
		}
		_ = c.Wait()
	}
	bye = append(bye, stop)
	lines := bufio.NewReader(out)
	if said != nil {
		if err := json.NewDecoder(lines).Decode(said); err != nil {
			fail(fmt.Errorf("%s does not start: %w", c, err))
		}
	}
	go io.Copy(io.Discard, lines) //nolint:errcheck // ends with the process
	return stop
}

func freeAddr() string { return "127.0.0.1:" + freePort("tcp") }

// freePort returns a port that was free a moment ago.
func freePort(network string) string {
	var at net.Addr
	if network == "udp" {
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		check(err)
		defer c.Close()
		at = c.LocalAddr()
	} else {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		check(err)
		defer l.Close()
		at = l.Addr()
	}
	_, port, err := net.SplitHostPort(at.String())
	check(err)
	return port
}

// spent returns the processor time of a node and of its manager so far.
func (n *node) spent() (out [2]time.Duration) {
	for i, pid := range []int{n.cmd.Process.Pid, n.plugin().PID} {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, _ := strings.Cut(string(b), ") ")
		var user, system int64 // in hundredths of a second
		if fields := strings.Fields(rest); len(fields) > 12 {
			_, _ = fmt.Sscan(fields[11]+" "+fields[12], &user, &system)
		}
		out[i] = time.Duration(user+system) * 10 * time.Millisecond
	}
	return out
}

// resident returns the resident memory of a process in bytes.
func resident(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	kib := 0
	if _, rest, ok := strings.Cut(string(b), "VmRSS:"); ok {
		_, _ = fmt.Sscan(rest, &kib)
	}
	return kib << 10
}
