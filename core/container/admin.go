package container

import (
	"context"
	"errors"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/admin"
	"github.com/longhouse-go/longhouse/core/attributes"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/session"
)

// SessionReport is what /v1/sessions answers.
type SessionReport struct {
	Tables []TableReport `json:"tables"`
}

// TableReport describes the sessions of one manager on this node.
type TableReport struct {
	// Manager is the instance: "default", a context's name, or "local" for
	// sessions that are not replicated.
	Manager string `json:"manager"`
	// Live is how many sessions this node holds in its table.
	Live int `json:"live"`
	// Status is the manager's; its Sessions count all that it knows.
	Status core.ManagerStatus `json:"status"`
	// Sessions are some of them, as far as asked for.
	Sessions []session.Summary `json:"sessions"`
	// Conflicts are the latest attributes that two nodes changed without seeing
	// each other's change, as far as this node's table or manager met them: after
	// a split at least one node of the group lists each. Disputed is how many the
	// table met, those that the manager met are counted in Status.
	Disputed  int64              `json:"disputed"`
	Conflicts []session.Conflict `json:"conflicts"`
}

// AttributeReport is what /v1/attributes answers.
type AttributeReport struct {
	// Total is how many there are; Attributes are some of them, as far as asked
	// for, sorted by context and name.
	Total      int               `json:"total"`
	Attributes []attributes.Info `json:"attributes"`
}

// StackReport is what /v1/stack answers.
type StackReport struct {
	Layers      []channel.LayerInfo `json:"layers"`
	Fingerprint string              `json:"fingerprint"`
	Explanation string              `json:"explanation"`
	Guarantees  string              `json:"guarantees"`
}

// adminTimeout bounds the questions to plugins that one admin request asks.
const adminTimeout = 2 * time.Second

func (n *Node) adminSources() admin.Sources {
	s := admin.Sources{
		Ready: func() (bool, []string) {
			if err := n.readyError(); errors.Is(err, errDraining) || errors.Is(err, errStopping) {
				return false, []string{err.Error()} // at once
			} else if err != nil {
				ctx, cancel := context.WithTimeout(context.Background(), adminTimeout)
				defer cancel()
				return false, append([]string{err.Error()}, n.notReady(ctx)...)
			}
			return true, nil
		},
		Members:  n.view,
		Stack:    func() any { return n.stackReport() },
		Plugins:  func() []core.PluginStatus { return nil },
		Sessions: func(limit int) any { return n.sessionReport(limit) },
		Attributes: func(limit int) any {
			list, total := n.attributes.List(limit)
			return AttributeReport{Total: total, Attributes: list}
		},
		Config: func() []byte {
			text, err := config.Marshal(n.shown.Load())
			if err != nil {
				return []byte(err.Error())
			}
			return text
		},
		Metrics: n.samples,
		Reload:  n.Reload,
		Drain: func(ctx context.Context) {
			n.beginDrain()
			select {
			case <-n.drain.done:
			case <-ctx.Done(): // the drain goes on
			}
		},
		Drained: func(limit int) any { return n.DrainReport(limit) },
	}
	if n.plugins != nil {
		s.Plugins = n.plugins.Status
	}
	return s
}

// sampler is implemented by plugin hosts that know their plugins' numbers.
type sampler interface {
	Samples(ctx context.Context) []channel.Sample
}

// samples returns the node's own numbers and those of its plugins.
func (n *Node) samples() []channel.Sample {
	all := n.metrics.Samples()
	if s, ok := n.plugins.(sampler); ok {
		ctx, cancel := context.WithTimeout(context.Background(), adminTimeout)
		defer cancel()
		all = append(all, s.Samples(ctx)...)
	}
	return all
}

func (n *Node) view() channel.View {
	if n.cluster == nil {
		return channel.View{}
	}
	return n.cluster.channel.View()
}

func (n *Node) stackReport() StackReport {
	r := StackReport{Guarantees: Guarantees(n.cfg)}
	if n.cluster != nil {
		stack := n.cluster.channel.Stack()
		r.Layers, r.Fingerprint, r.Explanation = stack.Layers(), stack.Fingerprint(), stack.Explain()
	}
	return r
}

func (n *Node) sessionReport(limit int) SessionReport {
	all := []*sessions{}
	if n.cluster != nil {
		all = append(all, n.cluster.sessions...)
	}
	all = append(all, n.local)
	var r SessionReport
	for _, s := range all {
		t := TableReport{Manager: s.name, Live: s.table.Len(), Disputed: s.table.Status().Conflicts, Conflicts: s.table.Conflicts(limit)}
		if s.manager != nil {
			ctx, cancel := context.WithTimeout(context.Background(), adminTimeout)
			var err error
			if t.Status, err = s.manager.Status(ctx); err != nil {
				t.Status.State = err.Error()
			}
			t.Conflicts = session.JoinConflicts(limit, t.Conflicts, t.Status.LatestConflicts)
			t.Status.LatestConflicts = nil // told above
			if limit > 0 {
				t.Sessions, _ = s.manager.Keys(ctx, limit) // the state says why there are none
			}
			cancel()
		} else {
			t.Status = core.ManagerStatus{Ready: true, State: "not replicated", Sessions: t.Live}
			t.Sessions = s.table.List(limit)
		}
		r.Tables = append(r.Tables, t)
	}
	return r
}
