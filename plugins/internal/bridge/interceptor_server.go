package bridge

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// errPanic is why a plugin ends whose handler has panicked.
var errPanic = errors.New("bridge: a handler of the plugin panicked")

// ServedInterceptor is an interceptor as a program serves it.
type ServedInterceptor struct {
	channel.Interceptor
	// Description is what the node is told.
	Description Description
}

// interceptorServer serves a channel.Interceptor to a node. It implements
// channel.Link for what the layer does outside of handlers.
type interceptorServer struct {
	server
	impl     channel.Interceptor
	describe Description
	handlers struct {
		send    channel.SendHandler
		receive channel.ReceiveHandler
		encode  channel.Encoder
		decode  channel.Decoder
		member  channel.MemberHandler
		tick    channel.TickHandler
		filter  channel.ViewFilter
	}
	view  atomic.Pointer[channel.View]
	local atomic.Pointer[channel.Member]
	lanes lanes

	mu   sync.Mutex
	live map[uint64]*delivery // guarded by mu: may be skipped, or are open
}

// stopsInterceptor makes a component of a layer that needs no Stop.
type stopsInterceptor struct{ i channel.Interceptor }

func (s stopsInterceptor) Stop(ctx context.Context) error {
	if stopper, ok := s.i.(channel.Stopper); ok {
		return stopper.Stop(ctx)
	}
	return nil
}

func serveInterceptor(rw io.ReadWriteCloser, impl channel.Interceptor, cfg frame.Config, log *zap.Logger) Server {
	s := &interceptorServer{
		impl: impl,
		live: map[uint64]*delivery{},
	}
	if served, ok := impl.(ServedInterceptor); ok {
		s.impl, s.describe = served.Interceptor, served.Description
	} else {
		s.describe = DescribeInterceptor(impl.Descriptor().Name, "", impl)
	}
	s.server = newServer(stopsInterceptor{s.impl}, log)
	h := &s.handlers
	h.send, _ = s.impl.(channel.SendHandler)
	h.receive, _ = s.impl.(channel.ReceiveHandler)
	h.encode, _ = s.impl.(channel.Encoder)
	h.decode, _ = s.impl.(channel.Decoder)
	h.member, _ = s.impl.(channel.MemberHandler)
	h.tick, _ = s.impl.(channel.TickHandler)
	h.filter, _ = s.impl.(channel.ViewFilter)
	s.view.Store(new(channel.View))
	s.local.Store(new(channel.Member))
	s.lanes.init(s.process, func() bool { return s.connErr() != nil })
	s.run(rw, s, s.serve, cfg)
	return s
}

// Close implements Server.
func (s *interceptorServer) Close(ctx context.Context) error {
	panicked := errors.Is(s.connErr(), errPanic)
	err := s.server.Close(ctx)
	if panicked {
		err = errors.Join(errPanic, err)
	}
	return errors.Join(err, s.lanes.wait(ctx))
}

func (s *interceptorServer) connErr() error {
	select {
	case <-s.c.Done():
		return s.c.Err()
	default:
		return nil
	}
}

// guard ends the plugin if f panics: its state cannot be trusted any more.
func (s *interceptorServer) guard(what string, f func()) {
	ok := false
	defer func() {
		if !ok {
			p := recover()
			s.log.Error("a handler panicked; the plugin ends and is started again",
				zap.String("handler", what), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			s.conn().Close(fmt.Errorf("%w: %s: %v", errPanic, what, p))
		}
	}()
	f()
	ok = true
}

// HandleCall implements frame.Handler.
func (s *interceptorServer) HandleCall(r *frame.Request) {
	switch r.Kind {
	case kindMember, kindTick:
		s.lane.put(r)
	case kindFilter:
		r.Go(s.filter)
	case kindStart:
		r.Go(s.start)
	case kindStop:
		r.Go(func(r *frame.Request) { s.guard("stop", func() { s.stop(r) }) })
	default:
		refuse(r)
	}
}

func (s *interceptorServer) start(r *frame.Request) {
	if err := s.setView(r.Payload); err != nil {
		answer(r, err)
		return
	}
	s.guard("start", func() {
		if starter, ok := s.impl.(channel.Starter); ok {
			if err := starter.Start(r.Context(), s); err != nil {
				answer(r, err)
				return
			}
		}
		d := s.impl.Descriptor()
		b, err := json.Marshal(startReply{s.describe, d.SendInterest, d.ReceiveInterest})
		if err == nil {
			err = r.Reply(frame.Replace, 0, b)
		}
		if err != nil {
			answer(r, err)
		}
	})
}

func (s *interceptorServer) setView(payload []byte) error {
	d := decoder{b: payload, in: s.in}
	local, v := d.member(), d.view()
	if d.err != nil {
		return d.err
	}
	s.local.Store(&local)
	s.view.Store(&v)
	return nil
}

// serve handles member events and ticks, one at a time.
func (s *interceptorServer) serve(ctx context.Context, r *frame.Request) {
	d := decoder{b: r.Payload, in: s.in}
	if r.Kind == kindTick {
		now := d.time("time")
		if d.err != nil || s.handlers.tick == nil {
			answer(r, d.err)
			return
		}
		s.guard("tick", func() { answer(r, s.handlers.tick.HandleTick(ctx, s, now)) })
		return
	}
	ev := channel.MemberEvent{Kind: channel.MemberEventKind(r.Options), Member: d.member()}
	if len(d.b) > 0 {
		ev.Err = d.error(0)
	}
	if d.err != nil || s.handlers.member == nil {
		answer(r, d.err)
		return
	}
	s.guard("member event", func() { answer(r, s.handlers.member.HandleMember(ctx, s, ev)) })
}

func (s *interceptorServer) filter(r *frame.Request) {
	d := decoder{b: r.Payload, in: s.in}
	v := d.view()
	if d.err != nil || s.handlers.filter == nil {
		answer(r, d.err)
		return
	}
	s.guard("view filter", func() {
		out := s.handlers.filter.FilterView(v)
		if err := r.Reply(frame.Replace, 0, appendMembers(nil, out.Members)); err != nil {
			answer(r, err)
		}
	})
}

// HandleEvent implements frame.Handler.
func (s *interceptorServer) HandleEvent(f frame.Frame) error {
	switch f.Kind {
	case kindDown, kindUp:
		return s.message(f)
	case kindNewView:
		return s.setView(f.Payload)
	case kindSkip:
		s.mu.Lock()
		d := s.live[f.Seq]
		s.mu.Unlock()
		if d != nil && d.cancel != nil {
			d.cancel()
		}
	case kindResult:
		s.mu.Lock()
		d := s.live[f.Seq]
		s.mu.Unlock()
		if d != nil {
			var err error
			if len(f.Payload) > 0 {
				err = decodeError(f.Payload, s.in)
			}
			if !d.told {
				s.strike(d)
			}
			s.lanes.tasks.Go(func() { s.guard("completion", func() { d.m.Done.Complete(&d.m, err) }) })
		}
	}
	return nil
}

// message gives a message to the lane of its flow: messages of one sender are
// handled one after the other, and so are those that are sent without waiting.
// Each message that somebody waits for has a goroutine of its own: another one
// that waits must not hold it up.
func (s *interceptorServer) message(f frame.Frame) error {
	s.conn() // is there from here on
	if len(f.Payload) < messageFlow+16 {
		return fmt.Errorf("%w: a message of %d bytes", frame.ErrProtocol, len(f.Payload))
	}
	k := laneKey{dir: f.Kind}
	switch {
	case f.Kind == kindUp:
		copy(k.from[:], f.Payload[messageFlow:])
	case f.Payload[4]&messageTold == 0 && s.handlers.send != nil:
		s.lanes.tasks.Go(func() { s.process(f) })
		return nil
	}
	s.lanes.put(k, f)
	return nil
}

// process handles one message.
func (s *interceptorServer) process(f frame.Frame) {
	s.guard(directions[f.Kind-kindDown], func() {
		d := &delivery{s: s, seq: f.Seq, kind: f.Kind}
		p := decoder{b: f.Payload, in: s.in}
		flags := p.message(&d.m, f.Kind == kindDown)
		if p.err != nil {
			d.verdict(frame.Error, 0, appendError(nil, p.err, 0))
			return
		}
		d.m.Options = channel.Options(f.Options)
		if f.Kind == kindDown {
			s.processDown(d, flags)
		} else {
			s.processUp(d, flags)
		}
	})
}

func (s *interceptorServer) processDown(d *delivery, flags byte) {
	switch {
	case s.handlers.encode != nil:
		d.keepOriginal()
		if err := s.handlers.encode.Encode(&d.m); err != nil {
			// As the stack words it.
			err = channel.Failed(d.to, fmt.Errorf("encode: %w", err))
			d.verdict(frame.Error, 0, appendError(nil, err, 0))
			return
		}
		d.pass(0)
	case s.handlers.send != nil:
		d.keepOriginal()
		ctx := s.c.Context()
		if flags&messageTold != 0 {
			d.told = true
			d.m.Done = d
		} else {
			ctx, d.cancel = context.WithCancel(ctx)
			defer d.cancel()
			s.enlist(d)
		}
		d.returned(s.handlers.send.HandleSend(ctx, d, &d.m))
	default:
		d.verdict(frame.Pass, 0)
	}
}

func (s *interceptorServer) processUp(d *delivery, flags byte) {
	switch {
	case s.handlers.decode != nil:
		d.keepOriginal()
		if err := s.handlers.decode.Decode(&d.m); err != nil {
			d.verdict(frame.Error, 0, appendError(nil, fmt.Errorf("decode: %w", err), 0))
			return
		}
		d.pass(0)
	case s.handlers.receive != nil:
		d.keepOriginal()
		if flags&messageTold != 0 {
			d.told = true
			d.m.Later = d
		}
		d.returned(s.handlers.receive.HandleReceive(s.c.Context(), d, &d.m))
	default:
		d.verdict(frame.Pass, 0)
	}
}

func (s *interceptorServer) enlist(d *delivery) {
	s.mu.Lock()
	s.live[d.seq] = d
	s.mu.Unlock()
}

func (s *interceptorServer) strike(d *delivery) {
	s.mu.Lock()
	delete(s.live, d.seq)
	s.mu.Unlock()
}

// delivery is one message inside the plugin: the Link of its handler, its Done
// and its Later.
type delivery struct {
	s    *interceptorServer
	seq  uint64
	kind uint8
	m    channel.Message
	told bool // Done or Later is set in the node

	// The message as it came.
	options channel.Options
	id      channel.UniqueID
	time    int64
	from    channel.Member
	to      []channel.Member
	body    []byte
	sum     uint64
	// cancel ends the context of a message that somebody waits for.
	cancel context.CancelFunc

	mu       sync.Mutex
	passed   bool // guarded by mu: forwarded by the handler
	reported bool // guarded by mu: the author wants to know what became of it
	deferred bool // guarded by mu: the end is given by end
	hasEnded bool // guarded by mu: Complete, or the deferred end, was called
	done     bool // guarded by mu: the handler has returned
	final    error
}

var seed = maphash.MakeSeed()

// keepOriginal notes what the message is, to tell later what has changed.
// Bodies may be changed in place.
func (d *delivery) keepOriginal() {
	m := &d.m
	d.options, d.id, d.time, d.from, d.to, d.body = m.Options, m.ID, m.Time, m.From, m.To, m.Body
	if len(m.To) > 0 {
		d.to = slices.Clone(m.To)
	}
	d.sum = maphash.Bytes(seed, m.Body)
}

// verdict tells the node what becomes of the message.
func (d *delivery) verdict(v frame.Verdict, o channel.Options, parts ...[]byte) {
	err := d.s.c.Push(frame.Header{Seq: d.seq, Kind: kindVerdict, Verdict: v, Options: uint32(o)}, parts...)
	if errors.Is(err, channel.ErrTooLarge) {
		// Nothing else can fail but the connection.
		_ = d.s.c.Push(frame.Header{Seq: d.seq, Kind: kindVerdict, Verdict: frame.Error}, appendError(nil, err, 0))
	}
}

// pass tells the node to pass the message on, with what has changed.
func (d *delivery) pass(fields byte) {
	m := &d.m
	var room [2 * memberRoom]byte
	b := append(room[:0], 0)
	if m.ID != d.id {
		fields |= replaceID
		b = append(b, m.ID[:]...)
	}
	if m.Time != d.time {
		fields |= replaceTime
		b = binary.BigEndian.AppendUint64(b, uint64(m.Time))
	}
	if m.From != d.from {
		fields |= replaceFrom
		b = appendMember(b, m.From)
	}
	if d.kind == kindDown && !slices.Equal(m.To, d.to) {
		fields |= replaceTo
		b = appendMembers(b, m.To)
	}
	var body []byte
	if !d.sameBody() {
		fields |= replaceBody
		body = m.Body
	}
	b[0] = fields
	switch {
	case fields&^(verdictOpen|verdictReport) != 0 || m.Options != d.options:
		d.verdict(frame.Replace, m.Options, b, body)
	case fields != 0:
		d.verdict(frame.Pass, 0, b)
	default:
		d.verdict(frame.Pass, 0)
	}
}

func (d *delivery) sameBody() bool {
	a, b := d.m.Body, d.body
	if len(a) != len(b) {
		return false
	}
	return len(a) == 0 || &a[0] == &b[0] && maphash.Bytes(seed, a) == d.sum
}

// Send implements channel.Link for the handler. The message itself is passed on
// by a verdict, and Send does not wait for what becomes of it; any other one is
// a message of the plugin's own.
func (d *delivery) Send(ctx context.Context, m *channel.Message) error {
	if m != &d.m || d.kind != kindDown {
		return d.s.Send(ctx, m)
	}
	d.mu.Lock()
	if d.passed || d.done {
		d.mu.Unlock()
		return d.s.Send(ctx, m)
	}
	d.passed = true
	d.reported = m.Done != nil && m.Done != channel.Completion(d)
	fields := verdictOpen
	if d.reported {
		fields |= verdictReport
		d.s.enlist(d)
	}
	d.mu.Unlock()
	d.pass(fields)
	return nil
}

// Deliver implements channel.Link for the handler, like Send.
func (d *delivery) Deliver(ctx context.Context, m *channel.Message) error {
	if m != &d.m || d.kind != kindUp {
		return d.s.Deliver(ctx, m)
	}
	d.mu.Lock()
	if d.passed || d.done {
		d.mu.Unlock()
		return d.s.Deliver(ctx, m)
	}
	d.passed = true
	d.mu.Unlock()
	d.pass(verdictOpen)
	return nil
}

// Announce implements channel.Link.
func (d *delivery) Announce(ctx context.Context, ev channel.MemberEvent) error {
	return d.s.Announce(ctx, ev)
}

// View implements channel.Link.
func (d *delivery) View() channel.View { return d.s.View() }

// Local implements channel.Link.
func (d *delivery) Local() channel.Member { return d.s.Local() }

// Complete implements channel.Completion: the author ends a message that is
// sent without waiting.
func (d *delivery) Complete(_ *channel.Message, err error) { d.finish(err) }

// Defer implements channel.Deferrer.
func (d *delivery) Defer() func(error) {
	d.mu.Lock()
	d.deferred = true
	d.mu.Unlock()
	return d.finish
}

// finish takes the result that the author gives by Complete or by the deferred
// end.
func (d *delivery) finish(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hasEnded {
		return
	}
	d.hasEnded, d.final = true, err
	if d.done {
		d.end(endFinal, err)
	}
}

// end tells the node that the plugin is through with the message.
func (d *delivery) end(how uint32, err error) {
	var b []byte
	if err != nil {
		b = appendError(nil, err, 0)
	}
	// If it cannot be told, the node is gone.
	_ = d.s.c.Push(frame.Header{Seq: d.seq, Kind: kindEnd, Options: how}, b)
	if d.told {
		d.s.strike(d)
	}
}

// returned is called with what the handler has returned.
func (d *delivery) returned(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done = true
	if d.deferred {
		err = nil // as the contract of Defer says
	}
	if d.passed {
		d.returnedPassed(err)
	} else {
		d.returnedUnpassed(err)
	}
	if !d.told && !d.reported {
		d.s.strike(d)
	}
}

func (d *delivery) returnedUnpassed(err error) {
	if d.hasEnded && err == nil {
		err = d.final
	}
	switch {
	case err != nil:
		d.verdict(frame.Error, 0, appendError(nil, err, 0))
	case !d.hasEnded && (d.deferred || d.kind == kindDown && d.told):
		d.verdict(frame.Drop, 0, []byte{verdictOpen})
	default:
		d.verdict(frame.Drop, 0)
	}
}

func (d *delivery) returnedPassed(err error) {
	switch {
	case d.hasEnded:
		d.end(endFinal, d.final)
	case err != nil:
		d.end(endHandler, err)
	case d.deferred || d.reported && d.told:
		// finish comes later
	default:
		d.end(endHandler, nil)
	}
}

// The Link of the layer outside of handlers.

// Send implements channel.Link.
func (s *interceptorServer) Send(ctx context.Context, m *channel.Message) error {
	if m.Done == nil {
		return s.inject(ctx, kindForward, m)
	}
	var room [2 * memberRoom]byte
	done := m.Done
	err := s.calls.Go(ctx, func(f frame.Frame, err error) {
		if err == nil && f.Verdict == frame.Error {
			err = decodeError(f.Payload, s.in)
		}
		done.Complete(m, err)
	}, kindForward, uint32(m.Options), appendHead(room[:0], m, messageTold, true), m.Body)
	if err != nil {
		return channel.Failed(m.To, err)
	}
	return nil
}

// Deliver implements channel.Link.
func (s *interceptorServer) Deliver(ctx context.Context, m *channel.Message) error {
	return s.inject(ctx, kindDeliver, m)
}

// inject makes a message of the plugin's own and waits for the result.
func (s *interceptorServer) inject(ctx context.Context, kind uint8, m *channel.Message) error {
	var room [2 * memberRoom]byte
	return s.call(ctx, kind, uint32(m.Options), appendHead(room[:0], m, 0, kind == kindForward), m.Body)
}

// Announce implements channel.Link.
func (s *interceptorServer) Announce(_ context.Context, ev channel.MemberEvent) error {
	b := appendMember(nil, ev.Member)
	if ev.Err != nil {
		b = appendError(b, ev.Err, 0)
	}
	if err := s.conn().Push(frame.Header{Kind: kindAnnounce, Options: uint32(ev.Kind)}, b); err != nil {
		return fmt.Errorf("bridge: announce: %w: %w", channel.ErrClosed, err)
	}
	return nil
}

// View implements channel.Link.
func (s *interceptorServer) View() channel.View { return *s.view.Load() }

// Local implements channel.Link.
func (s *interceptorServer) Local() channel.Member { return *s.local.Load() }

// laneKey is a flow.
type laneKey struct {
	dir  uint8
	from channel.UniqueID
}

// lanes handle frames of one key one after the other, and those of different
// keys at the same time. A goroutine lives as long as its lane has work. What
// they hold is bounded by the window of the node.
type lanes struct {
	handle func(frame.Frame)
	ended  func() bool
	tasks  sync.WaitGroup

	mu   sync.Mutex
	busy map[laneKey]*[]frame.Frame // guarded by mu
}

func (l *lanes) init(handle func(frame.Frame), ended func() bool) {
	l.handle, l.ended, l.busy = handle, ended, map[laneKey]*[]frame.Frame{}
}

func (l *lanes) put(k laneKey, f frame.Frame) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if q := l.busy[k]; q != nil {
		*q = append(*q, f)
		return
	}
	q := &[]frame.Frame{f}
	l.busy[k] = q
	l.tasks.Go(func() { l.work(k, q) })
}

func (l *lanes) work(k laneKey, q *[]frame.Frame) {
	var batch []frame.Frame
	for {
		l.mu.Lock()
		if len(*q) == 0 {
			delete(l.busy, k)
			l.mu.Unlock()
			return
		}
		batch, *q = *q, batch[:0]
		l.mu.Unlock()
		for n := range batch {
			if !l.ended() { // nobody would hear of the result
				l.handle(batch[n])
			}
			batch[n] = frame.Frame{} // handled ones must not stay alive
		}
	}
}

// wait waits for the handlers that run.
func (l *lanes) wait(ctx context.Context) error {
	ended := make(chan struct{})
	go func() { // ends with the handlers
		l.tasks.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("bridge: handlers still running: %w", ctx.Err())
	}
}

func appendTime(b []byte, t time.Time) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(t.UnixNano()))
}

func (d *decoder) time(what string) time.Time {
	b := d.take(8, what)
	if b == nil {
		return time.Time{}
	}
	return time.Unix(0, int64(binary.BigEndian.Uint64(b)))
}
