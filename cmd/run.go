package cmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/container"
)

// announcement is what a started node tells the program that started it.
type announcement struct {
	PID   int      `json:"pid"`
	HTTP  []string `json:"http"`
	Admin string   `json:"admin"`
}

func newRun(a *assembly) *cobra.Command {
	var (
		file     string
		set      []string
		lenient  bool
		announce bool
		ext      pluginFlags
	)
	c := &cobra.Command{
		Use:   "run",
		Short: "Run one node",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := load(file, set)
			if err != nil {
				return err
			}
			if err := a.usePlugins(c.Context(), ext, file, c.ErrOrStderr()); err != nil {
				return err
			}
			if err := a.admit(c, cfg, lenient); err != nil {
				return err
			}
			node, err := container.New(cfg, a.parts())
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(c.Context())
			defer cancel()
			if announce {
				go func() { // the parent keeps our standard input open as long as it lives
					_, _ = io.Copy(io.Discard, os.Stdin)
					cancel()
				}()
			}
			if err := node.Start(ctx); err != nil {
				return err
			}
			if announce {
				line := announcement{PID: os.Getpid(), HTTP: node.Addrs(), Admin: node.Admin()}
				if err := json.NewEncoder(c.OutOrStdout()).Encode(line); err != nil {
					cancel()
				}
			}
			a.reloadOnHangup(ctx, node, file, set, ext, lenient, c)
			orphan := false
			select {
			case <-ctx.Done():
				orphan = c.Context().Err() == nil // the parent has gone: nobody waits for a drain
			case <-node.DrainAsked():
			}
			if !orphan {
				hurry, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
				node.Drain(hurry) // a second signal ends it
				stop()
			}
			stopCtx, cancelStop := context.WithTimeout(context.Background(), cfg.Node.ShutdownTimeout)
			defer cancelStop()
			return node.Stop(stopCtx)
		},
	}
	configFlags(c, &file, &set)
	ext.flags(c)
	ext.devFlag(c)
	c.Flags().BoolVar(&lenient, "lenient", false, "run without the parts that are not available in this version")
	c.Flags().BoolVar(&announce, "announce", false, "print one line of JSON when started, and stop when standard input ends")
	_ = c.Flags().MarkHidden("announce")
	return c
}

// admit prints what is to be said about the configuration and refuses one that
// cannot run.
func (a *assembly) admit(c *cobra.Command, cfg *config.Config, lenient bool) error {
	ps := a.findings(c.Context(), cfg)
	printProblems(c.ErrOrStderr(), slices.DeleteFunc(slices.Clone(ps), func(p config.Problem) bool {
		return p.Severity == config.Note // for "check", not for every start
	}))
	if n := count(ps, config.Error); n > 0 {
		return fmt.Errorf("the configuration has %d errors", n)
	}
	if n := count(ps, config.Unavailable); n > 0 && !lenient {
		return fmt.Errorf("the configuration needs %d things that are not available in this version; --lenient runs the rest", n)
	}
	return nil
}

// reloadOnHangup reads the configuration again on SIGHUP, until ctx ends. A
// configuration that cannot run changes nothing.
func (a *assembly) reloadOnHangup(ctx context.Context, node *container.Node, file string, set []string, ext pluginFlags, lenient bool, c *cobra.Command) {
	read := func() (*config.Config, error) {
		if file == "" {
			return nil, errors.New("the node runs its built-in configuration: there is no file to read again")
		}
		cfg, err := load(file, set)
		if err != nil {
			return nil, err
		}
		if err := a.usePlugins(ctx, ext, file, c.ErrOrStderr()); err != nil {
			return nil, err
		}
		return cfg, a.admit(c, cfg, lenient)
	}
	node.OnReload(read)
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	go func() {
		defer signal.Stop(hup)
		for {
			select {
			case <-ctx.Done():
				return
			case <-hup:
				_ = node.Reload(ctx) // it logs the outcome
			}
		}
	}()
}
