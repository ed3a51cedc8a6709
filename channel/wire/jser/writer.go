package jser

import (
	"encoding/binary"
	"math"
	"math/big"
	"unsafe"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// maxBlock is where Java cuts block data, in bytes.
const maxBlock = 1024

// maxWriteDepth stops values that contain themselves.
const maxWriteDepth = 1000

// Encode returns the stream of one value, in the dialect of Tomcat 10.1.
func Encode(v Value) ([]byte, error) { return (*Dialect)(nil).Encode(v) }

// Encode returns the stream of one value.
func (d *Dialect) Encode(v Value) ([]byte, error) { return d.Format(v) }

// Format returns the stream of any values and [Block]s: the reverse of [Parse].
func (d *Dialect) Format(items ...Value) ([]byte, error) {
	w := &writer{d: d, b: []byte(magic), seen: map[any]int32{}}
	w.items(items, 0)
	if w.err != nil {
		return nil, w.err
	}
	return w.b, nil
}

// Keys of writer.seen: what is one object.
type (
	classKey  string
	signKey   string
	stringKey struct {
		p *byte
		n int
	}
	sliceKey struct {
		p unsafe.Pointer
		n int
	}
	nodesKey struct {
		p **Member
		n int
	}
	boxKey      struct{ v Value }
	emptyString struct{}
)

type writer struct {
	d    *Dialect
	b    []byte
	seen map[any]int32
	next int32
	err  error
}

func (w *writer) fail(k *Kind, detail string) {
	if w.err == nil {
		w.err = &Error{k, -1, detail}
	}
}

func (w *writer) u8(v byte)    { w.b = append(w.b, v) }
func (w *writer) u16(v uint16) { w.b = binary.BigEndian.AppendUint16(w.b, v) }
func (w *writer) u32(v uint32) { w.b = binary.BigEndian.AppendUint32(w.b, v) }
func (w *writer) u64(v uint64) { w.b = binary.BigEndian.AppendUint64(w.b, v) }

// open gives the next handle to what key stands for; nil for nobody.
func (w *writer) open(key any) {
	if key != nil {
		w.seen[key] = w.next
	}
	w.next++
}

// again writes a reference if key has been written.
func (w *writer) again(key any) bool {
	if key == nil {
		return false
	}
	h, ok := w.seen[key]
	if ok {
		w.u8(tcReference)
		w.u32(uint32(baseHandle + h))
	}
	return ok
}

func (w *writer) utf(s string) {
	n, ok := textSize(s)
	if !ok || n > math.MaxUint16 {
		w.fail(ErrText, "")
		return
	}
	w.u16(uint16(n))
	w.b = appendText(w.b, s)
}

func (w *writer) text(s string, key any) {
	if w.again(key) {
		return
	}
	n, ok := textSize(s)
	switch {
	case !ok:
		w.fail(ErrText, "")
		return
	case n > math.MaxUint16:
		w.u8(tcLongStr)
		w.u64(uint64(n))
	default:
		w.u8(tcString)
		w.u16(uint16(n))
	}
	w.open(key)
	w.b = appendText(w.b, s)
}

// textKey is the identity of a string: its place in memory.
func textKey(s string) any {
	if s == "" {
		return emptyString{}
	}
	return stringKey{unsafe.StringData(s), len(s)}
}

// class writes a description, and those of its super classes.
func (w *writer) class(c *Class) {
	for ; c != nil; c = c.Super {
		if w.again(classKey(c.Name)) {
			return
		}
		w.u8(tcClassDesc)
		w.utf(c.Name)
		w.u64(w.d.uid(c))
		w.open(classKey(c.Name))
		w.u8(c.Flags)
		w.u16(uint16(len(c.Fields)))
		for _, f := range c.Fields {
			if f.Type == "" || !fieldType(f.Type[0], f.Type) || len(c.Fields) > math.MaxUint16 {
				w.fail(ErrValue, "description of "+show(c.Name))
				return
			}
			w.u8(f.Type[0])
			w.utf(f.Name)
			if t := f.Type[0]; t == 'L' || t == '[' {
				w.text(f.Type, signKey(f.Type))
			}
		}
		w.u8(tcEnd)
	}
	w.u8(tcNull)
}

// items writes values and blocks, these cut as Java does.
func (w *writer) items(items []Value, depth int) {
	for i := 0; i < len(items) && w.err == nil; i++ {
		b, ok := items[i].(Block)
		if !ok {
			w.value(items[i], depth)
			continue
		}
		for i+1 < len(items) {
			next, ok := items[i+1].(Block)
			if !ok {
				break
			}
			b = append(b[:len(b):len(b)], next...)
			i++
		}
		for len(b) > 0 {
			n := min(len(b), maxBlock)
			if n <= math.MaxUint8 {
				w.b = append(w.b, tcBlock, byte(n))
			} else {
				w.u8(tcLongBlock)
				w.u32(uint32(n))
			}
			w.b = append(w.b, b[:n]...)
			b = b[n:]
		}
	}
}

// value writes one value.
func (w *writer) value(v Value, depth int) {
	if w.err != nil {
		return
	}
	if depth > maxWriteDepth {
		w.fail(ErrDepth, "")
		return
	}
	switch x := v.(type) {
	case nil:
		w.u8(tcNull)
	case string:
		w.text(x, textKey(x))
	case []byte:
		numbersOut(w, "[B", x, func(b byte) { w.u8(b) })
	case []bool:
		numbersOut(w, "[Z", x, func(b bool) { w.u8(b2u(b)) })
	case []int16:
		numbersOut(w, "[S", x, func(n int16) { w.u16(uint16(n)) })
	case []Char:
		numbersOut(w, "[C", x, func(n Char) { w.u16(uint16(n)) })
	case []int32:
		numbersOut(w, "[I", x, func(n int32) { w.u32(uint32(n)) })
	case []int64:
		numbersOut(w, "[J", x, func(n int64) { w.u64(uint64(n)) })
	case []float32:
		numbersOut(w, "[F", x, func(n float32) { w.u32(math.Float32bits(n)) })
	case []float64:
		numbersOut(w, "[D", x, func(n float64) { w.u64(math.Float64bits(n)) })
	case *Array:
		if x == nil {
			w.u8(tcNull)
			return
		}
		class := classes[x.Class]
		if class == nil {
			if class = x.uid; class == nil || class.Name != x.Class {
				class = &Class{Name: x.Class, Flags: plain} // no reader compares the UID of an array
			}
			if len(x.Class) < 2 || x.Class[0] != '[' || x.Class[1] != 'L' && x.Class[1] != '[' {
				w.fail(ErrValue, "array of "+show(x.Class))
				return
			}
		}
		w.array(x, class, len(x.Items), func(i int) Value { return x.Items[i] }, depth)
	case []*Member:
		if x == nil {
			w.u8(tcNull)
			return
		}
		w.array(nodesKey{unsafe.SliceData(x), len(x)}, classes[memberArrayClass], len(x), func(i int) Value { return x[i] }, depth)
	case Enum:
		w.enum(x)
	default:
		key := identity(v)
		if key == absent {
			w.u8(tcNull)
			return
		}
		if w.again(key) {
			return
		}
		o := lower(v)
		if o == nil || o.Class == nil {
			w.fail(ErrValue, typeName(v))
			return
		}
		w.object(o, key, depth)
	}
}

func b2u(b bool) byte {
	if b {
		return 1
	}
	return 0
}

func numbersOut[T any](w *writer, class string, v []T, put func(T)) {
	if v == nil {
		w.u8(tcNull)
		return
	}
	var key any = sliceKey{unsafe.Pointer(unsafe.SliceData(v)), len(v)}
	if cap(v) == 0 {
		key = nil // all such slices are the same memory
	}
	if w.again(key) {
		return
	}
	if len(v) > math.MaxInt32 {
		w.fail(ErrValue, "array is too long")
		return
	}
	w.u8(tcArray)
	w.class(classes[class])
	w.open(key)
	w.u32(uint32(len(v)))
	if b, ok := any(v).([]byte); ok {
		w.b = append(w.b, b...)
		return
	}
	for _, x := range v {
		put(x)
	}
}

func (w *writer) array(key any, class *Class, n int, item func(int) Value, depth int) {
	if w.again(key) {
		return
	}
	if n > math.MaxInt32 {
		w.fail(ErrValue, "array is too long")
		return
	}
	w.u8(tcArray)
	w.class(class)
	w.open(key)
	w.u32(uint32(n))
	for i := range n {
		w.value(item(i), depth+1)
	}
}

func (w *writer) enum(x Enum) {
	if w.again(x) {
		return
	}
	class := classes[x.Class]
	if class == nil {
		class = &Class{Name: x.Class, Flags: enum, Super: classes[lang+"Enum"]}
	}
	w.u8(tcEnum)
	w.class(class)
	w.open(x)
	w.text(x.Name, textKey(x.Name))
}

func (w *writer) object(o *Object, key any, depth int) {
	w.u8(tcObject)
	w.class(o.Class)
	w.open(key)
	for _, p := range o.Parts {
		if p.Class == nil || len(p.Fields) != len(p.Class.Fields) && p.Class.Flags&0x04 == 0 {
			w.fail(ErrValue, "object of "+show(o.Class.Name))
			return
		}
		for i, v := range p.Fields {
			w.field(p.Class.Fields[i], v, depth+1)
		}
		if p.Class.Flags&0x05 != 0 {
			w.items(p.Items, depth+1)
			w.u8(tcEnd)
		}
	}
}

func (w *writer) field(f Field, v Value, depth int) {
	ok := true
	switch f.Type[0] {
	case 'B':
		var x int8
		x, ok = v.(int8)
		w.u8(byte(x))
	case 'C':
		var x Char
		x, ok = v.(Char)
		w.u16(uint16(x))
	case 'D':
		var x float64
		x, ok = v.(float64)
		w.u64(math.Float64bits(x))
	case 'F':
		var x float32
		x, ok = v.(float32)
		w.u32(math.Float32bits(x))
	case 'I':
		var x int32
		x, ok = v.(int32)
		w.u32(uint32(x))
	case 'J':
		var x int64
		x, ok = v.(int64)
		w.u64(uint64(x))
	case 'S':
		var x int16
		x, ok = v.(int16)
		w.u16(uint16(x))
	case 'Z':
		var x bool
		x, ok = v.(bool)
		w.u8(b2u(x))
	default:
		w.value(v, depth)
	}
	if !ok {
		w.fail(ErrValue, "field "+show(f.Name))
	}
}

// absent is the identity of a nil pointer.
const absent = nilKey(0)

type nilKey int

// identity says what is one object in Java: pointers are, and boxes that the
// JVM caches. nil stands for an object of its own.
func identity(v Value) any {
	small := func(n int64) any {
		if n >= -128 && n <= 127 {
			return boxKey{v}
		}
		return nil
	}
	switch x := v.(type) {
	case bool, int8:
		return boxKey{v}
	case int16:
		return small(int64(x))
	case int32:
		return small(int64(x))
	case int64:
		return small(x)
	case Char:
		if x <= 127 {
			return boxKey{v}
		}
		return nil
	case float32, float64, Date, UUID, Block:
		return nil
	case *big.Int:
		return pointer(x)
	case *List:
		return pointer(x)
	case *Set:
		return pointer(x)
	case *Map:
		return pointer(x)
	case *Decimal:
		return pointer(x)
	case *Locale:
		return pointer(x)
	case *StringBuffer:
		return pointer(x)
	case *RPCMessage:
		return pointer(x)
	case *ByteMessage:
		return pointer(x)
	case *Member:
		return pointer(x)
	case *MemberMessage:
		return pointer(x)
	case *MapMessage:
		return pointer(x)
	case *SessionMessage:
		return pointer(x)
	case *DeltaSession:
		return pointer(x)
	case *FileMessage:
		return pointer(x)
	case *UndeployMessage:
		return pointer(x)
	case *SingleSignOnEntry:
		return pointer(x)
	case *SingleSignOnKey:
		return pointer(x)
	case *SingleSignOnListener:
		return pointer(x)
	case *Principal:
		return pointer(x)
	case *Object:
		return pointer(x)
	}
	return nil
}

func pointer[T any](p *T) any {
	if p == nil {
		return absent
	}
	return p
}

// text returns the string that p points to, or null.
func text(p *string) Value {
	if p == nil {
		return nil
	}
	return *p
}

// sink collects items.
type sink struct {
	items []Value
	block Block
	bad   bool
}

func (s *sink) flush() {
	if len(s.block) > 0 {
		s.items = append(s.items, s.block)
		s.block = nil
	}
}

func (s *sink) value(v Value) {
	s.flush()
	s.items = append(s.items, v)
}

func (s *sink) flag(v bool) { s.block = append(s.block, b2u(v)) }
func (s *sink) i32(v int32) { s.block = binary.BigEndian.AppendUint32(s.block, uint32(v)) }
func (s *sink) i64(v int64) { s.block = binary.BigEndian.AppendUint64(s.block, uint64(v)) }

func (s *sink) counted(b []byte) {
	s.i32(int32(len(b)))
	s.block = append(s.block, b...)
}

func (s *sink) utf(t string) {
	n, ok := textSize(t)
	if !ok || n > math.MaxUint16 {
		s.bad = true
		return
	}
	s.block = binary.BigEndian.AppendUint16(s.block, uint16(n))
	s.block = appendText(s.block, t)
}

func (s *sink) values(v []Value) {
	s.flush()
	s.items = append(s.items, v...)
}

func (s *sink) entries(e []Entry) {
	s.flush()
	for _, x := range e {
		s.items = append(s.items, x.Key, x.Value)
	}
}

func (s *sink) format(d *Dialect) ([]byte, error) {
	s.flush()
	if s.bad {
		return nil, &Error{ErrText, -1, "longer than 65,535 bytes, or not well formed"}
	}
	return d.Format(s.items...)
}

func (s *sink) done() []Value {
	s.flush()
	return s.items
}

func appendMember(s *sink, m channel.Member) {
	record := wire.AppendMember(nil, m)
	s.counted(record)
}
