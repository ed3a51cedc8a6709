package conformance_test

import (
	"testing"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/valves"
)

// All built-in valves, with their defaults.
func TestBuiltinValves(t *testing.T) {
	options := map[string]string{"accesslog": "file: access.log"}
	for _, f := range valves.Builtin() {
		t.Run(f.Name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			conformance.Run(t, conformance.ValveOf(f, options[f.Name]), conformance.Seed(1))
		})
	}
}
