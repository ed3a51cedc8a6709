package peer_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// Listeners that fail, on both sides: who waits for the processing is told,
// and nothing is delivered to us twice although Tribes sends a message again
// after a negative acknowledgement.
func testFailures(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	fails := func(m *channel.Message) (bool, error) {
		if strings.HasPrefix(string(m.Body), "fail") {
			return true, errors.New("the listener fails as the test wants it")
		}
		return true, nil
	}
	a := g.longhouse(func(c *nodeConfig) { c.reply = fails })
	b := g.tribes(func(c *peer.Config) { c.Stack = []string{"dispatch", "detector"}; c.FailOn = "fail" })
	c := g.longhouse(nil)
	together(t, []*longhouse{a, c}, []*peer.Node{b})

	t.Run("ours", func(t *testing.T) {
		to := []channel.Member{a.member(b.ID()), a.member(c.id())}
		for _, o := range []struct {
			name    string
			options channel.Options
			told    bool
		}{
			{"none", channel.SendNone, false}, {"ack", channel.SendAck, false}, {"sync-ack", channel.SendSyncAck, true},
			{"async-sync-ack", channel.SendAsync | channel.UseAck | channel.SyncAck, true},
		} {
			body := []byte("fail " + o.name)
			var done channeltest.Recorder
			if err := a.SendDone(within(t), to, body, o.options, &done); err != nil {
				t.Fatalf("%s: %v", o.name, err)
			}
			if !done.WaitFor(within(t), func() bool { return len(done.Results()) > 0 }) {
				t.Fatalf("%s: no result", o.name)
			}
			err := done.Results()[0].Err
			var se *channel.SendError
			switch {
			case !o.told && err != nil:
				t.Errorf("%s: %v", o.name, err)
			case o.told && (!errors.Is(err, channel.ErrNegativeAck) || !errors.As(err, &se) || len(se.Faults) != 1 || se.Faults[0].Member.ID.String() != b.ID()):
				t.Errorf("%s: want a negative acknowledgement of the Tribes node alone, got: %v", o.name, err)
			}
		}
		// What comes after the last failing message shows that no second
		// copies are on their way.
		if err := a.Send(within(t), to, []byte("end"), channel.SendSyncAck); err != nil {
			t.Fatal(err)
		}
		once(t, b, "fail none", "fail ack", "fail sync-ack", "fail async-sync-ack", "end")
		c.once("fail none", "fail ack", "fail sync-ack", "fail async-sync-ack", "end")
	})

	t.Run("theirs", func(t *testing.T) {
		to := []string{a.id(), c.id()}
		for _, o := range []optionCase{{"none", channel.SendNone}, {"ack", channel.SendAck}} {
			if err := b.Send(within(t), peer.Send{To: to, Value: peer.Bytes("fail their " + o.name), Options: uint32(o.options)}); err != nil {
				t.Errorf("%s: %v", o.name, err)
			}
		}
		err := b.Send(within(t), peer.Send{To: to, Value: peer.Bytes("fail their sync-ack"), Options: uint32(channel.SendSyncAck)})
		var e *peer.Error
		if !errors.As(err, &e) || len(e.Faults) != 1 || e.Faults[a.id()] != "RemoteProcessException" {
			t.Errorf("sync-ack: want a RemoteProcessException for us, got: %v", err)
		}
		if err := b.Send(within(t), peer.Send{To: to, Value: peer.Bytes("fail their async-sync-ack"), Options: uint32(channel.SendSyncAck | channel.Async), Events: true}); err != nil {
			t.Errorf("async: %v", err)
		}
		if err := b.Wait(within(t), "failed", func(evs []peer.Event) bool {
			return len(evs) == 1 && evs[0].Values.Get("faults") == a.id()+"/RemoteProcessException"
		}); err != nil {
			t.Errorf("the failure of an asynchronous message was not told: %v", b.Events("failed"))
		}
		if err := b.Send(within(t), peer.Send{To: to, Value: peer.Bytes("their end"), Options: uint32(channel.SendSyncAck)}); err != nil {
			t.Error(err)
		}
		for _, n := range []*longhouse{a, c} {
			n.once("fail their none", "fail their ack", "fail their sync-ack", "fail their async-sync-ack", "their end")
		}
	})
}

// once checks that each of the bodies has been received exactly once, after it
// has been received at all.
func (n *longhouse) once(bodies ...string) {
	n.t.Helper()
	for _, b := range bodies {
		count := func() (times int) {
			for _, have := range n.got.Bodies() {
				if have == b {
					times++
				}
			}
			return times
		}
		n.wait(n.got, b, func() bool { return count() > 0 })
		if c := count(); c != 1 {
			n.t.Errorf("%q has been delivered to us %d times", b, c)
		}
	}
}

func once(t *testing.T, n *peer.Node, bodies ...string) {
	t.Helper()
	for _, b := range bodies {
		count := func(evs []peer.Event) (times int) {
			for _, e := range evs {
				if v, ok := e.Value().(peer.Bytes); ok && string(v) == b {
					times++
				}
			}
			return times
		}
		if err := n.Wait(within(t), "message", func(evs []peer.Event) bool { return count(evs) > 0 }); err != nil {
			t.Errorf("%q has not been delivered to the Tribes node", b)
		}
		if c := count(n.Events("message")); c > 1 {
			t.Errorf("%q has been delivered to the Tribes node %d times", b, c)
		}
	}
}

// A message that we finish later holds up its sender's synchronized
// acknowledgement, and nobody else.
func testDeferred(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	held := make(chan func(error), 1)
	a := g.longhouse(func(c *nodeConfig) {
		c.reply = func(m *channel.Message) (bool, error) {
			if string(m.Body) == "hold" {
				held <- m.Defer()
			}
			return true, nil
		}
	})
	b := g.tribes(nil)
	together(t, []*longhouse{a}, []*peer.Node{b})
	ended := make(chan error, 1)
	go func() {
		ended <- b.Send(within(t), peer.Send{To: []string{a.id()}, Value: peer.Bytes("hold"), Options: uint32(channel.SendSyncAck)})
	}()
	var finish func(error)
	select {
	case finish = <-held:
	case err := <-ended:
		t.Fatalf("the send ended before the message was processed: %v", err)
	}
	if err := b.Send(within(t), peer.Send{To: []string{a.id()}, Value: peer.Bytes("other"), Options: uint32(channel.SendSyncAck)}); err != nil {
		t.Errorf("beside a message that is held: %v", err)
	}
	select {
	case err := <-ended:
		t.Errorf("the send ended before the message was processed: %v", err)
	default:
	}
	finish(nil)
	if err := <-ended; err != nil {
		t.Errorf("the held message: %v", err)
	}
}

// A Tribes node that is stopped in its tracks acknowledges nothing: the send
// fails in time, names it, and reaches the others. What it took before it was
// stopped it delivers later.
func testSilent(t *testing.T) {
	j := startJVM(t)
	g := newGroup(t, j)
	a, c := g.longhouse(func(c *nodeConfig) { c.stack = []string{"dispatch"}; c.ackTimeout = time.Second }), g.longhouse(nil)
	b := g.tribes(nil)
	together(t, []*longhouse{a, c}, []*peer.Node{b})
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			if err := j.Resume(); err != nil {
				t.Error(err)
			}
		}
	}
	defer resume()
	ctx, cancel := context.WithTimeout(within(t), patience)
	defer cancel()
	err := a.Send(ctx, []channel.Member{a.member(b.ID()), a.member(c.id())}, []byte("into the silence"), channel.SendSyncAck)
	var se *channel.SendError
	if !errors.Is(err, channel.ErrAckTimeout) || !errors.As(err, &se) || len(se.Faults) != 1 || se.Faults[0].Member.ID.String() != b.ID() {
		t.Errorf("want a time-out for the Tribes node alone, got: %v", err)
	}
	c.once("into the silence")
	resume()
	once(t, b, "into the silence")
}
