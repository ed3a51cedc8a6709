package watch

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// war returns an archive of the given names and contents.
func war(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		f, err := w.Create(files[i])
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(f, files[i+1])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// node stands for the node: it serves what it is given, as the contract says.
type node struct {
	t      *testing.T
	mu     sync.Mutex
	serves map[string]core.Bundle
	calls  []string
	// answer decides on Apply; nil accepts.
	answer func(ctx context.Context, b core.Bundle) error
}

func newNode(t *testing.T) *node { return &node{t: t, serves: map[string]core.Bundle{}} }

func (n *node) Apply(ctx context.Context, b core.Bundle) error {
	n.mu.Lock()
	answer := n.answer
	n.calls = append(n.calls, "apply "+b.Path+" "+b.Version)
	n.mu.Unlock()
	if answer != nil {
		if err := answer(ctx, b); err != nil {
			return err
		}
	}
	if _, err := os.Stat(b.Dir); err != nil {
		n.t.Errorf("apply %s: %v", b.Path, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.serves[b.Path] = b
	return nil
}

func (n *node) Remove(_ context.Context, host, path string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls = append(n.calls, "remove "+path)
	delete(n.serves, path)
	return nil
}

// check fails the test if something that is served has lost its files.
func (n *node) check() {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	for path, b := range n.serves {
		if _, err := os.Stat(filepath.Join(b.Dir, "index.html")); err != nil {
			n.t.Errorf("%q is served without files: %v", path, err)
		}
	}
}

func (n *node) read(path string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, ok := n.serves[path]
	if !ok {
		return "(none)"
	}
	data, err := os.ReadFile(filepath.Join(b.Dir, "index.html"))
	if err != nil {
		n.t.Error(err)
	}
	return string(data)
}

func (n *node) bundle(path string) core.Bundle {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.serves[path]
}

func (n *node) take() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := n.calls
	n.calls = nil
	return out
}

func (n *node) set(answer func(ctx context.Context, b core.Bundle) error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.answer = answer
}

// bench is a deployer with its folders, in virtual time.
type bench struct {
	t       *testing.T
	dir     string
	work    string
	node    *node
	d       *Deployer
	metrics *channel.Metrics
	cfg     Config
}

func run(t *testing.T, f func(t *testing.T, b *bench)) {
	dir, work := t.TempDir(), t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		b := &bench{t: t, dir: dir, work: work, node: newNode(t), cfg: Default()}
		b.cfg.Dir = dir
		b.start()
		f(t, b)
		b.stop()
		b.node.check()
		if left := b.list(stagingDir); len(left) > 0 {
			t.Errorf("left in staging: %q", left)
		}
	})
}

func (b *bench) start() {
	b.t.Helper()
	b.metrics = channel.NewMetrics()
	d, err := New(b.cfg, channel.Settings{WorkDir: b.work, Metrics: b.metrics})
	if err != nil {
		b.t.Fatal(err)
	}
	d.notify = func(string) (<-chan struct{}, func(), error) { return nil, nil, errors.ErrUnsupported }
	if err := d.Start(b.t.Context(), b.node); err != nil {
		b.t.Fatal(err)
	}
	b.d = d
}

func (b *bench) stop() {
	b.t.Helper()
	if err := b.d.Stop(context.Background()); err != nil {
		b.t.Error(err)
	}
}

func (b *bench) put(name string, data []byte) {
	b.t.Helper()
	// As a careful operator does: written aside, then renamed.
	tmp := filepath.Join(b.dir, "."+name)
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Chtimes(tmp, time.Now(), time.Now()); err != nil { // virtual: differs each time
		b.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(b.dir, name)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) remove(name string) {
	b.t.Helper()
	if err := os.Remove(filepath.Join(b.dir, name)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) list(dir string) []string {
	entries, err := os.ReadDir(filepath.Join(b.work, dir))
	if err != nil {
		b.t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func (b *bench) status() string {
	all, err := b.d.Status(b.t.Context())
	if err != nil {
		b.t.Error(err)
	}
	var out []string
	for _, s := range all {
		line := s.Path + " " + s.State
		if s.Error != "" {
			line += " !"
		}
		out = append(out, line)
	}
	return strings.Join(out, ", ")
}

// soon is long enough for a scan and a settled file.
const soon = 4 * time.Second

func (b *bench) want(got, want any) {
	b.t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		b.t.Errorf("got %v, want %v", got, want)
	}
}

func TestDeployReplaceRemove(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.put("shop.war", war(t, "index.html", "one", "WEB-INF/lib/a.txt", "x"))
		time.Sleep(soon)
		b.want(b.node.read("/shop"), "one")
		b.want(b.status(), "/shop serving")
		first := b.node.bundle("/shop")
		if len(first.Digest) != 64 || !strings.HasPrefix(first.Digest, first.Version) || !filepath.IsAbs(first.Dir) {
			t.Errorf("bundle %+v", first)
		}
		b.put("shop.war", war(t, "index.html", "two"))
		time.Sleep(soon)
		b.want(b.node.read("/shop"), "two")
		if _, err := os.Stat(first.Dir); err != nil {
			t.Errorf("the predecessor's files went at once: %v", err)
		}
		time.Sleep(b.cfg.Grace + b.cfg.Scan)
		if _, err := os.Stat(first.Dir); err == nil {
			t.Error("the predecessor's files are still there")
		}
		b.node.take()
		b.remove("shop.war")
		time.Sleep(soon)
		b.want(b.node.take(), []string{"remove /shop"})
		b.want(b.status(), "/shop removed")
		time.Sleep(b.cfg.Grace + b.cfg.Scan)
		b.want(b.list(appsDir), []string{})
	})
}

func TestNames(t *testing.T) {
	for file, want := range map[string]string{
		"shop.war": "/shop ", "shop.zip": "/shop ", "SHOP.WAR": "/SHOP ", "ROOT.war": " ", "ROOT##7.war": " 7",
		"a#b.war": "/a/b ", "a#b#c##2.1.war": "/a/b/c 2.1", "my app.war": "/my app ", "größe.war": "/größe ",
		".shop.war": "-", "shop.jar": "-", "shop": "-", "war": "-",
		"#.war": "!", "a##b##c.war": "/a b##c", "a#.war": "!", "#a.war": "!", "..#etc.war": "-", "a#.#b.war": "!", "a#..#b.war": "!", "##1.war": "!",
		"a\\b.war": "!", "a\x00.war": "!", "a?b.war": "!", "a%2fb.war": "!", "\xff.war": "!",
	} {
		n, ok, err := parseName(file)
		got := n.path + " " + n.version
		if err != nil {
			got = "!"
		} else if !ok {
			got = "-"
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", file, got, want)
		}
	}
}

func TestHighestVersionIsServed(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.put("shop##1.war", war(t, "index.html", "one"))
		b.put("shop##2.war", war(t, "index.html", "two"))
		b.put("shop.war", war(t, "index.html", "none"))
		b.put("ROOT.zip", war(t, "index.html", "root"))
		time.Sleep(soon)
		b.want(b.node.read("/shop"), "two")
		b.want(b.node.bundle("/shop").Version, "2")
		b.want(b.node.read(""), "root")
		b.node.take()
		b.remove("shop##2.war")
		time.Sleep(soon)
		b.want(b.node.read("/shop"), "one")
		b.want(b.node.take(), []string{"apply /shop 1"})
	})
}

func TestFileBeingWrittenIsWaitedFor(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		data := war(t, "index.html", strings.Repeat("some text ", 1000), "b", strings.Repeat("x", 100_000))
		f, err := os.Create(filepath.Join(b.dir, "shop.war"))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(data); i += 100 { // a slow copy
			if _, err := f.Write(data[i:min(i+100, len(data))]); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(f.Name(), time.Now(), time.Now()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(300 * time.Millisecond)
		}
		f.Close()
		b.want(b.node.take(), []string{})
		b.want(b.d.counters.refused.Value(), 0)
		time.Sleep(soon)
		b.want(len(b.node.take()), 1)

		// A copy that pauses is refused, and taken up when it is complete.
		half := filepath.Join(b.dir, "half.war")
		if err := os.WriteFile(half, data[:len(data)/2], 0o644); err != nil {
			t.Fatal(err)
		}
		time.Sleep(soon)
		b.want(b.status(), "/half failed !, /shop serving")
		if err := os.WriteFile(half, data, 0o644); err != nil {
			t.Fatal(err)
		}
		time.Sleep(soon)
		b.want(b.status(), "/half serving, /shop serving")
	})
}

func TestBadArchiveKeepsTheOldVersion(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.put("shop.war", war(t, "index.html", "one"))
		time.Sleep(soon)
		b.put("shop.war", []byte("PK this is no archive"))
		time.Sleep(5 * time.Minute)
		b.want(b.node.read("/shop"), "one")
		b.want(b.status(), "/shop serving !")
		b.want(b.d.counters.refused.Value(), 1)
		b.want(len(b.list(appsDir)), 1)
		b.put("shop.war", war(t, "index.html", "two"))
		time.Sleep(soon)
		b.want(b.node.read("/shop"), "two")
		b.want(b.status(), "/shop serving")
	})
}

func TestVersionThatTheNodeRefuses(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.put("shop.war", war(t, "index.html", "one"))
		time.Sleep(soon)
		b.node.set(func(context.Context, core.Bundle) error { return errors.New("health check failed") })
		b.put("shop.war", war(t, "index.html", "two"))
		b.put("new.war", war(t, "index.html", "new"))
		time.Sleep(5 * time.Minute)
		b.want(b.node.read("/shop"), "one")
		b.want(b.status(), "/new failed !, /shop serving !")
		b.want(len(b.list(appsDir)), 1)
		b.want(len(b.node.take()), 3)
	})
}

func TestUncertainResultIsTriedAgain(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.node.set(func(context.Context, core.Bundle) error { return channel.ErrPluginDown })
		b.put("shop.war", war(t, "index.html", "one"))
		time.Sleep(4 * time.Minute)
		n := len(b.node.take())
		if n < 4 || n > 8 {
			t.Errorf("tried %d times in four minutes", n)
		}
		b.want(len(b.list(appsDir)), 1)
		b.node.set(nil)
		time.Sleep(5 * time.Minute)
		b.want(b.node.read("/shop"), "one")
		b.want(b.status(), "/shop serving")
	})
}

func TestNodeThatHangs(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.node.set(func(ctx context.Context, _ core.Bundle) error { <-ctx.Done(); return ctx.Err() })
		b.put("shop.war", war(t, "index.html", "one"))
		time.Sleep(b.cfg.ApplyTimeout + soon)
		b.want(b.status(), "/shop failed !")
		b.node.set(nil)
		time.Sleep(b.cfg.ApplyTimeout + time.Minute)
		b.want(b.node.read("/shop"), "one")
		// Stop does not wait for a node that hangs.
		b.node.set(func(ctx context.Context, _ core.Bundle) error { <-ctx.Done(); return ctx.Err() })
		b.put("shop.war", war(t, "index.html", "two"))
		time.Sleep(soon)
	})
}

func TestSameBytesAreNotDeployedAgain(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		data := war(t, "index.html", "one")
		b.put("shop.war", data)
		time.Sleep(soon)
		b.put("shop.war", data)
		time.Sleep(soon)
		b.want(len(b.node.take()), 1)
		b.want(len(b.list(appsDir)), 1)
	})
}

func TestShortDisappearanceIsNoRemoval(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.cfg.Settle = 3 * time.Second
		b.stop()
		b.start()
		data := war(t, "index.html", "one")
		b.put("shop.war", data)
		time.Sleep(2 * soon)
		b.remove("shop.war")
		time.Sleep(2 * time.Second)
		b.put("shop.war", data)
		time.Sleep(time.Minute)
		b.want(len(b.node.take()), 1)
	})
}

func TestFolderThatCannotBeReadIsNotEmpty(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.put("shop.war", war(t, "index.html", "one"))
		time.Sleep(soon)
		b.node.take()
		if err := os.Rename(b.dir, b.dir+".away"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		b.want(b.node.take(), []string{})
		if err := os.Rename(b.dir+".away", b.dir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(soon)
		b.want(b.node.take(), []string{})
		b.want(b.status(), "/shop serving")
	})
}

func TestDeployerRestart(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.put("shop.war", war(t, "index.html", "one"))
		b.put("gone.war", war(t, "index.html", "gone"))
		time.Sleep(soon)
		dir := b.node.bundle("/shop").Dir
		b.stop()
		b.remove("gone.war")
		os.Mkdir(filepath.Join(b.work, appsDir, "leftover"), 0o755)
		os.Mkdir(filepath.Join(b.work, stagingDir, "new-1"), 0o755)
		b.node.take()
		b.start()
		time.Sleep(soon)
		// Handed over again, from the same files; what has gone is removed.
		calls := b.node.take()
		slices.Sort(calls)
		b.want(len(calls), 2)
		b.want(calls[1], "remove /gone")
		b.want(b.node.bundle("/shop").Dir, dir)
		time.Sleep(b.cfg.Grace + b.cfg.Scan)
		b.want(b.list(appsDir), []string{filepath.Base(dir)})
	})
}

func TestNodeAndDeployerRestartWithAChangedFile(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.put("shop.war", war(t, "index.html", "one"))
		time.Sleep(soon)
		b.stop()
		b.put("shop.war", []byte("damaged"))
		b.node = newNode(t)
		b.start()
		time.Sleep(soon)
		b.want(b.node.read("/shop"), "one") // the old version serves
		b.want(b.status(), "/shop serving !")
	})
}

func TestKilledInTheMiddleOfADeployment(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.put("shop.war", war(t, "index.html", "one"))
		time.Sleep(soon)
		b.node.set(func(ctx context.Context, _ core.Bundle) error { <-ctx.Done(); return ctx.Err() })
		b.put("shop.war", war(t, "index.html", "two"))
		time.Sleep(soon)
		b.stop() // as a kill: the result was never seen
		b.want(len(b.list(appsDir)), 2)
		b.node.set(func(_ context.Context, n core.Bundle) error {
			if data, _ := os.ReadFile(filepath.Join(n.Dir, "index.html")); string(data) == "two" {
				return errors.New("does not start")
			}
			return nil
		})
		b.start()
		time.Sleep(soon)
		b.want(b.node.read("/shop"), "one")
		b.want(b.status(), "/shop serving !")
		b.want(len(b.list(appsDir)), 1)
	})
}

func TestDamagedJournalAndFiles(t *testing.T) {
	for name, damage := range map[string]func(b *bench){
		"journal": func(b *bench) {
			os.WriteFile(filepath.Join(b.work, journalFile), []byte(`{"apps":[{"path":"/x","serving":{"dir":"../.."}}]}`), 0o600)
		},
		"files": func(b *bench) { os.Remove(filepath.Join(b.node.bundle("/shop").Dir, "WEB-INF", "x")) },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(t *testing.T, b *bench) {
				b.put("shop.war", war(t, "index.html", "one", "WEB-INF/x", "x"))
				time.Sleep(soon)
				old := b.node.bundle("/shop").Dir
				b.stop()
				damage(b)
				b.start()
				time.Sleep(soon)
				dir := b.node.bundle("/shop").Dir
				if _, err := os.Stat(filepath.Join(dir, "WEB-INF", "x")); err != nil || dir == old {
					t.Errorf("not unpacked again: %v", err)
				}
				time.Sleep(b.cfg.Grace + 2*b.cfg.Scan)
				b.want(b.list(appsDir), []string{filepath.Base(dir)})
			})
		})
	}
}

// TestDiskFull limits the size of files, which fails writes as a full disk
// does, at several points of a deployment.
func TestDiskFull(t *testing.T) {
	// The limit holds for the whole process, so the test has one of its own.
	const inner = "WATCH_TEST_DISK_FULL"
	if os.Getenv(inner) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestDiskFull$", "-test.v")
		cmd.Env = append(os.Environ(), inner+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestDiskFull")) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	data := war(t, "index.html", "two", "big", strings.Repeat("0123456789abcdef", 20_000))
	run(t, func(t *testing.T, b *bench) {
		b.put("shop.war", war(t, "index.html", "one"))
		time.Sleep(soon)
		before := b.list(appsDir)
		b.put("shop.war", data)
		for _, limit := range []uint64{uint64(len(data)) / 100, uint64(len(data)) / 2, 320_000 / 2, 320_000 * 99 / 100, 200} {
			limitFiles(t, limit, func() { time.Sleep(6 * time.Minute) })
			b.want(b.node.read("/shop"), "one")
			b.want(b.status(), "/shop serving !")
			b.want(b.list(appsDir), before)
			b.want(b.list(stagingDir), []string{})
		}
		time.Sleep(6 * time.Minute)
		b.want(b.node.read("/shop"), "two")
	})
}

func limitFiles(t *testing.T, limit uint64, f func()) {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: limit, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old)
	f()
}

func TestFilesThatAreNoArchives(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		os.Mkdir(filepath.Join(b.dir, "folder.war"), 0o755)
		os.Symlink("/etc/passwd", filepath.Join(b.dir, "link.war"))
		syscall.Mkfifo(filepath.Join(b.dir, "pipe.war"), 0o644)
		b.put("a#.war", war(t, "index.html", "x"))
		b.put("notes.txt", []byte("x"))
		time.Sleep(time.Minute)
		b.want(b.node.take(), []string{})
		b.want(strings.Count(b.status(), "failed !"), 4)
		b.want(b.d.counters.refused.Value(), 4)
	})
}

func TestTooManyArchives(t *testing.T) {
	run(t, func(t *testing.T, b *bench) {
		b.stop()
		b.cfg.MaxArchives = 3
		b.start()
		for i := range 10 {
			b.put(fmt.Sprintf("a%d.war", i), war(t, "index.html", "x"))
		}
		time.Sleep(time.Minute)
		if calls := b.node.take(); slices.ContainsFunc(calls, func(c string) bool { return strings.HasPrefix(c, "remove") }) || len(calls) < 3 {
			t.Errorf("%q", calls)
		}
	})
}

func TestLifeCycle(t *testing.T) {
	cfg := Default()
	cfg.Dir = t.TempDir()
	s := channel.Settings{WorkDir: t.TempDir()}
	d, err := New(cfg, s)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if err := d.Start(t.Context(), newNode(t)); err == nil {
		t.Error("started after stop")
	}
	if _, err := New(cfg, channel.Settings{}); err == nil {
		t.Error("made without a work directory")
	}
	cfg.Dir = filepath.Join(s.WorkDir, "file")
	if err := os.WriteFile(cfg.Dir, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if d, err = New(cfg, s); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context(), newNode(t)); err == nil {
		t.Error("started on a file")
	}
}

func TestConfigValidation(t *testing.T) {
	c := Config{}
	err := c.Validate()
	for _, field := range []string{"dir:", "scan:", "settle:", "apply_timeout:", "max_size:", "max_unpacked:", "max_entries:", "max_archives:"} {
		if !strings.Contains(err.Error(), field) {
			t.Errorf("%q does not name %s", err, field)
		}
	}
	d := func(into any) error { into.(*Config).Dir = "x"; return nil }
	if err := Factory.Check(d); err != nil {
		t.Error(err)
	}
}

// TestReportedChanges uses the real clock and the operating system's reports.
func TestReportedChanges(t *testing.T) {
	cfg := Default()
	cfg.Dir = t.TempDir()
	cfg.Scan, cfg.Settle = time.Hour, 50*time.Millisecond
	n := newNode(t)
	d, err := New(cfg, channel.Settings{WorkDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond) // the first look is over; the next would come in an hour
	if err := os.WriteFile(filepath.Join(cfg.Dir, "shop.war"), war(t, "index.html", "one"), 0o644); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); n.read("/shop") != "one"; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a reported change was not seen")
		}
	}
	if err := d.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}
