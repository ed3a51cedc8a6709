package rpc

import (
	"os"
	"strings"
	"testing"
)

// TestReadme: the README of the channel shows the example as it is.
func TestReadme(t *testing.T) {
	src, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, code, ok := strings.Cut(string(src), "// README: rpc\n")
	code, _, ok2 := strings.Cut(code, "// README: end")
	if !ok || !ok2 || !strings.Contains(string(doc), "```go\n"+strings.TrimSpace(code)+"\n```") {
		t.Errorf("the README does not show the example as it is:\n%s", code)
	}
}
