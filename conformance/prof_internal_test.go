package conformance

import (
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// Without a mistake the manager that the saboteurs are made of is conformant:
// what the checks catch is the mistake.
func TestPlainManager(t *testing.T) {
	Run(t, Manager("plain", func(c plainConfig, _ channel.Settings) (core.Manager, error) { return newPlainManager(c), nil },
		plainConfig{}, FeatureDelta, FeatureStateTransfer, FeatureIDChange), Seed(1))
}

// The same for deployers.
func TestPlainDeployer(t *testing.T) { Run(t, plainDeployers(""), Seed(1)) }
