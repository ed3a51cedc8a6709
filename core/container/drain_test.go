package container_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/core/container"
	"github.com/longhouse-go/longhouse/core/session"
)

// Drain after Stop begins nothing; a drained node is not ready, and Stop and a
// second Drain return at once.
func TestDrainAndStop(t *testing.T) {
	n := start(t, read(t, single), parts(t))
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := n.Drain(t.Context()); r.State != container.DrainNone {
		t.Errorf("a drain after the stop: %+v", r)
	}

	n = start(t, read(t, single), parts(t))
	first, again := n.Drain(t.Context()), n.Drain(t.Context())
	if first.State != container.Drained || again.State != container.Drained || first.Sessions != 0 {
		t.Errorf("a node without sessions: %+v, %+v", first, again)
	}
	if n.Ready() {
		t.Error("ready after the drain")
	}
	select {
	case <-n.DrainAsked():
	default:
		t.Error("whoever runs the node is not told")
	}
}

// Sessions that are not replicated end with the node, and the report says so.
func TestDrainLocalSessions(t *testing.T) {
	p := parts(t)
	p.Apps[0].New = func(container.AppInfo) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if s, err := session.From(r); err != nil {
				t.Error(err)
			} else {
				_, _ = io.WriteString(w, s.ID())
			}
		})
	}
	n := start(t, read(t, single), p)
	_, id := get(t, n, "/")
	r := n.Drain(t.Context())
	if r.State != container.DrainIncomplete || r.Left != 1 || r.Sessions != 1 || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "not replicated") {
		t.Errorf("%+v", r)
	}
	if list := n.DrainReport(5).List; len(list) != 1 || len(list[0].Holders) != 0 || !strings.HasPrefix(id, strings.TrimSuffix(list[0].Session, "…")) {
		t.Errorf("%+v", list)
	}
}
