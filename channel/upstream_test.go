package channel_test

import (
	"testing"

	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// The README's table of the tests of Tribes names tests that exist.
func TestUpstreamTable(t *testing.T) {
	channeltest.CoveredBy(t, "The tests of Tribes", "Tribes", 20)
}
