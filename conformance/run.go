package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/core"
)

// run is one run of the suite over a subject.
type run struct {
	options
	desc     Description
	subject  Subject
	features []string
	profiles []string
	modes    []core.PluginMode
	known    known
	report   *Report
}

// newRun reads the subject's description and the options. Its error means that
// the suite cannot run.
func newRun(s Subject, opts []Option) (*run, error) {
	r := &run{subject: s, options: defaultOptions()}
	for _, o := range opts {
		o(&r.options)
	}
	if r.seed == 0 {
		r.seed = rand.Uint64()
	}
	r.report = &Report{
		Version: ReportVersion, Suite: Suite{SuiteVersion, commit()}, Host: hostInfo(),
		Seed: r.seed, Date: r.now().UTC().Truncate(time.Second), Profiles: []ProfileReport{}, Checks: []Result{},
	}
	d, err := s.Describe()
	if err != nil {
		r.report.Subject.Name = "subject"
		return r, fmt.Errorf("describe: %w", err)
	}
	r.desc, r.profiles, r.modes, r.features = d, d.profiles(), d.modes(), d.Features
	r.report.Subject = ReportSubject{d.Kind, d.Name, d.Version, d.SHA256, d.API, r.modes, redact(d.Details)}
	return r, errors.Join(r.choose(), r.readKnown())
}

// choose applies what the user asked for to what the subject offers.
func (r *run) choose() error {
	var errs []error
	pick := func(what string, offered, wanted []string) []string {
		for _, w := range wanted {
			if !slices.Contains(offered, w) {
				errs = append(errs, fmt.Errorf("the subject has no %s %q (it has: %s)", what, w, strings.Join(offered, ", ")))
			}
		}
		return wanted
	}
	if r.wantProfiles != nil {
		r.profiles = pick("profile", r.profiles, r.wantProfiles)
	}
	if r.wantFeatures != nil {
		r.features = pick("feature", r.features, *r.wantFeatures)
	}
	if r.wantModes != nil {
		var offered, wanted []string
		for _, m := range r.modes {
			offered = append(offered, string(m))
		}
		for _, m := range r.wantModes {
			wanted = append(wanted, string(m))
		}
		pick("mode", offered, wanted)
		r.modes = r.wantModes
		r.report.Subject.Mode = r.modes
	}
	for _, p := range r.profiles {
		if len(r.registry.Profile(p)) == 0 {
			errs = append(errs, fmt.Errorf("no profile %q (known: %s)", p, strings.Join(r.registry.Profiles(), ", ")))
		}
	}
	for id := range r.without {
		if _, ok := r.registry.Get(id); !ok {
			errs = append(errs, fmt.Errorf("without %s: there is no such check", id))
		}
	}
	if _, err := regexp.Compile(r.only); err != nil {
		errs = append(errs, fmt.Errorf("pattern of checks to run: %w", err))
	}
	return errors.Join(errs...)
}

// Run tests a subject under go test, one sub-test for every check and mode,
// and returns the report. A subject that is not conformant fails t.
func Run(t *testing.T, s Subject, opts ...Option) *Report {
	t.Helper()
	r, err := newRun(s, opts)
	if err != nil {
		r.report.Error = err.Error()
	} else {
		t.Logf("conformance suite %s, seed %d, subject %s/%s %s", SuiteVersion, r.seed, r.desc.Kind, r.desc.Name, r.desc.SHA256)
		r.body(t)
	}
	r.conclude()
	if err := r.write(); err != nil {
		t.Error(err)
	}
	t.Log(strings.TrimSpace(r.report.Summary()))
	if r.report.Error != "" {
		t.Errorf("conformance: could not run: %s", r.report.Error)
	} else if r.report.Code() != 0 && !t.Failed() {
		t.Errorf("conformance: not conformant; repeat with seed %d", r.seed)
	}
	return r.report
}

// Main tests a subject outside of go test, prints what it does to the writer of
// [LogTo], and returns the report and the exit code: 0 conformant or partial, 1
// not, 2 the suite could not run. It must not be called concurrently: like go
// test it owns the process's standard output meanwhile.
func Main(s Subject, opts ...Option) (report *Report, code int) {
	r, err := newRun(s, opts)
	if err != nil {
		r.report.Error = err.Error()
	} else {
		fmt.Fprintf(r.log, "conformance suite %s, seed %d, subject %s/%s %s\n", SuiteVersion, r.seed, r.desc.Kind, r.desc.Name, r.desc.SHA256)
		output, err := harness("conform", r.body)
		if err != nil {
			r.report.Error = err.Error()
		}
		r.output = output
	}
	r.conclude()
	if err := r.write(); err != nil {
		r.report.Error = strings.TrimPrefix(r.report.Error+"; "+err.Error(), "; ")
	}
	fmt.Fprint(r.log, r.report.Summary())
	code = r.report.Code()
	if code == 1 {
		fmt.Fprintf(r.log, "%srepeat with seed %d\n", r.output, r.seed)
	}
	return r.report, code
}

func (r *run) conclude() {
	if r.desc.Kind != "" {
		r.report.sumUp(r.registry, r.profiles, r.features, r.strict)
	}
}

// write writes the report files.
func (r *run) write() error {
	var errs []error
	file := func(path string, write func(io.Writer) error) {
		if path == "" {
			return
		}
		var b bytes.Buffer
		err := write(&b)
		if err == nil {
			err = os.WriteFile(path, b.Bytes(), 0o644)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("conformance: report: %w", err))
		}
	}
	file(r.reportTo, r.report.WriteJSON)
	file(r.junitTo, r.report.WriteJUnit)
	return errors.Join(errs...)
}

// body is what both doors run.
func (r *run) body(t *testing.T) {
	only := regexp.MustCompile(r.only)
	var later []Check
	for _, profile := range r.profiles {
		for _, c := range r.registry.Profile(profile) {
			switch {
			case !only.MatchString(c.ID) || c.Level == Should && !r.strict:
			case c.Once:
				later = append(later, c)
			default:
				for _, m := range r.modes {
					if !r.one(t, c, m) {
						return
					}
				}
			}
		}
	}
	for _, c := range later {
		if !r.one(t, c, r.modes[0]) {
			return
		}
	}
	r.complain(t, r.known.unused(r.report.Checks, r.profiles))
}

// complain fails the run for reasons that belong to no check.
func (r *run) complain(t *testing.T, problems []string) {
	for _, p := range problems {
		t.Error(p)
		r.report.Error = strings.TrimPrefix(r.report.Error+"; "+p, "; ")
	}
}

// one tries one check in one mode, as often as asked for. It returns false if
// the check got stuck, which ends the run: the process is not to be trusted any
// more.
func (r *run) one(t *testing.T, c Check, mode core.PluginMode) bool {
	res := Result{ID: c.ID, Level: c.Level, Mode: mode, Result: Skip}
	if why := r.skipReason(c); why != "" {
		res.Message = why
		r.add(res)
		return true
	}
	passed, failed, alive := 0, 0, true
	for i := range r.repeat {
		n, verdict, stuck := r.try(t, c, mode, r.seed+uint64(i))
		res.Seconds += n.seconds
		res.Virtual += n.virtual.Seconds()
		res.Artefact = append(res.Artefact, n.artefacts...)
		if res.Message == "" {
			res.Message = n.message()
		}
		if i == 0 {
			res.events = n.events
		}
		switch verdict {
		case Pass:
			passed++
		case Fail:
			failed++
		}
		if stuck {
			alive = false
			break
		}
	}
	switch {
	case failed > 0 && passed > 0:
		res.Result = Flaky
	case failed > 0:
		res.Result = Fail
	case passed > 0:
		res.Result, res.Message = Pass, ""
	}
	r.known.judge(&res)
	if !res.OK() && (c.Level == Must || r.strict) {
		t.Errorf("%s (%s): %s: %s", c.ID, mode, res.Result, res.Message)
	}
	r.add(res)
	return alive
}

func (r *run) add(res Result) {
	r.report.Checks = append(r.report.Checks, res)
	if r.progress != nil {
		r.progress(res)
	}
}

func (r *run) skipReason(c Check) string {
	if why, ok := r.without[c.ID]; ok {
		return why
	}
	for _, f := range c.Features {
		if !slices.Contains(r.features, f) {
			return "feature " + f + " is not declared"
		}
	}
	return ""
}

// attempt is what one try of a check left.
type attempt struct {
	failures, events, artefacts []string
	skipped                     string
	seconds                     float64
	virtual                     time.Duration
}

func (a attempt) message() string {
	if len(a.failures) > 0 {
		return strings.Join(a.failures, "; ")
	}
	return a.skipped
}

// try runs a check once, as a sub-test. The check's own failures are the
// sub-test's; the known ones must not fail it, so those run on a test tree of
// their own.
func (r *run) try(t *testing.T, c Check, mode core.PluginMode, seed uint64) (a attempt, v Verdict, stuck bool) {
	n := &notes{dir: r.artefacts, id: c.ID}
	var failed, skipped bool
	var abandoned atomic.Bool
	before := r.report.Checks // a stuck check may look at them later
	body := func(sub *testing.T) {
		defer func() {
			if abandoned.Load() {
				leak() // the tests above it have ended: package testing would panic
			}
			// Not recovered: a panic of the subject in this goroutine must be
			// seen. FailNow and SkipNow come here too.
			failed, skipped = sub.Failed(), sub.Skipped()
		}()
		c.Run(&T{T: sub, Subject: r.subject, Mode: mode, Seed: seed, Timeouts: r.timeouts,
			Features: r.features, Results: before, note: n})
	}
	if r.known.has(c.ID) {
		guarded := body
		body = func(*testing.T) { _, _ = harness(c.ID, guarded) }
	}
	start, done := time.Now(), make(chan struct{})
	go func() {
		defer close(done)
		t.Run(c.ID+"/"+string(mode), body)
	}()
	timer := time.NewTimer(r.timeouts.Check)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		stuck = true
		abandoned.Store(true)
		n.fail(fmt.Sprintf("stuck: has not ended within %v", r.timeouts.Check))
		(&T{T: t, Mode: mode, note: n}).Artefact("goroutines.txt", stacks())
	}
	a = n.attempt(time.Since(start))
	switch {
	case stuck || failed || len(a.failures) > 0:
		if len(a.failures) == 0 {
			a.failures = []string{"failed; see the output of the test"}
		}
		return a, Fail, stuck
	case skipped:
		return a, Skip, false
	}
	return a, Pass, false
}

func (n *notes) attempt(took time.Duration) attempt {
	n.mu.Lock()
	defer n.mu.Unlock()
	return attempt{slices.Clone(n.failures), slices.Clone(n.events), slices.Clone(n.artefacts), n.skipped, took.Seconds(), n.virtual}
}

// maxStacks bounds the goroutine dump of a stuck check, in bytes.
const maxStacks = 1 << 20

func stacks() []byte {
	buf := make([]byte, maxStacks)
	return buf[:runtime.Stack(buf, true)]
}
