package session

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

var testKey = Key{"localhost/shop", "0123456789ABCDEF0123456789ABCDEF"}

func anyVersion(t *rapid.T, label string) Version {
	return Version{rapid.Uint64Range(0, 4).Draw(t, label+"c"), rapid.Uint64Range(1, 3).Draw(t, label+"n")}
}

// anyRecord draws a partial record with few names and versions, so that records
// meet each other.
func anyRecord(t *rapid.T, label string, ends bool) *Record {
	r := &Record{Key: testKey}
	if ends && rapid.IntRange(0, 3).Draw(t, label+"ended") == 0 {
		r.End = EndKind(rapid.IntRange(1, 3).Draw(t, label+"end"))
		r.EndTime = rapid.Int64Range(0, 5).Draw(t, label+"endtime")
		r.RenewedTo = rapid.SampledFrom([]string{"", "A", "B"}).Draw(t, label+"to")
		return r
	}
	r.Created = rapid.Int64Range(0, 3).Draw(t, label+"created")
	r.LastAccess = rapid.Int64Range(0, 1<<40).Draw(t, label+"access")
	r.MaxInactive = time.Duration(rapid.Int64Range(-1, 3).Draw(t, label+"max"))
	r.MaxInactiveVersion = anyVersion(t, label+"mi")
	for _, name := range rapid.SliceOfDistinct(rapid.SampledFrom([]string{"a", "b", "c", "d"}), rapid.ID[string]).Draw(t, label+"names") {
		e := Entry{Version: anyVersion(t, label+name)}
		if e.Deleted = rapid.Bool().Draw(t, label+name+"del"); !e.Deleted {
			e.Value = []byte{byte(rapid.IntRange(0, 2).Draw(t, label+name+"v"))}
			if rapid.Bool().Draw(t, label+name+"ruled") {
				e.Value = anyRuled(t, label+name)
			}
		}
		e.Past = anyPast(t, label+name, e.Version)
		if r.Attrs == nil {
			r.Attrs = map[string]Entry{}
		}
		r.Attrs[name] = e
	}
	return r
}

// anyPast draws a past, some with fewer and some with more nodes than are kept.
func anyPast(t *rapid.T, label string, v Version) *Past {
	var seen []Version
	for range rapid.SampledFrom([]int{0, 0, 1, 2, maxPast + 3}).Draw(t, label+"past") {
		seen = append(seen, Version{rapid.Uint64Range(0, 30).Draw(t, label+"pastc"), rapid.Uint64Range(0, maxPast+5).Draw(t, label+"pastn")})
	}
	e := Entry{Version: v}
	var rest *Past
	if rapid.IntRange(0, 3).Draw(t, label+"more") == 0 {
		rest = &Past{rest: []byte{byte(rapid.IntRange(1, 3).Draw(t, label+"field"))}, fields: 1}
	}
	return makePast(v, e, Entry{Past: &Past{seen: seen}}, rest)
}

func merged(rs ...*Record) *Record {
	m := rs[0].Clone()
	for _, r := range rs[1:] {
		m.Merge(r)
	}
	return m
}

func equal(t interface{ Fatalf(string, ...any) }, what string, a, b *Record) {
	if d := cmp.Diff(a, b, cmpopts.EquateEmpty()); d != "" {
		t.Fatalf("%s:\n%s", what, d)
	}
}

func TestMergeLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := anyRecord(t, "a", true), anyRecord(t, "b", true), anyRecord(t, "c", true)
		before := a.Clone()
		equal(t, "commutative", merged(a, b), merged(b, a))
		equal(t, "associative", merged(merged(a, b), c), merged(a, merged(b, c)))
		equal(t, "idempotent", merged(a, a), a)
		equal(t, "absorbing", merged(a, b, b, a), merged(a, b))
		equal(t, "arguments untouched", before, a)
		if x, y := a.Clone().Merge(b), b.Clone().Merge(a); x != y {
			t.Fatalf("conflicts: %d one way, %d the other", x, y)
		}
		m := merged(a, b, c)
		if ended := a.End != Living || b.End != Living || c.End != Living; ended != (m.End != Living) {
			t.Fatalf("resurrected or killed: %+v", m)
		}
		if m.End != Living && (len(m.Attrs) > 0 || m.LastAccess != 0) {
			t.Fatalf("a tombstone with life in it: %+v", m)
		}
	})
}

// TestReplicaIsRecord proves that the two forms of a session follow one rule.
func TestReplicaIsRecord(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rs := make([]*Record, rapid.IntRange(1, 5).Draw(t, "n"))
		rec, rep := &Record{Key: testKey}, &Replica{}
		for i := range rs {
			r := anyRecord(t, fmt.Sprint(i), false)
			if x, y := rec.Merge(r), rep.Merge(r); x != y {
				t.Fatalf("conflicts %d and %d", x, y)
			}
		}
		equal(t, "replica", rec, rep.Record(testKey))
		if a, b := AppendBatch(nil, rec), rep.AppendTo(nil, testKey); !bytes.Equal(a, b) {
			t.Fatalf("encoded differently:\n%x\n%x", a, b)
		}
		if rec.Size() != rep.Size() || rep.Whole() != (rec.Created != 0) {
			t.Fatal("size or wholeness differ")
		}
	})
}

func TestReplicaDigest(t *testing.T) {
	mk := func(change func(*Record)) uint64 {
		r := &Record{Created: 1, LastAccess: 2, Attrs: map[string]Entry{"a": {Value: []byte{1}, Version: Version{1, 1}}}}
		if change != nil {
			change(r)
		}
		p := &Replica{}
		p.Merge(r)
		return p.Digest()
	}
	same := mk(nil)
	if mk(nil) != same {
		t.Fatal("not deterministic")
	}
	for i, f := range []func(*Record){
		func(r *Record) { r.Created = 9 },
		func(r *Record) { r.LastAccess = 2 * digestAccess },
		func(r *Record) { r.Attrs["b"] = Entry{Deleted: true} },
		func(r *Record) { r.Attrs["a"] = Entry{Version: Version{1, 2}} },
		func(r *Record) { r.MaxInactiveVersion.Counter = 3 },
	} {
		if mk(f) == same {
			t.Errorf("change %d leaves the digest", i)
		}
	}
}

func decodeAll(b []byte) (rs []*Record, err error) {
	err = DecodeBatch(b, func(r *Record) error { rs = append(rs, r.Clone()); return nil })
	return rs, err
}

func TestCodecRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var in []*Record
		var b []byte
		for i := range rapid.IntRange(0, 4).Draw(t, "n") {
			in = append(in, anyRecord(t, fmt.Sprint(i), true))
			b = AppendBatch(b, in[i])
		}
		out, err := decodeAll(b)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(in, out, cmpopts.EquateEmpty()); d != "" {
			t.Fatal(d)
		}
		if !bytes.Equal(AppendBatch(nil, out...), b) {
			t.Fatal("not deterministic")
		}
	})
}

func sample() *Record {
	return &Record{
		Key: testKey, Created: 1_700_000_000_000, LastAccess: 1_700_000_000_123, MaxInactive: 30 * time.Minute,
		MaxInactiveVersion: Version{1, 77},
		Attrs: map[string]Entry{
			"cart": {Value: []byte{0x83, 1, 2, 3}, Version: Version{2, 1 << 60}},
			"gone": {Deleted: true, Version: Version{3, 5}},
		},
	}
}

func TestDecodeRefuses(t *testing.T) {
	good := AppendBatch(nil, sample())
	with := func(change func(*Record)) []byte {
		r := sample()
		change(r)
		return AppendBatch(nil, r)
	}
	cases := map[string][]byte{
		"no array":        {0x01},
		"short array":     {0x81, 0x61, 'x'},
		"reserved length": {0x9f},
		"huge array":      {0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"empty id":        with(func(r *Record) { r.Key.ID = "" }),
		"long id":         with(func(r *Record) { r.Key.ID = strings.Repeat("A", MaxID+1) }),
		"long context":    with(func(r *Record) { r.Key.Context = strings.Repeat("A", MaxContext+1) }),
		"empty name":      with(func(r *Record) { r.Attrs[""] = Entry{Value: []byte{1}} }),
		"long name":       with(func(r *Record) { r.Attrs[strings.Repeat("A", 1<<20)] = Entry{Value: []byte{1}} }),
		"name not UTF-8":  with(func(r *Record) { r.Attrs["\xff"] = Entry{Value: []byte{1}} }),
		"too large":       with(func(r *Record) { r.Attrs["x"] = Entry{Value: make([]byte, MaxSize)} }),
		"negative time":   with(func(r *Record) { r.Created = -1 }),
		"far future":      with(func(r *Record) { r.LastAccess = maxNodeTime + 1 }),
	}
	for n := range len(good) {
		if n > 0 {
			cases[fmt.Sprintf("cut at %d", n)] = good[:n]
		}
	}
	many := AppendBatch(nil, &Record{Key: testKey})
	cases["2^31 attributes"] = append(many[:len(many)-1:len(many)-1], 0x9a, 0x7f, 0xff, 0xff, 0xff)
	one := appendEntry(nil, "a", Entry{Value: []byte{1}})
	cases["attribute twice"] = slices.Concat(many[:len(many)-1], []byte{0x82}, one, one)
	deep := slices.Concat([]byte{good[0] + 1}, good[1:], bytes.Repeat([]byte{0x81}, 10_000), []byte{1})
	cases["deep extra field"] = deep
	for name, b := range cases {
		if _, err := decodeAll(b); !errors.Is(err, ErrBadRecord) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDecodeSkipsUnknownFields(t *testing.T) {
	b := AppendBatch(nil, sample())
	extra := []byte{0xa1, 0x61, 'k', 0x82, 0xf9, 0x3c, 0x00, 0xc1, 0x1a, 1, 2, 3, 4} // {"k": [1.0, 1(…)]}
	later := slices.Concat([]byte{b[0] + 1}, b[1:], extra)
	rs, err := decodeAll(slices.Concat(later, b))
	if err != nil || len(rs) != 2 {
		t.Fatal(len(rs), err)
	}
	equal(t, "with extra field", sample(), rs[0])
	equal(t, "after it", sample(), rs[1])
}

func TestUnknownEndIsAnEnd(t *testing.T) {
	rs, err := decodeAll(AppendBatch(nil, &Record{Key: testKey, End: 17, EndTime: 4}))
	if err != nil || rs[0].End != Invalidated {
		t.Fatal(rs, err)
	}
}

func TestDecoderRaw(t *testing.T) {
	a := AppendBatch(nil, sample())
	b := AppendBatch(nil, &Record{Key: testKey, End: Expired, EndTime: 1})
	var d Decoder
	d.Reset(slices.Concat(a, b))
	for _, want := range [][]byte{a, b} {
		if !d.Next() || !bytes.Equal(d.Raw(), want) {
			t.Fatalf("%x, want %x, %v", d.Raw(), want, d.Err())
		}
	}
	if d.Next() || d.Err() != nil {
		t.Fatal("no end")
	}
}

func FuzzDecodeBatch(f *testing.F) {
	f.Add(AppendBatch(nil, sample()))
	f.Add(AppendBatch(nil, sample(), &Record{Key: testKey, End: Renewed, EndTime: 5, RenewedTo: "B"}))
	f.Add([]byte{0x8b})
	f.Add([]byte{0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		rs, err := decodeAll(b)
		if err != nil && !errors.Is(err, ErrBadRecord) {
			t.Fatal(err)
		}
		again, err := decodeAll(AppendBatch(nil, rs...))
		if err != nil {
			t.Fatalf("what was decoded cannot be decoded again: %v", err)
		}
		if d := cmp.Diff(rs, again, cmpopts.EquateEmpty()); d != "" {
			t.Fatal(d)
		}
	})
}

func TestParseID(t *testing.T) {
	id := NewID()
	if len(id) != 32 || id == NewID() {
		t.Fatal(id)
	}
	for _, c := range []struct {
		raw, route string
		ok         bool
	}{
		{id, "", true},
		{id + ".n1", "n1", true},
		{id + ".n1.zone", "n1.zone", true},
		{id + id, "", true},
		{id + ".", "", false},
		{id + "..", ".", true},
		{id + ".n 1", "", false},
		{id + ".n1\x00", "", false},
		{id + "." + strings.Repeat("r", MaxRoute+1), "", false},
		{id[:31], "", false},
		{strings.Repeat("A", MaxID+1), "", false},
		{strings.Repeat("A", 10<<10), "", false},
		{strings.ToLower("ABCDEF" + id[6:]), "", false},
		{"../../../../../../../../etc/passwd", "", false},
		{id[:31] + "/", "", false},
		{id[:31] + "\x00", "", false},
		{id[:29] + "А", "", false}, // Cyrillic
		{"", "", false},
	} {
		gotID, route, ok := ParseID(c.raw)
		if ok != c.ok || ok && (route != c.route || !strings.HasPrefix(c.raw, gotID)) {
			t.Errorf("%.50q: %q %q %v", c.raw, gotID, route, ok)
		}
	}
	if p := Prefix(id); len(p) > 12 || !strings.HasPrefix(id, p[:8]) {
		t.Error(p)
	}
	if p := Prefix("ABCD"); strings.Contains(p, "ABCD") {
		t.Error("a short id is shown whole:", p)
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"", ".", NewID(), NewID() + ".n1", NewID() + ".n1.x", "../x", strings.Repeat("A", 300)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		id, route, ok := ParseID(raw)
		if !ok {
			return
		}
		back := id
		if route != "" {
			back += "." + route
		}
		if back != raw || strings.ContainsAny(raw, "/\\;,\"' \t\r\n\x00%=<>") || len(raw) > MaxID+1+MaxRoute {
			t.Fatalf("%q: %q %q", raw, id, route)
		}
	})
}

// oneSession is a Session with plain attributes.
type oneSession struct {
	Session
	attrs map[string][]byte
}

func (s oneSession) Get(name string, into any) (bool, error) {
	b, ok := s.attrs[name]
	if !ok {
		return false, nil
	}
	return true, Decode(b, into)
}

func (s oneSession) Set(name string, v any) (err error) {
	s.attrs[name], err = Encode(v)
	return err
}

func (s oneSession) Update(name string, change func([]byte) ([]byte, error)) error {
	b, err := change(s.attrs[name])
	if err == nil {
		s.attrs[name] = b
	}
	return err
}

func TestAttr(t *testing.T) {
	type cart struct {
		Items map[string]int
		When  time.Time
	}
	const a = Attr[cart]("cart")
	s := oneSession{attrs: map[string][]byte{}}
	if _, ok, err := a.Get(s); ok || err != nil {
		t.Fatal(ok, err)
	}
	now := time.Now().Round(0)
	for range 3 {
		err := a.Update(s, func(c *cart) error {
			if c.Items == nil {
				c.Items = map[string]int{}
			}
			c.Items["tea"]++
			c.When = now
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	c, ok, err := a.Get(s)
	if err != nil || !ok || c.Items["tea"] != 3 || !c.When.Equal(now) {
		t.Fatal(c, ok, err)
	}
	boom := errors.New("boom")
	if err := a.Update(s, func(c *cart) error { c.Items = nil; return boom }); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	if c, _, _ := a.Get(s); c.Items["tea"] != 3 {
		t.Fatal("a failed update has changed the value")
	}
	if _, _, err := Attr[int]("cart").Get(s); err == nil {
		t.Fatal("a cart is no int")
	}
	s.attrs["deep"] = append(bytes.Repeat([]byte{0x81}, 10_000), 0)
	var v any
	if _, err := s.Get("deep", &v); err == nil {
		t.Fatal("nested 10,000 deep")
	}
	if _, err := Encode(func() {}); err == nil {
		t.Fatal("a function was encoded")
	}
}

func benchRecord(values ...int) *Record {
	r := &Record{Key: testKey, LastAccess: 1_700_000_000_000, Attrs: map[string]Entry{}}
	for i, n := range values {
		r.Attrs[fmt.Sprint("attribute", i)] = Entry{Value: make([]byte, n), Version: Version{uint64(i), 1 << 63}}
	}
	return r
}

func BenchmarkAppendBatch(b *testing.B) {
	for _, sizes := range [][]int{{100}, {8, 100}, {1024}} {
		b.Run(fmt.Sprint(sizes), func(b *testing.B) {
			r, buf := benchRecord(sizes...), []byte(nil)
			b.ReportAllocs()
			for b.Loop() {
				buf = AppendBatch(buf[:0], r)
			}
		})
	}
}

// BenchmarkDecodeBatch decodes batches of 40 records.
func BenchmarkDecodeBatch(b *testing.B) {
	for _, sizes := range [][]int{{100}, {8, 100}, {1024}} {
		b.Run(fmt.Sprint(sizes), func(b *testing.B) {
			r := benchRecord(sizes...)
			var buf []byte
			for range 40 {
				buf = AppendBatch(buf, r)
			}
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				if err := DecodeBatch(buf, func(*Record) error { n++; return nil }); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/record")
		})
	}
}
