package attributes

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"unicode/utf8"

	"github.com/longhouse-go/longhouse/channel/repmap"
	"github.com/longhouse-go/longhouse/core/session"
)

// Errors that an application may branch on.
var (
	// ErrTooLarge: the name is no attribute's name, or the context would have
	// more, or larger, attributes than it may: see Limits.
	ErrTooLarge = errors.New("attributes: too large")
	// ErrFull: the node holds as much as it may, of all contexts together.
	ErrFull = errors.New("attributes: the node is full")
	// ErrStopped: the node is stopping.
	ErrStopped = errors.New("attributes: stopped")
)

// Limits bound the attributes of one context. They are checked where an
// attribute is set: nodes that set at the same time may pass them together.
type Limits struct {
	// MaxCount bounds how many there are. Default 1024.
	MaxCount int
	// MaxSize bounds the sum of names and encoded values, in bytes. Default
	// 4 MiB.
	MaxSize int
}

// DefaultLimits returns the defaults.
func DefaultLimits() Limits { return Limits{MaxCount: 1024, MaxSize: 4 << 20} }

// Change says that an attribute has another value now, or none.
type Change struct {
	// Name is the attribute; empty if changes were left out, because there were
	// too many at a time: read again whatever matters.
	Name string
	// Deleted says that the change was a deletion.
	Deleted bool
}

// Attributes are those of one context, as one version of its application has
// them. All methods may be called concurrently.
type Attributes struct {
	store      *Store
	context    string
	limits     Limits
	replicated bool

	mu       sync.Mutex
	watchers []*watcher
	closed   bool
}

type watcher struct{ f func(Change) }

// Get decodes the attribute into the pointer into; false if it is not set.
func (a *Attributes) Get(name string, into any) (bool, error) {
	b := a.store.get(a, name)
	if b == nil {
		return false, nil
	}
	if err := session.Decode(b, into); err != nil {
		return true, fmt.Errorf("attribute %q of the context: %w", name, err)
	}
	return true, nil
}

// Set stores the attribute, here and on the other nodes; nil deletes it. The
// value is encoded at once: changing the object later changes nothing. It waits
// for a node that does not answer for a second, and, while the node is
// starting, until it has what the others have. Setting the value that is there
// already does nothing.
func (a *Attributes) Set(ctx context.Context, name string, value any) error {
	if value == nil {
		return a.Delete(ctx, name)
	}
	if name == "" || len(name) > session.MaxName || !utf8.ValidString(name) {
		a.store.refused.name.Inc()
		return fmt.Errorf("%w: an attribute's name must be 1 to %d bytes of UTF-8, not %.40q", ErrTooLarge, session.MaxName, name)
	}
	b, err := session.Encode(value)
	if err != nil {
		return fmt.Errorf("attribute %q of the context: %w", name, err)
	}
	return a.store.put(ctx, a, name, b)
}

// Delete removes the attribute. One that is not set is no error.
func (a *Attributes) Delete(ctx context.Context, name string) error {
	return a.store.remove(ctx, a, name)
}

// Names returns the names of all attributes, sorted.
func (a *Attributes) Names() []string {
	list := a.store.list(a)
	names := make([]string, len(list))
	for i, x := range list {
		names[i] = x.Name
	}
	return names
}

// Watch calls f after every change from now on, whichever node has made it: in
// order, one at a time, on a goroutine of the node or of whoever sets an
// attribute. f may read and set attributes; what it reads may be newer than the
// change. f should be quick: it holds up the other watchers. It is not called
// any more after cancel, but for a call that is running, and ends with the
// version of the application whose Context the attributes are from.
func (a *Attributes) Watch(f func(Change)) (cancel func()) {
	w := &watcher{f}
	a.mu.Lock()
	first := !a.closed && a.watchers == nil
	if !a.closed {
		// Never changed in place: tell reads it without the lock.
		a.watchers = append(a.watchers[:len(a.watchers):len(a.watchers)], w)
	}
	a.mu.Unlock()
	if first {
		a.store.remember(a)
	}
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		var rest []*watcher
		for _, x := range a.watchers {
			if x != w {
				rest = append(rest, x)
			}
		}
		a.watchers = rest
	}
}

// Again returns the same attributes for the next version of the application.
func (a *Attributes) Again() *Attributes { return a.store.Context(a.context, a.replicated, a.limits) }

// Close ends all watching; the engine calls it when the context has been
// replaced. Reading and setting go on to work.
func (a *Attributes) Close() {
	a.mu.Lock()
	a.watchers, a.closed = nil, true
	a.mu.Unlock()
	a.store.forget(a)
}

func (a *Attributes) tell(c Change) {
	a.mu.Lock()
	watchers := a.watchers
	a.mu.Unlock()
	for _, w := range watchers {
		w.f(c)
	}
}

// Attr is the typed view of one attribute: its value is the attribute's name.
type Attr[T any] string

// Get returns the value; false if the attribute is not set.
func (t Attr[T]) Get(a *Attributes) (v T, ok bool, err error) {
	ok, err = a.Get(string(t), &v)
	return v, ok, err
}

// Set stores the value; see Attributes.Set.
func (t Attr[T]) Set(ctx context.Context, a *Attributes, v T) error {
	return a.Set(ctx, string(t), v)
}

// Delete removes the attribute.
func (t Attr[T]) Delete(ctx context.Context, a *Attributes) error { return a.Delete(ctx, string(t)) }

// key is an attribute of a context, as the map has it: the two names with a NUL
// between them, which no context's name has.
type key struct{ context, name string }

var keyCodec = repmap.Codec[key]{
	Encode: func(k key) ([]byte, error) { return append(append([]byte(k.context), 0), k.name...), nil },
	Decode: decodeKey,
}

func decodeKey(b []byte) (key, error) {
	for i, c := range b {
		if c != 0 {
			continue
		}
		k := key{string(b[:i]), string(b[i+1:])}
		if k.name == "" || !utf8.Valid(b) {
			break
		}
		return k, nil
	}
	return key{}, errors.New("attributes: a key that no node writes")
}

// valueCodec leaves values as they are.
var valueCodec = repmap.Codec[[]byte]{
	Encode: func(b []byte) ([]byte, error) { return b, nil },
	Decode: func(b []byte) ([]byte, error) { return b, nil },
}
