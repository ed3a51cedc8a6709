package peer_test

import (
	"bytes"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// Objects of every listed Java class: we read what the JVM has written, write
// the same bytes again, and the JVM finds the object equal to the first one.
func testObjects(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	a := g.longhouse(nil)
	b := g.tribes(nil)
	together(t, []*longhouse{a}, []*peer.Node{b})
	r, err := b.Call(within(t), "samples")
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Split(r.Get("names"), ",")
	if len(names) < 40 {
		t.Fatalf("samples: %v", names)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			before := len(a.got.Messages())
			if _, err := b.Call(within(t), "sample", "name", name, "options", "6"); err != nil {
				t.Fatal(err)
			}
			var m channel.Message
			a.wait(a.got, "the object", func() bool {
				all := a.got.Messages()
				if len(all) > before {
					m = all[before]
				}
				return len(all) > before
			})
			if m.Options.Has(channel.ByteMessage) {
				t.Errorf("options %v", m.Options)
			}
			v, err := jser.Decode(m.Body, jser.Limits{})
			if err != nil {
				t.Fatalf("%v in %q", err, m.Body)
			}
			again, err := jser.Encode(v)
			if err != nil {
				t.Fatalf("%#v: %v", v, err)
			}
			// Builders are written with the room they have beside their text.
			if !bytes.Equal(again, m.Body) && name != "builder" && name != "buffer" {
				t.Errorf("other bytes:\n%x\n%x", m.Body, again)
			}
			if err := a.Send(within(t), a.View().Members, again, channel.ObjectStream|channel.UseAck|channel.SyncAck); err != nil {
				t.Fatal(err)
			}
			var seen string
			if err := b.Wait(within(t), "message", func(evs []peer.Event) bool {
				return slices.ContainsFunc(evs, func(e peer.Event) bool {
					seen = e.Values.Get("samples")
					return slices.Contains(strings.Split(seen, ","), name)
				})
			}); err != nil {
				t.Errorf("the JVM does not find it equal: %v", complaints(j))
			}
		})
	}
	// The other direction, from values of ours.
	for _, c := range []struct {
		ours   jser.Value
		theirs any
	}{
		{"text \U0001F600", "text \U0001F600"}, {true, true}, {int32(-5), int32(-5)}, {int64(1) << 40, int64(1) << 40}, {0.25, 0.25},
		{[]byte{1, 2}, []byte{1, 2}}, {&jser.List{Items: []jser.Value{"a", int32(1)}}, []any{"a", int32(1)}},
		{&jser.Map{Entries: []jser.Entry{{Key: "k", Value: int64(2)}}}, peer.Pairs{"k", int64(2)}},
	} {
		body, err := jser.Encode(c.ours)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Send(within(t), a.View().Members, body, channel.ObjectStream|channel.UseAck|channel.SyncAck); err != nil {
			t.Fatal(err)
		}
		if err := b.Wait(within(t), "message", func(evs []peer.Event) bool {
			return reflect.DeepEqual(evs[len(evs)-1].Value(), c.theirs)
		}); err != nil {
			t.Errorf("%#v did not arrive: %v\n%s", c.ours, b.Events("message"), complaints(j))
		}
	}
}
