package repmap

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/rpc"
)

// retryPause is how long a comparison that failed waits for its next try.
const retryPause = time.Second

// keep repairs the map: it compares it with that of others, takes over what
// the dead have left, and forgets old removals. One goroutine.
func (e *engine) keep() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	nextRound := time.Now().Add(e.cfg.Interval)
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-e.kick:
		case <-timer.C:
		}
		failed := e.compareAll()
		for e.ctx.Err() == nil && e.repair() {
			// Until nothing new has come up.
		}
		now := time.Now()
		e.mu.Lock()
		e.bury(now)
		if !now.Before(nextRound) {
			nextRound = now.Add(e.cfg.Interval)
			ids := slices.DeleteFunc(slices.Collect(maps.Keys(e.peers)), func(id channel.UniqueID) bool {
				_, java := e.tribes[id]
				return java // it would send everything
			})
			if len(ids) > 0 {
				id := ids[rand.IntN(len(ids))]
				if _, asked := e.pulls[id]; !asked {
					e.pulls[id] = false
				}
			}
		}
		wait := nextRound.Sub(now)
		if fresh := len(e.pulls) > failed; fresh {
			wait = 0
		} else if failed > 0 {
			wait = min(wait, retryPause)
		}
		e.mu.Unlock()
		timer.Reset(wait)
	}
}

// compareAll compares with every member that is noted, those that have failed
// before last. It returns how many have failed.
func (e *engine) compareAll() (failed int) {
	tried := map[channel.UniqueID]bool{}
	succeeded := false
	for e.ctx.Err() == nil {
		e.mu.Lock()
		var id channel.UniqueID
		found := false
		for x, again := range e.pulls {
			if !tried[x] && (!found || !again) {
				id, found = x, true
				if !again {
					break
				}
			}
		}
		m := e.members[id]
		if !found {
			if !e.isReady && (len(e.pulls) == 0 || succeeded) {
				e.isReady = true
				close(e.ready)
			}
			e.mu.Unlock()
			return failed
		}
		delete(e.pulls, id)
		e.mu.Unlock()
		tried[id] = true
		err := e.compare(m)
		if err == nil {
			succeeded = true
			continue
		}
		failed++
		e.mu.Lock()
		if _, ok := e.members[id]; ok && e.ctx.Err() == nil {
			e.pulls[id] = true
		} else {
			failed--
		}
		e.mu.Unlock()
		if e.ctx.Err() == nil {
			e.log.Info("a map could not be compared with that of another member; it will be tried again",
				zap.String("map", e.name), zap.Stringer("member", m), zap.Error(err))
		}
	}
	return failed
}

// compare brings what m knows and this node does not.
func (e *engine) compare(m channel.Member) error {
	if _, native := m.Announcement(); !native {
		if e.cfg.Tribes {
			return e.meetTribes(m)
		}
		return nil
	}
	e.mu.Lock()
	mine := e.digest
	e.mu.Unlock()
	answer, err := e.ask(m, &message{Op: opDigest, Digests: mine[:]})
	if errors.Is(err, rpc.ErrAbsent) {
		e.absent(m.ID)
		return nil
	}
	if err != nil {
		return err
	}
	e.mu.Lock()
	_, in := e.members[m.ID]
	if in {
		if !e.peers[m.ID] {
			e.review = true // it may back up something
		}
		e.peers[m.ID] = true
	}
	mine = e.digest
	e.mu.Unlock()
	if !in || len(answer.Digests) != parts {
		return nil
	}
	var differ []int
	for i := range mine {
		if mine[i] != answer.Digests[i] {
			differ = append(differ, i)
		}
	}
	after := ""
	for len(differ) > 0 && e.ctx.Err() == nil {
		list, err := e.ask(m, &message{Op: opList, Parts: differ, After: after})
		if err != nil {
			return err
		}
		e.chunks.Inc()
		e.takeListed(m, list.Records)
		if !list.Next {
			break
		}
		at := slices.Index(differ, list.Part)
		if at < 0 || at == 0 && list.After <= after {
			return errMessage // it would never end
		}
		differ, after = differ[at:], list.After
	}
	return e.ctx.Err()
}

// takeListed merges records without values, and fetches the values that are
// needed.
func (e *engine) takeListed(m channel.Member, recs []record) {
	var need []string
	var elsewhere []*record
	e.mu.Lock()
	for i := range recs {
		r := &recs[i]
		if e.merge(r) != wanted {
			continue
		}
		if !e.cfg.Lazy || r.Stamp.Primary == m.ID || slices.Contains(r.Backups, m.ID) {
			need = append(need, r.Key)
		} else {
			elsewhere = append(elsewhere, e.get(r.Key))
		}
	}
	e.mu.Unlock()
	for len(need) > 0 && e.ctx.Err() == nil {
		answer, err := e.ask(m, &message{Op: opGet, Keys: need[:min(len(need), 4096)]})
		if err != nil {
			break
		}
		e.chunks.Inc()
		got := map[string]bool{}
		e.mu.Lock()
		for i := range answer.Records {
			r := &answer.Records[i]
			got[r.Key] = true
			if r.Has {
				e.transferred.Inc()
			}
			e.merge(r)
		}
		e.mu.Unlock()
		before := len(need)
		need = slices.DeleteFunc(need, func(k string) bool { return got[k] })
		if len(need) == before {
			break // it has none of the rest
		}
	}
	for _, k := range need { // not there: from somebody else
		e.mu.Lock()
		r := e.get(k)
		e.mu.Unlock()
		elsewhere = append(elsewhere, r)
	}
	e.fetchAll(elsewhere)
}

// fetchAll fetches values that this node should have.
func (e *engine) fetchAll(recs []*record) {
	for _, r := range recs {
		e.mu.Lock()
		cur := r != nil && e.get(r.Key) == r && !r.Has && !r.Deleted
		e.mu.Unlock()
		if !cur || e.ctx.Err() != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(e.ctx, e.cfg.Timeout)
		got, err := e.fetch(ctx, r)
		cancel()
		if err == nil && got != nil {
			e.transferred.Inc()
			e.take([]record{*got})
		}
	}
}

// ask makes one exchange with one member.
func (e *engine) ask(m channel.Member, q *message) (*message, error) {
	q.Lazy = e.cfg.Lazy
	b, err := encode(q)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(e.ctx, e.cfg.Timeout)
	defer cancel()
	replies, err := e.rpc.Call(ctx, []channel.Member{m}, rpc.Bytes(b), rpc.First, channel.SendAck)
	if err != nil {
		return nil, err
	}
	a, err := decode(replies[0].Body.Bytes)
	if err != nil {
		e.refused["malformed"].Inc()
	}
	return a, err
}

// repair looks for records that need work after a change of the members, and
// does it. It reports whether there may be more.
func (e *engine) repair() bool {
	e.mu.Lock()
	if !e.review {
		e.mu.Unlock()
		return false
	}
	e.review = false
	type work struct {
		r     *record
		fresh bool // for a backup that has no value yet
	}
	var todo []work
	var fetch []*record
	for p := range e.recs {
		for _, r := range e.recs[p] {
			if r.Deleted {
				continue
			}
			backup := slices.DeleteFunc(slices.Clone(r.Backups), func(id channel.UniqueID) bool {
				return id != e.self && (e.gone(id) || !e.peers[id])
			})
			heir := r.Stamp.Primary == e.self
			if !heir && e.gone(r.Stamp.Primary) {
				switch {
				case !e.cfg.Lazy:
					id, ok := rendezvous(r.Key, append(e.candidates(), e.self))
					heir = ok && id == e.self && r.Has
				case len(backup) > 0:
					heir = backup[0] == e.self && r.Has
				default:
					e.lost.Inc()
					e.drop(r)
					continue
				}
				if heir {
					e.promotions.Inc()
				}
			}
			if !r.Has && e.holds(r) {
				fetch = append(fetch, r)
			}
			if !heir || !r.Has {
				continue
			}
			backup = slices.DeleteFunc(backup, func(id channel.UniqueID) bool { return id == e.self })
			fresh := false
			if e.cfg.Lazy && len(backup) == 0 {
				backup = e.backups(r.Key)
				fresh = len(backup) > 0
			}
			if r.Stamp.Primary == e.self && slices.Equal(backup, r.Backups) {
				continue
			}
			if !e.cfg.Lazy {
				backup = nil
			}
			next := *r
			next.Stamp.Epoch++
			next.Stamp.Primary = e.self
			next.Backups = backup
			todo = append(todo, work{&next, fresh})
		}
	}
	for _, w := range todo {
		e.put(w.r)
	}
	e.mu.Unlock()
	e.fetchAll(fetch)

	// To each member what it has to know: values to new backups.
	plain, fresh := map[channel.UniqueID][]*record{}, map[channel.UniqueID][]*record{}
	peers := e.natives()
	for _, w := range todo {
		for _, m := range peers {
			if w.fresh && slices.Contains(w.r.Backups, m.ID) {
				fresh[m.ID] = append(fresh[m.ID], w.r)
			} else {
				plain[m.ID] = append(plain[m.ID], w.r)
			}
		}
		_ = e.spreadTribes(e.ctx, w.r) // who failed is compared with again
	}
	for _, m := range peers {
		e.offerAll(m, fresh[m.ID], true)
		e.offerAll(m, plain[m.ID], false)
	}
	return true
}

// offerAll offers records to one member, in chunks.
func (e *engine) offerAll(m channel.Member, recs []*record, value bool) {
	for len(recs) > 0 && e.ctx.Err() == nil {
		n, size := 0, 0
		for n < len(recs) && (n == 0 || size < e.cfg.ChunkBytes) {
			size += 100 + len(recs[n].Key)
			if value {
				size += len(recs[n].Value)
			}
			n++
		}
		ctx, cancel := context.WithTimeout(e.ctx, e.cfg.Timeout)
		err := e.offer(ctx, []channel.Member{m}, recs[:n], value)
		cancel()
		if err != nil {
			e.later(m.ID) // the comparison brings the rest, or its loss a review
			return
		}
		recs = recs[n:]
	}
}

// serve answers other members' requests.
func (e *engine) serve(ctx context.Context, from channel.Member, b rpc.Body) (rpc.Body, error) {
	if b.Bytes == nil {
		return e.serveTribes(ctx, from, b)
	}
	q, err := decode(b.Bytes)
	if err != nil {
		e.refused["malformed"].Inc()
		return rpc.Body{}, err
	}
	if q.Lazy != e.cfg.Lazy {
		e.refused["kind"].Inc()
		return rpc.Body{}, errors.New("repmap: one of us has a lazy map of this name, the other a full one")
	}
	if q.Op == opStop {
		e.forget(from.ID)
		return rpc.Body{}, nil
	}
	a := &message{Op: q.Op, Lazy: e.cfg.Lazy}
	e.mu.Lock()
	if _, in := e.members[from.ID]; in && !e.peers[from.ID] {
		e.peers[from.ID] = true
		e.review = true
	}
	switch q.Op {
	case opPut:
		for i := range q.Records {
			r := &q.Records[i]
			switch e.merge(r) {
			case wanted:
				a.Keys = append(a.Keys, r.Key)
			case stale:
				cur := e.get(r.Key)
				a.Records = append(a.Records, outward(cur, len(cur.Value) <= e.cfg.ChunkBytes && len(a.Records) == 0))
			}
		}
	case opDigest:
		a.Digests = slices.Clone(e.digest[:])
		_, in := e.members[from.ID]
		if _, asked := e.pulls[from.ID]; in && !asked && !slices.Equal(q.Digests, a.Digests) {
			e.pulls[from.ID] = true // after those that nobody has been asked for yet
		}
	case opList:
		e.list(q, a)
	case opGet:
		size := 0
		for _, k := range q.Keys {
			r := e.get(k)
			if r == nil {
				continue
			}
			if size += 100 + len(k) + len(r.Value); size > e.cfg.ChunkBytes && len(a.Records) > 0 {
				break
			}
			a.Records = append(a.Records, outward(r, true))
		}
	}
	e.mu.Unlock()
	e.wake()
	out, err := encode(a)
	return rpc.Bytes(out), err
}

// list puts the records of parts into an answer, as far as they fit; e.mu is
// held.
func (e *engine) list(q, a *message) {
	size := 0
	for i, p := range q.Parts {
		keys := slices.Sorted(maps.Keys(e.recs[p]))
		for _, k := range keys {
			if i == 0 && k <= q.After && q.After != "" {
				continue
			}
			r := e.recs[p][k]
			if size += 100 + len(k) + 16*len(r.Backups); size > e.cfg.ChunkBytes && len(a.Records) > 0 {
				return
			}
			a.Records = append(a.Records, outward(r, false))
			a.Next, a.Part, a.After = true, p, k
		}
	}
	a.Next = false
}

// keys returns all keys that are there, sorted.
func (e *engine) keys() (keys []string) {
	e.mu.Lock()
	for p := range e.recs {
		for k, r := range e.recs[p] {
			if !r.Deleted {
				keys = append(keys, k)
			}
		}
	}
	e.mu.Unlock()
	slices.Sort(keys)
	return keys
}

// Kind says what happened to an entry.
type Kind uint8

const (
	// Set: the entry has a new value, here or elsewhere.
	Set Kind = iota + 1
	// Removed: the entry was removed, or all who had its value are gone.
	Removed
	// Moved: the entry has another primary or other backups.
	Moved
	// Missed: changes were dropped because listeners were too slow. Read what
	// matters again.
	Missed
)

// String returns the kind in one word.
func (k Kind) String() string {
	if k < Set || k > Missed {
		return "unknown"
	}
	return [...]string{"set", "removed", "moved", "missed"}[k-Set]
}

// change is one change, to be told.
type change struct {
	kind Kind
	key  string
	r    *record
}

// changeOf compares two records of one key; nil stands for none.
func changeOf(old, now *record) (c change, ok bool) {
	was, is := old != nil && !old.Deleted, now != nil && !now.Deleted
	switch {
	case was && !is:
		return change{Removed, old.Key, old}, true
	case !is:
		return c, false
	case !was || !old.Stamp.sameVersion(now.Stamp) || now.Has && !(old.Has && bytes.Equal(old.Value, now.Value)):
		return change{Set, now.Key, now}, true
	case old.Stamp != now.Stamp:
		return change{Moved, now.Key, now}, true
	}
	return c, false
}
