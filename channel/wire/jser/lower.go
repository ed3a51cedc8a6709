package jser

import (
	"fmt"
	"math"
	"math/big"
)

func typeName(v Value) string { return fmt.Sprintf("Go type %T", v) }

// object makes an object of a listed class: fields has the values of all
// classes, top super class first, items what the class called owner has written.
func object(class string, fields []Value, owner string, items []Value) *Object {
	c := classes[class]
	o := &Object{Class: c}
	if c.Flags&0x04 != 0 {
		o.Parts = []Part{{Class: c, Items: items}}
		return o
	}
	o.Parts = make([]Part, chain(c))
	for i, k := len(o.Parts)-1, c; i >= 0; i, k = i-1, k.Super {
		o.Parts[i].Class = k
	}
	for i := range o.Parts {
		p := &o.Parts[i]
		p.Fields, fields = fields[:len(p.Class.Fields)], fields[len(p.Class.Fields):]
		if p.Class.Name == owner {
			p.Items = items
		}
	}
	return o
}

func simple(class string, fields ...Value) *Object { return object(class, fields, "", nil) }

// lower is the reverse of lift; nil for a value it does not know.
func lower(v Value) *Object {
	switch x := v.(type) {
	case *Object:
		return x
	case bool:
		return simple(lang+"Boolean", x)
	case int8:
		return simple(lang+"Byte", x)
	case int16:
		return simple(lang+"Short", x)
	case Char:
		return simple(lang+"Character", x)
	case int32:
		return simple(lang+"Integer", x)
	case int64:
		return simple(lang+"Long", x)
	case float32:
		return simple(lang+"Float", x)
	case float64:
		return simple(lang+"Double", x)
	case *StringBuffer:
		return lowerBuffer(x)
	case *big.Int:
		magnitude := x.Bytes()
		if magnitude == nil {
			magnitude = []byte{}
		}
		return simple(bigIntegerClass, int32(-1), int32(-1), int32(-2), int32(-2), int32(x.Sign()), magnitude)
	case *Decimal:
		return simple(decimalClass, x.Scale, x.Unscaled)
	case Date:
		var s sink
		s.i64(int64(x))
		return object(dateClass, nil, dateClass, s.done())
	case UUID:
		return simple(uuidClass, int64(be64(x[8:])), int64(be64(x[:8])))
	case *Locale:
		return simple(localeClass, int32(-1), x.Country, x.Extensions, x.Language, x.Script, x.Variant)
	case *List:
		return lowerList(x)
	case *Set:
		return lowerSet(x)
	case *Map:
		return lowerMap(x)
	}
	return lowerTomcat(v)
}

func lowerBuffer(x *StringBuffer) *Object {
	raw := appendText(nil, x.Text)
	units := make([]Char, 0, len(x.Text)+1)
	for len(raw) > 0 {
		u, n := unit(raw)
		if n == 0 {
			return nil
		}
		units, raw = append(units, Char(u)), raw[n:]
	}
	n := int32(len(units))
	if more := x.Capacity - n; more > 1<<16 { // room that is only zeros
		return nil
	} else if more > 0 {
		units = append(units, make([]Char, more)...)
	}
	if !x.Builder {
		return object(stringBuffer, []Value{n, false, units}, stringBuffer, nil)
	}
	var s sink
	s.i32(n)
	s.value(units)
	return object(stringBuilder, nil, stringBuilder, s.done())
}

func lowerList(x *List) *Object {
	var s sink
	n := int32(len(x.Items))
	switch x.Class {
	case "", ArrayList:
		s.i32(max(n, x.Capacity))
		s.values(x.Items)
		return object(ArrayList, []Value{n}, ArrayList, s.done())
	case LinkedList, ArrayDeque:
		s.i32(n)
		s.values(x.Items)
		return object(x.Class, nil, x.Class, s.done())
	case Vector, Stack:
		if x.Capacity > n+1<<16 { // room that is only nulls
			return nil
		}
		a := &Array{Class: objectArrayClass, Items: make([]Value, max(n, x.Capacity))}
		copy(a.Items, x.Items)
		return object(x.Class, []Value{x.Grow, n, a}, Vector, nil)
	case ArraysList:
		class := x.Array
		if class == "" {
			class = objectArrayClass
		}
		return simple(ArraysList, &Array{Class: class, Items: x.Items})
	case EmptyList:
		if n == 0 {
			return simple(EmptyList)
		}
	case ListOf:
		return lowerCollSer(max(1, x.Grow), x.Items)
	}
	return nil
}

func lowerCollSer(tag int32, items []Value) *Object {
	var s sink
	s.i32(int32(len(items)))
	s.values(items)
	return object(collSer, []Value{tag}, collSer, s.done())
}

func lowerSet(x *Set) *Object {
	var s sink
	n := int32(len(x.Items))
	switch x.Class {
	case "", HashSet, LinkedHashSet:
		load, buckets := x.load, x.buckets
		if load == 0 {
			load = 0.75
		}
		if buckets == 0 {
			buckets = capacity(len(x.Items))
		}
		s.i32(buckets)
		s.i32(int32(math.Float32bits(load)))
		s.i32(n)
		s.values(x.Items)
		class := x.Class
		if class == "" {
			class = HashSet
		}
		return object(class, nil, HashSet, s.done())
	case TreeSet:
		s.value(x.Comparator)
		s.i32(n)
		s.values(x.Items)
		return object(TreeSet, nil, TreeSet, s.done())
	case EmptySet:
		if n == 0 {
			return simple(EmptySet)
		}
	case SetOf:
		return lowerCollSer(2, x.Items)
	}
	return nil
}

// capacity is how many buckets Java makes for n entries.
func capacity(n int) int32 {
	c := int32(16)
	for int64(c)*3/4 < int64(n) && c < 1<<30 {
		c *= 2
	}
	return c
}

func lowerMap(x *Map) *Object {
	var s sink
	n := int32(len(x.Entries))
	load, threshold, buckets := x.load, x.threshold, x.buckets
	if buckets == 0 {
		load, buckets = 0.75, capacity(len(x.Entries))
		if n > 0 {
			threshold = buckets / 4 * 3
		}
	}
	switch x.Class {
	case "", HashMap, LinkedHashMap:
		s.i32(buckets)
		s.i32(n)
		s.entries(x.Entries)
		if x.Class == LinkedHashMap {
			return object(LinkedHashMap, []Value{load, threshold, x.AccessOrder}, HashMap, s.done())
		}
		return object(HashMap, []Value{load, threshold}, HashMap, s.done())
	case Hashtable:
		s.i32(buckets)
		s.i32(n)
		s.entries(x.Entries)
		return object(Hashtable, []Value{load, threshold}, Hashtable, s.done())
	case TreeMap:
		s.i32(n)
		s.entries(x.Entries)
		return object(TreeMap, []Value{x.Comparator}, TreeMap, s.done())
	case chm:
		segments := &Array{Class: "[L" + chm + "$Segment;"}
		for range 16 {
			sync := simple(locks+"ReentrantLock$NonfairSync", int32(0))
			segments.Items = append(segments.Items, simple(chm+"$Segment", sync, float32(0.75)))
		}
		s.entries(x.Entries)
		s.value(nil)
		s.value(nil)
		return object(chm, []Value{int32(15), int32(28), segments}, chm, s.done())
	case EmptyMap:
		if n == 0 {
			return simple(EmptyMap)
		}
	case MapOf:
		s.entries(x.Entries)
		return lowerCollSer(3, s.done())
	}
	return nil
}

func lowerTomcat(v Value) *Object {
	var s sink
	switch x := v.(type) {
	case *Member:
		appendMember(&s, x.Member)
		class := memberClass
		if x.Static {
			class = staticMemberClass
		}
		return object(class, nil, class, s.done())
	case *RPCMessage:
		class := rpcName
		if x.NoChannel {
			class = noChannelClass
		} else {
			s.flag(x.Reply)
		}
		s.counted(x.UUID)
		s.counted(x.RPCID)
		if !x.NoChannel {
			s.value(x.Message)
		}
		return object(class, nil, class, s.done())
	case *ByteMessage:
		s.counted(x.Data)
		return object(byteMessageClass, nil, byteMessageClass, s.done())
	case *MemberMessage:
		return simple(memberMsgClass, x.Type, x.Member, x.MembershipID)
	case *MapMessage:
		return simple(mapMessageClass, x.Diff, x.Type, x.DiffValue, x.Key, x.MapID, x.Nodes, x.Primary, x.Value)
	case *SessionMessage:
		return simple(sessionMsgClass, x.Base, x.Event, x.Time, x.TimeSet, text(x.Context), x.Session, text(x.SessionID), text(x.UniqueID))
	case *DeltaSession:
		s.session(&x.Session)
		return object(deltaSessionClass, nil, deltaSessionClass, s.done())
	case *FileMessage:
		return simple(fileMsgClass, x.Base, x.Length, x.Number, x.Total, text(x.Context), x.Data, text(x.FileName))
	case *UndeployMessage:
		return simple(undeployClass, x.Time, x.Address, text(x.Context), text(x.UniqueID))
	case *SingleSignOnEntry:
		s.flag(x.HasPrincipal)
		if x.HasPrincipal {
			s.value(x.Principal)
		}
		return object(ssoEntryClass, []Value{x.CanReauthenticate, text(x.AuthType), text(x.Password), x.Sessions, text(x.Username)},
			ssoEntryClass, s.done())
	case *SingleSignOnKey:
		return simple(ssoKeyClass, text(x.Context), text(x.Host), text(x.SessionID))
	case *SingleSignOnListener:
		class := ssoListenerClass
		if x.Cluster {
			class = ssoClusterClass
		}
		return simple(class, text(x.ID))
	case *Principal:
		return simple(principalClass, x.Attributes, text(x.Name), x.User, x.Roles)
	}
	return nil
}
