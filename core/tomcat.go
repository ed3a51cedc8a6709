package core

import (
	"bytes"
	"context"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

const (
	// maxStateRequest bounds the message of a Tomcat that asks for sessions, in
	// bytes; it has some hundred.
	maxStateRequest = 8 << 10
	// maxStateAnswers bounds the answers that are being sent.
	maxStateAnswers = 64
	// stateAnswerTimeout bounds the sending of one.
	stateAnswerTimeout = 10 * time.Second
)

// javaObject is how a Java object stream begins that has an object first.
var javaObject = []byte{0xac, 0xed, 0x00, 0x05, 's'}

// tomcatAnswerer is the listener of AnswerTomcat.
type tomcatAnswerer struct {
	ch      *channel.Channel
	log     *zap.Logger
	asked   *channel.Counter
	life    context.Context
	end     context.CancelFunc
	slots   chan struct{}
	mu      sync.Mutex
	stopped bool // guarded by mu, with the beginning of wg
	wg      sync.WaitGroup
}

// AnswerTomcat answers Tomcat nodes of the group that ask this node for their
// sessions, as a DeltaManager does when it starts and this node is the oldest
// member: it has no such manager. Without the answer the Tomcat would wait for 60
// seconds, and its application with it. It is called before ch is started; stop
// ends it.
func AnswerTomcat(ch *channel.Channel, s channel.Settings) (stop func()) {
	a := newTomcatAnswerer(ch, s)
	unlisten := ch.Listen(a)
	return func() {
		unlisten()
		a.stop()
	}
}

func newTomcatAnswerer(ch *channel.Channel, s channel.Settings) *tomcatAnswerer {
	a := &tomcatAnswerer{
		ch: ch, log: s.Logger, slots: make(chan struct{}, maxStateAnswers),
		asked: s.Metrics.Counter("tomcat_state_requests_total", "Requests by Tomcat nodes for the sessions of their managers, which were told that this node has none."),
	}
	if a.log == nil {
		a.log = zap.NewNop()
	}
	a.life, a.end = context.WithCancel(context.Background())
	return a
}

func (a *tomcatAnswerer) stop() {
	a.mu.Lock()
	a.stopped = true
	a.mu.Unlock()
	a.end()
	a.wg.Wait()
}

// Handle implements channel.Listener. It takes nothing else than such requests.
func (a *tomcatAnswerer) Handle(_ context.Context, m *channel.Message) (bool, error) {
	if m.Options.Has(channel.ByteMessage) || len(m.Body) > maxStateRequest || !bytes.HasPrefix(m.Body, javaObject) {
		return false, nil
	}
	v, err := jser.Decode(m.Body, jser.Limits{})
	if err != nil {
		return false, nil // it is for somebody else
	}
	msg, ok := v.(*jser.SessionMessage)
	if !ok || msg.Event != jser.SessionGetAll {
		return false, nil
	}
	a.asked.Inc()
	select {
	case a.slots <- struct{}{}:
	default: // flooded; the others wait as they would without us
		return true, nil
	}
	text := "NO-CONTEXT-MANAGER"
	id := text
	if msg.Context != nil {
		id += "-" + *msg.Context
	}
	body, err := jser.Encode(&jser.SessionMessage{Event: jser.SessionNoContextManager, Context: msg.Context, SessionID: &text, UniqueID: &id})
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil || a.stopped {
		<-a.slots
		return true, err
	}
	from := m.From
	a.wg.Go(func() { // ends within stateAnswerTimeout
		defer func() { <-a.slots }()
		ctx, cancel := context.WithTimeout(a.life, stateAnswerTimeout)
		defer cancel()
		if err := a.ch.Send(ctx, []channel.Member{from}, body, channel.ObjectStream|channel.UseAck); err != nil {
			a.log.Warn("a Tomcat node that asks for its sessions could not be told that there are none here", zap.Stringer("member", from), zap.Error(err))
			return
		}
		a.log.Info("a Tomcat node asked for its sessions, and was told that there are none here", zap.Stringer("member", from))
	})
	return true, nil
}
