package core

import (
	"context"
	"fmt"
	"sync"

	"github.com/longhouse-go/longhouse/channel"
)

// Cluster lets several components of a node share one channel: each has a
// subject, and gets the messages that its namesakes on other nodes send.
//
// On the wire a message body is a CBOR sequence (RFC 8742): the subject as a
// text string, followed by the component's own bytes.
type Cluster struct {
	ch       *channel.Channel
	strays   *channel.Counter
	unlisten func()

	mu       sync.RWMutex
	subjects map[string]SubjectHandler
}

// SubjectHandler takes a message for one subject. body is m.Body without the
// subject; the rules of [channel.ReceiveHandler] apply to both.
type SubjectHandler func(ctx context.Context, m *channel.Message, body []byte) error

// MaxSubject bounds the length of a subject, in bytes.
const MaxSubject = 255

// NewCluster starts to share ch, before ch is started. Messages with a subject
// that nobody here handles are counted and dropped.
func NewCluster(ch *channel.Channel, s channel.Settings) *Cluster {
	c := &Cluster{
		ch:       ch,
		strays:   s.Metrics.Counter("cluster_unknown_subject_total", "Cluster messages for a component this node does not have."),
		subjects: map[string]SubjectHandler{},
	}
	c.unlisten = ch.Listen(c)
	return c
}

// Close stops listening; it does not stop the channel.
func (c *Cluster) Close() { c.unlisten() }

// Channel returns the shared channel.
func (c *Cluster) Channel() *channel.Channel { return c.ch }

// Bind registers the handler of a subject until cancel is called. A subject has
// one handler.
func (c *Cluster) Bind(subject string, h SubjectHandler) (cancel func(), err error) {
	if subject == "" || len(subject) > MaxSubject {
		return nil, fmt.Errorf("core: cluster subject %q must have 1 to %d bytes", subject, MaxSubject)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, taken := c.subjects[subject]; taken {
		return nil, fmt.Errorf("core: cluster subject %q is handled already", subject)
	}
	c.subjects[subject] = h
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.subjects, subject)
	}, nil
}

// Handle takes a message from the channel; see [channel.Listener].
func (c *Cluster) Handle(ctx context.Context, m *channel.Message) (bool, error) {
	subject, body, ok := splitSubject(m.Body)
	if !ok {
		return false, nil
	}
	c.mu.RLock()
	h := c.subjects[string(subject)] // does not allocate
	c.mu.RUnlock()
	if h == nil {
		c.strays.Inc()
		return true, nil
	}
	return true, h(ctx, m, body)
}

var bodies = sync.Pool{New: func() any { return new([]byte) }}

// maxPooledBody keeps rare huge messages from staying in the pool, in bytes.
const maxPooledBody = 1 << 20

// Send sends body to the same subject on the members of to; see
// [channel.Channel.Send]. body may be reused when Send has returned.
func (c *Cluster) Send(ctx context.Context, subject string, to []channel.Member, o channel.Options, body []byte) error {
	buf := bodies.Get().(*[]byte)
	defer func() {
		if cap(*buf) <= maxPooledBody {
			bodies.Put(buf)
		}
	}()
	*buf = append(appendSubject((*buf)[:0], subject), body...)
	return c.ch.Send(ctx, to, *buf, o)
}

// CBOR major type 3 (text string) in the first byte, RFC 8949 §3.1.
const (
	textString  = 0x60
	textOneByte = 0x78
	shortText   = 24
)

func appendSubject(dst []byte, subject string) []byte {
	if len(subject) < shortText {
		dst = append(dst, textString|byte(len(subject)))
	} else {
		dst = append(dst, textOneByte, byte(len(subject)))
	}
	return append(dst, subject...)
}

func splitSubject(b []byte) (subject, body []byte, ok bool) {
	if len(b) == 0 {
		return nil, nil, false
	}
	n, head := 0, 1
	switch {
	case b[0]&0xe0 == textString && b[0] < textString+shortText:
		n = int(b[0] - textString)
	case b[0] == textOneByte && len(b) >= 2:
		n, head = int(b[1]), 2
	}
	if n == 0 || n > MaxSubject || len(b) < head+n {
		return nil, nil, false
	}
	return b[head : head+n], b[head+n:], true
}
