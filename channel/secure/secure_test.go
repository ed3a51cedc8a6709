package secure_test

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
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/transport/v2"
	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/goleak"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/secure"
	"github.com/longhouse-go/longhouse/channel/tcp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority signs certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
	next int64
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, next: 2}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	a.cert, _ = x509.ParseCertificate(der)
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return a
}

// issue writes the files of a node called name into dir.
func (a *authority) issue(dir, name string, change ...func(*x509.Certificate)) secure.Config {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.next++
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name + ".example"},
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, f := range change {
		f(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	c := secure.Config{CA: filepath.Join(dir, "ca.pem"), Certificate: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	for file, b := range map[string][]byte{
		c.CA: a.pem, c.Certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		c.Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}),
	} {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	return c
}

// node is one end: a network with its own sender and receiver.
type node struct {
	net     transport.Net
	metrics *channel.Metrics
	send    *tcp.Sender
	member  channel.Member
	in      chan string
}

// start makes a node; cfg is nil for one without TLS.
func start(t *testing.T, below transport.Net, host string, cfg *secure.Config) *node {
	t.Helper()
	n := &node{net: below, metrics: channel.NewMetrics(), in: make(chan string, 1000)}
	s := channel.Settings{Net: below, Metrics: n.metrics}
	if cfg != nil {
		sn, err := secure.New(*cfg, s)
		if err != nil {
			t.Fatal(err)
		}
		n.net = sn
	}
	s.Net = n.net
	rc := tcp.DefaultReceiverConfig()
	rc.Address, rc.Port, rc.StallTimeout = host, 0, 2*time.Second
	r := tcp.NewReceiver(rc, s)
	addr, err := r.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), func(_ context.Context, m *channel.Message) error {
		n.in <- string(m.Body)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	n.send = tcp.NewSender(tcp.DefaultSenderConfig(), s)
	if err := n.send.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.member = channel.Member{ID: channel.NewUniqueID(), Host: addr.Addr(), Port: int(addr.Port()), SecurePort: -1, UDPPort: -1}
	a := channel.Announcement{Name: "n", Pipelined: true}
	r.Describe(&n.member, &a)
	n.send.Describe(&n.member, &a)
	n.member.Payload = a.Encode()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := errors.Join(n.send.Stop(ctx), r.Stop(ctx)); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *node) message(to *node, body string) *channel.Message {
	return &channel.Message{
		ID: channel.NewUniqueID(), From: n.member, To: []channel.Member{to.member}, Options: channel.SendSyncAck, Body: []byte(body),
	}
}

func (n *node) value(name string, labels ...string) float64 {
	for _, s := range n.metrics.Samples() {
		if s.Name == name && slices.Equal(s.Labels, labels) {
			return s.Value
		}
	}
	return -1
}

func real(t *testing.T) transport.Net {
	t.Helper()
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// both runs a test over the loopback interface and in virtual time on a network
// that loses 5 % of its packets.
func both(t *testing.T, f func(t *testing.T, a, b transport.Net, hostA, hostB string)) {
	t.Run("loopback", func(t *testing.T) {
		n := real(t)
		f(t, n, n, "127.0.0.1", "127.0.0.1")
	})
	t.Run("sim", func(t *testing.T) {
		channeltest.Run(t, channeltest.SimConfig{Seed: 1}, func(t *testing.T, nw *channeltest.SimNet) {
			n := nw.Nodes(2)
			f(t, n[0], n[1], n[0].IP(), n[1].IP())
		})
	})
}

// Members of one authority talk, from many goroutines at once.
func TestMutualTLS(t *testing.T) {
	both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string) {
		ca := newAuthority(t)
		ac, bc := ca.issue(t.TempDir(), "a"), ca.issue(t.TempDir(), "b")
		ac.Names, bc.Names = []string{"b.example"}, []string{"a"}
		a, b := start(t, an, hostA, &ac), start(t, bn, hostB, &bc)
		if b.member.SecurePort != b.member.Port {
			t.Errorf("the secure port is %d, the port %d", b.member.SecurePort, b.member.Port)
		}
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				if err := a.send.Send(t.Context(), a.message(b, fmt.Sprint(i)+strings.Repeat("x", 20_000))); err != nil {
					t.Errorf("message %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		if len(b.in) != 50 {
			t.Errorf("%d messages", len(b.in))
		}
		if err := b.send.Send(t.Context(), b.message(a, "back")); err != nil {
			t.Error(err)
		}
	})
}

// Whoever is not let in is refused under a counter of its own, and the node goes
// on.
func TestRefused(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	serverOnly := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
	expired := func(c *x509.Certificate) { c.NotAfter = time.Date(1999, 6, 1, 0, 0, 0, 0, time.UTC) }
	for _, c := range []struct {
		name, reason string
		peer         *secure.Config
		raw          string // what the peer sends instead
	}{
		{"another authority", "certificate", new(other.issue(t.TempDir(), "b")), ""},
		{"expired", "certificate", new(ca.issue(t.TempDir(), "b", expired)), ""},
		{"not for clients", "certificate", new(ca.issue(t.TempDir(), "b", serverOnly)), ""},
		{"wrong name", "name", new(ca.issue(t.TempDir(), "stranger")), ""},
		{"a frame in clear", "plain", nil, "FLT2002\x00\x00\x00\x03"},
		{"HTTP", "plain", nil, "GET / HTTP/1.1\r\n\r\n"},
		{"nothing", "closed", nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string) {
				own := ca.issue(t.TempDir(), "a")
				own.Names = []string{"a", "b"}
				a := start(t, an, hostA, &own)
				good := start(t, bn, hostB, new(ca.issue(t.TempDir(), "b")))
				if c.peer == nil {
					conn, err := channel.Dial(t.Context(), bn, a.member.Addr())
					if err != nil {
						t.Fatal(err)
					}
					if _, err := conn.Write([]byte(c.raw)); err != nil {
						t.Fatal(err)
					}
					if c.raw != "" {
						_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
						var b [100]byte
						for err == nil {
							_, err = conn.Read(b[:])
						}
						if channel.IsTimeout(err) {
							t.Error("the connection stays open")
						}
					}
					conn.Close()
				} else {
					// The peer trusts us, so it is we who refuse.
					peer := *c.peer
					peer.CA = own.CA
					b := start(t, bn, hostB, &peer)
					if err := b.send.Send(t.Context(), b.message(a, "no")); err == nil {
						t.Error("the message was acknowledged")
					}
				}
				deadline := time.Now().Add(30 * time.Second)
				for a.value("channel_tls_refused_total", "reason", c.reason) == 0 && time.Now().Before(deadline) {
					time.Sleep(5 * time.Millisecond)
				}
				for _, r := range []string{"plain", "certificate", "name", "closed", "handshake"} {
					if n := a.value("channel_tls_refused_total", "reason", r); (n > 0) != (r == c.reason) {
						t.Errorf("refused for %s: %v", r, n)
					}
				}
				if len(a.in) != 0 {
					t.Error("the message was delivered")
				}
				if err := good.send.Send(t.Context(), good.message(a, "yes")); err != nil {
					t.Errorf("a good peer afterwards: %v", err)
				}
			})
		})
	}
}

// A node with TLS and one without refuse each other at once, in words.
func TestPlainMembers(t *testing.T) {
	both(t, func(t *testing.T, an, bn transport.Net, hostA, hostB string) {
		ca := newAuthority(t)
		a, b := start(t, an, hostA, new(ca.issue(t.TempDir(), "a"))), start(t, bn, hostB, nil)
		for _, c := range []struct {
			from, to *node
			say      string
		}{{a, b, "set channel.tls there"}, {b, a, "set channel.tls here"}} {
			begin := time.Now()
			err := c.from.send.Send(t.Context(), c.from.message(c.to, "x"))
			if !errors.Is(err, tcp.ErrSecurity) || !strings.Contains(err.Error(), c.say) {
				t.Errorf("got %v", err)
			}
			if n := c.from.value("channel_send_insecure_total"); n != 1 {
				t.Errorf("counted %v", n)
			}
			if d := time.Since(begin); d > 10*time.Second {
				t.Errorf("it took %v", d)
			}
		}
		// Of a Tribes node nothing is announced: nothing is sent in clear.
		to := b.message(b, "secret")
		to.From = a.member
		to.To[0].Payload = ""
		if err := a.send.Send(t.Context(), to); err == nil || !strings.Contains(err.Error(), "Apache Tribes has no TLS") {
			t.Errorf("got %v", err)
		}
		if len(b.in) != 0 {
			t.Error("the message went in clear")
		}
	})
}

// New certificates are taken over by the next connections, those that stand stay.
func TestReload(t *testing.T) {
	n := real(t)
	ca := newAuthority(t)
	dirA, dirB := t.TempDir(), t.TempDir()
	ac, bc := ca.issue(dirA, "a"), ca.issue(dirB, "b")
	a, b := start(t, n, "127.0.0.1", &ac), start(t, n, "127.0.0.1", &bc)
	say := func(what string) error { return a.send.Send(t.Context(), a.message(b, what)) }
	if err := say("before"); err != nil {
		t.Fatal(err)
	}
	later := func(dir string) { // whatever the clock of the file system
		for _, f := range []string{"ca.pem", "cert.pem", "key.pem"} {
			if err := os.Chtimes(filepath.Join(dir, f), time.Time{}, time.Now().Add(time.Hour)); err != nil {
				t.Fatal(err)
			}
		}
	}
	next := newAuthority(t)
	next.issue(dirB, "b")
	later(dirB)
	if err := say("the connection stands"); err != nil {
		t.Error(err)
	}
	a.send.Forget(b.member)
	if err := say("no"); err == nil {
		t.Error("the old authority is still let in")
	}
	next.issue(dirA, "a")
	later(dirA)
	if err := say("after"); err != nil {
		t.Error(err)
	}
	if a.value("channel_tls_reloads_total") != 1 || b.value("channel_tls_reloads_total") != 1 {
		t.Error("not counted")
	}
	// Files that cannot be used change nothing.
	if err := os.WriteFile(ac.Key, []byte("half a"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.send.Forget(b.member)
	if err := say("still"); err != nil {
		t.Error(err)
	}
	if a.value("channel_tls_reload_failures_total") < 1 {
		t.Error("the failure was not counted")
	}
}

func TestValidate(t *testing.T) {
	ca := newAuthority(t)
	good := ca.issue(t.TempDir(), "a")
	swapped := good
	swapped.Key = ca.issue(t.TempDir(), "b").Key
	noCA := good
	noCA.CA = good.Key
	missing := good
	missing.Certificate = filepath.Join(t.TempDir(), "none.pem")
	for _, c := range []struct {
		cfg  secure.Config
		want string
	}{
		{good, ""}, {secure.Config{}, "ca is missing"}, {swapped, "private key does not match"}, {noCA, "no certificate"}, {missing, "none.pem"},
	} {
		err := c.cfg.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v, want %q", c.cfg, err, c.want)
		}
	}
}

// Everything that dials or listens on the network is under TLS.
func TestNet(t *testing.T) {
	ca := newAuthority(t)
	n, err := secure.New(ca.issue(t.TempDir(), "a"), channel.Settings{Net: real(t)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := channel.ListenTCP(n, netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			var b [5]byte
			k, _ := c.Read(b[:])
			_, _ = c.Write(b[:k])
			c.Close()
		}
	}()
	addr := l.Addr().(*net.TCPAddr)
	for name, dial := range map[string]func() (net.Conn, error){
		"Dial":    func() (net.Conn, error) { return n.Dial("tcp", addr.String()) },
		"DialTCP": func() (net.Conn, error) { return n.DialTCP("tcp", nil, addr) },
		"Dialer": func() (net.Conn, error) {
			return n.CreateDialer(&net.Dialer{Timeout: time.Minute}).Dial("tcp4", addr.String())
		},
	} {
		c, err := dial()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var b [5]byte
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if k, err := c.Read(b[:]); string(b[:k]) != "hello" {
			t.Errorf("%s: read %q, %v", name, b[:k], err)
		}
		c.Close()
	}
	if _, err := tls.Dial("tcp", addr.String(), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		t.Error("an old version of TLS was accepted")
	}
}
