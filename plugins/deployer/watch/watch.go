package watch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"go.uber.org/zap"
)

const (
	// stagingDir and appsDir are in the work directory: what is being unpacked,
	// and what has been.
	stagingDir = "staging"
	appsDir    = "apps"
	// minRetry and maxRetry bound the pause after a failure that may pass.
	minRetry, maxRetry = 2 * time.Second, 5 * time.Minute
	// complaintInterval is the least time between two log lines of one kind.
	complaintInterval = time.Minute
	// burst is how long to wait for further reports of changes before looking.
	burst = 100 * time.Millisecond
)

var errStopped = errors.New("the deployer is stopping")

// Deployer implements core.Deployer.
type Deployer struct {
	cfg      Config
	log      *zap.Logger
	workDir  string
	counters counters
	// notify makes a stream of hints that the folder has changed; replaced in
	// tests.
	notify func(dir string) (hints <-chan struct{}, stop func(), err error)

	mu      sync.Mutex // guards what follows; never held while blocking
	began   bool
	stopped bool
	cancel  context.CancelFunc // of ctx, which ends with Stop
	loop    sync.WaitGroup     // run

	status atomic.Pointer[[]core.Deployment]
}

type counters struct {
	applied, removed, failed, refused *channel.Counter
}

// New returns a deployer that has not started.
func New(c Config, s channel.Settings) (*Deployer, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	if s.WorkDir == "" {
		return nil, errors.New("watch: it needs a work directory to unpack into; the node has given it none")
	}
	work, err := filepath.Abs(s.WorkDir)
	if err != nil {
		return nil, fmt.Errorf("watch: work directory: %w", err)
	}
	log := s.Logger
	if log == nil {
		log = zap.NewNop()
	}
	return &Deployer{
		cfg:     c,
		log:     log,
		workDir: work,
		notify:  watchFolder,
		counters: counters{
			applied: s.Metrics.Counter("deployer_applied_total", "Versions that the node has taken into service."),
			removed: s.Metrics.Counter("deployer_removed_total", "Contexts taken out of service because their archive has gone."),
			failed:  s.Metrics.Counter("deployer_failed_total", "Attempts to deploy that failed for another reason than the archive."),
			refused: s.Metrics.Counter("deployer_refused_total", "Archives that were refused."),
		},
	}, nil
}

// Start reads what an earlier instance has written down and begins to watch.
func (d *Deployer) Start(ctx context.Context, host core.DeployerHost) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("watch: start: %w", err)
	}
	d.mu.Lock()
	again := d.began || d.stopped
	d.began = true
	d.mu.Unlock()
	if again {
		return errors.New("watch: start: it was started or stopped before; make a new one")
	}
	if fi, err := os.Stat(d.cfg.Dir); err == nil && !fi.IsDir() {
		return fmt.Errorf("watch: start: %s is not a folder", d.cfg.Dir)
	}
	w, err := openWork(d.workDir)
	if err != nil {
		return err
	}
	run, cancel := context.WithCancel(context.Background())
	worker := newWorker(d, host, w, run)
	worker.resume()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		cancel()
		w.Close()
		return fmt.Errorf("watch: start: %w", channel.ErrClosed)
	}
	d.cancel = cancel
	d.loop.Go(func() {
		defer w.Close()
		d.run(run, worker)
	})
	return nil
}

// openWork prepares the work directory.
func openWork(dir string) (*os.Root, error) {
	for _, sub := range []string{stagingDir, appsDir} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("watch: prepare the work directory: %w", err)
		}
	}
	w, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("watch: open the work directory: %w", err)
	}
	return w, nil
}

// Status implements core.Deployer.
func (d *Deployer) Status(context.Context) ([]core.Deployment, error) {
	if p := d.status.Load(); p != nil {
		return slices.Clone(*p), nil
	}
	return nil, nil
}

// Stop ends watching. A version that is being started may or may not serve; the
// next instance starts it again.
func (d *Deployer) Stop(ctx context.Context) error {
	d.mu.Lock()
	d.stopped = true
	cancel := d.cancel
	d.mu.Unlock()
	if cancel == nil {
		return nil
	}
	cancel()
	done := make(chan struct{})
	go func() { // ends with run
		d.loop.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("watch: stop: %w", ctx.Err())
	}
}

// run looks at the folder again and again. It is the only goroutine that calls
// the node.
func (d *Deployer) run(ctx context.Context, w *worker) {
	hints, stop, err := d.notify(d.cfg.Dir)
	if err != nil {
		d.log.Info("changes of the folder are found by looking only", zap.String("dir", d.cfg.Dir), zap.Error(err))
	} else {
		defer stop()
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	hinted := false
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-hints:
			if !ok {
				hints = nil
				continue
			}
			if !hinted { // a file that is being written gives hints all the time
				hinted = true
				timer.Reset(burst)
			}
			continue
		case <-timer.C:
		}
		hinted = false
		next := w.scan()
		timer.Reset(min(next, d.cfg.Scan))
	}
}

// watchFolder asks the operating system to report changes.
func watchFolder(dir string) (<-chan struct{}, func(), error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, nil, err
	}
	if err := w.Add(dir); err != nil {
		w.Close()
		return nil, nil, err
	}
	hints := make(chan struct{}, 1)
	var work sync.WaitGroup
	work.Go(func() {
		defer close(hints)
		for {
			select {
			case _, ok := <-w.Events:
				if !ok {
					return
				}
			case _, ok := <-w.Errors: // reports were lost: look
				if !ok {
					return
				}
			}
			select {
			case hints <- struct{}{}:
			default: // one is waiting
			}
		}
	})
	return hints, func() {
		w.Close()
		work.Wait()
	}, nil
}

// publish replaces what Status reports.
func (d *Deployer) publish(all []core.Deployment) {
	slices.SortFunc(all, func(a, b core.Deployment) int { return strings.Compare(a.Path, b.Path) })
	d.status.Store(&all)
}
