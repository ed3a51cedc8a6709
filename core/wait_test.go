package core_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// slow is a table whose synchronous commits take some time.
type slow struct {
	*memory
	takes time.Duration
}

type slowHandle struct {
	core.Handle
	takes time.Duration
}

func (s slow) Create(ctx context.Context, name string, o session.NewOptions) (core.Handle, error) {
	h, err := s.memory.Create(ctx, name, o)
	return slowHandle{h, s.takes}, err
}

func (h slowHandle) Commit(ctx context.Context, l core.Level) error {
	if l > core.Async {
		select {
		case <-time.After(h.takes):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return h.Handle.Commit(ctx, l)
}

// TestCommitWaits: the response waits for the commit, for a bounded time, and
// not less because the client has gone.
func TestCommitWaits(t *testing.T) {
	for name, tc := range map[string]struct {
		takes  time.Duration
		leave  bool // the client goes away during the commit
		status int
		after  time.Duration
		commit core.Level
	}{
		"in time":     {2 * time.Second, false, 200, 2 * time.Second, core.Synced},
		"too long":    {time.Hour, false, 503, 3 * time.Second, core.Async},
		"client left": {2 * time.Second, true, 200, 2 * time.Second, core.Synced},
	} {
		synctest.Test(t, func(t *testing.T) {
			table := newMemory()
			e := newEngine(t, core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{
				Handler: http.HandlerFunc(touch), Sessions: slow{table, tc.takes}, Distributable: true,
				Level: core.Synced, CommitTimeout: 3 * time.Second,
			}}}}})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tc.leave {
				time.AfterFunc(time.Second, cancel)
			}
			start := time.Now()
			w := httptest.NewRecorder()
			e.ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/", nil))
			if w.Code != tc.status || time.Since(start) != tc.after {
				t.Errorf("%s: status %d after %v, want %d after %v", name, w.Code, time.Since(start), tc.status, tc.after)
			}
			if commits, _, held := table.state(); len(commits) != 1 || commits[0] != tc.commit || held != 0 {
				t.Errorf("%s: commits %v, held %d", name, commits, held)
			}
		})
	}
}

// TestStopWaitsForRequests: as long as its context allows.
func TestStopWaitsForRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := rooted(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { time.Sleep(10 * time.Second) }))
		done := make(chan struct{})
		go func() { defer close(done); do(e, "GET", "h", "/") }()
		synctest.Wait()
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := e.Stop(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("stop while a request runs: %v", err)
		}
		start := time.Now()
		if err := e.Stop(t.Context()); err != nil || time.Since(start) != 9*time.Second {
			t.Errorf("second stop: %v after %v", err, time.Since(start))
		}
		<-done
	})
}
