package attributes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/repmap"
	"github.com/longhouse-go/longhouse/core/session"
)

// mapName is the name of the map that the nodes share.
const mapName = "context-attributes"

const (
	// answerTime is how long a change waits for a node that does not answer.
	answerTime = time.Second
	// settleTime is how long the group must not have grown before the others are
	// asked for what they have; settleMost bounds it all.
	settleTime = time.Second
	settleMost = 5 * time.Second
	// transferTime is how long the node is not ready because nobody answers.
	transferTime = time.Minute
	// tombstoneTTL is how long deletions are remembered.
	tombstoneTTL = 24 * time.Hour
	// maxWaiting bounds the changes that wait for watchers; more are told as
	// missed.
	maxWaiting = 65536
)

// Config bounds what a node holds of all contexts together, its own and those
// that only other nodes have. Zero values are the defaults.
type Config struct {
	// MaxCount bounds the attributes. Default 65,536.
	MaxCount int
	// MaxSize bounds the encoded values, in bytes. Default 256 MiB.
	MaxSize int64
}

// Store has the attributes of all contexts of a node. All methods may be called
// concurrently.
type Store struct {
	cfg Config
	log *zap.Logger
	ch  *channel.Channel
	m   *repmap.Map[key, []byte] // nil for a single node

	life  context.Context
	end   context.CancelFunc
	wg    sync.WaitGroup
	ready chan struct{} // closed when m has what the others have

	mu      sync.Mutex
	watched map[*Attributes]struct{}
	local   map[key][]byte // of contexts that are not replicated
	size    int64          // of their values
	// queue are changes of local to be told; whoever sets one tells them all,
	// unless somebody does already.
	queue   []told
	telling bool
	missed  bool

	refused     struct{ name, count, size, full *channel.Counter }
	unconfirmed *channel.Counter
	missedTotal *channel.Counter
}

type told struct {
	context string
	change  Change
}

// New returns a store. With a channel the attributes of replicated contexts are
// shared with its other members, from Start on; ch may be nil.
func New(c Config, ch *channel.Channel, s channel.Settings) (*Store, error) {
	c.MaxCount, c.MaxSize = cmp.Or(c.MaxCount, 65536), cmp.Or(c.MaxSize, 256<<20)
	st := &Store{
		cfg: c, log: s.Logger, ch: ch, watched: map[*Attributes]struct{}{}, local: map[key][]byte{},
		ready: make(chan struct{}),
	}
	if st.log == nil {
		st.log = zap.NewNop()
	}
	st.life, st.end = context.WithCancel(context.Background())
	refused := func(why string) *channel.Counter {
		return s.Metrics.Counter("context_attributes_refused_total", "Attributes of contexts that were refused when they were set.", "store", s.Name, "reason", why)
	}
	st.refused.name, st.refused.count, st.refused.size, st.refused.full = refused("name"), refused("count"), refused("size"), refused("full")
	st.unconfirmed = s.Metrics.Counter("context_attributes_unconfirmed_total", "Changes of context attributes that a node has not confirmed within a second; it gets them later.", "store", s.Name)
	st.missedTotal = s.Metrics.Counter("context_attributes_missed_total", "Changes of context attributes that watchers were not told one by one, because they were too slow.", "store", s.Name)
	if ch == nil {
		close(st.ready)
		return st, nil
	}
	rc := repmap.DefaultConfig()
	rc.MaxEntries, rc.MaxBytes, rc.MaxTombstones, rc.MaxChanges = c.MaxCount, c.MaxSize, c.MaxCount, maxWaiting
	rc.MaxKey, rc.MaxValue = session.MaxContext+1+session.MaxName, int(min(c.MaxSize, int64(rc.MaxValue)))
	rc.TombstoneTTL = tombstoneTTL
	var err error
	if st.m, err = repmap.NewWith(ch, mapName, rc, s, keyCodec, valueCodec); err != nil {
		return nil, fmt.Errorf("attributes: %w", err)
	}
	return st, nil
}

// Local returns attributes that stay on this node and belong to nobody else, for
// contexts that are composed without a store.
func Local(context string) *Attributes {
	s, err := New(Config{}, nil, channel.Settings{})
	if err != nil { // without a channel nothing can fail
		panic(err)
	}
	return s.Context(context, false, Limits{})
}

// Context returns the attributes of a context, for one version of its
// application; zero limits are the defaults. Close them when the version ends.
func (s *Store) Context(name string, replicated bool, l Limits) *Attributes {
	d := DefaultLimits()
	l.MaxCount, l.MaxSize = cmp.Or(l.MaxCount, d.MaxCount), cmp.Or(l.MaxSize, d.MaxSize)
	return &Attributes{store: s, context: name, limits: l, replicated: replicated && s.m != nil}
}

// remember notes that somebody watches.
func (s *Store) remember(a *Attributes) {
	s.mu.Lock()
	s.watched[a] = struct{}{}
	s.mu.Unlock()
}

func (s *Store) forget(a *Attributes) {
	s.mu.Lock()
	delete(s.watched, a)
	s.mu.Unlock()
}

// Start begins to share. The channel must be running.
func (s *Store) Start(context.Context) error {
	if s.m == nil {
		return nil
	}
	grown := make(chan struct{}, 1)
	unwatch := s.ch.Watch(func(_ channel.View, ev channel.MemberEvent) {
		if ev.Kind == channel.MemberAdded {
			select {
			case grown <- struct{}{}:
			default:
			}
		}
	})
	s.m.Watch(s.changed)
	s.wg.Go(func() {
		defer unwatch()
		s.settle(grown)
		if s.life.Err() != nil {
			return
		}
		if err := s.m.Start(s.life); err != nil {
			s.log.Error("the attributes of contexts are not shared with other nodes", zap.Error(err))
			return
		}
		late := time.NewTimer(transferTime)
		defer late.Stop()
		select {
		case <-s.m.Ready():
		case <-late.C:
			s.log.Warn("no other node has answered with the attributes of contexts; this one goes on without them until one does", zap.Duration("waited", transferTime))
		case <-s.life.Done():
			return
		}
		close(s.ready)
	})
	return nil
}

// settle waits until the members of the group have been seen, so that they are
// asked before the node is ready.
func (s *Store) settle(grown <-chan struct{}) {
	quiet, most := time.NewTimer(settleTime), time.NewTimer(settleMost)
	defer quiet.Stop()
	defer most.Stop()
	for {
		select {
		case <-grown:
			quiet.Reset(settleTime)
		case <-quiet.C:
			return
		case <-most.C:
			return
		case <-s.life.Done():
			return
		}
	}
}

// Ready is closed when the attributes of the other nodes are here, or there are
// no others, or none of them answers for a minute.
func (s *Store) Ready() <-chan struct{} { return s.ready }

// Stop ends the sharing. Call it before the channel stops. It works twice and
// without Start.
func (s *Store) Stop(ctx context.Context) error {
	s.end()
	s.wg.Wait()
	if s.m == nil {
		return nil
	}
	return s.m.Close(ctx)
}

// Info describes an attribute. Its value is not shown to operators.
type Info struct {
	Context string `json:"context"`
	Name    string `json:"name"`
	// Bytes is the size of the encoded value.
	Bytes int `json:"bytes"`
	// Replicated says that all nodes have it.
	Replicated bool `json:"replicated"`
}

// List describes up to limit attributes, sorted by context and name, and says
// how many there are in all.
func (s *Store) List(limit int) (list []Info, total int) {
	all := s.all(func(key) bool { return true })
	return all[:min(max(limit, 0), len(all))], len(all)
}

func (s *Store) all(match func(key) bool) (list []Info) {
	list = []Info{}
	if s.m != nil {
		for _, k := range s.m.Keys() {
			if !match(k) {
				continue
			}
			if b, ok, _ := s.m.Get(s.life, k); ok { // nothing is asked of others: every member has all
				list = append(list, Info{k.context, k.name, len(b), true})
			}
		}
	}
	s.mu.Lock()
	for k, b := range s.local {
		if match(k) {
			list = append(list, Info{k.context, k.name, len(b), false})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b Info) int { return cmp.Or(cmp.Compare(a.Context, b.Context), cmp.Compare(a.Name, b.Name)) })
	return list
}

// list describes the attributes of one context.
func (s *Store) list(a *Attributes) []Info {
	return slices.DeleteFunc(s.all(func(k key) bool { return k.context == a.context }), func(i Info) bool { return i.Replicated != a.replicated })
}

func (s *Store) get(a *Attributes, name string) []byte {
	k := key{a.context, name}
	if a.replicated {
		b, _, _ := s.m.Get(s.life, k)
		return b
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.local[k]
}

// check refuses what would be more than the context may have.
func (s *Store) check(a *Attributes, name string, value []byte) error {
	count, size := 1, len(name)+len(value)
	for _, x := range s.list(a) {
		if x.Name != name {
			count++
			size += len(x.Name) + x.Bytes
		}
	}
	switch {
	case count > a.limits.MaxCount:
		s.refused.count.Inc()
		return fmt.Errorf("%w: context %s would have %d attributes, at most %d are allowed (attributes.max_count)", ErrTooLarge, a.context, count, a.limits.MaxCount)
	case size > a.limits.MaxSize:
		s.refused.size.Inc()
		return fmt.Errorf("%w: with %q the attributes of context %s would have %d bytes, at most %d are allowed (attributes.max_size)", ErrTooLarge, name, a.context, size, a.limits.MaxSize)
	}
	return nil
}

// await waits until the store may be changed.
func (s *Store) await(ctx context.Context) error {
	select {
	case <-s.ready:
	case <-s.life.Done():
	case <-ctx.Done():
		return fmt.Errorf("attributes: the node is starting: %w", context.Cause(ctx))
	}
	if s.life.Err() != nil {
		return ErrStopped
	}
	return nil
}

func (s *Store) put(ctx context.Context, a *Attributes, name string, value []byte) error {
	if err := s.check(a, name, value); err != nil {
		return err
	}
	k := key{a.context, name}
	if a.replicated {
		if err := s.await(ctx); err != nil {
			return err
		}
		// Once begun, the change is made: a client that goes away is no reason to
		// leave it half sent.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTime)
		defer cancel()
		return s.outcome(k, s.m.Put(ctx, k, value))
	}
	s.mu.Lock()
	old, there := s.local[k]
	grown := s.size + int64(len(value)-len(old))
	if !there && len(s.local) >= s.cfg.MaxCount || grown > s.cfg.MaxSize {
		s.mu.Unlock()
		s.refused.full.Inc()
		return ErrFull
	}
	s.local[k], s.size = value, grown
	s.mu.Unlock()
	if !slices.Equal(old, value) {
		s.note(told{a.context, Change{Name: name}})
	}
	return nil
}

func (s *Store) remove(ctx context.Context, a *Attributes, name string) error {
	k := key{a.context, name}
	if a.replicated {
		if err := s.await(ctx); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTime)
		defer cancel()
		_, err := s.m.Delete(ctx, k)
		return s.outcome(k, err)
	}
	s.mu.Lock()
	old, there := s.local[k]
	delete(s.local, k)
	s.size -= int64(len(old))
	s.mu.Unlock()
	if there {
		s.note(told{a.context, Change{Name: name, Deleted: true}})
	}
	return nil
}

// outcome is what the application is told of a change.
func (s *Store) outcome(k key, err error) error {
	switch {
	case errors.Is(err, repmap.ErrNotReplicated):
		s.unconfirmed.Inc()
		s.log.Debug("a node has not confirmed a context attribute yet", zap.String("context", k.context), zap.String("attribute", k.name), zap.Error(err))
		return nil
	case errors.Is(err, repmap.ErrFull):
		s.refused.full.Inc()
		return fmt.Errorf("%w: attribute %q of context %s", ErrFull, k.name, k.context)
	case errors.Is(err, channel.ErrTooLarge):
		s.refused.size.Inc()
		return fmt.Errorf("%w: attribute %q of context %s: %w", ErrTooLarge, k.name, k.context, err)
	case errors.Is(err, channel.ErrClosed):
		return ErrStopped
	}
	return err
}

// changed takes a change from the map.
func (s *Store) changed(c repmap.Change[key, []byte]) {
	switch c.Kind {
	case repmap.Set:
		s.tell(told{c.Key.context, Change{Name: c.Key.name}}, true)
	case repmap.Removed:
		s.tell(told{c.Key.context, Change{Name: c.Key.name, Deleted: true}}, true)
	case repmap.Missed:
		s.missedTotal.Inc()
		s.tell(told{}, true)
	case repmap.Moved: // the same value
	}
}

// tell tells the watchers of a context, or of all if it has no name.
func (s *Store) tell(t told, replicated bool) {
	s.mu.Lock()
	views := slices.Collect(maps.Keys(s.watched))
	s.mu.Unlock()
	for _, a := range views {
		if a.replicated == replicated && (t.context == "" || a.context == t.context) {
			a.tell(t.change)
		}
	}
}

// note tells a local change, after those before it.
func (s *Store) note(t told) {
	s.mu.Lock()
	if len(s.queue) < maxWaiting {
		s.queue = append(s.queue, t)
	} else {
		s.missed = true
		s.missedTotal.Inc()
	}
	if s.telling {
		s.mu.Unlock()
		return
	}
	s.telling = true
	done := false
	defer func() {
		if !done { // a watcher has panicked
			s.mu.Lock()
			s.telling = false
			s.mu.Unlock()
		}
	}()
	for {
		queue, missed := s.queue, s.missed
		s.queue, s.missed = nil, false
		if missed {
			queue = append(queue, told{})
		}
		if len(queue) == 0 {
			s.telling, done = false, true
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		for _, t := range queue {
			s.tell(t, false)
		}
		s.mu.Lock()
	}
}
