package peer

import (
	"context"
	"encoding/hex"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Start levels of a Tribes channel.
const (
	LevelReceiver = 1 << iota
	LevelSender
	LevelMembershipReceive
	LevelMembershipSend
)

// Config describes a Tribes node. The zero value of a field means the Tribes
// default, unless it says otherwise.
type Config struct {
	// Name names the node inside its JVM; it is required.
	Name string
	// Channel is the name of the channel, which static memberships compare.
	Channel string
	// Host and Port are the address of the receiver; Host is 127.0.0.1 if
	// empty. Port is required. UDP is the port for datagrams.
	Host      string
	Port, UDP int
	// Membership is "multicast" (also if empty), "static" or "none".
	Membership string
	// Group and GroupPort are those of the multicast membership, on the
	// loopback interface.
	Group     string
	GroupPort int
	// Frequency of heartbeats, and DropTime of silent members.
	Frequency, DropTime time.Duration
	// Domain of the multicast membership.
	Domain string
	// Members are the members of the static membership or interceptor, Local
	// is the own one of the interceptor.
	Members []Static
	Local   *Static
	// Stack lists the interceptors, top first: "gzip", "encrypt:key=00ff",
	// "fragment:max=1000:flag=0x10000". An empty one is that of a channel
	// without configuration: dispatch alone.
	Stack []string
	// Heartbeat is the interval of the channel's heartbeat, a second if zero.
	Heartbeat time.Duration
	// Timeout bounds a send; 15 s if zero.
	Timeout time.Duration
	// Retries of a failed send; nil means one.
	Retries *int
	// Reconnect opens a new connection for every message. Tribes has to: a
	// sender that has used TCP toward a member fails when it is to send a
	// datagram to it, and the reverse.
	Reconnect bool
	// FailOn makes the node's listener throw at byte messages with this prefix.
	FailOn string
	// Level is the start level; 0 means all.
	Level int
}

// Static is a configured member.
type Static struct {
	Host   string
	Port   int
	ID     [16]byte
	Domain string
	UDP    int
}

func (s Static) String() string {
	host := s.Host
	if host == "" {
		host = "127.0.0.1"
	}
	udp := ""
	if s.UDP > 0 {
		udp = strconv.Itoa(s.UDP)
	}
	return fmt.Sprintf("%s/%d/%x/%s/%s", host, s.Port, s.ID, s.Domain, udp)
}

func (c Config) values() url.Values {
	v := url.Values{"node": {c.Name}}
	text := func(key, s string) {
		if s != "" {
			v.Set(key, s)
		}
	}
	number := func(key string, n int64) {
		if n != 0 {
			v.Set(key, strconv.FormatInt(n, 10))
		}
	}
	text("channel", c.Channel)
	text("host", c.Host)
	number("port", int64(c.Port))
	number("udp", int64(c.UDP))
	text("membership", c.Membership)
	text("group", c.Group)
	number("groupPort", int64(c.GroupPort))
	number("frequency", c.Frequency.Milliseconds())
	number("dropTime", c.DropTime.Milliseconds())
	text("domain", c.Domain)
	var members []string
	for _, m := range c.Members {
		members = append(members, m.String())
	}
	text("members", strings.Join(members, ","))
	if c.Local != nil {
		text("local", c.Local.String())
	}
	text("stack", strings.Join(c.Stack, ","))
	number("heartbeat", c.Heartbeat.Milliseconds())
	number("timeout", c.Timeout.Milliseconds())
	if c.Retries != nil {
		v.Set("retry", strconv.Itoa(*c.Retries))
	}
	if c.Reconnect {
		v.Set("keepAliveCount", "0")
	}
	text("failOn", c.FailOn)
	number("level", int64(c.Level))
	return v
}

// Member is a member as a Tribes node sees it.
type Member struct {
	// ID is the unique id in hexadecimal.
	ID                string
	Host              string
	Port, UDP, Secure int
	Alive             time.Duration
	Domain, Command   string
	Payload           []byte
}

func parseMember(s string) (Member, error) {
	v, err := url.ParseQuery(s)
	if err != nil {
		return Member{}, fmt.Errorf("peer: member %q: %w", s, err)
	}
	m := Member{ID: v.Get("id"), Host: v.Get("host"), Domain: v.Get("domain"), Command: v.Get("command")}
	for key, to := range map[string]*int{"port": &m.Port, "udp": &m.UDP, "secure": &m.Secure} {
		if *to, err = strconv.Atoi(v.Get(key)); err != nil {
			return m, fmt.Errorf("peer: member %q: %w", s, err)
		}
	}
	ms, err := strconv.ParseInt(v.Get("alive"), 10, 64)
	if err != nil {
		return m, fmt.Errorf("peer: member %q: %w", s, err)
	}
	m.Alive = time.Duration(ms) * time.Millisecond
	m.Payload, err = hex.DecodeString(v.Get("payload"))
	return m, err
}

// Node is a Tribes node that runs.
type Node struct {
	jvm  *JVM
	name string
	// Local is the node's own record at its start.
	Local Member
}

// Open starts a node. A node without anything special takes four times its
// heartbeat frequency to start.
func (j *JVM) Open(ctx context.Context, c Config) (*Node, error) {
	r, err := j.Call(ctx, "open", c.values())
	if err != nil {
		return nil, err
	}
	n := &Node{jvm: j, name: c.Name}
	n.Local, err = parseMember(r.Get("local"))
	return n, err
}

// JVM returns the machine of the node.
func (n *Node) JVM() *JVM { return n.jvm }

// ID returns the node's unique id in hexadecimal.
func (n *Node) ID() string { return n.Local.ID }

// Call asks the node for something; key and value alternate in args.
func (n *Node) Call(ctx context.Context, verb string, args ...string) (url.Values, error) {
	v := url.Values{"node": {n.name}}
	for i := 0; i+1 < len(args); i += 2 {
		v.Set(args[i], args[i+1])
	}
	return n.jvm.Call(ctx, verb, v)
}

// Close stops the node, which then says goodbye to the others.
func (n *Node) Close(ctx context.Context) error {
	_, err := n.Call(ctx, "close")
	return err
}

// Events returns the node's events of one kind.
func (n *Node) Events(kind string) []Event {
	return n.filter(n.jvm.Events(), kind)
}

func (n *Node) filter(evs []Event, kind string) []Event {
	var out []Event
	for _, e := range evs {
		if e.Kind == kind && e.Node == n.name {
			out = append(out, e)
		}
	}
	return out
}

// Wait blocks until cond holds for the node's events of one kind.
func (n *Node) Wait(ctx context.Context, kind string, cond func([]Event) bool) error {
	return n.jvm.Wait(ctx, func(evs []Event) bool { return cond(n.filter(evs, kind)) })
}

// Members returns the other members as the top of the stack shows them.
func (n *Node) Members(ctx context.Context) ([]Member, error) {
	r, err := n.Call(ctx, "members")
	if err != nil || r.Get("members") == "" {
		return nil, err
	}
	var out []Member
	for s := range strings.SplitSeq(r.Get("members"), ",") {
		m, err := parseMember(s)
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

// Send describes messages to be sent.
type Send struct {
	// To are the ids of the receivers in hexadecimal; nil means all members.
	To []string
	// Value is the message; of several ones, each carries "thread/number"
	// behind the value, which must be Bytes then.
	Value any
	// Size fills a message of Bytes up with what [Fill] gives.
	Size int
	// Options is the Tribes option word; the driver's channel sets and clears
	// ByteMessage by itself.
	Options uint32
	// Count messages are sent by each of Threads threads; 0 means one.
	Count, Threads int
	// Events tells by the events "completed" and "failed" how asynchronous
	// messages ended.
	Events bool
}

// Send sends and waits as long as the options say. The error wraps an [*Error]
// with the faulty members.
func (n *Node) Send(ctx context.Context, s Send) error {
	value, err := Encode(s.Value)
	if err != nil {
		return err
	}
	args := []string{"value", value, "options", strconv.FormatUint(uint64(s.Options), 10)}
	if s.To != nil {
		args = append(args, "to", strings.Join(s.To, ","))
	}
	for key, i := range map[string]int{"size": s.Size, "count": s.Count, "threads": s.Threads} {
		if i != 0 {
			args = append(args, key, strconv.Itoa(i))
		}
	}
	if s.Events {
		args = append(args, "errors", "1")
	}
	_, err = n.Call(ctx, "send", args...)
	return err
}

// Reply is an answer to an RPC request.
type Reply struct {
	From  string
	Value any
}

// RPC sends a request over the RPC channel of that id, which [Node.Serve] has
// opened, and collects replies: "first", "majority", "all" or "none" of them.
func (n *Node) RPC(ctx context.Context, id, mode string, options uint32, timeout time.Duration, value any, to ...string) ([]Reply, error) {
	text, err := Encode(value)
	if err != nil {
		return nil, err
	}
	args := []string{"rpc", id, "mode", mode, "options", strconv.FormatUint(uint64(options), 10),
		"timeout", strconv.FormatInt(timeout.Milliseconds(), 10), "value", text}
	if len(to) > 0 {
		args = append(args, "to", strings.Join(to, ","))
	}
	r, err := n.Call(ctx, "rpc", args...)
	if err != nil {
		return nil, err
	}
	count, err := strconv.Atoi(r.Get("count"))
	if err != nil {
		return nil, err
	}
	var out []Reply
	for i := range count {
		v, err := Decode(r.Get("value" + strconv.Itoa(i)))
		if err != nil {
			return nil, err
		}
		out = append(out, Reply{r.Get("from" + strconv.Itoa(i)), v})
	}
	return out, nil
}

// Serve opens the RPC channel of that id. A request is answered by a list of
// tag and the request, or by the request alone if tag is empty; the request
// "nothing" by null, and "late" after the time late.
func (n *Node) Serve(ctx context.Context, id, tag string, late time.Duration) error {
	_, err := n.Call(ctx, "rpcOpen", "rpc", id, "tag", tag, "late", strconv.FormatInt(late.Milliseconds(), 10))
	return err
}

// Map is a replicated map at a node.
type Map struct {
	node *Node
	id   string
}

// OpenMap opens a map; kind is "lazy" or "full". It blocks until other nodes
// have answered. The map sends as those of Tomcat's managers do, with
// synchronized acknowledgements: with Tribes' own default, plain ones, a new
// value may overtake the removal of the old one.
func (n *Node) OpenMap(ctx context.Context, kind, id string) (*Map, error) {
	_, err := n.Call(ctx, "mapOpen", "map", id, "kind", kind, "options", "6")
	return &Map{n, id}, err
}

func (m *Map) call(ctx context.Context, verb string, key any, more ...string) (url.Values, error) {
	args := append([]string{"map", m.id}, more...)
	if key != nil {
		k, err := Encode(key)
		if err != nil {
			return nil, err
		}
		args = append(args, "key", k)
	}
	return m.node.Call(ctx, verb, args...)
}

// Put stores value and returns what was there.
func (m *Map) Put(ctx context.Context, key, value any) (any, error) {
	v, err := Encode(value)
	if err != nil {
		return nil, err
	}
	r, err := m.call(ctx, "put", key, "value", v)
	if err != nil {
		return nil, err
	}
	return Decode(r.Get("value"))
}

// Get reads a value, from another node if need be.
func (m *Map) Get(ctx context.Context, key any) (any, error) {
	r, err := m.call(ctx, "get", key)
	if err != nil {
		return nil, err
	}
	return Decode(r.Get("value"))
}

// Remove removes a key everywhere.
func (m *Map) Remove(ctx context.Context, key any) error {
	_, err := m.call(ctx, "remove", key)
	return err
}

// Entry is what a node holds of a key.
type Entry struct {
	// Kind is "primary", "backup", "proxy", "copy", or empty without entry.
	Kind string
	// Primary and Backups are ids in hexadecimal.
	Primary string
	Backups []string
	Value   any
}

// Entry tells what the node holds, without fetching anything.
func (m *Map) Entry(ctx context.Context, key any) (Entry, error) {
	r, err := m.call(ctx, "entry", key)
	if err != nil || r.Get("kind") == "" {
		return Entry{}, err
	}
	e := Entry{Kind: r.Get("kind"), Primary: r.Get("primary")}
	if b := r.Get("backups"); b != "" {
		e.Backups = strings.Split(b, ",")
	}
	e.Value, err = Decode(r.Get("value"))
	return e, err
}

// Sizes returns how many entries the node holds with their values, and how many
// it knows of.
func (m *Map) Sizes(ctx context.Context) (size, full int, err error) {
	r, err := m.call(ctx, "sizes", nil)
	if err != nil {
		return 0, 0, err
	}
	if size, err = strconv.Atoi(r.Get("size")); err != nil {
		return 0, 0, err
	}
	full, err = strconv.Atoi(r.Get("full"))
	return size, full, err
}

// Members returns the ids of the other nodes that have the map.
func (m *Map) Members(ctx context.Context) ([]string, error) {
	r, err := m.call(ctx, "mapMembers", nil)
	if err != nil || r.Get("members") == "" {
		return nil, err
	}
	return strings.Split(r.Get("members"), ","), nil
}

// Close leaves the map.
func (m *Map) Close(ctx context.Context) error {
	_, err := m.call(ctx, "mapClose", nil)
	return err
}
