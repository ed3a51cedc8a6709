// Package history checks what clients of a cluster have seen. A [Recorder] keeps
// what each of them asked and was answered, and when; [Check] tells whether that
// could have happened one after the other on a single node. It uses
// anishathalye/porcupine for that.
//
// The package imports porcupine and nothing of Longhouse; its tests run whole
// simulated clusters.
package history

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// Kind says what a client asked for.
type Kind uint8

const (
	// Read reads a register.
	Read Kind = iota
	// Swap reads a register and then writes it, in one request.
	Swap
	// Write writes a register without looking.
	Write
	// Add adds one to a register, a decimal number that begins as nothing for 0:
	// New is the sum that it answered.
	Add
)

// Op is one request to a register, an attribute of a session.
type Op struct {
	Client   int
	Kind     Kind
	Register string
	// New is what it wrote, different for each Swap and Write; Old is what it
	// read.
	New, Old string
	// Unknown: there was no answer, or one that does not say whether the change
	// was made. It may take effect at any later time, or never.
	Unknown      bool
	Call, Return time.Duration // since any fixed time
}

// String describes the request for people.
func (o Op) String() string {
	var what string
	switch o.Kind {
	case Read:
		what = fmt.Sprintf("read %q", o.Old)
	case Swap:
		what = fmt.Sprintf("read %q and wrote %q", o.Old, o.New)
	case Write:
		what = fmt.Sprintf("wrote %q", o.New)
	case Add:
		what = fmt.Sprintf("added one, which made %q", o.New)
	}
	if o.Unknown {
		what = fmt.Sprintf("maybe wrote %q", o.New)
		if o.Kind == Add {
			what = "maybe added one"
		}
	}
	return fmt.Sprintf("%8.3fs to %8.3fs client %d, %s: %s", o.Call.Seconds(), o.Return.Seconds(), o.Client, o.Register, what)
}

// Recorder collects requests. Its methods may be called concurrently.
type Recorder struct {
	mu  sync.Mutex
	ops []Op
}

// Add records a request that has ended.
func (r *Recorder) Add(o Op) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, o)
}

// Ops returns the requests by the time of their call.
func (r *Recorder) Ops() []Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	ops := slices.Clone(r.ops)
	slices.SortStableFunc(ops, func(a, b Op) int { return int(a.Call - b.Call) })
	return ops
}

// model is a set of registers, each of which begins empty.
var model = porcupine.Model{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		by := map[string]int{}
		var parts [][]porcupine.Operation
		for _, o := range all {
			name := o.Input.(Op).Register
			i, known := by[name]
			if !known {
				i = len(parts)
				by[name] = i
				parts = append(parts, nil)
			}
			parts[i] = append(parts[i], o)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		o := input.(Op)
		switch {
		case o.Kind == Read:
			return o.Old == state, state
		case o.Kind == Swap && !o.Unknown && o.Old != state:
			return false, state
		case o.Kind == Add:
			n, _ := strconv.Atoi(state.(string)) // nothing is 0
			sum := strconv.Itoa(n + 1)
			return o.New == sum || o.New == "", sum
		}
		return true, o.New
	},
	DescribeOperation: func(input, _ any) string { return input.(Op).String() },
}

// settled tells which of the Adds without an answer took effect: as many as there
// are sums that nobody was answered, those first that were asked for first, because
// any may take effect late, but none early. The others did not, or later than all
// that was seen. Otherwise a checker would have to try every subset of them.
func settled(ops []Op) (list []Op) {
	type counter struct {
		answered map[int]bool
		last     int
		unknown  []Op
	}
	counters := map[string]*counter{}
	for _, o := range ops {
		c := counters[o.Register]
		if c == nil {
			c = &counter{answered: map[int]bool{}}
			counters[o.Register] = c
		}
		if o.Unknown {
			if o.Kind == Add {
				c.unknown = append(c.unknown, o)
				continue
			}
		} else if n, err := strconv.Atoi(o.Old + o.New); err == nil && (o.Kind == Read || o.Kind == Add) {
			c.last = max(c.last, n)
			c.answered[n] = c.answered[n] || o.Kind == Add
		}
		list = append(list, o)
	}
	for _, c := range counters {
		slices.SortStableFunc(c.unknown, func(a, b Op) int { return cmp.Compare(a.Call, b.Call) })
		for n := 1; n <= c.last && len(c.unknown) > 0; n++ {
			if !c.answered[n] {
				c.unknown[0].New = strconv.Itoa(n)
				list = append(list, c.unknown[0])
				c.unknown = c.unknown[1:]
			}
		}
	}
	return list
}

// ErrUndecided is in the error of a history that was too long to be checked in
// time.
var ErrUndecided = fmt.Errorf("history: not decided in time")

// Check returns nil if the history is linearizable: each request took effect at
// one moment between its call and its return. The error describes the requests
// to the registers for which that cannot be.
func Check(ops []Op, within time.Duration) error {
	var list []porcupine.Operation
	for _, o := range settled(ops) {
		end := int64(o.Return)
		if o.Unknown {
			if o.Kind == Read {
				continue
			}
			end = math.MaxInt64
		}
		list = append(list, porcupine.Operation{ClientId: o.Client, Input: o, Call: int64(o.Call), Return: end})
	}
	var bad []string
	for _, part := range model.Partition(list) {
		switch porcupine.CheckOperationsTimeout(model, part, within) {
		case porcupine.Unknown:
			return fmt.Errorf("%w: %d requests to %s", ErrUndecided, len(part), part[0].Input.(Op).Register)
		case porcupine.Illegal:
			for _, o := range part {
				bad = append(bad, o.Input.(Op).String())
			}
		}
	}
	if len(bad) > 0 {
		return fmt.Errorf("history: not linearizable:\n%s", strings.Join(bad, "\n"))
	}
	return nil
}
