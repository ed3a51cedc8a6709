package cmd

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/core/container"
	"github.com/longhouse-go/longhouse/core/session"
)

var splitFor = flag.Duration("split", 10*time.Second, "how long a group is split")

// twoNets are two networks with a line between them that can be cut, in network
// namespaces of their own: nothing of this machine's network is touched but for a
// link to each node.
type twoNets struct{ hub string }

// ip runs the program of that name.
func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// newTwoNets also makes the namespaces of the nodes: the first ones, as many as
// left says, are in the first network. It returns where each is to run.
func newTwoNets(t *testing.T, nodes, left int) (*twoNets, func(route string) (command []string, clients, members string)) {
	t.Helper()
	unique := strconv.Itoa(os.Getpid() % 100_000)
	n := &twoNets{"lh" + unique}
	if os.Getuid() != 0 {
		t.Skip("makes network namespaces: run the test as root")
	}
	if out, err := exec.Command("ip", "netns", "add", n.hub).CombinedOutput(); err != nil {
		if os.Getenv("LONGHOUSE_CI") != "" {
			t.Fatalf("cannot make a network namespace: %v: %s", err, out)
		}
		t.Skipf("cannot make a network namespace (needs iproute2 and CAP_SYS_ADMIN): %v: %s", err, out)
	}
	drop := func(name string) { t.Cleanup(func() { ip(t, "netns", "del", name) }) }
	drop(n.hub)
	hub := func(args ...string) { ip(t, append([]string{"-n", n.hub}, args...)...) }
	for _, bridge := range []string{"net0", "net1"} {
		hub("link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
		hub("link", "set", bridge, "up")
	}
	hub("link", "add", "line0", "type", "veth", "peer", "name", "line1")
	for i, end := range []string{"line0", "line1"} {
		hub("link", "set", end, "master", fmt.Sprint("net", i), "up")
	}
	// 198.18.0.0/15 is for tests of networks, see RFC 2544.
	outside := func(i, host int) string { return fmt.Sprintf("198.18.%d.%d", i, host) }
	for i := range nodes {
		ns, net, port := fmt.Sprint(n.hub, "n", i), fmt.Sprint("net", min(i/left, 1)), fmt.Sprint("node", i)
		link := fmt.Sprint("lh", unique, "-", i)
		ip(t, "netns", "add", ns)
		drop(ns)
		in := func(args ...string) { ip(t, append([]string{"-n", ns}, args...)...) }
		in("link", "set", "lo", "up")
		in("link", "add", "members", "type", "veth", "peer", "name", port, "netns", n.hub)
		hub("link", "set", port, "master", net, "up")
		in("address", "add", fmt.Sprintf("198.19.0.%d/24", i+1), "dev", "members")
		in("link", "set", "members", "up")
		in("route", "add", "224.0.0.0/4", "dev", "members")
		// The clients' link, which is never cut.
		ip(t, "link", "add", link, "type", "veth", "peer", "name", "clients", "netns", ns)
		t.Cleanup(func() { ip(t, "link", "del", link) }) // the kernel takes its time to end a namespace
		in("address", "add", outside(i, 2)+"/30", "dev", "clients")
		in("link", "set", "clients", "up")
		ip(t, "address", "add", outside(i, 1)+"/30", "dev", link)
		ip(t, "link", "set", link, "up")
	}
	return n, func(route string) ([]string, string, string) {
		i := int(route[0] - 'a')
		return []string{"ip", "netns", "exec", fmt.Sprint(n.hub, "n", i)}, outside(i, 2), fmt.Sprintf("198.19.0.%d", i+1)
	}
}

// cut cuts the line between the two networks, or mends it.
func (n *twoNets) cut(t *testing.T, yes bool) {
	ip(t, "-n", n.hub, "link", "set", "line0", map[bool]string{true: "down", false: "up"}[yes])
}

// sessionReport is what the nodes' admin APIs say of the default manager's
// sessions: how many they own in all, and all conflicts.
func sessionReport(nodes []*node) (owned int, conflicts []session.Conflict) {
	for _, n := range nodes {
		var r container.SessionReport
		n.admin("/v1/sessions?limit=1000", &r)
		for _, t := range r.Tables {
			owned += t.Status.Owned
			conflicts = append(conflicts, t.Conflicts...)
		}
	}
	return owned, session.JoinConflicts(1000, conflicts)
}

// Five nodes are split into two and three, and written to on both sides: after
// the split the session has one owner, nothing is lost of what only one client
// wrote or what has a merge rule, and the conflict about what both sides wrote is
// listed.
func TestSplit(t *testing.T) {
	for _, manager := range managersUnderTest() {
		t.Run(manager, func(t *testing.T) { splitNodes(t, manager) })
	}
}

func splitNodes(t *testing.T, manager string) {
	t.Setenv(testAppEnv, "1")
	g := newGroup(t)
	var net *twoNets
	net, g.place = newTwoNets(t, 5, 2)
	var nodes []*node
	for i := range 5 {
		nodes = append(nodes, g.start(string(rune('a'+i)), "--set", "cluster.send=sync", "--set", "cluster.manager.use="+manager))
	}
	sides := [2][]*node{nodes[:2], nodes[2:]}
	awaitMembers(5, nodes...)
	user := newClient(t)
	user.must(t, "GET", nodes[0], testPath+"/new")
	say := func(n *node, path string) string {
		_, body, err := user.do("GET", n, testPath+path)
		if err != nil {
			return err.Error()
		}
		return body
	}
	// Each writes what it has seen the one before write.
	for i := range 10 {
		n := nodes[i%5]
		eventually(t, 30*time.Second, "the write before", func() bool { return i == 0 || say(n, "/read?a=turn") == strconv.Itoa(i-1) })
		user.must(t, "GET", n, testPath+"/write?a=turn&v="+strconv.Itoa(i))
	}
	if _, list := sessionReport(nodes); len(list) > 0 {
		t.Errorf("conflicts before the split: %+v", list)
	}

	net.cut(t, true)
	var wg sync.WaitGroup
	var mu sync.Mutex
	added, maybe := 0, 0
	last := make([]string, 5) // of each client's attribute; unsure if not acknowledged
	unsure := make([][]string, 5)
	common := [2]int{}
	for client := range 5 {
		c := newClient(t)
		c.cookie = user.cookie
		side := client % 2
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(*dice, uint64(client)))
			for i, from := 0, time.Now(); time.Since(from) < *splitFor; i++ {
				n := sides[side][rnd.IntN(len(sides[side]))]
				ok := func(path string) bool {
					code, _, err := c.do("GET", n, testPath+path)
					return err == nil && code == http.StatusOK
				}
				v := fmt.Sprintf("%d.%d", client, i)
				own, both, add := ok(fmt.Sprintf("/write?a=own%d&v=%s", client, v)), ok("/write?a=common&v="+v), ok("/add")
				mu.Lock()
				if own {
					last[client] = v
				} else {
					unsure[client] = append(unsure[client], v)
				}
				if both {
					common[side]++
				}
				if add {
					added++
				} else {
					maybe++
				}
				mu.Unlock()
				time.Sleep(time.Duration(rnd.IntN(100)) * time.Millisecond) // users are slow
			}
		})
	}
	wg.Wait()
	for i, side := range sides {
		awaitMembers(2+i, side...)
	}
	doubled, _ := sessionReport(nodes)
	net.cut(t, false)
	healed := time.Now()
	awaitMembers(5, nodes...)
	t.Logf("one group again after %v", time.Since(healed).Round(time.Millisecond))
	if doubled > 0 {
		eventually(t, time.Minute, "one owner", func() bool { n, _ := sessionReport(nodes); return n == 1 })
	}
	paths := []string{"/read?a=common", "/number?a=sum", "/read?a=own0", "/read?a=own1", "/read?a=own2", "/read?a=own3", "/read?a=own4"}
	eventually(t, 2*time.Minute, "all nodes say the same", func() bool {
		return !slices.ContainsFunc(paths, func(p string) bool {
			first := say(nodes[0], p)
			return slices.ContainsFunc(nodes, func(n *node) bool { return say(n, p) != first })
		})
	})
	for client := range 5 {
		if v := say(nodes[0], fmt.Sprint("/read?a=own", client)); v != last[client] && !slices.Contains(unsure[client], v) {
			t.Errorf("client %d: %q is lost, there is %q", client, last[client], v)
		}
	}
	if sum, err := strconv.Atoi(say(nodes[0], "/number?a=sum")); err != nil || sum < added || sum > added+maybe {
		t.Errorf("the sum is %d, %d were added and %d perhaps: %v", sum, added, maybe, err)
	}
	_, list := sessionReport(nodes)
	side := map[string]int{}
	for i, n := range nodes {
		var members []struct {
			ID    string `json:"id"`
			Local bool   `json:"local"`
		}
		n.admin("/v1/members", &members)
		for _, m := range members {
			if m.Local {
				side[m.ID[:16]] = min(i/2, 1)
			}
		}
	}
	across := 0
	for _, x := range list {
		if x.Attribute != "common" && (!strings.HasPrefix(x.Attribute, "own") || maybe == 0) {
			t.Errorf("a conflict about %s: %+v", x.Attribute, x)
		}
		if x.Attribute == "common" && side[x.Kept.Node] != side[x.Lost.Node] {
			across++
		}
	}
	if across == 0 {
		t.Errorf("both sides wrote one attribute, %v times, and no node lists that conflict: %+v", common, list)
	}
	t.Logf("%d and %d writes of one attribute on the two sides; owners in the split: %d; sum %d of %d and perhaps %d; %d conflicts listed, %d of them between the sides",
		common[0], common[1], doubled, added, added, maybe, len(list), across)
}
