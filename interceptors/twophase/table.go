package twophase

import (
	"container/list"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// table is what a node holds and has decided. It does no I/O and is not safe for
// concurrent use.
type table struct {
	cfg   Config
	held  map[key]*entry
	queue *list.List // of *entry, oldest first
	bytes int64
	per   map[channel.UniqueID]load // by sender

	fates map[key]*decision
	past  *list.List // of *decision, oldest first
	// pushed counts fates that were forgotten early, for want of room.
	pushed int64
}

type load struct {
	messages int
	bytes    int64
}

// entry is a message that waits for its confirmation.
type entry struct {
	key
	m     channel.Message // a copy, without Later
	at    time.Time
	place *list.Element
	// next and pause are when its fate is asked for.
	next  time.Time
	pause time.Duration
	// fenced: this node has said that it does not know the fate, so that a
	// confirmation of the lost sender comes too late.
	fenced bool
	// open are the members that have not said that they do not know either;
	// nil before anybody was asked.
	open  []channel.UniqueID
	polls bool // open is valid
}

// decision is the fate of a message that is not held.
type decision struct {
	key
	fate fate
	// early: the confirmation came before the message; options are its.
	early   bool
	options channel.Options
	at      time.Time
	place   *list.Element
}

func newTable(c Config) *table {
	return &table{cfg: c, held: map[key]*entry{}, queue: list.New(), per: map[channel.UniqueID]load{}, fates: map[key]*decision{}, past: list.New()}
}

// hold keeps a message. It reports false when there is no room.
func (t *table) hold(m channel.Message, now time.Time) bool {
	k := key{m.From.ID, m.ID}
	size := int64(len(m.Body))
	l := t.per[k.from]
	if len(t.held) >= t.cfg.MaxMessages || t.bytes+size > t.cfg.MaxBytes ||
		// One sender alone leaves room for the others.
		l.messages >= (t.cfg.MaxMessages+1)/2 || l.messages > 0 && l.bytes+size > t.cfg.MaxBytes/2 {
		return false
	}
	e := &entry{key: k, m: m, at: now, next: now.Add(t.cfg.AskAfter), pause: t.cfg.AskAfter}
	e.place = t.queue.PushBack(e)
	t.held[k] = e
	t.bytes += size
	t.per[k.from] = load{l.messages + 1, l.bytes + size}
	return true
}

// release forgets a held message and notes its fate.
func (t *table) release(e *entry, f fate, now time.Time) {
	delete(t.held, e.key)
	t.queue.Remove(e.place)
	size := int64(len(e.m.Body))
	t.bytes -= size
	l := t.per[e.from]
	if l.messages--; l.messages == 0 {
		delete(t.per, e.from)
	} else {
		l.bytes -= size
		t.per[e.from] = l
	}
	t.decide(e.key, f, now)
}

// decide notes a fate, and forgets the oldest when there are too many.
func (t *table) decide(k key, f fate, now time.Time) *decision {
	if old := t.fates[k]; old != nil {
		t.past.Remove(old.place)
	}
	d := &decision{key: k, fate: f, at: now}
	d.place = t.past.PushBack(d)
	t.fates[k] = d
	for len(t.fates) > t.cfg.Remember {
		t.pushed++
		t.forget(t.past.Front().Value.(*decision))
	}
	return d
}

func (t *table) forget(d *decision) {
	t.past.Remove(d.place)
	delete(t.fates, d.key)
}

// expire gives up messages that have been held too long, and forgets old fates.
func (t *table) expire(now time.Time) (expired int) {
	for el := t.queue.Front(); el != nil; el = t.queue.Front() {
		e := el.Value.(*entry)
		if now.Sub(e.at) < t.cfg.Expire {
			break
		}
		t.release(e, aborted, now)
		expired++
	}
	for el := t.past.Front(); el != nil; el = t.past.Front() {
		d := el.Value.(*decision)
		if now.Sub(d.at) < 2*t.cfg.Expire {
			break
		}
		t.forget(d)
	}
	return expired
}

// questions returns what is to be asked, and whom. present says which members
// are in the view, longhouse which of them understand questions.
func (t *table) questions(local channel.UniqueID, present map[channel.UniqueID]bool, longhouse []channel.UniqueID, now time.Time, most int) map[channel.UniqueID][]word {
	asks := map[channel.UniqueID][]word{}
	for el := t.queue.Front(); el != nil && most > 0; el = el.Next() {
		e := el.Value.(*entry)
		if now.Before(e.next) {
			continue
		}
		e.pause = min(2*e.pause, max(t.cfg.AskAfter, t.cfg.Expire/12))
		e.next = now.Add(e.pause)
		if present[e.from] || e.from == local {
			e.open, e.polls = nil, false
			if slices.Contains(longhouse, e.from) {
				asks[e.from] = append(asks[e.from], word{e.key, asked})
				most--
			}
			continue
		}
		// All are asked again when one is lost that has not answered: it may have
		// told another one before.
		if !e.polls || slices.ContainsFunc(e.open, func(m channel.UniqueID) bool { return !present[m] }) {
			e.open, e.polls = slices.Clone(longhouse), len(longhouse) > 0
		}
		for _, m := range e.open {
			asks[m] = append(asks[m], word{e.key, asked})
			most--
		}
	}
	return asks
}

// answer says what this node knows of a message of somebody else.
func (t *table) answer(k key, senderPresent bool, now time.Time) fate {
	if d := t.fates[k]; d != nil {
		return d.fate
	}
	if senderPresent {
		return waiting
	}
	if e := t.held[k]; e != nil {
		e.fenced = true
		return undecided
	}
	t.decide(k, aborted, now)
	return unknown
}

// told takes the answer of a member and returns what follows: committed,
// aborted, or waiting for nothing.
func (t *table) told(e *entry, by channel.UniqueID, f fate) fate {
	fromSender := by == e.from
	i := slices.Index(e.open, by)
	switch {
	case !fromSender && i < 0: // nobody asked it
		return waiting
	case f == committed:
		return committed
	case fromSender && f == aborted:
		return aborted
	case fromSender || f == waiting:
		return waiting
	}
	// It does not know, or has given up without knowing.
	if e.open = slices.Delete(e.open, i, i+1); len(e.open) > 0 {
		return waiting
	}
	return aborted // all that are left have been asked, and nobody has delivered it
}
