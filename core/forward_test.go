package core_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// forwarder is a manager that writes down what it is asked.
type forwarder struct {
	core.Manager
	says    core.Forward
	err     error
	asked   int
	commits int
}

func (m *forwarder) Forward(context.Context, []byte, core.Level) (core.Forward, error) {
	m.asked++
	return m.says, m.err
}

func (m *forwarder) Commit(context.Context, []byte, core.Level) error {
	m.commits++
	return nil
}

func TestForwarding(t *testing.T) {
	a, b := channel.Member{Port: 1}, channel.Member{Port: 2}
	both := core.Forward{Wait: time.Second, Parcels: []core.Parcel{{To: []channel.Member{a}, Body: []byte("a")}, {To: []channel.Member{b}, Body: []byte("b")}}}
	for name, tc := range map[string]struct {
		says    core.Forward
		err     error
		level   core.Level
		silent  channel.Member // does not answer
		sent    []string
		asked   int // by two commits
		commits int
		takes   time.Duration
	}{
		"all answer":      {says: both, level: core.Synced, sent: []string{"a", "a", "b", "b"}, asked: 2},
		"nobody to tell":  {level: core.Synced, asked: 2},
		"one is silent":   {says: both, level: core.Synced, silent: b, sent: []string{"a", "a", "b", "b"}, asked: 2, commits: 2, takes: 2 * time.Second},
		"async":           {says: both, sent: []string{"a", "a", "b", "b"}, asked: 2},
		"no forwarder":    {err: core.ErrNoForward, level: core.Synced, asked: 1, commits: 2},
		"it fails itself": {err: errors.New("full"), level: core.Synced, asked: 2, commits: 2},
	} {
		synctest.Test(t, func(t *testing.T) {
			var sent []string
			posts := make(chan string, 4)
			m := &forwarder{says: tc.says, err: tc.err}
			f := core.Forwarding(m, func(ctx context.Context, to []channel.Member, o channel.Options, body []byte) error {
				if o != tc.level.SendOptions() {
					t.Errorf("%s: sent with %v", name, o)
				}
				posts <- string(body)
				if tc.silent != (channel.Member{}) && slices.Contains(to, tc.silent) {
					<-ctx.Done()
					return channel.Failed(to, ctx.Err())
				}
				return nil
			})
			begin := time.Now()
			for range 2 {
				if err := f.Commit(t.Context(), []byte("batch"), tc.level); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			close(posts)
			for p := range posts {
				sent = append(sent, p)
			}
			slices.Sort(sent)
			if !slices.Equal(sent, tc.sent) || m.asked != tc.asked || m.commits != tc.commits || time.Since(begin) != tc.takes {
				t.Errorf("%s: sent %v, asked %d times, committed %d times, took %v", name, sent, m.asked, m.commits, time.Since(begin))
			}
		})
	}
	if m := struct{ core.Manager }{}; core.Forwarding(m, nil) != core.Manager(m) {
		t.Error("a manager that is no forwarder is wrapped")
	}
}
