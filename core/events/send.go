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
		number, dropped := p.number, p.dropped
		p.dropped = 0
		r.mu.Unlock()
		if dropped > 0 {
			r.log.Warn("too many session events waited for a member: it is told which sessions there are instead",
				zap.Stringer("member", p.member), zap.Int("events", dropped))
		}
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
	now := time.Now()
	lost := map[session.Key]bool{}
	out := []queued{{event: event{Kind: wireStart}}}
	for _, name := range names {
		// What has ended lately: others may list it, because they have not heard
		// of that.
		for _, m := range []map[string]ending{r.topic(name).older, r.topic(name).ended} {
			for id, end := range m {
				out = append(out, queued{name, event{Kind: wireEnded, ID: id, Previous: end.next, Reason: uint8(end.reason), At: now.UnixMilli()}})
			}
		}
		for id, e := range r.topic(name).known { // also those that have left the table, and those that nobody has
			key := session.Key{Context: name, ID: id}
			if _, there := ids[key]; !there && (e.owner == nil || e.owner.left) {
				ids[key] = 0
				if e.due != 0 {
					ids[key] = max(time.UnixMilli(e.due).Sub(now), time.Millisecond)
				}
				lost[key] = e.owner != nil
			}
		}
	}
	for _, q := range slices.Backward(p.queue) {
		if q.Kind != uint8(core.SessionRenewed) {
			continue
		}
		renewed := session.Key{Context: q.context, ID: q.ID}
		if life, there := ids[renewed]; there {
			delete(ids, renewed)
			ids[session.Key{Context: q.context, ID: q.Previous}] = life
		}
	}
	r.mu.Unlock()
	out = slices.Grow(out, len(ids)+1)
	for key, life := range ids {
		kind := uint8(wireExisting)
		if lost[key] {
			kind = wireLost
		}
		out = append(out, queued{key.Context, event{Kind: kind, ID: key.ID, At: now.UnixMilli(), Life: life.Milliseconds()}})
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
