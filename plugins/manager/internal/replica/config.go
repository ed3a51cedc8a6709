package replica

import (
	"errors"
	"fmt"
	"time"
)

// Config is what the managers of this package have in common; their own
// configurations explain the fields to users.
type Config struct {
	StateTransferTimeout time.Duration
	SettleTime           time.Duration
	StallTimeout         time.Duration
	SyncInterval         time.Duration
	TombstoneTTL         time.Duration
	ExpireSlack          time.Duration
	// FaultGrace bounds how long anybody waits for a member that does not
	// answer.
	FaultGrace    time.Duration
	FetchTimeout  time.Duration
	ChunkBytes    int
	MaxSessions   int
	MaxTombstones int
	// DomainOnly leaves out members of other domains.
	DomainOnly bool

	// Copies is on how many nodes beside its owner a session is kept; 0 is on
	// all of them.
	Copies int
	// RecreateAfter is how long after a change of the group missing copies are
	// made elsewhere.
	RecreateAfter time.Duration
	// NeedStart makes a manager that could not get the state of the others stay
	// unready.
	NeedStart bool
}

// Defaults returns the defaults of a manager with all sessions on all nodes.
func Defaults() Config {
	return Config{
		StateTransferTimeout: 60 * time.Second,
		SettleTime:           time.Second,
		StallTimeout:         10 * time.Second,
		SyncInterval:         time.Minute,
		TombstoneTTL:         5 * time.Minute,
		ExpireSlack:          time.Minute,
		FaultGrace:           time.Second,
		FetchTimeout:         3 * time.Second,
		ChunkBytes:           1 << 20,
		MaxSessions:          2_000_000,
		MaxTombstones:        1_000_000,
		RecreateAfter:        2 * time.Second,
	}
}

// maxCopies bounds Config.Copies, and with it the placement of a session that
// travels.
const maxCopies = 16

// Validate returns all problems, joined.
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
	notNegative("recreate_after", c.RecreateAfter)
	positive("fault_grace", c.FaultGrace)
	positive("stall_timeout", c.StallTimeout)
	positive("fetch_timeout", c.FetchTimeout)
	if c.ChunkBytes < 4<<10 || c.ChunkBytes > 8<<20 {
		errs = append(errs, fmt.Errorf("chunk_bytes is %d: it must be from 4 KiB to 8 MiB", c.ChunkBytes))
	}
	if c.MaxSessions < 1 || c.MaxTombstones < 1 {
		errs = append(errs, fmt.Errorf("max_sessions is %d and max_tombstones %d: both must be at least 1", c.MaxSessions, c.MaxTombstones))
	}
	if c.Copies < 0 || c.Copies > maxCopies {
		errs = append(errs, fmt.Errorf("copies is %d: it must be from 1 to %d", c.Copies, maxCopies))
	}
	return errors.Join(errs...)
}
