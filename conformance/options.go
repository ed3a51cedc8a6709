package conformance

import (
	"io"
	"time"

	"github.com/longhouse-go/longhouse/core"
)

// Option changes a run.
type Option func(*options)

type options struct {
	registry     *Registry
	wantProfiles []string
	wantFeatures *[]string
	wantModes    []core.PluginMode
	without      map[string]string
	only         string
	strict       bool
	seed         uint64
	repeat       int
	timeouts     Timeouts
	reportTo     string
	junitTo      string
	artefacts    string
	knownFile    string
	log          io.Writer
	progress     func(Result)
	now          func() time.Time
	output       string // of a run outside of go test
}

func defaultOptions() options {
	return options{
		registry: Builtin(), without: map[string]string{}, repeat: 1,
		timeouts: DefaultTimeouts(), log: io.Discard, now: time.Now,
	}
}

// Profile runs only the named profiles of those that apply.
func Profile(names ...string) Option { return func(o *options) { o.wantProfiles = names } }

// Features verifies only the named features of those the subject declares; none
// at all without a name. A feature that is not declared cannot be added.
func Features(names ...string) Option { return func(o *options) { o.wantFeatures = &names } }

// Modes runs the subject only where told.
func Modes(modes ...core.PluginMode) Option { return func(o *options) { o.wantModes = modes } }

// Without skips a check, for a reason that the report names.
func Without(id, reason string) Option { return func(o *options) { o.without[id] = reason } }

// Only runs the checks whose id matches the regular expression.
func Only(pattern string) Option { return func(o *options) { o.only = pattern } }

// Strict runs the checks of level Should too, and makes them binding.
func Strict() Option { return func(o *options) { o.strict = true } }

// Seed repeats the run that printed it; 0 draws a new one.
func Seed(seed uint64) Option { return func(o *options) { o.seed = seed } }

// Repeat tries every check n times, with the seeds that follow the first. A
// check that sometimes fails is flaky, which counts as failed.
func Repeat(n int) Option { return func(o *options) { o.repeat = max(n, 1) } }

// WithTimeouts replaces the table of times.
func WithTimeouts(t Timeouts) Option { return func(o *options) { o.timeouts = t } }

// Slow multiplies all times of the table; give it last.
func Slow(factor float64) Option {
	return func(o *options) { o.timeouts = o.timeouts.Scale(factor) }
}

// ReportTo writes the report as JSON to a file.
func ReportTo(path string) Option { return func(o *options) { o.reportTo = path } }

// JUnitTo writes the report as JUnit XML to a file.
func JUnitTo(path string) Option { return func(o *options) { o.junitTo = path } }

// ArtefactsTo keeps what helps to understand failures in a directory.
func ArtefactsTo(dir string) Option { return func(o *options) { o.artefacts = dir } }

// KnownFailing names a file with checks that are known to fail: one line for
// each with id, date (2006-01-02) and reason; # begins a comment. They are run;
// one that passes fails the run, and so does a line whose date has passed.
func KnownFailing(file string) Option { return func(o *options) { o.knownFile = file } }

// LogTo is where [Main] prints.
func LogTo(w io.Writer) Option { return func(o *options) { o.log = w } }

// Progress is called after every check.
func Progress(f func(Result)) Option { return func(o *options) { o.progress = f } }

// From replaces the suite's own checks.
func From(r *Registry) Option { return func(o *options) { o.registry = r } }
