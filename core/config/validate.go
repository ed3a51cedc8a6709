package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of what may be configured.
const (
	maxPort       = 65535
	maxNameLength = 255
	maxTimeout    = 24 * time.Hour
	maxWindow     = 1 << 20
	minFrame      = 64 << 10
	maxFrame      = 1 << 30
)

var (
	routePattern = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)
	tokenPattern = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")
)

// Validate finds what is wrong with the configuration as a whole, with the
// defaults filled in. It looks at the files that the configuration names, and
// changes nothing.
func (c *Config) Validate() []Problem {
	n := c.clone()
	n.Normalize()
	v := validator{cfg: n}
	v.node()
	v.connectors()
	v.engine()
	v.cluster()
	return v.problems
}

type validator struct {
	cfg      *Config
	problems Problems
}

func (v *validator) add(s Severity, pos Pos, path, what, why, fix string) {
	said := func(p Problem) bool { return p.Path == path && path != "" }
	if s < Error && slices.ContainsFunc(v.cfg.Warnings, said) {
		return // by the reader, in words that fit its file better
	}
	v.problems.add(Problem{Pos: pos, Path: path, Severity: s, What: what, Why: why, Fix: fix})
}

func (v *validator) fail(pos Pos, path, what, fix string) { v.add(Error, pos, path, what, "", fix) }

func (v *validator) oneOf(pos Pos, path, value string, known ...string) {
	if !slices.Contains(known, value) {
		v.fail(pos, path, fmt.Sprintf("%q is none of %s", shorten(value), strings.Join(known, ", ")), "")
	}
}

// within checks a number or duration against its bounds.
func within[T interface{ ~int | ~int64 }](v *validator, pos Pos, path string, value, lo, hi T) {
	if value < lo || value > hi {
		v.fail(pos, path, fmt.Sprintf("%v is out of range, %v to %v", value, lo, hi), "")
	}
}

func (v *validator) node() {
	c := v.cfg
	within(v, Pos{}, "node.shutdown_timeout", c.Node.ShutdownTimeout, time.Millisecond, maxTimeout)
	within(v, Pos{}, "node.drain_timeout", c.Node.DrainTimeout, time.Millisecond, maxTimeout)
	within(v, Pos{}, "node.drain_grace", c.Node.DrainGrace, time.Millisecond, maxTimeout)
	if len(c.Node.Name) > maxNameLength {
		v.fail(Pos{}, "node.name", fmt.Sprintf("is longer than %d bytes", maxNameLength), "")
	}
	if dir := c.Node.WorkDir; dir != "" {
		if info, err := os.Stat(dir); err == nil && !info.IsDir() {
			v.fail(Pos{}, "node.work_dir", dir+" is not a directory", "")
		}
	}
	v.oneOf(Pos{}, "log.level", c.Log.Level, "debug", "info", "warn", "error")
	v.oneOf(Pos{}, "log.format", c.Log.Format, "auto", "console", "json")
}

// endpoint is an address that something wants to listen on.
type endpoint struct {
	path, host string
	port       int
	pos        Pos
}

// overlaps reports whether both cannot be listened on at once.
func (e endpoint) overlaps(o endpoint) bool {
	return e.port != 0 && e.port == o.port && (e.host == o.host || wildcard(e.host) || wildcard(o.host))
}

func wildcard(host string) bool { return host == "" || host == "0.0.0.0" || host == "::" }

func (v *validator) address(pos Pos, path, addr string) (endpoint, bool) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		v.fail(pos, path, fmt.Sprintf("%q is not host:port", shorten(addr)), "write for example 127.0.0.1:8080, or :8080 for all interfaces")
		return endpoint{}, false
	}
	p, err := strconv.Atoi(port)
	if err != nil || p < 0 || p > maxPort {
		v.fail(pos, path, fmt.Sprintf("%q is not a port, 0 to %d", shorten(port), maxPort), "")
		return endpoint{}, false
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	return endpoint{path: path, host: host, port: p, pos: pos}, true
}

func (v *validator) connectors() {
	var taken []endpoint
	claim := func(e endpoint, moves bool) {
		for _, o := range taken {
			if e.overlaps(o) && !moves {
				v.fail(e.pos, e.path, fmt.Sprintf("port %d is also the port of %s", e.port, o.path), "give each its own port")
				return
			}
		}
		taken = append(taken, e)
	}
	for i, c := range v.cfg.Connectors {
		path := fmt.Sprintf("connectors[%d]", i)
		v.connector(c, path)
		if e, ok := v.address(c.Pos, path+".address", c.Address); ok {
			claim(e, c.NextFree > 0)
		}
	}
	if addr := v.cfg.Admin.Address; addr != "off" {
		if e, ok := v.address(Pos{}, "admin.address", addr); ok {
			claim(e, addr == DefaultAdmin)
			if ip, err := netip.ParseAddr(e.host); wildcard(e.host) || (err == nil && !ip.IsLoopback()) {
				v.add(Warning, Pos{}, "admin.address", "the admin API listens beyond this machine",
					"it has no log-in: whoever reaches it sees sessions, configuration and profiles", "use 127.0.0.1, or a network that only operators reach")
			}
		}
	}
	if cl := v.cfg.Cluster; cl != nil && cl.Channel.Receiver.AutoBind <= 1 {
		r := cl.Channel.Receiver
		host := r.Address
		if host == "auto" {
			host = ""
		}
		claim(endpoint{path: "cluster.channel.receiver.port", host: host, port: r.Port, pos: cl.Pos}, false)
	}
}

func (v *validator) connector(c Connector, path string) {
	v.oneOf(c.Pos, path+".protocol", c.Protocol, "http", "h2c", "ajp")
	if c.Protocol == "ajp" {
		v.add(Unavailable, c.Pos, path+".protocol", "AJP connectors are not available in this version", "", "let the front end speak HTTP to this node (mod_proxy_http)")
	}
	within(v, c.Pos, path+".next_free", c.NextFree, 0, maxPort)
	within(v, c.Pos, path+".header_timeout", c.HeaderTimeout, time.Millisecond, maxTimeout)
	within(v, c.Pos, path+".idle_timeout", c.IdleTimeout, time.Millisecond, maxTimeout)
	within(v, c.Pos, path+".max_header_bytes", c.MaxHeaderBytes, 1<<10, 16<<20)
	within(v, c.Pos, path+".max_connections", c.MaxConnections, 1, 1<<20)
	if c.TLS == nil {
		return
	}
	if c.Protocol == "h2c" {
		v.fail(c.Pos, path+".tls", "h2c is HTTP/2 without TLS", "use the protocol http: it offers HTTP/2 under TLS by itself")
	}
	v.certificate(*c.TLS, c.Pos, path+".tls")
}

// transports checks what is beside plain TCP.
func (v *validator) transports(c *Cluster) {
	ch, path := c.Channel, "cluster.channel"
	if t := ch.TLS; t != nil {
		at := path + ".tls"
		for _, f := range [][2]string{{"ca", t.CA}, {"certificate", t.Certificate}, {"key", t.Key}} {
			if f[1] == "" {
				v.fail(t.Pos, at+"."+f[0], "is missing", "name the PEM file; ca, certificate and key are all needed")
				return
			}
		}
		v.certificate(TLS{Cert: t.Certificate, Key: t.Key, ClientCA: t.CA}, t.Pos, at)
		if ch.Receiver.UDPPort > 0 || ch.Multicast != nil {
			v.add(Warning, t.Pos, at, "datagrams are not protected by TLS", "messages with the options udp and multicast go in clear", "add the interceptor encrypt, or leave out receiver.udp_port and multicast")
		}
		v.add(Note, t.Pos, at, "nodes of Apache Tomcat cannot take part", "Tribes has no TLS: they would find this node and reach it with no message", "protect a mixed group by the interceptor encrypt instead")
	}
	m := ch.Multicast
	if m == nil {
		return
	}
	at := path + ".multicast"
	if ip, err := netip.ParseAddr(m.Address); err != nil || !ip.Is4() || !ip.IsMulticast() {
		v.fail(m.Pos, at+".address", fmt.Sprintf("%q is not an IPv4 multicast address (224.0.0.0 to 239.255.255.255)", shorten(m.Address)), "")
	}
	if ip, err := netip.ParseAddr(m.Bind); m.Bind != "" && (err != nil || !ip.Is4()) {
		v.fail(m.Pos, at+".bind", fmt.Sprintf("%q is not an IPv4 address of this machine", shorten(m.Bind)), "")
	}
	within(v, m.Pos, at+".port", m.Port, 1, maxPort)
	within(v, m.Pos, at+".ttl", m.TTL, 0, 255)
}

func (v *validator) certificate(t TLS, pos Pos, path string) {
	if t.Cert == "" || t.Key == "" {
		v.fail(pos, path, "cert and key are both needed", "name the two PEM files")
		return
	}
	if _, err := tls.LoadX509KeyPair(t.Cert, t.Key); err != nil {
		v.fail(pos, path, "the certificate cannot be used: "+err.Error(), "")
	}
	v.private(t.Key, pos, path+".key")
	if t.ClientCA == "" {
		return
	}
	pem, err := os.ReadFile(t.ClientCA)
	if err == nil && !x509.NewCertPool().AppendCertsFromPEM(pem) {
		err = errors.New(t.ClientCA + " holds no certificate in PEM form")
	}
	if err != nil {
		v.fail(pos, path+".client_ca", err.Error(), "")
	}
}

// private refuses a secret file that everybody can read.
func (v *validator) private(file string, pos Pos, path string) {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return // reported by whoever reads it
	}
	if err == nil && info.Mode().Perm()&0o004 != 0 {
		v.fail(pos, path, fmt.Sprintf("everybody on this machine can read the secret in %s (mode %04o)", file, info.Mode().Perm()), "chmod 600 "+file)
	}
}

func (v *validator) engine() {
	e := v.cfg.Engine
	if e.Route != "" && (!routePattern.MatchString(e.Route) || len(e.Route) > maxNameLength) {
		v.add(Error, Pos{}, "engine.route", fmt.Sprintf("%q has characters that a route may not have", shorten(e.Route)),
			"the route is part of the session cookie", "use letters, digits, dot, dash and underscore")
	}
	if e.Route == "" && v.cfg.Cluster != nil {
		v.add(Note, Pos{}, "engine.route", "no route is set", "a balancer cannot send a user back to the node that served him before; sessions work, but move", "set engine.route to a name of this node")
	}
	v.components(e.Valves, "engine.valves")
	hosts := map[string]string{}
	claim := func(name, path string, pos Pos) {
		key := strings.ToLower(name)
		if key == "" || len(key) > maxNameLength || strings.ContainsAny(key, "/ \t\r\n") {
			v.fail(pos, path, fmt.Sprintf("%q is not a host name", shorten(name)), "")
			return
		}
		if other, dup := hosts[key]; dup {
			v.fail(pos, path, fmt.Sprintf("the name %q is also that of %s", name, other), "")
			return
		}
		hosts[key] = path
	}
	for i, h := range e.Hosts {
		path := fmt.Sprintf("engine.hosts[%d]", i)
		claim(h.Name, path, h.Pos)
		for j, a := range h.Aliases {
			claim(a, fmt.Sprintf("%s.aliases[%d]", path, j), h.Pos)
		}
		v.components(h.Valves, path+".valves")
		v.contexts(h, path)
	}
	if _, ok := hosts[strings.ToLower(e.DefaultHost)]; !ok {
		v.fail(Pos{}, "engine.default_host", fmt.Sprintf("there is no host %q", shorten(e.DefaultHost)), "name one of the hosts, or leave it out")
	}
}

func (v *validator) contexts(h Host, path string) {
	paths := map[string]bool{}
	for i, x := range h.Contexts {
		at := fmt.Sprintf("%s.contexts[%d]", path, i)
		switch {
		case x.Path != "" && (!strings.HasPrefix(x.Path, "/") || strings.HasSuffix(x.Path, "/") || len(x.Path) > maxNameLength ||
			strings.ContainsAny(x.Path, "?#%;\\\x00 ") || slices.Contains(strings.Split(x.Path[1:], "/"), "") ||
			slices.ContainsFunc(strings.Split(x.Path, "/"), func(s string) bool { return s == "." || s == ".." })):
			v.fail(x.Pos, at+".path", fmt.Sprintf("%q is not a context path", shorten(x.Path)), `write "" for the root, or for example /shop`)
		case paths[x.Path]:
			v.fail(x.Pos, at+".path", fmt.Sprintf("the host %s has two contexts at %q", h.Name, x.Path), "")
		}
		paths[x.Path] = true
		v.context(x, at)
	}
}

func (v *validator) context(x Context, at string) {
	switch {
	case x.App != "" && x.Dir != "":
		v.fail(x.Pos, at, "has an application and a directory", "remove app or dir")
	case x.App == "" && x.Dir == "":
		v.add(Note, x.Pos, at, "names neither an application nor a directory", "it can only serve an application that is compiled in for this path",
			"set app to the name of an application, or dir to a directory of files")
	case x.Dir != "":
		if info, err := os.Stat(x.Dir); err != nil {
			v.fail(x.Pos, at+".dir", err.Error(), "")
		} else if !info.IsDir() {
			v.fail(x.Pos, at+".dir", x.Dir+" is not a directory", "")
		}
	}
	v.components(x.Valves, at+".valves")
	if v.cfg.Cluster == nil {
		if x.Manager != nil {
			v.fail(x.Pos, at+".manager", "a manager needs a cluster", "add cluster, or remove the manager")
		}
		if *x.Distributable {
			v.add(Warning, x.Pos, at+".distributable", "the node has no cluster to replicate sessions to", "", "add cluster")
		}
	}
	if x.Manager != nil {
		v.components([]Component{*x.Manager}, at+".manager")
	}
	within(v, x.Pos, at+".attributes.max_count", x.Attributes.MaxCount, 1, 65536)
	within(v, x.Pos, at+".attributes.max_size", x.Attributes.MaxSize, 1, 256<<20)
	s := x.Session
	if !tokenPattern.MatchString(s.Cookie) {
		v.fail(x.Pos, at+".session.cookie", fmt.Sprintf("%q is not a cookie name", shorten(s.Cookie)), "")
	}
	if !strings.HasPrefix(s.CookiePath, "/") || strings.ContainsAny(s.CookiePath, ";\r\n\x00") {
		v.fail(x.Pos, at+".session.cookie_path", fmt.Sprintf("%q is not a path", shorten(s.CookiePath)), "")
	}
	if strings.ContainsAny(s.CookieDomain, "; \r\n\x00/") {
		v.fail(x.Pos, at+".session.cookie_domain", fmt.Sprintf("%q is not a domain", shorten(s.CookieDomain)), "")
	}
	v.oneOf(x.Pos, at+".session.same_site", s.SameSite, "lax", "strict", "none")
	within(v, x.Pos, at+".session.max_size", s.MaxSize, 1<<10, maxFrame)
	within(v, x.Pos, at+".session.warn_size", s.WarnSize, 1, maxFrame)
	v.oneOf(x.Pos, at+".session.lock", s.Lock, "none", "session")
	within(v, x.Pos, at+".session.lock_timeout", s.LockTimeout, time.Millisecond, time.Hour)
	v.listeners(x.Pos, at+".session.listeners", s.Listeners)
	if x.Send != "" {
		v.oneOf(x.Pos, at+".send", x.Send, "async", "ack", "sync")
		if v.cfg.Cluster == nil {
			v.add(Warning, x.Pos, at+".send", "the node has no cluster to send anything to", "", "add cluster, or remove send")
		}
	}
	within(v, x.Pos, at+".session.lock_lease", s.LockLease, 100*time.Millisecond, time.Hour)
	if cl := v.cfg.Cluster; cl != nil && s.MaxSize > cl.Channel.Receiver.MaxFrame {
		v.fail(x.Pos, at+".session.max_size", fmt.Sprintf("%s is more than a message may have (cluster.channel.receiver.max_frame is %s)",
			Bytes(s.MaxSize), Bytes(cl.Channel.Receiver.MaxFrame)), "")
	}
}

func (v *validator) listeners(pos Pos, path, value string) {
	if _, _, _, ok := ListenerKinds(value); !ok {
		v.fail(pos, path, fmt.Sprintf("%q is not local, cluster or a list of sessions, ids, attributes", shorten(value)), "")
	}
}

func (v *validator) cluster() {
	c := v.cfg.Cluster
	if c == nil {
		return
	}
	v.oneOf(c.Pos, "cluster.send", c.Send, "async", "ack", "sync")
	v.listeners(c.Pos, "cluster.listeners", c.Listeners)
	if !v.cfg.Engine.hasValve(ReplicationValve) {
		v.add(Warning, c.Pos, "engine.valves", "there is no replication valve", "sessions are not replicated at the end of a request, whatever cluster.send says", "add the valve replication")
	} else if !v.cfg.Engine.hasValve(RouteBinderValve) && v.cfg.Engine.Route != "" {
		v.add(Warning, c.Pos, "engine.valves", "there is no routebinder valve", "after a node's death cookies keep its route, and users are sent back to it", "add the valve routebinder before replication")
	}
	v.components([]Component{c.Manager}, "cluster.manager")
	v.components([]Component{c.Channel.Membership}, "cluster.channel.membership")
	v.components(c.Channel.Interceptors, "cluster.channel.interceptors")
	if c.Deployer != nil {
		v.components([]Component{*c.Deployer}, "cluster.deployer")
		if c.Deployer.Use == "" {
			v.fail(c.Deployer.Pos, "cluster.deployer", "says not which component is meant", `add "use: name"`)
		}
	}
	if len(c.Channel.Domain) > maxNameLength {
		v.fail(c.Pos, "cluster.channel.domain", fmt.Sprintf("is longer than %d bytes", maxNameLength), "")
	}
	r, path := c.Channel.Receiver, "cluster.channel.receiver"
	ip, err := netip.ParseAddr(r.Address)
	switch {
	case r.Address == "auto":
	case err != nil:
		v.fail(c.Pos, path+".address", fmt.Sprintf("%q is neither an IP address nor auto", shorten(r.Address)), "")
	case ip.IsUnspecified():
		v.add(Error, c.Pos, path+".address", r.Address+" cannot be announced to other nodes", "the address is also the one they connect to", "write this machine's address, or auto")
	case ip.IsLoopback():
		v.add(Note, c.Pos, path+".address", "the receiver is on "+r.Address, "only nodes on this machine can reach it", "write this machine's address, or auto, for a cluster of machines")
	}
	within(v, c.Pos, path+".port", r.Port, 0, maxPort)
	within(v, c.Pos, path+".auto_bind", r.AutoBind, 1, maxPort)
	within(v, c.Pos, path+".max_frame", r.MaxFrame, minFrame, maxFrame)
	within(v, c.Pos, path+".max_connections", r.MaxConnections, 1, 1<<16)
	within(v, c.Pos, path+".idle_timeout", r.IdleTimeout, time.Second, 30*maxTimeout)
	within(v, c.Pos, path+".udp_port", r.UDPPort, 0, maxPort)
	within(v, c.Pos, path+".window_bytes", r.WindowBytes, 64<<10, maxFrame)
	v.transports(c)
	s, path := c.Channel.Sender, "cluster.channel.sender"
	within(v, c.Pos, path+".ack_timeout", s.AckTimeout, time.Millisecond, maxTimeout)
	within(v, c.Pos, path+".connect_timeout", s.ConnectTimeout, time.Millisecond, maxTimeout)
	within(v, c.Pos, path+".retries", *s.Retries, 0, 100)
	within(v, c.Pos, path+".pool", s.Pool, 1, 1000)
	within(v, c.Pos, path+".window_messages", s.WindowMessages, 1, maxWindow)
	within(v, c.Pos, path+".window_bytes", s.WindowBytes, 1<<10, maxFrame)
}

// components checks what can be known of a component's options without the
// component: that references to secrets can be resolved, and that secrets are
// not written where everybody can read them.
func (v *validator) components(list []Component, path string) {
	for i, c := range list {
		at := path
		if len(list) > 1 || strings.HasSuffix(path, "s") {
			at = fmt.Sprintf("%s[%d]", path, i)
		}
		if c.options != nil {
			v.secrets(c.options, at)
		}
	}
}

func (v *validator) secrets(n *node, path string) {
	for i, item := range n.items {
		v.secrets(item, fmt.Sprintf("%s[%d]", path, i))
	}
	for _, p := range n.pairs {
		at := join(path, p.key)
		r, isRef := reference(p.value)
		switch {
		case isRef:
			if _, err := r.resolve(); err != nil {
				v.fail(p.value.pos(), at, err.Error(), "")
			} else if r.scheme == "file" {
				v.private(r.target, p.value.pos(), at)
			}
		case p.value.kind == stringKind && p.value.text != "" && looksSecret(p.key):
			file := p.value.pos().File
			if info, err := os.Stat(file); file != "" && err == nil && info.Mode().Perm()&0o004 != 0 {
				v.add(Warning, p.value.pos(), at, fmt.Sprintf("everybody on this machine can read the secret in %s (mode %04o)", file, info.Mode().Perm()),
					"", "chmod 600 "+file+", or write ${env:NAME} or ${file:/path} in its place")
			}
		default:
			v.secrets(p.value, at)
		}
	}
}
