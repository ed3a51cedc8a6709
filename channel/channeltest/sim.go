package channeltest

import (
	"cmp"
	"container/heap"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/logging"
	"github.com/pion/transport/v2/vnet"
)

// SimConfig describes a simulated network. The zero value is a network of
// 1 ms latency that loses nothing.
type SimConfig struct {
	// Seed decides the fate of packets: two runs with the same seed and the
	// same traffic lose the same packets.
	Seed uint64
	// Link is the policy of all links that [SimNet.SetLink] does not set.
	// Its latency is 1 ms if not set.
	Link LinkPolicy
	// UserTimeout is how long a stream goes on sending without an
	// acknowledgement before it fails; 20 s if not set.
	UserTimeout time.Duration
	// MaxInFlight bounds the packets that are on their way at any time;
	// further ones are lost. 65,536 if not set.
	MaxInFlight int
}

// LinkPolicy says what happens to packets from one node to another. Every
// direction has its own.
type LinkPolicy struct {
	// Latency is how long a packet travels, at least 1 µs.
	Latency time.Duration
	// Jitter is the most that a packet is delayed in addition; it reorders.
	Jitter time.Duration
	// Loss is the probability, 0 to 1, that a packet is lost.
	Loss float64
	// Cut loses everything, also what is on its way.
	Cut bool
}

const (
	simCIDR            = "10.0.0.0/8"
	defaultLatency     = time.Millisecond
	minLatency         = time.Microsecond
	selfLatency        = 10 * time.Microsecond
	defaultUserTimeout = 20 * time.Second
	defaultMaxInFlight = 1 << 16
)

// PacketKind says what a simulated packet carries.
type PacketKind uint8

const (
	// Datagram is a UDP datagram to one address.
	Datagram PacketKind = iota + 1
	// GroupDatagram is one member's copy of a multicast datagram.
	GroupDatagram
	// Segment is a piece of a stream, or its control.
	Segment
)

// String returns the kind in one word.
func (k PacketKind) String() string {
	switch k {
	case Datagram:
		return "udp"
	case GroupDatagram:
		return "multicast"
	case Segment:
		return "tcp"
	}
	return "unknown"
}

// Packet is what a tap sees of one packet.
type Packet struct {
	// Sent and Arrived are virtual times; Arrived is when a lost packet would
	// have arrived.
	Sent, Arrived time.Time
	Kind          PacketKind
	From, To      netip.AddrPort
	// Length counts the bytes of the datagram, or of the piece of the stream
	// without its header.
	Length int
	// Lost says that the packet does not arrive.
	Lost bool
	// Payload is valid only during the call and must not be changed.
	Payload []byte
}

// String returns one line for a trace, without the payload.
func (p Packet) String() string {
	fate := "arrives"
	if p.Lost {
		fate = "lost"
	}
	return fmt.Sprintf("%s %s %s > %s %d %s", p.Sent.UTC().Format("15:04:05.000000"), p.Kind, p.From, p.To, p.Length, fate)
}

// SimStats counts packets.
type SimStats struct{ Sent, Lost, Overflow int64 }

// SimNet is a simulated network for tests in virtual time. Its nodes are
// transport.Nets; streams, datagrams and multicast all travel as packets that
// obey the same cuts, losses and delays.
//
// All of it, and everything that uses it, must be made inside one
// testing/synctest bubble: use [Run].
type SimNet struct {
	config SimConfig
	router *vnet.Router
	wake   chan struct{} // holds at most one token: the head of queue changed
	stop   chan struct{}
	done   chan struct{} // closed when deliver has returned

	mu     sync.Mutex // guards what follows; never held while blocking
	nodes  map[netip.Addr]*SimNode
	births map[netip.Addr]uint64 // how many nodes an address has had
	side   map[netip.Addr]int    // the side of a partition; nil without one
	links  map[link]LinkPolicy
	counts map[link]uint64
	groups map[groupKey][]*simUDP
	hosts  map[string][]netip.Addr
	queue  packetQueue
	stats  SimStats
	taps   []func(Packet)
	closed bool
}

type link struct{ from, to netip.Addr }

// groupKey is a multicast group. On a loopback interface it ends at the node.
type groupKey struct {
	group netip.AddrPort
	node  netip.Addr // invalid for the group on the network
}

// vnetGlobals guards the counter of hardware addresses, which vnet increments
// without a lock whenever a router or a net is made.
var vnetGlobals sync.Mutex

// Run runs f with a new simulated network inside a synctest bubble. When f has
// returned all nodes are crashed, and the test fails if a goroutine is left.
func Run(t *testing.T, c SimConfig, f func(t *testing.T, nw *SimNet)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		nw, err := NewSimNet(c)
		if err != nil {
			t.Fatal(err)
		}
		defer nw.Close()
		f(t, nw)
	})
}

// NewSimNet starts a network. Call it inside a bubble, and Close at its end;
// [Run] does both.
func NewSimNet(c SimConfig) (*SimNet, error) {
	if c.UserTimeout <= 0 {
		c.UserTimeout = defaultUserTimeout
	}
	if c.MaxInFlight <= 0 {
		c.MaxInFlight = defaultMaxInFlight
	}
	c.Link = c.Link.complete()
	vnetGlobals.Lock()
	router, err := vnet.NewRouter(&vnet.RouterConfig{CIDR: simCIDR, LoggerFactory: logging.NewDefaultLoggerFactory()})
	vnetGlobals.Unlock()
	if err != nil {
		return nil, fmt.Errorf("channeltest: make router: %w", err)
	}
	if err := router.Start(); err != nil {
		return nil, fmt.Errorf("channeltest: start router: %w", err)
	}
	nw := &SimNet{
		config: c,
		router: router,
		wake:   make(chan struct{}, 1),
		stop:   make(chan struct{}),
		done:   make(chan struct{}),
		nodes:  map[netip.Addr]*SimNode{},
		births: map[netip.Addr]uint64{},
		links:  map[link]LinkPolicy{},
		counts: map[link]uint64{},
		groups: map[groupKey][]*simUDP{},
		hosts:  map[string][]netip.Addr{},
	}
	go nw.deliver()
	return nw, nil
}

func (p LinkPolicy) complete() LinkPolicy {
	if p.Latency == 0 {
		p.Latency = defaultLatency
	}
	p.Latency = max(p.Latency, minLatency)
	return p
}

// Seed returns the seed of the configuration.
func (nw *SimNet) Seed() uint64 { return nw.config.Seed }

// Close crashes all nodes and stops the network. It works twice.
func (nw *SimNet) Close() {
	nw.mu.Lock()
	if nw.closed {
		nw.mu.Unlock()
		return
	}
	nw.closed = true
	nodes := nw.sortedNodes()
	nw.mu.Unlock()
	for _, n := range nodes {
		n.Crash()
	}
	close(nw.stop)
	<-nw.done
	_ = nw.router.Stop() // fails only if it is not running
}

// Node returns the node with that IPv4 address inside 10.0.0.0/8. It makes the
// node if there is none, or if the last one of that address has crashed. A bad
// address panics: it is a mistake in the test.
func (nw *SimNet) Node(ip string) *SimNode {
	addr := simAddr(ip)
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if n := nw.nodes[addr]; n != nil && !n.isDown() {
		return n
	}
	nw.births[addr]++
	n, err := newSimNode(nw, addr, nw.births[addr])
	if err != nil {
		panic(fmt.Sprintf("channeltest: make node %s: %v", ip, err))
	}
	nw.nodes[addr] = n
	return n
}

// Nodes returns count nodes: 10.0.0.1, 10.0.0.2 and so on.
func (nw *SimNet) Nodes(count int) []*SimNode {
	out := make([]*SimNode, count)
	for i := range out {
		out[i] = nw.Node(netip.AddrFrom4([4]byte{10, 0, byte((i + 1) >> 8), byte(i + 1)}).String())
	}
	return out
}

func simAddr(ip string) netip.Addr {
	addr, err := netip.ParseAddr(ip)
	if err != nil || !netip.MustParsePrefix(simCIDR).Contains(addr) {
		panic(fmt.Sprintf("channeltest: %q is not an address inside %s", ip, simCIDR))
	}
	return addr
}

// sortedNodes returns the nodes by address. The caller holds mu.
func (nw *SimNet) sortedNodes() []*SimNode {
	out := make([]*SimNode, 0, len(nw.nodes))
	for _, n := range nw.nodes {
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b *SimNode) int { return a.addr.Compare(b.addr) })
	return out
}

// Partition splits the network: nodes reach only nodes of their own group. The
// nodes that are not listed form a group of their own. It replaces an earlier
// partition.
func (nw *SimNet) Partition(groups ...[]string) {
	side := map[netip.Addr]int{}
	for i, g := range groups {
		for _, ip := range g {
			side[simAddr(ip)] = i + 1
		}
	}
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.side = side
}

// Isolate cuts the listed nodes off from all others and from each other.
func (nw *SimNet) Isolate(ips ...string) {
	groups := make([][]string, len(ips))
	for i, ip := range ips {
		groups[i] = []string{ip}
	}
	nw.Partition(groups...)
}

// Heal ends a partition. Links that were cut by SetLink stay cut.
func (nw *SimNet) Heal() {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.side = nil
}

// SetLink sets the policy of packets from one node to another, in that
// direction only.
func (nw *SimNet) SetLink(from, to string, p LinkPolicy) {
	l := link{simAddr(from), simAddr(to)}
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.links[l] = p.complete()
}

// ResetLinks gives all links the policy of the configuration again.
func (nw *SimNet) ResetLinks() {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	clear(nw.links)
}

// SetHost sets the addresses that a name resolves to on all nodes; without
// addresses the name does not resolve any more.
func (nw *SimNet) SetHost(name string, ips ...string) {
	addrs := make([]netip.Addr, len(ips))
	for i, ip := range ips {
		addrs[i] = netip.MustParseAddr(ip)
	}
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.hosts[name] = addrs
}

// Tap calls f for every packet when it arrives, or would have arrived, one at a
// time. f must not block and must not use the network.
func (nw *SimNet) Tap(f func(Packet)) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.taps = append(nw.taps, f)
}

// Stats returns the counts so far.
func (nw *SimNet) Stats() SimStats {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	return nw.stats
}

// parcel is a packet on its way.
type parcel struct {
	packet Packet
	link   link
	order  uint64 // per link
	// send puts the packet on the wire of vnet. It does not block.
	send func()
}

// transmit decides the fate of a packet and sends it on its way. salt stands
// for what distinguishes packets of the same length between the same ports: it
// must not depend on random bytes. transmit does not block.
func (nw *SimNet) transmit(p Packet, l link, salt uint64, send func()) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if nw.closed {
		return
	}
	nw.stats.Sent++
	policy := nw.policy(l)
	p.Sent = time.Now()
	fate := mix(nw.config.Seed, addrBits(l.from), addrBits(l.to), uint64(p.Sent.UnixNano()),
		uint64(p.From.Port())<<16|uint64(p.To.Port()), uint64(p.Kind)<<32|uint64(p.Length), salt)
	p.Lost = policy.Cut || float64(fate>>11)/(1<<53) < policy.Loss
	delay := policy.Latency
	if policy.Jitter > 0 {
		delay += time.Duration(mix(fate, 1) % uint64(policy.Jitter))
	}
	p.Arrived = p.Sent.Add(delay)
	if len(nw.queue) >= nw.config.MaxInFlight {
		nw.stats.Overflow++
		nw.stats.Lost++
		return
	}
	nw.counts[l]++
	heap.Push(&nw.queue, &parcel{packet: p, link: l, order: nw.counts[l], send: send})
	if nw.queue[0].order == nw.counts[l] && nw.queue[0].link == l {
		select {
		case nw.wake <- struct{}{}:
		default:
		}
	}
}

// policy returns the policy of a link. The caller holds mu.
func (nw *SimNet) policy(l link) LinkPolicy {
	if l.from == l.to {
		return LinkPolicy{Latency: selfLatency}
	}
	p, ok := nw.links[l]
	if !ok {
		p = nw.config.Link
	}
	if nw.side != nil && nw.side[l.from] != nw.side[l.to] {
		p.Cut = true
	}
	return p
}

// deliver hands over packets when they are due. All packets of one instant have
// been queued before it comes, because every packet takes time: their order
// does not depend on which goroutine ran first.
func (nw *SimNet) deliver() {
	defer close(nw.done)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		p, taps, wait := nw.next()
		if p != nil {
			for _, tap := range taps {
				tap(p.packet)
			}
			if !p.packet.Lost {
				p.send()
			}
			continue
		}
		// With nothing to wait for there must be no timer: a far one would hide
		// a deadlock of the test.
		due := timer.C
		if wait == never {
			due = nil
			timer.Stop()
		} else {
			timer.Reset(wait)
		}
		select {
		case <-due:
		case <-nw.wake:
		case <-nw.stop:
			return
		}
	}
}

const never = time.Duration(math.MaxInt64)

// next takes the next packet that is due, or says how long to wait for one.
func (nw *SimNet) next() (*parcel, []func(Packet), time.Duration) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if len(nw.queue) == 0 {
		return nil, nil, never
	}
	if wait := time.Until(nw.queue[0].packet.Arrived); wait > 0 {
		return nil, nil, wait
	}
	p := heap.Pop(&nw.queue).(*parcel)
	if nw.policy(p.link).Cut {
		p.packet.Lost = true
	}
	if p.packet.Lost {
		nw.stats.Lost++
	}
	return p, nw.taps, 0
}

// packetQueue is a heap by time of arrival, then by what does not depend on the
// order in which goroutines ran.
type packetQueue []*parcel

func (q packetQueue) Len() int      { return len(q) }
func (q packetQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *packetQueue) Push(x any)   { *q = append(*q, x.(*parcel)) }
func (q packetQueue) Less(i, j int) bool {
	a, b := q[i], q[j]
	return cmp.Or(
		a.packet.Arrived.Compare(b.packet.Arrived),
		a.link.from.Compare(b.link.from),
		a.link.to.Compare(b.link.to),
		cmp.Compare(a.packet.Kind, b.packet.Kind),
		cmp.Compare(a.packet.From.Port(), b.packet.From.Port()),
		cmp.Compare(a.packet.To.Port(), b.packet.To.Port()),
		cmp.Compare(a.order, b.order),
	) < 0
}

func (q *packetQueue) Pop() any {
	old := *q
	p := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return p
}

// resolve returns the first address of a name, as a resolver would.
func (nw *SimNet) resolve(name string) (net.IP, error) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	addrs := nw.hosts[name]
	if len(addrs) == 0 {
		return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
	}
	return addrs[0].AsSlice(), nil
}

func addrBits(a netip.Addr) uint64 {
	b := a.As4()
	return uint64(b[0])<<24 | uint64(b[1])<<16 | uint64(b[2])<<8 | uint64(b[3])
}

// mix hashes words with the finaliser of SplitMix64.
func mix(words ...uint64) uint64 {
	h := uint64(0x9e3779b97f4a7c15)
	for _, w := range words {
		h ^= w
		h += 0x9e3779b97f4a7c15
		h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
		h = (h ^ h>>27) * 0x94d049bb133111eb
		h ^= h >> 31
	}
	return h
}
