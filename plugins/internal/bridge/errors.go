package bridge

import (
	"context"
	"encoding/binary"
	"errors"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// errorCodes are the errors that keep their identity across the border. A code is
// never given a new meaning; unknown codes are ignored.
var errorCodes = []struct {
	code uint16
	err  error
}{
	{1, channel.ErrClosed}, {2, channel.ErrNoMembers}, {3, channel.ErrTooLarge},
	{4, channel.ErrQueueFull}, {5, channel.ErrNotMember}, {6, channel.ErrNegativeAck},
	{7, channel.ErrAckTimeout}, {8, channel.ErrDisconnected}, {9, channel.ErrPluginDown},
	{10, channel.ErrBadMessage}, {11, channel.ErrNotConfigured},
	{12, channel.ErrReplaced}, {13, channel.ErrPanic},
	{32, session.ErrNone}, {33, session.ErrInvalid}, {34, session.ErrTooLarge},
	{35, session.ErrCommitted}, {36, session.ErrFull}, {37, core.ErrNoHandover},
	{38, core.ErrNoForward},
	{64, context.Canceled}, {65, context.DeadlineExceeded},
}

const (
	// maxErrorText bounds the text of one error, in bytes.
	maxErrorText = 4 << 10
	// maxErrorDepth bounds SendErrors inside of faults.
	maxErrorDepth = 4
)

// remoteError is an error from the other side of the border.
type remoteError struct {
	text string
	is   []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.is }

// What is said of a *channel.SendError inside an error.
const (
	noSendError  = 0
	hasSendError = 1
	isSendError  = 2
)

// appendError packs an error: its text, the codes of what it is, and the
// members of a SendError inside.
func appendError(b []byte, err error, depth int) []byte {
	text := err.Error()
	if len(text) > maxErrorText {
		text = text[:maxErrorText] + "…"
	}
	b = appendString(b, text)
	at := len(b)
	b = append(b, 0)
	for _, c := range errorCodes {
		if errors.Is(err, c.err) {
			b = binary.BigEndian.AppendUint16(b, c.code)
			b[at]++
		}
	}
	var send *channel.SendError
	if depth >= maxErrorDepth || !errors.As(err, &send) || len(send.Faults) > maxMembers {
		return append(b, noSendError)
	}
	how := byte(hasSendError)
	if err == error(send) {
		how = isSendError
	}
	b = append(b, how)
	b = binary.AppendUvarint(b, uint64(len(send.Faults)))
	for _, f := range send.Faults {
		b = appendMember(b, f.Member)
		cause := f.Err
		if cause == nil {
			cause = errUnknown
		}
		b = appendError(b, cause, depth+1)
	}
	return b
}

var errUnknown = errors.New("unknown reason")

// decodeError unpacks an error. It always returns one.
func decodeError(payload []byte, in *interner) error {
	d := &decoder{b: payload, in: in}
	err := d.error(0)
	if d.err != nil {
		return d.err
	}
	return err
}

func (d *decoder) error(depth int) error {
	n := d.uvarint("error text")
	if n > maxErrorText+16 {
		d.fail("error text")
	}
	text := string(d.take(int(min(n, maxErrorText+16)), "error text"))
	var is []error
	for range d.byte("error codes") {
		b := d.take(2, "error code")
		if b == nil {
			break
		}
		if known := sentinel(binary.BigEndian.Uint16(b)); known != nil {
			is = append(is, known)
		}
	}
	how := d.byte("error form")
	if how == noSendError {
		if len(is) == 1 && is[0].Error() == text {
			return is[0]
		}
		return &remoteError{text, is}
	}
	send := d.sendError(depth)
	if how == isSendError {
		return send
	}
	return &remoteError{text, append(is, send)}
}

func (d *decoder) sendError(depth int) *channel.SendError {
	n := d.uvarint("fault count")
	if depth >= maxErrorDepth || n > maxMembers || n > uint64(len(d.b)/minMember) {
		d.fail("fault count")
		return &channel.SendError{}
	}
	e := &channel.SendError{Faults: make([]channel.Fault, 0, n)}
	for range n {
		m := d.member()
		e.Faults = append(e.Faults, channel.Fault{Member: m, Err: d.error(depth + 1)})
	}
	return e
}

func sentinel(code uint16) error {
	for _, c := range errorCodes {
		if c.code == code {
			return c.err
		}
	}
	return nil
}
