package zstd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

func layer(t testing.TB, change func(*Config)) (*Interceptor, *channel.Metrics) {
	t.Helper()
	return channeltest.Made(t, Defaults, change, New)
}

func TestRoundTrips(t *testing.T) {
	for _, level := range levels {
		for _, min := range []int{0, 100} {
			z, _ := layer(t, func(c *Config) { c.MinSize, c.Level = min, level })
			for _, size := range []int{0, 1, 99, 100, 101, 2047, 2048, 2049, 65536, 100_000, 3 << 20} {
				for name, body := range channeltest.Bodies(size) {
					m := &channel.Message{Options: channel.SendAck, Body: bytes.Clone(body)}
					if err := z.Encode(m); err != nil {
						t.Fatal(err)
					}
					if len(m.Body) > size || m.Options.Has(channel.Zstd) != (len(m.Body) < size) || size <= min && len(m.Body) != size {
						t.Errorf("%d bytes of %s became %d, options %v", size, name, len(m.Body), m.Options)
					}
					if name == "text" && size > 1000 && size < freeRatio && !m.Options.Has(channel.Zstd) {
						t.Errorf("%d bytes of text were not compressed", size)
					}
					if err := z.Decode(m); err != nil || !bytes.Equal(m.Body, body) || m.Options != channel.SendAck {
						t.Errorf("%d bytes of %s: %d came back, options %v, error %v", size, name, len(m.Body), m.Options, err)
					}
				}
			}
		}
	}
}

func TestRoundTripProperty(t *testing.T) {
	z, _ := layer(t, func(c *Config) { c.MinSize = 0 })
	rapid.Check(t, func(r *rapid.T) {
		body := rapid.SliceOf(rapid.Byte()).Draw(r, "body")
		body = bytes.Repeat(body, rapid.IntRange(1, 50).Draw(r, "times"))
		o := channel.Options(rapid.Uint32().Draw(r, "options"))
		m := &channel.Message{Options: o, Body: bytes.Clone(body)}
		if err := z.Encode(m); err != nil {
			r.Fatal(err)
		}
		if err := z.Decode(m); err != nil || !bytes.Equal(m.Body, body) || m.Options != o&^channel.Zstd {
			r.Fatalf("%x, %v, %v", m.Body, m.Options, err)
		}
	})
}

// The flag is the layer's: whoever sets it on a message that is not compressed
// does not make it unreadable.
func TestFlagSetByTheApplication(t *testing.T) {
	z, _ := layer(t, nil)
	e := channeltest.Embed(t, z)
	if err := e.Send(t.Context(), []channel.Member{channeltest.Member(1)}, []byte("small"), channel.SendAck|channel.Zstd); err != nil {
		t.Fatal(err)
	}
	if m := e.Bottom.Messages()[0]; m.Options.Has(channel.Zstd) || string(m.Body) != "small" {
		t.Errorf("sent %q with options %v", m.Body, m.Options)
	}
}

func encoder(t testing.TB, o ...zstd.EOption) *zstd.Encoder {
	t.Helper()
	w, err := zstd.NewWriter(nil, o...)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestRefused(t *testing.T) {
	enc := encoder(t, zstd.WithSingleSegment(true))
	good := enc.EncodeAll([]byte(strings.Repeat("good content ", 50)), nil)
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1 // checksum
	var stream bytes.Buffer      // without content size
	w, err := zstd.NewWriter(&stream)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := w.Write(channeltest.Bodies(100_000)["noise"]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	skippable := binary.LittleEndian.AppendUint32([]byte{0x50, 0x2a, 0x4d, 0x18}, 4)
	type test struct {
		body   []byte
		reason string
	}
	tests := map[string]test{
		"empty":        {nil, "corrupt"},
		"text":         {[]byte("this is no Zstandard frame at all"), "corrupt"},
		"checksum":     {flipped, "corrupt"},
		"two frames":   {append(bytes.Clone(good), good...), "corrupt"},
		"garbage":      {append(bytes.Clone(good), "garbage"...), "corrupt"},
		"bomb":         {enc.EncodeAll(make([]byte, 10<<20), nil), "too_large"},
		"max_size":     {enc.EncodeAll(channeltest.Bodies(3 << 20)["noise"], nil), "too_large"},
		"skippable":    {append(skippable, "skip"...), "foreign"},
		"unknown size": {stream.Bytes(), "foreign"},
	}
	for i := range len(good) - 1 {
		tests[fmt.Sprint("first bytes ", i)] = test{good[:i], "corrupt"}
	}
	for name, x := range tests {
		z, m := layer(t, func(c *Config) { c.MaxSize = 2 << 20 })
		channeltest.Refuses(t, z, m, "zstd_refused_total", x.reason, name, x.body)
	}
}

// A frame that contains more than it says does not get more room.
func TestLyingFrame(t *testing.T) {
	enc := encoder(t, zstd.WithSingleSegment(true))
	bomb := enc.EncodeAll(make([]byte, 8<<20), nil)
	// Single segment, content size in 4 bytes: the descriptor is 0xa4, and the
	// size follows it.
	if bomb[4]&0xe0 != 0xa0 {
		t.Fatalf("the frame begins %x", bomb[:9])
	}
	binary.LittleEndian.PutUint32(bomb[5:], 100)
	z, _ := layer(t, nil)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 100 {
		if err := z.Decode(&channel.Message{Options: channel.Zstd, Body: bomb}); !errors.Is(err, channel.ErrBadMessage) {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / 100; each > 1<<20 {
		t.Errorf("%d bytes were allocated for a frame that says 100", each)
	}
}

func TestTooLargeToSend(t *testing.T) {
	z, _ := layer(t, func(c *Config) { c.MaxSize = 10 })
	e := channeltest.Embed(t, z)
	err := e.Send(t.Context(), []channel.Member{channeltest.Member(1)}, make([]byte, 11), channel.SendAck)
	if !errors.Is(err, channel.ErrTooLarge) || len(e.Bottom.Messages()) > 0 {
		t.Errorf("error %v, %d sent", err, len(e.Bottom.Messages()))
	}
}

func TestConcurrentUse(t *testing.T) {
	z, _ := layer(t, func(c *Config) { c.MinSize = 0 })
	channeltest.Concurrently(t, z)
}

func TestConfig(t *testing.T) {
	for word, change := range map[string]func(*Config){
		"min_size is -1":  func(c *Config) { c.MinSize = -1 },
		`level is "3"`:    func(c *Config) { c.Level = "3" },
		"max_size is 0":   func(c *Config) { c.MaxSize = 0 },
		"max_ratio is -1": func(c *Config) { c.MaxRatio = -1 },
	} {
		c := Defaults
		change(&c)
		if _, err := New(c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	enc := encoder(f, zstd.WithSingleSegment(true))
	for _, size := range []int{1, 255, 256, 3000, 2 << 20} {
		f.Add(enc.EncodeAll(channeltest.Bodies(size)["text"], nil))
	}
	z, _ := layer(f, func(c *Config) { c.MaxSize, c.MinSize = 1<<20, 0 })
	f.Fuzz(func(t *testing.T, body []byte) {
		m := &channel.Message{Options: channel.Zstd, Body: bytes.Clone(body)}
		if err := z.Decode(m); err != nil {
			return
		}
		if len(m.Body) > 1<<20 {
			t.Fatalf("%d bytes became %d", len(body), len(m.Body))
		}
		want := bytes.Clone(m.Body)
		if err := errors.Join(z.Encode(m), z.Decode(m)); err != nil || !bytes.Equal(m.Body, want) {
			t.Fatalf("not the same after another round: %v", err)
		}
	})
}

func BenchmarkZstd(b *testing.B) {
	for _, size := range []int{1024, 10240, 102400} {
		z, _ := layer(b, nil)
		body := channeltest.Bodies(size)["text"]
		channeltest.BenchmarkTransformer(b, z, body, encoder(b, zstd.WithSingleSegment(true)).EncodeAll(body, nil))
	}
}
