package backup

import (
	"errors"
	"fmt"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/manager/internal/replica"
)

// Config is what a user can set.
type Config struct {
	// Copies is how many other nodes keep a copy of each session, 1 to 16. If
	// there are fewer other nodes, each has one.
	Copies int `yaml:"copies"`
	// RecreateAfter is how long after a change of the group missing copies are
	// made on other nodes, and surplus ones dropped: a node that is back sooner
	// moves nothing.
	RecreateAfter time.Duration `yaml:"recreate_after"`
	// StateTransferTimeout bounds how long a joining node is not ready because
	// it waits for its share of the sessions: 0 does not wait, negative waits
	// for ever. What is missing then is fetched in the background.
	StateTransferTimeout time.Duration `yaml:"state_transfer_timeout"`
	// TerminateOnStartFailure keeps a node unready whose state transfer was not
	// complete in that time; it goes on trying.
	TerminateOnStartFailure bool `yaml:"terminate_on_start_failure"`
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
	// answer. After that it is put aside: its copies are made elsewhere until it
	// answers again, and then it gets what it has missed.
	FaultGrace time.Duration `yaml:"fault_grace"`
	// FetchTimeout bounds asking others for one session while this node joins;
	// later it is at most FaultGrace.
	FetchTimeout time.Duration `yaml:"fetch_timeout"`
	// ChunkBytes is about how large the messages of a transfer are.
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

// Default returns the defaults: one copy.
func Default() Config {
	c := replica.Defaults()
	return Config{
		Copies:               1,
		RecreateAfter:        c.RecreateAfter,
		StateTransferTimeout: c.StateTransferTimeout,
		SettleTime:           c.SettleTime,
		StallTimeout:         c.StallTimeout,
		SyncInterval:         c.SyncInterval,
		TombstoneTTL:         c.TombstoneTTL,
		ExpireSlack:          c.ExpireSlack,
		FaultGrace:           c.FaultGrace,
		FetchTimeout:         c.FetchTimeout,
		ChunkBytes:           c.ChunkBytes,
		MaxSessions:          c.MaxSessions,
		MaxTombstones:        c.MaxTombstones,
	}
}

func (c Config) common() replica.Config {
	return replica.Config{
		StateTransferTimeout: c.StateTransferTimeout,
		SettleTime:           c.SettleTime,
		StallTimeout:         c.StallTimeout,
		SyncInterval:         c.SyncInterval,
		TombstoneTTL:         c.TombstoneTTL,
		ExpireSlack:          c.ExpireSlack,
		FaultGrace:           c.FaultGrace,
		FetchTimeout:         c.FetchTimeout,
		ChunkBytes:           c.ChunkBytes,
		MaxSessions:          c.MaxSessions,
		MaxTombstones:        c.MaxTombstones,
		DomainOnly:           c.DomainOnly,
		Copies:               c.Copies,
		RecreateAfter:        c.RecreateAfter,
		NeedStart:            c.TerminateOnStartFailure,
	}
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	common := c.common()
	err := common.Validate()
	if c.Copies == 0 { // the engine takes it for a copy on every node
		err = errors.Join(fmt.Errorf("copies is 0: it must be from 1 to 16; a session without a copy dies with its node"), err)
	}
	return err
}

// New makes a manager; it has no side effect but registering metrics.
func New(c Config, s channel.Settings) (core.Manager, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	m, err := replica.New("backup", c.common(), s)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// Factory makes backup managers from configuration.
var Factory = channel.FactoryOf("backup", Default(), New)
