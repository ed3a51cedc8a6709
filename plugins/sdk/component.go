package sdk

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

// Component is one thing that a program serves. It is made by [Interceptor],
// [Manager], [Membership] or [Deployer].
type Component struct {
	kind, name, version string
	make                maker
	schema              json.RawMessage
	sample              string
	fault               error
}

// Interceptor serves a layer of the channel's stack. Name is "vendor/name". C is
// the struct of its options: defaults, bounds and texts come from the tags of
// its fields (see config.Defaults), and if *C is a channel.Validator it checks
// itself.
func Interceptor[C any](name, version string, make func(C, channel.Settings) (channel.Interceptor, error)) Component {
	c := component("interceptor", name, version, make)
	c.make = described(name, version, c.make)
	return c
}

// Manager serves a session manager; see [Interceptor] for C.
func Manager[C any](name, version string, make func(C, channel.Settings) (core.Manager, error)) Component {
	return component("manager", name, version, make)
}

// Store serves a session manager around a place for sessions: the options of
// the manager (stored.Config) stand beside those of the store, C, whose names
// must be others; see [Interceptor] for C.
func Store[C any](name, version string, make func(C, channel.Settings) (core.Store, error)) Component {
	return component("manager", name, version, func(o storeOptions[C], s channel.Settings) (core.Manager, error) {
		store, err := make(o.Store, s)
		if err != nil {
			return nil, err
		}
		return stored.New(o.Config, store, s)
	})
}

// storeOptions are the options of a manager and its store.
type storeOptions[C any] struct {
	stored.Config `yaml:",inline"`
	Store         C `yaml:",inline"`
}

// Validate implements channel.Validator.
func (o *storeOptions[C]) Validate() error {
	err := o.Config.Validate()
	if v, ok := any(&o.Store).(channel.Validator); ok {
		err = errors.Join(err, v.Validate())
	}
	return err
}

// Membership serves a membership; see [Interceptor] for C.
func Membership[C any](name, version string, make func(C, channel.Settings) (channel.Membership, error)) Component {
	return component("membership", name, version, make)
}

// Deployer serves a deployer; see [Interceptor] for C.
func Deployer[C any](name, version string, make func(C, channel.Settings) (core.Deployer, error)) Component {
	return component("deployer", name, version, make)
}

func component[C, T any](kind, name, version string, make func(C, channel.Settings) (T, error)) Component {
	var defaults C
	c := Component{kind: kind, name: name, version: version}
	if err := config.Defaults(&defaults); err != nil {
		c.fault = err
		return c
	}
	c.schema = config.SchemaOf(&defaults)
	f := channel.FactoryOf(name, defaults, make)
	c.make = func(d channel.Decode, s channel.Settings) (any, error) { return f.New(d, s) }
	return c
}

// Sample sets the options, as YAML, that "describe" makes an interceptor with
// to see what it is. Without it the defaults are taken, so it is only needed
// for layers that cannot be made without options.
func (c Component) Sample(options string) Component {
	c.sample = options
	return c
}

func (c Component) id() string { return c.kind + "/" + c.name }

// describe says what the component is.
func (c Component) describe() (bridge.Description, error) {
	d := bridge.Description{Kind: c.kind, Name: c.name, Version: c.version, API: []int{bridge.APIVersion}}
	if c.fault != nil {
		return d, fmt.Errorf("sdk: %s: %w", c.id(), c.fault)
	}
	if c.kind == "interceptor" {
		made, err := c.makeSample()
		if err != nil {
			return d, fmt.Errorf("sdk: %s: it cannot be made with its default options, to see what it is: %w; give it others with Component.Sample", c.id(), err)
		}
		d = made.(bridge.ServedInterceptor).Description
		if err := d.Check(); err != nil {
			return d, fmt.Errorf("sdk: %s: %w", c.id(), err)
		}
	}
	d.ConfigSchema = c.schema
	return d, nil
}

func (c Component) makeSample() (any, error) {
	network, err := stdnet.NewNet()
	if err != nil {
		return nil, err
	}
	return c.make(bridge.Decoder([]byte(c.sample), "sample"), channel.Settings{
		Name: c.name, Logger: zap.NewNop(), Net: network, Metrics: channel.NewMetrics(),
	})
}

// Main is the whole main function of a plugin program; it does not return. The
// command line says what it does:
//
//	program describe       prints what the program serves, one JSON object each
//	(started by a node)    serves one of the components
//	anything else          explains what the program is, exit code 1
func Main(cs ...Component) {
	os.Exit(run(os.Args, os.Stdout, os.Stderr, cs))
}

func run(args []string, out, complaints io.Writer, cs []Component) int {
	err := checkComponents(cs)
	switch {
	case err != nil:
	case len(args) == 2 && args[1] == "describe":
		err = describe(out, cs)
	case startedByNode():
		err = serveOne(args, cs)
	default:
		err = hint(args, cs)
	}
	if err != nil {
		fmt.Fprintln(complaints, err)
		return 1
	}
	return 0
}

func checkComponents(cs []Component) error {
	if len(cs) == 0 {
		return errors.New("sdk: this program serves nothing: give sdk.Main a component")
	}
	for n, c := range cs {
		if slices.ContainsFunc(cs[:n], func(o Component) bool { return o.id() == c.id() }) {
			return fmt.Errorf("sdk: %s is given to sdk.Main twice", c.id())
		}
		if c.fault != nil {
			return fmt.Errorf("sdk: %s: %w", c.id(), c.fault)
		}
	}
	return nil
}

func describe(out io.Writer, cs []Component) error {
	enc := json.NewEncoder(out)
	for _, c := range cs {
		d, err := c.describe()
		if err != nil {
			return err
		}
		if err := enc.Encode(d); err != nil {
			return fmt.Errorf("sdk: describe: %w", err)
		}
	}
	return nil
}

// serveOne serves the component that the command line names, "plugin serve
// <kind>/<name>", or the only one.
func serveOne(args []string, cs []Component) error {
	want := ""
	if len(args) == 4 && args[1] == "plugin" && args[2] == "serve" {
		want = args[3]
	}
	ids := make([]string, len(cs))
	for n, c := range cs {
		if ids[n] = c.id(); ids[n] == want || want == "" && len(cs) == 1 {
			return serve(c.id(), c.make)
		}
	}
	return fmt.Errorf("sdk: this program does not have what the node asks for, %q (it has: %s)", want, strings.Join(ids, ", "))
}

// hint tells people who start the program by hand what it is.
func hint(args []string, cs []Component) error {
	prog := "plugin"
	if len(args) > 0 {
		prog = filepath.Base(args[0])
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s is a plugin for longhouse; a node starts it by itself. It serves:\n", prog)
	for _, c := range cs {
		fmt.Fprintf(&b, "  %s %s %s\n", c.kind, c.name, c.version)
	}
	fmt.Fprintf(&b, "To see what it is:  %s describe\nTo use it:          longhouse plugin add %s", prog, prog)
	return errors.New(b.String())
}
