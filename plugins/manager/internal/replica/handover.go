package replica

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// contentEnded stands for the content of a session that the sender knows to have
// ended: there is nothing left to hand over.
const contentEnded = 1

// proof is a question to another member whether it has sessions.
type proof struct {
	from   channel.UniqueID
	answer chan map[uint64]uint64 // key digest → content; capacity 1
}

// candidate is a session whose whereabouts are asked for.
type candidate struct {
	core.Whereabouts
	digest uint64
	ask    []uint64 // placed: the nodes that should have it
}

// Where implements core.Handover. A page is a shard of the store.
func (m *Manager) Where(ctx context.Context, q core.WhereQuery) (core.WhereAnswer, error) {
	a := core.WhereAnswer{Pages: shardCount, Sessions: []core.Whereabouts{}}
	if _, _, err := m.running(); err != nil {
		return a, err
	}
	g := m.group.Load().without(q.Going)
	list := m.candidates(q)
	for part := range slices.Chunk(list, maxFetch) {
		m.prove(ctx, g, part)
		if q.Copy {
			m.copyUnproven(ctx, g, part)
		}
		for _, c := range part {
			a.Sessions = append(a.Sessions, c.Whereabouts)
		}
	}
	return a, ctx.Err()
}

// candidates lists the living sessions that a query is about.
func (m *Manager) candidates(q core.WhereQuery) (list []candidate) {
	add := func(k session.Key, p *replica) {
		c := candidate{Whereabouts: core.Whereabouts{Key: k, Content: p.Content()}, digest: k.Digest()}
		if p.place != nil {
			for _, h := range p.place.where {
				c.ask = append(c.ask, h.node)
			}
		}
		list = append(list, c)
	}
	if len(q.Keys) == 0 {
		if q.Page < 0 || q.Page >= shardCount {
			return nil
		}
		m.store.each(q.Page, time.Now().UnixMilli(), func(k session.Key, p *replica, _ tomb) {
			if p != nil && p.Whole() {
				add(k, p)
			}
		})
		return list
	}
	for _, k := range q.Keys {
		sh := m.store.shard(k)
		sh.mu.Lock()
		p := sh.replicas[k]
		_, over := sh.tombs[k]
		switch {
		case p != nil && p.Whole():
			add(k, p)
		case over: // the host is just about to hear of it
			list = append(list, candidate{Whereabouts: core.Whereabouts{Key: k, Content: contentEnded}, digest: k.Digest()})
		default:
			list = append(list, candidate{Whereabouts: core.Whereabouts{Key: k}, digest: k.Digest()})
		}
		sh.mu.Unlock()
	}
	return list
}

// without is the group without some members.
func (g *group) without(going []channel.UniqueID) *group {
	if len(going) == 0 {
		return g
	}
	c := *g
	gone := map[uint64]bool{}
	c.members = slices.DeleteFunc(slices.Clone(g.members), func(m channel.Member) bool {
		gone[nodeOf(m)] = slices.Contains(going, m.ID)
		return gone[nodeOf(m)]
	})
	c.ranked = slices.DeleteFunc(slices.Clone(g.ranked), func(r rankedNode) bool { return gone[r.node] })
	return &c
}

// prove asks those members of g that should have the sessions, all at once, and
// notes those that have them as holders.
func (m *Manager) prove(ctx context.Context, g *group, list []candidate) {
	questions := make([][]int, len(g.members)) // indexes of list
	for j, member := range g.members {
		for i := range list {
			c := &list[i]
			if c.Content != 0 && len(c.Holders) == 0 && (!m.placed() || slices.Contains(c.ask, nodeOf(member))) {
				questions[j] = append(questions[j], i)
			}
		}
	}
	var mu sync.Mutex // guards Holders
	var wg sync.WaitGroup
	for j, member := range g.members {
		asked := questions[j]
		if len(asked) == 0 {
			continue
		}
		wg.Go(func() {
			theirs, err := m.askProof(ctx, member, list, asked)
			if err != nil {
				m.log.Debug("a member did not say which sessions it has", zap.Stringer("member", member), zap.Error(err))
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, i := range asked {
				if c, ok := theirs[list[i].digest]; ok && (c == list[i].Content || c == contentEnded) {
					list[i].Holders = append(list[i].Holders, member.Name())
				}
			}
		})
	}
	wg.Wait()
}

// askProof asks one member. list is only read.
func (m *Manager) askProof(ctx context.Context, member channel.Member, list []candidate, asked []int) (map[uint64]uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.FetchTimeout)
	defer cancel()
	id := rand.Uint64()
	p := &proof{from: member.ID, answer: make(chan map[uint64]uint64, 1)}
	m.mu.Lock()
	m.proofs[id] = p
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.proofs, id)
		m.mu.Unlock()
	}()
	body := appendHeader(nil, kindProve, id)
	for _, i := range asked {
		body = session.AppendBatch(body, &session.Record{Key: list[i].Key})
	}
	if err := m.sendTo(ctx, member, channel.SendSyncAck, body); err != nil {
		return nil, err
	}
	select {
	case theirs := <-p.answer:
		return theirs, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-m.ctx.Done():
		return nil, errStopped
	}
}

// copyUnproven sends the sessions that nobody has to those of g that should have
// them, and asks again.
func (m *Manager) copyUnproven(ctx context.Context, g *group, list []candidate) {
	targets := map[uint64][]session.Key{}
	for i := range list {
		c := &list[i]
		if c.Content == 0 || c.Content == contentEnded || len(c.Holders) > 0 {
			continue
		}
		if !m.placed() {
			for _, member := range g.members {
				targets[nodeOf(member)] = append(targets[nodeOf(member)], c.Key)
			}
			continue
		}
		var few [maxCopies + 1]uint64
		c.ask = append(c.ask[:0], g.copies(c.digest, g.self, m.cfg.Copies, few[:0])...)
		for _, node := range c.ask {
			targets[node] = append(targets[node], c.Key)
		}
	}
	if len(targets) == 0 {
		return
	}
	var wg sync.WaitGroup
	for node, keys := range targets {
		to, ok := g.reach(node)
		if !ok || node == g.self {
			continue
		}
		wg.Go(func() {
			w := m.newWindow(ctx, to)
			w.records(keys, kindRecords, 0)
			if err := w.end(); err != nil {
				m.log.Debug("could not copy sessions to a member", zap.Stringer("member", to), zap.Error(err))
				m.forgetCopies(node, keys)
			}
		})
	}
	wg.Wait()
	m.prove(ctx, g, list)
}

// gotProve answers which of the sessions are here.
func (m *Manager) gotProve(from channel.Member, id uint64, b []byte) error {
	var keys []session.Key
	err := session.DecodeBatch(b, func(r *session.Record) error {
		if len(keys) == maxFetch {
			return fmt.Errorf("%w: more than %d keys", errMalformed, maxFetch)
		}
		keys = append(keys, r.Key)
		return nil
	})
	if err != nil {
		return fmt.Errorf("%w: %w", errMalformed, err)
	}
	return m.enqueueTo(m.bulk, func() {
		body := appendHeader(make([]byte, 0, 16+pairSize*len(keys)), kindProof, id)
		for _, k := range keys {
			sh := m.store.shard(k)
			sh.mu.Lock()
			p := sh.replicas[k]
			_, over := sh.tombs[k]
			switch {
			case over:
				body = appendPair(body, k.Digest(), contentEnded)
			case p != nil && p.Whole():
				body = appendPair(body, k.Digest(), p.Content())
			}
			sh.mu.Unlock()
		}
		m.reply(from, body)
	})
}

// gotProof takes such an answer. Only that of the member that was asked counts.
func (m *Manager) gotProof(from channel.Member, id uint64, b []byte) error {
	if len(b)%pairSize != 0 || len(b) > maxFetch*pairSize {
		return fmt.Errorf("%w: a proof of %d bytes", errMalformed, len(b))
	}
	m.mu.Lock()
	p := m.proofs[id]
	m.mu.Unlock()
	if p == nil || p.from != from.ID {
		return nil // too late
	}
	select {
	case p.answer <- parsePairs(b):
	default:
	}
	return nil
}

var _ core.Handover = (*Manager)(nil)
