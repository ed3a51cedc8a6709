package replica

import (
	"errors"
	"fmt"
	"time"
)

// Common is what users can set for every manager of this package.
type Common struct {
	// StateTransferTimeout bounds how long a joining node is not ready because
	// it waits for its share of the sessions: 0 does not wait, negative waits
	// for ever. What is missing then is fetched in the background.
	StateTransferTimeout time.Duration `yaml:"state_transfer_timeout"`
	// SettleTime is how long to wait for a first member before deciding that
	// there is nobody to ask; about two heartbeats.
	SettleTime time.Duration `yaml:"settle_time"`
	// StallTimeout gives up a member that says nothing during an exchange, or
	// has said nothing since it came: it does not run this manager.
	StallTimeout time.Duration `yaml:"stall_timeout"`
	// SyncInterval is how often the node compares the sessions that it shares
	// with another member, in case a change was lost on the way; 0 is never.
	SyncInterval time.Duration `yaml:"sync_interval"`
	// TombstoneTTL is how long at least it is remembered that a session has
	// ended. Make it longer than the longest split to be survived, for sessions
	// that live shorter than that.
	TombstoneTTL time.Duration `yaml:"tombstone_ttl"`
	// ExpireSlack is how long after its time to live a copy is kept.
	ExpireSlack time.Duration `yaml:"expire_slack"`
	// FaultGrace bounds how long anybody waits for a member that does not
	// answer. After that it is put aside: nothing is sent to it, and copies are
	// made elsewhere, until it answers again; then it gets what it has missed.
	FaultGrace time.Duration `yaml:"fault_grace"`
	// FetchTimeout bounds asking others for one session while this node joins;
	// later it is at most FaultGrace.
	FetchTimeout time.Duration `yaml:"fetch_timeout"`
	// ChunkBytes is about how large the messages of a transfer are. A change waits
	// behind those that are on their way, a few at a time.
	ChunkBytes int `yaml:"chunk_bytes"`
	// MaxSessions bounds the sessions that this node keeps, copies included;
	// more are refused.
	MaxSessions int `yaml:"max_sessions"`
	// MaxTombstones bounds the tombstones; the oldest are forgotten early.
	MaxTombstones int `yaml:"max_tombstones"`
	// DomainOnly keeps the sessions among the members of this node's own
	// domain. Otherwise copies go to members of other domains first.
	DomainOnly bool `yaml:"domain_only"`
}

// Config is the configuration of a manager.
type Config struct {
	Common `yaml:",inline"`
	// Copies is how many other nodes keep a copy of each session, 1 to 16. If
	// there are fewer other nodes, each has one. 0 is for a manager with all
	// sessions on all nodes.
	Copies int `yaml:"copies"`
	// RecreateAfter is how long after a change of the group missing copies are
	// made on other nodes, and surplus ones dropped: a node that is back sooner
	// moves nothing.
	RecreateAfter time.Duration `yaml:"recreate_after"`
	// NeedStart keeps a node unready whose state transfer was not complete in
	// StateTransferTimeout; it goes on trying.
	NeedStart bool `yaml:"terminate_on_start_failure"`
}

// Defaults returns the defaults of a manager with all sessions on all nodes.
func Defaults() Config {
	return Config{
		Common: Common{
			StateTransferTimeout: 60 * time.Second,
			SettleTime:           time.Second,
			StallTimeout:         10 * time.Second,
			SyncInterval:         time.Minute,
			TombstoneTTL:         5 * time.Minute,
			ExpireSlack:          time.Minute,
			FaultGrace:           time.Second,
			FetchTimeout:         3 * time.Second,
			ChunkBytes:           256 << 10,
			MaxSessions:          2_000_000,
			MaxTombstones:        1_000_000,
		},
		RecreateAfter: 2 * time.Second,
	}
}

// maxCopies bounds Config.Copies, and with it the placement of a session that
// travels.
const maxCopies = 16

// Validate implements channel.Validator. It returns all problems, joined.
func (c *Common) Validate() error {
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
	positive("fault_grace", c.FaultGrace)
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

// Validate implements channel.Validator. It returns all problems, joined.
func (c *Config) Validate() error {
	errs := []error{c.Common.Validate()}
	if c.Copies < 0 || c.Copies > maxCopies {
		errs = append(errs, fmt.Errorf("copies is %d: it must be from 1 to %d", c.Copies, maxCopies))
	}
	if c.RecreateAfter < 0 {
		errs = append(errs, fmt.Errorf("recreate_after is %v: it must not be negative", c.RecreateAfter))
	}
	return errors.Join(errs...)
}
