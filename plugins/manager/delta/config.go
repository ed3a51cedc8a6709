package delta

import (
	"errors"
	"fmt"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// Config is what a user can set.
type Config struct {
	// StateTransferTimeout bounds how long a joining node is not ready because
	// it waits for the sessions of the others: 0 does not wait, negative waits
	// for ever. What is missing then is fetched in the background.
	StateTransferTimeout time.Duration `yaml:"state_transfer_timeout"`
	// SettleTime is how long to wait for a first member before deciding that
	// there is nobody to ask; about two heartbeats.
	SettleTime time.Duration `yaml:"settle_time"`
	// StallTimeout gives up a member that says nothing during an exchange.
	StallTimeout time.Duration `yaml:"stall_timeout"`
	// SyncInterval is how often the node compares its sessions with another
	// member, in case a change was lost on the way; 0 is never.
	SyncInterval time.Duration `yaml:"sync_interval"`
	// TombstoneTTL is how long at least it is remembered that a session has
	// ended. Make it longer than the longest split to be survived, for sessions
	// that live shorter than that.
	TombstoneTTL time.Duration `yaml:"tombstone_ttl"`
	// ExpireSlack is how long after its time to live a replica is kept.
	ExpireSlack time.Duration `yaml:"expire_slack"`
	// FaultGrace is how long a synchronous commit waits for a member that it
	// could not reach to be removed from the view, before it fails.
	FaultGrace time.Duration `yaml:"fault_grace"`
	// FetchTimeout bounds asking the others for one session.
	FetchTimeout time.Duration `yaml:"fetch_timeout"`
	// ChunkBytes is about how large the messages of an exchange are.
	ChunkBytes int `yaml:"chunk_bytes"`
	// MaxSessions bounds the sessions of all nodes together; more are refused.
	MaxSessions int `yaml:"max_sessions"`
	// MaxTombstones bounds the tombstones; the oldest are forgotten early.
	MaxTombstones int `yaml:"max_tombstones"`
}

// Default returns the defaults.
func Default() Config {
	return Config{
		StateTransferTimeout: 60 * time.Second,
		SettleTime:           time.Second,
		StallTimeout:         10 * time.Second,
		SyncInterval:         time.Minute,
		TombstoneTTL:         5 * time.Minute,
		ExpireSlack:          time.Minute,
		FaultGrace:           2 * time.Second,
		FetchTimeout:         3 * time.Second,
		ChunkBytes:           1 << 20,
		MaxSessions:          2_000_000,
		MaxTombstones:        1_000_000,
	}
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	var errs []error
	positive := func(name string, d time.Duration) {
		if d <= 0 {
			errs = append(errs, fmt.Errorf("%s is %v: it must be more than 0", name, d))
		}
	}
	notNegative := func(name string, d time.Duration) {
		if d < 0 {
			errs = append(errs, fmt.Errorf("%s is %v: it must not be negative", name, d))
		}
	}
	notNegative("settle_time", c.SettleTime)
	notNegative("sync_interval", c.SyncInterval)
	notNegative("tombstone_ttl", c.TombstoneTTL)
	notNegative("expire_slack", c.ExpireSlack)
	notNegative("fault_grace", c.FaultGrace)
	positive("stall_timeout", c.StallTimeout)
	positive("fetch_timeout", c.FetchTimeout)
	if c.ChunkBytes < 4<<10 || c.ChunkBytes > 8<<20 {
		errs = append(errs, fmt.Errorf("chunk_bytes is %d: it must be from 4 KiB to 8 MiB", c.ChunkBytes))
	}
	if c.MaxSessions < 1 || c.MaxTombstones < 1 {
		errs = append(errs, fmt.Errorf("max_sessions is %d and max_tombstones %d: both must be at least 1", c.MaxSessions, c.MaxTombstones))
	}
	return errors.Join(errs...)
}

// Factory makes delta managers from configuration.
var Factory = channel.FactoryOf("delta", Default(), func(c Config, s channel.Settings) (core.Manager, error) {
	return New(c, s)
})
