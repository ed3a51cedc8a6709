package channel

// Transform returns an interceptor that changes messages in place: out on their
// way down, in on their way up. Either may be nil. The functions must not block
// and run concurrently; an error ends the message: it is neither sent nor
// delivered. They see every message: check d.Flag yourself if the layer only
// handles marked ones.
func Transform(d Descriptor, out, in func(*Message) error) Interceptor {
	t := transform{d}
	switch {
	case out != nil && in != nil:
		return &bothWays{t, encodeFunc{out}, decodeFunc{in}}
	case out != nil:
		return &outOnly{t, encodeFunc{out}}
	case in != nil:
		return &inOnly{t, decodeFunc{in}}
	}
	return &t
}

type (
	transform  struct{ d Descriptor }
	encodeFunc struct{ f func(*Message) error }
	decodeFunc struct{ f func(*Message) error }

	bothWays struct {
		transform
		encodeFunc
		decodeFunc
	}
	outOnly struct {
		transform
		encodeFunc
	}
	inOnly struct {
		transform
		decodeFunc
	}
)

func (t *transform) Descriptor() Descriptor  { return t.d }
func (e encodeFunc) Encode(m *Message) error { return e.f(m) }
func (d decodeFunc) Decode(m *Message) error { return d.f(m) }
