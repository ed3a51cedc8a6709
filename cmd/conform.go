package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
)

// conformOptions are the flags of everything that runs the suite.
type conformOptions struct {
	profiles, features, modes []string
	run, known, report, junit string
	artefacts, config         string
	component                 string
	strict, verbose           bool
	seed                      uint64
	repeat                    int
	slow                      float64
}

func (o *conformOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringSliceVar(&o.profiles, "profile", nil, "run only these profiles of those that apply")
	f.StringSliceVar(&o.features, "features", nil, "verify only these of the declared features")
	f.StringSliceVar(&o.modes, "mode", nil, "run only in these modes: direct, bridged, process")
	f.StringVar(&o.run, "run", "", "run only checks whose id matches this regular expression")
	f.StringVar(&o.known, "known-failing", "", "file with checks that are known to fail: id, date, reason")
	f.StringVar(&o.report, "report", "", "write the report as JSON to this file")
	f.StringVar(&o.junit, "junit", "", "write the report as JUnit XML to this file")
	f.StringVar(&o.artefacts, "artefacts", "", "keep what helps to understand failures in this directory")
	f.StringVar(&o.config, "options", "", "options of the subject, as YAML")
	f.StringVar(&o.component, "component", "", "of a program that has several: the one to test, KIND/NAME")
	f.BoolVar(&o.strict, "strict", false, "run what a subject should do, too, and require it")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "print every check")
	f.Uint64Var(&o.seed, "seed", 0, "repeat the run that printed this seed")
	f.IntVar(&o.repeat, "repeat", 1, "try every check so many times")
	f.Float64Var(&o.slow, "slow", 1, "multiply all time-outs")
}

// options returns what the flags mean to the suite.
func (o *conformOptions) options(out io.Writer) ([]conformance.Option, error) {
	if o.slow <= 0 {
		return nil, errors.New("--slow must be positive")
	}
	opts := []conformance.Option{
		conformance.Seed(o.seed), conformance.Repeat(o.repeat), conformance.Only(o.run), conformance.LogTo(out),
		conformance.KnownFailing(o.known), conformance.ReportTo(o.report), conformance.JUnitTo(o.junit), conformance.ArtefactsTo(o.artefacts),
	}
	if len(o.profiles) > 0 {
		opts = append(opts, conformance.Profile(o.profiles...))
	}
	if len(o.features) > 0 {
		opts = append(opts, conformance.Features(o.features...))
	}
	if len(o.modes) > 0 {
		modes := make([]core.PluginMode, len(o.modes))
		for i, m := range o.modes {
			modes[i] = core.PluginMode(m)
		}
		opts = append(opts, conformance.Modes(modes...))
	}
	if o.strict {
		opts = append(opts, conformance.Strict())
	}
	opts = append(opts, conformance.Progress(func(r conformance.Result) {
		if o.verbose || !r.OK() {
			fmt.Fprintf(out, "  %-6s %s (%s) %s\n", r.Result, r.ID, r.Mode, r.Message)
		}
	}))
	return append(opts, conformance.Slow(o.slow)), nil
}

// conform runs the suite on a subject.
func (o *conformOptions) conform(s conformance.Subject, out io.Writer) (*conformance.Report, int, error) {
	opts, err := o.options(out)
	if err != nil {
		return nil, 2, err
	}
	report, code := conformance.Main(s, opts...)
	return report, code, nil
}

func newConform(a *assembly) *cobra.Command {
	var o conformOptions
	var list bool
	var scenario string
	c := &cobra.Command{
		Use:   "conform TARGET",
		Short: "Run the conformance suite on a plugin or a built-in component",
		Long: "Run the conformance suite on a plugin program, on a folder with a Go package of one, or on a\n" +
			"built-in component, KIND/NAME as in interceptor/dispatch. --list prints the checks, --scenario runs\n" +
			"a story of simulated nodes. Exit status 0: conformant, 1: not, 2: the suite could not run.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			out := c.OutOrStdout()
			code, err := 2, error(nil)
			switch {
			case list:
				listChecks(out, o.profiles)
				return nil
			case scenario != "":
				code, err = a.runScenario(scenario, out)
			case len(args) == 0:
				err = errors.New("what is to be tested? name a program, a folder with a Go package, or a built-in component")
			default:
				code, err = a.conformTarget(c.Context(), args[0], o, out)
			}
			if err != nil {
				fmt.Fprintln(c.ErrOrStderr(), "longhouse: conform:", err)
			}
			if code != 0 {
				return exitError(code)
			}
			return nil
		},
	}
	o.flags(c)
	c.Flags().BoolVar(&list, "list", false, "list the checks and what they require")
	c.Flags().StringVar(&scenario, "scenario", "", "run this scenario file, in virtual time, instead of the suite")
	return c
}

func (a *assembly) conformTarget(ctx context.Context, target string, o conformOptions, out io.Writer) (int, error) {
	if s, ok := a.builtin(target, o.config); ok {
		_, code, err := o.conform(s, out)
		return code, err
	}
	if _, err := os.Stat(target); err != nil {
		return 2, fmt.Errorf("%s is neither a file nor a built-in component (those are: %s)", target, strings.Join(a.builtins(), ", "))
	}
	program, cleanup, err := buildOrTake(ctx, out, target)
	if err != nil {
		return 2, err
	}
	defer cleanup()
	_, code, err := conformProgram(ctx, program, o, out)
	return code, err
}

// builtins lists the components that conform knows by name.
func (a *assembly) builtins() []string {
	var ids []string
	for _, f := range a.interceptors {
		ids = append(ids, "interceptor/"+f.Name)
	}
	for _, f := range a.valves {
		ids = append(ids, "valve/"+f.Name)
	}
	slices.Sort(ids)
	return ids
}

// builtin returns the subject of a compiled-in component.
func (a *assembly) builtin(id, options string) (conformance.Subject, bool) {
	kind, name, _ := strings.Cut(id, "/")
	switch kind {
	case "interceptor":
		for _, f := range a.interceptors {
			if f.Name == name {
				return conformance.InterceptorOf(f, options), true
			}
		}
	case "valve":
		for _, f := range a.valves {
			if f.Name == name {
				return conformance.ValveOf(f, options), true
			}
		}
	}
	return nil, false
}

// runScenario runs a scenario file with the compiled-in components.
func (a *assembly) runScenario(file string, out io.Writer) (int, error) {
	text, err := config.ReadFile(file)
	if err != nil {
		return 2, err
	}
	s, err := conformance.ReadScenario(file, text)
	if err != nil {
		return 2, err
	}
	_, code := conformance.MainScenario(s, conformance.ScenarioParts{Interceptors: a.interceptors, Memberships: a.memberships}, out)
	return code, nil
}

func listChecks(out io.Writer, profiles []string) {
	n := 0
	for _, c := range conformance.Builtin().Checks() {
		if len(profiles) > 0 && !slices.Contains(profiles, c.Profile) {
			continue
		}
		n++
		features := ""
		if len(c.Features) > 0 {
			features = ", if declared: " + strings.Join(c.Features, ", ")
		}
		fmt.Fprintf(out, "%s (%s%s)\n    %s\n    source: %s\n", c.ID, c.Level, features, c.Requirement, c.Source)
	}
	fmt.Fprintf(out, "%d checks, suite %s\n", n, conformance.SuiteVersion)
}
