package tcp

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
)

// Every kind of message arrives, in order, toward both kinds of peers.
func TestSendInOrder(t *testing.T) {
	const count = 500
	for name, pipelined := range map[string]bool{"pipe": true, "pool": false} {
		for option, o := range map[string]channel.Options{"none": channel.SendNone, "ack": channel.SendAck, "sync": channel.SendSyncAck} {
			t.Run(name+"/"+option, func(t *testing.T) {
				both(t, func(t *testing.T, a, b transport.Net, host string) {
					var in inbox
					to := receive(t, b, host, pipelined, in.add)
					s := send(t, a)
					for i := range count {
						if err := s.Send(t.Context(), s.message(o, number(i), to.member)); err != nil {
							t.Fatal(err)
						}
					}
					eventually(t, "all messages delivered", func() bool { return len(in.all()) >= count })
					for i, body := range in.all() {
						if body != number(i) {
							t.Fatalf("message %d is %q", i, body)
						}
					}
					if n := value(to.metrics, "channel_receive_connections_total"); n != 1 {
						t.Errorf("%d connections were opened, want 1", n)
					}
				})
			})
		}
	}
}

// Messages with Done are told their end exactly once, and keep their order.
func TestSendDone(t *testing.T) {
	const count = 3000
	both(t, func(t *testing.T, a, b transport.Net, host string) {
		var in inbox
		to := receive(t, b, host, true, in.add)
		s := send(t, a, func(c *SenderConfig) { c.WindowMessages = 100 })
		r := newResults()
		for i := range count {
			m := s.message(channel.SendSyncAck, number(i), to.member)
			m.Done = r
			if err := s.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		for body, err := range r.wait(t, count) {
			if err != nil {
				t.Errorf("%s: %v", body, err)
			}
		}
		for i, body := range in.all() {
			if body != number(i) {
				t.Fatalf("message %d is %q", i, body)
			}
		}
	})
}

// Many callers that wait share one connection.
func TestConcurrentCallers(t *testing.T) {
	both(t, func(t *testing.T, a, b transport.Net, host string) {
		var in inbox
		to := receive(t, b, host, true, in.add)
		s := send(t, a)
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				for j := range 40 {
					o := []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck}[(i+j)%3]
					if err := s.Send(t.Context(), s.message(o, number(i), to.member)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		eventually(t, "all messages delivered", func() bool { return len(in.all()) == 2000 })
	})
}

func TestSendErrors(t *testing.T) {
	n := realNet(t)
	to := receive(t, n, "127.0.0.1", true, func(context.Context, *channel.Message) error { return nil })
	s := send(t, n)
	bad := to.member
	bad.ID, bad.Port = channel.NewUniqueID(), 0
	for name, c := range map[string]struct {
		to   []channel.Member
		size int
		want error
	}{
		"nobody":     {nil, 1, channel.ErrNoMembers},
		"itself":     {[]channel.Member{s.member}, 1, ErrLocal},
		"no address": {[]channel.Member{bad}, 1, channel.ErrNotMember},
		"too large":  {[]channel.Member{to.member}, 64 << 20, channel.ErrTooLarge},
	} {
		m := s.message(channel.SendAck, "", c.to...)
		m.Body = make([]byte, c.size)
		if err := s.Send(t.Context(), m); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
		r := newResults()
		m.Done = r
		if err := s.Send(t.Context(), m); !errors.Is(err, c.want) || len(r.errs) != 0 {
			t.Errorf("%s, with Done: got %v, want %v; Done was told %v", name, err, c.want, r.errs)
		}
	}
	m := s.message(channel.SendAck, "x", to.member)
	m.From.Payload = string(make([]byte, 1<<16))
	if err := s.Send(t.Context(), m); !errors.Is(err, channel.ErrBadMessage) {
		t.Errorf("with a record that no receiver takes: %v", err)
	}
	// Of several, only the faulty ones are named.
	m = s.message(channel.SendAck, "x", to.member, bad, s.member)
	err := s.Send(t.Context(), m)
	var se *channel.SendError
	if !errors.As(err, &se) || len(se.Faults) != 2 || se.Faults[0].Member != bad || se.Faults[1].Member != s.member {
		t.Errorf("got %v, want faults of two members", err)
	}
	r := newResults()
	m.Done = r
	if err := s.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if got := r.wait(t, 1)["x"]; !errors.As(got, &se) || len(se.Faults) != 2 {
		t.Errorf("Done was told %v, want faults of two members", got)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Send(cancelled, s.message(channel.SendAck, "x", to.member)); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
	stop(t, s)
	stop(t, s)
	if err := s.Send(t.Context(), s.message(channel.SendAck, "x", to.member)); !errors.Is(err, channel.ErrClosed) {
		t.Errorf("after Stop: %v", err)
	}
	stop(t, NewSender(DefaultSenderConfig(), channel.Settings{Net: n}))
	stop(t, NewReceiver(DefaultReceiverConfig(), channel.Settings{Net: n}))
}
