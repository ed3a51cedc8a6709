package bridge

import (
	"bytes"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

func testMessage() channel.Message {
	m := channel.Member{ID: channel.UniqueID{1, 2}, Port: 4000, SecurePort: -1, Domain: "d", Alive: time.Second}
	return channel.Message{ID: channel.UniqueID{9}, From: m, To: []channel.Member{m, {ID: channel.UniqueID{3}}}, Time: 77, Body: []byte("body")}
}

// FuzzMessage: what is read is read the same after it was packed again.
func FuzzMessage(f *testing.F) {
	m := testMessage()
	f.Add(append(appendHead(nil, &m, messageTold, true), m.Body...), true)
	f.Add(append(appendHead(nil, &m, 0, false), m.Body...), false)
	f.Add([]byte{255, 255, 255, 255, 0}, true)
	f.Fuzz(func(t *testing.T, b []byte, down bool) {
		var m, again channel.Message
		d := decoder{b: b}
		flags := d.message(&m, down)
		if d.err != nil {
			if len(m.Body) > 0 {
				t.Error("a body in spite of an error")
			}
			return
		}
		d = decoder{b: append(appendHead(nil, &m, flags, down), m.Body...)}
		if got := d.message(&again, down); d.err != nil || got != flags || again.ID != m.ID || again.From != m.From ||
			again.Time != m.Time || len(again.To) != len(m.To) || !bytes.Equal(again.Body, m.Body) {
			t.Errorf("%+v became %+v, %v", m, again, d.err)
		}
	})
}

// FuzzVerdict: a verdict changes nothing that it does not name, and there is no
// verdict that breaks the node.
func FuzzVerdict(f *testing.F) {
	f.Add(uint8(frame.Pass), []byte{})
	f.Add(uint8(frame.Drop), []byte{verdictOpen})
	f.Add(uint8(frame.Error), appendError(nil, channel.ErrTooLarge, 0))
	f.Add(uint8(frame.Replace), append([]byte{replaceTime | replaceBody}, "\x00\x00\x00\x00\x00\x00\x00\x01new"...))
	f.Fuzz(func(t *testing.T, kind uint8, b []byte) {
		var v verdict
		if err := decodeVerdict(&v, frame.Frame{Header: frame.Header{Verdict: frame.Verdict(kind)}, Payload: b}, nil); err != nil {
			return
		}
		if v.kind > frame.Error || v.kind == frame.Inject {
			t.Fatalf("verdict %d was taken", v.kind)
		}
		if v.kind == frame.Error && v.err == nil {
			t.Error("an error without one")
		}
		m, was := testMessage(), testMessage()
		v.apply(&m, was.Body)
		if v.fields&replaceID == 0 && m.ID != was.ID || v.fields&replaceTime == 0 && m.Time != was.Time ||
			v.fields&replaceFrom == 0 && m.From != was.From || v.fields&replaceBody == 0 && !bytes.Equal(m.Body, was.Body) {
			t.Errorf("fields %b: %+v", v.fields, m)
		}
	})
}
