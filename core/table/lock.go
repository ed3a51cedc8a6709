package table

import (
	"context"
	"fmt"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// skipVersions is more than one request changes in a session.
	skipVersions = 1 << 16
	// refreshPause is between two looks at the manager for a newer state.
	refreshPause = 5 * time.Millisecond
)

// State implements core.Versioned.
func (h *handle) State() core.SessionState {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if !h.s.living() {
		return core.SessionState{Versions: h.s.end.Versions()}
	}
	return core.SessionState{Counter: h.s.rec.Counter(), Versions: h.s.rec.Versions()}
}

// Refresh implements core.Versioned.
func (h *handle) Refresh(ctx context.Context, newest core.SessionState) error {
	if h.t.cfg.Manager == nil {
		return nil
	}
	for pause := refreshPause; ; pause = min(2*pause, 20*refreshPause) {
		key := h.Key()
		rec, err := h.t.cfg.Manager.Load(ctx, key)
		if err != nil {
			return fmt.Errorf("table: load session %s: %w", session.Prefix(key.ID), err)
		}
		if rec != nil && rec.Key == key {
			h.t.update(rec)
		}
		// A counter that is high enough does not mean that nothing is missing:
		// a member that did not answer for a while gets the changes that it
		// missed after later ones.
		now := h.State()
		if !h.Valid() || newest == (core.SessionState{}) || now == newest || now.Counter > newest.Counter {
			return nil
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("table: session %s has version %d here, %d elsewhere: %w", session.Prefix(key.ID), now.Counter, newest.Counter, ctx.Err())
		}
	}
}

// Skip implements core.Versioned.
func (h *handle) Skip(holders uint64) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	h.s.counter += min(holders, 1<<20) * skipVersions
}
