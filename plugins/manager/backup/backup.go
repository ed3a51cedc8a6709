package backup

import (
	"errors"
	"fmt"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/manager/internal/replica"
)

// Config is what a user writes.
type Config struct {
	replica.Config `yaml:",inline"`
}

// Default returns the defaults: one copy.
func Default() Config {
	c := Config{replica.Defaults()}
	c.Copies = 1
	return c
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	err := c.Config.Validate()
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
	m, err := replica.New("backup", c.Config, s)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// Factory makes backup managers from configuration.
var Factory = channel.FactoryOf("backup", Default(), New)
