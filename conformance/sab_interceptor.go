package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// leak is a goroutine that never ends.
func leak() { select {} }

// crooked is a layer that does what it is told; without orders it is
// transparent.
type crooked struct {
	desc    func() channel.Descriptor
	send    func(ctx context.Context, l channel.Link, m *channel.Message) error
	receive func(ctx context.Context, l channel.Link, m *channel.Message) error
	member  func(ctx context.Context, l channel.Link, ev channel.MemberEvent) error
	tick    func(ctx context.Context, l channel.Link, now time.Time) error
	start   func(ctx context.Context, l channel.Link) error
	stop    func(ctx context.Context) error
}

func (c *crooked) Descriptor() channel.Descriptor {
	if c.desc != nil {
		return c.desc()
	}
	return channel.Descriptor{Name: "crooked"}
}

func (c *crooked) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if c.send != nil {
		return c.send(ctx, l, m)
	}
	return l.Send(ctx, m)
}

func (c *crooked) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if c.receive != nil {
		return c.receive(ctx, l, m)
	}
	return l.Deliver(ctx, m)
}

func (c *crooked) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	if c.member != nil {
		return c.member(ctx, l, ev)
	}
	return l.Announce(ctx, ev)
}

func (c *crooked) HandleTick(ctx context.Context, l channel.Link, now time.Time) error {
	if c.tick != nil {
		return c.tick(ctx, l, now)
	}
	return nil
}

func (c *crooked) Start(ctx context.Context, l channel.Link) error {
	if c.start != nil {
		return c.start(ctx, l)
	}
	return nil
}

func (c *crooked) Stop(ctx context.Context) error {
	if c.stop != nil {
		return c.stop(ctx)
	}
	return nil
}

// wrong makes a saboteur of a layer.
func wrong(name string, layer func(s channel.Settings) channel.Interceptor) Saboteur {
	return Saboteur{Name: name, New: func() Subject {
		return Interceptor(func(_ struct{}, s channel.Settings) (channel.Interceptor, error) { return layer(s), nil }, struct{}{})
	}}
}

// bent is wrong for a layer that needs no settings.
func bent(name string, layer func() *crooked) Saboteur {
	return wrong(name, func(channel.Settings) channel.Interceptor { return layer() })
}

func described(d channel.Descriptor) func() channel.Descriptor {
	return func() channel.Descriptor { return d }
}

const sabFlag = channel.ThirdPartyMin

// transformer is a correct transforming layer: it turns all bits of a body and
// marks it. The functions may spoil it.
func transformer(out, in func(m *channel.Message) error) channel.Interceptor {
	flip := func(b []byte) {
		for i := range b {
			b[i] ^= 0xff
		}
	}
	if out == nil {
		out = func(m *channel.Message) error {
			flip(m.Body)
			m.Options |= sabFlag
			return nil
		}
	}
	if in == nil {
		in = func(m *channel.Message) error {
			if m.Options.Has(sabFlag) {
				flip(m.Body)
				m.Options &^= sabFlag
			}
			return nil
		}
	}
	return channel.Transform(channel.Descriptor{Name: "acme/flip", Flag: sabFlag, Mutates: true}, out, in)
}

func sabDescribePure() []Saboteur {
	return []Saboteur{
		bent("gives another descriptor each time", func() *crooked {
			var n atomic.Int64
			return &crooked{desc: func() channel.Descriptor {
				return channel.Descriptor{Name: "crooked", Promise: fmt.Sprint(n.Add(1))}
			}}
		}),
		bent("uses an option flag of the built-in layers", func() *crooked {
			return &crooked{desc: described(channel.Descriptor{Name: "acme/crooked", Flag: channel.Gzip})}
		}),
		wrong("starts a goroutine when made", func(channel.Settings) channel.Interceptor {
			go leak()
			return &crooked{}
		}),
		wrong("listens when made", func(s channel.Settings) channel.Interceptor {
			if _, err := s.Net.ListenPacket("udp4", "127.0.0.1:0"); err != nil {
				return &crooked{}
			}
			return &crooked{}
		}),
	}
}

func sabRoundTrip() []Saboteur {
	return []Saboteur{
		bent("cuts large bodies", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				m.Body = m.Body[:min(len(m.Body), 65536)]
				return l.Send(ctx, m)
			}}
		}),
		bent("loses empty bodies", func() *crooked {
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				if len(m.Body) == 0 {
					return nil
				}
				return l.Deliver(ctx, m)
			}}
		}),
		bent("clears foreign options", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				m.Options &= 0xffff
				return l.Send(ctx, m)
			}}
		}),
		bent("gives messages new ids on the way up", func() *crooked {
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				m.ID = channel.NewUniqueID()
				return l.Deliver(ctx, m)
			}}
		}),
		bent("passes itself off as the sender", func() *crooked {
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				m.From = l.Local()
				return l.Deliver(ctx, m)
			}}
		}),
		wrong("forgets to undo", func(channel.Settings) channel.Interceptor {
			return transformer(nil, func(*channel.Message) error { return nil })
		}),
	}
}

func sabFlagClear() []Saboteur {
	return []Saboteur{wrong("decodes unmarked messages too", func(channel.Settings) channel.Interceptor {
		return transformer(nil, func(m *channel.Message) error {
			for i := range m.Body {
				m.Body[i] ^= 0xff
			}
			m.Options &^= sabFlag
			return nil
		})
	})}
}

func sabForeignInput() []Saboteur {
	return []Saboteur{
		wrong("trusts a length in the body", func(channel.Settings) channel.Interceptor {
			return transformer(nil, func(m *channel.Message) error {
				if m.Options.Has(sabFlag) {
					m.Body = m.Body[:int(m.Body[0])+1]
				}
				return nil
			})
		}),
		wrong("alters what it does not understand", func(channel.Settings) channel.Interceptor {
			return transformer(nil, func(m *channel.Message) error {
				if !m.Options.Has(sabFlag) {
					m.Body = bytes.TrimRight(m.Body, "\x00\x01\x02\x03\x04\x05\x06\x07")
				}
				return nil
			})
		}),
	}
}

func sabForwardCount() []Saboteur {
	return []Saboteur{
		bent("sends twice", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				c := *m
				c.Done = nil
				return errors.Join(l.Send(ctx, &c), l.Send(ctx, m))
			}}
		}),
		bent("delivers now and then twice", func() *crooked {
			var n atomic.Int64
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				if n.Add(1)%10 == 0 {
					c := *m
					_ = l.Deliver(ctx, &c)
				}
				return l.Deliver(ctx, m)
			}}
		}),
		bent("drops every tenth message in silence", func() *crooked {
			var n atomic.Int64
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				if n.Add(1)%10 == 0 {
					return nil
				}
				return l.Deliver(ctx, m)
			}}
		}),
		bent("swallows every tenth message on the way down", func() *crooked {
			var n atomic.Int64
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				if n.Add(1)%10 == 0 {
					return nil
				}
				return l.Send(ctx, m)
			}}
		}),
	}
}

func sabErrorTransparent() []Saboteur {
	return []Saboteur{
		bent("replaces the error", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				if err := l.Send(ctx, m); err != nil {
					return fmt.Errorf("could not send: %v", err) //nolint:errorlint // the mistake
				}
				return nil
			}}
		}),
		bent("blames everybody", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				to := m.To
				if err := l.Send(ctx, m); err != nil {
					return channel.Failed(to, err)
				}
				return nil
			}}
		}),
		bent("hides the error", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				_ = l.Send(ctx, m)
				return nil
			}}
		}),
		bent("hides the receiver's error", func() *crooked {
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				_ = l.Deliver(ctx, m)
				return nil
			}}
		}),
	}
}

func sabOwnership() []Saboteur {
	return []Saboteur{
		bent("writes to the body after sending it", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				body := m.Body
				err := l.Send(ctx, m)
				clear(body)
				return err
			}}
		}),
		bent("resets the message after delivering it", func() *crooked {
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				err := l.Deliver(ctx, m)
				m.Options = 0
				return err
			}}
		}),
		bent("passes the message on later, without a copy", func() *crooked {
			var mu sync.Mutex
			var late []*channel.Message
			return &crooked{
				receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
					mu.Lock()
					late = append(late, m)
					first := len(late) == 1
					mu.Unlock()
					if first {
						return l.Deliver(ctx, m)
					}
					return l.Deliver(ctx, m)
				},
				tick: func(ctx context.Context, l channel.Link, _ time.Time) error {
					mu.Lock()
					again := late
					late = nil
					mu.Unlock()
					for _, m := range again {
						_ = l.Deliver(ctx, m)
					}
					return nil
				},
			}
		}),
		bent("forgets the completion", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				m.Done = nil
				return l.Send(ctx, m)
			}}
		}),
	}
}

func sabQuiet() []Saboteur {
	return []Saboteur{
		bent("leaves a timer that delivers", func() *crooked {
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				c := *m
				c.Body = slices.Clone(m.Body)
				time.AfterFunc(time.Minute, func() { _ = l.Deliver(context.Background(), &c) })
				return l.Deliver(ctx, m)
			}}
		}),
		bent("leaves a timer that announces", func() *crooked {
			return &crooked{member: func(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
				time.AfterFunc(time.Minute, func() { _ = l.Send(context.Background(), &channel.Message{To: []channel.Member{ev.Member}}) })
				return l.Announce(ctx, ev)
			}}
		}),
		bent("leaves a goroutine", func() *crooked {
			return &crooked{start: func(context.Context, channel.Link) error {
				go leak()
				return nil
			}}
		}),
		bent("cannot be stopped twice", func() *crooked {
			done := make(chan struct{})
			return &crooked{
				start: func(context.Context, channel.Link) error { return nil },
				stop: func(context.Context) error {
					select {
					case <-done:
						return errors.New("stopped already")
					default:
						close(done)
						return nil
					}
				},
			}
		}),
		bent("cannot be stopped without Start", func() *crooked {
			started := false
			return &crooked{
				start: func(context.Context, channel.Link) error { started = true; return nil },
				stop: func(context.Context) error {
					if !started {
						return errors.New("not started")
					}
					return nil
				},
			}
		}),
	}
}

func sabConcurrent() []Saboteur {
	return []Saboteur{
		bent("shares a scratch buffer between messages", func() *crooked {
			var mu sync.Mutex
			var scratch []byte
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				mu.Lock()
				scratch = append(scratch[:0], m.Body...)
				mu.Unlock()
				time.Sleep(time.Microsecond) // the others write to it meanwhile
				mu.Lock()                    // not for correctness: the race detector must have no say
				m.Body = slices.Clone(scratch)
				mu.Unlock()
				return l.Send(ctx, m)
			}}
		}),
		bent("remembers one message for all", func() *crooked {
			var last atomic.Pointer[channel.Message]
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				c := *m
				c.Body = slices.Clone(m.Body)
				last.Store(&c)
				time.Sleep(time.Microsecond)
				again := *last.Load()
				return l.Deliver(ctx, &again)
			}}
		}),
	}
}

func sabCancel() []Saboteur {
	return []Saboteur{
		bent("sends with a context of its own", func() *crooked {
			return &crooked{send: func(_ context.Context, l channel.Link, m *channel.Message) error {
				return l.Send(context.Background(), m)
			}}
		}),
		bent("delivers with a context of its own", func() *crooked {
			return &crooked{receive: func(_ context.Context, l channel.Link, m *channel.Message) error {
				return l.Deliver(context.Background(), m)
			}}
		}),
		bent("waits without looking at the context", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				time.Sleep(5 * time.Second)
				return l.Send(ctx, m)
			}}
		}),
	}
}

// crookedView is a layer with a view filter.
type crookedView struct {
	crooked
	filter func(channel.View) channel.View
}

func (c *crookedView) FilterView(v channel.View) channel.View { return c.filter(v) }

func sabViewFilter() []Saboteur {
	view := func(name string, filter func() func(channel.View) channel.View) Saboteur {
		return wrong(name, func(channel.Settings) channel.Interceptor { return &crookedView{filter: filter()} })
	}
	return []Saboteur{
		view("filters the same view differently", func() func(channel.View) channel.View {
			var n atomic.Int64
			return func(v channel.View) channel.View {
				return channel.NewView(v.Version, v.Local, slices.Clone(v.Members[:min(len(v.Members), int(n.Add(1)%3))]))
			}
		}),
		view("changes its input", func() func(channel.View) channel.View {
			return func(v channel.View) channel.View {
				if len(v.Members) > 1 {
					v.Members[0], v.Members[1] = v.Members[1], v.Members[0]
				}
				return v
			}
		}),
		view("invents a member", func() func(channel.View) channel.View {
			ghost := channel.Member{ID: channel.UniqueID{9, 9, 9}, Port: 1}
			return func(v channel.View) channel.View {
				return channel.NewView(v.Version, v.Local, append(slices.Clone(v.Members), ghost))
			}
		}),
	}
}

func sabBounded() []Saboteur {
	stateful := described(channel.Descriptor{Name: "crooked", Stateful: true})
	return []Saboteur{
		bent("keeps every body for ever", func() *crooked {
			var mu sync.Mutex
			var kept [][]byte
			return &crooked{desc: stateful, receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				mu.Lock()
				kept = append(kept, slices.Clone(m.Body))
				mu.Unlock()
				return l.Deliver(ctx, m)
			}}
		}),
		bent("keeps a goroutine for every sender", func() *crooked {
			var mu sync.Mutex
			workers := map[channel.UniqueID]chan struct{}{}
			return &crooked{desc: stateful,
				receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
					mu.Lock()
					if workers[m.From.ID] == nil {
						stop := make(chan struct{})
						workers[m.From.ID] = stop
						go func() { <-stop }()
					}
					mu.Unlock()
					return l.Deliver(ctx, m)
				},
				stop: func(context.Context) error {
					mu.Lock()
					defer mu.Unlock()
					for id, stop := range workers {
						close(stop)
						delete(workers, id)
					}
					return nil
				},
			}
		}),
	}
}

func sabFailureDetect() []Saboteur {
	desc := described(channel.Descriptor{Name: "crooked", Stateful: true, Provides: []string{channel.PropCheckedRemoval}})
	return []Saboteur{
		bent("believes the heartbeats", func() *crooked { return &crooked{desc: desc} }),
		bent("removes whom a message failed for", func() *crooked {
			return &crooked{desc: desc, send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				to := m.To[0]
				err := l.Send(ctx, m)
				if err != nil {
					_ = l.Announce(ctx, channel.MemberEvent{Kind: channel.MemberLost, Member: to, Err: err})
				}
				return err
			}}
		}),
		bent("removes nobody", func() *crooked {
			return &crooked{desc: desc, member: func(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
				if ev.Kind == channel.MemberLost || ev.Kind == channel.MemberSuspected {
					return nil
				}
				return l.Announce(ctx, ev)
			}}
		}),
	}
}

// configured is a subject with a configuration of its own making.
type configured struct {
	Subject
	configure func(options []byte, origin string) error
	schema    []byte
}

func (c configured) Configure(options []byte, origin string) error {
	return c.configure(options, origin)
}
func (c configured) Schema() []byte { return c.schema }

func (c configured) Interceptor(t *T, s channel.Settings) (channel.Interceptor, error) {
	return c.Subject.(InterceptorSubject).Interceptor(t, s)
}

func sabConfig() []Saboteur {
	plain := bent("", func() *crooked { return &crooked{} })
	make := func(name, schema string, configure func(options []byte, origin string) error) Saboteur {
		return Saboteur{Name: name, New: func() Subject {
			c := configured{Subject: plain.New(), configure: configure}
			if schema != "" {
				c.schema = []byte(schema)
			}
			return c
		}}
	}
	strict := func(options []byte, origin string) error {
		var c struct{ Size int }
		return decoder(options, origin)(&c)
	}
	return []Saboteur{
		make("ignores unknown keys", "", func(options []byte, _ string) error { return nil }),
		make("does not say where", "", func(options []byte, _ string) error {
			if len(options) > 0 {
				return errors.New("bad options")
			}
			return nil
		}),
		make("has no valid defaults", "", func(options []byte, origin string) error {
			if len(options) == 0 {
				return errors.New("size is missing")
			}
			return strict(options, origin)
		}),
		make("accepts what its schema refuses", `{"type":"object","properties":{"size":{"type":"integer"}},"additionalProperties":false}`,
			func(options []byte, origin string) error {
				if bytes.Contains(options, []byte("no_such")) {
					return strict(options, origin)
				}
				return nil
			}),
		make("has a schema that accepts anything", `{"type":"object","properties":{"size":{"type":"integer"}}}`, strict),
	}
}

// twoFaced runs in two modes and behaves differently in them.
type twoFaced struct{ direct, bridged Subject }

func (s twoFaced) Describe() (Description, error) {
	d, err := s.direct.Describe()
	d.Modes = []core.PluginMode{core.Direct, core.Bridged}
	return d, err
}

func (s twoFaced) Interceptor(t *T, settings channel.Settings) (channel.Interceptor, error) {
	which := s.direct
	if t.Mode == core.Bridged {
		which = s.bridged
	}
	// Both run directly, so that nothing but the mistake differs.
	c := *t
	c.Mode = core.Direct
	return which.(InterceptorSubject).Interceptor(&c, settings)
}

func sabModeParity() []Saboteur {
	good := bent("", func() *crooked { return &crooked{} })
	differs := func(name string, bad func() *crooked) Saboteur {
		return Saboteur{Name: name, New: func() Subject { return twoFaced{good.New(), bent("", bad).New()} }}
	}
	return []Saboteur{
		differs("loses options when bridged", func() *crooked {
			return &crooked{receive: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				m.Options &= 0xff
				return l.Deliver(ctx, m)
			}}
		}),
		differs("loses the identity of errors when bridged", func() *crooked {
			return &crooked{send: func(ctx context.Context, l channel.Link, m *channel.Message) error {
				if err := l.Send(ctx, m); err != nil {
					return errors.New(err.Error())
				}
				return nil
			}}
		}),
	}
}

func unmarshal(data []byte, into any) error { return json.Unmarshal(data, into) }
