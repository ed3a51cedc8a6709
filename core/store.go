package core

import (
	"context"
	"errors"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
)

// Errors of a Store that its manager branches on.
var (
	// ErrStoreConflict: the item is not, or no longer, the one that the caller
	// has seen. The caller loads it, merges, and saves again.
	ErrStoreConflict = errors.New("core: the stored session has been changed by another node")
	// ErrStoreCorrupt: what is stored cannot be trusted: half of an item, bytes
	// that somebody else has changed. The manager treats it as absent and
	// reports it; a Save over no version replaces it.
	ErrStoreCorrupt = errors.New("core: the stored session is damaged")
	// ErrStoreRefused: the store works but does not take this item, because it
	// is too large for example. It stays on the nodes that have it live.
	ErrStoreRefused = errors.New("core: the store does not take the session")
)

// StoreVersion names one state of a stored item. It is opaque to the manager;
// the empty version means that there is no item.
type StoreVersion string

// StoreItem is one session in a Store.
type StoreItem struct {
	// Data is the encoded record, opaque to the store.
	Data []byte
	// Expires is when the store may forget the item; zero for never. It is
	// whole milliseconds; a store that counts in seconds rounds up.
	Expires time.Time
	// Version is the item's present state, as told by Load.
	Version StoreVersion
}

// Store is a place outside of the nodes where sessions are kept: files, a
// database, a cache server. All nodes of a cluster use the same one. It is the
// smaller thing to implement for those who only have a place; the manager
// around it (plugins/manager/stored) merges, batches, retries, keeps the nodes'
// live copies right and bounds everything.
//
// Methods are called concurrently, but never two at a time that change the same
// key from one node. They block until the store has answered, or ctx ends. An
// error that is none of those above means that the store cannot be reached or
// has failed; the call is repeated later, so saving the same twice must be
// harmless.
type Store interface {
	// Load returns the item of a key; ok is false if there is none, or if it has
	// expired. The item belongs to the caller.
	Load(ctx context.Context, key session.Key) (item StoreItem, ok bool, err error)
	// Save stores the item, and returns its new version, if the present version
	// is prev; otherwise it changes nothing and returns ErrStoreConflict. prev
	// "" means that there must be no item, or an expired or damaged one. When Save has
	// returned nil, every later Load of any node returns the item or a newer
	// one. item.Version is ignored; item.Data is valid until Save returns.
	Save(ctx context.Context, key session.Key, item StoreItem, prev StoreVersion) (StoreVersion, error)
	// Touch moves the expiry of an item. The version may change or not: a save
	// that expects the version from before may succeed or conflict. An item
	// that does not exist is no error.
	Touch(ctx context.Context, key session.Key, expires time.Time) error
	// Delete removes the item, whatever its version. An item that does not exist
	// is no error.
	Delete(ctx context.Context, key session.Key) error
	// List calls each with the keys of up to limit items that have not expired,
	// in any order. A store that cannot list returns ErrStoreCannotList.
	List(ctx context.Context, limit int, each func(session.Key)) error
	// Close ends the use of the store. It is called once, when no other call
	// runs.
	Close() error
}

// ErrStoreCannotList: the store cannot say what it holds.
var ErrStoreCannotList = errors.New("core: this store cannot list its sessions")

// StoreSweeper is implemented by stores that do not forget expired items by
// themselves. Sweep removes up to limit of those that have expired before now
// and returns how many. It is called by every node, once in a while.
type StoreSweeper interface {
	Sweep(ctx context.Context, now time.Time, limit int) (int, error)
}

// StoreFactory makes a store. Making one has no side effect: the store connects
// when it is first used, and again when the connection was lost.
type StoreFactory = channel.Factory[Store]
