package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// Server serves one component to a node over one connection.
type Server interface {
	// Done is closed when the connection has ended.
	Done() <-chan struct{}
	// Close ends the connection, stops the component as far as ctx allows,
	// and returns when nothing of the server runs any more.
	Close(ctx context.Context) error
}

// component is what all kinds have in common.
type component interface {
	Stop(ctx context.Context) error
}

// Serve serves a component on rw: a core.Manager, a channel.Membership, a
// core.Deployer or a channel.Interceptor.
func Serve(rw io.ReadWriteCloser, impl any, cfg frame.Config, log *zap.Logger) (Server, error) {
	switch impl := impl.(type) {
	case core.Manager:
		s := &managerServer{server: newServer(impl, log), impl: impl}
		s.run(rw, s, s.serve, cfg)
		return s, nil
	case channel.Membership:
		s := &membershipServer{server: newServer(impl, log), impl: impl}
		s.run(rw, s, s.serve, cfg)
		return s, nil
	case core.Deployer:
		s := &deployerServer{server: newServer(impl, log), impl: impl}
		s.run(rw, s, nil, cfg)
		return s, nil
	case channel.Interceptor:
		return serveInterceptor(rw, impl, cfg, log), nil
	}
	return nil, fmt.Errorf("bridge: a %T cannot be served: it is no manager, membership, deployer or interceptor", impl)
}

// server is what the servers of all kinds share.
type server struct {
	component component
	log       *zap.Logger
	in        *interner
	calls     *frame.Calls
	lane      lane
	// ready is closed when c is set: frames arrive before NewConn returns.
	ready chan struct{}
	c     *frame.Conn
	lanes sync.WaitGroup
}

func newServer(c component, log *zap.Logger) server {
	return server{
		component: c, log: log, in: newInterner(),
		calls: frame.NewCalls(frame.CallsConfig{}),
		lane:  lane{wake: make(chan struct{}, 1)},
		ready: make(chan struct{}),
	}
}

func (s *server) run(rw io.ReadWriteCloser, h frame.Handler, serve func(context.Context, *frame.Request), cfg frame.Config) {
	// The node is trusted: its window is its own business.
	cfg.MaxInbound, cfg.MaxInboundBytes = 1<<20, 1<<30
	s.c = frame.NewConn(rw, s.calls, h, cfg)
	s.calls.Attach(s.c)
	if serve != nil {
		s.lanes.Go(func() { s.lane.run(s.c, serve) })
	}
	close(s.ready)
}

func (s *server) conn() *frame.Conn {
	<-s.ready
	return s.c
}

// HandleEvent implements frame.Handler: nodes send no events in this version.
func (s *server) HandleEvent(frame.Frame) error { return nil }

// Done implements Server.
func (s *server) Done() <-chan struct{} { return s.c.Done() }

// Close implements Server.
func (s *server) Close(ctx context.Context) error {
	s.calls.Fail(channel.ErrClosed)
	s.c.Close(frame.ErrClosed)
	s.c.Wait()
	s.lanes.Wait()
	return errors.Join(s.component.Stop(ctx), s.c.WaitHandlers(ctx))
}

// stopGrace bounds a Stop whose caller set no limit.
const stopGrace = 30 * time.Second

func (s *server) stop(r *frame.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), stopGrace)
	defer cancel()
	answer(r, s.component.Stop(ctx))
}

// call makes a call to the node that has no result.
func (s *server) call(ctx context.Context, kind uint8, options uint32, parts ...[]byte) error {
	f, err := s.calls.Call(ctx, kind, options, parts...)
	if err == nil && f.Verdict == frame.Error {
		err = decodeError(f.Payload, s.in)
	}
	return err
}

// lane handles requests one at a time and in order. It is bounded by what the
// other side may have unanswered.
type lane struct {
	wake chan struct{}

	mu    sync.Mutex
	queue []*frame.Request // guarded by mu
}

func (l *lane) put(r *frame.Request) {
	l.mu.Lock()
	l.queue = append(l.queue, r)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run handles requests until the connection ends.
func (l *lane) run(c *frame.Conn, serve func(context.Context, *frame.Request)) {
	var spare []*frame.Request
	for {
		select {
		case <-l.wake:
		case <-c.Done():
			return
		}
		l.mu.Lock()
		batch := l.queue
		l.queue = spare[:0]
		l.mu.Unlock()
		for i, r := range batch {
			serve(c.Context(), r)
			batch[i] = nil // served requests must not stay alive with the slice
		}
		spare = batch
	}
}
