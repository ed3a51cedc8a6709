package core

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// Forwarder is implemented by managers whose commits are messages to other
// members. They say what is to be sent, and the node sends it: that spares each
// commit the way back into the manager's process and out again. The node calls
// Commit of managers that do not implement it.
type Forwarder interface {
	// Forward does all that Commit does except for sending. The node sends the
	// parcels with the options that belong to the level, all at once, and the
	// batch is committed when each has reached its members. If one fails, or
	// after Forward.Wait, the node calls Commit with the same batch. batch is
	// valid until Forward returns; the parcels belong to the caller.
	Forward(ctx context.Context, batch []byte, level Level) (Forward, error)
}

// ErrNoForward: the manager does not implement Forwarder.
var ErrNoForward = errors.New("the manager sends its commits itself")

// Forward is what a commit sends.
type Forward struct {
	// Parcels are the messages; none if nobody else needs to know.
	Parcels []Parcel
	// Wait bounds how long a level above Async is waited for; it is greater
	// than 0.
	Wait time.Duration
}

// Parcel is a message for the same manager on other members.
type Parcel struct {
	To   []channel.Member
	Body []byte
	// Batch says that the batch of the commit follows Body. A node may send the
	// next batch the same way before it has asked, while the manager takes it;
	// what the manager then says counts: it may be sent again, and to others.
	Batch bool
}

// SendOptions returns the options of a message that reaches its members as far
// as the level says.
func (l Level) SendOptions() channel.Options {
	switch l {
	case Async:
		return channel.SendAsync
	case Acked:
		return channel.SendAck
	}
	return channel.SendSyncAck
}

// Forwarding returns m with a Commit that sends what m.Forward says by send (see
// ManagerHost.Send), if m is a Forwarder.
func Forwarding(m Manager, send func(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error) Manager {
	f, ok := m.(Forwarder)
	if !ok {
		return m
	}
	return &forwarding{Manager: m, f: f, send: send}
}

type forwarding struct {
	Manager
	f    Forwarder
	send func(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error
	// never is set when the manager, a process whose abilities show only when
	// it is asked, turned out to be no Forwarder.
	never atomic.Bool
	// last is what the manager said last, if it was the batch itself that was
	// sent: the next batch goes the same way unless something has happened.
	last atomic.Pointer[Forward]
}

// Commit implements Manager.
func (m *forwarding) Commit(ctx context.Context, batch []byte, level Level) error {
	if m.never.Load() {
		return m.Manager.Commit(ctx, batch, level)
	}
	var sent <-chan error
	guess := m.last.Load()
	if level > Async && guess != nil {
		early, cancel := context.WithCancel(ctx)
		sent = m.forwardEarly(early, *guess, batch, level)
		defer func() {
			cancel()
			<-sent // batch is the caller's again
		}()
	}
	fw, err := m.f.Forward(ctx, batch, level)
	switch {
	case errors.Is(err, ErrNoForward):
		m.never.Store(true)
	case err != nil:
	case sent != nil && fw.same(*guess):
		err = <-sent
	default:
		m.last.Store(fw.repeatable())
		err = m.forward(ctx, fw, batch, level)
	}
	if err != nil {
		// The manager knows what to do about members that do not answer.
		return m.Manager.Commit(ctx, batch, level)
	}
	return nil
}

// repeatable returns what may be sent of the next batch before the manager says
// so, or nil.
func (fw *Forward) repeatable() *Forward {
	if len(fw.Parcels) == 1 && fw.Parcels[0].Batch {
		return fw
	}
	return nil
}

// same reports whether what was sent by a guess is what the manager says.
func (fw *Forward) same(guess Forward) bool {
	if fw.repeatable() == nil {
		return false
	}
	a, b := fw.Parcels[0], guess.Parcels[0]
	return bytes.Equal(a.Body, b.Body) && slices.EqualFunc(a.To, b.To, func(x, y channel.Member) bool { return x.ID == y.ID })
}

// forwardEarly forwards in a goroutine of its own; the channel gives its result,
// and is closed.
func (m *forwarding) forwardEarly(ctx context.Context, fw Forward, batch []byte, level Level) <-chan error {
	done := make(chan error, 1)
	go func() { // ends with ctx at the latest
		done <- m.forward(ctx, fw, batch, level)
		close(done)
	}()
	return done
}

// forward sends the parcels and waits as the level says.
func (m *forwarding) forward(ctx context.Context, fw Forward, batch []byte, level Level) error {
	if level != Async {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, fw.Wait)
		defer cancel()
	}
	if level == Async || len(fw.Parcels) < 2 {
		var errs []error
		for _, p := range fw.Parcels {
			errs = append(errs, m.sendParcel(ctx, p, batch, level))
		}
		return errors.Join(errs...)
	}
	errs := make([]error, len(fw.Parcels))
	var wg sync.WaitGroup
	for i, p := range fw.Parcels {
		wg.Go(func() { errs[i] = m.sendParcel(ctx, p, batch, level) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (m *forwarding) sendParcel(ctx context.Context, p Parcel, batch []byte, level Level) error {
	if !p.Batch {
		return m.send(ctx, p.To, level.SendOptions(), p.Body)
	}
	buf := bodies.Get().(*[]byte)
	defer func() {
		if cap(*buf) <= maxPooledBody {
			bodies.Put(buf)
		}
	}()
	*buf = append(append((*buf)[:0], p.Body...), batch...)
	return m.send(ctx, p.To, level.SendOptions(), *buf)
}
