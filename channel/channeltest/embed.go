package channeltest

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// Member returns the n-th of a series of distinct members, for tests: address
// 10.0.x.y and port 4000, an id that starts with n, an announced name.
func Member(n int) channel.Member {
	id := channel.UniqueID{byte(n >> 8), byte(n), 0xe}
	return channel.Member{
		ID:         id,
		Host:       netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}),
		Port:       4000,
		SecurePort: -1,
		UDPPort:    -1,
		Payload:    channel.Announcement{Name: fmt.Sprintf("node%d", n), Pipelined: true}.Encode(),
		Alive:      time.Hour - time.Duration(n)*time.Second,
	}
}

// EmbedConfig says what is special about an embedded channel.
type EmbedConfig struct {
	// Layers is the stack, nearest to the application first.
	Layers []channel.Interceptor
	// Settings are given to the channel; a nil logger logs nothing.
	Settings channel.Settings
	// Tick is the interval of tick handlers; 0 means an hour, so that they run
	// only when the test waits that long.
	Tick time.Duration
	// Local is the template of the local member.
	Local channel.Member
	// Discard says not to record the messages at top and bottom; for
	// benchmarks.
	Discard bool
}

// Embedded is a channel without a network: what it sends ends in a record, what
// it receives comes from the test.
type Embedded struct {
	*channel.Channel
	// Bottom has noted the messages that reached the wire; with Done set, also
	// their To.
	Bottom *Recorder
	// Top has noted the messages that reached the application, and the view
	// changes.
	Top *Recorder
	// Forgotten has noted, as MemberLeft, the members that the sender was told
	// to forget.
	Forgotten *Recorder

	onSend  atomic.Pointer[func(context.Context, *channel.Message) error]
	discard bool
	deliver func(context.Context, *channel.Message) error
	sink    channel.MemberSink

	mu   sync.Mutex
	held []*channel.Message
	hold bool
}

// Embed starts a channel with these layers and no network, and stops it at the
// end of the test.
func Embed(t testing.TB, layers ...channel.Interceptor) *Embedded {
	t.Helper()
	return EmbedWith(t, EmbedConfig{Layers: layers})
}

// EmbedWith is Embed with all choices.
func EmbedWith(t testing.TB, c EmbedConfig) *Embedded {
	t.Helper()
	e, err := NewEmbedded(c)
	if err == nil {
		err = e.Start(t.Context())
	}
	if err != nil {
		t.Fatalf("embed: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := e.Stop(ctx); err != nil {
			t.Errorf("embed: %v", err)
		}
	})
	return e
}

// NewEmbedded makes an embedded channel that is not started, for use outside
// of tests.
func NewEmbedded(c EmbedConfig) (*Embedded, error) {
	layers := make([]channel.Layer, len(c.Layers))
	for i, l := range c.Layers {
		layers[i] = channel.Layer{Interceptor: l, Origin: fmt.Sprintf("layer %d", i+1)}
	}
	stack, err := channel.NewStack(layers...)
	if err != nil {
		return nil, err
	}
	if c.Tick == 0 {
		c.Tick = time.Hour
	}
	if c.Settings.Logger == nil {
		c.Settings.Logger = zap.NewNop()
	}
	e := &Embedded{Bottom: new(Recorder), Top: new(Recorder), Forgotten: new(Recorder), discard: c.Discard}
	e.Channel, err = channel.New(channel.Config{
		Local:        c.Local,
		Announcement: channel.Announcement{Name: "embedded", Pipelined: true},
		Stack:        stack,
		Sender:       (*embedSender)(e),
		Receiver:     (*embedReceiver)(e),
		Membership:   (*embedMembership)(e),
		Tick:         c.Tick,
	}, c.Settings)
	if err != nil {
		return nil, err
	}
	if c.Discard {
		e.Listen(discard{})
	} else {
		e.Listen(e.Top)
		e.Watch(e.Top.Watch)
	}
	return e, nil
}

// discard takes every message.
type discard struct{}

func (discard) Handle(context.Context, *channel.Message) (bool, error) { return true, nil }

// OnSend makes f decide the result of every message that reaches the bottom,
// after it has been noted; nil restores success. f may block as long as its
// context allows. For messages with Done set its result is told to Done.
func (e *Embedded) OnSend(f func(ctx context.Context, m *channel.Message) error) {
	if f == nil {
		e.onSend.Store(nil)
		return
	}
	e.onSend.Store(&f)
}

// Hold keeps messages with Done set at the bottom, accepted and unfinished,
// until Finish.
func (e *Embedded) Hold() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.hold = true
}

// Finish completes the held messages with err, in order, holds no further
// ones, and returns how many there were.
func (e *Embedded) Finish(err error) int {
	e.mu.Lock()
	held := e.held
	e.held, e.hold = nil, false
	e.mu.Unlock()
	for _, m := range held {
		m.Done.Complete(m, fault(m, err))
	}
	return len(held)
}

func fault(m *channel.Message, err error) error {
	if err == nil {
		return nil
	}
	return channel.Failed(m.To, err)
}

// Receive hands m to the bottom of the stack as if it came from the wire, and
// returns the result that an acknowledgement would carry.
func (e *Embedded) Receive(ctx context.Context, m *channel.Message) error { return e.deliver(ctx, m) }

// ReceiveBody is Receive for a new message with these options and a copy of
// body.
func (e *Embedded) ReceiveBody(from channel.Member, o channel.Options, body string) error {
	return e.deliver(context.Background(), &channel.Message{
		ID: channel.NewUniqueID(), From: from, Options: o | channel.ByteMessage, Time: time.Now().UnixMilli(), Body: []byte(body),
	})
}

// Observe reports a member event at the bottom, as a membership does. The
// event climbs the stack in another goroutine: use synctest.Wait, or
// [Recorder.WaitFor] on Top.
func (e *Embedded) Observe(kind channel.MemberEventKind, m channel.Member) {
	e.sink.Observe(channel.MemberEvent{Kind: kind, Member: m})
}

type embedSender Embedded

func (s *embedSender) Start(context.Context) error { return nil }
func (s *embedSender) Stop(context.Context) error {
	(*Embedded)(s).Finish(channel.ErrClosed)
	return nil
}

func (s *embedSender) Forget(m channel.Member) {
	s.Forgotten.Observe(channel.MemberEvent{Kind: channel.MemberLeft, Member: m})
}

func (s *embedSender) Send(ctx context.Context, m *channel.Message) error {
	if !s.discard {
		_, _ = s.Bottom.Handle(ctx, m)
	}
	var err error
	if f := s.onSend.Load(); f != nil {
		err = (*f)(ctx, m)
	}
	if m.Done == nil {
		return err
	}
	s.mu.Lock()
	hold := s.hold && err == nil
	if hold {
		s.held = append(s.held, m)
	}
	s.mu.Unlock()
	if !hold {
		m.Done.Complete(m, err)
	}
	return nil
}

type embedReceiver Embedded

func (r *embedReceiver) Listen(context.Context) (netip.AddrPort, error) {
	return netip.MustParseAddrPort("10.255.255.254:4000"), nil
}

func (r *embedReceiver) Start(_ context.Context, deliver func(context.Context, *channel.Message) error) error {
	r.deliver = deliver
	return nil
}
func (r *embedReceiver) Stop(context.Context) error { return nil }

type embedMembership Embedded

func (e *embedMembership) Start(_ context.Context, _ channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	e.sink = sink
	return nil
}
func (e *embedMembership) Update(context.Context, channel.Member) error { return nil }
func (e *embedMembership) Stop(context.Context) error                   { return nil }
