package bridge

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

// Lifecycle runs the generations of one plugin instance, one after the other.
type Lifecycle interface {
	// Start brings up the first generation; it returns when c.Begin has.
	Start(ctx context.Context, c Client) error
	// Stop ends the instance, having called c.End if a generation is up. It
	// works twice and without Start.
	Stop(ctx context.Context) error
	// Calls are the calls to the plugin that outlive a generation.
	Calls() *frame.Calls
	// Count counts an event of the plugin.
	Count()
}

// Client is the node's side of one plugin instance, told of each generation.
type Client interface {
	frame.Handler
	// Begin starts the component of a new generation, numbered from 1, and
	// opens conn for calls.
	Begin(ctx context.Context, conn *frame.Conn, generation int) error
	// End stops the component.
	End(ctx context.Context, conn *frame.Conn) error
}

// client is what the clients of all kinds share.
type client struct {
	name  string // "manager/delta", for errors
	life  Lifecycle
	calls *frame.Calls
	log   *zap.Logger
	in    *interner
}

func newClient(name string, life Lifecycle, log *zap.Logger) client {
	return client{name: name, life: life, calls: life.Calls(), log: log, in: newInterner()}
}

// Stop ends the plugin.
func (c *client) Stop(ctx context.Context) error { return c.life.Stop(ctx) }

// End asks the component to stop.
func (c *client) End(ctx context.Context, conn *frame.Conn) error {
	_, err := c.outcome(c.calls.CallOn(ctx, conn, kindStop, 0))
	return err
}

// outcome turns an answer into the result of a method: the payload, nil if
// there is none.
func (c *client) outcome(f frame.Frame, err error) ([]byte, error) {
	switch {
	case err != nil:
		return nil, fmt.Errorf("plugin %s: %w", c.name, err)
	case f.Verdict == frame.Error:
		return nil, fmt.Errorf("plugin %s: %w", c.name, decodeError(f.Payload, c.in))
	case f.Verdict == frame.Replace:
		return f.Payload, nil
	}
	return nil, nil
}

// decode unpacks a CBOR result.
func (c *client) decode(payload []byte, into any) error {
	if err := decMode.Unmarshal(payload, into); err != nil {
		return fmt.Errorf("plugin %s: decode its answer: %w", c.name, err)
	}
	return nil
}

// start makes the call that starts the component on a new connection.
func (c *client) start(ctx context.Context, conn *frame.Conn, parts ...[]byte) error {
	_, err := c.outcome(c.calls.CallOn(ctx, conn, kindStart, 0, parts...))
	return err
}

// answer ends a request with the result of a method.
func answer(r *frame.Request, err error) {
	if err == nil {
		// The reply is empty: it always fits.
		_ = r.Reply(frame.Pass, 0)
		return
	}
	// Bounded by the bounds of errors: it always fits, unless thousands of
	// members failed with long texts, and then the first is said.
	if tooLong := r.Reply(frame.Error, 0, appendError(nil, err, 0)); tooLong != nil {
		_ = r.Reply(frame.Error, 0, appendError(nil, err, maxErrorDepth))
	}
}

// answerWith ends a request with a result.
func answerWith(r *frame.Request, v any, err error) {
	if err != nil {
		answer(r, err)
		return
	}
	b, err := encMode.Marshal(v)
	if err == nil {
		err = r.Reply(frame.Replace, 0, b)
	}
	if err != nil {
		answer(r, err)
	}
}

func refuse(r *frame.Request) {
	answer(r, fmt.Errorf("bridge: call %d is not for this side or not known to this version", r.Kind))
}
