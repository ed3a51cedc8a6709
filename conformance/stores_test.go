package conformance_test

import (
	"fmt"
	"testing"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins/manager/persistent"
)

// The managers around a store pass what every manager passes.
func TestStoreManagers(t *testing.T) {
	for name, options := range map[string]string{
		"file": fmt.Sprintf("store: file\ndirectory: %q\nsync: false\n", t.TempDir()),
	} {
		t.Run(name, func(t *testing.T) {
			conformance.Run(t, conformance.ManagerOf(persistent.Factory, options, deltaFeatures...), conformance.Seed(1))
		})
	}
}
