package core

import (
	"context"

	"github.com/longhouse-go/longhouse/core/session"
)

// Sessions is the session table, as containers and valves see it.
type Sessions interface {
	// Find returns a handle on the living session of that key, asking the
	// manager if the table does not have it; nil without an error if there is
	// none. The caller calls Release when the request ends.
	Find(ctx context.Context, key session.Key) (Handle, error)
	// Create makes a new session of the context with a fresh id.
	Create(ctx context.Context, contextName string, o session.NewOptions) (Handle, error)
}

// Handle is one request's hold on a session: the application's interface plus
// what the container needs.
type Handle interface {
	session.Session
	// Key returns the current key; it changes with Renew.
	Key() session.Key
	// Valid reports whether the session has not been invalidated.
	Valid() bool
	// Dirty reports whether there are changes that no commit has carried yet.
	Dirty() bool
	// Commit hands all changes of the session so far to the manager: at once
	// if level is Async, else it waits until the group commit that carries
	// them has reached level. Nothing to commit returns nil at once, unless an
	// earlier change of this session is still on its way at that level.
	Commit(ctx context.Context, level Level) error
	// Release ends the request's use of the session and notes the access time.
	// The handle must not be used afterwards.
	Release()
}
