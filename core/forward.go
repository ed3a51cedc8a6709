package core

import (
	"context"
	"errors"
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
}

// Commit implements Manager.
func (m *forwarding) Commit(ctx context.Context, batch []byte, level Level) error {
	if m.never.Load() {
		return m.Manager.Commit(ctx, batch, level)
	}
	fw, err := m.f.Forward(ctx, batch, level)
	if err == nil {
		err = m.forward(ctx, fw, level)
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrNoForward) {
		m.never.Store(true)
	}
	// The manager knows what to do about members that do not answer.
	return m.Manager.Commit(ctx, batch, level)
}

func (m *forwarding) forward(ctx context.Context, fw Forward, level Level) error {
	o := level.SendOptions()
	if level != Async {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, fw.Wait)
		defer cancel()
	}
	if level == Async || len(fw.Parcels) < 2 {
		var errs []error
		for _, p := range fw.Parcels {
			errs = append(errs, m.send(ctx, p.To, o, p.Body))
		}
		return errors.Join(errs...)
	}
	errs := make([]error, len(fw.Parcels))
	var wg sync.WaitGroup
	for i, p := range fw.Parcels {
		wg.Go(func() { errs[i] = m.send(ctx, p.To, o, p.Body) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
