package conformance_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/conformance/server"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins/manager/memcached"
	"github.com/longhouse-go/longhouse/plugins/manager/persistent"
	"github.com/longhouse-go/longhouse/plugins/manager/redis"
)

// places are all places for sessions that come with Longhouse: how to make the
// options of their manager, and how to open the store.
var places = []struct {
	name     string
	manager  core.ManagerFactory
	features []string
	options  func(t *testing.T) string
	open     func(options string) (core.Store, error)
	virtual  bool
}{
	{
		"file", persistent.Factory, []string{conformance.FeatureListing, conformance.FeatureDurable},
		func(t *testing.T) string {
			return fmt.Sprintf("store: file\ndirectory: %q\nsync: false\n", filepath.Join(t.TempDir(), "sessions"))
		},
		openStore(persistent.Default(), persistent.Open),
		true,
	},
	{
		"sqlite", persistent.Factory, []string{conformance.FeatureListing, conformance.FeatureDurable},
		func(t *testing.T) string {
			return fmt.Sprintf("store: sqlite\nfile: %q\n", filepath.Join(t.TempDir(), "sessions.db"))
		},
		openStore(persistent.Default(), persistent.Open),
		false,
	},
	{
		"postgres", persistent.Factory, []string{conformance.FeatureListing, conformance.FeatureDurable},
		func(t *testing.T) string {
			return fmt.Sprintf("store: postgres\ndsn: %q\nparallel: 4\n", server.Postgres(t).DSN())
		},
		openStore(persistent.Default(), persistent.Open),
		false,
	},
	{
		"redis", redis.Factory, []string{conformance.FeatureListing, conformance.FeatureDurable},
		func(t *testing.T) string { return fmt.Sprintf("addresses: [%q]\n", server.Redis(t).Addr) },
		openStore(redis.Default(), func(c redis.Config, _ channel.Settings) (core.Store, error) { return redis.NewStore(c) }),
		false,
	},
	{
		"memcached", memcached.Factory, []string{conformance.FeatureDurable},
		func(t *testing.T) string { return fmt.Sprintf("nodes: [%q]\n", "n1:"+server.Memcached(t).Addr) },
		openStore(memcached.Default(), func(c memcached.Config, s channel.Settings) (core.Store, error) { return memcached.NewStore(c, s) }),
		false,
	},
	{
		"memcached, three nodes", memcached.Factory, []string{conformance.FeatureDurable},
		func(t *testing.T) string {
			return fmt.Sprintf("nodes: [%q, %q, %q]\nfailover: [n3]\n", "n1:"+server.Memcached(t).Addr, "n2:"+server.Memcached(t).Addr, "n3:"+server.Memcached(t).Addr)
		},
		openStore(memcached.Default(), func(c memcached.Config, s channel.Settings) (core.Store, error) { return memcached.NewStore(c, s) }),
		false,
	},
}

// openStore returns a function that opens a store with options as YAML.
func openStore[C any](defaults C, open func(C, channel.Settings) (core.Store, error)) func(string) (core.Store, error) {
	f := channel.FactoryOf("store", defaults, open)
	return func(options string) (core.Store, error) {
		return f.New(func(into any) error { return config.Decode([]byte(options), "options", into) }, channel.Settings{})
	}
}

// The places pass the profile of stores.
func TestStores(t *testing.T) {
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) {
			options := p.options(t)
			conformance.Run(t, conformance.Store(p.name, func(*conformance.T) (core.Store, error) { return p.open(options) }, p.features...), conformance.Seed(1))
		})
	}
}

// The managers around those places that have no clock of their own, and so can
// live in virtual time, pass what every manager passes.
func TestStoreManagers(t *testing.T) {
	for _, p := range places {
		if p.virtual {
			t.Run(p.name, func(t *testing.T) {
				conformance.Run(t, conformance.ManagerOf(p.manager, p.options(t), deltaFeatures...), conformance.Seed(1))
			})
		}
	}
}
