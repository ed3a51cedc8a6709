package channel

import (
	"errors"
	"fmt"
	"strings"
)

// Errors that a caller may branch on.
var (
	ErrClosed        = errors.New("channel: closed")
	ErrNoMembers     = errors.New("channel: no destination")
	ErrTooLarge      = errors.New("channel: message too large")
	ErrQueueFull     = errors.New("channel: queue full")
	ErrNotMember     = errors.New("channel: not a member of the view")
	ErrNegativeAck   = errors.New("channel: the receiver failed to process the message")
	ErrAckTimeout    = errors.New("channel: no acknowledgement in time")
	ErrDisconnected  = errors.New("channel: connection lost")
	ErrPluginDown    = errors.New("channel: plugin is down")
	ErrBadMessage    = errors.New("channel: malformed message")
	ErrNotConfigured = errors.New("channel: not configured")
)

// Fault is one member that a message did not reach, and why.
type Fault struct {
	Member Member
	Err    error
}

// SendError says which of the addressed members a message failed for. The
// members that are not listed have received it.
type SendError struct{ Faults []Fault }

// Error names every faulty member with its reason.
func (e *SendError) Error() string {
	if len(e.Faults) == 1 {
		return fmt.Sprintf("channel: send to %s: %v", e.Faults[0].Member, e.Faults[0].Err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "channel: send failed for %d members:", len(e.Faults))
	for _, f := range e.Faults {
		fmt.Fprintf(&b, " %s: %v;", f.Member, f.Err)
	}
	return strings.TrimSuffix(b.String(), ";")
}

// Unwrap returns the reasons, for errors.Is and errors.As.
func (e *SendError) Unwrap() []error {
	errs := make([]error, len(e.Faults))
	for i, f := range e.Faults {
		errs[i] = f.Err
	}
	return errs
}

// Failed returns a SendError for all of to with the same reason.
func Failed(to []Member, err error) *SendError {
	e := &SendError{Faults: make([]Fault, len(to))}
	for i, m := range to {
		e.Faults[i] = Fault{m, err}
	}
	return e
}
