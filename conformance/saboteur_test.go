package conformance_test

import (
	"slices"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/conformance"
)

// Every check catches every one of its saboteurs.
func TestSaboteurs(t *testing.T) {
	if testing.Short() {
		t.Skip("saboteurs break rules on purpose, the race detector's too, and take a minute; run without -short")
	}
	checks := conformance.Builtin().Checks()
	// What never comes need not be waited for as long as usual; on a machine
	// that is busy with other things that may be too short, so that what is not
	// caught is tried again with the usual times.
	usual := conformance.DefaultTimeouts()
	short := usual
	short.Event, short.Call, short.Start, short.Stop, short.Check = time.Second, time.Second, 10*time.Second, 10*time.Second, time.Minute
	caught := 0
	start := time.Now()
	tried := 0
	for _, c := range checks {
		tried++
		trials, err := conformance.TrySaboteurs(c, conformance.Seed(1), conformance.WithTimeouts(short))
		if err != nil || slices.ContainsFunc(trials, func(tr conformance.Trial) bool { return !tr.Caught }) {
			t.Logf("%s: once more, with the usual times (%v)", c.ID, err)
			trials, err = conformance.TrySaboteurs(c, conformance.Seed(1), conformance.WithTimeouts(usual))
		}
		if err != nil {
			t.Error(err)
			continue
		}
		all := len(trials) > 0
		for _, tr := range trials {
			if !tr.Caught {
				all = false
				t.Errorf("%s did not catch the saboteur that %s: %s", tr.Check, tr.Saboteur, tr.Message)
			}
			t.Logf("%-36s %-40s %6.2fs %.120s", tr.Check, tr.Saboteur, tr.Took.Seconds(), tr.Message)
		}
		if all {
			caught++
		}
	}
	t.Logf("saboteurs: caught %d of %d checks in %v", caught, tried, time.Since(start).Round(time.Millisecond))
	if caught != tried {
		t.Fail()
	}
}
