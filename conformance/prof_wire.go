package conformance

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

func wireChecks() []Check {
	check := func(name string, run func(t *T, c Codec), requirement, source string, saboteurs ...Saboteur) Check {
		return Check{
			ID: "wire/" + name, Profile: ProfileWire, Level: Must, Requirement: requirement, Source: source,
			Run: func(t *T) {
				s, ok := t.Subject.(WireSubject)
				if !ok {
					t.Fatalf("a %T is no codec", t.Subject)
				}
				run(t, s.Codec())
			},
			Saboteurs: saboteurs,
		}
	}
	const format = "channel/wire: package comment; tomcat-tribes 10.1: XByteBuffer, ChannelData, MemberImpl"
	return []Check{
		check("golden-decode", checkGoldenDecode, "Every recorded frame and member record of Tomcat decodes to the recorded fields.", format, sabGoldenDecode()...),
		check("golden-encode", checkGoldenEncode, "Encoding what was decoded gives the same bytes.", format, sabGoldenEncode()...),
		check("split-and-join", checkSplit, "Cut at every byte and glued together in any number, frames give the same messages in order.", format, sabSplit()...),
		check("hostile-length", checkHostileLength, "Lengths that are negative, huge or beyond the limit are refused before anything is allocated for them.",
			"channel/wire: every length is checked before anything is allocated", sabHostileLength()...),
		check("unknown-options", checkUnknownOptions, "Unknown option bits are kept.", "channel: Options", sabUnknownOptions()...),
		check("ack-bytes", checkAckBytes, "Acknowledgements are byte for byte those of Tribes; after bytes that are no frame the stream stays an error.",
			"channel/wire: Ack, NegativeAck, Decoder.Next", sabAckBytes()...),
	}
}

// The vectors were written by the classes of tomcat-tribes 10.1.60, and
// recorded between two of its nodes.
//
//go:embed vectors/*.json
var vectorFiles embed.FS

type memberVector struct {
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
	Name, Kind, Hex string
	Length          int
	SHA256          string
	Port            int
	Options         uint32
	UniqueIDHex     string
	BodyLength      int
	Fields          struct {
		memberVector
		Options    uint32
		Timestamp  int64
		BodyLength int
		BodyHex    string
		BodyRule   string
		Member     memberVector
	}
}

// raw returns the vector's bytes; nil if only their hash was kept.
func (v *vector) raw(t *T) []byte { return unhex(t, v.Hex) }

func vectors(t *T, file string) []vector {
	t.Helper()
	b, err := vectorFiles.ReadFile("vectors/" + file)
	var f struct{ Vectors []vector }
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	if err != nil || len(f.Vectors) == 0 {
		t.Fatalf("vectors %s: %v", file, err)
	}
	return f.Vectors
}

func unhex(t *T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatalf("vector: %v", err)
	}
	return b
}

// member returns the fields; ok is false for records that Longhouse refuses on
// purpose: a host that is no address.
func (f memberVector) member(t *T) (m channel.Member, ok bool) {
	host, ok := netip.AddrFromSlice(unhex(t, f.HostHex))
	if !ok || len(f.UniqueIDHex) != 32 {
		return m, false
	}
	alive := time.Duration(math.MaxInt64)
	if f.Alive < math.MaxInt64/int64(time.Millisecond) {
		alive = time.Duration(f.Alive) * time.Millisecond
	}
	return channel.Member{
		ID: channel.UniqueID(unhex(t, f.UniqueIDHex)), Host: host,
		Port: f.Port, SecurePort: f.SecurePort, UDPPort: f.UDPPort,
		Domain: string(unhex(t, f.DomainHex)), Command: string(unhex(t, f.CommandHex)),
		Payload: string(unhex(t, f.PayloadHex)), Alive: alive,
	}, true
}

// message returns the message of a frame's vector; ok is false for ids that
// Longhouse refuses on purpose.
func (v *vector) message(t *T) (m *channel.Message, ok bool) {
	f := v.Fields
	from, ok := f.Member.member(t)
	if !ok || len(f.UniqueIDHex) != 32 {
		return nil, false
	}
	m = &channel.Message{
		ID: channel.UniqueID(unhex(t, f.UniqueIDHex)), From: from,
		Options: channel.Options(f.Options), Time: f.Timestamp, Body: unhex(t, f.BodyHex),
	}
	if f.BodyRule != "" {
		m.Body = make([]byte, f.BodyLength)
		for i := range m.Body {
			m.Body[i] = byte(i)
		}
	}
	return m, true
}

// sameMember compares records; an alive time of more than 292 years may be cut.
func sameMember(a, b channel.Member) bool {
	const long = 290 * 365 * 24 * time.Hour
	if a.Alive > long && b.Alive > long {
		a.Alive, b.Alive = 0, 0
	}
	return a == b
}

func sameMessage(a, b *channel.Message) bool {
	return a.ID == b.ID && sameMember(a.From, b.From) && a.Options == b.Options && a.Time == b.Time && bytes.Equal(a.Body, b.Body)
}

// frames returns all recorded frames that must be readable.
func frames(t *T) (list [][]byte) {
	for _, v := range vectors(t, "frame.json") {
		if _, ok := v.message(t); ok && v.Kind == "channeldata" && v.Hex != "" {
			list = append(list, v.raw(t))
		}
	}
	for _, v := range vectors(t, "captured.json") {
		if v.Kind == "frame" {
			list = append(list, v.raw(t))
		}
	}
	return list
}

func checkGoldenDecode(t *T, c Codec) {
	for _, v := range vectors(t, "member.json") {
		want, ok := v.Fields.member(t)
		got, n, err := c.DecodeMember(v.raw(t))
		switch {
		case !ok && err == nil && n != len(v.raw(t)):
			t.Errorf("member %s: read %d of %d bytes", v.Name, n, len(v.raw(t)))
		case ok && (err != nil || n != v.Length || !sameMember(got, want)):
			t.Errorf("member %s: %d bytes, %v, %+v, want %d bytes, %+v", v.Name, n, err, got, v.Length, want)
		}
	}
	for _, v := range vectors(t, "frame.json") {
		want, ok := v.message(t)
		if !ok || v.Kind != "channeldata" || v.Hex == "" {
			continue
		}
		var got channel.Message
		if k, n, err := c.DecodeFrame(v.raw(t), wire.DefaultMaxFrame, &got); k != wire.MessageFrame || n != v.Length || err != nil || !sameMessage(&got, want) {
			t.Errorf("frame %s: kind %d, %d bytes, %v, %+v, want %+v", v.Name, k, n, err, got, want)
		}
	}
	for i, v := range vectors(t, "captured.json") {
		switch v.Kind {
		case "member":
			if m, n, err := c.DecodeMember(v.raw(t)); err != nil || n != len(v.raw(t)) || m.Port != v.Port {
				t.Errorf("recorded heartbeat %d: %d bytes, port %d, %v", i, n, m.Port, err)
			}
		case "frame":
			var m channel.Message
			k, n, err := c.DecodeFrame(v.raw(t), wire.DefaultMaxFrame, &m)
			if k != wire.MessageFrame || n != len(v.raw(t)) || err != nil || m.From.Port != v.Port || m.Options != channel.Options(v.Options) ||
				len(m.Body) != v.BodyLength || hex.EncodeToString(m.ID[:]) != v.UniqueIDHex {
				t.Errorf("recorded frame %d: kind %d, %d bytes, %v, %v", i, k, n, err, m.Options)
			}
		}
	}
}

func checkGoldenEncode(t *T, c Codec) {
	for _, v := range vectors(t, "member.json") {
		if want, ok := v.Fields.member(t); ok && v.Fields.Alive != math.MaxInt64 {
			if got := c.AppendMember([]byte("before"), want); !bytes.Equal(got, append([]byte("before"), v.raw(t)...)) {
				t.Errorf("member %s: encoded as %x, want %s", v.Name, got[min(6, len(got)):], v.Hex)
			}
		}
	}
	for _, v := range vectors(t, "frame.json") {
		m, ok := v.message(t)
		if !ok || v.Kind != "channeldata" {
			continue
		}
		got := c.AppendFrame(nil, m)
		if h := sha256.Sum256(got); hex.EncodeToString(h[:]) != v.SHA256 {
			t.Errorf("frame %s: encoded as other bytes", v.Name)
		}
	}
	for i, v := range vectors(t, "captured.json") {
		switch v.Kind {
		case "member":
			if m, _, err := c.DecodeMember(v.raw(t)); err == nil && !bytes.Equal(c.AppendMember(nil, m), v.raw(t)) {
				t.Errorf("recorded heartbeat %d: encoded as other bytes", i)
			}
		case "frame":
			var m channel.Message
			if _, _, err := c.DecodeFrame(v.raw(t), wire.DefaultMaxFrame, &m); err == nil && !bytes.Equal(c.AppendFrame(nil, &m), v.raw(t)) {
				t.Errorf("recorded frame %d: encoded as other bytes", i)
			}
		}
	}
}

// through feeds raw to a new stream in reads whose sizes next returns, and
// returns what came out.
func through(c Codec, raw []byte, next func() int) (out []channel.Message, kinds []wire.Kind, err error) {
	s := c.NewStream(0)
	for len(raw) > 0 {
		room := s.Space()
		if len(room) == 0 {
			return out, kinds, errors.New("the stream has no room for the next bytes")
		}
		n := copy(room, raw[:min(max(next(), 1), len(raw))])
		s.Wrote(n)
		raw = raw[n:]
		for {
			var m channel.Message
			k, err := s.Next(&m)
			if err != nil {
				return out, kinds, err
			}
			if k == wire.Incomplete {
				break
			}
			m.Body = slices.Clone(m.Body)
			out, kinds = append(out, m), append(kinds, k)
		}
	}
	return out, kinds, nil
}

func checkSplit(t *T, c Codec) {
	all := frames(t)
	var want []channel.Message
	for _, raw := range all {
		var m channel.Message
		if _, _, err := c.DecodeFrame(raw, wire.DefaultMaxFrame, &m); err != nil {
			t.Fatalf("frame: %v", err)
		}
		m.Body = slices.Clone(m.Body)
		want = append(want, m)
	}
	same := func(what string, got []channel.Message, want []channel.Message, err error) bool {
		if err == nil && slices.EqualFunc(got, want, func(a, b channel.Message) bool { return sameMessage(&a, &b) }) {
			return true
		}
		t.Errorf("%s: %d messages of %d, or other ones: %v", what, len(got), len(want), err)
		return false
	}
	// Cut one frame in two at every byte, with a neighbour on each side.
	three := slices.Concat(all[0], all[len(all)-1], all[1])
	wantThree := []channel.Message{want[0], want[len(want)-1], want[1]}
	for cut := 1; cut < len(three); cut++ {
		sizes := []int{cut, len(three)}
		got, _, err := through(c, three, func() int { n := sizes[0]; sizes = sizes[1:]; return n })
		if !same(fmt.Sprintf("cut after %d bytes", cut), got, wantThree, err) {
			return
		}
	}
	for cut := range all[0] {
		var m channel.Message
		if k, n, err := c.DecodeFrame(all[0][:cut], wire.DefaultMaxFrame, &m); k != wire.Incomplete || n != 0 || err != nil {
			t.Errorf("the first %d of %d bytes of a frame: kind %d, %d bytes, %v, want incomplete", cut, len(all[0]), k, n, err)
			return
		}
	}
	glued := slices.Concat(all...)
	rng := t.Rand("split")
	for _, most := range []int{1, 2, 7, 64, 1000, 1 << 20} {
		got, _, err := through(c, glued, func() int { return 1 + rng.IntN(most) })
		if !same(fmt.Sprintf("all frames in reads of at most %d bytes", most), got, want, err) {
			return
		}
	}
}

// allocationBound is what reading a hostile frame may allocate, in bytes.
const allocationBound = 1 << 20

func checkHostileLength(t *T, c Codec) {
	frame := frames(t)[0]
	lengths := []int32{-1, -2, math.MinInt32, math.MaxInt32, math.MaxInt32 - 7, 1 << 30, 1 << 28}
	with := func(b []byte, at int, n int32) []byte {
		b = bytes.Clone(b)
		binary.BigEndian.PutUint32(b[at:], uint32(n))
		return b
	}
	// Where the lengths stand in a frame: of the frame, of the id, of the
	// sender's record, inside of that record, of the body.
	head := wire.FrameHead
	id := head + 12
	record := id + 4 + 16
	size := int(int32(binary.BigEndian.Uint32(frame[record:])))
	fields := []struct {
		name string
		at   int
	}{{"frame", head - 4}, {"id", id}, {"sender", record}, {"member body", record + 4 + 10}, {"message body", record + 4 + size}}
	for _, f := range fields {
		for _, n := range lengths {
			bad := with(frame, f.at, n)
			var m channel.Message
			allocated := allocations(func() {
				k, _, err := c.DecodeFrame(bad, 1<<20, &m)
				if err == nil {
					t.Errorf("%s length %d: accepted, kind %d", f.name, n, k)
				}
				out, _, err := through(c, bad, func() int { return 1000 })
				if err == nil || len(out) > 0 {
					t.Errorf("%s length %d in a stream: %d messages, error %v", f.name, n, len(out), err)
				}
			})
			if allocated > allocationBound {
				t.Errorf("%s length %d: %d KiB were allocated for it", f.name, n, allocated>>10)
			}
		}
	}
	memberVectors := vectors(t, "member.json")
	rec := memberVectors[0].raw(t)
	for _, at := range []int{10} {
		for _, n := range lengths {
			if got := allocations(func() {
				if _, _, err := c.DecodeMember(with(rec, at, n)); err == nil {
					t.Errorf("member length %d: accepted", n)
				}
			}); got > allocationBound {
				t.Errorf("member length %d: %d KiB were allocated for it", n, got>>10)
			}
		}
	}
	var m channel.Message
	if _, _, err := c.DecodeFrame(frame, len(frame)-1, &m); !errors.Is(err, channel.ErrTooLarge) {
		t.Errorf("a frame one byte beyond the limit: %v, want ErrTooLarge", err)
	}
	if k, _, err := c.DecodeFrame(frame, len(frame), &m); k != wire.MessageFrame || err != nil {
		t.Errorf("a frame exactly at the limit: kind %d, %v", k, err)
	}
	if _, _, err := c.DecodeFrame(frame[:head], len(frame)-1, &m); !errors.Is(err, channel.ErrTooLarge) {
		t.Errorf("the head of a frame beyond the limit is not refused at once: %v", err)
	}
}

// allocations returns the bytes that f allocates, about: the least of a few
// runs, since others may allocate at the same time.
func allocations(f func()) uint64 {
	least := uint64(math.MaxUint64)
	for range 5 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		if least = min(least, after.TotalAlloc-before.TotalAlloc); least <= allocationBound {
			break
		}
	}
	return least
}

func checkUnknownOptions(t *T, c Codec) {
	var m channel.Message
	if _, _, err := c.DecodeFrame(frames(t)[0], wire.DefaultMaxFrame, &m); err != nil {
		t.Fatalf("frame: %v", err)
	}
	for bit := range 32 {
		m.Options = channel.Options(1) << bit
		var got channel.Message
		k, _, err := c.DecodeFrame(c.AppendFrame(nil, &m), wire.DefaultMaxFrame, &got)
		if k != wire.MessageFrame || err != nil || got.Options != m.Options {
			t.Errorf("option %#x came back as %#x, %v", uint32(m.Options), uint32(got.Options), err)
		}
	}
}

func checkAckBytes(t *T, c Codec) {
	own := map[string][]byte{"ack": c.Ack, "fail-ack": c.NegativeAck}
	kinds := map[string]wire.Kind{"ack": wire.AckFrame, "fail-ack": wire.NegativeAckFrame}
	seen := 0
	for _, v := range vectors(t, "frame.json") {
		want, ok := kinds[v.Name]
		if !ok {
			continue
		}
		seen++
		if !bytes.Equal(own[v.Name], v.raw(t)) {
			t.Errorf("%s is written as %x, want %s", v.Name, own[v.Name], v.Hex)
		}
		k, n, err := c.DecodeFrame(v.raw(t), wire.DefaultMaxFrame, new(channel.Message))
		if k != want || n != len(v.raw(t)) || err != nil {
			t.Errorf("%s is read as kind %d, %d bytes, %v", v.Name, k, n, err)
		}
	}
	if seen != 2 {
		t.Fatalf("%d vectors of acknowledgements", seen)
	}
	acks := slices.Concat(c.Ack, c.NegativeAck, c.Ack)
	if _, got, err := through(c, acks, func() int { return 5 }); err != nil || !slices.Equal(got, []wire.Kind{wire.AckFrame, wire.NegativeAckFrame, wire.AckFrame}) {
		t.Errorf("three acknowledgements in a stream: %v, %v", got, err)
	}
	for _, junk := range [][]byte{[]byte("HTTP/1.1 400 Bad Request\r\n"), []byte("SSH-2.0-x\r\n"), {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 0}, flipped(c.Ack, len(c.Ack)-1), flipped(c.Ack, 0)} {
		s := c.NewStream(0)
		feed := func(b []byte) {
			for len(b) > 0 {
				n := copy(s.Space(), b)
				s.Wrote(n)
				b = b[n:]
			}
		}
		feed(c.Ack)
		var m channel.Message
		if k, err := s.Next(&m); k != wire.AckFrame || err != nil {
			t.Fatalf("an acknowledgement: kind %d, %v", k, err)
		}
		feed(junk)
		_, first := s.Next(&m)
		feed(c.Ack)
		k, second := s.Next(&m)
		if first == nil || second == nil {
			t.Errorf("after %q the stream goes on: %v, then kind %d, %v", junk, first, k, second)
		}
	}
}

func flipped(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 0x20
	return b
}
