package twophase

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

var errLate = fmt.Errorf("twophase: the message has been given up: %w", channel.ErrBadMessage)

// HandleReceive implements channel.ReceiveHandler.
func (x *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	if isTalk(m.Body) {
		x.talked(ctx, l, m)
		return nil
	}
	if !x.handles(m.Options) {
		return l.Deliver(ctx, m)
	}
	if id, ok := confirmed(m.Body); ok {
		return x.confirm(ctx, l, m, id)
	}
	return x.hold(ctx, l, m)
}

// merged are the options of a message as its sender had meant them: whether it
// is acknowledged only the confirmation says.
func merged(message, confirmation channel.Options) channel.Options {
	return message&^acks | confirmation&acks
}

// hold keeps a message until it is confirmed.
func (x *Interceptor) hold(ctx context.Context, l channel.Link, m *channel.Message) error {
	k, now := key{m.From.ID, m.ID}, time.Now()
	kept := channel.Message{ID: m.ID, From: m.From, Options: m.Options, Time: m.Time, Body: bytes.Clone(m.Body)}
	x.mu.Lock()
	d := x.table.fates[k]
	switch {
	case d != nil && d.early:
		d.early = false
		x.mu.Unlock()
		x.delivered.Inc()
		m.Options = merged(m.Options, d.options)
		return l.Deliver(ctx, m)
	case d != nil && d.fate == committed, x.table.held[k] != nil:
		x.mu.Unlock()
		x.twice.Inc()
		return nil
	case d != nil:
		x.mu.Unlock()
		x.late.Inc()
		return errLate
	}
	ok := x.table.hold(kept, now)
	x.mu.Unlock()
	if !ok {
		x.full.Inc()
		return fmt.Errorf("twophase: no room to hold the message: %w", channel.ErrQueueFull)
	}
	return nil
}

// confirm delivers a held message. Its acknowledgement is that of the
// confirmation.
func (x *Interceptor) confirm(ctx context.Context, l channel.Link, m *channel.Message, id channel.UniqueID) error {
	k, now := key{m.From.ID, id}, time.Now()
	x.mu.Lock()
	e, d := x.table.held[k], x.table.fates[k]
	switch {
	case e == nil && d == nil:
		d = x.table.decide(k, committed, now)
		d.early, d.options = true, m.Options
		x.mu.Unlock()
		x.early.Inc()
		return nil
	case e == nil && d.fate == committed:
		x.mu.Unlock()
		x.twice.Inc()
		return nil
	case e == nil, e.fenced:
		x.mu.Unlock()
		x.late.Inc()
		return errLate
	}
	x.table.release(e, committed, now)
	x.mu.Unlock()
	x.delivered.Inc()
	m.ID, m.Time, m.Body, m.Options = id, e.m.Time, e.m.Body, merged(e.m.Options, m.Options)
	return l.Deliver(ctx, m)
}

// talked takes questions and answers of other nodes.
func (x *Interceptor) talked(ctx context.Context, l channel.Link, m *channel.Message) {
	kind, words, err := decodeTalk(m.Body)
	v := l.View()
	from, known := v.Get(m.From.ID)
	if err != nil || !known {
		x.malformed.Inc()
		return
	}
	if kind == ask {
		x.answer(l, v, from, words)
		return
	}
	now := time.Now()
	var deliver []channel.Message
	x.mu.Lock()
	for _, w := range words {
		e := x.table.held[w.key]
		if e == nil {
			continue
		}
		switch f := x.table.told(e, from.ID, w.fate); f {
		case committed:
			x.table.release(e, f, now)
			deliver = append(deliver, e.m)
		case aborted:
			x.table.release(e, f, now)
			x.dropped.Inc()
		}
	}
	x.mu.Unlock()
	for i := range deliver {
		x.recovered.Inc()
		if err := l.Deliver(ctx, &deliver[i]); err != nil {
			x.log.Debug("a recovered message failed", zap.Stringer("sender", m.From), zap.Error(err))
		}
	}
}

// answer answers questions.
func (x *Interceptor) answer(l channel.Link, v channel.View, from channel.Member, words []word) {
	now, local := time.Now(), l.Local().ID
	x.mu.Lock()
	defer x.mu.Unlock()
	for i := range words {
		w := &words[i]
		if w.from != local {
			_, present := v.Get(w.from)
			w.fate = x.table.answer(w.key, present, now)
			continue
		}
		w.fate = unknown
		if d := x.own.fates[w.key]; d != nil {
			w.fate = d.fate
		}
	}
	x.talk(from, tell, words)
}
