package core

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// pipeline is an ordered list of valves around a last handler. It is wrapped
// once, when it is built.
type pipeline struct {
	owner   string // for errors
	valves  []Valve
	handler http.Handler
	started int // how many valves have been started; guarded by the engine's life
}

// newPipeline wraps last into the valves; the first listed sees the request
// first.
func newPipeline(owner string, valves []Valve, last http.Handler) (*pipeline, error) {
	h := last
	for i := len(valves) - 1; i >= 0; i-- {
		if valves[i] == nil {
			return nil, fmt.Errorf("core: %s: valve %d is nil", owner, i)
		}
		if h = valves[i].Wrap(h); h == nil {
			return nil, fmt.Errorf("core: %s: valve %d (%T) wrapped its successor into nil", owner, i, valves[i])
		}
	}
	return &pipeline{owner: owner, valves: valves, handler: h}, nil
}

// start starts the valves in their order. If one fails, those before it are
// stopped again.
func (p *pipeline) start(ctx context.Context) error {
	for p.started < len(p.valves) {
		v := p.valves[p.started]
		if s, ok := v.(ValveStarter); ok {
			if err := s.Start(ctx); err != nil {
				err = fmt.Errorf("core: %s: start valve %d (%T): %w", p.owner, p.started, v, err)
				return errors.Join(err, p.stop(ctx))
			}
		}
		p.started++
	}
	return nil
}

// stop stops the started valves in reverse order, all of them whatever fails.
func (p *pipeline) stop(ctx context.Context) error {
	var errs []error
	for ; p.started > 0; p.started-- {
		v := p.valves[p.started-1]
		if s, ok := v.(ValveStopper); ok {
			if err := s.Stop(ctx); err != nil {
				errs = append(errs, fmt.Errorf("core: %s: stop valve %d (%T): %w", p.owner, p.started-1, v, err))
			}
		}
	}
	return errors.Join(errs...)
}
