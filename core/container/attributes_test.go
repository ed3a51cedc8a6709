package container_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/attributes"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/container"
)

// README: attributes

const motd = attributes.Attr[string]("motd")

// notice shows the message of the day, which POST sets for all nodes.
func notice(info container.AppInfo) http.Handler {
	info.Attributes.Watch(func(c attributes.Change) { fmt.Println(info.Node, "hears of", c.Name) })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := core.FromContext(r.Context()).Context().Attributes()
		if r.Method == http.MethodPost {
			if err := motd.Set(r.Context(), a, r.FormValue("text")); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
			}
			return
		}
		text, _, err := motd.Get(a)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, text)
	})
}

// README: end

const attributesNode = `
node: {name: %s}
admin: {address: "127.0.0.1:0"}
connectors: [{address: "127.0.0.1:0"}]
engine:
  hosts:
    - name: localhost
      contexts:
        - {path: "", app: notice}
        - {path: /alone, app: notice, distributable: false, attributes: {max_size: 20}}
cluster:
  channel:
    membership: {use: multicast, port: %d, bind: 127.0.0.1}
    receiver: {address: 127.0.0.1, port: 4000, auto_bind: 1000}
    interceptors: [dispatch]
`

func awaitReady(t *testing.T, n *container.Node, members int) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !n.Ready() || len(n.Channel().View().Members) < members-1; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not ready with %d members: %v", members, n.Channel().View())
		}
	}
}

func post(t *testing.T, n *container.Node, path, text string) (int, string) {
	t.Helper()
	resp, err := http.PostForm("http://"+n.Addrs()[0]+path, map[string][]string{"text": {text}})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// Nodes share the attributes of a context, over a reload, a node that joins and
// the end of the one that set them; those of a context that is not distributable
// stay.
func TestAttributesOfContexts(t *testing.T) {
	group := channeltest.FreePort(t, "udp")
	p := parts(t)
	p.Apps = []container.App{{Name: "notice", New: notice}}
	var reloads atomic.Int32
	node := func(name string) *container.Node {
		text := fmt.Sprintf(attributesNode, name, group)
		n, err := container.New(read(t, text), p)
		if err != nil {
			t.Fatal(err)
		}
		n.OnReload(func() (*config.Config, error) {
			reloads.Add(1)
			return config.Read("test.yaml", []byte(text))
		})
		return run(t, n)
	}
	a := node("a")
	awaitReady(t, a, 1)
	if code, body := post(t, a, "/", "hello"); code != http.StatusOK {
		t.Fatalf("%d %s", code, body)
	}
	if code, body := post(t, a, "/alone/", "only a"); code != http.StatusOK {
		t.Fatalf("%d %s", code, body)
	}
	if code, body := post(t, a, "/alone/", strings.Repeat("x", 20)); code != http.StatusServiceUnavailable || !strings.Contains(body, "attributes.max_size") {
		t.Errorf("%d %s", code, body)
	}
	b := node("b")
	awaitReady(t, b, 2)
	check := func(n *container.Node, path, want string) {
		t.Helper()
		if _, got := get(t, n, path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	check(b, "/", "hello")
	check(b, "/alone/", "")
	if err := a.Reload(t.Context()); err != nil || reloads.Load() != 1 {
		t.Fatal(err)
	}
	check(a, "/", "hello")
	check(a, "/alone/", "only a")
	if err := a.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	check(b, "/", "hello")

	resp, err := http.Get("http://" + b.Admin() + "/v1/attributes")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if got := strings.Join(strings.Fields(string(body)), ""); got != `{"total":1,"attributes":[{"context":"localhost/","name":"motd","bytes":6,"replicated":true}]}` {
		t.Errorf("admin: %s", body)
	}
}

// The README shows the examples as they are.
func TestReadme(t *testing.T) {
	doc, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"attributes", "listeners"} {
		src, err := os.ReadFile(name + "_test.go")
		if err != nil {
			t.Fatal(err)
		}
		_, code, ok := strings.Cut(string(src), "// README: "+name+"\n")
		code, _, ok2 := strings.Cut(code, "// README: end")
		if !ok || !ok2 || !strings.Contains(string(doc), "```go\n"+strings.TrimSpace(code)+"\n```") {
			t.Errorf("the README does not show the example as it is:\n%s", code)
		}
	}
}
