package singlesignon_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/interceptors/dispatch"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/plugins/manager/backup"
	"github.com/longhouse-go/longhouse/plugins/manager/delta"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
	"github.com/longhouse-go/longhouse/valves/singlesignon"
)

// group is three nodes with an engine each, in virtual time.
type group struct {
	*conformance.Cluster
	t       *testing.T
	engines []*core.Engine
	dead    int // the first so many nodes
}

// inGroup runs f with each of the managers that keep sessions on the nodes.
func inGroup(t *testing.T, f func(g *group)) { inGroupWith(t, 1, singlesignon.Default(), f) }

func inGroupWith(t *testing.T, seed uint64, c singlesignon.Config, f func(g *group)) {
	for _, m := range []core.ManagerFactory{delta.Factory, backup.Factory} {
		t.Run(m.Name, func(t *testing.T) { one(t, seed, m, c, f) })
	}
}

func one(t *testing.T, seed uint64, m core.ManagerFactory, c singlesignon.Config, f func(g *group)) {
	cryptotest.SetGlobalRandom(t, seed) // ids decide on which nodes backup keeps what
	channeltest.Run(t, channeltest.SimConfig{Seed: seed, Link: channeltest.LinkPolicy{Jitter: 2 * time.Millisecond}}, func(t *testing.T, nw *channeltest.SimNet) {
		g := &group{t: t, Cluster: conformance.NewCluster(t, nw, 3, conformance.Parts{
			Layers: func(s channel.Settings) (layers []channel.Layer, err error) {
				for _, f := range []core.InterceptorFactory{dispatch.Factory, failuredetector.Factory} {
					i, err := f.New(channel.NoConfig, s)
					if err != nil {
						return nil, err
					}
					layers = append(layers, channel.Layer{Interceptor: i})
				}
				return layers, nil
			},
			Membership: func(s channel.Settings) (channel.Membership, error) {
				return multicast.Factory.New(channel.NoConfig, s)
			},
			Manager: func(s channel.Settings) (core.Manager, error) { return m.New(channel.NoConfig, s) },
		})}
		g.together()
		g.Await(20*time.Second, conformance.Ready(g.Nodes...))
		for _, n := range g.Nodes {
			g.engines = append(g.engines, newEngine(t, c, channel.Settings{Name: n.Name, Metrics: n.Metrics}, n.Table))
		}
		f(g)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, e := range g.engines {
			if err := e.Stop(ctx); err != nil {
				t.Error(err)
			}
		}
		for _, n := range g.Nodes[:g.dead] {
			short, cancel := context.WithTimeout(ctx, time.Second)
			_ = n.Stop(short) // its network is gone
			cancel()
		}
		g.Nodes = g.Nodes[g.dead:]
		g.Stop()
	})
}

func (g *group) together() {
	g.t.Helper()
	g.Await(time.Minute, conformance.ViewsEqual(g.Nodes[g.dead:]...))
}

// split cuts the first n nodes from the others until heal.
func (g *group) split(n int) {
	var left, right []string
	for i, x := range g.Nodes {
		if i < n {
			left = append(left, x.IP)
		} else {
			right = append(right, x.IP)
		}
	}
	g.Net.Partition(left, right)
	g.Await(time.Minute, conformance.ViewsEqual(g.Nodes[:n]...))
	g.Await(time.Minute, conformance.ViewsEqual(g.Nodes[n:]...))
}

func (g *group) heal() {
	g.Net.Heal()
	g.together()
	time.Sleep(2 * time.Minute) // until all is compared
}

// sessions is how many live sessions the nodes hold in their tables.
func (g *group) sessions() (n int) {
	for _, x := range g.Nodes[g.dead:] {
		n += x.Table.Len()
	}
	return n
}

func (g *group) count(name, label string) (sum float64) {
	for _, n := range g.Nodes {
		sum += (&world{metrics: n.Metrics}).count(name, label)
	}
	return sum
}

// Every node knows who has signed on on one of them, also when that one is
// dead; and who has signed off. Sessions move and get new routes meanwhile.
func TestGroup(t *testing.T) {
	inGroup(t, func(g *group) {
		b := newBrowser(g.engines[0])
		b.want(g.t, "/a/use", "1")
		b.want(g.t, "/a/login?user=ada", "")
		b.want(g.t, "/a/use", "2")
		for _, e := range g.engines {
			b.at(e).want(g.t, "/a/who", "ada")
			b.want(g.t, "/b/who", "ada")
		}
		b.want(g.t, "/b/use", "1")
		g.Net.Node(g.Nodes[0].IP).Kill()
		g.dead = 1
		g.together()
		b.at(g.engines[1]).want(g.t, "/a/use", "3")
		if c := b.cookies["JSESSIONID/a"]; !strings.HasSuffix(c.Value, ".n2") {
			g.t.Errorf("the route stayed: %s", c.Value)
		}
		b.want(g.t, "/a/who", "ada")
		b.want(g.t, "/b/use", "2")
		b.at(g.engines[2]).want(g.t, "/b/renew", "")
		b.want(g.t, "/b/who", "ada")
		copied := newBrowser(g.engines[1])
		for k, c := range b.cookies {
			copied.cookies[k] = c
		}
		b.want(g.t, "/b/invalidate", "")
		copied.want(g.t, "/a/who", "")
		copied.want(g.t, "/a/use", "1")
		copied.at(g.engines[2]).want(g.t, "/b/use", "1")
		copied.want(g.t, "/b/who", "")
	})
}

// Who signs off on one side of a split is out on both sides when it heals,
// whatever the other side has done with the sign-on meanwhile. Who does not
// stays.
func TestSplit(t *testing.T) {
	inGroup(t, func(g *group) {
		b, stays := newBrowser(g.engines[0]), newBrowser(g.engines[2])
		b.want(g.t, "/a/login?user=ada", "")
		b.want(g.t, "/a/use", "1")
		b.at(g.engines[2]).want(g.t, "/b/use", "1")
		stays.want(g.t, "/a/login?user=bob", "")
		stays.at(g.engines[0]).want(g.t, "/b/use", "1")
		time.Sleep(time.Minute) // all copies are where they belong
		g.split(1)
		other := newBrowser(g.engines[2])
		for k, c := range b.cookies {
			other.cookies[k] = c
		}
		b.at(g.engines[0]).want(g.t, "/a/logout", "")
		b.want(g.t, "/a/who", "")
		other.want(g.t, "/b/use", "2")
		other.want(g.t, "/b/who", "ada")
		other.want(g.t, "/b/renew", "") // the first node does not know of this session
		other.at(g.engines[1]).want(g.t, "/a/who", "ada")
		g.heal()
		for i, e := range g.engines {
			other.at(e)
			for _, path := range []string{"/a/who", "/b/who"} {
				if code, body := other.get(path); code != http.StatusOK || body != "" {
					g.t.Errorf("%s on node %d: %d %q", path, i+1, code, body)
				}
			}
			stays.at(e).want(g.t, "/a/who", "bob")
		}
		other.want(g.t, "/b/use", "1")
	})
}

// A slow request does not bring back what a sign-off on another node has ended.
func TestSlowRequest(t *testing.T) {
	inGroup(t, func(g *group) {
		b := newBrowser(g.engines[0])
		b.want(g.t, "/a/login?user=ada", "")
		b.want(g.t, "/a/use", "1")
		b.at(g.engines[2]).want(g.t, "/b/use", "1")
		slow := newBrowser(g.engines[2])
		for k, c := range b.cookies {
			slow.cookies[k] = c
		}
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = slow.get("/b/slow") })
		time.Sleep(time.Second)
		b.at(g.engines[0]).want(g.t, "/a/logout", "")
		wg.Wait()
		synctest.Wait()
		for _, e := range g.engines {
			slow.at(e).want(g.t, "/b/who", "")
		}
		slow.want(g.t, "/b/use", "1")
	})
}

// Nothing that travels tells a password or the cookie: of both every byte on
// the wire is looked at.
func TestWire(t *testing.T) {
	inGroup(t, func(g *group) {
		var mu sync.Mutex
		wire := map[string][]byte{}
		g.Net.Tap(func(p channeltest.Packet) {
			mu.Lock()
			defer mu.Unlock()
			link := fmt.Sprint(p.From, p.To)
			wire[link] = append(wire[link], p.Payload...)
		})
		const password = "Correct-Horse-Battery"
		b := newBrowser(g.engines[0])
		b.want(g.t, "/a/use", "1")
		b.want(g.t, "/a/login?user=ada&password="+password, "")
		for _, e := range g.engines {
			b.at(e).want(g.t, "/b/who", "ada")
			_, _ = b.get("/b/use")
		}
		id, key := b.sso()[:32], b.sso()[32:]
		b.want(g.t, "/b/logout", "")
		time.Sleep(time.Minute)
		mu.Lock()
		defer mu.Unlock()
		seen := false
		for link, data := range wire {
			seen = seen || bytes.Contains(data, []byte(id))
			for _, secret := range []string{password, key, strings.ToLower(key)} {
				// A packet may end anywhere: pieces of 12 bytes are enough.
				for i := 0; i+12 <= len(secret); i++ {
					if bytes.Contains(data, []byte(secret[i:i+12])) {
						g.t.Fatalf("%s: a secret is on the wire", link)
					}
				}
			}
		}
		if !seen {
			g.t.Error("the sign-on itself was not seen: this test sees nothing")
		}
	})
}

// A node that is cut off and does not know of a sign-on ends nothing: when it is
// back, the user is signed on and has lost nothing.
func TestCutOff(t *testing.T) {
	one(t, 1, backup.Factory, singlesignon.Default(), func(g *group) {
		unknown := 0
		for i := range 12 {
			b := newBrowser(g.engines[0])
			b.want(g.t, fmt.Sprint("/a/login?user=user", i), "")
			b.want(g.t, "/a/use", "1")
			time.Sleep(10 * time.Second)
			g.split(2)
			cookies := map[string]*http.Cookie{}
			for k, c := range b.cookies {
				cookies[k] = c
			}
			b.at(g.engines[2])
			if code, body := b.get("/a/who"); code != http.StatusOK {
				g.t.Errorf("who: %d %s", code, body)
			} else if body == "" {
				unknown++
			}
			if b.sso() == "" {
				g.t.Error("the cookie was taken away")
			}
			b.cookies = cookies
			g.heal()
			b.want(g.t, "/a/who", fmt.Sprint("user", i))
			b.want(g.t, "/a/use", "2")
		}
		if unknown == 0 {
			g.t.Error("the node that was cut off knew all sign-ons: this test has tested nothing")
		}
	})
}

// A member that has no secret cannot sign anybody on, whatever it sends; the
// others count that.
func TestMemberWithoutSecret(t *testing.T) {
	c := singlesignon.Default()
	c.Secret = secret.New("a secret that two nodes share")
	one(t, 1, delta.Factory, c, func(g *group) {
		rogue := newEngine(g.t, singlesignon.Default(), channel.Settings{Name: "n3"}, g.Nodes[2].Table)
		g.engines = append(g.engines, rogue)
		b := newBrowser(rogue)
		b.want(g.t, "/a/login?user=admin", "")
		b.want(g.t, "/a/who", "admin")
		b.want(g.t, "/b/use", "1")
		b.at(g.engines[0]).want(g.t, "/a/who", "")
		b.want(g.t, "/b/who", "")
		if n := g.count("refused_total", "forged"); n == 0 {
			g.t.Error("nothing was counted")
		}

		// Nor does it change whom somebody has signed on as.
		good := newBrowser(g.engines[1])
		good.want(g.t, "/a/login?user=ada", "")
		good.at(rogue).want(g.t, "/a/login?user=ada&role=+admin", "")
		good.at(g.engines[0]).want(g.t, "/a/who", "")
	})
}

// A sign-on ends by itself when nobody uses it, wherever it is.
func TestGroupExpiry(t *testing.T) {
	life = 2 * time.Minute // a group is expensive, even in virtual time
	defer func() { life = time.Hour }()
	c := singlesignon.Default()
	c.MaxIdle = time.Minute
	inGroupWith(t, 1, c, func(g *group) {
		b := newBrowser(g.engines[0])
		b.want(g.t, "/a/login?user=ada", "")
		b.want(g.t, "/a/use", "1")
		b.at(g.engines[1]).want(g.t, "/b/use", "1")
		for i := range 6 { // b is used, a is not
			time.Sleep(time.Minute)
			b.at(g.engines[i%3]).want(g.t, "/b/who", "ada")
		}
		b.want(g.t, "/a/use", "1")
		time.Sleep(8 * time.Minute)
		if n := g.sessions(); n != 0 {
			g.t.Errorf("%d sessions are left", n)
		}
		for _, e := range g.engines {
			b.at(e).want(g.t, "/b/who", "")
		}
	})
}

// Whatever users do on whichever node, split or not: who has signed off is out
// in the end, and nobody is somebody else.
func TestHistories(t *testing.T) {
	seeds := 4
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		inGroupWith(t, uint64(seed+1), singlesignon.Default(), func(g *group) {
			rnd := rand.New(rand.NewPCG(uint64(seed), 1))
			type user struct {
				*browser
				name string
				out  bool
			}
			users := make([]*user, 6)
			for i := range users {
				users[i] = &user{newBrowser(g.engines[i%3]), fmt.Sprint("user", i), false}
				users[i].want(g.t, "/a/login?user="+users[i].name, "")
				users[i].want(g.t, "/b/use", "1")
			}
			time.Sleep(time.Minute)
			split := false
			for range 80 {
				u := users[rnd.IntN(len(users))]
				u.at(g.engines[rnd.IntN(3)])
				ctx := []string{"/a", "/b"}[rnd.IntN(2)]
				switch k := rnd.IntN(24); {
				case k == 0 && !split:
					g.split(1 + rnd.IntN(2))
					split = true
				case k == 1 && split:
					g.heal()
					split = false
				case k == 2:
					// One side of a split may not know of the sign-on, and cannot end it.
					_, body := u.get(ctx + "/who")
					u.out = u.out || body != ""
					if code, body := u.get(ctx + "/logout"); code != http.StatusOK {
						g.t.Errorf("logout: %d %s", code, body)
					}
				case k == 3:
					_, _ = u.get(ctx + "/renew")
				case k < 12:
					_, _ = u.get(ctx + "/use")
				default:
					code, body := u.get(ctx + "/who")
					if code == http.StatusOK && body != "" && body != u.name || u.out && body != "" && !split {
						g.t.Errorf("seed %d: %s is %q, signed off: %v", seed, u.name, body, u.out)
					}
				}
				time.Sleep(time.Duration(rnd.IntN(1000)) * time.Millisecond)
			}
			if split {
				g.heal()
			}
			for _, u := range users {
				for i, e := range g.engines {
					_, body := u.at(e).get("/a/who")
					if u.out && body != "" {
						g.t.Errorf("seed %d: %s has signed off and is %q on node %d", seed, u.name, body, i+1)
					}
				}
			}
		})
	}
}

// A request that finds its manager dead is answered: nobody is signed on, and
// nothing ends.
func TestManagerDown(t *testing.T) {
	w := newWorld(t, singlesignon.Default())
	b := newBrowser(w.engine)
	b.want(t, "/a/login?user=ada", "")
	b.want(t, "/b/use", "1")
	down := &failing{Sessions: w.table}
	e := newEngineWith(t, singlesignon.Default(), channel.Settings{}, w.table, down)
	defer e.Stop(context.Background())
	b.at(e)
	if code, _ := b.get("/a/who"); code != http.StatusInternalServerError {
		t.Errorf("who: %d", code)
	}
	b.want(t, "/b/use", "2")
	if code, _ := b.get("/a/login?user=ada"); code != http.StatusInternalServerError {
		t.Errorf("login: %d", code)
	}
	if code, _ := b.get("/b/logout"); code != http.StatusInternalServerError {
		t.Errorf("logout: %d", code)
	}
	down.up = true
	b.want(t, "/a/who", "ada")
	b.want(t, "/b/use", "3")
}

type failing struct {
	core.Sessions
	up bool
}

func (f *failing) Find(ctx context.Context, key session.Key) (core.Handle, error) {
	if !f.up {
		return nil, context.DeadlineExceeded
	}
	return f.Sessions.Find(ctx, key)
}
