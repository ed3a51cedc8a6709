package conformance

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins"
)

// InterceptorSubject is an interceptor in all its forms.
type InterceptorSubject interface {
	Subject
	// Interceptor makes an instance that runs where t.Mode says. What it needs
	// beside the instance ends with t.
	Interceptor(t *T, s channel.Settings) (channel.Interceptor, error)
}

// Configurable is a subject with a configuration.
type Configurable interface {
	// Configure makes an instance from options as YAML, of which origin says
	// where they stand, and throws it away.
	Configure(options []byte, origin string) error
	// Schema is the JSON schema of the options; nil if there is none.
	Schema() []byte
}

// The features of interceptors. They follow from the descriptor.
const (
	// FeatureTransforming: bodies differ on the wire (Descriptor.Mutates).
	FeatureTransforming = "transforming"
	// FeatureStateful: keeps state between messages (Descriptor.Stateful).
	FeatureStateful = "stateful"
	// FeatureFailureDetecting: provides channel.PropCheckedRemoval.
	FeatureFailureDetecting = "failure-detecting"
	// FeatureOrdering: provides channel.PropOrder.
	FeatureOrdering = "ordering"
	// FeatureEncrypting: provides channel.PropEncryption.
	FeatureEncrypting = "encrypting"
	// FeatureFilteringView: implements channel.ViewFilter.
	FeatureFilteringView = "filtering-view"
)

// interceptorFeatures derives the features from what a layer is.
func interceptorFeatures(d channel.Descriptor, i channel.Interceptor) []string {
	var list []string
	add := func(yes bool, f string) {
		if yes {
			list = append(list, f)
		}
	}
	_, filters := i.(channel.ViewFilter)
	add(d.Mutates, FeatureTransforming)
	add(d.Stateful, FeatureStateful)
	add(filters, FeatureFilteringView)
	for _, p := range d.Provides {
		switch p {
		case channel.PropCheckedRemoval:
			p = FeatureFailureDetecting
		case channel.PropOrder:
			p = FeatureOrdering
		case channel.PropEncryption:
			p = FeatureEncrypting
		}
		add(true, p)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// interceptor is a compiled-in subject.
type interceptor struct {
	factory channel.Factory[channel.Interceptor]
	// new makes an instance of the configuration to try.
	new    func(channel.Settings) (channel.Interceptor, error)
	config json.RawMessage
	schema []byte
	// least are the options of the configuration to try, without which there
	// may be none; empty if there are good defaults.
	least []byte
}

// Interceptor is the subject of an interceptor's constructor. The checks run on
// instances of cfg; its tags are taken for the defaults and the schema.
func Interceptor[C any, I channel.Interceptor](newFn func(C, channel.Settings) (I, error), cfg C) Subject {
	make := func(c C, s channel.Settings) (channel.Interceptor, error) {
		i, err := newFn(c, s)
		if err != nil {
			return nil, err
		}
		return i, nil
	}
	var defaults C
	fault := config.Defaults(&defaults)
	f := channel.FactoryOf("subject", defaults, make)
	if fault != nil {
		f.Check = func(channel.Decode) error { return fault }
		f.New = func(channel.Decode, channel.Settings) (channel.Interceptor, error) { return nil, fault }
	}
	return &interceptor{
		factory: f,
		new:     func(s channel.Settings) (channel.Interceptor, error) { return make(cfg, s) },
		config:  configJSON(cfg),
		schema:  config.SchemaOf(&defaults),
	}
}

// InterceptorOf is the subject of a factory, with options as YAML: those that
// have no default, a key for example, and others.
func InterceptorOf(f channel.Factory[channel.Interceptor], options string) Subject {
	return &interceptor{
		factory: f,
		least:   []byte(options),
		new: func(s channel.Settings) (channel.Interceptor, error) {
			return f.New(decoder([]byte(options), "options"), s)
		},
	}
}

// decoder decodes options strictly, as a node does.
func decoder(options []byte, origin string) channel.Decode {
	return func(into any) error {
		if len(options) == 0 {
			return nil
		}
		return config.Decode(options, origin, into)
	}
}

// plainSettings are enough to make an instance, not to run it.
func plainSettings() (channel.Settings, error) {
	n, err := stdnet.NewNet()
	if err != nil {
		return channel.Settings{}, fmt.Errorf("conformance: network: %w", err)
	}
	return channel.Settings{Name: "subject", Logger: zap.NewNop(), Net: n, Metrics: channel.NewMetrics()}, nil
}

// Describe implements Subject.
func (s *interceptor) Describe() (Description, error) {
	settings, err := plainSettings()
	if err != nil {
		return Description{}, err
	}
	i, err := s.new(settings)
	if err != nil {
		return Description{}, err
	}
	d := i.Descriptor()
	details, err := json.Marshal(struct {
		Descriptor channel.Descriptor `json:"descriptor"`
		Config     json.RawMessage    `json:"config,omitempty"`
	}{d, s.config})
	if err != nil {
		return Description{}, err
	}
	return Description{
		Kind: ProfileInterceptor, Name: d.Name, Features: interceptorFeatures(d, i), Details: details,
		Modes: []core.PluginMode{core.Direct, core.Bridged},
	}, nil
}

// Interceptor implements InterceptorSubject.
func (s *interceptor) Interceptor(t *T, settings channel.Settings) (channel.Interceptor, error) {
	if t.Mode == core.Direct {
		return s.new(settings)
	}
	d, err := s.Describe()
	if err != nil {
		return nil, err
	}
	// The configuration is a Go value already: the options are left empty.
	f := core.InterceptorFactory{
		Name: d.Name, Source: "subject",
		Check: func(channel.Decode) error { return nil },
		New:   func(_ channel.Decode, settings channel.Settings) (channel.Interceptor, error) { return s.new(settings) },
	}
	h, err := t.PluginHost(plugins.Config{Interceptors: []core.InterceptorFactory{f}}, settings)
	if err != nil {
		return nil, err
	}
	return h.Interceptor(core.PluginSpec{Name: d.Name, Mode: t.Mode}, settings)
}

// Configure implements Configurable.
func (s *interceptor) Configure(options []byte, origin string) error {
	settings, err := plainSettings()
	if err != nil {
		return err
	}
	if len(options) == 0 {
		options = s.least
	}
	d := decoder(options, origin)
	if err := s.factory.Check(d); err != nil {
		return err
	}
	_, err = s.factory.New(d, settings)
	return err
}

// Schema implements Configurable.
func (s *interceptor) Schema() []byte { return s.schema }
