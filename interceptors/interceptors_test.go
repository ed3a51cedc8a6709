package interceptors_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"

	"github.com/pion/transport/v2"
	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/interceptors"
	"github.com/longhouse-go/longhouse/interceptors/encrypt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// options returns the options without which a built-in interceptor cannot be
// made.
func options(name string) channel.Decode {
	if name != "encrypt" {
		return channel.NoConfig
	}
	return func(into any) error {
		into.(*encrypt.Config).Key = secret.New("a secret that all nodes of the tests share")
		return nil
	}
}

// noNet is a network that is never used.
type noNet struct{ transport.Net }

func TestBuiltinIsAStack(t *testing.T) {
	var layers []channel.Layer
	for _, f := range interceptors.Builtin() {
		if err := f.Check(options(f.Name)); err != nil {
			t.Errorf("%s: defaults: %v", f.Name, err)
		}
		l, err := f.New(options(f.Name), channel.Settings{Name: f.Name, Net: noNet{}})
		if err != nil {
			t.Fatal(err)
		}
		if d := l.Descriptor(); d.Name != f.Name {
			t.Errorf("factory %q makes a layer called %q", f.Name, d.Name)
		}
		layers = append(layers, channel.Layer{Interceptor: l, Origin: fmt.Sprintf("built in %d", len(layers)+1)})
	}
	if _, err := channel.NewStack(layers...); err != nil {
		t.Errorf("the recommended order is refused: %v", err)
	}
}

func TestEveryFolderIsListedAndHasAReadme(t *testing.T) {
	headings := []string{"Name", "Description", "Options", "Flags", "Placement", "Metrics", "Examples"}
	var listed []string
	for _, f := range interceptors.Builtin() {
		listed = append(listed, f.Name)
	}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !e.IsDir() || e.Name() == "internal" || e.Name() == "testdata" {
			continue
		}
		if !slices.Contains(listed, e.Name()) {
			t.Errorf("%s is not in Builtin", e.Name())
		}
		text, err := os.ReadFile(filepath.Join(e.Name(), "README.md"))
		if err != nil {
			t.Error(err)
			continue
		}
		var got []string
		for _, m := range regexp.MustCompile(`(?m)^## (.*)$`).FindAllStringSubmatch(string(text), -1) {
			got = append(got, m[1])
		}
		if !slices.Equal(got, headings) {
			t.Errorf("%s/README.md has the headings %q, want %q", e.Name(), got, headings)
		}
	}
}
