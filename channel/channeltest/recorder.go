package channeltest

import (
	"bytes"
	"context"
	"sync"

	"github.com/longhouse-go/longhouse/channel"
)

// Result is what a Completion was told.
type Result struct {
	ID  channel.UniqueID
	Err error
}

// ViewChange is what a watcher was told.
type ViewChange struct {
	View  channel.View
	Event channel.MemberEvent
}

// Recorder notes everything it is told, in order. Its zero value is ready. It
// is a [channel.Listener], a [channel.Completion] and a [channel.MemberSink],
// and its Watch method can be given to Channel.Watch. All methods may be called
// from any goroutine.
type Recorder struct {
	// Reply, if set, decides what Handle returns, after the message has been
	// noted. Set it before use.
	Reply func(m *channel.Message) (handled bool, err error)

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at every change
	messages []channel.Message
	results  []Result
	events   []channel.MemberEvent
	views    []ViewChange
}

// Clone returns a copy of m that shares nothing with it, for keeping.
func Clone(m *channel.Message) channel.Message {
	c := *m
	c.Body = bytes.Clone(m.Body)
	c.To = append([]channel.Member(nil), m.To...)
	c.Done, c.Later = nil, nil
	return c
}

func (r *Recorder) note(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// Handle implements channel.Listener: it takes every message unless Reply says
// otherwise.
func (r *Recorder) Handle(_ context.Context, m *channel.Message) (bool, error) {
	c := Clone(m)
	r.note(func() { r.messages = append(r.messages, c) })
	if r.Reply != nil {
		return r.Reply(m)
	}
	return true, nil
}

// Complete implements channel.Completion.
func (r *Recorder) Complete(m *channel.Message, err error) {
	id := m.ID
	r.note(func() { r.results = append(r.results, Result{id, err}) })
}

// Observe implements channel.MemberSink.
func (r *Recorder) Observe(ev channel.MemberEvent) {
	r.note(func() { r.events = append(r.events, ev) })
}

// Watch notes a change of the view; the first call, with the zero event, too.
func (r *Recorder) Watch(v channel.View, ev channel.MemberEvent) {
	r.note(func() { r.views = append(r.views, ViewChange{v, ev}) })
}

// Messages returns the messages so far.
func (r *Recorder) Messages() []channel.Message { return list(r, &r.messages) }

// Results returns the completions so far.
func (r *Recorder) Results() []Result { return list(r, &r.results) }

// Events returns the observed member events so far.
func (r *Recorder) Events() []channel.MemberEvent { return list(r, &r.events) }

// Views returns the watched changes so far.
func (r *Recorder) Views() []ViewChange { return list(r, &r.views) }

// Bodies returns the bodies of the messages so far, as text.
func (r *Recorder) Bodies() []string {
	var out []string
	for _, m := range r.Messages() {
		out = append(out, string(m.Body))
	}
	return out
}

func list[T any](r *Recorder, s *[]T) []T {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]T(nil), *s...)
}

// WaitFor blocks until cond holds, looking again after everything the recorder
// is told, or until ctx ends; it reports whether cond holds. cond may use the
// recorder.
func (r *Recorder) WaitFor(ctx context.Context, cond func() bool) bool {
	for {
		r.mu.Lock()
		if r.changed == nil {
			r.changed = make(chan struct{})
		}
		changed := r.changed
		r.mu.Unlock()
		if cond() {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}
