package core

import (
	"context"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
)

// Level says what has happened to a change when its commit returns.
type Level uint8

const (
	// Async: the manager has the change; other nodes get it soon. What was not
	// sent when the node dies is lost: the changes of its last second at most, as
	// long as others take what they are sent. It is counted on the survivors'
	// side only by its absence.
	Async Level = iota
	// Acked: every other node of the view has received the change.
	Acked
	// Synced: the manager of every other node of the view has stored it.
	Synced
)

// String returns the level as it is written in configuration.
func (l Level) String() string {
	switch l {
	case Acked:
		return "ack"
	case Synced:
		return "sync"
	}
	return "async"
}

// Manager replicates and places the sessions of one or more contexts. It keeps
// the replicas of other nodes' sessions and the copies of this node's, and is
// never asked about a session that is live in the host's table.
//
// Methods may be called concurrently between Start and Stop.
type Manager interface {
	// Start begins to take part; it returns before the state of the other
	// nodes has arrived (see Status). host is usable until Stop has returned.
	Start(ctx context.Context, host ManagerHost) error
	// Commit takes a batch of changes (session.AppendBatch) and returns when
	// level is reached. Merging is commutative and idempotent, so a batch may
	// be committed again after an error. A member that does not answer is not
	// waited for longer than about a second: a level above Async is reached
	// when all members that the manager has chosen for the sessions and that
	// answer have the change. What a silent member misses it gets when it
	// answers again. batch is valid until Commit returns.
	Commit(ctx context.Context, batch []byte, level Level) error
	// Load returns a replica, or nil if no node knows a living session of that
	// key; of a session that goes on under another id it may return the
	// tombstone (End is Renewed). It waits for the state transfer if it has to.
	// The record belongs to the caller, but its values are never changed.
	Load(ctx context.Context, key session.Key) (*session.Record, error)
	// Release tells that the host wants to forget these sessions, which are
	// unused or have ended, so that changes by other nodes need not be reported
	// any more. After an error the host keeps them, and asks again later: a
	// manager without other members refuses, because its process may die.
	Release(ctx context.Context, keys []session.Key) error
	// HandleMessage takes a message that a manager of another node sent with
	// ManagerHost.Send. done is called exactly once, possibly later and from
	// another goroutine, when the message has been processed; body is valid
	// only until HandleMessage returns. Messages of one sender arrive in order.
	HandleMessage(ctx context.Context, from channel.Member, body []byte, done func(error))
	// HandleView tells the current members. Calls are in order.
	HandleView(ctx context.Context, v channel.View)
	// Status says how the manager is.
	Status(ctx context.Context) (ManagerStatus, error)
	// Keys lists up to limit of the sessions that the manager knows.
	Keys(ctx context.Context, limit int) ([]session.Summary, error)
	// Stop hands over what is needed and ends. It works twice and without
	// Start.
	Stop(ctx context.Context) error
}

// ManagerHost is the node, as a manager sees it.
type ManagerHost interface {
	// Send sends body to the same manager on the members of to and waits as
	// the options say. The error is a *channel.SendError. body may be reused
	// after Send returned.
	Send(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error
	// Update tells the host that other nodes changed sessions which it holds
	// live: the host merges the batch. It does not wait, and keeps the order
	// of calls; the host has merged before it sees the manager's next answer.
	Update(batch []byte)
	// Resync asks the host to commit all its live sessions again, because the
	// manager has lost its memory.
	Resync(ctx context.Context) error
}

// ManagerStatus says how a manager is.
type ManagerStatus struct {
	// Ready: the state transfer is complete, or there was nobody to ask.
	Ready bool `json:"ready"`
	// State is one sentence for people.
	State string `json:"state"`
	// Sessions, Tombstones and Bytes are what it holds now.
	Sessions   int   `json:"sessions"`
	Tombstones int   `json:"tombstones"`
	Bytes      int64 `json:"bytes"`
	// Owned are the sessions that this node is responsible for, of managers
	// that keep a session on some nodes only.
	Owned int `json:"owned,omitempty"`
	// Received counts the sessions that came by state transfer, and Transfer
	// how long the last one took.
	Received int           `json:"received"`
	Transfer time.Duration `json:"transferNanos"`
	// Conflicts counts the attributes that two nodes had changed independently
	// (session.Past), as far as the manager met them, and LatestConflicts are up
	// to 100 of them, the latest first.
	Conflicts       int64              `json:"conflicts"`
	LatestConflicts []session.Conflict `json:"latestConflicts,omitempty"`
}
