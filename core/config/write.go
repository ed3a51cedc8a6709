package config

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel/secret"
)

// nodeOf makes a node of Go values.
func nodeOf(v any, pos Pos) *node {
	n := &node{size: 1}
	if pos.Line > 0 {
		n.src, n.line, n.col = &source{file: pos.File}, pos.Line, pos.Col
	}
	switch v := v.(type) {
	case nil:
	case string:
		n.kind, n.text, n.quoted = stringKind, v, true
	case bool:
		n.kind, n.text = boolKind, strconv.FormatBool(v)
	case int:
		n.kind, n.text, n.number = intKind, strconv.Itoa(v), strconv.Itoa(v)
	case int64:
		s := strconv.FormatInt(v, 10)
		n.kind, n.text, n.number = intKind, s, s
	case float64:
		n.kind, n.text = floatKind, strconv.FormatFloat(v, 'g', -1, 64)
	case time.Duration:
		n.kind, n.text, n.quoted = stringKind, v.String(), true
	case Bytes:
		n.kind, n.text = stringKind, v.String()
		if _, err := strconv.Atoi(n.text); err == nil {
			n.kind, n.number = intKind, n.text
		}
	case secret.Text:
		n.kind, n.text, n.quoted, n.secret = stringKind, v.Reveal(), true, true
	case []string:
		n.kind = listKind
		for _, s := range v {
			n.items = append(n.items, nodeOf(s, pos))
		}
	case []any:
		n.kind = listKind
		for _, x := range v {
			n.items = append(n.items, nodeOf(x, pos))
		}
	case map[string]any:
		n.kind = mapKind
		for _, k := range slices.Sorted(maps.Keys(v)) {
			n.pairs = append(n.pairs, pair{key: k, line: n.line, col: n.col, value: nodeOf(v[k], pos)})
		}
	default:
		n.kind, n.text, n.quoted = stringKind, fmt.Sprint(v), true
	}
	return n
}

// flowWriter writes a node as a YAML flow mapping (JSON, but for the mark of
// secrets), starting a new line where the file did.
type flowWriter struct {
	buf        []byte
	line, base int
}

// maxPad is the most empty lines written to keep line numbers.
const maxPad = 1000

func (w *flowWriter) to(line int) {
	if line -= w.base; line > w.line && line-w.line <= maxPad {
		for w.line < line {
			w.buf = append(w.buf, '\n', ' ')
			w.line++
		}
	}
}

func (w *flowWriter) value(n *node) {
	switch n.kind {
	case mapKind:
		w.buf = append(w.buf, '{')
		for i, p := range n.pairs {
			if i > 0 {
				w.buf = append(w.buf, ',', ' ')
			}
			w.to(p.line + n.baseLine())
			w.buf = append(appendQuoted(w.buf, p.key), ':', ' ')
			w.value(p.value)
		}
		w.buf = append(w.buf, '}')
	case listKind:
		w.buf = append(w.buf, '[')
		for i, item := range n.items {
			if i > 0 {
				w.buf = append(w.buf, ',', ' ')
			}
			w.to(item.line + n.baseLine())
			w.value(item)
		}
		w.buf = append(w.buf, ']')
	case stringKind:
		w.text(n)
	case intKind:
		w.buf = append(w.buf, n.number...)
	case nullKind:
		w.buf = append(w.buf, "null"...)
	default:
		w.buf = append(w.buf, n.text...)
	}
}

func (w *flowWriter) text(n *node) {
	text, secret := n.text, n.secret
	if r, ok := reference(n); ok {
		// What cannot be resolved is left for the decoder to complain about.
		if v, err := r.resolve(); err == nil {
			text, secret = v, true
		}
	}
	if secret {
		w.buf = append(w.buf, secretTag+" "...)
	}
	w.buf = appendQuoted(w.buf, text)
}

func (n *node) baseLine() int {
	if n.src == nil {
		return 0
	}
	return n.src.base
}

// appendQuoted appends s in double quotes, escaped as JSON and YAML both read.
func appendQuoted(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r == '\n':
			b = append(b, '\\', 'n')
		case r == '\t':
			b = append(b, '\\', 't')
		case r == '\r':
			b = append(b, '\\', 'r')
		case r < 0x20 || r == 0x7f || r == 0x85 || r == 0xa0 || r == 0x2028 || r == 0x2029 || r == 0xfeff:
			b = append(b, '\\', 'u', hex[r>>12&15], hex[r>>8&15], hex[r>>4&15], hex[r&15])
		default:
			b = append(b, string(r)...)
		}
	}
	return append(b, '"')
}

// Marshal writes the configuration as YAML that Read reads back to the same
// model. What is not set is left out. Secrets are written as ***, references to
// them as they are.
func Marshal(c *Config) ([]byte, error) {
	n := modelNode(reflect.ValueOf(c).Elem(), false)
	if n == nil {
		return []byte("{}\n"), nil
	}
	var w blockWriter
	w.pairs(n, 0)
	return w.buf, nil
}

// modelNode returns the node of a value of the model, or nil if it is not set.
func modelNode(v reflect.Value, sized bool) *node {
	switch x := v.Interface().(type) {
	case time.Duration:
		if x == 0 {
			return nil
		}
		return &node{kind: stringKind, text: shortDuration(x)}
	case Component:
		return x.node()
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		if n := modelNode(v.Elem(), sized); n != nil {
			return n
		}
		return emptyNode(v.Elem())
	case reflect.Struct:
		fields := fieldsOf(v.Type())
		n := &node{kind: mapKind}
		for _, name := range fields.names {
			f := fields.byName[name]
			if value := modelNode(v.FieldByIndex(f.index), f.sized); value != nil {
				n.pairs = append(n.pairs, pair{key: name, value: value})
			}
		}
		if len(n.pairs) == 0 {
			return nil
		}
		return n
	case reflect.Slice:
		if v.Len() == 0 {
			return nil
		}
		n := &node{kind: listKind}
		for i := range v.Len() {
			item := modelNode(v.Index(i), sized)
			if item == nil {
				item = emptyNode(v.Index(i))
			}
			n.items = append(n.items, item)
		}
		return n
	}
	if v.IsZero() {
		return nil
	}
	if sized && v.CanInt() {
		return nodeOf(Bytes(v.Int()), Pos{})
	}
	return nodeOf(v.Interface(), Pos{})
}

// emptyNode writes a value that is set although it is zero.
func emptyNode(v reflect.Value) *node {
	switch v.Kind() {
	case reflect.Struct:
		return &node{kind: mapKind}
	case reflect.Slice:
		return &node{kind: listKind}
	}
	if v.Type() == durationType {
		return &node{kind: stringKind, text: "0s"}
	}
	return nodeOf(v.Interface(), Pos{})
}

// node returns the component as it would be written.
func (c Component) node() *node {
	if c.IsZero() {
		return nil
	}
	use := nodeOf(c.Use, Pos{})
	if c.Mode == "" && c.options == nil && c.Use != "" {
		return use
	}
	n := &node{kind: mapKind}
	if c.Use != "" {
		n.pairs = append(n.pairs, pair{key: "use", value: use})
	}
	if c.Mode != "" {
		n.pairs = append(n.pairs, pair{key: "mode", value: nodeOf(c.Mode, Pos{})})
	}
	if c.options != nil {
		n.pairs = append(n.pairs, redact(c.options).pairs...)
	}
	return n
}

// shortDuration writes 30m0s as 30m.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// blockWriter writes nodes in block style.
type blockWriter struct{ buf []byte }

func (w *blockWriter) indent(depth int) {
	for range depth {
		w.buf = append(w.buf, ' ', ' ')
	}
}

func (w *blockWriter) pairs(n *node, depth int) {
	for i, p := range n.pairs {
		if i > 0 || depth == 0 || w.buf[len(w.buf)-1] == '\n' {
			w.indent(depth)
		}
		w.buf = append(appendPlain(w.buf, p.key), ':')
		w.value(p.value, depth)
	}
}

// value writes what follows a colon, with the end of the line.
func (w *blockWriter) value(v *node, depth int) {
	switch {
	case v.kind == mapKind && len(v.pairs) > 0:
		w.buf = append(w.buf, '\n')
		w.pairs(v, depth+1)
	case v.kind == listKind && len(v.items) > 0:
		w.buf = append(w.buf, '\n')
		for _, item := range v.items {
			w.indent(depth + 1)
			w.buf = append(w.buf, '-')
			if item.kind == mapKind && len(item.pairs) > 0 {
				w.buf = append(w.buf, ' ')
				w.pairs(item, depth+2)
				continue
			}
			w.value(item, depth+1)
		}
	default:
		w.buf = append(w.buf, ' ')
		w.scalar(v)
		w.buf = append(w.buf, '\n')
	}
}

func (w *blockWriter) scalar(v *node) {
	switch v.kind {
	case mapKind:
		w.buf = append(w.buf, "{}"...)
	case listKind:
		w.buf = append(w.buf, "[]"...)
	case nullKind:
		w.buf = append(w.buf, "null"...)
	case stringKind:
		w.buf = appendPlain(w.buf, v.text)
	case intKind:
		w.buf = append(w.buf, v.number...)
	default:
		w.buf = append(w.buf, v.text...)
	}
}

// plainText matches what YAML 1.1 and 1.2 both read as text without quotes.
var plainText = regexp.MustCompile(`^(/?[A-Za-z][A-Za-z0-9_./+-]*|[0-9]+(\.[0-9]+)*(ns|us|ms|s|m|h|B|[KMG]i?B)([0-9]+(ns|us|ms|s|m|h))*|[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+(:[0-9]+)?)$`)

// appendPlain appends text, in quotes if it needs them.
func appendPlain(b []byte, s string) []byte {
	switch strings.ToLower(s) {
	case "true", "false", "yes", "no", "on", "off", "null", "y", "n":
		return appendQuoted(b, s)
	}
	if plainText.MatchString(s) {
		return append(b, s...)
	}
	return appendQuoted(b, s)
}

// looksSecret reports whether an option of that name holds a secret.
func looksSecret(key string) bool {
	k := strings.ToLower(key)
	for _, word := range []string{"secret", "password", "passwd", "passphrase", "token"} {
		if strings.Contains(k, word) {
			return true
		}
	}
	return k == "key" || strings.HasSuffix(k, "_key") || k == "keys" || strings.HasSuffix(k, "_keys") || strings.HasSuffix(k, "encryptionkey")
}

// redact returns n with *** in place of what looks like a secret, unless it says
// only where the secret is.
func redact(n *node) *node {
	out := *n
	out.pairs, out.items = slices.Clone(n.pairs), slices.Clone(n.items)
	for i, p := range out.pairs {
		_, ref := reference(p.value)
		if scalar := p.value.kind == stringKind || p.value.kind == intKind; scalar && !ref && looksSecret(p.key) && p.value.text != "" {
			out.pairs[i].value = &node{kind: stringKind, text: redacted}
			continue
		}
		out.pairs[i].value = redact(p.value)
		if p.value.kind == listKind && looksSecret(p.key) {
			redactItems(out.pairs[i].value)
		}
	}
	for i, item := range out.items {
		out.items[i] = redact(item)
	}
	if out.secret {
		out.text = redacted
	}
	return &out
}

// redactItems puts *** in place of the items of a list of secrets that are the
// secrets themselves.
func redactItems(list *node) {
	for i, item := range list.items {
		if _, ref := reference(item); !ref && (item.kind == stringKind || item.kind == intKind) && item.text != "" {
			list.items[i] = &node{kind: stringKind, text: redacted}
		}
	}
}
