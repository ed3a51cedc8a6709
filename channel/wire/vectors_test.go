package wire

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"math"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// The vectors were written by the classes of tomcat-tribes 10.1.60 and, in
// captured.json, recorded between two of its nodes.

type memberFields struct {
	HostHex     string `json:"hostHex"`
	Port        int    `json:"port"`
	SecurePort  int    `json:"securePort"`
	UDPPort     int    `json:"udpPort"`
	Alive       int64  `json:"alive"`
	UniqueIDHex string `json:"uniqueIdHex"`
	DomainHex   string `json:"domainHex"`
	PayloadHex  string `json:"payloadHex"`
	CommandHex  string `json:"commandHex"`
}

type vector struct {
	Name   string `json:"name"`
	Kind   string `json:"kind"`
	Hex    string `json:"hex"`
	Length int    `json:"length"`
	SHA256 string `json:"sha256"`
	// of captured.json
	Port        int    `json:"port"`
	Options     uint32 `json:"options"`
	UniqueIDHex string `json:"uniqueIdHex"`
	BodyLength  int    `json:"bodyLength"`
	Fields      struct {
		memberFields
		Options    uint32       `json:"options"`
		Timestamp  int64        `json:"timestamp"`
		BodyLength int          `json:"bodyLength"`
		BodyHex    string       `json:"bodyHex"`
		BodyRule   string       `json:"bodyRule"`
		Member     memberFields `json:"member"`
		Frames     int          `json:"frames"`
		Rest       int          `json:"rest"`
		Bodies     []string     `json:"bodies"`
	} `json:"fields"`
}

func load(t testing.TB, file string) []vector {
	t.Helper()
	raw, err := os.ReadFile("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	var f struct{ Vectors []vector }
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	if len(f.Vectors) == 0 {
		t.Fatalf("%s has no vectors", file)
	}
	return f.Vectors
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (f memberFields) member(t testing.TB) channel.Member {
	host, _ := netip.AddrFromSlice(unhex(t, f.HostHex))
	return channel.Member{
		ID: channel.UniqueID(unhex(t, f.UniqueIDHex)), Host: host,
		Port: f.Port, SecurePort: f.SecurePort, UDPPort: f.UDPPort,
		Domain: string(unhex(t, f.DomainHex)), Command: string(unhex(t, f.CommandHex)),
		Payload: string(unhex(t, f.PayloadHex)), Alive: millis(f.Alive),
	}
}

func TestMemberVectors(t *testing.T) {
	for _, v := range load(t, "member.json") {
		t.Run(v.Name, func(t *testing.T) {
			raw := unhex(t, v.Hex)
			m, n, err := DecodeMember(raw)
			if h := len(v.Fields.HostHex) / 2; h != 4 && h != 16 {
				if err != ErrMemberHost {
					t.Fatalf("host of %d bytes: got %v, want %v", h, err, ErrMemberHost)
				}
				return
			}
			if err != nil || n != v.Length {
				t.Fatalf("got n=%d err=%v, want %d bytes", n, err, v.Length)
			}
			if want := v.Fields.member(t); m != want {
				t.Errorf("got  %+v\nwant %+v", m, want)
			}
			if MemberSize(m) != v.Length {
				t.Errorf("MemberSize %d, want %d", MemberSize(m), v.Length)
			}
			if v.Fields.Alive == math.MaxInt64 { // a Duration cannot hold it
				if m.Alive < 292*365*24*time.Hour {
					t.Errorf("alive was cut to %v", m.Alive)
				}
				copy(raw[memberHead:], AppendMember(nil, m)[memberHead:memberHead+8])
			}
			if got := AppendMember(nil, m); !bytes.Equal(got, raw) {
				t.Errorf("encoded again\ngot  %x\nwant %x", got, raw)
			}
			for cut := range raw {
				if _, n, err := DecodeMember(raw[:cut]); err != ErrTruncated || n != 0 {
					t.Errorf("cut to %d bytes: n=%d err=%v, want %v", cut, n, err, ErrTruncated)
				}
			}
			if _, n, err := DecodeMember(append(bytes.Clone(raw), "rest"...)); err != nil || n != len(raw) {
				t.Errorf("with trailing bytes: n=%d err=%v", n, err)
			}
		})
	}
}

func (v *vector) message(t testing.TB) *channel.Message {
	f := v.Fields
	m := &channel.Message{
		From: f.Member.member(t), Options: channel.Options(f.Options),
		Time: f.Timestamp, Body: unhex(t, f.BodyHex),
	}
	copy(m.ID[:], unhex(t, f.UniqueIDHex))
	if f.BodyRule != "" {
		m.Body = make([]byte, f.BodyLength)
		for i := range m.Body {
			m.Body[i] = byte(i)
		}
	}
	return m
}

func TestFrameVectors(t *testing.T) {
	for _, v := range load(t, "frame.json") {
		if v.Kind != "channeldata" {
			continue
		}
		t.Run(v.Name, func(t *testing.T) {
			want := v.message(t)
			raw := AppendFrame(nil, want)
			if v.Hex != "" {
				raw = unhex(t, v.Hex)
			}
			var got channel.Message
			k, n, err := DecodeFrame(raw, DefaultMaxFrame, &got)
			if len(v.Fields.UniqueIDHex) != 2*idSize {
				if !is(err, ErrMessageID, ErrFrameLength) {
					t.Fatalf("id of %d bytes: got %v", len(v.Fields.UniqueIDHex)/2, err)
				}
				return
			}
			if k != MessageFrame || n != v.Length || err != nil {
				t.Fatalf("got kind=%d n=%d err=%v, want %d bytes", k, n, err, v.Length)
			}
			if got.ID != want.ID || got.From != want.From || got.Options != want.Options || got.Time != want.Time || !bytes.Equal(got.Body, want.Body) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			again := AppendFrame(nil, &got)
			if sum := sha256.Sum256(again); hex.EncodeToString(sum[:]) != v.SHA256 || FrameSize(&got) != len(again) {
				t.Errorf("encoded again: %d bytes with another hash than the vector", len(again))
			}
			if byRecord := AppendFrameRecord(nil, AppendMember(nil, got.From), &got); !bytes.Equal(byRecord, again) {
				t.Error("AppendFrameRecord and AppendFrame differ")
			}
			cutAndFlip(t, raw)
		})
	}
}

// cutAndFlip cuts a frame at every position and flips every byte of its
// markers.
func cutAndFlip(t *testing.T, raw []byte) {
	t.Helper()
	step := max(1, len(raw)/2000)
	var m channel.Message
	for cut := 0; cut < len(raw); cut += step {
		if k, n, err := DecodeFrame(raw[:cut], DefaultMaxFrame, &m); k != Incomplete || n != 0 || err != nil {
			t.Fatalf("cut to %d of %d bytes: kind=%d n=%d err=%v", cut, len(raw), k, n, err)
		}
	}
	flip := func(at int, want error) {
		t.Helper()
		b := bytes.Clone(raw)
		b[at] ^= 0x20
		if _, _, err := DecodeFrame(b, DefaultMaxFrame, &m); err != want {
			t.Errorf("byte %d flipped: got %v, want %v", at, err, want)
		}
	}
	record := frameHead + packHead + 4
	size := MemberSize(mustFrame(t, raw).From)
	for i := range frameBegin {
		flip(i, ErrFrameMarker)
		flip(len(raw)-1-i, ErrFrameEnd)
	}
	for i := range memberBegin {
		flip(record+i, ErrMemberMarker)
		flip(record+size-1-i, ErrMemberEnd)
	}
}

func mustFrame(t testing.TB, raw []byte) *channel.Message {
	t.Helper()
	var m channel.Message
	k, _, err := DecodeFrame(raw, DefaultMaxFrame, &m)
	if k != MessageFrame || err != nil {
		t.Fatalf("kind=%d err=%v", k, err)
	}
	return &m
}

func is(err error, any ...error) bool {
	for _, e := range any {
		if err == e {
			return true
		}
	}
	return false
}

func TestRawVectors(t *testing.T) {
	want := map[string]struct {
		kind  Kind
		bytes string
		err   error
	}{
		"ack":         {AckFrame, Ack, nil},
		"fail-ack":    {NegativeAckFrame, NegativeAck, nil},
		"empty-frame": {Incomplete, "", ErrFrameLength},
	}
	seen := 0
	for _, v := range load(t, "frame.json") {
		if v.Kind != "raw" {
			continue
		}
		seen++
		w, ok := want[v.Name]
		if !ok {
			t.Fatalf("no expectation for the vector %q", v.Name)
		}
		raw := unhex(t, v.Hex)
		k, n, err := DecodeFrame(raw, DefaultMaxFrame, new(channel.Message))
		if k != w.kind || err != w.err || n != len(w.bytes) || (err == nil && string(raw) != w.bytes) {
			t.Errorf("%s: kind=%d n=%d err=%v", v.Name, k, n, err)
		}
	}
	if seen != len(want) {
		t.Errorf("%d raw vectors, want %d", seen, len(want))
	}
}

func TestStreamVector(t *testing.T) {
	for _, v := range load(t, "frame.json") {
		if v.Kind != "stream" {
			continue
		}
		raw := unhex(t, v.Hex)
		for chunk := 1; chunk <= len(raw); chunk += 7 {
			d := NewDecoder(0)
			var bodies []string
			feed(t, d, raw, chunk, func(k Kind, m *channel.Message) { bodies = append(bodies, string(m.Body)) })
			if len(bodies) != v.Fields.Frames || d.Buffered() != v.Fields.Rest || bodies[0] != v.Fields.Bodies[0] || bodies[1] != v.Fields.Bodies[1] {
				t.Errorf("in reads of %d bytes: bodies %q, %d bytes left", chunk, bodies, d.Buffered())
			}
		}
		return
	}
	t.Error("no stream vector")
}

// feed gives raw to d in reads of at most chunk bytes.
func feed(t testing.TB, d *Decoder, raw []byte, chunk int, got func(Kind, *channel.Message)) {
	t.Helper()
	var m channel.Message
	for len(raw) > 0 {
		n := copy(d.Space(), raw[:min(chunk, len(raw))])
		d.Wrote(n)
		raw = raw[n:]
		for {
			k, err := d.Next(&m)
			if err != nil {
				t.Fatal(err)
			}
			if k == Incomplete {
				break
			}
			got(k, &m)
		}
	}
}

func TestCapturedVectors(t *testing.T) {
	var stream []byte
	var frames, acks, members int
	for i, v := range load(t, "captured.json") {
		raw := unhex(t, v.Hex)
		switch v.Kind {
		case "member":
			members++
			m, n, err := DecodeMember(raw)
			if err != nil || n != len(raw) || m.Port != v.Port {
				t.Errorf("row %d: n=%d err=%v port %d", i, n, err, m.Port)
			}
			if !bytes.Equal(AppendMember(nil, m), raw) {
				t.Errorf("row %d: heartbeat differs when encoded again", i)
			}
		case "frame":
			frames++
			stream = append(stream, raw...)
			m := mustFrame(t, raw)
			if m.From.Port != v.Port || m.Options != channel.Options(v.Options) || len(m.Body) != v.BodyLength || hex.EncodeToString(m.ID[:]) != v.UniqueIDHex {
				t.Errorf("row %d: decoded %+v", i, m)
			}
			if !bytes.Equal(AppendFrame(nil, m), raw) {
				t.Errorf("row %d: frame differs when encoded again", i)
			}
		case "ack":
			acks++
			stream = append(stream, raw...)
			if string(raw) != Ack && string(raw) != NegativeAck {
				t.Errorf("row %d: unknown acknowledgement %x", i, raw)
			}
		default:
			t.Errorf("row %d: unknown kind %q", i, v.Kind)
		}
	}
	t.Logf("%d frames, %d acks, %d heartbeats", frames, acks, members)
	// All of it as one stream, senders mixed, in awkward reads.
	for _, chunk := range []int{1, 13, 1000, 1 << 20} {
		d := NewDecoder(0)
		gotFrames, gotAcks := 0, 0
		var again []byte
		feed(t, d, stream, chunk, func(k Kind, m *channel.Message) {
			switch k {
			case MessageFrame:
				gotFrames++
				again = AppendFrame(again, m)
			case AckFrame:
				gotAcks++
				again = append(again, Ack...)
			case NegativeAckFrame:
				gotAcks++
				again = append(again, NegativeAck...)
			}
		})
		if gotFrames != frames || gotAcks != acks || !bytes.Equal(again, stream) {
			t.Errorf("reads of %d: %d frames, %d acks, want %d and %d; same bytes %v", chunk, gotFrames, gotAcks, frames, acks, bytes.Equal(again, stream))
		}
	}
}
