package session

import "time"

// Key names a session on all nodes: the name of its context and the id without
// the route.
type Key struct {
	// Context is the name of the context: host and path, "localhost/shop".
	Context string
	// ID is the random part of the session id.
	ID string
}

// Version orders the changes of one attribute: by counter, then by node. The
// counter is one more than any the writing node has seen in the session.
type Version struct {
	Counter uint64
	// Node is the first half of the writing node's unique id.
	Node uint64
}

// Less reports whether v is older than w.
func (v Version) Less(w Version) bool {
	if v.Counter != w.Counter {
		return v.Counter < w.Counter
	}
	return v.Node < w.Node
}

// Entry is one attribute of a record: its encoded value, or the mark that it
// was deleted. The bytes of a value are never changed in place, so records may
// share them.
type Entry struct {
	Value   []byte
	Deleted bool
	Version Version
	// Past tells changes that were made one after the other from conflicts.
	Past *Past
}

// EndKind says how a session ended.
type EndKind uint8

const (
	// Living: it has not ended.
	Living EndKind = iota
	// Renewed: it goes on under another id.
	Renewed
	// Expired: nobody used it for too long.
	Expired
	// Invalidated: the application ended it.
	Invalidated
)

// Record is what nodes know of a session. A record may be partial: a change
// that travels is a record with only the changed attributes, and merging
// ([Record.Merge]) two partial records is as good as merging whole ones.
// Times are milliseconds since 1970; 0 is unknown.
type Record struct {
	Key Key
	// Created is set in whole records and in the first change; a record
	// without it is partial.
	Created int64
	// LastAccess is the latest known access; merging keeps the later one.
	LastAccess int64
	// MaxInactive is the time to live without access; 0 or less means for
	// ever. The value with the higher MaxInactiveVersion wins.
	MaxInactive        time.Duration
	MaxInactiveVersion Version
	Attrs              map[string]Entry
	// End, EndTime and RenewedTo are the tombstone; it wins over everything: a
	// record that has ended has nothing else. If both an Invalidated and a
	// Renewed tombstone were seen, End is Invalidated and RenewedTo is kept,
	// because that session has to end too.
	End       EndKind
	EndTime   int64
	RenewedTo string
}

// NewOptions are the properties of a session to be made.
type NewOptions struct {
	// MaxInactive is the time to live without a request; 0 or less means for
	// ever.
	MaxInactive time.Duration
	// Route is appended to the id that the client sees; empty for none.
	Route string
	// WhileDraining makes the session also on a node that takes no new ones: it
	// belongs to a user who has one already.
	WhileDraining bool
}

// Summary is one line about a session, for operators. It shows a prefix of the
// id only.
type Summary struct {
	Context    string    `json:"context"`
	ID         string    `json:"id"`
	Attributes int       `json:"attributes"`
	Bytes      int       `json:"bytes"`
	Created    time.Time `json:"created"`
	LastAccess time.Time `json:"lastAccess"`
}
