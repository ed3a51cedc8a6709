package cmd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/config/serverxml"
	"github.com/longhouse-go/longhouse/core/container"
)

// load reads a configuration of either kind and applies --set. Without a file it
// is the embedded default.
func load(file string, set []string) (*config.Config, error) {
	cfg := config.Default()
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("cannot read the configuration: %w", err)
		}
		if isXML(file, data) {
			cfg, err = serverxml.Read(file, data, serverxml.Options{})
		} else {
			cfg, err = config.Read(file, data)
		}
		if err != nil {
			return nil, err
		}
	}
	var errs []error
	for _, s := range set {
		path, value, ok := strings.Cut(s, "=")
		if !ok {
			errs = append(errs, fmt.Errorf("--set %s: want path=value", s))
			continue
		}
		if err := cfg.Set(path, value); err != nil {
			errs = append(errs, fmt.Errorf("--set %s: %w", s, err))
		}
	}
	return cfg, errors.Join(errs...)
}

func isXML(file string, data []byte) bool {
	trimmed := bytes.TrimLeft(bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")), " \t\r\n")
	return strings.EqualFold(filepath.Ext(file), ".xml") || bytes.HasPrefix(trimmed, []byte("<"))
}

// findings returns everything there is to say about a configuration, worst
// first, otherwise in the order of the file.
func (a *assembly) findings(ctx context.Context, cfg *config.Config) []config.Problem {
	cfg.Normalize()
	all := slices.Clone(cfg.Warnings)
	all = append(all, cfg.Validate()...)
	all = append(all, container.Check(ctx, cfg, a.parts())...)
	slices.SortStableFunc(all, func(x, y config.Problem) int {
		if x.Severity != y.Severity {
			return int(y.Severity) - int(x.Severity)
		}
		if x.Pos.File != y.Pos.File {
			return strings.Compare(x.Pos.File, y.Pos.File)
		}
		return x.Pos.Line - y.Pos.Line
	})
	return all
}

// count returns how many of the problems have that severity.
func count(ps []config.Problem, s config.Severity) int {
	n := 0
	for _, p := range ps {
		if p.Severity == s {
			n++
		}
	}
	return n
}

func printProblems(w io.Writer, ps []config.Problem) {
	for _, p := range ps {
		fmt.Fprintf(w, "%s: %s: %s\n", p.Pos, p.Severity, p.What)
		if p.Excerpt != "" {
			fmt.Fprintf(w, "    %s\n", strings.TrimSpace(p.Excerpt))
		}
		if p.Why != "" {
			fmt.Fprintf(w, "    why: %s\n", p.Why)
		}
		if p.Fix != "" {
			fmt.Fprintf(w, "    do:  %s\n", p.Fix)
		}
	}
}

func newCheck(a *assembly) *cobra.Command {
	var ext pluginFlags
	c := &cobra.Command{
		Use:   "check FILE...",
		Short: "Validate configurations (YAML or Tomcat XML) and explain what they promise",
		Long: "Validate configurations (YAML or Tomcat XML), list everything that is wrong, doubtful or not\n" +
			"available, and say in words what the configured cluster promises. Exit status 1 if one of the\n" +
			"files cannot run as it is. Options of plugins are checked against what plugins.lock says of them:\n" +
			"no program is run.",
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, files []string) error {
			out := c.OutOrStdout()
			bad := false
			for _, file := range files {
				fmt.Fprintf(out, "%s\n", file)
				cfg, err := load(file, nil)
				if err != nil {
					fmt.Fprintln(out, err)
					bad = true
					continue
				}
				a.idle = true
				if err := a.usePlugins(c.Context(), ext, file, out); err != nil {
					fmt.Fprintln(out, err)
					bad = true
					continue
				}
				for _, e := range a.external {
					if _, err := os.Stat(e.Path); err != nil {
						fmt.Fprintf(out, "warning: the program of %s/%s is not on this machine: %v\n", e.Kind, e.Name, err)
					}
				}
				ps := a.findings(c.Context(), cfg)
				printProblems(out, ps)
				errs, missing := count(ps, config.Error), count(ps, config.Unavailable)
				fmt.Fprintf(out, "%d errors, %d not available, %d warnings, %d notes\n",
					errs, missing, count(ps, config.Warning), count(ps, config.Note))
				switch {
				case errs > 0:
					bad = true
				case missing > 0:
					bad = true
					fmt.Fprintln(out, "runs without what is not available only with: longhouse run --lenient")
				}
				if errs == 0 {
					fmt.Fprintln(out, container.Guarantees(cfg))
				}
			}
			if bad {
				return exitError(1)
			}
			return nil
		},
	}
	ext.flags(c)
	return c
}

func newImport(a *assembly) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "import server.xml",
		Short: "Turn a Tomcat configuration into YAML",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			data, err := os.ReadFile(args[0])
			if err != nil {
				return fmt.Errorf("cannot read the configuration: %w", err)
			}
			cfg, err := serverxml.Read(args[0], data, serverxml.Options{})
			if err != nil {
				return err
			}
			printProblems(c.ErrOrStderr(), cfg.Warnings)
			yaml, err := config.Marshal(cfg)
			if err != nil {
				return err
			}
			if output == "" || output == "-" {
				_, err = c.OutOrStdout().Write(yaml)
				return err
			}
			return os.WriteFile(output, yaml, 0o600)
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "", "write to this file instead of standard output")
	return c
}

func newStack(a *assembly) *cobra.Command {
	var file string
	var set []string
	var ext pluginFlags
	c := &cobra.Command{
		Use:   "stack",
		Short: "Draw the configured stack and say what it promises",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := load(file, set)
			if err != nil {
				return err
			}
			a.idle = true
			if err := a.usePlugins(c.Context(), ext, file, c.ErrOrStderr()); err != nil {
				return err
			}
			cfg.Normalize()
			text, err := container.Explain(cfg, a.parts())
			if err != nil {
				return err
			}
			_, err = io.WriteString(c.OutOrStdout(), text)
			return err
		},
	}
	configFlags(c, &file, &set)
	ext.flags(c)
	return c
}

// configFlags adds the flags that choose a configuration.
func configFlags(c *cobra.Command, file *string, set *[]string) {
	c.Flags().StringVarP(file, "config", "c", "", "configuration: YAML, or Tomcat's server.xml (default: built in)")
	c.Flags().StringArrayVar(set, "set", nil, "change one value, `path=value`; may be repeated")
}
