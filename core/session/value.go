package session

import (
	"fmt"
	"reflect"

	"github.com/fxamacker/cbor/v2"
)

// maxNesting bounds how deep a value may be nested, when it is encoded by a
// foreign node and decoded here.
const maxNesting = 64

var (
	encMode = must(cbor.EncOptions{
		Sort:          cbor.SortBytewiseLexical,
		ShortestFloat: cbor.ShortestFloat16,
		Time:          cbor.TimeRFC3339Nano,
		TimeTag:       cbor.EncTagRequired,
		BigIntConvert: cbor.BigIntConvertShortest,
	}.EncMode())
	decMode = must(cbor.DecOptions{
		MaxNestedLevels:  maxNesting,
		MaxArrayElements: 1 << 20,
		MaxMapPairs:      1 << 20,
		DefaultMapType:   reflect.TypeFor[map[string]any](),
	}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil { // constants of this file
		panic("session: cbor mode: " + err.Error())
	}
	return v
}

// Encode returns the bytes of an attribute value: deterministic CBOR, so that
// equal values have equal bytes.
func Encode(v any) ([]byte, error) {
	b, err := encMode.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("session: encode a %T: %w", v, err)
	}
	return b, nil
}

// Decode decodes the bytes of an attribute value into the pointer into. Values
// nested deeper than 64 levels are refused. Of an attribute with a merge rule it
// decodes what it stands for: the number or the list.
func Decode(b []byte, into any) error {
	if v, ok := parseRuled(b); ok {
		var err error
		if b, err = Encode(v.plain()); err != nil {
			return err
		}
	}
	if err := decMode.Unmarshal(b, into); err != nil {
		return fmt.Errorf("session: decode into a %T: %w", into, err)
	}
	return nil
}

// Attr is the typed view of one attribute: its value is the attribute's name.
//
//	const cart = session.Attr[Cart]("cart")
//	err := cart.Update(s, func(c *Cart) error { c.Add(item); return nil })
//
// T must be something that CBOR can encode; unexported fields are not kept.
type Attr[T any] string

// Get returns the value; false if the attribute is not set.
func (a Attr[T]) Get(s Session) (v T, ok bool, err error) {
	ok, err = s.Get(string(a), &v)
	return v, ok, err
}

// Set stores the value.
func (a Attr[T]) Set(s Session, v T) error { return s.Set(string(a), v) }

// Delete removes the attribute.
func (a Attr[T]) Delete(s Session) error { return s.Delete(string(a)) }

// Update lets change work on the value (T's zero value if the attribute is not
// set) and stores it, unless change returns an error. See [Session.Update] for
// what change must not do, and that it may be called more than once.
func (a Attr[T]) Update(s Session, change func(*T) error) error {
	return s.Update(string(a), func(old []byte) ([]byte, error) {
		var v T
		if old != nil {
			if err := Decode(old, &v); err != nil {
				return nil, err
			}
		}
		if err := change(&v); err != nil {
			return nil, err
		}
		return Encode(v)
	})
}
