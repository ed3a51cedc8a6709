package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// parcel is a message for one member.
type parcel struct {
	to   channel.Member
	body []byte
}

// deliver sends the parcels at once and waits as the level says, for each member
// as long as grace allows. It returns the members that a parcel did not
// reach.
func (m *Manager) deliver(ctx context.Context, ps []parcel, level core.Level) (faults []channel.Fault) {
	if level == core.Async {
		for _, p := range ps {
			faults = append(faults, m.deliverOne(ctx, p, level)...)
		}
		return faults
	}
	if len(ps) == 1 {
		return m.deliverOne(ctx, ps[0], level)
	}
	var wg sync.WaitGroup
	results := make([][]channel.Fault, len(ps))
	for i, p := range ps {
		wg.Go(func() { results[i] = m.deliverOne(ctx, p, level) })
	}
	wg.Wait()
	for _, r := range results {
		faults = append(faults, r...)
	}
	return faults
}

func (m *Manager) deliverOne(ctx context.Context, p parcel, level core.Level) []channel.Fault {
	to := [1]channel.Member{p.to}
	if level > core.Async {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, m.grace(p.to))
		defer cancel()
	}
	switch err := m.host.Send(ctx, to[:], level.SendOptions(), p.body); {
	case err == nil:
		if level == core.Synced {
			m.heard(p.to)
		}
		return nil
	default:
		if se, ok := errors.AsType[*channel.SendError](err); ok && len(se.Faults) == 1 {
			return se.Faults
		}
		return []channel.Fault{{Member: p.to, Err: err}}
	}
}

// grace is how long an answer of a member is waited for: until nothing has
// been heard of it for FaultGrace, when the probes put it aside, and a quarter of
// that time at least.
func (m *Manager) grace(member channel.Member) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[member.ID]
	if p == nil {
		return m.cfg.FaultGrace
	}
	return max(m.cfg.FaultGrace-time.Since(p.heard), m.cfg.FaultGrace/forwardWait)
}

// note plans an exchange with members that a change did not reach.
func (m *Manager) note(faults []channel.Fault) {
	m.m.faults.Add(int64(len(faults)))
	m.mu.Lock()
	for _, f := range faults {
		if p := m.peers[f.Member.ID]; p != nil {
			p.want(latest(time.Now().Add(retryMin), p.last.Add(faultPause)))
		}
	}
	m.mu.Unlock()
	m.wake()
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// refused reports whether a failure says nothing about the member's life.
func refused(err error) bool {
	return errors.Is(err, channel.ErrNegativeAck) || errors.Is(err, channel.ErrTooLarge) ||
		errors.Is(err, channel.ErrClosed) || errors.Is(err, channel.ErrQueueFull)
}

// resolve waits until the members that a change did not reach have left or have
// been put aside, and puts those aside that do not answer by the deadline. It
// fails if a member answers and does not take the change.
func (m *Manager) resolve(ctx context.Context, faults []channel.Fault, level core.Level, deadline time.Time) error {
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	for {
		var still []channel.Member
		var refusals []channel.Fault
		m.mu.Lock()
		changed := m.changed
		for _, f := range faults {
			if p := m.peers[f.Member.ID]; p == nil || p.aside {
				continue
			}
			still = append(still, f.Member)
			if refused(f.Err) {
				refusals = append(refusals, f)
			}
		}
		m.mu.Unlock()
		if len(still) == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-timer.C:
			if len(refusals) > 0 {
				return fmt.Errorf("%s: commit at level %s: %d members do not have the change: %w", m.name, level, len(still), &channel.SendError{Faults: refusals})
			}
			m.setAside(still)
			return nil
		case <-ctx.Done():
			return fmt.Errorf("%s: commit at level %s: %w (%w)", m.name, level, ctx.Err(), &channel.SendError{Faults: faults})
		case <-m.ctx.Done():
			return errStopped
		}
	}
}
