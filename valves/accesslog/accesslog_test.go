package accesslog

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func engine(t testing.TB, v core.Valve, sessions core.Sessions, f http.HandlerFunc) http.Handler {
	t.Helper()
	e, err := core.NewEngine(core.EngineOptions{
		Route: "n1", Valves: []core.Valve{v},
		Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Path: "/shop", Handler: f, Sessions: sessions}}}},
	}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// log serves the requests with a log of that format and returns its lines.
func log(t *testing.T, format string, f http.HandlerFunc, requests ...*http.Request) []string {
	t.Helper()
	c := Default()
	c.Format, c.File = format, filepath.Join(t.TempDir(), "access.log")
	v, err := New(c, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	tab := table.New(table.Config{}, channel.Settings{})
	defer tab.Stop(t.Context())
	e := engine(t, v, tab, f)
	for _, r := range requests {
		e.ServeHTTP(httptest.NewRecorder(), r)
	}
	for range 2 {
		if err := v.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(c.File)
	if err != nil {
		t.Fatal(err)
	}
	return strings.SplitAfter(strings.TrimSuffix(string(b), "\n"), "\n")
}

func request(target string, header ...string) *http.Request {
	r := httptest.NewRequest("GET", "http://h"+target, nil)
	r.RequestURI = target
	r.RemoteAddr = "203.0.113.9:1234"
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return r
}

func hello(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }

const id = "0123456789ABCDEF0123456789ABCDEF.n1"

func TestFormats(t *testing.T) {
	r := func() *http.Request {
		return request("/shop/a;jsessionid="+id+"?q=1", "Referer", "http://h/shop/b;JSESSIONID="+id, "User-Agent", `x "y"`)
	}
	for format, want := range map[string]string{
		Common:   `^203\.0\.113\.9 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "GET /shop/a;jsessionid=01234567\.\.\.\.n1\?q=1 HTTP/1\.1" 200 5$`,
		Combined: `^203\.0\.113\.9 - - \[[^]]*\] "GET /shop/a;jsessionid=01234567\.\.\.\.n1\?q=1 HTTP/1\.1" 200 5 "http://h/shop/b;JSESSIONID=01234567\.\.\.\.n1" "x \\x22y\\x22"$`,
		JSON:     `^\{"time":"[^"]*","remote":"203\.0\.113\.9","method":"GET","host":"h","uri":"/shop/a;jsessionid=01234567\.\.\.\.n1\?q=1","proto":"HTTP/1\.1","status":200,"bytes":5,"duration_us":\d+,"context":"h/shop","session":"01234567…","referer":"http://h/shop/b;JSESSIONID=01234567\.\.\.\.n1","agent":"x \\"y\\""\}$`,
	} {
		lines := log(t, format, hello, r())
		if len(lines) != 1 || !regexp.MustCompile(want).MatchString(lines[0]) {
			t.Errorf("%s: %q", format, lines)
		}
	}
	lines := log(t, Common, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(304) }, request("/shop/"))
	if !strings.HasSuffix(lines[0], " 304 -") {
		t.Errorf("without a body: %q", lines)
	}
	// What the container answers itself is logged as well.
	lines = log(t, Common, func(http.ResponseWriter, *http.Request) { panic("x") }, request("/shop/"), request("/nowhere"))
	if len(lines) != 2 || !strings.Contains(lines[0], " 500 ") || !strings.Contains(lines[1], " 404 ") {
		t.Errorf("panic and no context: %q", lines)
	}
}

func TestNewSessionIsLoggedByPrefix(t *testing.T) {
	var full string
	lines := log(t, JSON, func(w http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err != nil {
			t.Error(err)
			return
		}
		full = s.ID()
	}, request("/shop/"))
	var e struct{ Session string }
	if err := json.Unmarshal([]byte(lines[0]), &e); err != nil || e.Session != session.Prefix(full) {
		t.Errorf("%q: session %q of %q, %v", lines, e.Session, full, err)
	}
	if strings.Contains(lines[0], full[:20]) {
		t.Error("the log shows the id")
	}
}

// TestInjection: nothing a client sends makes a second line, a second field or
// invalid JSON.
func TestInjection(t *testing.T) {
	nasty := "/shop/a\" 200 5\n1.2.3.4 - - [x] \"GET /\r\n\x1b[31m\x00\xff\u2028é\\"
	r := func() *http.Request {
		r := request("/shop/a")
		r.RequestURI = nasty
		r.Method = "G\nET"
		r.Host = nasty
		r.Header["User-Agent"], r.Header["Referer"] = []string{nasty}, []string{strings.Repeat("A", 100_000)}
		return r
	}
	for _, format := range []string{Common, Combined, JSON} {
		lines := log(t, format, hello, r())
		if len(lines) != 1 || len(lines[0]) > 10_000 {
			t.Errorf("%s: %d lines, first of %d bytes", format, len(lines), len(lines[0]))
		}
		for _, c := range []byte(lines[0]) {
			if c < ' ' || c == 0x7f {
				t.Errorf("%s: control character %#x in %q", format, c, lines[0])
			}
		}
		if format == JSON && !json.Valid([]byte(lines[0])) {
			t.Errorf("invalid JSON: %s", lines[0])
		}
		if format == Combined && strings.Count(lines[0], `"`) != 6 {
			t.Errorf("quotes in %q", lines[0])
		}
	}
}

func TestRotation(t *testing.T) {
	c := Default()
	c.File, c.Flush = filepath.Join(t.TempDir(), "access.log"), time.Second
	synctest.Test(t, func(t *testing.T) {
		v, err := New(c, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		e := engine(t, v, nil, hello)
		say := func(target string) { e.ServeHTTP(httptest.NewRecorder(), request(target)) }
		say("/shop/one")
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		if err := os.Rename(c.File, c.File+".1"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // the next tick opens the file anew
		synctest.Wait()
		say("/shop/two")
		if err := os.Rename(c.File, c.File+".2"); err != nil {
			t.Fatal(err)
		}
		v.Reopen()
		synctest.Wait()
		say("/shop/three")
		if err := v.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	for name, want := range map[string]string{".1": "/shop/one", "": "/shop/three"} {
		b, err := os.ReadFile(c.File + name)
		if err != nil || !bytes.Contains(b, []byte(want)) || bytes.Count(b, []byte("\n")) > 2 {
			t.Errorf("%s: %q, %v", c.File+name, b, err)
		}
	}
	all := ""
	for _, name := range []string{"", ".1", ".2"} {
		b, err := os.ReadFile(c.File + name)
		if err != nil {
			t.Fatal(err)
		}
		all += string(b)
	}
	if strings.Count(all, "\n") != 3 {
		t.Errorf("lines are lost or doubled: %q", all)
	}
}

// TestFullBuffer: without a writer the buffer fills, lines are dropped and
// counted, and no request waits.
func TestFullBuffer(t *testing.T) {
	m := channel.NewMetrics()
	c := Default()
	c.Buffer = minBuffer
	v, err := New(c, channel.Settings{Metrics: m})
	if err != nil {
		t.Fatal(err)
	}
	e := engine(t, v, nil, hello)
	const n = 2000
	for range n {
		e.ServeHTTP(httptest.NewRecorder(), request("/shop/"))
	}
	kept := bytes.Count(v.sink.lines, []byte("\n"))
	dropped := m.Counter("accesslog_dropped_total", "").Value()
	if len(v.sink.lines) > minBuffer || dropped == 0 || int64(kept)+dropped != n {
		t.Errorf("%d bytes, %d kept, %d dropped", len(v.sink.lines), kept, dropped)
	}
	if err := v.Stop(t.Context()); err != nil {
		t.Errorf("stop without start: %v", err)
	}
}

// TestBrokenDisk: a failing file is reported once, and again when it works.
func TestBrokenDisk(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	m := channel.NewMetrics()
	c := Default()
	c.File = "/dev/full"
	if _, err := os.Stat(c.File); err != nil {
		t.Skip("no /dev/full")
	}
	synctest.Test(t, func(t *testing.T) {
		v, err := New(c, channel.Settings{Metrics: m, Logger: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		e := engine(t, v, nil, hello)
		for range 3 {
			e.ServeHTTP(httptest.NewRecorder(), request("/shop/"))
			time.Sleep(2 * time.Second)
		}
		if err := v.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	if logs.Len() != 1 || m.Counter("accesslog_write_errors_total", "").Value() != 3 {
		t.Errorf("%d messages, %d errors", logs.Len(), m.Counter("accesslog_write_errors_total", "").Value())
	}
}

func TestStartErrors(t *testing.T) {
	c := Default()
	c.File = filepath.Join(t.TempDir(), "missing", "access.log")
	v, err := New(c, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Start(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "create the folder") {
		t.Errorf("missing folder: %v", err)
	}
	for _, edit := range []func(*Config){
		func(c *Config) { c.Format = "apache" }, func(c *Config) { c.File = "" }, func(c *Config) { c.Flush = -1 }, func(c *Config) { c.Buffer = 1 },
	} {
		c := Default()
		edit(&c)
		if _, err := New(c, channel.Settings{}); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
}

// FuzzLine: any field stays inside its line, and JSON stays JSON.
func FuzzLine(f *testing.F) {
	for _, s := range []string{"", "a\nb", "\"\\", "jsessionid=" + id, "=jsessionid==jsessionid=", "\xff\u2028", strings.Repeat("é", 3000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		line := appendMasked(nil, s, "jsessionid", appendText)
		for _, c := range line {
			if c < ' ' || c >= 0x7f || c == '"' {
				t.Fatalf("%q: %q", s, line)
			}
		}
		text := append(appendMasked([]byte{'"'}, s, "jsessionid", appendJSONText), '"')
		if !json.Valid(text) || bytes.ContainsAny(text, "\n\r") {
			t.Fatalf("%q: %q", s, text)
		}
	})
}

// BenchmarkRecord is what a request pays, with a writer that keeps up.
func BenchmarkRecord(b *testing.B) {
	for _, format := range []string{Common, Combined, JSON} {
		b.Run(format, func(b *testing.B) {
			c := Default()
			c.Format, c.File = format, filepath.Join(b.TempDir(), "log")
			v, err := New(c, channel.Settings{})
			if err != nil {
				b.Fatal(err)
			}
			if err := v.Start(b.Context()); err != nil {
				b.Fatal(err)
			}
			var x *core.Exchange
			e := engine(b, core.ValveFunc(func(next http.Handler) http.Handler { return next }), nil, func(w http.ResponseWriter, r *http.Request) {
				x = core.FromContext(r.Context())
				b.ReportAllocs()
				for b.Loop() {
					v.record(x)
				}
			})
			e.ServeHTTP(httptest.NewRecorder(), request("/shop/item?id=17", "User-Agent", "Mozilla/5.0 (X11; Linux x86_64)"))
			if err := v.Stop(b.Context()); err != nil {
				b.Fatal(err)
			}
		})
	}
}
