// Command composer is a composer's own node: the whole of Longhouse, a layer and a valve.
package main

import (
	"net/http"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/cmd"
	"github.com/longhouse-go/longhouse/core"
)

func audit(_ struct{}, s channel.Settings) (channel.Interceptor, error) {
	sent, received := s.Metrics.Counter("audit_sent_total", "Messages sent."), s.Metrics.Counter("audit_received_total", "Messages received.")
	return channel.Transform(channel.Descriptor{Name: "acme/audit", Promise: "counts"},
		func(*channel.Message) error { sent.Inc(); return nil }, func(*channel.Message) error { received.Inc(); return nil }), nil
}

func tenant(struct{}, channel.Settings) (core.Valve, error) {
	return core.ValveFunc(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Tenant", r.Host)
			next.ServeHTTP(w, r)
		})
	}), nil
}

func main() {
	cmd.Main(cmd.Interceptor(channel.FactoryOf("acme/audit", struct{}{}, audit)), cmd.Valve(channel.FactoryOf("acme/tenant", struct{}{}, tenant)))
}
