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
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gomodule/redigo/redis"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

// Config is what a user can set.
type Config struct {
	stored.Config `yaml:",inline"`
	// Addresses are host:port of the server. Several are those of a primary
	// and its replicas: the one that is the primary at the time is used.
	Addresses []string `yaml:"addresses"`
	// Username and Password log in.
	Username string      `yaml:"username"`
	Password secret.Text `yaml:"password"`
	// Database is the number of the database.
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
	if c.Database < 0 {
		errs = append(errs, fmt.Errorf("database: %d is not the number of one", c.Database))
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
	pool   *redis.Pool
	prefix string
	broken atomic.Int64 // when a connection has failed last, unix nanoseconds
}

// idleTime is how long a connection is kept that nobody uses.
const idleTime = 5 * time.Minute

// NewStore returns a store; it connects when it is used.
func NewStore(c Config) (*Store, error) {
	options := []redis.DialOption{
		redis.DialConnectTimeout(c.ConnectTimeout), redis.DialReadTimeout(c.Timeout), redis.DialWriteTimeout(c.Timeout),
		redis.DialUsername(c.Username), redis.DialPassword(c.Password.Reveal()), redis.DialDatabase(c.Database),
	}
	if c.TLS {
		t := &tls.Config{MinVersion: tls.VersionTLS12}
		if c.CA != "" {
			pem, err := os.ReadFile(c.CA)
			if err != nil {
				return nil, fmt.Errorf("redis: ca: %w", err)
			}
			t.RootCAs = x509.NewCertPool()
			if !t.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("redis: ca: %s has no certificate", c.CA)
			}
		}
		options = append(options, redis.DialUseTLS(true), redis.DialTLSConfig(t))
	}
	dial := func(ctx context.Context) (redis.Conn, error) {
		var errs []error
		for _, a := range c.Addresses {
			conn, err := redis.DialContext(ctx, "tcp", a, options...)
			if err == nil && len(c.Addresses) > 1 {
				err = primary(ctx, conn)
			}
			if err == nil {
				return conn, nil
			}
			if conn != nil {
				_ = conn.Close()
			}
			errs = append(errs, fmt.Errorf("%s: %w", a, err))
		}
		return nil, errors.Join(errs...)
	}
	s := &Store{prefix: c.Prefix}
	s.pool = &redis.Pool{
		DialContext: dial, MaxActive: c.Parallel + 2, MaxIdle: c.Parallel + 2, IdleTimeout: idleTime, Wait: true,
		// When the server was started anew all connections from before are dead.
		TestOnBorrow: func(_ redis.Conn, used time.Time) error {
			if used.UnixNano() <= s.broken.Load() {
				return errStale
			}
			return nil
		},
	}
	return s, nil
}

var errStale = errors.New("another connection has failed since this one was used")

// primary reports by an error that a server is none.
func primary(ctx context.Context, conn redis.Conn) error {
	role, err := redis.Values(redis.DoContext(conn, ctx, "ROLE"))
	if err != nil {
		return err
	}
	if len(role) > 0 {
		if r, err := redis.String(role[0], nil); err == nil && r == "master" {
			return nil
		}
	}
	return errors.New("it is a replica")
}

// with runs one exchange, and again on another connection if the first was cut:
// the server may have been started anew. Doing the same twice is harmless.
func (s *Store) with(ctx context.Context, f func(redis.Conn) error) error {
	err := s.try(ctx, f)
	if cut(err) && ctx.Err() == nil {
		err = s.try(ctx, f)
	}
	return err
}

// cut reports whether err says that a connection has ended.
func cut(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func (s *Store) try(ctx context.Context, f func(redis.Conn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	conn, err := s.pool.GetContext(ctx)
	if err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	err = f(conn)
	if conn.Err() != nil {
		s.broken.Store(time.Now().UnixNano())
	}
	// A server that has become a replica refuses writes: look for the primary.
	if e := redis.Error(""); errors.As(err, &e) && strings.HasPrefix(string(e), "READONLY") {
		_, _ = conn.Do("QUIT")
	}
	if cerr := conn.Close(); err == nil {
		err = cerr
	}
	if err != nil && !errors.Is(err, core.ErrStoreCorrupt) {
		err = fmt.Errorf("redis: %w", err)
	}
	return err
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
func (s *Store) Load(ctx context.Context, key session.Key) (it core.StoreItem, ok bool, err error) {
	err = s.with(ctx, func(c redis.Conn) error {
		f, err := redis.ByteSlices(redis.DoContext(c, ctx, "HMGET", s.name(key), "d", "v", "e"))
		if err != nil || len(f) == 3 && f[0] == nil && f[1] == nil && f[2] == nil {
			return err
		}
		if len(f) != 3 || f[0] == nil || f[1] == nil {
			return fmt.Errorf("%w: redis: the hash has other fields", core.ErrStoreCorrupt)
		}
		ms, err := strconv.ParseInt(string(f[2]), 10, 64)
		if err != nil {
			return fmt.Errorf("%w: redis: the expiry is no number", core.ErrStoreCorrupt)
		}
		it, ok = core.StoreItem{Data: f[0], Version: core.StoreVersion(f[1])}, true
		if ms != 0 {
			it.Expires = time.UnixMilli(ms)
			ok = it.Expires.After(time.Now())
		}
		return nil
	})
	if err != nil || !ok {
		return core.StoreItem{}, false, err
	}
	return it, true, nil
}

// KEYS[1] the key; ARGV: expected version, new version, expiry, record, now. What
// has expired counts as absent before Redis notices, and so does what is damaged.
var save = redis.NewScript(1, `
local h = redis.call('HMGET', KEYS[1], 'v', 'e', 'd')
local v, e = h[1] or '', tonumber(h[2] or '')
if not e or not h[3] or (e ~= 0 and e <= tonumber(ARGV[5])) then v = '' end
if v ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'v', ARGV[2], 'e', ARGV[3], 'd', ARGV[4])
if ARGV[3] == '0' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIREAT', KEYS[1], ARGV[3]) end
return 1`)

var touch = redis.NewScript(1, `
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
	done := 0
	err := s.with(ctx, func(c redis.Conn) (err error) {
		done, err = redis.Int(save.DoContext(ctx, c, s.name(key), string(prev), version, millis(item.Expires), item.Data, time.Now().UnixMilli()))
		return err
	})
	switch {
	case err != nil:
		return "", err
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
	return s.with(ctx, func(c redis.Conn) error {
		_, err := touch.DoContext(ctx, c, s.name(key), millis(expires))
		return err
	})
}

// Delete implements core.Store.
func (s *Store) Delete(ctx context.Context, key session.Key) error {
	return s.with(ctx, func(c redis.Conn) error {
		_, err := redis.DoContext(c, ctx, "DEL", s.name(key))
		return err
	})
}

// scanCount is how many keys Redis looks at in one step of a list.
const scanCount = 1000

// glob escapes what Redis reads as a pattern.
var glob = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`)

// List implements core.Store.
func (s *Store) List(ctx context.Context, limit int, each func(session.Key)) error {
	seen := map[session.Key]bool{} // Redis may tell one twice
	return s.with(ctx, func(c redis.Conn) error {
		for cursor := "0"; limit > 0; {
			part, err := redis.Values(redis.DoContext(c, ctx, "SCAN", cursor, "MATCH", glob.Replace(s.prefix)+"*", "COUNT", scanCount))
			if err != nil {
				return err
			}
			var names []string
			if _, err := redis.Scan(part, &cursor, &names); err != nil {
				return err
			}
			for _, n := range names {
				if key, ok := s.parse(n); ok && !seen[key] && limit > 0 {
					seen[key] = true
					limit--
					each(key)
				}
			}
			if cursor == "0" {
				break
			}
		}
		return nil
	})
}

// Close implements core.Store.
func (s *Store) Close() error { return s.pool.Close() }

var _ core.Store = (*Store)(nil)
