package rpc

import (
	"bytes"
	"encoding/binary"
	"math"
	"time"

	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

const (
	magic = "LHR\x01"
	// head is how many bytes come before the name.
	head = len(magic) + 1 + 1 + 16 + 4
	// maxName bounds the name of an RPC, in bytes.
	maxName = 255
	// maxErrorText bounds the text of a handler's error on the wire, in bytes.
	maxErrorText = 1024
)

// kind is what a message is.
type kind byte

const (
	request kind = iota + 1
	reply
	failure // the handler's error as text
	absent  // no RPC of that name
	busy    // too many requests at a time
	kinds

	// object marks a body that is a Java object stream.
	object kind = 0x80
)

// callID names a call: the caller's instance and a number. It is Tribes' uuid.
type callID [16]byte

// frame is one message of either form.
type frame struct {
	kind kind
	id   callID
	name []byte
	wait time.Duration // of a request; 0 for ever
	body []byte        // of the native form
	// Of the form of Tribes.
	tribes bool
	value  jser.Value
}

// appendFrame appends the native form.
func appendFrame(dst []byte, f *frame) []byte {
	ms := uint64(0)
	if f.wait > 0 {
		ms = min(max(1, uint64(f.wait/time.Millisecond)), math.MaxUint32)
	}
	dst = append(dst, magic...)
	dst = append(dst, byte(f.kind), byte(len(f.name)))
	dst = append(dst, f.id[:]...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(ms))
	dst = append(dst, f.name...)
	return append(dst, f.body...)
}

// native reports whether b begins as the native form does.
func native(b []byte) bool { return len(b) >= len(magic) && string(b[:len(magic)]) == magic }

// decodeFrame reads the native form. The frame shares the memory of b.
func decodeFrame(b []byte) (f frame, ok bool) {
	if len(b) < head || !native(b) {
		return f, false
	}
	f.kind = kind(b[4])
	n := int(b[5])
	copy(f.id[:], b[6:])
	f.wait = time.Duration(binary.BigEndian.Uint32(b[22:])) * time.Millisecond
	b = b[head:]
	if k := f.kind &^ object; k == 0 || k >= kinds || n == 0 || n > len(b) {
		return f, false
	}
	f.name, f.body = b[:n:n], b[n:]
	return f, true
}

// tribesHead is how the object stream of an RpcMessage, or of a
// NoRpcChannelReply, begins, but for the length of the class name.
var (
	tribesName  = []byte("org.apache.catalina.tribes.group.RpcMessage")
	tribesStart = []byte("\xac\xed\x00\x05sr\x00")
)

// foreign reports whether b begins as the object stream of an RPC does.
func foreign(b []byte) bool {
	n := len(tribesStart)
	return len(b) > n+1+len(tribesName) && bytes.HasPrefix(b, tribesStart) && bytes.HasPrefix(b[n+1:], tribesName)
}

// decodeTribes reads the form of Tribes.
func decodeTribes(b []byte, l jser.Limits) (f frame, err error) {
	v, err := jser.Decode(b, l)
	if err != nil {
		return f, err
	}
	m, ok := v.(*jser.RPCMessage)
	if !ok || len(m.UUID) != len(f.id) {
		return f, jser.ErrShape
	}
	f = frame{kind: request, id: callID(m.UUID), name: m.RPCID, tribes: true, value: m.Message}
	if m.NoChannel {
		f.kind = absent
	} else if m.Reply {
		f.kind = reply
	}
	return f, nil
}

// encodeTribes writes the form of Tribes. It has no word for a failure: that is
// an answer of null.
func encodeTribes(d *jser.Dialect, f *frame) ([]byte, error) {
	m := &jser.RPCMessage{Reply: f.kind != request, NoChannel: f.kind == absent, UUID: f.id[:], RPCID: f.name}
	if f.kind == request || f.kind == reply {
		m.Message = f.value
	}
	return d.Encode(m)
}

// Body is what a request or a reply carries.
type Body struct {
	// Bytes is the body as Longhouse nodes see it.
	Bytes []byte
	// Object is the body as Tribes' nodes see it; if it is nil, they get Bytes
	// as a ByteMessage, or null if there are none. If Bytes is nil, Longhouse
	// nodes get Object.
	Object jser.Value
}

// Bytes returns a body of bytes.
func Bytes(b []byte) Body { return Body{Bytes: b} }

// Object returns a body that is a Java value, see package jser.
func Object(v jser.Value) Body { return Body{Object: v} }

// java returns the body as Tribes' nodes see it.
func (b Body) java() jser.Value {
	if b.Object == nil && b.Bytes != nil {
		return &jser.ByteMessage{Data: b.Bytes}
	}
	return b.Object
}

// fill puts the body into a frame for the native form.
func (b Body) fill(f *frame, d *jser.Dialect) (err error) {
	if f.body = b.Bytes; b.Bytes == nil && b.Object != nil {
		f.kind |= object
		f.body, err = d.Encode(b.Object)
	}
	return err
}

// bodyOf returns a copy of the frame's body.
func bodyOf(f *frame, l jser.Limits) (b Body, err error) {
	switch {
	case f.tribes:
		if m, ok := f.value.(*jser.ByteMessage); ok {
			return Body{Bytes: m.Data}, nil
		}
		return Body{Object: f.value}, nil
	case f.kind&object != 0:
		b.Object, err = jser.Decode(f.body, l)
		return b, err
	}
	return Body{Bytes: append(make([]byte, 0, len(f.body)), f.body...)}, nil
}
