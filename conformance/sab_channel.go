package conformance

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/tcp"
)

// plainChannel is a channel without layers of its own: the reference that the
// saboteurs spoil.
func plainChannel(p Place, layers ...channel.Interceptor) (*channel.Channel, error) {
	var all []channel.Layer
	for _, l := range layers {
		all = append(all, channel.Layer{Interceptor: l})
	}
	stack, err := channel.NewStack(append(all, p.Bottom)...)
	if err != nil {
		return nil, err
	}
	rc := tcp.DefaultReceiverConfig()
	rc.Address = p.IP
	return channel.New(channel.Config{
		Announcement: channel.Announcement{Name: p.Name, Pipelined: true}, Stack: stack,
		Sender: tcp.NewSender(tcp.DefaultSenderConfig(), p.Settings), Receiver: tcp.NewReceiver(rc, p.Settings), Membership: p.Membership,
	}, p.Settings)
}

// spoiled is a channel with some methods replaced.
type spoiled struct {
	*channel.Channel
	start    func(ctx context.Context) error
	stop     func(ctx context.Context) error
	send     func(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error
	sendDone func(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error
	listen   func(l channel.Listener) func()
}

func (s *spoiled) Start(ctx context.Context) error {
	if s.start != nil {
		if err := s.start(ctx); err != nil {
			return err
		}
	}
	return s.Channel.Start(ctx)
}

func (s *spoiled) Stop(ctx context.Context) error {
	if s.stop != nil {
		return s.stop(ctx)
	}
	return s.Channel.Stop(ctx)
}

func (s *spoiled) Send(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error {
	if s.send != nil {
		return s.send(ctx, to, body, o)
	}
	return s.Channel.Send(ctx, to, body, o)
}

func (s *spoiled) SendDone(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error {
	if s.sendDone != nil {
		return s.sendDone(ctx, to, body, o, done)
	}
	return s.Channel.SendDone(ctx, to, body, o, done)
}

func (s *spoiled) Listen(l channel.Listener) func() {
	if s.listen != nil {
		return s.listen(l)
	}
	return s.Channel.Listen(l)
}

// spoil makes a saboteur of a good channel.
func spoilChannel(name string, change func(s *spoiled), layers ...func() channel.Interceptor) Saboteur {
	return Saboteur{Name: name, New: func() Subject {
		return channelSubject{"spoiled", func(p Place) (Group, error) {
			var all []channel.Interceptor
			for _, l := range layers {
				all = append(all, l())
			}
			c, err := plainChannel(p, all...)
			if err != nil {
				return nil, err
			}
			s := &spoiled{Channel: c}
			if change != nil {
				change(s)
			}
			return s, nil
		}, nil}
	}}
}

func sabChannelStop() []Saboteur {
	return []Saboteur{
		spoilChannel("cannot be stopped twice", func(s *spoiled) {
			var stopped atomic.Bool
			s.stop = func(ctx context.Context) error {
				if stopped.Swap(true) {
					return errors.New("stopped already")
				}
				return s.Channel.Stop(ctx)
			}
		}),
		spoilChannel("leaves a goroutine", func(s *spoiled) {
			s.start = func(context.Context) error { go leak(); return nil }
		}),
		spoilChannel("goes on sending", func(s *spoiled) {
			s.send = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error {
				_ = s.Channel.Send(ctx, to, body, o)
				return nil
			}
		}),
	}
}

func sabChannelIDs() []Saboteur {
	var n atomic.Uint64
	return []Saboteur{spoilChannel("numbers messages with a byte", nil, func() channel.Interceptor {
		return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
			m.ID = channel.UniqueID{1, byte(n.Add(1)), byte(n.Load() >> 8)}
			return l.Send(ctx, m)
		}}
	})}
}

func sabNoDestination() []Saboteur {
	return []Saboteur{
		spoilChannel("takes nobody for everybody", func(s *spoiled) {
			s.send = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error {
				if len(to) == 0 {
					to = []channel.Member{s.Local()}
				}
				return s.Channel.Send(ctx, to, body, o)
			}
		}),
		spoilChannel("is content with nobody", func(s *spoiled) {
			s.sendDone = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error {
				if len(to) == 0 {
					done.Complete(nil, nil)
					return nil
				}
				return s.Channel.SendDone(ctx, to, body, o, done)
			}
		}),
	}
}

func sabAck() []Saboteur {
	return []Saboteur{
		spoilChannel("does not wait for the acknowledgement", func(s *spoiled) {
			s.send = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error {
				return s.Channel.Send(ctx, to, body, o&^channel.UseAck)
			}
		}),
		spoilChannel("does not say who is silent", func(s *spoiled) {
			s.send = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error {
				if s.Channel.Send(ctx, to, body, o) != nil {
					return channel.ErrAckTimeout
				}
				return nil
			}
		}),
	}
}

func sabSyncAck() []Saboteur {
	return []Saboteur{
		spoilChannel("takes received for processed", func(s *spoiled) {
			s.send = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error {
				return s.Channel.Send(ctx, to, body, o&^channel.SyncAck)
			}
		}),
		spoilChannel("takes a refusal for a death", nil, func() channel.Interceptor {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				to := m.To[0]
				err := l.Send(ctx, m)
				if err != nil {
					_ = l.Announce(ctx, channel.MemberEvent{Kind: channel.MemberLost, Member: to, Err: err})
				}
				return err
			}}
		}),
	}
}

func sabPartial() []Saboteur {
	return []Saboteur{
		spoilChannel("blames everybody", func(s *spoiled) {
			s.send = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error {
				if err := s.Channel.Send(ctx, to, body, o); err != nil {
					return channel.Failed(to, err)
				}
				return nil
			}
		}),
		spoilChannel("sends to everybody again", func(s *spoiled) {
			s.send = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error {
				err := s.Channel.Send(ctx, to, body, o)
				if err != nil {
					err = s.Channel.Send(ctx, to, body, o)
				}
				return err
			}
		}),
	}
}

// doneFunc is a completion.
type doneFunc func(m *channel.Message, err error)

func (f doneFunc) Complete(m *channel.Message, err error) { f(m, err) }

func sabAsync() []Saboteur {
	return []Saboteur{
		spoilChannel("waits", func(s *spoiled) {
			s.sendDone = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error {
				done.Complete(nil, s.Channel.Send(ctx, to, body, o))
				return nil
			}
		}),
		spoilChannel("reports twice", func(s *spoiled) {
			s.sendDone = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error {
				return s.Channel.SendDone(ctx, to, body, o, doneFunc(func(m *channel.Message, err error) {
					done.Complete(m, err)
					done.Complete(m, err)
				}))
			}
		}),
		spoilChannel("does not report failures", func(s *spoiled) {
			s.sendDone = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error {
				return s.Channel.SendDone(ctx, to, body, o, doneFunc(func(m *channel.Message, err error) {
					if err == nil {
						done.Complete(m, err)
					}
				}))
			}
		}),
	}
}

func sabListeners() []Saboteur {
	return []Saboteur{
		spoilChannel("asks the last one first", func(s *spoiled) {
			var mu sync.Mutex
			var all []*channel.Listener
			ask := func(ctx context.Context, m *channel.Message) (bool, error) {
				mu.Lock()
				list := slices.Clone(all)
				mu.Unlock()
				slices.Reverse(list)
				for _, l := range list {
					if handled, err := (*l).Handle(ctx, m); handled || err != nil {
						return handled, err
					}
				}
				return false, nil
			}
			s.Channel.Listen(listenFunc(ask))
			s.listen = func(l channel.Listener) func() {
				mu.Lock()
				defer mu.Unlock()
				all = append(all, &l)
				return func() {
					mu.Lock()
					defer mu.Unlock()
					all = slices.DeleteFunc(all, func(o *channel.Listener) bool { return o == &l })
				}
			}
		}),
		spoilChannel("never forgets a listener", func(s *spoiled) {
			s.listen = func(l channel.Listener) func() {
				s.Channel.Listen(l)
				return func() {}
			}
		}),
	}
}

type listenFunc func(ctx context.Context, m *channel.Message) (bool, error)

func (f listenFunc) Handle(ctx context.Context, m *channel.Message) (bool, error) { return f(ctx, m) }

func sabBodies() []Saboteur {
	return []Saboteur{
		spoilChannel("keeps the caller's buffer", func(s *spoiled) {
			s.sendDone = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error {
				time.AfterFunc(time.Millisecond, func() {
					if err := s.Channel.SendDone(context.Background(), to, body, o, done); err != nil {
						done.Complete(nil, err)
					}
				})
				return nil
			}
		}),
		spoilChannel("writes to the caller's buffer", nil, func() channel.Interceptor {
			// It is not described as a layer that changes bodies.
			flip := func(m *channel.Message) error {
				for i := range m.Body {
					m.Body[i] ^= 1
				}
				return nil
			}
			return channel.Transform(channel.Descriptor{Name: "crooked"}, flip, flip)
		}),
	}
}

func sabDrains() []Saboteur {
	return []Saboteur{
		spoilChannel("forgets its queue at Stop", func(s *spoiled) {
			type entry func()
			var mu sync.Mutex
			var queue []entry
			var stopped bool
			s.sendDone = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error {
				to, body = slices.Clone(to), slices.Clone(body)
				mu.Lock()
				queue = append(queue, func() {
					if err := s.Channel.SendDone(context.Background(), to, body, o, done); err != nil {
						done.Complete(nil, err)
					}
				})
				mu.Unlock()
				time.AfterFunc(time.Second, func() {
					mu.Lock()
					var next entry
					if len(queue) > 0 && !stopped {
						next, queue = queue[0], queue[1:]
					}
					mu.Unlock()
					if next != nil {
						next()
					}
				})
				return nil
			}
			s.stop = func(ctx context.Context) error {
				mu.Lock()
				stopped = true
				mu.Unlock()
				return s.Channel.Stop(ctx)
			}
		}),
		spoilChannel("reports what it never sent", func(s *spoiled) {
			s.sendDone = func(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error {
				go func() {
					time.Sleep(time.Millisecond)
					_ = s.Channel.Send(ctx, to, body, o&^channel.UseAck)
				}()
				done.Complete(nil, nil)
				return nil
			}
			s.stop = func(context.Context) error {
				ctx, cancel := context.WithCancel(context.Background())
				cancel()
				return s.Channel.Stop(ctx)
			}
		}),
	}
}
