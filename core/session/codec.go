package session

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"
	"unicode/utf8"
)

// Bounds of what is encoded and decoded.
const (
	// MaxSize bounds the attributes of one record, see [Record.Size], in bytes.
	MaxSize = 16 << 20
	// MaxName bounds the name of an attribute, in bytes.
	MaxName = 1 << 10
	// MaxAttrs bounds the attributes of one record, deleted ones included.
	MaxAttrs = 16 << 10
	// MaxContext bounds the name of a context, in bytes.
	MaxContext = 1 << 10
	// maxPastRead bounds the nodes of a past that is decoded; [Past] says how
	// many are kept.
	maxPastRead = 1 << 10
	// maxNodeTime bounds times, in milliseconds: the year 9999.
	maxNodeTime = 253402300799999
)

// ErrBadRecord: bytes that are no record, or one that exceeds a bound.
var ErrBadRecord = errors.New("session: bad record")

// A batch is a CBOR sequence (RFC 8742) of records. A record is an array of
//
//	context, id, created, lastAccess, maxInactive (ns), its version's counter,
//	its version's node, end, endTime, renewedTo, [attribute…]
//
// and an attribute an array of name, value (a byte string, or null if deleted),
// counter, node, and its past: an array of counter and node for each node of it.
// Both may be longer: later versions append fields. Those of a record are
// skipped, those of an attribute kept with its value as long as that is not
// changed. The past may be missing, as in the first version of this encoding:
// then it is all with a lower counter.
const (
	recordFields = 11
	minFields    = 4 // of an attribute
	attrFields   = 5
)

// CBOR major types, shifted to their place in the first byte.
const (
	majorUint  = 0 << 5
	majorNeg   = 1 << 5
	majorBytes = 2 << 5
	majorText  = 3 << 5
	majorArray = 4 << 5
	majorMap   = 5 << 5
	majorTag   = 6 << 5
	majorOther = 7 << 5

	cborNull = majorOther | 22
)

// AppendBatch appends the encoded records to dst: batches may be joined by
// appending. Equal records have equal bytes.
func AppendBatch(dst []byte, recs ...*Record) []byte {
	for _, r := range recs {
		dst = appendRecord(dst, r)
	}
	return dst
}

func appendRecord(dst []byte, r *Record) []byte {
	dst = appendFields(dst, r)
	if r.End != Living {
		return appendHead(dst, majorArray, 0)
	}
	dst = appendHead(dst, majorArray, uint64(len(r.Attrs)))
	if len(r.Attrs) <= 1 {
		for name, e := range r.Attrs {
			dst = appendEntry(dst, name, e)
		}
		return dst
	}
	var few [16]string
	names := few[:0]
	for name := range r.Attrs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		dst = appendEntry(dst, name, r.Attrs[name])
	}
	return dst
}

// appendFields appends all of a record but the attributes.
func appendFields(dst []byte, r *Record) []byte {
	dst = appendHead(dst, majorArray, recordFields)
	dst = appendText(dst, r.Key.Context)
	dst = appendText(dst, r.Key.ID)
	if r.End != Living {
		dst = append(dst, 0, 0, 0, 0, 0)
		dst = appendHead(dst, majorUint, uint64(r.End))
		dst = appendInt(dst, r.EndTime)
		return appendText(dst, r.RenewedTo)
	}
	dst = appendInt(dst, r.Created)
	dst = appendInt(dst, r.LastAccess)
	dst = appendInt(dst, int64(r.MaxInactive))
	dst = appendHead(dst, majorUint, r.MaxInactiveVersion.Counter)
	dst = appendHead(dst, majorUint, r.MaxInactiveVersion.Node)
	return append(dst, 0, 0, majorText) // living: no end, end time and successor
}

func appendEntry(dst []byte, name string, e Entry) []byte {
	past := cmp.Or(e.Past, &nothing)
	dst = appendHead(dst, majorArray, uint64(attrFields+past.fields))
	dst = appendText(dst, name)
	if e.Deleted {
		dst = append(dst, cborNull)
	} else {
		dst = append(appendHead(dst, majorBytes, uint64(len(e.Value))), e.Value...)
	}
	dst = appendVersion(dst, e.Version)
	dst = appendHead(dst, majorArray, uint64(2*len(past.seen)))
	for _, v := range past.seen {
		dst = appendVersion(dst, v)
	}
	return append(dst, past.rest...)
}

func appendVersion(dst []byte, v Version) []byte {
	return appendHead(appendHead(dst, majorUint, v.Counter), majorUint, v.Node)
}

func appendText(dst []byte, s string) []byte {
	return append(appendHead(dst, majorText, uint64(len(s))), s...)
}

func appendInt(dst []byte, v int64) []byte {
	if v < 0 {
		return appendHead(dst, majorNeg, uint64(^v))
	}
	return appendHead(dst, majorUint, uint64(v))
}

func appendHead(dst []byte, major byte, n uint64) []byte {
	switch {
	case n < 24:
		return append(dst, major|byte(n))
	case n <= math.MaxUint8:
		return append(dst, major|24, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(dst, major|25), uint16(n))
	case n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(dst, major|26), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(dst, major|27), n)
}

// DecodeBatch calls each with every record of the batch, until one returns an
// error. The record and its map are used again for the next one, and its values
// are parts of b: keep a [Record.Clone]. Everything is checked before it is
// used: lengths, the bounds of this package, names and keys. Errors but those of
// each are ErrBadRecord.
func DecodeBatch(b []byte, each func(*Record) error) error {
	d := decoders.Get().(*Decoder)
	defer decoders.Put(d)
	d.Reset(b)
	defer d.Reset(nil)
	for d.Next() {
		if err := each(d.Record()); err != nil {
			return err
		}
	}
	return d.Err()
}

var decoders = sync.Pool{New: func() any { return new(Decoder) }}

// Decoder reads the records of a batch one by one; it is what [DecodeBatch]
// uses. The zero Decoder is an empty batch.
type Decoder struct {
	b    []byte // what is left
	raw  []byte // the current record
	rec  Record
	err  error
	seen map[string]string // names and contexts decoded before, to share their strings
}

// maxSeen bounds Decoder.seen, in strings.
const maxSeen = 1024

// Reset starts over with another batch.
func (d *Decoder) Reset(b []byte) {
	d.b, d.raw, d.err = b, nil, nil
	d.clear()
}

// clear empties the record but keeps its map.
func (d *Decoder) clear() {
	attrs := d.rec.Attrs
	if len(attrs) > 0 {
		clear(attrs)
	}
	d.rec = Record{Attrs: attrs}
}

// Next decodes the next record; false at the end or after an error.
func (d *Decoder) Next() bool {
	if d.err != nil || len(d.b) == 0 {
		return false
	}
	in := reader{b: d.b}
	d.decode(&in)
	if in.err != nil {
		d.err = fmt.Errorf("%w: %s at byte %d of the rest of %d", ErrBadRecord, in.err, in.off, len(d.b))
		return false
	}
	d.raw, d.b = d.b[:in.off:in.off], d.b[in.off:]
	return true
}

// Record returns the current record, valid until Next is called.
func (d *Decoder) Record() *Record { return &d.rec }

// Raw returns the bytes of the current record, a part of the batch.
func (d *Decoder) Raw() []byte { return d.raw }

// Err returns why Next stopped; nil at the end of the batch.
func (d *Decoder) Err() error { return d.err }

func (d *Decoder) decode(in *reader) {
	d.clear()
	r := &d.rec
	fields := in.head(majorArray)
	if fields < recordFields {
		in.fail("record with too few fields")
		return
	}
	r.Key.Context = d.text(in, MaxContext)
	r.Key.ID = string(in.text(MaxID))
	r.Created = in.time()
	r.LastAccess = in.time()
	r.MaxInactive = time.Duration(in.int())
	r.MaxInactiveVersion = Version{in.head(majorUint), in.head(majorUint)}
	end := in.head(majorUint)
	r.EndTime = in.time()
	r.RenewedTo = string(in.text(MaxID))
	d.attrs(in)
	for range fields - recordFields {
		in.skip(0)
		if in.err != nil {
			return
		}
	}
	switch {
	case in.err != nil:
	case r.Key.ID == "":
		in.fail("record without id")
	case end > uint64(Invalidated):
		// A later version's way to end: it is over in any case.
		r.End = Invalidated
		d.rec = r.Tombstone()
		d.rec.Attrs = nil
	case end != uint64(Living):
		r.End = EndKind(end)
		d.rec = r.Tombstone()
	default:
		r.EndTime, r.RenewedTo = 0, ""
	}
}

// attrs decodes the attributes into the record's map.
func (d *Decoder) attrs(in *reader) {
	n := in.head(majorArray)
	if n > MaxAttrs || n > uint64(len(in.b)-in.off) {
		in.fail("too many attributes")
		return
	}
	if n > 0 && d.rec.Attrs == nil {
		d.rec.Attrs = make(map[string]Entry, n)
	}
	size := 0
	for range n {
		fields := in.head(majorArray)
		if fields < minFields {
			in.fail("attribute with too few fields")
		}
		name := d.text(in, MaxName)
		var e Entry
		e.Value, e.Deleted = in.bytesOrNull()
		e.Version = Version{in.head(majorUint), in.head(majorUint)}
		switch {
		case fields == minFields && e.Version.Counter > 1:
			e.Past = &Past{seen: []Version{{Counter: e.Version.Counter - 1}}}
		case fields >= attrFields:
			e.Past = in.past(e.Version, fields-attrFields)
		}
		if size += len(name) + len(e.Value) + len(e.Past.more()); size > MaxSize {
			in.fail("larger than 16 MiB")
		}
		if name == "" {
			in.fail("attribute without name")
		}
		if in.err != nil {
			return
		}
		d.rec.Attrs[name] = e
	}
	if in.err == nil && len(d.rec.Attrs) != int(n) {
		in.fail("attribute twice")
	}
}

// past decodes the past of an entry of that version, and the fields after it.
func (r *reader) past(v Version, fields uint64) *Past {
	n := r.head(majorArray)
	if n%2 != 0 || n > 2*maxPastRead {
		r.fail("bad past of an attribute")
		return nil
	}
	if n == 0 && fields == 0 {
		return nil
	}
	p := &Past{seen: make([]Version, 0, n/2+1)}
	for ; n > 0 && r.err == nil; n -= 2 {
		p.seen = append(p.seen, Version{r.head(majorUint), r.head(majorUint)})
	}
	start := r.off
	for range fields {
		if r.skip(0); r.err != nil {
			return nil
		}
	}
	if fields > 0 {
		p.rest, p.fields = bytes.Clone(r.b[start:r.off]), int(fields)
	}
	p.seen = normal(append(p.seen, v)) // foreign bytes may have it in another form
	if i := slices.Index(p.seen, v); i >= 0 {
		p.seen = slices.Delete(p.seen, i, i+1)
	}
	if len(p.seen) == 0 && fields == 0 {
		return nil
	}
	return p
}

// text decodes a text that probably came before.
func (d *Decoder) text(in *reader, limit int) string {
	b := in.raw(limit)
	if s, ok := d.seen[string(b)]; ok { // does not allocate
		return s
	}
	if !utf8.Valid(b) {
		in.fail("text is not UTF-8")
		return ""
	}
	s := string(b)
	if d.seen == nil || len(d.seen) >= maxSeen {
		d.seen = make(map[string]string)
	}
	d.seen[s] = s
	return s
}

// reader decodes CBOR items. After an error it returns zero values.
type reader struct {
	b   []byte
	off int
	err error
}

func (r *reader) fail(what string) {
	if r.err == nil {
		r.err = errors.New(what)
	}
}

// any reads the head of an item.
func (r *reader) any() (major byte, n uint64) {
	if r.err != nil {
		return 0, 0
	}
	if r.off >= len(r.b) {
		r.fail("cut off")
		return 0, 0
	}
	first := r.b[r.off]
	r.off++
	info := first & 31
	if info < 24 {
		return first & 0xe0, uint64(info)
	}
	if info > 27 {
		r.fail("indefinite or reserved length")
		return 0, 0
	}
	size := 1 << (info - 24)
	if len(r.b)-r.off < size {
		r.fail("cut off")
		return 0, 0
	}
	for _, c := range r.b[r.off : r.off+size] {
		n = n<<8 | uint64(c)
	}
	r.off += size
	return first & 0xe0, n
}

// head reads the head of an item of that major type.
func (r *reader) head(major byte) uint64 {
	if r.err == nil && r.off < len(r.b) {
		if c := r.b[r.off]; c&31 < 24 && c&0xe0 == major { // the usual case
			r.off++
			return uint64(c & 31)
		}
	}
	m, n := r.any()
	if r.err == nil && m != major {
		r.fail("unexpected type")
		return 0
	}
	return n
}

func (r *reader) int() int64 {
	if r.err == nil && r.off < len(r.b) && r.b[r.off] < 24 { // the usual case
		r.off++
		return int64(r.b[r.off-1])
	}
	m, n := r.any()
	switch {
	case r.err != nil:
		return 0
	case m != majorUint && m != majorNeg:
		r.fail("unexpected type")
		return 0
	case n > math.MaxInt64:
		r.fail("number out of range")
		return 0
	case m == majorNeg:
		return ^int64(n)
	}
	return int64(n)
}

// time reads milliseconds since 1970.
func (r *reader) time() int64 {
	v := r.int()
	if v < 0 || v > maxNodeTime {
		r.fail("time out of range")
		return 0
	}
	return v
}

// take returns the next n bytes.
func (r *reader) take(n uint64) []byte {
	if r.err != nil {
		return nil
	}
	if n > uint64(len(r.b)-r.off) {
		r.fail("cut off")
		return nil
	}
	b := r.b[r.off : r.off+int(n) : r.off+int(n)]
	r.off += int(n)
	return b
}

// raw reads a text that is not checked to be UTF-8.
func (r *reader) raw(limit int) []byte {
	n := r.head(majorText)
	if n > uint64(limit) {
		r.fail("text too long")
		return nil
	}
	return r.take(n)
}

func (r *reader) text(limit int) []byte {
	b := r.raw(limit)
	if !utf8.Valid(b) {
		r.fail("text is not UTF-8")
		return nil
	}
	return b
}

func (r *reader) bytesOrNull() (b []byte, null bool) {
	if r.err == nil && r.off < len(r.b) && r.b[r.off] == cborNull {
		r.off++
		return nil, true
	}
	return r.take(r.head(majorBytes)), false
}

// maxSkip bounds the nesting of an item that is skipped.
const maxSkip = 16

// skip passes over one item.
func (r *reader) skip(depth int) {
	if depth > maxSkip {
		r.fail("nested too deep")
		return
	}
	major, n := r.any()
	switch major {
	case majorBytes, majorText:
		r.take(n)
		return
	case majorUint, majorNeg, majorOther:
		return
	case majorTag:
		n = 1
	case majorMap:
		if n > math.MaxInt64 {
			r.fail("cut off")
			return
		}
		n *= 2
	}
	for ; n > 0 && r.err == nil; n-- { // ends at the end of the input
		r.skip(depth + 1)
	}
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}
