package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The bounds of a schema that a plugin says of itself.
const (
	// MaxSchema is the size of the biggest schema, in bytes.
	MaxSchema      = 256 << 10
	maxSchemaDepth = 32
	maxPattern     = 1 << 10
)

// CheckOptions checks the options of a component, in YAML as [Component.YAML]
// gives them, against the JSON Schema of its configuration, without the
// component. All that is wrong is reported at once, as [Problems]. It knows the
// words that [SchemaOf] uses (type, properties, required, additionalProperties,
// items, enum, pattern, bounds of numbers, texts and lists) and ignores others,
// so what it accepts may still be refused by the component itself.
func CheckOptions(options []byte, origin string, schema []byte) error {
	var s schemaNode
	if len(schema) > MaxSchema {
		return fmt.Errorf("config: the schema has %d bytes, more than the bound of %d", len(schema), MaxSchema)
	}
	if err := json.Unmarshal(schema, &s); err != nil {
		return fmt.Errorf("config: the schema cannot be read: %w", err)
	}
	file, base := splitOrigin(origin)
	src := newSource(file, base, options)
	root, problems := parse(src, options)
	if len(problems) > 0 {
		return problems
	}
	if root == nil || root.kind == nullKind {
		root = &node{kind: mapKind, src: src, line: 1}
	}
	var d decoder
	d.schema(root, &s, "", 0)
	if len(d.problems) > 0 {
		return d.problems
	}
	return nil
}

// schemaNode is the part of a JSON Schema that CheckOptions knows.
type schemaNode struct {
	never                bool // the schema "false"
	Type                 words
	Properties           map[string]*schemaNode
	Required             []string
	AdditionalProperties *schemaNode
	Items                *schemaNode
	Enum                 []any
	Pattern              string
	WriteOnly            bool
	Minimum, Maximum     *float64
	MinLength, MaxLength *int
	MinItems, MaxItems   *int
	XMinimum             string `json:"x-minimum"`
	XMaximum             string `json:"x-maximum"`
}

// UnmarshalJSON reads an object, or true or false.
func (s *schemaNode) UnmarshalJSON(data []byte) error {
	switch string(data) {
	case "true":
		return nil
	case "false":
		s.never = true
		return nil
	}
	type plain schemaNode
	return json.Unmarshal(data, (*plain)(s))
}

// words is a string or a list of strings.
type words []string

// UnmarshalJSON reads either form.
func (w *words) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*w = words{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(w))
}

// schema checks n against s.
func (d *decoder) schema(n *node, s *schemaNode, path string, depth int) {
	if s == nil || depth > maxSchemaDepth {
		return
	}
	if len(s.Type) > 0 && !slices.ContainsFunc(s.Type, func(t string) bool { return n.is(t) }) {
		if n.kind == nullKind {
			d.fail(n, path, "has no value", "write one, or remove the key to keep the default")
			return
		}
		d.wrong(n, path, typeWords(s.Type))
		return
	}
	switch n.kind {
	case mapKind:
		d.object(n, s, path, depth)
	case listKind:
		d.length(n, path, len(n.items), s.MinItems, s.MaxItems)
		for i, item := range n.items {
			d.schema(item, s.Items, fmt.Sprintf("%s[%d]", path, i), depth+1)
		}
	default:
		d.scalarSchema(n, s, path)
	}
}

// is reports whether n can be of a JSON type. Like Decode, it takes any scalar
// for a text.
func (n *node) is(t string) bool {
	switch t {
	case "string":
		return n.kind != mapKind && n.kind != listKind && n.kind != nullKind
	case "integer":
		return n.kind == intKind && !n.quoted
	case "number":
		return (n.kind == intKind || n.kind == floatKind) && !n.quoted
	case "boolean":
		return n.kind == boolKind && !n.quoted
	case "object":
		return n.kind == mapKind
	case "array":
		return n.kind == listKind
	case "null":
		return n.kind == nullKind
	}
	return true // no JSON type: the schema is wrong, not the configuration
}

func typeWords(types []string) string {
	known := map[string]string{"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false", "object": "a mapping", "array": "a list", "null": "nothing"}
	out := make([]string, len(types))
	for i, t := range types {
		out[i] = known[t]
	}
	return strings.Join(out, " or ")
}

func (d *decoder) object(n *node, s *schemaNode, path string, depth int) {
	names := make([]string, 0, len(s.Properties))
	for name := range s.Properties {
		names = append(names, name)
	}
	slices.Sort(names)
	written := map[string]bool{}
	for _, p := range n.pairs {
		written[p.key] = true
		if property, ok := s.Properties[p.key]; ok {
			d.schema(p.value, property, join(path, p.key), depth+1)
		} else if s.AdditionalProperties != nil && s.AdditionalProperties.never {
			d.unknown(n, p, path, names)
		} else {
			d.schema(p.value, s.AdditionalProperties, join(path, p.key), depth+1)
		}
	}
	for _, name := range s.Required {
		if !written[name] {
			d.fail(n, join(path, name), "is missing, and there is no default", fmt.Sprintf("add %q", name+": …"))
		}
	}
}

func (d *decoder) length(n *node, path string, got int, lo, hi *int) {
	if lo != nil && got < *lo {
		d.fail(n, path, fmt.Sprintf("has the length %d, must have at least %d", got, *lo), "")
	}
	if hi != nil && got > *hi {
		d.fail(n, path, fmt.Sprintf("has the length %d, must have at most %d", got, *hi), "")
	}
}

func (d *decoder) scalarSchema(n *node, s *schemaNode, path string) {
	r, isRef := reference(n)
	if isRef && s.WriteOnly {
		if _, err := r.resolve(); err != nil {
			d.fail(n, path, err.Error(), "")
		}
		return // what it refers to is the component's to judge
	}
	if (isRef || n.secret) && !s.WriteOnly {
		d.fail(n, path, "does not take a reference: only options that are secrets do", "write the value itself")
		return
	}
	shown := fmt.Sprintf("%q", shorten(n.text))
	if n.secret || s.WriteOnly {
		shown = "the secret"
	}
	if len(s.Enum) > 0 && !slices.ContainsFunc(s.Enum, func(v any) bool { return n.equals(v) }) {
		known := make([]string, len(s.Enum))
		for i, v := range s.Enum {
			known[i] = fmt.Sprint(v)
		}
		d.fail(n, path, shown+" is none of "+strings.Join(known, ", "), "")
		return
	}
	if n.kind == intKind || n.kind == floatKind {
		if f, err := strconv.ParseFloat(strings.ReplaceAll(numeral(n), "_", ""), 64); err == nil {
			if s.Minimum != nil && f < *s.Minimum || s.Maximum != nil && f > *s.Maximum {
				d.fail(n, path, fmt.Sprintf("%s is out of range%s", n.text, rangeWords(s.Minimum, s.Maximum)), "")
				return
			}
		}
	} else if s.Pattern != "" && len(s.Pattern) <= maxPattern {
		// A pattern that is no regular expression of Go's is the schema's
		// mistake; the component itself will check the value.
		if re, err := regexp.Compile(s.Pattern); err == nil && !re.MatchString(n.text) {
			d.fail(n, path, shown+" does not have the form that is wanted", exampleOf(s))
			return
		}
	}
	if slices.Contains(s.Type, "string") && n.kind == stringKind {
		d.length(n, path, len(n.text), s.MinLength, s.MaxLength)
	}
	d.units(n, s, path)
}

// units compares values with units with the bounds of the schema.
func (d *decoder) units(n *node, s *schemaNode, path string) {
	parse := func(text string) (int64, error) {
		if b, err := ParseBytes(text); err == nil {
			return int64(b), nil
		}
		t, err := time.ParseDuration(text)
		return int64(t), err
	}
	got, err := parse(n.text)
	if err != nil {
		return
	}
	if lo, err := parse(s.XMinimum); err == nil && got < lo {
		d.fail(n, path, fmt.Sprintf("is %s, must be at least %s", n.text, s.XMinimum), "")
	}
	if hi, err := parse(s.XMaximum); err == nil && got > hi {
		d.fail(n, path, fmt.Sprintf("is %s, must be at most %s", n.text, s.XMaximum), "")
	}
}

// equals compares a scalar with a JSON value.
func (n *node) equals(v any) bool {
	switch v := v.(type) {
	case string:
		return n.text == v
	case bool:
		return n.kind == boolKind && n.text == strconv.FormatBool(v)
	case float64:
		f, err := strconv.ParseFloat(numeral(n), 64)
		return err == nil && f == v
	}
	return false
}

// numeral returns a number in decimal.
func numeral(n *node) string {
	if n.kind == intKind {
		return n.number
	}
	return n.text
}

func rangeWords(lo, hi *float64) string {
	format := func(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }
	switch {
	case lo != nil && hi != nil:
		return ", " + format(*lo) + " to " + format(*hi)
	case lo != nil:
		return ", at least " + format(*lo)
	case hi != nil:
		return ", at most " + format(*hi)
	}
	return ""
}

func exampleOf(s *schemaNode) string {
	switch s.Pattern {
	case durationPattern:
		return "write for example 500ms, 10s or 1h30m"
	case bytesPattern:
		return "write for example 64MiB"
	}
	return "it must match " + s.Pattern
}

var errSchema = errors.New("config: not a schema of options")

// CheckSchema reports why a schema cannot be one of a component's options.
func CheckSchema(schema []byte) error {
	var s schemaNode
	if len(schema) > MaxSchema {
		return fmt.Errorf("%w: it has %d bytes, more than the bound of %d", errSchema, len(schema), MaxSchema)
	}
	if err := json.Unmarshal(schema, &s); err != nil {
		return fmt.Errorf("%w: %w", errSchema, err)
	}
	if !slices.Equal(s.Type, words{"object"}) {
		return fmt.Errorf(`%w: its type is not "object"`, errSchema)
	}
	return nil
}
