package cmd

import (
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"
)

const signOnConfig = `
engine:
  hosts:
    - name: localhost
      valves: [singlesignon]
      contexts:
        - {path: "", app: demo}
        - {path: /shop, app: demo, manager: backup}
cluster: {manager: delta, channel: {interceptors: [dispatch, failuredetector]}}
`

// A user who has signed on in one application on one node is known in the other
// on the other node, also when the first node is dead; and is out of both when
// one of the sessions is ended.
func TestSingleSignOn(t *testing.T) {
	file := filepath.Join(t.TempDir(), "node.yaml")
	if err := os.WriteFile(file, []byte(signOnConfig), 0o600); err != nil {
		t.Fatal(err)
	}
	g := newGroup(t)
	a, b, c := g.start("a", "-c", file), g.start("b", "-c", file), g.start("c", "-c", file)
	awaitMembers(3, a, b, c)
	jar, err := cookiejar.New(nil) // which does not care for ports
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	browser := &http.Client{Transport: transport, Jar: jar, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	do := func(method string, n *node, path string) string {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+n.HTTP[0]+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := browser.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode >= 400 {
			t.Fatalf("%s %s: %d %v %s\nlog of the node:\n%s", method, path, resp.StatusCode, err, body, n.log)
		}
		return string(body)
	}
	want := func(n *node, path, want string) {
		t.Helper()
		if got := do("GET", n, path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	want(a, "/write", "1")
	do("POST", a, "/login?user=ada")
	want(a, "/whoami", "ada")
	want(a, "/write", "2")
	want(b, "/shop/whoami", "ada")
	want(b, "/shop/write", "1")
	a.kill()
	awaitMembers(2, b, c)
	want(c, "/whoami", "ada")
	want(c, "/read", "2")
	want(c, "/shop/read", "1")
	before, err := url.Parse("http://" + c.HTTP[0] + "/shop/")
	if err != nil {
		t.Fatal(err)
	}
	old := jar.Cookies(before)
	do("POST", c, "/invalidate")
	jar.SetCookies(before, old) // somebody has kept them
	for _, n := range []*node{b, c} {
		want(n, "/whoami", "")
		want(n, "/shop/whoami", "")
	}
	want(b, "/shop/read", "0")
}
