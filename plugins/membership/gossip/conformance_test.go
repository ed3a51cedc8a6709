package gossip_test

import (
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins/membership/gossip"
)

// What the defaults promise in small groups: a dead node is found by the first
// probe of it and lost when the suspicion ends, so the time varies.
var times = conformance.MembershipTimes{Interval: 3 * time.Second, Drop: 7 * time.Second}

func subject(features ...string) conformance.Subject {
	return conformance.Membership("gossip", gossip.New, func(_ string, peers []string) gossip.Config {
		c := gossip.Default()
		c.Secret = secret.New("the secret of this test")
		for _, ip := range peers {
			c.Seeds = append(c.Seeds, ip+":45566")
		}
		return c
	}, times, features...)
}

func TestConformance(t *testing.T) {
	r := conformance.Run(t, subject(conformance.FeaturePayload), conformance.Strict())
	for _, p := range r.Profiles {
		if p.Result != conformance.Conformant {
			t.Errorf("%s is %s: core skipped %v", p.Name, p.Result, p.Core.Skipped)
		}
	}
}
