package conformance

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// known is the list of known failures, by check.
type known map[string]knownFailure

type knownFailure struct {
	until  time.Time
	reason string
	line   int
}

func (k known) has(id string) bool { _, ok := k[id]; return ok }

func (r *run) readKnown() error {
	if r.knownFile == "" {
		return nil
	}
	f, err := os.Open(r.knownFile)
	if err != nil {
		return fmt.Errorf("known failures: %w", err)
	}
	defer f.Close()
	r.known = known{}
	sc := bufio.NewScanner(f)
	for n := 1; sc.Scan(); n++ {
		text, _, _ := strings.Cut(sc.Text(), "#")
		fields := strings.Fields(text)
		if len(fields) == 0 {
			continue
		}
		where := fmt.Sprintf("%s:%d", r.knownFile, n)
		if len(fields) < 3 {
			return fmt.Errorf("known failures: %s: want the id of a check, a date and a reason", where)
		}
		until, err := time.Parse(time.DateOnly, fields[1])
		if err != nil {
			return fmt.Errorf("known failures: %s: want a date like 2006-01-02, not %q", where, fields[1])
		}
		if _, ok := r.registry.Get(fields[0]); !ok {
			return fmt.Errorf("known failures: %s: there is no check %q", where, fields[0])
		}
		if r.now().After(until.AddDate(0, 0, 1)) {
			return fmt.Errorf("known failures: %s: the date of %s has passed: repair it, or give it a new date", where, fields[0])
		}
		r.known[fields[0]] = knownFailure{until, strings.Join(fields[2:], " "), n}
	}
	return sc.Err()
}

// judge turns the result of a known failure into xfail or xpass.
func (k known) judge(r *Result) {
	f, ok := k[r.ID]
	if !ok {
		return
	}
	switch r.Result {
	case Fail, Flaky:
		r.Result = XFail
		r.Message = "known: " + f.reason + ": " + r.Message
	case Pass:
		r.Result = XPass
		r.Message = "passes, but is in the list of known failures: take it out"
	}
}

// unused names the entries that did not run although their profile did.
func (k known) unused(results []Result, profiles []string) []string {
	var list []string
	for id, f := range k {
		profile, _, _ := strings.Cut(id, "/")
		ran := slices.ContainsFunc(results, func(r Result) bool { return r.ID == id && r.Result != Skip })
		if !ran && slices.Contains(profiles, profile) {
			list = append(list, fmt.Sprintf("known failure %s (line %d) was not run", id, f.line))
		}
	}
	slices.Sort(list)
	return list
}
