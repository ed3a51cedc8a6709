package bench

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/rpc"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/channel/udp"
)

// Node says how the Longhouse node of an agent is made.
type Node struct {
	// Layers are made of this list; nil for none.
	Layers func(channel.Settings) ([]channel.Layer, error)
	Log    *zap.Logger
}

// longhouse is a node of ours.
type longhouse struct {
	ch      *channel.Channel
	members members
	box     inbox
	echoes  echoes
	rpc     *rpc.RPC
}

// members is a membership that is told who is there.
type members struct {
	mu   sync.Mutex
	sink channel.MemberSink
	all  []channel.Member
}

func (m *members) Start(_ context.Context, _ channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sink = sink
	return nil
}

func (m *members) Update(context.Context, channel.Member) error { return nil }
func (m *members) Stop(context.Context) error                   { return nil }

func (m *members) add(x channel.Member) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = append(m.all, x)
	m.sink.Observe(channel.MemberEvent{Kind: channel.MemberAdded, Member: x})
}

// ServeNode runs an agent that is a Longhouse node, until in ends.
func ServeNode(in io.Reader, out io.Writer, n Node) error {
	network, err := stdnet.NewNet()
	if err != nil {
		return err
	}
	s := channel.Settings{Name: "bench", Logger: n.Log, Net: network, Metrics: channel.NewMetrics()}
	var layers []channel.Layer
	if n.Layers != nil {
		if layers, err = n.Layers(s); err != nil {
			return err
		}
	}
	stack, err := channel.NewStack(layers...)
	if err != nil {
		return err
	}
	l := &longhouse{}
	receiver := tcp.DefaultReceiverConfig()
	receiver.Port = 0
	datagrams := udp.DefaultConfig()
	datagrams.Port, datagrams.AutoBind = 20000, 20000
	packets := udp.New(datagrams, s)
	l.ch, err = channel.New(channel.Config{
		Announcement: channel.Announcement{Name: "bench", Pipelined: true},
		Stack:        stack,
		Sender:       packets.Sender(tcp.NewSender(tcp.DefaultSenderConfig(), s)),
		Receiver:     packets.Receiver(tcp.NewReceiver(receiver, s)),
		Membership:   &l.members,
	}, s)
	if err != nil {
		return err
	}
	l.rpc, err = rpc.New(l.ch, "bench", func(_ context.Context, _ channel.Member, body rpc.Body) (rpc.Body, error) {
		l.box.add()
		return body, nil
	}, rpc.DefaultConfig(), s)
	if err != nil {
		return err
	}
	l.ch.Listen(l)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.ch.Start(ctx); err != nil {
		return err
	}
	return serve(in, out, l)
}

func (l *longhouse) record() channel.Member { return l.ch.Local() }

func (l *longhouse) join(m channel.Member) error {
	l.members.add(m)
	return nil
}

func (l *longhouse) received() *inbox { return &l.box }

func (l *longhouse) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_ = l.ch.Stop(ctx)
}

// The first byte of a body says what it is; the senders of requests are told
// apart by the four that follow.
const (
	bodyData = iota
	bodyRequest
	bodyReply
	echoHead = 5
)

// Handle implements channel.Listener.
func (l *longhouse) Handle(ctx context.Context, m *channel.Message) (bool, error) {
	l.box.add()
	if len(m.Body) < echoHead {
		return true, nil
	}
	switch m.Body[0] {
	case bodyRequest:
		m.Body[0] = bodyReply
		return true, l.ch.Send(ctx, []channel.Member{m.From}, m.Body, channel.SendNone)
	case bodyReply:
		l.echoes.done(binary.BigEndian.Uint32(m.Body[1:]))
	}
	return true, nil
}

// echoes are the requests on their way, at most one of each sender.
type echoes struct {
	last    atomic.Uint32
	waiting sync.Map // uint32 to chan struct{}
}

func (e *echoes) done(id uint32) {
	if c, ok := e.waiting.Load(id); ok {
		select {
		case c.(chan struct{}) <- struct{}{}:
		default:
		}
	}
}

// replyTimeout is how long a request waits.
const replyTimeout = 10 * time.Second

func (l *longhouse) sender(option string, size int) (func() error, func(), error) {
	options := map[string]channel.Options{
		"none": channel.SendNone, "async": channel.SendAsync, "ack": channel.SendAck, "sync-ack": channel.SendSyncAck,
		"udp": channel.SendNone | channel.UDP, "echo": channel.SendNone, "rpc": 0,
	}
	o, ok := options[option]
	if !ok {
		return nil, nil, fmt.Errorf("%s: %w", option, errOption)
	}
	ctx := context.Background()
	to, body := l.members.all, make([]byte, size)
	if option == "rpc" {
		return func() error {
			_, err := l.rpc.Call(ctx, to[:1], rpc.Bytes(body), rpc.First, 0)
			return err
		}, func() {}, nil
	}
	send := func() error { return l.ch.Send(ctx, to, body, o) }
	if option != "echo" {
		return send, func() {}, nil
	}
	if size < echoHead {
		return nil, nil, fmt.Errorf("echo: a message must have %d bytes", echoHead)
	}
	to = to[:1]
	id, reply := l.echoes.last.Add(1), make(chan struct{}, 1)
	body[0] = bodyRequest
	binary.BigEndian.PutUint32(body[1:], id)
	l.echoes.waiting.Store(id, reply)
	patience := time.NewTimer(replyTimeout)
	return func() error {
		patience.Reset(replyTimeout)
		if err := send(); err != nil {
			return err
		}
		select {
		case <-reply:
			return nil
		case <-patience.C:
			return context.DeadlineExceeded
		}
	}, func() { l.echoes.waiting.Delete(id); patience.Stop() }, nil
}
