package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Pos is where something was written. The zero Pos means that nobody wrote it:
// it is a default or came from code.
type Pos struct {
	File string
	Line int
	Col  int
}

// String returns file:line:col, file:line if the column is unknown, or
// "default".
func (p Pos) String() string {
	switch {
	case p.Line == 0 && p.File == "":
		return "default"
	case p.Line == 0:
		return p.File
	case p.Col == 0:
		return fmt.Sprintf("%s:%d", p.File, p.Line)
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Col)
}

// Origin returns file:line, the form that [Decode] takes.
func (p Pos) Origin() string {
	p.Col = 0
	return p.String()
}

// Problem is one finding about a configuration.
type Problem struct {
	Pos Pos
	// Path is the place in the model, "cluster.channel.interceptors[1]"; may be
	// empty.
	Path string
	// Severity is Error, Unavailable, Warning or Note.
	Severity Severity
	// What is wrong, why it matters, and what to do: each one sentence; Why and
	// Fix may be empty.
	What, Why, Fix string
	// Excerpt is the line as it was written, or empty.
	Excerpt string
}

// Severity orders problems.
type Severity uint8

const (
	// Note is for information.
	Note Severity = iota
	// Warning: works, but maybe not as meant.
	Warning
	// Unavailable: not available in this version; refused unless the user asked
	// to run with the rest.
	Unavailable
	// Error: cannot run.
	Error
)

// String returns the severity in one word.
func (s Severity) String() string {
	return [...]string{"note", "warning", "not available", "error"}[s]
}

// Error returns the problem in one line, so that a Problem can be an error.
func (p Problem) Error() string {
	s := p.Severity.String() + ": "
	if p.Pos != (Pos{}) {
		s = p.Pos.String() + ": " + s
	}
	if p.Path != "" {
		s += p.Path + ": "
	}
	s += p.What
	if p.Why != "" {
		s += " (" + p.Why + ")"
	}
	if p.Fix != "" {
		s += "; " + p.Fix
	}
	return s
}

// Detail returns the problem with the line it is about and a mark under the
// column.
func (p Problem) Detail() string {
	if p.Excerpt == "" {
		return p.Error()
	}
	s := p.Error() + "\n    | " + strings.ReplaceAll(p.Excerpt, "\t", " ")
	if p.Pos.Col > 0 && p.Pos.Col <= len(p.Excerpt)+1 {
		s += "\n    | " + strings.Repeat(" ", p.Pos.Col-1) + "^"
	}
	return s
}

// Problems is a list of findings that is an error.
type Problems []Problem

// Error returns all problems, each with its line.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Detail()
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns the single problems.
func (ps Problems) Unwrap() []error {
	errs := make([]error, len(ps))
	for i, p := range ps {
		errs[i] = p
	}
	return errs
}

// add appends p unless there are enough.
func (ps *Problems) add(p Problem) {
	if len(*ps) < maxProblems {
		*ps = append(*ps, p)
	}
}

// Worst returns the highest severity of the problems, Note if there are none.
func Worst(ps []Problem) Severity {
	worst := Note
	for _, p := range ps {
		worst = max(worst, p.Severity)
	}
	return worst
}

// Component is a user's choice of a component with its options, which stay
// undecoded until the component's factory decodes them:
//
//	use: dispatch
//	queue_bytes: 64MiB
//
// A component without options may be written as its name alone.
type Component struct {
	// Use is the name of the factory.
	Use string
	// Mode is how a plugin is hosted: direct, bridged or process; empty is the
	// default of its kind.
	Mode string
	Pos  Pos

	options *node // a mapping, or nil; shared, never changed
}

// NewComponent makes the choice of a component in code. Options are maps,
// lists, strings, numbers, booleans, durations and byte sizes.
func NewComponent(use string, options map[string]any, pos Pos) Component {
	c := Component{Use: use, Pos: pos}
	if len(options) > 0 {
		c.options = nodeOf(options, pos)
	}
	return c
}

// IsZero reports whether nothing was chosen.
func (c Component) IsZero() bool { return c.Use == "" && c.Mode == "" && c.options == nil }

// Decode fills into with the options, strictly; see the function [Decode].
// Without options it only reports what is required.
func (c Component) Decode(into any) error {
	if c.options == nil {
		return decodeRoot(&node{src: &source{file: c.Pos.File}, line: c.Pos.Line, col: c.Pos.Col}, into)
	}
	return decodeRoot(c.options, into)
}

// Split returns the component with only the options of the given keys, and with
// all others.
func (c Component) Split(keys ...string) (with, without Component) {
	with, without = c, c
	if c.options == nil {
		return with, without
	}
	a, b := *c.options, *c.options
	a.pairs, b.pairs = nil, nil
	for _, p := range c.options.pairs {
		if slices.Contains(keys, p.key) {
			a.pairs = append(a.pairs, p)
		} else {
			b.pairs = append(b.pairs, p)
		}
	}
	with.options, without.options = &a, &b
	if len(a.pairs) == 0 {
		with.options = nil
	}
	if len(b.pairs) == 0 {
		without.options = nil
	}
	return with, without
}

// Options returns the options as Go values; nil for none. Secrets are shown as
// they were written.
func (c Component) Options() map[string]any {
	if c.options == nil {
		return nil
	}
	return c.options.plain().(map[string]any)
}

// YAML returns the options for [Decode] in another process, with the origin
// c.Pos.Origin(): nil for none, else a flow mapping whose lines are those of
// the file. References to secrets have been replaced by the secrets, marked so
// that they are not shown; handle the text like a secret.
func (c Component) YAML() []byte {
	if c.options == nil {
		return nil
	}
	w := flowWriter{line: 1, base: c.Pos.Line - 1}
	w.value(c.options)
	return w.buf
}

// decodeNode reads a name alone, or a mapping with use, mode and options.
func (c *Component) decodeNode(d *decoder, n *node, path string) {
	switch n.kind {
	case stringKind:
		*c = Component{Use: n.text, Pos: n.pos()}
	case mapKind:
		*c = Component{Pos: n.pos()}
		options := &node{kind: mapKind, src: n.src, line: n.line, col: n.col}
		for _, p := range n.pairs {
			switch p.key {
			case "use":
				d.value(reflect.ValueOf(&c.Use).Elem(), p.value, join(path, p.key), false)
			case "mode":
				d.value(reflect.ValueOf(&c.Mode).Elem(), p.value, join(path, p.key), false)
				if !slices.Contains(modes, c.Mode) {
					d.fail(p.value, join(path, "mode"), fmt.Sprintf("unknown mode %q", shorten(c.Mode)), "known are direct, bridged, process")
				}
			default:
				options.pairs = append(options.pairs, p)
			}
		}
		if len(options.pairs) > 0 {
			c.options = options
		}
	default:
		d.wrong(n, path, "a component's name, or a mapping with use and its options")
		return
	}
	if c.Use == "" && strings.HasSuffix(path, "]") {
		d.fail(n, path, "says not which component is meant", `add "use: name"`)
	}
}

// modes are the values of mode.
var modes = []string{"", "direct", "bridged", "process"}
