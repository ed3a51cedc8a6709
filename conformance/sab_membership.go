package conformance

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// tinyBugs are the mistakes that a tiny membership can be told to make. Without
// any it is correct.
type tinyBugs struct {
	seldom         int     // announce only every so many intervals
	maxMembers     int     // ignore further ones
	noFarewell     bool    // leave in silence
	patience       float64 // of the drop time; 0 means 1
	newFirst       bool    // announce a reincarnation before the end of the old one
	byAddress      bool    // take a member at a known address for the known one
	self           bool    // report the own record
	addAlways      bool    // report every heartbeat as added
	removeTwice    bool    // report every loss twice
	noReturn       bool    // ignore who was once lost
	garbageDrops   bool    // lose everybody when something cannot be read
	garbageDeafens bool    // and stop listening
	uncounted      bool    // do not count what cannot be read
	byAlive        bool    // believe the alive times of others
	rejoin         bool    // a changed payload is a leave and a join
	noUpdate       bool    // or nothing at all
}

const (
	tinyInterval = 500 * time.Millisecond
	tinyDrop     = 3 * time.Second
)

var tinyGroup = netip.MustParseAddrPort("228.0.0.9:45999")

// tiny is a small membership by multicast.
type tiny struct {
	bugs    tinyBugs
	net     transport.Net
	refused *channel.Counter

	conn  transport.UDPConn
	heard chan []byte
	next  chan channel.Member
	quit  chan struct{}
	work  sync.WaitGroup
	once  sync.Once

	// run owns these.
	local  channel.Member
	sink   channel.MemberSink
	known  map[channel.UniqueID]*tinyPeer
	banned map[channel.UniqueID]bool
}

type tinyPeer struct {
	m     channel.Member
	heard time.Time
	start time.Time // by its own alive time
}

func tinySubject(b tinyBugs) Subject {
	return Membership("tiny", func(b tinyBugs, s channel.Settings) (channel.Membership, error) {
		return &tiny{
			bugs: b, net: s.Net, refused: s.Metrics.Counter("membership_refused_total", "Datagrams that could not be read."),
			known: map[channel.UniqueID]*tinyPeer{}, banned: map[channel.UniqueID]bool{},
			heard: make(chan []byte), next: make(chan channel.Member), quit: make(chan struct{}),
		}, nil
	}, func(string, []string) tinyBugs { return b }, MembershipTimes{Interval: tinyInterval, Drop: tinyDrop}, FeaturePayload)
}

func tinyBug(name string, b tinyBugs) Saboteur {
	return Saboteur{Name: name, New: func() Subject { return tinySubject(b) }}
}

func (m *tiny) Start(_ context.Context, local channel.Member, _ []channel.Member, sink channel.MemberSink) error {
	conn, err := channel.ListenMulticast(m.net, channel.MulticastConfig{Group: tinyGroup})
	if err != nil {
		return err
	}
	m.conn, m.local, m.sink = conn, local, sink
	m.work.Go(m.read)
	m.work.Go(m.run)
	return nil
}

func (m *tiny) Update(ctx context.Context, local channel.Member) error {
	select {
	case m.next <- local:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-m.quit:
		return channel.ErrClosed
	}
}

func (m *tiny) Stop(context.Context) error {
	m.once.Do(func() {
		if m.conn == nil {
			return
		}
		close(m.quit)
		m.conn.Close()
		m.work.Wait()
	})
	return nil
}

func (m *tiny) read() {
	buf := make([]byte, 65536)
	for {
		n, _, err := m.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		select {
		case m.heard <- append([]byte(nil), buf[:n]...):
		case <-m.quit:
			return
		}
	}
}

func (m *tiny) announce(l channel.Member) {
	_, _ = m.conn.WriteTo(wire.AppendMember(nil, l), net.UDPAddrFromAddrPort(tinyGroup))
}

func (m *tiny) run() {
	born := time.Now()
	tick := time.NewTicker(tinyInterval)
	defer tick.Stop()
	m.announce(m.local)
	deaf := false
	ticks := 0
	for {
		select {
		case <-m.quit:
			if !m.bugs.noFarewell {
				bye := m.local
				bye.Command, bye.Alive = channel.ShutdownCommand, time.Since(born)
				if c, err := m.net.ListenPacket("udp4", "0.0.0.0:0"); err == nil {
					_, _ = c.WriteTo(wire.AppendMember(nil, bye), net.UDPAddrFromAddrPort(tinyGroup))
					c.Close()
				}
			}
			return
		case next := <-m.next:
			m.local.Payload = next.Payload
		case b := <-m.heard:
			rec, n, err := wire.DecodeMember(b)
			switch {
			case deaf:
			case err == nil && n == len(b):
				m.hear(rec)
			default:
				if !m.bugs.uncounted {
					m.refused.Inc()
				}
				deaf = m.bugs.garbageDeafens
				if m.bugs.garbageDrops {
					for id := range m.known {
						m.lose(id, channel.MemberLost)
					}
				}
			}
		case now := <-tick.C:
			m.local.Alive = now.Sub(born)
			if ticks++; m.bugs.seldom == 0 || ticks%m.bugs.seldom == 0 {
				m.announce(m.local)
			}
			m.expire(now)
		}
	}
}

func (m *tiny) emit(kind channel.MemberEventKind, who channel.Member) {
	m.sink.Observe(channel.MemberEvent{Kind: kind, Member: who})
}

func (m *tiny) lose(id channel.UniqueID, kind channel.MemberEventKind) {
	p := m.known[id]
	delete(m.known, id)
	m.banned[id] = m.bugs.noReturn
	m.emit(kind, p.m)
	if m.bugs.removeTwice {
		m.emit(kind, p.m)
	}
}

func (m *tiny) hear(rec channel.Member) {
	now := time.Now()
	p := m.known[rec.ID]
	switch {
	case rec.ID == m.local.ID && !m.bugs.self, m.banned[rec.ID]:
	case rec.Command == channel.ShutdownCommand:
		if p != nil {
			m.lose(rec.ID, channel.MemberLeft)
		}
	case p != nil:
		p.heard = now
		if m.bugs.byAlive && now.Add(-rec.Alive).After(p.start.Add(10*time.Minute)) {
			m.lose(rec.ID, channel.MemberLost)
			return
		}
		m.change(p, rec)
	default:
		m.newcomer(rec, now)
	}
}

func (m *tiny) change(p *tinyPeer, rec channel.Member) {
	changed := p.m.Payload != rec.Payload
	switch {
	case m.bugs.addAlways:
		m.emit(channel.MemberAdded, rec)
	case changed && m.bugs.noUpdate:
		return
	case changed && m.bugs.rejoin:
		m.emit(channel.MemberLeft, p.m)
		m.emit(channel.MemberAdded, rec)
	case changed:
		m.emit(channel.MemberUpdated, rec)
	}
	p.m = rec
}

func (m *tiny) newcomer(rec channel.Member, now time.Time) {
	if m.bugs.maxMembers > 0 && len(m.known) >= m.bugs.maxMembers {
		return
	}
	var old channel.UniqueID
	for id, p := range m.known {
		if p.m.Addr() == rec.Addr() {
			old = id
		}
	}
	if !old.IsZero() && m.bugs.byAddress {
		m.known[old].heard = now
		return
	}
	if !old.IsZero() && !m.bugs.newFirst {
		m.lose(old, channel.MemberLost)
	}
	m.known[rec.ID] = &tinyPeer{m: rec, heard: now, start: now.Add(-rec.Alive)}
	m.emit(channel.MemberAdded, rec)
	if !old.IsZero() && m.bugs.newFirst {
		m.lose(old, channel.MemberLost)
	}
}

func (m *tiny) expire(now time.Time) {
	patience := tinyDrop
	if m.bugs.patience > 0 {
		patience = time.Duration(min(m.bugs.patience*float64(tinyDrop), float64(100*time.Hour)))
	}
	for id, p := range m.known {
		if now.Sub(p.heard) > patience {
			m.lose(id, channel.MemberLost)
		}
	}
}
