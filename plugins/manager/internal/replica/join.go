package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// joinSpan is how many shards a joining node asks one member for at a time.
const joinSpan = 16

// partsInFlight is how many parts are asked of one member at a time, so that it
// never waits for the next question.
const partsInFlight = 2

// join brings the state of the other members and then makes the manager ready.
func (m *Manager) join() {
	began := time.Now()
	ctx, cancel := m.ctx, context.CancelFunc(func() {})
	switch limit := m.cfg.StateTransferTimeout; {
	case limit == 0:
		m.setReady(0, "did not wait for the sessions of other members (state_transfer_timeout is 0)")
		return
	case limit > 0:
		ctx, cancel = context.WithTimeout(m.ctx, limit)
	}
	defer cancel()
	if !m.awaitMember(ctx) {
		m.setReady(0, "nobody to ask for sessions")
		return
	}
	asked, err := m.collect(ctx)
	took := time.Since(began)
	if err != nil && m.cfg.NeedStart && m.ctx.Err() == nil {
		state := fmt.Sprintf("not started: the state transfer was not complete after %v (%v), and terminate_on_start_failure is set; still trying", took.Round(time.Millisecond), err)
		m.log.Error(state)
		m.setState(state)
		asked, err = m.collect(m.ctx)
		took = time.Since(began)
	}
	switch {
	case m.ctx.Err() != nil:
	case err == nil && asked == 0:
		m.setReady(took, "nobody to ask for sessions")
	case err == nil:
		m.setReady(took, fmt.Sprintf("received %d sessions from %d members in %v", m.received.Load(), asked, took.Round(time.Millisecond)))
	default:
		state := fmt.Sprintf("the state transfer was not complete after %v (%v); going on with the %d sessions received, the rest is fetched in the background",
			took.Round(time.Millisecond), err, m.received.Load())
		m.log.Error(state)
		m.setReady(took, state)
	}
}

func (m *Manager) setReady(took time.Duration, state string) {
	m.mu.Lock()
	m.ready, m.state, m.transfer = true, state, took
	for _, p := range m.peers {
		if p.wanted && p.due.After(time.Now()) {
			continue
		}
		p.want(time.Now().Add(m.patience(m.view.Local, p.member)))
	}
	m.mu.Unlock()
	close(m.readyCh)
	m.probeAll()
	m.replan(false)
}

// probeAll makes the next turn of watch tell everybody that this node is ready.
func (m *Manager) probeAll() {
	m.mu.Lock()
	for _, p := range m.peers {
		if !p.aside {
			p.heard = p.heard.Add(-m.cfg.FaultGrace / probesPerGrace)
		}
	}
	m.mu.Unlock()
	m.probeNow()
}

// awaitMember waits for a view with a member in it.
func (m *Manager) awaitMember(ctx context.Context) bool {
	timer := time.NewTimer(m.cfg.SettleTime)
	defer timer.Stop()
	for {
		m.mu.Lock()
		n, changed := len(m.view.Members), m.changed
		m.mu.Unlock()
		if n > 0 {
			return true
		}
		select {
		case <-changed:
		case <-timer.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// transfer is what a joining node still has to ask for.
type transfer struct {
	mu   sync.Mutex
	todo []span          // for whoever has complete state
	last error           // why the last member failed
	used map[uint64]bool // members that gave something
}

func (t *transfer) take() (span, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.todo) == 0 {
		return span{}, false
	}
	s := t.todo[0]
	t.todo = t.todo[1:]
	return s, true
}

func (t *transfer) putBack(s span, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.todo = append(t.todo, s)
	t.last = err
}

// collect gets the state. If members have complete state, each range of shards
// is asked of one of them, of all at once; what one that dies has not given is
// asked of the next one. Otherwise, and if every member has sessions of its own,
// all are asked for everything: it is complete when all that run this manager
// have answered.
func (m *Manager) collect(ctx context.Context) (asked int, err error) {
	t := &transfer{used: map[uint64]bool{}}
	for from := 0; from < shardCount; from += joinSpan {
		t.todo = append(t.todo, span{from: from, to: from + joinSpan})
	}
	answered := map[channel.UniqueID]int{} // the shard to go on with
	for pause := retryMin; ; pause = min(2*pause, retryMax) {
		m.mu.Lock()
		changed := m.changed
		m.mu.Unlock()
		some, all, unknown := m.sources()
		if len(some) > 0 && !m.placed() {
			m.setState("receiving sessions from " + names(some))
			m.askSome(ctx, t)
			if len(t.todo) == 0 {
				return len(t.used), nil
			}
		} else {
			left := slices.DeleteFunc(all, func(p channel.Member) bool { return answered[p.ID] == shardCount })
			if len(left) == 0 && unknown == 0 {
				return len(answered), nil
			}
			if len(left) > 0 {
				m.setState("receiving sessions from " + names(left))
				m.askAll(ctx, left, answered, t)
				if ctx.Err() == nil && t.last == nil {
					continue
				}
			} else {
				m.setState(fmt.Sprintf("waiting for a sign of life of %d members", unknown))
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-changed:
			pause = retryMin / 2
		case <-ctx.Done():
			timer.Stop()
			if t.last == nil {
				t.last = errors.New("no member has answered")
			}
			return len(t.used), t.last
		}
		timer.Stop()
		t.last = nil
	}
}

func names(members []channel.Member) string {
	switch len(members) {
	case 1:
		return members[0].String()
	}
	return fmt.Sprintf("%d members", len(members))
}

// sources returns the members that have complete state, all that run this
// manager, and how many may do so but have not answered yet.
func (m *Manager) sources() (some, all []channel.Member, unknown int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, member := range m.view.Members {
		p := m.peers[member.ID]
		switch {
		case p == nil || p.aside:
			if p != nil && p.hello {
				unknown++
			}
		case p.hello:
			all = append(all, member)
			if p.ready {
				some = append(some, member)
			}
		case !m.stranger(p, now):
			unknown++
		}
	}
	return some, all, unknown
}

// askSome divides the shards among members with complete state; those that turn
// out to have it meanwhile help.
func (m *Manager) askSome(ctx context.Context, t *transfer) {
	ended := make(chan struct{})
	asked := map[channel.UniqueID]bool{}
	for active := 0; ; {
		m.mu.Lock()
		changed := m.changed
		m.mu.Unlock()
		some, _, _ := m.sources()
		for _, member := range some {
			if asked[member.ID] {
				continue
			}
			asked[member.ID] = true
			for range partsInFlight {
				active++
				m.wg.Go(func() {
					m.askOne(ctx, member, t)
					ended <- struct{}{}
				})
			}
		}
		if active == 0 {
			return
		}
		select {
		case <-ended:
			if active--; active == 0 {
				return
			}
		case <-changed:
		}
	}
}

// askOne asks a member for one part after the other.
func (m *Manager) askOne(ctx context.Context, member channel.Member, t *transfer) {
	for ctx.Err() == nil {
		s, ok := t.take()
		if !ok {
			return
		}
		_, err := m.exchange(ctx, member, s.from, s.to, true)
		if err != nil {
			t.putBack(s, fmt.Errorf("%s: %w", member, err))
			m.tellNext(ctx, member, err)
			return
		}
		t.mu.Lock()
		t.used[nodeOf(member)] = true
		t.mu.Unlock()
	}
}

// askAll asks all members for everything; each goes on where it stopped.
func (m *Manager) askAll(ctx context.Context, members []channel.Member, answered map[channel.UniqueID]int, t *transfer) {
	var wg sync.WaitGroup
	for _, member := range members {
		t.mu.Lock()
		from := answered[member.ID]
		t.mu.Unlock()
		wg.Go(func() {
			for ; from < shardCount && ctx.Err() == nil; from += joinSpan {
				_, err := m.exchange(ctx, member, from, from+joinSpan, true)
				t.mu.Lock()
				if err != nil {
					t.last = fmt.Errorf("%s: %w", member, err)
				} else {
					answered[member.ID] = from + joinSpan
				}
				t.mu.Unlock()
				if err != nil {
					m.tellNext(ctx, member, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func (m *Manager) tellNext(ctx context.Context, member channel.Member, err error) {
	if ctx.Err() == nil {
		m.log.Warn("a member did not give its sessions; asking others, or it again", zap.Stringer("member", member), zap.Error(err))
	}
}

func (m *Manager) setState(s string) {
	m.mu.Lock()
	m.state = s
	m.mu.Unlock()
}
