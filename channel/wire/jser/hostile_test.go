package jser

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
)

// stream is a hand-made object stream.
type stream []byte

func begin() stream { return stream(magic) }

func (s stream) raw(b ...byte) stream { return append(s, b...) }
func (s stream) text(t string) stream {
	return append(binary.BigEndian.AppendUint16(s, uint16(len(t))), t...)
}
func (s stream) i32(v int64) stream { return binary.BigEndian.AppendUint32(s, uint32(v)) }
func (s stream) ref(h int64) stream { return s.raw(tcReference).i32(baseHandle + h) }
func (s stream) class(name string, flags byte, fields int) stream {
	s = s.raw(tcClassDesc).text(name).raw(0, 0, 0, 0, 0, 0, 0, 1, flags)
	return append(s, byte(fields>>8), byte(fields))
}

func arrayList(s stream) stream {
	return s.raw(tcObject).class(ArrayList, custom, 1).raw('I').text("size").raw(tcEnd, tcNull)
}

// nest is an ArrayList of one list of one list …
func nest(depth int) []byte {
	s := arrayList(begin()).i32(1).raw(tcBlock, 4).i32(1)
	for range depth {
		s = s.raw(tcObject).ref(0).i32(1).raw(tcBlock, 4).i32(1)
	}
	s = s.raw(tcNull)
	for range depth + 1 {
		s = s.raw(tcEnd)
	}
	return s
}

func TestHostile(t *testing.T) {

	// Every list holds the one before twice: 2^90 values in 3 KB.
	s := arrayList(begin()).i32(0).raw(tcBlock, 4).i32(0).raw(tcEnd)
	last := int64(1)
	for range 90 {
		s = s.raw(tcObject).ref(0).i32(2).raw(tcBlock, 4).i32(2).ref(last).ref(last).raw(tcEnd)
		last++
	}
	bomb := s

	tests := []struct {
		name string
		in   []byte
		want *Kind
	}{
		{"nothing", nil, ErrHeader},
		{"header only", begin(), ErrTruncated},
		{"wrong version", []byte("\xac\xed\x00\x06p"), ErrHeader},
		{"two values", begin().raw(tcNull, tcNull), ErrTrailing},
		{"a block", begin().raw(tcBlock, 1, 7), ErrCode},
		{"unknown code", begin().raw(0x01), ErrCode},
		{"end mark", begin().raw(tcEnd), ErrCode},
		{"unlisted class", begin().raw(tcObject).class("com.example.Gadget", plain, 0).raw(tcEnd, tcNull), ErrClass},
		{"unlisted array", begin().raw(tcArray).class("[Lcom.example.Gadget;", plain, 0).raw(tcEnd, tcNull).i32(0), ErrClass},
		{"unlisted enum", begin().raw(tcEnum).class("com.example.Colour", enum, 0).raw(tcEnd, tcNull, tcString).text("RED"), ErrClass},
		{"proxy", begin().raw(tcObject, tcProxy).i32(1).text("java.util.Map").raw(tcEnd, tcNull), ErrProxy},
		{"class object", begin().raw(tcClass).class("java.lang.String", plain, 0).raw(tcEnd, tcNull), ErrUnsupported},
		{"reset", begin().raw(tcReset, tcNull), ErrUnsupported},
		{"exception", begin().raw(tcException), ErrUnsupported},
		{"list in itself", arrayList(begin()).i32(1).raw(tcBlock, 4).i32(1).ref(1).raw(tcEnd), ErrLoop},
		{"array in itself", begin().raw(tcArray).class(objectArrayClass, plain, 0).raw(tcEnd, tcNull).i32(1).ref(1), ErrLoop},
		{"class its own super class", begin().raw(tcObject).class(ArrayList, custom, 0).raw(tcEnd).ref(0).raw(tcEnd), ErrDepth},
		{"reference to nothing", begin().ref(0), ErrHandle},
		{"negative reference", begin().ref(-5), ErrHandle},
		{"reference to a class", arrayList(begin()).i32(1).raw(tcBlock, 4).i32(1).ref(0).raw(tcEnd), ErrHandle},
		{"string as class", begin().raw(tcArray).class(objectArrayClass, plain, 0).raw(tcEnd, tcNull).i32(2).raw(tcString).text("x").raw(tcObject).ref(2), ErrHandle},
		{"nested 10,000 deep", nest(10000), ErrDepth},
		{"doubling lists", bomb, ErrTooLarge},
		{"array of 2^31-1", begin().raw(tcArray).class("[J", plain, 0).raw(tcEnd, tcNull).i32(1<<31 - 1), ErrTruncated},
		{"array of -1", begin().raw(tcArray).class("[B", plain, 0).raw(tcEnd, tcNull).i32(-1), ErrTruncated},
		{"object array of 2^31-1", begin().raw(tcArray).class(objectArrayClass, plain, 0).raw(tcEnd, tcNull).i32(1<<31 - 1).raw(tcNull), ErrTruncated},
		{"long string of 2^63", begin().raw(tcLongStr, 0x80, 0, 0, 0, 0, 0, 0, 0), ErrTruncated},
		{"list of -1", arrayList(begin()).i32(-1).raw(tcBlock, 4).i32(-1).raw(tcEnd), ErrShape},
		{"list with less than it says", arrayList(begin()).i32(7).raw(tcBlock, 4).i32(7).raw(tcEnd), ErrShape},
		{"half a surrogate pair cut", begin().raw(tcString).text("\xed\xa0"), ErrText},
		{"continuation byte alone", begin().raw(tcString).text("\x80"), ErrText},
		{"four byte form", begin().raw(tcString).text("\xf0\x9f\x98\x80"), ErrText},
		{"Integer without value", begin().raw(tcObject).class(lang+"Integer", custom, 0).raw(tcEnd, tcNull, tcEnd), nil},
		{"Integer with text", begin().raw(tcObject).class(lang+"Integer", plain, 1).raw('L').text("value").raw(tcString).text("Lx;").raw(tcEnd, tcNull, tcString).text("x"), ErrShape},
		{"unknown field type", begin().raw(tcObject).class(lang+"Integer", plain, 1).raw('Q').text("value").raw(tcEnd, tcNull), ErrCode},
		{"enum flags on an object", begin().raw(tcObject).class(ArrayList, enum, 0).raw(tcEnd, tcNull), ErrUnsupported},
		{"no flags", begin().raw(tcObject).class(ArrayList, 0, 0).raw(tcEnd, tcNull), ErrUnsupported},
		{"both flags", begin().raw(tcObject).class(ArrayList, 0x0e, 0).raw(tcEnd, tcNull), ErrUnsupported},
		{"old externalizable", begin().raw(tcObject).class(rpcName, 0x04, 0).raw(tcEnd, tcNull), ErrUnsupported},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v, err := Decode(tt.in, Limits{})
			if tt.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, %v; want %v", v, err, tt.want)
			}
			if Reason(err) != tt.want.Reason || !errors.Is(err, channel.ErrBadMessage) && !errors.Is(err, channel.ErrTooLarge) {
				t.Errorf("reason %q, error %v", Reason(err), err)
			}
		})
	}
}

// TestOtherFlags: a listed class whose description says another way of writing
// than it has does no harm.
func TestOtherFlags(t *testing.T) {
	for name, c := range classes {
		for _, flags := range []byte{plain, custom, external} {
			s := begin().raw(tcObject, tcClassDesc).text(name).raw(0, 0, 0, 0, 0, 0, 0, 1, flags)
			s = append(s, byte(len(c.Fields)>>8), byte(len(c.Fields)))
			for _, f := range c.Fields {
				s = s.raw(f.Type[0]).text(f.Name)
				if f.Type[0] == 'L' || f.Type[0] == '[' {
					s = s.raw(tcString).text(f.Type)
				}
			}
			s = s.raw(tcEnd, tcNull)
			for _, rest := range [][]byte{nil, {tcEnd}, bytes.Repeat([]byte{tcNull}, 100), append(bytes.Repeat([]byte{tcNull}, len(c.Fields)), tcEnd), bytes.Repeat([]byte{0}, 100)} {
				if v, err := Decode(append(s[:len(s):len(s)], rest...), Limits{}); err == nil {
					_, _ = Encode(v)
				}
			}
		}
	}
}

// TestDeltaCounts: a declared number of actions is not believed.
func TestDeltaCounts(t *testing.T) {
	for _, n := range []int32{-1, 1<<31 - 1, 1} {
		var s sink
		s.utf("id")
		s.flag(false)
		s.i32(n)
		b, err := s.format(nil)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := DecodeDelta(b, Limits{}); !errors.Is(err, ErrShape) {
			t.Errorf("count %d: got %v, %v", n, d, err)
		}
	}
}

// TestKeepUnlisted carries a foreign object as data, byte for byte.
func TestKeepUnlisted(t *testing.T) {
	b := begin().raw(tcObject).class("com.example.Gadget", custom, 2).raw('I').text("n").
		raw('L').text("name").raw(tcString).text("Ljava/lang/String;").raw(tcEnd, tcNull).
		i32(7).raw(tcString).text("x").raw(tcBlock, 2, 1, 2).ref(3).raw(tcEnd)
	if _, err := Decode(b, Limits{}); !errors.Is(err, ErrClass) || !strings.Contains(err.Error(), `"com.example.Gadget"`) {
		t.Errorf("got %v", err)
	}
	v, err := Decode(b, Limits{KeepUnlisted: true})
	if err != nil {
		t.Fatal(err)
	}
	o := v.(*Object)
	if o.Class.Name != "com.example.Gadget" || o.Parts[0].Fields[0] != int32(7) || o.Parts[0].Fields[1] != "x" {
		t.Errorf("got %+v", o)
	}
	out, err := Encode(v)
	if err != nil || !bytes.Equal(out, b) {
		t.Errorf("encoded again (%v)\ngot  %x\nwant %x", err, out, []byte(b))
	}
}

// TestMemory: what is declared costs nothing, what is there a bounded multiple.
func TestMemory(t *testing.T) {
	b := begin().raw(tcArray).class(objectArrayClass, plain, 0).raw(tcEnd, tcNull).i32(1 << 20)
	for range 1 << 20 {
		b = b.raw(tcNull)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := Decode(b, Limits{Expanded: 1 << 20})
	runtime.ReadMemStats(&after)
	if !errors.Is(err, channel.ErrTooLarge) {
		t.Errorf("got %v", err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20 {
		t.Errorf("%d bytes were allocated within a bound of 1 MiB", n)
	}
	if _, err := Decode(b, Limits{Size: 1000}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("got %v", err)
	}
}

func TestEncodeRefuses(t *testing.T) {
	loop := &List{}
	loop.Items = []Value{loop}
	deep := Value(nil)
	for range 2000 {
		deep = &List{Items: []Value{deep}}
	}
	for _, v := range []Value{42, struct{}{}, "\xff", &Array{Class: "x"}, &List{Class: "com.example.List"}, &Object{}, deep,
		&Object{Class: &Class{Name: "a"}, Parts: []Part{{}}}, &Map{Class: EmptyMap, Entries: []Entry{{}}}} {
		if b, err := Encode(v); err == nil {
			t.Errorf("%T was encoded: %x", v, b)
		}
	}
	// A loop is written as a loop, and refused by the reader.
	b, err := Encode(loop)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decode(b, Limits{}); !errors.Is(err, ErrLoop) {
		t.Errorf("got %v", err)
	}
	for _, v := range []Value{(*List)(nil), (*Array)(nil), (*Member)(nil), (*RPCMessage)(nil), []byte(nil), []*Member(nil)} {
		if b, err := Encode(v); err != nil || string(b) != magic+"p" {
			t.Errorf("%T: %x %v", v, b, err)
		}
	}
}

func TestText(t *testing.T) {
	for _, s := range []string{"", "a", "\x00", "é€😀", "\xed\xa0\x80", "a\xed\xb0\x80\xed\xa0\x80", "￿"} {
		b, err := Encode(s)
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if v, err := Decode(b, Limits{}); err != nil || v != s {
			t.Errorf("%q became %q (%v)", s, v, err)
		}
	}
}

func TestDialect(t *testing.T) {
	d, ok := DialectOf(Tomcat9)
	if !ok {
		t.Fatal("unknown")
	}
	b, err := d.Encode(MemberOf(channel.Member{Host: channelHost, Port: 4000, SecurePort: -1, UDPPort: -1}))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, []byte{0x2e, 0x21, 0x08, 0x79, 0x15, 0x50, 0x6d, 0x1c}) {
		t.Errorf("the UID of 9.0 is not in %x", b)
	}
	if v, err := Decode(b, Limits{}); err != nil || v.(*Member).Port != 4000 {
		t.Errorf("got %v, %v", v, err)
	}
	if _, ok := DialectOf("3.2"); ok {
		t.Error("3.2 is known")
	}
}
