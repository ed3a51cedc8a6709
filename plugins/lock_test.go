package plugins

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/core/config"
)

type lockedOptions struct {
	MinSize int         `yaml:"min_size" default:"1024" validate:"min=1" doc:"bodies smaller than this are left alone: yes, #really"`
	Key     secret.Text `yaml:"key"`
	Ratio   float64     `yaml:"ratio" validate:"max=1.5"`
}

func lockedPlugin(kind, name string) Locked {
	d := Description{Kind: kind, Name: name, Version: "1.2.0", API: []int{1, 2}, Handles: []string{"send", "receive"},
		Flag: 0x4000_0000, Mutates: true, Above: []string{"failuredetector"}, Promise: "packs: it is a “zip”, isn't it\n?",
		Features: []string{"transforming"}, ConfigSchema: config.SchemaOf(lockedOptions{})}
	return Locked{Kind: kind, Name: name, Version: d.Version, API: d.API, SHA256: strings.Repeat("0e", 32), Size: 12345678,
		Describe: d, Conformance: Summary{Result: "partial", Suite: "1", Date: "2026-11-20", Profiles: []ProfileSummary{{"interceptor", "partial", 14, 0, 1}, {"plugin", "conformant", 12, 0, 0}}}}
}

// sameSchemas compares schemas by their meaning.
var sameSchemas = cmp.Comparer(func(a, b json.RawMessage) bool {
	var x, y any
	if len(a) == 0 || len(b) == 0 {
		return len(a) == len(b)
	}
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && cmp.Equal(x, y)
})

func TestLockRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), LockName)
	if _, err := ReadLock(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a missing file: %v", err)
	}
	var l Lock
	for _, id := range []string{"interceptor/acme/zstd", "manager/acme/redis", "interceptor/acme/audit"} {
		kind, name, _ := strings.Cut(id, "/")
		if _, replaced, err := l.Put(lockedPlugin(kind, name)); err != nil || replaced {
			t.Fatal(replaced, err)
		}
	}
	if err := l.Write(path); err != nil {
		t.Fatal(err)
	}
	got, err := ReadLock(path)
	if err != nil {
		text, _ := os.ReadFile(path)
		t.Fatalf("%v\n%s", err, text)
	}
	if d := cmp.Diff(&l, got, sameSchemas); d != "" {
		t.Error(d)
	}
	first, _ := os.ReadFile(path)
	again, err := got.Marshal()
	if err != nil || string(again) != string(first) {
		t.Errorf("the text is not stable: %v\n%s\n%s", err, first, again)
	}
	if i, j := strings.Index(string(first), "acme/audit"), strings.Index(string(first), "acme/zstd"); i > j {
		t.Error("not sorted")
	}
	if _, replaced, err := got.Put(lockedPlugin("manager", "acme/redis")); err != nil || !replaced || len(got.Plugins) != 3 {
		t.Errorf("put again: %v, %v, %d plugins", replaced, err, len(got.Plugins))
	}
	if _, ok := got.Remove("manager/acme/redis"); !ok || len(got.Plugins) != 2 {
		t.Error("remove")
	}
}

// Whatever a plugin says of itself comes back as it was.
func TestLockKeepsDescriptions(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := lockedPlugin("interceptor", "acme/x")
		p.Describe.Promise = rapid.String().Draw(t, "promise")
		p.Describe.Features = rapid.SliceOfN(rapid.String(), 1, 4).Draw(t, "features")
		p.Describe.Flag = channel.Options(rapid.Uint32().Draw(t, "flag"))
		schema, err := json.Marshal(map[string]any{"type": "object", "properties": map[string]any{
			rapid.String().Draw(t, "key"): map[string]any{"default": rapid.Float64().Draw(t, "number"), "minimum": rapid.Int64().Draw(t, "min"),
				"enum": []any{nil, true, rapid.String().Draw(t, "word"), []any{[]any{map[string]any{}}}}}}})
		if err != nil {
			t.Fatal(err)
		}
		p.Describe.ConfigSchema = schema
		l := &Lock{Plugins: []Locked{p}}
		text, err := l.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseLock("f", text)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if d := cmp.Diff(l, got, sameSchemas); d != "" {
			t.Fatalf("%s\n%s", d, text)
		}
	})
}

func TestLockRefuses(t *testing.T) {
	text, err := (&Lock{Plugins: []Locked{lockedPlugin("interceptor", "acme/zstd")}}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	good := string(text)
	entry := good[strings.Index(good, "  - kind"):]
	for what, test := range map[string]struct{ text, want string }{
		"twice":          {good + entry, "is there twice"},
		"unknown key":    {strings.Replace(good, "bytes:", "byte:", 1), `did you mean "bytes"`},
		"digest":         {strings.Replace(good, "0e0e", "0E0E", 1), "lower case"},
		"short digest":   {strings.Replace(good, "0e0e", "", 1), "no SHA-256"},
		"kind":           {strings.Replace(good, "kind: interceptor", "kind: valve", 1), "no kind of plugin"},
		"name":           {strings.Replace(good, "name: acme/zstd", "name: ../zstd", 1), "no name of a plugin"},
		"size":           {strings.Replace(good, "bytes: 12345678", "bytes: -1", 1), "cannot be"},
		"huge":           {strings.Replace(good, "bytes: 12345678", "bytes: 12345678901234", 1), "cannot be"},
		"version":        {strings.Replace(good, "version: 1\n", "version: 2\n", 1), "version 2"},
		"no version":     {strings.Replace(good, "version: 1\n", "", 1), "version: is missing"},
		"description":    {strings.Replace(good, `version: "1.2.0"`, `version: "1.3.0"`, 1), "not of this plugin"},
		"describe key":   {strings.Replace(good, "mutates: true", "mutate: true", 1), "mutate"},
		"schema":         {strings.Replace(good, "type: object", "type: string", 1), "not a schema"},
		"result":         {strings.Replace(good, "result: partial\n      suite", "result: fine\n      suite", 1), "none of"},
		"wrong type":     {strings.Replace(good, "api: [1, 2]", "api: one", 1), "a list"},
		"not yaml":       {"\x00", ""},
		"bidi":           {strings.Replace(good, `version: "1.2.0"`, "version: \"1.2\u202e.0\"", 1), "do not print"},
		"too many bytes": {strings.Repeat("#", config.MaxFile+1), "bound"},
	} {
		if test.text == good {
			t.Errorf("%s: nothing was changed", what)
		}
		if _, err := ParseLock("plugins.lock", []byte(test.text)); err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "plugins.lock") {
			t.Errorf("%s: %v, want %q and the file's name", what, err, test.want)
		}
	}
}

func TestStoreIsVerified(t *testing.T) {
	dir := t.TempDir()
	program, store := filepath.Join(dir, "program"), StoreOf(filepath.Join(dir, LockName))
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	sum, size, err := Keep(store, program)
	if err != nil {
		t.Fatal(err)
	}
	p := lockedPlugin("interceptor", "acme/zstd")
	p.SHA256, p.Size = sum, size
	l := &Lock{Plugins: []Locked{p}}
	if err := l.Verify(store); err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(store, sum)
	if info, err := os.Stat(copied); err != nil || info.Mode().Perm() != 0o500 {
		t.Errorf("mode of the copy: %v, %v", info.Mode(), err)
	}
	if _, _, err := Keep(store, program); err != nil { // it is there already
		t.Error(err)
	}
	for what, change := range map[string]func() error{
		"a changed byte": func() error { return os.WriteFile(copied, []byte("#!/bin/SH\n"), 0o500) },
		"a longer file":  func() error { return os.WriteFile(copied, []byte("#!/bin/sh\n\n"), 0o500) },
		"missing":        func() error { return nil },
		"a link":         func() error { return os.Symlink(program, copied) },
		"writable by others": func() error {
			return errors.Join(os.WriteFile(copied, []byte("#!/bin/sh\n"), 0o500), os.Chmod(copied, 0o522))
		},
	} {
		if err := os.RemoveAll(copied); err != nil {
			t.Fatal(err)
		}
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if err := l.Verify(store); err == nil || !strings.Contains(err.Error(), "interceptor/acme/zstd") {
			t.Errorf("%s: %v, want an error that names the plugin", what, err)
		}
	}
	// The store heals, and forgets what is not pinned.
	if _, _, err := Keep(store, program); err != nil {
		t.Fatal(err)
	}
	if err := l.Verify(store); err != nil {
		t.Error(err)
	}
	l.Remove(p.ID())
	if gone, err := l.Prune(store); err != nil || len(gone) != 1 {
		t.Errorf("prune: %v, %v", gone, err)
	}
	if _, _, err := Keep(store, dir); err == nil {
		t.Error("a directory was kept")
	}
}

func FuzzParseLock(f *testing.F) {
	text, err := (&Lock{Plugins: []Locked{lockedPlugin("interceptor", "acme/zstd")}}).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("version: 1\nplugins: []\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := ParseLock("f", data)
		if err != nil {
			return
		}
		again, err := l.Marshal()
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if _, err := ParseLock("f", again); err != nil {
			t.Fatalf("what was written cannot be read: %v\n%s", err, again)
		}
	})
}
