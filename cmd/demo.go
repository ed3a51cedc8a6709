package cmd

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// maxDemoNodes bounds the demo to what a laptop carries: each node is four
// processes.
const maxDemoNodes = 16

// startTimeout is how long a node of the demo may take to start.
const startTimeout = 30 * time.Second

func newDemo(*assembly) *cobra.Command {
	d := &demoCluster{}
	c := &cobra.Command{
		Use:   "demo",
		Short: "Run a whole cluster on this machine, with a balancer in front",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			d.out, d.err = c.OutOrStdout(), c.ErrOrStderr()
			return d.run(c.Context())
		},
	}
	f := c.Flags()
	f.IntVar(&d.nodes, "nodes", 3, "number of nodes")
	f.StringVar(&d.listen, "listen", "127.0.0.1:8080", "address of the balancer; the next free port is taken")
	f.DurationVar(&d.killAfter, "kill-after", 0, "kill -9 the first node after this time, to watch the failover")
	f.StringVar(&d.send, "send", "async", "what a request waits for: async, ack or sync")
	f.StringVar(&d.logLevel, "log-level", "warn", "log level of the nodes")
	return c
}

type demoCluster struct {
	nodes     int
	listen    string
	killAfter time.Duration
	send      string
	logLevel  string
	out, err  io.Writer
}

// demoNode is one child process.
type demoNode struct {
	route string
	cmd   *exec.Cmd
	stdin io.Closer
	said  announcement
	gone  chan struct{} // closed when the process has ended
}

func (d *demoCluster) run(ctx context.Context) error {
	if d.nodes < 1 || d.nodes > maxDemoNodes {
		return fmt.Errorf("--nodes must be 1 to %d", maxDemoNodes)
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "longhouse-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	group, err := freeUDPPort()
	if err != nil {
		return err
	}

	routes := make([]string, d.nodes)
	for i := range routes {
		routes[i] = "node" + strconv.Itoa(i+1)
	}
	b := newBalancer(routes)
	ln, err := listenNext(d.listen)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: b, ReadHeaderTimeout: 10 * time.Second}
	defer srv.Close()
	go srv.Serve(ln) //nolint:errcheck // ends with srv.Close

	nodes := make([]*demoNode, 0, d.nodes)
	defer func() {
		for _, n := range nodes {
			n.stdin.Close()
		}
		for _, n := range nodes {
			<-n.gone
		}
	}()
	for _, route := range routes {
		n, err := d.start(ctx, exe, dir, route, group)
		if err != nil {
			return fmt.Errorf("%s: %w", route, err)
		}
		nodes = append(nodes, n)
	}
	var watchers sync.WaitGroup
	defer watchers.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan *demoNode, len(nodes))
	for _, n := range nodes {
		b.set(n.route, n.said.HTTP[0])
		watchers.Go(func() { b.watch(ctx, n.route, &url.URL{Scheme: "http", Host: n.said.Admin}) })
		watchers.Go(func() {
			select {
			case <-n.gone:
				ended <- n
			case <-ctx.Done():
			}
		})
	}
	d.print(ln.Addr().String(), nodes)

	var kill <-chan time.Time
	if d.killAfter > 0 {
		timer := time.NewTimer(d.killAfter)
		defer timer.Stop()
		kill = timer.C
	}
	for running := len(nodes); ; {
		select {
		case <-ctx.Done():
			fmt.Fprintln(d.out, "stopping")
			return nil
		case <-kill:
			fmt.Fprintf(d.out, "killing %s (pid %d)\n", nodes[0].route, nodes[0].said.PID)
			_ = nodes[0].cmd.Process.Kill()
		case n := <-ended:
			b.markDown(n.route)
			running--
			fmt.Fprintf(d.out, "%s (pid %d) has died; its sessions go on elsewhere: reload the page\n", n.route, n.said.PID)
			if running == 0 {
				return errors.New("no node is left")
			}
		}
	}
}

func (d *demoCluster) print(addr string, nodes []*demoNode) {
	fmt.Fprintf(d.out, "\n  A cluster of %d nodes is running. Open the page, set an attribute, then kill the node that served you:\n\n", len(nodes))
	fmt.Fprintf(d.out, "      http://%s/\n\n", addr)
	for _, n := range nodes {
		fmt.Fprintf(d.out, "  %s  http://%s/  admin http://%s/v1/members  kill -9 %d\n", n.route, n.said.HTTP[0], n.said.Admin, n.said.PID)
	}
	fmt.Fprint(d.out, "\n  Ctrl-C stops everything.\n\n")
}

// start runs one node as a child process and waits until it serves.
func (d *demoCluster) start(ctx context.Context, exe, dir, route string, group int) (*demoNode, error) {
	sets := []string{
		"engine.route=" + route,
		"log.level=" + d.logLevel,
		"admin.address=127.0.0.1:0",
		"connectors[0].address=127.0.0.1:0",
		"node.work_dir=" + filepath.Join(dir, route),
		"cluster.send=" + d.send,
		"cluster.channel.membership.port=" + strconv.Itoa(group),
	}
	args := []string{"run", "--announce"}
	for _, s := range sets {
		args = append(args, "--set", s)
	}
	n := &demoNode{route: route, cmd: exec.Command(exe, args...), gone: make(chan struct{})}
	// An interrupt on the terminal is for us; the nodes stop when we close
	// their standard input, also if we are killed.
	ownGroup(n.cmd)
	n.cmd.Stderr = d.err
	stdin, err := n.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := n.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	n.stdin = stdin
	type result struct {
		said announcement
		err  error
	}
	first := make(chan result, 1)
	go func() {
		defer close(n.gone)
		var r result
		lines := bufio.NewReader(stdout)
		r.err = json.NewDecoder(io.LimitReader(lines, 64<<10)).Decode(&r.said)
		if r.err == nil && len(r.said.HTTP) == 0 {
			r.err = errors.New("the node has no connector")
		}
		first <- r
		_, _ = io.Copy(io.Discard, lines)
		_ = n.cmd.Wait() // how it ended is seen by its absence
	}()
	timer := time.NewTimer(startTimeout)
	defer timer.Stop()
	select {
	case r := <-first:
		n.said, err = r.said, r.err
	case <-timer.C:
		err = fmt.Errorf("did not start within %v", startTimeout)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		_ = n.cmd.Process.Kill()
		<-n.gone
		return nil, err
	}
	return n, nil
}

// listenNext listens on addr or, if its port is taken, on one of the next 100.
func listenNext(addr string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	first, err := strconv.Atoi(port)
	if err != nil {
		return nil, fmt.Errorf("port %q is not a number", port)
	}
	for p := first; ; p++ {
		ln, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(p)))
		if err == nil || p >= first+100 || !errors.Is(err, syscall.EADDRINUSE) {
			return ln, err
		}
	}
}

// freeUDPPort finds a port for the group, so that two demos do not meet.
func freeUDPPort() (int, error) {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).Port, nil
}
