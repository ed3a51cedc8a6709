package repmap

import (
	"context"
	"fmt"

	"github.com/fxamacker/cbor/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// Codec turns keys or values into bytes and back. Equal keys must have equal
// bytes, on all members. Encode must return bytes that nobody changes.
type Codec[T any] struct {
	Encode func(T) ([]byte, error)
	Decode func([]byte) (T, error)
}

// CBORCodec is the codec of maps that only Longhouse nodes have.
func CBORCodec[T any]() Codec[T] {
	return Codec[T]{
		Encode: func(v T) ([]byte, error) { return keyMode.Marshal(v) },
		Decode: func(b []byte) (v T, err error) { err = cbor.Unmarshal(b, &v); return v, err },
	}
}

var keyMode cbor.EncMode

func init() {
	o := cbor.CanonicalEncOptions()
	var err error
	if keyMode, err = o.EncMode(); err != nil {
		panic(err)
	}
}

// JavaCodec is the codec of maps that Tribes' nodes have too. T is one of the
// types of package jser: string, int32, int64, []byte, *jser.Map and so on, or
// jser.Value for any of them.
func JavaCodec[T any](d *jser.Dialect) Codec[T] {
	return Codec[T]{
		Encode: func(v T) ([]byte, error) { return d.Encode(v) },
		Decode: func(b []byte) (v T, err error) {
			x, err := jser.Decode(b, jser.Limits{KeepUnlisted: true})
			if err != nil {
				return v, err
			}
			v, ok := x.(T)
			if !ok && x != nil {
				return v, fmt.Errorf("repmap: the other side has put a %T, want a %T", x, v)
			}
			return v, nil
		},
	}
}

// Map is a map that the members of a group share. All methods may be called
// from any goroutine.
type Map[K comparable, V any] struct {
	e *engine
	k Codec[K]
	v Codec[V]
}

// New makes a map of that name on a channel; members that use the same name
// share it. It has no effect before Start. Keys and values travel as CBOR, or
// with Config.Tribes as Java objects; NewWith takes other codecs.
//
// Counters begin with repmap_ and have the map's name as a label; see the
// fields of Config for the bounds they belong to.
func New[K comparable, V any](ch *channel.Channel, name string, c Config, s channel.Settings) (*Map[K, V], error) {
	if c.Tribes {
		return NewWith(ch, name, c, s, JavaCodec[K](c.Dialect), JavaCodec[V](c.Dialect))
	}
	return NewWith(ch, name, c, s, CBORCodec[K](), CBORCodec[V]())
}

// NewWith is New with codecs.
func NewWith[K comparable, V any](ch *channel.Channel, name string, c Config, s channel.Settings, k Codec[K], v Codec[V]) (*Map[K, V], error) {
	e, err := newEngine(ch, name, c, s)
	if err != nil {
		return nil, err
	}
	return &Map[K, V]{e, k, v}, nil
}

// Start joins the others that have the map. The channel must be running. The
// entries come in the background: see Ready.
func (m *Map[K, V]) Start(ctx context.Context) error { return m.e.start(ctx) }

// Ready is closed when the entries of the others have come, or there are no
// others. Others are those in the channel's view: start the map when the channel
// has seen the group, see [channel.Channel.Watch].
func (m *Map[K, V]) Ready() <-chan struct{} { return m.e.ready }

// Close leaves the map. Close it before the channel is stopped. It works twice
// and without Start.
func (m *Map[K, V]) Close(ctx context.Context) error { return m.e.close(ctx) }

// Get returns the value of a key. In a lazy map it may have to ask another
// member; the error is [ErrUnavailable] if none of those that have it answers.
func (m *Map[K, V]) Get(ctx context.Context, key K) (v V, ok bool, err error) {
	k, err := m.k.Encode(key)
	if err != nil {
		return v, false, fmt.Errorf("repmap: get: key: %w", err)
	}
	b, ok, err := m.e.read(ctx, string(k))
	if err != nil || !ok {
		return v, false, err
	}
	v, err = m.v.Decode(b)
	return v, err == nil, err
}

// Put writes a value, and makes this member its primary. Writing the value that
// is there already does nothing. It returns when those that hold a copy have
// confirmed it; with [ErrNotReplicated] the value is here, and the others get
// it later.
func (m *Map[K, V]) Put(ctx context.Context, key K, value V) error {
	k, err := m.k.Encode(key)
	if err != nil {
		return fmt.Errorf("repmap: put: key: %w", err)
	}
	b, err := m.v.Encode(value)
	if err != nil {
		return fmt.Errorf("repmap: put: value: %w", err)
	}
	return m.e.write(ctx, string(k), b)
}

// Delete removes a key, and reports whether it was there.
func (m *Map[K, V]) Delete(ctx context.Context, key K) (bool, error) {
	k, err := m.k.Encode(key)
	if err != nil {
		return false, fmt.Errorf("repmap: delete: key: %w", err)
	}
	return m.e.remove(ctx, string(k))
}

// Claim is Get that makes this member the primary: who works with an entry from
// now on should be.
func (m *Map[K, V]) Claim(ctx context.Context, key K) (v V, ok bool, err error) {
	k, err := m.k.Encode(key)
	if err != nil {
		return v, false, fmt.Errorf("repmap: claim: key: %w", err)
	}
	b, ok, err := m.e.claim(ctx, string(k))
	if !ok {
		return v, false, err
	}
	v, derr := m.v.Decode(b)
	if derr != nil {
		return v, false, derr
	}
	return v, true, err
}

// Place says where an entry is.
type Place struct {
	Primary channel.UniqueID
	// Backups are those of a lazy map; in a full one all members have it.
	Backups []channel.UniqueID
	// Here says that this member has the value.
	Here bool
	// Version grows with every write; Writer has made the last one.
	Version uint64
	Writer  channel.UniqueID
}

// Where says where an entry is, as far as this member knows.
func (m *Map[K, V]) Where(key K) (p Place, ok bool) {
	k, err := m.k.Encode(key)
	if err != nil {
		return p, false
	}
	m.e.mu.Lock()
	defer m.e.mu.Unlock()
	r := m.e.get(string(k))
	if r == nil || r.Deleted {
		return p, false
	}
	return placeOf(r), true
}

func placeOf(r *record) Place {
	return Place{r.Stamp.Primary, append([]channel.UniqueID(nil), r.Backups...), r.Has, r.Stamp.Counter, r.Stamp.Writer}
}

// Len returns how many entries there are, wherever they are.
func (m *Map[K, V]) Len() int { n, _ := m.e.size(); return n }

// Keys returns all keys, in the order of their encoded form. Keys that cannot
// be decoded are left out.
func (m *Map[K, V]) Keys() (keys []K) {
	for _, k := range m.e.keys() {
		if key, err := m.k.Decode([]byte(k)); err == nil {
			keys = append(keys, key)
		}
	}
	return keys
}

// Change is one change of an entry.
type Change[K comparable, V any] struct {
	Kind Kind
	Key  K
	// Value is the new value, or the removed one, if Here.
	Value V
	Place
}

// Watch calls f for every change from now on, local ones too, one at a time. A
// slow f delays nobody but the other watchers; see Config.MaxChanges. After
// cancel has returned, at most one call is still running.
func (m *Map[K, V]) Watch(f func(Change[K, V])) (cancel func()) {
	return m.e.changes.subscribe(func(c change) {
		out := Change[K, V]{Kind: c.kind}
		if c.kind != Missed {
			var err error
			if out.Key, err = m.k.Decode([]byte(c.key)); err != nil {
				return
			}
			out.Place = placeOf(c.r)
			if c.r.Has {
				if out.Value, err = m.v.Decode(c.r.Value); err != nil {
					out.Here = false
				}
			}
		}
		f(out)
	})
}
