package jser

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// The vectors were written by the classes of Tomcat 10.1.60 on OpenJDK 17; those
// of captured.json were recorded between its nodes.

type fields = map[string]any

type vector struct {
	Name, Kind, Hex, MessageHex string
	Length                      int
	Fields                      fields
	Value                       any
}

var files = []string{"rpc.json", "map.json", "session.json", "deploy.json", "javaser.json"}

func load(t testing.TB, file string) []vector {
	t.Helper()
	raw, err := os.ReadFile("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	var f struct{ Vectors []vector }
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&f); err != nil {
		t.Fatal(err)
	}
	if len(f.Vectors) == 0 {
		t.Fatalf("%s has no vectors", file)
	}
	return f.Vectors
}

func unhex(t testing.TB, s any) []byte {
	t.Helper()
	if s == nil {
		return nil
	}
	b, err := hex.DecodeString(s.(string))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// codec is how a kind of vector is read and written again.
type codec struct {
	decode func([]byte) (any, error)
	encode func(any) ([]byte, error)
}

func codecOf(kind string) codec {
	l := Limits{}
	d := (*Dialect)(nil)
	switch kind {
	case "delta":
		return codec{func(b []byte) (any, error) { return DecodeDelta(b, l) },
			func(v any) ([]byte, error) { return d.EncodeDelta(v.(*DeltaRequest)) }}
	case "sessionstate":
		return codec{func(b []byte) (any, error) { return DecodeSession(b, l) },
			func(v any) ([]byte, error) { return d.EncodeSession(v.(*Session)) }}
	case "allsessions":
		return codec{func(b []byte) (any, error) { return DecodeSessions(b, l) },
			func(v any) ([]byte, error) { return d.EncodeSessions(v.([]Session)) }}
	case "utf":
		return codec{func(b []byte) (any, error) { return DecodeUTF(b, l) },
			func(v any) ([]byte, error) { return EncodeUTF(v.(string)) }}
	case "block", "mixed":
		return codec{func(b []byte) (any, error) { return Parse(b, l) },
			func(v any) ([]byte, error) { return d.Format(v.([]Value)...) }}
	}
	return codec{func(b []byte) (any, error) { return Decode(b, l) }, func(v any) ([]byte, error) { return Encode(v) }}
}

// TestVectors reads every vector, compares it with what its JSON says, and
// writes it again to the same bytes.
func TestVectors(t *testing.T) {
	for _, file := range files {
		for _, v := range load(t, file) {
			t.Run(file+"/"+v.Name, func(t *testing.T) {
				raw := unhex(t, v.Hex)
				c := codecOf(v.Kind)
				got, err := c.decode(raw)
				if err != nil {
					t.Fatal(err)
				}
				compare(t, v, got)
				again, err := c.encode(got)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(again, raw) {
					t.Errorf("encoded again\ngot  %x\nwant %x", again, raw)
				}
				if len(raw) > 3000 {
					return
				}
				for cut := range raw {
					if x, err := c.decode(raw[:cut]); err == nil {
						if b, _ := c.encode(x); !bytes.Equal(b, raw[:cut]) {
							t.Fatalf("cut to %d bytes it still decodes: %#v", cut, x)
						}
					}
				}
			})
		}
	}
}

// TestCaptured reads all object streams that went over the wire, nested ones
// too, and writes them again.
func TestCaptured(t *testing.T) {
	raw, err := os.ReadFile("../testdata/captured.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct{ Vectors []vector }
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	for i, v := range f.Vectors {
		if v.Kind != "frame" {
			continue
		}
		var m channel.Message
		if _, _, err := wire.DecodeFrame(unhex(t, v.Hex), wire.DefaultMaxFrame, &m); err != nil {
			t.Fatal(err)
		}
		if Stream(m.Body) {
			again(t, fmt.Sprintf("captured %d", i), m.Body, kinds)
		}
	}
	for _, k := range []string{"*jser.MapMessage", "*jser.RPCMessage", "*jser.SessionMessage", "*jser.MemberMessage", "string"} {
		if kinds[k] == 0 {
			t.Errorf("no %s among %v", k, kinds)
		}
	}
}

// again decodes and encodes a stream and those inside it.
func again(t *testing.T, name string, b []byte, kinds map[string]int) {
	t.Helper()
	v, err := Decode(b, Limits{})
	if err != nil {
		// A delta, or sessions: more than one item.
		if d, derr := DecodeDelta(b, Limits{}); derr == nil {
			out, _ := (*Dialect)(nil).EncodeDelta(d)
			same(t, name, out, b)
			kinds["delta"]++
			return
		}
		if s, derr := DecodeSessions(b, Limits{}); derr == nil {
			out, _ := (*Dialect)(nil).EncodeSessions(s)
			same(t, name, out, b)
			kinds["sessions"]++
			return
		}
		if s, derr := DecodeUTF(b, Limits{}); derr == nil {
			out, _ := EncodeUTF(s)
			same(t, name, out, b)
			return
		}
		t.Fatalf("%s: %v\n%x", name, err, b)
	}
	kinds[fmt.Sprintf("%T", v)]++
	out, err := Encode(v)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	same(t, name, out, b)
	var inner func(v Value)
	inner = func(v Value) {
		switch x := v.(type) {
		case *RPCMessage:
			kinds[fmt.Sprintf("%T", x.Message)]++
			inner(x.Message)
		case *MapMessage:
			for _, b := range [][]byte{x.Key, x.Value, x.DiffValue} {
				if b != nil {
					again(t, name+" inside", b, kinds)
				}
			}
		case *SessionMessage:
			if x.Session != nil {
				again(t, name+" session", x.Session, kinds)
			}
		case *List:
			for _, y := range x.Items {
				inner(y)
			}
		}
	}
	inner(v)
}

func same(t *testing.T, name string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: encoded again\ngot  %x\nwant %x", name, got, want)
	}
}

// TestSharing: what is one object stays one, what is not does not become one.
func TestSharing(t *testing.T) {
	shared := strings.Clone("x")
	in := &List{Items: []Value{shared, shared, strings.Clone("x"), []byte{1}, []byte{1}, int32(5), int32(5), int32(500), int32(500)}}
	b, err := Encode(in)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("t\x00\x01x")); n != 2 {
		t.Errorf("the text is written %d times, want 2:\n%x", n, b)
	}
	v, err := Decode(b, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	out, err := Encode(v)
	if err != nil || !bytes.Equal(out, b) {
		t.Errorf("encoded again (%v)\ngot  %x\nwant %x", err, out, b)
	}
}

func compare(t *testing.T, v vector, got any) {
	t.Helper()
	f := v.Fields
	switch v.Kind {
	case "rpc":
		m := got.(*RPCMessage)
		want := &RPCMessage{Reply: f["reply"].(bool), UUID: unhex(t, f["uuidHex"]), RPCID: unhex(t, f["rpcIdHex"]), Message: m.Message}
		diff(t, want, m)
		if h, ok := f["messageHex"]; ok {
			b, err := Encode(m.Message)
			if err != nil || !bytes.Equal(b, unhex(t, h)) {
				t.Errorf("message (%v)\ngot  %x\nwant %v", err, b, h)
			}
		} else if x, ok := f["message"].(fields); ok {
			diff(t, &ByteMessage{unhex(t, x["byteMessageHex"])}, m.Message)
		} else {
			diff(t, show2(f["message"]), show2(loose(m.Message)))
		}
	case "norpc":
		diff(t, &RPCMessage{NoChannel: true, Reply: true, UUID: unhex(t, f["uuidHex"]), RPCID: unhex(t, f["rpcIdHex"])}, got)
	case "bytemessage":
		diff(t, &ByteMessage{unhex(t, f["dataHex"])}, got)
	case "member":
		diff(t, member(t, f), got)
	case "membermessage":
		diff(t, &MemberMessage{num[int32](t, f["msgtype"]), unhex(t, f["membershipIdHex"]), member(t, f["member"])}, got)
	case "map":
		m := got.(*MapMessage)
		want := &MapMessage{Type: num[int32](t, f["msgtype"]), MapID: unhex(t, f["mapIdHex"]), Diff: f["diff"].(bool),
			Key: unhex(t, f["keyDataHex"]), Value: unhex(t, f["valueDataHex"]), DiffValue: unhex(t, f["diffValueHex"]), Primary: member(t, f["primary"])}
		if nodes, ok := f["nodes"].([]any); ok {
			want.Nodes = []*Member{}
			for _, n := range nodes {
				want.Nodes = append(want.Nodes, member(t, n))
			}
		}
		diff(t, want, m)
	case "delta":
		d := got.(*DeltaRequest)
		want := &DeltaRequest{SessionID: f["sessionId"].(string), RecordAll: f["recordAllActions"].(bool)}
		for i, x := range f["actions"].([]any) {
			a := x.(fields)
			w := Action{Kind: num[int32](t, a["type"]), Remove: num[int32](t, a["action"]) == 1, Name: a["name"].(string)}
			if i < len(d.Actions) {
				w.HasValue, w.Value = d.Actions[i].HasValue, d.Actions[i].Value
			}
			want.Actions = append(want.Actions, w)
			typed(t, a["value"], w.Value)
		}
		diff(t, want, d)
	case "sessionstate":
		state(t, f, got.(*Session))
	case "allsessions":
		all, want := got.([]Session), f["sessions"].([]any)
		if len(all) != len(want) {
			t.Fatalf("%d sessions, want %d", len(all), len(want))
		}
		for i := range all {
			state(t, want[i].(fields), &all[i])
		}
	case "deltasession":
		state(t, f, &got.(*DeltaSession).Session)
	case "utf":
		diff(t, f["value"], got)
	case "sessionmessage":
		m := got.(*SessionMessage)
		diff(t, &SessionMessage{Event: num[int32](t, f["eventType"]), Context: str(f["contextName"]), SessionID: str(f["sessionId"]),
			Session: unhex(t, f["sessionHex"]), UniqueID: str(f["uniqueId"]), Time: num[int64](t, f["serializationTimestamp"]),
			TimeSet: f["timestampSet"].(bool), Base: num[int64](t, f["baseTimestamp"])}, m)
	case "mapsession":
		m := got.(*MapMessage)
		x, err := Decode(m.Value, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		state(t, f["session"].(fields), &x.(*DeltaSession).Session)
	case "file":
		m := got.(*FileMessage)
		if m.Length > int32(len(m.Data)) || len(m.Data) != 10240 {
			t.Errorf("length %d of %d", m.Length, len(m.Data))
		}
		diff(t, &FileMessage{Number: num[int32](t, f["messageNumber"]), Total: num[int64](t, f["totalNrOfMsgs"]), Length: num[int32](t, f["dataLength"]),
			Data: m.Data, FileName: str(f["fileName"]), Context: str(f["contextName"]), Base: num[int64](t, f["baseTimestamp"])}, m)
	case "undeploy":
		m := got.(*UndeployMessage)
		diff(t, &UndeployMessage{member(t, f["address"]), num[int64](t, f["timestamp"]), str(f["uniqueId"]), str(f["contextName"])}, m)
	case "sso":
		sso(t, f, got.(*SingleSignOnEntry))
	case "mapsso":
		x, err := Decode(got.(*MapMessage).Value, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		sso(t, f["entry"].(fields), x.(*SingleSignOnEntry))
	case "ssolistener":
		diff(t, &SingleSignOnListener{true, str(f["ssoId"])}, got)
	case "object":
		if v.Name == "string-70000" {
			diff(t, strings.Repeat("abcdefghij", 7000), got)
			return
		}
		typed(t, v.Value, got)
	case "block":
		if items := got.([]Value); len(items) != 1 {
			t.Errorf("%d items", len(items))
		}
	case "mixed":
		diff(t, []Value{Block{0, 0, 0, 1}, "s", Block{0, 0, 0, 2}, nil, "s"}, got)
	default:
		t.Errorf("unknown kind %q", v.Kind)
	}
}

var opts = cmp.Options{cmp.Exporter(func(reflect.Type) bool { return true }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b *big.Int) bool { return a.Cmp(b) == 0 })}

func diff(t testing.TB, want, got any) {
	t.Helper()
	if d := cmp.Diff(want, got, opts); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func num[T int32 | int64](t *testing.T, v any) T {
	t.Helper()
	n, err := strconv.ParseInt(fmt.Sprint(v), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return T(n)
}

func str(v any) *string {
	if v == nil {
		return nil
	}
	return new(v.(string))
}

func member(t *testing.T, v any) *Member {
	t.Helper()
	if v == nil {
		return nil
	}
	f := v.(fields)
	host, _ := netip.AddrFromSlice(unhex(t, f["hostHex"]))
	return &Member{Member: channel.Member{
		ID: channel.UniqueID(unhex(t, f["uniqueIdHex"])), Host: host, Port: int(num[int64](t, f["port"])),
		SecurePort: int(num[int64](t, f["securePort"])), UDPPort: int(num[int64](t, f["udpPort"])),
		Domain: string(unhex(t, f["domainHex"])), Command: string(unhex(t, f["commandHex"])),
		Payload: string(unhex(t, f["payloadHex"])), Alive: time.Duration(num[int64](t, f["alive"])) * time.Millisecond,
	}}
}

func state(t *testing.T, f fields, s *Session) {
	t.Helper()
	diff(t, str(f["id"]), s.ID)
	note, _ := s.IDNote.(string)
	wantNote, _ := f["sessionIdNote"].(string)
	diff(t, wantNote, note)
	diff(t, []any{num[int64](t, f["creationTime"]), num[int64](t, f["lastAccessedTime"]), num[int64](t, f["thisAccessedTime"]), num[int32](t, f["maxInactiveInterval"]),
		f["isNew"], f["isValid"], num[int64](t, f["version"])},
		[]any{s.Created, s.Accessed, s.ThisAccessed, s.MaxInactive, s.New, s.Valid, s.Version})
	want := f["attributes"].(fields)
	if len(want) != len(s.Attributes) {
		t.Errorf("%d attributes, want %d", len(s.Attributes), len(want))
	}
	for _, a := range s.Attributes {
		typed(t, want[a.Name], a.Value)
	}
	typed(t, f["principal"], s.Principal)
	listeners, _ := f["listeners"].([]any)
	if len(listeners) != len(s.Listeners) {
		t.Errorf("%d listeners, want %d", len(s.Listeners), len(listeners))
	}
	for i, l := range s.Listeners {
		typed(t, listeners[i], l)
	}
}

func sso(t *testing.T, f fields, e *SingleSignOnEntry) {
	t.Helper()
	diff(t, []any{str(f["authType"]), str(f["username"]), str(f["password"]), f["canReauthenticate"]},
		[]any{e.AuthType, e.Username, e.Password, e.CanReauthenticate})
	typed(t, f["principal"], e.Principal)
	m, _ := e.Sessions.(*Map)
	if want := f["sessions"].([]any); m == nil || len(m.Entries) != len(want) {
		t.Errorf("sessions %v, want %v", e.Sessions, want)
	} else {
		for i, x := range m.Entries {
			w := want[i].(fields)
			diff(t, &SingleSignOnKey{str(w["sessionId"]), str(w["contextName"]), str(w["hostName"])}, x.Key)
			if x.Key != x.Value {
				t.Error("key and value are not the same object")
			}
		}
	}
}

// typed compares with a {type, value} of the vectors.
func typed(t *testing.T, want any, got Value) {
	t.Helper()
	if want == nil {
		diff(t, nil, got)
		return
	}
	w := want.(fields)
	switch w["type"] {
	case "org.apache.catalina.realm.GenericPrincipal":
		p := got.(*Principal)
		diff(t, str(w["name"]), p.Name)
		diff(t, show2(w["roles"]), show2(p.RoleNames()))
	case "org.apache.catalina.ha.authenticator.ClusterSingleSignOnListener":
		diff(t, &SingleSignOnListener{true, str(w["ssoId"])}, got)
	case "byte[]":
		diff(t, unhex(t, w["value"]), got)
	default:
		diff(t, show2(loosely(w)), show2(loose(got)))
	}
}

// loosely strips the types of a vector's value, loose those of a Value: both
// become what prints alike.
func loosely(v any) any {
	switch x := v.(type) {
	case fields:
		if _, ok := x["type"]; ok {
			if x["type"] == "byte[]" {
				return x["value"]
			}
			return loosely(x["value"])
		}
		out := fields{}
		for k, y := range x {
			out[k] = loosely(y)
		}
		return out
	case []any:
		out := []any{}
		for _, y := range x {
			out = append(out, loosely(y))
		}
		return out
	}
	return v
}

func loose(v Value) any {
	all := func(items []Value) any {
		out := []any{}
		for _, y := range items {
			out = append(out, loose(y))
		}
		return out
	}
	switch x := v.(type) {
	case *List:
		return all(x.Items)
	case *Set:
		return all(x.Items)
	case *Array:
		return all(x.Items)
	case *Map:
		out := fields{}
		for _, e := range x.Entries {
			out[fmt.Sprint(e.Key)] = loose(e.Value)
		}
		return out
	case Char:
		return string(rune(x))
	case []byte:
		return hex.EncodeToString(x)
	case UUID:
		return fmt.Sprintf("%x-%x-%x-%x-%x", x[:4], x[4:6], x[6:8], x[8:10], x[10:])
	case *Decimal:
		s := x.Unscaled.String()
		return s[:len(s)-int(x.Scale)] + "." + s[len(s)-int(x.Scale):]
	case *Locale:
		return x.Language + "_" + x.Country
	case Enum:
		return x.Name
	}
	return v
}

func show2(v any) string { return fmt.Sprint(v) }
