package delta

import (
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/manager/internal/replica"
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
	// StallTimeout gives up a member that says nothing during an exchange, or
	// has said nothing since it came: it does not run this manager.
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
	// FaultGrace bounds how long anybody waits for a member that does not
	// answer. After that it is put aside: nothing is sent to it and nobody
	// waits for it until it answers again, and then it gets what it has missed.
	FaultGrace time.Duration `yaml:"fault_grace"`
	// FetchTimeout bounds asking the others for one session.
	FetchTimeout time.Duration `yaml:"fetch_timeout"`
	// ChunkBytes is about how large the messages of an exchange are.
	ChunkBytes int `yaml:"chunk_bytes"`
	// MaxSessions bounds the sessions of all nodes together; more are refused.
	MaxSessions int `yaml:"max_sessions"`
	// MaxTombstones bounds the tombstones; the oldest are forgotten early.
	MaxTombstones int `yaml:"max_tombstones"`
	// DomainOnly keeps the sessions among the members of this node's own
	// domain.
	DomainOnly bool `yaml:"domain_only"`
}

// Default returns the defaults.
func Default() Config {
	c := replica.Defaults()
	return Config{
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
	}
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	common := c.common()
	return common.Validate()
}

// New makes a manager; it has no side effect but registering metrics.
func New(c Config, s channel.Settings) (core.Manager, error) {
	m, err := replica.New("delta", c.common(), s)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// Factory makes delta managers from configuration.
var Factory = channel.FactoryOf("delta", Default(), New)
