package channel_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

func TestWhatFailsToDecodeGoesNoHigher(t *testing.T) {
	metrics := channel.NewMetrics()
	bad := errors.New("bad padding")
	var above []string
	layer := channel.Transform(channel.Descriptor{Name: "crypt", Mutates: true},
		func(m *channel.Message) error {
			if string(m.Body) == "bad" {
				return bad
			}
			return nil
		},
		func(m *channel.Message) error {
			if string(m.Body) == "bad" {
				m.Body = []byte("half decoded")
				return bad
			}
			return nil
		})
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{
		Layers:   []channel.Interceptor{probe{"above", &above}, layer, gzip()},
		Settings: channel.Settings{Metrics: metrics},
	})
	above = nil
	if err := e.ReceiveBody(peers[0], channel.SendSyncAck, "bad"); !errors.Is(err, bad) {
		t.Errorf("receive: %v", err)
	}
	if len(above) != 0 || len(e.Top.Messages()) != 0 {
		t.Errorf("went up: %q, %q", above, e.Top.Bodies())
	}
	var se *channel.SendError
	if err := e.Send(t.Context(), peers, []byte("bad"), channel.SendAck); !errors.Is(err, bad) || !errors.As(err, &se) || len(se.Faults) != 3 {
		t.Errorf("send: %v", err)
	}
	if len(e.Bottom.Messages()) != 0 {
		t.Errorf("went down: %q", e.Bottom.Bodies())
	}
	r := new(channeltest.Recorder)
	if err := e.SendDone(t.Context(), peers, []byte("bad"), channel.SendAck, r); !errors.Is(err, bad) || len(r.Results()) != 0 {
		t.Errorf("pipelined: %v, %d reports", err, len(r.Results()))
	}
	if n := counter(metrics, "channel_decode_errors_total"); n != 1 {
		t.Errorf("decode errors counted %v times", n)
	}
	if n := counter(metrics, "channel_encode_errors_total"); n != 2 {
		t.Errorf("encode errors counted %v times", n)
	}
	if err := e.ReceiveBody(peers[0], channel.SendSyncAck, "good"); err != nil || len(e.Top.Messages()) != 1 {
		t.Errorf("good traffic: %v", err)
	}
}

// bomb panics where it is told to.
type bomb struct {
	mu    sync.Mutex
	where string
	times int
}

func (b *bomb) arm(where string, times int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.where, b.times = where, times
}

func (b *bomb) at(where string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.where == where && b.times > 0 {
		b.times--
		panic("boom in " + where)
	}
}

func (b *bomb) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "bomb"} }
func (b *bomb) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	b.at("send")
	err := l.Send(ctx, m)
	b.at("send, after passing on")
	return err
}
func (b *bomb) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	b.at("receive")
	return l.Deliver(ctx, m)
}
func (b *bomb) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	b.at("member " + ev.Kind.String())
	return l.Announce(ctx, ev)
}
func (b *bomb) HandleTick(context.Context, channel.Link, time.Time) error { b.at("tick"); return nil }
func (b *bomb) FilterView(v channel.View) channel.View                    { b.at("view"); return v }
func (b *bomb) Stop(context.Context) error                                { b.at("stop"); return nil }

func TestPanicsStayInTheLayer(t *testing.T) { // IC-23
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.ErrorLevel)
		metrics := channel.NewMetrics()
		b := new(bomb)
		e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{
			Layers:   []channel.Interceptor{queue(), b, gzip()},
			Settings: channel.Settings{Logger: zap.New(core), Metrics: metrics},
			Tick:     time.Second,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		r := new(channeltest.Recorder)
		var se *channel.SendError

		b.arm("send", 1)
		if err := e.Send(t.Context(), peers[:1], []byte("1"), channel.SendAck); !errors.Is(err, channel.ErrPanic) {
			t.Errorf("send: %v", err)
		}
		b.arm("send", 1)
		if err := e.SendDone(t.Context(), peers[:1], []byte("2"), channel.SendAck, r); !errors.Is(err, channel.ErrPanic) || len(r.Results()) != 0 {
			t.Errorf("pipelined send: %v, %v", err, r.Results())
		}
		// The message has been completed below before the layer panics: told once.
		b.arm("send, after passing on", 1)
		if err := e.SendDone(t.Context(), peers[:1], []byte("3"), channel.SendAck, r); err != nil || len(r.Results()) != 1 {
			t.Errorf("panic after completion: %v, %v", err, r.Results())
		}
		b.arm("receive", 1)
		if err := e.ReceiveBody(peers[0], channel.SendSyncAck, "4"); !errors.Is(err, channel.ErrPanic) {
			t.Errorf("receive: %v", err)
		}
		e.OnSend(func(context.Context, *channel.Message) error { panic("boom in the sender") })
		if err := e.Send(t.Context(), peers[:2], []byte("5"), channel.SendAck); !errors.As(err, &se) || len(se.Faults) != 2 {
			t.Errorf("sender: %v", err)
		}
		e.OnSend(nil)

		// A member event is lost for a moment only.
		b.arm("member added", 1)
		e.Observe(channel.MemberAdded, peers[0])
		synctest.Wait()
		if e.View().Has(peers[0]) {
			t.Error("the event passed the layer that panicked")
		}
		time.Sleep(1100 * time.Millisecond)
		if !e.View().Has(peers[0]) {
			t.Error("the event was not tried again")
		}
		// Not when it no longer holds.
		b.arm("member added", 1)
		e.Observe(channel.MemberAdded, peers[1])
		e.Observe(channel.MemberLost, peers[1])
		time.Sleep(2100 * time.Millisecond)
		if e.View().Has(peers[1]) {
			t.Error("a stale event was tried again")
		}
		b.arm("view", 1)
		e.Observe(channel.MemberAdded, peers[2])
		synctest.Wait()
		e.Observe(channel.MemberAdded, peers[1])
		synctest.Wait()
		if v := e.View(); len(v.Members) != 3 {
			t.Errorf("after a panic in a filter the view has %d members", len(v.Members))
		}
		b.arm("tick", 1)
		time.Sleep(1100 * time.Millisecond)

		cancel := e.Watch(func(channel.View, channel.MemberEvent) { panic("boom in a watcher") })
		cancel()

		if err := e.ReceiveBody(peers[0], channel.SendSyncAck, "good"); err != nil {
			t.Errorf("receive afterwards: %v", err)
		}
		if err := e.Send(t.Context(), peers[:1], []byte("good"), channel.SendAck); err != nil {
			t.Errorf("send afterwards: %v", err)
		}
		b.arm("stop", 1)
		if err := e.Stop(t.Context()); !errors.Is(err, channel.ErrPanic) {
			t.Errorf("stop: %v", err)
		}
		if n := counter(metrics, "channel_layer_panics_total"); n != 9 {
			t.Errorf("panics counted %v times, want 9", n)
		}
		if n := counter(metrics, "channel_callback_panics_total"); n != 2 {
			t.Errorf("panics of callbacks counted %v times, want 2", n)
		}
		if n := logs.Len(); n != 11 {
			t.Errorf("%d log lines, want 11", n)
		}
		for _, l := range logs.All() {
			f := l.ContextMap()
			if !strings.Contains(fmt.Sprint(f["panic"]), "boom in") || !strings.Contains(fmt.Sprint(f["stack"]), "fault_test.go") {
				t.Errorf("log line %+v", f)
			}
		}
	})
}

// faulty is a layer that panics in every handler.
type faulty string

func (n faulty) Descriptor() channel.Descriptor { return channel.Descriptor{Name: string(n)} }
func (n faulty) HandleSend(context.Context, channel.Link, *channel.Message) error {
	panic([]int{}[len(n)]) // as a bug does
}
func (n faulty) HandleReceive(context.Context, channel.Link, *channel.Message) error {
	var next *channel.Message
	return errors.New(string(next.Body))
}
func (n faulty) HandleMember(context.Context, channel.Link, channel.MemberEvent) error {
	panic(fmt.Errorf("no member %s", string(n)))
}

// The error and the counter of a panic name the layer, and what it was doing.
func TestPanicsNameTheLayer(t *testing.T) { // IC-23
	synctest.Test(t, func(t *testing.T) {
		metrics := channel.NewMetrics()
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{
			Layers:   []channel.Interceptor{queue(), faulty("acme/faulty"), gzip()},
			Settings: channel.Settings{Metrics: metrics},
		})
		sent, received := e.Send(t.Context(), peers, []byte("x"), channel.SendAck), e.ReceiveBody(peers[0], channel.SendSyncAck, "x")
		for what, err := range map[string]error{"acme/faulty: send: ": sent, "acme/faulty: receive: ": received} {
			if !errors.Is(err, channel.ErrPanic) || !strings.Contains(err.Error(), what) {
				t.Errorf("got %v, want %q", err, what)
			}
		}
		e.Observe(channel.MemberAdded, peers[0])
		synctest.Wait()
		for _, s := range metrics.Samples() {
			want := 0.0
			if s.Name == "channel_layer_panics_total" && s.Labels[1] == "acme/faulty" {
				want = 3
			}
			if s.Name == "channel_layer_panics_total" && s.Value != want {
				t.Errorf("%v panics of %s are counted, want %v", s.Value, s.Labels[1], want)
			}
		}
	})
}

func TestErrorsFromBelowReachTheCaller(t *testing.T) {
	e := channeltest.Embed(t, queue(), detector())
	want := &channel.SendError{Faults: []channel.Fault{{Member: peers[1], Err: channel.ErrAckTimeout}}}
	e.OnSend(func(context.Context, *channel.Message) error { return want })
	err := e.Send(t.Context(), peers, nil, channel.SendAck)
	var se *channel.SendError
	if !errors.As(err, &se) || se != want || !errors.Is(err, channel.ErrAckTimeout) {
		t.Errorf("got %v", err)
	}
}
