package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"pgregory.net/rapid"
)

func testMember() channel.Member {
	return channel.Member{
		ID: channel.NewUniqueID(), Host: netip.MustParseAddr("192.0.2.17"),
		Port: 4000, SecurePort: -1, UDPPort: -1, Alive: 5 * time.Second,
	}
}

func testMessage(size int) *channel.Message {
	return &channel.Message{
		ID: channel.NewUniqueID(), From: testMember(), Options: channel.SendAck,
		Time: 1700000000123, Body: bytes.Repeat([]byte{0xa5}, size),
	}
}

// put overwrites an i32 of a copy of b.
func put(b []byte, at int, v uint32) []byte {
	b = bytes.Clone(b)
	binary.BigEndian.PutUint32(b[at:], v)
	return b
}

func TestDecodeMemberRefuses(t *testing.T) {
	m := testMember()
	m.Domain, m.Command, m.Payload = "dom", "cmd", "payload"
	raw := AppendMember(nil, m)
	command := memberHead + 8 + 12 + 1 + 4
	domain := command + 4 + len(m.Command)
	payload := domain + 4 + len(m.Domain) + 16
	for _, c := range []struct {
		name string
		in   []byte
		want *Error
	}{
		{"empty", nil, ErrTruncated},
		{"other protocol", []byte("GET / HTTP/1.1"), ErrMemberMarker},
		{"length 2^31-1", put(raw, 10, 1<<31-1), ErrMemberLength},
		{"length -1", put(raw, 10, 1<<32-1), ErrMemberLength},
		{"length 0", put(raw, 10, 0), ErrMemberLength},
		{"length of 48", put(raw, 10, 48), ErrMemberLength},
		{"body shorter than declared", put(raw, 10, uint32(len(raw))), ErrTruncated},
		{"declared shorter than body", put(raw, 10, uint32(len(raw)-memberFrame-1)), ErrMemberEnd},
		{"no end mark", append(raw[:len(raw)-10:len(raw)-10], "TRIBES-X\x01\x00"...), ErrMemberEnd},
		{"port -1", put(raw, memberHead+8, 1<<32-1), ErrMemberPort},
		{"port 65536", put(raw, memberHead+8, 65536), ErrMemberPort},
		{"secure port -2", put(raw, memberHead+12, 1<<32-2), ErrMemberPort},
		{"udp port 65536", put(raw, memberHead+16, 65536), ErrMemberPort},
		{"command length -1", put(raw, command, 1<<32-1), ErrMemberFields},
		{"command length 2^31-1", put(raw, command, 1<<31-1), ErrMemberFields},
		{"domain past the end", put(raw, domain, 100), ErrMemberFields},
		{"domain swallows the id", put(raw, domain, 20), ErrMemberFields},
		{"payload one short", put(raw, payload, uint32(len(m.Payload)-1)), ErrMemberFields},
		{"payload one long", put(raw, payload, uint32(len(m.Payload)+1)), ErrMemberFields},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, n, err := DecodeMember(c.in); err != c.want || n != 0 || got != (channel.Member{}) {
				t.Errorf("got %+v n=%d err=%v, want %v", got, n, err, c.want)
			}
		})
	}
	for _, h := range []byte{0, 3, 5, 15, 17, 127, 128, 255} {
		b := bytes.Clone(raw)
		b[memberHead+20] = h
		if _, _, err := DecodeMember(b); err != ErrMemberHost {
			t.Errorf("host length %d: got %v", h, err)
		}
	}
	m.Payload = strings.Repeat("x", MaxMember)
	if _, _, err := DecodeMember(AppendMember(nil, m)); err != ErrMemberLength {
		t.Errorf("record over the limit: got %v", err)
	}
}

func TestDecodeFrameRefuses(t *testing.T) {
	raw := AppendFrame(nil, testMessage(5))
	id, record := frameHead+12, frameHead+packHead
	body := len(raw) - len(frameEnd) - 5 - 4
	frame := func(payload string) []byte {
		b := binary.BigEndian.AppendUint32([]byte(frameBegin), uint32(len(payload)))
		return append(append(b, payload...), frameEnd...)
	}
	// A frame whose length is negative points back at the trailer before it.
	back := append(bytes.Clone(raw), frameBegin+"\xff\xff\xff\xee"...)
	for _, c := range []struct {
		name string
		in   []byte
		want *Error
	}{
		{"length 0", frame(""), ErrFrameLength},
		{"length 1", frame("x"), ErrFrameLength},
		{"length -1", put(raw, 7, 1<<32-1), ErrFrameLength},
		{"length -2^31", put(raw, 7, 1<<31), ErrFrameLength},
		{"length 2^31-1", put(raw, 7, 1<<31-1), ErrFrameTooLarge},
		{"length over the limit, head alone", put(raw, 7, 1<<20)[:frameHead], ErrFrameTooLarge},
		{"later frame with length -18", back, ErrFrameLength},
		{"three bytes, no ack", frame("\x06\x02\x04"), ErrFrameLength},
		{"length one short", put(raw, 7, uint32(len(raw)-frameExtra-1)), ErrFrameEnd},
		{"garbage of full size", frame(strings.Repeat("x", 200)), ErrMessageID},
		{"id length -1", put(raw, id, 1<<32-1), ErrMessageID},
		{"id length 0", put(raw, id, 0), ErrMessageID},
		{"id length 2^31-1", put(raw, id, 1<<31-1), ErrMessageID},
		{"no sender", put(raw, record, 0), ErrBody},
		{"sender length -1", put(raw, record, 1<<32-1), ErrSender},
		{"sender one short", put(raw, record, 76), ErrBody},
		{"body length -1", put(raw, body, 1<<32-1), ErrBody},
		{"body one short", put(raw, body, 4), ErrBody},
		{"body past the end", put(raw, body, 6), ErrBody},
		{"HTTP", []byte("GET / HTTP/1.1\r\n"), ErrFrameMarker},
		{"TLS", []byte("\x16\x03\x01"), ErrFrameMarker},
		{"SSH, first bytes", []byte("SS"), ErrFrameMarker},
		{"AJP", []byte("\x12\x34\x00\x01\x0a"), ErrFrameMarker},
		{"heartbeat", AppendMember(nil, testMember()), ErrFrameMarker},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := NewDecoder(1 << 16)
			d.Wrote(copy(d.Space(), c.in))
			var m channel.Message
			k, err := d.Next(&m)
			for k != Incomplete && err == nil {
				k, err = d.Next(&m)
			}
			if err != c.want {
				t.Fatalf("got kind=%d err=%v, want %v", k, err, c.want)
			}
			d.Wrote(copy(d.Space(), raw))
			if k, err := d.Next(&m); k != Incomplete || err != c.want {
				t.Errorf("after the error: kind=%d err=%v", k, err)
			}
			if !errors.Is(err, channel.ErrBadMessage) && !errors.Is(err, channel.ErrTooLarge) {
				t.Errorf("%v is none of the channel's errors", err)
			}
		})
	}
}

// A sender record with bytes behind it, or one cut short, inside a frame whose
// other lengths are right.
func TestDecodeFrameRefusesSender(t *testing.T) {
	m := testMessage(5)
	record := AppendMember(nil, m.From)
	for name, r := range map[string][]byte{
		"trailing bytes": append(bytes.Clone(record), 0),
		"declares more":  put(record, 10, uint32(len(record))),
		"oversize":       make([]byte, MaxMember+1),
	} {
		raw := AppendFrameRecord(nil, r, m)
		if _, _, err := DecodeFrame(raw, DefaultMaxFrame, m); err != ErrSender {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestReasons(t *testing.T) {
	seen := map[string]bool{}
	for _, e := range Errors() {
		if e.Reason == "" || seen[e.Reason] {
			t.Errorf("reason %q is empty or used twice", e.Reason)
		}
		seen[e.Reason] = true
		if got := Reason(fmt.Errorf("reading: %w", e)); got != e.Reason {
			t.Errorf("Reason of a wrapped %v is %q", e, got)
		}
	}
	if Reason(errors.New("x")) != "other" {
		t.Error("a foreign error has a reason")
	}
}

// The memory of a decoder follows what has come, not what is declared, and goes
// back after a large frame.
func TestDecoderMemory(t *testing.T) {
	large := AppendFrame(nil, testMessage(8<<20))
	d := NewDecoder(0)
	d.Wrote(copy(d.Space(), large[:100]))
	if _, err := d.Next(new(channel.Message)); err != nil || d.Held() > firstBuffer {
		t.Fatalf("100 bytes of 8 MiB: %d bytes held, err=%v", d.Held(), err)
	}
	frames, peak := 0, 0
	for rest := large[100:]; len(rest) > 0; {
		n := copy(d.Space(), rest)
		d.Wrote(n)
		rest = rest[n:]
		if peak = max(peak, d.Held()); d.Held() > max(2*(len(large)-len(rest)), 2*firstBuffer) {
			t.Fatalf("%d bytes held for %d received", d.Held(), len(large)-len(rest))
		}
		k, err := d.Next(new(channel.Message))
		if err != nil {
			t.Fatal(err)
		}
		if k == MessageFrame {
			frames++
		}
	}
	if frames != 1 || peak > len(large) {
		t.Errorf("%d frames, at most %d bytes held for a frame of %d", frames, peak, len(large))
	}
	if d.Space(); d.Held() > readBuffer {
		t.Errorf("%d bytes held after the large frame", d.Held())
	}
}

// Two senders on one connection: the remembered record must not leak from one
// message into the other.
func TestDecoderSenders(t *testing.T) {
	a, b := testMessage(1), testMessage(2)
	b.From.Domain = "b"
	var stream []byte
	want := []*channel.Message{a, a, b, a, b, b}
	for _, m := range want {
		stream = AppendFrame(stream, m)
	}
	i := 0
	feed(t, NewDecoder(0), stream, 50, func(_ Kind, m *channel.Message) {
		if m.From != want[i].From || m.ID != want[i].ID {
			t.Errorf("message %d: got %v from %+v", i, m.ID, m.From)
		}
		i++
	})
	if i != len(want) {
		t.Errorf("%d messages, want %d", i, len(want))
	}
}

func drawMember(t *rapid.T) channel.Member {
	host := rapid.OneOf(rapid.SliceOfN(rapid.Byte(), 4, 4), rapid.SliceOfN(rapid.Byte(), 16, 16)).Draw(t, "host")
	addr, _ := netip.AddrFromSlice(host)
	text := rapid.StringN(0, 40, -1)
	m := channel.Member{
		Host: addr, Port: rapid.IntRange(0, 65535).Draw(t, "port"),
		SecurePort: rapid.IntRange(-1, 65535).Draw(t, "secure"), UDPPort: rapid.IntRange(-1, 65535).Draw(t, "udp"),
		Domain: text.Draw(t, "domain"), Command: text.Draw(t, "command"), Payload: text.Draw(t, "payload"),
		Alive: time.Duration(rapid.Int64Range(-1<<40, 1<<40).Draw(t, "alive")) * time.Millisecond,
	}
	copy(m.ID[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id"))
	return m
}

func TestMemberRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMember(t)
		raw := AppendMember([]byte("x"), m)[1:]
		got, n, err := DecodeMember(raw)
		if err != nil || n != len(raw) || got != m || MemberSize(m) != n {
			t.Fatalf("got %+v n=%d err=%v\nwant %+v", got, n, err, m)
		}
	})
}

func TestStreamRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		senders := rapid.SliceOfN(rapid.Custom(drawMember), 1, 3).Draw(t, "senders")
		var stream []byte
		var want []channel.Message
		for range rapid.IntRange(1, 8).Draw(t, "messages") {
			m := channel.Message{
				From: rapid.SampledFrom(senders).Draw(t, "from"), ID: channel.NewUniqueID(),
				Options: channel.Options(rapid.Uint32().Draw(t, "options")), Time: rapid.Int64().Draw(t, "time"),
				Body: rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "body"),
			}
			want = append(want, m)
			stream = AppendFrame(stream, &m)
		}
		d := NewDecoder(0)
		chunk := rapid.IntRange(1, len(stream)).Draw(t, "chunk")
		i := 0
		var m channel.Message
		for len(stream) > 0 {
			n := copy(d.Space(), stream[:min(chunk, len(stream))])
			d.Wrote(n)
			stream = stream[n:]
			for {
				k, err := d.Next(&m)
				if err != nil {
					t.Fatal(err)
				}
				if k == Incomplete {
					break
				}
				w := want[i]
				if m.ID != w.ID || m.From != w.From || m.Options != w.Options || m.Time != w.Time || !bytes.Equal(m.Body, w.Body) {
					t.Fatalf("message %d: got %+v want %+v", i, m, w)
				}
				i++
			}
		}
		if i != len(want) || d.Buffered() != 0 {
			t.Fatalf("%d of %d messages, %d bytes left", i, len(want), d.Buffered())
		}
	})
}

func TestNoAllocations(t *testing.T) {
	m := testMessage(1000)
	m.From.Payload = "payload"
	stream := bytes.Repeat(AppendFrame(nil, m), 20)
	buf := make([]byte, 0, FrameSize(m))
	if n := testing.AllocsPerRun(100, func() { buf = AppendFrame(buf[:0], m) }); n != 0 {
		t.Errorf("encoding allocates %v times", n)
	}
	d := NewDecoder(0)
	var got channel.Message
	decode := func() {
		for rest := stream; len(rest) > 0; {
			n := copy(d.Space(), rest)
			d.Wrote(n)
			rest = rest[n:]
			for k := MessageFrame; k == MessageFrame; {
				k, _ = d.Next(&got)
			}
		}
	}
	decode()
	decode()
	if n := testing.AllocsPerRun(100, decode); n != 0 {
		t.Errorf("decoding 20 frames allocates %v times", n)
	}
}
