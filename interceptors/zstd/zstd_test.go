package zstd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

func layer(t testing.TB, change func(*Config)) (*Interceptor, *channel.Metrics) {
	t.Helper()
	c, m := Defaults, channel.NewMetrics()
	if change != nil {
		change(&c)
	}
	z, err := New(c, channel.Settings{Metrics: m})
	if err != nil {
		t.Fatal(err)
	}
	return z, m
}

func bodies(size int) map[string][]byte {
	noise := make([]byte, size)
	x := uint32(size + 1)
	for i := range noise {
		x = x*1664525 + 1013904223
		noise[i] = byte(x >> 24)
	}
	return map[string][]byte{
		"zeros": make([]byte, size),
		"text":  bytes.Repeat([]byte("all work and no play "), size/21+1)[:size:size],
		"noise": noise,
	}
}

func TestRoundTrips(t *testing.T) {
	for _, level := range levels {
		for _, min := range []int{0, 100} {
			z, _ := layer(t, func(c *Config) { c.MinSize, c.Level = min, level })
			for _, size := range []int{0, 1, 99, 100, 101, 2047, 2048, 2049, 65536, 100_000, 3 << 20} {
				for name, body := range bodies(size) {
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
		if _, err := w.Write(bodies(100_000)["noise"]); err != nil {
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
		"max_size":     {enc.EncodeAll(bodies(3 << 20)["noise"], nil), "too_large"},
		"skippable":    {append(skippable, "skip"...), "foreign"},
		"unknown size": {stream.Bytes(), "foreign"},
	}
	for i := range len(good) - 1 {
		tests[fmt.Sprint("first bytes ", i)] = test{good[:i], "corrupt"}
	}
	for name, x := range tests {
		z, m := layer(t, func(c *Config) { c.MaxSize = 2 << 20 })
		e := channeltest.Embed(t, z)
		err := e.ReceiveBody(channeltest.Member(1), channel.SendAck|channel.Zstd, string(x.body))
		want := channel.ErrBadMessage
		if x.reason == "too_large" {
			want = channel.ErrTooLarge
		}
		if !errors.Is(err, want) || len(e.Top.Messages()) > 0 {
			t.Errorf("%s: error %v, %d delivered", name, err, len(e.Top.Messages()))
		}
		for _, s := range m.Samples() {
			if s.Name == "zstd_refused_total" && (s.Value == 1) != (s.Labels[1] == x.reason) {
				t.Errorf("%s: %v is %v", name, s.Labels, s.Value)
			}
		}
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
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 200 {
				want := strings.Repeat(fmt.Sprintf("%d/%d ", w, i), i)
				x := &channel.Message{Body: []byte(want)}
				if err := errors.Join(z.Encode(x), z.Decode(x)); err != nil || string(x.Body) != want {
					t.Errorf("mixed up: %v", err)
				}
			}
		})
	}
	wg.Wait()
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
		f.Add(enc.EncodeAll(bodies(size)["text"], nil))
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
		body := bodies(size)["text"]
		z, _ := layer(b, nil)
		e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{z}, Discard: true})
		b.Run(fmt.Sprintf("send/%d", size), func(b *testing.B) {
			to := []channel.Member{channeltest.Member(1)}
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				if err := e.Send(context.Background(), to, body, channel.SendAck); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("receive/%d", size), func(b *testing.B) {
			packed := encoder(b, zstd.WithSingleSegment(true)).EncodeAll(body, nil)
			m := channel.Message{From: channeltest.Member(1)}
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				m.Options, m.Body = channel.SendNone|channel.Zstd, packed
				if err := e.Receive(context.Background(), &m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
