package repmap

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// javaMap is a node that answers as a Tribes' map does, and notes what comes.
type javaMap struct {
	*grouptest.Node
	t     *testing.T
	state []*jser.MapMessage

	mu      sync.Mutex
	asked   []int32
	posted  []*jser.MapMessage
	replies chan *jser.RPCMessage
}

func str(s string) []byte {
	b, err := jser.Encode(s)
	if err != nil {
		panic(err)
	}
	return b
}

func (j *javaMap) Handle(ctx context.Context, m *channel.Message) (bool, error) {
	if m.Options.Has(channel.ByteMessage) {
		j.t.Errorf("a byte message: %x", m.Body)
		return true, nil
	}
	v, err := jser.Decode(m.Body, jser.Limits{})
	if err != nil {
		j.t.Error(err)
		return true, err
	}
	switch x := v.(type) {
	case *jser.MapMessage:
		j.mu.Lock()
		j.posted = append(j.posted, x)
		j.mu.Unlock()
	case *jser.RPCMessage:
		if x.Reply {
			j.replies <- x
			return true, nil
		}
		q := x.Message.(*jser.MapMessage)
		j.mu.Lock()
		j.asked = append(j.asked, q.Type)
		j.mu.Unlock()
		switch q.Type {
		case jser.MapInit, jser.MapStart:
			q.Primary = jser.MemberOf(j.Local())
		case jser.MapState, jser.MapStateCopy:
			list := &jser.List{}
			for _, s := range j.state {
				list.Items = append(list.Items, s)
			}
			q.Value, _ = jser.Encode(list)
		case jser.MapRetrieveBackup:
			q.Value = str("fetched")
		}
		x.Reply, x.Message = true, q
		b, err := jser.Encode(x)
		if err != nil {
			j.t.Error(err)
		}
		to := m.From
		go func() { _ = j.Send(context.Background(), []channel.Member{to}, b, channel.ObjectStream) }()
	}
	return true, nil
}

func (j *javaMap) post(to *one, m *jser.MapMessage) {
	j.t.Helper()
	m.MapID = []byte("m")
	b, err := jser.Encode(m)
	must(j.t, err)
	must(j.t, j.Send(j.t.Context(), []channel.Member{to.Local()}, b, channel.ObjectStream|channel.UseAck|channel.SyncAck))
}

func (j *javaMap) ask(to *one, m *jser.MapMessage) *jser.MapMessage {
	j.t.Helper()
	m.MapID = []byte("m")
	b, err := jser.Encode(&jser.RPCMessage{UUID: bytes.Repeat([]byte{1}, 16), RPCID: []byte("m"), Message: m})
	must(j.t, err)
	must(j.t, j.Send(j.t.Context(), []channel.Member{to.Local()}, b, channel.ObjectStream))
	r := <-j.replies
	a, _ := r.Message.(*jser.MapMessage)
	return a
}

func (j *javaMap) last() *jser.MapMessage {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.posted) == 0 {
		return &jser.MapMessage{}
	}
	return j.posted[len(j.posted)-1]
}

// TestTribes plays a Tribes' map to one of ours, in both kinds.
func TestTribes(t *testing.T) {
	kinds(func(t *testing.T, c Config) {
		c.Tribes = true
		channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
			b := new(grouptest.Book)
			n := b.Join(t, "a", nw.Node("10.0.0.1"))
			j := &javaMap{Node: b.JoinForeign(t, nw.Node("10.0.0.2")), t: t, replies: make(chan *jser.RPCMessage, 10)}
			j.Listen(j)
			java, local := jser.MemberOf(j.Local()), jser.MemberOf(n.Local())
			kind := jser.MapCopy
			if c.Lazy {
				kind = jser.MapProxy
			}
			first := &jser.MapMessage{Type: kind, MapID: []byte("m"), Key: str("old"), Primary: java, Nodes: []*jser.Member{}}
			if !c.Lazy {
				first.Value = str("fetched")
			}
			j.state = []*jser.MapMessage{first}
			synctest.Wait()
			o := mapOn(t, n, c)
			<-o.m.Ready()
			ctx := t.Context()
			read := func(key, want string) {
				t.Helper()
				if v, ok, err := o.m.Get(ctx, key); v != want || ok != (want != "") || err != nil {
					t.Errorf("%s is %q %v %v, want %q", key, v, ok, err, want)
				}
			}
			read("old", "fetched")
			if len(j.asked) < 3 || j.asked[0] != jser.MapInit || j.asked[2] != jser.MapStart {
				t.Errorf("asked %v", j.asked)
			}

			// From here to there.
			must(t, o.m.Put(ctx, "k", "v"))
			got := j.last()
			if want := map[bool]int32{true: jser.MapBackup, false: jser.MapCopy}[c.Lazy]; got.Type != want || !bytes.Equal(got.Key, str("k")) ||
				!bytes.Equal(got.Value, str("v")) || got.Primary == nil || got.Primary.ID != n.Local().ID || len(got.Nodes) != 1 || got.Nodes[0].ID != java.ID {
				t.Errorf("got %+v", got)
			}
			if had, err := o.m.Delete(ctx, "k"); !had || err != nil {
				t.Errorf("got %v %v", had, err)
			}
			if got := j.last(); got.Type != jser.MapRemove || !bytes.Equal(got.Key, str("k")) {
				t.Errorf("got %+v", got)
			}

			// From there to here.
			value := func(v string) *jser.MapMessage {
				m := &jser.MapMessage{Type: jser.MapCopy, Key: str("x"), Value: str(v), Primary: java, Nodes: []*jser.Member{local}}
				if c.Lazy {
					m.Type = jser.MapBackup
				}
				return m
			}
			j.post(o, value("one"))
			read("x", "one")
			j.post(o, value("two"))
			read("x", "two")
			if p, _ := o.m.Where("x"); p.Primary != java.ID {
				t.Errorf("got %+v", p)
			}
			before, _ := o.m.Where("x")
			j.post(o, &jser.MapMessage{Type: jser.MapNotifyMember, Key: str("x"), Primary: java, Nodes: []*jser.Member{local}})
			if after, _ := o.m.Where("x"); after.Version != before.Version {
				t.Errorf("a note of the place made a new version: %+v", after)
			}
			if a := j.ask(o, &jser.MapMessage{Type: jser.MapRetrieveBackup, Key: str("x")}); a == nil || !bytes.Equal(a.Value, str("two")) {
				t.Errorf("got %+v", a)
			}
			if a := j.ask(o, &jser.MapMessage{Type: jser.MapRetrieveBackup, Key: str("none")}); a != nil {
				t.Errorf("got %+v", a)
			}
			j.post(o, &jser.MapMessage{Type: jser.MapRemove, Key: str("x")})
			read("x", "")

			// Questions.
			if a := j.ask(o, &jser.MapMessage{Type: jser.MapPing, Primary: java}); a == nil || a.Primary.ID != n.Local().ID {
				t.Errorf("got %+v", a)
			} else if v, err := jser.Decode(a.Value, jser.Limits{}); v != jser.MapInitialized || err != nil {
				t.Errorf("got %v %v", v, err)
			}
			a := j.ask(o, &jser.MapMessage{Type: map[bool]int32{true: jser.MapState, false: jser.MapStateCopy}[c.Lazy]})
			v, err := jser.Decode(a.Value, jser.Limits{})
			if list, ok := v.(*jser.List); err != nil || !ok || len(list.Items) != 1 || list.Items[0].(*jser.MapMessage).Type != kind {
				t.Errorf("got %+v %v", v, err)
			}
			if a := j.ask(o, &jser.MapMessage{Type: jser.MapStart, Primary: java}); a == nil || a.Primary.ID != n.Local().ID {
				t.Errorf("got %+v", a)
			}
			// Another map's message is not taken.
			other := value("other")
			other.MapID = []byte("another")
			raw, err := jser.Encode(other)
			must(t, err)
			must(t, j.Send(ctx, []channel.Member{n.Local()}, raw, channel.ObjectStream|channel.UseAck|channel.SyncAck))
			read("x", "")
			time.Sleep(time.Second)
			// The end of the Tribes' map, then ours.
			j.post(o, &jser.MapMessage{Type: jser.MapStop, Primary: java})
			must(t, o.m.Put(ctx, "alone", "v"))
			j.ask(o, &jser.MapMessage{Type: jser.MapStart, Primary: java})
			time.Sleep(time.Second)
			o.end(t)
			if got := j.last(); got.Type != jser.MapStop {
				t.Errorf("got %+v", got)
			}
			j.StopNode(t)
		})
	}, t)
}

// TestTribesVectors: every message of the vectors is known as one, and none does
// harm.
func TestTribesVectors(t *testing.T) {
	raw, err := os.ReadFile("testdata/map.json")
	must(t, err)
	var f struct {
		Vectors []struct{ Name, Kind, Hex string }
	}
	must(t, json.Unmarshal(raw, &f))
	n := 0
	for _, lazy := range []bool{false, true} {
		c := DefaultConfig()
		c.Lazy, c.Tribes = lazy, true
		e := channeltest.Embed(t)
		m, err := newEngine(e.Channel, "localhost#/app-map", c, channel.Settings{})
		must(t, err)
		for _, v := range f.Vectors {
			b, err := hex.DecodeString(v.Hex)
			must(t, err)
			if is := jser.IsMapMessage(b); is != (v.Kind == "map") {
				t.Errorf("%s: IsMapMessage is %v", v.Name, is)
			}
			if v.Kind != "map" {
				continue
			}
			n++
			if ok, err := m.hear(t.Context(), &channel.Message{Body: b}); !ok || err != nil {
				t.Errorf("%s: %v %v", v.Name, ok, err)
			}
		}
		m.cancel()
	}
	if n < 40 {
		t.Errorf("only %d", n)
	}
}
