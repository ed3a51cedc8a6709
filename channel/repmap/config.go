package repmap

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// Errors that a caller may branch on.
var (
	// ErrNotReplicated: the change is made here and will be repaired, but not
	// every member that should have it has confirmed it.
	ErrNotReplicated = errors.New("repmap: not confirmed by all members that should have it")
	// ErrUnavailable: no member that has the value answers.
	ErrUnavailable = errors.New("repmap: no member that has the value answers")
	// ErrFull: the map has Config.MaxEntries entries, or Config.MaxBytes.
	ErrFull = errors.New("repmap: the map is full, see max_entries and max_bytes")
)

// Config says what kind of map it is, and bounds it.
type Config struct {
	// Lazy keeps values on two members instead of on all.
	Lazy bool `yaml:"lazy"`
	// Tribes also talks to members that are no Longhouse nodes, as Tribes'
	// ReplicatedMap does, or as its LazyReplicatedMap if Lazy is set. Keys and
	// values are then Java object streams; see [JavaCodec]. The map's name must
	// be that of the Java map.
	Tribes bool `yaml:"tribes"`
	// MaxEntries bounds the entries.
	MaxEntries int `yaml:"max_entries"`
	// MaxBytes bounds the values that this member has, in encoded bytes; 0 is no
	// bound but those of MaxEntries and MaxValue.
	MaxBytes int64 `yaml:"max_bytes"`
	// MaxKey and MaxValue bound one key and one value, in encoded bytes.
	MaxKey   int `yaml:"max_key"`
	MaxValue int `yaml:"max_value"`
	// ChunkBytes is about how large one message of a transfer is, in bytes; it
	// is more only for a value that is.
	ChunkBytes int `yaml:"chunk_bytes"`
	// TombstoneTTL is how long a removal is remembered. A split that lasts
	// longer may bring back what was removed during it.
	TombstoneTTL time.Duration `yaml:"tombstone_ttl"`
	// MaxTombstones bounds the removals that are remembered; the oldest go
	// first.
	MaxTombstones int `yaml:"max_tombstones"`
	// Timeout bounds one exchange with another member.
	Timeout time.Duration `yaml:"timeout"`
	// Interval is how often the map is compared with that of another member.
	Interval time.Duration `yaml:"interval"`
	// MaxChanges bounds the changes that wait for listeners; when there are
	// more, they are dropped and replaced by one of kind Missed.
	MaxChanges int `yaml:"max_changes"`
	// Dialect says which class versions are written for Tribes' nodes.
	Dialect *jser.Dialect `yaml:"-"`
}

// DefaultConfig returns the defaults of a full map: 1,000,000 entries, values
// of 16 MiB, chunks of 1 MiB, tombstones for an hour.
func DefaultConfig() Config {
	return Config{MaxEntries: 1_000_000, MaxKey: 1 << 10, MaxValue: 16 << 20, ChunkBytes: 1 << 20,
		TombstoneTTL: time.Hour, MaxTombstones: 1_000_000, Timeout: 5 * time.Second, Interval: 30 * time.Second, MaxChanges: 65536}
}

// Validate returns all problems, joined.
func (c Config) Validate() error {
	var errs []error
	for _, f := range []struct {
		name string
		n    int
	}{{"max_entries", c.MaxEntries}, {"max_key", c.MaxKey}, {"max_value", c.MaxValue}, {"chunk_bytes", c.ChunkBytes},
		{"max_tombstones", c.MaxTombstones}, {"max_changes", c.MaxChanges}} {
		if f.n < 1 || f.n > math.MaxInt32/2 {
			errs = append(errs, fmt.Errorf("repmap: %s is %d, must be 1 to %d", f.name, f.n, math.MaxInt32/2))
		}
	}
	for _, f := range []struct {
		name string
		d    time.Duration
	}{{"tombstone_ttl", c.TombstoneTTL}, {"timeout", c.Timeout}, {"interval", c.Interval}} {
		if f.d <= 0 {
			errs = append(errs, fmt.Errorf("repmap: %s is %v, must be positive", f.name, f.d))
		}
	}
	if c.MaxBytes < 0 {
		errs = append(errs, fmt.Errorf("repmap: max_bytes is %d, must not be negative", c.MaxBytes))
	}
	return errors.Join(errs...)
}
