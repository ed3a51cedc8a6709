package peer_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/conformance/peer"
)

// pair is the same stack on both sides.
type pair struct {
	name         string
	ours, theirs []string
	// ordered: messages of one sender arrive in the order they were sent,
	// whatever the options.
	ordered bool
	// options are added to those of all messages.
	options channel.Options
	sizes   []int
}

const (
	ourDetector   = "failuredetector {connect_timeout: 10s, read_timeout: 10s}"
	key128        = "000102030405060708090a0b0c0d0e0f"
	key192        = key128 + "1011121314151617"
	key256        = key192 + "18191a1b1c1d1e1f"
	defaultPieces = 100 << 10
)

// dialect names the format of encrypted bodies of a Tomcat release.
func dialect(version string) string {
	patch, err := strconv.Atoi(strings.TrimPrefix(version, "10.1."))
	switch {
	case err != nil || patch >= 58:
		return "tomcat-10.1.58"
	case patch >= 56:
		return "tomcat-10.1.56"
	}
	return "tomcat-10.1.55"
}

func pairs(version string) []pair {
	sizes := []int{0, 1, 15, 16, 17, 999, 1000, 1001, 50_000}
	all := []pair{
		{name: "throughput", ours: []string{"throughput", "dispatch", ourDetector}, theirs: []string{"throughput", "dispatch", "detector"}},
		{name: "gzip", ours: []string{"dispatch", "gzip", ourDetector}, theirs: []string{"dispatch", "gzip", "detector"}},
		{name: "gzip-min-size", ours: []string{"dispatch", "gzip {min_size: 500}", ourDetector}, theirs: []string{"dispatch", "gzip:min=900", "detector"}},
		{name: "fragment", ours: []string{"dispatch", "fragment {max_size: 1000}", ourDetector}, theirs: []string{"dispatch", "fragment:max=700", "detector"}},
		{name: "fragment-default", ours: []string{"dispatch", "fragment", ourDetector}, theirs: []string{"dispatch", "fragment", "detector"},
			sizes: []int{0, defaultPieces - 1, defaultPieces, defaultPieces + 1, 3*defaultPieces + 7}},
		{name: "order", ordered: true, ours: []string{"dispatch", "order", ourDetector}, theirs: []string{"order", "dispatch", "detector"}},
		{name: "twophase", ours: []string{"twophase {option_flag: 0}", "dispatch", ourDetector}, theirs: []string{"twophase", "dispatch", "detector"}},
		{name: "twophase-marked", options: channel.TwoPhase, ours: []string{"twophase", "dispatch", ourDetector},
			theirs: []string{fmt.Sprintf("twophase:flag=%d", channel.TwoPhase), "dispatch", "detector"}},
		// Order stands below what changes bodies: above, Tribes spoils all but
		// the first copy of a message. It stands above Tribes' dispatch, which
		// keeps no order.
		{name: "gzip-fragment-order", ordered: true,
			ours:   []string{"dispatch", "gzip", "fragment {max_size: 1000}", "order", ourDetector},
			theirs: []string{"gzip", "fragment:max=1000", "order", "dispatch", "detector"}},
		{name: "twophase-gzip", ours: []string{"twophase {option_flag: 0}", "dispatch", "gzip", ourDetector}, theirs: []string{"twophase", "dispatch", "gzip", "detector"}},
	}
	for _, e := range []struct{ name, algorithm, key string }{
		{"default", "", key128},
		{"gcm", "AES/GCM/NoPadding", key128}, {"gcm-192", "AES/GCM/NoPadding", key192}, {"gcm-256", "AES/GCM/NoPadding", key256},
		{"cbc", "AES/CBC/PKCS5Padding", key256}, {"cfb", "AES/CFB/PKCS5Padding", key128}, {"ofb", "AES/OFB/PKCS5Padding", key128},
	} {
		ours := fmt.Sprintf("encrypt {dialect: %s, key: '%s'}", dialect(version), e.key)
		theirs := "encrypt:key=" + e.key
		if e.algorithm != "" {
			ours = fmt.Sprintf("encrypt {dialect: %s, key: '%s', algorithm: %s}", dialect(version), e.key, e.algorithm)
			theirs += ":algorithm=" + e.algorithm
		}
		all = append(all, pair{name: "encrypt-" + e.name, ours: []string{"dispatch", ours, ourDetector}, theirs: []string{"dispatch", theirs, "detector"}})
		if e.name == "gcm" {
			all = append(all,
				pair{name: "gzip-encrypt", ours: []string{"dispatch", "gzip", ours, ourDetector}, theirs: []string{"dispatch", "gzip", theirs, "detector"}},
				pair{name: "fragment-encrypt", ours: []string{"dispatch", "fragment {max_size: 1000}", ours, ourDetector},
					theirs: []string{"dispatch", "fragment:max=1000", theirs, "detector"}},
				pair{name: "everything", ordered: true,
					ours:   []string{"throughput", "twophase {option_flag: 0}", "dispatch", "gzip", "fragment {max_size: 1000}", ours, "order", ourDetector},
					theirs: []string{"throughput", "twophase", "gzip", "fragment:max=1000", theirs, "order", "dispatch", "detector"}})
		}
	}
	for i := range all {
		if all[i].sizes == nil {
			all[i].sizes = sizes
		}
	}
	return all
}

// Each layer, and several at once, in the stacks of two nodes of ours and one
// Tribes node: everything arrives whole and once, to one and to many, with and
// without acknowledgements.
func testStack(t *testing.T, j *peer.JVM, p pair) {
	g := newGroup(t, j)
	stack := func(c *nodeConfig) { c.stack = p.ours }
	a, c := g.longhouse(stack), g.longhouse(stack)
	b := g.tribes(func(c *peer.Config) { c.Stack = p.theirs })
	together(t, []*longhouse{a, c}, []*peer.Node{b})
	for _, o := range []optionCase{{"sync-ack", channel.SendSyncAck}, {"ack", channel.SendAck}, {"async", channel.SendAsync}, {"none", channel.SendNone}} {
		if p.ordered && o.name == "none" {
			continue // a lost or late message is a gap that order waits for
		}
		o.options |= p.options
		exchangeSizes(t, a, b, o, 40, p.sizes)
		if t.Failed() {
			t.Fatalf("with %s", o.name)
		}
	}
	// One message to both of the others, from each.
	for _, o := range []channel.Options{channel.SendSyncAck | p.options, channel.SendAsync | p.options} {
		ours, theirs := fmt.Sprintf("ours to all with %d: %0900d", o, 7), fmt.Sprintf("theirs to all with %d: %0900d", o, 7)
		if err := a.Send(within(t), a.View().Members, []byte(ours), o); err != nil {
			t.Fatal(err)
		}
		if err := b.Send(within(t), peer.Send{Value: peer.Bytes(theirs), Options: uint32(o)}); err != nil {
			t.Fatal(err)
		}
		c.once(ours, theirs)
		a.once(theirs)
		once(t, b, ours)
	}
	if p.ordered {
		testOrdered(t, a, c, b)
	}
}

// Many messages of one sender, with options that keep no order by themselves.
func testOrdered(t *testing.T, a, c *longhouse, b *peer.Node) {
	const count = 300
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := b.Send(within(t), peer.Send{Value: peer.Bytes("in order "), Count: count, Options: uint32(channel.SendAsync | channel.UseAck)}); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		for i := range count {
			if err := a.Send(within(t), a.View().Members, fmt.Appendf(nil, "our order 0/%d", i), channel.SendAsync|channel.UseAck); err != nil {
				t.Error(err)
				return
			}
		}
	})
	wg.Wait()
	number := func(body, prefix string) (int, bool) {
		rest, ok := strings.CutPrefix(body, prefix+"0/")
		n, err := strconv.Atoi(rest)
		return n, ok && err == nil
	}
	for _, n := range []*longhouse{a, c} {
		var got []int
		n.wait(n.got, "the messages in order", func() bool {
			got = got[:0]
			for _, body := range n.got.Bodies() {
				if k, ok := number(body, "in order "); ok {
					got = append(got, k)
				}
			}
			return len(got) >= count
		})
		if !slices.IsSorted(got) || len(got) != count {
			t.Errorf("we got %d messages of the Tribes node, %v", len(got), got)
		}
	}
	var got []int
	if err := b.Wait(within(t), "message", func(evs []peer.Event) bool {
		got = got[:0]
		for _, e := range evs {
			if body, ok := e.Value().(peer.Bytes); ok {
				if k, ok := number(string(body), "our order "); ok {
					got = append(got, k)
				}
			}
		}
		return len(got) >= count
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.IsSorted(got) || len(got) != count {
		t.Errorf("the Tribes node got %d messages of ours, %v", len(got), got)
	}
}

// A message that cannot be decrypted reaches no application, on either side.
func testWrongKey(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	right := fmt.Sprintf("encrypt {dialect: %s, algorithm: AES/GCM/NoPadding, key: '%s'}", dialect(j.Version), key128)
	a := g.longhouse(func(c *nodeConfig) { c.stack = []string{"dispatch", right, ourDetector} })
	b := g.tribes(func(c *peer.Config) {
		c.Stack = []string{"dispatch", "encrypt:algorithm=AES/GCM/NoPadding:key=ff" + key128[2:], "detector"}
	})
	c := g.tribes(func(c *peer.Config) {
		c.Stack = []string{"dispatch", "encrypt:algorithm=AES/GCM/NoPadding:key=" + key128, "detector"}
	})
	together(t, []*longhouse{a}, []*peer.Node{b, c})
	// Tribes acknowledges what it drops; we do not.
	_ = a.Send(within(t), a.View().Members, []byte("secret of ours"), channel.SendSyncAck)
	_ = b.Send(within(t), peer.Send{Value: peer.Bytes("under the wrong key"), Options: uint32(channel.SendSyncAck)})
	if err := c.Send(within(t), peer.Send{Value: peer.Bytes("secret of theirs"), To: []string{a.id()}, Options: uint32(channel.SendSyncAck)}); err != nil {
		t.Fatal(err)
	}
	a.once("secret of theirs")
	once(t, c, "secret of ours")
	if n := len(a.got.Messages()); n != 1 {
		t.Errorf("we got %d messages: %q", n, a.got.Bodies())
	}
	for _, e := range b.Events("message") {
		t.Errorf("the Tribes node with the wrong key got %v", e.Value())
	}
}

// Nodes of two domains in one group see and hear only their own.
func testDomain(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	ours := func(d string) *longhouse {
		return g.longhouse(func(c *nodeConfig) {
			c.local.Domain = d
			c.stack = []string{"dispatch", "domain {domain: " + d + "}", ourDetector}
		})
	}
	theirs := func(d string) *peer.Node {
		return g.tribes(func(c *peer.Config) { c.Domain = d; c.Stack = []string{"dispatch", "domain:domain=" + d, "detector"} })
	}
	a, b := ours("east"), theirs("east")
	c, d := ours("west"), theirs("west")
	watcher := g.longhouse(nil) // sees all: the silence of the others is no accident
	watcher.sees(a.id(), b.ID(), c.id(), d.ID())
	together(t, []*longhouse{a}, []*peer.Node{b})
	together(t, []*longhouse{c}, []*peer.Node{d})
	for _, p := range []struct {
		ours   *longhouse
		theirs *peer.Node
	}{{a, b}, {c, d}} {
		exchangeSizes(t, p.ours, p.theirs, optionCase{"sync-ack", channel.SendSyncAck}, 5, []int{1000})
	}
	// A message from another domain is dropped, even when it comes.
	_ = watcher.Send(within(t), watcher.View().Members, []byte("from nowhere"), channel.SendSyncAck)
	before := len(a.got.Messages())
	exchangeSizes(t, a, b, optionCase{"ack", channel.SendAck}, 1, nil)
	for _, m := range a.got.Messages()[before:] {
		if string(m.Body) == "from nowhere" {
			t.Error("our filter let a message of another domain pass")
		}
	}
	for _, n := range []*peer.Node{b, d} {
		for _, e := range n.Events("message") {
			if v, ok := e.Value().(peer.Bytes); ok && string(v) == "from nowhere" {
				t.Error("the Tribes node took a message of a node without its domain: is the domain in our record?")
			}
		}
	}
}

// Pings go both ways and reach no application.
func testPing(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	// Without a failure detector below it, Tribes' ping is a message.
	a := g.longhouse(func(c *nodeConfig) { c.stack = []string{"dispatch", "ping {interval: 200ms, timeout: 20s}"} })
	b := g.tribes(func(c *peer.Config) { c.Stack = []string{"dispatch", "ping:interval=200"} })
	together(t, []*longhouse{a}, []*peer.Node{b})
	poll(t, j, "pings both ways", func() bool {
		return a.counter("ping_received_total") >= 3 && a.counter("ping_answered_total") >= 3
	})
	exchangeSizes(t, a, b, optionCase{"sync-ack", channel.SendSyncAck}, 5, []int{1000})
	for _, m := range a.got.Messages() {
		if len(m.Body) == 64 {
			t.Errorf("a ping came up to our application: %x", m.Body)
		}
	}
	for _, e := range b.Events("message") {
		if v, ok := e.Value().(peer.Bytes); ok && len(v) == 64 {
			t.Errorf("our ping came up to the application of the Tribes node: %x", v)
		}
	}
}

// A message that does not reach everybody is delivered by nobody, whoever
// sends it.
func testAbort(t *testing.T, j *peer.JVM) {
	g := newGroup(t, j)
	stack := func(c *nodeConfig) { c.stack = []string{"twophase {option_flag: 0}"} }
	a := g.longhouse(stack)
	b := g.tribes(func(c *peer.Config) { c.Stack = []string{"twophase"}; c.DropTime = patience })
	dead := g.longhouse(func(c *nodeConfig) {
		stack(c)
		c.membership = func(channel.Settings) (channel.Membership, error) {
			return &beacon{group: fmt.Sprintf("%s:%d", g.address, g.port)}, nil
		}
	})
	a.sees(b.ID(), dead.id())
	seen(t, b, a.id(), dead.id())
	all := a.View().Members
	dead.stop() // it says no goodbye
	for _, o := range []channel.Options{channel.SendAck, channel.SendSyncAck} {
		if err := a.Send(within(t), all, []byte("ours to a dead member"), o); err == nil {
			t.Errorf("%v: our message to a dead member was sent", o)
		}
		if err := b.Send(within(t), peer.Send{Value: peer.Bytes("theirs to a dead member"), Options: uint32(o)}); err == nil {
			t.Errorf("%v: their message to a dead member was sent", o)
		}
	}
	exchangeSizes(t, a, b, optionCase{"sync-ack", channel.SendSyncAck}, 5, nil)
	for _, body := range a.got.Bodies() {
		if body == "theirs to a dead member" {
			t.Error("we delivered a message that was not confirmed")
		}
	}
	for _, e := range b.Events("message") {
		if v, ok := e.Value().(peer.Bytes); ok && string(v) == "ours to a dead member" {
			t.Error("the Tribes node delivered a message that was not confirmed")
		}
	}
}
