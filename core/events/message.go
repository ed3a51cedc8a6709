package events

import (
	"errors"
	"fmt"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Subject is the subject of the messages.
const Subject = "session-events"

type kind uint8

const (
	kindAsk    kind = iota + 1 // the kinds that the sender wants, per context
	kindEvents                 // what has happened
)

// message is a CBOR map of small integers; unknown keys are skipped.
type message struct {
	Kind kind `cbor:"1,keyasint"`
	// Number is that of the ask; events carry that of the ask which they answer.
	Number uint64 `cbor:"2,keyasint,omitempty"`
	// First is how many events of that number were sent before.
	First    uint64   `cbor:"3,keyasint,omitempty"`
	Contexts []string `cbor:"4,keyasint,omitempty"`
	// Wants are the kinds, one byte for each of Contexts.
	Wants  []byte  `cbor:"5,keyasint,omitempty"`
	Events []event `cbor:"6,keyasint,omitempty"`
}

// Kinds of events on the wire: the bits of core.SessionEventKind, and these.
const (
	wireExisting = 0x40 // the sender has the session
	wireLost     = 0x41 // the sender knows the session, and that nobody has it
	wireEnded    = 0x42 // the session has ended for Reason or, with Previous, has got that id
	wireStart    = 0x80 // all sessions that it has follow
	wireEnd      = 0x81 // that were all
)

type event struct {
	Kind uint8 `cbor:"1,keyasint"`
	// Context is an index into Contexts.
	Context int    `cbor:"2,keyasint,omitempty"`
	ID      string `cbor:"3,keyasint,omitempty"`
	// Previous is the id before a renewal.
	Previous string `cbor:"4,keyasint,omitempty"`
	Reason   uint8  `cbor:"5,keyasint,omitempty"`
	// At is when it happened, and Life the time to live without a request, in
	// milliseconds.
	At      int64  `cbor:"6,keyasint,omitempty"`
	Life    int64  `cbor:"7,keyasint,omitempty"`
	Name    string `cbor:"8,keyasint,omitempty"`
	Value   []byte `cbor:"9,keyasint,omitempty"`
	Counter uint64 `cbor:"10,keyasint,omitempty"`
	Node    uint64 `cbor:"11,keyasint,omitempty"`
}

// Bounds of a message.
const (
	maxEvents   = 4096
	maxContexts = 4096
	// batchEvents and batchBytes end a message that is sent.
	batchEvents = 1024
	batchBytes  = 256 << 10
)

// toWire returns the event without its context.
func toWire(e *core.SessionEvent, life time.Duration) event {
	return event{
		Kind: uint8(e.Kind), ID: e.Key.ID, Previous: e.Previous.ID, Reason: uint8(e.Reason), At: e.Time.UnixMilli(),
		Life: life.Milliseconds(), Name: e.Name, Value: e.Value, Counter: e.Version.Counter, Node: e.Version.Node,
	}
}

// fromWire returns what happened in the context.
func fromWire(w *event, contextName string) core.SessionEvent {
	e := core.SessionEvent{
		Kind: core.SessionEventKind(w.Kind), Key: session.Key{Context: contextName, ID: w.ID}, Reason: session.EndKind(w.Reason),
		Time: time.UnixMilli(w.At), Name: w.Name, Value: w.Value, Version: session.Version{Counter: w.Counter, Node: w.Node},
	}
	switch {
	case w.Kind == wireExisting, w.Kind == wireLost:
		e.Kind, e.Existing = core.SessionCreated, true
	case w.Kind == wireEnded && w.Previous != "":
		e.Kind, e.Previous, e.Key.ID = core.SessionRenewed, e.Key, w.Previous
	case w.Kind == wireEnded:
		e.Kind = core.SessionDestroyed
	case e.Kind == core.SessionRenewed:
		e.Previous = session.Key{Context: contextName, ID: w.Previous}
	}
	return e
}

var (
	errMessage = errors.New("events: bad message")

	decMode = func() cbor.DecMode {
		m, err := cbor.DecOptions{MaxNestedLevels: 4, MaxArrayElements: maxEvents, MaxMapPairs: 32}.DecMode()
		if err != nil { // constants
			panic("events: cbor mode: " + err.Error())
		}
		return m
	}()
)

func encode(m *message) []byte {
	b, err := cbor.Marshal(m)
	if err != nil { // numbers, texts and bytes
		panic("events: encode: " + err.Error())
	}
	return b
}

// decode reads a message. Its events are well-formed if their kind is known.
func decode(b []byte) (m message, err error) {
	if err := decMode.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("%w: %w", errMessage, err)
	}
	if m.Kind != kindAsk && m.Kind != kindEvents {
		return m, fmt.Errorf("%w: kind %d", errMessage, m.Kind)
	}
	if len(m.Contexts) > maxContexts || m.Kind == kindAsk && len(m.Wants) != len(m.Contexts) {
		return m, fmt.Errorf("%w: %d contexts, %d wants", errMessage, len(m.Contexts), len(m.Wants))
	}
	for _, name := range m.Contexts {
		if name == "" || len(name) > session.MaxContext {
			return m, fmt.Errorf("%w: a context's name of %d bytes", errMessage, len(name))
		}
	}
	for i := range m.Events {
		if err := m.Events[i].check(len(m.Contexts)); err != nil {
			return m, fmt.Errorf("%w: %w", errMessage, err)
		}
	}
	return m, nil
}

func (w *event) check(contexts int) error {
	id := func(s string) bool { return s != "" && len(s) <= session.MaxID }
	switch {
	case w.Kind >= wireStart:
		return nil
	case w.Context < 0 || w.Context >= contexts:
		return fmt.Errorf("context %d of %d", w.Context, contexts)
	case !id(w.ID):
		return fmt.Errorf("an id of %d bytes", len(w.ID))
	}
	if w.Kind == wireEnded && w.Previous != "" {
		if !id(w.Previous) || w.Previous == w.ID {
			return errors.New("a session that got its own id")
		}
		return nil
	}
	switch k := core.SessionEventKind(w.Kind); {
	case k == core.SessionRenewed && (!id(w.Previous) || w.Previous == w.ID):
		return errors.New("a renewal without a previous id")
	case (k == core.SessionDestroyed || w.Kind == wireEnded) && w.Reason != uint8(session.Expired) && w.Reason != uint8(session.Invalidated):
		return fmt.Errorf("reason %d", w.Reason)
	case w.Kind < wireExisting && k&core.AttributeEvents != 0 && (w.Name == "" || len(w.Name) > session.MaxName):
		return fmt.Errorf("an attribute's name of %d bytes", len(w.Name))
	case w.Life < 0 || w.Life > int64(maxLife/time.Millisecond):
		return errors.New("a time to live out of range")
	}
	return nil
}

// maxLife bounds the time to live that is told, so that adding it to a time does
// not overflow.
const maxLife = 100 * 365 * 24 * time.Hour
