package jser

import (
	"errors"
	"fmt"

	"github.com/longhouse-go/longhouse/channel"
)

// Error is a refused stream or value. Compare its kind with errors.Is and the
// variables of this file; count by [Reason].
type Error struct {
	// Kind is one of the Err variables.
	Kind *Kind
	// Offset is the byte of the stream at which it was noticed; -1 when it was
	// a value that cannot be written.
	Offset int
	// Detail is a class name or another word on what it was; may be empty. It
	// never holds values.
	Detail string
}

// Kind is one way in which a stream is refused.
type Kind struct {
	// Reason names the offence in snake case, for a metric's label.
	Reason string
	text   string
	cause  error
}

// Error says what is wrong.
func (k *Kind) Error() string { return "channel/wire/jser: " + k.text }

// Unwrap returns channel.ErrTooLarge or channel.ErrBadMessage.
func (k *Kind) Unwrap() error { return k.cause }

// Error says what is wrong and where.
func (e *Error) Error() string {
	s := e.Kind.Error()
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Offset >= 0 {
		s += fmt.Sprintf(" (at byte %d)", e.Offset)
	}
	return s
}

// Unwrap returns e.Kind.
func (e *Error) Unwrap() error { return e.Kind }

// The offences.
var (
	ErrTruncated   = bad("truncated", "the stream ends in the middle of a value")
	ErrHeader      = bad("header", "not a Java object stream: it does not start with ac ed 00 05")
	ErrTrailing    = bad("trailing", "bytes follow where the stream should end")
	ErrCode        = bad("code", "type code that does not belong here")
	ErrHandle      = bad("handle", "reference to something that is not there or of another kind")
	ErrLoop        = bad("loop", "value that contains itself")
	ErrDepth       = bad("depth", "values are nested too deep (raise Limits.Depth if they are wanted)")
	ErrTooLarge    = &Kind{"too_large", "value is larger than allowed (raise Limits.Size or Limits.Expanded if it is wanted)", channel.ErrTooLarge}
	ErrClass       = bad("class", "class is not listed")
	ErrProxy       = bad("proxy", "dynamic proxies are refused")
	ErrUnsupported = bad("unsupported", "part of the protocol that is not used by Tribes")
	ErrText        = bad("text", "text is not well formed")
	ErrShape       = bad("shape", "object has not the fields its class should have")
	ErrValue       = bad("value", "Go value that has no Java form here")
)

func bad(reason, text string) *Kind { return &Kind{reason, text, channel.ErrBadMessage} }

// Reason returns the Reason of the [Kind] in err's chain, or "other".
func Reason(err error) string {
	if k, ok := errors.AsType[*Kind](err); ok {
		return k.Reason
	}
	return "other"
}

// show quotes a foreign name for an error text.
func show(name string) string {
	const most = 120
	if len(name) > most {
		return fmt.Sprintf("%.*q…", most, name)
	}
	return fmt.Sprintf("%q", name)
}
