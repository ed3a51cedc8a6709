package core

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/session"
	"go.uber.org/zap"
)

// SessionListener hears what happens to sessions.
//
// SessionEvent is called after the fact, from a goroutine of the registration,
// never from that of the request, for one event at a time and in the order in
// which they happened on the node. No lock is held: it may block, and it may
// find, change and end sessions itself. While it blocks, events wait for it in a
// queue; see SessionListening.Queue. If it panics, that is logged and counted
// (session_listener_panics_total), and the next event is told. A value that is
// registered more than once may be called from as many goroutines at once; a
// reload of the configuration registers it again and lets the old registration
// tell what it has.
//
// A listener hears what this node does to the sessions of its table, each thing
// exactly once and with Local set: that they are made, get a new id, expire or
// are invalidated, and every change of an attribute, at the time of the change.
// Sessions that have left the table because nobody used them come back when their
// time is over, to end there.
// It also hears, with Local not set, that a session in the table of this node
// has ended or got a new id because of another node. The rest of what other
// nodes do it hears if it has asked for that; see SessionListening.Cluster.
type SessionListener interface {
	SessionEvent(e SessionEvent)
}

// SessionListenerFunc makes a listener of a function.
type SessionListenerFunc func(e SessionEvent)

// SessionEvent calls f.
func (f SessionListenerFunc) SessionEvent(e SessionEvent) { f(e) }

// SessionEventKind says what has happened to a session. The kinds are bits, so
// that the same type names a set of them.
type SessionEventKind uint8

const (
	// SessionCreated: the session was made.
	SessionCreated SessionEventKind = 1 << iota
	// SessionDestroyed: it has expired or was invalidated; it is the last event
	// of its key.
	SessionDestroyed
	// SessionRenewed: it has a new id, and no event of the old one follows. If a
	// listener to other nodes knows the new id already, the two are one session.
	SessionRenewed
	// AttributeAdded, AttributeReplaced and AttributeRemoved: the application has
	// set an attribute that was not there, or one that was, or deleted it. Each
	// call of Set, Delete or Update that changes something is one event; setting
	// an equal value again is one too. It is told at the time of the call, also if
	// the response fails later because the change could not be replicated. The
	// attributes of a session that ends are not told one by one.
	AttributeAdded
	AttributeReplaced
	AttributeRemoved

	// AttributeEvents are all kinds that are about attributes.
	AttributeEvents = AttributeAdded | AttributeReplaced | AttributeRemoved
	// AllSessionEvents are all kinds.
	AllSessionEvents = SessionCreated | SessionDestroyed | SessionRenewed | AttributeEvents
)

// String returns the kind for people.
func (k SessionEventKind) String() string {
	switch k {
	case SessionCreated:
		return "created"
	case SessionDestroyed:
		return "destroyed"
	case SessionRenewed:
		return "renewed"
	case AttributeAdded:
		return "attribute added"
	case AttributeReplaced:
		return "attribute replaced"
	case AttributeRemoved:
		return "attribute removed"
	}
	return fmt.Sprintf("SessionEventKind(%#x)", uint8(k))
}

// SessionEvent is one thing that has happened to a session. Its bytes and its
// map are shared with the table and with other listeners: they may be kept, but
// never changed.
type SessionEvent struct {
	Kind SessionEventKind
	// Key is the session: the name of its context, and its id without a route.
	// Of SessionRenewed it is the new one.
	Key session.Key
	// Previous is the key before SessionRenewed, else empty.
	Previous session.Key
	// Reason is why a session was destroyed: session.Expired or
	// session.Invalidated.
	Reason session.EndKind
	// Local says that this node has done it.
	Local bool
	// Existing is set in SessionCreated if this node learns that there is a session
	// after it was made: it has joined, was cut off, or got a request of the session
	// before the news.
	Existing bool
	// Time is when it happened, by the clock of the node that did it.
	Time time.Time

	// Name is the attribute. Value is what it was set to and Old what it was
	// before, as session.Encode makes them and session.Decode reads them; nil if
	// it is not set. Old is not known of other nodes' changes. Version orders
	// changes of one attribute by different nodes: the highest one counts, or, of
	// attributes with a merge rule, their sum, maximum or union.
	Name       string
	Value, Old []byte
	Version    session.Version

	// Attrs are the attributes that a destroyed session had, if it was in the
	// table of this node; see Get.
	Attrs map[string]session.Entry
	// Missed is how many events before this one were not told to this listener,
	// because its queue was full.
	Missed int64
}

// Get decodes an attribute that a destroyed session had into the pointer into;
// false if it had none of that name.
func (e SessionEvent) Get(name string, into any) (bool, error) {
	entry := e.Attrs[name]
	if entry.Value == nil {
		return false, nil
	}
	return true, session.Decode(entry.Value, into)
}

// SessionListening is a listener and what it wants to hear.
type SessionListening struct {
	Listener SessionListener
	// Kinds are the kinds to tell; 0 is AllSessionEvents. What nobody wants to
	// hear costs nothing.
	Kinds SessionEventKind
	// Cluster are those of the Kinds that are also to be told if another node
	// does it, whatever the manager, and whether this node has anything of the
	// session or not. See core/events for what is guaranteed.
	Cluster SessionEventKind
	// Queue bounds the events that wait for the listener; 0 is
	// DefaultListenerQueue. While so many wait, whatever would make another one
	// (a request that sets an attribute, the expiry) waits for room, up to a
	// second; once that was in vain, nothing waits until there is room again, up
	// to as many again (1,024 at least) are queued and further ones are not told
	// (session_events_missed_total, SessionEvent.Missed).
	Queue int
}

// DefaultListenerQueue is how many events wait for a listener at most, before
// requests are held up.
const DefaultListenerQueue = 16_384

// listenerSlack is how many events find place beyond a small queue: those of
// requests that have all seen room at the same time.
const listenerSlack = 1024

// listenerPatience is how long a change waits for room in a listener's queue.
const listenerPatience = time.Second

// ListeningValve is a valve that hears of the sessions of all contexts below it.
// SessionListening is called once, when the pipeline is built; events come
// between the valve's Start and its Stop.
type ListeningValve interface {
	Valve
	SessionListening() SessionListening
}

// SessionWatch is how a session table tells what happens to the sessions of a
// context.
type SessionWatch struct {
	// Kinds are told of what this node does, and, as far as ends and new ids are
	// concerned, of what others do to sessions in the table. Cluster are told of
	// what others do to any session.
	Kinds, Cluster SessionEventKind
	// Tell takes an event; here says that the session is in the table, or was
	// until now. It does not wait; locks of the table may be held.
	Tell func(e SessionEvent, here bool)
	// Room waits until there is room for events, for a bounded time. It is called
	// without locks before something is done that is going to be told.
	Room func()
}

// WatchedSessions is implemented by session tables that have listeners.
type WatchedSessions interface {
	Sessions
	// Watch tells the events of a context from now on. Of several watches of one
	// context only the latest is told anything; when it is cancelled, the one
	// before it is again. After cancel has returned Tell is not called any more.
	Watch(contextName string, w SessionWatch) (cancel func())
}

// subscription is one registered listener with its queue.
type subscription struct {
	SessionListening
	log     *zap.Logger
	metrics listenerMetrics

	mu      sync.Mutex
	queue   []SessionEvent // waiting ones begin at head
	head    int
	missed  int64         // since the last event that was told
	hurried bool          // somebody has waited for room in vain
	freed   chan struct{} // closed when there is room, nil when nobody waits
	closed  bool          // ends when the queue is empty
	aborted bool          // ends at once
	wake    chan struct{}
	done    chan struct{} // nil before start
}

type listenerMetrics struct{ told, missed, panics, waits *channel.Counter }

func newListenerMetrics(m *channel.Metrics) listenerMetrics {
	return listenerMetrics{
		told:   m.Counter("session_events_total", "Session events told to listeners."),
		missed: m.Counter("session_events_missed_total", "Session events not told, because the listener's queue was full or it did not end in time."),
		panics: m.Counter("session_listener_panics_total", "Session listeners that panicked."),
		waits:  m.Counter("session_listener_waits_total", "Times that something waited for room in a listener's queue."),
	}
}

func newSubscription(l SessionListening, log *zap.Logger, m listenerMetrics) *subscription {
	if l.Kinds == 0 {
		l.Kinds = AllSessionEvents
	}
	l.Cluster &= l.Kinds
	if l.Queue <= 0 {
		l.Queue = DefaultListenerQueue
	}
	return &subscription{SessionListening: l, log: log, metrics: m, wake: make(chan struct{}, 1)}
}

// subscriptions makes those of a level of containers: of its options, then of
// its valves.
func subscriptions(owner string, list []SessionListening, valves []Valve, log *zap.Logger, m listenerMetrics) (out []*subscription, err error) {
	for _, v := range valves {
		if lv, ok := v.(ListeningValve); ok {
			list = append(slices.Clip(list), lv.SessionListening())
		}
	}
	for i, l := range list {
		if l.Listener == nil {
			return nil, fmt.Errorf("core: %s: session listener %d is nil", owner, i)
		}
		out = append(out, newSubscription(l, log, m))
	}
	return out, nil
}

// start begins to tell. It works twice.
func (s *subscription) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done == nil && !s.closed {
		s.done = make(chan struct{})
		go s.run() // ends after stop; joined there
	}
}

// stop tells what is waiting, as far as ctx allows, and ends. It works twice and
// without start.
func (s *subscription) stop(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	done := s.done
	s.mu.Unlock()
	if done == nil {
		return nil
	}
	s.poke()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	s.aborted = true
	s.mu.Unlock()
	return fmt.Errorf("core: the session listener %T has not finished: %w", s.Listener, context.Cause(ctx))
}

func (s *subscription) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// tell queues an event, or counts it as missed.
func (s *subscription) tell(e SessionEvent) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	if len(s.queue)-s.head >= s.Queue+max(s.Queue, listenerSlack) {
		s.missed++
		s.metrics.missed.Inc()
	} else {
		e.Missed, s.missed = s.missed, 0
		s.queue = append(s.queue, e)
	}
	s.mu.Unlock()
	s.poke()
}

// room waits until there is room in the queue, or patience has ended.
func (s *subscription) room() {
	s.mu.Lock()
	if s.full() && !s.hurried && !s.closed {
		if s.freed == nil {
			s.freed = make(chan struct{})
		}
		freed := s.freed
		s.mu.Unlock()
		s.metrics.waits.Inc()
		timer := time.NewTimer(listenerPatience)
		defer timer.Stop()
		select {
		case <-freed:
			return
		case <-timer.C:
		}
		s.mu.Lock()
		first := !s.hurried && s.full()
		s.hurried = s.full()
		s.mu.Unlock()
		if first {
			s.log.Warn("a session listener is too slow: requests have waited for it, and soon it will miss events",
				zap.String("listener", fmt.Sprintf("%T", s.Listener)), zap.Int("queue", s.Queue))
		}
		return
	}
	s.mu.Unlock()
}

func (s *subscription) full() bool { return len(s.queue)-s.head >= s.Queue }

// next takes the oldest event; false when it is time to end.
func (s *subscription) next() (e SessionEvent, ok bool) {
	for {
		s.mu.Lock()
		switch {
		case s.aborted:
			s.metrics.missed.Add(int64(len(s.queue) - s.head))
			s.queue, s.head = nil, 0
			s.mu.Unlock()
			return e, false
		case s.head < len(s.queue):
			e = s.queue[s.head]
			s.queue[s.head] = SessionEvent{}
			s.head++
			if s.head == len(s.queue) {
				s.queue, s.head = s.queue[:0], 0
				if cap(s.queue) > keptQueue {
					s.queue = nil
				}
			} else if s.head >= s.Queue { // what has been told makes room
				s.queue = append(s.queue[:0], s.queue[s.head:]...)
				s.head = 0
			}
			if !s.full() {
				s.hurried = false
				if s.freed != nil {
					close(s.freed)
					s.freed = nil
				}
			}
			s.mu.Unlock()
			return e, true
		case s.closed:
			s.mu.Unlock()
			return e, false
		}
		s.mu.Unlock()
		<-s.wake
	}
}

// keptQueue is how long a queue stays allocated when it is empty.
const keptQueue = 256

func (s *subscription) run() {
	defer close(s.done)
	for {
		e, ok := s.next()
		if !ok {
			return
		}
		s.call(e)
		s.metrics.told.Inc()
	}
}

func (s *subscription) call(e SessionEvent) {
	defer func() {
		if p := recover(); p != nil {
			s.metrics.panics.Inc()
			s.log.Error("a session listener panicked", zap.String("listener", fmt.Sprintf("%T", s.Listener)), zap.Stringer("event", e.Kind),
				zap.String("context", e.Key.Context), zap.String("session", session.Prefix(e.Key.ID)),
				zap.String("panic", fmt.Sprint(p)), zap.ByteString("stack", debug.Stack()))
		}
	}()
	s.Listener.SessionEvent(e)
}

// watch joins the subscriptions of a context: those of its engine and host, and
// its own.
func watch(subs []*subscription) SessionWatch {
	w := SessionWatch{
		Tell: func(e SessionEvent, here bool) {
			for _, s := range subs {
				kinds := s.Kinds
				if !here {
					kinds = s.Cluster
				}
				if kinds&e.Kind != 0 {
					s.tell(e)
				}
			}
		},
		Room: func() {
			for _, s := range subs {
				s.room()
			}
		},
	}
	for _, s := range subs {
		w.Kinds |= s.Kinds
		w.Cluster |= s.Cluster
	}
	return w
}

// attach starts to tell the context's listeners.
func (e *Engine) attach(c *Context) {
	subs := slices.Concat(e.subs, c.host.subs, c.subs)
	w, ok := c.sessions.(WatchedSessions)
	if !ok || len(subs) == 0 || c.unwatch != nil {
		return
	}
	for _, s := range subs {
		s.start()
	}
	c.unwatch = w.Watch(c.name, watch(subs))
}

// detach ends what attach began, for a context whose requests have ended.
func (c *Context) detach(ctx context.Context) error {
	c.attributes.Close()
	if c.unwatch != nil {
		c.unwatch()
	}
	return stopAll(ctx, c.subs)
}

func stopAll(ctx context.Context, subs []*subscription) error {
	var errs []error
	for _, s := range subs {
		errs = append(errs, s.stop(ctx))
	}
	return errors.Join(errs...)
}
