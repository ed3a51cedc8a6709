package twophase

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// transfer is one message of this node between its two phases. It is the
// Completion of the first.
type transfer struct {
	x       *Interceptor
	link    channel.Link
	id      channel.UniqueID
	from    channel.Member
	to      []channel.Member
	options channel.Options
	time    int64
	done    channel.Completion // of the caller, or nil
}

// HandleSend implements channel.SendHandler.
func (x *Interceptor) HandleSend(ctx context.Context, l channel.Link, m *channel.Message) error {
	if !x.handles(m.Options) {
		return l.Send(ctx, m)
	}
	select {
	case x.slots <- struct{}{}:
	default:
		x.waited.Inc()
		select {
		case x.slots <- struct{}{}:
		case <-ctx.Done():
			return channel.Failed(m.To, fmt.Errorf("twophase: %d messages are being sent: %w: %w", x.cfg.MaxInFlight, channel.ErrQueueFull, ctx.Err()))
		}
	}
	t := &transfer{x: x, link: l, id: m.ID, from: m.From, to: slices.Clone(m.To), options: m.Options, time: m.Time, done: m.Done}
	t.decide(waiting)
	m.Options = m.Options&^acks | channel.UseAck | channel.SyncAck
	if t.done != nil {
		m.Done = t
		if err := l.Send(ctx, m); err != nil {
			return t.abort(err)
		}
		return nil
	}
	err := l.Send(ctx, m)
	if err == nil && ctx.Err() != nil {
		err = channel.Failed(t.to, ctx.Err())
	}
	if err != nil {
		return t.abort(err)
	}
	t.decide(committed)
	return t.confirmed(l.Send(ctx, t.confirmation()))
}

// confirmation is the second message.
func (t *transfer) confirmation() *channel.Message {
	return &channel.Message{
		ID: channel.NewUniqueID(), From: t.from, To: slices.Clone(t.to), Options: t.options, Time: t.time,
		Body: appendConfirm(make([]byte, 0, confirmSize), t.id),
	}
}

func (t *transfer) decide(f fate) {
	t.x.mu.Lock()
	defer t.x.mu.Unlock()
	t.x.own.decide(key{t.from.ID, t.id}, f, time.Now())
}

// Complete implements channel.Completion for the first phase.
func (t *transfer) Complete(_ *channel.Message, err error) {
	if err != nil {
		t.report(t.abort(err))
		return
	}
	t.x.mu.Lock()
	open := !t.x.stopped && t.x.link != nil
	if open {
		t.x.confirms <- t // there is a place for every slot
	}
	t.x.mu.Unlock()
	if !open {
		t.report(t.abort(channel.Failed(t.to, channel.ErrClosed)))
	}
}

// second is the Completion of the second phase.
type second transfer

// Complete implements channel.Completion.
func (s *second) Complete(_ *channel.Message, err error) {
	t := (*transfer)(s)
	t.report(t.confirmed(err))
}

// report tells the caller the result.
func (t *transfer) report(err error) {
	t.done.Complete(&channel.Message{ID: t.id, From: t.from, To: t.to, Options: t.options, Time: t.time}, err)
}

// confirmer sends the second messages of those that nobody waits for.
func (x *Interceptor) confirmer(ctx context.Context, l channel.Link) {
	for t := range x.confirms {
		if ctx.Err() != nil {
			t.report(t.abort(channel.Failed(t.to, channel.ErrClosed)))
			continue
		}
		t.decide(committed)
		m := t.confirmation()
		m.Done = (*second)(t)
		if err := l.Send(ctx, m); err != nil {
			t.report(t.confirmed(err))
		}
	}
}

// abort ends a message that a member has not got. It returns err with the
// members added that have it and will not deliver it.
func (t *transfer) abort(err error) error {
	<-t.x.slots
	t.x.cancelled.Inc()
	t.decide(aborted)
	var se *channel.SendError
	if !errors.As(err, &se) {
		t.tell(t.to)
		return err
	}
	faults := slices.Clone(se.Faults)
	var have []channel.Member
	for _, m := range t.to {
		if !slices.ContainsFunc(se.Faults, func(f channel.Fault) bool { return f.Member.ID == m.ID }) {
			have = append(have, m)
			faults = append(faults, channel.Fault{Member: m, Err: ErrAborted})
		}
	}
	t.tell(have)
	return &channel.SendError{Faults: faults}
}

// tell lets Longhouse nodes forget the message at once; the others do so when it
// expires.
func (t *transfer) tell(to []channel.Member) {
	var who []channel.Member
	for _, m := range to {
		if _, ok := m.Announcement(); ok {
			who = append(who, m)
		}
	}
	if len(who) == 0 {
		return
	}
	t.x.mu.Lock()
	defer t.x.mu.Unlock()
	t.x.post(letter{to: who, options: channel.SendNone, body: appendTalk(nil, tell, []word{{key{t.from.ID, t.id}, aborted}})})
}

// confirmed ends a message that was confirmed. Members that the confirmation
// has not reached get it again.
func (t *transfer) confirmed(err error) error {
	<-t.x.slots
	t.x.sent.Inc()
	if err == nil {
		return nil
	}
	var se *channel.SendError
	if !errors.As(err, &se) {
		return err
	}
	faults := slices.Clone(se.Faults)
	t.x.mu.Lock()
	for i, f := range faults {
		faults[i].Err = fmt.Errorf("twophase: the message was confirmed, and the member may still deliver it: %w", f.Err)
		if len(t.x.again) < maxAgain && !errors.Is(f.Err, channel.ErrNegativeAck) {
			t.x.again = append(t.x.again, again{f.Member, t.id, t.options, time.Now().Add(t.x.cfg.AskAfter), againTimes})
		}
	}
	t.x.mu.Unlock()
	return &channel.SendError{Faults: faults}
}
