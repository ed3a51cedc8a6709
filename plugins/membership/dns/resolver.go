package dns

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/pion/transport/v2"
	"golang.org/x/net/dns/dnsmessage"
)

// resolver asks name servers (RFC 1035, 2782, 3596, 6891). The standard library's
// does not tell how long an answer is valid, and cannot be had on a simulated
// network.
type resolver struct {
	net     transport.Net
	timeout time.Duration
	fixed   []netip.AddrPort // the servers; empty for those of /etc/resolv.conf
}

const (
	// udpSize is the size of an answer by datagram that is asked for, in bytes:
	// what passes everywhere without fragments. Longer ones come by TCP.
	udpSize = 1232
	// maxRecords bounds the records of one answer that are looked at.
	maxRecords = 8192
	// maxAliases bounds the length of a chain of CNAMEs.
	maxAliases = 16
	// maxStrays bounds the datagrams that are no answer to the question.
	maxStrays = 64
	// maxServers and maxSearch bound what is taken from resolv.conf.
	maxServers, maxSearch = 3, 6
	resolvConf            = "/etc/resolv.conf"
)

// errNoName says that a server knows no such name or no such records of it.
var errNoName = errors.New("the name has no such records")

// answer is what was found.
type answer struct {
	addrs    []netip.Addr
	services []service
	extra    map[string][]netip.Addr // addresses of targets, by name
	alias    string                  // where the chain of CNAMEs ends, if without records
	ttl      time.Duration
}

// service is an SRV record.
type service struct {
	target string
	port   uint16
}

// settings are what resolv.conf says.
type settings struct {
	servers []netip.AddrPort
	search  []string
	ndots   int
}

// addresses returns the A and AAAA records of name. One kind is enough.
func (r *resolver) addresses(ctx context.Context, name string) (answer, error) {
	out := answer{ttl: math.MaxInt64}
	var errs []error
	for _, t := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
		a, err := r.resolve(ctx, name, t)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out.addrs = append(out.addrs, a.addrs...)
		out.ttl = min(out.ttl, a.ttl)
	}
	if len(out.addrs) > 0 {
		return out, nil
	}
	if len(errs) == 2 && errors.Is(errs[0], errNoName) && errors.Is(errs[1], errNoName) {
		errs = errs[:1]
	}
	return answer{}, fmt.Errorf("look up the addresses of %s: %w", name, errors.Join(errs...))
}

// services returns the SRV records of name.
func (r *resolver) services(ctx context.Context, name string) (answer, error) {
	a, err := r.resolve(ctx, name, dnsmessage.TypeSRV)
	if err != nil {
		return answer{}, fmt.Errorf("look up the SRV records of %s: %w", name, err)
	}
	return a, nil
}

// resolve asks for one kind of records, following the search list and aliases.
func (r *resolver) resolve(ctx context.Context, name string, t dnsmessage.Type) (answer, error) {
	conf := settings{servers: r.fixed, ndots: 1}
	if len(r.fixed) == 0 {
		var err error
		if conf, err = readConf(resolvConf); err != nil {
			return answer{}, err
		}
	}
	var first error
	for _, full := range candidates(name, conf) {
		a, err := r.follow(ctx, full, t, conf.servers)
		if err == nil {
			return a, nil
		}
		if !errors.Is(err, errNoName) {
			return answer{}, err
		}
		first = cmp.Or(first, err)
	}
	return answer{}, cmp.Or(first, errNoName)
}

// candidates returns the names to ask for, in order.
func candidates(name string, c settings) (list []string) {
	if strings.HasSuffix(name, ".") {
		return []string{name}
	}
	for _, domain := range c.search {
		if len(name)+1+len(domain) <= 254 {
			list = append(list, name+"."+domain)
		}
	}
	if strings.Count(name, ".") >= c.ndots {
		return append([]string{name + "."}, list...)
	}
	return append(list, name+".")
}

// follow asks for a full name, and for those that it is an alias of.
func (r *resolver) follow(ctx context.Context, name string, t dnsmessage.Type, servers []netip.AddrPort) (answer, error) {
	ttl := time.Duration(math.MaxInt64)
	for range maxAliases {
		a, err := r.ask(ctx, name, t, servers)
		if err != nil {
			return answer{}, err
		}
		a.ttl = min(a.ttl, ttl)
		if len(a.addrs) > 0 || len(a.services) > 0 {
			return a, nil
		}
		if a.alias == "" {
			return answer{}, fmt.Errorf("%s: %w", name, errNoName)
		}
		name, ttl = a.alias, a.ttl
	}
	return answer{}, fmt.Errorf("%s: the aliases go round in circles", name)
}

// ask asks the servers in turn.
func (r *resolver) ask(ctx context.Context, name string, t dnsmessage.Type, servers []netip.AddrPort) (answer, error) {
	var errs []error
	for _, s := range servers {
		a, err := r.exchange(ctx, name, t, s)
		if err == nil || errors.Is(err, errNoName) {
			return a, err
		}
		if err := ended(ctx); err != nil {
			return answer{}, err
		}
		errs = append(errs, fmt.Errorf("name server %s: %w", s, err))
	}
	if len(errs) == 0 {
		return answer{}, errors.New("no name server is known")
	}
	return answer{}, errors.Join(errs...)
}

// ended is ctx.Err, and also knows a deadline that has passed before the timer
// of the context was looked at.
func ended(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d, ok := ctx.Deadline(); ok && !time.Now().Before(d) {
		return context.DeadlineExceeded
	}
	return nil
}

// exchange asks one server, by datagram and, if the answer does not fit into
// one, by TCP.
func (r *resolver) exchange(ctx context.Context, name string, t dnsmessage.Type, server netip.AddrPort) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	for _, extended := range []bool{true, false} {
		query, q, id, err := question(name, t, extended)
		if err != nil {
			return answer{}, err
		}
		a, err := r.datagram(ctx, query, q, id, server)
		if errors.Is(err, errTruncated) {
			a, err = r.stream(ctx, query, q, id, server)
		}
		if !errors.Is(err, errFormat) { // a server that does not know EDNS
			return a, err
		}
	}
	return answer{}, errFormat
}

func question(name string, t dnsmessage.Type, extended bool) (query []byte, q dnsmessage.Question, id uint16, err error) {
	n, err := dnsmessage.NewName(name)
	if err != nil {
		return nil, q, 0, fmt.Errorf("%s: %w", name, err)
	}
	q = dnsmessage.Question{Name: n, Type: t, Class: dnsmessage.ClassINET}
	id = uint16(rand.Uint32())
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	err = errors.Join(b.StartQuestions(), b.Question(q))
	if extended {
		var h dnsmessage.ResourceHeader
		err = errors.Join(err, b.StartAdditionals(), h.SetEDNS0(udpSize, dnsmessage.RCodeSuccess, false), b.OPTResource(h, dnsmessage.OPTResource{}))
	}
	if err == nil {
		query, err = b.Finish()
	}
	if err != nil {
		return nil, q, 0, fmt.Errorf("%s: %w", name, err)
	}
	return query, q, id, nil
}

// closing makes ctx end the use of c.
func closing(ctx context.Context, c net.Conn) (done func()) {
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d) // closing ends it anyway
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	return func() { stop(); c.Close() }
}

func (r *resolver) datagram(ctx context.Context, query []byte, q dnsmessage.Question, id uint16, server netip.AddrPort) (answer, error) {
	network := "udp4"
	if server.Addr().Is6() {
		network = "udp6"
	}
	conn, err := r.net.DialUDP(network, nil, net.UDPAddrFromAddrPort(server))
	if err != nil {
		return answer{}, err
	}
	defer closing(ctx, conn)()
	if _, err := conn.Write(query); err != nil {
		return answer{}, err
	}
	buf := make([]byte, 64<<10)
	for range maxStrays {
		n, err := conn.Read(buf)
		if err != nil {
			return answer{}, cause(ctx, err)
		}
		if a, err := parse(buf[:n], q, id); !errors.Is(err, errStray) {
			return a, err
		}
	}
	return answer{}, errStray
}

func (r *resolver) stream(ctx context.Context, query []byte, q dnsmessage.Question, id uint16, server netip.AddrPort) (answer, error) {
	conn, err := channel.Dial(ctx, r.net, server)
	if err != nil {
		return answer{}, err
	}
	defer closing(ctx, conn)()
	if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)); err != nil {
		return answer{}, cause(ctx, err)
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return answer{}, cause(ctx, err)
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(conn, buf); err != nil {
		return answer{}, cause(ctx, err)
	}
	return parse(buf, q, id)
}

// cause returns why reading ended: the time, rather than the socket that was
// closed because of it.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil || channel.IsTimeout(err) {
		return errors.New("no answer in time")
	}
	return err
}

// Why an answer is not taken.
var (
	errStray     = errors.New("the datagrams that came are no answers to the question")
	errTruncated = errors.New("the answer is cut short")
	errFormat    = errors.New("the server cannot read the question")
	errMalformed = errors.New("the answer is malformed")
)

// fold makes names comparable.
func fold(n dnsmessage.Name) string { return strings.ToLower(n.String()) }

// parse reads the answer to q. Nothing of it is trusted.
func parse(b []byte, q dnsmessage.Question, id uint16) (answer, error) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || h.ID != id || !h.Response {
		return answer{}, errStray
	}
	if h.RCode == dnsmessage.RCodeFormatError {
		return answer{}, errFormat // it may not repeat the question
	}
	asked, err := p.Question()
	if err != nil || asked.Type != q.Type || asked.Class != q.Class || fold(asked.Name) != fold(q.Name) {
		return answer{}, errStray
	}
	if err := p.SkipAllQuestions(); err != nil {
		return answer{}, errMalformed
	}
	switch {
	case h.Truncated:
		return answer{}, errTruncated
	case h.RCode == dnsmessage.RCodeNameError:
		return answer{}, fmt.Errorf("%s: %w", q.Name, errNoName)
	case h.RCode != dnsmessage.RCodeSuccess:
		return answer{}, fmt.Errorf("the server answers %s", strings.TrimPrefix(h.RCode.String(), "RCode"))
	}
	s := records{byName: map[string][]netip.Addr{}, ttls: map[string]time.Duration{}, alias: map[string]string{}}
	if err := s.read(&p, q.Type, p.AnswerHeader, p.SkipAnswer); err != nil {
		return answer{}, err
	}
	out := s.answer(fold(q.Name))
	if q.Type != dnsmessage.TypeSRV {
		return out, nil
	}
	extra := records{byName: map[string][]netip.Addr{}, ttls: map[string]time.Duration{}, alias: map[string]string{}}
	if p.SkipAllAuthorities() == nil {
		_ = extra.read(&p, 0, p.AdditionalHeader, p.SkipAdditional) // they only save questions
	}
	out.extra = extra.byName
	for name := range extra.byName {
		out.ttl = min(out.ttl, extra.ttls[name])
	}
	return out, nil
}

// records are those of a section.
type records struct {
	byName   map[string][]netip.Addr
	services map[string][]service
	alias    map[string]string
	ttls     map[string]time.Duration // the shortest, by name
}

// read reads a section. want is the type of the question, 0 for all addresses.
func (s *records) read(p *dnsmessage.Parser, want dnsmessage.Type, next func() (dnsmessage.ResourceHeader, error), skip func() error) error {
	for range maxRecords {
		h, err := next()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return nil
		}
		if err != nil {
			return errMalformed
		}
		name := fold(h.Name)
		switch {
		case h.Class != dnsmessage.ClassINET:
			err = skip()
		case h.Type == dnsmessage.TypeA && (want == 0 || want == h.Type):
			var r dnsmessage.AResource
			if r, err = p.AResource(); err == nil {
				s.byName[name] = append(s.byName[name], netip.AddrFrom4(r.A))
			}
		case h.Type == dnsmessage.TypeAAAA && (want == 0 || want == h.Type):
			var r dnsmessage.AAAAResource
			if r, err = p.AAAAResource(); err == nil {
				s.byName[name] = append(s.byName[name], netip.AddrFrom16(r.AAAA).Unmap())
			}
		case h.Type == dnsmessage.TypeSRV && want == h.Type:
			var r dnsmessage.SRVResource
			if r, err = p.SRVResource(); err == nil && fold(r.Target) != "." && r.Port != 0 {
				if s.services == nil {
					s.services = map[string][]service{}
				}
				s.services[name] = append(s.services[name], service{fold(r.Target), r.Port})
			}
		case h.Type == dnsmessage.TypeCNAME:
			var r dnsmessage.CNAMEResource
			if r, err = p.CNAMEResource(); err == nil {
				s.alias[name] = fold(r.CNAME)
			}
		default:
			err = skip()
		}
		if err != nil {
			return errMalformed
		}
		if h.Type != dnsmessage.TypeOPT {
			ttl := time.Duration(h.TTL) * time.Second
			if old, ok := s.ttls[name]; !ok || ttl < old {
				s.ttls[name] = ttl
			}
		}
	}
	return nil // a longer one is used as far as it was read
}

// answer follows the aliases of name and returns the records at the end.
func (s *records) answer(name string) answer {
	a := answer{ttl: math.MaxInt64}
	for range maxAliases {
		if ttl, ok := s.ttls[name]; ok {
			a.ttl = min(a.ttl, ttl)
		}
		if a.addrs, a.services = s.byName[name], s.services[name]; len(a.addrs) > 0 || len(a.services) > 0 {
			a.alias = ""
			return a
		}
		next, ok := s.alias[name]
		if !ok {
			return a
		}
		name, a.alias = next, next
	}
	a.alias = ""
	return a
}

// readConf reads the servers, the search list and ndots of a resolv.conf.
func readConf(file string) (settings, error) {
	f, err := os.Open(file)
	if err != nil {
		return settings{}, fmt.Errorf("the list of name servers: %w", err)
	}
	defer f.Close()
	c, err := parseConf(io.LimitReader(f, 64<<10))
	if err != nil {
		return c, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

func parseConf(r io.Reader) (settings, error) {
	c := settings{ndots: 1}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		line, _, _ = strings.Cut(line, ";")
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		switch words[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(words[1]); err == nil && len(c.servers) < maxServers {
				c.servers = append(c.servers, netip.AddrPortFrom(a, 53))
			}
		case "domain", "search":
			c.search = nil
			for _, domain := range words[1:min(len(words), 1+maxSearch)] {
				if domain = strings.Trim(domain, "."); checkName(domain) == nil {
					c.search = append(c.search, domain+".")
				}
			}
		case "options":
			for _, o := range words[1:] {
				if v, ok := strings.CutPrefix(o, "ndots:"); ok {
					if n, err := strconv.Atoi(v); err == nil {
						c.ndots = min(max(n, 0), 15)
					}
				}
			}
		}
	}
	if err := lines.Err(); err != nil {
		return c, err
	}
	if len(c.servers) == 0 {
		c.servers = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53"), netip.MustParseAddrPort("[::1]:53")}
	}
	c.servers = slices.Clip(c.servers)
	return c, nil
}
