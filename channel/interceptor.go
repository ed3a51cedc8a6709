package channel

import (
	"context"
	"time"
)

// Interceptor is one layer of a stack. What it does it says by implementing one
// or more of the optional interfaces of this file; they are discovered once,
// when the stack is built, and a layer costs nothing for what it does not
// handle.
//
// Rules for every handler:
//  1. You own the message until you pass it on or return; copy what you keep.
//  2. Handlers run concurrently, also for messages of one sender. Order is
//     promised only above a layer that provides it.
//  3. Forward zero, one or many times, now or later, from any goroutine that
//     you start in Start and join in Stop.
//  4. After Stop has returned, do not call Link.
type Interceptor interface {
	// Descriptor says what the layer is. It must be constant.
	Descriptor() Descriptor
}

// SendHandler handles messages on their way to the wire. It may block as long
// as ctx allows: the caller of Channel.Send waits. It returns what happened
// below; wrap errors, never replace them.
type SendHandler interface {
	HandleSend(ctx context.Context, l Link, m *Message) error
}

// ReceiveHandler handles messages on their way to the application. It should
// return quickly: it holds up the connection that the message came from. An
// error becomes a negative acknowledgement if the sender waits for one; the
// message has then not been delivered.
type ReceiveHandler interface {
	HandleReceive(ctx context.Context, l Link, m *Message) error
}

// MemberHandler handles member events on their way up. Events arrive one at a
// time and in order. It must not block for long; a check that takes time runs
// in a goroutine of the layer and announces its result later.
//
// A layer may keep a member for the layers above by not passing on its loss. It
// must let it go when it is told that the loss is final (see MemberEvent.Final;
// such events may also name members that the layer does not know), or when
// another member is added at the same address: no check could tell them apart.
type MemberHandler interface {
	HandleMember(ctx context.Context, l Link, ev MemberEvent) error
}

// TickHandler is called about every Config.Tick, never concurrently with
// itself, for expiry and other periodic work. It should not block.
type TickHandler interface {
	HandleTick(ctx context.Context, l Link, now time.Time) error
}

// ViewFilter shows the layers above a different view than it sees below. It
// must be a pure function of its argument: the result is cached until the view
// changes.
type ViewFilter interface{ FilterView(below View) View }

// Encoder and Decoder are the two halves of a transforming layer that needs no
// Link. They change the message in place; the stack alone passes it on, so that
// a layer cannot let a message through that it failed to decode. They must not
// block and run concurrently.
type (
	// Encoder prepares a message for the wire.
	Encoder interface{ Encode(m *Message) error }
	// Decoder restores a message from the wire.
	Decoder interface{ Decode(m *Message) error }
)

// Starter is called bottom layer first, before any message; when the layer is
// added to a running channel, before any message that takes the new way. ctx is
// only for starting. A layer whose Start failed is not stopped: it cleans up
// itself. The Link of Start stays right when the layer is moved by
// [Channel.Swap]; that of a handler is for the call and what follows from it.
type Starter interface {
	Start(ctx context.Context, l Link) error
}

// Stopper is called top layer first, when no handler of the layer runs any more.
// It ends what Start began, flushes within ctx, works twice and without Start.
// See [Flusher] for layers that are taken out of a running channel.
type Stopper interface {
	Stop(ctx context.Context) error
}

// Link is a layer's position in its stack. Its methods may be called from any
// goroutine between Start and the end of Stop.
type Link interface {
	// Send passes m to the layer below. When it returns an error, that names
	// the members that failed (a *SendError inside). See Message.Done for
	// sending without waiting.
	Send(ctx context.Context, m *Message) error
	// Deliver passes m to the layer above.
	Deliver(ctx context.Context, m *Message) error
	// Announce passes a member event to the layer above. Events of concurrent
	// callers are put in one order. It queues the event and never blocks, and
	// drops what is no news: the layers above see each member added once
	// before it is updated, suspected or lost.
	Announce(ctx context.Context, ev MemberEvent) error
	// View returns the members as this layer sees them: below its own filter.
	View() View
	// Local returns this node.
	Local() Member
}

// Descriptor states what a layer is and what it needs of its neighbours. Stacks
// are checked with it as a whole before they start.
type Descriptor struct {
	// Name is the name in configuration, "dispatch" or "acme/zstd".
	Name string
	// Flag is the option bit that marks messages this layer has changed or
	// handles; 0 for none.
	Flag Options
	// Mutates says that bodies differ on the wire: all nodes need the layer.
	Mutates bool
	// Stateful says that the layer keeps state between messages.
	Stateful bool
	// Above and Below list layers that this one must stand above (nearer to
	// the application) or below, if they are present.
	Above, Below []string
	// Provides and Requires are properties such as "order": a layer that
	// requires one must stand above a layer that provides it.
	Provides, Requires []string
	// Wants lists layers that this one should be used with. A stack without
	// them works, and is warned of.
	Wants []string
	// Promise says in one sentence what the layer gives to the user, for
	// "longhouse stack".
	Promise string
	// Observer says that the layer only watches: it passes on every message as
	// it is, at once, and its errors concern nobody. Where it runs as a process
	// of its own, messages do not wait for it: it is fed copies, and misses
	// some when it is too slow. An Observer must not set Mutates.
	Observer bool
	// SendInterest and ReceiveInterest narrow the messages that the layer does
	// anything with, see [Interest]. Unlike the rest they may depend on the
	// configuration.
	SendInterest, ReceiveInterest *Interest
}

// Identifier is implemented by layers that know the identity this node has been
// given by its configuration: other nodes have it in their lists. It counts
// when the channel starts and Config.Local has none; the zero id stands for
// none.
type Identifier interface {
	LocalID() UniqueID
}
