package conformance_test

import (
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins/deployer/watch"
)

func watchConfig(dir string) watch.Config {
	c := watch.Default()
	c.Dir, c.Scan, c.Settle, c.Grace = dir, 20*time.Millisecond, 20*time.Millisecond, 0
	return c
}

func TestBuiltinDeployers(t *testing.T) {
	conformance.Run(t, conformance.Deployer("watch", watch.New, watchConfig), conformance.Seed(1))
}
