package channel

import (
	"context"
	"net/netip"
)

// The bottom of the stack. The usual implementations are in channel/tcp and in
// the membership plugins; embedders and tests may bring their own.

// Sender brings messages to other nodes.
type Sender interface {
	// Start prepares for sending. ctx is only for starting.
	Start(ctx context.Context) error
	// Send writes m to every member of m.To and, if the options ask for it,
	// waits for the acknowledgements. The error is nil or a *SendError with
	// the faulty members; all others have the message. With m.Done set it may
	// return nil once the message is accepted; see Message.Done. Messages to
	// one member are sent in the order in which Send was called.
	// Send may be called from any goroutine and blocks while the window of a
	// destination is full, at most as long as ctx allows.
	Send(ctx context.Context, m *Message) error
	// Forget closes what is kept for a member that has gone.
	Forget(m Member)
	// Stop flushes within ctx and closes all connections. It works twice and
	// without Start.
	Stop(ctx context.Context) error
}

// TrySender is implemented by senders, and by the Link of a layer, that can
// send a message without waiting for anything.
type TrySender interface {
	// TrySend accepts a message to one member for which nobody waits (no UseAck,
	// no Done) if that takes no waiting: there is a connection and room in its
	// window. If it returns true the message is sent, as far as Send promises,
	// and the caller may reuse it. If it returns false nothing has happened. A
	// Link also returns false when there are layers below that handle messages.
	TrySend(m *Message) bool
}

// Receiver accepts messages of other nodes.
type Receiver interface {
	// Listen binds, without accepting yet, and returns the address to be
	// announced to other nodes.
	Listen(ctx context.Context) (netip.AddrPort, error)
	// Start accepts messages and hands them to deliver, in order per
	// connection. deliver's error becomes a negative acknowledgement.
	Start(ctx context.Context, deliver func(context.Context, *Message) error) error
	// Stop closes listener and connections, and returns when no call of
	// deliver is running any more. It works twice and without Start.
	Stop(ctx context.Context) error
}

// Describer is implemented by senders and receivers that tell the other nodes more than an
// address.
type Describer interface {
	// Describe completes this node's record and announcement. It is called
	// after Listen, whenever the announcement changes.
	Describe(m *Member, a *Announcement)
}

// Membership finds the other nodes and says when it no longer hears from them.
type Membership interface {
	// Start announces local to the group and reports other members to sink
	// until Stop. known are members to be assumed heard of just now: after a
	// restart of the membership they are reported lost if they stay silent.
	Start(ctx context.Context, local Member, known []Member, sink MemberSink) error
	// Update changes the local record: payload, domain.
	Update(ctx context.Context, local Member) error
	// Stop leaves the group, telling the others.
	Stop(ctx context.Context) error
}

// Attacher is implemented by memberships that speak over the channel that they
// are for. New calls Attach; messages can be sent from Start until the end of
// Stop.
type Attacher interface{ Attach(c *Channel) }

// MemberSink receives what a membership observes. Calls come one at a time and
// in order; they return quickly.
type MemberSink interface {
	// Observe reports MemberAdded, MemberUpdated, MemberLost or MemberLeft.
	// Repeating a known fact is harmless.
	Observe(ev MemberEvent)
}
