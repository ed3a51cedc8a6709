package jser

import (
	"encoding/binary"
	"math"
	"math/big"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// source gives what an object, or a stream, consists of. The first thing that
// is not what was asked for spoils it: all that follows is zero.
type source struct {
	o     *Object
	items []Value
	block Block
	bad   bool
}

// field returns a field by name, nil if the class has none.
func (s *source) field(name string) Value {
	for i := range s.o.Parts {
		p := &s.o.Parts[i]
		for k := range p.Fields { // none if it claims to be externalizable
			if p.Class.Fields[k].Name == name {
				return p.Fields[k]
			}
		}
	}
	return nil
}

// get returns a field of type T; null and missing ones are zero.
func get[T any](s *source, name string) (v T) {
	x := s.field(name)
	if x == nil {
		return v
	}
	v, ok := x.(T)
	if !ok {
		s.bad = true
	}
	return v
}

// text returns a string field that may be null.
func (s *source) text(name string) *string {
	x := s.field(name)
	if x == nil {
		return nil
	}
	t, ok := x.(string)
	if !ok {
		s.bad = true
		return nil
	}
	return &t
}

// open turns to the items that a class has written.
func (s *source) open(class string) {
	for i := range s.o.Parts {
		if p := &s.o.Parts[i]; p.Class.Name == class {
			s.items, s.block = p.Items, nil
			return
		}
	}
	s.bad = true
}

// raw returns the next n bytes of block data.
func (s *source) raw(n int) []byte {
	if len(s.block) == 0 && len(s.items) > 0 {
		if b, ok := s.items[0].(Block); ok {
			s.block, s.items = b, s.items[1:]
		}
	}
	if n < 0 || n > len(s.block) {
		s.bad = true
	}
	if s.bad {
		return nil
	}
	b := s.block[:n]
	s.block = s.block[n:]
	return b
}

func (s *source) flag() bool {
	b := s.raw(1)
	return b != nil && b[0] != 0
}

func (s *source) i32() int32 {
	if b := s.raw(4); b != nil {
		return int32(be32(b))
	}
	return 0
}

func (s *source) i64() int64 {
	if b := s.raw(8); b != nil {
		return int64(be64(b))
	}
	return 0
}

func (s *source) counted() []byte {
	n := int(s.i32())
	b := s.raw(n)
	if s.bad {
		return nil
	}
	return append(make([]byte, 0, max(n, 1)), b...)
}

func (s *source) utf() string {
	n := s.raw(2)
	if n == nil {
		return ""
	}
	t, ok := decodeText(s.raw(int(be16(n))))
	if !ok {
		s.bad = true
	}
	return t
}

// next returns the next value.
func (s *source) next() Value {
	if len(s.block) > 0 || len(s.items) == 0 {
		s.bad = true
	}
	if s.bad {
		return nil
	}
	v := s.items[0]
	if _, ok := v.(Block); ok {
		s.bad = true
		return nil
	}
	s.items = s.items[1:]
	return v
}

// take returns the next value, which must be a T.
func take[T any](s *source) (v T) {
	v, ok := s.next().(T)
	if !ok {
		s.bad = true
	}
	return v
}

// rest says that the source should be at its end.
func (s *source) rest() {
	if len(s.items) > 0 || len(s.block) > 0 {
		s.bad = true
	}
}

// values returns all remaining values, which should be want.
func (s *source) values(want int) []Value {
	if len(s.block) > 0 || want >= 0 && len(s.items) != want {
		s.bad = true
	}
	for _, v := range s.items {
		if _, ok := v.(Block); ok {
			s.bad = true
		}
	}
	if s.bad {
		return nil
	}
	v := s.items
	s.items = nil
	return v
}

// entries returns all remaining values as pairs, which should be want.
func (s *source) entries(want int) (e []Entry) {
	if want > math.MaxInt/2 {
		s.bad = true
		return nil
	}
	v := s.values(2 * want)
	for i := 0; i+1 < len(v); i += 2 {
		e = append(e, Entry{v[i], v[i+1]})
	}
	return e
}

// count reads an i32 that counts something.
func (s *source) count() int {
	n := s.i32()
	if n < 0 {
		s.bad = true
		return 0
	}
	return int(n)
}

// lift turns an object of a listed class into its type. Other objects, and
// those that are only part of a listed one, stay as they are.
func lift(o *Object) (Value, *Kind) {
	s := &source{o: o}
	v := s.lift(o.Class.Name)
	if s.bad {
		return nil, ErrShape
	}
	return v, nil
}

func (s *source) lift(class string) Value {
	switch class {
	case lang + "Boolean":
		return get[bool](s, "value")
	case lang + "Byte":
		return get[int8](s, "value")
	case lang + "Short":
		return get[int16](s, "value")
	case lang + "Character":
		return get[Char](s, "value")
	case lang + "Integer":
		return get[int32](s, "value")
	case lang + "Long":
		return get[int64](s, "value")
	case lang + "Float":
		return get[float32](s, "value")
	case lang + "Double":
		return get[float64](s, "value")
	case stringBuffer:
		return s.buffer(get[[]Char](s, "value"), get[int32](s, "count"), false)
	case stringBuilder:
		s.open(class)
		n := s.i32()
		return s.buffer(take[[]Char](s), n, true)
	case bigIntegerClass:
		return s.bigInteger()
	case decimalClass:
		return &Decimal{get[*big.Int](s, "intVal"), get[int32](s, "scale")}
	case dateClass:
		s.open(class)
		return Date(s.i64())
	case uuidClass:
		var u UUID
		binary.BigEndian.PutUint64(u[:], uint64(get[int64](s, "mostSigBits")))
		binary.BigEndian.PutUint64(u[8:], uint64(get[int64](s, "leastSigBits")))
		return u
	case localeClass:
		return &Locale{get[string](s, "language"), get[string](s, "script"), get[string](s, "country"),
			get[string](s, "variant"), get[string](s, "extensions")}
	case ArrayList, LinkedList, ArrayDeque, Vector, Stack, ArraysList, EmptyList:
		return s.list(class)
	case HashSet, LinkedHashSet, TreeSet, EmptySet:
		return s.set(class)
	case HashMap, LinkedHashMap, TreeMap, Hashtable, chm, EmptyMap:
		return s.mapping(class)
	case collSer:
		return s.collSer()
	}
	return s.liftTomcat(class)
}

func (s *source) buffer(v []Char, n int32, builder bool) *StringBuffer {
	if n < 0 || int(n) > len(v) {
		s.bad = true
		return nil
	}
	raw := make([]byte, 0, n)
	for _, u := range v[:n] {
		raw = appendSurrogate(raw, rune(u))
	}
	t, ok := decodeText(raw)
	if !ok {
		s.bad = true
	}
	return &StringBuffer{builder, t, int32(len(v))}
}

func (s *source) bigInteger() *big.Int {
	n := new(big.Int).SetBytes(get[[]byte](s, "magnitude"))
	switch sign := get[int32](s, "signum"); {
	case sign < -1 || sign > 1 || int(sign)*int(sign) != n.Sign():
		s.bad = true
	case sign < 0:
		n.Neg(n)
	}
	return n
}

func (s *source) list(class string) *List {
	l := &List{Class: class}
	switch class {
	case ArrayList:
		l.Class = ""
		s.open(class)
		l.Capacity = s.i32()
		n := get[int32](s, "size")
		l.Items = s.values(int(n))
		s.bad = s.bad || n < 0
	case LinkedList, ArrayDeque:
		s.open(class)
		l.Items = s.values(s.count())
	case Vector, Stack:
		l.Grow = get[int32](s, "capacityIncrement")
		n := get[int32](s, "elementCount")
		a := get[*Array](s, "elementData")
		if a == nil || n < 0 || int(n) > len(a.Items) {
			s.bad = true
			return nil
		}
		l.Capacity, l.Items = int32(len(a.Items)), a.Items[:n:n]
	case ArraysList:
		a := get[*Array](s, "a")
		if a == nil {
			s.bad = true
			return nil
		}
		l.Items, l.Array = a.Items, a.Class
	}
	return l
}

func (s *source) set(class string) *Set {
	x := &Set{Class: class}
	switch class {
	case HashSet, LinkedHashSet:
		if class == HashSet {
			x.Class = ""
		}
		s.open(HashSet)
		x.buckets, x.load = s.i32(), math.Float32frombits(uint32(s.i32()))
		x.Items = s.values(s.count())
	case TreeSet:
		s.open(class)
		x.Comparator = s.next()
		x.Items = s.values(s.count())
	}
	return x
}

func (s *source) mapping(class string) *Map {
	m := &Map{Class: class, load: get[float32](s, "loadFactor"), threshold: get[int32](s, "threshold")}
	switch class {
	case HashMap, LinkedHashMap:
		if class == HashMap {
			m.Class = ""
		}
		m.AccessOrder = get[bool](s, "accessOrder")
		s.open(HashMap)
		m.buckets = s.i32()
		m.Entries = s.entries(s.count())
	case Hashtable:
		s.open(class)
		m.buckets = s.i32()
		m.Entries = s.entries(s.count())
	case TreeMap:
		m.Comparator = s.field("comparator")
		s.open(class)
		m.Entries = s.entries(s.count())
	case chm:
		s.open(class)
		v := s.values(-1)
		if n := len(v) - 2; n < 0 || n%2 != 0 || v[n] != nil || v[n+1] != nil {
			s.bad = true
			return nil
		}
		for i := 0; i < len(v)-2; i += 2 {
			if v[i] == nil || v[i+1] == nil {
				s.bad = true
				return nil
			}
			m.Entries = append(m.Entries, Entry{v[i], v[i+1]})
		}
	}
	return m
}

// collSer is what List.of, Set.of and Map.of write.
func (s *source) collSer() Value {
	s.open(collSer)
	n := s.count()
	switch tag := get[int32](s, "tag") & 0xff; {
	case tag == 1 || tag == 4:
		return &List{Class: ListOf, Items: s.values(n), Grow: tag}
	case tag == 2:
		return &Set{Class: SetOf, Items: s.values(n)}
	case tag == 3 && n%2 == 0:
		return &Map{Class: MapOf, Entries: s.entries(n / 2)}
	}
	s.bad = true
	return nil
}

func (s *source) liftTomcat(class string) Value {
	switch class {
	case memberClass, staticMemberClass:
		s.open(class)
		n := int(s.i32())
		m, size, err := wire.DecodeMember(s.raw(n))
		s.rest()
		if err != nil || size != n {
			s.bad = true
		}
		return &Member{m, class == staticMemberClass}
	case rpcName:
		s.open(class)
		m := &RPCMessage{Reply: s.flag(), UUID: s.counted(), RPCID: s.counted()}
		m.Message = s.next()
		s.rest()
		return m
	case noChannelClass:
		s.open(class)
		m := &RPCMessage{NoChannel: true, Reply: true, UUID: s.counted(), RPCID: s.counted()}
		s.rest()
		return m
	case byteMessageClass:
		s.open(class)
		m := &ByteMessage{s.counted()}
		s.rest()
		return m
	case memberMsgClass:
		return &MemberMessage{get[int32](s, "msgtype"), get[[]byte](s, "membershipId"), get[*Member](s, "member")}
	case mapMessageClass:
		m := &MapMessage{Type: get[int32](s, "msgtype"), MapID: get[[]byte](s, "mapId"), Diff: get[bool](s, "diff"),
			Key: get[[]byte](s, "keydata"), Value: get[[]byte](s, "valuedata"), DiffValue: get[[]byte](s, "diffvalue"),
			Primary: get[*Member](s, "primary")}
		if a := get[*Array](s, "nodes"); a != nil {
			m.Nodes = make([]*Member, len(a.Items), len(a.Items)+1)
			for i, v := range a.Items {
				// Tribes writes no null here.
				x, ok := v.(*Member)
				if !ok {
					s.bad = true
				}
				m.Nodes[i] = x
			}
		}
		return m
	case sessionMsgClass:
		return &SessionMessage{Event: get[int32](s, "mEvtType"), Context: s.text("mContextName"),
			SessionID: s.text("mSessionID"), Session: get[[]byte](s, "mSession"), UniqueID: s.text("uniqueId"),
			Time: get[int64](s, "serializationTimestamp"), TimeSet: get[bool](s, "timestampSet"), Base: get[int64](s, "timestamp")}
	case deltaSessionClass:
		s.open(class)
		d := &DeltaSession{s.session()}
		s.rest()
		return d
	case fileMsgClass:
		return &FileMessage{Number: get[int32](s, "messageNumber"), Total: get[int64](s, "totalNrOfMsgs"),
			Length: get[int32](s, "dataLength"), Data: get[[]byte](s, "data"), FileName: s.text("fileName"),
			Context: s.text("contextName"), Base: get[int64](s, "timestamp")}
	case undeployClass:
		return &UndeployMessage{get[*Member](s, "address"), get[int64](s, "timestamp"), s.text("uniqueId"), s.text("contextName")}
	case ssoEntryClass:
		e := &SingleSignOnEntry{AuthType: s.text("authType"), Username: s.text("username"), Password: s.text("password"),
			CanReauthenticate: get[bool](s, "canReauthenticate"), Sessions: s.field("sessionKeys")}
		s.open(class)
		if e.HasPrincipal = s.flag(); e.HasPrincipal {
			e.Principal = s.next()
		}
		s.rest()
		return e
	case ssoKeyClass:
		return &SingleSignOnKey{s.text("sessionId"), s.text("contextName"), s.text("hostName")}
	case ssoListenerClass, ssoClusterClass:
		return &SingleSignOnListener{class == ssoClusterClass, s.text("ssoId")}
	case principalClass:
		return &Principal{s.text("name"), s.field("roles"), s.field("principal"), s.field("attributes")}
	}
	return s.o
}

// RoleNames returns the roles as strings.
func (p *Principal) RoleNames() (names []string) {
	if a, ok := p.Roles.(*Array); ok {
		for _, v := range a.Items {
			if s, ok := v.(string); ok {
				names = append(names, s)
			}
		}
	}
	return names
}

// MemberOf returns m for writing, as a MemberImpl.
func MemberOf(m channel.Member) *Member { return &Member{Member: m} }
