package bridge

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// DefaultTimeout is how long a message may be on its way through a plugin.
const DefaultTimeout = 5 * time.Second

const (
	// poisonDeaths is how many generations may end over one message.
	poisonDeaths = 3
	// maxHeldBytes bounds the bodies that a plugin has answered with and that
	// wait for their turn.
	maxHeldBytes = 256 << 20
	// maxAnnounced bounds the member events of a plugin in one second.
	maxAnnounced = 20_000
	// maxLate is how many messages in a row may run into their timeout before
	// the generation is given up.
	maxLate = 3
)

// InterceptorConfig is what the client of an interceptor plugin is made of.
type InterceptorConfig struct {
	// Description is what the plugin is expected to be.
	Description Description
	// Check says that a generation that describes itself differently is
	// refused.
	Check  bool
	OnDown core.OnDown
	// Window, WindowBytes and Timeout as in core.PluginSpec; zero fields mean
	// the defaults.
	Window, WindowBytes int
	Timeout             time.Duration
	Metrics             *channel.Metrics
	Labels              []string
}

// The directions of a message.
const (
	down = iota
	up
)

var directions = [...]string{"send", "receive"}

// Interceptor is the client of an interceptor plugin. It is no
// channel.Interceptor by itself, see Layer.
//
// Messages travel as numbered events, not as calls: they are unanswered in the
// order of their numbers, and given to the next generation in that order when
// one ends. Their results are used once, because an answer counts only while
// its message is unanswered, and in the order of the flow: one for each sender
// of received messages, and one for all messages that are sent without waiting.
type Interceptor struct {
	client
	cfg     InterceptorConfig
	windows [3]msgWindow // sent and waited for, sent, received
	link    channel.Link // set by Start
	run     context.Context
	stopRun context.CancelFunc
	tasks   sync.WaitGroup // draining flows

	ticking atomic.Bool

	mu      sync.Mutex
	conn    *frame.Conn // guarded by mu: open for messages, or nil
	started bool        // guarded by mu
	err     error       // guarded by mu: why nothing is possible, or nil
	seq     uint64      // guarded by mu: the last number given
	pending []*item     // guarded by mu: from number first on, nil if answered
	first   uint64      // guarded by mu
	pushed  uint64      // guarded by mu: the last number that conn was given
	careful uint64      // guarded by mu: up to this number one at a time
	base    uint64      // guarded by mu: the first unanswered one at the last end
	deaths  int         // guarded by mu: ends in a row with that base
	late    int         // guarded by mu: timeouts in a row
	answers int64       // guarded by mu: bytes of answers that wait for their turn
	flood   int         // guarded by mu: member events since floodAt
	floodAt time.Time   // guarded by mu
	flows   map[flowKey]*flow
	opened  map[uint64]*open                     // guarded by mu: answered, not ended
	timer   *time.Timer                          // guarded by mu
	armed   bool                                 // guarded by mu
	free    []*item                              // guarded by mu
	view    uint64                               // guarded by mu: version the plugin knows
	viewed  bool                                 // guarded by mu: it knows one
	held    map[channel.UniqueID]channel.Member  // guarded by mu: announced by the plugin
	shown   channel.View                         // guarded by mu: last result of the filter
	want    atomic.Pointer[[2]*channel.Interest] // interest by direction
	idle    []chan struct{}                      // guarded by mu: those who wait for an empty window

	sent                              [2]*channel.Counter
	verdicts                          [frame.Error + 1]*channel.Counter
	bytesTotal, latency, lateTotal    *channel.Counter
	refused, missed, replayed, poison *channel.Counter
}

// flowKey is a sender, or zero for messages sent without waiting.
type flowKey struct {
	dir  uint8
	from channel.UniqueID
}

// flow keeps the messages of one flow in order. It exists while a message is in
// it or being passed on.
type flow struct {
	key      flowKey
	queue    []*item
	draining bool
}

// item is one message on its way through the plugin. Its fields are guarded by
// Interceptor.mu until it is answered.
type item struct {
	seq     uint64
	dir     uint8
	window  *msgWindow
	cost    int64
	link    channel.Link
	m       *channel.Message // a sent one
	msg     channel.Message  // a received one
	end     func(error)      // of a received one, or nil
	frame   []byte
	bodyAt  int
	entered time.Time
	// observed: nobody waits for the answer.
	observed bool
	answered bool
	verdict  verdict
	// open is set if the plugin will say when it is through.
	open *open
	// inject is what to do instead, for what the plugin sends by itself.
	inject func()
	flow   *flow
	// ch has room for one: the answer to whom waits.
	ch chan error
}

// msgWindow bounds messages in number and bytes.
type msgWindow struct {
	msgs, bytes *semaphore.Weighted
	cap         int64
}

// NewInterceptor returns the client of the plugin behind life.
func NewInterceptor(name string, life Lifecycle, log *zap.Logger, cfg InterceptorConfig) *Interceptor {
	if cfg.Window <= 0 {
		cfg.Window = frame.DefaultWindow
	}
	if cfg.WindowBytes <= 0 {
		cfg.WindowBytes = frame.DefaultWindowBytes
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.OnDown == "" {
		cfg.OnDown = core.Fail
	}
	i := &Interceptor{
		client: newClient("interceptor/"+name, life, log),
		cfg:    cfg,
		first:  1,
		flows:  map[flowKey]*flow{}, opened: map[uint64]*open{},
		held: map[channel.UniqueID]channel.Member{},
	}
	i.run, i.stopRun = context.WithCancel(context.Background())
	for n := range i.windows {
		i.windows[n] = msgWindow{semaphore.NewWeighted(int64(cfg.Window)), semaphore.NewWeighted(int64(cfg.WindowBytes)), int64(cfg.WindowBytes)}
	}
	i.want.Store(new([2]*channel.Interest))
	i.register()
	return i
}

func (i *Interceptor) register() {
	m, labels := i.cfg.Metrics, i.cfg.Labels
	with := func(more ...string) []string { return append(slices.Clip(labels), more...) }
	for n, d := range directions {
		i.sent[n] = m.Counter("plugin_messages_total", "Messages that the plugin was given.", with("direction", d)...)
	}
	for v, name := range []string{"pass", "replace", "drop", "inject", "error"} {
		i.verdicts[v] = m.Counter("plugin_verdicts_total", "What the plugin has decided about messages, and messages of its own.", with("verdict", name)...)
	}
	i.bytesTotal = m.Counter("plugin_message_bytes_total", "Bytes of the bodies that the plugin was given.", labels...)
	i.latency = m.Counter("plugin_message_microseconds_total", "Time that messages have spent on their way through the plugin, restarts included.", labels...)
	i.lateTotal = m.Counter("plugin_messages_late_total", "Messages that failed because the plugin took too long.", labels...)
	i.refused = m.Counter("plugin_messages_refused_total", "Messages that the plugin was not given because it was down.", with("on_down", string(i.cfg.OnDown))...)
	i.missed = m.Counter("plugin_messages_missed_total", "Copies that an observing plugin was not given because it was too slow or down.", labels...)
	i.replayed = m.Counter("plugin_messages_replayed_total", "Messages that were given to another process because one ended.", labels...)
	i.poison = m.Counter("plugin_messages_poison_total", "Messages that failed because several processes ended over them.", labels...)
	m.Gauge("plugin_messages_in_flight", "Messages that are on their way through the plugin.", func() float64 {
		i.mu.Lock()
		defer i.mu.Unlock()
		return float64(len(i.pending))
	}, labels...)
}

// Traffic returns the messages given to the plugin, those that were kept from
// it, and those on their way.
func (i *Interceptor) Traffic() (messages, refused, inFlight int64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.sent[down].Value() + i.sent[up].Value(), i.refused.Value() + i.missed.Value(), int64(len(i.pending))
}

// Descriptor returns what the plugin is.
func (i *Interceptor) Descriptor() channel.Descriptor {
	d := i.cfg.Description.Descriptor()
	w := *i.want.Load()
	d.SendInterest, d.ReceiveInterest = w[down], w[up]
	return d
}

// Start brings up the plugin.
func (i *Interceptor) Start(ctx context.Context, l channel.Link) error {
	i.link = l
	return i.life.Start(ctx, i)
}

// Stop lets messages that are on their way through the plugin finish, as far as
// ctx allows, and ends it.
func (i *Interceptor) Stop(ctx context.Context) error {
	flushed := i.Flush(ctx)
	err := i.life.Stop(ctx)
	i.Fail(fmt.Errorf("plugin %s: %w", i.name, channel.ErrClosed))
	i.stopRun()
	ended := make(chan struct{})
	go func() { // ends with the goroutines it waits for
		i.tasks.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return err
	case <-ctx.Done():
		return errors.Join(err, flushed, fmt.Errorf("plugin %s: messages that have passed it are still being processed: %w", i.name, ctx.Err()))
	}
}

// Flush implements channel.Flusher: it waits until all messages that are on
// their way through the plugin have been passed on.
func (i *Interceptor) Flush(ctx context.Context) error {
	i.mu.Lock()
	if i.emptyLocked() {
		i.mu.Unlock()
		return nil
	}
	ch := make(chan struct{})
	i.idle = append(i.idle, ch)
	i.mu.Unlock()
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("plugin %s: messages are still on their way through it: %w", i.name, ctx.Err())
	}
}

func (i *Interceptor) emptyLocked() bool {
	return len(i.pending) == 0 && len(i.flows) == 0 && len(i.opened) == 0
}

// settledLocked wakes those who wait for an empty window.
func (i *Interceptor) settledLocked() {
	if len(i.idle) > 0 && i.emptyLocked() {
		for _, ch := range i.idle {
			close(ch)
		}
		i.idle = nil
	}
}

// started is what a plugin answers to kindStart, as JSON.
type startReply struct {
	Description Description       `json:"description"`
	Send        *channel.Interest `json:"send,omitempty"`
	Receive     *channel.Interest `json:"receive,omitempty"`
}

// Begin implements Client: the new generation is told the view and, if it is
// not the first, who is there; then it is given what the last one has left.
func (i *Interceptor) Begin(ctx context.Context, conn *frame.Conn, generation int) error {
	view := i.link.View()
	b := appendView(appendMember(nil, i.link.Local()), view)
	reply, err := i.outcome(i.calls.CallOn(ctx, conn, kindStart, 0, b))
	if err != nil {
		return err
	}
	var r startReply
	if len(reply) > 0 {
		if err := json.Unmarshal(reply, &r); err != nil {
			return fmt.Errorf("plugin %s: its answer to the start cannot be read: %w", i.name, err)
		}
	}
	if i.cfg.Check {
		if diff := i.cfg.Description.Differences(r.Description); diff != "" {
			return fmt.Errorf("plugin %s: it is not what was pinned: %s; pin it again if that is right", i.name, diff)
		}
	}
	if generation > 1 && slices.Contains(i.cfg.Description.Handles, HandlesMember) {
		if err := i.introduce(ctx, conn, view); err != nil {
			return err
		}
	}
	i.want.Store(&[2]*channel.Interest{r.Send, r.Receive})
	i.calls.Attach(conn)
	i.attach(conn, view)
	return nil
}

// introduce tells a successor who is there, and takes back what only its
// predecessor had held.
func (i *Interceptor) introduce(ctx context.Context, conn *frame.Conn, view channel.View) error {
	i.mu.Lock()
	var gone []channel.Member
	for id, m := range i.held {
		if _, ok := view.Get(id); !ok {
			gone = append(gone, m)
			delete(i.held, id)
		}
	}
	i.mu.Unlock()
	for _, m := range view.Members {
		if _, err := i.outcome(i.calls.CallOn(ctx, conn, kindMember, uint32(channel.MemberAdded), appendMember(nil, m))); err != nil {
			return err
		}
	}
	for _, m := range gone {
		ev := channel.MemberEvent{Kind: channel.MemberLost, Member: m, Err: channel.ErrPluginDown}
		if err := i.link.Announce(ctx, ev); err != nil {
			return err
		}
	}
	return nil
}

// attach opens conn for messages, those that are unanswered first.
func (i *Interceptor) attach(conn *frame.Conn, view channel.View) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.conn, i.err, i.started = conn, nil, true
	i.view, i.viewed = view.Version, true
	i.pushed = i.first - 1
	i.replayed.Add(int64(len(i.pending)))
	if i.deaths >= poisonDeaths {
		if it := i.firstLocked(); it != nil && it.seq == i.base {
			i.poison.Inc()
			i.deaths = 0
			i.failLocked(it, fmt.Errorf("%w: %d processes ended over this message; it is not tried again", channel.ErrPluginDown, poisonDeaths))
		}
	}
	i.careful = 0
	if i.deaths > 1 {
		// One of these is the reason. One at a time the next end says which.
		i.careful = i.seq
	}
	i.pushLocked()
	conn.Go(func() {
		<-conn.Done()
		conn.Wait() // the last answers count
		i.lost(conn)
	})
}

// pushLocked gives the connection what it has not been given.
func (i *Interceptor) pushLocked() {
	if i.conn == nil {
		return
	}
	for i.pushed < i.seq {
		next := i.pushed + 1
		var it *item
		if next >= i.first {
			it = i.pending[next-i.first]
		}
		if it != nil && next <= i.careful && i.first < next {
			return // an earlier one is unanswered
		}
		i.pushed = next
		if it != nil {
			// If the connection cannot take it, it has ended.
			_ = i.conn.PushEncoded(it.frame)
		}
	}
}

// lost is called when a connection has ended.
func (i *Interceptor) lost(conn *frame.Conn) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.conn != conn {
		return
	}
	i.conn = nil
	for _, o := range i.opened {
		i.orphanLocked(o)
	}
	for _, it := range slices.Clone(i.pending) {
		switch {
		case it == nil:
		case it.observed:
			i.missed.Inc()
			i.resolveLocked(it, verdict{})
		case i.cfg.OnDown == core.Bypass:
			i.refused.Inc()
			i.resolveLocked(it, verdict{})
		}
	}
	it := i.firstLocked()
	switch {
	case it == nil:
		i.base, i.deaths = 0, 0
	case it.seq == i.base:
		i.deaths++
	default:
		i.base, i.deaths = it.seq, 1
	}
}

// Fail ends everything that is on its way and lets new messages fail, or pass
// if the policy says so, until the next generation.
func (i *Interceptor) Fail(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.err = err
	for _, it := range slices.Clone(i.pending) {
		if it != nil {
			i.failLocked(it, err)
		}
	}
	for _, o := range i.opened {
		i.orphanLocked(o)
	}
	if i.timer != nil {
		i.timer.Stop()
		i.armed = false
	}
}

// firstLocked returns the first unanswered message.
func (i *Interceptor) firstLocked() *item {
	if len(i.pending) == 0 {
		return nil
	}
	return i.pending[0]
}

func (i *Interceptor) failLocked(it *item, err error) {
	i.resolveLocked(it, verdict{kind: frame.Error, err: err})
}

// resolveLocked takes a message out of the unanswered ones.
func (i *Interceptor) resolveLocked(it *item, v verdict) {
	i.pending[it.seq-i.first] = nil
	n := 0
	for n < len(i.pending) && i.pending[n] == nil {
		n++
	}
	i.first += uint64(n)
	i.pending = i.pending[n:]
	i.latency.Add(time.Since(it.entered).Microseconds())
	it.answered, it.verdict = true, v
	if v.open() {
		it.open = &open{i: i, seq: it.seq, forwarded: v.kind != frame.Drop, report: v.fields&verdictReport != 0}
		i.opened[it.seq] = it.open
	}
	switch {
	case it.observed:
		i.releaseLocked(it)
	case it.flow == nil:
		it.ch <- nil // has room for one
	default:
		i.drainLocked(it.flow)
	}
	if i.careful != 0 {
		i.pushLocked()
	}
	i.settledLocked()
}

// drainLocked sees to it that a flow whose first message is answered is passed
// on.
func (i *Interceptor) drainLocked(f *flow) {
	if f.draining || len(f.queue) == 0 || !f.queue[0].answered {
		return
	}
	f.draining = true
	i.tasks.Go(func() { i.drain(f) })
}

func (i *Interceptor) drain(f *flow) {
	i.mu.Lock()
	for len(f.queue) > 0 && f.queue[0].answered {
		it := f.queue[0]
		f.queue[0] = nil
		f.queue = f.queue[1:]
		i.mu.Unlock()
		i.emit(it)
		i.mu.Lock()
		i.releaseLocked(it)
	}
	f.draining = false
	if len(f.queue) == 0 {
		delete(i.flows, f.key)
		i.settledLocked()
	}
	i.mu.Unlock()
}

// emit does with an answered message of a flow what the plugin has decided.
func (i *Interceptor) emit(it *item) {
	switch {
	case it.inject != nil:
		it.inject()
	case it.dir == down:
		i.emitDown(it)
	default:
		i.emitUp(it)
	}
}

// wrapErr says whose error it is.
func (i *Interceptor) wrapErr(err error) error {
	return fmt.Errorf("plugin %s: %w", i.name, err)
}

// sendErr is wrapErr for a message to these members.
func (i *Interceptor) sendErr(to []channel.Member, err error) error {
	if errors.As(err, new(*channel.SendError)) {
		return i.wrapErr(err)
	}
	return channel.Failed(to, i.wrapErr(err))
}

func (i *Interceptor) emitDown(it *item) {
	v, m, done := &it.verdict, it.m, it.m.Done
	if it.open != nil {
		// At last: whoever is told may end the message, and m with it.
		defer it.open.told(m, done, nil)
		done = it.open
	}
	switch v.kind {
	case frame.Error:
		done.Complete(m, i.sendErr(m.To, v.err))
	case frame.Drop:
		if it.open == nil {
			done.Complete(m, nil)
		}
	default:
		// Not the body that the item has kept: the item is used again before the
		// layers below are through with the message.
		v.apply(m, m.Body)
		m.Done = done
		if err := it.link.Send(i.run, m); err != nil {
			done.Complete(m, err) // m.Done may be that of a layer below
		}
	}
}

func (it *item) body() []byte { return it.frame[it.bodyAt:len(it.frame):len(it.frame)] }

func (i *Interceptor) emitUp(it *item) {
	v, m := &it.verdict, &it.msg
	end := it.end
	if it.open != nil {
		it.open.told(nil, nil, end)
		end = it.open.above
	}
	switch v.kind {
	case frame.Error:
		end(i.wrapErr(v.err)) // nothing is open then
	case frame.Drop:
		if it.open == nil {
			end(nil)
		}
	default:
		v.apply(m, it.body())
		if m.Later != nil {
			// Told to end.
			_ = i.deliver(i.run, it.link, m, end)
			return
		}
		end(it.link.Deliver(i.run, m))
	}
}

// takeover lets a layer above take over the end of a message.
type takeover struct {
	end   func(error)
	taken bool
}

// Defer implements channel.Deferrer.
func (t *takeover) Defer() func(error) {
	t.taken = true
	return t.end
}

// flowLocked returns the flow of that key, making it if needed.
func (i *Interceptor) flowLocked(k flowKey) *flow {
	f := i.flows[k]
	if f == nil {
		f = &flow{key: k}
		i.flows[k] = f
	}
	return f
}

// acquire waits for a place in the window.
func (w *msgWindow) acquire(ctx context.Context, cost int64) error {
	if !w.msgs.TryAcquire(1) {
		if err := w.msgs.Acquire(ctx, 1); err != nil {
			return fmt.Errorf("%w: too many messages are on their way through the plugin: %w", channel.ErrQueueFull, err)
		}
	}
	if !w.bytes.TryAcquire(cost) {
		if err := w.bytes.Acquire(ctx, cost); err != nil {
			w.msgs.Release(1)
			return fmt.Errorf("%w: too many bytes are on their way through the plugin: %w", channel.ErrQueueFull, err)
		}
	}
	return nil
}

func (w *msgWindow) try(cost int64) bool {
	if !w.msgs.TryAcquire(1) {
		return false
	}
	if !w.bytes.TryAcquire(cost) {
		w.msgs.Release(1)
		return false
	}
	return true
}

func (w *msgWindow) release(cost int64) {
	w.bytes.Release(cost)
	w.msgs.Release(1)
}

// releaseLocked gives back a message's place and keeps its memory.
func (i *Interceptor) releaseLocked(it *item) {
	i.answers -= int64(len(it.verdict.body))
	if it.window != nil {
		it.window.release(it.cost)
	}
	b := it.frame
	if cap(b) > keepFrame {
		b = nil
	}
	*it = item{frame: b[:0], ch: it.ch}
	if len(i.free) < keepItems {
		i.free = append(i.free, it)
	}
}

const (
	// keepFrame is the largest encoded message whose memory is kept, keepItems
	// how many are kept.
	keepFrame = 4 << 10
	keepItems = frame.DefaultWindow
)

// take returns an item with the message encoded.
func (i *Interceptor) take(l channel.Link, m *channel.Message, dir uint8, told bool) *item {
	i.mu.Lock()
	var it *item
	if n := len(i.free); n > 0 {
		it = i.free[n-1]
		i.free = i.free[:n-1]
	}
	i.mu.Unlock()
	if it == nil {
		it = &item{ch: make(chan error, 1)}
	}
	it.link, it.dir = l, dir
	kind, flags := kindDown, byte(0)
	if dir == up {
		kind = kindUp
	}
	if told {
		flags = messageTold
	}
	var room [2 * memberRoom]byte
	head := appendHead(room[:0], m, flags, dir == down)
	it.bodyAt = frame.HeaderSize + len(head)
	it.frame = frame.Append(it.frame[:0], frame.Header{Kind: kind, Flags: frame.FlagEvent, Options: uint32(m.Options)}, head, m.Body)
	return it
}

// enter makes a message unanswered. When the plugin is down it may be refused
// or pass; passed says that.
func (i *Interceptor) enter(it *item, flow *flowKey) (passed bool, err error) {
	if n := len(it.frame) - 4; n > frame.DefaultMaxFrame {
		i.drop(it)
		return false, fmt.Errorf("%w: %d bytes do not fit into a frame of %d", channel.ErrTooLarge, n, frame.DefaultMaxFrame)
	}
	it.entered = time.Now()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.conn == nil {
		switch {
		case i.cfg.OnDown == core.Bypass && i.started:
			i.refused.Inc()
			it.answered = true
			if flow != nil && i.flows[*flow] != nil {
				i.joinLocked(it, *flow)
				return false, nil
			}
			i.releaseLocked(it)
			return true, nil
		case i.err != nil:
			err = i.err
		case i.cfg.OnDown != core.Wait:
			err = channel.ErrPluginDown
		}
		if err != nil {
			i.refused.Inc()
			i.releaseLocked(it)
			return false, err
		}
	}
	i.seq++
	it.seq = i.seq
	binary.BigEndian.PutUint64(it.frame[4:], it.seq)
	if len(i.pending) == 0 {
		i.first = it.seq
	}
	i.pending = append(i.pending, it)
	if flow != nil {
		i.joinLocked(it, *flow)
	}
	i.sent[it.dir].Inc()
	i.bytesTotal.Add(int64(len(it.frame) - it.bodyAt))
	if !i.armed {
		i.armLocked(i.cfg.Timeout)
	}
	i.pushLocked()
	return false, nil
}

func (i *Interceptor) joinLocked(it *item, k flowKey) {
	f := i.flowLocked(k)
	it.flow = f
	f.queue = append(f.queue, it)
	i.drainLocked(f)
}

func (i *Interceptor) drop(it *item) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.releaseLocked(it)
}

// armLocked has the timeouts looked at after d.
func (i *Interceptor) armLocked(d time.Duration) {
	i.armed = true
	if i.timer == nil {
		i.timer = time.AfterFunc(d, i.expire)
		return
	}
	i.timer.Reset(d)
}

// expire fails the messages whose time is over. They are in the order of their
// times.
func (i *Interceptor) expire() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.armed = false
	now := time.Now()
	for {
		it := i.firstLocked()
		if it == nil {
			return
		}
		if rest := i.cfg.Timeout - now.Sub(it.entered); rest > 0 {
			i.armLocked(rest)
			return
		}
		i.lateLocked(it)
	}
}

func (i *Interceptor) lateLocked(it *item) {
	i.lateTotal.Inc()
	if i.conn != nil {
		i.late++
		_ = i.conn.Push(frame.Header{Seq: it.seq, Kind: kindSkip}) // it has ended otherwise
		if i.late >= maxLate {
			i.late = 0
			i.conn.Close(fmt.Errorf("%w: %d messages in a row were not handled within %v", frame.ErrSilent, maxLate, i.cfg.Timeout))
		}
	}
	if i.cfg.OnDown == core.Bypass {
		i.resolveLocked(it, verdict{})
		return
	}
	err := fmt.Errorf("not handled within %v: %w", i.cfg.Timeout, context.DeadlineExceeded)
	if i.conn == nil {
		err = fmt.Errorf("%w: no successor within %v: %w", channel.ErrPluginDown, i.cfg.Timeout, context.DeadlineExceeded)
	}
	i.failLocked(it, err)
}

// answer takes a verdict.
func (i *Interceptor) answer(f frame.Frame) error {
	var v verdict
	if err := decodeVerdict(&v, f, i.in); err != nil {
		return err
	}
	i.verdicts[v.kind].Inc()
	i.mu.Lock()
	defer i.mu.Unlock()
	if f.Seq > i.pushed {
		return fmt.Errorf("%w: verdict about message %d, which was not given", frame.ErrProtocol, f.Seq)
	}
	if f.Seq < i.first || i.pending[f.Seq-i.first] == nil {
		return nil // its time was over, or its sender gave up
	}
	if i.answers += int64(len(v.body)); i.answers > maxHeldBytes {
		return fmt.Errorf("%w: answers of more than %d bytes wait for their turn", frame.ErrProtocol, maxHeldBytes)
	}
	i.late = 0
	if i.deaths > 0 && f.Seq == i.base {
		i.deaths = 0
	}
	i.resolveLocked(i.pending[f.Seq-i.first], v)
	return nil
}

// open is a message that the plugin has answered but is not through with.
type open struct {
	i   *Interceptor
	seq uint64
	// forwarded: the node was told to pass it on. report: the plugin wants to
	// know what became of it.
	forwarded, report bool

	mu     sync.Mutex
	known  bool // guarded by mu: m, done and end are set
	m      *channel.Message
	done   channel.Completion
	end    func(error)
	below  bool  // guarded by mu: what became of it is known: result
	result error // guarded by mu
	ended  bool  // guarded by mu: the plugin is through: final
	force  bool  // guarded by mu: final is the result even if nil
	final  error // guarded by mu
	told_  bool  // guarded by mu
}

// told sets whom to tell.
func (o *open) told(m *channel.Message, done channel.Completion, end func(error)) {
	o.mu.Lock()
	o.known, o.m, o.done, o.end = true, m, done, end
	o.mu.Unlock()
	o.finish()
}

// Complete implements channel.Completion for the layers below.
func (o *open) Complete(_ *channel.Message, err error) { o.above(err) }

// above is told what became of the message.
func (o *open) above(err error) {
	o.mu.Lock()
	if o.below {
		o.mu.Unlock()
		return
	}
	o.below, o.result = true, err
	o.mu.Unlock()
	if o.report {
		o.i.tellResult(o.seq, err)
	}
	o.finish()
}

// through is told that the plugin is through with it.
func (o *open) through(err error, force bool) {
	o.mu.Lock()
	if o.ended {
		o.mu.Unlock()
		return
	}
	o.ended, o.final, o.force = true, err, force
	o.mu.Unlock()
	o.finish()
}

// finish tells the result if all is known that it depends on. What was passed on
// has an end below, whatever the plugin says, and is in use until then.
func (o *open) finish() {
	o.mu.Lock()
	ready := o.known && !o.told_ && o.ended && (o.below || !o.forwarded)
	if !ready {
		o.mu.Unlock()
		return
	}
	o.told_ = true
	err := o.result
	if o.force || o.final != nil {
		err = o.final
	}
	o.mu.Unlock()
	switch {
	case o.done != nil:
		o.m.Done = o.done
		if err != nil {
			err = o.i.asSendErr(o.m.To, err)
		}
		o.done.Complete(o.m, err)
	case o.end != nil:
		o.end(err)
	}
}

func (i *Interceptor) asSendErr(to []channel.Member, err error) error {
	if errors.As(err, new(*channel.SendError)) {
		return err
	}
	return channel.Failed(to, err)
}

// orphanLocked ends what the plugin will not end any more: what it had passed
// on ends as it ends below, the rest has failed.
func (i *Interceptor) orphanLocked(o *open) {
	delete(i.opened, o.seq)
	i.tasks.Go(func() {
		if o.forwarded {
			o.through(nil, false)
			return
		}
		o.through(i.wrapErr(channel.ErrPluginDown), true)
	})
	i.settledLocked()
}

func (i *Interceptor) tellResult(seq uint64, err error) {
	i.mu.Lock()
	conn := i.conn
	i.mu.Unlock()
	if conn == nil {
		return
	}
	var b []byte
	if err != nil {
		b = appendError(nil, err, 0)
	}
	// If it cannot be told, the plugin has ended.
	_ = conn.Push(frame.Header{Seq: seq, Kind: kindResult}, b)
}

// ended takes the end of an open message.
func (i *Interceptor) ended(f frame.Frame) {
	i.mu.Lock()
	o := i.opened[f.Seq]
	delete(i.opened, f.Seq)
	i.settledLocked()
	i.mu.Unlock()
	if o == nil {
		return // its time was over
	}
	var err error
	if len(f.Payload) > 0 {
		err = i.wrapErr(decodeError(f.Payload, i.in))
	}
	// Completions do not block.
	o.through(err, f.Options == endFinal)
}
