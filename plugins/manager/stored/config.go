package stored

import (
	"errors"
	"fmt"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
)

// What a waiting request gets when the store fails.
const (
	// Continue lets it go on: the change is written when the store is back, and
	// lost if this node dies before.
	Continue = "continue"
	// Fail refuses it.
	Fail = "fail"
)

// Config is what users can set for every manager around a store. Embed it in
// the configuration of a store (inline).
type Config struct {
	// OnFailure says what a request gets that waits for a store that fails:
	// continue or fail.
	OnFailure string `yaml:"on_failure" default:"continue" validate:"oneof=continue fail"`
	// Grace bounds how long a request waits for a store or a member that does
	// not answer.
	Grace time.Duration `yaml:"grace" default:"1s"`
	// Delay is how long a change at level async may wait for later ones of the
	// same session, so that they are written together.
	Delay time.Duration `yaml:"delay" default:"0s"`
	// Timeout bounds one call of the store.
	Timeout time.Duration `yaml:"timeout" default:"3s"`
	// Parallel is how many calls of the store run at the same time.
	Parallel int `yaml:"parallel" default:"16"`
	// MaxPending bounds the changes that wait to be written, in sessions.
	// Commits wait when it is reached.
	MaxPending int `yaml:"max_pending" default:"100000"`
	// RetryMin and RetryMax bound the pauses between attempts while the store
	// fails.
	RetryMin time.Duration `yaml:"retry_min" default:"50ms"`
	RetryMax time.Duration `yaml:"retry_max" default:"2s"`
	// TombstoneTTL is how long at least it is stored that a session has ended.
	TombstoneTTL time.Duration `yaml:"tombstone_ttl" default:"1h"`
	// ExpireSlack is how long after its time to live a session is stored.
	ExpireSlack time.Duration `yaml:"expire_slack" default:"1m"`
	// SweepInterval is how often a store that does not forget by itself is
	// cleaned.
	SweepInterval time.Duration `yaml:"sweep_interval" default:"1m"`
	// NoticeBytes is up to which size a change is sent to the other nodes as it
	// is; of larger ones they are told the key, and those that have the session
	// live read it from the store.
	NoticeBytes int `yaml:"notice_bytes" default:"4096"`
	// NoticeBuffer bounds what waits to be told to the other nodes, in bytes;
	// nothing is written while it is full.
	NoticeBuffer int `yaml:"notice_buffer" default:"4194304"`
}

// Defaults returns the defaults.
func Defaults() Config {
	var c Config
	if err := config.Defaults(&c); err != nil {
		panic(err) // a mistake in the tags above
	}
	return c
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	if c.OnFailure != Continue && c.OnFailure != Fail {
		errs = append(errs, fmt.Errorf("on_failure: %q is neither %s nor %s", c.OnFailure, Continue, Fail))
	}
	for _, d := range []struct {
		name string
		d    time.Duration
		zero bool
	}{
		{"grace", c.Grace, false}, {"delay", c.Delay, true}, {"timeout", c.Timeout, false}, {"retry_min", c.RetryMin, false},
		{"retry_max", c.RetryMax, false}, {"tombstone_ttl", c.TombstoneTTL, false}, {"expire_slack", c.ExpireSlack, true},
		{"sweep_interval", c.SweepInterval, false},
	} {
		if d.d < 0 || d.d == 0 && !d.zero {
			errs = append(errs, fmt.Errorf("%s: %v is too short", d.name, d.d))
		}
	}
	if c.RetryMax < c.RetryMin {
		errs = append(errs, fmt.Errorf("retry_max: %v is less than retry_min, %v", c.RetryMax, c.RetryMin))
	}
	for _, n := range []struct {
		name   string
		n, max int
	}{{"parallel", c.Parallel, 1 << 10}, {"max_pending", c.MaxPending, 1 << 24}} {
		if n.n < 1 || n.n > n.max {
			errs = append(errs, fmt.Errorf("%s: %d is not between 1 and %d", n.name, n.n, n.max))
		}
	}
	if c.NoticeBytes < 0 || c.NoticeBytes > 1<<20 {
		errs = append(errs, fmt.Errorf("notice_bytes: %d is not between 0 and %d", c.NoticeBytes, 1<<20))
	}
	if c.NoticeBuffer < 64<<10 || c.NoticeBuffer > 64<<20 {
		errs = append(errs, fmt.Errorf("notice_buffer: %d is not between %d and %d", c.NoticeBuffer, 64<<10, 64<<20))
	}
	return errors.Join(errs...)
}

// FactoryOf returns the factory of the manager around a store that is
// configured by C. common returns the part of C that is for the manager.
func FactoryOf[C any](name string, defaults C, common func(*C) *Config, make func(C, channel.Settings) (core.Store, error)) core.ManagerFactory {
	return channel.FactoryOf(name, defaults, func(c C, s channel.Settings) (core.Manager, error) {
		store, err := make(c, s)
		if err != nil {
			return nil, err
		}
		return New(*common(&c), store, s)
	})
}
