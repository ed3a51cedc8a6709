package persistent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

// Config is what a user can set.
type Config struct {
	stored.Config `yaml:",inline"`
	// Store says where sessions are kept: file, sqlite or postgres.
	Store string `yaml:"store"`
	// Directory is the folder of the file store; a relative one is below the
	// working folder of the node.
	Directory string `yaml:"directory"`
	// Sync lets every write of the file store reach the disk before it counts.
	Sync bool `yaml:"sync"`
	// Secret authenticates the files; without it the folder has a key of its
	// own. All nodes need the same.
	Secret secret.Text `yaml:"secret"`
	// File is the database of the sqlite store.
	File string `yaml:"file"`
	// DSN says where the database of the postgres store is, as a URL or as
	// words; it may hold a password, or Password is added to it.
	DSN      secret.Text `yaml:"dsn"`
	Password secret.Text `yaml:"password"`
	// Table is the table of the sqlite and postgres stores.
	Table string `yaml:"table"`
}

// Default returns the defaults.
func Default() Config {
	return Config{Config: stored.Defaults(), Store: "file", Directory: "sessions", Sync: true, File: "sessions.db", Table: "longhouse_sessions"}
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	errs := []error{c.Config.Validate()}
	switch c.Store {
	case "file":
		if c.Directory == "" {
			errs = append(errs, errors.New("directory: the file store needs a folder"))
		}
	case "sqlite":
		if c.File == "" {
			errs = append(errs, errors.New("file: the sqlite store needs a file"))
		}
	case "postgres":
		if c.DSN.IsZero() {
			errs = append(errs, errors.New("dsn: the postgres store needs one, for example postgres://user@host/database"))
		}
	default:
		errs = append(errs, fmt.Errorf("store: %q is not known (file, sqlite, postgres)", c.Store))
	}
	if !tableName.MatchString(c.Table) {
		errs = append(errs, fmt.Errorf("table: %q must be letters, digits and underscores, 48 at most", c.Table))
	}
	return errors.Join(errs...)
}

// tableName is what goes into statements as it is.
var tableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,47}$`)

// Factory makes the manager "persistent".
var Factory = stored.FactoryOf("persistent", Default(), func(c *Config) *stored.Config { return &c.Config }, Open)

// Open returns the store of a configuration.
func Open(c Config, s channel.Settings) (core.Store, error) {
	switch c.Store {
	case "sqlite":
		return NewSQLite(s.Path(c.File), c.Table)
	case "postgres":
		return NewPostgres(c.DSN.Reveal(), c.Password.Reveal(), c.Table, c.Parallel)
	}
	dir, err := filepath.Abs(s.Path(c.Directory))
	if err != nil {
		return nil, fmt.Errorf("persistent: directory: %w", err)
	}
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return nil, fmt.Errorf("persistent: directory: %s is no folder", dir)
	}
	return NewFileStore(dir, []byte(c.Secret.Reveal()), c.Sync), nil
}
