package file

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/discovery"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// replace is what careful programs do.
func replace(t testing.TB, path, text string) {
	t.Helper()
	write(t, path+".new", text)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	dir := t.TempDir()
	s := conformance.Membership(Name, New, func(ip string, peers []string) Config {
		c := Default()
		c.Path = filepath.Join(dir, fmt.Sprint(len(peers), "-", ip))
		c.Notify = false // the system's messages do not come in virtual time
		write(t, c.Path, strings.Join(peers, "\n")+"\n")
		return c
	}, conformance.MembershipTimes{Interval: Default().Frequency, Drop: Default().DropTime}, conformance.FeaturePayload)
	for _, p := range conformance.Run(t, s, conformance.Strict()).Profiles {
		if p.Result != conformance.Conformant {
			t.Errorf("%s is %s: core skipped %v", p.Name, p.Result, p.Core.Skipped)
		}
	}
}

// finds collects what a provider finds.
type finds struct {
	mu   sync.Mutex
	last []string
	n    int
}

func (f *finds) found(peers []discovery.Peer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	f.last = nil
	for _, p := range peers {
		f.last = append(f.last, p.Addr.String())
	}
	slices.Sort(f.last)
}

func (f *finds) get() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.last, " ")
}

// times returns how often something was found.
func (f *finds) times() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

type rig struct {
	*provider
	finds
	metrics *channel.Metrics
	logs    *observer.ObservedLogs
	path    string
	stop    func()
}

// follow runs a provider of the file until the test stops it.
func follow(t *testing.T, nw *channeltest.SimNet, path string, change func(*Config)) *rig {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	r := &rig{metrics: channel.NewMetrics(), logs: logs, path: path}
	c := Default()
	c.Path, c.Notify = path, false
	if change != nil {
		change(&c)
	}
	s := channel.Settings{Metrics: r.metrics, Logger: zap.New(core)}
	if nw != nil {
		s.Net = nw.Node("10.0.0.1")
	}
	r.provider = newProvider(c, s)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { // ends with stop
		defer close(done)
		for ctx.Err() == nil {
			_ = r.Run(ctx, r.found)
			channel.Pause(ctx, time.Second)
		}
	}()
	r.stop = func() { cancel(); <-done }
	return r
}

func (r *rig) refused(reason string) int64 {
	return r.metrics.Counter("file_refused_total", "", "reason", reason).Value()
}

func (r *rig) logged(text string) (n int) {
	for _, l := range r.logs.All() {
		if strings.Contains(fmt.Sprint(l.Message, l.ContextMap()), text) {
			n++
		}
	}
	return n
}

func TestChanges(t *testing.T) {
	dir := t.TempDir()
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		path := filepath.Join(dir, "members")
		r := follow(t, nw, path, nil)
		time.Sleep(10 * time.Second)
		if r.times() != 0 {
			t.Fatal("something was found without a file")
		}
		expect := func(when string, after time.Duration, want string) {
			t.Helper()
			time.Sleep(after)
			if got := r.get(); got != want {
				t.Errorf("%s: %q, want %q", when, got, want)
			}
		}
		write(t, path, "# the nodes\n10.0.0.1\n10.0.0.2:5000 # another port\n\n[fd00::1]:7\nfd00::2\n")
		const first = "10.0.0.1:45565 10.0.0.2:5000 [fd00::1]:7 [fd00::2]:45565"
		expect("at first", 4*time.Second, first)
		replace(t, path, "10.0.0.3\n")
		expect("after a replacement", 3*time.Second, "10.0.0.3:45565")
		if r.times() != 2 {
			t.Errorf("told %d times of 2 lists", r.times())
		}
		// Written by half, in all ways: the last good list stands.
		for _, c := range []struct{ text, reason, says string }{
			{"", "malformed", path + ":1: no member"},
			{"# nothing\n", "malformed", path + ":1: no member"},
			{"10.0.0.1\n10.0.0.", "malformed", path + ":2: "},
			{"10.0.0.1\n10.0.0.2:\n", "malformed", path + ":2: "},
			{"10.0.0.1\n\n10.0.0.2:70000\n", "malformed", path + ":3: "},
			{"fd00::1:\n", "malformed", path + ":1: "},
			{"0.0.0.0\n", "malformed", path + ":1: "},
			{"10.0.0.1 10.0.0.2\n", "malformed", path + ":1: "},
			{"\x00\x00\x00\x00\n", "malformed", path + ":1: "},
			{strings.Repeat("10.0.0.1\n", maxLines+1), "malformed", fmt.Sprintf("%s:%d: ", path, maxLines+1)},
			{strings.Repeat("#", maxFile+1), "unreadable", "at most"},
		} {
			before, said := r.refused(c.reason), r.logged(c.says)
			write(t, path, c.text)
			expect(fmt.Sprintf("%.20q", c.text), 5*time.Second, "10.0.0.3:45565")
			n := r.refused(c.reason) - before
			if c.reason == "malformed" && n != 1 || n < 1 {
				t.Errorf("%.20q: counted %d times", c.text, n)
			}
			if r.logged(c.says) != said+1 {
				t.Errorf("%.20q: no line in the log with %q", c.text, c.says)
			}
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		expect("without the file", time.Hour, "10.0.0.3:45565")
		if n := r.logged("cannot be read"); n > 3 {
			t.Errorf("%d lines in the log of one missing file", n)
		}
		write(t, path, "10.0.0.4\n")
		expect("with a new file", 3*time.Second, "10.0.0.4:45565")
		r.stop()
	})
}

// A file that grows line by line is not read before it rests, and one whose last
// line does not end has to rest for longer.
func TestSettling(t *testing.T) {
	dir := t.TempDir()
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		path := filepath.Join(dir, "members")
		write(t, path, "10.0.0.1\n")
		r := follow(t, nw, path, func(c *Config) { c.Poll, c.Settle = 50*time.Millisecond, time.Second })
		time.Sleep(100 * time.Millisecond)
		text := ""
		for i := range 20 {
			text += fmt.Sprintf("10.0.1.%d\n", i+1)
			write(t, path, text)
			time.Sleep(500 * time.Millisecond)
			if r.times() != 1 {
				t.Fatalf("a file that somebody writes to was read after %d lines", i+1)
			}
		}
		time.Sleep(time.Second)
		if r.times() != 2 || len(strings.Fields(r.get())) != 20 {
			t.Errorf("read %d times, %d members", r.times(), len(strings.Fields(r.get())))
		}
		write(t, path, "10.0.0.1\n10.0.0.2:455")
		time.Sleep(1900 * time.Millisecond)
		if r.times() != 2 {
			t.Error("a file whose last line does not end was read at once")
		}
		time.Sleep(300 * time.Millisecond)
		if r.get() != "10.0.0.1:45565 10.0.0.2:455" {
			t.Errorf("found %q", r.get())
		}
		r.stop()
	})
}

func TestYAML(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ text, want string }{
		{"members: [\"10.0.0.1\", 10.0.0.2:5, node3]\n", "10.0.0.1:7 10.0.0.2:5 node3:7"},
		{"members:\n  - 10.0.0.1\n  - node3:9\n", "10.0.0.1:7 node3:9"},
		{"members: []\n", ""},
		{"members:\n  - 10.0.0.1\n  - 10.0.0.\n", "list.yaml:3: "},
		{"members:\n  - {use: a, x: 1}\n", "list.yaml:2: "},
		{"members:\n  - 10.0.0.1\nmember: x\n", "list.yaml:3"},
		{"members: [a\n", "list.yaml:"},
		{"", "list.yaml:1: "},
		{"nodes: []\n", "list.yaml:1"},
	} {
		list, err := parse(filepath.Join(dir, "list.yaml"), []byte(c.text), 7, ":1")
		var got []string
		for _, m := range list {
			if m.name != "" {
				got = append(got, m.name)
			} else {
				got = append(got, m.addr.String())
			}
		}
		if err != nil {
			if !strings.Contains(err.Error(), c.want) || c.want == "" {
				t.Errorf("%q: %v, want %q", c.text, err, c.want)
			}
		} else if strings.Join(got, " ") != c.want {
			t.Errorf("%q: %q, want %q", c.text, got, c.want)
		}
	}
}

func TestNames(t *testing.T) {
	dir := t.TempDir()
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		path := filepath.Join(dir, "members")
		write(t, path, "one\ntwo:5000\n")
		nw.SetHost("one", "10.0.0.1")
		r := follow(t, nw, path, nil)
		time.Sleep(time.Second)
		if r.get() != "10.0.0.1:45565" {
			t.Errorf("found %q", r.get())
		}
		nw.SetHost("one")
		nw.SetHost("two", "10.0.0.2")
		time.Sleep(35 * time.Second)
		if r.get() != "10.0.0.1:45565 10.0.0.2:5000" {
			t.Errorf("found %q", r.get())
		}
		r.stop()
	})
}

// The system tells of a change: the file is looked at long before the next poll.
func TestNotifications(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "members")
	write(t, path, "10.0.0.1\n")
	r := follow(t, nil, path, func(c *Config) { c.Notify, c.Poll, c.Settle = true, time.Hour, time.Millisecond })
	defer r.stop()
	wait := func(want string) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); r.get() != want; {
			if time.Now().After(end) {
				t.Fatalf("found %q, want %q", r.get(), want)
			}
			time.Sleep(time.Millisecond)
		}
	}
	wait("10.0.0.1:45565")
	write(t, path, "10.0.0.2\n")
	wait("10.0.0.2:45565")
	replace(t, path, "10.0.0.3\n")
	wait("10.0.0.3:45565")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	replace(t, path, "10.0.0.4\n")
	wait("10.0.0.4:45565")
	// As in a mounted ConfigMap: a link to a directory that changes.
	for i, dirName := range []string{"v1", "v2"} {
		if err := os.Mkdir(filepath.Join(dir, dirName), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, dirName, "members"), fmt.Sprintf("10.0.1.%d\n", i))
		if err := os.Symlink(dirName, filepath.Join(dir, "data.new")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "data.new"), filepath.Join(dir, "data")); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(filepath.Join("data", "members"), path); err != nil {
				t.Fatal(err)
			}
		}
		wait(fmt.Sprintf("10.0.1.%d:45565", i))
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		change func(*Config)
		want   string
	}{
		{func(*Config) {}, ""},
		{func(c *Config) { c.Path = "" }, "path: "},
		{func(c *Config) { c.Path = "members" }, "path: "},
		{func(c *Config) { c.Poll = 0 }, "poll: "},
		{func(c *Config) { c.Settle = -1 }, "settle: "},
		{func(c *Config) { c.MaxAddresses = 0 }, "max_addresses: "},
	} {
		cfg := Default()
		cfg.Path = "/members"
		c.change(&cfg)
		err := cfg.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", cfg, err, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"10.0.0.1\n", "node:5 # x\n", "[fd00::1]:7", "members: [a, b:1]\n", "members:\n- {a: 1}\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, path := range []string{"/m", "/m.yaml"} {
			list, err := parse(path, b, 0, ":45565")
			if err != nil {
				if !strings.Contains(err.Error(), path+":") {
					t.Fatalf("the error does not say where: %v", err)
				}
				continue
			}
			if len(list) > maxLines {
				t.Fatalf("%d members", len(list))
			}
			for _, m := range list {
				if m.name == "" && (!m.addr.IsValid() || m.addr.Port() == 0) {
					t.Fatalf("%+v", m)
				}
			}
		}
	})
}
