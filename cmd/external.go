package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/longhouse-go/longhouse/plugins"
)

// pluginFlags choose the plugins that are programs of their own.
type pluginFlags struct {
	lock string
	dev  []string
}

func (f *pluginFlags) flags(c *cobra.Command) {
	c.Flags().StringVar(&f.lock, "plugins", "", "lock file with the plugins that may run (default: "+plugins.LockName+" beside the configuration, or in the working directory)")
}

func (f *pluginFlags) devFlag(c *cobra.Command) {
	c.Flags().StringArrayVar(&f.dev, "dev", nil, "also run plugins that nobody has pinned: a program, or all programs of a folder; for development")
}

// lockPath returns the lock file that counts for a configuration, "" if there is
// none.
func (f *pluginFlags) lockPath(config string) (string, error) {
	if f.lock != "" {
		return f.lock, nil // missing is an error
	}
	places := []string{plugins.LockName}
	if config != "" {
		places = []string{filepath.Join(filepath.Dir(config), plugins.LockName), plugins.LockName}
	}
	for _, path := range places {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("plugins: %w", err)
		}
	}
	return "", nil
}

// usePlugins makes the pinned plugins and those of --dev available to
// configurations. warn gets a line for each plugin that is not pinned.
func (a *assembly) usePlugins(ctx context.Context, f pluginFlags, config string, warn io.Writer) error {
	a.external, a.store = nil, ""
	lock, err := f.lockPath(config)
	if err != nil {
		return err
	}
	if lock != "" {
		l, err := plugins.ReadLock(lock)
		if err != nil {
			return err
		}
		store, err := filepath.Abs(plugins.StoreOf(lock)) // plugins are started in folders of their own
		if err != nil {
			return fmt.Errorf("plugins: %w", err)
		}
		a.external = l.External(store)
		if len(f.dev) == 0 {
			a.store = store // the copies are there already
		}
	}
	for _, path := range f.dev {
		programs, err := programsIn(path)
		if err != nil {
			return err
		}
		for _, program := range programs {
			if program, err = filepath.Abs(program); err != nil {
				return fmt.Errorf("--dev: %w", err)
			}
			list, err := plugins.Unpinned(ctx, program)
			if err != nil {
				return err
			}
			for _, e := range list {
				fmt.Fprintf(warn, "warning: the plugin %s/%s runs from %s without being pinned (--dev)\n", e.Kind, e.Name, program)
				a.external = slices.DeleteFunc(a.external, func(o plugins.External) bool { return o.Kind == e.Kind && o.Name == e.Name })
				a.external = append(a.external, e)
			}
		}
	}
	return nil
}

// programsIn returns the executable files of a folder, or path itself.
func programsIn(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("--dev: %w", err)
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, fmt.Errorf("--dev: %w", err)
	}
	var list []string
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			list = append(list, filepath.Join(path, e.Name()))
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("--dev: there is no program in %s", path)
	}
	return list, nil
}
