package channel_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// window is a layer that goes on with messages, in both directions and in
// order, after its handlers have returned.
type window struct {
	name  string
	delay time.Duration // per message
	fail  bool          // Start fails

	link     channel.Link
	down, up lane

	mu              sync.Mutex
	starts, stops   int
	calls, badCalls int
}

type lane struct {
	mu      sync.Mutex
	queue   []*channel.Message
	idle    []chan struct{}
	working bool
	wg      sync.WaitGroup
}

func (l *lane) put(m *channel.Message, delay time.Duration, pass func(*channel.Message)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, m)
	if l.working {
		return
	}
	l.working = true
	l.wg.Go(func() {
		for {
			l.mu.Lock()
			if len(l.queue) == 0 {
				l.working = false
				for _, c := range l.idle {
					close(c)
				}
				l.idle = nil
				l.mu.Unlock()
				return
			}
			m := l.queue[0]
			l.queue = l.queue[1:]
			l.mu.Unlock()
			time.Sleep(delay)
			pass(m)
		}
	})
}

func (l *lane) flush(ctx context.Context) error {
	l.mu.Lock()
	c := make(chan struct{})
	if l.working {
		l.idle = append(l.idle, c)
	} else {
		close(c)
	}
	l.mu.Unlock()
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (q *window) Descriptor() channel.Descriptor { return channel.Descriptor{Name: q.name} }

func (q *window) Start(_ context.Context, l channel.Link) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.starts++
	q.link = l
	if q.fail {
		return errors.New("as told")
	}
	return nil
}

func (q *window) Stop(context.Context) error {
	q.down.wg.Wait()
	q.up.wg.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.stops++
	return nil
}

func (q *window) Flush(ctx context.Context) error {
	return errors.Join(q.down.flush(ctx), q.up.flush(ctx))
}

func (q *window) called() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.calls++
	if q.starts != 1 || q.stops != 0 {
		q.badCalls++
	}
}

func (q *window) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	q.called()
	if m.Done == nil && !m.Options.Has(channel.Async) {
		return l.Send(ctx, m)
	}
	own := channeltest.Clone(m)
	done := m.Done
	own.Done = done
	q.down.put(&own, q.delay, func(m *channel.Message) {
		q.called()
		if err := q.link.Send(context.Background(), m); err != nil && done != nil {
			done.Complete(m, err)
		}
	})
	return nil
}

func (q *window) HandleReceive(_ context.Context, _ channel.Link, m *channel.Message) error {
	q.called()
	own := channeltest.Clone(m)
	q.up.put(&own, q.delay, func(m *channel.Message) {
		q.called()
		_ = q.link.Deliver(context.Background(), m)
	})
	return nil
}

func (q *window) check(t interface{ Errorf(string, ...any) }) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.starts != 1 || q.stops != 1 || q.badCalls != 0 {
		t.Errorf("%s: %d starts, %d stops, %d of %d calls outside of its life", q.name, q.starts, q.stops, q.badCalls, q.calls)
	}
}

func swapTo(t interface {
	Fatalf(string, ...any)
	Helper()
}, c *channel.Channel, layers ...channel.Interceptor) {
	t.Helper()
	list := make([]channel.Layer, len(layers))
	for i, l := range layers {
		list[i].Interceptor = l
	}
	s, err := channel.NewStack(list...)
	if err == nil {
		err = c.Swap(context.Background(), s)
	}
	if err != nil {
		t.Fatalf("swap: %v", err)
	}
}

// numbered checks that the bodies "who number" are there once each and in
// order per sender.
func numbered(t interface{ Errorf(string, ...any) }, what string, bodies []string, want map[string]int) {
	next := map[string]int{}
	for _, b := range bodies {
		var who string
		var n int
		fmt.Sscanf(b, "%s %d", &who, &n)
		if n != next[who] {
			t.Errorf("%s: %s: number %d came where %d was due", what, who, n, next[who])
			return
		}
		next[who]++
	}
	for who, n := range want {
		if next[who] != n {
			t.Errorf("%s: %s: %d of %d arrived", what, who, next[who], n)
		}
	}
}

// Messages of all kinds and in both directions go on while the stack changes.
func TestSwapUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const each = 3000
		first, kept := &window{name: "first"}, &window{name: "kept"}
		e := channeltest.Embed(t, first, kept)
		results := new(channeltest.Recorder)
		var wg sync.WaitGroup
		want := map[string]int{"sync": each, "async": each, "done": each}
		send := func(who string, f func(body []byte) error) {
			wg.Go(func() {
				for i := range each {
					if err := f(fmt.Appendf(nil, "%s %d", who, i)); err != nil {
						t.Errorf("%s %d: %v", who, i, err)
					}
					if i%7 == 0 {
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		send("sync", func(b []byte) error { return e.Send(t.Context(), peers[:1], b, channel.SendSyncAck) })
		send("async", func(b []byte) error { return e.Send(t.Context(), peers[:1], b, channel.SendAsync) })
		send("done", func(b []byte) error { return e.SendDone(t.Context(), peers[:1], b, channel.SendAck, results) })
		send("in", func(b []byte) error { return e.ReceiveBody(peers[0], channel.SendAck, string(b)) })
		last := first
		all := []*window{}
		for i := range 60 {
			time.Sleep(7 * time.Millisecond)
			next := &window{name: fmt.Sprint("gen", i)}
			all = append(all, next)
			switch i % 4 {
			case 0:
				swapTo(t, e.Channel, next, kept)
			case 1:
				swapTo(t, e.Channel, kept, next)
			case 2:
				swapTo(t, e.Channel, next, pass{}, kept, pass{})
			case 3:
				swapTo(t, e.Channel, kept, pass{}, next)
			}
			last.check(t)
			last = next
		}
		wg.Wait()
		swapTo(t, e.Channel)
		synctest.Wait()
		last.check(t)
		kept.check(t)
		numbered(t, "sent", e.Bottom.Bodies(), want)
		numbered(t, "received", e.Top.Bodies(), map[string]int{"in": each})
		if n := len(results.Results()); n != each {
			t.Errorf("%d results for %d messages", n, each)
		}
		for _, r := range results.Results() {
			if r.Err != nil {
				t.Errorf("result: %v", r.Err)
			}
		}
		calls := 0
		for _, q := range all {
			calls += q.calls
		}
		if calls == 0 {
			t.Error("no message passed the new layers: the test has tested nothing")
		}
	})
}

// Later messages do not overtake those that a removed layer still holds; those
// that do not pass it, and calls that wait inside, hold up nobody.
func TestSwapKeepsOrderAcrossASlowQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := &window{name: "slow", delay: 10 * time.Millisecond}
		e := channeltest.Embed(t, slow)
		for i := range 20 {
			if err := e.Send(t.Context(), peers[:1], fmt.Appendf(nil, "m %d", i), channel.SendAsync); err != nil {
				t.Fatal(err)
			}
		}
		blocked := make(chan struct{})
		e.OnSend(func(_ context.Context, m *channel.Message) error {
			if string(m.Body) == "stuck" {
				<-blocked
			}
			return nil
		})
		stuck := make(chan error, 1)
		go func() { stuck <- e.Send(t.Context(), peers[:1], []byte("stuck"), channel.SendAck) }()
		synctest.Wait()
		swapped := make(chan struct{})
		go func() { swapTo(t, e.Channel); close(swapped) }()
		synctest.Wait()
		start := time.Now()
		if err := e.Send(t.Context(), peers[:1], []byte("m 20"), channel.SendAsync); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d > 250*time.Millisecond {
			t.Errorf("the message waited %v for the queue, and maybe for the call that is stuck", d)
		}
		select {
		case <-swapped:
			t.Error("swap did not wait for the call that is still inside")
		default:
		}
		close(blocked)
		<-swapped
		if err := <-stuck; err != nil {
			t.Error(err)
		}
		bodies := slices.DeleteFunc(e.Bottom.Bodies(), func(b string) bool { return b == "stuck" })
		numbered(t, "sent", bodies, map[string]int{"m": 21})
		slow.check(t)
	})
}

// Layers that hold messages change places while listeners and watchers send.
func TestSwapChangesPlacesUnderReplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &window{name: "a", delay: time.Millisecond}, &window{name: "b"}
		e := channeltest.Embed(t, a, b)
		replies := 0
		var mu sync.Mutex
		e.Top.Reply = func(*channel.Message) (bool, error) {
			mu.Lock()
			body := fmt.Appendf(nil, "reply %d", replies)
			replies++
			err := e.Send(context.Background(), peers[:1], body, channel.SendAsync)
			mu.Unlock()
			return true, err
		}
		watched := 0
		e.Watch(func(channel.View, channel.MemberEvent) {
			_ = e.Send(context.Background(), peers[:1], fmt.Appendf(nil, "watch %d", watched), channel.SendAsync)
			watched++
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range 500 {
				if err := e.ReceiveBody(peers[0], channel.SendNone, fmt.Sprintf("in %d", i)); err != nil {
					t.Error(err)
				}
				if i%10 == 0 {
					e.Observe([]channel.MemberEventKind{channel.MemberAdded, channel.MemberLeft}[i/10%2], peers[1])
				}
				time.Sleep(2 * time.Millisecond)
			}
		})
		for i := range 30 {
			time.Sleep(20 * time.Millisecond)
			start := time.Now()
			if i%2 == 0 {
				swapTo(t, e.Channel, b, a)
			} else {
				swapTo(t, e.Channel, a, b)
			}
			if d := time.Since(start); d > 100*time.Millisecond {
				t.Errorf("swap %d took %v", i, d)
			}
		}
		wg.Wait()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		numbered(t, "received", e.Top.Bodies(), map[string]int{"in": 500})
		numbered(t, "sent", e.Bottom.Bodies(), map[string]int{"reply": 500, "watch": watched})
	})
}

// A queue that cannot be emptied delays later messages by a second, no more;
// nothing is lost.
func TestSwapDoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := channel.NewMetrics()
		slow := &window{name: "slow", delay: 3 * time.Second}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{slow}, Settings: channel.Settings{Metrics: m}})
		for i := range 3 {
			_ = e.Send(t.Context(), peers[:1], fmt.Appendf(nil, "m %d", i), channel.SendAsync)
		}
		go swapTo(t, e.Channel)
		synctest.Wait()
		start := time.Now()
		if err := e.Send(t.Context(), peers[:1], []byte("later"), channel.SendAck); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d != time.Second {
			t.Errorf("waited %v", d)
		}
		time.Sleep(10 * time.Second)
		if n := len(e.Bottom.Bodies()); n != 4 {
			t.Errorf("%d messages arrived", n)
		}
		if n := value(m, "channel_swap_overtaken_total"); n != 2 { // once for each direction
			t.Errorf("counted %v", n)
		}
	})
}

func value(m *channel.Metrics, name string) (v float64) {
	for _, s := range m.Samples() {
		if s.Name == name {
			v += s.Value
		}
	}
	return v
}

func TestSwapThatFailsChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kept := &window{name: "kept"}
		e := channeltest.Embed(t, kept)
		before := e.Stack()
		good, bad := &window{name: "good"}, &window{name: "bad", fail: true}
		s, err := channel.NewStack(channel.Layer{Interceptor: bad, Origin: "a.yaml:7"}, channel.Layer{Interceptor: kept}, channel.Layer{Interceptor: good})
		if err != nil {
			t.Fatal(err)
		}
		err = e.Swap(t.Context(), s)
		if err == nil || !strings.Contains(err.Error(), "bad (a.yaml:7)") || !strings.Contains(err.Error(), "nothing has changed") {
			t.Errorf("error is %v", err)
		}
		good.check(t)
		if kept.stops != 0 || e.Stack() != before {
			t.Error("the running stack was touched")
		}
		if err := e.Swap(t.Context(), before); err == nil {
			t.Error("a stack was used twice")
		}
		if err := e.Send(t.Context(), peers[:1], []byte("x"), channel.SendAsync); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if n := len(e.Bottom.Bodies()); n != 1 {
			t.Errorf("%d messages arrived", n)
		}
	})
}

func TestSwapNeedsARunningChannel(t *testing.T) {
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Swap(t.Context(), nil); !errors.Is(err, channel.ErrClosed) {
		t.Errorf("before start: %v", err)
	}
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.Swap(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if err := e.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if err := e.Swap(t.Context(), nil); !errors.Is(err, channel.ErrClosed) {
		t.Errorf("after stop: %v", err)
	}
}

// Stop does not wait for a swap that waits.
func TestStopEndsASwap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{Layers: []channel.Interceptor{pass{}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		release := make(chan struct{})
		e.OnSend(func(context.Context, *channel.Message) error { <-release; return nil })
		go func() { _ = e.Send(t.Context(), peers[:1], nil, channel.SendAck) }()
		synctest.Wait()
		go swapTo(t, e.Channel)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_ = e.Stop(ctx) // it may or may not count the stray call
		if d := time.Since(start); d > time.Second {
			t.Errorf("stop took %v", d)
		}
		close(release)
	})
}

// keeper notes its events and keeps lost members, as a failure detector does,
// until it is told to let them go.
type keeper struct {
	name string
	link channel.Link
	mu   sync.Mutex
	log  []string
	held map[channel.UniqueID]bool
}

func (k *keeper) Descriptor() channel.Descriptor { return channel.Descriptor{Name: k.name} }
func (k *keeper) Start(_ context.Context, l channel.Link) error {
	k.link, k.held = l, map[channel.UniqueID]bool{}
	return nil
}
func (k *keeper) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.log = append(k.log, ev.Kind.String()+" "+ev.Member.Name())
	if ev.Kind == channel.MemberLost {
		k.held[ev.Member.ID] = true
		return nil
	}
	return l.Announce(ctx, ev)
}

func (k *keeper) events() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	slices.Sort(k.log)
	return strings.Join(k.log, ", ")
}

// hideOne shows all members but one.
type hideOne struct{ id channel.UniqueID }

func (hideOne) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "hide"} }
func (h hideOne) FilterView(below channel.View) channel.View {
	below.Members = slices.DeleteFunc(slices.Clone(below.Members), func(m channel.Member) bool { return m.ID == h.id })
	return below
}

func TestSwapTellsTheMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kept, gone := &keeper{name: "kept"}, &keeper{name: "gone"}
		e := channeltest.Embed(t, gone, kept)
		for _, m := range peers {
			e.Observe(channel.MemberAdded, m)
		}
		synctest.Wait()
		e.Observe(channel.MemberLost, peers[2]) // kept by "kept"
		synctest.Wait()
		views := len(e.Top.Views())

		// New layers above, between and below the one that is carried over.
		above, below := &keeper{name: "above"}, &keeper{name: "below"}
		swapTo(t, e.Channel, above, kept, below)
		synctest.Wait()
		if n := len(e.Top.Views()); n != views {
			t.Errorf("the application saw %d changes of the view: %+v", n-views, e.Top.Views()[views:])
		}
		if got := kept.events(); got != "added node1, added node2, added node3, lost node3" {
			t.Errorf("the carried layer was told again: %s", got)
		}
		if got := above.events(); got != "added node1, added node2, added node3" {
			t.Errorf("the new layer above: %s", got)
		}
		if got := below.events(); got != "added node1, added node2" {
			t.Errorf("the new layer below: %s", got)
		}
		if n := len(gone.log); n != 3 {
			t.Errorf("the removed layer had %d events", n)
		}

		// Later changes arrive once at each.
		e.Observe(channel.MemberLeft, peers[1])
		synctest.Wait()
		if e.View().Has(peers[1]) || len(gone.log) != 3 || !strings.HasSuffix(above.events(), "left node2") {
			t.Errorf("after a departure: view %v, above %s", e.View().Members, above.events())
		}

		// A new keeper takes over what a removed one has kept.
		heir := &keeper{name: "heir"}
		views = len(e.Top.Views())
		swapTo(t, e.Channel, heir)
		synctest.Wait()
		if got := heir.events(); got != "added node1, added node3, lost node3" || len(e.Top.Views()) != views {
			t.Errorf("the heir was told: %s; %d changes of the view", got, len(e.Top.Views())-views)
		}

		// Without the keepers the lost member goes; with a filter another one.
		swapTo(t, e.Channel, hideOne{peers[0].ID})
		synctest.Wait()
		if n := len(e.View().Members); n != 0 {
			t.Errorf("%d members in the view", n)
		}
		swapTo(t, e.Channel)
		synctest.Wait()
		if v := e.View(); len(v.Members) != 1 || !v.Has(peers[0]) {
			t.Errorf("view is %v", v.Members)
		}
		alternate(t, e.Top.Views())
	})
}

// alternate checks that what watchers are told makes sense.
func alternate(t interface{ Errorf(string, ...any) }, views []channeltest.ViewChange) {
	here := map[channel.UniqueID]bool{}
	var version uint64
	for _, c := range views {
		if c.View.Version < version {
			t.Errorf("version %d after %d", c.View.Version, version)
		}
		version = c.View.Version
		m := c.Event.Member
		switch c.Event.Kind {
		case channel.MemberAdded:
			if here[m.ID] {
				t.Errorf("%v added twice", m)
			}
			here[m.ID] = true
		case channel.MemberLost, channel.MemberLeft:
			if !here[m.ID] {
				t.Errorf("%v lost without being there", m)
			}
			here[m.ID] = false
		}
		if c.Event.Kind != 0 && c.View.Has(m) != here[m.ID] {
			t.Errorf("view does not agree with the event %v of %v", c.Event.Kind, m)
		}
	}
}

// source announces members of its own.
type source struct {
	name    string
	members []channel.Member
}

func (s source) Descriptor() channel.Descriptor { return channel.Descriptor{Name: s.name} }
func (s source) FilterView(v channel.View) channel.View {
	return v
}
func (s *source) Start(ctx context.Context, l channel.Link) error {
	for _, m := range s.members {
		if err := l.Announce(ctx, channel.MemberEvent{Kind: channel.MemberAdded, Member: m}); err != nil {
			return err
		}
	}
	return nil
}

func TestSwapKeepsMembersOfLayers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{"source", peers[:2]}
		e := channeltest.Embed(t, s)
		synctest.Wait()
		views := len(e.Top.Views())
		swapTo(t, e.Channel, &keeper{name: "k"}, s, pass{})
		synctest.Wait()
		if n := len(e.Top.Views()); n != views || len(e.View().Members) != 2 {
			t.Errorf("%d changes, members %v", n-views, e.View().Members)
		}
		swapTo(t, e.Channel, pass{})
		synctest.Wait()
		if n := len(e.View().Members); n != 0 {
			t.Errorf("%d members are left of a layer that is gone", n)
		}
		alternate(t, e.Top.Views())
	})
}

func TestSwapAnnouncesTheFingerprint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Settings: channel.Settings{Logger: zap.New(core)}})
		e.Observe(channel.MemberAdded, peers[0])
		synctest.Wait()
		if logs.Len() != 0 {
			t.Fatalf("warned of an equal member: %v", logs.All())
		}
		swapTo(t, e.Channel, gzip())
		if a, _ := e.Local().Announcement(); a.Fingerprint != "gzip:100" || e.Announcement().Fingerprint != "gzip:100" {
			t.Errorf("announced is %+v", a)
		}
		if logs.FilterMessageSnippet("changes messages differently").Len() != 1 {
			t.Errorf("not warned of a member with another fingerprint: %v", logs.All())
		}
		body := []byte("the caller's own bytes")
		if err := e.Send(t.Context(), peers[:1], body, channel.SendAck); err != nil {
			t.Error(err)
		}
		if string(body) != "the caller's own bytes" {
			t.Error("the new layer changed the caller's buffer")
		}
		swapTo(t, e.Channel)
		if a, _ := e.Local().Announcement(); a.Fingerprint != "" {
			t.Errorf("announced is %+v", a)
		}
	})
}

// problems collects what is wrong, to be told outside of a bubble.
type problems struct{ list []string }

func (p *problems) Errorf(format string, args ...any) {
	p.list = append(p.list, fmt.Sprintf(format, args...))
}
func (p *problems) Fatalf(format string, args ...any) { p.Errorf(format, args...) }
func (p *problems) Helper()                           {}

// Random swaps of random layers under random traffic and member changes.
func TestSwapRandom(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.Uint64(), 5, 40).Draw(rt, "steps")
		p := new(problems)
		synctest.Test(t, func(*testing.T) { randomSwaps(p, steps) })
		for _, what := range p.list {
			rt.Error(what)
		}
	})
}

func randomSwaps(p *problems, steps []uint64) {
	e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{})
	if err != nil {
		p.Fatalf("%v", err)
		return
	}
	if err := e.Start(context.Background()); err != nil {
		p.Fatalf("%v", err)
		return
	}
	var windows []*window
	var present []channel.Interceptor
	results := new(channeltest.Recorder)
	sent, received := 0, 0
	members := map[channel.UniqueID]bool{}
	var swaps sync.WaitGroup
	for _, step := range steps {
		r := rand.New(rand.NewPCG(step, 1))
		switch r.IntN(7) {
		case 0:
			swaps.Wait()
			present = slices.Clone(present)
			r.Shuffle(len(present), func(i, j int) { present[i], present[j] = present[j], present[i] })
			present = present[:r.IntN(len(present)+1)]
			for range r.IntN(3) {
				w := &window{name: fmt.Sprint("w", len(windows)), delay: time.Duration(r.IntN(4)) * time.Millisecond}
				windows = append(windows, w)
				present = slices.Insert(present, r.IntN(len(present)+1), channel.Interceptor(w))
			}
			if r.IntN(2) == 0 {
				present = append(present, &keeper{name: "keeper"})
			}
			next := slices.Clone(present)
			swaps.Go(func() { swapTo(p, e.Channel, next...) })
		case 1, 2, 3:
			options := channel.SendAck
			if r.IntN(2) == 0 {
				options = channel.SendAsync
			}
			if err := e.SendDone(context.Background(), peers[:1], fmt.Appendf(nil, "m %d", sent), options, results); err != nil {
				p.Errorf("%v", err)
			}
			sent++
		case 4:
			if err := e.ReceiveBody(peers[0], channel.SendAck, fmt.Sprintf("m %d", received)); err != nil {
				p.Errorf("%v", err)
			}
			received++
		case 5:
			m := peers[r.IntN(len(peers))]
			kind := channel.MemberAdded
			if members[m.ID] {
				kind = channel.MemberLeft
			}
			members[m.ID] = !members[m.ID]
			e.Observe(kind, m)
		case 6:
			time.Sleep(time.Duration(r.IntN(5)) * time.Millisecond)
		}
	}
	swaps.Wait()
	synctest.Wait()
	for _, m := range peers {
		if e.View().Has(m) != members[m.ID] {
			p.Errorf("%v in view: %v, want %v", m, e.View().Has(m), members[m.ID])
		}
	}
	if err := e.Stop(context.Background()); err != nil {
		p.Errorf("%v", err)
	}
	numbered(p, "sent", e.Bottom.Bodies(), map[string]int{"m": sent})
	numbered(p, "received", e.Top.Bodies(), map[string]int{"m": received})
	if n := len(results.Results()); n != sent {
		p.Errorf("%d results of %d", n, sent)
	}
	alternate(p, e.Top.Views())
	for _, w := range windows {
		w.check(p)
	}
}

// A layer that changes bodies and one that holds messages change places: every
// message is changed once.
func TestSwapChangesBodiesOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mark := func(name string) channel.Interceptor {
			return channel.Transform(channel.Descriptor{Name: name, Mutates: true},
				func(m *channel.Message) error { m.Body = append(m.Body, '+'); return nil },
				func(m *channel.Message) error {
					body, ok := strings.CutSuffix(string(m.Body), "+")
					if !ok {
						return channel.ErrBadMessage
					}
					m.Body = []byte(body)
					return nil
				})
		}
		one, w := mark("one"), &window{name: "w", delay: time.Millisecond}
		e := channeltest.Embed(t, one, w)
		results := new(channeltest.Recorder)
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range 400 {
				if err := e.SendDone(t.Context(), peers[:1], fmt.Appendf(nil, "m %d ", i), channel.SendAck, results); err != nil {
					t.Error(err)
				}
				if err := e.ReceiveBody(peers[0], channel.SendNone, fmt.Sprintf("m %d +", i)); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Millisecond)
			}
		})
		for i := range 40 {
			time.Sleep(9 * time.Millisecond)
			switch i % 4 {
			case 0:
				swapTo(t, e.Channel, w, one)
			case 1:
				swapTo(t, e.Channel, mark("two"), w) // another version, on the other side
			case 2:
				swapTo(t, e.Channel, w, mark("three"))
			case 3:
				swapTo(t, e.Channel, one, w)
			}
		}
		wg.Wait()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		numbered(t, "sent", e.Bottom.Bodies(), map[string]int{"m": 400})
		numbered(t, "received", e.Top.Bodies(), map[string]int{"m": 400})
		for _, b := range e.Bottom.Bodies() {
			if strings.Count(b, "+") != 1 {
				t.Fatalf("%q was sent", b)
			}
		}
		for _, b := range e.Top.Bodies() {
			if strings.Contains(b, "+") {
				t.Fatalf("%q was delivered", b)
			}
		}
	})
}
