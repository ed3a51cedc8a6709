// Package remoteip is a valve that takes the client's address and scheme from
// what a trusted proxy says in X-Forwarded-For and X-Forwarded-Proto. It imports
// core and channel only.
package remoteip

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// Config is what users write.
type Config struct {
	// Trusted are addresses and networks (CIDR) of proxies. Default are the
	// loopback, link-local and private ones.
	Trusted []string `yaml:"trusted"`
	// ForHeader and ProtoHeader are the names of the headers; "off" ignores
	// one.
	ForHeader   string `yaml:"for_header"`
	ProtoHeader string `yaml:"proto_header"`
}

// maxHops bounds how many proxies of one request are followed.
const maxHops = 32

// off is the header name that ignores a header.
const off = "off"

// Default returns the defaults.
func Default() Config {
	return Config{
		Trusted: []string{
			"127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16",
			"::1/128", "fe80::/10", "fc00::/7",
		},
		ForHeader: "X-Forwarded-For", ProtoHeader: "X-Forwarded-Proto",
	}
}

// Validate checks the configuration.
func (c *Config) Validate() error {
	_, err := prefixes(c.Trusted)
	if c.ForHeader == "" || c.ProtoHeader == "" {
		err = errors.Join(err, errors.New(`remoteip: a header name is empty: write "off" to ignore that header`))
	}
	return err
}

func prefixes(list []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	var errs []error
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(s); err == nil {
				p = netip.PrefixFrom(a, a.BitLen())
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remoteip: trusted %q: write an address or a network as in 10.0.0.0/8", s))
			continue
		}
		out = append(out, p.Masked())
	}
	return out, errors.Join(errs...)
}

// Factory makes the valve from configuration.
var Factory = channel.FactoryOf("remoteip", Default(), func(c Config, s channel.Settings) (core.Valve, error) {
	return New(c, s)
})

// Valve replaces address and scheme.
type Valve struct {
	trusted     []netip.Prefix
	forHeader   string // canonical; empty ignores it
	protoHeader string
	malformed   *channel.Counter
}

// New returns the valve.
func New(c Config, s channel.Settings) (*Valve, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	v := &Valve{malformed: s.Metrics.Counter("remoteip_malformed_total", "Requests of trusted proxies with an unusable address or too many hops.")}
	v.trusted, _ = prefixes(c.Trusted) // validated
	if !strings.EqualFold(c.ForHeader, off) {
		v.forHeader = http.CanonicalHeaderKey(c.ForHeader)
	}
	if !strings.EqualFold(c.ProtoHeader, off) {
		v.protoHeader = http.CanonicalHeaderKey(c.ProtoHeader)
	}
	return v, nil
}

func (v *Valve) trusts(a netip.Addr) bool {
	return slices.ContainsFunc(v.trusted, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Wrap sets the request's RemoteAddr and the exchange's address and scheme. The
// port of a client behind a proxy is not known; it is given as 0.
func (v *Valve) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header[v.forHeader] == nil && r.Header[v.protoHeader] == nil {
			next.ServeHTTP(w, r)
			return
		}
		if peer, err := netip.ParseAddrPort(r.RemoteAddr); err == nil && v.trusts(peer.Addr().Unmap().WithZone("")) {
			v.apply(r)
		}
		next.ServeHTTP(w, r)
	})
}

func (v *Valve) apply(r *http.Request) {
	x := core.FromContext(r.Context())
	if lines := r.Header[v.forHeader]; len(lines) > 0 {
		if client, ok := v.client(lines); ok {
			r.RemoteAddr = netip.AddrPortFrom(client, 0).String()
			if x != nil {
				x.SetRemoteAddr(r.RemoteAddr)
			}
		}
	}
	if lines := r.Header[v.protoHeader]; len(lines) > 0 && x != nil {
		x.SetSecure(allHTTPS(lines))
	}
}

// client goes from the nearest hop to the first one that is not trusted. What
// lies behind that one could be invented. ok is false if there is no address.
func (v *Valve) client(lines []string) (client netip.Addr, ok bool) {
	hops := 0
	for _, line := range slices.Backward(lines) {
		for line != "" {
			hop := line
			if i := strings.LastIndexByte(line, ','); i >= 0 {
				line, hop = line[:i], line[i+1:]
			} else {
				line = ""
			}
			a, err := parseHop(hop)
			if hops++; err != nil || hops > maxHops {
				v.malformed.Inc()
				return client, ok
			}
			client, ok = a, true
			if !v.trusts(a) {
				return client, ok
			}
		}
	}
	return client, ok
}

// parseHop accepts an address with or without port and brackets.
func parseHop(s string) (netip.Addr, error) {
	s = strings.Trim(s, " \t\"")
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr().Unmap().WithZone(""), nil
	}
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
	return a.Unmap().WithZone(""), err
}

// allHTTPS reports whether every hop was https.
func allHTTPS(lines []string) bool {
	for _, line := range lines {
		for p := range strings.SplitSeq(line, ",") {
			if !strings.EqualFold(strings.TrimSpace(p), "https") {
				return false
			}
		}
	}
	return true
}
