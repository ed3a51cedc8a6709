package peer_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance/peer"
	"github.com/longhouse-go/longhouse/interceptors/coordinator"
)

// voter is a node that takes part in elections.
type voter interface {
	id() string
	leave(t *testing.T)
	// elected returns the coordinator and the ids of the view it was elected
	// in, sorted.
	elected(t *testing.T) (coordinator string, view []string)
}

type ourVoter struct {
	*longhouse
	c *coordinator.Interceptor
}

func (v ourVoter) leave(*testing.T) { v.stop() }

func (v ourVoter) elected(*testing.T) (string, []string) {
	var view []string
	s := v.c.State()
	for _, m := range s.View {
		view = append(view, m.ID.String())
	}
	slices.Sort(view)
	return s.Coordinator.ID.String(), view
}

type theirVoter struct{ *peer.Node }

func (v theirVoter) id() string { return v.ID() }

func (v theirVoter) leave(t *testing.T) {
	if err := v.Close(within(t)); err != nil {
		t.Error(err)
	}
}

func (v theirVoter) elected(t *testing.T) (string, []string) {
	r, err := v.Call(within(t), "election")
	if err != nil {
		t.Fatal(err)
	}
	view := strings.Split(r.Get("view"), ",")
	slices.Sort(view)
	return r.Get("coordinator"), view
}

// Nodes of both kinds elect one coordinator, and another one whenever it goes,
// whichever kind it is.
func testElection(t *testing.T, j *peer.JVM) {
	for _, kinds := range []string{"OTOT", "TOTO", "OOTT", "TTOO"} {
		t.Run(kinds, func(t *testing.T) {
			g := newGroup(t, j)
			ports := make([]int, len(kinds))
			for i := range ports {
				ports[i] = channeltest.FreePort(t, "tcp")
			}
			slices.Sort(ports) // they decide who is first
			var all []voter
			for i, kind := range kinds {
				if kind == 'T' {
					all = append(all, theirVoter{g.tribes(func(c *peer.Config) {
						c.Port, c.Stack = ports[i], []string{"coordinator", "detector"}
					})})
					continue
				}
				d := coordinator.Defaults
				d.Timeout, d.SendTimeout = 15*time.Second, 15*time.Second
				e, err := coordinator.New(d, channel.Settings{})
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, ourVoter{g.longhouse(func(c *nodeConfig) {
					c.port, c.top = ports[i], []channel.Interceptor{e}
					c.stack = []string{ourDetector}
				}), e})
			}
			for len(all) > 1 {
				agreed(t, j, all)
				all[0].leave(t) // the coordinator
				all = all[1:]
			}
			agreed(t, j, all) // alone
		})
	}
}

// agreed waits until all have elected the first one, in a view of all of them.
func agreed(t *testing.T, j *peer.JVM, all []voter) {
	t.Helper()
	var ids []string
	for _, v := range all {
		ids = append(ids, v.id())
	}
	first := ids[0]
	slices.Sort(ids)
	var state string
	defer func() {
		if t.Failed() {
			t.Log(state)
		}
	}()
	poll(t, j, fmt.Sprintf("%d nodes agree on %s", len(all), first), func() bool {
		state = ""
		ok := true
		for _, v := range all {
			c, view := v.elected(t)
			state += fmt.Sprintf("%s: coordinator %s, view %v\n", v.id(), c, view)
			ok = ok && c == first && slices.Equal(view, ids)
		}
		return ok
	})
}
