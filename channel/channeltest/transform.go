package channeltest

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
)

// Sum returns a metric's value, added up over all samples that have these values
// of labels; -1 if there is none of that name.
func Sum(m *channel.Metrics, name string, labels ...string) float64 {
	sum, found := 0.0, false
	for _, s := range m.Samples() {
		if s.Name != name {
			continue
		}
		found = true
		if !slices.ContainsFunc(labels, func(l string) bool { return !slices.Contains(s.Labels, l) }) {
			sum += s.Value
		}
	}
	if !found {
		return -1
	}
	return sum
}

// Vectors reads a file with a list "Vectors" of what peers have really sent.
func Vectors[V any](t testing.TB, path string) []V {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Vectors []V }
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	return file.Vectors
}

// Unhex returns the bytes that are written in hexadecimal digits.
func Unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Made makes a component from its defaults, changed if change is not nil, with
// metrics of its own.
func Made[C, I any](t testing.TB, c C, change func(*C), make func(C, channel.Settings) (I, error)) (I, *channel.Metrics) {
	t.Helper()
	m := channel.NewMetrics()
	if change != nil {
		change(&c)
	}
	i, err := make(c, channel.Settings{Metrics: m})
	if err != nil {
		t.Fatal(err)
	}
	return i, m
}

// Bodies returns bodies of a size that compress very well, well, and not at all:
// zeros, text and noise.
func Bodies(size int) map[string][]byte {
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

// Transformer is a layer that changes bodies on their way down and restores them
// on their way up.
type Transformer interface {
	channel.Interceptor
	channel.Encoder
	channel.Decoder
}

// Concurrently has goroutines send and receive at the same time, 3200 messages
// in all, and fails t if they get each other's bodies.
func Concurrently(t testing.TB, l Transformer) {
	t.Helper()
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 200 {
				want := strings.Repeat(fmt.Sprintf("%d/%d ", w, i), i)
				m := &channel.Message{Body: []byte(want)}
				if err := errors.Join(l.Encode(m), l.Decode(m)); err != nil || string(m.Body) != want {
					t.Errorf("mixed up: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

// Refuses receives a body that l must refuse: with channel.ErrTooLarge if the
// reason is "too_large" and with channel.ErrBadMessage else, counted once under
// its reason in a metric of m, and not delivered.
func Refuses(t testing.TB, l Transformer, m *channel.Metrics, metric, reason, name string, body []byte) {
	t.Helper()
	e := Embed(t, l)
	err := e.ReceiveBody(Member(1), channel.SendAck|l.Descriptor().Flag, string(body))
	want := channel.ErrBadMessage
	if reason == "too_large" {
		want = channel.ErrTooLarge
	}
	if !errors.Is(err, want) || len(e.Top.Messages()) > 0 {
		t.Errorf("%s: error %v, %d delivered", name, err, len(e.Top.Messages()))
	}
	if own, all := Sum(m, metric, reason), Sum(m, metric); own != 1 || all != 1 {
		t.Errorf("%s: %v are counted as %s, %v in all", name, own, reason, all)
	}
}

// BenchmarkTransformer measures sending body, and receiving it as packed.
func BenchmarkTransformer(b *testing.B, l Transformer, body, packed []byte) {
	e := EmbedWith(b, EmbedConfig{Layers: []channel.Interceptor{l}, Discard: true})
	b.Run(fmt.Sprintf("send/%d", len(body)), func(b *testing.B) {
		to := []channel.Member{Member(1)}
		b.ReportAllocs()
		b.SetBytes(int64(len(body)))
		for b.Loop() {
			if err := e.Send(context.Background(), to, body, channel.SendAck); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run(fmt.Sprintf("receive/%d", len(body)), func(b *testing.B) {
		m := channel.Message{From: Member(1)}
		b.ReportAllocs()
		b.SetBytes(int64(len(body)))
		for b.Loop() {
			m.Options, m.Body = channel.SendNone|l.Descriptor().Flag, packed
			if err := e.Receive(context.Background(), &m); err != nil {
				b.Fatal(err)
			}
		}
	})
}
