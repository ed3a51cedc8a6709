package conformance

import (
	"bytes"
	"encoding/binary"
	"runtime"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// misspell makes a saboteur of our codec.
func misspell(name string, change func(c *Codec)) Saboteur {
	return Saboteur{Name: name, New: func() Subject {
		c := OwnCodec()
		change(&c)
		return Wire("misspelt", c)
	}}
}

func sabGoldenDecode() []Saboteur {
	return []Saboteur{
		misspell("loses the domain", func(c *Codec) {
			c.DecodeMember = func(b []byte) (channel.Member, int, error) {
				m, n, err := wire.DecodeMember(b)
				m.Domain = ""
				return m, n, err
			}
		}),
		misspell("reads times as seconds", func(c *Codec) {
			c.DecodeFrame = func(b []byte, max int, m *channel.Message) (wire.Kind, int, error) {
				k, n, err := wire.DecodeFrame(b, max, m)
				m.Time /= 1000
				return k, n, err
			}
		}),
	}
}

func sabGoldenEncode() []Saboteur {
	return []Saboteur{
		misspell("writes ports in two bytes", func(c *Codec) {
			c.AppendMember = func(dst []byte, m channel.Member) []byte {
				m.SecurePort &= 0xffff
				return wire.AppendMember(dst, m)
			}
		}),
		misspell("adds an option", func(c *Codec) {
			c.AppendFrame = func(dst []byte, m *channel.Message) []byte {
				x := *m
				x.Options |= channel.ByteMessage
				return wire.AppendFrame(dst, &x)
			}
		}),
	}
}

// badStream is a stream with a mistake.
type badStream struct {
	Stream
	next func(s Stream, m *channel.Message) (wire.Kind, error)
}

func (b badStream) Next(m *channel.Message) (wire.Kind, error) { return b.next(b.Stream, m) }

func sabSplit() []Saboteur {
	stream := func(next func() func(s Stream, m *channel.Message) (wire.Kind, error)) func(max int) Stream {
		return func(max int) Stream { return badStream{wire.NewDecoder(max), next()} }
	}
	return []Saboteur{
		misspell("takes one frame of every read", func(c *Codec) {
			c.NewStream = stream(func() func(s Stream, m *channel.Message) (wire.Kind, error) {
				got := false
				return func(s Stream, m *channel.Message) (wire.Kind, error) {
					k, err := s.Next(m)
					if got && k != wire.Incomplete {
						got = false
						return wire.Incomplete, err
					}
					got = k != wire.Incomplete
					return k, err
				}
			})
		}),
		misspell("takes a part for an error", func(c *Codec) {
			c.DecodeFrame = func(b []byte, max int, m *channel.Message) (wire.Kind, int, error) {
				k, n, err := wire.DecodeFrame(b, max, m)
				if k == wire.Incomplete && err == nil {
					err = wire.ErrTruncated
				}
				return k, n, err
			}
		}),
	}
}

func sabHostileLength() []Saboteur {
	return []Saboteur{
		misspell("allocates what is announced", func(c *Codec) {
			c.DecodeFrame = func(b []byte, max int, m *channel.Message) (wire.Kind, int, error) {
				if len(b) >= wire.FrameHead {
					if n := int32(binary.BigEndian.Uint32(b[wire.FrameHead-4:])); n > 0 {
						runtime.KeepAlive(make([]byte, min(int(n), 64<<20)))
					}
				}
				return wire.DecodeFrame(b, max, m)
			}
		}),
		misspell("knows no limit", func(c *Codec) {
			c.DecodeFrame = func(b []byte, _ int, m *channel.Message) (wire.Kind, int, error) {
				return wire.DecodeFrame(b, 1<<31-1, m)
			}
		}),
		misspell("takes negative lengths for none", func(c *Codec) {
			c.DecodeMember = func(b []byte) (channel.Member, int, error) {
				if len(b) > 14 && b[10]&0x80 != 0 {
					return channel.Member{}, len(b), nil
				}
				return wire.DecodeMember(b)
			}
		}),
	}
}

func sabUnknownOptions() []Saboteur {
	return []Saboteur{misspell("clears what it does not know", func(c *Codec) {
		c.DecodeFrame = func(b []byte, max int, m *channel.Message) (wire.Kind, int, error) {
			k, n, err := wire.DecodeFrame(b, max, m)
			m.Options &= 0x1ff
			return k, n, err
		}
	})}
}

func sabAckBytes() []Saboteur {
	return []Saboteur{
		misspell("confirms with other bytes", func(c *Codec) { c.Ack = bytes.ReplaceAll(c.Ack, []byte{6}, []byte{7}) }),
		misspell("goes on after an error", func(c *Codec) {
			c.NewStream = func(max int) Stream { return &forgiving{max: max, Stream: wire.NewDecoder(max)} }
		}),
	}
}

// forgiving starts over after an error.
type forgiving struct {
	Stream
	max int
}

func (f *forgiving) Next(m *channel.Message) (wire.Kind, error) {
	k, err := f.Stream.Next(m)
	if err != nil {
		f.Stream = wire.NewDecoder(f.max)
	}
	return k, err
}
