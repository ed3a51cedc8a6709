package bridge

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// Deployer is the client of a deployer plugin; it implements core.Deployer.
type Deployer struct {
	client
	host core.DeployerHost // set by Start
	// turn holds a token while no call of host is running: a call of a dead
	// generation may still be, when its successor asks again.
	turn chan struct{}
}

// NewDeployer returns the client of the plugin behind life.
func NewDeployer(name string, life Lifecycle, log *zap.Logger) *Deployer {
	d := &Deployer{client: newClient("deployer/"+name, life, log), turn: make(chan struct{}, 1)}
	d.turn <- struct{}{}
	return d
}

// Start implements core.Deployer.
func (d *Deployer) Start(ctx context.Context, host core.DeployerHost) error {
	d.host = host
	return d.life.Start(ctx, d)
}

// Begin implements Client.
func (d *Deployer) Begin(ctx context.Context, conn *frame.Conn, _ int) error {
	if err := d.start(ctx, conn); err != nil {
		return err
	}
	d.calls.Attach(conn)
	return nil
}

// Status implements core.Deployer.
func (d *Deployer) Status(ctx context.Context) (list []core.Deployment, err error) {
	b, err := d.outcome(d.calls.Call(ctx, kindStatus, 0))
	if err == nil {
		err = d.decode(b, &list)
	}
	return list, err
}

// place is a context of a virtual host.
type place struct {
	Host string `cbor:"1,keyasint"`
	Path string `cbor:"2,keyasint"`
}

// HandleCall implements frame.Handler.
func (d *Deployer) HandleCall(r *frame.Request) {
	d.life.Count()
	switch r.Kind {
	case kindApply:
		var b core.Bundle
		d.oneAtATime(r, &b, func(ctx context.Context) error { return d.host.Apply(ctx, b) })
	case kindRemove:
		var p place
		d.oneAtATime(r, &p, func(ctx context.Context) error { return d.host.Remove(ctx, p.Host, p.Path) })
	default:
		refuse(r)
	}
}

func (d *Deployer) oneAtATime(r *frame.Request, into any, call func(context.Context) error) {
	if err := decMode.Unmarshal(r.Payload, into); err != nil {
		answer(r, fmt.Errorf("bridge: decode call %d: %w", r.Kind, err))
		return
	}
	r.Go(func(r *frame.Request) {
		select {
		case <-d.turn:
		case <-r.Context().Done():
			answer(r, r.Context().Err())
			return
		}
		err := call(r.Context())
		d.turn <- struct{}{}
		answer(r, err)
	})
}

// HandleEvent implements frame.Handler: a deployer has no events.
func (d *Deployer) HandleEvent(frame.Frame) error { return nil }

// deployerServer serves a core.Deployer to a node.
type deployerServer struct {
	server
	impl core.Deployer
}

// HandleCall implements frame.Handler.
func (s *deployerServer) HandleCall(r *frame.Request) {
	switch r.Kind {
	case kindStart:
		r.Go(func(r *frame.Request) { answer(r, s.impl.Start(r.Context(), s)) })
	case kindStop:
		r.Go(s.stop)
	case kindStatus:
		r.Go(func(r *frame.Request) {
			v, err := s.impl.Status(r.Context())
			answerWith(r, v, err)
		})
	default:
		refuse(r)
	}
}

// Apply implements core.DeployerHost.
func (s *deployerServer) Apply(ctx context.Context, b core.Bundle) error {
	return s.callWith(ctx, kindApply, b)
}

// Remove implements core.DeployerHost.
func (s *deployerServer) Remove(ctx context.Context, host, path string) error {
	return s.callWith(ctx, kindRemove, place{host, path})
}

func (s *deployerServer) callWith(ctx context.Context, kind uint8, v any) error {
	b, err := encMode.Marshal(v)
	if err != nil {
		return fmt.Errorf("bridge: encode call %d: %w", kind, err)
	}
	return s.call(ctx, kind, 0, b)
}
