package channel

import (
	"strings"

	"github.com/fxamacker/cbor/v2"
)

// announceMagic starts the payload of every Longhouse member, so that payloads
// of other software are never misread.
const announceMagic = "LH1\x00"

// maxAnnouncement bounds the payload that is decoded, in bytes.
const maxAnnouncement = 4096

// Announcement is what a Longhouse node says about itself in the payload of its
// member record. Peers that are no Longhouse nodes ignore it.
type Announcement struct {
	// Name is the node's name for people, usually its route.
	Name string `cbor:"1,keyasint,omitempty"`
	// Pipelined says that the node's receiver handles the messages of one
	// connection in order and answers acknowledgements in order, so that many
	// may be outstanding.
	Pipelined bool `cbor:"2,keyasint,omitempty"`
	// Fingerprint identifies the transforming layers of the node's stack in
	// their order; nodes with different ones cannot read each other.
	Fingerprint string `cbor:"3,keyasint,omitempty"`
	// Version is the software version, for people.
	Version string `cbor:"4,keyasint,omitempty"`
	// TLS says that the node's receiver takes TLS connections only. The
	// receiver fills it in.
	TLS bool `cbor:"5,keyasint,omitempty"`
	// Credit is how many bytes a peer may send on a new connection before the
	// node's receiver has granted more; 0 if it grants none. The receiver fills
	// it in.
	Credit int64 `cbor:"6,keyasint,omitempty"`
	// Credited says that the node's sender understands credit, so that a
	// receiver may grant it. The sender fills it in.
	Credited bool `cbor:"7,keyasint,omitempty"`
}

// Encode returns the payload that carries a.
func (a Announcement) Encode() string {
	b, err := cbor.Marshal(a)
	if err != nil { // a struct of strings and bools cannot fail
		panic("channel: encode announcement: " + err.Error())
	}
	return announceMagic + string(b)
}

// Announcement decodes the member's payload; ok is false when the payload is
// not a Longhouse node's. It decodes on every call: keep the result where it
// is needed often.
func (m Member) Announcement() (a Announcement, ok bool) {
	if len(m.Payload) > maxAnnouncement || !strings.HasPrefix(m.Payload, announceMagic) {
		return a, false
	}
	err := cbor.Unmarshal([]byte(m.Payload[len(announceMagic):]), &a)
	return a, err == nil
}
