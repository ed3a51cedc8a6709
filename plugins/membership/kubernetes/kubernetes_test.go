package kubernetes

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/discovery"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const serverIP = "10.0.250.1"

type node struct {
	channel.Membership
	metrics *channel.Metrics

	mu     sync.Mutex
	view   map[channel.UniqueID]channel.Member
	losses int
}

func (n *node) Observe(ev channel.MemberEvent) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch ev.Kind {
	case channel.MemberAdded, channel.MemberUpdated:
		n.view[ev.Member.ID] = ev.Member
	default:
		delete(n.view, ev.Member.ID)
		n.losses++
	}
}

func (n *node) sees() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, m := range n.view {
		out = append(out, m.Host.String())
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (n *node) addresses() string {
	for _, s := range n.metrics.Samples() {
		if s.Name == "membership_addresses" {
			return fmt.Sprint(s.Value)
		}
	}
	return ""
}

func start(t *testing.T, nw *channeltest.SimNet, ip string, change func(*Config)) *node {
	t.Helper()
	sn := nw.Node(ip)
	n := &node{metrics: channel.NewMetrics(), view: map[channel.UniqueID]channel.Member{}}
	c := Default()
	c.Namespace, c.Labels, c.Server = "shop", "app=shop", "http://"+serverIP+":6443"
	c.RetryTime = time.Minute
	if change != nil {
		change(&c)
	}
	m, err := New(c, channel.Settings{Net: sn, Metrics: n.metrics})
	if err != nil {
		t.Fatal(err)
	}
	n.Membership = m
	local := channel.Member{ID: channel.NewUniqueID(), Host: sn.Addr(), Port: 4000, SecurePort: -1, UDPPort: -1}
	if err := m.Start(t.Context(), local, nil, n); err != nil {
		t.Fatal(err)
	}
	return n
}

func stop(t *testing.T, nodes ...*node) {
	t.Helper()
	for _, n := range nodes {
		if err := n.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}
}

func simAPI(t *testing.T, nw *channeltest.SimNet) (*api, func()) {
	a := newAPI()
	_, end := serve(t, nw.Node(serverIP), netip.MustParseAddrPort(serverIP+":6443"), a)
	return a, end
}

func TestConformance(t *testing.T) {
	c := Default()
	s := conformance.Membership(Name, func(c Config, s channel.Settings) (channel.Membership, error) {
		// Each node has its own API server, on its own loopback.
		a := newAPI()
		for i, ip := range strings.Split(c.Namespace, "-") {
			a.put(podObject(fmt.Sprint("pod-", i), ip, "Running"))
		}
		url, end := serve(t, s.Net, netip.MustParseAddrPort("127.0.0.1:6443"), a)
		c.Server = url
		m, err := New(c, s)
		return &withServer{m, end}, err
	}, func(_ string, peers []string) Config {
		c := Default()
		c.Namespace = strings.Join(peers, "-")
		return c
	}, conformance.MembershipTimes{Interval: c.Frequency, Drop: c.DropTime}, conformance.FeaturePayload)
	for _, p := range conformance.Run(t, s, conformance.Strict()).Profiles {
		if p.Result != conformance.Conformant {
			t.Errorf("%s is %s: core skipped %v", p.Name, p.Result, p.Core.Skipped)
		}
	}
}

type withServer struct {
	channel.Membership
	end func()
}

func (w *withServer) Stop(ctx context.Context) error {
	err := w.Membership.Stop(ctx)
	w.end()
	return err
}

func TestPodsComeAndGo(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		a, end := simAPI(t, nw)
		a.put(podObject("shop-1", "10.0.0.1", "Running"))
		a.put(podObject("shop-2", "", "Pending"))
		one := start(t, nw, "10.0.0.1", nil)
		time.Sleep(time.Second)
		two := start(t, nw, "10.0.0.2", func(c *Config) { c.Namespace = "elsewhere" })
		time.Sleep(time.Second)
		a.put(podObject("shop-2", "10.0.0.2", "Running"))
		time.Sleep(time.Second) // the watch tells it, no look-up is made
		if one.sees() != "10.0.0.2" || two.sees() != "10.0.0.1" {
			t.Errorf("%q and %q", one.sees(), two.sees())
		}
		if n := a.called("list /api/v1/namespaces/shop/pods app=shop"); n != 1 {
			t.Errorf("%d lists", n)
		}
		// It ends; after the time of retrying its address is forgotten.
		stop(t, two)
		a.delete("shop-2")
		time.Sleep(59 * time.Second)
		if one.addresses() != "1" {
			t.Errorf("heartbeats go to %s addresses; the deleted one is to be tried for a minute", one.addresses())
		}
		time.Sleep(3 * time.Second)
		if one.addresses() != "0" {
			t.Errorf("heartbeats go to %s addresses", one.addresses())
		}
		// Quiet hours: the watch is made anew, from where it was.
		time.Sleep(2 * time.Hour)
		if n := a.called("list /api/v1/namespaces/shop/"); n != 1 {
			t.Errorf("%d lists after quiet hours", n)
		}
		if n := a.called("watch"); n < 20 || n > 60 {
			t.Errorf("%d watches in two hours by two nodes", n)
		}
		stop(t, one)
		end()
	})
}

func TestSlicesOfAService(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		a, end := simAPI(t, nw)
		a.put(sliceObject("shop-abc", "10.0.0.1"))
		a.put(sliceObject("shop-def", "10.0.0.2", "not an address"))
		service := func(c *Config) { c.Service, c.Labels = "shop", "" }
		one, two := start(t, nw, "10.0.0.1", service), start(t, nw, "10.0.0.2", service)
		time.Sleep(2 * time.Second)
		if one.sees() != "10.0.0.2" || two.sees() != "10.0.0.1" {
			t.Errorf("%q and %q", one.sees(), two.sees())
		}
		if a.called("list /apis/discovery.k8s.io/v1/namespaces/shop/endpointslices kubernetes.io/service-name=shop") != 2 {
			t.Errorf("asked for %q", a.calls)
		}
		stop(t, one, two)
		end()
	})
}

// Whatever the API does, the members stay, and when it is well again the changes
// made meanwhile are seen.
func TestTheAPIInTrouble(t *testing.T) {
	for _, c := range []struct {
		name    string
		trouble func(a *api, nw *channeltest.SimNet)
		relist  bool // whether what was known has to be listed again
	}{
		{"gone", func(_ *api, nw *channeltest.SimNet) { nw.Isolate(serverIP) }, false},
		{"failing", func(a *api, _ *channeltest.SimNet) { a.fail = func(*http.Request) int { return 500 } }, false},
		{"forbidding", func(a *api, _ *channeltest.SimNet) { a.fail = func(*http.Request) int { return 403 } }, false},
		{"overloaded", func(a *api, _ *channeltest.SimNet) { a.fail = func(*http.Request) int { return 429 } }, false},
		{"redirecting", func(a *api, _ *channeltest.SimNet) { a.fail = func(*http.Request) int { return 302 } }, false},
		{"cutting streams in an event", func(a *api, _ *channeltest.SimNet) { a.cutAfter = 1 }, false},
		{"noisy", func(a *api, _ *channeltest.SimNet) { a.noise = "<html>login</html>" }, true},
		{"sending endless lines", func(a *api, _ *channeltest.SimNet) { a.noise = strings.Repeat("x", maxEvent+10) }, false},
		{"sending odd events", func(a *api, _ *channeltest.SimNet) {
			a.noise = `{"type":"ADDED","object":{}}` + "\n" + `{"type":"BOOKMARK","object":7}` + "\n" + `{"type":"NEW","object":{"metadata":{"name":"x","resourceVersion":"1"}}}`
		}, false},
		{"with an error without reason", func(a *api, _ *channeltest.SimNet) { a.noise = `{"type":"ERROR","object":null}` }, true},
		{"mute", func(a *api, _ *channeltest.SimNet) { a.mute = true }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
				a, end := simAPI(t, nw)
				a.put(podObject("shop-1", "10.0.0.1", "Running"))
				a.put(podObject("shop-2", "10.0.0.2", "Running"))
				one := start(t, nw, "10.0.0.1", nil)
				two := start(t, nw, "10.0.0.2", nil)
				time.Sleep(2 * time.Second)
				lists := a.called("list")
				a.with(func() { c.trouble(a, nw) })
				time.Sleep(10 * time.Second)
				a.put(podObject("shop-3", "10.0.0.3", "Running"))
				time.Sleep(20 * time.Minute)
				if one.sees() != "10.0.0.2" || two.sees() != "10.0.0.1" || one.losses+two.losses > 0 {
					t.Errorf("meanwhile: %q and %q", one.sees(), two.sees())
				}
				if n := a.called("") - lists; n > 400 {
					t.Errorf("two nodes asked %d times in 20 minutes", n)
				}
				a.with(func() { a.fail, a.cutAfter, a.noise, a.mute = nil, 0, "", false })
				nw.Heal()
				time.Sleep(7 * time.Minute)
				if one.addresses() != "2" { // beside its own
					t.Errorf("afterwards heartbeats go to %s addresses", one.addresses())
				}
				if relisted := a.called("list") > lists; relisted != c.relist {
					t.Errorf("listed again: %v, want %v", relisted, c.relist)
				}
				stop(t, one, two)
				end()
			})
		})
	}
}

// 410 Gone: the place in the history is not known any more.
func TestGone(t *testing.T) {
	for _, bookmarks := range []bool{false, true} {
		t.Run(fmt.Sprintf("bookmarks=%v", bookmarks), func(t *testing.T) {
			channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
				a, end := simAPI(t, nw)
				a.bookmark = bookmarks
				a.put(podObject("shop-1", "10.0.0.1", "Running"))
				one := start(t, nw, "10.0.0.1", nil)
				time.Sleep(20 * time.Second)
				// Other objects change, and the history is forgotten.
				a.with(func() { a.version, a.history = a.version+10, nil; a.oldest = a.version })
				time.Sleep(6 * time.Minute) // the watch is made anew
				a.put(podObject("shop-2", "10.0.0.2", "Running"))
				time.Sleep(time.Second)
				if one.addresses() != "1" {
					t.Errorf("heartbeats go to %s addresses", one.addresses())
				}
				want := 2
				if bookmarks {
					want = 1
				}
				if n := a.called("list"); n != want {
					t.Errorf("%d lists, want %d", n, want)
				}
				if bookmarks && a.called("watch from 1011") == 0 {
					t.Errorf("no watch begins at the bookmark: %q", a.calls)
				}
				stop(t, one)
				end()
			})
		})
	}
}

func TestPagesAndBounds(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		a, end := simAPI(t, nw)
		a.pageSize = 7
		for i := range 1000 {
			a.put(podObject(fmt.Sprint("shop-", i), fmt.Sprintf("10.1.%d.%d", i/250, i%250+1), "Running"))
		}
		one := start(t, nw, "10.0.0.1", nil)
		time.Sleep(10 * time.Second)
		if one.addresses() != "256" {
			t.Errorf("heartbeats go to %s addresses", one.addresses())
		}
		if n := one.metrics.Counter("membership_addresses_refused_total", "", "reason", "too_many").Value(); n != 744 {
			t.Errorf("%d were counted as too many", n)
		}
		if n := a.called("list"); n != 143 {
			t.Errorf("%d pages", n)
		}
		stop(t, one)
		end()
	})
}

// A list that trickles does not hold up a stop, and is given up.
func TestSlowList(t *testing.T) {
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		a, end := simAPI(t, nw)
		a.put(podObject("shop-1", "10.0.0.1", "Running"))
		a.slow = time.Second
		one := start(t, nw, "10.0.0.1", nil)
		time.Sleep(2 * time.Minute)
		if n := a.called("list"); n < 3 || n > 6 {
			t.Errorf("%d lists in two minutes", n)
		}
		if one.metrics.Counter("membership_lookup_errors_total", "").Value() == 0 {
			t.Error("no failure was counted")
		}
		begin := time.Now()
		stop(t, one)
		if d := time.Since(begin); d > time.Second {
			t.Errorf("the stop took %v", d)
		}
		end()
	})
}

func TestSampleList(t *testing.T) {
	b, err := os.ReadFile("testdata/pods.json")
	if err != nil {
		t.Fatal(err)
	}
	channeltest.Run(t, channeltest.SimConfig{}, func(t *testing.T, nw *channeltest.SimNet) {
		l, err := channel.ListenTCP(nw.Node(serverIP), netip.MustParseAddrPort(serverIP+":6443"))
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(b) })}
		done := make(chan struct{})
		go func() { _ = srv.Serve(plain{l}); close(done) }()
		c := Default()
		c.Namespace, c.Server = "shop", "http://"+serverIP+":6443"
		tg, err := c.resolve(func(string) string { return "" }, func(string) ([]byte, error) { return nil, fs.ErrNotExist })
		if err != nil {
			t.Fatal(err)
		}
		p := newProvider(c, tg, channel.Settings{Net: nw.Node("10.0.0.1")})
		if err := p.list(t.Context()); err != nil {
			t.Fatal(err)
		}
		var got []discovery.Peer
		p.tell(func(peers []discovery.Peer) { got = peers })
		// The clock of the simulation begins with the year 2000.
		now := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
		if len(got) != 2 || got[0].Addr.Addr().String() != "10.0.0.1" || got[1].Addr.Addr().String() != "10.0.0.2" ||
			now.Sub(got[0].Since) != time.Hour || now.Sub(got[1].Since) != 30*time.Second ||
			got[0].Identity != "0f1d9ab2-7c3e-4c55-9a41-1f6f3d0c7a10" || p.version != "4711" {
			t.Errorf("%+v, version %s", got, p.version)
		}
		p.client.close()
		srv.Close()
		<-done
	})
}

func env(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

func TestEnvironment(t *testing.T) {
	pod := func(files ...string) func(string) ([]byte, error) {
		return func(name string) ([]byte, error) {
			if slices.Contains(files, filepath.Base(name)) && strings.HasPrefix(name, account) {
				return []byte("from-the-pod\n"), nil
			}
			return nil, fs.ErrNotExist
		}
	}
	all := pod("namespace", "token", "ca.crt")
	host := []string{"KUBERNETES_SERVICE_HOST", "10.96.0.1", "KUBERNETES_SERVICE_PORT", "443"}
	for _, c := range []struct {
		name   string
		change func(*Config)
		env    []string
		files  func(string) ([]byte, error)
		want   string // URL, namespace, labels, token, ca, cert; or part of an error
	}{
		{"in a pod", nil, host, all, "https://10.96.0.1:443 from-the-pod  token ca.crt "},
		{"Tomcat's defaults", nil, host, pod("token", "ca.crt"), "https://10.96.0.1:443 tomcat  token ca.crt "},
		{"plain names", nil, append([]string{"KUBERNETES_NAMESPACE", "ns", "KUBERNETES_LABELS", "a=b", "SA_TOKEN_FILE", "/t", "KUBERNETES_CA_CERTIFICATE_FILE", "/c"}, host...), all,
			"https://10.96.0.1:443 ns a=b t c "},
		{"OpenShift's names come first", nil, append([]string{
			"OPENSHIFT_KUBE_PING_NAMESPACE", "os", "KUBERNETES_NAMESPACE", "ns", "OPENSHIFT_KUBE_PING_LABELS", "x=y", "KUBERNETES_LABELS", "a=b",
			"OPENSHIFT_KUBE_PING_MASTER_HOST", "master", "OPENSHIFT_KUBE_PING_MASTER_PORT", "8443", "OPENSHIFT_KUBE_PING_MASTER_PROTOCOL", "https",
			"OPENSHIFT_KUBE_PING_SA_TOKEN_FILE", "/ost", "OPENSHIFT_KUBE_PING_CA_CERT_FILE", "/osca",
		}, host...), all, "https://master:8443 os x=y ost osca "},
		{"IPv6", nil, []string{"KUBERNETES_SERVICE_HOST", "fd00::1", "KUBERNETES_SERVICE_PORT", "443"}, all, "https://[fd00::1]:443 from-the-pod  token ca.crt "},
		{"options win", func(c *Config) {
			c.Namespace, c.Labels, c.Server, c.TokenFile, c.CAFile = "n", "l=1", "https://h:1", "/T", "/C"
		},
			append([]string{"KUBERNETES_NAMESPACE", "ns"}, host...), all, "https://h:1 n l=1 T C "},
		{"client certificate", nil, append([]string{"KUBERNETES_CLIENT_CERTIFICATE_FILE", "/cert", "KUBERNETES_CLIENT_KEY_FILE", "/key"}, host...), all,
			"https://10.96.0.1:443 from-the-pod   ca.crt cert"},
		{"http needs no certificates", nil, append([]string{"KUBERNETES_MASTER_PROTOCOL", "http"}, host...), pod("token"), "http://10.96.0.1:443 tomcat  token  "},
		{"a service has labels of its own", func(c *Config) { c.Service = "shop" }, append([]string{"KUBERNETES_LABELS", "a=b"}, host...), all,
			"https://10.96.0.1:443 from-the-pod  token ca.crt "},
		{"no API", nil, nil, all, "KUBERNETES_SERVICE_HOST"},
		{"no CA", nil, host, pod("token"), "ca_file"},
		{"no key", nil, append([]string{"KUBERNETES_CLIENT_CERTIFICATE_FILE", "/cert"}, host...), all, "KUBERNETES_CLIENT_KEY_FILE"},
		{"old API", nil, append([]string{"KUBERNETES_API_VERSION", "v1beta3"}, host...), all, "v1beta3"},
		{"bad port", nil, []string{"KUBERNETES_SERVICE_HOST", "h", "KUBERNETES_SERVICE_PORT", "tcp://1"}, all, "port"},
		{"bad namespace", nil, append([]string{"KUBERNETES_NAMESPACE", "../secrets"}, host...), all, "namespace"},
	} {
		cfg := Default()
		if c.change != nil {
			c.change(&cfg)
		}
		tg, err := cfg.resolve(env(c.env...), c.files)
		base := func(f string) string { return strings.TrimPrefix(filepath.Base(f), ".") }
		got := ""
		if err != nil {
			got = err.Error()
			if !strings.Contains(got, c.want) {
				t.Errorf("%s: %s, want %s", c.name, got, c.want)
			}
			continue
		}
		if got = strings.Join([]string{tg.base.String(), tg.namespace, tg.labels, base(tg.tokenFile), base(tg.caFile), base(tg.certFile)}, " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if len(Environment()) != 19 {
		t.Errorf("%d variables: %v", len(Environment()), Environment())
	}
	for _, v := range Environment() {
		if strings.Contains(v, "PASSWORD") {
			t.Errorf("%s is handed to plugins", v)
		}
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		change func(*Config)
		want   string
	}{
		{func(*Config) {}, ""},
		{func(c *Config) { c.Namespace = "Shop" }, "namespace: "},
		{func(c *Config) { c.Namespace = "a/b" }, "namespace: "},
		{func(c *Config) { c.Service = "-" }, "service: "},
		{func(c *Config) { c.Service, c.Labels = "s", "a=b" }, "labels: "},
		{func(c *Config) { c.Labels = "a=b\n" }, "labels: "},
		{func(c *Config) { c.Server = "https://10.0.0.1:6443" }, ""},
		{func(c *Config) { c.Server = "https://host/prefix" }, ""},
		{func(c *Config) { c.Server = "10.0.0.1:6443" }, "server: "},
		{func(c *Config) { c.Server = "ftp://a" }, "server: "},
		{func(c *Config) { c.Server = "https://user:pass@host" }, "server: "},
		{func(c *Config) { c.KeyFile = "/k" }, "key_file: "},
		{func(c *Config) { c.ConnectTimeout = 0 }, "connect_timeout: "},
		{func(c *Config) { c.ReadTimeout = time.Hour }, "read_timeout: "},
		{func(c *Config) { c.WatchTime = time.Second }, "watch_time: "},
		{func(c *Config) { c.Listen = "" }, "listen: "},
	} {
		cfg := Default()
		c.change(&cfg)
		err := cfg.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", cfg, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "pass@") {
			t.Errorf("a password is shown: %v", err)
		}
	}
}

// authority makes certificates.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	a.issue("ca", a)
	return a
}

func (a *authority) issue(name string, by *authority) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: name == "ca",
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, signer := by.cert, by.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	if a.cert == nil {
		a.key = key
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			a.t.Fatal(err)
		}
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})
	a.write(name+".crt", certPEM)
	a.write(name+".key", keyPEM)
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		a.t.Fatal(err)
	}
	return pair
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) write(name string, b []byte) {
	a.t.Helper()
	if err := os.WriteFile(a.path(name), b, 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// Over real sockets with TLS: who is trusted, the token, the client certificate.
func TestTLS(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	a := newAPI()
	a.put(podObject("shop-1", "10.0.0.1", "Running"))
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	srv := httptest.NewUnstartedServer(a)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{ca.issue("server", ca)}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool}
	srv.Config.ErrorLog = zap.NewStdLog(zap.NewNop())
	srv.StartTLS()
	defer srv.Close()
	network, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	ca.write("token", []byte("first\n"))
	ca.issue("client", ca)
	logged, logs := observer.New(zap.DebugLevel)
	client := func(change func(*Config)) *provider {
		c := Default()
		c.Namespace, c.Server, c.CAFile, c.TokenFile = "shop", srv.URL, ca.path("ca.crt"), ca.path("token")
		c.ConnectTimeout, c.ReadTimeout = 30*time.Second, 30*time.Second
		if change != nil {
			change(&c)
		}
		tg, err := c.resolve(env(), func(string) ([]byte, error) { return nil, fs.ErrNotExist })
		if err != nil {
			t.Fatal(err)
		}
		return newProvider(c, tg, channel.Settings{Net: network, Logger: zap.New(logged)})
	}
	a.token = "first"
	p := client(nil)
	if err := p.list(t.Context()); err != nil || len(p.objects) != 1 {
		t.Fatalf("%v, %v", p.objects, err)
	}
	// The token is renewed: the file is read again.
	a.with(func() { a.token = "second" })
	var refused *apiError
	if err := p.list(t.Context()); !errors.As(err, &refused) || refused.code != 401 || !strings.Contains(err.Error(), "the test says so") {
		t.Errorf("with the old token: %v", err)
	}
	ca.write("token", []byte("second token of another length\n"))
	if err := p.list(t.Context()); err == nil || !strings.Contains(err.Error(), "holds no token") {
		t.Errorf("a token with blanks: %v", err)
	}
	ca.write("token", []byte("second"))
	if err := p.list(t.Context()); err != nil {
		t.Errorf("with the new token: %v", err)
	}
	p.client.close()

	for _, c := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"another authority", func(c *Config) { c.CAFile = stranger.path("ca.crt") }, "certificate"},
		{"no file of certificates", func(c *Config) { c.CAFile = ca.path("none") }, "none"},
		{"a file without certificates", func(c *Config) { c.CAFile = ca.path("token") }, "no certificate"},
		{"no token", func(c *Config) { c.TokenFile = ca.path("none") }, "token"},
		{"a client certificate of nobody", func(c *Config) { c.CertFile, c.KeyFile = stranger.path("ca.crt"), stranger.path("ca.key") }, ""},
		{"a key of another", func(c *Config) { c.CertFile, c.KeyFile = ca.path("client.crt"), ca.path("ca.key") }, "key"},
	} {
		p := client(c.change)
		if err := p.list(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "second") {
			t.Errorf("%s: %v", c.name, err)
		}
		p.client.close()
	}
	var peer string
	srv.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) > 0 {
			peer = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		a.ServeHTTP(w, r)
	})
	a.with(func() { a.token = "" })
	p = client(func(c *Config) { c.TokenFile, c.CertFile, c.KeyFile = "", ca.path("client.crt"), ca.path("client.key") })
	if err := p.list(t.Context()); err != nil || peer != "client" {
		t.Errorf("with a client certificate: %v; the API sees %q", err, peer)
	}
	p.client.close()
	ca.write("client.key", []byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\n"))
	if err := p.list(t.Context()); err == nil || !strings.Contains(err.Error(), "encrypted") {
		t.Errorf("with an encrypted key: %v", err)
	}
	for _, l := range logs.All() {
		if strings.Contains(fmt.Sprint(l), "second") {
			t.Errorf("the token is in the log: %v", l)
		}
	}
}

func FuzzEvents(f *testing.F) {
	b, err := os.ReadFile("testdata/pods.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"type":"ADDED","object":{"metadata":{"name":"a","resourceVersion":"1"},"status":{"phase":"Running","podIP":"::1"}}}`))
	f.Add([]byte(`{"type":"MODIFIED","object":{"metadata":{"name":"a","resourceVersion":"1"},"endpoints":[{"addresses":["1.2.3.4"],"targetRef":{"uid":"x"}}]}}`))
	f.Add([]byte(`{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9"}}}`))
	f.Add([]byte(`{"type":"ERROR","object":{"code":410}}`))
	m := channel.NewMetrics()
	f.Fuzz(func(t *testing.T, line []byte) {
		for _, service := range []string{"", "s"} {
			p := &provider{cfg: Config{Service: service}, log: zap.NewNop(), refused: m.Counter("x", ""), objects: map[string][]discovery.Peer{}, version: "1"}
			changed, err := p.apply(line)
			if err != nil && p.version != "" {
				t.Fatal("after an event that cannot be read the watch would go on")
			}
			if changed && len(p.objects) != 1 {
				t.Fatal("a change without an object")
			}
		}
	})
}
