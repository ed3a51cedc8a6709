package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

func channelChecks() []Check {
	check := func(name string, run func(t *T), requirement, source string, saboteurs ...Saboteur) Check {
		return Check{
			ID: "channel/" + name, Profile: ProfileChannel, Level: Must,
			Requirement: requirement, Source: source, Run: run, Saboteurs: saboteurs,
		}
	}
	extended := func(c Check, feature string) Check {
		c.Features = []string{feature}
		return c
	}
	return []Check{
		check("stop-idempotent", checkStopIdempotent, "Stop before Start, twice, and at the same time as Send returns; nothing leaks.",
			"channel: Channel.Stop", sabChannelStop()...),
		check("unique-ids", checkUniqueIDs, "100,000 messages of 8 goroutines have different ids.",
			"channel: Message.ID, UniqueID", sabChannelIDs()...),
		check("no-destination", checkNoDestination, "A message to nobody fails with ErrNoMembers and reaches no layer.",
			"channel: ErrNoMembers", sabNoDestination()...),
		check("ack-means-received", checkAck, "A send with acknowledgement returns only after the receiver took the message; a silent receiver is a fault that names it.",
			"channel: UseAck, Channel.Send", sabAck()...),
		extended(check("sync-ack-means-processed", checkSyncAck, "It returns after the listener returned; the listener's failure is a negative acknowledgement, and the member stays.",
			"channel: SyncAck, ErrNegativeAck", sabSyncAck()...), FeatureSyncAck),
		check("partial-failure", checkPartial, "With one of three destinations dead the error lists exactly that one, and the others receive the message once.",
			"channel: SendError", sabPartial()...),
		extended(check("async-reports-once", checkAsync, "An asynchronous send returns at once, and its result is reported exactly once, also across Stop.",
			"channel: Async, Channel.SendDone", sabAsync()...), FeatureAsync),
		check("listener-filter", checkListeners, "Listeners are asked in the order of their registration until one takes the message; one that panics does not stop the rest.",
			"channel: Channel.Listen, Listener", sabListeners()...),
		check("body-isolation", checkBodyIsolation, "The caller may reuse its buffer after Send; receivers never see each other's changes.",
			"channel: Channel.Send, Message", sabBodies()...),
		check("stop-drains", checkStopDrains, "At Stop every accepted message is sent or fails; none is lost in silence.",
			"channel: Channel.Stop, Sender.Stop", sabDrains()...),
	}
}

// site is one node of a group of channels.
type site struct {
	Group
	hand    *byHand
	node    *channeltest.SimNode
	bottom  *probe
	got     channeltest.Recorder
	started bool
}

// withSites runs f with count channels that know each other.
func (t *T) withSites(count int, c channeltest.SimConfig, f func(t *T, nw *channeltest.SimNet, s []*site)) {
	t.Helper()
	if !t.Virtual() {
		t.Skip("needs the simulated network")
	}
	t.Sim(c, func(t *T, nw *channeltest.SimNet) {
		var all []*site
		defer func() {
			for _, s := range all {
				t.stopSite(s)
			}
		}()
		for i := range count {
			s := t.site(nw, fmt.Sprintf("10.0.0.%d", i+1))
			s.Listen(&s.got)
			all = append(all, s)
			if err := s.Start(t.Context()); err != nil {
				t.Fatalf("start: %v", err)
			}
			s.started = true
			time.Sleep(5 * time.Millisecond)
		}
		t.introduce(all)
		f(t, nw, all)
	})
}

func (t *T) introduce(all []*site) {
	t.Helper()
	for _, s := range all {
		for _, o := range all {
			if o != s && s.hand.sink != nil {
				s.hand.sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: o.Local()})
			}
		}
	}
	t.Eventually(time.Minute, func() error {
		for _, s := range all {
			if n := len(s.View().Members); n != len(all)-1 {
				return fmt.Errorf("a channel sees %d members, want %d", n, len(all)-1)
			}
		}
		return nil
	})
}

func (t *T) site(nw *channeltest.SimNet, ip string) *site {
	t.Helper()
	subject, ok := t.Subject.(ChannelSubject)
	if !ok {
		t.Fatalf("a %T is no channel", t.Subject)
	}
	s := &site{hand: &byHand{}, node: nw.Node(ip), bottom: &probe{desc: channel.Descriptor{Name: "probe-below", Provides: []string{channel.PropOrder}}}}
	var err error
	s.Group, err = subject.Channel(t, Place{
		Settings: withLogger(channel.Settings{Name: ip, Net: s.node, Metrics: channel.NewMetrics()}),
		IP:       ip, Membership: s.hand, Bottom: channel.Layer{Interceptor: s.bottom, Origin: "conformance"},
	})
	if err != nil {
		t.Fatalf("make: %v", err)
	}
	return s
}

// stopSite ends a channel. The network may be cut, so that errors count for
// nothing; that it returns does.
func (t *T) stopSite(s *site) {
	if !s.started {
		return
	}
	s.started = false
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Stop(ctx)
	}()
	timer := time.NewTimer(10 * time.Minute)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		t.Errorf("Stop has not returned")
	}
}

func checkStopIdempotent(t *T) {
	t.Sim(channeltest.SimConfig{}, func(t *T, nw *channeltest.SimNet) {
		s := t.site(nw, "10.0.0.1")
		for range 2 {
			t.within("Stop before Start", func() error { return s.Stop(context.Background()) })
		}
	})
	t.withSites(2, channeltest.SimConfig{}, func(t *T, _ *channeltest.SimNet, s []*site) {
		a, b := s[0], s[1].Local()
		var senders, stoppers sync.WaitGroup
		quit := make(chan struct{})
		for range 4 {
			senders.Go(func() {
				for {
					select {
					case <-quit:
						return
					default:
						_ = a.Send(t.Context(), []channel.Member{b}, []byte("x"), channel.SendAck)
						time.Sleep(time.Microsecond) // virtual time stands still for a loop that never waits
					}
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		for range 3 {
			stoppers.Go(func() { t.within("Stop", func() error { return a.Stop(context.Background()) }) })
		}
		stoppers.Wait()
		t.within("Stop again", func() error { return a.Stop(context.Background()) })
		if err := a.Send(t.Context(), []channel.Member{b}, []byte("x"), channel.SendNone); !errors.Is(err, channel.ErrClosed) {
			t.Errorf("a send after Stop ended with %v, want ErrClosed", err)
		}
		close(quit)
		senders.Wait()
	})
}

func checkUniqueIDs(t *T) {
	const workers, each = 8, 12_500
	t.withSites(1, channeltest.SimConfig{}, func(t *T, _ *channeltest.SimNet, s []*site) {
		ids := make(map[channel.UniqueID]bool, workers*each)
		var mu sync.Mutex
		double, zero := 0, 0
		s[0].bottom.onSend = func(_ context.Context, _ channel.Link, m *channel.Message) error {
			mu.Lock()
			defer mu.Unlock()
			if ids[m.ID] {
				double++
			}
			if m.ID.IsZero() {
				zero++
			}
			ids[m.ID] = true
			return nil
		}
		to := []channel.Member{channeltest.Member(1)}
		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for range each {
					_ = s[0].Send(t.Context(), to, nil, channel.SendNone)
				}
			})
		}
		wg.Wait()
		if double > 0 || zero > 0 || len(ids) != workers*each {
			t.Errorf("%d messages had %d different ids; %d came twice, %d were zero", workers*each, len(ids), double, zero)
		}
	})
}

func checkNoDestination(t *T) {
	t.withSites(1, channeltest.SimConfig{}, func(t *T, _ *channeltest.SimNet, s []*site) {
		before := s[0].bottom.sends.Load()
		done := make(completion, 1)
		for _, to := range [][]channel.Member{nil, {}} {
			if err := s[0].Send(t.Context(), to, []byte("x"), channel.SendAck); !errors.Is(err, channel.ErrNoMembers) {
				t.Errorf("a message to nobody ended with %v", err)
			}
			if err := s[0].SendDone(t.Context(), to, []byte("x"), channel.SendAck, done); !errors.Is(err, channel.ErrNoMembers) {
				t.Errorf("a message to nobody with a completion ended with %v", err)
			}
		}
		time.Sleep(time.Second)
		if n := s[0].bottom.sends.Load() - before; n > 0 {
			t.Errorf("%d messages to nobody reached the bottom", n)
		}
		if len(done) > 0 {
			t.Error("a message that was refused was completed too")
		}
	})
}

// faulty checks that an error names one member.
func (t *T) faulty(what string, err error, m channel.Member) {
	t.Helper()
	var se *channel.SendError
	if !errors.As(err, &se) || len(se.Faults) != 1 || !se.Faults[0].Member.Is(m) {
		t.Errorf("%s: the error is %v, want one that names %v alone", what, err, m)
	}
}

func checkAck(t *T) {
	const latency = 50 * time.Millisecond
	t.withSites(2, channeltest.SimConfig{Link: channeltest.LinkPolicy{Latency: latency}}, func(t *T, nw *channeltest.SimNet, s []*site) {
		a, b := s[0], s[1]
		to := []channel.Member{b.Local()}
		if err := a.Send(t.Context(), to, []byte("connect"), channel.SendAck); err != nil {
			t.Fatalf("send: %v", err)
		}
		begin := time.Now()
		if err := a.Send(t.Context(), to, []byte("second"), channel.SendAck); err != nil {
			t.Fatalf("send: %v", err)
		}
		if took := time.Since(begin); took < 2*latency {
			t.Errorf("an acknowledged send took %v; the way there and back takes %v", took, 2*latency)
		}
		time.Sleep(time.Second)
		if got := b.got.Bodies(); !slices.Equal(got, []string{"connect", "second"}) {
			t.Errorf("two messages were acknowledged, %q delivered", got)
		}
		nw.Isolate("10.0.0.2")
		begin = time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		err := a.Send(ctx, to, []byte("lost"), channel.SendAck)
		t.faulty("a receiver that has fallen silent", err, to[0])
		if took := time.Since(begin); took > time.Minute {
			t.Errorf("a receiver that has fallen silent was waited for %v", took)
		}
	})
}

func checkSyncAck(t *T) {
	t.withSites(2, channeltest.SimConfig{}, func(t *T, _ *channeltest.SimNet, s []*site) {
		a, b := s[0], s[1]
		to := []channel.Member{b.Local()}
		var returned atomic.Bool
		b.got.Reply = func(m *channel.Message) (bool, error) {
			if string(m.Body) == "refuse" {
				return true, errRefused
			}
			time.Sleep(time.Second)
			returned.Store(true)
			return true, nil
		}
		if err := a.Send(t.Context(), to, []byte("work"), channel.SendSyncAck); err != nil {
			t.Fatalf("send: %v", err)
		}
		if !returned.Load() {
			t.Error("the send returned before the listener")
		}
		err := a.Send(t.Context(), to, []byte("refuse"), channel.SendSyncAck)
		if !errors.Is(err, channel.ErrNegativeAck) {
			t.Errorf("the listener's failure came back as %v, want ErrNegativeAck", err)
		}
		t.faulty("a refused message", err, to[0])
		time.Sleep(time.Minute)
		if !a.View().Has(to[0]) {
			t.Error("a member was removed because its application refused a message")
		}
	})
}

func checkPartial(t *T) {
	t.withSites(4, channeltest.SimConfig{}, func(t *T, _ *channeltest.SimNet, s []*site) {
		to := []channel.Member{s[1].Local(), s[2].Local(), s[3].Local()}
		if err := s[0].Send(t.Context(), to, []byte("all"), channel.SendAck); err != nil {
			t.Fatalf("send: %v", err)
		}
		s[2].node.Crash()
		err := s[0].Send(t.Context(), to, []byte("some"), channel.SendAck)
		t.faulty("one of three destinations is dead", err, to[1])
		done := make(completion, 4)
		if err := s[0].SendDone(t.Context(), to, []byte("more"), channel.SendAck, done); err != nil {
			t.faulty("SendDone", err, to[1])
		} else {
			t.faulty("SendDone", t.await(done), to[1])
		}
		time.Sleep(time.Minute)
		for _, i := range []int{1, 3} {
			if got := s[i].got.Bodies(); !slices.Equal(got, []string{"all", "some", "more"}) {
				t.Errorf("a living destination received %q", got)
			}
		}
	})
}

func checkAsync(t *T) {
	t.withSites(2, channeltest.SimConfig{Link: channeltest.LinkPolicy{Latency: 20 * time.Millisecond}}, func(t *T, nw *channeltest.SimNet, s []*site) {
		a, b := s[0], s[1]
		to := []channel.Member{b.Local()}
		const count = 300
		tally := newTally()
		for i := range count {
			if i == count/2 {
				nw.Isolate("10.0.0.2")
			}
			begin := time.Now()
			if err := a.SendDone(t.Context(), to, fmt.Append(nil, i), channel.SendAck|channel.Async, tally.completion(i)); err != nil {
				tally.told(i, err)
			}
			if took := time.Since(begin); took > 0 {
				t.Errorf("an asynchronous send took %v", took)
				break
			}
		}
		if err := a.Send(t.Context(), to, []byte("x"), channel.SendAsync); err != nil {
			t.Errorf("an asynchronous send without completion failed: %v", err)
		}
		time.Sleep(100 * time.Millisecond)
		nw.Heal()
		time.Sleep(5 * time.Second)
		for i := range 50 {
			if err := a.SendDone(t.Context(), to, fmt.Append(nil, count+i), channel.SendAck|channel.Async, tally.completion(count+i)); err != nil {
				tally.told(count+i, err)
			}
		}
		t.stopSite(a)
		time.Sleep(10 * time.Minute)
		tally.check(t, count+50, b.got.Bodies())
	})
}

// tally notes the results of numbered messages.
type tally struct {
	mu      sync.Mutex
	results map[int][]error
}

func newTally() *tally { return &tally{results: map[int][]error{}} }

func (ta *tally) told(i int, err error) {
	ta.mu.Lock()
	defer ta.mu.Unlock()
	ta.results[i] = append(ta.results[i], err)
}

type tallyOne struct {
	ta *tally
	i  int
}

func (ta *tally) completion(i int) channel.Completion { return tallyOne{ta, i} }

// Complete implements channel.Completion.
func (o tallyOne) Complete(_ *channel.Message, err error) { o.ta.told(o.i, err) }

// check compares the results of count messages, whose bodies are their numbers,
// with what was received.
func (ta *tally) check(t *T, count int, received []string) {
	t.Helper()
	ta.mu.Lock()
	defer ta.mu.Unlock()
	never, often, lost := 0, 0, 0
	times := map[string]int{}
	for _, body := range received {
		times[body]++
	}
	for i := range count {
		switch r := ta.results[i]; {
		case len(r) == 0:
			never++
		case len(r) > 1:
			often++
		case r[0] == nil && times[fmt.Sprint(i)] == 0:
			lost++
		}
	}
	if never > 0 || often > 0 || lost > 0 {
		t.Errorf("of %d messages, %d were never reported, %d more than once, and %d reported as received were not", count, never, often, lost)
	}
	for body, n := range times {
		if n > 1 {
			t.Errorf("the message %q was received %d times", body, n)
			return
		}
	}
}

// asked is a listener that notes that it was asked.
type asked struct {
	name   string
	log    *[]string
	mu     *sync.Mutex
	answer func(m *channel.Message) (bool, error)
}

func (a asked) Handle(_ context.Context, m *channel.Message) (bool, error) {
	a.mu.Lock()
	*a.log = append(*a.log, a.name+" "+string(m.Body))
	a.mu.Unlock()
	return a.answer(m)
}

func checkListeners(t *T) {
	t.Sim(channeltest.SimConfig{}, func(t *T, nw *channeltest.SimNet) {
		a, b := t.site(nw, "10.0.0.1"), t.site(nw, "10.0.0.2")
		defer t.stopSite(a)
		defer t.stopSite(b)
		for _, s := range []*site{a, b} {
			if err := s.Start(t.Context()); err != nil {
				t.Fatalf("start: %v", err)
			}
			s.started = true
		}
		t.introduce([]*site{a, b})
		var log []string
		var mu sync.Mutex
		only := func(word string) func(m *channel.Message) (bool, error) {
			return func(m *channel.Message) (bool, error) { return string(m.Body) == word, nil }
		}
		var cancels []func()
		for _, l := range []asked{
			{"panics", &log, &mu, func(*channel.Message) (bool, error) { panic("conformance: a listener panics") }},
			{"first", &log, &mu, only("one")},
			{"second", &log, &mu, only("two")},
			{"third", &log, &mu, func(*channel.Message) (bool, error) { return true, nil }},
		} {
			cancels = append(cancels, b.Listen(l))
		}
		to := []channel.Member{b.Local()}
		send := func(body string) {
			t.Helper()
			if err := a.Send(t.Context(), to, []byte(body), channel.SendSyncAck); err != nil {
				t.Errorf("%q was taken by a listener, and failed: %v", body, err)
			}
		}
		send("one")
		send("two")
		cancels[0]()
		cancels[2]()
		send("two")
		mu.Lock()
		defer mu.Unlock()
		want := []string{"panics one", "first one", "panics two", "first two", "second two", "first two", "third two"}
		if !slices.Equal(log, want) {
			t.Errorf("the listeners were asked %q, want %q", log, want)
		}
	})
}

func checkBodyIsolation(t *T) {
	t.withSites(4, channeltest.SimConfig{}, func(t *T, _ *channeltest.SimNet, s []*site) {
		to := []channel.Member{s[1].Local(), s[2].Local(), s[3].Local()}
		var mu sync.Mutex
		var bad []string
		for _, r := range s[1:] {
			// The recorder has copied the body; then it is overwritten.
			r.got.Reply = func(m *channel.Message) (bool, error) {
				if len(m.Body) > 0 && !bytes.Equal(m.Body, bytes.Repeat(m.Body[:1], len(m.Body))) {
					mu.Lock()
					bad = append(bad, sum(m.Body))
					mu.Unlock()
				}
				clear(m.Body)
				return true, nil
			}
		}
		buf := make([]byte, 2000)
		options := []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck, channel.SendAsync}
		done := make(completion, 1000)
		const rounds = 40
		var want []string
		for i := range rounds {
			fill := byte('A' + i%26)
			for j := range buf {
				buf[j] = fill
			}
			want = append(want, string(buf))
			var err error
			if i%5 == 4 {
				err = s[0].SendDone(t.Context(), to, buf, channel.SendAck, done)
			} else {
				err = s[0].Send(t.Context(), to, buf, options[i%len(options)])
			}
			if err != nil {
				t.Fatalf("send: %v", err)
			}
			if want[i] != string(buf) {
				t.Fatalf("the send has changed the caller's buffer")
			}
			for j := range buf {
				buf[j] = '!'
			}
		}
		time.Sleep(time.Minute)
		if len(bad) > 0 {
			t.Errorf("%d bodies changed while they were delivered", len(bad))
		}
		slices.Sort(want)
		for i, r := range s[1:] {
			got := r.got.Bodies()
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("receiver %d got %d bodies for %d, %d of them not as sent", i+1, len(got), len(want), different(got, want))
			}
		}
	})
}

func checkStopDrains(t *T) {
	t.withSites(2, channeltest.SimConfig{Link: channeltest.LinkPolicy{Latency: 10 * time.Millisecond}}, func(t *T, _ *channeltest.SimNet, s []*site) {
		a, b := s[0], s[1]
		to := []channel.Member{b.Local()}
		o := channel.SendAck
		if slices.Contains(t.Features, FeatureAsync) {
			o |= channel.Async
		}
		const count = 500
		tally := newTally()
		for i := range count {
			if err := a.SendDone(t.Context(), to, fmt.Append(nil, i), o, tally.completion(i)); err != nil {
				tally.told(i, err)
			}
		}
		t.stopSite(a)
		time.Sleep(10 * time.Minute)
		tally.check(t, count, b.got.Bodies())
	})
}
