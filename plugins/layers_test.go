package plugins

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
)

// layersProgram builds testdata/layers once and describes it.
var layersProgram = sync.OnceValues(func() ([]External, error) {
	dir, err := filepath.Abs(filepath.Join("testdata", "layers"))
	if err != nil {
		return nil, err
	}
	if programDir, err = os.MkdirTemp("", "lhtest-"); err != nil {
		return nil, err
	}
	program := filepath.Join(programDir, "layers")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, ".")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, errors.Join(err, errors.New(string(out)))
	}
	return Unpinned(context.Background(), program)
})

func layersHost(t testing.TB, s channel.Settings, change func(*Config)) *Host {
	t.Helper()
	external, err := layersProgram()
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{External: external, DrainGrace: 200 * time.Millisecond, KillGrace: 100 * time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	h, err := NewHost(cfg, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Stop(context.Background()); err != nil {
			t.Errorf("stop of the host: %v", err)
		}
	})
	return h
}

func TestProgramWithTheSDK(t *testing.T) {
	core1, logs := observer.New(zap.WarnLevel)
	s := channel.Settings{Logger: zap.New(core1), Metrics: channel.NewMetrics()}
	h := layersHost(t, s, nil)
	l, err := h.Interceptor(core.PluginSpec{Name: "acme/reverse", Options: []byte("min: 4")}, s)
	if err != nil {
		t.Fatal(err)
	}
	if d := l.Descriptor(); d.Name != "acme/reverse" || d.Flag != 0x20000 || !d.Mutates || len(d.Wants) != 1 || d.Promise != "turns bodies round" {
		t.Errorf("before it is started it is %+v", d)
	}
	if _, ok := l.(channel.MemberHandler); ok {
		t.Error("it handles member events")
	}
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{l}})
	for _, body := range []string{"abc", "abcd"} {
		if err := e.Send(t.Context(), to, []byte(body), channel.SendAck); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(e.Bottom.Bodies(), " "); got != "abc dcba" {
		t.Errorf("sent %q", got)
	}
	st := h.Status()[0]
	if !st.Unpinned || st.PID == 0 || st.Messages != 2 || st.State != stateReady {
		t.Errorf("status %+v", st)
	}
	t.Logf("resident memory of the idle process: %.1f MiB", float64(st.Memory)/(1<<20))
	if logs.FilterMessageSnippet("not pinned").Len() != 1 {
		t.Errorf("warned of with %v", logs.All())
	}
	if err := h.Check(KindInterceptor, core.PluginSpec{Name: "acme/revers"}); err == nil || !strings.Contains(err.Error(), `did you mean "acme/reverse"`) {
		t.Errorf("check: %v", err)
	}
}

func TestProgramThatIsNotWhatWasPinned(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Description)
		want   string
	}{
		"acme/liar":    {func(*Description) {}, "mutates was pinned as false and is true"},
		"acme/reverse": {func(d *Description) { d.Version = "1.2.2" }, "version was pinned as 1.2.2 and is 1.2.3"},
		"acme/crasher": {func(d *Description) { d.Handles = append(d.Handles, "member") }, "handles was pinned as [send receive member] and is [send receive]"},
	} {
		s := channel.Settings{Logger: zap.NewNop()}
		h := layersHost(t, s, func(cfg *Config) {
			list := append([]External(nil), cfg.External...)
			for n := range list {
				if list[n].Name == name {
					c.change(&list[n].Describe)
				}
			}
			cfg.External = list
		})
		l, err := h.Interceptor(core.PluginSpec{Name: name}, s)
		if err != nil {
			t.Fatal(err)
		}
		e, err := channeltest.NewEmbedded(channeltest.EmbedConfig{Layers: []channel.Interceptor{l}})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: started with %v", name, err)
		}
	}
}

// Whatever a plugin does, the node goes on and says which one it was.
func TestHostileLayers(t *testing.T) {
	for name, c := range map[string]struct {
		err  error  // of the message it misbehaves at, nil if that passes
		last string // in LastError of the status, empty if it lives
	}{
		"acme/crasher":  {channel.ErrPluginDown, "crasher: by design"},
		"acme/exiter":   {channel.ErrPluginDown, "exit status 3"},
		"acme/sleeper":  {context.DeadlineExceeded, ""},
		"acme/hog":      {nil, ""},
		"acme/members":  {channel.ErrPluginDown, "announces more than"},
		"acme/repeater": {context.DeadlineExceeded, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			core1, logs := observer.New(zap.WarnLevel)
			s := channel.Settings{Logger: zap.New(core1), Metrics: channel.NewMetrics()}
			h := layersHost(t, s, quickRestarts)
			spec := core.PluginSpec{Name: name, OnDown: core.Wait, Timeout: time.Minute}
			if errors.Is(c.err, context.DeadlineExceeded) {
				spec.Timeout = 2 * time.Second
			}
			l, err := h.Interceptor(spec, s)
			if err != nil {
				t.Fatal(err)
			}
			e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{l}, Discard: true})
			good := func(when string) { // on a busy machine it may take more than one try
				for begin := time.Now(); ; {
					err := e.Send(t.Context(), to, []byte(when), channel.SendAck)
					if err == nil {
						return
					}
					if time.Since(begin) > time.Minute {
						t.Fatalf("a good message %s it: %v", when, err)
					}
				}
			}
			good("before")
			err = e.Send(t.Context(), to, []byte("now"), channel.SendAck)
			if c.err == nil && err != nil || c.err != nil && !errors.Is(err, c.err) && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the message ended with %v", err)
			}
			if err != nil && !strings.Contains(err.Error(), name) {
				t.Errorf("the error does not name the plugin: %v", err)
			}
			good("after")
			st := h.Status()[0]
			if c.last == "" {
				return
			}
			said := st.LastError
			for _, l := range logs.All() {
				said += " " + l.Message
				for _, v := range l.ContextMap() {
					if text, ok := v.(string); ok {
						said += " " + text
					}
				}
			}
			if st.Generation < 2 || !strings.Contains(said, c.last) {
				t.Errorf("status %+v, said %s", st, said)
			}
		})
	}
}
