package bridge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var members = []channel.Member{
	{},
	{ID: channel.UniqueID{1, 2, 3}, Host: netip.MustParseAddr("10.1.2.3"), Port: 4000, SecurePort: -1, UDPPort: -1, Alive: 5 * time.Hour},
	{ID: channel.UniqueID{15: 9}, Host: netip.MustParseAddr("fe80::1%eth0"), Port: 65535, SecurePort: 1, UDPPort: 2, Domain: "d", Command: channel.ShutdownCommand, Payload: channel.Announcement{Name: "n"}.Encode()},
	{ID: channel.UniqueID{7}, Host: netip.MustParseAddr("::ffff:1.2.3.4"), Payload: strings.Repeat("\x00\xff", 1000)},
}

func TestMembersAndViewsRoundTrip(t *testing.T) {
	for _, in := range []*interner{nil, newInterner()} {
		for range 2 {
			d := decoder{b: appendMembers(nil, members), in: in}
			if got := d.members(); d.err != nil || len(d.b) != 0 || !reflect.DeepEqual(got, members) {
				t.Errorf("members: %v, %v", got, d.err)
			}
		}
	}
	v := channel.View{Version: 1 << 60, Local: members[1], Members: members[2:]}
	d := decoder{b: appendView(nil, v)}
	if got := d.view(); d.err != nil || len(d.b) != 0 || !reflect.DeepEqual(got, v) {
		t.Errorf("view: %v, %v", got, d.err)
	}
}

// TestEveryMemberFieldCrosses fails when a field is added and not packed.
func TestEveryMemberFieldCrosses(t *testing.T) {
	if n := reflect.TypeFor[channel.Member]().NumField(); n != 9 {
		t.Errorf("channel.Member has %d fields now: pack them in appendMember", n)
	}
	if n := reflect.TypeFor[channel.View]().NumField(); n != 3 {
		t.Errorf("channel.View has %d fields now: pack them in appendView", n)
	}
	for _, typ := range []reflect.Type{reflect.TypeFor[session.Record](), reflect.TypeFor[session.Entry](), reflect.TypeFor[core.ManagerStatus](), reflect.TypeFor[core.Deployment]()} {
		for f := range typ.Fields() {
			if !f.IsExported() || f.Tag.Get("cbor") == "-" {
				t.Errorf("%s.%s does not cross the border", typ, f.Name)
			}
		}
	}
}

func TestCBORValuesRoundTrip(t *testing.T) {
	rec := &session.Record{Key: session.Key{Context: "c", ID: "i"}, Created: 1, LastAccess: 2, MaxInactive: time.Hour,
		Attrs: map[string]session.Entry{"a": {Value: []byte{1, 2}, Version: session.Version{Counter: 3, Node: 1 << 63}}, "b": {Deleted: true}}, End: session.Expired, EndTime: 9}
	dep := []core.Deployment{{Bundle: core.Bundle{Host: "h", Path: "/p", Version: "v", Digest: "d", Dir: "/x"}, State: "failed", Error: "e"}}
	keys := []session.Summary{{Context: "c", Created: time.UnixMilli(5).UTC()}}
	for _, v := range []any{rec, &dep, &keys} {
		b, err := encMode.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.New(reflect.TypeOf(v).Elem())
		if err := decMode.Unmarshal(b, got.Interface()); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got.Interface(), v) {
			t.Errorf("%+v arrived as %+v", v, got.Elem())
		}
	}
}

func TestErrorsKeepTheirIdentity(t *testing.T) {
	for _, c := range errorCodes {
		for _, err := range []error{c.err, fmt.Errorf("outer: %w", c.err)} {
			got := decodeError(appendError(nil, err, 0), nil)
			if !errors.Is(got, c.err) || got.Error() != err.Error() {
				t.Errorf("%v arrived as %v", err, got)
			}
		}
		if got := decodeError(appendError(nil, c.err, 0), nil); got != c.err {
			t.Errorf("%v is not itself any more", c.err)
		}
	}
	both := errors.Join(channel.ErrPluginDown, context.Canceled)
	if got := decodeError(appendError(nil, both, 0), nil); !errors.Is(got, channel.ErrPluginDown) || !errors.Is(got, context.Canceled) {
		t.Errorf("joined: %v", got)
	}
	send := &channel.SendError{Faults: []channel.Fault{{Member: members[1], Err: channel.ErrAckTimeout}, {Member: members[2], Err: errors.New("odd")}, {Member: members[3]}}}
	got := decodeError(appendError(nil, send, 0), nil)
	se, ok := got.(*channel.SendError)
	if !ok || len(se.Faults) != 3 || se.Faults[1].Member != members[2] || se.Faults[1].Err.Error() != "odd" || !errors.Is(got, channel.ErrAckTimeout) {
		t.Errorf("SendError arrived as %#v", got)
	}
	got = decodeError(appendError(nil, fmt.Errorf("while sending: %w", send), 0), nil)
	if !errors.As(got, &se) || !strings.HasPrefix(got.Error(), "while sending") || len(se.Faults) != 3 {
		t.Errorf("wrapped SendError arrived as %v", got)
	}
	long := errors.New(strings.Repeat("long", 10_000))
	if got := decodeError(appendError(nil, long, 0), nil); len(got.Error()) > maxErrorText+10 {
		t.Errorf("%d bytes of text", len(got.Error()))
	}
	deep := error(send)
	for range 20 {
		deep = &channel.SendError{Faults: []channel.Fault{{Err: deep}}}
	}
	if got := decodeError(appendError(nil, deep, 0), nil); !errors.As(got, &se) {
		t.Errorf("deep: %v", got)
	}
}

var forward = core.Forward{Wait: time.Second, Parcels: []core.Parcel{{To: members[:2], Body: []byte("one")}, {To: members[2:], Body: []byte{}, Batch: true}}}

func TestForwardRoundTrip(t *testing.T) {
	for _, in := range []core.Forward{{}, {Wait: time.Hour}, forward} {
		d := decoder{b: appendForward(nil, in)}
		if got := d.forward(); d.err != nil || !reflect.DeepEqual(got, in) {
			t.Errorf("%+v arrived as %+v, %v", in, got, d.err)
		}
	}
	for n := range appendForward(nil, forward) {
		d := decoder{b: appendForward(nil, forward)[:n]}
		if got := d.forward(); d.err == nil && reflect.DeepEqual(got, forward) {
			t.Errorf("the first %d bytes are as good as all", n)
		}
	}
}

func TestCodesAreUnique(t *testing.T) {
	seen := map[uint16]bool{}
	for _, c := range errorCodes {
		if seen[c.code] {
			t.Errorf("code %d has two meanings", c.code)
		}
		seen[c.code] = true
	}
}

func FuzzDecoders(f *testing.F) {
	f.Add(appendMembers(nil, members))
	f.Add(appendView(nil, channel.View{Local: members[1]}))
	f.Add(appendError(nil, channel.Failed(members, channel.ErrClosed), 0))
	f.Add(appendKey(nil, session.Key{Context: "c", ID: "i"}))
	f.Add(appendForward(nil, forward))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := newInterner()
		d := decoder{b: b, in: in}
		if ms := d.members(); d.err == nil {
			again := decoder{b: appendMembers(nil, ms)}
			if !reflect.DeepEqual(again.members(), ms) {
				t.Error("members do not survive")
			}
		}
		d = decoder{b: b, in: in}
		d.view()
		d = decoder{b: b, in: in}
		for len(d.b) > 0 {
			d.key()
		}
		d = decoder{b: b, in: in}
		if fw := d.forward(); d.err == nil {
			again := decoder{b: appendForward(nil, fw)}
			if !reflect.DeepEqual(again.forward(), fw) {
				t.Error("messages do not survive")
			}
		}
		if decodeError(b, in) == nil {
			t.Error("an error became none")
		}
	})
}

func BenchmarkMember(b *testing.B) {
	in := newInterner()
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = appendMember(buf[:0], members[2])
		d := decoder{b: buf, in: in}
		if d.member() != members[2] {
			b.Fatal("differs")
		}
	}
}
