package core_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// Any middleware is a valve; an engine is a handler for any server.
func ExampleNewEngine() {
	signed := core.ValveFunc(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			// The header is still editable after the handler has written.
			core.FromContext(r.Context()).OnCommit(func(x *core.Exchange) error {
				w.Header().Set("X-Served-By", x.Engine().Route())
				return nil
			})
			next.ServeHTTP(w, r)
		})
	})
	hello := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello from ", r.URL.Path) })

	engine, err := core.NewEngine(core.EngineOptions{
		Name: "main", Route: "n1", Valves: []core.Valve{signed},
		Hosts: []core.HostOptions{{Name: "localhost", Contexts: []core.ContextOptions{{Path: "/shop", Handler: hello}}}},
	}, channel.Settings{})
	if err != nil {
		fmt.Println(err)
		return
	}
	w := httptest.NewRecorder()
	engine.ServeHTTP(w, httptest.NewRequest("GET", "/shop/cart", nil))
	fmt.Println(w.Body, w.Header().Get("X-Served-By"))
	// Output: hello from /cart n1
}
