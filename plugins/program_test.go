package plugins

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// Programs that answer "describe" badly are refused in bounded time, each with
// the reason.
func TestDescribeProgram(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the programs are shell scripts")
	}
	t.Setenv("LONGHOUSE_TEST_SECRET", "hunter2")
	good := `{"kind":"interceptor","name":"acme/x","version":"1","api":[1,2],"config_schema":{"type":"object"}}`
	for name, test := range map[string]struct{ script, want string }{
		"good":        {"echo '" + good + "'", ""},
		"two":         {"echo '" + good + strings.Replace(good, "acme/x", "acme/y", 1) + "'", ""},
		"twice":       {"echo '" + good + good + "'", "twice"},
		"environment": {`test -z "$LONGHOUSE_TEST_SECRET" && test "$1" = describe && echo '` + good + "'", ""},
		"grandchild":  {"sleep 60 & echo '" + good + "'", ""},
		"nothing":     {"exit 0", "empty"},
		"failure":     {"echo it hurts >&2; exit 3", "it hurts"},
		"chatter":     {"echo hello; echo '" + good + "'", "cannot be read"},
		"endless":     {"while :; do echo '                                                                              '; done", "more than"},
		"old":         {"echo '" + strings.Replace(good, "[1,2]", "[7]", 1) + "'", "[7]"},
		"no api":      {"echo '" + strings.Replace(good, "[1,2]", "[]", 1) + "'", "no version"},
		"name":        {"echo '" + strings.Replace(good, "acme/x", "../x", 1) + "'", "no name"},
		"kind":        {"echo '" + strings.Replace(good, "interceptor", "valve", 1) + "'", "no kind"},
		"schema":      {"echo '" + strings.Replace(good, `"object"`, `"array"`, 1) + "'", "schema"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "program")
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+test.script+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			list, err := DescribeProgram(t.Context(), path)
			if took := time.Since(start); took > 30*time.Second { // the grandchild takes a minute
				t.Errorf("took %v", took)
			}
			switch {
			case test.want == "" && (err != nil || len(list) == 0 || list[0].Name != "acme/x"):
				t.Errorf("%+v, %v", list, err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}
