package coordinator

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"testing"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

type vectors struct {
	Vectors []struct {
		Name, Kind, Hex string
		Fields          struct {
			IDHex, TypeHex string
			Leader, Source struct{ Port int }
			View           []struct{ Port int }
		}
	}
	Captured []struct {
		Port, To int
		Hex      string
	}
}

func load(t testing.TB) (v vectors) {
	t.Helper()
	text, err := os.ReadFile("testdata/coordination.json")
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The bytes are those that Tomcat nodes send and understand.
func TestVectors(t *testing.T) {
	constants := map[string]string{"coord-header": header, "coord-request": request, "coord-conf": confirmation, "coord-alive": alive}
	messages := 0
	file := load(t)
	for _, v := range file.Vectors {
		b := unhex(t, v.Hex)
		if v.Kind == "constant" {
			if constants[v.Name] != string(b) {
				t.Errorf("%s differs", v.Name)
			}
			delete(constants, v.Name)
			continue
		}
		messages++
		m, err := decode(b)
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		if !isMessage(b) || hex.EncodeToString(m.id[:]) != v.Fields.IDHex || m.confirmed != (v.Fields.TypeHex == hex.EncodeToString([]byte(confirmation))) ||
			m.leader.Port != v.Fields.Leader.Port || m.source.Port != v.Fields.Source.Port || len(m.view) != len(v.Fields.View) {
			t.Errorf("%s: read as %+v", v.Name, m)
		}
		if !bytes.Equal(m.encode(), b) {
			t.Errorf("%s: written as %x", v.Name, m.encode())
		}
		for i := range b {
			if _, err := decode(b[:i]); err == nil {
				t.Errorf("%s: the first %d bytes are enough", v.Name, i)
			}
		}
	}
	if messages != 4 || len(constants) != 0 {
		t.Errorf("%d messages, constants missing: %v", messages, constants)
	}
	for i, f := range file.Captured {
		var m channel.Message
		if _, _, err := wire.DecodeFrame(unhex(t, f.Hex), wire.DefaultMaxFrame, &m); err != nil {
			t.Fatal(err)
		}
		d, err := decode(m.Body)
		if err != nil || !bytes.Equal(d.encode(), m.Body) || m.Options != channel.UseAck {
			t.Errorf("captured message %d: %v", i, err)
		}
	}
	if len(file.Captured) < 6 {
		t.Errorf("%d captured messages", len(file.Captured))
	}
}

func anyMember(t *rapid.T) channel.Member {
	host := netip.AddrFrom4([4]byte{10, 0, 0, rapid.Byte().Draw(t, "host")})
	if rapid.Bool().Draw(t, "v6") {
		host = netip.AddrFrom16([16]byte{0xfd, 15: rapid.Byte().Draw(t, "host6")})
	}
	return channel.Member{ID: channel.UniqueID{rapid.Byte().Draw(t, "id"), 6: 0x40}, Host: host, Port: rapid.IntRange(1, 3).Draw(t, "port"), SecurePort: -1, UDPPort: -1,
		Payload: rapid.StringN(0, 9, 30).Draw(t, "payload")}
}

func TestRoundTripAndOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := message{leader: anyMember(t), source: anyMember(t), view: rapid.SliceOfN(rapid.Custom(anyMember), 0, 9).Draw(t, "view"),
			id: newID(uint64(rapid.IntRange(0, 1<<40).Draw(t, "counter"))), confirmed: rapid.Bool().Draw(t, "confirmed")}
		again, err := decode(m.encode())
		if err != nil || !bytes.Equal(again.encode(), m.encode()) || len(again.view) != len(m.view) {
			t.Fatalf("%+v became %+v (%v)", m, again, err)
		}
		for _, a := range m.view { // a strict total order
			for _, b := range m.view {
				if x, y := compare(a, b), compare(b, a); x > 0 != (y < 0) || (x == 0) != (y == 0) {
					t.Fatalf("%v and %v: %d and %d", a, b, x, y)
				}
				if len(a.Host.AsSlice()) < len(b.Host.AsSlice()) && compare(a, b) >= 0 {
					t.Fatal("a shorter address comes first")
				}
			}
		}
		c, ok := counterOf(withCounter(m.id, 77))
		if !ok || c != 77 || tail(withCounter(m.id, 77)) != tail(m.id) {
			t.Fatal("counter")
		}
	})
	if _, ok := counterOf(channel.NewUniqueID()); ok {
		t.Error("a random id has a counter")
	}
}

func TestHugeCounts(t *testing.T) {
	m := message{leader: channel.Member{Host: netip.MustParseAddr("10.0.0.1")}, source: channel.Member{Host: netip.MustParseAddr("10.0.0.1")}}
	b := m.encode()
	at := len(b) - 36
	for _, n := range []byte{0x7f, 0x80, 0xff, 0x00} {
		c := bytes.Clone(b)
		c[at], c[at+1], c[at+3] = n, n, 200
		if _, err := decode(c); !errors.Is(err, errMessage) {
			t.Errorf("count %x: %v", c[at:at+4], err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, v := range load(f).Vectors {
		f.Add(unhex(f, v.Hex))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		again, err := decode(m.encode())
		if err != nil || again.id != m.id || len(again.view) != len(m.view) {
			t.Errorf("%x is read as %+v, and that as %+v (%v)", b, m, again, err)
		}
	})
}
