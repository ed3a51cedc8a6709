package replica_test

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins/manager/backup"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
)

// documented checks that every option is in a README, with its default.
func documented(t *testing.T, text string, v reflect.Value) {
	for i := range v.NumField() {
		name, inline := strings.CutPrefix(v.Type().Field(i).Tag.Get("yaml"), ",inline")
		if inline {
			documented(t, text, v.Field(i))
			continue
		}
		value := fmt.Sprint(v.Field(i).Interface())
		if d, is := v.Field(i).Interface().(time.Duration); is {
			value = strings.TrimSuffix(d.String(), "m0s")
			if value != d.String() {
				value += "m"
			}
		}
		if value == "1m" && !strings.Contains(text, "| `"+name+"` | 1m |") {
			value = "60s"
		}
		if line := "| `" + name + "` | " + value + " |"; !strings.Contains(text, line) {
			t.Errorf("README.md lacks %q", line)
		}
	}
}

// The managers that this package makes.
func TestConfig(t *testing.T) {
	for _, c := range []struct {
		name     string
		defaults any
		factory  core.ManagerFactory
		bad      map[string]string // by a part of the error
	}{
		{"backup", backup.Default(), backup.Factory, map[string]string{
			"copies is -1": "copies: -1", "copies is 0": "copies: 0", "copies is 17": "copies: 17", "recreate_after": "recreate_after: -1s", "settle_time": "settle_time: -1s",
		}},
		{"delta", delta.Default(), delta.Factory, map[string]string{"copies": "copies: 1", "settle_time": "settle_time: -1s"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("..", "..", c.name, "README.md"))
			if err != nil {
				t.Fatal(err)
			}
			documented(t, string(text), reflect.ValueOf(c.defaults))
			for want, bad := range c.bad {
				err := c.factory.Check(func(into any) error { return config.Decode([]byte(bad+"\nchunk_bytes: 1"), "options", into) })
				if err == nil || !strings.Contains(err.Error(), want) || want != "copies" && !strings.Contains(err.Error(), "chunk_bytes") {
					t.Errorf("%s: %v", bad, err)
				}
			}
			m, err := c.factory.New(channel.NoConfig, channel.Settings{})
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
