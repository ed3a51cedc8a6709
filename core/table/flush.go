package table

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

const (
	// maxInFlight is how many batches of one level are being committed at once.
	// With one, twice as many changes gather in the next: on two cores that is a
	// quarter more synchronous requests per second than with two.
	maxInFlight = 1
	// batchSessions and batchBytes end a batch and a call of Manager.Commit.
	batchSessions = 1024
	batchBytes    = 256 << 10
	// retryMin and retryMax bound the pause after a failed asynchronous commit.
	retryMin = 100 * time.Millisecond
	retryMax = 5 * time.Second
)

// flusher commits at one level. While its workers are busy, sessions gather in
// the open batch: the busier, the bigger the batches. It holds pointers to
// sessions, not changes, so it is bounded by the table.
type flusher struct {
	t     *Table
	level core.Level
	wake  chan struct{}
	quit  chan struct{}

	mu     sync.Mutex
	open   *batch   // may be empty
	full   []*batch // older ones
	queued int      // sessions queued or in flight
	idle   chan struct{}
	closed bool
	fails  int // in a row
}

// batch is a group of sessions whose changes are committed together.
type batch struct {
	level    core.Level
	sessions []*live
	done     chan struct{}
	err      error // valid after done
}

func newBatch(level core.Level) *batch { return &batch{level: level, done: make(chan struct{})} }

func (b *batch) wait(ctx context.Context) error {
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func newFlusher(t *Table, level core.Level) *flusher {
	return &flusher{
		t: t, level: level, open: newBatch(level),
		wake: make(chan struct{}, maxInFlight), quit: make(chan struct{}), idle: make(chan struct{}),
	}
}

// enqueue puts a session with pending changes into the open batch, unless it is
// in one already, and returns its batch; false after close. s.mu is held.
func (f *flusher) enqueue(s *live) (*batch, bool) {
	busy := s.use()
	if b := busy.queued[f.level]; b != nil {
		return b, true
	}
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil, false
	}
	if len(f.open.sessions) == batchSessions {
		f.full = append(f.full, f.open)
		f.open = newBatch(f.level)
	}
	b := f.open
	b.sessions = append(b.sessions, s)
	f.queued++
	f.mu.Unlock()
	busy.queued[f.level] = b
	select {
	case f.wake <- struct{}{}:
	default:
	}
	return b, true
}

// next takes the oldest batch, or nil.
func (f *flusher) next() *batch {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.full) > 0 {
		b := f.full[0]
		f.full = f.full[1:]
		return b
	}
	b := f.open
	if len(b.sessions) == 0 {
		return nil
	}
	f.open = newBatch(f.level)
	return b
}

// work is one of the flusher's goroutines.
func (f *flusher) work() {
	var buf []byte
	for {
		b := f.next()
		if b == nil {
			select {
			case <-f.wake:
				// Those that are about to enqueue come first, and go with this batch.
				runtime.Gosched()
				continue
			case <-f.quit:
				return
			}
		}
		buf = f.run(b, buf[:0])
		if cap(buf) > 4*batchBytes {
			buf = nil // a large session came by
		}
		if b.err != nil && f.level == core.Async && !f.pause() {
			return
		}
	}
}

// pause waits after a failure; false when the flusher is closed.
func (f *flusher) pause() bool {
	f.mu.Lock()
	d := min(retryMin<<min(f.fails, 16), retryMax)
	f.mu.Unlock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-f.quit:
		return false
	}
}

// carried is what a batch has taken of a session.
type carried struct {
	s     *live
	main  *session.Record
	extra []*session.Record
	ok    bool
}

// run commits a batch, in several calls if it is large, and tells those who
// wait. It returns buf for the next one.
func (f *flusher) run(b *batch, buf []byte) []byte {
	items := make([]carried, 0, len(b.sessions))
	var errs []error
	records, first := 0, 0
	commit := func() {
		if len(buf) == 0 {
			return
		}
		err := f.commit(buf, records)
		if err != nil {
			errs = append(errs, err)
		}
		for i := first; i < len(items); i++ {
			items[i].ok = err == nil
		}
		buf, records, first = buf[:0], 0, len(items)
	}
	for _, s := range b.sessions {
		it := f.take(b, s)
		if it.main == nil && it.extra == nil {
			continue
		}
		items = append(items, it)
		for _, r := range it.extra {
			buf = session.AppendBatch(buf, r)
		}
		records += len(it.extra)
		if it.main != nil {
			buf = session.AppendBatch(buf, it.main)
			records++
		}
		if len(buf) >= batchBytes {
			commit()
		}
	}
	commit()
	b.err = errors.Join(errs...)
	f.finish(b, items)
	return buf
}

func (f *flusher) take(b *batch, s *live) carried {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queued[f.level] = nil
	for _, higher := range s.queued[f.level+1:] {
		if higher != nil {
			return carried{} // somebody waits for more than we can promise
		}
	}
	main, extra := s.take(b)
	s.rest()
	return carried{s: s, main: main, extra: extra}
}

func (f *flusher) commit(buf []byte, records int) error {
	ctx, cancel := context.WithTimeout(f.t.life, f.t.cfg.CommitTimeout)
	defer cancel()
	err := f.t.cfg.Manager.Commit(ctx, buf, f.level)
	f.mu.Lock()
	failures := f.fails
	if err == nil {
		f.fails = 0
	} else {
		f.fails++
	}
	f.mu.Unlock()
	if err != nil {
		f.t.m.retries.Inc()
		if failures == 0 { // once per outage
			f.t.log.Warn("session changes could not be committed; they are kept and sent again",
				zap.Stringer("level", f.level), zap.Int("records", records), zap.Error(err))
		}
		return err
	}
	f.t.m.batches.Inc()
	f.t.m.records.Add(int64(records))
	return nil
}

// finish tells the sessions and those who wait how the batch ended.
func (f *flusher) finish(b *batch, items []carried) {
	for _, it := range items {
		s := it.s
		s.mu.Lock()
		s.inflight = slices.DeleteFunc(s.inflight, func(o *batch) bool { return o == b })
		if !it.ok {
			s.giveBack(it.main, it.extra)
			f.t.flushers[core.Async].enqueue(s)
		}
		s.rest()
		s.mu.Unlock()
	}
	close(b.done)
	f.mu.Lock()
	f.queued -= len(b.sessions)
	var idle chan struct{}
	if f.queued == 0 {
		idle, f.idle = f.idle, make(chan struct{})
	}
	f.mu.Unlock()
	if idle != nil {
		close(idle)
	}
}

// load returns how many sessions are queued or in flight.
func (f *flusher) load() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.queued
}

// flush waits until the flusher has nothing to do.
func (f *flusher) flush(ctx context.Context) error {
	for {
		f.mu.Lock()
		n, idle := f.queued, f.idle
		f.mu.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return fmt.Errorf("table: changes of %d sessions are not committed: %w", n, ctx.Err())
		}
	}
}

// close ends the workers, and those who wait for a batch that nobody will take.
func (f *flusher) close() {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return
	}
	f.closed = true
	left := append(f.full, f.open)
	f.full, f.open = nil, newBatch(f.level)
	f.mu.Unlock()
	close(f.quit)
	for _, b := range left {
		b.err = ErrStopped
		close(b.done)
	}
}
