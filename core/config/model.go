package config

import (
	"strings"
	"time"
)

// Config is the configuration of one node. See the README of cmd for a commented
// example.
type Config struct {
	// Node is about the process.
	Node Node `yaml:"node"`
	// Admin is the listener of the admin API.
	Admin Admin `yaml:"admin"`
	// Log is about logging.
	Log Log `yaml:"log"`
	// Connectors accept requests.
	Connectors []Connector `yaml:"connectors"`
	// Engine is the tree of containers.
	Engine Engine `yaml:"engine"`
	// Cluster joins the node to others; nil for a single node.
	Cluster *Cluster `yaml:"cluster"`

	// Warnings were found while reading.
	Warnings []Problem `yaml:"-"`
}

// Node is about the process.
type Node struct {
	// Name is the node's name for people; default is the engine's route, or
	// the host name.
	Name string `yaml:"name"`
	// WorkDir holds plugin sockets, staged bundles and the like. Default is a
	// private temporary directory that is removed at the end.
	WorkDir string `yaml:"work_dir"`
	// ShutdownTimeout bounds the whole stop. Default 30s.
	ShutdownTimeout time.Duration `yaml:"shutdown_timeout"`
	// DrainTimeout bounds how long a node that is told to stop hands its
	// sessions over before it stops. Default 30s.
	DrainTimeout time.Duration `yaml:"drain_timeout"`
	// DrainGrace bounds how long a draining node still serves the requests of
	// its users, until balancers have noticed. It ends as soon as no request has
	// come for a second. Default 5s.
	DrainGrace time.Duration `yaml:"drain_grace"`
}

// Admin is the listener of the admin API.
type Admin struct {
	// Address is host:port; default 127.0.0.1:8077 or, if that is taken, the
	// next free one. "off" disables it.
	Address string `yaml:"address"`
}

// Log is about logging.
type Log struct {
	// Level is debug, info, warn or error. Default info.
	Level string `yaml:"level"`
	// Format is auto (console on a terminal, else JSON), console or json.
	Format string `yaml:"format"`
}

// Connector is one listener for requests.
type Connector struct {
	// Protocol is http (HTTP/1.1; HTTP/2 by ALPN if TLS is set), h2c (HTTP/1.1
	// and HTTP/2 without TLS) or ajp. Default http.
	Protocol string `yaml:"protocol"`
	// Address is host:port. Default 127.0.0.1:8080.
	Address string `yaml:"address"`
	// NextFree tries up to that many further ports if the port is taken.
	NextFree int `yaml:"next_free"`
	// TLS switches TLS on.
	TLS *TLS `yaml:"tls"`
	// HeaderTimeout bounds reading a request's header. Default 10s.
	HeaderTimeout time.Duration `yaml:"header_timeout"`
	// IdleTimeout closes kept-alive connections. Default 60s.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	// MaxHeaderBytes bounds the request header. Default 64 KiB.
	MaxHeaderBytes int `yaml:"max_header_bytes"`
	// MaxConnections bounds the open connections; 0 is 10,000.
	MaxConnections int `yaml:"max_connections"`

	Pos Pos `yaml:"-"`
}

// TLS names the files of a certificate.
type TLS struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	// ClientCA, when set, demands client certificates of that authority.
	ClientCA string `yaml:"client_ca"`
}

// Engine is the outermost container.
type Engine struct {
	Name string `yaml:"name"`
	// DefaultHost serves requests for unknown host names. Default is the first
	// host.
	DefaultHost string `yaml:"default_host"`
	// Route (Tomcat: jvmRoute) is appended to session ids, so that a balancer
	// finds this node again.
	Route string `yaml:"route"`
	// Valves are the outermost pipeline. If the node has a cluster and neither
	// routebinder nor replication is written anywhere, both are added here.
	Valves []Component `yaml:"valves"`
	Hosts  []Host      `yaml:"hosts"`
}

// Host is a virtual host.
type Host struct {
	Name     string      `yaml:"name"`
	Aliases  []string    `yaml:"aliases"`
	Valves   []Component `yaml:"valves"`
	Contexts []Context   `yaml:"contexts"`

	Pos Pos `yaml:"-"`
}

// Context is one application under a path.
type Context struct {
	// Path is "" (or "/") for the root, or "/shop".
	Path string `yaml:"path"`
	// App is "demo", the name of an application compiled in, or empty if Dir
	// is set or an application is compiled in for this path.
	App string `yaml:"app"`
	// Dir is a directory of static files to serve.
	Dir string `yaml:"dir"`
	// Distributable replicates the sessions (web.xml: <distributable/>).
	// Default true when the node has a cluster.
	Distributable *bool `yaml:"distributable"`
	// Session is about the context's sessions.
	Session Session `yaml:"session"`
	// Attributes bound the attributes of the context, which all its requests
	// share; see package core/attributes.
	Attributes Attributes `yaml:"attributes"`
	// Manager replaces the cluster's manager for this context.
	Manager *Component `yaml:"manager"`
	// Send says what a request waits for: async, ack or sync. Default is the
	// cluster's.
	Send   string      `yaml:"send"`
	Valves []Component `yaml:"valves"`

	// Placeholder says that nobody wrote App: an application that is compiled
	// in for this path takes its place.
	Placeholder bool `yaml:"-"`

	Pos Pos `yaml:"-"`
}

// Attributes bound the attributes of a context.
type Attributes struct {
	// MaxCount refuses more of them. Default 1024.
	MaxCount int `yaml:"max_count"`
	// MaxSize refuses more in all, in bytes. Default 4 MiB.
	MaxSize int `yaml:"max_size"`
}

// Session is about the sessions of a context.
type Session struct {
	// Timeout is the life without a request. Default 30m; 0 or less is for
	// ever.
	Timeout *time.Duration `yaml:"timeout"`
	// Cookie is the cookie's name; default JSESSIONID. The path parameter has
	// the same name in lower case.
	Cookie string `yaml:"cookie"`
	// CookiePath is the cookie's path; default the context path.
	CookiePath string `yaml:"cookie_path"`
	// CookieDomain is the cookie's domain; default none.
	CookieDomain string `yaml:"cookie_domain"`
	// SameSite is lax, strict or none. Default lax.
	SameSite string `yaml:"same_site"`
	// Cookies false tracks sessions only by the path parameter.
	Cookies *bool `yaml:"cookies"`
	// MaxSize refuses bigger sessions, in bytes. Default 16 MiB.
	MaxSize int `yaml:"max_size"`
	// WarnSize logs bigger sessions, in bytes. Default 1 MiB.
	WarnSize int `yaml:"warn_size"`
	// Lock is none, or session: one request at a time uses a session, on all
	// nodes, works on its newest state and waits until its changes are stored
	// everywhere, whatever cluster.send says. All nodes need the same value.
	// Default none.
	Lock string `yaml:"lock"`
	// LockTimeout bounds how long a request waits for its session; then it is
	// answered with 503. It should be longer than what the failure detector needs
	// to find out that a node does not answer. Default 10s.
	LockTimeout time.Duration `yaml:"lock_timeout"`
	// LockLease bounds how long a request may have its session: then the next
	// one gets it, and this one is answered with 503. Default 30s.
	LockLease time.Duration `yaml:"lock_lease"`
	// Listeners is what the session listeners of the application hear of other
	// nodes, beyond what each asks for itself: local (nothing), cluster
	// (everything), or some of sessions (made and ended), ids (renewed) and
	// attributes, separated by commas. Default is the cluster's.
	Listeners string `yaml:"listeners"`
}

// ListenerKinds reads a value of Session.Listeners.
func ListenerKinds(text string) (sessions, ids, attributes, ok bool) {
	switch text {
	case "", "local":
		return false, false, false, true
	case "cluster":
		return true, true, true, true
	}
	for word := range strings.SplitSeq(text, ",") {
		switch strings.TrimSpace(word) {
		case "sessions":
			sessions = true
		case "ids":
			ids = true
		case "attributes":
			attributes = true
		default:
			return false, false, false, false
		}
	}
	return sessions, ids, attributes, true
}

// Cluster joins the node to others.
type Cluster struct {
	// Send says what a request waits for: async, ack or sync; see core.Level.
	// Default async.
	Send string `yaml:"send"`
	// Manager keeps the sessions. Default delta.
	Manager Component `yaml:"manager"`
	// Listeners is session.listeners of the contexts that do not say it
	// themselves. Default local.
	Listeners string     `yaml:"listeners"`
	Channel   Channel    `yaml:"channel"`
	Deployer  *Component `yaml:"deployer"`

	Pos Pos `yaml:"-"`
}

// Channel is the stack under the cluster.
type Channel struct {
	// Membership finds the other nodes. Default multicast.
	Membership Component `yaml:"membership"`
	Receiver   Receiver  `yaml:"receiver"`
	Sender     Sender    `yaml:"sender"`
	// Interceptors, first listed nearest to the application. Default
	// throughput, dispatch, failuredetector.
	Interceptors []Component `yaml:"interceptors"`
	// Domain is the logical group to announce.
	Domain string `yaml:"domain"`
	// TLS protects all TCP connections between the nodes. All nodes need it.
	TLS *ChannelTLS `yaml:"tls"`
	// Multicast is the group for messages with the option multicast, usually
	// that of the membership. Without it there are none.
	Multicast *Multicast `yaml:"multicast"`
}

// ChannelTLS names the PEM files by which the nodes of a cluster know each
// other. Changed files are taken over without a restart.
type ChannelTLS struct {
	// CA holds the certificates of the authorities whose nodes are let in.
	CA string `yaml:"ca"`
	// Certificate is this node's own, good for servers and clients.
	Certificate string `yaml:"certificate"`
	// Key is its private key.
	Key string `yaml:"key"`
	// Names, if there are any, are the only ones that the certificates of other
	// nodes may have: a DNS name, a URI or the common name.
	Names []string `yaml:"names"`

	Pos Pos `yaml:"-"`
}

// Multicast is a group for messages.
type Multicast struct {
	// Address is the IPv4 address of the group. Default 228.0.0.4.
	Address string `yaml:"address"`
	// Port is the UDP port of the group. Default 45564.
	Port int `yaml:"port"`
	// Bind is an address of the network interface to use; 127.0.0.1 keeps
	// messages on this machine. Default is the operating system's choice.
	Bind string `yaml:"bind"`
	// TTL is how many networks a message may pass. Default 1.
	TTL int `yaml:"ttl"`

	Pos Pos `yaml:"-"`
}

// Receiver accepts the messages of other nodes.
type Receiver struct {
	// Address is the address to listen on and to announce: an IP address, or
	// auto for the first non-loopback one. Default 127.0.0.1.
	Address string `yaml:"address"`
	// Port is the first port to try. Default 4000.
	Port int `yaml:"port"`
	// AutoBind is how many ports are tried. Default 100.
	AutoBind int `yaml:"auto_bind"`
	// MaxFrame bounds a message, in bytes. Default 64 MiB.
	MaxFrame int `yaml:"max_frame,bytes"`
	// MaxConnections bounds the open connections. Default 1024.
	MaxConnections int `yaml:"max_connections"`
	// IdleTimeout closes silent connections. Default 10m.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	// WindowBytes is how much a Longhouse node may have sent on a connection
	// that this node has not processed. Default 8 MiB.
	WindowBytes int `yaml:"window_bytes,bytes"`
	// UDPPort is the first port to try for messages with the option udp.
	// Default 0, which is none.
	UDPPort int `yaml:"udp_port"`
}

// Sender sends messages to other nodes.
type Sender struct {
	// AckTimeout bounds the wait for an acknowledgement. Default 3s.
	AckTimeout time.Duration `yaml:"ack_timeout"`
	// ConnectTimeout bounds connecting. Default 3s.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	// Retries is how often a failed attempt is repeated. Default 1.
	Retries *int `yaml:"retries"`
	// Pool is how many connections go to one member that is not a Longhouse
	// node. Default 25.
	Pool int `yaml:"pool"`
	// WindowMessages and WindowBytes bound what is unacknowledged to one
	// Longhouse node. Default 1024 and 8 MiB.
	WindowMessages int `yaml:"window_messages"`
	WindowBytes    int `yaml:"window_bytes"`
}
