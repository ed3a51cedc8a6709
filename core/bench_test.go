package core_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// sinkWriter is a ResponseWriter that costs nothing.
type sinkWriter struct{ h http.Header }

func (w *sinkWriter) Header() http.Header         { return w.h }
func (w *sinkWriter) WriteHeader(int)             {}
func (w *sinkWriter) Write(p []byte) (int, error) { return len(p), nil }

var okBody = []byte("ok")

func plain(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(okBody) }

// BenchmarkEngine is the cost of the containers alone, without a connection:
// bare is the handler itself.
func BenchmarkEngine(b *testing.B) {
	table := newMemory()
	h, _ := table.Create(b.Context(), core.ContextName("h", "/shop"), session.NewOptions{})
	id := h.Key().ID + ".n1"
	h.Release()
	engine := func(path string, f http.HandlerFunc) http.Handler {
		e, err := core.NewEngine(core.EngineOptions{Route: "n1", Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
			{Path: path, Handler: f, Sessions: table, Distributable: true},
		}}}}, channel.Settings{})
		if err != nil {
			b.Fatal(err)
		}
		return e
	}
	for name, tc := range map[string]struct {
		h              http.Handler
		target, cookie string
	}{
		"bare":           {http.HandlerFunc(plain), "/", ""},
		"root":           {engine("", plain), "/plain", ""},
		"context":        {engine("/shop", plain), "/shop/plain", ""},
		"context/cookie": {engine("/shop", plain), "/shop/plain", id},
		"session/read": {engine("/shop", func(w http.ResponseWriter, r *http.Request) {
			if _, err := session.From(r); err != nil {
				b.Error(err)
			}
			plain(w, r)
		}), "/shop/read", id},
		"path id": {engine("/shop", plain), "/shop/plain;jsessionid=" + id, ""},
	} {
		b.Run(name, func(b *testing.B) {
			r := httptest.NewRequest("GET", "http://h"+tc.target, nil)
			if tc.cookie != "" {
				r.Header.Set("Cookie", "lang=en; JSESSIONID="+tc.cookie)
			}
			w := &sinkWriter{http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				tc.h.ServeHTTP(w, r)
			}
		})
	}
}
