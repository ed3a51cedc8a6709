package dns

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/pion/transport/v2"
	"golang.org/x/net/dns/dnsmessage"
)

// server is a small name server, for tests.
type server struct {
	udp  transport.UDPConn
	tcp  transport.TCPListener
	work sync.WaitGroup

	mu      sync.Mutex
	zone    map[string][]record // by name, in small letters, with the final dot
	rcode   dnsmessage.RCode    // what all questions are answered with, if not 0
	mute    bool                // answers nothing
	noEDNS  bool                // does not understand EDNS
	stray   bool                // sends other datagrams first
	extra   []record            // additional records
	asked   map[string]int      // questions by type and name
	streams int                 // questions by TCP
}

type record struct {
	name   string // if not that of the question
	a      string // an address
	cname  string
	target string // with port: an SRV record
	port   uint16
	ttl    uint32
}

func newServer(t testing.TB, n transport.Net, at netip.AddrPort) (*server, netip.AddrPort) {
	t.Helper()
	tcp, err := channel.ListenTCP(n, at)
	if err != nil {
		t.Fatal(err)
	}
	at = tcp.Addr().(*net.TCPAddr).AddrPort()
	udp, err := channel.ListenUDP(n, at)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{udp: udp, tcp: tcp, zone: map[string][]record{}, asked: map[string]int{}}
	s.work.Go(s.datagrams)
	s.work.Go(s.connections)
	return s, at
}

func (s *server) stop() {
	s.udp.Close()
	s.tcp.Close()
	s.work.Wait()
}

func (s *server) set(name string, rs ...record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.zone[name] = rs
}

func (s *server) with(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *server) datagrams() {
	buf := make([]byte, 65536)
	for {
		n, from, err := s.udp.ReadFrom(buf)
		if err != nil {
			return
		}
		var stray bool
		s.with(func() { stray = s.stray })
		if stray {
			_, _ = s.udp.WriteTo([]byte("noise"), from)
			b := s.answer(buf[:n], 512)
			if len(b) > 2 {
				b[0] ^= 0xff // of another question
				_, _ = s.udp.WriteTo(b, from)
			}
		}
		if b := s.answer(buf[:n], 512); b != nil {
			_, _ = s.udp.WriteTo(b, from)
		}
	}
}

func (s *server) connections() {
	for {
		c, err := s.tcp.Accept()
		if err != nil {
			return
		}
		s.work.Go(func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			var size [2]byte
			if _, err := io.ReadFull(c, size[:]); err != nil {
				return
			}
			q := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(c, q); err != nil {
				return
			}
			s.with(func() { s.streams++ })
			b := s.answer(q, 65535)
			_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
		})
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// answer returns the answer to a query, at most limit bytes or what the query
// allows, nil for none.
func (s *server) answer(query []byte, limit int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || s.mute {
		return nil
	}
	q, err := p.Question()
	must(err)
	must(p.SkipAllQuestions())
	must(p.SkipAllAnswers())
	must(p.SkipAllAuthorities())
	rcode := s.rcode
	if a, err := p.AdditionalHeader(); err == nil && a.Type == dnsmessage.TypeOPT {
		limit = max(limit, int(a.Class))
		if s.noEDNS {
			rcode = dnsmessage.RCodeFormatError
		}
	}
	name := strings.ToLower(q.Name.String())
	s.asked[q.Type.String()+" "+name]++
	rs, known := s.zone[name]
	if rcode == 0 && !known {
		rcode = dnsmessage.RCodeNameError
	}
	build := func(rs, extra []record, truncated bool) []byte {
		b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: h.ID, Response: true, RCode: rcode, Truncated: truncated})
		b.EnableCompression()
		must(b.StartQuestions())
		must(b.Question(q))
		must(b.StartAnswers())
		for _, r := range rs {
			add(&b, q, r, false)
		}
		must(b.StartAuthorities())
		must(b.StartAdditionals())
		for _, r := range extra {
			add(&b, q, r, true)
		}
		out, err := b.Finish()
		must(err)
		return out
	}
	if rcode != 0 {
		rs = nil
	}
	out := build(rs, s.extra, false)
	if len(out) > limit {
		out = build(nil, nil, true)
	}
	return out
}

func add(b *dnsmessage.Builder, q dnsmessage.Question, r record, all bool) {
	name := q.Name
	if r.name != "" {
		name = dnsmessage.MustNewName(r.name)
	}
	h := dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: r.ttl}
	switch {
	case r.cname != "":
		must(b.CNAMEResource(h, dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(r.cname)}))
	case r.target != "":
		if q.Type == dnsmessage.TypeSRV || all {
			must(b.SRVResource(h, dnsmessage.SRVResource{Port: r.port, Target: dnsmessage.MustNewName(r.target)}))
		}
	default:
		ip := netip.MustParseAddr(r.a)
		switch {
		case ip.Is4() && (q.Type == dnsmessage.TypeA || all):
			must(b.AResource(h, dnsmessage.AResource{A: ip.As4()}))
		case ip.Is6() && (q.Type == dnsmessage.TypeAAAA || all):
			must(b.AAAAResource(h, dnsmessage.AAAAResource{AAAA: ip.As16()}))
		}
	}
}

func hosts(ttl uint32, addrs ...string) (rs []record) {
	for _, a := range addrs {
		rs = append(rs, record{a: a, ttl: ttl})
	}
	return rs
}
