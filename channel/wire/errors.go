package wire

import (
	"errors"

	"github.com/longhouse-go/longhouse/channel"
)

// Error is one way in which bytes break the format. The values are the
// variables of this file: compare with errors.Is, count by Reason.
type Error struct {
	// Reason names the offence in snake case, for a metric's label.
	Reason string
	text   string
	cause  error
}

// Error says what is wrong.
func (e *Error) Error() string { return "channel/wire: " + e.text }

// Unwrap returns channel.ErrTooLarge or channel.ErrBadMessage.
func (e *Error) Unwrap() error { return e.cause }

// The offences. ErrTruncated also means that more bytes may cure it.
var (
	ErrTruncated     = bad("truncated", "bytes end in the middle of a record")
	ErrMemberMarker  = bad("member_marker", "member record does not start with TRIBES-B 1 0")
	ErrMemberEnd     = bad("member_end", "member record does not end with TRIBES-E 1 0 where its length says")
	ErrMemberLength  = bad("member_length", "length of the member record is outside 49..65511")
	ErrMemberFields  = bad("member_fields", "lengths inside the member record do not add up to its length")
	ErrMemberHost    = bad("member_host", "host of the member record has neither 4 nor 16 bytes")
	ErrMemberPort    = bad("member_port", "port of the member record is out of range")
	ErrFrameMarker   = bad("frame_marker", "frame does not start with FLT2002 (another protocol on this port?)")
	ErrFrameEnd      = bad("frame_end", "frame does not end with TLF2003 where its length says")
	ErrFrameLength   = bad("frame_length", "frame length is negative or too small for any payload")
	ErrFrameTooLarge = &Error{"frame_too_large", "frame is larger than allowed (raise max_frame on this node if the message is wanted)", channel.ErrTooLarge}
	ErrMessageID     = bad("message_id", "message id has not 16 bytes")
	ErrSender        = bad("sender", "sender record of the message is missing, too long or followed by other bytes")
	ErrBody          = bad("body", "body length of the message does not reach exactly to the end of the frame")
)

func bad(reason, text string) *Error { return &Error{reason, text, channel.ErrBadMessage} }

// Errors returns all offences, so that counters for them can be made ahead.
func Errors() []*Error {
	return []*Error{
		ErrTruncated, ErrMemberMarker, ErrMemberEnd, ErrMemberLength, ErrMemberFields, ErrMemberHost, ErrMemberPort,
		ErrFrameMarker, ErrFrameEnd, ErrFrameLength, ErrFrameTooLarge, ErrMessageID, ErrSender, ErrBody,
	}
}

// Reason returns the Reason of the [*Error] in err's chain, or "other".
func Reason(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return "other"
}
