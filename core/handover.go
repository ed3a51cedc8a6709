package core

import (
	"context"
	"errors"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
)

// Handover is implemented by managers that can prove that this node may go: that
// the sessions are somewhere else too, in the state that they have here. A
// manager that does not implement it can be stopped, but not drained with a
// proof.
type Handover interface {
	// Where asks the other members, or the store, for sessions, and says who has
	// them. Only an answer of the holder counts, never what was once sent to it.
	// It waits for the answers, for a few seconds at most; a member that does
	// not answer is no holder. It may be called concurrently with everything
	// else. The caller does not change the answer.
	Where(ctx context.Context, q WhereQuery) (WhereAnswer, error)
}

// ErrNoHandover: the manager does not implement Handover.
var ErrNoHandover = errors.New("the manager cannot say where sessions are")

// WhereQuery is what is asked for.
type WhereQuery struct {
	// Keys are the sessions; at most MaxWhere. Without keys it is about a page
	// of all that the manager itself holds in memory.
	Keys []session.Key `json:"keys,omitempty"`
	// Page counts from 0; used without Keys.
	Page int `json:"page"`
	// Copy: sessions that nobody else has as they are here are first copied to
	// those that should have them.
	Copy bool `json:"copy"`
	// Going are members that are going to stop, too: they are not asked, and get
	// no copies.
	Going []channel.UniqueID `json:"going,omitempty"`
}

// MaxWhere bounds the keys of one query.
const MaxWhere = 4096

// WhereAnswer is the answer to a query.
type WhereAnswer struct {
	// Pages is how many there are; 0 for a manager that holds nothing which is
	// not in the table of the node or in its store.
	Pages    int           `json:"pages"`
	Sessions []Whereabouts `json:"sessions"`
}

// Whereabouts says where a living session is.
type Whereabouts struct {
	Key session.Key `json:"key"`
	// Content is [session.Record.Content] of what this manager has of it; 0 if
	// it has nothing of its own.
	Content uint64 `json:"content"`
	// Holders are the names of the members, or of the store, that have said
	// that they have exactly this, or that the session has ended.
	Holders []string `json:"holders"`
}
