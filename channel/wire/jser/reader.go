package jser

import (
	"math"
	"strings"
)

// Limits bounds what is read. A zero field means its default.
type Limits struct {
	// Size is the most bytes of a stream; 64 MiB by default.
	Size int
	// Depth is how deep values may be nested; 100 by default.
	Depth int
	// Expanded bounds a value with every reference written out: the bytes of
	// its strings and numbers and 64 for each value; 256 MiB by default. It
	// stops a short stream whose lists hold each other many times over.
	Expanded int
	// KeepUnlisted reads objects of classes that are not listed as *Object,
	// and their enumerations as Enum, instead of refusing the stream.
	KeepUnlisted bool
}

// Defaults of [Limits].
const (
	DefaultSize     = 64 << 20
	DefaultDepth    = 100
	DefaultExpanded = 256 << 20
)

// maxChain bounds the super classes of a class.
const maxChain = 16

const magic = "\xac\xed\x00\x05"

// Type codes.
const (
	tcNull      = 0x70
	tcReference = 0x71
	tcClassDesc = 0x72
	tcObject    = 0x73
	tcString    = 0x74
	tcArray     = 0x75
	tcClass     = 0x76
	tcBlock     = 0x77
	tcEnd       = 0x78
	tcReset     = 0x79
	tcLongBlock = 0x7a
	tcException = 0x7b
	tcLongStr   = 0x7c
	tcProxy     = 0x7d
	tcEnum      = 0x7e

	baseHandle = 0x7e0000
)

// Decode reads a stream that is one value. The result shares no memory with b.
func Decode(b []byte, l Limits) (Value, error) {
	items, err := Parse(b, l)
	switch {
	case err != nil:
		return nil, err
	case len(items) == 0:
		return nil, &Error{ErrTruncated, len(b), ""}
	case len(items) > 1:
		return nil, &Error{ErrTrailing, len(b), ""}
	}
	if _, ok := items[0].(Block); ok {
		return nil, &Error{ErrCode, len(magic), "bytes where a value should be"}
	}
	return items[0], nil
}

// Parse reads a stream of any values and [Block]s of bytes. Adjacent blocks are
// one.
func Parse(b []byte, l Limits) ([]Value, error) {
	if l.Size <= 0 {
		l.Size = DefaultSize
	}
	if l.Depth <= 0 {
		l.Depth = DefaultDepth
	}
	if l.Expanded <= 0 {
		l.Expanded = DefaultExpanded
	}
	if len(b) > l.Size {
		return nil, &Error{ErrTooLarge, 0, ""}
	}
	if len(b) < len(magic) || string(b[:len(magic)]) != magic {
		return nil, &Error{ErrHeader, 0, ""}
	}
	r := &reader{b: b, p: len(magic), l: l}
	items, _ := r.items(0, false)
	if r.err != nil {
		return nil, r.err
	}
	return items, nil
}

// Stream reports whether b starts as an object stream does.
func Stream(b []byte) bool { return len(b) >= len(magic) && string(b[:len(magic)]) == magic }

// handle is what a reference may point to: a class or a value.
type handle struct {
	class *Class
	value Value
	cost  int
	done  bool
}

type reader struct {
	b   []byte
	p   int
	l   Limits
	h   []handle
	err error
}

func (r *reader) fail(k *Kind, detail string) {
	if r.err == nil {
		r.err = &Error{k, r.p, detail}
		r.p = len(r.b)
	}
}

// take returns the next n bytes, or nil.
func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b)-r.p {
		r.fail(ErrTruncated, "")
		return nil
	}
	b := r.b[r.p : r.p+n : r.p+n]
	r.p += n
	return b
}

func (r *reader) u8() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return be16(b)
	}
	return 0
}

func (r *reader) i32() int32 {
	if b := r.take(4); b != nil {
		return int32(be32(b))
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.take(8); b != nil {
		return be64(b)
	}
	return 0
}

// length reads an i32 that counts things of at least size bytes each.
func (r *reader) length(size int) int {
	n := int(r.i32())
	if n < 0 || n > (len(r.b)-r.p)/size {
		r.fail(ErrTruncated, "a length is negative or beyond the end")
		return 0
	}
	return n
}

func (r *reader) text(b []byte) string {
	if r.err != nil {
		return ""
	}
	s, ok := decodeText(b)
	if !ok {
		r.fail(ErrText, "")
	}
	return s
}

func (r *reader) utf() string { return r.text(r.take(int(r.u16()))) }

// open reserves the next handle.
func (r *reader) open() int {
	r.h = append(r.h, handle{})
	return len(r.h) - 1
}

// close says what the handle stands for.
func (r *reader) close(i int, v Value, cost int) (Value, int) {
	if r.err != nil {
		return nil, 0
	}
	r.h[i] = handle{value: v, cost: cost, done: true}
	return v, cost
}

func (r *reader) reference() *handle {
	i := int64(r.i32()) - baseHandle
	if r.err != nil {
		return nil
	}
	if i < 0 || i >= int64(len(r.h)) {
		r.fail(ErrHandle, "")
		return nil
	}
	return &r.h[i]
}

// add sums costs.
func (r *reader) add(a, b int) int {
	if a += b; a > r.l.Expanded {
		r.fail(ErrTooLarge, "with all references written out")
	}
	return a
}

// baseCost is about what a value costs in memory, beside its bytes.
const baseCost = 64

// items reads values and blocks: to the end mark, or to the end of the stream.
func (r *reader) items(depth int, inside bool) (items []Value, cost int) {
	var block Block
	for r.err == nil {
		if !inside && r.p == len(r.b) {
			break
		}
		c := r.u8()
		switch {
		case r.err != nil:
			return nil, 0
		case c == tcEnd && inside:
			if block != nil {
				items = append(items, block)
			}
			return items, cost
		case c == tcBlock || c == tcLongBlock:
			n := 0
			if c == tcBlock {
				n = int(r.u8())
			} else {
				n = r.length(1)
			}
			if b := r.take(n); n > 0 {
				block = append(block, b...)
			}
			cost = r.add(cost, baseCost+n)
		default:
			if block != nil {
				items = append(items, block)
				block = nil
			}
			v, n := r.content(c, depth)
			items = append(items, v)
			cost = r.add(cost, n)
		}
	}
	if block != nil {
		items = append(items, block)
	}
	return items, cost
}

// value reads one value, with its type code.
func (r *reader) value(depth int) (Value, int) { return r.content(r.u8(), depth) }

// content reads one value whose type code is c.
func (r *reader) content(c byte, depth int) (v Value, cost int) {
	if r.err != nil {
		return nil, 0
	}
	if depth > r.l.Depth {
		r.fail(ErrDepth, "")
		return nil, 0
	}
	switch c {
	case tcNull:
		return nil, baseCost
	case tcReference:
		h := r.reference()
		switch {
		case h == nil:
		case h.class != nil:
			r.fail(ErrHandle, "a class where a value should be")
		case !h.done:
			r.fail(ErrLoop, "")
		default:
			return h.value, h.cost
		}
		return nil, 0
	case tcString, tcLongStr:
		i, n := r.open(), 0
		if c == tcString {
			n = int(r.u16())
		} else if long := r.u64(); long > uint64(len(r.b)-r.p) {
			r.fail(ErrTruncated, "a length is negative or beyond the end")
		} else {
			n = int(long)
		}
		s := r.text(r.take(n))
		return r.close(i, s, r.add(baseCost, len(s)))
	case tcEnum:
		class := r.classDesc(depth)
		i := r.open()
		name, n := r.value(depth + 1)
		s, ok := name.(string)
		switch {
		case r.err != nil:
			return nil, 0
		case class == nil || !ok:
			r.fail(ErrCode, "enumeration without class or name")
			return nil, 0
		case !listed(class.Name) && !r.l.KeepUnlisted:
			r.fail(ErrClass, show(class.Name))
			return nil, 0
		}
		return r.close(i, Enum{class.Name, s}, r.add(baseCost, n))
	case tcArray:
		return r.array(depth)
	case tcObject:
		return r.object(depth)
	case tcProxy:
		r.fail(ErrProxy, "")
	case tcClass, tcClassDesc, tcReset, tcException:
		r.fail(ErrUnsupported, "")
	default:
		r.fail(ErrCode, "")
	}
	return nil, 0
}

// classDesc reads the description of a class, nil for null.
func (r *reader) classDesc(depth int) *Class {
	var first *Class
	link := &first
	for range maxChain {
		c := r.u8()
		switch {
		case r.err != nil:
			return nil
		case c == tcNull:
			return first
		case c == tcReference:
			h := r.reference()
			switch {
			case h == nil:
			case h.class == nil:
				r.fail(ErrHandle, "a value where a class should be")
			case !h.done:
				r.fail(ErrLoop, "class")
			default:
				*link = h.class
				if chain(first) > maxChain {
					r.fail(ErrDepth, "super classes")
				}
			}
			return first
		case c == tcProxy:
			r.fail(ErrProxy, "")
			return nil
		case c != tcClassDesc:
			r.fail(ErrCode, "where a class should be")
			return nil
		}
		d := &Class{Name: r.utf(), UID: r.u64()}
		i := r.open()
		r.h[i].class = d
		d.Flags = r.u8()
		for range r.u16() {
			t := r.u8()
			f := Field{Name: r.utf(), Type: string(t)}
			if t == 'L' || t == '[' {
				v, _ := r.value(depth + 1)
				f.Type, _ = v.(string)
			}
			if r.err == nil && !fieldType(t, f.Type) {
				r.fail(ErrCode, "type of a field")
			}
			if r.err != nil {
				return nil
			}
			d.Fields = append(d.Fields, f)
		}
		if r.err == nil && !r.skipAnnotation(depth) {
			return nil
		}
		*link, link = d, &d.Super
		// A description may be used by values of its super classes' fields only
		// after it is complete; loops in it cannot be built.
		r.h[i].done = true
	}
	r.fail(ErrDepth, "super classes")
	return nil
}

// skipAnnotation reads what a class loader has added to a description.
func (r *reader) skipAnnotation(depth int) bool {
	if r.p < len(r.b) && r.b[r.p] == tcEnd {
		r.p++
		return true
	}
	_, _ = r.items(depth+1, true)
	return r.err == nil
}

func chain(c *Class) (n int) {
	for ; c != nil && n <= maxChain; c = c.Super {
		n++
	}
	return n
}

func fieldType(t byte, sig string) bool {
	switch t {
	case 'L':
		return len(sig) > 2 && sig[0] == 'L' && sig[len(sig)-1] == ';'
	case '[':
		return len(sig) > 1 && sig[0] == '['
	}
	return strings.IndexByte("BCDFIJSZ", t) >= 0
}

// primitive reads a primitive, or a value for the types L and [.
func (r *reader) primitive(t byte, depth int) (Value, int) {
	switch t {
	case 'B':
		return int8(r.u8()), 1
	case 'C':
		return Char(r.u16()), 2
	case 'D':
		return math.Float64frombits(r.u64()), 8
	case 'F':
		return math.Float32frombits(uint32(r.i32())), 4
	case 'I':
		return r.i32(), 4
	case 'J':
		return int64(r.u64()), 8
	case 'S':
		return int16(r.u16()), 2
	case 'Z':
		return r.u8() != 0, 1
	}
	return r.value(depth)
}

// numbers reads n numbers of size bytes each.
func numbers[T any](r *reader, size int, get func([]byte) T) (v []T, cost int) {
	n := r.length(size)
	b := r.take(n * size)
	v = make([]T, n, max(n, 1)) // at least 1: empty arrays are different objects
	for i := range v {
		v[i] = get(b[i*size:])
	}
	return v, r.add(baseCost, n*size)
}

func (r *reader) array(depth int) (Value, int) {
	class := r.classDesc(depth)
	i := r.open()
	if r.err != nil {
		return nil, 0
	}
	if class == nil || len(class.Name) < 2 || class.Name[0] != '[' {
		r.fail(ErrCode, "array without class")
		return nil, 0
	}
	var v Value
	var cost int
	switch class.Name {
	case "[B":
		v, cost = numbers(r, 1, func(b []byte) byte { return b[0] })
	case "[Z":
		v, cost = numbers(r, 1, func(b []byte) bool { return b[0] != 0 })
	case "[S":
		v, cost = numbers(r, 2, func(b []byte) int16 { return int16(be16(b)) })
	case "[C":
		v, cost = numbers(r, 2, func(b []byte) Char { return Char(be16(b)) })
	case "[I":
		v, cost = numbers(r, 4, func(b []byte) int32 { return int32(be32(b)) })
	case "[J":
		v, cost = numbers(r, 8, func(b []byte) int64 { return int64(be64(b)) })
	case "[F":
		v, cost = numbers(r, 4, func(b []byte) float32 { return math.Float32frombits(be32(b)) })
	case "[D":
		v, cost = numbers(r, 8, func(b []byte) float64 { return math.Float64frombits(be64(b)) })
	default:
		if t := class.Name[1]; t != 'L' && t != '[' {
			r.fail(ErrCode, "type of an array")
			return nil, 0
		}
		if !listed(class.Name) && !r.l.KeepUnlisted {
			r.fail(ErrClass, show(class.Name))
			return nil, 0
		}
		a := &Array{Class: class.Name}
		cost = baseCost
		for range r.length(1) {
			x, n := r.value(depth + 1)
			if cost = r.add(cost, n); r.err != nil {
				return nil, 0
			}
			a.Items = append(a.Items, x)
		}
		if classes[class.Name] == nil {
			known := *class
			a.uid = &known
		}
		v = a
	}
	return r.close(i, v, cost)
}

func (r *reader) object(depth int) (Value, int) {
	class := r.classDesc(depth)
	i := r.open()
	if r.err != nil {
		return nil, 0
	}
	if class == nil {
		r.fail(ErrCode, "object without class")
		return nil, 0
	}
	if !listed(class.Name) && !r.l.KeepUnlisted {
		r.fail(ErrClass, show(class.Name))
		return nil, 0
	}
	o := &Object{Class: class}
	cost := baseCost
	switch {
	case class.Flags&0x10 != 0 || class.Flags&0x06 == 0 || class.Flags&0x06 == 0x06:
		r.fail(ErrUnsupported, "flags of a class")
		return nil, 0
	case class.Flags&0x04 != 0:
		if class.Flags&0x08 == 0 {
			r.fail(ErrUnsupported, "externalizable class of the first protocol")
			return nil, 0
		}
		items, n := r.items(depth+1, true)
		o.Parts, cost = []Part{{Class: class, Items: items}}, r.add(cost, n)
	default:
		o.Parts = make([]Part, chain(class))
		for k, c := len(o.Parts)-1, class; k >= 0; k, c = k-1, c.Super {
			o.Parts[k].Class = c
		}
		for k := range o.Parts {
			p := &o.Parts[k]
			for _, f := range p.Class.Fields {
				v, n := r.primitive(f.Type[0], depth+1)
				if cost = r.add(cost, n+16); r.err != nil {
					return nil, 0
				}
				p.Fields = append(p.Fields, v)
			}
			if p.Class.Flags&0x01 != 0 {
				items, n := r.items(depth+1, true)
				p.Items, cost = items, r.add(cost, n)
			}
		}
	}
	if r.err != nil {
		return nil, 0
	}
	v, kind := lift(o)
	if kind != nil {
		r.fail(kind, show(class.Name))
		return nil, 0
	}
	return r.close(i, v, cost)
}

// IsMapMessage reports whether b begins as the stream of a [MapMessage] does.
// It costs much less than [Decode].
func IsMapMessage(b []byte) bool { return begins(b, mapMessageClass) }

// begins reports whether b is the stream of an object of that class.
func begins(b []byte, class string) bool {
	const n = len(magic) + 2
	return len(b) > n+2+len(class) && b[n-2] == tcObject && b[n-1] == tcClassDesc && int(be16(b[n:])) == len(class) &&
		string(b[n+2:n+2+len(class)]) == class
}
