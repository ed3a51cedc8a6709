package channel_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

var peers = []channel.Member{channeltest.Member(1), channeltest.Member(2), channeltest.Member(3)}

func TestSendFillsInTheMessage(t *testing.T) {
	e := channeltest.Embed(t)
	before := time.Now().UnixMilli()
	if err := e.Send(t.Context(), peers[:2], []byte("hello"), channel.UseAck|0x4000_0000); err != nil {
		t.Fatal(err)
	}
	got := e.Bottom.Messages()
	if len(got) != 1 {
		t.Fatalf("%d messages reached the bottom, want 1", len(got))
	}
	m := got[0]
	if string(m.Body) != "hello" || !slices.Equal(m.To, peers[:2]) || !m.From.Is(e.Local()) || m.ID.IsZero() {
		t.Errorf("message is %+v", m)
	}
	if want := channel.ByteMessage | channel.UseAck | 0x4000_0000; m.Options != want {
		t.Errorf("options are %v, want %v", m.Options, want)
	}
	if m.Time < before || m.Time > time.Now().UnixMilli() {
		t.Errorf("time is %v", m.When())
	}
}

func TestSendRefuses(t *testing.T) {
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	r := new(channeltest.Recorder)
	if err := e.Send(t.Context(), peers, nil, 0); !errors.Is(err, channel.ErrClosed) {
		t.Errorf("before start: %v", err)
	}
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.Send(t.Context(), nil, nil, 0); !errors.Is(err, channel.ErrNoMembers) {
		t.Errorf("no destination: %v", err)
	}
	if err := e.SendDone(t.Context(), nil, nil, 0, r); !errors.Is(err, channel.ErrNoMembers) {
		t.Errorf("no destination: %v", err)
	}
	if err := e.SendDone(t.Context(), peers, nil, 0, nil); !errors.Is(err, channel.ErrNotConfigured) {
		t.Errorf("no completion: %v", err)
	}
	for range 2 {
		if err := e.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.SendDone(t.Context(), peers, nil, 0, r); !errors.Is(err, channel.ErrClosed) {
		t.Errorf("after stop: %v", err)
	}
	if err := e.Start(t.Context()); !errors.Is(err, channel.ErrClosed) {
		t.Errorf("start after stop: %v", err)
	}
	if n := len(e.Bottom.Messages()) + len(r.Results()); n != 0 {
		t.Errorf("%d refused messages left traces", n)
	}
}

func TestStopWithoutStart(t *testing.T) {
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := e.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSendDoneReportsOnce(t *testing.T) {
	e := channeltest.Embed(t)
	r := new(channeltest.Recorder)
	body := []byte("abc")
	e.Hold()
	for i := range 3 {
		body[0] = byte('0' + i)
		if err := e.SendDone(t.Context(), peers[:1], body, channel.SendSyncAck, r); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(r.Results()); n != 0 {
		t.Fatalf("%d reported before the end", n)
	}
	e.Finish(channel.ErrNegativeAck)
	res := r.Results()
	if len(res) != 3 {
		t.Fatalf("%d reported, want 3", len(res))
	}
	var se *channel.SendError
	for i, m := range e.Bottom.Messages() {
		if res[i].ID != m.ID || !errors.As(res[i].Err, &se) || !se.Faults[0].Member.Is(peers[0]) || !errors.Is(res[i].Err, channel.ErrNegativeAck) {
			t.Errorf("result %d: %+v", i, res[i])
		}
	}
	if b := e.Bottom.Bodies(); !slices.Equal(b, []string{"0bc", "1bc", "2bc"}) {
		t.Errorf("bodies %q: the caller's buffer was used after SendDone returned", b)
	}
}

// complete is a Completion.
type complete func(m *channel.Message, err error)

func (c complete) Complete(m *channel.Message, err error) { c(m, err) }

func TestSendDoneKeepsNoHoldOfTheCallersBuffers(t *testing.T) {
	e := channeltest.Embed(t)
	e.Hold()
	var got string
	body, to := []byte("before"), slices.Clone(peers[:1])
	err := e.SendDone(t.Context(), to, body, channel.SendAck, complete(func(m *channel.Message, _ error) {
		got = string(m.Body) + " to " + m.To[0].Name()
	}))
	if err != nil {
		t.Fatal(err)
	}
	copy(body, "after!")
	to[0] = peers[1]
	e.Finish(nil)
	if got != "before to node1" {
		t.Errorf("the message on its way became %q", got)
	}
}

func TestListenersAreAskedInOrder(t *testing.T) {
	metrics := channel.NewMetrics()
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{Settings: channel.Settings{Metrics: metrics}})
	if err != nil {
		t.Fatal(err)
	}
	e.Top.Reply = func(*channel.Message) (bool, error) { return false, nil }
	var asked []string
	listen := func(name string, handled bool, err error) func() {
		return e.Listen(channel.ListenerFunc(func(_ context.Context, m *channel.Message) (bool, error) {
			asked = append(asked, name)
			if string(m.Body) == "panic "+name {
				panic("as told")
			}
			return handled && string(m.Body) == name, err
		}))
	}
	listen("a", true, nil)
	cancelB := listen("b", true, nil)
	listen("c", true, nil)
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer e.Stop(t.Context())
	for _, c := range []struct {
		body  string
		asked []string
		err   error
	}{
		{"a", []string{"a"}, nil},
		{"b", []string{"a", "b"}, nil},
		{"nobody", []string{"a", "b", "c"}, nil},
		{"panic b", []string{"a", "b", "c"}, channel.ErrPanic},
	} {
		asked = nil
		if err := e.ReceiveBody(peers[0], channel.SendSyncAck, c.body); !errors.Is(err, c.err) {
			t.Errorf("%s: error %v, want %v", c.body, err, c.err)
		}
		if !slices.Equal(asked, c.asked) {
			t.Errorf("%s: asked %q, want %q", c.body, asked, c.asked)
		}
	}
	cancelB()
	asked = nil
	if err := e.ReceiveBody(peers[0], 0, "b"); err != nil || slices.Contains(asked, "b") {
		t.Errorf("after cancel: %v, asked %q", err, asked)
	}
	if n := counter(metrics, "channel_unhandled_total"); n != 2 {
		t.Errorf("unhandled counted %v times, want 2", n)
	}
}

// counter returns the sum over all labels.
func counter(m *channel.Metrics, name string) (sum float64) {
	for _, s := range m.Samples() {
		if s.Name == name {
			sum += s.Value
		}
	}
	return sum
}

// probe notes what it sees.
type probe struct {
	name string
	log  *[]string
}

func (p probe) Descriptor() channel.Descriptor { return channel.Descriptor{Name: p.name} }
func (p probe) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	*p.log = append(*p.log, p.name+" send")
	return l.Send(ctx, m)
}
func (p probe) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	*p.log = append(*p.log, p.name+" receive")
	return l.Deliver(ctx, m)
}
func (p probe) Start(context.Context, channel.Link) error {
	*p.log = append(*p.log, p.name+" start")
	return nil
}
func (p probe) Stop(context.Context) error {
	*p.log = append(*p.log, p.name+" stop")
	return nil
}

func TestLayersRunInOrder(t *testing.T) {
	var log []string
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{Layers: []channel.Interceptor{
		probe{"a", &log},
		channel.Transform(channel.Descriptor{Name: "x", Mutates: true},
			func(m *channel.Message) error { m.Body = append(m.Body, 'x'); return nil },
			func(m *channel.Message) error { m.Body = m.Body[:len(m.Body)-1]; return nil }),
		probe{"b", &log},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	body := append(make([]byte, 0, 10), "1"...)
	if err := e.Send(t.Context(), peers, body, 0); err != nil {
		t.Fatal(err)
	}
	if err := e.ReceiveBody(peers[0], channel.SendSyncAck, "2x"); err != nil {
		t.Fatal(err)
	}
	if err := e.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []string{"b start", "a start", "a send", "b send", "b receive", "a receive", "a stop", "b stop"}
	if !slices.Equal(log, want) {
		t.Errorf("order is %q, want %q", log, want)
	}
	if b := e.Bottom.Bodies(); !slices.Equal(b, []string{"1x"}) {
		t.Errorf("wire: %q", b)
	}
	if b := e.Top.Bodies(); !slices.Equal(b, []string{"2"}) {
		t.Errorf("top: %q", b)
	}
	if got := body[:2]; got[1] != 0 {
		t.Errorf("a layer wrote into the caller's buffer: %q", got)
	}
}

func TestViewFollowsTheMembership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Settings: channel.Settings{Logger: zap.New(core)}})
		e.Observe(channel.MemberAdded, peers[0])
		e.Observe(channel.MemberAdded, peers[0])
		e.Observe(channel.MemberAdded, peers[1])
		e.Observe(channel.MemberLost, peers[2])
		e.Observe(channel.MemberLost, peers[0])
		synctest.Wait()
		if v := e.View(); len(v.Members) != 1 || !v.Has(peers[1]) || !v.Local.Is(e.Local()) || v.Version != 3 {
			t.Errorf("view is %+v", v)
		}
		var got []string
		for _, c := range e.Top.Views() {
			got = append(got, fmt.Sprintf("%d %v %s %d", c.View.Version, c.Event.Kind, c.Event.Member.Name(), len(c.View.Members)))
		}
		want := []string{"0 unknown tcp://?:0 0", "1 added node1 1", "2 added node2 2", "3 lost node1 1"}
		if !slices.Equal(got, want) {
			t.Errorf("watched %q, want %q", got, want)
		}
		if f := e.Forgotten.Events(); len(f) != 1 || !f[0].Member.Is(peers[0]) {
			t.Errorf("forgotten: %+v", f)
		}
		var lines []string
		for _, l := range logs.All() {
			lines = append(lines, fmt.Sprint(l.Message, " ", l.ContextMap()["member"]))
		}
		if want := []string{"member added node1 (tcp://10.0.0.1:4000)", "member added node2 (tcp://10.0.0.2:4000)", "member removed node1 (tcp://10.0.0.1:4000)"}; !slices.Equal(lines, want) {
			t.Errorf("logged %q, want %q", lines, want)
		}
	})
}
