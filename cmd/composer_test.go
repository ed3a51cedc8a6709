package cmd

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// A composer's main of under 30 lines, with an interceptor and a valve of its
// own, is compiled and runs as a cluster of three nodes.
func TestComposer(t *testing.T) {
	g := newGroup(t)
	dir := filepath.Join("testdata", "composer")
	src, err := os.ReadFile(filepath.Join(dir, "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	if lines := bytes.Count(src, []byte("\n")); lines >= 30 {
		t.Errorf("the composer's main has %d lines", lines)
	}
	g.exe = filepath.Join(t.TempDir(), "composer")
	build := exec.Command("go", "build", "-o", g.exe, "./"+dir)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	config := filepath.Join(dir, "node.yaml")
	a, b, c := g.start("a", "-c", config), g.start("b", "-c", config), g.start("c", "-c", config)
	awaitMembers(3, a, b, c)

	user := newClient(t)
	user.must(t, "POST", a, "/set?dataName=colour&dataValue=green")
	for _, n := range []*node{b, c} {
		if i := info(t, user.must(t, "GET", n, "/info")); i.Attributes["colour"] != "green" {
			t.Errorf("%s answers %+v", i.Node, i)
		}
	}
	resp, err := http.Get("http://" + a.HTTP[0] + "/plain")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.Header.Get("X-Tenant") == "" {
		t.Error("the composer's valve was not in the pipeline")
	}
	for name, n := range map[string]*node{"audit_sent_total": a, "audit_received_total": b} {
		eventually(t, 5*time.Second, name+" has counted messages", func() bool { return counter(t, n, name) > 0 })
	}
}

// counter reads one number from a node's metrics.
func counter(t *testing.T, n *node, name string) int {
	t.Helper()
	resp, err := http.Get("http://" + n.Admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^longhouse_` + name + `(?:\{[^}]*\})? (\d+)`).FindSubmatch(text)
	if m == nil {
		return -1
	}
	v, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return v
}
