package conformance_test

import (
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
	"github.com/longhouse-go/longhouse/plugins/membership/static"
)

// The built-in memberships are conformant, with the settings they come with.
func TestBuiltinMemberships(t *testing.T) {
	mc, st := multicast.Default(), static.Default()
	for _, s := range []conformance.Subject{
		conformance.Membership("multicast", multicast.New,
			func(string, []string) multicast.Config { return mc },
			conformance.MembershipTimes{Interval: mc.Frequency, Drop: mc.DropTime}, conformance.FeaturePayload),
		conformance.Membership("static", static.New,
			func(_ string, peers []string) static.Config {
				c := static.Default()
				for _, ip := range peers {
					c.Members = append(c.Members, ip+":45565")
				}
				return c
			},
			conformance.MembershipTimes{Interval: st.Frequency, Drop: st.DropTime}, conformance.FeaturePayload),
	} {
		conformant(t, s, conformance.Strict())
	}
}

// More patience stands the loss of a fifth of all datagrams.
func TestPatientMembership(t *testing.T) {
	c := multicast.Default()
	c.DropTime = 15 * time.Second
	s := conformance.Membership("multicast", multicast.New, func(string, []string) multicast.Config { return c },
		conformance.MembershipTimes{Interval: c.Frequency, Drop: c.DropTime}, conformance.FeatureLossTolerant)
	conformant(t, s, conformance.Strict(), conformance.Only("loss"))
}

// conformant fails t unless every profile of s is conformant.
func conformant(t *testing.T, s conformance.Subject, opts ...conformance.Option) *conformance.Report {
	t.Helper()
	d, err := s.Describe()
	if err != nil {
		t.Fatal(err)
	}
	var r *conformance.Report
	t.Run(d.Kind+"/"+d.Name, func(t *testing.T) {
		r = conformance.Run(t, s, opts...)
		for _, p := range r.Profiles {
			if p.Result != conformance.Conformant {
				t.Errorf("%s is %s: core skipped %v", p.Name, p.Result, p.Core.Skipped)
			}
		}
	})
	return r
}
