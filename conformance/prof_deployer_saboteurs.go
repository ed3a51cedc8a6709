package conformance

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// The mistakes that a plainDeployer can make.
const (
	mistakeNeverRemoves  = "leaves applications in service whose archive has gone"
	mistakeDigest        = "reports another digest"
	mistakeRemovesFirst  = "takes the old version out of service first"
	mistakeErasesFirst   = "erases the old version first"
	mistakeAppliesEarly  = "puts an application into service while it is unpacked"
	mistakeNoStatus      = "always reports that all is well"
	mistakeRemovesBroken = "takes an application out of service whose archive cannot be read"
	mistakeDebris        = "leaves what it has unpacked of a broken archive"
	mistakeErasesRefused = "erases the version in service when the node refuses another one"
	mistakeForgetsOld    = "never erases old versions"
	mistakeTrustsNames   = "writes wherever an archive says"
	mistakeSkipsNames    = "leaves out hostile entries and serves the rest"
	mistakeTrustsArchive = "makes a context path of any file name"
)

func deployerSaboteurs(mistakes ...string) []Saboteur {
	var list []Saboteur
	for _, m := range mistakes {
		list = append(list, Saboteur{Name: m, New: func() Subject { return wrongDeployer{plainDeployers(m)} }})
	}
	return list
}

// wrongDeployer runs in one mode only.
type wrongDeployer struct{ DeployerSubject }

func (d wrongDeployer) Describe() (Description, error) {
	desc, err := d.DeployerSubject.Describe()
	desc.Modes = []core.PluginMode{core.Direct}
	return desc, err
}

// plainDeployers is the subject of deployers with one mistake, or none.
func plainDeployers(mistake string) DeployerSubject {
	return Deployer("plain", func(c plainDeployerConfig, s channel.Settings) (core.Deployer, error) {
		return &plainDeployer{plainDeployerConfig: c, work: s.WorkDir, tried: map[string]string{}, status: map[string]core.Deployment{}}, nil
	}, func(dir string) plainDeployerConfig { return plainDeployerConfig{dir, mistake} }).(DeployerSubject)
}

type plainDeployerConfig struct {
	Dir     string `yaml:"dir"`
	Mistake string `yaml:"mistake"`
}

// plainDeployer is the simplest deployer that passes its profile, if it makes no
// mistake.
type plainDeployer struct {
	plainDeployerConfig
	work   string
	tried  map[string]string // digest by file
	cancel context.CancelFunc
	loop   sync.WaitGroup

	mu     sync.Mutex
	status map[string]core.Deployment // guarded by mu; by file
}

// plainScan is how often it looks.
const plainScan = 10 * time.Millisecond

func (d *plainDeployer) Start(_ context.Context, host core.DeployerHost) error {
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	d.loop.Go(func() {
		ticker := time.NewTicker(plainScan)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				d.scan(ctx, host)
			case <-ctx.Done():
				return
			}
		}
	})
	return nil
}

func (d *plainDeployer) Stop(context.Context) error {
	if d.cancel != nil {
		d.cancel()
	}
	d.loop.Wait()
	return nil
}

func (d *plainDeployer) Status(context.Context) ([]core.Deployment, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Values(d.status)), nil
}

func (d *plainDeployer) note(file string, p core.Deployment) {
	if d.Mistake == mistakeNoStatus {
		p.State = "serving"
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status[file] = p
}

func (d *plainDeployer) scan(ctx context.Context, host core.DeployerHost) {
	entries, err := os.ReadDir(d.Dir)
	if err != nil {
		return
	}
	there := map[string]bool{}
	for _, e := range entries {
		there[e.Name()] = true
		data, err := os.ReadFile(filepath.Join(d.Dir, e.Name()))
		digest := hexSum(data)
		if err == nil && filepath.Ext(e.Name()) == ".war" && d.tried[e.Name()] != digest {
			d.tried[e.Name()] = digest
			d.deploy(ctx, host, e.Name(), digest)
		}
	}
	for file, p := range d.status {
		if !there[file] && p.State == "serving" && d.Mistake != mistakeNeverRemoves {
			if err := host.Remove(ctx, "", p.Path); err == nil {
				p.State = "removed"
				d.note(file, p)
				_ = os.RemoveAll(p.Dir)
			}
		}
	}
}

func (d *plainDeployer) deploy(ctx context.Context, host core.DeployerHost, file, digest string) {
	old := d.status[file]
	serves := old.State == "serving"
	path := "/" + strings.ReplaceAll(strings.TrimSuffix(file, ".war"), "#", "/")
	if path == "/ROOT" {
		path = ""
	}
	if strings.Contains(path, "/.") && d.Mistake != mistakeTrustsArchive {
		return
	}
	b := core.Bundle{Path: path, Version: digest[:8], Digest: digest, Dir: filepath.Join(d.work, digest)}
	if d.Mistake == mistakeDigest {
		b.Digest = strings.Repeat("0", 64)
	}
	fail := func(err error) {
		if serves {
			old.Error = err.Error()
			d.note(file, old)
		} else {
			d.note(file, core.Deployment{Bundle: b, State: "failed", Error: err.Error()})
		}
	}
	if d.Mistake == mistakeRemovesFirst && serves {
		_ = host.Remove(ctx, "", path)
	}
	if d.Mistake == mistakeErasesFirst && serves {
		_ = os.RemoveAll(old.Dir)
	}
	if d.Mistake == mistakeAppliesEarly {
		_ = os.MkdirAll(b.Dir, 0o700)
		_ = host.Apply(ctx, b)
	}
	if err := d.unpack(filepath.Join(d.Dir, file), b.Dir); err != nil {
		fail(err)
		if d.Mistake == mistakeRemovesBroken {
			_ = host.Remove(ctx, "", path)
		}
		if d.Mistake == mistakeDebris {
			_ = os.MkdirAll(b.Dir, 0o700)
			_ = os.WriteFile(filepath.Join(b.Dir, "part"), []byte("debris"), 0o600)
		} else {
			_ = os.RemoveAll(b.Dir)
		}
		return
	}
	if err := host.Apply(ctx, b); err != nil {
		fail(err)
		_ = os.RemoveAll(b.Dir)
		if d.Mistake == mistakeErasesRefused && serves {
			_ = os.RemoveAll(old.Dir)
		}
		return
	}
	d.note(file, core.Deployment{Bundle: b, State: "serving"})
	if d.Mistake == mistakeForgetsOld {
		return
	}
	// What no application uses; another instance may have left it.
	used := map[string]bool{}
	for _, p := range d.status {
		used[p.Dir] = p.State == "serving"
	}
	left, _ := os.ReadDir(d.work)
	for _, e := range left {
		if dir := filepath.Join(d.work, e.Name()); !used[dir] && len(d.status) == len(d.tried) {
			_ = os.RemoveAll(dir)
		}
	}
}

func (d *plainDeployer) unpack(archive, dir string) error {
	zr, err := zip.OpenReader(archive)
	if err != nil {
		return err
	}
	defer zr.Close()
	var errs []error
	for _, f := range zr.File {
		if err := d.entry(f, dir); err != nil && d.Mistake != mistakeTrustsNames && d.Mistake != mistakeSkipsNames {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (d *plainDeployer) entry(f *zip.File, dir string) error {
	local := filepath.IsLocal(f.Name) && !strings.ContainsAny(f.Name, "\\:\x00") && !strings.Contains(f.Name, "..") && f.Mode().IsRegular()
	if !local && d.Mistake != mistakeTrustsNames {
		return fmt.Errorf("entry %q", f.Name)
	}
	to := filepath.Join(dir, f.Name)
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	in, err := f.Open()
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
