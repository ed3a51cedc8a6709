package channel

import (
	"context"
	"sync/atomic"
)

// gate counts who is inside, lets nobody in before it is opened or after it is
// closed, and can wait until everybody has left.
type gate struct {
	// inside is the number inside, plus closedBias while the gate is shut.
	inside atomic.Int64
	empty  chan struct{} // capacity 1
}

const closedBias = 1 << 40

func newGate() *gate {
	g := &gate{empty: make(chan struct{}, 1)}
	g.inside.Store(closedBias)
	return g
}

func (g *gate) open() { g.inside.Add(-closedBias) }

// close shuts the gate; it works twice.
func (g *gate) close() {
	for {
		n := g.inside.Load()
		if n >= closedBias || g.inside.CompareAndSwap(n, n+closedBias) {
			return
		}
	}
}

// closed reports whether the gate is shut.
func (g *gate) closed() bool { return g.inside.Load() >= closedBias }

func (g *gate) enter() bool {
	if g.inside.Add(1) > closedBias {
		g.leave()
		return false
	}
	return true
}

func (g *gate) leave() {
	if g.inside.Add(-1) == closedBias {
		select {
		case g.empty <- struct{}{}:
		default:
		}
	}
}

// wait returns when nobody is inside a closed gate, or false when ctx ends
// first.
func (g *gate) wait(ctx context.Context) bool {
	for g.inside.Load() != closedBias {
		select {
		case <-g.empty:
		case <-ctx.Done():
			return false
		}
	}
	return true
}
