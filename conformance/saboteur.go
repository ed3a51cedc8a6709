package conformance

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// Trial is the outcome of one check on one of its saboteurs.
type Trial struct {
	Check, Saboteur string
	Caught          bool
	// Message is the first failure that the check reported, or why it saw
	// nothing.
	Message string
	Took    time.Duration
}

// TrySaboteurs runs a check on each of its saboteurs, with all features
// declared. It owns the process's standard output meanwhile.
func TrySaboteurs(c Check, opts ...Option) ([]Trial, error) {
	var trials []Trial
	for _, s := range c.Saboteurs {
		tr, err := trySaboteur(c, s, opts)
		if err != nil {
			return trials, fmt.Errorf("%s: saboteur %q: %w", c.ID, s.Name, err)
		}
		trials = append(trials, tr)
	}
	return trials, nil
}

func trySaboteur(c Check, s Saboteur, opts []Option) (Trial, error) {
	one, err := NewRegistry(c)
	if err != nil {
		return Trial{}, err
	}
	subject := s.New()
	r, err := newRun(subject, append(slices.Clone(opts), From(one)))
	if err != nil {
		return Trial{}, err
	}
	r.features = slices.Concat(r.features, c.Features)
	tr := Trial{Check: c.ID, Saboteur: s.Name}
	start := time.Now()
	_, err = harness(c.ID, func(t *testing.T) {
		for _, m := range r.modes {
			if !r.one(t, c, m) || c.Once {
				break
			}
		}
	})
	tr.Took = time.Since(start)
	if err != nil {
		return tr, err
	}
	tr.Message = "the check passed"
	for _, res := range r.report.Checks {
		switch res.Result {
		case Fail:
			tr.Caught, tr.Message = true, res.Message
		case Skip:
			if !tr.Caught {
				tr.Message = "skipped: " + res.Message
			}
		}
		if strings.HasPrefix(res.Message, "stuck") {
			return tr, errors.New("the check got stuck instead of failing")
		}
	}
	return tr, nil
}
