package core_test

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync"
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
	thinks  time.Duration
	asked   int
	commits int
}

func (m *forwarder) Forward(context.Context, []byte, core.Level) (core.Forward, error) {
	m.asked++
	time.Sleep(m.thinks)
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

// What goes the same way as the commit before is sent while the manager is
// asked; if it says something else, that is sent, too.
func TestForwardEarly(t *testing.T) {
	a, b := channel.Member{ID: channel.UniqueID{1}}, channel.Member{ID: channel.UniqueID{2}}
	plan := func(to ...channel.Member) core.Forward {
		return core.Forward{Wait: time.Second, Parcels: []core.Parcel{{To: to, Body: []byte("head "), Batch: true}}}
	}
	for name, tc := range map[string]struct {
		first, then core.Forward
		err         error // of the second call of Forward
		level       core.Level
		silent      bool     // a does not answer the second commit
		sent        []string // by the second commit
		commits     int
		takes       time.Duration // each message takes a second, asking the manager two
	}{
		"the same":       {first: plan(a), then: plan(a), level: core.Synced, sent: []string{"1 head two"}, takes: 2 * time.Second},
		"async":          {first: plan(a), then: plan(a), sent: []string{"1 head two"}, takes: 3 * time.Second},
		"another member": {first: plan(a), then: plan(b), level: core.Synced, sent: []string{"1 head two", "2 head two"}, takes: 3 * time.Second},
		"one more":       {first: plan(a), then: plan(a, b), level: core.Synced, sent: []string{"1 head two", "12 head two"}, takes: 3 * time.Second},
		"nobody":         {first: plan(a), level: core.Synced, sent: []string{"1 head two"}, takes: 2 * time.Second},
		"not the batch": {first: plan(a), then: core.Forward{Wait: time.Second, Parcels: []core.Parcel{{To: []channel.Member{a}, Body: []byte("x")}}},
			level: core.Synced, sent: []string{"1 head two", "1 x"}, takes: 3 * time.Second},
		"refused": {first: plan(a), err: errors.New("full"), level: core.Synced, sent: []string{"1 head two"}, commits: 1, takes: 2 * time.Second},
		"silent":  {first: plan(a), then: plan(a), level: core.Synced, silent: true, sent: []string{"1 head two"}, commits: 1, takes: 2 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := &forwarder{says: tc.first}
			var mu sync.Mutex
			var sent []string
			second := false
			f := core.Forwarding(m, func(ctx context.Context, to []channel.Member, _ channel.Options, body []byte) error {
				text := " " + string(body)
				for i := len(to) - 1; i >= 0; i-- {
					text = strconv.Itoa(int(to[i].ID[0])) + text
				}
				mu.Lock()
				sent = append(sent, text)
				mu.Unlock()
				if second && tc.silent {
					<-ctx.Done()
					return ctx.Err()
				}
				time.Sleep(time.Second - time.Nanosecond) // less than Wait
				if string(body[:1]) == "h" && !strings.HasSuffix(text, string(body)) {
					t.Errorf("%s: the message has changed on its way", name)
				}
				return nil
			})
			if err := f.Commit(t.Context(), []byte("one"), tc.level); err != nil {
				t.Fatal(err)
			}
			sent, second = nil, true
			m.says, m.err, m.thinks = tc.then, tc.err, 2*time.Second
			begin := time.Now()
			batch := []byte("two")
			if err := f.Commit(t.Context(), batch, tc.level); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			took := time.Since(begin).Round(time.Millisecond)
			copy(batch, "xxx") // it is the caller's again
			synctest.Wait()
			slices.Sort(sent)
			if !slices.Equal(sent, tc.sent) || m.commits != tc.commits || took != tc.takes {
				t.Errorf("%s: sent %q, committed %d times, took %v", name, sent, m.commits, took)
			}
		})
	}
}
