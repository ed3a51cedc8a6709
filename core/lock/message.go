package lock

import (
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Subject is the subject of the messages between lockers.
const Subject = "session-lock"

type kind uint8

const (
	kindAcquire kind = iota + 1
	kindAnswer
	kindRelease
	kindHolds // a voter tells a new one who holds the session
	kindKeep  // a node that holds something, or waits for it, is alive
	kindKept  // a voter has heard that
)

type status uint8

const (
	statusGranted status = iota + 1
	statusFull           // too many are waiting
	// Of a release; statusGranted says that it counts.
	statusBroken        // what the holder has changed may still arrive, or not
	statusUnused status = 0
)

// message is a CBOR map of small integers; unknown keys are skipped. Durations
// are in milliseconds.
type message struct {
	Kind kind `cbor:"1,keyasint"`
	// Number is the request's, unique on its node; of kindKeep and kindKept the
	// time since a fixed one, in nanoseconds.
	Number  uint64 `cbor:"2,keyasint,omitempty"`
	Context string `cbor:"3,keyasint,omitempty"`
	ID      string `cbor:"4,keyasint,omitempty"`
	// Lease is how long the session is wanted, or still held; Wait how long the
	// request waits, or has waited in the queue.
	Lease  int64  `cbor:"5,keyasint,omitempty"`
	Wait   int64  `cbor:"6,keyasint,omitempty"`
	Status status `cbor:"7,keyasint,omitempty"`
	// Counter and Versions are the session's state when it was given back, and
	// Last the node that did; empty if it is not known.
	Counter  uint64 `cbor:"8,keyasint,omitempty"`
	Versions uint64 `cbor:"12,keyasint,omitempty"`
	Last     []byte `cbor:"9,keyasint,omitempty"`
	Broken   uint64 `cbor:"10,keyasint,omitempty"`
	// Holder is the node that has the session.
	Holder []byte `cbor:"11,keyasint,omitempty"`
}

func (m *message) state() core.SessionState {
	return core.SessionState{Counter: m.Counter, Versions: m.Versions}
}

func (m *message) key() session.Key { return session.Key{Context: m.Context, ID: m.ID} }

var (
	errMessage = errors.New("lock: bad message")

	decMode = func() cbor.DecMode {
		m, err := cbor.DecOptions{MaxNestedLevels: 4, MaxArrayElements: 16, MaxMapPairs: 32}.DecMode()
		if err != nil { // constants
			panic("lock: cbor mode: " + err.Error())
		}
		return m
	}()
)

func encode(m *message) []byte {
	b, err := cbor.Marshal(m)
	if err != nil { // numbers, texts and bytes
		panic("lock: encode: " + err.Error())
	}
	return b
}

// maxLease bounds leases and waits, in milliseconds: an hour.
const maxLease = 3_600_000

func decode(b []byte) (m message, err error) {
	if err := decMode.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("%w: %w", errMessage, err)
	}
	ids := func(b []byte) bool { return len(b) == 0 || len(b) == len(channel.UniqueID{}) }
	switch {
	case m.Kind < kindAcquire || m.Kind > kindKept:
		return m, fmt.Errorf("%w: kind %d", errMessage, m.Kind)
	case m.Kind != kindAnswer && m.Kind < kindKeep && (m.ID == "" || len(m.ID) > session.MaxID || len(m.Context) > session.MaxContext):
		return m, fmt.Errorf("%w: the session's key", errMessage)
	case m.Lease < 0 || m.Lease > maxLease || m.Wait < 0 || m.Wait > maxLease:
		return m, fmt.Errorf("%w: a time out of range", errMessage)
	case !ids(m.Last) || !ids(m.Holder) || m.Kind == kindHolds && len(m.Holder) == 0:
		return m, fmt.Errorf("%w: a node's id", errMessage)
	}
	return m, nil
}

func uniqueID(b []byte) (id channel.UniqueID) {
	copy(id[:], b)
	return id
}
