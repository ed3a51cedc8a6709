package conformance

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core/config"
)

// Bounds of a scenario.
const (
	maxScenarioNodes    = 64
	maxScenarioSteps    = 1000
	maxScenarioMessages = 100_000
	maxScenarioSize     = 1 << 20
	maxScenarioTime     = 24 * time.Hour
)

// Scenario is a story of a simulated group of nodes: who they are, what happens
// to them, and what is expected. SCENARIOS.md describes the file.
type Scenario struct {
	Name string `yaml:"name"`
	Seed uint64 `yaml:"seed"`
	// Nodes are numbered from 1 and named n1, n2, …
	Nodes int `yaml:"nodes"`
	// Stack is that of all nodes, nearest to the application first; Stacks are
	// those of nodes that differ.
	Stack      []config.Component `yaml:"stack"`
	Stacks     []NodeStack        `yaml:"stacks"`
	Membership config.Component   `yaml:"membership"`
	Link       LinkFault          `yaml:"link"`
	Timeline   []Step             `yaml:"timeline"`
	// Quiet is how long nothing happens at the end, before Finally is checked.
	Quiet   time.Duration `yaml:"quiet"`
	Finally Finally       `yaml:"finally"`

	file string
}

// NodeStack is the stack of one node.
type NodeStack struct {
	Node  int                `yaml:"node"`
	Stack []config.Component `yaml:"stack"`
	Pos   config.Pos         `yaml:"-"`
}

// LinkFault is what a link does to packets, in one direction. Without From and
// To it concerns all links.
type LinkFault struct {
	From    int           `yaml:"from"`
	To      int           `yaml:"to"`
	Latency time.Duration `yaml:"latency"`
	Jitter  time.Duration `yaml:"jitter"`
	Loss    float64       `yaml:"loss"`
	Cut     bool          `yaml:"cut"`
}

func (l LinkFault) policy() channeltest.LinkPolicy {
	return channeltest.LinkPolicy{Latency: l.Latency, Jitter: l.Jitter, Loss: l.Loss, Cut: l.Cut}
}

// Step is one thing that happens, At so long after the start. Exactly one of
// the other fields is set.
type Step struct {
	At time.Duration `yaml:"at"`
	// Partition splits the network into groups; Heal ends that, and what Links
	// did.
	Partition [][]int    `yaml:"partition"`
	Heal      bool       `yaml:"heal"`
	Link      *LinkFault `yaml:"link"`
	// Crash is a power cut, Kill the end of a process, Stop an orderly end of
	// the node; Start begins a new incarnation at its address.
	Crash int `yaml:"crash"`
	Kill  int `yaml:"kill"`
	Stop  int `yaml:"stop"`
	Start int `yaml:"start"`
	// Swap replaces the stack of a running node.
	Swap   *NodeStack `yaml:"swap"`
	Send   *Traffic   `yaml:"send"`
	Expect *Expect    `yaml:"expect"`

	Pos config.Pos `yaml:"-"`
}

// Traffic is a row of messages.
type Traffic struct {
	From int `yaml:"from"`
	// To are the receivers; empty means everybody in the view at that time.
	To    []int         `yaml:"to"`
	Count int           `yaml:"count"`
	Every time.Duration `yaml:"every"`
	// Size is the least size of a body in bytes.
	Size int `yaml:"size"`
	// Options are none, ack or sync; Async adds the option of that name.
	Options string `yaml:"options"`
	Async   bool   `yaml:"async"`
}

// Expect is what must become true within a time.
type Expect struct {
	// Views lists groups of nodes: those of each see each other and nobody
	// else.
	Views [][]int `yaml:"views"`
	// Removed is a node that those of By, or all that run, must not see.
	Removed int           `yaml:"removed"`
	By      []int         `yaml:"by"`
	Within  time.Duration `yaml:"within"`
}

// Finally is what must be true at the end.
type Finally struct {
	// Delivered is exactly-once: every message that its sender was told has
	// arrived has been delivered once to every receiver, and the others at most
	// once; or at-most-once. Empty checks nothing.
	Delivered string `yaml:"delivered"`
	// Confirmed: no message failed.
	Confirmed bool `yaml:"confirmed"`
	// Ordered: the messages of one row arrived at each receiver in the order
	// in which they were sent.
	Ordered bool `yaml:"ordered"`
	// NoFalseRemovals: no node removed another that ran and could be reached
	// for the last three seconds.
	NoFalseRemovals bool    `yaml:"no_false_removals"`
	Views           [][]int `yaml:"views"`
}

// Values of Finally.Delivered.
const (
	exactlyOnce = "exactly-once"
	atMostOnce  = "at-most-once"
)

// ReadScenario reads a scenario; file is its name for errors. All problems are
// reported, each with its line.
func ReadScenario(file string, text []byte) (*Scenario, error) {
	s := &Scenario{
		Nodes: 3, Quiet: 5 * time.Second, file: file,
		Stack: []config.Component{{Use: "throughput"}, {Use: "dispatch"}, {Use: "failuredetector"}}, Membership: config.Component{Use: "multicast"},
	}
	if err := config.Decode(text, file, s); err != nil {
		return nil, fmt.Errorf("conformance: scenario: %w", err)
	}
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("conformance: scenario: %w", err)
	}
	slices.SortStableFunc(s.Timeline, func(a, b Step) int { return int(a.At - b.At) })
	return s, nil
}

// checkScenario collects what is wrong with a scenario.
type checkScenario struct {
	s    *Scenario
	errs []error
}

func (c *checkScenario) fail(pos config.Pos, format string, args ...any) {
	where := pos.String()
	if pos == (config.Pos{}) {
		where = c.s.file
	}
	c.errs = append(c.errs, fmt.Errorf("%s: "+format, append([]any{where}, args...)...))
}

func (c *checkScenario) node(pos config.Pos, what string, n int) {
	if n < 1 || n > c.s.Nodes {
		c.fail(pos, "%s: there is no node %d (nodes are 1 to %d)", what, n, c.s.Nodes)
	}
}

func (c *checkScenario) nodes(pos config.Pos, what string, lists ...[]int) {
	seen := map[int]bool{}
	for _, list := range lists {
		for _, n := range list {
			c.node(pos, what, n)
			if seen[n] {
				c.fail(pos, "%s: node %d is listed twice", what, n)
			}
			seen[n] = true
		}
	}
}

func (c *checkScenario) between(pos config.Pos, what string, v, low, high time.Duration) {
	if v < low || v > high {
		c.fail(pos, "%s is %v, must be %v to %v", what, v, low, high)
	}
}

func (c *checkScenario) link(pos config.Pos, l LinkFault) {
	c.between(pos, "latency", l.Latency, 0, time.Minute)
	c.between(pos, "jitter", l.Jitter, 0, time.Minute)
	if !(l.Loss >= 0 && l.Loss <= 1) {
		c.fail(pos, "loss is %v, must be 0 to 1", l.Loss)
	}
}

func (s *Scenario) validate() error {
	c := checkScenario{s: s}
	var top config.Pos
	if s.Nodes < 1 || s.Nodes > maxScenarioNodes {
		c.fail(top, "nodes is %d, must be 1 to %d", s.Nodes, maxScenarioNodes)
	}
	if len(s.Timeline) > maxScenarioSteps {
		c.fail(top, "the timeline has %d steps, more than %d", len(s.Timeline), maxScenarioSteps)
	}
	if s.Link.From != 0 || s.Link.To != 0 {
		c.fail(top, "link: from and to belong into a step")
	}
	c.link(top, s.Link)
	c.between(top, "quiet", s.Quiet, 0, maxScenarioTime)
	for _, x := range s.Stacks {
		c.node(x.Pos, "stacks", x.Node)
	}
	for _, st := range s.Timeline {
		c.step(st)
	}
	c.nodes(top, "finally: views", s.Finally.Views...)
	if !slices.Contains([]string{"", exactlyOnce, atMostOnce}, s.Finally.Delivered) {
		c.fail(top, "finally: delivered is %q, must be %s or %s", s.Finally.Delivered, exactlyOnce, atMostOnce)
	}
	return errors.Join(c.errs...)
}

func (c *checkScenario) step(st Step) {
	actions := 0
	has := func(b bool) bool {
		if b {
			actions++
		}
		return b
	}
	c.between(st.Pos, "at", st.At, 0, maxScenarioTime)
	if has(len(st.Partition) > 0) {
		c.nodes(st.Pos, "partition", st.Partition...)
	}
	has(st.Heal)
	for what, n := range map[string]int{"crash": st.Crash, "kill": st.Kill, "stop": st.Stop, "start": st.Start} {
		if has(n != 0) {
			c.node(st.Pos, what, n)
		}
	}
	if has(st.Link != nil) {
		c.link(st.Pos, *st.Link)
		c.node(st.Pos, "link: from", st.Link.From)
		c.node(st.Pos, "link: to", st.Link.To)
	}
	if has(st.Swap != nil) {
		c.node(st.Pos, "swap", st.Swap.Node)
	}
	if has(st.Send != nil) {
		c.traffic(st.Pos, st.Send)
	}
	if has(st.Expect != nil) {
		e := st.Expect
		c.between(st.Pos, "within", e.Within, 0, maxScenarioTime)
		c.nodes(st.Pos, "views", e.Views...)
		c.nodes(st.Pos, "by", e.By)
		if e.Removed != 0 {
			c.node(st.Pos, "removed", e.Removed)
		}
		if e.Removed == 0 && len(e.Views) == 0 {
			c.fail(st.Pos, "expect: say views or removed")
		}
	}
	if actions != 1 {
		c.fail(st.Pos, "a step needs exactly one of partition, heal, link, crash, kill, stop, start, swap, send, expect; it has %d", actions)
	}
}

func (c *checkScenario) traffic(pos config.Pos, x *Traffic) {
	c.node(pos, "send: from", x.From)
	c.nodes(pos, "send: to", x.To)
	if x.Count == 0 {
		x.Count = 1
	}
	if x.Count < 0 || x.Count > maxScenarioMessages {
		c.fail(pos, "send: count is %d, must be 1 to %d", x.Count, maxScenarioMessages)
	}
	if x.Size < 0 || x.Size > maxScenarioSize {
		c.fail(pos, "send: size is %d, must be 0 to %d", x.Size, maxScenarioSize)
	}
	c.between(pos, "send: every", x.Every, 0, time.Hour)
	if x.Options == "" {
		x.Options = "sync"
	}
	if !slices.Contains([]string{"none", "ack", "sync"}, x.Options) {
		c.fail(pos, "send: options is %q, must be none, ack or sync", x.Options)
	}
}

func (x *Traffic) options() channel.Options {
	o := map[string]channel.Options{"none": channel.SendNone, "ack": channel.SendAck, "sync": channel.SendSyncAck}[x.Options]
	if x.Async {
		o |= channel.Async
	}
	return o
}
