package config

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
)

// setter changes one value of a model.
type setter struct {
	path, value string
	pos         Pos
}

func (s setter) set(v reflect.Value, steps []string, done string) error {
	if v.Type() == reflect.TypeFor[Component]() {
		return s.component(v.Addr().Interface().(*Component), steps, done)
	}
	if len(steps) == 0 {
		return s.assign(v, done)
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		return s.set(v.Elem(), steps, done)
	case reflect.Struct:
		return s.field(v, steps, done)
	case reflect.Slice:
		return s.element(v, steps, done)
	}
	return fmt.Errorf("config: %s is a single value: there is no %s below it", done, steps[0])
}

func (s setter) field(v reflect.Value, steps []string, done string) error {
	fields := fieldsOf(v.Type())
	f, ok := fields.byName[steps[0]]
	if !ok {
		where := "the configuration"
		if done != "" {
			where = done
		}
		msg := fmt.Sprintf("config: %s has no %q; it has %s", where, steps[0], strings.Join(fields.names, ", "))
		if near := channel.Nearest(steps[0], fields.names); near != "" {
			msg += fmt.Sprintf("; did you mean %q?", near)
		}
		return fmt.Errorf("%s", msg)
	}
	if x, ok := v.Addr().Interface().(*Context); ok && x.Placeholder && (f.name == "app" || f.name == "dir") {
		x.App, x.Placeholder = "", false
	}
	fv := v.FieldByIndex(f.index)
	if len(steps) == 1 && fv.Type() != reflect.TypeFor[Component]() {
		return s.assignSized(fv, join(done, steps[0]), f.sized)
	}
	return s.set(fv, steps[1:], join(done, steps[0]))
}

func (s setter) element(v reflect.Value, steps []string, done string) error {
	name, ok := strings.CutPrefix(steps[0], "[")
	if !ok {
		return fmt.Errorf("config: %s is a list: choose an element, %s[0].%s", done, done, steps[0])
	}
	name = strings.TrimSuffix(name, "]")
	s.fillList(v, done)
	i, err := strconv.Atoi(name)
	if err != nil {
		names := elementNames(v)
		if i = slices.Index(names, name); i < 0 {
			return fmt.Errorf("config: %s has no element %q; it has %s", done, name, orNone(names))
		}
	}
	switch {
	case i < 0 || i > v.Len():
		return fmt.Errorf("config: %s[%d] does not exist: the list has %d elements, [%d] would add one", done, i, v.Len(), v.Len())
	case i == v.Len():
		v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
	}
	return s.set(v.Index(i), steps[1:], done+steps[0])
}

// fillList puts the default elements into an empty list, so that they can be
// chosen.
func (s setter) fillList(v reflect.Value, done string) {
	if v.Len() > 0 {
		return
	}
	switch done {
	case "connectors":
		v.Set(reflect.ValueOf([]Connector{{}}))
	case "engine.hosts":
		v.Set(reflect.ValueOf([]Host{{Name: defaultHostName}}))
	case "cluster.channel.interceptors":
		v.Set(reflect.ValueOf(components(defaultInterceptors)))
	}
}

// elementNames returns what the elements of a list are called.
func elementNames(v reflect.Value) []string {
	names := make([]string, v.Len())
	for i := range names {
		switch e := v.Index(i).Interface().(type) {
		case Component:
			names[i] = e.Use
		case Host:
			names[i] = e.Name
		case Context:
			names[i] = e.Path
		case Connector:
			names[i] = e.Address
		case string:
			names[i] = e
		}
	}
	return names
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

func (s setter) assign(v reflect.Value, done string) error { return s.assignSized(v, done, false) }

// assignSized gives v the value.
func (s setter) assignSized(v reflect.Value, done string, sized bool) error {
	n, err := s.node(wantsText(v.Type()))
	if err != nil {
		return err
	}
	var d decoder
	d.value(v, n, done, sized)
	if len(d.problems) > 0 {
		return d.problems
	}
	return nil
}

// wantsText reports whether a value of type t is taken as it is.
func wantsText(t reflect.Type) bool {
	return t.Kind() == reflect.String || reflect.PointerTo(t).Implements(textUnmarshalerType)
}

// node makes a node of the value.
func (s setter) node(text bool) (*node, error) {
	plain := nodeOf(s.value, Pos{})
	src := &source{file: s.pos.File}
	if text {
		plain.src = src
		return plain, nil
	}
	n, problems := parse(src, []byte(s.value))
	if len(problems) > 0 {
		return nil, problems
	}
	if n == nil {
		return &node{src: src}, nil
	}
	n.unplace()
	return n, nil
}

// unplace forgets where n stands: a value of the command line has no line.
func (n *node) unplace() {
	n.line, n.col = 0, 0
	for i := range n.pairs {
		n.pairs[i].line, n.pairs[i].col = 0, 0
		n.pairs[i].value.unplace()
	}
	for _, item := range n.items {
		item.unplace()
	}
}

func (s setter) component(c *Component, steps []string, done string) error {
	if len(steps) == 0 {
		n, err := s.node(false)
		if err != nil {
			return err
		}
		var d decoder
		c.decodeNode(&d, n, done)
		if len(d.problems) > 0 {
			return d.problems
		}
		return nil
	}
	if len(steps) == 1 && (steps[0] == "use" || steps[0] == "mode") {
		to := map[string]*string{"use": &c.Use, "mode": &c.Mode}[steps[0]]
		if steps[0] == "mode" && !slices.Contains(modes, s.value) {
			return fmt.Errorf("config: %s.mode: unknown mode %q; known are direct, bridged, process", done, s.value)
		}
		*to = s.value
		return nil
	}
	n, err := s.node(false)
	if err != nil {
		n = nodeOf(s.value, Pos{}) // not YAML, like [::1]:80: then it is text
		n.src = &source{file: s.pos.File}
	}
	c.options, err = setOption(c.options, steps, n, done)
	return err
}

// setOption returns a copy of the tree in which the value at steps is v.
func setOption(n *node, steps []string, v *node, done string) (*node, error) {
	if len(steps) == 0 {
		return v, nil
	}
	out := &node{kind: mapKind}
	if n != nil {
		*out = *n
	}
	if index, ok := strings.CutPrefix(steps[0], "["); ok {
		i, err := strconv.Atoi(strings.TrimSuffix(index, "]"))
		if n == nil && i == 0 {
			out.kind = listKind
		}
		if err != nil || out.kind != listKind || i < 0 || i > len(out.items) {
			return nil, fmt.Errorf("config: %s%s does not exist", done, steps[0])
		}
		var old *node
		out.items = slices.Clone(out.items)
		if i == len(out.items) {
			out.items = append(out.items, nil)
		}
		old = out.items[i]
		out.items[i], err = setOption(old, steps[1:], v, done+steps[0])
		return out, err
	}
	if out.kind != mapKind {
		return nil, fmt.Errorf("config: %s is a single value: there is no %s below it", done, steps[0])
	}
	out.pairs = slices.Clone(out.pairs)
	i := slices.IndexFunc(out.pairs, func(p pair) bool { return p.key == steps[0] })
	if i < 0 {
		i = len(out.pairs)
		out.pairs = append(out.pairs, pair{key: steps[0]})
	}
	var err error
	out.pairs[i].value, err = setOption(out.pairs[i].value, steps[1:], v, join(done, steps[0]))
	return out, err
}
