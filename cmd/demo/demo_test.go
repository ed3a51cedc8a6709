package demo_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/cmd/demo"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/table"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs the application under /shop and at the root of a node, on the
// given table.
func serve(t *testing.T, node string, sessions core.Sessions, valves ...core.Valve) *httptest.Server {
	t.Helper()
	contexts := []core.ContextOptions{
		{Path: "/shop", Handler: demo.Handler(node), Sessions: sessions, Distributable: true},
		{Path: "", Handler: demo.Handler(node), Sessions: sessions, Distributable: true},
	}
	e, err := core.NewEngine(core.EngineOptions{
		Name: "test", Route: node, Valves: valves,
		Hosts: []core.HostOptions{{Name: "localhost", Contexts: contexts}},
	}, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(e)
	t.Cleanup(func() {
		srv.Close()
		if err := e.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return srv
}

// newTable returns a session table of one node.
func newTable(t *testing.T) *table.Table {
	t.Helper()
	tab := table.New(table.Config{}, channel.Settings{})
	if err := tab.Start(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tab.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return tab
}

type info struct {
	Node       string
	ID         string
	IsNew      bool
	Attributes map[string]string
}

// browser is a client with cookies.
func browser(t *testing.T) *http.Client {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Jar: jar, Transport: tr}
}

func body(t *testing.T, resp *http.Response, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s %s: status %s: %s", resp.Request.Method, resp.Request.URL, resp.Status, b)
	}
	return string(b)
}

func get(t *testing.T, c *http.Client, url string) string {
	t.Helper()
	resp, err := c.Get(url)
	return body(t, resp, err)
}

func getInfo(t *testing.T, c *http.Client, base string) (i info) {
	t.Helper()
	if err := json.Unmarshal([]byte(get(t, c, base+"/info")), &i); err != nil {
		t.Fatal(err)
	}
	return i
}

func TestDemoUnderContextPath(t *testing.T) {
	for _, path := range []string{"", "/shop"} {
		t.Run("path="+path, func(t *testing.T) {
			srv := serve(t, "n1", newTable(t))
			c, base := browser(t), srv.URL+path

			first := getInfo(t, c, base)
			if !first.IsNew || first.Node != "n1" || !strings.HasSuffix(first.ID, ".n1") || len(first.Attributes) != 0 {
				t.Errorf("first request: %+v", first)
			}
			resp, err := c.PostForm(base+"/set", url.Values{"dataName": {"colour"}, "dataValue": {"<b>red & blue</b>"}})
			page := body(t, resp, err)
			if !strings.Contains(page, "&lt;b&gt;red &amp; blue&lt;/b&gt;") || strings.Contains(page, "<b>red") {
				t.Errorf("the value is not escaped: %s", page)
			}
			if want := strings.TrimSuffix(base, "/") + "/"; resp.Request.URL.String() != want {
				t.Errorf("POST /set led to %s, want %s", resp.Request.URL, want)
			}
			if strings.Contains(page, "jsessionid") {
				t.Error("the page's links carry the id although the client keeps cookies")
			}
			second := getInfo(t, c, base)
			if second.IsNew || second.ID != first.ID || second.Attributes["colour"] != "<b>red & blue</b>" {
				t.Errorf("after setting: %+v, before: %+v", second, first)
			}
			for want := 1; want <= 3; want++ {
				if got := get(t, c, base+"/write?size=64"); got != string(rune('0'+want)) {
					t.Errorf("write: %q, want %d", got, want)
				}
			}
			if got := get(t, c, base+"/read"); got != "3" {
				t.Errorf("read: %q, want 3", got)
			}
			if i := getInfo(t, c, base); i.Attributes["blob"] != "(64 bytes)" || i.Attributes["n"] != "3" {
				t.Errorf("attributes after writing: %v", i.Attributes)
			}
			resp, err = c.Post(base+"/renew", "", nil)
			body(t, resp, err)
			renewed := getInfo(t, c, base)
			if renewed.ID == first.ID || renewed.Attributes["n"] != "3" {
				t.Errorf("after renewing: %+v", renewed)
			}
			resp, err = c.Post(base+"/invalidate", "", nil)
			body(t, resp, err)
			if i := getInfo(t, c, base); i.ID == renewed.ID || len(i.Attributes) != 0 {
				t.Errorf("after invalidating: %+v", i)
			}
		})
	}
}

// TestDemoWithoutCookies follows the page's own links only.
func TestDemoWithoutCookies(t *testing.T) {
	srv := serve(t, "n1", newTable(t))
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	c := &http.Client{Transport: tr}   // no jar
	page := get(t, c, srv.URL+"/shop") // without the slash, to be led there
	_, rest, found := strings.Cut(page, `action="set;jsessionid=`)
	if !found {
		t.Fatalf("no id in the form's action: %s", page)
	}
	id, _, _ := strings.Cut(rest, `"`)
	resp, err := c.PostForm(srv.URL+"/shop/set;jsessionid="+id, url.Values{"dataName": {"a"}, "dataValue": {"1"}})
	page = body(t, resp, err)
	if !strings.Contains(page, id) || !strings.Contains(page, "<th>a</th><td>1</td>") {
		t.Errorf("the session was lost on the way: %s", page)
	}
}

func TestPlainLeavesTheSessionAlone(t *testing.T) {
	sessions := newTable(t)
	srv := serve(t, "n1", sessions)
	resp, err := browser(t).Get(srv.URL + "/plain")
	if got := body(t, resp, err); got != "ok" {
		t.Errorf("plain: %q", got)
	}
	if resp.Header.Get("Set-Cookie") != "" || sessions.Len() != 0 {
		t.Error("/plain made a session")
	}
}

func TestBadInput(t *testing.T) {
	srv := serve(t, "n1", newTable(t))
	c := browser(t)
	for _, tc := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/write?size=-1", 400},
		{"GET", "/write?size=99999999", 400},
		{"GET", "/write?size=x", 400},
		{"POST", "/set", 400},
		{"POST", "/set?dataName=" + strings.Repeat("a", 200), 400},
		{"GET", "/set", 405},
		{"GET", "/nothing", 404},
	} {
		req, err := http.NewRequest(tc.method, srv.URL+tc.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tc.status {
			t.Errorf("%s %s: %d, want %d", tc.method, tc.path, resp.StatusCode, tc.status)
		}
	}
}
