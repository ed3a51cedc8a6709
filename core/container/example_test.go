package container_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/container"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/interceptors"
	"github.com/longhouse-go/longhouse/plugins"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
	"github.com/longhouse-go/longhouse/valves"
)

// README: compose

func compose() (*container.Node, error) {
	cfg := config.Default()
	cfg.Engine.Hosts[0].Contexts[0].App = "shop"
	cfg.Cluster.Channel.Interceptors = []config.Component{{Use: "dispatch"}, {Use: "failuredetector"}}
	return container.New(cfg, container.Parts{
		Interceptors: interceptors.Builtin(), // and yours
		Valves:       valves.Builtin(),       // and yours
		Apps:         []container.App{{Name: "shop", New: shop}},
		Plugins: func(s channel.Settings) (core.PluginHost, error) {
			return plugins.NewHost(plugins.Config{
				Managers:    []core.ManagerFactory{delta.Factory},
				Memberships: []core.MembershipFactory{multicast.Factory},
				DefaultMode: core.Direct, // in this process, for once
			}, s)
		},
	})
}

func shop(container.AppInfo) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err == nil {
			err = session.Attr[int]("visits").Update(s, func(n *int) error { *n++; _, err := fmt.Fprint(w, "visit ", *n); return err })
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
}

// README: end

func Example() {
	node, err := compose()
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	if err := node.Start(ctx); err != nil {
		log.Fatal(err)
	}
	defer node.Stop(ctx) //nolint:errcheck // the process ends
	resp, err := http.Get("http://" + node.Addrs()[0] + "/")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	_, _ = io.Copy(writer{}, resp.Body)
	// Output: visit 1
}

// writer prints to where the example's output is looked for.
type writer struct{}

func (writer) Write(p []byte) (int, error) { return fmt.Print(string(p)) }
