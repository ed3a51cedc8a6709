package channel_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// spy notes member events and its view at that moment.
type spy struct {
	name string
	log  *[]string
	drop func(channel.MemberEvent) bool
}

func (s *spy) Descriptor() channel.Descriptor { return channel.Descriptor{Name: s.name} }
func (s *spy) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	*s.log = append(*s.log, fmt.Sprintf("%s %v %s, sees %d", s.name, ev.Kind, ev.Member.Name(), len(l.View().Members)))
	if s.drop != nil && s.drop(ev) {
		return nil
	}
	return l.Announce(ctx, ev)
}

func watched(e *channeltest.Embedded) (out []string) {
	for _, c := range e.Top.Views()[1:] {
		out = append(out, fmt.Sprintf("%v %s", c.Event.Kind, c.Event.Member.Name()))
	}
	return out
}

func TestEachLayerSeesItsOwnView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log []string
		keep := func(ev channel.MemberEvent) bool { return ev.Kind == channel.MemberLost }
		e := channeltest.Embed(t, &spy{"high", &log, nil}, queue(), &spy{"keeper", &log, keep}, &spy{"low", &log, nil})
		e.Observe(channel.MemberAdded, peers[0])
		e.Observe(channel.MemberLost, peers[0])
		e.Observe(channel.MemberAdded, peers[1])
		e.Observe(channel.MemberLeft, peers[0]) // known to nobody below the keeper
		synctest.Wait()
		var want = []string{
			"low added node1, sees 1", "keeper added node1, sees 1", "high added node1, sees 1",
			"low lost node1, sees 0", "keeper lost node1, sees 0",
			"low added node2, sees 1", "keeper added node2, sees 1", "high added node2, sees 2",
			"low left node1, sees 1", "keeper left node1, sees 1", "high left node1, sees 1",
		}
		got := slices.Clone(log)
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("got  %q\nwant %q", got, want)
		}
		if w := watched(e); !slices.Equal(w, []string{"added node1", "added node2", "left node1"}) {
			t.Errorf("watched %q", w)
		}
	})
}

// hide is a pure filter that shows only some members.
type hide struct{ show func(channel.Member) bool }

func (h *hide) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "hide"} }
func (h *hide) FilterView(v channel.View) channel.View {
	v.Members = slices.DeleteFunc(slices.Clone(v.Members), func(m channel.Member) bool { return !h.show(m) })
	return v
}

func TestFilteredViews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var above, below []string
		f := &hide{func(m channel.Member) bool { return m.Domain == "" }}
		e := channeltest.Embed(t, &spy{"above", &above, nil}, f, &spy{"below", &below, nil})
		other := peers[1]
		other.Domain = "other"
		e.Observe(channel.MemberAdded, peers[0])
		e.Observe(channel.MemberAdded, other)
		synctest.Wait()
		moved := peers[0]
		moved.Domain = "other"
		e.Observe(channel.MemberUpdated, moved)
		e.Observe(channel.MemberUpdated, peers[1])
		synctest.Wait()
		e.Observe(channel.MemberLeft, peers[1])
		synctest.Wait()
		if want := []string{"above added node1, sees 1", "above lost node1, sees 0", "above added node2, sees 1", "above left node2, sees 0"}; !slices.Equal(above, want) {
			t.Errorf("above the filter: %q", above)
		}
		if len(below) != 5 {
			t.Errorf("below the filter: %q", below)
		}
		if len(e.View().Members) != 0 {
			t.Errorf("view: %v", e.View().Members)
		}
	})
}

func TestAliveTimesDoNotFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Tick: time.Second})
		a, b := peers[0], peers[1] // a is older
		e.Observe(channel.MemberAdded, a)
		e.Observe(channel.MemberAdded, b)
		synctest.Wait()
		version := e.View().Version
		for range 1000 {
			a.Alive += time.Millisecond
			b.Alive += time.Second
			e.Observe(channel.MemberUpdated, a)
			e.Observe(channel.MemberAdded, b)
		}
		synctest.Wait()
		if v := e.View(); v.Version != version || !v.Members[0].Is(a) {
			t.Errorf("before the tick the view is %+v", v)
		}
		time.Sleep(1100 * time.Millisecond)
		if v := e.View(); v.Version != version || !v.Members[0].Is(b) || v.Members[0].Alive != b.Alive {
			t.Errorf("after the tick the view is %+v", v)
		}
		if n := len(watched(e)); n != 2 {
			t.Errorf("%d changes", n)
		}
		b.Payload = ""
		e.Observe(channel.MemberUpdated, b)
		synctest.Wait()
		if v := e.View(); v.Version != version+1 || watched(e)[2] != "updated "+b.Name() {
			t.Errorf("after a real update: version %d, %q", v.Version, watched(e))
		}
	})
}

func TestMembersThatAreNotTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		metrics := channel.NewMetrics()
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Settings: channel.Settings{Logger: zap.New(core), Metrics: metrics}})
		self := e.Local()
		clone := peers[0]
		clone.ID = self.ID
		ghost := self
		ghost.ID = channel.NewUniqueID()
		noPort, noID := peers[0], peers[1]
		noPort.Port, noID.ID = 70000, channel.UniqueID{}
		for range 3 {
			for _, m := range []channel.Member{self, clone, ghost, noPort, noID, {}} {
				e.Observe(channel.MemberAdded, m)
			}
		}
		e.Observe(channel.MemberEventKind(77), peers[0])
		synctest.Wait()
		if v := e.View(); v.Version != 0 {
			t.Errorf("view is %+v", v)
		}
		if n := counter(metrics, "channel_members_refused_total"); n != 15 {
			t.Errorf("%v refused", n)
		}
		if logs.Len() != 1 || !strings.Contains(logs.All()[0].Message, "another node uses this node's id") {
			t.Errorf("logged %v", logs.All())
		}
		goodbye := peers[0]
		goodbye.Command = channel.ShutdownCommand
		e.Observe(channel.MemberAdded, peers[0])
		e.Observe(channel.MemberAdded, goodbye)
		synctest.Wait()
		if w := watched(e); !slices.Equal(w, []string{"added node1", "left node1"}) {
			t.Errorf("watched %q", w)
		}
	})
}

func TestNewIncarnationReplacesTheOld(t *testing.T) { // HB-13, FT-15
	synctest.Test(t, func(t *testing.T) {
		var errs []error
		e := channeltest.Embed(t)
		e.Watch(func(_ channel.View, ev channel.MemberEvent) {
			if ev.Kind == channel.MemberLost {
				errs = append(errs, ev.Err)
			}
		})
		old := peers[0]
		young := old
		young.ID, young.Alive = channel.NewUniqueID(), time.Second
		young.Payload = channel.Announcement{Name: "again"}.Encode()
		e.Observe(channel.MemberAdded, old)
		e.Observe(channel.MemberAdded, young)
		e.Observe(channel.MemberAdded, old) // a late record of the old one
		synctest.Wait()
		if w := watched(e); !slices.Equal(w, []string{"added node1", "lost node1", "added again"}) {
			t.Errorf("watched %q", w)
		}
		if len(errs) != 1 || !errors.Is(errs[0], channel.ErrReplaced) {
			t.Errorf("lost because of %v", errs)
		}
		// The same id at another address is the same node, moved.
		moved := young
		moved.Port++
		e.Observe(channel.MemberUpdated, moved)
		e.Observe(channel.MemberAdded, old) // its address is free now
		synctest.Wait()
		if w := watched(e); !slices.Equal(w[3:], []string{"updated again", "added node1"}) {
			t.Errorf("watched %q", w)
		}
	})
}

func TestOldIncarnationHeldAboveIsReplacedToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log []string
		e := channeltest.Embed(t, &spy{"keeper", &log, func(ev channel.MemberEvent) bool { return ev.Kind == channel.MemberLost && !ev.Final() }})
		old := peers[0]
		young := old
		young.ID, young.Payload = channel.NewUniqueID(), channel.Announcement{Name: "again"}.Encode()
		e.Observe(channel.MemberAdded, old)
		e.Observe(channel.MemberLost, old)
		synctest.Wait()
		if !e.View().Has(old) {
			t.Fatal("the keeper does not keep")
		}
		e.Observe(channel.MemberAdded, young)
		synctest.Wait()
		if w := watched(e); !slices.Equal(w, []string{"added node1", "lost node1", "added again"}) {
			t.Errorf("watched %q", w)
		}
	})
}

func TestSendFaultsRaiseSuspicion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log []string
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{&spy{"spy", &log, nil}}, Tick: 500 * time.Millisecond})
		for _, p := range peers[:2] {
			e.Observe(channel.MemberAdded, p)
		}
		synctest.Wait()
		log = nil
		cause := channel.ErrDisconnected
		e.OnSend(func(_ context.Context, m *channel.Message) error { return channel.Failed(m.To, cause) })
		r := new(channeltest.Recorder)
		for range 50 {
			_ = e.Send(t.Context(), peers[:1], nil, channel.SendAck)
			_ = e.SendDone(t.Context(), peers[2:], nil, channel.SendAck, r) // not a member
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		if want := []string{"spy suspected node1, sees 2"}; !slices.Equal(log, want) {
			t.Errorf("within a second: %q", log)
		}
		time.Sleep(time.Second)
		_ = e.SendDone(t.Context(), peers[:2], nil, channel.SendAck, r)
		synctest.Wait()
		if want := []string{"spy suspected node1, sees 2", "spy suspected node1, sees 2", "spy suspected node2, sees 2"}; !slices.Equal(log, want) {
			t.Errorf("later: %q", log)
		}
		log = nil
		time.Sleep(2 * time.Second)
		for _, harmless := range []error{channel.ErrNegativeAck, channel.ErrTooLarge, context.Canceled, channel.ErrQueueFull} {
			cause = harmless
			_ = e.Send(t.Context(), peers[:2], nil, channel.SendAck)
		}
		synctest.Wait()
		if len(log) != 0 {
			t.Errorf("harmless errors: %q", log)
		}
		if len(watched(e)) != 2 || len(e.View().Members) != 2 {
			t.Errorf("suspicion alone changed the view: %q", watched(e))
		}
	})
}

func TestOtherFingerprintIsReportedOnceByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{gzip()}, Settings: channel.Settings{Logger: zap.New(core)}})
		same, other, tomcat := peers[0], peers[1], peers[2]
		same.Payload = channel.Announcement{Name: "same", Fingerprint: "gzip:100"}.Encode()
		other.Payload = channel.Announcement{Name: "other"}.Encode()
		tomcat.Payload = "hello"
		for _, m := range []channel.Member{same, other, tomcat} {
			e.Observe(channel.MemberAdded, m)
		}
		other.Domain = "d"
		e.Observe(channel.MemberUpdated, other)
		synctest.Wait()
		if logs.Len() != 1 || !strings.Contains(fmt.Sprint(logs.All()[0].ContextMap()["member"]), "other (") {
			t.Errorf("logged %v", logs.All())
		}
	})
}

func TestWatchBeginsWithTheCurrentView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := channeltest.Embed(t)
		e.Observe(channel.MemberAdded, peers[0])
		synctest.Wait()
		r := new(channeltest.Recorder)
		cancel := e.Watch(r.Watch)
		first := r.Views() // before Watch has returned
		if len(first) != 1 || first[0].Event.Kind != 0 || !first[0].View.Has(peers[0]) {
			t.Errorf("first call: %+v", first)
		}
		// A watcher may watch, send and cancel.
		var inner int
		var stop func()
		stop = e.Watch(func(v channel.View, ev channel.MemberEvent) {
			if ev.Kind == 0 {
				return
			}
			if err := e.Send(t.Context(), v.Members, nil, 0); err != nil {
				t.Error(err)
			}
			e.Watch(func(channel.View, channel.MemberEvent) { inner++ })
			stop()
		})
		e.Observe(channel.MemberAdded, peers[1])
		e.Observe(channel.MemberAdded, peers[2])
		synctest.Wait()
		cancel()
		e.Observe(channel.MemberLost, peers[2])
		synctest.Wait()
		if n := len(r.Views()); n != 3 {
			t.Errorf("%d calls", n)
		}
		if inner != 3 {
			t.Errorf("the watcher made inside was called %d times, want 3", inner)
		}
	})
}

// chaos announces what it likes, from its own goroutine too.
type chaos struct {
	rng  *rand.Rand
	link channel.Link
}

func (c *chaos) Descriptor() channel.Descriptor { return channel.Descriptor{Name: "chaos"} }
func (c *chaos) Start(_ context.Context, l channel.Link) error {
	c.link = l
	return nil
}
func (c *chaos) HandleMember(ctx context.Context, l channel.Link, ev channel.MemberEvent) error {
	for range c.rng.IntN(3) {
		_ = l.Announce(ctx, ev)
	}
	return nil
}

// Whatever memberships and layers report: per member additions and removals
// alternate, views follow from the events, and versions grow (IC-22).
func TestEventsAlternate(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			c := &chaos{rng: rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))}
			e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{
				Layers: []channel.Interceptor{&hide{func(m channel.Member) bool { return m.Domain != "hidden" }}, c, queue()},
				Tick:   time.Second,
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := e.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			for range rapid.IntRange(1, 60).Draw(rt, "steps") {
				m := channeltest.Member(rapid.IntRange(1, 5).Draw(rt, "member"))
				m.Domain = rapid.SampledFrom([]string{"", "", "x", "hidden"}).Draw(rt, "domain")
				if rapid.Bool().Draw(rt, "reborn") {
					m.ID[5], m.Alive = 1, time.Second
				}
				kind := channel.MemberEventKind(rapid.IntRange(1, 5).Draw(rt, "kind"))
				if rapid.Bool().Draw(rt, "by the layer") {
					_ = c.link.Announce(t.Context(), channel.MemberEvent{Kind: kind, Member: m})
				} else {
					e.Observe(kind, m)
				}
				if rapid.Bool().Draw(rt, "pause") {
					time.Sleep(time.Second)
				}
			}
			synctest.Wait()
			members := map[channel.UniqueID]channel.Member{}
			var last uint64
			for i, ch := range e.Top.Views() {
				if i > 0 && ch.View.Version <= last {
					rt.Errorf("change %d: version %d after %d", i, ch.View.Version, last)
				}
				last = ch.View.Version
				old, present := members[ch.Event.Member.ID]
				switch ch.Event.Kind {
				case channel.MemberAdded:
					if present {
						rt.Errorf("change %d: added twice", i)
					}
					members[ch.Event.Member.ID] = ch.Event.Member
				case channel.MemberUpdated:
					if !present || old == ch.Event.Member {
						rt.Errorf("change %d: update of nothing", i)
					}
					members[ch.Event.Member.ID] = ch.Event.Member
				case channel.MemberLost, channel.MemberLeft:
					if !present {
						rt.Errorf("change %d: removed without having been added", i)
					}
					delete(members, ch.Event.Member.ID)
				}
				if len(ch.View.Members) != len(members) {
					rt.Errorf("change %d: the view has %d members, the events say %d", i, len(ch.View.Members), len(members))
				}
				for _, m := range ch.View.Members {
					if m.Domain == "hidden" || members[m.ID].Domain != m.Domain {
						rt.Errorf("change %d: wrong member %+v", i, m)
					}
				}
				if !slices.IsSortedFunc(ch.View.Members, func(a, b channel.Member) int {
					if channel.Older(b, a) {
						return 1
					}
					return -1
				}) {
					rt.Errorf("change %d: not sorted", i)
				}
			}
			if err := e.Stop(t.Context()); err != nil {
				rt.Error(err)
			}
		})
	})
}
