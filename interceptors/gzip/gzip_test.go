package gzip

import (
	"bytes"
	stdgzip "compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

func layer(t testing.TB, change func(*Config)) (*Interceptor, *channel.Metrics) {
	t.Helper()
	return channeltest.Made(t, Defaults, change, New)
}

type vector struct {
	Name   string
	Config struct {
		OptionFlag         channel.Options
		CompressionMinSize int
	}
	Input struct {
		Options channel.Options
		BodyHex string
	}
	Output []struct {
		Options channel.Options
		BodyHex string
	}
}

func vectors(t testing.TB) []vector {
	return channeltest.Vectors[vector](t, "testdata/vectors.json")
}

// What a JVM has sent is read; what is sent is marked as a JVM marks it, and has
// its header. The compressed bytes themselves depend on the encoder.
func TestVectors(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(v.Name, func(t *testing.T) {
			g, _ := layer(t, func(c *Config) {
				c.MinSize = v.Config.CompressionMinSize
				if v.Config.OptionFlag != 0 {
					c.OptionFlag = v.Config.OptionFlag
				}
			})
			body, out := channeltest.Unhex(t, v.Input.BodyHex), v.Output[0]
			m := &channel.Message{Options: out.Options, Body: channeltest.Unhex(t, out.BodyHex)}
			if err := g.Decode(m); err != nil || !bytes.Equal(m.Body, body) || m.Options != v.Input.Options {
				t.Errorf("decoded to %x, options %v, error %v", m.Body, m.Options, err)
			}
			m = &channel.Message{Options: v.Input.Options, Body: bytes.Clone(body)}
			if err := g.Encode(m); err != nil || m.Options != out.Options {
				t.Errorf("encoded with options %v, want %v, error %v", m.Options, out.Options, err)
			}
			if want := channeltest.Unhex(t, out.BodyHex); out.Options == v.Input.Options {
				if !bytes.Equal(m.Body, want) {
					t.Errorf("encoded to %x, want %x", m.Body, want)
				}
			} else if !bytes.Equal(m.Body[:10], want[:10]) {
				t.Errorf("the header is %x, a JVM's %x", m.Body[:10], want[:10])
			} else if !bytes.Equal(m.Body, want) {
				t.Logf("%d bytes, a JVM makes %d", len(m.Body), len(want))
			}
			if err := g.Decode(m); err != nil || !bytes.Equal(m.Body, body) {
				t.Errorf("came back as %x, error %v", m.Body, err)
			}
		})
	}
}

func TestRoundTrips(t *testing.T) {
	for _, min := range []int{0, 100} {
		g, _ := layer(t, func(c *Config) { c.MinSize = min })
		// Sizes around the buffer of 2048 bytes that the Java layer has.
		for _, size := range []int{0, 1, 99, 100, 101, 2047, 2048, 2049, 4096, 100_000, 3 << 20} {
			for name, body := range channeltest.Bodies(size) {
				m := &channel.Message{Options: channel.SendAck, Body: bytes.Clone(body)}
				if err := g.Encode(m); err != nil {
					t.Fatal(err)
				}
				if got, want := m.Options.Has(channel.Gzip), size > min && (name == "noise" || size < 1<<20); got != want {
					t.Errorf("%d bytes of %s: marked %t", size, name, got)
				}
				if err := g.Decode(m); err != nil || !bytes.Equal(m.Body, body) || m.Options != channel.SendAck {
					t.Errorf("%d bytes of %s: %d came back, options %v, error %v", size, name, len(m.Body), m.Options, err)
				}
			}
		}
	}
}

func TestRoundTripProperty(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		body := rapid.SliceOf(rapid.Byte()).Draw(r, "body")
		o := channel.Options(rapid.Uint32().Draw(r, "options"))
		g, _ := layer(t, func(c *Config) {
			c.MinSize, c.Level = rapid.IntRange(0, 64).Draw(r, "min"), rapid.IntRange(1, 9).Draw(r, "level")
		})
		m := &channel.Message{Options: o, Body: bytes.Clone(body)}
		if err := g.Encode(m); err != nil {
			r.Fatal(err)
		}
		if err := g.Decode(m); err != nil || !bytes.Equal(m.Body, body) || m.Options != o&^channel.Gzip {
			r.Fatalf("%x, %v, %v", m.Body, m.Options, err)
		}
	})
}

// The flag is the layer's: whoever sets it on a message that is not compressed
// does not make it unreadable.
func TestFlagSetByTheApplication(t *testing.T) {
	g, _ := layer(t, func(c *Config) { c.MinSize = 100 })
	e := channeltest.Embed(t, g)
	if err := e.Send(t.Context(), []channel.Member{channeltest.Member(1)}, []byte("small"), channel.SendAck|channel.Gzip); err != nil {
		t.Fatal(err)
	}
	if m := e.Bottom.Messages()[0]; m.Options.Has(channel.Gzip) || string(m.Body) != "small" {
		t.Errorf("sent %q with options %v", m.Body, m.Options)
	}
}

func compress(t testing.TB, body []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := stdgzip.NewWriter(&b)
	if _, err := w.Write(body); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// What is truncated, corrupt or too large is refused, counted once, and does not
// reach the application.
func TestRefused(t *testing.T) {
	good := compress(t, []byte(strings.Repeat("good content ", 50)))
	lie := bytes.Clone(good)
	binary.LittleEndian.PutUint32(lie[len(lie)-4:], 1<<31)
	flipped := bytes.Clone(good)
	flipped[len(flipped)-6] ^= 1 // checksum
	tests := map[string]struct {
		body   []byte
		reason string
	}{
		"empty":            {nil, "corrupt"},
		"text":             {[]byte("this is no gzip stream at all"), "corrupt"},
		"header only":      {good[:10], "corrupt"},
		"size in trailer":  {lie, "corrupt"},
		"checksum":         {flipped, "corrupt"},
		"trailing garbage": {append(bytes.Clone(good), "garbage that is no member"...), "corrupt"},
		"bomb":             {compress(t, make([]byte, 10<<20)), "too_large"},
		"over max_size":    {compress(t, channeltest.Bodies(3 << 20)["noise"]), "too_large"},
	}
	for i := range len(good) - 1 {
		tests[fmt.Sprint("first bytes ", i)] = struct {
			body   []byte
			reason string
		}{good[:i], "corrupt"}
	}
	for name, x := range tests {
		g, m := layer(t, func(c *Config) { c.MaxSize = 2 << 20 })
		channeltest.Refuses(t, g, m, "gzip_refused_total", x.reason, name, x.body)
	}
}

// A bomb costs no more memory than the bound.
func TestBombIsBounded(t *testing.T) {
	bomb := compress(t, make([]byte, 64<<20))
	g, _ := layer(t, nil)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 20 {
		if err := g.Decode(&channel.Message{Options: channel.Gzip, Body: bomb}); !errors.Is(err, channel.ErrTooLarge) {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	limit := uint64(Defaults.MaxRatio * len(bomb))
	if each := (after.TotalAlloc - before.TotalAlloc) / 20; each > 3*limit {
		t.Errorf("%d bytes were allocated for a bomb of %d bytes, of which at most %d are let out", each, len(bomb), limit)
	}
	free, _ := layer(t, func(c *Config) { c.MaxRatio = 0 })
	if err := free.Decode(&channel.Message{Options: channel.Gzip, Body: bomb}); err != nil {
		t.Errorf("without a ratio: %v", err)
	}
}

func TestTooLargeToSend(t *testing.T) {
	g, m := layer(t, func(c *Config) { c.MaxSize = 10 })
	e := channeltest.Embed(t, g)
	err := e.Send(t.Context(), []channel.Member{channeltest.Member(1)}, make([]byte, 11), channel.SendAck)
	if !errors.Is(err, channel.ErrTooLarge) || len(e.Bottom.Messages()) > 0 || channeltest.Sum(m, "gzip_send_refused_total") != 1 {
		t.Errorf("error %v, %d sent", err, len(e.Bottom.Messages()))
	}
}

// A stream of several members, as other writers make it, is read whole.
func TestSeveralMembers(t *testing.T) {
	g, _ := layer(t, nil)
	m := &channel.Message{Options: channel.Gzip, Body: append(compress(t, []byte("one ")), compress(t, []byte("two"))...)}
	if err := g.Decode(m); err != nil || string(m.Body) != "one two" {
		t.Errorf("%q, %v", m.Body, err)
	}
}

func TestConcurrentUse(t *testing.T) {
	g, m := layer(t, nil)
	channeltest.Concurrently(t, g)
	if n := channeltest.Sum(m, "gzip_decompressed_total"); n != 16*199 {
		t.Errorf("%v counted", n)
	}
}

func TestStatistics(t *testing.T) {
	core, logs := observer.New(zap.DebugLevel)
	c, m := Defaults, channel.NewMetrics()
	c.StatsInterval = 10
	g, err := New(c, channel.Settings{Metrics: m, Logger: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	body := strings.Repeat("x", 1000)
	for range 15 {
		x := &channel.Message{Body: []byte(body)}
		if err := errors.Join(g.Encode(x), g.Decode(x)); err != nil {
			t.Fatal(err)
		}
	}
	if n := logs.FilterMessage("gzip").Len(); n != 3 {
		t.Errorf("%d summaries of 30 messages at an interval of 10", n)
	}
	if in, out := channeltest.Sum(m, "gzip_compressed_bytes_in_total"), channeltest.Sum(m, "gzip_compressed_bytes_out_total"); in != 15000 || out == 0 || out > 1500 ||
		channeltest.Sum(m, "gzip_decompressed_bytes_in_total") != out || channeltest.Sum(m, "gzip_decompressed_bytes_out_total") != in {
		t.Errorf("%v bytes became %v", in, out)
	}
}

func TestConfig(t *testing.T) {
	for word, change := range map[string]func(*Config){
		"option_flag is 0x0":   func(c *Config) { c.OptionFlag = 0 },
		"option_flag is 0x8":   func(c *Config) { c.OptionFlag = channel.Async },
		"option_flag is 0x300": func(c *Config) { c.OptionFlag = 0x300 },
		"min_size is -1":       func(c *Config) { c.MinSize = -1 },
		"level is 0":           func(c *Config) { c.Level = 0 },
		"level is 10":          func(c *Config) { c.Level = 10 },
		"max_size is 0":        func(c *Config) { c.MaxSize = 0 },
		"max_ratio is -1":      func(c *Config) { c.MaxRatio = -1 },
		"stats_interval is -1": func(c *Config) { c.StatsInterval = -1 },
	} {
		c := Defaults
		change(&c)
		if _, err := New(c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, v := range vectors(f) {
		f.Add(channeltest.Unhex(f, v.Output[0].BodyHex))
	}
	f.Add(compress(f, make([]byte, 2<<20)))
	g, _ := layer(f, func(c *Config) { c.MaxSize = 1 << 20 })
	f.Fuzz(func(t *testing.T, body []byte) {
		m := &channel.Message{Options: channel.Gzip, Body: bytes.Clone(body)}
		if err := g.Decode(m); err != nil {
			return
		}
		if len(m.Body) > 1<<20 {
			t.Fatalf("%d bytes became %d", len(body), len(m.Body))
		}
		want := bytes.Clone(m.Body)
		if err := g.Encode(m); err != nil {
			t.Fatal(err)
		}
		if err := g.Decode(m); err != nil || !bytes.Equal(m.Body, want) {
			t.Fatalf("not the same after another round: %v", err)
		}
	})
}

func BenchmarkGzip(b *testing.B) {
	for _, size := range []int{128, 1024, 10240, 102400} {
		g, _ := layer(b, nil)
		body := channeltest.Bodies(size)["text"]
		channeltest.BenchmarkTransformer(b, g, body, compress(b, body))
	}
}
