// Package heartbeat runs a membership that sends and hears member records as
// datagrams: the work that the multicast and the static membership share. It
// owns the goroutines and the socket; who is a member is decided by the pure
// table of channel/membership, and the bytes are those of channel/wire.
//
// It imports channel and its sub-packages, and must not import core,
// interceptors, valves, fx, go-plugin or grpc.
package heartbeat

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/membership"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

// Config is what a membership says about itself. All of it is needed.
type Config struct {
	// Frequency is the time between heartbeats.
	Frequency time.Duration
	// DropTime is the silence after which a member is lost.
	DropTime time.Duration
	// Open opens the socket. It is called again after the socket has failed,
	// and never concurrently.
	Open func() (transport.UDPConn, error)
	// Targets returns where heartbeats go. It must not block.
	Targets func() []net.Addr
	// HearsItself says that the node's own heartbeats come back, so that their
	// absence shows that the socket has become deaf.
	HearsItself bool
	// Security, if it has a secret, seals the heartbeats and refuses those
	// without a seal.
	Security Security
}

const (
	// maxDatagram is the largest UDP payload over IPv4, in bytes.
	maxDatagram = 65507
	// queued is how many decoded records wait for the table; the socket's
	// buffer holds further ones.
	queued = 256
	// minFrequency is the shortest time between heartbeats.
	minFrequency = 10 * time.Millisecond
	// greetInterval is the least time between heartbeats that greet newcomers,
	// proofInterval between those that ask for proofs or give them.
	greetInterval, proofInterval = 100 * time.Millisecond, 20 * time.Millisecond
	// maxSendErrors in a row make the socket be opened again.
	maxSendErrors = 3
	// minRetry and maxRetry bound the pause before the socket is opened again.
	minRetry, maxRetry = 250 * time.Millisecond, 10 * time.Second
	// complaintInterval is the least time between two log lines of one kind.
	complaintInterval = time.Minute
	// writeTimeout keeps a stuck interface from holding up the table.
	writeTimeout = time.Second
)

// CheckTimes reports what is wrong with the times of a configuration.
func CheckTimes(frequency, dropTime time.Duration) error {
	var errs []error
	if frequency < minFrequency || frequency > time.Minute {
		errs = append(errs, fmt.Errorf("frequency: %v is outside %v..1m", frequency, minFrequency))
	}
	if dropTime <= frequency || dropTime > time.Hour {
		errs = append(errs, fmt.Errorf("drop_time: %v is not between the frequency, %v, and 1h; three times the frequency or more is sensible", dropTime, frequency))
	}
	return errors.Join(errs...)
}

// Membership implements channel.Membership.
type Membership struct {
	cfg      Config
	log      *zap.Logger
	counters counters

	updates chan channel.Member
	records chan heard
	stop    chan struct{}  // closed by Stop
	work    sync.WaitGroup // run and receive

	mu       sync.Mutex // guards what follows; never held while blocking
	began    bool       // Start has been called
	launched bool       // run and receive have been started
	stopped  bool
	conn     transport.UDPConn // the open socket; nil while there is none

	security error   // what is wrong with the secrets, for Start
	opener   *opener // of receive

	// run owns these.
	proofs     *proofs // nil without a secret
	local      channel.Member
	epoch      time.Time // when local would have had an alive time of 0
	lastAlive  time.Duration
	lastSent   time.Time
	lastHeard  time.Time // of the node itself
	opened     time.Time // when the socket was opened, or thought deaf
	hears      bool      // has heard itself once
	sendErrors int       // in a row
	complaints complaints
	buf        []byte
}

type counters struct {
	sent, sendFailed, received, reopened *channel.Counter
	refused                              map[membership.Refusal]*channel.Counter
	bad                                  map[string]*channel.Counter // by wire.Reason
}

// New returns a membership that has not started.
func New(c Config, s channel.Settings) *Membership {
	log := s.Logger
	if log == nil {
		log = zap.NewNop()
	}
	m := &Membership{
		cfg:        c,
		log:        log,
		updates:    make(chan channel.Member),
		records:    make(chan heard, queued),
		stop:       make(chan struct{}),
		complaints: complaints{},
	}
	const refusedHelp = "Heartbeats that were not taken over, by reason."
	m.counters = counters{
		sent:       s.Metrics.Counter("membership_heartbeats_sent_total", "Heartbeats sent."),
		sendFailed: s.Metrics.Counter("membership_send_errors_total", "Heartbeats that could not be sent."),
		received:   s.Metrics.Counter("membership_datagrams_received_total", "Datagrams received, the node's own included."),
		reopened:   s.Metrics.Counter("membership_socket_reopened_total", "How often the socket had to be opened again."),
		refused:    map[membership.Refusal]*channel.Counter{},
		bad:        map[string]*channel.Counter{},
	}
	for _, r := range membership.Refusals() {
		m.counters.refused[r] = s.Metrics.Counter("membership_refused_total", refusedHelp, "reason", string(r))
	}
	for _, e := range wire.Errors() {
		m.counters.bad[e.Reason] = s.Metrics.Counter("membership_refused_total", refusedHelp, "reason", e.Reason)
	}
	for _, reason := range []string{"empty", "trailing", "other", "forged", "unknown_key", unproven} {
		m.counters.bad[reason] = s.Metrics.Counter("membership_refused_total", refusedHelp, "reason", reason)
	}
	m.security = m.secure(c)
	return m
}

// unproven is the reason for which a sealed record of a node that is no member
// is refused until the node has repeated our nonce.
const unproven = "unproven"

// secure prepares what a secret needs.
func (m *Membership) secure(c Config) error {
	keys, err := c.Security.keys()
	if err != nil {
		return err
	}
	open, err := c.Security.networks()
	if err != nil {
		return err
	}
	if m.opener, err = newOpener(keys); err != nil || len(keys) == 0 {
		return err
	}
	m.proofs, err = newProofs(keys, open, c.DropTime)
	return err
}

// Start opens the socket, sends the first heartbeat and begins to listen. It
// does not wait for other members.
func (m *Membership) Start(ctx context.Context, local channel.Member, known []channel.Member, sink channel.MemberSink) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("membership: start: %w", err)
	}
	if err := m.checkLocal(local); err != nil {
		return err
	}
	if m.security != nil {
		return fmt.Errorf("membership: start: %w", m.security)
	}
	m.mu.Lock()
	again := m.began || m.stopped
	m.began = true
	m.mu.Unlock()
	if again {
		return errors.New("membership: start: it was started or stopped before; make a new one")
	}
	conn, err := m.cfg.Open()
	if err != nil {
		return fmt.Errorf("membership: start: %w", err)
	}
	if !m.setConn(conn) {
		return fmt.Errorf("membership: start: %w", channel.ErrClosed)
	}
	now := time.Now()
	table := membership.New(membership.Config{DropTime: m.cfg.DropTime}, local)
	table.Seed(known, now, func(o channel.Member) bool { return m.proofs != nil && !m.proofs.mayGoWithout(o.Host) })
	m.local, m.epoch, m.opened = local, now.Add(-local.Alive), now
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped {
		return fmt.Errorf("membership: start: %w", channel.ErrClosed)
	}
	m.launched = true
	m.work.Go(func() { m.receive(conn) })
	m.work.Go(func() { m.run(table, sink) })
	return nil
}

// setConn makes conn the open socket, or closes it if the membership has been
// stopped.
func (m *Membership) setConn(conn transport.UDPConn) bool {
	m.mu.Lock()
	if !m.stopped {
		m.conn = conn
	}
	ok := !m.stopped
	m.mu.Unlock()
	if !ok {
		conn.Close()
	}
	return ok
}

// takeConn takes the open socket away from its users; nil if there is none.
func (m *Membership) takeConn() transport.UDPConn {
	m.mu.Lock()
	defer m.mu.Unlock()
	conn := m.conn
	m.conn = nil
	return conn
}

func (m *Membership) currentConn() transport.UDPConn {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conn
}

// checkLocal refuses a record that others would refuse.
func (m *Membership) checkLocal(local channel.Member) error {
	room := maxDatagram
	if m.proofs != nil {
		room -= minSeal + 2*word
	}
	switch {
	case local.ID.IsZero():
		return errors.New("membership: the local member has no id")
	case !local.Host.IsValid() || local.Host.IsUnspecified():
		return errors.New("membership: the local member has no address that others could reach; set the receiver's address")
	case local.Port < 1 || local.Port > 65535:
		return fmt.Errorf("membership: the local member's port %d is outside 1..65535", local.Port)
	case wire.MemberSize(local) > room:
		return fmt.Errorf("membership: the local member's record has %d bytes, a datagram holds %d: shorten payload or domain: %w",
			wire.MemberSize(local), room, channel.ErrTooLarge)
	}
	return nil
}

// Update changes the local record and sends it at once.
func (m *Membership) Update(ctx context.Context, local channel.Member) error {
	if err := m.checkLocal(local); err != nil {
		return err
	}
	m.mu.Lock()
	running := m.launched && !m.stopped
	m.mu.Unlock()
	if !running {
		return fmt.Errorf("membership: update: %w", channel.ErrClosed)
	}
	select {
	case m.updates <- local:
		return nil
	case <-m.stop:
		return fmt.Errorf("membership: update: %w", channel.ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("membership: update: %w", ctx.Err())
	}
}

// Stop leaves the group, telling the others, and ends all goroutines. It works
// twice and without Start. If ctx ends first, because the sink blocks, the
// goroutines end when the sink returns.
func (m *Membership) Stop(ctx context.Context) error {
	m.mu.Lock()
	first := !m.stopped
	m.stopped = true
	m.mu.Unlock()
	if first {
		close(m.stop) // run says farewell and closes the socket
	}
	done := make(chan struct{})
	go func() { // ends with run and receive
		m.work.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("membership: stop: waiting for its goroutines: %w", ctx.Err())
	}
	if conn := m.takeConn(); conn != nil { // of a Start that did not finish
		conn.Close()
	}
	return nil
}
