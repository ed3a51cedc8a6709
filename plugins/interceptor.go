package plugins

import (
	"fmt"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
)

// checkOnDown checks the choices that only interceptors have.
func checkOnDown(kind string, spec core.PluginSpec) error {
	if spec.Window < 0 || spec.WindowBytes < 0 || spec.Timeout < 0 {
		return fmt.Errorf("plugins: window, window_bytes and timeout must not be negative")
	}
	switch spec.OnDown {
	case "", core.Fail, core.Wait, core.Bypass:
	default:
		return fmt.Errorf("plugins: unknown on_down %q (known: %s, %s, %s)", spec.OnDown, core.Fail, core.Wait, core.Bypass)
	}
	if kind != KindInterceptor && spec.OnDown != "" {
		return fmt.Errorf("plugins: on_down is for interceptors, not for a %s", kind)
	}
	return nil
}

// Interceptor implements core.PluginHost.
func (h *Host) Interceptor(spec core.PluginSpec, s channel.Settings) (channel.Interceptor, error) {
	in, err := h.prepare(KindInterceptor, spec, &s)
	if err != nil {
		return nil, err
	}
	make := func() (channel.Interceptor, error) {
		f, err := h.layers.Get(spec.Name)
		if err != nil {
			return nil, err
		}
		return f.New(bridge.Decoder(spec.Options, spec.Origin), s)
	}
	if in.mode == core.Direct {
		l, err := make()
		if err != nil {
			return nil, err
		}
		return l, h.add(in) // its stack stops it
	}
	e, external := h.externals()[in.super.id]
	d := e.Describe
	if !external {
		// Making one has no effects; this one only tells what it is.
		l, err := make()
		if err != nil {
			return nil, err
		}
		d = bridge.DescribeInterceptor(spec.Name, "", l)
	}
	if err := checkDescribed(d, in.super.id, spec); err != nil {
		return nil, err
	}
	in.layer = bridge.NewInterceptor(spec.Name, in.super, in.super.log, bridge.InterceptorConfig{
		Description: d, Check: external,
		OnDown: spec.OnDown, Window: spec.Window, WindowBytes: spec.WindowBytes, Timeout: spec.Timeout,
		Metrics: s.Metrics, Labels: []string{"kind", KindInterceptor, "name", spec.Name, "instance", in.spec.Instance},
	})
	err = h.supervise(in, s, func() (any, error) {
		l, err := make()
		return bridge.ServedInterceptor{Interceptor: l, Description: d}, err
	})
	if err != nil {
		return nil, err
	}
	return in.layer.Layer(), nil
}

// checkDescribed checks a choice against what the plugin is.
func checkDescribed(d Description, id string, spec core.PluginSpec) error {
	if got := d.Kind + "/" + d.Name; got != id {
		return fmt.Errorf("plugins: %s: the program's description is of %q: pin it again", id, got)
	}
	if err := d.Check(); err != nil {
		return fmt.Errorf("plugins: %s: %w", id, err)
	}
	if spec.OnDown == core.Bypass && d.Mutates {
		return fmt.Errorf("plugins: %s: on_down must not be %q: the layer changes messages, and what it is not there to change would be misread or readable; use %q or %q", id, core.Bypass, core.Fail, core.Wait)
	}
	return nil
}

// ended reports whether an instance has been stopped.
func (in *instance) ended() bool {
	if in.super == nil {
		return in.kind == KindInterceptor // nobody would tell
	}
	in.super.mu.Lock()
	defer in.super.mu.Unlock()
	return in.super.state == stateStopped
}
