package session

import (
	"context"
	"errors"
	"net/http"
	"time"
)

// Errors that an application may branch on.
var (
	// ErrNone: the request has no session and none can be made, because it
	// does not pass a Longhouse context.
	ErrNone = errors.New("session: the request does not belong to a context with sessions")
	// ErrInvalid: the session has been invalidated or has expired.
	ErrInvalid = errors.New("session: no longer valid")
	// ErrTooLarge: the session would grow over its bound.
	ErrTooLarge = errors.New("session: too large")
	// ErrCommitted: a new session cannot be announced any more, because the
	// response header has been sent.
	ErrCommitted = errors.New("session: response already committed")
	// ErrFull: the node's session table is full.
	ErrFull = errors.New("session: table full")
	// ErrDraining: the node is going to stop and takes no new sessions; another
	// one will.
	ErrDraining = errors.New("session: the node is draining and takes no new sessions")
)

// Session is a user's session, as an application sees it. All methods may be
// called from several goroutines of one request and from parallel requests of
// one session.
//
// Values are encoded when they are set: changing an object later without
// setting it again changes nothing. Use [Attr] for typed access.
type Session interface {
	// ID returns the id as the client knows it, including the route.
	ID() string
	// IsNew reports whether the client does not know the session yet.
	IsNew() bool
	// Get decodes the attribute into the pointer into; false if it is not set.
	Get(name string, into any) (bool, error)
	// Set stores the attribute. nil deletes it.
	Set(name string, value any) error
	// Delete removes the attribute.
	Delete(name string) error
	// Update changes the attribute in place: change receives the encoded value
	// (nil if not set) and returns the new one (nil to delete). Updates of one
	// session on one node happen one after the other; change must not use the
	// session itself and must not keep or change old. It is called again if the
	// attribute was changed meanwhile, by Set or by another node.
	Update(name string, change func(old []byte) ([]byte, error)) error
	// Names returns the names of all attributes, sorted.
	Names() []string
	// Created and LastAccess are the node's times; LastAccess is that of the
	// request before this one.
	Created() time.Time
	LastAccess() time.Time
	// MaxInactive is how long the session lives without a request; 0 or less
	// means for ever.
	MaxInactive() time.Duration
	SetMaxInactive(d time.Duration) error
	// Renew gives the session a new id, as should be done after a log-in.
	Renew() error
	// Invalidate ends the session, everywhere and for good.
	Invalidate() error
}

// Source finds or makes the session of one request. The container puts one
// into the request's context.
type Source interface {
	Session(create bool) (Session, error)
}

type sourceKey struct{}

// IsSourceKey reports whether key is the one under which From looks for the
// Source, for containers whose contexts are of a type of their own.
func IsSourceKey(key any) bool {
	_, ok := key.(sourceKey)
	return ok
}

// WithSource returns a context that carries the source.
func WithSource(ctx context.Context, s Source) context.Context {
	return context.WithValue(ctx, sourceKey{}, s)
}

// From returns the session of the request and makes one if there is none yet.
func From(r *http.Request) (Session, error) {
	s, ok := r.Context().Value(sourceKey{}).(Source)
	if !ok {
		return nil, ErrNone
	}
	return s.Session(true)
}

// Existing returns the session of the request, or nil if it has none.
func Existing(r *http.Request) (Session, error) {
	s, ok := r.Context().Value(sourceKey{}).(Source)
	if !ok {
		return nil, ErrNone
	}
	return s.Session(false)
}
