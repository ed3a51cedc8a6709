package cmd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A program that does not say what it is is not conformant, and the report
// names what it does not do.
func TestConformNamesAStranger(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes; run without -short")
	}
	program := filepath.Join(t.TempDir(), "stranger")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho no licence found >&2\nexit 7\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	root := newRoot(assemble(nil))
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs([]string{"conform", program})
	if code, ok := root.ExecuteContext(t.Context()).(exitError); !ok || code != 1 {
		t.Errorf("exit %v, want 1", code)
	}
	for _, want := range []string{"not conformant", "plugin/direct-run", "plugin/negotiate", "no licence found"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in:\n%s", want, out.String())
		}
	}
}
