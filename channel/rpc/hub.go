package rpc

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// hub is what the RPCs of one channel share: the listener, the watch and the
// calls that wait. It lives as long as there is one, or an [Attach].
type hub struct {
	ch  *channel.Channel
	own [8]byte // this instance, in the ids of calls
	// limits of messages whose RPC is not known yet.
	limits jser.Limits
	log    *zap.Logger

	mu    sync.Mutex
	rpcs  map[string]*RPC
	calls map[uint64]*call
	next  uint64
	users int // guarded by hubs.mu
	stop  []func()

	// Absent answers that are being sent, so that they are bounded too.
	absents  chan struct{}
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	absent   *channel.Counter
	refused  *channel.Counter
	overload *channel.Counter

	// Which members are Longhouse nodes.
	kindsMu sync.RWMutex
	natives map[channel.UniqueID]bool
}

// hubs holds the hub of every channel that has RPCs.
var hubs = struct {
	mu sync.Mutex
	m  map[*channel.Channel]*hub
}{m: map[*channel.Channel]*hub{}}

// maxAbsents bounds the absent answers that are sent at a time.
const maxAbsents = 1024

// Attach lets a node on which there is no RPC yet answer, at once, that it has
// none of the name it is asked for. detach ends that.
func Attach(ch *channel.Channel, s channel.Settings) (detach func()) {
	h := join(ch, s)
	var once sync.Once
	return func() { once.Do(h.leave) }
}

// join returns the hub of ch, with one user more.
func join(ch *channel.Channel, s channel.Settings) *hub {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	h := hubs.m[ch]
	if h == nil {
		log := s.Logger
		if log == nil {
			log = zap.NewNop()
		}
		h = &hub{ch: ch, rpcs: map[string]*RPC{}, calls: map[uint64]*call{}, natives: map[channel.UniqueID]bool{}, log: log,
			limits: jser.Limits{KeepUnlisted: true}, absents: make(chan struct{}, maxAbsents),
			absent:   s.Metrics.Counter("rpc_absent_total", "Requests for an RPC that is not here."),
			overload: s.Metrics.Counter("rpc_absent_dropped_total", "Requests for an RPC that is not here that were not answered, because there were too many."),
			refused:  s.Metrics.Counter("rpc_malformed_total", "Messages that look like an RPC and are none.")}
		_, _ = rand.Read(h.own[:])
		h.ctx, h.cancel = context.WithCancel(context.Background())
		hubs.m[ch] = h
		h.stop = []func(){ch.Listen(h), ch.Watch(h.watch)}
	}
	h.users++
	return h
}

// leave takes one user away.
func (h *hub) leave() {
	hubs.mu.Lock()
	h.users--
	last := h.users == 0
	if last {
		delete(hubs.m, h.ch)
	}
	hubs.mu.Unlock()
	if last {
		for _, f := range h.stop {
			f()
		}
		h.mu.Lock() // nobody is between looking at ctx and joining wg
		h.cancel()
		h.mu.Unlock()
		h.wg.Wait()
	}
}

func attach(ch *channel.Channel, s channel.Settings, r *RPC) error {
	h := join(ch, s)
	h.mu.Lock()
	taken := h.rpcs[string(r.name)] != nil
	if !taken {
		r.hub = h
		h.rpcs[string(r.name)] = r
	}
	h.mu.Unlock()
	if taken {
		h.leave()
		return fmt.Errorf("%w: %q", ErrNameTaken, r.name)
	}
	return nil
}

// detach ends the calls of r and takes it out.
func (h *hub) detach(r *RPC) {
	h.mu.Lock()
	if r.closed {
		h.mu.Unlock()
		return
	}
	r.closed = true
	delete(h.rpcs, string(r.name))
	for _, c := range h.calls {
		if c.rpc == r {
			for i := range c.dests {
				h.end(c, i, Reply{Err: channel.ErrClosed}, false)
			}
		}
	}
	h.mu.Unlock()
	h.leave()
}

// watch ends the wait for members that have gone.
func (h *hub) watch(v channel.View, ev channel.MemberEvent) {
	switch ev.Kind {
	case 0: // the first call
		h.kindsMu.Lock()
		defer h.kindsMu.Unlock()
		for i := range v.Members {
			_, h.natives[v.Members[i].ID] = v.Members[i].Announcement()
		}
	case channel.MemberAdded, channel.MemberUpdated:
		_, ok := ev.Member.Announcement()
		h.kindsMu.Lock()
		h.natives[ev.Member.ID] = ok
		h.kindsMu.Unlock()
	case channel.MemberLost, channel.MemberLeft:
		h.kindsMu.Lock()
		delete(h.natives, ev.Member.ID)
		h.kindsMu.Unlock()
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, c := range h.calls {
			for i := range c.dests {
				if c.dests[i].id == ev.Member.ID {
					h.end(c, i, Reply{Err: ErrGone}, true)
				}
			}
		}
	}
}

// isNative reports whether m is a Longhouse node.
func (h *hub) isNative(m *channel.Member) bool {
	h.kindsMu.RLock()
	ok, known := h.natives[m.ID]
	h.kindsMu.RUnlock()
	if !known {
		_, ok = m.Announcement()
	}
	return ok
}

// begin registers a call.
func (h *hub) begin(c *call) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := c.rpc
	switch {
	case r.closed:
		return fmt.Errorf("rpc: call %q: %w", r.name, channel.ErrClosed)
	case r.calling >= r.cfg.MaxCalls:
		r.refused["calls"].Inc()
		return fmt.Errorf("rpc: call %q: %d calls wait already, see max_calls: %w", r.name, r.calling, ErrBusy)
	}
	r.calling++
	h.next++
	c.number = h.next
	h.calls[c.number] = c
	return nil
}

// checkView ends the wait for members that are not in the group. Those that
// leave after it are noticed by watch.
func (h *hub) checkView(c *call) {
	v := h.ch.View()
	for i := range c.to {
		if !v.Has(c.to[i]) && c.to[i].ID != v.Local.ID {
			h.mu.Lock()
			h.end(c, i, Reply{Err: ErrGone}, true)
			h.mu.Unlock()
		}
	}
}

// end notes how the call has ended for the i-th member; hub.mu is held.
func (h *hub) end(c *call, i int, p Reply, missing bool) {
	if c.dests[i].ended || c.over {
		return
	}
	c.dests[i].ended = true
	c.ended++
	if missing {
		c.missing++
	}
	if p.Err == nil {
		c.good++
	}
	p.Member = c.to[i]
	c.replies = append(c.replies, p)
	if c.satisfied() {
		h.over(c)
	}
}

// over ends a call; hub.mu is held.
func (h *hub) over(c *call) {
	if !c.over {
		c.over = true
		c.rpc.calling--
		delete(h.calls, c.number)
		c.done <- struct{}{}
	}
}

func (h *hub) finish(c *call) {
	h.mu.Lock()
	h.over(c)
	h.mu.Unlock()
}

// result is called when the call is over: nobody changes it any more.
func (h *hub) result(ctx context.Context, c *call) ([]Reply, error) {
	h.mu.Lock() // for what happened before
	replies := c.replies
	h.mu.Unlock()
	if c.mode == None {
		var errs []error
		for _, p := range replies {
			if p.Err != nil {
				errs = append(errs, fmt.Errorf("%v: %w", p.Member, p.Err))
			}
		}
		return replies, errors.Join(errs...)
	}
	err := c.err()
	if err != nil && c.ended < len(c.dests) && ctx.Err() != nil {
		err = errors.Join(err, context.Cause(ctx))
	}
	return replies, err
}

func (h *hub) callID(number uint64) (id callID) {
	copy(id[:], h.own[:])
	binary.BigEndian.PutUint64(id[8:], number)
	return id
}

// sending tells a call which of its members a request has not reached.
type sending struct {
	h *hub
	c *call
	// sent is closed when sending has ended; nil if nobody waits.
	sent chan struct{}
}

// Complete implements channel.Completion.
func (s *sending) Complete(_ *channel.Message, err error) {
	s.h.faults(s.c, nil, err)
	if s.sent != nil {
		close(s.sent)
	}
}

// faults ends the call for members that sending has failed for. If err does not
// name them it is those in to, or, if to is nil, all.
func (h *hub) faults(c *call, to []channel.Member, err error) {
	if err == nil {
		return
	}
	var faults []channel.Fault
	if se, ok := errors.AsType[*channel.SendError](err); ok {
		faults = se.Faults
	} else {
		faults = channel.Failed(to, err).Faults
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range c.dests {
		if len(faults) == 0 {
			h.end(c, i, Reply{Err: err}, false)
		}
		for _, f := range faults {
			if c.dests[i].id == f.Member.ID {
				h.end(c, i, Reply{Err: f.Err}, false)
			}
		}
	}
}

// ask sends the requests of a call.
func (h *hub) ask(ctx context.Context, c *call, body Body, o channel.Options) {
	o &^= channel.SyncAck | channel.Async | channel.ObjectStream
	f := frame{kind: request, id: h.callID(c.number), name: c.rpc.name}
	if d, ok := ctx.Deadline(); ok {
		f.wait = max(1, time.Until(d))
	}
	var natives, tribes []channel.Member
	local := h.ch.Local().ID
	for i := range c.to {
		h.mu.Lock()
		ended := c.dests[i].ended
		h.mu.Unlock()
		switch {
		case ended:
		case c.to[i].ID == local:
			h.askSelf(ctx, c, i, body)
		case h.isNative(&c.to[i]):
			if len(c.to) == 1 {
				natives = c.to
				break
			}
			if natives == nil {
				natives = make([]channel.Member, 0, len(c.to)-i)
			}
			natives = append(natives, c.to[i])
		default:
			tribes = append(tribes, c.to[i])
		}
	}
	if len(natives) > 0 {
		err := body.fill(&f, c.rpc.cfg.Dialect)
		if err != nil {
			h.faults(c, natives, err)
		} else {
			h.send(ctx, c, natives, appendFrame(make([]byte, 0, head+len(f.name)+len(f.body)), &f), o)
		}
	}
	if len(tribes) > 0 {
		f.kind, f.value = request, body.java()
		b, err := encodeTribes(c.rpc.cfg.Dialect, &f)
		if err != nil {
			h.faults(c, tribes, err)
		} else {
			h.send(ctx, c, tribes, b, o|channel.ObjectStream)
		}
	}
}

func (h *hub) send(ctx context.Context, c *call, to []channel.Member, b []byte, o channel.Options) {
	if len(to) == 1 && !o.Has(channel.UseAck) { // nothing to wait for: the short way
		if err := h.ch.Send(ctx, to, b, o); err != nil {
			h.faults(c, to, err)
		}
		return
	}
	s := &sending{h: h, c: c}
	if c.mode == None {
		s.sent = make(chan struct{})
	}
	if err := h.ch.SendDone(ctx, to, b, o, s); err != nil {
		h.faults(c, to, err)
		return
	}
	if s.sent != nil {
		select {
		case <-s.sent:
		case <-ctx.Done():
			h.faults(c, to, ctx.Err())
		}
	}
}

// askSelf serves a request of this node's own.
func (h *hub) askSelf(ctx context.Context, c *call, i int, body Body) {
	r := c.rpc
	if r.handler == nil {
		h.mu.Lock()
		h.end(c, i, Reply{Err: ErrAbsent}, true)
		h.mu.Unlock()
		return
	}
	if !h.enter(r) {
		h.mu.Lock()
		h.end(c, i, Reply{Err: ErrBusy}, false)
		h.mu.Unlock()
		return
	}
	body.Bytes = append([]byte(nil), body.Bytes...)
	from := h.ch.Local()
	go func() {
		defer h.exit(r)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(r.ctx, cancel)()
		out, err := r.run(ctx, from, body)
		h.mu.Lock()
		defer h.mu.Unlock()
		if err != nil {
			err = &RemoteError{err.Error()}
		}
		h.end(c, i, Reply{Body: out, Err: err}, false)
	}()
}

// enter counts a request that is about to be served.
func (h *hub) enter(r *RPC) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.closed || r.serving >= r.cfg.MaxServing {
		return false
	}
	r.serving++
	r.wg.Add(1)
	return true
}

func (h *hub) exit(r *RPC) {
	h.mu.Lock()
	r.serving--
	h.mu.Unlock()
	r.wg.Done()
}

// run calls the handler and survives its panic.
func (r *RPC) run(ctx context.Context, from channel.Member, body Body) (out Body, err error) {
	defer func() {
		if p := recover(); p != nil {
			r.log.Error("an rpc handler panicked", zap.ByteString("rpc", r.name), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			out, err = Body{}, errors.New("the handler panicked")
		}
		if err != nil {
			r.failed.Inc()
		}
	}()
	r.served.Inc()
	return r.handler(ctx, from, body)
}

// Handle implements channel.Listener.
func (h *hub) Handle(_ context.Context, m *channel.Message) (bool, error) {
	var f frame
	switch {
	case m.Options.Has(channel.ByteMessage):
		if !native(m.Body) {
			return false, nil
		}
		var ok bool
		if f, ok = decodeFrame(m.Body); !ok {
			h.refused.Inc()
			return true, fmt.Errorf("rpc: malformed message: %w", channel.ErrBadMessage)
		}
	case foreign(m.Body):
		var err error
		if f, err = decodeTribes(m.Body, h.limits); err != nil {
			h.refused.Inc()
			return true, fmt.Errorf("rpc: malformed message: %w", err)
		}
	default:
		return false, nil
	}
	if f.kind&^object == request {
		return true, h.serve(m, &f)
	}
	return true, h.replied(m, &f)
}

// replied brings a reply to the call that waits for it.
func (h *hub) replied(m *channel.Message, f *frame) error {
	h.mu.Lock()
	r := h.rpcs[string(f.name)]
	c := h.calls[binary.BigEndian.Uint64(f.id[8:])]
	ours := [8]byte(f.id[:8]) == h.own
	h.mu.Unlock()
	if r == nil {
		h.refused.Inc()
		return nil // nobody here has asked: closed since, or never
	}
	if !ours || c != nil && c.rpc != r {
		r.strange.Inc()
		return nil
	}
	p, missing := Reply{Member: m.From}, false
	var refused string
	switch f.kind &^ object {
	case reply:
		if len(m.Body) > r.cfg.MaxReply+head+len(f.name) {
			p.Err, refused = ErrReplyTooLarge, "too_large"
			break
		}
		var err error
		if p.Body, err = bodyOf(f, r.limits); err != nil {
			p.Err, refused = fmt.Errorf("rpc: reply: %w", err), "malformed"
		}
	case failure:
		p.Err = &RemoteError{string(f.body[:min(len(f.body), maxErrorText)])}
	case absent:
		p.Err, missing = ErrAbsent, true
	case busy:
		p.Err = ErrBusy
	}
	if refused != "" {
		r.refused[refused].Inc()
	}
	if c == nil {
		h.late(r, p)
		return nil
	}
	h.mu.Lock()
	at, over := -1, c.over || c.mode == None
	for i := range c.dests {
		if c.dests[i].id == m.From.ID {
			at = i
			break
		}
	}
	var counter *channel.Counter
	switch {
	case at < 0:
		counter = r.strange
	case over:
	case c.dests[at].ended:
		counter = r.duplicate
	default:
		counter = r.replied
		h.end(c, at, p, missing)
	}
	h.mu.Unlock()
	if counter == nil {
		h.late(r, p)
	} else {
		counter.Inc()
	}
	return nil
}

func (h *hub) late(r *RPC, p Reply) {
	r.late.Inc()
	if r.cfg.LeftOver != nil && p.Err == nil {
		r.cfg.LeftOver(p)
	}
}

// serve begins to answer a request.
func (h *hub) serve(m *channel.Message, f *frame) error {
	h.mu.Lock()
	r := h.rpcs[string(f.name)]
	h.mu.Unlock()
	if r == nil || r.handler == nil {
		h.absent.Inc()
		h.answerOnly(m, f, absent)
		return nil
	}
	if len(f.body) > r.cfg.MaxReply {
		r.refused["too_large"].Inc()
		return fmt.Errorf("rpc: request of %d bytes for %q, see max_reply: %w", len(f.body), r.name, channel.ErrTooLarge)
	}
	body, err := bodyOf(f, r.limits)
	if err != nil {
		r.refused["malformed"].Inc()
		return fmt.Errorf("rpc: request for %q: %w", r.name, err)
	}
	if !h.enter(r) {
		r.refused["busy"].Inc()
		h.answerOnly(m, f, busy)
		return nil
	}
	// The message ends here, and not with the handler: a caller waits for the
	// reply, and a connection should not stop for requests that take long.
	q := &serving{r: r, from: m.From, body: body, f: frame{id: f.id, name: r.name, wait: f.wait, tribes: f.tribes}}
	if r.cfg.Quick {
		q.run()
	} else {
		go q.run()
	}
	return nil
}

// serving is one request that is served.
type serving struct {
	r    *RPC
	from channel.Member
	body Body
	f    frame
}

func (q *serving) run() {
	r := q.r
	defer r.hub.exit(r)
	wait := q.f.wait
	if wait <= 0 {
		wait = r.cfg.ServeTimeout
	}
	ctx, cancel := context.WithTimeout(r.ctx, wait)
	defer cancel()
	out, err := r.run(ctx, q.from, q.body)
	f := &q.f
	f.kind = reply
	if err == nil && !f.tribes {
		err = out.fill(f, r.cfg.Dialect)
	}
	if err != nil {
		text := err.Error()
		f.kind, f.body, out = failure, []byte(text[:min(len(text), maxErrorText)]), Body{}
	}
	f.value = out.java()
	if err := r.hub.answer(ctx, q.from, f, r.cfg.ReplyOptions, r.cfg.Dialect, unsent{r.unanswered}); err != nil {
		r.unanswered.Inc()
		r.log.Warn("a reply could not be sent", zap.ByteString("rpc", r.name), zap.Stringer("member", q.from), zap.Error(err))
	}
}

// unsent counts replies that could not be sent.
type unsent struct{ c *channel.Counter }

// Complete implements channel.Completion.
func (u unsent) Complete(_ *channel.Message, err error) {
	if err != nil {
		u.c.Inc()
	}
}

// answer sends one reply, in the form of the request.
func (h *hub) answer(ctx context.Context, to channel.Member, f *frame, o channel.Options, d *jser.Dialect, done channel.Completion) error {
	f.wait = 0
	o &^= channel.ObjectStream
	if !f.tribes {
		b := appendFrame(make([]byte, 0, head+len(f.name)+len(f.body)), f)
		if !o.Has(channel.UseAck) {
			return h.ch.Send(ctx, []channel.Member{to}, b, o)
		}
		return h.ch.SendDone(ctx, []channel.Member{to}, b, o, done)
	}
	b, err := encodeTribes(d, f)
	if err != nil {
		// Nothing that can be said: null, so that the caller does not wait.
		f.kind, f.value = reply, nil
		if b, err = encodeTribes(d, f); err != nil {
			return err
		}
	}
	return h.ch.SendDone(ctx, []channel.Member{to}, b, o&^channel.SyncAck|channel.ObjectStream, done)
}

// answerOnly sends a reply without a body, in a goroutine: sending may block.
func (h *hub) answerOnly(m *channel.Message, f *frame, k kind) {
	select {
	case h.absents <- struct{}{}:
	default:
		h.overload.Inc()
		return
	}
	g := &frame{kind: k, id: f.id, name: append([]byte(nil), f.name...), tribes: f.tribes}
	from := m.From
	h.mu.Lock()
	open := h.ctx.Err() == nil
	if open {
		h.wg.Add(1)
	}
	h.mu.Unlock()
	if !open {
		return // with all its places
	}
	go func() {
		defer h.wg.Done()
		defer func() { <-h.absents }()
		if err := h.answer(h.ctx, from, g, channel.SendAsync, nil, unsent{h.overload}); err != nil {
			h.overload.Inc()
		}
	}()
}
