package memcached

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/bradfitz/gomemcache/memcache"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

// Config is what a user can set.
type Config struct {
	stored.Config `yaml:",inline"`
	// Nodes are the servers, "n1:host:port". The names may be left out.
	Nodes []string `yaml:"nodes"`
	// Failover are the names of nodes that get sessions only when no other
	// node is left.
	Failover []string `yaml:"failover"`
	// Copies is how many further nodes have a copy of each session.
	Copies int `yaml:"copies"`
	// Prefix begins all keys.
	Prefix string `yaml:"prefix"`
	// OperationTimeout bounds one exchange with a node.
	OperationTimeout time.Duration `yaml:"operation_timeout"`
	// DownTime is how long a node that has failed is not asked again.
	DownTime time.Duration `yaml:"down_time"`
}

// Default returns the defaults.
func Default() Config {
	return Config{
		Config: stored.Defaults(), Nodes: []string{"n1:127.0.0.1:11211"}, Copies: 1,
		OperationTimeout: time.Second, DownTime: time.Second,
	}
}

const (
	// maxNodes bounds the servers.
	maxNodes = 256
	// maxPrefix bounds the prefix, so that keys stay below the 250 bytes that
	// memcached allows.
	maxPrefix = 64
)

// node is one server.
type node struct {
	name, addr string
	failover   bool
	hash       uint64
	client     *memcache.Client
	downUntil  atomic.Int64 // unix nanoseconds
}

// parse returns the servers.
func (c *Config) parse() ([]*node, error) {
	var nodes []*node
	if len(c.Nodes) == 0 || len(c.Nodes) > maxNodes {
		return nil, fmt.Errorf("nodes: %d are given, it must be 1 to %d", len(c.Nodes), maxNodes)
	}
	for _, text := range c.Nodes {
		n := &node{addr: text, name: text}
		if name, addr, ok := strings.Cut(text, ":"); ok && strings.Contains(addr, ":") && !strings.HasPrefix(text, "[") {
			n.name, n.addr = name, addr
		}
		if _, port, err := net.SplitHostPort(n.addr); err != nil || port == "" {
			return nil, fmt.Errorf("nodes: %q is not name:host:port", text)
		}
		if slices.ContainsFunc(nodes, func(o *node) bool { return o.name == n.name }) {
			return nil, fmt.Errorf("nodes: %s is there twice", n.name)
		}
		h := fnv.New64a()
		h.Write([]byte(n.name))
		n.hash = h.Sum64()
		nodes = append(nodes, n)
	}
	for _, name := range c.Failover {
		i := slices.IndexFunc(nodes, func(n *node) bool { return n.name == name })
		if i < 0 {
			return nil, fmt.Errorf("failover: there is no node %q", name)
		}
		nodes[i].failover = true
	}
	if len(c.Failover) > 0 && !slices.ContainsFunc(nodes, func(n *node) bool { return !n.failover }) {
		return nil, errors.New("failover: every node is a failover node; leave one out")
	}
	return nodes, nil
}

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	errs := []error{c.Config.Validate()}
	if _, err := c.parse(); err != nil {
		errs = append(errs, err)
	}
	if c.Copies < 0 || c.Copies > 3 {
		errs = append(errs, fmt.Errorf("copies: %d is not between 0 and 3", c.Copies))
	}
	if len(c.Prefix) > maxPrefix || !plain(c.Prefix) {
		errs = append(errs, fmt.Errorf("prefix: %q must be printable without spaces, %d bytes at most", c.Prefix, maxPrefix))
	}
	if c.OperationTimeout <= 0 || c.DownTime <= 0 {
		errs = append(errs, errors.New("operation_timeout, down_time: must be longer than 0"))
	}
	return errors.Join(errs...)
}

// plain reports whether memcached takes s in a key.
func plain(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}

// Factory makes the manager "memcached".
var Factory = stored.FactoryOf("memcached", Default(), func(c *Config) *stored.Config { return &c.Config },
	func(c Config, s channel.Settings) (core.Store, error) { return NewStore(c, s) })

// Store keeps sessions in memcached.
type Store struct {
	cfg    Config
	nodes  []*node
	faults *channel.Counter
}

// NewStore returns a store; it connects when it is used.
func NewStore(c Config, s channel.Settings) (*Store, error) {
	nodes, err := c.parse()
	if err != nil {
		return nil, fmt.Errorf("memcached: %w", err)
	}
	for _, n := range nodes {
		n.client = memcache.New(n.addr)
		n.client.Timeout = c.OperationTimeout
		n.client.MaxIdleConns = c.Parallel + 2
	}
	return &Store{cfg: c, nodes: nodes, faults: s.Metrics.Counter("memcached_node_failures_total", "Exchanges with a memcached node that failed.")}, nil
}

const backup = "bak:"

// name returns the key in memcached.
func (s *Store) name(key session.Key) string {
	h := sha256.Sum256([]byte(key.Context))
	id := key.ID
	if id == "" || len(id) > session.MaxID || !plain(id) {
		sum := sha256.Sum256([]byte(id))
		id = "h" + hex.EncodeToString(sum[:])
	}
	return s.cfg.Prefix + hex.EncodeToString(h[:4]) + "_" + id
}

// order returns the servers in the order that a session has, failover servers
// last.
func (s *Store) order(key session.Key) []*node {
	d := key.Digest()
	out := slices.Clone(s.nodes)
	slices.SortFunc(out, func(a, b *node) int {
		switch {
		case a.failover != b.failover:
			if b.failover {
				return -1
			}
			return 1
		case weight(d, a.hash) > weight(d, b.hash):
			return -1
		}
		return 1
	})
	return out
}

// weight mixes two hashes (the finalizer of SplitMix64).
func weight(a, b uint64) uint64 {
	x := a ^ b
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// errDown: the server has failed a moment ago.
var errDown = errors.New("it has failed a moment ago")

// ask runs one exchange with a server that is not known to have failed. Answers
// that are no failures of the server are returned as they are.
func (s *Store) ask(ctx context.Context, n *node, f func(*memcache.Client) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if time.Now().UnixNano() < n.downUntil.Load() {
		return fmt.Errorf("memcached: node %s: %w", n.name, errDown)
	}
	err := f(n.client)
	if err != nil && !answered(err) {
		// The server may have been started anew: other connections to it are
		// as dead as this one, and a new one may do.
		_ = n.client.Close()
		if t := net.Error(nil); !errors.As(err, &t) || !t.Timeout() {
			err = f(n.client)
		}
	}
	if err == nil || answered(err) {
		return err
	}
	_ = n.client.Close()
	s.faults.Inc()
	n.downUntil.Store(time.Now().Add(s.cfg.DownTime).UnixNano())
	return fmt.Errorf("memcached: node %s: %w", n.name, err)
}

// answered reports whether err is an answer and no failure.
func answered(err error) bool {
	return errors.Is(err, memcache.ErrCacheMiss) || errors.Is(err, memcache.ErrCASConflict) || errors.Is(err, memcache.ErrNotStored) ||
		tooLarge(err)
}

// tooLarge reports whether the server refused the size of an item; there is no
// other sign of it than the text.
func tooLarge(err error) bool {
	return err != nil && strings.Contains(err.Error(), "too large")
}

// headSize is what comes before the record: version and expiry.
const headSize = 16

// found is an item on one server.
type found struct {
	node    *node
	item    *memcache.Item // nil if the server answered that it has none
	version uint64
	expires int64
	damaged bool // it has another form
}

// live reports whether there is an item that has not expired.
func (f *found) live(now time.Time) bool {
	return f.item != nil && !f.damaged && (f.expires == 0 || f.expires > now.UnixMilli())
}

// get asks one server for an item of one name.
func (s *Store) get(ctx context.Context, n *node, name string) (*found, error) {
	all, err := s.getAll(ctx, n, name)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// getAll asks one server for the items of some names, in one exchange.
func (s *Store) getAll(ctx context.Context, n *node, names ...string) ([]*found, error) {
	var items map[string]*memcache.Item
	err := s.ask(ctx, n, func(c *memcache.Client) (err error) {
		items, err = c.GetMulti(names)
		return err
	})
	if err != nil {
		return nil, err
	}
	out := make([]*found, len(names))
	for i, name := range names {
		f := &found{node: n, item: items[name]}
		if f.item != nil {
			if f.damaged = len(f.item.Value) <= headSize; !f.damaged {
				f.version = binary.BigEndian.Uint64(f.item.Value)
				f.expires = int64(binary.BigEndian.Uint64(f.item.Value[8:]))
			}
		}
		out[i] = f
	}
	return out, nil
}

// Load implements core.Store. It asks the server that decides, and those that
// may have a copy or have decided a moment ago, when the first was down; the
// newest item counts. The version that it returns names the server that decides
// and the state that the item has there.
func (s *Store) Load(ctx context.Context, key session.Key) (core.StoreItem, bool, error) {
	name := s.name(key)
	var first, best *found
	var firstErr error
	asked := 0
	for _, n := range s.order(key) {
		if asked > s.cfg.Copies {
			break
		}
		all, err := s.getAll(ctx, n, name, backup+name)
		if err != nil {
			if firstErr == nil {
				firstErr = err
			}
			continue
		}
		if asked == 0 {
			first = all[0]
		}
		for _, f := range all {
			if f.live(time.Now()) && (best == nil || f.version > best.version) {
				best = f
			}
		}
		asked++
	}
	switch {
	case first == nil:
		return core.StoreItem{}, false, fmt.Errorf("memcached: no node answers: %w", firstErr)
	case best == nil && first.damaged:
		return core.StoreItem{}, false, fmt.Errorf("%w: memcached: node %s has %d bytes", core.ErrStoreCorrupt, first.node.name, len(first.item.Value))
	case best == nil:
		return core.StoreItem{}, false, nil
	}
	it := core.StoreItem{Data: best.item.Value[headSize:], Version: token(first)}
	if best.expires != 0 {
		it.Expires = time.UnixMilli(best.expires)
	}
	return it, true, nil
}

// token names a state on a server: the compare-and-swap number, 0 for no item.
func token(f *found) core.StoreVersion {
	cas := uint64(0)
	if f.item != nil {
		cas = f.item.CasID
	}
	return core.StoreVersion(f.node.name + "/" + strconv.FormatUint(cas, 10) + "/" + strconv.FormatUint(f.version, 10))
}

func parseToken(v core.StoreVersion) (name string, cas, version uint64, ok bool) {
	parts := strings.Split(string(v), "/")
	if len(parts) < 3 {
		return "", 0, 0, false
	}
	n := len(parts)
	cas, err1 := strconv.ParseUint(parts[n-2], 10, 64)
	version, err2 := strconv.ParseUint(parts[n-1], 10, 64)
	return strings.Join(parts[:n-2], "/"), cas, version, err1 == nil && err2 == nil
}

// ttl is the time to live as memcached counts it: seconds, or since 1970 when
// they are more than 30 days; 0 for never. It is a second longer than needed,
// because memcached's clock ticks once in a second.
func ttl(expires, now time.Time) int32 {
	if expires.IsZero() {
		return 0
	}
	s := int64((expires.Sub(now)+time.Second-1)/time.Second) + 1
	if s > 30*24*3600 {
		s = expires.Unix() + 2
	}
	// What has expired already is told by the expiry in the item, and by
	// memcached a second later.
	return int32(min(max(s, 1), 1<<31-1))
}

// Save implements core.Store.
func (s *Store) Save(ctx context.Context, key session.Key, item core.StoreItem, prev core.StoreVersion) (core.StoreVersion, error) {
	if len(item.Data) == 0 {
		return "", fmt.Errorf("%w: memcached: it is empty", core.ErrStoreRefused)
	}
	name, now := s.name(key), time.Now()
	order := s.order(key)
	decides, cas, version, known := parseToken(prev)
	next := max(uint64(now.UnixMicro()), version+1)
	value := make([]byte, headSize+len(item.Data))
	binary.BigEndian.PutUint64(value, next)
	if !item.Expires.IsZero() {
		binary.BigEndian.PutUint64(value[8:], uint64(item.Expires.UnixMilli()))
	}
	copy(value[headSize:], item.Data)
	it := &memcache.Item{Key: name, Value: value, Expiration: ttl(item.Expires, now), CasID: cas}
	var firstErr error
	for i, n := range order {
		err := s.ask(ctx, n, func(c *memcache.Client) error {
			switch {
			case known && n.name != decides:
				return memcache.ErrCASConflict // another server decides by now
			case cas == 0:
				return c.Add(it)
			default:
				return c.CompareAndSwap(it)
			}
		})
		switch {
		case err == nil:
			f, err := s.settle(ctx, n, name, next)
			if err != nil {
				return "", err
			}
			s.copies(ctx, order[i+1:], name, it)
			return f, nil
		case errors.Is(err, memcache.ErrNotStored) && cas == 0 && s.stale(ctx, n, name):
			// What is there has expired: memcached just does not know yet.
			return s.Save(ctx, key, item, prev)
		case errors.Is(err, memcache.ErrCASConflict), errors.Is(err, memcache.ErrNotStored), errors.Is(err, memcache.ErrCacheMiss):
			return "", core.ErrStoreConflict
		case tooLarge(err):
			return "", fmt.Errorf("%w: memcached: %w", core.ErrStoreRefused, err)
		case ctx.Err() != nil:
			return "", ctx.Err()
		}
		if firstErr == nil {
			firstErr = err
		}
	}
	return "", fmt.Errorf("memcached: no node answers: %w", firstErr)
}

// stale removes an item that has expired or is damaged, and reports whether it did.
func (s *Store) stale(ctx context.Context, n *node, name string) bool {
	f, err := s.get(ctx, n, name)
	if err != nil || f.item == nil {
		return err == nil
	}
	if f.live(time.Now()) {
		return false
	}
	// Only if nobody has replaced it meanwhile: an item that lives for the past
	// is a deletion by compare and swap.
	f.item.Expiration = -1
	return s.ask(ctx, n, func(c *memcache.Client) error { return c.CompareAndSwap(f.item) }) == nil
}

// settle returns the version of what was written: memcached tells the
// compare-and-swap number only to those who read.
func (s *Store) settle(ctx context.Context, n *node, name string, version uint64) (core.StoreVersion, error) {
	f, err := s.get(ctx, n, name)
	switch {
	case err != nil:
		return "", err
	case f.item == nil || f.version != version:
		// Somebody was faster, or it was evicted at once: the next save finds out.
		return core.StoreVersion(n.name + "/" + strconv.FormatUint(1<<63, 10) + "/" + strconv.FormatUint(version, 10)), nil
	}
	return token(f), nil
}

// copies puts copies on the next servers that answer. They are not needed for
// the save to count.
func (s *Store) copies(ctx context.Context, order []*node, name string, it *memcache.Item) {
	left := s.cfg.Copies
	for _, n := range order {
		if left == 0 {
			return
		}
		c := &memcache.Item{Key: backup + name, Value: it.Value, Expiration: it.Expiration}
		if s.ask(ctx, n, func(client *memcache.Client) error { return client.Set(c) }) == nil {
			left--
		}
	}
}

// Touch implements core.Store.
func (s *Store) Touch(ctx context.Context, key session.Key, expires time.Time) error {
	for range 4 {
		it, ok, err := s.Load(ctx, key)
		if !ok || err != nil {
			return err
		}
		it.Expires = expires
		if _, err = s.Save(ctx, key, it, it.Version); !errors.Is(err, core.ErrStoreConflict) {
			return err
		}
	}
	return nil // somebody writes it all the time, and the expiry with it
}

// Delete implements core.Store.
func (s *Store) Delete(ctx context.Context, key session.Key) error {
	name := s.name(key)
	answers := 0
	var firstErr error
	for _, n := range s.order(key) {
		for _, k := range []string{name, backup + name} {
			err := s.ask(ctx, n, func(c *memcache.Client) error { return c.Delete(k) })
			if err == nil || errors.Is(err, memcache.ErrCacheMiss) {
				answers++
			} else if firstErr == nil {
				firstErr = err
			}
		}
	}
	if answers == 0 {
		return fmt.Errorf("memcached: no node answers: %w", firstErr)
	}
	return nil
}

// List implements core.Store: memcached cannot list.
func (s *Store) List(context.Context, int, func(session.Key)) error { return core.ErrStoreCannotList }

// Close implements core.Store.
func (s *Store) Close() error {
	var errs []error
	for _, n := range s.nodes {
		errs = append(errs, n.client.Close())
	}
	return errors.Join(errs...)
}

var _ core.Store = (*Store)(nil)
