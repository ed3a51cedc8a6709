package persistent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

// Config is what a user can set.
type Config struct {
	stored.Config `yaml:",inline"`
	// Store says where sessions are kept: file.
	Store string `yaml:"store"`
	// Directory is the folder of the file store; a relative one is below the
	// working folder of the node.
	Directory string `yaml:"directory"`
	// Sync lets every write of the file store reach the disk before it counts.
	Sync bool `yaml:"sync"`
	// Secret authenticates the files; without it the folder has a key of its
	// own. All nodes need the same.
	Secret secret.Text `yaml:"secret"`
}

// Default returns the defaults.
func Default() Config {
	return Config{Config: stored.Defaults(), Store: "file", Directory: "sessions", Sync: true}
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	errs := []error{c.Config.Validate()}
	switch c.Store {
	case "file":
		if c.Directory == "" {
			errs = append(errs, errors.New("directory: the file store needs a folder"))
		}
	default:
		errs = append(errs, fmt.Errorf("store: %q is not known (file)", c.Store))
	}
	return errors.Join(errs...)
}

// Factory makes the manager "persistent".
var Factory = stored.FactoryOf("persistent", Default(), func(c *Config) *stored.Config { return &c.Config }, Open)

// Open returns the store of a configuration.
func Open(c Config, _ channel.Settings) (core.Store, error) {
	dir, err := filepath.Abs(c.Directory)
	if err != nil {
		return nil, fmt.Errorf("persistent: directory: %w", err)
	}
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return nil, fmt.Errorf("persistent: directory: %s is no folder", dir)
	}
	return NewFileStore(dir, []byte(c.Secret.Reveal()), c.Sync), nil
}
