package tcp

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pion/transport/v2"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// realNet returns the network of this machine.
func realNet(t testing.TB) transport.Net {
	t.Helper()
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

type handler func(context.Context, *channel.Message) error

// node is a receiver with what its peers know of it.
type node struct {
	*Receiver
	member  channel.Member
	metrics *channel.Metrics
}

// receive starts a receiver on any port of host; pipelined is what its member
// record says.
func receive(t testing.TB, n transport.Net, host string, pipelined bool, h handler, change ...func(*ReceiverConfig)) *node {
	t.Helper()
	c := DefaultReceiverConfig()
	c.Address, c.Port = host, 0
	for _, f := range change {
		f(&c)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	met := channel.NewMetrics()
	r := NewReceiver(c, channel.Settings{Net: n, Metrics: met})
	addr, err := r.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, r) })
	return &node{r, memberAt(addr, pipelined), met}
}

func memberAt(addr netip.AddrPort, pipelined bool) channel.Member {
	m := channel.Member{ID: channel.NewUniqueID(), Host: addr.Addr(), Port: int(addr.Port()), SecurePort: -1, UDPPort: -1}
	if pipelined {
		m.Payload = channel.Announcement{Name: "peer", Pipelined: true}.Encode()
	}
	return m
}

func stop(t testing.TB, c interface{ Stop(context.Context) error }) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := c.Stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
}

type source struct {
	*Sender
	member  channel.Member
	metrics *channel.Metrics
}

// send starts a sender.
func send(t testing.TB, n transport.Net, change ...func(*SenderConfig)) *source {
	t.Helper()
	c := DefaultSenderConfig()
	for _, f := range change {
		f(&c)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	met := channel.NewMetrics()
	s := NewSender(c, channel.Settings{Net: n, Metrics: met})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, s) })
	return &source{s, memberAt(netip.MustParseAddrPort("192.0.2.1:4000"), true), met}
}

func (s *source) message(o channel.Options, body string, to ...channel.Member) *channel.Message {
	return &channel.Message{ID: channel.NewUniqueID(), From: s.member, To: to, Options: o, Time: 1, Body: []byte(body)}
}

// value returns a counter's value.
func value(m *channel.Metrics, name string, labels ...string) int {
	for _, s := range m.Samples() {
		if s.Name == name && slices.Equal(s.Labels, labels) {
			return int(s.Value)
		}
	}
	return -1
}

func refusals(n *node, reason string) int {
	return value(n.metrics, "channel_receive_refused_total", "reason", reason)
}

// inbox remembers bodies in order of delivery.
type inbox struct {
	mu     sync.Mutex
	bodies []string
}

func (b *inbox) add(_ context.Context, m *channel.Message) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bodies = append(b.bodies, string(m.Body))
	return nil
}

func (b *inbox) all() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.bodies)
}

// results is a Completion that remembers, by body, what it was told.
type results struct {
	mu   sync.Mutex
	errs map[string][]error
	more chan struct{}
}

func newResults() *results {
	return &results{errs: map[string][]error{}, more: make(chan struct{}, 1)}
}

func (r *results) Complete(m *channel.Message, err error) {
	r.mu.Lock()
	r.errs[string(m.Body)] = append(r.errs[string(m.Body)], err)
	r.mu.Unlock()
	notify(r.more)
}

// wait waits until n messages have ended, and checks that none did twice.
func (r *results) wait(t testing.TB, n int) map[string]error {
	t.Helper()
	patience := time.NewTimer(20 * time.Second)
	defer patience.Stop()
	for {
		r.mu.Lock()
		got := len(r.errs)
		r.mu.Unlock()
		if got >= n {
			break
		}
		select {
		case <-r.more:
		case <-patience.C:
			t.Fatalf("%d of %d messages have ended", got, n)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]error{}
	for body, errs := range r.errs {
		if len(errs) != 1 {
			t.Errorf("%q ended %d times: %v", body, len(errs), errs)
		}
		out[body] = errs[0]
	}
	return out
}

// eventually waits, in real or virtual time, until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 5000 {
		if ok() {
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
	t.Fatalf("never happened: %s", what)
}

// handMade starts a peer that gives each connection to serve, and returns its
// address.
func handMade(t testing.TB, n transport.Net, host string, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	l, err := channel.ListenTCP(n, netip.AddrPortFrom(netip.MustParseAddr(host), 0))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() {
				serve(c)
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		open := conns
		mu.Unlock()
		for _, c := range open {
			c.Close()
		}
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// readMessages calls f for every message that comes on c, until f or the
// connection ends it.
func readMessages(c net.Conn, f func(*channel.Message) bool) {
	dec := wire.NewDecoder(0)
	var m channel.Message
	for {
		n, err := c.Read(dec.Space())
		dec.Wrote(n)
		for {
			k, ferr := dec.Next(&m)
			if ferr != nil {
				return
			}
			if k == wire.Incomplete {
				break
			}
			if !f(&m) {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// both runs a test on the loopback interface and on a simulated network in
// virtual time; hosts are two addresses of it.
func both(t *testing.T, f func(t *testing.T, a, b transport.Net, host string)) {
	t.Run("loopback", func(t *testing.T) {
		n := realNet(t)
		f(t, n, n, "127.0.0.1")
	})
	t.Run("sim", func(t *testing.T) {
		channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
			nodes := nw.Nodes(2)
			f(t, nodes[0], nodes[1], nodes[1].IP())
		})
	})
}

func number(i int) string { return fmt.Sprintf("%06d", i) }
