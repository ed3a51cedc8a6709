package container_test

import (
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/container"
)

// hostWith is a plugin host that also has an interceptor.
type hostWith struct {
	core.PluginHost
	name string
	made *[]core.PluginSpec
}

func (h hostWith) Names(kind string) []string {
	if kind == "interceptor" {
		return []string{h.name}
	}
	return h.PluginHost.Names(kind)
}

func (h hostWith) Interceptor(spec core.PluginSpec, _ channel.Settings) (channel.Interceptor, error) {
	*h.made = append(*h.made, spec)
	return channel.Transform(channel.Descriptor{Name: h.name, Promise: "marks messages"}, func(*channel.Message) error { return nil }, nil), nil
}

// A layer that no factory makes comes from the plugin host; a factory of the
// same name wins.
func TestInterceptorFromPluginHost(t *testing.T) {
	for _, name := range []string{"acme/mark", "throughput"} {
		var made []core.PluginSpec
		p := parts(t)
		inner := p.Plugins
		p.Plugins = func(s channel.Settings) (core.PluginHost, error) {
			h, err := inner(s)
			return hostWith{h, name, &made}, err
		}
		host := ""
		if name == "acme/mark" {
			host = "        on_down: wait\n        timeout: 2s\n        window_bytes: 1MiB\n"
		}
		cfg := read(t, "cluster:\n  channel:\n    interceptors:\n      - use: "+name+"\n        interval: 5\n"+host+"      - failuredetector\n")
		cfg.Normalize()
		text, err := container.Explain(cfg, p)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(text, name) {
			t.Errorf("%s is not in the stack:\n%s", name, text)
		}
		for _, problem := range container.Check(t.Context(), cfg, p) {
			t.Error(problem)
		}
		if name == "throughput" {
			if len(made) > 0 {
				t.Error("the plugin was made in place of the built-in")
			}
			continue
		}
		if len(made) != 2 || made[0].Origin != "test.yaml:4:9" || !strings.Contains(string(made[0].Options), "interval") ||
			strings.Contains(string(made[0].Options), "on_down") || made[0].OnDown != core.Wait || made[0].Timeout != 2*time.Second || made[0].WindowBytes != 1<<20 {
			t.Errorf("made %+v", made)
		}
	}
}
