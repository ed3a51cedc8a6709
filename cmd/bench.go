package cmd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/cmd/internal/bench"
)

func newBench(a *assembly) *cobra.Command {
	c := &cobra.Command{Use: "bench", Short: "Measure your own stack on your own machine"}
	c.AddCommand(newBenchChannel(a), newBenchAgent(a))
	return c
}

// channelBench are the flags of "bench channel".
type channelBench struct {
	options, stack          []string
	sizes, senders, members []int
	duration                time.Duration
	runs                    int
	config, jars            string
	raw, json               bool
}

func newBenchChannel(*assembly) *cobra.Command {
	var b channelBench
	c := &cobra.Command{
		Use:   "channel",
		Short: "Measure messages between nodes: throughput and latency",
		Long: `Measures messages from one node to others. Every node is a process of its own
on this machine, connected over 127.0.0.1; all processes share its processors:
compare ratios, not absolute numbers. Of several options, sizes, senders and
members all combinations are measured; numbers are medians of --runs.

msg/s counts deliveries at all receivers, until the last one. p50 and p99 are
those of the call that sends. "cpu" is the processor time of all nodes for one
delivery (Linux), "lost" what did not arrive. In the lines of the systems
compared with, "x" is how many times as fast Longhouse is, "p99 /" the 99th
percentile of Longhouse divided by theirs.

  none, async, ack, sync-ack   as of the channel's send options
  udp                          none, as one datagram
  rpc                          a request and its reply over the RPC channel
  echo                         a request and its reply as two messages`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return b.run(c) },
	}
	f := c.Flags()
	f.StringSliceVar(&b.options, "option", []string{"none", "ack", "sync-ack", "async"}, "ways of sending: "+strings.Join(bench.Options, ", "))
	f.IntSliceVar(&b.sizes, "size", []int{1024}, "sizes of a message, in bytes")
	f.IntSliceVar(&b.senders, "senders", []int{1}, "numbers of goroutines that send at the same time")
	f.IntSliceVar(&b.members, "members", []int{2}, "numbers of nodes, the sending one included")
	f.StringSliceVar(&b.stack, "stack", []string{"dispatch", "failuredetector"}, "interceptors with their defaults, nearest to the application first; \"\" for none")
	f.StringVarP(&b.config, "config", "c", "", "take the interceptors of this configuration instead")
	f.DurationVar(&b.duration, "duration", time.Second, "length of one measurement")
	f.IntVar(&b.runs, "runs", 3, "measurements of each kind")
	f.BoolVar(&b.raw, "raw", false, "measure plain TCP connections beside")
	f.StringVar(&b.jars, "tribes-jars", "", "measure Apache Tribes beside: the folder of its jars (needs a JDK)")
	f.BoolVar(&b.json, "json", false, "write a JSON document with all runs")
	return c
}

func (b *channelBench) validate() error {
	var errs []error
	for _, o := range b.options {
		if !slices.Contains(bench.Options, o) {
			errs = append(errs, fmt.Errorf("--option: %q is none of %s", o, strings.Join(bench.Options, ", ")))
		}
	}
	within := func(flag string, all []int, low, high int) {
		for _, n := range all {
			if n < low || n > high {
				errs = append(errs, fmt.Errorf("--%s: %d is outside %d..%d", flag, n, low, high))
			}
		}
	}
	within("size", b.sizes, 1, 32<<20)
	within("senders", b.senders, 1, 4096)
	within("members", b.members, 2, 32)
	within("runs", []int{b.runs}, 1, 1000)
	if b.duration < 10*time.Millisecond || b.duration > time.Hour {
		errs = append(errs, fmt.Errorf("--duration: %v is outside 10ms..1h", b.duration))
	}
	return errors.Join(errs...)
}

func (b *channelBench) run(c *cobra.Command) error {
	if err := b.validate(); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	agent := func(args ...string) func(int) *exec.Cmd {
		return func(int) *exec.Cmd { return exec.Command(exe, append([]string{"bench", "agent"}, args...)...) }
	}
	systems := []bench.System{{Name: "longhouse", Command: agent("--stack", strings.Join(b.stack, ","), "--config", b.config)}}
	if b.jars != "" {
		work, err := os.MkdirTemp("", "longhouse-bench-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(work)
		tribes, err := bench.Tribes(c.Context(), b.jars, work)
		if err != nil {
			return err
		}
		systems = append(systems, tribes)
	}
	if b.raw {
		systems = append(systems, bench.System{Name: bench.Raw, Command: agent("--raw")})
	}
	plan := bench.Plan{
		Systems: systems, Cells: bench.Cells(b.options, b.sizes, b.senders, b.members), Duration: b.duration, Runs: b.runs,
		Progress: func(format string, args ...any) { fmt.Fprintf(c.ErrOrStderr(), format+"\n", args...) },
	}
	results, err := plan.Do(c.Context())
	if err != nil {
		return err
	}
	if b.json {
		return bench.JSON(c.OutOrStdout(), results)
	}
	return bench.Text(c.OutOrStdout(), results)
}

// newBenchAgent is a node that is measured, see package bench.
func newBenchAgent(a *assembly) *cobra.Command {
	var raw bool
	var stack []string
	var file string
	c := &cobra.Command{
		Use:    "agent",
		Short:  "Run a node to be measured; \"bench channel\" starts this itself",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(c *cobra.Command, _ []string) error {
			if raw {
				return bench.ServeRaw(c.InOrStdin(), c.OutOrStdout())
			}
			log := zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(zap.NewDevelopmentEncoderConfig()), zapcore.Lock(os.Stderr), zap.WarnLevel))
			return bench.ServeNode(c.InOrStdin(), c.OutOrStdout(), bench.Node{
				Layers: func(s channel.Settings) ([]channel.Layer, error) { return a.benchLayers(c.Context(), stack, file, s) },
				Log:    log,
			})
		},
	}
	c.Flags().BoolVar(&raw, "raw", false, "plain TCP")
	c.Flags().StringSliceVar(&stack, "stack", nil, "interceptors")
	c.Flags().StringVar(&file, "config", "", "configuration")
	return c
}

// benchLayers makes the interceptors of a configuration, or those named.
func (a *assembly) benchLayers(_ context.Context, names []string, file string, s channel.Settings) ([]channel.Layer, error) {
	known, err := channel.NewRegistry("interceptor", a.interceptors...)
	if err != nil {
		return nil, err
	}
	type entry struct {
		name, origin string
		decode       channel.Decode
	}
	var list []entry
	if file == "" {
		for _, n := range names {
			list = append(list, entry{n, "--stack", channel.NoConfig})
		}
	} else {
		cfg, err := load(file, nil)
		if err != nil {
			return nil, err
		}
		if cfg.Cluster == nil {
			return nil, fmt.Errorf("%s configures no cluster", file)
		}
		cfg.Normalize()
		for _, x := range cfg.Cluster.Channel.Interceptors {
			list = append(list, entry{x.Use, x.Pos.String(), x.Decode})
		}
	}
	var layers []channel.Layer
	for _, e := range list {
		f, err := known.Get(e.name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.origin, err)
		}
		own := s
		own.Name, own.Logger = e.name, s.Logger.Named(e.name)
		i, err := f.New(e.decode, own)
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", e.origin, e.name, err)
		}
		layers = append(layers, channel.Layer{Interceptor: i, Origin: e.origin})
	}
	return layers, nil
}
