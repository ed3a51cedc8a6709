package delta

import (
	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/manager/internal/replica"
)

// Config is what a user writes.
type Config struct {
	replica.Common `yaml:",inline"`
}

// Default returns the defaults.
func Default() Config { return Config{replica.Defaults().Common} }

// New makes a manager; it has no side effect but registering metrics.
func New(c Config, s channel.Settings) (core.Manager, error) {
	m, err := replica.New("delta", replica.Config{Common: c.Common}, s)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// Factory makes delta managers from configuration.
var Factory = channel.FactoryOf("delta", Default(), New)
