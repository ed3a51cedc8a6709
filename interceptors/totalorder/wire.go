package totalorder

import (
	"encoding/binary"
	"fmt"

	"github.com/longhouse-go/longhouse/channel"
)

// Every message of the layer ends with a trailer, so that the body stays where
// it is. All numbers are big endian.
//
//	request: body · epoch 8 · ordinal 8 · before 8 · previous 8 · clock 8 · options 4 · kind 1 · "LHT" 3
//	control: entries · clock 8 · kind 1 · "LHT" 3
//	entry:   what 1 · epoch 8 · ordinal 8 · stamp 8
const (
	requestTrailer = 8 + 8 + 8 + 8 + 8 + 4 + 1 + 3
	controlTrailer = 8 + 1 + 3
	entrySize      = 1 + 8 + 8 + 8
	maxEntries     = 4096 // of one control message
	mark           = "LHT"
)

// The kinds of messages.
const (
	kindOne     = 1 // a request with one destination, which stamps it itself
	kindMany    = 2 // a request with several destinations
	kindControl = 3
)

// What an entry of a control message says of a request.
const (
	propose = 1 // receiver to sender: a lower bound for the stamp
	decide  = 2 // sender to receiver: the stamp
	forget  = 3 // sender to receiver: there will be no stamp
)

type request struct {
	epoch, ordinal uint64
	// before is the lowest ordinal whose sending had not ended when this one
	// began: all lower ones were sent earlier.
	before uint64
	// previous is, with one destination, the ordinal of the message that was
	// sent to it before; 0 if there is none to wait for.
	previous uint64
	clock    uint64
	// options are those of the application that did not travel with the message.
	options channel.Options
	many    bool
}

type entry struct {
	what           byte
	epoch, ordinal uint64
	stamp          uint64
}

func appendRequest(b []byte, r request) []byte {
	b = binary.BigEndian.AppendUint64(b, r.epoch)
	b = binary.BigEndian.AppendUint64(b, r.ordinal)
	b = binary.BigEndian.AppendUint64(b, r.before)
	b = binary.BigEndian.AppendUint64(b, r.previous)
	b = binary.BigEndian.AppendUint64(b, r.clock)
	b = binary.BigEndian.AppendUint32(b, uint32(r.options))
	kind := byte(kindOne)
	if r.many {
		kind = kindMany
	}
	return append(append(b, kind), mark...)
}

func appendControl(b []byte, entries []entry, clock uint64) []byte {
	for _, e := range entries {
		b = append(b, e.what)
		b = binary.BigEndian.AppendUint64(b, e.epoch)
		b = binary.BigEndian.AppendUint64(b, e.ordinal)
		b = binary.BigEndian.AppendUint64(b, e.stamp)
	}
	b = binary.BigEndian.AppendUint64(b, clock)
	return append(append(b, kindControl), mark...)
}

var errMalformed = fmt.Errorf("totalorder: %w: it does not end as this layer lets messages end", channel.ErrBadMessage)

// kindOf returns the kind of a message, 0 if it is none of this layer.
func kindOf(b []byte) byte {
	n := len(b)
	if n < controlTrailer || string(b[n-3:]) != mark {
		return 0
	}
	return b[n-4]
}

// parseRequest splits a request.
func parseRequest(b []byte) (body []byte, r request, err error) {
	n := len(b) - requestTrailer
	if n < 0 {
		return nil, request{}, errMalformed
	}
	t := b[n:]
	r = request{
		epoch:    binary.BigEndian.Uint64(t),
		ordinal:  binary.BigEndian.Uint64(t[8:]),
		before:   binary.BigEndian.Uint64(t[16:]),
		previous: binary.BigEndian.Uint64(t[24:]),
		clock:    binary.BigEndian.Uint64(t[32:]),
		options:  channel.Options(binary.BigEndian.Uint32(t[40:])),
		many:     t[44] == kindMany,
	}
	if r.ordinal == 0 || r.before > r.ordinal || r.previous >= r.ordinal || r.options&^restored != 0 {
		return nil, request{}, errMalformed
	}
	return b[:n:n], r, nil
}

// parseControl appends the entries of a control message to list.
func parseControl(list []entry, b []byte) (_ []entry, clock uint64, err error) {
	n := len(b) - controlTrailer
	if n < 0 || n%entrySize != 0 || n/entrySize > maxEntries {
		return nil, 0, errMalformed
	}
	clock = binary.BigEndian.Uint64(b[n:])
	for b = b[:n]; len(b) > 0; b = b[entrySize:] {
		e := entry{
			what:    b[0],
			epoch:   binary.BigEndian.Uint64(b[1:]),
			ordinal: binary.BigEndian.Uint64(b[9:]),
			stamp:   binary.BigEndian.Uint64(b[17:]),
		}
		if e.what < propose || e.what > forget {
			return nil, 0, errMalformed
		}
		list = append(list, e)
	}
	return list, clock, nil
}
