package errorreport

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

func TestErrorReport(t *testing.T) {
	m := channel.NewMetrics()
	e, err := core.NewEngine(core.EngineOptions{
		Route: "n1", Valves: []core.Valve{New(Config{ShowNode: true}, channel.Settings{Metrics: m})},
		Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/panic":
				panic("secret: <b>stack</b>")
			case "/body":
				http.Error(w, "mine", http.StatusTeapot)
			case "/odd":
				w.WriteHeader(499)
			case "/refused":
				core.FromContext(r.Context()).Refuse(403, "<script>")
			case "/ok":
			default:
				w.WriteHeader(404)
			}
		})}}}},
	}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		path, accept string
		status       int
		kind, has    string
	}{
		{"/none", "text/html,application/xhtml+xml,*/*;q=0.8", 404, "text/html; charset=utf-8", "<h1>404 Not Found</h1>"},
		{"/none", "application/json", 404, "application/json", `"error":"Not Found"`},
		{"/none", "application/problem+json;q=1", 404, "application/json", `"node":"n1"`},
		{"/none", "*/*", 404, "text/plain; charset=utf-8", "404 Not Found\n"},
		{"/none", "", 404, "text/plain; charset=utf-8", "node n1\n"},
		{"/panic", "text/html", 500, "text/html; charset=utf-8", "the application failed"},
		{"/refused", "text/html", 403, "text/html; charset=utf-8", "&lt;script&gt;"},
		{"/odd", "application/json", 499, "application/json", `"error":"Error"`},
		{"/body", "text/html", 418, "text/plain; charset=utf-8", "mine\n"},
		{"/ok", "text/html", 200, "", ""},
	} {
		r := httptest.NewRequest("GET", tc.path, nil)
		if tc.accept != "" {
			r.Header.Set("Accept", tc.accept)
		}
		w := httptest.NewRecorder()
		e.ServeHTTP(w, r)
		body := w.Body.String()
		if w.Code != tc.status || w.Header().Get("Content-Type") != tc.kind || !strings.Contains(body, tc.has) {
			t.Errorf("%s %q: %d %q %q", tc.path, tc.accept, w.Code, w.Header().Get("Content-Type"), body)
		}
		if strings.Contains(body, "secret") || strings.Contains(body, "goroutine") || strings.Contains(body, "<script>") {
			t.Errorf("%s shows the inside: %s", tc.path, body)
		}
		if tc.kind == "application/json" && !json.Valid([]byte(body)) {
			t.Errorf("%s: not JSON: %s", tc.path, body)
		}
	}
	if got := m.Counter("errorreport_pages_total", "").Value(); got != 8 {
		t.Errorf("errorreport_pages_total %d, want 8", got)
	}
}
