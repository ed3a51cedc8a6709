package plugins

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

var modes = []core.PluginMode{core.Direct, core.Bridged, core.Process}

func TestManagerInAllModes(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			h, metrics := newTestHost(t, nil)
			testManager(t, h, metrics, mode)
		})
	}
	t.Run("stream", func(t *testing.T) {
		h, metrics := newTestHost(t, func(c *Config) { c.Stream = true })
		testManager(t, h, metrics, core.Process)
	})
}

func TestManagerBridgedInVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, metrics := newTestHost(t, nil)
		testManager(t, h, metrics, core.Bridged)
		time.Sleep(time.Hour) // heartbeats of an hour
		if st := h.Status()[0]; st.State != stateStopped {
			t.Errorf("state %q", st.State)
		}
	})
}

func testManager(t *testing.T, h *Host, metrics *channel.Metrics, mode core.PluginMode) {
	t.Helper()
	ctx := t.Context()
	host := newFakeHost()
	a, b := member(1), member(2)
	fault := &channel.SendError{Faults: []channel.Fault{{Member: b, Err: channel.ErrAckTimeout}}}
	var sent []string
	host.send = func(_ context.Context, to []channel.Member, o channel.Options, body []byte) error {
		sent = append(sent, fmt.Sprint(len(to), o, string(body)))
		if string(body) == "half" {
			return fault
		}
		return nil
	}
	mgr := startManager(t, h, metrics, mode, host)

	mgr.HandleView(ctx, channel.View{Version: 7, Local: member(9), Members: []channel.Member{a, b}})
	if got := receive(t, host.updates); got != "view 7 2" {
		t.Errorf("view arrived as %q", got)
	}
	if err := mgr.Commit(ctx, []byte("abc"), core.Synced); err != nil {
		t.Fatal(err)
	}
	select { // merged before the answer is seen
	case got := <-host.updates:
		if got != "commit sync abc" {
			t.Errorf("commit arrived as %q", got)
		}
	default:
		t.Error("the update came after the answer")
	}
	if err := mgr.Commit(ctx, []byte("error:boom"), core.Async); !errors.Is(err, session.ErrTooLarge) || !strings.Contains(err.Error(), "boom") {
		t.Errorf("error crossed the border as %v", err)
	}
	if err := mgr.Commit(ctx, []byte("send:whole"), core.Async); err != nil {
		t.Error(err)
	}
	err := mgr.Commit(ctx, []byte("send:half"), core.Async)
	var se *channel.SendError
	if !errors.As(err, &se) || len(se.Faults) != 1 || se.Faults[0].Member != b || !errors.Is(err, channel.ErrAckTimeout) {
		t.Errorf("SendError crossed the border as %#v", err)
	}
	if want := []string{"2 byte, sync, use_ack whole", "2 byte, sync, use_ack half"}; fmt.Sprint(sent) != fmt.Sprint([]string{fmt.Sprint(2, channel.SendSyncAck, "whole"), fmt.Sprint(2, channel.SendSyncAck, "half")}) {
		t.Errorf("sent %q, want about %q", sent, want)
	}
	if r, err := mgr.Load(ctx, session.Key{Context: "c", ID: "none"}); r != nil || err != nil {
		t.Errorf("load of nothing: %v, %v", r, err)
	}
	r, err := mgr.Load(ctx, session.Key{Context: "c", ID: "i"})
	if err != nil || r.Key != (session.Key{Context: "c", ID: "i"}) || r.MaxInactive != time.Hour || r.Created != 1 || r.RenewedTo != "x" {
		t.Errorf("load: %+v, %v", r, err)
	}
	if err := mgr.Release(ctx, []session.Key{{Context: "c", ID: "i"}, {Context: "d", ID: "j"}}); err != nil {
		t.Error(err)
	}
	done := make(chan error, 1)
	mgr.HandleMessage(ctx, a, []byte("m1"), func(err error) { done <- err })
	if err := receive(t, done); err != nil {
		t.Error(err)
	}
	if got := receive(t, host.updates); got != "message d1 m1" {
		t.Errorf("message arrived as %q", got)
	}
	mgr.HandleMessage(ctx, a, []byte("fail"), func(err error) { done <- err })
	if err := receive(t, done); !errors.Is(err, session.ErrInvalid) {
		t.Errorf("message failed with %v", err)
	}
	st, err := mgr.Status(ctx)
	if err != nil || !st.Ready || st.State != "hello" || st.Sessions != 1 || st.Tombstones != 2 || st.Transfer != time.Second {
		t.Errorf("status: %+v, %v", st, err)
	}
	keys, err := mgr.Keys(ctx, 5)
	if err != nil || len(keys) != 1 || keys[0].Attributes != 5 || !keys[0].Created.Equal(time.UnixMilli(1234)) {
		t.Errorf("keys: %+v, %v", keys, err)
	}
	if err := mgr.Commit(ctx, []byte("resync"), core.Async); err != nil {
		t.Error(err)
	}
	receive(t, host.resyncs)

	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := mgr.Commit(short, []byte("hang"), core.Async); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a call that hangs ended with %v", err)
	}

	sent = nil
	if err := mgr.Stop(ctx); err != nil {
		t.Error(err)
	}
	if len(sent) != 1 || !strings.HasSuffix(sent[0], "bye") {
		t.Errorf("the host was not usable during Stop: %q", sent)
	}
	if err := mgr.Stop(ctx); err != nil && mode != core.Direct {
		t.Errorf("second stop: %v", err)
	}
	if mode != core.Direct {
		if err := mgr.Commit(ctx, []byte("x"), core.Async); !errors.Is(err, channel.ErrClosed) {
			t.Errorf("commit after stop: %v", err)
		}
	}
}

func TestMembershipInAllModes(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			h, metrics := newTestHost(t, nil)
			m, err := h.Membership(core.PluginSpec{Name: "fake", Mode: mode}, testSettings(t, metrics))
			if err != nil {
				t.Fatal(err)
			}
			events := make(chan channel.MemberEvent, 100)
			local := member(9)
			err = m.Start(t.Context(), local, []channel.Member{member(1), member(2)}, sinkFunc(func(ev channel.MemberEvent) { events <- ev }))
			if err != nil {
				t.Fatal(err)
			}
			if ev := receive(t, events); ev.Member.Payload != "started local d9 known 2" {
				t.Errorf("started: %q", ev.Member.Payload)
			}
			for i, kind := range []channel.MemberEventKind{channel.MemberAdded, channel.MemberUpdated, channel.MemberLost, channel.MemberLeft} {
				local.Domain = fmt.Sprintf("%d %d", kind, i+10)
				if err := m.Update(t.Context(), local); err != nil {
					t.Fatal(err)
				}
				ev := receive(t, events)
				if ev.Kind != kind || ev.Member != member(byte(i+10)) {
					t.Errorf("event arrived as %v", ev)
				}
				if kind == channel.MemberLost && !errors.Is(ev.Err, channel.ErrAckTimeout) {
					t.Errorf("reason arrived as %v", ev.Err)
				}
			}
			for range 2 {
				if err := m.Stop(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestDeployerInAllModes(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			h, metrics := newTestHost(t, nil)
			d, err := h.Deployer(core.PluginSpec{Name: "fake", Mode: mode}, testSettings(t, metrics))
			if err != nil {
				t.Fatal(err)
			}
			host := &fakeDeployerHost{err: fmt.Errorf("no room: %w", channel.ErrTooLarge)}
			if err := d.Start(t.Context(), host); err != nil {
				t.Fatal(err)
			}
			list, err := d.Status(t.Context())
			if err != nil || len(list) != 1 || list[0].Path != "/shop" || list[0].State != "failed" || !strings.HasPrefix(list[0].Error, "no room") {
				t.Errorf("status: %+v, %v", list, err)
			}
			host.mu.Lock()
			host.err = nil
			host.mu.Unlock()
			if err := d.Stop(t.Context()); err != nil {
				t.Error(err)
			}
			if got := fmt.Sprint(host.calls); got != "[apply /shop 2 abc /work-dir remove /shop]" {
				t.Errorf("host saw %s", got)
			}
		})
	}
}

func TestUnstartedStopAndRefusals(t *testing.T) {
	h, metrics := newTestHost(t, nil)
	for _, mode := range modes {
		m, err := h.Manager(core.PluginSpec{Name: "fake", Mode: mode}, testSettings(t, metrics))
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := m.Stop(t.Context()); err != nil {
				t.Errorf("%s: stop without start: %v", mode, err)
			}
		}
		if mode != core.Direct {
			if err := m.Start(t.Context(), newFakeHost()); !errors.Is(err, channel.ErrClosed) {
				t.Errorf("%s: start after stop: %v", mode, err)
			}
		}
	}
	for _, c := range []struct {
		kind string
		spec core.PluginSpec
		want string
	}{
		{"manager", core.PluginSpec{Name: "fakee"}, `did you mean "fake"`},
		{"stomach", core.PluginSpec{Name: "fake"}, `unknown kind of plugin "stomach"`},
		{"manager", core.PluginSpec{Name: "fake", Mode: "remote"}, `unknown mode "remote"`},
		{"manager", core.PluginSpec{Name: "fake", Options: []byte("greetings: x"), Origin: "server.yaml:12"}, "server.yaml:12"},
		{"membership", core.PluginSpec{Name: "fake", Options: []byte("greeting: bad")}, "must not be bad"},
	} {
		if err := h.Check(c.kind, c.spec); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("check %s %+v: %v, want %q", c.kind, c.spec, err, c.want)
		}
	}
	if err := h.Check("manager", core.PluginSpec{Name: "fake", Options: []byte("greeting: hi")}); err != nil {
		t.Error(err)
	}
}

func TestStartErrorKeepsItsIdentity(t *testing.T) {
	for _, mode := range modes {
		h, metrics := newTestHost(t, nil)
		m, err := h.Manager(core.PluginSpec{Name: "fake", Mode: mode, Options: []byte("fail: true")}, testSettings(t, metrics))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(t.Context(), newFakeHost()); !errors.Is(err, channel.ErrNotConfigured) || !strings.Contains(err.Error(), "told to fail") {
			t.Errorf("%s: start: %v", mode, err)
		}
	}
}
