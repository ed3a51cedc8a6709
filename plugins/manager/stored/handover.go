package stored

import (
	"context"
	"sync"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// holder is how a store is called in whereabouts.
const holder = "store"

// Where implements core.Handover: it reads the sessions from the store. There
// are no pages, because what matters is in the store or in the table of the
// node. A session that the store does not have is on its way there: Copy does
// nothing.
func (m *Manager) Where(ctx context.Context, q core.WhereQuery) (core.WhereAnswer, error) {
	a := core.WhereAnswer{Sessions: make([]core.Whereabouts, len(q.Keys))}
	slots := make(chan struct{}, max(m.cfg.Parallel, 1))
	var wg sync.WaitGroup
	for i, k := range q.Keys {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			wg.Wait()
			return a, ctx.Err()
		}
		wg.Go(func() {
			defer func() { <-slots }()
			a.Sessions[i] = m.where(ctx, k)
		})
	}
	wg.Wait()
	return a, ctx.Err()
}

func (m *Manager) where(ctx context.Context, k session.Key) core.Whereabouts {
	w := core.Whereabouts{Key: k}
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	stored, _, err := m.read(ctx, k)
	m.mu.Lock()
	if e := m.live[k].whole(); e != nil && e.End == session.Living {
		w.Content = e.Content()
	}
	m.mu.Unlock()
	switch {
	case err != nil || stored == nil:
	case stored.End != session.Living:
		w.Holders = []string{holder}
	default:
		content := stored.Content()
		if w.Content == 0 {
			w.Content = content
		}
		if content == w.Content {
			w.Holders = []string{holder}
		}
	}
	return w
}

var _ core.Handover = (*Manager)(nil)
