package health

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

func TestHealth(t *testing.T) {
	m := channel.NewMetrics()
	v, err := New(Default(), channel.Settings{Metrics: m})
	if err != nil {
		t.Fatal(err)
	}
	var ready error
	e, err := core.NewEngine(core.EngineOptions{
		Valves: []core.Valve{v}, Ready: func() error { return ready },
		Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: http.NotFoundHandler()}}}},
	}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		method, path string
		ready        error
		status       int
		body         string
	}{
		{"GET", "/health", nil, 200, "ok\n"},
		{"HEAD", "/health", nil, 200, "ok\n"}, // the recorder keeps what a server leaves out
		{"GET", "/health", errors.New("waiting for 10.0.0.7"), 503, "not ready\n"},
		{"POST", "/health", nil, 405, ""},
		{"GET", "/healthy", nil, 404, "404 page not found\n"},
		{"GET", "/health/", nil, 404, "404 page not found\n"},
	} {
		ready = tc.ready
		w := httptest.NewRecorder()
		e.ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, nil))
		if w.Code != tc.status || w.Body.String() != tc.body {
			t.Errorf("%s %s: %d %q, want %d %q", tc.method, tc.path, w.Code, w.Body, tc.status, tc.body)
		}
	}
	if got := m.Counter("health_not_ready_total", "").Value(); got != 1 {
		t.Errorf("health_not_ready_total %d", got)
	}
	if err := Factory.Check(func(into any) error { into.(*Config).Path = "x"; return nil }); err == nil {
		t.Error("a path without slash was accepted")
	}
}
