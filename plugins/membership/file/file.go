// Package file is the membership that reads the addresses of the nodes from a
// file, and follows its changes. The nodes send their heartbeats to the
// addresses that are listed.
//
// It imports channel, the reader of package config and the discovery that it
// shares with the memberships next to it, and must not import interceptors,
// valves, fx, go-plugin or grpc.
package file

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/discovery"
	"github.com/pion/transport/v2"
	"go.uber.org/zap"
)

// Name is the name of the membership in configuration.
const Name = "file"

// Config is what a user says about the membership.
type Config struct {
	// Path is the file: one host or host:port in each line, # for comments; or
	// YAML, if its name ends in .yaml or .yml: "members: [host:port, …]". The
	// ports are the UDP ports that the nodes listen on.
	Path string `yaml:"path"`
	// Poll is how often the file is looked at, even if the system tells of its
	// changes: not all file systems do.
	Poll time.Duration `yaml:"poll"`
	// Notify says whether the system is asked to tell of changes.
	Notify bool `yaml:"notify"`
	// Settle is how long a changed file must stay as it is before it is read:
	// somebody may still be writing.
	Settle time.Duration `yaml:"settle"`

	discovery.Options `yaml:",inline"`
}

const (
	// maxFile bounds the file, in bytes, maxLines the members that it lists.
	maxFile, maxLines = 1 << 20, 16384
	// unfinished is how long a file whose last line does not end must stay as
	// it is: it may have been written by half.
	unfinished = 2 * time.Second
	// refresh is how often host names are resolved again.
	refresh = 30 * time.Second
)

// Default returns the defaults; Path must be set by the user.
func Default() Config {
	return Config{
		Poll:    2 * time.Second,
		Notify:  true,
		Settle:  200 * time.Millisecond,
		Options: discovery.DefaultOptions(),
	}
}

// Validate reports all problems at once.
func (c *Config) Validate() error {
	var errs []error
	if c.Path == "" {
		errs = append(errs, errors.New("path: it is not set; write the file that lists the members"))
	} else if !filepath.IsAbs(c.Path) {
		errs = append(errs, fmt.Errorf("path: %q is relative, and the membership runs in a directory of its own; write an absolute path", c.Path))
	}
	if c.Poll < 10*time.Millisecond || c.Poll > time.Hour {
		errs = append(errs, fmt.Errorf("poll: %v is outside 10ms..1h", c.Poll))
	}
	if c.Settle < 0 || c.Settle > time.Minute {
		errs = append(errs, fmt.Errorf("settle: %v is outside 0..1m", c.Settle))
	}
	return errors.Join(append(errs, c.Options.Validate())...)
}

// New returns a membership that has not started.
func New(c Config, s channel.Settings) (channel.Membership, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("file: %w", err)
	}
	m, err := discovery.New(c.Options, newProvider(c, s), s)
	if err != nil {
		return nil, fmt.Errorf("file: %w", err)
	}
	return m, nil
}

func newProvider(c Config, s channel.Settings) *provider {
	const help = "Changes of the file that were not taken over, by reason; the last good list stands."
	p := &provider{
		cfg: c, net: s.Net, log: s.Logger,
		reads:      s.Metrics.Counter("file_reads_total", "Lists of members that were taken over."),
		unreadable: s.Metrics.Counter("file_refused_total", help, "reason", "unreadable"),
		malformed:  s.Metrics.Counter("file_refused_total", help, "reason", "malformed"),
		unresolved: s.Metrics.Counter("membership_resolve_errors_total", "Names of configured members that could not be resolved."),
		resolved:   map[string]netip.AddrPort{},
	}
	if p.log == nil {
		p.log = zap.NewNop()
	}
	return p
}

// provider follows the file.
type provider struct {
	cfg                                      Config
	net                                      transport.Net
	log                                      *zap.Logger
	reads, unreadable, malformed, unresolved *channel.Counter

	seen    []byte    // what the file held when it was looked at last
	since   time.Time // since when it has held that
	pending bool      // that has not been judged
	absent  bool      // that it cannot be read has been said

	members  []member // the last good list; nil before the first
	resolved map[string]netip.AddrPort
	next     time.Time // when names are resolved again
}

// member is a line: a literal address, or a name to be resolved.
type member struct {
	addr netip.AddrPort
	name string // host:port; empty for an address
}

// Run implements discovery.Provider.
func (p *provider) Run(ctx context.Context, found func([]discovery.Peer)) error {
	w := p.notifications()
	var changes <-chan fsnotify.Event
	var faults <-chan error
	if w != nil {
		defer w.Close()
		changes, faults = w.Events, w.Errors
	}
	poll := time.NewTicker(p.cfg.Poll)
	defer poll.Stop()
	for {
		wait, changed, err := p.look(time.Now())
		if err != nil {
			return err
		}
		if p.members != nil && (changed || !p.next.IsZero() && !time.Now().Before(p.next)) {
			found(p.resolve(ctx))
		}
		if err := p.wait(ctx, wait, poll.C, changes, faults); err != nil {
			return err
		}
	}
}

// wait returns when the file should be looked at: after d, if that is not 0, at
// the next tick, or when the system tells of a change.
func (p *provider) wait(ctx context.Context, d time.Duration, poll <-chan time.Time, changes <-chan fsnotify.Event, faults <-chan error) error {
	var soon <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		soon = t.C
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-soon:
	case <-poll:
	case <-changes:
	case err := <-faults: // of too many changes at once, for example
		p.log.Debug("the system's messages about the file failed", zap.Error(err))
	}
	return nil
}

// notifications asks the system to tell of changes in the file's directory: the
// file itself may be replaced. It returns nil if the system does not.
func (p *provider) notifications() *fsnotify.Watcher {
	if !p.cfg.Notify {
		return nil
	}
	w, err := fsnotify.NewWatcher()
	if err == nil {
		if err = w.Add(filepath.Dir(p.cfg.Path)); err == nil {
			return w
		}
		w.Close()
	}
	p.log.Info("the system does not tell of changes of the file; it is looked at now and then", zap.Duration("poll", p.cfg.Poll), zap.Error(err))
	return nil
}

// look reads the file, and judges it when it has stayed as it is for long
// enough; wait is when to look again, 0 for no special time. It fails only if
// there has never been a good list.
func (p *provider) look(now time.Time) (wait time.Duration, changed bool, err error) {
	b, err := readFile(p.cfg.Path)
	if err != nil {
		p.unreadable.Inc()
		if p.members == nil {
			return 0, false, err
		}
		if !p.absent {
			p.log.Warn("the list of members cannot be read; the last good one stands", zap.Error(err))
		}
		p.absent = true
		return 0, false, nil
	}
	p.absent = false
	if p.seen == nil || !bytes.Equal(b, p.seen) {
		p.seen, p.since, p.pending = b, now, true
	}
	if !p.pending {
		return 0, false, nil
	}
	need := p.cfg.Settle
	if p.members == nil {
		need = 0 // at the start
	}
	if len(b) == 0 || b[len(b)-1] != '\n' {
		need = max(need, unfinished)
	}
	if left := need - now.Sub(p.since); left > 0 {
		return left, false, nil
	}
	p.pending = false
	members, err := parse(p.cfg.Path, b, p.cfg.Port, p.cfg.Listen)
	if err != nil {
		p.malformed.Inc()
		if p.members == nil {
			p.seen = nil
			return 0, false, err
		}
		p.log.Warn("the list of members is malformed; the last good one stands", zap.Error(err))
		return 0, false, nil
	}
	p.members = members
	p.reads.Inc()
	p.log.Info("the list of members was read", zap.String("file", p.cfg.Path), zap.Int("members", len(members)))
	return 0, true, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s is not a file of at most %d bytes", path, maxFile)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	if b == nil {
		b = []byte{}
	}
	return b, err
}

// parse reads the list. Errors begin with file:line.
func parse(path string, b []byte, port int, listen string) ([]member, error) {
	if port == 0 {
		_, text, _ := strings.Cut(listen[strings.LastIndexByte(listen, ':'):], ":")
		port, _ = strconv.Atoi(text) // has been validated
	}
	if ext := strings.ToLower(filepath.Ext(path)); ext == ".yaml" || ext == ".yml" {
		return parseYAML(path, b, port)
	}
	list := []member{}
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		text, _, _ := strings.Cut(line, "#")
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		m, err := parseMember(text, port)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, n, err)
		}
		if len(list) >= maxLines {
			return nil, fmt.Errorf("%s:%d: more than %d members", path, n, maxLines)
		}
		list = append(list, m)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s:%d: no member is listed; for a node that is to be alone list its own address", path, max(n, 1))
	}
	return list, nil
}

func parseYAML(path string, b []byte, port int) ([]member, error) {
	var doc struct {
		Members []config.Component `yaml:"members"` // a word with its place
	}
	if err := config.Decode(b, path+":1", &doc); err != nil {
		return nil, err
	}
	if doc.Members == nil {
		return nil, fmt.Errorf("%s:1: no members are listed; for none write \"members: []\"", path)
	}
	if len(doc.Members) > maxLines {
		return nil, fmt.Errorf("%s:%d: more than %d members", path, doc.Members[maxLines].Pos.Line, maxLines)
	}
	list := []member{}
	for _, c := range doc.Members {
		if c.Mode != "" || c.Options() != nil {
			return nil, fmt.Errorf("%s:%d: a member is a host or host:port", path, c.Pos.Line)
		}
		m, err := parseMember(strings.TrimSpace(c.Use), port)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, c.Pos.Line, err)
		}
		list = append(list, m)
	}
	return list, nil
}

// parseMember reads host or host:port.
func parseMember(s string, port int) (member, error) {
	bad := func(why string) (member, error) {
		if len(s) > 80 {
			s = strings.ToValidUTF8(s[:80], "") + "…"
		}
		return member{}, fmt.Errorf("%q is neither a host nor host:port: %s", s, why)
	}
	host := s
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		host = a.String()
	} else if h, text, err := net.SplitHostPort(s); err == nil {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return bad("the port is outside 1..65535")
		}
		host, port = h, int(n)
	} else if strings.Contains(s, ":") {
		return bad("an IPv6 address with a port is written [address]:port")
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a.IsUnspecified() || a.IsMulticast() {
			return bad("no node can have that address")
		}
		return member{addr: netip.AddrPortFrom(a.Unmap(), uint16(port))}, nil
	}
	bare := strings.TrimSuffix(host, ".")
	if bare == "" || len(bare) > 253 || strings.Trim(strings.ToLower(bare), "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" || strings.Trim(bare, "0123456789.") == "" {
		return bad("a name has letters, digits, - and . in it")
	}
	return member{name: net.JoinHostPort(host, strconv.Itoa(port))}, nil
}

// resolve returns the addresses of all members. A name that cannot be resolved
// keeps its last address.
func (p *provider) resolve(ctx context.Context) []discovery.Peer {
	var peers []discovery.Peer
	now := map[string]netip.AddrPort{}
	p.next = time.Time{}
	for _, m := range p.members {
		if m.name == "" {
			peers = append(peers, discovery.Peer{Addr: m.addr})
			continue
		}
		p.next = time.Now().Add(refresh)
		last, known := p.resolved[m.name]
		if ctx.Err() == nil {
			a, err := p.net.ResolveUDPAddr("udp", m.name)
			if err == nil {
				last, known = a.AddrPort(), true
			} else {
				p.unresolved.Inc()
				p.log.Warn("a listed member cannot be resolved; it is tried again", zap.String("member", m.name), zap.Error(err))
			}
		}
		if known {
			now[m.name] = last
			peers = append(peers, discovery.Peer{Addr: last})
		}
	}
	p.resolved = now
	return peers
}

// Factory makes memberships from configuration.
var Factory = channel.FactoryOf(Name, Default(), New)
