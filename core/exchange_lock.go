package core

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/longhouse-go/longhouse/core/session"
)

// SessionLocker lets one request at a time use a session, of all nodes of the
// group.
type SessionLocker interface {
	// Lock waits until the session belongs to the caller. Errors say in a
	// sentence for clients why it does not.
	Lock(ctx context.Context, key session.Key) (SessionLock, error)
}

// SessionLock is the right of one request to a session.
type SessionLock interface {
	// Held reports whether the right still holds: it ends with its lease, or
	// when the others take the caller's node for dead. It waits until they have
	// confirmed lately that they do not, or ctx ends.
	Held(ctx context.Context) bool
	// Last is what the session was when the last one gave it back; zero if that
	// is not known. fresh says that this was a request of this node, and that
	// its state here is the newest therefore.
	Last() (state SessionState, fresh bool)
	// Broken is how many holders before this one may still be at work, because
	// they did not give the session back in time.
	Broken() uint64
	// Unlock gives the session back; zero says that the caller did not work on
	// it, so that what Last said still counts. It does not wait, and works twice.
	Unlock(SessionState)
	// Break gives the session back instead of Unlock, if it is not known whether
	// what was changed has been stored.
	Break()
}

// SessionState tells states of one session apart.
type SessionState struct {
	// Counter is the highest counter of any version in the session.
	Counter uint64
	// Versions is session.Record.Versions.
	Versions uint64
}

// Versioned is implemented by handles whose session can be locked.
type Versioned interface {
	// State is what the session is here.
	State() SessionState
	// Refresh takes over what the manager has, until the session is in that
	// state or has been changed after it.
	Refresh(ctx context.Context, newest SessionState) error
	// Skip makes the versions of coming changes higher than those that so many
	// holders before could still write.
	Skip(holders uint64)
}

// DefaultLockTimeout bounds how long a request waits for a session's lock.
const DefaultLockTimeout = 10 * time.Second

// ErrLocked: a session could not be locked, or not be kept.
var ErrLocked = errors.New("the session is in use by another request")

// takeLock gets the session of that key for this request. It is called by one
// goroutine at a time. A failure makes the response a 503, whatever the
// application does with the error.
func (x *Exchange) takeLock(ctx context.Context, key session.Key) error {
	for _, l := range x.locks { // only this goroutine appends
		if l.key == key {
			return nil
		}
	}
	held, err := x.context.locker.Lock(ctx, key)
	if err != nil {
		return fmt.Errorf("core: session %s: %w", session.Prefix(key.ID), err)
	}
	x.sess.mu.Lock()
	defer x.sess.mu.Unlock()
	if x.unlocked { // the request ended meanwhile
		held.Unlock(SessionState{})
		return session.ErrNone
	}
	x.locks = append(x.locks, keyLock{key, held})
	return nil
}

type keyLock struct {
	key session.Key
	SessionLock
}

// findLocked finds a session and locks it, under the id that it has now. Only
// what a lock protects is looked at.
func (x *Exchange) findLocked(ctx context.Context, key session.Key) (Handle, error) {
	x.sess.mu.Lock()
	failed := x.lockErr
	x.sess.mu.Unlock()
	if failed != nil { // once is enough
		return nil, failed
	}
	ctx, cancel := context.WithTimeout(ctx, x.context.lockTimeout)
	defer cancel()
	h, err := x.lockAndFind(ctx, key)
	if err != nil {
		x.lockFailed(err)
	}
	return h, err
}

func (x *Exchange) lockAndFind(ctx context.Context, key session.Key) (Handle, error) {
	for {
		if err := x.takeLock(ctx, key); err != nil {
			return nil, err
		}
		h, err := x.context.sessions.Find(ctx, key)
		if h == nil || err != nil {
			return nil, err
		}
		if now := h.Key(); now != key { // renewed: whoever knows the new id locks that
			h.Release()
			key = now
			continue
		}
		if err := x.makeNewest(ctx, h); err != nil {
			h.Release()
			return nil, err
		}
		if !h.Valid() {
			h.Release()
			return nil, nil
		}
		return h, nil
	}
}

// makeNewest brings the session up to what the holder before left.
func (x *Exchange) makeNewest(ctx context.Context, h Handle) error {
	v, ok := h.(Versioned)
	if !ok {
		return nil
	}
	l := x.locks[len(x.locks)-1]
	for _, o := range x.locks {
		if o.key == h.Key() {
			l = o
		}
	}
	newest, fresh := l.Last()
	if !fresh {
		if err := v.Refresh(ctx, newest); err != nil {
			return fmt.Errorf("core: session %s: the newest state has not arrived: %w", session.Prefix(l.key.ID), err)
		}
	}
	if n := l.Broken(); n > 0 {
		v.Skip(n)
	}
	return nil
}

// lockCreated locks a session that this request has made: the client may use it
// as soon as it has the header, and this request may go on.
func (x *Exchange) lockCreated(h Handle) error {
	ctx, cancel := context.WithTimeout(x.parent, x.context.lockTimeout)
	defer cancel()
	err := x.takeLock(ctx, h.Key())
	if err != nil {
		x.lockFailed(err)
	}
	return err
}

func (x *Exchange) lockFailed(err error) {
	x.sess.mu.Lock()
	defer x.sess.mu.Unlock()
	x.lockErr = err
}

// settleLocked commits the changes, and looks whether they were made in time.
func (x *Exchange) settleLocked() error {
	if err := x.checkLocks(); err != nil {
		return err
	}
	if x.context.distributable {
		if err := x.commitSessions(Synced); err != nil {
			return err
		}
	}
	return x.checkLocks()
}

// checkLocks is the last look before the response goes out: nobody else has got
// the session before this request's changes were committed.
func (x *Exchange) checkLocks() error {
	x.sess.mu.Lock()
	err, locks := x.lockErr, x.locks
	x.sess.mu.Unlock()
	if err != nil {
		return err
	}
	for _, l := range locks {
		if !l.Held(x.parent) {
			return fmt.Errorf("core: session %s: the request has had it for longer than lock_lease: %w", session.Prefix(l.key.ID), ErrLocked)
		}
	}
	return nil
}

// releaseLocks gives the sessions back, after their changes are committed.
func (x *Exchange) releaseLocks() {
	if x.context == nil || x.context.locker == nil {
		return
	}
	ended, current := x.held()
	stored := true
	if x.context.distributable {
		if err := x.commitSessions(Synced); err != nil { // nothing to do, unless the response was cut off
			x.engine.metrics.lostCommits.Inc()
			stored = false
		}
	}
	var state SessionState
	for _, h := range append(ended[:len(ended):len(ended)], current) {
		if h == nil {
			continue
		}
		if v, ok := h.Handle.(Versioned); ok {
			state = v.State() // the current one is the last
		}
	}
	x.sess.mu.Lock()
	locks := x.locks
	x.unlocked = true
	x.sess.mu.Unlock()
	for _, l := range locks {
		if stored {
			l.Unlock(state)
		} else {
			l.Break()
		}
	}
}

// UpdateRuled implements session.Ruled.
func (h *heldSession) UpdateRuled(name string, change func(session.Entry, uint64) ([]byte, error)) error {
	if err := reserved(name); err != nil {
		return err
	}
	r, ok := h.Handle.(session.Ruled)
	if !ok {
		return fmt.Errorf("core: the table of context %s has no merge rules", h.x.context.name)
	}
	return r.UpdateRuled(name, change)
}
