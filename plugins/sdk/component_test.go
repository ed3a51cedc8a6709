package sdk

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
)

type zipConfig struct {
	MinSize int    `yaml:"min_size" default:"1024" validate:"min=1" doc:"smaller bodies are left alone"`
	Key     string `yaml:"key"`
}

func newZip(c zipConfig, _ channel.Settings) (channel.Interceptor, error) {
	if c.Key == "" {
		return nil, errors.New("zip: no key")
	}
	if c.MinSize != 1024 {
		return nil, errors.New("zip: the default is missing")
	}
	f := func(*channel.Message) error { return nil }
	return channel.Transform(channel.Descriptor{Name: "zip", Flag: 0x10000, Mutates: true, Above: []string{"tcp"}}, f, f), nil
}

func newPaint(paintConfig, channel.Settings) (core.Deployer, error) { return &deployer{}, nil }

func runMain(cs []Component, args ...string) (code int, out, complaints string) {
	var o, c bytes.Buffer
	code = run(append([]string{"/bin/zip"}, args...), &o, &c, cs)
	return code, o.String(), c.String()
}

func TestDescribe(t *testing.T) {
	zip := Interceptor("acme/zip", "1.2.0", newZip)
	code, out, complaints := runMain([]Component{zip.Sample("key: x"), Deployer("acme/paint", "3", newPaint)}, "describe")
	if code != 0 || complaints != "" {
		t.Fatalf("code %d, %s", code, complaints)
	}
	dec := json.NewDecoder(strings.NewReader(out))
	dec.DisallowUnknownFields()
	var z, p bridge.Description
	if err := errors.Join(dec.Decode(&z), dec.Decode(&p)); err != nil {
		t.Fatal(err)
	}
	if z.Kind != "interceptor" || z.Name != "acme/zip" || z.Version != "1.2.0" || strings.Join(z.Handles, " ") != "send receive" ||
		z.Flag != 0x10000 || !z.Mutates || len(z.Above) != 1 || len(z.API) != 1 || z.API[0] != bridge.APIVersion {
		t.Errorf("described as %+v", z)
	}
	if s := string(z.ConfigSchema); !strings.Contains(s, "min_size") || !strings.Contains(s, "1024") || !strings.Contains(s, "smaller bodies") {
		t.Errorf("schema %s", s)
	}
	if p.Kind != "deployer" || p.Name != "acme/paint" || len(p.Handles) != 0 {
		t.Errorf("described as %+v", p)
	}
	if code, _, complaints := runMain([]Component{zip}, "describe"); code != 1 || !strings.Contains(complaints, "no key") || !strings.Contains(complaints, "Component.Sample") {
		t.Errorf("without a sample: %d, %s", code, complaints)
	}
}

func TestRunByHand(t *testing.T) {
	zip := Interceptor("acme/zip", "1.2.0", newZip)
	for _, args := range [][]string{nil, {"--help"}, {"plugin", "serve", "interceptor/acme/zip"}} {
		code, out, complaints := runMain([]Component{zip}, args...)
		if code != 1 || out != "" || !strings.Contains(complaints, "a node starts it by itself") || !strings.Contains(complaints, "interceptor acme/zip 1.2.0") || !strings.Contains(complaints, "zip describe") {
			t.Errorf("%q: code %d, printed %q and %q", args, code, out, complaints)
		}
	}
	if code, _, complaints := runMain(nil); code != 1 || !strings.Contains(complaints, "serves nothing") {
		t.Errorf("nothing: %d, %s", code, complaints)
	}
	if code, _, complaints := runMain([]Component{zip, zip}, "describe"); code != 1 || !strings.Contains(complaints, "twice") {
		t.Errorf("twice: %d, %s", code, complaints)
	}
	t.Setenv(bridge.Handshake.MagicCookieKey, bridge.Handshake.MagicCookieValue)
	if code, _, complaints := runMain([]Component{zip}, "plugin", "serve", "interceptor/acme/zap"); code != 1 || !strings.Contains(complaints, "it has: interceptor/acme/zip") {
		t.Errorf("unknown: %d, %s", code, complaints)
	}
}

func TestMistakenTags(t *testing.T) {
	type config struct {
		Size int `yaml:"size" default:"many"`
	}
	c := Interceptor("acme/zip", "1", func(config, channel.Settings) (channel.Interceptor, error) { return nil, nil })
	if code, _, complaints := runMain([]Component{c}, "describe"); code != 1 || !strings.Contains(complaints, "acme/zip") || !strings.Contains(complaints, "size") {
		t.Errorf("%d, %s", code, complaints)
	}
}
