package watch

import (
	"errors"
	"fmt"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// Name is the name of the deployer in configuration.
const Name = "watch"

// Config is what a user says about the deployer.
type Config struct {
	// Dir is the folder to watch.
	Dir string `yaml:"dir"`
	// Host is the virtual host to deploy to; empty means the default host.
	Host string `yaml:"host"`
	// Scan is the time between looks at the folder. Changes that the operating
	// system reports are seen earlier.
	Scan time.Duration `yaml:"scan"`
	// Settle is how long a file must not have changed before it is taken up,
	// and how long it must be gone before it is taken out of service.
	Settle time.Duration `yaml:"settle"`
	// Grace is how long the files of a replaced version are kept for requests
	// that still use them.
	Grace time.Duration `yaml:"grace"`
	// ApplyTimeout bounds the time that the node may take to start a version.
	ApplyTimeout time.Duration `yaml:"apply_timeout"`
	// MaxSize bounds an archive, and every unpacked file, in bytes.
	MaxSize int64 `yaml:"max_size"`
	// MaxUnpacked bounds all files of an archive together, in bytes.
	MaxUnpacked int64 `yaml:"max_unpacked"`
	// MaxEntries bounds the entries of an archive.
	MaxEntries int `yaml:"max_entries"`
	// MaxArchives bounds the archives in the folder.
	MaxArchives int `yaml:"max_archives"`
}

// Default returns the defaults; Dir must be set by the user.
func Default() Config {
	return Config{
		Scan:         2 * time.Second,
		Settle:       500 * time.Millisecond,
		Grace:        30 * time.Second,
		ApplyTimeout: 5 * time.Minute,
		MaxSize:      512 << 20,
		MaxUnpacked:  2 << 30,
		MaxEntries:   20_000,
		MaxArchives:  1_000,
	}
}

// Validate reports all problems at once.
func (c *Config) Validate() error {
	var errs []error
	if c.Dir == "" {
		errs = append(errs, errors.New("dir: which folder to watch is not said"))
	}
	duration := func(name string, d, low, high time.Duration) {
		if d < low || d > high {
			errs = append(errs, fmt.Errorf("%s: %v is outside %v..%v", name, d, low, high))
		}
	}
	number := func(name string, n, low, high int64) {
		if n < low || n > high {
			errs = append(errs, fmt.Errorf("%s: %d is outside %d..%d", name, n, low, high))
		}
	}
	duration("scan", c.Scan, 10*time.Millisecond, time.Hour)
	duration("settle", c.Settle, 10*time.Millisecond, time.Hour)
	duration("grace", c.Grace, 0, 24*time.Hour)
	duration("apply_timeout", c.ApplyTimeout, time.Second, time.Hour)
	number("max_size", c.MaxSize, 1<<10, 1<<40)
	number("max_unpacked", c.MaxUnpacked, 1<<10, 1<<42)
	number("max_entries", int64(c.MaxEntries), 1, 1_000_000)
	number("max_archives", int64(c.MaxArchives), 1, 10_000)
	return errors.Join(errs...)
}

// Factory makes deployers from configuration.
var Factory = channel.FactoryOf(Name, Default(), func(c Config, s channel.Settings) (core.Deployer, error) { return New(c, s) })
