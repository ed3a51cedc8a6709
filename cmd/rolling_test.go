package cmd

import (
	"context"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/core/container"
)

// drainLimit is more than any machine needs for a drain of the tests.
const drainLimit = 60 * time.Second

// terminate sends SIGTERM and waits for the end of the process.
func (n *node) terminate() {
	n.t.Helper()
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		n.t.Fatal(err)
	}
	n.awaitEnd()
}

func (n *node) awaitEnd() {
	n.t.Helper()
	select {
	case <-n.dead:
	case <-time.After(drainLimit + 30*time.Second):
		n.t.Fatalf("the node does not end; its log:\n%s", n.log)
	}
}

// drainReport reads what a drained node has written to its working directory.
func drainReport(t *testing.T, dir string) (r container.DrainReport) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "drain.json"))
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// rollingUser is one user with a cookie behind the balancer. One request of it
// runs at a time; acked is what the last answer was.
type rollingUser struct {
	mu     sync.Mutex
	cookie string
	acked  int64
}

// rollingLoad drives users against the balancer.
type rollingLoad struct {
	t       *testing.T
	front   string
	client  *http.Client
	served  atomic.Int64
	failed  atomic.Int64
	lost    atomic.Int64
	newIDs  atomic.Int64
	slowest atomic.Int64 // ns
	once    sync.Once
}

// ask sends one request of a user and checks the counter that it answers: it
// must know every write that was acknowledged.
func (l *rollingLoad) ask(u *rollingUser, method, path string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	req, err := http.NewRequest(method, l.front+path, nil)
	if err != nil {
		l.t.Error(err)
		return
	}
	if u.cookie != "" {
		req.Header.Set("Cookie", "JSESSIONID="+u.cookie)
	}
	start := time.Now()
	resp, err := l.client.Do(req)
	l.served.Add(1)
	var body []byte
	if err == nil {
		body, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	for d := int64(time.Since(start)); ; {
		old := l.slowest.Load()
		if d <= old || l.slowest.CompareAndSwap(old, d) {
			break
		}
	}
	if err != nil || resp.StatusCode != http.StatusOK {
		l.fail("%s %s: %v %.200s", method, path, err, body)
		return
	}
	for _, c := range resp.Cookies() {
		if c.Name != "JSESSIONID" {
			continue
		}
		if u.cookie != "" {
			was, _, _ := strings.Cut(u.cookie, ".")
			if now, _, _ := strings.Cut(c.Value, "."); was != now {
				l.newIDs.Add(1)
				l.once.Do(func() { l.t.Errorf("a user got another session: %.8s… was %.8s…", now, was) })
			}
		}
		u.cookie = c.Value
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(body)), 10, 64)
	if err != nil {
		l.fail("%s %s answers %.100q", method, path, body)
		return
	}
	// A write that was repeated after a broken connection may count twice; it
	// never counts less than once.
	want := u.acked
	if path != "/read" {
		want++
	}
	if n < want {
		l.lost.Add(1)
		l.once.Do(func() { l.t.Errorf("%s answers %d after %d writes were acknowledged", path, n, u.acked) })
	}
	u.acked = max(n, u.acked)
}

func (l *rollingLoad) fail(format string, args ...any) {
	l.failed.Add(1)
	l.once.Do(func() { l.t.Errorf("a request failed: "+format, args...) })
}

// All five nodes of a cluster are restarted, one after the other, under load
// and behind the demo's balancer. No request fails, no session and no
// acknowledged write is lost, and every node proves where its sessions are before
// it goes.
func TestRollingRestart(t *testing.T) {
	tested := managersUnderTest()
	if !given("manager") {
		tested = tested[:1] // half a minute each
	}
	for _, manager := range tested {
		t.Run(manager, func(t *testing.T) { rollingRestart(t, manager) })
	}
}

// given reports whether a flag is on the command line.
func given(name string) (yes bool) {
	flag.Visit(func(f *flag.Flag) { yes = yes || f.Name == name })
	return yes
}

func rollingRestart(t *testing.T, manager string) {
	const nodes, workers = 5, 8
	g := newGroup(t)
	routes := make([]string, nodes)
	for i := range routes {
		routes[i] = "n" + strconv.Itoa(i+1)
	}
	b := newBalancer(routes)
	front := httptest.NewServer(b)
	defer front.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var watchers sync.WaitGroup
	defer watchers.Wait()
	defer cancel()

	type running struct {
		*node
		dir    string
		forget context.CancelFunc
	}
	start := func(route string) running {
		dir := t.TempDir()
		n := g.start(route, "--set", "cluster.send=sync", "--set", "cluster.manager.use="+manager, "--set", "log.level=info",
			"--set", "node.work_dir="+dir, "--set", "node.drain_timeout="+drainLimit.String())
		n.awaitReady()
		watch, forget := context.WithCancel(ctx)
		b.set(route, n.HTTP[0])
		watchers.Go(func() { b.watch(watch, route, &url.URL{Scheme: "http", Host: n.Admin}) })
		return running{n, dir, forget}
	}
	all := make([]running, nodes)
	for i, route := range routes {
		all[i] = start(route)
	}
	members := func() (ns []*node) {
		for _, n := range all {
			ns = append(ns, n.node)
		}
		return ns
	}
	awaitMembers(nodes, members()...)

	tr := &http.Transport{MaxIdleConnsPerHost: workers}
	defer tr.CloseIdleConnections()
	load := &rollingLoad{t: t, front: front.URL, client: &http.Client{Transport: tr, Timeout: time.Minute}}
	users := make([]*rollingUser, rollingUsers())
	for i := range users {
		users[i] = &rollingUser{}
	}
	each := func(path string) {
		var wg sync.WaitGroup
		var next atomic.Int64
		for range workers {
			wg.Go(func() {
				for i := next.Add(1) - 1; i < int64(len(users)); i = next.Add(1) - 1 {
					load.ask(users[i], http.MethodGet, path)
				}
			})
		}
		wg.Wait()
	}
	began := time.Now()
	each("/write?size=256")
	if load.failed.Load() > 0 {
		t.FailNow()
	}
	t.Logf("%s: %d sessions on %d nodes after %v", manager, len(users), nodes, time.Since(began).Round(time.Millisecond))

	loading, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	fresh := make([][]*rollingUser, workers) // users that come meanwhile
	for w := range workers {
		wg.Go(func() {
			for i := w; loading.Err() == nil; i += workers {
				switch path := "/write?size=256"; {
				case i/workers%20 == 7:
					u := &rollingUser{}
					load.ask(u, http.MethodGet, path)
					fresh[w] = append(fresh[w], u)
				case i%3 == 0:
					load.ask(users[i%len(users)], http.MethodGet, "/read")
				default:
					load.ask(users[i%len(users)], http.MethodGet, path)
				}
			}
		})
	}
	proved, longest := 0, time.Duration(0)
	for i, route := range routes {
		before := load.served.Load()
		eventually(t, time.Minute, "load", func() bool { return load.served.Load() > before+200 })
		stopped := time.Now()
		all[i].terminate()
		took := time.Since(stopped)
		longest = max(longest, took)
		all[i].forget()
		r := drainReport(t, all[i].dir)
		if r.State != container.Drained || r.Left != 0 || r.HandedOver != r.Sessions || len(r.List) != r.Sessions || r.Sessions == 0 {
			t.Errorf("%s: %s, %d sessions, %d handed over, %d left, %d listed: %v; its log:\n%s", route, r.State, r.Sessions, r.HandedOver, r.Left, len(r.List), r.Problems, all[i].log)
		}
		if bad := slices.IndexFunc(r.List, func(h container.HandedOver) bool { return len(h.Holders) == 0 || h.Digest == "" || h.Session == "" }); bad >= 0 {
			t.Errorf("%s: %+v", route, r.List[bad])
		}
		proved += r.HandedOver
		t.Logf("%s: drained %d sessions in %.2f s, ended after %v; holders %v", route, r.Sessions, r.Took, took.Round(time.Millisecond), r.Holders)
		all[i] = start(route)
		awaitMembers(nodes, members()...)
	}
	stop()
	wg.Wait()
	for _, list := range fresh {
		users = append(users, list...)
	}
	each("/read")
	t.Logf("%s: 5 nodes restarted, %d sessions; %d requests, %d failed; %d users with another session, %d lost writes; %d handovers proved; slowest request %v, longest stop %v",
		manager, len(users), load.served.Load(), load.failed.Load(), load.newIDs.Load(), load.lost.Load(), proved,
		time.Duration(load.slowest.Load()).Round(time.Millisecond), longest.Round(time.Millisecond))
	if load.failed.Load() > 0 || load.newIDs.Load() > 0 || load.lost.Load() > 0 {
		t.Fail()
	}
}

// POST /v1/drain answers with the proof, the node ends by itself, and meanwhile
// it takes no new sessions but serves its users.
func TestDrainByAdmin(t *testing.T) {
	g := newGroup(t)
	args := []string{"--set", "cluster.send=async", "--set", "node.drain_grace=30s"}
	a, b := g.start("a", args...), g.start("b", args...)
	awaitMembers(2, a, b)
	a.awaitReady()
	c := newClient(t)
	c.must(t, "GET", a, "/write")
	stranger := newClient(t)

	// The users of a keep it from closing its connectors until this test has
	// seen what it wants.
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	acked := ""
	wg.Go(func() {
		for ctx.Err() == nil {
			code, body, err := c.do("GET", a, "/write")
			if err != nil || code != http.StatusOK {
				t.Errorf("a user of the draining node: %d %v %s", code, err, body)
				return
			}
			acked = strings.TrimSpace(body)
		}
	})
	answer := make(chan string, 1)
	go func() {
		resp, err := http.Post("http://"+a.Admin+"/v1/drain?limit=10", "", nil)
		if err != nil {
			answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		answer <- string(body)
	}()
	eventually(t, 20*time.Second, "not ready", func() bool {
		resp, err := http.Get("http://" + a.Admin + "/readyz")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusServiceUnavailable
	})
	for method, want := range map[string]string{"GET": "no-session", "POST": "refused"} {
		path := map[string]string{"GET": "/write", "POST": "/set?dataName=a&dataValue=b"}[method]
		req, _ := http.NewRequest(method, "http://"+a.HTTP[0]+path, nil)
		resp, err := stranger.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := resp.Header.Get("Longhouse-Draining"); resp.StatusCode != http.StatusServiceUnavailable || got != want || len(resp.Cookies()) > 0 {
			t.Errorf("%s without a session: %d, %q", method, resp.StatusCode, got)
		}
	}
	stop()
	wg.Wait()
	var r container.DrainReport
	if text := <-answer; json.Unmarshal([]byte(text), &r) != nil || r.State != container.Drained || r.Sessions != 1 || r.HandedOver != 1 || len(r.List) != 1 {
		t.Fatalf("the drain answers %s", text)
	}
	if h := r.List[0]; !slices.Equal(h.Holders, []string{"b"}) || !strings.HasPrefix(c.cookie, strings.TrimSuffix(h.Session, "…")) {
		t.Errorf("%+v", h)
	}
	a.awaitEnd()
	if n := strings.TrimSpace(c.must(t, "GET", b, "/read")); n != acked {
		t.Errorf("the other node has n=%s, the last write answered %s", n, acked)
	}
	t.Logf("the session is on b with n=%s; the drain took %.2f s", acked, r.Took)
}

// A node without others cannot hand over: it says what is lost, and does not
// wait for the time to drain to end.
func TestDrainAlone(t *testing.T) {
	g := newGroup(t)
	dir := t.TempDir()
	a := g.start("a", "--set", "node.work_dir="+dir, "--set", "node.drain_timeout=10m", "--set", "node.drain_grace=10m")
	a.awaitReady()
	newClient(t).must(t, "GET", a, "/write")
	a.terminate()
	r := drainReport(t, dir)
	if r.State != container.DrainIncomplete || r.Left != 1 || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "1 sessions are not handed over: there is no other member") {
		t.Errorf("%+v", r)
	}
	if !strings.Contains(a.log.String(), "some sessions end with this node") {
		t.Errorf("the log does not say so:\n%s", a.log)
	}
}

// If the only other node is frozen, a drain ends within its time and says what
// it could not hand over.
func TestDrainToFrozen(t *testing.T) {
	for _, manager := range managersUnderTest() {
		t.Run(manager, func(t *testing.T) {
			g := newGroup(t)
			dir := t.TempDir()
			set := []string{"--set", "cluster.manager.use=" + manager}
			a, b := g.start("a", append(set, "--set", "node.work_dir="+dir, "--set", "node.drain_timeout=4s")...), g.start("b", set...)
			awaitMembers(2, a, b)
			frozen := b.processes()
			signalAll(t, frozen, syscall.SIGSTOP)
			defer signalAll(t, frozen, syscall.SIGCONT)
			const users = 3
			for range users {
				newClient(t).must(t, "GET", a, "/write")
			}
			start := time.Now()
			a.terminate()
			r := drainReport(t, dir)
			if r.State != container.DrainIncomplete || r.Left != users || r.HandedOver != 0 || len(r.Problems) == 0 {
				t.Errorf("%+v", r)
			}
			t.Logf("%s: ended after %v: %v", manager, time.Since(start).Round(time.Millisecond), r.Problems)
		})
	}
}

// Two of three nodes are told to stop at the same time: all sessions are on the
// third then, and nobody names one that goes, too.
func TestTwoDrain(t *testing.T) {
	for _, manager := range managersUnderTest() {
		t.Run(manager, func(t *testing.T) {
			const users = 30
			g := newGroup(t)
			var nodes []*node
			var dirs []string
			for _, route := range []string{"a", "b", "c"} {
				dirs = append(dirs, t.TempDir())
				nodes = append(nodes, g.start(route, "--set", "cluster.manager.use="+manager, "--set", "cluster.send=sync", "--set", "node.work_dir="+dirs[len(dirs)-1]))
			}
			awaitMembers(3, nodes...)
			var all []*client
			for i := range users {
				c := newClient(t)
				c.must(t, "GET", nodes[i%3], "/write")
				all = append(all, c)
			}
			for _, n := range nodes[:2] {
				if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
			}
			var named [2]map[string]int
			for i, n := range nodes[:2] {
				n.awaitEnd()
				r := drainReport(t, dirs[i])
				if r.State != container.Drained || r.Left != 0 || r.Sessions == 0 {
					t.Errorf("%+v", r)
				}
				named[i] = r.Holders
				t.Logf("%d sessions, holders %v", r.Sessions, r.Holders)
			}
			if named[0]["b"] > 0 && named[1]["a"] > 0 {
				t.Error("both name each other")
			}
			for i, c := range all {
				if got := strings.TrimSpace(c.must(t, "GET", nodes[2], "/read")); got != "1" {
					t.Errorf("user %d: %s", i, got)
				}
			}

			// Nobody is left to take them if the last two go.
			d := g.start("d", "--set", "cluster.manager.use="+manager, "--set", "cluster.send=sync", "--set", "node.work_dir="+dirs[0])
			awaitMembers(2, nodes[2], d)
			last := []*node{nodes[2], d}
			for _, n := range last {
				if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
			}
			left, why := 0, ""
			for i, n := range last {
				n.awaitEnd()
				r := drainReport(t, []string{dirs[2], dirs[0]}[i])
				if r.Left > 0 {
					left++
					why += strings.Join(r.Problems, "; ")
				}
			}
			if left == 0 || !strings.Contains(why, "going to stop, too") && !strings.Contains(why, "no other member") {
				t.Errorf("%d of the last two nodes say that sessions are left: %q", left, why)
			}
			t.Log(why)
		})
	}
}

// With a store a node hands its sessions over without any other member: the
// next one finds them there.
func TestDrainIntoStore(t *testing.T) {
	g := newGroup(t)
	dir, store := t.TempDir(), t.TempDir()
	args := []string{"--set", "cluster.manager.use=persistent", "--set", "cluster.manager.directory=" + store, "--set", "cluster.send=async"}
	a := g.start("a", append(args, "--set", "node.work_dir="+dir)...)
	a.awaitReady()
	c := newClient(t)
	for range 3 {
		c.must(t, "GET", a, "/write")
	}
	a.terminate()
	if r := drainReport(t, dir); r.State != container.Drained || r.HandedOver != 1 || r.Holders["store"] != 1 {
		t.Errorf("%+v; its log:\n%s", r, a.log)
	}
	b := g.start("b", args...)
	b.awaitReady()
	if n := strings.TrimSpace(c.must(t, "GET", b, "/read")); n != "3" {
		t.Errorf("after the restart n=%s", n)
	}
}

// When a node is killed, parallel requests that still have its route are all
// served, by several nodes at once, with the same session: the random part of the
// id stays, the route becomes that of the node that answers. The old route goes
// on to work, and no write is lost.
func TestOldRouteAfterFailover(t *testing.T) {
	g := newGroup(t)
	a, b, c := g.start("a", "--set", "cluster.send=sync"), g.start("b", "--set", "cluster.send=sync"), g.start("c", "--set", "cluster.send=sync")
	awaitMembers(3, a, b, c)
	u := newClient(t)
	u.must(t, "POST", a, "/set?dataName=colour&dataValue=green")
	old := u.cookie
	id, route, _ := strings.Cut(old, ".")
	if route != "a" {
		t.Fatalf("cookie %q", old)
	}
	a.kill()
	for round := range 2 {
		var wg sync.WaitGroup
		for i := range 16 {
			n, want := b, id+".b"
			if i%2 == 1 {
				n, want = c, id+".c"
			}
			p := newClient(t)
			p.cookie = old
			wg.Go(func() {
				code, body, err := p.do("GET", n, "/info")
				var seen struct {
					ID         string            `json:"id"`
					IsNew      bool              `json:"isNew"`
					Attributes map[string]string `json:"attributes"`
				}
				if err == nil {
					err = json.Unmarshal([]byte(body), &seen)
				}
				if err != nil || code != http.StatusOK || seen.ID != want || seen.IsNew || seen.Attributes["colour"] != "green" || p.cookie != want {
					t.Errorf("round %d: %d %v: cookie %q, %+v; want %q", round, code, err, p.cookie, seen, want)
				}
				if code, _, err := p.do("POST", n, "/set?dataName=k"+strconv.Itoa(i)+"&dataValue=v"); err != nil || code != http.StatusSeeOther {
					t.Errorf("round %d: %d %v", round, code, err)
				}
			})
		}
		wg.Wait()
	}
	for _, n := range []*node{b, c} {
		p := newClient(t)
		p.cookie = old
		if got := info(t, p.must(t, "GET", n, "/info")); len(got.Attributes) != 17 {
			t.Errorf("%d of 17 attributes: %v", len(got.Attributes), got.Attributes)
		}
	}
}

// rollingUsers is how many users a rolling restart has: 1,000, or what the flag
// -sessions says.
func rollingUsers() int {
	if given("sessions") {
		return *sessions
	}
	return 1000
}
