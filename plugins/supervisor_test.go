package plugins

import (
	"testing"
	"time"
)

func TestHistoryOfDeaths(t *testing.T) {
	cfg := Config{}
	cfg.setDefaults()
	h := history{cfg: &cfg}
	now := time.Unix(1000, 0)
	within := func(what string, d, low, high time.Duration) {
		t.Helper()
		if d < low || d > high {
			t.Errorf("%s: delay %v is not between %v and %v", what, d, low, high)
		}
	}
	if d, broken := h.delay(now); d != 0 || broken {
		t.Errorf("without a death: %v %v", d, broken)
	}
	want := []time.Duration{0, 50, 100, 200, 400, 800, 1600, 3200, 5000, 5000}
	for i, w := range want {
		h.died(now, now)
		d, broken := h.delay(now)
		if broken {
			t.Fatalf("broken after %d deaths", i+1)
		}
		within("crash loop", d, w*4/5*time.Millisecond, w*6/5*time.Millisecond+time.Nanosecond)
		now = now.Add(d)
	}
	h.died(now, now)
	if d, broken := h.delay(now); !broken || d != cfg.BrokenRetry {
		t.Errorf("after %d deaths: %v %v", len(want)+1, d, broken)
	}
	// The window moves on.
	now = now.Add(2 * time.Minute)
	h.died(now, now.Add(-time.Minute)) // a stable life
	if d, broken := h.delay(now); broken || d != 0 {
		t.Errorf("after a stable life: %v %v", d, broken)
	}
	if len(h.deaths) != 1 {
		t.Errorf("%d deaths are remembered", len(h.deaths))
	}
}
