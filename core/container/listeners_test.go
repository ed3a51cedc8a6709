package container_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/container"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins"
	"github.com/longhouse-go/longhouse/plugins/manager/backup"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
)

// README: listeners

// visitors knows how many users there are, on all nodes together.
type visitors struct{ online atomic.Int64 }

// SessionEvent implements core.SessionListener.
func (v *visitors) SessionEvent(e core.SessionEvent) {
	switch e.Kind {
	case core.SessionCreated:
		v.online.Add(1)
	case core.SessionDestroyed:
		v.online.Add(-1)
		var user string
		if ok, _ := e.Get("user", &user); ok && e.Local {
			fmt.Println(user, "has left:", e.Reason == session.Expired)
		}
	}
}

func club() container.App {
	v := &visitors{}
	return container.App{
		Name: "club",
		New: func(container.AppInfo) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if _, err := session.From(r); err != nil {
					http.Error(w, err.Error(), http.StatusServiceUnavailable)
					return
				}
				fmt.Fprintln(w, "users:", v.online.Load())
			})
		},
		Listeners: func(container.AppInfo) []core.SessionListening {
			const kinds = core.SessionCreated | core.SessionDestroyed
			return []core.SessionListening{{Listener: v, Kinds: kinds, Cluster: kinds}}
		},
	}
}

// README: end

const listeningNode = `
node: {name: %s}
admin: {address: "127.0.0.1:0"}
connectors: [{address: "127.0.0.1:0"}]
engine:
  hosts:
    - name: localhost
      contexts:
        - {path: /all, app: all}
        - {path: /two, app: all, manager: backup, send: sync, session: {listeners: "sessions, ids"}}
        - {path: /alone, app: all, distributable: false}
        - {path: /club, app: club}
cluster:
  listeners: cluster
  channel:
    membership: {use: multicast, port: %d, bind: 127.0.0.1}
    receiver: {address: 127.0.0.1, port: 4000, auto_bind: 1000}
    interceptors: [dispatch]
`

// ears hear for one node.
type ears struct {
	mu   sync.Mutex
	list []core.SessionEvent
}

func (h *ears) SessionEvent(e core.SessionEvent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = append(h.list, e)
}

// await waits until so many events of a context have come, and says which.
func (h *ears) await(t *testing.T, path string, want string) {
	t.Helper()
	var got string
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		h.mu.Lock()
		var words []string
		for _, e := range h.list {
			if e.Key.Context == core.ContextName("localhost", path) {
				word := e.Kind.String()
				if !e.Local {
					word += " elsewhere"
				}
				words = append(words, word)
			}
		}
		h.mu.Unlock()
		if got = strings.Join(words, ", "); got == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: heard %q, want %q", path, got, want)
		}
	}
}

// everything is an application that tries all that listeners hear.
func everything(w http.ResponseWriter, r *http.Request) {
	x := core.FromContext(r.Context())
	s, err := session.From(r)
	switch {
	case err != nil:
	case r.URL.Path == "/set":
		err = s.Set("x", "1")
	case r.URL.Path == "/renew":
		err = s.Renew()
	case r.URL.Path == "/end":
		err = s.Invalidate()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
	fmt.Fprint(w, x.Level())
}

// Two nodes with contexts that have managers and a way of sending of their own:
// the listeners of each hear what was configured, also over a reload.
func TestListenersOfContexts(t *testing.T) {
	group := channeltest.FreePort(t, "udp")
	heard := map[string]*ears{"n1": {}, "n2": {}}
	p := parts(t)
	p.Plugins = func(s channel.Settings) (core.PluginHost, error) {
		return plugins.NewHost(plugins.Config{
			Managers:    []core.ManagerFactory{delta.Factory, backup.Factory},
			Memberships: []core.MembershipFactory{multicast.Factory},
			DefaultMode: core.Direct,
		}, s)
	}
	p.Apps = []container.App{{
		Name: "all",
		New:  func(container.AppInfo) http.Handler { return http.HandlerFunc(everything) },
		Listeners: func(i container.AppInfo) []core.SessionListening {
			return []core.SessionListening{{Listener: heard[i.Node]}}
		},
	}}
	node := func(name string) *container.Node {
		text := fmt.Sprintf(listeningNode, name, group)
		q := p
		q.Apps = append(q.Apps[:len(q.Apps):len(q.Apps)], club())
		return reloading(t, &text, q)
	}
	a, b := node("n1"), node("n2")
	awaitReady(t, a, 2)
	awaitReady(t, b, 2)

	cookies := map[string]string{}
	do := func(n *container.Node, context, path, want string) {
		t.Helper()
		r, err := http.NewRequest(http.MethodGet, "http://"+n.Addrs()[0]+context+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if c := cookies[context]; c != "" {
			r.AddCookie(&http.Cookie{Name: core.DefaultCookie, Value: c})
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		for _, c := range resp.Cookies() {
			cookies[context] = c.Value
		}
		if resp.StatusCode != http.StatusOK || want != "" && string(body) != want {
			t.Fatalf("%s%s: %d %q, want %q", context, path, resp.StatusCode, body, want)
		}
	}
	one, two := heard["n1"], heard["n2"]
	for context, level := range map[string]string{"/all": "async", "/two": "sync", "/alone": "async"} {
		do(a, context, "/set", level)
		do(a, context, "/renew", level)
		one.await(t, context, "created, attribute added, renewed")
	}
	two.await(t, "/all", "created elsewhere, attribute added elsewhere, renewed elsewhere")
	two.await(t, "/two", "created elsewhere, renewed elsewhere")
	two.await(t, "/alone", "")
	if err := b.Reload(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, context := range []string{"/all", "/two"} {
		do(b, context, "/end", "")
	}
	one.await(t, "/all", "created, attribute added, renewed, destroyed elsewhere")
	one.await(t, "/two", "created, attribute added, renewed, destroyed elsewhere")
	two.await(t, "/all", "created elsewhere, attribute added elsewhere, renewed elsewhere, destroyed")
	two.await(t, "/two", "created elsewhere, renewed elsewhere, destroyed")
	do(a, "/club", "/", "")
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, body := get(t, b, "/club/"); strings.TrimSpace(body) != "users: 1" { // each call is a new user
			break
		}
		if time.Now().After(end) {
			t.Fatal("the other node's user is not counted")
		}
	}

	cfg := read(t, fmt.Sprintf(listeningNode, "n3", group))
	cfg.Normalize()
	text, err := container.Explain(cfg, p)
	if err != nil || !strings.Contains(text, "localhost/two: backup (send: sync)") || !strings.Contains(text, "In localhost/two: A response is sent when every other node has stored") {
		t.Error(text, err)
	}
}
