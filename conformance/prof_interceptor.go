package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
)

func interceptorChecks() []Check {
	return []Check{
		{
			ID: "interceptor/describe-pure", Profile: ProfileInterceptor, Level: Must,
			Requirement: "Describing and making the layer twice gives the same answer and has no side effect; its option flag is one it may use.",
			Source:      "channel: Interceptor.Descriptor, Descriptor.Flag, NewStack; core: components have no effect before Start",
			Run:         checkDescribePure, Saboteurs: sabDescribePure(),
		},
		{
			ID: "interceptor/round-trip", Profile: ProfileInterceptor, Level: Must,
			Requirement: "A body of 0 bytes to 1 MiB that one instance sends arrives through another one with the same bytes, id, sender and unrelated options.",
			Source:      "channel: Interceptor, Descriptor.Mutates",
			Run:         checkRoundTrip, Saboteurs: sabRoundTrip(),
		},
		{
			ID: "interceptor/flag-clear", Profile: ProfileInterceptor, Level: Must, Features: []string{FeatureTransforming},
			Requirement: "A received message without the layer's option flag passes byte for byte.",
			Source:      "channel: Descriptor.Flag",
			Run:         checkFlagClear, Saboteurs: sabFlagClear(),
		},
		{
			ID: "interceptor/foreign-input", Profile: ProfileInterceptor, Level: Must,
			Requirement: "Messages of a stack without the layer, and random bytes, end in an error or pass as they are; nothing panics.",
			Source:      "channel: Decoder; design: nothing that fails decoding goes up",
			Run:         checkForeignInput, Saboteurs: sabForeignInput(),
		},
		{
			ID: "interceptor/forward-count", Profile: ProfileInterceptor, Level: Must,
			Requirement: "Every message is passed on exactly once in each direction; one that is dropped is counted.",
			Source:      "channel: Interceptor rule 3; design: every refused input increases exactly one counter",
			Run:         checkForwardCount, Saboteurs: sabForwardCount(),
		},
		{
			ID: "interceptor/error-transparent", Profile: ProfileInterceptor, Level: Must,
			Requirement: "The error from below reaches the sender with the members it names and their reasons, and the error from above reaches the wire.",
			Source:      "channel: SendHandler, ReceiveHandler, SendError",
			Run:         checkErrorTransparent, Saboteurs: sabErrorTransparent(),
		},
		{
			ID: "interceptor/ownership", Profile: ProfileInterceptor, Level: Must,
			Requirement: "The layer neither reads nor writes a message after handing it on or returning, and tells every completion exactly once.",
			Source:      "channel: Interceptor rule 1, Message, Message.Done",
			Run:         checkOwnership, Saboteurs: sabOwnership(),
		},
		{
			ID: "interceptor/quiet-after-stop", Profile: ProfileInterceptor, Level: Must,
			Requirement: "After Stop the layer makes no call on its Link, and its timers and goroutines are gone; Stop works twice and without Start.",
			Source:      "channel: Interceptor rule 4, Stopper",
			Run:         checkQuiet, Saboteurs: sabQuiet(),
		},
		{
			ID: "interceptor/concurrent", Profile: ProfileInterceptor, Level: Must,
			Requirement: "With 32 goroutines sending and receiving while members come and go, every message passes once and unmixed.",
			Source:      "channel: Interceptor rule 2",
			Run:         checkConcurrent, Saboteurs: sabConcurrent(),
		},
		{
			ID: "interceptor/cancel", Profile: ProfileInterceptor, Level: Must,
			Requirement: "A handler that waits for a layer below or above returns when its context ends.",
			Source:      "channel: SendHandler, ReceiveHandler",
			Run:         checkCancel, Saboteurs: sabCancel(),
		},
		{
			ID: "interceptor/view-filter-pure", Profile: ProfileInterceptor, Level: Must, Features: []string{FeatureFilteringView},
			Requirement: "The view filter gives the same view for the same input, changes no input, adds no member, and events agree with it.",
			Source:      "channel: ViewFilter, View",
			Run:         checkViewFilter, Saboteurs: sabViewFilter(),
		},
		{
			ID: "interceptor/bounded", Profile: ProfileInterceptor, Level: Must, Features: []string{FeatureStateful},
			Requirement: "What a layer keeps of 10,000 messages that nobody completes is released when it expires and its member has left.",
			Source:      "design: every queue respects its bound; memory returns to the baseline after any fault",
			Run:         checkBounded, Saboteurs: sabBounded(),
		},
		{
			ID: "interceptor/failure-detect", Profile: ProfileInterceptor, Level: Must, Features: []string{FeatureFailureDetecting},
			Requirement: "A dead member is removed once; a member that answers over TCP is kept, also when it refuses messages, is slow, or its heartbeats are lost.",
			Source:      "design: a member is removed only after its TCP check fails; channel.PropCheckedRemoval",
			Run:         checkFailureDetect, Saboteurs: sabFailureDetect(),
		},
		{
			ID: "interceptor/config", Profile: ProfileInterceptor, Level: Must,
			Requirement: "Without options there are valid defaults; an unknown key is refused with its place; the schema accepts what the decoder accepts.",
			Source:      "core/config: Decode, SchemaOf, CheckOptions",
			Run:         checkConfig, Saboteurs: sabConfig(),
		},
		{
			ID: "interceptor/mode-parity", Profile: ProfileInterceptor, Level: Must, Once: true,
			Requirement: "Direct, bridged and process runs give the same verdicts and the same verified event log.",
			Source:      "design: the same source runs compiled in, bridged and as a process",
			Run:         checkModeParity, Saboteurs: sabModeParity(),
		},
	}
}

// forbidden is a network that must not be used.
type forbidden struct {
	transport.Net
	used atomic.Int64
}

var errForbidden = errors.New("conformance: the network must not be used before Start")

func (f *forbidden) ListenPacket(string, string) (net.PacketConn, error) {
	f.used.Add(1)
	return nil, errForbidden
}

func (f *forbidden) ListenUDP(string, *net.UDPAddr) (transport.UDPConn, error) {
	f.used.Add(1)
	return nil, errForbidden
}

func (f *forbidden) ListenTCP(string, *net.TCPAddr) (transport.TCPListener, error) {
	f.used.Add(1)
	return nil, errForbidden
}

func (f *forbidden) Dial(string, string) (net.Conn, error) {
	f.used.Add(1)
	return nil, errForbidden
}

func (f *forbidden) DialUDP(string, *net.UDPAddr, *net.UDPAddr) (transport.UDPConn, error) {
	f.used.Add(1)
	return nil, errForbidden
}

func (f *forbidden) DialTCP(string, *net.TCPAddr, *net.TCPAddr) (transport.TCPConn, error) {
	f.used.Add(1)
	return nil, errForbidden
}

func checkDescribePure(t *T) {
	first, err := t.Subject.Describe()
	if err != nil {
		t.Fatalf("describe: %v", err)
	}
	second, err := t.Subject.Describe()
	if err != nil {
		t.Fatalf("describe for the second time: %v", err)
	}
	if !reflect.DeepEqual(first, second) {
		t.Errorf("described as %+v and then as %+v", first, second)
	}
	t.Place(func(t *T, n transport.Net) {
		f := &forbidden{Net: n}
		var descs []channel.Descriptor
		for range 2 {
			i, err := t.interceptor().Interceptor(t, withLogger(channel.Settings{Name: "subject", Net: f, Metrics: channel.NewMetrics()}))
			if err != nil {
				t.Fatalf("make: %v", err)
			}
			for range 3 {
				descs = append(descs, i.Descriptor())
			}
			provider := channel.Transform(channel.Descriptor{Name: "probe", Provides: descs[0].Requires}, func(*channel.Message) error { return nil }, nil)
			if _, err := channel.NewStack(channel.Layer{Interceptor: i}, channel.Layer{Interceptor: provider}); err != nil {
				t.Errorf("a stack with the layer alone is refused: %v", err)
			}
		}
		for _, d := range descs[1:] {
			if !reflect.DeepEqual(d, descs[0]) {
				t.Errorf("the descriptor is %+v and then %+v", descs[0], d)
			}
		}
		if d := descs[0]; d.Name != first.Name {
			t.Errorf("the layer is called %q, the subject %q", d.Name, first.Name)
		}
		if n := f.used.Load(); n > 0 {
			t.Errorf("the network was used %d times before Start", n)
		}
		// In virtual time the end of the bubble fails if a goroutine is left.
	})
}

// sizes are the bodies of round trips: edges of usual buffers and a few random
// ones.
func (t *T) sizes() []int {
	list := []int{0, 1, 2, 255, 256, 1023, 1024, 1025, 4096, 65535, 65536, 65537, 1 << 20}
	rng := t.Rand("sizes")
	for range 12 {
		list = append(list, rng.IntN(1<<(4+rng.IntN(15))))
	}
	return list
}

// body returns a body of n bytes, random or easy to compress.
func (t *T) body(word string, n int) []byte {
	rng := t.Rand(word)
	b := make([]byte, n)
	easy := rng.IntN(2) == 0
	for i := range b {
		if easy {
			b[i] = byte(i / 64)
		} else {
			b[i] = byte(rng.Uint32())
		}
	}
	return b
}

// eventually waits for what other goroutines do: a minute of virtual time, or
// the table's Event.
func (t *T) patience() time.Duration {
	if t.Virtual() {
		return time.Minute
	}
	return t.Timeouts.Event
}

func checkRoundTrip(t *T) {
	t.Place(func(t *T, n transport.Net) {
		p := t.pair(n, rigConfig{}, rigConfig{})
		var id atomic.Pointer[channel.UniqueID] // of the last message of the application
		p.a.above.onSend = func(ctx context.Context, l channel.Link, m *channel.Message) error {
			u := m.ID
			id.Store(&u)
			return l.Send(ctx, m)
		}
		count := 0
		for _, size := range t.sizes() {
			for i, o := range p.a.sendOptions() {
				if size > 65536 && i > 0 {
					continue // large ones once
				}
				body := t.body(fmt.Sprintf("%d/%d", size, i), size)
				if err := p.a.Channel.Send(t.Context(), []channel.Member{p.peerB}, body, o); err != nil {
					t.Fatalf("send %d bytes, options %v: %v", size, o, err)
				}
				count++
				t.Eventually(t.patience(), func() error {
					if got := len(p.b.received()); got < count {
						return fmt.Errorf("%d bytes, options %v: nothing was delivered", size, o)
					}
					return nil
				})
				t.compare(p, body, o, *id.Load())
			}
		}
		t.Settle()
		if got := len(p.b.received()); got != count {
			t.Errorf("%d messages sent, %d delivered", count, got)
		}
	})
}

// compare compares the last message that was delivered with what was sent.
func (t *T) compare(p *pair, body []byte, o channel.Options, id channel.UniqueID) {
	t.Helper()
	all := p.b.received()
	got := all[len(all)-1]
	own := p.a.desc.Flag
	switch {
	case !bytes.Equal(got.Body, body):
		t.Errorf("sent %s, options %v, arrived as %s", sum(body), o, sum(got.Body))
	case got.From != p.peerA:
		t.Errorf("the sender %v arrived as %v", p.peerA, got.From)
	case got.Options&^own != o&^own:
		t.Errorf("options %v arrived as %v (the layer's own flag %v aside)", o, got.Options, own)
	case got.ID != id:
		t.Errorf("the message %v arrived with the id %v", id, got.ID)
	}
	t.Event("%s %v", sum(got.Body), got.Options&^own)
}

func checkFlagClear(t *T) {
	t.Place(func(t *T, n transport.Net) {
		r := t.rig(n, rigConfig{})
		if r.desc.Flag == 0 {
			t.Skip("the layer changes every message and marks none")
		}
		from := channeltest.Member(1)
		r.join(from)
		for i, size := range t.sizes() {
			body := t.body(fmt.Sprint(size), size)
			if err := r.deliver(t.Context(), &channel.Message{
				ID: channel.NewUniqueID(), From: from, Options: channel.SendNone &^ r.desc.Flag, Time: time.Now().UnixMilli(), Body: slices.Clone(body),
			}); err != nil {
				t.Errorf("%d bytes without the flag are refused: %v", size, err)
				continue
			}
			if t.Virtual() {
				t.Settle()
			}
			got := r.received()
			if len(got) != i+1 {
				t.Fatalf("%d bytes without the flag: %d messages delivered, want %d", size, len(got), i+1)
			}
			if !bytes.Equal(got[i].Body, body) {
				t.Errorf("without the flag %s became %s", sum(body), sum(got[i].Body))
			}
			t.Event("%s", sum(got[i].Body))
		}
	})
}

func checkForeignInput(t *T) {
	t.Place(func(t *T, n transport.Net) {
		r := t.rig(n, rigConfig{})
		from := channeltest.Member(1)
		r.join(from)
		rng := t.Rand("foreign")
		for i := range 300 {
			size := rng.IntN(1 << rng.IntN(13))
			body := t.body(fmt.Sprint("foreign", i), size)
			o := channel.SendNone | channel.Options(rng.Uint32())&(channel.ThirdPartyMax-channel.ThirdPartyMin)
			marked := r.desc.Flag != 0 && i%2 == 0
			o &^= r.desc.Flag
			if marked {
				o |= r.desc.Flag
			}
			before := len(r.received())
			err := r.deliver(t.Context(), &channel.Message{
				ID: channel.NewUniqueID(), From: from, Options: o, Time: time.Now().UnixMilli(), Body: slices.Clone(body),
			})
			if t.Virtual() { // otherwise the end that deliver waits for must do
				t.Settle()
			}
			got := r.received()[before:]
			switch {
			case r.panics() > 0 || errors.Is(err, channel.ErrPanic):
				t.Fatalf("%d bytes with options %v make the layer panic: %v", size, o, err)
			case errors.Is(err, channel.ErrPluginDown):
				t.Fatalf("%d bytes with options %v kill the plugin: %v", size, o, err)
			case len(got) > 1:
				t.Fatalf("%d bytes with options %v were delivered %d times", size, o, len(got))
			case len(got) == 1 && err != nil:
				t.Errorf("%d bytes with options %v were delivered although they failed: %v", size, o, err)
			case len(got) == 1 && !bytes.Equal(got[0].Body, body) && !marked && (r.desc.Flag != 0 || !r.desc.Mutates):
				t.Fatalf("without the layer's flag %s became %s", sum(body), sum(got[0].Body))
			}
		}
	})
}

func checkForwardCount(t *T) {
	const count = 200
	t.Place(func(t *T, n transport.Net) {
		p := t.pair(n, rigConfig{}, rigConfig{})
		options := p.a.sendOptions()
		for i := range count {
			o := options[i%len(options)]
			if err := p.a.Channel.Send(t.Context(), []channel.Member{p.peerB}, t.body(fmt.Sprint(i), 1+i), o); err != nil {
				t.Fatalf("send: %v", err)
			}
		}
		t.Eventually(t.patience(), func() error {
			if got := int(p.a.below.sends.Load()) + p.a.drops(); got < count {
				return fmt.Errorf("of %d messages sent, %d reached the layer below or were counted as dropped", count, got)
			}
			return nil
		})
		t.Settle()
		if got := p.a.below.sends.Load(); got > count {
			t.Errorf("%d messages were sent, the layer below got %d", count, got)
		}
		reached := int(p.b.below.receives.Load())
		t.Eventually(t.patience(), func() error {
			if got := int(p.b.above.receives.Load()) + p.b.drops(); got < reached {
				return fmt.Errorf("of %d messages received, %d reached the layer above or were counted as dropped", reached, got)
			}
			return nil
		})
		t.Settle()
		if got := int(p.b.above.receives.Load()); got > reached {
			t.Errorf("%d messages were received, the layer above got %d", reached, got)
		}
		t.Event("%d down, %d up", p.a.below.sends.Load(), p.b.above.receives.Load())
	})
}

func checkErrorTransparent(t *T) {
	t.Place(func(t *T, n transport.Net) {
		r := t.rig(n, rigConfig{})
		to := []channel.Member{channeltest.Member(1), channeltest.Member(2), channeltest.Member(3)}
		r.join(to...)
		for _, cause := range []error{channel.ErrNegativeAck, channel.ErrTooLarge, channel.ErrQueueFull} {
			r.OnSend(func(_ context.Context, m *channel.Message) error { return channel.Failed(to[1:2], cause) })
			t.wantFault("Send", r.Channel.Send(t.Context(), to, []byte("x"), channel.SendAck), to[1], cause)
			done := make(completion, 2)
			if err := r.SendDone(t.Context(), to, []byte("x"), channel.SendAck, done); err != nil {
				t.wantFault("SendDone", err, to[1], cause)
			} else {
				t.wantFault("the completion", t.await(done), to[1], cause)
			}
		}
		r.OnSend(nil)
		for _, cause := range []error{channel.ErrNotMember, channel.ErrBadMessage} {
			r.Top.Reply = func(*channel.Message) (bool, error) { return false, cause }
			p := t.encoded(r, to[0], []byte("refused"))
			if err := r.deliver(t.Context(), p); !errors.Is(err, cause) {
				t.Errorf("the application failed with %v, the wire was told %v", cause, err)
			}
		}
	})
}

// encoded is a message with the body as another instance of the subject puts it
// on the wire.
func (t *T) encoded(r *rig, from channel.Member, body []byte) *channel.Message {
	t.Helper()
	if r.other == nil {
		r.other = t.rig(r.net, rigConfig{local: from})
		r.other.join(r.self)
	}
	before := len(r.other.Bottom.Messages())
	if err := r.other.Channel.Send(t.Context(), []channel.Member{r.self}, body, channel.SendAck); err != nil {
		t.Fatalf("send: %v", err)
	}
	m := r.other.Bottom.Messages()[before]
	m.From, m.To = from, nil
	return &m
}

// completion is told the result of a message.
type completion chan error

func (c completion) Complete(_ *channel.Message, err error) {
	select {
	case c <- err:
	default: // more often than there is room for: the check looks at the number
	}
}

func (t *T) await(c completion) error {
	t.Helper()
	timer := time.NewTimer(t.patience())
	defer timer.Stop()
	select {
	case err := <-c:
		return err
	case <-timer.C:
		t.Fatalf("the completion was never told")
		return nil
	}
}

func (t *T) wantFault(what string, err error, m channel.Member, cause error) {
	t.Helper()
	var se *channel.SendError
	switch {
	case !errors.As(err, &se):
		t.Errorf("%s: the error names no member: %v; below it was a SendError with %v for %v", what, err, cause, m)
	case len(se.Faults) != 1 || se.Faults[0].Member != m:
		t.Errorf("%s: the faulty members are %v, want %v alone", what, se.Faults, m)
	case !errors.Is(err, cause):
		t.Errorf("%s: the error is %v, which is not %v any more", what, err, cause)
	}
}

// poison is written over what the subject must not look at any more.
const poison = 0xdb

// spoil takes a message over: it returns a copy and overwrites the original.
func spoil(m *channel.Message) *channel.Message {
	c := channeltest.Clone(m)
	done := m.Done
	for i := range m.Body {
		m.Body[i] = poison
	}
	*m = channel.Message{Options: 0xdbdbdbdb, Time: poison, Body: m.Body, To: nil}
	c.Done = done
	return &c
}

func spoilt(m *channel.Message) bool {
	return m.Options == 0xdbdbdbdb && m.Time == poison && m.ID.IsZero() && len(m.To) == 0 &&
		!slices.ContainsFunc(m.Body, func(b byte) bool { return b != poison })
}

func checkOwnership(t *T) {
	t.Place(func(t *T, n transport.Net) {
		// What the check itself has made nobody else may reuse, so that it can
		// be looked at after the subject has handed it on.
		var mu sync.Mutex
		own := map[any]bool{}
		var handed []*channel.Message
		var bodies [][]byte
		mine := func(m *channel.Message, body []byte) {
			mu.Lock()
			defer mu.Unlock()
			if m != nil {
				own[m] = true
			}
			own[&body[0]] = true
		}
		keep := func(m *channel.Message) *channel.Message {
			c := spoil(m)
			mu.Lock()
			defer mu.Unlock()
			if own[m] {
				handed = append(handed, m)
			}
			if own[&m.Body[0]] {
				bodies = append(bodies, m.Body)
			}
			return c
		}
		p := t.pair(n, rigConfig{onSend: func(ctx context.Context, l channel.Link, m *channel.Message) error {
			return l.Send(ctx, keep(m))
		}}, rigConfig{})
		p.fed = mine
		p.b.above.onReceive = func(ctx context.Context, l channel.Link, m *channel.Message) error {
			return l.Deliver(ctx, keep(m))
		}
		const count = 100
		var sent []string
		told := make(completion, 2*count)
		for i := range count {
			body := t.body(fmt.Sprint("own", i), 1+i*7)
			sent = append(sent, string(body))
			var err error
			mine(nil, body)
			if i%2 == 0 {
				err = p.a.Channel.Send(t.Context(), []channel.Member{p.peerB}, body, channel.SendAck)
			} else {
				err = p.a.SendDone(t.Context(), []channel.Member{p.peerB}, body, channel.SendAck, told)
			}
			if err != nil {
				t.Fatalf("send: %v", err)
			}
		}
		t.Eventually(t.patience(), func() error {
			if got := len(p.b.received()); got < count {
				return fmt.Errorf("%d of %d messages were delivered", got, count)
			}
			if len(told) < count/2 {
				return fmt.Errorf("%d of %d completions were told", len(told), count/2)
			}
			return nil
		})
		if t.Virtual() {
			time.Sleep(time.Minute) // ticks
		}
		t.Settle()
		got := p.b.Top.Bodies()
		slices.Sort(got)
		slices.Sort(sent)
		if !slices.Equal(got, sent) {
			t.Errorf("messages were passed on that had been handed on before: %d sent, %d delivered, %d of them not as sent",
				count, len(got), different(got, sent))
		}
		if len(told) != count/2 {
			t.Errorf("%d messages with completions, %d completions told", count/2, len(told))
		}
		mu.Lock()
		defer mu.Unlock()
		for i, m := range handed {
			if !spoilt(m) {
				t.Errorf("message %d was written to after it had been handed on", i)
				break
			}
		}
		for i, b := range bodies {
			if slices.ContainsFunc(b, func(b byte) bool { return b != poison }) {
				t.Errorf("body %d was written to after it had been handed on", i)
				break
			}
		}
	})
}

func different(got, want []string) (n int) {
	for _, g := range got {
		if !slices.Contains(want, g) {
			n++
		}
	}
	return n
}

func checkQuiet(t *T) {
	t.Place(func(t *T, n transport.Net) {
		unstarted, err := t.interceptor().Interceptor(t, withLogger(channel.Settings{Name: "subject", Net: n, Metrics: channel.NewMetrics()}))
		if err != nil {
			t.Fatalf("make: %v", err)
		}
		if s, ok := unstarted.(channel.Stopper); ok {
			for range 2 {
				t.within("Stop without Start", func() error { return s.Stop(context.Background()) })
			}
		}
		r := t.rig(n, rigConfig{manual: true, tick: 100 * time.Millisecond})
		if err := r.Start(t.Context()); err != nil {
			t.Fatalf("start: %v", err)
		}
		a, b := channeltest.Member(1), channeltest.Member(2)
		r.join(a, b)
		r.Hold()
		told := make(completion, 40)
		for i := range 20 {
			_ = r.ReceiveBody(a, channel.SendNone|r.desc.Flag, fmt.Sprint("up ", i))
			_ = r.SendDone(t.Context(), []channel.Member{a}, []byte("down"), channel.SendAck|r.userFlag(), told)
		}
		r.Observe(channel.MemberLost, b)
		if t.Virtual() {
			time.Sleep(time.Second)
		}
		t.Settle()
		r.Finish(nil)
		t.within("Stop", func() error { return r.Stop(context.Background()) })
		if s, ok := r.layer.(channel.Stopper); ok {
			t.within("Stop for the second time", func() error { return s.Stop(context.Background()) })
		}
		above, below := r.above.calls(), r.below.calls()
		if t.Virtual() {
			time.Sleep(time.Hour)
		}
		t.Settle()
		if n := r.above.calls() - above; n > 0 {
			t.Errorf("%d calls upward after Stop", n)
		}
		if n := r.below.calls() - below; n > 0 {
			t.Errorf("%d calls downward after Stop", n)
		}
		if len(told) > 20 {
			t.Errorf("%d completions for 20 messages", len(told))
		}
	})
}

// within runs f and fails if it does not return in time or returns an error.
func (t *T) within(what string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	timer := time.NewTimer(max(t.patience(), t.Timeouts.Stop))
	defer timer.Stop()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	case <-timer.C:
		t.Fatalf("%s has not returned", what)
	}
}

func checkConcurrent(t *T) {
	const workers, each = 32, 30
	t.Place(func(t *T, n transport.Net) {
		p := t.pair(n, rigConfig{}, rigConfig{})
		options := p.a.sendOptions()
		var wg sync.WaitGroup
		var failed atomic.Int64
		stop := make(chan struct{})
		var churn sync.WaitGroup
		churn.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				m := channeltest.Member(10 + i%5)
				p.a.Observe(channel.MemberAdded, m)
				p.b.Observe(channel.MemberAdded, m)
				p.a.Observe(channel.MemberLeft, m)
				p.b.Observe(channel.MemberLeft, m)
				time.Sleep(time.Millisecond)
			}
		})
		for w := range workers {
			wg.Go(func() {
				for i := range each {
					body := []byte(strings.Repeat(fmt.Sprintf("<%d-%d>", w, i), 1+(w+i)%9))
					if err := p.a.Channel.Send(t.Context(), []channel.Member{p.peerB}, body, options[i%len(options)]); err != nil {
						failed.Add(1)
					}
					runtime.Gosched()
				}
			})
		}
		wg.Wait()
		close(stop)
		churn.Wait()
		if n := failed.Load(); n > 0 {
			t.Errorf("%d of %d sends failed", n, workers*each)
		}
		t.Eventually(t.patience(), func() error {
			if got := len(p.b.received()); got < workers*each {
				return fmt.Errorf("%d of %d messages delivered", got, workers*each)
			}
			return nil
		})
		t.Settle()
		seen := map[string]bool{}
		for _, body := range p.b.Top.Bodies() {
			word, _, _ := strings.Cut(body, ">")
			word += ">"
			if strings.Repeat(word, len(body)/len(word)) != body {
				t.Fatalf("a body arrived mixed up: %.60q", body)
			}
			if seen[word] {
				t.Fatalf("the message %s was delivered twice", word)
			}
			seen[word] = true
		}
		if len(seen) != workers*each {
			t.Errorf("%d different messages delivered, want %d", len(seen), workers*each)
		}
	})
}

func checkCancel(t *T) {
	const budget = time.Second
	t.Place(func(t *T, n transport.Net) {
		r := t.rig(n, rigConfig{})
		m := channeltest.Member(1)
		r.join(m)
		gate := make(chan struct{})
		release := sync.OnceFunc(func() { close(gate) })
		defer release()
		wait := func(ctx context.Context) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-gate:
				return nil
			}
		}
		returns := func(what string, f func(ctx context.Context)) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			done := make(chan struct{})
			go func() {
				defer close(done)
				f(ctx)
			}()
			timer := time.NewTimer(budget)
			defer timer.Stop()
			select {
			case <-done:
			case <-timer.C:
				t.Errorf("%s has not returned %v after its context ended", what, budget)
				release()
				<-done
			}
		}
		incoming := t.encoded(r, m, []byte("up"))
		r.OnSend(func(ctx context.Context, m *channel.Message) error {
			if err := wait(ctx); err != nil {
				return channel.Failed(m.To, err)
			}
			return nil
		})
		returns("Send", func(ctx context.Context) {
			_ = r.Channel.Send(ctx, []channel.Member{m}, []byte("down"), channel.SendAck)
		})
		r.above.onReceive = func(ctx context.Context, _ channel.Link, _ *channel.Message) error { return wait(ctx) }
		returns("Receive", func(ctx context.Context) { _ = r.Embedded.Receive(ctx, incoming) })
	})
}

func checkViewFilter(t *T) {
	t.Place(func(t *T, n transport.Net) {
		r := t.rig(n, rigConfig{})
		f, ok := r.layer.(channel.ViewFilter)
		if !ok {
			t.Skip("the layer is no channel.ViewFilter in this mode")
		}
		var ms []channel.Member
		for i := range 8 {
			ms = append(ms, channeltest.Member(i+1))
		}
		in := channel.NewView(7, channeltest.Member(100), slices.Clone(ms))
		before := slices.Clone(in.Members)
		first := f.FilterView(in)
		for range 20 {
			if again := f.FilterView(in); !slices.Equal(again.Members, first.Members) {
				t.Fatalf("the same view is filtered to %v and then to %v", first.Members, again.Members)
			}
		}
		if !slices.Equal(in.Members, before) {
			t.Errorf("the filter has changed its input")
		}
		for _, m := range first.Members {
			if !in.Has(m) {
				t.Errorf("the filter adds the member %v", m)
			}
		}
		for i, m := range ms {
			r.Observe(channel.MemberAdded, m)
			if i%3 == 2 {
				r.Observe(channel.MemberLeft, m)
			}
		}
		time.Sleep(2 * time.Second)
		t.Settle()
		t.consistent(r.Top.Views())
	})
}

// consistent checks that every view follows from the one before by its event.
func (t *T) consistent(views []channeltest.ViewChange) {
	t.Helper()
	have := map[channel.UniqueID]bool{}
	for i, v := range views {
		if i == 0 {
			for _, m := range v.View.Members {
				have[m.ID] = true
			}
		}
		switch v.Event.Kind {
		case channel.MemberAdded:
			have[v.Event.Member.ID] = true
		case channel.MemberLost, channel.MemberLeft:
			delete(have, v.Event.Member.ID)
		}
		if len(have) != len(v.View.Members) {
			t.Errorf("after the event %v %v there are %d members in the view, and %d by the events", v.Event.Kind, v.Event.Member, len(v.View.Members), len(have))
			return
		}
		for _, m := range v.View.Members {
			if !have[m.ID] {
				t.Errorf("%v is in the view, and no event has said so", m)
			}
		}
	}
}

// heldBytes is what may be left of 10,000 messages of 1 KiB.
const heldBytes = 4 << 20

func checkBounded(t *T) {
	if !t.Virtual() {
		t.Skip("the memory of another process is not looked at")
	}
	t.Place(func(t *T, n transport.Net) {
		r := t.rig(n, rigConfig{discard: true})
		r.join(channeltest.Member(1))
		// What is there after the first round are buffers and caches: a second
		// one, with other members, must not add to it.
		r.orphans(2)
		before, goroutines := heap(), runtime.NumGoroutine()
		r.orphans(2 + orphanSenders)
		if held := heap() - before; held > heldBytes {
			t.Errorf("an hour after the last of %d members left, %d KiB more are held than before they came", orphanSenders, held>>10)
		}
		if left := runtime.NumGoroutine() - goroutines; left > 50 {
			t.Errorf("an hour after the last of %d members left, there are %d goroutines more than before they came", orphanSenders, left)
		}
		runtime.KeepAlive(r)
	})
}

// orphanSenders is how many members begin something and are never heard of
// again.
const orphanSenders = 5000

// orphans sends and receives 10,000 messages that nobody completes, to and from
// members from the first one on, which then leave; and waits for an hour.
func (r *rig) orphans(first int) {
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	r.Hold()
	body := bytes.Repeat([]byte("orphan  "), 128)
	for i := range 2 * orphanSenders {
		m := channeltest.Member(first + i%orphanSenders)
		if i%100 == 0 {
			r.Observe(channel.MemberAdded, m)
		}
		_ = r.Channel.Send(ctx, []channel.Member{m}, body, channel.ByteMessage|r.userFlag())
		_ = r.Embedded.Receive(ctx, &channel.Message{
			ID: channel.NewUniqueID(), From: m, Options: channel.SendNone | r.desc.Flag, Time: time.Now().UnixMilli(), Body: slices.Clone(body),
		})
		if i%100 == 0 {
			r.Observe(channel.MemberSuspected, m)
		}
	}
	r.Finish(channel.ErrDisconnected)
	for i := range orphanSenders {
		r.Observe(channel.MemberLeft, channeltest.Member(first+i))
	}
	time.Sleep(time.Hour)
	r.t.Settle()
}

// heap returns the bytes that live on the heap.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}

func checkConfig(t *T) {
	c, ok := t.Subject.(Configurable)
	if !ok {
		t.Skip("the subject has no configuration")
	}
	if err := c.Configure(nil, "node.yaml:7"); err != nil {
		t.Errorf("without options: %v", err)
	}
	const odd = "no_such_option_x"
	err := c.Configure([]byte("{"+odd+": 1}"), "node.yaml:7")
	if err == nil {
		t.Errorf("the unknown option %q is accepted", odd)
	} else if !strings.Contains(err.Error(), odd) || !strings.Contains(err.Error(), "node.yaml:7") {
		t.Errorf("the unknown option %q at node.yaml:7 is refused without its name and place: %v", odd, err)
	}
	schema := c.Schema()
	if schema == nil {
		return
	}
	if err := config.CheckSchema(schema); err != nil {
		t.Fatalf("the schema: %v", err)
	}
	if config.CheckOptions([]byte("{"+odd+": 1}"), "node.yaml:7", schema) == nil {
		t.Errorf("the schema accepts the unknown option %q", odd)
	}
	t.sameVerdict(c, schema, nil)
	for _, name := range properties(schema) {
		for _, value := range []string{`[[1]]`, `{a: b}`, `"\u0000?"`, `-1e300`} {
			t.sameVerdict(c, schema, []byte("{"+name+": "+value+"}"))
		}
	}
}

// sameVerdict checks that what the schema refuses is refused by the subject.
// The subject may refuse more: a schema cannot say everything.
func (t *T) sameVerdict(c Configurable, schema, options []byte) {
	t.Helper()
	bySchema, bySubject := config.CheckOptions(options, "node.yaml:7", schema), c.Configure(options, "node.yaml:7")
	if bySchema != nil && bySubject == nil {
		t.Errorf("options %s: the schema says %v, the subject accepts them", options, bySchema)
	}
}

func checkModeParity(t *T) {
	d, err := t.Subject.Describe()
	if err != nil {
		t.Fatalf("describe: %v", err)
	}
	modes := d.modes()
	if _, program := t.Subject.(*Program); program {
		// A program has one mode, but two ways to be talked to.
		stream := *t
		stream.Stream = true
		if a, b := parityLog(t), parityLog(&stream); !slices.Equal(a, b) {
			t.Errorf("the same script gives another event log over a gRPC stream than over a socket pair: %s", firstDifference(a, b))
		}
		return
	}
	if len(modes) < 2 {
		t.Skipf("the subject runs in mode %s only", modes[0])
	}
	type key struct {
		id   string
		mode core.PluginMode
	}
	by := map[key]Result{}
	for _, r := range t.Results {
		by[key{r.ID, r.Mode}] = r
	}
	for _, r := range t.Results {
		first, other := by[key{r.ID, modes[0]}], r
		if r.Mode == modes[0] || r.Result == Skip || first.ID == "" || first.Result == Skip {
			continue
		}
		switch {
		case first.Result != other.Result:
			t.Errorf("%s: %s when %s, %s when %s", r.ID, first.Result, first.Mode, other.Result, other.Mode)
		case !slices.Equal(first.events, other.events):
			t.Errorf("%s: the event logs differ between %s and %s", r.ID, first.Mode, other.Mode)
		}
	}
	var logs [][]string
	for _, m := range modes {
		c := *t
		c.Mode = m
		logs = append(logs, parityLog(&c))
	}
	for i, l := range logs[1:] {
		if !slices.Equal(l, logs[0]) {
			t.Errorf("the same script gives another event log when %s than when %s: %s", modes[i+1], modes[0], firstDifference(logs[0], l))
		}
	}
}

// parityLog runs a fixed script and notes what comes out of it.
func parityLog(t *T) (log []string) {
	t.Place(func(t *T, n transport.Net) {
		p := t.pair(n, rigConfig{}, rigConfig{})
		note := func(format string, args ...any) { log = append(log, fmt.Sprintf(format, args...)) }
		options := p.a.sendOptions()
		for i, size := range t.sizes() {
			before := len(p.b.received())
			o := options[i%len(options)]
			err := p.a.Channel.Send(t.Context(), []channel.Member{p.peerB}, t.body(fmt.Sprint("parity", i), size), o)
			if err == nil {
				t.Eventually(t.patience(), func() error {
					if len(p.b.received()) == before {
						return fmt.Errorf("message %d was not delivered in mode %s", i, t.Mode)
					}
					return nil
				})
			}
			note("send %d: error %t", i, err != nil)
			for _, m := range p.b.received()[before:] {
				note("delivered %s %v", sum(m.Body), m.Options)
			}
		}
		p.a.OnSend(func(_ context.Context, m *channel.Message) error { return channel.Failed(m.To, channel.ErrNegativeAck) })
		err := p.a.Channel.Send(t.Context(), []channel.Member{p.peerB}, []byte("x"), channel.SendAck)
		var se *channel.SendError
		note("failure: fault %t, reason %t", errors.As(err, &se), errors.Is(err, channel.ErrNegativeAck))
		third := channeltest.Member(3)
		p.b.join(third)
		p.b.Observe(channel.MemberLeft, third)
		t.Eventually(t.patience(), func() error {
			if p.b.View().Has(third) {
				return fmt.Errorf("a member that has left is still in the view in mode %s", t.Mode)
			}
			return nil
		})
		for _, v := range p.b.Top.Views()[1:] {
			note("event %v %v, then %d members", v.Event.Kind, v.Event.Member, len(v.View.Members))
		}
	})
	return log
}

func firstDifference(a, b []string) string {
	for i := range max(len(a), len(b)) {
		x, y := "nothing", "nothing"
		if i < len(a) {
			x = a[i]
		}
		if i < len(b) {
			y = b[i]
		}
		if x != y {
			return fmt.Sprintf("line %d is %q and %q", i+1, x, y)
		}
	}
	return "none"
}

// properties lists the options of a schema.
func properties(schema []byte) []string {
	var s struct{ Properties map[string]any }
	if err := unmarshal(schema, &s); err != nil {
		return nil
	}
	var names []string
	for name := range s.Properties {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
