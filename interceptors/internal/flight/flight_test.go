package flight

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// splitter sends one part to each destination.
type splitter struct {
	pool     Pool
	parallel bool
}

func (s *splitter) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "splitter"} }

func (s *splitter) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	f := s.pool.New(m, s.parallel)
	body := m.Body
	for _, to := range m.To {
		p := f.Part([]channel.Member{to}, len(body)+1)
		p.Message.Body = append(append(p.Message.Body, body...), '!')
		_ = f.Send(ctx, l, p)
	}
	return f.End(ctx)
}

// Whatever some parts end with, and when, the sender is told once, and the
// right faults.
func TestResultProperty(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		e := channeltest.Embed(t, &splitter{parallel: rapid.Bool().Draw(r, "parallel")})
		var to, bad []channel.Member
		for i := range rapid.IntRange(1, 6).Draw(r, "members") {
			m := channeltest.Member(i + 1)
			to = append(to, m)
			if rapid.Bool().Draw(r, "bad") {
				bad = append(bad, m)
			}
		}
		e.OnSend(func(_ context.Context, m *channel.Message) error {
			if slices.Contains(bad, m.To[0]) {
				return channel.Failed(m.To, channel.ErrAckTimeout)
			}
			return nil
		})
		o := channel.Options(rapid.SampledFrom([]channel.Options{channel.SendNone, channel.SendAck}).Draw(r, "options"))
		var err error
		if rapid.Bool().Draw(r, "done") {
			res := new(channeltest.Recorder)
			if err = e.SendDone(context.Background(), to, []byte("x"), o, res); err == nil {
				if len(res.Results()) != 1 {
					r.Fatalf("told %d times", len(res.Results()))
				}
				err = res.Results()[0].Err
			}
		} else {
			err = e.Send(context.Background(), to, []byte("x"), o)
		}
		var got []channel.Member
		var se *channel.SendError
		if errors.As(err, &se) {
			for _, x := range se.Faults {
				got = append(got, x.Member)
			}
		}
		if (err == nil) != (len(bad) == 0) || !slices.Equal(got, bad) {
			r.Fatalf("%v, want faults for %v", err, bad)
		}
		for _, m := range e.Bottom.Messages() {
			if string(m.Body) != "x!" {
				r.Fatalf("sent %q", m.Body)
			}
		}
	})
}

// Who gives up is told who has not ended; what ends later disturbs nobody.
func TestGivingUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := channeltest.Embed(t, &splitter{parallel: true})
		a, b := channeltest.Member(1), channeltest.Member(2)
		for range 10 {
			e.Hold()
			ctx, cancel := context.WithCancel(t.Context())
			go func() { synctest.Wait(); cancel() }()
			err := e.Send(ctx, []channel.Member{a, b}, []byte("x"), channel.SendAck)
			var se *channel.SendError
			if !errors.As(err, &se) || len(se.Faults) != 2 || !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			e.Finish(nil)
			if err := e.Send(t.Context(), []channel.Member{a, b}, []byte("y"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A layer that panicked may still hold a part: it is not used again.
func TestPanicBelow(t *testing.T) {
	e := channeltest.Embed(t, &splitter{parallel: true})
	to := []channel.Member{channeltest.Member(1)}
	var first *channel.Message
	e.OnSend(func(_ context.Context, m *channel.Message) error { first = m; panic("below") })
	if err := e.Send(t.Context(), to, []byte("x"), channel.SendAck); !errors.Is(err, channel.ErrPanic) {
		t.Fatal(err)
	}
	for range 100 {
		e.OnSend(func(_ context.Context, m *channel.Message) error {
			if m == first {
				t.Error("the part was used again")
			}
			return nil
		})
		if err := e.Send(t.Context(), to, []byte("y"), channel.SendAck); err != nil {
			t.Fatal(err)
		}
	}
}

func BenchmarkFlight(b *testing.B) {
	e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{&splitter{parallel: true}}, Discard: true})
	to := []channel.Member{channeltest.Member(1), channeltest.Member(2), channeltest.Member(3)}
	body := make([]byte, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if err := e.Send(context.Background(), to, body, channel.SendAck); err != nil {
			b.Fatal(err)
		}
	}
}
