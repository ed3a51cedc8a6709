package plugins

import (
	"context"
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

// TestSwapUnderLoad replaces the process of an interceptor by another one, as
// for a new version, five times under a thousand messages a second: every
// message comes out once, in order.
func TestSwapUnderLoad(t *testing.T) {
	const swaps, each = 5, 1500
	h, metrics := newTestHost(t, nil)
	next := func() channel.Interceptor {
		l, err := h.Interceptor(core.PluginSpec{Name: "acme/flip", Mode: core.Process, OnDown: core.Wait}, testSettings(t, metrics))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{next()}})
	var load sync.WaitGroup
	told := completion(func(_ *channel.Message, err error) {
		if err != nil {
			t.Error(err)
		}
		load.Done()
	})
	load.Add(each + 1)
	go func() {
		defer load.Done()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for n := range each {
			<-tick.C
			if err := e.SendDone(context.Background(), to[:1], fmt.Append(nil, "down ", n), channel.SendAck, told); err != nil {
				t.Error(err)
				load.Done()
			}
			body := fmt.Append(nil, "up ", n)
			slices.Reverse(body)
			if err := e.ReceiveBody(to[1], channel.SendNone|fakeFlag, string(body)); err != nil {
				t.Error(err)
			}
		}
	}()
	pids := map[int]bool{}
	for range swaps {
		for _, st := range h.Status() {
			if st.State == stateReady {
				pids[st.PID] = true
			}
		}
		stack, err := channel.NewStack(channel.Layer{Interceptor: next()})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Swap(t.Context(), stack); err != nil {
			t.Fatal(err)
		}
	}
	load.Wait()
	waitBodies(t, e.Top, each)
	check := func(got []string, prefix string) {
		if len(got) != each {
			t.Errorf("%s: %d of %d", prefix, len(got), each)
		}
		for n, b := range got {
			if !strings.HasPrefix(b, prefix) || b != fmt.Sprint(prefix, n) {
				t.Fatalf("%q came when it was the turn of %s%d", b, prefix, n)
			}
		}
	}
	var sent []string
	for _, m := range e.Bottom.Messages() {
		b := slices.Clone(m.Body)
		slices.Reverse(b)
		sent = append(sent, string(b))
	}
	check(sent, "down ")
	check(e.Top.Bodies(), "up ")
	if len(pids) != swaps {
		t.Errorf("%d processes for %d swaps", len(pids), swaps)
	}
	if n := len(h.Status()); n > 2 {
		t.Errorf("%d instances are kept", n)
	}
}
