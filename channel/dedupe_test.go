package channel_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// acks is a receiver's side of one message.
type acks struct {
	mu       sync.Mutex
	deferred bool
	answers  []error
}

func (a *acks) Defer() func(error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.deferred = true
	return a.answer
}

func (a *acks) answer(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answers = append(a.answers, err)
}

// receive does what a receiver does: it answers when deliver returns, unless
// the answer was deferred.
func receive(e *channeltest.Embedded, m channel.Message) *acks {
	a := new(acks)
	m.Later = a
	err := e.Receive(context.Background(), &m)
	if !a.deferred {
		a.answer(err)
	}
	return a
}

func (a *acks) get() []error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.answers
}

func TestRepeatedMessages(t *testing.T) {
	metrics := channel.NewMetrics()
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Settings: channel.Settings{Metrics: metrics}})
	base := channel.Message{ID: channel.NewUniqueID(), From: peers[0], Options: channel.SendSyncAck, Body: []byte("a long enough body, part 1")}
	with := func(f func(*channel.Message)) channel.Message {
		m := base
		f(&m)
		return m
	}
	for _, c := range []struct {
		name      string
		m         channel.Message
		delivered bool
	}{
		{"first", base, true},
		{"again", base, false},
		{"and again", base, false},
		{"another fragment", with(func(m *channel.Message) { m.Body = []byte("a long enough body, part 2") }), true},
		{"another length", with(func(m *channel.Message) { m.Body = []byte("a longer enough body, part 1") }), true},
		{"an empty fragment", with(func(m *channel.Message) { m.Body = nil }), true},
		{"another id", with(func(m *channel.Message) { m.ID = channel.NewUniqueID() }), true},
		{"another sender", with(func(m *channel.Message) { m.From = peers[1] }), true},
		{"with ack only, again", with(func(m *channel.Message) { m.Options = channel.SendAck }), false},
		{"without ack", with(func(m *channel.Message) { m.Options = channel.SendNone }), true},
		{"without ack, again", with(func(m *channel.Message) { m.Options = channel.SendNone }), true},
	} {
		before := len(e.Top.Messages())
		a := receive(e, c.m)
		if got := len(e.Top.Messages()) > before; got != c.delivered {
			t.Errorf("%s: delivered is %v", c.name, got)
		}
		if ans := a.get(); len(ans) != 1 || ans[0] != nil {
			t.Errorf("%s: answers %v", c.name, ans)
		}
	}
	if n := counter(metrics, "channel_duplicates_total"); n != 3 {
		t.Errorf("%v duplicates counted", n)
	}
}

func TestAWholeWindowMayBeRepeated(t *testing.T) {
	e := channeltest.Embed(t)
	var ms []channel.Message
	for range 3000 {
		ms = append(ms, channel.Message{ID: channel.NewUniqueID(), From: peers[0], Options: channel.SendAck})
	}
	for _, m := range ms {
		receive(e, m)
	}
	for _, m := range ms[len(ms)-2048:] {
		receive(e, m)
	}
	if n := len(e.Top.Messages()); n != len(ms) {
		t.Errorf("%d deliveries, want %d", n, len(ms))
	}
}

func TestRepetitionOfAFailedMessage(t *testing.T) {
	failing, lower := errors.New("listener failed"), errors.New("layer failed")
	broken := true
	e := channeltest.Embed(t, channel.Transform(channel.Descriptor{Name: "x"}, nil, func(*channel.Message) error {
		if broken {
			return lower
		}
		return nil
	}))
	e.Top.Reply = func(*channel.Message) (bool, error) { return true, failing }
	m := channel.Message{ID: channel.NewUniqueID(), From: peers[0], Options: channel.SendSyncAck}
	if a := receive(e, m).get(); !errors.Is(a[0], lower) {
		t.Errorf("first: %v", a)
	}
	broken = false
	if a := receive(e, m).get(); !errors.Is(a[0], failing) {
		t.Errorf("what never reached a listener may be tried again: %v", a)
	}
	if a := receive(e, m).get(); !errors.Is(a[0], failing) {
		t.Errorf("a repetition gets the first answer: %v", a)
	}
	if n := len(e.Top.Messages()); n != 1 {
		t.Errorf("%d deliveries", n)
	}
}

func TestRepetitionWaitsForTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, deferred := range []bool{false, true} {
			for _, result := range []error{nil, errors.New("not stored")} {
				e := channeltest.Embed(t)
				release := make(chan struct{})
				var end func(error)
				e.Top.Reply = func(m *channel.Message) (bool, error) {
					if deferred {
						end = m.Defer()
						return true, errors.New("ignored")
					}
					<-release
					return true, result
				}
				m := channel.Message{ID: channel.NewUniqueID(), From: peers[0], Options: channel.SendSyncAck}
				var first *acks
				done := make(chan struct{})
				go func() { first = receive(e, m); close(done) }()
				synctest.Wait()
				second, third := receive(e, m), receive(e, m)
				if len(second.get())+len(third.get()) != 0 {
					t.Fatalf("deferred=%v: a repetition was answered before the first message was finished", deferred)
				}
				close(release)
				if deferred {
					end(result)
					end(errors.New("called twice"))
				}
				<-done
				fourth := receive(e, m)
				for i, a := range []*acks{first, second, third, fourth} {
					if got := a.get(); len(got) != 1 || !errors.Is(got[0], result) {
						t.Errorf("deferred=%v: answers to message %d: %v, want %v", deferred, i+1, got, result)
					}
				}
				if n := len(e.Top.Messages()); n != 1 {
					t.Errorf("%d deliveries", n)
				}
			}
		}
	})
}

func TestRepetitionsThatWaitAreBounded(t *testing.T) {
	e := channeltest.Embed(t)
	var end func(error)
	e.Top.Reply = func(m *channel.Message) (bool, error) { end = m.Defer(); return true, nil }
	m := channel.Message{ID: channel.NewUniqueID(), From: peers[0], Options: channel.SendSyncAck}
	var all []*acks
	for range 40 {
		all = append(all, receive(e, m))
	}
	refused := 0
	for _, a := range all {
		if got := a.get(); len(got) == 1 && errors.Is(got[0], channel.ErrQueueFull) {
			refused++
		}
	}
	if refused != 40-1-16 {
		t.Errorf("%d refused", refused)
	}
	end(nil)
	for i, a := range all {
		if len(a.get()) != 1 {
			t.Errorf("message %d got %v", i, a.get())
		}
	}
}
