package peer

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
)

// Bytes is a byte message (Tribes: ByteMessage), unlike []byte, which is an
// array that is sent as an object.
type Bytes []byte

// Pairs is a java.util.HashMap: key, value, key, value…
type Pairs []any

// Other is an object of a class that has no counterpart here: the name of the
// class and the object's text.
type Other string

// Encode writes v in the form that the driver reads: nil, bool, int32, int64,
// float64, time.Time (java.util.Date), string, []byte, [Bytes], []any
// (ArrayList) and [Pairs].
func Encode(v any) (string, error) {
	var b strings.Builder
	if err := encode(&b, v); err != nil {
		return "", err
	}
	return b.String(), nil
}

func encode(b *strings.Builder, v any) error {
	switch v := v.(type) {
	case nil:
		b.WriteByte('N')
	case bool:
		if v {
			b.WriteString("Z1;")
		} else {
			b.WriteString("Z0;")
		}
	case int32:
		fmt.Fprintf(b, "I%d;", v)
	case int64:
		fmt.Fprintf(b, "J%d;", v)
	case float64:
		fmt.Fprintf(b, "D%s;", strconv.FormatFloat(v, 'g', -1, 64))
	case time.Time:
		fmt.Fprintf(b, "T%d;", v.UnixMilli())
	case string:
		fmt.Fprintf(b, "S%d:%s", len(utf16.Encode([]rune(v))), v)
	case []byte:
		fmt.Fprintf(b, "B%d:%x", 2*len(v), v)
	case Bytes:
		fmt.Fprintf(b, "M%d:%x", 2*len(v), []byte(v))
	case []any:
		fmt.Fprintf(b, "L%d;", len(v))
		return each(b, v)
	case Pairs:
		fmt.Fprintf(b, "H%d;", len(v)/2)
		return each(b, v)
	default:
		return fmt.Errorf("peer: no Java counterpart of %T", v)
	}
	return nil
}

func each(b *strings.Builder, l []any) error {
	for _, e := range l {
		if err := encode(b, e); err != nil {
			return err
		}
	}
	return nil
}

// Decode reads what the driver has written; see [Encode] for the types.
func Decode(s string) (any, error) {
	r := reader{units: utf16.Encode([]rune(s))}
	v := r.next()
	if r.err == nil && r.at != len(r.units) {
		r.err = fmt.Errorf("%d characters behind the value", len(r.units)-r.at)
	}
	if r.err != nil {
		return nil, fmt.Errorf("peer: value %q: %w", s, r.err)
	}
	return v, nil
}

// reader counts in UTF-16 units, as Java does.
type reader struct {
	units []uint16
	at    int
	err   error
}

func (r *reader) until(end uint16) string {
	for i := r.at; i < len(r.units); i++ {
		if r.units[i] == end {
			s := string(utf16.Decode(r.units[r.at:i]))
			r.at = i + 1
			return s
		}
	}
	r.fail(fmt.Errorf("%q is missing", rune(end)))
	return ""
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) number(end uint16) int64 {
	n, err := strconv.ParseInt(r.until(end), 10, 64)
	if err != nil {
		r.fail(err)
	}
	return n
}

func (r *reader) counted() string {
	n := r.number(':')
	if r.err != nil || n < 0 || n > int64(len(r.units)-r.at) {
		r.fail(fmt.Errorf("%d characters do not fit", n))
		return ""
	}
	s := string(utf16.Decode(r.units[r.at : r.at+int(n)]))
	r.at += int(n)
	return s
}

func (r *reader) binary() []byte {
	b, err := hex.DecodeString(r.counted())
	if err != nil {
		r.fail(err)
	}
	return b
}

func (r *reader) next() any {
	if r.err != nil || r.at == len(r.units) {
		r.fail(fmt.Errorf("it ends early"))
		return nil
	}
	r.at++
	switch c := r.units[r.at-1]; c {
	case 'N':
		return nil
	case 'Z':
		return r.until(';') == "1"
	case 'I':
		return int32(r.number(';'))
	case 'J':
		return r.number(';')
	case 'D':
		f, err := strconv.ParseFloat(r.until(';'), 64)
		if err != nil {
			r.fail(err)
		}
		return f
	case 'T':
		return time.UnixMilli(r.number(';')).UTC()
	case 'S':
		return r.counted()
	case 'O':
		return Other(r.counted())
	case 'B':
		return r.binary()
	case 'M':
		return Bytes(r.binary())
	case 'L':
		l := []any{}
		for n := r.number(';'); n > 0 && r.err == nil; n-- {
			l = append(l, r.next())
		}
		return l
	case 'H':
		p := Pairs{}
		for n := 2 * r.number(';'); n > 0 && r.err == nil; n-- {
			p = append(p, r.next())
		}
		return p
	default:
		r.fail(fmt.Errorf("no value starts with %q", rune(c)))
		return nil
	}
}

// Fill returns head and behind it bytes that do not compress well, size bytes
// together. The driver makes the same ones.
func Fill(head []byte, size int) []byte {
	b := make([]byte, max(size, len(head)))
	x := uint32(1)
	for i := copy(b, head); i < len(b); i++ {
		x = x*1103515245 + 12345
		b[i] = byte(x >> 16)
	}
	return b
}
