package config

import (
	_ "embed"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"
)

// The names of the components that are meant when none is written.
const (
	DefaultMembership  = "multicast"
	DefaultManager     = "delta"
	RouteBinderValve   = "routebinder"
	ReplicationValve   = "replication"
	defaultHTTP        = "127.0.0.1:8080"
	defaultReceiver    = "127.0.0.1"
	defaultGroup       = "228.0.0.4"
	defaultHostName    = "localhost"
	defaultSessionName = "JSESSIONID"
)

// DefaultAdmin is the address of the admin API if none is written; its port is
// the first one tried.
const DefaultAdmin = "127.0.0.1:8077"

var defaultInterceptors = []string{"throughput", "dispatch", "failuredetector"}

//go:embed default.yaml
var defaultYAML []byte

// Default returns the configuration of a node that was given none: HTTP on
// 127.0.0.1:8080 or the next free port, a cluster with the other nodes of this
// machine, and the demo application.
func Default() *Config {
	c, err := Read("built-in configuration", defaultYAML)
	if err != nil {
		panic(err) // a test reads the same bytes
	}
	return c
}

// Normalize fills in the defaults. What depends on other values, like the
// node's name, is only filled in while it is empty; so call Set first.
// Normalizing twice is the same as once.
func (c *Config) Normalize() {
	fill(&c.Node.ShutdownTimeout, 30*time.Second)
	fill(&c.Node.DrainTimeout, 30*time.Second)
	fill(&c.Node.DrainGrace, 5*time.Second)
	fill(&c.Node.Name, c.Engine.Route)
	if c.Node.Name == "" {
		if host, err := os.Hostname(); err == nil {
			c.Node.Name = host
		}
	}
	fill(&c.Node.Name, "node")
	fill(&c.Admin.Address, DefaultAdmin)
	fill(&c.Log.Level, "info")
	fill(&c.Log.Format, "auto")
	if len(c.Connectors) == 0 {
		c.Connectors = []Connector{{}}
	}
	for i := range c.Connectors {
		c.Connectors[i].normalize()
	}
	c.Engine.normalize(c.Cluster != nil)
	if c.Cluster != nil {
		c.Cluster.normalize()
	}
}

func fill[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func fillPointer[T any](field **T, value T) {
	if *field == nil {
		*field = &value
	}
}

func (c *Connector) normalize() {
	fill(&c.Protocol, "http")
	fill(&c.Address, defaultHTTP)
	fill(&c.HeaderTimeout, 10*time.Second)
	fill(&c.IdleTimeout, time.Minute)
	fill(&c.MaxHeaderBytes, 64<<10)
	fill(&c.MaxConnections, 10_000)
}

func (e *Engine) normalize(clustered bool) {
	fill(&e.Name, "longhouse")
	if len(e.Hosts) == 0 {
		e.Hosts = []Host{{}}
	}
	for i := range e.Hosts {
		h := &e.Hosts[i]
		if i == 0 {
			fill(&h.Name, e.DefaultHost)
			fill(&h.Name, defaultHostName)
		}
		for j := range h.Contexts {
			h.Contexts[j].normalize(clustered)
		}
	}
	fill(&e.DefaultHost, e.Hosts[0].Name)
	if clustered && !e.hasValve(RouteBinderValve) && !e.hasValve(ReplicationValve) {
		e.Valves = append(e.Valves[:len(e.Valves):len(e.Valves)], Component{Use: RouteBinderValve}, Component{Use: ReplicationValve})
	}
}

// hasValve reports whether some pipeline has the valve.
func (e *Engine) hasValve(use string) bool {
	has := func(list []Component) bool {
		return slices.ContainsFunc(list, func(c Component) bool { return c.Use == use })
	}
	if has(e.Valves) {
		return true
	}
	for _, h := range e.Hosts {
		if has(h.Valves) || slices.ContainsFunc(h.Contexts, func(x Context) bool { return has(x.Valves) }) {
			return true
		}
	}
	return false
}

func (x *Context) normalize(clustered bool) {
	if x.Path == "/" {
		x.Path = ""
	}
	fillPointer(&x.Distributable, clustered)
	fill(&x.Attributes.MaxCount, 1024)
	fill(&x.Attributes.MaxSize, 4<<20)
	s := &x.Session
	fillPointer(&s.Timeout, 30*time.Minute)
	fill(&s.Cookie, defaultSessionName)
	fill(&s.CookiePath, x.Path)
	fill(&s.CookiePath, "/")
	fill(&s.SameSite, "lax")
	fillPointer(&s.Cookies, true)
	fill(&s.MaxSize, 16<<20)
	fill(&s.WarnSize, 1<<20)
	fill(&s.Lock, "none")
	fill(&s.LockTimeout, 10*time.Second)
	fill(&s.LockLease, 30*time.Second)
}

func (c *Cluster) normalize() {
	fill(&c.Send, "async")
	fill(&c.Listeners, "local")
	fill(&c.Manager.Use, DefaultManager)
	ch := &c.Channel
	fill(&ch.Membership.Use, DefaultMembership)
	if ch.Interceptors == nil {
		ch.Interceptors = components(defaultInterceptors)
	}
	r := &ch.Receiver
	fill(&r.Address, defaultReceiver)
	fill(&r.Port, 4000)
	fill(&r.AutoBind, 100)
	fill(&r.MaxFrame, 64<<20)
	fill(&r.MaxConnections, 1024)
	fill(&r.IdleTimeout, 10*time.Minute)
	fill(&r.WindowBytes, 8<<20)
	if m := ch.Multicast; m != nil {
		fill(&m.Address, defaultGroup)
		fill(&m.Port, 45564)
		fill(&m.TTL, 1)
	}
	s := &ch.Sender
	fill(&s.AckTimeout, 3*time.Second)
	fill(&s.ConnectTimeout, 3*time.Second)
	fillPointer(&s.Retries, 1)
	fill(&s.Pool, 25)
	fill(&s.WindowMessages, 1024)
	fill(&s.WindowBytes, 8<<20)
}

func components(names []string) []Component {
	list := make([]Component, len(names))
	for i, n := range names {
		list[i].Use = n
	}
	return list
}

// clone returns a copy that shares nothing that is ever changed.
func (c *Config) clone() *Config {
	return deepCopy(reflect.ValueOf(c)).Interface().(*Config)
}

func deepCopy(v reflect.Value) reflect.Value {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() || v.Type() == reflect.TypeFor[*node]() {
			return v
		}
		out := reflect.New(v.Type().Elem())
		out.Elem().Set(deepCopy(v.Elem()))
		return out
	case reflect.Slice:
		if v.IsNil() {
			return v
		}
		out := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		for i := range v.Len() {
			out.Index(i).Set(deepCopy(v.Index(i)))
		}
		return out
	case reflect.Struct:
		out := reflect.New(v.Type()).Elem()
		out.Set(v)
		for i := range v.NumField() {
			if out.Field(i).CanSet() {
				out.Field(i).Set(deepCopy(v.Field(i)))
			}
		}
		return out
	}
	return v
}

// Set changes one value, as --set path=value does. Paths are the keys of the
// YAML file: "engine.route", "connectors[0].address", "cluster.send". An element
// of a list is chosen by its index or by its name
// ("cluster.channel.interceptors[dispatch].queue_bytes",
// "engine.hosts[localhost].aliases"); the index after the last adds one. What is
// below a component's name are its options. The value is YAML; for text it is
// taken as it is. null removes what may be absent.
func (c *Config) Set(path, value string) error {
	steps, err := splitPath(path)
	if err != nil {
		return err
	}
	changed := c.clone()
	s := setter{path: path, value: value, pos: Pos{File: "--set " + path}}
	if err := s.set(reflect.ValueOf(changed).Elem(), steps, ""); err != nil {
		return err
	}
	*c = *changed
	return nil
}

// splitPath cuts "a.b[0].c" into a, b, [0], c.
func splitPath(path string) ([]string, error) {
	var steps []string
	for rest := path; rest != ""; {
		if rest[0] == '[' {
			end := strings.IndexByte(rest, ']')
			if end < 2 {
				return nil, fmt.Errorf("config: path %q: [ without ]", path)
			}
			steps = append(steps, rest[:end+1])
			rest = strings.TrimPrefix(rest[end+1:], ".")
			continue
		}
		end := strings.IndexAny(rest, ".[")
		if end == 0 {
			return nil, fmt.Errorf("config: path %q: empty name", path)
		}
		if end < 0 {
			end = len(rest)
		}
		steps = append(steps, rest[:end])
		rest = strings.TrimPrefix(rest[end:], ".")
	}
	if len(steps) == 0 {
		return nil, fmt.Errorf("config: the path is empty")
	}
	return steps, nil
}
