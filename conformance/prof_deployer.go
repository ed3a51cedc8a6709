package conformance

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins"
)

// DeployerSubject is a deployer, in all its forms, that takes archives out of a
// folder: shop.war becomes /shop, ROOT.war the root context. The checks run in
// real time: make it look at the folder often, and at once remove what it does
// not need any more.
type DeployerSubject interface {
	Subject
	// Deployer makes an instance that deploys what is in dir; what it needs
	// beside the instance ends with t.
	Deployer(t *T, dir string, s channel.Settings) (core.Deployer, error)
}

type deployer struct {
	name    string
	factory func(dir string) core.DeployerFactory
	options func(dir string) string
}

// Deployer is the subject of a deployer's constructor; cfg makes the
// configuration to try for a folder.
func Deployer[C any, D core.Deployer](name string, newFn func(C, channel.Settings) (D, error), cfg func(dir string) C) Subject {
	return &deployer{name: name, factory: func(dir string) core.DeployerFactory {
		return channel.FactoryOf(name, cfg(dir), func(c C, s channel.Settings) (core.Deployer, error) { return newFn(c, s) })
	}}
}

// DeployerOf is the subject of a factory; options makes the options for a
// folder, as YAML.
func DeployerOf(f core.DeployerFactory, options func(dir string) string) Subject {
	return &deployer{f.Name, func(string) core.DeployerFactory { return f }, options}
}

// Describe implements Subject.
func (d *deployer) Describe() (Description, error) {
	return Description{Kind: ProfileDeployer, Name: d.name, Modes: []core.PluginMode{core.Direct, core.Bridged}}, nil
}

// Deployer implements DeployerSubject.
func (d *deployer) Deployer(t *T, dir string, s channel.Settings) (core.Deployer, error) {
	h := t.pluginHost(plugins.Config{Deployers: []core.DeployerFactory{d.factory(dir)}})
	spec := core.PluginSpec{Name: d.name, Mode: t.Mode, Origin: "options"}
	if d.options != nil {
		spec.Options = []byte(d.options(dir))
	}
	return h.Deployer(spec, s)
}

// yard is a node with a deployer: a watched folder, a work directory, and what
// is in service. It uses real time in all modes.
type yard struct {
	t         *T
	dir, work string

	mu     sync.Mutex
	serves map[string]core.Bundle // guarded by mu
	calls  []string               // guarded by mu
	answer func(ctx context.Context, b core.Bundle) error
}

func (t *T) yard() *yard {
	return &yard{t: t, dir: t.TempDir(), work: t.TempDir(), serves: map[string]core.Bundle{}}
}

// start starts an instance of the subject; stop may be called early.
func (y *yard) start() (d core.Deployer, stop func()) {
	y.t.Helper()
	subject, ok := y.t.Subject.(DeployerSubject)
	if !ok {
		y.t.Fatalf("a %T is no deployer", y.t.Subject)
	}
	d, err := subject.Deployer(y.t, y.dir, channel.Settings{Name: "subject", Logger: zap.NewNop(), Metrics: channel.NewMetrics(), WorkDir: y.work})
	if err != nil {
		y.t.Fatalf("make the subject: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), y.t.Timeouts.Start)
	defer cancel()
	if err := d.Start(ctx, y); err != nil {
		y.t.Fatalf("start of the subject: %v", err)
	}
	var once sync.Once
	stop = func() {
		once.Do(func() {
			ctx, cancel := context.WithTimeout(context.Background(), y.t.Timeouts.Stop)
			defer cancel()
			if err := d.Stop(ctx); err != nil {
				y.t.Errorf("stop of the subject: %v", err)
			}
		})
	}
	y.t.Cleanup(stop)
	return d, stop
}

// Apply implements core.DeployerHost.
func (y *yard) Apply(ctx context.Context, b core.Bundle) error {
	y.mu.Lock()
	y.calls = append(y.calls, "apply "+b.Path)
	answer, old, replaced := y.answer, y.serves[b.Path], false
	_, replaced = y.serves[b.Path]
	y.mu.Unlock()
	if _, err := index(b); err != nil {
		y.t.Errorf("the bundle of %q is not complete: %v", b.Path, err)
	}
	if replaced {
		if _, err := index(old); err != nil {
			y.t.Errorf("the files of the version that serves %q are gone before its successor serves: %v", b.Path, err)
		}
	}
	if b.Path != "" && (b.Path != path.Clean(b.Path) || b.Path[0] != '/' || strings.Contains(b.Path, "..")) {
		y.t.Errorf("a bundle is to be put into service at %q", b.Path)
	}
	if answer != nil {
		if err := answer(ctx, b); err != nil {
			return err
		}
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	y.serves[b.Path] = b
	return nil
}

// Remove implements core.DeployerHost.
func (y *yard) Remove(_ context.Context, _, path string) error {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.calls = append(y.calls, "remove "+path)
	delete(y.serves, path)
	return nil
}

func (y *yard) respond(answer func(ctx context.Context, b core.Bundle) error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.answer = answer
}

func (y *yard) service(path string) (core.Bundle, bool) {
	y.mu.Lock()
	defer y.mu.Unlock()
	b, ok := y.serves[path]
	return b, ok
}

// removals counts the calls of Remove for a path.
func (y *yard) removals(path string) (n int) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, c := range y.calls {
		if c == "remove "+path {
			n++
		}
	}
	return n
}

// index reads the page by which versions are told apart.
func index(b core.Bundle) (string, error) {
	text, err := os.ReadFile(filepath.Join(b.Dir, "index.html"))
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(b.Dir, "WEB-INF", "data.bin")); err != nil {
		return "", err
	}
	return string(text), nil
}

// bundleData is what makes an archive large enough to be cut in half, in bytes.
const bundleData = 256 << 10

// archive makes an application whose page is version, with further entries.
func (y *yard) archive(version string, more ...*zip.FileHeader) []byte {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	put := func(h *zip.FileHeader, data []byte) {
		f, err := w.CreateHeader(h)
		if err == nil {
			_, err = f.Write(data)
		}
		if err != nil {
			y.t.Fatalf("make an archive: %v", err)
		}
	}
	noise := make([]byte, bundleData)
	r := y.t.Rand(version)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	put(&zip.FileHeader{Name: "index.html", Method: zip.Deflate}, []byte(version))
	put(&zip.FileHeader{Name: "WEB-INF/data.bin", Method: zip.Store}, noise)
	for _, h := range more {
		put(h, []byte("/etc"))
	}
	if err := w.Close(); err != nil {
		y.t.Fatalf("make an archive: %v", err)
	}
	return b.Bytes()
}

// push puts a file into the folder, all at once.
func (y *yard) push(name string, data []byte) {
	y.t.Helper()
	tmp := filepath.Join(y.t.TempDir(), "upload")
	err := os.WriteFile(tmp, data, 0o600)
	if err == nil {
		err = os.Rename(tmp, filepath.Join(y.dir, name))
	}
	if err != nil {
		y.t.Fatalf("push: %v", err)
	}
}

func (y *yard) drop(name string) {
	y.t.Helper()
	if err := os.Remove(filepath.Join(y.dir, name)); err != nil {
		y.t.Fatalf("remove an archive: %v", err)
	}
}

// until waits until a version is in service and its files are there.
func (y *yard) until(path, version string) core.Bundle {
	y.t.Helper()
	var b core.Bundle
	y.t.Eventually(y.t.Timeouts.Event, func() error {
		var ok bool
		if b, ok = y.service(path); !ok {
			return fmt.Errorf("nothing serves %q", path)
		}
		got, err := index(b)
		if err == nil && got != version {
			err = fmt.Errorf("%q serves version %q, want %q", path, got, version)
		}
		return err
	})
	return b
}

// state waits until the deployer says what a path is in.
func (y *yard) state(d core.Deployer, path string, ok func(core.Deployment) bool, want string) {
	y.t.Helper()
	y.t.Eventually(y.t.Timeouts.Event, func() error {
		list, err := d.Status(y.t.Context())
		if err != nil {
			return err
		}
		i := slices.IndexFunc(list, func(p core.Deployment) bool { return p.Path == path && p.State != "removed" })
		p := core.Deployment{State: "removed"}
		if i >= 0 {
			p = list[i]
		}
		if !ok(p) {
			return fmt.Errorf("the status of %q is %q %s, want %s", path, p.State, p.Error, want)
		}
		return nil
	})
}

// files lists all files in the work directory, and those of the folder.
func (y *yard) files() []string {
	var list []string
	for _, root := range []string{y.work, y.dir} {
		err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				list = append(list, p)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it is just being removed
			}
			return err
		})
		if err != nil {
			y.t.Errorf("look for debris: %v", err)
		}
	}
	return list
}

// copies counts the unpacked applications in the work directory.
func (y *yard) copies() (n int) {
	for _, f := range y.files() {
		if filepath.Base(f) == "index.html" || filepath.Base(f) == "data.bin" {
			n++
		}
	}
	return n
}

// pause gives the subject time to do what it must not do.
func (y *yard) pause() { time.Sleep(3 * y.t.Timeouts.Quiet) }

func deployerPropagates(t *T) {
	y := t.yard()
	d, _ := y.start()
	one := y.archive("one")
	y.push("shop.war", one)
	y.push("ROOT.war", y.archive("root"))
	b := y.until("/shop", "one")
	if want := hexSum(one); b.Digest != want {
		t.Errorf("the digest of the bundle is %q, that of the archive %q", b.Digest, want)
	}
	y.until("", "root")
	serving := func(p core.Deployment) bool { return p.State == "serving" && p.Error == "" }
	y.state(d, "/shop", serving, "serving")
	two := y.archive("two")
	y.push("shop.war", two)
	if b = y.until("/shop", "two"); b.Digest != hexSum(two) {
		t.Errorf("the digest of the second bundle is %q", b.Digest)
	}
	if n := y.removals("/shop"); n > 0 {
		t.Errorf("a version was taken out of service %d times instead of being replaced", n)
	}
	y.drop("shop.war")
	t.Eventually(t.Timeouts.Event, func() error {
		if _, ok := y.service("/shop"); ok {
			return errors.New("the application whose archive has gone still serves")
		}
		return nil
	})
	y.state(d, "/shop", func(p core.Deployment) bool { return p.State == "removed" }, "removed")
	y.state(d, "", serving, "serving")
	y.until("", "root")
}

func hexSum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

var errVersionRefused = errors.New("conformance: the node refuses this version")

func deployerInterrupted(t *T) {
	y := t.yard()
	d, stop := y.start()
	y.push("shop.war", y.archive("one"))
	y.until("/shop", "one")
	y.pause()
	before := y.files()

	// A transfer stops in the middle.
	two := y.archive("two")
	y.push("shop.war", two[:len(two)/2])
	y.pause()
	y.until("/shop", "one")
	if n := y.removals("/shop"); n > 0 {
		t.Errorf("an archive that is not complete took the application out of service")
	}
	t.Eventually(t.Timeouts.Event, func() error {
		if after := y.files(); len(after) > len(before) {
			return fmt.Errorf("an archive that is not complete left debris: %d files before, %d after: %v", len(before), len(after), after)
		}
		return nil
	})
	y.push("shop.war", two)
	y.until("/shop", "two")

	// The node refuses a version.
	y.respond(func(context.Context, core.Bundle) error { return errVersionRefused })
	y.push("shop.war", y.archive("three"))
	y.state(d, "/shop", func(p core.Deployment) bool { return p.Error != "" }, "an error")
	y.pause()
	y.until("/shop", "two")
	if n := y.removals("/shop"); n > 0 {
		t.Errorf("a version that the node refuses took the application out of service")
	}

	// The deployer is stopped while a version is being put into service.
	inside := make(chan struct{}, 16)
	y.respond(func(ctx context.Context, _ core.Bundle) error {
		inside <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	y.push("shop.war", y.archive("four"))
	await(t, "the next version is put into service", inside)
	stop()
	y.respond(nil)
	y.start()
	y.until("/shop", "four")
	t.Eventually(t.Timeouts.Event, func() error {
		if n := y.copies(); n > 2 {
			return fmt.Errorf("versions that are not used any more are left in the work directory: %d files of 2", n)
		}
		return nil
	})
}

func deployerPaths(t *T) {
	y := t.yard()
	y.start()
	link := &zip.FileHeader{Name: "link"}
	link.SetMode(fs.ModeSymlink | 0o777)
	through := &zip.FileHeader{Name: "link/evil.html"}
	hostile := map[string][]*zip.FileHeader{
		"up":        {{Name: "../evil.html"}},
		"deep":      {{Name: "a/../../../evil.html"}},
		"absolute":  {{Name: filepath.ToSlash(filepath.Join(y.dir, "evil.html"))}},
		"backslash": {{Name: `..\evil.html`}},
		"drive":     {{Name: `C:\evil.html`}},
		"link":      {link},
		"through":   {link, through},
		"nul":       {{Name: "evil\x00.html"}},
		"dots":      {{Name: "a/.."}},
	}
	for _, name := range sortedKeys(hostile) {
		y.push(name+".war", y.archive(name, hostile[name]...))
	}
	for _, name := range []string{"..#evil.war", "a#..#evil.war", ".#evil.war"} {
		y.push(name, y.archive("evil"))
	}
	y.pause()
	y.push("good.war", y.archive("good"))
	y.until("/good", "good") // it lives, and has seen the others
	y.pause()
	y.mu.Lock()
	serves := sortedKeys(y.serves)
	y.mu.Unlock()
	if len(serves) != 1 {
		t.Errorf("archives with names that lead out of them are in service: %q", serves)
	}
	for _, f := range y.files() {
		if strings.Contains(filepath.Base(f), "evil") && filepath.Ext(f) == ".html" {
			t.Errorf("a file of a hostile archive was written to %s", f)
		}
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(y.work), "evil.html")); err == nil {
		t.Errorf("a file of a hostile archive was written outside of the work directory")
	}
}

func deployerChecks() []Check {
	return []Check{
		{
			ID: "deployer/propagates", Profile: ProfileDeployer, Level: Must,
			Requirement: "What is pushed becomes active, complete and with its digest; a new version replaces the old one, and what is removed is taken out of service.",
			Source:      "core.Deployer, core.DeployerHost, core.Bundle",
			Run:         deployerPropagates,
			Saboteurs:   deployerSaboteurs(mistakeNeverRemoves, mistakeDigest, mistakeRemovesFirst, mistakeErasesFirst, mistakeAppliesEarly, mistakeNoStatus),
		}, {
			ID: "deployer/interrupted", Profile: ProfileDeployer, Level: Must,
			Requirement: "A cut transfer, a version that the node refuses and a restart in the middle leave the old version running and no debris.",
			Source:      "core.DeployerHost: Apply; DESIGN §10.8",
			Run:         deployerInterrupted,
			Saboteurs:   deployerSaboteurs(mistakeRemovesBroken, mistakeDebris, mistakeErasesRefused, mistakeForgetsOld),
		}, {
			ID: "deployer/paths", Profile: ProfileDeployer, Level: Must,
			Requirement: "Archives with names that have dots or other separators, that are absolute or links, are refused, and nothing of them is in service.",
			Source:      "DESIGN §5: deployer; CWE-22",
			Run:         deployerPaths,
			Saboteurs:   deployerSaboteurs(mistakeTrustsNames, mistakeSkipsNames, mistakeTrustsArchive),
		},
	}
}
