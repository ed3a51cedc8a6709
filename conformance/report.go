package conformance

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/core"
)

// SuiteVersion is the version of the checks. It grows with every check that is
// added or becomes stricter.
const SuiteVersion = "1.0.0"

// ReportVersion is the version of the report's format. Fields are only ever
// added within one version.
const ReportVersion = 1

// Verdict is the result of one check.
type Verdict string

const (
	Pass Verdict = "pass"
	Fail Verdict = "fail"
	// Skip: not tried, the message says why.
	Skip Verdict = "skip"
	// XFail failed and is in the list of known failures; XPass is in the list
	// and passed.
	XFail Verdict = "xfail"
	XPass Verdict = "xpass"
	// Flaky passed and failed in repetitions of one run.
	Flaky Verdict = "flaky"
)

// Conformance is the result of one profile.
type Conformance string

const (
	// Conformant: everything that must pass passed.
	Conformant Conformance = "conformant"
	// Partial: nothing failed, but some of the core was not tried.
	Partial Conformance = "partial"
	// NonConformant: something failed.
	NonConformant Conformance = "nonconformant"
)

// Report is the outcome of a run.
type Report struct {
	Version  int             `json:"version"`
	Suite    Suite           `json:"suite"`
	Subject  ReportSubject   `json:"subject"`
	Host     HostInfo        `json:"host"`
	Seed     uint64          `json:"seed"`
	Date     time.Time       `json:"date"`
	Profiles []ProfileReport `json:"profiles"`
	Checks   []Result        `json:"checks"`
	// Error says why the suite could not run, or could not finish.
	Error string `json:"error,omitempty"`
}

// Suite says what ran.
type Suite struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
}

// ReportSubject says what was tested.
type ReportSubject struct {
	Kind     string            `json:"kind"`
	Name     string            `json:"name"`
	Version  string            `json:"version,omitempty"`
	SHA256   string            `json:"sha256,omitempty"`
	API      []int             `json:"api,omitempty"`
	Mode     []core.PluginMode `json:"mode"`
	Describe json.RawMessage   `json:"describe,omitempty"`
}

// HostInfo says where.
type HostInfo struct {
	Go   string `json:"go"`
	OS   string `json:"os"`
	Arch string `json:"arch"`
}

// ProfileReport sums up one profile.
type ProfileReport struct {
	Name     string         `json:"name"`
	Result   Conformance    `json:"result"`
	Core     Counts         `json:"core"`
	Extended Counts         `json:"extended"`
	Features ReportFeatures `json:"features"`
}

// Counts counts checks; a check that ran in several modes counts once.
type Counts struct {
	Passed  int      `json:"passed"`
	Failed  int      `json:"failed"`
	Skipped []string `json:"skipped"`
}

// ReportFeatures lists the features of a profile.
type ReportFeatures struct {
	// Supported are declared and verified, Failed declared and not true,
	// Unverified declared without a check that tries them.
	Supported   []string `json:"supported"`
	Unsupported []string `json:"unsupported"`
	Failed      []string `json:"failed,omitempty"`
	Unverified  []string `json:"unverified,omitempty"`
}

// Result is the outcome of one check in one mode.
type Result struct {
	ID       string          `json:"id"`
	Level    Level           `json:"level"`
	Mode     core.PluginMode `json:"mode"`
	Result   Verdict         `json:"result"`
	Seconds  float64         `json:"seconds"`
	Virtual  float64         `json:"virtual_seconds"`
	Message  string          `json:"message,omitempty"`
	Artefact []string        `json:"artefacts,omitempty"`

	events []string
}

// Events returns what the check noted with [T.Event]; not part of the report.
func (r Result) Events() []string { return r.events }

// OK reports whether the result does not speak against the subject.
func (r Result) OK() bool {
	return r.Result == Pass || r.Result == Skip || r.Result == XFail
}

// Code returns the exit code: 0 nothing failed, 1 something did, 2 the suite
// could not run.
func (r *Report) Code() int {
	if r.Error != "" {
		return 2
	}
	for _, p := range r.Profiles {
		if p.Result == NonConformant {
			return 1
		}
	}
	return 0
}

// Summary is one line for every profile: its result, counts, and what was
// skipped.
func (r *Report) Summary() string {
	var b strings.Builder
	if r.Error != "" {
		fmt.Fprintf(&b, "%s: could not run: %s\n", r.Subject.Name, r.Error)
	}
	for _, p := range r.Profiles {
		fmt.Fprintf(&b, "%s: %s: %s; core %s; extended %s", r.Subject.Name, p.Name, p.Result, p.Core, p.Extended)
		if len(p.Features.Supported) > 0 {
			fmt.Fprintf(&b, "; verified features: %s", strings.Join(p.Features.Supported, ", "))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// String counts in words.
func (c Counts) String() string {
	s := fmt.Sprintf("%d passed, %d failed", c.Passed, c.Failed)
	if len(c.Skipped) > 0 {
		s += fmt.Sprintf(", %d skipped (%s)", len(c.Skipped), strings.Join(c.Skipped, ", "))
	}
	return s
}

// WriteJSON writes the report in its versioned format.
func (r *Report) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// ReadReport reads what WriteJSON wrote.
func ReadReport(rd io.Reader) (*Report, error) {
	var r Report
	if err := json.NewDecoder(rd).Decode(&r); err != nil {
		return nil, fmt.Errorf("conformance: report: %w", err)
	}
	if r.Version != ReportVersion {
		return nil, fmt.Errorf("conformance: report: its format has version %d; this program reads version %d", r.Version, ReportVersion)
	}
	return &r, nil
}

type junitSuites struct {
	XMLName xml.Name     `xml:"testsuites"`
	Suites  []junitSuite `xml:"testsuite"`
}

type junitSuite struct {
	Name     string          `xml:"name,attr"`
	Tests    int             `xml:"tests,attr"`
	Failures int             `xml:"failures,attr"`
	Errors   int             `xml:"errors,attr"`
	Skipped  int             `xml:"skipped,attr"`
	Time     string          `xml:"time,attr"`
	Stamp    string          `xml:"timestamp,attr"`
	Props    []junitProperty `xml:"properties>property"`
	Cases    []junitCase     `xml:"testcase"`
}

type junitProperty struct {
	Name  string `xml:"name,attr"`
	Value string `xml:"value,attr"`
}

type junitCase struct {
	Class   string        `xml:"classname,attr"`
	Name    string        `xml:"name,attr"`
	Time    string        `xml:"time,attr"`
	Failure *junitMessage `xml:"failure"`
	Error   *junitMessage `xml:"error"`
	Skipped *junitMessage `xml:"skipped"`
}

type junitMessage struct {
	Message string `xml:"message,attr"`
}

// WriteJUnit writes the report as JUnit XML, one suite for every profile.
func (r *Report) WriteJUnit(w io.Writer) error {
	var all junitSuites
	for _, p := range r.Profiles {
		s := junitSuite{Name: r.Subject.Name + "/" + p.Name, Stamp: r.Date.Format(time.RFC3339), Props: []junitProperty{
			{"seed", strconv.FormatUint(r.Seed, 10)}, {"suite", r.Suite.Version}, {"result", string(p.Result)},
		}}
		var total float64
		for _, c := range r.Checks {
			profile, name, _ := strings.Cut(c.ID, "/")
			if profile != p.Name {
				continue
			}
			jc := junitCase{Class: profile + "." + string(c.Mode), Name: name, Time: seconds(c.Seconds)}
			total += c.Seconds
			s.Tests++
			switch c.Result {
			case Fail, XPass, Flaky:
				s.Failures++
				jc.Failure = &junitMessage{string(c.Result) + ": " + c.Message}
			case Skip, XFail:
				s.Skipped++
				jc.Skipped = &junitMessage{string(c.Result) + ": " + c.Message}
			}
			s.Cases = append(s.Cases, jc)
		}
		s.Time = seconds(total)
		all.Suites = append(all.Suites, s)
	}
	if r.Error != "" {
		all.Suites = append(all.Suites, junitSuite{Name: r.Subject.Name, Tests: 1, Errors: 1, Time: "0.000", Stamp: r.Date.Format(time.RFC3339),
			Cases: []junitCase{{Class: "suite", Name: "run", Time: "0.000", Error: &junitMessage{r.Error}}}})
	}
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return err
	}
	enc := xml.NewEncoder(w)
	enc.Indent("", "  ")
	if err := enc.Encode(all); err != nil {
		return err
	}
	_, err := io.WriteString(w, "\n")
	return err
}

func seconds(s float64) string { return strconv.FormatFloat(s, 'f', 3, 64) }

// sumUp fills in the profiles from the checks' results.
func (r *Report) sumUp(reg *Registry, profiles, features []string, strict bool) {
	r.Profiles = nil
	for _, name := range profiles {
		p := ProfileReport{Name: name, Result: Conformant}
		p.Core.Skipped, p.Extended.Skipped = []string{}, []string{}
		failed := map[string]bool{}
		verified := map[string]bool{}
		for _, c := range reg.Profile(name) {
			v, tried := r.verdict(c.ID)
			if !tried {
				continue
			}
			counts := &p.Core
			if len(c.Features) > 0 {
				counts = &p.Extended
			}
			switch v {
			case Pass, XFail:
				counts.Passed++
				for _, f := range c.Features {
					verified[f] = true
				}
			case Skip:
				counts.Skipped = append(counts.Skipped, c.ID)
				if len(c.Features) == 0 && (c.Level == Must || strict) && p.Result == Conformant {
					p.Result = Partial
				}
			default:
				counts.Failed++
				for _, f := range c.Features {
					failed[f] = true
				}
				if c.Level == Must || strict {
					p.Result = NonConformant
				}
			}
		}
		p.Features = sortFeatures(reg.Features(name), features, verified, failed)
		r.Profiles = append(r.Profiles, p)
	}
}

func sortFeatures(known, declared []string, verified, failed map[string]bool) ReportFeatures {
	f := ReportFeatures{Supported: []string{}, Unsupported: []string{}}
	for _, name := range known {
		switch {
		case !slices.Contains(declared, name):
			f.Unsupported = append(f.Unsupported, name)
		case failed[name]:
			f.Failed = append(f.Failed, name)
		case verified[name]:
			f.Supported = append(f.Supported, name)
		default:
			f.Unverified = append(f.Unverified, name)
		}
	}
	for _, name := range declared {
		if !slices.Contains(known, name) {
			f.Unverified = append(f.Unverified, name)
		}
	}
	return f
}

// verdict joins the results of all modes: the worst counts, and a check that
// was skipped in one mode and passed in another has passed.
func (r *Report) verdict(id string) (v Verdict, tried bool) {
	rank := map[Verdict]int{Skip: 1, Pass: 2, XFail: 3, Flaky: 4, XPass: 5, Fail: 6}
	for _, c := range r.Checks {
		if c.ID == id && rank[c.Result] > rank[v] {
			v, tried = c.Result, true
		}
	}
	return v, tried
}

func hostInfo() HostInfo { return HostInfo{runtime.Version(), runtime.GOOS, runtime.GOARCH} }

func commit() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return ""
}
