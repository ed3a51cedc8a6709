package config

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel/secret"
)

// Defaults gives the fields of a configuration struct, to which into points,
// the values of their default tags, structs inside of it included. Fields that
// hold something already keep it. A tag is written like a value in a file; a
// list is written "[a, b]" or "a b":
//
//	type Config struct {
//		MinSize int           `yaml:"min_size" default:"1KiB" validate:"min=1" doc:"bodies smaller than this are left alone"`
//		Level   string        `yaml:"level" default:"fast" validate:"oneof=fast best"`
//		Wait    time.Duration `yaml:"wait" default:"500ms"`
//		Key     secret.Text   `yaml:"key" validate:"required"`
//	}
//
// An error is a mistake in the tags: a default of the wrong type, one that the
// validate tag refuses, or a default for a secret.
func Defaults(into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("config: defaults of %T: not a pointer to a struct", into)
	}
	var d decoder
	d.defaults(v.Elem(), "")
	if len(d.problems) > 0 {
		return fmt.Errorf("config: the tags of %s: %w", v.Elem().Type(), d.problems)
	}
	return nil
}

// defaults fills v, a struct, from its tags.
func (d *decoder) defaults(v reflect.Value, path string) {
	fields := fieldsOf(v.Type())
	for _, name := range fields.names {
		f := fields.byName[name]
		fv, err := v.FieldByIndexErr(f.index)
		if err != nil {
			continue // inside of an embedded pointer that is not set
		}
		at := join(path, name)
		text, ok := f.tag.Lookup("default")
		switch {
		case !ok && plainStruct(fv.Type()):
			d.defaults(fv, at)
		case !ok || !fv.IsZero():
		case fv.Type() == secretType:
			d.fail(&node{}, at, "a secret has no default", "remove the tag")
		default:
			n, err := tagNode(fv.Type(), text)
			if err != nil {
				d.fail(&node{}, at, err.Error(), "")
				continue
			}
			before := len(d.problems)
			d.value(fv, n, at, f.sized)
			if len(d.problems) == before {
				d.rules(fv, n, f, at)
			}
		}
	}
}

// fresh gives a struct that the decoder has made itself its defaults.
func (d *decoder) fresh(v reflect.Value, path string) {
	if plainStruct(v.Type()) {
		d.defaults(v, path)
	}
}

var secretType = reflect.TypeFor[secret.Text]()

// plainStruct reports whether t is a struct whose fields are options, not a
// value that reads itself.
func plainStruct(t reflect.Type) bool {
	p := reflect.PointerTo(t)
	return t.Kind() == reflect.Struct && !p.Implements(nodeDecoderType) && !p.Implements(textUnmarshalerType)
}

// tagNode reads the text of a default tag for a value of type t.
func tagNode(t reflect.Type, text string) (*node, error) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	isText := t.Kind() == reflect.String || reflect.PointerTo(t).Implements(textUnmarshalerType)
	if isText && !reflect.PointerTo(t).Implements(nodeDecoderType) {
		return &node{kind: stringKind, text: text, size: 1}, nil
	}
	if t.Kind() == reflect.Slice && !strings.HasPrefix(text, "[") {
		list := &node{kind: listKind, size: 1}
		for _, word := range strings.Fields(text) {
			item, err := tagNode(t.Elem(), word)
			if err != nil {
				return nil, err
			}
			list.items = append(list.items, item)
		}
		return list, nil
	}
	n, problems := parse(newSource("the default tag", 0, []byte(text)), []byte(text))
	if len(problems) > 0 {
		return nil, problems
	}
	if n == nil {
		return nil, fmt.Errorf("the default is empty")
	}
	return n, nil
}

// rules are the parts of a validate tag. Numbers, durations and byte sizes are
// compared by their value, texts, lists and mappings by their length.
type rules struct {
	min, max string
	oneof    []string
	required bool
}

func rulesOf(tag string) (rules, error) {
	var r rules
	for part := range strings.SplitSeq(tag, ",") {
		key, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		switch key {
		case "":
		case "min":
			r.min = value
		case "max":
			r.max = value
		case "oneof":
			r.oneof = strings.Fields(value)
		case "required":
			r.required = true
		default:
			return r, fmt.Errorf("the program's tag validate:%q has the unknown rule %q (known: min, max, oneof, required)", tag, key)
		}
	}
	return r, nil
}

// rules checks a value that was read from n against its field's validate tag.
func (d *decoder) rules(v reflect.Value, n *node, f field, path string) {
	tag := f.tag.Get("validate")
	if tag == "" {
		return
	}
	r, err := rulesOf(tag)
	if err != nil {
		d.fail(n, path, err.Error(), "")
		return
	}
	for v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return
		}
		v = v.Elem()
	}
	for _, bound := range []struct {
		text, word string
		wrong      int
	}{{r.min, "at least", -1}, {r.max, "at most", 1}} {
		if bound.text == "" {
			continue
		}
		c, length, err := compareTo(v, bound.text)
		switch {
		case err != nil:
			d.fail(n, path, fmt.Sprintf("the program's tag validate:%q: %v", tag, err), "")
		case c == bound.wrong && length:
			d.fail(n, path, fmt.Sprintf("has the length %d, must have %s %s", lengthOf(v), bound.word, bound.text), "")
		case c == bound.wrong:
			d.fail(n, path, fmt.Sprintf("is %s, must be %s %s", shorten(n.text), bound.word, bound.text), "")
		}
	}
	if len(r.oneof) == 0 {
		return
	}
	values := []*node{n}
	if n.kind == listKind {
		values = n.items
	}
	for _, item := range values {
		if !slices.Contains(r.oneof, item.text) {
			shown := fmt.Sprintf("%q", shorten(item.text))
			if item.secret || v.Type() == secretType {
				shown = "the secret"
			}
			d.fail(item, path, shown+" is none of "+strings.Join(r.oneof, ", "), "")
		}
	}
}

// required reports what must be there and is not; present says which keys were
// written.
func (d *decoder) required(v reflect.Value, n *node, fields fieldSet, present func(string) bool, path string) {
	for _, name := range fields.names {
		f := fields.byName[name]
		r, err := rulesOf(f.tag.Get("validate"))
		if err != nil || !r.required || present(name) {
			continue // a broken tag is reported with the value
		}
		if fv, err := v.FieldByIndexErr(f.index); err == nil && fv.IsZero() {
			d.fail(n, join(path, name), "is missing, and there is no default", fmt.Sprintf("add %q", name+": …"))
		}
	}
}

func lengthOf(v reflect.Value) int {
	if v.Type() == secretType {
		return len(v.Interface().(secret.Text).Reveal())
	}
	return v.Len()
}

// compareTo compares v with a bound as it is written in a tag; length says that
// it was the length of v.
func compareTo(v reflect.Value, bound string) (c int, length bool, err error) {
	switch {
	case v.Type() == durationType:
		b, err := time.ParseDuration(bound)
		return cmp.Compare(v.Int(), int64(b)), false, err
	case v.Type() == secretType:
		b, err := strconv.Atoi(bound)
		return cmp.Compare(lengthOf(v), b), true, err
	}
	switch v.Kind() {
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		b, err := strconv.ParseInt(bound, 10, 64)
		if err != nil {
			var size Bytes
			size, err = ParseBytes(bound)
			b = int64(size)
		}
		return cmp.Compare(v.Int(), b), false, err
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		b, err := strconv.ParseUint(bound, 10, 64)
		if err != nil {
			var size Bytes
			size, err = ParseBytes(bound)
			b = uint64(size)
		}
		return cmp.Compare(v.Uint(), b), false, err
	case reflect.Float32, reflect.Float64:
		b, err := strconv.ParseFloat(bound, 64)
		return cmp.Compare(v.Float(), b), false, err
	case reflect.String, reflect.Slice, reflect.Map:
		b, err := strconv.Atoi(bound)
		return cmp.Compare(v.Len(), b), true, err
	}
	return 0, false, fmt.Errorf("a %s has no bounds", v.Type())
}
