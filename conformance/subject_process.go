package conformance

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins"
)

// Program is the subject of a plugin program, in any language. What it is it
// says itself, when it is run with the argument "describe".
type Program struct {
	path      string
	args      []string
	component string
	options   string
}

// Process is the subject of a plugin program. args replace those that a node
// starts it with.
func Process(path string, args ...string) *Program { return &Program{path: path, args: args} }

// Component chooses one of several components, "interceptor/acme/zstd".
func (p *Program) Component(id string) *Program {
	c := *p
	c.component = id
	return &c
}

// Options sets the options to try it with, as YAML.
func (p *Program) Options(yaml string) *Program {
	c := *p
	c.options = yaml
	return &c
}

// Path returns the program's file.
func (p *Program) Path() string { return p.path }

// describe runs the program and returns the component's description and the
// program's digest.
func (p *Program) describe() (d plugins.Description, sum string, err error) {
	f, err := os.Open(p.path)
	if err != nil {
		return d, "", fmt.Errorf("conformance: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return d, "", fmt.Errorf("conformance: %w", err)
	}
	list, err := plugins.DescribeProgram(context.Background(), p.path)
	if err != nil {
		return d, "", err
	}
	var ids []string
	for _, c := range list {
		id := c.Kind + "/" + c.Name
		ids = append(ids, id)
		if id == p.component || p.component == "" && len(list) == 1 {
			return c, hex.EncodeToString(h.Sum(nil)), nil
		}
	}
	if p.component == "" {
		return d, "", fmt.Errorf("conformance: the program has several components, choose one: %s", strings.Join(ids, ", "))
	}
	return d, "", fmt.Errorf("conformance: the program has no component %q (it has: %s)", p.component, strings.Join(ids, ", "))
}

// Describe implements Subject.
func (p *Program) Describe() (Description, error) {
	d, sum, err := p.describe()
	if err != nil {
		return Description{}, err
	}
	details, err := json.Marshal(d)
	if err != nil {
		return Description{}, err
	}
	out := Description{
		Kind: d.Kind, Name: d.Name, Version: d.Version, API: d.API, SHA256: sum,
		Modes: []core.PluginMode{core.Process}, Features: d.Features, Details: details,
		Profiles: pluginProfiles(d.Kind, p.options),
	}
	if d.Kind == plugins.KindInterceptor {
		filter := slices.Contains(d.Handles, "view")
		desc := channel.Descriptor{Mutates: d.Mutates, Stateful: d.Stateful, Provides: d.Provides}
		out.Features = append(slices.Clone(d.Features), interceptorFeatures(desc, nil)...)
		if filter {
			out.Features = append(out.Features, FeatureFilteringView)
		}
		slices.Sort(out.Features)
		out.Features = slices.Compact(out.Features)
	}
	return out, nil
}

// Host returns a plugin host that may run the program, and what chooses the
// component. The host is stopped when t ends.
func (p *Program) Host(t *T, s channel.Settings) (*plugins.Host, core.PluginSpec, error) {
	d, sum, err := p.describe()
	if err != nil {
		return nil, core.PluginSpec{}, err
	}
	h, err := t.PluginHost(plugins.Config{
		External: []plugins.External{{Kind: d.Kind, Name: d.Name, Path: p.path, SHA256: sum, Args: p.args, Describe: d}},
		StoreDir: t.TempDir(), Stream: t.Stream,
		StartTimeout: t.Timeouts.Start, StopTimeout: t.Timeouts.Stop,
	}, s)
	if err != nil {
		return nil, core.PluginSpec{}, err
	}
	return h, core.PluginSpec{Name: d.Name, Mode: core.Process, Options: []byte(p.options), Origin: "options:1"}, nil
}

// Interceptor implements InterceptorSubject.
func (p *Program) Interceptor(t *T, s channel.Settings) (channel.Interceptor, error) {
	h, spec, err := p.Host(t, s)
	if err != nil {
		return nil, err
	}
	return h.Interceptor(spec, s)
}

// Configure implements Configurable. A program checks its options when it
// starts; before that a node has its schema.
func (p *Program) Configure(options []byte, origin string) error {
	schema := p.Schema()
	if schema == nil {
		return errors.New("conformance: the program describes no schema of its options")
	}
	return config.CheckOptions(options, origin, schema)
}

// Schema implements Configurable.
func (p *Program) Schema() []byte {
	d, _, err := p.describe()
	if err != nil {
		return nil
	}
	return d.ConfigSchema
}
