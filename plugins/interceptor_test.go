package plugins

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
)

const fakeFlag channel.Options = 0x10000

type layerConfig struct {
	Min int `yaml:"min"`
}

// The fake layers.
var fakeLayers = []core.InterceptorFactory{
	channel.FactoryOf("acme/flip", layerConfig{}, newFlip),
	channel.FactoryOf("acme/actor", layerConfig{}, newActor),
	channel.FactoryOf("acme/watch", layerConfig{}, newWatch),
	channel.FactoryOf("acme/brittle", layerConfig{}, newBrittle),
}

// newFlip returns a layer that reverses the bodies of at least Min bytes.
func newFlip(c layerConfig, _ channel.Settings) (channel.Interceptor, error) {
	d := channel.Descriptor{Name: "acme/flip", Flag: fakeFlag, Mutates: true, ReceiveInterest: &channel.Interest{Any: fakeFlag}}
	if c.Min > 0 {
		d.SendInterest = &channel.Interest{MinSize: c.Min}
	}
	return channel.Transform(d,
		func(m *channel.Message) error {
			switch {
			case len(m.Body) < c.Min:
				return nil
			case string(m.Body) == "refuse":
				return channel.ErrBadMessage
			case string(m.Body) == "die":
				panic("flip: told to die")
			case string(m.Body) == "sleep":
				time.Sleep(time.Hour)
			}
			slices.Reverse(m.Body)
			m.Options |= fakeFlag
			return nil
		},
		func(m *channel.Message) error {
			if m.Options.Has(fakeFlag) {
				slices.Reverse(m.Body)
				m.Options &^= fakeFlag
			}
			return nil
		}), nil
}

// actor is a layer whose handlers do what the body says.
type actor struct {
	s     channel.Settings
	link  channel.Link
	ticks int
	tasks sync.WaitGroup
}

func newActor(_ layerConfig, s channel.Settings) (channel.Interceptor, error) {
	return &actor{s: s}, nil
}

func (a *actor) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "acme/actor"} }
func (a *actor) Start(_ context.Context, l channel.Link) error {
	a.link = l
	return nil
}
func (a *actor) Stop(context.Context) error {
	a.tasks.Wait()
	return nil
}

// done is a completion of the layer's own.
type doneFunc func(*channel.Message, error)

func (f doneFunc) Complete(m *channel.Message, err error) { f(m, err) }

func (a *actor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	switch cmd, arg, _ := strings.Cut(string(m.Body), ":"); cmd {
	case "drop":
		if m.Done != nil {
			m.Done.Complete(m, nil)
		}
		return nil
	case "error":
		return fmt.Errorf("actor: %s: %w", arg, channel.ErrTooLarge)
	case "fault":
		return channel.Failed(m.To[:1], channel.ErrAckTimeout)
	case "late": // passes on, and then fails
		if err := l.Send(ctx, m); err != nil {
			return err
		}
		return channel.ErrNotMember
	case "twice": // a message of its own first, and waits for its result
		c := *m
		c.Done, c.Body = nil, []byte("extra")
		c.To = slices.Clone(m.To)
		if err := l.Send(ctx, &c); err != nil {
			return fmt.Errorf("extra: %w", err)
		}
	case "wrap": // looks at the result
		if inner := m.Done; inner != nil {
			m.Done = doneFunc(func(m *channel.Message, err error) {
				m.Done = inner
				if err != nil {
					err = fmt.Errorf("wrapped: %w", err)
				}
				inner.Complete(m, err)
			})
		}
	case "early": // passes on, and tells the end while it is still below
		done := m.Done
		m.Done = doneFunc(func(*channel.Message, error) {})
		err := l.Send(ctx, m)
		if err == nil {
			done.Complete(m, nil)
		}
		return err
	case "keep": // is sent later, by a copy
		c := *m
		c.Body, c.To = []byte("kept"), slices.Clone(m.To)
		if m.Done == nil {
			return l.Send(ctx, m)
		}
		c.Done = doneFunc(func(_ *channel.Message, err error) { m.Done.Complete(m, err) })
		a.tasks.Go(func() {
			time.Sleep(time.Millisecond)
			if err := a.link.Send(context.Background(), &c); err != nil {
				m.Done.Complete(m, err)
			}
		})
		return nil
	case "members":
		m.Body = fmt.Append(nil, len(l.View().Members), " ", l.Local().ID == m.From.ID)
	}
	return l.Send(ctx, m)
}

func (a *actor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	switch cmd, arg, _ := strings.Cut(string(m.Body), ":"); cmd {
	case "drop":
		return nil
	case "error":
		return fmt.Errorf("actor: %s: %w", arg, channel.ErrNotMember)
	case "late":
		if err := l.Deliver(ctx, m); err != nil {
			return err
		}
		return channel.ErrNotMember
	case "copy": // waits for the listener
		c := *m
		c.Later = nil
		c.Body = append([]byte("copied "), m.Body...)
		return l.Deliver(ctx, &c)
	case "defer":
		end := m.Defer()
		c := *m
		c.Later, c.Body = nil, []byte("deferred")
		a.tasks.Go(func() {
			time.Sleep(time.Millisecond)
			end(a.link.Deliver(context.Background(), &c))
		})
		return errors.New("actor: nobody hears this")
	}
	return l.Deliver(ctx, m)
}

func (a *actor) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	if ev.Kind == channel.MemberLost {
		return nil // vetoed
	}
	ev.Member.Domain = fmt.Sprint("sees ", len(l.View().Members))
	return l.Announce(ctx, ev)
}

func (a *actor) HandleTick(ctx context.Context, l channel.Link, now time.Time) error {
	a.ticks++
	return l.Deliver(ctx, &channel.Message{From: l.Local(), Options: channel.ByteMessage, Body: fmt.Append(nil, "tick ", a.ticks, " ", now.IsZero())})
}

func (a *actor) FilterView(v channel.View) channel.View {
	v.Members = slices.DeleteFunc(slices.Clone(v.Members), func(m channel.Member) bool { return m.ID[1] == 3 })
	return v
}

// newWatch returns an observer that holds up everything.
func newWatch(layerConfig, channel.Settings) (channel.Interceptor, error) {
	return channel.Transform(channel.Descriptor{Name: "acme/watch", Observer: true},
		func(m *channel.Message) error {
			if string(m.Body) == "sleep" {
				time.Sleep(100 * time.Millisecond)
			}
			return nil
		}, nil), nil
}

// embedPlugin returns a channel with one plugin as its only layer.
func embedPlugin(t testing.TB, h *Host, m *channel.Metrics, spec core.PluginSpec) *channeltest.Embedded {
	t.Helper()
	l, err := h.Interceptor(spec, testSettings(t, m))
	if err != nil {
		t.Fatal(err)
	}
	nack := channel.Transform(channel.Descriptor{Name: "nack"}, nil, func(m *channel.Message) error {
		if string(m.Body) == "nack" {
			return channel.ErrQueueFull
		}
		return nil
	})
	return channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{nack, l}})
}

// sendResults collects what completions are told.
type sendResults struct{ ch chan error }

func (r sendResults) Complete(_ *channel.Message, err error) { r.ch <- err }

// waitBodies waits until r has noted n messages.
func waitBodies(t testing.TB, r *channeltest.Recorder, n int) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if !r.WaitFor(ctx, func() bool { return len(r.Messages()) >= n }) {
		t.Fatalf("only %d of %d messages came: %q", len(r.Messages()), n, r.Bodies())
	}
	return r.Bodies()
}

var to = []channel.Member{channeltest.Member(1), channeltest.Member(2)}

func TestTransformInAllModes(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			h, metrics := newTestHost(t, nil)
			e := embedPlugin(t, h, metrics, core.PluginSpec{Name: "acme/flip", Mode: mode, Options: []byte("min: 4")})
			ctx := t.Context()
			if err := e.Send(ctx, to, []byte("abcdef"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
			m := e.Bottom.Messages()[0]
			if string(m.Body) != "fedcba" || m.Options != channel.SendAck|fakeFlag || len(m.To) != 2 {
				t.Errorf("sent %q with %v to %d", m.Body, m.Options, len(m.To))
			}
			err := e.Send(ctx, to, []byte("refuse"), channel.SendAck)
			var se *channel.SendError
			if !errors.Is(err, channel.ErrBadMessage) || !errors.As(err, &se) || len(se.Faults) != 2 || se.Faults[1].Member.ID != to[1].ID {
				t.Errorf("refused with %v", err)
			}
			// Uninteresting ones keep their place behind those that are not.
			r := sendResults{make(chan error, 1000)}
			for n := range 500 {
				body := fmt.Sprint(n, "-long enough")
				if n%3 == 0 {
					body = fmt.Sprint(n)
				}
				if err := e.SendDone(ctx, to[:1], []byte(body), channel.SendAck, r); err != nil {
					t.Fatal(err)
				}
			}
			for range 500 {
				if err := receive(t, r.ch); err != nil {
					t.Fatal(err)
				}
			}
			for n, m := range e.Bottom.Messages()[1:] {
				if m.Options.Has(fakeFlag) {
					slices.Reverse(m.Body)
				}
				if got, _, _ := strings.Cut(string(m.Body), "-"); got != fmt.Sprint(n) {
					t.Fatalf("message %d is %q", n, m.Body)
				}
			}
			for n := range 100 {
				o, body := channel.SendNone|fakeFlag, []byte(fmt.Sprint(n, " up"))
				if n%3 == 0 {
					o = channel.SendNone
				} else {
					slices.Reverse(body)
				}
				if err := e.ReceiveBody(to[0], o, string(body)); err != nil {
					t.Fatal(err)
				}
			}
			for n, got := range waitBodies(t, e.Top, 100) {
				if got != fmt.Sprint(n, " up") {
					t.Fatalf("received %q as number %d", got, n)
				}
			}
			if o := e.Top.Messages()[1].Options; o != channel.SendNone {
				t.Errorf("received with %v", o)
			}
		})
	}
}

func TestActorInAllModes(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			h, metrics := newTestHost(t, nil)
			e := embedPlugin(t, h, metrics, core.PluginSpec{Name: "acme/actor", Mode: mode})
			testActor(t, e)
		})
	}
}

func testActor(t *testing.T, e *channeltest.Embedded) {
	ctx := t.Context()
	fault := channel.Failed(to[1:], channel.ErrAckTimeout)
	for _, c := range []struct {
		body   string
		below  error
		want   []string // bodies at the bottom
		is     error
		faulty int
		async  string // what is different without waiting
	}{
		{body: "plain", want: []string{"plain"}},
		{body: "plain", below: fault, want: []string{"plain"}, is: channel.ErrAckTimeout, faulty: 1},
		{body: "drop"},
		{body: "error:x", is: channel.ErrTooLarge, faulty: -1},
		{body: "fault", is: channel.ErrAckTimeout, faulty: 1},
		{body: "late", want: []string{"late"}, is: channel.ErrNotMember, faulty: -1},
		{body: "twice", want: []string{"extra", "twice"}},
		{body: "wrap", want: []string{"wrap"}},
		{body: "wrap", below: fault, want: []string{"wrap"}, is: channel.ErrAckTimeout, faulty: 1},
		{body: "keep", want: []string{"keep"}, async: "kept"},
		{body: "members", want: []string{"0 true"}},
	} {
		for _, async := range []bool{false, true} {
			before := len(e.Bottom.Messages())
			e.OnSend(func(context.Context, *channel.Message) error { return c.below })
			var err error
			if async {
				r := sendResults{make(chan error, 1)}
				if err = e.SendDone(ctx, to, []byte(c.body), channel.SendAck, r); err == nil {
					err = receive(t, r.ch)
				}
			} else {
				err = e.Send(ctx, to, []byte(c.body), channel.SendAck)
			}
			name := fmt.Sprintf("%s, below %v, async %v", c.body, c.below, async)
			var se *channel.SendError
			errors.As(err, &se)
			switch {
			case c.body == "late" && async && err == nil: // it had been sent already
			case !errors.Is(err, c.is) || c.is == nil && err != nil:
				t.Errorf("%s: ended with %v, want %v", name, err, c.is)
			case c.faulty > 0 && (se == nil || len(se.Faults) != c.faulty):
				t.Errorf("%s: faults %v", name, se)
			}
			want := slices.Clone(c.want)
			if async && c.async != "" {
				want = []string{c.async}
			}
			if got := e.Bottom.Bodies()[before:]; !slices.Equal(got, want) {
				t.Errorf("%s: sent %q, want %q", name, got, want)
			}
		}
	}
	e.OnSend(nil)

	for _, c := range []struct {
		body, want string
		is         error
	}{
		{"plain", "plain", nil}, {"drop", "", nil}, {"error:x", "", channel.ErrNotMember}, {"late", "late", channel.ErrNotMember},
		{"copy", "copied copy", nil}, {"defer", "deferred", nil}, {"nack", "", channel.ErrQueueFull},
	} {
		before := len(e.Top.Messages())
		later := &laterRecorder{ch: make(chan error, 1)}
		m := channel.Message{ID: channel.NewUniqueID(), From: to[0], Options: channel.SendSyncAck, Body: []byte(c.body), Later: later}
		err := e.Receive(ctx, &m)
		if later.deferred {
			err = receive(t, later.ch)
		}
		if !errors.Is(err, c.is) || c.is == nil && err != nil {
			t.Errorf("received %s: ended with %v, want %v", c.body, err, c.is)
		}
		if got := strings.Join(e.Top.Bodies()[before:], ","); got != c.want {
			t.Errorf("received %s: delivered %q, want %q", c.body, got, c.want)
		}
	}

	e.Observe(channel.MemberAdded, to[0])
	waitView(t, e, 1)
	if m := e.View().Members[0]; m.Domain != "sees 1" {
		t.Errorf("announced as %q", m.Domain)
	}
	e.Observe(channel.MemberLost, to[0])
	e.Observe(channel.MemberAdded, channeltest.Member(3)) // hidden by the filter
	e.Observe(channel.MemberAdded, to[1])
	waitView(t, e, 2)
}

// A message that has been passed on belongs to the layers below until they end
// it: its body stays, and nobody is told of an end, whatever the plugin says.
func TestPassedOnMessageIsLeftAlone(t *testing.T) {
	const n = 50
	for _, mode := range modes[1:] { // a layer inside of the node could break this rule
		t.Run(string(mode), func(t *testing.T) {
			h, metrics := newTestHost(t, nil)
			e := embedPlugin(t, h, metrics, core.PluginSpec{Name: "acme/actor", Mode: mode})
			reached := make(chan *channel.Message, 2*n)
			e.OnSend(func(_ context.Context, m *channel.Message) error {
				reached <- m
				return nil
			})
			var below []*channel.Message
			e.Hold()
			r := sendResults{make(chan error, 2*n)}
			for i := range n {
				for _, cmd := range []string{"early", "plain"} {
					if err := e.SendDone(t.Context(), to, fmt.Append(nil, cmd, ":", i), channel.SendAck, r); err != nil {
						t.Fatal(err)
					}
					below = append(below, receive(t, reached)) // one by one: what was used for one may be used again
				}
			}
			if len(r.ch) > 0 {
				t.Errorf("%d ends are told, and nothing has ended", len(r.ch))
			}
			for i, m := range below {
				if want := fmt.Sprint([]string{"early", "plain"}[i%2], ":", i/2); string(m.Body) != want {
					t.Errorf("message %d is %q now, was %q", i, m.Body, want)
				}
			}
			e.Finish(nil)
			for range 2 * n {
				if err := receive(t, r.ch); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// refuser is a layer that takes over the end of a message, and refuses it.
type refuser struct{ told int }

func (*refuser) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "refuser"} }

func (r *refuser) HandleSend(_ context.Context, _ channel.Link, m *channel.Message) error {
	m.Done = doneFunc(func(*channel.Message, error) { r.told++ })
	return channel.Failed(m.To, channel.ErrQueueFull)
}

// A layer below that has refused a message is not told of its end.
func TestRefusedBelow(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			h, metrics := newTestHost(t, nil)
			for _, name := range []string{"acme/flip", "acme/actor"} {
				l, err := h.Interceptor(core.PluginSpec{Name: name, Mode: mode}, testSettings(t, metrics))
				if err != nil {
					t.Fatal(err)
				}
				below := new(refuser)
				e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{l, below}})
				r := sendResults{make(chan error, 1)}
				if err = e.SendDone(t.Context(), to, []byte("plain"), channel.SendAck, r); err == nil {
					err = receive(t, r.ch)
				}
				if !errors.Is(err, channel.ErrQueueFull) || below.told > 0 {
					t.Errorf("%s: ended with %v; the layer that refused it was told %d times", name, err, below.told)
				}
			}
		})
	}
}

// laterRecorder is the receiver's end of a message.
type laterRecorder struct {
	deferred bool
	ch       chan error
}

func (l *laterRecorder) Defer() func(error) {
	l.deferred = true
	return func(err error) { l.ch <- err }
}

func waitView(t testing.TB, e *channeltest.Embedded, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if !e.Top.WaitFor(ctx, func() bool { return len(e.View().Members) == n }) {
		t.Fatalf("the view is %v", e.View())
	}
}
