// Package domain is the interceptor that keeps members and messages of other
// domains out. It imports package channel only; it must not import core,
// plugins or fx.
package domain

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// Config is what a user writes.
type Config struct {
	// Domain is whose members and messages pass: text in ASCII, or a list of
	// signed bytes as Tomcat writes it, "{1,2,-3}", "{}" for members without a
	// domain. Empty means the domain of the local member.
	Domain string `yaml:"domain"`
	// LogInterval is the number of refused messages per line in the log; 0 for
	// none.
	LogInterval int64 `yaml:"log_interval"`
}

// Defaults lets the own domain pass.
var Defaults = Config{LogInterval: 100}

// maxDomain bounds a domain, in bytes. It has to fit into a member record.
const maxDomain = 32 << 10

// Validate implements channel.Validator.
func (c *Config) Validate() error {
	if _, err := parse(c.Domain); err != nil {
		return err
	}
	if c.LogInterval < 0 {
		return fmt.Errorf("domain: log_interval is %d, must not be negative", c.LogInterval)
	}
	return nil
}

// parse returns the bytes that a domain stands for.
func parse(s string) (string, error) {
	if len(s) > maxDomain {
		return "", fmt.Errorf("domain: domain has %d bytes, must have at most %d", len(s), maxDomain)
	}
	list, ok := strings.CutPrefix(strings.TrimSpace(s), "{")
	if !ok {
		for _, r := range s {
			if r < ' ' || r > '~' {
				return "", fmt.Errorf("domain: domain %q is not plain ASCII: write it as a list of bytes such as {76,-61}", s)
			}
		}
		return s, nil
	}
	list, ok = strings.CutSuffix(list, "}")
	if !ok {
		return "", fmt.Errorf("domain: domain %q begins a list of bytes that does not end: add a }", s)
	}
	if strings.TrimSpace(list) == "" {
		return "", nil
	}
	var b []byte
	for word := range strings.SplitSeq(list, ",") {
		n, err := strconv.ParseInt(strings.TrimSpace(word), 10, 8)
		if err != nil {
			return "", fmt.Errorf("domain: domain %q: %q is no signed byte, -128 to 127", s, strings.TrimSpace(word))
		}
		b = append(b, byte(n))
	}
	return string(b), nil
}

// Factory makes domain filters.
var Factory = channel.FactoryOf("domain", Defaults, func(c Config, s channel.Settings) (channel.Interceptor, error) { return New(c, s) })

// errForeign is what the sender of a refused message gets to hear.
var errForeign = fmt.Errorf("domain: a message of another domain is refused: %w", channel.ErrNotMember)

// Interceptor passes on what comes from its own domain. Its handlers do not
// allocate.
type Interceptor struct {
	cfg    Config
	own    bool // the domain is that of the local member
	domain string
	log    *zap.Logger

	refused *channel.Counter
}

// New makes a domain filter.
func New(c Config, s channel.Settings) (*Interceptor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	domain, err := parse(c.Domain)
	if err != nil {
		return nil, err
	}
	return &Interceptor{
		cfg: c, own: c.Domain == "", domain: domain, log: s.Logger,
		refused: s.Metrics.Counter("domain_refused_total", "Received messages that were refused because their sender is of another domain."),
	}, nil
}

// Descriptor implements channel.Interceptor.
func (d *Interceptor) Descriptor() channel.Descriptor {
	return channel.Descriptor{
		Name:         "domain",
		SendInterest: &channel.Interest{MaxSize: -1},
		Promise:      "shows members, and passes on messages, of one domain only",
	}
}

// passes reports whether a member of the given domain is one of ours.
func (d *Interceptor) passes(domain, local string) bool {
	if d.own {
		return domain == local
	}
	return domain == d.domain
}

// HandleReceive implements channel.ReceiveHandler: a message of another domain
// is refused, and its sender told if it waits.
func (d *Interceptor) HandleReceive(ctx context.Context, l channel.Link, m *channel.Message) error {
	local := d.domain
	if d.own {
		local = l.Local().Domain
	}
	if m.From.Domain == local {
		return l.Deliver(ctx, m)
	}
	d.refused.Inc()
	if n := d.refused.Value(); d.cfg.LogInterval > 0 && (n-1)%d.cfg.LogInterval == 0 {
		d.log.Warn("messages of another domain were refused; give the groups different multicast addresses to save the traffic",
			zap.Int64("refused", n), zap.Stringer("last_sender", m.From), zap.String("its_domain", show(m.From.Domain)), zap.String("own_domain", show(local)))
	}
	return errForeign
}

// show prints a domain for the log: foreign bytes are quoted, long ones cut.
func show(domain string) string {
	const most = 64
	if len(domain) > most {
		return strconv.QuoteToASCII(domain[:most]) + "…"
	}
	return strconv.QuoteToASCII(domain)
}

// FilterView implements channel.ViewFilter.
func (d *Interceptor) FilterView(below channel.View) channel.View {
	var members []channel.Member
	for _, m := range below.Members {
		if d.passes(m.Domain, below.Local.Domain) {
			members = append(members, m)
		}
	}
	return channel.NewView(below.Version, below.Local, members)
}
