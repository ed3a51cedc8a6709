package channel

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

// Settings is what code, not the user, gives to every component.
type Settings struct {
	// Name is the name of the instance, for logs and metrics.
	Name string
	// Logger is named already; never nil when built by a Factory.
	Logger *zap.Logger
	// Net is the only way to the network; never nil when built by a Factory.
	Net transport.Net
	// Metrics collects the counters of the node; nil collects nothing.
	Metrics *Metrics
	// WorkDir is a private directory the component may write to; empty when it
	// has none.
	WorkDir string
	// BaseDir is where relative paths of options begin: the node's working
	// directory; empty for this process's own. See Path.
	BaseDir string
}

// Path returns a path of the options as one that this process can use, which
// may have another working directory than the node.
func (s Settings) Path(p string) string {
	if p == "" || s.BaseDir == "" || filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(s.BaseDir, p)
}

// Decode fills a configuration struct from what the user wrote. It is strict:
// an unknown key is an error that says where it stands. Fields that the user
// left out keep their value, so fill in the defaults first.
type Decode func(into any) error

// NoConfig is the Decode of a component the user said nothing about.
func NoConfig(any) error { return nil }

// Validator is implemented by configurations that check themselves. All
// problems are joined into one error.
type Validator interface{ Validate() error }

// Factory makes components of one kind (T is Interceptor, Membership, …) from
// configuration.
type Factory[T any] struct {
	// Name is the name users write: "dispatch", or "vendor/name".
	Name string
	// Source says where the factory comes from, for error messages.
	Source string
	// Check decodes and validates a configuration without making anything.
	Check func(d Decode) error
	// New makes a component. Making one has no side effect.
	New func(d Decode, s Settings) (T, error)
}

// FactoryOf returns the factory of components that are configured by a struct
// C with the given defaults. The configuration is decoded over the defaults and
// validated if *C is a Validator.
func FactoryOf[C, T any](name string, defaults C, make func(C, Settings) (T, error)) Factory[T] {
	decode := func(d Decode) (C, error) {
		c := defaults
		if d != nil {
			if err := d(&c); err != nil {
				return c, err
			}
		}
		if v, ok := any(&c).(Validator); ok {
			if err := v.Validate(); err != nil {
				return c, err
			}
		}
		return c, nil
	}
	return Factory[T]{
		Name:   name,
		Source: "built in",
		Check:  func(d Decode) error { _, err := decode(d); return err },
		New: func(d Decode, s Settings) (T, error) {
			c, err := decode(d)
			if err != nil {
				var zero T
				return zero, err
			}
			return make(c, s)
		},
	}
}

// Registry finds factories by name.
type Registry[T any] struct {
	kind   string
	byName map[string]Factory[T]
}

// NewRegistry returns a registry of the given factories; kind is the word for
// them in errors ("interceptor"). Two factories of one name are an error.
func NewRegistry[T any](kind string, fs ...Factory[T]) (*Registry[T], error) {
	r := &Registry[T]{kind: kind, byName: make(map[string]Factory[T], len(fs))}
	var errs []error
	for _, f := range fs {
		if old, dup := r.byName[f.Name]; dup {
			errs = append(errs, fmt.Errorf("%s %q is registered twice: by %s and by %s", kind, f.Name, old.Source, f.Source))
			continue
		}
		r.byName[f.Name] = f
	}
	return r, errors.Join(errs...)
}

// Names returns all names, sorted.
func (r *Registry[T]) Names() []string {
	names := make([]string, 0, len(r.byName))
	for n := range r.byName {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// Get returns the factory of that name, or an error that lists the known ones
// and guesses what was meant.
func (r *Registry[T]) Get(name string) (Factory[T], error) {
	if f, ok := r.byName[name]; ok {
		return f, nil
	}
	msg := fmt.Sprintf("unknown %s %q (known: %s)", r.kind, name, strings.Join(r.Names(), ", "))
	if near := Nearest(name, r.Names()); near != "" {
		msg += fmt.Sprintf("; did you mean %q?", near)
	}
	return Factory[T]{}, errors.New(msg)
}

// Nearest returns the candidate that differs from word by the fewest edits, or
// "" if none is near enough to be what was meant.
func Nearest(word string, candidates []string) string {
	best, limit := "", len(word)/3+2
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), strings.ToLower(c)); d < limit {
			best, limit = c, d
		}
	}
	return best
}

// distance is the Levenshtein distance in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		prev := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := prev
			if a[i] != b[j] {
				cost = 1 + min(prev, row[j], row[j+1])
			}
			prev, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
