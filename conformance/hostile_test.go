package conformance_test

import (
	"testing"

	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// Every line of the table of hostile inputs names tests, and they are there.
func TestHostileTable(t *testing.T) {
	channeltest.CoveredBy(t, "Hostile inputs and faults of sessions", "Input or fault", 30)
}
