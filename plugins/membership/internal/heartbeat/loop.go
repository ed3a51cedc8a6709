package heartbeat

import (
	"errors"
	"math"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/membership"
	"github.com/longhouse-go/longhouse/channel/wire"
	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

const never = time.Duration(math.MaxInt64)

// complaints bounds the log lines of each kind. One goroutine owns it.
type complaints map[string]time.Time

// due reports whether a complaint of that kind may be logged now.
func (c complaints) due(kind string, now time.Time) bool {
	if last, ok := c[kind]; ok && now.Sub(last) < complaintInterval {
		return false
	}
	c[kind] = now
	return true
}

// run owns the table: it sends heartbeats, takes records, finds who has fallen
// silent, and tells the sink. It is the only caller of the sink.
func (m *Membership) run(table *membership.Table, sink channel.MemberSink) {
	defer m.leave()
	beat := time.NewTicker(m.cfg.Frequency)
	defer beat.Stop()
	expire := time.NewTicker(max(time.Millisecond, m.cfg.DropTime/6))
	defer expire.Stop()
	m.beat("")
	greet := time.NewTimer(never) // a heartbeat for newcomers, who need not wait for the next
	defer greet.Stop()
	greeting := time.Time{} // when greet is due, if it is
	soon := func(interval time.Duration) {
		if at := m.lastSent.Add(interval); greeting.IsZero() || at.Before(greeting) {
			greeting = at
			greet.Reset(time.Until(at))
		}
	}
	var events []channel.MemberEvent
	for {
		events = events[:0]
		select {
		case <-m.stop:
			return
		case <-beat.C:
			m.beat("")
			m.checkHearing()
		case <-greet.C:
			greeting = time.Time{}
			m.beat("")
		case <-expire.C:
			events = table.Expire(events, time.Now())
		case local := <-m.updates:
			if passed := time.Since(m.epoch); local.Alive > passed {
				m.epoch = m.epoch.Add(passed - local.Alive)
			}
			m.local = local
			table.SetLocal(local)
			m.beat("")
		case h := <-m.records:
			var answer bool
			if events, answer = m.take(events, table, h); answer {
				soon(proofInterval)
			} else if slices.ContainsFunc(events, isNewcomer) {
				soon(greetInterval)
			}
		}
		for _, ev := range events {
			sink.Observe(ev)
		}
	}
}

// take gives a record to the table and counts what became of it. answer says
// that a heartbeat is wanted, to ask for a proof or to give one.
func (m *Membership) take(events []channel.MemberEvent, table *membership.Table, h heard) (_ []channel.MemberEvent, answer bool) {
	now, rec := time.Now(), h.rec
	var refusal membership.Refusal
	switch p := m.proofs; {
	case p == nil:
		events, refusal = table.Heard(events, rec, now)
	case !h.sealed && !p.mayGoWithout(rec.Host):
		refusal = membership.Unsealed
	case !h.sealed:
		events, refusal = table.Heard(events, rec, now)
	default:
		if rec.ID != m.local.ID && hasWord(h.asked, wordOf(m.local.ID)) {
			p.owe(h.nonce, now)
			answer = true
		}
		if rec.ID != m.local.ID && rec.Command != channel.ShutdownCommand && !table.Has(rec.ID) && !p.fresh(h, now) {
			p.ask(rec.ID, now)
			m.counters.bad[unproven].Inc()
			return events, true
		}
		p.settle(rec.ID)
		events, refusal = table.HeardSealed(events, rec, now)
	}
	switch refusal {
	case "":
	case membership.Own:
		m.lastHeard, m.hears = now, true
	default:
		m.counters.refused[refusal].Inc()
		if text := explain(refusal); text != "" && m.complaints.due(string(refusal), now) {
			m.log.Warn(text, zap.Stringer("member", rec), zap.Stringer("id", rec.ID))
		}
	}
	return events, answer
}

func isNewcomer(ev channel.MemberEvent) bool { return ev.Kind == channel.MemberAdded }

// explain says what an operator should know of a refusal; empty for those that
// are part of ordinary life.
func explain(r membership.Refusal) string {
	switch r {
	case membership.AddressTaken:
		return "a node announces the address of a member that is alive; it is not taken in while that lives: give each node an address of its own"
	case membership.OwnAddress:
		return "a node announces this node's own address; it is ignored: give each node an address of its own"
	case membership.OwnID:
		return "another node uses this node's id; it is ignored: give it an id of its own"
	case membership.Full:
		return "the table of members is full; further nodes are ignored"
	case membership.Deferred:
		return "many new nodes announce themselves at once; they are taken in when heard again"
	case membership.Unsealed:
		return "a heartbeat without the seal of the cluster's secret was ignored: set the same secret on all nodes, and list the addresses of Tomcat nodes under unauthenticated"
	case membership.BadID, membership.BadHost, membership.BadPort:
		return "a heartbeat without usable id, address or port was ignored"
	}
	return ""
}

// beat sends the local record, with a command if one is given.
func (m *Membership) beat(command string) {
	now := time.Now()
	m.lastSent = now
	conn := m.currentConn()
	if conn == nil {
		m.counters.sendFailed.Inc()
		return
	}
	rec := m.local
	rec.Command = command
	// Receivers take only an alive time that goes on as a sign of life.
	rec.Alive = max(now.Sub(m.epoch).Truncate(time.Millisecond), m.lastAlive+time.Millisecond)
	m.lastAlive = rec.Alive
	m.buf = wire.AppendMember(m.buf[:0], rec)
	if m.proofs != nil {
		m.buf = m.proofs.seal(m.buf, now)
	}
	targets := m.cfg.Targets()
	sent := 0
	_ = conn.SetWriteDeadline(now.Add(writeTimeout)) // a socket that cannot has no full queue either
	for _, to := range targets {
		if _, err := conn.WriteTo(m.buf, to); err != nil {
			m.counters.sendFailed.Inc()
			if m.complaints.due("send", now) {
				m.log.Warn("a heartbeat could not be sent; going on", zap.Stringer("to", to), zap.Error(err))
			}
			continue
		}
		m.counters.sent.Inc()
		sent++
	}
	if sent > 0 || len(targets) == 0 {
		m.sendErrors = 0
	} else if m.sendErrors++; m.sendErrors >= maxSendErrors {
		m.reopen()
	}
}

// reopen closes the socket; receive opens another one.
func (m *Membership) reopen() {
	m.sendErrors, m.opened = 0, time.Now()
	if conn := m.takeConn(); conn != nil {
		conn.Close()
	}
}

// checkHearing opens the socket again if the node's own heartbeats have ceased
// to come back: the interface has gone and come back, and the socket is in the
// group no more.
func (m *Membership) checkHearing() {
	if !m.cfg.HearsItself {
		return
	}
	now := time.Now()
	since := m.lastHeard
	if since.Before(m.opened) {
		since = m.opened
	}
	if now.Sub(since) <= max(10*m.cfg.Frequency, 2*m.cfg.DropTime) {
		return
	}
	if !m.hears {
		if m.complaints.due("deaf", now) {
			m.log.Warn("this node does not hear its own heartbeats, and probably no others: multicast does not work on the interface; set bind to the address of another one, or use the static membership")
		}
		return
	}
	m.log.Warn("this node does not hear its own heartbeats any more; opening the socket again")
	m.reopen()
}

// leave tells the others and closes the socket.
func (m *Membership) leave() {
	m.beat(channel.ShutdownCommand)
	if conn := m.takeConn(); conn != nil {
		conn.Close()
	}
}

// receive reads and decodes datagrams. A socket that fails is replaced.
func (m *Membership) receive(conn transport.UDPConn) {
	own := complaints{}
	retry := time.Duration(0)
	for {
		received, err := m.readAll(conn, own)
		if errors.Is(err, channel.ErrClosed) {
			return // run still needs the socket for the farewell
		}
		conn.Close() // a second time does no harm
		if received {
			retry = 0
		}
		for {
			if !m.pause(retry) {
				return
			}
			if own.due("socket", time.Now()) {
				m.log.Warn("the socket of the membership failed; opening it again", zap.Error(err))
			}
			retry = min(max(minRetry, 2*retry), maxRetry)
			m.counters.reopened.Inc()
			if conn, err = m.cfg.Open(); err == nil {
				break
			}
		}
		if !m.setConn(conn) {
			return
		}
	}
}

// pause waits, and reports whether the membership still runs.
func (m *Membership) pause(d time.Duration) bool {
	select {
	case <-m.stop:
		return false
	default:
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-m.stop:
		return false
	}
}

// readAll reads until the socket fails. It reports whether there was anything.
func (m *Membership) readAll(conn transport.UDPConn, own complaints) (received bool, err error) {
	buf := make([]byte, maxDatagram+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return received, err
		}
		received = true
		m.counters.received.Inc()
		h, reason := m.opener.open(buf[:n])
		if reason != "" {
			m.counters.bad[reason].Inc()
			if isMessage(buf[:n]) {
				continue // sent to the group, for another socket
			}
			if text, kind := complaint(reason); own.due(kind, time.Now()) {
				m.log.Warn(text, zap.String("reason", reason), zap.Int("bytes", n), zap.Stringer("from", from))
			}
			continue
		}
		select {
		case m.records <- h:
		case <-m.stop:
			return received, channel.ErrClosed
		}
	}
}

// isMessage reports whether a datagram starts as the frame of a message does.
func isMessage(b []byte) bool {
	const begin = 7 // bytes of a frame's mark
	return len(b) >= begin && string(b[:begin]) == wire.Ack[:begin]
}

// complaint says what an operator should know of a datagram that was refused,
// and which complaints are logged once for all.
func complaint(reason string) (text, kind string) {
	switch reason {
	case "forged":
		return "a heartbeat whose seal is wrong was ignored: it was forged or changed on the way", reason
	case "unknown_key":
		return "a heartbeat that is sealed with another secret was ignored: set the same secret on all nodes; while it changes, list the other one as an old one", reason
	}
	return "a datagram that is no heartbeat was ignored; somebody else may use the group's port", "bad"
}
