package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins"
)

// sabotageProgram returns a program that serves the plugin manager/<how>, which
// has one mistake, and manager/plain, which has none. Only the tests of this
// package have one.
var sabotageProgram func(how string) (PluginProgram, error)

func sabotaged(how string) func() (PluginProgram, json.RawMessage, error) {
	return func() (PluginProgram, json.RawMessage, error) {
		if sabotageProgram == nil {
			return PluginProgram{}, nil, errors.New("conformance: the saboteurs of profile plugin are in the package's tests")
		}
		p, err := sabotageProgram(how)
		return p, nil, err
	}
}

// onlyPlugin leaves out the profile of the program's kind.
type onlyPlugin struct{ *process }

func (p onlyPlugin) Describe() (Description, error) {
	d, err := p.process.Describe()
	d.Profiles = []string{ProfilePlugin}
	return d, err
}

// programSaboteurs are programs with a mistake.
func programSaboteurs(hows ...string) []Saboteur {
	var list []Saboteur
	for _, how := range hows {
		list = append(list, Saboteur{Name: strings.ReplaceAll(how, "-", " "), New: func() Subject {
			return onlyPlugin{&process{newHost: goodHost, describe: sabotaged(how)}}
		}})
	}
	return list
}

// hostSaboteur is a good program in a host with a mistake.
func hostSaboteur(name string, wrong func(*plugins.Config)) Saboteur {
	return Saboteur{Name: name, New: func() Subject {
		return onlyPlugin{&process{describe: sabotaged("plain"), newHost: func(c plugins.Config, s channel.Settings) (core.PluginHost, error) {
			wrong(&c)
			return plugins.NewHost(c, s)
		}}}
	}}
}

// bypassSaboteurs are hosts that let messages past a layer.
func bypassSaboteurs() []Saboteur {
	wrong := func(name string, wrap func(core.PluginHost) core.PluginHost) Saboteur {
		return Saboteur{Name: name, New: func() Subject {
			return onlyPlugin{&process{describe: sabotaged("interceptor"), newHost: func(c plugins.Config, s channel.Settings) (core.PluginHost, error) {
				h, err := plugins.NewHost(c, s)
				return wrap(h), err
			}}}
		}}
	}
	return []Saboteur{
		wrong("accepts bypass", func(h core.PluginHost) core.PluginHost { return carelessHost{h} }),
		wrong("sends what the layer has refused", func(h core.PluginHost) core.PluginHost { return leakyHost{h} }),
	}
}

// carelessHost takes any choice.
type carelessHost struct{ core.PluginHost }

func (h carelessHost) Interceptor(spec core.PluginSpec, s channel.Settings) (channel.Interceptor, error) {
	spec.OnDown = core.Fail
	return h.PluginHost.Interceptor(spec, s)
}

// leakyHost makes layers that fail open.
type leakyHost struct{ core.PluginHost }

func (h leakyHost) Interceptor(spec core.PluginSpec, s channel.Settings) (channel.Interceptor, error) {
	i, err := h.PluginHost.Interceptor(spec, s)
	if err != nil {
		return nil, err
	}
	return leaky{i}, nil
}

type leaky struct{ channel.Interceptor }

func (l leaky) HandleSend(ctx context.Context, link channel.Link, m *channel.Message) error {
	if err := l.Interceptor.(channel.SendHandler).HandleSend(ctx, link, m); err != nil {
		return link.Send(ctx, m)
	}
	return nil
}

func (l leaky) HandleReceive(ctx context.Context, link channel.Link, m *channel.Message) error {
	return l.Interceptor.(channel.ReceiveHandler).HandleReceive(ctx, link, m)
}

func (l leaky) Start(ctx context.Context, link channel.Link) error {
	if s, ok := l.Interceptor.(channel.Starter); ok {
		return s.Start(ctx, link)
	}
	return nil
}

func (l leaky) Stop(ctx context.Context) error {
	if s, ok := l.Interceptor.(channel.Stopper); ok {
		return s.Stop(ctx)
	}
	return nil
}

// repinning trusts whatever is there.
func repinning(c *plugins.Config) {
	for i, e := range c.External {
		if digest, err := fileDigest(e.Path); err == nil {
			c.External[i].SHA256 = digest
		}
	}
}
