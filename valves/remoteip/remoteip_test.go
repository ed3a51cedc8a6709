package remoteip

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

func run(t testing.TB, c Config, f http.HandlerFunc) http.Handler {
	t.Helper()
	v, err := New(c, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	e, err := core.NewEngine(core.EngineOptions{Valves: []core.Valve{v}, Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: f}}}}}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestRemoteIP(t *testing.T) {
	off := Default()
	off.ForHeader, off.ProtoHeader = "off", "off"
	only := Default()
	only.Trusted = []string{"192.0.2.1", "2001:db8::/32"}
	for name, tc := range map[string]struct {
		c      Config
		peer   string
		fwd    []string
		proto  string
		want   string
		secure bool
	}{
		"no proxy":             {Default(), "203.0.113.9:5", nil, "", "203.0.113.9:5", false},
		"untrusted":            {Default(), "203.0.113.9:5", []string{"1.1.1.1"}, "https", "203.0.113.9:5", false},
		"one proxy":            {Default(), "10.0.0.1:5", []string{"203.0.113.9"}, "https", "203.0.113.9:0", true},
		"chain":                {Default(), "10.0.0.1:5", []string{"203.0.113.9, 10.0.0.3", "10.0.0.2"}, "http", "203.0.113.9:0", false},
		"invented first hop":   {Default(), "10.0.0.1:5", []string{"8.8.8.8, 203.0.113.9, 10.0.0.2"}, "", "203.0.113.9:0", false},
		"all trusted":          {Default(), "10.0.0.1:5", []string{"10.0.0.3, 10.0.0.2"}, "", "10.0.0.3:0", false},
		"garbage":              {Default(), "10.0.0.1:5", []string{"unknown, _x"}, "", "10.0.0.1:5", false},
		"garbage behind a hop": {Default(), "10.0.0.1:5", []string{"evil, 10.0.0.2"}, "", "10.0.0.2:0", false},
		"empty":                {Default(), "10.0.0.1:5", []string{""}, "", "10.0.0.1:5", false},
		"with port":            {Default(), "10.0.0.1:5", []string{"203.0.113.9:777"}, "", "203.0.113.9:0", false},
		"ipv6":                 {Default(), "[::1]:5", []string{"[2001:db8::1]:9"}, "", "[2001:db8::1]:0", false},
		"mapped":               {Default(), "[::ffff:10.0.0.1]:5", []string{"::ffff:203.0.113.9"}, "", "203.0.113.9:0", false},
		"mixed schemes":        {Default(), "10.0.0.1:5", []string{"203.0.113.9"}, "https, http", "203.0.113.9:0", false},
		"two https":            {Default(), "10.0.0.1:5", []string{"203.0.113.9"}, "https, HTTPS", "203.0.113.9:0", true},
		"off":                  {off, "10.0.0.1:5", []string{"203.0.113.9"}, "https", "10.0.0.1:5", false},
		"own list":             {only, "10.0.0.1:5", []string{"203.0.113.9"}, "https", "10.0.0.1:5", false},
		"own list, trusted":    {only, "192.0.2.1:5", []string{"203.0.113.9"}, "https", "203.0.113.9:0", true},
		"many hops":            {Default(), "10.0.0.1:5", []string{"203.0.113.9" + strings.Repeat(",10.0.0.2", 5000)}, "", "10.0.0.2:0", false},
	} {
		e := run(t, tc.c, func(w http.ResponseWriter, r *http.Request) {
			x := core.FromContext(r.Context())
			if r.RemoteAddr != tc.want || x.RemoteAddr() != tc.want || x.Secure() != tc.secure {
				t.Errorf("%s: %s and %s, secure %v; want %s, %v", name, r.RemoteAddr, x.RemoteAddr(), x.Secure(), tc.want, tc.secure)
			}
		})
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = tc.peer
		r.Header["X-Forwarded-For"] = tc.fwd
		if tc.proto != "" {
			r.Header.Set("X-Forwarded-Proto", tc.proto)
		}
		e.ServeHTTP(httptest.NewRecorder(), r)
	}
}

func TestBadConfig(t *testing.T) {
	for _, c := range []Config{{}, {Trusted: []string{"x"}, ForHeader: "a", ProtoHeader: "b"}, {Trusted: []string{"10.0.0.0/99"}, ForHeader: "a", ProtoHeader: "b"}} {
		if _, err := New(c, channel.Settings{}); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
}

// FuzzForwarded: whatever a proxy passes on, the address stays one.
func FuzzForwarded(f *testing.F) {
	for _, s := range []string{"", "1.2.3.4", "1.2.3.4, 10.0.0.1", ",,,", "[::1]:1,\"x\"", "fe80::1%eth0"} {
		f.Add(s, s)
	}
	var got string
	e := run(f, Default(), func(w http.ResponseWriter, r *http.Request) { got = r.RemoteAddr })
	f.Fuzz(func(t *testing.T, a, b string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = "127.0.0.1:1"
		r.Header["X-Forwarded-For"] = []string{a, b}
		e.ServeHTTP(httptest.NewRecorder(), r)
		if host := strings.TrimSuffix(got, ":0"); host != "127.0.0.1:1" && strings.ContainsAny(host, " ,\"\r\n%") {
			t.Errorf("%q %q: %q", a, b, got)
		}
	})
}

func BenchmarkRemoteIP(b *testing.B) {
	v, err := New(Default(), channel.Settings{})
	if err != nil {
		b.Fatal(err)
	}
	h := v.Wrap(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	for name, peer := range map[string]string{"untrusted": "203.0.113.9:1", "proxy": "10.0.0.1:1"} {
		b.Run(name, func(b *testing.B) {
			r := httptest.NewRequest("GET", "/", nil)
			r.Header.Set("X-Forwarded-For", "203.0.113.7, 10.0.0.2")
			b.ReportAllocs()
			for b.Loop() {
				r.RemoteAddr = peer
				h.ServeHTTP(nil, r)
			}
		})
	}
}
