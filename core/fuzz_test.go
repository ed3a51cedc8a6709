package core_test

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// FuzzPath: whatever the client writes, the application sees an absolute path
// without dot segments, below its context, and never a session id's parameter.
func FuzzPath(f *testing.F) {
	for _, s := range []string{
		"/", "/shop", "/shop/", "/shop/a/../b", "/shop/%2e%2e/x", "/shop/..;a/b", "//shop//x", "/shop%2fx", "/shop/a%2f..%2fb",
		"/shop/x;jsessionid=00112233445566778899AABBCCDDEEFF.n1;v=1", "/shop;jsessionid=1/x", "/;", "/;;;/;=/", "/shop/%00", "/shop/%5c..",
		"/shop/;jsessionid=a;JSESSIONID=b", "/%", "*", "/shop/.", "/shop/..", "/shop/...", "/shop/%25%32%65%25%32%65/",
	} {
		f.Add(s)
	}
	var seen *http.Request
	see := func(want string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			seen = r
			if core.FromContext(r.Context()).Context().Path() != want {
				w.WriteHeader(599)
			}
		})
	}
	table := newMemory()
	e, err := core.NewEngine(core.EngineOptions{Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
		{Path: "", Handler: see(""), Sessions: table}, {Path: "/shop", Handler: see("/shop"), Sessions: table},
	}}}}, channel.Settings{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, target string) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			return
		}
		r := httptest.NewRequest("POST", "/", nil)
		r.URL, r.RequestURI = u, target
		seen = nil
		w := httptest.NewRecorder()
		e.ServeHTTP(w, r)
		if seen == nil {
			if w.Code != 400 {
				t.Fatalf("%q: not served, status %d", target, w.Code)
			}
			return
		}
		p := seen.URL.Path
		if !strings.HasPrefix(p, "/") || strings.Contains(p, "//") && !strings.Contains(seen.URL.RawPath, "%") || strings.ContainsAny(p, "\\\x00") {
			t.Errorf("%q: the application sees %q", target, p)
		}
		for s := range strings.SplitSeq(p, "/") {
			if name, _, _ := strings.Cut(s, ";"); name == "." || name == ".." {
				t.Errorf("%q: dots in %q", target, p)
			}
		}
		for part := range strings.SplitSeq(seen.URL.EscapedPath(), ";") {
			if key, _, _ := strings.Cut(part, "="); strings.EqualFold(key, "jsessionid") && strings.Contains(seen.URL.EscapedPath(), ";"+part) {
				t.Errorf("%q: the id is left in %q", target, seen.URL.EscapedPath())
			}
		}
		if back, err := url.PathUnescape(seen.URL.EscapedPath()); err != nil || back != p {
			t.Errorf("%q: path %q and escaped path %q differ", target, p, seen.URL.EscapedPath())
		}
		if core.FromContext(seen.Context()).Context().Path() == "/shop" && !strings.HasPrefix(core.FromContext(seen.Context()).Path(), "/shop") {
			t.Errorf("%q: in the wrong context", target)
		}
	})
}

// FuzzCookie: no cookie header makes trouble, and only ids of the right form are
// looked for.
func FuzzCookie(f *testing.F) {
	id := strings.Repeat("0123456789ABCDEF", 2)
	for _, s := range []string{
		"", "JSESSIONID=" + id, "JSESSIONID=" + id + ".n1; a=b", `JSESSIONID="` + id + `"`, "JSESSIONID=;JSESSIONID", ";;=;", "JSESSIONID==" + id,
		"JSESSIONID=" + id + "." + strings.Repeat("x", 100), strings.Repeat("JSESSIONID="+id+";", 20),
	} {
		f.Add(s)
	}
	table := newMemory()
	var raw string
	e, err := core.NewEngine(core.EngineOptions{Route: "n1", Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
		{Path: "", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			raw, _, _ = core.FromContext(r.Context()).Requested()
			peek(w, r)
		}), Sessions: table},
	}}}}, channel.Settings{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, line string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header["Cookie"] = []string{line}
		w := httptest.NewRecorder()
		raw = ""
		e.ServeHTTP(w, r)
		if w.Body.String() != "none" || w.Header().Get("Set-Cookie") != "" {
			t.Errorf("%q: %d %q %v", line, w.Code, w.Body, w.Header())
		}
		if raw != "" {
			if _, _, ok := session.ParseID(raw); !ok {
				t.Errorf("%q: %q was taken for an id", line, raw)
			}
		}
	})
}
