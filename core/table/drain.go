package table

import (
	"context"
	"errors"
	"fmt"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Drain makes the table refuse new sessions from now on, with
// session.ErrDraining. Sessions that the manager knows are served as before.
func (t *Table) Drain() { t.draining.Store(true) }

// FlushSynced commits all changes that are not committed yet at level Synced,
// and waits for everything that is on its way.
func (t *Table) FlushSynced(ctx context.Context) error {
	if t.cfg.Manager == nil {
		return nil
	}
	t.all(func(s *live) bool {
		s.mu.Lock()
		if s.dirty() {
			t.flushers[core.Synced].enqueue(s)
		}
		s.mu.Unlock()
		return ctx.Err() == nil
	})
	return t.Flush(ctx)
}

// CommitAgain commits those of the sessions that are in the table as a whole, at
// level Synced, and waits for it.
func (t *Table) CommitAgain(ctx context.Context, keys []session.Key) error {
	if t.cfg.Manager == nil {
		return nil
	}
	batches := map[*batch]bool{}
	for _, k := range keys {
		s := t.get(k)
		if s == nil {
			continue
		}
		s.mu.Lock()
		s.commitWhole()
		if s.dirty() {
			if b, ok := t.flushers[core.Synced].enqueue(s); ok {
				batches[b] = true
			}
		}
		s.mu.Unlock()
	}
	var errs []error
	for b := range batches {
		if err := b.wait(ctx); err != nil {
			errs = append(errs, fmt.Errorf("table: commit sessions again: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (t *Table) get(k session.Key) *live {
	sh := t.shard(k)
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	return sh.live[k]
}

// Content returns the content of a session (session.Record.Content), and whether
// it is living and in the table.
func (t *Table) Content(k session.Key) (uint64, bool) {
	s := t.get(k)
	if s == nil {
		return 0, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key != k || s.dropped || !s.living() {
		return 0, false
	}
	return s.rec.Content(), true
}

// Keys returns the keys of all living sessions of the table.
func (t *Table) Keys() []session.Key {
	keys := make([]session.Key, 0, t.Len())
	t.all(func(s *live) bool {
		s.mu.Lock()
		if s.living() && !s.dropped {
			keys = append(keys, s.key)
		}
		s.mu.Unlock()
		return true
	})
	return keys
}
