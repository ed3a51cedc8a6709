package plugins

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
)

// TestKilledTenTimesUnderLoad kills the process of an interceptor ten times
// while a thousand messages a second pass it in each direction: every message
// comes out once, in order.
func TestKilledTenTimesUnderLoad(t *testing.T) {
	const kills, each = 10, 2500
	h, metrics := newTestHost(t, quickRestarts)
	l, err := h.Interceptor(core.PluginSpec{Name: "acme/flip", Mode: core.Process, OnDown: core.Wait, Timeout: 20 * time.Second}, testSettings(t, metrics))
	if err != nil {
		t.Fatal(err)
	}
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{l}})
	var load sync.WaitGroup
	var failed atomic.Int64
	pace := func(f func(n int)) {
		load.Go(func() {
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for n := range each {
				<-tick.C
				f(n)
			}
		})
	}
	told := completion(func(_ *channel.Message, err error) {
		if err != nil {
			failed.Add(1)
			t.Error(err)
		}
		load.Done()
	})
	pace(func(n int) {
		load.Add(1)
		if err := e.SendDone(context.Background(), to[:1], fmt.Append(nil, "down ", n), channel.SendAck, told); err != nil {
			t.Error(err)
			load.Done()
		}
	})
	pace(func(n int) {
		body := fmt.Append(nil, "up ", n)
		slices.Reverse(body)
		if err := e.ReceiveBody(to[1], channel.SendNone|fakeFlag, string(body)); err != nil {
			t.Error(err)
		}
	})
	pace(func(n int) {
		if n%10 == 0 { // these wait
			if err := e.Send(context.Background(), to[:1], fmt.Append(nil, "wait ", n), channel.SendAck); err != nil {
				t.Error(err)
			}
		}
	})
	var restarts []time.Duration
	for range kills {
		time.Sleep(150 * time.Millisecond) // traffic between two kills, not a synchronisation
		before := h.Status()[0]
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		killed := time.Now()
		for h.Status()[0].Generation == before.Generation || h.Status()[0].State != stateReady {
			if time.Since(killed) > time.Minute {
				t.Fatalf("not restarted: %+v", h.Status()[0])
			}
			time.Sleep(200 * time.Microsecond)
		}
		restarts = append(restarts, time.Since(killed))
	}
	load.Wait()
	waitBodies(t, e.Top, each)
	check := func(what string, got []string, prefix string, step int) {
		n := 0
		for _, b := range got {
			if !strings.HasPrefix(b, prefix) {
				continue
			}
			if b != fmt.Sprint(prefix, n) {
				t.Fatalf("%s: %q came when it was the turn of %d", what, b, n)
			}
			n += step
		}
		if n != each {
			t.Errorf("%s: %d of %d", what, n, each)
		}
	}
	sent := make([]string, 0, 2*each)
	for _, m := range e.Bottom.Messages() {
		b := slices.Clone(m.Body)
		slices.Reverse(b)
		sent = append(sent, string(b))
	}
	check("sent", sent, "down ", 1)
	check("sent and waited for", sent, "wait ", 10)
	check("received", e.Top.Bodies(), "up ", 1)
	slices.Sort(restarts)
	t.Logf("%d kills, %d messages sent and %d received: %d lost or failed, none twice; %d were given to a successor; restarts took %v to %v, median %v",
		kills, len(sent), each, failed.Load(), int(total(metrics, "plugin_messages_replayed_total")), restarts[0].Round(time.Millisecond/10), restarts[kills-1].Round(time.Millisecond/10), restarts[kills/2].Round(time.Millisecond/10))
}

type completion func(*channel.Message, error)

func (f completion) Complete(m *channel.Message, err error) { f(m, err) }

// total adds up a metric over all labels.
func total(m *channel.Metrics, name string) float64 { return channeltest.Sum(m, name) }

// quickRestarts lets a plugin end often.
func quickRestarts(c *Config) { c.MaxDeaths, c.BackoffMax = 100, 50*time.Millisecond }

// One message that every process dies of fails, and takes no other with it.
func TestPoisonousMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, metrics := newTestHost(t, quickRestarts)
		e := embedPlugin(t, h, metrics, core.PluginSpec{Name: "acme/flip", Mode: core.Bridged, OnDown: core.Wait, Timeout: time.Minute})
		r := sendResults{make(chan error, 100)}
		for n := range 20 {
			body := fmt.Sprint("good ", n)
			if n == 7 {
				body = "die"
			}
			if err := e.SendDone(t.Context(), to[:1], []byte(body), channel.SendAck, r); err != nil {
				t.Fatal(err)
			}
		}
		var failures []error
		for range 20 {
			if err := receive(t, r.ch); err != nil {
				failures = append(failures, err)
			}
		}
		if len(failures) != 1 || !errors.Is(failures[0], channel.ErrPluginDown) || !strings.Contains(failures[0].Error(), "processes ended over this message") {
			t.Errorf("failed: %v", failures)
		}
		if got := len(e.Bottom.Messages()); got != 19 {
			t.Errorf("%d sent", got)
		}
		if n := total(metrics, "plugin_messages_poison_total"); n != 1 {
			t.Errorf("%v counted as poison", n)
		}
	})
}

func TestOnDown(t *testing.T) {
	for _, policy := range []core.OnDown{core.Fail, core.Wait, core.Bypass} {
		t.Run(string(policy), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				// It is down for long: the second start fails until the test says so.
				h, metrics := newTestHost(t, func(c *Config) { c.BackoffMin, c.BackoffMax = 10*time.Second, 10*time.Second })
				name := "acme/brittle"
				e := embedPlugin(t, h, metrics, core.PluginSpec{Name: name, Mode: core.Bridged, OnDown: policy, Timeout: 5 * time.Second})
				if err := e.Send(t.Context(), to, []byte("one"), channel.SendAck); err != nil {
					t.Fatal(err)
				}
				brittle.broken.Store(true)
				defer brittle.broken.Store(false)
				r := sendResults{make(chan error, 2)}
				if err := e.SendDone(t.Context(), to, []byte("die"), channel.SendAck, r); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
				begun := time.Now()
				err := e.Send(t.Context(), to, []byte("two"), channel.SendAck)
				took := time.Since(begun)
				up := e.ReceiveBody(to[0], channel.SendSyncAck, "three")
				switch policy {
				case core.Fail:
					if !errors.Is(err, channel.ErrPluginDown) || !errors.Is(up, channel.ErrPluginDown) || took > 0 {
						t.Errorf("sent with %v after %v, received with %v", err, took, up)
					}
				case core.Wait:
					if !errors.Is(err, channel.ErrPluginDown) || !errors.Is(err, context.DeadlineExceeded) || took != 5*time.Second {
						t.Errorf("sent with %v after %v", err, took)
					}
				case core.Bypass:
					if err != nil || up != nil || took > 0 {
						t.Errorf("sent with %v after %v, received with %v", err, took, up)
					}
				}
				if policy != core.Wait && total(metrics, "plugin_messages_refused_total") == 0 {
					t.Error("nothing was refused")
				}
				brittle.broken.Store(false)
				time.Sleep(30 * time.Second)
				if died := receive(t, r.ch); policy != core.Bypass && !errors.Is(died, context.DeadlineExceeded) || policy == core.Bypass && died != nil {
					t.Errorf("the message it died of ended with %v", died)
				}
				if err := e.Send(t.Context(), to, []byte("four"), channel.SendAck); err != nil {
					t.Errorf("after the restart: %v", err)
				}
			})
		})
	}
}

func TestBypassIsRefusedForTransforms(t *testing.T) {
	h, metrics := newTestHost(t, nil)
	for _, mode := range []core.PluginMode{core.Bridged, core.Process} {
		_, err := h.Interceptor(core.PluginSpec{Name: "acme/flip", Mode: mode, OnDown: core.Bypass}, testSettings(t, metrics))
		if err == nil || !strings.Contains(err.Error(), `on_down must not be "bypass"`) {
			t.Errorf("%s: %v", mode, err)
		}
	}
	if err := h.Check(KindInterceptor, core.PluginSpec{Name: "acme/flip", OnDown: "pass"}); err == nil || !strings.Contains(err.Error(), `unknown on_down "pass"`) {
		t.Errorf("check: %v", err)
	}
	if n := len(h.Status()); n != 0 {
		t.Errorf("%d instances", n)
	}
}

// A handler that does not return costs its message, and when nothing else is
// answered either, the process.
func TestStuckHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, metrics := newTestHost(t, nil)
		e := embedPlugin(t, h, metrics, core.PluginSpec{Name: "acme/flip", Mode: core.Bridged, Timeout: 2 * time.Second})
		r := sendResults{make(chan error, 10)}
		for range 4 { // one lane: those behind it are stuck too
			if err := e.SendDone(t.Context(), to[:1], []byte("sleep"), channel.SendAck, r); err != nil {
				t.Fatal(err)
			}
		}
		for n := range 4 {
			if err := receive(t, r.ch); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, channel.ErrPluginDown) {
				t.Errorf("message %d ended with %v", n, err)
			}
		}
		time.Sleep(2 * time.Hour)
		if st := h.Status()[0]; st.Generation != 2 || !strings.Contains(st.LastError, "in a row were not handled") {
			t.Errorf("status %+v", st)
		}
		if err := e.Send(t.Context(), to, []byte("fine"), channel.SendAck); err != nil {
			t.Error(err)
		}
	})
}

// Messages do not wait for an observer, whatever it does.
func TestObserverIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, metrics := newTestHost(t, nil)
		e := embedPlugin(t, h, metrics, core.PluginSpec{Name: "acme/watch", Mode: core.Bridged, Window: 4, OnDown: core.Bypass})
		begun := time.Now()
		for range 20 {
			if err := e.Send(t.Context(), to, []byte("sleep"), channel.SendAck); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(begun); took > 0 {
			t.Errorf("waited %v for an observer", took)
		}
		if n := len(e.Bottom.Messages()); n != 20 {
			t.Errorf("%d sent", n)
		}
		if seen, missed := total(metrics, "plugin_messages_total"), total(metrics, "plugin_messages_missed_total"); seen < 4 || seen+missed != 20 {
			t.Errorf("the observer saw %v and missed %v", seen, missed)
		}
	})
}

// A full window holds up who sends, and nothing is lost.
func TestFullWindowHoldsUpTheSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, metrics := newTestHost(t, nil)
		e := embedPlugin(t, h, metrics, core.PluginSpec{Name: "acme/brittle", Mode: core.Bridged, OnDown: core.Wait, Window: 8, Timeout: time.Hour})
		r := sendResults{make(chan error, 100)}
		var accepted atomic.Int64
		var senders sync.WaitGroup
		senders.Go(func() {
			for n := range 30 {
				if err := e.SendDone(t.Context(), to[:1], fmt.Append(nil, "slow ", n), channel.SendAck, r); err != nil {
					t.Error(err)
				}
				accepted.Add(1)
			}
		})
		synctest.Wait()
		if n := accepted.Load(); n != 8 {
			t.Errorf("%d accepted into a window of 8", n)
		}
		senders.Wait()
		for range 30 {
			if err := receive(t, r.ch); err != nil {
				t.Error(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		for n := range 9 {
			if err := e.SendDone(ctx, to[:1], []byte("slow"), channel.SendAck, r); n < 8 && err != nil || n == 8 && !errors.Is(err, channel.ErrQueueFull) {
				t.Errorf("message %d: %v", n, err)
			}
		}
	})
}

// brittleState lets a test decide whether the brittle layer can be made.
var brittle struct{ broken atomic.Bool }

// newBrittle returns a layer that dies on demand and takes a second for a slow
// message.
func newBrittle(layerConfig, channel.Settings) (channel.Interceptor, error) {
	if brittle.broken.Load() {
		return nil, errors.New("brittle: out of order")
	}
	pass := func(m *channel.Message) error { return nil }
	return channel.Transform(channel.Descriptor{Name: "acme/brittle"}, func(m *channel.Message) error {
		if string(m.Body) == "die" {
			panic("brittle: told to die")
		}
		if strings.HasPrefix(string(m.Body), "slow") {
			time.Sleep(time.Second)
		}
		return nil
	}, pass), nil
}

// A live swap in place of the plugin: Flush waits for what is on its way.
func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, metrics := newTestHost(t, nil)
		l, err := h.Interceptor(core.PluginSpec{Name: "acme/brittle", Mode: core.Bridged}, testSettings(t, metrics))
		if err != nil {
			t.Fatal(err)
		}
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{l}})
		flusher := l.(channel.Flusher)
		if err := flusher.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		r := sendResults{make(chan error, 2)}
		for range 2 {
			if err := e.SendDone(t.Context(), to[:1], []byte("slow"), channel.SendAck, r); err != nil {
				t.Fatal(err)
			}
		}
		begun := time.Now()
		if err := flusher.Flush(t.Context()); err != nil || time.Since(begun) != 2*time.Second || len(r.ch) != 2 {
			t.Errorf("flush: %v after %v with %d through", err, time.Since(begun), len(r.ch))
		}
	})
}
