package conformance_test

import (
	"testing"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins/manager/backup"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
)

var deltaFeatures = []string{conformance.FeatureDelta, conformance.FeatureStateTransfer, conformance.FeatureIDChange}

func TestBuiltinManagers(t *testing.T) {
	conformance.Run(t, conformance.Manager("delta", delta.New, delta.Default(), deltaFeatures...), conformance.Seed(1))
	for copies := 1; copies <= 2; copies++ {
		c := backup.Default()
		c.Copies = copies
		conformance.Run(t, conformance.Manager("backup", backup.New, c, deltaFeatures...), conformance.Seed(1))
	}
}
