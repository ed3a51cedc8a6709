package accesslog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"go.uber.org/zap"
)

// sink collects lines and writes them from one goroutine.
type sink struct {
	name             string
	flush            time.Duration
	limit            int
	logger           *zap.Logger
	dropped, failed  *channel.Counter
	wake, quit, done chan struct{}
	reopen           chan struct{}

	mu      sync.Mutex
	lines   []byte // guarded by mu
	running bool   // guarded by mu
	stopped bool   // guarded by mu

	// Only for the writing goroutine, and before and after it.
	file    *os.File
	own     bool // file is not a standard stream
	failing bool
}

func newSink(c Config, s channel.Settings) *sink {
	return &sink{
		name: c.File, flush: c.Flush, limit: c.Buffer, logger: s.Logger,
		dropped: s.Metrics.Counter("accesslog_dropped_total", "Lines dropped because the buffer was full."),
		failed:  s.Metrics.Counter("accesslog_write_errors_total", "Writes of the access log that failed."),
		wake:    make(chan struct{}, 1), reopen: make(chan struct{}, 1),
		quit: make(chan struct{}), done: make(chan struct{}),
	}
}

// open opens the file, or takes a standard stream.
func (s *sink) open() (err error) {
	switch s.name {
	case "stderr":
		s.file = os.Stderr
	case "stdout":
		s.file = os.Stdout
	default:
		if s.file, err = os.OpenFile(s.name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640); err != nil {
			return fmt.Errorf("accesslog: open the log: %w: create the folder %s and let this user write to it", err, filepath.Dir(s.name))
		}
		s.own = true
	}
	return nil
}

func (s *sink) start() error {
	s.mu.Lock()
	bad := s.running || s.stopped
	s.mu.Unlock()
	if bad {
		return errors.New("accesslog: the valve can be started once")
	}
	if err := s.open(); err != nil {
		return err
	}
	s.mu.Lock()
	s.running = true
	s.mu.Unlock()
	go s.run() // ends when stop closes quit; stop waits for it
	return nil
}

func (s *sink) stop(ctx context.Context) error {
	s.mu.Lock()
	first := s.running && !s.stopped
	s.stopped = true
	s.mu.Unlock()
	if first {
		close(s.quit)
	} else if !s.isRunning() {
		return nil
	}
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("accesslog: the last lines could not be written in time: %w", context.Cause(ctx))
	}
}

func (s *sink) isRunning() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.running
}

// add takes a line. It never waits for the disk.
func (s *sink) add(line []byte) {
	s.mu.Lock()
	if len(s.lines)+len(line) > s.limit {
		s.mu.Unlock()
		s.dropped.Inc()
		s.wakeUp()
		return
	}
	s.lines = append(s.lines, line...)
	half := len(s.lines) >= s.limit/2
	s.mu.Unlock()
	if half {
		s.wakeUp()
	}
}

func (s *sink) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run writes until quit is closed.
func (s *sink) run() {
	defer close(s.done)
	tick := time.NewTicker(s.flush)
	defer tick.Stop()
	var spare []byte
	for {
		ended := false
		select {
		case <-tick.C:
			s.followRotation()
		case <-s.reopen:
			s.openAgain()
		case <-s.wake:
		case <-s.quit:
			ended = true
		}
		s.mu.Lock()
		lines := s.lines
		s.lines = spare[:0]
		s.mu.Unlock()
		s.write(lines)
		spare = lines
		if ended {
			if s.own {
				_ = s.file.Close()
			}
			return
		}
	}
}

// write writes lines; what cannot be written is lost and counted. It says so
// once per failure, not once per line.
func (s *sink) write(lines []byte) {
	if len(lines) == 0 {
		return
	}
	_, err := s.file.Write(lines)
	if err != nil {
		s.failed.Inc()
		if !s.failing {
			s.logger.Error("access log cannot be written; lines are lost until it can", zap.String("file", s.name), zap.Error(err))
		}
	} else if s.failing {
		s.logger.Info("access log can be written again", zap.String("file", s.name))
	}
	s.failing = err != nil
}

// followRotation opens the file anew if it has been moved or deleted.
func (s *sink) followRotation() {
	if !s.own {
		return
	}
	mine, err := s.file.Stat()
	if err != nil {
		return
	}
	if now, err := os.Stat(s.name); err == nil && os.SameFile(mine, now) {
		return
	}
	s.openAgain()
}

// openAgain opens the file of that name and closes the one used so far, which
// stays in use if that fails.
func (s *sink) openAgain() {
	if !s.own {
		return
	}
	old := s.file
	if err := s.open(); err != nil {
		s.file = old
		s.failed.Inc()
		if !s.failing {
			s.logger.Error("access log cannot be opened again; the old file is used on", zap.Error(err))
		}
		s.failing = true
		return
	}
	_ = old.Close()
}

// Reopen opens the file anew, after it has been rotated, without waiting for
// the flush interval. It returns at once.
func (v *Valve) Reopen() {
	select {
	case v.sink.reopen <- struct{}{}:
	default:
	}
}
