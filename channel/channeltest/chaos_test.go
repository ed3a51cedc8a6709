package channeltest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
)

func must(t testing.TB) func(channel.Interceptor, error) channel.Interceptor {
	return func(i channel.Interceptor, err error) channel.Interceptor {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
}

var noSettings = channel.Settings{}

// exchange sends n messages of each kind to each of to, receives n, and
// returns the failures by body.
func exchange(t *testing.T, e *Embedded, n int, to ...channel.Member) map[string]error {
	t.Helper()
	failed := map[string]error{}
	done := new(Recorder)
	for i := range n {
		body := fmt.Sprintf("sync %d", i)
		if err := e.Send(t.Context(), to, []byte(body), channel.SendAck); err != nil {
			failed[body] = err
		}
		body = fmt.Sprintf("done %d", i)
		if err := e.SendDone(t.Context(), to, []byte(body), channel.SendAck, done); err != nil {
			failed[body] = err
		}
		body = fmt.Sprintf("in %d", i)
		if err := e.ReceiveBody(to[0], channel.SendNone, body); err != nil {
			failed[body] = err
		}
	}
	time.Sleep(time.Second)
	if got := len(done.Results()); got != n {
		t.Errorf("%d results for %d messages", got, n)
	}
	for _, r := range done.Results() {
		if r.Err != nil {
			failed["done "+r.ID.String()] = r.Err
		}
	}
	return failed
}

func count(bodies []string, prefix string) (n int) {
	for _, b := range bodies {
		if strings.HasPrefix(b, prefix) {
			n++
		}
	}
	return n
}

func TestDropLosesAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Member(1), Member(2)
		e := Embed(t, must(t)(NewDrop(DropConfig{Hits: Hits{Rate: 0.5, Direction: Both, To: []string{"node2", "embedded"}}}, noSettings)))
		failed := exchange(t, e, 100, a, b)
		toA, toB := 0, 0
		for _, m := range e.Bottom.Messages() {
			for _, to := range m.To {
				if to.Is(a) {
					toA++
				} else {
					toB++
				}
			}
		}
		if toA != 200 {
			t.Errorf("%d of 200 messages reached the node that is not to be hit", toA)
		}
		if toB < 50 || toB > 150 {
			t.Errorf("%d of 200 messages reached the other", toB)
		}
		in := count(e.Top.Bodies(), "in")
		if in < 20 || in > 80 {
			t.Errorf("%d of 100 arrived", in)
		}
		if len(failed) != 200-toB+100-in {
			t.Errorf("%d failures for %d lost messages", len(failed), 200-toB+100-in)
		}
		for body, err := range failed {
			var se *channel.SendError
			if !errors.Is(err, ErrDropped) || !errors.Is(err, channel.ErrAckTimeout) {
				t.Errorf("%s: %v", body, err)
			}
			if !strings.HasPrefix(body, "in") && (!errors.As(err, &se) || len(se.Faults) != 1 || !se.Faults[0].Member.Is(b)) {
				t.Errorf("%s: %v", body, err)
			}
		}
	})
}

func TestDropSilently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := Embed(t, must(t)(NewDrop(DropConfig{Hits: Hits{Rate: 1, Direction: Both}, Silent: true}, noSettings)))
		if failed := exchange(t, e, 10, Member(1)); len(failed) > 0 {
			t.Errorf("failures: %v", failed)
		}
		if n := len(e.Bottom.Bodies()) + len(e.Top.Bodies()); n != 0 {
			t.Errorf("%d messages got through", n)
		}
	})
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := Embed(t, must(t)(NewDelay(DelayConfig{Hits: Hits{Rate: 1, Direction: SendOnly}, Min: 10 * time.Millisecond, Max: 20 * time.Millisecond}, noSettings)))
		seen := map[time.Duration]bool{}
		for range 20 {
			start := time.Now()
			if err := e.Send(t.Context(), []channel.Member{Member(1)}, nil, channel.SendAck); err != nil {
				t.Fatal(err)
			}
			d := time.Since(start)
			if d < 10*time.Millisecond || d > 20*time.Millisecond {
				t.Errorf("took %v", d)
			}
			seen[d] = true
		}
		if len(seen) < 10 {
			t.Errorf("only %d different delays", len(seen))
		}
		start := time.Now()
		if err := e.ReceiveBody(Member(1), 0, "x"); err != nil || time.Since(start) != 0 {
			t.Errorf("the other direction: %v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		start = time.Now()
		_ = e.Send(ctx, []channel.Member{Member(1)}, nil, channel.SendAck)
		if time.Since(start) != time.Millisecond {
			t.Error("did not end with its context")
		}
	})
}

func TestDup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := Embed(t, must(t)(NewDup(DupConfig{Hits: Hits{Rate: 1, Direction: Both, From: []string{"embedded", "10.0.0.1"}}}, noSettings)))
		if failed := exchange(t, e, 10, Member(1)); len(failed) > 0 {
			t.Errorf("failures: %v", failed)
		}
		if err := e.ReceiveBody(Member(2), 0, "other"); err != nil {
			t.Error(err)
		}
		for prefix, bodies := range map[string][]string{"sync": e.Bottom.Bodies(), "done": e.Bottom.Bodies(), "in": e.Top.Bodies()} {
			if n := count(bodies, prefix); n != 20 {
				t.Errorf("%s: %d instead of 20", prefix, n)
			}
		}
		if n := count(e.Top.Bodies(), "other"); n != 1 {
			t.Errorf("a message of a sender that is not to be hit came %d times", n)
		}
		ids := map[channel.UniqueID]int{}
		for _, m := range e.Bottom.Messages() {
			ids[m.ID]++
		}
		if len(ids) != 20 {
			t.Errorf("%d ids of 20 messages", len(ids))
		}
	})
}

func TestShuffle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := DefaultShuffle
		cfg.Seed = 3
		e := Embed(t, must(t)(NewShuffle(cfg, noSettings)))
		if failed := exchange(t, e, 50, Member(1)); len(failed) > 0 {
			t.Errorf("failures: %v", failed)
		}
		for prefix, bodies := range map[string][]string{"sync": e.Bottom.Bodies(), "done": e.Bottom.Bodies(), "in": e.Top.Bodies()} {
			var got, want []string
			for _, b := range bodies {
				if strings.HasPrefix(b, prefix) {
					got = append(got, b)
				}
			}
			for i := range 50 {
				want = append(want, fmt.Sprintf("%s %d", prefix, i))
			}
			if ordered := slices.Equal(got, want); ordered != (prefix == "sync") {
				t.Errorf("%s: in order: %v", prefix, ordered)
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("%s: %q", prefix, got)
			}
		}
		// What is held goes on when the layer is taken out.
		if err := e.Send(t.Context(), []channel.Member{Member(1)}, []byte("last"), channel.SendAsync); err != nil {
			t.Error(err)
		}
		if err := e.Swap(t.Context(), nil); err != nil {
			t.Error(err)
		}
		if count(e.Bottom.Bodies(), "last") != 1 {
			t.Error("the last message was lost")
		}
	})
}

func TestCorrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := Embed(t, must(t)(NewCorrupt(CorruptConfig{Hits: Hits{Rate: 1, Direction: Both}, Bits: 1}, noSettings)))
		body := []byte("0123456789")
		if err := e.Send(t.Context(), []channel.Member{Member(1)}, body, channel.SendAck); err != nil {
			t.Fatal(err)
		}
		if string(body) != "0123456789" {
			t.Error("the caller's buffer was damaged")
		}
		if err := e.ReceiveBody(Member(1), 0, string(body)); err != nil {
			t.Fatal(err)
		}
		for _, got := range append(e.Bottom.Bodies(), e.Top.Bodies()...) {
			bits := 0
			for i := range body {
				for x := body[i] ^ got[i]; x != 0; x &= x - 1 {
					bits++
				}
			}
			if len(got) != len(body) || bits != 1 {
				t.Errorf("%q differs in %d bits", got, bits)
			}
		}
		if err := e.Send(t.Context(), []channel.Member{Member(1)}, nil, channel.SendAck); err != nil {
			t.Errorf("an empty body: %v", err)
		}
	})
}

func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := Embed(t, must(t)(NewHold(HoldConfig{Hits: Hits{Rate: 1, Direction: SendOnly, To: []string{"node1"}}, Time: time.Second}, noSettings)))
		start := time.Now()
		ended := make(chan time.Duration, 2)
		for _, m := range []int{1, 2} {
			go func() {
				_ = e.Send(t.Context(), []channel.Member{Member(m)}, nil, channel.SendAck)
				ended <- time.Since(start)
			}()
			synctest.Wait()
			time.Sleep(100 * time.Millisecond)
		}
		for range 2 { // the pause of one holds up the other
			if d := <-ended; d != time.Second {
				t.Errorf("took %v", d)
			}
		}
		start = time.Now()
		_ = e.Send(t.Context(), []channel.Member{Member(2)}, nil, channel.SendAck)
		if d := time.Since(start); d != 0 {
			t.Errorf("after the pause: %v", d)
		}
	})
}

// The same seed hits the same messages; another one others.
func TestChaosRepeats(t *testing.T) {
	lost := func(seed uint64) string {
		e := Embed(t, must(t)(NewDrop(DropConfig{Hits: Hits{Rate: 0.3, Direction: Both, Seed: seed}, Silent: true}, noSettings)))
		for i := range 100 {
			if err := e.Send(t.Context(), []channel.Member{Member(1 + i%3)}, fmt.Append(nil, i), channel.SendAck); err != nil {
				t.Fatal(err)
			}
		}
		return strings.Join(e.Bottom.Bodies(), " ")
	}
	first := lost(1)
	if again := lost(1); again != first {
		t.Error("one seed, two results")
	}
	if lost(2) == first {
		t.Error("two seeds, one result")
	}
}

// All of them are configurable, have defaults that are valid, refuse nonsense,
// and warn at their start.
func TestChaosFactories(t *testing.T) {
	for _, f := range Chaos() {
		if err := f.Check(channel.NoConfig); err != nil {
			t.Errorf("%s: defaults: %v", f.Name, err)
		}
		core, logs := observer.New(zap.WarnLevel)
		i, err := f.New(channel.NoConfig, channel.Settings{Logger: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		if i.Descriptor().Name != f.Name || i.Descriptor().Promise == "" {
			t.Errorf("%s: %+v", f.Name, i.Descriptor())
		}
		e := Embed(t, i)
		_ = e.Send(t.Context(), []channel.Member{Member(1)}, []byte("x"), channel.SendAck)
		if logs.Len() != 1 {
			t.Errorf("%s: %d warnings", f.Name, logs.Len())
		}
	}
	bad := Hits{Rate: 2, Direction: "sideways"}
	for _, v := range []channel.Validator{
		&DropConfig{Hits: bad}, &DelayConfig{Hits: bad, Min: 2, Max: 1}, &DupConfig{Hits: bad},
		&ShuffleConfig{Hits: bad}, &CorruptConfig{Hits: bad}, &HoldConfig{Hits: bad},
	} {
		if err := v.Validate(); err == nil || !strings.Contains(err.Error(), "rate is 2") || !strings.Contains(err.Error(), "sideways") {
			t.Errorf("%T: %v", v, err)
		}
	}
}
