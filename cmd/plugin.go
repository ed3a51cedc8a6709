package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/longhouse-go/longhouse/cmd/internal/scaffold"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins"
	"github.com/longhouse-go/longhouse/plugins/sdk"
)

func newPlugin(a *assembly) *cobra.Command {
	c := &cobra.Command{
		Use:   "plugin",
		Short: "Write, pin and check plugins",
	}
	serve := &cobra.Command{
		Use:   "serve KIND/NAME",
		Short: "Serve a built-in plugin; a node starts this itself",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := sdk.Serve(args[0], sdk.Set{Managers: a.managers, Memberships: a.memberships, Deployers: a.deployers}); err != nil {
				return fmt.Errorf("plugin serve %s: %w", args[0], err)
			}
			return nil
		},
	}
	c.AddCommand(newPluginNew(), newPluginAdd(), newPluginList(), newPluginVerify(), newPluginRemove(), serve)
	return c
}

func newPluginNew() *cobra.Command {
	var o scaffold.Options
	c := &cobra.Command{
		Use:   "new KIND VENDOR/NAME",
		Short: "Begin a plugin: a folder that compiles and whose tests pass",
		Long: "Begin a plugin: a folder that compiles and whose tests, the conformance suite among them, pass.\n" +
			"It is written into the working directory if that is empty, else into a new folder of the\n" +
			"plugin's name. Kinds: " + strings.Join(scaffold.Kinds(), ", ") + ".",
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			o.Kind, o.Name = args[0], args[1]
			if err := findLonghouse(&o); err != nil {
				return err
			}
			_, base, _ := strings.Cut(o.Name, "/")
			if o.Dir == "" {
				if o.Dir = "."; !emptyDir(".") {
					o.Dir = base
				}
			}
			files, err := scaffold.Write(o)
			if err != nil {
				return err
			}
			out := c.OutOrStdout()
			for _, f := range files {
				fmt.Fprintln(out, "wrote", filepath.Join(o.Dir, f))
			}
			fmt.Fprintln(out, "\nnext:")
			if o.Dir != "." {
				fmt.Fprintln(out, "  cd", o.Dir)
			}
			if o.Source == "" {
				fmt.Fprintln(out, "  go mod tidy")
			}
			fmt.Fprintln(out, "  go test ./...")
			if o.Kind == "valve" {
				fmt.Fprintf(out, "  go run ./cmd/%s run\n", base)
			} else {
				fmt.Fprintf(out, "  longhouse plugin add ./cmd/%s\n", base)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&o.Style, "style", "", "of an interceptor: transform (two functions; the default) or handlers (methods that pass messages on)")
	f.StringVar(&o.Dir, "dir", "", "folder to write to")
	f.StringVar(&o.Module, "module", "", "path of the Go module (default example.com/VENDOR/NAME)")
	f.StringVar(&o.Source, "replace", "", "folder with the source of longhouse that the module refers to (default: what this program was built from)")
	return c
}

func emptyDir(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) == 0
}

// released is a version that is not made from a checkout.
var released = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+$`)

// findLonghouse decides what the new module requires: the source that the user
// names, a published version that this program is, or the source that it was
// built from.
func findLonghouse(o *scaffold.Options) error {
	if o.Source != "" {
		return nil
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range append([]*debug.Module{&info.Main}, info.Deps...) {
			if m.Path == scaffold.Longhouse && m.Replace == nil && released.MatchString(m.Version) {
				o.Version = m.Version
				return nil
			}
		}
	}
	_, file, _, _ := runtime.Caller(0)
	if dir, ok := scaffold.FindSource(file); ok {
		o.Source = dir
		return nil
	}
	return errors.New("plugin new: the source of longhouse that this program was built from is not known or not there any more: name it with --replace DIR, the folder of a clone")
}

// lockFlag adds the flag that chooses the lock file.
func lockFlag(c *cobra.Command, path *string) {
	c.Flags().StringVar(path, "lock", plugins.LockName, "lock file; the programs are kept in .longhouse/plugins beside it")
}

// readLock reads a lock file; one that is not there is empty.
func readLock(path string) (*plugins.Lock, error) {
	l, err := plugins.ReadLock(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &plugins.Lock{}, nil
	}
	return l, err
}

func newPluginAdd() *cobra.Command {
	var lock string
	var o conformOptions
	var noConform bool
	c := &cobra.Command{
		Use:   "add PROGRAM|PACKAGE-DIR",
		Short: "Build or copy a plugin, run the conformance suite on it, and pin it",
		Long: "Build a Go package or take a program, ask it what it is, run the conformance suite on it as a\n" +
			"process, and pin it: its digest, its answers and the outcome are written to the lock file, and a\n" +
			"copy of the program beside it. A node runs only programs of its lock, and only those copies.\n" +
			"A plugin that is not conformant is not pinned.",
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			l, err := readLock(lock)
			if err != nil {
				return err
			}
			out := c.OutOrStdout()
			program, cleanup, err := buildOrTake(c.Context(), out, args[0])
			if err != nil {
				return err
			}
			defer cleanup()
			return addPlugin(c.Context(), out, l, lock, program, o, noConform)
		},
	}
	lockFlag(c, &lock)
	o.flags(c)
	c.Flags().BoolVar(&noConform, "no-conform", false, "pin without running the conformance suite; the lock says so")
	return c
}

// addPlugin keeps, describes, tries and pins a program.
func addPlugin(ctx context.Context, out io.Writer, l *plugins.Lock, lock, program string, o conformOptions, noConform bool) (err error) {
	store := plugins.StoreOf(lock)
	// What is replaced now stays until the next time: nodes may still run it.
	if _, err := l.Prune(store); err != nil {
		return err
	}
	sum, size, err := plugins.Keep(store, program)
	if err != nil {
		return err
	}
	defer func() {
		if _, pinned := l.Program(sum); err != nil && !pinned { // it must not stay behind
			err = errors.Join(err, os.Remove(filepath.Join(store, sum)))
		}
	}()
	kept := filepath.Join(store, sum)
	descriptions, err := plugins.DescribeProgram(ctx, kept)
	if err != nil {
		return err
	}
	for _, d := range descriptions {
		fmt.Fprintf(out, "described  %s %s %s, API %v\n", d.Kind, d.Name, d.Version, d.API)
	}
	summaries := map[string]plugins.Summary{}
	if noConform {
		fmt.Fprintln(out, "not tried  the conformance suite was skipped, and the lock says so")
	} else {
		reports, code, err := conformProgram(ctx, kept, o, out)
		if err != nil {
			return fmt.Errorf("plugin add: %w; --no-conform pins without the suite", err)
		}
		if code != 0 {
			return fmt.Errorf("plugin add: %s is %s and was not pinned; \"longhouse conform\" repeats the checks, --no-conform pins it nevertheless", program, [...]string{1: "not conformant", 2: "a program that the suite could not run"}[code])
		}
		for _, r := range reports {
			summaries[r.Subject.Kind+"/"+r.Subject.Name] = summarize(r)
		}
	}
	for _, d := range descriptions {
		summary, tried := summaries[d.Kind+"/"+d.Name]
		if !tried {
			summary = plugins.Summary{Result: plugins.NotTried, Suite: conformance.SuiteVersion, Date: time.Now().UTC().Format(time.DateOnly)}
		}
		old, replaced, err := l.Put(plugins.Locked{
			Kind: d.Kind, Name: d.Name, Version: d.Version, API: d.API, SHA256: sum, Size: size, Describe: d, Conformance: summary,
		})
		if err != nil {
			return err
		}
		verb := "pinned    "
		if replaced {
			verb = "replaced  "
		}
		fmt.Fprintf(out, "%s %s/%s %s in %s, sha256 %s\n", verb, d.Kind, d.Name, d.Version, lock, sum)
		if replaced && old.SHA256 != sum {
			fmt.Fprintf(out, "           was %s, sha256 %s\n", old.Version, old.SHA256)
		}
	}
	if err := l.Write(lock); err != nil {
		return err
	}
	for _, d := range descriptions {
		if use := usage(d); use != "" {
			fmt.Fprintln(out, "\nto use it:\n\n"+use)
		}
	}
	return nil
}

// usage says what to write into a configuration.
func usage(d plugins.Description) string {
	return map[string]string{
		plugins.KindManager:    "  cluster:\n    manager: " + d.Name,
		plugins.KindMembership: "  cluster:\n    channel:\n      membership: " + d.Name,
		plugins.KindDeployer:   "  cluster:\n    deployer: " + d.Name,
		"interceptor":          "  cluster:\n    channel:\n      interceptors:\n        - use: " + d.Name,
	}[d.Kind]
}

// summarize keeps of a report what belongs into a lock.
func summarize(r *conformance.Report) plugins.Summary {
	s := plugins.Summary{Result: string(conformance.Conformant), Suite: r.Suite.Version, Date: r.Date.Format(time.DateOnly)}
	for _, p := range r.Profiles {
		if p.Result != conformance.Conformant {
			s.Result = string(p.Result)
		}
		s.Profiles = append(s.Profiles, plugins.ProfileSummary{
			Profile: p.Name, Result: string(p.Result),
			Passed: p.Core.Passed + p.Extended.Passed, Failed: p.Core.Failed + p.Extended.Failed, Skipped: len(p.Core.Skipped) + len(p.Extended.Skipped),
		})
	}
	return s
}

// buildOrTake returns a program: path itself, or what the Go package in it
// becomes. cleanup removes what was built.
func buildOrTake(ctx context.Context, out io.Writer, path string) (program string, cleanup func(), err error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", nil, fmt.Errorf("plugin: %w", err)
	}
	if !info.IsDir() {
		return path, func() {}, nil
	}
	if sources, _ := filepath.Glob(filepath.Join(path, "*.go")); len(sources) == 0 {
		return "", nil, fmt.Errorf("plugin: %s is neither a program nor a Go package%s", path, commandsIn(path))
	}
	dir, err := os.MkdirTemp("", "longhouse-build-")
	if err != nil {
		return "", nil, fmt.Errorf("plugin: %w", err)
	}
	program, cleanup = filepath.Join(dir, "plugin"), func() { _ = os.RemoveAll(dir) } // a leftover in the temporary directory harms nobody
	start := time.Now()
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", program, ".")
	build.Dir = path
	if text, err := build.CombinedOutput(); err != nil {
		cleanup()
		return "", nil, fmt.Errorf("plugin: go build in %s: %w\n%s", path, err, text)
	}
	if info, err := os.Stat(program); err != nil || info.Mode()&0o100 == 0 {
		cleanup()
		return "", nil, fmt.Errorf("plugin: the package in %s is not a main package%s", path, commandsIn(path))
	}
	fmt.Fprintf(out, "built      %s in %v\n", path, time.Since(start).Round(10*time.Millisecond))
	return program, cleanup, nil
}

// commandsIn suggests the commands below a module's folder.
func commandsIn(dir string) string {
	mains, _ := filepath.Glob(filepath.Join(dir, "cmd", "*", "*.go"))
	if len(mains) == 0 {
		return ""
	}
	return "; did you mean " + filepath.Dir(mains[0]) + "?"
}

func newPluginList() *cobra.Command {
	var lock string
	c := &cobra.Command{
		Use:   "list",
		Short: "List what the lock file pins",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			l, err := plugins.ReadLock(lock)
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("there is no %s; \"longhouse plugin add\" makes it", lock)
			}
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
			fmt.Fprintln(w, "PLUGIN\tVERSION\tAPI\tSHA256\tCONFORMANCE\tSTORE")
			for _, p := range l.Plugins {
				state := "ok"
				if p.Verify(plugins.StoreOf(lock)) != nil {
					state = "NOT VERIFIED"
				}
				fmt.Fprintf(w, "%s\t%s\t%v\t%s…\t%s\t%s\n", p.ID(), p.Version, p.API, p.SHA256[:12], outcome(p.Conformance), state)
			}
			return w.Flush()
		},
	}
	lockFlag(c, &lock)
	return c
}

// outcome is a summary in a few words.
func outcome(s plugins.Summary) string {
	if s.Result == plugins.NotTried {
		return "not tried"
	}
	passed, total := 0, 0
	for _, p := range s.Profiles {
		passed += p.Passed
		total += p.Passed + p.Failed
	}
	return fmt.Sprintf("%s, %d of %d checks, %s", s.Result, passed, total, s.Date)
}

func newPluginVerify() *cobra.Command {
	var lock string
	c := &cobra.Command{
		Use:   "verify",
		Short: "Read all pinned programs again and compare them with the lock file",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			l, err := plugins.ReadLock(lock)
			if err != nil {
				return err
			}
			bad := 0
			for _, p := range l.Plugins {
				if err := p.Verify(plugins.StoreOf(lock)); err != nil {
					bad++
					fmt.Fprintf(c.OutOrStdout(), "%s: %v\n", p.ID(), err)
					continue
				}
				fmt.Fprintf(c.OutOrStdout(), "%s: ok\n", p.ID())
			}
			if bad > 0 {
				return fmt.Errorf("plugin verify: %d of %d plugins are not what was pinned; a node will not run them", bad, len(l.Plugins))
			}
			return nil
		},
	}
	lockFlag(c, &lock)
	return c
}

func newPluginRemove() *cobra.Command {
	var lock string
	c := &cobra.Command{
		Use:   "rm KIND/VENDOR/NAME",
		Short: "Take a plugin out of the lock file, and its program out of the store",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			l, err := plugins.ReadLock(lock)
			if err != nil {
				return err
			}
			id, err := pluginID(l, args[0])
			if err != nil {
				return err
			}
			l.Remove(id)
			if err := l.Write(lock); err != nil {
				return err
			}
			if _, err := l.Prune(plugins.StoreOf(lock)); err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "removed %s from %s\n", id, lock)
			return err
		},
	}
	lockFlag(c, &lock)
	return c
}

// pluginID finds the plugin that is meant: by its id, or by its name if only one
// kind has it.
func pluginID(l *plugins.Lock, word string) (string, error) {
	if _, ok := l.Get(word); ok {
		return word, nil
	}
	var ids, all []string
	for _, p := range l.Plugins {
		all = append(all, p.ID())
		if p.Name == word {
			ids = append(ids, p.ID())
		}
	}
	if len(ids) == 1 {
		return ids[0], nil
	}
	slices.Sort(all)
	return "", fmt.Errorf("plugin rm: %q is none of the pinned plugins, or more than one: %s", word, strings.Join(all, ", "))
}
