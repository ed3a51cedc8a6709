package watch

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"go.uber.org/zap"
)

// worker does the deploying. One goroutine owns it.
type worker struct {
	d    *Deployer
	host core.DeployerHost
	work *os.Root
	ctx  context.Context // ends with Stop

	files   map[string]*sighting // by name
	apps    map[string]*app      // by context path
	retired map[string]time.Time // directory to when it was retired
	// orphans are directories that a lost journal does not explain. They may be
	// in use, so they stay until everything has a successor.
	orphans    []string
	unwritten  bool // the journal is behind
	complained map[string]time.Time
}

// sighting is what is known of a file in the folder.
type sighting struct {
	print fingerprint
	since time.Time // it has looked like this since
	name  archiveName
	bad   error // why it can never be deployed
	path  bool  // its name gives a path
}

// app is one context path.
type app struct {
	path    string
	serving *staged
	staged  *staged // handed to the node with an unknown result
	// confirmed says that the node has accepted serving since this instance
	// started.
	confirmed bool
	// tried is the file of the last attempt that failed, refused that there is
	// no point in another one before it changes.
	tried     fingerprint
	refused   bool
	retryAt   time.Time
	retry     time.Duration
	err       error
	attempt   core.Bundle // of the last failure, or what was removed; for the status
	goneSince time.Time   // zero while there is an archive
	removed   bool
}

func newWorker(d *Deployer, host core.DeployerHost, work *os.Root, ctx context.Context) *worker {
	return &worker{
		d: d, host: host, work: work, ctx: ctx,
		files:      map[string]*sighting{},
		apps:       map[string]*app{},
		retired:    map[string]time.Time{},
		complained: map[string]time.Time{},
	}
}

// resume takes over what an earlier instance has written down.
func (w *worker) resume() {
	now := time.Now()
	j, err := readJournal(w.work)
	lost := err != nil
	if lost {
		w.d.log.Warn("starting without what was deployed before; everything is deployed again", zap.Error(err))
	}
	used := map[string]bool{}
	for _, r := range j.Apps {
		a := &app{path: r.Path, serving: r.Serving, staged: r.Staged}
		if !w.intact(a.serving) {
			a.serving = nil
		}
		if !w.intact(a.staged) {
			a.staged = nil
		}
		for _, s := range []*staged{a.serving, a.staged} {
			if s != nil {
				used[s.Dir] = true
			}
		}
		w.apps[r.Path] = a
	}
	for _, dir := range w.list(appsDir) {
		switch {
		case used[dir]:
		case lost:
			w.orphans = append(w.orphans, dir)
		case slices.Contains(j.Retired, dir):
			w.retired[dir] = now
		default:
			w.erase(appsDir, dir)
		}
	}
	for _, dir := range w.list(stagingDir) {
		w.erase(stagingDir, dir)
	}
	w.report()
}

// intact reports whether the unpacked files of s are all there.
func (w *worker) intact(s *staged) bool {
	if s == nil {
		return false
	}
	var c contents
	err := fs.WalkDir(os.DirFS(filepath.Join(w.d.workDir, appsDir, s.Dir)), ".", func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		c.Files++
		c.Bytes += fi.Size()
		return nil
	})
	return err == nil && c == s.Contents
}

func (w *worker) list(dir string) []string {
	entries, err := fs.ReadDir(w.work.FS(), dir)
	if err != nil {
		w.complain("list", "the work directory cannot be listed; leftovers may stay", err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func (w *worker) erase(parent, dir string) bool {
	if err := w.work.RemoveAll(filepath.Join(parent, dir)); err != nil {
		w.complain("erase", "unpacked files could not be removed; trying again", err)
		return false
	}
	return true
}

func (w *worker) complain(kind, text string, err error, fields ...zap.Field) {
	now := time.Now()
	if last, ok := w.complained[kind]; ok && now.Sub(last) < complaintInterval {
		return
	}
	w.complained[kind] = now
	w.d.log.Warn(text, append(fields, zap.Error(err))...)
}

// scan looks at the folder and does what follows from it. It returns how soon
// it should be called again.
func (w *worker) scan() time.Duration {
	now := time.Now()
	seen, whole, err := w.look(now)
	if err != nil {
		// Not to see the folder does not mean that it is empty.
		w.complain("look", "the watched folder cannot be read; what is deployed stays", err, zap.String("dir", w.d.cfg.Dir))
	} else {
		w.settle(seen, whole, now)
	}
	w.collect(now)
	if w.unwritten {
		w.write()
	}
	w.report()
	for _, s := range w.files {
		if s.bad == nil && time.Since(s.since) < w.d.cfg.Settle {
			return w.d.cfg.Settle/2 + time.Millisecond // something is settling
		}
	}
	for _, a := range w.apps {
		if !a.goneSince.IsZero() && !a.removed {
			return w.d.cfg.Settle/2 + time.Millisecond
		}
	}
	return w.d.cfg.Scan
}

// look reads the folder and returns the best archive of each context path.
// whole says that all archives were taken into account.
func (w *worker) look(now time.Time) (best map[string]*sighting, whole bool, err error) {
	dir, err := os.Open(w.d.cfg.Dir)
	if err != nil {
		return nil, false, err
	}
	defer dir.Close()
	files := map[string]*sighting{}
	whole = true
	for {
		entries, err := dir.ReadDir(256)
		for _, e := range entries {
			name, ok, nameErr := parseName(e.Name())
			if !ok {
				continue
			}
			if len(files) >= w.d.cfg.MaxArchives {
				whole = false
				w.complain("archives", "some archives in the folder are ignored", fmt.Errorf("there are more than %d (max_archives)", w.d.cfg.MaxArchives))
				continue
			}
			if s := w.sight(e, name, nameErr, now); s != nil {
				files[e.Name()] = s
			}
		}
		if err == io.EOF {
			return w.best(files), whole, nil
		}
		if err != nil {
			return nil, false, err
		}
	}
}

// sight compares a file with what was known of it.
func (w *worker) sight(e fs.DirEntry, name archiveName, nameErr error, now time.Time) *sighting {
	fi, err := e.Info()
	if err != nil {
		return nil // gone meanwhile
	}
	s := &sighting{print: fingerprint{e.Name(), fi.Size(), fi.ModTime()}, since: now, name: name, bad: nameErr, path: nameErr == nil}
	if nameErr == nil && !fi.Mode().IsRegular() {
		s.bad = fmt.Errorf("it is no ordinary file but %s", fi.Mode().Type())
	}
	old := w.files[e.Name()]
	if old != nil && old.print.equal(s.print) {
		s.since = old.since
	}
	if s.bad != nil && old == nil {
		w.d.counters.refused.Inc()
		w.d.log.Warn("a file in the watched folder is ignored", zap.String("file", e.Name()), zap.Error(s.bad))
	}
	return s
}

// best takes over files as the contents of the folder and returns the archive
// to be served for each path: that of the highest version. A file that cannot
// be deployed stands only for a path that has no other.
func (w *worker) best(files map[string]*sighting) map[string]*sighting {
	w.files = files
	best := map[string]*sighting{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		s := files[name]
		if !s.path {
			continue
		}
		old := best[s.name.path]
		if old == nil || old.bad != nil || s.bad == nil && old.name.version < s.name.version {
			best[s.name.path] = s
		}
	}
	return best
}

// settle brings every context path to what the folder says.
func (w *worker) settle(seen map[string]*sighting, whole bool, now time.Time) {
	for path, s := range seen {
		if w.apps[path] == nil && s.bad == nil {
			w.apps[path] = &app{path: path}
		}
	}
	for _, path := range slices.Sorted(maps.Keys(w.apps)) {
		if w.ctx.Err() != nil {
			return
		}
		a, s := w.apps[path], seen[path]
		if s == nil && whole {
			w.gone(a, now)
			continue
		}
		a.goneSince, a.removed = time.Time{}, false
		if !a.confirmed && !now.Before(a.retryAt) {
			w.confirm(a)
		}
		if s != nil && s.bad == nil && now.Sub(s.since) >= w.d.cfg.Settle {
			w.bring(a, s, now)
		}
	}
}

// gone takes a path out of service whose archive has disappeared for good.
func (w *worker) gone(a *app, now time.Time) {
	switch {
	case a.removed:
		return
	case a.goneSince.IsZero():
		a.goneSince = now
		return
	case now.Sub(a.goneSince) < w.d.cfg.Settle, now.Before(a.retryAt):
		return
	}
	if a.serving == nil && a.staged == nil {
		delete(w.apps, a.path)
		return
	}
	ctx, cancel := context.WithTimeout(w.ctx, w.d.cfg.ApplyTimeout)
	defer cancel()
	if err := w.host.Remove(ctx, w.d.cfg.Host, a.path); err != nil {
		w.later(a, w.bundleOf(a.path, ""), fmt.Errorf("take out of service: %w", err))
		return
	}
	w.d.log.Info("taken out of service: its archive is gone", zap.String("path", a.path))
	w.d.counters.removed.Inc()
	last := cmp.Or(a.serving, a.staged)
	w.discardLater(a.serving)
	w.discardLater(a.staged)
	*a = app{path: a.path, goneSince: a.goneSince, removed: true, attempt: last.bundle(w.d.cfg.Host, a.path, "")}
	a.attempt.Dir = ""
	w.forgetRemoved()
	w.write()
}

// forgetRemoved keeps the list of removed paths bounded.
func (w *worker) forgetRemoved() {
	removed := 0
	for _, a := range w.apps {
		if a.removed {
			removed++
		}
	}
	for path, a := range w.apps {
		if removed <= w.d.cfg.MaxArchives {
			return
		}
		if a.removed {
			delete(w.apps, path)
			removed--
		}
	}
}

// confirm hands to the node what an earlier instance has deployed: whether the
// node still serves it is unknown, because it may have been started again too.
// It knows by the digest what it serves already.
func (w *worker) confirm(a *app) {
	if a.staged != nil { // the earlier instance did not live to see the result
		err := w.hand(a, a.staged)
		switch {
		case err == nil:
			w.served(a)
			return
		case uncertain(err):
			w.later(a, a.staged.bundle(w.d.cfg.Host, a.path, ""), err)
			return
		}
		w.refuse(a, a.staged.File, w.bundleOf(a.path, a.staged.Version), err)
		w.discard(a.staged)
		a.staged = nil
		w.write()
	}
	if a.serving == nil {
		a.confirmed = true
		return
	}
	switch err := w.hand(a, a.serving); {
	case err == nil:
		a.confirmed = true
	case uncertain(err):
		w.later(a, w.bundleOf(a.path, a.serving.Version), err)
	default:
		// The node may serve it all the same: its files stay.
		a.confirmed = true
		w.refuse(a, a.serving.File, a.serving.bundle(w.d.cfg.Host, a.path, filepath.Join(w.d.workDir, appsDir)), err)
	}
}

// hand gives a version to the node.
func (w *worker) hand(a *app, s *staged) error {
	w.report() // it is "staged" meanwhile
	ctx, cancel := context.WithTimeout(w.ctx, w.d.cfg.ApplyTimeout)
	defer cancel()
	return w.host.Apply(ctx, s.bundle(w.d.cfg.Host, a.path, filepath.Join(w.d.workDir, appsDir)))
}

// served makes the staged version the serving one.
func (w *worker) served(a *app) {
	old := a.serving
	a.serving, a.staged, a.confirmed = a.staged, nil, true
	a.err, a.retry, a.retryAt = nil, 0, time.Time{}
	w.discardLater(old)
	w.d.counters.applied.Inc()
	w.d.log.Info("deployed", zap.String("file", a.serving.File.Name), zap.String("path", a.path),
		zap.String("version", a.serving.Version), zap.String("sha256", a.serving.Digest))
	w.write()
}

// bring puts the archive into service, unless it is, or has failed.
func (w *worker) bring(a *app, s *sighting, now time.Time) {
	failed := a.err != nil && a.tried.equal(s.print)
	switch {
	case failed && a.refused, now.Before(a.retryAt) && (failed || a.staged != nil):
		return
	case a.staged != nil && a.staged.File.equal(s.print):
		w.apply(a)
		return
	case a.serving != nil && a.serving.File.equal(s.print) && a.staged != nil:
		// The file was changed back while the result was unknown.
		w.discardLater(a.staged)
		a.staged, a.confirmed = nil, false
		w.confirm(a)
		return
	case a.serving != nil && a.serving.File.equal(s.print):
		a.err = nil
		return
	}
	next, err := w.stage(s)
	var bad *archiveError
	switch {
	case w.ctx.Err() != nil, errors.Is(err, errUnsettled):
		return
	case errors.As(err, &bad):
		w.refuse(a, s.print, w.bundleOf(a.path, s.name.version), err)
		return
	case err != nil:
		a.tried = s.print
		w.later(a, w.bundleOf(a.path, s.name.version), err)
		return
	}
	if a.staged == nil && a.serving != nil && a.serving.Digest == next.Digest && a.serving.Version == next.Version {
		// Touched or copied again: the same bytes.
		a.serving.File, a.err = next.File, nil
		w.discard(next)
		w.write()
		return
	}
	superseded := a.staged
	a.staged = next
	if err := w.write(); err != nil {
		a.staged, a.tried = superseded, s.print
		w.discard(next)
		w.later(a, w.bundleOf(a.path, s.name.version), err)
		return
	}
	w.discardLater(superseded)
	w.apply(a)
}

func (w *worker) bundleOf(path, version string) core.Bundle {
	return core.Bundle{Host: w.d.cfg.Host, Path: path, Version: version}
}

// apply hands the staged version to the node.
func (w *worker) apply(a *app) {
	next := a.staged
	a.tried = next.File
	err := w.hand(a, next)
	switch {
	case err == nil:
		w.served(a)
	case w.ctx.Err() != nil: // the next instance goes on
	case uncertain(err):
		w.later(a, w.bundleOf(a.path, next.Version), err)
	default:
		a.staged = nil
		w.refuse(a, next.File, w.bundleOf(a.path, next.Version), err)
		w.write()
		w.discard(next)
	}
}

// discard removes the files of a version that the node does not have; those
// that cannot be removed now are removed later.
func (w *worker) discard(s *staged) {
	if !w.erase(appsDir, s.Dir) {
		w.discardLater(s)
	}
}

// discardLater removes the files of a version after the grace time.
func (w *worker) discardLater(s *staged) {
	if s != nil {
		w.retired[s.Dir] = time.Now()
	}
}

// uncertain reports whether the node may have applied what it seems to have
// refused.
func uncertain(err error) bool {
	return channel.IsTimeout(err) || errors.Is(err, context.Canceled) || errors.Is(err, channel.ErrPluginDown) ||
		errors.Is(err, channel.ErrDisconnected) || errors.Is(err, channel.ErrClosed)
}

// refuse notes that the file is not tried again until it changes.
func (w *worker) refuse(a *app, file fingerprint, b core.Bundle, err error) {
	a.err, a.refused, a.attempt, a.tried = fmt.Errorf("%s: %w", file.Name, err), true, b, file
	w.d.counters.refused.Inc()
	w.d.log.Warn("an archive was refused; what served before goes on serving", zap.String("file", file.Name), zap.Error(err))
}

// later notes a failure that may pass.
func (w *worker) later(a *app, b core.Bundle, err error) {
	a.err, a.refused, a.attempt = err, false, b
	a.retry = min(max(minRetry, 2*a.retry), maxRetry)
	a.retryAt = time.Now().Add(a.retry)
	w.d.counters.failed.Inc()
	w.d.log.Warn("deploying failed; trying again", zap.String("path", a.path), zap.Duration("in", a.retry), zap.Error(err))
}

// collect removes directories that nobody uses any more.
func (w *worker) collect(now time.Time) {
	if len(w.orphans) > 0 && w.allServe() {
		for _, dir := range w.orphans {
			w.retired[dir] = now
		}
		w.orphans = nil
	}
	for dir, since := range w.retired {
		if now.Sub(since) >= w.d.cfg.Grace && w.erase(appsDir, dir) {
			delete(w.retired, dir)
			w.unwritten = true
		}
	}
}

func (w *worker) allServe() bool {
	for _, s := range w.files {
		if s.bad == nil && w.apps[s.name.path] == nil {
			return false
		}
	}
	for _, a := range w.apps {
		if !a.removed && (a.serving == nil || a.staged != nil || !a.confirmed) {
			return false
		}
	}
	return true
}

// write writes the journal. If it cannot, the next scan tries again.
func (w *worker) write() error {
	var j journal
	for _, path := range slices.Sorted(maps.Keys(w.apps)) {
		if a := w.apps[path]; a.serving != nil || a.staged != nil {
			j.Apps = append(j.Apps, record{path, a.serving, a.staged})
		}
	}
	j.Retired = slices.Sorted(maps.Keys(w.retired))
	j.Retired = append(j.Retired, w.orphans...)
	err := writeJournal(w.work, j)
	w.unwritten = err != nil
	if err != nil {
		w.complain("journal", "the journal could not be written; trying again", err)
	}
	return err
}

// report publishes the status.
func (w *worker) report() {
	var all []core.Deployment
	apps := filepath.Join(w.d.workDir, appsDir)
	for _, a := range w.apps {
		var dep core.Deployment
		switch {
		case a.removed:
			dep = core.Deployment{Bundle: a.attempt, State: "removed"}
		case a.serving != nil && a.confirmed && (a.err == nil || !a.tried.equal(a.serving.File)):
			dep = core.Deployment{Bundle: a.serving.bundle(w.d.cfg.Host, a.path, apps), State: "serving"}
		case a.err != nil:
			dep = core.Deployment{Bundle: a.attempt, State: "failed"}
		case a.staged != nil || a.serving != nil:
			dep = core.Deployment{Bundle: cmp.Or(a.staged, a.serving).bundle(w.d.cfg.Host, a.path, apps), State: "staged"}
		default:
			continue // settling
		}
		if a.err != nil {
			dep.Error = a.err.Error()
		}
		all = append(all, dep)
	}
	for name, s := range w.files {
		if s.bad != nil {
			all = append(all, core.Deployment{
				Bundle: core.Bundle{Host: w.d.cfg.Host, Path: s.name.path, Version: s.name.version},
				State:  "failed", Error: name + ": " + s.bad.Error(),
			})
		}
	}
	w.d.publish(all)
}

var errUnsettled = errors.New("the file has changed while it was read")

// stage copies, hashes, checks and unpacks an archive. Whatever goes wrong,
// nothing is left.
func (w *worker) stage(s *sighting) (*staged, error) {
	tmp, err := os.MkdirTemp(filepath.Join(w.d.workDir, stagingDir), "new-")
	if err != nil {
		return nil, fmt.Errorf("make a directory to unpack into: %w", err)
	}
	defer w.erase(stagingDir, filepath.Base(tmp))
	archive, digest, err := w.copyArchive(s, tmp)
	if err != nil {
		return nil, err
	}
	defer archive.Close()
	l := limits{entries: w.d.cfg.MaxEntries, file: w.d.cfg.MaxSize, total: w.d.cfg.MaxUnpacked}
	zr, err := openArchive(archive, s.print.Size, l)
	if err != nil {
		return nil, err
	}
	files := filepath.Join(tmp, "files")
	if err := os.Mkdir(files, 0o755); err != nil {
		return nil, fmt.Errorf("make a directory to unpack into: %w", err)
	}
	root, err := os.OpenRoot(files)
	if err != nil {
		return nil, fmt.Errorf("open the directory to unpack into: %w", err)
	}
	c, err := unpack(zr, root, l, w.ctx.Done())
	root.Close()
	if err != nil {
		return nil, err
	}
	dir := slug(s.name.path) + "-" + digest[:12] + "-" + strings.TrimPrefix(filepath.Base(tmp), "new-")
	if err := os.Rename(files, filepath.Join(w.d.workDir, appsDir, dir)); err != nil {
		return nil, fmt.Errorf("move the unpacked files: %w", err)
	}
	return &staged{File: s.print, Version: s.name.version, Digest: digest, Dir: dir, Contents: c}, nil
}

// slug makes a directory name from a context path, for people.
func slug(path string) string {
	if path == "" {
		return "ROOT"
	}
	s := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' {
			return r
		}
		return '_'
	}, strings.TrimPrefix(path, "/"))
	return s[:min(len(s), 40)]
}

// copyArchive copies the file into dir, so that what is checked is what is
// unpacked, and returns the copy and its digest.
func (w *worker) copyArchive(s *sighting, dir string) (_ *os.File, digest string, err error) {
	if s.print.Size > w.d.cfg.MaxSize {
		return nil, "", badArchive("it has %d bytes; %d are allowed (max_size)", s.print.Size, w.d.cfg.MaxSize)
	}
	// A pipe that has taken the file's place must not block.
	src, err := os.OpenFile(filepath.Join(w.d.cfg.Dir, s.print.Name), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", errUnsettled
	}
	if err != nil {
		return nil, "", fmt.Errorf("open the archive: %w", err)
	}
	defer src.Close()
	same := func() error {
		fi, err := src.Stat()
		switch {
		case err != nil:
			return fmt.Errorf("look at the archive: %w", err)
		case !fi.Mode().IsRegular() || !s.print.equal(fingerprint{s.print.Name, fi.Size(), fi.ModTime()}):
			return errUnsettled
		}
		return nil
	}
	if err := same(); err != nil {
		return nil, "", err
	}
	dst, err := os.OpenFile(filepath.Join(dir, "archive"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, "", fmt.Errorf("copy the archive: %w", err)
	}
	defer func() {
		if err != nil {
			dst.Close()
		}
	}()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(dst, h), stoppable{io.LimitReader(src, s.print.Size+1), w.ctx})
	if err != nil {
		return nil, "", fmt.Errorf("copy the archive: %w", err)
	}
	if err := same(); err != nil {
		return nil, "", err
	}
	if n != s.print.Size {
		return nil, "", errUnsettled
	}
	return dst, hex.EncodeToString(h.Sum(nil)), nil
}

// stoppable ends a long copy when the deployer stops.
type stoppable struct {
	r   io.Reader
	ctx context.Context
}

func (s stoppable) Read(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, errStopped
	}
	return s.r.Read(p)
}
