package delta

import (
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// Every option is in the README, with its default.
func TestOptionsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	v := reflect.ValueOf(Default())
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("yaml")
		value := fmt.Sprint(v.Field(i).Interface())
		if d, is := v.Field(i).Interface().(time.Duration); is {
			value = strings.TrimSuffix(d.String(), "m0s")
			if value != d.String() {
				value += "m"
			}
		}
		if value == "1m" && !strings.Contains(string(text), "| `"+name+"` | 1m |") {
			value = "60s"
		}
		if line := "| `" + name + "` | " + value + " |"; !strings.Contains(string(text), line) {
			t.Errorf("README.md lacks %q", line)
		}
	}
}

func TestConfig(t *testing.T) {
	c := Default()
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	common := c.common()
	for i, v := 0, reflect.ValueOf(common); i < v.NumField(); i++ {
		if f := v.Field(i); f.Kind() != reflect.Bool && f.Kind() != reflect.Int && f.IsZero() && v.Type().Field(i).Name != "RecreateAfter" {
			t.Errorf("%s is not passed on to the engine", v.Type().Field(i).Name)
		}
	}
	bad := Config{ChunkBytes: 1, SettleTime: -1}
	if _, err := New(bad, channel.Settings{}); err == nil || !strings.HasPrefix(err.Error(), "delta: ") ||
		!strings.Contains(err.Error(), "chunk_bytes") || !strings.Contains(err.Error(), "settle_time") {
		t.Error(err)
	}
	m, err := Factory.New(channel.NoConfig, channel.Settings{})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}
