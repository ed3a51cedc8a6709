package encrypt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/secret"
)

const (
	keyA = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	keyB = "abcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcd"
)

func native1(key string, old ...string) Config {
	c := Defaults
	c.Key = secret.New(key)
	for _, k := range old {
		c.OldKeys = append(c.OldKeys, secret.New(k))
	}
	return c
}

func tomcat1(dialect, algorithm, key string, old ...string) Config {
	c := native1(key, old...)
	c.Dialect, c.Algorithm = dialect, algorithm
	return c
}

// node is an embedded channel with an encrypting layer.
type node struct {
	*channeltest.Embedded
	metrics *channel.Metrics
	logs    *observer.ObservedLogs
	got     *got
}

// got keeps the last message that was delivered, and how many there were. Its
// owner waits for the messages it receives.
type got struct {
	n    int
	last channel.Message
}

func (g *got) handle(m *channel.Message) (bool, error) {
	g.n, g.last = g.n+1, channeltest.Clone(m)
	return true, nil
}

// newNode starts a node with the id of the n-th member.
func newNode(t testing.TB, n int, c Config) *node {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	s := channel.Settings{Metrics: channel.NewMetrics(), Logger: zap.New(core)}
	x, err := New(c, s)
	if err != nil {
		t.Fatal(err)
	}
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{
		Layers: []channel.Interceptor{x}, Settings: s, Local: channel.Member{ID: channeltest.Member(n).ID},
	})
	got := new(got)
	e.Top.Reply = got.handle
	return &node{e, s.Metrics, logs, got}
}

func (n *node) refused(r reason) int64 {
	return n.metrics.Counter("encrypt_refused_total", "", "reason", string(r)).Value()
}

// encrypt returns the message that n puts on the wire.
func (n *node) encrypt(t testing.TB, body string, o channel.Options, to ...channel.Member) *channel.Message {
	t.Helper()
	var out channel.Message
	n.OnSend(func(_ context.Context, m *channel.Message) error {
		out = channeltest.Clone(m)
		return nil
	})
	if err := n.Send(t.Context(), to, []byte(body), o); err != nil {
		t.Fatal(err)
	}
	n.OnSend(nil)
	out.To = nil
	return &out
}

// take gives n a copy of a message and says how it was refused, if it was.
func (n *node) take(t testing.TB, m *channel.Message) reason {
	t.Helper()
	before, got := map[reason]int64{}, n.got.n
	for r := range explain {
		before[r] = n.refused(r)
	}
	c := channeltest.Clone(m)
	err := n.Receive(t.Context(), &c)
	var found reason
	for r, b := range before {
		switch n.refused(r) - b {
		case 0:
		case 1:
			if found != "" {
				t.Errorf("refused as %s and %s", found, r)
			}
			found = r
		default:
			t.Errorf("counted %d times as %s", n.refused(r)-b, r)
		}
	}
	delivered := n.got.n - got
	if (found == "") != (delivered == 1) || delivered > 1 {
		t.Errorf("refused as %q, delivered %d times", found, delivered)
	}
	if found != "" && err != nil && !errors.Is(err, channel.ErrBadMessage) {
		t.Errorf("refused with %v", err)
	}
	return found
}

func (n *node) last() channel.Message { return n.got.last }

// all are a configuration of every dialect and algorithm.
func all() []Config {
	list := []Config{native1(keyA)}
	for _, d := range dialects[1:] {
		for _, a := range []string{"", "AES/GCM/NoPadding", "AES/CBC/PKCS5Padding", "AES/CFB/PKCS5Padding", "AES/OFB/PKCS5Padding"} {
			for _, size := range []int{32, 48, 64} {
				list = append(list, tomcat1(d, a, keyA[:size]))
			}
		}
	}
	return list
}

func name(c Config) string {
	return strings.ReplaceAll(fmt.Sprintf("%s_%s_%d", c.Dialect, c.Algorithm, 4*len(c.Key.Reveal())), "/", "-")
}

func TestRoundTrips(t *testing.T) {
	sizes := []int{0, 1, 7, 8, 15, 16, 17, 1000, 1 << 16, 1 << 20}
	for _, c := range all() {
		t.Run(name(c), func(t *testing.T) {
			a, b := newNode(t, 1, c), newNode(t, 2, c)
			for _, size := range sizes {
				body := strings.Repeat("x", size)
				o := channel.SendAck | channel.ThirdPartyMax
				m := a.encrypt(t, body, o, b.Local())
				if size > 15 && bytes.Contains(m.Body, []byte(body[:16])) {
					t.Fatal("the clear text is on the wire")
				}
				if r := b.take(t, m); r != "" {
					t.Fatalf("%d bytes: refused as %s", size, r)
				}
				if got := b.last(); string(got.Body) != body || got.Options != o || got.ID != m.ID || got.From != m.From || got.Time != m.Time {
					t.Errorf("%d bytes: got %d bytes, %+v", size, len(got.Body), got.Options)
				}
			}
			one, two := a.encrypt(t, "the same", channel.SendNone, b.Local()), a.encrypt(t, "the same", channel.SendNone, b.Local())
			if bytes.Equal(one.Body, two.Body) {
				t.Error("one text was encrypted to the same bytes twice")
			}
			// A fresh node reads what has been stored for it.
			if r := newNode(t, 2, c).take(t, one); r != "" && c.Dialect != DialectLonghouse {
				t.Errorf("a fresh node: %s", r)
			}
		})
	}
}

// Whatever is changed on the wire, nothing goes up. GCM covers the body, our
// own dialect sender, id, time and options, too.
func TestChangesAreNoticed(t *testing.T) {
	for _, c := range []Config{native1(keyA), tomcat1(DialectTomcat58, "", keyA), tomcat1(DialectTomcat55, "AES/GCM/NoPadding", keyA)} {
		t.Run(name(c), func(t *testing.T) {
			a, b := newNode(t, 1, c), newNode(t, 2, c)
			m := a.encrypt(t, "forty-two bytes that nobody may change now", channel.SendNone, b.Local())
			for i := range m.Body {
				x := channeltest.Clone(m)
				x.Body[i] ^= 1 << (i % 8)
				if r := b.take(t, &x); r == "" {
					t.Errorf("byte %d changed: delivered", i)
				}
			}
			for n := range m.Body {
				x := channeltest.Clone(m)
				x.Body = x.Body[:n]
				if r := b.take(t, &x); r == "" {
					t.Errorf("cut to %d bytes: delivered", n)
				}
			}
			if c.Dialect == DialectLonghouse {
				for what, change := range map[string]func(x *channel.Message){
					"sender": func(x *channel.Message) { x.From.ID[0] ^= 1 },
					"id":     func(x *channel.Message) { x.ID[15] ^= 1 },
					"time":   func(x *channel.Message) { x.Time++ },
				} {
					x := channeltest.Clone(m)
					change(&x)
					if r := b.take(t, &x); r != forged {
						t.Errorf("another %s: %q", what, r)
					}
				}
				x := channeltest.Clone(m)
				x.Options = channel.ByteMessage | channel.Gzip | channel.ThirdPartyMin
				if r := b.take(t, &x); r != "" || b.last().Options != channel.SendNone {
					t.Errorf("other options: %q, delivered with %v", r, b.last().Options)
				}
			} else if r := b.take(t, m); r != "" {
				t.Errorf("unchanged: %s", r)
			}
			if n := len(b.logs.All()); n > 6 {
				t.Errorf("%d log lines", n)
			}
			for _, line := range b.logs.All() {
				if fields := line.ContextMap(); fields["member"] == nil {
					t.Errorf("%q names no member", line.Message)
				}
			}
		})
	}
}

// IC-12
func TestKeys(t *testing.T) {
	for _, c := range []struct{ a, b Config }{
		{native1(keyA), native1(keyB)},
		{tomcat1(DialectTomcat58, "", keyA), tomcat1(DialectTomcat58, "", keyB)},
		{tomcat1(DialectTomcat56, "", keyA), tomcat1(DialectTomcat56, "", keyB)},
		{native1(keyA), tomcat1(DialectTomcat58, "", keyA)},
		{tomcat1(DialectTomcat58, "", keyA), native1(keyA)},
	} {
		a, b := newNode(t, 1, c.a), newNode(t, 2, c.b)
		for i := range 100 {
			if r := b.take(t, a.encrypt(t, fmt.Sprint("body ", i), channel.SendNone, b.Local())); r == "" {
				t.Errorf("%s > %s: delivered", name(c.a), name(c.b))
			}
		}
		if r := b.take(t, &channel.Message{ID: channel.NewUniqueID(), From: a.Local(), Body: []byte("not encrypted at all, and long enough")}); r == "" {
			t.Errorf("%s: plain text was delivered", name(c.b))
		}
	}
}

// A key is replaced node by node, and no message is lost at any moment.
func TestRotation(t *testing.T) {
	for _, make := range []func(key string, old ...string) Config{
		native1,
		func(key string, old ...string) Config { return tomcat1(DialectTomcat58, "", key, old...) },
		func(key string, old ...string) Config { return tomcat1(DialectTomcat56, "", key, old...) },
	} {
		steps := []Config{make(keyA), make(keyA, keyB), make(keyB, keyA), make(keyB)}
		for from := range steps {
			for _, to := range []int{from - 1, from, from + 1} {
				if to < 0 || to >= len(steps) {
					continue
				}
				a, b := newNode(t, 1, steps[from]), newNode(t, 2, steps[to])
				for i := range 600 { // padding of another key fits once in 256
					if r := b.take(t, a.encrypt(t, fmt.Sprint(i), channel.SendNone, b.Local())); r != "" {
						t.Fatalf("%s, step %d > %d: %s", steps[0].Dialect, from+1, to+1, r)
					}
				}
			}
		}
		a, b := newNode(t, 1, steps[1]), newNode(t, 2, steps[3])
		if b.take(t, a.encrypt(t, "x", channel.SendNone, b.Local())) == "" {
			t.Error("a key that is not valid any more was taken")
		}
	}
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil { // whatever the umask
			t.Fatal(err)
		}
		return p
	}
	withFile := func(p string) func(*Config) {
		return func(c *Config) { c.Key, c.KeyFile = secret.Text{}, p }
	}
	for _, c := range []struct {
		name   string
		change func(*Config)
		want   string // in the error; empty for none
	}{
		{"good", func(*Config) {}, ""},
		{"no key", func(c *Config) { c.Key = secret.Text{} }, "there is no key"},
		{"IC-12 short", func(c *Config) { c.Key = secret.New("hunter2hunter2") }, "number 1 has 14 bytes, at least 16"},
		{"IC-12 Tomcat, length", func(c *Config) { c.Dialect, c.Key = DialectTomcat58, secret.New(keyA[:40]) }, "has 20 bytes, AES takes 16, 24 or 32"},
		{"IC-12 Tomcat, not hexadecimal", func(c *Config) { c.Dialect, c.Key = DialectTomcat56, secret.New("hunter2hunter2hunter2hunter2hunt") }, "is not hexadecimal"},
		{"dialect", func(c *Config) { c.Dialect = "tomcat" }, "dialect: \"tomcat\" is none of"},
		{"algorithm of ours", func(c *Config) { c.Algorithm = "AES/GCM/NoPadding" }, "has only its own"},
		{"window", func(c *Config) { c.ReplayWindow = 10_000 }, "replay_window is 10000"},
		{"time", func(c *Config) { c.ReplayTime = 0 }, "replay_time is 0s"},
		{"count", func(c *Config) { c.ReplayMessages = 0 }, "replay_messages is 0"},
		{"twice", func(c *Config) { c.OldKeys = []secret.Text{c.Key} }, "number 2 is the same as number 1"},
		{"only old", func(c *Config) { c.OldKeys, c.Key = []secret.Text{c.Key}, secret.Text{} }, "no key to use"},
		{"undecidable", func(c *Config) { c.Dialect, c.OldKeys = DialectTomcat55, []secret.Text{secret.New(keyB)} }, "nothing tells which key"},
		{"file", withFile(file("good", "# of the cluster\n"+keyA+"\n\n"+keyB+"\n", 0o600)), ""},
		{"file for the group", withFile(file("group", keyA, 0o640)), ""},
		{"CO-13", withFile(file("open", keyA, 0o644)), "can be read by everybody on this machine (mode 0644): chmod 600"},
		{"empty file", withFile(file("empty", "# nothing\n", 0o600)), "is empty"},
		{"no file", withFile(filepath.Join(dir, "none")), "no such file"},
		{"folder", withFile(dir), "no regular file"},
		{"large file", withFile(file("large", strings.Repeat("x", 70_000), 0o600)), "larger than"},
		{"both", func(c *Config) { c.KeyFile = "x" }, "key and key_file are both set"},
	} {
		cfg := native1(keyA)
		c.change(&cfg)
		err := cfg.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if _, err2 := New(cfg, channel.Settings{}); (err2 == nil) != (err == nil) {
			t.Errorf("%s: New: %v", c.name, err2)
		}
		if text := fmt.Sprintf("%v %+v %#v %s %v", cfg, cfg, &cfg, cfg.Key, err); strings.Contains(text, "hunter2") || strings.Contains(text, keyA[:40]) {
			t.Errorf("%s: a secret is shown: %s", c.name, text)
		}
	}
	a, b := native1(keyA, keyB), native1("")
	withFile(file("two", keyA+"\n"+keyB, 0o600))(&b)
	x, y := newNode(t, 1, a), newNode(t, 2, b)
	if r := y.take(t, x.encrypt(t, "x", channel.SendNone, y.Local())); r != "" {
		t.Errorf("key and key_file: %s", r)
	}
}

// IC-17
func TestMustBeAboveAFailureDetector(t *testing.T) {
	x, err := New(native1(keyA), channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	detector := channel.Transform(channel.Descriptor{Name: "failuredetector", Below: []string{channel.UnmarkedTransforms}, Provides: []string{channel.PropCheckedRemoval}},
		nil, func(*channel.Message) error { return nil })
	_, err = channel.NewStack(channel.Layer{Interceptor: detector, Origin: "node.yaml:3"}, channel.Layer{Interceptor: x, Origin: "node.yaml:4"})
	if want := `"failuredetector" (node.yaml:3) must stand below "encrypt" (node.yaml:4)`; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %s", err, want)
	}
	if _, err := channel.NewStack(channel.Layer{Interceptor: x}, channel.Layer{Interceptor: detector}); err != nil {
		t.Errorf("the right order: %v", err)
	}
}

// IC-13
func TestReplays(t *testing.T) {
	for _, c := range []Config{native1(keyA), tomcat1(DialectTomcat58, "", keyA), tomcat1(DialectTomcat56, "", keyA)} {
		synctest.Test(t, func(t *testing.T) {
			a, b := newNode(t, 1, c), newNode(t, 2, c)
			m := a.encrypt(t, "pay 100", channel.SendNone, b.Local())
			if r := b.take(t, m); r != "" {
				t.Fatal(r)
			}
			again := func(when string) {
				t.Helper()
				if r := b.take(t, m); r == "" {
					t.Errorf("%s, %s: delivered again", c.Dialect, when)
				}
				x := channeltest.Clone(m)
				x.From = channeltest.Member(9)
				if r := b.take(t, &x); r == "" {
					t.Errorf("%s, %s: delivered again from another member", c.Dialect, when)
				}
				x.From = m.From
				x.From.Host, x.From.Port = channeltest.Member(9).Host, 4009
				if r := b.take(t, &x); r == "" {
					t.Errorf("%s, %s: delivered again from another address", c.Dialect, when)
				}
			}
			again("at once")
			time.Sleep(9 * time.Second)
			again("within the window")
			for range 1000 {
				if r := b.take(t, a.encrypt(t, "more", channel.SendNone, b.Local())); r != "" {
					t.Fatal(r)
				}
			}
			again("after other messages")
			time.Sleep(time.Hour)
			again("an hour later")
		})
	}
}

// IC-14: a node that has been started again is another member, and what was
// encrypted for its earlier self is not for it.
func TestReplayAfterARestart(t *testing.T) {
	c := native1(keyA)
	a, b, other := newNode(t, 1, c), newNode(t, 2, c), newNode(t, 3, c)
	to := []channel.Member{channeltest.Member(7), b.Local(), channeltest.Member(8)}
	m := a.encrypt(t, "pay 100", channel.SendNone, to...)
	if r := b.take(t, m); r != "" {
		t.Fatal(r)
	}
	if r := newNode(t, 4, c).take(t, m); r != elsewhere {
		t.Errorf("after a restart: %q", r)
	}
	if r := other.take(t, m); r != elsewhere {
		t.Errorf("at a node that was not addressed: %q", r)
	}
	// A layer that takes the place of another one in a running node goes on
	// with what that one knew.
	if r := newNode(t, 2, native1(keyA, keyB)).take(t, m); r != replayed {
		t.Errorf("after a change of the stack: %q", r)
	}
	b.Observe(channel.MemberLeft, a.Local())
	if r := b.take(t, m); r != replayed {
		t.Errorf("after its sender has left: %q", r)
	}
	// A datagram to the group is for everybody who is in the view.
	a.Observe(channel.MemberAdded, channeltest.Member(3)) // the id of other
	if !a.Top.WaitFor(t.Context(), func() bool { return a.View().Has(channeltest.Member(3)) }) {
		t.Fatal("not in the view")
	}
	m = a.encrypt(t, "to all", channel.SendNone|channel.Multicast, b.Local())
	for _, n := range []*node{b, other} {
		if r := n.take(t, m); r != "" {
			t.Errorf("a message to the group: %q", r)
		}
	}
}

// IC-15: good traffic passes, whatever the sender's clock says, however fast it
// sends, and in any order within the window.
func TestGoodTrafficPasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := native1(keyA)
		c.ReplayWindow = 8192
		a, b := newNode(t, 1, c), newNode(t, 2, c)
		var all []*channel.Message
		rng := rand.New(rand.NewPCG(1, 2))
		for range 20_000 {
			all = append(all, a.encrypt(t, "x", channel.SendNone, b.Local()))
		}
		for i := 0; i < len(all); i += 8000 {
			part := all[i:min(i+8000, len(all))]
			rng.Shuffle(len(part), func(i, j int) { part[i], part[j] = part[j], part[i] })
		}
		for i, m := range all {
			if err := b.Receive(t.Context(), m); err != nil {
				t.Fatalf("message %d: %v", i, err)
			}
		}
		time.Sleep(24 * time.Hour) // this clock and the sender's differ by a day
		late := a.encrypt(t, "late", channel.SendNone, b.Local())
		time.Sleep(24 * time.Hour)
		if r := b.take(t, late); r != "" {
			t.Errorf("a message that took a day: %s", r)
		}
	})
	// In the dialects of Tomcat within its window of time.
	synctest.Test(t, func(t *testing.T) {
		c := tomcat1(DialectTomcat58, "", keyA)
		a, b := newNode(t, 1, c), newNode(t, 2, c)
		var all []*channel.Message
		for i := range 20_000 {
			if i%4 == 0 {
				time.Sleep(time.Millisecond)
			}
			all = append(all, a.encrypt(t, "x", channel.SendNone, b.Local()))
		}
		for _, m := range slices.Backward(all) {
			if err := b.Receive(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// Clocks that differ too much are noticed, in the dialects of Tomcat.
func TestReplayWindowRejectsOldMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := tomcat1(DialectTomcat58, "", keyA)
		a, b := newNode(t, 1, c), newNode(t, 2, c)
		m := a.encrypt(t, "x", channel.SendNone, b.Local())
		time.Sleep(10*time.Second + time.Millisecond)
		if r := b.take(t, m); r != wrongTime {
			t.Errorf("got %q", r)
		}
		m = a.encrypt(t, "x", channel.SendNone, b.Local())
		time.Sleep(10 * time.Second)
		if r := b.take(t, m); r != "" {
			t.Errorf("just in time: %q", r)
		}
	})
}

func TestVectorMemory(t *testing.T) {
	at := func(b byte) (v [blockSize]byte) { v[0] = b; return v }
	v := vectors{window: 1000, limit: 2}
	for i, c := range []struct {
		vector byte
		stamp  int64
		want   reason
	}{
		{1, 5000, ""}, {2, 4500, ""}, {1, 5000, replayed},
		{3, 5100, ""},                                       // pushes out the oldest by its time, which is not the first that came
		{1, 5000, replayed},                                 // still known
		{2, 4500, tooOld}, {4, 4500, tooOld}, {4, 4501, ""}, // pushes itself out
		{5, 4501, tooOld}, {6, 6001, wrongTime}, {6, 3999, wrongTime}, {6, 6000, ""},
	} {
		if got := v.mark(at(c.vector), c.stamp, 5000); got != c.want {
			t.Errorf("step %d: %q, want %q", i+1, got, c.want)
		}
	}
	if len(v.known) != 2 || len(v.queue) != 2 {
		t.Errorf("%d known, %d queued", len(v.known), len(v.queue))
	}
	if v.mark(at(9), 20_000, 20_000) != "" || len(v.known) != 1 || len(v.queue) != 1 {
		t.Errorf("after the window: %d known, %d queued", len(v.known), len(v.queue))
	}
}

// TestWindow compares the window with a set of everything that has come.
func TestWindow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 8192
		m := &memory{epochs: map[epochID]*epoch{}}
		var id epochID
		seen, top := map[uint64]bool{}, uint64(0)
		aead, err := newAEAD(secret.Key{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(1, 300).Draw(t, "n") {
			base := int64(top) + rapid.Int64Range(-9000, 9000).Draw(t, "step")
			if rapid.IntRange(0, 20).Draw(t, "jump") == 0 {
				base += 1 << rapid.IntRange(1, 50).Draw(t, "by")
			}
			c := uint64(max(1, base))
			got := m.mark(m.get(id), id, aead, c, size)
			switch {
			case got == "" && seen[c]:
				t.Fatalf("%d twice", c)
			case got == replayed && !seen[c]:
				t.Fatalf("%d refused as repeated", c)
			case got == tooOld && c+size-64 > top:
				t.Fatalf("%d refused as too old, at %d", c, top)
			case got != "" && got != replayed && got != tooOld:
				t.Fatal(got)
			}
			if got == "" {
				seen[c] = true
				top = max(top, c)
			}
		}
	})
}

func TestMemoryIsBounded(t *testing.T) {
	m := &memory{epochs: map[epochID]*epoch{}}
	aead, err := newAEAD(secret.Key{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	id := func(i int) epochID { return epochID{byte(i), byte(i >> 8), byte(i >> 16)} }
	mark := func(i int, c uint64) reason { return m.mark(m.get(id(i)), id(i), aead, c, 8192) }
	const n = maxEpochs + 500
	for i := range n {
		if r := mark(i, 10); r != "" {
			t.Fatal(r)
		}
		mark(0, 100+uint64(i)) // stays in use
	}
	full := 0
	for _, e := range m.epochs {
		if e.aead != nil {
			full++
		}
	}
	if full > maxEpochs+1 {
		t.Errorf("%d windows", full)
	}
	if m.get(id(0)).aead == nil {
		t.Error("the window of a busy sender was given up")
	}
	if m.get(id(1)).aead != nil {
		t.Fatal("the window of the oldest sender was kept")
	}
	// Of what was given up the highest counter is still known.
	for _, c := range []struct {
		counter uint64
		want    reason
	}{{10, tooOld}, {9, tooOld}, {12, ""}, {11, ""}, {11, replayed}, {10, tooOld}} {
		if r := mark(1, c.counter); r != c.want {
			t.Errorf("%d: %q, want %q", c.counter, r, c.want)
		}
	}
}

func TestAnotherEpochBegins(t *testing.T) {
	c := native1(keyA)
	x, err := New(c, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	a := &node{Embedded: channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{x}}), metrics: channel.NewMetrics()}
	b := newNode(t, 2, c)
	x.d.(*native).current.Load().counter.Store(maxPerEpoch - 10)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 10 {
				if err := a.Send(t.Context(), []channel.Member{b.Local()}, []byte("x"), channel.SendNone); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	epochs := map[string]bool{}
	for _, m := range a.Bottom.Messages() {
		epochs[string(m.Body[:counterAt])] = true
		if r := b.take(t, &m); r != "" {
			t.Fatal(r)
		}
	}
	if len(epochs) != 2 {
		t.Errorf("%d epochs", len(epochs))
	}
}

// Completions are told once, of the message that the layer above has sent.
func TestCompletions(t *testing.T) {
	a := newNode(t, 1, native1(keyA))
	to := []channel.Member{channeltest.Member(2)}
	a.Hold()
	var told channeltest.Recorder
	for range 50 {
		if err := a.SendDone(t.Context(), to, []byte("held"), channel.SendAck, &told); err != nil {
			t.Fatal(err)
		}
	}
	bodies := a.Bottom.Bodies()
	if n := a.Finish(channel.ErrAckTimeout); n != 50 {
		t.Errorf("%d held", n)
	}
	for _, r := range told.Results() {
		if !errors.Is(r.Err, channel.ErrAckTimeout) {
			t.Errorf("told %v", r.Err)
		}
	}
	slices.Sort(bodies)
	if n := len(slices.Compact(bodies)); n != 50 || len(told.Results()) != 50 {
		t.Errorf("%d bodies, %d completions", n, len(told.Results()))
	}
	a.OnSend(func(context.Context, *channel.Message) error { panic("below") })
	if err := a.Send(t.Context(), to, []byte("x"), channel.SendAck); !errors.Is(err, channel.ErrPanic) {
		t.Errorf("a panic below: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	var layers []dialect
	var nodes []*node
	for _, c := range []Config{native1(keyA, keyB), tomcat1(DialectTomcat58, "", keyA, keyB), tomcat1(DialectTomcat56, "AES/CFB/PKCS5Padding", keyA), tomcat1(DialectTomcat55, "", keyA)} {
		n := newNode(f, 1, c)
		f.Add(n.encrypt(f, "a seed", channel.SendNone, n.Local()).Body)
		c.ReplayTime = 24 * time.Hour
		x, err := New(c, channel.Settings{})
		if err != nil {
			f.Fatal(err)
		}
		if err := x.Start(f.Context(), link{n}); err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { _ = x.Stop(context.Background()) })
		layers, nodes = append(layers, x.d), append(nodes, n)
	}
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		for i, d := range layers {
			m := channel.Message{From: channeltest.Member(2), Body: bytes.Clone(b)}
			r := d.open(link{nodes[i]}, &m)
			if _, known := explain[r]; !known && r != "" {
				t.Fatalf("unknown reason %q", r)
			}
			if r == "" && i < 2 && string(m.Body) != "a seed" {
				t.Fatalf("%x was taken for an authentic message", b)
			}
			if len(m.Body) > len(b) {
				t.Fatalf("%d bytes became %d", len(b), len(m.Body))
			}
		}
	})
}

// link is what a dialect needs of one.
type link struct{ n *node }

func (l link) Send(context.Context, *channel.Message) error        { return nil }
func (l link) Deliver(context.Context, *channel.Message) error     { return nil }
func (l link) Announce(context.Context, channel.MemberEvent) error { return nil }
func (l link) View() channel.View                                  { return l.n.View() }
func (l link) Local() channel.Member                               { return l.n.Local() }

func BenchmarkEncrypt(b *testing.B) {
	for _, c := range []Config{native1(keyA), tomcat1(DialectTomcat58, "", keyA), tomcat1(DialectTomcat56, "", keyA)} {
		for _, size := range []int{128, 1024, 10240, 102400} {
			to, body := []channel.Member{channeltest.Member(2)}, make([]byte, size)
			s := channel.Settings{}
			embed := func(n int) *channeltest.Embedded {
				x, err := New(c, s)
				if err != nil {
					b.Fatal(err)
				}
				return channeltest.EmbedWith(b, channeltest.EmbedConfig{
					Layers: []channel.Interceptor{x}, Discard: true, Local: channel.Member{ID: channeltest.Member(n).ID},
				})
			}
			b.Run(fmt.Sprintf("%s/send/%d", c.Dialect, size), func(b *testing.B) {
				e := embed(1)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					if err := e.Send(context.Background(), to, body, channel.SendNone); err != nil {
						b.Fatal(err)
					}
				}
			})
			// Both ways: a message can be received once only.
			b.Run(fmt.Sprintf("%s/send+receive/%d", c.Dialect, size), func(b *testing.B) {
				e, r := embed(1), embed(2)
				room := make([]byte, 0, size+1024)
				in := new(channel.Message)
				e.OnSend(func(ctx context.Context, m *channel.Message) error {
					*in = *m
					in.To, in.Body = nil, append(room, m.Body...)
					return r.Receive(ctx, in)
				})
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					if err := e.Send(context.Background(), to, body, channel.SendNone); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
