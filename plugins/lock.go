package plugins

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/longhouse-go/longhouse/core/config"
)

const (
	// LockName is the usual name of a lock file; it lies beside the
	// configuration.
	LockName = "plugins.lock"
	// lockVersion is the version of the file's format.
	lockVersion = 1
	// maxLocked bounds the plugins of a lock, maxProgram the size of one
	// program in bytes. The file itself may have config.MaxFile bytes.
	maxLocked  = 256
	maxProgram = 512 << 20
)

// Lock is what may run: the plugins that an operator has pinned, as they are
// written in a plugins.lock.
type Lock struct {
	Plugins []Locked
}

// Locked is one pinned plugin: its program by digest, and what it said of itself
// and what the conformance suite said of it when it was pinned.
type Locked struct {
	Kind, Name, Version string
	// API lists the majors of the plugin protocol that the program speaks.
	API []int
	// SHA256 is the program's digest, 64 hexadecimal digits in lower case, and
	// Size its size in bytes.
	SHA256 string
	Size   int64
	// Describe is the program's answer to "describe".
	Describe    Description
	Conformance Summary
}

// ID returns kind/name.
func (l Locked) ID() string { return l.Kind + "/" + l.Name }

// Summary is what remains of a conformance report in a lock.
type Summary struct {
	// Result is conformant, partial, nonconformant, or skipped if the suite
	// was not run.
	Result string `yaml:"result"`
	// Suite is the version of the suite, Date the day of the run, 2006-01-02.
	Suite string `yaml:"suite"`
	Date  string `yaml:"date"`
	// Profiles are the ones that were run.
	Profiles []ProfileSummary `yaml:"profiles"`
}

// ProfileSummary counts the checks of one profile.
type ProfileSummary struct {
	Profile string `yaml:"profile"`
	Result  string `yaml:"result"`
	Passed  int    `yaml:"passed"`
	Failed  int    `yaml:"failed"`
	Skipped int    `yaml:"skipped"`
}

// NotTried is the result of a plugin that was pinned without a run of the suite.
const NotTried = "skipped"

var results = []string{"conformant", "partial", "nonconformant", NotTried}

// lockFile is the file's form.
type lockFile struct {
	Version int           `yaml:"version" validate:"required"`
	Plugins []lockedEntry `yaml:"plugins"`
}

type lockedEntry struct {
	Kind        string         `yaml:"kind" validate:"required"`
	Name        string         `yaml:"name" validate:"required"`
	Version     string         `yaml:"version"`
	API         []int          `yaml:"api"`
	SHA256      string         `yaml:"sha256" validate:"required"`
	Bytes       int64          `yaml:"bytes" validate:"required"`
	Describe    map[string]any `yaml:"describe"`
	Conformance Summary        `yaml:"conformance"`

	Pos config.Pos `yaml:"-"`
}

// ReadLock reads a lock file. It is strict: an unknown key, a plugin that is
// there twice, a digest that is none, a description that does not fit are errors
// that name file and line. A missing file is fs.ErrNotExist.
func ReadLock(path string) (*Lock, error) {
	data, err := config.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("plugins: lock: %w", err)
	}
	return ParseLock(path, data)
}

// ParseLock reads the text of a lock file; path is its name for errors.
func ParseLock(path string, data []byte) (*Lock, error) {
	var f lockFile
	if err := config.Decode(data, path, &f); err != nil {
		return nil, fmt.Errorf("plugins: lock: %w", err)
	}
	if f.Version != lockVersion {
		return nil, fmt.Errorf("plugins: lock: %s has version %d of the format, this program reads %d: use the longhouse that wrote it", path, f.Version, lockVersion)
	}
	l := &Lock{}
	var errs []error
	for _, e := range f.Plugins {
		p, err := e.locked()
		if err == nil {
			err = l.insert(p)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", e.Pos, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("plugins: lock: %w", err)
	}
	return l, nil
}

func (e lockedEntry) locked() (Locked, error) {
	p := Locked{Kind: e.Kind, Name: e.Name, Version: e.Version, API: e.API, SHA256: e.SHA256, Size: e.Bytes, Conformance: e.Conformance}
	text, err := json.Marshal(e.Describe)
	if err != nil {
		return p, fmt.Errorf("%s: describe: %w", p.ID(), err)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&p.Describe); err != nil {
		return p, fmt.Errorf("%s: describe: %w", p.ID(), err)
	}
	return p, nil
}

// lockedKinds are the kinds of plugins that can be programs of their own.
var lockedKinds = []string{"deployer", "interceptor", "manager", "membership"}

var (
	pluginName = regexp.MustCompile(`^[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)?$`)
	plainText  = regexp.MustCompile(`^[[:print:]]*$`)
)

// maxText bounds names and versions, in bytes.
const maxText = 128

// check finds what is wrong with an entry.
func (l Locked) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(l.ID()+": "+format, args...)) }
	if !slices.Contains(lockedKinds, l.Kind) {
		bad("%q is no kind of plugin (known: %s)", l.Kind, strings.Join(lockedKinds, ", "))
	}
	if !pluginName.MatchString(l.Name) || len(l.Name) > maxText {
		bad("%q is no name of a plugin: write vendor/name in lower case", l.Name)
	}
	if !plainText.MatchString(l.Version) || len(l.Version) > maxText {
		bad("the version has more than %d bytes, or characters that do not print", maxText)
	}
	if !validDigest(l.SHA256) || strings.ToLower(l.SHA256) != l.SHA256 {
		bad("%q is no SHA-256: 64 hexadecimal digits in lower case are wanted", l.SHA256)
	}
	if l.Size <= 0 || l.Size > maxProgram {
		bad("a program of %d bytes cannot be; the bound is %d", l.Size, maxProgram)
	}
	if d := l.Describe; d.Kind != l.Kind || d.Name != l.Name || d.Version != l.Version || !slices.Equal(d.API, l.API) {
		bad("the description is of %s/%s %s (api %v), not of this plugin", d.Kind, d.Name, d.Version, d.API)
	}
	if s := l.Describe.ConfigSchema; len(s) > 0 {
		if err := config.CheckSchema(s); err != nil {
			bad("%w", err)
		}
	}
	if !slices.Contains(results, l.Conformance.Result) {
		bad("conformance: %q is none of %s", l.Conformance.Result, strings.Join(results, ", "))
	}
	return errors.Join(errs...)
}

// insert adds an entry in its place.
func (l *Lock) insert(p Locked) error {
	if err := p.check(); err != nil {
		return err
	}
	i, found := l.find(p.ID())
	if found {
		return fmt.Errorf("%s is there twice", p.ID())
	}
	if len(l.Plugins) >= maxLocked {
		return fmt.Errorf("more than %d plugins", maxLocked)
	}
	l.Plugins = slices.Insert(l.Plugins, i, p)
	return nil
}

func (l *Lock) find(id string) (int, bool) {
	return slices.BinarySearchFunc(l.Plugins, id, func(p Locked, id string) int { return strings.Compare(p.ID(), id) })
}

// Get returns the plugin of that kind and name.
func (l *Lock) Get(id string) (Locked, bool) {
	if i, ok := l.find(id); ok {
		return l.Plugins[i], true
	}
	return Locked{}, false
}

// Program returns a plugin whose program has that digest.
func (l *Lock) Program(sha256 string) (Locked, bool) {
	i := slices.IndexFunc(l.Plugins, func(p Locked) bool { return p.SHA256 == sha256 })
	if i < 0 {
		return Locked{}, false
	}
	return l.Plugins[i], true
}

// Put adds a plugin or replaces the one of the same kind and name, which it
// returns.
func (l *Lock) Put(p Locked) (old Locked, replaced bool, err error) {
	if err := p.check(); err != nil {
		return old, false, fmt.Errorf("plugins: lock: %w", err)
	}
	if old, replaced = l.Remove(p.ID()); replaced {
		return old, true, l.insert(p)
	}
	return old, false, l.insert(p)
}

// Remove takes the plugin of that id, kind/name, out.
func (l *Lock) Remove(id string) (Locked, bool) {
	i, ok := l.find(id)
	if !ok {
		return Locked{}, false
	}
	p := l.Plugins[i]
	l.Plugins = slices.Delete(l.Plugins, i, i+1)
	return p, true
}

// Write writes the lock file at once: whoever reads it sees the old or the new
// one. The text depends on the content alone.
func (l *Lock) Write(path string) error {
	text, err := l.Marshal()
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".plugins-lock-")
	if err != nil {
		return fmt.Errorf("plugins: lock: %w", err)
	}
	defer os.Remove(tmp.Name()) // gone already if all went well
	_, err = tmp.Write(text)
	if err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("plugins: lock: %w", err)
	}
	return nil
}

// Marshal returns the text of the file.
func (l *Lock) Marshal() ([]byte, error) {
	var w lockWriter
	w.WriteString("# The plugins that may run here, pinned by the digest of their program.\n" +
		"# Written by \"longhouse plugin add\"; meant to be reviewed and kept with the configuration.\n")
	sorted := slices.SortedFunc(slices.Values(l.Plugins), func(a, b Locked) int { return strings.Compare(a.ID(), b.ID()) })
	fmt.Fprintf(&w, "version: %d\nplugins:", lockVersion)
	if len(sorted) == 0 {
		w.WriteString(" []")
	}
	w.WriteByte('\n')
	for _, p := range sorted {
		if err := p.check(); err != nil {
			return nil, fmt.Errorf("plugins: lock: %w", err)
		}
		var describe map[string]any
		if err := throughJSON(p.Describe, &describe); err != nil {
			return nil, fmt.Errorf("plugins: lock: %s: describe: %w", p.ID(), err)
		}
		profiles := make([]any, len(p.Conformance.Profiles))
		for i, c := range p.Conformance.Profiles {
			profiles[i] = ordered{{"profile", c.Profile}, {"result", c.Result}, {"passed", c.Passed}, {"failed", c.Failed}, {"skipped", c.Skipped}}
		}
		api := make([]any, len(p.API))
		for i, v := range p.API {
			api[i] = v
		}
		w.value([]any{ordered{
			{"kind", p.Kind}, {"name", p.Name}, {"version", p.Version}, {"api", api},
			{"sha256", p.SHA256}, {"bytes", p.Size},
			{"conformance", ordered{{"result", p.Conformance.Result}, {"suite", p.Conformance.Suite}, {"date", p.Conformance.Date}, {"profiles", profiles}}},
			{"describe", describe},
		}}, 2)
	}
	if w.Len() > config.MaxFile {
		return nil, fmt.Errorf("plugins: lock: the file would have %d bytes, more than the bound of %d", w.Len(), config.MaxFile)
	}
	return w.Bytes(), nil
}

// throughJSON turns v into plain maps, lists, strings and numbers.
func throughJSON(v, into any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	return dec.Decode(into)
}

// ordered is a mapping whose keys keep their order; those of a Go map are
// sorted.
type ordered []struct {
	key   string
	value any
}

// lockWriter writes block YAML.
type lockWriter struct{ bytes.Buffer }

// value writes v, a mapping or list, at the given indent, beginning on a new
// line.
func (w *lockWriter) value(v any, indent int) {
	switch v := v.(type) {
	case map[string]any:
		o := make(ordered, 0, len(v))
		for _, k := range slices.Sorted(maps.Keys(v)) {
			o = append(o, struct {
				key   string
				value any
			}{k, v[k]})
		}
		w.value(o, indent)
	case ordered:
		for _, p := range v {
			w.pad(indent)
			w.WriteString(scalar(p.key) + ":")
			w.child(p.value, indent+2)
		}
	case []any:
		for _, item := range v {
			if o, ok := item.(ordered); ok && len(o) > 0 {
				var inner lockWriter
				inner.value(o, indent+2)
				text := inner.Bytes()
				text[indent] = '-'
				w.Write(text)
				continue
			}
			w.pad(indent)
			w.WriteByte('-')
			w.child(item, indent+2)
		}
	}
}

// child writes a value after a key or dash.
func (w *lockWriter) child(v any, indent int) {
	n := 0
	switch v := v.(type) {
	case map[string]any:
		if n = len(v); n == 0 {
			w.WriteString(" {}\n")
			return
		}
	case ordered:
		n = len(v)
	case []any:
		if flow, ok := flowList(v); ok {
			w.WriteString(" " + flow + "\n")
			return
		}
		n = len(v)
	}
	if n > 0 {
		w.WriteByte('\n')
		w.value(v, indent)
		return
	}
	w.WriteString(" " + scalar(v) + "\n")
}

// flowList writes a list of scalars on one line.
func flowList(v []any) (string, bool) {
	words := make([]string, len(v))
	for i, item := range v {
		switch item.(type) {
		case map[string]any, ordered, []any:
			return "", false
		}
		words[i] = scalar(item)
	}
	return "[" + strings.Join(words, ", ") + "]", true
}

func (w *lockWriter) pad(n int) { w.WriteString(strings.Repeat(" ", n)) }

// bare is text that needs no quotes anywhere in YAML.
var bare = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_./-]*$`)

// notBare looks like text and would be read as something else.
var notBare = []string{"true", "false", "null", "yes", "no", "on", "off", "y", "n"}

func scalar(v any) string {
	switch v := v.(type) {
	case string:
		if bare.MatchString(v) && !slices.Contains(notBare, strings.ToLower(v)) {
			return v
		}
		var b bytes.Buffer
		enc := json.NewEncoder(&b) // a JSON string is a YAML string
		enc.SetEscapeHTML(false)
		_ = enc.Encode(v) // strings always encode
		return strings.TrimSuffix(b.String(), "\n")
	case json.Number:
		if _, err := strconv.ParseInt(v.String(), 10, 64); err == nil {
			return v.String()
		}
		f, _ := v.Float64() // out of range is the biggest there is
		text := strconv.FormatFloat(f, 'e', -1, 64)
		if !strings.Contains(text, ".") { // a fraction makes it a number for every YAML reader
			text = strings.Replace(text, "e", ".0e", 1)
		}
		return text
	case nil:
		return "null"
	}
	return fmt.Sprint(v) // bool, int, int64
}

// StoreOf returns the directory with the copies of the programs of a lock file.
func StoreOf(lock string) string {
	return filepath.Join(filepath.Dir(lock), ".longhouse", "plugins")
}

// Keep copies a program into a store under its digest, readable and executable
// by the owner only, and returns digest and size.
func Keep(storeDir, path string) (sha256 string, size int64, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", 0, fmt.Errorf("plugins: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() == 0 || info.Size() > maxProgram {
		return "", 0, fmt.Errorf("plugins: %s is not a program: a regular file of at most %d bytes is wanted", path, maxProgram)
	}
	if err := os.MkdirAll(storeDir, 0o700); err != nil {
		return "", 0, fmt.Errorf("plugins: store: %w", err)
	}
	tmp, err := os.CreateTemp(storeDir, "new-")
	if err != nil {
		return "", 0, fmt.Errorf("plugins: store: %w", err)
	}
	defer os.Remove(tmp.Name())
	sha256, err = digest(path, tmp)
	copied, err2 := tmp.Stat()
	if err = errors.Join(err, err2, tmp.Chmod(0o500), tmp.Sync(), tmp.Close()); err != nil {
		return "", 0, fmt.Errorf("plugins: store: %w", err)
	}
	if err := os.Rename(tmp.Name(), filepath.Join(storeDir, sha256)); err != nil {
		return "", 0, fmt.Errorf("plugins: store: %w", err)
	}
	return sha256, copied.Size(), nil
}

// Verify reads all programs of the store again and reports those that are
// missing, are not the ones that were pinned, or that others may change.
func (l *Lock) Verify(storeDir string) error {
	var errs []error
	for _, p := range l.Plugins {
		if err := p.Verify(storeDir); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.ID(), err))
		}
	}
	return errors.Join(errs...)
}

// Verify checks the program of one plugin.
func (l Locked) Verify(storeDir string) error {
	path := filepath.Join(storeDir, l.SHA256)
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("plugins: its program is not in the store (%s): add the plugin again", path)
	case err != nil:
		return fmt.Errorf("plugins: %w", err)
	case !info.Mode().IsRegular():
		return fmt.Errorf("plugins: %s is not a regular file: remove it, and add the plugin again", path)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("plugins: others may change %s (mode %04o): remove it, and add the plugin again", path, info.Mode().Perm())
	case info.Size() != l.Size:
		return fmt.Errorf("plugins: %s is not the program that was pinned: it has %d bytes, pinned are %d", path, info.Size(), l.Size)
	}
	return verify(path, l.SHA256)
}

// Prune removes the programs of a store that the lock does not name, and returns
// their digests.
func (l *Lock) Prune(storeDir string) ([]string, error) {
	entries, err := os.ReadDir(storeDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("plugins: store: %w", err)
	}
	var removed []string
	for _, e := range entries {
		pinned := slices.ContainsFunc(l.Plugins, func(p Locked) bool { return p.SHA256 == e.Name() })
		if pinned || !validDigest(e.Name()) || !e.Type().IsRegular() {
			continue
		}
		if err := os.Remove(filepath.Join(storeDir, e.Name())); err != nil {
			return removed, fmt.Errorf("plugins: store: %w", err)
		}
		removed = append(removed, e.Name())
	}
	return removed, nil
}

// External returns the plugins of the lock for [Config], with the store's copies
// as their programs.
func (l *Lock) External(storeDir string) []External {
	list := make([]External, len(l.Plugins))
	for i, p := range l.Plugins {
		list[i] = External{Kind: p.Kind, Name: p.Name, Path: filepath.Join(storeDir, p.SHA256), SHA256: p.SHA256, Describe: p.Describe}
	}
	return list
}

// Unpinned returns the components of a program that nobody has pinned, for
// development: it is run to ask what it is.
func Unpinned(ctx context.Context, program string) ([]External, error) {
	sum, err := digest(program, io.Discard)
	if err != nil {
		return nil, fmt.Errorf("plugins: %w", err)
	}
	described, err := DescribeProgram(ctx, program)
	if err != nil {
		return nil, err
	}
	list := make([]External, len(described))
	for i, d := range described {
		list[i] = External{Kind: d.Kind, Name: d.Name, Path: program, SHA256: sum, Describe: d, Unpinned: true}
	}
	return list, nil
}
