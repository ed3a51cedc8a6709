package discovery

import (
	"crypto/md5"
	"net/netip"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// guests are the members that are known by look-up alone: nodes of Apache
// Tomcat with its CloudMembershipService, which sends no heartbeats. It is pure.
type guests struct {
	drop  time.Duration
	port  int // all nodes use the same, as Tomcat takes for granted
	hosts map[netip.Addr]*guest
}

// guest is a host that look-ups name and that sends no heartbeats.
type guest struct {
	peer     Peer
	since    time.Time // when it was named first, or fell silent
	missing  time.Time // since when no answer names it; zero if the last one does
	next     time.Time // of the next check
	checking bool
	failed   int            // checks in a row
	member   channel.Member // zero until a check has succeeded
}

func newGuests(drop time.Duration, port int) *guests {
	return &guests{drop: drop, port: port, hosts: map[netip.Addr]*guest{}}
}

// tomcatID is the id that Tomcat gives to a node: the MD5 of the pod's uid, or of
// the text of its address.
func tomcatID(p Peer) channel.UniqueID {
	text := p.Identity
	if text == "" {
		text = p.Addr.Addr().String()
	}
	return md5.Sum([]byte(text))
}

// seed takes a member that an earlier instance knew; look-ups must confirm it.
func (g *guests) seed(m channel.Member, now time.Time) {
	g.hosts[m.Host] = &guest{
		peer: Peer{Addr: m.Addr()}, since: now, missing: now, next: now.Add(g.drop), member: m,
	}
}

// answer takes over the addresses of a look-up; live says which hosts send
// heartbeats, own is this node's. A pod with another identity at the same address
// is another member.
func (g *guests) answer(events []channel.MemberEvent, peers []Peer, own netip.Addr, live map[netip.Addr]int, now time.Time) []channel.MemberEvent {
	named := map[netip.Addr]bool{}
	for _, p := range peers {
		host := p.Addr.Addr()
		if host == own || live[host] > 0 {
			continue
		}
		named[host] = true
		e := g.hosts[host]
		if e != nil && !e.member.IsZero() && e.member.ID != tomcatID(p) {
			events = append(events, channel.MemberEvent{Kind: channel.MemberLost, Member: e.member, Err: channel.ErrReplaced})
			e = nil
		}
		if e == nil {
			e = &guest{since: now, next: now.Add(g.drop)}
			g.hosts[host] = e
		}
		e.peer, e.missing = p, time.Time{}
	}
	for host, e := range g.hosts {
		if !named[host] && e.missing.IsZero() {
			e.missing = now
		}
	}
	return events
}

// replaced takes away the guest whose address a member with heartbeats has.
func (g *guests) replaced(events []channel.MemberEvent, m channel.Member) []channel.MemberEvent {
	e := g.hosts[m.Host.Unmap()]
	if e == nil {
		return events
	}
	delete(g.hosts, m.Host.Unmap())
	if !e.member.IsZero() {
		events = append(events, channel.MemberEvent{Kind: channel.MemberLost, Member: e.member, Err: channel.ErrReplaced})
	}
	return events
}

// due returns the hosts to be checked now.
func (g *guests) due(now time.Time) (hosts []netip.Addr) {
	for host, e := range g.hosts {
		if !e.checking && e.missing.IsZero() && !now.Before(e.next) {
			hosts = append(hosts, host)
		}
	}
	return hosts
}

// expire takes away those that look-ups have not named for the drop time.
func (g *guests) expire(events []channel.MemberEvent, now time.Time) []channel.MemberEvent {
	for host, e := range g.hosts {
		if !e.missing.IsZero() && now.Sub(e.missing) >= g.drop {
			delete(g.hosts, host)
			if !e.member.IsZero() {
				events = append(events, channel.MemberEvent{Kind: channel.MemberLost, Member: e.member})
			}
		}
	}
	return events
}

// checksToLose is how many checks in a row must fail before a guest is lost.
const checksToLose = 2

// checked takes the result of a check. A guest comes with the first success and
// is lost with the second failure in a row.
func (g *guests) checked(events []channel.MemberEvent, host netip.Addr, err error, now time.Time) []channel.MemberEvent {
	e := g.hosts[host]
	if e == nil {
		return events
	}
	e.checking = false
	e.next = now.Add(g.drop)
	if err != nil {
		if e.failed++; e.failed >= checksToLose {
			e.next = now.Add(g.drop * time.Duration(min(e.failed, 10)))
		}
		if e.failed >= checksToLose && !e.member.IsZero() {
			events = append(events, channel.MemberEvent{Kind: channel.MemberLost, Member: e.member, Err: err})
			e.member = channel.Member{}
		}
		return events
	}
	e.failed = 0
	if !e.member.IsZero() || !e.missing.IsZero() {
		return events
	}
	e.member = channel.Member{ID: tomcatID(e.peer), Host: host, Port: g.port, SecurePort: -1, UDPPort: -1}
	if !e.peer.Since.IsZero() {
		e.member.Alive = max(0, now.Sub(e.peer.Since)).Truncate(time.Millisecond)
	}
	return append(events, channel.MemberEvent{Kind: channel.MemberAdded, Member: e.member})
}
