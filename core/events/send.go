package events

import (
	"context"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// serve sends a member what is due, one message at a time, until it has gone.
func (r *Relay) serve(p *peer) {
	for {
		m, done, end := r.next(p)
		if end {
			return
		}
		if m == nil {
			select {
			case <-p.wake:
				continue
			case <-p.gone:
				return
			case <-r.life.Done():
				return
			}
		}
		if !r.send(p, encode(m)) {
			return
		}
		r.m.sent.Add(int64(len(m.Events)))
		if done != nil {
			done()
		}
	}
}

// next makes the next message; nil if there is none, and end if there will be
// none. done is called when the member has it.
func (r *Relay) next(p *peer) (m *message, done func(), end bool) {
	r.mu.Lock()
	switch {
	case !p.told && !r.stopping:
		defer r.mu.Unlock()
		m = r.ask(p)
		return m, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			p.told = p.asking == r.asks
		}, false
	case p.list && !r.stopping:
		names := slices.Collect(maps.Keys(p.asked))
		p.list = false
		number := p.number
		r.mu.Unlock()
		list := r.listLiving(p, names)
		r.mu.Lock()
		if p.number == number && !p.list {
			p.living = list
		}
	}
	defer r.mu.Unlock()
	if len(p.living) == 0 && len(p.queue) == 0 {
		return nil, nil, r.stopping
	}
	return r.batch(p), nil, false
}

// ask makes the message that says what the listeners here want.
func (r *Relay) ask(p *peer) *message {
	p.asking, p.next = r.asks, 0
	m := &message{Kind: kindAsk, Number: r.asks}
	for name, t := range r.topics {
		if t.wants != 0 && len(m.Contexts) < maxContexts {
			m.Contexts = append(m.Contexts, name)
			m.Wants = append(m.Wants, byte(t.wants))
		}
	}
	return m
}

// listLiving makes the list of living sessions that goes before what has happened
// since it was begun. Sessions that got a new id meanwhile are listed under the
// old one. It locks for short times only, because there may be many.
func (r *Relay) listLiving(p *peer, names []string) []queued {
	ids := map[session.Key]time.Duration{}
	for _, name := range names {
		for part := range slices.Chunk(r.tables(name).Living(name), batchEvents) {
			r.mu.Lock()
			t := r.topic(name)
			for _, a := range part {
				if _, ended := t.latest(a.Key.ID); !ended { // else the table has not heard of that
					ids[a.Key] = a.Life
				}
			}
			r.mu.Unlock()
		}
	}
	r.mu.Lock()
	for _, q := range slices.Backward(p.queue) {
		if q.Kind != uint8(core.SessionRenewed) {
			continue
		}
		now := session.Key{Context: q.context, ID: q.ID}
		if life, there := ids[now]; there {
			delete(ids, now)
			ids[session.Key{Context: q.context, ID: q.Previous}] = life
		}
	}
	r.mu.Unlock()
	out := make([]queued, 0, len(ids)+2)
	out = append(out, queued{event: event{Kind: wireStart}})
	at := time.Now().UnixMilli()
	for key, life := range ids {
		out = append(out, queued{key.Context, event{Kind: wireExisting, ID: key.ID, At: at, Life: life.Milliseconds()}})
	}
	return append(out, queued{event: event{Kind: wireEnd}})
}

// batch takes the oldest events out of what waits.
func (r *Relay) batch(p *peer) *message {
	m := &message{Kind: kindEvents, Number: p.number, First: p.first}
	index := map[string]int{}
	from := &p.queue
	if len(p.living) > 0 {
		from = &p.living
	}
	n, size := 0, 0
	for ; n < len(*from) && n < batchEvents && size < batchBytes; n++ {
		q := &(*from)[n]
		if q.Kind < wireStart {
			i, there := index[q.context]
			if !there {
				i = len(m.Contexts)
				index[q.context] = i
				m.Contexts = append(m.Contexts, q.context)
			}
			q.Context = i
		}
		m.Events = append(m.Events, q.event)
		size += len(q.ID) + len(q.Name) + len(q.Value) + 32
	}
	p.first += uint64(n)
	if *from = (*from)[n:]; len(*from) == 0 {
		*from = nil
	}
	if r.freed != nil && len(p.queue) < r.cfg.Queue {
		close(r.freed)
		r.freed = nil
	}
	r.hurried = r.hurried && len(p.queue) >= r.cfg.Queue
	return m
}

// send sends until the member has the message; false if it has gone, or the
// relay stops.
func (r *Relay) send(p *peer, body []byte) bool {
	for pause := retryMin; ; pause = min(2*pause, retryMax) {
		ctx, cancel := context.WithTimeout(r.life, sendTimeout)
		err := r.cluster.Send(ctx, Subject, []channel.Member{p.member}, channel.SendSyncAck, body)
		cancel()
		if err == nil {
			return true
		}
		r.m.failed.Inc()
		r.log.Debug("session events not sent; they will be sent again", zap.Stringer("to", p.member), zap.Error(err))
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-p.gone:
			timer.Stop()
			return false
		case <-r.life.Done():
			timer.Stop()
			return false
		}
	}
}
