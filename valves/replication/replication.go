// Package replication is a valve that decides how a request's session changes
// reach the other nodes: whether the response waits for them, and which requests
// (for images and the like) send nothing at all. It imports core and channel
// only.
package replication

import (
	"errors"
	"fmt"
	"net/http"
	"path"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// Config is what users write.
type Config struct {
	// Filter is a regular expression. A request whose whole decoded path
	// (context path included, path parameters and query not) matches it sends
	// no session changes; a later request does. Empty is none.
	Filter string `yaml:"filter"`
	// Patterns are file patterns with the same effect: "*.gif" is matched
	// against the last segment of the path, a pattern with a slash against the
	// whole path.
	Patterns []string `yaml:"patterns"`
	// Send is async, ack or sync; empty is the cluster's setting.
	Send string `yaml:"send"`
}

// Bounds of Config.
const (
	maxFilter   = 16 << 10
	maxPatterns = 256
)

// Validate checks the configuration.
func (c *Config) Validate() error {
	var errs []error
	if len(c.Filter) > maxFilter {
		errs = append(errs, fmt.Errorf("replication: filter of %d bytes: at most %d", len(c.Filter), maxFilter))
	} else if _, err := syntax.Parse(c.Filter, syntax.Perl); err != nil {
		errs = append(errs, fmt.Errorf("replication: filter %q: %w", c.Filter, err))
	}
	if len(c.Patterns) > maxPatterns {
		errs = append(errs, fmt.Errorf("replication: %d patterns: at most %d", len(c.Patterns), maxPatterns))
	}
	for _, p := range c.Patterns {
		if _, err := path.Match(p, ""); err != nil || p == "" {
			errs = append(errs, fmt.Errorf("replication: pattern %q is malformed: use * and ? as in *.gif", p))
		}
	}
	if c.Send != "" {
		if _, err := core.ParseLevel(c.Send); err != nil {
			errs = append(errs, fmt.Errorf("replication: send: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Factory makes the valve from configuration.
var Factory = channel.FactoryOf("replication", Config{}, func(c Config, s channel.Settings) (core.Valve, error) {
	return New(c, s)
})

// Valve sets the commit policy of requests.
type Valve struct {
	filter   filter
	patterns []string
	level    core.Level
	setLevel bool
	filtered *channel.Counter
}

// New returns the valve.
func New(c Config, s channel.Settings) (*Valve, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	v := &Valve{
		patterns: c.Patterns,
		filtered: s.Metrics.Counter("replication_filtered_total", "Requests that sent no session changes because of the filter."),
	}
	if c.Filter != "" {
		v.filter = newFilter(c.Filter)
	}
	if c.Send != "" {
		v.level, _ = core.ParseLevel(c.Send) // validated
		v.setLevel = true
	}
	return v, nil
}

// Wrap sets the policy before the handler runs.
func (v *Valve) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if x := core.FromContext(r.Context()); x != nil {
			if v.setLevel {
				x.SetLevel(v.level)
			}
			if v.Filtered(x.Path()) {
				v.filtered.Inc()
				x.SkipReplication()
			}
		}
		next.ServeHTTP(w, r)
	})
}

// Filtered reports whether requests of that path send no session changes.
func (v *Valve) Filtered(p string) bool {
	if v.filter.matches(p) {
		return true
	}
	for _, pattern := range v.patterns {
		name := p
		if !strings.Contains(pattern, "/") {
			name = p[strings.LastIndexByte(p, '/')+1:]
		}
		if ok, _ := path.Match(pattern, name); ok {
			return true
		}
	}
	return false
}

// filter is a regular expression that has to match the whole path. The usual
// form, .*\.gif|.*\.js, is found out and matched without the regexp machine.
type filter struct {
	suffixes []string // each a dot and no further one
	re       *regexp.Regexp
}

var suffixForm = regexp.MustCompile(`^\.\*\\\.([A-Za-z0-9_-]+)$`)

// newFilter compiles an expression that Validate has accepted.
func newFilter(expr string) (f filter) {
	for alternative := range strings.SplitSeq(expr, "|") {
		m := suffixForm.FindStringSubmatch(alternative)
		if m == nil {
			return filter{re: regexp.MustCompile(`^(?:` + expr + `)$`)}
		}
		f.suffixes = append(f.suffixes, "."+m[1])
	}
	return f
}

func (f *filter) matches(p string) bool {
	if f.re != nil {
		return f.re.MatchString(p)
	}
	dot := strings.LastIndexByte(p, '.')
	return dot >= 0 && slices.Contains(f.suffixes, p[dot:]) && strings.IndexByte(p, '\n') < 0 // the regexp's dot matches no newline
}
