package channeltest

import (
	"context"
	"encoding/binary"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/pion/transport/v2"
)

// Streams are a small TCP: segments with sequence numbers, cumulative
// acknowledgements, a window, retransmission, and resets. SYN and FIN take one
// sequence number each; data starts at 1.

const (
	maxSegment      = 8 << 10   // bytes of data in one segment
	streamBuffer    = 256 << 10 // bytes, for each direction
	maxOutOfOrder   = 256       // segments kept ahead of a gap
	acceptBacklog   = 128       // connections that nobody has accepted
	minRTO          = 200 * time.Millisecond
	maxRTO          = 2 * time.Second
	firstRTO        = time.Second // before any round trip is known
	keepAliveIdle   = 15 * time.Second
	keepAliveProbes = 9
	finWait         = time.Minute // a closed stream waits this long for its peer
	timerNoise      = 100_000     // nanoseconds, see arm
)

const (
	flagSYN byte = 1 << iota
	flagACK
	flagFIN
	flagRST
	flagProbe // asks for an acknowledgement
)

const segmentHeader = 1 + 6 + 6 + 8 + 8 + 8 + 4

// segment is one packet of a stream.
type segment struct {
	flags    byte
	src, dst netip.AddrPort // as the sockets see them
	id       uint64         // of the connection, chosen by the dialling side
	seq, ack uint64
	window   uint32
	data     []byte
}

func (s segment) encode() []byte {
	b := make([]byte, 0, segmentHeader+len(s.data))
	b = append(b, s.flags)
	for _, a := range []netip.AddrPort{s.src, s.dst} {
		ip := a.Addr().As4()
		b = append(b, ip[:]...)
		b = binary.BigEndian.AppendUint16(b, a.Port())
	}
	b = binary.BigEndian.AppendUint64(b, s.id)
	b = binary.BigEndian.AppendUint64(b, s.seq)
	b = binary.BigEndian.AppendUint64(b, s.ack)
	b = binary.BigEndian.AppendUint32(b, s.window)
	return append(b, s.data...)
}

func decodeSegment(b []byte) (segment, bool) {
	if len(b) < segmentHeader {
		return segment{}, false
	}
	addr := func(b []byte) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b)), binary.BigEndian.Uint16(b[4:]))
	}
	return segment{
		flags:  b[0],
		src:    addr(b[1:]),
		dst:    addr(b[7:]),
		id:     binary.BigEndian.Uint64(b[13:]),
		seq:    binary.BigEndian.Uint64(b[21:]),
		ack:    binary.BigEndian.Uint64(b[29:]),
		window: binary.BigEndian.Uint32(b[37:]),
		data:   b[segmentHeader:],
	}, true
}

// streamKey tells the streams of a node apart.
type streamKey struct {
	local, remote netip.AddrPort
	id            uint64
}

// sendSegment puts a segment on the way. It does not block.
func (n *SimNode) sendSegment(s segment) {
	to := s.dst.Addr()
	if to.IsLoopback() {
		to = n.addr
	}
	raw := s.encode()
	p := Packet{Kind: Segment, From: s.src, To: s.dst, Length: len(s.data), Payload: raw[segmentHeader:]}
	dst := &net.UDPAddr{IP: to.AsSlice(), Port: segmentPort}
	salt := mix(s.seq, s.ack, uint64(s.flags))
	n.nw.transmit(p, link{n.addr, to}, salt, func() { _, _ = n.proto.WriteTo(raw, dst) })
}

// readSegments hands segments to their streams until the node ends.
func (n *SimNode) readSegments() {
	buf := make([]byte, segmentHeader+maxSegment)
	for {
		k, _, err := n.proto.ReadFrom(buf)
		if err != nil {
			if n.isDown() {
				return
			}
			continue // vnet's timer for "never", 292 years
		}
		if s, ok := decodeSegment(buf[:k]); ok {
			n.handleSegment(s)
		}
	}
}

func (n *SimNode) handleSegment(s segment) {
	key := streamKey{s.dst, s.src, s.id}
	n.mu.Lock()
	if n.down {
		n.mu.Unlock()
		return
	}
	st, known := n.streams[key]
	if !known && s.flags == flagSYN {
		if l := n.listenerFor(s.dst); l != nil {
			if l.pending >= acceptBacklog {
				n.mu.Unlock()
				return // as a full backlog does: the dialler tries again
			}
			l.pending++
			st, known = newSimStream(n, key, streamAccepting), true
			st.listener = l
			n.streams[key] = st
		}
	}
	n.mu.Unlock()
	switch {
	case known:
		st.handle(s)
	case s.flags&flagRST == 0:
		n.sendSegment(segment{flags: flagRST, src: s.dst, dst: s.src, id: s.id, seq: s.ack})
	}
}

// listenerFor returns the listener that a stream to addr belongs to, or nil.
// The caller holds mu.
func (n *SimNode) listenerFor(addr netip.AddrPort) *simListener {
	for _, l := range n.listeners[addr.Port()] {
		if ip := l.addr.Addr(); ip.IsUnspecified() || ip == addr.Addr() {
			return l
		}
	}
	return nil
}

func (n *SimNode) dialStream(ctx context.Context, local, remote netip.AddrPort) (*simStream, error) {
	raddr := net.TCPAddrFromAddrPort(remote)
	if err := ctx.Err(); err != nil {
		return nil, opError("dial", "tcp", raddr, err)
	}
	if remote.Addr().IsUnspecified() {
		remote = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), remote.Port())
	}
	ip := local.Addr()
	if !ip.IsValid() || ip.IsUnspecified() {
		ip = n.addr
		if remote.Addr().IsLoopback() {
			ip = remote.Addr()
		}
	}
	if !n.owns(ip) {
		return nil, opError("dial", "tcp", raddr, os.NewSyscallError("bind", syscall.EADDRNOTAVAIL))
	}
	n.mu.Lock()
	if n.down {
		n.mu.Unlock()
		return nil, opError("dial", "tcp", raddr, errDown)
	}
	n.nextID++
	key := streamKey{remote: remote, id: n.birth<<48 | n.nextID}
	port, ok := local.Port(), true
	if port == 0 {
		port, ok = n.dialPort(remote)
	}
	if !ok {
		n.mu.Unlock()
		return nil, opError("dial", "tcp", raddr, syscall.EADDRNOTAVAIL)
	}
	key.local = netip.AddrPortFrom(ip, port)
	s := newSimStream(n, key, streamDialling)
	n.streams[key] = s
	n.mu.Unlock()
	if err := s.connect(ctx); err != nil {
		return nil, opError("dial", "tcp", raddr, err)
	}
	return s, nil
}

// simListener accepts streams.
type simListener struct {
	node *SimNode
	addr netip.AddrPort
	cond *sync.Cond // on node.mu

	// Guarded by node.mu.
	pending  int // half open, or in ready
	ready    []*simStream
	deadline time.Time
	alarm    *time.Timer
	closed   bool
}

func newSimListener(n *SimNode, addr netip.AddrPort) *simListener {
	return &simListener{node: n, addr: addr, cond: sync.NewCond(&n.mu)}
}

func (l *simListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.addr) }

func (l *simListener) Accept() (net.Conn, error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (l *simListener) AcceptTCP() (transport.TCPConn, error) {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	for {
		switch {
		case l.closed:
			return nil, opError("accept", "tcp", l.Addr(), net.ErrClosed)
		case expired(l.deadline):
			return nil, opError("accept", "tcp", l.Addr(), os.ErrDeadlineExceeded)
		case len(l.ready) > 0:
			s := l.ready[0]
			l.ready = slices.Delete(l.ready, 0, 1)
			l.pending--
			return s, nil
		}
		l.cond.Wait()
	}
}

func (l *simListener) SetDeadline(t time.Time) error {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	if l.closed {
		return opError("set", "tcp", l.Addr(), net.ErrClosed)
	}
	l.deadline = t
	l.alarm = ring(l.alarm, t, l.node.mu.Lock, l.node.mu.Unlock, l.cond)
	l.cond.Broadcast()
	return nil
}

// Close closes the listener and resets the streams that nobody has accepted.
func (l *simListener) Close() error {
	n := l.node
	n.mu.Lock()
	if l.closed {
		n.mu.Unlock()
		return opError("close", "tcp", l.Addr(), net.ErrClosed)
	}
	l.closed = true
	ready := l.ready
	l.ready = nil
	if l.alarm != nil {
		l.alarm.Stop()
	}
	port := l.addr.Port()
	n.listeners[port] = slices.DeleteFunc(n.listeners[port], func(o *simListener) bool { return o == l })
	if len(n.listeners[port]) == 0 {
		delete(n.listeners, port)
	}
	l.cond.Broadcast()
	n.mu.Unlock()
	for _, s := range ready {
		s.abort(true, syscall.ECONNRESET)
	}
	return nil
}

func expired(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

// ring arranges for a broadcast at t; it reuses old.
func ring(old *time.Timer, t time.Time, lock, unlock func(), cond *sync.Cond) *time.Timer {
	if old != nil {
		old.Stop()
	}
	if t.IsZero() {
		return nil
	}
	return time.AfterFunc(time.Until(t), func() {
		lock()
		defer unlock()
		cond.Broadcast()
	})
}

type streamState uint8

const (
	streamDialling streamState = iota
	streamAccepting
	streamOpen
	streamDead
)

// simStream is one end of a stream.
type simStream struct {
	node     *SimNode
	key      streamKey
	listener *simListener // that a stream being accepted belongs to

	mu    sync.Mutex // guards what follows; never held while blocking
	cond  *sync.Cond // anything has changed
	state streamState
	err   error // why it is dead; nil for an orderly end

	// Sending. out[0] has the sequence number una once the stream is open.
	out      []byte
	una, nxt uint64
	window   uint64 // what the peer accepts, from una
	wantFIN  bool   // nothing more will be written
	sentFIN  bool
	finAcked bool
	writing  bool // a Write is under way

	// Retransmission.
	timer      *time.Timer
	due        time.Time // when timer has something to do; zero for never
	began      time.Time // of the handshake
	progress   time.Time // the last time una moved, or was sent first
	heard      time.Time // the last segment of the peer
	probes     int       // unanswered keep-alives
	rto        time.Duration
	srtt       time.Duration
	timedSeq   uint64 // acknowledging it gives a round trip; 0 for none
	timedAt    time.Time
	duplicates int
	recovering bool
	recover    uint64

	// Receiving.
	in         []byte
	rcvNxt     uint64
	edge       uint64 // the highest sequence number that has been advertised
	ahead      []piece
	peerFIN    uint64 // its sequence number; 0 for none yet
	gotFIN     bool   // everything up to peerFIN has been received
	readShut   bool
	closed     bool
	closedAt   time.Time
	linger     int // seconds; -1 for the default
	noAlive    bool
	rDeadline  time.Time
	wDeadline  time.Time
	rAlarm     *time.Timer
	wAlarm     *time.Timer
	everOpened bool
}

// piece is data that arrived ahead of a gap.
type piece struct {
	seq  uint64
	data []byte
}

var _ transport.TCPConn = (*simStream)(nil)

func newSimStream(n *SimNode, key streamKey, state streamState) *simStream {
	now := time.Now()
	s := &simStream{node: n, key: key, state: state, nxt: 1, rto: firstRTO, began: now, progress: now, heard: now, linger: -1}
	s.cond = sync.NewCond(&s.mu)
	if state == streamAccepting {
		s.rcvNxt = 1
	}
	return s
}

// connect sends the first segment and waits for the answer.
func (s *simStream) connect(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.cond.Broadcast()
	})
	defer stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.emit(flagSYN, 0, nil)
	s.arm(s.rto)
	for s.state == streamDialling && ctx.Err() == nil {
		s.cond.Wait()
	}
	switch {
	case s.everOpened:
		return nil // what has happened since, Read and Write will tell
	case s.state == streamDead:
		return s.err
	}
	s.die(ctx.Err())
	return ctx.Err()
}

// emit sends a segment. The caller holds mu, as for all methods below that do
// not lock.
func (s *simStream) emit(flags byte, seq uint64, data []byte) {
	room := uint64(streamBuffer - len(s.in))
	s.edge = max(s.edge, s.rcvNxt+room)
	s.node.sendSegment(segment{
		flags: flags, src: s.key.local, dst: s.key.remote, id: s.key.id,
		seq: seq, ack: s.rcvNxt, window: uint32(room), data: data,
	})
}

func (s *simStream) acknowledge() { s.emit(flagACK, s.nxt, nil) }

// arm makes the timer act after d and a little. The little keeps it from acting
// at the very instant of a deadline that was set when the segment was sent:
// which of the two came first would differ from run to run.
func (s *simStream) arm(d time.Duration) {
	now := time.Now()
	d += time.Duration(1 + mix(s.key.id, uint64(s.key.local.Port()), s.nxt, uint64(now.UnixNano()))%timerNoise)
	s.due = now.Add(d)
	if s.timer == nil {
		s.timer = time.AfterFunc(d, s.tick)
		return
	}
	s.timer.Reset(d)
}

// rearm sets the timer to what is outstanding.
func (s *simStream) rearm() {
	switch {
	case s.state != streamOpen:
	case s.una < s.nxt, len(s.out) > 0:
		s.arm(s.rto)
	case s.closed:
		s.arm(max(0, time.Until(s.closedAt.Add(finWait))))
	case s.noAlive:
		s.due = time.Time{}
	default:
		s.arm(keepAliveIdle)
	}
}

// tick is called by the timer.
func (s *simStream) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.state == streamDead || s.due.IsZero() || now.Before(s.due) {
		return
	}
	userTimeout := s.node.nw.config.UserTimeout
	switch {
	case s.state != streamOpen:
		if now.Sub(s.began) >= userTimeout {
			s.die(syscall.ETIMEDOUT)
			return
		}
		flags, seq := flagSYN, uint64(0)
		if s.state == streamAccepting {
			flags |= flagACK
		}
		s.emit(flags, seq, nil)
		s.backOff()
		s.arm(s.rto)
	case s.una < s.nxt:
		if now.Sub(s.progress) >= userTimeout {
			s.die(syscall.ETIMEDOUT)
			return
		}
		s.recovering, s.recover, s.duplicates = true, s.nxt, 0
		s.backOff()
		s.retransmit()
		s.arm(s.rto)
	case len(s.out) > 0: // the window is shut: ask whether it still is
		if now.Sub(s.heard) >= userTimeout {
			s.die(syscall.ETIMEDOUT)
			return
		}
		s.emit(flagACK|flagProbe, s.nxt, nil)
		s.backOff()
		s.arm(s.rto)
	case s.closed:
		if now.Sub(s.closedAt) >= finWait {
			s.die(nil)
			return
		}
		s.rearm()
	case now.Sub(s.heard) < keepAliveIdle:
		s.arm(keepAliveIdle - now.Sub(s.heard))
	case s.probes >= keepAliveProbes:
		s.die(syscall.ETIMEDOUT)
	default:
		s.probes++
		s.emit(flagACK|flagProbe, s.nxt, nil)
		s.arm(keepAliveIdle)
	}
}

func (s *simStream) backOff() {
	s.timedSeq = 0 // a round trip of what was sent twice is unknown
	s.rto = min(2*s.rto, max(maxRTO, 2*s.srtt))
}

// die ends the stream and forgets it.
func (s *simStream) die(err error) {
	if s.state == streamDead {
		return
	}
	wasAccepting := s.state == streamAccepting
	s.state, s.err, s.out, s.ahead = streamDead, err, nil, nil
	for _, t := range []*time.Timer{s.timer, s.rAlarm, s.wAlarm} {
		if t != nil {
			t.Stop()
		}
	}
	s.cond.Broadcast()
	s.node.mu.Lock()
	defer s.node.mu.Unlock()
	delete(s.node.streams, s.key)
	if wasAccepting {
		s.listener.pending--
	}
}

// abort ends the stream from outside.
func (s *simStream) abort(reset bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reset && s.state != streamDead {
		s.emit(flagRST, s.nxt, nil)
	}
	s.die(err)
}

// handle takes a segment of the peer. Its data is only valid during the call.
func (s *simStream) handle(g segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == streamDead {
		return
	}
	s.heard, s.probes = time.Now(), 0
	if g.flags&flagRST != 0 {
		if s.state == streamDialling {
			s.die(os.NewSyscallError("connect", syscall.ECONNREFUSED))
		} else {
			s.die(syscall.ECONNRESET)
		}
		return
	}
	switch s.state {
	case streamDialling:
		if g.flags&(flagSYN|flagACK) != flagSYN|flagACK {
			return
		}
		s.rcvNxt = 1
		s.open(g)
		s.acknowledge()
		return
	case streamAccepting:
		if g.flags&flagSYN != 0 {
			s.emit(flagSYN|flagACK, 0, nil)
			s.arm(s.rto)
			return
		}
		if g.ack < 1 || !s.queueForAccept() {
			return
		}
		s.open(g)
	case streamOpen:
		if g.flags&flagSYN != 0 { // our last step of the handshake was lost
			s.acknowledge()
			return
		}
	}
	s.handleAck(g)
	s.handleData(g)
	s.flush()
	if s.closed && s.finAcked && s.gotFIN {
		s.die(nil)
	}
}

// open completes the handshake.
func (s *simStream) open(g segment) {
	s.state, s.everOpened = streamOpen, true
	s.una, s.window = 1, uint64(g.window)
	if s.rto == firstRTO {
		s.sample(time.Since(s.began))
	}
	s.rearm()
	s.cond.Broadcast()
}

// queueForAccept hands the stream to its listener, or resets it if that has
// gone.
func (s *simStream) queueForAccept() bool {
	l := s.listener
	s.node.mu.Lock()
	ok := !l.closed
	if ok {
		l.ready = append(l.ready, s)
		l.cond.Signal()
	}
	s.node.mu.Unlock()
	if !ok {
		s.emit(flagRST, s.nxt, nil)
		s.die(syscall.ECONNRESET)
	}
	return ok
}

// sample takes a measured round trip.
func (s *simStream) sample(rtt time.Duration) {
	if s.srtt == 0 {
		s.srtt = rtt
	} else {
		s.srtt = (7*s.srtt + rtt) / 8
	}
	s.rto = max(minRTO, 2*s.srtt)
}

func (s *simStream) handleAck(g segment) {
	if g.flags&flagACK == 0 || g.ack > s.nxt || g.ack < s.una {
		return
	}
	if g.ack == s.una {
		if s.una < s.nxt && len(g.data) == 0 && g.flags&(flagFIN|flagProbe) == 0 && uint64(g.window) == s.window {
			if s.duplicates++; s.duplicates == 3 && !s.recovering {
				s.recovering, s.recover, s.timedSeq = true, s.nxt, 0
				s.retransmit()
			}
		}
		s.window = uint64(g.window)
		return
	}
	n := min(g.ack-s.una, uint64(len(s.out)))
	s.out = s.out[n:]
	s.una, s.window = g.ack, uint64(g.window)
	s.finAcked = s.sentFIN && s.una == s.nxt
	s.duplicates, s.progress = 0, time.Now()
	if s.timedSeq != 0 && s.una >= s.timedSeq {
		s.sample(time.Since(s.timedAt))
		s.timedSeq = 0
	} else {
		s.rto = max(minRTO, 2*s.srtt) // progress ends a back-off
	}
	if s.recovering {
		if s.una < s.recover {
			s.retransmit()
		} else {
			s.recovering = false
		}
	}
	s.rearm()
	s.cond.Broadcast()
}

// retransmit sends the first piece again that is not acknowledged.
func (s *simStream) retransmit() {
	inFlight := s.nxt - s.una
	if n := min(uint64(len(s.out)), inFlight, maxSegment); n > 0 {
		s.emit(flagACK, s.una, s.out[:n])
	} else if s.sentFIN && !s.finAcked {
		s.emit(flagACK|flagFIN, s.una, nil)
	}
}

// flush sends what the window allows.
func (s *simStream) flush() {
	if s.state != streamOpen {
		return
	}
	idle := s.una == s.nxt
	sent := false
	for !s.sentFIN {
		inFlight := s.nxt - s.una
		unsent := uint64(len(s.out)) - inFlight
		room := s.window - min(s.window, inFlight)
		if n := min(unsent, room, maxSegment); n > 0 {
			s.emit(flagACK, s.nxt, s.out[inFlight:inFlight+n])
			s.nxt += n
			if s.timedSeq == 0 && !s.recovering {
				s.timedSeq, s.timedAt = s.nxt, time.Now()
			}
		} else if unsent == 0 && s.wantFIN {
			s.emit(flagACK|flagFIN, s.nxt, nil)
			s.nxt++
			s.sentFIN = true
		} else {
			break
		}
		sent = true
	}
	if sent && idle {
		s.progress = time.Now()
	}
	if sent || idle && len(s.out) > 0 {
		s.rearm()
	}
}

func (s *simStream) handleData(g segment) {
	if s.state != streamOpen {
		return
	}
	if len(g.data) == 0 && g.flags&(flagFIN|flagProbe) == 0 {
		return
	}
	if s.closed && len(g.data) > 0 && g.seq+uint64(len(g.data)) > s.rcvNxt {
		s.emit(flagRST, s.nxt, nil) // nobody will read it
		s.die(syscall.ECONNRESET)
		return
	}
	if g.flags&flagFIN != 0 {
		s.peerFIN = g.seq + uint64(len(g.data))
	}
	s.take(g.seq, g.data)
	for len(s.ahead) > 0 && s.ahead[0].seq <= s.rcvNxt {
		p := s.ahead[0]
		s.ahead = slices.Delete(s.ahead, 0, 1)
		s.take(p.seq, p.data)
	}
	if s.peerFIN != 0 && s.rcvNxt == s.peerFIN {
		s.rcvNxt++
		s.gotFIN = true
	}
	s.acknowledge()
	s.cond.Broadcast()
}

// take accepts data that is next, and keeps what is ahead of a gap.
func (s *simStream) take(seq uint64, data []byte) {
	end := seq + uint64(len(data))
	switch {
	case len(data) == 0 || end <= s.rcvNxt || s.gotFIN:
		return
	case end-s.rcvNxt > uint64(streamBuffer-len(s.in)):
		return // beyond the window
	case seq > s.rcvNxt:
		i, dup := slices.BinarySearchFunc(s.ahead, seq, func(p piece, seq uint64) int {
			if p.seq < seq {
				return -1
			}
			return min(1, int(min(p.seq-seq, math.MaxInt32)))
		})
		if !dup && len(s.ahead) < maxOutOfOrder {
			s.ahead = slices.Insert(s.ahead, i, piece{seq, slices.Clone(data)})
		}
		return
	}
	data = data[s.rcvNxt-seq:]
	s.rcvNxt = end
	if !s.readShut {
		s.in = append(s.in, data...)
	}
}

func (s *simStream) fault(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: s.LocalAddr(), Addr: s.RemoteAddr(), Err: err}
}

func (s *simStream) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.closed:
			return 0, s.fault("read", net.ErrClosed)
		case expired(s.rDeadline):
			return 0, s.fault("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case len(s.in) > 0:
			n := copy(p, s.in)
			s.in = s.in[n:]
			if len(s.in) == 0 {
				s.in = nil // do not keep the array of a burst
			}
			// Tell a sender that may wait for it that there is room again.
			if s.state == streamOpen && !s.gotFIN && s.rcvNxt+uint64(streamBuffer-len(s.in)) >= s.edge+streamBuffer/4 {
				s.acknowledge()
			}
			return n, nil
		case s.gotFIN || s.readShut:
			return 0, io.EOF
		case s.state == streamDead:
			if s.err == nil {
				return 0, io.EOF
			}
			return 0, s.fault("read", s.err)
		}
		s.cond.Wait()
	}
}

func (s *simStream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.writing { // one Write at a time, as on a real connection
		if err := s.writable(); err != nil {
			return 0, err
		}
		s.cond.Wait()
	}
	s.writing = true
	defer func() {
		s.writing = false
		s.cond.Broadcast()
	}()
	written := 0
	for {
		if err := s.writable(); err != nil {
			return written, err
		}
		n := min(streamBuffer-len(s.out), len(p)-written)
		if n > 0 {
			s.out = append(s.out, p[written:written+n]...)
			written += n
			s.flush()
		}
		if written == len(p) {
			return written, nil
		}
		s.cond.Wait()
	}
}

// writable returns nil, or why a write must fail now.
func (s *simStream) writable() error {
	switch {
	case s.closed:
		return s.fault("write", net.ErrClosed)
	case s.state == streamDead && s.err != nil:
		return s.fault("write", s.err)
	case s.state == streamDead, s.wantFIN:
		return s.fault("write", os.NewSyscallError("write", syscall.EPIPE))
	case expired(s.wDeadline):
		return s.fault("write", os.ErrDeadlineExceeded)
	}
	return nil
}

// Close ends the stream: what has been written is still sent in the
// background. Received data that nobody has read resets the stream, as a
// kernel does.
func (s *simStream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return s.fault("close", net.ErrClosed)
	}
	s.closed, s.closedAt = true, time.Now()
	if s.state == streamOpen {
		if s.linger == 0 || len(s.in) > 0 {
			s.emit(flagRST, s.nxt, nil)
			s.die(net.ErrClosed)
		} else {
			s.wantFIN = true
			s.flush()
			if s.finAcked && s.gotFIN {
				s.die(nil)
			} else {
				s.rearm()
			}
		}
	}
	s.in = nil
	s.cond.Broadcast()
	return nil
}

func (s *simStream) CloseRead() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return s.fault("close", net.ErrClosed)
	}
	s.readShut, s.in = true, nil
	s.cond.Broadcast()
	return nil
}

func (s *simStream) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return s.fault("close", net.ErrClosed)
	}
	if s.state == streamDead {
		return s.fault("close", syscall.ENOTCONN)
	}
	s.wantFIN = true
	s.flush()
	return nil
}

func (s *simStream) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(s.key.local) }
func (s *simStream) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(s.key.remote) }

func (s *simStream) SetDeadline(t time.Time) error { return s.setDeadlines(&t, &t) }

func (s *simStream) SetReadDeadline(t time.Time) error { return s.setDeadlines(&t, nil) }

func (s *simStream) SetWriteDeadline(t time.Time) error { return s.setDeadlines(nil, &t) }

func (s *simStream) setDeadlines(r, w *time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return s.fault("set", net.ErrClosed)
	}
	if r != nil {
		s.rDeadline = *r
		s.rAlarm = ring(s.rAlarm, *r, s.mu.Lock, s.mu.Unlock, s.cond)
	}
	if w != nil {
		s.wDeadline = *w
		s.wAlarm = ring(s.wAlarm, *w, s.mu.Lock, s.mu.Unlock, s.cond)
	}
	s.cond.Broadcast()
	return nil
}

// ReadFrom implements io.ReaderFrom.
func (s *simStream) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{s}, r)
}

func (s *simStream) SetLinger(sec int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.linger = sec
	return nil
}

func (s *simStream) SetKeepAlive(on bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noAlive = !on
	s.rearm()
	return nil
}

// SetKeepAlivePeriod is accepted and has no effect: the period is 15 s.
func (s *simStream) SetKeepAlivePeriod(time.Duration) error { return nil }

// SetNoDelay is accepted and has no effect: data is always sent at once.
func (s *simStream) SetNoDelay(bool) error { return nil }

// SetWriteBuffer is accepted and has no effect.
func (s *simStream) SetWriteBuffer(int) error { return nil }

// SetReadBuffer is accepted and has no effect.
func (s *simStream) SetReadBuffer(int) error { return nil }
