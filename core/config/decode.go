package config

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
)

// Decode fills into, a pointer to a struct or map, from YAML. It is strict: an
// unknown key, a value of the wrong type and a number out of range are errors
// (all of them at once, as [Problems]). What the text leaves out keeps its
// value. origin says where the text was written, "server.yaml" or
// "server.yaml:12" for its first line (a column may follow).
//
// Struct fields are named by their yaml tag, or by their name in lower case.
// Beside the usual types Decode knows: [time.Duration] ("500ms"), [Bytes] and
// whole numbers whose key ends in "bytes" or "size" or whose tag has the option
// "bytes" ("64MiB"), [secret.Text], [Component], and everything that is an
// [encoding.TextUnmarshaler]. What was written must pass the field's validate tag,
// whose rules are min, max, oneof and required, as in
// `validate:"required,min=1,max=64KiB"`. Defaults come from [Defaults]; structs
// that Decode makes itself, in lists and mappings, get theirs. A struct field of type [Pos] named Pos with the
// tag "-" receives the place.
func Decode(data []byte, origin string, into any) error {
	file, base := splitOrigin(origin)
	src := newSource(file, base, data)
	root, problems := parse(src, data)
	if len(problems) > 0 {
		return problems
	}
	return decodeRoot(root, into)
}

// splitOrigin returns the file of an origin and the lines before its text.
func splitOrigin(origin string) (file string, base int) {
	file, line, ok := cutNumber(origin)
	if !ok {
		return origin, 0
	}
	if f, l, ok := cutNumber(file); ok { // file:line:col
		file, line = f, l
	}
	return file, line - 1
}

func cutNumber(s string) (before string, n int, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return s, 0, false
	}
	n, err := strconv.Atoi(s[i+1:])
	return s[:i], n, err == nil && n > 0
}

// decodeRoot decodes a whole tree; a nil tree changes nothing.
func decodeRoot(root *node, into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() {
		return fmt.Errorf("config: decode into %T: not a pointer", into)
	}
	var d decoder
	if root == nil {
		root = &node{}
	}
	if root.kind == nullKind {
		if v = v.Elem(); v.Kind() == reflect.Struct {
			d.required(v, root, fieldsOf(v.Type()), func(string) bool { return false }, "")
		}
		if len(d.problems) > 0 {
			return d.problems
		}
		return nil
	}
	d.value(v.Elem(), root, "", false)
	if len(d.problems) > 0 {
		return d.problems
	}
	return nil
}

// decoder fills Go values from nodes and collects what is wrong.
type decoder struct{ problems Problems }

func (d *decoder) fail(n *node, path, what, fix string) {
	p := Problem{Pos: n.pos(), Path: path, Severity: Error, What: what, Fix: fix}
	if !n.secret {
		p.Excerpt = n.src.excerpt(n.line)
	}
	d.problems.add(p)
}

// nodeDecoder is implemented by pointers to types that read nodes themselves.
type nodeDecoder interface {
	decodeNode(d *decoder, n *node, path string)
}

var (
	durationType        = reflect.TypeFor[time.Duration]()
	posType             = reflect.TypeFor[Pos]()
	textUnmarshalerType = reflect.TypeFor[encoding.TextUnmarshaler]()
	nodeDecoderType     = reflect.TypeFor[nodeDecoder]()
)

// value decodes n into v. sized says that a whole number may carry a unit of
// bytes.
func (d *decoder) value(v reflect.Value, n *node, path string, sized bool) {
	if v.CanAddr() && v.Addr().Type().Implements(nodeDecoderType) {
		v.Addr().Interface().(nodeDecoder).decodeNode(d, n, path)
		return
	}
	if v.Kind() == reflect.Pointer {
		if n.kind == nullKind && n.text != "" {
			v.SetZero()
			return
		}
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
			d.fresh(v.Elem(), path)
		}
		d.value(v.Elem(), n, path, sized)
		return
	}
	if n.kind == nullKind && v.Kind() != reflect.Interface {
		d.fail(n, path, "has no value", "write one, or remove the key to keep the default")
		return
	}
	switch {
	case v.Type() == durationType:
		d.duration(v, n, path)
		return
	case v.CanAddr() && v.Addr().Type().Implements(textUnmarshalerType):
		d.text(v, n, path)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.structure(v, n, path)
	case reflect.Map:
		d.mapping(v, n, path, sized)
	case reflect.Slice:
		d.list(v, n, path, sized)
	case reflect.Interface:
		if v.NumMethod() > 0 {
			d.fail(n, path, "cannot be configured", "")
			return
		}
		if x := n.plain(); x == nil {
			v.SetZero()
		} else {
			v.Set(reflect.ValueOf(x))
		}
	default:
		d.scalar(v, n, path, sized)
	}
}

func (d *decoder) scalar(v reflect.Value, n *node, path string, sized bool) {
	if n.kind == mapKind || n.kind == listKind {
		d.wrong(n, path, kindName(v.Kind()))
		return
	}
	switch v.Kind() {
	case reflect.String:
		if _, ok := reference(n); ok || n.secret {
			d.fail(n, path, "does not take a reference: only options that are secrets do", "write the value itself")
			return
		}
		v.SetString(n.text)
	case reflect.Bool:
		if n.kind != boolKind || n.quoted {
			d.wrong(n, path, "true or false")
			return
		}
		v.SetBool(n.text == "true")
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		i, ok := d.integer(n, path, sized)
		if !ok {
			return
		}
		if v.OverflowInt(i) {
			d.outOfRange(v, n, path)
			return
		}
		v.SetInt(i)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		i, ok := d.integer(n, path, sized)
		if !ok {
			return
		}
		if i < 0 || v.OverflowUint(uint64(i)) {
			d.outOfRange(v, n, path)
			return
		}
		v.SetUint(uint64(i))
	case reflect.Float32, reflect.Float64:
		text := n.text
		if n.kind == intKind {
			text = n.number
		}
		f, err := strconv.ParseFloat(strings.ReplaceAll(text, "_", ""), 64)
		if err != nil || n.quoted || math.IsInf(f, 0) || math.IsNaN(f) || v.OverflowFloat(f) {
			d.wrong(n, path, "a number")
			return
		}
		v.SetFloat(f)
	default:
		d.fail(n, path, "cannot be configured: unsupported type "+v.Type().String(), "")
	}
}

// integer reads a whole number, with a unit of bytes if sized.
func (d *decoder) integer(n *node, path string, sized bool) (int64, bool) {
	if sized && n.kind == stringKind {
		b, err := ParseBytes(n.text)
		if err != nil {
			d.fail(n, path, err.Error(), "write for example 64MiB")
			return 0, false
		}
		return int64(b), true
	}
	if n.kind != intKind {
		d.wrong(n, path, "a whole number")
		return 0, false
	}
	i, err := strconv.ParseInt(n.number, 10, 64)
	if err != nil {
		d.fail(n, path, n.text+" is out of range", "")
		return 0, false
	}
	return i, true
}

func (d *decoder) outOfRange(v reflect.Value, n *node, path string) {
	bits := v.Type().Bits()
	lo, hi := "0", strconv.FormatUint(math.MaxUint64>>(64-bits), 10)
	if v.CanInt() {
		lo, hi = strconv.FormatInt(math.MinInt64>>(64-bits), 10), strconv.FormatInt(math.MaxInt64>>(64-bits), 10)
	}
	d.fail(n, path, fmt.Sprintf("%s is out of range, %s to %s", n.text, lo, hi), "")
}

func (d *decoder) duration(v reflect.Value, n *node, path string) {
	switch n.kind {
	case intKind, floatKind:
		if n.number == "0" {
			v.SetInt(0)
			return
		}
		d.fail(n, path, fmt.Sprintf("a duration needs a unit, but %s has none", n.text), fmt.Sprintf("write %sms or %ss", n.text, n.text))
	case stringKind:
		t, err := time.ParseDuration(n.text)
		if err != nil {
			d.fail(n, path, fmt.Sprintf("%q is not a duration", n.text), "write for example 500ms, 10s or 1h30m")
			return
		}
		v.SetInt(int64(t))
	default:
		d.wrong(n, path, "a duration")
	}
}

func (d *decoder) text(v reflect.Value, n *node, path string) {
	if n.kind == mapKind || n.kind == listKind {
		d.wrong(n, path, "text")
		return
	}
	if n.secret {
		if v.Type() != secretType {
			d.fail(n, path, "does not take a reference: only options that are secrets do", "write the value itself")
			return
		}
		v.Set(reflect.ValueOf(secret.New(n.text))) // whatever it looks like
		return
	}
	if err := v.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(n.text)); err != nil {
		d.fail(n, path, err.Error(), "")
	}
}

// wrong reports a value of the wrong type.
func (d *decoder) wrong(n *node, path, want string) {
	got := n.kind.String()
	fix := ""
	switch {
	case n.quoted && want == "true or false", n.quoted && strings.HasSuffix(want, "number"):
		got = "quoted text"
		fix = "remove the quotes"
	case n.kind != mapKind && n.kind != listKind && n.kind != nullKind:
		got = fmt.Sprintf("%q", shorten(n.text))
	}
	if n.secret {
		got = "a secret"
	}
	if want == "true or false" && slices.Contains([]string{"yes", "no", "on", "off"}, strings.ToLower(n.text)) {
		fix = "write true or false"
	}
	d.fail(n, path, fmt.Sprintf("must be %s, not %s", want, got), fix)
}

func (d *decoder) list(v reflect.Value, n *node, path string, sized bool) {
	if n.kind != listKind {
		d.wrong(n, path, "a list")
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.items), len(n.items))
	for i, item := range n.items {
		d.fresh(out.Index(i), path)
		d.value(out.Index(i), item, fmt.Sprintf("%s[%d]", path, i), sized)
	}
	v.Set(out)
}

func (d *decoder) mapping(v reflect.Value, n *node, path string, sized bool) {
	if n.kind != mapKind {
		d.wrong(n, path, "a mapping")
		return
	}
	if v.Type().Key().Kind() != reflect.String {
		d.fail(n, path, "cannot be configured: unsupported type "+v.Type().String(), "")
		return
	}
	out := reflect.MakeMapWithSize(v.Type(), len(n.pairs))
	if !v.IsNil() { // like a struct: what is left out keeps its value
		for _, k := range v.MapKeys() {
			out.SetMapIndex(k, v.MapIndex(k))
		}
	}
	for _, p := range n.pairs {
		item := reflect.New(v.Type().Elem()).Elem()
		d.fresh(item, path)
		d.value(item, p.value, join(path, p.key), sized)
		out.SetMapIndex(reflect.ValueOf(p.key).Convert(v.Type().Key()), item)
	}
	v.Set(out)
}

func (d *decoder) structure(v reflect.Value, n *node, path string) {
	if n.kind != mapKind {
		d.wrong(n, path, "a mapping")
		return
	}
	if f := v.FieldByName("Pos"); f.IsValid() && f.Type() == posType {
		f.Set(reflect.ValueOf(n.pos()))
	}
	fields := fieldsOf(v.Type())
	for _, p := range n.pairs {
		f, ok := fields.byName[p.key]
		if !ok {
			d.unknown(n, p, path, fields.names)
			continue
		}
		fv, err := v.FieldByIndexErr(f.index)
		if err != nil {
			d.fail(p.value, join(path, p.key), "cannot be configured: "+err.Error(), "")
			continue
		}
		before := len(d.problems)
		d.value(fv, p.value, join(path, p.key), f.sized)
		if len(d.problems) == before {
			d.rules(fv, p.value, f, join(path, p.key))
		}
	}
	d.required(v, n, fields, func(key string) bool {
		return slices.ContainsFunc(n.pairs, func(p pair) bool { return p.key == key })
	}, path)
}

func (d *decoder) unknown(n *node, p pair, path string, names []string) {
	at := &node{src: n.src, line: p.line, col: p.col, secret: p.value.secret}
	fix := "remove it; there are no options here"
	if near := channel.Nearest(p.key, names); near != "" {
		fix = fmt.Sprintf("did you mean %q?", near)
	} else if len(names) > 0 {
		fix = "known are " + strings.Join(names, ", ")
	}
	d.fail(at, path, fmt.Sprintf("unknown key %q", shorten(p.key)), fix)
}

// field is a configurable field of a struct.
type field struct {
	name  string
	index []int
	sized bool
	tag   reflect.StructTag
}

type fieldSet struct {
	byName map[string]field
	names  []string // in the order of the struct
}

// fieldsOf lists the configurable fields of a struct type.
func fieldsOf(t reflect.Type) fieldSet {
	s := fieldSet{byName: map[string]field{}}
	for i := range t.NumField() {
		f := t.Field(i)
		name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		options := strings.Split(opts, ",")
		if name == "-" || (!f.IsExported() && !f.Anonymous) {
			continue
		}
		if slices.Contains(options, "inline") && f.Type.Kind() == reflect.Struct {
			inner := fieldsOf(f.Type)
			for _, n := range inner.names {
				g := inner.byName[n]
				g.index = append([]int{i}, g.index...)
				s.put(g)
			}
			continue
		}
		if !f.IsExported() {
			continue
		}
		if name == "" {
			name = strings.ToLower(f.Name)
		}
		s.put(field{name: name, index: []int{i}, tag: f.Tag,
			sized: slices.Contains(options, "bytes") || strings.HasSuffix(name, "bytes") || strings.HasSuffix(name, "size")})
	}
	return s
}

func (s *fieldSet) put(f field) {
	if _, dup := s.byName[f.name]; !dup {
		s.names = append(s.names, f.name)
	}
	s.byName[f.name] = f
}

// plain returns n as maps, slices and scalars of Go.
func (n *node) plain() any {
	switch n.kind {
	case mapKind:
		m := make(map[string]any, len(n.pairs))
		for _, p := range n.pairs {
			m[p.key] = p.value.plain()
		}
		return m
	case listKind:
		l := make([]any, len(n.items))
		for i, item := range n.items {
			l[i] = item.plain()
		}
		return l
	case intKind:
		if i, err := strconv.ParseInt(n.number, 10, 64); err == nil {
			return i
		}
		return n.text
	case floatKind:
		if f, err := strconv.ParseFloat(n.text, 64); err == nil {
			return f
		}
		return n.text
	case boolKind:
		return n.text == "true"
	case stringKind:
		return n.text
	}
	return nil
}

func kindName(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Float32, reflect.Float64:
		return "a number"
	}
	return "a whole number"
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// shorten cuts what a user wrote to a length that fits an error.
func shorten(s string) string {
	if len(s) > 60 {
		return s[:60] + "…"
	}
	return s
}
