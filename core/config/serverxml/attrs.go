package serverxml

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/config"
)

// attrs hands out the attributes of one element and remembers which were asked
// for, so that the rest can be reported.
type attrs struct {
	r     *reader
	el    *element
	known []string
	used  map[int]bool
}

// open starts reading an element whose name in Tomcat is name.
func (r *reader) open(el *element, name string) *attrs {
	if el.name != name {
		r.warn(el.pos, fmt.Sprintf("the element <%s> is written <%s> in Tomcat; it is read as that", el.name, name),
			"Tomcat ignores elements in another letter case: it starts without them, with a line in its log", "write <"+name+">")
	}
	return &attrs{r: r, el: el, used: map[int]bool{}}
}

// find returns the attribute of one of the names (the first is the current one,
// the others are older), or nil.
func (a *attrs) find(names ...string) *attr {
	a.known = append(a.known, names...)
	for _, name := range names {
		for i := range a.el.attrs {
			at := &a.el.attrs[i]
			if !strings.EqualFold(at.name, name) || a.used[i] {
				continue
			}
			a.used[i] = true
			if at.name != name {
				a.r.warn(at.pos, fmt.Sprintf("the attribute %s of <%s> is written %s in Tomcat; it is read as that", at.name, a.el.name, name),
					"Tomcat ignores attributes in another letter case", "write "+name)
			}
			return at
		}
	}
	return nil
}

// get returns an attribute's value with properties replaced, or "".
func (a *attrs) get(names ...string) string {
	if at := a.find(names...); at != nil {
		return a.r.expand(strings.TrimSpace(at.value), at.pos)
	}
	return ""
}

// has reports whether an attribute is written.
func (a *attrs) has(name string) bool {
	return slices.ContainsFunc(a.el.attrs, func(at attr) bool { return strings.EqualFold(at.name, name) })
}

// posOf returns the place of an attribute, or of the element.
func (a *attrs) posOf(name string) config.Pos {
	for _, at := range a.el.attrs {
		if strings.EqualFold(at.name, name) {
			return at.pos
		}
	}
	return a.el.pos
}

// number returns a whole number; ok is false if it is missing or wrong, which
// has then been reported.
func (a *attrs) number(lo, hi int, names ...string) (n int, ok bool) {
	at := a.find(names...)
	if at == nil {
		return 0, false
	}
	text := a.r.expand(strings.TrimSpace(at.value), at.pos)
	n, err := strconv.Atoi(text)
	if err != nil {
		a.r.fail(at.pos, fmt.Sprintf("%s=%q is not a whole number", at.name, cut(text)), "write a number")
		return 0, false
	}
	if n < lo || n > hi {
		a.r.fail(at.pos, fmt.Sprintf("%s=%d is out of range, %d to %d", at.name, n, lo, hi), "")
		return 0, false
	}
	return n, true
}

// millis returns a time in milliseconds.
func (a *attrs) millis(names ...string) (time.Duration, bool) {
	n, ok := a.number(-1, math.MaxInt32, names...)
	return time.Duration(n) * time.Millisecond, ok
}

// boolean returns whether an attribute is true, and def if it is missing.
func (a *attrs) boolean(def bool, names ...string) bool {
	at := a.find(names...)
	if at == nil {
		return def
	}
	switch v := strings.ToLower(strings.TrimSpace(at.value)); v {
	case "true", "yes", "on":
		return true
	case "false", "no", "off":
		return false
	default:
		a.r.warn(at.pos, fmt.Sprintf("%s=%q is neither true nor false", at.name, cut(at.value)), "Tomcat takes it for false", "")
		return false
	}
}

// ignore names attributes that have no meaning here and need no word.
func (a *attrs) ignore(names string) { a.find1(strings.Fields(names)) }

// find1 marks attributes as used and returns those that are written.
func (a *attrs) find1(names []string) (written []string) {
	a.known = append(a.known, names...)
	for i, at := range a.el.attrs {
		if !a.used[i] && slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, at.name) }) {
			a.used[i] = true
			written = append(written, at.name)
		}
	}
	return written
}

// unused names attributes that do something in Tomcat and nothing here; those
// that are written are reported in one note, with the reason.
func (a *attrs) unused(names, why string) {
	if written := a.find1(strings.Fields(names)); len(written) > 0 {
		a.r.note(a.el.pos, fmt.Sprintf("not used here: %s of <%s>", strings.Join(written, ", "), a.el.name), why, "")
	}
}

// done reports the attributes that nobody asked for.
func (a *attrs) done() {
	for i, at := range a.el.attrs {
		if a.used[i] || strings.EqualFold(at.name, "className") {
			continue
		}
		fix := "remove it"
		if near := channel.Nearest(at.name, a.known); near != "" {
			fix = fmt.Sprintf("did you mean %s?", near)
		}
		a.r.warn(at.pos, fmt.Sprintf("unknown attribute %s of <%s>", cut(at.name), a.el.name), "Tomcat ignores it as well, with a line in its log", fix)
	}
}

// class returns the last part of className, without its package: packages have
// moved between versions.
func (a *attrs) class() string {
	full := a.get("className")
	return full[strings.LastIndexByte(full, '.')+1:]
}

// child finds the name in Tomcat of a child element among the given ones, or
// reports it as unknown and returns "".
func (r *reader) child(parent, el *element, names string) string {
	list := strings.Fields(names)
	for _, n := range list {
		if strings.ToLower(n) == el.lower {
			return n
		}
	}
	fix := "remove it"
	if near := channel.Nearest(el.name, list); near != "" {
		fix = fmt.Sprintf("did you mean <%s>?", near)
	}
	r.warn(el.pos, fmt.Sprintf("unknown element <%s> in <%s>: it is left out", cut(el.name), parent.name), "Tomcat ignores it as well, with a line in its log", fix)
	return ""
}

// cut shortens what a user wrote to a length that fits a sentence.
func cut(s string) string {
	if len(s) > 60 {
		return s[:60] + "…"
	}
	return s
}
