// Package redis is the session manager that keeps sessions in Redis, one hash
// for each, which Redis forgets by itself when the session expires. The manager
// itself is plugins/manager/stored.
//
// The package must not import interceptors, valves, fx, go-plugin or grpc.
package redis

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

// Config is what a user can set.
type Config struct {
	stored.Config `yaml:",inline"`
	// Addresses are host:port of the server; several are the nodes of a Redis
	// cluster or, with Master, its sentinels.
	Addresses []string `yaml:"addresses"`
	// Master is the name of the master that the sentinels watch.
	Master string `yaml:"master"`
	// Username and Password log in.
	Username string      `yaml:"username"`
	Password secret.Text `yaml:"password"`
	// Database is the number of the database; a cluster has only 0.
	Database int `yaml:"database"`
	// TLS encrypts the connections; CA is a file with the certificates that
	// sign the servers' ones, the system's if it is empty.
	TLS bool   `yaml:"tls"`
	CA  string `yaml:"ca"`
	// Prefix begins all keys.
	Prefix string `yaml:"prefix"`
	// ConnectTimeout bounds opening a connection.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
}

// Default returns the defaults.
func Default() Config {
	return Config{Config: stored.Defaults(), Addresses: []string{"127.0.0.1:6379"}, Prefix: "longhouse:", ConnectTimeout: time.Second}
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	errs := []error{c.Config.Validate()}
	if len(c.Addresses) == 0 {
		errs = append(errs, errors.New("addresses: none is given; write for example [127.0.0.1:6379]"))
	}
	for _, a := range c.Addresses {
		if _, _, err := net.SplitHostPort(a); err != nil {
			errs = append(errs, fmt.Errorf("addresses: %q is not host:port", a))
		}
	}
	if c.Database < 0 || c.Database > 0 && len(c.Addresses) > 1 && c.Master == "" {
		errs = append(errs, fmt.Errorf("database: %d does not exist in a cluster", c.Database))
	}
	if c.CA != "" && !c.TLS {
		errs = append(errs, errors.New("ca: given, but tls is false"))
	}
	if c.ConnectTimeout <= 0 {
		errs = append(errs, fmt.Errorf("connect_timeout: %v is too short", c.ConnectTimeout))
	}
	return errors.Join(errs...)
}

// Factory makes the manager "redis".
var Factory = stored.FactoryOf("redis", Default(), func(c *Config) *stored.Config { return &c.Config },
	func(c Config, _ channel.Settings) (core.Store, error) { return NewStore(c) })

// Store keeps each session in a hash with the fields d (the record), v (its
// version, a number that grows) and e (when it expires, in milliseconds since
// 1970, 0 for never).
type Store struct {
	client redis.UniversalClient
	prefix string
}

// NewStore returns a store; it connects when it is used.
func NewStore(c Config) (*Store, error) {
	o := &redis.UniversalOptions{
		Addrs: c.Addresses, MasterName: c.Master, Username: c.Username, Password: c.Password.Reveal(), DB: c.Database,
		DialTimeout: c.ConnectTimeout, ReadTimeout: c.Timeout, WriteTimeout: c.Timeout, ContextTimeoutEnabled: true,
		PoolSize: c.Parallel + 2, PoolTimeout: c.Timeout,
		// What fails is repeated by the manager, which knows when it is in vain.
		MaxRetries: -1, DisableIdentity: true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	if c.TLS {
		o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		if c.CA != "" {
			pem, err := os.ReadFile(c.CA)
			if err != nil {
				return nil, fmt.Errorf("redis: ca: %w", err)
			}
			o.TLSConfig.RootCAs = x509.NewCertPool()
			if !o.TLSConfig.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("redis: ca: %s has no certificate", c.CA)
			}
		}
	}
	return &Store{client: redis.NewUniversalClient(o), prefix: c.Prefix}, nil
}

// name returns the key of a session in Redis. The context's length tells where
// the id begins.
func (s *Store) name(key session.Key) string {
	return s.prefix + strconv.Itoa(len(key.Context)) + ":" + key.Context + ":" + key.ID
}

// parse is the inverse of name.
func (s *Store) parse(name string) (key session.Key, ok bool) {
	rest, ok := strings.CutPrefix(name, s.prefix)
	length, rest, ok2 := strings.Cut(rest, ":")
	n, err := strconv.Atoi(length)
	if !ok || !ok2 || err != nil || n < 0 || n >= len(rest) || rest[n] != ':' {
		return key, false
	}
	return session.Key{Context: rest[:n], ID: rest[n+1:]}, true
}

// Load implements core.Store.
func (s *Store) Load(ctx context.Context, key session.Key) (core.StoreItem, bool, error) {
	f, err := s.client.HMGet(ctx, s.name(key), "d", "v", "e").Result()
	if err != nil {
		return core.StoreItem{}, false, fmt.Errorf("redis: %w", err)
	}
	if len(f) != 3 || f[0] == nil && f[1] == nil {
		return core.StoreItem{}, false, nil
	}
	data, ok := f[0].(string)
	version, ok1 := f[1].(string)
	text, ok2 := f[2].(string)
	ms, err := strconv.ParseInt(text, 10, 64)
	if !ok || !ok1 || !ok2 || err != nil {
		return core.StoreItem{}, false, fmt.Errorf("%w: redis: the hash has other fields", core.ErrStoreCorrupt)
	}
	it := core.StoreItem{Data: []byte(data), Version: core.StoreVersion(version)}
	if ms != 0 {
		it.Expires = time.UnixMilli(ms)
		if !it.Expires.After(time.Now()) {
			return core.StoreItem{}, false, nil
		}
	}
	return it, true, nil
}

// KEYS[1] the key; ARGV: expected version, new version, expiry, record.
var save = redis.NewScript(`
local v = redis.call('HGET', KEYS[1], 'v') or ''
if v ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'v', ARGV[2], 'e', ARGV[3], 'd', ARGV[4])
if ARGV[3] == '0' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIREAT', KEYS[1], ARGV[3]) end
return 1`)

var touch = redis.NewScript(`
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'e', ARGV[1])
if ARGV[1] == '0' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIREAT', KEYS[1], ARGV[1]) end
return 1`)

// Save implements core.Store.
func (s *Store) Save(ctx context.Context, key session.Key, item core.StoreItem, prev core.StoreVersion) (core.StoreVersion, error) {
	// Versions do not repeat, also when an item expires and begins anew.
	next := uint64(time.Now().UnixMicro())
	if n, err := strconv.ParseUint(string(prev), 10, 64); err == nil {
		next = max(next, n+1)
	}
	version := strconv.FormatUint(next, 10)
	done, err := save.Run(ctx, s.client, []string{s.name(key)}, string(prev), version, millis(item.Expires), item.Data).Int()
	switch {
	case err != nil:
		return "", fmt.Errorf("redis: %w", err)
	case done == 0:
		return "", core.ErrStoreConflict
	}
	return core.StoreVersion(version), nil
}

// millis is t in milliseconds since 1970, 0 for never.
func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// Touch implements core.Store.
func (s *Store) Touch(ctx context.Context, key session.Key, expires time.Time) error {
	if err := touch.Run(ctx, s.client, []string{s.name(key)}, millis(expires)).Err(); err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	return nil
}

// Delete implements core.Store.
func (s *Store) Delete(ctx context.Context, key session.Key) error {
	if err := s.client.Del(ctx, s.name(key)).Err(); err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	return nil
}

// scanCount is how many keys Redis looks at in one step of a list.
const scanCount = 1000

// glob escapes what Redis reads as a pattern.
var glob = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`)

// List implements core.Store.
func (s *Store) List(ctx context.Context, limit int, each func(session.Key)) error {
	scan := func(ctx context.Context, c redis.UniversalClient) error {
		it := c.Scan(ctx, 0, glob.Replace(s.prefix)+"*", scanCount).Iterator()
		for limit > 0 && it.Next(ctx) {
			if key, ok := s.parse(it.Val()); ok {
				limit--
				each(key)
			}
		}
		return it.Err()
	}
	var err error
	if c, ok := s.client.(*redis.ClusterClient); ok {
		turn := make(chan struct{}, 1) // masters are asked at the same time
		err = c.ForEachMaster(ctx, func(ctx context.Context, node *redis.Client) error {
			turn <- struct{}{}
			defer func() { <-turn }()
			return scan(ctx, node)
		})
	} else {
		err = scan(ctx, s.client)
	}
	if err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	return nil
}

// Close implements core.Store.
func (s *Store) Close() error { return s.client.Close() }

var _ core.Store = (*Store)(nil)
